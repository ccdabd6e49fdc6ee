"""The regulariser's kernels against float64 and autograd; without a GPU in the interpreter of Triton."""

import pytest
import torch

from p2pz.kernels import regulariser
from p2pz.kernels.regulariser import (
    FORMS,
    autocorrelation_gradient,
    autocorrelation_gradient_reference,
    autocorrelation_loss,
    autocorrelation_loss_reference,
    kl_gradient,
    pyramid_sizes,
    regularise_noise,
    regularise_noise_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
all_forms = pytest.mark.parametrize("form", FORMS)

# form, shape, dtype, whether offsets differ by image and by channel: odd, tall and wide sizes, padded channels
CASES = [
    ("random", (3, 4, 8, 8), torch.float32, True, True),
    ("random", (3, 3, 13, 19), torch.float16, True, True),
    ("random", (2, 5, 24, 16), torch.bfloat16, False, True),
    ("random", (2, 1, 9, 9), torch.float32, True, False),
    ("random", (1, 2, 5, 4), torch.float32, False, False),
    ("random", (1, 1, 16, 3), torch.float32, True, True),
    ("random", (1, 2, 36, 3), torch.float32, True, True),
    ("random", (1, 4, 64, 64), torch.float32, True, True),
    ("every", (3, 4, 16, 16), torch.float32, True, True),
    ("every", (2, 3, 13, 19), torch.bfloat16, True, True),
    ("every", (2, 1, 5, 4), torch.float16, True, True),
    ("every", (1, 2, 20, 1), torch.float32, True, True),
    ("paper", (3, 2, 9, 10), torch.float32, True, True),
    ("paper", (1, 5, 8, 16), torch.float16, True, True),
    ("paper", (2, 3, 17, 2), torch.float32, True, True),
]
all_cases = pytest.mark.parametrize(("form", "shape", "dtype", "by_image", "by_channel"), CASES, ids=str)


def random_noise(*shape, dtype=torch.float32, device="cpu"):
    """Neither white nor of unit variance, so that no term of the losses vanishes."""
    noise = torch.randn(shape, device=device)
    return (1.3 * noise + 0.5 * noise.roll((1, 1), (2, 3)) + 0.2).to(dtype)


def draw_offsets(shape, *outer, by_image=True, by_channel=True, device="cpu"):
    """All offsets that are allowed, up to the larger side of each level."""
    batch, channels, height, width = shape
    sides = [max(size) for size in pyramid_sizes(height, width)]
    outer = (*outer, batch if by_image else 1, channels if by_channel else 1)
    return torch.stack([torch.randint(0, side + 1, outer) for side in sides], -1).to(device)


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check_error(actual, expected, in_torch, bound=1e-5):
    """An error within the bound, and at most twice as large as that of plain torch in the same precision."""
    assert actual.shape == expected.shape
    assert error(actual, expected) <= min(bound, 2 * error(in_torch, expected) + 1e-6)


def loss_and_gradient(function, noise, offsets, form, weights):
    leaf = noise.detach().requires_grad_()
    loss = function(leaf, offsets, form)
    return loss.detach(), torch.autograd.grad((weights.to(loss.dtype) * loss).sum(), leaf)[0]


# Loss and gradient.


def by_kernel(noise, offsets, form):
    return autocorrelation_loss(noise, offsets, form, backend="triton")


@all_cases
def test_loss(form, shape, dtype, by_image, by_channel, device):
    """Value and gradient under weights of the images; rounding the gradient to the dtype is the larger error by far."""
    noise = random_noise(*shape, dtype=dtype, device=device)
    offsets = draw_offsets(shape, by_image=by_image, by_channel=by_channel, device=device)
    weights = torch.randn(shape[0], device=device)
    expected = loss_and_gradient(autocorrelation_loss_reference, noise.double(), offsets, form, weights)
    in_torch = loss_and_gradient(autocorrelation_loss_reference, noise, offsets, form, weights)
    loss, gradient = loss_and_gradient(by_kernel, noise, offsets, form, weights)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    check_error(loss, expected[0], in_torch[0])
    check_error(gradient, expected[1], in_torch[1], {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-5))
    torch.testing.assert_close(
        by_kernel(noise, offsets, form), loss, rtol=1e-5, atol=0
    )  # compiled without the gradient


@all_cases
def test_analytic_gradient(form, shape, dtype, by_image, by_channel, device):
    noise = random_noise(*shape, dtype=dtype, device=device)
    offsets = draw_offsets(shape, by_image=by_image, by_channel=by_channel, device=device)
    gradient = autocorrelation_gradient(noise, offsets, form, backend="triton")
    assert gradient.dtype == torch.float32
    expected = autocorrelation_gradient_reference(noise.double(), offsets, form)
    check_error(gradient, expected, autocorrelation_gradient_reference(noise, offsets, form))


def test_second_derivatives_only_by_the_reference(device):
    noise = random_noise(1, 1, 8, 8, device=device).requires_grad_()
    offsets = draw_offsets(noise.shape, device=device)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(by_kernel(noise, offsets, "random").sum(), noise, create_graph=True)
    loss = autocorrelation_loss(noise, offsets, backend="torch")
    (gradient,) = torch.autograd.grad(loss.sum(), noise, create_graph=True)
    assert gradient.requires_grad


@pytest.mark.parametrize("shape", [(2, 2, 9, 10), (1, 2, 5, 4)], ids=str)
@all_forms
def test_references_pass_gradcheck(form, shape):
    noise = random_noise(*shape, dtype=torch.float64).requires_grad_()
    offsets = draw_offsets(shape)
    assert torch.autograd.gradcheck(lambda n: autocorrelation_loss_reference(n, offsets, form), noise)
    assert torch.autograd.gradcheck(lambda n: autocorrelation_gradient_reference(n, offsets, form), noise)


# Schedule.


def check_schedule(noise, offsets, form="random", **strengths):
    result = regularise_noise(noise, offsets, form=form, **strengths, backend="triton")
    assert result.dtype == torch.float32
    expected = regularise_noise_reference(noise.double(), offsets, form=form, **strengths)
    check_error(result, expected, regularise_noise_reference(noise, offsets, form=form, **strengths))
    return result


@all_cases
def test_schedule(form, shape, dtype, by_image, by_channel, device):
    """Small steps, as the small maps' gradients are large."""
    noise = random_noise(*shape, dtype=dtype, device=device)
    before = noise.clone()
    rounds, rolls = (1, 2) if shape[2] == 64 else (2, 2) if form == "random" else (2, 1)
    offsets = draw_offsets(shape, rounds, rolls, by_image=by_image, by_channel=by_channel, device=device)
    strength = 2e-2 * shape[2] * shape[3]
    if form == "paper":
        strength *= 1e-2
    check_schedule(noise, offsets, form, autocorrelation_strength=strength, kl_strength=0.1 * noise[0].numel())
    assert torch.equal(noise, before)


def test_large_maps(device):
    shape = (1, 4, 128, 128)
    check_schedule(random_noise(*shape, device=device), draw_offsets(shape, 1, 1, device=device))


@pytest.mark.parametrize("tiles", [(8, 4), (256, 4), (2048, 32)], ids=str)
def test_any_tile_size(tiles, device, monkeypatch):
    """More tiles than one on every level, and fewer numbers in a tile than channels."""
    monkeypatch.setattr(regulariser, "TILES", {"loss": tiles, "regularise": tiles})
    shape = (1, 9, 9, 10) if tiles[0] == 8 else (1, 3, 16, 24)
    noise = random_noise(*shape, device=device)
    offsets = draw_offsets(shape, 1, 1, device=device)
    check_schedule(noise, offsets)
    gradient = autocorrelation_gradient(noise[:, :2], offsets[0, 0, :, :2], backend="triton")
    assert error(gradient, autocorrelation_gradient_reference(noise[:, :2].double(), offsets[0, 0, :, :2])) < 1e-5


def test_strength_zero(device):
    noise = random_noise(2, 3, 16, 16, device=device)
    offsets = draw_offsets(noise.shape, 1, 2, device=device)
    assert torch.equal(regularise_noise(noise, offsets, 0.0, 0.0, backend="triton"), noise)
    only_kl = regularise_noise(noise, offsets, 0.0, 7.0, backend="triton")
    assert error(only_kl, noise.double() - 7 * kl_gradient(noise.double())) < 1e-6
    check_schedule(noise, offsets, autocorrelation_strength=3.0, kl_strength=0.0)


def test_strides(device):
    """Noise and offsets that are not contiguous."""
    noise = random_noise(3, 4, 16, 12, device=device)
    offsets = draw_offsets(noise.shape, 1, 2, device=device)
    scattered = noise.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    by_level = offsets.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    assert not scattered.is_contiguous() and not by_level.is_contiguous()
    for tensors in ((noise[:, 1:3], offsets[..., 1:3, :]), (scattered, by_level), (noise[::2], offsets[:, :, ::2])):
        check_schedule(*tensors)
        sliced = tensors[0], tensors[1][0, 1]
        gradient = autocorrelation_gradient(*sliced, backend="triton")
        assert error(gradient, autocorrelation_gradient_reference(sliced[0].double(), sliced[1])) < 1e-5


def test_unchecked_offsets_wrap(device):
    """What offsets on the GPU may hold."""
    noise = random_noise(1, 2, 9, 13, device=device)
    offsets = torch.tensor([[[-1, 100], [14, -37]]], device=device)
    _, gradient = torch.ops.p2pz.autocorrelation(noise, offsets, "random", True)
    assert error(gradient, autocorrelation_gradient_reference(noise.double(), offsets)) < 1e-5
    small = offsets.to(torch.int16)[None, None].contiguous()
    result = torch.ops.p2pz.regularise_noise(noise, small, 1, 1, 20.0, 20.0, "random")
    assert error(result, regularise_noise_reference(noise.double(), offsets[None, None])) < 1e-5


def test_offsets_on_the_cpu(device):
    noise = random_noise(1, 2, 8, 8, device=device)
    offsets = draw_offsets(noise.shape, 1, 1)
    result = regularise_noise(noise, offsets, backend="triton")
    assert torch.equal(result, regularise_noise(noise, offsets.to(device), backend="triton"))


# What torch sees of the kernels.


@all_forms
def test_ops(form, device):
    noise = random_noise(2, 3, 5, 4, device=device)
    offsets = draw_offsets(noise.shape, 1, 1, device=device)
    arguments = (offsets[0, 0], form)
    torch.library.opcheck(torch.ops.p2pz.autocorrelation, (noise, *arguments, False))
    torch.library.opcheck(torch.ops.p2pz.autocorrelation, (noise.clone().requires_grad_(), *arguments, True))
    torch.library.opcheck(torch.ops.p2pz.regularise_noise, (noise, offsets, 1, 1, 20.0, 20.0, form))


def compiled(backend, device, dtype):
    """Compiled functions against the same ones uncompiled."""
    noise = random_noise(2, 3, 16, 16, dtype=dtype, device=device)
    offsets = draw_offsets(noise.shape, 1, 2, device=device)
    weights = torch.randn(2, device=device)

    def loss(n, o):
        return (weights * autocorrelation_loss(n, o[0, 0], backend="triton").square()).sum()

    def schedule(n, o):
        return 2 * regularise_noise(n, o, backend="triton")

    leaf = noise.requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, offsets), leaf)
    (gradient,) = torch.autograd.grad(torch.compile(loss, backend=backend, fullgraph=True)(leaf, offsets), leaf)
    assert error(gradient, expected.double()) < (1e-6 if dtype == torch.float32 else 1e-3)
    noise = noise.detach()
    result = torch.compile(schedule, backend=backend, fullgraph=True)(noise, offsets)
    assert torch.equal(result, schedule(noise, offsets))


