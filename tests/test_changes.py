"""Changes of attention: how they combine, each against plain arithmetic on full maps, and what each is good for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import p2pz
from p2pz import changes
from p2pz.attention import Site, keep_queries_and_keys, plain
from p2pz.editing import edit_latents, map_gradient
from p2pz.images import psnr
from p2pz.methods import align_tokens
from p2pz.presets import settings_for
from p2pz.schedule import denoising_schedule
from p2pz.tokens import places_of, weigh_tokens
from p2pz.weights import MINI_FOLDER, mini_world

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CROSS = Site("up_blocks.1.attentions.0.transformer_blocks.0.attn2", "cross", 4, 3, 2, "edit", "conditional", 2, 401)
SELF = replace(CROSS, path=CROSS.path.replace("attn2", "attn1"), kind="self")
UNGUIDED = {"xa_guidance": 0.0, "reference": "denoised", "blend": 0.0, "progress": False}


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


def states(rows=2, site=CROSS, tokens=7):
    """q, k and v in float64."""
    counts = (12, tokens, tokens) if site.kind == "cross" else (12, 12, 12)
    return [torch.randn(rows, count, 2, 5, dtype=torch.float64) for count in counts]


def full_maps(q, k):
    return (torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)


def weigh(probabilities, v):
    return torch.einsum("bhnm,bmhd->bnhd", probabilities, v)


# Combinators.


def scaled(name, log, factor=1.0):
    """A change that notes its turn, and multiplies the values."""

    def change(q, k, v, site, attend=plain):
        log.append(name)
        return attend(q, k, factor * v, site)

    return change


def test_a_chain_goes_from_the_outside_in(assert_close):
    """The first has the last word: what it does not hand on never happens."""
    log = []
    q, k, v = states()
    out = changes.chain(scaled("a", log, 2), scaled("b", log, 3), scaled("c", log, 5))(q, k, v, CROSS)
    assert_close(out, 30 * plain(q, k, v, CROSS), 1e-12)
    assert log == ["a", "b", "c"]
    assert changes.chain(lambda q, k, v, site, attend: v, scaled("d", log))(q, k, v, CROSS) is v
    assert log == ["a", "b", "c"]


def test_chains_nest_and_may_end_in_an_attend_function(assert_close):
    log = []
    q, k, v = states()
    ends = changes.chain(scaled("a", log, 2), lambda q, k, v, site: -v[:, :1].expand_as(q))
    inner = changes.chain(scaled("b", log, 3), scaled("c", log, 5))
    out = changes.chain(inner, changes.only("up_blocks", ends))(q, k, v, CROSS)
    assert_close(out, (-30 * v[:, :1]).expand_as(q), 1e-12)
    assert log == ["b", "c", "a"]
    around = changes.chain(changes.only("down_blocks", scaled("no", log)), scaled("e", log, 7))
    assert_close(around(q, k, v, CROSS), 7 * plain(q, k, v, CROSS), 1e-12)
    assert log[-1] == "e"
    around = changes.chain(changes.only("up_blocks", scaled("f", log, 2)), scaled("g", log, 3))
    assert_close(around(q, k, v, CROSS), 6 * plain(q, k, v, CROSS), 1e-12)


@pytest.mark.parametrize(
    ("chosen", "here"),
    [
        (changes.where(), True),
        (changes.where("up_blocks"), True),
        (changes.where("up_blocks.*.attentions.0"), True),
        (changes.where("attentions.1"), False),
        (changes.where(kind="self"), False),
        (changes.where(branch="edit", half="conditional"), True),
        (changes.where(branch="sample"), False),
        (changes.where(half="negative"), False),
        (changes.where(positions=(12, 12)), True),
        (changes.where(positions=(13, 99)), False),
        (changes.where(positions=(0, 11)), False),
        ("mid_block", False),
        (lambda site: site.heads == 2, True),
    ],
)
def test_only_some_sites(chosen, here):
    q, k, v = states()
    out = changes.only(chosen, lambda q, k, v, site: 0 * q)(q, k, v, CROSS)
    assert torch.equal(out, 0 * q if here else plain(q, k, v, CROSS))


@pytest.mark.parametrize("name", ["kind", "branch", "half"])
def test_a_place_that_there_is_not_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, not 'middle'"):
        changes.where(**{name: "middle"})


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize("shares", [(0.0, 0.4), (0.25, 1.0), (0.2, 0.2), (0.0, 1.0)])
def test_between_shares_of_the_way(steps, shares):
    q, k, v = states()
    change = changes.between(shares, lambda q, k, v, site: 0 * q)
    acts = []
    for step, timestep in enumerate(denoising_schedule(steps).timesteps.tolist()):
        out = change(q, k, v, replace(CROSS, step=step, timestep=timestep))
        acts += [step] if torch.equal(out, 0 * q) else []
    begin, end = (share * steps for share in shares)
    assert acts == [step for step in range(steps) if begin + 1e-9 < step + 1 <= end + 1e-9]


def test_between_step_numbers():
    q, k, v = states()
    change = changes.between(range(1, 3), lambda q, k, v, site: 0 * q)
    assert [bool((change(q, k, v, replace(CROSS, step=i)) == 0).all()) for i in range(4)] == [False, True, True, False]
    for wrong in ((0.5, 0.2), (-0.1, 0.5), (0.0, 1.1), (0.1,)):
        with pytest.raises(ValueError, match="steps must be a range, or two shares from 0 to 1, the smaller first"):
            changes.between(wrong, plain)


# Maps and losses.


def test_with_probabilities(assert_close):
    """The function's maps are used, and gradients flow through them."""
    q, k, v = (x.requires_grad_() for x in states())
    weight = torch.randn(2, 12, 2, 5, dtype=torch.float64)
    same = changes.with_probabilities(lambda probabilities, site: probabilities)
    assert_close(same(q, k, v, CROSS).detach(), plain(q, k, v, CROSS).detach(), 1e-12)
    squared = changes.with_probabilities(lambda probabilities, site: probabilities**2 * site.heads)
    grads = torch.autograd.grad((squared(q, k, v, CROSS) * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((weigh(2 * full_maps(q, k) ** 2, v) * weight).sum(), (q, k, v))
    for ours, theirs in zip(grads, expected, strict=True):
        assert_close(ours, theirs, 1e-10)
    for wrong, found in ((lambda p, site: p[..., :3], r"\[2, 2, 12, 3\]"), (lambda p, site: None, "NoneType")):
        with pytest.raises(ValueError, match=rf"maps must stay \[2, 2, 12, 7\], not {found}: at {CROSS.path}"):
            changes.with_probabilities(wrong)(q, k, v, CROSS)


def test_a_loss_joins_the_gradient(assert_close):
    q, k, v = states()
    q.requires_grad_()
    out = changes.with_loss(plain(q, k, v, CROSS), q.square().sum((1, 2, 3)))
    assert torch.equal(out, plain(q, k, v, CROSS))
    ours = torch.autograd.grad(out.sum(), q)[0]
    assert_close(ours, torch.autograd.grad(plain(q, k, v, CROSS).sum(), q)[0] + 2 * q.detach(), 1e-12)
    nothing = torch.zeros_like(out)
    out = changes.with_loss(plain(q, k, v, CROSS), q.square().sum())
    assert_close(torch.autograd.grad(out, q, nothing)[0], 2 * q.detach(), 1e-12)  # a loss alone


def test_losses_in_the_guiding_pass(model, assert_close):
    """The map guidance's gradient with a carried loss equals autograd of the sum; without that of the last layer."""
    latents, states = torch.randn(2, 2, 4, 16, 16).unbind(0), torch.randn(3, 2, 77, 128)
    conditions = [model.condition(torch.tensor([t]), text) for t, text in ((481, states[0]), (481, states[1]))]
    conditions = [condition._replace(shifts=condition.shifts[0]) for condition in conditions]
    kept, own = {}, {}
    with torch.no_grad():
        model.predict(latents[0], conditions[0], keep_queries_and_keys(kept))

    def carry(q, k, v, site, attend=plain):
        loss = 0.1 * (full_maps(q, k)[..., 3] ** 2).sum() if site.kind == "cross" else q.new_zeros(())
        return changes.with_loss(attend(q, k, v, site), loss)

    def collect(q, k, v, site):
        if site.kind == "cross":
            own[site.path] = q, k
        return plain(q, k, v, site)

    leaf = latents[1].clone().requires_grad_()
    model.predict(leaf, conditions[1], collect)
    squares = {path: (full_maps(q, k) - full_maps(*kept[path])).square() for path, (q, k) in own.items()}
    guidance = sum(square.sum((2, 3)).mean(1).sum() for square in squares.values())
    *others, _ = own
    carried = sum(0.1 * (full_maps(*own[path])[..., 3] ** 2).sum() for path in others)
    both, alone = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (guidance + carried, carried))
    for checkpoint in (False, True):
        each = replace(model, checkpoint=checkpoint)
        assert_close(map_gradient(each, latents[1], conditions[1], kept, carry), both, 1e-4)
    assert_close(map_gradient(model, latents[1], conditions[1], kept, carry, (0.0,)), alone, 1e-4)
    assert (both - alone).norm() > 0.1 * both.norm()


# Every change against full maps: two images and two directions, so that an edit's rows are twice the reference's.


def follow(change, site, reference, edit, step=None):
    """Show a change the reference's states and then the edit's, as `p2pz.edit` does."""
    change(*reference, replace(site, branch="reference"))
    return change(*edit, site if step is None else replace(site, step=step))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ["replace", "replace, moved", "refine", "reweight"])
