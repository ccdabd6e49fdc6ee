"""The measures of image-editing papers: background, structure, text agreement, and the error to a known truth.

A picture is a PIL picture in mode RGB, or a uint8 array or CPU tensor `[H, W, 3]`. A mask is booleans `[H, W]`, true
where the edit may change things; the background is the rest. What is wrong with either raises a one-line ValueError.

"PIE-Bench" is the code that defines the numbers of many papers' tables: `evaluation/matrics_calculator.py` and
`evaluation/evaluate.py` of github.com/cure-lab/PnPInversion (Ju et al., "PnP Inversion", 2024). Where a function here
differs from it, its docstring says how.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from p2pz.images import psnr
from p2pz.text import load_pretrained, quiet_transformers
from p2pz.weights import CheckpointError, reason

if TYPE_CHECKING:  # importing transformers takes seconds: only when a model is loaded
    from transformers import CLIPModel, CLIPProcessor, ViTModel

Picture = Image.Image | np.ndarray | Tensor

# Channel means and deviations of ImageNet, for pictures in [0, 1]: what DINO was trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DINO_SIZE = 224

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03

LPIPS_TRUNKS = ("alex", "vgg", "squeeze")


# Pictures and masks --------------------------------------------------------------------------------------------------
def _pixels(picture: Picture) -> np.ndarray:
    """A picture as `[H, W, 3]` uint8."""
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(f"a picture is RGB, uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
    return pixels


def _pair(first: Picture, second: Picture) -> tuple[np.ndarray, np.ndarray]:
    """Two pictures of one size as `[H, W, 3]` uint8."""
    first, second = _pixels(first), _pixels(second)
    if first.shape != second.shape:
        sizes = " and ".join(f"{one.shape[1]} x {one.shape[0]}" for one in (first, second))
        raise ValueError(f"the two pictures must have one size, not {sizes} pixels")
    return first, second


def _region(mask: Any, pixels: np.ndarray) -> np.ndarray:
    """The mask as booleans `[H, W]` of a picture's size."""
    mask = np.asarray(mask)
    if mask.dtype != np.bool_ or mask.shape != pixels.shape[:2]:
        raise ValueError(f"the mask must be bool {list(pixels.shape[:2])}, not {mask.dtype} {list(mask.shape)}")
    return mask


def _background(mask: Any, pixels: np.ndarray) -> np.ndarray:
    """Where the background is, booleans `[H, W]`."""
    background = ~_region(mask, pixels)
    if not background.any():
        raise ValueError("the mask leaves no background: it is true everywhere")
    return background


# Background ----------------------------------------------------------------------------------------------------------
def background_mse(first: Picture, second: Picture, mask: Any) -> float:
    """Mean squared difference of two pictures over their background pixels.

    Args:
        first, second: pictures of one size.
        mask: bool `[H, W]`, true where the edit may change things: these pixels do not count.

    Returns:
        From 0 (equal) to 1, on the scale where pixels run from 0 to 1; PIE-Bench's tables show 10^4 times it. PIE-Bench
        blackens the mask and divides by all pixels; here only background pixels are divided by, so that the size of
        the mask does not matter: PIE-Bench's value is this one times the background's share of the picture.

    Raises:
        ValueError: no pictures, different sizes, a mask of another shape or type, or no background.
    """
    first, second = _pair(first, second)
    background = _background(mask, first)
    difference = first[background].astype(np.float64) - second[background].astype(np.float64)
    return float(np.square(difference / 255).mean())


def background_psnr(first: Picture, second: Picture, mask: Any) -> float:
    """Peak signal-to-noise ratio of two pictures over their background pixels, in dB.

    Args:
        first, second, mask: as for `background_mse`.

    Returns:
        `-10 log10(background_mse)`, at least 0; infinite where the backgrounds are equal. PIE-Bench's value is higher
        by `-10 log10(background's share of the picture)`.

    Raises:
        ValueError: as `background_mse`.
    """
    first, second = _pair(first, second)
    return psnr(first, second, _background(mask, first))


