"""python -m timm_el bench --train MODEL: what training a binarized model costs, beside its float host.

One step is forward, backward and optimizer step on the same random batch. Both models take turns in one run; the ratio
is the median over the pairs. Memory is what autograd keeps for backward, parameters excluded.
"""
import argparse
import json
import platform
import statistics
import time
from typing import Any, Callable, Dict, List

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from . import create

# The float nets that the registered models stand for.
FLOAT_HOSTS = {
    'el_resnet18': 'resnet18', 'el_resnet26': 'resnet26', 'el_resnet34': 'resnet34', 'el_resnet50': 'resnet50',
    'el_mobilenet_v1': 'mobilenetv1_100',
}


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


def bench_train(args: argparse.Namespace) -> Dict[str, Any]:
    """Times and saved bytes of a model and its float host."""
    host_name = args.host or FLOAT_HOSTS.get(args.model, args.model)
    if host_name == args.model and not args.recipe:
        raise ValueError(f'host: no float host of {args.model} is known, name one (--host) or a recipe (--recipe)')
    torch.manual_seed(0)
    host = timm.create_model(host_name)
    model = create(args.model, args.recipe)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    x = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=memory_format)
    y = torch.randint(1000, (args.batch,))
    nets = {'host': host.to(memory_format=memory_format), 'model': model.to(memory_format=memory_format)}
    memory = {name: saved_bytes(net.train(), x) for name, net in nets.items()}
    if args.compile:
        nets = {name: torch.compile(net) for name, net in nets.items()}
    steps = {name: train_step(net, x, y, args.opt) for name, net in nets.items()}
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for i in range(args.warmup + args.pairs):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= args.warmup:
                times[name].append(time.perf_counter() - start)
    ratios = [m / h for m, h in zip(times['model'], times['host'])]
    return {
        'model': args.model, 'host': host_name, 'mode': 'compile' if args.compile else 'eager',
        'batch': args.batch, 'size': args.size, 'opt': args.opt, 'channels_last': args.channels_last,
        'threads': torch.get_num_threads(), 'pairs': args.pairs, 'torch': torch.__version__,
        'cpu': cpu_name(),
        'host_ms': 1e3 * statistics.median(times['host']), 'model_ms': 1e3 * statistics.median(times['model']),
        'time_ratio': statistics.median(ratios), 'time_ratio_min': min(ratios), 'time_ratio_max': max(ratios),
        'host_saved_mb': memory['host'] / 1e6, 'model_saved_mb': memory['model'] / 1e6,
        'memory_ratio': memory['model'] / memory['host'],
    }


def cpu_name() -> str:
    """Name of the processor."""
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(argv: List[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_el bench', description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('model', help='name of a timm model')
    parser.add_argument('--train', action='store_true', help='measure training (the only kind there is yet)')
    parser.add_argument('--host', help='float model to compare with; the host of a registered model if not given')
    parser.add_argument('--recipe', help='binarize the model with this recipe first')
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--size', type=int, default=64, help='pixels')
    parser.add_argument('--threads', type=int, help="torch's own choice if not given")
    parser.add_argument('--opt', default='sgd', help='optimizer of timm')
    parser.add_argument('--compile', action='store_true', help='torch.compile both')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--pairs', type=int, default=9)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--json', action='store_true', help='print data in place of text')
    args = parser.parse_args(argv)
    if not args.train:
        parser.error('only --train can be measured yet')
    if args.threads:
        torch.set_num_threads(args.threads)
    r = bench_train(args)
    if args.json:
        print(json.dumps(r, indent=2))
        return
    print(f'{r["cpu"]}, {r["threads"]} threads, torch {r["torch"]}, {r["mode"]}, batch {r["batch"]}, {r["size"]} px, '
          f'{r["opt"]}, median of {r["pairs"]} pairs')
    print(f'  {"":24} {"step, ms":>10} {"saved for backward, MB":>24}')
    for name in ('host', 'model'):
        print(f'  {r[name]:24} {r[f"{name}_ms"]:>10.1f} {r[f"{name}_saved_mb"]:>24.1f}')
    print(f'  {"ratio":24} {r["time_ratio"]:>10.3f} {r["memory_ratio"]:>24.3f}   '
          f'(time {r["time_ratio_min"]:.3f} to {r["time_ratio_max"]:.3f})')
