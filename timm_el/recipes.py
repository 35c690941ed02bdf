"""Recipes: the rows of the paper's tables as data.

A `Recipe` answers how a network is binarized, a name in `RECIPES` is a row of a table. Convolutions are addressed by
their role: in a bottleneck by position (reduce, spatial, expand, also where 64 channels stay 64), elsewhere by shape.
"""
import dataclasses
import json
import zlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .fields import check_fields
from .quantizers import WEIGHT_QUANTIZERS, get_quantizer

__all__ = ['ROLES', 'Recipe', 'RECIPES', 'get_recipe', 'role_of_shape']

ROLES = (
    'reduce',      # 1x1 with fewer output than input channels; a bottleneck's first convolution
    'spatial',     # kernel larger than 1x1; a bottleneck's middle convolution
    'expand',      # 1x1 with more output than input channels; a bottleneck's last convolution
    'mix',         # 1x1 with as many output as input channels
    'downsample',  # strided depthwise convolution: MobileNet's downsampling
)
TERNARY = ('twn', 'ttq')


def role_of_shape(
        in_channels: int, out_channels: int, kernel_size: tuple[int, int], stride: tuple[int, int], groups: int) -> str:
    """Return the role of a convolution by its shape, where no known block gives it one."""
    if max(kernel_size) > 1:
        depthwise = groups == in_channels and groups > 1
        return 'downsample' if depthwise and max(stride) > 1 else 'spatial'
    if in_channels == out_channels:
        return 'mix'
    return 'reduce' if in_channels > out_channels else 'expand'


Roles = Annotated[tuple[str, ...], f'a sequence of roles from {ROLES}']
# What the code is a checksum of: the fields of the first version, in its order. It stands in files of weights, so
# nothing here may change. A field that came later counts where it is not at its default.
CODE_FIELDS = (
    'input_quantizer', 'weight_quantizer', 'scale_weight', 'scale_input', 'link', 'elastic', 'gamma', 'residual', 'act',
    'real', 'omit')
LATER_FIELDS = ('scale_weight_grad', 'scale_output', 'pre', 'bases', 'link_pool')


