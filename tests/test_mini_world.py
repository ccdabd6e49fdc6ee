"""The mini world: determinism, exact masks, captions, held-out pairs."""

import dataclasses
import itertools
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

from p2pz.weights import mini_world as mw

CHECKSUMS = """
import zlib, numpy as np
from p2pz.weights import mini_world as mw
for style in mw.STYLES:
    for seed in range(3):
        print(zlib.crc32(mw.render(mw.random_scene(np.random.default_rng(seed), style=style)).tobytes()))
"""


def scene(seed=0, **fixed):
    return mw.random_scene(np.random.default_rng(seed), **fixed)


def test_images_have_the_promised_form():
    for style in mw.STYLES:
        image = mw.render(scene(style=style))
        assert image.shape == (mw.SIZE, mw.SIZE, 3) and image.dtype == np.uint8
        assert image.std() > 10


def test_same_scene_same_bytes_also_in_other_processes():
    here = [zlib.crc32(mw.render(scene(seed, style=style)).tobytes()) for style in mw.STYLES for seed in range(3)]
    assert here == [
        zlib.crc32(mw.render(scene(seed, style=style)).tobytes()) for style in mw.STYLES for seed in range(3)
    ]
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", CHECKSUMS],
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [int(line) for line in done.stdout.split()] == here


