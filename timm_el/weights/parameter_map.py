"""Parameter map: from the tensors of a binarized model to the tensors of its float host.

`binarize` keeps the host's tensors and makes new modules around them, so that the map is read off the tensors
themselves, before and after: no key is renamed by its text.
"""
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn

from ..layers import BinaryConv2d, expected_statistics

State = dict[str, torch.Tensor]


def tensors_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the keys of each parameter and buffer of a model, by the tensor's id."""
    keys: dict[int, list[str]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for key, tensor in named(remove_duplicate=False):
            keys.setdefault(id(tensor), []).append(key)
    return keys


@dataclass(frozen=True)
class RenewedNorm:
    """A norm whose activation moved in front of it: the host's running statistics describe another tensor.

    Args:
        norm, act, conv: Paths in the binarized model.
    """
    norm: str
    act: str
    conv: str


@dataclass(frozen=True)
class ParameterMap:
    """Map from the tensors of a binarized model to those of its float host.

    Args:
        sources: Key in the binarized model to key in its float host; keys of new tensors are absent.
        gone: Keys of the host that have no place in the binarized model.
        renewed: Norms that start anew.
    """
    sources: dict[str, str]
    gone: frozenset[str]
    renewed: tuple[RenewedNorm, ...] = ()

    @classmethod
    def between(
            cls, before: dict[int, list[str]], model: nn.Module, renewed: tuple[RenewedNorm, ...]) -> 'ParameterMap':
        """Return the map of a conversion.

        Args:
            before: `tensors_of` the float host.
            model: The same model, converted.
            renewed: Norms that start anew.
        """
        sources = {
            key: key if key in before[tensor] else before[tensor][0]
            for tensor, keys in tensors_of(model).items() if tensor in before for key in keys}
        taken = set(sources.values())
        gone = frozenset(key for keys in before.values() for key in keys if not taken & set(keys))
        return cls(sources, gone, renewed)

    def host_only(self, state_dict: State, own: State) -> str | None:
        """Return a key of a state dict of the float host that the model has not, or None if it is none of the host's.

        It is the host's if none of the tensors that moved is where it moved to.
        """
        moved = {new: old for new, old in self.sources.items() if old != new}
        if any(new in state_dict for new in moved):
            return None
        return next((old for old in moved.values() if old in state_dict and old not in own), None)

    def new_key(self, old: str) -> str | None:
        """Return the key in the binarized model of a tensor of its host, None if it has no place there."""
        return next((new for new, source in self.sources.items() if source == old), None)

    def to_latent(self, state_dict: State, model: nn.Module) -> State:
        """Return a state dict of the host under the keys of the binarized model.

        New tensors get the model's own values, but those that follow from the weights.

        Args:
            state_dict: Of the float host; keys that it has not pass through.
            model: The binarized model.
        """
        own = model.state_dict()
        host = _with_pooled_shortcuts(state_dict, {*self.sources.values(), *self.gone})
        latent = OrderedDict((new, host[old]) for new, old in self.sources.items() if old in host and new in own)
        known = {*self.sources.values(), *self.gone}
        latent.update((key, tensor) for key, tensor in host.items() if key not in known)
        latent.update((key, own[key]) for key in own if key not in self.sources)
        for path, module in model.named_modules():
            if isinstance(module, BinaryConv2d) and f'{path}.weight' in latent:
                derived = module.derived_state(latent[f'{path}.weight'])
                latent.update((f'{path}.{key}', value) for key, value in derived.items())
        for place in self.renewed:
            if f'{place.norm}.running_mean' in own and f'{place.conv}.weight' in latent:  # else it is named as missing
                weight = latent[f'{place.conv}.weight']
                conv = model.get_submodule(place.conv)
                used = conv.quantized_form_of(weight) if isinstance(conv, BinaryConv2d) else weight
                mean, var = expected_statistics(used, model.get_submodule(place.act))
                latent[f'{place.norm}.running_mean'], latent[f'{place.norm}.running_var'] = mean, var
        return latent


def _with_pooled_shortcuts(state_dict: State, known: set[str]) -> State:
    """Return a checkpoint whose shortcuts without average pooling are named as ones with it.

    A plain shortcut has its convolution at 0 and its norm at 1, one with average pooling at 1 and 2.
    """
    plain = [key[:-len('0.weight')] for key in state_dict
             if key.endswith('.0.weight') and key not in known and f'{key[:-len("0.weight")]}1.weight' in known]
    renamed = OrderedDict()
    for key, tensor in state_dict.items():
        prefix = next((p for p in plain if key.startswith((f'{p}0.', f'{p}1.'))), None)
        if prefix is not None:
            index, _, rest = key[len(prefix):].partition('.')
            key = f'{prefix}{int(index) + 1}.{rest}'
        renamed[key] = tensor
    return renamed
