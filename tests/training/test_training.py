"""Losses against their formulas, the distillation task against timm's, telemetry against signs flipped by hand."""
import copy
import json
import math

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomise
from timm.task import LogitDistillationTask

import timm_el
from timm_el.training.distillation import DistillationTask, residual_blocks
from timm_el.training.latent import binary_layers, clip_latent_weights
from timm_el.training.losses import attention_loss, attention_map, distributional_loss, logit_loss
from timm_el.training.telemetry import JsonLines, Telemetry

NET = dict(layers=[1, 1, 1, 1], channels=[8, 8, 16, 16], num_classes=10)


def student(name='el_resnet18', seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**NET, **kwargs})


def teacher(**kwargs):
    torch.manual_seed(7)
    return randomise(timm.create_model('resnet18', **{**NET, **kwargs}), 7)


def batch(n=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=g), torch.randint(0, 10, (n,), generator=g)


# ---------------------------------------------------------------------------------------------------------------------
# Losses

def test_attention_map_is_the_normalised_sum_of_squares():
    y = torch.tensor([[[[1., 2.], [0., -1.]], [[2., 0.], [0., 1.]]]])  # (1, 2, 2, 2)
    squares = torch.tensor([[1. + 4., 4., 0., 1. + 1.]])
    assert torch.allclose(attention_map(y), squares / math.sqrt(25 + 16 + 4))
    assert torch.allclose(attention_map(y, 'max'), squares / 5)
    assert torch.equal(attention_map(torch.zeros(2, 3, 4, 4)), torch.zeros(2, 16))


def test_attention_loss_is_the_distance_of_the_maps():
    s, t = [torch.randn(3, 4, 5, 5), torch.randn(3, 8, 2, 2)], [torch.randn(3, 6, 5, 5), torch.randn(3, 8, 2, 2)]
    l2, mse = 0., 0.
    for a, b in zip(s, t):
        for i in range(3):
            q = [(m[i] ** 2).sum(0).flatten() for m in (a, b)]
            l2 += ((q[0] / (q[0] ** 2).sum().sqrt() - q[1] / (q[1] ** 2).sum().sqrt()) ** 2).sum().sqrt() / 3
            mse += ((q[0] / q[0].max() - q[1] / q[1].max()) ** 2).mean() / 3 / 2
    assert torch.allclose(attention_loss(s, t), l2) and torch.allclose(attention_loss(s, t, 'max'), mse)


def test_attention_loss_of_equal_maps_is_zero_with_a_finite_gradient():
    y = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = attention_loss([y], [-2 * y.detach()])  # neither sign nor size matters
    loss.backward()
    assert loss.item() < 1e-6 and torch.isfinite(y.grad).all()


@pytest.mark.parametrize('temperature', [1., 4.])
def test_logit_losses_against_their_formulas(temperature):
    s, t = torch.randn(5, 10), torch.randn(5, 10)
    p, q = (torch.softmax(z / temperature, 1) for z in (t, s))
    kl = (p * (p.log() - q.log())).sum(1).mean() * temperature ** 2
    entropy = -(p * p.log()).sum(1).mean() * temperature ** 2
    assert torch.allclose(logit_loss(s, t, temperature), kl)
    assert torch.allclose(distributional_loss(s, t, temperature), kl + entropy)


def test_teachers_get_no_gradient():
    t = torch.randn(2, 3, requires_grad=True)
    for loss in (logit_loss, distributional_loss):
        loss(torch.randn(2, 3, requires_grad=True), t).backward()
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    attention_loss([torch.randn(2, 3, 4, 4, requires_grad=True)], [features]).backward()
    assert t.grad is None and features.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# The task

def test_the_task_weighs_three_terms():
    x, y = batch()
    model, real = student(), teacher()
    task = DistillationTask(
        model, real, attention_loss_weight=30., task_loss_weight=1., distill_loss_weight=3., verbose=False).train()
    result = task(x, y)
    twin, features = student().train(), {}
    for name, net in (('s', twin), ('t', real)):
        for path in ('layer1.0', 'layer2.0', 'layer3.0', 'layer4.0'):
            net.get_submodule(path).register_forward_hook(
                lambda module, args, out, key=(name, path): features.__setitem__(key, out))
    logits, taught = twin(x), real.eval()(x)
    at = attention_loss(*([v for (n, _), v in features.items() if n == name] for name in 'st'))
    expected = F.cross_entropy(logits, y) + 3 * logit_loss(logits, taught) + 30 * at
    assert torch.allclose(result['loss'], expected) and torch.equal(result['output'], logits)
    assert at > 0.1 and len(features) == 8
    result['loss'].backward()
    assert all(p.grad is not None for p in model.parameters()) and all(p.grad is None for p in real.parameters())
    assert not any(p.requires_grad for p in real.parameters())
    assert not real.training and not model.layer1[0]._forward_hooks


