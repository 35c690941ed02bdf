"""Find what can be binarized: a table of known blocks, and the networks that are made of them.

A block of timm or torchvision is described by its conv-norm-act chains in the order in which they run, and by its
shortcut. `find_networks` gives the chains of every network in a model that consists of known blocks throughout.
"""
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Type

import torch.nn as nn
from timm.models import efficientnet, resnet
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from torchvision.models import resnet as tv_resnet

__all__ = ['Chain', 'Block', 'FoundBlock', 'Network', 'KNOWN_BLOCKS', 'find_networks', 'get_module', 'join_path']


def get_module(model: nn.Module, path: Optional[str]) -> Optional[nn.Module]:
    """The module at a path, None where the path is None or names an attribute that is None."""
    module: Optional[nn.Module] = model
    for name in path.split('.') if path else ():
        module = getattr(module, name)
    return module if path else None


@dataclass(frozen=True)
class Chain:
    """A convolution with the norm and activation that belong to it, as paths; `act` may stand behind an addition.

    `tail` names what the host applies behind the norm (squeeze-excite, drop path, drop block, blur). If the unit has a
    link, it moves into the branch, so that the real-valued signal is neither gated nor dropped. `no_link` says why a
    link would do harm there, `shift` True where only a new norm keeps the sign from being +1 everywhere.
    """
    conv: str
    norm: Optional[str] = None
    act: Optional[str] = None
    role: Optional[str] = None
    tail: Tuple[str, ...] = ()
    no_link: str = ''
    shift: bool = False

    def under(self, prefix: str) -> 'Chain':
        """The same chain inside the module `prefix`."""
        names = [join_path(prefix, name) for name in (self.conv, self.norm, self.act)]
        return Chain(*names, self.role, tuple(join_path(prefix, name) for name in self.tail))


def join_path(prefix: str, name: Optional[str]) -> Optional[str]:
    return f'{prefix}.{name}' if prefix and name else name


@dataclass(frozen=True)
class Block:
    """How a known block class runs: its chains in order, and its shortcut.

    Args:
        chains: The chains, relative to the block. The chains of a root come before those of its blocks, but for `last`.
        root: The class is a whole network, made of known blocks in sequence.
        last: Chains of a root that come after its blocks.
        pool: Attribute of a root that pools behind the stem.
        ignore: Attributes that hold small float side branches (squeeze-excite).
        shortcut: Attribute of the module on the shortcut (None in it means identity); None if the block has no
            shortcut that can be taken away.
        per_conv: The block has one shortcut around its two convolutions. With links on spatial convolutions it gets
            one a convolution in its place, as in Bi-Real Net: the host's shortcut module goes around the first.
    """
    chains: Tuple[Chain, ...]
    shortcut: Optional[str] = None
    per_conv: bool = False
    root: bool = False
    last: Tuple[Chain, ...] = ()
    ignore: Tuple[str, ...] = ()
    pool: Optional[str] = None


KNOWN_BLOCKS: Dict[Type[nn.Module], Block] = {
    # timm
    resnet.BasicBlock: Block((
        Chain('conv1', 'bn1', 'act1', tail=('drop_block', 'aa')),
        Chain('conv2', 'bn2', 'act2', tail=('se', 'drop_path')),
    ), 'downsample', per_conv=True, ignore=('se',)),
    resnet.Bottleneck: Block((
        Chain('conv1', 'bn1', 'act1', 'reduce'),
        Chain('conv2', 'bn2', 'act2', 'spatial', tail=('drop_block',)),
        Chain('conv3', 'bn3', 'act3', 'expand', tail=('se', 'drop_path')),
    ), 'downsample', ignore=('se',)),
    resnet.ResNet: Block((Chain('conv1', 'bn1', 'act1'), Chain('maxpool')), root=True, pool='maxpool'),
    DepthwiseSeparableConv: Block((Chain('conv_dw', 'bn1'), Chain('conv_pw', 'bn2')), ignore=('se',)),
    efficientnet.EfficientNet: Block((Chain('conv_stem', 'bn1'),), root=True, last=(Chain('conv_head', 'bn2'),)),
    efficientnet.EfficientNetFeatures: Block((Chain('conv_stem', 'bn1'),), root=True),
    # torchvision
    tv_resnet.BasicBlock: Block((
        Chain('conv1', 'bn1', 'relu'),
        Chain('conv2', 'bn2', 'relu'),
    ), 'downsample', per_conv=True),
    tv_resnet.Bottleneck: Block((
        Chain('conv1', 'bn1', 'relu', 'reduce'),
        Chain('conv2', 'bn2', 'relu', 'spatial'),
        Chain('conv3', 'bn3', 'relu', 'expand'),
    ), 'downsample'),
    tv_resnet.ResNet: Block((Chain('conv1', 'bn1', 'relu'),), root=True, pool='maxpool'),
}


