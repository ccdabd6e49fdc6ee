"""Map editing against float64, forward and backward; without a GPU in the interpreter of Triton."""

import pytest
import torch

from p2pz.kernels import map_editing, tiles
from p2pz.kernels.map_editing import edited_attention, edited_attention_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
all_dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
FACTORS = ("mapping", "mix", "weights")
CHOICES = [(), ("mapping",), ("mix",), ("weights",), ("mapping", "weights"), FACTORS]
all_choices = pytest.mark.parametrize("chosen", CHOICES, ids=lambda names: "+".join(names) or "replace")

# positions, keys, keys of the reference, heads, head size: tile edges, one position, one key, rows of the tile table
SHAPES = [
    (1, 77, 77, 2, 40),
    (63, 16, 77, 1, 64),
    (64, 1, 1, 1, 80),
    (77, 78, 16, 1, 160),
    (20, 120, 77, 1, 256),
    (33, 77, 128, 1, 24),
    (20, 256, 256, 1, 40),  # too many keys for a mapping
    (20, 200, 200, 1, 160),
    (33, 128, 128, 2, 100),
    (40, 5, 1, 1, 8),
]
GPU_SHAPES = [  # batch, positions, heads, head size: Stable Diffusion 1.5, 2.1 and both at 768 x 768
    (2, 4096, 8, 40), (2, 1024, 8, 80), (2, 256, 8, 160), (2, 64, 8, 160), (2, 4096, 5, 64), (2, 64, 20, 64),
    (1, 9216, 5, 64), (2, 576, 20, 64), (3, 144, 20, 64), (2, 9216, 8, 40), (3, 1000, 8, 160),
]  # fmt: skip


def drawn(batch, positions, keys, reference_keys, heads, width, dtype, device):
    """q, k, v, and q and k of the reference; the queries are long enough for peaked maps."""
    q, q_reference = 2 * torch.randn(2, batch, positions, heads, width, device=device)
    k, v = torch.randn(2, batch, keys, heads, width, device=device)
    k_reference = torch.randn(batch, reference_keys, heads, width, device=device)
    return [x.to(dtype) for x in (q, k, v, q_reference, k_reference)]


def factors(names, arguments, batched=False, dtype=torch.float32):
    """Some of mapping, mix and weights; `batched`: for each image its own. A mapping as sparse as those in use."""
    _, k, _, _, k_reference = arguments
    keys, reference_keys = k.shape[1], k_reference.shape[1]
    images = [len(k)] if batched else []
    drawn = {
        "mapping": torch.rand(*images, reference_keys, keys) * (torch.rand(*images, reference_keys, keys) < 0.1)
        + torch.eye(reference_keys, keys),
        "mix": torch.rand(*images, keys),
        "weights": 3 * torch.rand(*images, keys) - 1,
    }
    needed = {*names, "mapping"} if keys != reference_keys else names
    return {name: drawn[name].to(k.device, dtype) for name in FACTORS if name in needed}


def results(function, arguments, factors, dout):
    """Output and five gradients, None where an argument has no part."""
    arguments = [x.detach().requires_grad_() for x in arguments]
    out = function(*arguments, **factors)
    return out, *torch.autograd.grad(out, arguments, dout, allow_unused=True)


def with_triton(*arguments, **factors):
    return edited_attention(*arguments, **factors, backend="triton")


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check(arguments, factors, dout=None):
    """Every result is as near to float64 as the bounds ask, and at most twice as far as plain torch in that dtype."""
    q = arguments[0]
    dout = torch.randn_like(q) if dout is None else dout
    exact = results(
        edited_attention_reference,
        [x.double() for x in arguments],
        {name: factor.double() for name, factor in factors.items()},
        dout.double(),
    )
    ours = results(with_triton, arguments, factors, dout)
    plain = results(edited_attention_reference, arguments, factors, dout)
    slack = 1e-6 if q.dtype == torch.float32 else 1e-4
    for index, (actual, expected, rival) in enumerate(zip(ours, exact, plain, strict=True)):
        if expected is None:
            assert actual is None
            continue
        assert actual.dtype == q.dtype and actual.shape == expected.shape and torch.isfinite(actual).all()
        if expected.norm() < 1e-6 * exact[0].norm():  # one key: the maps do not depend on q and k
            assert actual.double().norm() < 1e-2 * exact[0].norm()
            continue
        if q.dtype == torch.bfloat16 and not q.is_cuda:  # the interpreter cuts off instead of rounding, four times here
            assert error(actual, expected) <= 2 * BOUNDS[q.dtype], index
            continue
        assert error(actual, expected) <= BOUNDS[q.dtype], index
        assert error(actual, expected) <= 2 * error(rival, expected) + slack, index


