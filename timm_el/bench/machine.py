"""Description of the machine behind a number: processor, instruction sets, threads, versions, forced settings."""
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from typing import Any

import torch

# Environment variables that decide which kernels run, in this package and in its peers.
SETTINGS = ('TIMM_EL_ISA', 'ONEDNN_MAX_CPU_ISA', 'OMP_NUM_THREADS', 'OMP_WAIT_POLICY')


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


def has_amx() -> bool | None:
    """Return whether the processor has AMX tiles, which int8 and bfloat16 kernels use; None if that is not known."""
    flags = _cpuinfo('flags')
    return None if flags is None else 'amx_tile' in flags.split()


def describe(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return processor, AMX, threads, settings in force, and the versions of torch and of the given packages."""
    versions = {}
    for package in ('torch', 'timm', *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {
        'cpu': cpu_name(), 'amx': has_amx(), 'threads': torch.get_num_threads(), 'versions': versions,
        'settings': {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }
