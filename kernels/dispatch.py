"""What happens before a launch: arguments are checked, and the torch reference or the Triton kernel is chosen."""

import contextlib
import contextvars
import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system: the references serve alone

    class triton:
        jit = staticmethod(lambda function: function)

    class tl:
        constexpr = staticmethod(lambda value: value)


INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")
"""Whether Triton runs kernels in its interpreter, which takes CPU tensors. It reads that variable at import, too."""

HALF_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (*HALF_DTYPES, torch.float32)

_compile_only: contextvars.ContextVar[bool] = contextvars.ContextVar("compile_only", default=False)


def choose_triton(backend: str, unsupported: str | None, *tensors: Tensor) -> bool:
    """Whether the Triton kernel is to run.

    Args:
        backend: `"torch"`: never. `"triton"`: always, or an error. `"auto"`: for CUDA tensors that the kernel supports,
            on GPUs from Ampere on.
        unsupported: why the kernel cannot take these arguments, or None.
        tensors: all tensor arguments.

    Returns:
        True for the kernel, False for the reference.

    Raises:
        ValueError: unknown backend, or `"triton"` was asked for what it cannot do.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'backend must be "auto", "torch" or "triton", not {backend!r}')
    if backend == "torch":
        return False
    for tensor in tensors:
        if not unsupported and tensor.dtype.is_floating_point and tensor.dtype not in KERNEL_DTYPES:
            unsupported = f"{tensor.dtype} is not supported: float16, bfloat16 and float32 are"
    if not unsupported and not hasattr(triton, "__version__"):
        unsupported = "Triton is not installed"
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    if not unsupported and on_gpu and torch.cuda.get_device_capability(tensors[0].device) < (8, 0):
        unsupported = "the GPU is older than NVIDIA's Ampere, whose shared memory the tiles need"
    if not unsupported and not on_gpu and not INTERPRETED:
        unsupported = f"the tensors are on {tensors[0].device}: CUDA tensors are needed (or TRITON_INTERPRET=1)"
    if backend == "triton" and unsupported:
        raise ValueError(f'backend="triton": {unsupported}')
    return backend == "triton" or (on_gpu and not unsupported)


def has_little_shared_memory(tensor: Tensor) -> bool:
    """Whether the tensor is on a GPU with 99 KiB of shared memory for a block, as GeForce cards have, not 163 or more.

    Source: NVIDIA, "CUDA C++ Programming Guide", table of technical specifications per compute capability.
    """
    capabilities = (8, 6), (8, 9), (12, 0), (12, 1)
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) in capabilities


def library_op(name: str) -> Callable:
    """Decorator: register a launcher, which changes none of its arguments, as a library op.

    Triton launches on the current GPU, so the op makes that of its first tensor the current one.
    """

    def register(launcher: Callable) -> Callable:
        @functools.wraps(launcher)
        def on_its_gpu(*args):
            with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
                return launcher(*args)

        return torch.library.custom_op(name, on_its_gpu, mutates_args=())

    return register


def launch(kernel: Callable, grid: tuple[int, ...], /, *args, **kwargs) -> None:
    """Launch a kernel or, within `compile_ahead`, only have it compiled for these arguments."""
    if _compile_only.get():
        kernel.warmup(*args, grid=grid, **kwargs)
    else:
        kernel[grid](*args, **kwargs)


def compile_ahead(function: Callable, *args) -> None:
    """Compile what `function(*args)` launches, many kernels at a time; one after the other, they take a minute.

    The function runs as ever, backward passes too, but its kernels do not: what they would have written is whatever
    memory held, so results mean nothing, and arguments that the function changes are spoilt.

    An error ends this early and is left to the real run, which meets and reports it. In the interpreter, and with a
    Triton that cannot compile in other threads (before 3.5), nothing happens.
    """
    if INTERPRETED or not hasattr(triton, "AsyncCompileMode"):
        return

    def dry_run():
        _compile_only.set(True)
        with triton.AsyncCompileMode(executor):  # waits, at its end, for all that was handed to the executor
            function(*args)

    with (
        contextlib.suppress(Exception),
        torch.autograd.set_multithreading_enabled(False),  # autograd's own threads would not know the context
        ThreadPoolExecutor() as executor,
    ):
        contextvars.copy_context().run(dry_run)  # a copy, since Triton 3.6 stays in its mode after an error


def channels_last(maps: Tensor) -> Tensor:
    """`[B, C, h, w]` with the channels next to each other in memory; copied only if they are not."""
    return maps.contiguous(memory_format=torch.channels_last)


def check_bias(bias: Tensor | None, x: Tensor, channels: int | None = None, beside: str | None = None) -> str | None:
    """Check the bias that a kernel adds to the last axis of `x`, or to another one's.

    Args:
        bias: `[C]`, dtype of `x` or float32; None for none.
        x: `[..., C]`, or of any shape where the next two are given.
        channels: C.
        beside: what has these channels, with its shape, for the message.

    Returns:
        Why the kernel cannot take it, for `choose_triton`, or None.

    Raises:
        ValueError: it does not fit.
    """
    if bias is None:
        return None
    expected = list(x.shape[-1:]) if channels is None else [channels]
    if list(bias.shape) != expected:
        raise ValueError(f"bias must be {expected} to go with {beside or f'x {list(x.shape)}'}, not {list(bias.shape)}")
    if bias.dtype not in (x.dtype, torch.float32) or bias.device != x.device:
        raise ValueError(
            f"bias is {bias.dtype} on {bias.device}, but x is {x.dtype} on {x.device}: its dtype must be that of x "
            "or float32, its device the same"
        )
    trained = bias.requires_grad and torch.is_grad_enabled()
    return "bias requires a gradient: the kernel gives none for it" if trained else None


def check_attention(q: Tensor, **keys: Tensor) -> None:
    """Check the shapes and dtypes of attention inputs.

    Args:
        q: queries, `[B, N, H, D]`.
        keys: keys and values by argument name, each `[B, M, H, D]` with the same M, and further queries by names that
            start with `q`, each of the shape of `q`.

    Raises:
        ValueError: names the argument, what it is and what it should be.
    """
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, N, H, D] with no empty axis, not {list(q.shape)}")
    batch, _, heads, width = q.shape
    count = None
    for name, tensor in keys.items():
        if name.startswith("q"):
            expected = list(q.shape)
        else:
            count = count or (tensor.shape[1] if tensor.ndim == 4 else 0) or "M"
            expected = [batch, count, heads, width]
        if list(tensor.shape) != expected:
            raise ValueError(f"{name} must be {expected} to go with q {list(q.shape)}, not {list(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}: they must agree"
            )


def too_large(width: int, keys: int = 0, most_keys: str = "256") -> str | None:
    """Why attention kernels cannot take a head size and a number of keys, or None. `most_keys` may end in a reason."""
    if width > 256:
        return f"head size {width}: up to 256 are supported"
    return f"{keys} keys: up to {most_keys} are supported" if keys > int(most_keys.split()[0]) else None


def score_scale(q: Tensor) -> float:
    """`log2(e) / sqrt(D)`: scaled by it, scores are exponents of 2."""
    return math.log2(math.e) / math.sqrt(q.shape[3])


def unit_stride(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself if its last axis is contiguous, else a contiguous copy; None for none."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def split_width(width: int, least: int) -> tuple[int, int]:
    """A head size as one or two powers of two (the second may be 0), which the sides of tiles must be.

    Args:
        width: the head size.
        least: the narrowest part, a power of two. With 16, 40 becomes 32 + 16, 80 becomes 64 + 16 and 160 becomes
            128 + 32; with 64, 40 becomes 64, 80 becomes 128 and 160 becomes 128 + 64.
    """
    first = max(least, 1 << (width.bit_length() - 1))
    rest = width - first
    second = max(least, 1 << (rest - 1).bit_length()) if rest > 0 else 0
    return (2 * first, 0) if first == second else (first, second)
