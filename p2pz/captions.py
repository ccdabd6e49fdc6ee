"""What an image shows, in words: given by the user, or recognised by a captioner or the bundled model's CLIP."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from PIL import Image

from p2pz.clip import load_mini_clip
from p2pz.engine import explain_out_of_memory
from p2pz.images import ImageLike, as_list, read_image
from p2pz.model import Model, find_device, loaded
from p2pz.text import load_pretrained, quiet_transformers
from p2pz.weights import mini_world, reason

if TYPE_CHECKING:  # importing transformers takes seconds: only when a captioner is loaded
    from transformers import BlipForConditionalGeneration, BlipProcessor


@dataclass(frozen=True)
class Captioner:
    """A BLIP model that describes images.

    Source: Li et al., "BLIP: Bootstrapping Language-Image Pre-training" (2022).
    """

    name: str
    processor: BlipProcessor
    model: BlipForConditionalGeneration

    @torch.no_grad()
    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A caption for each RGB picture, the same one every time. Raises ValueError for a picture without words."""
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.model.device, self.model.dtype)
        with quiet_transformers():
            tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=40)
        texts = [" ".join(text.split()) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
        if not all(texts):
            raise ValueError(
                f"captioner {self.name} finds no words for the image: give a prompt that says what it shows"
            )
        return texts


def load_captioner(source: str | os.PathLike, device: str | torch.device | None = None) -> Captioner:
    """Load a BLIP captioner through transformers.

    Args:
        source: a folder, or the name of a model on the hub such as "Salesforce/blip-image-captioning-base".
        device: None takes the GPU if there is one; float16 on a GPU, float32 on the CPU.

    Returns:
        The frozen captioner, for `caption`.

    Raises:
        ValueError: it cannot be loaded or is no BLIP captioner, or there is no such device.
    """
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    device = find_device(device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    name = os.fspath(source)
    folder = str(Path(name).expanduser())
    local = os.path.isdir(folder)
    if not local and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f'captioner {name} does not exist: give a folder or a name on the hub, such as "owner/model"')

    def read(local: bool) -> tuple[BlipProcessor, BlipForConditionalGeneration]:
        kind = BlipConfig.get_config_dict(folder, local_files_only=local)[0].get("model_type")
        if kind != "blip":
            raise ValueError(f"it is a {kind} model; a BLIP captioner is needed")
        processor = BlipProcessor.from_pretrained(folder, local_files_only=local, trust_remote_code=False)
        return processor, load_pretrained(BlipForConditionalGeneration, folder, local_files_only=local, dtype=dtype)

    try:
        with quiet_transformers():
            try:
                processor, model = read(True)
            except OSError:  # it is not in the hub's local cache, or not all of it
                if local:
                    raise
                _ask_hub(name)
                processor, model = read(False)
    except Exception as error:  # transformers and the hub raise a dozen kinds
        raise ValueError(f"captioner {name} cannot be loaded: {reason(error)}") from None
    return Captioner(name, processor, model.to(device))


def _ask_hub(name: str) -> None:
    """Raise ValueError if the hub does not give a model; at once, where a download would be tried for a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # of a network that does not work, a model that there is not, or one not for everybody
        raise ValueError(
            f"it is not, or not all, in the hub's local cache, and the hub does not give it ({reason(error, 160)})"
        ) from None


@explain_out_of_memory
def caption(
    img: ImageLike | Sequence[ImageLike],
    captioner: str | os.PathLike | Captioner | None = None,
    *,
    model: Model | None = None,
) -> str | list[str]:
    """Describe images: with a captioner in a sentence, without one in the words of the bundled model's world.

    The bundled model compares candidates field by field: first style, animal and accessory together, then the fur, the
    place and the thing beside the animal (or none).

    Args:
        img: a path, a PIL image, an array, or a list of them.
        captioner: a BLIP model: a folder, a name on the hub, or what `load_captioner` returns.
        model: without a captioner the bundled model; None loads the default model.

    Returns:
        A caption, or a list of them for a list.

    Raises:
        ValueError: neither a captioner nor the bundled model is there, the captioner cannot be loaded, or an image
            cannot be read.
    """
    images, single = as_list(img)
    pictures = [read_image(image) for image in images]
    if captioner is None:
        model = loaded(model)
        if not model.is_mini:
            raise ValueError(
                "this model cannot caption images: give a prompt that says what the image shows, or a captioner"
            )
        captions = _retrieve(pictures, model)
    else:
        if not isinstance(captioner, Captioner):
            captioner = load_captioner(captioner, model.device if model else None)
        captions = captioner.describe(pictures)
    return captions[0] if single else captions


def captions_for(
    pictures: Sequence[Image.Image], prompt: str | Sequence[str] | None, default: str, model: Model
) -> list[str]:
    """A caption for each picture: the caller's, or what the bundled model recognises, or `default` for other models.

    Raises:
        ValueError: `prompt` is no text, or a list of something else or of another length than the pictures.
    """
    if isinstance(prompt, str):
        return [prompt] * len(pictures)
    if prompt is not None:
        prompts = list(prompt) if isinstance(prompt, Iterable) else [prompt]
        for each in prompts:
            if not isinstance(each, str):
                kind = type(each).__name__
                raise ValueError(f"a prompt is a text, not {kind}: give one text, or a list with one for each image")
        if len(prompts) != len(pictures):
            raise ValueError(
                f"there are {len(pictures)} images but {len(prompts)} prompts: give one for each, or one text"
            )
        return prompts
    if model.is_mini:
        return _retrieve(pictures, model)
    return [default] * len(pictures)


def _retrieve(pictures: Sequence[Image.Image], model: Model) -> list[str]:
    clip = load_mini_clip(model)
    images = clip.image_features(pictures)
    known = [{"style": "photo", "animal": "cat", "accessory": "none", "fur": "", "place": "", "thing": ""}] * len(
        pictures
    )
    mention: tuple[str, ...] = ("accessory",)
    for fields in _STAGES:
        mention = (*mention, *(field for field in fields if field in mini_world.MENTIONS and field not in mention))
        options = [_options(fields, values) for values in known]
        sentences = sorted({_sentence(values, mention) for row in options for values in row})
        scores = images @ clip.text_features(sentences).T
        column = {sentence: i for i, sentence in enumerate(sentences)}
        known = [
            max(row, key=lambda values, i=i: float(scores[i, column[_sentence(values, mention)]]))
            for i, row in enumerate(options)
        ]
    return [_sentence(values, mention) for values in known]


_STAGES = (("style", "animal", "accessory"), ("fur",), ("place",), ("thing",))


def _options(fields: tuple[str, ...], known: dict[str, str]) -> list[dict[str, str]]:
    """Every choice of the given fields on top of what is known."""
    things = mini_world.THINGS_IN.get(known["place"], ())
    choices = mini_world.CHOICES | {"thing": things}
    return [known | dict(zip(fields, values, strict=True)) for values in product(*(choices[field] for field in fields))]


def _sentence(values: dict[str, str], mention: tuple[str, ...]) -> str:
    return mini_world.caption(SimpleNamespace(**values), mention)
