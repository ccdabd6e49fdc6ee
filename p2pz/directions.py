"""Concept directions: the difference between the mean text states of two sets of sentences."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pz.engine import explain_out_of_memory
from p2pz.files import FLOATS, check_tensor, load_tensors, making_sense, save_tensors
from p2pz.model import Model, loaded
from p2pz.sentences import (
    LanguageModel,
    Sentences,
    bank_sentences,
    is_medium,
    read_sentences,
    source_prompt,
    without_article,
    write_sentences,
)

CLEARLY = 2.5
"""A direction is within the noise unless its norm is at least this multiple of its standard error. At that length its
cosine to the direction of endlessly many such sentences is about sqrt(1 - 1 / 2.5^2) = 0.92."""

ROUNDING = 1e-5
"""Norms below this share of the text states' own are rounding, and count as zero."""


@dataclass(frozen=True)
class DirectionReport:
    """How far a direction can be trusted.

    Attributes:
        norm: of the direction.
        noise: standard error of the direction, what its norm owes to the choice of sentences: sqrt(v / n + w / m) for n
            source sentences of total variance v and m target ones of w. A single sentence, or a mean, counts as exact;
            None for one on each side.
        lowest_stability, mean_stability: cosine between the direction and the one without one sentence, over all
            sentences; None for one sentence on each side.
        word_swap: cosine to the direction between the two plainest sentences ("a photo of a cat" -> "a photo of a
            dog"); None without words.
    """

    norm: float
    noise: float | None
    lowest_stability: float | None
    mean_stability: float | None
    word_swap: float | None

    @property
    def within_noise(self) -> bool:
        """Whether the direction is shorter than `CLEARLY` times its noise: other sentences may give quite another."""
        return self.noise is not None and self.norm < CLEARLY * self.noise

    def __str__(self) -> str:
        parts = [f"norm {self.norm:.1f}"]
        if self.noise:
            parts.append(f"{self.norm / self.noise:.1f} times what it owes to the choice of sentences")
        if self.lowest_stability is not None:
            parts.append(
                f"leave-one-out cosine {self.lowest_stability:.4f} at least, {self.mean_stability:.4f} on average"
            )
        if self.word_swap is not None:
            parts.append(f"cosine {self.word_swap:.2f} to the plain word swap")
        return "; ".join(parts)


