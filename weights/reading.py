"""Reading safetensors files into modules: memory-mapped, strict, and with an error that names what is wrong."""

import json
import re
import shlex
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Renames = tuple[tuple[str, str | tuple[str, ...] | None], ...]
"""Rows of (pattern of a name in the file, name in the module); the first match counts.

Several names share the tensor's equal parts along its first axis; None drops it.
"""

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
"""A class that the first Stable Diffusion files mention; an empty one can stand for it."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable or not what it should be; the message is one line for the user."""


class IncompleteError(CheckpointError):
    """A file of a checkpoint is missing or cannot be read: from elsewhere, such as the hub, it may be had whole."""


@dataclass(frozen=True)
class Component:
    """Weights of one module and what they are meant for.

    Attributes:
        path: the file, or index of several files, that the tensors are from.
        config_path: the file that `config` is from.
        layout: what the tensors have to fit, for messages.
        config: what `config.json` says of the module in the diffusers layout.
        tensors: memory-mapped, by the module's names.
    """

    path: Path
    config_path: Path
    layout: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A Stable Diffusion on disk, whatever its layout.

    Attributes:
        path: the folder or file.
        unet, vae, text_encoder: its modules.
        tokenizer: folder of the tokenizer; None: the file has none, it is CLIP's.
        pad_token: what short sentences are padded with; None: what the tokenizer's folder says.
        scheduler: the file that describes the noise schedule; None: it is Stable Diffusion's.
        prediction_type: what the UNet predicts; None: the scheduler's file says it, or nothing does.
        text_encoder_2, tokenizer_2, pad_token_2: the same of the second text encoder, which only SDXL has.
        zeros_for_nothing: whether zeros stand for an empty negative prompt, which only SDXL knows.
    """

    path: Path
    unet: Component
    vae: Component
    text_encoder: Component
    tokenizer: Path | None = None
    pad_token: str | None = None
    scheduler: Path | None = None
    prediction_type: str | None = None
    text_encoder_2: Component | None = None
    tokenizer_2: Path | None = None
    pad_token_2: str | None = None
    zeros_for_nothing: bool = True


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file of a checkpoint.

    Args:
        path: the file.

    Raises:
        IncompleteError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteError(f"{path} is missing: a checkpoint folder in the diffusers layout has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise IncompleteError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise IncompleteError(f"{path} cannot be read as JSON: it holds no object")
    return content


def read_number(
    config: dict[str, Any], key: str, default: float | None = None, least: float = 1, most: float = 2**30
) -> Any:
    """A number of a `config.json`, which must be whole if `least` is.

    Args:
        config: the parsed file.
        key: its name.
        default: where the file does not have it; None: it must.
        least, most: what is sensible.

    Raises:
        KeyError: it is not there.
        ValueError: it is another thing, or beyond the limits; names it.
    """
    value = config[key] if default is None else config.get(key, default)
    kinds = (int,) if isinstance(least, int) else (int, float)
    if type(value) not in kinds or not least <= value <= most:
        whole = "whole " if len(kinds) == 1 else ""
        raise ValueError(f"its {key} is {printable(repr(value))}, but must be a {whole}number from {least} to {most}")
    return value


def read_numbers(config: dict[str, Any], key: str, levels: int = 0, default: int | None = None) -> tuple[int, ...]:
    """A whole number for each level of a module; `levels`: how many, a single number then stands for all.

    Raises KeyError and ValueError as `read_number` does.
    """
    value = config[key] if default is None else config.get(key, default)
    values = value if isinstance(value, (list, tuple)) else [value] * levels
    if not values or len(values) != (levels or len(values)):
        raise ValueError(f"its {key} is {printable(repr(value))}, but must be a list of {levels or 'whole'} numbers")
    return tuple(read_number({key: each}, key) for each in values)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of the files that an index names, memory-mapped.

    Args:
        path: a safetensors file, or a `*.safetensors.index.json`.

    Raises:
        IncompleteError: a file is missing or unreadable.
        CheckpointError: it is a pickle, which could run code.
    """
    if path.suffix == ".json":
        return _read_shards(path)
    try:
        return load_file(path)
    except Exception as error:  # hostile files find many ways to fail
        if path.is_file() and _is_pickle(path):
            raise CheckpointError(
                f"{path} is a pickle, which could run any code when opened, so p2pz does not open it; "
                f"convert it once: {conversion(path)}"
            ) from None
        raise IncompleteError(f"{path} cannot be read as safetensors: {printable(str(error), 200)}") from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} is no index of safetensors files: it has no weight_map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        if name != Path(name).name:
            raise CheckpointError(f"{index} names a file outside its folder: {printable(name)}")
        shard = read_tensors(index.parent / name)
        twice = shard.keys() & tensors.keys()
        if twice:
            raise CheckpointError(f"{index.parent / name} holds {_shorten(sorted(twice))} that another shard holds too")
        tensors.update(shard)
    return tensors


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    return path.suffix.lower() in PICKLES or start == b"PK\x03\x04" or start[:1] == b"\x80"


