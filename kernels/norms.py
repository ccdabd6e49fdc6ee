"""Group norm (with SiLU) and layer norm, each with what surrounds it: additions before the norm.

Maps are channels-last, so a group of an image is a narrow stripe of a `[positions, C]` matrix. The kernels give
gradients for activations only; weights are frozen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pz.kernels.dispatch import channels_last, choose_triton, launch, library_op, tl, triton, unit_stride

MAX_GROUP_WIDTH = 1024
MAX_ROW_WIDTH = 8192


def group_norm_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *,
    silu: bool = False, shift: Tensor | None = None, residual: Tensor | None = None, sum_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`x + shift + residual`, its group norm, SiLU of that; in the dtype of `x`, or of the weights if that is wider."""
    if shift is not None:
        x = x + shift.to(x.dtype)[..., None, None]
    if residual is not None:
        x = x + residual
    wide = torch.promote_types(x.dtype, weight.dtype)
    y = F.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    y = (F.silu(y) if silu else y).to(x.dtype)
    if sum_bias is not None:
        x = x + sum_bias.to(x.dtype)[:, None, None]
    return y if residual is None else (y, x)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
    residual: Tensor | None = None, sum_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`x + residual` and its layer norm over the last axis, in the dtype of `x`, or of the weights if that is wider."""
    if residual is not None:
        x = x + residual
    wide = torch.promote_types(x.dtype, weight.dtype)
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)
    if sum_bias is not None:
        x = x + sum_bias.to(x.dtype)
    return y if residual is None else (y, x)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _plan(positions: int, width: int, backward: bool) -> list[int]:
    """How group norms of groups of `width` channels are spread over programs; found on an H200.

    Returns:
        `[chunks, together, rows, warps]`: chunks of an image, groups and positions of a tile, warps. One chunk in one
        tile: a single launch, which keeps its tile in registers. Otherwise a first launch leaves the moments of each
        chunk for a second one, whose tiles' positions, channels and warps follow.
    """
    block, width = _power_of_two(positions), _power_of_two(width)
    if block * width <= 16384:
        return [1, 1, block, min(16, max(4, block * width // 2048)), 1, 1, 1]
    places, together = (4096, 4) if backward else (16384, 8) if positions <= 1024 else (8192, 4)
    rows = max(1, places // (together * width))
    return [min(128, triton.cdiv(positions, rows)), together, rows, 4, 32 if backward else 64, 64, 4]


@triton.jit
def _load(p_vector, o_vector, m_vector):
    """float32, zero where masked."""
    return tl.load(p_vector + o_vector, mask=m_vector, other=0.0).to(tl.float32)


@triton.jit
def _store(p_y, o_y, b_y, m_y):
    """In the dtype of the memory."""
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def _load_sum(p_x, p_residual, b_shift, o_x, m_x):
    """`x + residual + shift`, float32."""
    b_x = _load(p_x, o_x, m_x)
    if p_residual is not None:
        b_x += _load(p_residual, o_x, m_x)
    if b_shift is not None:
        b_x += b_shift
    return b_x


@triton.jit
def _sigmoid(b_y):
    """By a squared reciprocal root: half the instructions of a division."""
    b_root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * b_y))
    return b_root * b_root


@triton.jit
def _slope(b_dy, b_y, SILU: tl.constexpr):
    """Gradient before SiLU, if there is one."""
    if SILU:
        b_sigmoid = _sigmoid(b_y)
        b_dy *= b_sigmoid * (1.0 + b_y * (1.0 - b_sigmoid))
    return b_dy


@triton.jit
def _group_columns(C: tl.constexpr, GROUP: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr):
    """Groups of a program, `[TOGETHER, 1, 1]`, their channels, `[TOGETHER, 1, WIDTH]`, and the masks of both."""
    o_g = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)[:, None, None]
    o_w, m_g = tl.arange(0, WIDTH)[None, None, :], o_g < C // GROUP
    return o_g, m_g, o_g * GROUP + o_w, m_g & (o_w < GROUP)


@triton.jit
def _store_moments(p_partial, o_g, m_g, b_first, b_second, C: tl.constexpr, GROUP: tl.constexpr):
    """Leave two moments of a chunk."""
    chunks, groups = tl.num_programs(1), C // GROUP
    p_partial += (tl.program_id(2) * groups + o_g) * chunks + tl.program_id(1)
    tl.store(p_partial, b_first, mask=m_g)
    tl.store(p_partial + tl.num_programs(2) * groups * chunks, b_second, mask=m_g)


@triton.jit
def _load_moments(p_partial, o_g, m_g, chunks, C: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """Two moments of all chunks, `[groups, BLOCK_K]` each."""
    o_k, groups = tl.arange(0, BLOCK_K), C // GROUP
    p_partial += (tl.program_id(2) * groups + o_g)[:, None] * chunks + o_k[None, :]
    m_partial = m_g[:, None] & (o_k < chunks)[None, :]
    plane = tl.num_programs(2) * groups * chunks
    return tl.load(p_partial, mask=m_partial, other=0.0), tl.load(p_partial + plane, mask=m_partial, other=0.0)


@triton.jit
def _group_norm_kernel(
    p_x,  # [B, P, C]
    p_weight,  # [C]
    p_bias,  # [C]
    p_shift,  # [B, C] or [C] or None
    p_residual,  # [B, P, C] or None
    p_sum_bias,  # [C] or None: added to the sum, after the norm
    p_partial,  # [2, B, groups, chunks], mean and summed squared deviation of each chunk; None: finish here
    p_y,  # [B, P, C]
    p_sum,  # [B, P, C] or None
    p_statistics,  # [2, B, groups], mean and reciprocal standard deviation
    stride_shift, positions, eps,
    SILU: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i_p, i_b = tl.program_id(1) * CHUNK, tl.program_id(2)
    o_g, m_g, o_c, m_c = _group_columns(C, GROUP, TOGETHER, WIDTH)
    o_r, rows = tl.arange(0, ROWS)[None, :, None], tl.minimum(CHUNK, positions - i_p)
    i_x = (i_b.to(tl.int64) * positions + i_p) * C
    p_x += i_x
    if p_residual is not None:
        p_residual += i_x
        p_sum += i_x
    b_shift = None
    if p_shift is not None:
        b_shift = _load(p_shift + i_b * stride_shift, o_c, m_c)
    b_sum_bias = 0.0
    if p_sum_bias is not None:
        b_sum_bias = _load(p_sum_bias, o_c, m_c)
    # Sums of deviations from the first row, lest they cancel. Rows beyond the last repeat it: their deviation is nil.
    b_row = _load_sum(p_x, p_residual, b_shift, o_c, m_c)
    # [TOGETHER, ROWS, WIDTH]: lanes share out the last axis, then the first, so that sums of rows stay in a thread.
    o_x = tl.where(o_r < rows, o_r, 0) * C + o_c
    b_x = _load_sum(p_x, p_residual, b_shift, o_x, m_c)
    if p_partial is None:
        b_weight, b_bias = _load(p_weight, o_c, m_c), _load(p_bias, o_c, m_c)
    if p_sum is not None:
        _store(p_sum, o_x, b_x + b_sum_bias, m_c & (o_r < rows))
    b_first = b_x - b_row
    b_second = b_first * b_first
    for i in range(ROWS, CHUNK, ROWS):
        o_x = tl.where(i + o_r < rows, i + o_r, 0) * C + o_c
        b_x = _load_sum(p_x, p_residual, b_shift, o_x, m_c)
        if p_sum is not None:
            _store(p_sum, o_x, b_x + b_sum_bias, m_c & (i + o_r < rows))
        b_off = b_x - b_row
        b_first += b_off
        b_second += b_off * b_off
    # [TOGETHER, 1, WIDTH], then [TOGETHER, 1, 1]
    b_step = tl.sum(b_first, axis=1, keep_dims=True) / rows
    b_means = b_row + b_step
    b_squares = tl.sum(b_second, axis=1, keep_dims=True) - rows * b_step * b_step
    b_mean = tl.sum(b_means, axis=2, keep_dims=True) / GROUP
    b_off = tl.where(m_c, b_means - b_mean, 0.0)
    b_square = tl.sum(b_squares + rows * b_off * b_off, axis=2, keep_dims=True)
    if p_partial is not None:
        _store_moments(p_partial, o_g, m_g, b_mean, b_square, C, GROUP)
    else:
        b_rstd = tl.rsqrt(tl.maximum(b_square, 0.0) / (GROUP * rows) + eps)
        _store_moments(p_statistics, o_g, m_g, b_mean, b_rstd, C, GROUP)
        b_y = (b_x - b_mean) * (b_rstd * b_weight) + b_bias
        if SILU:
            b_y *= _sigmoid(b_y)
        _store(p_y + i_x, o_x, b_y, m_c & (o_r < rows))


@triton.jit
def _group_norm_finish_kernel(
    p_x,  # [B, P, C], with the residual and sum_bias
    p_weight,  # [C]
    p_bias,  # [C]
    p_shift,  # [B, C] or [C] or None
    p_sum_bias,  # [C] or None
    p_partial,  # [2, B, groups, chunks]
    p_y,  # [B, P, C]
    p_statistics,  # [2, B, groups]
    stride_shift, positions, chunks, eps,
    SILU: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOUCHED: tl.constexpr,
):  # fmt: skip
    """Columns of tiles may begin and end within groups; a tile touches at most `TOUCHED` of them."""
    i_c, i_p, i_b = tl.program_id(0) * COLUMNS, tl.program_id(1) * ROWS, tl.program_id(2)
    o_r, o_c, step = tl.arange(0, ROWS)[:, None], i_c + tl.arange(0, COLUMNS), tl.num_programs(1) * ROWS
    o_x, m_c = o_r * C + o_c[None, :], o_c < C
    i_x = (i_b.to(tl.int64) * positions + i_p) * C
    p_x += i_x
    p_y += i_x
    # [ROWS, COLUMNS]
    b_next = tl.load(p_x + o_x, mask=(i_p + o_r < positions) & m_c[None, :], other=0.0)
    o_g = i_c // GROUP + tl.arange(0, TOUCHED)
    m_g = o_g < C // GROUP
    b_means, b_squares = _load_moments(p_partial, o_g, m_g, chunks, C, GROUP, BLOCK_K)
    b_weight, b_bias = _load(p_weight, o_c, m_c), _load(p_bias, o_c, m_c)
    b_count = tl.minimum(tl.maximum(positions - tl.arange(0, BLOCK_K) * CHUNK, 0), CHUNK).to(tl.float32)[None, :]
    b_mean = tl.sum(b_count * b_means, axis=1) / positions
    b_off = b_means - b_mean[:, None]
    b_square = tl.sum(b_squares + GROUP * b_count * b_off * b_off, axis=1)
    b_rstd = tl.rsqrt(tl.maximum(b_square, 0.0) / GROUP / positions + eps)
    if i_p == 0:
        o_statistics = i_b * (C // GROUP) + o_g
        tl.store(p_statistics + o_statistics, b_mean, mask=m_g)
        tl.store(p_statistics + tl.num_programs(2) * (C // GROUP) + o_statistics, b_rstd, mask=m_g)
    o_g = o_c // GROUP - i_c // GROUP
    b_mean, b_scale = tl.gather(b_mean, o_g, 0), tl.gather(b_rstd, o_g, 0) * b_weight
    if p_shift is not None:
        b_mean -= _load(p_shift + i_b * stride_shift, o_c, m_c)
    if p_sum_bias is not None:
        b_mean += _load(p_sum_bias, o_c, m_c)
    for i in range(i_p, positions, step):
        b_x = b_next.to(tl.float32)
        p_x += step * C
        b_next = tl.load(p_x + o_x, mask=(i + step + o_r < positions) & m_c[None, :], other=0.0)
        b_y = (b_x - b_mean[None, :]) * b_scale[None, :] + b_bias[None, :]
        if SILU:
            b_y *= _sigmoid(b_y)
        _store(p_y, o_x, b_y, (i + o_r < positions) & m_c[None, :])
        p_y += step * C


@triton.jit
def _group_norm_backward_kernel(
    p_dy,  # [B, P, C]
    p_dsum,  # [B, P, C] or None
    p_x,  # [B, P, C]
    p_weight,  # [C]
    p_bias,  # [C]
    p_shift,  # [B, C] or [C] or None
    p_sum_bias,  # [C] or None: is in x, but was added after the norm
    p_statistics,  # [2, B, groups]
    p_partial,  # [2, B, groups, chunks], sums of slopes and of slopes times standardised inputs; None: finish here
    p_dx,  # [B, P, C]
    stride_shift, positions,
    SILU: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i_p, i_b = tl.program_id(1) * CHUNK, tl.program_id(2)
    o_g, m_g, o_c, m_c = _group_columns(C, GROUP, TOGETHER, WIDTH)
    o_r, rows = tl.arange(0, ROWS)[None, :, None], tl.minimum(CHUNK, positions - i_p)
    o_x, m_x = o_r * C + o_c, (o_r < rows) & m_c
    i_x = (i_b.to(tl.int64) * positions + i_p) * C
    # [TOGETHER, ROWS, WIDTH]
    b_x, b_slope = _load(p_x + i_x, o_x, m_x), _load(p_dy + i_x, o_x, m_x)
    b_weight, b_bias = _load(p_weight, o_c, m_c), _load(p_bias, o_c, m_c)
    p_statistics += i_b * (C // GROUP) + o_g
    b_rstd = tl.load(p_statistics + tl.num_programs(2) * (C // GROUP), mask=m_g, other=0.0)
    b_mean = tl.load(p_statistics, mask=m_g, other=0.0)
    if p_shift is not None:
        b_mean -= _load(p_shift + i_b * stride_shift, o_c, m_c)
    if p_sum_bias is not None:
        b_mean += _load(p_sum_bias, o_c, m_c)
    b_scale = b_rstd * b_weight
    b_off = b_x - b_mean
    b_slope = _slope(b_slope, b_off * b_scale + b_bias, SILU)
    b_first, b_second = b_slope, b_slope * b_off
    for i in range(ROWS, CHUNK, ROWS):
        m_x = (i + o_r < rows) & m_c
        b_off = _load(p_x + i_x, i * C + o_x, m_x) - b_mean
        b_slope = _slope(_load(p_dy + i_x, i * C + o_x, m_x), b_off * b_scale + b_bias, SILU)
        b_first += b_slope
        b_second += b_slope * b_off
    # [TOGETHER, 1, 1]
    b_first = tl.sum(tl.sum(b_first, axis=1, keep_dims=True) * b_weight, axis=2, keep_dims=True)
    b_second = tl.sum(tl.sum(b_second, axis=1, keep_dims=True) * b_weight, axis=2, keep_dims=True) * b_rstd
    if p_partial is not None:
        _store_moments(p_partial, o_g, m_g, b_first, b_second, C, GROUP)
    else:
        b_first *= b_rstd / (GROUP * rows)
        b_second *= b_rstd * b_rstd / (GROUP * rows)
        b_dx = b_slope * b_scale - (b_off * b_second + b_first)
        if p_dsum is not None:
            b_dx += _load(p_dsum + i_x, o_x, m_x)
        _store(p_dx + i_x, o_x, b_dx, m_x)


@triton.jit
def _group_norm_backward_finish_kernel(
    p_dy,  # [B, P, C]
    p_dsum,  # [B, P, C] or None
    p_x,  # [B, P, C]
    p_weight,  # [C]
    p_bias,  # [C]
    p_shift,  # [B, C] or [C] or None
    p_sum_bias,  # [C] or None: is in x, but was added after the norm
    p_statistics,  # [2, B, groups]
    p_partial,  # [2, B, groups, chunks]
    p_dx,  # [B, P, C]
    stride_shift, positions, chunks,
    SILU: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOUCHED: tl.constexpr,
):  # fmt: skip
    i_c, i_p, i_b = tl.program_id(0) * COLUMNS, tl.program_id(1) * ROWS, tl.program_id(2)
    o_r, o_c = tl.arange(0, ROWS)[:, None], i_c + tl.arange(0, COLUMNS)
    m_c = o_c < C
    o_x, m_x = o_r * C + o_c[None, :], (i_p + o_r < positions) & m_c[None, :]
    i_x = (i_b.to(tl.int64) * positions + i_p) * C
    # [ROWS, COLUMNS]
    b_x, b_slope = _load(p_x + i_x, o_x, m_x), _load(p_dy + i_x, o_x, m_x)
    b_dx = 0.0
    if p_dsum is not None:
        b_dx = _load(p_dsum + i_x, o_x, m_x)
    o_g = i_c // GROUP + tl.arange(0, TOUCHED)
    m_g = o_g < C // GROUP
    b_firsts, b_seconds = _load_moments(p_partial, o_g, m_g, chunks, C, GROUP, BLOCK_K)
    b_weight, b_bias = _load(p_weight, o_c, m_c), _load(p_bias, o_c, m_c)
    p_statistics += i_b * (C // GROUP) + o_c // GROUP
    b_mean = tl.load(p_statistics, mask=m_c, other=0.0)
    b_rstd = tl.load(p_statistics + tl.num_programs(2) * (C // GROUP), mask=m_c, other=0.0)
    if p_shift is not None:
        b_mean -= _load(p_shift + i_b * stride_shift, o_c, m_c)
    if p_sum_bias is not None:
        b_mean += _load(p_sum_bias, o_c, m_c)
    b_scale, o_g = b_rstd * b_weight, o_c // GROUP - i_c // GROUP
    b_first = tl.gather(tl.sum(b_firsts, axis=1), o_g, 0) * b_rstd / (GROUP * positions)
    b_second = tl.gather(tl.sum(b_seconds, axis=1), o_g, 0) * b_rstd * b_rstd / (GROUP * positions)
    b_off = b_x - b_mean[None, :]
    b_slope = _slope(b_slope, b_off * b_scale[None, :] + b_bias[None, :], SILU)
    b_dx += b_slope * b_scale[None, :] - (b_off * b_second[None, :] + b_first[None, :])
    _store(p_dx + i_x, o_x, b_dx, m_x)


@triton.jit
def _layer_norm_kernel(
    p_x,  # [rows, C]
    p_residual,  # [rows, C] or None
    p_sum_bias,  # [C] or None: added to the sum, after the norm
    p_weight,  # [C]
    p_bias,  # [C]
    p_y,  # [rows, C]
    p_sum,  # [rows, C] or None
    p_statistics,  # [2, rows]: mean and reciprocal standard deviation
    stride_x, stride_residual, rows, eps, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R
    o_r, o_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    m_r, m_c = i_r + o_r < rows, o_c < C
    # [BLOCK_R, BLOCK_C]
    m_x = m_r[:, None] & m_c[None, :]
    o_y = o_r[:, None] * C + o_c[None, :]
    p_x += i_r * stride_x
    b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    if p_residual is not None:
        p_residual += i_r * stride_residual
        o_residual = o_r[:, None] * stride_residual + o_c[None, :]
        b_x += tl.load(p_residual + o_residual, mask=m_x, other=0.0).to(tl.float32)
        p_sum += i_r * C
        b_sum = b_x
        if p_sum_bias is not None:
            b_sum += _load(p_sum_bias, o_c, m_c)[None, :]
        tl.store(p_sum + o_y, b_sum.to(p_sum.dtype.element_ty), mask=m_x)
    b_weight = _load(p_weight, o_c, m_c)
    b_bias = _load(p_bias, o_c, m_c)
    b_mean = tl.sum(b_x, axis=1) / C
    b_off = tl.where(m_x, b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_off * b_off, axis=1) / C + eps)
    p_statistics += i_r
    tl.store(p_statistics + o_r, b_mean, mask=m_r)
    tl.store(p_statistics + rows + o_r, b_rstd, mask=m_r)
    b_y = b_off * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    p_y += i_r * C
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_x)


@triton.jit
def _layer_norm_backward_kernel(
    p_dy,  # [rows, C]
    p_dsum,  # [rows, C] or None
    p_x,  # [rows, C]
    p_sum_bias,  # [C] or None: is in x, but was added after the norm
    p_weight,  # [C]
    p_statistics,  # [2, rows]
    p_dx,  # [rows, C]
    stride_dy, stride_dsum, stride_x, rows, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R
    o_r, o_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    m_r, m_c = i_r + o_r < rows, o_c < C
    # [BLOCK_R, BLOCK_C]
    m_x = m_r[:, None] & m_c[None, :]
    p_x += i_r * stride_x
    p_dy += i_r * stride_dy
    b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_dy = tl.load(p_dy + o_r[:, None] * stride_dy + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    if p_sum_bias is not None:
        b_x -= _load(p_sum_bias, o_c, m_c)[None, :]
    p_statistics += i_r
    b_mean = tl.load(p_statistics + o_r, mask=m_r, other=0.0)[:, None]
    b_rstd = tl.load(p_statistics + rows + o_r, mask=m_r, other=0.0)[:, None]
    b_normed = (b_x - b_mean) * b_rstd
    b_slope = b_dy * _load(p_weight, o_c, m_c)[None, :]
    b_first = tl.sum(b_slope, axis=1) / C
    b_second = tl.sum(b_slope * b_normed, axis=1) / C
    b_dx = (b_slope - b_first[:, None] - b_normed * b_second[:, None]) * b_rstd
    if p_dsum is not None:
        p_dsum += i_r * stride_dsum
        b_dx += tl.load(p_dsum + o_r[:, None] * stride_dsum + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    p_dx += i_r * C
    tl.store(p_dx + o_r[:, None] * C + o_c[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_x)


def _launches(
    x: Tensor, groups: int, shift: Tensor | None, sum_bias: Tensor | None, plan: list[int], backward: bool
) -> tuple:
    """Grid and arguments of the first launch, of the second, and the moments between them (all None: a single one)."""
    batch, channels, height, width = x.shape
    positions, group = height * width, channels // groups
    chunks, together, rows, warps, *finish = plan or _plan(positions, group, backward)
    chunk = rows * triton.cdiv(positions, rows * chunks)
    chunks = triton.cdiv(positions, chunk)
    shift = unit_stride(shift)
    shared = {"p_shift": shift, "stride_shift": 0 if shift is None or shift.ndim == 1 else shift.stride(0)}
    shared |= {"p_sum_bias": unit_stride(sum_bias), "positions": positions, "C": channels, "GROUP": group}
    first = {"CHUNK": chunk, "ROWS": rows, "TOGETHER": together, "WIDTH": _power_of_two(group), "num_warps": warps}
    grid = (triton.cdiv(groups, together), chunks, batch)
    if chunk == rows and chunks == 1:
        return grid, shared | first, None, None, None
    rows, columns, warps = finish
    touched = columns // group if columns % group == 0 else _power_of_two((columns - 2) // group + 2)
    second = {"chunks": chunks, "BLOCK_K": _power_of_two(chunks), "ROWS": rows, "COLUMNS": columns}
    second |= {"TOUCHED": touched, "num_warps": warps}
    partial = torch.empty((2, batch, groups, chunks), dtype=torch.float32, device=x.device)
    finish_grid = (triton.cdiv(channels, columns), triton.cdiv(positions, rows), batch)
    return grid, shared | first, finish_grid, shared | second, partial


@library_op("p2pz::group_norm")
def _group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None,
    residual: Tensor | None, sum_bias: Tensor | None, plan: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Result, sum (empty without a residual) and statistics; an empty plan means `_plan`."""
    x, residual = channels_last(x), None if residual is None else channels_last(residual)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    statistics = torch.empty((2, len(x), groups), dtype=torch.float32, device=x.device)
    grid, first, finish_grid, second, partial = _launches(x, groups, shift, sum_bias, plan, False)
    shared = {"p_weight": unit_stride(weight), "p_bias": unit_stride(bias), "p_partial": partial, "p_y": y}
    shared |= {"p_statistics": statistics, "eps": eps, "SILU": silu}
    p_sum = None if residual is None else total
    launch(_group_norm_kernel, grid, p_x=x, p_residual=residual, p_sum=p_sum, **shared, **first)
    if partial is not None:
        second |= {"p_x": x} if residual is None else {"p_x": total, "p_shift": None}
        blocks, tiles, batch = finish_grid
        tiles = min(tiles, max(64, 2048 // (batch * blocks)))  # programs of many tiles: each reads all the moments
        launch(_group_norm_finish_kernel, (blocks, tiles, batch), CHUNK=first["CHUNK"], **shared, **second)
    return y, total, statistics


@_group_norm.register_fake
def _(x, groups, weight, bias, eps, silu, shift, residual, sum_bias, plan):
    y = torch.empty_like(x, memory_format=torch.channels_last)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, total, x.new_empty((2, x.shape[0], groups), dtype=torch.float32)


@library_op("p2pz::group_norm_backward")
def _group_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, groups: int, weight: Tensor, bias: Tensor, silu: bool,
    shift: Tensor | None, sum_bias: Tensor | None, statistics: Tensor, plan: list[int],
) -> Tensor:  # fmt: skip
    """Gradient of `x`; an empty plan means `_plan`."""
    dy, x, dsum = channels_last(dy), channels_last(x), None if dsum is None else channels_last(dsum)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    grid, first, finish_grid, second, partial = _launches(x, groups, shift, sum_bias, plan, True)
    shared = {"p_dy": dy, "p_dsum": dsum, "p_x": x, "p_weight": unit_stride(weight), "p_bias": unit_stride(bias)}
    shared |= {"p_statistics": statistics, "p_partial": partial, "p_dx": dx, "SILU": silu}
    launch(_group_norm_backward_kernel, grid, **shared, **first)
    if partial is not None:
        launch(_group_norm_backward_finish_kernel, finish_grid, **shared, **second)
    return dx


@_group_norm_backward.register_fake
def _(dy, dsum, x, groups, weight, bias, silu, shift, sum_bias, statistics, plan):
    return torch.empty_like(x, memory_format=torch.channels_last)


def _save_group_norm(ctx, inputs, output):
    x, ctx.groups, weight, bias, _, ctx.silu, shift, residual, sum_bias, ctx.plan = inputs
    _, total, statistics = output
    ctx.set_materialize_grads(False)
    ctx.shift_like = None if shift is None else (shift.shape, shift.dtype)
    ctx.summed = residual is not None
    if ctx.summed:
        x, shift = total, None
    ctx.save_for_backward(x, weight, bias, shift, sum_bias, statistics)


def _group_norm_gradient(ctx, dy, dsum, _):
    x, weight, bias, shift, sum_bias, statistics = ctx.saved_tensors
    needs_x, needs_shift, needs_residual = (ctx.needs_input_grad[i] for i in (0, 6, 7))
    dx = None
    if needs_x or needs_shift or needs_residual:
        dx = dsum if ctx.summed else None
        if dy is not None:
            behind = shift, sum_bias, statistics, ctx.plan
            dx = _group_norm_backward(dy, dx, x, ctx.groups, weight, bias, ctx.silu, *behind)
    dshift = None
    if needs_shift and dx is not None:
        shape, dtype = ctx.shift_like
        dshift = dx.sum((0, 2, 3) if len(shape) == 1 else (2, 3), dtype=torch.float32).to(dtype)
    dx_of = [dx if needed else None for needed in (needs_x, needs_residual)]
    return dx_of[0], None, None, None, None, None, dshift, dx_of[1], None, None


_group_norm.register_autograd(_group_norm_gradient, setup_context=_save_group_norm)


class _CarriedGroupNorm(torch.autograd.Function):
    """A group norm and its input: gradients of both are added in the kernel of the norm's."""

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, silu):
        y, _, statistics = _group_norm(x, groups, weight, bias, eps, silu, None, None, None, [])
        ctx.settings = groups, silu
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, statistics)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx, dy, dx):
        (x, weight, bias, statistics), (groups, silu) = ctx.saved_tensors, ctx.settings
        if dy is not None:
            dx = _group_norm_backward(dy, dx, x, groups, weight, bias, silu, None, None, statistics, [])
        return dx, None, None, None, None, None


