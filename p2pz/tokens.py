"""Which tokens of a caption belong to which of its words, and where they stand."""

from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from p2pz.model import Model
from p2pz.text import check_text


def tokens_of(model: Model, prompt: str) -> list[int]:
    """A caption's tokens from start token to end token, cut to the encoder's length, without padding."""
    check_text(prompt)
    return model.tokenizer(prompt, truncation=True, max_length=model.tokenizer.model_max_length).input_ids


def words_of(model: Model, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
    """The words of a caption, and the places of their tokens in the padded caption.

    Args:
        model: whose tokenizer to use.
        prompt: the caption.
    """
    ids = tokens_of(model, prompt)
    pieces = model.tokenizer.convert_ids_to_tokens(ids[1:-1])
    words: list[tuple[str, tuple[int, ...]]] = []
    places: tuple[int, ...] = ()
    for place, piece in enumerate(pieces, start=1):
        places = (*places, place)
        if piece.endswith("</w>") or place == len(pieces):
            words.append((model.tokenizer.decode([ids[place] for place in places]).strip(), places))
            places = ()
    return words


def places_of(model: Model, prompt: str, words: str) -> list[int]:
    """Places of words in the padded caption, wherever they stand in it; 0 is the start token.

    Args:
        model: whose tokenizer to use.
        prompt: the caption.
        words: a word, or words in a row.

    Raises:
        ValueError: the caption does not contain them.
    """
    ids, wanted = tokens_of(model, prompt), tokens_of(model, words)[1:-1]
    ends = [True, *(name.endswith("</w>") for name in model.tokenizer.convert_ids_to_tokens(ids[1:]))]
    starts = [i for i in range(1, len(ids)) if ends[i - 1] and ids[i : i + len(wanted)] == wanted]
    if not wanted or not starts:
        raise ValueError(f'the caption "{prompt}" does not contain "{words}"')
    return sorted({i + offset for i in starts for offset in range(len(wanted))})


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
    weights = torch.ones(model.tokenizer.model_max_length)
    for words, factor in factors.items():
        if not isinstance(factor, Real) or not abs(factor) < float("inf"):
            raise ValueError(f'the factor of "{words}" must be a finite number, not {factor}')
        weights[places_of(model, prompt, words)] = factor
    return weights
