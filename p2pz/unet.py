"""The noise predictor of Stable Diffusion 1.x, 2.x and XL."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from p2pz.attention import Attend, Features, Hooks, Site, hooks_of, plain
from p2pz.kernels import add_product, geglu_linear, layer_norm, split_projection
from p2pz.layers import (
    Conv3x3,
    Downsample,
    ResnetBlock,
    Summands,
    Upsample,
    group_normed,
    pointwise,
    timestep_embedding,
    to_map,
    to_tokens,
)
from p2pz.weights import read_number, read_numbers


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet. One entry per level in the tuples, from the finest to the coarsest.

    Attributes:
        in_channels, out_channels: latent channels.
        sample_size: latent height and width the model was trained at; others work.
        block_out_channels: channels of each level.
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        cross_attention: whether the level has transformers.
        transformer_layers: blocks in each of the level's transformers; the last entry holds in the middle too. Empty:
            one everywhere.
        heads: attention heads of the level.
        context_channels: width of the text states.
        linear_projection: transformers enter and leave through linear layers (SD 2.x) instead of 1x1 convolutions.
        norm_groups: groups of all group norms.
        pooled_channels: width of the pooled text (SDXL), which the residual blocks are told; 0: they are told none.
        size_channels: width of the features of each number that tells the image's size (SDXL).
    """

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_channels: int = 768
    linear_projection: bool = False
    norm_groups: int = 32
    transformer_layers: tuple[int, ...] = ()
    pooled_channels: int = 0
    size_channels: int = 0

    def layers_of(self, level: int) -> int:
        """Blocks in each transformer of a level; -1 is the last level and the middle."""
        return self.transformer_layers[level] if self.transformer_layers else 1

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "UNetConfig":
        """Read the `config.json` of a diffusers UNet folder.

        Args:
            config: the parsed file.

        Raises:
            ValueError: the file describes a UNet that is not Stable Diffusion 1.x, 2.x or XL; names the setting.
        """
        for key, expected in _EXPECTED_SETTINGS.items():
            if config.get(key, expected) != expected:
                raise _another_kind(config, key)
        channels = read_numbers(config, "block_out_channels")
        heads = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"  # a misnomer
        down = config["down_block_types"]
        if not isinstance(down, (list, tuple)) or len(down) != len(channels) or any(x not in _DOWN for x in down):
            raise _another_kind(config, "down_block_types")
        mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
        if config["up_block_types"] not in (mirrored, tuple(mirrored)):
            raise _another_kind(config, "up_block_types")
        layers = read_numbers(config, "transformer_layers_per_block", len(channels), 1)
        layers = () if set(layers) == {1} else layers
        pooled = size_channels = 0
        if config.get("addition_embed_type") is not None:
            size_channels = config.get("addition_time_embed_dim")
            width = config.get("projection_class_embeddings_input_dim")
            if config["addition_embed_type"] != "text_time" or not type(size_channels) is type(width) is int:
                raise _another_kind(config, "addition_embed_type")
            pooled = width - SIZE_NUMBERS * size_channels
            if size_channels <= 0 or pooled <= 0:
                raise _another_kind(config, "addition_embed_type")
        return cls(
            in_channels=read_number(config, "in_channels"),
            out_channels=read_number(config, "out_channels"),
            sample_size=read_number(config, "sample_size", 64, 8, 256),
            block_out_channels=channels,
            layers_per_block=read_number(config, "layers_per_block", 2),
            cross_attention=tuple(kind.startswith("CrossAttn") for kind in down),
            heads=read_numbers(config, heads, len(channels), 8),
            context_channels=read_number(config, "cross_attention_dim"),
            linear_projection=bool(config.get("use_linear_projection", False)),
            norm_groups=read_number(config, "norm_num_groups", 32),
            transformer_layers=layers,
            pooled_channels=pooled,
            size_channels=size_channels,
        )

    def to_json(self) -> dict[str, Any]:
        """The `config.json` of a diffusers UNet folder that describes this shape."""
        down = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in self.cross_attention]
        up = ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(self.cross_attention)]
        names = "in_channels", "out_channels", "sample_size", "block_out_channels", "layers_per_block"
        settings = {name: getattr(self, name) for name in names}
        if self.transformer_layers:
            settings["transformer_layers_per_block"] = list(self.transformer_layers)
        if self.pooled_channels:
            settings |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": self.size_channels,
                "projection_class_embeddings_input_dim": self.pooled_channels + SIZE_NUMBERS * self.size_channels,
            }
        return settings | {
            "_class_name": "UNet2DConditionModel",
            "down_block_types": down,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": up,
            "attention_head_dim": list(self.heads),
            "cross_attention_dim": self.context_channels,
            "use_linear_projection": self.linear_projection,
            "norm_num_groups": self.norm_groups,
            "norm_eps": 1e-5,
            "act_fn": "silu",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "downsample_padding": 1,
            "center_input_sample": False,
        }