@dataclass(frozen=True)
class Direction:
    """What to add to every token of a caption's text states to change a concept.

    Directions of one text encoder add up: `0.7 * cat_to_dog + winter`, `-winter`, `cat_to_dog - winter`. A sum keeps
    the source of its first direction that has one; its target is empty unless both have the same one.

    Attributes:
        states: `[77, d]` float32 on the CPU.
        source, target: the concepts in words; empty if it was made from sentences alone.
        sentences: how many sentences each side was averaged over.
        text_fingerprint: the text encoder it was made with; it means nothing to another.
        sentences_hash: of all sentences; equal for equal sentences. Empty if it was not made from sentences.
        version: of p2pz, that made it.
        terms: of a sum, factors and words; empty for a direction that is none.
        report: how far it can be trusted; None for a sum, and in files of older versions.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (2023), section 3.2.
    """

    states: Tensor
    source: str
    target: str
    sentences: tuple[int, int]
    text_fingerprint: str
    sentences_hash: str = ""
    version: str = ""
    terms: tuple[tuple[float, str], ...] = ()
    report: DirectionReport | None = None

    @property
    def words(self) -> str:
        """ "cat -> dog", or a formula such as "0.7 * (cat -> dog) - (sketch -> photo)"."""
        if not self.terms:
            return f"{self.source} -> {self.target}" if self.source and self.target else self.source or self.target
        parts = [
            f"{'-' if factor < 0 else '+'} {'' if abs(factor) == 1 else f'{abs(factor):g} * '}({words or 'sentences'})"
            for factor, words in self.terms
        ]
        formula = " ".join(parts)
        return f"-{formula[2:]}" if formula.startswith("-") else formula[2:]

    @property
    def is_style(self) -> bool:
        """Whether it changes the style, not the subject."""
        return is_medium(self.source) and is_medium(self.target)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with the direction's card in its metadata, whole or not at all.

        Args:
            path: for instance `cat2dog.safetensors`.

        Raises:
            ValueError: the place cannot be written to.
        """
        card = {
            "words": self.words,
            "source": self.source,
            "target": self.target,
            "sentences": "{} {}".format(*self.sentences),
            "sentences_hash": self.sentences_hash,
            "text_fingerprint": self.text_fingerprint,
            "version": self.version,
            "terms": json.dumps(self.terms),
            "report": json.dumps(asdict(self.report) if self.report else None),
        }
        save_tensors(path, "direction", {"states": self.states}, card)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Direction:
        """Read a file that `save` wrote.

        Args:
            path: the file.

        Raises:
            ValueError: it is missing, is no direction or is damaged.
        """
        facts = ("source", "target", "sentences", "text_fingerprint")
        tensors, card = load_tensors(path, "direction", ("states",), facts)
        with making_sense(path, "direction", "make it again"):
            check_tensor("states", tensors["states"], ("n", "d"))
            source_count, target_count = map(int, card["sentences"].split())
            terms = tuple((float(factor), str(words)) for factor, words in json.loads(card.get("terms", "[]")))
            report = json.loads(card.get("report", "null"))
            report = DirectionReport(**report) if report else None
            str(report)  # fails if its numbers are none
        return cls(
            tensors["states"],
            card["source"],
            card["target"],
            (source_count, target_count),
            card["text_fingerprint"],
            card.get("sentences_hash", ""),
            card.get("version", ""),
            terms,
            report,
        )

    def check_fits(self, model: Model) -> None:
        """Raise ValueError if the direction was made with another text encoder than the model's, or is damaged."""
        if self.text_fingerprint != model.text_fingerprint:
            raise ValueError(
                f"this direction was made with another text encoder ({self.text_fingerprint}) than the model's "
                f"({model.text_fingerprint}), or by an earlier p2pz: make it again with direction(..., model=model)"
            )
        rows, width = model.text_shape
        if self.states.shape != (rows, width) or self.states.dtype not in FLOATS or not self.states.isfinite().all():
            raise ValueError(
                f"this direction's states are {self.states.dtype} {list(self.states.shape)}, but must be finite "
                f"floating-point numbers [{rows}, {width}]: make it again with direction(..., model=model)"
            )

    def __mul__(self, factor: float) -> Direction:
        if not isinstance(factor, Real):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"a direction can be multiplied by a finite number, not {factor}")
        factor = float(factor)
        sides = (self.target, self.source) if factor < 0 else (self.source, self.target)
        terms = tuple((factor * each, words) for each, words in self._terms())
        counts = self.sentences[::-1] if factor < 0 else self.sentences
        return self._derived(factor * self.states, *sides, counts, self.sentences_hash, terms)

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return -1 * self

    def __add__(self, other: Direction) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        if self.text_fingerprint != other.text_fingerprint:
            raise ValueError(
                f"directions of different text encoders ({self.text_fingerprint} and {other.text_fingerprint}) "
                "cannot be added"
            )
        check_tensor("states to be added", other.states, self.states.shape)
        return self._derived(
            self.states + other.states,
            self.source or other.source,
            self.target if self.target == other.target else "",
            tuple(a + b for a, b in zip(self.sentences, other.sentences, strict=True)),
            " ".join(dict.fromkeys(f"{self.sentences_hash} {other.sentences_hash}".split())),
            self._terms() + other._terms(),
        )

    def __sub__(self, other: Direction) -> Direction:
        return self + -other if isinstance(other, Direction) else NotImplemented

    def _terms(self) -> tuple[tuple[float, str], ...]:
        return self.terms or ((1.0, self.words),)

    def _derived(self, states: Tensor, *facts: object) -> Direction:
        source, target, counts, sentences_hash, terms = facts
        return Direction(states, source, target, counts, self.text_fingerprint, sentences_hash, _version(), terms)


