"""Recorded maps against diffusers', what can be chosen, the calls that hooks see, and that looking changes nothing."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_attention import diffusers_maps

import p2pz
from p2pz import unet
from p2pz.attention import plain
from p2pz.editing import edit_latents
from p2pz.engine import Graphs
from p2pz.inversion import invert_latents
from p2pz.presets import settings_for
from p2pz.recording import Recorded
from p2pz.sampling import sample_latents
from p2pz.schedule import ddim_step, denoising_schedule, inversion_schedule
from p2pz.weights import MINI_FOLDER, mini_world

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENS, SIZE, STEPS = 7, (10, 6), 3
EXACT = {"dtype": torch.float32, "per_head": True, "halves": ("negative", "conditional")}
UNGUIDED = {"steps": 2, "xa_guidance": 0.0, "reference": "denoised", "blend": 0.0, "progress": False}


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pictures():
    """Of two sizes."""
    drawn = [Image.fromarray(np.asarray(mini_world.render(mini_world.task_pair("cat->dog", i)[0]))) for i in range(2)]
    return [drawn[0], drawn[1].crop((16, 0, 112, 128))]


@pytest.fixture(scope="module")
def inversion(model, pictures):
    return p2pz.invert(pictures[0], model=model, prompt="a photo of a cat", steps=2, progress=False)


@pytest.fixture(scope="module")
def peers(model, unet_pair):
    """The bundled model around a reduced UNet with the 16 cross-attention layers of SD 1, and diffusers' one."""
    ours, theirs = unet_pair("sd1")
    assert len(ours.cross_attention_paths) == 16
    return replace(model, unet=ours, graphs=Graphs()), theirs


@pytest.fixture
def texts(peers):
    """States of a negative, a caption and an edited caption."""
    return torch.randn(3, 1, TOKENS, peers[0].unet.config.context_channels).unbind(0)


def their_runs(theirs, starts, schedule, guidance):
    """Maps of diffusers' UNet, step by step: `(branch, half) -> path -> [S, H, N, T]`, for runs of one image each.

    Args:
        starts: branch -> latents and its texts by half.
    """
    runs = {}
    for branch, (latents, halves) in starts.items():
        for timestep, (alpha_from, alpha_to) in zip(schedule.timesteps, schedule.alphas, strict=True):
            noise = {}
            for half, text in halves.items():
                maps = diffusers_maps(theirs, latents, timestep, text)
                for path, probabilities in maps.items():
                    runs.setdefault((branch, half), {}).setdefault(path, []).append(probabilities[0])
                noise[half] = theirs(latents, timestep, text).sample
            if len(noise) == 2:
                noise["conditional"] = noise["negative"] + guidance * (noise["conditional"] - noise["negative"])
            latents = ddim_step(latents, noise["conditional"], alpha_from, alpha_to)
    return {kind: {path: torch.stack(maps) for path, maps in own.items()} for kind, own in runs.items()}


def assert_same_maps(recorded, expected, assert_close, tolerance=1e-5):
    assert set(recorded) == set(expected)
    for kind, own in expected.items():
        assert list(recorded[kind]) == list(own) or set(recorded[kind]) == set(own)
        for path, maps in own.items():
            assert_close(recorded[kind][path], maps, tolerance)


# Maps are those of diffusers' UNet with the same weights.


@torch.no_grad()
def test_a_sample_has_diffusers_maps(peers, texts, assert_close):
    model, theirs = peers
    negative, context, _ = texts
    noise, recorder = torch.randn(1, 4, *SIZE), p2pz.record(**EXACT)
    sample_latents(model, noise, negative, context, STEPS, 3.0, False, recorder=recorder)
    recorder.finish([0], ["words"], [{"sample": 0}])
    starts = {"sample": (noise, {"negative": negative, "conditional": context})}
    expected = their_runs(theirs, starts, denoising_schedule(STEPS), 3.0)
    assert_same_maps(recorder.runs[0].maps, expected, assert_close)
    assert {len(own) for own in expected.values()} == {16}


@torch.no_grad()
def test_an_inversion_has_diffusers_maps(peers, texts, assert_close):
    model, theirs = peers
    latents, recorder = torch.randn(1, 4, *SIZE), p2pz.record(**EXACT)
    settings = settings_for(model, "p2pz", steps=STEPS, autocorrelation_strength=0.0, kl_strength=0.0)
    invert_latents(model, latents, texts[1], settings, torch.Generator(), False, recorder=recorder)
    recorder.finish([0], ["words"], [{"inversion": 0}])
    starts = {"inversion": (latents, {"conditional": texts[1]})}
    assert_same_maps(recorder.runs[0].maps, their_runs(theirs, starts, inversion_schedule(STEPS), 1.0), assert_close)