def known_block(module: nn.Module) -> Optional[Block]:
    """The description of a block whose class, or a base class with the same forward, is known."""
    cls = type(module)
    for base in cls.__mro__:
        if base in KNOWN_BLOCKS and all(
                getattr(cls, name, None) is getattr(base, name, None)
                for name in ('forward', 'forward_features', '_forward_impl')):
            return KNOWN_BLOCKS[base]
    return None


@dataclass(frozen=True)
class FoundBlock:
    """A known block in a network: its path, its description, and its chains as full paths."""
    path: str
    block: Block
    chains: Tuple[Chain, ...]

    @property
    def shortcut(self) -> Optional[str]:
        """Path of the shortcut module."""
        return join_path(self.path, self.block.shortcut)


@dataclass(frozen=True)
class Network:
    """A known root with its blocks in the order in which they run; what a binarized network is made of."""
    path: str
    blocks: Tuple[FoundBlock, ...]

    @property
    def chains(self) -> List[Chain]:
        """All chains, in the order in which they run."""
        return [chain for found in self.blocks for chain in found.chains]


def is_activation(module: Optional[nn.Module]) -> bool:
    """An activation of torch or timm."""
    if module is None or isinstance(module, (nn.Identity, nn.Softmax, nn.MultiheadAttention)):
        return False
    return type(module).__module__.startswith(('torch.nn.modules.activation', 'timm.layers.activations'))


def find_networks(model: nn.Module) -> Tuple[List[Network], Dict[str, str]]:
    """Known networks in a model, and for the convolutions that none of them holds, why not.

    A network is taken only if every convolution and activation in it belongs to a chain, a shortcut or a side branch:
    nothing is known about what comes between blocks that are not known, and a ReLU there would leave a sign at +1.
    """
    networks, strangers = [], {}
    for path, module in model.named_modules():
        block = known_block(module)
        if block is None or not block.root:
            continue
        blocks = [FoundBlock(path, block, tuple(_expand_chains(model, path, block.chains)))]
        side = []
        for name, inner in module.named_modules(prefix=path):
            known = known_block(inner)
            if inner is not module and known is not None:
                blocks.append(FoundBlock(name, known, tuple(_expand_chains(model, name, known.chains))))
                side += [join_path(name, part) for part in (known.shortcut, *known.ignore) if part]
        blocks.append(FoundBlock(path, Block(block.last), tuple(_expand_chains(model, path, block.last))))
        network = Network(path, tuple(blocks))
        held = {chain.conv for chain in network.chains}
        foreign = [
            name for name, inner in module.named_modules(prefix=path) if isinstance(inner, nn.Conv2d)
            and name not in held and not any(name == part or name.startswith(f'{part}.') for part in side)]
        acts = {chain.act for chain in network.chains}
        foreign += [
            name for name, inner in module.named_modules(prefix=path) if is_activation(inner) and name not in acts
            and not any(name.startswith(f'{part}.') for part in [*side, *(c.norm for c in network.chains if c.norm)])]
        if foreign:
            reason = f'{type(module).__name__} holds blocks that are not known, at {foreign[0]}'
            strangers.update({
                name: reason for name, inner in module.named_modules(prefix=path) if isinstance(inner, nn.Conv2d)})
        else:
            networks.append(network)
    return networks, strangers


def _expand_chains(model: nn.Module, path: str, chains: Sequence[Chain]) -> Iterator[Chain]:
    """Chains as full paths; a Sequential in place of a convolution (a deep stem) becomes its own chains."""
    for chain in chains:
        chain = chain.under(path)
        conv = get_module(model, chain.conv)
        if isinstance(conv, nn.Conv2d):
            yield chain
        elif isinstance(conv, nn.Sequential):
            parts = [(f'{chain.conv}.{name}', module) for name, module in conv.named_children()]
            starts = [i for i, (_, module) in enumerate(parts) if isinstance(module, nn.Conv2d)]
            for start, stop in zip(starts, starts[1:] + [len(parts)]):
                followers = parts[start + 1:stop]
                norm = next((p for p, m in followers if hasattr(m, 'running_mean') or hasattr(m, 'num_groups')), None)
                act = next((p for p, m in followers if p != norm and not any(True for _ in m.parameters())
                            and 'torch.nn.modules.activation' in type(m).__module__), None)
                yield Chain(parts[start][0], norm, act) if followers else Chain(parts[start][0], chain.norm, chain.act)
