"""The packed file: its bytes, every door that loads it, and what is refused."""
import copy
import hashlib
import json
import os
import struct

import pytest
import timm
import torch
import torch.nn as nn
from conftest import EACH_MODEL, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3
from torch.nn.utils import parametrizations, parametrize, prune

import timm_el
from timm_el.bench.hosts import settle_norms
from timm_el.layers import BinaryConv2d, BinaryLinear
from timm_el.weights.files import read_packed
from timm_el.weights.packed import CheckpointError, binary_weight_layers

CONVERTED = [
    'resnet18', 'regnetx_002', 'densenet121', 'mobilenetv2_100', 'test_convnext', 'test_nfnet', 'tf_efficientnetv2_b0',
    'repvgg_a0', 'ghostnet_050', 'mobilevit_xxs']


def small(recipe: str = 'el', seed: int = 0, **kwargs) -> nn.Module:
    """A small registered model with weights and norms that matter."""
    torch.manual_seed(seed)
    return randomise(timm.create_model('el_resnet18', num_classes=10, recipe=recipe, **kwargs), seed).eval()


@pytest.fixture
def packed(tmp_path):
    model = small()
    path = tmp_path / 'model.safetensors'
    timm_el.save_packed(model, path)
    return model, path


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


def same(a: nn.Module, b: nn.Module) -> bool:
    return torch.equal(outputs(a, images()), outputs(b, images()))


def snapshot(model: nn.Module) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


# ------------------------------------------------------------------------------------------------------------- bytes

def test_the_worked_example_of_the_docstring():
    conv = BinaryConv2d(10, 1, 1, bias=False)
    signs = torch.tensor([1., -1, 1, 1, -1, -1, -1, 1, -1, 1])
    conv.weight.data = (0.5 * signs).reshape(1, 10, 1, 1)
    tensors = timm_el.pack_state_dict(conv)
    assert bytes(tensors['weight_bits'].flatten().tolist()) == bytes.fromhex('8d02')
    assert tensors['weight_alpha'].numpy().tobytes() == bytes.fromhex('0000003f')
    assert '8d 02' in timm_el.weights.packed.__doc__ and '00 00 00 3f' in timm_el.weights.packed.__doc__


