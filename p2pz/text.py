"""Text conditioning: sentences to the hidden states of Stable Diffusion's text encoder."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from p2pz.weights import CheckpointError, find_tensors

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


def load_text_encoder(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Load `tokenizer/` and `text_encoder/` of a checkpoint folder through transformers.

    Args:
        folder: a folder in the diffusers layout.

    Returns:
        The tokenizer, and the frozen encoder on the CPU in the file's dtype: its tensors are the memory-mapped file's.

    Raises:
        CheckpointError: a part is missing or does not fit; names it.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    if not any((folder / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise CheckpointError(
            f"{folder / 'tokenizer'} is missing or lacks vocab.json: a folder in the diffusers layout has it"
        )
    weights = find_tensors(folder / "text_encoder")
    try:
        with quiet_transformers():
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            dtypes = (tensor.dtype for tensor in load_file(weights).values() if tensor.is_floating_point())
            encoder, info = CLIPTextModel.from_pretrained(
                weights.parent,
                dtype=next(dtypes, None),  # the file's, so that its tensors stay mapped; config.json may name another
                variant="fp16" if weights.name.endswith(".fp16.safetensors") else None,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
                local_files_only=True,
            )
    except Exception as error:  # transformers raises a dozen kinds for files that are not what they should be
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"the text encoder in {folder} cannot be loaded: {reason}") from None
    harmless = ("position_ids", "text_projection.weight")  # a buffer of old files; the head of another model class
    wrong = {
        "lacks": sorted(info["missing_keys"]),
        "has left over": sorted(key for key in info["unexpected_keys"] if not key.endswith(harmless)),
        "has in another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    found = [f"{what} {', '.join(names[:5])}" for what, names in wrong.items() if names]
    if found:
        raise CheckpointError(f"the text encoder in {folder} does not fit its config.json: it {'; it '.join(found)}")
    if len(tokenizer) > encoder.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(tokenizer)} words, but its text encoder {encoder.config.vocab_size}"
        )
    tokenizer.model_max_length = encoder.config.max_position_embeddings
    return tokenizer, encoder.eval().requires_grad_(False)


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
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, sentences: Sequence[str], batch_size: int = 64
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
        padded = tokenizer(batch, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        states.append(encoder(padded.input_ids.to(encoder.device)).last_hidden_state)
    return torch.cat(states)
