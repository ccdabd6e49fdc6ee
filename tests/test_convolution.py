import pytest
import torch
import torch.nn.functional as F

from p2pz.kernels import convolution
from p2pz.kernels.convolution import conv3x3, conv3x3_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def inputs(shape, channels_out, device, dtype=torch.float16):
    """x, weight, bias, and a slope of the output; channels-last."""
    batch, channels, height, width = shape
    x = channels_last(torch.randn(shape, device=device).to(dtype))
    weight = torch.randn(channels_out, channels, 3, 3, device=device) / (3 * channels**0.5)
    bias = torch.randn(channels_out, device=device).to(dtype)
    slope = torch.randn(batch, channels_out, height, width, device=device).to(dtype)
    return x, channels_last(weight.to(dtype)), bias, channels_last(slope)


def results(function, x, weight, bias, slope):
    """Output and gradient to x."""
    x = x.detach().requires_grad_()
    y = function(x, weight, bias)
    return [y, *torch.autograd.grad(y, x, slope)]


def check(x, weight, bias, slope, assert_close, tile=None):
    """The kernel against the reference in float64, and against the reference's error in the dtype of x.

    The kernel is called with a plan of its own, or with `tile`.
    """

    def kernel(*tensors):
        if tile:
            return convolution._conv3x3(*tensors, tile)
        return conv3x3(*tensors, backend="triton")

    tensors = (x, weight, bias, slope)
    ours = results(kernel, *tensors)
    plain = results(conv3x3_reference, *tensors)
    exact = results(conv3x3_reference, *(None if tensor is None else tensor.double() for tensor in tensors))
    for name, actual, other, expected in zip(("y", "dx"), ours, plain, exact, strict=True):
        plain_error = ((other.double() - expected).norm() / expected.norm()).item()
        assert actual.dtype == x.dtype, name
        factor = 2 if x.is_cuda or x.dtype == torch.float16 else 2.2  # the interpreter cuts bfloat16 off, not rounds
        assert_close(actual, expected, min(BOUNDS[x.dtype], factor * plain_error + 1e-4))
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert ours[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "channels_out", "dtype", "bias_dtype", "tile"),
    [  # tile: BLOCK_M, BLOCK_N, BLOCK_K, splits, warps, stages
        ((1, 64, 8, 8), 64, torch.float16, torch.float16, [64, 64, 64, 1, 4, 4]),
        ((1, 64, 8, 8), 64, torch.float16, torch.float16, [64, 64, 64, 9, 4, 4]),  # a split per tap
        ((3, 70, 5, 7), 24, torch.float16, torch.float32, [64, 64, 64, 5, 4, 3]),  # nothing is a multiple
        ((3, 24, 7, 5), 70, torch.bfloat16, torch.bfloat16, [64, 64, 64, 1, 4, 3]),
        ((2, 136, 3, 4), 40, torch.bfloat16, None, [64, 64, 64, 4, 4, 3]),
        ((2, 128, 6, 4), 72, torch.float16, torch.float16, [64, 64, 128, 2, 4, 3]),
        ((1, 65, 9, 16), 130, torch.float16, None, [128, 128, 64, 2, 8, 3]),
        ((1, 3, 1, 1), 1, torch.float16, torch.float16, [64, 64, 64, 1, 4, 3]),
        ((1, 8, 1, 1), 8, torch.float16, torch.float16, [64, 64, 64, 2, 4, 3]),
        ((1, 1, 1, 5), 5, torch.float16, torch.float16, [64, 64, 64, 7, 4, 3]),
    ],
    ids=str,
)
def test_conv3x3(shape, channels_out, dtype, bias_dtype, tile, device, assert_close):
    x, weight, bias, slope = inputs(shape, channels_out, device, dtype)
    check(x, weight, None if bias_dtype is None else bias.to(bias_dtype), slope, assert_close, tile)