def _another_kind(config: dict[str, Any], key: str) -> ValueError:
    return ValueError(f"this UNet is not of the Stable Diffusion 1.x/2.x/XL family: its {key} is {config[key]}")


SIZE_NUMBERS = 6  # that SDXL is told: height and width of the original image, top and left of the crop, its own size

_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")

_EXPECTED_SETTINGS = {
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "reverse_transformer_layers_per_block": None,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "cross_attention_norm": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}

STABLE_DIFFUSION_1 = UNetConfig()
STABLE_DIFFUSION_2 = UNetConfig(heads=(5, 10, 20, 20), context_channels=1024, linear_projection=True)
STABLE_DIFFUSION_2_768 = UNetConfig(
    sample_size=96, heads=(5, 10, 20, 20), context_channels=1024, linear_projection=True
)
STABLE_DIFFUSION_XL = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    cross_attention=(False, True, True),
    heads=(5, 10, 20),
    context_channels=2048,
    linear_projection=True,
    transformer_layers=(1, 2, 10),
    pooled_channels=1280,
    size_channels=256,
)
MINI = UNetConfig(
    sample_size=32,
    block_out_channels=(64, 128, 160),
    layers_per_block=1,
    cross_attention=(True, True, True),
    heads=(4, 4, 4),
    context_channels=128,
)


class Conditioning(NamedTuple):
    """All that a forward pass takes besides latents; constant during a run, so computed once, by `UNet.condition`.

    Attributes:
        shifts: of all residual blocks, side by side, `[B, S]` or, for the whole batch, `[S]`. Those of a run with T
            timesteps, which `UNet.condition` returns, are `[T, B, S]` or `[T, S]`: a forward pass takes one row.
        keys_values: keys and values of all cross-attention layers, side by side, `[B, M, W]`.
    """

    shifts: Tensor
    keys_values: Tensor

    def of(self, rows: slice) -> "Conditioning":
        """Those of some images of the batch."""
        return Conditioning(self.shifts if self.shifts.ndim == 1 else self.shifts[rows], self.keys_values[rows])

    def one_each(self) -> "Conditioning":
        """Of what `UNet.condition` returns for B timesteps and B texts, those of the first with the first and so on."""
        return Conditioning(self.shifts.diagonal().T if self.shifts.ndim == 3 else self.shifts, self.keys_values)


class Layers(NamedTuple):
    """A `Conditioning` handed out to the layers, one after the other, in the order in which they run."""

    shifts: Iterator[Tensor]
    keys_values: Iterator[Tensor]


class Attention(nn.Module):
    """Multi-head attention of tokens to a context; the arithmetic between projections is the caller's `attend`."""

    def __init__(self, channels: int, context_channels: int, heads: int, kind: str, path: str):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be split into {heads} attention heads")
        self.heads, self.kind, self.path = heads, kind, path
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.register_buffer("to_qkv", None, persistent=False)

    def fuse(self) -> None:
        """Lay the three projections of self-attention out as one matrix, so that one product computes all of them."""
        if self.kind == "self":
            projections = self.to_q, self.to_k, self.to_v
            self.to_qkv = torch.cat([projection.weight for projection in projections])
            for projection, rows in zip(projections, self.to_qkv.chunk(3), strict=True):
                projection.weight = nn.Parameter(rows, requires_grad=False)

    def keys_and_values(self, context: Tensor) -> Tensor:
        """`[B, M, context_channels]` to `[B, M, 2 * C]`."""
        return torch.cat([self.to_k(context), self.to_v(context)], dim=-1)

    def forward(self, tokens: Tensor, keys_values: Tensor | None, size: tuple[int, int], attend: Attend) -> Tensor:
        """`[B, N, C]` tokens, and in cross-attention `[B, M, 2 * C]`, to `[B, N, C]`; `N = size[0] * size[1]`."""
        if keys_values is not None:
            q, k, v = self.to_q(tokens), *keys_values.chunk(2, dim=-1)
        elif self.to_qkv is not None:
            q, k, v = split_projection(F.linear(tokens, self.to_qkv))
        else:
            q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        q, k, v = (states.unflatten(-1, (self.heads, -1)) for states in (q, k, v))
        site = Site(self.path, self.kind, *size, self.heads)
        return self.to_out[0](attend(q, k, v, site).flatten(2))


