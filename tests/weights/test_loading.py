"""Float checkpoints as latent initialisation; state dicts that do not fit are refused before anything is copied."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomise
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint, resume_checkpoint
from timm.utils.model import freeze_batch_norm_2d
from torchvision.ops import FrozenBatchNorm2d

import timm_el
from timm_el.__main__ import main


def snapshot(model: nn.Module) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize('name, host, kwargs', [
    ('el_resnet26', 'resnet26', {}), ('el_resnet18', 'resnet18', {}), ('el_resnet50', 'resnet50', dict(avg_down=True)),
    ('el_mobilenet_v1', 'mobilenetv1_100', {})])
def test_float_checkpoint_becomes_the_latent_initialisation(name, host, kwargs, tmp_path):
    torch.manual_seed(0)
    float_net = randomise(timm.create_model(host, **kwargs))
    model = timm_el.load_float(timm.create_model(name), float_net.state_dict())
    weights = {m.weight.numel(): m.weight for m in float_net.modules() if isinstance(m, nn.Conv2d)}
    ours = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    theirs = [m.weight for m in float_net.modules() if isinstance(m, nn.Conv2d)]
    assert weights and len(ours) == len(theirs)
    key = [(tuple(w.shape), w.sum().item()) for w in ours]
    assert sorted(key) == sorted((tuple(w.shape), w.sum().item()) for w in theirs)
    # The same through timm's own door.
    file = tmp_path / 'host.pth'
    torch.save(float_net.state_dict(), file)
    again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    assert all(torch.equal(a, b) for a, b in zip(
        [p for _, p in model.named_parameters()], [p for _, p in again.named_parameters()]))


def test_float_weights_land_where_binarize_puts_them():
    """Loading a host's checkpoint equals converting the loaded host."""
    host = randomise(timm.create_model('resnet26', avg_down=True)).eval()
    ours = timm_el.load_float(timm.create_model('el_resnet26', stride_first=False), host.state_dict()).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), timm_el.binarize(host)(x))


@pytest.mark.parametrize('recipe', ['el_4', 'first_el_minus', 'bireal'])
def test_float_checkpoint_for_recipes_that_leave_something_out(recipe):
    timm_el.load_float(timm.create_model('el_resnet26', recipe=recipe), timm.create_model('resnet26').state_dict())


def change(model: nn.Module, **changes) -> dict:
    state = dict(model.state_dict())
    state.update(changes)
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.parametrize('make, message', [
    (lambda: timm.create_model('resnet26').state_dict(),
     r'layer1.0.conv1.weight: .* float host, expected layer1.0.conv1.conv.weight; timm_el.load_float'),
    (lambda: timm.create_model('el_resnet26', recipe='bireal').state_dict(),
     r"layer1.0.conv1.link.gamma: .* another recipe than 'el' \(missing .*gamma and 15 more\); create .*recipe="),
    (lambda: timm.create_model('el_resnet26', recipe='el_4').state_dict(), 'another recipe'),
    (lambda: timm.create_model('el_resnet26', num_classes=7).state_dict(),
     r'fc.weight: found shape \(7, 2048\), expected \(1000, 2048\); .*num_classes='),
    (lambda: timm.create_model('el_resnet26', in_chans=1).state_dict(), r'conv1.weight: found shape .* in_chans='),
    (lambda: timm.create_model('reactnet_a').state_dict(), 'another model'),
    (lambda: change(timm.create_model('el_resnet26'), extra=torch.zeros(1)), 'extra: .*unknown extra'),
    (lambda: change(timm.create_model('el_resnet26'), **{'bn1.bias': None}), 'bn1.bias: .*missing bn1.bias'),
])
def test_unfit_checkpoints_are_refused_by_key_and_nothing_is_loaded(make, message):
    model = timm.create_model('el_resnet26')
    before = snapshot(model)
    with pytest.raises(timm_el.CheckpointError, match=message) as caught:
        model.load_state_dict(make())
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, RuntimeError)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name', ['el_resnet26', 'reactnet_a'])
def test_own_checkpoints_load_strictly_and_the_model_can_be_copied(name):
    source, target = randomise(timm.create_model(name)), timm.create_model(name)
    copy.deepcopy(target).load_state_dict(source.state_dict(), strict=True)
    wrapped = nn.ModuleDict({'module': target})
    wrapped.load_state_dict({f'module.{k}': v for k, v in source.state_dict().items()}, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters()))
    state = source.state_dict()
    state.pop('fc.weight')
    assert target.load_state_dict(state, strict=False).missing_keys == ['fc.weight']


