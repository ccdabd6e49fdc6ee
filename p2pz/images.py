"""Images in and out: files, PIL images and arrays to tensors, and back."""

import contextlib
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from p2pz.files import atomic_path, cause, check_place

ImageLike = str | os.PathLike | Image.Image | np.ndarray

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation (CIPA DC-008, "Exif", tag 0x0112)."""

LARGEST_SHAPE_RATIO = 8
"""Longer images than this are refused: at a model's size their short side would be a few latents."""


def read_image(image: ImageLike) -> Image.Image:
    """Any accepted form of an image as an upright sRGB picture; transparency becomes white.

    Args:
        image: a path, a PIL image, or an array `[H, W, 3]` (also `[H, W]` or `[H, W, 4]`), uint8, uint16 or floats in
            [0, 1]. A PIL image or file of 32-bit whole numbers holds 8-bit values if all are below 256, else 16-bit.

    Raises:
        ValueError: the file is missing, no image or too large, the values are of another shape or range, or a side is
            a few pixels.
    """
    name = "the image"
    if isinstance(image, (str, os.PathLike)):
        if not os.fspath(image):
            raise ValueError("the path of the image is empty")
        picture, name = _open(Path(image)), f"image {image}"
    elif isinstance(image, Image.Image):
        picture = image
    elif isinstance(image, np.ndarray):
        picture = _from_array(image, name)
    else:
        raise ValueError(f"an image is a path, a PIL image or a numpy array, not {type(image).__name__}")
    picture = _to_srgb(_upright(picture))
    if picture.mode.startswith("I"):  # 16 or 32 bits a pixel; PIL would cut off the values above 255
        levels = np.asarray(picture)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"{name} holds whole numbers that are not from 0 to 65535: scale them to 8 or 16 bits")
        eight = picture.mode == "I" and levels.max() <= 255  # 16-bit ones would be black
        picture = _from_array(levels.astype(np.uint8 if eight else np.uint16), name)
    elif picture.mode == "F":
        picture = _from_array(np.asarray(picture), name)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if min(picture.size) < 16 or max(picture.size) > LARGEST_SHAPE_RATIO * min(picture.size):
        raise ValueError(
            f"{name} has {picture.width} x {picture.height} pixels and cannot be edited: both sides must be at least "
            f"16 pixels and one at most {LARGEST_SHAPE_RATIO} times the other"
        )
    picture = picture.convert("RGB")
    picture.info.pop("icc_profile", None)  # it is sRGB now
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as the picture itself says; one whose EXIF cannot be read stays as it is."""
    try:
        turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # what other programs wrote wrongly raises almost anything
        return picture
    if turn is None:
        return picture
    picture = picture.transpose(turn)
    for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # or it would be turned again
        picture.info.pop(name, None)
    return picture


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Colours of another space, such as phones' Display P3, by the picture's own profile; without one, as they are."""
    profile = picture.info.get("icc_profile")
    if profile is None:
        return picture
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    if picture.mode == "P" or "transparency" in picture.info:
        picture = picture.convert(mode)
    if picture.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError):  # damaged, or of another kind of picture
        return picture


def _open(path: Path) -> Image.Image:
    try:
        with open(path, "rb") as file, _identify(file if file.seekable() else io.BytesIO(file.read())) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(
            f"image {path} cannot be read: it is damaged or of an unknown format; "
            "save it as JPEG or PNG with another program"
        ) from None
    except Image.DecompressionBombError as error:
        numbers, *_ = str(error).split(",")  # behind the comma PIL speaks of an attack
        raise ValueError(f"image {path} cannot be read: {numbers}; reduce it first") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be read: {cause(error)}") from None


def _identify(file: BinaryIO) -> Image.Image:
    """What `Image.open` gives, but it takes large photos for attacks: those may have twice the pixels it allows."""
    for kind in (JpegImageFile, PngImageFile):
        file.seek(0)
        with contextlib.suppress(SyntaxError):  # of another kind
            picture = kind(file)
            pixels, most = picture.width * picture.height, 4 * (Image.MAX_IMAGE_PIXELS or math.inf)
            if pixels > most:
                raise Image.DecompressionBombError(f"Image size ({pixels} pixels) exceeds limit of {most} pixels")
            return picture
    return Image.open(file)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise ValueError(f"an image array has shape [height, width, 3], not {list(array.shape)}")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{name} holds floats that are not from 0 to 1: scale them, or make them 8-bit (0 to 255)")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array is uint8, uint16 or floating point, not {array.dtype}")
    return Image.fromarray(array)


def as_list(things: Any, what: str = "images") -> tuple[list[Any], bool]:
    """The things as a list, and whether it was a single one. Raises ValueError for an empty list."""
    if not isinstance(things, (list, tuple)):
        return [things], True
    if not things:
        raise ValueError(f"the list of {what} is empty: give at least one")
    return list(things), False


def same_size_groups(sizes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Indices of the images that can share a batch, group by group.

    Args:
        sizes: the size of every image.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(tuple(size), []).append(i)
    return list(groups.values())


def working_size(size: tuple[int, int], native: int, multiple: int) -> tuple[int, int]:
    """The size at which a model works on an image: about `native * native` pixels in the image's own shape.

    An image that a model can work on as it is, of that many pixels within a sixteenth, keeps its size: so a result can
    be edited again without being resized.

    Args:
        size: width and height of the image.
        native: width and height the model was trained at.
        multiple: both results are multiples of it (pixels per latent).

    Returns:
        Width and height.
    """
    scale = native / (size[0] * size[1]) ** 0.5
    if size[0] % multiple == size[1] % multiple == 0 and abs(scale**-2 - 1) <= 1 / 16:
        return size
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in size)


def to_original_size(picture: Image.Image, original: ImageLike) -> Image.Image:
    """A result at the size of the image that it was made of; enlarging adds no detail.

    Args:
        picture: a result of `edit`, at the size the model works at.
        original: the image that was edited, in any form that `read_image` takes.

    Raises:
        ValueError: the original cannot be read.
    """
    size = read_image(original).size
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as `[B, 3, H, W]` float32 in [-1, 1]."""
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """`[B, 3, H, W]` in [-1, 1] as PIL pictures."""
    arrays = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def psnr(image: Any, reference: Any, mask: Any = None) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB.

    Args:
        image, reference: PIL pictures or uint8 arrays `[H, W, 3]`.
        mask: booleans `[H, W]`; only pixels where it is true count.

    Returns:
        `10 log10(255^2 / mean squared difference)`; infinite for equal pictures.
    """
    difference = np.subtract(image, reference, dtype=np.float32)
    if mask is not None:
        difference = difference[np.asarray(mask)]
    error = np.square(difference).mean(dtype=np.float64)  # squares of whole numbers are exact in float32
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def save_image(picture: Image.Image, path: str | os.PathLike) -> None:
    """Write a picture whole or not at all; the format follows the file name.

    Args:
        picture: what to save.
        path: for instance `out.png`.

    Raises:
        ValueError: the name's ending is no image format, the place cannot be written to, or the disk is full.
    """
    check_image_path(path)
    with atomic_path(path) as temporary:
        picture.save(temporary)


def check_image_path(path: str | os.PathLike) -> None:
    """Raise ValueError if `save_image` could not write this path; to be called before long work."""
    path = Path(path)
    Image.init()
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.EXTENSION[path.suffix.lower()])
    except (KeyError, OSError, ValueError):  # an unknown ending, or a format for other pictures
        raise ValueError(f"cannot save an image as {path}: give a name that ends in .png or .jpg") from None
    check_place(path)
