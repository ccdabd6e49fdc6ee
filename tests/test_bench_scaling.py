"""The benchmark of several GPUs: two processes on the CPU share a folder; GPUs, failures and sums by stand-ins."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "scaling.py"


@pytest.fixture(scope="module")
def bench(load_script):
    return load_script("scaling")


def main(bench, *arguments):
    """What the script returned and printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        status = bench.main()
    return status, printed.getvalue()


def test_processes_share_the_work(bench, tmp_path, monkeypatch):
    """The bundled model; the only test that edits and starts torchrun, once for two processes."""
    records, real = [], bench.run

    def run(photos, out, *rest):
        done = real(photos, out, *rest)
        records.extend(json.loads(line) for line in (out / "results.jsonl").read_text().splitlines())
        return done

    monkeypatch.setattr(bench, "run", run)
    status, printed = main(bench, "--mini", "--gpus", 2, "--out", tmp_path)
    assert status == 0 and re.fullmatch(r"2 of 2 processes: [\d.]+ s, [\d.]+ images/s, lowest PSNR -\n", printed)
    results = json.loads((tmp_path / "scaling_cpu.json").read_text())
    assert results["versions"]["torch"] == torch.__version__ and results["skipped"] == {}
    assert results["sizes"] == {
        "shapes": "mini", "picture": 64, "steps": 2, "dtype": "float32", "pictures": 4, "batch": 1,
    }  # fmt: skip
    # The first process's records come first: so these are the pictures that its times are taken from.
    assert [Path(record["output"]).name for record in records] == [f"{i:04}_dog.png" for i in (0, 2, 1, 3)]
    (done,) = results["runs"]
    assert (done["gpus"], done["pictures"], len(done["processes"])) == (2, 4, 2)
    assert done["images_per_second"] == sum(process["images_per_second"] for process in done["processes"])
    for process, first in zip(done["processes"], (records[0], records[2]), strict=True):
        assert process["pictures"] == 2 and process["start_up_s"] > 1 and process["first_batch_s"] == first["seconds"]
        later = 1 / process["images_per_second"]
        assert 0 < later < done["wall_s"] - process["start_up_s"] - process["first_batch_s"]
    page = (tmp_path / "scaling_cpu.md").read_text()
    assert "| 2 | " in page and "Skipped or failed" not in page


def test_times_of_a_process(bench):
    """Two batches of two: the first begins after 10 s and takes 4, recording its graphs; the second takes 2."""
    times = bench.process_times([14.0, 14.1, 16.0, 16.1], [2.0, 2.0, 0.95, 0.95], 2)
    assert times["pictures"] == 4 and times["start_up_s"] == pytest.approx(10) and times["first_batch_s"] == 4
    assert times["images_per_second"] == pytest.approx(2 / 2.0)


def good(gpus, wall, rate, **changes):
    processes = [{"start_up_s": 5.0 + i, "first_batch_s": 2.0 - i} for i in range(gpus)]
    return {"gpus": gpus, "wall_s": wall, "processes": processes, "images_per_second": rate} | changes


def test_summary(bench):
    first, equal = good(1, 100.0, 2.0), {"lowest_psnr": None, "different_pictures": 0}
    levels = [{"lowest_psnr": level, "different_pictures": 3} for level in (50.0, 45.0)]
    runs = [first, good(2, 60.0, 3.0, **levels[0]), good(4, 50.0, 7.0, **equal)]
    runs += [good(1, 120.0, 2.2, **equal), good(2, 50.0, 3.4, **levels[1]), good(2, 55.0, 3.2, **equal)]
    rows = bench.summarise([*runs, {"gpus": 2, "wall_s": 1.0, "error": "why"}, {"gpus": 8, "error": "late"}])
    assert list(rows) == ["1", "2", "4"] and [row["repeats"] for row in rows.values()] == [2, 3, 1]
    assert (rows["2"]["wall_s"], rows["2"]["images_per_second"]) == (55.0, pytest.approx(3.2))
    assert rows["2"]["speed_up"] == pytest.approx(110 / 55) and rows["4"]["speed_up"] == pytest.approx(110 / 50)
    assert rows["2"]["efficiency"] == pytest.approx(3.2 / (2 * 2.1)) and rows["1"]["efficiency"] == 1
    assert (rows["4"]["start_up_s"], rows["4"]["first_batch_s"]) == (8.0, 2.0)  # of the slowest process
    assert [bench.quality(row) for row in rows.values()] == ["equal", "45.0", "equal"]
    assert bench.quality(bench.summarise([first])["1"]) == "-"
    alone = bench.summarise([good(2, 60.0, 3.0)])["2"]
    assert alone["efficiency"] is None and alone["speed_up"] is None


def test_pictures_are_compared(bench, tmp_path):
    bench.draw_pictures(tmp_path / "a", 3, 32)
    ours = sorted((tmp_path / "a").iterdir())
    assert [Image.open(path).size for path in ours] == [(32, 32)] * 3
    assert len({path.read_bytes() for path in ours}) == 3
    assert bench.compare(ours, ours) == {"lowest_psnr": None, "different_pictures": 0}
    theirs = []
    for i, path in enumerate(ours):
        with Image.open(path) as picture:
            changed = picture.copy()
        for x in range(i):  # none, one or two columns of other pixels
            changed.paste((0, 255, 0), (x, 0, x + 1, 32))
        theirs.append(tmp_path / f"{i}.png")
        changed.save(theirs[-1])
    found = bench.compare(ours, theirs)
    assert found["different_pictures"] == 2 and 10 < found["lowest_psnr"] < 30
    assert found["lowest_psnr"] < bench.compare(ours[:2], theirs[:2])["lowest_psnr"]


