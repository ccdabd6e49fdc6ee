"""The methods that pix2pix-zero is compared with, called as `p2pz.edit` is: SDEdit, DDIM with a word swap, and
prompt-to-prompt.

They change words of the caption instead of following a direction, so a caption has to contain the words to be changed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from p2pz.attention import Attend, Site
from p2pz.checks import check_finite
from p2pz.directions import Direction, check_words_differ, parse_direction
from p2pz.editing import EditResult, draw, edit_latents, prompts_for
from p2pz.engine import Tensors, explain_out_of_memory, row
from p2pz.images import ImageLike, as_list, psnr, to_tensor
from p2pz.inversion import Inversion, common_steps, invert_pictures, open_images
from p2pz.kernels import attention, edited_attention
from p2pz.memory import batches_for
from p2pz.model import Model, loaded
from p2pz.presets import Settings, settings_for
from p2pz.sampling import sample_latents
from p2pz.schedule import ddim_step, denoising_schedule, guided, random_numbers
from p2pz.sentences import source_prompt, with_article
from p2pz.tokens import tokens_of, weigh_tokens
from p2pz.unet import Conditioning


def swap_words(prompt: str, source: str, target: str) -> str:
    """A caption with one concept's words replaced by another's, everywhere.

    Only whole words count, whatever their case. An "a" or "an" before them follows the target. Where the longer of the
    two contains the other ("cat" and "cat with glasses") and already stands in the caption, nothing is replaced twice.

    Args:
        prompt: the caption.
        source: words to replace.
        target: words to put there; with a capital letter if they replace one.

    Raises:
        ValueError: the caption does not contain the source's words.
    """
    source, target = source.strip(), target.strip()
    if not source or not target:
        raise ValueError('there are no words to swap: give two concepts such as "cat" and "dog"')
    words = [r"\s+".join(map(re.escape, words.split())) for words in (source, target)]
    if not re.search(rf"(?<!\w)(?:{words[0]})(?!\w)", prompt, re.IGNORECASE):
        raise ValueError(
            f'the caption "{prompt}" does not contain "{source}", which is to become "{target}": prompt= must contain '
            "the words to be changed"
        )
    longest_first = "|".join(sorted(words, key=len, reverse=True))

    def swap(found: re.Match) -> str:
        article, old = found.groups()
        if old.lower().split() == target.lower().split():
            return found[0]
        new = with_article(target) if article else target
        return new[0].upper() + new[1:] if found[0][0].isupper() else new

    return re.sub(rf"(?<!\w)(?:(an?)\s+)?({longest_first})(?!\w)", swap, prompt, flags=re.IGNORECASE)


@dataclass(frozen=True)
class SDEditResult:
    """What `sdedit` returns for an image: an `EditResult` without an inversion, for it makes none.

    Attributes:
        image: the edited picture.
        reconstruction: the image decoded from its own latents: what the autoencoder alone does to it.
        prompt: the caption that was used, with the source's words.
        reconstruction_psnr: of the reconstruction against the image as the model works on it, in dB; None if it
            began with an inversion that has not kept the image.
    """

    image: Image.Image
    reconstruction: Image.Image
    prompt: str
    reconstruction_psnr: float | None


@dataclass(frozen=True)
class _Batch:
    """Images of one size that are worked on at once; `items` are prepared pictures or inversions."""

    model: Model
    items: list[Image.Image | Inversion]
    prompts: list[str]
    targets: list[str]
    settings: Settings

    def quality(self, i: int, reconstruction: Image.Image) -> float | None:
        """PSNR of the reconstruction of item i; None for an inversion that has not kept the image."""
        item = self.items[i]
        picture = item.picture if isinstance(item, Inversion) else item
        return psnr(reconstruction, picture) if picture else None


def _words(direction: str | Direction) -> tuple[str, str]:
    """The source and the target in words."""
    if not isinstance(direction, (str, Direction)):
        raise ValueError(f'a direction is words such as "cat->dog" or a Direction, not {type(direction).__name__}')
    words = parse_direction(direction) if isinstance(direction, str) else (direction.source, direction.target)
    if not all(words):
        raise ValueError('this method swaps words, and this direction has none: give words such as "cat->dog"')
    check_words_differ(*words)
    return words


def _in_batches(
    img: ImageLike | Inversion | Sequence[ImageLike | Inversion],
    direction: str | Direction,
    model: Model | None,
    prompt: str | Sequence[str] | None,
    preset: str,
    numbers: dict[str, Any],
    references: int,
    batch_size: int,
    work: Callable[[_Batch], list[Any]],
) -> Any:
    """Find images' captions and what to call them after the edit, and do some work on them, size by size.

    Args:
        img, direction, model, prompt, preset, batch_size: as in `ddim_edit`.
        numbers: changes to the preset.
        references: rows of the largest forward pass for each image, besides those of the edit.
        work: gives a result for each image of a batch.

    Returns:
        A result for an image, a list of results for a list.
    """
    model = loaded(model)
    source, target = _words(direction)
    items, single = as_list(img)
    if numbers["steps"] is None:
        numbers = numbers | {"steps": common_steps(items)}
    settings = settings_for(model, preset, **numbers)

    pictures, sizes = open_images(items, model)
    prompts = prompts_for(items, pictures, prompt, source_prompt(source), model)
    items = [pictures.get(i, item) for i, item in enumerate(items)]
    targets = [swap_words(text, source, target) for text in prompts]

    rows = references + 1 + (settings.guidance != 1)
    results: list[Any] = [None] * len(items)
    for plan, some in batches_for(model, sizes, batch_size, rows):
        batch = _Batch(plan.apply(model), *([of[i] for i in some] for of in (items, prompts, targets)), settings)
        for i, result in zip(some, work(batch), strict=True):
            results[i] = result
    return results[0] if single else results


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, not {value}")


@torch.no_grad()
def sdedit_latents(
    model: Model,
    image_latents: Tensor,
    noise: Tensor,
    negative: Tensor | None,
    context: Tensor,
    settings: Settings,
    noise_strength: float,
    progress: bool | None = None,
) -> Tensor:
    """Add noise and take it away again under another caption.

    Args:
        model: the model.
        image_latents: `[B, 4, h, w]` float32, scaled.
        noise: standard normal, same shape.
        negative: text states of the negative prompts, `[B, 77, d]`; not needed at guidance 1.
        context: text states of the captions to draw, `[B, 77, d]`.
        settings: steps and guidance.
        noise_strength: the last `round(noise_strength * steps)` steps are taken.
        progress: show a bar; None: on a terminal only.

    Returns:
        Latents, `[B, 4, h, w]` float32.

    Source: Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations" (2022),
    section 3, in the latents and with deterministic DDIM steps.
    """
    count = round(noise_strength * settings.steps)
    if count == 0:
        return image_latents
    alpha = denoising_schedule(settings.steps).alphas_from[-count]
    start = alpha.sqrt() * image_latents + (1 - alpha).sqrt() * noise
    steps, guidance = settings.steps, settings.guidance
    return sample_latents(model, start, negative, context, steps, guidance, progress, skip=steps - count)


@explain_out_of_memory
def sdedit(
    img: ImageLike | Inversion | Sequence[ImageLike | Inversion],
    direction: str | Direction,
    *,
    noise_strength: float = 0.8,
    model: Model | None = None,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | None = "",
    preset: str = "p2pz",
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool | None = None,
) -> SDEditResult | list[SDEditResult]:
    """Drown an image in noise as far as wanted, and draw it again under the caption with swapped words (SDEdit).

    Args:
        img, direction, model, prompt, preset, steps, guidance, batch_size, progress: as in `ddim_edit`. Of an
            inversion only the image's own latents, the prompt and the number of steps are used.
        noise_strength: 0 leaves the image as it is, 1 starts as far out as an inversion ends.
        negative_prompt: what guidance pulls away from; None takes the caption, as the other methods do.
        seed: of the noise, which is the same for every image of a size.

    Returns:
        A `SDEditResult`; its reconstruction is the image decoded from its own latents. A list of them for a list.

    Raises:
        ValueError: an image, the direction, a caption or a setting is wrong; the message says which.

    Source: Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations" (2022).
    """
    _check_share("noise_strength", noise_strength)

    def work(batch: _Batch) -> list[SDEditResult]:
        model = batch.model
        pictures = [item for item in batch.items if not isinstance(item, Inversion)]
        fresh = iter(model.encode_image(to_tensor(pictures)) if pictures else ())
        image_latents = torch.stack(
            [
                item.image_latents.to(model.device) if isinstance(item, Inversion) else next(fresh)
                for item in batch.items
            ]
        )
        generator = random_numbers(seed)
        noise = torch.randn(image_latents.shape[1:], generator=generator).to(model.device).expand_as(image_latents)
        negative = None
        if batch.settings.guidance != 1:
            negatives = batch.prompts if negative_prompt is None else [negative_prompt] * len(batch.items)
            negative = model.encode_negative(negatives)
        context = model.encode_text(batch.targets)
        latents = sdedit_latents(
            model, image_latents, noise, negative, context, batch.settings, noise_strength, progress
        )
        edited, own = draw(model, latents, image_latents)
        return [
            SDEditResult(image, reconstruction, batch.prompts[i], batch.quality(i, reconstruction))
            for i, (image, reconstruction) in enumerate(zip(edited, own, strict=True))
        ]

    numbers = {"steps": steps, "guidance": guidance}
    return _in_batches(img, direction, model, prompt, preset, numbers, 0, batch_size, work)


Denoise = Callable[[_Batch, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From noise `[B, 4, h, w]` and text states of captions and swapped captions, each `[B, 77, d]`, to latents of the
edits and of the reference."""