def test_prompt_to_prompt(kind, batched, assert_close):
    reference, edit = states(), states(4)
    mapping, mix, weights = torch.rand(2, 7, 7), torch.rand(2, 7), torch.rand(2, 7) * 2
    if not batched:
        mapping, mix, weights = mapping[:1].expand(2, -1, -1), mix[:1].expand(2, -1), weights[:1].expand(2, -1)
    given = [x if batched else x[0] for x in (mapping, mix, weights)]
    old = full_maps(*reference[:2]).repeat(2, 1, 1, 1)
    new = full_maps(*edit[:2])
    per_token = (x.double().repeat(2, 1)[:, None, None] for x in (mix, weights))
    shares, factors = per_token
    moved = torch.einsum("bhnr,brm->bhnm", old, mapping.double().repeat(2, 1, 1))
    change, expected = {
        "replace": (changes.replace_maps(), old),
        "replace, moved": (changes.replace_maps(given[0]), moved),
        "refine": (changes.refine_maps(given[1], given[0]), shares * moved + (1 - shares) * new),
        "reweight": (changes.reweight_maps(given[2]), factors * new),
    }[kind]
    assert_close(follow(change, CROSS, reference, edit), weigh(expected, edit[2]), 1e-6)


@pytest.mark.parametrize("change", [changes.share_keys_and_values, changes.inject_queries_and_keys])
def test_self_attention_of_the_reference(change, assert_close):
    reference, edit = states(site=SELF), states(4, SELF)
    q, _, v = edit
    q_reference, k_reference, v_reference = (x.repeat(2, 1, 1, 1) for x in reference)
    if change is changes.share_keys_and_values:
        expected = weigh(full_maps(q, k_reference), v_reference)
    else:
        expected = weigh(full_maps(q_reference, k_reference), v)
    assert_close(follow(change(), SELF, reference, edit), expected, 1e-6)
    inner = changes.chain(change(), scaled("", [], 3.0))  # what follows sees the reference's states
    assert_close(follow(inner, SELF, reference, edit), 3 * expected, 1e-6)


