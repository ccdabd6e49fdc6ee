"""The kernel that gives maps along with the output, against float64; without a GPU in the interpreter of Triton."""

import math

import pytest
import torch

from p2pz.kernels import cross_attention, tiles
from p2pz.kernels.cross_attention import attention_with_maps, attention_with_maps_reference, short_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
BOUNDS = {SINGLE: 1e-5, HALF: 2e-3, BRAIN: 1e-2}
ODD_TOKENS = [60, 2, 5, 0, 76]

# batch, queries, heads, keys, head size, dtype, dtype of the maps, mean over the heads, tokens
CASES = [
    (1, 63, 1, 77, 40, HALF, None, False, None),
    (3, 1, 2, 77, 64, SINGLE, None, False, ODD_TOKENS),
    (1, 77, 1, 16, 80, BRAIN, SINGLE, False, None),
    (1, 64, 2, 78, 24, HALF, SINGLE, True, ODD_TOKENS),
    (1, 20, 1, 1, 160, HALF, None, False, None),
    (1, 40, 2, 77, 160, HALF, None, True, None),
    (1, 33, 1, 77, 256, HALF, None, False, None),
    (1, 33, 2, 256, 256, SINGLE, None, True, None),
    (1, 70, 2, 256, 40, HALF, BRAIN, True, ODD_TOKENS),
    (1, 17, 1, 144, 200, BRAIN, None, False, None),
    (1, 65, 2, 77, 40, SINGLE, HALF, True, None),
    (1, 31, 1, 50, 40, SINGLE, None, False, None),
    (1, 66, 1, 255, 8, SINGLE, None, False, None),
    (1, 17, 1, 200, 80, HALF, None, False, [199]),
    (1, 1000, 1, 77, 40, HALF, None, False, ODD_TOKENS),
]
GPU_SHAPES = [  # batch, heads, queries, head size: Stable Diffusion 1.5, 2.1 and 2.1 at 768 x 768
    (2, 8, 4096, 40), (2, 8, 1024, 80), (2, 8, 256, 160), (2, 8, 64, 160),
    (2, 5, 4096, 64), (2, 10, 1024, 64), (2, 20, 256, 64), (2, 20, 64, 64),
    (1, 5, 9216, 64), (1, 10, 2304, 64), (2, 20, 576, 64), (3, 20, 144, 64),
]  # fmt: skip


def drawn(batch, queries, heads, keys, width, dtype, device):
    """q, k and v that need gradients; the queries are long enough for peaked maps."""
    q = 2 * torch.randn(batch, queries, heads, width, device=device)
    k, v = torch.randn(2, batch, keys, heads, width, device=device)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def doubled(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def explicit(q, k, v, dtype=None, head_mean=False, tokens=None):
    """What the kernel should give, in the dtype of the arguments."""
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[3])).exp()
    maps = weights / weights.sum(-1, keepdim=True)
    out = torch.einsum("bhnm,bmhd->bnhd", maps, v)
    maps = maps.mean(1) if head_mean else maps
    return out, maps if tokens is None else torch.stack([maps[..., token] for token in tokens], -1)


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def check(ours, exact, plain, dtypes):
    """Results are as near to float64 as the bounds ask, and at most twice as far as plain torch in the same dtype."""
    for actual, expected, rival, dtype in zip(ours, exact, plain, dtypes, strict=True):
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert torch.isfinite(actual).all()
        if expected.norm() < 1e-8:  # one key: the gradients of q and k are zero
            assert actual.norm() < 1e-2
            continue
        assert error(actual, expected) <= BOUNDS[dtype]
        if dtype != BRAIN or actual.is_cuda:  # the interpreter cuts bfloat16 off instead of rounding
            assert error(actual, expected) <= 2 * error(rival, expected) + (1e-6 if dtype == SINGLE else 1e-4)


