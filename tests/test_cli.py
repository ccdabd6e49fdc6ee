"""The command line: what it writes and says, and one line and a status for everything that can go wrong."""

import functools
import glob
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import p2pz
from p2pz import cli, editing
from p2pz.weights import MINI_FOLDER, mini_world

COMMANDS = ("edit", "sample", "invert", "direction", "info", "bench")
CAT_TO_DOG = ("--from", "cat", "--to", "dog", "--steps", "2")


@pytest.fixture(scope="module")
def models():
    """The API's `load` with a memory."""
    return functools.cache(p2pz.load)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, models):
    """An empty current folder with a picture of a cat, and each model loaded only once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("P2PZ_MODEL", raising=False)
    monkeypatch.setattr(p2pz, "load", models)
    scene = mini_world.random_scene(np.random.default_rng(1), style="photo", animal="cat")
    Image.fromarray(mini_world.render(scene)).save("cat.png")


@pytest.fixture
def model(models):
    return models(None, device=None, dtype=None, max_memory=None)


@pytest.fixture
def p2pz_(capsys):
    """`p2pz_(arguments)`: run the command; its status and its lines on stdout and on stderr."""

    def run(*argv):
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in argv])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def no_work(monkeypatch):
    """Loading a model fails the test."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(p2pz, "load", load)


def in_process(*argv, **variables):
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "p2pz.cli", *argv],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | variables,
    )


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


# --- what the commands do ---


def test_edit_writes_what_the_api_makes(p2pz_, model):
    status, out, err = p2pz_("edit", "cat.png", *CAT_TO_DOG, "--seed", 3, "-o", "out.png", "--guidance", 3)
    result = p2pz.edit("cat.png", "cat->dog", model=model, steps=2, seed=3, guidance=3)
    assert (status, err, len(out)) == (0, [], 1)
    assert np.array_equal(pixels("out.png"), result.image)
    found = re.fullmatch(r'wrote out.png: "(.*)", reconstruction (\d+\.\d) dB, \d+\.\d s', out[0])
    assert found[1] == result.prompt and found[2] == f"{result.reconstruction_psnr:.1f}"
    assert sorted(os.listdir()) == ["cat.png", "out.png"]


@pytest.fixture(scope="module")
def plain_edits():
    """Pictures of edits without options, by steps."""
    return {}


@pytest.mark.filterwarnings("ignore:the bundled model")
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"xa_guidance": 3.0}, 1),
        ({"strength": 3.0}, 1),
        ({"guidance": 3.0}, 1),
        ({"prompt": "a sketch of a dog"}, 1),
        ({"negative_prompt": "a ball", "guidance": 2.0}, 1),
        ({"preset": "authors"}, 3),
    ],
)
def test_edit_options_reach_the_api(options, steps, p2pz_, model, plain_edits):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert p2pz_("edit", "cat.png", *CAT_TO_DOG, "--steps", steps, *words, "-o", "out.png")[0] == 0
    expected = p2pz.edit("cat.png", "cat->dog", model=model, steps=steps, **options)
    assert np.array_equal(pixels("out.png"), expected.image)
    if steps not in plain_edits:
        plain_edits[steps] = np.asarray(p2pz.edit("cat.png", "cat->dog", model=model, steps=steps).image)
    assert not np.array_equal(pixels("out.png"), plain_edits[steps])


def test_default_name_and_overwriting(p2pz_):
    with open("cat_cat_with_glasses.png", "w") as old:
        old.write("old")
    status, out, _ = p2pz_("edit", "cat.png", "--from", "cat", "--to", "cat with glasses", "--steps", 1)
    assert status == 0 and out[0].startswith("wrote cat_cat_with_glasses.png: ")
    assert pixels("cat_cat_with_glasses.png").shape == (128, 128, 3)


