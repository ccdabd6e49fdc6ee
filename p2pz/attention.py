"""Attention as an argument: every attention layer of the UNet calls `attend(q, k, v, site)`.

Whoever wants to look at attention, or change it, passes another function of that form. Nothing is patched and nothing
is registered: a recorder or a guide is a closure that owns what it collects. Residual blocks can be looked at, and
changed, in the same way: each calls `features(x, site)`, if there is such a function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from p2pz.kernels import attention, attention_with_maps, guided_attention

KINDS = ("self", "cross", "features")
BRANCHES = ("edit", "reference", "sample", "inversion")
HALVES = ("conditional", "negative")


@dataclass(frozen=True)
class Site:
    """Where in the UNet, and when in a run, a hook is called.

    Attributes:
        path: the layer's name in the checkpoint, e.g. `mid_block.attentions.0.transformer_blocks.0.attn2` or
            `up_blocks.1.resnets.1`.
        kind: `"self"` or `"cross"` attention, or `"features"` of a residual block.
        height, width: size of the feature map; its `height * width` positions are the queries, row by row.
        heads: number of attention heads; 0 in a residual block.
        branch: what the images of the call are being made into: `"edit"`, `"reference"`, `"sample"` or `"inversion"`;
            empty in a forward pass outside these.
        half: `"negative"` or `"conditional"` half of classifier-free guidance.
        step, timestep: number of the step in its run, from 0, and what the UNet is told.
        guiding: the pass serves the gradient of the map guidance; the one that makes the step follows.
    """

    path: str
    kind: str
    height: int
    width: int
    heads: int
    branch: str = ""
    half: str = "conditional"
    step: int = 0
    timestep: int = 0
    guiding: bool = False


Attend = Callable[[Tensor, Tensor, Tensor, Site], Tensor]
"""`attend(q [B, N, H, D], k [B, M, H, D], v [B, M, H, D], site) -> out [B, N, H, D]`."""


def plain(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """The default: attention, no maps kept."""
    return attention(q, k, v)


Features = Callable[[Tensor, Site], Tensor]
"""`features(x [B, C, h, w], site) -> x`: what a residual block's second convolution makes, before the block adds that
convolution's bias and its own input to it."""


class Hooks(NamedTuple):
    """Both functions that a forward pass can be given, in the place of `attend`.

    Attributes:
        attend: called in every attention layer.
        features: called in every residual block; None: nothing is called.
    """

    attend: Attend = plain
    features: Features | None = None


def hooks_of(attend: Attend | Hooks) -> Hooks:
    """The same for an `attend` alone."""
    return attend if isinstance(attend, Hooks) else Hooks(attend)


class Part(NamedTuple):
    """Neighbouring rows of a batch that are of one kind.

    Attributes:
        rows: how many.
        branch, half: see `Site`.
        ahead: steps by which they are ahead of the batch's step.
    """

    rows: int
    branch: str
    half: str
    ahead: int = 0


def hooks_by_parts(
    hooks: Hooks, parts: Sequence[Part], index: Tensor, timesteps: Sequence[int], guiding: bool = False
) -> Hooks:
    """Hooks that show somebody's functions each kind of rows alone, and tell them what these are.

    Args:
        hooks: the functions; what they return is checked. The defaults are given back as they are.
        parts: of the batch, in order.
        index: number of the step, `[1]`.
        timesteps: of all steps. Rows that are ahead of the last one get plain attention, and keep their features.
        guiding: see `Site`.

    Returns:
        Hooks for the UNet. They raise ValueError, naming the site, for an output that is no tensor of the right shape,
        dtype and device.
    """
    when, (attend, features) = (parts, index, timesteps, guiding), hooks
    return Hooks(
        plain if attend is plain else _by_parts("attend", attend, attention, *when),
        None if features is None else _by_parts("features", features, lambda x: x, *when),
    )


def _by_parts(
    name: str,
    hook: Callable[..., Tensor],
    default: Callable[..., Tensor],
    parts: Sequence[Part],
    index: Tensor,
    timesteps: Sequence[int],
    guiding: bool,
) -> Callable[..., Tensor]:
    """A hook of either kind; `default` is what rows that are ahead of the last step get."""
    step, rows = int(index), [part.rows for part in parts]

    def call_for_each(*states_and_site: Tensor | Site) -> Tensor:
        *whole, site = states_and_site
        outs = []
        for part, *states in zip(parts, *(x.split(rows) for x in whole), strict=True):
            now = step + part.ahead
            if now >= len(timesteps):
                outs.append(default(*states))
                continue
            when = {"step": now, "timestep": int(timesteps[now]), "guiding": guiding}
            told = replace(site, branch=part.branch, half=part.half, **when)
            out = hook(*states, told)
            _check_out(name, out, states[0], states[-1], told)
            outs.append(out)
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    return call_for_each


def _check_out(name: str, out: Tensor, first: Tensor, last: Tensor, site: Site) -> None:
    """The output is like queries and values, or like features."""
    wanted = f"{last.dtype} {[*first.shape[:3], last.shape[3]]} on {last.device}"
    found = f"{out.dtype} {list(out.shape)} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
    if found != wanted:
        when = f"step {site.step}, {site.branch} {site.half}"
        raise ValueError(f"{name} must return {wanted}, not {found}: at {site.path} ({when})")


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


def keep_queries_and_keys(kept: QueriesAndKeys, attend: Attend = plain) -> Attend:
    """An `attend` that keeps what the maps of every cross-attention layer are made of; far smaller than the maps.

    Args:
        kept: receives q and k by path, overwritten by each forward pass.
        attend: gives the output.

    Returns:
        A function for the `attend` argument of the UNet.
    """

    def attend_and_keep(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.kind == "cross":
            kept[site.path] = q, k
        return attend(q, k, v, site)

    return attend_and_keep


def guide_cross_attention(
    reference: QueriesAndKeys, losses: list[Tensor], attend: Attend = plain, token_weights: Tensor | None = None
) -> Attend:
    """An `attend` that measures how far the cross-attention maps are from reference maps.

    Each cross-attention layer appends one tensor `[B]`: the squared difference of the maps, summed over positions and
    tokens and averaged over the heads. The sum of the list is the loss of every image on its own.

    Args:
        reference: queries and keys of the reference pass at the same timestep, see `keep_queries_and_keys`.
        losses: receives the per-layer losses, differentiable with respect to `q`.
        attend: gives the output; plain attention on a GPU is computed together with the loss.
        token_weights: factor of each token's squared differences, `[M]` or `[B, M]`; None: 1.

    Returns:
        A function for the `attend` argument of the UNet.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), equation 6.
    """

    def attend_and_guide(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.kind == "self":
            return attend(q, k, v, site)
        weights = {} if token_weights is None else {"weights": token_weights}
        out, loss = guided_attention(q, k, v, *reference[site.path], **weights)
        losses.append(loss)
        # On the CPU the output that comes with the loss differs from the default's by rounding: an `attend` that gives
        # the default would change the result.
        return out if attend is plain and q.is_cuda else attend(q, k, v, site)

    return attend_and_guide