@torch.no_grad()
@pytest.mark.parametrize("own_negative", [False, True])
def test_an_edit_has_diffusers_maps(peers, texts, own_negative, assert_close):
    """Of both branches; without a negative prompt the reference has one half."""
    model, theirs = peers
    negative, caption, edited = texts
    noise, recorder = torch.randn(1, 4, *SIZE), p2pz.record(**EXACT)
    fixed = {"guidance": 3.0, "xa_guidance": 0.0, "reference": "denoised", "blend": 0.0}
    settings = settings_for(model, "p2pz", steps=STEPS, **fixed)
    given = negative if own_negative else None
    edit_latents(model, noise, caption, given, edited, settings, False, recorder=recorder)
    recorder.finish([0], ["words"], [{"edit": 0, "reference": 0}])
    halves = {"negative": negative if own_negative else caption, "conditional": edited}
    reference = {"negative": negative, "conditional": caption} if own_negative else {"conditional": caption}
    starts = {"edit": (noise, halves), "reference": (noise, reference)}
    expected = their_runs(theirs, starts, denoising_schedule(STEPS), 3.0)
    assert_same_maps(recorder.runs[0].maps, expected, assert_close)
    assert (recorder.runs[0].timesteps, recorder.runs[0].steps) == ((667, 334, 1), (0, 1, 2))


# What can be chosen.


@pytest.fixture(scope="module")
def everything(model, inversion):
    """All maps of an edit, as exactly as they can be had."""
    recorder = p2pz.record(**EXACT)
    p2pz.edit(inversion, "cat->dog", model=model, guidance=2.0, negative_prompt="", record=recorder, **UNGUIDED)
    return recorder.runs[0]


@pytest.mark.parametrize(
    "choice",
    [
        {"per_head": True},
        {"tokens": [5, 0, 76]},
        {"steps": [1]},
        {"branches": ["reference"], "halves": ["negative"]},
        {"layers": ["mid_block", "up_blocks.*.attentions.1"], "tokens": (3,), "per_head": True},
        {"dtype": torch.bfloat16, "host": False},
    ],
    ids=str,
)
def test_choices_are_parts_of_everything(model, inversion, everything, choice):
    recorder = p2pz.record(**{"dtype": torch.float32} | choice)
    p2pz.edit(inversion, "cat->dog", model=model, guidance=2.0, negative_prompt="", record=recorder, **UNGUIDED)
    (run,) = recorder.runs
    tokens, steps = list(choice.get("tokens", range(77))), list(choice.get("steps", (0, 1)))
    assert (run.tokens, run.steps, run.prompt) == (tuple(tokens), tuple(steps), "a photo of a cat")
    branches, halves = choice.get("branches", ("edit", "reference")), choice.get("halves", ("conditional",))
    assert set(run.maps) == {(branch, half) for branch in branches for half in halves}
    wanted = [re.compile(pattern.replace("*", ".*")) for pattern in choice.get("layers", ("",))]
    paths = [path for path in everything.sites if any(pattern.search(path) for pattern in wanted)]
    assert list(run.sites) == paths and len(paths) == (4 if "layers" in choice else 10)
    for kind, own in run.maps.items():
        assert list(own) == paths
        for path, maps in own.items():
            expected = everything.maps[kind][path][steps][..., tokens]
            expected = expected if choice.get("per_head") else expected.mean(1)
            assert maps.dtype == choice.get("dtype", torch.float32) and maps.shape == expected.shape
            torch.testing.assert_close(maps.float(), expected, rtol=1e-2 if "dtype" in choice else 0, atol=1e-7)


