"""Run one of timm's scripts with the models of this package registered.

For the scripts that have no --device-modules (validate.py, inference.py, benchmark.py, onnx_export.py, bulk_runner.py).
SCRIPT is a path, or the name of a file in the folder that the environment variable TIMM_SCRIPTS names. Everything
behind it goes to the script. Also: torchrun -m timm_el run train.py ... The processes that bulk_runner.py starts are
launched the same way.
"""
import os
import runpy
import sys

from .. import models  # noqa: F401  registers the models


def find_script(name: str) -> str:
    """Return the path of a script, as given, else in $TIMM_SCRIPTS; raise SystemExit if there is none."""
    folder = os.environ.get('TIMM_SCRIPTS')
    candidates = [name] + ([os.path.join(folder, name)] if folder else [])
    for path in candidates:
        if os.path.isfile(path):
            return path
    hint = f'nor in TIMM_SCRIPTS={folder}' if folder else 'set TIMM_SCRIPTS to the folder of timm\'s scripts'
    raise SystemExit(f'timm_el run: no file {name!r}, {hint}')


def through_launcher(args: list[str]) -> list[str]:
    """Return the arguments of bulk_runner.py with the child script started through this launcher."""
    for i, arg in enumerate(args):
        if arg.endswith('.py'):
            # Its --module takes a value and only asks whether there is one.
            return [*args[:i], '--module', 'yes', 'timm_el', 'run', *args[i:]]
    return args


def main(argv: list[str]) -> None:
    """Run a script as __main__."""
    if not argv or argv[0] in ('-h', '--help'):
        print(f'usage: timm-el run SCRIPT ...\n\n{__doc__}')
        raise SystemExit(0 if argv else 2)
    path, args = find_script(argv[0]), argv[1:]
    if os.path.basename(path) == 'bulk_runner.py':
        args = through_launcher(args)
    sys.argv = [path, *args]
    runpy.run_path(path, run_name='__main__')
