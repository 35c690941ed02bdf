"""Data types of a conversion: sites of a host, decisions about them, edits of the model.

    find_sites(model, runs) -> [Network]              find.py, known_blocks.py, traced_graph.py
    decide(network, question) -> [Decision]           decide.py
    build_units(decisions, question) -> {path: Edit}  edits.py, build_unit.py
    apply(model, edits, undo)                         apply.py

All are frozen: no stage changes the results of another. A `Draft` (edits.py) holds the results of the first three.
"""
import enum
from dataclasses import dataclass

import torch.nn as nn

from ..recipes import role_of_shape


class Reason(enum.Enum):
    """Reasons why a layer stays float, is gone, or has no link. The text is for the report."""
    # A layer that no method binarizes.
    FIRST = 'first convolution'
    CLASSIFIER = 'classifier'
    DOWNSAMPLE = 'residual downsample'
    ON_VECTORS = 'linear layer on vectors'
    ONE_DIMENSIONAL = 'one-dimensional convolution'
    SQUEEZE_EXCITE = 'squeeze-excite'
    # A layer that the user or the recipe wants so.
    ASKED = 'keep={!r}'
    REAL = 'recipe.real has {!r}'
    OMITTED = 'recipe.omit has {!r}'
    BINARIZES_NOTHING = 'the recipe binarizes nothing'
    SHORTCUT_GONE = 'the recipe keeps no residual shortcut'
    # A layer that could not be converted.
    SHARED = 'its weight is used at {} too'
    TWICE = 'it runs more than once'
    OWN_FORWARD = '{} has a forward of its own'
    NO_FORM = 'recipe {!r} has no form of a {}'
    NO_BINARY = 'there is no binary {}'
    UNKNOWN_BLOCK = 'no known block holds it'
    CONSTANT = 'its input does not vary, a norm before the sign would not help'
    # A unit without a link, or with a norm of ours.
    NO_LINK_REPEATS = 'no link: the shortcut of the host carries the same'
    NO_LINK_FACTOR = 'no link: its output is a factor of a product'
    NO_LINK_HOST = 'no link: the block keeps its own shortcut'
    NO_LINK_CHANNELS = "no link: the recipe's links keep the channel count"
    NO_LINK_SIZE = 'no link: no pooling has its output size'
    CENTRED = 'an activation that cannot be moved comes before it: a new norm shifts the input of the sign'

    def why(self, *details: object) -> 'Why':
        """Return the reason with what its text names."""
        return Why(self, details)


# Operations of these layers are not counted as missed.
EXEMPT = frozenset((Reason.FIRST, Reason.CLASSIFIER, Reason.DOWNSAMPLE, Reason.ON_VECTORS, Reason.ONE_DIMENSIONAL))
FAILURES = frozenset((
    Reason.SHARED, Reason.TWICE, Reason.OWN_FORWARD, Reason.NO_FORM, Reason.NO_BINARY, Reason.UNKNOWN_BLOCK,
    Reason.CONSTANT))


@dataclass(frozen=True)
class Why:
    """A reason and what its text names."""
    reason: Reason
    details: tuple = ()

    def __str__(self) -> str:
        return self.reason.value.format(*self.details)


class Act(str, enum.Enum):
    """Fate of an activation."""
    DROPPED = 'dropped'
    IN_BRANCH = 'in branch'
    REPLACED = 'replaced'
    KEPT = 'kept'

    def __str__(self) -> str:
        return self.value


class Conv(enum.Enum):
    """Fate of a convolution inside a unit."""
    BINARY = enum.auto()
    REAL = enum.auto()
    OMITTED = enum.auto()


class Pre(enum.Enum):
    """Module in front of the sign of a unit."""
    NORM = 'norm'       # a new BatchNorm, the recipe's
    SHIFT = 'shift'     # a learned threshold, the recipe's
    CENTRE = 'centre'   # a new norm that acts in eval mode too, because the sign would be constant


@dataclass(frozen=True)
class Place:
    """A module of the host and its path; the module is None where the host has an attribute that is None."""
    path: str
    module: nn.Module | None


