import pytest
import torch
import torch.nn.functional as F

from p2pz.kernels import gating
from p2pz.kernels.gating import geglu, geglu_linear, geglu_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BOUNDS = {torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 1e-4), torch.bfloat16: (1e-2, 1e-4)}
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(function, x, bias, slope, **options):
    """Output and gradient of x."""
    x = x.detach().requires_grad_()
    y = function(x, bias, **options)
    return y.detach(), torch.autograd.grad(y, x, slope.to(y.dtype))[0]


def check(x, bias, assert_close):
    """The kernel against the reference in float64, and against the reference's error in the dtype of x."""
    bound, slack = BOUNDS[x.dtype]
    slope = torch.randn_like(x[..., ::2])
    exact = run(geglu_reference, x.double(), None if bias is None else bias.double(), slope)
    plain = run(geglu_reference, x, bias, slope)
    for ours, torchs, wanted in zip(run(geglu, x, bias, slope, backend="triton"), plain, exact, strict=True):
        assert ours.dtype == x.dtype
        plain_error = ((torchs.double() - wanted).norm() / wanted.norm()).item()
        assert_close(ours, wanted, min(bound, 2 * plain_error + slack))


@pytest.mark.parametrize(
    ("shape", "dtype", "bias"),
    [
        ((3, 5, 80), torch.float32, True),
        ((2, 9, 600), torch.float32, False),  # two blocks of columns and of rows, both ragged
        ((1, 2), torch.float32, True),
        ((17, 6), torch.float16, True),
        ((2, 2, 2, 512), torch.float16, False),
        ((2560,), torch.float16, True),
        ((3, 3, 1024), torch.bfloat16, True),
        ((8, 66), torch.bfloat16, False),
    ],
    ids=str,
)
def test_geglu(shape, dtype, bias, device, assert_close):
    x = 2 * torch.randn(shape, device=device)
    check(x.to(dtype), torch.randn(shape[-1:], device=device).to(dtype) if bias else None, assert_close)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_float32_bias(dtype, device, assert_close):
    check(torch.randn(2, 3, 48, device=device).to(dtype), torch.randn(48, device=device), assert_close)


def test_every_gate(device):
    """The normal distribution's approximation, over its whole range and with its derivative."""
    gate = torch.linspace(-12, 12, 4097, device=device)
    x = torch.cat([torch.ones_like(gate), gate]).requires_grad_()
    y = geglu(x, backend="triton")
    slopes = torch.autograd.grad(y.sum(), x)[0]
    exact_gate = gate.double().requires_grad_()
    exact = F.gelu(exact_gate)
    exact_slope = torch.autograd.grad(exact.sum(), exact_gate)[0]
    assert (y - exact).abs().max() < 1e-6
    assert (slopes[4097:] - exact_slope).abs().max() < 1e-6
    assert (y[:1500] - exact[:1500]).abs().max() < 3e-7  # the lower tail, where 1 + erf would cancel
    far = torch.tensor([1.0, 1.0, 1.0, -200.0, 200.0, 0.0], device=device)
    assert geglu(far, backend="triton").tolist() == [0.0, 200.0, 0.0]


def test_layouts(device, assert_close):
    """Columns of a wider matrix are read in place, others are copied; slopes may be expanded."""
    x, slope = torch.randn(2, 6, 40, device=device), torch.randn(2, 6, 20, device=device)
    y, gradient = run(geglu, x, None, slope, backend="triton")
    for other in (
        torch.cat([x, x, x], -1)[..., 40:80],
        x.mT.contiguous().mT,
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        other_y, other_gradient = run(geglu, other, None, slope.mT.contiguous().mT, backend="triton")
        assert torch.equal(other_y, y) and torch.equal(other_gradient, gradient)
    bias = torch.randn(40, device=device)
    strided = bias.repeat_interleave(2)[::2]
    assert torch.equal(geglu(x, strided, backend="triton"), geglu(x, bias, backend="triton"))
    ones = torch.ones((), device=device).expand_as(slope)
    assert_close(run(geglu, x, None, ones, backend="triton")[1], run(geglu_reference, x.double(), None, ones)[1])


def test_reference_by_hand(assert_close):
    x, bias = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    value, gate = (x + bias)[:, :4], (x + bias)[:, 4:]
    assert_close(geglu_reference(x, bias), value * gate * (1 + torch.erf(gate / 2**0.5)) / 2, 1e-12)
    assert torch.autograd.gradcheck(geglu_reference, (x.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    x = torch.randn(2, 3, 24, device=device, requires_grad=requires_grad)
    torch.library.opcheck(gating._geglu, (x, torch.randn(24, device=device), []))
    torch.library.opcheck(gating._geglu, (x, None, [2, 16, 4]))
    if not requires_grad:
        torch.library.opcheck(gating._geglu_backward, (torch.randn(2, 3, 12, device=device), x, None, []))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=gpu_only)])
