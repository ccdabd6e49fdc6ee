"""The end of a block: bias and residual are added in one pass, or within the product before."""

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pz.kernels.dispatch import check_bias, choose_triton, launch, library_op, tl, triton, unit_stride

TILE = (1024, 4)
"""Elements and warps of a tile: 8 elements per thread, one 16-byte access of each tensor."""


def add_residual_reference(x: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x + bias + residual`, in the dtype of `x`."""
    if bias is not None:
        x = x + bias.to(x.dtype)
    return x + residual


@triton.jit
def _add_residual_kernel(
    p_x,  # [rows, C]
    p_residual,  # [rows, C]
    p_bias,  # [C] or None
    p_y,  # [rows, C], contiguous
    rows,
    C: tl.constexpr,
    STRIDE_X: tl.constexpr,  # strides are constants as C is: Triton sees the 8 in 24 or 40 only then
    STRIDE_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_first = tl.program_id(0).to(tl.int64) * BLOCK
    i_r = i_first // C
    # Tiles are cut from the flattened rows, so that narrow ones leave no thread idle.
    o_flat = (i_first - i_r * C).to(tl.int32) + tl.arange(0, BLOCK)  # from the start of row i_r
    o_r, o_c = i_r + o_flat // C, o_flat % C
    mask = o_r < rows
    # [BLOCK]
    b_y = tl.load(p_x + o_r * STRIDE_X + o_c, mask=mask, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_c, mask=mask, other=0.0).to(tl.float32)
    b_y += tl.load(p_residual + o_r * STRIDE_R + o_c, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_y + o_r * C + o_c, b_y.to(p_y.dtype.element_ty), mask=mask)


@library_op("p2pz::add_residual")
def _add_residual(x: Tensor, residual: Tensor, bias: Tensor | None, tile: list[int]) -> Tensor:
    """`tile` overrides `TILE` unless it is empty."""
    width = x.shape[-1]
    x_rows, residual_rows = unit_stride(x.reshape(-1, width)), unit_stride(residual.reshape(-1, width))
    bias = unit_stride(bias)
    block, warps = tile or TILE
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _add_residual_kernel,
        (triton.cdiv(x.numel(), block),),
        x_rows,
        residual_rows,
        bias,
        y,
        len(x_rows),
        C=width,
        STRIDE_X=x_rows.stride(0),
        STRIDE_R=residual_rows.stride(0),
        BLOCK=block,
        num_warps=warps,
    )
    return y


@_add_residual.register_fake
def _(x, residual, bias, tile):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy):
    x_wants, residual_wants, *_ = ctx.needs_input_grad
    return dy if x_wants else None, dy if residual_wants else None, None, None


_add_residual.register_autograd(_gradient, setup_context=_save)


def add_residual(x: Tensor, residual: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """`x + bias + residual` in one pass.

    Args:
        x: tokens `[..., C]`.
        residual: shape and dtype of `x`.
        bias: `[C]`, that of the projection which made `x`. Dtype of `x`, or float32. The kernel gives no gradient
            for it.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[..., C]`, contiguous, dtype of `x`. The kernel adds in float32 and rounds once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; or `"triton"` was asked for what the kernel cannot do.
    """
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"x must be [..., C] with no empty axis, not {list(x.shape)}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x is, not {list(residual.shape)}")
    if residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"residual is {residual.dtype} on {residual.device}, but x is {x.dtype} on {x.device}: they must agree"
        )
    unsupported = check_bias(bias, x)
    tensors = [tensor for tensor in (x, residual, bias) if tensor is not None]
    if choose_triton(backend, unsupported, *tensors):
        return _add_residual(x, residual, bias, [])
    return add_residual_reference(x, residual, bias)


def add_product(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """`residual + x weight^T`, written over `residual` where no gradient is wanted: for one that nobody reads again.

    A bias is best added to the residual by what has made that, see `sum_bias` of `layer_norm`: the product's own
    routine adds either a bias or a matrix.

    Args:
        x: `[B, N, inner]`.
        weight: `[C, inner]`, dtype of `x`.
        residual: `[B, N, C]`, dtype of `x`, of memory of its own.

    Returns:
        `[B, N, C]`, dtype of `x`.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, residual)):
        return add_residual(F.linear(x, weight), residual)
    rows = residual.flatten(0, 1)
    return rows.addmm_(x.flatten(0, 1), weight.T).view(residual.shape)
