"""Directions from words, sentences, language models and files, their sums and their reports; captions; sampling."""

import itertools
import json
import math
import re
import warnings
from dataclasses import astuple, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import p2pz
from p2pz.directions import direction_report, parse_direction
from p2pz.images import psnr
from p2pz.sentences import (
    FEWEST_WRITTEN,
    MEDIUM_TEMPLATES,
    SUBJECT_TEMPLATES,
    bank_sentences,
    fill,
    is_medium,
    is_plural,
    read_sentences,
    source_prompt,
    with_article,
    write_sentences,
)
from p2pz.weights import MINI_FOLDER, mini_world
from p2pz.weights.judge import load_judge


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


def test_direction_is_the_difference_of_mean_states(model):
    sentences = ["a photo of a cat", "a sketch of a cat at night"], ["a photo of a dog"]
    made = p2pz.direction(sentences=sentences, model=model)
    source, target = (model.encode_text(side) for side in sentences)
    assert torch.allclose(made.states, target[0] - (source[0] + source[1]) / 2, atol=1e-6)
    assert made.sentences == (2, 1) and made.states.shape == (77, 128)


def test_opposite_words_give_the_opposite_direction(model):
    there, back = p2pz.direction("cat", "dog", model=model), p2pz.direction("dog", "cat", model=model)
    assert torch.allclose(there.states, -back.states, atol=1e-6)
    assert there.states.norm() > 1


def test_a_direction_separates_the_concepts_it_was_made_for(model):
    """Unseen sentences about dogs lie further along cat->dog than the same sentences about cats."""
    along = p2pz.direction("cat", "dog", model=model).states.flatten()
    texts = "a photo of an orange {} with a hat in the snow", "an oil pastel of a black {} in a room near a ball"
    for text in texts:
        cat, dog = model.encode_text([text.format("cat"), text.format("dog")]).flatten(1)
        assert (dog - cat) @ along > 0.5 * along.norm() * (dog - cat).norm()


def test_sentences_from_files_and_saved_directions(model, tmp_path):
    for name, text in (("cats.txt", "a photo of a cat\n\n a sketch of a cat \n"), ("dogs.txt", "a photo of a dog\n")):
        (tmp_path / name).write_text(text)
    made = p2pz.direction(sentences=(tmp_path / "cats.txt", tmp_path / "dogs.txt"), model=model)
    assert made.sentences == (2, 1)
    made.save(tmp_path / "cat2dog.safetensors")
    loaded = p2pz.Direction.load(tmp_path / "cat2dog.safetensors")
    assert torch.equal(loaded.states, made.states)
    assert (loaded.sentences, loaded.text_fingerprint) == (made.sentences, model.text_fingerprint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "cat"}, "needs two concepts"),
        *(({"source": "cat", "target": same}, "to itself changes nothing") for same in (" cat ", "Cat", "a cat")),
        ({"source": "The cat", "target": "CAT"}, '"The cat" to itself changes nothing'),
        ({"sentences": (["a cat"] * 3, ["A Cat"])}, "^this direction changes nothing: the text encoder tells no"),
        (
            {"source": "sun", "target": "moon", "sentences": (["a cat"], ["A cat"])},
            '"sun" to "moon" changes nothing: the',
        ),
        ({"sentences": ([], ["a dog"])}, "no source sentences"),
        ({"sentences": (["a cat"], ["  "])}, "no target sentences"),
        ({"sentences": ("missing.txt", ["a dog"])}, "source sentences cannot be read"),
        (
            {"sentences": ([1, 2], ["a dog"])},
            "the source sentences must be texts, or the path of a file of them, not int",
        ),
        ({"sentences": (["a cat"], [None])}, "the target sentences must be texts, .* not NoneType"),
        ({"sentences": (5, ["a dog"])}, "the source sentences must be texts, .* not int"),
        ({"sentences": (["a cat"],)}, "sentences must be two, of the source and of the target"),
        ({"sentences": "ab"}, "sentences must be two, .* not 'ab'"),
        ({"embeddings": "a.pt"}, r"embeddings must be two, .* not 'a\.pt'"),
        ({"embeddings": ("a.pt", "b.pt", "c.pt")}, "embeddings must be two"),
        ({"source": None, "target": "dog"}, "two concepts in words, .* not None, 'dog'"),
        (
            {"source": "cat", "target": "dog", "language_model": lambda *_: None},
            "a list of texts, not None",
        ),
    ],
)
def test_bad_directions(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        p2pz.direction(**arguments, model=model)


@pytest.mark.parametrize("from_words", [True, False])
def test_a_broken_text_encoder_is_named(from_words, tmp_path):
    model = p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)
    next(model.text_encoder.parameters()).data.fill_(math.nan)
    torch.save(torch.randn(2, 77, 128), tmp_path / "a.pt")
    files = {} if from_words else {"embeddings": (tmp_path / "a.pt",) * 2}
    with pytest.raises(ValueError, match=r"^the text encoder gives numbers that are not finite: check the checkpoint"):
        p2pz.direction("cat", "dog", **files, model=model)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_sentences_of_a_file_with_and_without_a_byte_order_mark(encoding, tmp_path):
    (tmp_path / "cats.txt").write_text("a café cat\r\na cat\r\n", encoding=encoding)
    assert read_sentences(tmp_path / "cats.txt", "source") == ["a café cat", "a cat"]