def _from_inversions(denoise: Denoise, seed: int, progress: bool | None) -> Callable[[_Batch], list[EditResult]]:
    """Work for `_in_batches`: invert what is not inverted yet, then denoise it under both captions."""

    def work(batch: _Batch) -> list[EditResult]:
        model, inversions = batch.model, list(batch.items)
        fresh = [i for i, item in enumerate(inversions) if not isinstance(item, Inversion)]
        if fresh:
            pictures, prompts = ([of[i] for i in fresh] for of in (batch.items, batch.prompts))
            made = invert_pictures(model, pictures, prompts, batch.settings, seed, progress)
            for i, inversion in zip(fresh, made, strict=True):
                inversions[i] = inversion
        noise = torch.stack([inversion.latents for inversion in inversions]).to(model.device)
        caption, swapped = model.encode_text(batch.prompts), model.encode_text(batch.targets)
        latents = denoise(batch, noise, caption, swapped)
        timestep = denoising_schedule(batch.settings.steps).timesteps[0]
        check_finite(torch.cat(latents), model, noise, timestep, swapped)
        edited, reconstructions = draw(model, *latents)
        return [
            EditResult(image, reconstruction, inversions[i], batch.prompts[i], batch.quality(i, reconstruction))
            for i, (image, reconstruction) in enumerate(zip(edited, reconstructions, strict=True))
        ]

    return work


