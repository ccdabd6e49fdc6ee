"""The edit itself: a reference pass and an edit pass in lockstep, tied together by their cross-attention maps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from p2pz.attention import Attend, QueriesAndKeys, attend, guide_cross_attention, keep_queries_and_keys
from p2pz.captions import captions_for
from p2pz.directions import Direction, direction, is_medium, parse_direction, source_prompt
from p2pz.images import ImageLike, as_list, psnr, same_size_groups, to_pictures
from p2pz.inversion import Inversion, hide, invert_pictures, prepare_pictures
from p2pz.model import Model, load
from p2pz.presets import Settings, settings_for
from p2pz.schedule import ddim_step, denoising_schedule


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


def guided_noise(
    model: Model,
    halves: Tensor,
    timestep: Tensor,
    alpha: float,
    contexts: Tensor,
    guidance: float,
    attend: Attend = attend,
) -> Tensor:
    """Noise prediction with classifier-free guidance.

    Args:
        model: the model.
        halves: latents of each half, `[k * B, 4, h, w]`: k = 2 is negative and conditional, k = 1 conditional alone.
        timestep, alpha: as in `Model.predict_noise`.
        contexts: text states of each half, `[k * B, 77, d]`.
        guidance: scale of the difference between the halves.
        attend: see `p2pz.attention`.

    Returns:
        `[B, 4, h, w]`.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), equation 6, with w + 1 = guidance.
    """
    noise = model.predict_noise(halves, timestep, alpha, contexts, attend)
    if guidance == 1:
        return noise
    negative, conditional = noise.chunk(2)
    return negative + guidance * (conditional - negative)


def map_gradient(
    model: Model, latents: Tensor, timestep: Tensor, alpha: float, contexts: Tensor, reference: QueriesAndKeys
) -> Tensor:
    """Gradient, with respect to the latents, of the distance between their cross-attention maps and reference maps.

    Each latent has a loss of its own: squared differences summed over layers, positions and tokens, and averaged over
    the heads.

    Args:
        model: the model.
        latents: `[B, 4, h, w]`.
        timestep, alpha: as in `Model.predict_noise`.
        contexts: `[B, 77, d]`.
        reference: what the reference maps are made of, see `keep_queries_and_keys`.

    Returns:
        `[B, 4, h, w]`.

    Source: Parmar et al. (2023), equation 6.
    """
    with torch.enable_grad():
        latents = latents.detach().requires_grad_()
        losses: list[Tensor] = []
        model.predict_noise(latents, timestep, alpha, contexts, guide_cross_attention(reference, losses))
        return torch.autograd.grad(torch.stack(losses).sum(), latents)[0]


@torch.no_grad()
def edit_steps(
    model: Model, noise: Tensor, caption: Tensor, negative: Tensor | None, edited: Tensor, settings: Settings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Denoise twice in lockstep, once with the caption and once with the edited caption.

    At every step the reference pass goes first and leaves its cross-attention maps; the edit's latents move down the
    gradient of the distance to them, and then both take a DDIM step. Maps live for one step.

    Args:
        model: the model.
        noise: where both start, `[B, 4, h, w]` float32.
        caption: text states of the captions, `[B, 77, d]`.
        negative: text states of the negative prompts; None: the captions, so that the reference pass needs no second
            half and guidance does not pull it away from the image.
        edited: caption plus direction, `[B, 77, d]`.
        settings: steps, guidance, map guidance.

    Yields:
        Latents of the edit and of the reference after each step.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), algorithm 1.
    """
    guidance, xa_guidance = settings.guidance, settings.xa_guidance
    pairs = guidance != 1
    negative_states = caption if negative is None else negative
    edited_pair = torch.cat([negative_states, edited]) if pairs else edited
    reference_pairs = pairs and negative is not None
    reference_states = torch.cat([negative_states, caption]) if reference_pairs else caption

    def halves(latents: Tensor, pairs: bool = pairs) -> Tensor:
        return torch.cat([latents, latents]) if pairs else latents

    latents = reference = noise
    for timestep, alpha_from, alpha_to in denoising_schedule(settings.steps).rows():
        kept: QueriesAndKeys = {}
        reference_noise = guided_noise(
            model, halves(reference, reference_pairs), timestep, alpha_from, reference_states,
            guidance if reference_pairs else 1, keep_queries_and_keys(kept) if xa_guidance else attend,
        )  # fmt: skip
        reference = ddim_step(reference, reference_noise, alpha_from, alpha_to)

        if not xa_guidance:
            moved = halves(latents)
        elif settings.gradient == "conditional" or not pairs:
            conditional = {path: (q[-len(noise) :], k[-len(noise) :]) for path, (q, k) in kept.items()}
            gradient = map_gradient(model, latents, timestep, alpha_from, edited, conditional)
            moved = halves(latents - xa_guidance * gradient)
        else:
            if not reference_pairs:
                kept = {path: (halves(q), halves(k)) for path, (q, k) in kept.items()}
            gradient = map_gradient(model, halves(latents), timestep, alpha_from, edited_pair, kept) / 2
            if settings.gradient == "both":
                gradient = halves(sum(gradient.chunk(2)))
            moved = halves(latents) - xa_guidance * gradient
        latents = moved[: len(noise)]
        predicted = guided_noise(model, moved, timestep, alpha_from, edited_pair, guidance)
        latents = ddim_step(latents, predicted, alpha_from, alpha_to)
        yield latents, reference


