"""GEGLU: half of a projection gates the other half; the gating alone, or with the projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pz.kernels.dispatch import HALF_DTYPES, check_bias, choose_triton, launch, library_op, tl, triton, unit_stride
from p2pz.kernels.tiles import dot

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton, or one before 3.4
    TensorDescriptor = None

TILE = (1, 512, 2)
"""Rows, columns and warps of a tile: 8 values and 8 gates per thread."""

PRODUCT_TILE = (128, 64, 64, 8, 3)
"""Rows, columns and steps of the sum of a tile of `geglu_linear`; warps; stages."""
# Found on an H200: the width of x up to which, and the rows from which, that was faster than a product and the gating
# after it; elements of a projection up to which the gating adds the bias faster than the product does.
_WIDEST, _FEWEST_ROWS, _BIAS_WITH_GATING = 640, 2048, 1 << 24


def geglu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`value * gelu(gate)` of the halves of `x + bias`, in the dtype of `x`."""
    if bias is not None:
        x = x + bias.to(x.dtype)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


@triton.jit
def _normal(b_z):
    """Cumulative distribution and density of the standard normal distribution, float32.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), equation 26.2.17, whose error is below
    7.5e-8. One exponential serves both results, and nothing cancels in the lower tail as it would in `1 + erf(z)`.
    """
    b_density = 0.3989422804 * tl.exp2(b_z * b_z * -0.7213475204)
    b_t = 1.0 / (1.0 + 0.2316419 * tl.abs(b_z))
    b_series = -0.356563782 + b_t * (1.781477937 + b_t * (-1.821255978 + b_t * 1.330274429))
    b_tail = b_density * b_t * (0.319381530 + b_t * b_series)
    return tl.where(b_z < 0, b_tail, 1.0 - b_tail), b_density


@triton.jit
def _load_half(p_x, p_bias, o_x, o_c, m_x, m_c):
    """Tile of values or of gates, float32."""
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_x += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_x


