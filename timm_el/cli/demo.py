"""Show a binarized network at work: what it sees, costs and learns; all offline.

First a network with shipped weights classifies scikit-learn's photographs, or the images and folders that are named,
and stands beside its float host in size and latency. Then one is trained, in about three minutes, on scikit-learn's
1,797 scanned handwritten digits.
"""
import tempfile
from pathlib import Path

import timm
import torch

from ..bench.hosts import FLOAT_HOSTS
from ..bench.inference import runner
from ..bench.machine import cpu_name
from ..bench.turns import Spread, take_turns
from ..dry_run import own_input_size
from ..engine import deploy, info
from ..experiments import photos
from ..experiments.config import FitConfig
from ..experiments.digits import digits_config, write_digits
from ..experiments.fit import fit
from ..models.factory import create
from ..summary import summarize
from ..tables import table
from ._arguments import parser_of, positive

ROUNDS = 11  # of the comparison of latencies


def main(argv: list[str]) -> None:
    """Run the demo."""
    parser = parser_of('demo', __doc__)
    parser.add_argument('images', nargs='*', metavar='IMAGE',
                        help='images and folders to classify; without any, the photographs of scikit-learn')
    parser.add_argument('--pretrained', default='el_resnet26', metavar='MODEL',
                        help='model that classifies them (default: el_resnet26)')
    parser.add_argument('--model', default='el_resnet26', help='registered model to train (default: el_resnet26)')
    parser.add_argument('--recipe', help='how it is binarized (default: its own recipe)')
    parser.add_argument('--compare', metavar='RECIPE', help='train a twin with this recipe beside it, e.g. bireal')
    parser.add_argument('--epochs', type=int, default=10, help='0: classify only (default: 10)')
    parser.add_argument('--size', type=positive, default=32, help='pixels (default: 32)')
    parser.add_argument('--seed', type=int, default=0, help='default: 0')
    parser.add_argument('--digits', type=positive, default=1_797, help='how many digits to use (default: 1797)')
    args = parser.parse_args(argv)
    recipes = [args.recipe] if args.compare in (None, args.recipe) else [args.recipe, args.compare]
    for recipe in recipes:  # before any time is spent
        create(args.model, recipe, device='meta')
    look(args.pretrained, args.images)
    if args.epochs > 0:
        learn(args.model, recipes, args.epochs, args.size, args.seed, args.digits)


def learn(model: str, recipes: list[str | None], epochs: int, size: int, seed: int, digits: int) -> None:
    """Train a network on digits with each recipe and print the results."""
    print()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder, 'digits'), seed, digits)
        for recipe in recipes:
            config = FitConfig.from_dict(digits_config(model, recipe, epochs, size, seed, digits))
            result = fit(config, f'{folder}/{recipe}', f'{folder}/digits', workers=0)
            network = create(model, recipe, num_classes=10)
            report, summary = getattr(network, 'binarize_report', None), summarize(network, (3, size, size))
            rows.append((f'{model} ({report.recipe.name})' if report else model, f'{result["top1"]:.2f} %',
                         f'{result["seconds"]:.0f} s', f'{summary.mbit / 8:.2f} MB', f'{summary.ops / 1e6:.2f} M'))
    print(f'\nheld-out digits after {epochs} epochs, seed {seed}, {torch.get_num_threads()} threads:')
    print(table(('', 'top-1', 'training', 'size', 'OPs'), rows, '<>'))


def look(name: str, paths: list[str]) -> None:
    """Classify photographs with pretrained weights, and print size and latency beside the float host's.

    Raises:
        ValueError: The weights of the model are not shipped.
    """
    model = timm.create_model(name, pretrained=True).eval()
    file = model.pretrained_cfg.get('file')
    if not file:
        raise ValueError(f'pretrained: the weights of {name} are not shipped with this package; try el_resnet26')
    deployed = deploy(model)
    size = own_input_size(model)
    name = name.partition('.')[0]
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
    """Return the megabytes of a model's state dict."""
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6
