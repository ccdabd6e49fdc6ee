"""Train the mini model: a small Stable Diffusion for the mini world, from nothing, in about 20 minutes of one GPU.

    python weights/recipe/train.py all --out /tmp/mini --to weights/mini --compile

Every stage is a subcommand and a process of its own; they share the folder `--out` and wait for each other through
`NAME.done` files. Trainings are bounded in time: the learning rate is a warm-up over iterations times a cosine over
elapsed / `--minutes`. Randomness: pictures are drawn from `default_rng((SEED, split, chunk))`; each stage seeds torch
with SEED + its own number + its rank.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from p2pz import schedule, unet, vae
from p2pz.clip import IMAGE_MEAN, IMAGE_STD
from p2pz.weights import mini_world as world
from p2pz.weights.judge import Judge, load_judge

SEED = 2023
CHUNK = 128  # pictures drawn from one seed
CAPTIONS = 4  # random captions per picture
TOKENS = 77
FIELDS = {
    "animal": world.ANIMALS, "fur": world.FURS, "place": world.PLACES,
    "thing": world.THINGS, "accessory": world.ACCESSORIES, "style": world.STYLES,
}  # fmt: skip
NAMES = tuple(FIELDS)
ZEBRA = world.ANIMALS.index("zebra")  # its fur has no colour
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


# Stages: files, logs, waiting ----------------------------------------------------------------------------------------
class Stage:
    """What every stage shares: its folder, its device, its log and the wait for other stages."""

    def __init__(self, args: argparse.Namespace, number: int):
        self.name, self.out = args.stage, args.out
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() and not args.cpu else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.started, self.parent = time.monotonic(), os.getppid()
        self.after = [name for name in args.after.split(",") if name]
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(SEED + number)  # the same initial weights on every rank
        self.random = torch.Generator(self.device).manual_seed(SEED + number + 100 * (1 + self.rank))
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def log(self, **values: Any) -> None:
        """Append one JSON line to `log.jsonl` (rank 0 only) and print it."""
        if self.rank:
            return
        device = torch.cuda.get_device_name() if self.cuda else "cpu"
        head = {"stage": self.name, "seconds": round(time.monotonic() - self.started, 2)}
        line = json.dumps(head | values | {"device": device, "torch": torch.__version__})
        print(line, flush=True)
        with open(self.out / "log.jsonl", "a") as file:
            file.write(line + "\n")

    def check_parent(self) -> None:
        """End with the process that started this one, so that no stage is left behind."""
        if os.getppid() != self.parent:
            raise SystemExit("the process that started this stage has ended")

    def wait(self) -> None:
        """Sleep until every stage named by `--after` has finished."""
        for name in self.after:
            while not (self.out / f"{name}.done").exists():
                self.check_parent()
                time.sleep(0.1)

    def done(self, name: str | None = None) -> None:
        if self.rank == 0:
            (self.out / f"{name or self.name}.done").touch()

    def save(self, tensors: dict[str, Tensor], path: str, metadata: dict[str, str] | None = None) -> None:
        """Write float32 tensors to `out/path` (rank 0 only)."""
        if self.rank == 0:
            (self.out / path).parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(tensors, self.out / path, metadata={"format": "pt"} | (metadata or {}))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def resident(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a memory-mapped array to the device, piece by piece."""
    dtype = torch.from_numpy(np.array(array[:1])).dtype
    tensor = torch.empty(array.shape, dtype=dtype, device=device)
    for start in range(0, len(array), 8192):
        tensor[start : start + 8192] = torch.from_numpy(np.array(array[start : start + 8192])).to(device)
    return tensor


