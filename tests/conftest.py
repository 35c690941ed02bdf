"""Shared helpers: images, randomised batch norms, and the models that this package registers."""
import os
from collections.abc import Iterable

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import timm_el

# The tests' nets are small, and threads that wait for work keep others from theirs: one here and in what tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')
torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


def with_slow(default: Iterable, slow: Iterable) -> list:
    """Parameters of a test: the default ones, then the others, which are left to `pytest -m slow`."""
    default = list(default)
    return default + [
        pytest.param(*(p if isinstance(p, tuple) else (p,)), marks=pytest.mark.slow) for p in slow if p not in default]


MODELS = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('timm_el.')
          and name != 'timm_el_converted']  # which is any net
# Basic blocks, bottlenecks, separable convolutions and ReActNet's blocks; the others are these with other numbers.
EACH_MODEL = with_slow(['el_resnet18', 'el_resnet26', 'el_mobilenet_v1', 'el_reactnet_c'], MODELS)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norm statistics and affine, gammas, shifts and slopes: no test may pass because they are 0 or 1."""
    g = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.data.copy_(torch.rand(tensor.shape, generator=g) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            uniform(module.weight, 0.5, 1.5)
            uniform(module.bias, -0.5, 0.5)
            uniform(module.running_mean, -0.5, 0.5)
            uniform(module.running_var, 0.5, 2.0)
        elif isinstance(module, timm_el.layers.ElasticLink) and module.gamma is not None:
            uniform(module.gamma, 1.5, 3.0)
        elif isinstance(module, timm_el.layers.Shift):
            uniform(module.bias, -0.5, 0.5)
        elif isinstance(module, timm_el.layers.RPReLU):
            uniform(module.shift_in, -0.5, 0.5)
            uniform(module.slope, 0.1, 0.9)
            uniform(module.shift_out, -0.5, 0.5)
    return model


@torch.no_grad()
def worst_unit(latent: nn.Module, deployed: nn.Module, x: torch.Tensor) -> float:
    """Largest difference of any unit's output, each fed what the latent unit is fed, relative to its largest value."""
    seen = {}
    handles = [
        m.register_forward_hook(lambda m, args, out, p=p: seen.setdefault(p, []).append((args[0].clone(), out.clone())))
        for p, m in latent.named_modules() if isinstance(m, timm_el.layers.BinaryUnit)]
    latent(x)
    for handle in handles:
        handle.remove()
    assert seen
    worst = 0.
    for path, calls in seen.items():
        for source, expected in calls:
            error = (deployed.get_submodule(path)(source) - expected).abs().max() / expected.abs().max().clamp(min=1)
            worst = max(worst, error.item())
    return worst


@pytest.fixture(scope='session')
def photos() -> torch.Tensor:
    """Eight crops of scikit-learn's two photographs, 224 px, normalised: (8, 3, 224, 224)."""
    from sklearn.datasets import load_sample_images
    crops = []
    for image in load_sample_images().images:
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        crops += [x[:, :, i:i + 320, j:j + 320] for i in (0, 107) for j in (0, 320)]
    x = F.interpolate(torch.cat(crops), size=224, mode='bilinear', antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None]


@pytest.fixture(scope='session')
def colours(tmp_path_factory):
    """An ImageFolder of three classes, 12 training and 5 validation images each: noise around a colour."""
    root, rng = tmp_path_factory.mktemp('images'), np.random.RandomState(0)
    for split, count in (('train', 12), ('validation', 5)):
        for c, name in enumerate(('red', 'green', 'blue')):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.randint(0, 100, (32, 32, 3), dtype=np.uint8)
                image[:, :, c] += 120
                Image.fromarray(image).save(root / split / name / f'{i}.png')
    return root


@pytest.fixture
def one_thread():
    """One thread, and afterwards torch's own number again and the best instruction set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    timm_el.engine.use_isa()
