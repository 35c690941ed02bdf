"""Packed file: one bit per binary weight, in safetensors. Format version 1, or 2 where real weights are int8.

The file holds the tensors of the model's state dict under their own names, except that a layer with a binary weight (a
`BinaryConv2d` or `BinaryLinear` with a weight quantizer) at path P has, in place of `P.weight`,

    P.weight_bits   uint8 (O, kH, kW, ceil(I / 8)) for a convolution, I = input channels / groups; uint8
                    (O, ceil(I / 8)) for a linear layer. Bit 1 means +1, bit 0 means -1, least significant bit first
                    along I; the tail bits of the last byte are 0 (bits.py).
    P.weight_alpha  float (O,): alpha = mean abs(W) per output channel, not negative. Absent if the layer has no alpha.
    P.weight_pad    int8 (): the value of a padded tap after the sign, -1 or +1. Absent if it is 0, or a linear layer.

so that the weight in use is alpha[o] * (+1 or -1). Version 2 has, in place of the weight of each real linear layer and
convolution of one group,

    P.weight_int8   int8, the weight's shape (int8.py)
    P.weight_scale  float32 (O,), so that the weight in use is scale[o] * q. Not negative.

All other float tensors (biases, norms, gammas, float layers) stay
float, in their own dtype or all in the one that was asked for, which then is alpha's too; integer tensors stay as they
are. One more tensor,

    packed_version  uint8 (33,): the format version, then a SHA-256,

names the format and guards against damage. The digest is taken over all other tensors in the order of their names
(bytewise), for each: the name in UTF-8, a zero byte, safetensors' name of the dtype ('F32', 'F16', 'BF16', 'U8', ...),
the shape as decimal numbers joined by ',', a zero byte, and the bytes as they lie in the file (row-major,
little-endian). The one entry of the header's metadata, `timm_el`, is JSON for people: recipe, version; readers need not
look at it.

Example: a convolution with 10 input channels, 1 output channel and a 1x1 kernel, W = +0.5 -0.5 +0.5 +0.5 -0.5 -0.5 -0.5
+0.5 -0.5 +0.5, is `weight_bits` = 8d 02 (0b10001101: channels 0, 2, 3, 7; 0b00000010: channel 9) and `weight_alpha` =
00 00 00 3f (0.5).

A model that is loaded from a packed file has latent weights of exactly +-alpha (+-1 without alpha). Its outputs are
those of the model that was packed, bit for bit, unless `float_dtype` rounded its float tensors; packing it again gives
the same bytes. It trains on: every latent weight gets its gradient (the estimator is inclusive at +-1), but all weights
of a channel start at the same distance from zero, so begin with a small learning rate.
"""
import hashlib
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from ..layers import BinaryConv2d, BinaryLinear, check_own_tensors, check_tensors
from ..layers.checks import check_latent
from .bits import pack_signs, pack_weight, packed_size, unpack_signs
from .int8 import dequantize, quantize

FORMAT_VERSION = 2
VERSION_KEY = 'packed_version'
BITS, ALPHA, PAD = 'weight_bits', 'weight_alpha', 'weight_pad'
INT8, SCALE = 'weight_int8', 'weight_scale'
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
DTYPE_NAMES = {
    torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16', torch.int64: 'I64',
    torch.int32: 'I32', torch.int16: 'I16', torch.int8: 'I8', torch.uint8: 'U8', torch.bool: 'BOOL'}


class CheckpointError(ValueError, RuntimeError):
    """A file or state dict does not fit a model, or is damaged. Nothing was loaded."""


