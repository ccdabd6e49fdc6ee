"""3x3 convolution of small maps: the sum is split over programs, so that all processors read weights at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pz.kernels.dispatch import (
    HALF_DTYPES,
    channels_last,
    check_bias,
    choose_triton,
    launch,
    library_op,
    tl,
    triton,
)
from p2pz.kernels.tiles import dot

FEWEST = 64
"""Channels: tiles of fewer would be mostly padding."""

# Where the kernel was faster than cuDNN 9 on an H200: positions (B * h * w) up to; input channels from; output channels
# up to; or None, where it was not. BLOCK_M, BLOCK_N, BLOCK_K; programs to aim at; warps; stages.
_WINS = {
    64: (FEWEST, 1 << 31, (64, 64, 128, 264, 4, 3)),
    256: (FEWEST, 1 << 31, (64, 128, 64, 264, 4, 4)),
    512: None,
    768: (1536, 1 << 31, (128, 256, 64, 132, 8, 3)),
    2048: None,
    3072: (FEWEST, 640, (128, 128, 64, 132, 4, 4)),
}
_ELSEWHERE = (128, 128, 64, 264, 8, 3)
# For the first and the last layer, which have four channels on one side; cuDNN took up to five times as long.
_FEW_IN, _FEW_OUT, FEW = (64, 128, 16, 264, 4, 3), (64, 16, 64, 512, 4, 3), 8

SUM_TILE = (512, 4)
"""Elements and warps of a program that sums partial results."""


def _tile(positions: int, channels_in: int, channels_out: int) -> tuple[int, ...] | None:
    """The tile for sizes at which the kernel was faster than cuDNN."""
    if min(channels_in, channels_out) <= FEW and max(channels_in, channels_out) >= FEWEST:
        return _FEW_IN if channels_in <= FEW else _FEW_OUT
    if channels_in % 8 or channels_out % 8:  # memory cannot be read 16 bytes at a time
        return None
    row = next((row for most, row in _WINS.items() if positions <= most), None)
    return row[2] if row and channels_in >= row[0] and FEWEST <= channels_out <= row[1] else None


def plan(positions: int, channels_in: int, channels_out: int) -> list[int]:
    """BLOCK_M positions, BLOCK_N output channels, BLOCK_K input channels a step; splits of the sum; warps; stages."""
    tile = _tile(positions, channels_in, channels_out) or _ELSEWHERE
    return split_evenly(tile, positions, channels_in, channels_out, taps=9)


def split_evenly(
    tile: tuple[int, ...], positions: int, channels_in: int, channels_out: int, taps: int, maps: int = 1
) -> list[int]:
    """A tile with the splits of the sum over `taps` in place of the programs to aim at, for `maps` of one size."""
    block_m, block_n, block_k, programs, warps, stages = tile
    tiles = maps * triton.cdiv(positions, block_m) * triton.cdiv(channels_out, block_n)
    steps = taps * triton.cdiv(channels_in, block_k)
    return [block_m, block_n, block_k, max(1, min(programs // tiles, steps // 4)), warps, stages]


def launch_settings(tile: list[int], channels_in: int, channels_out: int) -> dict[str, int]:
    """A plan as keyword arguments of a launch."""
    block_m, block_n, block_k, splits, warps, stages = tile
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": splits > 1}
    whole = channels_in % block_k == 0 and channels_out % block_n == 0
    return blocks | {"WHOLE": whole, "num_warps": warps, "num_stages": stages}


def conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`conv2d(x, weight, bias)` with a border of one zero."""
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), padding=1)


def _layout(x: Tensor) -> torch.memory_format:
    """That in which PyTorch would convolve a map."""
    planar = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if planar else torch.channels_last


