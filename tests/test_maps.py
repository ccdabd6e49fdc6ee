"""Words and their tokens, means of maps, colours that everybody can tell apart, sheets, and principal components."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import p2pz
from p2pz import cli, maps
from p2pz.attention import Site, plain
from p2pz.changes import where
from p2pz.images import psnr
from p2pz.recording import Recorded
from p2pz.tokens import places_of, words_of
from p2pz.weights import MINI_FOLDER, mini_world

PATHS = [f"up_blocks.{i}.attentions.0.transformer_blocks.0.attn2" for i in range(2)]
SIZES = [(2, 3), (4, 6)]
TOKENS = (0, 3, 5)


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def scene():
    """A picture and its subject's mask."""
    source = mini_world.task_pair("cat->dog", 0)[0]
    return Image.fromarray(np.asarray(mini_world.render(source))), np.asarray(mini_world.subject_mask(source))


def recorded(heads=0, steps=(0, 2, 3), branches=("edit", "reference"), prompt="a b"):
    """Random maps of two layers."""
    own = {}
    for branch in branches:
        shapes = [(len(steps), *([heads] if heads else []), h * w, len(TOKENS)) for h, w in SIZES]
        own[branch, "conditional"] = dict(zip(PATHS, map(torch.rand, shapes), strict=True))
    sites = {path: Site(path, "cross", *size, heads or 2) for path, size in zip(PATHS, SIZES, strict=True)}
    return Recorded(own, sites, steps, tuple(range(len(steps))), TOKENS, prompt)


# Words.


def test_words_and_their_places(model):
    prompt = "a photo of an orange cat, on the beach"
    words = words_of(model, prompt)
    assert [word for word, _ in words] == ["a", "photo", "of", "an", "orange", "cat", ",", "on", "the", "beach"]
    assert [place for _, places in words for place in places] == list(range(1, 11))
    assert places_of(model, prompt, "orange cat") == [5, 6]
    split = words_of(model, "a pterodactyl cat")
    assert [word for word, _ in split] == ["a", "pterodactyl", "cat"] and len(split[1][1]) > 1
    assert places_of(model, "a pterodactyl cat", "pterodactyl") == list(split[1][1])
    assert places_of(model, "a cat near a cat", "a") == [1, 4]
    assert words_of(model, "") == []
    assert [word for word, _ in words_of(model, "café 猫")] == ["café", "猫"]
    long = words_of(model, "cat " * 200)
    assert len(long) == 75 and long[-1] == ("cat", (75,))
    with pytest.raises(ValueError, match='does not contain "dog"'):
        places_of(model, prompt, "dog")


# Means.


@pytest.mark.parametrize("heads", [0, 2])
def test_a_heat_map_is_the_mean_of_all(heads):
    run = recorded(heads)
    means = [x[..., 1:].unflatten(-2, size) for x, size in zip(run.of("edit").values(), SIZES, strict=True)]
    means = [x.mean(-1).flatten(0, -3).mean(0) for x in means]
    coarse = F.interpolate(means[0][None, None], (4, 6), mode="bilinear")[0, 0]
    torch.testing.assert_close(maps.heat_map(run, [3, 5]), (coarse + means[1]) / 2)
    torch.testing.assert_close(maps.heat_map(run, [5, 3], layers="up_blocks.0"), means[0])
    torch.testing.assert_close(maps.heat_map(run, [3, 5], layers=where(positions=(7, 99))), means[1])
    fine = run.of("reference")[PATHS[1]][[2, 0]].unflatten(-2, SIZES[1])[..., 0].flatten(0, -3).mean(0)
    torch.testing.assert_close(maps.heat_map(run, [0], "reference", layers="up_blocks.1", steps=[3, 0]), fine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"places": [3, 4, 6]}, "the maps have no tokens 4, 6; recorded: 0, 3, 5"),
        ({"places": []}, "the maps have no tokens"),
        ({"places": [0], "steps": [1]}, "the maps have no steps 1; recorded: 0, 2, 3"),
        ({"places": [0], "layers": "mid_block"}, "none of the recorded layers is 'mid_block': up_blocks.0"),
        ({"places": [0], "branch": "sample"}, "there are no maps of sample conditional"),
    ],
)
def test_what_was_not_recorded_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        maps.heat_map(recorded(), **arguments)


