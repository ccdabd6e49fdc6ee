"""Attention in the `[B, N, H, D]` layout without its probability maps, for any number of queries and keys.

The keys are visited tile by tile with a running maximum and sum, so that nothing of size N x M is ever stored. The
backward pass recomputes the probabilities from the logarithm of each row's sum.

Source: Dao, "FlashAttention-2" (2023), algorithms 1 and 2; here the gradients of q and of k and v come from a kernel
each, so that the sums have a fixed order and need no atomics.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pz.kernels.cross_attention import short_attention
from p2pz.kernels.dispatch import (
    HALF_DTYPES,
    check_attention,
    choose_triton,
    has_little_shared_memory,
    launch,
    library_op,
    score_scale,
    split_width,
    tl,
    too_large,
    triton,
    unit_stride,
)
from p2pz.kernels.tiles import dot, load_rows, store_rows

FEW_KEYS = 128
"""Up to so many keys, if there are more queries, one tile holds them all and the softmax needs a single pass."""

CUDNN_WINS = {40: (1024, 1024), 64: (9216, 9216), 80: (1024, 4096)}
"""Head size: positions of an image and of the batch from which on cuDNN's forward kernel was faster on an H200."""


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` by PyTorch's own fused function."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def cudnn_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether cuDNN's forward kernel is to serve: where it was measured."""
    if q.shape[3] not in CUDNN_WINS or q.dtype not in HALF_DTYPES:
        return False
    image, batch = CUDNN_WINS[q.shape[3]]
    if min(q.shape[1], k.shape[1]) < image or len(q) * q.shape[1] < batch:
        return False
    on_gpu = all(x.is_cuda for x in (q, k, v)) and torch.cuda.get_device_capability(q.device) == (9, 0)
    return on_gpu and torch.backends.cudnn.is_available()


def attention_by_cudnn(q: Tensor, k: Tensor, v: Tensor, with_logsum: bool) -> tuple[Tensor, Tensor | None]:
    """What `_attention` returns, by cuDNN's forward kernel alone: its gradient was never twice the same."""
    q, k, v = (unit_stride(x).transpose(1, 2) for x in (q, k, v))
    out, logsum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, with_logsum)
    return out.transpose(1, 2).contiguous(), logsum.squeeze(3) * math.log2(math.e) if with_logsum else None


@triton.jit
def _forward_kernel(
    p_q,  # [B, N, H, D]
    p_k,  # [B, M, H, D]
    p_v,  # [B, M, H, D]
    p_out,  # [B, N, H, D], contiguous
    p_logsum,  # [B, H, N] float32: log2 of the sum over the keys of 2^(scaled score)
    scale,  # log2(e) / sqrt(D)
    N,
    M,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_km,
    stride_vb,
    stride_vm,
    stride_qh: tl.constexpr,  # constants, since 16 need not divide them
    stride_kh: tl.constexpr,
    stride_vh: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RAGGED: tl.constexpr,  # BLOCK_M does not divide M
):
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_out += (i_b * N * H + i_h) * D
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)

    b_q0 = load_rows(p_q, o_n, stride_qn, N, D, 0, D0)  # [BLOCK_N, D0]
    b_out0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    if D1 > 0:
        b_q1 = load_rows(p_q, o_n, stride_qn, N, D, D0, D1)  # [BLOCK_N, D1]
        b_out1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
    b_max = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)

    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_k0 = load_rows(p_k, o_m, stride_km, M, D, 0, D0, RAGGED)  # [BLOCK_M, D0]
        b_s = dot(b_q0, tl.trans(b_k0), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32))
        if D1 > 0:
            b_k1 = load_rows(p_k, o_m, stride_km, M, D, D0, D1, RAGGED)
            b_s = dot(b_q1, tl.trans(b_k1), b_s)
        if RAGGED:
            b_s = tl.where(o_m[None, :] < M, b_s, float("-inf"))

        b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1) * scale)
        b_p = tl.exp2(b_s * scale - b_new_max[:, None])  # [BLOCK_N, BLOCK_M]
        b_shrink = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
        b_max = b_new_max

        b_p = b_p.to(p_v.dtype.element_ty)
        b_v0 = load_rows(p_v, o_m, stride_vm, M, D, 0, D0, RAGGED)
        b_out0 = dot(b_p, b_v0, b_out0 * b_shrink[:, None])
        if D1 > 0:
            b_v1 = load_rows(p_v, o_m, stride_vm, M, D, D0, D1, RAGGED)
            b_out1 = dot(b_p, b_v1, b_out1 * b_shrink[:, None])

    b_inverse = 1 / b_sum
    store_rows(p_out, o_n, H * D, N, D, 0, D0, b_out0 * b_inverse[:, None])
    if D1 > 0:
        store_rows(p_out, o_n, H * D, N, D, D0, D1, b_out1 * b_inverse[:, None])
    tl.store(p_logsum + tl.program_id(1) * N + o_n, b_max + tl.log2(b_sum), mask=o_n < N)


@triton.jit
def _query_gradient_kernel(
    p_q,  # [B, N, H, D]
    p_k,  # [B, M, H, D]
    p_v,  # [B, M, H, D]
    p_out,  # [B, N, H, D], contiguous
    p_dout,  # [B, N, H, D]
    p_logsum,  # [B, H, N] float32
    p_delta,  # [B, H, N] float32, written: sum of dout * out over D
    p_dq,  # [B, N, H, D], written
    scale,  # log2(e) / sqrt(D)
    N,
    M,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_km,
    stride_vb,
    stride_vm,
    stride_gb,
    stride_gn,
    stride_qh: tl.constexpr,
    stride_kh: tl.constexpr,
    stride_vh: tl.constexpr,
    stride_gh: tl.constexpr,
    ROW: tl.constexpr,  # elements from a row of each gradient to the next; images follow one another
    H: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RAGGED: tl.constexpr,
):
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_dout += i_b * stride_gb + i_h * stride_gh
    p_out += (i_b * N * H + i_h) * D
    p_dq += i_b * N * ROW + i_h * D
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)

    b_q0 = load_rows(p_q, o_n, stride_qn, N, D, 0, D0)  # [BLOCK_N, D0]
    b_g0 = load_rows(p_dout, o_n, stride_gn, N, D, 0, D0)
    b_delta = tl.sum(b_g0.to(tl.float32) * load_rows(p_out, o_n, H * D, N, D, 0, D0), axis=1)
    b_dq0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    if D1 > 0:
        b_q1 = load_rows(p_q, o_n, stride_qn, N, D, D0, D1)  # [BLOCK_N, D1]
        b_g1 = load_rows(p_dout, o_n, stride_gn, N, D, D0, D1)
        b_delta += tl.sum(b_g1.to(tl.float32) * load_rows(p_out, o_n, H * D, N, D, D0, D1), axis=1)
        b_dq1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
    o_row = tl.program_id(1) * N + o_n
    tl.store(p_delta + o_row, b_delta, mask=o_n < N)
    b_logsum = tl.load(p_logsum + o_row, mask=o_n < N, other=0.0)

    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)  # keys beyond M are zero, so whatever dS they get adds nothing to dq
        b_k0 = load_rows(p_k, o_m, stride_km, M, D, 0, D0, RAGGED)  # [BLOCK_M, D0]
        b_v0 = load_rows(p_v, o_m, stride_vm, M, D, 0, D0, RAGGED)
        b_s = dot(b_q0, tl.trans(b_k0), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32))
        b_dp = dot(b_g0, tl.trans(b_v0), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32))
        if D1 > 0:
            b_k1 = load_rows(p_k, o_m, stride_km, M, D, D0, D1, RAGGED)
            b_v1 = load_rows(p_v, o_m, stride_vm, M, D, D0, D1, RAGGED)
            b_s = dot(b_q1, tl.trans(b_k1), b_s)
            b_dp = dot(b_g1, tl.trans(b_v1), b_dp)
        b_p = tl.exp2(b_s * scale - b_logsum[:, None])
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(p_k.dtype.element_ty)  # [BLOCK_N, BLOCK_M]
        b_dq0 = dot(b_ds, b_k0, b_dq0)
        if D1 > 0:
            b_dq1 = dot(b_ds, b_k1, b_dq1)

    scale *= 0.6931471805599453  # ln 2: back to 1 / sqrt(D)
    store_rows(p_dq, o_n, ROW, N, D, 0, D0, b_dq0 * scale)
    if D1 > 0:
        store_rows(p_dq, o_n, ROW, N, D, D0, D1, b_dq1 * scale)


@triton.jit
def _key_gradient_kernel(
    p_q,  # [B, N, H, D]
    p_k,  # [B, M, H, D]
    p_v,  # [B, M, H, D]
    p_dout,  # [B, N, H, D]
    p_logsum,  # [B, H, N] float32
    p_delta,  # [B, H, N] float32
    p_dk,  # [B, M, H, D], written
    p_dv,  # [B, M, H, D], written
    scale,  # log2(e) / sqrt(D)
    N,
    M,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_km,
    stride_vb,
    stride_vm,
    stride_gb,
    stride_gn,
    stride_qh: tl.constexpr,
    stride_kh: tl.constexpr,
    stride_vh: tl.constexpr,
    stride_gh: tl.constexpr,
    ROW: tl.constexpr,  # elements from a row of each gradient to the next; images follow one another
    H: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RAGGED: tl.constexpr,  # BLOCK_N does not divide N
):
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_dout += i_b * stride_gb + i_h * stride_gh
    p_logsum += tl.program_id(1) * N
    p_delta += tl.program_id(1) * N
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)

    b_k0 = load_rows(p_k, o_m, stride_km, M, D, 0, D0)  # [BLOCK_M, D0]
    b_v0 = load_rows(p_v, o_m, stride_vm, M, D, 0, D0)
    b_dk0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    b_dv0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    if D1 > 0:
        b_k1 = load_rows(p_k, o_m, stride_km, M, D, D0, D1)  # [BLOCK_M, D1]
        b_v1 = load_rows(p_v, o_m, stride_vm, M, D, D0, D1)
        b_dk1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
        b_dv1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)

    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_q0 = load_rows(p_q, o_n, stride_qn, N, D, 0, D0, RAGGED)  # [BLOCK_N, D0]
        b_g0 = load_rows(p_dout, o_n, stride_gn, N, D, 0, D0, RAGGED)
        b_s = dot(b_k0, tl.trans(b_q0), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
        if D1 > 0:
            b_q1 = load_rows(p_q, o_n, stride_qn, N, D, D0, D1, RAGGED)
            b_g1 = load_rows(p_dout, o_n, stride_gn, N, D, D0, D1, RAGGED)
            b_s = dot(b_k1, tl.trans(b_q1), b_s)
        # Rows beyond N get probability zero.
        b_logsum = tl.load(p_logsum + o_n, mask=o_n < N, other=float("inf"))
        b_delta = tl.load(p_delta + o_n, mask=o_n < N, other=0.0)
        b_p = tl.exp2(b_s * scale - b_logsum[None, :])  # [BLOCK_M, BLOCK_N]

        b_p_low = b_p.to(p_q.dtype.element_ty)
        b_dv0 = dot(b_p_low, b_g0, b_dv0)
        b_dp = dot(b_v0, tl.trans(b_g0), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
        if D1 > 0:
            b_dv1 = dot(b_p_low, b_g1, b_dv1)
            b_dp = dot(b_v1, tl.trans(b_g1), b_dp)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(p_q.dtype.element_ty)
        b_dk0 = dot(b_ds, b_q0, b_dk0)
        if D1 > 0:
            b_dk1 = dot(b_ds, b_q1, b_dk1)

    scale *= 0.6931471805599453  # ln 2: back to 1 / sqrt(D)
    p_dk += i_b * M * ROW + i_h * D
    p_dv += i_b * M * ROW + i_h * D
    store_rows(p_dk, o_m, ROW, M, D, 0, D0, b_dk0 * scale)
    store_rows(p_dv, o_m, ROW, M, D, 0, D0, b_dv0)
    if D1 > 0:
        store_rows(p_dk, o_m, ROW, M, D, D0, D1, b_dk1 * scale)
        store_rows(p_dv, o_m, ROW, M, D, D0, D1, b_dv1)


# Head size up to: BLOCK_N, BLOCK_M, warps, stages, the narrowest part of a head; found on an H200.
_TILES = {
    "forward": {
        48: (128, 64, 4, 3, 64), 64: (64, 128, 4, 2, 64), 128: (64, 64, 4, 3, 16), 160: (64, 64, 4, 3, 16),
        256: (64, 32, 4, 2, 64),
    },
    "query_gradient": {
        48: (128, 64, 8, 3, 64), 64: (64, 64, 4, 3, 64), 80: (64, 64, 4, 3, 16), 128: (64, 64, 4, 2, 64),
        160: (64, 64, 4, 3, 16), 256: (32, 32, 4, 2, 64),
    },
    "key_gradient": {
        48: (32, 128, 4, 4, 16), 64: (128, 64, 4, 2, 64), 80: (64, 64, 4, 3, 16), 128: (64, 128, 8, 3, 64),
        160: (64, 32, 4, 2, 64), 256: (32, 32, 4, 2, 64),
    },
}  # fmt: skip
_FLOAT32_TILES = {64: (64, 32, 4, 2, 32), 128: (32, 32, 4, 2, 32), 256: (16, 16, 4, 2, 32)}


def _tiles(kernel: str, q: Tensor, k: Tensor, *others: Tensor) -> dict[str, int]:
    """Head size, its parts and tile sizes, as keyword arguments of a kernel that reads these tensors."""
    width = q.shape[3]
    table = _FLOAT32_TILES if q.dtype == torch.float32 else _TILES[kernel]
    block_n, block_m, warps, stages, least = next(tiles for limit, tiles in table.items() if width <= limit)
    if width > 64 and has_little_shared_memory(q):
        stages = min(stages, 2)
    if 1 in (q.shape[1], k.shape[1]) or not all(_is_fetched_ahead(x) for x in (q, k, *others)):
        # Tiles narrower than 128 bytes are stored in another order, and ptxas 12.8 (of Triton 3.6) confuses addresses
        # where a kernel without a pipelined loop mixes two orders. (A count of 1 is a constant, and leaves no loop.)
        least = 128 // q.element_size()
    d0, d1 = split_width(width, least)
    sizes = {"D": width, "D0": d0, "D1": d1, "BLOCK_N": block_n, "BLOCK_M": block_m}
    return sizes | {"num_warps": warps, "num_stages": stages}


def _is_fetched_ahead(x: Tensor) -> bool:
    """Whether Triton knows that rows of `[B, N, H, D]` begin and end at multiples of 4 bytes, for asynchronous copies.

    Of arguments it knows what 16 divides; the heads' stride and D are constants.
    """
    known = x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0
    return known and all(count * x.element_size() % 4 == 0 for count in (x.stride(2), x.shape[3]))


def _layout(**tensors: Tensor) -> dict[str, int]:
    """Strides of `[B, N, H, D]` tensors as keyword arguments of a kernel."""
    strides = {}
    for name, tensor in tensors.items():
        rows = "m" if name in "kv" else "n"
        strides |= {f"stride_{name}b": tensor.stride(0), f"stride_{name}{rows}": tensor.stride(1)}
        strides[f"stride_{name}h"] = tensor.stride(2)
    return strides


@library_op("p2pz::attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, by_cudnn: bool) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, D]` and the logarithms of the rows' sums `[B, H, N]`, of base 2."""
    if by_cudnn:
        return attention_by_cudnn(q, k, v, with_logsum=True)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, count, heads, _ = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsum = torch.empty(batch, heads, count, dtype=torch.float32, device=q.device)
    tiles = _tiles("forward", q, k, v)
    launch(
        _forward_kernel, (triton.cdiv(count, tiles["BLOCK_N"]), batch * heads),
        q, k, v, out, logsum, score_scale(q), count, keys, **_layout(q=q, k=k, v=v),
        H=heads, **tiles, RAGGED=keys % tiles["BLOCK_M"] != 0,
    )  # fmt: skip
    return out, logsum


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, by_cudnn: bool) -> tuple[Tensor, Tensor]:
    logsum = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    return q.new_empty(q.shape), logsum