def test_compile(device):
    compiled("aot_eager", device, torch.float32)


# Dispatch and arguments.


def test_auto_takes_the_reference_for_what_the_kernels_cannot_do(device):
    """Double precision, and derivatives of what has none."""
    noise = random_noise(1, 2, 8, 8, dtype=torch.float64, device=device)
    offsets = draw_offsets(noise.shape, 1, 1, device=device)
    assert regularise_noise(noise, offsets).dtype == torch.float64
    assert autocorrelation_loss(noise, offsets[0, 0]).dtype == torch.float64
    leaf = noise.float().requires_grad_()
    for function, choice in ((regularise_noise, offsets), (autocorrelation_gradient, offsets[0, 0])):
        with pytest.raises(ValueError, match=r"float64 is not supported"):
            function(noise, choice, backend="triton")
        with pytest.raises(ValueError, match="derivatives of the"):
            function(leaf, choice, backend="triton")
        assert function(leaf, choice).requires_grad
        with torch.no_grad():
            function(leaf, choice, backend="triton")


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.ones(2, 3, 2), "offsets must be integers"),
        (torch.ones(2, 3, 2, dtype=torch.bool), "offsets must be integers"),
        (torch.ones(2, 3, 1, dtype=torch.int64), r"offsets must be integers \[2 or 1, 3 or 1, 2\], not .* \[2, 3, 1\]"),
        (torch.ones(2, 2, 2, dtype=torch.int64), r"\[2, 2, 2\]"),
        (torch.ones(3, 2, dtype=torch.int64), r"\[3, 2\]"),
        (torch.tensor([[[0, 0], [10, 5], [-1, 0]]]), "offsets at level 0 must be 0 to 10, not -1"),
        (torch.tensor([[[0, 0], [10, 6], [0, 0]]]), "offsets at level 1 must be 0 to 5, not 6"),
    ],
)
def test_wrong_offsets(offsets, message):
    noise = random_noise(2, 3, 9, 10)
    for function in (autocorrelation_loss, autocorrelation_gradient):
        with pytest.raises(ValueError, match=message):
            function(noise, offsets)
    with pytest.raises(ValueError, match=message.replace(r"\[2 or", r"\[rounds, rolls, 2 or").replace(r"\[", r"\[.*")):
        regularise_noise(noise, offsets[None, None])


