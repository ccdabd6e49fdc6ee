"""The methods that pix2pix-zero is compared with: their words, token alignments, attention maps and results."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import p2pz
from p2pz import methods
from p2pz.directions import Direction
from p2pz.images import psnr
from p2pz.inversion import Inversion
from p2pz.kernels import attend_with_probabilities, attention, attention_probabilities
from p2pz.methods import (
    align_tokens,
    common_tokens,
    ddim_edit,
    prompt_to_prompt,
    sdedit,
    share_attention,
    swap_words,
    token_edit,
)
from p2pz.tokens import tokens_of, weigh_tokens
from p2pz.unet import UNet
from p2pz.weights import MINI_FOLDER, mini_world

STEPS = 2
PROMPT = "a photo of a cat"
METHODS = [sdedit, ddim_edit, prompt_to_prompt]
QUICK = {"prompt": PROMPT, "steps": STEPS, "guidance": 2.0, "progress": False}


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pictures():
    return [mini_world.render(mini_world.task_pair("cat->dog", i)[0]) for i in range(2)]


@pytest.fixture(scope="module")
def inversion(model, pictures):
    """The first picture's, unregularised: what `ddim_edit` and `prompt_to_prompt` start from."""
    return p2pz.invert(pictures[0], model=model, prompt=PROMPT, steps=STEPS, progress=False)


@pytest.mark.parametrize(
    ("prompt", "source", "target", "swapped"),
    [
        ("a photo of a cat", "cat", "dog", "a photo of a dog"),
        ("a photo of a cat in a room", "cat", "owl", "a photo of an owl in a room"),
        ("an owl and the owl", "owl", "cat", "a cat and the cat"),
        ("a catfish, a cat's toy", "cat", "dog", "a catfish, a dog's toy"),
        ("A Cat. Cat!", "cat", "dog", "A dog. Dog!"),
        ("A cat", "cat", "owl", "An owl"),
        ("a photo of a cat", "a cat", "two dogs", "a photo of two dogs"),
        ("a photo of a cat", "cat", "the dog", "a photo of the dog"),
        ("a cat by a cat with glasses", "cat", "cat with glasses", "a cat with glasses by a cat with glasses"),
        ("a cat by a cat  with glasses", "cat with glasses", "cat", "a cat by a cat"),
        ("a sketch of a horse", "sketch", "oil pastel", "an oil pastel of a horse"),
        ("a cat (small)", "(small)", "(big)", "a cat (big)"),
    ],
)
def test_words_are_swapped(prompt, source, target, swapped):
    assert swap_words(prompt, source, target) == swapped


@pytest.mark.parametrize("prompt", ["a photo of a dog", "a catfish", ""])
def test_words_that_do_not_occur_are_not_swapped(prompt):
    with pytest.raises(ValueError, match=r"does not contain \"cat\".*prompt= must contain"):
        swap_words(prompt, "cat", "dog")


@pytest.mark.parametrize("words", [("", "dog"), ("cat", " ")])
def test_nothing_is_no_words(words):
    with pytest.raises(ValueError, match="no words to swap"):
        swap_words("a cat", *words)


def places(mapping):
    return [tuple(place) for place in mapping.nonzero().tolist()]


@pytest.mark.parametrize(
    ("reference", "edited", "moved", "new"),
    [
        ([1, 5, 6, 2], [1, 5, 6, 2], [(i, i) for i in range(8)], []),
        ([1, 5, 6, 2], [1, 5, 7, 2], [(i, i) for i in range(8)], []),  # one word for one
        ([1, 5, 6, 2], [1, 5, 6, 8, 9, 2], [(0, 0), (1, 1), (2, 2), (3, 5), (6, 6), (7, 7)], [3, 4]),  # words added
        ([1, 5, 6, 2], [1, 5, 8, 9, 2], [(0, 0), (1, 1), (3, 4), (5, 5), (6, 6), (7, 7)], [2, 3]),  # two for one
        ([1, 5, 6, 7, 2], [1, 5, 2], [(0, 0), (1, 1), (4, 2), (5, 5), (6, 6), (7, 7)], [3, 4]),  # words left out
        ([1, 3, 5, 6, 2], [1, 4, 5, 8, 9, 2], [(0, 0), (1, 1), (2, 2), (4, 5), (6, 6), (7, 7)], [3, 4]),
        ([1] + 7 * [5], [1] + 7 * [6], [(i, i) for i in range(8)], []),  # no room for padding
    ],
)
def test_tokens_are_aligned(reference, edited, moved, new):
    mapping, mix = align_tokens(reference, edited, 8)
    assert places(mapping) == moved and mapping.max() == 1
    assert (mix == 0).nonzero().flatten().tolist() == new and (mix == 1).sum() == 8 - len(new)


