"""Inversion and edit against diffusers' pipeline, batch rule, repeatability, presets and the edits themselves."""

import itertools
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler
from diffusers.pipelines.deprecated.stable_diffusion_variants import StableDiffusionPix2PixZeroPipeline
from PIL import Image

import p2pz
from p2pz import editing
from p2pz import inversion as inverting
from p2pz.attention import keep_queries_and_keys, plain, record_cross_attention
from p2pz.directions import Direction
from p2pz.editing import MASK_SHARES, edit_latents, map_gradient, mask_of_change
from p2pz.files import save_tensors
from p2pz.images import psnr, to_pictures, to_tensor
from p2pz.inversion import draw_offsets, invert_latents
from p2pz.presets import MINI_SETTINGS, PRESETS, Settings, settings_for
from p2pz.schedule import denoising_schedule
from p2pz.unet import UNet
from p2pz.weights import MINI_FOLDER, mini_world

STEPS = 4


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pictures():
    return [mini_world.render(mini_world.task_pair("cat->dog", i)[0]) for i in range(3)]


@pytest.fixture(scope="module")
def cat_to_dog(model):
    return p2pz.direction("cat", "dog", model=model)


@pytest.fixture(scope="module")
def pipeline():
    """diffusers' pipeline on the bundled weights; images are handed over as latents."""
    made = StableDiffusionPix2PixZeroPipeline.from_pretrained(
        MINI_FOLDER, caption_generator=None, caption_processor=None, inverse_scheduler=None, safety_checker=None,
        feature_extractor=None, torch_dtype=torch.float32,
    )  # fmt: skip
    made.register_modules(inverse_scheduler=DDIMInverseScheduler.from_config(made.scheduler.config))
    made.image_processor.preprocess = lambda latents: latents
    made.set_progress_bar_config(disable=True)
    return made


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_bundled_scheduler_is_stable_diffusions(pipeline):
    config = pipeline.scheduler.config
    assert (config.steps_offset, config.set_alpha_to_one, config.clip_sample) == (1, False, False)


@pytest.mark.parametrize("index", range(3))
def test_diffusers_preset_equals_diffusers(model, pipeline, pictures, cat_to_dog, index):
    """Same weights, image latents, offsets and direction: the same latents after inversion and after the edit."""
    settings = settings_for(model, "diffusers", steps=6)
    image_latents = model.encode_image(to_tensor([Image.fromarray(pictures[index])]))
    caption = model.encode_text(["a photo of a cat"])
    delta = cat_to_dog.states[None]

    theirs = pipeline.invert(
        prompt_embeds=caption, image=image_latents, num_inference_steps=6, generator=torch.Generator().manual_seed(7)
    ).latents
    ours = invert_latents(model, image_latents, caption, settings, torch.Generator().manual_seed(7), False)[-1]
    assert relative_error(ours, theirs) < 1e-5

    common = {"prompt_embeds": caption, "num_inference_steps": 6, "output_type": "latent"}
    common |= {"source_embeds": torch.zeros_like(delta), "target_embeds": delta, "guidance_scale": settings.guidance}
    for negative in (None, model.encode_text(["a photo of a horse"]))[: 1 + (index == 0)]:
        their_edit = pipeline(
            latents=theirs.clone(), negative_prompt_embeds=caption if negative is None else negative,
            cross_attention_guidance_amount=settings.xa_guidance, **common,
        ).images  # fmt: skip
        our_edit, _ = edit_latents(model, theirs, caption, negative, caption + delta, settings, False)
        assert relative_error(our_edit, torch.as_tensor(their_edit)) < 3e-5


@pytest.mark.parametrize("gradient", ["conditional", "both", "halves"])
@pytest.mark.parametrize("negative_prompt", [None, "a photo of a dog"])
def test_an_image_in_a_batch_is_edited_as_alone(model, pictures, cat_to_dog, gradient, negative_prompt):
    settings = {"steps": 2, "gradient": gradient, "negative_prompt": negative_prompt, "progress": False}
    settings |= {"guidance": 3.0, "autocorrelation_strength": 10.0, "kl_strength": 10.0}
    together = p2pz.edit(pictures, cat_to_dog, model=model, **settings)
    alone = p2pz.edit(pictures[1], cat_to_dog, model=model, **settings)
    assert relative_error(together[1].inversion.latents, alone.inversion.latents) < 1e-4
    assert psnr(together[1].image, alone.image) > 50
    assert psnr(together[0].image, alone.image) < 30  # the other images are other images