def test_compiles_as_one_graph(compiler, device, assert_close):
    def scaled(x, bias):
        return 2 * geglu(x * 3, bias, backend="triton")

    torch._dynamo.reset()
    x, bias, slope = (
        torch.randn(3, 40, device=device),
        torch.randn(40, device=device),
        torch.randn(3, 20, device=device),
    )
    compiled = torch.compile(scaled, backend=compiler, fullgraph=True)
    for ours, wanted in zip(run(compiled, x, bias, slope), run(scaled, x, bias, slope), strict=True):
        assert_close(ours, wanted)


@gpu_only
def test_cuda_graph(device):
    x = torch.randn(2, 300, 640, device=device, dtype=torch.float16, requires_grad=True)
    slope = torch.randn_like(x[..., ::2])

    def step():
        y = geglu(x, backend="triton")
        return y, torch.autograd.grad(y, x, slope)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)


@gpu_only
@pytest.mark.parametrize("shape", [(2, 4096, 2560), (2, 1024, 5120), (2, 256, 10240), (2, 64, 10240)], ids=str)
def test_sd_shapes(shape, device, assert_close):
    x = torch.randn(shape, device=device, dtype=torch.float16)
    check(x, None, assert_close)
    check(x, torch.randn(shape[-1:], device=device, dtype=torch.float16), assert_close)


def test_no_gradient_where_none_is_needed(device, monkeypatch):
    monkeypatch.setattr(gating, "_geglu_backward", None)
    x = torch.randn(3, 8, device=device)
    assert not geglu(x, backend="triton").requires_grad


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(3, 7), {}, r"x must be \[\.\.\., 2 \* inner\].*\[3, 7\]"),
        (torch.zeros(0, 8), {}, "no empty axis"),
        (torch.zeros(()), {}, "x must be"),
        (torch.zeros(3, 8), {"bias": torch.zeros(4)}, r"bias must be \[8\].*not \[4\]"),
        (torch.zeros(3, 8), {"bias": torch.zeros(8).half()}, "bias is torch.float16"),
        (torch.zeros(3, 8), {"backend": "cuda"}, "backend must be"),
        (torch.zeros(3, 8).double(), {"backend": "triton"}, "float64 is not supported"),
    ],
    ids=str,
)
def test_refuses(x, options, message):
    with pytest.raises(ValueError, match=message):
        geglu(x, **options)


def test_a_trainable_bias_is_left_to_torch(device, assert_close):
    """The kernel has no gradient for it: it refuses, unless none is recorded; `auto` takes the reference."""
    x, bias = torch.randn(3, 8, device=device), torch.randn(8, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="bias requires a gradient"):
        geglu(x, bias, backend="triton")
    y = geglu(x, bias)
    assert torch.autograd.grad(y.sum(), bias)[0].norm() > 0
    with torch.no_grad():
        assert_close(geglu(x, bias, backend="triton"), y)


def projection(shape, inner, device, dtype=torch.float16):
    """x, weight and bias."""
    width = shape[-1]
    x, weight = torch.randn(shape, device=device), torch.randn(2 * inner, width, device=device) / width**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(2 * inner, device=device).to(dtype)


def two_steps(x, weight, bias):
    return geglu_reference(F.linear(x, weight, bias))