def test_each_half_follows_its_own(assert_close):
    """And the reference's conditional half if there is no negative one, also after a run that had one."""
    change = changes.share_keys_and_values()
    negative, conditional, later, edit = (states(site=SELF) for _ in range(4))
    halves = {"negative": negative, "conditional": conditional}
    for half, (q, k, v) in halves.items():
        change(q, k, v, replace(SELF, branch="reference", half=half))
    for half, (_, k, v) in halves.items():
        out = change(*edit, replace(SELF, half=half))
        assert_close(out, weigh(full_maps(edit[0], k), v), 1e-6)
    change(*later, replace(SELF, branch="reference", step=3))
    out = change(*edit, replace(SELF, half="negative", step=3))
    assert_close(out, weigh(full_maps(edit[0], later[1]), later[2]), 1e-6)


def test_what_has_not_been_seen_is_said():
    change, said = changes.replace_maps(), f"has not seen step 2 of it at {CROSS.path}: do not keep it from the ref"
    with pytest.raises(ValueError, match=said):
        change(*states(), CROSS)
    with pytest.raises(ValueError, match=said):
        change(*states(), replace(CROSS, branch="sample"))
    follow(change, CROSS, states(), states())
    with pytest.raises(ValueError, match="has not seen step 3 of it"):
        change(*states(), replace(CROSS, step=3))