@pytest.mark.parametrize(("gradient", "negative_prompt"), [("conditional", None), ("halves", "a photo of a dog")])
def test_several_directions_give_what_each_gives_alone(model, pictures, cat_to_dog, gradient, negative_prompt):
    """Among them a change of style, which has other numbers, and in batches that they do not fill evenly."""
    directions = [cat_to_dog, "photo->sketch", p2pz.direction("cat", "cat with glasses", model=model)]
    settings = {"model": model, "steps": 2, "gradient": gradient, "negative_prompt": negative_prompt}
    settings |= {"guidance": 2.0, "prompt": "a photo of a cat", "progress": False}
    together = p2pz.edit(pictures[:2], directions, batch_size=4, **settings)
    assert [len(row) for row in together] == [3, 3]
    for picture, results in zip(pictures, together, strict=False):
        for direction, result in zip(directions, results, strict=True):
            alone = p2pz.edit(picture, direction, **settings)
            assert psnr(result.image, alone.image) > 50 and psnr(result.reconstruction, alone.reconstruction) > 50
    assert psnr(together[0][0].image, together[0][1].image) < 30
    one_image = p2pz.edit(pictures[0], directions[:2], **settings)
    assert [psnr(one.image, other.image) > 50 for one, other in zip(one_image, together[0], strict=False)] == [True] * 2


@pytest.mark.parametrize(("reference", "room", "passes"), [("denoised", 2**30, 3), ("path", 2**30, 0), ("path", 0, 2)])
def test_several_directions_share_inversion_and_reference_pass(
    model, pictures, cat_to_dog, reference, room, passes, monkeypatch
):
    """Of three edits instead of one, only the passes of the edits become more."""
    rows = []
    predict = UNet.predict
    monkeypatch.setattr(UNet, "predict", lambda self, x, *rest: rows.append(len(x)) or predict(self, x, *rest))
    monkeypatch.setattr("p2pz.memory.MOST_ON_THE_HOST", room)
    counts = []
    for directions in ([cat_to_dog], [cat_to_dog] * 3):
        settings = {"steps": 2, "reference": reference, "blend": 0.0, "progress": False}
        p2pz.edit(pictures[0], directions, model=model, prompt="a photo of a cat", **settings)
        counts.append(sum(rows))
        rows.clear()
    inversion, edit = 2, 4  # guidance 1: gradient and prediction of each of two steps
    assert counts == [inversion + passes + edit, inversion + passes + 3 * edit]