@pytest.mark.parametrize(
    ("shape", "channels_out"),
    [
        *(((1, 64, 8, 8), 16), ((3, 64, 8, 8), 16), ((1, 24, 19, 13), 16), ((1, 8, 41, 25), 16)),
        *(((2, 4, 7, 5), 72), ((2, 72, 7, 5), 4), ((1, 5, 3, 3), 64)),  # the first and the last layer
    ],
    ids=str,
)
def test_every_row_of_the_plan(shape, channels_out, device, assert_close):
    check(*inputs(shape, channels_out, device), assert_close)


def test_plan():
    """No split is empty, whatever the channels."""
    for positions in (1, 64, 192, 256, 512, 768, 1024, 4096, 1 << 20):
        for channels_in, channels_out in ((1, 1), (64, 8), (4, 320), (320, 640), (2560, 1280), (1280, 2560)):
            _, _, block_k, splits, *_ = convolution.plan(positions, channels_in, channels_out)
            assert 1 <= splits <= 9 * -(-channels_in // block_k)


def test_each_tap(device):
    """A weight of a single one shifts the map, exactly; its gradient shifts back."""
    x = channels_last(torch.randn(2, 8, 4, 5, device=device).half()).requires_grad_()
    for tap in range(9):
        weight = torch.zeros(8, 8, 9, device=device, dtype=torch.float16)
        weight[:, :, tap] = torch.eye(8).roll(1, 0)
        weight = weight.view(8, 8, 3, 3)
        y, expected = convolution._conv3x3(x, weight, None, [64, 64, 64, 1, 4, 3]), conv3x3_reference(x, weight)
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y, x, y)[0], torch.autograd.grad(expected, x, y)[0])


def test_rounds_once(device):
    """In float16, 2048 + 1 is 2048: the sum of both small terms would be lost."""
    x, bias = torch.full((1, 8, 2, 2), 2048.0, device=device).half(), torch.ones(8, device=device).half()
    x[:, 1] = 1
    weight = torch.zeros(8, 8, 3, 3, device=device).half()
    weight[:, :2, 1, 1] = 1
    for splits in (1, 3):
        assert (convolution._conv3x3(x, weight, bias, [64, 64, 64, splits, 4, 3]) == 2050).all()


def test_layouts(device):
    """Memory that is not channels-last is copied."""
    x, weight, bias, slope = inputs((2, 24, 5, 6), 16, device)
    wanted = results(lambda *tensors: conv3x3(*tensors, backend="triton"), x, weight, bias, slope)
    layouts = (
        lambda tensor: tensor.contiguous(),
        lambda tensor: torch.cat([tensor, tensor], 1)[:, tensor.shape[1] :],
        lambda tensor: channels_last(torch.cat([tensor, tensor], 1))[:, : tensor.shape[1]],
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor.repeat_interleave(2, 0)[::2],
    )
    for layout in layouts:
        tensors = layout(x), layout(weight), bias.repeat_interleave(2)[::2], layout(slope)
        ours = results(lambda *tensors: conv3x3(*tensors, backend="triton"), *tensors)
        for actual, expected in zip(ours, wanted, strict=True):
            assert torch.equal(actual, expected)
        assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_reference():
    x, weight, bias, _ = (tensor.double().requires_grad_() for tensor in inputs((2, 3, 3, 4), 2, "cpu"))
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    taps = ((row, column) for row in range(3) for column in range(3))
    shifted = (
        torch.einsum("bchw,dc->bdhw", padded[:, :, row : row + 3, column : column + 4], weight[:, :, row, column])
        for row, column in taps
    )
    expected = sum(shifted) + bias[:, None, None]
    torch.testing.assert_close(conv3x3(x, weight, bias), expected)
    assert torch.autograd.gradcheck(conv3x3_reference, (x, weight, bias))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    x, weight, bias, slope = inputs((2, 16, 3, 2), 8, device)
    x.requires_grad_(requires_grad)
    torch.library.opcheck(convolution._conv3x3, (x, weight, bias, []))
    torch.library.opcheck(convolution._conv3x3, (x.detach(), weight.contiguous(), None, [64, 64, 64, 1, 4, 3]))
    torch.library.opcheck(convolution._conv3x3_input_gradient, (slope, weight, []))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=gpu_only)])