def test_the_file_can_be_read_by_the_docstring_alone(packed):
    """A reader of its own: header, bits, digest, with nothing of this package."""
    model, path = packed
    data = path.read_bytes()
    size, = struct.unpack('<Q', data[:8])
    header = json.loads(data[8:8 + size])
    assert set(header.pop('__metadata__')) == {'timm_el'}

    def raw(name):
        start, stop = header[name]['data_offsets']
        return data[8 + size + start:8 + size + stop]

    version = raw('packed_version')
    digest = hashlib.sha256()
    for name in sorted(header):
        if name != 'packed_version':
            shape = ','.join(str(n) for n in header[name]['shape'])
            digest.update(name.encode() + b'\0' + header[name]['dtype'].encode() + shape.encode() + b'\0' + raw(name))
    assert version == bytes([1]) + digest.digest()
    conv = model.layer2[0].conv1.conv
    name = 'layer2.0.conv1.conv'
    out, height, width, width_bytes = header[f'{name}.weight_bits']['shape']
    alpha = struct.unpack(f'<{out}f', raw(f'{name}.weight_alpha'))
    bits = raw(f'{name}.weight_bits')
    for o, i, y, x in ((0, 0, 0, 0), (3, 9, 1, 2), (127, 63, 2, 2)):
        byte = bits[((o * height + y) * width + x) * width_bytes + i // 8]
        weight = alpha[o] if byte >> (i % 8) & 1 else -alpha[o]
        assert weight == (conv.quantized_weight()[o, i, y, x]).item()


@pytest.mark.parametrize('float_dtype, limit', [
    (None, 22.5e6), (torch.float16, 12.6e6), (torch.int8, 8.5e6)])
def test_size_of_el_resnet50(tmp_path, float_dtype, limit):
    model = timm.create_model('el_resnet50')
    path = tmp_path / 'm.safetensors'
    timm_el.save_packed(model, path, float_dtype)
    assert path.stat().st_size <= limit
    with safe_open(path, 'pt') as file:
        floats = sum(file.get_tensor(k).numel() for k in file.keys() if file.get_tensor(k).is_floating_point())
    binary = sum(layer.weight.numel() for layer in binary_weight_layers(model).values())
    assert floats + binary < 25_800_000  # no binary weight has a float tensor


def test_equal_models_give_equal_bytes_and_packing_again_changes_nothing(packed, tmp_path):
    model, path = packed
    other = tmp_path / 'again.safetensors'
    timm_el.save_packed(timm_el.load_packed(small(seed=1), path), other)
    assert other.read_bytes() == path.read_bytes()


def test_signs_survive_a_dtype_that_cannot_hold_alpha(tmp_path):
    model = small()
    model.layer1[0].conv1.conv.weight.data.mul_(1e-9)  # below float16
    path = tmp_path / 'm.safetensors'
    timm_el.save_packed(model, path, torch.float16)
    twin = timm_el.load_packed(small(seed=1), path)
    for a, b in zip(binary_weight_layers(model).values(), binary_weight_layers(twin).values()):
        assert torch.equal(a.weight >= 0, b.weight >= 0)


# ------------------------------------------------------------------------------------------------------- round trips

@pytest.mark.parametrize('name', EACH_MODEL)
def test_registered_models_come_back_bit_for_bit(name, tmp_path):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name)).eval()
    path = tmp_path / 'm.safetensors'
    timm_el.save_packed(model, path)
    twin = timm_el.load_packed(timm.create_model(name), path)
    assert same(model, twin)
    list(binary_weight_layers(twin).values())[-1].weight.data.neg_()
    assert not same(model, twin)


SEVERAL_BITS = ('abc_5_5', 'twn', 'ttq')


@pytest.mark.parametrize('recipe', SEVERAL_BITS)
def test_weights_of_several_bits_are_refused_by_name(recipe, tmp_path):
    model = timm.create_model('el_resnet18', recipe=recipe, num_classes=10)
    with pytest.raises(ValueError, match=f'{FIRST}.weight: found weights of [25] bits .*one bit a weight; .*bwn'):
        timm_el.save_packed(model, tmp_path / 'm.safetensors')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('recipe', [r for r in timm_el.RECIPES if r not in ('host', *SEVERAL_BITS)])
@pytest.mark.parametrize('name', ['el_resnet26', pytest.param('el_resnet50', marks=pytest.mark.slow)])
def test_recipes_come_back_bit_for_bit(name, recipe, tmp_path):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, recipe=recipe, num_classes=10))
    settle_norms(model, torch.randn(4, 3, 64, 64))  # weights of +-1 would overflow
    path = tmp_path / 'm.safetensors'
    timm_el.save_packed(model, path)
    assert same(model, timm_el.load_packed(timm.create_model(name, recipe=recipe, num_classes=10), path))


@pytest.mark.parametrize('name', CONVERTED)
def test_converted_nets_come_back_bit_for_bit(name, tmp_path):
    torch.manual_seed(0)
    model = randomise(timm_el.binarize(timm.create_model(name))).eval()
    path = tmp_path / 'm.safetensors'
    timm_el.save_packed(model, path)
    torch.manual_seed(0)
    twin = timm_el.load_packed(timm_el.binarize(timm.create_model(name)), path)
    assert same(model, twin)
    list(binary_weight_layers(twin).values())[-1].weight.data.neg_()
    assert not same(model, twin)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, tmp_path):
    model = small().to(dtype)
    path = tmp_path / 'm.safetensors'
    timm_el.save_packed(model, path)
    twin = timm_el.load_packed(small(seed=1).to(dtype), path)
    x = images().to(dtype)
    assert torch.equal(outputs(model, x), outputs(twin, x))


