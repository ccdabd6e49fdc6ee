"""3x3 convolution of a map that is enlarged to twice its size before, without enlarging it.

Of the nine neighbours of a pixel in the large map, several are copies of one pixel of the small one. So each of the
four kinds of pixels (even and odd rows and columns, "phases") is a 2x2 convolution of the small map, whose weights are
sums: 4/9 of the operations. Shi et al., "Is the deconvolution layer the same as a convolutional layer?" (2016), has
the equivalence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pz.kernels.convolution import launch_settings, map_like, split_evenly, sum_parts
from p2pz.kernels.dispatch import HALF_DTYPES, channels_last, check_bias, choose_triton, launch, library_op, tl, triton
from p2pz.kernels.tiles import dot

# Positions of the small map (B * h * w) up to: BLOCK_M, BLOCK_N, BLOCK_K; programs to aim at; warps; stages. Found on
# an H200 with the three layers of Stable Diffusion 1.5, for one to four images of 512 x 512.
_TILES = {
    64: (64, 64, 128, 264, 4, 3),
    192: (64, 128, 64, 264, 4, 4),
    384: (128, 128, 64, 264, 4, 3),
    512: (128, 256, 64, 264, 8, 3),
    768: (128, 128, 64, 264, 4, 3),
    1 << 31: (128, 128, 64, 264, 8, 3),
}
_TILES_TRANSPOSED = {
    192: (64, 64, 128, 264, 4, 3),
    256: (64, 128, 64, 264, 4, 4),
    1 << 31: (128, 128, 64, 264, 4, 3),
}
_WIDE_TRANSPOSED = (128, 256, 64, 132, 8, 3)
"""Instead of the last, where 256 divides the channels."""


def merge_taps(weight: Tensor) -> Tensor:
    """The four 2x2 convolutions that a 3x3 convolution of an enlarged map is.

    Args:
        weight: `[Cout, Cin, 3, 3]`.

    Returns:
        `[2, 2, Cout, 2, 2, Cin]`, dtype of the weight: row and column of the phase, output channel, row and column of
        the tap, input channel. Phase 0 reads the pixel before and its own, phase 1 its own and the one behind. Sums
        are taken in float32 or wider.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rows = _merge(wide, 2)  # [p, Cout, Cin, a, 3]
    return _merge(rows, 4).permute(1, 0, 2, 4, 5, 3).to(weight.dtype).contiguous()