def test_stage_one_loads_into_stage_two():
    one = randomise(timm.create_model('el_resnet26', real_weights=True))
    two = timm.create_model('el_resnet26')
    two.load_state_dict(one.state_dict(), strict=True)


def test_statistics_of_moved_norms_come_from_the_loaded_weights(photos):
    """Loading a float MobileNet gives what converting it gives."""
    host = randomise(timm.create_model('mobilenetv1_100', act_layer='relu'))
    loaded = timm_el.load_float(timm.create_model('el_mobilenet_v1'), host.state_dict()).state_dict()
    converted = timm_el.binarize(host).state_dict()
    assert loaded.keys() == converted.keys()
    for key, value in converted.items():
        if 'num_batches' not in key:
            torch.testing.assert_close(loaded[key], value, msg=key)


@pytest.mark.parametrize('wrap', [
    lambda sd: {'state_dict': {f'module.{k}': v for k, v in sd.items()}}, lambda sd: {'model': sd}])
def test_load_float_takes_wrapped_state_dicts(wrap):
    timm_el.load_float(timm.create_model('el_resnet18'), wrap(timm.create_model('resnet18').state_dict()))


def test_load_float_refuses_what_it_cannot_load():
    model = timm_el.binarize(timm.create_model('resnet18'))
    before = snapshot(model)
    state = timm.create_model('resnet18').state_dict()
    state.pop('fc.bias')
    with pytest.raises(timm_el.CheckpointError, match='fc.bias'):
        timm_el.load_float(model, state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match='it is not binarized'):
        timm_el.load_float(timm.create_model('resnet18'), state)
    with pytest.raises(TypeError, match='checkpoint: found a NoneType'):
        timm_el.load_float(model, None)


def test_a_mobilenet_of_another_recipe_is_called_that():
    with pytest.raises(timm_el.CheckpointError, match='another recipe'):
        timm.create_model('el_mobilenet_v1').load_state_dict(
            timm.create_model('el_mobilenet_v1', recipe='bireal').state_dict())


