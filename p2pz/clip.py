"""The mini world's image-text model: how well a sentence describes a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from p2pz.images import to_tensor
from p2pz.model import Model
from p2pz.text import load_pretrained, quiet_transformers
from p2pz.weights import MINI_FOLDER, CheckpointError

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

# Channel means and deviations of CLIP's training images (Radford et al., 2021).
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Clip:
    """Both towers of the mini CLIP; the text tower is the bundled model's text encoder.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
    """

    model: Model
    vision: CLIPVisionModelWithProjection
    text_projection: Tensor
    logit_scale: Tensor

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors `[B, projection]` of RGB pictures of any size."""
        size = self.vision.config.image_size
        images = to_tensor([picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures])
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
        pixels = ((images + 1) / 2 - mean) / std
        weight = self.text_projection
        return F.normalize(self.vision(pixels.to(weight)).image_embeds, dim=-1)

    @torch.no_grad()
    def text_features(self, sentences: Sequence[str]) -> Tensor:
        """Unit vectors `[B, projection]` of sentences."""
        tokenizer, encoder = self.model.tokenizer, self.model.text_encoder
        inputs = tokenizer(list(sentences), padding="max_length", truncation=True, return_tensors="pt")
        with self.model.at_work(encoder):
            pooled = encoder(inputs.input_ids.to(encoder.device)).pooler_output
        return F.normalize(pooled @ self.text_projection.T, dim=-1)

    def similarity(self, pictures: Sequence[Image.Image], sentences: Sequence[str]) -> Tensor:
        """Logits `[pictures, sentences]`: scaled cosine similarities; a softmax over sentences gives probabilities."""
        return self.logit_scale.exp() * self.image_features(pictures) @ self.text_features(sentences).T


def load_mini_clip(model: Model) -> Clip:
    """Load the bundled image tower beside a loaded bundled model.

    Args:
        model: the bundled model; its text encoder is the other tower.

    Raises:
        CheckpointError: `model` is not the bundled one, or the files are missing.
    """
    from transformers import CLIPVisionModelWithProjection

    if not model.is_mini:
        raise CheckpointError("the bundled CLIP belongs to the bundled model only")
    folder = MINI_FOLDER / "clip"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: install p2pz again")
    heads = {
        name: tensor.to(model.device, model.dtype) for name, tensor in load_file(folder / "heads.safetensors").items()
    }
    with quiet_transformers():
        vision = load_pretrained(CLIPVisionModelWithProjection, folder, local_files_only=True)
    return Clip(model, vision.to(model.device, model.dtype), heads["text_projection.weight"], heads["logit_scale"])