@triton.jit
def _geglu_kernel(
    p_x,  # [rows, 2 inner]
    p_bias,  # [2 inner] or None
    p_y,  # [rows, inner]
    stride_x,
    rows,
    inner,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column_blocks = tl.cdiv(inner, BLOCK_C)
    i_r = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < inner
    mask = (i_r + o_r < rows)[:, None] & m_c[None, :]
    p_x += i_r * stride_x
    o_x = o_r[:, None] * stride_x + o_c[None, :]
    # [BLOCK_R, BLOCK_C]
    b_value = _load_half(p_x, p_bias, o_x, o_c, mask, m_c)
    b_gate = _load_half(p_x, p_bias, o_x + inner, o_c + inner, mask, m_c)
    b_cdf, _ = _normal(b_gate)
    b_y = b_value * b_gate * b_cdf
    p_y += i_r * inner
    tl.store(p_y + o_r[:, None] * inner + o_c[None, :], b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _geglu_backward_kernel(
    p_dy,  # [rows, inner]
    p_x,  # [rows, 2 inner]
    p_bias,  # [2 inner] or None
    p_dx,  # [rows, 2 inner]
    stride_dy,
    stride_x,
    rows,
    inner,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column_blocks = tl.cdiv(inner, BLOCK_C)
    i_r = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < inner
    mask = (i_r + o_r < rows)[:, None] & m_c[None, :]
    p_x += i_r * stride_x
    p_dy += i_r * stride_dy
    o_x = o_r[:, None] * stride_x + o_c[None, :]
    # [BLOCK_R, BLOCK_C]
    b_dy = tl.load(p_dy + o_r[:, None] * stride_dy + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_value = _load_half(p_x, p_bias, o_x, o_c, mask, m_c)
    b_gate = _load_half(p_x, p_bias, o_x + inner, o_c + inner, mask, m_c)
    b_cdf, b_density = _normal(b_gate)
    b_dvalue = b_dy * b_gate * b_cdf
    b_dgate = b_dy * b_value * (b_cdf + b_gate * b_density)
    p_dx += i_r * 2 * inner
    o_dx = o_r[:, None] * (2 * inner) + o_c[None, :]
    tl.store(p_dx + o_dx, b_dvalue.to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_dx + o_dx + inner, b_dgate.to(p_dx.dtype.element_ty), mask=mask)


@library_op("p2pz::geglu")
def _geglu(x: Tensor, bias: Tensor | None, tile: list[int]) -> Tensor:
    """`tile` overrides `TILE` unless it is empty."""
    inner = x.shape[-1] // 2
    x_rows = unit_stride(x.reshape(-1, 2 * inner))
    bias = unit_stride(bias)
    block_r, block_c, warps = tile or TILE
    y = torch.empty((*x.shape[:-1], inner), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(len(x_rows), block_r) * triton.cdiv(inner, block_c),)
    launch(
        _geglu_kernel,
        grid,
        x_rows,
        bias,
        y,
        x_rows.stride(0),
        len(x_rows),
        inner,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return y


@_geglu.register_fake
def _(x, bias, tile):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@library_op("p2pz::geglu_backward")
def _geglu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, tile: list[int]) -> Tensor:
    inner = x.shape[-1] // 2
    x_rows, dy_rows = unit_stride(x.reshape(-1, 2 * inner)), unit_stride(dy.reshape(-1, inner))
    bias = unit_stride(bias)
    block_r, block_c, warps = tile or TILE
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(len(x_rows), block_r) * triton.cdiv(inner, block_c),)
    launch(
        _geglu_backward_kernel,
        grid,
        dy_rows,
        x_rows,
        bias,
        dx,
        dy_rows.stride(0),
        x_rows.stride(0),
        len(x_rows),
        inner,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return dx


@_geglu_backward.register_fake
def _(dy, x, bias, tile):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, bias, ctx.tile = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bias)


def _gradient(ctx, dy):
    if dy is None or not ctx.needs_input_grad[0]:
        return None, None, None
    return _geglu_backward(dy, *ctx.saved_tensors, ctx.tile), None, None


_geglu.register_autograd(_gradient, setup_context=_save)


def geglu(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """GEGLU of the two halves of the last axis, `value * gelu(gate)` with the exact (erf) GELU.

    Args:
        x: `[..., 2 * inner]`, values first, then gates.
        bias: `[2 * inner]`, that of the projection which made `x`; added first. Dtype of `x`, or float32. The kernel
            gives no gradient for it.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[..., inner]`, dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; or `"triton"` was asked for what the kernel cannot do.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 5.
    """
    if x.ndim == 0 or x.shape[-1] % 2 or 0 in x.shape:
        raise ValueError(f"x must be [..., 2 * inner] with no empty axis, not {list(x.shape)}")
    unsupported = check_bias(bias, x)
    tensors = [tensor for tensor in (x, bias) if tensor is not None]
    if choose_triton(backend, unsupported, *tensors):
        return _geglu(x, bias, [])
    return geglu_reference(x, bias)


@triton.jit
def _geglu_linear_kernel(
    d_x,  # descriptor of [rows, width]
    d_w,  # of [2, inner, width], values first, then gates
    p_bias,  # [2 inner]
    d_y,  # of [rows, inner]
    rows,
    inner,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,  # blocks of rows that share blocks of weights, one after the other, in the cache
):
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_R), tl.cdiv(inner, BLOCK_C)
    first = tl.program_id(0) // (TOGETHER * column_blocks) * TOGETHER
    together = tl.minimum(row_blocks - first, TOGETHER)
    i_program = tl.program_id(0) % (TOGETHER * column_blocks)
    i_r, i_c = (first + i_program % together) * BLOCK_R, i_program // together * BLOCK_C
    # Values and gates of the same columns side by side, so that one product makes both.
    b_both = tl.zeros([BLOCK_R, 2 * BLOCK_C], dtype=tl.float32)
    for i_k in range(0, width, BLOCK_K):
        b_w = d_w.load([0, i_c, i_k]).reshape(2 * BLOCK_C, BLOCK_K)
        b_both = dot(d_x.load([i_r, i_k]), b_w.T, b_both)
    b_value, b_gate = b_both.reshape(BLOCK_R, 2, BLOCK_C).permute(0, 2, 1).split()
    o_c = i_c + tl.arange(0, BLOCK_C)
    b_value += tl.load(p_bias + o_c, mask=o_c < inner, other=0.0).to(tl.float32)[None, :]
    b_gate += tl.load(p_bias + inner + o_c, mask=o_c < inner, other=0.0).to(tl.float32)[None, :]
    b_cdf, _ = _normal(b_gate)
    d_y.store([i_r, i_c], (b_value * b_gate * b_cdf).to(d_y.dtype))


def _for_a_descriptor(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous and begins at a multiple of 16 bytes, else a copy that does."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@library_op("p2pz::geglu_linear")
def _geglu_linear(x: Tensor, weight: Tensor, bias: Tensor, tile: list[int]) -> Tensor:
    """`tile` overrides `PRODUCT_TILE` unless it is empty."""
    inner, width = len(weight) // 2, weight.shape[1]
    block_r, block_c, block_k, warps, stages = tile or PRODUCT_TILE
    y = torch.empty((*x.shape[:-1], inner), dtype=x.dtype, device=x.device)
    x_rows, weight = _for_a_descriptor(x.reshape(-1, width)), _for_a_descriptor(weight)
    grid = (triton.cdiv(len(x_rows), block_r) * triton.cdiv(inner, block_c),)
    launch(
        _geglu_linear_kernel,
        grid,
        TensorDescriptor.from_tensor(x_rows, [block_r, block_k]),
        TensorDescriptor.from_tensor(weight.view(2, inner, width), [2, block_c, block_k]),
        bias.contiguous(),
        TensorDescriptor.from_tensor(y.view(-1, inner), [block_r, block_c]),
        len(x_rows),
        inner,
        width,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        BLOCK_K=block_k,
        TOGETHER=8,
        num_warps=warps,
        num_stages=stages,
    )
    return y


@_geglu_linear.register_fake
def _(x, weight, bias, tile):
    return x.new_empty((*x.shape[:-1], len(weight) // 2))


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """GEGLU of a projection, `geglu(linear(x, weight, bias))`.

    Args:
        x: `[..., width]`. The kernel takes float16 and bfloat16, and gives no gradients.
        weight: `[2 * inner, width]`, dtype of `x`, values first, then gates.
        bias: `[2 * inner]`, dtype of `x`.
        backend: `"auto"`, `"torch"` or `"triton"`. `"auto"` takes the kernel on Hopper GPUs, for the sizes at which it
            was faster, and where no gradient is wanted; elsewhere `geglu` of a product.

    Returns:
        `[..., inner]`, dtype of `x`. The kernel rounds once, the two steps twice.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; or `"triton"` was asked for what the kernel cannot do.

    Source: as `geglu`.
    """
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"x must be [..., width] with no empty axis, not {list(x.shape)}")
    width = x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != width or len(weight) % 2 or len(weight) == 0:
        raise ValueError(f"weight must be [2 * inner, {width}] to go with x {list(x.shape)}, not {list(weight.shape)}")
    for name, tensor, shape in (("weight", weight, weight.shape), ("bias", bias, weight.shape[:1])):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} to go with weight {list(weight.shape)}, not {list(tensor.shape)}"
            )
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}: they must agree"
            )
    rows, tensors = x.numel() // width, (x, weight, bias)
    unsupported = None if x.dtype in HALF_DTYPES else f"{x.dtype} is not supported: halves are"
    if TensorDescriptor is None:
        unsupported = "Triton 3.4 or newer is needed"
    if width % 8 or len(weight) % 16:
        unsupported = f"{len(weight)} x {width} weights: multiples of 16 and 8 are supported"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        unsupported = "a gradient is wanted: the kernel gives none"
    wins = width <= _WIDEST and rows >= _FEWEST_ROWS and x.is_cuda
    if backend == "auto" and not (wins and torch.cuda.get_device_capability(x.device)[0] == 9):
        backend = "torch"
    if choose_triton(backend, unsupported, *tensors):
        return _geglu_linear(x, weight, bias, [])
    if x.is_cuda and rows * len(weight) <= _BIAS_WITH_GATING:
        return geglu(F.linear(x, weight), bias)
    return geglu(F.linear(x, weight, bias))
