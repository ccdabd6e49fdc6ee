import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_pix2pix_zero import (
    StableDiffusionPix2PixZeroPipeline as Pix2PixZero,
)

from p2pz.kernels.regulariser import (
    FORMS,
    autocorrelation_gradient,
    autocorrelation_loss,
    kl_gradient,
    kl_loss,
    pyramid_sizes,
    regularise_noise,
)

SIZES = [(64, 64), (32, 32), (16, 24), (24, 16), (13, 19), (9, 9), (8, 8), (24, 4)]
all_sizes = pytest.mark.parametrize("size", SIZES, ids=str)
all_forms = pytest.mark.parametrize("form", FORMS)


def draw_offsets(shape, generator, *outer):
    """Offsets `[*outer, B, C, levels]` drawn one by one, in the order diffusers draws them."""
    sizes = pyramid_sizes(*shape[2:])
    count = torch.Size((*outer, *shape[:2])).numel()
    drawn = [torch.randint(height // 2, (1,), generator=generator) for _ in range(count) for height, _ in sizes]
    return torch.cat(drawn).view(*outer, *shape[:2], len(sizes))


def seeded():
    return torch.Generator().manual_seed(1)


def random_noise(*shape, dtype=torch.float64):
    """Neither white nor of unit variance, so that no term of the losses vanishes."""
    noise = torch.randn(shape, dtype=dtype)
    return 1.3 * noise + 0.5 * noise.roll((1, 1), (2, 3)) + 0.2


def gradient_of(loss, noise):
    leaf = noise.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


@pytest.mark.parametrize(
    "expected",
    [
        [(64, 96), (32, 48), (16, 24), (8, 12)],
        [(13, 19), (6, 9)],
        [(8, 3)],
        [(96, 64), (48, 32), (24, 16), (12, 8), (6, 4)],
        [(73, 14), (36, 7), (18, 3), (9, 1)],
        [(9, 1)],
    ],
    ids=str,
)
def test_pyramid_sizes(expected):
    assert pyramid_sizes(*expected[0]) == expected


# Auto-correlation.


@all_sizes
def test_random_form_equals_diffusers(size, assert_close):
    """Images one by one, as each is to be regularised alone; diffusers draws its offsets from an equal generator."""
    noise = random_noise(3, 4, *size)
    generator = seeded()
    expected = torch.stack([Pix2PixZero.auto_corr_loss(None, image[None], generator) for image in noise])
    assert_close(autocorrelation_loss(noise, draw_offsets(noise.shape, seeded())), expected, 1e-12)


@all_forms
@all_sizes
def test_gradient_equals_autograd(size, form, assert_close):
    noise = random_noise(3, 4, *size)
    offsets = draw_offsets(noise.shape, seeded())
    expected = gradient_of(lambda x: autocorrelation_loss(x, offsets, form), noise)
    assert_close(autocorrelation_gradient(noise, offsets, form), expected, 1e-10)


class WithAnalyticGradient(torch.autograd.Function):
    """The loss with our gradient as its backward pass, so that gradcheck sees it."""

    @staticmethod
    def forward(ctx, noise, loss, gradient):
        ctx.gradient = gradient(noise)
        return loss(noise)

    @staticmethod
    def backward(ctx, upstream):
        return upstream[:, None, None, None] * ctx.gradient, None, None


@pytest.mark.parametrize("size", [(8, 8), (9, 10), (5, 4)], ids=str)
@pytest.mark.parametrize("form", [*FORMS, "kl"])
def test_gradient_equals_finite_differences(form, size):
    noise = random_noise(2, 2, *size).requires_grad_()
    offsets = draw_offsets(noise.shape, seeded())
    functions = {"kl": (kl_loss, kl_gradient)}.get(
        form,
        (lambda x: autocorrelation_loss(x, offsets, form), lambda x: autocorrelation_gradient(x, offsets, form)),
    )
    assert torch.autograd.gradcheck(lambda x: WithAnalyticGradient.apply(x, *functions), noise)
    assert torch.autograd.gradcheck(functions[0], noise)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (20, 12), (9, 9), (8, 8)], ids=str)
