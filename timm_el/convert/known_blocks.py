"""Known blocks: a table of what is in the blocks of timm's and torchvision's ResNets and MobileNets."""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch.nn as nn
from timm.models import FeatureDictNet, FeatureListNet, efficientnet, resnet
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from torchvision.models import resnet as tv_resnet
from torchvision.models._utils import IntermediateLayerGetter

from ..dry_run import LayerRun
from ..kinds import is_act, is_norm
from .sites import Group, Network, Place, Reason, Site, get_module, join_path, role_of


@dataclass(frozen=True)
class Names:
    """Attributes of a block that hold a convolution and what belongs to it; see `Site`."""
    conv: str
    norm: str | None = None
    act: str | None = None
    role: str | None = None
    tail: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """Description of a known class of blocks, in the order of its forward pass.

    Args:
        sites: In the order in which they run. Those of a root come before its blocks, but for `last`.
        shortcut: Attribute of the module on the shortcut (None in it means identity); None if the block has no
            shortcut that can be taken away.
        is_basic: The block has one shortcut around its two convolutions.
        is_root: The class is a whole network, made of known blocks in sequence.
        last: Sites of a root that come after its blocks.
        sides: Attributes that hold small float side branches (squeeze-excite).
        pool: Attribute of a root that pools behind the stem.
        head: Attribute of a root that holds its classifier; whatever is in there stays float.
    """
    sites: tuple[Names, ...]
    shortcut: str | None = None
    is_basic: bool = False
    is_root: bool = False
    last: tuple[Names, ...] = ()
    sides: tuple[str, ...] = ()
    pool: str | None = None
    head: str | None = None


KNOWN_BLOCKS: dict[type[nn.Module], Block] = {
    # timm
    resnet.BasicBlock: Block((
        Names('conv1', 'bn1', 'act1', tail=('drop_block', 'aa')),
        Names('conv2', 'bn2', 'act2', tail=('se', 'drop_path')),
    ), 'downsample', is_basic=True, sides=('se',)),
    resnet.Bottleneck: Block((
        Names('conv1', 'bn1', 'act1', 'reduce'),
        Names('conv2', 'bn2', 'act2', 'spatial', tail=('drop_block',)),
        Names('conv3', 'bn3', 'act3', 'expand', tail=('se', 'drop_path')),
    ), 'downsample', sides=('se',)),
    resnet.ResNet: Block((Names('conv1', 'bn1', 'act1'), Names('maxpool')), is_root=True, pool='maxpool', head='fc'),
    # features_only=True: the same attributes, without a classifier
    **dict.fromkeys((FeatureListNet, FeatureDictNet), Block(
        (Names('conv1', 'bn1', 'act1'), Names('maxpool')), is_root=True, pool='maxpool')),
    DepthwiseSeparableConv: Block((Names('conv_dw', 'bn1'), Names('conv_pw', 'bn2')), sides=('se',)),
    efficientnet.EfficientNet: Block(
        (Names('conv_stem', 'bn1'),), is_root=True, last=(Names('conv_head', 'bn2'),), head='classifier'),
    efficientnet.EfficientNetFeatures: Block((Names('conv_stem', 'bn1'),), is_root=True),
    # torchvision
    tv_resnet.BasicBlock: Block((
        Names('conv1', 'bn1', 'relu'),
        Names('conv2', 'bn2', 'relu'),
    ), 'downsample', is_basic=True),
    tv_resnet.Bottleneck: Block((
        Names('conv1', 'bn1', 'relu', 'reduce'),
        Names('conv2', 'bn2', 'relu', 'spatial'),
        Names('conv3', 'bn3', 'relu', 'expand'),
    ), 'downsample'),
    tv_resnet.ResNet: Block((Names('conv1', 'bn1', 'relu'),), is_root=True, pool='maxpool', head='fc'),
    IntermediateLayerGetter: Block((Names('conv1', 'bn1', 'relu'),), is_root=True, pool='maxpool'),
}


def known_block(module: nn.Module) -> Block | None:
    """Return the description of a block whose class, or a base class with the same forward, is known, or None."""
    cls = type(module)
    for base in cls.__mro__:
        if base in KNOWN_BLOCKS and all(
                getattr(cls, name, None) is getattr(base, name, None)
                for name in ('forward', 'forward_features', '_forward_impl')):
            return KNOWN_BLOCKS[base]
    return None


def find_known_networks(model: nn.Module, runs: dict[str, LayerRun]) -> list[Network] | None:
    """Return the networks of known blocks in a model, or None if it has none, or one in which something is not known.

    A network is known only if every convolution and activation in it belongs to a site, a shortcut, a side branch or
    the classifier, or is a convolution that never runs: nothing is known about what comes between blocks that are not
    known, and a ReLU there would leave a sign at +1. Convolutions of a model outside of its known networks (a decoder
    on a backbone) are in no site.

    Args:
        model: The model.
        runs: Runs of its layers (`dry_run.run_layers`), empty if they are not known.
    """
    networks = []
    for path, module in model.named_modules():
        block = known_block(module)
        if block is not None and block.is_root and _has_stem(module, block):
            network = _network(model, path, module, block, runs)
            if network is None:
                return None
            networks.append(network)
    return networks or None


