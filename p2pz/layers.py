"""Convolutional building blocks shared by the UNet and the VAE. Parameter names are those of the diffusers layout."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2pz.kernels import add_residual, conv3x3, group_norm, merge_taps, upsampled_conv3x3
from p2pz.kernels.dispatch import HALF_DTYPES


def group_normed(norm: nn.GroupNorm, x: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`p2pz.kernels.group_norm` of `x [B, C, h, w]`, with its options, by the norm's settings."""
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **options)


class Conv3x3(nn.Conv2d):
    """3x3 convolution with a border of one zero, by `p2pz.kernels.conv3x3`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, out_channels, h, w]`."""
        return conv3x3(x, self.weight, self.bias)


Summands = tuple[Tensor, Tensor, Tensor]
"""See `ResnetBlock.summands`."""


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU, plus the input.

    Args:
        in_channels, out_channels: a 1x1 convolution carries the input over when they differ.
        groups: groups of both norms.
        eps: epsilon of both norms: 1e-5 in the UNet, 1e-6 in the VAE.
        time_channels: width of the time embedding that is added between the convolutions; None for none.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_channels: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def time_shift(self, time_embedding: Tensor) -> Tensor:
        """What is added to every position between the convolutions.

        Args:
            time_embedding: `[T, time_channels]`.

        Returns:
            `[T, out_channels]`: the embedding's projection, and the bias of the first convolution.
        """
        return self.time_emb_proj(F.silu(time_embedding)) + self.conv1.bias

    def summands(self, x: Tensor, shift: Tensor | None = None) -> Summands:
        """The block's result as three summands, for a reader who adds while reading; so no pass over memory is spent
        on biases.

        Args:
            x: `[B, in_channels, h, w]`.
            shift: `[B, out_channels]`, see `time_shift`; None in a block without time.

        Returns:
            The second convolution without its bias, `[B, out_channels, h, w]`; what is carried past both, same shape;
            the bias, `[out_channels]`.
        """
        normed, x = group_normed(self.norm1, x, silu=True, carry=True)
        hidden = conv3x3(normed, self.conv1.weight)
        shift = self.conv1.bias if shift is None else shift
        hidden = conv3x3(group_normed(self.norm2, hidden, silu=True, shift=shift), self.conv2.weight)
        if self.conv_shortcut is not None:
            x = to_map(pointwise(self.conv_shortcut, to_tokens(x)), *x.shape[2:])
        return hidden, x, self.conv2.bias

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None = None,
        changed: Callable[[Summands], Summands] = lambda summands: summands,
    ) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, out_channels, h, w]`: what `changed` makes of the `summands`, added."""
        hidden, carried, bias = changed(self.summands(x, shift))
        return to_map(add_residual(to_tokens(hidden), to_tokens(carried), bias), *x.shape[2:])


class Downsample(nn.Module):
    """Halve height and width with a strided convolution.

    The UNet pads symmetrically; the VAE only on the right and at the bottom (`padding=0`).
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, C, ceil(h / 2), ceil(w / 2)]` (floor in the VAE)."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Enlarge by nearest neighbour, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.register_buffer("merged", None, persistent=False)

    def fuse(self) -> None:
        """Lay the convolution out for a map that is not enlarged before, beside the weights as they are.

        Not in float32, for which there is no kernel.
        """
        self.merged = merge_taps(self.conv.weight) if self.conv.weight.dtype in HALF_DTYPES else None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`[B, C, h, w]` to twice that size, or to `size` where an odd size was halved before."""
        twice = 2 * x.shape[2], 2 * x.shape[3]
        if self.merged is not None and size in (None, twice):
            return upsampled_conv3x3(x, self.merged, self.conv.bias)
        return self.conv(F.interpolate(x, size=size or twice, mode="nearest"))


def to_tokens(x: Tensor) -> Tensor:
    """`[B, C, h, w]` to `[B, h * w, C]`; no copy when `x` is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """`[B, height * width, C]` to a channels-last `[B, C, height, width]`, without a copy."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def pointwise(projection: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
    """Apply a linear layer, or the 1x1 convolution that some checkpoints hold in its place, to `[B, N, C]` tokens."""
    return F.linear(tokens, projection.weight.flatten(1), projection.bias)


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Sinusoidal features of the timestep: cosines first, then sines.

    Args:
        timesteps: `[B]`, training steps (0 to 999).
        channels: width of the embedding, even.

    Returns:
        `[B, channels]` float32.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5, with frequencies 10000^(-2i / channels).
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * (10000.0**-exponent)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
