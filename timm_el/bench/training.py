"""Benchmark of training: a step of a binarized model beside its float host.

One step is forward, backward and optimizer step on the same random batch. Memory is what autograd keeps for backward,
parameters excluded. The first step of each, which compiles it or has its convolutions chosen, is measured by itself.
"""
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from ..models.factory import create
from .hosts import host_name
from .machine import cpu_name
from .turns import Spread, ratios, take_turns


def device_name(device: str) -> str:
    """Return the name of the processor that `device` stands for."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else cpu_name()


def saved_bytes(model: nn.Module, x: torch.Tensor, amp: bool = False) -> int:
    """Return the bytes that autograd keeps between forward and backward for images x (N, C, H, W).

    Each storage counts once; parameters and the input are excluded.
    """
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _autocast(x, amp):
        loss = model(x).sum()
    total = sum(storages.values())
    del loss
    return total


def _autocast(x: torch.Tensor, amp: bool) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=amp)


def train_step(
        model: nn.Module, x: torch.Tensor, y: torch.Tensor, opt: str, amp: bool = False) -> Callable[[], None]:
    """Return a function that takes one training step and waits for the device; images x (N, C, H, W), labels y (N,)."""
    optimizer = create_optimizer_v2(model, opt=opt, lr=1e-4, weight_decay=0.)

    def step() -> None:
        with _autocast(x, amp):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if x.device.type != 'cpu':
            torch.accelerator.synchronize()  # a step is one that was done

    return step


def _seconds_of(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure_training(
        model: str,
        host: str | None = None,
        recipe: str | None = None,
        batch: int = 32,
        size: int = 64,
        pairs: int = 9,
        warmup: int = 2,
        opt: str = 'sgd',
        compiled: bool = False,
        channels_last: bool = False,
        device: str = 'cpu',
        amp: bool = False,
) -> dict[str, Any]:
    """Measure times and saved bytes of a training step of a model and of its float host.

    Args:
        model, host, recipe, pairs, warmup: As for `measure_inference`.
        batch: Images a step.
        size: Pixels.
        opt: Optimizer of timm.
        compiled: Compile both with torch.compile.
        channels_last: Memory format of both.
        device: Name of a device of torch.
        amp: Run forward and loss under autocast in bfloat16.
    """
    host_of = host_name(model, host, recipe)
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    nets = {'host': timm.create_model(host_of), 'model': create(model, recipe)}
    x = torch.randn(batch, 3, size, size).to(device, memory_format=memory_format)
    y = torch.randint(min(net.num_classes for net in nets.values()), (batch,)).to(device)
    nets = {name: net.to(device, memory_format=memory_format) for name, net in nets.items()}
    memory = {name: saved_bytes(net.train(), x, amp) for name, net in nets.items()}
    if compiled:
        nets = {name: torch.compile(net) for name, net in nets.items()}
    steps = {name: train_step(net, x, y, opt, amp) for name, net in nets.items()}
    first = {name: _seconds_of(step) for name, step in steps.items()}
    seconds = take_turns(steps, pairs, warmup)
    ratio = ratios(seconds, 'host')['model']
    return {
        'model': model, 'recipe': recipe, 'host': host_of, 'mode': 'compile' if compiled else 'eager', 'batch': batch,
        'size': size, 'opt': opt, 'channels_last': channels_last, 'amp': amp, 'device': device_name(device),
        'threads': torch.get_num_threads(), 'pairs': pairs, 'torch': torch.__version__,
        'host_ms': 1e3 * Spread.of(seconds['host']).median, 'model_ms': 1e3 * Spread.of(seconds['model']).median,
        'time_ratio': ratio.median, 'time_ratio_min': ratio.min, 'time_ratio_max': ratio.max,
        'host_first_ms': 1e3 * first['host'], 'model_first_ms': 1e3 * first['model'],
        'host_saved_mb': memory['host'] / 1e6, 'model_saved_mb': memory['model'] / 1e6,
        'memory_ratio': memory['model'] / memory['host'],
    }