def test_every_image_and_direction_has_its_own_run(model, pictures, assert_close):
    """Two sizes, two directions, batches that they do not fill: what the edits alone record, in the results' order."""
    directions = ["cat->dog", "cat->cat with glasses"]
    options = {"model": model, "prompt": "a photo of a cat"} | UNGUIDED
    many, one = p2pz.record(dtype=torch.float32), p2pz.record(dtype=torch.float32)
    p2pz.edit([pictures[0], pictures[1], pictures[0]], directions, batch_size=3, record=many, **options)
    assert len(many.runs) == 6
    for i, j in ((0, 1), (1, 0), (1, 1)):
        p2pz.edit(pictures[i], directions[j], record=one, **options)
        run, (alone,) = many.runs[2 * i + j], one.runs
        assert_same_maps(run.maps, alone.maps, assert_close, 1e-4)
        assert run.sites == alone.sites and run.steps == alone.steps
    assert_same_maps(many.runs[4].maps, many.runs[0].maps, assert_close, 1e-4)
    assert many.runs[0].sites != many.runs[2].sites


def test_samples_and_inversions_in_batches(model, pictures, assert_close):
    prompts = ["a photo of a cat", "a photo of a dog", "a sketch of a bear"]
    many, one = (p2pz.record("mid_block", dtype=torch.float32) for _ in range(2))
    p2pz.sample(prompts, model=model, steps=2, seed=3, progress=False, record=many)
    assert [run.prompt for run in many.runs] == prompts
    p2pz.sample(prompts[1], model=model, steps=2, seed=4, progress=False, record=one)
    assert_same_maps(many.runs[1].maps, one.runs[0].maps, assert_close)
    p2pz.invert(pictures, model=model, prompt=prompts[:2], steps=2, progress=False, record=many)
    assert [run.prompt for run in many.runs] == prompts[:2]  # a new call begins anew
    p2pz.invert(pictures[1], model=model, prompt=prompts[1], steps=2, progress=False, record=one)
    assert_same_maps(many.runs[1].maps, one.runs[0].maps, assert_close)
    assert list(one.runs[0].maps) == [("inversion", "conditional")] and one.runs[0].timesteps == (1, 501)


def test_nothing_is_left_unwritten(model, inversion, poisoned_memory):
    recorder = p2pz.record(dtype=torch.float32, steps=[0, 1], halves=("conditional", "negative"))
    p2pz.edit(inversion, "cat->dog", model=model, guidance=2.0, record=recorder, **UNGUIDED)
    maps = [x for own in recorder.runs[0].maps.values() for x in own.values()]
    assert len(maps) == 30 and all(torch.allclose(x.sum(-1), torch.ones(())) for x in maps)


def test_unwanted_steps_cost_nothing(model, monkeypatch):
    calls = []
    arithmetic = p2pz.recording.attention_probabilities
    monkeypatch.setattr(p2pz.recording, "attention_probabilities", lambda q, k: calls.append(1) or arithmetic(q, k))
    p2pz.sample("a photo of a cat", model=model, steps=3, progress=False, record=p2pz.record(steps=[1]))
    assert len(calls) == 10


# Limits and errors.


@pytest.mark.parametrize("per_head", [False, True])
def test_the_estimate_is_what_is_taken(model, inversion, per_head):
    kind = {"halves": ("conditional", "negative"), "per_head": per_head, "tokens": [1, 2]}
    recorder = p2pz.record(**kind)
    p2pz.edit(inversion, "cat->dog", model=model, guidance=2.0, negative_prompt="", record=recorder, **UNGUIDED)
    taken = sum(maps.nbytes for own in recorder.runs[0].maps.values() for maps in own.values())
    assert recorder.bytes_for(model, steps=2) == taken > 0
    assert recorder.bytes_for(model, "sample", steps=4, images=3, size=(64, 256)) == taken * 3
    assert p2pz.record(steps=[0, 9], **kind).bytes_for(model, "invert", steps=5) == taken // 4
    p2pz.edit(inversion, "cat->dog", model=model, guidance=1.0, record=recorder, **UNGUIDED)
    assert sum(maps.nbytes for own in recorder.runs[0].maps.values() for maps in own.values()) == taken // 2
    with pytest.raises(ValueError, match="method must be one of edit, sample, invert"):
        recorder.bytes_for(model, "draw")