# The results.


@pytest.mark.parametrize(
    ("dtype", "programs"), [(torch.float32, 1), (torch.float16, 1), (torch.float16, 256), (torch.bfloat16, 1)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, programs, device, monkeypatch):
    """With the largest blocks of queries, and with the small ones that few queries get."""
    monkeypatch.setattr(tiles, "BUSY", programs)
    arguments = drawn(1, *shape, dtype, device)
    check(arguments, factors(FACTORS if max(shape[1:3]) <= 128 else FACTORS[1:], arguments))


@all_choices
@pytest.mark.parametrize("batched", [False, True])
def test_factors(chosen, batched, device):
    arguments = drawn(3, 20, 77, 77, 2, 40, torch.float32, device)
    check(arguments, factors(chosen, arguments, batched))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_the_factors(dtype, device):
    arguments = drawn(2, 20, 77, 35, 2, 40, torch.float16, device)
    check(arguments, factors(FACTORS, arguments, True, dtype))


def test_thousand_positions(device, monkeypatch):
    monkeypatch.setattr(tiles, "BUSY", 1)
    arguments = drawn(1, 1000, 77, 77, 1, 40, torch.float16, device)
    check(arguments, factors(FACTORS, arguments))


def test_batch_of_three_from_a_fused_projection(device):
    """Slices of one tensor are read in place."""
    q, k, v = torch.randn(3, 40, 3, 2, 40, device=device, dtype=torch.float16).unbind(2)
    q_reference, k_reference = torch.randn(3, 40, 2, 2, 40, device=device, dtype=torch.float16).unbind(2)
    assert not q.is_contiguous()
    arguments = [q, k, v, q_reference, k_reference]
    check(arguments, factors(FACTORS, arguments))


def test_any_strides(device):
    """Transposed heads, last axes that are not contiguous, factors that are expanded or transposed."""
    arguments = [torch.randn(2, 2, 35, 24, device=device).transpose(1, 2) for _ in range(5)]
    arguments[2] = arguments[2].transpose(1, 3).contiguous().transpose(1, 3)
    assert arguments[2].stride(3) != 1
    given = {
        "mapping": torch.rand(2, 35, 35, device=device).mT,
        "mix": torch.rand(1, 35, device=device).expand(2, 35),
        "weights": torch.rand(35, 2, device=device).mT,
    }
    check(arguments, given, torch.randn(24, device=device).expand(2, 35, 2, 24))


def test_images_of_a_batch_do_not_mix(device, assert_close):
    arguments = drawn(3, 20, 77, 77, 2, 40, torch.float32, device)
    given = factors(FACTORS, arguments, True)
    together = with_triton(*arguments, **given)
    for i in range(3):
        alone = with_triton(*(x[i : i + 1] for x in arguments), **{n: x[i : i + 1] for n, x in given.items()})
        assert_close(together[i : i + 1], alone, 1e-6)


def test_own_maps_are_not_computed_without_a_mix(device):
    q, k, v, q_reference, k_reference = drawn(1, 20, 77, 77, 2, 40, torch.float32, device)
    nothing = torch.full_like(q, float("nan")), torch.full_like(k, float("nan"))
    out = with_triton(*nothing, v, q_reference, k_reference)
    assert torch.equal(out, with_triton(q, k, v, q_reference, k_reference))


def test_mix_of_zero_is_plain_attention(device, assert_close):
    q, k, v, q_reference, k_reference = drawn(1, 20, 77, 77, 2, 40, torch.float32, device)
    out = with_triton(q, k, v, q_reference, k_reference, mix=torch.zeros(77, device=device))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert_close(out, expected.transpose(1, 2))


# Prompt-to-prompt, by its own definitions, on stored maps.


def maps_of(q, k):
    return (torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / q.shape[3] ** 0.5).softmax(-1)


def prompt_to_prompt(kind, reference, own):
    """Edited maps and the factors that say the same. "a cat on a mat" -> "a tabby cat on a mat", and so on."""
    edited = torch.empty_like(own)
    keys = own.shape[3]
    if kind == "replace":  # word 2 becomes two tokens, which share its map; the tokens after it move up
        for token in range(keys):
            if token in (2, 3):
                edited[..., token] = reference[..., 2] / 2
            else:
                edited[..., token] = reference[..., token if token < 2 else token - 1]
        mapping = torch.zeros(keys, keys)
        for token in range(keys):
            mapping[token if token < 3 else token - 1, token] = 0.5 if token in (2, 3) else 1.0
        return edited, {"mapping": mapping}
    if kind == "refine":  # tokens 1 and 2 are new and keep their own maps; the others take those of their counterparts
        aligned = [token if token < 1 else -1 if token < 3 else token - 2 for token in range(keys)]
        mapping, mix = torch.zeros(keys, keys), torch.zeros(keys)
        for token, counterpart in enumerate(aligned):
            edited[..., token] = own[..., token] if counterpart < 0 else reference[..., counterpart]
            if counterpart >= 0:
                mapping[counterpart, token], mix[token] = 1.0, 1.0
        return edited, {"mapping": mapping, "mix": mix}
    weights = torch.ones(keys)  # re-weight: word 4 is emphasised, word 5 removed
    weights[4], weights[5] = 2.5, 0.0
    edited[...] = reference
    edited[..., 4] *= 2.5
    edited[..., 5] = 0.0
    return edited, {"weights": weights}


@all_dtypes
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["replace", "refine", "re-weight"])
def test_prompt_to_prompt(kind, backend, dtype, device, assert_close):
    q, k, v, q_reference, k_reference = drawn(2, 20, 77, 77, 2, 40, dtype, device)
    edited, given = prompt_to_prompt(kind, maps_of(q_reference, k_reference), maps_of(q, k))
    given = {name: factor.to(device) for name, factor in given.items()}
    out = edited_attention(q, k, v, q_reference, k_reference, **given, backend=backend)
    bound = BOUNDS[dtype] * (2 if dtype == torch.bfloat16 and not out.is_cuda else 1)
    assert_close(out, torch.einsum("bhnm,bmhd->bnhd", edited, v.double()), bound)


