"""Print bits, bytes and operations of a model, layer by layer: `timm_el.summarize`."""
import json

from ..experiments.nets import NET_HELP, Net
from ..summary import summarize
from ._arguments import add_json, parser_of


def main(argv: list[str]) -> None:
    """Print the summary of a model, as a table or as JSON."""
    parser = parser_of('summary', __doc__)
    parser.add_argument('net', metavar='NET', help=NET_HELP)
    parser.add_argument('--recipe', help='the same as NET:RECIPE')
    parser.add_argument('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), help="default: the model's own")
    add_json(parser)
    args = parser.parse_args(argv)
    result = summarize(Net.parse(f'{args.net}:{args.recipe}' if args.recipe else args.net).build(), args.input_size)
    print(json.dumps(result.to_dict(), indent=2) if args.json else result)
