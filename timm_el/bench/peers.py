"""Peers: the engines of others, each at its best, beside which a deployed model is measured.

They are an extra, `pip install "timm-el[bench]"`; nothing else in this package needs them. Every peer gets the images,
the batch and the number of threads of the deployed model.
"""
import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn

from ..engine.exchange.onnx_graph import whole_model
from ..engine.exchange.openvino_graph import openvino_model
from ..engine.export import program_of
from .hosts import runner
from .processor_classes import ProcessorClass

INSTALL = 'pip install "timm-el[bench]"'
CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Setting:
    """Common setting of all peers in one benchmark.

    Args:
        host: The float net, in eval mode.
        latent: The binarized net, in eval mode.
        x: Images (N, C, H, W), contiguous.
        threads: Threads that one inference may use.
        folder: Place of exported files, each of which is written once.
        emulated: The lower class of processors that this one emulates; None: it runs as it is.
    """
    host: nn.Module
    latent: nn.Module
    x: torch.Tensor
    threads: int
    folder: Path
    emulated: ProcessorClass | None = None


class Built(NamedTuple):
    """A peer that is ready to run.

    Args:
        run: One inference of the setting's images; returns the logits.
        kernels: Kernels or instruction sets that it uses.
        note: Changes that were made to the net.
    """
    run: Callable[[], Any]
    kernels: str
    note: str = ''


@dataclass(frozen=True)
class Peer:
    """One engine in one precision.

    Args:
        packages: Names of packages that it imports.
        build: Function that makes it ready to run.
        binary: It runs the binarized net, not its float host.
        can_be_capped: The caps of a lower class of processors hold it.
    """
    packages: tuple[str, ...]
    build: Callable[[Setting], Built]
    binary: bool = False
    can_be_capped: bool = True

    def missing(self) -> list[str]:
        """Return the names of packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def torch_kernels(form: str) -> str:
    """Return which kernels torch uses for a net in some form: its own instruction set, and oneDNN where it has that."""
    onednn = ', oneDNN' if torch.backends.mkldnn.is_available() else ''
    return f'{form}: ATen {torch.backends.cpu.get_cpu_capability()}{onednn}'


def torch_peer(
        form: str, make: Callable[[nn.Module, torch.Tensor], Callable[..., torch.Tensor]],
) -> Callable[[Setting], Built]:
    """Return a builder of the float host in another form that torch has for a net, `make`, and the form's name."""
    def build(setting: Setting) -> Built:
        with torch.inference_mode():
            run = runner(make(copy.deepcopy(setting.host), setting.x), setting.x)
        for _ in range(3):  # the first ones compile
            run()
        return Built(run, torch_kernels(form))

    return build


