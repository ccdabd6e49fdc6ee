"""The runner of PIE-Bench, on two images in its layout: masks, captions, resuming, and the table."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

import p2pz
from p2pz import metrics
from p2pz.weights import MINI_FOLDER, mini_world

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "pie_bench.py"
spec = importlib.util.spec_from_file_location("pie_bench", SCRIPT)
pie_bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pie_bench)

FIRST, SECOND = "111000000000", "924000000002"
LEFT_HALF = [number for row in range(512) for number in (row * 512, 256)]
PLAIN_COLUMNS = {"psnr", "mse", "ssim", "background_psnr", "background_mse", "background_ssim"}


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path):
    """Two images as PIE-Bench has them; the second one's mask covers everything."""
    entries = {
        FIRST: ("1_change_object_80/1_artificial/1_animal", "a photo of a [cat]", "a photo of a [dog]", "1", LEFT_HALF),
        SECOND: ("9_change_style_80/2_natural", "[a photo of] a cat", "an oil pastel of a cat", "9", [0, 512 * 512]),
    }
    mapping = {}
    for i, (name, (place, source, target, kind, mask)) in enumerate(entries.items()):
        path = tmp_path / "bench" / "annotation_images" / place / f"{name}.jpg"
        path.parent.mkdir(parents=True)
        scene = Image.fromarray(mini_world.render(mini_world.task_pair("cat->dog", i)[0]))
        scene.resize((512, 512), Image.Resampling.BICUBIC).save(path, quality=95)
        mapping[name] = {
            "image_path": f"{place}/{name}.jpg", "original_prompt": source, "editing_prompt": target,
            "editing_instruction": "", "editing_type_id": kind, "blended_word": "cat dog", "mask": mask,
        }  # fmt: skip
    (tmp_path / "bench" / "mapping_file.json").write_text(json.dumps(mapping))
    return tmp_path / "bench"


def change(folder, name, **fields):
    path = folder / "mapping_file.json"
    mapping = json.loads(path.read_text())
    mapping[name].update(fields)
    path.write_text(json.dumps(mapping))


def entry_of(folder, name):
    return pie_bench.read_entry(pie_bench.read_mapping(folder)[name], folder)


def run(folder, *options, method="edit"):
    """Run the script with two steps; its rows, its JSON and its Markdown."""
    out = folder.parent / "out"
    place = ["--model", str(MINI_FOLDER), "--out", str(out), "--method", method]
    pie_bench.main([str(folder), *place, "--steps", "2", *options])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    facts = json.loads((out / "pie_bench.json").read_text(), parse_constant=refuse)
    lines = (out / "results.jsonl").read_text().splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    assert len(rows) == len(lines)
    return rows, facts, (out / "pie_bench.md").read_text()


class Counting:
    """In place of the methods: counts the edits."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name, method in pie_bench.METHODS.items():
            monkeypatch.setitem(pie_bench.METHODS, name, lambda *args, method=method, **kw: self.call(method, args, kw))

    def call(self, method, args, options):
        self.count += 1
        return method(*args, **options)


@pytest.fixture
def edits(monkeypatch):
    return Counting(monkeypatch)


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Folders of a tiny random CLIP and vision transformer."""
    clip, dino = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MINI_FOLDER / "tokenizer")
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}
    CLIPModel(CLIPConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8})).save_pretrained(
        clip
    )
    tokenizer.save_pretrained(clip)
    images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}
    (clip / "preprocessor_config.json").write_text(json.dumps(images))
    ViTModel(ViTConfig(**tower, image_size=224, patch_size=56), add_pooling_layer=False).save_pretrained(dino)
    return ["--clip", str(clip), "--dino", str(dino)]


