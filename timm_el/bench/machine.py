"""Description of the machine behind a number: processor and its class, threads, versions, forced settings."""
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from typing import Any

import torch

from .. import engine
from .processor_classes import CAPS, ProcessorClass, caps_to_set, choose_class, class_of, features_behind

# Environment variables that decide which kernels run, in this package and in its peers, and how its threads wait.
SETTINGS = (*CAPS, 'OMP_NUM_THREADS', 'OMP_WAIT_POLICY')


def _cpuinfo(field: str) -> str | None:
    """Return the first value of a field of Linux's /proc/cpuinfo, None on other systems."""
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':', 1)[1].strip() for line in f if line.startswith(field))
    except (OSError, StopIteration):
        return None


def cpu_name() -> str:
    """Return the name of the processor."""
    return _cpuinfo('model name') or platform.processor() or platform.machine()


def cpu_features() -> frozenset[str]:
    """Return the features of the processor by Linux's names; elsewhere only those that the engine found."""
    flags = _cpuinfo('flags') or _cpuinfo('Features')  # of x86, of Arm
    return frozenset(flags.split()) if flags else features_behind(engine.info()['available'])


def unset_caps(processor_class: str | None) -> dict[str, str]:
    """Return the environment variables that a class of processors needs, by name, and that are not set.

    Raises:
        ValueError: This processor cannot run as the class, or a variable that decides that is set to another value.
    """
    if processor_class is None:
        return {}
    features = cpu_features()
    return caps_to_set(choose_class(processor_class, features), class_of(features), os.environ)


def emulated_class(name: str | None) -> ProcessorClass | None:
    """Return the class of processors that this process emulates by environment variables.

    Args:
        name: The class; None: the processor runs as it is, with whatever variables are set.

    Returns:
        None if that is the processor's own class, or None was given.

    Raises:
        ValueError: This processor cannot run as the class, or the variables that make it so are not set.
    """
    unset = unset_caps(name)
    if unset:
        settings = ' '.join(f'{variable}={value}' for variable, value in unset.items())
        raise ValueError(
            f'{", ".join(unset)}: found none in the environment, expected {settings} for the processor class {name!r}; '
            f'set them before the process starts, libraries read them when they are loaded')
    features = cpu_features()
    own = class_of(features)
    return None if name in (None, own.name) else choose_class(name, features)


def describe(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return processor, its class, threads, settings in force, and the versions of torch and of the given packages."""
    versions = {}
    for package in ('torch', 'timm', *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {
        'cpu': cpu_name(), 'class': class_of(cpu_features()).name, 'threads': torch.get_num_threads(),
        'versions': versions, 'settings': {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }
