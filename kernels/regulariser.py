"""The noise regulariser of pix2pix-zero: pulls a predicted noise map towards white Gaussian noise.

Everything is per image: an image in a batch gets what it would get alone. Gradients are analytic. In the kernels one
program walks through a whole image (or one channel of it), in phases between barriers.

Source of the formulas: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), section 3.1, and the published
code pix2pixzero/pix2pix-zero, which squares the correlations and draws one offset per channel and pyramid level.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pz.kernels.dispatch import choose_triton, launch, library_op, tl, triton

COARSEST = 8  # the pyramid ends at the first level of at most this height, or too narrow to be halved

FORMS = ("random", "every", "paper")


def pyramid_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Heights and widths of the pyramid's levels: (64, 96), (32, 48), (16, 24), (8, 12) for a map of (64, 96).

    The published code looks at the height alone, and fails where a level would be less than 1 wide.
    """
    sizes = [(height, width)]
    while sizes[-1][0] > COARSEST and sizes[-1][1] > 1:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def _pyramid(noise: Tensor) -> list[Tensor]:
    """The map itself and its successive 2x2 averages."""
    levels = [noise]
    for _ in pyramid_sizes(*noise.shape[2:])[1:]:
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


def autocorrelation_loss_reference(noise: Tensor, offsets: Tensor | None = None, form: str = "random") -> Tensor:
    """`autocorrelation_loss` in plain torch, differentiable any number of times; float64 stays float64."""
    noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
    loss = noise.new_zeros(len(noise))
    for level, maps in enumerate(_pyramid(noise)):
        for d, weight in _offsets_of_level(maps, offsets, level, form):
            for axis in (2, 3):
                correlation = (maps * _roll(maps, d, axis)).mean((2, 3))
                loss = loss + weight * (correlation if form == "paper" else correlation.square()).sum(1)
    return loss


def autocorrelation_gradient_reference(noise: Tensor, offsets: Tensor | None = None, form: str = "random") -> Tensor:
    """`autocorrelation_gradient` in plain torch, differentiable; float64 stays float64."""
    noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
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


def regularise_noise_reference(
    noise: Tensor,
    offsets: Tensor,
    autocorrelation_strength: float = 20.0,
    kl_strength: float = 20.0,
    form: str = "random",
) -> Tensor:
    """`regularise_noise` in plain torch; float64 stays float64."""
    noise = noise.to(torch.promote_types(noise.dtype, torch.float32), copy=True)
    rounds, rolls = offsets.shape[:2]
    for i in range(rounds):
        if autocorrelation_strength:
            for j in range(rolls):
                gradient = autocorrelation_gradient_reference(noise, offsets[i, j], form)
                noise = noise - autocorrelation_strength / rolls * gradient
        if kl_strength:
            noise = noise - kl_strength * kl_gradient(noise)
    return noise


# Kernels. A program's working memory is two pyramids. The pyramid of one channel is float32 and begins at a multiple of
# stride_c; its level l begins H * W * l numbers further on and has h * w numbers, where h = H >> l and w = W >> l. All
# of it stays in the caches. H and W are compile-time numbers: one compilation for each size of latents, and no division
# by what is known only at run time. A tile is flat: BLOCK_C channels, one after the other, of BLOCK positions each.
#
# Most reads are at rolled and so unaligned positions, where only four bytes at a time can be read. All other accesses
# must be just as narrow: the compiler would give neighbouring threads positions four apart for the sake of a few wide
# accesses, and scatter all the others. So stride_c is a number known at run time that 16 does not divide.

TILES = {"loss": (4096, 4), "regularise": (4096, 8)}
"""For each kernel, how many numbers a tile has at most, and the warps of a program."""


