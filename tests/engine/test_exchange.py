"""Files for other engines: steps and networks give what the program gives, or nothing is written."""
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomise
from every_step import CONVS, every_step, image

import timm_el
from timm_el.__main__ import main
from timm_el.engine import exchange
from timm_el.engine.exchange import onnx_graph
from timm_el.engine.exchange.onnx_graph import cut_model, whole_model
from timm_el.engine.exchange.openvino_graph import is_supported, openvino_model
from timm_el.engine.export import program_of
from timm_el.engine.program import Program
from timm_el.engine.steps import Kind
from timm_el.layers import BinaryConv2d, BinaryUnit, ElasticLink, StandardizedBinaryConv2d

pytest.importorskip('onnx')
ENGINES = ['onnx', 'openvino']
SIZE = (64, 64)


@pytest.fixture(params=ENGINES)
def to(request):
    pytest.importorskip({'onnx': 'onnxruntime'}.get(request.param, request.param))
    return request.param


def built(to: str, program: Program, model, batch: int):
    """Return a function that runs an ONNX model, or what OpenVINO makes of it."""
    if to == 'onnx':
        return exchange._session(model.SerializeToString())
    return exchange.compiled(openvino_model(program, model, batch)[0])


def write(to: str, model: nn.Module, folder, size=SIZE) -> tuple[str, str]:
    path = folder / {'onnx': 'net.onnx', 'openvino': 'net.xml'}[to]
    return {'onnx': exchange.write_onnx, 'openvino': exchange.write_openvino}[to](model, path, size), str(path)


@pytest.fixture(scope='module')
def net():
    return randomise(timm.create_model('el_resnet18', num_classes=10)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def test_every_kind_of_step_is_computed(to):
    """Also of zeros of both signs, which must be +1."""
    program = every_step(int8=False)
    exchange._check_steps(to, program, (9, 9), lambda cut: built(to, program, cut, 1))
    x = image()
    found = built(to, program, whole_model(program, (9, 9)), 2)([x.numpy()])
    for a, b in zip(found, program.run([x])):
        finite = b.isfinite()
        assert a.shape == b.shape and (torch.from_numpy(a) - b)[finite].abs().max() < 1e-4


WITH_TENSORS = [  # a constant is its own expectation
    i for i, s in enumerate(every_step(int8=False).steps)
    if s.kind != Kind.CONST and any(t is not None for t in s.tensors)]


@pytest.mark.parametrize('step', WITH_TENSORS)
def test_a_step_with_another_constant_is_seen(step):
    pytest.importorskip('onnxruntime')
    program = every_step(int8=False)
    changed, wrong = program.steps[step], list(program.steps)
    at = next(i for i, t in enumerate(changed.tensors) if t is not None)
    other = 255 - changed.tensors[at] if changed.is_binary_conv else (changed.tensors[at] + 1) % 8
    wrong[step] = replace(changed, tensors=(*changed.tensors[:at], other, *changed.tensors[at + 1:]))
    cut = cut_model(Program(wrong, program.outputs, program.channels), (9, 9))[0]
    with pytest.raises(ValueError, match=rf'onnx: step {step} \({changed.kind.name}, .*\) is off by'):
        exchange._check_steps('onnx', program, (9, 9), lambda _: exchange._session(cut.SerializeToString()))


def test_int8_convolutions_are_refused_by_name():
    """No operator of ONNX scales the inputs of each pixel by themselves, and others would change classes."""
    with pytest.raises(ValueError, match=r'int8, squeezed link: .*int8.*float_dtype=torch.float32'):
        whole_model(every_step(), (9, 9))


def test_openvino_has_an_op_for_full_convolutions_of_whole_bytes():
    steps = dict(zip(CONVS, every_step().steps))
    assert [name for name, step in steps.items() if is_supported(step)] == ['plain', 'threshold and flip, K, clip']


def unit(conv: nn.Module, **kwargs) -> BinaryUnit:
    torch.nn.init.normal_(conv.weight)
    gamma = kwargs.pop('gamma', 'learnable')
    return BinaryUnit(conv, nn.BatchNorm2d(conv.out_channels), link=ElasticLink.for_conv(conv, gamma), **kwargs)


UNITS = {
    'reduce with K': (1, lambda: unit(BinaryConv2d(64, 16, 1, bias=False, scale_input=True))),
    'strided with K': (1, lambda: unit(BinaryConv2d(64, 16, 1, 2, bias=False, scale_input=True))),
    'spatial': (1, lambda: unit(BinaryConv2d(16, 16, 3, padding=1, bias=False))),
    'strided': (1, lambda: unit(BinaryConv2d(16, 16, 3, 2, 1))),
    'dilated': (1, lambda: unit(BinaryConv2d(16, 16, 3, padding=2, dilation=2, bias=False))),
    'spatial with K': (1, lambda: unit(BinaryConv2d(16, 24, 3, padding=1, scale_input=True))),
    'expand': (1, lambda: unit(BinaryConv2d(16, 64, 1, bias=False))),
    'no alpha': (1, lambda: unit(BinaryConv2d(8, 16, 1, scale_weight=False), gamma=None)),
    'standardized': (1, lambda: unit(StandardizedBinaryConv2d(16, 16, 3, padding=1, has_gain=True, scale=0.5))),
    '12 channels': (0, lambda: unit(BinaryConv2d(12, 16, 3, padding=1))),
    'depthwise': (0, lambda: unit(BinaryConv2d(16, 16, 3, padding=1, groups=16))),
    'padded with +1': (0, lambda: unit(BinaryConv2d(16, 16, 3, padding=1, pad_value=1))),
    'behind a sum': (2, lambda: nn.Sequential(
        unit(BinaryConv2d(16, 16, 3, padding=1)), unit(BinaryConv2d(16, 32, 1)))),
    'behind a norm': (2, lambda: nn.Sequential(
        BinaryUnit(BinaryConv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)), unit(BinaryConv2d(16, 32, 1)))),
}


