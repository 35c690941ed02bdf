"""Views: the tensors of a network as views of the NHWC values of a program."""
from collections.abc import Sequence
from dataclasses import dataclass

from .steps import Form, Size

__all__ = [
    'AXES', 'IMAGE', 'UNREAD', 'NoStep', 'Ref', 'axes_of', 'form_of', 'is_flat', 'is_image', 'is_pixels', 'regrouped',
    'with_channels']

AXES = 'nhwc'
IMAGE = ('n', 'c', 'h', 'w')
FORMS = {Form.IMAGE: IMAGE, Form.NHWC: tuple(AXES), Form.TOKENS: ('n', 'hw', 'c'), Form.ROWS: ('n', 'c')}


class NoStep(Exception):
    """An operator, or the way in which a tensor is read, has no step."""


@dataclass(frozen=True)
class Ref:
    """A tensor as a view of a value: which of the value's axes n, h, w, c make each axis of the tensor."""
    value: int
    groups: tuple[str, ...]


UNREAD = Ref(-1, ())  # an output that nobody may read


def axes_of(ref: Ref, size: Size) -> list[str]:
    """Return the axes of each axis of a tensor without those of size one: 'n', 'c', 'hw' and so on."""
    length = dict(zip(AXES, size))
    return [''.join(axis for axis in group if length[axis] != 1) for group in ref.groups]


def is_image(ref: Ref, size: Size) -> bool:
    """Return whether a tensor is (N, C, H, W)."""
    return _shows(ref, size, IMAGE)


def _shows(ref: Ref, size: Size, groups: Sequence[str]) -> bool:
    if len(ref.groups) != len(groups):
        return False
    length = dict(zip(AXES, size))
    return all(
        found == ''.join(a for a in group if length[a] != 1) for found, group in zip(axes_of(ref, size), groups)
    ) and all(length[a] == 1 for a in AXES if a not in ''.join(groups))


def is_flat(ref: Ref, size: Size) -> bool:
    """Return whether a tensor (N, C * H * W) is an image whose axes c, h, w are one."""
    return _shows(ref, size, ('n', 'chw'))


def is_pixels(ref: Ref, size: Size, axis: int) -> bool:
    """Return whether an axis of a tensor is the channels, and its other axes are pixels in order."""
    axes = axes_of(ref, size)
    rest = ''.join(group for i, group in enumerate(axes) if i != axis % len(axes))
    return axes[axis] in ('', 'c') and rest == ''.join(a for a in 'nhw' if a in rest)


def with_channels(groups: Sequence[str], axis: int) -> tuple[str, ...]:
    """Return the axes of a tensor with the channels at one axis and nowhere else; there may have been only one."""
    bare = [group.replace('c', '') for group in groups]
    bare[axis] += 'c'
    return tuple(bare)


def regrouped(ref: Ref, size: Size, shape: Sequence[int]) -> Ref:
    """Return the view of another shape of the same memory order.

    Raises:
        NoStep: The shape splits one of the axes n, h, w, c.
    """
    length = dict(zip(AXES, size))
    axes = [axis for group in ref.groups for axis in group]
    groups = []
    for n in shape:
        group, product = '', 1
        while axes and (product < n or not group and n == 1 and length[axes[0]] == 1):
            product *= length[axes[0]]
            group += axes.pop(0)
        if product != n:
            raise NoStep('a view that splits channels or pixels')
        groups.append(group)
    if any(length[axis] != 1 for axis in axes):
        raise NoStep('a view that splits channels or pixels')
    if groups:
        groups[-1] += ''.join(axes)
    return Ref(ref.value, tuple(groups))


def form_of(ref: Ref, size: Size) -> Form:
    """Return the form in which a tensor shows its value.

    Raises:
        NoStep: Its axes are mixed in another way.
    """
    exact = [form for form, groups in FORMS.items() if groups == ref.groups]
    fitting = [form for form, groups in FORMS.items() if _shows(ref, size, groups)]
    for form in (*exact, *fitting):
        if form in fitting:
            return form
    raise NoStep('an output whose axes are mixed')
