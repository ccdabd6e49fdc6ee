"""Editing quality on the mini world, where the true edit is known exactly: every method, tuned alike, then compared.

    python bench/quality.py --out results --tune    # on the tuning split: 12 settings of every method and task
    python bench/quality.py --out results           # on held-out scenes, with the settings that the tuning chose
    python bench/quality.py --out results --ablate  # on the tuning split: the default with one number changed

Held-out and tuning scenes are drawn by `mini_world.task_pair` from separate random streams, and both only from
combinations (fur and place; for zebras place and thing) that `mini_world.is_held_out` keeps out of the training data.
Captions are those that p2pz recognises by itself.

To compare another method, add a row to `METHODS`: a function that is called as `p2pz.edit` is, and what to tune.
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import p2pz
from p2pz.clip import load_mini_clip
from p2pz.engine import Graphs
from p2pz.images import to_tensor
from p2pz.methods import swap_words
from p2pz.metrics import (
    background_psnr,
    background_ssim,
    clip_similarity,
    error_to_truth,
    mean_with_interval,
    structure_distance,
)
from p2pz.presets import PRESETS
from p2pz.sentences import source_prompt
from p2pz.unet import UNet
from p2pz.weights import MINI_FOLDER, mini_world
from p2pz.weights.judge import load_judge

STYLE = "sketch->oil pastel"
JUDGED = {
    "cat->dog": ("animal", "dog"),
    "horse->zebra": ("animal", "zebra"),
    "cat->cat with glasses": ("accessory", "glasses"),
    STYLE: ("style", "oil pastel"),
}
TASKS = tuple(JUDGED)
LEAST_ACCURACY = 0.95
"""What the classifier has to see of a tuned setting; among those that reach it the nearest to the true edit wins."""


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        call: `call(images, "cat->dog", model=, seed=, batch_size=, progress=, **options)`, a list of results
            with an `image` each; images are inversions, made with those options that are in `INVERSION`.
        grid: option -> values to try; every combination is.
        style_grid: the same for a change of style; None: the same values.
        fixed: options that are not tuned.
        random: whether it depends on the seed.
    """

    call: Callable[..., list[Any]]
    grid: dict[str, Sequence[Any]] = field(default_factory=dict)
    style_grid: dict[str, Sequence[Any]] | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    random: bool = False

    def settings(self, task: str) -> list[dict[str, Any]]:
        """The combinations to try for a task."""
        grid = self.style_grid if task == STYLE and self.style_grid is not None else self.grid
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


REGULARISED = {"autocorrelation_strength": 5.0, "kl_strength": 5.0}
DENOISED = {"reference": "denoised", "blend": 0.0}
INVERSION = ("preset", "steps", "form", *REGULARISED, *DENOISED)
"""Options that concern the inversion."""
MAPS = {"strength": (1.0, 1.5, 2.0), "guidance": (1.0, 1.5), "xa_guidance": (0.5, 1.0)}
LOOSE_MAPS = {"strength": (1.0, 1.25, 1.5), "guidance": (1.0, 1.5), "xa_guidance": (0.05, 0.2)}
WORDS = {"guidance": (1.0, 1.25, 1.5, 2.0, 3.0, 5.0), "steps": (20, 50)}