@pytest.mark.parametrize('name', UNITS)
def test_units_are_computed(to, name):
    """Exact signs, also of planted zeros; a negated convolution is seen."""
    torch.manual_seed(0)
    count, make = UNITS[name]
    net = randomise(make()).eval()
    first = next(m for m in net.modules() if isinstance(m, BinaryConv2d))
    x = torch.randn(2, first.in_channels, 9, 9)
    x[:, :, 2:4] = 0
    program = program_of(net, (9, 9)).program
    model = whole_model(program, (9, 9))
    if to == 'openvino':
        kinds = [op.get_type_name() for op in openvino_model(program, model)[0].get_ordered_ops()]
        assert kinds.count('BinaryConvolution') == openvino_model(program, model)[1] == count
    y = torch.from_numpy(built(to, program, model, 2)([x.numpy()])[0].copy())
    with torch.inference_mode():
        assert (y - net(x)).abs().max() < 1e-4
        first.weight.data.neg_()
        assert (y - net(x)).abs().max() > 1


# ---------------------------------------------------------------------------------------------------------------------
# Files


@torch.no_grad()
def test_an_onnx_file_takes_any_number_of_images(net, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    line, path = write('onnx', net, tmp_path)
    assert 'top-1 as the network in 32 of 32 random images' in line
    session = ort.InferenceSession(path, providers=['CPUExecutionProvider'])
    x = torch.randn(3, 3, *SIZE)
    assert np.abs(session.run(None, {'input': x.numpy()})[0] - net(x).numpy()).max() < 1e-3
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties['preprocess'])['size'] == [64, 64] and json.loads(properties['labels']) is None
    assert [path.name for path in tmp_path.iterdir()] == ['net.onnx']


@torch.no_grad()
def test_an_openvino_file_counts_bits(net, tmp_path):
    ov = pytest.importorskip('openvino')
    line, path = write('openvino', net, tmp_path)
    assert '16 of 16 binary convolutions count bits, top-1 as the network in 32 of 32' in line
    model = ov.Core().read_model(path)
    assert [op.get_type_name() for op in model.get_ordered_ops()].count('BinaryConvolution') == 16
    x = torch.randn(1, 3, *SIZE)
    assert np.abs(exchange.compiled(model)([x.numpy()])[0] - net(x).numpy()).max() < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ['net.bin', 'net.xml']
    assert (tmp_path / 'net.bin').stat().st_size < 3_000_000  # of 45 MB in float32


def test_what_openvino_has_no_op_for_is_said(tmp_path):
    pytest.importorskip('openvino')
    model = randomise(timm.create_model('el_mobilenet_v1', num_classes=10)).eval()
    line, _ = write('openvino', model, tmp_path, (32, 32))
    assert '13 of 22 binary convolutions count bits, 9 are float convolutions of signs, because' in line


def test_the_verb_writes_them(to, tmp_path, capsys):
    path = tmp_path / {'onnx': 'net.onnx', 'openvino': 'net.xml'}[to]
    assert main(['export', 'el_resnet18', '--size', '32', '32', '--to', to, '-o', str(path)]) == 0
    assert capsys.readouterr().out.startswith(f'{path}: ') and path.is_file()


def test_a_package_that_is_missing_is_named_with_the_remedy(to, net, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange.importlib.util, 'find_spec', lambda name: None if name.startswith('o') else 1)
    other = {'onnx': 'onnxruntime', 'openvino': 'openvino'}[to]
    with pytest.raises(RuntimeError, match=rf'found no onnx and no {other}; run `pip install "timm-el\[{to}\]"`'):
        write(to, net, tmp_path)


def test_another_ending_is_refused(net, tmp_path):
    pytest.importorskip('openvino')
    with pytest.raises(ValueError, match=r"net.onnx: found the ending '.onnx', expected .xml"):
        exchange.write_openvino(net, tmp_path / 'net.onnx')


def test_a_step_that_is_computed_differently_writes_nothing(to, net, tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_graph._NODES, Kind.MEAN, lambda g, step, x: g.node('GlobalMaxPool', x[0]))
    with pytest.raises(ValueError, match=rf'{to}: step \d+ \(MEAN, .*\) is off by .*, expected at most 0.0001'):
        write(to, net, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_computed_differently_writes_nothing(to, net, tmp_path, monkeypatch):
    def negated(program, size):
        steps = [replace(s, tensors=(255 - s.tensors[0], *s.tensors[1:])) if s.is_binary_conv else s
                 for s in program.steps]
        return whole_model(Program(steps, program.outputs, program.channels), size)

    def openvino(program, model, batch=1):
        return openvino_model(program, model, batch) if model is not wrong else (plain(model), 0, 0)

    def plain(model):
        import openvino as ov
        made = ov.Core().read_model(model.SerializeToString())
        made.reshape([1, 3, *SIZE])
        return made

    wrong = negated(program_of(net, SIZE).program, SIZE)
    monkeypatch.setattr(exchange, 'whole_model', lambda *_: wrong)
    monkeypatch.setattr(exchange, 'openvino_model', openvino)
    with pytest.raises(ValueError, match=rf'{to}: \d+ of 32 random images get the class that the network gives them'):
        write(to, net, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_as_it_was(to, tmp_path):
    model = timm_el.deploy(randomise(timm.create_model('el_resnet18', num_classes=10)).eval())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    write(to, model, tmp_path, (32, 32))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
