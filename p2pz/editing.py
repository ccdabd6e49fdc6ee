"""The edit itself: a reference pass and an edit pass in lockstep, tied together by their cross-attention maps."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from p2pz.attention import QueriesAndKeys, Site, guide_cross_attention, keep_queries_and_keys
from p2pz.captions import captions_for
from p2pz.directions import Direction, direction, is_medium, parse_direction, source_prompt
from p2pz.engine import Tensors, explain_out_of_memory, row
from p2pz.images import ImageLike, as_list, psnr, same_size_groups, to_pictures
from p2pz.inversion import Inversion, hide, invert_pictures, prepare_pictures
from p2pz.memory import plan_for
from p2pz.model import Model, load
from p2pz.presets import Settings, settings_for
from p2pz.schedule import ddim_step, denoising_schedule
from p2pz.unet import Conditioning


@dataclass(frozen=True)
class EditResult:
    """What `edit` returns for an image.

    Attributes:
        image: the edited picture.
        reconstruction: what the same noise gives without the edit; near the original if the inversion is good.
        inversion: the image as noise; pass it to `edit` again to save the inversion.
        prompt: the caption that was used.
        reconstruction_psnr: of the reconstruction against the image as the model works on it, in dB; None if the edit
            started from an inversion.
    """

    image: Image.Image
    reconstruction: Image.Image
    inversion: Inversion
    prompt: str
    reconstruction_psnr: float | None


def guided(noise: Tensor, guidance: Tensor | float, pairs: bool) -> Tensor:
    """Classifier-free guidance.

    Args:
        noise: predictions `[2 * B, 4, h, w]` of the negative and of the conditional half; without pairs `[B, 4, h, w]`.
        guidance: scale of the difference between the halves.
        pairs: whether there is a negative half.

    Returns:
        `[B, 4, h, w]`.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), equation 6, with w + 1 = guidance.
    """
    if not pairs:
        return noise
    negative, conditional = noise.chunk(2)
    return negative + guidance * (conditional - negative)


class _LastMapSeen(Exception):
    """Ends a forward pass that only its cross-attention maps are wanted of."""


def map_gradient(model: Model, latents: Tensor, conditioning: Conditioning, reference: QueriesAndKeys) -> Tensor:
    """Gradient, with respect to the latents, of the distance between their cross-attention maps and reference maps.

    Each latent has a loss of its own: squared differences summed over layers, positions and tokens, and averaged over
    the heads.

    Args:
        model: the model.
        latents: `[B, 4, h, w]`.
        conditioning: timestep and texts, as in `Model.predict`.
        reference: what the reference maps are made of, see `keep_queries_and_keys`.

    Returns:
        `[B, 4, h, w]`.

    Source: Parmar et al. (2023), equation 6.
    """
    losses: list[Tensor] = []
    guide = guide_cross_attention(reference, losses)
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
            model.predict(latents, conditioning, guide_to_the_last, model.checkpoint)
        return torch.autograd.grad(torch.stack(losses).sum(), latents)[0]


def followed_rows(settings: Settings) -> int:
    """How many rows of an edit, one or both halves of a classifier-free pair, map guidance takes the gradient of."""
    return 1 if settings.gradient == "conditional" or settings.guidance == 1 else 2


def _spread(states: Tensor, images: int, copies: int, halves: int) -> Tensor:
    """Repeat states of reference images for edits: from `[r * images, ...]`, r being 1 or 2 halves of a classifier-free
    pair, to `[halves * copies * images, ...]`. One half serves both, and of two the last, conditional one serves alone.
    """
    states = states.unflatten(0, (-1, 1, images))[-halves:]
    return states.expand(halves, copies, images, *states.shape[3:]).flatten(0, 2)


@torch.no_grad()
def edit_latents(
    model: Model,
    noise: Tensor,
    caption: Tensor,
    negative: Tensor | None,
    edited: Tensor,
    settings: Settings,
    progress: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoise with the caption and with edited captions, in lockstep.

    At every step the reference pass leaves what its cross-attention maps are made of; the latents of each edit move
    down the gradient of the distance to these maps, and then all take a DDIM step. Nothing is kept for longer. The
    reference is always one step ahead: its pass knows nothing of the edits, and so shares a batch with theirs.

    Args:
        model: the model.
        noise: where all start, `[B, 4, h, w]` float32.
        caption: text states of the captions, `[B, 77, d]`.
        negative: text states of the negative prompts; None: the captions, so that the reference pass needs no second
            half and guidance does not pull it away from the image.
        edited: caption plus direction, `[K * B, 77, d]`: all images with the first direction, then with the next.
        settings: steps, guidance, map guidance.
        progress: show a bar; None: on a terminal only.

    Returns:
        Latents of the edits, `[K * B, 4, h, w]`, and of the reference, `[B, 4, h, w]`.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), algorithm 1.
    """
    images, edits = len(noise), len(edited)
    copies = edits // images
    pairs, guides = settings.guidance != 1, settings.xa_guidance != 0
    negative_states = caption if negative is None else negative
    edit_texts = torch.cat([negative_states.repeat(copies, 1, 1), edited]) if pairs else edited
    reference_pairs = pairs and negative is not None
    reference_texts = torch.cat([negative_states, caption]) if reference_pairs else caption

    schedule = denoising_schedule(settings.steps)
    shifts, keys_values = model.condition(schedule.timesteps, torch.cat([edit_texts, reference_texts]))
    edit_rows, reference_rows = len(edit_texts), len(reference_texts)
    # One row more for the reference, which is a step ahead: after the last step it stands still.
    shifts = torch.cat([shifts, shifts[-1:]])
    alphas = torch.cat([schedule.alphas, schedule.alphas[-1:, 1:].expand(1, 2)])
    scales = torch.tensor([settings.guidance, settings.xa_guidance])
    constants = [tensor.to(model.device) for tensor in (shifts, keys_values, alphas, scales)]

    def halves(latents: Tensor, pairs: bool = pairs) -> Tensor:
        return torch.cat([latents, latents]) if pairs else latents

    def reference_queries(kept: QueriesAndKeys) -> list[Tensor]:
        """Those of the reference's rows, the last ones, layer by layer; its keys do not change."""
        return [queries[-reference_rows:] for queries, _ in kept.values()] if guides else []

    def step_reference(latents: Tensor, prediction: Tensor, alphas: Tensor, scales: Tensor) -> Tensor:
        noise = model.to_noise(prediction, halves(latents, reference_pairs), alphas[0])
        return ddim_step(latents, guided(noise, scales[0], reference_pairs), *alphas)

    def first(noise: Tensor, shifts: Tensor, keys_values: Tensor, alphas: Tensor, scales: Tensor) -> Tensors:
        """The reference's first step."""
        kept: QueriesAndKeys = {}
        conditioning = Conditioning(shifts[0], keys_values[edit_rows:])
        prediction = model.predict(halves(noise, reference_pairs), conditioning, keep_queries_and_keys(kept))
        return [step_reference(noise, prediction, alphas[0], scales), *reference_queries(kept)]

    def step(index: Tensor, state: Tensors, constants: Tensors) -> Tensors:
        (latents, reference, *queries), (shifts, keys_values, alphas, scales) = state, constants
        now, later = row(shifts, index), row(shifts, index + 1)
        alphas_now, alphas_later = row(alphas, index), row(alphas, index + 1)

        moved = halves(latents)
        if guides:
            followed = followed_rows(settings)
            start = latents if followed == 1 else moved
            maps = {
                path: (_spread(q, images, copies, followed), _spread(k, images, copies, followed))
                for q, (path, k) in zip(queries, model.unet.keys(keys_values[edit_rows:]).items(), strict=True)
            }
            conditioning = Conditioning(now, keys_values[edit_rows - len(start) : edit_rows])
            gradient = map_gradient(model, start, conditioning, maps)
            if followed == 1:
                moved = halves(latents - scales[1] * gradient)
            elif settings.gradient == "both":
                moved = halves(latents - scales[1] * (sum(gradient.chunk(2)) / 2))
            else:
                moved = moved - scales[1] * gradient / 2
        latents = moved[:edits]

        kept: QueriesAndKeys = {}
        inputs = torch.cat([moved, halves(reference, reference_pairs)])
        told = torch.cat([now.expand(edit_rows, -1), later.expand(reference_rows, -1)])
        prediction = model.predict(inputs, Conditioning(told, keys_values), keep_queries_and_keys(kept))
        noise = model.to_noise(prediction[:edit_rows], moved, alphas_now[0])
        return [
            ddim_step(latents, guided(noise, scales[0], pairs), *alphas_now),
            step_reference(reference, prediction[edit_rows:], alphas_later, scales),
            *reference_queries(kept),
        ]

    kind = "edit", id(model.unet), pairs, reference_pairs, guides, settings.gradient, model.checkpoint
    reference, *queries = model.graphs.call(("reference", *kind), first, [noise, *constants])
    state = [noise.repeat(copies, 1, 1, 1), reference, *queries]
    latents, reference, *_ = model.graphs.run(kind, step, state, constants, settings.steps, "editing", hide(progress))
    return latents, reference


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
    progress: bool | None = None,
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
        progress: show bars; None: on a terminal only.
        settings: further fields of `p2pz.presets.Settings`.

    Returns:
        An `EditResult`; for a list of images or of directions a list of them; for lists of both a list for each image.

    Raises:
        ValueError: an image, a direction or a setting is wrong, or `max_memory` too small; the message says which.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023).
    """
    model = model or load()
    items, single = as_list(img)
    directions, single_direction = as_list(direction, "directions")
    directions = [as_direction(words, model) for words in directions]
    inversion_steps = {item.steps for item in items if isinstance(item, Inversion)}
    if steps is None and len(inversion_steps) == 1:
        steps = inversion_steps.pop()
    settings |= {"steps": steps, "strength": strength, "guidance": guidance, "xa_guidance": xa_guidance}
    numbers = [
        settings_for(model, preset, style=is_medium(each.source) and is_medium(each.target), **settings)
        for each in directions
    ]
    if negative_prompt is not None and numbers[0].guidance == 1:
        warnings.warn("a negative prompt does nothing at guidance 1: give a larger guidance too", stacklevel=3)

    rows = max(2 + (each.guidance != 1) * (1 + (negative_prompt is not None)) for each in numbers)
    guided_rows = max((each.xa_guidance != 0) * followed_rows(each) for each in numbers)

    places = [i for i, item in enumerate(items) if not isinstance(item, Inversion)]
    pictures = dict(zip(places, prepare_pictures([items[i] for i in places], model), strict=True))
    sizes = [pictures[i].size[::-1] if i in pictures else image_size(item, model) for i, item in enumerate(items)]
    plans = {size: plan_for(model, size, batch_size, rows, guided_rows) for size in sizes}
    prompts = prompts_for(items, pictures, prompt, source_prompt(directions[0].source), model)
    results: list[list[EditResult | None]] = [[None] * len(directions) for _ in items]
    for group in same_size_groups(sizes):
        plan = plans[sizes[group[0]]]
        model, most = plan.apply(model), plan.images
        for start in range(0, len(group), most):
            batch = group[start : start + most]
            fresh = [i for i in batch if i in pictures]
            inversions = {i: items[i] for i in batch if i not in pictures}
            if fresh:
                made = invert_pictures(
                    model, [pictures[i] for i in fresh], [prompts[i] for i in fresh], numbers[0], seed, progress
                )
                inversions |= zip(fresh, made, strict=True)
            for some in _alike(numbers, max(1, most // len(batch))):
                edited, reconstructions = _edit_batch(
                    model, [inversions[i] for i in batch], [prompts[i] for i in batch], negative_prompt,
                    [directions[j] for j in some], [numbers[j] for j in some], progress,
                )  # fmt: skip
                for k, (j, i) in enumerate(itertools.product(some, batch)):
                    reconstruction = reconstructions[k % len(batch)]
                    quality = psnr(reconstruction, pictures[i]) if i in pictures else None
                    results[i][j] = EditResult(edited[k], reconstruction, inversions[i], prompts[i], quality)
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


def _edit_batch(
    model: Model,
    inversions: Sequence[Inversion],
    prompts: Sequence[str],
    negative_prompt: str | None,
    directions: Sequence[Direction],
    settings: Sequence[Settings],
    progress: bool | None,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Edited pictures, those of the first direction first, and reconstructions of a batch."""
    for inversion in inversions:
        inversion.check_fits(model)
    noise = torch.stack([inversion.latents for inversion in inversions]).to(model.device)
    caption = model.encode_text(prompts)
    negative = None if negative_prompt is None else model.encode_text([negative_prompt]).expand_as(caption)
    deltas = [
        each.strength * direction.states.to(caption) for direction, each in zip(directions, settings, strict=True)
    ]
    edited = torch.cat([caption + delta for delta in deltas])
    latents, reference = edit_latents(model, noise, caption, negative, edited, settings[0], progress)
    return to_pictures(model.decode_latents(latents)), to_pictures(model.decode_latents(reference))


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


def image_size(inversion: Inversion, model: Model) -> tuple[int, ...]:
    """Height and width in pixels of the image that an inversion was made of."""
    return tuple(side * model.vae.config.downsampling for side in inversion.latents.shape[1:])
