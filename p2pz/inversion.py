"""From an image to the noise that reproduces it: DDIM backwards in time, with regularised noise predictions."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from p2pz.attention import (
    Attend,
    Features,
    Hooks,
    Part,
    QueriesAndKeys,
    hooks_of,
    keep_queries_and_keys,
    plain,
)
from p2pz.captions import captions_for
from p2pz.checks import check_finite
from p2pz.engine import Tensors, explain_out_of_memory, row
from p2pz.files import check_tensor, load_tensors, making_sense, save_tensors
from p2pz.images import ImageLike, as_list, psnr, read_image, to_pictures, to_tensor, working_size
from p2pz.kernels import regularise_noise
from p2pz.kernels.regulariser import pyramid_sizes
from p2pz.memory import batches_for
from p2pz.model import Model, loaded
from p2pz.presets import Settings, settings_for
from p2pz.recording import Recorder, given_hooks, hooks_in_step
from p2pz.schedule import authors_inversion_schedule, ddim_step, inversion_schedule, random_numbers, whole_number
from p2pz.unet import Conditioning

LOWEST_MINI_PSNR = 26.0
"""In dB. Pictures of the mini world come back from its autoencoder at 29 or more, two photographs at 16 and 20."""

_SCHEDULES = {"mirror": inversion_schedule, "authors": authors_inversion_schedule}


@dataclass(frozen=True)
class Inversion:
    """An image as noise. Many edits can start from one.

    Attributes:
        latents: the noise, `[4, h, w]` float32 on the CPU.
        image_latents: the encoded image, same shape.
        prompt: the caption it was inverted with.
        steps: steps of the inversion.
        fingerprint: of the model it belongs to.
        path: the latents on the way, from the image's to the noise, `[steps + 1, 4, h, w]`, and
        picture: the image itself; both only if the settings' reference is `"path"`.
    """

    latents: Tensor
    image_latents: Tensor
    prompt: str
    steps: int
    fingerprint: str
    path: Tensor | None = None
    picture: Image.Image | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            path: for instance `photo.safetensors`.

        Raises:
            ValueError: the place cannot be written to.
        """
        card = {"prompt": self.prompt, "steps": str(self.steps), "fingerprint": self.fingerprint}
        tensors = {"latents": self.latents, "image_latents": self.image_latents}
        if self.path is not None:
            tensors |= {"path": self.path, "picture": torch.from_numpy(np.array(self.picture))}
        save_tensors(path, "inversion", tensors, card)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Inversion:
        """Read a file that `save` wrote.

        Args:
            path: the file.

        Raises:
            ValueError: it is missing, is no inversion or is damaged.
        """
        names, facts = ("latents", "image_latents"), ("prompt", "steps", "fingerprint")
        tensors, card = load_tensors(path, "inversion", names, facts)
        with making_sense(path, "inversion", "invert the image again"):
            latents, image_latents, way, pixels = (tensors.get(name) for name in (*names, "path", "picture"))
            steps = int(card["steps"])
            check_tensor("latents", latents, (4, "h", "w"))
            check_tensor("image_latents", image_latents, latents.shape)
            if (way is None) != (pixels is None):
                raise ValueError("it has only one of path and picture")
            if way is not None:
                check_tensor("path", way, (steps + 1, *latents.shape))
                check_tensor("picture", pixels, ("H", "W", 3), [torch.uint8])
            if not all(tensor.isfinite().all() for tensor in (latents, image_latents, way) if tensor is not None):
                raise ValueError("it holds numbers that are not finite")
        picture = None if pixels is None else Image.fromarray(pixels.numpy())
        return cls(latents, image_latents, card["prompt"], steps, card["fingerprint"], way, picture)

    def image_size(self, model: Model) -> tuple[int, int]:
        """Height and width in pixels of the image that the inversion was made of."""
        height, width = (side * model.vae.config.downsampling for side in self.latents.shape[1:])
        return height, width

    def check_fits(self, model: Model) -> None:
        """Raise ValueError if the inversion was made with another model, or its picture is of another size."""
        if self.fingerprint != model.fingerprint:
            raise ValueError(
                "this inversion was made with another model or by an earlier p2pz: invert the image again with this one"
            )
        height, width = self.image_size(model)
        if self.picture is not None and self.picture.size != (width, height):
            raise ValueError(
                f"this inversion's picture has {self.picture.width} x {self.picture.height} pixels, but its latents "
                f"are those of {width} x {height}: invert the image again"
            )


