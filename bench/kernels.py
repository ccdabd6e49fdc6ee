"""Speed, memory and accuracy of the kernels at Stable Diffusion's sizes, beside PyTorch's own and the card's limits.

    python bench/kernels.py --out results                        # everything, some minutes on one GPU
    python bench/kernels.py --out results --quick                # the main shape of each kernel
    python bench/kernels.py --out results --only guidance GEGLU  # kernels whose names contain one of these
    python bench/kernels.py --out results --smoke                # tiny sizes on the CPU, to test the script
    pytest bench/kernels.py --benchmark-only                     # ours and eager, main shapes, by pytest-benchmark

Every contender is captured in a CUDA graph of up to 20 calls that go round several sets of inputs, so that these come
from memory if they are too large for the L2 cache. The graphs of all contenders are replayed in turn; a time is the
median of 20 replays, divided by the calls. What cannot be captured, or takes over 20 ms a call, is timed as single
calls between CUDA events and marked "eager".

- forward: without gradients. backward: `torch.autograd.grad` alone, the forward pass kept. forward + backward: both.
- floor: the larger of bytes / copy rate and operations / matrix rate, both rates measured here. Each input is read
  once and each output written once; exponentials are not counted.
- copy: an elementwise kernel that moves as many bytes in all, in a graph too: what tensors of this size really reach.
  (`copy_` would become a memcpy node of the graph, which moves large tensors at two thirds of that rate.)
- error: relative norm of the difference from float64 (float32 where memory is short), the worst of all results.
- in brackets: does less than the kernel, so no contender, but tells what the rest costs.
"""

import argparse
import contextlib
import json
import math
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

if __name__ == "__main__":  # transformers would take this file for the package `kernels`, which it probes for
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import p2pz.kernels
from p2pz.files import atomic_path
from p2pz.kernels.regulariser import pyramid_sizes

CALLS, ROUNDS = 20, 20
GRAPH_US = 10_000  # fewer calls in a graph if they take longer
CAPTURED_US = 20_000  # a call that takes longer is not captured: it is large, or has thousands of launches
TOTAL_US = 1_500_000  # fewer rounds if they take longer
BOTH = "forward + backward"

ATTENTION = [(2, 8, 4096, 40), (2, 8, 1024, 80), (2, 8, 256, 160), (2, 8, 64, 160)]  # SD 1.5: B, H, N, D
ATTENTION += [(2, 5, 4096, 64), (2, 10, 1024, 64), (2, 20, 256, 64), (2, 20, 64, 64)]  # SD 2.1 base
ATTENTION += [(2, 5, 9216, 64), (1, 8, 4096, 40), (4, 8, 4096, 40)]  # SD 2.1 at 768 x 768; other batches
GROUP_NORM = [(2, 320, 64), (2, 640, 64), (2, 960, 64), (2, 640, 32), (2, 1280, 32), (2, 1920, 32)]  # B, C, side
GROUP_NORM += [(2, 1280, 16), (2, 2560, 16), (2, 1280, 8)]
LAYER_NORM = [(8192, 320), (2048, 640), (512, 1280)]
GEGLU = [(8192, 2560), (2048, 5120), (512, 10240)]
GEGLU_LINEAR = [(8192, 320), (4096, 320), (2048, 640), (1024, 640), (4096, 640), (512, 1280)]  # rows, width
ENLARGING = [(2, 640, 32), (1, 1280, 8), (1, 1280, 16), (1, 640, 32)]  # B, C, side
ENLARGING += [(2, 1280, 8), (2, 1280, 16), (4, 640, 32), (4, 1280, 16)]
FEW_CHANNELS = [(1, 4, 320, 64), (1, 320, 4, 64), (2, 4, 320, 64), (2, 320, 4, 64)]  # B, C in, C out, side
NOISE = [(1, 4, 64), (4, 4, 64), (1, 4, 96)]
TOKENS = 77


class Setup(NamedTuple):
    """Where the kernels run: with tiny sizes on "cpu", for smoke runs, or "cuda"."""

    device: str
    dtype: torch.dtype


@dataclass
class Case:
    """One kernel at one shape.

    Attributes:
        shape: as a label.
        inputs: makes the inputs of one call, from PyTorch's global generator.
        contenders: functions of the inputs. "eager", given float64 inputs, also tells what is right.
        work: for each pass to be timed, (bytes to be moved, operations of the matrix products).
        wanted: which inputs get a gradient; a contender may leave some of them unused.
        context: functions that do less than the kernel.
        kernel, main: set by `all_cases`.
    """

    shape: str
    inputs: Callable[[], tuple]
    contenders: dict[str, Callable]
    work: dict[str, tuple[float, float]]
    wanted: tuple[int, ...] = (0,)
    context: dict[str, Callable] = field(default_factory=dict)
    kernel: str = ""
    main: bool = False


# Contenders. Attention tensors are [B, N, H, D].


def ours(setup: Setup, name: str, takes: int | None = None, backend: str | None = None, **options) -> Callable:
    """A function of `p2pz.kernels` of the first inputs, looked up when called, so that a missing one fails alone."""
    backend = backend or ("torch" if setup.device == "cpu" else "triton")
    return lambda *inputs, **more: getattr(p2pz.kernels, name)(*inputs[:takes], backend=backend, **options, **more)


