"""A deployed network stays what it was made as, in eval mode and float32, whatever is asked of a module around it."""
import functools

import torch
import torch.nn as nn

from . import native

__all__ = ['keep_for_inference']


def keep_for_inference(network: nn.Module) -> nn.Module:
    """Give each module of the network a `train`, an `_apply` and a loading of its own; return it, in eval mode.

    They stand in the instances, so that the modules keep their classes.
    """
    for path, module in network.named_modules():
        vars(module)['train'] = functools.partial(_stay_in_eval_mode, module)
        vars(module)['_apply'] = functools.partial(_stay_float32, path or 'model', module)
        vars(module)['_load_from_state_dict'] = functools.partial(_load, module)
    return network.eval()


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """`Module.train`: statistics of a batch, and dropout, would change what deployed constants were computed for."""
    return type(module).train(module, False)


def _load(module: nn.Module, *args) -> None:
    """`Module._load_from_state_dict`, after which what was laid out of tensors is laid out anew."""
    type(module)._load_from_state_dict(module, *args)
    native.touch()


def _stay_float32(name: str, module: nn.Module, fn, recurse: bool = True) -> nn.Module:
    """`Module._apply`, which moves tensors and converts them: constants are part of what makes the outputs exact.

    Bits stay bits, and float convolutions keep the dtype that they were deployed with.

    Raises:
        TypeError: `fn` gives another dtype; nothing was converted.
    """
    if fn(torch.empty(0, dtype=torch.float32, device='cpu')).dtype != torch.float32:
        raise TypeError(
            f'{name}: a deployed network cannot be converted to another dtype; '
            f'deploy the latent network again, with float_dtype where float convolutions shall have another one')
    native.touch()
    return type(module)._apply(module, lambda tensor: fn(tensor).to(tensor.dtype), recurse)
