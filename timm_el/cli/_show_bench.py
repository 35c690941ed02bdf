"""Lines of text for the results of `bench`."""
from collections.abc import Iterator
from typing import Any

from ..tables import table


def show_training(r: dict[str, Any]) -> Iterator[str]:
    """Yield lines for a result of `measure_training`."""
    yield (f'{r["device"]}, {r["threads"]} threads, torch {r["torch"]}, {r["mode"]}{", amp" if r["amp"] else ""}, '
           f'batch {r["batch"]}, {r["size"]} px, {r["opt"]}, median of {r["pairs"]} pairs')
    rows = [(r[name], *(f'{r[f"{name}_{what}"]:.1f}' for what in ('ms', 'first_ms', 'saved_mb')))
            for name in ('host', 'model')]
    rows.append(('ratio', f'{r["time_ratio"]:.3f}', '', f'{r["memory_ratio"]:.3f}'))
    yield table(('', 'step, ms', 'first step, ms', 'saved for backward, MB'), rows, '<>')
    yield f'time ratio {r["time_ratio_min"]:.3f} to {r["time_ratio_max"]:.3f}; memory is that of eager mode'


def show_inference(r: dict[str, Any]) -> Iterator[str]:
    """Yield lines for a result of `measure_inference`."""
    machine, engine = r['machine'], r['engine']
    forced = ''.join(f', {name}={value}' for name, value in machine['settings'].items())
    native = 'native' if engine['native'] else f'NOT native: {engine["reason"]}'
    emulated = f', emulates {r["emulated"]}' if r['emulated'] else ''
    yield f'{machine["cpu"]}, class {machine["class"]}{emulated}, {machine["threads"]} threads{forced}'
    yield ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    yield (f'deployed: backend {engine["body"]} ({native}); batch {r["batch"]}, {"x".join(map(str, r["size"]))} px, '
           f'medians of {r["pairs"]} rounds')
    yield ''
    bases = list(r['contestants'][0]['ratios'])
    head = ('', 'net', 'ms', 'min..max', 'images/s', *(text for base in bases for text in (f'/ {base}', 'min..max')),
            'difference', 'kernels', '')
    yield table(head, map(_contestant, r['contestants']), f'<<>>>{">>" * len(bases)}><')
    for name, why in r['absent'].items():
        yield f'{name:20} {why}'
    yield 'difference: largest one of a logit from the same net in torch, relative to the largest logit. One flipped'
    yield 'sign avalanches through an untrained binarized net.'
    yield ''
    yield from _show_layers(r)


def _contestant(row: dict[str, Any]) -> tuple[str, ...]:
    ratios = (text for ratio in row['ratios'].values() for text in (f'{ratio["median"]:.2f}', _span(ratio)))
    remarks = ('NOT CAPPED' * (row['capped'] is False), row['note'])
    return (
        row['name'], row['of'], f'{row["ms"]["median"]:.2f}', _span(row['ms']), f'{row["images_per_s"]:.1f}', *ratios,
        f'{row["difference"]:.1e}', row['kernels'], ', '.join(filter(None, remarks)))


def _show_layers(r: dict[str, Any]) -> Iterator[str]:
    head, align = ('kind', 'ms', 'share', 'binary M MACs', 'float M MACs', 'G MAC/s'), '<<>'
    rows = [(row['path'], *_cells(row['kind'], {**row, 'share': row['ms'] / r['whole_ms']})) for row in r['layers']
            if row['binary_macs'] or row['real_macs'] or row['ms'] / r['whole_ms'] > 5e-3]
    yield table(('deployed, by layer', *head), [*rows, ('all', '', f'{r["whole_ms"]:.3f}', '', '', '', '')], align)
    yield ''
    yield table(head, [_cells(kind, total) for kind, total in r['kinds'].items()], '<>')
    if r['binary']:
        binary = r['binary']
        yield f'binary layers, all that is in them: {binary["macs_per_s"] / 1e12:.3f} T binary MAC/s'
        for key, what in (('gemm', 'their products alone'), ('chip', 'xor, popcount and add on registers')):
            if f'{key}_macs_per_s' in binary:
                yield f'{what}: {binary[f"{key}_macs_per_s"] / 1e12:.3f} T binary MAC/s'
        if 'gemm_share_of_chip' in binary:
            yield f'products / registers: {binary["gemm_share_of_chip"]:.2f}'


def _cells(kind: str, row: dict[str, float]) -> tuple[str, ...]:
    return (kind, f'{row["ms"]:.3f}', f'{row["share"]:.1%}', f'{row["binary_macs"] / 1e6:.1f}',
            f'{row["real_macs"] / 1e6:.1f}', f'{row["macs_per_s"] / 1e9:.1f}')


def _span(spread: dict[str, float]) -> str:
    return f'{spread["min"]:.2f}..{spread["max"]:.2f}'