def compiled(setup: Setup, main: bool, **functions: Callable) -> dict[str, Callable]:
    """Functions through `torch.compile`; only for main shapes, since each takes seconds."""
    if not main or setup.device == "cpu":
        return {}
    return {name: torch.compile(function, dynamic=False) for name, function in functions.items()}


def eager_maps(q: Tensor, k: Tensor) -> Tensor:
    return (torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)


def eager_attention_with_maps(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    maps = eager_maps(q, k)
    return torch.einsum("bhnm,bmhd->bnhd", maps, v), maps


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return eager_attention_with_maps(q, k, v)[0]


def eager_guidance(q: Tensor, k: Tensor, v: Tensor, reference_maps: Tensor) -> tuple[Tensor, Tensor]:
    out, maps = eager_attention_with_maps(q, k, v)
    difference = (maps - reference_maps).to(torch.promote_types(maps.dtype, torch.float32))
    return out, difference.square().sum((2, 3)).mean(1)


def sdpa(backend: SDPBackend | None = None) -> Callable:
    """`scaled_dot_product_attention` by one of its backends, or by its own choice."""

    def call(q, k, v, *_):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return call


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def attention_contenders(setup: Setup, main: bool) -> dict[str, Callable]:
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION}
    return (
        {"ours": ours(setup, "attention"), "eager": eager_attention}
        | {f"SDPA {name}": sdpa(backend) for name, backend in backends.items()}
        | compiled(setup, main, compiled=eager_attention, flex=flex)
    )


def mapless(setup: Setup) -> dict[str, Callable]:
    return {"ours without maps": ours(setup, "attention", takes=3), "SDPA without maps": sdpa()}


def diffusers_regularise(noise: Tensor, _, seed: int) -> Tensor:
    """The loop of diffusers' pipeline for one image, by autograd through its losses."""
    from diffusers.pipelines.deprecated.stable_diffusion_variants import pipeline_stable_diffusion_pix2pix_zero as peer

    losses, generator = peer.StableDiffusionPix2PixZeroPipeline, torch.Generator().manual_seed(seed)

    def step(noise: Tensor, strength: float, loss: Callable) -> Tensor:
        leaf = noise.detach().clone().requires_grad_()
        with torch.enable_grad():
            return (noise - strength * torch.autograd.grad(loss(leaf), leaf)[0]).detach()

    for _ in range(5):
        for _ in range(5):
            noise = step(noise, 20 / 5, lambda x: losses.auto_corr_loss(None, x, generator))
        noise = step(noise, 20, lambda x: losses.kl_divergence(None, x))
    return noise


# Cases.


def random(setup: Setup, *shape: int) -> Tensor:
    return torch.randn(shape, device=setup.device, dtype=setup.dtype)


def random_last(setup: Setup, *shape: int) -> Tensor:
    """`[B, C, h, w]` with the channels next to each other in memory."""
    return random(setup, *shape).to(memory_format=torch.channels_last)