@pytest.mark.parametrize('source, target', [('el_5', 'el'), ('s_resnet', 'bireal'), ('el_3', 'el')])
def test_a_recipe_with_the_same_keys_is_refused_too(source, target, tmp_path):
    model = timm.create_model('el_resnet26', recipe=target)
    state = timm.create_model('el_resnet26', recipe=source).state_dict()
    before = snapshot(model)
    with pytest.raises(timm_el.CheckpointError, match=f"another recipe than '{target}'; .*recipe="):
        model.load_state_dict(state)
    converted = timm_el.binarize(timm.create_model('resnet26', avg_down=True), target)
    with pytest.raises(timm_el.CheckpointError, match='another recipe'):
        converted.load_state_dict(state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(timm_el.CheckpointError, match='another recipe'):
        timm.create_model('el_resnet26', recipe=target, checkpoint_path=str(tmp_path / 'x.pth'))
    state.pop('recipe_code')  # written by someone who left it out
    model.load_state_dict(state)


def test_names_of_one_recipe_and_stages_of_one_training_have_one_code():
    codes = {name: recipe.code for name, recipe in timm_el.RECIPES.items()}
    assert codes['el'] == codes['el_6'] == timm_el.RECIPES['el'].with_real_weights().code
    assert codes['baseline'] == codes['s_resnet_k_s'] == codes['first_binary']
    assert len(set(codes.values())) == len(codes) - 3


@pytest.mark.parametrize('name', ['test_convnext', 'mobilenetv2_100', 'ghostnet_050'])
def test_a_float_checkpoint_loads_into_a_net_with_new_norms_and_activations_without_a_norm(name):
    host, model = timm.create_model(name), timm_el.binarize(timm.create_model(name))
    timm_el.load_float(model, host.state_dict())
    moved = model.binarize_report.moved
    for path, module in host.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            assert torch.equal(model.get_submodule(moved.get(path, path)).weight, module.weight)


def test_a_kept_layer_without_a_norm_loses_the_activation_before_a_sign_and_says_so():
    model = timm_el.binarize(timm.create_model('test_convnext'), keep=('stages.1.blocks.0.mlp.fc1',))
    row = next(row for row in model.binarize_report.rows if row.path == 'stages.1.blocks.0.mlp.fc1')
    assert (row.status, row.act) == ('kept', 'dropped') and None not in model.binarize_report.moved
    assert isinstance(model.stages[1].blocks[0].mlp.act, torch.nn.Identity)


# ------------------------------------------------------------------------------------- norms that count no batches

def converted(name: str) -> nn.Module:
    return timm_el.binarize(timm.create_model(name, num_classes=10))


def without_counters(state: dict) -> dict:
    """A state dict, with its metadata, from which somebody removed the counters."""
    state = copy.copy(state)
    for key in [k for k in state if k.endswith('num_batches_tracked')]:
        del state[key]
    return state


def torchvision_frozen(model: nn.Module) -> nn.Module:
    """The model with torchvision's frozen norms, where its norms are torch's own."""
    for name, child in model.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(model, name, FrozenBatchNorm2d(child.num_features))
        else:
            torchvision_frozen(child)
    return model


NORMS = {
    'batch': lambda model: model, 'sync': convert_sync_batchnorm, 'frozen': freeze_batch_norm_2d,
    'frozen by torchvision': torchvision_frozen}


def doors(source: nn.Module, folder) -> dict:
    """Ways to load the state of one model into another, by name."""
    latent, packed = folder / 'latent.pth', folder / 'packed.safetensors'
    state = {k: v.clone() for k, v in source.state_dict().items()}
    torch.save({'state_dict': state}, latent)
    timm_el.save_packed(source, packed)
    nested = {f'net.{k}': v for k, v in state.items()}
    return {
        'strict': lambda model: model.load_state_dict(state),
        'with metadata': lambda model: model.load_state_dict(source.state_dict()),
        'no counters': lambda model: model.load_state_dict(without_counters(source.state_dict())),
        'assign': lambda model: model.load_state_dict(state, assign=True),
        'not strict': lambda model: model.load_state_dict(state, strict=False),
        'inside another': lambda model: nn.ModuleDict({'net': model}).load_state_dict(nested),
        'load_checkpoint': lambda model: load_checkpoint(model, str(latent)),
        'resume_checkpoint': lambda model: resume_checkpoint(model, str(latent), log_info=False),
        'load_packed': lambda model: timm_el.load_packed(model, packed),
        'packed state dict': lambda model: model.load_state_dict(timm_el.pack_state_dict(source)),
        'unpacked': lambda model: nn.Module.load_state_dict(
            model, timm_el.unpack_state_dict(timm_el.pack_state_dict(source), model)),
    }


@pytest.mark.parametrize('source_norms, norms', [
    ('batch', 'frozen'), ('frozen', 'batch'), ('sync', 'frozen'), ('frozen', 'sync'), ('frozen', 'frozen'),
    ('batch', 'frozen by torchvision'), ('frozen by torchvision', 'batch')])
@pytest.mark.parametrize('make', [
    lambda: timm.create_model('el_resnet20', recipe='el_r2b'), lambda: converted('test_resnet'),
    lambda: converted('test_efficientnet')], ids=['registered', 'converted', 'traced'])
def test_counters_of_batches_decide_nothing_at_any_door(make, source_norms, norms, tmp_path):
    source, fresh = randomise(make()), make()
    timm_el.save_packed(source, tmp_path / 'first.safetensors')
    timm_el.load_packed(source, tmp_path / 'first.safetensors')  # weights that packing does not change
    for key, buffer in source.named_buffers():
        if key.endswith('num_batches_tracked'):
            buffer.fill_(7)
    source = NORMS[source_norms](source)
    counted = {k: 7 for k in source.state_dict() if k.endswith('num_batches_tracked')}
    for name, load in doors(source, tmp_path).items():
        model = NORMS[norms](copy.deepcopy(fresh))
        keys = model.state_dict().keys()
        load(model)
        state = model.state_dict()
        assert state.keys() == keys, name
        assert all(torch.equal(state[k], v) for k, v in without_counters(source.state_dict()).items()), name
        for key in state.keys() - without_counters(state).keys():
            assert int(state[key]) == (counted.get(key, 0) if name != 'no counters' else 0), (name, key)


@pytest.mark.parametrize('norms', ['batch', 'frozen', 'sync'])
@pytest.mark.parametrize('counts', [True, False])
def test_a_float_checkpoint_loads_with_and_without_counters(norms, counts, tmp_path):
    host = randomise(timm.create_model('test_efficientnet', num_classes=10)).state_dict()
    expected = converted('test_efficientnet')
    timm_el.load_float(expected, dict(host))
    model = timm_el.load_float(
        NORMS[norms](converted('test_efficientnet')), host if counts else without_counters(host))
    state = without_counters(model.state_dict())
    assert all(torch.equal(state[k], v) for k, v in without_counters(expected.state_dict()).items())


def test_an_empty_model_takes_a_checkpoint_without_counters(tmp_path):
    source = freeze_batch_norm_2d(randomise(timm.create_model('el_resnet20')))
    timm_el.save_packed(source, tmp_path / 'packed.safetensors')
    with torch.device('meta'):
        empty = timm.create_model('el_resnet20')
    timm_el.load_packed(empty, tmp_path / 'packed.safetensors', assign=True)
    assert not any(v.is_meta for v in empty.state_dict().values())


def test_a_counter_that_belongs_to_no_norm_is_unknown():
    model = freeze_batch_norm_2d(converted('test_resnet'))
    state = {**model.state_dict(), 'fc.num_batches_tracked': torch.tensor(1)}
    with pytest.raises(RuntimeError, match='fc.num_batches_tracked'):
        model.load_state_dict(state)
    registered = timm.create_model('el_resnet20')
    with pytest.raises(timm_el.CheckpointError, match='unknown fc.num_batches_tracked'):
        registered.load_state_dict({**registered.state_dict(), 'fc.num_batches_tracked': torch.tensor(1)})


@pytest.mark.parametrize('content', [b'', b'no weights', None], ids=['empty', 'text', 'half'])
@pytest.mark.parametrize('ending', ['safetensors', 'pth.tar'])
def test_a_file_that_holds_no_weights_is_named_in_one_line(content, ending, tmp_path, capsys):
    path = tmp_path / f'net.{ending}'
    model = timm.create_model('el_resnet20', num_classes=3)
    if content is None:
        timm_el.save_packed(model, path) if ending == 'safetensors' else torch.save(model.state_dict(), path)
        content = path.read_bytes()[:path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(timm_el.CheckpointError, match='no file of weights'):
        timm_el.load_float(model, path)
    assert main(['export', f'el_resnet20@{path}', '-o', str(tmp_path / 'out.program')]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'timm_el export: {path}: this is no file of weights, or a damaged one')
    assert 'weights_only' not in err and not (tmp_path / 'out.program').exists()


def test_an_object_that_is_no_state_dict_and_a_file_that_is_missing_are_named(tmp_path):
    model, path = timm.create_model('el_resnet20', num_classes=3), tmp_path / 'list.pth'
    torch.save([torch.ones(2)], path)
    with pytest.raises(timm_el.CheckpointError, match=r'list\.pth: this is no file of weights'):
        timm_el.load_float(model, path)
    with pytest.raises(FileNotFoundError, match=r'missing\.pth: found no such file'):
        timm_el.load_float(model, tmp_path / 'missing.pth')


def test_a_float_checkpoint_that_lacks_a_weight_is_refused_by_its_name():
    state = timm.create_model('mobilenetv1_100', num_classes=3).state_dict()
    gone = next(key for key in state if key.endswith('conv_pw.weight'))
    del state[gone]
    with pytest.raises(timm_el.CheckpointError, match='missing .*conv_pw.conv.weight'):
        timm_el.load_float(timm.create_model('el_mobilenet_v1', num_classes=3), state)