def test_same_seed_same_result_and_another_seed_another(model, pictures, cat_to_dog):
    runs = [
        p2pz.edit(
            pictures[0], cat_to_dog, model=model, preset="diffusers", steps=STEPS, seed=seed, progress=False
        ).inversion.latents
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_sampled_posterior_does_not_depend_on_the_batch(model, pictures):
    settings = {"model": model, "steps": 1, "progress": False, "sample_posterior": True, "prompt": "a photo"}
    together = p2pz.invert(pictures, **settings)
    assert relative_error(together[2].image_latents, p2pz.invert(pictures[2], **settings).image_latents) < 1e-5
    mean = p2pz.invert(pictures[2], **(settings | {"sample_posterior": False}))
    assert not torch.equal(together[2].image_latents, mean.image_latents)


def test_zero_direction_reproduces_the_reference(model, pictures, cat_to_dog):
    """Without a change the maps agree, their gradient is zero and the edit is the reconstruction."""
    nothing = Direction(torch.zeros_like(cat_to_dog.states), "", "", (1, 1), model.text_fingerprint)
    settings = {"model": model, "steps": STEPS, "xa_guidance": 1.0, "progress": False}
    result = p2pz.edit(pictures[0], nothing, reference="denoised", **settings)
    assert psnr(result.image, result.reconstruction) > 60
    blended = p2pz.edit(pictures[0], nothing, **settings)
    assert np.array_equal(blended.image, pictures[0])
    for each in (result, blended):
        assert len(each.warnings) == 1 and "changed nothing" in each.warnings[0]


def test_numbers_that_overflow_are_reported_with_the_layer(model, pictures, cat_to_dog):
    weight = model.unet.mid_block.attentions[0].proj_out.weight
    before = weight[0, 0].clone()
    try:
        weight[0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"infinite or NaN, first in mid_block.attentions.0, .*: a strength or a"):
            p2pz.edit(pictures[0], cat_to_dog, model=model, steps=1, progress=False)
    finally:
        weight[0, 0] = before


def test_images_can_be_worked_on_at_another_size(model, pictures, cat_to_dog):
    small = p2pz.edit(pictures[0], cat_to_dog, model=model, steps=1, size=64, progress=False)
    assert small.image.size == (64, 64)
    large = p2pz.edit(pictures[0], cat_to_dog, model=model, steps=1, size=192, progress=False)
    assert large.image.size == (192, 192) and large.reconstruction_psnr > 20
    with pytest.raises(ValueError, match="size must be a whole number from 64 to 1536, not 32"):
        p2pz.edit(pictures[0], cat_to_dog, model=model, size=32)


def test_map_gradient_is_the_derivative_of_the_map_distance(model):
    """Against a central difference along a random direction, in float64."""
    double = p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    latents, start, along = (torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    states = double.encode_text(["a photo of a cat", "a photo of a dog"])
    timestep = torch.tensor(401)

    def maps_of(x, context):
        maps = {}
        double.unet(x, timestep, context, record_cross_attention(maps))
        return maps

    reference = maps_of(start, states[:1].expand(2, -1, -1))

    def distance(x):
        maps = maps_of(x, states)
        return sum((maps[p] - reference[p]).square().sum((2, 3)).mean(1).sum() for p in reference)

    # predictions come back as float32, but the maps and the gradient stay in float64
    kept = {}
    double.unet(start, timestep, states[:1].expand(2, -1, -1), keep_queries_and_keys(kept))
    gradient = map_gradient(double, latents, double.condition(timestep[None].expand(2), states), kept)
    step = 1e-5
    slope = (distance(latents + step * along) - distance(latents - step * along)) / (2 * step)
    assert abs((gradient * along).sum() - slope) < 1e-5 * abs(slope)
    assert distance(latents - 0.1 * gradient) < distance(latents)  # the step that an edit takes brings the maps closer


def test_inversion_can_be_saved_and_serves_several_edits(model, pictures, cat_to_dog, tmp_path):
    inversion = p2pz.invert(pictures[0], model=model, steps=STEPS, progress=False)
    inversion.save(tmp_path / "cat.safetensors")
    loaded = p2pz.Inversion.load(tmp_path / "cat.safetensors")
    assert torch.equal(loaded.latents, inversion.latents) and loaded.prompt == inversion.prompt
    fresh = p2pz.edit(pictures[0], cat_to_dog, model=model, steps=STEPS, progress=False)
    again = p2pz.edit([loaded, pictures[0]], cat_to_dog, model=model, progress=False)  # takes the inversion's steps
    assert psnr(again[0].image, fresh.image) > 50 and psnr(again[1].image, fresh.image) > 50
    for result in again:
        assert result.reconstruction_psnr == pytest.approx(fresh.reconstruction_psnr, abs=0.01)


def test_an_edit_of_an_inversion_is_checked_as_one_of_an_image_is(model, pictures, cat_to_dog, monkeypatch):
    monkeypatch.setattr("p2pz.checks.LOWEST_RECONSTRUCTION", 99.0)
    options = {"model": model, "steps": 2, "progress": False}
    kept = p2pz.invert(pictures[0], **options)
    for inversion in (pictures[0], kept):
        result = p2pz.edit(inversion, cat_to_dog, **options)
        assert "the autoencoder lost the image" in " ".join(result.warnings)
    bare = p2pz.edit(replace(kept, path=None, picture=None), cat_to_dog, reference="denoised", **options)
    assert bare.reconstruction_psnr is None and "lost" not in " ".join(bare.warnings)


def test_an_inversion_of_a_batch_holds_its_own_memory_alone(model, pictures):
    for inversion in p2pz.invert(pictures[:3], model=model, steps=2, progress=False):
        assert inversion.path.untyped_storage().nbytes() == inversion.path.nbytes


def test_images_are_inverted_a_few_at_once(model, pictures, monkeypatch):
    counts, invert = [], inverting.invert_pictures
    monkeypatch.setattr(
        inverting, "invert_pictures", lambda *args, **more: counts.append(len(args[1])) or invert(*args, **more)
    )
    few = p2pz.invert(pictures[:3], model=model, steps=2, batch_size=2, progress=False)
    assert counts == [2, 1]
    for one, other in zip(few, p2pz.invert(pictures[:3], model=model, steps=2, progress=False), strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-4)
    assert counts[2:] == [3]


def test_several_sizes_in_one_list_keep_their_order(model, pictures, cat_to_dog):
    wide = Image.fromarray(pictures[1]).resize((300, 150))
    results = p2pz.edit([pictures[0], wide, pictures[2]], cat_to_dog, model=model, steps=2, progress=False)
    assert [result.image.size for result in results] == [(128, 128), (180, 92), (128, 128)]
    assert psnr(results[2].reconstruction, pictures[2]) > psnr(results[0].reconstruction, pictures[2])


def test_a_picture_of_another_world_is_edited_with_a_warning(model, cat_to_dog):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    with pytest.warns(UserWarning, match=r"cartoon world.*dB.*P2PZ_MODEL"):
        p2pz.edit(noise, cat_to_dog, model=model, steps=2, progress=False)


def test_a_picture_of_its_world_is_edited_without_a_warning(model, pictures, cat_to_dog):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        p2pz.edit(pictures[0], cat_to_dog, model=model, progress=False)


@pytest.mark.parametrize("task", list(mini_world.TASKS))
def test_the_four_edits_work(model, task):
    """The default settings on a scene whose combination was never trained on: much nearer to the true edit."""
    source, target = (mini_world.render(scene) for scene in mini_world.task_pair(task, 1))
    result = p2pz.edit(source, task, model=model, progress=False)
    assert psnr(result.image, target) > psnr(source, target) + 0.5
    words = p2pz.caption(result.image, model=model)
    assert {"cat->dog": " dog", "horse->zebra": " zebra", "cat->cat with glasses": "glasses"}.get(
        task, "pastel"
    ) in words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_edits_are_near_float32(model, pictures, cat_to_dog, dtype):
    half = p2pz.load(MINI_FOLDER, device="cpu", dtype=dtype)
    results = [
        p2pz.edit(pictures[0], cat_to_dog, model=m, steps=STEPS, prompt="a photo of a cat", progress=False)
        for m in (model, half)
    ]
    assert psnr(results[1].reconstruction, results[0].reconstruction) > 28
    assert results[1].inversion.latents.isfinite().all()


def test_float16_map_gradient_needs_no_loss_scaling(model):
    """It is as near to float32 as float16 forward passes are, and scaling the loss brings it no nearer."""
    half = p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float16)
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for each in (model, half):
        before, after = (
            each.condition(torch.tensor([501]), each.encode_text([f"a photo of a {animal}"]))
            for animal in ("cat", "dog")
        )
        kept = {}
        each.predict(latents, before, keep_queries_and_keys(kept))
        gradients.append(map_gradient(each, latents, after, kept))
    assert relative_error(gradients[1], gradients[0]) < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu(model, pictures, cat_to_dog):
    cuda = p2pz.load(MINI_FOLDER, device="cuda", dtype=torch.float32)
    results = [p2pz.edit(pictures[0], cat_to_dog, model=m, steps=STEPS, progress=False) for m in (model, cuda)]
    assert psnr(results[0].image, results[1].image) > 40


def test_authors_preset_visits_two_steps_less(model, pictures, monkeypatch):
    told, steps = [], []
    condition = UNet.condition
    monkeypatch.setattr(UNet, "condition", lambda self, t, c: told.extend(t.tolist()) or condition(self, t, c))
    monkeypatch.setattr(UNet, "predict", lambda self, x, *_: steps.append(None) or torch.zeros_like(x))
    p2pz.invert(pictures[0], model=model, preset="authors", steps=50, prompt="a photo", rounds=0, progress=False)
    assert told == list(range(21, 962, 20)) and len(steps) == len(told)


def test_presets_are_the_documented_values():
    published = {"rounds": 5, "rolls": 5, "autocorrelation_strength": 20.0, "kl_strength": 20.0, "xa_guidance": 0.1}
    published |= {"strength": 1.0, "gradient": "halves", "steps": 50, "form": "random", "sample_posterior": True}
    published |= {"reference": "denoised", "blend": 0.0, "guided_steps": (0.0, 1.0), "resolution_weights": ()}
    authors, diffusers = vars(PRESETS["authors"]), vars(PRESETS["diffusers"])
    assert authors == published | {"guidance": 5.0, "inversion": "authors", "lowest_offset": 1}
    assert diffusers == published | {"guidance": 7.5, "inversion": "mirror", "lowest_offset": 0}
    ours = {"inversion": "mirror", "sample_posterior": False, "gradient": "conditional", "reference": "path"}
    assert vars(PRESETS["p2pz"]) == authors | ours


def test_the_bundled_model_has_its_own_numbers(model):
    assert settings_for(model, "p2pz") == MINI_SETTINGS != PRESETS["p2pz"]
    assert settings_for(model, "p2pz", steps=7, guidance=None).steps == 7
    assert MINI_SETTINGS.reference == "path" and MINI_SETTINGS.blend > 0
    changed = settings_for(model, "p2pz", inversion="authors")  # and what cannot stay
    assert (changed.reference, changed.blend) == ("denoised", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "stable-diffusion"}, r"p2pz.load\('stable-diffusion'\), not its name"),
        ({"batch_size": None}, "batch_size must be a whole number from 1 to 1000, not None"),
        ({"size": (128, 128)}, "size must be a whole number from 64 to 1536"),
        ({"seed": 1.7}, "seed must be a whole number from 0 to 4294967295, not 1.7"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 1000, not 0"),
        ({"batch_size": -1}, "batch_size must be a whole number from 1 to 1000, not -1"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(model, pictures, cat_to_dog, options, message):
    with pytest.raises(ValueError, match=message):
        p2pz.edit(pictures[0], cat_to_dog, **{"model": model} | options)


def test_what_cannot_be_edited_is_told_before_the_work(model, pictures, cat_to_dog, monkeypatch):
    settings = {"model": model, "steps": 2, "prompt": "a cat", "progress": False}
    inversion, pathless = (p2pz.invert(pictures[0], reference=each, **settings) for each in ("path", "denoised"))
    other = replace(model, fingerprint="another UNet")
    monkeypatch.setattr(UNet, "predict", lambda *_: pytest.fail("the work has begun"))
    for items, worker, message in (
        ([pictures[1], pathless], model, "which was not kept"),
        ([pictures[1], inversion], other, "made with another model"),
    ):
        with pytest.raises(ValueError, match=message):
            p2pz.edit(items, cat_to_dog, **settings | {"model": worker}, batch_size=1)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of torch.inference_mode\(\)"):
        p2pz.edit(pictures[0], cat_to_dog, **settings)


@pytest.mark.parametrize("negative_prompt", [None, "a dog"])
def test_token_weights_are_of_the_captions_own_halves(model, pictures, cat_to_dog, negative_prompt, monkeypatch):
    """Places in a caption mean nothing in another negative prompt."""
    seen, gradient = [], editing.map_gradient
    monkeypatch.setattr(editing, "map_gradient", lambda *arguments: seen.append(arguments[-1]) or gradient(*arguments))
    options = {"guidance": 2.0, "gradient": "halves", "steps": 1, "negative_prompt": negative_prompt, "progress": False}
    p2pz.edit(pictures[0], cat_to_dog, model=model, prompt="a cat", token_weights={"cat": 0.5}, **options)
    negative, conditional = seen[0]
    assert conditional.tolist() == [1.0, 1.0, 0.5] + [1.0] * 74
    assert torch.equal(negative, conditional if negative_prompt is None else torch.ones(77))


@pytest.mark.parametrize(("size", "latents"), [((100, 520), (73, 14)), ((520, 100), (14, 73)), ((100, 800), (91, 11))])
def test_pictures_as_tall_or_wide_as_can_be_are_regularised(model, size, latents):
    settings = {"model": model, "prompt": "a cat", "steps": 1, "progress": False, "kl_strength": 20.0}
    inversion = p2pz.invert(Image.new("RGB", size), autocorrelation_strength=20.0, **settings)
    assert inversion.latents.shape == (4, *latents) and inversion.latents.isfinite().all()


def test_numbers_of_numpy_are_numbers(model, pictures, cat_to_dog):
    runs = [
        p2pz.edit(pictures[0], cat_to_dog, model=model, steps=number(2), seed=number(3), progress=False)
        for number in (int, np.int64)
    ]
    assert runs[0].settings == runs[1].settings and np.array_equal(runs[0].image, runs[1].image)


@pytest.mark.parametrize("lowest", [0, 1])
def test_offsets_fit_their_level(lowest):
    offsets = draw_offsets(torch.Generator().manual_seed(0), Settings(lowest_offset=lowest), 4, 64, 96)
    assert offsets.shape == (5, 5, 1, 4, 4)
    for level, height in enumerate((64, 32, 16, 8)):
        values = offsets[..., level]
        assert values.min() == lowest and values.max() == height // 2 - 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "best"}, "preset must be one of p2pz, authors, diffusers"),
        ({"steps": 0}, "steps must be a whole number from 1 to 999, not 0"),
        ({"steps": 1000}, "not 1000"),
        ({"steps": 2, "preset": "authors"}, "from 3 to 999"),
        ({"guidance": -1.0}, "guidance must be zero or more"),
        ({"xa_guidance": float("nan")}, "xa_guidance must be zero or more"),
        ({"gradient": "all"}, "gradient must be one of"),
        ({"prompt": ["a", "b"]}, "1 images but 2 prompts"),
        ({"guided_steps": (0.5, 0.2)}, "guided_steps must be two shares from 0 to 1, the smaller first"),
        ({"resolution_weights": (1.0, -1.0)}, "resolution_weights must be zero or more"),
        ({"blend": 1.0}, "blend must be from 0 to below 1, not 1"),
        ({"reference": "denoised", "blend": 0.1}, 'blend needs reference="path"'),
        ({"inversion": "authors", "reference": "path"}, 'reference="path" needs inversion="mirror"'),
        ({"token_weights": {"cat": -1.0}, "prompt": "a cat", "steps": 1}, "token_weights must be zero or more, not -1"),
        ({"token_weights": ["cat"]}, r"token_weights go from words to numbers, such as .*, not \['cat'\]"),
        ({"token_weights": {"cat": "x"}, "prompt": "a cat"}, 'the factor of "cat" must be a finite number, not x'),
        ({"token_weights": {"fish": 1.0}, "prompt": "a cat", "steps": 1}, 'does not contain "fish"'),
    ],
)
def test_settings_out_of_range(model, pictures, cat_to_dog, settings, message):
    with pytest.raises(ValueError, match=message):
        p2pz.edit(pictures[0], cat_to_dog, model=model, **settings)