def label(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def work(forward: tuple, both: tuple, backward: tuple | None = None) -> dict[str, tuple[float, float]]:
    return {"forward": forward} | ({"backward": backward} if backward else {}) | {BOTH: both}


class Sizes:
    """Label, tensors and work of an attention."""

    def __init__(self, setup: Setup, shape: tuple[int, ...], keys: int | None = None):
        batch, heads, count, width = shape
        self.label = label(batch, heads, count, keys, width) if keys else label(*shape)
        self.setup, self.queries, self.keys = setup, shape, (batch, heads, keys or count, width)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        return tuple(random(self.setup, b, n, h, d) for b, h, n, d in (self.queries, self.keys, self.keys))

    def tensors_with_reference(self) -> tuple[Tensor, ...]:
        """q, k, v, q and k of a reference that resembles them, and its maps."""
        q, k, v = self.tensors()
        q_reference, k_reference = q + torch.randn_like(q) / 2, k + torch.randn_like(k) / 2
        return q, k, v, q_reference, k_reference, eager_maps(q_reference, k_reference)

    def cost(self, queries: int, keys: int, maps: int, products: int) -> tuple[int, int]:
        """Bytes of so many tensors like q, like k and like the maps; operations of so many products."""
        (batch, heads, count, width), of_key = self.queries, self.keys[2]
        moved = queries * count * width + keys * of_key * width + maps * count * of_key
        return self.setup.dtype.itemsize * batch * heads * moved, 2 * products * batch * heads * count * of_key * width


def self_attention(setup: Setup, shape: tuple, main: bool) -> Case:
    s = Sizes(setup, shape)
    costs = work(s.cost(2, 2, 0, 2), s.cost(4, 4, 0, 7), backward=s.cost(3, 4, 0, 5))
    return Case(s.label, s.tensors, attention_contenders(setup, main), costs, wanted=(0, 1, 2))


def cross_attention(setup: Setup, shape: tuple, main: bool) -> Case:
    s = Sizes(setup, shape, TOKENS)
    costs = work(s.cost(2, 2, 0, 2), s.cost(4, 2, 0, 4))
    return Case(s.label, s.tensors, attention_contenders(setup, main), costs)


def cross_attention_with_maps(setup: Setup, shape: tuple, main: bool) -> Case:
    s = Sizes(setup, shape, TOKENS)
    contenders = {"ours": ours(setup, "attention_with_maps"), "eager": eager_attention_with_maps}
    contenders |= compiled(setup, main, compiled=eager_attention_with_maps)
    costs = work(s.cost(2, 2, 1, 2), s.cost(4, 2, 2, 4))
    return Case(s.label, s.tensors, contenders, costs, context=mapless(setup))


def guidance(setup: Setup, shape: tuple, main: bool) -> Case:
    def eager(q, k, v, q_reference, k_reference, _):
        return eager_guidance(q, k, v, eager_maps(q_reference, k_reference))

    def stored(q, k, v, _, __, reference_maps):
        return eager_guidance(q, k, v, reference_maps)

    s = Sizes(setup, shape, TOKENS)
    contenders = {"ours": ours(setup, "guided_attention", takes=5), "eager": eager, "eager with stored maps": stored}
    contenders |= compiled(setup, main, compiled=eager)
    costs = work(s.cost(3, 3, 0, 3), s.cost(5, 3, 0, 5))
    return Case(s.label, s.tensors_with_reference, contenders, costs, context=mapless(setup))


def map_editing(setup: Setup, shape: tuple, main: bool) -> Case:
    s, edit = Sizes(setup, shape, TOKENS), ours(setup, "edited_attention", takes=5)

    def inputs():
        mapping = random(setup, TOKENS, TOKENS).softmax(0)
        mix, weights = (torch.rand(TOKENS, device=setup.device) for _ in range(2))
        return *s.tensors_with_reference(), mapping, mix, weights, mix.to(setup.dtype), weights.to(setup.dtype)

    def mine(*inputs):
        return edit(*inputs, **dict(zip(("mapping", "mix", "weights"), inputs[6:9], strict=True)))

    def stored(q, k, v, _, __, reference_maps, mapping, *factors):
        mix, weights = factors[2:]
        maps = weights * (mix * (reference_maps @ mapping) + (1 - mix) * eager_maps(q, k))
        return torch.einsum("bhnm,bmhd->bnhd", maps, v)

    def eager(q, k, v, q_reference, k_reference, _, *factors):
        return stored(q, k, v, None, None, eager_maps(q_reference, k_reference), *factors)

    contenders = {"ours": mine, "eager": eager, "eager with stored maps": stored}
    contenders |= compiled(setup, main, compiled=eager)
    size, operations = s.cost(3, 3, 0, 3)
    costs = {"forward": (size, operations + operations / 3 * TOKENS / shape[3])}  # the mapping is a product of its own
    return Case(s.label, inputs, contenders, costs, wanted=(), context=mapless(setup))


def group_norm_silu(setup: Setup, shape: tuple, main: bool) -> Case:
    batch, channels, side = shape

    def inputs():
        x = random(setup, batch, channels, side, side)
        weight, bias = random(setup, channels), random(setup, channels)
        return x.to(memory_format=torch.channels_last), 32, weight, bias, 1e-5, x

    def eager(x, groups, weight, bias, eps, _):
        return F.silu(F.group_norm(x, groups, weight, bias, eps))

    def planar(_, groups, weight, bias, eps, x):
        return F.silu(F.group_norm(x, groups, weight, bias, eps))

    contenders = {"ours": ours(setup, "group_norm", takes=5, silu=True), "eager": eager, "eager in NCHW": planar}
    contenders |= compiled(setup, main, compiled=eager)
    size = setup.dtype.itemsize * math.prod(shape) * side
    costs = work((2 * size, 0), (4 * size, 0))
    return Case(label(batch, side, side, channels), inputs, contenders, costs, wanted=(0, 5))


def layer_norm(setup: Setup, shape: tuple, main: bool) -> Case:
    def inputs():
        return random(setup, *shape), random(setup, shape[1]), random(setup, shape[1]), 1e-5

    def eager(x, weight, bias, eps):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    contenders = {"ours": ours(setup, "layer_norm"), "eager": eager} | compiled(setup, main, compiled=eager)
    size = setup.dtype.itemsize * math.prod(shape)
    return Case(label(*shape), inputs, contenders, work((2 * size, 0), (4 * size, 0)))


def geglu(setup: Setup, shape: tuple, main: bool) -> Case:
    def inputs():
        return random(setup, *shape), random(setup, shape[1])

    def without_bias(x, _):
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def eager(x, bias):
        return without_bias(x + bias, None)

    contenders = {"ours": ours(setup, "geglu"), "eager": eager} | compiled(setup, main, compiled=eager)
    size, context = setup.dtype.itemsize * math.prod(shape), {"eager without bias": without_bias}
    return Case(label(*shape), inputs, contenders, work((1.5 * size, 0), (3 * size, 0)), context=context)


def geglu_linear(setup: Setup, shape: tuple, main: bool) -> Case:
    rows, width = shape
    gating = ours(setup, "geglu")

    def inputs():
        weight = random(setup, 8 * width, width) / width**0.5
        return random(setup, rows, width), weight, random(setup, 8 * width)

    def in_two(x, weight, bias):
        return gating(F.linear(x, weight, bias))

    def eager(x, weight, bias):
        value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
        return value * F.gelu(gate)

    contenders = {"ours": ours(setup, "geglu_linear"), "eager": eager, "a product, then our GEGLU": in_two}
    contenders |= compiled(setup, main, compiled=eager)
    size = setup.dtype.itemsize * (5 * rows * width + 8 * width**2)
    return Case(label(*shape), inputs, contenders, {"forward": (size, 2 * rows * 8 * width**2)}, wanted=())


def enlarging_convolution(setup: Setup, shape: tuple, main: bool) -> Case:
    batch, channels, side = shape

    def inputs():
        x, weight = random_last(setup, batch, channels, side, side), random_last(setup, channels, channels, 3, 3)
        return x, p2pz.kernels.merge_taps(weight), random(setup, channels), weight

    def eager(x, _, bias, weight):
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)

    contenders = {"ours": ours(setup, "upsampled_conv3x3", takes=3), "eager": eager}
    contenders |= compiled(setup, main, compiled=eager)
    positions = batch * side**2
    size = setup.dtype.itemsize * (5 * positions * channels + 16 * channels**2)
    operations = 2 * 4 * positions * 4 * channels**2  # four taps for each pixel of y; nine in eager
    costs = work((size, operations), (2 * size, 2 * operations), backward=(size, operations))
    return Case(label(batch, side, side, channels), inputs, contenders, costs)


