"""What training a binarized model costs, beside its float host.

One step is forward, backward and optimizer step on the same random batch. Memory is what autograd keeps for backward,
parameters excluded.
"""
import argparse
from typing import Any, Callable, Dict

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from ..models.factory import create
from .machine import cpu_name
from .nets import host_name
from .turns import Spread, ratios, take_turns


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters and input excluded."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    storages: Dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).sum()
    total = sum(storages.values())
    del loss
    return total


def train_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, opt: str) -> Callable[[], None]:
    """A function that takes one training step."""
    optimizer = create_optimizer_v2(model, opt=opt, lr=1e-4, weight_decay=0.)

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure_training(args: argparse.Namespace) -> Dict[str, Any]:
    """Times and saved bytes of a model and its float host.

    Args:
        args: model, host, recipe, batch, size, opt, compile, channels_last, pairs, warmup.
    """
    host = host_name(args.model, args.host, args.recipe)
    torch.manual_seed(0)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    nets = {'host': timm.create_model(host), 'model': create(args.model, args.recipe)}
    x = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=memory_format)
    y = torch.randint(1000, (args.batch,))
    nets = {name: net.to(memory_format=memory_format) for name, net in nets.items()}
    memory = {name: saved_bytes(net.train(), x) for name, net in nets.items()}
    if args.compile:
        nets = {name: torch.compile(net) for name, net in nets.items()}
    seconds = take_turns({name: train_step(net, x, y, args.opt) for name, net in nets.items()}, args.pairs, args.warmup)
    ratio = ratios(seconds, 'host')['model']
    return {
        'model': args.model, 'host': host, 'mode': 'compile' if args.compile else 'eager',
        'batch': args.batch, 'size': args.size, 'opt': args.opt, 'channels_last': args.channels_last,
        'threads': torch.get_num_threads(), 'pairs': args.pairs, 'torch': torch.__version__,
        'cpu': cpu_name(),
        'host_ms': 1e3 * Spread.of(seconds['host']).median, 'model_ms': 1e3 * Spread.of(seconds['model']).median,
        'time_ratio': ratio.median, 'time_ratio_min': ratio.min, 'time_ratio_max': ratio.max,
        'host_saved_mb': memory['host'] / 1e6, 'model_saved_mb': memory['model'] / 1e6,
        'memory_ratio': memory['model'] / memory['host'],
    }