ROW_TILES = {256: (4, 1), 512: (4, 1), 1024: (2, 1), 2048: (1, 2), 4096: (1, 8), 8192: (1, 8)}
"""Rows and warps of a layer norm's tile by the padded row width (the first that is wide enough)."""


def _row_tile(width: int, tile: list[int]) -> dict[str, int]:
    """A layer norm's tile in a launch's terms; a `tile` that is not empty counts."""
    rows, warps = tile or next(ROW_TILES[limit] for limit in ROW_TILES if width <= limit)
    return {"C": width, "BLOCK_R": rows, "BLOCK_C": _power_of_two(width), "num_warps": warps}


@library_op("p2pz::layer_norm")
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, sum_bias: Tensor | None,
    tile: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Result, sum (empty without a residual) and statistics."""
    width = x.shape[-1]
    x_rows = unit_stride(x.reshape(-1, width))
    residual_rows = None if residual is None else unit_stride(residual.reshape(-1, width))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x.new_empty(0 if residual is None else x.shape)
    statistics = torch.empty((2, len(x_rows)), dtype=torch.float32, device=x.device)
    shared = _row_tile(width, tile)
    launch(
        _layer_norm_kernel, (triton.cdiv(len(x_rows), shared["BLOCK_R"]),),
        x_rows, residual_rows, unit_stride(sum_bias), unit_stride(weight),
        unit_stride(bias), y, None if residual is None else total,
        statistics, x_rows.stride(0), 0 if residual is None else residual_rows.stride(0), len(x_rows), eps, **shared,
    )  # fmt: skip
    return y, total, statistics


@_layer_norm.register_fake
def _(x, weight, bias, eps, residual, sum_bias, tile):
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)


@library_op("p2pz::layer_norm_backward")
def _layer_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, sum_bias: Tensor | None, statistics: Tensor,
    tile: list[int],
) -> Tensor:  # fmt: skip
    """Gradient of `x`."""
    width = x.shape[-1]
    x_rows, dy_rows = unit_stride(x.reshape(-1, width)), unit_stride(dy.reshape(-1, width))
    dsum_rows = None if dsum is None else unit_stride(dsum.reshape(-1, width))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shared = _row_tile(width, tile)
    launch(
        _layer_norm_backward_kernel, (triton.cdiv(len(x_rows), shared["BLOCK_R"]),),
        dy_rows, dsum_rows, x_rows, unit_stride(sum_bias), unit_stride(weight),
        statistics, dx,
        dy_rows.stride(0), 0 if dsum is None else dsum_rows.stride(0), x_rows.stride(0), len(x_rows), **shared,
    )  # fmt: skip
    return dx


@_layer_norm_backward.register_fake
def _(dy, dsum, x, weight, sum_bias, statistics, tile):
    return x.new_empty(x.shape)


def _save_layer_norm(ctx, inputs, output):
    x, weight, _, _, residual, sum_bias, ctx.tile = inputs
    _, total, statistics = output
    ctx.set_materialize_grads(False)
    ctx.summed = residual is not None
    ctx.save_for_backward(total if ctx.summed else x, weight, sum_bias, statistics)


def _layer_norm_gradient(ctx, dy, dsum, _):
    needs_x, needs_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    dx = dsum if ctx.summed else None
    if dy is not None and (needs_x or needs_residual):
        dx = _layer_norm_backward(dy, dx, *ctx.saved_tensors, ctx.tile)
    return dx if needs_x else None, None, None, None, dx if needs_residual else None, None, None


_layer_norm.register_autograd(_layer_norm_gradient, setup_context=_save_layer_norm)


class _CarriedLayerNorm(torch.autograd.Function):
    """A layer norm and its input: as `_CarriedGroupNorm`."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, _, statistics = _layer_norm(x, weight, bias, eps, None, None, [])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, statistics)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx, dy, dx):
        x, weight, statistics = ctx.saved_tensors
        if dy is not None:
            dx = _layer_norm_backward(dy, dx, x, weight, None, statistics, [])
        return dx, None, None, None


