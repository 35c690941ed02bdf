"""Build wheels for the platforms that people have, from this one machine.

    python build_tools/wheels.py [--output dist] [PLATFORM ...]

Zig compiles the kernels for each platform; pip fetches it into the build's own environment.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

from el_compile import ROOT, TARGETS


def build_wheel(target: str, output: Path) -> Path:
    """Build the wheel of a key of `TARGETS` into the folder `output` and return its path.

    Raises:
        subprocess.CalledProcessError: The build failed; pip has printed why.
    """
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', str(output), str(ROOT)], check=True,
        env={**os.environ, 'TIMM_EL_TARGET': target})
    return next(output.glob(f'timm_el-*-py3-none-{TARGETS[target].tag}.whl'))


def main() -> None:
    """Build what the command line names, all platforms by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('platforms', nargs='*', metavar='PLATFORM', help=', '.join(TARGETS))
    parser.add_argument('--output', type=Path, default=Path('dist'), help='folder of the wheels (default: dist)')
    args = parser.parse_args()
    unknown = set(args.platforms) - set(TARGETS)
    if unknown:
        parser.error(f'PLATFORM: found {", ".join(sorted(unknown))}, expected some of {", ".join(TARGETS)}')
    for target in args.platforms or TARGETS:
        wheel = build_wheel(target, args.output)
        print(f'{target:14}  {wheel.stat().st_size / 1e6:5.1f} MB  {wheel}', flush=True)


if __name__ == '__main__':
    main()