@library_op("p2pz::attention_backward")
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsum: Tensor, with_keys: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to q, and `with_keys` to k and v, as `_places` lays them out."""
    q, k, v, dout = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(dout)
    batch, count, heads, _ = q.shape
    keys = k.shape[1]
    gradients = _places(q, k, with_keys)
    dq, dk, dv = _unpacked(*gradients)
    delta = torch.empty_like(logsum)
    common = _layout(q=q, k=k, v=v, g=dout) | {"H": heads}
    scale = score_scale(q)

    tiles = _tiles("query_gradient", q, k, v, dout)
    launch(
        _query_gradient_kernel, (triton.cdiv(count, tiles["BLOCK_N"]), batch * heads),
        q, k, v, out, dout, logsum, delta, dq, scale, count, keys, **common,
        ROW=dq.stride(1), **tiles, RAGGED=keys % tiles["BLOCK_M"] != 0,
    )  # fmt: skip
    if with_keys:
        tiles = _tiles("key_gradient", q, k, v, dout)
        launch(
            _key_gradient_kernel, (triton.cdiv(keys, tiles["BLOCK_M"]), batch * heads),
            q, k, v, dout, logsum, delta, dk, dv, scale, count, keys, **common,
            ROW=dk.stride(1), **tiles, RAGGED=count % tiles["BLOCK_N"] != 0,
        )  # fmt: skip
    return gradients


@_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsum: Tensor, with_keys: bool
) -> tuple[Tensor, Tensor]:
    return _places(q, k, with_keys)


def _places(q: Tensor, k: Tensor, with_keys: bool) -> tuple[Tensor, Tensor]:
    """For gradients, `[B, N, 3, H, D]` and `[B, M, 0, H, D]` where N = M, else `[B, N, 1, H, D]` and `[B, M, 2, H, D]`.

    The former is the layout of one projection for all three, see `split_projection`. Without keys, those go.
    """
    as_one = q.shape[1] == k.shape[1]
    counts = 3 if with_keys and as_one else 1, 2 if with_keys and not as_one else 0
    return tuple(q.new_empty(*x.shape[:2], n, *x.shape[2:]) for x, n in zip((q, k), counts, strict=True))


def _unpacked(first: Tensor, second: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to q, k and v as views of what `_places` returns; None for those that are not there."""
    dq, *dkeys = *first.unbind(2), *second.unbind(2)
    return dq, *(dkeys or (None, None))


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output)


