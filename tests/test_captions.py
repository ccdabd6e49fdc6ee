"""Captions of a BLIP model, which is random here and as small as can be."""

import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import p2pz
from p2pz.captions import captions_for, load_captioner
from p2pz.model import Model
from p2pz.sentences import write_sentences
from p2pz.weights import MINI_FOLDER

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat dog on the beach in snow with hat of photo red blue".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BLIP folder; its random weights are large enough to look at the image."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    marks = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = BlipConfig(
        text_config=shape | marks | {"encoder_hidden_size": 32, "max_position_embeddings": 64},
        vision_config=shape | {"image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # as they are, they do not look at the image
            parameter.data.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("blip")
    model.save_pretrained(folder)
    processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    tokenizer = BertTokenizer({word: i for i, word in enumerate(WORDS)})
    BlipProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (4, 3, 3, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((50, 40), Image.Resampling.NEAREST) for pixels in small]


def test_captions_are_those_of_the_model(folder, pictures):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    captions = p2pz.caption(pictures, folder)
    processor = BlipProcessor.from_pretrained(folder)
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    for picture, caption in zip(pictures, captions, strict=True):
        tokens = model.generate(**processor(images=picture, return_tensors="pt"), do_sample=False, max_new_tokens=40)
        assert caption == processor.decode(tokens[0], skip_special_tokens=True) != ""
    assert len(set(captions)) > 1 and set(" ".join(captions).split()) <= set(WORDS)


def test_all_forms_of_images_and_captioners(folder, pictures, tmp_path):
    captioner = load_captioner(str(folder), "cpu")
    pictures[1].save(tmp_path / "a.png")
    expected = p2pz.caption(pictures[1], captioner)
    assert isinstance(expected, str)
    assert p2pz.caption([tmp_path / "a.png", np.asarray(pictures[1])], captioner) == [expected] * 2
    assert p2pz.caption(tmp_path / "a.png", captioner=folder, model=p2pz.load(MINI_FOLDER, device="cpu")) == expected
    assert not any(parameter.requires_grad for parameter in captioner.model.parameters())


def test_a_caption_without_words_is_an_error(folder, pictures, monkeypatch):
    captioner = load_captioner(folder, "cpu")
    silence = torch.tensor([[2, 3, 0]])
    monkeypatch.setattr(captioner.model, "generate", lambda **inputs: silence)
    with pytest.raises(ValueError, match="finds no words for the image: give a prompt"):
        p2pz.caption(pictures[0], captioner)


def test_captioners_that_cannot_be_loaded(folder, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    for name in ("missing", tmp_path / "missing", "a/b/c"):
        with pytest.raises(ValueError, match=r"captioner .* does not exist: give a folder or a name on the hub"):
            p2pz.caption(pictures[0], name)
    with pytest.raises(ValueError, match="cannot be loaded"):
        p2pz.caption(pictures[0], tmp_path / "empty")
    with pytest.raises(ValueError, match="it is a gpt2 model; a BLIP captioner is needed"):
        p2pz.caption(pictures[0], tmp_path / "other")
    with pytest.raises(ValueError, match="no device cuda:99"):
        load_captioner(folder, "cuda:99")


def test_the_hubs_cache_goes_before_the_hub(folder, pictures, tmp_path, monkeypatch):
    """Offline, the hub's client tries again for more than a minute."""
    import huggingface_hub

    asked = []

    def unreachable(self, name, timeout):
        asked.append(name)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--owner--blip"
    shutil.copytree(folder, place / "snapshots" / "0123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123")
    captioner = load_captioner("owner/blip", "cpu")
    assert not asked and captioner.describe(pictures[:1]) == load_captioner(folder, "cpu").describe(pictures[:1])
    (place / "snapshots" / "0123" / "model.safetensors").unlink()
    for name in ("owner/blip", "owner/none"):
        with pytest.raises(ValueError, match=f"captioner {name} .* the hub does not give it .*no route to host"):
            load_captioner(name, "cpu")
    assert asked == ["owner/blip", "owner/none"]


def test_missing_weights_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in os.listdir(folder):
        os.symlink(folder / name, tmp_path / name)
    tensors = load_file(folder / "model.safetensors")
    del tensors["vision_model.post_layernorm.weight"]
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack vision_model\.post_layernorm\.weight"):
        load_captioner(tmp_path)


def test_pickles_are_not_opened(folder, tmp_path):
    for name in os.listdir(folder):
        os.symlink(folder / name, tmp_path / name)
    torch.save(load_captioner(folder, "cpu").model.state_dict(), tmp_path / "pytorch_model.bin")
    load_captioner(tmp_path, "cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        load_captioner(tmp_path, "cpu")


CODE = {"auto_map": {"AutoConfig": "evil.Evil", "AutoImageProcessor": "evil.Evil"}}
REMOTE = {  # what names the code in a folder, and how the folder is used
    "captioner": ("config.json", CODE | {"model_type": "evil"}, load_captioner),
    "its processor": (
        "processor_config.json", {"image_processor": CODE | {"image_processor_type": "Evil"}}, load_captioner
    ),
    "language model": ("config.json", CODE | {"model_type": "evil"}, partial(write_sentences, "cat")),
}  # fmt: skip


@pytest.mark.parametrize("name", REMOTE)
def test_code_of_a_folder_is_never_run(name, folder, tmp_path, monkeypatch):
    """Neither by itself nor after a question on the terminal."""
    file, changes, load = REMOTE[name]
    place, asked = shutil.copytree(folder, tmp_path / "model"), []
    (place / file).write_text(json.dumps(json.loads((place / file).read_text()) | changes))
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load(place)
    assert not asked and not (tmp_path / "ran").exists() and "\n" not in str(error.value)


def test_other_models_need_a_captioner(pictures, monkeypatch):
    model = p2pz.load(MINI_FOLDER, device="cpu")
    monkeypatch.setattr(Model, "is_mini", False)
    with pytest.raises(ValueError, match="give a prompt that says what the image shows, or a captioner"):
        p2pz.caption(pictures[0], model=model)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, "a prompt is a text, not int: give one text, or a list with one for each image"),
        ([None, "a cat"], "a prompt is a text, not NoneType"),
        (["a cat"], "there are 2 images but 1 prompts"),
        ((), "there are 2 images but 0 prompts"),
    ],
)
def test_prompts_are_texts(prompt, message):
    with pytest.raises(ValueError, match=message):
        captions_for([None] * 2, prompt, "a photo", None)


@pytest.mark.parametrize("prompt", [("a", "b"), ["a", "b"], np.array(["a", "b"])])
def test_prompts_of_several_images(prompt):
    assert captions_for([None] * 2, prompt, "a photo", None) == ["a", "b"]
    assert captions_for([None] * 2, "a", "a photo", None) == ["a", "a"]


def test_command_line_asks_the_captioner(folder, pictures, tmp_path, monkeypatch, capsys):
    from p2pz import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("P2PZ_MODEL", raising=False)
    pictures[2].save("a.png")
    expected = p2pz.caption("a.png", folder)
    words = ["--captioner", str(folder), "--steps", "1", "--device", "cpu"]
    assert cli.main(["edit", "a.png", "--from", "cat", "--to", "dog", *words, "-o", "b.png"]) == 0
    assert f'wrote b.png: "{expected}", ' in capsys.readouterr().out
    assert cli.main(["edit", "a.png", "--from", "cat", "--to", "dog", *words, "-o", "b.png", "--prompt", "a cat"]) == 0
    assert 'wrote b.png: "a cat", ' in capsys.readouterr().out
    assert cli.main(["invert", "a.png", *words, "-o", "a.safetensors"]) == 0
    assert p2pz.Inversion.load("a.safetensors").prompt == expected