def to_images(pixels: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` to channels-last float `[B, 3, H, W]` in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 `[B, H, W, 3]`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


# Training: a time box and an optimiser -------------------------------------------------------------------------------
class TimeBox:
    """Iterate until `minutes` of training are over; yields `(iteration, elapsed / minutes)`.

    Clock and loss are read once in `every` iterations, the only synchronisations with the device. Rank 0's clock
    decides for all ranks. `pause_after` ends this run, not the box, that many minutes from now.
    """

    def __init__(self, stage: Stage, minutes: float, batch: int, elapsed: float = 0.0, iteration: int = 0,
                 pause_after: float | None = None):  # fmt: skip
        self.stage, self.total, self.batch = stage, 60 * minutes, batch * stage.ranks
        self.elapsed, self.iteration, self.loss = elapsed, iteration, None
        self.pause_at = math.inf if pause_after is None else elapsed + 60 * pause_after
        self.every = 20 if stage.cuda else 1

    @property
    def over(self) -> bool:
        return self.elapsed >= self.total

    def __iter__(self) -> Iterator[tuple[int, float]]:
        began, logged, mark = time.monotonic() - self.elapsed, -math.inf, (self.iteration, self.elapsed)
        while True:
            if self.iteration % self.every == 0:
                self.stage.check_parent()
                loss = float(self.loss) if self.loss is not None else None  # waits for the device
                if loss is not None and not math.isfinite(loss):
                    raise FloatingPointError(f"{self.stage.name}: loss is {loss} at iteration {self.iteration}")
                self.elapsed = agree(time.monotonic() - began, self.stage)
                ends = self.over or self.elapsed >= self.pause_at
                if loss is not None and (ends or self.elapsed - logged >= 10):
                    rate = (self.iteration - mark[0]) * self.batch / (self.elapsed - mark[1])
                    self.stage.log(training=round(self.elapsed, 2), of=self.total, iteration=self.iteration,
                                   loss=round(loss, 5), images_per_second=round(rate, 1))  # fmt: skip
                    logged, mark = self.elapsed, (self.iteration, self.elapsed)
                if ends:
                    return
            yield self.iteration, min(self.elapsed / self.total, 1.0)
            self.iteration += 1


def agree(value: float, stage: Stage) -> float:
    """Rank 0's value, on every rank."""
    if stage.ranks == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=stage.device)
    dist.broadcast(shared, 0)
    return shared.item()


class Optimizer:
    """AdamW on gradients that live in one flat buffer: averaged over ranks, clipped to norm 1; keeps a moving average.

    Args:
        model: its parameters, in float32, are trained.
        peak, warmup: learning rate after `warmup` iterations, from where a cosine takes it to 1 % of that.
        decay: weight decay of matrices and kernels; biases and norms have none.
        average: decay of the moving average of the weights (ramped up with the iterations); None for none.
    """

    def __init__(self, model: nn.Module, stage: Stage, peak: float, warmup: int, decay: float, average: float | None):
        self.stage, self.peak, self.warmup, self.average = stage, peak, warmup, average
        self.parameters = list(model.parameters())
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=stage.device)
        offset = 0
        for p in self.parameters:  # gradients are views; backward adds into them
            p.grad = self.flat.as_strided(p.shape, p.stride(), offset)
            offset += p.numel()
        groups = [{"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": decay},
                  {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
        self.adam = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), fused=stage.cuda)
        self.ema = [p.detach().clone() for p in self.parameters] if average else None

    @torch.no_grad()
    def synchronise(self) -> None:
        """Give every rank the initial weights of rank 0."""
        if self.stage.ranks > 1:
            weights = torch.cat([p.flatten() for p in self.parameters])
            dist.broadcast(weights, 0)
            for p, values in zip(self.parameters, weights.split([p.numel() for p in self.parameters]), strict=True):
                p.copy_(values.view(p.shape))
            for average, p in zip(self.ema or [], self.parameters, strict=False):
                average.copy_(p)

    @torch.no_grad()
    def step(self, iteration: int, progress: float) -> None:
        """Use the gradients that backward left, then clear them."""
        if self.stage.ranks > 1:
            dist.all_reduce(self.flat)
            self.flat.div_(self.stage.ranks)
        self.flat.mul_(self.flat.norm().clamp(min=1.0).reciprocal())
        rate = self.peak * min(1.0, (iteration + 1) / self.warmup) * (0.505 + 0.495 * math.cos(math.pi * progress))
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.flat.zero_()
        if self.ema is not None:
            weight = 1 - min(self.average, (1 + iteration) / (10 + iteration))
            torch._foreach_lerp_(self.ema, self.parameters, weight)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the moving average into the model."""
        for p, average in zip(self.parameters, self.ema, strict=True):
            p.copy_(average)

    def state(self) -> dict[str, Any]:
        return {"weights": [p.detach() for p in self.parameters], "ema": self.ema, "adam": self.adam.state_dict()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        for p, value in zip(self.parameters, state["weights"], strict=True):
            p.copy_(value)
        for average, value in zip(self.ema, state["ema"], strict=True):
            average.copy_(value)
        self.adam.load_state_dict(state["adam"])


def compiled(function: Callable[..., Tensor], example: tuple, stage: Stage, optimizer: Optimizer, wanted: bool):
    """Run `function(*example).backward()` once, compiled if wanted, so that the wait for data hides the compilation.

    Falls back to the plain function, and says so, where compilation fails.
    """
    chosen = torch.compile(function, dynamic=False) if wanted else function
    try:
        chosen(*example).backward()
    except Exception as problem:
        if not wanted:
            raise
        stage.log(warning=f"not compiled: {type(problem).__name__}: {problem}"[:500])
        chosen = function
        chosen(*example).backward()
    optimizer.flat.zero_()
    if stage.cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    stage.log(ready=True, compiled=chosen is not function)
    return chosen


# The world -----------------------------------------------------------------------------------------------------------
def draw_chunk(job: tuple[Path, int, int, int, bool]) -> tuple[int, list[list[str]], list[list[int]]]:
    """Draw pictures `start` to `stop` into the memory-mapped file; returns their captions (full one last), labels."""
    path, split, start, stop, held_out = job
    rng = np.random.default_rng((SEED, split, start // CHUNK))
    images = np.lib.format.open_memmap(path, mode="r+")
    captions, labels = [], []
    for i in range(start, stop):
        scene = world.random_scene(rng)
        while world.is_held_out(scene) != held_out:
            scene = world.random_scene(rng)
        images[i] = world.render(scene)
        captions.append([world.random_caption(scene, rng) for _ in range(CAPTIONS)] + [world.caption(scene)])
        labels.append([FIELDS[name].index(getattr(scene, name)) for name in NAMES])
    return start, captions, labels


def told(text: str) -> list[int]:
    """What a caption says of each field: class index, or -1. Every accessory is told, so silence means none."""
    words = text.split()

    def spoken(phrases: dict[str, str]) -> int:
        return next((i for i, phrase in enumerate(phrases.values()) if phrase and f" {phrase} " in f" {text} "), -1)

    assert list(world.THING_PHRASES) == list(world.THINGS) and list(world.STYLE_PHRASES) == list(world.STYLES)
    assert list(world.PLACE_PHRASES) == list(world.PLACES)
    assert list(world.ACCESSORY_PHRASES) == list(world.ACCESSORIES) and world.ACCESSORIES[0] == "none"
    return [
        next(i for i, name in enumerate(world.ANIMALS) if name in words),
        next((i for i, name in enumerate(world.FURS) if name in words), -1),
        spoken(world.PLACE_PHRASES), spoken(world.THING_PHRASES), max(spoken(world.ACCESSORY_PHRASES), 0),
        spoken(world.STYLE_PHRASES),
    ]  # fmt: skip


def stage_world(args: argparse.Namespace) -> None:
    """Draw training pictures (no held-out combination) and held-out ones; write captions, labels and token ids.

    Files: `{train,test}_images.npy` uint8 [N, 128, 128, 3], `_labels.npy` int8 [N, 6], `_captions.npy` int32 [N, 4 + 1]
    (rows of `captions.json`; the last column is the full caption), `told.npy` int8 [U, 6], `tokens.npy` int64 [U, 77].
    The last caption is the empty one.
    """
    stage = Stage(args, 0)
    jobs, sizes = [], {"train": args.scenes, "test": args.held_out}
    for split, (name, count) in enumerate(sizes.items()):
        path = stage.out / f"{name}_images.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, world.SIZE, world.SIZE, 3))
        jobs += [(path, split, i, min(i + CHUNK, count), split == 1) for i in range(0, count, CHUNK)]
    texts: dict[str, int] = {}
    rows = {name: np.zeros((count, CAPTIONS + 1), np.int32) for name, count in sizes.items()}
    labels = {name: np.zeros((count, len(NAMES)), np.int8) for name, count in sizes.items()}
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        for job, (start, captions, classes) in zip(jobs, pool.imap(draw_chunk, jobs), strict=True):
            name = list(sizes)[job[1]]
            rows[name][start : start + len(captions)] = [[texts.setdefault(t, len(texts)) for t in c] for c in captions]
            labels[name][start : start + len(classes)] = classes
            if start % (200 * CHUNK) == 0:
                stage.log(split=name, drawn=start + len(classes))
    for name in sizes:
        np.save(stage.out / f"{name}_captions.npy", rows[name])
        np.save(stage.out / f"{name}_labels.npy", labels[name])
    stage.log(pictures=sizes, unique_captions=len(texts))
    stage.done("images")

    table = list(texts)
    for name in sizes:  # a caption must fit the picture it came from
        said = np.array([told(text) for text in table], np.int8)[rows[name][:1000, 0]]
        assert ((said == -1) | (said == labels[name][:1000])).all(), "captions and labels disagree"
    np.save(stage.out / "told.npy", np.array([told(text) for text in table], np.int8))
    table.append("")
    write_json(stage.out / "captions.json", table)
    stage.wait()  # for the tokenizer
    np.save(stage.out / "tokens.npy", token_ids(load_tokenizer(stage.out / "tokenizer"), table))
    stage.log(captions=len(table))
    stage.done()


# The tokenizer -------------------------------------------------------------------------------------------------------
def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in CLIP's (and GPT-2's) byte-level encoding."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    symbols = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [symbols[b] for b in range(256)]


def merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: join the adjacent pair of lowest rank until none is known."""
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(pieces)) if pair in ranks]
        if not pairs:
            return pieces
        i = min(pairs)[1]
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def stage_tokenizer(args: argparse.Namespace) -> None:
    """Build the smallest CLIP tokenizer that knows every word of the world as one token and can spell everything.

    Words get their merges in order of length. A later merge ranks behind an earlier one, so it cannot disturb an
    earlier word.
    """
    stage = Stage(args, 1)
    folder = stage.out / "tokenizer"
    folder.mkdir(exist_ok=True)
    words = sorted({part for word in world.VOCABULARY for part in re.findall(r"[a-z]+", word.lower())})
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted(words, key=lambda word: (len(word), word)):
        pieces = merge([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys(a + b for a, b in ranks), BOS, EOS]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in ranks))
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True,
        "add_prefix_space": False, "errors": "replace", "clean_up_tokenization_spaces": False,
    })  # fmt: skip

    tokenizer, last = load_tokenizer(folder), len(tokens) - 1
    for word in words:
        for text in (word, f"{word},", f"{word.upper()}. {word}"):
            ids = tokenizer(text).input_ids
            assert ids[0] == last - 1 and ids[-1] == last and ids[1] == tokens.index(word + "</w>"), (text, ids)
            assert len(ids) == 2 + len(text.replace(",", " ,").replace(".", " .").split()), (text, ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (last - 1, last, last)
    assert tokenizer.decode(tokenizer("Ünï 7 qux!").input_ids, skip_special_tokens=True) == "ünï 7 qux !"
    stage.log(tokens=len(tokens), words=len(words))
    stage.done()


def load_tokenizer(folder: Path):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def token_ids(tokenizer, texts: list[str]) -> np.ndarray:
    """int64 `[len(texts), 77]`, padded as a Stable Diffusion pipeline pads."""
    pieces = [texts[i : i + 4096] for i in range(0, len(texts), 4096)]
    settings = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "np"}
    return np.concatenate([tokenizer(piece, **settings).input_ids for piece in pieces]).astype(np.int64)


# CLIP ----------------------------------------------------------------------------------------------------------------
def new_clip(vocabulary: int):
    from transformers import CLIPConfig, CLIPModel

    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    shared = {"num_attention_heads": 4, "intermediate_size": 512, "hidden_act": "quick_gelu", "projection_dim": 128}
    text = {"vocab_size": vocabulary, "hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": TOKENS}
    vision = {"hidden_size": 192, "num_hidden_layers": 5, "image_size": world.SIZE, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text | shared | ends, vision_config=vision | shared, projection_dim=128))


def load_clip(folder: Path, device: torch.device):
    """The CLIP of a training folder, frozen."""
    model = new_clip(len(read_json(folder / "tokenizer/vocab.json")))
    model.load_state_dict(load_file(folder / "clip/model.safetensors"), strict=False)
    return model.to(device).eval().requires_grad_(False)


def image_features(model, images: Tensor) -> Tensor:
    """Unit vectors `[B, 128]` of images in [-1, 1]."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    pooled = model.vision_model(pixel_values=(images / 2 + 0.5 - mean) / std).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_features(model, ids: Tensor) -> Tensor:
    """Unit vectors `[B, 128]` of token ids `[B, 77]`."""
    return F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output).float(), dim=-1)


def augment(images: Tensor, random: torch.Generator, strong: bool) -> Tensor:
    """Change brightness and contrast, blur and add noise; if `strong`, also shift and cut out a rectangle."""
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1, 1)), device=device, generator=random)

    kernel = torch.tensor([1.0, 2.0, 1.0], device=device)
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    if strong:
        shift = torch.eye(2, 3, device=device).repeat(count, 1, 1)
        shift[:, :, 2] = uniform(-0.1, 0.1, 2)
        grid = F.affine_grid(shift, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    images = images + (blurred - images) * uniform(-1.0, 1.5).clamp(0, 1)
    images = images * uniform(0.85, 1.15) + uniform(-0.1, 0.1)
    noise = torch.randn(images.shape, device=device, generator=random)
    images = images + noise * uniform(-0.05, 0.10 if strong else 0.06).clamp(min=0)
    if strong:
        place = torch.linspace(-1, 1, world.SIZE, device=device)
        x, y, width, height = (uniform(-1, 1), uniform(-1, 1), uniform(-0.2, 0.2), uniform(-0.2, 0.2))
        hole = ((place - x).abs() < width) & ((place[:, None] - y).abs() < height)  # a quarter of them has one
        images = torch.where(hole, uniform(-1, 1), images)
    return images


def clip_loss(model, images: Tensor, ids: Tensor, said: Tensor, labels: Tensor) -> Tensor:
    """Symmetric contrastive loss; a caption is not told apart from other pictures of the batch that it fits.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), figure 3.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        pictures, texts = image_features(model, images), text_features(model, ids)
    with torch.autocast(images.device.type, enabled=False):
        logits = model.logit_scale.float().exp().clamp(max=100) * texts @ pictures.T  # [text, picture]
        clashes = ((said[:, None] >= 0) & (said[:, None] != labels[None])).any(-1)
        own = torch.eye(len(ids), dtype=torch.bool, device=ids.device)
        logits = logits.masked_fill(~clashes & ~own, -torch.inf)
        target = torch.arange(len(ids), device=ids.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.inference_mode()
def zero_shot(model, images: Tensor, said: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Classify images in [-1, 1] by the mean text feature of all captions that tell each class.

    Returns:
        Field name -> class index `[B]`. A class that no caption tells is never chosen.
    """
    texts = torch.cat([text_features(model, ids[i : i + 2048]) for i in range(0, len(said), 2048)])[: len(said)]
    pictures = torch.cat([image_features(model, images[i : i + 512]) for i in range(0, len(images), 512)])
    winners = {}
    for field, name in enumerate(NAMES):
        chosen = torch.stack([(said[:, field] == i).float() for i in range(len(FIELDS[name]))])
        classes = F.normalize(chosen @ texts, dim=-1)
        scores = (pictures @ classes.T).masked_fill(chosen.sum(1) == 0, -torch.inf)
        winners[name] = scores.argmax(1)
    return winners


def accuracies(winners: dict[str, Tensor], labels: Tensor, silent: bool = False) -> dict[str, float]:
    """Share of right answers per field. Zebras have no fur; `silent` leaves out pictures without a thing."""
    shares = {}
    for field, name in enumerate(NAMES):
        keep = torch.ones_like(labels[:, 0], dtype=torch.bool)
        if name == "fur":
            keep = labels[:, 0] != ZEBRA
        elif name == "thing" and silent:
            keep = labels[:, field] != 0
        right = (winners[name] == labels[:, field])[keep]
        shares[name] = round(right.float().mean().item(), 4) if len(right) else float("nan")
    return shares


def load_split(stage: Stage, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures uint8 [N, 128, 128, 3], labels int64 [N, 6] and caption rows int64 [N, 5] on the device."""
    arrays = [np.load(stage.out / f"{name}_{part}.npy", mmap_mode="r") for part in ("images", "labels", "captions")]
    pixels, labels, rows = (resident(array, stage.device) for array in arrays)
    return pixels, labels.long(), rows.long()


def stage_clip(args: argparse.Namespace) -> None:
    """Train image and text encoder on pictures and captions; report zero-shot accuracies on held-out pictures."""
    stage, batch = Stage(args, 2), args.batch or 1024
    while not (stage.out / "tokenizer.done").exists():
        stage.check_parent()
        time.sleep(0.1)
    model = new_clip(len(read_json(stage.out / "tokenizer/vocab.json"))).to(stage.device)
    count = sum(p.numel() for p in model.parameters())
    assert count <= 2.9e6, f"CLIP has {count} parameters"
    optimizer = Optimizer(model, stage, args.rate or 1e-3, args.warmup or 100, 0.05, None)
    stage.wait()
    pixels, labels, rows = load_split(stage, "train")
    ids, said = (torch.from_numpy(np.load(stage.out / f"{name}.npy")).to(stage.device) for name in ("tokens", "told"))
    box = TimeBox(stage, args.minutes, batch)
    for iteration, progress in box:
        pick = torch.randint(len(pixels), (batch,), device=stage.device, generator=stage.random)
        column = torch.randint(CAPTIONS, (batch,), device=stage.device, generator=stage.random)
        text = rows[pick, column]
        images = augment(to_images(pixels[pick]), stage.random, strong=False)
        loss = clip_loss(model, images, ids[text], said[text], labels[pick])
        loss.backward()
        optimizer.step(iteration, progress)
        box.loss = loss.detach()

    model.eval()
    test, labels, _ = load_split(stage, "test")
    shares = accuracies(zero_shot(model, to_images(test), said, ids), labels, silent=True)
    stage.log(parameters=count, held_out_zero_shot=shares)
    stage.save({k: v for k, v in model.state_dict().items() if "position_ids" not in k}, "clip/model.safetensors")
    write_json(stage.out / "clip/report.json", shares)
    stage.done()


# The judge -----------------------------------------------------------------------------------------------------------
def judge_loss(model: Judge, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the fields; the fur of a zebra does not count."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        logits = model(images)
    total = images.new_zeros(())
    for field, name in enumerate(NAMES):
        losses = F.cross_entropy(logits[name].float(), labels[:, field], reduction="none")
        total = total + (losses * (labels[:, 0] != ZEBRA) if name == "fur" else losses).mean()
    return total


@torch.inference_mode()
def judge_all(model: Judge, images: Tensor) -> dict[str, Tensor]:
    """Field name -> class index `[B]`."""
    pieces = [model(images[i : i + 512]) for i in range(0, len(images), 512)]
    return {name: torch.cat([piece[name].argmax(1) for piece in pieces]) for name in NAMES}


def stage_judge(args: argparse.Namespace) -> None:
    """Train the independent classifier; report its accuracies on held-out pictures."""
    stage, batch = Stage(args, 3), args.batch or 512
    model = Judge(FIELDS).to(stage.device, memory_format=torch.channels_last)
    count = sum(p.numel() for p in model.parameters())
    optimizer = Optimizer(model, stage, args.rate or 2e-3, args.warmup or 100, 0.05, 0.995)
    stage.wait()
    pixels, labels, _ = load_split(stage, "train")
    box = TimeBox(stage, args.minutes, batch)
    for iteration, progress in box:
        pick = torch.randint(len(pixels), (batch,), device=stage.device, generator=stage.random)
        loss = judge_loss(model, augment(to_images(pixels[pick]), stage.random, strong=True), labels[pick])
        loss.backward()
        optimizer.step(iteration, progress)
        box.loss = loss.detach()

    optimizer.use_average()
    model.eval()
    test, labels, _ = load_split(stage, "test")
    shares = accuracies(judge_all(model, to_images(test)), labels)
    stage.log(parameters=count, held_out_accuracy=shares)
    stage.save(model.state_dict(), "judge/judge.safetensors", {"fields": json.dumps(FIELDS)})
    write_json(stage.out / "judge/report.json", shares)
    stage.done()


# The autoencoder -----------------------------------------------------------------------------------------------------
def vae_loss(model: vae.VAE, pixels: Tensor, noise: Tensor, late: Tensor) -> Tensor:
    """L1 + gradient L1 + squared error + a little KL; `late` (0 to 1) moves the weight to the squared error."""
    images = to_images(pixels)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        mean, log_variance = (moment.float() for moment in model.encode(images))
        error = model.decode(mean + (log_variance / 2).exp() * noise).float() - images
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / len(images)
    return (1 - late) * (error.abs().mean() + 0.5 * edges) + (2 + 18 * late) * error.square().mean() + 1e-6 * kl


@torch.inference_mode()
def reconstruction_psnr(model: vae.VAE, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean PSNR (dB) of reconstructed uint8 pictures, over all and by style."""
    values = []
    for i in range(0, len(pixels), 128):
        decoded = to_pixels(model.decode(model.encode(to_images(pixels[i : i + 128]))[0]))
        error = (decoded.float() - pixels[i : i + 128].float()).square().mean((1, 2, 3))
        values.append(10 * torch.log10(255**2 / error.clamp(min=1e-6)))
    values = torch.cat(values)
    shares = {"all": values.mean().item()}
    for i, style in enumerate(world.STYLES):
        shares[style] = values[labels[:, NAMES.index("style")] == i].mean().item()
    return {name: round(value, 2) for name, value in shares.items()}


def stage_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder, measure the scale of its latents and encode all training pictures."""
    stage, batch = Stage(args, 4), args.batch or 192
    model = vae.VAE(vae.MINI).to(stage.device, memory_format=torch.channels_last)
    count = sum(p.numel() for p in model.parameters())
    optimizer = Optimizer(model, stage, args.rate or 1e-3, args.warmup or 200, 0.01, 0.999)
    side = world.SIZE // model.config.downsampling
    shape = (batch, model.config.latent_channels, side, side)

    def loss_of(pixels: Tensor, noise: Tensor, late: Tensor) -> Tensor:
        return vae_loss(model, pixels, noise, late)

    example = torch.zeros(batch, world.SIZE, world.SIZE, 3, dtype=torch.uint8, device=stage.device)
    late = torch.zeros((), device=stage.device)
    example = (example, torch.randn(shape, device=stage.device), late)
    loss_of = compiled(loss_of, example, stage, optimizer, args.compile)
    del example
    stage.wait()
    pixels, _, _ = load_split(stage, "train")
    box = TimeBox(stage, args.minutes, batch)
    for iteration, progress in box:
        pick = torch.randint(len(pixels), (batch,), device=stage.device, generator=stage.random)
        noise = torch.randn(shape, device=stage.device, generator=stage.random)
        late.fill_(min(max((progress - 0.4) / 0.4, 0.0), 1.0))
        loss = loss_of(pixels[pick], noise, late)
        loss.backward()
        optimizer.step(iteration, progress)
        box.loss = loss.detach()

    optimizer.use_average()
    model.eval()
    test, labels, _ = load_split(stage, "test")
    psnr = reconstruction_psnr(model, test, labels)
    stage.log(parameters=count, held_out_psnr=psnr)
    scale = encode_all(stage, model, pixels)
    stage.save(model.state_dict(), "vae/model.safetensors")
    write_json(stage.out / "vae/config.json", model.config.to_json() | {"scaling_factor": scale})
    write_json(stage.out / "vae/report.json", psnr)
    stage.done()


def encode_all(stage: Stage, model: vae.VAE, pixels: Tensor, scale: float | None = None) -> float:
    """Encode all training pictures to `latents.npy` (float16, scaled); returns the scale, measured if not given."""
    side = world.SIZE // model.config.downsampling
    shape = (len(pixels), model.config.latent_channels, side, side)
    latents = np.lib.format.open_memmap(stage.out / "latents.npy", mode="w+", dtype=np.float16, shape=shape)
    with torch.inference_mode():
        if scale is None:
            first = torch.cat([model.encode(to_images(pixels[i : i + 512]))[0]
                               for i in range(0, min(len(pixels), 8192), 512)])  # fmt: skip
            scale = 1 / first.std().item()
            channels = [[round(v, 3) for v in (f(first) * scale).tolist()]
                        for f in (lambda x: x.mean((0, 2, 3)), lambda x: x.std((0, 2, 3)))]  # fmt: skip
            stage.log(scaling_factor=scale, scaled_channel_means=channels[0], scaled_channel_stds=channels[1])
        for i in range(0, len(pixels), 512):
            latents[i : i + 512] = (model.encode(to_images(pixels[i : i + 512]))[0] * scale).half().cpu().numpy()
    latents.flush()
    stage.log(encoded=len(latents))
    return scale


def stage_adopt(args: argparse.Namespace) -> None:
    """Take tokenizer, CLIP, judge and autoencoder from an exported model instead of training them; encode pictures."""
    stage, source = Stage(args, 8), args.adopt
    shutil.copytree(source / "tokenizer", stage.out / "tokenizer", dirs_exist_ok=True)
    stage.done("tokenizer")
    stage.save(exported_clip(source), "clip/model.safetensors")
    stage.save(load_file(source / "judge/judge.safetensors"), "judge/judge.safetensors", {"fields": json.dumps(FIELDS)})
    weights = load_file(source / "vae/diffusion_pytorch_model.safetensors")
    config = read_json(source / "vae/config.json")
    stage.save(weights, "vae/model.safetensors")
    write_json(stage.out / "vae/config.json", config)
    model = vae.VAE(vae.VAEConfig.from_json(config)).to(stage.device, memory_format=torch.channels_last).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    stage.wait()
    encode_all(stage, model, load_split(stage, "train")[0], model.config.scaling_factor)
    for name in ("clip", "judge", "vae"):
        stage.done(name)
    stage.done()


def exported_clip(folder: Path) -> dict[str, Tensor]:
    """All tensors of the CLIP that an exported model carries in three files."""
    files = ("text_encoder/model", "clip/model", "clip/heads")
    return {name: tensor for file in files for name, tensor in load_file(folder / f"{file}.safetensors").items()}


# The noise predictor -------------------------------------------------------------------------------------------------
def sdpa(q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
    """Attention for training: whatever kernels inference uses, gradients reach every weight."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def unet_loss(model: unet.UNet, latents: Tensor, noise: Tensor, alphas: Tensor, timesteps: Tensor, context: Tensor):
    """Squared error of the predicted noise, weighted by 1 / alpha-bar (at most 100).

    The plain error hardly sees the noisiest steps, where brightness and place are decided: night scenes came out pale.
    1 / alpha-bar makes it the squared error of v. Sources: Ho et al. (2020), equation 14, for the error; Salimans and
    Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), section 4, for the weight.
    """
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
        predicted = model(noisy, timesteps, context.to(noisy.dtype), attend=sdpa)
    return ((predicted.float() - noise).square() / alphas.clamp(min=0.01)).mean()


@torch.inference_mode()
def text_states(clip, ids: Tensor) -> Tensor:
    """Last hidden states `[U, 77, 128]` of token ids, as a Stable Diffusion pipeline computes them."""
    return torch.cat([clip.text_model(input_ids=ids[i : i + 2048]).last_hidden_state for i in range(0, len(ids), 2048)])


def stage_unet(args: argparse.Namespace) -> None:
    """Train the noise predictor on the encoded pictures; may pause and resume."""
    stage, batch = Stage(args, 5), args.batch or 512
    config = unet.MINI
    model = unet.UNet(config).to(stage.device, memory_format=torch.channels_last)
    count = sum(p.numel() for p in model.parameters())
    if args.adopt:
        weights = load_file(args.adopt / "unet/diffusion_pytorch_model.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    optimizer = Optimizer(model, stage, args.rate or 1e-3, args.warmup or 400, 0.01, 0.9995)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)

    def loss_of(*inputs: Tensor) -> Tensor:
        return unet_loss(model, *inputs)

    def randn() -> Tensor:
        return torch.randn(shape, device=stage.device, generator=stage.random)

    steps = torch.arange(batch, device=stage.device)
    kind = torch.bfloat16 if stage.cuda else torch.float32
    context = torch.zeros(batch, TOKENS, config.context_channels, device=stage.device, dtype=kind)
    example = (randn(), randn(), torch.full((batch, 1, 1, 1), 0.5, device=stage.device), steps, context)
    loss_of = compiled(loss_of, example, stage, optimizer, args.compile)
    del example, context
    stage.wait()

    if stage.ranks > 1:
        dist.init_process_group("nccl" if stage.cuda else "gloo")
    optimizer.synchronise()
    elapsed, iteration, path = 0.0, 0, stage.out / "unet_state_rank0.pt"
    if args.resume and path.exists():
        state = torch.load(path, map_location=stage.device, weights_only=True)
        optimizer.load(state)
        elapsed, iteration = state["elapsed"], state["iteration"]
        stage.random.manual_seed(SEED + 7919 * iteration + stage.rank + 1)
        stage.log(resumed_at=iteration, training=elapsed)
    latents = resident(np.load(stage.out / "latents.npy", mmap_mode="r"), stage.device)
    rows = torch.from_numpy(np.load(stage.out / "train_captions.npy")).long().to(stage.device)
    ids = torch.from_numpy(np.load(stage.out / "tokens.npy")).to(stage.device)
    states = text_states(load_clip(stage.out, stage.device), ids).to(kind).clone()
    empty = len(ids) - 1
    alphas = schedule.alphas_cumprod().float().to(stage.device)
    box = TimeBox(stage, args.minutes, batch, elapsed, iteration, args.pause_after)
    for iteration, progress in box:
        pick = torch.randint(len(latents), (batch,), device=stage.device, generator=stage.random)
        column = torch.randint(CAPTIONS, (batch,), device=stage.device, generator=stage.random)
        chance = torch.rand(2, batch, device=stage.device, generator=stage.random)
        text = torch.where(chance[0] < 0.1, empty, rows[pick, column])
        timesteps = ((steps + chance[1]) * (1000 / batch)).long().clamp(max=999)  # uniform, evenly spread
        noise = randn()  # half of it with a random mean, so that a noise's mean does not tell a picture's brightness
        shift = 0.1 * torch.randn(batch, shape[1], 1, 1, device=stage.device, generator=stage.random)
        noise += shift * (torch.rand(batch, 1, 1, 1, device=stage.device, generator=stage.random) < 0.5)
        loss = loss_of(latents[pick].float(), noise, alphas[timesteps].view(-1, 1, 1, 1), timesteps, states[text])
        loss.backward()
        optimizer.step(iteration, progress)
        box.loss = loss.detach()

    if not box.over:
        if stage.rank == 0:
            torch.save(optimizer.state() | {"elapsed": box.elapsed, "iteration": box.iteration}, path)
        stage.log(paused_at=box.iteration, training=round(box.elapsed, 2))
    else:
        optimizer.use_average()
        stage.save(model.state_dict(), "unet/model.safetensors")
        write_json(stage.out / "unet/config.json", config.to_json())
        stage.log(parameters=count, iterations=box.iteration, ranks=stage.ranks)
        stage.done()
    if stage.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


# Export --------------------------------------------------------------------------------------------------------------
def stage_export(args: argparse.Namespace) -> None:
    """Write the model folder in the diffusers layout, in float16; CLIP's image side and the judge beside it."""
    stage, to = Stage(args, 6), args.to
    stage.wait()

    def put(tensors: dict[str, Tensor], path: str, metadata: dict[str, str] | None = None) -> None:
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        half = {name: tensor.detach().cpu().half().contiguous() for name, tensor in tensors.items()}
        bad = [name for name, tensor in half.items() if not tensor.isfinite().all()]
        if bad:
            raise ValueError(f"not finite in float16: {', '.join(bad[:5])}")
        save_file(half, to / path, metadata={"format": "pt"} | (metadata or {}))

    version = {"_diffusers_version": "0.35.0"}
    for part in ("unet", "vae"):
        put(load_file(stage.out / part / "model.safetensors"), f"{part}/diffusion_pytorch_model.safetensors")
        write_json(to / part / "config.json", version | read_json(stage.out / part / "config.json"))
    clip = load_clip(stage.out, torch.device("cpu"))
    weights = {k: v for k, v in clip.state_dict().items() if "position_ids" not in k}
    put({k: v for k, v in weights.items() if k.startswith("text_model.")}, "text_encoder/model.safetensors")
    put({k: v for k, v in weights.items() if k.startswith(("vision_model.", "visual_projection."))},
        "clip/model.safetensors")  # fmt: skip
    put({k: weights[k].reshape(weights[k].shape) for k in ("text_projection.weight", "logit_scale")},
        "clip/heads.safetensors")  # fmt: skip
    parts = (("text_encoder", clip.config.text_config, "CLIPTextModel"),
             ("clip", clip.config.vision_config, "CLIPVisionModelWithProjection"))  # fmt: skip
    for folder, config, architecture in parts:
        settings = json.loads(config.to_json_string(use_diff=False))
        keep = ("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "hidden_size",
                "image_size", "initializer_factor", "initializer_range", "intermediate_size", "layer_norm_eps",
                "max_position_embeddings", "model_type", "num_attention_heads", "num_channels", "num_hidden_layers",
                "patch_size", "projection_dim", "vocab_size")  # fmt: skip
        settings = {key: settings[key] for key in keep if key in settings}
        write_json(to / folder / "config.json", {"architectures": [architecture], "dtype": "float32"} | settings)
    shutil.copytree(stage.out / "tokenizer", to / "tokenizer", dirs_exist_ok=True)
    put(load_file(stage.out / "judge/judge.safetensors"), "judge/judge.safetensors", {"fields": json.dumps(FIELDS)})
    write_json(to / "scheduler/scheduler_config.json", {
        "_class_name": "DDIMScheduler", **version, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "beta_end": 0.012, "num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": False,
        "clip_sample": False, "prediction_type": "epsilon", "timestep_spacing": "leading", "trained_betas": None,
    })  # fmt: skip
    write_json(to / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", **version, "feature_extractor": [None, None],
        "image_encoder": [None, None], "requires_safety_checker": False, "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })  # fmt: skip
    for path in to.rglob("*"):  # safetensors writes private files
        path.chmod(0o755 if path.is_dir() else 0o644)
    sizes = {str(path.relative_to(to)): path.stat().st_size for path in sorted(to.rglob("*")) if path.is_file()}
    total = sum(sizes.values()) / 2**20
    stage.log(folder=str(to), mebibytes=round(total, 2), files=sizes)
    if total > 30:
        raise ValueError(f"{to} takes {total:.1f} MiB, more than 30")
    stage.done()


# Report --------------------------------------------------------------------------------------------------------------
class Exported:
    """The exported folder, read back in float32: what ships is what is judged."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import CLIPTextModel

        self.device = device
        parts = ((unet.UNet, unet.UNetConfig, "unet"), (vae.VAE, vae.VAEConfig, "vae"))
        self.unet, self.vae = (
            self.frozen(kind(config.from_json(read_json(folder / part / "config.json"))),
                        load_file(folder / part / "diffusion_pytorch_model.safetensors"))
            for kind, config, part in parts
        )  # fmt: skip
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval().to(device)
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        self.clip = new_clip(len(self.tokenizer))
        missing, unexpected = self.clip.load_state_dict(exported_clip(folder), strict=False)
        assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)
        self.clip.to(device).eval().requires_grad_(False)
        self.judge = load_judge(folder / "judge").to(device)

    def frozen(self, model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return model.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)

    @torch.inference_mode()
    def sample(self, prompts: list[str], steps: int, guidance: float, seed: int, batch: int = 256) -> Tensor:
        """Text to image with DDIM: uint8 `[len(prompts), 128, 128, 3]` on the device."""
        random, pictures = torch.Generator(self.device).manual_seed(seed), []
        ids = torch.from_numpy(token_ids(self.tokenizer, [*prompts, ""])).to(self.device)
        states, plan = self.text(input_ids=ids).last_hidden_state, schedule.denoising_schedule(steps)
        config = self.unet.config
        for i in range(0, len(prompts), batch):
            cond = states[:-1][i : i + batch]
            context = torch.cat([states[-1:].expand_as(cond), cond])
            shape = (len(cond), config.in_channels, config.sample_size, config.sample_size)
            x = torch.randn(shape, device=self.device, generator=random)
            for t, alpha, alpha_next in zip(*(v.tolist() for v in vars(plan).values()), strict=True):
                time_steps = torch.full((len(context),), t, device=self.device)
                blind, told_ = self.unet(torch.cat([x, x]), time_steps, context, attend=sdpa).chunk(2)
                x = schedule.ddim_step(x, blind + guidance * (told_ - blind), alpha, alpha_next)
            pictures.append(to_pixels(self.vae.decode(x / self.vae.config.scaling_factor)))
        return torch.cat(pictures)


def grid(pictures: Tensor, columns: int, path: Path) -> None:
    """Write uint8 pictures `[N, H, W, 3]` row by row as one PNG."""
    rows = [torch.cat(list(pictures[i : i + columns]), dim=1) for i in range(0, len(pictures), columns)]
    Image.fromarray(torch.cat(rows).cpu().numpy()).save(path)


def stage_report(args: argparse.Namespace) -> None:
    """Judge the exported model on held-out combinations: recognition, reconstruction, sample grids."""
    stage = Stage(args, 7)
    stage.wait()
    model = Exported(args.to, stage.device)
    test, labels, rows = load_split(stage, "test")
    texts = read_json(stage.out / "captions.json")
    ids, said = (torch.from_numpy(np.load(stage.out / f"{name}.npy")).to(stage.device) for name in ("tokens", "told"))
    report: dict[str, Any] = {"steps": args.steps, "guidance": args.guidance, "prompts_per_class": args.per_class}
    report["held_out_psnr"] = reconstruction_psnr(model.vae, test, labels)
    report["judge_on_drawings"] = accuracies(judge_all(model.judge, to_images(test)), labels)
    report["clip_on_drawings"] = accuracies(zero_shot(model.clip, to_images(test), said, ids), labels, silent=True)

    chosen: set[int] = set()  # held-out pictures whose full captions become prompts: enough of every class
    for name in ("animal", "place", "accessory", "style"):
        for i in range(len(FIELDS[name])):
            of_class = (labels[:, NAMES.index(name)] == i).nonzero().flatten().tolist()
            chosen |= set(of_class[: args.per_class])
    prompts = torch.tensor(sorted(chosen), device=stage.device)
    pictures = model.sample([texts[i] for i in rows[prompts, -1].tolist()], args.steps, args.guidance, SEED)
    wanted, images = labels[prompts], to_images(pictures)
    report["prompts"], report["samples"] = len(prompts), {}
    for judge, winners in (("judge", judge_all(model.judge, images)),
                           ("clip", zero_shot(model.clip, images, said, ids))):  # fmt: skip
        shares: dict[str, Any] = {"all": accuracies(winners, wanted, silent=judge == "clip")}
        for field, name in enumerate(NAMES):
            shares[name] = {}
            for i, label in enumerate(FIELDS[name]):
                keep = (wanted[:, field] == i) & ((wanted[:, 0] != ZEBRA) | (name != "fur"))
                if keep.any():
                    right = (winners[name][keep] == i).float().mean().item()
                    shares[name][label] = {"recognised": round(right, 4), "prompts": int(keep.sum())}
        report["samples"][judge] = shares
    stage.log(**{key: value for key, value in report.items() if key != "samples"},
              **{judge: shares["all"] for judge, shares in report["samples"].items()})  # fmt: skip

    rng = np.random.default_rng((SEED, 2))
    plain = {"style": "photo", "accessory": "none"}
    report["grids"] = {}
    for name in ("place", "style", "accessory"):  # one row per class, one column per animal
        scenes = [world.random_scene(rng, **(plain | {name: value, "animal": animal}))
                  for value in FIELDS[name] for animal in world.ANIMALS]  # fmt: skip
        captions = [world.caption(scene) for scene in scenes]
        pictures = model.sample(captions, args.steps, args.guidance, SEED + 1)
        grid(pictures, len(world.ANIMALS), stage.out / f"samples_{name}.png")
        report["grids"][f"samples_{name}.png"] = captions
    pairs = []
    for i in range(len(world.STYLES)):  # a row of drawings above a row of their reconstructions
        some = test[labels[:, NAMES.index("style")] == i][:8]
        with torch.inference_mode():
            again = to_pixels(model.vae.decode(model.vae.encode(to_images(some))[0]))
        pairs += [F.pad(x, (0, 0, 0, 0, 0, 0, 0, 8 - len(x))) for x in (some, again)]
    grid(torch.cat(pairs), 8, stage.out / "reconstructions.png")
    write_json(stage.out / "report.json", report)
    stage.done()


# Everything ----------------------------------------------------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plan(args: argparse.Namespace) -> list[tuple[str, int | None, dict[str, str], list[str]]]:
    """Rows of `(log name, GPU, environment, arguments)`, one process each; all of them start at once."""
    gpus = 0 if args.cpu else torch.cuda.device_count()
    second = 1 if gpus > 1 else 0  # CLIP and the judge train beside the autoencoder on a second GPU, else after it
    ranks = max(gpus, 1) if gpus or not args.smoke else 2
    minutes = {"vae": args.vae_minutes, "clip": args.clip_minutes, "judge": args.judge_minutes}
    quick = ["--batch", "4", "--warmup", "2"] if args.smoke else []
    common = ["--cpu"] if args.cpu else []
    fast = ["--compile"] if args.compile else []
    rows = [
        ("world", None, {}, ["--scenes", str(args.scenes), "--held-out", str(args.held_out), "--workers",
                             str(args.workers), "--after", "tokenizer"]),
        ("tokenizer", None, {}, []),
        ("vae", 0, {}, ["--after", "images", *fast, *quick]),
        ("clip", second, {}, ["--after", "world" if second else "world,vae", *quick]),
        ("judge", second, {}, ["--after", "world,clip", *quick]),
    ]  # fmt: skip
    adopt = ["--adopt", str(args.adopt)] if args.adopt else []
    if adopt:
        rows = [rows[0], ("adopt", second, {}, ["--after", "world", *adopt])]
    rows = [(name, gpu, env, [name, *common, *rest, *(["--minutes", str(minutes[name])] if name in minutes else [])])
            for name, gpu, env, rest in rows]  # fmt: skip
    port = str(free_port())
    pause = ["--pause-after", str(args.pause_after)] if args.pause_after else []
    for rank in range(ranks):
        network = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        rest = ["unet", *common, "--after", "world,vae,clip,judge", "--minutes", str(args.unet_minutes), *fast, *quick,
                *pause, *adopt, *(["--rate", str(args.unet_rate)] if args.unet_rate else []),
                *(["--resume"] if args.resume else [])]  # fmt: skip
        rows.append((f"unet{rank}" if rank else "unet", rank if gpus else None, network, rest))
    few = ["--steps", "2", "--per-class", "2"] if args.smoke else ["--steps", str(args.steps)]
    rows.append(("export", None, {}, ["export", "--to", str(args.to), "--after", "unet"]))
    rows.append(("report", 0, {}, ["report", *common, "--to", str(args.to), *few, "--after", "export"]))
    return rows


def stage_all(args: argparse.Namespace) -> None:
    """Run every stage that is not done, as processes that wait for each other; if one fails, end the others."""
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        stale = (*args.out.glob("*.done"), *args.out.glob("*.log"), *args.out.glob("*.pt"), args.out / "log.jsonl")
        for path in stale:
            path.unlink(missing_ok=True)
    if not (args.out / "world.done").exists():
        (args.out / "images.done").unlink(missing_ok=True)  # the pictures will be drawn again
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    began, running, log = time.monotonic(), {}, args.out / "log.jsonl"
    position = log.stat().st_size if log.exists() else 0
    try:
        for name, gpu, environment, arguments in plan(args):
            if (args.out / f"{name.rstrip('0123456789')}.done").exists():
                continue
            environment = os.environ | {"PYTHONUNBUFFERED": "1"} | environment
            if gpu is not None and torch.cuda.device_count() > 1:
                seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
                environment["CUDA_VISIBLE_DEVICES"] = seen[gpu] if len(seen) > gpu and seen[gpu] else str(gpu)
            command = [sys.executable, os.path.abspath(__file__), *arguments, "--out", str(args.out)]
            with open(args.out / f"{name}.log", "a") as file:
                running[name] = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                                 start_new_session=True)  # fmt: skip
        while running:
            time.sleep(0.1)
            if log.exists():
                with open(log) as file:
                    file.seek(position)
                    for line in file.read().splitlines():
                        print(f"[{time.monotonic() - began:6.1f} s] {line}", flush=True)
                    position = file.tell()
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if code:
                    tail = "\n".join((args.out / f"{name}.log").read_text().splitlines()[-30:])
                    raise SystemExit(f"{name} failed with code {code}:\n{tail}")
                if name == "unet" and not (args.out / "unet.done").exists():
                    for other in [p for rank, p in running.items() if rank.startswith("unet")]:
                        other.wait()
                    print("paused; go on with: all --resume", flush=True)
                    return
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in running.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def run_all(args: argparse.Namespace) -> None:
    """`all`; with `--smoke` everything is tiny, and the noise predictor is paused and resumed on the way."""
    if not args.smoke:
        return stage_all(args)
    args.scenes, args.held_out, args.workers = 160, 64, 2
    args.vae_minutes = args.clip_minutes = args.judge_minutes = 0.05
    args.unet_minutes, args.pause_after = 0.2, 0.02
    stage_all(args)
    args.resume, args.pause_after = True, None
    return stage_all(args)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    functions = {
        "world": stage_world, "tokenizer": stage_tokenizer, "clip": stage_clip, "judge": stage_judge,
        "vae": stage_vae, "adopt": stage_adopt, "unet": stage_unet, "export": stage_export, "report": stage_report,
        "all": run_all,
    }  # fmt: skip
    for name, function in functions.items():
        sub = stages.add_parser(name, help=(function.__doc__ or "").splitlines()[0])
        sub.set_defaults(function=function)
        sub.add_argument("--out", type=Path, required=True, help="folder that the stages share")
        sub.add_argument("--cpu", action="store_true", help="use no GPU")
        sub.set_defaults(cpu=name in ("world", "tokenizer", "export"))
        sub.add_argument("--after", default="", help="comma-separated stages to wait for before touching their files")
        if name in ("world", "all"):
            sub.add_argument("--scenes", type=int, default=200_000, help="training pictures")
            sub.add_argument("--held-out", type=int, default=4096, help="pictures of held-out combinations")
            sub.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
        if name in ("clip", "judge", "vae", "unet"):
            sub.add_argument("--minutes", type=float, required=True, help="length of the training")
            sub.add_argument("--batch", type=int, help="pictures per step and GPU")
            sub.add_argument("--rate", type=float, help="peak learning rate")
            sub.add_argument("--warmup", type=int, help="iterations of linear warm-up")
        if name in ("vae", "unet", "all"):
            sub.add_argument("--compile", action="store_true", help="torch.compile the training step")
        if name in ("unet", "all"):
            sub.add_argument("--pause-after", type=float, help="minutes of UNet training before saving its state")
            sub.add_argument("--resume", action="store_true", help="go on from saved state")
        if name in ("adopt", "unet", "all"):
            text = "exported model whose noise predictor to train further; its other parts are kept"
            sub.add_argument("--adopt", type=Path, required=name == "adopt", help=text)
        if name in ("export", "report", "all"):
            sub.add_argument("--to", type=Path, required=True, help="folder of the exported model")
        if name in ("report", "all"):
            sub.add_argument("--steps", type=int, default=50, help="DDIM steps")
        if name == "report":
            sub.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance scale")
            sub.add_argument("--per-class", type=int, default=100, help="prompts per class")
        if name == "all":
            sub.add_argument("--vae-minutes", type=float, default=5.0)
            sub.add_argument("--clip-minutes", type=float, default=1.5)
            sub.add_argument("--judge-minutes", type=float, default=1.0)
            sub.add_argument("--unet-minutes", type=float, default=10.0)
            sub.add_argument("--unet-rate", type=float, help="peak learning rate of the noise predictor")
            sub.add_argument("--smoke", action="store_true", help="every path, tiny, in a few minutes on a CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parsed = parse()
    parsed.function(parsed)