def few_channels(setup: Setup, shape: tuple, main: bool) -> Case:
    batch, channels_in, channels_out, side = shape

    def inputs():
        weight = random_last(setup, channels_out, channels_in, 3, 3)
        return random_last(setup, batch, channels_in, side, side), weight, random(setup, channels_out)

    def eager(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1)

    contenders = {"ours": ours(setup, "conv3x3"), "eager": eager} | compiled(setup, main, compiled=eager)
    positions, weights = batch * side**2, 9 * channels_in * channels_out
    size = setup.dtype.itemsize * (positions * (channels_in + channels_out) + weights)
    operations = 2 * positions * weights
    costs = work((size, operations), (2 * size, 2 * operations), backward=(size, operations))
    return Case(label(batch, side, side, channels_in, channels_out), inputs, contenders, costs)


def random_noise(setup: Setup, shape: tuple) -> tuple[Tensor, Tensor, int]:
    """Noise `[B, C, h, h]`, offsets `[5, 5, 1, C, levels]` drawn in diffusers' order, and the seed they come from."""
    batch, channels, side = shape
    noise = 1.1 * torch.randn(batch, channels, side, side, device=setup.device)
    noise += 0.3 * noise.roll((1, 1), (2, 3))
    seed = int(torch.randint(2**31, ()))
    generator, sizes = torch.Generator().manual_seed(seed), pyramid_sizes(side, side)
    draws = [torch.randint(h // 2, (1,), generator=generator) for _ in range(25 * channels) for h, _ in sizes]
    return noise, torch.cat(draws).view(5, 5, 1, channels, len(sizes)).to(setup.device), seed


def regulariser(setup: Setup, shape: tuple, main: bool) -> Case:
    eager = ours(setup, "regularise_noise", takes=2, backend="torch")
    contenders = {"ours": ours(setup, "regularise_noise", takes=2), "eager": eager}
    contenders |= {"diffusers": diffusers_regularise} if shape[0] == 1 else {}
    size = 4 * math.prod(shape) * shape[2]
    costs = {"forward": (2 * size, 0)}
    return Case(label(*shape, shape[2]), lambda: random_noise(setup, shape), contenders, costs, wanted=())


def autocorrelation(setup: Setup, shape: tuple, main: bool) -> Case:
    form, *shape = shape

    def inputs():
        noise, offsets, _ = random_noise(setup, shape)
        return noise, offsets[0, 0]

    eager = ours(setup, "autocorrelation_loss", backend="torch", form=form)
    contenders = {"ours": ours(setup, "autocorrelation_loss", form=form), "eager": eager}
    contenders |= compiled(setup, main and form == "random", compiled=eager)  # "every" has hundreds of terms
    size = 4 * math.prod(shape) * shape[2]
    return Case(label(*shape, shape[2]), inputs, contenders, work((size, 0), (2 * size, 0)))


# Name: builder, shapes with the main one first, shape for a smoke run.
KERNELS = {
    "self-attention": (self_attention, ATTENTION, (2, 2, 16, 8)),
    "cross-attention": (cross_attention, ATTENTION, (2, 2, 16, 8)),
    "cross-attention with maps": (cross_attention_with_maps, ATTENTION, (2, 2, 16, 8)),
    "guidance": (guidance, ATTENTION, (2, 2, 16, 8)),
    "map editing": (map_editing, ATTENTION, (2, 2, 16, 8)),
    "regulariser": (regulariser, NOISE, (1, 2, 16)),
    "auto-correlation loss, random": (autocorrelation, [("random", *shape) for shape in NOISE], ("random", 1, 2, 16)),
    "auto-correlation loss, every": (autocorrelation, [("every", *shape) for shape in NOISE], ("every", 1, 2, 16)),
    "group norm + SiLU": (group_norm_silu, GROUP_NORM, (2, 32, 4)),
    "layer norm": (layer_norm, LAYER_NORM, (6, 16)),
    "GEGLU": (geglu, GEGLU, (6, 16)),
    "GEGLU with its projection": (geglu_linear, GEGLU_LINEAR, (6, 16)),
    "enlarging convolution": (enlarging_convolution, ENLARGING, (1, 16, 2)),
    "few channels": (few_channels, FEW_CHANNELS, (1, 4, 16, 4)),
}


def all_cases(setup: Setup, only: list[str] | None = None) -> list[Case]:
    """Main shapes of all kernels first, then the second shape of each, and so on."""
    ranked = []
    for kernel, (build, shapes, tiny) in KERNELS.items():
        if not only or any(word.lower() in kernel.lower() for word in only):
            for rank, shape in enumerate([tiny] if setup.device == "cpu" else shapes):
                case = build(setup, shape, rank == 0)
                case.kernel, case.main = kernel, rank == 0
                ranked.append((rank, case))
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


# Timing.


def attempt(function: Callable, *arguments) -> tuple[object, str | None]:
    """What a function gives, or None and why it failed, with the warnings that may explain it."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            return function(*arguments), None
        except Exception as error:
            texts = [f"{type(error).__name__}: {error}", *(str(note.message) for note in notes)]
    lines = [text.strip().split("\n")[0].split(" (Triggered internally")[0] for text in texts]
    lines = [line for line in dict.fromkeys(lines) if "runtime disabled" not in line and "prototype" not in line]
    return None, "; ".join(lines)[:400]


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def stamp(device: str) -> float | torch.cuda.Event:
    """The time; for the GPU an event, to be read after a synchronisation."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def microseconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    return (end - start) * 1e6 if isinstance(start, float) else start.elapsed_time(end) * 1e3


def capture(loop: Callable[[], None], pool) -> torch.cuda.CUDAGraph:
    """The loop as a graph. The script runs on one side stream (see `main`), so that autograd's work is captured too."""
    torch.cuda.set_sync_debug_mode("error")  # a failed capture would spoil later ones, so find out before
    try:
        loop()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            loop()
    except Exception:
        with contextlib.suppress(Exception):  # the allocator would go on as if in a capture
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    return graph


def peak_memory(call: Callable[[int], object]) -> int:
    """Bytes that a call needs at most, beside what is there already."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    return torch.cuda.max_memory_allocated() - before


def prepare(call: Callable[[int], object], sets: int, device: str, pool) -> tuple[Callable[[], None], dict]:
    """Compile, warm up, and capture if possible: what to time, and how many calls that makes, how often, and so on."""
    call(0)
    facts = {"peak_bytes": None if device == "cpu" else peak_memory(call)}
    synchronise(device)
    start, _, end = stamp(device), call(0), stamp(device)
    synchronise(device)
    duration = microseconds(start, end)
    captured = device != "cpu" and duration < CAPTURED_US
    calls = int(min(max(GRAPH_US / duration, 2), CALLS)) if captured else 1

    def loop() -> None:
        for i in range(calls):
            call(i % sets)

    if captured:
        graph, reason = attempt(capture, loop, pool)
        if graph is not None:
            return graph.replay, facts | {"how": "graph", "calls": calls, "rounds": ROUNDS}
        facts["not_captured"] = reason
    rounds = int(min(max(TOTAL_US / (calls * duration), 3), ROUNDS))
    return loop, facts | {"how": "eager", "calls": calls, "rounds": rounds}


def time_side_by_side(calls: dict[str, Callable[[int], object]], sets: int, device: str) -> dict[str, dict]:
    """Time functions of the number of an input set in turn.

    Returns:
        By name, `median_us`, `p10_us`, `p90_us` and the facts of `prepare`; or `failed`: the reason.
    """
    pool = None if device == "cpu" else torch.cuda.graph_pool_handle()  # shared, as no graph's results are kept
    plans = {name: attempt(prepare, call, sets, device, pool) for name, call in calls.items()}
    results = {name: {"failed": reason} if reason else plan[1] for name, (plan, reason) in plans.items()}
    spans: dict[str, list[tuple]] = {name: [] for name in calls}
    for how in ("graph", "eager"):
        runs = {name: plans[name][0][0] for name, facts in results.items() if facts.get("how") == how}
        for replay in runs.values() if how == "graph" else ():
            replay()
        for i in range(ROUNDS):
            for name, run in runs.items():
                if how == "eager":  # the queue must not hide launches; for graphs it is to hide how long replays take
                    synchronise(device)
                if i < results[name]["rounds"]:
                    start = stamp(device)
                    run()
                    spans[name].append((start, stamp(device)))
    synchronise(device)
    for name, facts in results.items():
        if spans[name]:
            times = [microseconds(*span) / facts["calls"] for span in spans[name]]
            tenths = quantiles(times, n=10, method="inclusive")
            facts |= {"median_us": median(times), "p10_us": tenths[0], "p90_us": tenths[-1]}
    return results


def ceilings(setup: Setup) -> dict[str, float]:
    """What the device reaches: bytes a second of a large copy, operations a second of a large matrix product."""
    size, side = (2**20, 64) if setup.device == "cpu" else (2**30, 8192)
    source, target = (torch.ones(size // 4, device=setup.device) for _ in range(2))
    a, b = random(setup, side, side), random(setup, side, side)
    times = time_side_by_side(
        {"copy": lambda _: torch.neg(source, out=target), "matrix": lambda _: a @ b}, 1, setup.device
    )
    copy, matrix = times["copy"]["median_us"], times["matrix"]["median_us"]
    return {"copy_bytes_per_s": 2e6 * size / copy, "matrix_flop_per_s": 2e6 * side**3 / matrix}


# Measuring a case.


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def one_pass(name: str, function: Callable, sets: list[tuple], upstream: list[tuple], wanted: tuple[int, ...]):
    """A pass of a contender as a function of the number of an input set; gives all its results.

    Upstream gradients are brought into the layout of the contender's own outputs.
    """

    def forward(i: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(function(*sets[i]))

    def gradients(i: int, outputs: tuple[Tensor, ...], keep: bool = False) -> tuple[Tensor, ...]:
        leaves = [sets[i][j] for j in wanted]
        found = torch.autograd.grad(outputs, leaves, fitting[i], keep, allow_unused=True)
        return tuple(gradient for gradient in found if gradient is not None)

    def both(i: int) -> tuple[Tensor, ...]:
        outputs = as_tuple(function(*sets[i]))
        return *(output.detach() for output in outputs), *gradients(i, outputs)

    if name == "forward":
        return forward
    like = forward(0)
    fitting = [tuple(torch.empty_like(o).copy_(g) for o, g in zip(like, each, strict=False)) for each in upstream]
    if name == BOTH:
        return both
    kept = [as_tuple(function(*inputs)) for inputs in sets]
    return lambda i: gradients(i, kept[i], True)


def in_dtype(values: tuple, dtype: torch.dtype) -> tuple:
    """Floating-point tensors in another dtype, the rest as it is."""
    return tuple(
        value.detach().to(dtype).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in values
    )


def expected_results(case: Case, name: str, inputs: tuple, upstream: tuple) -> tuple[Tensor, ...]:
    """What is right for one input set, in float64 or, if there is not enough memory for it, float32."""
    for dtype in (torch.float64, torch.float32):
        with contextlib.suppress(torch.OutOfMemoryError):
            arguments = [in_dtype(inputs, dtype)], [in_dtype(upstream, dtype)], case.wanted
            return one_pass(name, case.contenders["eager"], *arguments)(0)
    raise MemoryError("not enough for the reference in float32")


def relative_error(call: Callable[[int], tuple[Tensor, ...]], expected: tuple[Tensor, ...]) -> float:
    """The worst relative norm of a difference among the results for input set 0."""
    pairs = zip(call(0), expected, strict=True)
    error = max(((a.double() - b).norm() / b.double().norm()).item() for a, b in pairs)
    if not math.isfinite(error):
        raise ValueError(f"the error is {error}")
    return error


def input_sets(case: Case, count: int) -> list[tuple]:
    sets = []
    for seed in range(count):
        torch.manual_seed(seed)
        sets.append(case.inputs())
        for i in case.wanted:
            sets[-1][i].requires_grad_()
    return sets


def copies(size: float, sets: int, device: str) -> Callable[[int], Tensor]:
    """An elementwise kernel that moves `size` bytes in all, going round as many sources as there are input sets."""
    sources = torch.ones(sets, 128 * math.ceil(size / 1024), device=device)
    target = torch.empty_like(sources[0])
    return lambda i: torch.neg(sources[i], out=target)


def measure(case: Case, setup: Setup, limits: dict[str, float]) -> Iterator[dict]:
    """One record for each pass."""
    cache = l2_bytes(setup)
    footprint = case.work["forward"][0]
    count = min(max(math.ceil(2 * cache / footprint), 2), CALLS)
    sets = input_sets(case, count)
    outputs = one_pass("forward", case.contenders["eager"], sets, [], ())(0) if case.wanted else ()
    upstream = [tuple(torch.randn_like(output) for output in outputs) for _ in sets]
    del outputs
    for name, (size, operations) in case.work.items():
        expected, unknown = attempt(expected_results, case, name, sets[0], upstream[0])
        calls, entries = {"copy": copies(size, count, setup.device)}, {}
        for contender, function in (case.contenders | case.context).items():
            call, failure = attempt(one_pass, name, function, sets, upstream, case.wanted)
            error, reason = None, failure or unknown
            if not reason and contender in case.contenders:
                error, reason = attempt(relative_error, call, expected)
            entries[contender] = {"error": error, "no_error": reason}
            if not failure:
                calls[contender] = call
        del expected, call
        times = time_side_by_side(calls, count, setup.device)
        calls.clear()
        if setup.device != "cpu":
            torch.cuda.empty_cache()
        yield {
            "kernel": case.kernel,
            "shape": case.shape,
            "pass": name,
            "bytes": size,
            "operations": operations,
            "floor_us": max(size / limits["copy_bytes_per_s"], operations / limits["matrix_flop_per_s"]) * 1e6,
            "input_sets": count,
            "fits_l2": count * footprint <= cache,
            "context": list(case.context),
            "copy": times.pop("copy"),
            "contenders": {n: e | times.get(n, {"failed": e["no_error"]}) for n, e in entries.items()},
        }


def l2_bytes(setup: Setup) -> int:
    return 0 if setup.device == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size


# Goals.


class Goal(NamedTuple):
    """What a kernel was built to reach in float16 on an H200; `value` is made from a record's times by name."""

    kernel: str
    shape: str
    passed: str
    bound: str
    limit: float
    unit: str
    value: Callable[[dict[str, float]], float]


def of(*names: str) -> Callable[[dict[str, float]], float]:
    """Our time as a share of the best of some contenders'."""
    return lambda times: times["ours"] / min(times[name] for name in names if name in times)


def speed_up(times: dict[str, float]) -> float:
    return 1 / of("eager", "eager with stored maps")(times)


def ours_us(times: dict[str, float]) -> float:
    return times["ours"]


MAPS = ("cross-attention with maps", "2x8x4096x77x40")
GUIDANCE = ("guidance", "2x8x4096x77x40")
SELF = ("self-attention", "2x8x4096x40")
NORM = ("group norm + SiLU", "2x64x64x320")
GATE = ("GEGLU", "8192x2560")
SDPA = ("SDPA flash", "SDPA cuDNN", "SDPA efficient")
GOALS = [
    Goal(*MAPS, "forward", "at most", 15, "us", ours_us),
    Goal(*MAPS, "forward", "at least", 5, "times as fast as eager", speed_up),
    Goal(*GUIDANCE, "forward", "at most", 2, "of our attention without maps", of("ours without maps")),
    Goal(*GUIDANCE, BOTH, "at least", 4, "times as fast as eager", speed_up),
    Goal("regulariser", "1x4x64x64", "forward", "at most", 500, "us", ours_us),
    Goal(*SELF, "forward", "at most", 189, "us", ours_us),
    Goal(*SELF, "forward", "at most", 1, "of cuDNN's time", of("SDPA cuDNN")),
    Goal(*SELF, "forward", "at most", 1, "of the best SDPA backend's time", of(*SDPA)),
    Goal(*SELF, "backward", "at most", 1, "of the best SDPA backend's time", of(*SDPA)),
    Goal(*NORM, "forward", "at most", 1.5, "of a copy of the same bytes", of("copy")),
    Goal(*NORM, "forward", "at most", 1.5, "of bytes / copy rate", of("floor")),
    Goal(*GATE, "forward", "at most", 1.5, "of a copy of the same bytes", of("copy")),
    Goal(*GATE, "forward", "at most", 1.5, "of bytes / copy rate", of("floor")),
]
VERDICTS = {True: "met", False: "NOT MET", None: "not measured"}


def medians(record: dict) -> dict[str, float]:
    """Microseconds of everything in a record that was timed."""
    entries = record["contenders"] | {"copy": record["copy"]}
    return {name: entry["median_us"] for name, entry in entries.items() if "median_us" in entry}


def judge(records: list[dict]) -> list[dict]:
    """Each goal with what was measured and whether it is met; None for both if something for it is missing.

    Only times of graphs count, and only of contenders whose results are right.
    """
    timed = {}
    for record in records:
        times = {"copy": record["copy"]["median_us"], "floor": record["floor_us"]}
        for name, entry in record["contenders"].items():
            right = name in record["context"] or (entry.get("error") is not None and entry["error"] < 0.01)
            if right and entry.get("how") == "graph":
                times[name] = entry["median_us"]
        timed[record["kernel"], record["shape"], record["pass"]] = times
    rows = []
    for goal in GOALS:
        try:
            value = goal.value(timed[goal.kernel, goal.shape, goal.passed])
            met = value <= goal.limit if goal.bound == "at most" else value >= goal.limit
        except (KeyError, ValueError):
            value, met = None, None
        name = f"{goal.kernel} {goal.shape} {goal.passed}: {goal.bound} {goal.limit:g} {goal.unit}"
        rows.append({"goal": name, "measured": value, "met": met})
    return rows


# Tables.


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def table(rows: list[list[str]]) -> list[str]:
    """Markdown lines; the first row is the head."""
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])] + [""]


