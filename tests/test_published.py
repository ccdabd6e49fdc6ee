"""The tables of the two READMEs say what the result files say."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FRONT, PAGE = (ROOT / "README.md").read_text(), (ROOT / "bench" / "README.md").read_text()
TASKS = ("cat->dog", "horse->zebra", "cat->cat with glasses", "sketch->oil pastel")


def tasks(name):
    found = json.loads((RESULTS / f"{name}.json").read_text())["tasks"]
    assert tuple(found) == TASKS
    return [found[task] for task in TASKS]


def mean(figures, measure, scale=1, digits=1):
    value = figures.get(measure, {}).get("mean")
    return "-" if value is None else f"{scale * value:.{digits}f}"


def with_interval(figures, measure):
    half = figures.get(measure, {}).get("ci95")
    return "-" if half is None else f"{mean(figures, measure)} ± {half:.1f}"


def row(label, cells, bold=False):
    return "| " + " | ".join(f"**{cell}**" if bold else cell for cell in (label, *cells)) + " |\n"


def recognised(figures):
    return f"{figures['judge']['mean']:.0%}"


@pytest.mark.parametrize(
    ("label", "method"),
    [
        *[(name,) * 2 for name in ("unedited source", "SDEdit + word swap", "DDIM + word swap", "prompt-to-prompt")],
        ("pix2pix-zero, the authors' numbers", "pix2pix-zero, authors' preset"),
        ("p2pz", "p2pz"),
    ],
)
def test_quality_on_the_front_page(label, method):
    found = [each[method] for each in tasks("quality")]
    cells = [f"{recognised(f)} / {with_interval(f, 'background')} / {with_interval(f, 'truth')}" for f in found]
    assert row(label, cells, bold=label == "p2pz") in FRONT


@pytest.mark.parametrize("letter", "ABCDE")
def test_the_papers_configurations(letter):
    (method,) = (name for name in tasks("quality")[0] if name.startswith(f"{letter}: "))
    found = [each[method] for each in tasks("quality")]
    cells = [f"{recognised(f)} / {mean(f, 'background')} / {mean(f, 'structure', 1000, 0)}" for f in found]
    assert row(method, cells) in PAGE


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("authors' preset", "pix2pix-zero, authors' preset"),
        ("diffusers' preset", "pix2pix-zero, diffusers' preset"),
        *[(f"{name}, tuned", name) for name in ("prompt-to-prompt", "DDIM + word swap", "SDEdit + word swap")],
    ],
)
def test_what_the_default_is_compared_with(label, method):
    found = [each[method] for each in tasks("quality")]
    cells = [f"{recognised(f)} / {mean(f, 'background')} / {mean(f, 'truth')}" for f in found]
    ahead = [", ".join(with_interval(f["p2pz_ahead"], key) for key in f["p2pz_ahead"]) for f in found]
    assert row(label, cells) + row("... p2pz ahead by", ahead) in PAGE


@pytest.mark.parametrize("name", list(tasks("quality_ablation")[0]))
def test_ablations(name):
    found = [each[name] for each in tasks("quality_ablation")]
    cells = [f"{recognised(f)} / {mean(f, 'background')} / {mean(f, 'truth')}" for f in found[:3]]
    assert row(name, [*cells, mean(found[3], "truth")]) in PAGE


def test_speed():
    """Of one cell each: the rest of the two tables is in the same rows."""
    found = json.loads((RESULTS / "edit_speed.json").read_text())
    ours, default, theirs, compiled = (found[name] for name in ("p2pz", "p2pz_default", "diffusers", "compiled"))
    whole = [rows["total_s"] for rows in (ours, default, theirs)]
    cells = [f"{seconds:#.3g}" for seconds in whole]
    assert f"| whole edit, s | {' | '.join(cells)} | {compiled['total_s']:.3g} " in PAGE
    times = " | ".join(f"{whole[2] / seconds:.0f}" for seconds in whole[:2])
    assert f"| ... times as fast as diffusers | {times} |" in PAGE
    front = f"| whole edit | **{cells[0]} s** | **{cells[1]} s** | {cells[2]} s"
    assert f"{front} ({whole[2] / whole[0]:.0f} x) | {compiled['total_s']:.3g} s" in FRONT
    step = " | ".join(f"{rows['guided_step_ms']:#.3g}" for rows in (ours, default))
    assert f"| guided step, ms | {step} | {theirs['guided_step_ms']:.3g} |" in PAGE
    peaks = " | ".join(f"{rows['peak_gib']['reserved']:.2f}" for rows in (ours, default, theirs))
    assert f"| peak GPU memory of an edit, reserved, GiB ‡ | {peaks} |" in PAGE
