"""Checkpoint folders in the diffusers layout."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from p2pz.weights.foreign import check_config, check_parts, check_tensors, is_xl
from p2pz.weights.reading import (
    Checkpoint,
    CheckpointError,
    Component,
    IncompleteError,
    Renames,
    conversion,
    printable,
    read_json,
    read_tensors,
    rename,
)

VAE_RENAMES: Renames = (  # how Stable Diffusion 1.x folders, written before 2023, call the VAE's attention layers
    (r"(.*\.attentions\.0)\.query\.(.*)", r"\1.to_q.\2"),
    (r"(.*\.attentions\.0)\.key\.(.*)", r"\1.to_k.\2"),
    (r"(.*\.attentions\.0)\.value\.(.*)", r"\1.to_v.\2"),
    (r"(.*\.attentions\.0)\.proj_attn\.(.*)", r"\1.to_out.0.\2"),
)
TEXT_RENAMES: Renames = (
    (r"(?:.*\.)?position_ids", None),  # a buffer of old files
    (r"(?:.*\.)?text_projection\.weight", None),  # the head of another model class
    (r"text_model\.(.*)", r"\1"),
)
TEXT_2_RENAMES: Renames = (TEXT_RENAMES[0], TEXT_RENAMES[2])  # whose text_projection is wanted
LAYERS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")  # settings that count them
COMPONENTS = {"unet": (), "vae": VAE_RENAMES, "text_encoder": TEXT_RENAMES}
XL_COMPONENTS = COMPONENTS | {"text_encoder_2": TEXT_2_RENAMES}


def open_folder(folder: Path) -> Checkpoint:
    """Read a folder in the diffusers layout: `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`, and for SDXL
    `text_encoder_2/` and `tokenizer_2/`.

    Args:
        folder: the folder.

    Raises:
        CheckpointError: a part is missing or unreadable, or the model is of another family; names it.
    """
    names = {path.name for path in folder.iterdir()}
    pipeline = read_json(folder / "model_index.json") if "model_index.json" in names else {}
    check_config(pipeline, folder)
    check_parts(names, folder)
    single = sorted(name for name in names if name.endswith(".safetensors"))
    if single and "unet" not in names:
        if len(single) == 1:
            check_tensors(read_tensors(folder / single[0]).keys(), folder / single[0])
        raise CheckpointError(f"{folder} has no unet folder; to load a single file, give {folder / single[0]}")
    unet = read_json(folder / "unet/config.json")
    check_config(unet, folder)
    components = {}
    for part, renames in (XL_COMPONENTS if is_xl(unet) or "text_encoder_2" in names else COMPONENTS).items():
        config_path = folder / part / "config.json"
        config = read_json(config_path)
        path = find_tensors(folder / part)
        tensors = rename(read_tensors(path), renames, path)
        check_layers(config, len(tensors), config_path)
        components[part] = Component(path, config_path, str(config_path), config, tensors)
    return Checkpoint(
        path=folder,
        tokenizer=folder / "tokenizer",
        tokenizer_2=folder / "tokenizer_2" if "text_encoder_2" in components else None,
        scheduler=folder / "scheduler" / "scheduler_config.json",
        zeros_for_nothing=pipeline.get("force_zeros_for_empty_prompt") is not False,
        **components,
    )


def check_layers(config: dict[str, Any], tensors: int, path: Path) -> None:
    """Raise CheckpointError if a `config.json` asks for more layers than there are tensors: it would take for ever."""
    few, layers = f"but the weights beside it are {tensors} tensors only", 1
    for key in LAYERS:
        counts = config.get(key)
        counts = counts if isinstance(counts, list) else [counts]
        most = max((count for count in counts if isinstance(count, int) and count > 0), default=1)
        layers *= most  # of one kind within those of another
        if layers > tensors:
            raise CheckpointError(f"{path}: {key} is {most}, {few}")
    for key, value in config.items():  # some lists have an entry for each level, and it so many layers
        if isinstance(value, list) and len(value) * layers > tensors:
            raise CheckpointError(f"{path}: {printable(key)} has the length {len(value)}, {few}")


def choose_tensors(names: Collection[str]) -> str | None:
    """Which of a component's files holds its tensors: in full precision if there is a choice.

    Args:
        names: of all its files.

    Returns:
        A safetensors file or the index of several; None if there is neither.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"):
                if name in names:
                    return name
    return None


def find_tensors(folder: Path) -> Path:
    """The safetensors file of one component, or the index of several.

    Args:
        folder: the component's folder, such as `unet/`.

    Raises:
        IncompleteError: there is none; names variants that p2pz does not look for, and pickles, which it does not open.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    chosen = choose_tensors(names)
    if chosen:
        return folder / chosen
    others = sorted(name for name in names if ".safetensors" in name)
    if others:
        raise IncompleteError(
            f"{folder} has no diffusion_pytorch_model.safetensors or model.safetensors, and no fp16 variant, but "
            f"{printable(', '.join(others))}: take the variant out of the name of the one you want"
        )
    pickles = sorted(name for name in names if name.endswith(".bin"))
    if pickles:
        raise IncompleteError(
            f"{folder} has only {pickles[0]}, a pickle file that could run code when opened; "
            f"convert it to safetensors first: {conversion(folder / pickles[0])}"
        )
    raise IncompleteError(
        f"{folder} has no diffusion_pytorch_model.safetensors or model.safetensors: "
        "a checkpoint folder in the diffusers layout has one of them"
    )