@pytest.mark.parametrize('pad_value', [-1, 1])
def test_pad_values_are_part_of_the_file(pad_value, tmp_path):
    def net(value):
        return nn.Sequential(BinaryConv2d(3, 4, 3, padding=1, pad_value=value), nn.Flatten(), BinaryLinear(4 * 64, 2))

    torch.manual_seed(0)
    model, path = net(pad_value), tmp_path / 'm.safetensors'
    timm_el.save_packed(model, path)
    assert torch.equal(timm_el.load_packed(net(pad_value), path)(images(8)), model(images(8)))
    with pytest.raises(CheckpointError, match=f'0.weight_pad: found {pad_value}, expected 0'):
        timm_el.load_packed(net(0), path)


def test_a_loaded_model_trains(packed):
    model = timm_el.load_packed(small(seed=1), packed[1]).train()
    model(images()).square().sum().backward()
    for name, layer in binary_weight_layers(model).items():
        assert (layer.weight.grad != 0).float().mean() > 0.3, name


# -------------------------------------------------------------------------------------------------------------- doors

def test_pretrained_from_a_file_a_folder_and_with_other_shapes(packed, tmp_path):
    model, path = packed
    overlay = dict(file=str(path), num_classes=10)
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    assert same(model, timm.create_model('el_resnet18', num_classes=10, **kwargs))
    gray = timm.create_model('el_resnet18', in_chans=1, num_classes=7, **kwargs)
    assert torch.equal(gray.conv1.weight, model.conv1.weight.sum(1, keepdim=True)) and gray.fc.out_features == 7
    assert torch.equal(gray.layer4[1].conv2.conv.weight, model.layer4[1].conv2.conv.quantized_weight())
    features = timm.create_model('el_resnet18', features_only=True, **kwargs).eval()
    with torch.no_grad():
        torch.testing.assert_close(features(images())[-1], model.forward_features(images()), rtol=0, atol=0)
    config = dict(architecture='el_resnet18', num_classes=10, pretrained_cfg=dict(num_classes=10))
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert same(model, timm.create_model(f'local-dir:{tmp_path}', pretrained=True))


def test_checkpoint_path_load_state_dict_ema_and_meta(packed):
    model, path = packed
    assert same(model, timm.create_model('el_resnet18', num_classes=10, checkpoint_path=str(path)))
    twin = small(seed=1)
    twin.load_state_dict(load_file(path))
    assert same(model, twin)
    ema = ModelEmaV3(small(seed=1))
    ema.module.load_state_dict(load_file(path))
    assert same(model, ema.module)
    ema.load_state_dict({f'module.{k}': v for k, v in load_file(path).items()})
    assert same(model, ema.module)
    with torch.device('meta'):
        empty = timm.create_model('el_resnet18', num_classes=10)
    timm_el.load_packed(empty, path, assign=True)
    assert same(model, empty) and not any(p.is_meta for p in empty.state_dict().values())
    wrapped = nn.ModuleDict({'backbone': small(seed=2)})
    wrapped.load_state_dict({f'backbone.{k}': v for k, v in load_file(path).items()})
    assert same(model, wrapped['backbone'])


# ---------------------------------------------------------------------------------------------------------- bad input

def rewritten(path, change) -> str:
    """The file with its tensors changed, and its digest made right again."""
    tensors = load_file(path)
    change(tensors)
    version = tensors.pop('packed_version', None)
    if version is not None:
        tensors['packed_version'] = timm_el.weights.packed._version(tensors)
        tensors['packed_version'][0] = version[0]
    other = path.with_name('other.safetensors')
    save_file(tensors, other)
    return other


FIRST = 'layer1.0.conv1.conv'