def test_confined_tokens(assert_close):
    q, k, v = states()
    region = torch.rand(8, 6) * (torch.rand(8, 6) > 0.3)  # twice the layer's size, and empty here and there
    region[:2, :2] = 0
    out = changes.confine_tokens({2: region, 5: 1 - region})(q, k, v, CROSS)
    share = region.double().view(4, 2, 3, 2).mean((1, 3)).flatten()
    scores = full_maps(q, k)
    scores[..., 2] *= share
    scores[..., 5] *= 1 - share
    assert_close(out, weigh(scores / scores.sum(-1, keepdim=True), v), 1e-6)
    assert scores[0, 0, 0, 2] == 0
    for wrong in ({7: region}, dict.fromkeys(range(7), region), {-1: region}):
        with pytest.raises(ValueError, match="tokens to confine must be some of 0 to 6, not"):
            changes.confine_tokens(wrong)(q, k, v, CROSS)


def test_guiding_towards_maps(assert_close):
    q, k, v = states()
    q.requires_grad_()
    wanted = torch.rand(12, 2, dtype=torch.float64)
    change = changes.guide_towards(lambda site: wanted if site == CROSS else None, tokens=[4, 1], strength=3.0)
    loss = 3 * (full_maps(q, k).mean(1)[..., [4, 1]] - wanted).square().sum()
    expected = torch.autograd.grad(loss + weigh(full_maps(q, k), v).sum(), q)[0]
    for attend in (plain, lambda *arguments: plain(*arguments)):
        out = change(q, k, v, CROSS, attend)
        assert_close(out.detach(), plain(q, k, v, CROSS).detach(), 1e-6)
        assert_close(torch.autograd.grad(out.sum(), q)[0], expected, 1e-6)
    with pytest.raises(ValueError, match=r"target must give \[12, 1\], not \[12, 2\]: at up_blocks"):
        changes.guide_towards(lambda site: wanted, tokens=[4])(q, k, v, CROSS)
    with pytest.raises(ValueError, match="sample takes no gradients and cannot be guided"):
        change(q.detach(), k, v, replace(CROSS, branch="sample"))


ALL = {
    "replace": changes.replace_maps,
    "refine": lambda: changes.refine_maps(torch.rand(7)),
    "reweight": lambda: changes.reweight_maps(torch.rand(7)),
    "confine": lambda: changes.confine_tokens({1: torch.zeros(4, 3)}),
    "guide": lambda: changes.guide_towards(lambda site: torch.zeros(12, 7)),
    "share": changes.share_keys_and_values,
    "inject": changes.inject_queries_and_keys,
}


@pytest.mark.parametrize("name", ALL)
def test_the_rest_is_left_alone(name):
    """Reference and inversion, the other kind of attention, and for captions' tokens the negative half."""
    change, own = ALL[name](), SELF if name in ("share", "inject") else CROSS
    other = SELF if own is CROSS else CROSS
    alone = [(own, "reference", "conditional"), (own, "inversion", "conditional"), (other, "edit", "conditional")]
    alone += [(own, "edit", "negative")] if own is CROSS else []
    for site, branch, half in alone:
        q, k, v = states(site=site)
        out = change(q.requires_grad_(), k, v, replace(site, branch=branch, half=half))
        assert torch.equal(out, plain(q, k, v, site))
    log = []
    site = replace(other, branch="sample")
    change(*states(site=site), site, scaled("inner", log))
    assert log == ["inner"]