def sections(records: list[dict]) -> list[str]:
    """One kernel and pass: a table of times, one of errors and memory, and what failed."""
    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    context = records[0]["context"]
    heads = [f"[{name}]" if name in context else name for name in names]
    times = [["us (p10-p90)", *heads, "ours / best other", "floor", "floor / ours", "copy", "inputs fit L2"]]
    details, notes = [["error / peak MiB", *heads]], {}
    for record in records:
        found, floor = medians(record), record["floor_us"]
        mine = found.get("ours")
        others = [us for name, us in found.items() if name not in ("ours", "copy", *context)]
        cells, facts = [], []
        for name in names:
            entry = record["contenders"].get(name, {})
            spread = f" ({number(entry['p10_us'])}-{number(entry['p90_us'])})" if "p10_us" in entry else ""
            cells.append(number(entry.get("median_us")) + spread + (" eager" if entry.get("how") == "eager" else ""))
            error, peak = entry.get("error"), entry.get("peak_bytes")
            facts.append(("-" if error is None else f"{error:.1e}") + (f" / {number(peak / 2**20)}" if peak else ""))
            for reason in dict.fromkeys(entry.get(key) for key in ("failed", "no_error", "not_captured")):
                if reason:
                    notes.setdefault(f"{name}: {reason}", []).append(record["shape"])
        cells += [number(mine / min(others)) if mine and others else "-", number(floor)]
        cells += [number(floor / mine) if mine else "-", number(found.get("copy"))]
        cells += ["yes" if record["fits_l2"] else "no"]
        times.append([record["shape"], *cells])
        details.append([record["shape"], *facts])
    notes = [f"- {note} ({', '.join(shapes)})" for note, shapes in notes.items()]
    return [*table(times), *table(details), *notes, *([""] if notes else [])]