class _KeepingTheWeightAlone(torch.autograd.Function):
    """`conv3x3_reference`, its weight frozen; PyTorch would keep `x` too, though only weights' gradients read it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        ctx.like = x.shape, x.dtype, _layout(x)
        return conv3x3_reference(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        shape, dtype, memory_format = ctx.like
        unread = torch.empty(shape, dtype=dtype, device=dy.device, memory_format=memory_format)  # its layout counts
        settings = (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, False, False)
        return torch.ops.aten.convolution_backward(dy, unread, weight, None, *settings)[0], None, None


@triton.jit
def _conv3x3_kernel(
    p_x,  # [positions, channels_in], positions of all images, row by row
    p_w,  # [channels_out, 9, channels_in], or [channels_in, 9, channels_out] if TRANSPOSED
    p_bias,  # [channels_out] or None
    p_y,  # [positions, channels_out], or float32 [splits, positions, channels_out]
    positions,
    height,  # sizes are no constants, lest every layer be compiled anew
    width,
    channels_in,
    channels_out,
    WHOLE: tl.constexpr,  # channels_in is a multiple of BLOCK_K and channels_out of BLOCK_N
    TRANSPOSED: tl.constexpr,  # the gradient: channels change places, taps are read backwards
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,  # results are parts, to be summed
):
    i_s, splits = tl.program_id(2), tl.num_programs(2)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < positions, o_n < channels_out
    # Bit t: the neighbour at tap t is inside the map. Three columns and three rows of taps cross.
    o_column, o_row = o_m % width, o_m // width % height
    b_columns = 0b010010010 | tl.where(o_column > 0, 0b001001001, 0) | tl.where(o_column < width - 1, 0b100100100, 0)
    b_rows = 0b000111000 | tl.where(o_row > 0, 0b000000111, 0) | tl.where(o_row < height - 1, 0b111000000, 0)
    b_inside = tl.where(m_m, b_columns & b_rows, 0)
    # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
    p_a = p_x + o_m[:, None].to(tl.int64) * channels_in + o_k[None, :]
    if TRANSPOSED:
        p_b = p_w + o_k[:, None] * (9 * channels_out) + o_n[None, :]
    else:
        p_b = p_w + o_n[None, :] * (9 * channels_in) + o_k[:, None]
    steps = tl.cdiv(channels_in, BLOCK_K)  # of a tap
    b_y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_k in range(i_s * (9 * steps) // splits, (i_s + 1) * (9 * steps) // splits):
        i_tap, i_c = i_k // steps, i_k % steps * BLOCK_K
        m_a = (((b_inside >> i_tap) & 1) != 0)[:, None]
        shift = (i_tap // 3 - 1) * width + i_tap % 3 - 1
        o_b = i_c * (9 * channels_out) + (8 - i_tap) * channels_out if TRANSPOSED else i_tap * channels_in + i_c
        if WHOLE:
            b_a = tl.load(p_a + (shift * channels_in + i_c), mask=m_a, other=0.0)
            b_b = tl.load(p_b + o_b)
        else:
            m_k = o_k < channels_in - i_c
            b_a = tl.load(p_a + (shift * channels_in + i_c), mask=m_a & m_k[None, :], other=0.0)
            b_b = tl.load(p_b + o_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_y = dot(b_a, b_b, b_y)
    o_y = o_m[:, None].to(tl.int64) * channels_out + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if not SPLIT:
        if p_bias is not None:
            b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    else:
        p_y += i_s.to(tl.int64) * positions * channels_out
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def _sum_kernel(
    p_part,  # float32 [splits, positions, channels_out]
    p_bias,  # [channels_out] or None
    p_y,  # [positions, channels_out]
    positions,
    channels_out,
    splits,
    BLOCK: tl.constexpr,
):
    o_y = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_n, mask = o_y % channels_out, o_y < positions * channels_out
    # [BLOCK]
    b_y = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(splits):
        b_y += tl.load(p_part + o_y, mask=mask, other=0.0)
        p_part += tl.cast(positions, tl.int64) * channels_out
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=mask)


def map_like(x: Tensor, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """A new map of so many channels, channels-last; `size` is that of `x` unless given."""
    shape = (len(x), channels, *(size or x.shape[2:]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def sum_parts(part: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the sum of float32 parts of a channels-last map, `[splits, ...]`, and of the bias to `y`."""
    block, warps = SUM_TILE
    launch(
        _sum_kernel,
        (triton.cdiv(y.numel(), block),),
        part,
        bias,
        y,
        y.numel() // y.shape[1],
        y.shape[1],
        len(part),
        BLOCK=block,
        num_warps=warps,
    )


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, tile: list[int]) -> Tensor:
    x, weight = channels_last(x), channels_last(weight)
    bias = None if bias is None else bias.contiguous()
    batch, channels_in, height, width = x.shape
    channels_out = weight.shape[1 if transposed else 0]
    positions = batch * height * width
    tile = tile or plan(positions, channels_in, channels_out)
    block_m, block_n, _, splits, *_ = tile
    y = map_like(x, channels_out)
    whole = splits == 1
    part = y if whole else torch.empty(splits, positions, channels_out, dtype=torch.float32, device=x.device)
    launch(
        _conv3x3_kernel,
        (triton.cdiv(positions, block_m), triton.cdiv(channels_out, block_n), splits),
        x,
        weight,
        bias if whole else None,
        part,
        positions,
        height,
        width,
        channels_in,
        channels_out,
        TRANSPOSED=transposed,
        **launch_settings(tile, channels_in, channels_out),
    )
    if not whole:
        sum_parts(part, bias, y)
    return y