@pytest.mark.parametrize('change, message', [
    (lambda t: t.pop('fc.weight'), 'missing fc.weight'),
    (lambda t: t.update(more=torch.zeros(1)), 'unknown more'),
    (lambda t: t.update({'fc.bias': torch.zeros(3)}), r'fc.bias: found shape \(3,\), expected \(10,\)'),
    (lambda t: t.pop(f'{FIRST}.weight_alpha'), f'{FIRST}.weight_alpha: found none, expected one'),
    (lambda t: t[f'{FIRST}.weight_alpha'].neg_(), f'{FIRST}.weight_alpha: found a negative'),
    (lambda t: t.update({f'{FIRST}.weight_alpha': torch.zeros(3)}), f'{FIRST}.weight_alpha: found torch.float32'),
    (lambda t: t.update({f'{FIRST}.weight_bits': torch.zeros(3)}), f'{FIRST}.weight_bits: found torch.float32'),
    (lambda t: t.update({f'{FIRST}.weight_pad': torch.tensor(1, dtype=torch.int8)}), f'{FIRST}.weight_pad: found 1'),
    (lambda t: t.update({f'{FIRST}.weight_pad': torch.tensor(torch.inf)}), f'{FIRST}.weight_pad: found torch.float32'),
    (lambda t: t.pop('packed_version'), 'packed_version: .* found nothing'),
    (lambda t: t['packed_version'].fill_(3), 'packed_version: found format version 3, expected at most 2'),
])
def test_files_that_do_not_fit_are_refused_by_key_at_every_door(packed, change, message):
    model = small(seed=1)
    before = snapshot(model)
    path = rewritten(packed[1], change)
    with pytest.raises(CheckpointError, match=f'(?s)other.safetensors.*{message}'):
        timm_el.load_packed(model, path)
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(load_file(path))
    converted = randomise(timm_el.binarize(timm.create_model('resnet18', num_classes=10, avg_down=True)))
    untouched = snapshot(converted)
    with pytest.raises(CheckpointError, match=message):
        converted.load_state_dict(load_file(path))
    assert unchanged(model, before) and unchanged(converted, untouched)


def test_files_of_another_kind_are_refused_by_name(packed, tmp_path):
    model, path = packed
    before = snapshot(model)
    floats = tmp_path / 'floats.safetensors'
    save_file(model.state_dict(), floats)
    with pytest.raises(CheckpointError, match=r'floats.safetensors: found a checkpoint of float tensors'):
        timm_el.load_packed(model, floats)
    with pytest.raises(CheckpointError, match='found a packed file, expected one of the float host'):
        timm_el.load_float(model, str(path))
    pickled = tmp_path / 'model.pt'
    torch.save(model.state_dict(), pickled)
    with pytest.raises(CheckpointError, match='not a safetensors file'):
        timm_el.load_packed(model, pickled)
    with pytest.raises(FileNotFoundError):
        timm_el.load_packed(model, tmp_path / 'nothing.safetensors')
    with pytest.raises(CheckpointError, match=r'layer\d.*(packed file of another|no binary weight)'):
        timm_el.load_packed(timm.create_model('el_resnet26', num_classes=10), path)
    with pytest.raises(CheckpointError, match=r'(?s)recipe_code: found \d+, expected \d+.*another recipe'):
        timm_el.load_packed(small('el_5'), path)
    with pytest.raises(ValueError, match='ResNet has no binary weight; create or binarize'):
        timm_el.load_packed(timm.create_model('resnet18'), path)
    assert unchanged(model, before)


