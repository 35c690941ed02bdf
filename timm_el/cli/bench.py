"""python -m timm_el bench MODEL: what inference of a deployed model costs, or with --train what training costs.

Inference: the float host, the latent model, the deployed one and every installed peer take turns in one run; ratios are
medians over the pairs. A deployed time is only reported when the native path is active. TIMM_EL_ISA=avx2 (or another
body) and ONEDNN_MAX_CPU_ISA force instruction sets; they are read when the process starts.

Training: one step is forward, backward and optimizer step; the model and its float host take turns. Memory is what
autograd keeps for backward, parameters excluded.
"""
import argparse
import json
from typing import Any, Dict, Iterable, List

import torch

# What an option is if it is not given, by what is measured; an option that is not listed for one does not belong to it.
COMMON = {'pairs': 21, 'warmup': 2, 'batch': 1, 'size': None}
DEFAULTS = {
    'inference': {
        **COMMON, 'peers': 'all', 'also': [], 'float_dtype': None, 'allow_reference': False},
    'training': {
        **COMMON, 'pairs': 9, 'batch': 32, 'size': 64, 'opt': 'sgd', 'compile': False, 'channels_last': False},
}


def parse(argv: List[str]) -> argparse.Namespace:
    """Arguments with the defaults of what is measured.

    Raises:
        ValueError: An option belongs to the other measurement, or a count is not positive.
    """
    parser = argparse.ArgumentParser(
        prog='python -m timm_el bench', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS)
    parser.add_argument('model', help='name of a timm model')
    parser.add_argument('--train', action='store_true', default=False, help='measure training in place of inference')
    parser.add_argument('--host', default=None, help='float model to compare with (default: that of a registered one)')
    parser.add_argument('--recipe', default=None, help='binarize the model with this recipe')
    parser.add_argument('--batch', type=int, help='images (default: 1, training 32)')
    parser.add_argument('--size', type=int, help="pixels (default: the model's own, training 64)")
    parser.add_argument('--threads', type=int, default=None, help="of everybody (default: torch's own choice)")
    parser.add_argument('--pairs', type=int, help='rounds that count (default: 21, training 9)')
    parser.add_argument('--warmup', type=int, help='rounds before them (default: 2)')
    parser.add_argument('--json', action='store_true', default=False, help='print data in place of text')
    inference = parser.add_argument_group('inference')
    inference.add_argument('--peers', help="'all', 'none', or names separated by commas (default: all)")
    inference.add_argument('--also', action='append', metavar='RECIPE', help='deploy the net with this recipe too')
    inference.add_argument('--float-dtype', choices=['bfloat16'], help='deploy once more with float parts of this type')
    inference.add_argument(
        '--allow-reference', action='store_true', help='report times of the plain torch reference as deployed')
    training = parser.add_argument_group('training')
    training.add_argument('--opt', help='optimizer of timm (default: sgd)')
    training.add_argument('--compile', action='store_true', help='torch.compile both')
    training.add_argument('--channels-last', action='store_true')
    args = parser.parse_args(argv)
    kind, other = ('training', 'inference') if args.train else ('inference', 'training')
    for name in DEFAULTS[other].keys() - DEFAULTS[kind].keys():
        if hasattr(args, name):
            raise ValueError(
                f'{name}: it belongs to {other}, found it with {kind}; {"leave out" if args.train else "add"} --train')
    for name, value in DEFAULTS[kind].items():
        setattr(args, name, getattr(args, name, value))
    for name in ('batch', 'size', 'threads', 'pairs'):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f'{name}: found {value}, expected a positive integer')
    return args