def binary_weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with a binary weight by the prefix of their tensors."""
    return {
        f'{path}.' if path else '': module for path, module in model.named_modules()
        if isinstance(module, (BinaryConv2d, BinaryLinear)) and module.weight_quantizer is not None}


def fit_counters(state_dict: dict[str, Any], own: dict[str, torch.Tensor], prefix: str = '') -> None:
    """Give a state dict the counters of batches that a model's norms have, in place.

    A frozen norm counts no batches: its counter in a state dict goes. For a norm without its counter in a state dict
    the model's own stays.

    Args:
        state_dict: Tensors that are about to be loaded.
        own: The model's own state dict.
        prefix: Prefix of the model's keys in the state dict.
    """
    for norm in [key[:-len('running_mean')] for key in own if key.endswith('running_mean')]:
        key = f'{norm}num_batches_tracked'
        if key not in own:
            state_dict.pop(prefix + key, None)
        elif f'{prefix}{norm}running_mean' in state_dict:
            counter = own[key]
            state_dict.setdefault(prefix + key, torch.zeros_like(counter, device='cpu') if counter.is_meta else counter)


def full_real_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the full convolutions and linear layers with a real weight by the prefix of their tensors."""
    binary = binary_weight_layers(model)
    named = {f'{path}.' if path else '': module for path, module in model.named_modules()}
    return {
        prefix: module for prefix, module in named.items() if prefix not in binary
        and (isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.groups == 1)}


def require_binary_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Return `binary_weight_layers` of a model; raise ValueError if it has none."""
    layers = binary_weight_layers(model)
    if layers:
        return layers
    check_latent(model, 'pack')
    graphs = (fx.GraphModule, torch.jit.ScriptModule)
    graph = next((cls.__name__ for module in model.modules() for cls in graphs if isinstance(module, cls)), None)
    if graph is not None:
        raise ValueError(
            f'model: found a {graph}, in which binary layers are no modules any more, expected the model that it was '
            f'made of')
    raise ValueError(
        f'model: {type(model).__name__} has no binary weight; create or binarize it first '
        f'(a model of stage one has real weights: finish stage two)')


def is_packed(state_dict: dict[str, Any]) -> bool:
    """Return whether these are the tensors of a packed file."""
    return VERSION_KEY in state_dict or any(_is_named(key, BITS) for key in state_dict)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors

def pack_state_dict(model: nn.Module, float_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's packed file.

    Args:
        model: A binarized model.
        float_dtype: torch.float32, float16 or bfloat16 for all float tensors; torch.int8 for the weights of real
            linear layers and convolutions of one group; their own dtype if None.

    Returns:
        Tensors on the CPU by name; parameters of the model are not shared.

    Raises:
        ValueError: The model has no binary weight, one that is not finite, or weights of more than one bit; a tensor is
            computed in each pass (pruned, normed or parametrized) or not a plain one; or `float_dtype` is another.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: found a {type(model).__name__}, expected a torch.nn.Module')
    if float_dtype is not None and float_dtype not in FLOAT_DTYPES:
        raise ValueError(f'float_dtype: found {float_dtype!r}, expected one of {FLOAT_DTYPES} or None')
    layers = require_binary_weights(model)
    for path, module in model.named_modules():
        check_tensors(module, path or 'model')
        check_own_tensors(module, path or 'model')
    floats = None if float_dtype == torch.int8 else float_dtype
    packed = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    for prefix in full_real_layers(model) if float_dtype == torch.int8 else ():
        _write_int8(packed, prefix)
    for prefix, layer in layers.items():
        weight = packed.pop(f'{prefix}weight')
        if weight.device.type == 'meta':
            raise ValueError(f'{prefix}weight: it is on the meta device, there are no values to pack')
        if layer.weight_bits > 1:
            raise ValueError(
                f'{prefix}weight: found weights of {layer.weight_bits} bits ({type(layer).__name__}, '
                f'{layer.weight_quantizer}), expected signs, the packed file holds one bit a weight; save the '
                f'state_dict(), or use a recipe of binary weights (bwn for twn and ttq, bases=(1, N) for abc)')
        if not torch.isfinite(weight).all():
            raise ValueError(f'{prefix}weight: found a value that is not finite, expected finite weights')
        signed = layer.latent_weight().detach()
        packed[prefix + BITS] = pack_weight(signed) if weight.dim() == 4 else pack_signs(signed)
        if layer.scale_weight:
            packed[prefix + ALPHA] = _alpha(prefix + ALPHA, layer.alpha().detach(), signed, floats)
        if getattr(layer, 'pad_value', 0):
            packed[prefix + PAD] = torch.tensor(layer.pad_value, dtype=torch.int8)
    for key, tensor in packed.items():
        if floats is not None and tensor.is_floating_point():
            tensor = _in_dtype(key, tensor, floats)
        packed[key] = tensor.to('cpu', copy=True).contiguous()
    packed[VERSION_KEY] = _version(packed)
    return packed


def _write_int8(packed: dict[str, torch.Tensor], prefix: str) -> None:
    """Put int8 values and scales in the place of a real weight."""
    weight = packed.pop(f'{prefix}weight')
    if not torch.isfinite(weight).all():
        raise ValueError(f'{prefix}weight: found a value that is not finite, expected finite weights')
    packed[prefix + INT8], packed[prefix + SCALE] = quantize(weight)


def _in_dtype(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in another dtype; raise ValueError if that cannot hold one of its finite values."""
    rounded = tensor.to(dtype)
    beyond = tensor.isfinite() & ~rounded.isfinite()
    if beyond.any():
        raise ValueError(
            f'{key}: found {tensor[beyond].abs().max().item():.3g}, expected at most {torch.finfo(dtype).max:.5g}, the '
            f'largest {dtype}; use float_dtype=torch.bfloat16, or leave it out')
    return rounded


