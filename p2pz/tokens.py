"""Which tokens of a caption belong to which of its words."""

from collections.abc import Mapping

import torch
from torch import Tensor

from p2pz.model import Model


def tokens_of(model: Model, prompt: str) -> list[int]:
    """A caption's tokens from start token to end token, cut to the encoder's length, without padding."""
    return model.tokenizer(prompt, truncation=True, max_length=model.tokenizer.model_max_length).input_ids


def weigh_tokens(model: Model, prompt: str, factors: Mapping[str, float]) -> Tensor:
    """Factors of a caption's tokens.

    Args:
        model: whose tokenizer to use.
        prompt: the caption.
        factors: word, or words in a row -> factor.

    Returns:
        `[77]`, 1 for all other tokens.

    Raises:
        ValueError: a word is not in the caption, or a factor not a finite number.
    """
    ids = tokens_of(model, prompt)
    ends = [True, *(name.endswith("</w>") for name in model.tokenizer.convert_ids_to_tokens(ids[1:]))]
    weights = torch.ones(model.tokenizer.model_max_length)
    for words, factor in factors.items():
        wanted = tokens_of(model, words)[1:-1]
        starts = [i for i in range(1, len(ids)) if ends[i - 1] and ids[i : i + len(wanted)] == wanted]
        if not wanted or not starts:
            raise ValueError(f'the caption "{prompt}" does not contain "{words}", whose maps are to be weighed')
        if not abs(factor) < float("inf"):
            raise ValueError(f'the factor of "{words}" must be a finite number, not {factor}')
        for i in starts:
            weights[i : i + len(wanted)] = factor
    return weights