def test_images_of_one_stem_get_names_of_their_own(p2pz_):
    os.mkdir("photos")
    for name in ("a.png", "a.jpg", "b.png"):
        Image.open("cat.png").save(f"photos/{name}")
    status, *_ = p2pz_("edit", "photos", *CAT_TO_DOG, "-o", "dogs", "--quiet")
    assert status == 0 and {"a_jpg_dog.png", "a_png_dog.png", "b_dog.png"} < set(os.listdir("dogs"))


def test_folder_is_resumed_and_a_bad_image_does_not_lose_the_others(p2pz_, monkeypatch):
    shutil.copy("cat.png", "second.png")
    with open("bad.png", "w") as bad:
        bad.write("not an image")
    images = ("cat.png", "bad.png", "second.png", "missing.png")
    status, out, err = p2pz_("edit", *images, *CAT_TO_DOG, "-o", "new/out")
    assert status == 1 and sorted(os.listdir("new/out")) == ["cat_dog.png", "results.jsonl", "second_dog.png"]
    assert [line.split(":")[0] for line in out] == ["wrote new/out/cat_dog.png", "wrote new/out/second_dog.png"]
    assert [line[:34] for line in err] == [
        "p2pz: error: image bad.png cannot ",
        "p2pz: error: image missing.png doe",
        "p2pz: error: 2 of 4 images failed",
    ]

    first = pixels("new/out/cat_dog.png")
    for path in ("new/out/cat_dog.png", "new/out/second_dog.png"):
        with open(path, "w") as old:
            old.write("old")
    os.remove("new/out/second_dog.png")
    status, out, err = p2pz_("edit", "cat.png", "second.png", *CAT_TO_DOG, "-o", "new/out")
    assert (status, len(out), err) == (0, 2, [])
    assert out[0] == "skipped new/out/cat_dog.png: it exists (--overwrite makes it again)"
    with open("new/out/cat_dog.png") as kept:
        assert kept.read() == "old"

    for options, name in ((("--seed", 4), "seed"), (("--negative-prompt", "fog"), "negative prompt"), ((), None)):
        status, out, err = p2pz_("edit", "cat.png", *CAT_TO_DOG, *options, "-o", "new/out")
        told = f"p2pz: warning: new/out/cat_dog.png was made with another {name}: give another -o, or --overwrite"
        assert (status, len(out), err) == (0, 1, [told] if name else [])

    assert p2pz_("edit", "cat.png", *CAT_TO_DOG, "-o", "new/out", "--overwrite")[0] == 0
    assert np.array_equal(pixels("new/out/cat_dog.png"), first)

    monkeypatch.setattr(p2pz, "load", None)  # a finished folder needs no model
    assert p2pz_("edit", "cat.png", "second.png", *CAT_TO_DOG, "-o", "new/out")[0] == 0


def test_saved_inversion_and_direction_give_the_same_edit(p2pz_):
    assert p2pz_("edit", "cat.png", *CAT_TO_DOG, "-o", "direct.png")[0] == 0
    status, out, err = p2pz_("invert", "cat.png", "-o", "cat.safetensors", "--steps", 2)
    assert (status, err) == (0, [])
    assert re.fullmatch(r'wrote cat.safetensors: "a photo of .*", 2 steps, \d+\.\d s', out[0])
    status, out, err = p2pz_("direction", "--from", "cat", "--to", "dog", "-o", "cat2dog.safetensors")
    assert (status, err) == (0, [])
    assert re.fullmatch(r"wrote cat2dog.safetensors: (\d+) and \1 sentences, \d+\.\d s", out[0])
    assert re.fullmatch(r"norm \d+\.\d; \d\.\d times what .*; leave-one-out .*; cosine 0\.\d\d to the .*", out[1])
    status, out, err = p2pz_("edit", "cat.safetensors", "--direction", "cat2dog.safetensors")
    assert (status, err) == (0, []) and re.search(r"wrote cat_dog.png: .*, reconstruction \d+\.\d dB, ", out[0])
    assert np.array_equal(pixels("cat_dog.png"), pixels("direct.png"))


