"""python -m timm_el demo [IMAGE ...]: what a binarized network sees, what it costs, and how it learns; all offline.

First a network with shipped weights classifies scikit-learn's photographs, or the images and folders that are named,
and stands beside its float host in size and latency. Then one is trained, in under three minutes, on scikit-learn's
1,797 scanned handwritten digits. Model, optimizer, scheduler and transforms are timm's.
"""
import argparse
import time
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader, Dataset

from ..bench.inference import runner
from ..bench.machine import cpu_name
from ..bench.nets import FLOAT_HOSTS
from ..bench.turns import Spread, take_turns
from ..dry_run import own_input_size
from ..engine import deploy, info
from ..experiments import photos
from ..summary import Summary, summarize

NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
HELD_OUT = 360  # images, the last fifth
BATCH_SIZE = 64
ROUNDS = 11  # of the comparison of latencies


class Digits(Dataset):
    """Digits as RGB images through a timm transform."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform) -> None:
        from PIL import Image
        # 0 to 16 in the data set
        self.images = [Image.fromarray((i * 255 / 16).astype(np.uint8)).convert('RGB') for i in images]
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def load_digits(size: int, seed: int) -> Tuple[Digits, Digits]:
    """Training and held-out digits, shuffled by the seed."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as e:
        raise SystemExit('the demo needs scikit-learn: pip install "timm-el[demo]"') from e
    data = load()
    order = np.random.RandomState(seed).permutation(len(data.target))
    mean_std = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    # Digits must not be flipped, and an 8x8 image can spare little at its edges.
    train = create_transform(
        (3, size, size), is_training=True, hflip=0.0, color_jitter=None, scale=(0.8, 1.0), ratio=(0.9, 1.1),
        interpolation='bilinear', **mean_std)
    test = create_transform((3, size, size), interpolation='bilinear', crop_pct=1.0, **mean_std)
    parts = order[:-HELD_OUT], order[-HELD_OUT:]
    return tuple(
        Digits(data.images[part], data.target[part], transform) for part, transform in zip(parts, (train, test)))


def accuracy(model: torch.nn.Module, digits: Digits) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for x, y in DataLoader(digits, 120):
            right += (model(x).argmax(1) == y).sum().item()
    return 100 * right / len(digits)


def train(name: str, recipe: str, epochs: int, size: int, seed: int) -> Tuple[torch.nn.Module, float, float]:
    """Build and train a model; returns it with its held-out accuracy in percent and the seconds that it took."""
    from tqdm import tqdm
    torch.manual_seed(seed)
    train_set, test_set = load_digits(size, seed)
    model = timm.create_model(name, num_classes=10, recipe=recipe)
    optimizer = create_optimizer_v2(model, opt='adam', lr=3e-3, weight_decay=0.)
    scheduler, epochs = create_scheduler_v2(optimizer, sched='cosine', num_epochs=epochs, min_lr=0.)
    loader = DataLoader(
        train_set, BATCH_SIZE, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    with tqdm(total=epochs * len(loader), desc=f'{name} ({recipe})', unit='step') as bar:
        for epoch in range(epochs):
            model.train()
            for x, y in loader:
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
                bar.set_postfix(epoch=epoch + 1, loss=f'{loss.item():.3f}')
            scheduler.step(epoch + 1)
    seconds = time.perf_counter() - start
    return model, accuracy(model, test_set), seconds


def show(model: torch.nn.Module, digits: Digits, count: int = 8) -> None:
    """Classify a few held-out images by name."""
    x = torch.stack([digits[i][0] for i in range(count)])
    with torch.inference_mode():
        probabilities = model.eval()(x).softmax(1)
    print('\nheld-out images:')
    for i, p in enumerate(probabilities):
        guess = int(p.argmax())
        print(f'  image {i}: {NAMES[guess]:5} ({100 * p[guess]:.0f} %), truly {NAMES[digits.labels[i]]}')


def look(name: str, paths: List[str]) -> None:
    """Classify photographs with pretrained weights, and print what that costs beside the float host."""
    model = timm.create_model(name, pretrained=True).eval()
    file = model.pretrained_cfg.get('file')
    if not file:
        raise ValueError(f'pretrained: the weights of {name} are not shipped with this package; try el_resnet26')
    deployed = deploy(model)
    size = own_input_size(model)
    print(f'{name}.{model.pretrained_cfg["tag"]} at {size[-1]} px knows: {", ".join(photos.label_names(model))}')
    if not paths:
        print("  (scikit-learn's photographs show a temple and a flower, so look at your own: demo IMAGE)")
    for path in photos.find(paths):
        best = photos.classify(deployed, photos.prepare(model, photos.read(path)))
        print(f'  {path}: ' + ', '.join(f'{label} {100 * p:.0f} %' for label, p in best))

    rows = {}
    if name in FLOAT_HOSTS:  # timm has none for a ReActNet
        host = timm.create_model(FLOAT_HOSTS[name], num_classes=model.num_classes).eval()
        rows[f'float {FLOAT_HOSTS[name]}'] = host, tensor_mb(host)
    rows |= {
        'latent': (model, tensor_mb(model)),
        'packed and deployed': (deployed, Path(file).stat().st_size / 1e6)}
    x = torch.randn(1, *size)
    seconds = take_turns({row: runner(net, x) for row, (net, _) in rows.items()}, ROUNDS, settle=True)
    print(f'\none image, {cpu_name()}, {torch.get_num_threads()} threads, engine {info()["body"]}, '
          f'medians of {ROUNDS} rounds:')
    for row, (_, mb) in rows.items():
        print(f'  {row:20} {1e3 * Spread.of(seconds[row]).median:7.2f} ms {mb:7.2f} MB')


def tensor_mb(model: torch.nn.Module) -> float:
    """Megabytes of a model's state dict."""
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6


def main(argv: List[str]) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_el demo', description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('images', nargs='*', metavar='IMAGE',
                        help='images and folders to classify; without any, the photographs of scikit-learn')
    parser.add_argument('--pretrained', default='el_resnet26', metavar='MODEL', help='model that classifies them')
    parser.add_argument('--model', default='el_resnet26', help='registered timm_el model to train, with a recipe')
    parser.add_argument('--recipe', default='el', help='how it is binarized')
    parser.add_argument('--compare', metavar='RECIPE', help='train a twin with this recipe beside it, e.g. bireal')
    parser.add_argument('--epochs', type=int, default=10, help='0: classify only')
    parser.add_argument('--size', type=int, default=32, help='pixels')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)

    recipes = [args.recipe, *([args.compare] if args.compare and args.compare != args.recipe else [])]
    for recipe in recipes:  # before any time is spent
        timm.create_model(args.model, recipe=recipe, device='meta')
    look(args.pretrained, args.images)
    if args.epochs == 0:
        return
    print()
    results: Dict[str, Tuple[float, float, Summary]] = {}
    models: List[torch.nn.Module] = []
    for recipe in recipes:
        trained, top1, seconds = train(args.model, recipe, args.epochs, args.size, args.seed)
        results[recipe] = top1, seconds, summarize(trained, (3, args.size, args.size))
        models.append(trained)
    model = models[0]
    print(results[args.recipe][2])
    show(model, load_digits(args.size, args.seed)[1])
    print(f'\nheld-out accuracy on {HELD_OUT} digits after {args.epochs} epochs, seed {args.seed}, '
          f'{torch.get_num_threads()} threads:')
    for recipe, (top1, seconds, summary) in results.items():
        print(f'  {args.model} ({recipe}): {top1:.2f} %, {seconds:.0f} s of training, {summary.mbit / 8:.2f} MB')