def _numbers(steps: int | None, guidance: float | None, regularised: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Changes to a preset for a method that inverts and swaps words."""
    maps = {"strength", "xa_guidance", "gradient", "guided_steps", "resolution_weights", "reference", "blend"}
    foreign = maps & settings.keys()
    if foreign:
        raise ValueError(f"this method has no direction and no map guidance: leave out {', '.join(sorted(foreign))}")
    plain: dict[str, Any] = {"reference": "denoised"}
    if not regularised:
        plain |= {"autocorrelation_strength": 0.0, "kl_strength": 0.0}
    return plain | settings | {"steps": steps, "guidance": guidance, "xa_guidance": 0.0}


@explain_out_of_memory
def ddim_edit(
    img: ImageLike | Inversion | Sequence[ImageLike | Inversion],
    direction: str | Direction,
    *,
    regularised: bool = False,
    model: Model | None = None,
    prompt: str | Sequence[str] | None = None,
    preset: str = "p2pz",
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool | None = None,
    **settings: Any,
) -> EditResult | list[EditResult]:
    """Invert an image by DDIM, and denoise it under the caption with swapped words.

    Guidance pulls away from the caption, so that the reconstruction needs none.

    Args:
        img: a path, a PIL image, an `[H, W, 3]` array, an `Inversion` of the same model, or a list of these. An
            inversion is taken as it is, regularised or not.
        direction: "cat->dog", or a `Direction` that knows its words.
        regularised: regularise the noise of the inversion with the preset's strengths, which are 0 in the preset
            "p2pz" of the bundled model.
        model: None loads the default model.
        prompt: what the image shows, with the words to be changed; one text or one per image. None: an inversion's own
            prompt; the bundled model recognises the image; other models assume "a photo of a cat" for "cat->dog".
        preset: `"p2pz"`, `"authors"` or `"diffusers"`, see `p2pz.presets`.
        steps: 1 to 999; None takes the inversion's or else the preset's.
        guidance: classifier-free guidance scale; None takes the preset's.
        seed: of all randomness; the same seed gives the same result, alone or in a batch.
        batch_size: images of one size that are worked on at once; fewer if the model's memory budget says so.
        progress: show bars; None: on a terminal only.
        settings: further fields of `p2pz.presets.Settings` that concern the inversion. Strengths of the regulariser
            given here count without `regularised` too.

    Returns:
        An `EditResult`; a list of them for a list.

    Raises:
        ValueError: an image, the direction, a caption or a setting is wrong; the message says which.

    Source: Song et al., "Denoising Diffusion Implicit Models" (2021); Parmar et al., "Zero-shot Image-to-Image
    Translation" (2023), section 4, "DDIM + word swap".
    """

    def denoise(batch: _Batch, noise: Tensor, caption: Tensor, swapped: Tensor) -> tuple[Tensor, Tensor]:
        return edit_latents(batch.model, noise, caption, None, swapped, batch.settings, progress)

    numbers = _numbers(steps, guidance, regularised, settings)
    work = _from_inversions(denoise, seed, progress)
    return _in_batches(img, direction, model, prompt, preset, numbers, 1, batch_size, work)


def common_tokens(reference: Sequence[int], edited: Sequence[int]) -> list[tuple[int, int]]:
    """The longest common subsequence of two lists of tokens; of several the one that matches earliest.

    Returns:
        Pairs of places, in order.
    """
    n, m = len(reference), len(edited)
    longest = [[0] * (m + 1) for _ in range(n + 1)]  # of what is left from (i, j) on
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            same = reference[i] == edited[j]
            longest[i][j] = longest[i + 1][j + 1] + 1 if same else max(longest[i + 1][j], longest[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < n and j < m:
        if reference[i] == edited[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def align_tokens(reference: Sequence[int], edited: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """Which tokens of two captions belong together.

    Tokens that the captions share do, along their longest common subsequence. Between them, as many tokens as there
    were replace those one by one; others are new. Padding goes with padding at the same place.

    Args:
        reference, edited: the captions' tokens from start token to end token, without padding.
        length: of padded captions, M.

    Returns:
        `mapping`, `[M, M]` of zeros and ones, row r and column e for the reference's token r that goes to the edit's
        token e; and `mix`, `[M]`, 1 for tokens of the edit that have one in the reference, 0 for new ones.

    Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control" (2022), section 3.2, "word swap"
    and "adding a new phrase".
    """
    mapping = torch.zeros(length, length)
    before = (-1, -1)
    for pair in [*common_tokens(reference, edited), (len(reference), len(edited))]:
        gaps = {place - last for place, last in zip(pair, before, strict=True)}
        if len(gaps) == 1:  # the tokens between this pair and the one before it, which may be none
            for back in range(1, gaps.pop()):
                mapping[pair[0] - back, pair[1] - back] = 1
        if pair[0] < len(reference):
            mapping[pair] = 1
        before = pair
    padding = torch.arange(max(len(reference), len(edited)), length)
    mapping[padding, padding] = 1
    return mapping, mapping.sum(0)


@dataclass(frozen=True)
class TokenEdit:
    """How the cross-attention maps of edits come from their references', see `p2pz.kernels.edited_attention`.

    Attributes:
        mapping: `[B, 77, 77]`.
        mix, weights: `[B, 77]`.
    """

    mapping: Tensor
    mix: Tensor
    weights: Tensor


def token_edit(
    model: Model, prompts: Sequence[str], targets: Sequence[str], reweight: Mapping[str, float] | None = None
) -> TokenEdit:
    """The token edit from captions to other captions.

    Args:
        model: whose tokenizer and device to use.
        prompts, targets: captions, and what each becomes.
        reweight: words of the targets -> factor.

    Raises:
        ValueError: see `weigh_tokens`.
    """
    length = model.tokenizer.model_max_length
    aligned = [
        align_tokens(tokens_of(model, prompt), tokens_of(model, target), length)
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    weights = [weigh_tokens(model, target, reweight or {}) for target in targets]
    columns = (*zip(*aligned, strict=True), weights)
    return TokenEdit(*(torch.stack(list(column)).to(model.device) for column in columns))


def share_attention(images: int, cross: TokenEdit | None, self_positions: int) -> Attend:
    """An `attend` for batches whose first rows are references and whose last rows are their edits; those get maps of
    the references, and rows between are left alone.

    Args:
        images: how many references, and how many edits.
        cross: how the edits' cross-attention maps come from the references'. None: they are their own.
        self_positions: self-attention maps of at most so many positions are the references'.

    Returns:
        A function for the `attend` argument of the UNet.

    Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control" (2022), algorithm 1; self-
    attention as in the authors' published code.
    """

    def attend_and_share(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        own, others, first = slice(-images, None), slice(-images), slice(images)
        if site.kind == "cross" and cross is not None:
            edited = edited_attention(
                q[own], k[own], v[own], q[first], k[first],
                mapping=cross.mapping, mix=cross.mix, weights=cross.weights,
            )  # fmt: skip
        elif site.kind == "self" and q.shape[1] <= self_positions:
            edited = attention(q[first], k[first], v[own])
        else:
            return attention(q, k, v)
        return torch.cat([attention(q[others], k[others], v[others]), edited])

    return attend_and_share


@torch.no_grad()
def prompt_to_prompt_latents(
    model: Model,
    noise: Tensor,
    caption: Tensor,
    swapped: Tensor,
    tokens: TokenEdit,
    settings: Settings,
    cross_steps: float,
    self_steps: float,
    progress: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoise with captions and with other captions in lockstep, the latter with attention maps of the former.

    References and edits are rows of one forward pass at each step, so no map is kept. As in `edit_latents`, guidance
    pulls away from the caption, and the references need none; the negative half of an edit has maps of its own.

    Args:
        model: the model.
        noise: where both start, `[B, 4, h, w]` float32.
        caption, swapped: text states of the captions and of the edited captions, each `[B, 77, d]`.
        tokens: how the cross-attention maps of the edits come from the references'.
        settings: steps, guidance.
        cross_steps, self_steps: share of the steps, from the first on, that take cross-attention maps, and
            self-attention maps of half the resolution or less, from the references.
        progress: show a bar; None: on a terminal only.

    Returns:
        Latents of the edits and of the references, each `[B, 4, h, w]`.

    Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control" (2022), algorithm 1.
    """
    images, (height, width) = len(noise), noise.shape[2:]
    pairs = settings.guidance != 1
    schedule = denoising_schedule(settings.steps)
    texts = [caption, caption, swapped] if pairs else [caption, swapped]
    shifts, keys_values = model.condition(schedule.timesteps, torch.cat(texts), noise.shape[2:])
    alphas, guidance = schedule.alphas.to(model.device), torch.tensor(settings.guidance, device=model.device)
    until = [round(share * settings.steps) for share in (cross_steps, self_steps)]
    half_size = -(-height // 2) * -(-width // 2)  # 32 x 32 for latents of 64 x 64

    def segment(cross: bool, shared_self: bool) -> Callable[[Tensor, Tensors, Tensors], Tensors]:
        def step(index: Tensor, state: Tensors, constants: Tensors) -> Tensors:
            (latents, reference), (shifts, keys_values, alphas, guidance, *factors) = state, constants
            alpha_from, alpha_to = row(alphas, index)
            attend = share_attention(images, TokenEdit(*factors) if cross else None, half_size if shared_self else 0)
            inputs = torch.cat([reference, latents, latents] if pairs else [reference, latents])
            prediction = model.predict(inputs, Conditioning(row(shifts, index), keys_values), attend)
            predicted = model.to_noise(prediction, inputs, alpha_from)
            return [
                ddim_step(latents, guided(predicted[images:], guidance, pairs), alpha_from, alpha_to),
                ddim_step(reference, predicted[:images], alpha_from, alpha_to),
            ]

        return step

    graphs, model = model.split()
    state = [noise, noise]
    bounds = sorted({0, *until, settings.steps})
    for start, end in itertools.pairwise(bounds):
        sharing = tuple(start < last for last in until)
        constants = [shifts[start:end], keys_values, alphas[start:end], guidance]
        constants += [tokens.mapping, tokens.mix, tokens.weights] if sharing[0] else []
        kind = "prompt to prompt", id(model.unet), model.prediction_type, pairs, *sharing
        state = graphs.run(kind, segment(*sharing), state, constants, end - start, "editing", progress)
    return state[0], state[1]


@explain_out_of_memory
def prompt_to_prompt(
    img: ImageLike | Inversion | Sequence[ImageLike | Inversion],
    direction: str | Direction,
    *,
    cross_steps: float = 0.8,
    self_steps: float = 0.4,
    reweight: Mapping[str, float] | None = None,
    regularised: bool = False,
    model: Model | None = None,
    prompt: str | Sequence[str] | None = None,
    preset: str = "p2pz",
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool | None = None,
    **settings: Any,
) -> EditResult | list[EditResult]:
    """Swap words of the caption while the attention maps stay those of the image's own caption (prompt-to-prompt).

    Args:
        img, direction, regularised, model, prompt, preset, steps, guidance, seed, batch_size, progress, settings: as in
            `ddim_edit`, whose inversion this starts from; with both shares 0 the result is the same too.
        cross_steps: share of the steps, from the first on, whose cross-attention maps come from the caption: those of
            tokens that both captions have and of those that are replaced by as many, see `align_tokens`.
        self_steps: the same for self-attention maps at half the latents' resolution or less.
        reweight: words of the swapped caption -> factor of their cross-attention maps while these are shared.

    Returns:
        An `EditResult`; a list of them for a list.

    Raises:
        ValueError: an image, the direction, a caption or a setting is wrong; the message says which.

    Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control" (2022).
    """
    _check_share("cross_steps", cross_steps)
    _check_share("self_steps", self_steps)

    def denoise(batch: _Batch, noise: Tensor, caption: Tensor, swapped: Tensor) -> tuple[Tensor, Tensor]:
        tokens = token_edit(batch.model, batch.prompts, batch.targets, reweight)
        return prompt_to_prompt_latents(
            batch.model, noise, caption, swapped, tokens, batch.settings, cross_steps, self_steps, progress
        )

    numbers = _numbers(steps, guidance, regularised, settings)
    work = _from_inversions(denoise, seed, progress)
    return _in_batches(img, direction, model, prompt, preset, numbers, 1, batch_size, work)
