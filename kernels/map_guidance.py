"""Cross-attention that also says how far its maps are from reference maps, without storing either."""

import torch
from torch import Tensor

from p2pz.kernels.cross_attention import attend_with_probabilities, attention_probabilities
from p2pz.kernels.dispatch import (
    check_attention,
    choose_triton,
    launch,
    library_op,
    score_scale,
    tl,
    too_large,
    triton,
    unit_stride,
)
from p2pz.kernels.tiles import lifted, plan, probabilities, product, weigh


def guided_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, q_reference: Tensor, k_reference: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `guided_attention`."""
    probabilities = attention_probabilities(q, k)
    squares = (probabilities - attention_probabilities(q_reference, k_reference)).square()
    if weights is not None:
        squares = squares * weights.to(squares.dtype)[..., None, None, :]
    return attend_with_probabilities(probabilities, v), squares.sum((2, 3)).mean(1)


@triton.jit
def guided_forward(
    p_q,  # [B, N, H, D]
    p_k,  # [B, M, H, D]
    p_v,  # [B, M, H, D]
    p_q_reference,  # [B, N, H, D]
    p_k_reference,  # [B, M, H, D]
    p_weights,  # [B, M], or None
    p_out,  # [B, N, H, D] contiguous
    p_loss,  # [B, H, blocks] contiguous float32: each program's share of the loss
    stride_qb, stride_qn, STRIDE_QH: tl.constexpr,
    stride_kb, stride_km, STRIDE_KH: tl.constexpr,
    stride_vb, stride_vm, STRIDE_VH: tl.constexpr,
    stride_qrb, stride_qrn, STRIDE_QRH: tl.constexpr,
    stride_krb, stride_krm, STRIDE_KRH: tl.constexpr,
    stride_weights_b,
    N,
    scale,  # log2(e) / sqrt(D)
    H: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b64 = i_b.to(tl.int64)
    p_q += i_b64 * stride_qb + i_h * STRIDE_QH
    p_k += i_b64 * stride_kb + i_h * STRIDE_KH
    p_v += i_b64 * stride_vb + i_h * STRIDE_VH
    p_q_reference += i_b64 * stride_qrb + i_h * STRIDE_QRH
    p_k_reference += i_b64 * stride_krb + i_h * STRIDE_KRH
    p_out += i_b64 * N * H * D + i_h * D
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # [BLOCK_N, BLOCK_M]
    b_r = probabilities(
        p_q_reference, p_k_reference, o_n, stride_qrn, stride_krm, scale, N, M, D, PIECE, BLOCK_N, BLOCK_M
    )
    b_p = probabilities(p_q, p_k, o_n, stride_qn, stride_km, scale, N, M, D, PIECE, BLOCK_N, BLOCK_M)

    # rows beyond N and keys beyond M add nothing: both maps are equal there
    b_squares = (b_p - b_r) * (b_p - b_r)
    if p_weights is not None:
        o_m = tl.arange(0, BLOCK_M)
        b_weights = tl.load(p_weights + i_b64 * stride_weights_b + o_m, mask=o_m < M, other=0.0)
        b_squares *= b_weights.to(tl.float32)[None, :]
    b_loss = tl.sum(b_squares, axis=1)
    b_one = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
    weigh(b_p, b_one, p_v, p_out, o_n, stride_vm, H * D, N, M, D, PIECE, BLOCK_N, BLOCK_M)
    i_program = (i_b * tl.num_programs(1) + i_h) * tl.num_programs(0) + i_n
    tl.store(p_loss + i_program, tl.sum(b_loss, axis=0) / H)


@triton.jit
def guided_backward(
    p_q,  # [B, N, H, D]
    p_k,  # [B, M, H, D]
    p_v,  # [B, M, H, D]
    p_q_reference,  # [B, N, H, D]
    p_k_reference,  # [B, M, H, D]
    p_weights,  # [B, M], or None
    p_dout,  # [B, N, H, D], or None
    p_dloss,  # [B] float32, or None
    p_dq,  # [B, N, H, D] contiguous
    stride_qb, stride_qn, STRIDE_QH: tl.constexpr,
    stride_kb, stride_km, STRIDE_KH: tl.constexpr,
    stride_vb, stride_vm, STRIDE_VH: tl.constexpr,
    stride_qrb, stride_qrn, STRIDE_QRH: tl.constexpr,
    stride_krb, stride_krm, STRIDE_KRH: tl.constexpr,
    stride_weights_b,
    stride_dob, stride_don, STRIDE_DOH: tl.constexpr,
    stride_dloss,
    N,
    scale,  # log2(e) / sqrt(D)
    scale_dq,  # 1 / sqrt(D)
    H: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b64 = i_b.to(tl.int64)
    p_q += i_b64 * stride_qb + i_h * STRIDE_QH
    p_k += i_b64 * stride_kb + i_h * STRIDE_KH
    p_dq += i_b64 * N * H * D + i_h * D
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # [BLOCK_N, BLOCK_M]
    b_p = probabilities(p_q, p_k, o_n, stride_qn, stride_km, scale, N, M, D, PIECE, BLOCK_N, BLOCK_M)
    b_dp = tl.zeros_like(b_p)
    o_m = tl.arange(0, BLOCK_M)
    if p_dloss is not None:
        p_q_reference += i_b64 * stride_qrb + i_h * STRIDE_QRH
        p_k_reference += i_b64 * stride_krb + i_h * STRIDE_KRH
        b_r = probabilities(
            p_q_reference, p_k_reference, o_n, stride_qrn, stride_krm, scale, N, M, D, PIECE, BLOCK_N, BLOCK_M
        )
        b_dp = (b_p - b_r) * (tl.load(p_dloss + i_b64 * stride_dloss) * (2.0 / H))
        if p_weights is not None:
            b_weights = tl.load(p_weights + i_b64 * stride_weights_b + o_m, mask=o_m < M, other=0.0)
            b_dp *= b_weights.to(tl.float32)[None, :]
    if p_dout is not None:
        p_v += i_b64 * stride_vb + i_h * STRIDE_VH
        p_dout += i_b64 * stride_dob + i_h * STRIDE_DOH
        b_dp += product(p_dout, p_v, o_n, o_m, stride_don, stride_vm, N, M, D, PIECE, BLOCK_N, BLOCK_M)
    b_ds, b_largest = lifted(b_p * (b_dp - tl.sum(b_dp * b_p, axis=1)[:, None]))
    weigh(b_ds, b_largest * scale_dq, p_k, p_dq, o_n, stride_km, H * D, N, M, D, PIECE, BLOCK_N, BLOCK_M)


def layout(tensor: Tensor | None) -> tuple[int, int, int]:
    """Strides of images, rows and heads of a `[B, N, H, D]` tensor."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def _image_stride(weights: Tensor | None) -> int | None:
    """From the weights of one image to those of the next; None, so that it is no argument of the kernel, for none."""
    return None if weights is None else weights.stride(0) if weights.ndim == 2 else 0


