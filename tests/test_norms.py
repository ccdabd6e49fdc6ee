import pytest
import torch
import torch.nn.functional as F

from p2pz.kernels import norms
from p2pz.kernels.norms import group_norm, group_norm_reference, layer_norm, layer_norm_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BOUNDS = {torch.float32: (1e-5, 2e-6), torch.float16: (2e-3, 1e-4), torch.bfloat16: (1e-2, 1e-4)}
all_dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Chunks, groups, rows and warps of a group norm's first launch; rows, columns and warps of its second.
WHOLE = [1, 4, 256, 4, 32, 64, 4]
WHOLE_LOOP = [1, 2, 32, 4, 64, 16, 4]
PARTS = [4, 4, 64, 4, 32, 64, 4]
PARTS_LOOP = [3, 8, 16, 4, 32, 32, 4]


def upcast(arguments):
    return {
        name: value.detach().double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }


def run(function, arguments, slopes=None, **options):
    """Outputs, and the gradients of activations by name for the given slopes of the outputs (random ones if None)."""
    arguments = dict(arguments)
    wanted = [name for name in ("x", "shift", "residual") if arguments.get(name) is not None]
    for name in wanted:
        arguments[name] = arguments[name].detach().requires_grad_()
    outputs = function(**arguments, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if slopes is None:
        slopes = [torch.randn_like(output) for output in outputs]
    slopes = [slope.to(output.dtype) for slope, output in zip(slopes, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, [arguments[name] for name in wanted], slopes)
    return [output.detach() for output in outputs], dict(zip(wanted, gradients, strict=True)), slopes


def check(function, reference, arguments, assert_close):
    """Outputs and gradients of the kernel against the reference in float64, and against its error in their dtype."""
    dtype = arguments["x"].dtype
    bound, slack = BOUNDS[dtype]
    outputs, gradients, slopes = run(function, arguments, backend="triton")
    plain_outputs, plain_gradients, _ = run(reference, arguments, slopes)
    exact_outputs, exact_gradients, _ = run(reference, upcast(arguments), slopes)
    triples = list(zip(outputs, plain_outputs, exact_outputs, strict=True))
    triples += [(gradients[name], plain_gradients[name], exact_gradients[name]) for name in exact_gradients]
    for actual, plain, exact in triples:
        assert actual.dtype == plain.dtype
        if exact.norm() > 1e-9:
            plain_error = ((plain.double() - exact).norm() / exact.norm()).item()
            assert_close(actual, exact, min(bound, 2 * plain_error + slack))
        else:
            assert actual.abs().max() <= 1000 * slack  # rounding times the reciprocal standard deviation, 1 / sqrt(eps)
    return outputs


def group_arguments(shape, groups, dtype, device, shift=None, residual=False, silu=False, weights=None, eps=1e-5):
    """Arguments of `group_norm` whose groups differ in mean and spread."""
    batch, channels = shape[:2]
    draw = lambda *size: torch.randn(size, device=device)  # noqa: E731
    x = draw(*shape) * (0.5 + draw(1, channels, 1, 1).abs()) + draw(1, channels, 1, 1)
    arguments = {
        "x": x.to(dtype).contiguous(memory_format=torch.channels_last),
        "groups": groups,
        "weight": draw(channels).to(weights or dtype),
        "bias": draw(channels).to(weights or dtype),
        "eps": eps,
        "silu": silu,
    }
    if shift:
        arguments["shift"] = draw(*((batch, channels) if shift == "image" else (channels,))).to(dtype)
    if residual:
        arguments["residual"] = draw(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
        arguments["sum_bias"] = draw(channels).to(weights or dtype)
    return arguments


# Group norm.


@pytest.mark.parametrize(
    ("shape", "groups", "plan", "dtype", "silu", "shift", "residual"),
    [
        ((3, 9, 7, 9), 3, None, torch.float32, True, "image", True),
        ((1, 20, 1, 1), 2, None, torch.float32, True, "image", True),
        ((2, 3, 1, 1), 3, PARTS, torch.float32, False, None, False),
        ((3, 8, 5, 3), 8, WHOLE, torch.float32, True, None, True),
        ((1, 40, 13, 19), 4, PARTS, torch.float32, True, "channel", False),
        ((2, 60, 13, 19), 3, PARTS_LOOP, torch.float32, False, "image", True),
        ((1, 30, 13, 19), 1, WHOLE_LOOP, torch.float32, True, None, False),
        ((1, 120, 7, 9), 2, None, torch.float16, True, "image", False),
        ((2, 80, 7, 9), 1, None, torch.float16, True, None, True),
        ((1, 80, 16, 16), 8, PARTS, torch.float16, False, None, False),
        ((3, 10, 13, 19), 1, WHOLE_LOOP, torch.float16, True, "channel", True),
        ((1, 60, 13, 19), 3, PARTS_LOOP, torch.float16, True, None, True),
        ((2, 96, 7, 9), 32, PARTS, torch.bfloat16, True, "image", True),
        ((1, 40, 8, 8), 1, None, torch.bfloat16, False, "channel", False),
        ((1, 200, 7, 9), 2, None, torch.float16, True, None, False),
        ((1, 240, 16, 17), 3, None, torch.float16, True, None, False),  # the first in parts by its own plan
    ],
    ids=str,
)
def test_group_norm(shape, groups, plan, dtype, silu, shift, residual, device, monkeypatch, assert_close):
    if plan is not None:
        monkeypatch.setattr(norms, "_plan", lambda *sizes: plan)
    arguments = group_arguments(shape, groups, dtype, device, shift, residual, silu)
    outputs = check(group_norm, group_norm_reference, arguments, assert_close)
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)


@pytest.mark.parametrize("plan", [WHOLE, WHOLE_LOOP, PARTS, PARTS_LOOP], ids=str)
def test_every_form_of_plan(plan, device, monkeypatch, assert_close):
    """All agree, with more groups than fit a program and a ragged last part."""
    monkeypatch.setattr(norms, "_plan", lambda *sizes: plan)
    arguments = group_arguments((2, 42, 11, 13), 14, torch.float32, device, "image", True, True)
    check(group_norm, group_norm_reference, arguments, assert_close)


@pytest.mark.parametrize("plan", [WHOLE, WHOLE_LOOP, PARTS, PARTS_LOOP], ids=str)
def test_large_mean_does_not_cancel(plan, device, monkeypatch, assert_close):
    """A mean of 1000 costs the three digits that the input itself has lost, no more."""
    monkeypatch.setattr(norms, "_plan", lambda *sizes: plan)
    arguments = group_arguments((1, 12, 11, 13), 4, torch.float32, device)
    arguments["x"] = 1000 + torch.randn_like(arguments["x"])
    outputs, gradients, slopes = run(group_norm, arguments, backend="triton")
    exact, exact_gradients, _ = run(group_norm_reference, upcast(arguments), slopes)
    assert_close(outputs[0], exact[0], 5e-4)
    assert_close(gradients["x"], exact_gradients["x"], 5e-4)


def test_equal_values_give_the_bias(device):
    """No variance at all: epsilon alone keeps the division finite."""
    arguments = group_arguments((1, 8, 4, 4), 2, torch.float32, device) | {
        "x": torch.full((1, 8, 4, 4), 7.0).to(device)
    }
    y = group_norm(**arguments, backend="triton")
    assert torch.allclose(y, arguments["bias"][:, None, None].expand_as(y), atol=1e-5)


@all_dtypes
def test_float32_weights(dtype, device, assert_close):
    arguments = group_arguments((2, 24, 3, 5), 2, dtype, device, "image", silu=True, weights=torch.float32)
    arguments["shift"] = arguments["shift"].float()
    check(group_norm, group_norm_reference, arguments, assert_close)


def test_group_norm_layouts(device, assert_close):
    """NCHW, a slice of channels, a transposed map, strided shift and weights: as good as channels-last."""
    arguments = group_arguments((2, 24, 6, 5), 2, torch.float32, device, "image", True, True)
    x, residual = arguments["x"], arguments["residual"]
    wide = torch.randn(2, 48, 6, 5, device=device).contiguous(memory_format=torch.channels_last)
    wide[:, 24:] = x
    shift = torch.stack([arguments["shift"]] * 2, -1)[..., 0]
    weight = torch.stack([arguments["weight"]] * 2, -1)[:, 0]
    expected, gradients, slopes = run(group_norm, arguments, backend="triton")
    for other in (
        {"x": x.contiguous(), "residual": residual.contiguous()},
        {"x": wide[:, 24:]},
        {"x": x.mT.contiguous().mT, "shift": shift, "weight": weight},
    ):
        outputs, other_gradients, _ = run(
            group_norm, arguments | other, [slope.contiguous() for slope in slopes], backend="triton"
        )
        for output, wanted in zip(outputs, expected, strict=True):
            assert output.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(output, wanted)
        for name in gradients:
            assert_close(other_gradients[name], gradients[name], 1e-6)


def test_group_norm_of_a_single_position_in_any_layout(device, assert_close):
    """Strides of axes of length one are arbitrary."""
    arguments = group_arguments((1, 12, 1, 1), 3, torch.float32, device, residual=True)
    arguments["x"] = torch.as_strided(arguments["x"].flatten(), (1, 12, 1, 1), (7, 1, 5, 3))
    check(group_norm, group_norm_reference, arguments, assert_close)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_gradients_that_nobody_needs(norm, device, monkeypatch):
    """Only what is asked for is computed, and the gradient of the sum alone needs no kernel."""
    if norm == "group":
        arguments = group_arguments((2, 12, 3, 5), 3, torch.float32, device, "image", True)
        function, backward = group_norm, "_group_norm_backward"
    else:
        arguments = layer_arguments((2, 5, 12), torch.float32, device, residual=True)
        function, backward = layer_norm, "_layer_norm_backward"
    for name in ("x", "shift", "residual"):
        if name in arguments:
            own = arguments | {name: arguments[name].clone().requires_grad_()}
            y, _ = function(**own, backend="triton")
            _, gradients, _ = run(function, arguments, [torch.ones_like(y), torch.zeros_like(y)], backend="triton")
            assert torch.equal(torch.autograd.grad(y.sum(), own[name])[0], gradients[name])

    monkeypatch.setattr(norms, backward, None)
    x = arguments["x"].clone().requires_grad_()
    _, total = function(**arguments | {"x": x}, backend="triton")
    slope = torch.randn_like(total)
    assert torch.equal(torch.autograd.grad(total, x, slope)[0], slope)


def test_group_norm_reference_by_hand(device, assert_close):
    arguments = upcast(group_arguments((2, 6, 3, 4), 2, torch.float32, device, "image", True, True))
    y, total = group_norm_reference(**arguments)
    expected = arguments["x"] + arguments["shift"][:, :, None, None] + arguments["residual"]
    assert_close(total, expected + arguments["sum_bias"][:, None, None], 1e-12)
    for image in range(2):
        for group in range(2):
            part = slice(3 * group, 3 * group + 3)
            values = expected[image, part]
            values = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
            values = values * arguments["weight"][part, None, None] + arguments["bias"][part, None, None]
            assert_close(y[image, part], values * values.sigmoid(), 1e-12)


def test_gradcheck_of_references():
    draw = lambda *size: torch.randn(size, dtype=torch.float64, requires_grad=True)  # noqa: E731
    weight, bias = torch.randn(2, 4, dtype=torch.float64)

    def group(x, shift, residual):
        return group_norm_reference(x, 2, weight, bias, 1e-5, silu=True, shift=shift, residual=residual)

    assert torch.autograd.gradcheck(group, (draw(2, 4, 2, 3), draw(2, 4), draw(2, 4, 2, 3)))
    assert torch.autograd.gradcheck(
        lambda x, residual: layer_norm_reference(x, weight, bias, residual=residual), (draw(3, 4), draw(3, 4))
    )


SD_MAPS = [(64, 320), (64, 960), (32, 640), (32, 1920), (16, 1280), (16, 2560), (8, 1280), (96, 320), (512, 128)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("side", "channels"), [*SD_MAPS, (256, 512), (512, 256), (1, 32)])
def test_plans_are_sound(side, channels, backward):
    """Powers of two, tiles of at most 16,384 places, at most 128 chunks."""
    chunks, together, rows, warps, *finish = norms._plan(side * side, channels // 32, backward)
    tile = together * rows * norms._power_of_two(channels // 32)
    assert all(n == norms._power_of_two(n) for n in (together, rows, warps, *finish)) and 4 <= warps <= 16
    assert tile <= 16384 and 1 <= chunks <= 128 and (chunks > 1 or rows >= side * side)


@gpu_only
@pytest.mark.parametrize(("side", "channels"), SD_MAPS)
def test_group_norm_sd_shapes(side, channels, device, assert_close):
    residual = side in (16, 96)
    shift = "image" if side in (32, 96) else None
    arguments = group_arguments((2, channels, side, side), 32, torch.float16, device, shift, residual, True)
    check(group_norm, group_norm_reference, arguments, assert_close)


# Layer norm.


def layer_arguments(shape, dtype, device, residual=False, weights=None):
    """Arguments of `layer_norm` whose rows differ in mean and spread."""
    draw = lambda *size: torch.randn(size, device=device)  # noqa: E731
    x = draw(*shape) * (0.5 + draw(*shape[:-1], 1).abs()) + draw(*shape[:-1], 1)
    weight, bias = draw(2, shape[-1]).to(weights or dtype)
    arguments = {"x": x.to(dtype), "weight": weight, "bias": bias}
    if residual:
        arguments["residual"] = draw(*shape).to(dtype)
    if residual and shape[-1] > 1:  # rows of one have no spread, so rounding would show 1 / sqrt(eps) times
        arguments["sum_bias"] = draw(shape[-1]).to(weights or dtype)
    return arguments


@pytest.mark.parametrize(
    ("shape", "dtype", "residual"),
    [
        ((3, 7, 40), torch.float32, True),
        ((5, 100), torch.float16, True),
        ((3, 5, 320), torch.float16, False),
        ((3, 5, 320), torch.bfloat16, True),
        ((2, 3, 640), torch.float16, True),
        ((2, 2, 3, 640), torch.float32, False),
        ((5, 1280), torch.float16, True),
        ((1280,), torch.bfloat16, False),
        ((2, 3000), torch.float32, True),
        ((2, 5000), torch.float16, False),
        ((3, 1), torch.float32, True),
    ],
    ids=str,
)
def test_layer_norm(shape, dtype, residual, device, assert_close):
    arguments = layer_arguments(shape, dtype, device, residual)
    check(layer_norm, layer_norm_reference, arguments, assert_close)


@all_dtypes
def test_layer_norm_float32_weights(dtype, device, assert_close):
    arguments = layer_arguments((2, 3, 48), dtype, device, True, weights=torch.float32)
    check(layer_norm, layer_norm_reference, arguments, assert_close)


def test_layer_norm_large_mean_does_not_cancel(device, assert_close):
    arguments = layer_arguments((6, 320), torch.float32, device)
    arguments["x"] = 1000 + torch.randn_like(arguments["x"])
    outputs, gradients, slopes = run(layer_norm, arguments, backend="triton")
    exact, exact_gradients, _ = run(layer_norm_reference, upcast(arguments), slopes)
    assert_close(outputs[0], exact[0], 5e-4)
    assert_close(gradients["x"], exact_gradients["x"], 5e-4)


def test_layer_norm_layouts(device, assert_close):
    """Columns of a wider matrix are read in place, others are copied; slopes may be expanded."""
    arguments = layer_arguments((2, 6, 40), torch.float32, device, residual=True)
    x, residual = arguments["x"], arguments["residual"]
    expected, gradients, slopes = run(layer_norm, arguments, backend="triton")
    wide = torch.cat([residual, x, x], -1)
    for other in (
        {"x": wide[..., 40:80], "residual": wide[..., :40]},
        {"x": x.mT.contiguous().mT},
        {"x": x.transpose(0, 1).contiguous().transpose(0, 1), "weight": arguments["weight"].repeat_interleave(2)[::2]},
    ):
        outputs, other_gradients, _ = run(
            layer_norm, arguments | other, [slope.mT.contiguous().mT for slope in slopes], backend="triton"
        )
        assert all(torch.equal(output, wanted) for output, wanted in zip(outputs, expected, strict=True))
        for name in gradients:
            assert_close(other_gradients[name], gradients[name], 1e-6)
    slopes = [torch.ones_like(x[..., :1]).expand_as(x), torch.ones((), device=device).expand_as(x)]
    actual = run(layer_norm, arguments, slopes, backend="triton")[1]
    wanted = run(layer_norm_reference, upcast(arguments), slopes)[1]
    assert_close(actual["x"], wanted["x"])


@gpu_only
@pytest.mark.parametrize("shape", [(2, 4096, 320), (2, 1024, 640), (2, 256, 1280), (2, 64, 1280)], ids=str)
def test_layer_norm_sd_shapes(shape, device, assert_close):
    for residual in (False, True):
        arguments = layer_arguments(shape, torch.float16, device, residual)
        check(layer_norm, layer_norm_reference, arguments, assert_close)


# Both.


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    arguments = group_arguments((2, 12, 3, 3), 3, torch.float32, device, "image", True)
    x, shift, residual = (arguments[name].requires_grad_(requires_grad) for name in ("x", "shift", "residual"))
    weight, bias = arguments["weight"], arguments["bias"]
    torch.library.opcheck(norms._group_norm, (x, 3, weight, bias, 1e-5, True, shift, residual, weight, []))
    torch.library.opcheck(norms._group_norm, (x, 3, weight, bias, 1e-5, False, None, None, None, PARTS))
    rows = x.detach().permute(0, 2, 3, 1).contiguous().requires_grad_(requires_grad)
    torch.library.opcheck(norms._layer_norm, (rows, weight, bias, 1e-5, None, None, []))
    torch.library.opcheck(norms._layer_norm, (rows, weight, bias, 1e-5, 2 * rows.detach(), bias, []))
    if not requires_grad:
        statistics = torch.rand(2, 2, 3, device=device)
        torch.library.opcheck(
            norms._group_norm_backward, (x, residual, x, 3, weight, bias, True, shift, None, statistics, PARTS)
        )
        statistics = torch.rand(2, 18, device=device)
        torch.library.opcheck(norms._layer_norm_backward, (rows, None, rows, weight, bias, statistics, []))


def both(x, weight, bias, shift, residual):
    """Group norm of a map and layer norm of its tokens, as in the UNet."""
    y, total = group_norm(x, 3, weight, bias, 1e-5, silu=True, shift=shift, residual=residual, backend="triton")
    tokens = (y + total).permute(0, 2, 3, 1).flatten(1, 2)
    return layer_norm(tokens, weight, bias, residual=2 * tokens, backend="triton")


def both_arguments(device, shape=(2, 12, 3, 5)):
    arguments = group_arguments(shape, 3, torch.float32, device, "image", True)
    return [arguments[name] for name in ("x", "weight", "bias", "shift", "residual")]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=gpu_only)])
def test_compiles_as_one_graph(compiler, device, assert_close):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    results = []
    arguments = both_arguments(device)
    for function in (both, torch.compile(both, backend=compiler, fullgraph=True)):
        x = arguments[0].clone().requires_grad_()
        y, total = function(x, *arguments[1:])
        results.append([y, total, *torch.autograd.grad((y * total).sum(), x)])
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, 1e-5)