METHODS: dict[str, Method] = {
    "SDEdit + word swap": Method(
        p2pz.sdedit, {"noise_strength": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9), "guidance": (1.0, 2.0)}, random=True
    ),
    "DDIM + word swap": Method(p2pz.ddim_edit, WORDS),
    "prompt-to-prompt": Method(
        p2pz.prompt_to_prompt,
        {"cross_steps": (0.2, 0.5, 0.8), "self_steps": (0.0, 0.4), "guidance": (1.0, 2.0)},
    ),
    "A: DDPM + word swap": Method(
        p2pz.sdedit, WORDS, fixed={"noise_strength": 1.0, "negative_prompt": None}, random=True
    ),
    "B: DDIM + word swap": Method(p2pz.ddim_edit, WORDS),
    "C: B + regulariser": Method(p2pz.ddim_edit, WORDS, fixed=REGULARISED, random=True),
    "D: C + sentence directions": Method(
        p2pz.edit,
        {"strength": (1.0, 1.25, 1.5, 2.0), "guidance": (1.0, 1.25, 1.5)},
        fixed=DENOISED | REGULARISED | {"xa_guidance": 0.0},
        random=True,
    ),
    "E: D + cross-attention guidance": Method(p2pz.edit, MAPS, LOOSE_MAPS, DENOISED | REGULARISED, random=True),
    "pix2pix-zero, authors' preset": Method(p2pz.edit, fixed={"preset": "authors"}, random=True),
    "pix2pix-zero, diffusers' preset": Method(p2pz.edit, fixed={"preset": "diffusers"}, random=True),
    "pix2pix-zero, no regulariser": Method(p2pz.edit, MAPS, LOOSE_MAPS, DENOISED),
    "... on the inversion's path": Method(p2pz.edit, MAPS, LOOSE_MAPS, {"blend": 0.0}),
    "... and blended": Method(
        p2pz.edit,
        {"strength": (1.5, 2.0), "xa_guidance": (0.5, 1.0), "blend": (0.1, 0.2, 0.3)},
        {"strength": (1.0, 1.25), "xa_guidance": (0.05, 0.2), "blend": (0.05, 0.1, 0.2)},
    ),
    "p2pz": Method(p2pz.edit),
}
"""Everything but the last is tuned for each task; the last is what p2pz does by itself."""

CHECKPOINTS = {
    key: getattr(PRESETS["p2pz"], key)
    for key in ("steps", "strength", "guidance", "xa_guidance", "gradient", "blend", *REGULARISED)
}
"""What the default is for a real checkpoint."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "gradient of both halves, guidance 1.5": {"gradient": "both", "guidance": 1.5},
    "gradient as the authors', guidance 1.5": {"gradient": "halves", "guidance": 1.5},
    "gradient of the conditional half, guidance 1.5": {"guidance": 1.5},
    "map guidance in the first half of the steps": {"guided_steps": (0.0, 0.5)},
    "map guidance in the second half": {"guided_steps": (0.5, 1.0)},
    "map guidance at the finest resolution only": {"resolution_weights": (1.0, 0.0, 0.0)},
    "map guidance at the coarse ones only": {"resolution_weights": (0.0, 1.0, 1.0)},
    "no map guidance": {"xa_guidance": 0.0},
    "reference denoised, no blending": DENOISED,
    "no blending": {"blend": 0.0},
    "regulariser 5": REGULARISED,
    "regulariser 5, every offset": REGULARISED | {"form": "every"},
    "50 steps": {"steps": 50},
    "a checkpoint's default": CHECKPOINTS,
    "a checkpoint's default, half the map guidance": CHECKPOINTS | {"xa_guidance": 0.05},
    "a checkpoint's default, ten times the map guidance": CHECKPOINTS | {"xa_guidance": 1.0},
    "a checkpoint's default, gradient as the authors'": CHECKPOINTS | {"gradient": "halves"},
    "a checkpoint's default, gradient as the authors', ten times the map guidance": CHECKPOINTS
    | {"gradient": "halves", "xa_guidance": 1.0},
    "a checkpoint's default, gradient as the authors', reference denoised": CHECKPOINTS
    | {"gradient": "halves", "reference": "denoised"},
}


class TaskRun:
    """A task's scenes and captions, with the inversions that its methods share."""

    def __init__(self, model: p2pz.Model, task: str, split: str, count: int):
        self.model, self.task = model, task
        pairs = [mini_world.task_pair(task, i, split) for i in range(count)]
        self.sources = [mini_world.render(source) for source, _ in pairs]
        self.truths = [mini_world.render(target) for _, target in pairs]
        self.masks = [mini_world.edit_mask(*pair) for pair in pairs]
        words = task.split("->")
        self.captions, self.targets = [], []
        for caption in p2pz.caption(self.sources, model=model):
            try:
                swapped = swap_words(caption, *words)
            except ValueError:  # recognised as something else: say no more than what is known
                caption = source_prompt(words[0])
                swapped = swap_words(caption, *words)
            self.captions.append(caption)
            self.targets.append(swapped)
        self.direction = p2pz.direction(*words, model=model)
        self.inverted: dict[str, list[p2pz.Inversion]] = {}

    def inversions(self, options: dict[str, Any], seed: int) -> list[p2pz.Inversion]:
        """Of all scenes, computed once for the same options."""
        key = json.dumps([options, seed], sort_keys=True)
        if key not in self.inverted:
            settings = options | {"model": self.model, "prompt": self.captions, "seed": seed, "progress": False}
            self.inverted[key] = p2pz.invert(self.sources, **settings)
        return self.inverted[key]

    def edit(self, method: Method, settings: dict[str, Any], seed: int = 0) -> list[Image.Image]:
        """Edited pictures of all scenes."""
        options = method.fixed | settings
        items = self.inversions({name: options[name] for name in INVERSION if name in options}, seed)
        direction = self.direction if method.call is p2pz.edit else self.task
        common = {"model": self.model, "seed": seed, "batch_size": len(items), "progress": False}
        return [result.image for result in method.call(items, direction, **common, **options)]

    def measure(self, edited: list[Image.Image], models: "Models", thorough: bool = True) -> dict[str, list[float]]:
        """The measurements of each edited picture; `thorough` adds the slow ones."""
        field, wanted = JUDGED[self.task]
        seen = models.judge.classify(to_tensor(edited).to(self.model.device))[field]
        fits = [clip_similarity(edited, texts, models.clip) for texts in (self.captions, self.targets)]
        errors = [error_to_truth(*three) for three in zip(edited, self.truths, self.masks, strict=True)]
        kept = list(zip(edited, self.sources, self.masks, strict=True))
        rows = {
            "accuracy": (fits[1] > fits[0]).double().tolist(),
            "judge": [float(value == wanted) for value in seen],
            "truth_inside": [inside for inside, _ in errors],
            "truth": [p2pz.images.psnr(*pair) for pair in zip(edited, self.truths, strict=True)],
        }
        if self.task != STYLE:  # a new style changes the background too
            rows["background"] = [background_psnr(*three) for three in kept]
        if thorough:
            rows["clip"] = fits[1].double().tolist()
            rows["structure"] = [structure_distance(e, s, models.clip.vision) for e, s, _ in kept]
            if self.task != STYLE:
                rows["background_ssim"] = [background_ssim(*three) for three in kept]
        return rows