def test_what_cannot_be_packed_is_refused_and_leaves_the_old_file(packed, tmp_path, monkeypatch):
    model, path = packed
    data = path.read_bytes()
    broken = copy.deepcopy(model)
    broken.layer1[0].conv1.conv.weight.data[0, 0, 0, 0] = float('nan')
    for bad, kwargs, message in (
            (broken, {}, f'{FIRST}.weight: found a value that is not finite'),
            (timm.create_model('resnet18'), {}, 'has no binary weight'),
            (small(real_weights=True), {}, 'stage one has real weights'),
            (model, dict(float_dtype=torch.int16), 'float_dtype: found torch.int16')):
        with pytest.raises(ValueError, match=message):
            timm_el.save_packed(bad, path, **kwargs)
    monkeypatch.setattr(os, 'replace', lambda *args: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        timm_el.save_packed(small(seed=3), path)
    assert path.read_bytes() == data and os.listdir(path.parent) == [path.name]


def fuzz(path, count: int) -> int:
    """Mutate a file at random; gives how many copies loaded, which must all be right."""
    net = nn.Sequential(BinaryConv2d(5, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), BinaryLinear(6 * 36, 3))
    timm_el.save_packed(net, path)
    data, g = path.read_bytes(), torch.Generator().manual_seed(0)
    twin = copy.deepcopy(net)
    before, loaded = snapshot(twin), 0

    def draw(n):
        return int(torch.randint(n, (), generator=g))

    header = 8 + struct.unpack('<Q', data[:8])[0]
    for i in range(count):
        bad = bytearray(data)
        kind = i % 6
        if kind == 0:
            bad = bad[:draw(len(bad))]
        elif kind == 1:  # a bit anywhere
            bad[draw(len(bad))] ^= 1 << draw(8)
        elif kind == 2:  # a bit of the header
            bad[draw(header)] ^= 1 << draw(8)
        elif kind == 3:  # a run of other bytes
            start = draw(len(bad))
            bad[start:start + draw(40)] = bytes(draw(256) for _ in range(draw(40)))
        elif kind == 4:  # a block twice, or moved
            start, stop, to = sorted(draw(len(bad)) for _ in range(3))
            bad[to:to] = bad[start:stop]
        else:  # some bytes
            for _ in range(1 + draw(8)):
                bad[draw(len(bad))] = draw(256)
        path.write_bytes(bad)
        try:
            timm_el.load_packed(twin, path)
            loaded += 1
        except CheckpointError:
            assert unchanged(twin, before)
            continue
        assert all(torch.equal(a.quantized_weight(), b.quantized_weight())
                   for a, b in zip(binary_weight_layers(net).values(), binary_weight_layers(twin).values()))
        assert all(torch.equal(a, b) for k, a in net.state_dict().items() if not k.endswith('weight')
                   for b in [twin.state_dict()[k]])
        twin.load_state_dict(before)
    return loaded


@pytest.mark.parametrize('count', [600, pytest.param(12000, marks=pytest.mark.slow)])
def test_damaged_files_never_load_wrong(tmp_path, count):
    loaded = fuzz(tmp_path / 'm.safetensors', count)
    assert loaded < count / 4  # what loads has lost nothing but metadata


def test_reading_checks_the_digest(packed):
    model, path = packed
    assert set(read_packed(path)) >= {'packed_version', f'{FIRST}.weight_bits'}
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match='the file is damaged, fetch it again'):
        read_packed(path)


# ---------------------------------------------------------------------- tensors that are computed, or no plain ones

REMOVED = r"expected a parameter; call torch\.nn\.utils\."
COMPUTED = {
    'pruned': (lambda layer: prune.l1_unstructured(layer, 'weight', 0.5), r"prune\.remove\(module, 'weight'\)",
               lambda layer: prune.remove(layer, 'weight')),
    'pruned twice': (lambda layer: [prune.random_structured(layer, 'weight', 1, 0) for _ in range(2)],
                     r"prune\.remove\(module, 'weight'\)", lambda layer: prune.remove(layer, 'weight')),
    'weight norm': (parametrizations.weight_norm, r"parametrize\.remove_parametrizations\(module, 'weight'\)",
                    lambda layer: parametrize.remove_parametrizations(layer, 'weight')),
    'orthogonal': (parametrizations.orthogonal, r"parametrize\.remove_parametrizations\(module, 'weight'\)",
                   lambda layer: parametrize.remove_parametrizations(layer, 'weight')),
    'old weight norm': (nn.utils.weight_norm, r"remove_weight_norm\(module, 'weight'\)", nn.utils.remove_weight_norm),
    'old spectral norm': (nn.utils.spectral_norm, r"remove_spectral_norm\(module, 'weight'\)",
                          nn.utils.remove_spectral_norm),
}


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm_el.binarize(timm.create_model('test_resnet', num_classes=3)).eval()