def background_ssim(first: Picture, second: Picture, mask: Any) -> float:
    """Structural similarity of two pictures' backgrounds.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), equations
    (13) to (17): an 11 x 11 Gaussian window of deviation 1.5, K1 = 0.01, K2 = 0.03, dynamic range 255; its map is
    computed for each colour channel.

    Args:
        first, second, mask: as for `background_mse`.

    Returns:
        From -1 to 1 (equal): the map's mean over channels and over every pixel whose *whole* 11 x 11 window lies inside
        the picture and the background, so no pixel under the mask has any influence. PIE-Bench blackens the mask
        in both pictures and takes the mean over all windows inside the picture, also those on the black region,
        which count as equal: its values are higher the larger the mask. With an empty mask both are the same.

    Raises:
        ValueError: as `background_mse`; or the background holds no whole window.
    """
    first, second = _pair(first, second)
    background = torch.from_numpy(_background(mask, first))
    whole = torch.zeros(0, dtype=torch.bool)
    if min(background.shape) >= SSIM_WINDOW:
        whole = F.max_pool2d((~background).double()[None], SSIM_WINDOW, stride=1)[0] == 0
    if not whole.any():
        raise ValueError(f"the mask leaves no background: no {SSIM_WINDOW} x {SSIM_WINDOW} window lies in it")
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()

    def local_mean(images: Tensor) -> Tensor:
        """`[3, 1, H, W]` to `[3, 1, H - 10, W - 10]`: weighted means over the whole windows."""
        return F.conv2d(F.conv2d(images, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))

    x, y = (torch.from_numpy(one.astype(np.float64)).permute(2, 0, 1)[:, None] for one in (first, second))
    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x) - mean_x.square() + local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return float((luminance * structure)[:, 0, whole].mean())


def load_lpips(trunk: str = "alex") -> nn.Module:
    """The pretrained LPIPS network of the package `lpips`, which fetches the trunk's weights on first use.

    Args:
        trunk: alex (the package's default), squeeze (PIE-Bench's) or vgg.

    Returns:
        The network, in evaluation mode on the CPU.

    Raises:
        ImportError: the package is missing; says how to install it.
        ValueError: another trunk, or its weights cannot be fetched.
    """
    if trunk not in LPIPS_TRUNKS:
        raise ValueError(f"LPIPS has the trunks {', '.join(LPIPS_TRUNKS)}, not {trunk}")
    try:
        import lpips
    except ImportError:
        raise ImportError("LPIPS needs the package lpips: pip install 'p2pz[metrics]'") from None
    try:
        return lpips.LPIPS(net=trunk, verbose=False).requires_grad_(False)
    except OSError as error:
        raise ValueError(f"the weights of LPIPS's trunk {trunk} cannot be fetched: {error}") from None


@torch.no_grad()
def background_lpips(first: Picture, second: Picture, mask: Any, network: nn.Module) -> float:
    """LPIPS distance of two pictures with the masked region black in both.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), equation (1);
    black under the mask as in PIE-Bench, whose trunk is squeeze. The mean runs over the whole picture, black region
    included: the region adds no distance of its own, so values are comparable for masks of similar size only.

    Args:
        first, second, mask: as for `background_mse`.
        network: an `lpips.LPIPS`, for instance from `load_lpips`; called with two `[1, 3, H, W]` in [-1, 1].

    Returns:
        0 for equal backgrounds; larger is less alike, without unit.

    Raises:
        ValueError: as `background_mse`.
    """
    first, second = _pair(first, second)
    background = _background(mask, first)[..., None]
    weight = next(network.parameters())
    images = (torch.from_numpy(one * background).permute(2, 0, 1)[None].to(weight) for one in (first, second))
    return float(network(*(image / 127.5 - 1 for image in images)))


# Structure -----------------------------------------------------------------------------------------------------------
def _from_pretrained(kind: Any, place: str | os.PathLike, **options: Any) -> Any:
    """A model or a processor through transformers, local files first, with one-line errors."""
    place = os.fspath(place)
    is_model = issubclass(kind, nn.Module)
    load = partial(load_pretrained, kind) if is_model else partial(kind.from_pretrained, trust_remote_code=False)
    try:
        with quiet_transformers():
            try:
                return load(place, local_files_only=True, **options)
            except OSError:
                if Path(place).exists():
                    raise
                return load(place, **options)
    except Exception as error:  # transformers raises a dozen kinds for files that are not what they should be
        raise CheckpointError(f"{place} cannot be loaded as a {kind.__name__}: {reason(error)}") from None


