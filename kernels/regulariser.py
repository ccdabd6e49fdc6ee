"""The noise regulariser of pix2pix-zero: pulls a predicted noise map towards white Gaussian noise.

Everything is per image: an image in a batch gets what it would get alone. Gradients are analytic.

Source of the formulas: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), section 3.1, and the published
code pix2pixzero/pix2pix-zero, which squares the correlations and draws one offset per channel and pyramid level.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

COARSEST = 8  # the pyramid ends at the first level of at most this height

FORMS = ("random", "every", "paper")


def pyramid_heights(height: int) -> list[int]:
    """Heights of the pyramid's levels: 64, 32, 16, 8 for a height of 64."""
    heights = [height]
    while heights[-1] > COARSEST:
        heights.append(heights[-1] // 2)
    return heights


def _pyramid(noise: Tensor) -> list[Tensor]:
    """The map itself and its successive 2x2 averages."""
    levels = [noise]
    while levels[-1].shape[2] > COARSEST:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def _roll(maps: Tensor, offsets: Tensor, axis: int) -> Tensor:
    """`torch.roll` along `axis` (2 or 3) by another offset for each channel: `maps [B, C, h, w]`, `offsets [B, C]`."""
    size = maps.shape[axis]
    index = (torch.arange(size, device=maps.device) - offsets[..., None]) % size
    index = index[..., None] if axis == 2 else index[..., None, :]
    return maps.gather(axis, index.expand(maps.shape))


def _offsets_of_level(maps: Tensor, offsets: Tensor | None, level: int, form: str) -> Iterator[tuple[Tensor, float]]:
    """The offsets `[B, C]` that a level is correlated at, each with its weight in the sum."""
    batch_and_channels, size = maps.shape[:2], min(maps.shape[2:])
    if form == "random":
        if offsets is None:
            raise ValueError('the "random" form of the auto-correlation loss needs offsets [B, C, levels]')
        yield offsets[..., level].expand(batch_and_channels), 1.0
    elif form in ("every", "paper"):
        every = range(1, max(size // 2, 2)) if form == "every" else range(1, size)
        weight = 1.0 / len(every) if form == "every" else 1.0
        for offset in every:
            yield torch.full(batch_and_channels, offset, device=maps.device), weight
    else:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")


def autocorrelation_loss(noise: Tensor, offsets: Tensor | None = None, form: str = "random") -> Tensor:
    """How much each map of a pyramid of 2x2 averages resembles itself rolled along x and along y.

    With `m(d, axis) = mean over positions of n * roll(n, d, axis)`, summed over channels, levels and both axes:

    - `"random"`: `m(d)^2` at the given offset of each channel and level (what the authors' code does).
    - `"every"`: the mean of `m(d)^2` over d = 1 ... S/2 - 1: the expectation of the random form for offsets
      drawn from that range.
    - `"paper"`: the sum of `m(d)`, not squared, over d = 1 ... S - 1: equation 2 of the paper as printed.

    S is the smaller of the level's height and width. Levels are added until the height is at most 8.

    Args:
        noise: `[B, C, h, w]`, float32 or float64.
        offsets: for `"random"`, integers `[B, C, levels]` (or broadcastable to it); one serves both axes.
        form: one of the above.

    Returns:
        `[B]`, differentiable with respect to `noise`.

    Raises:
        ValueError: unknown form, or offsets missing.

    Source: Parmar et al. (2023), equation 2.
    """
    loss = noise.new_zeros(len(noise))
    for level, maps in enumerate(_pyramid(noise)):
        for d, weight in _offsets_of_level(maps, offsets, level, form):
            for axis in (2, 3):
                correlation = (maps * _roll(maps, d, axis)).mean((2, 3))
                loss = loss + weight * (correlation if form == "paper" else correlation.square()).sum(1)
    return loss


def autocorrelation_gradient(noise: Tensor, offsets: Tensor | None = None, form: str = "random") -> Tensor:
    """Gradient of `autocorrelation_loss` (of each image's own loss) with respect to the noise.

    `d m(d)^2 / dn = 2 m(d) (roll(n, d) + roll(n, -d)) / positions`; average pooling hands a quarter of a level's
    gradient to each of the four positions below.

    Args:
        noise, offsets, form: as in `autocorrelation_loss`.

    Returns:
        `[B, C, h, w]`.

    Raises:
        ValueError: unknown form, or offsets missing.
    """
    gradient = None
    levels = _pyramid(noise)
    for level in reversed(range(len(levels))):
        maps = levels[level]
        height, width = maps.shape[2:]
        here = torch.zeros_like(maps)
        for d, weight in _offsets_of_level(maps, offsets, level, form):
            for axis in (2, 3):
                rolled = _roll(maps, d, axis)
                slope = weight / (height * width)
                if form != "paper":
                    slope = 2 * slope * (maps * rolled).mean((2, 3), keepdim=True)
                here += slope * (rolled + _roll(maps, -d, axis))
        if gradient is not None:
            spread = F.interpolate(gradient, scale_factor=2, mode="nearest") / 4
            here[:, :, : spread.shape[2], : spread.shape[3]] += spread
        gradient = here
    return gradient


def kl_loss(noise: Tensor) -> Tensor:
    """`var + mean^2 - 1 - log(var + 1e-7)` of all values of an image: zero for zero mean and unit variance.

    Args:
        noise: `[B, C, h, w]`.

    Returns:
        `[B]`. The variance is the unbiased one and there is no factor 1/2, as in the authors' code.

    Source: Parmar et al. (2023), section 3.1 (the divergence of Kingma and Welling, 2014).
    """
    values = noise.flatten(1)
    variance = values.var(1)
    return variance + values.mean(1).square() - 1 - (variance + 1e-7).log()


def kl_gradient(noise: Tensor) -> Tensor:
    """Gradient of `kl_loss` (of each image's own loss) with respect to the noise, `[B, C, h, w]`."""
    values = noise.flatten(1)
    count = values.shape[1]
    mean, variance = values.mean(1, keepdim=True), values.var(1, keepdim=True)
    gradient = (1 - 1 / (variance + 1e-7)) * 2 * (values - mean) / (count - 1) + 2 * mean / count
    return gradient.view_as(noise)


def regularise_noise(
    noise: Tensor,
    offsets: Tensor,
    autocorrelation_strength: float = 20.0,
    kl_strength: float = 20.0,
    form: str = "random",
) -> Tensor:
    """The regularisation of one inversion step: rounds of auto-correlation steps and one KL step each.

    Args:
        noise: predicted noise, `[B, C, h, w]`.
        offsets: integers `[rounds, rolls, B or 1, C, levels]`; also sets the numbers of rounds and rolls (5 and 5 in
            the paper). Only the first two sizes count for the forms other than `"random"`.
        autocorrelation_strength: step length of the auto-correlation steps together; each of the `rolls` steps of a
            round takes `autocorrelation_strength / rolls`.
        kl_strength: step length of the KL step of a round.
        form: as in `autocorrelation_loss`.

    Returns:
        The regularised noise, a new tensor, computed in float32 or better.

    Source: Parmar et al. (2023), section 3.1; step schedule of the authors' code (`ddim_inv.py`).
    """
    noise = noise.to(torch.promote_types(noise.dtype, torch.float32), copy=True)
    rounds, rolls = offsets.shape[:2]
    for i in range(rounds):
        if autocorrelation_strength:
            for j in range(rolls):
                gradient = autocorrelation_gradient(noise, offsets[i, j], form)
                noise = noise - autocorrelation_strength / rolls * gradient
        if kl_strength:
            noise = noise - kl_strength * kl_gradient(noise)
    return noise
