"""Fields of frozen dataclasses, checked against their annotations."""
import collections.abc
import types
import typing
from typing import Any, Literal, Union

WORDS = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'a string', type(None): 'None'}


def check_fields(instance: Any, hint: str = '') -> None:
    """Raise unless each field of a dataclass is of the type that its annotation names.

    An integer will do for a float, a list for a tuple; True and False are no numbers. `Literal` lists what is known,
    and `Annotated[kind, words]` says what is expected in words of its own.

    Args:
        instance: The dataclass.
        hint: End of the message.

    Raises:
        ValueError: A field is of another type.
    """
    for name, kind in typing.get_type_hints(type(instance), include_extras=True).items():
        value = getattr(instance, name)
        if typing.get_origin(kind) is not typing.ClassVar and not _is_a(value, kind):
            raise ValueError(f'{name}: found {value!r}, expected {_in_words(kind)}{hint}')


def _is_a(value: Any, kind: Any) -> bool:
    """Return whether a value fits an annotation."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is typing.Annotated:
        return _is_a(value, options[0])
    if origin in (Union, types.UnionType):
        return any(_is_a(value, option) for option in options)
    if origin is Literal:
        return any(value is option or type(value) is type(option) and value == option for option in options)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if origin in (tuple, collections.abc.Sequence):
        return isinstance(value, (list, tuple)) and all(_is_a(v, options[0]) for v in value)
    return isinstance(value, origin or kind)


def _in_words(kind: Any) -> str:
    """Return what an annotation asks for."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return options[1]
    if origin in (Union, types.UnionType):
        return ' or '.join(_in_words(option) for option in options)
    if origin is Literal:
        return f'one of {options}'
    if origin in (tuple, collections.abc.Sequence):
        return f'a sequence of which each is {_in_words(options[0])}'
    return WORDS.get(kind, f'a {getattr(origin or kind, "__name__", kind)}')