def test_too_much_is_not_begun(model, monkeypatch):
    recorder = p2pz.record()
    recorder.max_gib = (recorder.bytes_for(model, "sample", steps=2, images=2) - 1) / 2**30
    for _ in range(2):  # each call counts alone
        p2pz.sample(["a photo of a cat"], model=model, steps=2, guidance=1.0, progress=False, record=recorder)
    monkeypatch.setattr(unet.UNet, "predict", None)  # a step would fail otherwise
    with pytest.raises(ValueError, match=r"these maps take 0\.00 GiB, more than max_gib=.*: record fewer"):
        p2pz.sample(["a photo of a cat"] * 2, model=model, steps=2, guidance=1.0, progress=False, record=recorder)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"branches": ()}, "branches must be a list of edit, reference, sample, inversion"),
        ({"branches": "edit"}, "branches must be a list"),
        ({"halves": ["both"]}, "halves must be a list of conditional, negative"),
        ({"tokens": []}, "tokens must be distinct whole numbers"),
        ({"tokens": [1, 1]}, "tokens must be distinct"),
        ({"steps": [-1]}, "steps must be distinct"),
        ({"steps": [0.5]}, "steps must be distinct"),
        ({"dtype": torch.float64}, "dtype must be float16, bfloat16 or float32"),
    ],
)
def test_wrong_choices_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        p2pz.record(**choice)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"steps": [1, 2]}, "steps to record must be from 0 to 1, not 2"),
        ({"tokens": [77]}, "tokens to record must be from 0 to 76, not 77"),
        ({"layers": "attn3"}, "no cross-attention layer's path contains attn3; there are down_blocks"),
        ({"branches": ["edit"]}, "nothing to record: this run is sample conditional, but of branches edit"),
        ({"halves": ["negative"]}, "nothing to record: this run is sample conditional"),
    ],
)
def test_what_a_run_has_not_got_is_refused(model, choice, message):
    with pytest.raises(ValueError, match=message):
        p2pz.sample("a cat", model=model, steps=2, guidance=1.0, progress=False, record=p2pz.record(**choice))


def test_maps_of_another_branch_are_named(everything):
    with pytest.raises(ValueError, match="there are no maps of sample conditional; recorded: edit negative, edit cond"):
        everything.of("sample")


def test_saved_maps_come_back(everything, tmp_path):
    everything.save(tmp_path / "maps.safetensors")
    back = Recorded.load(tmp_path / "maps.safetensors")
    assert (back.sites, back.prompt, back.tokens) == (everything.sites, everything.prompt, everything.tokens)
    assert (back.steps, back.timesteps) == (everything.steps, everything.timesteps)
    assert set(back.maps) == set(everything.maps) and list(back.of("edit")) == list(everything.of("edit"))
    assert all(
        torch.equal(maps, back.maps[k][path]) for k, own in everything.maps.items() for path, maps in own.items()
    )
    with pytest.raises(ValueError, match=r"maps .*no\.safetensors does not exist"):
        Recorded.load(tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    ("card", "rename", "cut", "message"),
    [
        ({"steps": "hello"}, {}, {}, "Expecting value"),
        ({"tokens": "5"}, {}, {}, "not iterable"),
        ({"timesteps": '["a"]'}, {}, {}, "invalid literal"),
        ({"sites": '[{"a": 1}]'}, {}, {}, "path"),
        ({"sites": "[" * 100000}, {}, {}, "recursion depth"),
        ({"sites": "[]"}, {}, {}, "attn2"),
        ({}, {"edit conditional": "edit"}, {}, "expected 3, got 2"),
        ({}, {}, {0: 1}, "must be float32"),
        ({}, {}, {-2: 5}, "must be float32"),
        ({}, {}, {-1: 1}, "must be float32"),
    ],
    ids=range(10),
)
def test_saved_maps_that_are_damaged(everything, tmp_path, card, rename, cut, message):
    path = tmp_path / "maps.safetensors"
    everything.save(path)
    with safe_open(path, "pt") as file:
        tensors, known = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for old, new in rename.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    for axis, size in cut.items():
        tensors = {name: tensor.narrow(axis, 0, size).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, known | card)
    with pytest.raises(ValueError, match=rf"maps .*maps\.safetensors is damaged \(.*{message}.*: record them again$"):
        Recorded.load(path)


# Hooks.


