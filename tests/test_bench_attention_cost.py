"""The benchmark of recording and changing attention runs, measures every form, and says whether its goal is met."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "attention_cost.py"


@pytest.fixture(scope="module")
def bench(load_script):
    return load_script("attention_cost")


def main(bench, *arguments):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        bench.main()


def test_all_parts_are_measured(bench, tmp_path):
    main(bench, "--smoke", "--out", tmp_path)
    found = json.loads((tmp_path / "attention_cost_cpu.json").read_text())
    assert list(found["parts"]) == list(bench.PARTS) and f"torch {torch.__version__}" in found["versions"]
    assert {part: len(rows) for part, rows in found["parts"].items()} == {
        "recording": 7, "guidance": 3, "forward": 14, "hooks": 12, "recording, reference denoised": 2,
    }  # fmt: skip
    for rows in found["parts"].values():
        first, *others = rows.values()
        assert first["ratio"] == 1
        assert all(0 < row["q1"] <= row["ms"] <= row["q3"] and row["ratio"] > 0 for row in [first, *others])
    guidance = found["parts"]["guidance"]
    assert guidance["full maps in plain torch"]["gradient_differs_by"] < 1e-3
    kept = [guidance[name]["kept_mib"] for name in ("as p2pz takes it", "full maps in plain torch")]
    assert kept[1] == pytest.approx(2 * 4 * 77 * (3 * 64 + 3 * 16 + 4 * 4) * 4 / 2**20)  # rows, heads, tokens, places
    assert kept[0] > 0
    page = (tmp_path / "attention_cost_cpu.md").read_text()
    assert "Recording all maps, mean of the heads, at every step:" in page and "| replace_maps | " in page


def test_the_verdict_follows_from_the_ratio(bench):
    verdicts = {1.05: "+5.0 % (goal: at most 10 %, met)", 1.2: "+20.0 % (goal: at most 10 %, **missed**)"}
    for ratio, verdict in verdicts.items():
        row = {"ms": 1.0, "q1": 1.0, "q3": 1.0, "ratio": ratio}
        found = dict.fromkeys(("machine", "versions", "sizes", "date", "command"), "")
        assert verdict in bench.markdown(found | {"parts": {"recording": {bench.ALL_MAPS: row}}})


def test_nothing_is_begun_late(bench, tmp_path):
    main(bench, "--smoke", "--out", tmp_path, "--seconds", 1e-9)
    assert json.loads((tmp_path / "attention_cost_cpu.json").read_text())["parts"] == {}
