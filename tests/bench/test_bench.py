"""The bench verb: what it reports and refuses. No test looks at how long anything took."""
import json

import pytest
import torch
import torch.nn as nn

import timm_el
from timm_el.__main__ import main
from timm_el.bench import peers
from timm_el.bench.hosts import settle_norms
from timm_el.bench.layer_times import layer_table, layer_times
from timm_el.bench.machine import cpu_features
from timm_el.bench.processor_classes import class_of
from timm_el.bench.turns import Spread, ratios, take_turns

SMALL = ['el_resnet18', '--size', '32', '--pairs', '3', '--warmup', '0']


def own_class():
    return class_of(cpu_features())


@pytest.fixture
def engine():
    """The engine, as it was afterwards."""
    yield timm_el.engine
    timm_el.engine.use_isa(None)



def bench(capsys, *argv: str) -> dict:
    assert main(['bench', 'infer', *argv, '--json']) == 0
    return json.loads(capsys.readouterr().out)


def test_inference_report(engine, capsys):
    r = bench(capsys, *SMALL, '--peers', 'none', '--also', 'bireal', '--float-dtype', 'bfloat16', '--float-dtype',
              'float16', '--batch', '2')
    rows = {row['name']: row for row in r['contestants']}
    assert list(rows) == [
        'host', 'host channels_last', 'latent', 'deployed', 'deployed bfloat16', 'deployed float16', 'deployed bireal']
    assert rows['host']['of'] == 'resnet18' and rows['deployed bireal']['of'] == 'el_resnet18, bireal'
    bases = ['deployed', 'deployed bfloat16', 'deployed float16']
    assert all(list(row['ratios']) == bases for row in rows.values())
    assert all(rows[base]['ratios'][base] == {'median': 1, 'min': 1, 'max': 1} for base in bases)
    assert all(row['images_per_s'] == pytest.approx(2e3 / row['ms']['median']) for row in rows.values())
    assert {row['kernels'] for name, row in rows.items() if name in bases} == {engine.info()['body']}
    assert torch.backends.cpu.get_cpu_capability() in rows['host']['kernels']
    assert r['machine']['class'] == own_class().name and r['emulated'] is None
    assert {row['capped'] for row in rows.values()} == {None}
    assert all(row['ms']['min'] <= row['ms']['median'] <= row['ms']['max'] for row in rows.values())
    exact = [row for name, row in rows.items() if not name.startswith('deployed')]  # a flipped sign avalanches
    assert all(row['difference'] < 1e-5 and row['top1_agreement'] == 1 for row in exact)
    assert (r['batch'], r['size'], r['pairs'], r['absent']) == (2, [32, 32], 3, {})
    assert r['engine']['body'] == engine.info()['body'] and r['machine']['threads'] == torch.get_num_threads()
    total = timm_el.summarize(settled('el_resnet18'), (3, 32, 32))
    assert r['binary']['macs'] == 2 * total.binary_macs == sum(row['binary_macs'] for row in r['layers'])
    assert 2 * total.real_macs == sum(row['real_macs'] for row in r['layers'])
    assert sum(kind['share'] for kind in r['kinds'].values()) == pytest.approx(1)
    assert {row['path']: row['kind'] for row in r['layers']}['layer1.0.conv1'] == 'binary conv'
    assert {row['path']: row['kind'] for row in r['layers']}['fc'] == 'linear'


def test_inference_prints_a_table(engine, capsys, monkeypatch):
    monkeypatch.setenv('OMP_WAIT_POLICY', 'passive')
    assert main(['bench', 'infer', 'resnet18', '--recipe', 'el', *SMALL[1:], '--peers', 'none']) == 0
    out = capsys.readouterr().out
    body = engine.info()['body']
    for text in (f'backend {body} (native)', f'class {own_class().name}, ', 'OMP_WAIT_POLICY=passive', 'resnet18, el',
                 'layer4.1.conv2', 'binary conv', 'T binary MAC/s', 'host channels_last', 'eager: ATen'):
        assert text in out, text