def edit_of(model, inversion, attend=plain, record=None, directions=("cat->dog",), guidance=1.0, **options):
    options = UNGUIDED | {"guidance": guidance} | options
    results = p2pz.edit(inversion, list(directions), model=model, attend=attend, record=record, **options)
    return [np.asarray(picture) for result in results for picture in (result.image, result.reconstruction)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": 3.0, "xa_guidance": 1.0, "negative_prompt": "a photo of a dog", "gradient": "halves"}
        | {"directions": ("cat->dog", "cat->cat with glasses"), "reference": "path", "steps": 1},
    ],
    ids=["plain", "guided, both halves, two directions"],
)
def test_looking_changes_nothing(model, pictures, inversion, options, monkeypatch):
    """Latents, not only pictures, are the same to the last bit with a hook that gives the default and a recorder."""
    if options:
        inversion = p2pz.invert(pictures[0], model=model, prompt="a cat", steps=1, reference="path", progress=False)
    latents = []
    decode = p2pz.model.Model.decode_latents
    monkeypatch.setattr(p2pz.model.Model, "decode_latents", lambda self, x: latents.append(x) or decode(self, x))
    edit_of(model, inversion, **options)
    edit_of(model, inversion, lambda q, k, v, site: plain(q, k, v, site), **options)
    edit_of(model, inversion, record=p2pz.record(per_head=True, halves=("conditional", "negative")), **options)
    edit_of(model, inversion, lambda q, k, v, site: 0.99 * plain(q, k, v, site), **options)
    bare, hooked, recorded, changed = latents
    assert torch.equal(bare, hooked) and torch.equal(bare, recorded)
    assert not torch.equal(bare[0], changed[0])


@pytest.mark.parametrize(
    "choice", [{}, {"steps": [2, 1], "tokens": [2, 0], "per_head": True}, {"branches": ["edit"]}], ids=str
)
@pytest.mark.parametrize("options", [{}, {"guidance": 3.0, "guided_steps": (0.5, 1.0)}], ids=str)
def test_reference_maps_are_made_of_the_inversions_queries(model, pictures, choice, options, monkeypatch):
    """Without passes of their own, and the same to the last bit as with passes, which a saved inversion needs."""
    rows, predict = [], unet.UNet.predict
    monkeypatch.setattr(unet.UNet, "predict", lambda self, x, *rest: rows.append(len(x)) or predict(self, x, *rest))
    settings = {"model": model, "steps": 3, "prompt": "a cat", "progress": False}
    inversion = p2pz.invert(pictures[0], reference="path", **settings)
    recorders, counts = [p2pz.record(dtype=torch.float32, **choice) for _ in range(2)], []
    for img, record in ((pictures[0], None), (pictures[0], recorders[0]), (inversion, recorders[1])):
        rows.clear()
        p2pz.edit(img, "cat->dog", record=record, **settings, **options)
        counts.append(sum(rows))
    unseen = 2 if choice == {"branches": ["edit"]} and options else 0  # steps at which nobody looks at the reference
    assert counts[0] == counts[1] == counts[2] + unseen  # 3 of the inversion, or 3 of the reference
    for kept, computed in zip(*(recorder.runs for recorder in recorders), strict=True):
        assert kept.steps == computed.steps and list(kept.maps) == list(computed.maps)
        for name, maps in kept.maps.items():
            assert all(torch.equal(seen, computed.maps[name][path]) for path, seen in maps.items())


@pytest.mark.parametrize(
    ("guidance", "negative_prompt", "xa_guidance", "gradient"),
    [
        (1.0, None, 0.0, "both"),
        (1.0, None, 1.0, "halves"),
        (3.0, None, 1.0, "conditional"),
        (3.0, "a photo of a dog", 0.0, "both"),
        (3.0, "a photo of a dog", 1.0, "halves"),
    ],
)
def test_sites_say_what_the_rows_are(model, inversion, guidance, negative_prompt, xa_guidance, gradient):
    calls = []

    def note(q, k, v, site):
        calls.append((site, len(q), q.requires_grad))
        return plain(q, k, v, site)

    options = {"xa_guidance": xa_guidance, "gradient": gradient, "guided_steps": (0.5, 1.0)}
    options |= {"guidance": guidance, "directions": ("cat->dog", "cat->cat with glasses")}
    options["negative_prompt"] = negative_prompt
    edit_of(model, inversion, note, **options)

    edit_halves = ["conditional"] if guidance == 1 else ["negative", "conditional"]
    reference_halves = edit_halves if negative_prompt else ["conditional"]
    guided_halves = ["conditional"] if gradient == "conditional" else edit_halves
    expected = []
    for step, timestep in enumerate((501, 1)):
        if step == 0:
            expected += [("reference", half, 0, 501, False, 1) for half in reference_halves]
        if step == 1 and xa_guidance:  # guided_steps leaves the first one out
            expected += [("edit", half, 1, 1, True, 2) for half in guided_halves]
        expected += [("edit", half, step, timestep, False, 2) for half in edit_halves]
        if step == 0:
            expected += [("reference", half, 1, 1, False, 1) for half in reference_halves]
    for bare in model.unet.sites(32, 32):
        own = [(site, rows, gradient) for site, rows, gradient in calls if site.path == bare.path]
        assert [(s.branch, s.half, s.step, s.timestep, s.guiding, rows) for s, rows, _ in own] == expected
        assert {replace(s, branch="", half="conditional", step=0, timestep=0, guiding=False) for s, *_ in own} == {bare}
        assert all(gradient == site.guiding for site, _, gradient in own)


