"""Checkpoints and CLIP's tokenizer from the Hugging Face hub: the local cache first, then the network."""

import re
from collections.abc import Collection
from pathlib import Path

from p2pz.weights.folder import COMPONENTS, XL_COMPONENTS, choose_tensors, open_folder
from p2pz.weights.foreign import check_config, check_parts
from p2pz.weights.reading import PICKLES, Checkpoint, CheckpointError, IncompleteError, printable, read_json

TOKENIZER = "openai/clip-vit-large-patch14"
"""Whose tokenizer Stable Diffusion 1.x uses; 2.x has the same words and pads with another."""
TOKENIZER_FILES = ("vocab.json", "merges.txt")


class NoTokenizerError(CheckpointError):
    """A single file's tokenizer is not at hand."""


def is_hub_id(source: str) -> bool:
    """Whether a source has the form of the hub's `owner/name`."""
    name = r"[A-Za-z0-9][\w.-]*"
    return bool(re.fullmatch(f"{name}/{name}", source)) and not source.endswith((".safetensors", *PICKLES))


def open_from_hub(repository: str) -> Checkpoint:
    """Read a folder in the diffusers layout from the hub's local cache; only what is not there is downloaded.

    Args:
        repository: its name, `owner/name`.

    Raises:
        CheckpointError: it is neither in the cache nor to be had, or it is of another family.
    """
    cached = _cached(repository, "unet/config.json")
    if cached is None:
        return open_folder(_download(repository, "it is not in the local cache"))
    try:
        checkpoint = open_folder(cached.parent.parent)
        for tokenizer in filter(None, (checkpoint.tokenizer, checkpoint.tokenizer_2)):
            if not all((tokenizer / name).is_file() for name in TOKENIZER_FILES):
                read_json(tokenizer / "tokenizer.json")  # which holds both
        read_json(checkpoint.scheduler)
        return checkpoint
    except IncompleteError as error:
        return open_folder(_download(repository, f"the local cache does not hold all of it ({error})"))


def find_tokenizer() -> Path:
    """Folder of CLIP's tokenizer, from the hub's local cache, or else downloaded.

    Raises:
        NoTokenizerError: it is neither in the cache nor to be had; says how to go on.
    """
    from huggingface_hub import HfApi, hf_hub_download

    paths = [_cached(TOKENIZER, name) for name in TOKENIZER_FILES]
    if paths[0] is not None and paths[1] is not None:
        return paths[0].parent
    try:
        HfApi().model_info(TOKENIZER, timeout=10)  # without a network it fails at once, the download after 23 seconds
        for name in TOKENIZER_FILES:
            path = Path(hf_hub_download(TOKENIZER, name))
        return path.parent
    except Exception as error:  # the hub's client has a dozen kinds for a network that does not work
        raise NoTokenizerError(
            "a single file has no tokenizer: give a folder with vocab.json and merges.txt, for instance the tokenizer "
            "folder of any Stable Diffusion, as tokenizer=... (--tokenizer); "
            f"{TOKENIZER} is not in the local cache, and the hub cannot be reached ({_reason(error)})"
        ) from None


def needed_files(names: Collection[str], repository: str) -> list[str]:
    """The files of a repository that a folder in the diffusers layout needs.

    Args:
        names: all its files.
        repository: for the error message.

    Raises:
        CheckpointError: it is no such folder, of another family, or has its weights as pickles only.
    """
    folders = {name.split("/")[0] for name in names}
    check_parts(folders, repository)
    parts = XL_COMPONENTS if "text_encoder_2" in folders else COMPONENTS
    files = [name for name in names if re.fullmatch(r"tokenizer(_2)?/[\w.]+\.(json|txt)", name)]
    files += ["scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)]
    for part in parts:
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        chosen = choose_tensors(inside)
        if chosen is None:
            single = [name for name in sorted(names) if "/" not in name and name.endswith(".safetensors")]
            advice = f"; download one of {', '.join(single)} and give that file" if single else ""
            raise CheckpointError(f"{repository} on the hub has no {part} as safetensors{advice}")
        files.append(f"{part}/{chosen}")
        if chosen.endswith(".json"):  # in shards, of one variant or another
            variant = ".fp16" in chosen
            files += [f"{part}/{name}" for name in inside if "-of-" in name and (".fp16" in name) == variant]
    return files


def _cached(repository: str, name: str) -> Path | None:
    """Path of a file in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, name)
    return Path(path) if isinstance(path, str) else None


def _download(repository: str, why: str) -> Path:
    """Folder with all needed files of a repository."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        listing = HfApi().model_info(repository, timeout=10).siblings
        names = {file.rfilename for file in listing}
        for name in sorted({"model_index.json", "unet/config.json"} & names):  # other families, before their weights
            check_config(read_json(Path(hf_hub_download(repository, name))), repository)
        files = needed_files(names, repository)
        return Path(snapshot_download(repository, allow_patterns=files))
    except CheckpointError:
        raise
    except RepositoryNotFoundError:  # gated ones too
        raise CheckpointError(
            f"model {repository} is no folder here, and the hub has no such model or does not let you read it: check "
            "the name, and log in (hf auth login) if you have been granted access"
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"model {repository} is no folder here; on the hub, {why}, and the hub cannot be reached "
            f"({_reason(error)}): go online once, or give a folder or a file"
        ) from None


def _reason(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}", 160)