@gpu_only
def test_cuda_graph(device):
    torch.use_deterministic_algorithms(False)
    arguments = both_arguments(device, (2, 96, 40, 40))
    x = arguments[0].clone().requires_grad_()
    slope = torch.randn(2, 1600, 96, device=device)

    def step():
        y, total = both(x, *arguments[1:])
        return [y, total, *torch.autograd.grad((y, total), x, (slope, slope))]

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 12, 5)}, r"x must be \[B, C, h, w\].*\[2, 12, 5\]"),
        ({"x": torch.zeros(2, 12, 0, 5)}, "x must be .* no empty axis"),
        ({"groups": 5}, "groups must be a divisor of the 12 channels of x, not 5"),
        ({"groups": 0}, "groups must be a divisor"),
        ({"weight": torch.zeros(11)}, r"weight must be \[12\]"),
        ({"bias": torch.zeros(1, 12)}, r"bias must be \[12\]"),
        ({"bias": torch.zeros(12).half()}, "bias is torch.float16"),
        ({"shift": torch.zeros(3, 12)}, r"shift must be \[12\] or \[2, 12\], not \[3, 12\]"),
        ({"shift": torch.zeros(12).double()}, "shift is torch.float64"),
        ({"residual": torch.zeros(2, 12, 5, 3)}, r"residual must be \[2, 12, 3, 5\]"),
        ({"residual": torch.zeros(2, 12, 3, 5).half()}, "residual is torch.float16"),
        ({"backend": "cuda"}, "backend must be"),
    ],
    ids=str,
)
def test_group_norm_refuses(changes, message):
    arguments = group_arguments((2, 12, 3, 5), 3, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        group_norm(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"x must be \[\.\.\., C\]"),
        ({"x": torch.zeros(0, 12)}, "no empty axis"),
        ({"weight": torch.zeros(11)}, r"weight must be \[12\]"),
        ({"weight": torch.zeros(12).double()}, "weight is torch.float64"),
        ({"residual": torch.zeros(12)}, r"residual must be \[5, 12\]"),
    ],
    ids=str,
)
def test_layer_norm_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(**layer_arguments((5, 12), torch.float32, torch.device("cpu")) | changes)


