"""Features of residual blocks as an argument: against diffusers with forward hooks, in whole runs, and injected."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import p2pz
from p2pz import changes
from p2pz.attention import HALVES, Hooks, Site, keep_queries_and_keys, plain
from p2pz.editing import edit_latents, map_gradient
from p2pz.engine import Graphs
from p2pz.presets import settings_for
from p2pz.weights import MINI_FOLDER, mini_world

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BLOCK = "up_blocks.1.resnets.1"
SITE = Site(BLOCK, "features", 4, 3, 0, "edit", "conditional", 2, 401)


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


def inputs(unet, batch=2, size=(13, 10)):
    context = torch.randn(batch, 7, unet.config.context_channels)
    return torch.randn(batch, 4, *size), torch.tensor([981, 21, 500])[:batch], context


@contextmanager
def hooked(theirs, change):
    """What the second convolutions of diffusers' residual blocks make goes through `change(x with bias, path)`."""
    with ExitStack() as handles:
        for path, module in theirs.named_modules():
            if hasattr(module, "conv2"):
                hook = module.conv2.register_forward_hook(lambda _, __, out, path=path: change(out, path))
                handles.callback(hook.remove)
        yield


# In the UNet.


@pytest.mark.parametrize("name", ["sd1", "mini"])
def test_every_residual_block_is_seen_once(name, unet_pair, assert_close):
    """In their order; with its module's name, and what diffusers adds to the block's input, but for the bias."""
    ours, theirs = unet_pair(name)
    args, seen, expected = inputs(ours), [], {}

    def look(x, site):
        seen.append((site, x))
        return x

    def keep(out, path):
        expected[path] = out

    output = ours(*args, Hooks(plain, look))
    assert torch.equal(output, ours(*args))
    with hooked(theirs, keep):
        theirs(*args)
    assert [site.path for site, _ in seen] == list(expected) and len(seen) == {"sd1": 22, "mini": 11}[name]
    for site, x in seen:
        bias = theirs.get_submodule(site.path).conv2.bias[:, None, None]
        assert_close(x + bias, expected[site.path])
        assert site == Site(site.path, "features", *x.shape[2:], heads=0)


@pytest.mark.parametrize("path", [BLOCK, "up_blocks.0", "mid_block", "down_blocks.*.resnets.0"])
def test_what_it_returns_is_used(path, unet_pair, assert_close):
    """Other images' features in one block, or in several: output and gradient are those of diffusers."""
    ours, theirs = unet_pair("sd1")
    latents, timesteps, context = inputs(ours, batch=3, size=(8, 6))
    weights = torch.randn_like(latents)
    others = changes.only(path, lambda x, site: x[[0, 0, 2]] * 30)

    def their_others(out, name):
        bias = theirs.get_submodule(name).conv2.bias[:, None, None]
        return (out - bias)[[0, 0, 2]] * 30 + bias if fnmatchcase(name, f"{path}*") else out

    def output_and_gradient(predict):
        leaf = latents.clone().requires_grad_()
        output = predict(leaf)
        return output.detach(), torch.autograd.grad((output * weights).sum(), leaf)[0]

    def our_unet(leaf, checkpoint=False):
        return ours.predict(leaf, ours.condition(timesteps, context).one_each(), Hooks(plain, others), checkpoint)

    def their_unet(leaf):
        return theirs(leaf, timesteps, context).sample

    with hooked(theirs, their_others):
        expected = output_and_gradient(their_unet)
    for checkpoint in (False, True):
        for own, other in zip(output_and_gradient(partial(our_unet, checkpoint=checkpoint)), expected, strict=True):
            assert_close(own, other)
    untouched = theirs(latents, timesteps, context).sample
    assert (untouched - expected[0]).norm() > 1e-3 * untouched.norm()


# In whole runs.


