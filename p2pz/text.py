"""Text conditioning: sentences to the hidden states of Stable Diffusion's text encoder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2pz.engine import Graphs, Tensors
from p2pz.weights import CheckpointError, Component, fill, printable, read_number, reason

if TYPE_CHECKING:  # importing transformers takes seconds: only when a model is loaded
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' reports and progress bars; what it would say about a checkpoint is checked by us."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_pretrained(kind: Any, place: str | os.PathLike, **options: Any) -> nn.Module:
    """A whole model through transformers' `kind.from_pretrained`; no pickle is opened, and no code of the folder's run.

    Args:
        kind: a class of transformers.
        place: a folder, or a name on the hub.
        options: for `from_pretrained`.

    Returns:
        The frozen model.

    Raises:
        ValueError: weights are missing. Transformers raises a dozen other kinds.
    """
    model, info = kind.from_pretrained(
        place, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
    )
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {', '.join(sorted(info['missing_keys'])[:5])}")
    return model.eval().requires_grad_(False)


_SIZES = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "projection_dim",
)


def load_text_encoder(component: Component, projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Build transformers' text encoder on a checkpoint's tensors.

    Args:
        component: the text encoder of a checkpoint.
        projection: it is SDXL's second one, which also projects pooled states.

    Returns:
        The frozen encoder on the CPU in the file's dtype: its tensors are the memory-mapped file's.

    Raises:
        CheckpointError: it is of another kind, or its tensors do not fit; names the file and the tensors.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = component.config
    kind = printable(str(config.get("model_type", "clip_text_model")))
    if kind != "clip_text_model":
        raise CheckpointError(f"{component.config_path} describes no CLIP text encoder, but one of type {kind}")
    try:
        settings = {key: read_number(config, key) for key in _SIZES if key in config}
        settings |= {  # and no others: some of transformers' change the form of the answer
            "hidden_act": config.get("hidden_act", "quick_gelu"),
            "layer_norm_eps": read_number(config, "layer_norm_eps", 1e-5, 1e-12, 1),
            "eos_token_id": read_number(config, "eos_token_id", 49407, 0),
        }
        with quiet_transformers(), torch.device("meta"):
            model_type = CLIPTextModelWithProjection if projection else CLIPTextModel
            encoder = model_type(CLIPTextConfig(**settings))
    except Exception as error:  # transformers raises a dozen kinds for settings that are not what they should be
        raise CheckpointError(f"{component.config_path} describes no text encoder: {reason(error)}") from None
    body = getattr(encoder, "text_model", encoder)  # before transformers 5.6 the model had one inside
    if projection:
        tensors = {  # with the prefix that the files of one text encoder may lack
            name if name.startswith("text_projection.") else f"text_model.{name}": tensor
            for name, tensor in component.tensors.items()
        }
        fill(encoder, tensors, component.path, component.layout)
    else:
        fill(body, component.tensors, component.path, component.layout)
    body.embeddings.position_ids = torch.arange(encoder.config.max_position_embeddings)[None]  # in no file
    return encoder.eval().requires_grad_(False)


def load_tokenizer(folder: Path, encoder: nn.Module, pad_token: str | None = None) -> CLIPTokenizer:
    """Load a tokenizer through transformers.

    Args:
        folder: with `vocab.json` and `merges.txt`, or `tokenizer.json`.
        encoder: what it is for.
        pad_token: what sentences are padded with; None: what the folder says.

    Raises:
        CheckpointError: a file is missing or unreadable, or the tokenizer is not the encoder's.
    """
    from transformers import CLIPTokenizer

    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise CheckpointError(f"{folder} is missing or lacks vocab.json: the folder of CLIP's tokenizer has it")
    settings = {} if pad_token is None else {"pad_token": pad_token}
    try:
        with quiet_transformers():
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:  # as above
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {reason(error)}") from None
    words, known = len(tokenizer), encoder.config.vocab_size
    if words > known or (pad_token is not None and words != known):
        raise CheckpointError(f"the tokenizer in {folder} has {words} words, but the text encoder {known}")
    last = max(tokenizer.get_vocab().values())
    if last >= known:
        raise CheckpointError(f"the tokenizer in {folder} numbers words up to {last}, but the text encoder has {known}")
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"the tokenizer in {folder} has no pad_token to fill short sentences with")
    tokenizer.model_max_length = encoder.config.max_position_embeddings
    return tokenizer


def fingerprint(*modules: nn.Module) -> str:
    """Short name of the weights of modules, the same for the float16 and the float32 file of one checkpoint.

    Training, or merging a LoRA, changes every number of the parameters that it touches, so the first ones of each tell:
    a page of the file for each.

    Args:
        modules: text encoders, or others; freshly loaded, not yet converted to another dtype.
    """
    digest = hashlib.sha256()
    for module in modules:
        for _, parameter in sorted(module.named_parameters()):
            digest.update(parameter.detach().reshape(-1)[:64].half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_text(text: Any) -> None:
    """Raise ValueError for anything but text that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"a text is needed, not {printable(repr(text), 100)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"this text is not valid Unicode (UTF-8): {printable(repr(text), 100)}") from None