def test_files_that_are_no_direction(model, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        p2pz.Direction.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read"):
        p2pz.Direction.load(tmp_path / "text.safetensors")
    inversion = p2pz.Inversion(torch.zeros(4, 2, 2), torch.zeros(4, 2, 2), "a cat", 3, model.text_fingerprint)
    inversion.save(tmp_path / "inversion.safetensors")
    with pytest.raises(ValueError, match="no direction that p2pz saved"):
        p2pz.Direction.load(tmp_path / "inversion.safetensors")
    with pytest.raises(ValueError, match="cannot write"):
        inversion.save(tmp_path / "nowhere" / "inversion.safetensors")


def test_words_that_the_bundled_model_does_not_know_are_named(model):
    with pytest.warns(UserWarning, match=r"does not know elephant, sofa; all its words: a .* cat .* zebra"):
        p2pz.direction(sentences=(["a cat on the sofa"], ["an Elephant on the sofa"]), model=model)


@pytest.mark.parametrize("words", ["cat -> dog", "cat→dog", "  cat->dog "])
def test_words_of_a_direction(words):
    assert parse_direction(words) == ("cat", "dog")


@pytest.mark.parametrize("words", ["cat", "->dog", "cat->", "a->b->c", ""])
def test_words_that_are_no_direction(words):
    with pytest.raises(ValueError, match="looks like"):
        parse_direction(words)


# --- the sentence bank ---


def test_the_bundled_models_bank_is_paired_and_in_its_words():
    cats, glasses = bank_sentences("cat", "cat with glasses", mini=True)
    assert len(cats) == len(glasses) == len(set(cats)) > 40
    assert [text.replace("a cat", "a cat with glasses") for text in cats] == glasses
    sketches, pastels = bank_sentences("sketch", "oil pastel", mini=True)
    assert all(text.startswith("a sketch of ") for text in sketches)
    assert all(text.startswith("an oil pastel of ") for text in pastels)
    words = {word for text in (*cats, *glasses, *sketches, *pastels) for word in text.split()}
    assert words <= set(mini_world.VOCABULARY)


@pytest.mark.parametrize("pair", [("cat", "owl"), ("two cats", "glasses"), ("snow", "cat with glasses")])
def test_the_bank_is_large_varied_and_paired(pair):
    sides = bank_sentences(*pair)
    assert all(len(side) == len(set(side)) >= 100 for side in sides)
    for template, source, target in zip(SUBJECT_TEMPLATES, *sides, strict=True):
        assert [source] == fill([template], pair[0]) and [target] == fill([template], pair[1])
        assert pair[0] in source and pair[1] in target and not re.search(r"[{}]|  ", source + target)


def test_the_bank_of_media_is_large_too():
    sketches, pastels = bank_sentences("sketch", "oil pastel")
    assert len(sketches) == len(set(sketches)) == len(MEDIUM_TEMPLATES) >= 100
    assert sketches[0] == "a sketch of a cat" and pastels[0] == "an oil pastel of a cat"
    assert [text.replace("a sketch", "an oil pastel") for text in sketches] == pastels
    subjects = {re.sub(r".* (of|shows) |as an oil pastel", "", text) for text in pastels}
    assert len(subjects) > 30


def test_real_models_take_the_large_bank_and_the_bundled_one_its_own(model, tmp_path):
    assert p2pz.direction("cat", "dog", model=model).sentences == (57, 57)
    stranger = replace(model, folder=tmp_path)
    assert p2pz.direction("cat", "dog", model=stranger).sentences == (len(SUBJECT_TEMPLATES),) * 2
    assert p2pz.direction("sketch", "oil pastel", model=stranger).sentences == (len(MEDIUM_TEMPLATES),) * 2


# What becomes of the words behind the article.
ONE = """a cat, a Cat, an orange cat, an owl, a cat with glasses, a cat wearing sunglasses, a pair of glasses, a bus,
    a princess, a canvas, a glass of water, an oil pastel, an Oil Pastel, a cat's paw, a specimen, an omen, a species
    a praying mantis, an oasis, an ibis, a triceratops, a cyclops, a chassis, a bias, an iris, an octopus, a metropolis
    a German Shepherd, a Black Cat, a Chinese lantern festival, a herbal tea in Paris, a Paris street
    an umbrella, an unhappy cat, an uninhabited island, an unidentified bird, an urn, an uncle, an apple, an 8-ball
    an hour, an hourglass, an heir, an X-ray, an x-wing, an S-shaped sofa, an M&M, an éclair, an Île flottante
    an SUV, an MRI scan, an FBI agent, an NBA player, an LED lamp, an F1 car, an NFT, an RV, an suv, an HTML page
    an 11-year-old, an 18-wheeler, an 18th-century castle, an 80s car, a 110-year-old, a 1980s car, a 3-legged dog
    a unicorn, a uniform, a unanimous crowd, a ubiquitous logo, a Ugandan, a Ukrainian flag, a ukulele, a utensil
    a UFO, a ufo, a USB stick, a US flag, a UK flag, a U-boat, a u-turn, a NASA rocket, a T-shirt, a ñandú, a LION
    a one-eyed cat, a one-way street, a onesie, a European city, a eucalyptus, a ewe, a ouija board"""
AS_IT_IS = """the cat, an owl, one cat, every dog, another cat, this cat, my cat, snow, fresh snow, news, Barack Obama
    Barack Obama with glasses, Tom Hanks, Mount Fuji, Paris, paris at night"""
MANY = """glasses, two cats, Two Cats, 3 dogs, zebras, old people, children with hats, these cats, both dogs, laptops
    firemen, policemen, snowmen, smiling women, grandchildren, emus, menus, gurus, bureaus, cacti, taxis, rabbis
    Golden Retrievers, UFOs, ballet dancers, cats and dogs, lots of cats, hundreds of birds, treetops, his dogs"""
PHRASES = [
    (re.sub("^an? ", "", phrase) if phrases is ONE else phrase, phrase, phrases is MANY)
    for phrases in (ONE, AS_IT_IS, MANY)
    for phrase in re.split(r",\s+|\n\s+", phrases)
]


@pytest.mark.parametrize(("words", "phrase", "many"), PHRASES, ids=[words for words, *_ in PHRASES])
def test_articles_and_plurals(words, phrase, many):
    assert with_article(words) == phrase and is_plural(words) == many
    assert fill(["here {is} {a}"], words) == [f"here {'are' if many else 'is'} {phrase}"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("cat", "the cat stands"),
        ("an owl", "the owl stands"),
        ("the cat", "the cat stands"),
        ("two cats", "the two cats stand"),
        ("these cats", "these cats stand"),
        ("another cat", "another cat stands"),
        ("Barack Obama", "Barack Obama stands"),
    ],
)
def test_definite_articles(words, sentence):
    assert fill(["{the} stand{s}"], words) == [sentence]


