"""Unit that stands where a host had a convolution, its norm and its activation."""
import torch
import torch.nn as nn

HOST_ATTRIBUTES = (
    'in_channels', 'out_channels', 'in_features', 'out_features', 'kernel_size', 'stride', 'padding', 'dilation',
    'groups', 'padding_mode')


class ZeroShortcut(nn.Module):
    """Zero in place of the shortcut of a host's block: returns a 0-D tensor, which the host adds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(())


class BinaryUnit(nn.Module):
    """One convolution of a binarized network with all that belongs to it (paper, eq. 4).

    unit(x) = post( branch(x) + link(x) ),   branch(x) = tail( norm_act( scale( z, conv(z) ) ) ),   z = pre(x)

    norm_act is act(norm(y)), or norm(act(y)) if `act_first`. Every part but one of conv and link may be None.

    Shapes: those of `conv`; x (N, C_in, H, W) -> (N, C_out, H', W') around a convolution.

    Args:
        conv: `BinaryConv2d`, `BinaryLinear`, a float layer, or None (then the unit is its link alone).
        norm: Normalization of the convolution's output.
        act: Activation inside the branch.
        link: `ElasticLink` or any module that maps x to the shape of the branch's output.
        pre: Applied to the branch's input (the link sees x itself).
        post: Applied to the sum.
        tail: End of the branch: the host's modules between norm and addition (squeeze-excite, drop path, blur).
        act_first: conv -> act -> norm in place of conv -> norm -> act.
        scale: Module of two arguments, the convolution's real input z (before its sign) and its output y, that gives y
            times a factor (`output_scale.py`: XNOR-Net++'s learned scales, Real-to-Binary's gate).

    Raises:
        ValueError: Neither conv nor link is given.
    """
    __jit_unused_properties__ = ['weight', 'bias']

    def __init__(
            self,
            conv: nn.Module | None,
            norm: nn.Module | None = None,
            act: nn.Module | None = None,
            link: nn.Module | None = None,
            pre: nn.Module | None = None,
            post: nn.Module | None = None,
            tail: nn.Module | None = None,
            act_first: bool = False,
            scale: nn.Module | None = None,
    ) -> None:
        if conv is None and link is None:
            raise ValueError('conv, link: both are None, a unit needs at least one of them')
        super().__init__()
        # Registered in the order in which they run.
        self.pre = pre
        self.conv = conv
        self.scale = scale
        if act_first:
            self.act, self.norm = act, norm
        else:
            self.norm, self.act = norm, act
        self.tail = tail
        self.link = link
        self.post = post
        self.act_first = act_first
        self.take_host_attributes(link if conv is None else conv)

    def take_host_attributes(self, layer: nn.Module) -> None:
        """Set what hosts read off the layer that the unit replaces, `HOST_ATTRIBUTES`, from `layer`."""
        for name in HOST_ATTRIBUTES:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    @property
    def weight(self) -> torch.Tensor | None:
        """Latent weight, None for a unit without a convolution; hosts ask it for its dtype and device."""
        return None if self.conv is None else self.conv.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias of the convolution."""
        return None if self.conv is None else self.conv.bias

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """Compute all that stands beside the link: x (N, C_in, H, W) -> (N, C_out, H', W')."""
        if self.pre is not None:
            x = self.pre(x)
        if self.scale is None:
            x = self.conv(x)
        else:
            x = self.scale(x, self.conv(x))
        if self.act_first:
            if self.act is not None:
                x = self.act(x)
        if self.norm is not None:
            x = self.norm(x)
        if not self.act_first:
            if self.act is not None:
                x = self.act(x)
        if self.tail is not None:
            x = self.tail(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv is None:
            y = self.link(x)
        elif self.link is None:
            y = self.branch(x)
        else:
            y = self.branch(x) + self.link(x)
        return y if self.post is None else self.post(y)


@torch.no_grad()
def expected_statistics(weight: torch.Tensor, act: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance (O,) of act(z) per channel, z ~ N(0, sum of squared weights): unit-variance inputs."""
    dd = {'device': weight.device, 'dtype': torch.float32}
    normal = torch.special.ndtri((torch.arange(256, **dd) + 0.5) / 256)
    std = weight.detach().float().flatten(1).square().sum(1).sqrt()
    values = act.forward((std[:, None] * normal).to(weight.dtype)[None, :, :, None]).float().flatten(2)[0]
    return values.mean(1), values.var(1)