def markdown(results: dict) -> str:
    """All results as a page."""
    copy, matrix = results["copy_bytes_per_s"] / 1e12, results["matrix_flop_per_s"] / 1e12
    rates = f"Copy {copy:.2f} TB/s, matrix product {matrix:.0f} TFLOP/s, L2 {results['l2_bytes'] >> 20} MiB."
    lines = ["# Kernels", "", results["machine"], "", rates, "", f"`{results['command']}`", "", "## Goals", ""]
    goals = [[row["goal"], number(row["measured"]), VERDICTS[row["met"]]] for row in results["goals"]]
    lines += [*table([["goal", "measured", ""], *goals]), "## How to read the tables", ""]
    lines += [__doc__.split("\n\n", 2)[2]]
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in results["cases"]:
        groups.setdefault((record["kernel"], record["pass"]), []).append(record)
    for kernel, name in sorted(groups, key=lambda key: list(KERNELS).index(key[0])):
        lines += [f"## {kernel}: {name}", "", *sections(groups[kernel, name])]
    if results["left_out"]:
        lines += ["## Left out", "", *(f"- {text}" for text in results["left_out"])]
    return "\n".join(lines).rstrip() + "\n"


def machine_line(setup: Setup) -> str:
    """Device, software, dtype and date of a measurement."""
    triton = getattr(p2pz.kernels.dispatch.triton, "__version__", "-")
    parts = [f"torch {torch.__version__}", f"Triton {triton}", f"Python {platform.python_version()}"]
    if setup.device == "cpu":
        parts = [f"{platform.machine()} CPU", *parts]
    else:
        parts = [torch.cuda.get_device_name(), *parts, f"CUDA {torch.version.cuda}"]
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            parts += ["driver " + subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]]
    return ", ".join([*parts, str(setup.dtype).removeprefix("torch."), time.strftime("%Y-%m-%d")])


