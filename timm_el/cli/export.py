"""Write a binarized network as files that run without torch.

-o NET.program is for timm-el-run, `timm_el.load_program` and C. --python writes a folder that needs NumPy alone, and
--web a page that runs in a browser. With --to, FILE is for another engine; it has been compared with the network.
"""
import argparse
from pathlib import Path

import torch

from ..engine import deploy
from ..experiments.nets import NET_HELP, PRETRAINED, Net
from ._arguments import parser_of, positive

DTYPES = {'float32': torch.float32, 'int8': torch.int8}


def main(argv: list[str]) -> None:
    """Export and print what was written."""
    parser = parser_of('export', __doc__)
    parser.add_argument('net', metavar='NET', help=f'{NET_HELP}. Default of the weights: fresh ones')
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', help='the file')
    parser.add_argument('--checkpoint', metavar='FILE', help='the same as NET@FILE')
    parser.add_argument('--pretrained', action='store_true', help=f'the same as NET@{PRETRAINED}')
    parser.add_argument('--size', type=positive, nargs=2, metavar=('H', 'W'), help="pixels (default: the model's own)")
    parser.add_argument('--python', type=Path, metavar='DIR', help='write a folder: net.py and what it needs')
    parser.add_argument('--web', type=Path, metavar='DIR', help='write a page')
    parser.add_argument('--to', choices=['onnx', 'openvino'], help='write a file for this engine in place of a program')
    parser.add_argument(
        '--float-dtype', choices=DTYPES, default='float32',
        help='in which real convolutions and the classifier compute (default: %(default)s)')
    args = parser.parse_args(argv)
    if not (args.output or args.python or args.web):
        raise ValueError('found no place to write to, expected -o FILE, --python DIR or --web DIR')
    if args.to and not args.output:
        raise ValueError(f'--to {args.to}: found no file, expected -o FILE')
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f'-o {args.output}: found no folder {args.output.parent}, expected one that is there')
    model, size = _net(args).build(), args.size and tuple(args.size)
    if args.float_dtype != 'float32':
        model = deploy(model, float_dtype=DTYPES[args.float_dtype])
    if args.output:
        print(_write_file(model, args.output, args.to, size))
    if args.python:
        from ..engine.standalone import write_python
        print(f'{args.python}: {write_python(model, args.python, size):,} bytes')
    if args.web:
        from ..engine.web import write_web_page
        print(f'{args.web}: {write_web_page(model, args.web, size):,} bytes')


def _net(args: argparse.Namespace) -> Net:
    if args.pretrained and args.checkpoint:
        raise ValueError('found both --pretrained and --checkpoint, expected one of them')
    weights = PRETRAINED if args.pretrained else args.checkpoint
    return Net.parse(args.net if weights is None else f'{args.net}@{weights}')


def _write_file(model, path: Path, to: str | None, size: tuple[int, int] | None) -> str:
    """Write one file; return a line about it."""
    if to is None:
        from ..engine import export, read_program
        written = export(model, path, size=size)
        return f'{path}: {written:,} bytes, {len(read_program(path).program.steps)} steps, no islands'
    from ..engine import exchange
    written = {'onnx': exchange.write_onnx, 'openvino': exchange.write_openvino}[to](model, path, size)
    return f'{path}: {written}'
