"""Folders of images: batches, records, resuming, failures, and several processes under torchrun."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import p2pz
from p2pz import cli, jobs
from p2pz.images import psnr, working_size
from p2pz.jobs import Ranks, Record, Task, Tools, append_record, edit_files, find_images, merge_records
from p2pz.presets import Settings
from p2pz.weights import MINI_FOLDER, mini_world


@pytest.fixture(scope="module")
def tools():
    model = p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)
    return Tools(model, p2pz.direction("cat", "dog", model=model))


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """A current folder with photos/: five pictures of cats of two sizes at work, and two files that are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("P2PZ_MODEL", raising=False)
    os.mkdir("photos")
    random = np.random.default_rng(1)
    for name, size in zip("abcde", [(128, 128), (160, 128), (64, 64), (80, 64), (256, 256)], strict=True):
        scene = mini_world.random_scene(random, style="photo", animal="cat")
        Image.fromarray(mini_world.render(scene)).resize(size).save(f"photos/{name}.png")
    Path("photos/bad.png").write_text("not an image")
    Path("photos/notes.txt").write_text("not an image either")
    return tmp_path / "photos"


def tasks(*names, out="out"):
    Path(out).mkdir(exist_ok=True)
    return [Task(Path(f"photos/{name}.png"), Path(out, f"{name}_dog.png")) for name in names]