def edit_latents(
    model: Model,
    noise: Tensor,
    caption: Tensor,
    negative: Tensor | None,
    edited: Tensor,
    settings: Settings,
    progress: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents of the edit and of the reference at the end of `edit_steps`; same arguments."""
    latents = reference = noise
    steps = edit_steps(model, noise, caption, negative, edited, settings)
    for latents, reference in tqdm(steps, "editing", settings.steps, disable=hide(progress), leave=False):
        pass
    return latents, reference


def edit(
    img: ImageLike | Inversion | Sequence[ImageLike | Inversion],
    direction: str | Direction,
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
) -> EditResult | list[EditResult]:
    """Change one concept in images and keep the rest (pix2pix-zero).

    Args:
        img: a path, a PIL image, an `[H, W, 3]` array, an `Inversion` of the same model, or a list of these. Images
            are resized to the size the model works at, about `model.native_size` squared pixels in their own shape.
        direction: "cat->dog", or a `Direction` made with this model's text encoder.
        model: None loads the default model.
        prompt: what the image shows, one text or one per image. None: an inversion's own prompt; the bundled model
            recognises the image; other models assume "a photo of a cat" for the direction "cat->dog".
        negative_prompt: None takes the prompt, which keeps the reference pass on the image. It needs guidance above 1.
        preset: `"p2pz"`, `"authors"` or `"diffusers"`, see `p2pz.presets`.
        steps: 1 to 999; None takes the inversion's or else the preset's.
        strength: multiple of the direction, stronger edits with larger values; None takes the preset's.
        guidance: classifier-free guidance scale, likewise; None takes the preset's.
        xa_guidance: step length of the cross-attention map guidance, closer to the image with larger values; None takes
            the preset's.
        seed: of all randomness; the same seed gives the same result, alone or in a batch.
        batch_size: images of one size that are worked on at once.
        progress: show bars; None: on a terminal only.
        settings: further fields of `p2pz.presets.Settings`.

    Returns:
        An `EditResult`, or a list of them for a list.

    Raises:
        ValueError: an image, the direction or a setting is wrong; the message says which.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023).
    """
    model = model or load()
    items, single = as_list(img)
    edit_direction = as_direction(direction, model)
    inversion_steps = {item.steps for item in items if isinstance(item, Inversion)}
    if steps is None and len(inversion_steps) == 1:
        steps = inversion_steps.pop()
    style = is_medium(edit_direction.source) and is_medium(edit_direction.target)
    numbers = settings_for(
        model,
        preset,
        style=style,
        steps=steps,
        strength=strength,
        guidance=guidance,
        xa_guidance=xa_guidance,
        **settings,
    )
    if negative_prompt is not None and numbers.guidance == 1:
        warnings.warn("a negative prompt does nothing at guidance 1: give a larger guidance too", stacklevel=2)

    places = [i for i, item in enumerate(items) if not isinstance(item, Inversion)]
    pictures = dict(zip(places, prepare_pictures([items[i] for i in places], model), strict=True))
    prompts = _prompts(items, pictures, prompt, source_prompt(edit_direction.source), model)
    sizes = [pictures[i].size[::-1] if i in pictures else _image_size(item, model) for i, item in enumerate(items)]
    results: list[EditResult | None] = [None] * len(items)
    for group in same_size_groups(sizes):
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            fresh = [i for i in batch if i in pictures]
            inversions = {i: items[i] for i in batch if i not in pictures}
            if fresh:
                made = invert_pictures(
                    model, [pictures[i] for i in fresh], [prompts[i] for i in fresh], numbers, seed, progress
                )
                inversions |= zip(fresh, made, strict=True)
            done = _edit_batch(
                model, [inversions[i] for i in batch], [prompts[i] for i in batch], negative_prompt, edit_direction,
                numbers, progress,
            )  # fmt: skip
            for i, (image, reconstruction) in zip(batch, done, strict=True):
                quality = psnr(reconstruction, pictures[i]) if i in pictures else None
                results[i] = EditResult(image, reconstruction, inversions[i], prompts[i], quality)
    return results[0] if single else results


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
    edit_direction: Direction,
    settings: Settings,
    progress: bool | None,
) -> list[tuple[Image.Image, Image.Image]]:
    """Edited picture and reconstruction of each inversion of a batch."""
    for inversion in inversions:
        inversion.check_fits(model)
    noise = torch.stack([inversion.latents for inversion in inversions]).to(model.device)
    caption = model.encode_text(prompts)
    negative = None if negative_prompt is None else model.encode_text([negative_prompt]).expand_as(caption)
    edited = caption + settings.strength * edit_direction.states.to(caption)
    latents, reference = edit_latents(model, noise, caption, negative, edited, settings, progress)
    images, reconstructions = (to_pictures(model.decode_latents(final)) for final in (latents, reference))
    return list(zip(images, reconstructions, strict=True))


def _prompts(
    items: Sequence[ImageLike | Inversion],
    pictures: dict[int, Image.Image],
    prompt: str | Sequence[str] | None,
    default: str,
    model: Model,
) -> list[str]:
    if prompt is not None:
        return captions_for(items, prompt, default, model)
    if not pictures:
        return [item.prompt for item in items]
    found = dict(zip(pictures, captions_for(list(pictures.values()), None, default, model), strict=True))
    return [found[i] if i in pictures else item.prompt for i, item in enumerate(items)]


def _image_size(inversion: Inversion, model: Model) -> tuple[int, ...]:
    return tuple(side * model.vae.config.downsampling for side in inversion.latents.shape[1:])
