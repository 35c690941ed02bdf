"""The arguments of a recorded operator."""
from typing import Any

__all__ = ['arguments_of']


def arguments_of(op: Any) -> list[Any]:
    """Return all arguments in the order of the operator's schema, defaults filled in."""
    names = [argument.name for argument in op.func._schema.arguments]
    given = {**dict(zip(names, op.args)), **op.kwargs}
    return [given.get(a.name, a.default_value) for a in op.func._schema.arguments]
