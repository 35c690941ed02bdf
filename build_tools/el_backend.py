"""Build backend: setuptools', which also asks for Zig where there is no C compiler."""
from el_compile import zig_requirement
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are


def get_requires_for_build_wheel(config_settings=None):
    """Return what a wheel needs to be built."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *zig_requirement()]


def get_requires_for_build_editable(config_settings=None):
    """Return what an editable install needs."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *zig_requirement()]
