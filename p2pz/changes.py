"""Changes of attention, and ways to combine them; each is a function for an `attend` argument.

A change is an `attend` with one argument more, what would happen without it:

    change(q, k, v, site, attend=plain) -> out

so it may hand other queries, keys or values on, or work on the output, or do something else altogether. Those below
change what is being made, an edit or a sample, and leave reference and inversion alone; those of cross-attention
concern the conditional half, whose tokens are the caption's. The combinators apply to every call they are given.

A change of features, for a `features` argument, is `change(x, site) -> x`. `chain`, `only` and `between` combine such
changes too; without them features stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pz.attention import BRANCHES, HALVES, KINDS, Attend, Features, Site, plain
from p2pz.kernels import attend_with_probabilities, attention_probabilities, attention_with_maps, edited_attention

Change = Callable[..., Tensor]


def _around(change: Change, attend: Attend) -> Attend:
    """The change around an `attend`; around the default it may be a function of four arguments."""
    return change if attend is plain else partial(change, attend=attend)


def _either(of_attention: Change, of_features: Features) -> Change:
    """One function for both kinds of calls: `q, k, v, site` and perhaps `attend`, or `x, site`."""
    return lambda *call, **more: (of_features if len(call) == 2 else of_attention)(*call, **more)


def chain(*changes: Change) -> Change:
    """One change of several: each gets the next as its `attend`, and the last the default.

    So the first has the last word on the output, and the last on what becomes of the queries, keys and values. Of
    features: the last is applied first.

    Args:
        changes: at least one, all of attention or all of features; the last may be any `attend` function of four
            arguments.
    """
    first, *others = changes
    if not others:
        return first
    rest = chain(*others)

    def chained(q: Tensor, k: Tensor, v: Tensor, site: Site, attend: Attend = plain) -> Tensor:
        return first(q, k, v, site, _around(rest, attend))

    return _either(chained, lambda x, site: first(rest(x, site), site))


def where(
    path: str = "",
    *,
    kind: str | None = None,
    branch: str | None = None,
    half: str | None = None,
    positions: tuple[int, int] = (0, 2**31),
) -> Callable[[Site], bool]:
    """A test of sites, for `only`.

    Args:
        path: part of the layer's path, with `*` for anything: `"mid_block"`, `"up_blocks.*.attentions.1"`.
        kind, branch, half: as in `Site`; None: any.
        positions: least and most positions (height times width) of the layer.

    Raises:
        ValueError: a kind, branch or half that there is not.
    """
    wanted = {}
    for name, value, known in (("kind", kind, KINDS), ("branch", branch, BRANCHES), ("half", half, HALVES)):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        wanted |= {} if value is None else {name: value}
    least, most = positions

    def here(site: Site) -> bool:
        fits = all(getattr(site, name) == value for name, value in wanted.items())
        return fits and least <= site.height * site.width <= most and fnmatchcase(site.path, f"*{path}*")

    return here


def only(sites: str | Callable[[Site], bool], change: Change) -> Change:
    """A change at some sites; elsewhere nothing happens.

    Args:
        sites: part of a path as in `where`, or a test such as `where` gives.
        change: a change, or an `attend` or `features` function. One that follows the reference must see its calls too:
            choose its layers, not its branch.
    """
    here = where(sites) if isinstance(sites, str) else sites

    def change_there(q: Tensor, k: Tensor, v: Tensor, site: Site, attend: Attend = plain) -> Tensor:
        return (_around(change, attend) if here(site) else attend)(q, k, v, site)

    return _either(change_there, lambda x, site: change(x, site) if here(site) else x)


def between(steps: range | tuple[float, float], change: Change) -> Change:
    """A change in some steps.

    Args:
        steps: their numbers, `range(5, 10)`; or shares of the way from noise to image, in training timesteps, between
            which a step has to end: `(0.0, 0.4)` for the first 40 % of an edit or sample. An inversion walks this way
            backwards.
        change: a change, or an `attend` or `features` function.

    Raises:
        ValueError: the shares are not in order, from 0 to 1.
    """
    if isinstance(steps, range):
        return only(lambda site: site.step in steps, change)
    if not (len(steps) == 2 and 0 <= steps[0] <= steps[1] <= 1):
        raise ValueError(f"steps must be a range, or two shares from 0 to 1, the smaller first, not {steps}")
    begin, end = (round(1000 * share) for share in steps)
    return only(lambda site: begin < 1001 - site.timestep <= end, change)  # of 1000; a step's share ends at 1001 - t


def with_probabilities(change: Callable[[Tensor, Site], Tensor]) -> Change:
    """A change of the maps themselves, which are computed in full.

    Args:
        change: `change(probabilities [B, H, N, M], site) -> probabilities`, differentiable where a gradient is wanted.
    """

    def attend_changed(q: Tensor, k: Tensor, v: Tensor, site: Site, attend: Attend = plain) -> Tensor:
        probabilities = attention_probabilities(q, k)
        changed = change(probabilities, site)
        if not isinstance(changed, Tensor) or changed.shape != probabilities.shape:
            found = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(f"maps must stay {list(probabilities.shape)}, not {found}: at {site.path}")
        return attend_with_probabilities(changed, v)

    return attend_changed


class _AddedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return out.view_as(out)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.saved_tensors[0]


def with_loss(out: Tensor, loss: Tensor) -> Tensor:
    """The output of a layer, carrying a loss: whoever differentiates what is made of it differentiates the loss too.

    In the guiding passes of `p2pz.edit` (`site.guiding`) the loss joins that of the map guidance, so that the latents
    move down the gradient of the sum. Another map guidance alone: `xa_guidance` as step length and
    `resolution_weights=(0.0,)`. A guiding pass ends at the last cross-attention layer, whose loss is lost.

    Args:
        out: `[B, N, H, D]`.
        loss: any shape; its elements are summed.

    Returns:
        The same output.
    """
    return _AddedLoss.apply(out, loss)


# Changes of what is made.


def _is_made(site: Site) -> bool:
    return site.branch not in ("reference", "inversion")


def _captioned(site: Site) -> bool:
    """Cross-attention to the caption of what is being made."""
    return site.kind == "cross" and site.half == "conditional" and _is_made(site)


def _spread(x: Tensor, rows: int) -> Tensor:
    """Rows of the images for edits with several directions: all images with the first, then with the next."""
    return torch.cat([x] * (rows // len(x)))


def _for_rows(factors: Tensor | None, q: Tensor, axes: int) -> Tensor | None:
    """Factors with so many axes, or one more for the images, where `q` is; spread if there are several directions."""
    if factors is None:
        return None
    factors = factors.to(q.device)
    return factors if factors.ndim == axes else _spread(factors, len(q))


class _Reference:
    """What the reference had at each layer.

    Its step comes before the edit's same step, and a layer's rows of the edit before those of the reference's next
    step; so one step of each layer is all there is to keep. For a half that the reference has not got its conditional
    half serves.
    """

    def __init__(self):
        self._kept: dict[str, tuple[int, dict[str, tuple[Tensor, ...]]]] = {}

    def keep(self, site: Site, *states: Tensor) -> None:
        step, halves = self._kept.get(site.path, (None, {}))
        self._kept[site.path] = site.step, (halves if step == site.step else {}) | {site.half: states}

    def at(self, site: Site, rows: int) -> tuple[Tensor, ...]:
        """For so many rows of the edit."""
        step, halves = self._kept.get(site.path, (None, {}))
        if step != site.step or site.branch != "edit":
            raise ValueError(
                f"this change follows the reference pass of p2pz.edit, and has not seen step {site.step} of it at "
                f"{site.path}: do not keep it from the reference (choose layers and steps, not a branch)"
            )
        states = halves[site.half] if site.half in halves else halves["conditional"]
        return tuple(_spread(x, rows) for x in states)


def _follow(kind: str, use: Callable[..., Tensor]) -> Change:
    """A change of an edit that knows its reference: `use(q, k, v, site, attend, (q, k, v) of that)` is the output."""
    reference = _Reference()

    def follow(q: Tensor, k: Tensor, v: Tensor, site: Site, attend: Attend = plain) -> Tensor:
        if site.kind == kind and site.branch == "reference":
            reference.keep(site, q, k, v)
        if not (_captioned(site) if kind == "cross" else site.kind == "self" and _is_made(site)):
            return attend(q, k, v, site)
        return use(q, k, v, site, attend, reference.at(site, len(q)))

    return follow


def replace_maps(mapping: Tensor | None = None) -> Change:
    """The edit's cross-attention maps are the reference's.

    Args:
        mapping: how much of each token of the caption goes to each token of the edit, `[77, 77]`, or one for each
            image `[B, 77, 77]`; see `p2pz.methods.align_tokens`. None: token to same token, which fits `p2pz.edit`: a
            direction leaves the caption's words where they are.

    Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control" (2022), "word swap".
    """
    return refine_maps(None, mapping)


def refine_maps(mix: Tensor | None, mapping: Tensor | None = None) -> Change:
    """The edit's cross-attention maps are the reference's for some tokens, and its own for others.

    Args:
        mix: 1 for tokens with the reference's map, 0 for those with their own, `[77]`, or `[B, 77]` for the images.
            None: 1.
        mapping: see `replace_maps`.

    Source: Hertz et al. (2022), "adding a new phrase".
    """

    def use(q: Tensor, k: Tensor, v: Tensor, site: Site, attend: Attend, reference: tuple[Tensor, ...]) -> Tensor:
        factors = {"mapping": _for_rows(mapping, q, 2), "mix": _for_rows(mix, q, 1)}
        return edited_attention(q, k, v, *reference[:2], **factors)

    return _follow("cross", use)


def reweight_maps(weights: Tensor) -> Change:
    """Make tokens of the caption heard more or less.

    Args:
        weights: factor of each token's map, `[77]`, or `[B, 77]` for the images; see `p2pz.tokens.weigh_tokens`.

    Source: Hertz et al. (2022), "attention re-weighting".
    """

    def reweight(q: Tensor, k: Tensor, v: Tensor, site: Site, attend: Attend = plain) -> Tensor:
        if not _captioned(site):
            return attend(q, k, v, site)
        return edited_attention(q, k, v, q, k, weights=_for_rows(weights, q, 1))

    return reweight


def confine_tokens(regions: Mapping[int, Tensor]) -> Change:
    """Tokens of the caption are heard in a region only: the others share what they leave elsewhere.

    Args:
        regions: place in the padded caption -> `[h, w]` of any size, 1 inside and 0 outside; between them the token is
            heard less. Not all tokens may be confined.
    """

    kept: dict[tuple[int, int], Tensor] = {}

    def confine(q: Tensor, k: Tensor, v: Tensor, site: Site, attend: Attend = plain) -> Tensor:
        if not _captioned(site):
            return attend(q, k, v, site)
        if not set(regions) < set(range(k.shape[1])):
            raise ValueError(f"tokens to confine must be some of 0 to {k.shape[1] - 1}, not {sorted(regions)}")
        size = site.height, site.width
        if size not in kept:
            share = torch.ones(q.shape[1], k.shape[1])
            for token, region in regions.items():
                share[:, token] = at_size(region, site).flatten()
            kept[size] = share.log().to(q)  # added to the scores, it multiplies the maps, which are normed again
        states = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*states, attn_mask=kept[size].to(q)).transpose(1, 2)

    return confine


def at_size(region: Tensor, site: Site) -> Tensor:
    """A map `[h, w]` as `[site.height, site.width]` float32, each position the mean of what it covers."""
    return F.interpolate(region[None, None].float(), (site.height, site.width), mode="area")[0, 0]


def guide_towards(
    target: Callable[[Site], Tensor], tokens: Sequence[int] | None = None, strength: float = 1.0
) -> Change:
    """Latents move so that tokens look where they should: in `p2pz.edit`, in the steps that have map guidance.

    The loss is the squared difference between the mean of the heads' maps and the target, summed over positions and
    tokens, and added to that of the map guidance, see `with_loss`.

    Args:
        target: `target(site) -> maps`, `[N, T]` or `[B, N, T]` for a layer's N positions row by row and T tokens.
        tokens: places of the T tokens in the padded caption. None: all.
        strength: factor of the loss.

    Source: after Parmar et al., "Zero-shot Image-to-Image Translation" (2023), equation 6.
    """

    def guide(q: Tensor, k: Tensor, v: Tensor, site: Site, attend: Attend = plain) -> Tensor:
        if _captioned(site) and site.branch == "sample":
            raise ValueError("p2pz.sample takes no gradients and cannot be guided: p2pz.edit can, or a loop of yours")
        if not _captioned(site) or not q.requires_grad:
            return attend(q, k, v, site)
        out, maps = attention_with_maps(q, k, v, dtype=torch.float32, head_mean=True, tokens=tokens)
        wanted = target(site).to(maps)
        if wanted.shape not in (maps.shape, maps.shape[1:]):
            raise ValueError(f"target must give {list(maps.shape[1:])}, not {list(wanted.shape)}: at {site.path}")
        loss = strength * (maps - wanted).square().sum()
        return with_loss(out if attend is plain else attend(q, k, v, site), loss)

    return guide


def share_keys_and_values() -> Change:
    """The edit's self-attention asks the reference: its queries meet the reference's keys and values.

    The edit then takes its looks from the image, wherever its own shapes are.

    Source: Cao et al., "MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing"
    (2023), section 3.2 (there from step 4 and in the decoder only: `between` and `only` say so).
    """
    return _follow("self", lambda q, k, v, site, attend, reference: attend(q, *reference[1:], site))


def inject_queries_and_keys() -> Change:
    """The edit's self-attention maps are the reference's: its layout stays, while values are its own.

    Source: Tumanyan et al., "Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation" (2023),
    section 4 (there in the decoder and the first half of the steps, together with `inject_features`).
    """
    return _follow("self", lambda q, k, v, site, attend, reference: attend(*reference[:2], v, site))


def inject_features() -> Features:
    """The edit's residual features are the reference's: its shapes stay. For the `features` argument.

    Everywhere that is nearly the whole reference: `only("up_blocks.1.resnets.1", ...)` chooses the paper's block.

    Source: Tumanyan et al. (2023), section 4 (there in that block of Stable Diffusion 1, layer 4 of the decoder, and
    the first 80 % of the steps).
    """
    reference = _Reference()

    def inject(x: Tensor, site: Site) -> Tensor:
        if site.branch == "reference":
            reference.keep(site, x)
        return reference.at(site, len(x))[0] if _is_made(site) else x

    return inject