# Reading the benchmark -----------------------------------------------------------------------------------------------
def test_masks_are_decoded_run_by_run():
    runs = [512 * 3 + 5, 4, 512 * 7 + 510, 6, 512 * 512 - 2, 100]  # within a row, across two rows, beyond the end
    expected = np.zeros((512, 512), bool)
    for start, length in ((512 * 3 + 5, 4), (512 * 7 + 510, 6)):
        for place in range(start, start + length):
            expected[place // 512, place % 512] = True
    for row in range(512):
        for column in range(512):
            expected[row, column] |= row in (0, 511) or column in (0, 511)
    assert np.array_equal(pie_bench.decode_mask(runs), expected)


@pytest.mark.parametrize("runs", [[1, 2, 3], [1.5, 2], [-1, 2], "12", None, {"1": 2}])
def test_other_masks_are_refused(runs):
    with pytest.raises(ValueError, match="starts and lengths"):
        pie_bench.decode_mask(runs)


@pytest.mark.parametrize("side", [128, 120, 512, 768])
def test_a_mask_follows_the_working_size(side):
    mask = np.zeros((512, 512), bool)
    mask[100:300, 37] = mask[411, 411] = True
    fitted = pie_bench.fit_mask(mask, (side, side))
    expected = np.zeros((side, side), bool)
    for row, column in np.argwhere(mask):  # every new pixel that overlaps an old one
        above, below = row * side // 512, -(-(row + 1) * side // 512)
        left, right = column * side // 512, -(-(column + 1) * side // 512)
        expected[above:below, left:right] = True
    assert np.array_equal(fitted, expected)


def test_brackets_are_no_words(folder):
    first, second = entry_of(folder, FIRST), entry_of(folder, SECOND)
    assert (first.source, first.target) == ("a photo of a cat", "a photo of a dog")
    assert (second.source, second.target) == ("a photo of a cat", "an oil pastel of a cat")
    assert first.image.is_file() and (first.kind, second.kind) == ("1", "9")
    assert first.mask[1:-1, 255].all() and not first.mask[1:-1, 256:-1].any() and second.mask.all()


# Editing -------------------------------------------------------------------------------------------------------------
def test_edit_follows_the_direction_between_the_captions(folder, model):
    entry = entry_of(folder, FIRST)
    direction = p2pz.direction(sentences=([entry.source], [entry.target]), model=model)
    picture = Image.open(entry.image)
    expected = p2pz.edit(picture, direction, model=model, prompt="a photo of a cat", steps=2, progress=False).image
    assert np.array_equal(pie_bench.edit_picture(picture, entry, "edit", model, 2), expected)


@pytest.mark.parametrize("method", ["ddim_edit", "prompt_to_prompt", "sdedit"])
@pytest.mark.parametrize(
    ("target", "words"),
    [("a photo of a [dog]", "cat->dog"), ("a photo of a cat [with glasses]", "cat->cat with glasses")],
)
def test_word_swaps_swap_the_whole_caption(folder, model, method, target, words):
    change(folder, FIRST, editing_prompt=target)
    entry = entry_of(folder, FIRST)
    picture = Image.open(entry.image)
    options = {"model": model, "prompt": "a photo of a cat", "steps": 2, "progress": False}
    expected = getattr(p2pz, method)(picture, words, **options).image
    assert np.array_equal(pie_bench.edit_picture(picture, entry, method, model, 2), expected)


# Measuring -----------------------------------------------------------------------------------------------------------
def test_measures_are_pie_benchs_and_of_the_background_alone():
    generator = np.random.default_rng(0)
    source = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    edited = (source + generator.normal(0, 20, source.shape)).clip(0, 255).astype(np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[:, :40] = True
    values = pie_bench.measure(Image.fromarray(source), Image.fromarray(edited), mask, "", {})
    squares = np.square(source / 255 - edited / 255)
    theirs, alone = np.where(mask[..., None], 0, squares).mean(), squares[~mask].mean()
    assert values["mse"] == pytest.approx(theirs) and values["background_mse"] == pytest.approx(alone)
    assert values["psnr"] == pytest.approx(-10 * math.log10(theirs))
    assert values["background_psnr"] == pytest.approx(-10 * math.log10(alone))
    assert values["background_ssim"] == metrics.background_ssim(source, edited, mask)
    assert values["background_ssim"] + 0.01 < values["ssim"] < 1  # black windows are equal
    assert set(values) == PLAIN_COLUMNS
    values = pie_bench.measure(Image.fromarray(source), Image.fromarray(edited), np.ones_like(mask), "", {})
    assert set(values) == PLAIN_COLUMNS and set(values.values()) == {None}


class Reddish:
    """In place of a CLIP: the cosine is a picture's mean of red, less what the sentence says."""

    model = SimpleNamespace(logit_scale=torch.tensor(3.0))

    def similarity(self, pictures, sentences):
        reds = torch.tensor([np.asarray(picture)[..., 0].mean() / 255 for picture in pictures])
        return (reds[:, None] - torch.tensor([float(sentence) for sentence in sentences])) * math.exp(3)


@pytest.mark.parametrize(("sentence", "whole", "part"), [("0", 60, 45), ("0.5", 10, 0)])
def test_clip_is_in_hundredths_of_a_cosine_and_not_negative(sentence, whole, part):
    source, edited = np.zeros((2, 64, 64, 3), np.uint8)
    edited[..., 0] = 153  # 60 % of 255
    mask = np.ones((64, 64), bool)
    mask[:, :16] = False
    values = pie_bench.measure(Image.fromarray(source), Image.fromarray(edited), mask, sentence, {"clip": Reddish()})
    assert values["clip_whole"] == pytest.approx(whole, rel=1e-5)
    assert values["clip_edited"] == pytest.approx(part, rel=1e-5)


def test_a_narrow_background_has_no_ssim_of_its_own():
    source, edited = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    mask = np.ones((64, 64), bool)
    mask[:, 10:20] = False
    values = pie_bench.measure(Image.fromarray(source), Image.fromarray(edited), mask, "", {})
    assert [name for name, value in values.items() if value is None] == ["background_ssim"]


# Whole runs ----------------------------------------------------------------------------------------------------------
class MeanDifference(torch.nn.Module):
    """In place of LPIPS."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, first, second):
        return (self.weight * (first - second).abs()).mean()


def test_a_whole_run(folder, judges, monkeypatch):
    asked = []
    monkeypatch.setattr(metrics, "load_lpips", lambda trunk: asked.append(trunk) or MeanDifference())
    rows, facts, text = run(folder, *judges, "--lpips")
    assert asked == ["squeeze"] and list(rows) == [FIRST, SECOND]
    out = folder.parent / "out"
    edited = Image.open(out / "images" / f"{FIRST}.png")
    assert edited.size == (128, 128)

    # measured again, on its own
    first = rows[FIRST]
    entry = entry_of(folder, FIRST)
    source = Image.open(entry.image).resize((128, 128), Image.Resampling.LANCZOS)
    mask = np.zeros((128, 128), bool)
    mask[:, :64] = mask[[0, -1]] = mask[:, [0, -1]] = True
    dino, clip = metrics.load_dino(judges[3]), metrics.load_clip(judges[1])
    assert first["background_psnr"] == pytest.approx(metrics.background_psnr(source, edited, mask))
    assert first["structure"] == pytest.approx(metrics.structure_distance(source, edited, dino), rel=1e-4)
    assert first["lpips"] == pytest.approx(metrics.background_lpips(source, edited, mask, MeanDifference()), rel=1e-4)
    scale = clip.model.logit_scale.exp().item()
    for name, masks in (("clip_whole", None), ("clip_edited", [mask])):
        cosine = metrics.clip_similarity([edited], ["a photo of a dog"], clip, masks).item() / scale
        assert first[name] == pytest.approx(max(0, 100 * cosine), rel=1e-3)

    # the table
    table = facts["table"]
    assert list(table) == ["all", "1 change object", "9 change style"] and table["all"]["n"] == 2
    pair = [1e3 * row["structure"] for row in rows.values()]
    mean, half = np.mean(pair), 1.96 * np.std(pair, ddof=1) / 2**0.5
    assert table["all"]["structure"] == {"n": 2, "mean": pytest.approx(mean), "ci95": pytest.approx(half)}
    alone = {"n": 1, "mean": pytest.approx(1e2 * first["ssim"]), "ci95": None}
    assert table["all"]["ssim"] == table["1 change object"]["ssim"] == alone
    assert table["9 change style"]["psnr"] == {"n": 0, "mean": None, "ci95": None}
    assert f"| {mean:.2f} ± {half:.2f} | {first['psnr']:.2f} (n = 1) |" in text
    lines = text.splitlines()
    assert next(line for line in lines if line.startswith("| 9 change style")).split(" | ")[1:4:2] == ["1", "-"]
    assert "| pix2pix-zero, DDIM inversion | 61.68 | 20.44 | 172.22 | 22.80 | 20.54 |" in lines
    assert "ICLR 2024" in text and "left out" not in text and "failed" not in text and "2 of 2 images" in text


@pytest.mark.parametrize("method", ["ddim_edit", "prompt_to_prompt", "sdedit"])
def test_every_method_and_a_limit(folder, method):
    rows, facts, text = run(folder, "--limit", "1", method=method)
    assert list(rows) == [FIRST] and 5 < rows[FIRST]["psnr"] < 60
    assert rows[FIRST].keys() == {"id", "type", "settings", "judged_by"} | PLAIN_COLUMNS
    assert facts["settings"] == {"method": method, "model": str(MINI_FOLDER), "steps": 2} == rows[FIRST]["settings"]
    assert (
        "1 of 2 images" in text and "structure x10^3 (needs --dino)" in text and "LPIPS x10^3 (needs --lpips)" in text
    )
    assert "CLIP whole (needs --clip)" in text and set(facts["headings"]) == PLAIN_COLUMNS


def test_a_second_run_does_what_is_missing(folder, edits, judges, monkeypatch):
    run(folder, "--limit", "1")
    assert edits.count == 1
    before = run(folder)
    assert edits.count == 2
    place = folder.parent / "out" / "images" / f"{SECOND}.png"
    written = place.stat().st_mtime_ns
    with monkeypatch.context() as nothing_left_to_do:
        nothing_left_to_do.setattr(pie_bench, "measure", None)
        assert run(folder)[0] == before[0] and edits.count == 2
    rows, facts, _ = run(folder, *judges)  # measures more, and edits nothing
    assert edits.count == 2 and place.stat().st_mtime_ns == written
    assert all(0 < row["structure"] < 4 for row in rows.values()) and "clip_edited" in facts["headings"]
    assert rows[FIRST]["psnr"] == before[0][FIRST]["psnr"]
    for options in (["--steps", "3"], ["--method", "sdedit"]):
        with pytest.raises(SystemExit, match=r"holds results of .*'steps': 2.*give another --out"):
            run(folder, *options)
    assert edits.count == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_path": "none.jpg"}, r"image \S*none\.jpg does not exist"),
        ({"image_path": "../mapping_file.json"}, "cannot be read"),
    ],
)
def test_a_broken_image_is_reported_skipped_and_tried_again(folder, edits, capsys, fields, message):
    whole = json.loads((folder / "mapping_file.json").read_text())[FIRST]
    change(folder, FIRST, **fields)
    rows, facts, text = run(folder)
    assert edits.count == 1 and "psnr" in rows[SECOND] and rows[FIRST].keys() == {"id", "settings", "error"}
    for told in (rows[FIRST]["error"], capsys.readouterr().err, text):
        assert re.search(message, told)
    assert facts["table"]["all"]["n"] == 1 and f"failed: {FIRST}" in text
    change(folder, FIRST, **whole)
    rows, facts, text = run(folder)
    assert edits.count == 2 and facts["table"]["all"]["n"] == 2 and "failed" not in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": [1, 2, 3]}, "the mask is not a list"),
        ({"editing_prompt": "[]"}, "captions is empty"),
        ({"editing_type_id": "10"}, "must be 0 to 9, not 10"),
    ],
)
def test_wrong_fields(folder, fields, message):
    change(folder, FIRST, **fields)
    with pytest.raises(ValueError, match=message):
        entry_of(folder, FIRST)


def test_an_image_without_its_fields(folder):
    mapping = json.loads((folder / "mapping_file.json").read_text())
    del mapping[FIRST]["mask"], mapping[FIRST]["original_prompt"]
    mapping[SECOND] = "nothing"
    with pytest.raises(ValueError, match="does not give its original_prompt, mask"):
        pie_bench.read_entry(mapping[FIRST], folder)
    with pytest.raises(ValueError, match="does not give its image_path"):
        pie_bench.read_entry(mapping[SECOND], folder)


def test_an_interrupted_run_keeps_what_was_done(folder, monkeypatch, edits):
    measure = pie_bench.measure

    def interrupted(*args):
        if edits.count == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(pie_bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    monkeypatch.setattr(pie_bench, "measure", measure)
    rows, _, _ = run(folder)
    assert list(rows) == [FIRST, SECOND] and edits.count == 3  # the second one again


# Bad input -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", [None, "no JSON", "{}", "[1]"])
def test_what_is_no_benchmark_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "mapping_file.json").write_text(content)
    with pytest.raises(SystemExit, match=r"pie_bench: .*give the folder of PIE-Bench") as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit must be 1 or more, not 0"),
        (["--steps", "0"], "steps must be a whole number from 1 to 999, not 0"),
        (["--lpips"], r"pip install 'p2pz\[metrics\]'"),
    ],
)
def test_wrong_options(folder, monkeypatch, options, message):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SystemExit, match=message):
        run(folder, *options)


def test_foreign_results_are_not_overwritten(folder):
    out = folder.parent / "out"
    out.mkdir()
    (out / "results.jsonl").write_text('{"task": "cat->dog"}\n')
    with pytest.raises(SystemExit, match="no result of this benchmark"):
        run(folder)
    assert (out / "results.jsonl").read_text() == '{"task": "cat->dog"}\n'