def test_media_and_prompts():
    assert is_medium("oil pastel") and is_medium("pencil sketch") and not is_medium("cat with glasses")
    assert [source_prompt(word) for word in ("cat", "sketch", "", "two cats", "glasses")] == [
        "a photo of a cat",
        "a sketch",
        "a photo",
        "a photo of two cats",
        "a photo of glasses",
    ]


# --- sentences of a language model ---


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def language_model(request, tmp_path_factory):
    """A folder with a random model of a dozen words, dogs and no zebras among them."""
    import transformers

    words = "<pad> <end> <unk> a photo of cat dog on the beach in snow near red ball".split()  # noqa: SIM905
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": len(words)}
    if request.param == "gpt2":
        config = transformers.GPT2Config(n_positions=128, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, **special)
        writer = transformers.GPT2LMHeadModel(config)
    else:
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        config = transformers.T5Config(**shape, decoder_start_token_id=0, **special)
        writer = transformers.T5ForConditionalGeneration(config)
        writer.shared.weight.data *= 0.05  # or it would repeat itself
    folder = tmp_path_factory.mktemp(request.param)
    writer.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_a_language_model_writes_about_the_concept_repeatably(language_model):
    state = torch.random.get_rng_state()
    cats = write_sentences("a cat", language_model, count=30, seed=3)
    assert FEWEST_WRITTEN <= len(cats) == len(set(cats)) <= 30 and all("cat" in text.split() for text in cats)
    assert write_sentences("cat", language_model, count=30, seed=3) == cats
    assert write_sentences("cat", language_model, count=30, seed=4) != cats
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_language_model_that_does_not_name_the_concept(language_model, model):
    with pytest.raises(ValueError, match=r'named "zebra" in only 0 of 400 texts'):
        p2pz.direction("cat", "zebra", language_model=language_model, model=model)


