import copy
import math

import pytest
import torch

from p2pz.attention import guide_cross_attention, keep_queries_and_keys, plain, record_cross_attention
from p2pz.kernels import cross_attention, gating, map_guidance, norms, self_attention
from p2pz.kernels.cross_attention import attend_with_probabilities, attention_probabilities
from p2pz.kernels.self_attention import attention
from p2pz.unet import Attention

TOKENS = 7
NAMES = ["sd1", "sd2", "mini"]
SHAPES = [(40, 77), (64, 77), (80, 1), (160, 77), (64, 35)]  # head width, keys


def inputs(unet, batch=2, size=(12, 10)):
    return (
        torch.randn(batch, 4, *size),
        torch.tensor([981, 21])[:batch],
        torch.randn(batch, TOKENS, unet.config.context_channels),
    )


# The arithmetic.


def explicit_attention(q, k, v):
    """Softmax attention in plain float64 Python loops over batch, heads and queries."""
    q, k, v = (x.double() for x in (q, k, v))
    maps = torch.empty(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.float64)
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for n in range(q.shape[1]):
                scores = [float(q[b, n, h] @ key) / math.sqrt(q.shape[3]) for key in k[b, :, h]]
                weights = torch.tensor([math.exp(s - max(scores)) for s in scores], dtype=torch.float64)
                maps[b, h, n] = weights / weights.sum()
                out[b, n, h] = maps[b, h, n] @ v[b, :, h]
    return maps, out


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize(("channels", "keys"), SHAPES)
def test_against_explicit_loops(channels, keys, dtype, tolerance, assert_close):
    q = (2 * torch.randn(2, 15, 3, channels)).to(dtype)
    k, v = torch.randn(2, 2, keys, 3, channels).to(dtype)
    maps, out = explicit_attention(q, k, v)
    probabilities = attention_probabilities(q, k)
    assert probabilities.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities[..., 0]), rtol=0, atol=1e-5)
    assert_close(probabilities, maps, min(tolerance, 1e-5))
    for result in (attention(q, k, v), attend_with_probabilities(probabilities, v)):
        assert result.dtype == dtype
        assert_close(result, out, tolerance)


def test_probabilities_survive_scores_beyond_float16():
    q = torch.full((1, 3, 1, 64), 100.0, dtype=torch.float16)
    k = torch.stack([q[0, 0], -q[0, 0]])[None]
    assert torch.equal(attention_probabilities(q, k), torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2))


# The argument of the UNet.