def check_linear(x, weight, bias, assert_close, tile=None):
    """The kernel against float64, and against the error of a product and a gating in the dtype of x."""
    bound, slack = BOUNDS[x.dtype]
    ours = gating._geglu_linear(x, weight, bias, tile) if tile else geglu_linear(x, weight, bias, backend="triton")
    exact = two_steps(x.double(), weight.double(), bias.double())
    plain_error = ((two_steps(x, weight, bias).double() - exact).norm() / exact.norm()).item()
    assert ours.dtype == x.dtype and ours.is_contiguous()
    assert_close(ours, exact, min(bound, 2 * plain_error + slack))


@pytest.mark.parametrize(
    ("shape", "inner", "dtype", "tile"),
    [  # tile: rows, columns, steps of the sum, warps, stages
        ((128, 64), 64, torch.float16, None),
        ((2, 67, 72), 88, torch.float16, None),  # nothing is a multiple
        ((2, 5, 3, 136), 8, torch.bfloat16, None),
        ((8,), 8, torch.float16, None),
        ((147, 40), 40, torch.float16, [16, 16, 16, 4, 2]),  # ten blocks of rows: eight together, and two
        ((3, 33, 80), 200, torch.bfloat16, [64, 128, 32, 4, 3]),
        ((1, 50, 24), 72, torch.bfloat16, [32, 32, 64, 4, 4]),
    ],
    ids=str,
)
def test_geglu_linear(shape, inner, dtype, tile, device, assert_close):
    check_linear(*projection(shape, inner, device, dtype), assert_close, tile)


def test_geglu_linear_rounds_once(device):
    """In float16, 2048 + 1 is 2048: the sum of both small terms would be lost."""
    x, one = torch.ones(3, 8, device=device).half(), torch.ones(16, device=device).half()
    weight = torch.zeros(16, 8, device=device).half()
    weight[:8, 0], weight[:8, 1], weight[8:] = 2048, 1, 0
    bias = one.clone()
    bias[8:] = 16  # an open gate: nothing of the bell is above it
    assert (geglu_linear(x, weight, bias, backend="triton") == 2050 * 16).all()


def test_geglu_linear_layouts(device):
    """Memory that is not contiguous is copied."""
    x, weight, bias = projection((2, 6, 40), 24, device)
    wanted = geglu_linear(x, weight, bias, backend="triton")
    layouts = (
        lambda tensor: torch.cat([tensor, tensor, tensor], -1)[..., 40:80],
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
        lambda tensor: tensor.repeat_interleave(2, 0)[::2],
    )
    for layout in layouts:
        y = geglu_linear(layout(x), layout(weight), bias.repeat_interleave(2)[::2], backend="triton")
        assert torch.equal(y, wanted) and y.is_contiguous()
    assert torch.equal(geglu_linear(x[0].mT.contiguous().mT, weight, bias, backend="triton"), wanted[0])
    late = (torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape) for tensor in (x, weight))
    assert torch.equal(geglu_linear(*late, bias, backend="triton"), wanted)  # does not begin at 16 bytes


def test_geglu_linear_opcheck(device):
    x, weight, bias = projection((2, 3, 24), 16, device)
    torch.library.opcheck(gating._geglu_linear, (x, weight, bias, []))
    torch.library.opcheck(gating._geglu_linear, (x.transpose(0, 1), weight, bias, [16, 16, 16, 4, 2]))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=gpu_only)])
def test_geglu_linear_compiles_as_one_graph(compiler, device, assert_close):
    def scaled(x, weight, bias):
        return 2 * geglu_linear(x * 3, weight, bias, backend="triton")

    torch._dynamo.reset()
    tensors = projection((3, 40), 16, device)
    assert_close(torch.compile(scaled, backend=compiler, fullgraph=True)(*tensors), scaled(*tensors), 1e-3)