def load_dino(place: str | os.PathLike) -> ViTModel:
    """A DINO vision transformer for `structure_distance`, through transformers.

    Args:
        place: a folder, or a name on the Hugging Face Hub such as facebook/dino-vitb8 (PIE-Bench's model); local
            files are used where they are there.

    Returns:
        A frozen `transformers.ViTModel` in float32 on the CPU.

    Raises:
        CheckpointError: there is no such model, or it is no vision transformer; a ValueError.
    """
    from transformers import ViTModel

    return _from_pretrained(ViTModel, place, add_pooling_layer=False, dtype=torch.float32)


@torch.no_grad()
def _key_similarity(pixels: np.ndarray, encoder: ViTModel) -> Tensor:
    """Cosine similarities `[tokens, tokens]` of the last attention layer's keys; the class token is the first."""
    projections = [part for name, part in encoder.named_modules() if name.split(".")[-1] in ("k_proj", "key")]
    if not projections:
        raise ValueError(f"a {type(encoder).__name__} has no key projections: the encoder is a transformers.ViTModel")
    picture = Image.fromarray(pixels).resize((DINO_SIZE, DINO_SIZE), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    image = (image - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    keys: list[Tensor] = []
    hook = projections[-1].register_forward_hook(lambda part, inputs, output: keys.append(output))
    try:
        batch = image.permute(2, 0, 1)[None].to(encoder.device, encoder.dtype)
        encoder(batch, interpolate_pos_encoding=True)  # which changes nothing where the encoder's own size is 224
    finally:
        hook.remove()
    unit = F.normalize(keys[0][0].double(), dim=-1)
    return unit @ unit.T


def structure_distance(first: Picture, second: Picture, encoder: ViTModel) -> float:
    """How differently two pictures are laid out, whatever their colours: DINO's key self-similarity distance.

    Source: Tumanyan et al., "Splicing ViT Features for Semantic Appearance Transfer" (2022), the self-similarity of
    keys in the deepest attention layer. The paper's structure loss is the Frobenius norm of the difference; here, as in
    its published code and PIE-Bench, it is the mean squared difference. The keys of all heads are concatenated, and the
    class token is one of the tokens.

    Both pictures are resized to 224 x 224 (bilinear with antialiasing; other shapes than squares are squeezed) and
    normalised for ImageNet from [0, 1]. PIE-Bench's code normalises pixels that still run to 255: its numbers are not
    comparable with these.

    Args:
        first, second: pictures of one size.
        encoder: a `transformers.ViTModel` in evaluation mode, for instance from `load_dino`.

    Returns:
        The mean of `(S(first) - S(second))^2` over all pairs of tokens, S the cosine similarities: from 0 (equal) to 4.
        PIE-Bench's tables show 10^3 times it.

    Raises:
        ValueError: no pictures, different sizes, or the encoder has no keys.
    """
    first, second = _pair(first, second)
    return float((_key_similarity(first, encoder) - _key_similarity(second, encoder)).square().mean())


# Text ----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PretrainedClip:
    """A CLIP of transformers with the one method that the measures need, the same as `p2pz.clip.Clip`'s.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
    """

    model: CLIPModel
    processor: CLIPProcessor

    @torch.no_grad()
    def similarity(self, pictures: Sequence[Image.Image], sentences: Sequence[str]) -> Tensor:
        """Logits `[pictures, sentences]`: cosine similarities times the learnt scale, 100 for OpenAI's weights.

        The processor resizes a picture's short side and cuts out the centre; long sentences are cut.
        """
        inputs = self.processor(
            images=list(pictures),
            text=list(sentences),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return self.model(**inputs.to(self.model.device)).logits_per_image


def load_clip(place: str | os.PathLike) -> PretrainedClip:
    """A pretrained CLIP, through transformers.

    Args:
        place: a folder, or a name on the Hugging Face Hub such as openai/clip-vit-large-patch14 (PIE-Bench's); local
            files are used where they are there.

    Returns:
        The frozen model, in float32 on the CPU, with its processor.

    Raises:
        CheckpointError: there is no such model, or it is no CLIP; a ValueError.
    """
    from transformers import CLIPModel, CLIPProcessor

    model = _from_pretrained(CLIPModel, place, dtype=torch.float32)
    return PretrainedClip(model, _from_pretrained(CLIPProcessor, place))


def _same_count(pictures: Sequence[Any], **others: Sequence[Any]) -> None:
    if not len(pictures):
        raise ValueError("the list of pictures is empty: give at least one")
    for name, values in others.items():
        if isinstance(values, str) or len(values) != len(pictures):
            raise ValueError(f"give one of the {name.replace('_', ' ')} for each of the {len(pictures)} pictures")


def clip_similarity(
    pictures: Sequence[Picture], sentences: Sequence[str], clip: Any, masks: Sequence[Any] | None = None
) -> Tensor:
    """How well every picture fits its own sentence.

    Source: PIE-Bench, where it is torchmetrics' CLIPScore: 100 times the cosine similarity, negative values set to 0
    (here they stay). Hessel et al., "CLIPScore" (2021), equation (1), scales by 2.5 instead.

    Args:
        pictures: B pictures of any sizes.
        sentences: B sentences.
        clip: anything with `similarity(pictures, sentences) -> [B, S]`, such as `load_clip`'s and `p2pz.clip`'s.
        masks: for "CLIP similarity of the edited region": B bool `[H, W]`; everything outside the mask becomes black
            before CLIP sees the picture, which is not cropped, as in PIE-Bench.

    Returns:
        `[B]`, in the unit of `clip.similarity`: the cosine from -1 to 1 times the model's logit scale, so 100 times the
        cosine for OpenAI's weights; the bundled model has another scale.

    Raises:
        ValueError: no pictures, other numbers of sentences or masks, a mask of another shape or type, or an empty one.
    """
    _same_count(pictures, sentences=sentences)
    arrays = [_pixels(picture) for picture in pictures]
    if masks is not None:
        _same_count(pictures, masks=masks)
        regions = [_region(mask, pixels) for mask, pixels in zip(masks, arrays, strict=True)]
        if not all(region.any() for region in regions):
            raise ValueError("a mask is empty: there is no edited region to compare with the sentence")
        arrays = [pixels * region[..., None] for pixels, region in zip(arrays, regions, strict=True)]
    return clip.similarity([Image.fromarray(pixels) for pixels in arrays], sentences).diagonal()


def clip_accuracy(
    pictures: Sequence[Picture], source_captions: Sequence[str], target_captions: Sequence[str], clip: Any
) -> float:
    """Share of edited pictures that CLIP finds closer to the target caption than to the source caption.

    Source: Parmar et al., "Zero-shot Image-to-Image Translation" (pix2pix-zero, 2023), "CLIP Acc".

    Args:
        pictures: B edited pictures.
        source_captions, target_captions: B captions each, of what was there and of what is wanted.
        clip: as for `clip_similarity`.

    Returns:
        From 0 to 1; a tie is no success. Papers show it in per cent.

    Raises:
        ValueError: no pictures, or other numbers of captions.
    """
    _same_count(pictures, source_captions=source_captions, target_captions=target_captions)
    source, target = (clip_similarity(pictures, captions, clip) for captions in (source_captions, target_captions))
    return float((target > source).double().mean())


# Truth ---------------------------------------------------------------------------------------------------------------
def error_to_truth(edited: Picture, truth: Picture, mask: Any) -> tuple[float, float]:
    """How close an edit came to the exactly edited picture, which the mini world knows.

    Args:
        edited, truth: pictures of one size.
        mask: bool `[H, W]`, true where the edit may change things (the mini world's `edit_mask`).

    Returns:
        Peak signal-to-noise ratio in dB inside the mask (was the right thing drawn?), and outside it (was the rest
        kept?); infinite where the pictures are equal.

    Raises:
        ValueError: no pictures, different sizes, a mask of another shape or type, or one that is true everywhere or
            nowhere.
    """
    edited, truth = _pair(edited, truth)
    background = _background(mask, edited)
    if background.all():
        raise ValueError("the mask is empty: there is no inside to compare")
    return psnr(edited, truth, ~background), psnr(edited, truth, background)


# Summary -------------------------------------------------------------------------------------------------------------
def mean_with_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent measurements and its 95 % confidence half-width.

    The half-width is the normal approximation, 1.96 standard errors: `1.96 s / sqrt(n)`, s the sample deviation with
    n - 1 in its denominator. It is too narrow for a handful of values, and for shares close to 0 or 1.

    Args:
        values: n numbers, for instance one for each picture.

    Returns:
        Mean and half-width, in the values' unit. The half-width is NaN for a single value, and where a value is
        infinite (the PSNR of equal pictures); the mean is then infinite too.

    Raises:
        ValueError: there are no values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError("there are no values to take the mean of: give a list with at least one")
    if len(numbers) == 1 or not np.isfinite(numbers).all():
        return float(numbers.mean()), float("nan")
    return float(numbers.mean()), float(1.96 * numbers.std(ddof=1) / len(numbers) ** 0.5)