@pytest.mark.filterwarnings("ignore:this direction is hardly longer")
def test_direction_from_a_writer(model):
    def writer(request, count, seed):
        noun = "cat" if " cat." in request else "dog"
        return [f"a photo of a {noun} {place}" for place in ("", *mini_world.PLACE_PHRASES.values())] * 2 + [
            f"a sketch of a {noun} {place} near a tree" for place in mini_world.PLACE_PHRASES.values()
        ]

    made = p2pz.direction("cat", "dog", language_model=writer, seed=5, model=model)
    sides = [write_sentences(word, writer, seed=5) for word in ("cat", "dog")]
    expected = p2pz.direction(sentences=sides, model=model)
    assert torch.equal(made.states, expected.states) and made.sentences_hash == expected.sentences_hash != ""
    assert made.words == "cat -> dog" and made.sentences == (13, 13) and made.report.word_swap > 0.9


def test_what_is_kept_of_what_a_language_model_writes():
    asked = []

    def writer(request, count, seed):
        asked.append((request, count, seed))
        number = 10 * seed
        return [
            f'Here is a caption for a cat:\n\n1. "A cat on a sofa number {number}."\n2. A cat again.',
            f"- a black Cat, number {number}",
            "- a black Cat",
            f"two cats number {number}",
            f"a catalogue of dogs, number {number}",
            "",
        ]

    kept = write_sentences("the cat", writer, count=11, seed=1)
    assert [seed for *_, seed in asked] == [1, 2, 3, 4] and asked[0][1] == 11 and " the cat." in asked[0][0]
    assert kept[:4] == ["A cat on a sofa number 10.", "a black Cat, number 10", "a black Cat", "two cats number 10"]
    assert len(kept) == 11 == len(set(kept)) and not any("catalogue" in text for text in kept)


@pytest.mark.parametrize("name", ["missing", "."])
def test_folders_that_are_no_language_model(name, tmp_path):
    with pytest.raises(ValueError, match=r"language model .* (does not exist|cannot be loaded)"):
        write_sentences("cat", tmp_path / name)


# --- embeddings ---


def test_direction_from_published_embeddings(model, tmp_path):
    states = model.encode_text(["a photo of a cat", "a cat in the snow", "a sketch of a cat"])
    torch.save(states.half(), tmp_path / "cat.pt")
    torch.save(model.encode_text(["a photo of a dog"]), tmp_path / "dog.pt")
    made = p2pz.direction(embeddings=(tmp_path / "cat.pt", str(tmp_path / "dog.pt")), model=model)
    expected = model.encode_text(["a photo of a dog"])[0] - states.half().float().mean(0)
    assert torch.equal(made.states, expected) and made.sentences == (3, 1) and made.states.dtype == torch.float32
    assert (made.source, made.target, made.sentences_hash) == ("", "", "") and made.report.noise > 0
    mean = states.mean(0, keepdim=True)
    torch.save(mean, tmp_path / "mean.pt")
    named = p2pz.direction("cat", "dog", embeddings=(tmp_path / "mean.pt", tmp_path / "dog.pt"), model=model)
    assert named.words == "cat -> dog" and named.report.noise is None and named.report.lowest_stability is None


