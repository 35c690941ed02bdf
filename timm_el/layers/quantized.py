"""Quantizers and scales of `BinaryConv2d` and `BinaryLinear`."""
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
import torch.fx
import torch.nn as nn

from ..quantizers import REGISTRY, WEIGHT_QUANTIZERS, get_quantizer
from .scales import weight_scale


class _Quantized(nn.Module):
    """Common base of `BinaryConv2d` and `BinaryLinear`: two quantizers and two scales."""
    __jit_unused_properties__ = ['is_binary', 'weight_bits', 'binary_products']
    weight: torch.Tensor
    bias: torch.Tensor | None

    def _set_quantization(
            self, input_quantizer: str | None, weight_quantizer: str | None, scale_weight: bool, scale_input: bool,
            input_scale_grad: bool, weight_scale_grad: bool) -> None:
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight_quantizer
        self.quantize_input = get_quantizer(input_quantizer, 'input_quantizer')
        self.quantize_weight = get_quantizer(weight_quantizer, 'weight_quantizer', WEIGHT_QUANTIZERS)
        # Ternary weights bring their own scale.
        self.scale_weight = scale_weight and weight_quantizer in ('ste', 'approx')
        self.scale_input = scale_input and input_quantizer is not None
        self.input_scale_grad = input_scale_grad
        self.weight_scale_grad = weight_scale_grad
        self.scale_shape = [-1] + [1] * (self.weight.dim() - 1)
        self.has_lean_form = REGISTRY[weight_quantizer].lean is not None

    @property
    def is_binary(self) -> bool:
        """True if weight and input are both signs, so that the layer can run as one xor and popcount."""
        return self.binary_products == 1

    @property
    def weight_bits(self) -> int:
        """Bits of a weight: 1 for signs, 2 for ternary weights, 0 if it is real."""
        return REGISTRY[self.weight_quantizer].bits

    @property
    def binary_products(self) -> int:
        """Products of +-1 and +-1 in one multiply-accumulate: the bits of the input times those of the weight."""
        return REGISTRY[self.input_quantizer].bits * self.weight_bits

    def latent_weight(self) -> torch.Tensor:
        """Return the real weight that is quantized."""
        return self.weight

    def alpha(self) -> torch.Tensor:
        """Return the scale of the binary weight, (O,)."""
        return weight_scale(self.weight, self.weight_scale_grad)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input in use: Sign(x), or the real input where there is no quantizer."""
        return self.quantize_input(x)

    def quantized_weight(self) -> torch.Tensor:
        """Return the weight in use: alpha * Sign(W), or the real weight where there is no quantizer."""
        weight = self.quantize_weight(self.latent_weight())
        if self.scale_weight:
            weight = weight * self.alpha().reshape(self.scale_shape)
        return weight

    def quantized_form_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight in use if `weight`, in the shape of the layer's, were the latent one."""
        twin = copy.copy(self)
        twin.__dict__['_parameters'] = {**self._parameters, 'weight': nn.Parameter(weight, requires_grad=False)}
        return twin.quantized_weight()

    def derived_state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the other tensors of the layer, by name, that start from the latent weight."""
        return {}

    def _share_parameters(self, source: nn.Module):
        self.weight, self.bias = source.weight, source.bias
        return self.train(source.training)

    def extra_repr(self) -> str:
        scales = [name for name, on in (('alpha', self.scale_weight), ('K', self.scale_input)) if on]
        return (
            f'{super().extra_repr()}, input={self.input_quantizer}, weight={self.weight_quantizer}, '
            f'scales={"+".join(scales) or None}')


@contextmanager
def _weights_in_use(model: nn.Module, weight_of: Callable[[_Quantized], torch.Tensor]) -> Iterator[None]:
    """Let the binary layers of a model compute with other weights than the quantized ones, and undo that afterwards."""
    layers = [(module, module.has_lean_form) for module in model.modules() if isinstance(module, _Quantized)]
    try:
        for layer, _ in layers:
            # The lean form quantizes by itself.
            layer.quantized_weight, layer.has_lean_form = partial(weight_of, layer), False
        yield
    finally:
        for layer, lean in layers:
            layer.has_lean_form = lean
            vars(layer).pop('quantized_weight', None)


def real_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Let the binary layers of a model compute with their latent weights; inputs are signed as ever.

        with real_weights(model):
            model(images)

    Args:
        model: The model; it is as before afterwards.
    """
    return _weights_in_use(model, lambda layer: layer.latent_weight())


def constant_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Let the binary layers of a model compute with their quantized weights as constants, which an exporter keeps.

    Args:
        model: The model; it is as before afterwards.
    """
    constants = {layer: layer.quantized_weight().detach() for layer in model.modules() if isinstance(layer, _Quantized)}
    return _weights_in_use(model, constants.__getitem__)
