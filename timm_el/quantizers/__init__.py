"""Quantizers: Sign, its gradient estimators, and the few others of the literature; pure tensor functions.

A quantizer of activations maps a float tensor to one of the same shape and dtype that holds exactly -1 and +1 (or -1,
0, +1), and carries a surrogate gradient. Each exists twice, equal in forward and gradient by test:

* the *definition*, plain tensor arithmetic, which TorchScript and torch.fx can read;
* the *lean form* (`Estimator`), for a `torch.autograd.Function` that keeps as little as it can for backward, used
  everywhere else.

`REGISTRY` has one `Quantizer` for each name that a layer or a recipe takes.
"""
from .estimators import (
    QUANTIZERS,
    REGISTRY,
    WEIGHT_QUANTIZERS,
    Estimator,
    Quantizer,
    approx_sign,
    approx_sign_definition,
    get_quantizer,
    is_symbolic,
    lean,
    real,
    ste_sign,
    ste_sign_definition,
    tanh,
    ternary_sign,
    ternary_sign_definition,
)
from .signs import sign, ternary
from .weights import abc_input, abc_offsets, abc_weight, abc_weight_bases, ttq, ttq_levels, twn, wide_float

__all__ = [
    'sign', 'ste_sign', 'approx_sign', 'ternary', 'ternary_sign', 'tanh', 'real', 'twn', 'ttq', 'ttq_levels',
    'abc_offsets', 'abc_weight_bases', 'abc_weight', 'abc_input', 'QUANTIZERS', 'WEIGHT_QUANTIZERS', 'REGISTRY',
    'Estimator', 'Quantizer', 'get_quantizer', 'ste_sign_definition', 'approx_sign_definition',
    'ternary_sign_definition', 'is_symbolic', 'lean', 'wide_float',
]
