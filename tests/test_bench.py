"""The quality benchmark measures what it says, and the recipe runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import p2pz
from p2pz.clip import load_mini_clip
from p2pz.presets import settings_for
from p2pz.weights import MINI_FOLDER, mini_world
from p2pz.weights.judge import load_judge

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import quality  # noqa: E402


@pytest.mark.parametrize(
    ("caption", "task", "swapped"),
    [
        ("a photo of a cat at night", "cat->dog", "a photo of a dog at night"),
        ("a photo of an orange cat", "cat->dog", "a photo of an orange dog"),
        ("a photo of a cat in a room", "cat->cat with glasses", "a photo of a cat with glasses in a room"),
        ("a photo of a grey cat", "cat->cat with glasses", "a photo of a grey cat with glasses"),
        ("a photo of a cat with glasses", "cat->cat with glasses", "a photo of a cat with glasses"),
        ("a sketch of a bear", "sketch->oil pastel", "an oil pastel of a bear"),
        ("a photo of a dog", "horse->zebra", "a photo of a dog"),
    ],
)
def test_word_swap(caption, task, swapped):
    assert quality.swap_words(caption, task) == swapped


@pytest.mark.parametrize("task", list(mini_world.TASKS))
def test_the_true_edit_scores_best_and_the_source_worst(task):
    model = p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)
    clip, judge = load_mini_clip(model), load_judge(MINI_FOLDER / "judge")
    run = quality.TaskRun(model, task, "tuning", 4)
    right = run.measure([Image.fromarray(truth) for truth in run.truths], clip, judge)
    wrong = run.measure([Image.fromarray(source) for source in run.sources], clip, judge)
    assert np.mean(right["accuracy"]) == np.mean(right["judge"]) == 1 and set(right["truth"]) == {float("inf")}
    assert np.mean(wrong["accuracy"]) == np.mean(wrong["judge"]) == 0 and max(wrong["truth"]) < 35
    if task != "sketch->oil pastel":  # outside the true mask nothing changes
        assert set(right["background"]) == set(wrong["background"]) == {float("inf")}


def test_a_run_uses_the_settings_it_is_given():
    model = p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)
    run = quality.TaskRun(model, "cat->dog", "tuning", 1)
    weak, strong = (run.edit(settings_for(model, "p2pz", steps=3, strength=strength))[0][0] for strength in (0.0, 2.0))
    assert p2pz.images.psnr(weak, run.sources[0]) > p2pz.images.psnr(strong, run.sources[0]) + 1


@pytest.mark.slow
def test_the_training_recipe_runs(tmp_path):
    """Every stage, tiny; the exported folder loads and edits."""
    command = [sys.executable, str(ROOT / "weights" / "recipe" / "train.py"), "all", "--smoke", "--cpu"]
    subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--to", str(tmp_path / "model")], check=True, timeout=1200
    )
    model = p2pz.load(tmp_path / "model", device="cpu")
    picture = mini_world.render(mini_world.task_pair("cat->dog", 0)[0])
    assert p2pz.edit(picture, "cat->dog", model=model, steps=2, progress=False).image.size == (128, 128)