def lines(path="out/results.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def record(output, **changes):
    facts = {"input": "a.png", "prompt": "a cat", "seed": 0, "settings": {}, "reconstruction_psnr": 30.0}
    return Record(**facts | {"output": output, "warnings": (), "seconds": 1.0, "error": None} | changes)


# --- batches and failures, with a stand-in for the edit ---


@pytest.fixture
def edited(monkeypatch):
    """The lists of images that `edit` was called with; what it returns for a picture is its negative."""
    calls = []

    def edit(items, direction, *, model, prompt, batch_size, **options):
        calls.append(items)
        for item in items:
            if item.getpixel((0, 0)) == (9, 9, 9):
                raise ValueError("a nine")
        if len(items) > 2:
            raise torch.OutOfMemoryError("too many")
        warnings.warn(f"{len(items)} pictures", stacklevel=2)
        results = []
        for item in items:
            picture = item.resize((32, 32))
            negative = Image.fromarray(255 - np.asarray(picture))
            results.append(SimpleNamespace(
                image=negative, reconstruction=picture, prompt="a cat", reconstruction_psnr=30.0,
                settings=Settings(steps=options["steps"]), warnings=(),
            ))  # fmt: skip
        return results

    monkeypatch.setattr(jobs, "edit", edit)
    return calls


def run(names, tools, **options):
    done = edit_files(tasks(*names), lambda: tools, records=Path("out/results.jsonl"), steps=3, **options)
    return {Path(record.input).stem: record for record in done}


def test_images_of_one_size_at_work_share_a_batch(edited, tools):
    done = run(["a", "b", "c", "d", "e"], tools, batch_size=2)
    assert [[item.size for item in call] for call in edited] == [
        [(128, 128), (64, 64)],
        [(160, 128), (80, 64)],
        [(256, 256)],
    ]
    assert list(done) == ["a", "c", "b", "d", "e"] and [line["input"] for line in lines()] == [
        f"photos/{name}.png" for name in done
    ]
    assert done["a"].warnings == ("of an image, or more, of 2 edited at once: 2 pictures",)
    assert done["e"].warnings == ("1 pictures",)


def test_on_the_cpu_each_goes_alone_unless_asked(edited, tools):
    run(["a", "c", "e"], tools)
    assert [len(call) for call in edited] == [1, 1, 1]


def test_an_image_that_fails_does_not_lose_its_batch(edited, tools):
    Image.new("RGB", (64, 64), (9, 9, 9)).save("photos/c.png")
    done = run(["a", "bad", "c", "missing", "e"], tools, batch_size=2)
    assert [len(call) for call in edited] == [2, 1, 1, 1]
    errors = {name: record.error for name, record in done.items() if record.error}
    assert errors.keys() == {"bad", "c", "missing"} and errors["c"] == "a nine"
    assert "photos/bad.png cannot be read" in errors["bad"] and "does not exist" in errors["missing"]
    assert sorted(os.listdir("out")) == ["a_dog.png", "e_dog.png", "results.jsonl"]
    assert {line["input"]: line["error"] for line in lines()} == {
        f"photos/{name}.png": record.error for name, record in done.items()
    }


def test_a_bad_inversion_does_not_keep_others_from_being_edited(tools):
    latents, fingerprint = torch.randn(4, 32, 32), tools.model.fingerprint
    p2pz.Inversion(latents[:3], 2 * latents[:3], "a cat", 1, fingerprint).save("photos/damaged.safetensors")
    path, picture = latents.repeat(2, 1, 1, 1), Image.new("RGB", (1, 1))
    small = p2pz.Inversion(latents, 2 * latents, "a cat", 1, fingerprint, path, picture)
    small.save("photos/small.safetensors")
    images = [Path("photos", name) for name in ("damaged.safetensors", "small.safetensors", "a.png")]
    todo = [Task(image, Path(f"{image.stem}_dog.png")) for image in images]
    done = {record.input: record.error for record in edit_files(todo, lambda: tools, steps=1, progress=False)}
    assert "damaged.safetensors is damaged" in done["photos/damaged.safetensors"]
    assert "picture has 1 x 1 pixels" in done["photos/small.safetensors"] and done["photos/a.png"] is None
    assert [task.output.exists() for task in todo] == [False, False, True]


def test_a_batch_too_large_for_the_memory_is_tried_one_by_one(edited, tools):
    done = run(["a", "c", "e"], tools, batch_size=3)
    assert [len(call) for call in edited] == [3, 1, 1, 1] and not any(record.error for record in done.values())


def test_few_images_wait_for_their_batch(edited, tools, monkeypatch):
    """Many sizes would fill the memory with waiting pictures."""
    sizes = [(64, 64 + 12 * i) for i in range(11)]
    assert len({working_size(size, 128, 4) for size in sizes}) == 11
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(f"photos/{i}.png")
    read, real = [], jobs.read_item
    monkeypatch.setattr(jobs, "read_item", lambda path: read.append(path) or real(path))
    done = edit_files(tasks(*map(str, range(11))), lambda: tools, batch_size=2, steps=3)
    assert [len(read) for _ in done] == [9, 10, 11] + [11] * 8


def test_nothing_is_loaded_for_images_that_cannot_be_read():
    def prepare():
        raise AssertionError("the model was loaded")

    assert [bool(done.error) for done in edit_files(tasks("bad", "missing"), prepare)] == [True, True]
    assert list(edit_files([], prepare)) == []


def test_a_mistake_of_ours_is_not_taken_for_the_images(tools, monkeypatch):
    monkeypatch.setattr(jobs, "edit", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["a"], tools)


def test_a_full_disk_is_an_error_of_the_image(edited, tools, monkeypatch):
    def save(self, path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert "no space left" in run(["a"], tools)["a"].error and os.listdir("out") == ["results.jsonl"]
    assert [line["error"] is None for line in lines()] == [False]


def test_prompts_come_from_the_captioner_unless_given(tools, monkeypatch):
    asked = []
    captioner = SimpleNamespace(describe=lambda pictures: [f"a cat of {picture.width}" for picture in pictures])

    def edit(items, direction, *, prompt, **options):
        asked.append(prompt)
        raise ValueError("enough")

    monkeypatch.setattr(jobs, "edit", edit)
    with_captioner = Tools(tools.model, tools.direction, captioner)
    run(["a", "e"], with_captioner, batch_size=2)
    assert asked[0] == ["a cat of 128", "a cat of 256"]
    asked.clear()
    run(["a"], with_captioner, prompt="a dog")
    run(["a"], tools)
    assert asked == ["a dog", None]


# --- what a real edit leaves ---


def test_the_record_says_how_the_picture_was_made(tools):
    options = {"seed": 5, "strength": 1.5, "negative_prompt": "a ball", "guidance": 2.0, "progress": False}
    done = list(edit_files(tasks("a"), lambda: tools, records=Path("out/results.jsonl"), steps=1, **options))
    alone = p2pz.edit("photos/a.png", "cat->dog", model=tools.model, steps=1, **options)
    assert np.array_equal(Image.open("out/a_dog.png"), alone.image)
    (line,) = lines()
    assert (line["input"], line["output"], line["error"]) == ("photos/a.png", "out/a_dog.png", None)
    assert (line["prompt"], line["seed"], line["seconds"]) == (alone.prompt, 5, done[0].seconds)
    assert line["reconstruction_psnr"] == round(alone.reconstruction_psnr, 2) and line["seconds"] > 0
    expected = {"direction": "cat -> dog", "preset": "p2pz", "negative_prompt": "a ball", "steps": 1, "strength": 1.5}
    expected |= {"model": tools.model.fingerprint, "size": [128, 128]}
    assert line["settings"].items() >= (expected | {"guidance": 2.0, "xa_guidance": 1.0, "inversion": "mirror"}).items()


def test_records_that_cannot_be_written_are_told_with_their_cause(tools, tmp_path):
    with pytest.raises(ValueError, match=f"cannot write {re.escape(str(tmp_path))}: is a directory"):
        list(edit_files(tasks("a"), lambda: tools, records=tmp_path, steps=1, progress=False))


def test_doubtful_edits_are_told(tools):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photos/a.png")
    done = run(["a"], tools, strength=0.0, progress=False, prompt="a cat")
    told = done["a"].warnings
    assert len(told) == 3 and "knows only its cartoon world" in told[0]
    assert "the direction changed nothing" in told[1] and "the autoencoder lost the image" in told[2]
    assert lines()[0]["warnings"] == list(told)


# --- records ---


def test_find_images(photos):
    for name in (".hidden.png", "f.JPG", "g.tiff", "h.svg"):
        (photos / name).touch()
    (photos / "inner.png").mkdir()
    (photos / "broken.png").symlink_to("nowhere")
    with pytest.warns(UserWarning, match=r"left out of .*photos: broken.png, h.svg \(2 in all\)"):
        found = find_images([Path("x.png"), photos])
    assert [path.name for path in found] == [
        "x.png", "a.png", "b.png", "bad.png", "c.png", "d.png", "e.png", "f.JPG", "g.tiff",
    ]  # fmt: skip
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="folder empty has no images"):
        find_images([Path("empty")])


def test_records_of_all_processes_become_one_file(tmp_path):
    main = tmp_path / "results.jsonl"
    append_record(main, record("a.png", error="früher"))
    append_record(main, record("b.png"))
    append_record(tmp_path / "results.rank1.jsonl", record("c.png", prompt="a cät"))
    append_record(tmp_path / "results.rank0.jsonl", record("a.png", seconds=2.0))
    merged = merge_records(tmp_path)
    assert [path.name for path in tmp_path.glob("results*")] == ["results.jsonl"]
    assert [line["output"] for line in lines(main)] == ["a.png", "b.png", "c.png"]
    assert list(merged.values()) == lines(main)
    assert (merged["a.png"]["error"], merged["a.png"]["seconds"], merged["c.png"]["prompt"]) == (None, 2.0, "a cät")
    append_record(main, record("elsewhere/b.png", seconds=3.0))  # the same output, by another way to the folder
    merged = merge_records(tmp_path)
    assert [line["output"] for line in lines(main)] == ["a.png", "elsewhere/b.png", "c.png"]
    before = main.stat()
    assert merge_records(tmp_path) == merged and main.stat().st_mtime_ns == before.st_mtime_ns


def test_a_line_that_was_cut_off_goes_and_lines_of_others_stay(tmp_path):
    main = tmp_path / "results.jsonl"
    append_record(main, record("a.png"))
    whole = main.read_bytes()
    theirs = b'{"mine": 1}\nnot even JSON \xff\n'
    for cut in (b"", whole[:1], whole[:-2]):
        main.write_bytes(theirs + whole + cut)
        assert merge_records(tmp_path).keys() == {"a.png"} and main.read_bytes() == theirs + whole
    main.write_bytes(whole[:-1])  # only the line's end is missing
    assert merge_records(tmp_path).keys() == {"a.png"} and main.read_bytes() == whole


def test_names_that_are_no_text_are_recorded(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    append_record(tmp_path / "results.jsonl", record(name, error=f"{name} cannot be read"))
    assert merge_records(tmp_path)[name]["error"] == f"{name} cannot be read"


def test_a_folder_without_records_gets_none(tmp_path):
    (tmp_path / "new").mkdir()
    assert merge_records(tmp_path / "new") == {} and os.listdir(tmp_path / "new") == []


# --- the command ---


def command(*argv):
    words = ("--from", "cat", "--to", "dog")
    return ["edit", "photos", *words, "-o", "out", "--steps", "2", "--device", "cpu", *argv]


def test_a_run_that_was_killed_goes_on(monkeypatch, capsys):
    """Killed in the middle of the third edit, and of the line of the second one."""
    seen, real = [], jobs.edit

    def edit(items, *args, **kwargs):
        seen.append(items)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(items, *args, **kwargs)

    monkeypatch.setattr(jobs, "edit", edit)
    os.remove("photos/bad.png")
    assert cli.main(command("--steps", "1")) == 130
    assert sorted(os.listdir("out")) == ["a_dog.png", "b_dog.png", "results.jsonl"]
    records = Path("out/results.jsonl").read_bytes()
    assert records.count(b"\n") == 2 and records.endswith(b"\n")
    os.remove("out/b_dog.png")
    Path("out/results.jsonl").write_bytes(records[:-20])
    os.remove("photos/d.png")
    os.remove("photos/e.png")
    capsys.readouterr()

    assert cli.main(command("--steps", "1")) == 0
    out, err = capsys.readouterr()
    words = [line.split(":")[0] for line in out.splitlines()]
    assert (words, err) == (["skipped out/a_dog.png", "wrote out/b_dog.png", "wrote out/c_dog.png"], "")
    assert [line["output"] for line in lines()] == [f"out/{name}_dog.png" for name in "abc"]
    before = Path("out/results.jsonl").read_bytes()
    monkeypatch.setattr(p2pz, "load", None)  # a finished folder needs no model
    assert cli.main(command()) == 0 and Path("out/results.jsonl").read_bytes() == before


def torchrun(*argv, count=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    run = [*launcher, "-m", "p2pz.cli", *argv]
    return subprocess.run(run, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_processes_share_a_folder(tools):
    os.mkdir("out")
    Path("out/e_dog.png").write_text("done before")
    append_record(Path("out/results.rank7.jsonl"), record("out/e_dog.png", prompt="from a run that was killed"))
    done = torchrun(*command())
    assert done.returncode != 0  # one image failed
    assert sorted(os.listdir("out")) == [*(f"{name}_dog.png" for name in "abcde"), "results.jsonl"]
    told = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert sorted(told) == ["skipped out/e_dog.png", *(f"wrote out/{name}_dog.png" for name in "abcd")]
    errors = [line for line in done.stderr.splitlines() if line.startswith("p2pz: ")]
    assert len(errors) == 2 and "photos/bad.png cannot be read" in errors[0] and "1 of 6 images failed" in errors[1]
    # Those of the run before, then the first process's, then the second's.
    assert [line["output"] for line in lines()] == [f"out/{name}_dog.png" for name in ("e", "a", "bad", "d", "b", "c")]
    records = {line["output"]: line for line in lines()}
    assert records["out/bad_dog.png"]["error"] and records["out/e_dog.png"]["prompt"] == "from a run that was killed"
    for name in "ab":  # of the first process and of the second
        alone = p2pz.edit(f"photos/{name}.png", tools.direction, model=tools.model, steps=2, progress=False)
        assert psnr(Image.open(f"out/{name}_dog.png"), alone.image) > 50  # with other numbers of threads, not equal
        assert records[f"out/{name}_dog.png"]["prompt"] == alone.prompt


def test_a_process_that_fails_ends_the_run():
    done = torchrun(*command("--model", "missing"))
    assert done.returncode != 0 and "model missing does not exist" in done.stderr and os.listdir("out") == []


def test_ranks_are_those_of_the_launcher(monkeypatch):
    names = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert jobs.ranks() == Ranks() and not jobs.ranks().launched
    monkeypatch.setenv("RANK", "3")  # of some other program
    assert jobs.ranks() == Ranks()
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert jobs.ranks() == Ranks(3, 8, 1)
    assert jobs.ranks().records(Path("out")) == Path("out/results.rank3.jsonl")
    assert Ranks().records(Path("out")) == Path("out/results.jsonl")


def test_only_the_first_process_warns_and_all_tell_errors(monkeypatch, capsys):
    for rank, lines in ((0, ["p2pz: warning: w", "p2pz: error: e"]), (2, ["p2pz: process 2: error: e"])):
        monkeypatch.setattr(jobs, "ranks", lambda rank=rank: Ranks(rank, 3, 0))
        cli._complain("warning", "w")
        cli._complain("error", "e")
        assert capsys.readouterr().err.splitlines() == lines


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    options = dict.fromkeys(("device", "dtype", "model", "max_memory", "prediction_type", "tokenizer"))
    monkeypatch.setattr(jobs, "ranks", lambda: Ranks(5, 8, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(p2pz, "load", lambda source, *, device, **settings: device)
    for given, expected in ((None, "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu"), ("cuda:0", "cuda:0")):
        args = SimpleNamespace(**(options | {"device": given}))
        assert cli._load(args) == expected
    assert chosen == ["cuda:1", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=re.escape("there is no device cuda:1")):
        cli._load(SimpleNamespace(**options))
