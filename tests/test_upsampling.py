import pytest
import torch
import torch.nn.functional as F

from p2pz.kernels import upsampling
from p2pz.kernels.upsampling import merge_taps, upsampled_conv3x3, upsampled_conv3x3_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
TILE = [64, 64, 64, 1, 4, 3]
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def enlarged_conv3x3(x, weight, bias):
    """What the module computes, by enlarging the map."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def inputs(shape, channels_out, device, dtype=torch.float16):
    """x, merged weights, bias, and a slope of the output; maps are channels-last."""
    batch, channels, height, width = shape
    x = channels_last(torch.randn(shape, device=device).to(dtype))
    weight = torch.randn(channels_out, channels, 3, 3, device=device) / (3 * channels**0.5)
    bias = torch.randn(channels_out, device=device).to(dtype)
    slope = torch.randn(batch, channels_out, 2 * height, 2 * width, device=device).to(dtype)
    return x, merge_taps(weight.to(dtype)), bias, channels_last(slope)


def results(function, x, merged, bias, slope):
    """Output and gradient to x."""
    x = x.detach().requires_grad_()
    y = function(x, merged, bias)
    return y.detach(), torch.autograd.grad(y, x, slope)[0]


def kernel(x, merged, bias):
    return upsampled_conv3x3(x, merged, bias, backend="triton")


def check(x, merged, bias, slope, assert_close, tile=None):
    """The kernel against the reference in float64, and against the reference's error in the dtype of x.

    The kernel is called with plans of its own, or with `tile` in both directions.
    """
    if tile:
        ours = (
            upsampling._upsampled_conv3x3(x, merged, bias, tile),
            upsampling._upsampled_conv3x3_input_gradient(slope, merged, tile),
        )
    else:
        ours = results(kernel, x, merged, bias, slope)
    plain = results(upsampled_conv3x3_reference, x, merged, bias, slope)
    exact = results(upsampled_conv3x3_reference, *(tensor.double() for tensor in (x, merged, bias, slope)))
    for name, actual, other, expected in zip(("y", "dx"), ours, plain, exact, strict=True):
        plain_error = ((other.double() - expected).norm() / expected.norm()).item()
        assert actual.dtype == x.dtype, name
        assert_close(actual, expected, min(BOUNDS[x.dtype], 2 * plain_error + 1e-4))
        assert actual.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize(
    ("shape", "channels_out"), [((1, 3, 4, 4), 2), ((2, 2, 5, 3), 4), ((3, 4, 1, 1), 1), ((2, 1, 1, 6), 3)], ids=str
)
def test_reference(shape, channels_out, assert_close):
    """Against the convolution of a map that is enlarged."""
    x, weight = torch.randn(shape).double(), torch.randn(channels_out, shape[1], 3, 3).double()
    bias = torch.randn(channels_out).double()
    expected = enlarged_conv3x3(x, weight, bias)
    for backend in ("auto", "torch"):
        assert_close(upsampled_conv3x3(x, merge_taps(weight), bias, backend=backend), expected, 1e-12)


def test_gradients_of_the_reference():
    x, weight, bias = torch.randn(2, 2, 2, 3), torch.randn(2, 2, 3, 3), torch.randn(2)
    tensors = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: upsampled_conv3x3_reference(x, merge_taps(weight), bias), tensors
    )


def test_merged_taps_by_hand():
    weight = torch.randn(3, 2, 3, 3).double()
    merged = merge_taps(weight)
    assert merged.shape == (2, 2, 3, 2, 2, 2) and merged.is_contiguous()
    torch.testing.assert_close(merged.sum((3, 4)), weight.sum((2, 3)).expand(2, 2, 3, 2))
    # phase, tap, and the taps of the convolution that it stands for
    for row_phase, row, rows in ((0, 0, [0]), (0, 1, [1, 2]), (1, 0, [0, 1]), (1, 1, [2])):
        for column_phase, column, columns in ((0, 0, [0]), (0, 1, [1, 2]), (1, 0, [0, 1]), (1, 1, [2])):
            expected = weight[:, :, rows][..., columns].sum((2, 3))
            torch.testing.assert_close(merged[row_phase, column_phase, :, row, column], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_merged_taps_are_rounded_once(dtype):
    """In float16, 2048 + 1 is 2048: the sum of both small taps would be lost."""
    large = {torch.float16: 2048, torch.bfloat16: 256}.get(dtype, 1)
    weight = torch.zeros(1, 1, 3, 3, dtype=dtype)
    weight[0, 0, 1:, 1:] = torch.tensor([[large, 1], [1, 0]])
    merged = merge_taps(weight)
    assert merged.dtype == dtype and merged[0, 0, 0, 1, 1, 0] == large + 2


@pytest.mark.parametrize(
    ("shape", "channels_out", "dtype", "bias_dtype", "tile"),
    [  # tile: BLOCK_M, BLOCK_N, BLOCK_K, splits, warps, stages
        ((1, 64, 8, 8), 64, torch.float16, torch.float16, [64, 64, 64, 1, 4, 4]),
        ((1, 64, 8, 8), 64, torch.float16, torch.float16, [64, 64, 64, 4, 4, 4]),  # a split per tap
        ((3, 70, 5, 7), 24, torch.float16, torch.float32, [64, 64, 64, 3, 4, 3]),  # nothing is a multiple
        ((3, 24, 7, 5), 70, torch.bfloat16, torch.bfloat16, [64, 64, 32, 1, 4, 3]),
        ((2, 136, 3, 4), 40, torch.bfloat16, torch.float32, [64, 64, 64, 2, 4, 3]),
        ((2, 128, 6, 4), 72, torch.float16, torch.float16, [64, 64, 128, 2, 4, 3]),
        ((1, 65, 9, 16), 130, torch.bfloat16, torch.bfloat16, [128, 128, 64, 1, 8, 3]),
        ((1, 3, 1, 1), 1, torch.float16, torch.float16, [64, 64, 64, 1, 4, 3]),
        ((2, 8, 1, 1), 8, torch.float16, torch.float16, [64, 64, 64, 2, 4, 3]),
        ((1, 1, 1, 5), 5, torch.float16, torch.float16, [64, 64, 64, 3, 4, 3]),
    ],
    ids=str,
)
def test_kernel(shape, channels_out, dtype, bias_dtype, tile, device, assert_close):
    x, merged, bias, slope = inputs(shape, channels_out, device, dtype)
    check(x, merged, bias.to(bias_dtype), slope, assert_close, tile)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 136, 4, 4), torch.float16),  # split in both directions
        ((2, 40, 7, 5), torch.bfloat16),
        ((1, 8, 16, 16), torch.float16),
        ((1, 256, 17, 16), torch.float16),  # wide for the gradient
        ((2, 8, 16, 15), torch.bfloat16),
        ((3, 8, 13, 17), torch.float16),
        ((1, 8, 29, 28), torch.float16),
    ],
    ids=str,
)
def test_every_row_of_the_plan(shape, dtype, device, assert_close):
    check(*inputs(shape, 16, device, dtype), assert_close)


@pytest.mark.parametrize("transposed", [False, True])
def test_plan(transposed):
    """No split is empty, whatever the channels."""
    for positions in (1, 64, 192, 256, 384, 512, 768, 1024, 4096, 1 << 20):
        for channels_in, channels_out in ((1, 1), (64, 8), (8, 256), (320, 640), (2560, 1280)):
            _, _, block_k, splits, *_ = upsampling.plan(positions, channels_in, channels_out, transposed)
            assert 1 <= splits <= (16 if transposed else 4) * -(-channels_in // block_k)


def test_each_tap(device):
    """A weight of a single one shifts the enlarged map, exactly; its gradient shifts back and sums whole numbers."""
    x = channels_last(torch.randn(2, 8, 3, 4, device=device).half())
    slope = channels_last(torch.randint(-8, 9, (2, 8, 6, 8), device=device).half())
    bias = torch.zeros(8, device=device).half()
    for tap in range(9):
        weight = torch.zeros(8, 8, 9, device=device)
        weight[:, :, tap] = torch.eye(8).roll(1, 0)
        weight = weight.view(8, 8, 3, 3)
        y, dx = results(enlarged_conv3x3, x.double(), weight.double(), bias.double(), slope.double())
        merged = merge_taps(weight.half())
        assert torch.equal(upsampling._upsampled_conv3x3(x, merged, bias, TILE).double(), y)
        assert torch.equal(upsampling._upsampled_conv3x3_input_gradient(slope, merged, TILE).double(), dx)


def test_rounds_once(device):
    """In float16, 2048 + 1 is 2048: the sum of both small terms would be lost."""
    x, one = torch.full((1, 8, 2, 2), 2048.0, device=device).half(), torch.ones(8, device=device).half()
    x[:, 1] = 1
    weight = torch.zeros(8, 8, 3, 3, device=device).half()
    weight[:, :2, 1, 1] = 1
    for splits in (1, 4):
        tile = [64, 64, 64, splits, 4, 3]
        assert (upsampling._upsampled_conv3x3(x, merge_taps(weight), one, tile) == 2050).all()


def test_layouts(device):
    """Memory that is not channels-last is copied."""
    x, merged, bias, slope = inputs((2, 24, 3, 4), 16, device)
    wanted = results(kernel, x, merged, bias, slope)
    layouts = (
        lambda tensor: tensor.contiguous(),
        lambda tensor: torch.cat([tensor, tensor], 1)[:, tensor.shape[1] :],
        lambda tensor: channels_last(torch.cat([tensor, tensor], 1))[:, : tensor.shape[1]],
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor.repeat_interleave(2, 0)[::2],
    )
    for layout in layouts:
        strided = merged.mT.contiguous().mT, bias.repeat_interleave(2)[::2]
        ours = results(kernel, layout(x), *strided, layout(slope))
        for actual, expected in zip(ours, wanted, strict=True):
            assert torch.equal(actual, expected)
            assert actual.is_contiguous(memory_format=torch.channels_last)
    ones = torch.ones((), device=device).half().expand_as(slope)
    expanded, copied = results(kernel, x, merged, bias, ones), results(kernel, x, merged, bias, ones.contiguous())
    assert torch.equal(expanded[1], copied[1])


def test_gradients_that_are_wanted(device, monkeypatch):
    """That to x needs the weights alone; nothing is launched where none is wanted."""
    x, merged, bias, slope = inputs((1, 8, 3, 3), 8, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = kernel(x.requires_grad_(), merged, bias)
    assert [tensor.data_ptr() for tensor in kept] == [merged.data_ptr()]
    dx = torch.autograd.grad(y, x, slope)[0]
    assert torch.equal(dx, upsampling._upsampled_conv3x3_input_gradient(slope, merged, []))
    monkeypatch.setattr(upsampling, "_upsampled_conv3x3_input_gradient", None)
    assert not kernel(x.detach(), merged, bias).requires_grad
    with torch.no_grad():
        assert not kernel(x, merged, bias).requires_grad


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    x, merged, bias, slope = inputs((2, 16, 3, 2), 8, device)
    x.requires_grad_(requires_grad)
    torch.library.opcheck(upsampling._upsampled_conv3x3, (x, merged, bias, []))
    if not requires_grad:
        strided = merged.mT.contiguous().mT
        torch.library.opcheck(upsampling._upsampled_conv3x3, (x.contiguous(), strided, bias.float(), TILE))
        torch.library.opcheck(upsampling._upsampled_conv3x3_input_gradient, (slope, merged, []))
        torch.library.opcheck(upsampling._upsampled_conv3x3_input_gradient, (slope.contiguous(), merged, TILE))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=gpu_only)])
def test_compiles_as_one_graph(compiler, device, assert_close):
    def scaled(x, merged, bias):
        return 2 * upsampled_conv3x3(x * 3, merged, bias, backend="triton")

    torch._dynamo.reset()
    tensors = inputs((2, 24, 3, 4), 16, device)
    compiled = torch.compile(scaled, backend=compiler, fullgraph=True)
    for actual, expected in zip(results(compiled, *tensors), results(scaled, *tensors), strict=True):
        assert_close(actual, expected, 1e-3)


@gpu_only
def test_cuda_graph(device):
    x, merged, bias, _ = inputs((1, 1280, 8, 8), 1280, device)
    kernel(x, merged, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel(x, merged, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, kernel(x, merged, bias))  # the same sum each time


@gpu_only
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("side", "channels"), [(8, 1280), (16, 1280), (32, 640), (64, 320)])
def test_sd_shapes(batch, side, channels, device, assert_close):
    for dtype in BOUNDS:
        check(*inputs((batch, channels, side, side), channels, device, dtype), assert_close)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(8, 3, 3)}, r"x must be \[B, Cin, h, w\] with no empty axis, not \[8, 3, 3\]"),
        ({"x": torch.zeros(0, 8, 3, 3)}, "no empty axis"),
        ({"merged": torch.zeros(4, 8, 3, 3)}, r"merged must be \[2, 2, Cout, 2, 2, 8\] to go .*not \[4, 8, 3, 3\]"),
        ({"merged": torch.zeros(2, 2, 4, 2, 2, 6)}, r"not \[2, 2, 4, 2, 2, 6\]"),
        ({"merged": torch.zeros(2, 2, 4, 3, 2, 8)}, "merged must be"),
        ({"merged": torch.zeros(1, 2, 4, 2, 2, 8)}, "merged must be"),
        ({"merged": torch.zeros(2, 2, 0, 2, 2, 8)}, "merged must be"),
        ({"merged": torch.zeros(2, 2, 4, 2, 2, 8).half()}, "merged is torch.float16 on cpu, but x is torch.float32"),
        ({"merged": torch.zeros(2, 2, 4, 2, 2, 8, device="meta")}, "merged is torch.float32 on meta.*must agree"),
        ({"bias": torch.zeros(8)}, r"bias must be \[4\] to go with merged \[2, 2, 4, 2, 2, 8\], not \[8\]"),
        ({"bias": torch.zeros(4).half()}, "bias is torch.float16.*or float32"),
        ({"backend": "cuda"}, "backend must be"),
        ({"backend": "triton"}, "torch.float32 is not supported: float16 and bfloat16 are"),
    ],
    ids=str,
)
def test_refuses(options, message):
    arguments = {"x": torch.zeros(2, 8, 3, 3), "merged": torch.zeros(2, 2, 4, 2, 2, 8), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        upsampled_conv3x3(**(arguments | options))


def test_refuses_huge_maps(device):
    x = torch.zeros(1, 8, 1, 1, device=device).half().expand(1, 8, 1 << 13, 1 << 13)
    merged, bias = torch.zeros(2, 2, 4, 2, 2, 8, device=device).half(), torch.zeros(4, device=device).half()
    with pytest.raises(ValueError, match=r"maps of 2\^31 elements or more are not supported"):
        upsampled_conv3x3(x, merged, bias, backend="triton")


@pytest.mark.parametrize(("trained", "name"), [(1, "merged"), (2, "bias")])
def test_trainable_parameters_are_left_to_torch(trained, name, device, assert_close):
    """The kernel has no gradient for them: it refuses, unless none is recorded; `auto` takes the reference."""
    tensors = inputs((1, 16, 3, 3), 8, device)[:3]
    tensors[trained].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        upsampled_conv3x3(*tensors, backend="triton")
    y = upsampled_conv3x3(*tensors)
    assert torch.autograd.grad(y.sum(), tensors[trained])[0].shape == tensors[trained].shape
    with torch.no_grad():
        assert_close(upsampled_conv3x3(*tensors, backend="triton"), y, 1e-3)


def test_auto_takes_the_reference_on_the_cpu(monkeypatch):
    monkeypatch.setattr(upsampling, "_upsampled_conv3x3", None)
    tensors = inputs((2, 16, 3, 2), 8, "cpu")
    for actual, expected in zip(
        results(upsampled_conv3x3, *tensors), results(upsampled_conv3x3_reference, *tensors), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("channels_in", "channels_out", "backend"), [(8, 16, "auto"), (12, 8, "torch"), (8, 12, "torch")]
)
def test_auto_is_for_channels_that_are_read_in_whole(channels_in, channels_out, backend, monkeypatch):
    chosen = []
    monkeypatch.setattr(upsampling, "choose_triton", lambda backend, *_: chosen.append(backend))
    x, merged = torch.zeros(1, channels_in, 2, 2), torch.zeros(2, 2, channels_out, 2, 2, channels_in)
    upsampled_conv3x3(x, merged, torch.zeros(channels_out))
    assert chosen == [backend]
