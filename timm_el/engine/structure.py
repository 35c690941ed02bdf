"""Structure of a network's outputs as plain data for JSON: numbers of tensors in lists, tuples and dicts."""
from collections.abc import Sequence
from typing import Any

__all__ = ['filled', 'plain']

KINDS = {list: 'list', tuple: 'tuple', dict: 'dict'}


def plain(outputs: Any) -> Any:
    """Return a structure of ints in lists, tuples and dicts with text as keys, as data that JSON can hold.

    An int stays, and a container becomes a dict of one entry: `{'list': [...]}`, `{'tuple': [...]}`, `{'dict': {...}}`.

    Raises:
        ValueError: There is another type in it.
    """
    if type(outputs) is int:
        return outputs
    kind = KINDS.get(type(outputs))
    if kind is None or kind == 'dict' and not all(isinstance(key, str) for key in outputs):
        raise ValueError(
            f'outputs: found {type(outputs).__name__}, expected tensors in lists, tuples, and dicts with text as keys')
    if kind == 'dict':
        return {kind: {key: plain(value) for key, value in outputs.items()}}
    return {kind: [plain(value) for value in outputs]}


def filled(structure: Any, outputs: Sequence[Any]) -> Any:
    """Return the containers that `plain` described, with outputs in place of their numbers.

    Raises:
        ValueError: It is no such structure.
    """
    if type(structure) is int and 0 <= structure < len(outputs):
        return outputs[structure]
    if not isinstance(structure, dict) or len(structure) != 1:
        raise ValueError(f'outputs: found {structure!r}, expected a number below {len(outputs)}, list, tuple or dict')
    (kind, inner), = structure.items()
    if kind == 'dict':
        return {key: filled(value, outputs) for key, value in inner.items()}
    if kind not in ('list', 'tuple'):
        raise ValueError(f'outputs: found {kind!r}, expected one of {", ".join(KINDS.values())}')
    return {'list': list, 'tuple': tuple}[kind](filled(value, outputs) for value in inner)