def _check(
    x: Tensor, channels: int, weight: Tensor, bias: Tensor, residual: Tensor | None, sum_bias: Tensor | None
) -> str | None:
    """Check what both norms share; returns why the kernels cannot take these weights, or None."""
    if sum_bias is not None and residual is None:
        raise ValueError("sum_bias goes with a residual: without one, no sum is returned")
    vectors = {"weight": weight, "bias": bias} | ({} if sum_bias is None else {"sum_bias": sum_bias})
    for name, tensor in vectors.items():
        if tensor.shape != (channels,):
            raise ValueError(f"{name} must be {[channels]} to go with x {list(x.shape)}, not {list(tensor.shape)}")
        _check_like(name, tensor, x)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual must be {list(x.shape)}, the shape of x, not {list(residual.shape)}")
        if residual.dtype != x.dtype:
            raise ValueError(f"residual is {residual.dtype}, but x is {x.dtype}: they must agree")
        _check_like("residual", residual, x)
    trained = [name for name, tensor in vectors.items() if tensor.requires_grad and torch.is_grad_enabled()]
    return f"{trained[0]} requires a gradient: the kernels give them for activations only" if trained else None


def _check_carry(carry: bool, *added: Tensor | None) -> None:
    if carry and any(tensor is not None for tensor in added):
        raise ValueError("carry returns x as it is: it goes with neither a shift nor a residual")


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype not in (x.dtype, torch.float32) or tensor.device != x.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}: its dtype must be that "
            "of x or float32, its device the same"
        )


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool = False,
    shift: Tensor | None = None, residual: Tensor | None = None, sum_bias: Tensor | None = None, carry: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Group norm of `x + shift + residual`, and SiLU of that if asked for.

    Args:
        x: `[B, C, h, w]`; channels-last is read in place, other layouts are converted.
        groups: number of groups, a divisor of C.
        weight, bias: `[C]`, dtype of `x` or float32. The kernel gives no gradients for them.
        eps: added to the variance.
        silu: whether SiLU follows.
        shift: `[C]` or `[B, C]`, dtype of `x` or float32, added to every position.
        residual: `[B, C, h, w]`, dtype of `x`.
        sum_bias: `[C]`, dtype of `x` or float32, added to the sum that is returned, not to what is normed: so it costs
            nothing to add the bias of what `add_product` will add to this sum.
        carry: without shift and residual, return `x` too, for its other uses: the gradient that comes back through it
            is added within the norm's backward kernel.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[B, C, h, w]` in the dtype of `x`, channels-last from the kernel; with a residual a pair of that and
        `x + shift + residual + sum_bias`, or with `carry` of that and `x`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; or `"triton"` was asked for what the kernel cannot do.

    Source: Wu and He, "Group Normalization" (2018), equations 1 and 2; Chan et al., "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances" (1979), for the merging of statistics.
    """
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be [B, C, h, w] with no empty axis, not {list(x.shape)}")
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must be a divisor of the {channels} channels of x, not {groups}")
    unsupported = _check(x, channels, weight, bias, residual, sum_bias)
    _check_carry(carry, shift, residual)
    if shift is not None:
        if shift.shape not in ((channels,), (batch, channels)):
            raise ValueError(f"shift must be {[channels]} or {[batch, channels]}, not {list(shift.shape)}")
        _check_like("shift", shift, x)
    if channels // groups > MAX_GROUP_WIDTH:
        unsupported = f"groups of {channels // groups} channels: up to {MAX_GROUP_WIDTH} are supported"
    added = {"shift": shift, "residual": residual, "sum_bias": sum_bias}
    tensors = [tensor for tensor in (x, weight, bias, *added.values()) if tensor is not None]
    if not choose_triton(backend, unsupported, *tensors):
        y = group_norm_reference(x, groups, weight, bias, eps, silu=silu, **added)
        return (y, x) if carry else y
    if carry:
        return _CarriedGroupNorm.apply(channels_last(x), groups, weight, bias, eps, silu)
    y, total, _ = _group_norm(channels_last(x), groups, weight, bias, eps, silu, *added.values(), [])
    return y if residual is None else (y, total)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
    residual: Tensor | None = None, sum_bias: Tensor | None = None, carry: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Layer norm of `x + residual` over the last axis.

    Args:
        x: `[..., C]`.
        weight, bias: `[C]`, dtype of `x` or float32. The kernel gives no gradients for them.
        eps: added to the variance.
        residual: `[..., C]`, dtype of `x`.
        sum_bias: `[C]`, dtype of `x` or float32, added to the sum that is returned, see `group_norm`.
        carry: without a residual, return `x` too, see `group_norm`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[..., C]` in the dtype of `x`; with a residual a pair of that and `x + residual + sum_bias`, or with `carry` of
        that and `x`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; or `"triton"` was asked for what the kernel cannot do.

    Source: Ba et al., "Layer Normalization" (2016), equation 4.
    """
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"x must be [..., C] with no empty axis, not {list(x.shape)}")
    width = x.shape[-1]
    unsupported = _check(x, width, weight, bias, residual, sum_bias)
    _check_carry(carry, residual)
    if width > MAX_ROW_WIDTH:
        unsupported = f"rows of {width} channels: up to {MAX_ROW_WIDTH} are supported"
    tensors = [tensor for tensor in (x, weight, bias, residual, sum_bias) if tensor is not None]
    if not choose_triton(backend, unsupported, *tensors):
        y = layer_norm_reference(x, weight, bias, eps, residual=residual, sum_bias=sum_bias)
        return (y, x) if carry else y
    if carry:
        return _CarriedLayerNorm.apply(x, weight, bias, eps)
    y, total, _ = _layer_norm(x, weight, bias, eps, residual, sum_bias, [])
    return y if residual is None else (y, total)
