"""Convert a net and print a report and a summary, layer by layer.

NET is a model of timm, or `tv:` and the name of one of torchvision's.
"""
import json

import timm
import torch

from ..convert import binarize
from ..summary import summarize
from ._arguments import add_json, parser_of, positive


def main(argv: list[str]) -> None:
    """Convert a net and print its report and its summary."""
    parser = parser_of('convert', __doc__)
    parser.add_argument('net', metavar='NET', help='resnet50, tv:resnet50')
    parser.add_argument('--recipe', default='el', help='how to binarize (default: el)')
    parser.add_argument('--keep', nargs='+', default=[], metavar='PATTERN', help='layers to keep float')
    parser.add_argument('--strict', action='store_true', help='fail if a convolution cannot be converted')
    parser.add_argument(
        '--input-size', type=positive, nargs=3, metavar=('C', 'H', 'W'), help="default: the model's own")
    add_json(parser)
    args = parser.parse_args(argv)
    images = args.input_size and torch.randn((2, *args.input_size), generator=torch.Generator().manual_seed(0))
    model = binarize(_create_host(args.net), args.recipe, keep=args.keep, strict=args.strict, example_input=images)
    summary = summarize(model, args.input_size)
    if args.json:
        print(json.dumps({'report': model.binarize_report.to_dict(), 'summary': summary.to_dict()}, indent=2))
    else:
        print(f'{model.binarize_report}\n\n{summary}')


def _create_host(name: str):
    """Return a float net by its name in timm, or `tv:` and its name in torchvision."""
    if not name.startswith('tv:'):
        return timm.create_model(name)
    import torchvision
    return torchvision.models.get_model(name[3:])
