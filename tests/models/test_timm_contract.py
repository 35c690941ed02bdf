"""What timm does with a model: the parts that its own suite skips for us, and those that it cannot see."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from conftest import EACH_MODEL, MODELS, randomise, with_slow
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models._features_fx import create_feature_extractor
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import timm_el
from timm_el.models._pretrained import SHIPPED
from timm_el.models.factory import create

REACTNETS = ['reactnet_a', 'reactnet_c', 'el_reactnet_c']


def small(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=5, **kwargs))


def gradients(model: nn.Module, forward, x: torch.Tensor) -> dict:
    model.zero_grad()
    y = forward(x)
    y = y[0] if isinstance(y, (list, tuple)) else y
    y.square().mean().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize('name', EACH_MODEL)
def test_gradients_under_fx_equal_eager(name):
    """timm's backward_fx asks only that there is a gradient; a lost estimator gives zeros."""
    model = small(name).eval()
    x = torch.randn(2, 3, 64, 64)
    eager = gradients(model, model, x)
    node = 'fc' if hasattr(model, 'fc') else 'classifier'
    traced = _traced(model, node)
    fx = gradients(traced, traced, x)
    fx = {k.replace('graph_module.', ''): g for k, g in fx.items()}
    for key, grad in eager.items():
        torch.testing.assert_close(fx[key], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-9, msg=key)
    convs = [k for k in eager if k.endswith('conv.weight')]
    assert convs and all(eager[k].abs().sum() > 0 for k in convs)


def _traced(model: nn.Module, node: str) -> nn.Module:
    return _First(create_feature_extractor(copy.deepcopy(model), {node: 'out'}))


class _First(nn.Module):
    def __init__(self, graph_module):
        super().__init__()
        self.graph_module = graph_module

    def forward(self, x):
        return self.graph_module(x)['out']


@pytest.mark.parametrize('name, sizes', with_slow(
    [('el_resnet26', dict(layers=[1, 1, 1, 1]))], [('el_resnet18', {}), ('el_mobilenet_v1', {}), ('reactnet_a', {})]))
def test_gradients_under_compile_equal_eager(name, sizes):
    """aot_eager traces forward and backward as inductor does, without generating code."""
    torch._dynamo.reset()
    model = small(name, **sizes).eval()
    x = torch.randn(2, 3, 64, 64)
    eager = gradients(model, model, x)
    compiled = gradients(model, torch.compile(model, backend='aot_eager', fullgraph=True), x)
    for key, grad in eager.items():
        torch.testing.assert_close(compiled[key], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-9, msg=key)


@pytest.mark.slow
def test_inductor_code_of_one_block_equals_eager():
    torch._dynamo.reset()
    block = small('el_resnet26').layer2[0].eval()
    x = torch.randn(2, 256, 8, 8)
    eager = gradients(block, block, x)
    compiled = gradients(block, torch.compile(block, fullgraph=True), x)
    for key, grad in eager.items():
        torch.testing.assert_close(compiled[key], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-9, msg=key)


# timm's suite picks models for the next four by the name of their file, and does not know `reactnet`.

@pytest.mark.parametrize('name', REACTNETS)
def test_forward_intermediates(name):
    model = small(name).eval()
    x = torch.randn(1, 3, 96, 96)
    spec = timm.create_model(name, features_only=True)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and torch.equal(final, maps[-1])
    assert [m.shape[1] for m in maps] == spec.feature_info.channels()
    assert [96 // m.shape[2] for m in maps] == spec.feature_info.reduction()
    two = model.forward_intermediates(x, indices=2, intermediates_only=True, stop_early=True)
    assert len(two) == 2 and torch.equal(two[0], maps[3])
    early = model.forward_intermediates(x, indices=[1], intermediates_only=True, stop_early=True)
    assert torch.equal(early[0], maps[1])


@pytest.mark.parametrize('name', REACTNETS)
def test_prune_intermediate_layers(name):
    model = small(name).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    kept = model.prune_intermediate_layers([1, 2])
    assert kept == [1, 2] and len(model.stages) == 3 and isinstance(model.fc, nn.Identity)
    pruned = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, pruned))