def test_direction_from_sentences(p2pz_, model):
    for name, text in (("a.txt", "a cat\n\n a sleeping cat\n"), ("b.txt", "a dog")):
        with open(name, "w") as file:
            file.write(text)
    files = ("--source-sentences", "a.txt", "--target-sentences", "b.txt")
    assert p2pz_("direction", *files, "--to", "big dog!", "-o", "d.safetensors")[0] == 0
    made = p2pz.Direction.load("d.safetensors")
    assert made.sentences == (2, 1) and (made.source, made.target) == ("", "big dog!")
    expected = model.encode_text(["a dog"])[0] - model.encode_text(["a cat", "a sleeping cat"]).mean(0)
    assert torch.allclose(made.states, expected, atol=1e-5)
    assert p2pz_("edit", "cat.png", "--direction", "d.safetensors", "--steps", 1)[0] == 0
    assert re.fullmatch(r"cat_big_dog_[0-9a-f]{6}\.png", *glob.glob("cat_big_dog*"))  # another than of "big dog"


def test_output_that_has_not_every_letter(tmp_path, monkeypatch):
    """A pipe on Windows, for one; the edit is written, and so it has not failed."""
    monkeypatch.chdir(tmp_path)
    name = "caf\u00e9_\u65e5\u672c.png"
    shutil.copy(MINI_FOLDER / "examples" / "cat.png", name)
    done = in_process("edit", name, *CAT_TO_DOG, "--steps", "1", "-o", "d\u00f6g.png", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("wrote d\\xf6g.png: ")


def test_prompts_that_make_like_names_have_pictures_of_their_own(p2pz_):
    long = "a photo of a black cat on the beach with a palm tree in the sun at"
    prompts = ["a cat", "a cat?", "a, cat", f"{long} night", f"{long} noon"]
    status, out, _ = p2pz_("sample", *prompts, "--steps", 1, "--size", "64x64", "-o", "out")
    assert status == 0 and len(os.listdir("out")) == len(prompts) and not any("skipped" in line for line in out)
    assert "a_cat_0.png" in os.listdir("out")


def test_an_image_that_is_given_twice_is_edited_once(p2pz_):
    status, out, err = p2pz_("edit", "cat.png", "./cat.png", *CAT_TO_DOG, "--steps", 1, "-o", "dog.png")
    assert (status, len(out), err) == (0, 1, []) and os.path.exists("dog.png")


def test_maps_of_an_edit_assume_of_other_models_what_the_edit_assumes(p2pz_, monkeypatch):
    monkeypatch.setattr(p2pz.Model, "is_mini", False)
    monkeypatch.setattr(p2pz, "edit", None)  # far enough
    asked = []
    monkeypatch.setattr(p2pz, "invert", lambda *_, prompt, **__: asked.append(prompt))
    with pytest.raises(TypeError):
        p2pz_("maps", "cat.png", *CAT_TO_DOG, "-o", "maps")
    assert asked == ["a photo of a cat"]
    status, _, err = p2pz_("maps", "cat.png", "-o", "maps")
    assert status == 2 and "this model cannot caption images: give a prompt" in err[0]


def test_sample(p2pz_, model):
    settings = ("--steps", 2, "--seed", 7, "--size", "64x96", "--guidance", 3, "--negative-prompt", "a ball")
    status, out, err = p2pz_("sample", "a cat", "a dog", "--count", 2, "-o", "out", *settings)
    assert (status, len(out), err) == (0, 4, [])
    names = ["a_cat_7.png", "a_cat_8.png", "a_dog_10.png", "a_dog_9.png"]
    assert sorted(os.listdir("out")) == names
    expected = p2pz.sample(
        ["a cat", "a cat", "a dog", "a dog"],
        model=model, steps=2, seed=7, size=(64, 96), guidance=3, negative_prompt="a ball",
    )  # fmt: skip
    for name, picture in zip(("a_cat_7", "a_cat_8", "a_dog_9", "a_dog_10"), expected, strict=True):
        difference = pixels(f"out/{name}.png").astype(int) - np.asarray(picture)
        assert picture.size == (64, 96) and np.abs(difference).max() <= 1  # a batch rounds otherwise

    os.remove("out/a_dog_9.png")
    out = p2pz_("sample", "a cat", "a dog", "--count", 2, "-o", "out", *settings)[1]
    assert [line.split()[0] for line in out] == ["skipped", "skipped", "wrote", "skipped"]
    assert p2pz_("sample", "a dog", "--seed", 9, "-o", "one.png", *settings[:2], *settings[4:])[0] == 0
    assert np.array_equal(pixels("one.png"), pixels("out/a_dog_9.png"))


def test_a_folder_keeps_its_images_sizes_on_demand(p2pz_):
    os.mkdir("photos")
    for name, size in (("wide.png", (151, 97)), ("large.png", (300, 280))):
        Image.open("cat.png").resize(size).save(f"photos/{name}")
    status, out, err = p2pz_("edit", "photos", *CAT_TO_DOG[:4], "--steps", 1, "-o", "out", "--original-size")
    assert (status, err) == (0, []) and [line.split(":")[0] for line in out] == [
        "wrote out/large_dog.png",
        "wrote out/wide_dog.png",
    ]
    assert pixels("out/wide_dog.png").shape == (97, 151, 3) and pixels("out/large_dog.png").shape == (280, 300, 3)
    assert p2pz_("edit", "photos", *CAT_TO_DOG[:4], "--steps", 1, "-o", "small", "--quiet") == (0, [], [])
    assert pixels("small/large_dog.png").shape == (124, 132, 3)


def test_direction_from_embeddings(p2pz_, model):
    states = model.encode_text(["a cat", "a sleeping cat"]), model.encode_text(["a dog"])
    for name, side in zip(("cat.pt", "dog.pt"), states, strict=True):
        torch.save(side, name)
    files = ("--source-embeddings", "cat.pt", "--target-embeddings", "dog.pt")
    assert p2pz_("direction", *files, *CAT_TO_DOG[:4], "-o", "d.safetensors")[0] == 0
    made = p2pz.Direction.load("d.safetensors")
    assert torch.equal(made.states, states[1][0] - states[0].mean(0)) and made.words == "cat -> dog"


def test_info(p2pz_, model):
    status, out, err = p2pz_("info")
    assert (status, err) == (0, [])
    facts = {line[:13].strip(): line[14:] for line in out}
    assert facts["model"] == str(MINI_FOLDER) and facts["family"] == "the bundled model's"
    count = sum(parameter.numel() for parameter in model.unet.parameters())
    size = os.path.getsize(MINI_FOLDER / "unet" / "diffusion_pytorch_model.safetensors") / 2**20
    assert facts["unet"].startswith(f"{count / 1e6:.1f} M parameters, ") and facts["unet"].endswith(
        f"F16, {size:.0f} MiB"
    )
    assert "128 x 128 pixels" in facts["trained at"] and model.text_fingerprint in facts["text states"]
    text = r"about 0\.\d GiB in float16, eight at once \d\.\d; 0\.0\d of host .*; with --max-memory \d\.\d"
    assert re.search(text, facts["memory"])


def test_quiet_says_nothing(p2pz_):
    assert p2pz_("edit", "cat.png", *CAT_TO_DOG, "--quiet") == (0, [], [])
    assert p2pz_("sample", "a cat", "-o", "a.png", "--steps", 1, "--quiet") == (0, [], [])


def test_dtype_reaches_the_model(p2pz_, monkeypatch):
    asked = {}
    monkeypatch.setattr(p2pz, "load", lambda source, **settings: asked.update(settings, source=source) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # also: a mistake of ours is not reported as the user's
        p2pz_("sample", "a", "-o", "a.png", "--model", "some/folder", "--dtype", "bfloat16", "--device", "cpu")
    assert asked["source"] == "some/folder" and asked["dtype"] == torch.bfloat16 and str(asked["device"]) == "cpu"


# --- help and wrong arguments ---


def test_help_is_quick_and_has_examples():
    script = (
        "import sys\nfrom p2pz.cli import main\n"
        "for arguments in [], *([name] for name in sys.argv[1:]):\n"
        "    try: main([*arguments, '--help'])\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *COMMANDS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("\nexample: p2pz ") == 7 and all(
        f"example: p2pz {name} " in done.stdout for name in COMMANDS
    )
    assert len(re.findall(r"^usage: p2pz", done.stdout, re.M)) == 7


def test_version_and_choices(p2pz_):
    assert p2pz_("--version") == (0, [f"p2pz {p2pz.__version__}"], [])
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in cli.DTYPES)


EDIT = ("edit", "cat.png", "--from", "cat", "--to", "dog")
SAMPLE = ("sample", "a cat", "-o", "a.png")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "required: COMMAND"),
        (("paint",), "invalid choice: 'paint'"),
        (("edit",), "required: IMG"),
        (("edit", "cat.png"), "give --from and --to, or --direction"),
        (("edit", "cat.png", "--from", "cat"), "give --from and --to, or --direction"),
        ((*EDIT, "--direction", "d.safetensors"), "give --from and --to, or --direction"),
        ((*EDIT, "--steps", "0"), "--steps: must be a whole number from 1 to 999, not '0'"),
        ((*EDIT, "--steps", "1000"), "--steps: must be a whole number from 1 to 999, not '1000'"),
        ((*EDIT, "--steps", "2.5"), "--steps: must be a whole number"),
        ((*EDIT, "--seed", "-1"), "--seed: must be a whole number"),
        ((*EDIT, "--seed", str(2**32)), "--seed: must be a whole number"),
        ((*EDIT, "--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
        ((*EDIT, "--preset", "mine"), "--preset: invalid choice: 'mine'"),
        ((*EDIT, "--guidance", "much"), "--guidance: invalid float value: 'much'"),
        ((*EDIT, "--unknown"), "unrecognized arguments: --unknown"),
        (("sample", "a cat"), "required: -o/--out"),
        ((*SAMPLE, "--size", "64"), "--size: must be width and height such as 512x768"),
        ((*SAMPLE, "--count", "0"), "--count: must be a whole number from 1"),
        (("invert", "cat.png"), "required: -o/--out"),
        (("direction", "--from", "cat", "-o", "d.safetensors"), "give --from and --to, or --source-sentences"),
        (("direction", "--source-sentences", "a.txt", "-o", "d.safetensors"), "give --from and --to"),
        (("direction", "--source-embeddings", "a.pt", "-o", "d.safetensors"), "give --from and --to"),
        (("direction", *EDIT[2:], "--target-embeddings", "a.pt", "-o", "d.safetensors"), "give --from and --to"),
        ((*EDIT, "--batch-size", "0"), "--batch-size: must be a whole number from 1"),
    ],
)
def test_wrong_arguments_are_a_usage_and_an_error_line(argv, message, p2pz_, no_work):
    status, out, err = p2pz_(*argv)
    assert (status, out, len(err)) == (2, [], 2)
    assert err[0].startswith("usage: p2pz") and re.match(r"p2pz( \w+)?: error: ", err[1]) and message in err[1]