def test_the_distributional_loss_has_the_gradient_of_timms_task():
    """So timm's train.py trains ReActNets as they should be, with --distill-loss-weight 1 --task-loss-weight 0."""
    x, y = batch()
    gradients = []
    for make in (lambda m, t: DistillationTask(m, t, loss_type='distributional', task_loss_weight=0.,
                                               distill_loss_weight=1., verbose=False),
                 lambda m, t: LogitDistillationTask(m, t, task_loss_weight=0., distill_loss_weight=1., verbose=False)):
        model = student('reactnet_resnet18')
        make(model, teacher()).train()(x, y)['loss'].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_layers_are_matched_by_the_names_of_both():
    task = DistillationTask(
        student(), teacher(), attention_loss_weight=1., match_layers=['layer1', 'layer3.0=layer3'], verbose=False)
    assert task.match_layers == [('layer1', 'layer1'), ('layer3.0', 'layer3')]
    assert task(*batch())['attention_loss'] > 0


def test_transfer_points_are_the_blocks_of_the_stages():
    assert residual_blocks(timm.create_model('resnet18')) == [f'layer{i}.{j}' for i in range(1, 5) for j in (0, 1)]
    assert residual_blocks(timm.create_model('el_mobilenet_v1', device='meta'))[:2] == ['blocks.0.0', 'blocks.1.0']


