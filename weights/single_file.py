"""Single-file checkpoints in the layout of the original latent-diffusion code, as people exchange them."""

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from p2pz.weights.folder import TEXT_RENAMES
from p2pz.weights.foreign import CHECKPOINT, CONTEXTS, SUPPORTED, check_config, check_tensors
from p2pz.weights.reading import (
    Checkpoint,
    CheckpointError,
    Component,
    Renames,
    printable,
    read_tensors,
    rename,
)

LEVELS, LAYERS = 4, 2  # of the VAE in all families, and of the UNet in all but SDXL, which has three levels

# --- what the tensors are called there, and here ---

PARTS: Renames = (
    (r"model\.diffusion_model\.(.*)", r"unet/\1"),
    (r"first_stage_model\.(?:loss|model_ema)\..*", None),
    (r"first_stage_model\.(.*)", r"vae/\1"),
    (r"cond_stage_model\.(?:transformer|model)\.(.*)", r"text_encoder/\1"),
    (r"cond_stage_model\.(?:logit_scale|text_projection.*)", None),
    (r"conditioner\.embedders\.0\.transformer\.(.*)", r"text_encoder/\1"),  # of SDXL
    (r"conditioner\.embedders\.0\.(?:logit_scale|text_projection.*)", None),
    (r"conditioner\.embedders\.1\.model\.(.*)", r"text_encoder_2/\1"),
    # Averages of the weights over the training: the weights themselves are taken, as other programs do.
    (r"model_ema\..*", None),
    # The noise schedule and how the training was doing.
    (r"(?:sqrt_|log_)?(?:one_minus_|recip_|recipm1_)?alphas_cumprod(?:_prev)?", None),
    (r"posterior_(?:variance|log_variance_clipped|mean_coef[12])", None),
    (r"betas|lvlb_weights|logvar|scale_factor|global_step|v_pred|denoiser\.sigmas", None),
)


