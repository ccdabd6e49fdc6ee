"""Models that p2pz does not load: how they are recognised, and what their owners are told."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from p2pz.weights.reading import CheckpointError, printable

SUPPORTED = "p2pz works with plain Stable Diffusion 1.x, 2.x and XL checkpoints, so give one of those"
CHECKPOINT = "give the whole checkpoint (UNet, VAE and text encoder), or the folder that holds them"
MERGE = "merge it into a checkpoint with the program that it was made for, and give that"

TENSORS: tuple[tuple[str, str, str], ...] = (  # pattern of a name that only it has, what it looks like, what to do
    (r"(?:.*[._])?(?:lora|hada|lokr|oft)_.*|.*\.lora\..*", "a LoRA", MERGE),
    (r"control_model\..*|controlnet_.*|(?:.*\.)?input_hint_block\..*", "a ControlNet", SUPPORTED),
    (r"(?:image_proj|ip_adapter)\..*", "an IP-Adapter", SUPPORTED),
    (r".*motion_modules\..*", "a motion module (AnimateDiff)", SUPPORTED),
    (r"emb_params|string_to_(?:token|param).*|clip_[lg]|<.*>", "a textual inversion", SUPPORTED),
    (r"(?:model\.diffusion_model\.)?joint_blocks\..*", "Stable Diffusion 3", SUPPORTED),
    (r"(?:model\.diffusion_model\.)?double_blocks\..*", "Flux", SUPPORTED),
    (r"(?:.*\.)?single_transformer_blocks\..*", "Flux or a transformer like it", SUPPORTED),
    (r"(?:.*\.)?clip_(?:\w+_)?mapper\..*", "Stable Cascade", SUPPORTED),
    (r".*\.time_(?:mixer|stack)\..*", "Stable Video Diffusion", SUPPORTED),
    (r"(?:.*\.)?time_embed(?:ding)?\.cond_proj\..*", "a latent consistency model (LCM)", SUPPORTED),
    (r"conditioner\.embedders\.0\.model\..*", "the refiner of Stable Diffusion XL", SUPPORTED),
    (r"embedder\.model\..*|noise_augmentor\..*", "Stable Diffusion unCLIP", SUPPORTED),
    (r"edm_(?:mean|std|vpred\..*)", "a model of EDM's noise schedule, such as Playground 2.5 or CosXL", SUPPORTED),
    (r"ztsnr", "a model whose noise schedule ends in pure noise (zero terminal SNR)", SUPPORTED),
    (r"(?:down_blocks|mid_block|time_embedding)\..*", "a UNet alone", CHECKPOINT),
    (r"input_blocks\..*", "a UNet alone", CHECKPOINT),
    (r"(?:encoder|decoder)\.(?:mid|mid_block|conv_in)\..*", "a VAE alone", CHECKPOINT),
    (r"states", "a direction", "give it to p2pz edit as --direction, and as the model a checkpoint"),
    (r"image_latents", "an inversion", "give it to p2pz edit in the place of an image, and as the model a checkpoint"),
    (r"text_model\..*|transformer\.resblocks\..*|embeddings\.token_embedding\..*", "a text encoder alone", CHECKPOINT),
)
CLASSES: tuple[tuple[str, str], ...] = (  # pattern of the class that a folder's files name, and what it looks like
    (r"StableVideoDiffusion\w*|UNetSpatioTemporal\w*", "Stable Video Diffusion"),
    (r"TextToVideo(?!Zero)\w*|AnimateDiff\w*|UNet3D\w*|UNetMotion\w*", "a model of videos"),
    (r"StableDiffusionLatentUpscale\w*", "an upscaler of latents"),
    (r"AudioLDM\w*|MusicLDM\w*", "AudioLDM or MusicLDM, models of sound"),
    (r"StableUnCLIP\w*|UnCLIP\w*", "Stable Diffusion unCLIP"),
    (r"Kandinsky\w*", "Kandinsky"),
    (r"StableCascade\w*|Wuerstchen\w*", "Stable Cascade or Wuerstchen"),
)
INPUTS = {  # channels that a UNet reads besides 4 of the latents
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an InstructPix2Pix model",
    9: "an inpainting model",
}
REFINER, REFINER_CONTEXT = "the refiner of Stable Diffusion XL", 1280  # it reads the second text encoder alone
CONTEXTS = {2048: "Stable Diffusion XL", REFINER_CONTEXT: REFINER}  # width of the text states that they read


def check_tensors(names: Collection[str], path: Path) -> None:
    """Refuse what is known not to be a whole Stable Diffusion 1.x, 2.x or XL.

    Args:
        names: of a file's tensors.
        path: the file.

    Raises:
        CheckpointError: says what it looks like and what to do.
    """
    for pattern, kind, advice in TENSORS:
        match = next((name for name in names if re.fullmatch(pattern, name)), None)
        if match is not None:
            raise CheckpointError(f"{path} looks like {kind} (it holds {printable(match)}): {advice}")


def check_parts(names: Collection[str], place: Path | str) -> None:
    """Refuse a folder of another family by the names of what is in it. Raises CheckpointError."""
    if "transformer" in names and "unet" not in names:
        raise CheckpointError(f"{place} looks like Stable Diffusion 3, Flux or another transformer: {SUPPORTED}")


def check_config(config: dict[str, Any], place: Path | str) -> None:
    """Refuse a folder of another family by its `model_index.json` or its UNet's `config.json`.

    Raises CheckpointError.
    """
    name, channels = str(config.get("_class_name")), config.get("in_channels")
    for pattern, kind in CLASSES:
        if re.fullmatch(pattern, name):
            raise CheckpointError(f"{place} looks like {kind} (its class is {printable(name)}): {SUPPORTED}")
    if isinstance(channels, int) and channels != 4:
        kind = INPUTS.get(channels, "another kind of model")
        raise CheckpointError(f"{place} looks like {kind}, since its UNet reads {channels} channels: {SUPPORTED}")
    if is_xl(config) and config.get("cross_attention_dim") == REFINER_CONTEXT:
        raise CheckpointError(f"{place} looks like {REFINER}: {SUPPORTED}")


def is_xl(config: dict[str, Any]) -> bool:
    """Whether a UNet's `config.json` is of Stable Diffusion XL, which has a second text encoder."""
    return config.get("addition_embed_type") == "text_time"