def test_a_negative_prompt_without_guidance_is_not_ignored_silently(model, pictures, cat_to_dog):
    with pytest.warns(UserWarning, match="negative prompt does nothing at guidance 1"):
        p2pz.edit(pictures[0], cat_to_dog, model=model, steps=1, negative_prompt="a ball", progress=False)


def test_bad_images_and_directions(model, pictures, cat_to_dog):
    with pytest.raises(ValueError, match="list of images is empty"):
        p2pz.edit([], cat_to_dog, model=model)
    with pytest.raises(ValueError, match="list of directions is empty"):
        p2pz.edit(pictures[0], [], model=model)
    with pytest.raises(ValueError, match='looks like "cat->dog"'):
        p2pz.edit(pictures[0], "cat to dog", model=model)
    with pytest.raises(ValueError, match="Direction, not int"):
        p2pz.edit(pictures[0], 3, model=model)
    stranger = Direction(cat_to_dog.states, "cat", "dog", (1, 1), "0123456789abcdef")
    with pytest.raises(ValueError, match="made with another text encoder"):
        p2pz.edit(pictures[0], stranger, model=model)
    inversion = p2pz.invert(pictures[0], model=model, steps=1, prompt="a photo", progress=False)
    other = p2pz.Inversion(inversion.latents, inversion.image_latents, "a photo", 1, "0123456789abcdef")
    with pytest.raises(ValueError, match="made with another model"):
        p2pz.edit(other, cat_to_dog, model=model)