def test_sites_of_samples_and_inversions(model, pictures):
    calls = []

    def note(q, k, v, site):
        calls.append((site.branch, site.half, site.step, site.timestep, len(q)))
        return plain(q, k, v, site)

    p2pz.sample(["a cat", "a dog"], model=model, steps=2, guidance=2.0, progress=False, attend=note)
    halves = ("negative", "conditional")
    assert set(calls) == {("sample", half, *step, 2) for half in halves for step in ((0, 501), (1, 1))}
    calls.clear()
    p2pz.invert(pictures[0], model=model, prompt="a cat", steps=2, progress=False, attend=note)
    assert list(dict.fromkeys(calls)) == [("inversion", "conditional", i, t, 1) for i, t in ((0, 1), (1, 501))]


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (lambda out: None, "NoneType"),
        (lambda out: out[:, :-1], r"torch.float32 \[1, 1023, 4, 16\] on cpu"),
        (lambda out: out.flatten(2), r"torch.float32 \[1, 1024, 64\] on cpu"),
        (lambda out: out.double(), r"torch.float64 \[1, 1024, 4, 16\] on cpu"),
        (lambda out: out.to("meta"), r"torch.float32 .* on meta"),
        (lambda out: (out, out), "tuple"),
    ],
)
def test_bad_outputs_are_refused_by_name(model, inversion, bad, found):
    def hook(q, k, v, site):
        out = plain(q, k, v, site)
        return bad(out) if site.branch == "edit" and site.kind == "cross" and site.step == 1 else out

    place = r"down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn2 \(step 1, edit conditional\)"
    with pytest.raises(ValueError, match=rf"attend must return .* not {found}.*: at {place}"):
        edit_of(model, inversion, hook)


# On a GPU.


@needs_gpu
@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 3e-2)])
def test_maps_are_the_same_with_and_without_graphs(host, dtype, tolerance, assert_close):
    model = p2pz.load(MINI_FOLDER, device="cuda", dtype=dtype)
    picture = mini_world.render(mini_world.task_pair("cat->dog", 0)[0])
    options = {"prompt": "a photo of a cat", "steps": 4, "guidance": 2.0, "guided_steps": (0.25, 0.75)}
    runs = []
    for each in (model, replace(model, graphs=Graphs(record=False))):
        recorder = p2pz.record(dtype=torch.float32, halves=("conditional", "negative"), steps=[0, 2, 3], host=host)
        result = p2pz.edit(picture, "cat->dog", model=each, progress=False, record=recorder, **options)
        p2pz.edit(picture, "cat->dog", model=each, progress=False, **options)  # maps must outlive the next replays
        runs.append((recorder.runs[0], result))
    (graphs, image), (steps, other) = runs
    assert_same_maps(graphs.maps, steps.maps, assert_close, tolerance)
    assert {maps.device.type for own in graphs.maps.values() for maps in own.values()} == {"cpu" if host else "cuda"}
    assert p2pz.images.psnr(image.image, other.image) > (50 if dtype == torch.float32 else 30)


@needs_gpu
def test_recording_leaves_an_edit_on_a_gpu_alone(assert_close):
    model = p2pz.load(MINI_FOLDER, device="cuda", dtype=torch.float32)
    picture = mini_world.render(mini_world.task_pair("cat->dog", 0)[0])
    options = {"model": model, "prompt": "a photo of a cat", "steps": 4, "progress": False}
    images = [p2pz.edit(picture, "cat->dog", record=record, **options).image for record in (None, p2pz.record())]
    assert p2pz.images.psnr(*images) > 50


def test_maps_lie_in_pageable_memory_if_the_host_has_none_to_pin(monkeypatch):
    recorder, empty = p2pz.record(), torch.empty
    recorder._device = torch.device("cuda")

    def refuse(*shape, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("cudaHostAlloc failed")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    table = recorder._table(2, 3)
    assert (table.shape, table.dtype, table.device.type) == ((2, 3), torch.float16, "cpu")