def compare(arguments, dtype, head_mean, tokens):
    """Output, maps and all gradients of the kernel."""
    out_dtype, maps_dtype = arguments[0].dtype, dtype or arguments[0].dtype
    exact_arguments, options = doubled(arguments), {"head_mean": head_mean, "tokens": tokens}
    exact = explicit(*exact_arguments, **options)
    upstream = [torch.randn_like(x) for x in exact]
    upstream = [upstream[0].to(out_dtype), upstream[1].to(maps_dtype)]
    exact += torch.autograd.grad(exact, exact_arguments, [x.double() for x in upstream])
    ours = attention_with_maps(*arguments, dtype=dtype, backend="triton", **options)
    ours += torch.autograd.grad(ours, arguments, upstream)
    plain = attention_with_maps(*arguments, dtype=dtype, backend="torch", **options)
    plain += torch.autograd.grad(plain, arguments, upstream)
    check(ours, exact, plain, [out_dtype, maps_dtype] + [out_dtype] * 3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x).removeprefix("torch.") for x in case[:8]))
def test_output_maps_and_gradients(case, device, monkeypatch):
    monkeypatch.setattr(tiles, "BUSY", 1)  # the largest tiles, although the problem is small
    *shape, dtype, maps_dtype, head_mean, tokens = case
    compare(drawn(*shape, dtype, device), maps_dtype, head_mean, tokens)


@pytest.mark.parametrize("head_mean", [False, True])
def test_small_tiles(head_mean, device):
    compare(drawn(2, 50, 2, 77, 40, HALF, device), None, head_mean, None)


def test_every_table_row_is_covered():
    rows = {
        (torch.empty((), dtype=dtype).element_size(), next(most for most in (64, 128, 256) if keys <= most))
        for _, _, _, keys, _, dtype, *_ in CASES
    }
    assert rows >= {(2, 128), (2, 256), (4, 64), (4, 128), (4, 256)}


def test_blocks_shrink_to_fill_the_gpu():
    sizes = {}
    for batch, heads, queries, width in GPU_SHAPES[:4]:
        q = torch.empty(batch, queries, heads, width).half()
        sizes[queries] = tiles.plan(q, 77, batch * heads)["BLOCK_N"]
    assert sizes == {4096: 64, 1024: 64, 256: 64, 64: 16}


# Which gradients are there, and which are computed.


@pytest.mark.parametrize("used", ["out", "maps"])
def test_one_result_used(used, device):
    arguments = drawn(1, 20, 2, 77, 40, HALF, device)
    which = 0 if used == "out" else 1
    needed = arguments if used == "out" else arguments[:2]
    ours, exact_arguments = attention_with_maps(*arguments, backend="triton")[which], doubled(arguments)
    exact = explicit(*exact_arguments)[which]
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, needed, upstream, retain_graph=True)
    expected = torch.autograd.grad(exact, exact_arguments[: len(needed)], upstream.double())
    for actual, right in zip(gradients, expected, strict=True):
        assert error(actual, right) <= BOUNDS[HALF]
    if used == "maps":
        assert torch.autograd.grad(ours, arguments[2], upstream, allow_unused=True) == (None,)


@pytest.mark.parametrize("needed", ["q", "k", "v"])
def test_only_needed_gradients_are_computed(needed, device, monkeypatch):
    launches = []
    for name in ("_query_gradient", "_key_gradient"):
        real = getattr(cross_attention, name)

        def counted(*args, name=name, real=real):
            launches.append((name, *args[6:]))
            return real(*args)

        monkeypatch.setattr(cross_attention, name, counted)
    arguments = dict(zip("qkv", drawn(1, 5, 1, 7, 16, SINGLE, device), strict=True))
    for name, tensor in arguments.items():
        tensor.requires_grad_(name == needed)
    out, maps = attention_with_maps(*arguments.values(), backend="triton")
    (out.sum() + maps.square().sum()).backward()
    expected = {"q": ("_query_gradient",), "k": ("_key_gradient", False), "v": ("_key_gradient", True)}
    assert launches == [expected[needed]]
    assert [name for name, tensor in arguments.items() if tensor.grad is not None] == [needed]