class Payload:
    """What a pickle must not be able to bring along."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2, 77, 1024), "77 tokens of width 1024, but this model's text encoder gives 77 of width 128"),
        (torch.zeros(2, 64, 128), "64 tokens of width 128"),
        (torch.zeros(77, 128), r"must be a tensor \[sentences, 77, 128\], but they are a tensor \[77, 128\]"),
        (torch.zeros(0, 77, 128), r"a tensor \[0, 77, 128\]"),
        (torch.zeros(1, 77, 128, dtype=torch.int64), "must be a tensor"),
        ({"cat": torch.zeros(1, 77, 128)}, "they are a dict"),
        (torch.full((1, 77, 128), math.nan), "not finite"),
        (torch.zeros(1, 77, 128).to(torch.float8_e4m3fn), r"a tensor \[1, 77, 128\] of float8_e4m3fn"),
        (torch.zeros(1, 77, 128).to_sparse(), "sparse, nested"),
        (torch.zeros(1, 77, 128, device="meta"), "without its numbers"),
        (Payload(), r"cat\.pt hold more than tensors .* save the states alone with torch\.save"),
        (b"hello", "are damaged or no file of PyTorch, so they cannot be read"),
        (b"", "are damaged or no file of PyTorch"),
        (None, "do not exist"),
    ],
    ids=range(14),
)
def test_embeddings_that_do_not_fit(content, message, model, tmp_path):
    path = tmp_path / "cat.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        p2pz.direction(embeddings=(path, path), model=model)
    assert str(caught.value).isprintable() and "weights_only" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_embeddings(layout, model, tmp_path):
    torch.save(torch.nested.as_nested_tensor([torch.zeros(77, 128)], layout=layout), tmp_path / "cat.pt")
    with pytest.raises(ValueError, match=r"cat\.pt must be a tensor \[sentences, 77, 128\], .* sparse, nested"):
        p2pz.direction(embeddings=(tmp_path / "cat.pt",) * 2, model=model)


def test_embeddings_in_a_folder_or_as_parameters(model, tmp_path):
    with pytest.raises(ValueError, match="cannot be read: is a directory"):
        p2pz.direction(embeddings=(tmp_path, tmp_path), model=model)
    for name in ("cat.pt", "dog.pt"):
        torch.save(torch.nn.Parameter(torch.randn(1, 77, 128)), tmp_path / name)
    made = p2pz.direction(embeddings=(tmp_path / "cat.pt", tmp_path / "dog.pt"), model=model)
    assert not made.states.requires_grad


def test_only_one_kind_of_origin(model):
    with pytest.raises(ValueError, match="not several of them"):
        p2pz.direction(sentences=(["a"], ["b"]), embeddings=("a.pt", "b.pt"), model=model)


# --- the report ---


def test_report_by_brute_force():
    """Each sentence left out, and every way to halve each side's sentences, by hand."""
    source, target = torch.randn(6, 3, 4), 3 * torch.randn(4, 3, 4) + 0.5
    swap = torch.randn(3, 4)
    report = direction_report(source, target, swap)
    made = target.mean(0) - source.mean(0)

    def cosine(a, b):
        return float((a * b).sum() / a.norm() / b.norm())

    without = [target.mean(0) - torch.cat([source[:i], source[i + 1 :]]).mean(0) for i in range(6)]
    without += [torch.cat([target[:i], target[i + 1 :]]).mean(0) - source.mean(0) for i in range(4)]
    cosines = [cosine(each, made) for each in without]

    def variance_of_mean(states):
        """A mean of n differs from the truth as half as much as two means of n / 2 differ from each other."""
        chosen = [list(half) for half in itertools.combinations(range(len(states)), len(states) // 2)]
        halves = [
            states[half].mean(0) - states[[i for i in range(len(states)) if i not in half]].mean(0) for half in chosen
        ]
        return sum(float(half.square().sum()) for half in halves) / len(halves) / 4

    noise = math.sqrt(variance_of_mean(source) + variance_of_mean(target))
    expected = float(made.norm()), noise, min(cosines), sum(cosines) / 10, cosine(made, swap)
    assert astuple(report) == pytest.approx(expected, rel=1e-5)


MIXED = ["a photo of a cat", "a sketch of a dog at night", "an oil pastel of a zebra", "a horse in the city"]


def test_a_direction_within_the_noise_warns(model):
    with pytest.warns(UserWarning, match="hardly longer .* than what it owes to the choice of its sentences"):
        made = p2pz.direction(sentences=(MIXED, [f"{text} near a tree" for text in MIXED]), model=model)
    assert made.report.within_noise and made.report.word_swap is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clear = p2pz.direction("cat", "dog", model=model)
    assert not clear.report.within_noise and clear.report.lowest_stability > 0.99 and clear.report.word_swap > 0.9
    assert str(clear.report).startswith(f"norm {float(clear.states.norm()):.1f}; ")


UNIFORM = ["a photo of a cat in the snow", "a photo of a cat in the snow near a tree"]


@pytest.mark.filterwarnings("ignore:this direction is hardly longer")
@pytest.mark.parametrize("other", [UNIFORM, ["a photo of a cat"] * 5, ["a photo of a cat"]], ids=len)
def test_both_sides_noise_counts(other, model):
    there, back = (p2pz.direction(sentences=sides, model=model).report for sides in ((MIXED, other), (other, MIXED)))
    assert there.within_noise and back.within_noise and 1 < there.norm / there.noise < 2.5
    assert astuple(there) == pytest.approx(astuple(back))


def test_rounding_is_no_noise(model):
    report = p2pz.direction(sentences=(["a photo of a cat"] * 5, ["a photo of a dog"] * 3), model=model).report
    assert report.noise == 0 and not report.within_noise and "times" not in str(report)
    states = torch.randn(1, 77, 128).repeat(4, 1, 1)
    states += 1e-7 * torch.randn_like(states)
    assert direction_report(states, states.flip(0).roll(1, 1)).noise == 0 == direction_report(states, states[:2]).norm


def test_one_sentence_on_each_side_has_no_noise_and_no_stability(model):
    report = p2pz.direction("cat", "dog", sentences=(["a photo of a cat"], ["a photo of a dog"]), model=model).report
    assert (report.noise, report.lowest_stability, report.mean_stability) == (None, None, None)
    assert report.word_swap == pytest.approx(1) and not report.within_noise


# --- the card ---


def test_the_card_tells_where_a_direction_comes_from(model, tmp_path):
    made = p2pz.direction("cat", "dog", model=model)
    made.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        card = file.metadata()
    assert card["words"] == "cat -> dog" and card["version"] == p2pz.__version__ and card["sentences"] == "57 57"
    assert card["text_fingerprint"] == model.text_fingerprint and len(card["sentences_hash"]) == 16
    assert json.loads(card["report"])["norm"] == pytest.approx(float(made.states.norm()))
    loaded = p2pz.Direction.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.states, made.states)
    assert replace(loaded, states=None) == replace(made, states=None)
    other = p2pz.direction(sentences=(["a cat"], ["a dog"]), model=model)
    again = p2pz.direction(sentences=(["a cat", " "], ["a dog"]), model=model)
    assert card["sentences_hash"] != other.sentences_hash == again.sentences_hash
    assert other.sentences_hash != p2pz.direction(sentences=(["a dog"], ["a cat"]), model=model).sentences_hash


def test_files_of_older_versions_load(model, tmp_path):
    metadata = {"format": "p2pz direction", "source": "cat", "target": "dog", "sentences": "57 56"}
    metadata["text_fingerprint"] = model.text_fingerprint
    save_file({"states": torch.ones(77, 128)}, tmp_path / "old.safetensors", metadata=metadata)
    old = p2pz.Direction.load(tmp_path / "old.safetensors")
    assert (old.words, old.sentences, old.report, old.version) == ("cat -> dog", (57, 56), None, "")
    old.check_fits(model)
    with pytest.raises(ValueError, match="made with another text encoder"):
        old.check_fits(replace(model, text_fingerprint="another"))


CARD = {"format": "p2pz direction", "source": "cat", "target": "dog", "sentences": "57 57"}
WRONG_TYPE = {"norm": "x", "noise": None, "lowest_stability": None, "mean_stability": None, "word_swap": None}


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"sentences": "a b"}, r"invalid literal for int\(\) with base 10: 'a'"),
        ({"sentences": ""}, "expected 2, got 0"),
        ({"sentences": "1 2 3"}, "expected 2"),
        ({"report": "hello"}, "Expecting value"),
        ({"report": "[1]"}, "must be a mapping"),
        ({"report": '{"a": 1}'}, "unexpected keyword argument 'a'"),
        ({"report": json.dumps(WRONG_TYPE)}, "code 'f'"),
        ({"terms": "null"}, "not iterable"),
        ({"terms": "5"}, "not iterable"),
        ({"terms": "[[1]]"}, "expected 2, got 1"),
        ({"terms": '[["a", 1]]'}, "to float: 'a'"),
        ({"terms": "[" * 100000}, "recursion depth"),
    ],
    ids=range(12),
)
def test_a_card_that_makes_no_sense(card, message, tmp_path):
    path = tmp_path / "cat2dog.safetensors"
    save_file({"states": torch.ones(77, 128)}, path, metadata=CARD | {"text_fingerprint": "0"} | card)
    with pytest.raises(
        ValueError, match=rf"direction .*cat2dog\.safetensors is damaged \(.*{message}.*: make it again$"
    ):
        p2pz.Direction.load(path)


