"""python -m timm_el summary MODEL: print `timm_el.summarize` of a timm model."""
import argparse
import json
from typing import List

from ..models.factory import create
from ..summary import summarize


def main(argv: List[str]) -> None:
    """Print the summary of a model, as a table or as JSON."""
    parser = argparse.ArgumentParser(prog='python -m timm_el summary', description=__doc__)
    parser.add_argument('model', help='name of a timm model')
    parser.add_argument('--recipe', help='binarize the model with this recipe')
    parser.add_argument('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), help="default: the model's own")
    parser.add_argument('--json', action='store_true', help='print data in place of a table')
    args = parser.parse_args(argv)
    result = summarize(create(args.model, args.recipe), args.input_size)
    print(json.dumps(result.to_dict(), indent=2) if args.json else result)
