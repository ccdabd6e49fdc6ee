"""Building blocks inside the attention kernels: load and store tiles of strided matrices, multiply, softmax.

A tile's sides must be powers of two. Columns beyond a matrix are read as zero and not written.
"""

from torch import Tensor

from p2pz.kernels import dispatch
from p2pz.kernels.dispatch import tl, triton

PRECISION = tl.constexpr("tf32x3")
"""How float32 tiles are multiplied: by three tensor-core products of halved numbers, which is nearly exact."""

INTERPRETED = tl.constexpr(dispatch.INTERPRETED)


@triton.jit
def dot(a, b, accumulator):
    """`accumulator + a b` in float32."""
    if INTERPRETED:  # the interpreter cannot multiply bfloat16 matrices
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def load_rows(
    p_rows,  # row 0 of a matrix [COUNT, WIDTH] with unit column stride
    o_row,  # [R] row numbers
    stride,
    count,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,  # first column of the tile
    BLOCK: tl.constexpr,  # columns of the tile
    CHECK: tl.constexpr = True,  # False: all row numbers are known to be below count
):
    """Tile `[R, BLOCK]`."""
    o_column = FIRST + tl.arange(0, BLOCK)
    p_tile = p_rows + o_row[:, None] * stride + o_column[None, :]
    if CHECK and FIRST + BLOCK > WIDTH:
        return tl.load(p_tile, mask=(o_row[:, None] < count) & (o_column[None, :] < WIDTH), other=0.0)
    elif CHECK:
        return tl.load(p_tile, mask=o_row[:, None] < count, other=0.0)
    elif FIRST + BLOCK > WIDTH:
        return tl.load(p_tile, mask=o_column[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def store_rows(p_rows, o_row, stride, count, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, tile):
    """Write a tile `[R, BLOCK]` where `load_rows` would read it, in the matrix's dtype."""
    o_column = FIRST + tl.arange(0, BLOCK)
    mask = o_row[:, None] < count
    if FIRST + BLOCK > WIDTH:
        mask = mask & (o_column[None, :] < WIDTH)
    tl.store(p_rows + o_row[:, None] * stride + o_column[None, :], tile.to(p_rows.dtype.element_ty), mask=mask)


# What follows is for kernels that hold all keys of a head in one tile of BLOCK_M >= M, so that the softmax needs no
# second pass. Columns are multiplied PIECE at a time.


@triton.jit
def product(
    p_a,  # [A, D]
    p_b,  # [B, D]
    o_a,  # [BLOCK_A]
    o_b,  # [BLOCK_B]
    stride_a,
    stride_b,
    A,
    B,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """`a b^T`, `[BLOCK_A, BLOCK_B]` float32."""
    b_product = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    for i_d in tl.static_range(0, D, PIECE):
        b_a = load_rows(p_a, o_a, stride_a, A, D, i_d, PIECE)  # [BLOCK_A, PIECE]
        b_b = load_rows(p_b, o_b, stride_b, B, D, i_d, PIECE)  # [BLOCK_B, PIECE]
        b_product = dot(b_a, tl.trans(b_b), b_product)
    return b_product


@triton.jit
def probabilities(
    p_q,  # [N, D] of an image and head
    p_k,  # [M, D]
    o_n,  # [BLOCK_N]
    stride_qn,
    stride_km,
    scale,  # log2(e) / sqrt(D)
    N,
    M: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Softmax over the keys, `[BLOCK_N, BLOCK_M]` float32, zero beyond M."""
    o_m = tl.arange(0, BLOCK_M)
    b_s = product(p_q, p_k, o_n, o_m, stride_qn, stride_km, N, M, D, PIECE, BLOCK_N, BLOCK_M)
    if M < BLOCK_M:
        b_s = tl.where(o_m[None, :] < M, b_s, float("-inf"))
    b_max = tl.max(b_s, axis=1) * scale
    b_p = tl.exp2(b_s * scale - b_max[:, None])
    b_share = 1.0 / tl.sum(b_p, axis=1)  # one division a row
    return b_p * b_share[:, None]


@triton.jit
def weigh(
    b_w,  # [BLOCK_N, BLOCK_M]
    b_factor,  # [BLOCK_N]
    p_x,  # [M, D] of an image and head
    p_y,  # [N, D]
    o_n,  # [BLOCK_N]
    stride_x,
    stride_y,
    N,
    M: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write `factor * (w x)` to y."""
    b_w = b_w.to(p_x.dtype.element_ty)
    for i_d in tl.static_range(0, D, PIECE):
        b_x = load_rows(p_x, tl.arange(0, BLOCK_M), stride_x, M, D, i_d, PIECE)  # [BLOCK_M, PIECE]
        b_y = dot(b_w, b_x, tl.zeros([BLOCK_N, PIECE], dtype=tl.float32))
        store_rows(p_y, o_n, stride_y, N, D, i_d, PIECE, b_y * b_factor[:, None])


@triton.jit
def lifted(b_w):
    """Rows scaled to a largest magnitude of 1, and the factors that undo it: small gradients vanish in float16."""
    b_largest = tl.maximum(tl.max(tl.abs(b_w), axis=1), 1e-30)
    return b_w * (1.0 / b_largest)[:, None], b_largest


# Bytes of an element, most keys: most queries of a program, warps. Found on an H200; never fewer than 16 queries.
_ROWS = {(2, 128): (64, 4), (2, 256): (32, 8), (4, 64): (16, 4), (4, 256): (16, 8)}

BUSY = 64
"""Programs below which each takes fewer queries."""


def plan(q: Tensor, keys: int, groups: int) -> dict[str, int]:
    """Sizes of tiles and launch options of a kernel that holds all keys in one tile.

    Args:
        q: queries, `[B, N, H, D]`.
        keys: their largest number M, up to 256.
        groups: what the programs share out besides the queries: B * H if each works on one head.

    Returns:
        Keyword arguments: M, D, PIECE, BLOCK_N, BLOCK_M, num_warps, num_stages.
    """
    count, width, size = q.shape[1], q.shape[3], q.element_size()
    block_m = max(128 // size, triton.next_power_of_2(keys))
    block_n, warps = next(row for (bytes_, most), row in _ROWS.items() if size == bytes_ and block_m <= most)
    while block_n > 16 and triton.cdiv(count, block_n) * groups < BUSY:
        block_n //= 2
    piece = 32 if size == 4 else 128 if 64 < width <= 128 else 64
    sizes = {"M": keys, "D": width, "PIECE": piece, "BLOCK_N": block_n, "BLOCK_M": block_m}
    return sizes | {"num_warps": warps, "num_stages": 1}  # more would only matter to loops, and multiply their memory