@torch.no_grad()
def direction_report(source: Tensor, target: Tensor, word_swap: Tensor | None = None) -> DirectionReport:
    """Judge the direction between two sets of text states.

    Args:
        source, target: `[n, 77, d]` and `[m, 77, d]`, the states of each sentence.
        word_swap: `[77, d]`, the difference between the two plainest sentences.

    Returns:
        The report.
    """
    sides = [states.float().flatten(1) for states in (source, target)]
    means = [states.mean(0) for states in sides]
    made = means[1] - means[0]
    rounding = ROUNDING * max(float(mean.norm()) for mean in means)

    def length(value: float) -> float:
        return value if value > rounding else 0.0

    # The variance of a difference of means is the sum of theirs, each a share of its sentences' unbiased variance.
    variances = [
        float((states - mean).square().sum()) / (len(states) - 1) / len(states)
        for states, mean in zip(sides, means, strict=True)
        if len(states) > 1
    ]
    cosines = []
    for states, mean, sign in zip(sides, means, (-1, 1), strict=True):
        if len(states) > 1:
            without = made + sign * (mean - states) / (len(states) - 1)
            cosines.append(F.cosine_similarity(without, made[None], dim=1))
    stability = torch.cat(cosines) if cosines else None
    return DirectionReport(
        norm=length(float(made.norm())),
        noise=length(math.sqrt(sum(variances))) if variances else None,
        lowest_stability=None if stability is None else float(stability.min()),
        mean_stability=None if stability is None else float(stability.mean()),
        word_swap=None if word_swap is None else float(F.cosine_similarity(made, word_swap.float().flatten(), dim=0)),
    )


@explain_out_of_memory
def direction(
    source: str = "",
    target: str = "",
    *,
    sentences: tuple[Sentences, Sentences] | None = None,
    language_model: LanguageModel | None = None,
    embeddings: tuple[str | os.PathLike, str | os.PathLike] | None = None,
    seed: int = 0,
    model: Model | None = None,
) -> Direction:
    """Make a direction from words, from sentences, or from saved embeddings.

    Warns if the direction is within the noise of its sentences, see `DirectionReport`.

    Args:
        source, target: concepts such as "cat" and "dog", "cat" and "cat with glasses", "sketch" and "oil pastel"; they
            are put into a built-in bank of sentences.
        sentences: sentences about the source and about the target to use instead of the bank: two lists, or two text
            files with a sentence on each line.
        language_model: have a language model write the sentences: a folder that transformers reads, or a function, see
            `p2pz.sentences.write_sentences`.
        embeddings: two files of PyTorch, such as the `cat.pt` and `dog.pt` that pix2pix-zero's authors publish: text
            states of the model's text encoder, `[n, 77, d]` or their mean, `[1, 77, d]`.
        seed: of the language model's sentences.
        model: whose text encoder to use; None loads the default model.

    Returns:
        The direction.

    Raises:
        ValueError: a word or a list of sentences is empty, the words are the same or the text encoder tells no
            difference, its states are not finite, a file cannot be read, embeddings are another text encoder's, or the
            language model did not write about the concepts.
    """
    for name, value in (("sentences", sentences), ("embeddings", embeddings)):
        if value is not None and (not isinstance(value, (tuple, list)) or len(value) != 2):
            raise ValueError(f"{name} must be two, of the source and of the target, not {value!r:.100}")
    if not isinstance(source, str) or not isinstance(target, str):
        raise ValueError(f'a direction needs two concepts in words, such as "cat", "dog", not {source!r}, {target!r}')
    source, target = source.strip(), target.strip()
    if sum(given is not None for given in (sentences, language_model, embeddings)) > 1:
        raise ValueError("give sentences, a language model or embeddings, not several of them")
    if sentences is None and embeddings is None:
        if not source or not target:
            raise ValueError('a direction needs two concepts, such as direction("cat", "dog")')
        check_words_differ(source, target)
    elif sentences is not None:
        sentences = [read_sentences(side, name) for side, name in zip(sentences, ("source", "target"), strict=True)]
    model = loaded(model)
    swap = [source_prompt(source), source_prompt(target)] if source and target else []
    if embeddings is not None:
        states = [_read_embeddings(Path(path), model) for path in embeddings]
        plain = model.encode_text(swap) if swap else ()
    else:
        if language_model is not None:
            sentences = [
                write_sentences(concept, language_model, seed=seed, device=model.device) for concept in (source, target)
            ]
        elif sentences is None:
            sentences = bank_sentences(source, target, mini=model.is_mini)
        counts = [*map(len, sentences), len(swap)]
        *states, plain = model.encode_text([*sentences[0], *sentences[1], *swap]).float().split(counts)
    if not all(side.isfinite().all() for side in (*states, *plain)):
        raise ValueError(
            "the text encoder gives numbers that are not finite: check the checkpoint's file, or load with "
            "dtype=torch.float32 (--dtype float32)"
        )
    means = [side.mean(0) for side in states]
    report = direction_report(*states, plain[1] - plain[0] if swap else None)
    if report.norm == 0:
        name = f'a direction from "{source}" to "{target}"' if swap else "this direction"
        raise ValueError(f"{name} changes nothing: the text encoder tells no difference between the two")
    if report.within_noise:
        warnings.warn(
            f"this direction is hardly longer ({report.norm:.3g}) than what it owes to the choice of its sentences "
            f"({report.noise:.3g}): give more sentences, alike but for the concept",
            stacklevel=3,
        )
    return Direction(
        (means[1] - means[0]).cpu(),
        source,
        target,
        (len(states[0]), len(states[1])),
        model.text_fingerprint,
        _hash(sentences) if sentences else "",
        _version(),
        report=report,
    )