def test_a_word_looks_at_its_thing(model, scene):
    """The cat's map is on the cat; that of "a photo", which the background belongs to, is not."""
    picture, mask = scene
    recorder = p2pz.record()
    options = {"prompt": "a photo of a black cat in a meadow", "steps": 4, "progress": False, "record": recorder}
    p2pz.invert(picture, model=model, **options)
    (run,) = recorder.runs
    shares = {}
    for word in ("cat", "photo"):
        heat = maps.heat_map(run, places_of(model, run.prompt, word))
        heat = F.interpolate(heat[None, None], mask.shape, mode="bilinear")[0, 0].numpy()
        shares[word] = heat[mask].mean() / heat[~mask].mean()
    assert shares["cat"] > 1.4 and shares["photo"] < 1


# Colours.


def luminance(colours):
    """Relative luminance of sRGB colours `[..., 3]`. Source: IEC 61966-2-1."""
    linear = np.asarray(colours, float) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_colours_can_be_told_apart_without_hues():
    ramp = np.asarray(maps.colour(torch.linspace(-0.1, 1.1, 121)[None]))[0]
    assert (np.diff(luminance(ramp[10:111])) > 0).all()
    assert tuple(ramp[0]) == maps.RAMP[0] and tuple(ramp[-1]) == maps.RAMP[-1]
    assert luminance(maps.RAMP[0]) < 0.02 and luminance(maps.RAMP[-1]) > 0.8
    low, high = (np.asarray(maps.colour(torch.linspace(0.5, end, 50)[None], maps.DIFFERENCE_RAMP))[0] for end in (0, 1))
    assert (np.diff(luminance(low)) < 0).all() and (np.diff(luminance(high)) < 0).all()
    assert low[-1][2] > 2 * low[-1][0] and high[-1][0] > 2 * high[-1][2]  # blue, and orange


def test_an_overlay_shows_where(scene):
    heat = torch.zeros(4, 6)
    heat[1, 4] = 0.25
    picture = scene[0].resize((96, 64))
    laid = np.asarray(maps.overlay(picture, heat), float)
    assert laid.shape == (64, 96, 3)
    y, x = np.unravel_index(laid[..., 1].argmax(), (64, 96))
    assert 16 <= y < 32 and 64 <= x < 80
    half = np.asarray(maps.overlay(picture, heat, largest=0.5), float)
    assert laid[24, 72].sum() > half[24, 72].sum() > laid[60, 4].sum()
    signed = np.asarray(maps.overlay(picture, heat - heat.flip(1), ramp=maps.DIFFERENCE_RAMP), float)
    assert signed[24, 72, 0] > signed[24, 72, 2] + 50 and signed[24, 24, 2] > signed[24, 24, 0] + 50
    assert maps.overlay(picture, torch.zeros(2, 2)).size == (96, 64)  # no division by zero


# Sheets.


def tile_of(sheet, row, column, left, rows_above=None):
    """Pixels of a tile: square ones, below a title and a line of text."""
    line = maps.FONT_SIZE + 6
    y = line + row * (maps.TILE + line) + line
    x = left + column * (maps.TILE + 4)
    return np.asarray(sheet)[y : y + maps.TILE, x : x + maps.TILE]