def test_the_reference_is_no_deployed_time(engine, capsys):
    engine.use_isa('reference')
    assert main(['bench', 'infer', *SMALL]) == 2
    err = capsys.readouterr().err
    assert 'reference was asked for' in err and '--allow-reference' in err and err.count('\n') == 1
    r = bench(capsys, *SMALL, '--peers', 'none', '--allow-reference')
    assert r['engine']['native'] is False
    assert main(['bench', 'infer', *SMALL, '--peers', 'none', '--allow-reference']) == 0
    assert 'NOT native: reference was asked for' in capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    (['el_resnet18', '--peers', 'larq'], "peers: unknown name 'larq', expected 'all', 'none', or some of "),
    (['resnet18'], 'host: no float host of resnet18 is known'),
    (['el_resnet20', '--recipe', 'bireal'], r'host: no float host of el_resnet20 is known, name a model of timm'),
    (['el_resnet18', '--recipe', 'foo'], "recipe: unknown name 'foo'"),
    (['el_resnet18', '--record', 'nowhere/runs.jsonl'], "record: found no folder 'nowhere'"),
])
def test_errors_are_one_line(engine, argv, message, capsys):
    assert main(['bench', 'infer', *argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count('\n') == 1 and captured.out == ''


@pytest.mark.parametrize('argv, message', [
    ([], 'the following arguments are required: infer | train | table'),
    (['infer', 'el_resnet18', '--compile'], 'unrecognized arguments: --compile'),
    (['train', 'el_resnet18', '--peers', 'all'], 'unrecognized arguments: --peers all'),
    (['infer', 'el_resnet18', '--pairs', '0'], "argument --pairs: found '0', expected a positive integer"),
    (['infer', 'el_resnet18', '--warmup', '-1'], "argument --warmup: found '-1', expected 0 or a positive integer"),
])
def test_options_of_the_other_measurement_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(['bench', *argv])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_training_report(capsys):
    assert main(['bench', 'train', 'el_resnet18', '--batch', '2', '--size', '32', '--pairs', '1', '--warmup', '0',
                 '--amp', '--json']) == 0
    r = json.loads(capsys.readouterr().out)
    assert (r['host'], r['batch'], r['size'], r['mode'], r['amp']) == ('resnet18', 2, 32, 'eager', True)
    assert r['time_ratio_min'] <= r['time_ratio'] <= r['time_ratio_max']
    assert r['memory_ratio'] == pytest.approx(r['model_saved_mb'] / r['host_saved_mb'])
    assert r['host_first_ms'] > 0 and r['model_first_ms'] > 0


def test_a_step_of_a_net_of_ten_classes_is_measured(capsys):
    assert main(['bench', 'train', 'el_resnet20', '--host', 'test_resnet', '--batch', '8', '--size', '32',
                 '--pairs', '1', '--warmup', '0']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ['step,', 'ms', 'first', 'step,', 'ms', 'saved', 'for', 'backward,', 'MB']
    assert lines[2].startswith('test_resnet ') and lines[3].startswith('el_resnet20 ')


def test_everybody_runs_in_every_round():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in 'ab'}
    seconds = take_turns(runs, rounds=2, warmup=1, settle=True)
    assert calls == ['a', 'a', 'b', 'b'] * 3 and {name: len(s) for name, s in seconds.items()} == {'a': 2, 'b': 2}


def test_ratios_are_taken_in_pairs():
    assert ratios({'a': [2., 30., 4.], 'b': [1., 10., 4.]}, 'b') == {'a': Spread(2, 1, 3), 'b': Spread(1, 1, 1)}


def test_layer_times_add_up_calls():
    shared = nn.Conv2d(3, 3, 1)
    net = nn.Sequential(shared, nn.Identity(), nn.BatchNorm2d(3), shared, nn.AdaptiveAvgPool2d(1), nn.ReLU()).eval()
    table = layer_table(net, net, torch.zeros(2, 3, 8, 8), repeats=2)
    assert [(row['path'], row['kind'], row['real_macs']) for row in table['layers']] == [
        ('0', 'float conv', 2 * 2 * 9 * 64), ('2', 'norm', 0), ('4', 'pooling', 0), ('5', 'other', 0)]
    assert not net[0]._forward_hooks and not net[0]._forward_pre_hooks
    ms, whole = layer_times(net, torch.zeros(2, 3, 8, 8), repeats=3)
    assert 0 < sum(ms.values()) < whole


def failing_deeply(setting):
    raise RuntimeError('Exception from src/a.cpp:1:\nException from src/b.cpp:2:\nno such kernel\n')


def test_missing_peers_are_listed(engine, capsys, monkeypatch):
    monkeypatch.setattr(
        peers, 'PEERS', {'p-int8': peers.Peer(('json', 'no_such_engine'), build=None),
                         'p-bad': peers.Peer(('json',), build=lambda setting: 1 // 0),
                         'p-deep': peers.Peer(('json',), build=failing_deeply)})
    r = bench(capsys, *SMALL)
    assert r['absent'] == {
        'p-int8': 'not installed: no_such_engine; pip install "timm-el[bench]"',
        'p-bad': 'failed: ZeroDivisionError: integer division or modulo by zero',
        'p-deep': 'failed: RuntimeError: no such kernel'}
    assert not [row for row in r['contestants'] if row['name'].startswith('p-')]
    assert main(['bench', 'infer', *SMALL]) == 0
    assert 'no_such_engine' in capsys.readouterr().out


def settled(name: str, **kwargs) -> nn.Module:
    import timm
    torch.manual_seed(0)
    return settle_norms(timm.create_model(name, **kwargs), torch.randn(4, 3, 32, 32))


@pytest.fixture
def setting(tmp_path):
    torch.manual_seed(0)
    return peers.Setting(settled('resnet18'), settled('el_resnet18'), torch.randn(2, 3, 32, 32), 1, tmp_path)


@pytest.mark.parametrize('name, tolerance, kernel', [
    ('torch-compiled', 1e-4, 'compiled: aten'), ('torch-frozen', 1e-4, 'frozen: aten'),
    ('onnxruntime-f32', 1e-4, 'cpu'), ('onnxruntime-int8', 0.1, 'cpu'), ('openvino-f32', 1e-4, 'f32'),
    ('openvino-bf16', 0.1, ''), ('openvino-int8', 0.1, 'i8'), ('openvino-binary', None, 'u1'),
])
def test_peer_computes_the_net(setting, name, tolerance, kernel):
    peer = peers.PEERS[name]
    for package in peer.packages:
        pytest.importorskip(package)
    built, absent = peers.build_all({name: peer}, setting)
    assert absent == {}
    y = torch.as_tensor(built[name].run())
    with torch.inference_mode():
        original = (setting.latent if peer.binary else setting.host)(setting.x)
    assert y.shape == original.shape and y.isfinite().all() and kernel in built[name].kernels.lower()
    if tolerance is not None:  # flipped signs avalanche in the whole net: see the tests of its units
        assert (y - original).abs().max() < tolerance * original.abs().max()