def test_a_reference_on_the_path_leads_back_to_the_image(model, pictures, cat_to_dog, tmp_path):
    settings = {"model": model, "steps": STEPS, "prompt": "a photo of a cat", "progress": False}
    inversion = p2pz.invert(pictures[0], reference="path", **settings)
    assert inversion.path.shape == (STEPS + 1, 4, 32, 32)
    assert torch.equal(inversion.path[0], inversion.image_latents)
    assert torch.equal(inversion.path[-1], inversion.latents)
    result = p2pz.edit(pictures[0], cat_to_dog, reference="path", **settings)
    decoded = to_pictures(model.decode_latents(inversion.image_latents[None]))[0]
    assert psnr(result.reconstruction, decoded) > 60
    denoised = p2pz.edit(pictures[0], cat_to_dog, reference="denoised", **settings)
    assert psnr(denoised.reconstruction, decoded) < 50 and psnr(denoised.image, result.image) < 50

    inversion.save(tmp_path / "cat.safetensors")
    loaded = p2pz.Inversion.load(tmp_path / "cat.safetensors")
    again = p2pz.edit(loaded, cat_to_dog, reference="path", model=model, progress=False)
    assert psnr(again.image, result.image) > 60
    plain = p2pz.invert(pictures[0], reference="denoised", **settings)
    assert plain.path is None and plain.picture is None
    with pytest.raises(ValueError, match="path, which was not kept, as by another preset: edit with that preset"):
        p2pz.edit(plain, cat_to_dog, reference="path", model=model, progress=False)
    with pytest.raises(
        ValueError, match="this inversion has 4 steps, and an edit that follows it takes as many, not 5"
    ):
        p2pz.edit(loaded, cat_to_dog, steps=5, model=model, progress=False)
    with pytest.raises(ValueError, match="an inversion has its own: leave it out"):
        p2pz.edit(loaded, cat_to_dog, size=64, model=model, progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance": 2.0, "gradient": "halves", "token_weights": {"cat": 0.5}},
        {"guidance": 2.0, "gradient": "both", "guided_steps": (0.25, 0.75)},
        {"guidance": 2.0, "negative_prompt": "a ball"},
        {"xa_guidance": 0.0},
    ],
    ids=["default", "halves", "both", "negative prompt", "no map guidance"],
)
def test_the_inversion_serves_as_the_reference_pass(model, pictures, cat_to_dog, changes, monkeypatch):
    """An edit of pictures gives what one of their inversions does, which has to run the reference."""
    settings = {"model": model, "steps": STEPS, "reference": "path", "prompt": "a photo of a cat", "progress": False}
    directions, pictures = [cat_to_dog, -1.0 * cat_to_dog], pictures[:2]
    rows, predict = [], UNet.predict

    def counting(self, latents, *rest, **named):
        rows.append(len(latents))
        return predict(self, latents, *rest, **named)

    inversions = p2pz.invert(pictures, **settings)
    monkeypatch.setattr(UNet, "predict", counting)
    direct = p2pz.edit(pictures, directions, blend=0.0, **settings | changes)
    passes = sum(rows)
    rows.clear()
    later = p2pz.edit(inversions, directions, blend=0.0, **settings | changes)
    begin, end = (round(share * STEPS) for share in changes.get("guided_steps", (0, 1)))
    reference = (end - begin) * len(pictures) * (1 + ("negative_prompt" in changes)) * ("xa_guidance" not in changes)
    own = reference if "negative_prompt" in changes else 0  # which the inversion knew nothing of
    assert passes - STEPS * len(pictures) - own == sum(rows) - reference > 0
    for ours, theirs in zip(*map(itertools.chain.from_iterable, (direct, later)), strict=True):
        assert psnr(ours.image, theirs.image) > 60
        assert psnr(ours.reconstruction, theirs.reconstruction) > 60


