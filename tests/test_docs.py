"""The examples in docs/ run, and make the pictures that are shown. `python tests/test_docs.py` makes these again."""

import os
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import p2pz
from p2pz.presets import MINI_SETTINGS
from p2pz.weights import MINI_FOLDER

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ["attention.md"]
FRONT = "../README.md"


def examples(page):
    """All Python of a page, with line numbers of its own, so that errors point into it."""
    text, code = (DOCS / page).read_text(encoding="utf-8"), []
    inside = None
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```python" if inside is None else None
            line = ""
        code.append(line if inside else "")
    assert inside is None
    return "\n".join(code)


def shown(page):
    return re.findall(r"!\[[^]]*\]\(([^)]*)\)", (DOCS / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_examples_run_and_make_the_pictures(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("P2PZ_MODEL", raising=False)
    code = examples(page)
    assert code.count("steps = p2pz.load(), 20") == 1
    exec(compile(code.replace("steps = p2pz.load(), 20", "steps = p2pz.load(), 3"), page, "exec"), {})
    assert shown(page)
    for name in shown(page):
        with Image.open(name) as made, Image.open(DOCS / name) as committed:
            assert made.size == committed.size, f"{name} is not what the example makes: python tests/test_docs.py"
        assert (DOCS / name).stat().st_size < 100_000


def test_the_examples_on_the_front_page_run(tmp_path, monkeypatch):
    """With few steps, and tensors for those of the kernels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("P2PZ_MODEL", raising=False)
    shutil.copy(MINI_FOLDER / "examples" / "cat.png", tmp_path)
    for name in ("edit", "invert", "sample"):
        monkeypatch.setattr(p2pz, name, partial(getattr(p2pz, name), steps=None if name == "edit" else 3))
    q, k, q_reference = (torch.randn(1, positions, 2, 8) for positions in (12, 7, 12))
    tensors = {"q": q, "k": k, "v": k, "q_reference": q_reference, "k_reference": k}
    tensors |= {"mapping": torch.eye(7), "mix": torch.ones(7)}
    monkeypatch.setattr("p2pz.presets.MINI_SETTINGS", replace(MINI_SETTINGS, steps=3))
    code = examples(FRONT)
    assert code.count("steps=[0, 10, 19]") == 1
    exec(compile(code.replace("steps=[0, 10, 19]", "steps=[0, 1, 2]"), FRONT, "exec"), tensors)
    made = {"dog.png", "beach.png", "glasses_1.0.png", "glasses_1.5.png", "glasses_2.0.png"}
    assert made == {path.name for path in tmp_path.iterdir()} - {"cat.png"}


@pytest.mark.parametrize("page", [*PAGES, FRONT])
def test_links_lead_somewhere(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]*)", text):
        assert target.startswith("https://") or ((DOCS / page).parent / target).exists(), target


def write() -> None:
    """Run the examples as they are, and keep their pictures with few colours."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for page in PAGES:
            exec(compile(examples(page), page, "exec"), {})
            for name in shown(page):
                few = Image.open(name).convert("RGB").quantize(256, kmeans=8, dither=Image.Dither.NONE)
                few.save(DOCS / name, optimize=True)
                print(name, (DOCS / name).stat().st_size)


if __name__ == "__main__":
    sys.exit(write())
