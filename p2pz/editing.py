"""The edit itself: a reference pass and an edit pass in lockstep, tied together by their cross-attention maps."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from p2pz.attention import (
    Attend,
    Features,
    Hooks,
    Part,
    QueriesAndKeys,
    Site,
    guide_cross_attention,
    hooks_by_parts,
    hooks_of,
    keep_queries_and_keys,
    plain,
)
from p2pz.captions import captions_for
from p2pz.checks import check_finite, edit_warnings
from p2pz.directions import Direction, direction, parse_direction
from p2pz.engine import Tensors, explain_out_of_memory, row
from p2pz.images import ImageLike, as_list, psnr, same_size_groups, to_pictures
from p2pz.inversion import Inversion, common_steps, invert_pictures, open_images
from p2pz.memory import batches_for, keep_tables, tables_for_queries
from p2pz.model import Model, loaded
from p2pz.presets import Settings, settings_for
from p2pz.recording import Recorder, given_hooks, hooks_in_step
from p2pz.schedule import ddim_step, denoising_schedule, guided
from p2pz.sentences import source_prompt
from p2pz.tokens import weigh_tokens
from p2pz.unet import Conditioning


@dataclass(frozen=True)
class EditResult:
    """What `edit` returns for an image.

    Attributes:
        image: the edited picture.
        reconstruction: what the reference ended with, near the original if all is well: with the reference "path" what
            the autoencoder makes of the image, with "denoised" what the noise gives with the caption.
        inversion: the image as noise; pass it to `edit` again to save the inversion.
        prompt: the caption that was used.
        reconstruction_psnr: of the reconstruction against the image as the model works on it, in dB; None if it
            began with an inversion that has not kept the image.
        warnings: what is doubtful about it, a line each: nothing changed, or the image was lost.
        settings: the numbers of this edit; None if another method than `edit` made it.
    """

    image: Image.Image
    reconstruction: Image.Image
    inversion: Inversion
    prompt: str
    reconstruction_psnr: float | None
    warnings: tuple[str, ...] = ()
    settings: Settings | None = None


class _LastMapSeen(Exception):
    """Ends a forward pass that only its cross-attention maps are wanted of."""


def map_gradient(
    model: Model,
    latents: Tensor,
    conditioning: Conditioning,
    reference: QueriesAndKeys,
    attend: Attend | Hooks = plain,
    resolution_weights: Sequence[float] = (),
    token_weights: Tensor | None = None,
) -> Tensor:
    """Gradient, with respect to the latents, of the distance between their cross-attention maps and reference maps.

    Each latent has a loss of its own: squared differences summed over layers, positions and tokens, and averaged over
    the heads.

    Args:
        model: the model.
        latents: `[B, 4, h, w]`.
        conditioning: timestep and texts, as in `Model.predict`.
        reference: what the reference maps are made of, see `keep_queries_and_keys`.
        attend: what happens in every attention layer, or `Hooks` of that and of features.
        resolution_weights: factors of the loss, see `p2pz.presets.Settings`.
        token_weights: factors of the tokens, `[M]` or `[B, M]`; None: 1.

    Returns:
        `[B, 4, h, w]`.

    Source: Parmar et al. (2023), equation 6.
    """
    losses: list[Tensor] = []
    hooks = hooks_of(attend)
    guide = guide_cross_attention(reference, losses, hooks.attend, token_weights)
    *_, last = reference

    def guide_to_the_last(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        out = guide(q, k, v, site)
        del losses[len(reference) :]  # a checkpointed layer's second ones: they count already, and hold its memory
        if site.path == last:
            raise _LastMapSeen
        return out

    with torch.enable_grad():
        latents = latents.detach().requires_grad_()
        with contextlib.suppress(_LastMapSeen):
            model.predict(latents, conditioning, Hooks(guide_to_the_last, hooks.features), model.checkpoint)
        if resolution_weights:
            last_level = len(resolution_weights) - 1
            levels = [min(model.unet.level_of(path), last_level) for path in reference]
            # Another list: `losses` is appended to, and cut again, while activations are computed a second time.
            weighed = [loss * resolution_weights[level] for loss, level in zip(losses, levels, strict=True)]
        else:
            weighed = losses
        return torch.autograd.grad(torch.stack(weighed).sum(), latents)[0]


def followed_rows(settings: Settings) -> int:
    """How many rows of an edit, one or both halves of a classifier-free pair, map guidance takes the gradient of."""
    return 1 if settings.gradient == "conditional" or settings.guidance == 1 else 2


def guided_range(settings: Settings) -> range:
    """Numbers of the steps with map guidance."""
    begin, end = (round(share * settings.steps) for share in settings.guided_steps)
    return range(begin, end if settings.xa_guidance else begin)


def _spread(states: Tensor, images: int, copies: int, halves: int) -> Tensor:
    """Repeat states of reference images for edits: from `[r * images, ...]`, r being 1 or 2 halves of a classifier-free
    pair, to `[halves * copies * images, ...]`. One half serves both, and of two the last, conditional one serves alone.
    """
    states = states.unflatten(0, (-1, 1, images))[-halves:]
    return states.expand(halves, copies, images, *states.shape[3:]).flatten(0, 2)


MASK_SHARES = (0.2, 0.35, 0.5, 0.65)
"""Of the steps, where the change of the predicted noise is looked at."""


@torch.no_grad()
def mask_of_change(model: Model, path: Tensor, caption: Tensor, edited: Tensor, threshold: float) -> Tensor:
    """Where a direction changes the predicted noise of an image's own latents.

    Args:
        model: the model.
        path: latents of the inversion, `[steps + 1, B, 4, h, w]`.
        caption: text states, `[B, 77, d]`.
        edited: caption plus direction, `[K * B, 77, d]`.
        threshold: share of the largest change.

    Returns:
        `[K * B, 1, h, w]`, 1 where it acts, 0 elsewhere.

    Source: after Couairon et al., "DiffEdit: Diffusion-based Semantic Image Editing with Mask Guidance" (2023),
    section 3.2, step 1.
    """
    steps, images = len(path) - 1, len(caption)
    copies = len(edited) // images
    schedule = denoising_schedule(steps)
    indices = [round(share * (steps - 1)) for share in MASK_SHARES]
    change = torch.zeros(len(edited), 1, *path.shape[3:], device=model.device)
    states = torch.cat([caption, edited])
    shifts, keys_values = model.condition(schedule.timesteps[indices], states, path.shape[3:])
    graphs, model = model.split()

    def predict(latents: Tensor, shifts: Tensor, keys_values: Tensor) -> Tensors:
        return [model.predict(latents.repeat(1 + copies, 1, 1, 1), Conditioning(shifts, keys_values))]

    for index, shift in zip(indices, shifts, strict=True):
        latents = path[steps - index].to(model.device)
        (predictions,) = graphs.call(("mask", id(model.unet)), predict, [latents, shift, keys_values])
        own, others = predictions[:images], predictions[images:]
        # Of two v for the same latents the noises differ by sqrt(alpha-bar) of what these do.
        share = schedule.alphas_from[index] if model.prediction_type == "v_prediction" else 1.0
        change += share * (others - own.repeat(copies, 1, 1, 1)).square().mean(1, keepdim=True)
    change = F.avg_pool2d(F.pad(change, (1, 1, 1, 1), mode="replicate"), 3, 1).sqrt()
    largest = change.flatten(1).max(1).values.clamp(min=1e-12)
    mask = (change > threshold * largest[:, None, None, None]).float()
    return F.max_pool2d(mask, 3, 1, 1)


def parts_of_edit(images: int, edits: int, pairs: bool, reference_pairs: bool) -> list[Part]:
    """The rows of a step of the edit: first those of the edits, last those of the reference, which is a step ahead."""
    halves = ("negative", "conditional")
    return [
        *(Part(edits, "edit", half) for half in halves[1 - pairs :]),
        *(Part(images, "reference", half, ahead=1) for half in halves[1 - reference_pairs :]),
    ]


def _halves(latents: Tensor, pairs: bool) -> Tensor:
    """Latents for both halves of a classifier-free pair, or for the one that there is."""
    return torch.cat([latents, latents]) if pairs else latents


def _denoise(model: Model, inputs: Tensor, prediction: Tensor, alphas: Tensor, guidance: Tensor, pairs: bool) -> Tensor:
    """Latents a DDIM step on; `inputs` are their halves, of which the prediction was made."""
    noise = guided(model.to_noise(prediction, inputs, alphas[0]), guidance, pairs)
    return ddim_step(inputs[: len(noise)], noise, *alphas)


@dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of an edit, functions on tensors. Recorded, they outlive it: so they hold no tensors of images.

    Attributes:
        model: without what it has recorded.
        settings: the numbers.
        images, edits: how many there are.
        reference_pairs: whether the reference, too, has a negative half.
        weighs: whether the constants end with weights of tokens; the inversion's queries come behind them.
        hooks: what happens in the layers.
        watcher: a recorder without what it keeps.
        timesteps: of all steps.
    """

    model: Model
    settings: Settings
    images: int
    edits: int
    reference_pairs: bool
    weighs: bool
    hooks: Hooks
    watcher: Recorder | None
    timesteps: Tensor

    @property
    def pairs(self) -> bool:
        """Whether the edits have a negative half."""
        return self.settings.guidance != 1

    @property
    def edit_rows(self) -> int:
        """Rows of the edits in a batch; those of the reference come behind them."""
        return self.edits * (1 + self.pairs)

    @property
    def parts(self) -> list[Part]:
        """Of a batch of both."""
        return parts_of_edit(self.images, self.edits, self.pairs, self.reference_pairs)

    @property
    def edit_parts(self) -> list[Part]:
        """Of a batch of the edits alone."""
        return self.parts[: 1 + self.pairs]

    @property
    def reference_parts(self) -> list[Part]:
        """Of a batch of the reference alone, which is then not ahead."""
        return [part._replace(ahead=0) for part in self.parts[1 + self.pairs :]]

    @property
    def layers(self) -> int:
        """How many layers of a reference that is denoised leave queries for the next step."""
        return len(self.model.unet.cross_attention_paths) if guided_range(self.settings) else 0

    @property
    def looks(self) -> bool:
        """Whether somebody wants to see the reference also at steps without map guidance."""
        return self.hooks != Hooks() or (self.watcher is not None and "reference" in self.watcher.branches)

    def told(self, parts: list[Part], index: Tensor, maps: list[Tensor]) -> Hooks:
        """Hooks for a pass of these parts; `maps` receives what the recorder is to keep."""
        return hooks_in_step(self.hooks, self.watcher, parts, index, self.timesteps, maps)

    def pass_of_reference(
        self, latents: Tensor, conditioning: Conditioning, index: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Prediction, queries layer by layer, and what the recorder is to keep, of a batch of the reference alone."""
        kept: QueriesAndKeys = {}
        maps: list[Tensor] = []
        hooks = self.told(self.reference_parts, index, maps)
        hooks = hooks._replace(attend=keep_queries_and_keys(kept, hooks.attend))
        inputs = _halves(latents, self.reference_pairs)
        prediction = self.model.predict(inputs, conditioning.of(slice(self.edit_rows, None)), hooks)
        return prediction, [q for q, _ in kept.values()], maps

    def guide(
        self,
        latents: Tensor,
        queries: Sequence[Tensor],
        conditioning: Conditioning,
        scale: Tensor,
        weights: Tensor | None,
        index: Tensor,
    ) -> Tensor:
        """The halves of the edits' latents, moved towards the reference's maps, which have these queries."""
        followed = followed_rows(self.settings)
        start = latents if followed == 1 else _halves(latents, True)
        spread = partial(_spread, images=self.images, copies=self.edits // self.images, halves=followed)
        keys = self.model.unet.keys(conditioning.keys_values[self.edit_rows :])
        reference = {path: (spread(q), spread(k)) for q, (path, k) in zip(queries, keys.items(), strict=True)}
        own = conditioning.of(slice(self.edit_rows - len(start), self.edit_rows))
        hooks = hooks_by_parts(self.hooks, self.edit_parts[-followed:], index, self.timesteps, guiding=True)
        gradient = map_gradient(self.model, start, own, reference, hooks, self.settings.resolution_weights, weights)
        if followed == 1:
            return _halves(latents - scale * gradient, self.pairs)
        if self.settings.gradient == "both":
            return _halves(latents - scale * (sum(gradient.chunk(2)) / 2), True)
        return start - scale * gradient / 2

    def on_path(self, guiding: bool, index: Tensor, state: Tensors, constants: Tensors) -> Tensors:
        """The inversion is the reference. If it has left no queries, a pass of its form makes them, to the last bit."""
        (latents, *_), (shifts, keys_values, alphas, scales, path, *rest) = state, constants
        weights, queries = (rest[0], rest[1:]) if self.weighs else (None, rest)
        conditioning = Conditioning(row(shifts, index), keys_values)
        seen: list[Tensor] = []
        if (guiding or self.looks) and not queries:
            _, queries, seen = self.pass_of_reference(row(path, index), conditioning, index)
        elif self.watcher and queries:
            keys = self.model.unet.keys(keys_values[self.edit_rows :])
            seen = self.watcher.maps_of(queries, keys, self.reference_parts, index)
        moved = (
            self.guide(latents, queries, conditioning, scales[1], weights, index)
            if guiding
            else _halves(latents, self.pairs)
        )
        maps: list[Tensor] = []
        hooks = self.told(self.edit_parts, index, maps)
        prediction = self.model.predict(moved, conditioning.of(slice(self.edit_rows)), hooks)
        latents = _denoise(self.model, moved, prediction, row(alphas, index), scales[0], self.pairs)
        return [latents, *(self.watcher.weave(maps, seen) if self.watcher else [])]

    def first_of_reference(self, index: Tensor, latents: Tensor, *constants: Tensor) -> Tensors:
        """The step by which a reference that is denoised is ahead."""
        shifts, keys_values, alphas, scales, *_ = constants
        prediction, queries, maps = self.pass_of_reference(latents, Conditioning(shifts[0], keys_values), index)
        inputs = _halves(latents, self.reference_pairs)
        latents = _denoise(self.model, inputs, prediction, alphas[0], scales[0], self.reference_pairs)
        return [latents, *queries[: self.layers], *maps]

    def behind_reference(self, guiding: bool, index: Tensor, state: Tensors, constants: Tensors) -> Tensors:
        """Edits, and the next step of the reference, in one batch."""
        (latents, reference, *before), (shifts, keys_values, alphas, scales, *rest) = state, constants
        weights, own, others = rest[0] if self.weighs else None, slice(self.edit_rows), slice(self.edit_rows, None)
        moved = _halves(latents, self.pairs)
        if guiding:
            conditioning = Conditioning(row(shifts, index), keys_values)
            moved = self.guide(latents, before[: self.layers], conditioning, scales[1], weights, index)

        kept: QueriesAndKeys = {}
        maps: list[Tensor] = []
        hooks = self.told(self.parts, index, maps)
        hooks = hooks._replace(attend=keep_queries_and_keys(kept, hooks.attend))
        inputs = torch.cat([moved, _halves(reference, self.reference_pairs)])
        now, later = (row(shifts, i).expand(len(inputs), -1) for i in (index, index + 1))
        shifts = torch.cat([now[own], later[others]])
        prediction = self.model.predict(inputs, Conditioning(shifts, keys_values), hooks)
        now, later = row(alphas, index), row(alphas, index + 1)
        latents = _denoise(self.model, inputs[own], prediction[own], now, scales[0], self.pairs)
        reference = _denoise(self.model, inputs[others], prediction[others], later, scales[0], self.reference_pairs)
        queries = [q[others] for q, _ in kept.values()] if self.layers else []
        return [latents, reference, *queries, *maps]


@torch.no_grad()
def edit_latents(
    model: Model,
    noise: Tensor,
    caption: Tensor,
    negative: Tensor | None,
    edited: Tensor,
    settings: Settings,
    progress: bool | None = None,
    path: Tensor | None = None,
    token_weights: Tensor | None = None,
    attend: Attend | Hooks = plain,
    recorder: Recorder | None = None,
    queries: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoise with the caption and with edited captions, in lockstep.

    At every step the reference pass leaves what its cross-attention maps are made of; the latents of each edit move
    down the gradient of the distance to these maps, and then all take a DDIM step. Nothing is kept for longer. A
    reference that is denoised is always one step ahead: its pass knows nothing of the edits, and so shares a batch with
    theirs. One on the inversion's path needs passes only if the inversion has not left its queries.

    Args:
        model: the model.
        noise: where all start, `[B, 4, h, w]` float32.
        caption: text states of the captions, `[B, 77, d]`.
        negative: text states of the negative prompts; None: the captions, so that the reference pass needs no second
            half and guidance does not pull it away from the image.
        edited: caption plus direction, `[K * B, 77, d]`: all images with the first direction, then with the next.
        settings: steps, guidance, map guidance.
        progress: show a bar; None: on a terminal only.
        path: for the reference `"path"`, the latents of the inversion, `[steps + 1, B, 4, h, w]`.
        token_weights: factors of each caption's tokens in the map loss, `[B, 77]`; None: 1.
        attend: what happens in every attention layer of both passes, or `Hooks` of that and of features, see
            `p2pz.attention`; any but the default runs unrecorded. A step of the reference comes before the same step of
            the edits.
        recorder: keeps cross-attention maps, see `p2pz.recording`.
        queries: for the reference `"path"`, what the inversion left, see `invert_latents`: no reference pass then, and
            no hook that would want to see it.

    Returns:
        Latents of the edits, `[K * B, 4, h, w]`, and of the reference, `[B, 4, h, w]`.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), algorithm 1.
    """
    hooks, on_path = hooks_of(attend), settings.reference == "path"
    images, edits, copies = len(noise), len(edited), len(edited) // len(noise)
    pairs, others = settings.guidance != 1, caption if negative is None else negative
    reference_pairs = pairs and negative is not None
    texts = [*([others.repeat(copies, 1, 1)] if pairs else []), edited, *([others] if reference_pairs else []), caption]
    schedule = denoising_schedule(settings.steps)
    shifts, keys_values = model.condition(schedule.timesteps, torch.cat(texts), noise.shape[2:])
    # One row more for the reference, which is a step ahead: after the last step it stands still.
    shifts = torch.cat([shifts, shifts[-1:]])
    alphas = torch.cat([schedule.alphas, schedule.alphas[-1:, 1:].expand(1, 2)])
    tables = [shifts, keys_values, alphas, torch.tensor([settings.guidance, settings.xa_guidance])]
    if on_path:
        tables += [path[:-1].flip(0)]  # what the inversion's pass for each timestep was given
    if token_weights is not None:
        weights = token_weights.repeat(copies, 1)
        of_negative = weights if negative is None else torch.ones_like(weights)  # the places are the caption's
        tables += [torch.cat([of_negative, weights])[-followed_rows(settings) * edits :]]
    constants = [tensor.to(model.device) for tensor in tables]

    each, watcher, empty_maps = None, None, []
    if recorder:
        seen = parts_of_edit(images, edits, pairs, reference_pairs)
        if on_path:
            seen = [part._replace(ahead=0) for part in seen]
        empty_maps = recorder.begin(model.unet, seen, noise, schedule.timesteps, keys_values.shape[1])
        watcher = recorder.watcher()

        def each(i: int, state: Tensors) -> None:
            recorder.take(i, seen, state[len(state) - len(empty_maps) :])

    graphs, model = model.split(hooks == Hooks())
    steps = _Steps(
        model, settings, images, edits, reference_pairs, token_weights is not None, hooks, watcher, schedule.timesteps
    )
    kind = (
        "edit", id(model.unet), model.prediction_type, model.checkpoint, pairs, reference_pairs, steps.weighs,
        steps.layers, on_path, settings.gradient, settings.resolution_weights, recorder and recorder.key,
    )  # fmt: skip
    latents = noise.repeat(copies, 1, 1, 1)
    if on_path:
        step, state = steps.on_path, [latents, *empty_maps]
    else:
        first = torch.zeros(1, dtype=torch.int64, device=model.device)
        reference, *left = graphs.call(("reference", *kind), steps.first_of_reference, [first, noise, *constants])
        if recorder:
            recorder.take(0, steps.reference_parts, left[steps.layers :])
        step, state = steps.behind_reference, [latents, reference, *left[: steps.layers], *empty_maps]
    backwards = [table.unbind()[::-1] for table in queries or ()]
    span = guided_range(settings)
    for first_step, last_step, guiding in (
        (0, span.start, False),
        (span.start, span.stop, True),
        (span.stop, settings.steps, False),
    ):
        if first_step < last_step:
            state = graphs.run(
                (*kind, guiding), partial(step, guiding), state, constants, last_step - first_step, "editing", progress,
                each, first_step, backwards if guiding or steps.looks else (),
            )  # fmt: skip
    return state[0], path[0].to(model.device) if on_path else state[1]


@explain_out_of_memory
def edit(
    img: ImageLike | Inversion | Sequence[ImageLike | Inversion],
    direction: str | Direction | Sequence[str | Direction],
    *,
    model: Model | None = None,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | None = None,
    preset: str = "p2pz",
    steps: int | None = None,
    strength: float | None = None,
    guidance: float | None = None,
    xa_guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    size: int | None = None,
    progress: bool | None = None,
    token_weights: Mapping[str, float] | None = None,
    attend: Attend = plain,
    features: Features | None = None,
    record: Recorder | None = None,
    **settings: Any,
) -> EditResult | list[EditResult] | list[list[EditResult]]:
    """Change one concept in images and keep the rest (pix2pix-zero).

    Args:
        img: a path, a PIL image, an `[H, W, 3]` array, an `Inversion` of the same model, or a list of these. Images
            are resized to the size the model works at, about `model.native_size` squared pixels in their own shape.
        direction: "cat->dog", or a `Direction` made with this model's text encoder, or a list of these: all edits of an
            image share one inversion and one reference pass.
        model: None loads the default model.
        prompt: what the image shows, one text or one per image. None: an inversion's own prompt; the bundled model
            recognises the image; other models assume "a photo of a cat" for the (first) direction "cat->dog".
        negative_prompt: None takes the prompt, which keeps the reference pass on the image. It needs guidance above 1.
        preset: `"p2pz"`, `"authors"` or `"diffusers"`, see `p2pz.presets`.
        steps: 1 to 999; None takes the inversion's or else the preset's.
        strength: multiple of the direction, stronger edits with larger values; None takes the preset's.
        guidance: classifier-free guidance scale, likewise; None takes the preset's.
        xa_guidance: step length of the cross-attention map guidance, closer to the image with larger values; None takes
            the preset's.
        seed: of all randomness; the same seed gives the same result, alone or in a batch.
        batch_size: edits of images of one size that are worked on at once; fewer if the model's memory budget says so.
        size: images are worked on at about `size * size` pixels, 64 to 1536; None: `model.native_size`.
        progress: show bars; None: on a terminal only.
        token_weights: words of the prompt -> factor of their maps in the map guidance's loss; 0 lets them go.
        attend: what happens in every attention layer of reference and edit, see `p2pz.attention`.
        features: what becomes of the features of every residual block, likewise; None: they stay.
        record: keeps cross-attention maps, see `p2pz.record`.
        settings: further fields of `p2pz.presets.Settings`.

    Returns:
        An `EditResult`; for a list of images or of directions a list of them; for lists of both a list for each image.

    Raises:
        ValueError: an image, a direction or a setting is wrong, or `max_memory` too small; the message says which.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023).
    """
    model = loaded(model)
    items, single = as_list(img)
    directions, single_direction = as_list(direction, "directions")
    directions = [as_direction(words, model) for words in directions]
    steps = common_steps(items) if steps is None else steps
    settings |= {"steps": steps, "strength": strength, "guidance": guidance, "xa_guidance": xa_guidance}
    numbers = [settings_for(model, preset, style=each.is_style, **settings) for each in directions]
    if negative_prompt is not None and numbers[0].guidance == 1:
        warnings.warn("a negative prompt does nothing at guidance 1: give a larger guidance too", stacklevel=3)

    rows = max(2 + (each.guidance != 1) * (1 + (negative_prompt is not None)) for each in numbers)
    guided_rows = max(bool(guided_range(each)) * followed_rows(each) for each in numbers)
    if guided_rows and torch.is_inference_mode_enabled():
        raise ValueError("map guidance needs gradients: call edit outside of torch.inference_mode()")

    if size is not None and all(isinstance(item, Inversion) for item in items):
        raise ValueError("size is the size at which images are inverted, so an inversion has its own: leave it out")
    pictures, sizes = open_images(items, model, size)
    for item in items:
        if isinstance(item, Inversion):
            check_path(item, numbers[0])
    batches = batches_for(model, sizes, batch_size, rows, guided_rows)
    prompts = prompts_for(items, pictures, prompt, source_prompt(directions[0].source), model)
    hooks = given_hooks(attend, features, record)
    results: list[list[EditResult | None]] = [[None] * len(directions) for _ in items]
    as_inverted = hooks == Hooks() and negative_prompt is None and numbers[0].reference == "path"
    for plan, batch in batches:
        model = plan.apply(model)
        fresh = [i for i in batch if i in pictures]
        inversions = {i: items[i] for i in batch if i not in pictures}
        captions = [prompts[i] for i in batch]
        caption, weights = model.encode_text(captions), _map_weights(model, captions, token_weights)
        queries = None  # computed again
        if as_inverted and guided_rows > 0 and len(fresh) == len(batch):
            queries = tables_for_queries(model, sizes[batch[0]], len(batch), numbers[0].steps)
        if fresh:
            own = caption[[batch.index(i) for i in fresh]]
            made = invert_pictures(
                model, [pictures[i] for i in fresh], [prompts[i] for i in fresh], numbers[0], seed, progress, own,
                queries=queries,
            )  # fmt: skip
            inversions |= zip(fresh, made, strict=True)
        for some in _alike(numbers, max(1, plan.images // len(batch))):
            edited, reconstructions = _edit_batch(
                model, [inversions[i] for i in batch], caption, negative_prompt,
                [directions[j] for j in some], [numbers[j] for j in some], progress, weights, hooks, record,
                queries,
            )  # fmt: skip
            made_of = list(itertools.product(some, batch))
            if record:
                order = [i * len(directions) + j for j, i in made_of]
                own_rows = [{"edit": k, "reference": k % len(batch)} for k in range(len(made_of))]
                record.finish(order, captions * len(some), own_rows)
            originals = [inversions[i].picture or pictures.get(i) for i in batch]
            qualities = [psnr(*pair) if pair[1] else None for pair in zip(reconstructions, originals, strict=True)]
            for k, (j, i) in enumerate(made_of):
                reconstruction, quality = reconstructions[k % len(batch)], qualities[k % len(batch)]
                acts = numbers[j].strength > 0 and bool(directions[j].states.any())
                unchanged = inversions[i].picture if numbers[j].blend else reconstruction
                doubts = edit_warnings(edited[k], unchanged if acts else None, quality, numbers[j].reference)
                facts = inversions[i], prompts[i], quality, tuple(doubts), numbers[j]
                results[i][j] = EditResult(edited[k], reconstruction, *facts)
        keep_tables(model, queries)
    chosen = [each[0] if single_direction else each for each in results]
    return chosen[0] if single else chosen


def _alike(numbers: Sequence[Settings], most: int) -> list[list[int]]:
    """Indices of the settings that can share a batch, at most `most` together: only their strengths may differ."""
    groups = same_size_groups([astuple(replace(settings, strength=0.0)) for settings in numbers])
    return [group[start : start + most] for group in groups for start in range(0, len(group), most)]


def as_direction(words: str | Direction, model: Model) -> Direction:
    """The direction that "cat->dog" stands for, or a given one after checking that it fits the model.

    Raises:
        ValueError: the words are no direction, or the direction is another text encoder's.
    """
    if isinstance(words, str):
        return direction(*parse_direction(words), model=model)
    if not isinstance(words, Direction):
        raise ValueError(f'a direction is words such as "cat->dog" or a Direction, not {type(words).__name__}')
    words.check_fits(model)
    return words


def _map_weights(model: Model, captions: Sequence[str], factors: Mapping[str, float] | None) -> Tensor | None:
    """Weights of the captions' tokens in the map loss, `[B, 77]`. Raises ValueError for one below zero."""
    if not factors:
        return None
    if not isinstance(factors, Mapping):
        raise ValueError(f'token_weights go from words to numbers, such as {{"cat": 0.5}}, not {factors!r:.100}')
    weights = torch.stack([weigh_tokens(model, caption, factors) for caption in captions])
    if weights.min() < 0:
        raise ValueError(f"token_weights must be zero or more, not {weights.min():g}")
    return weights


def check_path(inversion: Inversion, settings: Settings) -> None:
    """Raise ValueError if an edit is to follow an inversion's path, and cannot."""
    if settings.reference == "path" and inversion.path is None:
        raise ValueError(
            "this edit follows the inversion's path, which was not kept, as by another preset: edit with that "
            'preset (--preset) or with reference="denoised", blend=0, or invert again'
        )
    if settings.reference == "path" and inversion.steps != settings.steps:
        raise ValueError(
            f"this inversion has {inversion.steps} steps, and an edit that follows it takes as many, not "
            f"{settings.steps}: leave steps out (--steps), or invert again"
        )


def _edit_batch(
    model: Model,
    inversions: Sequence[Inversion],
    caption: Tensor,
    negative_prompt: str | None,
    directions: Sequence[Direction],
    settings: Sequence[Settings],
    progress: bool | None,
    token_weights: Tensor | None,
    hooks: Hooks,
    recorder: Recorder | None,
    queries: Sequence[Tensor] | None,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Edited pictures, those of the first direction first, and reconstructions of a batch."""
    noise = torch.stack([inversion.latents for inversion in inversions]).to(model.device)
    negative = None if negative_prompt is None else model.encode_negative([negative_prompt]).expand_as(caption)
    deltas = [
        each.strength * direction.states.to(caption) for direction, each in zip(directions, settings, strict=True)
    ]
    edited = torch.cat([caption + delta for delta in deltas])
    path = mask = None
    if settings[0].reference == "path":
        path = torch.stack([inversion.path for inversion in inversions], dim=1)
    if settings[0].blend:
        mask = mask_of_change(model, path, caption, edited, settings[0].blend)
    latents, reference = edit_latents(
        model, noise, caption, negative, edited, settings[0], progress, path, token_weights, hooks, recorder, queries
    )
    timestep = denoising_schedule(settings[0].steps).timesteps[0]
    start = noise.repeat(len(directions), 1, 1, 1)
    check_finite(torch.cat([latents, reference]), model, start, timestep, edited)
    pictures, reconstructions = draw(model, latents, reference)
    if mask is not None:  # the autoencoder would blur what is not to be changed
        originals = [inversion.picture for inversion in inversions] * len(directions)
        pictures = [keep_outside(*three) for three in zip(pictures, originals, mask.cpu(), strict=True)]
    return pictures, reconstructions


def draw(model: Model, *latents: Tensor) -> list[list[Image.Image]]:
    """Pictures of each batch of latents, `[B, 4, h, w]`, decoded without a wait of the GPU in between."""
    drawn = iter(to_pictures(model.decode_latents(torch.cat(latents))))
    return [list(itertools.islice(drawn, len(batch))) for batch in latents]


def keep_outside(picture: Image.Image, original: Image.Image, mask: Tensor) -> Image.Image:
    """A picture inside a mask, `[1, h, w]` from 0 to 1, and the original outside it."""
    levels = Image.fromarray((mask[0] * 255).round().to(torch.uint8).numpy())
    return Image.composite(picture, original, levels.resize(picture.size, Image.Resampling.BILINEAR))


def prompts_for(
    items: Sequence[ImageLike | Inversion],
    pictures: dict[int, Image.Image],
    prompt: str | Sequence[str] | None,
    default: str,
    model: Model,
) -> list[str]:
    """A caption for each of a mixture of images and inversions.

    Args:
        items: images and inversions.
        pictures: the images as they are worked on, by their places among the items.
        prompt: one text, or one for each item; None: an inversion's own, and for images see `captions_for`.
        default: what is assumed of an image if nothing is known.
        model: the model.
    """
    if prompt is not None:
        return captions_for(items, prompt, default, model)
    if not pictures:
        return [item.prompt for item in items]
    found = dict(zip(pictures, captions_for(list(pictures.values()), None, default, model), strict=True))
    return [found[i] if i in pictures else item.prompt for i, item in enumerate(items)]