@dataclass(frozen=True)
class Models:
    """What measures: the mini CLIP, which also conditions the UNet, and a classifier trained apart from it."""

    clip: Any
    judge: Any


def load_models(model: p2pz.Model) -> Models:
    return Models(load_mini_clip(model), load_judge(MINI_FOLDER / "judge").to(model.device))


def tune(
    model: p2pz.Model, tasks: Sequence[str], methods: Sequence[str], count: int, out: Path, seconds: float
) -> None:
    """Try every setting of every method on tuning scenes; a JSON line for each into `quality_tuning.jsonl`."""
    path, began = out / "quality_tuning.jsonl", time.monotonic()
    done = {(row["task"], row["method"], json.dumps(row["settings"])) for row in read_lines(path)}
    models = load_models(model)
    runs = {task: TaskRun(model, task, "tuning", count) for task in tasks}
    work = [(task, name, settings) for name in methods for task in tasks for settings in METHODS[name].settings(task)]
    work = [each for each in work if (*each[:2], json.dumps(each[2])) not in done]
    for task, name, settings in tqdm(work, "tuning"):
        if time.monotonic() - began > seconds:
            break
        rows = runs[task].measure(runs[task].edit(METHODS[name], settings), models, thorough=False)
        means = {measure: float(np.mean(values)) for measure, values in rows.items()}
        add_line(path, {"task": task, "method": name, "settings": settings, "scenes": count, **means})


