"""Classes of processors: which one a processor is of, and how a lower one is emulated on both sides."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import timm_el
from timm_el.__main__ import main
from timm_el.bench import machine, peers
from timm_el.bench.class_table import append_record, read_records, tables
from timm_el.bench.machine import cpu_features, emulated_class
from timm_el.bench.processor_classes import CAPS, CLASSES, caps_to_set, choose_class, class_of, features_behind

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {row.name: row for row in CLASSES}
HASWELL = frozenset({'sse4_1', 'avx2', 'fma'})
SKYLAKE = HASWELL | {'avx512f', 'avx512bw', 'avx512vl', 'avx512dq'}
CASCADE_LAKE = SKYLAKE | {'avx512_vnni'}
ZEN_4 = CASCADE_LAKE | {'avx512_vpopcntdq', 'avx512_bf16'}
SAPPHIRE_RAPIDS = ZEN_4 | {'amx_tile', 'amx_int8', 'amx_bf16'}
ALDER_LAKE = HASWELL | {'avx_vnni'}
GRAVITON_2 = frozenset({'fp', 'asimd', 'asimddp'})
CORTEX_A72 = frozenset({'fp', 'asimd'})


@pytest.mark.parametrize('features, name', [
    (SAPPHIRE_RAPIDS, 'amx'), (ZEN_4, 'vpopcntdq'), (CASCADE_LAKE, 'avx512'), (SKYLAKE, 'avx512'),
    (ALDER_LAKE, 'avx2'), (HASWELL, 'avx2'), ({'sse4_1', 'avx'}, 'sse4'), (GRAVITON_2, 'arm-dot'),
    (CORTEX_A72, 'arm'), (frozenset(), 'other'),
    (SAPPHIRE_RAPIDS - {'amx_int8'}, 'vpopcntdq'),  # tiles alone multiply nothing
    (ZEN_4 - {'avx512_vnni'}, 'avx512'), (SKYLAKE - {'avx512vl'}, 'avx2'), (HASWELL - {'fma'}, 'sse4'),
])
def test_features_give_the_class(features, name):
    assert class_of(features).name == name


def test_a_class_runs_the_instruction_set_that_the_engine_chooses():
    assert class_of(cpu_features()).isa == timm_el.engine.info()['available'][0]


def test_every_instruction_set_is_that_of_a_class():
    table = (ROOT / 'timm_el' / 'engine' / 'kernels' / 'isa.c').read_text()
    assert {row.isa for row in CLASSES} == set(re.findall(r'\.name = "(\w+)"', table))


@pytest.mark.parametrize('available, name', [
    (['avx512', 'avx512bw', 'avx2', 'portable'], 'vpopcntdq'), (['avx512bw', 'avx2', 'portable'], 'avx512'),
    (['avx2', 'portable'], 'avx2'), (['neondot', 'neon', 'portable'], 'arm-dot'), (['neon', 'portable'], 'arm'),
    (['portable'], 'other'), ([], 'other'),
])
def test_without_a_list_of_features_the_engine_tells_the_class(available, name, monkeypatch):
    assert class_of(features_behind(available)).name == name
    monkeypatch.setattr(machine, '_cpuinfo', lambda field: None)
    monkeypatch.setattr(timm_el.engine, 'info', lambda: {'available': available})
    assert class_of(cpu_features()).name == name


@pytest.mark.parametrize('name, caps', [
    ('vpopcntdq', ('avx512', 'AVX512_CORE_VNNI', 'avx512', 'AVX512')),
    ('avx512', ('avx512bw', 'AVX512_CORE_VNNI', 'avx512', 'AVX512')), ('avx2', ('avx2', 'AVX2', 'avx2', 'AVX2')),
    ('sse4', ('portable', 'SSE41', 'default', 'SSE4_2')),
])
def test_both_sides_are_capped(name, caps):
    chosen, own = choose_class(name, SAPPHIRE_RAPIDS), class_of(SAPPHIRE_RAPIDS)
    assert caps_to_set(chosen, own, {}) == dict(zip(CAPS, caps))
    assert caps_to_set(chosen, own, dict(zip(CAPS, caps))) == {}
    some = dict(zip(CAPS[:2], caps))
    assert caps_to_set(chosen, own, some) == dict(zip(CAPS[2:], caps[2:]))


def test_the_own_class_is_not_capped():
    for features in (SAPPHIRE_RAPIDS, ZEN_4, CASCADE_LAKE, HASWELL, GRAVITON_2, CORTEX_A72, frozenset()):
        own = class_of(features)
        assert choose_class(own.name, features) is own and caps_to_set(own, own, {}) == {}


@pytest.mark.parametrize('features, name, lower, remedy', [
    (ZEN_4, 'amx', 'avx512, avx2, sse4', 'measure it on a processor of that class'),
    (HASWELL, 'avx512', 'sse4', 'measure it on a processor of that class'),
    (ZEN_4, 'arm', 'avx512, avx2, sse4', 'measure it on a processor of that class'),
    (ZEN_4, 'other', 'avx512, avx2, sse4', 'measure it on a processor of that class'),
    (GRAVITON_2, 'arm', 'none', 'measure it on a processor of that class'),  # peers cannot be capped there
    (GRAVITON_2, 'sse4', 'none', 'measure it on a processor of that class'),
    (CASCADE_LAKE, 'avx-512', 'avx2, sse4', 'choose one of them'),
])
def test_a_class_that_cannot_be_emulated_is_refused(features, name, lower, remedy):
    with pytest.raises(ValueError) as error:
        choose_class(name, features)
    assert str(error.value) == (
        f"processor class: found {name!r}, expected {class_of(features).name!r}, this processor's own, or a lower one "
        f'that it can emulate ({lower}); {remedy}')


@pytest.mark.parametrize('variable', CAPS)
def test_a_variable_with_another_value_is_refused(variable):
    own = class_of(ZEN_4)
    with pytest.raises(ValueError, match=f"{variable}: found 'x' in the environment, expected '.*' for the processor "
                                         f"class 'avx2'; unset it"):
        caps_to_set(BY_NAME['avx2'], own, {variable: 'x'})
    with pytest.raises(ValueError, match=f"{variable}: found 'avx2' in the environment, expected none for the "):
        caps_to_set(own, own, {variable: 'avx2'})


@pytest.mark.parametrize('name, can, cannot', [
    ('vpopcntdq', '17 brgconv_avx512_I8', '1 brgconv_avx512_amx_I8'),
    ('avx512', 'avx512bw', 'brgconv_avx512_amx_bf16'), ('avx2', '3 jit_avx2_I8', '3 jit_avx2_I8 + 16 jit_avx512_u1'),
    ('avx2', 'eager: ATen AVX2, oneDNN', 'eager: ATen AVX512, oneDNN'),
    ('sse4', 'eager: ATen NO AVX, oneDNN', 'eager: ATen AVX2, oneDNN'), ('sse4', '20 jit_sse42_f32', 'jit_avx2_I8'),
])
def test_names_of_kernels_show_whether_a_cap_holds(name, can, cannot):
    assert BY_NAME[name].can_run(can) and not BY_NAME[name].can_run(cannot)


# ---------------------------------------------------------------------------------------------------------------------
# The verb


@pytest.fixture
def zen_4(monkeypatch):
    """A processor of class vpopcntdq, and no caps."""
    monkeypatch.setattr(machine, 'cpu_features', lambda: ZEN_4)
    for variable in CAPS:
        monkeypatch.delenv(variable, raising=False)


def test_a_lower_class_starts_another_process(zen_4, monkeypatch):
    started = []

    def run(command, env):
        started.append((command, env))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, 'run', run)
    argv = ['bench', 'infer', 'el_resnet18', '--processor-class', 'avx2']
    assert main(argv) == 7
    (command, env), = started
    assert command == [sys.executable, '-m', 'timm_el', *argv]
    assert {name: env[name] for name in CAPS} == BY_NAME['avx2'].caps
    assert set(env) == set(os.environ) | set(CAPS)


@pytest.mark.parametrize('name, variables, message', [
    ('amx', {}, "processor class: found 'amx', expected 'vpopcntdq'"),
    ('avx1024', {}, "processor class: found 'avx1024', expected 'vpopcntdq'"),
    ('avx2', {'ONEDNN_MAX_CPU_ISA': 'AVX'}, "ONEDNN_MAX_CPU_ISA: found 'AVX' in the environment, expected 'AVX2'"),
    ('vpopcntdq', {'TIMM_EL_ISA': 'avx2'}, "TIMM_EL_ISA: found 'avx2' in the environment, expected none"),
])
def test_errors_are_one_line(zen_4, name, variables, message, monkeypatch, capsys):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert main(['bench', 'infer', 'el_resnet18', '--processor-class', name]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count('\n') == 1 and captured.out == ''


def test_a_process_that_was_started_without_caps_emulates_nothing(zen_4, monkeypatch):
    monkeypatch.setenv('TIMM_EL_ISA', 'avx2')
    with pytest.raises(ValueError, match=f'^{", ".join(CAPS[1:])}: found none in the environment, expected '
                                         "ONEDNN_MAX_CPU_ISA=AVX2 .* for the processor class 'avx2'"):
        emulated_class('avx2')
    for variable, value in BY_NAME['avx2'].caps.items():
        monkeypatch.setenv(variable, value)
    assert emulated_class('avx2') is BY_NAME['avx2'] and emulated_class(None) is None


def test_peers_that_nothing_caps_are_left_out(tmp_path):
    setting = peers.Setting(None, None, torch.zeros(1, 3, 8, 8), 1, tmp_path, BY_NAME['avx2'])
    ran = peers.Built(lambda: None, 'jit_avx2')
    chosen = {'free': peers.Peer((), lambda setting: ran, can_be_capped=False), 'capped': peers.Peer((), lambda _: ran)}
    assert peers.build_all(chosen, setting) == (
        {'capped': ran}, {'free': 'left out: nothing caps it to the class avx2'})
    assert {name for name, peer in peers.PEERS.items() if not peer.can_be_capped} == {
        'onnxruntime-f32', 'onnxruntime-int8'}


def test_the_lowest_class_runs_on_both_sides(tmp_path):
    """Emulate the lowest class that this processor can, its own if there is none, in a process of its own."""
    features = cpu_features()
    lower = [row for row in CLASSES if row.caps and row.runs_on(features)]
    chosen = lower[-1] if lower else class_of(features)
    env = {name: value for name, value in os.environ.items() if name not in CAPS}
    file = tmp_path / 'records.jsonl'
    words = ['bench', 'infer', 'el_resnet18', '--size', '32', '--pairs', '1', '--warmup', '0', '--peers', 'none']
    for name in (chosen.name, class_of(features).name):
        subprocess.run([sys.executable, '-m', 'timm_el', *words, '--processor-class', name, '--record', file],
                       check=True, env=env, cwd=ROOT, capture_output=True)
    emulated, own = read_records(file)
    assert emulated['engine']['body'] == chosen.isa and own['engine']['body'] == class_of(features).isa
    assert own['emulated'] is None and not set(own['machine']['settings']) & set(CAPS)
    if lower:
        assert emulated['emulated'] == chosen.name
        assert emulated['machine']['settings'].items() >= chosen.caps.items()
        assert all(row['capped'] for row in emulated['contestants'])
    assert 'layers' not in own and len(tables([emulated, own]).splitlines()) == 4 + len(CLASSES)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def contestant(name, ms, ratio=1., batch=1, capped=None):
    return {'name': name, 'ms': {'median': ms}, 'images_per_s': 1e3 * batch / ms, 'capped': capped,
            'ratios': {'deployed': {'median': ratio}, 'deployed int8': {'median': 2 * ratio}}}


def record(*contestants, emulated=None, batch=1, settings=(), **fields):
    return {'model': 'm', 'recipe': None, 'host': 'h', 'batch': batch, 'size': [224, 224], 'emulated': emulated,
            'absent': {},
            'machine': {'cpu': 'Chip', 'class': 'vpopcntdq', 'threads': 1, 'settings': dict.fromkeys(settings, 'x')},
            'engine': {'body': 'avx512'}, 'contestants': contestants, **fields}


def rows_of(text):
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line[:1] == '|']
    return {row[0].strip('`'): row[1:] for row in cells}


def test_a_row_for_each_class_says_whether_it_was_measured():
    measured = record(
        contestant('host', 90, 9.), contestant('deployed', 10), contestant('torch-frozen', 80.5, 8.), layers=[],
        absent={'openvino-int8': 'not installed'})
    emulated = record(contestant('deployed', 20), contestant('openvino-binary', 30, 1.5, capped=False), emulated='avx2')
    text = tables([measured, emulated])
    title, _, table = text.partition('\n\n')
    assert title == '`m` beside `h`, 1 image of 224x224 px, 1 thread:'
    assert table.startswith('| class | processor | instruction set | deployed | ')
    rows = rows_of(text)
    assert list(rows) == ['class', '---', *BY_NAME]
    assert rows['vpopcntdq'] == ['Chip', '`avx512`', '10.00 ms', '', '', '80.50 ms (8.00)', 'did not run', '']
    assert rows['avx2'] == ['Chip, emulated', '`avx512`', '20.00 ms', '', '', '', '', '30.00 ms (1.50), not capped']
    assert all(rows[name] == ['not measured', *[''] * 7] for name in BY_NAME if name not in ('vpopcntdq', 'avx2'))
    assert '80.50 ms (16.00)' in tables([measured], 'deployed int8')


def test_batches_have_a_table_of_their_own_with_images_per_second():
    text = tables([record(contestant('deployed', 10)), record(contestant('deployed', 10, batch=8), batch=8)])
    first, second = text.split('\n\n`m`')
    assert rows_of(first)['vpopcntdq'][2] == '10.00 ms'
    assert second.startswith(' beside `h`, 8 images of 224x224 px, 1 thread:')
    assert rows_of(second)['vpopcntdq'][2] == '800 / s'


def test_images_of_another_size_have_a_table_of_their_own():
    text = tables([record(contestant('deployed', 10)), record(contestant('deployed', 2), size=[64, 48])])
    first, second = text.split('\n\n`m`')
    assert '10.00 ms' in first and second.startswith(' beside `h`, 1 image of 64x48 px, 1 thread:')


def test_a_later_record_replaces_an_earlier_one():
    text = tables([record(contestant('deployed', 10)), record(contestant('deployed', 11))])
    assert rows_of(text)['vpopcntdq'][2] == '11.00 ms' and '10.00' not in text


def test_an_unknown_base_is_refused():
    with pytest.raises(ValueError, match="base: found 'host', expected one that was recorded, deployed, deployed int8"):
        tables([record(contestant('deployed', 10))], 'host')


def test_records_are_read_back(tmp_path, capsys):
    file = tmp_path / 'records.jsonl'
    for ms in (10, 11):
        append_record(file, record(contestant('deployed', ms), layers=[1], kinds={}, whole_ms=1., binary=None))
    assert read_records(file) == json.loads(json.dumps([record(contestant('deployed', ms)) for ms in (10, 11)]))
    file.write_text(file.read_text() + '{"model": "cut sh')
    append_record(file, record(contestant('deployed', 12)))
    assert len(read_records(file)) == 3  # in place of the line that was cut short
    assert main(['bench', 'table', str(file)]) == 0
    assert capsys.readouterr().out == tables(read_records(file)) + '\n'


@pytest.mark.parametrize('line, message', [
    ('{"model": 1}', "found no record on line 2 (KeyError: 'machine'), expected a line that `bench infer --record` "),
    ('el', 'found no record on line 2 (JSONDecodeError'), ('[]', 'found no record on line 2 (TypeError'),
    (json.dumps(record(settings=['TIMM_EL_ISA'])),
     'found a measurement under TIMM_EL_ISA on line 2, expected one of a class of processors; delete it and measure '),
])
def test_lines_that_are_no_measurement_of_a_class_are_refused(line, message, tmp_path, capsys):
    file = tmp_path / 'records.jsonl'
    append_record(file, record())
    file.write_text(file.read_text() + line + '\n')
    assert main(['bench', 'table', str(file)]) == 2
    assert f'{file}: {message}' in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The documentation


def test_the_benchmarks_page_has_the_classes_and_the_recorded_tables():
    page = (ROOT / 'docs' / 'benchmarks.md').read_text()
    for row in CLASSES:
        caps = ', '.join(f'`{value}`' for value in row.peer_caps or ()) or 'not emulated'
        assert f'| `{row.name}` | {row.example} | `{row.isa}` | {caps} |\n' in page, row.name
    assert tables(read_records(ROOT / 'docs' / 'benchmarks.jsonl')) in page, 'run `timm-el bench table` on the file'