def test_who_looks_changes_nothing(model, pictures, cat_to_dog):
    """With a hook, a recorder, or from an inversion the reference has passes of its own: the same to the last bit."""
    settings = {"model": model, "steps": 2, "prompt": "a photo of a cat", "progress": False}
    expected = p2pz.edit(pictures[0], cat_to_dog, **settings)
    ways = [
        p2pz.edit(pictures[0], cat_to_dog, attend=lambda q, k, v, site: plain(q, k, v, site), **settings),
        p2pz.edit(pictures[0], cat_to_dog, record=p2pz.record("mid_block"), **settings),
        p2pz.edit(p2pz.invert(pictures[0], **settings), cat_to_dog, **settings),
    ]
    for made in ways:
        assert np.array_equal(made.image, expected.image)
        assert np.array_equal(made.reconstruction, expected.reconstruction)


def test_blending_leaves_the_rest_of_the_image_alone(model):
    """Far from the animal the pixels are the image's own, whatever the autoencoder does to them."""
    scenes = mini_world.task_pair("cat->dog", 2)
    source, outside = mini_world.render(scenes[0]), ~mini_world.edit_mask(*scenes)
    settings = {"model": model, "steps": 6, "prompt": "a photo of a cat", "progress": False, "reference": "path"}
    free, kept = (p2pz.edit(source, "cat->dog", blend=blend, **settings) for blend in (0.0, 0.25))
    equal = (np.asarray(kept.image) == source).all(-1)
    assert equal[outside].mean() > 0.5 > equal[~outside].mean()
    assert psnr(kept.image, source, outside) > psnr(free.image, source, outside) + 1
    assert psnr(kept.image, free.image, ~outside) > 30  # inside, the edit is the same