@pytest.mark.parametrize('make, message', [
    (lambda: DistillationTask(student(), None, attention_loss_weight=1.), 'teacher_model: found None.*need a teacher'),
    (lambda: DistillationTask(student(), teacher(num_classes=5)), 'teacher_model: found 5 classes, expected 10'),
    (lambda: DistillationTask(student(), teacher(), attention_loss_weight=1., match_layers=['layer9']),
     r"match_layers: the student has no layer 'layer9'.*layer1\.0, layer2\.0"),
    (lambda: DistillationTask(student(), teacher(), attention_loss_weight=1., match_layers=['layer1=stage1']),
     "match_layers: the teacher has no layer 'stage1'"),
    (lambda: DistillationTask(student(), teacher(), attention_loss_weight=1., match_layers='layer1'), 'match_layers'),
    (lambda: DistillationTask(student(), teacher(), loss_type='mse'), "loss_type: found 'mse'.*'distributional'"),
    (lambda: DistillationTask(student(), teacher(), attention_norm='l1'), "attention_norm: found 'l1'"),
    (lambda: DistillationTask(
        student(), teacher(), attention_loss_weight=1., match_layers=['layer1=layer3'], verbose=False)(*batch()),
     r"'layer1' of the student gives \(6, 8, 8, 8\), 'layer3' of the teacher \(6, 16, 2, 2\)"),
    (lambda: DistillationTask(student(), teacher(), attention_loss_weight=1.).compile(), 'attention_loss_weight'),
    (lambda: attention_map(torch.zeros(2, 3)), r'features: found shape \(2, 3\)'),
    (lambda: attention_map(torch.zeros(2, 3, 4, 4), 'l1'), "norm: found 'l1'"),
])
def test_what_makes_no_sense_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_averaged_copy_of_the_student_does_not_disturb_matching():
    task = DistillationTask(student(), teacher(), attention_loss_weight=1., verbose=False)
    task.setup_ema(decay=0.5)
    x, y = batch()
    before = task(x, y)['attention_loss']
    task.get_eval_model(ema=True)(x * 2)
    task.update_ema()
    assert torch.allclose(task(x, y)['attention_loss'], before, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Stages

@pytest.mark.parametrize('recipe', ['el', 'bireal', 'r2b', 'reactnet', 'xnor'])
def test_both_stages_have_the_same_keys(recipe):
    first, second = student('el_resnet26', recipe=recipe, real_weights=True), student('el_resnet26', recipe=recipe)
    second.load_state_dict(first.state_dict(), strict=True)
    x, _ = batch()
    assert not torch.equal(first.eval()(x), second.eval()(x))


def test_latent_weights_are_clipped_where_they_are_quantized():
    model = student()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(100)
    before = copy.deepcopy(model)
    clip_latent_weights(model, 0.5)
    for (name, p), q in zip(model.named_parameters(), before.parameters()):
        inside = name.endswith('conv.weight')
        assert torch.equal(p, q.clamp(-0.5, 0.5) if inside else q), name
    assert sum(name.endswith('conv.weight') for name, _ in model.named_parameters()) == 8
    real = student(real_weights=True)
    clip_latent_weights(real, 1e-3)
    assert real.layer1[0].conv1.conv.weight.abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Telemetry

def test_telemetry_sees_a_flip_made_by_hand(tmp_path):
    model = student('el_resnet26', recipe='el')
    telemetry = Telemetry(model, str(tmp_path / 't.jsonl'), bins=4, reach=2.)
    layer = model.layer1[0].conv2.conv
    share = (layer.weight >= 0).float().mean().item()
    with torch.no_grad():
        layer.weight.view(-1)[:72].neg_()
        model.layer1[0].conv1.link.gamma.fill_(2.5)
    flipped = 72 / layer.weight.numel()
    record = telemetry.record(0, 10)
    rows = record['layers']
    assert set(rows) == set(binary_layers(model)) and len(rows) == 12
    assert rows['layer1.0.conv2.conv']['flip_ratio'] == pytest.approx(flipped, abs=1e-6)
    assert all(row['flip_ratio'] == 0 for path, row in rows.items() if path != 'layer1.0.conv2.conv')
    assert rows['layer1.0.conv2.conv']['weight_positive'] == pytest.approx(
        (layer.weight >= 0).float().mean().item(), abs=1e-6) != pytest.approx(share, abs=1e-6)
    assert record['gamma']['layer1.0.conv1.link'] == 2.5 and len(record['gamma']) == 8
    assert telemetry.record(0, 20)['layers']['layer1.0.conv2.conv']['flip_ratio'] == 0  # since the record before
    assert [json.loads(line)['update'] for line in (tmp_path / 't.jsonl').read_text().splitlines()] == [10, 20]


def test_telemetry_counts_latent_weights_in_units_of_their_mean(tmp_path):
    model = student()
    layer = model.layer2[0].conv2.conv
    with torch.no_grad():
        layer.weight.fill_(0.1)
        layer.weight.view(-1)[0] = -3.  # far out
    n = layer.weight.numel()
    alpha = (0.1 * (n - 1) + 3) / n
    row = Telemetry(model, str(tmp_path / 't.jsonl'), bins=4, reach=2.).record(0, 0)['layers']['layer2.0.conv2.conv']
    assert row['alpha'] == pytest.approx(alpha) and 0 < 0.1 / alpha < 1
    assert row['histogram'] == pytest.approx([1 / n, 0, (n - 1) / n, 0], abs=1e-5)
    assert row['weight_positive'] == pytest.approx(1 - 1 / n, abs=1e-5)


def test_telemetry_looks_at_inputs_and_leaves_the_model_as_it_was(tmp_path):
    model = randomise(student()).train()
    x, _ = batch()
    seen = {}
    layer = model.layer3[0].conv2.conv
    handle = layer.register_forward_pre_hook(lambda module, args: seen.__setitem__('x', args[0]))
    model.eval()(x)
    handle.remove()
    before = {k: v.clone() for k, v in model.train().state_dict().items()}
    row = Telemetry(model, str(tmp_path / 't.jsonl')).record(0, 0, x)['layers']['layer3.0.conv2.conv']
    assert row['input_positive'] == pytest.approx((seen['x'] >= 0).float().mean().item(), abs=1e-5)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not layer._forward_pre_hooks


def test_telemetry_of_the_first_stage_has_inputs_alone(tmp_path):
    x, _ = batch()
    for net in (student(real_weights=True), nn.Sequential(nn.Conv2d(3, 4, 1))):
        rows = Telemetry(net, str(tmp_path / 't.jsonl')).record(0, 0, x)['layers']
        assert all(list(row) == ['input_positive'] for row in rows.values())
    assert rows == {}


def test_json_lines_forget_what_a_resumed_run_repeats(tmp_path):
    path = str(tmp_path / 'log.jsonl')
    lines = JsonLines(path)
    for epoch in range(3):
        lines.write(dict(epoch=epoch))
    with open(path, 'a') as f:
        f.write('{"epoch": 3, "cut sho')
    JsonLines(path, 2)
    assert JsonLines.read(path) == [dict(epoch=0), dict(epoch=1)]
    assert JsonLines(path) and JsonLines.read(path) == []


def test_binary_layers_are_those_with_signs():
    assert len(binary_layers(timm_el.binarize(timm.create_model('resnet18', **NET), 'el'))) == 8
    assert binary_layers(timm.create_model('resnet18', **NET)) == {}


def test_telemetry_leaves_layers_in_the_mode_that_they_are_held_in(tmp_path):
    model = student().train()
    model.bn1.eval()
    modes = {path: module.training for path, module in model.named_modules()}
    Telemetry(model, tmp_path / 'telemetry.jsonl').record(0, 0, torch.randn(2, 3, 64, 64))
    assert {path: module.training for path, module in model.named_modules()} == modes


def test_frozen_weights_are_not_clipped():
    model = student()
    frozen, free = list(binary_layers(model).values())[:2]
    frozen.weight.requires_grad_(False)
    for layer in (frozen, free):
        layer.weight.data.fill_(3.)
    clip_latent_weights(model)
    assert frozen.weight.unique().tolist() == [3.] and free.weight.unique().tolist() == [1.]


def test_lines_of_another_kind_are_kept_in_front_of_any_epoch(tmp_path):
    JsonLines.append(tmp_path / 'log.jsonl', {'note': 'begins'})
    JsonLines.append(tmp_path / 'log.jsonl', {'epoch': 1})
    JsonLines(tmp_path / 'log.jsonl', epoch=1)
    assert JsonLines.read(tmp_path / 'log.jsonl') == [{'note': 'begins'}]
