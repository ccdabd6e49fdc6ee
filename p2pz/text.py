"""Text conditioning: sentences to the hidden states of Stable Diffusion's text encoder."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from p2pz.weights import CheckpointError, find_tensors

if TYPE_CHECKING:  # importing transformers takes seconds: only when a model is loaded
    from transformers import CLIPTextModel, CLIPTokenizer


def load_text_encoder(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Load `tokenizer/` and `text_encoder/` of a checkpoint folder through transformers.

    Args:
        folder: a folder in the diffusers layout.

    Raises:
        CheckpointError: a part is missing or does not fit; names it.
    """
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    if not (folder / "tokenizer").is_dir():
        raise CheckpointError(f"{folder / 'tokenizer'} is missing: a checkpoint folder in the diffusers layout has it")
    find_tensors(folder / "text_encoder")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would print about the checkpoint is checked below
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        encoder, info = CLIPTextModel.from_pretrained(
            folder / "text_encoder", use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the text encoder in {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    finally:
        logging.set_verbosity(verbosity)
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise CheckpointError(
            f"the text encoder in {folder} lacks tensors that fit its config.json: {', '.join(wrong)}"
        )
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
        for sentence, ids in zip(batch, tokenizer(batch).input_ids, strict=True):
            if len(ids) > length:
                warnings.warn(f"only the first {length - 2} tokens count of: {sentence}", stacklevel=3)
        padded = tokenizer(batch, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        states.append(encoder(padded.input_ids.to(encoder.device)).last_hidden_state)
    return torch.cat(states)
