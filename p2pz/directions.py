"""Concept directions: the difference between the mean text states of two sets of sentences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from p2pz.engine import explain_out_of_memory
from p2pz.files import load_tensors, save_tensors
from p2pz.model import Model, load

Sentences = Sequence[str] | str | os.PathLike
"""A list of sentences, or the path of a text file with one sentence on each line."""

# Words that name a medium: a direction between two of them changes the style, not the subject.
_MEDIA = ("photo", "photograph", "sketch", "drawing", "painting", "pastel", "watercolor", "watercolour", "cartoon")

_PLACES = ("", " in a meadow", " on the beach", " in the snow", " at night", " in a room", " in the city")
_SUBJECT_TEMPLATES = tuple(
    f"{medium} of {{}}{place}{thing}"
    for medium in ("a photo", "a sketch", "an oil pastel")
    for place, things in zip(
        _PLACES,
        (
            ("",),
            ("", " near a tree", " under the sun"),
            ("", " near a palm tree", " near a ball"),
            ("", " near a house", " near a tree"),
            ("", " under the moon", " near a house"),
            ("", " by a window", " near a lamp"),
            ("", " near a car", " near a lamp"),
        ),
        strict=True,
    )
    for thing in things
)
_MEDIUM_TEMPLATES = tuple(
    f"{{}} of {subject}{place}"
    for subject in ("a cat", "a dog", "a horse", "a zebra", "a rabbit", "a bear", "a cat with glasses")
    for place in _PLACES
)


@dataclass(frozen=True)
class Direction:
    """What to add to every token of a caption's text states to change a concept.

    Attributes:
        states: `[77, d]` float32 on the CPU.
        source, target: the concepts in words; empty if it was made from sentences alone.
        sentences: how many sentences each side was averaged over.
        text_fingerprint: the text encoder it was made with; it means nothing to another.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), section 3.2.
    """

    states: Tensor
    source: str
    target: str
    sentences: tuple[int, int]
    text_fingerprint: str

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            path: for instance `cat2dog.safetensors`.

        Raises:
            ValueError: the place cannot be written to.
        """
        card = {
            "source": self.source,
            "target": self.target,
            "sentences": "{} {}".format(*self.sentences),
            "text_fingerprint": self.text_fingerprint,
        }
        save_tensors(path, "direction", {"states": self.states}, card)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Direction:
        """Read a file that `save` wrote.

        Args:
            path: the file.

        Raises:
            ValueError: it is missing or is no direction.
        """
        facts = ("source", "target", "sentences", "text_fingerprint")
        tensors, card = load_tensors(path, "direction", ("states",), facts)
        counts = tuple(int(count) for count in card["sentences"].split())
        return cls(tensors["states"], card["source"], card["target"], counts, card["text_fingerprint"])

    def check_fits(self, model: Model) -> None:
        """Raise ValueError if the direction was made with another text encoder than the model's."""
        if self.text_fingerprint != model.text_fingerprint:
            raise ValueError(
                f"this direction was made with another text encoder ({self.text_fingerprint}) than the model's "
                f"({model.text_fingerprint}): make it again with direction(..., model=model)"
            )


@explain_out_of_memory
def direction(
    source: str = "",
    target: str = "",
    *,
    sentences: tuple[Sentences, Sentences] | None = None,
    model: Model | None = None,
) -> Direction:
    """Make a direction from words or from sentences.

    Args:
        source, target: concepts such as "cat" and "dog", "cat" and "cat with glasses", "sketch" and "oil pastel"; they
            are put into a built-in bank of sentences.
        sentences: sentences about the source and about the target to use instead of the bank: two lists, or two text
            files with a sentence on each line.
        model: whose text encoder to use; None loads the default model.

    Returns:
        The direction.

    Raises:
        ValueError: a word or a list of sentences is empty, the words are the same, or a file cannot be read.
    """
    if sentences is None:
        source, target = source.strip(), target.strip()
        if not source or not target:
            raise ValueError('a direction needs two concepts, such as direction("cat", "dog")')
        if source == target:
            raise ValueError(f'a direction from "{source}" to itself changes nothing')
        sentences = bank_sentences(source, target)
    lists = [read_sentences(side, name) for side, name in zip(sentences, ("source", "target"), strict=True)]
    model = model or load()
    means = [model.encode_text(side).float().mean(0) for side in lists]
    counts = (len(lists[0]), len(lists[1]))
    return Direction((means[1] - means[0]).cpu(), source, target, counts, model.text_fingerprint)


def parse_direction(words: str) -> tuple[str, str]:
    """Split "cat->dog" into "cat" and "dog". Raises ValueError if it does not have that form."""
    sides = words.replace("→", "->").split("->")
    if len(sides) != 2 or not all(side.strip() for side in sides):
        raise ValueError(f'a direction in words looks like "cat->dog", not {words!r}')
    return sides[0].strip(), sides[1].strip()


def is_medium(concept: str) -> bool:
    """Whether a concept names a medium ("oil pastel") rather than a subject ("cat with glasses")."""
    return concept.split()[-1].lower() in _MEDIA if concept.split() else False


def with_article(noun: str) -> str:
    """ "a cat", "an oil pastel"; words that bring an article keep it."""
    if noun.split()[0].lower() in ("a", "an", "the"):
        return noun
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def bank_sentences(source: str, target: str) -> tuple[list[str], list[str]]:
    """The built-in sentences about two concepts, pairwise alike but for the concept."""
    templates = _MEDIUM_TEMPLATES if is_medium(source) and is_medium(target) else _SUBJECT_TEMPLATES
    return tuple([template.format(with_article(concept)) for template in templates] for concept in (source, target))


def source_prompt(source: str) -> str:
    """The caption to assume for an image of which only the source concept is known."""
    if not source:
        return "a photo"
    return with_article(source) if is_medium(source) else f"a photo of {with_article(source)}"


def read_sentences(sentences: Sentences, name: str) -> list[str]:
    """The sentences of a list or of a text file, without empty ones; `name` says whose, for the error message.

    Raises:
        ValueError: the file cannot be read, or there are none.
    """
    if isinstance(sentences, (str, os.PathLike)):
        try:
            sentences = Path(sentences).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the {name} sentences cannot be read: {error}") from None
    kept = [sentence.strip() for sentence in sentences if sentence.strip()]
    if not kept:
        raise ValueError(f"there are no {name} sentences: give at least one")
    return kept
