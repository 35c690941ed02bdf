"""Measure a binarized network beside its float host: inference with other engines, or training.

infer: the float host, the latent model, the deployed one and every installed peer take turns in one run; ratios are
medians over the pairs. A deployed time is only reported when the native path is active. --processor-class runs all of
them as on a lower class of processors, by environment variables (TIMM_EL_ISA, ONEDNN_MAX_CPU_ISA and others) that
another process is started with; what they do not reach is left out, or marked as not capped.

train: one step is forward, backward and optimizer step; the model and its float host take turns. Memory is what
autograd keeps for backward, parameters excluded.

table: what `infer --record` wrote, as Markdown tables with a row for each class of processors.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from ._arguments import add_json, add_threads, natural, parser_of, positive, set_threads
from ._show_bench import show_inference, show_training


def main(argv: list[str]) -> int:
    """Measure inference or training, or read measurements, print the result, and return the exit status."""
    args = vars(_parser().parse_args(argv))
    kind = args.pop('what')
    if kind == 'table':
        from ..bench.class_table import read_records, tables
        print(tables(read_records(args['file']), args['base']))
        return 0
    set_threads(args.pop('threads'))
    as_json, record = args.pop('json'), args.pop('record', None)
    if kind == 'train':
        from ..bench.training import measure_training as measure
    else:
        from ..bench.inference import measure_inference as measure
        from ..bench.machine import unset_caps
        caps = unset_caps(args['processor_class'])
        if caps:
            return _start_again(argv, caps)
    if record and not record.absolute().parent.is_dir():
        raise ValueError(f'record: found no folder {str(record.parent)!r}, expected one that is there')
    result, show = measure(**args), show_training if kind == 'train' else show_inference
    print(json.dumps(result) if as_json else '\n'.join(show(result)))
    if record:
        from ..bench.class_table import append_record
        append_record(record, result)
    return 0


def _start_again(argv: list[str], variables: dict[str, str]) -> int:
    """Run this verb in a new process, whose libraries read the variables as they are loaded; return its exit status."""
    command = [sys.executable, '-m', 'timm_el', 'bench', *argv]
    return subprocess.run(command, env={**os.environ, **variables}).returncode


def _parser() -> argparse.ArgumentParser:
    parser = parser_of('bench', __doc__)
    what = parser.add_subparsers(dest='what', metavar='infer | train | table', required=True)
    infer, train, table = (what.add_parser(name, help=line) for name, line in (
        ('infer', 'inference of the deployed network'), ('train', 'a training step'),
        ('table', 'recorded measurements as Markdown')))
    _add_common(infer, batch=1, size=None, pairs=21)
    infer.add_argument('--peers', default='all', help="'all', 'none', or names separated by commas (default: all)")
    infer.add_argument('--also', action='append', default=[], metavar='RECIPE',
                       help='deploy the net with this recipe too')
    infer.add_argument('--float-dtype', action='append', default=[], choices=('bfloat16', 'float16', 'int8'),
                       dest='float_dtypes', help='deploy once more with float parts of this type')
    infer.add_argument('--processor-class', metavar='CLASS', help='run as this class, such as avx2 (default: as it is)')
    infer.add_argument('--record', type=Path, metavar='FILE', help='append the result to a file for `bench table`')
    infer.add_argument(
        '--allow-reference', action='store_true', help='report times of the plain torch reference as deployed')
    _add_common(train, batch=32, size=64, pairs=9)
    train.add_argument('--opt', default='sgd', help='optimizer of timm (default: sgd)')
    train.add_argument('--compile', action='store_true', dest='compiled', help='torch.compile both')
    train.add_argument('--channels-last', action='store_true')
    train.add_argument('--device', default='cpu', help='default: cpu')
    train.add_argument('--amp', action='store_true', help='autocast in bfloat16')
    table.add_argument('file', type=Path, help='what --record wrote')
    table.add_argument('--base', default='deployed', help='contestant that ratios are to (default: deployed)')
    return parser


def _add_common(parser: argparse.ArgumentParser, batch: int, size: int | None, pairs: int) -> None:
    parser.add_argument('model', help='name of a timm model')
    parser.add_argument('--host', help='float model to compare with (default: that of a registered one)')
    parser.add_argument('--recipe', help='binarize the model with this recipe')
    parser.add_argument('--batch', type=positive, default=batch, help=f'images (default: {batch})')
    parser.add_argument('--size', type=positive, default=size, help=f"pixels (default: {size or 'the model own size'})")
    parser.add_argument('--pairs', type=positive, default=pairs, help=f'rounds that count (default: {pairs})')
    parser.add_argument('--warmup', type=natural, default=2, help='rounds before them (default: 2)')
    add_threads(parser)
    add_json(parser)
