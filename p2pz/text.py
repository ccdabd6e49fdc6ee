"""Text conditioning: sentences to the hidden states of Stable Diffusion's text encoder."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from p2pz.weights import CheckpointError, Component, fill

if TYPE_CHECKING:  # importing transformers takes seconds: only when a model is loaded
    from transformers import CLIPTextModel, CLIPTokenizer


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


def load_text_encoder(component: Component) -> CLIPTextModel:
    """Build transformers' text encoder on a checkpoint's tensors.

    Args:
        component: the text encoder of a checkpoint.

    Returns:
        The frozen encoder on the CPU in the file's dtype: its tensors are the memory-mapped file's.

    Raises:
        CheckpointError: it is of another kind, or its tensors do not fit; names the file and the tensors.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    kind = component.config.get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise CheckpointError(f"{component.config_path} describes no CLIP text encoder, but one of type {kind}")
    try:
        with quiet_transformers(), torch.device("meta"):
            encoder = CLIPTextModel(CLIPTextConfig.from_dict(component.config))
    except Exception as error:  # transformers raises a dozen kinds for settings that are not what they should be
        raise CheckpointError(f"{component.config_path} describes no text encoder: {_reason(error)}") from None
    body = getattr(encoder, "text_model", encoder)  # before transformers 5.6 the model had one inside
    fill(body, component.tensors, component.path, component.layout)
    body.embeddings.position_ids = torch.arange(encoder.config.max_position_embeddings)[None]  # in no file
    return encoder.eval().requires_grad_(False)


def load_tokenizer(folder: Path, encoder: CLIPTextModel, pad_token: str | None = None) -> CLIPTokenizer:
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
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {_reason(error)}") from None
    words, known = len(tokenizer), encoder.config.vocab_size
    if words > known or (pad_token is not None and words != known):
        raise CheckpointError(f"the tokenizer in {folder} has {words} words, but the text encoder {known}")
    tokenizer.model_max_length = encoder.config.max_position_embeddings
    return tokenizer


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fingerprint(encoder: CLIPTextModel) -> str:
    """Short name of a text encoder's weights, the same for the float16 and the float32 file of one checkpoint.

    Args:
        encoder: freshly loaded, not yet converted to another dtype.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(encoder.named_parameters()):
        if name.endswith(("layer_norm2.weight", "final_layer_norm.bias", "position_embedding.weight")):
            digest.update(parameter.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_text(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, sentences: Sequence[str], batch_size: int = 128
) -> Tensor:
    """Hidden states of sentences, padded or cut to the encoder's context length.

    Args:
        tokenizer, encoder: of one checkpoint.
        sentences: at least one.
        batch_size: sentences per forward pass.

    Returns:
        `[len(sentences), 77, d]`, device and dtype of the encoder: the last layer's states after its layer norm.

    Raises:
        ValueError: no sentences.
    """
    if not sentences:
        raise ValueError("there are no sentences to encode: give at least one")
    length = tokenizer.model_max_length
    states = []
    for start in range(0, len(sentences), batch_size):
        batch = list(sentences[start : start + batch_size])
        with quiet_transformers():  # it would warn of long sentences too
            all_ids = tokenizer(batch).input_ids
        for sentence, ids in zip(batch, all_ids, strict=True):
            if len(ids) > length:
                warnings.warn(f"only the first {length - 2} tokens count of: {sentence}", stacklevel=3)
        padding = [tokenizer.pad_token_id] * length
        rows = [[*ids[: length - 1], ids[-1]] if len(ids) > length else (ids + padding)[:length] for ids in all_ids]
        states.append(encoder(torch.tensor(rows).to(encoder.device)).last_hidden_state)
    return torch.cat(states)