def write_inputs():
    """Files that no command can use."""
    with open("cat.png", "rb") as whole, open("truncated.png", "wb") as truncated:
        truncated.write(whole.read()[:900])
    with open("text.png", "w") as file:
        file.write("hello")
    with open("empty.txt", "w") as file:
        file.write("\n \n")
    with open("text.safetensors", "w") as file:
        file.write("hello, this is no safetensors file")
    with open("a.txt", "w") as file:
        file.write("a cat")
    Image.new("RGB", (1, 1)).save("dot.png")
    Image.new("RGB", (400, 20)).save("strip.png")
    os.mkdir("folder")
    os.mkdir("folder.png")
    os.mkdir("sheets")
    for name in ("cat_dog.png", "sheets/steps.png"):
        shutil.copy("cat.png", name)
    p2pz.Direction(torch.zeros(77, 128), "cat", "dog", (1, 1), "0" * 16).save("foreign.safetensors")
    p2pz.Inversion(torch.zeros(4, 32, 32), torch.zeros(4, 32, 32), "a", 2, "0" * 16).save("inversion.safetensors")


TO_DOG = ("--from", "cat", "--to", "dog")
DIRECTION = ("direction", "-o", "d.safetensors")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("edit", "missing.png", *TO_DOG), "image missing.png does not exist"),
        (("edit", "truncated.png", *TO_DOG), "image truncated.png cannot be read"),
        (("edit", "text.png", *TO_DOG), "image text.png cannot be read"),
        (("edit", "dot.png", *TO_DOG), "1 x 1 pixels"),
        (("edit", "strip.png", *TO_DOG), "400 x 20 pixels"),
        (("edit", "folder", *TO_DOG), "folder folder has no images"),
        (("edit", ".", *TO_DOG), "the edits would be among the images in ."),
        (("edit", "cat.safetensors", "--original-size", *TO_DOG), "does not know the size of its image"),
        (("edit", "missing.safetensors", *TO_DOG), "inversion missing.safetensors does not exist"),
        (("edit", "text.safetensors", *TO_DOG), "inversion text.safetensors cannot be read"),
        (("edit", "foreign.safetensors", *TO_DOG), "no inversion that p2pz saved"),
        (("edit", "cat.png", "--direction", "missing.safetensors"), "direction missing.safetensors does not exist"),
        (("edit", "cat.png", "--direction", "text.safetensors"), "direction text.safetensors cannot be read"),
        (("edit", "cat.png", "--direction", "inversion.safetensors"), "no direction that p2pz saved"),
        ((*EDIT, "--guidance", "nan"), "guidance must be zero or more"),
        ((*EDIT, "--xa-guidance", "-1"), "xa_guidance must be zero or more"),
        ((*EDIT, "--preset", "authors", "--steps", "2"), "steps must be a whole number from 3 to 999"),
        ((*EDIT, "-o", "missing/out.png"), "the folder missing does not exist"),
        ((*EDIT, "-o", "out.txt"), "cannot save an image as out.txt"),
        ((*EDIT, "-o", "out"), "cannot save an image as out"),
        ((*EDIT, "-o", "cat.png"), "would replace the image itself"),
        ((*EDIT, "-o", "a.txt/"), "cannot create the folder a.txt"),
        (("edit", "cat.png", "dot.png", *TO_DOG, "-o", "out.png"), "out.png is a file name"),
        (("edit", "cat.png", "dot.png", *TO_DOG, "-o", "a.txt"), "cannot create the folder a.txt"),
        (("edit", "cat.png", "sub/cat.png", *TO_DOG, "-o", "out"), "would be written to out/cat_png_dog.png"),
        ((*SAMPLE, "--guidance", "inf"), "guidance must be zero or more"),
        (
            ("edit", "cat.png", "cat_dog.png", *TO_DOG, "-o", ".", "--overwrite"),
            "which is to be edited too",
        ),
        (("edit", "", *TO_DOG), "the path for images is empty"),
        (("edit", "cat.png", *TO_DOG, "-o", ""), "the path for out is empty"),
        ((*SAMPLE, "--model", ""), "the path for model is empty"),
        (("maps", "missing.png", "-o", "new"), "image missing.png does not exist"),
        (("maps", "cat.png", "-o", "sheets"), "steps.png exists: give another -o, or --overwrite"),
        (("maps", "sheets/steps.png", "-o", "sheets", "--overwrite"), "would replace sheets/steps.png itself"),
        (("sample", "a", "-o", "missing/a.png"), "the folder missing does not exist"),
        (("sample", "a", "b", "-o", "out.png"), "out.png is a file name"),
        (("invert", "missing.png", "-o", "a.safetensors"), "image missing.png does not exist"),
        (("invert", "cat.png", "-o", "a.png"), "ends in .safetensors"),
        (("invert", "cat.png", "-o", "missing/a.safetensors"), "the folder missing does not exist"),
        ((*DIRECTION, "--source-sentences", "empty.txt", "--target-sentences", "a.txt"), "no source sentences"),
        ((*DIRECTION, "--source-sentences", "a.txt", "--target-sentences", "empty.txt"), "no target sentences"),
        ((*DIRECTION, "--source-sentences", "no.txt", "--target-sentences", "a.txt"), "sentences cannot be read"),
        ((*DIRECTION, "--source-sentences", "cat.png", "--target-sentences", "a.txt"), "sentences cannot be read"),
        (("direction", *TO_DOG, "-o", "d.png"), "ends in .safetensors"),
    ],
)
def test_what_needs_no_model_is_one_line_before_any_work(argv, message, p2pz_, no_work):
    write_inputs()
    before = sorted(os.listdir())
    status, out, err = p2pz_(*argv)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("p2pz: error: ") and message in err[0]
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("edit", "cat.png", "--from", "cat", "--to", " cat"), 'from "cat" to itself'),
        (("edit", "cat.png", "--from", "", "--to", "cat"), "needs two concepts"),
        (("edit", "cat.png", "--direction", "foreign.safetensors"), "another text encoder"),
        (("edit", "inversion.safetensors", *TO_DOG), "made with another model"),
        ((*EDIT, "--model", "missing"), "model missing does not exist"),
        ((*EDIT, "--model", "cat.png"), "cat.png "),
        ((*EDIT, "--model", "folder"), "is missing: a checkpoint folder in the diffusers layout has it"),
        ((*EDIT, "--device", "abacus"), "device must be cpu, cuda or cuda:N, not 'abacus'"),
        ((*EDIT, "--device", "cuda:99"), "there is no device cuda:99: PyTorch finds "),
        ((*SAMPLE, "--size", "64x66"), "multiples of 4, not (64, 66)"),
        ((*SAMPLE, "--size", "16x64"), "from 32 to 4096"),
        ((*SAMPLE, "--size", "99996x64"), "from 32 to 4096"),
        (("direction", "--from", "cat", "--to", "cat", "-o", "d.safetensors"), 'from "cat" to itself'),
        ((*DIRECTION, *TO_DOG, "--language-model", "folder"), "language model folder cannot be loaded"),
        ((*DIRECTION, "--source-embeddings", "a.pt", "--target-embeddings", "b.pt"), "embeddings a.pt do not exist"),
        ((*EDIT, "--captioner", "missing"), "captioner missing does not exist"),
        (("info", "missing"), "model missing does not exist"),
        (("sample", "caf\udce9", "-o", "a.png"), "this text is not valid Unicode (UTF-8): 'caf\\udce9'"),
        ((*EDIT, "--prompt", "caf\udce9"), "this text is not valid Unicode"),
        (("edit", "cat.png", "--from", "caf\udce9", "--to", "tea"), "this text is not valid Unicode"),
        (("maps", "cat.png", "-o", "folder.png", "--prompt", "caf\udce9"), "this text is not valid Unicode"),
    ],
)
def test_what_only_the_model_shows_is_one_line_too(argv, message, p2pz_):
    write_inputs()
    before = sorted(os.listdir())
    status, out, err = p2pz_(*argv)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("p2pz: error: ") and message in err[0]
    assert sorted(os.listdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(p2pz_):
    assert p2pz_(*EDIT, "--device", "cuda")[::2] == (
        2,
        ["p2pz: error: there is no device cuda: PyTorch finds no GPU"],
    )


def spoil_tensors(change):
    def spoil(folder):
        path = folder / "unet/diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        path.unlink()
        save_file(tensors, path)

    return spoil


def spoil_config(folder):
    path = folder / "unet/config.json"
    config = json.loads(path.read_text()) | {"act_fn": "gelu"}
    path.unlink()
    path.write_text(json.dumps(config))


def pickle_only(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_tensors(lambda tensors: tensors.pop("conv_in.bias")), "1 tensors missing (conv_in.bias)"),
        (
            spoil_tensors(lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)})),
            "1 tensors of another shape (conv_in.bias (3,) instead of (64,))",
        ),
        (spoil_config, "its act_fn is gelu"),
        (pickle_only, "only diffusion_pytorch_model.bin, a pickle file"),
    ],
)
def test_broken_model_folders_are_one_line(spoil, message, p2pz_, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MINI_FOLDER, folder, copy_function=os.symlink)
    spoil(folder)
    status, out, err = p2pz_(*EDIT, "--model", folder)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("p2pz: error: ") and message in err[0]


