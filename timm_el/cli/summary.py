"""Print bits, bytes and operations of a model, layer by layer: `timm_el.summarize`."""
import json

from ..models.factory import create
from ..summary import summarize
from ._arguments import add_json, parser_of


def main(argv: list[str]) -> None:
    """Print the summary of a model, as a table or as JSON."""
    parser = parser_of('summary', __doc__)
    parser.add_argument('model', help='name of a timm model')
    parser.add_argument('--recipe', help='binarize the model with this recipe')
    parser.add_argument('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), help="default: the model's own")
    add_json(parser)
    args = parser.parse_args(argv)
    result = summarize(create(args.model, args.recipe), args.input_size)
    print(json.dumps(result.to_dict(), indent=2) if args.json else result)