class Spy(Graphs):
    """Notes what is asked of it."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def call(self, kind, *rest):
        self.asked.append(kind[0])
        return super().call(kind, *rest)

    def run(self, kind, *rest, **options):
        self.asked.append(kind[0])
        return super().run(kind, *rest, **options)


def everything(model, record=None, **hooks):
    """Latents of inversions, and pictures of edits and samples; two images of one size and a wide one. And the graphs
    that were asked for."""
    spy, (first, second) = Spy(), (mini_world.render(mini_world.task_pair("cat->dog", i)[0]) for i in range(2))
    options = {"model": replace(model, graphs=spy), "steps": 2, "progress": False, "record": record} | hooks
    images = [first, second, np.asarray(first)[32:]]
    inversions = p2pz.invert(images, prompt="a photo of a cat", size=64, **options)
    guided = {"guidance": 2.0, "xa_guidance": 0.1, "guided_steps": (0.5, 1.0), "gradient": "both"}
    results = p2pz.edit(inversions, "cat->dog", negative_prompt="a bear", **options, **guided)
    images = [each for result in results for each in (result.image, result.reconstruction)]
    images += p2pz.sample(["a cat", "a dog"], size=(64, 48), **options)
    return [each.latents for each in inversions] + [torch.from_numpy(np.array(image)) for image in images], spy.asked


@pytest.mark.filterwarnings("ignore:the bundled model knows only its cartoon world")
def test_a_hook_that_changes_nothing_changes_nothing(model):
    """To the last bit, also beside a recorder; and it is told what the attention behind its block is told. Graphs are
    for runs without a hook."""
    blocks, layers, recorder = [], [], p2pz.record("mid_block")

    def look(x, site):
        assert x.shape[2:] == (site.height, site.width)
        if site.path != "mid_block.resnets.1":  # which no transformer follows
            blocks.append((replace(site, path=site.path.replace("resnets", "attentions"), kind=""), len(x)))
        return x

    def attend(q, k, v, site):
        if site.kind == "self":
            path = site.path.removesuffix(".transformer_blocks.0.attn1")
            layers.append((replace(site, path=path, kind="", heads=0), len(q)))
        return plain(q, k, v, site)

    expected, asked = everything(model, features=None)
    assert {"invert", "edit", "sample"} <= {kind if isinstance(kind, str) else kind[0] for kind in asked}
    for more in ({}, {"attend": attend, "record": recorder}):
        blocks.clear()
        made, asked = everything(model, features=look, **more)
        assert not {"invert", "edit", "sample", "reference"} & set(asked)
        for own, other in zip(made, expected, strict=True):
            assert torch.equal(own, other)
    assert blocks == layers and {site.branch for site, _ in blocks} == {"edit", "reference", "sample", "inversion"}
    assert {rows for _, rows in blocks} == {1, 2} and any(site.guiding for site, _ in blocks)
    assert len(recorder.runs) == 2  # the samples'


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (lambda x: None, "NoneType"),
        (lambda x: x[:, :-1], r"torch.float32 \[2, 127, 8, 6\] on cpu"),
        (lambda x: x.mean((2, 3), keepdim=True), r"torch.float32 \[2, 128, 1, 1\] on cpu"),
        (lambda x: x.double(), r"torch.float64 \[2, 128, 8, 6\] on cpu"),
        (lambda x: x.to("meta"), r"torch.float32 .* on meta"),
    ],
)
def test_bad_outputs_are_refused_by_name(model, bad, found):
    place = rf"{BLOCK} \(step 1, sample conditional\)".replace(".", r"\.")
    hook = changes.only(BLOCK, changes.between(range(1, 2), lambda x, site: bad(x) if site.half == HALVES[0] else x))
    with pytest.raises(ValueError, match=rf"features must return .*8, 6.* on cpu, not {found}: at {place}"):
        p2pz.sample(["a cat", "a dog"], model=model, size=(48, 64), steps=2, progress=False, features=hook)


@pytest.mark.parametrize(("given", "message"), [
    ({"attend": 3}, r"attend must be a function \(see p2pz\.attention\), not 3"),
    ({"features": "inject"}, r"features must be a function \(see p2pz\.attention\), not 'inject'"),
    ({"record": {}}, r"record must be a recorder, as p2pz\.record\(\) gives, not \{\}"),
], ids=str)  # fmt: skip
def test_what_are_no_hooks_is_refused(model, given, message):
    picture = mini_world.render(mini_world.task_pair("cat->dog", 0)[0])
    options = {"model": model, "steps": 1, "progress": False} | given
    for call in (p2pz.sample, p2pz.invert, partial(p2pz.edit, direction="cat->dog")):
        with pytest.raises(ValueError, match=message):
            call("a cat" if call is p2pz.sample else picture, **options)


# Changes.


def test_changes_combine():
    """The last of a chain is applied first; elsewhere and in other steps features stay."""
    x, log = torch.randn(2, 5, 4, 3), []

    def note(name, factor, summand):
        return lambda x, site: log.append(name) or factor * x + summand

    double, add = note("double", 2, 0), note("add", 1, 1)
    assert torch.equal(changes.chain(double, add)(x, SITE), 2 * (x + 1))
    assert log == ["add", "double"]
    assert torch.equal(changes.chain(changes.chain(add, double), changes.only("up_blocks", double))(x, SITE), 4 * x + 1)
    for here in ("mid_block", changes.where(kind="self"), changes.where(half="negative"), lambda site: site.heads):
        assert changes.only(here, double)(x, SITE) is x
    assert torch.equal(changes.only(changes.where(BLOCK, kind="features", positions=(12, 12)), double)(x, SITE), 2 * x)
    assert changes.between(range(2), double)(x, SITE) is x  # step 2
    assert changes.between((0.6, 1.0), double)(x, SITE) is x  # timestep 401: 60 % of the way
    late = changes.chain(changes.between((0.5, 0.6), double), changes.only("down_blocks", add))
    assert torch.equal(late(x, SITE), 2 * x)


def test_the_reference_s_features_of_the_same_step_and_half():
    reference, later, edit = torch.randn(3, 2, 5, 4, 3)
    inject, edits = changes.inject_features(), torch.cat([edit, -edit])  # with two directions
    inject(reference, replace(SITE, branch="reference"))
    assert torch.equal(inject(edits, SITE), torch.cat([reference, reference]))
    assert torch.equal(inject(edit, replace(SITE, half="negative")), reference)  # the reference has no such half
    inject(-reference, replace(SITE, branch="reference", half="negative"))
    assert torch.equal(inject(edit, replace(SITE, half="negative")), -reference)
    inject(later, replace(SITE, branch="reference", step=3))
    assert torch.equal(inject(edit, replace(SITE, half="negative", step=3)), later)
    for branch in ("reference", "inversion"):
        assert inject(edit, replace(SITE, branch=branch)) is edit
    for wrong in (replace(SITE, step=4), replace(SITE, path="mid_block.resnets.0"), replace(SITE, branch="sample")):
        with pytest.raises(ValueError, match=f"has not seen step {wrong.step} of it at {wrong.path}: do not keep it"):
            inject(edit, wrong)


def fixed(model, **options):
    """Noise of two wide images, their captions, and other captions for them."""
    texts = model.encode_text(["a photo of a cat", "a photo of a horse", "a photo of a dog", "a photo of a zebra"])
    settings = {"steps": 3, "guidance": 2.0, "reference": "denoised", "blend": 0.0, "xa_guidance": 0.0}
    return torch.randn(2, 4, 12, 16), texts[:2], texts[2:], settings_for(model, "p2pz", **settings | options)


def test_plug_and_play_equals_forward_hooks_on_diffusers(model, assert_close):
    """The whole reference first, its features kept for all steps; then the edit, a forward hook putting them in."""
    noise, caption, edited, settings = fixed(model)
    unet = UNet2DConditionModel.from_pretrained(MINI_FOLDER, subfolder="unet", torch_dtype=torch.float32)
    scheduler = DDIMScheduler.from_pretrained(MINI_FOLDER, subfolder="scheduler")
    scheduler.set_timesteps(3)
    kept, now = {}, []

    def keep(out, path):
        kept.setdefault(path, []).append(out)

    def put(out, path):
        return torch.cat([kept[path][now[0]]] * 2) if path == BLOCK and now[0] < 2 else None

    @torch.no_grad()
    def denoise(change, texts, pairs):
        latents = noise
        for i, timestep in enumerate(scheduler.timesteps):
            now[:] = [i]
            with hooked(unet, change):
                out = unet(torch.cat([latents] * (1 + pairs)), timestep, texts).sample
            if pairs:
                negative, conditional = out.chunk(2)
                out = negative + settings.guidance * (conditional - negative)
            latents = scheduler.step(out, timestep, latents).prev_sample
        return latents

    expected_reference = denoise(keep, caption, False)
    expected = denoise(put, torch.cat([caption, edited]), True)
    inject = changes.only(BLOCK, changes.between((0.0, 0.7), changes.inject_features()))
    latents, reference = edit_latents(model, noise, caption, None, edited, settings, False, attend=Hooks(plain, inject))
    assert_close(reference, expected_reference, 1e-4)
    assert_close(latents, expected, 1e-4)
    without, _ = edit_latents(model, noise, caption, None, edited, settings, False)
    assert (latents - without).norm() > 1e-2 * without.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("gradient", ["conditional", "halves"])
def test_injection_in_guided_edits_equals_one_by_hand(model, gradient, negative, device, assert_close):
    """With maps injected too; by hand everything of the reference is kept for good."""
    model = model if device == "cpu" else p2pz.load(MINI_FOLDER, device=device, dtype=torch.float32)
    noise, caption, edited, settings = fixed(
        model, steps=2, xa_guidance=1.0, guided_steps=(0.0, 1.0), gradient=gradient
    )
    edited, bear = torch.cat([edited, edited.flip(0)]), model.encode_text(["a bear"]).expand_as(caption)
    seen, decoder = {}, changes.only("up_blocks", changes.inject_queries_and_keys())

    def by_hand(x, site):
        if site.branch == "reference":
            seen[site.path, site.half, site.step] = x
        if site.branch == "reference" or site.path not in (BLOCK, "mid_block.resnets.1"):
            return x
        return torch.cat([seen[site.path, site.half if negative else "conditional", site.step]] * 2)

    inject = changes.only(lambda site: site.path in (BLOCK, "mid_block.resnets.1"), changes.inject_features())
    given = noise.to(device), caption, bear if negative else None, edited, settings, False
    results = [
        torch.cat(edit_latents(replace(model, checkpoint=checkpoint), *given, attend=Hooks(decoder, features)))
        for checkpoint, features in ((False, by_hand), (False, inject), (True, inject), (False, None))
    ]
    tolerance = 1e-4 if device == "cpu" else 1e-3
    for result in results[1:3]:
        assert_close(result, results[0], tolerance)
    assert_close(results[3][4:], results[0][4:], tolerance)  # the reference
    assert (results[3][:4] - results[0][:4]).norm() > 1e-2 * results[0][:4].norm()


def test_the_guidance_gradient_goes_through_features(model, assert_close):
    """Against autograd of the maps' distance, with a function that is differentiated."""
    latents, texts = torch.randn(2, 2, 4, 12, 8).unbind(0), torch.randn(2, 2, 77, 128)
    first, second = (model.condition(torch.tensor([481]), text) for text in texts)
    first, second = (each._replace(shifts=each.shifts[0]) for each in (first, second))
    features = changes.only("_blocks.1", lambda x, site: x.tanh() * x[:1])
    reference, own = {}, {}
    with torch.no_grad():
        model.predict(latents[0], first, keep_queries_and_keys(reference))
    leaf = latents[1].clone().requires_grad_()
    model.predict(leaf, second, Hooks(keep_queries_and_keys(own), features))

    def full_maps(q, k):
        return (torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)

    loss = sum((full_maps(*own[path]) - full_maps(*reference[path])).square().sum((2, 3)).mean(1).sum() for path in own)
    expected = torch.autograd.grad(loss, leaf)[0]
    for checkpoint in (False, True):
        each = replace(model, checkpoint=checkpoint)
        assert_close(map_gradient(each, latents[1], second, reference, Hooks(plain, features)), expected, 1e-4)
    without = map_gradient(model, latents[1], second, reference)
    assert (without - expected).norm() > 1e-2 * expected.norm()
