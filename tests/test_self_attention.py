"""The flash attention kernel against float64, forward and backward; without a GPU in the interpreter of Triton."""

import math

import pytest
import torch

from p2pz.kernels import self_attention
from p2pz.kernels.self_attention import attention, attention_reference, split_projection

pytestmark = pytest.mark.usefixtures("poisoned_memory")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
all_dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)

# queries, keys, heads, head size: tile edges, one row, one key, every row of the tile table
SHAPES = [
    (1, 1, 2, 40),
    (63, 77, 1, 64),
    (64, 64, 1, 80),
    (77, 1, 1, 160),
    (130, 200, 1, 24),
    (65, 129, 1, 256),
    (40, 40, 2, 8),
    (33, 70, 1, 96),
    (1, 1, 1, 80),
    (1, 30, 1, 160),
    (70, 70, 1, 72),
    (70, 70, 2, 79),
]
GPU_SHAPES = [  # batch, positions, heads, head size: Stable Diffusion 1.5, 2.1 and 2.1 at 768 x 768
    (2, 4096, 8, 40), (2, 1024, 8, 80), (2, 256, 8, 160), (2, 64, 8, 160),
    (2, 4096, 5, 64), (2, 1024, 10, 64), (2, 256, 20, 64), (2, 64, 20, 64),
    (1, 9216, 5, 64), (1, 2304, 10, 64), (2, 576, 20, 64), (3, 144, 20, 64), (1, 1000, 8, 40),
]  # fmt: skip


def drawn(batch, queries, keys, heads, width, dtype, device):
    """q, k, v and an upstream gradient; the queries are long enough for peaked maps."""
    q = 2 * torch.randn(batch, queries, heads, width, device=device)
    k, v = torch.randn(2, batch, keys, heads, width, device=device)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)], torch.randn_like(q).to(dtype)


def explicit(q, k, v):
    """Attention with its maps, in the dtype of the arguments."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[3])
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def results(function, arguments, upstream):
    """Output and gradients."""
    out = function(*arguments)
    return out, *torch.autograd.grad(out, arguments, upstream)


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check(arguments, upstream):
    """Every result is as near to float64 as the bounds ask, and at most twice as far as plain torch in that dtype."""
    dtype = arguments[0].dtype
    exact = results(explicit, [x.detach().double().requires_grad_() for x in arguments], upstream.double())
    ours = results(lambda *qkv: attention(*qkv, backend="triton"), arguments, upstream)
    plain = results(explicit, arguments, upstream)
    scale = exact[0].norm()
    for actual, expected, rival in zip(ours, exact, plain, strict=True):
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert torch.isfinite(actual).all()
        if expected.norm() < 1e-6 * scale:  # one key: the gradients of q and k are zero
            assert actual.double().norm() < 1e-2 * scale
            continue
        assert error(actual, expected) <= BOUNDS[dtype]
        if dtype != torch.bfloat16 or actual.is_cuda:  # the interpreter cuts bfloat16 off instead of rounding
            assert error(actual, expected) <= 2 * error(rival, expected) + 1e-6


@all_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, device):
    check(*drawn(2 if shape[0] < 64 else 1, *shape, dtype, device))


def test_batch_of_three_from_a_fused_projection(device):
    """q, k and v are slices of one tensor and are read in place."""
    fused = torch.randn(3, 40, 3, 2, 40, device=device, dtype=torch.float16)
    arguments = [x.detach().requires_grad_() for x in fused.unbind(2)]
    assert not arguments[0].is_contiguous()
    check(arguments, torch.randn(3, 40, 2, 40, device=device).half())


def test_any_strides(device):
    """Transposed heads, an upstream gradient that is expanded, and a last axis that is not contiguous."""
    q, k, v = (torch.randn(2, 2, 35, 24, device=device).transpose(1, 2) for _ in range(3))
    v = v.transpose(1, 3).contiguous().transpose(1, 3)
    assert v.stride(3) != 1
    check([x.detach().requires_grad_() for x in (q, k, v)], torch.randn(24, device=device).expand(2, 35, 2, 24))


def test_thousand_positions(device):
    check(*drawn(1, 1000, 1000, 1, 40, torch.float16, device))


def test_scores_beyond_float16(device):
    """Scores of +-80000: the nearer key takes all."""
    q = torch.full((1, 16, 1, 64), 100.0, dtype=torch.float16, device=device)
    k = torch.stack([q[0, 0], -q[0, 0]])[None]
    v = torch.randn(1, 2, 1, 64, device=device).half()
    assert torch.equal(attention(q, k, v, backend="triton"), v[:, :1].expand(1, 16, 1, 64))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_wanted_gradients_are_computed(wanted, device, assert_close, monkeypatch):
    arguments, upstream = drawn(1, 20, 20, 1, 24, torch.float32, device)
    expected = results(explicit, arguments, upstream)[1:]
    chosen = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(arguments)]
    launched = []
    kernel = self_attention._key_gradient_kernel
    monkeypatch.setattr(self_attention, "_key_gradient_kernel", _Noting(kernel, launched))
    out = attention(*chosen, backend="triton")
    gradients = torch.autograd.grad(out, [chosen[i] for i in wanted], upstream)
    for i, gradient in zip(wanted, gradients, strict=True):
        assert_close(gradient, expected[i])
    assert bool(launched) == (wanted != (0,))


class _Noting:
    """A kernel that notes that it was launched."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(grid)
        return self.kernel[grid]


