"""Measure a binarized network beside its float host: inference with other engines, or training.

infer: the float host, the latent model, the deployed one and every installed peer take turns in one run; ratios are
medians over the pairs. A deployed time is only reported when the native path is active. TIMM_EL_ISA=avx2 (or another
instruction set) and ONEDNN_MAX_CPU_ISA force instruction sets; they are read when the process starts.

train: one step is forward, backward and optimizer step; the model and its float host take turns. Memory is what
autograd keeps for backward, parameters excluded.
"""
import argparse
import json

from ._arguments import add_json, add_threads, parser_of, positive, set_threads
from ._show_bench import show_inference, show_training


def main(argv: list[str]) -> None:
    """Measure inference or training and print the result."""
    parser = parser_of('bench', __doc__)
    what = parser.add_subparsers(dest='what', metavar='infer | train', required=True)
    infer, train = (what.add_parser(name, help=line) for name, line in (
        ('infer', 'inference of the deployed network'), ('train', 'a training step')))
    _add_common(infer, batch=1, size=None, pairs=21)
    infer.add_argument('--peers', default='all', help="'all', 'none', or names separated by commas (default: all)")
    infer.add_argument('--also', action='append', default=[], metavar='RECIPE',
                       help='deploy the net with this recipe too')
    infer.add_argument('--float-dtype', choices=['bfloat16'], help='deploy once more with float parts of this type')
    infer.add_argument(
        '--allow-reference', action='store_true', help='report times of the plain torch reference as deployed')
    _add_common(train, batch=32, size=64, pairs=9)
    train.add_argument('--opt', default='sgd', help='optimizer of timm (default: sgd)')
    train.add_argument('--compile', action='store_true', dest='compiled', help='torch.compile both')
    train.add_argument('--channels-last', action='store_true')
    train.add_argument('--device', default='cpu', help='default: cpu')
    train.add_argument('--amp', action='store_true', help='autocast in bfloat16')
    args = vars(parser.parse_args(argv))
    set_threads(args.pop('threads'))
    as_json, kind = args.pop('json'), args.pop('what')
    if kind == 'train':
        from ..bench.training import measure_training as measure
    else:
        from ..bench.inference import measure_inference as measure
    result, show = measure(**args), show_training if kind == 'train' else show_inference
    print(json.dumps(result, indent=2) if as_json else '\n'.join(show(result)))


def _add_common(parser: argparse.ArgumentParser, batch: int, size: int, pairs: int) -> None:
    parser.add_argument('model', help='name of a timm model')
    parser.add_argument('--host', help='float model to compare with (default: that of a registered one)')
    parser.add_argument('--recipe', help='binarize the model with this recipe')
    parser.add_argument('--batch', type=positive, default=batch, help=f'images (default: {batch})')
    parser.add_argument('--size', type=positive, default=size, help=f"pixels (default: {size or 'the model own size'})")
    parser.add_argument('--pairs', type=positive, default=pairs, help=f'rounds that count (default: {pairs})')
    parser.add_argument('--warmup', type=int, default=2, help='rounds before them (default: 2)')
    add_threads(parser)
    add_json(parser)
