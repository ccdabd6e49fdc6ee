"""Reading a diffusers-style checkpoint folder: JSON configurations and safetensors files, strictly."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

Renames = tuple[tuple[str, str | None], ...]
"""Rows of (pattern of a name in the file, name in the module or None to drop it); the first match counts."""

VAE_RENAMES: Renames = (  # how Stable Diffusion 1.x folders, written before 2023, call the VAE's attention layers
    (r"(.*\.attentions\.0)\.query\.(.*)", r"\1.to_q.\2"),
    (r"(.*\.attentions\.0)\.key\.(.*)", r"\1.to_k.\2"),
    (r"(.*\.attentions\.0)\.value\.(.*)", r"\1.to_v.\2"),
    (r"(.*\.attentions\.0)\.proj_attn\.(.*)", r"\1.to_out.0.\2"),
)


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable or not what it should be; the message is one line for the user."""


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file of a checkpoint.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a checkpoint folder in the diffusers layout has it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read as JSON: it holds no object")
    return content


def find_tensors(folder: Path) -> Path:
    """The safetensors file of one component.

    Args:
        folder: the component's folder, such as `unet/`.

    Raises:
        CheckpointError: there is none; says so if there are only pickled weights, which p2pz refuses to open.
    """
    names = ("diffusion_pytorch_model", "model")
    for name in (f"{stem}{variant}.safetensors" for stem in names for variant in ("", ".fp16")):
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles:
        raise CheckpointError(
            f"{folder} has only {pickles[0]}, a pickle file that could run code when opened; "
            "convert it to safetensors first"
        )
    raise CheckpointError(f"{folder} has no diffusion_pytorch_model.safetensors")


def load_tensors(module: nn.Module, path: Path, renames: Renames = ()) -> None:
    """Fill a module, usually built on the meta device, with the tensors of a safetensors file, strictly and uncopied.

    Args:
        module: takes over the file's tensors, in the file's dtype.
        path: the safetensors file; it is memory-mapped.
        renames: rows that turn the file's names into the module's.

    Raises:
        CheckpointError: the file cannot be read, or tensors are missing, left over or of another shape; names them.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None
    tensors = rename(tensors, renames, path)

    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    found = [f"{len(names)} tensors {what} ({_shorten(names)})" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{path} does not fit the model its config.json describes: {'; '.join(found)}")
    module.load_state_dict(tensors, strict=True, assign=True)


def rename(tensors: dict[str, Any], renames: Renames, source: Path | str) -> dict[str, Any]:
    """Apply a table of renames; names that no row matches stay.

    Args:
        tensors: by name.
        renames: the table.
        source: for the error message.

    Raises:
        CheckpointError: two names become one.
    """
    renamed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        new: str | None = name
        for pattern, template in renames:
            match = re.fullmatch(pattern, name)
            if match:
                new = match.expand(template) if template is not None else None
                break
        if new in renamed:
            raise CheckpointError(f"{source} holds {new} twice, once as {name}")
        if new is not None:
            renamed[new] = tensor
    return renamed


def _shorten(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