PACKS = {'pack_state_dict': lambda model, folder: timm_el.pack_state_dict(model),
         'save_packed': lambda model, folder: timm_el.save_packed(model, folder / 'm.safetensors'),
         'save_for_hub': lambda model, folder: timm_el.save_for_hub(model, folder / 'hub')}


@pytest.mark.filterwarnings('ignore:.*weight_norm.*is deprecated:FutureWarning')
@pytest.mark.parametrize('path', ['fc', 'conv1.0', 'layer1.0.conv2.conv', 'layer2.0.conv1.link.1'])
@pytest.mark.parametrize('kind', COMPUTED)
def test_weights_that_are_computed_are_refused_by_path_until_they_are_parameters_again(kind, path, tmp_path):
    compute, remedy, remove = COMPUTED[kind]
    model = tiny()
    layer = model.get_submodule(path)
    compute(layer)
    keys = list(model.state_dict())
    for pack in PACKS.values():
        with pytest.raises(ValueError, match=f'^{path}: the weight of the .* {REMOVED}{remedy} first$'):
            pack(model, tmp_path)
    assert list(model.state_dict()) == keys and not list(tmp_path.iterdir())
    x = images()
    expected = outputs(model, x)
    remove(layer)
    timm_el.save_packed(model, tmp_path / 'm.safetensors')
    # What was computed may lie in memory in another order than a parameter does.
    torch.testing.assert_close(outputs(timm_el.load_packed(tiny(1), tmp_path / 'm.safetensors'), x), expected)


@pytest.mark.filterwarnings('ignore:.*weight_norm.*is deprecated:FutureWarning')
@pytest.mark.parametrize('kind', COMPUTED)
def test_a_pruned_net_and_a_plain_checkpoint_are_told_apart_by_what_they_are(kind, tmp_path):
    model = small()
    plain = snapshot(model)
    timm_el.save_packed(model, tmp_path / 'm.safetensors')
    COMPUTED[kind][0](model.layer1[0].conv1.conv)
    state = snapshot(model)
    with pytest.raises(CheckpointError, match=f'{FIRST}.*: the model is pruned or parametrized there.*prune.remove'):
        model.load_state_dict(plain)
    with pytest.raises(CheckpointError, match='the model is pruned or parametrized there'):
        timm_el.load_packed(model, tmp_path / 'm.safetensors')
    assert unchanged(model, state)
    with pytest.raises(CheckpointError, match='the checkpoint is pruned or parametrized there'):
        small().load_state_dict(state)
    model.load_state_dict(state)  # its own


class Foreign(torch.Tensor):
    """A tensor subclass, such as torchao's and DTensor."""


def foreign(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().as_subclass(Foreign), False)


def int8(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(torch.int8), False)


def sparse(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to_sparse(), False)


@pytest.mark.parametrize('path, name, change, found', [
    ('fc', 'weight', foreign, 'Foreign of torch.float32'), ('fc', 'bias', foreign, 'Foreign of torch.float32'),
    ('fc', 'weight', int8, 'Parameter of torch.int8'),
    ('fc', 'weight', sparse, r'Parameter of torch.float32 \(torch.sparse_coo\)'),
    ('layer1.0.conv2.conv', 'weight', foreign, 'Foreign of torch.float32'),
    ('layer1.0.conv2.conv', 'weight', int8, 'Parameter of torch.int8'),
    ('layer1.0.conv2.norm', 'weight', foreign, 'Foreign of torch.float32'),
    ('layer1.0.conv2.norm', 'running_mean', foreign, 'Foreign of torch.float32')])
