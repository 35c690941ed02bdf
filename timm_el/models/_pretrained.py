"""Default configs: the ImageNet tag is the default one, and what this package ships stands beside it."""
import json
import logging
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg

_logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
# In a wheel the folders lie inside the package; an editable install reads those of the checkout.
SHIPPED = next((p for p in (PACKAGE / '_hub', PACKAGE.parent / 'hub') if (p / 'manifest.json').is_file()), None)

CIFAR10 = dict(
    num_classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), crop_pct=1.0, interpolation='bilinear')


def default_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return a default config in timm's form: the ImageNet one of the package's nets, with changes."""
    return {
        'url': '', 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7), 'crop_pct': 0.875,
        'interpolation': 'bilinear', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'paper_ids': 'arXiv:2112.10149', 'license': 'apache-2.0', **kwargs}


def shipped_cfgs(variant: str) -> dict[str, dict[str, Any]]:
    """Return the configs of the weights that this package ships for a model, by its name and their tag.

    Each is what stands in the config.json of their folder.
    """
    cfgs = {}
    for file in sorted(SHIPPED.glob(f'{variant}.*/config.json')) if SHIPPED is not None else []:
        config = json.loads(file.read_text(encoding='utf-8'))
        found = {k: tuple(v) if isinstance(v, list) else v for k, v in config['pretrained_cfg'].items() if k != 'tag'}
        cfgs[file.parent.name] = default_cfg(**found, file=str(file.with_name('model.safetensors')))
    return cfgs


def choose_weights(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments that name shipped weights, for `pretrained=True` without a tag and without default weights.

    Args:
        variant: Name of the model.
        pretrained: As the user asked.
        kwargs: Of the entry point; returned, with `pretrained_cfg` filled in where that is due.
    """
    source = {'file', 'url', 'hf_hub_id', 'state_dict'}
    named = kwargs.get('pretrained_cfg') is not None or source & set(kwargs.get('pretrained_cfg_overlay') or {})
    if not pretrained or named or get_pretrained_cfg(variant).has_weights:
        return kwargs
    shipped = next(iter(shipped_cfgs(variant)), None)
    if shipped is None:
        return kwargs
    _logger.warning(f'{variant}: there are no ImageNet weights yet, pretrained=True takes those of {shipped}')
    return {**kwargs, 'pretrained_cfg': shipped.partition('.')[2]}
