"""Map guidance against float64, forward and backward; without a GPU in the interpreter of Triton."""

import pytest
import torch

from p2pz.kernels import map_guidance, tiles
from p2pz.kernels.cross_attention import attention_probabilities
from p2pz.kernels.map_guidance import guided_attention, guided_attention_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
all_dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)

# positions, keys, heads, head size: tile edges, one position, one key, every row of the tile table
SHAPES = [
    (1, 77, 2, 40),
    (63, 16, 1, 64),
    (64, 1, 1, 80),
    (77, 78, 1, 160),
    (40, 256, 1, 256),
    (33, 128, 2, 24),
    (20, 200, 1, 100),
]
GPU_SHAPES = [  # batch, positions, heads, head size: Stable Diffusion 1.5, 2.1 and both at 768 x 768
    (2, 4096, 8, 40), (2, 1024, 8, 80), (2, 256, 8, 160), (2, 64, 8, 160),
    (2, 4096, 5, 64), (2, 1024, 10, 64), (2, 256, 20, 64), (2, 64, 20, 64),
    (1, 9216, 5, 64), (1, 2304, 10, 64), (2, 576, 20, 64), (3, 144, 20, 64), (2, 9216, 8, 40), (3, 1000, 8, 160),
]  # fmt: skip


def drawn(batch, positions, keys, heads, width, dtype, device):
    """q, k, v and a reference not far from q and k; the queries are long enough for peaked maps."""
    q = 2 * torch.randn(batch, positions, heads, width, device=device)
    k, v = torch.randn(2, batch, keys, heads, width, device=device)
    arguments = q, k, v, q + 0.5 * torch.randn_like(q), k + 0.2 * torch.randn_like(k)
    return [x.to(dtype) for x in arguments]


def results(function, arguments, dout, dloss, **weights):
    """Output, loss and the gradient of q; either upstream gradient may be None."""
    q = arguments[0].detach().requires_grad_()
    out, loss = function(q, *arguments[1:], **weights)
    pairs = [(x, dx) for x, dx in ((out, dout), (loss, dloss)) if dx is not None]
    (dq,) = torch.autograd.grad([x for x, _ in pairs], q, [dx for _, dx in pairs])
    return out, loss, dq


def with_triton(*arguments, **weights):
    return guided_attention(*arguments, **weights, backend="triton")


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check(arguments, dout, dloss, **weights):
    """Every result is as near to float64 as the bounds ask, and at most twice as far as plain torch in that dtype."""
    q = arguments[0]
    exact = results(
        guided_attention_reference,
        [x.double() for x in arguments],
        None if dout is None else dout.double(),
        None if dloss is None else dloss.double(),
        **{name: x.double() for name, x in weights.items()},
    )
    ours = results(with_triton, arguments, dout, dloss, **weights)
    plain = results(guided_attention_reference, arguments, dout, dloss, **weights)
    assert ours[0].dtype == ours[2].dtype == q.dtype and ours[1].dtype == torch.float32
    for name, actual, expected, rival in zip(("out", "loss", "dq"), ours, exact, plain, strict=True):
        assert actual.shape == expected.shape and torch.isfinite(actual).all()
        if arguments[1].shape[1] == 1 and name != "out":  # one key: every map is one
            assert actual.abs().max() < (1e-9 if name == "loss" else 1e-4)
            continue
        bound = 1e-5 if name == "loss" else BOUNDS[q.dtype]
        assert error(actual, expected) <= bound, name
        if q.dtype != torch.bfloat16 or q.is_cuda:  # the interpreter cuts bfloat16 off instead of rounding
            slack = 1e-6 if bound == 1e-5 else 1e-4
            assert error(actual, expected) <= 2 * error(rival, expected) + slack, name


def upstream(q):
    """Gradients of output and loss that weigh about the same."""
    return torch.randn_like(q), 20 * torch.randn(len(q), device=q.device)


# The results.


