"""Recipes: the rows of the paper's tables as data.

A `Recipe` answers how a network is binarized, a name in `RECIPES` is a row of a table. Convolutions are addressed by
their role: in a bottleneck by position (reduce, spatial, expand, also where 64 channels stay 64), elsewhere by shape.
"""
import dataclasses
import json
import zlib
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Union

from .quantizers import get_quantizer

__all__ = ['ROLES', 'Recipe', 'RECIPES', 'get_recipe', 'role_of_shape']

ROLES = (
    'reduce',      # 1x1 with fewer output than input channels; a bottleneck's first convolution
    'spatial',     # kernel larger than 1x1; a bottleneck's middle convolution
    'expand',      # 1x1 with more output than input channels; a bottleneck's last convolution
    'mix',         # 1x1 with as many output as input channels
    'downsample',  # strided depthwise convolution: MobileNet's downsampling
)
ACTS = ('keep', 'drop', 'branch')
GAMMAS = ('learnable', 'fixed')


def role_of_shape(
        in_channels: int,
        out_channels: int,
        kernel_size: Tuple[int, int],
        stride: Tuple[int, int],
        groups: int,
) -> str:
    """Role of a convolution that no known block gives a role."""
    if max(kernel_size) > 1:
        depthwise = groups == in_channels and groups > 1
        return 'downsample' if depthwise and max(stride) > 1 else 'spatial'
    if in_channels == out_channels:
        return 'mix'
    return 'reduce' if in_channels > out_channels else 'expand'


_ROLES = ((tuple, list), f'a sequence of roles from {ROLES}')
_BOOL = ((bool,), 'True or False')
_NAME = ((str,), 'a string')
_QUANTIZER = ((str, type(None)), 'a name or None')
_FIELD_TYPES = {
    'name': _NAME, 'input_quantizer': _QUANTIZER, 'weight_quantizer': _QUANTIZER, 'scale_weight': _BOOL,
    'scale_input': _ROLES, 'link': _ROLES, 'elastic': _BOOL, 'gamma': _NAME, 'residual': _BOOL, 'act': _NAME,
    'real': _ROLES, 'omit': _ROLES, 'paper_top1': ((int, float, type(None)), 'a number or None'),
    'version': ((int,), 'an integer'),
}


@dataclass(frozen=True)
class Recipe:
    """How to binarize a network. Immutable, validated, and equal to its JSON.

    Args:
        name: Name of the recipe.
        input_quantizer: 'ste', 'approx', or None for real inputs.
        weight_quantizer: 'ste', 'approx', or None for real weights.
        scale_weight: alpha on every binary weight (eq. 3).
        scale_input: Roles that get K (eq. 3).
        link: Roles that get an Elastic-Link (eq. 4).
        elastic: Links may squeeze and expand. If False, only convolutions that keep the channel count get one.
        gamma: 'learnable', or 'fixed' at its initial value (eq. 5).
        residual: Keep the host's residual shortcut.
        act: What happens to activations. 'drop': all are removed, the sign is the non-linearity. 'branch': each moves
            before the norm of its own convolution, conv -> act -> norm -> add, so that none stands before a sign.
            'keep': all stay where they are.
        real: Roles whose convolution stays float, inside its unit.
        omit: Roles whose convolution and norm are left out, so that only the link remains (Table 4).
        paper_top1: The paper's ImageNet top-1 for ResNet26 (MobileNet for `el_mobilenet`), None where it has none.
        version: Version of this format.

    Raises:
        ValueError: An unknown role, quantizer, gamma or act; an omitted role without a link; another version.
    """
    name: str
    input_quantizer: Optional[str] = 'ste'
    weight_quantizer: Optional[str] = 'ste'
    scale_weight: bool = True
    scale_input: Tuple[str, ...] = ()
    link: Tuple[str, ...] = ()
    elastic: bool = True
    gamma: str = 'learnable'
    residual: bool = True
    act: str = 'drop'
    real: Tuple[str, ...] = ('downsample',)
    omit: Tuple[str, ...] = ()
    paper_top1: Optional[float] = None
    version: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, getattr(self, field.name))
        for field in ('scale_input', 'link', 'real', 'omit'):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # JSON gives lists
            for role in self.__dict__[field]:
                if role not in ROLES:
                    raise ValueError(f'{field}: unknown role {role!r}, expected some of {ROLES}')
        get_quantizer(self.input_quantizer, 'input_quantizer')
        get_quantizer(self.weight_quantizer, 'weight_quantizer')
        for field, known in (('gamma', GAMMAS), ('act', ACTS)):
            if getattr(self, field) not in known:
                raise ValueError(f'{field}: found {getattr(self, field)!r}, expected one of {known}')
        missing = set(self.omit) - set(self.link)
        if missing:
            raise ValueError(f'omit: {sorted(missing)} would leave nothing at all, name it in link too')
        if self.version != 1:
            raise ValueError(f'version: found {self.version!r}, expected 1; a newer timm_el wrote this recipe')

    @staticmethod
    def _check_type(field: str, value: Any) -> None:
        types, expected = _FIELD_TYPES[field]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(f'{field}: found {value!r}, expected {expected}')

    @property
    def binarizes(self) -> bool:
        """False if no convolution gets a binary weight or a binary input."""
        return self.input_quantizer is not None or self.weight_quantizer is not None

    @property
    def code(self) -> int:
        """A 16-bit fingerprint of what the recipe computes, equal in both stages of two-stage training."""
        facts = dataclasses.asdict(self)
        for name in ('name', 'weight_quantizer', 'paper_top1', 'version'):
            facts.pop(name)
        return zlib.crc32(json.dumps(facts).encode()) & 0xffff

    def replace(self, **changes: Any) -> 'Recipe':
        """A copy with some fields changed; give it a `name` of its own."""
        return dataclasses.replace(self, **changes)

    def with_real_weights(self) -> 'Recipe':
        """Stage one of two-stage training: binary inputs, real weights; the state dict has the same keys."""
        return self.replace(weight_quantizer=None)

    def to_dict(self) -> Dict[str, Any]:
        """Plain data, as in JSON."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal recipe."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: Dict[str, Any]) -> 'Recipe':
        """Inverse of `to_dict`. Raises ValueError for a field that is unknown."""
        if not isinstance(data, dict):
            raise ValueError(f'recipe: found a {type(data).__name__}, expected an object with the fields of Recipe')
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f'recipe: unknown field {key!r}, expected some of {known}')
        if 'name' not in data:
            raise ValueError("recipe: the field 'name' is missing")
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> 'Recipe':
        """Inverse of `to_json`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(f'recipe: this is not JSON ({e})') from e
        return cls.from_dict(data)


SPATIAL = ('spatial', 'downsample')
# The paper's subscripts: s(queeze) = reduce, i(dentity) = spatial, e(xpand) = expand.
# S-ResNet (section "Effect of Scaling Activation"): a plain identity shortcut around each spatial convolution.
_S = dict(link=SPATIAL, elastic=False, gamma='fixed')

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
)

RECIPES: Dict[str, Recipe] = {row.name: row for row in _ROWS}


def get_recipe(recipe: Union[str, Recipe, Dict[str, Any]]) -> Recipe:
    """A recipe from its name, its data, or itself.

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
