"""A program as an ONNX graph: each kind of step as nodes, with convolutions of signs where the engine counts bits."""
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..layout import restore
from ..program import Program
from ..spec import ConvSpec, Window
from ..steps import Binary, Form, Kind, Pool, Size, Step, Unary, conv_spec, input_scale_spec, output_size

__all__ = ['OPSET', 'Graph', 'conv_name', 'cut_model', 'value_name', 'whole_model']

OPSET = 20
INPUT, BATCH = 'input', 'N'
Shape = tuple[int, ...]


class Graph:
    """Nodes and constants of an ONNX graph that grows from its inputs to its outputs.

    Values are (N, C, H, W) float32 and are known by their names.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, op: str, *inputs: str, name: str | None = None, outputs: int = 1, **attributes) -> Any:
        """Append a node; return the name of its output, or a list of them."""
        from onnx import helper
        stem = name or f'{op.lower()}_{len(self.nodes)}'
        names = [stem] if outputs == 1 else [f'{stem}_{i}' for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=stem, **attributes))
        return stem if outputs == 1 else names

    def constant(self, values: Any, dtype: type = np.float32) -> str:
        """Add a constant; return its name."""
        from onnx import numpy_helper
        values = values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        name = f'constant_{len(self.constants)}'
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values, dtype), name))
        return name

    def channels(self, values: torch.Tensor) -> str:
        """Add a constant of one number for each channel."""
        return self.constant(values.reshape(-1, 1, 1))

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape; the batch axis stays."""
        return self.node('Reshape', x, self.constant([0, *shape], np.int64))

    def model(self, inputs: Sequence[tuple[str, Shape]], outputs: Sequence[tuple[str, Shape]]) -> Any:
        """Return the graph as an ONNX model.

        Args:
            inputs, outputs: Name and shape of each, without the batch, which is left open.
        """
        from onnx import TensorProto, checker, helper, shape_inference
        graph = helper.make_graph(self.nodes, 'program', *(
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, *shape]) for name, shape in ends]
            for ends in (inputs, outputs)), self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid('', OPSET)], producer_name='timm_el', ir_version=9)
        checker.check_model(model)
        return shape_inference.infer_shapes(model)


def value_name(i: int) -> str:
    """Return the name of value i of a program."""
    return f'value_{i}'


def conv_name(i: int) -> str:
    """Return the name of the convolution of step i."""
    return f'step_{i}_conv'


def whole_model(program: Program, size: tuple[int, int]) -> Any:
    """Return a program as an ONNX model for images of one size, (height, width) in pixels."""
    graph, sizes = Graph(), _sizes(program, size)
    names = [INPUT]
    for i, step in enumerate(program.steps):
        names.append(_add(graph, i, step, names, sizes))
    outputs = []
    for i, out in enumerate(program.outputs):
        nodes, shape = _FORMS[out.form]
        name = graph.node('Identity', nodes(graph, names[out.value], sizes[out.value]), name=f'output_{i}')
        outputs.append((name, shape(*sizes[out.value][1:])))
    return graph.model([(INPUT, _image(*sizes[0][1:]))], outputs)


def cut_model(program: Program, size: tuple[int, int]) -> tuple[Any, list[int], list[int]]:
    """Return a program as an ONNX model of steps apart, each of which reads the program's own values.

    Returns:
        The model, the values that it takes, and those that it gives, in order; those of CONST steps are not among them.
    """
    graph, sizes = Graph(), _sizes(program, size)
    names, made = [value_name(0)], {}
    for i, step in enumerate(program.steps):
        name = _add(graph, i, step, names, sizes)
        names.append(name if step.kind == Kind.CONST else value_name(i + 1))
        if step.kind != Kind.CONST:
            made[i + 1] = graph.node('Identity', name, name=f'made_{i}')
    read = {v for step in program.steps for v in step.sources}
    taken = [v for v in (0, *made) if v in read]
    return graph.model(
        [(names[v], _image(*sizes[v][1:])) for v in taken], [(name, _image(*sizes[v][1:])) for v, name in made.items()],
    ), taken, list(made)