@pytest.mark.parametrize(
    ("dtype", "programs"), [(torch.float32, 1), (torch.float16, 1), (torch.float16, 256), (torch.bfloat16, 1)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, programs, device, monkeypatch):
    """With the largest blocks of queries, and with the small ones that few queries get."""
    monkeypatch.setattr(tiles, "BUSY", programs)
    arguments = drawn(1, *shape, dtype, device)
    check(arguments, *upstream(arguments[0]))


def test_thousand_positions(device, monkeypatch):
    monkeypatch.setattr(tiles, "BUSY", 1)
    arguments = drawn(1, 1000, 77, 1, 40, torch.float16, device)
    check(arguments, *upstream(arguments[0]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about the NaN below
@pytest.mark.parametrize(("from_out", "from_loss"), [(True, True), (True, False), (False, True)])
@all_dtypes
def test_upstream_gradients(from_out, from_loss, dtype, device):
    """Of both results or of one; what does not matter then is not read."""
    arguments = drawn(2, 20, 77, 2, 40, dtype, device)
    dout, dloss = upstream(arguments[0])
    check(arguments, dout if from_out else None, dloss if from_loss else None)
    q, k, v, q_reference, k_reference = arguments
    nothing = torch.full_like(k, float("nan"))
    if not from_out:
        _, _, dq = results(with_triton, (q, k, nothing, q_reference, k_reference), None, dloss)
        assert torch.isfinite(dq).all()
    if not from_loss:
        _, _, dq = results(with_triton, (q, k, v, torch.full_like(q, float("nan")), nothing), dout, None)
        assert torch.isfinite(dq).all()


def test_batch_of_three_from_a_fused_projection(device):
    """Slices of one tensor are read in place, and the loss may be summed: its gradient then has stride 0."""
    q, k, v = torch.randn(3, 40, 3, 2, 40, device=device, dtype=torch.float16).unbind(2)
    q_reference, k_reference = torch.randn(3, 40, 2, 2, 40, device=device, dtype=torch.float16).unbind(2)
    assert not q.is_contiguous()
    dloss = torch.ones((), device=device).expand(3)
    check([q, k, v, q_reference, k_reference], torch.randn(3, 40, 2, 40, device=device).half(), dloss)


def test_any_strides(device):
    """Transposed heads, an upstream gradient that is expanded, and a last axis that is not contiguous."""
    q, k, v, q_reference, k_reference = (torch.randn(2, 2, 35, 24, device=device).transpose(1, 2) for _ in range(5))
    v, q_reference = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (v, q_reference))
    assert v.stride(3) != 1
    dloss = torch.randn(2, 3, device=device)[:, 1]
    check([q, k, v, q_reference, k_reference], torch.randn(24, device=device).expand(2, 35, 2, 24), dloss)


def test_scores_beyond_float16(device):
    """Scores of +-80000: the nearer key takes all, and the maps differ fully."""
    q = torch.full((1, 16, 1, 64), 100.0, dtype=torch.float16, device=device)
    k = torch.stack([q[0, 0], -q[0, 0]])[None]
    v = torch.randn(1, 2, 1, 64, device=device).half()
    out, loss = with_triton(q, k, v, -q, k)
    assert torch.equal(out, v[:, :1].expand(1, 16, 1, 64)) and loss.item() == pytest.approx(32)


def test_images_of_a_batch_do_not_mix(device, assert_close):
    arguments = drawn(3, 20, 77, 2, 40, torch.float32, device)
    dout, dloss = upstream(arguments[0])
    together = results(with_triton, arguments, dout, dloss)
    for i in range(3):
        alone = results(with_triton, [x[i : i + 1] for x in arguments], dout[i : i + 1], dloss[i : i + 1])
        for one, all_three in zip(alone, together, strict=True):
            assert_close(all_three[i : i + 1], one, 1e-6)


@all_dtypes
def test_no_distance_from_itself(dtype, device):
    q, k, v, *_ = drawn(2, 20, 77, 2, 40, dtype, device)
    _, loss, dq = results(with_triton, (q, k, v, q.clone(), k.clone()), None, torch.ones(2, device=device))
    assert loss.max() < 1e-9 and dq.abs().max() < 1e-6


@pytest.mark.parametrize("slope", [1.0, 1e-4])
def test_small_gradients_of_the_loss_in_float16(slope, device):
    """Gradients of the scores of 1e-5 and less, most of them below float16's range: long keys bring dq back into it."""
    q, k, v, q_reference, k_reference = drawn(1, 32, 77, 2, 64, torch.float16, device)
    q, q_reference, k, k_reference = q / 256, q_reference / 256, k * 256, k_reference * 256
    arguments = q, k, v, q_reference, k_reference
    check(arguments, None, torch.tensor([slope], device=device))

    # what a plain cast would give
    p, r = (attention_probabilities(a.double(), b.double()) for a, b in ((q, k), (q_reference, k_reference)))
    dp = slope * (p - r)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    exact, cast = (torch.einsum("bhnm,bmhd->bnhd", x.double(), k.double()) / 8 for x in (ds, ds.half()))
    assert error(cast, exact) > (0.02 if slope < 1 else 1e-5)


def test_equal_runs_give_equal_bits(device):
    arguments = drawn(2, 40, 77, 1, 40, torch.float16, device)
    dout, dloss = upstream(arguments[0])
    first, second = (results(with_triton, arguments, dout, dloss) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Weights of the tokens.


def drawn_weights(arguments, batched=False, dtype=torch.float32):
    """Some of them zero; `batched`: for each image its own."""
    batch, keys = arguments[1].shape[:2]
    weights = 3 * torch.rand(*[batch] * batched, keys) * (torch.rand(keys) > 0.2)
    weights[..., 0] = 2.0  # one key: not nothing
    return weights.to(arguments[0].device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_against_float64(shape, dtype, device):
    arguments = drawn(1, *shape, dtype, device)
    check(arguments, *upstream(arguments[0]), weights=drawn_weights(arguments))


@pytest.mark.parametrize(("from_out", "from_loss"), [(True, True), (True, False), (False, True)])
@all_dtypes
def test_weights_of_a_batch(from_out, from_loss, dtype, device):
    arguments = drawn(3, 20, 77, 2, 40, dtype, device)
    dout, dloss = upstream(arguments[0])
    upstreams = dout if from_out else None, dloss if from_loss else None
    check(arguments, *upstreams, weights=drawn_weights(arguments, batched=True))
    if not from_loss:  # the weights then do not matter
        _, _, dq = results(with_triton, arguments, *upstreams, weights=torch.full((77,), float("nan"), device=device))
        assert torch.isfinite(dq).all()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_the_weights(dtype, batched, device):
    arguments = drawn(2, 20, 35, 2, 40, torch.float16, device)
    check(arguments, *upstream(arguments[0]), weights=drawn_weights(arguments, batched, dtype))


@pytest.mark.parametrize("strides", ["one number", "one row", "transposed", "every second"])
def test_strides_of_the_weights(strides, device):
    arguments = drawn(2, 20, 35, 2, 24, torch.float32, device)
    weights = {
        "one number": torch.rand((), device=device).expand(35),
        "one row": torch.rand(1, 35, device=device).expand(2, 35),
        "transposed": torch.rand(35, 2, device=device).mT,
        "every second": torch.rand(4, 70, device=device)[::2, 1::2],
    }[strides]
    check(arguments, *upstream(arguments[0]), weights=weights)


def test_weights_of_images_do_not_mix(device, assert_close):
    arguments = drawn(3, 20, 77, 2, 40, torch.float32, device)
    weights, (dout, dloss) = drawn_weights(arguments, batched=True), upstream(arguments[0])
    together = results(with_triton, arguments, dout, dloss, weights=weights)
    for i in range(3):
        one = [x[i : i + 1] for x in arguments]
        alone = results(with_triton, one, dout[i : i + 1], dloss[i : i + 1], weights=weights[i])
        for single, all_three in zip(alone, together, strict=True):
            assert_close(all_three[i : i + 1], single, 1e-6)


def test_weights_of_one_are_no_weights(device, assert_close):
    arguments = drawn(2, 20, 77, 2, 40, torch.float32, device)
    dout, dloss = upstream(arguments[0])
    plain = results(with_triton, arguments, dout, dloss)
    ones = results(with_triton, arguments, dout, dloss, weights=torch.ones(77, device=device))
    for one, expected in zip(ones, plain, strict=True):
        assert_close(one, expected, 1e-6)


def test_weights_of_zero_leave_the_output_alone(device):
    arguments = drawn(2, 20, 77, 2, 40, torch.float16, device)
    zeros = torch.zeros(2, 77, device=device)
    out, loss, dq = results(with_triton, arguments, None, torch.ones(2, device=device), weights=zeros)
    assert torch.equal(out, with_triton(*arguments)[0]) and not loss.any() and not dq.any()


def test_equal_runs_with_weights_give_equal_bits(device):
    arguments = drawn(2, 40, 77, 1, 40, torch.float16, device)
    weights, (dout, dloss) = drawn_weights(arguments, batched=True), upstream(arguments[0])
    first, second = (results(with_triton, arguments, dout, dloss, weights=weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("batched", [False, True])
def test_weighted_reference_by_hand(batched):
    q, k, _, q_reference, k_reference = arguments = drawn(2, 3, 4, 2, 5, torch.float64, "cpu")
    weights = drawn_weights(arguments, batched, torch.float64)
    out, loss = guided_attention(*arguments, weights=weights, backend="torch")
    for b in range(2):
        total = 0.0
        for h in range(2):
            for n in range(3):
                own, reference = (
                    (x[b, :, h] @ y[b, n, h] / 5**0.5).softmax(0) for x, y in ((k, q), (k_reference, q_reference))
                )
                for m in range(4):
                    total += float(weights[b, m] if batched else weights[m]) * float(own[m] - reference[m]) ** 2 / 2
        assert loss[b].item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(out, guided_attention_reference(*arguments)[0])


@pytest.mark.parametrize("batched", [False, True])
def test_weighted_reference_by_finite_differences(batched):
    q, *constants = arguments = drawn(2, 3, 4, 2, 4, torch.float64, "cpu")
    weights = drawn_weights(arguments, batched, torch.float64)
    assert torch.autograd.gradcheck(
        lambda q: guided_attention_reference(q, *constants, weights=weights), q.requires_grad_()
    )


# The reference.


def test_reference_by_finite_differences():
    q, *constants = drawn(2, 3, 4, 2, 4, torch.float64, "cpu")
    assert torch.autograd.gradcheck(lambda q: guided_attention_reference(q, *constants), q.requires_grad_())


def test_reference_by_hand():
    q, k, v, q_reference, k_reference = drawn(2, 3, 4, 2, 5, torch.float64, "cpu")
    out, loss = guided_attention(q, k, v, q_reference, k_reference, backend="torch")
    for b in range(2):
        total = 0.0
        for h in range(2):
            for n in range(3):
                own, reference = (
                    (x[b, :, h] @ y[b, n, h] / 5**0.5).softmax(0) for x, y in ((k, q), (k_reference, q_reference))
                )
                total += float((own - reference).square().sum()) / 2
                torch.testing.assert_close(out[b, n, h], own @ v[b, :, h])
        assert loss[b].item() == pytest.approx(total, rel=1e-12)


# Memory, autograd and compilation.


def test_only_the_arguments_are_saved(device):
    arguments = drawn(1, 20, 77, 2, 40, torch.float32, device)
    arguments[0].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with_triton(*arguments)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in arguments}


def test_library_ops(device):
    q, *constants = drawn(1, 20, 33, 2, 24, torch.float32, device)
    dout, dloss = upstream(q)
    for wanted in (False, True):
        torch.library.opcheck(map_guidance.guided_attention_op, (q.detach().requires_grad_(wanted), *constants))
    for gradients in ((dout, dloss), (None, dloss), (dout, None)):
        torch.library.opcheck(map_guidance.guided_attention_backward_op, (q, *constants, *gradients))


@pytest.mark.parametrize("batched", [False, True])
def test_library_ops_with_weights(batched, device):
    q, *constants = arguments = drawn(2, 20, 33, 2, 24, torch.float32, device)
    weights, (dout, dloss) = drawn_weights(arguments, batched), upstream(q)
    torch.library.opcheck(map_guidance.guided_attention_op, (q.detach().requires_grad_(), *constants, weights))
    torch.library.opcheck(map_guidance.guided_attention_backward_op, (q, *constants, dout, dloss, weights))


def compiled(backend):
    return torch.compile(with_triton, backend=backend, fullgraph=True)


def test_compiled_without_breaks(device, assert_close):
    arguments = drawn(2, 20, 77, 2, 40, torch.float32, device)
    dout, dloss = upstream(arguments[0])
    expected = results(with_triton, arguments, dout, dloss)
    for actual, wanted in zip(results(compiled("aot_eager"), arguments, dout, dloss), expected, strict=True):
        assert_close(actual, wanted, 1e-6)


def test_compiled_with_weights(device, assert_close):
    arguments = drawn(2, 20, 77, 2, 40, torch.float32, device)
    weights, (dout, dloss) = drawn_weights(arguments, batched=True), upstream(arguments[0])
    expected = results(with_triton, arguments, dout, dloss, weights=weights)
    actual = results(compiled("aot_eager"), arguments, dout, dloss, weights=weights)
    for one, wanted in zip(actual, expected, strict=True):
        assert_close(one, wanted, 1e-6)


@needs_gpu
def test_compiled_by_inductor_with_weights(device, assert_close):
    arguments = drawn(2, 256, 77, 8, 40, torch.float16, device)
    weights, (dout, dloss) = drawn_weights(arguments), upstream(arguments[0])
    expected = results(with_triton, arguments, dout, dloss, weights=weights)
    actual = results(compiled("inductor"), arguments, dout, dloss, weights=weights)
    for one, wanted in zip(actual, expected, strict=True):
        assert_close(one, wanted, 1e-3)


@needs_gpu
def test_compiled_by_inductor(device, assert_close):
    arguments = drawn(2, 256, 77, 8, 40, torch.float16, device)
    dout, dloss = upstream(arguments[0])
    expected = results(with_triton, arguments, dout, dloss)
    for actual, wanted in zip(results(compiled("inductor"), arguments, dout, dloss), expected, strict=True):
        assert_close(actual, wanted, 1e-3)


@needs_gpu
def test_cuda_graph(device):
    """Captured, replayed on other numbers, and without a synchronisation."""
    arguments = drawn(2, 256, 77, 8, 40, torch.float16, device)
    gradients = upstream(arguments[0])
    results(with_triton, arguments, *gradients)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = results(with_triton, arguments, *gradients)
    for old, new in zip(arguments, drawn(2, 256, 77, 8, 40, torch.float16, device), strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = results(with_triton, arguments, *gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for actual, wanted in zip(captured, expected, strict=True):
        assert torch.equal(actual, wanted)


@needs_gpu
def test_cuda_graph_with_weights(device):
    """Captured, and replayed with other weights."""
    arguments = drawn(2, 256, 77, 8, 40, torch.float16, device)
    weights, gradients = drawn_weights(arguments, batched=True), upstream(arguments[0])
    results(with_triton, arguments, *gradients, weights=weights)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = results(with_triton, arguments, *gradients, weights=weights)
    weights.copy_(torch.rand(2, 77))
    graph.replay()
    for actual, wanted in zip(captured, results(with_triton, arguments, *gradients, weights=weights), strict=True):
        assert torch.equal(actual, wanted)


@needs_gpu
@all_dtypes
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_weights_at_shapes_of_stable_diffusion(shape, dtype, device):
    batch, positions, heads, width = shape
    arguments = drawn(batch, positions, 77, heads, width, dtype, device)
    check(arguments, *upstream(arguments[0]), weights=drawn_weights(arguments, batched=True))


@needs_gpu
@all_dtypes
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_shapes_of_stable_diffusion(shape, dtype, device):
    batch, positions, heads, width = shape
    arguments = drawn(batch, positions, 77, heads, width, dtype, device)
    check(arguments, *upstream(arguments[0]))


@needs_gpu
@pytest.mark.parametrize("keys", [77, 256])
def test_nothing_of_the_size_of_the_maps_is_stored(keys, device):
    """Beyond the two results and the gradient there is room for a hundredth of a float16 map."""
    batch, positions, heads, width = 2, 4096, 8, 40
    arguments = drawn(batch, positions, keys, heads, width, torch.float16, device)
    gradients = upstream(arguments[0])
    results(with_triton, arguments, *gradients)
    torch.cuda.reset_peak_memory_stats()
    # what was asked for: the allocator may give a MiB more, as the blocks happen to lie
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    kept = results(with_triton, arguments, *gradients)
    grown = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - sum(x.nbytes for x in kept)
    assert grown < 0.01 * batch * positions * keys * heads * 2


# Arguments.


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("name", ["k", "v", "q_reference", "k_reference"])
def test_constants_that_require_a_gradient(name, backend):
    names = ("q", "k", "v", "q_reference", "k_reference")
    arguments = dict(zip(names, drawn(1, 4, 5, 1, 16, torch.float32, "cpu"), strict=True))
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient.*detach"):
        guided_attention(**arguments, backend=backend)
    with torch.no_grad():
        guided_attention(**arguments)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(1, 4, 16), r"q must be \[B, N, H, D\]"),
        (0, torch.zeros(1, 0, 1, 16), "no empty axis"),
        (1, torch.zeros(2, 5, 1, 16), "k must be"),
        (2, torch.zeros(1, 6, 1, 16), "v must be"),
        (3, torch.zeros(1, 5, 1, 16), "q_reference must be"),
        (4, torch.zeros(1, 6, 1, 16), "k_reference must be"),
        (4, torch.zeros(1, 5, 1, 16, dtype=torch.float16), "k_reference is torch.float16"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    arguments = drawn(1, 4, 5, 1, 16, torch.float32, "cpu")
    arguments[index] = wrong
    with pytest.raises(ValueError, match=message):
        guided_attention(*arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(6), r"weights must be \[5\] or \[3, 5\], not \[6\]"),
        (torch.zeros(1, 5), r"not \[1, 5\]"),
        (torch.zeros(3, 5, 1), "weights must be"),
        (torch.zeros(()), "weights must be"),
        (torch.ones(5, dtype=torch.int64), "weights must be a float tensor"),
        (torch.ones(5, dtype=torch.bool), "weights must be a float tensor"),
        (torch.zeros(5, device="meta"), "weights must be a float tensor on"),
        (torch.zeros(3, 5, requires_grad=True), "weights requires a gradient.*detach"),
    ],
)
def test_wrong_weights(weights, message, backend, device):
    if weights.device.type == "cpu":
        weights = weights.to(device).detach().requires_grad_(weights.requires_grad)
    arguments = drawn(3, 4, 5, 1, 16, torch.float32, device)
    with pytest.raises(ValueError, match=message):
        guided_attention(*arguments, weights=weights, backend=backend)


def test_weights_beyond_the_kernel(device):
    arguments = drawn(1, 4, 257, 1, 16, torch.float32, device)
    weights = drawn_weights(arguments)
    with pytest.raises(ValueError, match="257 keys"):
        with_triton(*arguments, weights=weights)
    expected = guided_attention_reference(*arguments, weights)
    for actual, wanted in zip(guided_attention(*arguments, weights=weights), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize(("keys", "width", "message"), [(257, 16, "257 keys"), (5, 512, "head size 512")])
def test_beyond_the_kernel(keys, width, message, device):
    """An error if the kernel is insisted on, else the reference."""
    arguments = drawn(1, 4, keys, 1, width, torch.float32, device)
    with pytest.raises(ValueError, match=message):
        with_triton(*arguments)
    for actual, expected in zip(guided_attention(*arguments), guided_attention_reference(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        guided_attention(*drawn(1, 4, 5, 1, 16, torch.float32, "cpu"), backend="cuda")