def chosen_settings(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The best tuned setting of each (task, method): accurate enough, and nearest to the true edit."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read_lines(path):
        key = row["task"], row["method"]
        if key not in best or merit(row) > merit(best[key]):
            best[key] = row
    return {key: row["settings"] for key, row in best.items()}


def merit(row: dict[str, Any]) -> tuple[float, float]:
    return min(row["judge"], LEAST_ACCURACY), row["truth"]


def compare(
    model: p2pz.Model, tasks: Sequence[str], methods: Sequence[str], count: int, seeds: int, out: Path, split: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method on scenes of a split, task by task; the mean over the seeds is one measurement of a scene.

    What an edit costs is measured in the first task.
    """
    chosen, models = chosen_settings(out / "quality_tuning.jsonl"), load_models(model)
    for task in tasks:
        run = TaskRun(model, task, split, count)
        unedited = [Image.fromarray(source) for source in run.sources]
        results, measured = {"unedited source": summary(run.measure(unedited, models))}, {}
        rows = [run.sources[:8], run.truths[:8]]
        for name in tqdm(methods, task):
            method = METHODS[name]
            settings = chosen.get((task, name), {})
            pictures = [run.edit(method, settings, seed) for seed in range(seeds if method.random else 1)]
            measured[name] = average([run.measure(edited, models) for edited in pictures])
            figures = summary(measured[name])
            price = cost(run, method, settings) if task == tasks[0] else {}
            results[name] = figures | {"settings": settings} | price
            rows.append([np.asarray(image) for image in pictures[0][:8]])
        for name in measured if "p2pz" in measured else ():
            ahead = {
                key: measured["p2pz"][key] - measured[name][key]
                for key in ("background", "truth")
                if key in measured[name]
            }
            results[name]["p2pz_ahead"] = summary(ahead)
        grid = np.concatenate([np.concatenate(row, axis=1) for row in rows])
        Image.fromarray(grid).save(out / f"quality_{task.replace('->', '_to_').replace(' ', '_')}.jpg", quality=85)
        yield task, results


def average(runs: Sequence[dict[str, list[float]]]) -> dict[str, np.ndarray]:
    """Each scene's mean over the runs."""
    return {name: np.mean([rows[name] for rows in runs], axis=0) for name in runs[0]}


def summary(rows: dict[str, Sequence[float]]) -> dict[str, dict[str, float | None]]:
    """Mean and 95 % half-width of each measurement over the scenes; None where it is infinite."""
    figures = {}
    for name, values in rows.items():
        mean, half = mean_with_interval(values) if np.isfinite(values).all() else (None, None)
        figures[name] = {"mean": mean, "ci95": half}
    return figures


def cost(run: TaskRun, method: Method, settings: dict[str, Any]) -> dict[str, float]:
    """Of an edit of one picture: images that went through the UNet (a gradient counts its forward pass), and seconds.

    Seconds are the median of three, warm, from the picture to the edited picture.
    """
    source, caption = run.sources[0], run.captions[0]

    def edit_one(model: p2pz.Model) -> None:
        if method.call is p2pz.edit:  # which makes use of having inverted the picture itself
            options = method.fixed | settings
            p2pz.edit(source, run.direction, model=model, prompt=caption, progress=False, **options)
            return
        one = copy.copy(run)
        one.model, one.sources, one.captions, one.inverted = model, [source], [caption], {}
        one.edit(method, settings)

    evaluations, predict = [0], UNet.predict

    def counting(self, latents, *rest, **named):
        evaluations[0] += len(latents)
        return predict(self, latents, *rest, **named)

    with unittest.mock.patch.object(UNet, "predict", counting):
        edit_one(replace(run.model, graphs=Graphs(record=False)))
    edit_one(run.model)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        edit_one(run.model)
        times.append(time.perf_counter() - began)
    return {"evaluations": evaluations[0], "seconds": statistics.median(times)}


def ablate(model: p2pz.Model, tasks: Sequence[str], count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The default with one number changed, on tuning scenes, task by task."""
    models = load_models(model)
    for task in tasks:
        run, results = TaskRun(model, task, "tuning", count), {}
        for name, changes in tqdm(ABLATIONS.items(), task):
            edited = run.edit(Method(p2pz.edit), changes)
            results[name] = summary(run.measure(edited, models, thorough=False))
        yield task, results


# Pages --------------------------------------------------------------------------------------------------------------
COLUMNS = (
    ("judge", "recognised", "{:.0%}"),
    ("accuracy", "CLIP acc.", "{:.0%}"),
    ("background", "background dB", "{:.1f}"),
    ("structure", "structure x1000", "{:.1f}"),
    ("truth", "truth dB", "{:.1f}"),
)


def cell(figures: dict[str, Any], name: str, form: str) -> str:
    """Mean and half-width of a measurement in a table; "-" where there is none."""
    value = figures.get(name, {"mean": None})
    if value["mean"] is None:
        return "-"
    scale = 1000 if name == "structure" else 1
    half = "" if value["ci95"] is None else f" ± {form.format(scale * value['ci95']).rstrip('%')}"
    return form.format(scale * value["mean"]) + half


def markdown(results: dict[str, Any], machine: str) -> str:
    """A table for each task, laid out as the paper's: a method a row, a measure a column."""
    lines = [machine]
    for task, methods in results.items():
        titles = [title for _, title, _ in COLUMNS]
        titles += ["p2pz ahead by dB, background / truth", "UNet images", "seconds", "settings"]
        lines += ["", f"## {task}", "", "| | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
        for name, figures in methods.items():
            cells = [cell(figures, measure, form) for measure, _, form in COLUMNS]
            ahead = figures.get("p2pz_ahead", {})
            cells.append(" / ".join(cell(ahead, measure, "{:.2f}") for measure in ("background", "truth")))
            cells += [str(figures.get("evaluations", "-"))]
            cells += [f"{figures['seconds']:.2f}" if "seconds" in figures else "-"]
            cells += [", ".join(f"{key} {value}" for key, value in figures.get("settings", {}).items()) or "-"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito's
CURVES = (
    "SDEdit + word swap", "DDIM + word swap", "prompt-to-prompt", "D: C + sentence directions",
    "E: D + cross-attention guidance", "... on the inversion's path", "... and blended",
)  # fmt: skip


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against background error: every tuned setting of every method, one panel for each task."""
    tasks = [task for task in TASKS if any(row["task"] == task and "background" in row for row in rows)]
    size, gap = 420, 60
    picture = Image.new("RGB", (gap + len(tasks) * (size + gap), size + 2 * gap + 24 * len(CURVES)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for i, task in enumerate(tasks):
        left, top = gap + i * (size + gap), gap
        draw.rectangle((left, top, left + size, top + size), outline="black")
        draw.text((left, top - 24), f"{task}: recognised against background dB (20 to 45)", "black", font)
        for share in (0, 0.25, 0.5, 0.75, 1):
            draw.text((left - 34, top + size * (1 - share) - 8), f"{share:.0%}", "black", font)
        for level in (20, 25, 30, 35, 40, 45):
            draw.text((left + size * (level - 20) / 25 - 8, top + size + 4), str(level), "black", font)
        for row in rows:
            if row["task"] != task or row["method"] not in CURVES:
                continue
            x = left + size * min(max((row["background"] - 20) / 25, 0), 1)
            y = top + size * (1 - row["judge"])
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLOURS[CURVES.index(row["method"])])
    for i, name in enumerate(CURVES):
        y = size + 2 * gap + 24 * i - 20
        draw.ellipse((gap, y + 4, gap + 10, y + 14), fill=COLOURS[i])
        draw.text((gap + 18, y), name, "black", font)
    picture.save(path, optimize=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def add_line(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def machine_line(model: p2pz.Model) -> str:
    """Device, software and date of a measurement."""
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{name}, {str(model.dtype).removeprefix('torch.')}, {versions}, {time.strftime('%Y-%m-%d')}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--scenes", type=int, default=64, help="scenes a task (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of methods with randomness (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--split", choices=mini_world.SPLITS, default="held_out", help="of the comparison")
    parser.add_argument("--device", default=None)
    parser.add_argument("--tune", action="store_true", help="tune the methods' settings instead of comparing them")
    parser.add_argument("--ablate", action="store_true", help="change one number of the default at a time instead")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop tuning after this time")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model = p2pz.load(MINI_FOLDER, device=args.device, dtype=torch.float32)
    if args.tune:
        tune(model, args.tasks, args.methods, args.scenes, args.out, args.seconds)
        plot(read_lines(args.out / "quality_tuning.jsonl"), args.out / "quality_tradeoff.png")
        return
    if args.ablate:
        rows, name, split = ablate(model, args.tasks, args.scenes), "quality_ablation", "tuning"
    else:
        rows = compare(model, args.tasks, args.methods, args.scenes, args.seeds, args.out, args.split)
        name, split = "quality", args.split
    machine = f"{machine_line(model)}; {args.scenes} {split} scenes a task, {args.seeds} seeds where there is chance"
    results: dict[str, Any] = {}
    for task, figures in rows:  # each is saved as soon as it is there
        results[task] = figures
        (args.out / f"{name}.json").write_text(json.dumps({"machine": machine, "tasks": results}, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(markdown(results, machine))
    print(markdown(results, machine))


if __name__ == "__main__":
    main()
