import pytest
import torch

from p2pz.kernels import residual
from p2pz.kernels.residual import add_product, add_residual, add_residual_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BOUNDS = {torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 1e-4), torch.bfloat16: (1e-2, 1e-4)}
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def check(x, other, bias, assert_close):
    """The kernel against the reference in float64, and against the reference's error in the dtype of x."""
    bound, slack = BOUNDS[x.dtype]
    ours = add_residual(x, other, bias, backend="triton")
    exact = add_residual_reference(x.double(), other.double(), None if bias is None else bias.double())
    plain_error = ((add_residual_reference(x, other, bias).double() - exact).norm() / exact.norm()).item()
    assert ours.dtype == x.dtype and ours.is_contiguous()
    assert_close(ours, exact, min(bound, 2 * plain_error + slack))


@pytest.mark.parametrize(
    ("shape", "dtype", "bias_dtype"),
    [
        ((3, 5, 77), torch.float32, torch.float32),  # tiles begin and end in the middle of rows
        ((2, 9, 320), torch.float32, None),
        ((1,), torch.float32, torch.float32),
        ((63, 1), torch.float16, torch.float16),
        ((2, 2, 2, 24), torch.float16, torch.float32),
        ((2, 1280), torch.float16, None),
        ((830, 640), torch.float16, torch.float16),  # a large tile, ragged
        ((3, 3, 320), torch.bfloat16, torch.bfloat16),
        ((7, 33), torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_add_residual(shape, dtype, bias_dtype, device, assert_close):
    x, other = torch.randn(2, *shape, device=device).to(dtype)
    bias = None if bias_dtype is None else torch.randn(shape[-1:], device=device).to(bias_dtype)
    check(x, other, bias, assert_close)


def test_rounds_once(device):
    """In float16, 2048 + 1 is 2048: the sum of both small terms would be lost."""
    x, one = torch.full((2, 24), 2048.0, device=device).half(), torch.ones(2, 24, device=device).half()
    assert (add_residual(x, one, one[0], backend="triton") == 2050).all()


def test_layouts(device):
    """Channels of wider tokens and repeated rows are read in place, others are copied."""
    x, other, bias = (
        torch.randn(2, 6, 40, device=device),
        torch.randn(2, 6, 40, device=device),
        torch.randn(40).to(device),
    )
    wanted = add_residual(x, other, bias, backend="triton")
    layouts = (
        lambda tensor: torch.cat([tensor, tensor, tensor], -1)[..., 40:80],
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for layout in layouts:
        for tensors in ((layout(x), other), (x, layout(other)), (layout(x), layout(other))):
            y = add_residual(*tensors, bias.repeat_interleave(2)[::2], backend="triton")
            assert y.is_contiguous() and torch.equal(y, wanted)
    row = other[:1, :1].expand_as(x)
    assert torch.equal(add_residual(x, row, backend="triton"), add_residual(x, row.contiguous(), backend="triton"))


def test_gradients_are_the_slope_itself(device):
    x, other = torch.randn(2, 3, 8, device=device, requires_grad=True), torch.randn(2, 3, 8, device=device)
    slope = torch.randn(3, 2, 8, device=device).transpose(0, 1)
    y = add_residual(x, other, backend="triton")
    assert torch.autograd.grad(y, x, slope)[0].data_ptr() == slope.data_ptr()
    y = add_residual(x, other.requires_grad_(), other[0, 0].detach(), backend="triton")
    for gradient in torch.autograd.grad(y, (x, other), slope):
        assert gradient.data_ptr() == slope.data_ptr() and torch.equal(gradient, slope)
    y = add_residual(other.detach(), x, backend="triton")
    assert torch.equal(torch.autograd.grad(y, x, slope)[0], slope)
    assert not add_residual(x.detach(), other.detach(), backend="triton").requires_grad
    y = add_residual(x, x, backend="triton")
    assert torch.equal(torch.autograd.grad(y, x, slope)[0], 2 * slope)


def test_reference(assert_close):
    x, other, bias = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    assert_close(add_residual(x, other, bias), (x.double() + bias.double() + other.double()).float())
    tensors = [tensor.double().requires_grad_() for tensor in (x, other, bias)]
    assert torch.autograd.gradcheck(add_residual_reference, tensors)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    x, other = (torch.randn(2, 3, 24, device=device, requires_grad=requires_grad) for _ in range(2))
    torch.library.opcheck(residual._add_residual, (x, other, torch.randn(24, device=device), []))
    torch.library.opcheck(residual._add_residual, (x, other.detach(), None, [64, 1]))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=gpu_only)])
def test_compiles_as_one_graph(compiler, device, assert_close):
    def scaled(x, other, bias):
        return 2 * add_residual(x * 3, other, bias, backend="triton")

    torch._dynamo.reset()
    x, other = (torch.randn(3, 40, device=device, requires_grad=True) for _ in range(2))
    bias, slope = torch.randn(40, device=device), torch.randn(3, 40, device=device)
    y = torch.compile(scaled, backend=compiler, fullgraph=True)(x, other, bias)
    assert_close(y, 6 * x + 2 * (other + bias))
    for gradient, factor in zip(torch.autograd.grad(y, (x, other), slope), (6, 2), strict=True):
        assert_close(gradient, factor * slope)


@gpu_only
def test_cuda_graph(device):
    x, other = torch.randn(2, 2, 300, 640, device=device, dtype=torch.float16)
    bias = torch.randn(640, device=device)
    add_residual(x, other, bias, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = add_residual(x, other, bias, backend="triton")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, add_residual(x, other, bias, backend="triton"))


@gpu_only
@pytest.mark.parametrize("shape", [(2, 4096, 320), (2, 1024, 640), (2, 256, 1280), (1, 64, 1280)], ids=str)
def test_sd_shapes(shape, device, assert_close):
    x, other = torch.randn(2, *shape, device=device, dtype=torch.float16)
    check(x, other, None, assert_close)
    check(x, other, torch.randn(shape[-1:], device=device, dtype=torch.float16), assert_close)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(()), {}, r"x must be \[\.\.\., C\]"),
        (torch.zeros(0, 8), {}, "no empty axis"),
        (torch.zeros(3, 8), {"residual": torch.zeros(8)}, r"residual must be \[3, 8\].*not \[8\]"),
        (torch.zeros(3, 8), {"residual": torch.zeros(3, 8).half()}, "residual is torch.float16"),
        (torch.zeros(3, 8), {"bias": torch.zeros(4)}, r"bias must be \[8\].*not \[4\]"),
        (torch.zeros(3, 8), {"bias": torch.zeros(8).half()}, "bias is torch.float16"),
        (torch.zeros(3, 8), {"backend": "cuda"}, "backend must be"),
        (torch.zeros(3, 8).double(), {"backend": "triton"}, "float64 is not supported"),
    ],
    ids=str,
)
def test_refuses(x, options, message):
    with pytest.raises(ValueError, match=message):
        add_residual(x, **({"residual": x} | options))