@library_op("p2pz::conv3x3")
def _conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, tile: list[int]) -> Tensor:
    """`tile` overrides `plan` unless it is empty."""
    return _launch(x, weight, bias, False, tile)


@_conv3x3.register_fake
def _(x, weight, bias, tile):
    return map_like(x, weight.shape[0])


@library_op("p2pz::conv3x3_input_gradient")
def _conv3x3_input_gradient(dy: Tensor, weight: Tensor, tile: list[int]) -> Tensor:
    return _launch(dy, weight, None, True, tile)


@_conv3x3_input_gradient.register_fake
def _(dy, weight, tile):
    return map_like(dy, weight.shape[1])


def _save(ctx, inputs, output):
    _, weight, _, ctx.tile = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight)


def _gradient(ctx, dy):
    if dy is None or not ctx.needs_input_grad[0]:
        return None, None, None, None
    return _conv3x3_input_gradient(dy, *ctx.saved_tensors, ctx.tile), None, None, None


_conv3x3.register_autograd(_gradient, setup_context=_save)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """3x3 convolution with a border of one zero: `conv2d(x, weight, bias, padding=1)`.

    Args:
        x: `[B, Cin, h, w]`. The kernel takes float16 and bfloat16, and reads channels-last memory in place; it copies
            other layouts, those of the weight, too.
        weight: `[Cout, Cin, 3, 3]`, dtype of `x`. The kernel gives no gradient for it.
        bias: `[Cout]`, dtype of `x`, or float32. No gradient either.
        backend: `"auto"`, `"torch"` or `"triton"`. `"auto"` takes the kernel for the sizes at which it was faster, few
            of all: maps of 8 x 8, some of three images, and few channels on one side.

    Returns:
        `[B, Cout, h, w]`, dtype of `x`. The kernel's is channels-last; it adds in float32 and rounds once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; or `"triton"` was asked for what the kernel cannot do.
    """
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be [B, Cin, h, w] with no empty axis, not {list(x.shape)}")
    batch, channels_in, height, width = x.shape
    if weight.ndim != 4 or weight.shape[1:] != (channels_in, 3, 3) or len(weight) == 0:
        raise ValueError(
            f"weight must be [Cout, {channels_in}, 3, 3] to go with x {list(x.shape)}, not {list(weight.shape)}"
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight is {weight.dtype} on {weight.device}, but x is {x.dtype} on {x.device}: they must agree"
        )
    channels_out = len(weight)
    unsupported = check_bias(bias, x, channels_out, f"weight {list(weight.shape)}")
    if weight.requires_grad and torch.is_grad_enabled():
        unsupported = "weight requires a gradient: the kernel gives one for x only"
    if x.dtype not in HALF_DTYPES:
        unsupported = f"{x.dtype} is not supported: float16 and bfloat16 are"
    if batch * height * width * max(channels_in, channels_out) >= 1 << 31:
        unsupported = "maps of 2^31 elements or more are not supported"
    if backend == "auto" and not _tile(batch * height * width, channels_in, channels_out):
        backend = "torch"
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if choose_triton(backend, unsupported, *tensors):
        return _conv3x3(x, weight, bias, [])
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    if frozen and x.requires_grad and torch.is_grad_enabled():
        return _KeepingTheWeightAlone.apply(x, weight, bias)
    return conv3x3_reference(x, weight, bias)