def test_common_tokens_are_as_many_as_possible():
    assert common_tokens([1, 2, 3, 4, 5], [3, 4, 1, 2, 5]) in ([(0, 2), (1, 3), (4, 4)], [(2, 0), (3, 1), (4, 4)])
    assert common_tokens([1, 2], [3]) == common_tokens([], [1]) == []


def test_captions_are_aligned_by_the_models_tokens(model):
    swap, addition = (
        align_tokens(tokens_of(model, PROMPT), tokens_of(model, f"a photo of a {words}"), 77)
        for words in ("dog", "cat with glasses")
    )
    assert torch.equal(swap[0], torch.eye(77)) and torch.equal(swap[1], torch.ones(77))
    assert (addition[1] == 0).nonzero().flatten().tolist() == [6, 7]  # with glasses
    assert places(addition[0])[:7] == [*((i, i) for i in range(6)), (6, 8)]  # start, a photo of a cat; end


def test_weights_are_those_of_whole_words(model):
    prompt = "a cat with glasses by a catfish and a cat"
    weights = weigh_tokens(model, prompt, {"cat": 2.0})
    ids = tokens_of(model, prompt)
    assert weights.tolist() == [2.0 if token == ids[2] else 1.0 for token in ids] + [1.0] * (77 - len(ids))
    assert (weights == 2).sum() == 2
    assert weigh_tokens(model, prompt, {"with glasses": -1.0}).tolist()[3:5] == [-1.0, -1.0]
    for words, factor, message in (("dog", 1.0, 'contain "dog"'), ("", 1.0, 'contain ""'), ("cat", np.inf, "finite")):
        with pytest.raises(ValueError, match=message):
            weigh_tokens(model, prompt, {words: factor})
    with pytest.raises(ValueError, match='contain "fish"'):  # its tokens end "catfish"
        weigh_tokens(model, prompt, {"fish": 2.0})


@pytest.mark.parametrize(
    ("target", "reweight", "origin"),
    [
        ("a photo of a dog", {}, list(range(77))),
        ("a photo of a dog", {"dog": 2.5}, list(range(77))),
        ("a photo of a cat with glasses", {}, [*range(6), None, None, 6, *range(9, 77)]),
        ("a photo of a cat with glasses", {"cat": -1.0, "glasses": 3.0}, [*range(6), None, None, 6, *range(9, 77)]),
    ],
)
@pytest.mark.parametrize("pairs", [False, True])
def test_shared_maps_equal_maps_edited_in_memory(model, assert_close, target, reweight, origin, pairs):
    """One forward pass; `origin` says which token of the reference each token of the edit gets its map from."""
    factors = {"dog": 5, "cat": 5, "glasses": 7}
    places = {factors[word]: factor for word, factor in reweight.items()}
    rows = [PROMPT, "a horse", PROMPT, "a horse"] if pairs else [PROMPT, "a horse"]
    states = model.encode_text([*rows, target, "a zebra"])
    latents = torch.randn(len(states), 4, 16, 16)
    conditioning = model.condition(torch.tensor([501]), states)
    conditioning = conditioning._replace(shifts=conditioning.shifts[0])

    def in_memory(q, k, v, site):
        maps = attention_probabilities(q, k)
        if site.kind == "self" and q.shape[1] <= 64:
            maps[-2:] = maps[:2]
        if site.kind == "cross":
            own = maps.clone()
            for j, i in enumerate(origin):
                maps[-2, :, :, j] = places.get(j, 1.0) * (own[-2, :, :, j] if i is None else own[0, :, :, i])
            maps[-1] = own[1]
        return attend_with_probabilities(maps, v)

    tokens = token_edit(model, [PROMPT, "a horse"], [target, "a zebra"])
    tokens.weights[0] = weigh_tokens(model, target, reweight)
    shared = model.predict(latents, conditioning, share_attention(2, tokens, 64))
    assert_close(shared, model.predict(latents, conditioning, in_memory), 1e-5)
    plain = model.predict(latents, conditioning)
    assert_close(shared[:-2], plain[:-2], 1e-5)
    assert (shared[-2:] - plain[-2:]).norm() > 1e-3 * plain[-2:].norm()


@pytest.mark.parametrize("images", [1, 2])
def test_nothing_to_share_is_plain_attention(model, images):
    q, k, v = torch.randn(3, 2 * images, 9, 2, 8)
    site = methods.Site("", "self", 3, 3, 2)
    assert torch.equal(share_attention(images, None, 8)(q, k, v, site), attention(q, k, v))
    assert not torch.equal(share_attention(images, None, 9)(q, k, v, site), attention(q, k, v))