def check_words_differ(source: str, target: str) -> None:
    """Raise ValueError if two concepts are one but for its article and capitals."""
    if without_article(source).casefold() == without_article(target).casefold():
        raise ValueError(f'a direction from "{source}" to itself changes nothing')


def parse_direction(words: str) -> tuple[str, str]:
    """Split "cat->dog" into "cat" and "dog". Raises ValueError if it does not have that form."""
    sides = words.replace("→", "->").split("->")
    if len(sides) != 2 or not all(side.strip() for side in sides):
        raise ValueError(f'a direction in words looks like "cat->dog", not {words!r}')
    return sides[0].strip(), sides[1].strip()


def _read_embeddings(path: Path, model: Model) -> Tensor:
    """Text states `[n, 77, d]` float32 of a file of PyTorch, on the model's device. Raises ValueError."""
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"embeddings {path} do not exist") from None
    except OSError as error:
        raise ValueError(f"embeddings {path} cannot be read: {error.strerror.lower()}") from None
    except Exception as error:  # what is no file of PyTorch raises almost anything
        more = "GLOBAL" in str(error)  # the pickle names a class or a function
        reason = "hold more than tensors and could run a program" if more else "are damaged or no file of PyTorch"
        raise ValueError(
            f"embeddings {path} {reason}, so they cannot be read: save the states alone with torch.save(states, path)"
        ) from None
    length, width = model.text_shape
    found = None
    if not isinstance(states, Tensor):
        found = f"a {type(states).__name__}"
    elif states.is_nested or states.layout != torch.strided or states.device.type != "cpu":
        found = "one that is sparse, nested or without its numbers"
    elif states.ndim != 3 or states.dtype not in FLOATS or len(states) == 0:
        found = f"a tensor {list(states.shape)} of {str(states.dtype).removeprefix('torch.')}"
    if found:
        raise ValueError(f"embeddings {path} must be a tensor [sentences, {length}, {width}], but they are {found}")
    pooled = model.unet.config.pooled_channels > 0  # SDXL's have a row more, of which published files know nothing
    if pooled and states.shape[1:] == (length - 1, width):
        states = torch.nn.functional.pad(states, (0, 0, 0, 1))
    if states.shape[1:] != (length, width):
        raise ValueError(
            f"embeddings {path} hold {states.shape[1]} tokens of width {states.shape[2]}, but this model's text "
            f"encoder gives {length - pooled} of width {width}: they were made with another text encoder"
        )
    if not states.isfinite().all():
        raise ValueError(f"embeddings {path} hold numbers that are not finite")
    return states.detach().float().to(model.device)


def _hash(sentences: Sequence[Sequence[str]]) -> str:
    """Short name of two lists of sentences."""
    return hashlib.sha256("\n\n".join("\n".join(side) for side in sentences).encode()).hexdigest()[:16]


def _version() -> str:
    from p2pz import __version__  # it exists only after all modules were imported

    return __version__
