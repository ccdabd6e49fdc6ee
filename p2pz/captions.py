"""What an image shows, in words: given by the user, or recognised by the bundled model's CLIP."""

from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace

from PIL import Image

from p2pz.clip import load_mini_clip
from p2pz.images import ImageLike, as_list, read_image
from p2pz.model import Model, load
from p2pz.weights import mini_world


def caption(img: ImageLike | Sequence[ImageLike], *, model: Model | None = None) -> str | list[str]:
    """Describe images in the words of the bundled model's world.

    Candidates are compared field by field: first style, animal and accessory together, then the fur, the place and the
    thing beside the animal (or none).

    Args:
        img: a path, a PIL image, an array, or a list of them.
        model: the bundled model; None loads the default model.

    Returns:
        A caption, or a list of them for a list.

    Raises:
        ValueError: the model is not the bundled one, or an image cannot be read.
    """
    model = model or load()
    if not model.is_mini:
        raise ValueError("only the bundled model can caption images: give a prompt that says what the image shows")
    images, single = as_list(img)
    captions = _retrieve([read_image(image) for image in images], model)
    return captions[0] if single else captions


def captions_for(
    pictures: Sequence[Image.Image], prompt: str | Sequence[str] | None, default: str, model: Model
) -> list[str]:
    """A caption for each picture: the caller's, or what the bundled model recognises, or `default` for other models.

    Raises:
        ValueError: `prompt` is a list of another length than the pictures.
    """
    if isinstance(prompt, str):
        return [prompt] * len(pictures)
    if prompt is not None:
        if len(prompt) != len(pictures):
            raise ValueError(
                f"there are {len(pictures)} images but {len(prompt)} prompts: give one for each, or one text"
            )
        return list(prompt)
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
