"""Editing quality on the mini world, where the true edit is known exactly.

    python bench/quality.py --out results                        # the published table, on held-out scenes
    python bench/quality.py --out sweep --split tuning --sweep   # choosing settings, on other scenes

Every scene's combination (fur and place, or place and thing) was kept out of training. The caption is what p2pz
recognises by itself. Three measurements, means over the scenes:

- accuracy: the mini CLIP finds the target caption more fitting than the source caption (`judge`: an independent
  classifier sees the target class);
- background: PSNR in dB against the source picture outside the true mask (object tasks only);
- truth: PSNR in dB against the exactly edited picture.
"""

import argparse
import json
import platform
import re
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import p2pz
from p2pz.clip import Clip, load_mini_clip
from p2pz.directions import with_article
from p2pz.editing import edit_latents
from p2pz.images import psnr, to_pictures, to_tensor
from p2pz.presets import Settings, settings_for
from p2pz.weights import MINI_FOLDER, mini_world
from p2pz.weights.judge import Judge, load_judge

JUDGED_FIELD = {
    "cat->dog": ("animal", "dog"),
    "horse->zebra": ("animal", "zebra"),
    "cat->cat with glasses": ("accessory", "glasses"),
    "sketch->oil pastel": ("style", "oil pastel"),
}


def scenes_of(task: str, split: str, count: int) -> list[tuple[mini_world.Scene, mini_world.Scene]]:
    """The first `count` pairs of a task: (source scene, target scene)."""
    return [mini_world.task_pair(task, i, split) for i in range(count)]


def swap_words(caption: str, task: str) -> str:
    """The caption with the source concept's words, and their article, replaced by the target's."""
    source, target = task.split("->")
    if target in caption:
        return caption
    swapped = re.sub(rf"\ban? {source}\b", with_article(target), caption, count=1)
    return swapped if swapped != caption else re.sub(rf"\b{source}\b", target, caption, count=1)


class TaskRun:
    """A task's scenes, captions and text states, with the inversions that its methods share."""

    def __init__(self, model: p2pz.Model, task: str, split: str, count: int):
        self.model, self.task = model, task
        self.pairs = scenes_of(task, split, count)
        self.sources = [mini_world.render(source) for source, _ in self.pairs]
        self.truths = [mini_world.render(target) for _, target in self.pairs]
        self.backgrounds = [~mini_world.edit_mask(*pair) for pair in self.pairs]
        self.captions = p2pz.caption(self.sources, model=model)
        self.direction = p2pz.direction(*task.split("->"), model=model)
        self.inverted: dict[tuple, Tensor] = {}

    def noise(self, settings: Settings, seed: int) -> Tensor:
        """Inverted noise of all scenes, computed once for each inversion's numbers."""
        numbers = asdict(settings) | {"strength": 0, "guidance": 0, "xa_guidance": 0, "gradient": ""}
        key = (*numbers.values(), seed)
        if key not in self.inverted:
            inversions = p2pz.invert(
                self.sources, model=self.model, prompt=self.captions, seed=seed, progress=False, **asdict(settings)
            )
            self.inverted[key] = torch.stack([one.latents for one in inversions]).to(self.model.device)
        return self.inverted[key]

    def edit(self, settings: Settings, word_swap: bool = False, seed: int = 0) -> tuple[list, list]:
        """Edited pictures and reconstructions."""
        noise = self.noise(settings, seed)
        caption = self.model.encode_text(self.captions)
        if word_swap:
            edited = self.model.encode_text([swap_words(text, self.task) for text in self.captions])
        else:
            edited = caption + settings.strength * self.direction.states.to(caption)
        final = [edit_latents(self.model, *batch, settings, False) for batch in _batches(noise, caption, edited)]
        latents, reference = (torch.cat(parts) for parts in zip(*final, strict=True))
        return to_pictures(self.model.decode_latents(latents)), to_pictures(self.model.decode_latents(reference))

    def measure(self, edited: list[Image.Image], clip: Clip, judge: Judge) -> dict[str, list[float]]:
        """The measurements of each edited picture."""
        swapped = [swap_words(caption, self.task) for caption in self.captions]
        images = clip.image_features(edited)
        before, after = ((images * clip.text_features(texts)).sum(1).tolist() for texts in (self.captions, swapped))
        field, wanted = JUDGED_FIELD[self.task]
        seen = judge.classify(to_tensor(edited))
        rows = {
            "accuracy": [float(target > source) for source, target in zip(before, after, strict=True)],
            "judge": [float(value == wanted) for value in seen[field]],
            "truth": [psnr(*pair) for pair in zip(edited, self.truths, strict=True)],
        }
        if self.task != "sketch->oil pastel":  # a new style changes the background too
            rows["background"] = [psnr(*three) for three in zip(edited, self.sources, self.backgrounds, strict=True)]
        return rows


def _batches(noise: Tensor, caption: Tensor, edited: Tensor, size: int = 32):
    for i in range(0, len(noise), size):
        yield noise[i : i + size], caption[i : i + size], None, edited[i : i + size]


def methods_for(model: p2pz.Model, task: str) -> dict[str, tuple[Settings, bool]]:
    """Name -> (settings, whether the target caption's words replace the direction)."""
    ours = settings_for(model, "p2pz", style=task == "sketch->oil pastel")
    free = replace(ours, xa_guidance=0.0)
    return {
        "DDIM + word swap, guidance 1": (replace(free, guidance=1.0), True),
        "DDIM + word swap, guidance 2": (replace(free, guidance=2.0), True),
        "direction, no map guidance": (free, False),
        "pix2pix-zero": (ours, False),
    }


