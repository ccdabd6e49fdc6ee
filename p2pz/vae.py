"""The autoencoder of Stable Diffusion: images to latents and back."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from p2pz.kernels import attention
from p2pz.layers import Downsample, ResnetBlock, Upsample, group_normed, to_map, to_tokens
from p2pz.weights import read_number, read_numbers

_EPS = 1e-6  # of every group norm of the VAE; the UNet's residual blocks use 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """Shape of an autoencoder. `block_out_channels` has one entry per level; each level but the last halves the size.

    Attributes:
        block_out_channels: channels of each level, from the finest to the coarsest.
        layers_per_block: residual blocks per level of the encoder; one more in the decoder.
        latent_channels: channels of a latent.
        norm_groups: groups of all group norms.
        scaling_factor: latents are multiplied by it after encoding, so that they have about unit variance.
        sample_size: image height and width the model was trained at; others work.
        force_upcast: float16 may overflow; it is SDXL's that does, see `p2pz.model.load`.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512
    force_upcast: bool = True

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "VAEConfig":
        """Read the `config.json` of a diffusers VAE folder.

        Args:
            config: the parsed file.

        Raises:
            ValueError: the file describes another kind of autoencoder; names the setting.
        """
        channels = read_numbers(config, "block_out_channels")
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if config[key] != [kind] * len(channels):
                raise ValueError(f"this VAE is not a Stable Diffusion AutoencoderKL: its {key} is {config[key]}")
        for key, expected in _EXPECTED_SETTINGS.items():
            if config.get(key, expected) != expected:
                raise ValueError(f"this VAE is not a Stable Diffusion AutoencoderKL: its {key} is {config[key]}")
        return cls(
            block_out_channels=channels,
            layers_per_block=read_number(config, "layers_per_block", 1),
            latent_channels=read_number(config, "latent_channels", 4),
            norm_groups=read_number(config, "norm_num_groups", 32),
            scaling_factor=read_number(config, "scaling_factor", 0.18215, 0.001, 1000),
            sample_size=read_number(config, "sample_size", 512),
            force_upcast=bool(config.get("force_upcast", True)),
        )

    def to_json(self) -> dict[str, Any]:
        """The `config.json` of a diffusers VAE folder that describes this shape."""
        levels = len(self.block_out_channels)
        fields = asdict(self)
        del fields["norm_groups"]
        return fields | {
            "_class_name": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "norm_num_groups": self.norm_groups,
        }


_EXPECTED_SETTINGS = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}

STABLE_DIFFUSION = VAEConfig()
MINI = VAEConfig(block_out_channels=(32, 64, 128), layers_per_block=1, norm_groups=16, sample_size=128)


class Attention(nn.Module):
    """Single-head self-attention over the positions of a feature map, plus the input."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, _EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` to the same shape."""
        tokens = to_tokens(group_normed(self.group_norm, x))
        q, k, v = (projection(tokens).unsqueeze(2) for projection in (self.to_q, self.to_k, self.to_v))
        return x + to_map(self.to_out[0](attention(q, k, v).squeeze(2)), *x.shape[2:])


class MiddleLevel(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, _EPS) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` to the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Residual blocks of one resolution, then the change of resolution, if any."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, resample: nn.Module | None):
        super().__init__()
        widths = [(in_channels, out_channels)] + [(out_channels, out_channels)] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(before, after, groups, _EPS) for before, after in widths)
        if isinstance(resample, Downsample):
            self.downsamplers = nn.ModuleList([resample])
        elif isinstance(resample, Upsample):
            self.upsamplers = nn.ModuleList([resample])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, out_channels, h', w']`."""
        for module in (*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = module(x)
        return x


class Encoder(nn.Module):
    """Image to the moments of its latent."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], width, config.layers_per_block, groups, resample)
            for i, width in enumerate(channels)
            for resample in [Downsample(width, padding=0) if i < len(channels) - 1 else None]
        )
        self.mid_block = MiddleLevel(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], _EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, 2 * latent_channels, h, w]`."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(group_normed(self.conv_norm_out, self.mid_block(x), silu=True))


class Decoder(nn.Module):
    """Latent to image."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MiddleLevel(channels[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], width, config.layers_per_block + 1, groups, resample)
            for i, width in enumerate(channels)
            for resample in [Upsample(width) if i < len(channels) - 1 else None]
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], _EPS)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, latent_channels, h, w]` to `[B, 3, H, W]`."""
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(group_normed(self.conv_norm_out, x, silu=True))


class VAE(nn.Module):
    """Variational autoencoder with a Gaussian posterior over latents.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.1.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def fuse(self) -> None:
        """Lay weights out as they are read fastest, as `UNet.fuse` does."""
        for module in self.modules():
            if isinstance(module, Upsample):
                module.fuse()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of the latents, *not* multiplied by the scaling factor.

        Args:
            images: `[B, 3, H, W]` in [-1, 1]; H and W multiples of `config.downsampling`.

        Returns:
            Mean and log-variance, each `[B, latent_channels, H / downsampling, W / downsampling]`; the log-variance is
            clamped to [-30, 20].
        """
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, *not* divided by the scaling factor here.

        Args:
            latents: `[B, latent_channels, h, w]`.

        Returns:
            `[B, 3, h * downsampling, w * downsampling]`, about in [-1, 1], not clamped.
        """
        return self.decoder(self.post_quant_conv(latents))