def test_tensors_and_facts_are_not_mistaken_for_each_other(tmp_path):
    path = tmp_path / "cat2dog.safetensors"
    save_file({"other": torch.ones(1)}, path, metadata=CARD | {"text_fingerprint": "0", "states": "x"})
    with pytest.raises(ValueError, match="lacks states"):
        p2pz.Direction.load(path)
    save_file({"states": torch.ones(77, 128), "text_fingerprint": torch.ones(1)}, path, metadata=CARD)
    with pytest.raises(ValueError, match="lacks text_fingerprint"):
        p2pz.Direction.load(path)


@pytest.mark.parametrize(
    "states",
    [
        torch.ones(()), torch.ones(77), torch.ones(0, 128), torch.ones(77, 1), torch.ones(1, 128), torch.ones(76, 128),
        torch.ones(77, 64), torch.ones(1, 77, 128), torch.ones(3, 77, 128), torch.full((77, 128), math.nan),
        *(torch.ones(77, 128, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.complex64)),
        torch.ones(77, 128).to(torch.float8_e4m3fn),
    ],
    ids=range(14),
)  # fmt: skip
def test_states_that_do_not_fit(states, model, tmp_path):
    save_file({"states": states}, tmp_path / "a.safetensors", CARD | {"text_fingerprint": model.text_fingerprint})
    with pytest.raises(ValueError, match=r"states .*: make it again"):
        p2pz.Direction.load(tmp_path / "a.safetensors").check_fits(model)
    made = p2pz.Direction(states, "cat", "dog", (1, 1), model.text_fingerprint)  # in memory, without a file
    with pytest.raises(ValueError, match=r"must be finite floating-point numbers \[77, 128\]: make it again"):
        made.check_fits(model)


