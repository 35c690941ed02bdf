"""Run timm's own model tests on the models of this package: python tests/scripts/timm_suite.py [pytest options].

Downloads the source distribution of the installed timm with pip (the wheel has no tests), needs pytest-timeout.
"""
import os
import subprocess
import sys
import tarfile
import tempfile

import timm


def main() -> int:
    """Returns pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:', '-d', folder,
             f'timm=={timm.__version__}'], check=True)
        root = f'timm-{timm.__version__}'
        with tarfile.open(os.path.join(folder, f'{root}.tar.gz')) as sdist:
            # Not the root itself: the timm in it would shadow the one installed.
            wanted = [m for m in sdist.getmembers() if m.name.startswith((f'{root}/tests', f'{root}/pyproject.toml'))]
            for member in wanted:
                member.name = os.path.relpath(member.name, root)
            sdist.extractall(folder, wanted, filter='data')
        # `-k el_` alone would match every test called "model_...".
        return subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', 'tests/test_models.py',
             '-k', 'el_resnet or el_mobilenet_v1 or reactnet', *sys.argv[1:]],
            cwd=folder, env={**os.environ, 'TORCH_BACKEND': 'timm_el'}).returncode


if __name__ == '__main__':
    sys.exit(main())