@library_op("p2pz::guided_attention")
def guided_attention_op(
    q: Tensor, k: Tensor, v: Tensor, q_reference: Tensor, k_reference: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    q, k, v, q_reference, k_reference = map(unit_stride, (q, k, v, q_reference, k_reference))
    weights = unit_stride(weights)
    batch, count, heads, _ = q.shape
    sizes = plan(q, k.shape[1], batch * heads)
    blocks = triton.cdiv(count, sizes["BLOCK_N"])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    losses = torch.empty(batch, heads * blocks, dtype=torch.float32, device=q.device)
    launch(
        guided_forward, (blocks, heads, batch),
        q, k, v, q_reference, k_reference, weights, out, losses,
        *layout(q), *layout(k), *layout(v), *layout(q_reference), *layout(k_reference), _image_stride(weights),
        count, score_scale(q), heads, **sizes,
    )  # fmt: skip
    return out, losses.sum(1)


@guided_attention_op.register_fake
def _(q, k, v, q_reference, k_reference, weights=None):
    return q.new_empty(q.shape), q.new_empty(len(q), dtype=torch.float32)


@library_op("p2pz::guided_attention_backward")
def guided_attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_reference: Tensor,
    k_reference: Tensor,
    dout: Tensor | None,
    dloss: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:
    q, k, v, q_reference, k_reference = map(unit_stride, (q, k, v, q_reference, k_reference))
    dout, weights = unit_stride(dout), unit_stride(weights)
    batch, count, heads, width = q.shape
    sizes = plan(q, k.shape[1], batch * heads)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        guided_backward, (triton.cdiv(count, sizes["BLOCK_N"]), heads, batch),
        q, k, v, q_reference, k_reference, weights, dout, dloss, dq,
        *layout(q), *layout(k), *layout(v), *layout(q_reference), *layout(k_reference), _image_stride(weights),
        *layout(dout), 0 if dloss is None else dloss.stride(0),
        count, score_scale(q), width**-0.5, heads, **sizes,
    )  # fmt: skip
    return dq