@pytest.mark.parametrize("method", METHODS)
def test_an_image_in_a_batch_is_edited_as_alone_and_again_the_same(model, pictures, method):
    wide = Image.fromarray(pictures[1]).resize((300, 150))
    together = method([*pictures, wide], "cat->cat with glasses", model=model, **QUICK)
    alone = method(pictures[1], "cat->cat with glasses", model=model, **QUICK)
    again = method(pictures[1], "cat->cat with glasses", model=model, **QUICK)
    assert [result.image.size for result in together] == [(128, 128), (128, 128), (180, 92)]
    assert psnr(together[1].image, alone.image) > 50 and psnr(together[1].reconstruction, alone.reconstruction) > 50
    assert psnr(together[0].image, alone.image) < 30
    assert np.array_equal(alone.image, again.image)
    assert alone.prompt == PROMPT and alone.reconstruction_psnr > 15
    assert all(np.asarray(result.image).std() > 5 for result in together)  # pictures, not NaN


@pytest.mark.parametrize("method", METHODS)
def test_inversions_serve_as_images(model, pictures, inversion, method):
    fresh = method(pictures[0], "cat->dog", model=model, **QUICK)
    options = {"model": model, "guidance": 2.0, "progress": False}  # steps and prompt are the inversion's
    mixed = method([inversion, pictures[0]], "cat->dog", **options)
    assert psnr(mixed[0].image, fresh.image) > 50 and mixed[0].prompt == PROMPT
    assert mixed[0].reconstruction_psnr == pytest.approx(fresh.reconstruction_psnr, abs=0.5)
    bare = replace(inversion, path=None, picture=None)
    assert method(bare, "cat->dog", **options).reconstruction_psnr is None
    assert mixed[1].prompt.startswith("a photo of a black cat")  # recognised


def test_the_seed_is_of_the_noise(model, inversion):
    images = [sdedit(inversion, "cat->dog", seed=seed, model=model, **QUICK).image for seed in (1, 1, 2)]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_sdedit_without_noise_is_the_image_itself(model, pictures):
    result = sdedit(pictures[0], "cat->dog", noise_strength=0, model=model, **QUICK)
    assert np.array_equal(result.image, result.reconstruction)
    assert psnr(result.image, pictures[0]) == result.reconstruction_psnr > 28


def test_more_noise_leaves_less_of_the_image(model, pictures):
    qualities = [
        psnr(sdedit(pictures[0], "cat->dog", noise_strength=share, model=model, **QUICK).image, pictures[0])
        for share in (0, 0.5, 1)
    ]
    assert qualities[0] > qualities[1] > qualities[2]


def test_sdedit_takes_as_many_steps_as_it_noised(model, inversion, monkeypatch):
    """With the true noise as the prediction it comes back to the image, from whatever level."""
    levels = []
    noise = torch.randn(inversion.image_latents.shape, generator=torch.Generator().manual_seed(5))

    def predict(self, latents, *_):
        levels.append(len(latents))
        return noise.expand_as(latents)

    monkeypatch.setattr(UNet, "predict", predict)
    options = {"steps": 10, "seed": 5, "guidance": 1, "model": model, "progress": False}
    for share, count in ((0.26, 3), (0.04, 0), (1, 10)):
        result = sdedit(inversion, "cat->dog", noise_strength=share, **options)
        assert len(levels) == count
        assert psnr(result.image, result.reconstruction) > 30  # the last step ends a little short of alpha-bar 1
        levels.clear()


def test_sdedits_negative_prompt(model, inversion):
    results = [
        sdedit(inversion, "cat->dog", negative_prompt=negative, model=model, **QUICK).image
        for negative in (None, PROMPT, "")
    ]
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_prompt_to_prompt_with_one_prompt_is_the_reconstruction(model, inversion, guidance):
    options = {"model": model, "prompt": "a photo of a cat with glasses", "guidance": guidance, "progress": False}
    result = prompt_to_prompt(inversion, "cat->cat with glasses", **options)
    assert psnr(result.image, result.reconstruction) > 60


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_prompt_to_prompt_that_shares_nothing_is_ddim(model, inversion, guidance):
    options = {"model": model, "guidance": guidance, "progress": False}
    plain = ddim_edit(inversion, "cat->dog", **options)
    nothing = prompt_to_prompt(inversion, "cat->dog", cross_steps=0, self_steps=0, **options)
    assert psnr(plain.image, nothing.image) > 60 and psnr(plain.reconstruction, nothing.reconstruction) > 60
    for shares in ({"cross_steps": 1, "self_steps": 0}, {"cross_steps": 0, "self_steps": 1}):
        shared = prompt_to_prompt(inversion, "cat->dog", **shares, **options)
        assert psnr(plain.image, shared.image) < 50 and psnr(plain.reconstruction, shared.reconstruction) > 60