def write(results: dict, out: Path) -> None:
    """`kernels.json` and `kernels.md`, each whole or not at all."""
    for name, text in (("kernels.json", json.dumps(results, indent=1) + "\n"), ("kernels.md", markdown(results))):
        with atomic_path(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


# Running.


def line(record: dict) -> str:
    """A record in a line."""
    times = "; ".join(f"{name} {number(us)}" for name, us in medians(record).items())
    failed = [name for name, entry in record["contenders"].items() if "failed" in entry]
    failed = f"; failed: {', '.join(failed)}" if failed else ""
    place = f"{record['kernel']} {record['shape']} {record['pass']}"
    return f"{place}: {times}; floor {number(record['floor_us'])} us{failed}"


def run(cases: list[Case], setup: Setup, out: Path, command: str, seconds: float) -> dict:
    """Measure case by case, writing all results so far after each; no case is begun after some seconds."""
    began = time.monotonic()
    results = {"machine": machine_line(setup), "command": command, "l2_bytes": l2_bytes(setup), **ceilings(setup)}
    results |= {"goals": [], "left_out": [], "cases": []}

    def run_case(case: Case) -> None:
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not begun within {seconds:g} s")
        for record in measure(case, setup, results):
            results["cases"].append(record)
            print(line(record), flush=True)

    for case in cases:
        _, reason = attempt(run_case, case)
        if reason:
            results["left_out"].append(f"{case.kernel} {case.shape}: {reason}")
            print(results["left_out"][-1], flush=True)
        results["goals"] = judge(results["cases"] if setup.dtype == torch.float16 else [])
        results["seconds"] = round(time.monotonic() - began, 1)
        write(results, out)
        torch.compiler.reset()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json and kernels.md")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(KERNELS)}: those with NAME in them")
    parser.add_argument("--quick", action="store_true", help="main shapes only")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--seconds", type=float, default=330, help="begin no case later (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, torch backend, to test the script")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("bench/kernels.py needs a CUDA GPU; --smoke tests the script itself on a CPU")
    setup = Setup("cpu" if args.smoke else "cuda", getattr(torch, args.dtype))
    cases = [case for case in all_cases(setup, args.only) if case.main or not args.quick]
    if not cases:
        sys.exit(f"--only {' '.join(args.only)} is in none of the names: {', '.join(KERNELS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch._functorch.config.donated_buffer = False  # else compiled functions refuse a second backward pass
    with torch.cuda.stream(None if args.smoke else torch.cuda.Stream()):
        results = run(cases, setup, args.out, " ".join(["python", *sys.argv]), args.seconds)
    for row in results["goals"]:
        print(f"{VERDICTS[row['met']]}: {row['goal']}: {number(row['measured'])}")
    print(f"{results['machine']}; {results['seconds']} s")


# For pytest-benchmark.


def pytest_generate_tests(metafunc) -> None:
    metafunc.parametrize("contender", ["ours", "eager"])
    metafunc.parametrize("kernel", list(KERNELS))


def test_forward(kernel, contender, benchmark):
    """Main shapes on a GPU; on a CPU tiny ones, with the torch backend."""
    setup = Setup("cuda" if torch.cuda.is_available() else "cpu", torch.float16)
    case = next(case for case in all_cases(setup) if case.kernel == kernel)
    call = one_pass("forward", case.contenders[contender], input_sets(case, 1), [], ())

    def timed() -> None:
        call(0)
        synchronise(setup.device)

    timed()
    benchmark(timed)


if __name__ == "__main__":
    main()