def compiled(net: nn.Module, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return a net compiled by torch.compile with constant weights; no cache, which may hold code for other caps."""
    return torch.compile(net, options={'freezing': True, 'fx_graph_cache': False})


def frozen(net: nn.Module, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return a net traced on images (N, C, H, W): norms folded, activations fused, weights in the layouts of oneDNN."""
    return torch.jit.optimize_for_inference(torch.jit.trace(net, x))


def export_float(setting: Setting) -> Path:
    """Write the float host as ONNX, batch norms folded, and return the path."""
    path = setting.folder / 'host.onnx'
    if not path.exists():
        torch.onnx.export(
            setting.host, (setting.x,), path, input_names=['x'], output_names=['y'], dynamo=True, verbose=False,
            external_data=False)
    return path


def export_int8(setting: Setting) -> Path:
    """Write the float host in 8 bits and return the path: static QDQ, weights int8 per channel, activations uint8.

    Signed activations are 2.5 times slower in onnxruntime (no VNNI path), and keep OpenVINO from its AMX kernels.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            generator = torch.Generator().manual_seed(0)
            self.batches = iter([
                {'x': torch.randn(setting.x.shape, generator=generator).numpy()} for _ in range(CALIBRATION_BATCHES)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    path = setting.folder / 'host_int8.onnx'
    if not path.exists():
        quantize_static(
            export_float(setting), path, Batches(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    return path


def onnxruntime(export: Callable[[Setting], Path]) -> Callable[[Setting], Built]:
    """Return a builder of onnxruntime on an exported file."""
    def build(setting: Setting) -> Built:
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry('session.force_spinning_stop', '1')  # or it would slow the next contestant
        session = ort.InferenceSession(str(export(setting)), options, providers=['CPUExecutionProvider'])
        inputs = {'x': setting.x.numpy()}
        return Built(lambda: session.run(None, inputs)[0], ', '.join(session.get_providers()))

    return build


def openvino(export: Callable[[Setting], Any], precision: str) -> Callable[[Setting], Built]:
    """Return a builder of OpenVINO on an exported file, or on a model with a note, which is kept.

    Args:
        export: Setting -> path, or (openvino.Model, note).
        precision: Of what is not quantized. It must be said: by itself OpenVINO takes bfloat16 where the chip has it.
    """
    def build(setting: Setting) -> Built:
        import openvino as ov
        source = export(setting)
        model, note = source if isinstance(source, tuple) else (source, '')
        compiled = ov.Core().compile_model(model, 'CPU', {
            'INFERENCE_PRECISION_HINT': precision, 'PERFORMANCE_HINT': 'LATENCY', 'NUM_STREAMS': 1,
            'INFERENCE_NUM_THREADS': setting.threads})
        request = compiled.create_infer_request()
        inputs = {0: setting.x.numpy()}
        kernels = convolution_kernels(compiled)
        return Built(lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[0], kernels, note)

    return build


def convolution_kernels(compiled: Any) -> str:
    """Return the kernels of the convolutions of a compiled OpenVINO model, such as '36 brgconv_avx512_1x1_f32'."""
    counts: dict[str, int] = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        facts = op.get_rt_info()
        if facts['layerType'].astype(str) in ('Convolution', 'GroupConvolution', 'BinaryConvolution'):
            kernel = facts['primitiveType'].astype(str)
            counts[kernel] = counts.get(kernel, 0) + 1
    return ' + '.join(f'{n} {kernel}' for kernel, n in counts.items())


def _binary_model(setting: Setting) -> tuple[Any, str]:
    """Return the binarized net as an OpenVINO model, and a note on what its BinaryConvolution cannot compute."""
    batch, _, *size = setting.x.shape
    program = program_of(setting.latent, tuple(size)).program
    model, bits, binary = openvino_model(program, whole_model(program, tuple(size)), batch)
    return model, f'{binary - bits} of {binary} binary convs float, OpenVINO has no op for them' * (bits < binary)


ONNX = ('onnx', 'onnxscript')
PEERS: dict[str, Peer] = {
    'torch-compiled': Peer((), torch_peer('compiled', compiled)),
    'torch-frozen': Peer((), torch_peer('frozen', frozen)),
    'onnxruntime-f32': Peer((*ONNX, 'onnxruntime'), onnxruntime(export_float), can_be_capped=False),
    'onnxruntime-int8': Peer((*ONNX, 'onnxruntime'), onnxruntime(export_int8), can_be_capped=False),
    'openvino-f32': Peer((*ONNX, 'openvino'), openvino(export_float, 'f32')),
    'openvino-bf16': Peer((*ONNX, 'openvino'), openvino(export_float, 'bf16')),
    'openvino-int8': Peer((*ONNX, 'onnxruntime', 'openvino'), openvino(export_int8, 'f32')),
    'openvino-binary': Peer(('onnx', 'openvino'), openvino(_binary_model, 'f32'), binary=True),
}
PACKAGES = tuple(dict.fromkeys(name for peer in PEERS.values() for name in peer.packages))


def choose(names: str) -> dict[str, Peer]:
    """Return peers by name from 'all', 'none', or names separated by commas.

    Raises:
        ValueError: A name is unknown.
    """
    if names in ('all', 'none'):
        return dict(PEERS) if names == 'all' else {}
    chosen = names.split(',')
    for name in chosen:
        if name not in PEERS:
            raise ValueError(f"peers: unknown name {name!r}, expected 'all', 'none', or some of {', '.join(PEERS)}")
    return {name: PEERS[name] for name in chosen}


def build_all(peers: dict[str, Peer], setting: Setting) -> tuple[dict[str, Built], dict[str, str]]:
    """Make peers ready to run.

    Returns:
        Those that run, and for each of the others why it does not, with the remedy.
    """
    built: dict[str, Built] = {}
    absent: dict[str, str] = {}
    for name, peer in peers.items():
        missing = peer.missing()
        if missing:
            absent[name] = f'not installed: {", ".join(missing)}; {INSTALL}'
            continue
        if setting.emulated and not peer.can_be_capped:
            absent[name] = f'left out: nothing caps it to the class {setting.emulated.name}'
            continue
        try:
            with warnings.catch_warnings():  # exporters and converters warn of their own inner affairs
                warnings.simplefilter('ignore')
                logging.disable(logging.WARNING)
                built[name] = peer.build(setting)
        except Exception as e:  # whatever goes wrong in another engine is a line in the report, not its end
            absent[name] = f'failed: {type(e).__name__}: {_first_line(str(e))}'
        finally:
            logging.disable(logging.NOTSET)
    return built, absent


def _first_line(message: str) -> str:
    """Return the first line of a message, but none that names a place in OpenVINO's own sources."""
    lines = [line.strip() for line in message.splitlines() if not line.startswith('Exception from ')]
    return next(filter(None, lines), 'no message')