# --- sums ---


@pytest.fixture(scope="module")
def directions(model):
    return [p2pz.direction(*words, model=model) for words in (("cat", "dog"), ("cat", "cat with glasses"))]


def test_sums_of_directions(directions, tmp_path):
    dog, glasses = directions
    total = 0.7 * dog + glasses
    assert torch.allclose(total.states, 0.7 * dog.states + glasses.states)
    assert total.words == "0.7 * (cat -> dog) + (cat -> cat with glasses)"
    assert (total.source, total.target, total.sentences, total.report) == ("cat", "", (114, 114), None)
    assert total.sentences_hash == f"{dog.sentences_hash} {glasses.sentences_hash}"
    total.save(tmp_path / "sum.safetensors")
    loaded = p2pz.Direction.load(tmp_path / "sum.safetensors")
    assert loaded.words == total.words and torch.equal(loaded.states, total.states)
    again = 2 * loaded - dog
    assert again.words == "1.4 * (cat -> dog) + 2 * (cat -> cat with glasses) - (cat -> dog)"
    assert torch.allclose(again.states, 0.4 * dog.states + 2 * glasses.states, atol=1e-4)


def test_multiples_keep_their_words_and_negatives_swap_them(directions):
    dog, _ = directions
    half, back = dog * 0.5, -dog
    assert torch.equal(half.states, 0.5 * dog.states) and torch.equal(back.states, -dog.states)
    assert (half.source, half.target, half.words) == ("cat", "dog", "0.5 * (cat -> dog)")
    assert (back.source, back.target, back.words) == ("dog", "cat", "-(cat -> dog)")
    assert (dog - dog).states.norm() == 0 and (dog - dog).words == "(cat -> dog) - (cat -> dog)"
    assert (dog + 2 * dog).target == "dog" and (-(0.5 * dog)).words == "-0.5 * (cat -> dog)"