class GEGLU(nn.Module):
    """`value * gelu(gate)` of one projection. Source: Shazeer, "GLU Variants Improve Transformer" (2020)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, N, channels]` to `[B, N, inner]`."""
        return geglu_linear(tokens, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back, plus a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """`[B, N, channels]` twice to the same shape; the residual already has `self.bias`, and may be written over."""
        return add_product(self.net[0](tokens), self.net[2].weight, residual)

    @property
    def bias(self) -> Tensor:
        """Of the last layer, `[channels]`."""
        return self.net[2].bias


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and a feed-forward layer, each normed before and added after."""

    def __init__(self, channels: int, context_channels: int, heads: int, path: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads, "self", f"{path}.attn1")
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads, "cross", f"{path}.attn2")
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tensor, keys_values: Tensor, size: tuple[int, int], attend: Attend) -> Tensor:
        """`[B, N, C]` and keys and values of the text, `[B, M, 2 * C]`, to `[B, N, C]`."""
        normed, tokens = layer_norm(tokens, self.norm1.weight, self.norm1.bias, carry=True)
        attended = self.attn1(normed, None, size, attend)
        normed, tokens = layer_norm(attended, self.norm2.weight, self.norm2.bias, residual=tokens)
        attended = self.attn2(normed, keys_values, size, attend)
        norm3, bias = self.norm3, self.ff.bias
        normed, tokens = layer_norm(attended, norm3.weight, norm3.bias, residual=tokens, sum_bias=bias)
        return self.ff(normed, tokens)


def _changed(summands: Summands, features: Features | None, path: str) -> Summands:
    """What a residual block adds to its input, as somebody's function wants it."""
    if features is None:
        return summands
    hidden, *others = summands
    return features(hidden, Site(path, "features", *hidden.shape[2:], heads=0)), *others


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, plus the input."""

    def __init__(self, channels: int, heads: int, layers: int, config: UNetConfig, path: str):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        project = nn.Linear if config.linear_projection else lambda i, o: nn.Conv2d(i, o, 1)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config.context_channels, heads, f"{path}.transformer_blocks.{i}")
            for i in range(layers)
        )
        self.proj_out = project(channels, channels)

    def take(self, keys_values: Iterator[Tensor]) -> list[Tensor]:
        """Those of its blocks, the next ones."""
        return [next(keys_values) for _ in self.transformer_blocks]

    def forward(self, summands: Summands, keys_values: list[Tensor], attend: Attend) -> Tensor:
        """A residual block's `summands`, unadded, to a map `[B, C, h, w]`; `keys_values` are `[B, M, 2 * C]` each."""
        hidden, carried, bias = summands
        normed, x = group_normed(self.norm, hidden, shift=bias, residual=carried, sum_bias=self.proj_out.bias)
        tokens = pointwise(self.proj_in, to_tokens(normed))
        for block, own in zip(self.transformer_blocks, keys_values, strict=True):
            tokens = block(tokens, own, x.shape[2:], attend)
        return to_map(add_product(tokens, self.proj_out.weight.flatten(1), to_tokens(x)), *x.shape[2:])


class Level(nn.Module):
    """One resolution on the way down or up: residual blocks, transformers, and the change of resolution."""

    def __init__(
        self,
        widths: list[tuple[int, int]],
        level: int,
        config: UNetConfig,
        path: str,
        resample: nn.Module | None,
    ):
        """`widths` lists (in, out) channels of each residual block; `level` is 0 for the finest resolution."""
        super().__init__()
        self.path = path
        time_channels = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(before, after, config.norm_groups, 1e-5, time_channels) for before, after in widths
        )
        if config.cross_attention[level]:
            heads, layers = config.heads[level], config.layers_of(level)
            self.attentions = nn.ModuleList(
                SpatialTransformer(after, heads, layers, config, f"{path}.attentions.{i}")
                for i, (_, after) in enumerate(widths)
            )
        if isinstance(resample, Downsample):
            self.downsamplers = nn.ModuleList([resample])
        elif isinstance(resample, Upsample):
            self.upsamplers = nn.ModuleList([resample])

    def layer(self, i: int, conditioning: Layers, hooks: Hooks) -> Callable[..., Tensor]:
        """The i-th residual block and, where there is one, the transformer behind it, as a function of its input.

        The function takes maps `[B, C, h, w]`, of which it makes one with all their channels, and can be called again.
        """
        block, shift = self.resnets[i], next(conditioning.shifts)
        transformer = self.attentions[i] if hasattr(self, "attentions") else None
        keys_values = transformer.take(conditioning.keys_values) if transformer else None

        def run(*inputs: Tensor) -> Tensor:
            x = torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0]
            changed = partial(_changed, features=hooks.features, path=f"{self.path}.resnets.{i}")
            if transformer:
                return transformer(changed(block.summands(x, shift)), keys_values, hooks.attend)
            return block(x, shift, changed)

        return run