def test_bench_runs_a_script_with_its_options(p2pz_, monkeypatch):
    ran = []
    monkeypatch.setattr(
        cli.subprocess, "run", lambda command: ran.append(command) or subprocess.CompletedProcess([], 3)
    )
    assert p2pz_("bench", "kernels", "--out", "results", "--quick")[0] == 3  # the script's own status
    python, script, *options = ran[0]
    assert python == sys.executable and Path(script).is_file() and options == ["--out", "results", "--quick"]
    assert {Path(script).with_stem(name).is_file() for name in cli.BENCHES} == {True}


def test_bench_without_the_repository(p2pz_, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "p2pz" / "cli.py"))
    status, _, err = p2pz_("bench", "kernels")
    assert status == 2 and len(err) == 1 and "not installed with p2pz: run it in a clone" in err[0]


# --- warnings, interruptions, whole processes ---


def test_warnings_are_one_line_with_the_image(p2pz_):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save("noise.png")
    status, out, err = p2pz_("edit", "noise.png", *CAT_TO_DOG, "--prompt", "a cat " * 60)
    assert status == 0 and len(out) == 1 and len(err) == 3
    assert err[0].startswith("p2pz: warning: noise.png: only the first 75 tokens count of: a cat a cat")
    assert re.match(r"p2pz: warning: noise.png: the bundled model knows only .* at \d+\.\d dB", err[1])
    assert re.match(r"p2pz: warning: noise.png: the autoencoder lost the image, .* at \d+\.\d dB only", err[2])