# The reference.


@all_choices
def test_reference_by_finite_differences(chosen):
    arguments = drawn(2, 3, 4, 4, 2, 4, torch.float64, "cpu")
    given = factors(chosen, arguments, dtype=torch.float64)
    read = [0, 1, 2, 3, 4] if "mix" in chosen else [2, 3, 4]

    def function(*some):
        every = list(arguments)
        for index, argument in zip(read, some, strict=True):
            every[index] = argument
        return edited_attention_reference(*every, **given)

    assert torch.autograd.gradcheck(function, [arguments[index].requires_grad_() for index in read])


# Autograd and compilation.


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3)], ids=str)
def test_single_gradients(wanted, device, assert_close):
    arguments = drawn(1, 20, 16, 16, 2, 24, torch.float32, device)
    given = factors(FACTORS, arguments)
    dout = torch.randn_like(arguments[0])
    expected = results(edited_attention_reference, arguments, given, dout)[1:]
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(arguments)]
    gradients = torch.autograd.grad(with_triton(*leaves, **given), [leaves[i] for i in wanted], dout)
    for i, gradient in zip(wanted, gradients, strict=True):
        assert_close(gradient, expected[i])


def test_library_op(device):
    arguments = drawn(1, 20, 33, 16, 2, 24, torch.float32, device)
    given = factors(FACTORS, arguments)
    torch.library.opcheck(map_editing.edited_attention_op, (*arguments, *given.values()))
    leaves = [x.detach().requires_grad_() for x in arguments]
    torch.library.opcheck(map_editing.edited_attention_op, (*leaves, *given.values()))
    torch.library.opcheck(map_editing.edited_attention_op, (*leaves[:4], leaves[1], None, None, None))


def compiled(backend):
    return torch.compile(with_triton, backend=backend, fullgraph=True)


def test_compiled_without_breaks(device, assert_close):
    arguments = drawn(2, 20, 77, 77, 2, 40, torch.float32, device)
    given = factors(FACTORS, arguments)
    dout = torch.randn_like(arguments[0])
    expected = results(with_triton, arguments, given, dout)
    for actual, wanted in zip(results(compiled("aot_eager"), arguments, given, dout), expected, strict=True):
        assert_close(actual, wanted)


@needs_gpu
def test_compiled_by_inductor(device, assert_close):
    arguments = drawn(2, 256, 77, 77, 8, 40, torch.float16, device)
    given = factors(FACTORS, arguments)
    dout = torch.randn_like(arguments[0])
    expected = results(with_triton, arguments, given, dout)
    for actual, wanted in zip(results(compiled("inductor"), arguments, given, dout), expected, strict=True):
        assert_close(actual, wanted, 1e-3)