@pytest.mark.parametrize('name', EACH_MODEL)
def test_scripted_model_equals_eager_and_trains(name):
    model = small(name).eval()
    scripted = torch.jit.script(copy.deepcopy(model))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-3, atol=1e-3)
    eager, script = gradients(model, model, x), gradients(scripted, scripted, x)
    for key, grad in eager.items():
        torch.testing.assert_close(script[key], grad, rtol=1e-2, atol=1e-2 * grad.abs().max().item() + 1e-9, msg=key)
    stride = model.feature_info[-1]['reduction']
    with pytest.raises(torch.jit.Error, match='smaller than the stride'):
        scripted(torch.randn(1, 3, stride // 2, stride // 2))


@pytest.mark.parametrize('name', EACH_MODEL)
def test_grad_checkpointing_gives_the_same_gradients(name):
    model = small(name).eval()
    x = torch.randn(2, 3, 64, 64)
    plain = gradients(model, model, x)
    model.set_grad_checkpointing()
    for key, grad in gradients(model, model, x).items():
        torch.testing.assert_close(grad, plain[key])


@pytest.mark.parametrize('build', [
    *(lambda name=name: timm.create_model(name) for name in MODELS),
    lambda: timm_el.binarize(timm.create_model('resnet26')),
    lambda: timm_el.binarize(timm.create_model('mobilenetv1_100')),
], ids=[*MODELS, 'converted resnet26', 'converted mobilenetv1_100'])
def test_only_weights_are_decayed(build):
    model = build()
    names = {id(p): k for k, p in model.named_parameters()}
    free, decayed = ([names[id(p)] for p in group['params']] for group in param_groups_weight_decay(model, 0.1))
    assert all(k.endswith('.weight') and dict(model.named_parameters())[k].dim() >= 2 for k in decayed)
    latent = [f'{p}.weight' for p, m in model.named_modules() if isinstance(m, timm_el.layers.BinaryConv2d)]
    assert set(latent) <= set(decayed)
    assert all(k in free for k in names.values() if k.endswith(('gamma', 'slope', 'shift_in', 'shift_out', 'bias')))


@pytest.mark.parametrize('name', EACH_MODEL)
def test_layer_decay_groups_follow_depth(name):
    model = timm.create_model(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    assert len(scale) == len(list(model.parameters()))
    of = {k: scale[id(p)] for k, p in model.named_parameters()}
    units = [k for k in of if k.endswith('conv.weight')]
    assert of[units[0]] < of[units[-1]] <= 1 and len(set(of.values())) > 5
    assert all(of[k] == of[k.replace('link.gamma', 'conv.weight')] for k in of if k.endswith('gamma'))


@pytest.mark.parametrize('convert', [convert_sync_batchnorm, lambda model: convert_splitbn_model(model, 2)],
                         ids=['sync', 'split'])
@pytest.mark.parametrize('name', ['el_resnet26', 'el_mobilenet_v1', 'el_reactnet_c'])
def test_batch_norm_conversions_keep_everything_else(name, convert):
    model = small(name).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    keys = list(model.state_dict())
    converted = convert(copy.deepcopy(model)).eval()
    assert set(keys) <= set(converted.state_dict())
    torch.testing.assert_close(converted(x), expected, rtol=1e-3, atol=1e-3)


def test_unknown_model_kwargs_are_named():
    with pytest.raises(TypeError, match=r"unknown argument 'recipee' \(--model-kwargs recipee=...\), expected"):
        timm.create_model('el_resnet26', recipee='el')
    with pytest.raises(TypeError, match='recipee'):
        timm.create_model('el_mobilenet_v1', recipee='el')
    with pytest.raises(TypeError, match='recipee'):
        timm.create_model('reactnet_a', recipee='el')


def test_scripted_model_can_validate_after_it_has_trained():
    """TorchScript's autodiff must not save a weight's sign in inference mode."""
    for name in ('el_resnet18', 'el_mobilenet_v1'):
        scripted = torch.jit.script(small(name))
        x = torch.randn(2, 3, 32, 32)
        for _ in range(4):
            scripted.train()(x).square().mean().backward()
        with torch.inference_mode():
            assert torch.isfinite(scripted.eval()(x)).all()


def test_reactnet_takes_drop_path_and_wide_pooling():
    model = timm.create_model('reactnet_a', num_classes=3, drop_path_rate=0.5, global_pool='catavgmax')
    assert model.head_hidden_size == 2048
    x = torch.randn(2, 3, 32, 32)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 2048)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(x), model.train()(x))


@pytest.mark.parametrize('name, stride, reductions', [
    ('el_resnet18', 8, [1, 1, 2, 4, 8]), ('el_resnet18', 4, [1, 1, 2, 4, 4]), ('el_resnet18', 2, [1, 1, 2, 2, 2]),
    ('el_resnet20', 4, [1, 1, 2, 4]), ('el_resnet20', 2, [1, 1, 2, 2])])
def test_a_network_with_a_small_stem_counts_its_own_output_stride(name, stride, reductions):
    kwargs = dict(small_stem=True) if name == 'el_resnet18' else {}
    model = timm.create_model(name, features_only=True, output_stride=stride, **kwargs).eval()
    assert model.feature_info.reduction() == reductions
    assert [32 // y.shape[-1] for y in model(torch.randn(1, 3, 32, 32))] == reductions
    with pytest.raises(ValueError, match='output_stride: found 3, expected 2, 4 or 8'):
        timm.create_model(name, output_stride=3, **kwargs)


def test_a_pruned_reactnet_takes_a_head_of_its_size():
    model = timm.create_model('reactnet_a', stem_chs=8, num_classes=5)
    taken = model.prune_intermediate_layers([1])
    model.reset_classifier(5, 'avg')
    assert taken == [1] and model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    whole = timm.create_model('reactnet_a', stem_chs=8, num_classes=5)
    whole.prune_intermediate_layers(1, prune_head=False)
    assert whole.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_intermediate_features_of_a_reactnet_are_checkpointed_too(monkeypatch):
    model = timm.create_model('reactnet_a', stem_chs=8, num_classes=5)
    model.set_grad_checkpointing()
    calls = []
    monkeypatch.setattr(
        'timm_el.models.reactnet.checkpoint', lambda function, x: calls.append(function) or function(x))
    model.forward_intermediates(torch.randn(2, 3, 64, 64))
    assert len(calls) == len(model.stages)


def test_a_recipe_for_a_network_with_its_own_is_refused_by_name():
    with pytest.raises(ValueError, match="recipe: found 'bireal', expected none, as el_reactnet_c has its own"):
        create('el_reactnet_c', 'bireal')


def test_a_network_for_small_images_reports_the_operations_of_these():
    assert timm.create_model('el_resnet20').binarize_report.input_size == (3, 32, 32)
    assert timm.create_model('el_resnet18').binarize_report.input_size == (3, 224, 224)


@pytest.mark.parametrize('name', sorted(path.parent.name for path in SHIPPED.glob('*/config.json')))
def test_a_shipped_config_says_how_large_the_last_features_are(name):
    model = timm.create_model(name, device='meta').eval()
    images = torch.empty(1, *model.pretrained_cfg['input_size'], device='meta')
    assert model.forward_features(images).shape[2:] == model.pretrained_cfg['pool_size']
