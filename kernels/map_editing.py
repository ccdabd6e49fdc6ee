"""Cross-attention through the maps of a reference pass, edited on the way: prompt-to-prompt without stored maps."""

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
from p2pz.kernels.map_guidance import layout
from p2pz.kernels.tiles import dot, load_rows, plan, probabilities, weigh


def _edit(maps: Tensor, own: Tensor | None, mapping: Tensor | None, mix: Tensor | None, weights: Tensor | None):
    """The edited maps `[B, H, N, M]` from reference maps `[B, H, N, M_ref]`; `own` maps are read if there is a mix."""
    if mapping is not None:
        maps = maps @ mapping.to(maps.dtype).unsqueeze(-3)
    if mix is not None:
        mix = _per_token(mix, maps)
        maps = mix * maps + (1 - mix) * own
    return maps if weights is None else _per_token(weights, maps) * maps


def _per_token(factors: Tensor, maps: Tensor) -> Tensor:
    """`[M]` or `[B, M]` so that it multiplies maps `[B, H, N, M]`."""
    return factors.to(maps.dtype)[..., None, None, :]


def edited_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_reference: Tensor,
    k_reference: Tensor,
    mapping: Tensor | None = None,
    mix: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """See `edited_attention`."""
    own = None if mix is None else attention_probabilities(q, k)
    return attend_with_probabilities(
        _edit(attention_probabilities(q_reference, k_reference), own, mapping, mix, weights), v
    )


@triton.jit
def edited_forward(
    p_q,  # [B, N, H, D], not read without a mix
    p_k,  # [B, M, H, D], not read without a mix
    p_v,  # [B, M, H, D]
    p_q_reference,  # [B, N, H, D]
    p_k_reference,  # [B, R, H, D]
    p_mapping,  # [B, R, M], or None
    p_mix,  # [B, M], or None
    p_weights,  # [B, M], or None
    p_out,  # [B, N, H, D] contiguous
    stride_qb, stride_qn, STRIDE_QH: tl.constexpr,
    stride_kb, stride_km, STRIDE_KH: tl.constexpr,
    stride_vb, stride_vm, STRIDE_VH: tl.constexpr,
    stride_qrb, stride_qrn, STRIDE_QRH: tl.constexpr,
    stride_krb, stride_krm, STRIDE_KRH: tl.constexpr,
    stride_mapping_b, stride_mapping_r, stride_mix_b, stride_weights_b,
    N,
    scale,  # log2(e) / sqrt(D)
    H: tl.constexpr,
    R: tl.constexpr,  # keys of the reference
    M: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least R and M
):  # fmt: skip
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b64 = i_b.to(tl.int64)
    p_v += i_b64 * stride_vb + i_h * STRIDE_VH
    p_q_reference += i_b64 * stride_qrb + i_h * STRIDE_QRH
    p_k_reference += i_b64 * stride_krb + i_h * STRIDE_KRH
    p_out += i_b64 * N * H * D + i_h * D
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)

    # [BLOCK_N, BLOCK_M]
    b_p = probabilities(
        p_q_reference, p_k_reference, o_n, stride_qrn, stride_krm, scale, N, R, D, PIECE, BLOCK_N, BLOCK_M
    )
    if p_mapping is not None:
        b_mapping = load_rows(p_mapping + i_b64 * stride_mapping_b, o_m, stride_mapping_r, R, M, 0, BLOCK_M)
        b_p = b_p.to(p_v.dtype.element_ty)
        b_p = dot(b_p, b_mapping.to(b_p.dtype), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32))
    if p_mix is not None:
        p_q += i_b64 * stride_qb + i_h * STRIDE_QH
        p_k += i_b64 * stride_kb + i_h * STRIDE_KH
        b_own = probabilities(p_q, p_k, o_n, stride_qn, stride_km, scale, N, M, D, PIECE, BLOCK_N, BLOCK_M)
        b_mix = tl.load(p_mix + i_b64 * stride_mix_b + o_m, mask=o_m < M, other=0.0).to(tl.float32)[None, :]
        b_p = b_mix * b_p + (1 - b_mix) * b_own
    if p_weights is not None:
        b_p *= tl.load(p_weights + i_b64 * stride_weights_b + o_m, mask=o_m < M, other=0.0).to(tl.float32)[None, :]
    b_one = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
    weigh(b_p, b_one, p_v, p_out, o_n, stride_vm, H * D, N, M, D, PIECE, BLOCK_N, BLOCK_M)


def _image_stride(tensor: Tensor | None, axes: int) -> int:
    """From one image to the next of a tensor of `axes` axes; 0 for one without images."""
    return 0 if tensor is None or tensor.ndim < axes else tensor.stride(0)


@library_op("p2pz::edited_attention")
def edited_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_reference: Tensor,
    k_reference: Tensor,
    mapping: Tensor | None,
    mix: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    q, k, v, q_reference, k_reference = map(unit_stride, (q, k, v, q_reference, k_reference))
    mapping, mix, weights = map(unit_stride, (mapping, mix, weights))
    batch, count, heads, _ = q.shape
    keys, reference_keys = k.shape[1], k_reference.shape[1]
    sizes = plan(q, max(keys, reference_keys), batch * heads) | {"M": keys, "R": reference_keys}
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        edited_forward, (triton.cdiv(count, sizes["BLOCK_N"]), heads, batch),
        q, k, v, q_reference, k_reference, mapping, mix, weights, out,
        *layout(q), *layout(k), *layout(v), *layout(q_reference), *layout(k_reference),
        _image_stride(mapping, 3), 0 if mapping is None else mapping.stride(-2),
        _image_stride(mix, 2), _image_stride(weights, 2),
        count, score_scale(q), heads, **sizes,
    )  # fmt: skip
    return out