def _tokens(tokenizer: CLIPTokenizer, sentences: list[str], device: torch.device, warn: bool = True) -> Tensor:
    """Sentences as numbers `[n, 77]`, padded or cut; a cut is warned of.

    Nothing waits for the copy to the device, so that the next batch is read while this one is encoded.
    """
    length = tokenizer.model_max_length
    with quiet_transformers():  # it would warn of long sentences too
        all_ids = tokenizer(sentences).input_ids
    for sentence, ids in zip(sentences, all_ids, strict=True):
        if warn and len(ids) > length:
            warnings.warn(f"only the first {length - 2} tokens count of: {printable(sentence, 200)}", stacklevel=4)
    padding = [tokenizer.pad_token_id] * length
    rows = [[*ids[: length - 1], ids[-1]] if len(ids) > length else (ids + padding)[:length] for ids in all_ids]
    return torch.tensor(rows).to(device, non_blocking=True)


def _batches(sentences: Sequence[str], size: int) -> list[list[str]]:
    """Sentences, `size` at a time. Raises ValueError if there are none."""
    if not sentences:
        raise ValueError("there are no sentences to encode: give at least one")
    return [list(sentences[start : start + size]) for start in range(0, len(sentences), size)]


@torch.no_grad()
def encode_text(
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    sentences: Sequence[str],
    graphs: Graphs,
    batch_size: int = 32,
) -> Tensor:
    """Hidden states of sentences, padded or cut to the encoder's context length.

    Args:
        tokenizer, encoder: of one checkpoint.
        sentences: at least one.
        graphs: record full batches and single sentences, for on a GPU the encoder's launches take longer than its work.
        batch_size: sentences per forward pass.

    Returns:
        `[len(sentences), 77, d]`, device and dtype of the encoder: the last layer's states after its layer norm.

    Raises:
        ValueError: no sentences.
    """

    def last_states(tokens: Tensor) -> Tensors:
        return [encoder(tokens).last_hidden_state]

    states = []
    for batch in _batches(sentences, batch_size):
        tokens = [_tokens(tokenizer, batch, encoder.device)]
        often = len(batch) in (1, batch_size)
        states += graphs.call(("text", id(encoder)), last_states, tokens) if often else last_states(*tokens)
    return torch.cat(states)


@torch.no_grad()
def encode_text_twice(
    tokenizers: Sequence[CLIPTokenizer], encoders: nn.ModuleList, sentences: Sequence[str], batch_size: int = 64
) -> Tensor:
    """What SDXL's UNet is told of sentences by its two text encoders.

    The tokens' states are what enters the last layer of each encoder, side by side. Its residual blocks are told the
    projection of the second encoder's pooled states too. This is kept as one row more, zeros behind it, so that
    captions and directions are single tensors in every family; `UNet.condition` takes it off again.

    Args:
        tokenizers, encoders: two each, of one checkpoint.
        sentences: at least one.
        batch_size: sentences per forward pass.

    Returns:
        `[len(sentences), 77 + 1, d]`, device and dtype of the encoders, d the sum of their widths.

    Raises:
        ValueError: no sentences.

    Source: Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023),
    section 2.1.
    """
    states = []
    for batch in _batches(sentences, batch_size):
        first, second = (
            encoder(_tokens(tokenizer, batch, encoder.device, i == 0), output_hidden_states=True)
            for i, (tokenizer, encoder) in enumerate(zip(tokenizers, encoders, strict=True))
        )
        tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled = F.pad(second.text_embeds, (0, tokens.shape[-1] - second.text_embeds.shape[-1]))
        states.append(torch.cat([tokens, pooled[:, None]], dim=1))
    return torch.cat(states)