def _merge(weight: Tensor, axis: int) -> Tensor:
    """Three taps along an axis to two of them for each phase, which is a new first axis."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)])


def upsampled_conv3x3_reference(x: Tensor, merged: Tensor, bias: Tensor) -> Tensor:
    """Four 2x2 convolutions, their results laid into each other."""
    phases = [
        [F.conv2d(F.pad(x, (1 - q, q, 1 - p, p)), merged[p, q].permute(0, 3, 1, 2), bias.to(x.dtype)) for q in (0, 1)]
        for p in (0, 1)
    ]
    # [B, Cout, h, 2, w, 2]
    return torch.stack([torch.stack(row, dim=-1) for row in phases], dim=3).flatten(4, 5).flatten(2, 3)


@triton.jit
def _upsampled_conv3x3_kernel(
    p_x,  # [positions, channels_in] of the small map; if TRANSPOSED, of the large one, [4 * positions, channels_in]
    p_w,  # [phases, channels_out, taps, channels_in], or [phases, channels_in, taps, channels_out] if TRANSPOSED
    p_bias,  # [channels_out] or None
    p_y,  # [4 * positions, channels_out], or [positions, channels_out] if TRANSPOSED; splits of them, float32, if SPLIT
    positions,  # of the small map, those of all images, row by row
    height,
    width,
    channels_in,
    channels_out,
    WHOLE: tl.constexpr,  # channels_in is a multiple of BLOCK_K and channels_out of BLOCK_N
    TRANSPOSED: tl.constexpr,  # the gradient: channels change places, a program sums over all phases
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,  # results are parts, to be summed
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < positions, o_n < channels_out
    o_column, o_row = o_m % width, o_m // width % height
    o_large = o_m // width * (4 * width) + 2 * o_column  # the first of a pixel's four in the large map
    # What is read is a map of SCALE times the positions' size. [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
    if TRANSPOSED:
        SCALE: tl.constexpr = 2
        TAPS: tl.constexpr = 16
        i_s, splits = tl.program_id(2), tl.num_programs(2)
        p_a = p_x + o_large[:, None].to(tl.int64) * channels_in + o_k[None, :]
        p_b = p_w + o_k[:, None] * (4 * channels_out) + o_n[None, :]
        o_y = o_m
    else:
        SCALE: tl.constexpr = 1
        TAPS: tl.constexpr = 4
        i_s, splits = tl.program_id(2) // 4, tl.num_programs(2) // 4
        i_p, i_q = tl.program_id(2) // 2 % 2, tl.program_id(2) % 2
        p_a = p_x + o_m[:, None].to(tl.int64) * channels_in + o_k[None, :]
        p_b = p_w + (((i_p * 2 + i_q) * channels_out + o_n) * (4 * channels_in))[None, :] + o_k[:, None]
        o_y = o_large + i_p * 2 * width + i_q
    steps = tl.cdiv(channels_in, BLOCK_K)  # of a tap
    b_y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_k in range(i_s * (TAPS * steps) // splits, (i_s + 1) * (TAPS * steps) // splits):
        i_tap, i_c = i_k // steps, i_k % steps * BLOCK_K
        i_a, i_b = i_tap // 2 % 2, i_tap % 2
        if TRANSPOSED:  # i_tap counts phases and the taps of each
            row, column = 2 - 2 * i_a - i_tap // 8, 2 - 2 * i_b - i_tap // 4 % 2
            o_b = (i_tap // 4 * channels_in + i_c) * (4 * channels_out) + i_tap % 4 * channels_out
        else:
            row, column = i_a - 1 + i_p, i_b - 1 + i_q
            o_b = i_tap * channels_in + i_c
        o_r, o_c = SCALE * o_row + row, SCALE * o_column + column
        m_a = m_m & (o_r >= 0) & (o_r < SCALE * height) & (o_c >= 0) & (o_c < SCALE * width)
        m_a = m_a[:, None]
        o_a = (row * (SCALE * width) + column) * channels_in + i_c
        if WHOLE:
            b_a = tl.load(p_a + o_a, mask=m_a, other=0.0)
            b_b = tl.load(p_b + o_b)
        else:
            m_k = o_k < channels_in - i_c
            b_a = tl.load(p_a + o_a, mask=m_a & m_k[None, :], other=0.0)
            b_b = tl.load(p_b + o_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_y = dot(b_a, b_b, b_y)
    if SPLIT:
        p_y += i_s.to(tl.int64) * (positions if TRANSPOSED else 4 * positions) * channels_out
    elif p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_y = o_y[:, None].to(tl.int64) * channels_out + o_n[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def plan(positions: int, channels_in: int, channels_out: int, transposed: bool) -> list[int]:
    """BLOCK_M positions, BLOCK_N output channels, BLOCK_K input channels a step; splits of the sum; warps; stages."""
    tiles = _TILES_TRANSPOSED if transposed else _TILES
    tile = next(row for most, row in tiles.items() if positions <= most)
    if transposed and positions > 256 and channels_out % 256 == 0:
        tile = _WIDE_TRANSPOSED
    taps, maps = (16, 1) if transposed else (4, 4)
    return split_evenly(tile, positions, channels_in, channels_out, taps, maps)


def _launch(source: Tensor, merged: Tensor, bias: Tensor | None, transposed: bool, tile: list[int]) -> Tensor:
    source = channels_last(source)
    channels_in, (height, width) = source.shape[1], source.shape[2:]
    if transposed:
        height, width, channels_out = height // 2, width // 2, merged.shape[5]
        y = map_like(source, channels_out, (height, width))
    else:
        channels_out = merged.shape[2]
        y = map_like(source, channels_out, (2 * height, 2 * width))
    positions = len(source) * height * width
    tile = tile or plan(positions, channels_in, channels_out, transposed)
    block_m, block_n, _, splits, *_ = tile
    part = y
    if splits > 1:
        part = torch.empty(splits, y.numel(), dtype=torch.float32, device=y.device)
    bias = None if bias is None else bias.contiguous()
    launch(
        _upsampled_conv3x3_kernel,
        (triton.cdiv(positions, block_m), triton.cdiv(channels_out, block_n), splits * (1 if transposed else 4)),
        source,
        merged.contiguous(),
        bias,
        part,
        positions,
        height,
        width,
        channels_in,
        channels_out,
        TRANSPOSED=transposed,
        **launch_settings(tile, channels_in, channels_out),
    )
    if splits > 1:
        sum_parts(part, bias, y)
    return y


@library_op("p2pz::upsampled_conv3x3")
def _upsampled_conv3x3(x: Tensor, merged: Tensor, bias: Tensor, tile: list[int]) -> Tensor:
    """`tile` overrides `plan` unless it is empty."""
    return _launch(x, merged, bias, False, tile)


@_upsampled_conv3x3.register_fake
def _(x, merged, bias, tile):
    return map_like(x, merged.shape[2], (2 * x.shape[2], 2 * x.shape[3]))


@library_op("p2pz::upsampled_conv3x3_input_gradient")
def _upsampled_conv3x3_input_gradient(dy: Tensor, merged: Tensor, tile: list[int]) -> Tensor:
    return _launch(dy, merged, None, True, tile)


@_upsampled_conv3x3_input_gradient.register_fake
def _(dy, merged, tile):
    return map_like(dy, merged.shape[5], (dy.shape[2] // 2, dy.shape[3] // 2))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[1])


def _gradient(ctx, dy):
    if dy is None or not ctx.needs_input_grad[0]:
        return None, None, None, None
    return _upsampled_conv3x3_input_gradient(dy, *ctx.saved_tensors, []), None, None, None


_upsampled_conv3x3.register_autograd(_gradient, setup_context=_save)


def upsampled_conv3x3(x: Tensor, merged: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """3x3 convolution with a border of one zero, of a map that nearest neighbours enlarge to twice its size before.

    Args:
        x: `[B, Cin, h, w]`. The kernel takes float16 and bfloat16, and reads channels-last memory in place; it copies
            other layouts.
        merged: `[2, 2, Cout, 2, 2, Cin]`, dtype of `x`: what `merge_taps` makes of the convolution's weight. The kernel
            gives no gradient for it.
        bias: `[Cout]`, dtype of `x`, or float32. No gradient either.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[B, Cout, 2 * h, 2 * w]`, dtype of `x`. The kernel's is channels-last; it adds in float32 and rounds once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; or `"triton"` was asked for what the kernel cannot do.
    """
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be [B, Cin, h, w] with no empty axis, not {list(x.shape)}")
    batch, channels_in, height, width = x.shape
    fits = merged.ndim == 6 and merged.shape[:2] == (2, 2) and merged.shape[3:] == (2, 2, channels_in)
    if not fits or merged.shape[2] == 0:
        raise ValueError(
            f"merged must be [2, 2, Cout, 2, 2, {channels_in}] to go with x {list(x.shape)}, not {list(merged.shape)}"
        )
    if merged.dtype != x.dtype or merged.device != x.device:
        raise ValueError(
            f"merged is {merged.dtype} on {merged.device}, but x is {x.dtype} on {x.device}: they must agree"
        )
    channels_out = merged.shape[2]
    unsupported = check_bias(bias, x, channels_out, f"merged {list(merged.shape)}")
    if x.dtype not in HALF_DTYPES:
        unsupported = f"{x.dtype} is not supported: float16 and bfloat16 are"
    if 4 * batch * height * width * max(channels_in, channels_out) >= 1 << 31:
        unsupported = "maps of 2^31 elements or more are not supported"
    if merged.requires_grad and torch.is_grad_enabled():
        unsupported = "merged requires a gradient: the kernel gives one for x only"
    if backend == "auto" and (channels_in % 8 or channels_out % 8):  # memory cannot be read 16 bytes at a time
        backend = "torch"
    if choose_triton(backend, unsupported, x, merged, bias):
        return _upsampled_conv3x3(x, merged, bias, [])
    return upsampled_conv3x3_reference(x, merged, bias)