def test_what_the_kernels_cannot_do(device):
    wide = group_arguments((1, 2048, 1, 1), 1, torch.float32, device)
    with pytest.raises(ValueError, match="groups of 2048 channels"):
        group_norm(**wide, backend="triton")
    with pytest.raises(ValueError, match="rows of 8193 channels"):
        layer_norm(**layer_arguments((1, 8193), torch.float32, device), backend="triton")
    double = upcast(layer_arguments((1, 8), torch.float32, device))
    with pytest.raises(ValueError, match="float64 is not supported"):
        layer_norm(**double, backend="triton")
    assert layer_norm(**double).dtype == torch.float64


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_trainable_weights_are_left_to_torch(name, device, assert_close):
    """The kernels have no gradients for weights: they refuse, unless none are recorded; `auto` takes the reference."""
    for function, arguments in (
        (group_norm, group_arguments((1, 12, 3, 5), 3, torch.float32, device)),
        (layer_norm, layer_arguments((3, 12), torch.float32, device)),
    ):
        arguments[name].requires_grad_()
        arguments["x"] = arguments["x"].contiguous()  # torch's own backward crashes here for channels-last on the CPU
        with pytest.raises(ValueError, match=f"{name} requires a gradient"):
            function(**arguments, backend="triton")
        y = function(**arguments)
        assert torch.autograd.grad(y.sum(), arguments[name])[0].norm() > 0
        with torch.no_grad():
            assert_close(function(**arguments, backend="triton"), y)