@pytest.mark.parametrize("size", [(16, 16), (13, 19)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_site_is_visited_once(name, size, unet_pair):
    """With its module's name and kind, the feature map's size, and q, k, v in the documented layout."""
    unet, _ = unet_pair(name)
    calls = []

    def note(q, k, v, site):
        calls.append((site, q.shape, k.shape, v.shape))
        return plain(q, k, v, site)

    latents, timesteps, context = inputs(unet, size=size)
    unet(latents, timesteps, context, attend=note)
    modules = {path: module for path, module in unet.named_modules() if isinstance(module, Attention)}
    assert sorted(site.path for site, *_ in calls) == sorted(modules)

    config, levels = unet.config, len(unet.config.block_out_channels)
    for site, q, k, v in calls:
        stage, index = site.path.split(".")[:2]
        level = {"down_blocks": int(index), "up_blocks": levels - 1 - int(index)} if index.isdigit() else {}
        level = level.get(stage, levels - 1)
        height, width = (math.ceil(s / 2**level) for s in size)
        assert (site.height, site.width, site.heads) == (height, width, config.heads[level])
        assert site.kind == {"attn1": "self", "attn2": "cross"}[site.path.split(".")[-1]]
        keys = TOKENS if site.kind == "cross" else height * width
        head_width = config.block_out_channels[level] // site.heads
        assert q == (2, height * width, site.heads, head_width)
        assert k == v == (2, keys, site.heads, head_width)


def test_explicit_default_is_the_default(unet_pair):
    unet, _ = unet_pair("sd1")
    args = inputs(unet)
    assert torch.equal(unet(*args), unet(*args, attend=plain))


def test_own_function_decides_the_output(unet_pair, assert_close):
    """A user's function through the maps gives what the default gives; another function gives something else."""
    unet, _ = unet_pair("sd2")
    args = inputs(unet)
    through_maps = unet(*args, attend=lambda q, k, v, site: attend_with_probabilities(attention_probabilities(q, k), v))
    assert_close(through_maps, unet(*args))
    silent = unet(*args, attend=lambda q, k, v, site: torch.zeros_like(q))
    assert (silent - through_maps).norm() > 1e-2 * through_maps.norm()


class StoringProcessor:
    """Diffusers' way to look at attention maps: its `AttnProcessor`, with the scores kept."""

    def __init__(self, maps, path):
        self.maps, self.path = maps, path

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(f(x))
            for f, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        scores = attn.get_attention_scores(q, k, attention_mask)
        if encoder_hidden_states is not None:
            self.maps[self.path] = scores.unflatten(0, (-1, attn.heads))
        return attn.to_out[0](attn.batch_to_head_dim(scores @ v))


def diffusers_maps(theirs, latents, timesteps, context):
    """Cross-attention maps by path, from the diffusers UNet."""
    maps, default = {}, theirs.attn_processors
    theirs.set_attn_processor({name: StoringProcessor(maps, name.removesuffix(".processor")) for name in default})
    theirs(latents, timesteps, context)
    theirs.set_attn_processor(default)
    return maps


@pytest.mark.parametrize("name", NAMES)
def test_recorded_maps_equal_diffusers(name, unet_pair, assert_close):
    ours, theirs = unet_pair(name)
    maps = {}
    record = record_cross_attention(maps)
    ours(*inputs(ours), attend=record)  # must be overwritten
    args = inputs(ours)
    output = ours(*args, attend=record)
    expected = diffusers_maps(theirs, *args)
    assert set(maps) == set(expected) == {path for path, _ in ours.named_modules() if path.endswith("attn2")}
    for path, probabilities in maps.items():
        assert_close(probabilities, expected[path])
    assert_close(output, ours(*args))


def losses_and_gradient(unet, reference, latents, timesteps, context):
    """Per-layer losses `[layers, B]` and the gradient of their sum with respect to the latents."""
    latents, losses = latents.clone().requires_grad_(), []
    unet(latents, timesteps, context, attend=guide_cross_attention(reference, losses))
    losses = torch.stack(losses)
    return losses.detach(), torch.autograd.grad(losses.sum(), latents)[0]


def kept(unet, *args):
    queries_and_keys = {}
    unet(*args, attend=keep_queries_and_keys(queries_and_keys))
    return queries_and_keys


def test_comparison_with_itself_is_zero(unet_pair):
    unet, _ = unet_pair("sd1")
    args = inputs(unet)
    losses, gradient = losses_and_gradient(unet, kept(unet, *args), *args)
    assert losses.shape == (sum(path.endswith("attn2") for path, _ in unet.named_modules()), 2)
    assert losses.max() < 1e-9 and gradient.abs().max() < 1e-5  # the passes differ by the rounding of their attention


@pytest.mark.parametrize("name", NAMES)
def test_comparison_equals_the_authors_loss(name, unet_pair, assert_close):
    """Their loss of one image, on diffusers' maps and differentiated by autograd through diffusers' UNet."""
    ours, theirs = unet_pair(name)
    latents, timesteps, context = inputs(ours, batch=1)
    other_context = torch.randn_like(context)
    reference = diffusers_maps(theirs, latents, timesteps, context)
    losses, gradient = losses_and_gradient(
        ours, kept(ours, latents, timesteps, context), latents, timesteps, other_context
    )

    leaf = latents.clone().requires_grad_()
    maps = diffusers_maps(theirs, leaf, timesteps, other_context)
    expected = sum(((m - reference[p]).flatten(0, 1) ** 2).sum((1, 2)).mean(0) for p, m in maps.items())
    assert_close(losses.sum(), expected.detach())
    assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


def test_images_of_a_batch_do_not_mix(unet_pair, assert_close):
    unet, _ = unet_pair("mini")
    latents, timesteps, context = inputs(unet)
    reference = kept(unet, torch.randn_like(latents), timesteps, torch.randn_like(context))
    losses, gradient = losses_and_gradient(unet, reference, latents, timesteps, context)
    for i in range(2):
        one = {path: (q[i : i + 1], k[i : i + 1]) for path, (q, k) in reference.items()}
        alone = losses_and_gradient(unet, one, latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1])
        assert_close(losses[:, i : i + 1], alone[0])
        assert_close(gradient[i : i + 1], alone[1])


def test_comparison_leaves_the_output_alone(unet_pair, assert_close):
    unet, _ = unet_pair("mini")
    args = inputs(unet)
    reference = {path: (-q, k) for path, (q, k) in kept(unet, *args).items()}
    assert_close(unet(*args, attend=guide_cross_attention(reference, [])), unet(*args))


@pytest.mark.parametrize("name", ["mini", pytest.param("sd2", marks=pytest.mark.slow)])
def test_kernels_inside_the_unet(name, unet_pair, assert_close, device, monkeypatch):
    """Output, losses and gradient through the Triton kernels equal those through the references."""
    unet = copy.deepcopy(unet_pair(name)[0]).to(device, memory_format=torch.channels_last)
    args = [x[:1].to(device) for x in inputs(unet, size=(5, 3))]
    other = torch.randn_like(args[2])
    results = []
    for chosen in (False, True):
        for module in (cross_attention, gating, map_guidance, norms, self_attention):
            monkeypatch.setattr(module, "choose_triton", lambda _, why_not, *__, chosen=chosen: chosen and not why_not)
        maps, reference = {}, {}
        output = unet(*args, attend=keep_queries_and_keys(reference, record_cross_attention(maps)))
        results.append([output, *maps.values(), *losses_and_gradient(unet, reference, *args[:2], other)])
    for by_reference, by_kernel in zip(*results, strict=True):
        assert_close(by_kernel, by_reference, 1e-4)


def test_attention_layers_hold_no_state(unet_pair):
    """Nothing of a recorded pass stays in the modules."""
    unet, _ = unet_pair("mini")
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    before = [list(vars(module)) for module in layers]
    kept(unet, *inputs(unet))
    assert [list(vars(module)) for module in layers] == before
    assert not any(isinstance(value, torch.Tensor) for module in layers for value in vars(module).values())