class MiddleLevel(nn.Module):
    """Residual block, transformer, residual block at the coarsest resolution."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        channels, time_channels = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, config.norm_groups, 1e-5, time_channels) for _ in range(2)
        )
        heads, layers = config.heads[-1], config.layers_of(-1)
        self.attentions = nn.ModuleList([SpatialTransformer(channels, heads, layers, config, "mid_block.attentions.0")])

    def forward(self, x: Tensor, conditioning: Layers, hooks: Hooks) -> Tensor:
        """`[B, C, h, w]` to the same shape."""
        changed = [partial(_changed, features=hooks.features, path=f"mid_block.resnets.{i}") for i in range(2)]
        summands = changed[0](self.resnets[0].summands(x, next(conditioning.shifts)))
        x = self.attentions[0](summands, self.attentions[0].take(conditioning.keys_values), hooks.attend)
        return self.resnets[1](x, next(conditioning.shifts), changed[1])


class TimeEmbedding(nn.Module):
    """Two linear layers over features of the timestep, or over those of SDXL's pooled text and image size."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, features: Tensor) -> Tensor:
        """`[B, channels]` to `[B, time_channels]`."""
        return self.linear_2(F.silu(self.linear_1(features)))


class UNet(nn.Module):
    """Predicts the noise (or v) in a latent.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.3.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        for entries in (config.heads, config.cross_attention):
            if len(entries) != levels:
                raise ValueError(f"a UNet of {levels} levels takes as many entries for them, not {entries}")

        self.conv_in = Conv3x3(config.in_channels, channels[0])
        self.time_embedding = TimeEmbedding(channels[0], 4 * channels[0])
        if config.pooled_channels:
            added = config.pooled_channels + SIZE_NUMBERS * config.size_channels
            self.add_embedding = TimeEmbedding(added, 4 * channels[0])

        skips = [channels[0]]  # channels of every tensor that the way down leaves for the way up
        self.down_blocks = nn.ModuleList()
        for i in range(levels):
            widths = [(skips[-1] if j == 0 else channels[i], channels[i]) for j in range(config.layers_per_block)]
            resample = Downsample(channels[i], padding=1) if i < levels - 1 else None
            self.down_blocks.append(Level(widths, i, config, f"down_blocks.{i}", resample))
            skips += [channels[i]] * (config.layers_per_block + (i < levels - 1))

        self.mid_block = MiddleLevel(config)

        self.up_blocks = nn.ModuleList()
        before = channels[-1]
        for i in range(levels):
            level = levels - 1 - i
            widths = []
            for _ in range(config.layers_per_block + 1):
                widths.append((before + skips.pop(), channels[level]))
                before = channels[level]
            resample = Upsample(channels[level]) if level > 0 else None
            self.up_blocks.append(Level(widths, level, config, f"up_blocks.{i}", resample))

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels[0], eps=1e-5)
        self.conv_out = Conv3x3(channels[0], config.out_channels)

        # In the order in which they run.
        self._residual_blocks = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        self._attentions = [module for module in self.modules() if isinstance(module, Attention)]
        self._cross_attentions = [layer for layer in self._attentions if layer.kind == "cross"]

    def fuse(self) -> None:
        """Lay weights out as they are read fastest: once they are in their final place, and again after a change."""
        for module in self.modules():
            if isinstance(module, (Attention, Upsample)):
                module.fuse()

    @property
    def cross_attention_paths(self) -> list[str]:
        """Of all cross-attention layers, in the order in which they run."""
        return [layer.path for layer in self._cross_attentions]

    def level_of(self, path: str) -> int:
        """The level, 0 the finest, that an attention layer's path names."""
        levels = len(self.config.block_out_channels)
        stage, index, *_ = path.split(".")
        if stage == "mid_block":
            return levels - 1
        return int(index) if stage == "down_blocks" else levels - 1 - int(index)

    def sites(self, height: int, width: int) -> list[Site]:
        """All attention layers, in the order in which they run.

        Args:
            height, width: of the latents.
        """
        sites = []
        for layer in self._attentions:
            scale = 2 ** self.level_of(layer.path)
            sites.append(Site(layer.path, layer.kind, -(-height // scale), -(-width // scale), layer.heads))
        return sites

    def condition(self, timesteps: Tensor, context: Tensor, image_size: tuple[int, int] | None = None) -> Conditioning:
        """What timesteps and texts mean to the layers; independent of the latents.

        Args:
            timesteps: `[T]`, training steps (0 to 999): one for each image, or all those of a run.
            context: text states, `[B, M, context_channels]`, dtype of the weights; SDXL's with one row more, see
                `p2pz.text.encode_text_twice`.
            image_size: height and width in pixels, of which SDXL is told as an uncropped image's.

        Returns:
            Shifts `[T, S]`, or `[T, B, S]` where they depend on the text too (SDXL), and keys and values `[B, M, W]`.

        Source: Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023),
        section 2.2, for the image's size.
        """
        features = timestep_embedding(timesteps, self.config.block_out_channels[0])
        embedding = self.time_embedding(features.to(context.dtype))
        if self.config.pooled_channels:
            if image_size is None:
                raise ValueError("Stable Diffusion XL has to be told the image's size")
            context, pooled = context[:, :-1], context[:, -1, : self.config.pooled_channels]
            numbers = torch.tensor([*image_size, 0, 0, *image_size], device=context.device)
            size = timestep_embedding(numbers, self.config.size_channels).flatten().to(context.dtype)
            added = self.add_embedding(torch.cat([pooled, size.expand(len(pooled), -1)], dim=-1))
            embedding = embedding[:, None] + added
        shifts = torch.cat([block.time_shift(embedding) for block in self._residual_blocks], dim=-1)
        return Conditioning(
            shifts, torch.cat([layer.keys_and_values(context) for layer in self._cross_attentions], dim=-1)
        )

    def _split_keys_values(self, keys_values: Tensor) -> tuple[Tensor, ...]:
        """`[B, M, 2 * C]` of each cross-attention layer."""
        return keys_values.split([2 * layer.to_v.out_features for layer in self._cross_attentions], dim=-1)

    def keys(self, keys_values: Tensor) -> dict[str, Tensor]:
        """Keys of each cross-attention layer, by its path.

        Args:
            keys_values: see `Conditioning`.

        Returns:
            `path -> [B, M, H, D]`, views.
        """
        parts = zip(self._cross_attentions, self._split_keys_values(keys_values), strict=True)
        return {layer.path: part.chunk(2, dim=-1)[0].unflatten(-1, (layer.heads, -1)) for layer, part in parts}

    def query_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """`[N, H, D]` of the queries of each cross-attention layer, for an image.

        Args:
            height, width: of the latents.
        """
        return [
            (site.height * site.width, site.heads, layer.to_q.out_features // site.heads)
            for layer, site in zip(self._attentions, self.sites(height, width), strict=True)
            if site.kind == "cross"
        ]

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        attend: Attend | Hooks = plain,
        image_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Predict the noise.

        Args:
            latents: `[B, in_channels, h, w]`, any height and width.
            timesteps: `[B]` or a scalar tensor, training steps (0 to 999).
            context: text states, `[B, M, context_channels]`, same dtype as the latents.
            attend: what happens in every attention layer, or `Hooks` of that and of features, see `p2pz.attention`.
            image_size: see `condition`.

        Returns:
            `[B, out_channels, h, w]`: the noise, or v for a v-prediction checkpoint.
        """
        conditioning = self.condition(timesteps.expand(len(latents)), context, image_size)
        return self.predict(latents, conditioning.one_each(), attend)

    def predict(
        self, latents: Tensor, conditioning: Conditioning, attend: Attend | Hooks = plain, checkpoint: bool = False
    ) -> Tensor:
        """The same with timesteps and context as `condition` leaves them.

        With `checkpoint`, a layer keeps nothing but its input for the backward pass, which runs the layer again, calls
        of hooks included. Not so the last layer that calls `attend`, so `attend` may end the pass there.
        """
        widths = [block.conv1.out_channels for block in self._residual_blocks]
        shifts = conditioning.shifts.split(widths, dim=-1)
        hooks = hooks_of(attend)
        layers = Layers(iter(shifts), iter(self._split_keys_values(conditioning.keys_values)))

        last = [level for level in (self.mid_block, *self.up_blocks) if hasattr(level, "attentions")][-1]

        def run(level: Level, i: int, *inputs: Tensor) -> Tensor:
            layer = level.layer(i, layers, hooks)
            if not checkpoint or (level is last and i == len(level.resnets) - 1):
                return layer(*inputs)
            return torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)

        x = self.conv_in(latents)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = run(level, i, x)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)

        x = self.mid_block(x, layers, hooks)

        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = run(level, i, x, skips.pop())
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, tuple(skips[-1].shape[2:]))

        return self.conv_out(group_normed(self.conv_norm_out, x, silu=True))