def _backward(ctx, dout: Tensor | None, _):
    if dout is None:
        return None, None, None, None
    needed = ctx.needs_input_grad[:3]
    with_keys = any(needed[1:])
    gradients = _unpacked(*_attention_backward(dout, *ctx.saved_tensors, with_keys))
    return *(g if each else None for g, each in zip(gradients, needed, strict=True)), None


_attention.register_autograd(_backward, setup_context=_setup_context)


class _SplitProjection(torch.autograd.Function):
    """See `split_projection`."""

    @staticmethod
    def forward(ctx, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return projection.chunk(3, dim=-1)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _side_by_side(*gradients):
            return torch.cat(gradients, dim=-1)
        first = gradients[0]
        return first.as_strided((*first.shape[:-1], 3 * first.shape[-1]), first.stride(), first.storage_offset())


def _side_by_side(*tensors: Tensor) -> bool:
    """Whether tensors `[B, N, C]` are neighbouring columns of one in memory."""
    first, width = tensors[0], tensors[0].shape[-1]
    return all(
        tensor.stride() == first.stride() and tensor.data_ptr() == first.data_ptr() + i * width * first.element_size()
        for i, tensor in enumerate(tensors)
    ) and first.stride()[1:] == (len(tensors) * width, 1)


def split_projection(projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one product, as views.

    The gradients that `attention` gives them lie beside each other already, so the product's needs no copy.

    Args:
        projection: `[B, N, 3 * C]`.

    Returns:
        Three of `[B, N, C]`.
    """
    return _SplitProjection.apply(projection)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """Attention output, `softmax(q k^T / sqrt(D)) v`, without keeping the maps.

    Differentiable with respect to q, k and v. Nothing of size N x M is stored in either direction.

    Args:
        q: queries, `[B, N, H, D]`. Any strides; the projections' own layout is read in place.
        k: keys, `[B, M, H, D]`, dtype of `q`.
        v: values, `[B, M, H, D]`, dtype of `q`.
        backend: `"torch"`, `"triton"` (CUDA; float16, bfloat16 or float32; D up to 256), or `"auto"`: Triton where it
            can, else torch; with cuDNN's forward kernel where that is faster.

    Returns:
        `[B, N, H, D]`, dtype of `q`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend cannot take them.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.
    """
    check_attention(q, k=k, v=v)
    by_cudnn = backend == "auto" and cudnn_is_faster(q, k, v)
    if by_cudnn and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return attention_by_cudnn(q, k, v, with_logsum=False)[0]
    if choose_triton(backend, too_large(q.shape[3]), q, k, v):
        if k.shape[1] <= FEW_KEYS and k.shape[1] < q.shape[1]:
            return short_attention(q, k, v)
        return _attention(q, k, v, by_cudnn)[0]
    return attention_reference(q, k, v)
