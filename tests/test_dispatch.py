"""Choosing a backend, and life without Triton."""

import os
import subprocess
import sys

import pytest
import torch

from p2pz.kernels import dispatch, gating
from p2pz.kernels.dispatch import (
    choose_triton,
    compile_ahead,
    has_little_shared_memory,
    launch,
    split_width,
    tl,
    triton,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch, p2pz.kernels as kernels
q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 3, 2, 8)
kernels.attention_with_maps(q, k, k)
kernels.guided_attention(q, k, k, q, k)
kernels.group_norm(torch.randn(1, 4, 3, 3), 2, torch.ones(4), torch.zeros(4), 1e-5)
kernels.regularise_noise(torch.randn(1, 1, 8, 8), torch.ones(1, 1, 1, 1, 1, dtype=torch.int64))
try:
    kernels.attention(q, k, k, backend="triton")
except ValueError as error:
    print(error)
"""


def test_everything_works_without_triton():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == 'backend="triton": Triton is not installed'


def test_choice(device):
    x = torch.ones(1, device=device)
    assert choose_triton("triton", None, x)
    assert choose_triton("auto", None, x) == x.is_cuda
    assert not choose_triton("torch", "whatever", x)
    assert not choose_triton("auto", "too large", x)
    assert not choose_triton("auto", None, x.double())
    with pytest.raises(ValueError, match='backend="triton": too large'):
        choose_triton("triton", "too large", x)
    with pytest.raises(ValueError, match="backend must be"):
        choose_triton("cuda", None, x)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="the tensors are on cpu: CUDA tensors are needed"):
        choose_triton("triton", None, torch.ones(1))


@pytest.mark.parametrize(("capability", "serves", "little"), [
    ((7, 5), False, False), ((8, 0), True, False), ((8, 6), True, True), ((8, 9), True, True), ((9, 0), True, False),
    ((10, 0), True, False), ((12, 0), True, True),
])  # fmt: skip
def test_generations_of_gpus(capability, serves, little, monkeypatch):
    class OnAGpu(torch.Tensor):
        is_cuda = True

    x = torch.ones(1).as_subclass(OnAGpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_triton("auto", None, x) == serves and has_little_shared_memory(x) == little
    if not serves:
        with pytest.raises(ValueError, match="older than NVIDIA's Ampere"):
            choose_triton("triton", None, x)


FOR_A_GEFORCE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from p2pz.kernels import self_attention

class Driver:  # of a GPU that is not there: kernels are compiled for it, and not launched
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 86, 32)
    get_active_torch_device = lambda self: torch.device("meta")

def compile_only(kernel, grid, *arguments, **options):
    compiled = kernel.warmup(*arguments, grid=grid, **options)
    print(kernel.fn.__name__, q.shape[-1], compiled.metadata.shared)

triton.runtime.driver.set_active(Driver())
self_attention.launch, self_attention.has_little_shared_memory = compile_only, lambda q: True
for width in WIDTHS:
    qkv = torch.empty(1, 256, 24 * width, dtype=torch.float16, device="meta")
    q, k, v = (x.unflatten(-1, (8, width)) for x in qkv.chunk(3, -1))
    out, logsum = self_attention._attention._init_fn(q, k, v, False)
    self_attention._attention_backward._init_fn(out, q, k, v, out, logsum, True)
"""


@pytest.mark.parametrize("widths", [[80, 160], pytest.param([40, 64, 128, 256], marks=pytest.mark.slow)], ids=str)
def test_attention_fits_into_the_shared_memory_of_a_geforce(widths):
    """99 KiB for a block; all other kernels take less than these, which have three stages elsewhere."""
    pytest.importorskip("triton")
    code = FOR_A_GEFORCE.replace("WIDTHS", str(widths))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    taken = {(name, int(width)): int(size) for name, width, size in map(str.split, done.stdout.splitlines())}
    assert len(taken) == 3 * len(widths) and all(0 < size <= 99 * 1024 for size in taken.values()), taken


