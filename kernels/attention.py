"""Scaled dot-product attention in the `[B, N, H, D]` layout, with or without its probability maps."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention output, `softmax(q k^T / sqrt(D)) v`, without keeping the maps.

    Args:
        q: queries, `[B, N, H, D]`.
        k: keys, `[B, M, H, D]`.
        v: values, `[B, M, H, D]`.

    Returns:
        `[B, N, H, D]`, dtype of `q`.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def attend_with_probabilities(probabilities: Tensor, v: Tensor) -> Tensor:
    """Weigh the values with given maps.

    Args:
        probabilities: `[B, H, N, M]`.
        v: values, `[B, M, H, D]`.

    Returns:
        `[B, N, H, D]`, dtype of `v`.
    """
    return torch.einsum("bhnm,bmhd->bnhd", probabilities.to(v.dtype), v)
