"""Write a picture as PNG.

Each picture is a module of `timm_el.cli.plots` with HELP, `add_arguments(parser)` and `draw(args) -> Figure`.
"""
import argparse
import importlib
from pathlib import Path

PICTURES = ('gamma', 'features', 'estimators', 'training', 'telemetry', 'tradeoff')


def main(argv: list[str]) -> None:
    """Draw a picture and save it."""
    parser = argparse.ArgumentParser(prog='timm-el plot', description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest='picture', metavar='PICTURE', required=True)
    for name in PICTURES:
        picture = importlib.import_module(f'.plots.{name}', __package__)
        verb = verbs.add_parser(name, help=picture.HELP, description=picture.__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        picture.add_arguments(verb)
        verb.add_argument('--output', metavar='FILE', help=f'default: {name}.png')
        verb.add_argument('--dpi', type=int, default=100, help='default: 100')
        verb.set_defaults(draw=picture.draw)
    args = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise SystemExit('plot needs matplotlib: pip install "timm-el[plot]"') from e
    output = Path(args.output or f'{args.picture}.png')
    if not output.resolve().parent.is_dir():
        raise ValueError(f'output: found no folder {str(output.parent)!r}, expected one that exists')
    if output.suffix != '.png':
        raise ValueError(f'output: found {str(output)!r}, expected a name that ends in .png')
    figure = args.draw(args)
    # Without the version of matplotlib in it, the same picture is the same file.
    figure.savefig(output, dpi=args.dpi, metadata={'Software': None})
    print(output)