def test_the_mask_finds_what_the_direction_concerns(model):
    for task in ("cat->dog", "cat->cat with glasses"):
        scenes = mini_world.task_pair(task, 1)
        source, target = map(mini_world.render, scenes)
        inversion = p2pz.invert(source, model=model, reference="path", steps=8, progress=False)
        caption = model.encode_text([inversion.prompt])
        edited = caption + 2 * p2pz.direction(*task.split("->"), model=model).states
        mask = mask_of_change(model, inversion.path[:, None], caption, edited.repeat(2, 1, 1), 0.25)
        assert torch.equal(mask[0], mask[1])
        mask = mask[0, 0].bool().repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
        changed = np.abs(source.astype(int) - target).max(-1) > 30
        assert mask[changed].mean() > 0.9 and mask[~mini_world.edit_mask(*scenes)].mean() < 0.35


def test_the_mask_is_of_the_noise_whatever_the_model_predicts(model, pictures, cat_to_dog):
    """A model that predicts v, and the one that predicts the same noise: v = (noise - sqrt(1 - a) x) / sqrt(a)."""

    def predict_v(latents, *rest):
        alpha = next(alphas)
        return (model.unet.predict(latents, *rest) - (1 - alpha) ** 0.5 * latents) / alpha**0.5

    inverted = p2pz.invert(pictures[0], model=model, reference="path", steps=8, progress=False)
    caption = model.encode_text([inverted.prompt])
    arguments = inverted.path[:, None], caption, caption + cat_to_dog.states, 0.4
    schedule = denoising_schedule(8)
    alphas = iter([schedule.alphas_from[round(share * 7)].item() for share in MASK_SHARES])
    other = SimpleNamespace(
        predict=predict_v, condition=model.unet.condition, config=model.unet.config, conv_in=model.unet.conv_in
    )
    expected = mask_of_change(model, *arguments)
    assert 0 < expected.mean() < 1
    assert torch.equal(mask_of_change(replace(model, unet=other, prediction_type="v_prediction"), *arguments), expected)


def test_checkpoints_hold_no_more_losses_with_weights_of_resolutions(model, monkeypatch):
    """Each holds the activations that it was computed of."""
    worker, lists, guide = replace(model, checkpoint=True), [], editing.guide_cross_attention

    def note(reference, losses, *rest):
        lists.append(losses)
        return guide(reference, losses, *rest)

    monkeypatch.setattr(editing, "guide_cross_attention", note)
    latents, kept = torch.randn(1, 4, 32, 32), {}
    conditioning = model.condition(torch.tensor([501]), model.encode_text(["a cat"]))
    with torch.no_grad():
        model.predict(torch.randn(1, 4, 32, 32), conditioning, keep_queries_and_keys(kept))
    plain, weighed = (
        map_gradient(worker, latents, conditioning, kept, resolution_weights=weights) for weights in ((), (1.0, 1.0))
    )
    assert torch.allclose(plain, weighed, atol=1e-6) and [len(losses) for losses in lists] == [len(kept)] * 2


def test_map_guidance_in_some_steps_at_some_resolutions_and_of_some_words(model, pictures, cat_to_dog):
    settings = {"model": model, "steps": STEPS, "prompt": "a photo of a cat", "progress": False, "blend": 0.0}
    inversion = p2pz.invert(pictures[0], reference="path", **{k: v for k, v in settings.items() if k != "blend"})

    def edit(**changes):
        return p2pz.edit(inversion, cat_to_dog, **(settings | {"xa_guidance": 2.0} | changes)).image

    guided, free = edit(), edit(xa_guidance=0.0)
    assert psnr(guided, free) < 45
    for same_as, changes in (
        (guided, {"guided_steps": (0, 1)}),
        (guided, {"resolution_weights": (1.0,)}),
        (guided, {"token_weights": {"cat": 1.0}}),
        (free, {"guided_steps": (0.5, 0.5)}),
        (free, {"resolution_weights": (0.0, 0.0)}),
    ):
        assert psnr(edit(**changes), same_as) > 60, changes
    for changes in (
        {"guided_steps": (0, 0.5)},
        {"guided_steps": (0.5, 1)},
        {"resolution_weights": (0.0, 1.0)},
        {"token_weights": {"a photo of a cat": 0.0}},
    ):
        assert psnr(edit(**changes), guided) < 60 and psnr(edit(**changes), free) < 60, changes