@needs_gpu
def test_cuda_graph(device, assert_close):
    """Captured, replayed on other numbers, and without a synchronisation."""
    arguments = drawn(2, 256, 77, 77, 8, 40, torch.float16, device)
    given = factors(FACTORS, arguments)
    dout = torch.randn_like(arguments[0])
    stream = torch.cuda.Stream()  # cuBLAS wants a first call outside of the capture
    with torch.cuda.stream(stream):
        results(with_triton, arguments, given, dout)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = results(with_triton, arguments, given, dout)
    for old, new in zip(arguments, drawn(2, 256, 77, 77, 8, 40, torch.float16, device), strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = results(with_triton, arguments, given, dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for actual, wanted in zip(captured, expected, strict=True):
        assert_close(actual, wanted, 1e-3)


@needs_gpu
@all_dtypes
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_shapes_of_stable_diffusion(shape, dtype, device):
    batch, positions, heads, width = shape
    arguments = drawn(batch, positions, 77, 77, heads, width, dtype, device)
    check(arguments, factors(FACTORS, arguments))
    check(arguments, {})


@needs_gpu
def test_the_forward_pass_stores_no_maps(device):
    arguments = drawn(2, 4096, 77, 77, 8, 40, torch.float16, device)
    given = factors(FACTORS, arguments)
    with_triton(*arguments, **given)
    torch.cuda.reset_peak_memory_stats()
    # what was asked for: the allocator may give a MiB more, as the blocks happen to lie
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = with_triton(*arguments, **given)
    most = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert most - before - out.nbytes < 0.01 * 2 * 4096 * 77 * 8 * 2


# Arguments.


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(1, 4, 16), r"q must be \[B, N, H, D\]"),
        (1, torch.zeros(2, 5, 1, 16), "k must be"),
        (2, torch.zeros(1, 6, 1, 16), "v must be"),
        (3, torch.zeros(1, 5, 1, 16), "q_reference must be"),
        (4, torch.zeros(1, 5, 2, 16), "k_reference must be"),
        (4, torch.zeros(1, 5, 1, 16, dtype=torch.float16), "k_reference is torch.float16"),
        (4, torch.zeros(1, 6, 1, 16), "mapping must be given: k_reference has 6 tokens, but k has 5"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    arguments = drawn(1, 4, 5, 5, 1, 16, torch.float32, "cpu")
    arguments[index] = wrong
    with pytest.raises(ValueError, match=message):
        edited_attention(*arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("mapping", torch.zeros(5, 6), r"mapping must be \[6, 5\] or \[1, 6, 5\], not \[5, 6\]"),
        ("mapping", torch.zeros(2, 6, 5), "mapping must be"),
        ("mix", torch.zeros(6), r"mix must be \[5\] or \[1, 5\], not \[6\]"),
        ("mix", torch.zeros(5, dtype=torch.int64), "mix must be a float tensor"),
        ("weights", torch.zeros(()), "weights must be"),
        ("weights", torch.zeros(5, device="meta"), "weights must be a float tensor on"),
        ("mapping", torch.zeros(6, 5, requires_grad=True), "mapping requires a gradient.*detach"),
        ("weights", torch.zeros(5, requires_grad=True), "weights requires a gradient.*detach"),
    ],
)
def test_wrong_factors(name, wrong, message, backend, device):
    arguments = drawn(1, 4, 5, 6, 1, 16, torch.float32, device)
    wrong = wrong.to(device).detach().requires_grad_(wrong.requires_grad) if wrong.device.type == "cpu" else wrong
    given = {"mapping": torch.zeros(6, 5, device=device)} | {name: wrong}
    with pytest.raises(ValueError, match=message):
        edited_attention(*arguments, **given, backend=backend)


@pytest.mark.parametrize(
    ("keys", "reference_keys", "width", "message"),
    [(257, 5, 16, "257 keys"), (5, 300, 16, "300 keys"), (5, 5, 512, "head size 512")],
)
def test_beyond_the_kernel(keys, reference_keys, width, message, device):
    """An error if the kernel is insisted on, else the reference."""
    arguments = drawn(1, 4, keys, reference_keys, 1, width, torch.float32, device)
    given = factors(("mapping",), arguments)
    with pytest.raises(ValueError, match=message):
        with_triton(*arguments, **given)
    assert torch.equal(edited_attention(*arguments, **given), edited_attention_reference(*arguments, **given))