def test_reference_without_extras_is_torch(device):
    """On the CPU, `auto` is what torch computes, bit by bit."""
    arguments = group_arguments((2, 12, 3, 5), 3, torch.float32, device)
    y = group_norm(**arguments, backend="torch")
    assert torch.equal(y, F.group_norm(arguments["x"], 3, arguments["weight"], arguments["bias"], 1e-5))
    arguments = layer_arguments((5, 12), torch.float32, device)
    y = layer_norm(**arguments, backend="torch")
    assert torch.equal(y, F.layer_norm(arguments["x"], (12,), arguments["weight"], arguments["bias"], 1e-5))


@all_dtypes
@pytest.mark.parametrize("plan", [None, PARTS_LOOP], ids=str)
def test_carried_inputs(plan, dtype, device, monkeypatch, assert_close):
    """A norm that also returns its input: gradients of both add up, and either may be missing."""
    if plan:
        monkeypatch.setattr(norms, "_plan", lambda *sizes: plan)
    for arguments, norm in (
        (group_arguments((2, 12, 5, 3), 3, dtype, device, silu=True), group_norm),
        (layer_arguments((2, 5, 12), dtype, device), layer_norm),
    ):
        slopes = [torch.randn_like(arguments["x"]) for _ in range(2)]
        for used in ((0, 1), (0,), (1,)):
            gradients = []
            for kind, options in ((arguments, {"backend": "triton"}), (upcast(arguments), {"backend": "torch"})):
                x = kind["x"].detach().requires_grad_()
                outputs = norm(**(kind | {"x": x}), carry=True, **options)
                chosen, steep = [outputs[i] for i in used], [slopes[i].to(x.dtype) for i in used]
                gradients.append(torch.autograd.grad(chosen, x, steep)[0])
            assert torch.equal(outputs[1], x)
            assert_close(*gradients, 2 * BOUNDS[dtype][0])


@pytest.mark.parametrize("added", ["shift", "residual"])
def test_what_is_carried_is_the_input_alone(added, device):
    groups, layers = (
        group_arguments((2, 12, 5, 3), 3, torch.float32, device),
        layer_arguments((5, 12), torch.float32, device),
    )
    more = {"shift": torch.zeros(12, device=device), "residual": torch.zeros_like(groups["x"])}
    with pytest.raises(ValueError, match="neither a shift nor a residual"):
        group_norm(**groups | {added: more[added]}, carry=True)
    if added == "residual":
        with pytest.raises(ValueError, match="neither a shift nor a residual"):
            layer_norm(**layers | {added: torch.zeros_like(layers["x"])}, carry=True)
