"""Files that are written whole or not at all, and the small tensor files that p2pz saves for later."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from p2pz.weights import printable, reason

FLOATS = torch.float32, torch.float16, torch.bfloat16, torch.float64
"""What numbers may be saved as."""


def cause(error: Exception) -> str:
    """What kept a file from being read or written, in the system's words and without the name of a temporary file."""
    code = re.search(r"(?:os error|code:) (\d+)", str(error))  # as safetensors tells it
    words = os.strerror(int(code[1])) if code else getattr(error, "strerror", None)
    return words.lower() if words else reason(error)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike):
    """A temporary path beside `path` that replaces it when the block ends well, and is deleted when it does not.

    Args:
        path: where the finished file goes.

    Raises:
        ValueError: the folder does not exist or cannot be written to, the disk is full, or `path` is a folder.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {cause(error)}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private; the result is an ordinary file
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {cause(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: str | os.PathLike) -> None:
    """Raise ValueError if no file can be put there; to be called before long work."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: permission denied")


def save_tensors(path: str | os.PathLike, kind: str, tensors: dict[str, Tensor], card: dict[str, str]) -> None:
    """Write a safetensors file whose metadata says what it is.

    Args:
        path: where to.
        kind: what it holds, for instance "direction".
        tensors: by name.
        card: further metadata.

    Raises:
        ValueError: the place cannot be written to, the disk is full, or the metadata is not valid Unicode.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"format": f"p2pz {kind}", **card})
    except UnicodeEncodeError as error:
        text = printable(repr(error.object))
        raise ValueError(f"cannot write {path}: this text is not valid Unicode (UTF-8): {text}") from None


def load_tensors(
    path: str | os.PathLike, kind: str, names: tuple[str, ...], facts: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file that `save_tensors` wrote.

    Args:
        path: the file.
        kind: what it must hold.
        names: tensors it must have.
        facts: metadata it must have.

    Returns:
        The tensors and the metadata.

    Raises:
        ValueError: it is missing, unreadable or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            card = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise ValueError(f"{kind} {path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{kind} {path} cannot be read: {error}") from None
    if card.get("format") != f"p2pz {kind}":
        raise ValueError(f"{path} is a safetensors file, but no {kind} that p2pz saved")
    missing = [name for name in names if name not in tensors] + [fact for fact in facts if fact not in card]
    if missing:
        raise ValueError(f"{kind} {path} lacks {', '.join(missing)}")
    return tensors, card


@contextlib.contextmanager
def making_sense(path: str | os.PathLike, kind: str, remedy: str) -> Iterator[None]:
    """Within, whatever goes wrong with the contents of a file becomes a ValueError of one line.

    Args:
        path: the file.
        kind: what it should hold.
        remedy: what to do about it.
    """
    try:
        yield
    except Exception as error:  # contents that are not what they should be raise almost anything
        raise ValueError(f"{kind} {path} is damaged ({reason(error, 200)}): {remedy}") from None


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int | str], dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise ValueError if a tensor is of another shape or dtype.

    Args:
        name: what it is called.
        tensor: it.
        shape: a letter stands for any size but 0.
        dtypes: those that will do, the usual one first.
    """
    fits = len(shape) == tensor.ndim and all(
        size == wanted or (size and isinstance(wanted, str)) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        wanted, found = (str(dtype).removeprefix("torch.") for dtype in (dtypes[0], tensor.dtype))
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be {wanted} [{sizes}], not {found} {list(tensor.shape)}")
