"""Speed and memory of whole edits against diffusers: one checkpoint folder, read by both.

    python bench/edit_speed.py --out results                        # SD 1.5 shapes, random weights, one GPU
    python bench/edit_speed.py --out results --shapes sd21          # SD 2.1 at 768 x 768
    python bench/edit_speed.py --out results --shapes sdxl          # SDXL at 1024 x 1024, which diffusers cannot edit
    python bench/edit_speed.py --out results --model FOLDER         # any checkpoint in the diffusers layout
    python bench/edit_speed.py --out results --only p2pz diffusers  # some contenders; results of earlier runs are kept
    python bench/edit_speed.py --out results --parts unet guided    # some parts
    python bench/edit_speed.py --out results --mini                 # the bundled model, on the CPU
    python bench/edit_speed.py --out results --smoke                # reduced width, 3 steps, CPU, to test the script

Contenders, all with the same weights, picture, sentences and numbers of steps:

- diffusers: `StableDiffusionPix2PixZeroPipeline` as its documentation uses it, with its defaults.
- compiled: what can be assembled from diffusers' parts: its UNet, channels last, through `torch.compile`, in CUDA
  graphs, reference and edit in lockstep. A lower bound: attention without maps, the gradient of a plain mean instead of
  the loss on the maps. diffusers' regulariser cannot be captured; its time, measured alone, is added for each step.
- p2pz: the preset `diffusers`, the same method and numbers. p2pz_default: the default preset, with its own numbers (the
  bundled model's has 20 steps); the inversion's passes serve as the reference's.

Rows:

- total_s: picture in, picture out, texts and direction encoded. p2pz also decodes the reconstruction.
- invert_s, edit_s: between latents; edit_s is reference and edit, of p2pz_default the edit, whose reference is the
  inversion. diffusers' inversion also decodes a picture, always.
- guided_step_ms: both halves forward with maps and loss, gradient to the latents, both halves forward again; the
  default preset takes the gradient of the conditional half only.
- unet_ms: a plain forward of 1, 2 or 4 images; for diffusers with its fast attention, not with the pipeline's.
- regulariser_ms: all rounds of one inversion step; p2pz has drawn the offsets before; compiled's is diffusers'.
- images_per_second: 1, 4 or 8 images given at once; diffusers and compiled edit one after another.
- encode_s, decode_s: one picture by the VAE. sample_s: a picture from text. Steps and size as for the edit.
- start_up_s: a fresh process until its first edit is there; peak_gib: the memory that this process took at most, p2pz
  in two edits.
- load_s: of that, loading alone, after imports and CUDA's own start; load_host_gib: the host memory that the process
  had taken at most when the model was loaded, imports included. The size of the weights is below the table.
- fraction_of_limit: operations of diffusers' UNet / measured rate of a large matrix product / time; p2pz's does 5 %
  fewer where it convolves maps before they are enlarged (Stable Diffusion 1.5, half precision).

p2pz's and compiled's unet and guided step are CUDA graphs captured by this script; diffusers is eager. What p2pz
computes once in an edit (time embeddings, keys and values of the texts) is not timed there. Times are medians
(quartiles) of whole calls, contenders in turn; short ones of up to 10 calls in a row, as in a loop over steps.
Agreement: relative norm of the difference of latents, p2pz (preset `diffusers`) from diffusers; for scale, how far the
edit is from the reference and from an edit without map guidance. With v-prediction the two regularise different things
(p2pz epsilon, diffusers v), so they do not agree.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import math
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

if __name__ == "__main__":  # transformers would take kernels.py for the package `kernels`, which it probes for
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import p2pz
from p2pz.attention import keep_queries_and_keys
from p2pz.editing import edit_latents, followed_rows, map_gradient
from p2pz.files import atomic_path
from p2pz.images import to_pictures, to_tensor
from p2pz.inversion import invert_latents
from p2pz.kernels import regularise_noise
from p2pz.kernels.regulariser import pyramid_sizes
from p2pz.memory import tables_for_queries
from p2pz.presets import Settings, settings_for
from p2pz.schedule import Schedule, ddim_step, denoising_schedule, inversion_schedule, to_epsilon
from p2pz.sentences import bank_sentences
from p2pz.unet import (
    SIZE_NUMBERS,
    STABLE_DIFFUSION_1,
    STABLE_DIFFUSION_2_768,
    STABLE_DIFFUSION_XL,
    Conditioning,
    UNetConfig,
)
from p2pz.vae import VAEConfig
from p2pz.weights import MINI_FOLDER, open_checkpoint

CAPTION, WORDS = "a photo of a cat", ("cat", "dog")
GUIDANCE = 7.5
TIMESTEP = 481  # of calls outside a loop
LONG, SHORT = 3, 20  # repeats
GROUP_S = 0.05  # short calls are timed in groups of about this long, at most 10 calls


# p2pz's UNet and guided step, for this script to capture.


def ours_forward(model: p2pz.Model, latents: Tensor, conditioning: Conditioning) -> Tensor:
    return model.unet.predict(latents, conditioning)


def ours_guided_step(
    model: p2pz.Model, halves: Tensor, conditioning: Conditioning, reference: dict, strength: float, followed: int
) -> Tensor:
    """Noise of both halves after each was moved by its own gradient, or both by the one of the conditional half."""
    gradient = map_gradient(model, halves[-followed:], conditioning.of(slice(-followed, None)), reference)
    return model.predict(halves - strength / followed * gradient, conditioning)


# What is measured, and on what.


class Part(NamedTuple):
    """Something to time: the row of the results, the sizes it is done with, and whether it takes seconds."""

    row: str
    sizes: tuple[int | None, ...] = (None,)
    long: bool = True


PARTS = {  # by importance; each but the last two is a method of the contenders
    "total": Part("total_s"),
    "guided": Part("guided_step_ms", long=False),
    "unet": Part("unet_ms", (1, 2, 4), long=False),
    "invert": Part("invert_s"),
    "edit": Part("edit_s"),
    "regulariser": Part("regulariser_ms", long=False),
    "batches": Part("images_per_second", (4, 8)),
    "sample": Part("sample_s"),
    "encode": Part("encode_s", long=False),
    "decode": Part("decode_s", long=False),
    "agreement": Part("agreement"),
    "start_up": Part("start_up_s"),
}
MINI_PARTS = ["total", "unet", "invert", "edit", "agreement"]
OURS = ["p2pz", "p2pz_default"]
CONTENDERS = [*OURS, "diffusers", "compiled"]
ROWS = ["total_s", "invert_s", "edit_s", "guided_step_ms", "unet_ms", "regulariser_ms", "encode_s", "decode_s"]
ROWS += ["sample_s", "start_up_s", "load_s", "load_host_gib", "images_per_second", "peak_gib", "fraction_of_limit"]


def takes(name: str, part: str) -> bool:
    """Whether a contender has a time of its own there."""
    if name == "p2pz_default":
        return part in ("total", "guided", "invert", "edit", "start_up")
    return name == "p2pz" or part not in ("batches", "agreement", "sample" if name == "compiled" else "")


@dataclass(frozen=True)
class Setup:
    """What to measure with; can be sent to another process. `folder` is the checkpoint, `smoke` keeps repeats few."""

    folder: str
    device: str
    dtype: str
    steps: int = 50
    smoke: bool = False
    compile_mode: str = "default"

    @property
    def precision(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        return json.loads((Path(self.folder) / name / file).read_text())

    @cached_property
    def sides(self) -> tuple[int, int]:
        """Height and width of latents and of pictures."""
        side = self.config("unet")["sample_size"]
        return side, side * 2 ** (len(self.config("vae")["block_out_channels"]) - 1)

    @cached_property
    def prediction(self) -> str:
        return self.config("scheduler", "scheduler_config.json").get("prediction_type", "epsilon")

    @property
    def strength(self) -> float:
        """Step length of the map guidance: diffusers' default, or what its documentation asks for v-prediction."""
        return 0.1 if self.prediction == "epsilon" else 0.01

    @cached_property
    def picture(self) -> Image.Image:
        picture = Image.open(MINI_FOLDER / "examples" / "cat.png").convert("RGB")
        return picture.resize((self.sides[1], self.sides[1]), Image.Resampling.LANCZOS)

    def noise(self, batch: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """Latents, the same for all contenders."""
        shape = (batch, 4, self.sides[0], self.sides[0])
        made = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return made.to(self.device, dtype or self.precision)

    def timestep(self) -> Tensor:
        return torch.tensor(TIMESTEP, device=self.device)


def sentences_of(setup: Setup) -> tuple[list[str], list[str]]:
    """Those that `p2pz.direction` takes."""
    return bank_sentences(*WORDS, mini=Path(setup.folder) == MINI_FOLDER)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def captured(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """A call as a CUDA graph; on the CPU the call itself. What it returns is overwritten by the next replay."""
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = call()

    def replay() -> Any:
        graph.replay()
        return output

    replay.inputs = call  # holds the tensors that the graph reads
    return replay


# Contenders. Each method prepares something, untimed, and returns the call to be timed.


class P2pz:
    """p2pz through its public functions, with one of its presets."""

    def __init__(self, setup: Setup, preset: str = "diffusers"):
        self.setup, self.preset, self.facts = setup, preset, {}
        self.model = p2pz.load(setup.folder, device=setup.device, dtype=setup.precision)
        self.changes = {"steps": setup.steps} if preset == "diffusers" or setup.smoke else {}
        if setup.prediction != "epsilon":
            self.changes["xa_guidance"] = setup.strength
        self.settings = settings_for(self.model, preset, **self.changes)

    @cached_property
    def contexts(self) -> Tensor:
        """States of the caption and of the edited caption."""
        caption = self.model.encode_text([CAPTION])
        delta = p2pz.direction(*WORDS, model=self.model).states.to(caption)
        return torch.cat([caption, caption + self.settings.strength * delta])

    def conditioning(self, contexts: Tensor) -> Conditioning:
        """What an edit computes once, for one timestep."""
        size = self.setup.noise().shape[2:]
        shifts, keys_values = self.model.condition(self.setup.timestep().reshape(1), contexts, size)
        return Conditioning(shifts[0], keys_values)

    def unet(self, batch: int) -> Callable:
        latents = self.setup.noise(batch).to(memory_format=torch.channels_last)
        conditioning = self.conditioning(self.contexts[:1].repeat(batch, 1, 1))
        return captured(lambda: ours_forward(self.model, latents, conditioning), self.setup.device)

    def guided(self) -> Callable:
        halves, reference = self.setup.noise(dtype=torch.float32).repeat(2, 1, 1, 1), {}
        followed = followed_rows(self.settings)
        caption = self.conditioning(self.contexts[:1].repeat(followed, 1, 1))
        self.model.predict(halves[:followed], caption, keep_queries_and_keys(reference))
        arguments = self.model, halves, self.conditioning(self.contexts), reference, self.setup.strength, followed
        return captured(lambda: ours_guided_step(*arguments), self.setup.device)

    def regulariser(self) -> Callable:
        noise, generator = self.setup.noise(dtype=torch.float32), seeded()
        sizes = pyramid_sizes(*noise.shape[2:])
        draws = [torch.randint(h // 2, (1,), generator=generator) for _ in range(25 * 4) for h, _ in sizes]
        offsets = torch.cat(draws).view(5, 5, 1, 4, len(sizes)).to(noise.device)
        return lambda: regularise_noise(noise, offsets, 20.0, 20.0, "random")

    def invert(self) -> Callable:
        latents, caption = self.encode()(), self.contexts[:1]
        return lambda: invert_latents(self.model, latents, caption, self.settings, seeded(), False)[-1]

    def edit(self) -> Callable:
        noise, caption, edited = self.setup.noise(dtype=torch.float32), self.contexts[:1], self.contexts[1:]
        left: dict[str, Any] = {}
        if self.settings.reference == "path":  # the inversion has been the reference's pass
            picture = (self.setup.sides[1], self.setup.sides[1])
            left["queries"] = tables_for_queries(self.model, picture, 1, self.settings.steps)
            inverted = self.model, self.encode()(), caption, self.settings, seeded(), False
            left["path"] = invert_latents(*inverted, queries=left["queries"])
            noise = left["path"][-1]
        return lambda: edit_latents(self.model, noise, caption, None, edited, self.settings, False, **left)[0]

    def encode(self) -> Callable:
        image = to_tensor([self.setup.picture])
        return lambda: self.model.encode_image(image, seeded())

    def decode(self) -> Callable:
        latents = self.setup.noise(dtype=torch.float32)
        return lambda: self.model.decode_latents(latents)

    def total(self, count: int = 1) -> Callable:
        options = {"model": self.model, "prompt": CAPTION, "preset": self.preset, "progress": False} | self.changes
        return lambda: p2pz.edit([self.setup.picture] * count, "->".join(WORDS), **options)

    batches = total

    def sample(self) -> Callable:
        options = {"steps": self.setup.steps, "guidance": GUIDANCE, "progress": False}
        return lambda: p2pz.sample(CAPTION, model=self.model, **options)


class Diffusers:
    """diffusers' pipeline."""

    def __init__(self, setup: Setup):
        quiet()
        from diffusers import DDIMInverseScheduler, DDIMScheduler
        from diffusers.pipelines.deprecated.stable_diffusion_variants import pipeline_stable_diffusion_pix2pix_zero

        self.setup, self.steps, self.facts = setup, setup.steps, {}
        self.peer = pipeline_stable_diffusion_pix2pix_zero
        whole = (Path(setup.folder) / "unet" / "diffusion_pytorch_model.safetensors").is_file()
        self.pipe = self.peer.StableDiffusionPix2PixZeroPipeline.from_pretrained(
            setup.folder, caption_generator=None, caption_processor=None, inverse_scheduler=None, safety_checker=None,
            feature_extractor=None, torch_dtype=setup.precision, variant=None if whole else "fp16",
        )  # fmt: skip
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.register_modules(inverse_scheduler=DDIMInverseScheduler.from_config(self.pipe.scheduler.config))
        self.pipe.to(setup.device).set_progress_bar_config(disable=True)
        self.processors = dict(self.pipe.unet.attn_processors)

    def encode_texts(self) -> Tensor:
        """States of the caption and of the edited caption."""
        caption = self.pipe.encode_prompt(CAPTION, self.setup.device, 1, False)[0]
        source, target = (self.pipe.get_embeds(side) for side in sentences_of(self.setup))
        return torch.cat([caption, caption + target - source])

    @cached_property
    def contexts(self) -> Tensor:
        return self.encode_texts()

    def fast_attention(self) -> None:
        """Put back what the pipeline replaces in the UNet."""
        self.pipe.unet.set_attn_processor(dict(self.processors))
        self.pipe.unet.requires_grad_(False)

    def unet(self, batch: int) -> Callable:
        self.fast_attention()
        latents, timestep = self.setup.noise(batch), self.setup.timestep()
        contexts = self.contexts[:1].repeat(batch, 1, 1)
        return lambda: self.pipe.unet(latents, timestep, encoder_hidden_states=contexts).sample

    def guided(self) -> Callable:
        """The body of the pipeline's second loop."""
        unet = self.peer.prepare_unet(self.pipe.unet)
        halves, timestep, captions = self.setup.noise().repeat(2, 1, 1, 1), self.setup.timestep(), self.contexts[:1]
        unet(halves, timestep, captions.repeat(2, 1, 1), cross_attention_kwargs={"timestep": timestep})
        stores = [processor for processor in unet.attn_processors.values() if processor.is_pix2pix_zero]
        maps = [dict(store.reference_cross_attn_map) for store in stores]

        def call() -> Tensor:
            for store, kept in zip(stores, maps, strict=True):  # a step takes its maps away
                store.reference_cross_attn_map = dict(kept)
            moved = halves.detach().clone()
            moved.requires_grad = True
            optimiser = torch.optim.SGD([moved], lr=self.setup.strength)
            with torch.enable_grad():
                loss = self.peer.Pix2PixZeroL2Loss()
                unet(moved, timestep, self.contexts, cross_attention_kwargs={"timestep": timestep, "loss": loss})
                loss.loss.backward(retain_graph=False)
                optimiser.step()
            return unet(moved.detach(), timestep, self.contexts, cross_attention_kwargs={"timestep": None}).sample

        return call

    def regulariser(self) -> Callable:
        """The inner loops of `invert`."""
        pipe, latents, timestep = self.pipe, self.setup.noise(), self.setup.timestep()

        def move(noise: Tensor, loss: Callable[[Tensor], Tensor], share: int) -> Tensor:
            variable = torch.autograd.Variable(noise.detach().clone(), requires_grad=True)
            loss(pipe.get_epsilon(variable, latents.detach(), timestep)).backward()
            return noise - 20.0 * (variable.grad.detach() / share)

        def call() -> Tensor:
            noise, generator = latents, seeded()
            with torch.enable_grad():
                for _ in range(5):
                    for _ in range(5):
                        noise = move(noise, lambda epsilon: pipe.auto_corr_loss(epsilon, generator=generator), 5)
                    noise = move(noise, pipe.kl_divergence, 1).detach()
            return noise

        return call

    def inverted(self, image: Image.Image | Tensor, **caption) -> Tensor:
        return self.pipe.invert(image=image, num_inference_steps=self.steps, generator=seeded(), **caption).latents

    def edited(self, noise: Tensor, **texts) -> Any:
        options = {"num_inference_steps": self.steps, "guidance_scale": GUIDANCE}
        options |= {"cross_attention_guidance_amount": self.setup.strength}
        return self.pipe(latents=noise, **options, **texts).images

    def edited_latents(self, noise: Tensor, contexts: Tensor) -> Tensor:
        """With the states of caption and edited caption."""
        caption, edited = contexts.chunk(2)
        texts = {"prompt_embeds": caption, "negative_prompt_embeds": caption}
        return self.edited(noise, source_embeds=caption, target_embeds=edited, output_type="latent", **texts)

    def invert(self) -> Callable:
        latents, caption = self.encode()(), self.contexts[:1]
        return lambda: self.inverted(latents, prompt_embeds=caption)

    def edit(self) -> Callable:
        noise = self.setup.noise()
        return lambda: self.edited_latents(noise, self.contexts)

    def total(self) -> Callable:
        def call() -> Image.Image:
            noise = self.inverted(self.setup.picture, prompt=CAPTION)
            source, target = (self.pipe.get_embeds(side) for side in sentences_of(self.setup))
            texts = {"prompt": CAPTION, "negative_prompt": CAPTION, "source_embeds": source, "target_embeds": target}
            return self.edited(noise, **texts)[0]

        return call

    def encode(self) -> Callable:
        image, vae = to_tensor([self.setup.picture]), self.pipe.vae

        def call() -> Tensor:
            posterior = vae.encode(image.to(self.setup.device, self.setup.precision)).latent_dist
            return posterior.sample(seeded()) * vae.config.scaling_factor

        return call

    def decode(self) -> Callable:
        noise, vae = self.setup.noise(), self.pipe.vae
        return lambda latents=noise: vae.decode(latents / vae.config.scaling_factor).sample.float().clamp(-1, 1)

    def sample(self) -> Callable:
        from diffusers import StableDiffusionPipeline

        self.fast_attention()
        parts = {name: getattr(self.pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
        left_out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **left_out)
        pipe.set_progress_bar_config(disable=True)
        return lambda: pipe(CAPTION, num_inference_steps=self.steps, guidance_scale=GUIDANCE).images[0]


class Compiled(Diffusers):
    """The strongest assembly of diffusers' parts: see the top of this file for what is left out."""

    def __init__(self, setup: Setup):
        super().__init__(setup)
        import torch._inductor.config

        torch._inductor.config.force_disable_caches = True  # else a second run would report no time for compiling
        self.pipe.unet.to(memory_format=torch.channels_last).requires_grad_(False)
        self.facts = {"compile_mode": setup.compile_mode, "compile_s": {}}
        how = {"backend": "eager"} if setup.device == "cpu" else {"mode": setup.compile_mode}
        self.net = torch.compile(self.plain, dynamic=False, **how)
        self.row = torch.ones(3, device=setup.device)  # timestep, alpha-bar before and after

    def plain(self, latents: Tensor, timestep: Tensor, contexts: Tensor) -> Tensor:
        return self.pipe.unet(latents, timestep, contexts, return_dict=False)[0]

    def forward(self, latents: Tensor, timestep: Tensor, contexts: Tensor) -> Tensor:
        latents = latents.to(self.setup.precision, memory_format=torch.channels_last)
        return self.net(latents, timestep.float(), contexts)

    def gradient(self, latents: Tensor, timestep: Tensor, contexts: Tensor) -> Tensor:
        """Of something cheap instead of the loss on the maps."""
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            return torch.autograd.grad(self.forward(leaf, timestep, contexts).float().mean(), leaf)[0]

    def compile(self, kind: str, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compile `forward` or `gradient` for a batch, or do without if that fails; returns arguments for it."""
        arguments = self.setup.noise(batch), self.setup.timestep(), self.contexts[:1].repeat(batch, 1, 1)
        if f"{kind} {batch}" not in self.facts["compile_s"]:
            duration, failure = attempt(seconds_of, lambda: getattr(self, kind)(*arguments), self.setup.device)
            if failure:
                self.facts["compile_failed"] = f"{kind} {batch}: {failure}; graph alone"
                self.net = self.plain
            self.facts["compile_s"][f"{kind} {batch}"] = duration
        return arguments

    def unet(self, batch: int) -> Callable:
        arguments = self.compile("forward", batch)
        return captured(lambda: self.forward(*arguments), self.setup.device)

    def guided_step(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Moved latents of both halves and their noise."""
        halves = latents.repeat(2, 1, 1, 1)
        moved = halves - self.setup.strength * self.gradient(halves, timestep, self.contexts)
        return moved, self.forward(moved, timestep, self.contexts)

    def guided(self) -> Callable:
        noise, timestep, _ = self.compile("gradient", 2)
        self.compile("forward", 2)
        return captured(lambda: self.guided_step(noise[:1], timestep), self.setup.device)

    def ddim(self, latents: Tensor, prediction: Tensor) -> Tensor:
        noise = to_epsilon(prediction.float(), latents, self.row[1], self.setup.prediction)
        return ddim_step(latents, noise, self.row[1], self.row[2])

    def loop(self, schedule: Schedule, body: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable:
        """A function that takes latents through a schedule; each step is one replay.

        Args:
            schedule: the steps.
            body: from latents of edit and reference to those after a step; an inversion has no use for the second.
        """
        rows = torch.stack([schedule.timesteps.double(), schedule.alphas_from, schedule.alphas_to], dim=1)
        rows, state = rows.float().to(self.setup.device), self.setup.noise(2, torch.float32)
        self.row.copy_(rows[0])
        replay = captured(lambda: state.copy_(torch.cat(body(*state.split(1)))), self.setup.device)

        def call(start: Tensor | None = None) -> Tensor:
            state.copy_(self.setup.noise() if start is None else start)
            for row in rows:
                self.row.copy_(row)
                replay()
            return state[:1].to(self.setup.precision)

        return call

    def invert(self) -> Callable:
        def body(latents: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            return self.ddim(latents, self.forward(latents, self.row[0], self.contexts[:1])), other

        self.compile("forward", 1)
        return self.loop(inversion_schedule(self.steps), body)

    def edit(self) -> Callable:
        """The negative prompt is the caption, so the reference needs one half only."""

        def body(latents: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
            reference_noise = self.forward(reference, self.row[0], self.contexts[:1])
            moved, noise = self.guided_step(latents, self.row[0])
            guided = noise[:1] + GUIDANCE * (noise[1:] - noise[:1])
            return self.ddim(moved[:1], guided), self.ddim(reference, reference_noise)

        for kind, batch in (("forward", 1), ("gradient", 2), ("forward", 2)):
            self.compile(kind, batch)
        return self.loop(denoising_schedule(self.steps), body)

    def total(self) -> Callable:
        encode, invert, edit, decode = self.encode(), self.invert(), self.edit(), self.decode()

        def call() -> Image.Image:
            self.contexts.copy_(self.encode_texts())
            return to_pictures(decode(edit(invert(encode()))))[0]

        return call

    @cached_property
    def added_s(self) -> float:
        """Time of diffusers' regulariser in an inversion."""
        times, _ = time_in_turn({"": self.regulariser()}, False, self.setup, math.inf)
        self.facts["regulariser_added_s"] = self.steps * median(times[""])
        return self.facts["regulariser_added_s"]


def make(name: str, setup: Setup) -> P2pz | Diffusers:
    """A contender, loaded."""
    if name in OURS:
        return P2pz(setup, "diffusers" if name == "p2pz" else "p2pz")
    return Compiled(setup) if name == "compiled" else Diffusers(setup)


def quiet() -> None:
    """Without diffusers' and transformers' reports and progress bars."""
    import diffusers
    import transformers

    warnings.filterwarnings("ignore", message=r".*`torch_dtype` is deprecated")
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


# A checkpoint of random weights.


class Shapes(NamedTuple):
    """Sizes of a checkpoint; of the text encoder, and of a second one: hidden size, layers, heads, activation."""

    unet: UNetConfig
    vae: VAEConfig
    text: tuple[int, int, int, str]
    prediction: str = "epsilon"
    text_2: tuple[int, int, int, str] | None = None


SHAPES = {
    "sd15": Shapes(STABLE_DIFFUSION_1, VAEConfig(), (768, 12, 12, "quick_gelu")),
    "sd21": Shapes(STABLE_DIFFUSION_2_768, VAEConfig(sample_size=768), (1024, 23, 16, "gelu"), "v_prediction"),
    "sdxl": Shapes(
        STABLE_DIFFUSION_XL,
        VAEConfig(sample_size=1024, scaling_factor=0.13025),
        (768, 12, 12, "quick_gelu"),
        text_2=(1280, 32, 20, "gelu"),
    ),
    "smoke": Shapes(
        UNetConfig(4, 4, 8, (32, 64), 1, (True, True), (2, 4), 32, False, 16),
        VAEConfig((16, 32, 32, 32), 1, norm_groups=16, sample_size=64),
        (32, 2, 2, "quick_gelu"),
    ),
}


@torch.no_grad()
def write_checkpoint(shapes: Shapes, setup: Setup) -> None:
    """Random weights in the diffusers layout, float16, with the bundled model's tokenizer; kept if there already.

    Raises:
        ValueError: a forward pass with these weights overflows.
    """
    quiet()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder, wanted = Path(setup.folder), json.dumps([shapes.unet.to_json(), shapes.vae.to_json(), *shapes[2:]])
    if (folder / "made_for.json").is_file() and (folder / "made_for.json").read_text() == wanted:
        return
    torch.manual_seed(0)
    words = json.loads((MINI_FOLDER / "text_encoder" / "config.json").read_text())

    def text_config(width: int, layers: int, heads: int, activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, hidden_act=activation, projection_dim=width,
            **{name: words[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )  # fmt: skip

    with torch.device(setup.device):
        unet = UNet2DConditionModel.from_config(shapes.unet.to_json())
        vae, text = AutoencoderKL.from_config(shapes.vae.to_json()), CLIPTextModel(text_config(*shapes.text))
        made = {"unet": unet, "vae": vae, "text_encoder": text}
        if shapes.text_2:
            made["text_encoder_2"] = CLIPTextModelWithProjection(text_config(*shapes.text_2))
            shutil.copytree(MINI_FOLDER / "tokenizer", folder / "tokenizer_2", dirs_exist_ok=True)
    for name, parameter in unet.named_parameters():
        if name.endswith("to_q.weight"):
            parameter *= 4  # else attention maps are almost uniform, and their guidance changes almost nothing
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(MINI_FOLDER / name, folder / name, dirs_exist_ok=True)
    shutil.copy(MINI_FOLDER / "model_index.json", folder)
    scheduler = setup.config("scheduler", "scheduler_config.json") | {"prediction_type": shapes.prediction}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for name, module in made.items():
        module.half().save_pretrained(folder / name)
        module.to(setup.precision)

    tokens = torch.arange(77, device=setup.device)[None]
    contexts, told = text(tokens).last_hidden_state, {}
    if shapes.text_2:
        second = made["text_encoder_2"](tokens)
        contexts = torch.cat([contexts, second.last_hidden_state], dim=-1)
        told = {"text_embeds": second.text_embeds, "time_ids": setup.noise().new_zeros(1, SIZE_NUMBERS)}
    noise = unet(setup.noise(), setup.timestep(), contexts, added_cond_kwargs=told).sample
    picture = vae.decode(setup.noise() / vae.config.scaling_factor).sample
    for result in (noise, picture, vae.encode(picture.clamp(-1, 1)).latent_dist.mean):
        if not result.isfinite().all():
            raise ValueError("the random weights overflow")
    (folder / "made_for.json").write_text(wanted)


# Timing.


def attempt(function: Callable, *arguments) -> tuple[Any, str | None]:
    """What a function gives, or None and why it failed."""
    try:
        return function(*arguments), None
    except Exception as error:
        return None, f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"


def seconds_of(call: Callable, device: str, count: int = 1) -> float:
    """Time of one of several calls in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / count


def time_in_turn(calls: dict, long: bool, setup: Setup, until: float) -> tuple[dict[Any, list[float]], dict[Any, str]]:
    """Times of calls by key, in seconds, and why others failed; once it is late, no further repeats are begun."""
    counts, times, failures = dict.fromkeys(calls, 1), {}, {}
    for key, call in () if long else calls.items():
        attempt(call)
        duration, _ = attempt(seconds_of, call, setup.device)
        counts[key] = max(1, min(10, int(GROUP_S / (duration or GROUP_S))))
    repeats = LONG if long else SHORT
    for i in range(2 - long if setup.smoke else repeats):
        for key, call in calls.items():
            if key not in failures and (i == 0 or time.monotonic() < until):
                taken, failure = attempt(seconds_of, call, setup.device, counts[key])
                if failure:
                    failures[key] = failure
                else:
                    times.setdefault(key, []).append(taken)
    return {key: found for key, found in times.items() if key not in failures}, failures


class Bench:
    """A run over the parts: keeps the loaded contenders and the results, and begins nothing once its time is up."""

    def __init__(self, setup: Setup, names: list[str], results: dict[str, Any], path: Path, until: float):
        self.setup, self.names, self.results, self.path, self.until = setup, names, results, path, until
        self.loaded: dict[str, P2pz | Diffusers] = {}
        self.added: dict[tuple[str, str], float] = {}  # seconds of what a call leaves out

    @torch.no_grad()
    def run(self, parts: list[str]) -> None:
        """Measure part by part, writing all results so far after each."""
        results, how = self.results, {"agreement": self.agreement, "start_up": self.start_up}
        results["limit"], results["weights_gib"] = limits(self.setup), weights_gib(self.setup)
        for part in parts:
            began, names = time.monotonic(), [name for name in self.names if takes(name, part)]
            done, failures = how[part](names) if part in how else self.times(part, names)
            taken = round(time.monotonic() - began, 1)
            for name in done:
                facts = {"date": results["date"], "command": results["command"], "seconds": taken}
                results[name]["runs"][part] = facts
            over = [[part, name] for name in names]
            kept = {key: why for key, why in results["skipped"].items() if key.split()[:2] not in over}
            results["skipped"] = kept | {f"{part} {key}": why for key, why in failures.items()}
            for name, made in self.loaded.items():
                compiled = results[name]["facts"].get("compile_s", {}) | made.facts.get("compile_s", {})
                results[name]["facts"] |= made.facts | ({"compile_s": compiled} if compiled else {})
            derive(results)
            write(results, self.path)
            print(f"{part}, {taken} s: {line(results, part)}", flush=True)
            for key, why in failures.items():
                print(f"  not measured: {part} {key}: {why}", flush=True)
            if self.setup.device != "cpu":
                gc.collect()
                torch.cuda.empty_cache()

    def in_time(self) -> None:
        if time.monotonic() >= self.until:
            raise TimeoutError("not begun within --seconds")

    def prepare(self, name: str, part: str, size: int | None) -> Callable:
        """The call to be timed. A long one is made once before, in which p2pz captures its graphs; not diffusers'."""
        self.in_time()
        if name not in self.loaded:
            self.loaded[name] = made = make(name, self.setup)
            if name == "diffusers":  # two steps are enough for it to be warm
                made.steps = 2
                made.total()()
                made.steps = self.setup.steps
        made = self.loaded[name]
        call = getattr(made, part)(*(() if size is None else (size,)))
        if PARTS[part].long and name != "diffusers":
            call()
        self.added[name, part] = made.added_s if name == "compiled" and part in ("total", "invert") else 0
        return call

    def times(self, part: str, names: list[str]) -> tuple[set[str], dict[str, str]]:
        """Time a part's calls in turn and put the results in; returns who was measured, and what failed and why."""
        row, sizes, long = PARTS[part]
        calls, failures = {}, {}
        for name in names:
            for size in sizes:
                key = name if size is None else f"{name} {size}"
                call, failure = attempt(self.prepare, name, part, size)
                if failure:
                    failures[key] = failure
                else:
                    calls[key] = call
        times, failed = time_in_turn(calls, long, self.setup, self.until)
        for key, seconds in times.items():
            name, *size = key.split()
            if row == "images_per_second":
                values = [int(size[0]) / taken for taken in seconds]
            else:
                values = [(taken + self.added[name, part]) * (1000 if row.endswith("_ms") else 1) for taken in seconds]
            put(self.results[name], row, *size, values=values)
        return {key.split()[0] for key in times}, failures | failed

    def start_up(self, names: list[str]) -> tuple[set[str], dict[str, str]]:
        """Fresh processes; those of diffusers take so long that there is one only."""
        failures = {}
        for name in names:
            count = LONG if name in OURS and not self.setup.smoke else 1
            runs, reasons = zip(*(attempt(self.fresh_process, name) for _ in range(count)), strict=True)
            peaks = [run["peak_gib"] for run in runs if run]
            if peaks:
                for row in ("start_up_s", "load_s", "load_host_gib"):
                    put(self.results[name], row, values=[run[row] for run in runs if run])
                self.results[name]["peak_gib"] = {key: max(peak[key] for peak in peaks) for key in peaks[0]}
            else:
                failures[name] = reasons[0]
        return set(names) - failures.keys(), failures

    def fresh_process(self, name: str) -> dict[str, Any]:
        self.in_time()
        began = time.time()
        command = [sys.executable, __file__, "--child", name, json.dumps(asdict(self.setup))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "-").splitlines()[-1])
        report = json.loads(done.stdout.splitlines()[-1])
        return report | {"start_up_s": report["finished"] - began + report["added_s"]}

    def agreement(self, names: list[str]) -> tuple[set[str], dict[str, str]]:
        """In float32, without TF32, and in the dtype of this run."""
        if "diffusers" not in self.names:
            return set(), dict.fromkeys(names, "needs diffusers in the same run")
        done, failures = set(), {}
        for dtype in dict.fromkeys(["float32", self.setup.dtype]) if names else ():
            found, failure = attempt(self.agree, replace(self.setup, dtype=dtype))
            if failure:
                failures[f"p2pz {dtype}"] = failure
            else:
                self.results["agreement"][dtype] = found
                done = {"p2pz"}
        return done, failures

    def agree(self, setup: Setup) -> dict[str, float]:
        """p2pz and diffusers from the same image latents, states and offsets."""
        self.in_time()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            ours, theirs = P2pz(setup), Diffusers(setup)
            start, contexts = ours.encode()().to(setup.precision), ours.contexts

            def edit(noise: Tensor, settings: Settings = ours.settings) -> tuple[Tensor, Tensor]:
                return edit_latents(ours.model, noise.float(), contexts[:1], None, contexts[1:], settings, False)

            their_noise = theirs.inverted(start, prompt_embeds=contexts[:1])
            our_noise = invert_latents(ours.model, start.float(), contexts[:1], ours.settings, seeded(), False)[-1]
            their_edit = theirs.edited_latents(their_noise.clone(), contexts)
            our_edit, reference = edit(their_noise)
            unguided, _ = edit(their_noise, replace(ours.settings, xa_guidance=0.0))
            return {
                "inversion": relative_error(our_noise, their_noise),
                "edit_from_the_same_noise": relative_error(our_edit, their_edit),
                "inversion_and_edit": relative_error(edit(our_noise)[0], their_edit),
                "for_scale_edit_from_reference": relative_error(our_edit, reference),
                "for_scale_edit_from_unguided_edit": relative_error(our_edit, unguided),
            }


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative norm of the difference. Raises ValueError if it is no number."""
    error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    if not math.isfinite(error):
        raise ValueError(f"the relative difference of the latents is {error}")
    return error


def host_peak() -> int:
    """Bytes of host memory that this process had at most."""
    with contextlib.suppress(OSError):  # getrusage would count what the process that started this one had
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def child(name: str, setup: Setup) -> None:
    """Loading, and the first edit of a fresh process: when it was there, how long others take, and how much memory."""
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401 - imports are no part of loading

    if name not in OURS:
        from diffusers.pipelines.deprecated.stable_diffusion_variants import (
            pipeline_stable_diffusion_pix2pix_zero,  # noqa: F401
        )
    torch.zeros(1, device=setup.device)  # nor is the start of CUDA
    synchronise(setup.device)
    began = time.perf_counter()
    contender = make(name, setup)
    synchronise(setup.device)
    report = {"load_s": time.perf_counter() - began, "load_host_gib": host_peak() / 2**30}
    call = contender.total()
    call()
    synchronise(setup.device)
    report["finished"] = time.time()
    if name in OURS:
        call()  # takes a little more memory than the first
        synchronise(setup.device)
    peak = {"host": host_peak()}
    if setup.device != "cpu":
        peak |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    report["added_s"] = contender.added_s if name == "compiled" else 0
    print(json.dumps(report | {"peak_gib": {key: value / 2**30 for key, value in peak.items()}}))


# Rows.


def limits(setup: Setup) -> dict[str, float]:
    """Rate of a large matrix product; operations of a UNet forward for one image, and of that with its gradient."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    side = 128 if setup.device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=setup.device, dtype=setup.precision) for _ in range(2))
    times, _ = time_in_turn({"": lambda: a @ b}, False, setup, math.inf)
    config = setup.config("unet")
    with torch.device("meta"), torch.enable_grad():
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
        latents = torch.empty(1, 4, setup.sides[0], setup.sides[0], requires_grad=True)
        contexts, timestep = torch.empty(1, 77, config["cross_attention_dim"]), torch.tensor(TIMESTEP)
        width = UNetConfig.from_json(config).pooled_channels
        told = {"text_embeds": torch.empty(1, width), "time_ids": torch.empty(1, SIZE_NUMBERS)} if width else {}
        with FlopCounterMode(display=False) as forward:
            noise = unet(latents, timestep, contexts, added_cond_kwargs=told).sample
        with FlopCounterMode(display=False) as backward:
            noise.sum().backward()
    found = {"matrix_flop_per_s": 2 * side**3 / median(times[""]), "forward_flop": forward.get_total_flops()}
    return found | {"forward_and_gradient_flop": forward.get_total_flops() + backward.get_total_flops()}


def weights_gib(setup: Setup) -> float:
    """What the weights take on disk."""
    checkpoint = open_checkpoint(setup.folder)
    parts = checkpoint.unet, checkpoint.vae, checkpoint.text_encoder, checkpoint.text_encoder_2
    return sum(tensor.nbytes for part in parts if part for tensor in part.tensors.values()) / 2**30


def put(rows: dict[str, Any], row: str, key: str | None = None, *, values: list[float]) -> None:
    """The median into the rows of a contender, the quartiles into its `spread`."""
    quarters = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    spread = {"q1": quarters[0], "q3": quarters[2], "repeats": len(values)}
    if key is None:
        rows[row], rows["spread"][row] = median(values), spread
    else:
        rows.setdefault(row, {})[key] = median(values)
        rows["spread"].setdefault(row, {})[key] = spread


def derive(results: dict[str, Any]) -> None:
    """Rows that follow from others."""
    limit = results["limit"]
    rate, forward = limit["matrix_flop_per_s"], limit["forward_flop"]
    for name in CONTENDERS:
        rows = results[name]
        if "total_s" in rows:
            counts = ("1", "4", "8") if name in ("diffusers", "compiled") else ("1",)
            rows.setdefault("images_per_second", {}).update(dict.fromkeys(counts, 1 / rows["total_s"]))
        if "regulariser_added_s" in rows["facts"] and "regulariser" not in rows["runs"]:
            rows["regulariser_ms"] = 1000 * rows["facts"]["regulariser_added_s"] / results["sizes"]["steps"]
        work = {f"unet {batch}": (int(batch) * forward, ms) for batch, ms in rows.get("unet_ms", {}).items()}
        if "guided_step_ms" in rows:
            followed = 1 if name == "p2pz_default" else 2
            flop = 2 * forward + followed * limit["forward_and_gradient_flop"]
            work["guided step"] = flop, rows["guided_step_ms"]
        if work:
            rows["fraction_of_limit"] = {key: flop / rate / (ms / 1000) for key, (flop, ms) in work.items()}


# Output.


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def flat(rows: dict[str, Any], row: str) -> dict[str, Any]:
    """A row of a contender, or its spread, by label."""
    value = rows.get(row, {})
    if isinstance(value, dict) and "q1" not in value:
        return {f"{row} {key}": entry for key, entry in value.items()}
    return {row: value}


def line(results: dict[str, Any], part: str) -> str:
    """A part in a line."""
    if part == "agreement":
        found = results["agreement"]
        return "; ".join(f"{dtype} {k} {number(v)}" for dtype, errors in found.items() for k, v in errors.items())
    found = {name: flat(results[name], PARTS[part].row) for name in CONTENDERS}
    return "; ".join(f"{name} {k} {number(v)}" for name, values in found.items() for k, v in values.items())


def markdown(results: dict[str, Any]) -> str:
    """All results as a page."""
    heads = [*CONTENDERS, "diffusers / p2pz", "compiled / p2pz"]
    rows = [["", *heads], ["---"] * (len(heads) + 1)]
    for row in ROWS:
        values = {name: flat(results[name], row) for name in CONTENDERS}
        spreads = {name: flat(results[name]["spread"], row) for name in CONTENDERS}
        for label in dict.fromkeys(label for found in values.values() for label in found):
            rows.append([label])
            for name in CONTENDERS:
                spread = spreads[name].get(label)
                quartiles = f" ({number(spread['q1'])}-{number(spread['q3'])})" if spread else ""
                rows[-1].append(number(values[name].get(label)) + quartiles)
            ours = values["p2pz"].get(label)
            for name in ("diffusers", "compiled"):
                theirs = values[name].get(label) if ours and row != "fraction_of_limit" else None
                ratio = None if theirs is None else ours / theirs if row == "images_per_second" else theirs / ours
                star = "\\*" if ratio and not same_run(results, label, name) else ""
                rows[-1].append(number(ratio) + star)
    limit, agreement = results["limit"], results["agreement"]
    lines = ["# Whole edits", "", *(f"{key}: {json.dumps(results[key])}" for key in FACTS), ""]
    lines = [text + "  " if text and text[0] != "#" else text for text in lines]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    lines += ["", "\\* the two were not timed in the same run.", ""]
    lines += [f"A UNet forward is {limit['forward_flop'] / 1e12:.4g} TFLOP for an image, with its input gradient "]
    lines[-1] += f"{limit['forward_and_gradient_flop'] / 1e12:.4g}; a matrix product reaches "
    lines[-1] += f"{limit['matrix_flop_per_s'] / 1e12:.4g} TFLOP/s. "
    lines[-1] += f"The weights take {results['weights_gib']:.4g} GiB on disk."
    lines += ["", "## Agreement", ""]
    lines += [f"- {dtype}, {key.replace('_', ' ')}: {v:.2g}" for dtype, d in agreement.items() for key, v in d.items()]
    lines += ["", "## How to read the table", "", __doc__.split("\n\n", 2)[2]]
    lines += ["## Runs", ""]
    runs: dict[str, list[str]] = {}
    for name in CONTENDERS:
        lines += [f"- {name}: {json.dumps(results[name]['facts'])}"] if results[name]["facts"] else []
        for part, facts in results[name]["runs"].items():
            runs.setdefault(f"- {facts['date']}, `{facts['command']}`", []).append(f"{name} {part}")
    lines += [f"{run}: {', '.join(measured)}" for run, measured in runs.items()]
    if results["skipped"]:
        lines += ["", "## Not measured", "", *(f"- {key}: {why}" for key, why in results["skipped"].items())]
    return "\n".join(lines).rstrip() + "\n"


def same_run(results: dict[str, Any], label: str, name: str) -> bool:
    """Whether what a label says of a contender was timed in the run in which p2pz's was."""
    row, *size = label.split()
    parts = dict.fromkeys(("peak_gib", "load_s", "load_host_gib"), "start_up")
    part = ours = parts.get(row) or next(part for part in PARTS if PARTS[part].row == row)
    if row == "images_per_second":  # the others edit one after another
        part, ours = "total", "total" if size == ["1"] else "batches"
    runs = [results[who]["runs"].get(part, {}).get("date") for who, part in (("p2pz", ours), (name, part))]
    return runs[0] == runs[1]


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars on a logarithmic scale."""
    bars = []
    for row, title in (("total_s", "whole edit"), ("invert_s", "inversion"), ("guided_step_ms", "guided step")):
        found = [(name, results[name][row]) for name in CONTENDERS if row in results[name]]
        bars += [(title, None)] * bool(found) + [(name, (value, row.split("_")[-1])) for name, value in found]
    values = [entry[0] / (1000 if entry[1] == "ms" else 1) for _, entry in bars if entry]
    if not values:
        return
    lowest, highest = min(values) / 2, max(values)
    picture = Image.new("RGB", (1200, 60 + 34 * len(bars)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    colours = dict(zip(CONTENDERS, ("#d1495b", "#e8a0aa", "#5b7c99", "#9fb4c7"), strict=True))
    draw.text((20, 16), f"{results['device']['name']}, {results['sizes']['shapes']}; logarithmic scale", "black", font)
    for i, (label, entry) in enumerate(bars):
        y = 56 + 34 * i
        draw.text((20 if entry is None else 50, y), label, "black", font)
        if entry:
            seconds = entry[0] / (1000 if entry[1] == "ms" else 1)
            length = 820 * math.log(seconds / lowest) / math.log(highest / lowest)
            draw.rectangle((220, y, 220 + length, y + 24), colours[label])
            draw.text((228 + length, y), f"{number(entry[0])} {entry[1]}", "black", font)
    with atomic_path(path) as temporary:
        picture.save(temporary)


def write(results: dict[str, Any], path: Path) -> None:
    """The JSON file, and beside it the page and (not for the bundled model) the plot; each whole or not at all."""
    for target, text in ((path, json.dumps(results, indent=1) + "\n"), (path.with_suffix(".md"), markdown(results))):
        with atomic_path(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if results["sizes"]["shapes"] != "mini":
        plot(results, path.with_suffix(".png"))


# Running.


FACTS = ["device", "versions", "sizes"]  # results of runs that differ in these are not mixed


def new_results(setup: Setup, shapes: str) -> dict[str, Any]:
    """Facts of this run, and no results."""
    device = {"name": f"{platform.machine()} CPU, {torch.get_num_threads()} threads", "driver": None}
    if setup.device != "cpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver, _ = attempt(lambda: subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0])
        device = {"name": torch.cuda.get_device_name(), "driver": driver}
    packages = {name: attempt(importlib.metadata.version, name)[0] for name in ("triton", "diffusers", "transformers")}
    versions = {"p2pz": p2pz.__version__, "torch": torch.__version__, "python": platform.python_version()} | packages
    versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    sizes = {"shapes": shapes, "picture": setup.sides[1], "latents": setup.sides[0], "steps": setup.steps}
    sizes |= {"dtype": setup.dtype, "prediction": setup.prediction, "guidance": GUIDANCE, "xa_guidance": setup.strength}
    facts = {"device": device, "versions": versions, "sizes": sizes, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    facts |= {"command": " ".join(["python", *sys.argv])}
    rows = {name: {"facts": {}, "spread": {}, "runs": {}} for name in CONTENDERS}
    return facts | rows | {"limit": {}, "agreement": {}, "skipped": {}}


def with_earlier(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """Together with the results in a file, if they are from the same device, software and sizes."""
    earlier, failure = attempt(lambda: json.loads(path.read_text()))
    if failure and path.exists():
        print(f"{path} cannot be read and is replaced")
    if failure:
        return results
    different = [key for key in FACTS if earlier.get(key) != results[key]]
    if different:
        print(f"{path} is from another run: its {', '.join(different)} differ; it is replaced")
        return results
    return results | earlier | {key: results[key] for key in ("date", "command")}


def chosen(given: list[str] | None, names: list[str], option: str) -> list[str]:
    """Names in their own order; exits if one is unknown."""
    unknown = [name for name in given or () if name not in names]
    if unknown:
        sys.exit(f"bench/edit_speed.py: {option} {' '.join(unknown)} is not one of {', '.join(names)}")
    return [name for name in names if name in (given or names)]


def main() -> None:
    began = time.monotonic()
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], Setup(**json.loads(sys.argv[3])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for edit_speed.json, .md and .png")
    parser.add_argument(
        "--shapes", choices=["sd15", "sd21", "sdxl"], default="sd15", help="of random weights (%(default)s)"
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint; its name is added to the files'")
    parser.add_argument("--checkpoint-dir", type=Path, metavar="FOLDER", help="keep the random weights here")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of p2pz, diffusers and compiled")
    parser.add_argument("--parts", nargs="+", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing later (default: %(default)s)")
    parser.add_argument("--compile-mode", default="default", help='or "max-autotune-no-cudagraphs"; %(default)s')
    parser.add_argument("--mini", action="store_true", help="the bundled model on the CPU: edit_speed_cpu.json and .md")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and 3 steps on the CPU, to test the script")
    args = parser.parse_args()
    parts = chosen(args.parts or (MINI_PARTS if args.mini else None), list(PARTS), "--parts")
    only = args.only or (["p2pz", "diffusers"] if args.mini else ["p2pz"] if args.shapes == "sdxl" else None)
    only = chosen(only, ["p2pz", "diffusers", "compiled"], "--only")
    names = [name for name in CONTENDERS if name.split("_")[0] in only]
    cpu = args.smoke or args.mini
    if not cpu and not torch.cuda.is_available():
        sys.exit("bench/edit_speed.py needs a CUDA GPU; --mini and --smoke run on a CPU")
    if args.model and not (args.model / "unet" / "config.json").is_file():
        sys.exit(f"bench/edit_speed.py: --model {args.model} is no folder in the diffusers layout")
    shapes = "mini" if args.mini else "smoke" if args.smoke else args.model.name if args.model else args.shapes
    endings = {"mini": "_cpu", "smoke": "", "sd15": ""}
    args.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = MINI_FOLDER if args.mini else args.model or args.checkpoint_dir
        folder = folder or stack.enter_context(tempfile.TemporaryDirectory())
        how = ("cpu", "float32", 3 if args.smoke else 50) if cpu else ("cuda", "float16")
        setup = Setup(str(folder), *how, smoke=args.smoke, compile_mode=args.compile_mode)
        if shapes in SHAPES:
            write_checkpoint(SHAPES[shapes], setup)
        path = args.out / f"edit_speed{endings.get(shapes, '_' + shapes)}.json"
        results = with_earlier(new_results(setup, shapes), path)
        Bench(setup, names, results, path, began + args.seconds).run(parts)


if __name__ == "__main__":
    main()