def _image(h: int, w: int, c: int) -> Shape:
    return c, h, w


def _sizes(program: Program, size: tuple[int, int]) -> list[Size]:
    return program.sizes([(1, *size, program.channels[0])])


def _add(graph: Graph, i: int, step: Step, names: Sequence[str], sizes: Sequence[Size]) -> str:
    """Append the nodes of step i; return the name of what it gives."""
    present = [(None, None) if v is None else (names[v], sizes[v]) for v in step.sources]
    if step.kind == Kind.CONV:
        return _conv(graph, step, present, conv_name(i))
    return _NODES[step.kind](graph, step, *present)


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions

Value = tuple[str, Size]


def _conv(g: Graph, step: Step, values: Sequence[tuple[str | None, Size | None]], name: str) -> str:
    (x, (n, h, w, c)), (link, link_size), (added, _) = values
    spec = conv_spec(step).at((n, c, h, w))
    geometry, out = _geometry(spec), spec.output_size(h, w)
    rows = {row: step.tensors[1][i, :spec.c_out] for i, row in enumerate(spec.rows)}
    if step.tensors[0].dtype == torch.int8:
        raise ValueError(
            f'{step.path}: found an int8 convolution, whose inputs have scales of their own, for which ONNX has no '
            f'operator; export the network that is deployed with float_dtype=torch.float32')
    weight = restore(step.tensors[0], spec, torch.float32)
    if step.is_binary_conv:
        weight = weight * rows['scale'].reshape(-1, 1, 1, 1)
    source = signs(g, step, x) if step.is_binary_conv else x
    if step.is_binary_conv and spec.pad_value:
        (top, left), (bottom, right) = spec.conv.padding, spec.pad_end
        source = _padded(g, source, (left, right, top, bottom), spec.pad_value)
        geometry['pads'] = (0, 0, 0, 0)
    y = g.node('Conv', source, g.constant(weight), name=name, **geometry)
    if spec.has_k:
        y = g.node('Mul', y, _input_scale(g, x, spec, 1, (h, w, c)))
    y = g.node('Add', y, g.channels(rows['shift']))
    lo, hi, inverse_gamma = step.constants
    if spec.act == 'clip':
        y = g.node('Clip', y, g.constant(lo), g.constant(hi))
    elif spec.act == 'prelu':
        y = g.node('PRelu', y, g.channels(rows['slope']))
    if spec.has_affine:
        y = _affine(g, y, rows['scale2'], rows['shift2'])
    if link is not None:
        branch = _link(g, spec, (link, link_size), out)
        y = g.node('Add', y, branch if inverse_gamma == 1 else g.node('Mul', branch, g.constant(inverse_gamma)))
    if spec.has_post:
        y = g.node('Add', y, g.channels(rows['post_in']))
        y = g.node('PRelu', y, g.channels(rows['post_slope']))
        y = g.node('Add', y, g.channels(rows['post_out']))
    return y if added is None else g.node('Add', y, added)


def signs(g: Graph, step: Step, x: str) -> str:
    """Append the signs of a binary convolution's input: +1 where x, or -x, is not below the threshold, else -1."""
    threshold, flip = step.tensors[2:4]
    if flip is not None:
        x = g.node('Mul', x, g.channels(torch.where(flip < 0, -1., 1.)))
    above = g.node('GreaterOrEqual', x, g.constant(0.) if threshold is None else g.channels(threshold))
    return g.node('Where', above, g.constant(1.), g.constant(-1.))


def _geometry(spec: ConvSpec) -> dict[str, Any]:
    return {
        'kernel_shape': spec.conv.kernel, 'strides': spec.conv.stride, 'dilations': spec.conv.dilation,
        'pads': (*spec.conv.padding, *spec.pad_end), 'group': spec.groups}


