"""Attention as an argument: every attention layer of the UNet calls `attend(q, k, v, site)`.

Whoever wants to look at attention, or change it, passes another function of that form. Nothing is patched and nothing
is registered: a recorder or a guide is a closure that owns what it collects.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pz.kernels import attention, attention_with_maps, guided_attention


@dataclass(frozen=True)
class Site:
    """Where in the UNet an attention call happens.

    Attributes:
        path: the layer's name in the checkpoint, e.g. `mid_block.attentions.0.transformer_blocks.0.attn2`.
        kind: `"self"` or `"cross"`.
        height, width: size of the feature map whose `height * width` positions are the queries, row by row.
        heads: number of attention heads.
    """

    path: str
    kind: str
    height: int
    width: int
    heads: int


Attend = Callable[[Tensor, Tensor, Tensor, Site], Tensor]
"""`attend(q [B, N, H, D], k [B, M, H, D], v [B, M, H, D], site) -> out [B, N, H, D]`."""


def attend(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """The default: plain attention, no maps kept."""
    return attention(q, k, v)


def record_cross_attention(maps: dict[str, Tensor]) -> Attend:
    """An `attend` that also stores the maps of every cross-attention layer.

    Args:
        maps: receives `site.path -> [B, H, N, M]` float32, overwritten by each forward pass.

    Returns:
        A function for the `attend` argument of the UNet.
    """

    def attend_and_record(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.kind == "self":
            return attention(q, k, v)
        out, maps[site.path] = attention_with_maps(q, k, v, dtype=torch.promote_types(q.dtype, torch.float32))
        return out

    return attend_and_record


QueriesAndKeys = dict[str, tuple[Tensor, Tensor]]
"""`site.path -> (q [B, N, H, D], k [B, M, H, D])` of the cross-attention layers: their maps, not yet computed."""


def keep_queries_and_keys(kept: QueriesAndKeys) -> Attend:
    """An `attend` that keeps what the maps of every cross-attention layer are made of; far smaller than the maps.

    Args:
        kept: receives q and k by path, overwritten by each forward pass.

    Returns:
        A function for the `attend` argument of the UNet.
    """

    def attend_and_keep(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.kind == "cross":
            kept[site.path] = q, k
        return attention(q, k, v)

    return attend_and_keep


def guide_cross_attention(reference: QueriesAndKeys, losses: list[Tensor]) -> Attend:
    """An `attend` that measures how far the cross-attention maps are from reference maps.

    Each cross-attention layer appends one tensor `[B]`: the squared difference of the maps, summed over positions and
    tokens and averaged over the heads. The sum of the list is the loss of every image on its own.

    Args:
        reference: queries and keys of the reference pass at the same timestep, see `keep_queries_and_keys`.
        losses: receives the per-layer losses, differentiable with respect to `q`.

    Returns:
        A function for the `attend` argument of the UNet.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), equation 6.
    """

    def attend_and_guide(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.kind == "self":
            return attention(q, k, v)
        out, loss = guided_attention(q, k, v, *reference[site.path])
        losses.append(loss)
        return out

    return attend_and_guide