@edited_attention_op.register_fake
def _(q, k, v, q_reference, k_reference, mapping, mix, weights):
    return q.new_empty(q.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _softmax_gradients(q: Tensor, k: Tensor, maps: Tensor, dmaps: Tensor, wanted: tuple[bool, bool]):
    """Gradients of q and of k from the maps' own."""
    dscores = maps * (dmaps - (maps * dmaps).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dq = torch.einsum("bhnm,bmhd->bnhd", dscores, k.to(maps.dtype)).to(q.dtype) if wanted[0] else None
    dk = torch.einsum("bhnm,bnhd->bmhd", dscores, q.to(maps.dtype)).to(k.dtype) if wanted[1] else None
    return dq, dk


def _backward(ctx, dout):
    q, k, v, q_reference, k_reference, mapping, mix, weights = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dq = dk = dv = dq_reference = dk_reference = None
    if dout is not None:
        maps = attention_probabilities(q_reference, k_reference)
        own = None if mix is None else attention_probabilities(q, k)
        dout = dout.to(maps.dtype)
        if wanted[2]:
            edited = _edit(maps, own, mapping, mix, weights)
            dv = torch.einsum("bhnm,bnhd->bmhd", edited, dout).to(v.dtype)
        dmaps = torch.einsum("bnhd,bmhd->bhnm", dout, v.to(maps.dtype))
        if weights is not None:
            dmaps = _per_token(weights, maps) * dmaps
        if mix is not None:
            mix = _per_token(mix, maps)
            if wanted[0] or wanted[1]:
                dq, dk = _softmax_gradients(q, k, own, (1 - mix) * dmaps, wanted[:2])
            dmaps = mix * dmaps
        if wanted[3] or wanted[4]:
            if mapping is not None:
                dmaps = dmaps @ mapping.to(maps.dtype).mT.unsqueeze(-3)
            dq_reference, dk_reference = _softmax_gradients(q_reference, k_reference, maps, dmaps, wanted[3:5])
    return dq, dk, dv, dq_reference, dk_reference, None, None, None


edited_attention_op.register_autograd(_backward, setup_context=_save)


def _check_factors(q: Tensor, shapes: dict[str, list[int]], factors: dict[str, Tensor | None]) -> None:
    for name, shape in shapes.items():
        factor = factors[name]
        if factor is None:
            continue
        batched = [len(q), *shape]
        if list(factor.shape) not in (shape, batched):
            raise ValueError(f"{name} must be {shape} or {batched}, not {list(factor.shape)}")
        if not factor.is_floating_point() or factor.device != q.device:
            raise ValueError(f"{name} must be a float tensor on {q.device}, not {factor.dtype} on {factor.device}")
        if factor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, but is a constant here: detach {name}")


def edited_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_reference: Tensor,
    k_reference: Tensor,
    *,
    mapping: Tensor | None = None,
    mix: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend with maps taken from a reference pass: token by token moved, mixed with one's own maps, and re-weighted.

    With the maps P of (q, k) and P_reference of (q_reference, k_reference), it weighs the values with

        weights * (mix * (P_reference mapping) + (1 - mix) * P)

    whose rows need not sum to one. Replacing words, refining a prompt and re-weighting words are special cases.
    The forward kernel stores no maps; the backward pass is plain torch and holds them in full.

    Args:
        q: queries, `[B, N, H, D]`, any float dtype. Not read without a mix.
        k: keys, `[B, M, H, D]`, same dtype. Not read without a mix.
        v: values, `[B, M, H, D]`.
        q_reference: queries of the reference pass, `[B, N, H, D]`.
        k_reference: keys of the reference pass, `[B, M_reference, H, D]`.
        mapping: how much of each reference token goes to each token, `[M_reference, M]` or `[B, M_reference, M]`, any
            float dtype; the kernel multiplies in the dtype of `q`. None: token to same token.
        mix: how much of a token's map comes from the reference, `[M]` or `[B, M]` in 0 ... 1, any float dtype. None: 1.
        weights: factor of each token's map, `[M]` or `[B, M]`, any float dtype. None: 1.
        backend: `"auto"`, `"torch"` or `"triton"`; the kernel takes D up to 256, and M and M_reference up to
            256, with a mapping up to 128.

    Returns:
        `[B, N, H, D]`, dtype of `q`; differentiable with respect to the first five arguments.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, no mapping between different numbers of tokens, a
            mapping, mix or weights that require a gradient, or `backend="triton"` for what the kernel cannot do.

    Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control" (2022), section 3.
    """
    check_attention(q, k=k, v=v, q_reference=q_reference)
    check_attention(q, k_reference=k_reference)
    keys, reference_keys = k.shape[1], k_reference.shape[1]
    factors = {"mapping": mapping, "mix": mix, "weights": weights}
    _check_factors(q, {"mapping": [reference_keys, keys], "mix": [keys], "weights": [keys]}, factors)
    if mapping is None and keys != reference_keys:
        raise ValueError(f"mapping must be given: k_reference has {reference_keys} tokens, but k has {keys}")
    unsupported = too_large(q.shape[3], max(keys, reference_keys), "256" if mapping is None else "128 with a mapping")
    if choose_triton(backend, unsupported, q, k, v, q_reference, k_reference):
        factors = (x.float() if x is not None and x.dtype == torch.float64 else x for x in (mapping, mix, weights))
        return edited_attention_op(q, k, v, q_reference, k_reference, *factors)
    return edited_attention_reference(q, k, v, q_reference, k_reference, mapping, mix, weights)