def test_reference_by_finite_differences():
    arguments = [torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(attention_reference, arguments)


def test_library_op(device):
    (q, k, v), upstream = drawn(1, 20, 33, 2, 24, torch.float32, device)
    torch.library.opcheck(self_attention._attention, (q.detach(), k.detach(), v.detach(), False))
    torch.library.opcheck(self_attention._attention, (q, k, v, False))
    with torch.no_grad():
        out, logsum = self_attention._attention(q, k, v, False)
    for with_keys in (True, False):
        saved = [x.detach() for x in (upstream, q, k, v, out, logsum)]
        torch.library.opcheck(self_attention._attention_backward, (*saved, with_keys))


def test_traced_forward_and_backward(device, assert_close):
    arguments, upstream = drawn(1, 20, 33, 2, 24, torch.float32, device)
    compiled = torch.compile(
        lambda q, k, v: 2 * attention(q, k, v, backend="triton"), backend="aot_eager", fullgraph=True
    )
    expected = results(lambda *qkv: 2 * explicit(*qkv), arguments, upstream)
    for actual, wanted in zip(results(compiled, arguments, upstream), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "backend", "message"),
    [
        (((1, 4, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "fff", "auto", r"q must be \[B, N, H, D\].*\[1, 4, 8\]"),
        (((1, 4, 2, 8), (1, 4, 3, 8), (1, 4, 3, 8)), "fff", "auto", r"k must be \[1, 4, 2, 8\].*\[1, 4, 3, 8\]"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)), "fff", "auto", r"v must be \[1, 4, 2, 8\].*\[1, 5, 2, 8\]"),
        (((2, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "fff", "auto", r"k must be \[2, 4, 2, 8\]"),
        (((1, 0, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "fff", "auto", "no empty axis"),
        (((1, 4, 2, 8),) * 3, "fhf", "auto", "k is torch.float16.*q is torch.float32"),
        (((1, 4, 2, 264),) * 3, "fff", "triton", "head size 264: up to 256"),
        (((1, 4, 2, 8),) * 3, "ddd", "triton", "torch.float64 is not supported"),
        (((1, 4, 2, 8),) * 3, "fff", "cuda", "backend must be.*'cuda'"),
    ],
)  # fmt: skip
def test_bad_input(shapes, dtypes, backend, message, device):
    of = {"f": torch.float32, "h": torch.float16, "d": torch.float64}
    q, k, v = (torch.zeros(shape, dtype=of[d], device=device) for shape, d in zip(shapes, dtypes, strict=True))
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, backend=backend)


def test_cpu_tensors_take_the_reference(monkeypatch):
    q, k, v = torch.randn(3, 1, 5, 2, 8)
    assert torch.equal(attention(q, k, v), attention_reference(q, k, v))
    monkeypatch.setattr("p2pz.kernels.dispatch.INTERPRETED", False)
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        attention(q, k, v, backend="triton")


class OnAGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("why_not", [
    "", "head size", "positions", "keys", "batch", "dtype", "device", "generation", "build",
])  # fmt: skip
def test_cudnn_serves_where_it_was_measured_to_be_faster(why_not, monkeypatch):
    generation = (10, 0) if why_not == "generation" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: why_not != "build")
    dtype = torch.float32 if why_not == "dtype" else torch.float16
    heads = 8, {"head size": 48, "batch": 80}.get(why_not, 40)
    q = torch.empty(1, 1023 if why_not == "positions" else 1024, *heads, dtype=dtype)
    k = torch.empty(1, 77 if why_not == "keys" else 1024, *heads, dtype=dtype)
    if why_not != "device":
        q, k = q.as_subclass(OnAGpu), k.as_subclass(OnAGpu)
    assert self_attention.cudnn_is_faster(q, k, k) == (not why_not)


def by_cudnn_on_a_cpu(q, k, v, bias, with_logsum):
    """What the operator returns, whose logarithms are natural ones."""
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[3])
    logsum = scores.logsumexp(3, keepdim=True) if with_logsum else torch.empty(0)
    return scores.softmax(-1) @ v, logsum, *[None] * 7


@pytest.mark.parametrize("gradient", [True, False])
def test_cudnn_goes_forward_and_our_kernels_backward(gradient, device, monkeypatch, assert_close):
    """The sums are kept where a gradient is wanted; whoever asks for a backend gets that."""
    called = []

    def operator(*arguments):
        called.append(arguments[4])
        return by_cudnn_on_a_cpu(*arguments)

    monkeypatch.setattr(self_attention, "cudnn_is_faster", lambda *_: True)
    monkeypatch.setattr(self_attention, "choose_triton", lambda backend, *_: backend != "torch")
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", operator)
    arguments, upstream = drawn(2, 40, 40, 2, 24, torch.float32, device)
    expected = results(explicit, arguments, upstream)
    with torch.set_grad_enabled(gradient):
        outputs = results(attention, arguments, upstream) if gradient else [attention(*arguments)]
        for actual, wanted in zip(outputs, expected, strict=False):
            assert_close(actual, wanted)
        assert called == [gradient]
        for backend in ("torch", "triton"):
            attention(*arguments, backend=backend)
    assert called == [gradient]


def test_gradients_of_a_fused_projection_lie_in_it(device, assert_close, monkeypatch):
    """They are not put together where `attention` made all three, and are where they come from elsewhere."""
    joined = []
    monkeypatch.setattr(torch, "cat", lambda *args, cat=torch.cat, **kwargs: joined.append(1) or cat(*args, **kwargs))

    def run(function, projection):
        return function(*(x.unflatten(-1, (2, 24)) for x in split_projection(projection)))

    projection = torch.randn(2, 20, 144, device=device, requires_grad=True)
    upstream = torch.randn(2, 20, 2, 24, device=device)
    (expected,) = torch.autograd.grad(run(explicit, projection), projection, upstream)
    assert joined
    joined.clear()
    (actual,) = torch.autograd.grad(
        run(lambda *qkv: attention(*qkv, backend="triton"), projection), projection, upstream
    )
    assert not joined and actual.is_contiguous()
    assert_close(actual, expected)
    q, _, v = split_projection(projection)
    (part,) = torch.autograd.grad(q.sum() + 2 * v.sum(), projection)
    assert torch.equal(part, torch.tensor([1.0, 0.0, 2.0], device=device).repeat_interleave(48).expand(2, 20, 144))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_without_gradient(shape, dtype, device):
    """By cuDNN or not: right, the same in every call, and laid out to be read as tokens."""
    _, count, heads, width = shape
    qkv = torch.randn(3, count, 3 * heads * width, device=device, dtype=dtype)
    q, k, v = (x.unflatten(-1, (heads, width)) for x in qkv.chunk(3, -1))
    out = attention(q, k, v)
    assert out.is_contiguous() and all(torch.equal(attention(q, k, v), out) for _ in range(5))
    for rows in (1, 2):
        assert error(attention(q[:rows], k[:rows], v[:rows]), out[:rows].double()) < BOUNDS[dtype]
    one = [x[:1, :, :2].double() for x in (q, k, v)]
    assert error(out[:1, :, :2], explicit(*one)) < BOUNDS[dtype]


@pytest.mark.parametrize(("shape", "offset", "narrow"), [
    ((2, 64, 8, 80), 0, True), ((1, 256, 8, 160), 0, True), ((2, 64, 1, 72), 0, False), ((2, 64, 2, 79), 0, False),
    ((2, 64, 8, 80), 1, False), ((2, 1, 8, 80), 0, False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kernel", ["forward", "query_gradient"])
def test_narrow_tiles_only_in_pipelined_loops(kernel, shape, offset, narrow, device):
    """Elsewhere a compiler's error makes them wrong: where rows may begin anywhere, and where there is no loop."""
    batch, count, heads, width = shape
    fused = torch.empty(math.prod(shape) * 3 + offset, dtype=torch.float16, device=device)[offset:]
    q, k, v = fused.view(batch, count, 3, heads, width).unbind(2)
    tiles = self_attention._tiles(kernel, q, k, v)
    assert (min(tiles["D0"], tiles["D1"] or 64) < 64) == narrow and tiles["D0"] + tiles["D1"] >= width


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4096, 8, 40), (1, 9216, 5, 64), (4, 1024, 8, 80)], ids=str)
def test_gradients_behind_cudnn(shape, dtype, device):
    """Our backward kernels take its sums; the same bits every time."""
    batch, count, heads, width = shape
    arguments, upstream = drawn(batch, count, count, heads, width, dtype, device)
    assert self_attention.cudnn_is_faster(*arguments) or torch.cuda.get_device_capability() != (9, 0)
    ours = results(attention, arguments, upstream)
    assert all(map(torch.equal, results(attention, arguments, upstream), ours))
    one = [x[:1, :, :1].detach().double().requires_grad_() for x in arguments]
    for actual, expected in zip(ours, results(explicit, one, upstream[:1, :, :1].double()), strict=True):
        assert error(actual[:1, :, :1], expected) < BOUNDS[dtype]


@needs_gpu
@all_dtypes
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_true_shapes(shape, dtype, device):
    batch, count, heads, width = shape
    heads = heads if count < 4096 else 2  # the float64 maps of all heads are too large
    check(*drawn(batch, count, count, heads, width, dtype, device))


@needs_gpu
def test_inductor(device, assert_close):
    arguments, upstream = drawn(2, 100, 100, 2, 40, torch.float16, device)
    compiled = torch.compile(lambda q, k, v: 2 * attention(q, k, v), fullgraph=True)
    expected = results(lambda *qkv: 2 * explicit(*(x.double() for x in qkv)), arguments, upstream.double())
    for actual, wanted in zip(results(compiled, arguments, upstream), expected, strict=True):
        assert_close(actual, wanted, 2e-3)


@needs_gpu
def test_cuda_graph(device):
    """Captured once, replayed on new values in the same memory."""
    arguments, upstream = drawn(2, 100, 100, 2, 40, torch.float16, device)
    with torch.cuda.stream(torch.cuda.Stream()):
        results(attention, arguments, upstream)  # compile first
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(attention, arguments, upstream)
    with torch.no_grad():
        for x in arguments:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for actual, wanted in zip(captured, results(attention, arguments, upstream), strict=True):
        assert torch.equal(actual, wanted)