def draw_offsets(generator: torch.Generator, settings: Settings, channels: int, height: int, width: int) -> Tensor:
    """Random roll offsets of one inversion step, drawn one by one in the order of the published code.

    Args:
        generator: on the CPU.
        settings: for `rounds`, `rolls` and `lowest_offset`.
        channels: latent channels.
        height, width: of the latents; a level of height S gets offsets from `lowest_offset` to S/2 - 1.

    Returns:
        `[rounds, rolls, 1, channels, levels]` int64; every image of a batch gets the same, so that an image in a batch
        gets what it gets alone.
    """
    sizes = [max(size // 2 - settings.lowest_offset, 1) for size, _ in pyramid_sizes(height, width)]
    draws = settings.rounds * settings.rolls * channels
    # A draw is a word of the generator's stream modulo the size; so all can be drawn modulo a multiple of all sizes.
    words = torch.randint(math.lcm(*sizes), (draws, len(sizes)), generator=generator)
    offsets = settings.lowest_offset + words % torch.tensor(sizes)
    return offsets.view(settings.rounds, settings.rolls, 1, channels, len(sizes))


@torch.no_grad()
def invert_latents(
    model: Model,
    image_latents: Tensor,
    context: Tensor,
    settings: Settings,
    generator: torch.Generator,
    progress: bool | None = None,
    attend: Attend | Hooks = plain,
    recorder: Recorder | None = None,
    queries: Sequence[Tensor] | None = None,
) -> Tensor:
    """Walk from image latents to noise.

    Args:
        model: the model.
        image_latents: `[B, 4, h, w]` float32, scaled.
        context: text states of the captions, `[B, 77, d]`.
        settings: steps, schedule and regulariser.
        generator: for the regulariser's offsets, on the CPU.
        progress: show a bar; None: on a terminal only.
        attend: what happens in every attention layer, or `Hooks` of that and of features, see `p2pz.attention`; any but
            the default runs unrecorded.
        recorder: keeps cross-attention maps, see `p2pz.recording`.
        queries: receives those of each cross-attention layer at each step, `[n, B, N, H, D]`, see
            `p2pz.memory.tables_for_queries`.

    Returns:
        The latents on the way, from the image's to the noise, `[n + 1, B, 4, h, w]` float32 for n steps.

    Source: Parmar et al. (2023), section 3.1; Song et al., "Denoising Diffusion Implicit Models" (2021).
    """
    schedule = _SCHEDULES[settings.inversion](settings.steps)
    strengths = settings.autocorrelation_strength, settings.kl_strength

    parts = [Part(len(image_latents), "inversion", "conditional")]
    hooks = hooks_of(attend)
    path = [image_latents]

    keeps = queries is not None  # a recorded step lives longer than the queries, so it must not hold them

    def step(index: Tensor, state: Tensors, constants: Tensors) -> Tensors:
        (latents, *_), (shifts, keys_values, alphas, *offsets) = state, constants
        alpha_from, alpha_to = row(alphas, index)
        maps: list[Tensor] = []
        kept: QueriesAndKeys = {}
        told = hooks_in_step(hooks, watcher, parts, index, schedule.timesteps, maps)
        if keeps:
            told = told._replace(attend=keep_queries_and_keys(kept, told.attend))
        prediction = model.predict(latents, Conditioning(row(shifts, index), keys_values), told)
        noise = model.to_noise(prediction, latents, alpha_from)
        if offsets:
            noise = regularise_noise(noise, row(offsets[0], index), *strengths, settings.form)
        return ddim_step(latents, noise, alpha_from, alpha_to), *(q for q, _ in kept.values()), *maps

    def each(i: int, state: Tensors) -> None:
        path.append(state[0].clone())
        if recorder:
            recorder.take(i, parts, state[1 + len(queries or ()) :])

    conditioning = model.condition(schedule.timesteps, context, image_latents.shape[2:])
    constants = [*conditioning, schedule.alphas]
    if any(strengths):
        offsets = [draw_offsets(generator, settings, *image_latents.shape[1:]) for _ in range(len(schedule))]
        constants.append(torch.stack(offsets))
    constants = [tensor.to(model.device) for tensor in constants]
    state = [image_latents]
    if queries is not None:
        state += [torch.empty_like(table[0], device=model.device) for table in queries]
    if recorder:
        state += recorder.begin(model.unet, parts, image_latents, schedule.timesteps, conditioning.keys_values.shape[1])
    watcher = recorder and recorder.watcher()
    kind = (
        "invert", id(model.unet), model.prediction_type, *strengths, settings.form, keeps, recorder and recorder.key,
    )  # fmt: skip
    graphs, model = model.split(hooks == Hooks())
    graphs.run(
        kind, step, state, constants, len(schedule), "inverting", progress, each, fill=queries or ()
    )  # fmt: skip
    return torch.stack(path)


def prepare_pictures(images: Sequence[ImageLike], model: Model, size: int | None = None) -> list[Image.Image]:
    """Read images and resize each to the size the model works at, see `working_size`.

    Args:
        images: what to read.
        model: for its native size, and pixels per latent.
        size: instead of the native size, 64 to 1536.

    Raises:
        ValueError: an image cannot be read, or the size is out of range.
    """
    native, multiple = model.native_size, model.vae.config.downsampling
    if size is not None:
        native = whole_number("size", size, 64, 1536)
    pictures = [read_image(image) for image in images]
    sizes = [working_size(picture.size, native, multiple) for picture in pictures]
    return [
        picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
        for picture, size in zip(pictures, sizes, strict=True)
    ]


def common_steps(items: Sequence[ImageLike | Inversion]) -> int | None:
    """The number of steps of the inversions among images, if all have the same, else None."""
    steps = {item.steps for item in items if isinstance(item, Inversion)}
    return steps.pop() if len(steps) == 1 else None


def open_images(
    items: Sequence[ImageLike | Inversion], model: Model, size: int | None = None
) -> tuple[dict[int, Image.Image], list[tuple[int, int]]]:
    """Pictures of the images that are no inversions, by their places, and height and width of all in pixels.

    Args:
        items, model, size: see `prepare_pictures`.

    Raises:
        ValueError: an inversion is another model's, or see `prepare_pictures`.
    """
    places = [i for i, item in enumerate(items) if not isinstance(item, Inversion)]
    pictures = dict(zip(places, prepare_pictures([items[i] for i in places], model, size), strict=True))
    sizes = []
    for i, item in enumerate(items):
        if isinstance(item, Inversion):
            item.check_fits(model)
            sizes.append(item.image_size(model))
        else:
            sizes.append(pictures[i].size[::-1])
    return pictures, sizes


def invert_pictures(
    model: Model,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    settings: Settings,
    seed: int = 0,
    progress: bool | None = None,
    context: Tensor | None = None,
    attend: Attend | Hooks = plain,
    recorder: Recorder | None = None,
    queries: Sequence[Tensor] | None = None,
) -> list[Inversion]:
    """Invert pictures of one size as one batch.

    Args:
        model: the model.
        pictures: as `prepare_pictures` returns them.
        prompts: a caption for each.
        settings: the numbers.
        seed: of the regulariser's offsets and of the posterior's sample, the same for every picture.
        progress: show a bar; None: on a terminal only.
        context: text states of the prompts, `[B, 77, d]`, if they are known already.
        attend, recorder, queries: see `invert_latents`.

    Returns:
        An inversion for each picture.
    """
    generator = random_numbers(seed)
    images = to_tensor(pictures)
    if settings.sample_posterior:
        state = generator.get_state()  # every image gets the noise it would get alone
        encoded = [model.encode_image(image[None], generator.set_state(state)) for image in images]
        image_latents = torch.cat(encoded)
    else:
        image_latents = model.encode_image(images)
    if model.is_mini:
        _warn_of_strangers(model, pictures, image_latents)
    context = model.encode_text(prompts) if context is None else context
    path = invert_latents(model, image_latents, context, settings, generator, progress, attend, recorder, queries)
    check_finite(path[-1], model, image_latents, _SCHEDULES[settings.inversion](settings.steps).timesteps[0], context)
    keep = settings.reference == "path"
    path = (path if keep else path[[0, -1]]).cpu()
    return [
        Inversion(
            latents[-1], latents[0], prompt, settings.steps, model.fingerprint,
            latents if keep else None, picture if keep else None,
        )
        for latents, prompt, picture in zip(map(torch.clone, path.unbind(1)), prompts, pictures, strict=True)
    ]  # fmt: skip


def _warn_of_strangers(model: Model, pictures: Sequence[Image.Image], image_latents: Tensor) -> None:
    """Say so if the bundled model was given pictures of another world."""
    decoded = to_pictures(model.decode_latents(image_latents))
    worst = min(psnr(*pair) for pair in zip(decoded, pictures, strict=True))
    if worst < LOWEST_MINI_PSNR:
        width, height = pictures[0].size
        small = width * height < 0.9 * model.native_size**2
        warnings.warn(
            f"the bundled model knows only its cartoon world and can reproduce this image at {worst:.1f} dB only"
            + (f", at {width} x {height} pixels; it was trained at {model.native_size}" if small else "")
            + "; for photographs load a Stable Diffusion checkpoint: p2pz.load(source), --model SOURCE or "
            "P2PZ_MODEL=SOURCE",
            stacklevel=5,
        )


@explain_out_of_memory
def invert(
    img: ImageLike | Sequence[ImageLike],
    *,
    model: Model | None = None,
    prompt: str | Sequence[str] | None = None,
    preset: str = "p2pz",
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    size: int | None = None,
    progress: bool | None = None,
    attend: Attend = plain,
    features: Features | None = None,
    record: Recorder | None = None,
    **settings: Any,
) -> Inversion | list[Inversion]:
    """Find the noise that reproduces an image, for one or many edits.

    Args:
        img: a path, a PIL image, an `[H, W, 3]` array, or a list of them. Each is resized to the size the model works
            at, about `model.native_size` squared pixels in its own shape.
        model: None loads the default model.
        prompt: what the image shows, one text or one per image. None: the bundled model recognises it; other models
            assume "a photo".
        preset: `"p2pz"`, `"authors"` or `"diffusers"`, see `p2pz.presets`.
        steps: 1 to 999; None takes the preset's.
        seed: of all randomness; the same seed gives the same noise.
        batch_size: images of one size that are worked on at once; fewer if the model's memory budget says so.
        size: images are worked on at about `size * size` pixels, 64 to 1536; None: `model.native_size`.
        progress: show a bar; None: on a terminal only.
        attend: what happens in every attention layer, see `p2pz.attention`.
        features: what becomes of the features of every residual block, likewise; None: they stay.
        record: keeps cross-attention maps, see `p2pz.record`.
        settings: further fields of `p2pz.presets.Settings`.

    Returns:
        An `Inversion`, or a list of them for a list.

    Raises:
        ValueError: an image, a prompt list or a setting is wrong, or `max_memory` too small; the message says which.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), section 3.1.
    """
    model = loaded(model)
    numbers = settings_for(model, preset, steps=steps, **settings)
    images, single = as_list(img)
    pictures = prepare_pictures(images, model, size)
    batches = batches_for(model, [picture.size[::-1] for picture in pictures], batch_size, rows=1)
    prompts = captions_for(pictures, prompt, "a photo", model)
    inversions: list[Inversion | None] = [None] * len(pictures)
    hooks = given_hooks(attend, features, record)
    for plan, batch in batches:
        done = invert_pictures(
            plan.apply(model), [pictures[i] for i in batch], [prompts[i] for i in batch], numbers, seed, progress,
            attend=hooks, recorder=record,
        )  # fmt: skip
        if record:
            record.finish(batch, [prompts[i] for i in batch], [{"inversion": i} for i in range(len(batch))])
        for i, inversion in zip(batch, done, strict=True):
            inversions[i] = inversion
    return inversions[0] if single else inversions