def summary(rows: dict[str, list[float]]) -> dict[str, dict[str, float | None]]:
    """Mean and 95 % confidence half-width (normal approximation) of every measurement; None where it is infinite."""
    figures = {}
    for name, values in rows.items():
        finite = bool(np.isfinite(values).all())
        mean, half = (
            (float(np.mean(values)), float(1.96 * np.std(values) / len(values) ** 0.5)) if finite else (None,) * 2
        )
        figures[name] = {"mean": mean, "ci95": half}
    return figures


def run_methods(model: p2pz.Model, split: str, count: int, tasks: list[str], out: Path, seed: int) -> dict:
    """Every task with every method; also writes a picture grid: source, truth, then one row for each method."""
    clip, judge = load_mini_clip(model), load_judge(MINI_FOLDER / "judge")
    results: dict[str, dict] = {}
    for task in tqdm(tasks, "tasks"):
        run = TaskRun(model, task, split, count)
        rows = [run.sources[:8], run.truths[:8]]
        unedited = [Image.fromarray(source) for source in run.sources]
        results[task] = {"unedited source": summary(run.measure(unedited, clip, judge))}
        for name, (settings, word_swap) in methods_for(model, task).items():
            edited, _ = run.edit(settings, word_swap, seed)
            figures = summary(run.measure(edited, clip, judge))
            results[task][name] = figures | {"settings": asdict(settings)}
            rows.append([np.asarray(image) for image in edited[:8]])
        save_grid(rows, out / f"{task.replace('->', '_to_').replace(' ', '_')}.png")
    return results


def save_grid(rows: list[list[np.ndarray]], path: Path) -> None:
    """Pictures row by row as one PNG."""
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows])).save(path)


OBJECT_SWEEP = [
    {"strength": strength, "guidance": guidance, "xa_guidance": xa_guidance}
    for strength, guidance, xa_guidance in product((1.0, 1.25, 1.5, 1.75, 2.0), (1.0, 1.25, 1.5, 2.0), (0.2, 0.5, 1.0))
]
STYLE_SWEEP = [
    {"strength": strength, "guidance": guidance, "xa_guidance": xa_guidance}
    for strength, guidance, xa_guidance in product((1.0, 1.25, 1.5), (1.0, 1.25, 1.5), (0.05, 0.1, 0.2, 0.5))
]


def run_sweep(model: p2pz.Model, split: str, count: int, tasks: list[str], out: Path, seconds: float) -> None:
    """Every combination of the sweep's settings, as many as fit the time; a JSON line for each into `sweep.jsonl`."""
    clip, judge = load_mini_clip(model), load_judge(MINI_FOLDER / "judge")
    began = time.monotonic()
    for task in tasks:
        run = TaskRun(model, task, split, count)
        limit = began + seconds * (tasks.index(task) + 1) / len(tasks)
        for changes in tqdm(STYLE_SWEEP if task == "sketch->oil pastel" else OBJECT_SWEEP, task):
            if time.monotonic() > limit:
                break
            edited, _ = run.edit(settings_for(model, "p2pz", **changes))
            means = {name: round(float(np.mean(v)), 3) for name, v in run.measure(edited, clip, judge).items()}
            with open(out / "sweep.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"task": task, **changes, **means}) + "\n")


def markdown(results: dict, machine: str) -> str:
    """The table: accuracy by CLIP / background PSNR / truth PSNR."""
    tasks = list(results)
    lines = [f"Accuracy / background PSNR / truth PSNR (dB). {machine}", "", "| | " + " | ".join(tasks) + " |"]
    lines.append("| --- |" + " --- |" * len(tasks))
    for name in results[tasks[0]]:
        cells = []
        for task in tasks:
            figures = results[task][name]
            background = figures.get("background", {"mean": None})["mean"]
            background = "-" if background is None else f"{background:.1f}"
            cells.append(f"{figures['accuracy']['mean']:.2f} / {background} / {figures['truth']['mean']:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def machine_line(model: p2pz.Model) -> str:
    """Device, software and date of a measurement."""
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{name}, {str(model.dtype).removeprefix('torch.')}, {versions}, {time.strftime('%Y-%m-%d')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--split", choices=mini_world.SPLITS, default="held_out")
    parser.add_argument("--scenes", type=int, default=64, help="scenes a task (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=list(mini_world.TASKS), default=list(mini_world.TASKS))
    parser.add_argument("--device", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", action="store_true", help="try combinations of settings instead of the methods")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop the sweep after this time")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = p2pz.load(MINI_FOLDER, device=args.device, dtype=torch.float32)
    if args.sweep:
        run_sweep(model, args.split, args.scenes, args.tasks, args.out, args.seconds)
        return
    results = run_methods(model, args.split, args.scenes, args.tasks, args.out, args.seed)
    machine = f"{machine_line(model)}; {args.scenes} {args.split} scenes a task, seed {args.seed}"
    (args.out / "quality.json").write_text(json.dumps({"machine": machine, "tasks": results}, indent=1) + "\n")
    (args.out / "quality.md").write_text(markdown(results, machine))
    print(markdown(results, machine))


if __name__ == "__main__":
    main()
