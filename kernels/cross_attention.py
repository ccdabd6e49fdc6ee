"""Attention in the `[B, N, H, D]` layout that also gives its probability maps, in one pass over at most 256 keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pz.kernels.dispatch import (
    KERNEL_DTYPES,
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
from p2pz.kernels.tiles import BUSY, dot, lifted, plan, probabilities, product, store_rows, weigh


def attention_probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Attention maps: softmax over the keys of `q k^T / sqrt(D)`.

    Args:
        q: queries, `[B, N, H, D]`, any float dtype.
        k: keys, `[B, M, H, D]`, same dtype.

    Returns:
        `[B, H, N, M]`, each row sums to one. Computed in float32 (float64 for float64 input), because the scores of
        SD 2.x overflow in float16.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.to(precise), k.to(precise)) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1)


def attend_with_probabilities(probabilities: Tensor, v: Tensor) -> Tensor:
    """Weigh the values with given maps.

    Args:
        probabilities: `[B, H, N, M]`.
        v: values, `[B, M, H, D]`.

    Returns:
        `[B, N, H, D]`, dtype of `v`.
    """
    return torch.einsum("bhnm,bmhd->bnhd", probabilities.to(v.dtype), v)


def attention_with_maps_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype | None = None,
    head_mean: bool = False,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `attention_with_maps` computes, in plain torch; `tokens` as a tensor only."""
    probabilities = attention_probabilities(q, k)
    out = attend_with_probabilities(probabilities, v)
    maps = probabilities if tokens is None else probabilities.index_select(-1, tokens)
    return out, (maps.mean(1) if head_mean else maps).to(dtype or q.dtype)


@triton.jit
def _columns(
    p_tokens,  # [T]
    o_m,  # [BLOCK_M]
    T,
    BLOCK_T: tl.constexpr,
):
    """Which column of the maps each key goes to: its place among the tokens, -1 for none."""
    o_t = tl.arange(0, BLOCK_T)
    b_token = tl.load(p_tokens + o_t, mask=o_t < T, other=-1)
    return tl.max(tl.where(b_token[:, None] == o_m[None, :], o_t[:, None], -1), axis=0)


