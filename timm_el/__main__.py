"""Entry point of the shell verbs, timm-el VERB or python -m timm_el VERB; each is a module of `timm_el.cli`."""
import importlib
import os
import sys

from .cli import VERBS


def main(argv: list[str] | None = None) -> int:
    """Run a verb, or print the list of verbs where none is named, and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ('-h', '--help'):
        print('usage: timm-el VERB [-h] ...\n\nverbs:')
        for verb, line in VERBS.items():
            print(f'  {verb:10} {line}')
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        print(f'timm_el: unknown verb {verb!r}, expected one of {", ".join(VERBS)}', file=sys.stderr)
        return 2
    command = importlib.import_module(f'timm_el.cli.{verb}')
    if verb == 'run':  # the script's own errors keep their tracebacks
        return command.main(rest) or 0
    try:
        return command.main(rest) or 0
    except (OSError, TypeError, ValueError, RuntimeError) as e:  # timm: RuntimeError for a model that it does not know
        if os.environ.get('TIMM_EL_TRACEBACK'):
            raise
        print(f'timm_el {verb}: {e}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