# In whole edits of the bundled model: as a function written by hand, in the order in which the rows come.


def by_hand(kind, weights, region):
    """The same changes through full maps, with everything of the reference kept for good."""
    seen = {}

    def attend(q, k, v, site):
        if site.branch == "reference":
            seen[site.path, site.half, site.step] = q, k, v
            return plain(q, k, v, site)
        half = site.half if (site.path, site.half, site.step) in seen else "conditional"
        q_old, k_old, v_old = (torch.cat([x, x]) for x in seen[site.path, half, site.step])
        probabilities = full_maps(q, k)
        if site.kind == "cross" and site.half == "conditional":
            if kind == "replace":
                probabilities = full_maps(q_old, k_old)
            elif kind == "reweight":
                probabilities = probabilities * weights
            elif kind == "confine":
                size = (site.height, site.width)
                share = F.adaptive_avg_pool2d(region[None, None], size).flatten()
                probabilities = torch.cat([probabilities[..., :5], probabilities[..., 5:] * share[:, None]], -1)
                probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        elif site.kind == "self" and kind == "share":
            probabilities, v = full_maps(q, k_old), v_old
        elif site.kind == "self" and kind == "inject":
            probabilities = full_maps(q_old, k_old)
        return weigh(probabilities, v)

    return attend


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("kind", ["replace", "reweight", "confine", "share", "inject"])
def test_whole_edits_equal_those_by_hand(model, kind, device, assert_close):
    model = model if device == "cpu" else p2pz.load(MINI_FOLDER, device=device, dtype=torch.float32)
    weights, region = torch.rand(77) + 0.5, torch.rand(16, 16)
    built_in = {
        "replace": changes.replace_maps(),
        "reweight": changes.reweight_maps(weights),
        "confine": changes.confine_tokens(dict.fromkeys(range(5, 77), region)),
        "share": changes.share_keys_and_values(),
        "inject": changes.inject_queries_and_keys(),
    }[kind]
    noise = torch.randn(1, 4, 16, 16).to(device)
    negative, caption = model.encode_text(["a photo of a bear", "a photo of a cat"])[:, None]
    deltas = [p2pz.direction("cat", to, model=model).states.to(caption) for to in ("dog", "rabbit")]
    edited = torch.cat([caption + delta for delta in deltas])
    fixed = {"steps": 2, "guidance": 2.0, "xa_guidance": 1.0, "guided_steps": (0.5, 1.0), "reference": "denoised"}
    settings = settings_for(model, "p2pz", blend=0.0, **fixed)
    results = [
        edit_latents(model, noise, caption, negative, edited, settings, False, attend=attend)[0]
        for attend in (built_in, by_hand(kind, weights.to(device), region.to(device)), plain)
    ]
    assert_close(results[0], results[1], 1e-4 if device == "cpu" else 1e-3)
    assert (results[0] - results[2]).norm() > 1e-2 * results[2].norm()


# What each is for, on the bundled model.


def scene(model, index):
    """A horse, the true zebra, where both agree, and the inversion with its maps."""
    pair = mini_world.task_pair("horse->zebra", index)
    source, truth = (np.asarray(mini_world.render(each)) for each in pair)
    recorder = p2pz.record(dtype=torch.float32)
    inversion = p2pz.invert(source, model=model, steps=10, reference="denoised", progress=False, record=recorder)
    return source, truth, ~mini_world.edit_mask(*pair), inversion, recorder.runs[0].of("inversion")


def zebra(model, inversion, attend=plain, **options):
    return p2pz.edit(inversion, "horse->zebra", model=model, attend=attend, **(UNGUIDED | options)).image


