"""Text to image, by deterministic DDIM."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from PIL import Image
from torch import Tensor

from p2pz.attention import Attend, Features, Hooks, Part, hooks_of, plain
from p2pz.checks import check_finite
from p2pz.engine import Tensors, explain_out_of_memory, row
from p2pz.images import as_list, to_pictures
from p2pz.memory import plan_for
from p2pz.model import Model, loaded
from p2pz.recording import Recorder, given_hooks, hooks_in_step
from p2pz.schedule import ddim_step, denoising_schedule, guided, random_numbers, whole_number
from p2pz.unet import Conditioning

LARGEST = 4096
"""Most pixels of a side."""


@torch.no_grad()
def sample_latents(
    model: Model,
    noise: Tensor,
    negative: Tensor | None,
    context: Tensor,
    steps: int,
    guidance: float,
    progress: bool | None = None,
    skip: int = 0,
    attend: Attend | Hooks = plain,
    recorder: Recorder | None = None,
) -> Tensor:
    """Denoise from noise.

    Args:
        model: the model.
        noise: `[B, 4, h, w]` float32, standard normal; or, with `skip`, latents of the step to begin with.
        negative, context: text states of the negative and of the prompt, each `[B, 77, d]`; without guidance the
            negative is not read.
        steps: 1 to 999.
        guidance: classifier-free guidance scale; 1 leaves the negative half out.
        progress: show a bar; None: on a terminal only.
        skip: steps to leave out at the beginning, fewer than `steps`.
        attend: what happens in every attention layer, or `Hooks` of that and of features, see `p2pz.attention`; any but
            the default runs unrecorded.
        recorder: keeps cross-attention maps, see `p2pz.recording`.

    Returns:
        Latents of the images, `[B, 4, h, w]` float32.

    Raises:
        ValueError: they became infinite or NaN; it says where.

    Source: Song et al., "Denoising Diffusion Implicit Models" (2021), equation 12.
    """
    pairs = guidance != 1
    schedule = denoising_schedule(steps)
    timesteps = schedule.timesteps[skip:]
    texts = torch.cat([negative, context]) if pairs else context
    shifts, keys_values = model.condition(timesteps, texts, noise.shape[2:])
    parts = [Part(len(noise), "sample", half) for half in ("negative", "conditional")[1 - pairs :]]
    hooks = hooks_of(attend)

    def step(index: Tensor, state: Tensors, constants: Tensors) -> Tensors:
        (latents, *_), (shifts, keys_values, alphas, guidance) = state, constants
        alpha_from, alpha_to = row(alphas, index)
        halves = torch.cat([latents, latents]) if pairs else latents
        maps: list[Tensor] = []
        told = hooks_in_step(hooks, watcher, parts, index, timesteps, maps)
        prediction = model.predict(halves, Conditioning(row(shifts, index), keys_values), told)
        predicted = guided(model.to_noise(prediction, halves, alpha_from), guidance, pairs)
        return ddim_step(latents, predicted, alpha_from, alpha_to), *maps

    alphas = schedule.alphas[skip:].to(model.device)
    constants = [shifts, keys_values, alphas, torch.tensor(guidance, device=model.device)]
    state, each = [noise], None
    if recorder:
        state += recorder.begin(model.unet, parts, noise, timesteps, keys_values.shape[1])

        def each(i: int, state: Tensors) -> None:
            recorder.take(i, parts, state[1:])

    watcher = recorder and recorder.watcher()  # a recorded step must not hold the maps
    kind = "sample", id(model.unet), model.prediction_type, pairs, recorder and recorder.key
    graphs, model = model.split(hooks == Hooks())
    latents, *_ = graphs.run(kind, step, state, constants, steps - skip, "sampling", progress, each)
    check_finite(latents, model, noise, timesteps[0], context)
    return latents


@explain_out_of_memory
def sample(
    prompt: str | Sequence[str],
    *,
    model: Model | None = None,
    negative_prompt: str = "",
    steps: int = 50,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    attend: Attend = plain,
    features: Features | None = None,
    record: Recorder | None = None,
) -> list[Image.Image]:
    """Draw images from text.

    Args:
        prompt: one text, or a list for several images.
        model: None loads the default model.
        negative_prompt: what to keep away from.
        steps: 1 to 999.
        guidance: classifier-free guidance scale; None takes 7.5, or 2 for the bundled model.
        size: width and height in pixels, multiples of `vae.config.downsampling`; None: the model's own square.
        seed: of the first image's noise; the i-th image has `seed + i`, so each can be drawn again alone.
        progress: show a bar; None: on a terminal only.
        attend: what happens in every attention layer, see `p2pz.attention`.
        features: what becomes of the features of every residual block, likewise; None: they stay.
        record: keeps cross-attention maps, see `p2pz.record`.

    Returns:
        A list with a picture for each prompt.

    Raises:
        ValueError: no prompts, steps, guidance or size out of range, or `max_memory` too small.
    """
    model = loaded(model)
    prompts, _ = as_list(prompt, "prompts")
    seed = whole_number("seed", seed, 0, 2**32 - len(prompts))
    config = model.vae.config
    multiple = config.downsampling
    size = (model.native_size,) * 2 if size is None else size
    sides = range(8 * multiple, LARGEST + 1, multiple)
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not pair or not all(isinstance(side, Integral) and side in sides for side in size):
        raise ValueError(
            f"size must be a width and a height from {sides[0]} to {LARGEST} and multiples of {multiple}, not {size}"
        )
    width, height = size
    guidance = (2.0 if model.is_mini else 7.5) if guidance is None else guidance
    if not isinstance(guidance, Real) or not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance must be zero or more, not {guidance!r}")
    plan = plan_for(model, (height, width), len(prompts), rows=1 + (guidance != 1))
    shape = (config.latent_channels, height // multiple, width // multiple)
    noise = torch.stack([torch.randn(shape, generator=random_numbers(seed + i)) for i in range(len(prompts))])
    context = model.encode_text(prompts)
    negative = model.encode_negative([negative_prompt]).expand_as(context)
    model = plan.apply(model)
    batches = (tensor.split(plan.images) for tensor in (noise.to(model.device), negative, context))
    pictures = []
    hooks = given_hooks(attend, features, record)
    for batch in zip(*batches, strict=True):
        latents = sample_latents(model, *batch, steps, guidance, progress, attend=hooks, recorder=record)
        if record:
            places = range(len(pictures), len(pictures) + len(latents))
            rows = [{"sample": i} for i in range(len(latents))]
            record.finish(places, [prompts[place] for place in places], rows)
        pictures += to_pictures(model.decode_latents(latents))
    return pictures