@pytest.mark.parametrize("least", [16, 32, 64])
def test_parts_of_a_head(least):
    """Two powers of two that cover it, none too narrow, never more than one power of two would take."""
    for width in range(1, 257):
        parts = split_width(width, least)
        assert width <= sum(parts) <= max(least, 1 << (width - 1).bit_length())
        assert all(part & (part - 1) == 0 and part >= least for part in parts if part) and parts[0] > parts[1]


class Recorder:
    """Stands for a Triton kernel, and notes what is asked of it."""

    def __init__(self):
        self.launched, self.compiled = [], []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append((grid, args, kwargs))

    def warmup(self, *args, grid, **kwargs):
        self.compiled.append((grid, args, kwargs))


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def in_background(monkeypatch):
    """Triton seems to compile, as on a GPU, and is one that can do so in other threads."""
    if not hasattr(triton, "AsyncCompileMode"):
        pytest.skip("this Triton compiles in the calling thread only")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)


def test_launch(recorder):
    launch(recorder, (2, 3), 1, N=2)
    assert recorder.launched == [((2, 3), (1,), {"N": 2})] and not recorder.compiled


def test_compiling_ahead_launches_nothing(device, in_background, recorder, monkeypatch, poisoned_memory):
    """Neither the forward nor the backward pass, which autograd runs in a thread of its own on a GPU."""
    monkeypatch.setattr(gating, "_geglu_kernel", recorder)
    monkeypatch.setattr(gating, "_geglu_backward_kernel", recorder)
    x = torch.randn(3, 8, device=device, requires_grad=True)
    results = []

    def both_ways(x):
        y = gating.geglu(x, backend="triton")
        results.extend((y, *torch.autograd.grad(y.sum(), x)))

    monkeypatch.setattr(gating, "choose_triton", lambda *_: True)
    assert compile_ahead(both_ways, x) is None
    assert [result.isnan().all().item() for result in results] == [True, True]
    assert len(recorder.compiled) == 2 and not recorder.launched
    both_ways(x)
    assert len(recorder.compiled) == 2 and len(recorder.launched) == 2
    assert [kwargs for *_, kwargs in recorder.launched] == [kwargs for *_, kwargs in recorder.compiled]


def test_errors_are_left_to_the_real_run(in_background, recorder):
    def fail():
        launch(recorder, (1,))
        raise RuntimeError("out of memory")

    for _ in range(2):  # whatever the first time leaves behind must not stop the second
        compile_ahead(fail)
    assert len(recorder.compiled) == 2
    launch(recorder, (1,))
    assert len(recorder.launched) == 1


@pytest.mark.parametrize("why", ["interpreted", "old"])
def test_nothing_to_compile_ahead(why, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", why == "interpreted")
    if why == "old":
        monkeypatch.delattr(triton, "AsyncCompileMode", raising=False)
    compile_ahead(pytest.fail, "ran")


@triton.jit
def _broken_kernel(p_x):
    tl.static_assert(False, "broken on purpose")


@needs_gpu
def test_compiled_ahead_is_compiled(device, in_background, poisoned_memory, assert_close):
    x = torch.randn(5, 72, device=device)
    tile = [2, 64, 1]  # that nothing else uses
    cache = gating._geglu_kernel.device_caches[device.index or 0][0]
    before, results = len(cache), []
    compile_ahead(lambda: results.append(gating._geglu(x, None, tile)))
    assert len(cache) == before + 1 and results[0].isnan().all()
    assert_close(gating._geglu(x, None, tile), gating.geglu_reference(x.double()))
    assert len(cache) == before + 1


@needs_gpu
def test_a_kernel_that_does_not_compile(device, in_background):
    x = torch.ones(1, device=device)
    compile_ahead(lambda: launch(_broken_kernel, (1,), x))
    with pytest.raises(triton.CompilationError, match="broken on purpose"):
        launch(_broken_kernel, (1,), x)
