"""Layers of a binarized network.

One mechanism serves every method: a `BinaryUnit` computes the paper's equation 4,

    unit(x) = post( branch(x) + link(x) )        branch = pre -> conv -> scale -> norm and act, in the recipe's order

where `conv` is usually a `BinaryConv2d`, which signs its input and its weight, and `link` an `ElasticLink`, which
carries the real-valued input around it. Binarization adds no other wrapper to a network.
"""
from .binary_conv import BinaryConv2d, StandardizedBinaryConv2d, same_pads
from .binary_linear import BinaryLinear
from .checks import check_own_tensors, check_tensors, check_unwrapped, guard_input
from .elastic_link import ElasticLink
from .quantized import real_weights
from .rprelu import RPReLU, RSign, Shift
from .scales import input_scale, weight_scale
from .sign_shares import input_sign_shares
from .unit import HOST_ATTRIBUTES, BinaryUnit, ZeroShortcut, expected_statistics

__all__ = [
    'weight_scale', 'input_scale', 'same_pads', 'guard_input', 'check_tensors', 'check_own_tensors',
    'check_unwrapped', 'expected_statistics', 'BinaryConv2d', 'StandardizedBinaryConv2d', 'BinaryLinear',
    'ElasticLink', 'BinaryUnit', 'Shift', 'RSign', 'RPReLU', 'ZeroShortcut', 'HOST_ATTRIBUTES', 'input_sign_shares',
    'real_weights',
]