@triton.jit
def _spread(b_c, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """From one number for each channel, `[BLOCK_C, 1]`, to a tile `[BLOCK_C * BLOCK]`."""
    return tl.reshape(tl.broadcast_to(b_c, [BLOCK_C, BLOCK]), [BLOCK_C * BLOCK])


@triton.jit
def _positions(start, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """The positions of a tile in the maps of its channels."""
    return (start + tl.arange(0, BLOCK_C * BLOCK) % BLOCK).to(tl.uint32)


@triton.jit
def _load_rolled_y(p_maps, o_i, d, mask, H: tl.constexpr, W: tl.constexpr):
    """The maps at positions `o_i`, rolled along y by `d`, 0 to H; `H - d` rolls the other way."""
    o_rolled = o_i - d * W  # unsigned: less than zero is more than anything
    return tl.load(p_maps + tl.minimum(o_rolled, o_rolled + H * W), mask=mask, other=0.0)


@triton.jit
def _load_rolled_x(p_maps, o_i, d, mask, W: tl.constexpr):
    """The maps at positions `o_i`, rolled along x by `d`, 0 to W; `W - d` rolls the other way."""
    return tl.load(p_maps + (o_i - d + tl.where(o_i % W < d, W, 0)), mask=mask, other=0.0)


@triton.jit
def _wrap(d, SIZE: tl.constexpr):
    """The offset modulo the size, also a negative one."""
    return ((d % SIZE + SIZE) % SIZE).to(tl.uint32)


@triton.jit
def _copy(
    p_from,  # [C, SIZE]
    p_to,  # [C, SIZE]
    stride_from,
    stride_to,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy maps. Let no other tile have the size of this one: it would get the layout for this one's wide accesses."""
    for start in range(0, C * SIZE, BLOCK):
        o_i = (start + tl.arange(0, BLOCK)).to(tl.uint32)
        o_c, o_p = o_i // SIZE, o_i % SIZE
        b_n = tl.load(p_from + o_c * stride_from + o_p, mask=o_c < C, other=0.0)
        tl.store(p_to + o_c * stride_to + o_p, b_n.to(p_to.dtype.element_ty), mask=o_c < C)
    tl.debug_barrier()


@triton.jit
def _pool(
    p_fine,  # [C, H * W]
    p_coarse,  # [C, (H // 2) * (W // 2)], written
    stride_c,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
):
    """2x2 averages; an odd last row or column is left out."""
    h: tl.constexpr = H // 2
    w: tl.constexpr = W // 2
    for start in range(0, C * h * w, TILE):
        o_i = (start + tl.arange(0, TILE)).to(tl.uint32)
        o_c, o_y, o_x = o_i // (h * w), o_i // w % h, o_i % w
        mask = o_c < C
        p_upper = p_fine + (o_c * stride_c + o_y * (2 * W) + o_x * 2)
        b_sum = tl.load(p_upper, mask=mask, other=0.0) + tl.load(p_upper + 1, mask=mask, other=0.0)
        b_sum += tl.load(p_upper + W, mask=mask, other=0.0) + tl.load(p_upper + (W + 1), mask=mask, other=0.0)
        tl.store(p_coarse + (o_c * stride_c + o_y * w + o_x), 0.25 * b_sum, mask=mask)
    tl.debug_barrier()


@triton.jit
def _correlate(
    p_maps,  # [BLOCK_C * BLOCK] to the maps [H * W] of each channel
    mask_c,  # [BLOCK_C * BLOCK]
    d_y,  # [BLOCK_C * BLOCK] or a number, 0 to H
    d_x,  # [BLOCK_C * BLOCK] or a number, 0 to W
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The correlations `[BLOCK_C, 1]` of the maps with themselves, rolled along y and rolled along x."""
    b_y = tl.zeros([BLOCK_C * BLOCK], dtype=tl.float32)
    b_x = tl.zeros([BLOCK_C * BLOCK], dtype=tl.float32)
    for start in range(0, H * W, BLOCK):
        o_i = _positions(start, BLOCK_C, BLOCK)
        mask = mask_c & (o_i < H * W)
        b_n = tl.load(p_maps + o_i, mask=mask, other=0.0)
        b_y += b_n * _load_rolled_y(p_maps, o_i, d_y, mask, H, W)
        b_x += b_n * _load_rolled_x(p_maps, o_i, d_x, mask, W)
    b_y = tl.sum(tl.reshape(b_y, [BLOCK_C, BLOCK]), axis=1, keep_dims=True)
    b_x = tl.sum(tl.reshape(b_x, [BLOCK_C, BLOCK]), axis=1, keep_dims=True)
    return b_y / (H * W), b_x / (H * W)


@triton.jit
def _autocorrelate_level(
    p_maps,  # [C, H * W]
    p_result,  # [C, H * W], written
    p_coarse,  # [C, (H // 2) * (W // 2)]: gradients of the next coarser level
    p_offsets,  # [C]
    stride_c,
    stride_oc,
    step,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    COARSER: tl.constexpr,  # whether there is a coarser level
    FORM: tl.constexpr,
    GRADIENT: tl.constexpr,
    UPDATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_autocorrelate` for one level."""
    side: tl.constexpr = H if H < W else W
    halves: tl.constexpr = side // 2 - 1 if side > 4 else 1
    others: tl.constexpr = side - 1 if side > 1 else 1
    count: tl.constexpr = 1 if FORM == "random" else (halves if FORM == "every" else others)
    # There is always an offset, so that a result is written. A side of 1 has none in the printed form: it weighs 0.
    weight: tl.constexpr = 1 / halves if FORM == "every" else (0.0 if FORM == "paper" and side == 1 else 1.0)
    o_c = tl.arange(0, BLOCK_C * BLOCK) // BLOCK
    mask_c = o_c < C
    p_maps += o_c * stride_c
    p_result += o_c * stride_c
    p_coarse += o_c * stride_c
    b_loss = tl.zeros([BLOCK_C, 1], dtype=tl.float32)
    for i_d in range(count):
        if FORM == "random":
            o_d = tl.arange(0, BLOCK_C)[:, None]
            d = tl.load(p_offsets + o_d * stride_oc, mask=o_d < C, other=0).to(tl.int32)  # [BLOCK_C, 1]
            d_y, d_x = _spread(_wrap(d, H), BLOCK_C, BLOCK), _spread(_wrap(d, W), BLOCK_C, BLOCK)
        else:
            d_y, d_x = i_d + 1, i_d + 1
        b_corr_y, b_corr_x = _correlate(p_maps, mask_c, d_y, d_x, H, W, BLOCK_C, BLOCK)
        if FORM == "paper":
            b_loss += weight * (b_corr_y + b_corr_x)
            slope_y, slope_x = weight / (H * W), weight / (H * W)
        else:
            b_loss += weight * (b_corr_y * b_corr_y + b_corr_x * b_corr_x)
            slope_y = _spread(b_corr_y * (2 * weight / (H * W)), BLOCK_C, BLOCK)
            slope_x = _spread(b_corr_x * (2 * weight / (H * W)), BLOCK_C, BLOCK)
        if GRADIENT:
            for start in range(0, H * W, BLOCK):
                o_i = _positions(start, BLOCK_C, BLOCK)
                mask = mask_c & (o_i < H * W)
                b_y = _load_rolled_y(p_maps, o_i, d_y, mask, H, W) + _load_rolled_y(p_maps, o_i, H - d_y, mask, H, W)
                b_x = _load_rolled_x(p_maps, o_i, d_x, mask, W) + _load_rolled_x(p_maps, o_i, W - d_x, mask, W)
                b_sum = slope_y * b_y + slope_x * b_x + tl.load(p_result + o_i, mask=mask & (i_d > 0), other=0.0)
                if COARSER:
                    o_y, o_x = o_i // W // 2, o_i % W // 2
                    mask_coarse = mask & (i_d == 0) & (o_y < H // 2) & (o_x < W // 2)
                    b_sum += 0.25 * tl.load(p_coarse + (o_y * (W // 2) + o_x), mask=mask_coarse, other=0.0)
                if UPDATE:
                    b_n = tl.load(p_maps + o_i, mask=mask & (i_d == count - 1), other=0.0)
                    b_sum = tl.where(i_d == count - 1, b_n - step * b_sum, b_sum)
                tl.store(p_result + o_i, b_sum, mask=mask)
            tl.debug_barrier()
    return b_loss


@triton.jit
def _autocorrelate(
    p_from,  # pyramids [C], of which the first level is given
    p_to,  # pyramids [C], written: the result, and the gradients of the coarser levels
    p_offsets,  # [C, LEVELS]
    stride_c,
    stride_oc,
    stride_ol,
    step,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LEVELS: tl.constexpr,
    FORM: tl.constexpr,
    GRADIENT: tl.constexpr,  # whether the result is wanted
    UPDATE: tl.constexpr,  # whether the result is the noise after a step down the gradient, or the gradient
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,  # power of two, at least H * W
):
    """Write the result and return the loss of each channel, `[BLOCK_C, 1]`."""
    for level in tl.static_range(1, LEVELS):
        _pool(
            p_from + (level - 1) * (H * W),
            p_from + level * (H * W),
            stride_c,
            C,
            H >> (level - 1),
            W >> (level - 1),
            BLOCK_C * (BLOCK if POSITIONS >> (2 * level) > BLOCK else POSITIONS >> (2 * level)),
        )
    b_loss = tl.zeros([BLOCK_C, 1], dtype=tl.float32)
    for level in tl.static_range(LEVELS - 1, -1, -1):
        b_loss += _autocorrelate_level(
            p_from + level * (H * W),
            p_to + level * (H * W),
            p_to + (level + 1) * (H * W),
            p_offsets + level * stride_ol,
            stride_c,
            stride_oc,
            step,
            C,
            H >> level,
            W >> level,
            level < LEVELS - 1,
            FORM,
            GRADIENT,
            UPDATE and level == 0,
            BLOCK_C,
            BLOCK if POSITIONS >> (2 * level) > BLOCK else POSITIONS >> (2 * level),
        )
    return b_loss


@triton.jit
def _loss_kernel(
    p_noise,  # [B * C, H * W]
    p_offsets,  # [B, C, LEVELS]
    p_scratch,  # [2, B * C, stride_c] float32; the first half is enough without the gradient
    p_loss,  # [B * C] float32, written
    p_gradient,  # [B * C, H * W] float32, written
    stride_c,
    stride_ob,
    stride_oc,
    stride_ol,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LEVELS: tl.constexpr,
    FORM: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    i_map = tl.program_id(0).to(tl.int64)
    p_offsets += i_map // C * stride_ob + i_map % C * stride_oc
    p_from = p_scratch + i_map * stride_c
    p_to = p_from + tl.num_programs(0).to(tl.int64) * stride_c
    _copy(p_noise + i_map * (H * W), p_from, 0, 0, 1, H * W, 2 * BLOCK)
    b_loss = _autocorrelate(
        p_from, p_to, p_offsets, 0, 0, stride_ol, 0.0, 1, H, W, LEVELS, FORM, GRADIENT, False, 1, BLOCK, POSITIONS
    )
    tl.store(p_loss + i_map, tl.sum(b_loss))
    if GRADIENT:
        _copy(p_to, p_gradient + i_map * (H * W), 0, 0, 1, H * W, 2 * BLOCK)


@triton.jit
def _kl_step(p_maps, stride_c, strength, C: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One step down the divergence of maps `[C, SIZE]`, in place."""
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, C * SIZE, BLOCK):
        o_i = (start + tl.arange(0, BLOCK)).to(tl.uint32)
        b_sum += tl.load(p_maps + (o_i // SIZE * stride_c + o_i % SIZE), mask=o_i < C * SIZE, other=0.0)
    mean = tl.sum(b_sum) / (C * SIZE)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, C * SIZE, BLOCK):
        o_i = (start + tl.arange(0, BLOCK)).to(tl.uint32)
        b_n = tl.load(p_maps + (o_i // SIZE * stride_c + o_i % SIZE), mask=o_i < C * SIZE, other=0.0)
        b_sum += tl.where(o_i < C * SIZE, (b_n - mean) * (b_n - mean), 0.0)
    variance = tl.sum(b_sum) / (C * SIZE - 1)
    slope = strength * 2 * (1 - 1 / (variance + 1e-7)) / (C * SIZE - 1)
    for start in range(0, C * SIZE, BLOCK):
        o_i = (start + tl.arange(0, BLOCK)).to(tl.uint32)
        p_n = p_maps + (o_i // SIZE * stride_c + o_i % SIZE)
        b_n = tl.load(p_n, mask=o_i < C * SIZE, other=0.0)
        tl.store(p_n, b_n - slope * (b_n - mean) - strength * 2 * mean / (C * SIZE), mask=o_i < C * SIZE)
    tl.debug_barrier()


@triton.jit
def _regularise_kernel(
    p_noise,  # [B, C, H * W]
    p_offsets,  # [rounds, rolls, B, C, LEVELS]
    p_scratch,  # [2, B, C, stride_c] float32
    p_out,  # [B, C, H * W] float32, written
    rounds,
    rolls,
    step,  # length of one auto-correlation step
    kl_strength,
    stride_c,
    stride_oi,
    stride_oj,
    stride_ob,
    stride_oc,
    stride_ol,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LEVELS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_offsets += i_b * stride_ob
    p_from = p_scratch + i_b * C * stride_c
    p_to = p_from + tl.num_programs(0).to(tl.int64) * C * stride_c
    _copy(p_noise + i_b * (C * H * W), p_from, H * W, stride_c, C, H * W, 2 * BLOCK_C * BLOCK)
    for i in range(rounds):
        for j in range(rolls):
            p_choice = p_offsets + i * stride_oi + j * stride_oj
            _autocorrelate(
                p_from,
                p_to,
                p_choice,
                stride_c,
                stride_oc,
                stride_ol,
                step,
                C,
                H,
                W,
                LEVELS,
                FORM,
                True,
                True,
                BLOCK_C,
                BLOCK,
                POSITIONS,
            )
            p_from, p_to = p_to, p_from
        if kl_strength != 0:
            _kl_step(p_from, stride_c, kl_strength, C, H * W, BLOCK_C * BLOCK)
    _copy(p_from, p_out + i_b * (C * H * W), stride_c, H * W, C, H * W, 2 * BLOCK_C * BLOCK)


def _pyramid_stride(height: int, width: int) -> int:
    """How many numbers are set apart for the pyramid of a channel; 16 does not divide it."""
    return len(pyramid_sizes(height, width)) * height * width | 8


@library_op("p2pz::autocorrelation")
def _autocorrelation(noise: Tensor, offsets: Tensor, form: str, gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses `[B, C]` of the channels, and their gradient `[B, C, h, w]` (empty unless asked for), both float32."""
    noise = noise.contiguous()
    batch, channels, height, width = noise.shape
    levels = len(pyramid_sizes(height, width))
    stride = _pyramid_stride(height, width)
    scratch = noise.new_empty((1 + gradient, batch, channels, stride), dtype=torch.float32)
    loss = noise.new_empty((batch, channels), dtype=torch.float32)
    slope = noise.new_empty(noise.shape if gradient else 0, dtype=torch.float32)
    tile, warps = TILES["loss"]
    positions = triton.next_power_of_2(height * width)
    strides = offsets.stride() if form == "random" else (0, 0, 0)
    launch(
        _loss_kernel,
        (batch * channels,),
        noise,
        offsets,
        scratch,
        loss,
        slope,
        stride,
        *strides,
        C=channels,
        H=height,
        W=width,
        LEVELS=levels,
        FORM=form,
        GRADIENT=gradient,
        BLOCK=min(tile, positions),
        POSITIONS=positions,
        num_warps=warps,
    )
    return loss, slope


@_autocorrelation.register_fake
def _(noise, offsets, form, gradient):
    shape = noise.shape if gradient else 0
    return noise.new_empty(noise.shape[:2], dtype=torch.float32), noise.new_empty(shape, dtype=torch.float32)


def _save_gradient(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _autocorrelation_backward(ctx, upstream, _):
    if torch.is_grad_enabled():
        raise RuntimeError('second derivatives of the auto-correlation loss need backend="torch"')
    if upstream is None:
        return None, None, None, None
    (gradient,) = ctx.saved_tensors
    return (upstream[:, :, None, None] * gradient).to(ctx.dtype), None, None, None


_autocorrelation.register_autograd(_autocorrelation_backward, setup_context=_save_gradient)


@library_op("p2pz::regularise_noise")
def _regularise_noise(
    noise: Tensor, offsets: Tensor, rounds: int, rolls: int, step: float, kl_strength: float, form: str
) -> Tensor:
    """The schedule; `step` is the length of one auto-correlation step. The result is float32."""
    noise = noise.contiguous()
    batch, channels, height, width = noise.shape
    levels = len(pyramid_sizes(height, width))
    stride = _pyramid_stride(height, width)
    scratch = noise.new_empty((2, batch, channels, stride), dtype=torch.float32)
    out = torch.empty_like(noise, dtype=torch.float32)
    tile, warps = TILES["regularise"]
    positions = triton.next_power_of_2(height * width)
    padded_channels = triton.next_power_of_2(channels)
    strides = offsets.stride() if form == "random" else (0, 0, 0, 0, 0)
    launch(
        _regularise_kernel,
        (batch,),
        noise,
        offsets,
        scratch,
        out,
        rounds,
        rolls,
        step,
        kl_strength,
        stride,
        *strides,
        C=channels,
        H=height,
        W=width,
        LEVELS=levels,
        FORM=form,
        BLOCK_C=padded_channels,
        BLOCK=min(max(tile // padded_channels, 1), positions),
        POSITIONS=positions,
        num_warps=warps,
    )
    return out


@_regularise_noise.register_fake
def _(noise, offsets, rounds, rolls, step, kl_strength, form):
    return noise.new_empty(noise.shape, dtype=torch.float32)


def _check(noise: Tensor, offsets: Tensor | None, form: str, *outer: str) -> Tensor:
    """The offsets `[*outer, B, C, levels]` on the noise's device; without meaning for forms other than "random"."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    if noise.ndim != 4 or 0 in noise.shape or not noise.is_floating_point():
        raise ValueError(f"noise must be floats [B, C, h, w] with no empty axis, not {noise.dtype} {list(noise.shape)}")
    batch, channels, height, width = noise.shape
    sizes = pyramid_sizes(height, width)
    lead = offsets.shape[: len(outer)] if outer else ()
    if form != "random":
        return noise.new_empty((*lead, 0), dtype=torch.int64)
    if offsets is None:
        raise ValueError('the "random" form of the auto-correlation loss needs offsets [B, C, levels]')
    shape = (*lead, batch, channels, len(sizes))
    names = ", ".join([*outer, f"{batch} or 1", f"{channels} or 1", f"{len(sizes)}"])
    fits = (
        offsets.ndim == len(shape)
        and offsets.shape[-3] in (1, batch)
        and offsets.shape[-2] in (1, channels)
        and offsets.shape[-1] == len(sizes)
    )
    if not fits or offsets.is_floating_point() or offsets.dtype == torch.bool:
        raise ValueError(f"offsets must be integers [{names}], not {offsets.dtype} {list(offsets.shape)}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (offsets < 0) | (offsets > torch.tensor([max(size) for size in sizes]))
        if wrong.any():
            *_, level = at = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(f"offsets at level {level} must be 0 to {max(sizes[level])}, not {offsets[at].item()}")
    return offsets.to(noise.device, non_blocking=True).expand(shape)


def _no_gradient(noise: Tensor, of: str) -> str | None:
    """Why a kernel without derivatives cannot serve, if so."""
    return f"the derivatives of {of} are not supported" if noise.requires_grad and torch.is_grad_enabled() else None


def autocorrelation_loss(
    noise: Tensor, offsets: Tensor | None = None, form: str = "random", *, backend: str = "auto"
) -> Tensor:
    """How much each map of a pyramid of 2x2 averages resembles itself rolled along x and along y.

    With `m(d, axis) = mean over positions of n * roll(n, d, axis)`, summed over channels, levels and both axes:

    - `"random"`: `m(d)^2` at the given offset of each channel and level (what the authors' code does).
    - `"every"`: the mean of `m(d)^2` over d = 1 ... S/2 - 1: the expectation of the random form for offsets
      drawn from that range.
    - `"paper"`: the sum of `m(d)`, not squared, over d = 1 ... S - 1: equation 2 of the paper as printed.

    S is the smaller of the level's height and width. Levels are added until the height is at most 8 or the
    width is 1.

    Args:
        noise: `[B, C, h, w]`, any float dtype.
        offsets: for `"random"`, integers `[B or 1, C or 1, levels]` from 0 to the larger side of the level; one serves
            both axes. On the GPU they are not checked, for that would need a synchronisation, but taken modulo the
            sides.
        form: one of the above.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[B]`, float32 (float64 for float64 noise), differentiable with respect to `noise`: once by the kernel, any
        number of times with `backend="torch"`.

    Raises:
        ValueError: unknown form or backend, offsets missing or wrong, or arguments that an explicitly chosen kernel
            does not support.

    Source: Parmar et al. (2023), equation 2.
    """
    offsets = _check(noise, offsets, form)
    if not choose_triton(backend, None, noise):
        return autocorrelation_loss_reference(noise, offsets, form)
    return _autocorrelation(noise, offsets, form, noise.requires_grad and torch.is_grad_enabled())[0].sum(1)


def autocorrelation_gradient(
    noise: Tensor, offsets: Tensor | None = None, form: str = "random", *, backend: str = "auto"
) -> Tensor:
    """Gradient of `autocorrelation_loss` (of each image's own loss) with respect to the noise.

    `d m(d)^2 / dn = 2 m(d) (roll(n, d) + roll(n, -d)) / positions`; average pooling hands a quarter of a level's
    gradient to each of the four positions below.

    Args:
        noise, offsets, form, backend: as in `autocorrelation_loss`.

    Returns:
        `[B, C, h, w]`, float32 (float64 for float64 noise). Only the reference can be differentiated again.

    Raises:
        ValueError: as `autocorrelation_loss`.
    """
    offsets = _check(noise, offsets, form)
    if not choose_triton(backend, _no_gradient(noise, "the gradient"), noise):
        return autocorrelation_gradient_reference(noise, offsets, form)
    return _autocorrelation(noise, offsets, form, True)[1]


def regularise_noise(
    noise: Tensor,
    offsets: Tensor,
    autocorrelation_strength: float = 20.0,
    kl_strength: float = 20.0,
    form: str = "random",
    *,
    backend: str = "auto",
) -> Tensor:
    """The regularisation of one inversion step: rounds of auto-correlation steps and one KL step each.

    Args:
        noise: predicted noise, `[B, C, h, w]`, any float dtype.
        offsets: integers `[rounds, rolls, B or 1, C or 1, levels]`, as in `autocorrelation_loss`; also sets the numbers
            of rounds and rolls (5 and 5 in the paper). Only the first two sizes count for the forms other than
            `"random"`.
        autocorrelation_strength: step length of the auto-correlation steps together; each of the `rolls` steps of a
            round takes `autocorrelation_strength / rolls`.
        kl_strength: step length of the KL step of a round.
        form: as in `autocorrelation_loss`.
        backend: `"auto"`, `"torch"` or `"triton"`. The kernel is one launch; it has no derivative.

    Returns:
        The regularised noise, a new tensor, computed in float32 (float64 for float64 noise).

    Raises:
        ValueError: as `autocorrelation_loss`.

    Source: Parmar et al. (2023), section 3.1; step schedule of the authors' code (`ddim_inv.py`).
    """
    if offsets.ndim < 2:
        raise ValueError(
            f"offsets must begin with the numbers of rounds and rolls, but their shape is {list(offsets.shape)}"
        )
    rounds, rolls = offsets.shape[:2]
    offsets = _check(noise, offsets, form, "rounds", "rolls")
    if not choose_triton(backend, _no_gradient(noise, "the schedule"), noise):
        return regularise_noise_reference(noise, offsets, autocorrelation_strength, kl_strength, form)
    if not autocorrelation_strength:
        rolls = 0
    step = autocorrelation_strength / max(rolls, 1)
    return _regularise_noise(noise, offsets, rounds, rolls, step, kl_strength, form)
