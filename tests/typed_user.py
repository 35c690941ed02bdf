"""A user's program under a strict type checker: every public name, with the types that it has to have.

`assert_type` states a type. A comment `type: ignore[...]` states a mistake that the checker has to see: strict checking
complains of a comment that nothing needs.
"""
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from typing_extensions import assert_type

import timm_el
from timm_el import engine, layers, training
from timm_el.summary import Summary


def convert() -> nn.Module:
    assert_type(timm_el.__version__, str)
    assert_type(timm_el.RECIPES, dict[str, timm_el.Recipe])
    recipe = timm_el.RECIPES['el'].replace(name='mine', gamma='fixed')
    assert_type(recipe, timm_el.Recipe)
    assert_type(timm_el.Recipe('another', link=('reduce',), act='branch').code, int)
    assert_type(recipe.to_dict(), dict[str, Any])
    assert issubclass(timm_el.models.BinarizedResNet, nn.Module)
    host: nn.Module = timm.create_model('test_resnet', num_classes=10)
    return assert_type(
        timm_el.binarize(host, recipe, keep=['layer1'], example_input=torch.zeros(1, 3, 32, 32)), nn.Module)


def share(model: nn.Module, folder: Path) -> None:
    assert_type(timm_el.summarize(model, (3, 32, 32)), Summary)
    timm_el.save_packed(model, folder / 'net.safetensors', torch.float16)
    assert_type(timm_el.load_packed(model, str(folder / 'net.safetensors')), nn.Module)
    packed = assert_type(timm_el.pack_state_dict(model), dict[str, torch.Tensor])
    assert_type(timm_el.unpack_state_dict(packed, model), dict[str, torch.Tensor])
    try:
        timm_el.load_float(model, {'no.weight': torch.zeros(1)})
    except timm_el.CheckpointError as e:
        assert_type(e.args, tuple[Any, ...])
    assert_type(timm_el.save_for_hub(model, folder, metrics={'top1': 68.5}, pretrained_cfg={}), Path)
    assert_type(timm_el.from_hub(folder, num_classes=7), nn.Module)


def publish(folder: Path) -> str:
    return assert_type(timm_el.push_to_hub(folder, 'me/net', private=True), str)


