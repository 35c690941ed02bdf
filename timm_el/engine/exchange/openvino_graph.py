"""A program as an OpenVINO model: its ONNX graph with BinaryConvolution wherever OpenVINO computes that right.

What was learnt of OpenVINO 2026.4's BinaryConvolution, by comparing it with float convolutions:

* it is exact for input channels that are multiples of 8 and silently wrong for others; there are no groups;
* the number of images must be fixed;
* weights are packed with the first bit lowest;
* FakeQuantize writes bits only if its outputs are 0 and 1. With -1 and +1 it writes floats, which a slow reorder packs;
* FakeQuantize of its threshold is its lower output. With a threshold just below zero the sign of zero is +1, as
  everywhere here;
* a FakeQuantize fused into a convolution behind a fused addition gives wrong bits. It is not fused where both its
  thresholds are one constant.
"""
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..layout import restore
from ..program import Program
from ..steps import Step, conv_spec
from .onnx_graph import conv_name

__all__ = ['is_supported', 'openvino_model']

TINY = np.finfo(np.float32).tiny  # what is nearer to zero is zero in OpenVINO


def is_supported(step: Step) -> bool:
    """Return whether OpenVINO's BinaryConvolution computes a step, and exactly."""
    spec = conv_spec(step) if step.is_binary_conv else None
    return spec is not None and spec.groups == 1 and spec.c_in % 8 == 0 and spec.pad_value == 0


def openvino_model(program: Program, onnx: Any, batch: int = 1) -> tuple[Any, int, int]:
    """Return a program's OpenVINO model, and how many of how many binary convolutions have its op.

    Args:
        program: The program.
        onnx: Its ONNX model, whole or cut.
        batch: Images that it takes at once.
    """
    import openvino as ov
    model = ov.Core().read_model(onnx.SerializeToString())
    ops = {op.get_friendly_name(): op for op in model.get_ordered_ops() if op.get_type_name().endswith('Convolution')}
    binary = [i for i, step in enumerate(program.steps) if step.is_binary_conv]
    supported = [i for i in binary if is_supported(program.steps[i])]
    for i in supported:
        op = ops[conv_name(i)]
        _replace(op, _binary_convolution(program.steps[i], op))
    model.validate_nodes_and_infer_types()
    model.reshape({value: [batch, *list(value.get_partial_shape())[1:]] for value in model.inputs})
    return model, len(supported), len(binary)


def _binary_convolution(step: Step, op: Any) -> Any:
    """Return FakeQuantize, BinaryConvolution, and the size of each channel's weight as a factor."""
    import openvino as ov
    import torch
    from openvino import opset1
    x = op.input_value(0).get_node().input_value(0).get_node().input_value(0)  # of Select of GreaterEqual
    if step.tensors[3] is not None:
        x = x.get_node().input_value(0)  # of the multiplication by flip
    spec = conv_spec(step)
    scale = step.tensors[1][0, :spec.c_out].numpy()
    positive = (restore(step.tensors[0], spec, torch.float32).numpy() > 0) ^ (scale < 0).reshape(-1, 1, 1, 1)
    bits = ov.Tensor(ov.Type.u1, ov.Shape(positive.shape))
    bits.data[:] = np.packbits(positive.reshape(-1), bitorder='little')
    threshold, low, high = (opset1.constant(values.reshape(1, -1, 1, 1)) for values in _quantization(step))
    geometry = op.get_attributes()
    y = opset1.binary_convolution(
        opset1.fake_quantize(x, threshold, threshold, low, high, 2), ov.op.Constant(bits), geometry['strides'],
        geometry['pads_begin'], geometry['pads_end'], geometry['dilations'], 'xnor-popcount', 0.)
    return opset1.multiply(y, np.abs(scale).reshape(1, -1, 1, 1))


def _quantization(step: Step) -> Sequence[np.ndarray]:
    """Return a threshold for each channel, and what bit is up to it and above it, as floats 0 and 1."""
    threshold, flip = step.tensors[2:4]
    t = np.zeros(1, np.float32) if threshold is None else threshold.numpy()
    below = np.nextafter(t, np.float32(-np.inf))
    below = np.where(np.abs(t) < TINY, -TINY, below)
    if flip is None:
        return below, np.zeros(1, np.float32), np.ones(1, np.float32)
    flipped = flip.numpy() < 0  # -x >= t where x <= -t
    low = flipped.astype(np.float32)
    return np.where(flipped, -t, below).astype(np.float32), low, 1 - low


def _replace(op: Any, new: Any) -> None:
    for user in op.output(0).get_target_inputs():
        user.replace_source_output(new.output(0))