def main(argv: List[str]) -> None:
    """Measure and print."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.train:
        from ..bench.training import measure_training as measure
        show = show_training
    else:
        from ..bench.inference import measure_inference as measure
        show = show_inference
    result = measure(args)
    print(json.dumps(result, indent=2) if args.json else '\n'.join(show(result)))


def show_training(r: Dict[str, Any]) -> Iterable[str]:
    """Lines of text for a result of `measure_training`."""
    yield (f'{r["cpu"]}, {r["threads"]} threads, torch {r["torch"]}, {r["mode"]}, batch {r["batch"]}, {r["size"]} px, '
           f'{r["opt"]}, median of {r["pairs"]} pairs')
    yield f'  {"":24} {"step, ms":>10} {"saved for backward, MB":>24}'
    for name in ('host', 'model'):
        yield f'  {r[name]:24} {r[f"{name}_ms"]:>10.1f} {r[f"{name}_saved_mb"]:>24.1f}'
    yield (f'  {"ratio":24} {r["time_ratio"]:>10.3f} {r["memory_ratio"]:>24.3f}   '
           f'(time {r["time_ratio_min"]:.3f} to {r["time_ratio_max"]:.3f})')


def show_inference(r: Dict[str, Any]) -> Iterable[str]:
    """Lines of text for a result of `measure_inference`."""
    machine, engine = r['machine'], r['engine']
    amx = {True: 'AMX', False: 'no AMX', None: 'AMX unknown'}[machine['amx']]
    forced = ''.join(f', {name}={value}' for name, value in machine['settings'].items())
    native = 'native' if engine['native'] else f'NOT native: {engine["reason"]}'
    yield f'{machine["cpu"]}, {amx}, {machine["threads"]} threads{forced}'
    yield ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    yield (f'deployed: body {engine["body"]} ({native}); batch {r["batch"]}, {"x".join(map(str, r["size"]))} px, '
           f'medians of {r["pairs"]} rounds')
    yield ''
    yield (f'  {"":20} {"net":24} {"ms":>8} {"min..max":>15} {"/ deployed":>11} {"min..max":>13} {"difference":>11}')
    for row in r['contestants']:
        ms, ratio = row['ms'], row['ratio']
        yield (f'  {row["name"]:20} {row["of"]:24} {ms["median"]:>8.2f} {_span(ms):>15} {ratio["median"]:>11.2f} '
               f'{_span(ratio):>13} {row["difference"]:>11.1e}  {row["note"]}').rstrip()
    for name, why in r['absent'].items():
        yield f'  {name:20} {why}'
    yield '  difference: largest one of a logit from the same net in torch, relative to the largest logit. One flipped'
    yield '  sign avalanches through an untrained binarized net.'
    yield ''
    yield from _show_layers(r)


def _show_layers(r: Dict[str, Any]) -> Iterable[str]:
    width = max(len(row['path']) for row in r['layers'])
    head = f'{"kind":13} {"ms":>8} {"share":>6} {"binary M MACs":>14} {"float M MACs":>13} {"G MAC/s":>9}'
    yield f'  {"deployed, by layer":{width}} {head}'
    for row in r['layers']:
        share = row['ms'] / r['whole_ms']
        if row['binary_macs'] or row['real_macs'] or share > 5e-3:
            yield f'  {row["path"]:{width}} {_cells(row["kind"], {**row, "share": share})}'
    yield f'  {"all":{width}} {"":13} {r["whole_ms"]:>8.3f}'
    yield ''
    yield f'  {head}'
    for kind, total in r['kinds'].items():
        yield f'  {_cells(kind, total)}'
    if r['binary']:
        binary = r['binary']
        yield f'  binary layers, all that is in them: {binary["macs_per_s"] / 1e12:.3f} T binary MAC/s'
        for key, what in (('gemm', 'their products alone'), ('chip', 'xor, popcount and add on registers')):
            if f'{key}_macs_per_s' in binary:
                yield f'  {what}: {binary[f"{key}_macs_per_s"] / 1e12:.3f} T binary MAC/s'
        if 'gemm_share_of_chip' in binary:
            yield f'  products / registers: {binary["gemm_share_of_chip"]:.2f}'


def _cells(kind: str, row: Dict[str, float]) -> str:
    return (f'{kind:13} {row["ms"]:>8.3f} {row["share"]:>6.1%} {row["binary_macs"] / 1e6:>14.1f} '
            f'{row["real_macs"] / 1e6:>13.1f} {row["macs_per_s"] / 1e9:>9.1f}')


def _span(spread: Dict[str, float]) -> str:
    return f'{spread["min"]:.2f}..{spread["max"]:.2f}'