# --- runs that fail, with a stand-in for Python ---


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (
            "echo 'p2pz: error: model missing does not exist' >&2; echo '======' >&2; exit 2",
            "p2pz: error: model missing",
        ),
        ("sleep 60", "not finished within 0.2 s"),
        ("exit 0", "only 0 of 2 pictures are there"),
    ],
)
def test_a_run_that_fails_says_why(bench, tmp_path, monkeypatch, script, error):
    bench.draw_pictures(tmp_path / "photos", 2, 32)
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    if "sleep" in script:
        monkeypatch.setattr(bench, "LIMIT_S", 0.2)
    done = bench.run(tmp_path / "photos", tmp_path / "out", 2, 1, [])
    assert done["gpus"] == 2 and done["error"].startswith(error) and "images_per_second" not in done


def test_the_last_error_line_counts(bench):
    text = """
Traceback (most recent call last):
[rank1]: torch.OutOfMemoryError: CUDA out of memory
p2pz: error: another process of this run failed
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
"""
    assert bench.last_error(text) == "[rank1]: torch.OutOfMemoryError: CUDA out of memory"
    assert bench.last_error("p2pz: error: a\np2pz: process 1: error: b\nend") == "p2pz: process 1: error: b"
    assert bench.last_error("Killed\n") == "Killed" and bench.last_error("") == "no message"
    assert bench.last_error("p2pz: error: another process of this run failed\n====").endswith("failed")


# --- a machine with two GPUs, by stand-ins ---


@pytest.fixture
def two_gpus(bench, monkeypatch):
    """The calls of `run`; the third one fails."""
    calls = []

    def run(photos, out, count, batch, options):
        calls.append(SimpleNamespace(photos=len(list(photos.iterdir())), out=out, count=count, options=options))
        if len(calls) == 3:
            return {"gpus": count, "wall_s": 1.0, "error": "p2pz: error: no luck"}
        out.mkdir()  # not there yet
        for photo in photos.iterdir():
            Image.open(photo).save(bench.output_of(photo, out))
        return good(count, 10.0, 1.0 * count)

    def write_checkpoint(shapes, setup):
        configs = {"unet": {"sample_size": 8}, "vae": {"block_out_channels": [1, 1]}, "scheduler": {}}
        for part, config in configs.items():
            (Path(setup.folder) / part).mkdir(parents=True)
            for name in ("config.json", f"{part}_config.json"):
                (Path(setup.folder) / part / name).write_text(json.dumps(config))

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench.edit_speed, "write_checkpoint", write_checkpoint)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return calls


def test_what_the_machine_lacks_is_skipped_and_failures_are_kept(bench, two_gpus, tmp_path):
    status, printed = main(bench, "--out", tmp_path, "--gpus", 2, 1, 4, "--pictures", 32, "--repeats", 2)
    assert status == 1 and "2 of 2 GPUs: 1 s, p2pz: error: no luck" in printed
    assert [call.count for call in two_gpus] == [1, 1, 2, 1, 2] and [call.photos for call in two_gpus] == [16] + [
        32
    ] * 4
    assert len({call.out for call in two_gpus}) == 5 and two_gpus[0].options[2:] == ["--steps", "50"]
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert results["skipped"] == {"4": "2 GPUs here"} and results["device"]["gpus"] == 2
    assert results["sizes"]["shapes"] == "sd15" and results["sizes"]["batch"] == 8
    assert [run.get("error") for run in results["runs"]] == [None, "p2pz: error: no luck", None, None]
    assert [run.get("different_pictures") for run in results["runs"]] == [None, None, 0, 0]
    page = (tmp_path / "scaling.md").read_text()
    assert "- N = 4: 2 GPUs here" in page and "- N = 2: p2pz: error: no luck" in page
    assert re.search(r"\| 2 \| 10 \| 1 \| 2 \| 1 \| 6 \| 2 \| equal \|", page)


def test_a_killed_benchmark_leaves_the_runs_before(bench, two_gpus, tmp_path, monkeypatch):
    real = bench.run

    def run(photos, out, count, *rest):
        if count == 2:
            raise KeyboardInterrupt
        return real(photos, out, count, *rest)

    monkeypatch.setattr(bench, "run", run)
    with pytest.raises(KeyboardInterrupt):
        main(bench, "--out", tmp_path, "--pictures", 32)
    assert [run["gpus"] for run in json.loads((tmp_path / "scaling.json").read_text())["runs"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "4"], "--gpus 4 needs as many CUDA GPUs, and here are 2; --mini runs on a CPU"),
        (["--model", "nowhere"], "--model nowhere is no folder in the diffusers layout"),
        (
            ["--pictures", "24"],
            "--pictures 24: 1 2 processes need full batches of 8, 2 or more each; give a multiple of 16",
        ),
        (["--pictures", "16"], "--pictures 16: .* 2 or more each"),
    ],
)
def test_mistakes_are_told_in_a_line(bench, two_gpus, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as caught:
        main(bench, "--out", tmp_path / "out", *arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists() and not two_gpus