def _link(g: Graph, spec: ConvSpec, source: Value, size: Sequence[int]) -> str:
    x, _ = source
    if spec.link_pool != 'none':
        x = _pooled(g, source, spec.pool, spec.link_pool == 'max', size)
    if spec.link == 'squeeze':
        missing = -spec.link_c % spec.c_out
        if missing:
            x = g.node('Pad', x, g.constant([0] * 5 + [missing, 0, 0], np.int64))
        parts = (spec.link_c + missing) // spec.c_out
        return x if parts == 1 else g.node('Sum', *g.node('Split', x, axis=1, outputs=parts, num_outputs=parts))
    if spec.link == 'expand':
        if spec.c_out % spec.link_c:
            return _gathered(g, x, [i % spec.link_c for i in range(spec.c_out)])
        return g.node('Concat', *[x] * (spec.c_out // spec.link_c), axis=1)
    return x


def _input_scale(g: Graph, x: str, spec: ConvSpec, groups: int, size: tuple[int, int, int]) -> str:
    """Append K of each group (N, groups, H', W'): the mean of abs(x) over its channels and the taps of the window."""
    h, w, c = size
    if groups == 1:
        total = g.node('ReduceL1', x, g.constant([1], np.int64))
    else:
        total = g.node('ReduceL1', g.reshape(x, groups, c // groups, h, w), g.constant([2], np.int64), keepdims=0)
    box = np.full((groups, 1, *spec.conv.kernel), 1. / (c // groups * spec.taps))
    return g.node('Conv', total, g.constant(box), **_geometry(replace(spec, groups=groups)))


# ----------------------------------------------------------------------------------------------------------------------
# The other kinds


def _pool(g: Graph, step: Step, x: Value) -> str:
    return _pooled(g, x, Window.of(step.ints[:8]), step.ints[10] == Pool.MAX, output_size(step, [x[1]])[1:3])


def _pooled(g: Graph, x: Value, window: Window, is_max: bool, size: Sequence[int]) -> str:
    """Append a pool whose windows see the pixels inside the image only."""
    name, (_, *image, _) = x
    ends = [
        max(0, (n - 1) * s + (k - 1) * d + 1 - p - m)
        for n, s, k, d, p, m in zip(size, window.stride, window.kernel, window.dilation, window.padding, image)]
    return g.node(
        'MaxPool' if is_max else 'AveragePool', name, kernel_shape=window.kernel, strides=window.stride,
        dilations=window.dilation, pads=(*window.padding, *ends))


def _binary(g: Graph, step: Step, a: Value, b: Value) -> str:
    op, (x, (*_, c)), (y, (*_, n)) = Binary(step.ints[0]), a, b
    if n not in (1, c):
        y = _gathered(g, y, [k // (c // n) for k in range(c)])
    name, swapped = _BINARY[op]
    return g.node(name, y, x) if swapped else g.node(name, x, y)


_BINARY = {
    Binary.ADD: ('Add', False), Binary.SUB: ('Sub', False), Binary.MUL: ('Mul', False), Binary.DIV: ('Div', False),
    Binary.SUB_FROM: ('Sub', True), Binary.DIV_INTO: ('Div', True)}


def _unary(g: Graph, step: Step, x: Value) -> str:
    return _UNARY[Unary(step.ints[0])](g, x[0], *step.constants)


_UNARY: dict[Unary, Callable[..., str]] = {
    Unary.CLIP: lambda g, x, lo, hi: g.node('Clip', x, g.constant(lo), g.constant(hi)),
    Unary.LEAKY: lambda g, x, slope, _: g.node('LeakyRelu', x, alpha=slope),
    Unary.ABS: lambda g, x, *_: g.node('Abs', x),
    Unary.SIGMOID: lambda g, x, *_: g.node('Sigmoid', x),
    Unary.SILU: lambda g, x, *_: g.node('Mul', x, g.node('Sigmoid', x)),
    Unary.HARDSIGMOID: lambda g, x, *_: g.node('HardSigmoid', x, alpha=1. / 6., beta=0.5),
    Unary.HARDSWISH: lambda g, x, *_: g.node('HardSwish', x),
    Unary.GELU: lambda g, x, *_: g.node('Gelu', x),
    Unary.GELU_TANH: lambda g, x, *_: g.node('Gelu', x, approximate='tanh'),
    Unary.TANH: lambda g, x, *_: g.node('Tanh', x),
    Unary.ELU: lambda g, x, alpha, _: g.node('Elu', x, alpha=alpha),
    Unary.MISH: lambda g, x, *_: g.node('Mish', x),
    Unary.EXP: lambda g, x, *_: g.node('Exp', x),
    Unary.SQRT: lambda g, x, *_: g.node('Sqrt', x),
    Unary.SQUARE: lambda g, x, *_: g.node('Mul', x, x),
}


def _affine(g: Graph, x: str, scale: torch.Tensor | None, shift: torch.Tensor | None) -> str:
    x = x if scale is None else g.node('Mul', x, g.channels(scale))
    return x if shift is None else g.node('Add', x, g.channels(shift))


def _norm(g: Graph, step: Step, x: Value) -> str:
    (groups, over_pixels), (name, (_, h, w, c)) = step.ints, x
    axes = g.constant([2, 3, 4] if over_pixels else [2], np.int64)
    values = g.reshape(name, groups, c // groups, h, w)
    centred = g.node('Sub', values, g.node('ReduceMean', values, axes))
    variance = g.node('ReduceMean', g.node('Mul', centred, centred), axes)
    deviation = g.node('Sqrt', g.node('Add', variance, g.constant(step.constants[0])))
    return _affine(g, g.reshape(g.node('Div', centred, deviation), c, h, w), *step.tensors)


def _gathered(g: Graph, x: str, index: Sequence[int] | torch.Tensor) -> str:
    return g.node('Gather', x, g.constant(index, np.int64), axis=1)


def _padded(g: Graph, x: str, pads: Sequence[int], value: float) -> str:
    left, right, top, bottom = pads
    return g.node('Pad', x, g.constant([0, 0, top, left, 0, 0, bottom, right], np.int64), g.constant(value))


def _input_scale_step(g: Graph, step: Step, x: Value) -> str:
    name, (n, h, w, c) = x
    return _input_scale(g, name, input_scale_spec(step, c).at((n, c, h, w)), step.ints[10], (h, w, c))


_NODES: dict[Kind, Callable[..., str]] = {
    Kind.POOL: _pool,
    Kind.MEAN: lambda g, step, x: g.node('GlobalAveragePool', x[0]),
    Kind.BINARY: _binary,
    Kind.UNARY: _unary,
    Kind.AFFINE: lambda g, step, x: _affine(g, x[0], *step.tensors),
    Kind.PRELU: lambda g, step, x: g.node('PRelu', x[0], g.channels(step.tensors[0])),
    Kind.NORM: _norm,
    Kind.CONCAT: lambda g, step, *parts: g.node('Concat', *(name for name, _ in parts), axis=1),
    Kind.CHANNELS: lambda g, step, x: _gathered(g, x[0], step.tensors[0]),
    Kind.CONST: lambda g, step: g.constant(step.tensors[0].reshape(step.ints).permute(0, 3, 1, 2)),
    Kind.INPUT_SCALE: _input_scale_step,
    Kind.FLATTEN: lambda g, step, x: g.reshape(x[0], -1, 1, 1),
    Kind.PAD: lambda g, step, x: _padded(g, x[0], step.ints, step.constants[0]),
}
# Of an output: nodes, and shape without the batch.
_FORMS: dict[Form, tuple[Callable[[Graph, str, Size], str], Callable[[int, int, int], Shape]]] = {
    Form.IMAGE: (lambda g, x, size: x, _image),
    Form.ROWS: (lambda g, x, size: g.reshape(x, -1), lambda h, w, c: (c,)),
    Form.NHWC: (lambda g, x, size: g.node('Transpose', x, perm=(0, 2, 3, 1)), lambda h, w, c: (h, w, c)),
    Form.TOKENS: (
        lambda g, x, size: g.reshape(g.node('Transpose', x, perm=(0, 2, 3, 1)), -1, size[3]),
        lambda h, w, c: (h * w, c)),
}
