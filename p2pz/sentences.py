"""Sentences about a concept, to make directions of: a built-in bank, text files, or a language model's."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from p2pz.text import load_pretrained, quiet_transformers
from p2pz.weights import reason

Sentences = Sequence[str] | str | os.PathLike
"""A list of sentences, or the path of a text file with one sentence on each line."""

LanguageModel = str | os.PathLike | Callable[[str, int, int], Sequence[str]]
"""A transformers folder, or a function `(request, count, seed) -> count texts`."""

# Words that name a medium: a direction between two of them changes the style, not the subject.
_MEDIA = (
    "photo", "photograph", "sketch", "drawing", "painting", "pastel", "watercolor", "watercolour", "cartoon", "gouache",
    "illustration", "etching", "engraving", "woodcut", "mosaic", "fresco", "collage", "lithograph", "render",
)  # fmt: skip

# What a phrase begins with: words that take the place of an article; of them and others, those that count.
_DETERMINER = re.compile(
    "a|an|the|my|your|his|her|its|our|their|this|that|these|those|some|any|every|each|another|either|neither|both|all|"
    "no|one|1"
)
_SINGULAR_START = re.compile("a|an|one|1|this|that|every|each|another|either|neither")
_PLURAL_START = re.compile(
    r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\d+|many|several|few|various|both|all|these|those"
)
# Head nouns whose form does not show what they are. Most in -is go by name: so end "taxis", "rabbis" and "yetis", too.
_PLURAL = re.compile(
    ".*people|.*men|.*children|mice|geese|feet|teeth|oxen|cattle|police|lice|dice|cacti|fungi|octopi|algae|larvae|"
    "bacteria"
)
_SINGULAR = re.compile(
    ".*(ss|sis|polis|ceratops|cyclops|['’]s)|(?!(em|gn|gur|haik|hind|kud|men|tut|zeb|zul|bayo|caribo|.*ea)us).*us|"
    "canvas|atlas|bias|gas|christmas|axis|cannabis|chrysalis|clematis|ibis|iris|mantis|trellis|lens|cosmos|rhinoceros|"
    "thermos|series|species|abdomen|cyclamen|albumen|bitumen|dolmen|lumen|omen|regimen|semen|specimen|stamen|yemen"
)
_UNCOUNTABLE = re.compile(
    "snow|water|rain|fire|smoke|fog|mist|ice|sand|grass|mud|hair|fur|food|bread|rice|furniture|jewell?e?ry|clothing|"
    "spring|summer|autumn|winter|sunshine|sunlight|moonlight|lightning|chaos|debris|news|ramen|tennis"
)
_AFTER_THE_NOUN = re.compile(
    r"\s(with|without|wearing|holding|carrying|in|on|of|at|by|near|under|over|from|for|to|made|that|who|which)\s",
    re.IGNORECASE,
)
# Names take no article: some places, and words that all begin with a capital ("Tom Hanks"), unless the last is a kind.
_PLACE = re.compile(
    "africa|asia|athens|berlin|europe|france|germany|italy|japan|london|mars|paris|rome|spain|tokyo|venice|venus"
)
_KIND = re.compile(
    "(.*cat|.*dog|.*hound|bear|bird|collie|dane|eagle|fox|horse|husky|leopard|panda|pony|poodle|retriever|shepherd|"
    "spaniel|terrier|tiger)s?"
)
# Articles go by sound: "an owl", "an hour", "an 18-wheeler", but "a unicorn", "a one-eyed cat"; and by the name of a
# letter where the first word is spelled: "an F1 car", "an MRI scan", "an X-ray", but "a UFO", "a U-boat".
_VOWEL = re.compile(
    r"(?!eu|ewe|onc?e\b|ones|oaxac|ouija|u[ckrst][aeiou]|u(fo|k|sa?|sb|v)\b|ubiq|uganda|ukr|unanim|uni[bcfloqpstvx])"
    r"[aeiou8]|(11|18)(?!\d)|hour|honest|honou?r|heir|(fbi|led|mri|nba|suv)\b",
    re.IGNORECASE,
)
_SPELLED = re.compile(r"([B-DF-HJ-NP-TV-Z]{2,}|[A-Za-z])(?![^\W\d_])")
_VOWEL_LETTER = re.compile("[aefhilmnorsx]", re.IGNORECASE)


def _up_to_noun(phrase: str) -> str:
    """ "a black cat" of "a black cat with glasses"."""
    return _AFTER_THE_NOUN.split(f" {phrase} ")[0].strip()


def _head(noun: str) -> str:
    """The word that a phrase is about: "cat" of "a black cat with glasses"."""
    words = re.findall(r"[\w'’-]+", _up_to_noun(noun).lower())
    return words[-1] if words else ""


def _is_name(noun: str) -> bool:
    """Whether a phrase names a person or a place: "Barack Obama", "Paris", but not "Cat" or "German Shepherd"."""
    name = _up_to_noun(noun)
    words = name.split()
    if _PLACE.fullmatch(name.lower()):
        return True
    if len(words) < 2 or _DETERMINER.fullmatch(words[0].lower()) or _SPELLED.match(name):
        return False
    return all(word[0].isupper() for word in words) and not (is_medium(name) or _KIND.fullmatch(_head(name)))


def is_plural(noun: str) -> bool:
    """Whether a phrase takes "are": "two cats", "glasses", "people", but not "a pair of glasses" or "bus"."""
    first, head = noun.split()[0].lower(), _head(noun)
    if _SINGULAR_START.fullmatch(first):
        return False
    if _PLURAL_START.fullmatch(first):
        return True
    if _is_name(noun) or _UNCOUNTABLE.fullmatch(head) or _SINGULAR.fullmatch(head):
        return False
    return head.endswith("s") or bool(_PLURAL.fullmatch(head))


def with_article(noun: str) -> str:
    """ "a cat", "an oil pastel", "an hour"; plurals ("two cats", "glasses"), words without a plural ("snow"), names
    ("Barack Obama") and words that bring a determiner ("the cat") stay as they are.
    """
    bare = is_plural(noun) or _is_name(noun) or _UNCOUNTABLE.fullmatch(_head(noun))
    if bare or _DETERMINER.fullmatch(noun.split()[0].lower()):
        return noun
    plain = unicodedata.normalize("NFKD", noun).encode("ascii", "ignore").decode()  # "éclair" as "eclair"
    vowel = (_VOWEL_LETTER if _SPELLED.match(plain) else _VOWEL).match(plain)
    return f"{'an' if vowel else 'a'} {noun}"


def without_article(noun: str) -> str:
    """ "cat" of "a cat" and of "the cat"."""
    return re.sub(r"^(a|an|the)\s+", "", noun.strip(), flags=re.IGNORECASE)


def is_medium(concept: str) -> bool:
    """Whether a concept names a medium ("oil pastel") rather than a subject ("cat with glasses")."""
    return concept.split()[-1].lower() in _MEDIA if concept.split() else False


def source_prompt(source: str) -> str:
    """The caption to assume for an image of which only the source concept is known."""
    if not source:
        return "a photo"
    return with_article(source) if is_medium(source) else f"a photo of {with_article(source)}"


def fill(templates: Sequence[str], concept: str) -> list[str]:
    """Put a concept into templates of the bank.

    Args:
        templates: with the fields `{a}` ("a cat", "two cats"), `{the}` ("the cat"), `{is}` and `{s}` ("is" and "s"
            for one, "are" and "" for many).
        concept: such as "cat".
    """
    plural = is_plural(concept)
    bare = without_article(concept)
    the = bare if _DETERMINER.fullmatch(bare.split()[0].lower()) or _is_name(bare) else f"the {bare}"
    fields = {"a": with_article(concept), "the": the, "is": "are" if plural else "is", "s": "" if plural else "s"}
    return [template.format(**fields) for template in templates]


def bank_sentences(source: str, target: str, *, mini: bool = False) -> tuple[list[str], list[str]]:
    """The built-in sentences about two concepts, pairwise alike but for the concept.

    Args:
        source, target: two subjects, or two media such as "sketch" and "oil pastel".
        mini: those of the bundled model, in the few words it knows.
    """
    media = is_medium(source) and is_medium(target)
    if mini:
        templates = _MINI_MEDIUM_TEMPLATES if media else _MINI_SUBJECT_TEMPLATES
    else:
        templates = MEDIUM_TEMPLATES if media else SUBJECT_TEMPLATES
    return tuple(fill(templates, concept) for concept in (source, target))


def read_sentences(sentences: Sentences, name: str) -> list[str]:
    """The sentences of a list or of a text file, without empty ones; `name` says whose, for the error message.

    Raises:
        ValueError: the file cannot be read, or there are none.
    """
    if isinstance(sentences, (str, os.PathLike)):
        try:
            sentences = Path(sentences).read_text(encoding="utf-8-sig").splitlines()  # some editors put a mark first
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the {name} sentences cannot be read: {error}") from None
    sentences = list(sentences) if isinstance(sentences, Iterable) else [sentences]
    for sentence in sentences:
        if not isinstance(sentence, str):
            kind = type(sentence).__name__
            raise ValueError(f"the {name} sentences must be texts, or the path of a file of them, not {kind}")
    kept = [sentence.strip() for sentence in sentences if sentence.strip()]
    if not kept:
        raise ValueError(f"there are no {name} sentences: give at least one")
    return kept


FEWEST_WRITTEN = 10
"""Fewer sentences than this from a language model make no direction worth having."""


def write_sentences(
    concept: str,
    language_model: LanguageModel,
    *,
    count: int = 100,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[str]:
    """Have a language model describe pictures of a concept, and keep the sentences that name it.

    Args:
        concept: such as "cat".
        language_model: a folder with a text-generation or text-to-text model that transformers reads, or a function
            `(request, count, seed) -> texts`.
        count: sentences wanted; the model is asked for four times as many at most.
        seed: the same seed gives the same sentences.
        device: where the model of a folder runs.

    Returns:
        At most `count` different sentences, in the order in which they were written.

    Raises:
        ValueError: the folder holds no such model, or it named the concept in fewer than `FEWEST_WRITTEN` sentences.
    """
    write = language_model if callable(language_model) else _load_writer(Path(language_model), device)
    phrase = with_article(concept)
    request = f"Write a short caption for a picture of {phrase}. Say where it is and what else the picture shows."
    bare = without_article(concept)
    named = re.compile(rf"(?<!\w){re.escape(bare)}(e?s)?(?!\w)", re.IGNORECASE)
    kept: dict[str, None] = {}
    for attempt in range(4):
        texts = write(request, count, seed + attempt)
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"a language model's function must return a list of texts, not {texts!r:.100}")
        sentences = (_first_sentence(text) for text in texts)
        kept |= dict.fromkeys(sentence for sentence in sentences if named.search(sentence))
        if len(kept) >= count:
            break
    if len(kept) < FEWEST_WRITTEN:
        raise ValueError(
            f'the language model named "{bare}" in only {len(kept)} of {count * (attempt + 1)} texts: take one that '
            "follows instructions, or give sentences of your own, or words alone for the built-in ones"
        )
    return list(kept)[:count]


def _first_sentence(text: str) -> str:
    """The first line that says something, and does not announce it, without list marks and quotes around it."""
    lines = (re.sub(r"^\s*(?:[-*•]|\d+[.)])?[\s\"'“]*|[\s\"'”]*$", "", line) for line in text.splitlines())
    return next((line for line in lines if line and not line.endswith(":")), "")


def _load_writer(folder: Path, device: str | torch.device) -> Callable[[str, int, int], list[str]]:
    """A language model as a function, see `write_sentences`. Raises ValueError."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    if not folder.is_dir():
        raise ValueError(f"language model {folder} does not exist: give a folder that transformers can read")
    try:
        with quiet_transformers():
            safely = {"local_files_only": True, "trust_remote_code": False}
            encodes = AutoConfig.from_pretrained(folder, **safely).is_encoder_decoder
            kind = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM
            tokenizer = AutoTokenizer.from_pretrained(folder, **safely)
            model = load_pretrained(kind, folder, local_files_only=True).to(device)
    except Exception as error:  # transformers raises a dozen kinds for files that are not what they should be
        raise ValueError(f"language model {folder} cannot be loaded: {reason(error)}") from None

    def write(request: str, count: int, seed: int) -> list[str]:
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": request}]
            inputs = tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:  # a model that only continues texts is given a list to go on with
            inputs = tokenizer(request if encodes else f"{request}\n1.", return_tensors="pt")
        begin = 0 if encodes else inputs["input_ids"].shape[1]
        with torch.random.fork_rng(), quiet_transformers(), torch.no_grad():
            torch.manual_seed(seed)
            written = model.generate(
                **inputs.to(device),
                do_sample=True,
                temperature=1.0,
                top_p=0.95,
                max_new_tokens=40,
                num_return_sequences=count,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        return tokenizer.batch_decode(written[:, begin:], skip_special_tokens=True)

    return write


# Templates of the bank ----------------------------------------------------------------------------------------------
# The first one is the plainest. What a template says must be possible for animals, people and things alike.
SUBJECT_TEMPLATES = (
    # plain
    "a photo of {a}",
    "{a}",
    "a picture of {a}",
    "a photograph showing {a}",
    "an image of {a} and nothing else",
    "just {a}",
    "here {is} {a}",
    "there {is} {a} in the picture",
    "a simple photo of {a}",
    "a good picture of {a}",
    "a snapshot of {a} that somebody took on holiday",
    "{a}, photographed at home",
    "the picture shows {a}",
    "we can see {a}",
    "look at {the} here",
    # how and from where it was taken
    "a close-up of {a}",
    "an extreme close-up that shows details of {a}",
    "a wide shot with {a} in the distance",
    "{a} seen from above",
    "{a} seen from below against a bright sky",
    "{a} seen from the side",
    "{a} seen from behind",
    "{a} facing the camera",
    "{a} in the middle of the frame",
    "{a} at the left edge of the picture",
    "{a} filling the whole frame",
    "a blurry photo of {a}",
    "a sharp photo of {a} with a soft background",
    "a black and white photo of {a}",
    "a grainy old photograph of {a}",
    "a phone picture of {a}",
    "a studio portrait of {a}",
    "{a} on a plain white background",
    "{a} against a dark background",
    "{a} in front of a grey wall",
    "a photo of {a} taken through a window",
    "a photo of {a} with a wooden frame around it",
    "{a} reflected in a mirror",
    # light and weather
    "{a} in bright sunlight",
    "{a} in the soft light of the morning",
    "{a} at sunset, with long shadows",
    "{a} at night under a street lamp",
    "{a} in the moonlight",
    "{a} in the dark, lit by a flash",
    "{a} lit by a single candle",
    "{a} in thick fog",
    "{a} in the rain",
    "{a} on a cloudy day",
    "{a} in falling snow",
    "{a} on a windy autumn day",
    "{a} on a hot summer afternoon",
    "{a} on a cold winter morning",
    "{a} in the shade of an old tree",
    "a colourful evening sky behind {a}",
    # outdoors
    "{a} in a park",
    "{a} in a garden full of flowers",
    "{a} in a green meadow",
    "{a} in tall yellow grass",
    "{a} in the forest",
    "{a} beside a quiet lake",
    "{a} by the sea",
    "{a} on a sandy beach",
    "{a} near a waterfall",
    "{a} at the foot of a mountain",
    "{a} on a rocky hill",
    "{a} in the desert",
    "{a} beside a river with a stone bridge",
    "{a} on a farm, with a barn behind",
    "{a} next to a wooden fence",
    "{a} in the middle of a field",
    "{a} on a country road",
    "{a} on a busy street",
    "{a} on the pavement in front of a shop",
    "{a} at a market",
    "{a} in a narrow lane of an old town",
    "{a} in a car park",
    "{a} near a railway station",
    "{a} on the roof of a house",
    "{a} on a balcony with plants",
    "{a} under a bridge",
    # indoors
    "{a} in a living room",
    "{a} on a soft carpet",
    "{a} next to a sofa",
    "{a} in a kitchen with blue tiles",
    "{a} on a wooden table",
    "{a} on a bed with white sheets",
    "{a} in front of a bookshelf",
    "{a} by the window, with curtains on both sides",
    "{a} in a hallway",
    "{a} in an office, among papers",
    "{a} in a workshop full of tools",
    "{a} in an empty room",
    "{a} in a museum",
    "{a} on a stage",
    # with others
    "{a} and a tree",
    "{a} beside a bicycle",
    "{a} with a red ball",
    "{a} next to a flower pot",
    "{a} and a child who laughs",
    "{a} surrounded by balloons",
    "{a} among fallen leaves",
    "two friends looking at {a}",
    # doing something
    "{a} standing still",
    "{a} lying on the ground",
    "{a} moving fast",
    "{a} resting in a quiet place",
    "{a} waiting by the door",
    "{a} half hidden behind a bush",
    "{a} coming out of the fog",
    "{a} falling into the water",
    "{the} {is} lying in the sun",
    "{the} {is} right beside the path",
    "{the} stand{s} alone in the picture",
    "{the} appear{s} between two trees",
    "{the} look{s} small in front of the mountains",
    # kinds and moods
    "a small photo of {a}, cut out of a newspaper",
    "a funny picture of {a}",
    "a beautiful photo of {a}",
    "a sad, quiet picture of {a}",
    "an award-winning photo of {a}",
    "my favourite picture of {a}",
    "a drawing of {a}",
    "an oil painting of {a}",
    "a pencil sketch of {a}",
    "a watercolour of {a}",
    "a postcard that shows {a}",
    "a poster with {a} on it",
)

_SCENES = (
    "a cat",
    "a dog in a garden",
    "a horse on a hill",
    "a bird on a branch",
    "an old man with a beard",
    "a young woman in a red dress",
    "two children at play",
    "a crowd in a market square",
    "a bowl of fruit on a table",
    "flowers in a vase",
    "a cup of coffee beside a book",
    "a chair by the window",
    "a house with a red roof",
    "a church in a small village",
    "a street in the rain",
    "a city at night",
    "a bridge over a river",
    "a harbour full of boats",
    "a ship on a stormy sea",
    "a lighthouse on a cliff",
    "a beach with palm trees",
    "a lake among mountains",
    "a forest in autumn",
    "a snowy field",
    "a waterfall",
    "a desert under a hot sun",
    "clouds at sunset",
    "a garden full of roses",
    "a farm with a windmill",
    "a train in a station",
    "a car on a country road",
    "a bicycle against a wall",
    "a sleeping baby",
    "hands holding a letter",
    "a fish in clear water",
    "a castle on a hill",
    "an empty room",
)
_FRAMES = ("{{a}} of {scene}", "{{a}} that show{{s}} {scene}", "{scene} as {{a}}")
MEDIUM_TEMPLATES = tuple(frame.format(scene=scene) for frame in _FRAMES for scene in _SCENES)

# The bundled model's world: six places and what stands there.
_PLACES = ("", " in a meadow", " on the beach", " in the snow", " at night", " in a room", " in the city")
_MINI_SUBJECT_TEMPLATES = tuple(
    f"{medium} of {{a}}{place}{thing}"
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
_MINI_MEDIUM_TEMPLATES = tuple(
    f"{{a}} of {subject}{place}"
    for subject in ("a cat", "a dog", "a horse", "a zebra", "a rabbit", "a bear", "a cat with glasses")
    for place in _PLACES
)