@pytest.mark.parametrize('pack', PACKS)
def test_tensors_that_are_not_plain_are_refused_by_path(pack, path, name, change, found, tmp_path):
    model = tiny()
    layer = model.get_submodule(path)
    tensor = change(layer.state_dict()[name])
    if name in layer._buffers:
        layer._buffers[name] = tensor
    else:
        layer.register_parameter(name, tensor)
    with pytest.raises(ValueError, match=f'^{path}: the {name} of the .* is a {found}, expected a plain float tensor'):
        PACKS[pack](model, tmp_path)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- files and models without a classifier

def headless(tensors: dict) -> dict:
    return {k: v for k, v in tensors.items() if not k.startswith('fc.')}


def narrow(num_classes: int = 10, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model('el_resnet20', num_classes=num_classes)


def converted_narrow(num_classes: int = 10, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return timm_el.binarize(timm.create_model('test_resnet', num_classes=num_classes))


@pytest.mark.parametrize('make', [narrow, converted_narrow])
@pytest.mark.parametrize('num_classes', [10, 7, 0])
def test_tensors_taken_out_of_a_packed_file_are_named_with_the_way_to_do_it(make, num_classes, tmp_path):
    source, whole, part = make(10, 0), tmp_path / 'whole.safetensors', tmp_path / 'part.safetensors'
    timm_el.save_packed(source, whole)
    tensors = load_file(whole)
    save_file(headless(tensors), part)
    model = make(num_classes)
    before = snapshot(model)
    named = r'fc.weight and 1 more were taken out of it' if num_classes else 'tensors were taken out of it or changed'
    for load in (lambda: model.load_state_dict(headless(tensors)), lambda: timm_el.load_packed(model, part),
                 lambda: model.load_state_dict(headless(tensors), strict=False),
                 lambda: load_checkpoint(model, str(part)),
                 lambda: timm_el.unpack_state_dict(headless(tensors), model)):
        with pytest.raises(CheckpointError, match=rf'{named} \(to load a part .* timm_el.unpack_state_dict\('):
            load()
    assert unchanged(model, before)
    model.load_state_dict(headless(timm_el.unpack_state_dict(tensors, model)), strict=False)  # as the error says
    for key, value in model.state_dict().items():
        expected = before[key] if key.startswith('fc.') else timm_el.unpack_state_dict(tensors, source)[key]
        assert torch.equal(value, expected), key


@pytest.mark.parametrize('has, wants, message', [
    (10, 0, r"fc.(weight|bias): the model has no classifier \(unknown fc.*create the model with num_classes= of the"),
    (0, 10, r'fc.(weight|bias): the checkpoint has no classifier \(missing fc.*create the model with num_classes=0,'),
    (7, 10, r'fc.(weight|bias): found shape \(7.*expected \(10.*create the model with num_classes= of the checkpoint')])
@pytest.mark.parametrize('make', [narrow, converted_narrow])
def test_a_classifier_more_or_less_is_called_that(make, has, wants, message, tmp_path):
    source, model, path = make(has), make(wants), tmp_path / 'm.safetensors'
    timm_el.save_packed(source, path)
    before = snapshot(model)
    doors = [lambda: timm_el.load_packed(model, path), lambda: model.load_state_dict(load_file(path)),
             lambda: load_checkpoint(model, str(path))]
    if make is narrow:  # a converted net's own state dict is torch's business
        doors.append(lambda: model.load_state_dict(source.state_dict()))
    for load in doors:
        with pytest.raises(CheckpointError, match=message):
            load()
    assert unchanged(model, before)


@pytest.mark.parametrize('change, key', [
    (lambda model: model.bn1.running_var.fill_(1e5), 'bn1.running_var'),
    (lambda model: model.layer1[0].conv1.conv.weight.data.fill_(1e5), 'layer1.0.conv1.conv.weight_alpha')])
def test_what_a_smaller_dtype_cannot_hold_is_named(change, key):
    model = timm.create_model('el_resnet18', num_classes=3)
    change(model)
    with pytest.raises(ValueError, match=f'{key}: found 1e.05, expected at most 65504, the largest torch.float16'):
        timm_el.pack_state_dict(model, torch.float16)
    assert timm_el.pack_state_dict(model, torch.bfloat16)