def test_attention_of_the_reference_holds_the_picture(model):
    """Of five ways, each brings the edit closer to the true one, inside and outside the horse."""
    source, truth, background, inversion, own = scene(model, 0)
    timesteps = denoising_schedule(10).timesteps.flip(0).tolist()
    guide = changes.guide_towards(lambda site: own[site.path][timesteps.index(site.timestep)])
    without, block = zebra(model, inversion), changes.only("up_blocks.1.resnets.1", changes.inject_features())
    both = {"attend": changes.inject_queries_and_keys(), "features": changes.between((0.0, 0.8), block)}
    others = {
        "replaced": zebra(model, inversion, changes.replace_maps()),
        "half of the way": zebra(model, inversion, changes.between((0.0, 0.5), changes.replace_maps())),
        "guided": zebra(model, inversion, guide, xa_guidance=1.0, resolution_weights=(0.0,)),
        "injected": zebra(model, inversion, changes.inject_queries_and_keys()),
        "with features": zebra(model, inversion, **both),
    }
    for image in others.values():
        assert psnr(image, source, background) > psnr(without, source, background) + 1
        assert psnr(image, truth) > psnr(without, truth) + 1
    assert psnr(others["half of the way"], others["replaced"]) < 45
    assert psnr(others["with features"], source, background) > psnr(others["injected"], source, background) + 0.5


def test_shared_keys_and_values_bring_the_looks(model):
    """A zebra made from a white horse is whiter."""
    source, _, background, inversion, _ = scene(model, 1)
    without, shared = (zebra(model, inversion, each) for each in (plain, changes.share_keys_and_values()))
    bright = [np.asarray(image)[~background].mean() for image in (source, without, shared)]
    assert abs(bright[2] - bright[0]) < 0.8 * abs(bright[1] - bright[0])


def test_reweighted_words_are_heard_less_or_more(model):
    from p2pz.clip import load_mini_clip

    prompt = "a photo of a cat with glasses in the snow"
    place = places_of(model, prompt, "glasses")[0]
    clip, scores = load_mini_clip(model), []
    for factor in (0.0, 1.0):
        weights = torch.ones(77)
        weights[place:] = factor  # what comes later has heard of the glasses too
        options = {"steps": 10, "seed": 1, "progress": False, "attend": changes.reweight_maps(weights)}
        picture = p2pz.sample(prompt, model=model, **options)
        captions = ["a photo of a cat with glasses", "a photo of a cat"]
        scores.append(clip.similarity(picture, captions).softmax(-1)[0, 0].item())
    assert scores[0] < 0.5 < scores[1]


def test_confined_tokens_draw_where_they_are_heard(model):
    """A red car that stands on the right by itself."""
    prompt, places = "a photo of a cat in the city near a car", []
    for columns in (slice(0, 16), slice(8, 16), slice(0, 8)):
        region = torch.zeros(16, 16)
        region[:, columns] = 1
        confined = changes.confine_tokens(dict.fromkeys(range(places_of(model, prompt, "near")[0], 77), region))
        options = {"steps": 10, "seed": 1, "guidance": 1.0, "progress": False, "attend": confined}
        picture = np.asarray(p2pz.sample(prompt, model=model, **options)[0])
        red, green, blue = picture[64:].transpose(2, 0, 1)
        places.append(((red > 180) & (green < 90) & (blue < 90)).nonzero()[1].mean())
    assert places[0] > 64 and places[1] > 64 and places[2] < 64


def test_words_of_other_captions_are_aligned(model):
    """`replace_maps` takes the alignment of prompt-to-prompt."""
    ids = [model.tokenizer(text).input_ids for text in ("a photo of a cat", "a photo of a black cat")]
    mapping, mix = align_tokens(*ids, 77)
    assert torch.equal(mix, weigh_tokens(model, "a photo of a black cat", {"black": 0.0}))
    reference, edit = states(1, tokens=77), states(1, tokens=77)
    out = follow(changes.refine_maps(mix, mapping), CROSS, reference, edit)
    expected = full_maps(*edit[:2])
    old = full_maps(*reference[:2])
    expected[..., [0, 1, 2, 3, 4, 6, 7]] = old[..., [0, 1, 2, 3, 4, 5, 6]]
    expected[..., 8:] = old[..., 8:]
    torch.testing.assert_close(out, weigh(expected, edit[2]), rtol=0, atol=1e-6)