def test_every_is_the_average_of_random(size, assert_close):
    """Over all choices of one non-zero offset below half the smaller side per level; for the gradient as well."""
    noise = random_noise(2, 3, *size)
    sides = [min(level) for level in pyramid_sizes(*size)]
    choices = torch.tensor(list(itertools.product(*(range(1, side // 2) or [1] for side in sides))))
    for function in (autocorrelation_loss, autocorrelation_gradient):
        average = sum(function(noise, choice.expand(2, 3, -1)) for choice in choices) / len(choices)
        assert_close(function(noise, form="every"), average, 1e-12)


def test_paper_form_by_hand():
    """Equation 2, term by term: 2x2 averages, then sums over offsets and positions."""
    noise = random_noise(1, 1, 10, 9)
    fine = noise[0, 0].tolist()
    coarse = [
        [sum(fine[2 * y + dy][2 * x + dx] for dy in (0, 1) for dx in (0, 1)) / 4 for x in range(4)] for y in range(5)
    ]
    expected = 0.0
    for level in (fine, coarse):
        height, width = len(level), len(level[0])
        for offset in range(1, min(height, width)):
            for y in range(height):
                for x in range(width):
                    along_y, along_x = level[(y - offset) % height][x], level[y][(x - offset) % width]
                    expected += level[y][x] * (along_y + along_x) / (height * width)
    assert autocorrelation_loss(noise, form="paper").item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("function", [autocorrelation_loss, autocorrelation_gradient])
def test_offsets_belong_to_image_channel_and_level(function, assert_close):
    """Each entry of the offsets counts, and one set for all images or channels is the same as repeating it."""
    noise = random_noise(2, 3, 16, 16)
    offsets = torch.randint(1, 4, (2, 3, 2), generator=seeded())
    result = function(noise, offsets)
    for image, channel, level in itertools.product(range(2), range(3), range(2)):
        moved = offsets.clone()
        moved[image, channel, level] = offsets[image, channel, level] % 3 + 1
        change = (function(noise, moved) != result).view(2, -1).any(1)
        assert change.tolist() == [i == image for i in range(2)]
    shared = function(noise, offsets[:1])
    assert_close(shared, function(noise, offsets[:1].expand(2, -1, -1)), 0)
    assert_close(function(noise, offsets[:1, :1]), function(noise, offsets[:1, :1].expand(2, 3, -1)), 0)


@pytest.mark.parametrize("function", [autocorrelation_loss, autocorrelation_gradient])
@pytest.mark.parametrize(
    ("offsets", "form", "message"), [(None, "random", "offsets"), (torch.ones(1, 1, 1), "all", "form")]
)
def test_wrong_arguments(function, offsets, form, message):
    with pytest.raises(ValueError, match=message):
        function(torch.randn(1, 1, 8, 8), offsets, form)


def test_regularise_refuses_an_unknown_form():
    with pytest.raises(ValueError, match="form"):
        regularise_noise(torch.randn(1, 1, 8, 8), torch.ones(1, 1, 1, 1, 1), form="all")


# Divergence from the normal distribution.


@all_sizes
def test_kl_equals_diffusers(size, assert_close):
    noise = random_noise(3, 4, *size)
    expected = torch.stack([Pix2PixZero.kl_divergence(None, image) for image in noise])
    assert_close(kl_loss(noise), expected, 1e-12)
    assert_close(kl_gradient(noise), gradient_of(kl_loss, noise), 1e-10)


# The loop.


def diffusers_loop(noise, generator, rounds=5, rolls=5, strength=20.0):
    """The regularisation in diffusers' `invert`, on one image, with autograd through diffusers' losses."""
    for _ in range(rounds):
        for _ in range(rolls):
            gradient = gradient_of(lambda x: Pix2PixZero.auto_corr_loss(None, x, generator), noise)
            noise = noise - strength * gradient / rolls
        noise = noise - strength * gradient_of(lambda x: Pix2PixZero.kl_divergence(None, x), noise)
    return noise


@pytest.mark.parametrize(("rounds", "rolls"), [(5, 5), (2, 3)])
@pytest.mark.parametrize("size", [(64, 64), (24, 16), (13, 19)], ids=str)
def test_regularise_equals_diffusers(size, rounds, rolls, assert_close):
    noise = random_noise(1, 4, *size, dtype=torch.float32)
    offsets = draw_offsets(noise.shape, seeded(), rounds, rolls)
    result = regularise_noise(noise, offsets)
    assert result.dtype == torch.float32
    assert_close(result, diffusers_loop(noise, seeded(), rounds, rolls))


@all_forms
def test_regularise_step_by_step(form, assert_close):
    """Any form and strengths of one's own, with autograd through our losses."""
    noise = random_noise(2, 4, 16, 24)
    offsets = draw_offsets(noise.shape, seeded(), 2, 3)
    expected = noise
    for of_round in offsets:
        for choice in of_round:
            gradient = gradient_of(lambda x, choice=choice: autocorrelation_loss(x, choice, form), expected)
            expected = expected - 6.0 / 3 * gradient
        expected = expected - 9.0 * gradient_of(kl_loss, expected)
    result = regularise_noise(noise, offsets, autocorrelation_strength=6.0, kl_strength=9.0, form=form)
    assert_close(result, expected, 1e-10)


@all_forms
def test_images_of_a_batch_do_not_mix(form, assert_close):
    """Neither with offsets per image nor with one set for all."""
    noise = random_noise(3, 4, 32, 32, dtype=torch.float32) * torch.tensor([0.5, 1, 2])[:, None, None, None]
    offsets = draw_offsets(noise.shape, seeded(), 2, 2)
    for choice in (offsets, offsets[:, :, :1]):
        batched = regularise_noise(noise, choice, form=form)
        for i in range(3):
            own = choice.expand(-1, -1, 3, -1, -1)[:, :, i : i + 1]
            assert_close(batched[i : i + 1], regularise_noise(noise[i : i + 1], own, form=form), 1e-6)


def test_strength_zero_and_input_untouched(assert_close):
    noise = random_noise(1, 4, 16, 16, dtype=torch.float32)
    offsets = draw_offsets(noise.shape, seeded(), 1, 1)
    before = noise.clone()
    assert torch.equal(regularise_noise(noise, offsets, 0.0, 0.0), noise)
    only_kl = regularise_noise(noise, offsets, autocorrelation_strength=0.0)
    assert_close(only_kl, noise - 20 * kl_gradient(noise), 1e-6)
    only_correlation = regularise_noise(noise, offsets, kl_strength=0.0)
    assert_close(only_correlation, noise - 20 * autocorrelation_gradient(noise, offsets[0, 0]), 1e-6)
    assert not torch.equal(only_kl, noise) and not torch.equal(only_correlation, noise)
    assert torch.equal(noise, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype):
    noise = random_noise(1, 4, 16, 16).to(dtype)
    offsets = draw_offsets(noise.shape, seeded(), 2, 2)
    assert torch.equal(regularise_noise(noise, offsets), regularise_noise(noise.float(), offsets))


def test_white_noise_stays_and_correlated_noise_whitens():
    white = torch.randn(1, 4, 64, 64)
    smooth = white + 2 * F.avg_pool2d(F.pad(white, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    offsets = draw_offsets(white.shape, seeded(), 5, 5).clamp(min=1)  # offset 0 would shrink both
    moved, correlation = [], []
    for noise in (white, smooth / smooth.std()):
        result = regularise_noise(noise, offsets)
        moved.append(((result - noise).norm() / noise.norm()).item())
        correlation.append([autocorrelation_loss(n, form="every").item() for n in (noise, result)])
    assert 0 < moved[0] < 1e-3 < moved[1]
    assert correlation[1][1] < 0.98 * correlation[1][0]