def _has_stem(root: nn.Module, block: Block) -> bool:
    """Return whether a root has the attributes of its stem: a list of features may be that of any network."""
    stem = block.sites[0]
    return all(hasattr(root, name) for name in (stem.conv, stem.norm, stem.act, block.pool) if name)


def _network(
        model: nn.Module, path: str, root: nn.Module, block: Block, runs: dict[str, LayerRun]) -> Network | None:
    """Return the network of a known root, or None if there is something in it that is not known."""
    head = join_path(path, block.head)
    inside = {
        name: module for name, module in root.named_modules(prefix=path)
        if not (head and (name == head or name.startswith(f'{head}.')))
        and not (runs and isinstance(module, nn.Conv2d) and name not in runs)}
    blocks = {name: known for name, module in inside.items() if module is not root and (known := known_block(module))}
    groups = [Group(tuple(_sites(model, path, block.sites)))]
    groups += [_group(model, name, known) for name, known in blocks.items()]
    groups.append(Group(tuple(_sites(model, path, block.last))))
    sides = [join_path(name, part) for name, known in blocks.items() for part in known.sides]
    shortcuts = [join_path(name, known.shortcut) for name, known in blocks.items() if known.shortcut]
    sites = [site for group in groups for site in group.sites]
    if not sites or _has_strangers(inside, sites, [*sides, *shortcuts]):
        return None
    first = replace(sites[0], kept=Reason.FIRST.why())
    groups[0] = replace(groups[0], sites=(first, *groups[0].sites[1:]))
    pool = join_path(path, block.pool)
    network = Network(
        tuple(groups), stem=groups[0].sites[-1], stem_pool=Place(pool, get_module(model, pool)) if pool else None,
        image_conv=first.conv, side_paths=tuple(f'{side}.' for side in sides))
    return replace(network, stride=_stride(network))


def _group(model: nn.Module, path: str, block: Block) -> Group:
    shortcut = join_path(path, block.shortcut)
    place = Place(shortcut, get_module(model, shortcut)) if block.shortcut else None
    return Group(tuple(_sites(model, path, block.sites)), place, block.is_basic)


def _has_strangers(inside: dict[str, nn.Module], sites: Sequence[Site], beside: Sequence[str]) -> bool:
    """Return whether some convolution or activation is neither in a site nor beside the path."""
    convs = {site.path for site in sites}
    acts = {site.act.path for site in sites if site.act}
    norms = [site.norm.path for site in sites if site.norm]

    def under(name: str, prefixes: Sequence[str]) -> bool:
        return any(name.startswith(f'{prefix}.') for prefix in prefixes)

    return any(
        isinstance(module, nn.Conv2d) and name not in convs and name not in beside and not under(name, beside)
        or is_act(module) and name not in acts and not under(name, [*beside, *norms])
        for name, module in inside.items())


def _sites(model: nn.Module, path: str, rows: Sequence[Names]) -> Iterator[Site]:
    """Yield the sites of a block; a Sequential in place of a convolution (a deep stem) becomes its own sites."""
    for names in rows:
        conv, norm, act = (_place_at(model, join_path(path, name)) for name in (names.conv, names.norm, names.act))
        tail = tuple(Place(p, get_module(model, p)) for p in (join_path(path, name) for name in names.tail))
        if conv is None:
            continue
        if isinstance(conv.module, nn.Conv2d):
            yield Site(conv, norm, act, role_of(conv.module, names.role), tail)
        elif isinstance(conv.module, nn.Sequential):
            yield from _sites_of_row(conv, norm, act)


def _place_at(model: nn.Module, path: str | None) -> Place | None:
    module = get_module(model, path)
    return None if module is None else Place(path, module)


def _sites_of_row(row: Place, norm: Place | None, act: Place | None) -> Iterator[Site]:
    """Yield the sites of convolutions, norms and activations in a row; the last one has what comes behind the row."""
    parts = [Place(f'{row.path}.{name}', module) for name, module in row.module.named_children()]
    starts = [i for i, part in enumerate(parts) if isinstance(part.module, nn.Conv2d)]
    for start, stop in zip(starts, [*starts[1:], len(parts)]):
        conv, after = parts[start], parts[start + 1:stop]
        if after:
            own_norm = next((part for part in after if is_norm(part.module)), None)
            own_act = next((part for part in after if is_act(part.module)), None)
        else:
            own_norm, own_act = norm, act
        yield Site(conv, own_norm, own_act, role_of(conv.module))


def _stride(network: Network) -> int:
    """Return the stride of the last features to the image: every site of a known network is on its one path."""
    strides = [max(site.conv.module.stride) for site in network.sites]
    blurs = [place.module for site in network.sites for place in site.tail if place.path.endswith('.aa')]
    for pool in (network.stem_pool and network.stem_pool.module, *blurs):
        for module in pool.modules() if pool is not None else ():
            stride = getattr(module, 'stride', 1)
            if not isinstance(module, nn.Conv2d):  # convolutions are in sites
                strides.append(max(stride) if isinstance(stride, (tuple, list)) else stride)
    return math.prod(strides)