@pytest.mark.parametrize("shape", [(3, 9, 10), (0, 3, 9, 10), (1, 4, 64, 0)], ids=str)
def test_wrong_noise(shape):
    with pytest.raises(ValueError, match="noise"):
        autocorrelation_loss(torch.zeros(shape), form="every")


def test_wrong_schedule():
    with pytest.raises(ValueError, match="rounds and rolls"):
        regularise_noise(random_noise(1, 1, 8, 8), torch.tensor([1]))
    with pytest.raises(ValueError, match="backend"):
        regularise_noise(random_noise(1, 1, 8, 8), torch.ones(1, 1, 1, 1, 1, dtype=torch.int64), backend="cuda")


# On the GPU alone.


@needs_gpu
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (4, 4, 96, 96), (2, 4, 128, 128), (1, 4, 64, 96)], ids=str)
@all_forms
def test_whole_schedule(form, shape, device):
    noise = random_noise(*shape, device=device)
    offsets = draw_offsets(shape, 5, 5, device=device)
    check_schedule(noise, offsets, form, **({"autocorrelation_strength": 1.0} if form == "paper" else {}))


@needs_gpu
def test_inductor(device):
    compiled("inductor", device, torch.float16)


@needs_gpu
@all_forms
def test_cuda_graph(form, device):
    noise = random_noise(2, 4, 32, 32, device=device)
    offsets = draw_offsets(noise.shape, 2, 2, device=device)

    def both():
        gradient = autocorrelation_gradient(noise, offsets[0, 0], form, backend="triton")
        return gradient, regularise_noise(noise, offsets, 1.0, 20.0, form, backend="triton")

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    noise.copy_(random_noise(2, 4, 32, 32, device=device))
    offsets.copy_(draw_offsets(noise.shape, 2, 2, device=device))
    graph.replay()
    for actual, expected in zip(captured, both(), strict=True):
        assert torch.equal(actual, expected)