@gpu_only
@pytest.mark.parametrize("shape", [(2, 4096, 320), (3, 1024, 640), (2, 256, 1280)], ids=str)
def test_geglu_linear_at_sd_shapes(shape, device, assert_close):
    for dtype in (torch.float16, torch.bfloat16):
        check_linear(*projection(shape, 4 * shape[-1], device, dtype), assert_close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_geglu_linear_on_the_cpu(dtype, monkeypatch):
    """`auto` takes two steps, whether gradients are wanted or not, and those of all three tensors are to be had."""
    monkeypatch.setattr(gating, "_geglu_linear", None)
    tensors = projection((2, 3, 16), 8, "cpu", dtype)
    assert torch.equal(geglu_linear(*tensors), geglu(F.linear(*tensors)))
    for tensor in tensors:
        tensor.requires_grad_()
    y, expected = geglu_linear(*tensors), two_steps(*tensors)
    slope = torch.randn_like(y)
    ours, wanted = (torch.autograd.grad(result, tensors, slope) for result in (y, expected))
    for actual, other in zip((y, *ours), (expected, *wanted), strict=True):
        assert torch.equal(actual, other)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_geglu_linear_leaves_gradients_to_torch(trained, device, assert_close):
    """The kernel gives none: it refuses, unless none is recorded."""
    tensors = projection((3, 16), 8, device)
    tensors[trained].requires_grad_()
    with pytest.raises(ValueError, match="a gradient is wanted: the kernel gives none"):
        geglu_linear(*tensors, backend="triton")
    y = geglu_linear(*tensors)
    assert torch.autograd.grad(y.sum(), tensors[trained])[0].norm() > 0
    with torch.no_grad():
        assert_close(geglu_linear(*tensors, backend="triton"), y, 2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(())}, r"x must be \[\.\.\., width\] with no empty axis, not \[\]"),
        ({"x": torch.zeros(0, 8)}, "no empty axis"),
        ({"weight": torch.zeros(16, 6)}, r"weight must be \[2 \* inner, 8\] to go with x \[3, 8\], not \[16, 6\]"),
        ({"weight": torch.zeros(15, 8)}, "weight must be"),
        ({"weight": torch.zeros(0, 8)}, "weight must be"),
        ({"weight": torch.zeros(16, 8, 1)}, "weight must be"),
        ({"weight": torch.zeros(16, 8).half()}, "weight is torch.float16 on cpu, but x is torch.float32 on cpu"),
        ({"weight": torch.zeros(16, 8, device="meta")}, "weight is torch.float32 on meta.*must agree"),
        ({"bias": torch.zeros(8)}, r"bias must be \[16\] to go with weight \[16, 8\], not \[8\]"),
        ({"bias": torch.zeros(16).half()}, "bias is torch.float16"),
        ({"backend": "cuda"}, "backend must be"),
        ({"backend": "triton"}, "torch.float32 is not supported: halves are"),
        (
            {"x": torch.zeros(3, 4), "weight": torch.zeros(16, 4), "backend": "triton"},
            "16 x 4 weights: multiples of 16 and 8 are supported",
        ),
        (
            {"weight": torch.zeros(24, 8), "bias": torch.zeros(24), "backend": "triton"},
            "24 x 8 weights: multiples of 16 and 8 are supported",
        ),
    ],
    ids=str,
)
def test_geglu_linear_refuses(options, message):
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(16, 8), "bias": torch.zeros(16)}
    with pytest.raises(ValueError, match=message):
        geglu_linear(**(arguments | options))


def test_geglu_linear_without_descriptors(monkeypatch):
    """As with a Triton before 3.4."""
    monkeypatch.setattr(gating, "TensorDescriptor", None)
    tensors = projection((3, 16), 8, "cpu")
    with pytest.raises(ValueError, match=r"Triton 3\.4 or newer is needed"):
        geglu_linear(*tensors, backend="triton")
    assert torch.equal(geglu_linear(*tensors), geglu(F.linear(*tensors)))


@pytest.mark.parametrize(
    ("rows", "width", "capability", "backend"),
    [
        (2048, 640, (9, 0), "auto"),
        (4096, 8, (9, 0), "auto"),
        (2047, 8, (9, 0), "torch"),
        (2048, 648, (9, 0), "torch"),
        (2048, 8, (8, 0), "torch"),
        (2048, 8, (10, 0), "torch"),
    ],
)
def test_auto_is_for_the_sizes_where_the_kernel_won(rows, width, capability, backend, monkeypatch):
    class OnAGpu(torch.Tensor):
        is_cuda = True

    chosen = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(gating, "choose_triton", lambda backend, *_: chosen.append(backend))
    x = torch.zeros(rows, width).as_subclass(OnAGpu)
    geglu_linear(x, torch.zeros(16, width), torch.zeros(16))
    assert chosen[0] == backend
