"""Shell verbs. Each is a module of this package with a function `main(argv)`, imported when it is called."""
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    import torch.nn as nn

VERBS = {
    'ablate': 'run or resume a table of ablations, or print it beside the paper',
    'bench': 'what inference of a deployed model costs beside its float host and other engines; or training',
    'demo': 'classify photographs with shipped weights, then train on real images, offline, in under three minutes',
    'estimate': 'hours and cost of a training from the time of one step',
    'eval': 'top-1 of a network as it is, packed and deployed, from a folder of images',
    'fit': 'train stage by stage: two-stage, progressive, with teachers; resumable',
    'plot': 'pictures: gammas, feature maps, estimators, training curves, accuracy against size and time',
    'push': 'write a Hub folder of packed weights, check it, and upload it',
    'run': "run one of timm's scripts with these models registered",
    'sweep': 'binarize many nets and print what came of it',
    'summary': 'bits, bytes and operations of a model, layer by layer',
}


def is_ours(name: str) -> bool:
    """This package registers a model of this name."""
    import timm
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith('timm_el.')


def create(name: str, recipe: Optional[str] = None, **kwargs) -> 'nn.Module':
    """A timm model; with a recipe, a registered model of this package takes it and any other is converted by it."""
    import timm

    from ..convert import binarize
    if recipe is None:
        return timm.create_model(name, **kwargs)
    if is_ours(name):
        return timm.create_model(name, recipe=recipe, **kwargs)
    return binarize(timm.create_model(name, **kwargs), recipe)
