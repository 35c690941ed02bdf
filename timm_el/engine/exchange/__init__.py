"""write_onnx() and write_openvino(): a binarized network for other engines, compared with the network itself."""
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from ..export import metadata_of, program_of
from ..program import Output, Program
from .onnx_graph import cut_model, whole_model
from .openvino_graph import openvino_model

__all__ = ['compiled', 'write_onnx', 'write_openvino']

IMAGES = 32  # random ones that a file is tried on
STEP_TOLERANCE = 1e-4  # of the largest number that a step gives
LOGIT_TOLERANCE = 0.05  # of an image's numbers, median over images
SAME_CLASS = 0.75  # share of the images
Run = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


def write_onnx(model: nn.Module, path: str | os.PathLike, size: tuple[int, int] | None = None) -> str:
    """Write a network as an ONNX file for any number of images of one size; return what was written, as a line.

    Signs are -1 and +1 in float32, and binary convolutions are float ones of them: the file computes what the network
    does, and is neither small nor fast. Labels and preprocessing are in its metadata.

    Args:
        model: A deployed network, or a latent one in eval mode.
        path: The file; it is replaced whole or not at all.
        size: (height, width) of the images, pixels; that of its own configuration if None.

    Raises:
        ValueError: As for `export`; or the file computes something else than the network.
        RuntimeError: onnx or onnxruntime is not installed, or the native library is not there.
    """
    _need('onnx', 'onnx', 'onnxruntime')
    import onnx
    program, metadata, size = _exported(model, size)
    made = whole_model(program, size)
    onnx.helper.set_model_props(made, {name: json.dumps(value) for name, value in metadata.items()})
    _check_steps('onnx', program, size, lambda cut: _session(cut.SerializeToString()))
    data = made.SerializeToString()
    same = _check_whole('onnx', model, program, size, _session(data))
    path = Path(path)
    part = path.with_name(f'{path.name}.part')
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return f'{len(data):,} bytes, {len(made.graph.node)} nodes, {same}'


def write_openvino(model: nn.Module, path: str | os.PathLike, size: tuple[int, int] | None = None) -> str:
    """Write a network as an OpenVINO model for single images of one size; return what was written, as a line.

    Binary convolutions use OpenVINO's BinaryConvolution where that computes them right, and are float convolutions of
    signs elsewhere, which the line says.

    Args:
        model: A deployed network, or a latent one in eval mode.
        path: NAME.xml; NAME.bin is written beside it.
        size: (height, width) of the images, pixels; that of its own configuration if None.

    Raises:
        ValueError: As for `export`; or the file computes something else than the network.
        RuntimeError: onnx or openvino is not installed, or the native library is not there.
    """
    _need('openvino', 'onnx', 'openvino')
    import openvino as ov
    path = Path(path)
    if path.suffix != '.xml':
        raise ValueError(f'{path}: found the ending {path.suffix!r}, expected .xml')
    program, metadata, size = _exported(model, size)
    made, bits, binary = openvino_model(program, whole_model(program, size))
    for name, value in metadata.items():
        made.set_rt_info(json.dumps(value), ['timm_el', name])
    _check_steps('openvino', program, size, lambda cut: compiled(openvino_model(program, cut)[0]))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'{path.name}.') as folder:
        parts = Path(folder, path.name), Path(folder, path.name).with_suffix('.bin')
        ov.save_model(made, parts[0], compress_to_fp16=False)
        same = _check_whole('openvino', model, program, size, compiled(ov.Core().read_model(parts[0])))
        written = sum(part.stat().st_size for part in parts)
        for part in reversed(parts):
            part.replace(path.with_name(part.name))
    rest = f', {binary - bits} are float convolutions of signs, because OpenVINO has no op for them' * (bits < binary)
    return f'{written:,} bytes with {path.stem}.bin, {bits} of {binary} binary convolutions count bits{rest}, {same}'


def compiled(model: Any, threads: int = 1) -> Run:
    """Return a function that runs an OpenVINO model in float32."""
    import openvino as ov
    request = ov.Core().compile_model(model, 'CPU', {
        'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': threads,
    }).create_infer_request()
    return lambda inputs: list(request.infer(dict(enumerate(inputs))).values())


def _session(data: bytes) -> Run:
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(data, options, providers=['CPUExecutionProvider'])
    names = [value.name for value in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs)))


def _need(extra: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f'--to {extra}: found no {" and no ".join(missing)}; run `pip install "timm-el[{extra}]"`')


def _exported(model: nn.Module, size: tuple[int, int] | None) -> tuple[Program, dict[str, Any], tuple[int, int]]:
    runner = program_of(model, size)
    metadata = metadata_of(model, runner, size)
    return runner.program, metadata, tuple(metadata['preprocess']['size'])


# ----------------------------------------------------------------------------------------------------------------------
# What a file computes


def _images(program: Program, size: tuple[int, int], n: int) -> torch.Tensor:
    generator = torch.Generator('cpu').manual_seed(0)
    return torch.randn((n, program.channels[0], *size), generator=generator, dtype=torch.float32, device='cpu')


def _check_steps(to: str, program: Program, size: tuple[int, int], build: Callable[[Any], Run]) -> None:
    """Raise ValueError unless each step, fed with the program's own values, gives what the program's step gives.

    A sign that flips for its rounding changes all later layers, so that only this sees small faults.
    """
    model, taken, given = cut_model(program, size)
    every = Program(program.steps, [Output(i) for i in range(len(program.steps) + 1)], program.channels, program.size)
    values = [value.contiguous().numpy() for value in every.run([_images(program, size, 1)])]
    for i, found in zip(given, build(model)([values[v] for v in taken])):
        expected, step = values[i], program.steps[i - 1]
        sources = [np.abs(values[v][np.isfinite(values[v])]).max(initial=0.) for v in step.sources if v is not None]
        finite = np.isfinite(expected)
        largest = max(np.abs(expected[finite]).max(initial=0.), 1e-3 * max(sources, default=0.))
        off = np.abs(found[finite] - expected[finite]).max(initial=0.) if found.shape == expected.shape else np.inf
        if not off <= STEP_TOLERANCE * largest:
            raise ValueError(
                f'{to}: step {i - 1} ({step.kind.name}, {step.path or "no module"}) is off by {off:.3g} of '
                f'{largest:.3g}, expected at most {STEP_TOLERANCE:g} of it; this version of the other engine computes '
                f'it differently')


def _check_whole(to: str, model: nn.Module, program: Program, size: tuple[int, int], run: Run) -> str:
    """Return, as text, in how many random images the largest number is the network's own.

    Raises:
        ValueError: In too few, or the numbers are too different.
    """
    same, offs = 0, []
    for x in _images(program, size, IMAGES).split(1):
        with torch.no_grad():
            expected = np.concatenate([y.flatten().numpy() for y in tree_leaves(model(x))])
        found = np.concatenate([y.flatten() for y in run([x.numpy()])])
        same += expected.argmax() == found.argmax()
        offs.append(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))
    off = float(np.median(offs))
    if not (off <= LOGIT_TOLERANCE and same >= SAME_CLASS * IMAGES):
        raise ValueError(
            f'{to}: {same} of {IMAGES} random images get the class that the network gives them, and their numbers are '
            f'off by {off:.2%}, expected at least {SAME_CLASS:.0%} and at most {LOGIT_TOLERANCE:.0%}')
    return f'top-1 as the network in {same} of {IMAGES} random images, numbers off by {off:.2%}'