@dataclass(frozen=True)
class Site:
    """A convolution, or a linear layer on pixels, with what belongs to it.

    Args:
        conv: The layer.
        norm: The norm that alone reads it.
        act: The activation behind the norm, perhaps behind an addition too, where it is a module of its own.
        role: `recipes.ROLES`.
        tail: Modules of the host behind the norm (squeeze-excite, drop path, drop block, blur). If the unit has a link,
            they move into the branch, so that the real-valued signal is neither gated nor dropped.
        kept: Reason in the host's structure why the layer stays float.
        no_link: Reason why a link would do harm.
        constant_sign: True where only a new norm keeps the sign from being +1 everywhere.
    """
    conv: Place
    norm: Place | None = None
    act: Place | None = None
    role: str = 'mix'
    tail: tuple[Place, ...] = ()
    kept: Why | None = None
    no_link: Why | None = None
    constant_sign: bool = False

    @property
    def path(self) -> str:
        """Path of the layer."""
        return self.conv.path


@dataclass(frozen=True)
class Group:
    """Sites around which the host has one shortcut, or none.

    Args:
        sites: In the order in which they run.
        shortcut: The module on the shortcut, None in it for an identity; None if there is none that could go.
        is_basic: One shortcut around two convolutions: with links on spatial convolutions each gets one of its own, as
            in Bi-Real Net, and the host's module goes around the first.
    """
    sites: tuple[Site, ...]
    shortcut: Place | None = None
    is_basic: bool = False


@dataclass(frozen=True)
class Network:
    """Structure of a host, or of a part of it.

    Args:
        groups: In the order in which they run.
        is_traced: Found by data flow, not by the table of known blocks.
        stem: The last site before the blocks of a known network.
        stem_pool: The pool behind the stem of a known network.
        loose_acts: Activations outside all sites that stand before a sign.
        image_conv: The convolution that reads the images themselves.
        stride: Of the last features to the image, 1 if that is not known.
        side_paths: Prefixes of the paths of small float side branches (squeeze-excite).
        notes: Remarks on parts that could not be traced.
    """
    groups: tuple[Group, ...]
    is_traced: bool = False
    stem: Site | None = None
    stem_pool: Place | None = None
    loose_acts: tuple[Place, ...] = ()
    image_conv: Place | None = None
    stride: int = 1
    side_paths: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> list[Site]:
        """All sites, in the order in which they run."""
        return [site for group in self.groups for site in group.sites]


@dataclass(frozen=True)
class Keep:
    """Decision that a layer stays float, outside any unit; only its activation may move.

    Args:
        site: The site.
        why: The reason.
        act: Fate of its activation, None where it has none.
    """
    site: Site
    why: Why
    act: Act | None = None


@dataclass(frozen=True)
class Convert:
    """Decision that a unit takes the place of a site.

    Args:
        site: The site.
        conv: Fate of the layer.
        link: The module that goes around it, or None.
        act: Fate of its activation, None where it has none.
        pre: Kind of module in front of the sign.
        why: Reason why it is not binarized, or has no link.
    """
    site: Site
    conv: Conv
    link: nn.Module | None = None
    act: Act | None = None
    pre: Pre | None = None
    why: Why | None = None


Decision = Keep | Convert


@dataclass(frozen=True)
class Edit:
    """One assignment in the model.

    Args:
        path: Path of the module that goes.
        module: Module that is put there.
        moved_to: New path of the module that was there, '' if it is gone, None if nothing of it moved.
    """
    path: str
    module: nn.Module
    moved_to: str | None = None


def get_module(model: nn.Module, path: str | None) -> nn.Module | None:
    """Return the module at a path, or None where the path is None or names an attribute that is None."""
    module: nn.Module | None = model
    for name in path.split('.') if path else ():
        module = getattr(module, name)
    return module if path else None


def join_path(prefix: str, name: str | None) -> str | None:
    """Return the path of `name` inside `prefix`."""
    return f'{prefix}.{name}' if prefix and name else name


def channels_of(layer: nn.Module) -> tuple[int, int]:
    """Return the channels that a convolution or linear layer takes and gives."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def role_of(layer: nn.Module, known: str | None = None) -> str:
    """Return the role of a layer: that of a known block, else by its shape."""
    geometry = ((1, 1), (1, 1), 1) if isinstance(layer, nn.Linear) else (layer.kernel_size, layer.stride, layer.groups)
    return known or role_of_shape(*channels_of(layer), *geometry)
