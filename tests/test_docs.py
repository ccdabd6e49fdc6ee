"""The examples in docs/ run, and make the pictures that are shown. `python tests/test_docs.py` makes these again."""

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ["attention.md"]


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


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]*)", text):
        assert target.startswith("https://") or (DOCS / target).exists(), target


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
