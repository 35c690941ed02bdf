"""int8 weights: their values, in files, and that the engine computes with those of the file."""
import pytest
import timm
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file

import timm_el
from timm_el import CheckpointError
from timm_el.weights.int8 import dequantize, quantize


def net(seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    return randomise(timm.create_model('el_resnet18', num_classes=10, **kwargs)).eval()


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    """A network and its packed file."""
    model, path = net(), tmp_path_factory.mktemp('int8') / 'net.safetensors'
    timm_el.save_packed(model, path, float_dtype=torch.int8)
    return model, path


def test_a_weight_is_the_nearest_of_255_steps():
    torch.manual_seed(0)
    weight = torch.randn(20, 7, 3, 3) * torch.logspace(-30, 30, 20).reshape(-1, 1, 1, 1)
    q, scale = quantize(weight)
    assert q.dtype == torch.int8 and q.abs().flatten(1).amax(1).eq(127).all()
    assert torch.equal(scale, weight.abs().flatten(1).amax(1) / 127)
    error = (dequantize(q, scale) - weight).abs().flatten(1).amax(1)
    assert (error <= scale * 0.51).all()


def test_quantizing_again_changes_nothing():
    torch.manual_seed(1)
    weight = torch.randn(100_000, 8) * torch.rand(100_000, 1) * 3
    q, scale = quantize(weight)
    again = quantize(dequantize(q, scale))
    assert torch.equal(again[0], q) and torch.equal(again[1], scale)


@pytest.mark.parametrize('row, q, scale', [
    ([0., -0., 0.], [0, 0, 0], 0.), ([-3., -3., -3.], [-127, -127, -127], 3 / 127),
    ([1., float('nan'), 2.], [0, 0, 0], float('nan')), ([1., float('inf'), 2.], [0, 0, 0], float('nan')),
    ([1e-45, 0., -1e-45], None, None)])
def test_planted_rows(row, q, scale):
    found, s = quantize(torch.tensor([row]))
    if q is None:  # denormals: within a step of the format
        assert (dequantize(found, s) - torch.tensor([row])).abs().max() < 1e-42
        return
    assert found.tolist() == [q] and s.item() == pytest.approx(scale, rel=1e-7, nan_ok=True)


def test_a_file_gives_the_network_that_deploy_computes_with(file):
    model, path = file
    x = torch.randn(2, 3, 64, 64)
    loaded = timm_el.load_packed(net(1), path).eval()
    expected = timm_el.deploy(model, float_dtype=torch.int8)(x)
    assert torch.equal(timm_el.deploy(loaded, float_dtype=torch.int8)(x), expected)
    assert torch.equal(loaded.fc.weight, dequantize(*quantize(model.fc.weight)))
    assert torch.equal(loaded.bn1.weight, model.bn1.weight)


def test_every_door_takes_the_file_and_packing_again_gives_its_bytes(file, tmp_path):
    _, path = file
    first = timm_el.load_packed(net(1), path)
    second = net(2)
    second.load_state_dict(load_file(path))
    third = timm.create_model('el_resnet18', num_classes=10, checkpoint_path=str(path))
    with torch.device('meta'):
        fourth = timm.create_model('el_resnet18', num_classes=10)
    timm_el.load_packed(fourth, path, assign=True)
    for i, model in enumerate((first, second, third, fourth)):
        timm_el.save_packed(model, tmp_path / f'{i}.safetensors', float_dtype=torch.int8)
        assert (tmp_path / f'{i}.safetensors').read_bytes() == path.read_bytes(), i


def test_a_converted_network_and_a_hub_folder_take_int8(tmp_path):
    torch.manual_seed(0)
    model = randomise(timm_el.binarize(timm.create_model('mobilenetv2_050', num_classes=5))).eval()
    timm_el.save_for_hub(model, tmp_path / 'net', float_dtype=torch.int8)
    again = timm_el.from_hub(tmp_path / 'net').eval()
    x = torch.randn(1, 3, 64, 64)
    made = [timm_el.deploy(m, float_dtype=torch.int8)(x) for m in (model, again)]
    assert torch.equal(*made)


@pytest.mark.parametrize('kwargs', [{'num_classes': 4}, {'num_classes': 0}, {'in_chans': 1}, {'features_only': True}])
def test_timm_adapts_it_like_a_file_of_floats(file, tmp_path, kwargs):
    """Other classes, no head, other channels, and features alone, to the same tensors."""
    path = file[1]
    timm_el.save_packed(timm_el.load_packed(net(1), path), tmp_path / 'floats.safetensors')
    made = []
    for weights in (path, tmp_path / 'floats.safetensors'):
        torch.manual_seed(0)
        overlay = {'file': str(weights), 'num_classes': 10}
        made.append(timm.create_model('el_resnet18', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs))
    found, expected = (m.state_dict() for m in made)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


FIRST = 'conv1'


@pytest.mark.parametrize('change, message', [
    (lambda t: t.pop(f'{FIRST}.weight_scale'), f'{FIRST}.weight_scale: found none'),
    (lambda t: t[f'{FIRST}.weight_scale'].neg_(), f'{FIRST}.weight_scale: found a negative'),
    (lambda t: t.update({f'{FIRST}.weight_scale': torch.ones(3)}), f'{FIRST}.weight_scale: found torch.float32 '),
    (lambda t: t.update({f'{FIRST}.weight_int8': t['fc.weight_int8'].clone()}),
     rf'{FIRST}.weight_scale: found torch.float32 \(64,'),
    (lambda t: t.update({f'{FIRST}.weight_int8': t['fc.weight_int8'].clone(),
                         f'{FIRST}.weight_scale': t['fc.weight_scale'].clone()}), rf'{FIRST}.weight.*\(10, 512'),
    (lambda t: t.update({'bn1.weight_int8': t['fc.weight_int8'].clone(), 'bn1.weight_scale': torch.ones(10)}),
     'bn1.weight_int8: found bn1.weight beside it'),
    (lambda t: t.update({'layer1.0.conv1.conv.weight_int8': t['fc.weight_int8'].clone()}),
     'layer1.0.conv1.conv.weight_int8: the model has no such weight'),
    (lambda t: t.update({'more.weight_int8': t['fc.weight_int8'].clone(), 'more.weight_scale': torch.ones(10)}),
     'more.weight'),
    (lambda t: t.pop('fc.weight_int8'), 'fc.weight_int8: found none'),
    (lambda t: t.update({'fc.weight_int8': t['fc.weight_int8'].short()}), 'fc.weight_int8: found torch.int16'),
])
def test_files_that_do_not_fit_are_refused_by_key(file, tmp_path, change, message):
    tensors = {k: v.clone() for k, v in load_file(file[1]).items()}
    change(tensors)
    tensors['packed_version'] = timm_el.weights.packed._version(tensors)
    path = tmp_path / 'other.safetensors'
    save_file(tensors, path)
    model = net(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        timm_el.load_packed(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_taken_tensor_is_named(file, tmp_path):
    tensors = load_file(file[1])
    del tensors['fc.weight_scale']
    save_file(tensors, tmp_path / 'other.safetensors')
    with pytest.raises(CheckpointError, match='fc.weight_scale were taken out of it'):
        timm_el.load_packed(net(4), tmp_path / 'other.safetensors')


def test_a_weight_that_is_not_finite_is_refused(tmp_path):
    model = net()
    with torch.no_grad():
        model.fc.weight[3, 2] = float('inf')
    with pytest.raises(ValueError, match='fc.weight: found a value that is not finite'):
        timm_el.save_packed(model, tmp_path / 'net.safetensors', float_dtype=torch.int8)
    assert not list(tmp_path.iterdir())