def test_a_wordless_direction_takes_the_others_source(directions, model):
    wordless = p2pz.direction(sentences=(["a cat"], ["a dog"]), model=model)
    assert (wordless + directions[0]).source == "cat"
    assert (wordless + directions[0]).words == "(sentences) + (cat -> dog)"


def test_directions_that_cannot_be_added(directions, model):
    dog = directions[0]
    with pytest.raises(ValueError, match="different text encoders"):
        dog + replace(dog, text_fingerprint="another")
    with pytest.raises(ValueError, match=r"must be float32 \[77, 128\], not float32 \[77, 1\]"):
        dog + replace(dog, states=torch.ones(77, 1))
    for factor in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite number"):
            factor * dog
    for wrong in (lambda: dog + 1, lambda: dog * dog, lambda: "2" * dog, lambda: dog - "cat->dog"):
        with pytest.raises(TypeError):
            wrong()


# --- captions and samples ---


def test_captions_of_held_out_scenes(model):
    """What CLIP recognises, against the scene's own caption: style, animal and accessory, and the place."""
    scenes = [pair[0] for task in mini_world.TASKS for pair in [mini_world.task_pair(task, i) for i in range(6)]]
    captions = p2pz.caption([mini_world.render(scene) for scene in scenes], model=model)
    truths = [mini_world.caption(scene) for scene in scenes]
    style_and_place = [
        (mini_world.STYLE_PHRASES[scene.style], mini_world.PLACE_PHRASES[scene.place], scene.animal) for scene in scenes
    ]
    right = [all(part in text for part in parts) for text, parts in zip(captions, style_and_place, strict=True)]
    assert sum(right) >= 23 and sum(a == b for a, b in zip(captions, truths, strict=True)) >= 16


def test_samples_are_what_was_asked_for(model):
    """Held-out combinations, few steps; the judge has no part in drawing them."""
    prompts = [
        "a photo of an orange cat on the beach near a palm tree",
        "a sketch of a black dog in a meadow",
        "an oil pastel of a zebra in a room near a lamp",
        "a photo of a white rabbit with glasses in a room",
    ]
    pictures = p2pz.sample(prompts, model=model, steps=12, seed=5, progress=False)
    seen = load_judge(MINI_FOLDER / "judge").classify(p2pz.images.to_tensor(pictures))
    assert seen["animal"] == ["cat", "dog", "zebra", "rabbit"]
    assert seen["style"] == ["photo", "sketch", "oil pastel", "photo"]
    assert seen["accessory"] == ["none", "none", "none", "glasses"]


def test_each_sample_has_a_seed_of_its_own(model):
    both = p2pz.sample(["a photo of a cat"] * 2, model=model, steps=3, seed=4, progress=False)
    second = p2pz.sample("a photo of a cat", model=model, steps=3, seed=5, progress=False)[0]
    assert psnr(both[1], second) > 50 and psnr(both[0], second) < 25


def test_samples_of_other_sizes(model):
    picture = p2pz.sample("a photo of a cat", model=model, steps=1, size=(160, 92), progress=False)[0]
    assert picture.size == (160, 92)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (130, 128)}, "multiples of 4"),
        ({"size": (16, 128)}, "from 32 to 4096"),
        ({"size": (128.0, 5000)}, "from 32 to 4096"),
        ({"size": (128.0, 128.0)}, "from 32 to 4096"),
        ({"guidance": "x"}, "guidance must be zero or more, not 'x'"),
        ({"guidance": -2.0}, "guidance must be zero or more"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"seed": "a"}, "seed must be a whole number from 0 to 4294967295, not 'a'"),
        ({"seed": 2**32}, "seed must be"),
        ({"seed": None}, "seed must be"),
        ({"seed": True}, "seed must be"),
        ({"steps": 0}, "steps must be a whole number from 1 to 999, not 0"),
    ],
)
def test_bad_sample_settings(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        p2pz.sample("a photo of a cat", model=model, progress=False, **arguments)
    with pytest.raises(ValueError, match="empty"):
        p2pz.sample([], model=model)