@dataclass(frozen=True)
class Recipe:
    """Recipe for a binarized network. Immutable, validated, and equal to its JSON.

    Args:
        name: Name of the recipe.
        input_quantizer: 'ste', 'approx', 'ternary' (TBN), 'tanh', or None for real inputs.
        weight_quantizer: 'ste', 'approx', or None for real weights; 'twn' or 'ttq' for ternary ones.
        scale_weight: alpha on every binary weight (eq. 3).
        scale_input: Roles that get K (eq. 3).
        link: Roles that get an Elastic-Link (eq. 4).
        elastic: Links may squeeze and expand. If False, only convolutions that keep the channel count get one, without
            a gamma.
        gamma: 'learnable', or 'fixed' at its initial value (eq. 5).
        residual: Keep the host's residual shortcut.
        act: Fate of activations. 'drop': all are removed, the sign is the non-linearity. 'branch': each moves
            before the norm of its own convolution, conv -> act -> norm -> add, so that none stands before a sign.
            'keep': all stay where they are. 'ends': as 'drop', but that of the stem and the last one stay, and a new
            norm comes between the stem's and the first sign (BinaryE). 'prelu': in their place each branch, and the
            stem, ends with a new PReLU (Real-to-Binary). 'rprelu': in their place a new RPReLU comes behind each sum of
            branch and link (ReActNet).
        real: Roles whose convolution stays float, inside its unit.
        omit: Roles whose convolution and norm are left out, so that only the link remains (Table 4).
        paper_top1: The paper's ImageNet top-1 for ResNet26 (MobileNet for `el_mobilenet`), None where it has none.
        version: Version of this format.
        scale_weight_grad: Gradient flows through alpha (XNOR-Net's backward pass).
        scale_output: A learned factor of the convolution's output: 'channel' or 'rank1' (XNOR-Net++, cases 1 and 4),
            'gate' (Real-to-Binary's, which depends on the input), or None.
        pre: Module before the sign: 'norm' (a new BatchNorm; that of the host, behind the convolution, goes),
            'shift' (ReActNet's learned threshold), or None.
        link_pool: Pooling in the links of strided convolutions: 'max', the paper's, or 'avg'.
        bases: (M, N), how many binary bases make up a weight and an input (ABC-Net); () where each is its own sign.

    Raises:
        ValueError: An unknown role, quantizer, gamma, act, pre or scale; an omitted role without a link; ternary
            weights with quantized inputs; bases of inputs other than signs; another version.
    """
    name: str
    input_quantizer: str | None = 'ste'
    weight_quantizer: str | None = 'ste'
    scale_weight: bool = True
    scale_input: Roles = ()
    link: Roles = ()
    elastic: bool = True
    gamma: Literal['learnable', 'fixed'] = 'learnable'
    residual: bool = True
    act: Literal['keep', 'drop', 'branch', 'ends', 'prelu', 'rprelu'] = 'drop'
    real: Roles = ('downsample',)
    omit: Roles = ()
    paper_top1: float | None = None
    version: int = 1
    scale_weight_grad: bool = False
    scale_output: Literal[None, 'channel', 'rank1', 'gate'] = None
    pre: Literal[None, 'norm', 'shift'] = None
    bases: Annotated[tuple[int, ...], '(M, N), bases of the weight and of the input, two positive integers, or ()'] = ()
    link_pool: Literal['max', 'avg'] = 'max'

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ('scale_input', 'link', 'real', 'omit'):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # JSON gives lists
            for role in self.__dict__[field]:
                if role not in ROLES:
                    raise ValueError(f'{field}: unknown role {role!r}, expected some of {ROLES}')
        get_quantizer(self.input_quantizer, 'input_quantizer')
        get_quantizer(self.weight_quantizer, 'weight_quantizer', {**WEIGHT_QUANTIZERS, 'ttq': None})
        object.__setattr__(self, 'bases', tuple(self.bases))
        missing = set(self.omit) - set(self.link)
        if missing:
            raise ValueError(f'omit: {sorted(missing)} would leave nothing at all, name it in link too')
        if self.weight_quantizer in TERNARY and self.input_quantizer is not None:
            raise ValueError(
                f'weight_quantizer: {self.weight_quantizer!r} is for real inputs, found input_quantizer='
                f"{self.input_quantizer!r}; pass input_quantizer=None, or weight_quantizer='ste'")
        if self.bases and (len(self.bases) != 2 or not all(type(n) is int and n > 0 for n in self.bases)):
            raise ValueError(f'bases: found {self.bases!r}, expected two positive integers (M, N), or ()')
        if self.bases and self.input_quantizer != 'ste':
            raise ValueError(
                f"bases: the bases of an input are signs, found input_quantizer={self.input_quantizer!r}, "
                f"expected 'ste'")
        if self.version != 1:
            raise ValueError(f'version: found {self.version!r}, expected 1; a newer timm_el wrote this recipe')

    @property
    def binarizes(self) -> bool:
        """False if no convolution gets a binary weight or a binary input."""
        return self.input_quantizer is not None or self.weight_quantizer is not None

    @property
    def code(self) -> int:
        """Fingerprint of 16 bits of the recipe's computation, equal in both stages of two-stage training."""
        names = [name for name in CODE_FIELDS if name != 'weight_quantizer' or self.weight_quantizer in TERNARY]
        facts = {name: getattr(self, name) for name in (*names, *self._later())}  # ternary weights have no first stage
        return zlib.crc32(json.dumps(facts).encode()) & 0xffff

    def _later(self) -> list[str]:
        """Return the later fields that are not at their default."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return [name for name in LATER_FIELDS if getattr(self, name) != defaults[name]]

    def replace(self, **changes: Any) -> 'Recipe':
        """Return a copy with some fields changed; give it a `name` of its own."""
        return dataclasses.replace(self, **changes)

    def with_real_weights(self) -> 'Recipe':
        """Return the recipe of stage one of two-stage training: binary inputs, real weights, the same state dict keys.

        Raises:
            ValueError: The recipe has real inputs: its first stage is the float host itself.
        """
        if self.binarizes and self.input_quantizer is None:
            raise ValueError(
                f'real_weights: recipe {self.name!r} has real inputs, with real weights too it is the float host; '
                f'train that, and load it with timm_el.load_float')
        return self.replace(weight_quantizer=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as in JSON; later fields at their default are left out."""
        left_out = set(LATER_FIELDS) - set(self._later())
        facts = {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> 'Recipe':
        """Return the recipe of plain data, the inverse of `to_dict`.

        Raises:
            ValueError: The data is no object, or a field is unknown or missing.
        """
        if not isinstance(data, dict):
            raise ValueError(f'recipe: found a {type(data).__name__}, expected an object with the fields of Recipe')
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f'recipe: unknown field {key!r}, expected some of {known}')
        if 'name' not in data:
            raise ValueError("recipe: the field 'name' is missing")
        return cls(**data)


SPATIAL = ('spatial', 'downsample')
# The paper's subscripts: s(queeze) = reduce, i(dentity) = spatial, e(xpand) = expand.
# S-ResNet (section "Effect of Scaling Activation"): a plain identity shortcut around each spatial convolution.
_S = dict(link=SPATIAL, elastic=False, gamma='fixed')
# The same with MobileNet's 1x1 convolutions of equal width.
_S_MIX = dict(_S, link=(*SPATIAL, 'mix'))
_WEIGHTS = dict(input_quantizer=None, act='keep', real=())