def _unet_blocks(transformers: tuple[bool, ...]) -> Renames:
    """The way down and the way up are flat lists of blocks there, and levels of layers here.

    Args:
        transformers: whether a level has them, from the finest to the coarsest.
    """
    rows = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("middle_block.0", "mid_block.resnets.0"),
        ("middle_block.1", "mid_block.attentions.0"),
        ("middle_block.2", "mid_block.resnets.1"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ]
    levels, each = len(transformers), LAYERS + 1
    for level, transformer in enumerate(transformers):
        for i in range(LAYERS):
            block = f"input_blocks.{level * each + 1 + i}"
            rows.append((f"{block}.0", f"down_blocks.{level}.resnets.{i}"))
            if transformer:
                rows.append((f"{block}.1", f"down_blocks.{level}.attentions.{i}"))
        if level < levels - 1:
            rows.insert(0, (f"input_blocks.{(level + 1) * each}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
    for level, transformer in enumerate(reversed(transformers)):
        for i in range(each):
            block = f"output_blocks.{level * each + i}"
            rows.append((f"{block}.0", f"up_blocks.{level}.resnets.{i}"))
            if transformer:
                rows.append((f"{block}.1", f"up_blocks.{level}.attentions.{i}"))
        if level < levels - 1:
            rows.insert(0, (f"{block}.{2 if transformer else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    return tuple((rf"{re.escape(there)}\.(.*)", rf"{here}.\1") for there, here in rows)


UNET_BLOCKS = _unet_blocks((True, True, True, False))
XL_UNET_BLOCKS: Renames = (
    (r"label_emb\.0\.0\.(.*)", r"add_embedding.linear_1.\1"),
    (r"label_emb\.0\.2\.(.*)", r"add_embedding.linear_2.\1"),
    *_unet_blocks((False, True, True)),
)
UNET_LAYERS: Renames = (
    (r"(.*\.resnets\.\d+)\.in_layers\.0\.(.*)", r"\1.norm1.\2"),
    (r"(.*\.resnets\.\d+)\.in_layers\.2\.(.*)", r"\1.conv1.\2"),
    (r"(.*\.resnets\.\d+)\.emb_layers\.1\.(.*)", r"\1.time_emb_proj.\2"),
    (r"(.*\.resnets\.\d+)\.out_layers\.0\.(.*)", r"\1.norm2.\2"),
    (r"(.*\.resnets\.\d+)\.out_layers\.3\.(.*)", r"\1.conv2.\2"),
    (r"(.*\.resnets\.\d+)\.skip_connection\.(.*)", r"\1.conv_shortcut.\2"),
)
VAE_BLOCKS: Renames = (
    (r"encoder\.down\.(\d+)\.block\.(\d+)\.(.*)", r"encoder.down_blocks.\1.resnets.\2.\3"),
    (r"encoder\.down\.(\d+)\.downsample\.(.*)", r"encoder.down_blocks.\1.downsamplers.0.\2"),
    *(  # counted from the finest level there, in the order of the decoder here
        (rf"decoder\.up\.{LEVELS - 1 - level}\.{there}\.(.*)", rf"decoder.up_blocks.{level}.{here}.\1")
        for level in range(LEVELS)
        for there, here in (("block", "resnets"), ("upsample", "upsamplers.0"))
        if here == "resnets" or level < LEVELS - 1
    ),
    (r"(encoder|decoder)\.mid\.block_1\.(.*)", r"\1.mid_block.resnets.0.\2"),
    (r"(encoder|decoder)\.mid\.block_2\.(.*)", r"\1.mid_block.resnets.1.\2"),
    (r"(encoder|decoder)\.mid\.attn_1\.norm\.(.*)", r"\1.mid_block.attentions.0.group_norm.\2"),
    (r"(encoder|decoder)\.mid\.attn_1\.(?:to_)?([qkv])\.(.*)", r"\1.mid_block.attentions.0.to_\2.\3"),
    (r"(encoder|decoder)\.mid\.attn_1\.(?:proj_out|to_out\.0)\.(.*)", r"\1.mid_block.attentions.0.to_out.0.\2"),
    (r"(encoder|decoder)\.norm_out\.(.*)", r"\1.conv_norm_out.\2"),
)
VAE_LAYERS: Renames = ((r"(.*\.resnets\.\d+)\.nin_shortcut\.(.*)", r"\1.conv_shortcut.\2"),)
_BLOCK = r"transformer\.resblocks\.(\d+)"
OPEN_CLIP_2: Renames = (
    (r"logit_scale|attn_mask|(?:.*\.)?position_ids", None),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"token_embedding\.weight", "embeddings.token_embedding.weight"),
    (r"ln_final\.(.*)", r"final_layer_norm.\1"),
    (rf"{_BLOCK}\.ln_([12])\.(.*)", r"encoder.layers.\1.layer_norm\2.\3"),
    (rf"{_BLOCK}\.mlp\.c_fc\.(.*)", r"encoder.layers.\1.mlp.fc1.\2"),
    (rf"{_BLOCK}\.mlp\.c_proj\.(.*)", r"encoder.layers.\1.mlp.fc2.\2"),
    (rf"{_BLOCK}\.attn\.out_proj\.(.*)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (rf"{_BLOCK}\.attn\.in_proj_(.*)", tuple(rf"encoder.layers.\1.self_attn.{x}_proj.\2" for x in "qkv")),
)
OPEN_CLIP: Renames = (
    (r"transformer\.resblocks\.23\..*", None),  # Stable Diffusion 2 reads what goes into the last layer
    (r"text_projection.*", None),
    *OPEN_CLIP_2,
)

# --- what the tensors cannot tell ---


@dataclass(frozen=True)
class Family:
    """What the shapes of a family's tensors do not say.

    Attributes:
        name: for messages.
        blocks: where its UNet's blocks are.
        transformers: whether a level of its UNet has them, from the finest to the coarsest.
        heads: attention heads in every level of the UNet; None: heads of 64 channels.
        linear_projection: see `UNetConfig`.
        text_names: how its text encoder's tensors are called.
        text_layers: how many layers of its text encoder are used.
        text_activation: between the two linear layers there.
        pad_token: what sentences are padded with.
        prediction_type: what its UNets predict; None: some this, some that.
        sample_size, scaling_factor: see `UNetConfig` and `VAEConfig`.
        widths: published channels of the UNet's levels.
        context: published width of the text states.
    """

    name: str
    blocks: Renames
    transformers: tuple[bool, ...]
    heads: int | None
    linear_projection: bool
    text_names: Renames
    text_layers: int
    text_activation: str
    pad_token: str
    prediction_type: str | None
    context: int
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    sample_size: int = 64
    scaling_factor: float = 0.18215


_LEVELS = (True, True, True, False)
_CLIP = (TEXT_RENAMES, 12, "quick_gelu", "<|endoftext|>")
SD1 = Family("Stable Diffusion 1.x", UNET_BLOCKS, _LEVELS, 8, False, *_CLIP, "epsilon", 768)
SD2 = Family("Stable Diffusion 2.x", UNET_BLOCKS, _LEVELS, None, True, OPEN_CLIP, 23, "gelu", "!", None, 1024)
XL = Family(
    "Stable Diffusion XL", XL_UNET_BLOCKS, (False, True, True), None, True, *_CLIP, "epsilon", 768,
    widths=(320, 640, 1280), sample_size=128, scaling_factor=0.13025,
)  # fmt: skip
XL_2 = replace(XL, text_names=OPEN_CLIP_2, text_layers=32, text_activation="gelu", pad_token="!", context=1280)
"""Stable Diffusion XL with its second text encoder."""
SIZE_CHANNELS, SIZE_NUMBERS = 256, 6  # of what SDXL is told of an image's size

TEXT_HEAD = 64  # channels of an attention head of the text encoder
TOLD = (  # what a file's metadata may call what its UNet predicts; the first that says it counts
    "modelspec.prediction_type",  # of Stability AI's ModelSpec
    "modelspec.predict_key",  # of ComfyUI
    "ss_v_parameterization",  # of kohya's trainers
    "modelspec.architecture",
)
PREDICTION_TYPES = {
    **dict.fromkeys(("epsilon", "false", "stable-diffusion-v2-512"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "true", "stable-diffusion-v2-768-v"), "v_prediction"),
}

# --- what else people have ---

WHOLE = {
    "unet": "UNet (model.diffusion_model.*)",
    "vae": "VAE (first_stage_model.*)",
    "text_encoder": "text encoder (cond_stage_model.*)",
}
XL_WHOLE = WHOLE | {
    "text_encoder": "text encoder (conditioner.embedders.0.*)",
    "text_encoder_2": "second text encoder (conditioner.embedders.1.*)",
}
DEEPEST = "input_blocks.8.1.transformer_blocks.9."  # a block of SDXL's UNet that smaller ones made of it lack


def open_single_file(path: Path) -> Checkpoint:
    """Read a single-file Stable Diffusion 1.x, 2.x or XL; which of them, its tensors tell.

    Args:
        path: a safetensors file.

    Raises:
        CheckpointError: it cannot be read, or is something else; names what it looks like.
    """
    if path.suffix == ".json":
        raise CheckpointError(f"model {path} is a file of settings: give its folder, or a safetensors file")
    tensors = read_tensors(path)
    check_tensors(tensors.keys(), path)
    parts, others = _split(rename(tensors, PARTS, path))
    is_xl = any(name.startswith("conditioner.") for name in tensors)
    whole = XL_WHOLE if is_xl else WHOLE
    lacking = [name for part, name in whole.items() if not parts[part]]
    if len(lacking) == len(whole):
        names = ", ".join(printable(name) for name in sorted(tensors)[:3])
        raise CheckpointError(f"{path} looks like nothing that p2pz knows (it holds {names}, ...): {SUPPORTED}")
    if lacking:
        raise CheckpointError(f"{path} lacks the {' and the '.join(lacking)}: {CHECKPOINT}")
    if is_xl and not any(name.startswith(DEEPEST) for name in parts["unet"]):
        raise CheckpointError(f"{path} looks like a Stable Diffusion XL of fewer layers, such as SSD-1B: {SUPPORTED}")
    if others:
        warnings.warn(
            f"{path} holds {len(others)} tensors that are no part of a Stable Diffusion and are left out: "
            f"{', '.join(printable(name) for name in others[:5])}",
            stacklevel=6,
        )

    family = XL if is_xl else SD2 if "token_embedding.weight" in parts["text_encoder"] else SD1
    unet = rename(rename(parts["unet"], family.blocks, path), UNET_LAYERS, path)
    vae = rename(rename(parts["vae"], VAE_BLOCKS, path), VAE_LAYERS, path)
    text_encoder = rename(parts["text_encoder"], family.text_names, path)
    second = rename(parts["text_encoder_2"], XL_2.text_names, path)
    if "text_projection" in second:  # it multiplies from the right there
        projection = second.pop("text_projection")
        second["text_projection.weight"] = projection.T.contiguous() if projection.ndim == 2 else projection
    configured = {
        "unet": (_unet_config(unet, family), unet),
        "vae": (_vae_config(vae, family), vae),
        "text_encoder": (_text_config(text_encoder, family), text_encoder),
    }
    if is_xl:
        configured["text_encoder_2"] = _text_config(second, XL_2), second
    check_config(configured["unet"][0], path)
    context = configured["unet"][0]["cross_attention_dim"]
    if not is_xl and context in CONTEXTS:
        raise CheckpointError(f"{path} looks like {CONTEXTS[context]}: {SUPPORTED}")

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    told = [PREDICTION_TYPES.get(metadata.get(key, "").lower()) for key in TOLD]
    if "v_pred" in tensors:  # a mark of trainers
        told = ["v_prediction"]
    components = {
        name: Component(path, path, f"the layout of {family.name}", config, part)
        for name, (config, part) in configured.items()
    }
    return Checkpoint(
        path,
        **components,
        pad_token=family.pad_token,
        pad_token_2=XL_2.pad_token,
        prediction_type=next(filter(None, told), family.prediction_type),
    )


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors of each part by their names in it, and the names of all other tensors."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in XL_WHOLE}
    others = []
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if rest and part in parts:
            parts[part][rest] = tensor
        else:
            others.append(name)
    return parts, others


def _size(tensors: dict[str, Tensor], name: str, axis: int, default: int) -> int:
    """Size of a tensor; the published one if it is missing or of another kind, which `fill` then reports."""
    tensor = tensors.get(name)
    return default if tensor is None or tensor.ndim <= axis else tensor.shape[axis]


def _unet_config(tensors: dict[str, Tensor], family: Family) -> dict[str, Any]:
    widths = [
        _size(tensors, f"down_blocks.{level}.resnets.0.conv2.weight", 0, width)
        for level, width in enumerate(family.widths)
    ]
    context = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    down = ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in family.transformers]
    config = {
        "in_channels": _size(tensors, "conv_in.weight", 1, 4),
        "out_channels": _size(tensors, "conv_out.weight", 0, 4),
        "sample_size": family.sample_size,
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "layers_per_block": LAYERS,
        "attention_head_dim": [family.heads or width // 64 for width in widths],  # diffusers' name for heads
        "cross_attention_dim": _size(tensors, context, 1, 2048 if family is XL else family.context),
        "use_linear_projection": family.linear_projection,
        "norm_num_groups": 32,
    }
    if family is XL:
        config |= {
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_CHANNELS,
            "projection_class_embeddings_input_dim": _size(
                tensors, "add_embedding.linear_1.weight", 1, XL_2.context + SIZE_NUMBERS * SIZE_CHANNELS
            ),
        }
    return config


def _vae_config(tensors: dict[str, Tensor], family: Family) -> dict[str, Any]:
    published = (128, 256, 512, 512)
    return {
        "block_out_channels": [
            _size(tensors, f"encoder.down_blocks.{level}.resnets.0.conv2.weight", 0, width)
            for level, width in enumerate(published)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * LEVELS,
        "up_block_types": ["UpDecoderBlock2D"] * LEVELS,
        "layers_per_block": LAYERS,
        "latent_channels": _size(tensors, "post_quant_conv.weight", 0, 4),
        "norm_num_groups": 32,
        "scaling_factor": family.scaling_factor,
        "sample_size": 512,
    }


def _text_config(tensors: dict[str, Tensor], family: Family) -> dict[str, Any]:
    width = _size(tensors, "embeddings.token_embedding.weight", 1, family.context)
    return {
        "vocab_size": _size(tensors, "embeddings.token_embedding.weight", 0, 49408),
        "max_position_embeddings": _size(tensors, "embeddings.position_embedding.weight", 0, 77),
        "hidden_size": width,
        "intermediate_size": _size(tensors, "encoder.layers.0.mlp.fc1.weight", 0, 4 * width),
        "num_hidden_layers": family.text_layers,
        "num_attention_heads": width // TEXT_HEAD,
        "hidden_act": family.text_activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": _size(tensors, "text_projection.weight", 0, width),
        "eos_token_id": 2,  # stands for the largest number in a sentence, which the end token has in every vocabulary
    }