@guided_attention_backward_op.register_fake
def _(q, k, v, q_reference, k_reference, dout, dloss, weights=None):
    return q.new_empty(q.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout, dloss):
    wanted = ctx.needs_input_grad[0] and (dout is not None or dloss is not None)
    *tensors, weights = ctx.saved_tensors
    dq = guided_attention_backward_op(*tensors, dout, dloss, weights) if wanted else None
    return dq, None, None, None, None, None


guided_attention_op.register_autograd(_backward, setup_context=_save)


def _check_weights(weights: Tensor, q: Tensor, keys: int) -> None:
    if list(weights.shape) not in ([keys], [len(q), keys]):
        raise ValueError(f"weights must be {[keys]} or {[len(q), keys]}, not {list(weights.shape)}")
    if not weights.is_floating_point() or weights.device != q.device:
        raise ValueError(f"weights must be a float tensor on {q.device}, not {weights.dtype} on {weights.device}")


def guided_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_reference: Tensor,
    k_reference: Tensor,
    *,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention output, and the squared distance of its maps from the maps of a reference pass.

    Nothing of the maps' size is stored, neither here nor in the backward pass, which computes them anew.

    Args:
        q: queries, `[B, N, H, D]`, any float dtype. The only argument that receives a gradient, from both results.
        k: keys, `[B, M, H, D]`, same dtype.
        v: values, `[B, M, H, D]`.
        q_reference: queries of the reference pass, `[B, N, H, D]`.
        k_reference: keys of the reference pass, `[B, M, H, D]`.
        weights: how much each token's map counts in the loss, `[M]` or `[B, M]`, any float dtype, zero or more (which
            is not checked: that would wait for the GPU). None: 1.
        backend: `"auto"`, `"torch"` or `"triton"`; the kernel takes M and D up to 256.

    Returns:
        `softmax(q k^T / sqrt(D)) v`, `[B, N, H, D]` in the dtype of `q`, and the loss of each image, `[B]` float32
        (float64 for float64 input): weighted squared differences of the maps, summed over positions and tokens and
        averaged over the heads.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, an argument other than `q` that requires a
            gradient, or `backend="triton"` for what the kernel cannot do.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), equation 6.
    """
    constants = {"k": k, "v": v, "q_reference": q_reference, "k_reference": k_reference}
    check_attention(q, **constants)
    keys = k.shape[1]
    if weights is not None:
        _check_weights(weights, q, keys)
        constants["weights"] = weights
    for name, tensor in constants.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, but is a constant here: only q has a gradient, detach {name}"
            )
    if choose_triton(backend, too_large(q.shape[3], keys), q, k, v, q_reference, k_reference):
        weights = weights.float() if weights is not None and weights.dtype == torch.float64 else weights
        return guided_attention_op(q, k, v, q_reference, k_reference, weights)
    return guided_attention_reference(q, k, v, q_reference, k_reference, weights)