@triton.jit
def _store_maps(
    p_maps,  # [N, T]
    p_tokens,  # [T], or None: T = M, all keys
    o_n,
    N,
    T,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    b_p,  # [BLOCK_N, BLOCK_M]
):
    """Write a tile of maps: all columns, or those of the tokens."""
    if p_tokens is None:
        store_rows(p_maps, o_n, M, N, M, 0, BLOCK_M, b_p)
    else:
        o_column = _columns(p_tokens, tl.arange(0, BLOCK_M), T, BLOCK_T)
        mask = (o_n[:, None] < N) & (o_column[None, :] >= 0)
        tl.store(p_maps + o_n[:, None] * T + o_column[None, :], b_p.to(p_maps.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    p_q,  # [B, N, H, D]
    p_k,  # [B, M, H, D]
    p_v,  # [B, M, H, D]
    p_out,  # [B, N, H, D], contiguous
    p_maps,  # [B, H, N, T], or [B, N, T] for MEAN, contiguous, or None
    p_tokens,  # [T], or None: T = M, all keys
    scale,  # log2(e) / sqrt(D)
    stride_qb,
    stride_qn,
    stride_kb,
    stride_km,
    stride_vb,
    stride_vm,
    N,
    H,
    T,
    STRIDE_QH: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    MEAN: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A block of queries of one head; for MEAN of all heads, one after the other."""
    i_h, i_n, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_one = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
    p_q += i_b * stride_qb
    p_k += i_b * stride_kb
    p_v += i_b * stride_vb
    p_out += i_b * N * H * D
    if MEAN:
        b_mean = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for i_h in range(H):
            b_p = probabilities(
                p_q + i_h * STRIDE_QH, p_k + i_h * STRIDE_KH, o_n, stride_qn, stride_km,
                scale, N, M, D, PIECE, BLOCK_N, BLOCK_M,
            )  # fmt: skip
            weigh(
                b_p, b_one, p_v + i_h * STRIDE_VH, p_out + i_h * D, o_n, stride_vm, H * D,
                N, M, D, PIECE, BLOCK_N, BLOCK_M,
            )  # fmt: skip
            b_mean += b_p
        _store_maps(p_maps + i_b * N * T, p_tokens, o_n, N, T, M, BLOCK_M, BLOCK_T, b_mean * (1.0 / H))
    else:
        b_p = probabilities(
            p_q + i_h * STRIDE_QH, p_k + i_h * STRIDE_KH, o_n, stride_qn, stride_km,
            scale, N, M, D, PIECE, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        if p_maps is not None:
            _store_maps(p_maps + (i_b * H + i_h) * N * T, p_tokens, o_n, N, T, M, BLOCK_M, BLOCK_T, b_p)
        weigh(
            b_p, b_one, p_v + i_h * STRIDE_VH, p_out + i_h * D, o_n, stride_vm, H * D,
            N, M, D, PIECE, BLOCK_N, BLOCK_M,
        )  # fmt: skip


@triton.jit
def _score_gradient(
    b_p,  # [BLOCK_N, BLOCK_M]
    p_v,  # [M, D] of an image and head
    p_dout,  # [N, D], or None
    p_dmaps,  # [N, T], or None
    p_tokens,  # [T], or None
    o_n,  # [BLOCK_N]
    stride_vm,
    stride_on,
    stride_mn,
    stride_mt,
    share,  # what a head's maps count for in the maps: 1, or 1 / H
    N,
    T,
    M: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gradient with respect to the scaled scores, `[BLOCK_N, BLOCK_M]` float32."""
    o_m = tl.arange(0, BLOCK_M)
    b_dp = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    if p_dout is not None:
        b_dp = product(p_dout, p_v, o_n, o_m, stride_on, stride_vm, N, M, D, PIECE, BLOCK_N, BLOCK_M)
    if p_dmaps is not None:
        if p_tokens is None:
            o_column = o_m
            mask = (o_n[:, None] < N) & (o_m[None, :] < M)
        else:
            o_column = _columns(p_tokens, o_m, T, BLOCK_T)
            mask = (o_n[:, None] < N) & (o_column[None, :] >= 0)
        b_dmaps = tl.load(p_dmaps + o_n[:, None] * stride_mn + o_column[None, :] * stride_mt, mask=mask, other=0.0)
        b_dp += b_dmaps.to(tl.float32) * share
    return b_p * (b_dp - tl.sum(b_p * b_dp, axis=1)[:, None])


@triton.jit
def _query_gradient_kernel(
    p_q,  # [B, N, H, D]
    p_k,  # [B, M, H, D]
    p_v,  # [B, M, H, D]
    p_dout,  # [B, N, H, D], or None
    p_dmaps,  # [B, H, N, T], or None
    p_tokens,  # [T], or None
    p_dq,  # [B, N, H, D], contiguous
    scale,
    share,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_km,
    stride_vb,
    stride_vm,
    stride_ob,
    stride_on,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mt,
    N,
    H,
    T,
    STRIDE_QH: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    STRIDE_OH: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A block of queries of one head."""
    i_h, i_n, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_k += i_b * stride_kb + i_h * STRIDE_KH
    if p_dout is not None:
        p_dout += i_b * stride_ob + i_h * STRIDE_OH
    if p_dmaps is not None:
        p_dmaps += i_b * stride_mb + i_h.to(tl.int64) * stride_mh
    b_p = probabilities(
        p_q + i_b * stride_qb + i_h * STRIDE_QH, p_k, o_n, stride_qn, stride_km,
        scale, N, M, D, PIECE, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    b_ds = _score_gradient(
        b_p, p_v + i_b * stride_vb + i_h * STRIDE_VH, p_dout, p_dmaps, p_tokens, o_n,
        stride_vm, stride_on, stride_mn, stride_mt, share, N, T, M, D, PIECE, BLOCK_N, BLOCK_M, BLOCK_T,
    )  # fmt: skip
    b_ds, b_largest = lifted(b_ds)
    weigh(
        b_ds, b_largest * (scale * 0.6931471805599453), p_k, p_dq + (i_b * N * H + i_h) * D, o_n, stride_km, H * D,
        N, M, D, PIECE, BLOCK_N, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _key_gradient_kernel(
    p_q,  # [B, N, H, D]
    p_k,  # [B, M, H, D]
    p_v,  # [B, M, H, D]
    p_dout,  # [B, N, H, D], or None
    p_dmaps,  # [B, H, N, T], or None
    p_tokens,  # [T], or None
    p_sums,  # [CHUNKS, B, M, H, D], contiguous
    scale,
    share,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_km,
    stride_vb,
    stride_vm,
    stride_ob,
    stride_on,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mt,
    N,
    B,
    H,
    T,
    chunk,  # queries of a chunk, a multiple of BLOCK_N
    VALUES: tl.constexpr,  # gradient of the values rather than of the keys
    STRIDE_QH: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    STRIDE_OH: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A sum over a chunk of the queries, for BLOCK_D columns of one head: of `P^T dout`, or of `dS^T q`."""
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_chunk, i_d = tl.program_id(0) // COLUMNS, tl.program_id(0) % COLUMNS
    o_m, o_d = tl.arange(0, BLOCK_M), i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    p_q += i_b * stride_qb + i_h * STRIDE_QH
    p_k += i_b * stride_kb + i_h * STRIDE_KH
    p_v += i_b * stride_vb + i_h * STRIDE_VH
    if p_dout is not None:
        p_dout += i_b * stride_ob + i_h * STRIDE_OH
    if p_dmaps is not None:
        p_dmaps += i_b * stride_mb + i_h.to(tl.int64) * stride_mh
    b_sum = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(i_chunk * chunk, min((i_chunk + 1) * chunk, N), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        mask = (o_n[:, None] < N) & (o_d[None, :] < D)
        b_w = probabilities(p_q, p_k, o_n, stride_qn, stride_km, scale, N, M, D, PIECE, BLOCK_N, BLOCK_M)
        if VALUES:
            b_x = tl.load(p_dout + o_n[:, None] * stride_on + o_d[None, :], mask=mask, other=0.0)
            largest = 1.0
        else:
            b_x = tl.load(p_q + o_n[:, None] * stride_qn + o_d[None, :], mask=mask, other=0.0)
            b_w = _score_gradient(
                b_w, p_v, p_dout, p_dmaps, p_tokens, o_n, stride_vm, stride_on, stride_mn, stride_mt,
                share, N, T, M, D, PIECE, BLOCK_N, BLOCK_M, BLOCK_T,
            )  # fmt: skip
            # As in `lifted`, but for the block as a whole.
            largest = tl.maximum(tl.max(tl.max(tl.abs(b_w), axis=1), axis=0), 1e-30)
            b_w *= 1.0 / largest
        b_sum += dot(tl.trans(b_w.to(b_x.dtype)), b_x, tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)) * largest
    if not VALUES:
        b_sum *= scale * 0.6931471805599453
    p_sums += ((i_chunk * B + i_b) * M * H + i_h) * D
    mask = (o_m[:, None] < M) & (o_d[None, :] < D)
    tl.store(p_sums + o_m[:, None] * (H * D) + o_d[None, :], b_sum.to(p_sums.dtype.element_ty), mask=mask)


def _columns_of(tokens: Tensor | None, k: Tensor) -> dict[str, int]:
    """Arguments about the columns of the maps."""
    if tokens is None:
        return {"T": k.shape[1], "BLOCK_T": 0}
    return {"T": len(tokens), "BLOCK_T": triton.next_power_of_2(len(tokens))}


@library_op("p2pz::cross_attention")
def _cross_attention(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None, maps: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output, and maps of all `"heads"`, of their `"mean"`, or for `"none"` an empty tensor."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out, probabilities = _cross_attention_fake(q, k, v, tokens, maps, dtype)
    batch, count, heads, _ = q.shape
    tiles = plan(q, k.shape[1], batch if maps == "mean" else batch * heads)
    if maps == "mean" and q.element_size() == 2 and q.shape[3] <= 64 and tiles["BLOCK_M"] <= 128:
        tiles["num_stages"] = 2  # where there is room, a head's tiles are loaded while the one before is computed
    grid = (1 if maps == "mean" else heads, triton.cdiv(count, tiles["BLOCK_N"]), batch)
    launch(
        _forward_kernel,
        grid,
        q,
        k,
        v,
        out,
        None if maps == "none" else probabilities,
        tokens,
        score_scale(q),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        count,
        heads,
        STRIDE_QH=q.stride(2),
        STRIDE_KH=k.stride(2),
        STRIDE_VH=v.stride(2),
        MEAN=maps == "mean",
        **_columns_of(tokens, k),
        **tiles,
    )
    return out, probabilities


@_cross_attention.register_fake
def _cross_attention_fake(q, k, v, tokens, maps, dtype):
    batch, count, heads, _ = q.shape
    columns = k.shape[1] if tokens is None else tokens.shape[0]
    shape = {"heads": (batch, heads, count, columns), "mean": (batch, count, columns), "none": (0,)}[maps]
    return q.new_empty(q.shape), q.new_empty(shape, dtype=dtype)


def _gradient_inputs(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, dmaps: Tensor | None, tokens: Tensor | None
) -> tuple[list[Tensor | None], dict[str, int | float]]:
    """What both gradient kernels take: their first six arguments, and others by name."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    dout = unit_stride(dout)
    named = {"scale": score_scale(q), "N": q.shape[1], "H": q.shape[2], **_columns_of(tokens, k)}
    for names, tensor in (("qn", q), ("km", k), ("vm", v), ("on", dout)):
        strides = (0, 0, 0) if tensor is None else tensor.stride()
        named[f"stride_{names[0]}b"], named[f"stride_{names}"], named[f"STRIDE_{names[0].upper()}H"] = strides[:3]
    share, strides = 1.0, (0, 0, 0, 0)
    if dmaps is not None and dmaps.ndim == 4:
        strides = dmaps.stride()
    elif dmaps is not None:
        share, strides = 1 / q.shape[2], (dmaps.stride(0), 0, *dmaps.stride()[1:])
    for axis, stride in zip("bhnt", strides, strict=True):
        named[f"stride_m{axis}"] = stride
    return [q, k, v, dout, dmaps, tokens], {**named, "share": share}


@library_op("p2pz::cross_attention_query_gradient")
def _query_gradient(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, dmaps: Tensor | None, tokens: Tensor | None
) -> Tensor:
    tensors, named = _gradient_inputs(q, k, v, dout, dmaps, tokens)
    dq = _query_gradient_fake(*tensors)
    batch, count, heads, _ = q.shape
    tiles = plan(q, k.shape[1], batch * heads)
    grid = (heads, triton.cdiv(count, tiles["BLOCK_N"]), batch)
    launch(_query_gradient_kernel, grid, *tensors, dq, **named, **tiles)
    return dq


@_query_gradient.register_fake
def _query_gradient_fake(q, k, v, dout, dmaps, tokens):
    return q.new_empty(q.shape)


def _fits_key_gradient(q: Tensor, keys: int) -> bool:
    """Whether a head's keys and values fit the shared memory, where the compiler keeps them all through its loop."""
    half = q.element_size() == 2
    return (keys <= 128 and q.shape[3] <= (256 if half else 96)) or (half and q.shape[3] <= 128)


def _key_gradient_reference(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, dmaps: Tensor | None, tokens: Tensor | None, values: bool
) -> Tensor:
    """`_key_gradient` through the whole maps."""
    maps = attention_probabilities(q, k)
    if values:
        return torch.einsum("bhnm,bnhd->bmhd", maps, dout.to(maps.dtype)).to(k.dtype)
    slopes = torch.zeros_like(maps)
    if dmaps is not None:
        dmaps = dmaps.to(maps.dtype) if dmaps.ndim == 4 else dmaps.to(maps.dtype)[:, None] / q.shape[2]
        dmaps = dmaps.expand(*maps.shape[:3], dmaps.shape[-1])
        slopes = dmaps if tokens is None else slopes.index_add(-1, tokens, dmaps)
    if dout is not None:
        slopes = slopes + torch.einsum("bnhd,bmhd->bhnm", dout.to(maps.dtype), v.to(maps.dtype))
    slopes = maps * (slopes - (maps * slopes).sum(-1, keepdim=True)) * q.shape[3] ** -0.5
    return torch.einsum("bhnm,bnhd->bmhd", slopes, q.to(maps.dtype)).to(k.dtype)


@library_op("p2pz::cross_attention_key_gradient")
def _key_gradient(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, dmaps: Tensor | None, tokens: Tensor | None, values: bool
) -> Tensor:
    """Gradient of the keys or, with `values`, of the values."""
    if not _fits_key_gradient(q, k.shape[1]):
        return _key_gradient_reference(q, k, v, dout, dmaps, tokens, values)
    tensors, named = _gradient_inputs(q, k, v, dout, dmaps, tokens)
    batch, count, heads, width = q.shape
    block_d = 128 // q.element_size()
    tiles = plan(q, k.shape[1], batch * heads) | {"num_warps": 8}
    parts, blocks = triton.cdiv(width, block_d), triton.cdiv(count, tiles["BLOCK_N"])
    chunks = min(blocks, triton.cdiv(4 * BUSY, batch * heads * parts))
    chunk = triton.cdiv(blocks, chunks) * tiles["BLOCK_N"]
    chunks = triton.cdiv(count, chunk)
    sums = k.new_empty((chunks, *k.shape), dtype=k.dtype if chunks == 1 else torch.float32)
    grid = (chunks * parts, heads, batch)
    launch(
        _key_gradient_kernel,
        grid,
        *tensors,
        sums,
        B=batch,
        chunk=chunk,
        VALUES=values,
        BLOCK_D=block_d,
        **named,
        **tiles,
    )
    return sums[0] if chunks == 1 else sums.sum(0).to(k.dtype)


@_key_gradient.register_fake
def _key_gradient_fake(q, k, v, dout, dmaps, tokens, values):
    return k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dmaps):
    q, k, v, tokens = ctx.saved_tensors
    dq = dk = dv = None
    if dmaps is not None and dmaps.ndim == 1:  # of no maps
        dmaps = None
    if dout is not None or dmaps is not None:
        if ctx.needs_input_grad[0]:
            dq = _query_gradient(q, k, v, dout, dmaps, tokens)
        if ctx.needs_input_grad[1]:
            dk = _key_gradient(q, k, v, dout, dmaps, tokens, False)
    if dout is not None and ctx.needs_input_grad[2]:
        dv = _key_gradient(q, k, v, dout, None, None, True)
    return dq, dk, dv, None, None, None


_cross_attention.register_autograd(_backward, setup_context=_setup_context)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention output by the same kernel without maps; the arguments are not checked.

    Args:
        q: queries, `[B, N, H, D]`, D at most 256.
        k: keys, `[B, M, H, D]`, M at most 256.
        v: values, `[B, M, H, D]`.

    Returns:
        `[B, N, H, D]`, dtype of `q`, differentiable.
    """
    return _cross_attention(q, k, v, None, "none", q.dtype)[0]


def _check_tokens(tokens: Sequence[int] | Tensor | None, count: int, device: torch.device) -> Tensor | None:
    """The tokens as a tensor on `device`; no value of a tensor is read."""
    if tokens is None:
        return None
    if isinstance(tokens, Tensor):
        if tokens.ndim != 1 or tokens.dtype not in (torch.int32, torch.int64) or not 1 <= len(tokens) <= count:
            raise ValueError(
                f"tokens must be 1 to {count} integers (int32 or int64), not {tokens.dtype} {list(tokens.shape)}"
            )
        if tokens.device != device:
            raise ValueError(f"tokens is on {tokens.device}, but q is on {device}: they must agree")
        return tokens.contiguous()
    tokens = list(tokens)
    valid = all(isinstance(token, int) and 0 <= token < count for token in tokens)
    if not tokens or not valid or len(set(tokens)) < len(tokens):
        raise ValueError(f"tokens must be distinct integers from 0 to {count - 1}, at least one, not {tokens}")
    # Filled on the device: a copy from the host would wait, and could not be captured in a CUDA graph.
    return torch.cat([torch.full((1,), token, dtype=torch.int32, device=device) for token in tokens])


def attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dtype: torch.dtype | None = None,
    head_mean: bool = False,
    tokens: Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention output together with its maps, the probabilities `softmax(q k^T / sqrt(D))`, in one pass.

    Both are differentiable with respect to `q`, `k` and `v` (once: there are no second derivatives of the kernel).
    The gradients of k and v hold the whole maps in memory for more than 128 keys with D > 128, and in float32 for more
    than 128 keys or D > 96; that of q never does.

    Args:
        q: queries, `[B, N, H, D]`, float16, bfloat16, float32 or (reference only) float64.
        k: keys, `[B, M, H, D]`, same dtype. The kernel takes M and D up to 256.
        v: values, `[B, M, H, D]`, same dtype.
        dtype: float dtype of the maps; default: that of `q`. They are computed in float32 in any case.
        head_mean: give the mean of the maps over the heads; those of single heads are then never stored.
        tokens: keys whose maps are wanted, T distinct integers from 0 to M - 1 in any order; default: all M. A tensor
            (int32 or int64, on the device of `q`) is not read on the host: columns of the maps whose token is out of
            range or repeated are undefined. A sequence is checked, and costs a small launch for each token.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Output `[B, N, H, D]`, dtype of `q`, and maps `[B, H, N, T]`, or `[B, N, T]` for `head_mean`.

    Raises:
        ValueError: shapes, dtypes or tokens that do not fit, or `"triton"` for what the kernel cannot do.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.
    """
    check_attention(q, k=k, v=v)
    dtype = dtype or q.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a float dtype, not {dtype}")
    tokens = _check_tokens(tokens, k.shape[1], q.device)
    unsupported = too_large(q.shape[3], k.shape[1])
    if not unsupported and dtype not in KERNEL_DTYPES:
        unsupported = f"maps in {dtype} are not supported: float16, bfloat16 and float32 are"
    if choose_triton(backend, unsupported, q, k, v):
        return _cross_attention(q, k, v, tokens, "mean" if head_mean else "heads", dtype)
    return attention_with_maps_reference(q, k, v, dtype, head_mean, tokens)