def test_compiles_as_one_graph(compiler, device, assert_close):
    def scaled(x, weight, bias):
        return 2 * conv3x3(x * 3, weight, bias, backend="triton")

    torch._dynamo.reset()
    tensors = inputs((2, 24, 4, 5), 16, device)
    compiled = torch.compile(scaled, backend=compiler, fullgraph=True)
    for actual, expected in zip(results(compiled, *tensors), results(scaled, *tensors), strict=True):
        assert_close(actual, expected, 1e-3)


@gpu_only
def test_cuda_graph(device):
    x, weight, bias, _ = inputs((1, 1280, 8, 8), 1280, device)
    conv3x3(x, weight, bias, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = conv3x3(x, weight, bias, backend="triton")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, conv3x3(x, weight, bias, backend="triton"))  # the same sum each time


@gpu_only
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    ("side", "channels_in", "channels_out"),
    [
        *((8, width, 1280) for width in (1280, 2560)),
        *((16, width, 1280) for width in (640, 1280, 1920, 2560)),
        *((32, width, 640) for width in (320, 640, 960, 1280, 1920)),
        (64, 320, 320),
    ],
)
def test_sd_shapes(batch, side, channels_in, channels_out, device, assert_close):
    for dtype in BOUNDS:
        tensors = inputs((batch, channels_in, side, side), channels_out, device, dtype)
        check(*tensors, assert_close)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(8, 3, 3)}, r"x must be \[B, Cin, h, w\]"),
        ({"x": torch.zeros(0, 8, 3, 3)}, "no empty axis"),
        ({"weight": torch.zeros(4, 8, 1, 1)}, r"weight must be \[Cout, 8, 3, 3\].*not \[4, 8, 1, 1\]"),
        ({"weight": torch.zeros(4, 6, 3, 3)}, "weight must be"),
        ({"weight": torch.zeros(0, 8, 3, 3)}, "weight must be"),
        ({"weight": torch.zeros(4, 8, 3, 3).half()}, "weight is torch.float16"),
        ({"bias": torch.zeros(8)}, r"bias must be \[4\].*not \[8\]"),
        ({"bias": torch.zeros(4).half()}, "bias is torch.float16.*or float32"),
        ({"backend": "cuda"}, "backend must be"),
        ({"backend": "triton"}, "torch.float32 is not supported"),
    ],
    ids=str,
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        conv3x3(**({"x": torch.zeros(2, 8, 3, 3), "weight": torch.zeros(4, 8, 3, 3)} | options))


@pytest.mark.parametrize("trained", [1, 2])
def test_trainable_parameters_are_left_to_torch(trained, device, assert_close):
    """The kernel has no gradient for them: it refuses, unless none is recorded; `auto` takes the reference."""
    tensors = inputs((1, 64, 3, 3), 64, device)[:3]
    tensors[trained].requires_grad_()
    with pytest.raises(ValueError, match="requires a gradient"):
        conv3x3(*tensors, backend="triton")
    y = conv3x3(*tensors)
    assert torch.autograd.grad(y.sum(), tensors[trained])[0].shape == tensors[trained].shape
    with torch.no_grad():
        assert_close(conv3x3(*tensors, backend="triton"), y, 1e-3)


