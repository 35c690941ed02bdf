"""Conversion of a binarized net to OpenVINO, with its BinaryConvolution.

A twin of the latent net is exported, in which the binary convolutions that OpenVINO can run take `torch.sign` of their
input. Nothing else in our nets is a Sign that feeds a Convolution, so these are found again in the OpenVINO graph and
replaced; everything else stays as OpenVINO's own converter makes it, so that its own fusions apply.

Facts about the BinaryConvolution of OpenVINO 2026.4, found by comparing it with float convolutions:

* it is exact for input channels that are multiples of 8 and silently wrong for others;
* weights are packed with the first bit lowest;
* FakeQuantize writes bits only if its outputs are 0 and 1. With -1 and +1 it writes floats, which a slow reorder packs;
* FakeQuantize(0) is its lower output. With a threshold just below zero the sign of zero is +1, as everywhere here;
* a FakeQuantize fused into a convolution behind a fused addition gives wrong bits. It is not fused where both its
  thresholds are one constant.
"""
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import torch
import torch.nn as nn
from openvino import opset1, opset4

from ..layers import BinaryConv2d
from ..layers.quantized import constant_weights

THRESHOLD = np.full((1, 1, 1, 1), -np.finfo(np.float32).tiny, np.float32)


def is_supported(conv: BinaryConv2d) -> bool:
    """Return whether OpenVINO's op computes this convolution, and exactly."""
    return conv.is_binary and conv.groups == 1 and conv.in_channels % 8 == 0 and not conv.pad_first


def binary_model(latent: nn.Module, x: torch.Tensor) -> tuple[ov.Model, str]:
    """Return the OpenVINO model of a binarized net for images of one size.

    Args:
        latent: The net, in eval mode; it is not changed.
        x: Images (N, C, H, W).

    Returns:
        The model, and a note on the binary convolutions that stay float convolutions of signs ('' if there are none).

    Raises:
        RuntimeError: The converted graph has another number of binary convolutions than the net.
    """
    twin = copy.deepcopy(latent)
    convs = [m for m in twin.modules() if isinstance(m, BinaryConv2d) and m.is_binary]
    supported = [conv for conv in convs if is_supported(conv)]
    for conv in supported:
        conv.quantize_input = torch.sign
    with torch.no_grad(), constant_weights(twin):
        exported = torch.export.export(twin, (x,))
    model = ov.convert_model(exported)
    model.reshape(list(x.shape))
    found = rewrite(model)
    if found.get('Convolution', 0) != len(supported):
        raise RuntimeError(
            f'openvino: {found.get("Convolution", 0)} binary convolutions found in the converted graph, '
            f'expected {len(supported)}')
    rest = len(convs) - len(supported)
    return model, f'{rest} of {len(convs)} binary convs float, OpenVINO has no op for them' if rest else ''


def rewrite(model: ov.Model) -> dict[str, int]:
    """Replace each op that `REWRITES` knows, and return the number of replaced ops by type."""
    counts: dict[str, int] = {}
    for op in model.get_ordered_ops():
        name = op.get_type_name()
        new = REWRITES[name](op) if name in REWRITES else None
        if new is not None:
            counts[name] = counts.get(name, 0) + 1
            for user in op.output(0).get_target_inputs():
                user.replace_source_output(new.output(0))
    model.validate_nodes_and_infer_types()
    return counts


def binary_convolution(op: ov.Node) -> ov.Node | None:
    """Return FakeQuantize, BinaryConvolution and a factor per channel for the convolution of a Sign, None for another.

    The factor is the absolute weight: the converter may have folded alpha and the scale of a norm into it.

    Raises:
        RuntimeError: The weight is no constant, or not of one absolute value in each channel.
    """
    source, weight = (op.input_value(i).get_node() for i in (0, 1))
    if source.get_type_name() != 'Sign':
        return None
    if weight.get_type_name() != 'Constant':
        raise RuntimeError(f'openvino: found a weight computed by {weight.get_type_name()}, expected a constant')
    values = weight.get_data()
    size = np.abs(values).max((1, 2, 3), keepdims=True)
    if not np.array_equal(np.abs(values), np.broadcast_to(size, values.shape)):
        raise RuntimeError('openvino: found a weight of several sizes in one channel, expected alpha times signs')
    bits = ov.Tensor(ov.Type.u1, ov.Shape(values.shape))
    bits.data[:] = np.packbits(values.reshape(-1) > 0, bitorder='little')
    threshold = opset1.constant(THRESHOLD)
    signs = opset1.fake_quantize(
        source.input_value(0), threshold, threshold, np.zeros_like(THRESHOLD), np.ones_like(THRESHOLD), 2)
    geometry = op.get_attributes()
    y = opset1.binary_convolution(
        signs, ov.op.Constant(bits), geometry['strides'], geometry['pads_begin'], geometry['pads_end'],
        geometry['dilations'], 'xnor-popcount', 0.)
    return opset1.multiply(y, size.reshape(1, -1, 1, 1))


def mean_of_abs(op: ov.Node) -> ov.Node | None:
    """Return ReduceL1 for a ReduceMean of Abs over all channels (K), None for another: it writes no tensor between."""
    source = op.input_value(0).get_node()
    if source.get_type_name() == 'Reshape':  # (N, C, H, W) -> (N, 1, C, H, W)
        source = source.input_value(0).get_node()
    if source.get_type_name() != 'Abs':
        return None
    n, channels, *size = source.get_output_shape(0)
    if list(op.get_output_shape(0)) != [n, 1, *size]:
        return None
    total = opset4.reduce_l1(source.input_value(0), np.array([1]), True)
    return opset1.multiply(total, np.float32(1 / channels))


def max_pool(op: ov.Node) -> ov.Node | None:
    """Return a MaxPool without indices, which nobody reads, for one with them; None where the sizes would differ."""
    attributes = op.get_attributes()
    if any(n != 1 for n in attributes.get('dilations', ())):
        return None
    rounding = 'floor' if attributes['rounding_type'] == 'floor' else 'ceil'
    new = opset1.max_pool(
        op.input_value(0), attributes['strides'], attributes['pads_begin'], attributes['pads_end'],
        attributes['kernel'], rounding)
    return new if new.get_output_shape(0) == op.get_output_shape(0) else None


REWRITES: dict[str, Callable[[Any], ov.Node | None]] = {
    'Convolution': binary_convolution, 'ReduceMean': mean_of_abs, 'MaxPool': max_pool,
}