def deploy(model: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', engine.SlowEngineWarning)
        fast = assert_type(timm_el.deploy(model), nn.Module)
    assert_type(engine.deploy(model), nn.Module)
    assert_type(engine.info(), dict[str, Any])
    engine.use_isa(None)
    kinds = (
        engine.DeployedConv, engine.DeployedLinear, engine.DeployedPool, engine.DeployedUnit, engine.FusedUnit,
        engine.LinkUnit, engine.SplitUnit)
    assert any(isinstance(module, kinds) for module in fast.modules())
    if engine.info()['native']:
        assert_type(engine.chip_rate(), float)
        assert_type(engine.runner(), Path)
        assert_type(timm_el.export(model, folder / 'net.program', size=(64, 64)), int)
        assert_type(engine.export(fast, folder / 'net.program', size=(64, 64)), int)
        program = assert_type(timm_el.load_program(folder / 'net.program'), engine.ProgramFile)
        assert_type(engine.read_program(folder / 'net.program').labels, list[str] | None)
        assert_type(program(torch.zeros(1, 3, 64, 64)), Any)
        assert len(engine.program_of(fast, (64, 64)).islands) == 0
        assert_type(engine.count_rate(8, 8, 4, repeats=1), float)


def compose(x: torch.Tensor) -> torch.Tensor:
    conv = layers.BinaryConv2d(8, 16, 3, padding=1, bias=False, input_quantizer='approx', device='cpu')
    link = layers.ElasticLink(8, 16, gamma='learnable', dtype=torch.float32)
    unit = layers.BinaryUnit(conv, nn.BatchNorm2d(16), None, link, layers.Shift(8), post=layers.RPReLU(16))
    assert_type(unit.weight, torch.Tensor | None)
    assert_type((conv.weight, conv.bias), tuple[torch.Tensor, torch.Tensor | None])
    assert_type((conv.alpha(), conv.is_binary), tuple[torch.Tensor, bool])
    assert_type(layers.BinaryConv2d.from_conv(nn.Conv2d(8, 8, 1)), layers.BinaryConv2d)
    assert_type(layers.BinaryLinear.from_linear(nn.Linear(8, 8)), layers.BinaryLinear)
    assert_type(layers.StandardizedBinaryConv2d(8, 8, 1, has_gain=True).scale, float)
    assert_type(layers.ZeroShortcut()(x), Any)
    assert_type(layers.RSign(8)(x), Any)
    assert_type(layers.weight_scale(conv.weight), torch.Tensor)
    assert_type(layers.input_scale(x, (3, 3), (1, 1), (1, 1), (1, 1)), torch.Tensor)
    assert_type(layers.expected_statistics(conv.weight, nn.ReLU()), tuple[torch.Tensor, torch.Tensor])
    host_attributes: tuple[str, ...] = layers.HOST_ATTRIBUTES
    assert all(hasattr(link, name) for name in host_attributes[:2])
    assert_type(layers.input_sign_shares(unit, x), dict[str, float])
    for check in (layers.check_tensors, layers.check_own_tensors, layers.check_unwrapped):
        check(unit, 'unit')
    image_conv = nn.Conv2d(3, 8, 3)
    layers.guard_input(image_conv, 8).remove()
    assert_type(layers.same_pads(x, (3, 3), (2, 2), (1, 1)), list[int])
    with layers.real_weights(unit):
        return assert_type(unit.forward(x), torch.Tensor)


def train(model: nn.Module, teacher: nn.Module, folder: Path) -> None:
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    blocks = assert_type(training.residual_blocks(teacher), list[str])
    task = training.DistillationTask(
        model, teacher, attention_loss_weight=1., match_layers=blocks, loss_type='distributional')
    assert_type(task.forward(images, labels), dict[str, torch.Tensor])
    features, logits = [torch.randn(4, 8, 5, 5)], torch.randn(4, 10)
    assert_type(training.attention_map(features[0], norm='max'), torch.Tensor)
    assert_type(training.attention_loss(features, features), torch.Tensor)
    assert_type(training.logit_loss(logits, logits, temperature=2.), torch.Tensor)
    assert_type(training.distributional_loss(logits, logits), torch.Tensor)
    assert_type(training.binary_layers(model), dict[str, nn.Module])
    training.clip_latent_weights(model, bound=1.5)
    assert_type(training.Telemetry(model, folder / 'layers.jsonl').record(0, 1, images), dict[str, Any])
    training.JsonLines(folder / 'lines.jsonl').write({'epoch': 0})
    assert_type(training.JsonLines.read(folder / 'lines.jsonl'), list[dict[str, Any]])


def mistakes(model: nn.Module) -> None:
    """Every line has one that a checker sees before the program runs."""
    timm_el.binarise(model)  # type: ignore[attr-defined]
    timm_el.binarize(model, 5)  # type: ignore[arg-type]
    timm_el.binarize(model, 'el', ['conv1'])  # type: ignore[call-arg]
    timm_el.Recipe('mine', gamma='learned')  # type: ignore[arg-type]
    timm_el.deploy(model, float_dtype='float16')  # type: ignore[arg-type]
    timm_el.load_packed('net.safetensors', model)  # type: ignore[arg-type]
    timm_el.summarize(model, 224)  # type: ignore[arg-type]
    layers.BinaryConv2d(8, 16)  # type: ignore[call-arg]
    layers.RPReLU('8')  # type: ignore[arg-type]
    training.Telemetry(model)  # type: ignore[call-arg]


def main(folder: Path) -> None:
    model = convert()
    train(model, timm.create_model('test_resnet', num_classes=10), folder)
    share(model, folder)
    deploy(model.eval(), folder)
    compose(torch.randn(2, 8, 6, 6))