@pytest.mark.parametrize(
    ("batch", "channels_in", "channels_out", "side", "backend"),
    [
        (1, 64, 64, 8, "auto"),
        (1, 64, 96, 16, "auto"),
        (3, 1536, 64, 16, "auto"),
        (3, 64, 640, 32, "auto"),
        (3, 64, 648, 32, "torch"),
        (3, 1528, 64, 16, "torch"),
        (2, 64, 64, 16, "torch"),
        (1, 64, 64, 64, "torch"),
        (17, 64, 64, 8, "torch"),
        (1, 4, 64, 8, "auto"),
        (1, 64, 4, 8, "auto"),
        (2, 4, 64, 24, "auto"),
        (1, 4, 56, 8, "torch"),
        (1, 16, 64, 8, "torch"),
        (1, 68, 64, 8, "torch"),
    ],
)
def test_auto_is_for_the_sizes_where_the_kernel_won(batch, channels_in, channels_out, side, backend, monkeypatch):
    chosen = []
    monkeypatch.setattr(convolution, "choose_triton", lambda backend, *_: chosen.append(backend))
    conv3x3(torch.zeros(batch, channels_in, side, side), torch.zeros(channels_out, channels_in, 3, 3))
    assert chosen == [backend]


LAYOUTS = [channels_last, torch.Tensor.contiguous]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "channels_out", "dtype"),
    [((2, 4, 5, 3), 6, torch.float64), ((1, 8, 1, 1), 4, torch.float32), ((2, 8, 3, 4), 8, torch.float16)],
    ids=str,
)
def test_frozen_weights_keep_no_map(shape, channels_out, dtype, has_bias, layout):
    """Where a gradient to x alone is wanted, the weight is all that it needs."""
    x, weight, bias, slope = (layout(t) if t.ndim == 4 else t for t in inputs(shape, channels_out, "cpu", dtype))
    bias = bias if has_bias else None
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = conv3x3(x, weight, bias)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]
    expected = F.conv2d(x, weight, bias, padding=1)
    assert torch.equal(y, expected)
    actual, wanted = (torch.autograd.grad(result, x, slope)[0] for result in (y, expected))
    assert torch.equal(actual, wanted) and actual.dtype == dtype and actual.stride() == wanted.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_trained_weights_have_gradients(has_bias, layout, assert_close):
    x, weight, bias, slope = (layout(t) if t.ndim == 4 else t for t in inputs((2, 4, 5, 3), 6, "cpu", torch.float64))
    tensors = [tensor.requires_grad_() for tensor in ((x, weight, bias) if has_bias else (x, weight))]
    y, expected = conv3x3(*tensors), F.conv2d(*tensors, padding=1)
    ours, theirs = (torch.autograd.grad(result, tensors, slope) for result in (y, expected))
    for actual, wanted in zip((y, *ours), (expected, *theirs), strict=True):
        assert_close(actual, wanted, 1e-12)


def test_frozen_weights_with_a_trained_bias():
    """The bias has its gradient, whatever is kept."""
    x, weight, bias, slope = inputs((1, 4, 3, 3), 4, "cpu", torch.float64)
    for wanted in ((x, bias), (bias,)):
        for tensor in (x, bias):
            tensor.requires_grad_(any(tensor is other for other in wanted))
        both = conv3x3(x, weight, bias), F.conv2d(x, weight, bias, padding=1)
        for actual, other in zip(*(torch.autograd.grad(result, wanted, slope) for result in both), strict=True):
            torch.testing.assert_close(actual, other)


def test_frozen_weights_differentiate_twice():
    x, weight, bias, _ = inputs((1, 2, 3, 2), 2, "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda x: conv3x3(x, weight, bias), (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda x: conv3x3(x, weight, bias).square(), (x,))


def test_frozen_weights_compile_as_one_graph(assert_close):
    def scaled(x, weight, bias):
        return 2 * conv3x3(x * 3, weight, bias)

    torch._dynamo.reset()
    tensors = inputs((2, 4, 3, 2), 4, "cpu", torch.float32)
    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(results(compiled, *tensors), results(scaled, *tensors), strict=True):
        assert_close(actual, expected)