@pytest.mark.parametrize("name", ["out.png", "out"])
@pytest.mark.parametrize("old", [b"old", None])
def test_interrupted_work_leaves_nothing_behind(name, old, p2pz_, monkeypatch, tmp_path):
    """Ctrl-C in the second step of an edit, and in the middle of writing the file."""
    steps = []

    def step(*args):
        steps.append(args)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return ddim_step(*args)

    def save(self, path, *args, **kwargs):
        if isinstance(path, io.BytesIO):  # a trial whether the format can be written
            return
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    folder = tmp_path / "results"
    (folder / "out").mkdir(parents=True)
    if old:
        (folder / "out.png").write_bytes(old)
    ddim_step = editing.ddim_step
    for target, attribute, replacement in ((editing, "ddim_step", step), (Image.Image, "save", save)):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, replacement)
            status, out, err = p2pz_("edit", "cat.png", *CAT_TO_DOG, "-o", folder / name)
        assert (status, out, err) == (130, [], ["p2pz: interrupted"])
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert [path.read_bytes() for path in files] == ([old] if old else [])
    assert len(steps) == 2


def test_process_edits_without_a_word_on_stderr():
    done = in_process("edit", "cat.png", *CAT_TO_DOG, "-o", "out.png")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith('wrote out.png: "a photo of ')
    assert pixels("out.png").shape == (128, 128, 3)


def test_process_reads_the_environment_and_fails_with_one_line():
    done = in_process(*EDIT, "--steps", "1", P2PZ_MODEL="elsewhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("p2pz: error: model elsewhere does not exist") and done.stderr.count("\n") == 1


def test_ctrl_c_ends_a_process_with_one_line():
    script = (
        "import os, signal, sys\nfrom p2pz import cli, sampling\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sampling.denoising_schedule = lambda steps: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(cli.main(['sample', 'a cat', '-o', 'out.png']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "p2pz: interrupted\n")
    assert os.listdir() == ["cat.png"]