_ROWS = (
    # Nothing is binarized: the converted network must give its host's own outputs.
    Recipe('host', input_quantizer=None, weight_quantizer=None, act='keep'),

    # Table 1: S-ResNet26 with K on none, e, se, si, sie, s.
    Recipe('s_resnet', **_S, paper_top1=58.7),
    Recipe('s_resnet_k_e', **_S, scale_input=('expand',), paper_top1=58.5),
    Recipe('s_resnet_k_se', **_S, scale_input=('reduce', 'expand'), paper_top1=59.3),
    Recipe('s_resnet_k_si', **_S, scale_input=('reduce', 'spatial'), paper_top1=59.8),
    Recipe('s_resnet_k_sie', **_S, scale_input=('reduce', 'spatial', 'expand'), paper_top1=59.4),
    Recipe('s_resnet_k_s', **_S, scale_input=('reduce',), paper_top1=59.8),

    # Table 2. The text calls its baseline S-ResNet26 with K_s, so it is `s_resnet_k_s` by another name. The other rows
    # have a link exactly where the table has a check mark, so EL_1 and EL_2 have none around the spatial convolution.
    Recipe('baseline', **_S, scale_input=('reduce',), paper_top1=59.8),
    Recipe('el_1', scale_input=('reduce',), link=('reduce',), gamma='fixed', paper_top1=61.8),
    Recipe('el_2', scale_input=('reduce',), link=('reduce', 'expand'), gamma='fixed', paper_top1=62.1),
    Recipe('el_3', scale_input=('reduce',), link=ROLES, gamma='fixed', paper_top1=63.2),
    Recipe('el_4', scale_input=('reduce',), link=ROLES, gamma='fixed', residual=False, paper_top1=59.2),
    Recipe('el_5', link=ROLES, paper_top1=63.6),
    Recipe('el_6', scale_input=('reduce',), link=ROLES, paper_top1=64.0),
    Recipe('el', scale_input=('reduce',), link=ROLES, paper_top1=64.0),

    # Table 4: S-ResNet26 with the first 1x1 of each block binary, float, with an Elastic-Link, and an Elastic-Link
    # without its convolution. The paper gives the binary row 59.4 where Table 1 has 59.8.
    Recipe('first_binary', **_S, scale_input=('reduce',), paper_top1=59.4),
    Recipe('first_float', **_S, real=('reduce', 'downsample'), paper_top1=62.0),
    Recipe('first_el', scale_input=('reduce',), link=('reduce', *SPATIAL), gamma='fixed', paper_top1=61.8),
    Recipe('first_el_minus', link=('reduce', *SPATIAL), omit=('reduce',), gamma='fixed', paper_top1=60.6),

    # Table 3's Bi-Real Net, as the paper builds it on bottlenecks: S-ResNet with ApproxSign on the activations.
    Recipe('bireal', **_S, input_quantizer='approx', paper_top1=57.8),

    # Elastic-Link for depthwise-separable networks (section "Instantiations"): activations stay, without K.
    Recipe('el_mobilenet', link=ROLES, act='branch', paper_top1=56.4),

    # Table 3's other systems. Those that keep the host's own shortcut, one around a whole block:
    Recipe('xnor', pre='norm', scale_input=ROLES, scale_weight_grad=True, paper_top1=52.1),
    Recipe('xnor_pp', pre='norm', scale_weight=False, scale_output='rank1'),
    Recipe('xnor_pp_channel', pre='norm', scale_weight=False, scale_output='channel'),  # 55.5 on ResNet18, 57.1 above
    Recipe('abc', pre='norm', bases=(1, 1), paper_top1=45.2),
    Recipe('abc_5_5', pre='norm', bases=(5, 5)),  # 65.0 on ResNet18, 42.7 above
    Recipe('tbn', pre='norm', input_quantizer='ternary'),
    # Those with a shortcut around each convolution that keeps the channel count (in bottlenecks: around the spatial
    # one), and the host's around the block.
    Recipe('binarye', **_S, scale_weight=False, act='ends', paper_top1=57.9),
    Recipe('r2b', **_S_MIX, pre='norm', scale_output='gate', act='prelu', paper_top1=64.8),
    Recipe('el_r2b', link=ROLES, pre='norm', scale_output='gate', act='prelu', paper_top1=67.1),  # the dagger
    Recipe('reactnet', **_S_MIX, input_quantizer='approx', pre='shift', act='rprelu'),
    # Nobody's system: the dagger with ReActNet's RPReLU and ApproxSign; the norm's bias is ReActNet's threshold.
    Recipe('el_r2b_rprelu', link=ROLES, input_quantizer='approx', pre='norm', scale_output='gate', act='rprelu'),

    # The related work's weight-only quantizers: the host with other weights.
    Recipe('binaryconnect', **_WEIGHTS, scale_weight=False),
    Recipe('bwn', **_WEIGHTS, scale_weight_grad=True),
    Recipe('twn', **_WEIGHTS, weight_quantizer='twn'),
    Recipe('ttq', **_WEIGHTS, weight_quantizer='ttq'),
)

RECIPES: dict[str, Recipe] = {row.name: row for row in _ROWS}


def get_recipe(recipe: str | Recipe | dict[str, Any]) -> Recipe:
    """Return a recipe from its name, its data, or itself.

    Raises:
        ValueError: The name is unknown, or the data is not a recipe's.
        TypeError: It is none of these.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return Recipe.from_dict(recipe)
    if not isinstance(recipe, str):
        raise TypeError(f'recipe: found a {type(recipe).__name__}, expected a name, a Recipe or its dict')
    if recipe not in RECIPES:
        raise ValueError(f'recipe: unknown name {recipe!r}, expected one of {", ".join(RECIPES)}')
    return RECIPES[recipe]
