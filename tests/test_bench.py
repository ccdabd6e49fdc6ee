"""The quality benchmark measures what it says, and the recipe runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import p2pz
from p2pz.editing import MASK_SHARES
from p2pz.images import psnr
from p2pz.weights import MINI_FOLDER, mini_world

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import quality  # noqa: E402

FEW = {
    "DDIM + word swap": quality.Method(p2pz.ddim_edit, {"guidance": (1.0, 3.0)}, fixed={"steps": 2}),
    "noise": quality.Method(p2pz.sdedit, fixed={"steps": 2, "noise_strength": 0.5}, random=True),
    "p2pz": quality.Method(p2pz.edit, fixed={"steps": 2}),
}


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def models(model):
    return quality.load_models(model)


@pytest.mark.parametrize("task", quality.TASKS)
def test_the_true_edit_scores_best_and_the_source_worst(model, models, task):
    run = quality.TaskRun(model, task, "tuning", 4)
    right = run.measure([Image.fromarray(truth) for truth in run.truths], models)
    wrong = run.measure([Image.fromarray(source) for source in run.sources], models)
    assert np.mean(right["accuracy"]) == np.mean(right["judge"]) == 1 and set(right["truth"]) == {float("inf")}
    assert np.mean(wrong["accuracy"]) == np.mean(wrong["judge"]) == 0 and max(wrong["truth"]) < 35
    assert np.mean(right["clip"]) > np.mean(wrong["clip"]) and set(wrong["structure"]) == {0.0}
    if task != quality.STYLE:  # outside the true mask nothing changes
        assert set(right["background"]) == set(wrong["background"]) == {float("inf")}
    source, target = task.split("->")
    for caption, swapped in zip(run.captions, run.targets, strict=True):
        assert source in caption and target in swapped


def test_every_method_is_tuned_with_the_same_effort():
    for task in quality.TASKS:
        counts = {name: len(method.settings(task)) for name, method in quality.METHODS.items() if method.grid}
        assert set(counts.values()) == {12}, counts


def test_a_run_uses_the_settings_it_is_given(model):
    run = quality.TaskRun(model, "cat->dog", "tuning", 1)
    edit = quality.METHODS["pix2pix-zero, no regulariser"]
    weak, strong = (run.edit(edit, {"steps": 3, "strength": strength})[0] for strength in (0.0, 2.0))
    assert psnr(weak, run.sources[0]) > psnr(strong, run.sources[0]) + 1
    kept = run.edit(quality.METHODS["... and blended"], {"steps": 3, "strength": 2.0, "blend": 0.2})[0]
    outside = ~run.masks[0]
    assert psnr(kept, run.sources[0], outside) > psnr(strong, run.sources[0], outside)


def test_tuning_comparison_and_ablation_write_their_pages(model, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "METHODS", FEW)
    monkeypatch.setattr(quality, "ABLATIONS", {"one step": {"steps": 1}, "two": {"steps": 2}})
    monkeypatch.setattr(quality.p2pz, "load", lambda *_, **__: model)
    common = ["--out", str(tmp_path), "--scenes", "2", "--tasks", "cat->dog", "--methods", *FEW]
    quality.main([*common, "--tune"])
    tuned = [json.loads(line) for line in (tmp_path / "quality_tuning.jsonl").read_text().splitlines()]
    assert [(row["method"], row["settings"]) for row in tuned] == [
        ("DDIM + word swap", {"guidance": 1.0}),
        ("DDIM + word swap", {"guidance": 3.0}),
        ("noise", {}),
        ("p2pz", {}),
    ]
    quality.main([*common, "--tune"])  # nothing is left to do
    assert len((tmp_path / "quality_tuning.jsonl").read_text().splitlines()) == 4
    assert Image.open(tmp_path / "quality_tradeoff.png").size[0] > 400

    quality.main([*common, "--seeds", "2"])
    figures = json.loads((tmp_path / "quality.json").read_text())["tasks"]["cat->dog"]
    assert set(figures) == {"unedited source", *FEW}
    best = quality.chosen_settings(tmp_path / "quality_tuning.jsonl")["cat->dog", "DDIM + word swap"]
    assert figures["DDIM + word swap"]["settings"] == best
    assert figures["unedited source"]["background"] == {"mean": None, "ci95": None}  # equal: infinite
    assert figures["p2pz"]["truth"]["ci95"] > 0
    ahead = figures["noise"]["p2pz_ahead"]["truth"]["mean"]
    assert ahead == pytest.approx(figures["p2pz"]["truth"]["mean"] - figures["noise"]["truth"]["mean"])
    assert figures["p2pz"]["p2pz_ahead"]["truth"] == {"mean": 0, "ci95": 0}
    swap = 1 + (best["guidance"] != 1)  # rows of the edit beside one of the reference, in each of two steps
    assert figures["DDIM + word swap"]["evaluations"] == 2 + 2 * (1 + swap) + 1
    mask = 2 * len(MASK_SHARES)
    assert figures["p2pz"]["evaluations"] == 2 + 2 * (1 + 1) + mask  # the inversion is the reference
    page = (tmp_path / "quality.md").read_text()
    assert all(f"| {name} |" in page for name in FEW)
    assert Image.open(tmp_path / "quality_cat_to_dog.jpg").size == (2 * 128, 5 * 128)

    quality.main([*common, "--ablate"])
    ablation = json.loads((tmp_path / "quality_ablation.json").read_text())["tasks"]["cat->dog"]
    assert set(ablation) == {"one step", "two"}


def test_the_example_of_a_method_of_ones_own_runs(model):
    """In bench/README.md."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "bench" / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names = vars(quality) | {"METHODS": {}}
    exec(code, names)
    method = names["METHODS"]["mine"]
    run = quality.TaskRun(model, "cat->dog", "tuning", 1)
    runs = [run.edit(method, setting)[0] for setting in method.settings("cat->dog")]
    assert len({picture.tobytes() for picture in runs}) == 3


def test_the_most_faithful_of_the_accurate_settings_is_chosen(tmp_path):
    path = tmp_path / "quality_tuning.jsonl"
    for strength, judge, truth in ((1, 0.5, 30.0), (2, 0.96, 22.0), (3, 1.0, 21.0), (4, 0.94, 25.0)):
        row = {"task": "cat->dog", "method": "m", "settings": {"strength": strength}, "judge": judge, "truth": truth}
        quality.add_line(path, row)
    assert quality.chosen_settings(path) == {("cat->dog", "m"): {"strength": 2}}


def test_chance_is_averaged_before_the_scenes():
    summary = quality.summary(quality.average([{"truth": [20.0, 30.0]}, {"truth": [22.0, 32.0]}]))
    assert summary["truth"]["mean"] == 26.0
    assert summary["truth"]["ci95"] == pytest.approx(1.96 * np.std([21, 31], ddof=1) / 2**0.5)


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