def test_a_trainable_bias_is_left_to_torch(device, assert_close):
    """The kernel has no gradient for it: it refuses, unless none is recorded; `auto` takes the reference."""
    x, bias = torch.randn(3, 8, device=device), torch.randn(8, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="bias requires a gradient"):
        add_residual(x, x, bias, backend="triton")
    y = add_residual(x, x, bias)
    assert torch.equal(torch.autograd.grad(y.sum(), bias)[0], torch.full_like(bias, 3))
    with torch.no_grad():
        assert_close(add_residual(x, x, bias, backend="triton"), y)


def as_it_is(tensor):
    return tensor


def from_a_map(tensor):
    """The same tokens as a view of a map `[B, C, h * w]`: the two first axes cannot be one in place."""
    return tensor.mT.contiguous().mT


def from_wider_tokens(tensor):
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def product_inputs(shape, inner, device, dtype):
    """x, weight and residual."""
    x = torch.randn(*shape[:2], inner, device=device).to(dtype)
    weight = torch.randn(shape[-1], inner, device=device) / inner**0.5
    return x, weight.to(dtype), torch.randn(shape, device=device).to(dtype)


def plain_product(x, weight, residual):
    return residual + x @ weight.T


@pytest.mark.parametrize("layout", [as_it_is, from_a_map, from_wider_tokens])
@pytest.mark.parametrize("shape", [(2, 6, 24), (1, 15, 8), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", [*BOUNDS, torch.float64], ids=str)
def test_add_product(shape, dtype, layout, device, assert_close):
    """Without a gradient: right whatever the memory; that of contiguous tokens is written over."""
    x, weight, other = product_inputs(shape, 40, device, dtype)
    exact = plain_product(x.double(), weight.double(), other.double())
    plain_error = ((plain_product(x, weight, other).double() - exact).norm() / exact.norm()).item()
    bound, slack = BOUNDS.get(dtype, (1e-12, 1e-15))
    for tokens in (x, layout(x)):
        tensor = layout(other.clone())
        y = add_product(tokens, weight, tensor)
        assert y.dtype == dtype and not y.requires_grad
        assert_close(y, exact, min(bound, 2 * plain_error + slack))
        if layout is as_it_is:
            assert y.data_ptr() == tensor.data_ptr() and y.is_contiguous()


@pytest.mark.parametrize("layout", [as_it_is, from_a_map])
@pytest.mark.parametrize("wanted", [(0, 2), (0,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_gradients_of_a_product(dtype, wanted, layout, device, assert_close):
    """Those of the plain formula; the residual is left alone."""
    tensors = [layout(tensor) for tensor in product_inputs((2, 6, 24), 16, device, dtype)]
    for i in wanted:
        tensors[i].requires_grad_()
    before = tensors[2].detach().clone()
    y = add_product(*tensors)
    assert torch.equal(tensors[2].detach(), before) and y.data_ptr() != tensors[2].data_ptr()
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    expected, slope = plain_product(*exact), torch.randn(2, 6, 24, device=device).to(dtype)
    bound, _ = BOUNDS.get(dtype, (1e-12, 0))
    assert_close(y, expected, bound)
    ours = torch.autograd.grad(y, [tensors[i] for i in wanted], slope)
    theirs = torch.autograd.grad(expected, [exact[i] for i in wanted], slope.double())
    for i, actual, other in zip(wanted, ours, theirs, strict=True):
        assert actual.dtype == dtype, i
        assert_close(actual, other, bound)


def test_a_product_without_recording(device, assert_close):
    """Parameters that could be trained do not matter where nothing is recorded."""
    x, weight, other = (tensor.requires_grad_() for tensor in product_inputs((2, 3, 8), 16, device, torch.float32))
    expected = plain_product(x, weight, other).detach()
    with torch.no_grad():
        y = add_product(x, weight, other.detach())
    assert not y.requires_grad and y.data_ptr() == other.data_ptr()
    assert_close(y, expected)