def conversion(path: Path) -> str:
    """The command that turns a pickle, or all shards of one, into the safetensors file that p2pz looks for."""
    shards = sorted(path.parent.glob(re.sub(r"-\d{5}-of-", "-?????-of-", escape(path.name))))
    stem = re.sub(r"^pytorch_(?=model\b)|-\d{5}-of-\d{5}", "", path.stem)  # text encoders' files lose the "pytorch"
    sources, target = json.dumps([*map(str, shards)]), json.dumps(str(path.with_name(f"{stem}.safetensors")))
    code = (
        "import torch; from safetensors.torch import save_file; "
        f'torch.serialization.add_safe_globals([(type("X", (), {{}}), "{LIGHTNING}")]); '
        f'x = [torch.load(path, map_location="cpu", weights_only=True) for path in {sources}]; '
        'x = {k: v for part in x for k, v in part.get("state_dict", part).items() if torch.is_tensor(v)}; '
        f"save_file({{k: v.contiguous().clone() for k, v in x.items()}}, {target})"
    )
    return f"python -c {shlex.quote(code)}"


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
        new: dict[str, Any] = {name: tensor}
        for pattern, template in renames:
            match = re.fullmatch(pattern, name)
            if match:
                if isinstance(template, tuple):
                    parts = tensor.chunk(len(template)) if tensor.ndim else ()
                    new = {match.expand(each): part for each, part in zip(template, parts, strict=False)}
                else:
                    new = {} if template is None else {match.expand(template): tensor}
                break
        for each in new.keys() & renamed.keys():
            raise CheckpointError(f"{source} holds {printable(each)} twice, once as {printable(name)}")
        renamed.update(new)
    return renamed


def fill(module: nn.Module, tensors: dict[str, Tensor], path: Path, layout: str = "its config.json") -> None:
    """Give a module, usually built on the meta device, its tensors, strictly and uncopied.

    Args:
        module: takes over the tensors, in their dtype.
        tensors: by the module's names. A 1x1 convolution serves as the linear layer that it is.
        path: the file they are from, for the error message.
        layout: what the tensors have to fit, for the error message.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape or not of floating point; names them.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tensors = {
        name: tensor[:, :, 0, 0] if tuple(tensor.shape) == (*expected.get(name, ()), 1, 1) else tensor
        for name, tensor in tensors.items()
    }
    both = [name for name in expected if name in tensors]
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} {_shape(tensors[name])} instead of {expected[name]}"
            for name in both
            if tuple(tensors[name].shape) != expected[name]
        ],
        "not of floating point": [
            f"{name} {str(tensors[name].dtype).removeprefix('torch.')}"
            for name in both
            if tensors[name].dtype not in FLOATS
        ],
    }
    found = [f"{len(names)} tensors {what} ({_shorten(names)})" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{path} does not fit {layout}: {'; '.join(found)}")
    module.load_state_dict(tensors, strict=True, assign=True)


def reason(error: Exception, most: int = 1000) -> str:
    """What an exception says, in one line; its type if that is nothing."""
    return printable(str(error), most) or type(error).__name__


def printable(text: str, most: int = 100) -> str:
    """Text of a file in one short line without control characters."""
    text = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return text if len(text) <= most else f"{text[:most]}..."


def _shorten(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + rest


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape)) if tensor.ndim < 8 else f"of {tensor.ndim} axes"