def _alpha(
        key: str, alpha: torch.Tensor, signed: torch.Tensor, float_dtype: torch.dtype | None) -> torch.Tensor:
    """Return alpha (O,) in the dtype of the file, never rounded down to 0, where the signs would be lost."""
    dtype = float_dtype or alpha.dtype
    tiny = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype)
    negative = (signed < 0).flatten(1).any(1)
    rounded = _in_dtype(key, alpha, dtype)
    return torch.where(negative & (rounded == 0), tiny.to(alpha.device), rounded)


def _version(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    digest = hashlib.sha256()
    for key in sorted(tensors, key=str.encode):
        tensor = tensors[key]
        if key == VERSION_KEY:
            continue
        name = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        digest.update(f'{key}\0{name}{",".join(map(str, tensor.shape))}\0'.encode())
        data = tensor.detach().to('cpu').contiguous().reshape(-1)
        digest.update(memoryview(data.view(torch.uint8).numpy()) if data.numel() else b'')
    version = FORMAT_VERSION if any(_is_named(key, INT8) for key in tensors) else 1
    return torch.tensor([version, *digest.digest()], dtype=torch.uint8)


def _is_named(key: str, name: str) -> bool:
    return key == name or key.endswith(f'.{name}')


def check_damage(
        packed: dict[str, torch.Tensor], where: str = 'state dict', model: nn.Module | None = None) -> None:
    """Raise unless packed tensors are whole and of a version that is known.

    Args:
        packed: Tensors of a packed file.
        where: Name of the tensors in errors.
        model: The model that they are for, so that the error can name what is missing.

    Raises:
        CheckpointError: The version is missing or newer, or the digest is another.
    """
    found = packed.get(VERSION_KEY)
    if not isinstance(found, torch.Tensor) or found.dtype != torch.uint8 or found.shape != (33,):
        raise CheckpointError(
            f'{where}: {VERSION_KEY}: expected a uint8 tensor (33,), found '
            f'{"nothing" if found is None else (found.dtype, tuple(found.shape))}; the file is damaged or incomplete')
    if int(found[0]) > FORMAT_VERSION:
        raise CheckpointError(
            f'{where}: {VERSION_KEY}: found format version {int(found[0])}, expected at most {FORMAT_VERSION}; '
            f'a newer timm_el wrote it: pip install -U timm-el')
    expected = _version(packed)
    if not torch.equal(found.cpu(), expected):
        missing = [] if model is None else _missing(packed, model)
        reason = (
            f'{missing[0]}' + f' and {len(missing) - 1} more' * (len(missing) > 1) + ' were taken out of it' if missing
            else 'the file is damaged, fetch it again; or tensors were taken out of it or changed')
        raise CheckpointError(
            f'{where}: {VERSION_KEY}: the digest of the tensors is {bytes(expected[1:].tolist()).hex()}, expected '
            f'{bytes(found[1:].tolist()).hex()}; {reason} (to load a part of a packed file, take keys out of '
            f'timm_el.unpack_state_dict(tensors, model) and pass that to model.load_state_dict(..., strict=False))')


def _missing(packed: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    """Return the names that a packed file of the model has and `packed` has not."""
    names = dict.fromkeys(key for key in model.state_dict() if not key.endswith('num_batches_tracked'))
    for prefix in full_real_layers(model) if any(_is_named(key, INT8) for key in packed) else ():
        del names[f'{prefix}weight']
        names.update(dict.fromkeys([prefix + INT8, prefix + SCALE]))
    for prefix, layer in binary_weight_layers(model).items():
        del names[f'{prefix}weight']
        names.update(dict.fromkeys([prefix + BITS, *[prefix + ALPHA] * layer.scale_weight]))
    return [name for name in names if name not in packed]


def unpack_state_dict(
        packed: dict[str, torch.Tensor], model: nn.Module, where: str = 'state dict') -> dict[str, torch.Tensor]:
    """Return the latent state dict of packed tensors: each binary weight is +-alpha, or +-1 without alpha.

    Args:
        packed: Tensors of a packed file.
        model: The model that they are for; it is not changed.
        where: Name of the tensors in errors.

    Returns:
        State dict with the names and shapes of the model's own.

    Raises:
        CheckpointError: The tensors are damaged, of a newer format, or do not fit the model's binary layers.
    """
    check_damage(packed, where, model)
    state_dict, signs = take_signs(packed, model, where)
    for key, (bits, alpha, weight) in signs.items():
        dtype = weight.dtype if alpha is None else alpha.dtype
        state_dict[key] = torch.empty(weight.shape, dtype=dtype, device=bits.device)
        write_signs(bits, alpha, state_dict[key])
    return state_dict


Signs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


def take_signs(
        packed: dict[str, torch.Tensor], model: nn.Module, where: str,
) -> tuple[dict[str, torch.Tensor], dict[str, Signs]]:
    """Part packed tensors into those that stay as they are, and bits, alpha and the model's own weight by weight key.

    Raises:
        CheckpointError: They do not fit the model's binary layers.
    """
    state_dict = {key: tensor for key, tensor in packed.items() if key != VERSION_KEY}
    fit_counters(state_dict, model.state_dict())
    layers = binary_weight_layers(model)
    signs = {f'{prefix}weight': _take(state_dict, prefix, layer, where) for prefix, layer in layers.items()
             if prefix + BITS in state_dict}
    stray = next((key for key in state_dict if any(_is_named(key, name) for name in (BITS, ALPHA, PAD)) or any(
        key in (prefix + INT8, prefix + SCALE) for prefix in layers)), None)
    if stray is not None:
        raise CheckpointError(
            f'{where}: {stray}: the model has no such weight there; this is a packed file of another model or recipe')
    # By their names, not the model's: a head of other classes is of no use to it, but it is there, as in float files.
    for key in [key for key in state_dict if _is_named(key, INT8) or _is_named(key, SCALE)]:
        prefix = key[:-len(INT8 if _is_named(key, INT8) else SCALE)]
        if key in state_dict:
            state_dict[f'{prefix}weight'] = _take_int8(state_dict, prefix, where)
    return state_dict, signs


@torch.no_grad()
def write_signs(bits: torch.Tensor, alpha: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Fill a weight (O, ...) with +-alpha, or +-1: bits as in the file, alpha (O,) or None."""
    signs = unpack_signs(bits, weight.shape[1], torch.int8)
    # Each step by itself is a fast kernel; a product of int8 with floats is not.
    weight.copy_((signs.permute(0, 3, 1, 2) if weight.dim() == 4 else signs).contiguous())
    if alpha is not None:
        weight.mul_(alpha.to(weight.device, weight.dtype).reshape(-1, *[1] * (weight.dim() - 1)))


def _take(state_dict: dict[str, torch.Tensor], prefix: str, layer: nn.Module, where: str) -> Signs:
    bits, alpha = state_dict.pop(prefix + BITS), state_dict.pop(prefix + ALPHA, None)
    pad = state_dict.pop(prefix + PAD, None)
    out, *inner = layer.weight.shape
    expected = (out, *inner[1:], packed_size(inner[0]))
    if bits.dtype != torch.uint8 or tuple(bits.shape) != expected:
        raise CheckpointError(
            f'{where}: {prefix}{BITS}: found {bits.dtype} {tuple(bits.shape)}, expected torch.uint8 {expected}; '
            f'this is a packed file of another model')
    if (alpha is not None) != layer.scale_weight:
        raise CheckpointError(
            f'{where}: {prefix}{ALPHA}: found {"one" if alpha is not None else "none"}, expected '
            f'{"one" if layer.scale_weight else "none"}; this is a packed file of another recipe')
    if pad is not None and (pad.numel() != 1 or pad.dtype != torch.int8):
        raise CheckpointError(
            f'{where}: {prefix}{PAD}: found {pad.dtype} {tuple(pad.shape)}, expected torch.int8 ()')
    found_pad, own_pad = 0 if pad is None else int(pad), getattr(layer, 'pad_value', 0)
    if found_pad != own_pad:
        raise CheckpointError(
            f'{where}: {prefix}{PAD}: found {found_pad}, expected {own_pad}, the pad_value of the layer')
    if inner[0] % 8 and (bits[..., -1] >> (inner[0] % 8)).any():
        raise CheckpointError(f'{where}: {prefix}{BITS}: found tail bits that are 1, expected 0; the file is damaged')
    if alpha is not None:
        if not alpha.is_floating_point() or tuple(alpha.shape) != (out,):
            raise CheckpointError(
                f'{where}: {prefix}{ALPHA}: found {alpha.dtype} {tuple(alpha.shape)}, expected floats ({out},)')
        if not (torch.isfinite(alpha) & (alpha >= 0)).all():
            raise CheckpointError(f'{where}: {prefix}{ALPHA}: found a negative or infinite value, expected alpha >= 0')
    return bits, alpha, layer.weight


def _take_int8(state_dict: dict[str, torch.Tensor], prefix: str, where: str) -> torch.Tensor:
    q, scale = state_dict.pop(prefix + INT8, None), state_dict.pop(prefix + SCALE, None)
    channels = None if q is None or q.dim() == 0 else q.shape[:1]
    for name, tensor, dtype, fits in (
            (INT8, q, torch.int8, channels is not None),
            (SCALE, scale, torch.float32, scale is not None and scale.shape == channels)):
        if tensor is None or tensor.dtype != dtype or not fits:
            found = 'none' if tensor is None else f'{tensor.dtype} {tuple(tensor.shape)}'
            raise CheckpointError(
                f'{where}: {prefix}{name}: found {found}, expected {dtype} with a value for each output channel; the '
                f'file is damaged')
    if f'{prefix}weight' in state_dict:
        raise CheckpointError(
            f'{where}: {prefix}{INT8}: found {prefix}weight beside it, expected one of them; the file is damaged')
    if not (torch.isfinite(scale) & (scale >= 0)).all():
        raise CheckpointError(f'{where}: {prefix}{SCALE}: found a negative or infinite value, expected scales >= 0')
    return dequantize(q, scale)