@pytest.mark.parametrize("place", mw.PLACES)
def test_every_value_of_every_field_renders_and_masks_are_sensible(place):
    seen = set()
    for thing in mw.THINGS:
        for number, animal in enumerate(mw.ANIMALS):
            drawn = scene(
                number, place=place, thing=thing, animal=animal, fur=mw.FURS[number % 5], style=mw.STYLES[number % 3],
                accessory=mw.ACCESSORIES[number // 2], hat_colour=mw.HATS[number % 4], blink=number == 1,
            )  # fmt: skip
            seen.add(mw.render(drawn).tobytes())
            mask = mw.subject_mask(drawn)
            assert mask.dtype == bool and mask.shape == (mw.SIZE, mw.SIZE)
            assert 0.05 < mask.mean() < 0.6
    assert len(seen) == len(mw.THINGS) * len(mw.ANIMALS)


@pytest.mark.parametrize(
    "change", [{"animal": name} for name in mw.ANIMALS] + [{"accessory": "glasses"}, {"fur": "grey"}]
)
def test_photo_edits_stay_inside_the_mask(change):
    for seed in range(12):
        source = scene(seed, style="photo", animal="cat", accessory=("none", "hat")[seed % 2], fur="orange")
        target = dataclasses.replace(source, **change)
        changed = (mw.render(source) != mw.render(target)).any(2)
        assert not changed[~mw.edit_mask(source, target)].any()
        assert changed.any() == (source != target)


def test_mask_holds_every_pixel_of_the_subject():
    for seed in range(12):
        source = scene(seed, style="photo", thing="none")
        moved = dataclasses.replace(source, x=128 - source.x, y=source.y - 3)
        changed = (mw.render(source) != mw.render(moved)).any(2)
        assert not changed[~mw.edit_mask(source, moved)].any()


def test_background_does_not_depend_on_the_subject_but_on_its_seed():
    source = scene(4, style="photo", place="meadow")
    other = dataclasses.replace(source, background_seed=source.background_seed + 1)
    assert (mw.render(source) != mw.render(other)).any(2)[~mw.subject_mask(source)].any()


def test_glasses_and_hat_are_worth_looking_at():
    for accessory in ("glasses", "hat"):
        for animal in mw.ANIMALS:
            source = scene(1, style="photo", animal=animal, accessory="none", fur="black")
            target = dataclasses.replace(source, accessory=accessory)
            distance = np.abs(mw.render(source).astype(int) - mw.render(target)).max(2)
            assert (distance > 40).sum() > 80


def test_random_scenes_follow_the_promised_odds_and_places():
    rng = np.random.default_rng(0)
    scenes = [mw.random_scene(rng) for _ in range(1200)]
    for field, names, odds in (("style", mw.STYLES, (0.6, 0.2, 0.2)), ("accessory", mw.ACCESSORIES, (0.5, 0.25, 0.25))):
        counts = [np.mean([getattr(s, field) == name for s in scenes]) for name in names]
        np.testing.assert_allclose(counts, odds, atol=0.04)
    assert all(s.thing in mw.THINGS_IN[s.place] for s in scenes)
    assert scene(thing="window").place == "room"


def test_caption_examples():
    base = scene(animal="cat", fur="grey", accessory="glasses", place="snow", thing="tree", style="photo", blink=False)
    assert mw.caption(base) == "a photo of a grey cat with glasses in the snow near a tree"
    assert mw.caption(base, ()) == "a photo of a cat"
    assert mw.caption(base, ("accessory", "thing")) == "a photo of a cat with glasses near a tree"
    orange = dataclasses.replace(base, fur="orange", accessory="hat", style="oil pastel", place="night", thing="moon")
    assert mw.caption(orange) == "an oil pastel of an orange cat with a hat at night under the moon"
    plain = dataclasses.replace(base, animal="dog", accessory="none", thing="none", style="sketch", place="room")
    assert mw.caption(plain) == "a sketch of a grey dog in a room"


def test_captions_tell_what_is_there_and_nothing_else():
    rng = np.random.default_rng(1)
    told = []
    for _ in range(800):
        drawn = mw.random_scene(rng)
        text = mw.random_caption(drawn, rng)
        words = text.split()
        assert set(words) <= set(mw.VOCABULARY)
        assert text.startswith(mw.STYLE_PHRASES[drawn.style] + " of a")
        assert drawn.animal in words and [w for w in words if w in mw.ANIMALS] == [drawn.animal]
        assert ("glasses" in words, "hat" in words) == (drawn.accessory == "glasses", drawn.accessory == "hat")
        assert all(fur == drawn.fur for fur in words if fur in mw.FURS)
        assert [part for part in mw.THING_PHRASES.values() if part and text.endswith(part)] in (
            [], [mw.THING_PHRASES[drawn.thing]],
        )  # fmt: skip
        assert "none" not in words
        for article, noun in itertools.pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (noun[0] in "aeiou")
        if drawn.animal != "zebra" and drawn.thing != "none":
            phrase = (drawn.fur, mw.PLACE_PHRASES[drawn.place], mw.THING_PHRASES[drawn.thing])
            told.append([part in text for part in phrase])
    np.testing.assert_allclose(np.mean(told, 0), 0.6, atol=0.06)


def test_zebra_captions_never_mention_fur():
    zebra = scene(animal="zebra", fur="orange", place="meadow", thing="none", accessory="none", style="photo")
    assert mw.caption(zebra) == "a photo of a zebra in a meadow"
    grey = dataclasses.replace(zebra, fur="grey")
    assert np.array_equal(mw.render(zebra), mw.render(grey))


def test_vocabulary_is_small_and_sorted():
    assert list(mw.VOCABULARY) == sorted(set(mw.VOCABULARY)) and 40 <= len(mw.VOCABULARY) <= 60


def test_held_out_combinations_leave_enough_for_training():
    for place in mw.PLACES:
        things = {
            thing: mw.is_held_out(scene(animal="zebra", place=place, thing=thing)) for thing in mw.THINGS_IN[place]
        }
        assert sum(things.values()) == 1 and len(things) >= 4
        furs = [mw.is_held_out(scene(animal="cat", place=place, fur=fur)) for fur in mw.FURS]
        assert sum(furs) == 1
    rng = np.random.default_rng(2)
    share = np.mean([mw.is_held_out(mw.random_scene(rng)) for _ in range(1200)])
    assert 0.15 < share < 0.3


@pytest.mark.parametrize("task", mw.TASKS)
def test_task_pairs_are_held_out_deterministic_and_disjoint(task):
    pairs = {split: [mw.task_pair(task, index, split) for index in range(40)] for split in mw.SPLITS}
    for split in mw.SPLITS:
        assert pairs[split][7] == mw.task_pair(task, 7, split)
        for source, target in pairs[split]:
            assert mw.is_held_out(source) and mw.is_held_out(target)
            assert dataclasses.replace(source, **mw.TASKS[task].change) == target != source
            assert all(getattr(source, field) == value for field, value in mw.TASKS[task].source.items())
    seeds = [source.background_seed for split in mw.SPLITS for source, _ in pairs[split]]
    assert len(set(seeds)) == 80


@pytest.mark.parametrize("field", mw.CHOICES)
def test_bad_names_are_refused_with_the_good_ones(field):
    with pytest.raises(ValueError, match=f"unknown {field} 'unicorn'.*{mw.CHOICES[field][-1]}"):
        scene(**{field: "unicorn"})


def test_other_bad_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown field 'colour'.*background_seed"):
        scene(colour="red")
    with pytest.raises(ValueError, match=r"unknown task 'cat->cow'.*cat->dog"):
        mw.task_pair("cat->cow", 0)
    with pytest.raises(ValueError, match=r"unknown split 'train'.*tuning"):
        mw.task_pair("cat->dog", 0, "train")
    with pytest.raises(ValueError, match=r"unknown mention 'style'.*accessory"):
        mw.caption(scene(), ("style",))