def test_odd_strides_of_incoming_gradients(device, assert_close):
    arguments = drawn(2, 9, 2, 20, 24, SINGLE, device)
    exact_arguments = doubled(arguments)
    weights, tokens = torch.randn(2, 20, 9, 2, device=device), [3, 17]

    def loss(function, q, k, v):
        out, maps = function(q, k, v)
        _, chosen = function(q, k, v, head_mean=True, tokens=tokens)  # its gradient is expanded from one number
        strided = (maps.permute(0, 3, 2, 1) * weights.to(q.dtype)).sum()
        return chosen.sum() + strided + out.transpose(1, 3).square().sum() + out[..., 0].sum()

    ours = torch.autograd.grad(
        loss(lambda *a, **o: attention_with_maps(*a, backend="triton", **o), *arguments), arguments
    )
    exact = torch.autograd.grad(loss(explicit, *exact_arguments), exact_arguments)
    for actual, expected in zip(ours, exact, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("result", ["q", "k"])
def test_small_gradients_survive_float16(result, device):
    """Score gradients far below the least normal float16, where the result is not."""
    q, k, v = drawn(1, 64, 1, 77, 40, SINGLE, device)
    sizes = (1 / 16, 16) if result == "q" else (16, 1 / 16)
    arguments = [(x.detach() * size).half().requires_grad_() for x, size in zip((q, k, v), (*sizes, 1), strict=True)]
    which, exact_arguments = "qk".index(result), doubled(arguments)
    out, exact = attention_with_maps(*arguments, backend="triton")[0], explicit(*exact_arguments)[0]
    upstream = (2e-5 * torch.randn_like(exact)).half()
    gradient = torch.autograd.grad(out, arguments[which], upstream)[0]
    expected = torch.autograd.grad(exact, exact_arguments[which], upstream.double())[0]
    assert error(gradient, expected) <= BOUNDS[HALF]


def test_key_gradients_repeat_exactly(device):
    arguments = drawn(1, 100, 1, 20, 16, SINGLE, device)
    out, maps = attention_with_maps(*arguments, backend="triton")
    upstream = [torch.randn_like(out), torch.randn_like(maps)]
    first, second = (torch.autograd.grad((out, maps), arguments, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Inputs as they come.


def layouts(q, k, v):
    """The same q, k and v in other memory layouts."""
    fused = torch.cat([q.flatten(2), q.flatten(2)], -1).detach()
    yield fused[..., : fused.shape[-1] // 2].unflatten(2, q.shape[2:]), *torch.stack([k, v]).detach()
    pair = torch.stack([k, v], 2).detach()
    yield q.detach().clone(), pair[:, :, 0], pair[:, :, 1]
    yield tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    yield tuple(x.detach().permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for x in (q, k, v))
    yield tuple(x.detach().repeat_interleave(3, 3)[..., ::3] for x in (q, k, v))


def test_layouts(device):
    arguments = drawn(2, 20, 2, 10, 40, HALF, device)

    def results(arguments):
        out, maps = attention_with_maps(*arguments, backend="triton")
        return out, maps, *torch.autograd.grad((out, maps), arguments, upstream)

    upstream = [torch.randn(2, 20, 2, 40, device=device).half(), torch.randn(2, 2, 20, 10, device=device).half()]
    expected = results(arguments)
    for strided in layouts(*arguments):
        for actual, right in zip(results([x.requires_grad_() for x in strided]), expected, strict=True):
            assert torch.equal(actual, right)


def test_keys_shared_by_the_batch(device):
    q, k, v = (x.detach() for x in drawn(3, 5, 2, 10, 16, SINGLE, device))
    shared = [x[:1].expand(3, -1, -1, -1) for x in (k, v)]
    for actual, right in zip(
        attention_with_maps(q, *shared, backend="triton"),
        attention_with_maps(q, *(x.contiguous() for x in shared), backend="triton"),
        strict=True,
    ):
        assert torch.equal(actual, right)


def test_single_precision_maps_of_half_inputs(device, assert_close):
    q, k, v = drawn(1, 20, 2, 77, 40, HALF, device)
    maps = attention_with_maps(q, k, v, dtype=SINGLE, backend="triton")[1]
    assert maps.dtype == SINGLE
    assert_close(maps, explicit(*doubled((q, k, v)))[1], 2e-6)


def test_scores_beyond_float16(device):
    q = torch.full((1, 3, 1, 64), 100.0, dtype=HALF, device=device)
    k = torch.stack([torch.full((1, 64), 90.0), torch.full((1, 64), 80.0)])[None].to(device, HALF)
    out, maps = attention_with_maps(q, k, k, backend="triton")
    assert torch.equal(maps, torch.tensor([1.0, 0.0], dtype=HALF, device=device).expand(1, 1, 3, 2))
    assert torch.equal(out, k[:, :1].expand_as(q))


@pytest.mark.parametrize("head_mean", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tokens(backend, head_mean, device):
    q, k, v = drawn(1, 20, 2, 77, 16, SINGLE, device)
    every = attention_with_maps(q, k, v, head_mean=head_mean, backend=backend)[1]
    for tokens in (ODD_TOKENS, range(76, -1, -1)):
        for given in (tokens, torch.tensor(tokens, device=device), torch.tensor(tokens, device=device).int()):
            maps = attention_with_maps(q, k, v, head_mean=head_mean, tokens=given, backend=backend)[1]
            assert torch.equal(maps, torch.stack([every[..., token] for token in tokens], -1))


def test_tokens_out_of_range_stay_in_bounds(device):
    arguments = drawn(1, 20, 1, 10, 16, SINGLE, device)
    every = attention_with_maps(*arguments, backend="triton")[1]
    tokens = torch.tensor([4, 1000, -3, 10, 7], device=device)
    maps = attention_with_maps(*arguments, tokens=tokens, backend="triton")[1]
    assert torch.equal(maps[..., [0, 4]], every[..., [4, 7]])
    chosen, right = maps[..., [0, 4]].square().sum(), every[..., [4, 7]].square().sum()
    for actual, expected in zip(*(torch.autograd.grad(x, arguments[:2]) for x in (chosen, right)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_short_attention(device):
    arguments = drawn(1, 20, 2, 77, 40, HALF, device)
    out, upstream = short_attention(*arguments), torch.randn(1, 20, 2, 40, device=device).half()
    right = attention_with_maps(*arguments, backend="triton")[0]
    assert torch.equal(out, right)
    gradients = (torch.autograd.grad(x, arguments, upstream) for x in (out, right))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# The reference and the choice of it.


@pytest.mark.parametrize("head_mean", [False, True])
def test_reference(head_mean, device, assert_close):
    arguments = doubled(drawn(2, 3, 2, 5, 4, SINGLE, device))
    tokens = torch.tensor([4, 1], device=device)
    results = attention_with_maps_reference(*arguments, head_mean=head_mean, tokens=tokens)
    for actual, expected in zip(results, explicit(*arguments, head_mean=head_mean, tokens=[4, 1]), strict=True):
        assert_close(actual, expected, 1e-12)
    assert torch.autograd.gradcheck(
        lambda *qkv: attention_with_maps(*qkv, head_mean=head_mean, tokens=[4, 1]), arguments
    )


def test_reference_serves_what_the_kernel_cannot(device):
    for heads, keys, width, dtype in ((1, 257, 8, SINGLE), (1, 3, 257, SINGLE), (1, 3, 8, torch.float64)):
        q, k, v = drawn(1, 4, heads, keys, width, dtype, device)
        out, maps = attention_with_maps(q, k, v)
        assert out.dtype == maps.dtype == dtype and maps.shape == (1, heads, 4, keys)


def bad(argument, value, message):
    return pytest.param(argument, value, message, id=f"{argument}: {message}")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        bad("q", torch.zeros(2, 3, 4), r"q must be \[B, N, H, D\]"),
        bad("k", torch.zeros(1, 7, 2, 9), r"k must be \[1, 'M', 2, 8\]|k must be \[1, 7, 2, 8\]"),
        bad("v", torch.zeros(1, 6, 2, 8), r"v must be \[1, 7, 2, 8\]"),
        bad("v", torch.zeros(1, 7, 2, 8).half(), "they must agree"),
        bad("dtype", torch.int32, "dtype must be a float dtype, not torch.int32"),
        bad("dtype", torch.float64, "maps in torch.float64 are not supported"),
        bad("backend", "cuda", "backend must be"),
        bad("tokens", [], "at least one, not"),
        bad("tokens", [1, 7], r"distinct integers from 0 to 6, at least one, not \[1, 7\]"),
        bad("tokens", [-1], "distinct integers from 0 to 6"),
        bad("tokens", [3, 3], "distinct integers from 0 to 6"),
        bad("tokens", [1.0], "distinct integers from 0 to 6"),
        bad("tokens", torch.tensor([[1]]), r"1 to 7 integers \(int32 or int64\), not torch.int64 \[1, 1\]"),
        bad("tokens", torch.tensor([1.0]), "not torch.float32"),
        bad("tokens", torch.arange(8), r"not torch.int64 \[8\]"),
        bad("tokens", torch.zeros(1, dtype=torch.int64, device="meta"), "tokens is on meta, but q is on"),
    ],
)
def test_bad_arguments(argument, value, message, device):
    arguments = {"q": torch.zeros(1, 3, 2, 8), "k": torch.zeros(1, 7, 2, 8), "v": torch.zeros(1, 7, 2, 8)}
    arguments = {"backend": "triton"} | arguments | {argument: value}
    arguments = {
        name: x.to(device) if isinstance(x, torch.Tensor) and x.device.type != "meta" else x
        for name, x in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        attention_with_maps(**arguments)


@pytest.mark.parametrize(
    ("keys", "width", "dtype", "message"),
    [
        (257, 8, SINGLE, "257 keys: up to 256 are supported"),
        (3, 257, SINGLE, "head size 257: up to 256 are supported"),
        (3, 8, torch.float64, "torch.float64 is not supported|maps in torch.float64"),
    ],
)
def test_unsupported(keys, width, dtype, message, device):
    with pytest.raises(ValueError, match=message):
        attention_with_maps(*drawn(1, 2, 1, keys, width, dtype, device), backend="triton")


# As operators.


@pytest.mark.parametrize("maps", ["heads", "mean", "none"])
def test_operators(maps, device):
    q, k, v = drawn(1, 5, 2, 7, 8, SINGLE, device)
    tokens = None if maps == "none" else torch.tensor([3, 1], device=device)
    torch.library.opcheck(cross_attention._cross_attention, (q, k, v, tokens, maps, SINGLE))
    inputs = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(cross_attention._cross_attention, (*inputs, tokens, maps, HALF))
    dmaps = {"heads": torch.randn(1, 2, 5, 2), "mean": torch.randn(1, 5, 2), "none": None}[maps]
    dmaps, dout = None if dmaps is None else dmaps.to(device), torch.randn_like(q) if maps != "mean" else None
    torch.library.opcheck(cross_attention._query_gradient, (*inputs, dout, dmaps, tokens))
    torch.library.opcheck(cross_attention._key_gradient, (*inputs, dout, dmaps, tokens, False))
    if dout is not None:
        torch.library.opcheck(cross_attention._key_gradient, (*inputs, dout, None, None, True))


def guided(q, k, v):
    out, maps = attention_with_maps(q * 2, k, v, head_mean=True, tokens=[3, 1], dtype=SINGLE, backend="triton")
    return out.square().sum() + maps.square().sum() + short_attention(q, k, v).sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gpu)])
def test_compiled(backend, device):
    arguments = drawn(1, 5, 2, 7, 16, SINGLE, device)
    compiled = torch.compile(guided, backend=backend, fullgraph=True)
    loss, right = compiled(*arguments), guided(*arguments)
    torch.testing.assert_close(loss, right)
    for actual, expected in zip(*(torch.autograd.grad(x, arguments) for x in (loss, right)), strict=True):
        torch.testing.assert_close(actual, expected)


# On the GPU alone.


@needs_gpu
def test_cuda_graph(device):
    arguments = drawn(2, 256, 8, 77, 40, HALF, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(guided(*arguments), arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = guided(*arguments)
        gradients = torch.autograd.grad(loss, arguments)
    with torch.no_grad():
        for x in arguments:
            x.copy_(torch.randn_like(x))
    graph.replay()
    right = guided(*arguments)
    assert torch.equal(loss, right)
    for actual, expected in zip(gradients, torch.autograd.grad(right, arguments), strict=True):
        assert torch.equal(actual, expected)


@needs_gpu
@pytest.mark.parametrize("head_mean", [False, True])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_stable_diffusion_shapes(shape, head_mean, device):
    batch, heads, queries, width = shape
    compare(drawn(batch, queries, heads, 77, width, HALF, device), None, head_mean, None)


@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("head_mean", [False, True])
@pytest.mark.parametrize("keys", [1, 16, 77, 78, 129, 144, 160, 256])
@pytest.mark.parametrize("width", [8, 24, 40, 64, 80, 120, 160, 200, 256])
def test_all_head_sizes_and_key_counts(keys, width, head_mean, dtype, device):
    compare(drawn(1, 300, 2, keys, width, dtype, device), None, head_mean, None)
