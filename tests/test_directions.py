"""Directions from words, sentences and files; captions; sampling."""

import pytest
import torch

import p2pz
from p2pz.directions import bank_sentences, is_medium, parse_direction, source_prompt, with_article
from p2pz.images import psnr
from p2pz.weights import MINI_FOLDER, mini_world
from p2pz.weights.judge import load_judge


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


def test_direction_is_the_difference_of_mean_states(model):
    sentences = ["a photo of a cat", "a sketch of a cat at night"], ["a photo of a dog"]
    made = p2pz.direction(sentences=sentences, model=model)
    source, target = (model.encode_text(side) for side in sentences)
    assert torch.allclose(made.states, target[0] - (source[0] + source[1]) / 2, atol=1e-6)
    assert made.sentences == (2, 1) and made.states.shape == (77, 128)


def test_opposite_words_give_the_opposite_direction(model):
    there, back = p2pz.direction("cat", "dog", model=model), p2pz.direction("dog", "cat", model=model)
    assert torch.allclose(there.states, -back.states, atol=1e-6)
    assert there.states.norm() > 1


def test_a_direction_separates_the_concepts_it_was_made_for(model):
    """Unseen sentences about dogs lie further along cat->dog than the same sentences about cats."""
    along = p2pz.direction("cat", "dog", model=model).states.flatten()
    texts = "a photo of an orange {} with a hat in the snow", "an oil pastel of a black {} in a room near a ball"
    for text in texts:
        cat, dog = model.encode_text([text.format("cat"), text.format("dog")]).flatten(1)
        assert (dog - cat) @ along > 0.5 * along.norm() * (dog - cat).norm()


def test_sentences_from_files_and_saved_directions(model, tmp_path):
    for name, text in (("cats.txt", "a photo of a cat\n\n a sketch of a cat \n"), ("dogs.txt", "a photo of a dog\n")):
        (tmp_path / name).write_text(text)
    made = p2pz.direction(sentences=(tmp_path / "cats.txt", tmp_path / "dogs.txt"), model=model)
    assert made.sentences == (2, 1)
    made.save(tmp_path / "cat2dog.safetensors")
    loaded = p2pz.Direction.load(tmp_path / "cat2dog.safetensors")
    assert torch.equal(loaded.states, made.states)
    assert (loaded.sentences, loaded.text_fingerprint) == (made.sentences, model.text_fingerprint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "cat"}, "needs two concepts"),
        ({"source": "cat", "target": " cat "}, "to itself changes nothing"),
        ({"sentences": ([], ["a dog"])}, "no source sentences"),
        ({"sentences": (["a cat"], ["  "])}, "no target sentences"),
        ({"sentences": ("missing.txt", ["a dog"])}, "source sentences cannot be read"),
    ],
)
def test_bad_directions(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        p2pz.direction(**arguments, model=model)


def test_files_that_are_no_direction(model, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        p2pz.Direction.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read"):
        p2pz.Direction.load(tmp_path / "text.safetensors")
    inversion = p2pz.Inversion(torch.zeros(4, 2, 2), torch.zeros(4, 2, 2), "a cat", 3, model.text_fingerprint)
    inversion.save(tmp_path / "inversion.safetensors")
    with pytest.raises(ValueError, match="no direction that p2pz saved"):
        p2pz.Direction.load(tmp_path / "inversion.safetensors")
    with pytest.raises(ValueError, match="cannot write"):
        inversion.save(tmp_path / "nowhere" / "inversion.safetensors")


def test_words_that_the_bundled_model_does_not_know_are_named(model):
    with pytest.warns(UserWarning, match=r"does not know elephant, sofa; all its words: a .* cat .* zebra"):
        p2pz.direction(sentences=(["a cat on the sofa"], ["an Elephant on the sofa"]), model=model)


@pytest.mark.parametrize("words", ["cat -> dog", "cat→dog", "  cat->dog "])
def test_words_of_a_direction(words):
    assert parse_direction(words) == ("cat", "dog")


@pytest.mark.parametrize("words", ["cat", "->dog", "cat->", "a->b->c", ""])
def test_words_that_are_no_direction(words):
    with pytest.raises(ValueError, match="looks like"):
        parse_direction(words)


def test_bank_sentences_are_paired_and_have_articles():
    cats, glasses = bank_sentences("cat", "cat with glasses")
    assert len(cats) == len(glasses) == len(set(cats)) > 40
    assert [text.replace("a cat", "a cat with glasses") for text in cats] == glasses
    sketches, pastels = bank_sentences("sketch", "oil pastel")
    assert all(text.startswith("a sketch of ") for text in sketches)
    assert all(text.startswith("an oil pastel of ") for text in pastels)


def test_words_and_articles():
    assert [with_article(word) for word in ("cat", "orange cat", "the cat")] == ["a cat", "an orange cat", "the cat"]
    assert is_medium("oil pastel") and is_medium("pencil sketch") and not is_medium("cat with glasses")
    assert [source_prompt(word) for word in ("cat", "sketch", "")] == ["a photo of a cat", "a sketch", "a photo"]


def test_captions_of_held_out_scenes(model):
    """What CLIP recognises, against the scene's own caption: style, animal and accessory, and the place."""
    scenes = [pair[0] for task in mini_world.TASKS for pair in [mini_world.task_pair(task, i) for i in range(6)]]
    captions = p2pz.caption([mini_world.render(scene) for scene in scenes], model=model)
    truths = [mini_world.caption(scene) for scene in scenes]
    style_and_place = [
        (mini_world.STYLE_PHRASES[scene.style], mini_world.PLACE_PHRASES[scene.place], scene.animal) for scene in scenes
    ]
    right = [all(part in text for part in parts) for text, parts in zip(captions, style_and_place, strict=True)]
    assert sum(right) >= 23 and sum(a == b for a, b in zip(captions, truths, strict=True)) >= 16


def test_samples_are_what_was_asked_for(model):
    """Held-out combinations, few steps; the judge has no part in drawing them."""
    prompts = [
        "a photo of an orange cat on the beach near a palm tree",
        "a sketch of a black dog in a meadow",
        "an oil pastel of a zebra in a room near a lamp",
        "a photo of a white rabbit with glasses in a room",
    ]
    pictures = p2pz.sample(prompts, model=model, steps=12, seed=5, progress=False)
    seen = load_judge(MINI_FOLDER / "judge").classify(p2pz.images.to_tensor(pictures))
    assert seen["animal"] == ["cat", "dog", "zebra", "rabbit"]
    assert seen["style"] == ["photo", "sketch", "oil pastel", "photo"]
    assert seen["accessory"] == ["none", "none", "none", "glasses"]


def test_each_sample_has_a_seed_of_its_own(model):
    both = p2pz.sample(["a photo of a cat"] * 2, model=model, steps=3, seed=4, progress=False)
    second = p2pz.sample("a photo of a cat", model=model, steps=3, seed=5, progress=False)[0]
    assert psnr(both[1], second) > 50 and psnr(both[0], second) < 25


def test_samples_of_other_sizes(model):
    picture = p2pz.sample("a photo of a cat", model=model, steps=1, size=(160, 92), progress=False)[0]
    assert picture.size == (160, 92)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (130, 128)}, "multiples of 4"),
        ({"size": (16, 128)}, "at least 32"),
        ({"guidance": -2.0}, "guidance must be zero or more"),
        ({"steps": 0}, "steps must be from 1 to 999"),
    ],
)
def test_bad_sample_settings(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        p2pz.sample("a photo of a cat", model=model, progress=False, **arguments)
    with pytest.raises(ValueError, match="empty"):
        p2pz.sample([], model=model)