def test_gradient_of_weighted_layers_is_the_weighted_sum(model):
    latents, start = torch.randn(2, 1, 4, 16, 16).unbind(0)
    states = model.encode_text(["a photo of a cat", "a photo of a dog"])
    timestep, kept = torch.tensor([401]), {}
    model.unet(start, timestep, states[:1], keep_queries_and_keys(kept))
    conditioning = model.condition(timestep, states[1:])
    whole, *parts = (
        map_gradient(model, latents, conditioning, kept, resolution_weights=weights)
        for weights in ((2.0, 3.0, 5.0), (1.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    )
    assert relative_error(2 * parts[0] + 3 * parts[1] + 5 * parts[2], whole) < 1e-5


@pytest.fixture(scope="module")
def on_its_path(model, pictures):
    """The tensors and the card of a saved inversion of two steps."""
    inversion = p2pz.invert(pictures[0], model=model, steps=2, prompt="a cat", reference="path", progress=False)
    tensors = {name: getattr(inversion, name) for name in ("latents", "image_latents", "path")}
    tensors["picture"] = torch.from_numpy(np.array(inversion.picture))
    return tensors, {"prompt": "a cat", "steps": "2", "fingerprint": model.fingerprint}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("latents", lambda x: x[:3], r"latents must be float32 \[4, h, w\], not float32 \[3, 32, 32\]"),
        ("latents", lambda x: x[0], r"latents must be .* not float32 \[32, 32\]"),
        ("latents", lambda x: x[None], r"latents must be .* not float32 \[1, 4, 32, 32\]"),
        ("latents", lambda x: x[:, :0], r"latents must be .* not float32 \[4, 0, 32\]"),
        ("latents", lambda x: x.long(), r"latents must be .* not int64"),
        ("latents", lambda x: x * float("nan"), "not finite"),
        ("image_latents", lambda x: x[:, :8, :8], r"image_latents must be float32 \[4, 32, 32\]"),
        ("image_latents", lambda x: x / 0, "not finite"),
        ("path", lambda x: x[:2], r"path must be float32 \[3, 4, 32, 32\], not float32 \[2, 4, 32, 32\]"),
        ("path", lambda x: x[:, 0, 0, 0], r"path must be .* not float32 \[3\]"),
        ("path", lambda x: x * float("nan"), "not finite"),
        ("path", None, "only one of path and picture"),
        ("picture", None, "only one of path and picture"),
        ("picture", lambda x: x.float(), r"picture must be uint8 \[H, W, 3\], not float32 \[128, 128, 3\]"),
        ("picture", lambda x: x.bfloat16(), "picture must be .* not bfloat16"),
        ("picture", lambda x: torch.cat([x, x[..., :2]], -1), r"picture must be .* not uint8 \[128, 128, 5\]"),
        ("picture", lambda x: x[:0], r"picture must be .* not uint8 \[0, 128, 3\]"),
        ("picture", lambda x: x.flatten(), r"picture must be .* not uint8 \[49152\]"),
        ("steps", lambda x: "two", r"invalid literal for int\(\) with base 10: 'two'"),
        ("steps", lambda x: "5", r"path must be float32 \[6, 4, 32, 32\]"),
    ],
    ids=range(20),
)
def test_a_saved_inversion_that_is_damaged(on_its_path, tmp_path, name, change, message):
    tensors, card = (dict(each) for each in on_its_path)
    owner = card if name in card else tensors
    value = owner.pop(name)
    if change:
        owner[name] = change(value)
    save_tensors(tmp_path / "cat.safetensors", "inversion", tensors, card)
    pattern = rf"inversion .*cat\.safetensors is damaged \(.*{message}.*\): invert the image again$"
    with pytest.raises(ValueError, match=pattern):
        p2pz.Inversion.load(tmp_path / "cat.safetensors")


def test_a_saved_inversion_whose_latents_are_only_named(on_its_path, tmp_path):
    tensors, card = on_its_path
    tensors = {name: tensor for name, tensor in tensors.items() if name != "latents"}
    save_tensors(tmp_path / "cat.safetensors", "inversion", tensors, card | {"latents": "x"})
    with pytest.raises(ValueError, match=r"cat\.safetensors lacks latents"):
        p2pz.Inversion.load(tmp_path / "cat.safetensors")


@pytest.mark.parametrize("side", [1, 64])
def test_an_inversion_and_its_picture_are_of_one_size(model, cat_to_dog, on_its_path, tmp_path, side):
    tensors, card = on_its_path
    small = tensors | {"picture": tensors["picture"][:side, :side]}
    save_tensors(tmp_path / "cat.safetensors", "inversion", small, card)
    loaded = p2pz.Inversion.load(tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match=f"has {side} x {side} pixels.* of 128 x 128: invert the image again"):
        p2pz.edit(loaded, cat_to_dog, model=model, progress=False)
    save_tensors(tmp_path / "cat.safetensors", "inversion", tensors, card)
    p2pz.Inversion.load(tmp_path / "cat.safetensors").check_fits(model)