def test_a_sheet_has_every_picture_under_its_text():
    colours = ["red", "lime", "blue", "white"]
    tiles = [("x" * 99 if colour == "lime" else colour, Image.new("RGB", (32, 32), colour)) for colour in colours]
    sheet = maps.sheet([tiles[:3], tiles[3:]], ["first", "second"], "title", "legend")
    left = sheet.width - 3 * (maps.TILE + 4)
    assert 20 < left < 80
    for i, colour in enumerate(colours):
        found = tile_of(sheet, i // 3, i % 3, left)
        assert (found == np.asarray(Image.new("RGB", (1, 1), colour))).all()
    pixels = np.asarray(sheet).min(-1)
    line = maps.FONT_SIZE + 6
    assert (pixels[:line, :50] < 128).any() and (pixels[line : 2 * line, left : left + 30] < 128).any()
    assert (pixels[line:-line, : left - 6] < 128).any() and (pixels[-line:, left + 66 :] < 128).any()
    beside = left + 2 * maps.TILE + 4
    assert (pixels[line : 2 * line, beside : beside + 4] == 255).all()  # long text is cut to its tile
    assert maps.sheet([tiles[:1]]).size == (4 + maps.TILE + 4, 4 + line + maps.TILE + 4)
    assert maps.sheet([tiles[:1]], title="w" * 100).width > 500


def test_words_steps_and_resolutions(scene):
    """Each in its own tile, bright where that word looks in those steps and layers."""
    run = recorded(prompt="one two three", branches=("sample",))
    for path, size in zip(PATHS, SIZES, strict=True):
        own = run.of("sample")[path]
        own *= 1e-3
        own[:, : size[1], 1] = 1.0  # the second token looks at the top row
        own[2, -size[1] :, 2] = 1.0 if path == PATHS[1] else 1e-3  # the third at the bottom, late and in the fine layer
    words = [("one", (0,)), ("two", (3,)), ("three", (5,))]
    picture = scene[0]

    def bright(tile, where):
        rows = {"top": slice(0, 32), "bottom": slice(96, 128)}[where]
        return tile[rows].astype(float)[..., 1].mean() - tile[48:80].astype(float)[..., 1].mean() > 30

    sheet = maps.word_sheet(run, picture, words)
    assert bright(tile_of(sheet, 0, 1, 4), "top") and not bright(tile_of(sheet, 0, 1, 4), "bottom")
    assert bright(tile_of(sheet, 0, 2, 4), "bottom") and not bright(tile_of(sheet, 0, 0, 4), "top")

    sheet = maps.step_sheet(run, picture, words, columns=3)
    left = sheet.width - 3 * (maps.TILE + 4)
    assert all(bright(tile_of(sheet, 1, i, left), "top") for i in range(3))
    assert [bright(tile_of(sheet, 2, i, left), "bottom") for i in range(3)] == [False, False, True]

    sheet = maps.resolution_sheet(run, picture, words)
    left = sheet.width - 2 * (maps.TILE + 4)
    assert [bright(tile_of(sheet, 2, i, left), "bottom") for i in range(2)] == [False, True]
    assert [bright(tile_of(sheet, 1, i, left), "top") for i in range(2)] == [True, True]


def test_a_comparison_shows_what_became_more_and_less(scene):
    run = recorded(prompt="one")
    for branch, part in (("reference", slice(None, 1)), ("edit", slice(-1, None))):
        for path, size in zip(PATHS, SIZES, strict=True):
            own = run.of(branch)[path].unflatten(1, size)
            own.zero_()
            own[:, part, :, 0] = 0.5
    before, after = scene[0], scene[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sheet = maps.comparison_sheet(run, before, after, [("one", (0,))])
    left = sheet.width - 3 * (maps.TILE + 4)
    assert (tile_of(sheet, 0, 0, left) == np.asarray(before)).all()
    assert (tile_of(sheet, 0, 1, left) == np.asarray(after)).all()
    change = tile_of(sheet, 1, 2, left).astype(float)
    assert (change[:20, :, 2] > change[:20, :, 0] + 30).mean() > 0.9  # less at the top: blue
    assert (change[-20:, :, 0] > change[-20:, :, 2] + 30).mean() > 0.9  # more at the bottom: orange


# Self-attention.


def test_principal_components_are_those_of_the_covariance():
    scales = torch.tensor([9.0, 1.0, 0.1, 4.0, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64).view(2, 4)
    states = torch.randn(2, 12, 2, 4, dtype=torch.float64) * scales
    pictures = maps.principal_components(states.float(), 3, 4)
    assert [picture.size for picture in pictures] == [(4, 3)] * 2
    flat = states.reshape(24, 8) - states.reshape(24, 8).mean(0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    values = flat @ directions[:3].T
    found = np.stack([np.asarray(picture) for picture in pictures]).reshape(24, 3)
    for i in range(3):
        assert abs(np.corrcoef(found[:, i], values[:, i])[0, 1]) > 0.98
        assert found[:, i].min() == 0 and found[:, i].max() == 255  # one scale for both pictures
    for _ in range(8):  # the channels' order does not matter, nor does the sign that a direction happens to have
        again = maps.principal_components(states.flatten(2)[..., torch.randperm(8)].float(), 3, 4)
        assert all(psnr(a, b) > 40 for a, b in zip(pictures, again, strict=True))
    assert maps.principal_components(torch.randn(1, 6, 2), 2, 3)[0].size == (3, 2)  # fewer than three channels
    assert np.asarray(maps.principal_components(torch.ones(1, 6, 5), 2, 3)[0]).max() == 0  # all alike


def test_kept_states_are_what_the_layer_saw(model, scene):
    """And their components tell the cat from the meadow."""
    seen, kept = {}, {}

    def note(q, k, v, site):
        seen[site] = q, k, v
        return plain(q, k, v, site)

    keep = maps.keep_states(kept, "up_blocks.1", what="q", steps=[1, 3])
    options = {"prompt": "a photo of a cat", "steps": 4, "progress": False, "model": model}
    p2pz.invert(scene[0], attend=lambda *arguments: keep(*arguments, attend=note), **options)
    assert len(kept) == 4 and {site.kind for site in kept} == {"self"} and {site.step for site in kept} == {1, 3}
    assert all(torch.equal(states, seen[site][0]) for site, states in kept.items())
    first, second = [site for site in kept if "attentions.0" in site.path]
    pictures = maps.principal_components(torch.cat([kept[first], kept[second]]), 16, 16)
    mask = np.asarray(Image.fromarray(scene[1]).resize((16, 16), Image.Resampling.NEAREST))
    for picture in pictures:
        pixels = np.asarray(picture, float)
        assert np.abs(pixels[mask].mean(0) - pixels[~mask].mean(0)).max() > 60
    assert maps.state_sheet(kept).height > 2 * maps.TILE
    with pytest.raises(ValueError, match="what must be q, k or v, not 'out'"):
        maps.keep_states(kept, "", what="out")


def test_guiding_passes_are_not_kept(model, scene):
    kept = {}
    keep = maps.keep_states(kept, where("mid_block"))
    result = p2pz.edit(scene[0], "cat->dog", model=model, steps=2, attend=keep, progress=False)
    assert {(site.branch, site.step, site.guiding) for site in kept} == {
        (branch, step, False) for branch in ("edit", "reference") for step in (0, 1)
    }
    assert result.image.size == (128, 128)


# The command.


def test_the_command_draws_an_image_and_an_edit(scene, tmp_path, capsys):
    scene[0].save(tmp_path / "cat.png")
    prompt = "a photo of a black cat"
    common = ["maps", str(tmp_path / "cat.png"), "--prompt", prompt, "--steps", "3", "--device", "cpu"]
    sheets = {"words.png", "steps.png", "resolutions.png", "self_attention.png"}
    assert cli.main([*common, "-o", str(tmp_path / "image")]) == 0
    assert f'wrote {tmp_path / "image"}: "{prompt}", 4 pictures and the maps' in capsys.readouterr().out
    run = Recorded.load(tmp_path / "image" / "maps.safetensors")
    assert (run.prompt, run.tokens, list(run.maps)) == (prompt, tuple(range(1, 7)), [("inversion", "conditional")])
    assert {path.name for path in (tmp_path / "image").iterdir()} == {*sheets, "maps.safetensors"}
    again = maps.word_sheet(run, scene[0], [(word, (i,)) for i, word in enumerate(prompt.split(), start=1)])
    assert (np.asarray(Image.open(tmp_path / "image" / "words.png")) == np.asarray(again)).all()

    assert cli.main([*common, "--from", "cat", "--to", "dog", "-o", str(tmp_path / "edit"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    run = Recorded.load(tmp_path / "edit" / "maps.safetensors")
    assert set(run.maps) == {("edit", "conditional"), ("reference", "conditional")} and len(run.steps) == 3
    files = {*sheets, "edit.png", "comparison.png", "maps.safetensors"}
    assert {path.name for path in (tmp_path / "edit").iterdir()} == files
    assert Image.open(tmp_path / "edit" / "edit.png").size == (128, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cat.png", "--from", "cat", "-o", "out"], "give both --from and --to, or neither"),
        (["no.png", "-o", "out"], "image no.png does not exist"),
        (["cat.png", "-o", "cat.png"], "several pictures need a folder, and cat.png is a file name"),
        (["cat.png", "--prompt", " ", "-o", "out"], "the caption has no words: give a --prompt"),
    ],
)
def test_the_command_says_what_is_wrong(scene, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scene[0].save("cat.png")
    try:
        assert cli.main(["maps", *arguments, "--device", "cpu"]) == 2
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err