def test_steps_share_maps_as_asked(model, inversion, monkeypatch):
    asked = []
    share = methods.share_attention
    monkeypatch.setattr(
        methods,
        "share_attention",
        lambda images, cross, size: asked.append((cross is not None, size)) or share(images, cross, size),
    )
    for cross_steps, self_steps in ((0.75, 0.25), (0.25, 0.75), (1, 1)):
        prompt_to_prompt(
            inversion, "cat->dog", model=model, steps=4, cross_steps=cross_steps, self_steps=self_steps, progress=False
        )
        sizes = [256 if i < round(4 * self_steps) else 0 for i in range(4)]  # latents of 32 x 32
        assert asked == [(i < round(4 * cross_steps), size) for i, size in enumerate(sizes)]
        asked.clear()


def test_reweighting_changes_the_edit(model, inversion):
    options = {"model": model, "progress": False}
    plain, one, more = (
        prompt_to_prompt(inversion, "cat->dog", reweight=reweight, **options).image
        for reweight in (None, {"dog": 1.0}, {"dog": 3.0})
    )
    assert np.array_equal(plain, one) and not np.array_equal(plain, more)


def test_regularised_inversion(model, pictures):
    """The preset's strengths, which count only if they are asked for; the bundled model's own are zero."""
    options = QUICK | {"model": model, "steps": 2, "preset": "diffusers"}
    runs = [ddim_edit(pictures[0], "cat->dog", regularised=flag, **options).inversion for flag in (True, False)]
    both = [p2pz.invert(pictures[0], model=model, prompt=PROMPT, steps=2, preset="diffusers", progress=False, **more)
            for more in ({}, {"autocorrelation_strength": 0.0, "kl_strength": 0.0})]  # fmt: skip
    for run, expected in zip(runs, both, strict=True):
        assert torch.equal(run.latents, expected.latents)
    assert not torch.equal(runs[0].latents, runs[1].latents)


def test_directions_that_know_their_words(model, inversion):
    options = {"model": model, "progress": False}
    made = Direction(torch.zeros(77, 128), "cat", "dog", (1, 1), model.text_fingerprint)
    assert np.array_equal(*(ddim_edit(inversion, words, **options).image for words in ("cat->dog", made)))
    wordless = Direction(made.states, "", "", (1, 1), model.text_fingerprint)
    with pytest.raises(ValueError, match="this direction has none"):
        ddim_edit(inversion, wordless, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_equals_cpu(model, pictures, inversion, method):
    """Twice on the GPU: recorded, and replayed on another image."""
    cuda = p2pz.load(MINI_FOLDER, device="cuda", dtype=torch.float32)
    for start in (pictures[1], inversion):
        for words in ("cat->dog", "cat->cat with glasses"):
            results = [method(start, words, model=m, **QUICK) for m in (model, cuda)]
            assert psnr(results[0].image, results[1].image) > 40


@pytest.mark.parametrize("method", METHODS)
def test_bad_input(model, pictures, inversion, method):
    with pytest.raises(ValueError, match=r"prompt= must contain"):
        method(pictures[0], "horse->dog", prompt="a cat", model=model)
    with pytest.raises(ValueError, match='looks like "cat->dog"'):
        method(pictures[0], "cat to dog", model=model)
    with pytest.raises(ValueError, match="not list"):
        method(pictures[0], ["cat->dog"], model=model)
    with pytest.raises(ValueError, match="list of images is empty"):
        method([], "cat->dog", model=model)
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        method(pictures[0], "cat->dog", prompt=["a cat", "a cat"], model=model)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        method(pictures[0], "cat->dog", prompt="a cat", steps=0, model=model)
    other = Inversion(inversion.latents, inversion.image_latents, PROMPT, 1, "0123456789abcdef")
    with pytest.raises(ValueError, match="made with another model"):
        method(other, "cat->dog", model=model)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (sdedit, {"noise_strength": 1.1}, "noise_strength must be from 0 to 1, not 1.1"),
        (sdedit, {"noise_strength": float("nan")}, "noise_strength"),
        (prompt_to_prompt, {"cross_steps": -0.1}, "cross_steps must be from 0 to 1, not -0.1"),
        (prompt_to_prompt, {"self_steps": 2}, "self_steps must be"),
        (prompt_to_prompt, {"reweight": {"horse": 2.0}}, 'does not contain "horse"'),
        (ddim_edit, {"xa_guidance": 0.1, "strength": 1.0}, "leave out strength, xa_guidance"),
    ],
)
def test_bad_options(model, inversion, method, options, message):
    with pytest.raises(ValueError, match=message):
        method(inversion, "cat->dog", model=model, progress=False, **options)
