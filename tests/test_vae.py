import copy
import json
import time

import pytest
import torch
from diffusers import AutoencoderKL

from p2pz.vae import MINI, STABLE_DIFFUSION, VAE, VAEConfig


def diffusers_settings(channels, layers, groups, size):
    return {
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "latent_channels": 4,
        "sample_size": size,
    }


SD = diffusers_settings((128, 256, 512, 512), 2, 32, 512)
SHAPES = {"mini": diffusers_settings((32, 64, 128), 1, 16, 128), "sd": diffusers_settings((32, 48, 64, 64), 2, 16, 64)}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, randomise):
    """Our VAE and diffusers' one with the same random weights."""
    theirs = randomise(AutoencoderKL(**SHAPES[request.param]))
    ours = VAE(VAEConfig.from_json(theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    AutoencoderKL.from_config(theirs.config).load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=str)
def test_encode_equals_diffusers(pair, size, assert_close):
    ours, theirs = pair
    images = torch.rand(2, 3, *size) * 2 - 1
    mean, log_variance = ours.encode(images)
    expected = theirs.encode(images).latent_dist
    assert mean.shape[2:] == (size[0] // ours.config.downsampling, size[1] // ours.config.downsampling)
    assert_close(mean, expected.mean)
    assert_close(log_variance, expected.logvar)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)], ids=str)
def test_decode_equals_diffusers(pair, size, assert_close):
    ours, theirs = pair
    latents = torch.randn(2, 4, *size)
    images = ours.decode(latents)
    assert images.shape == (2, 3, size[0] * ours.config.downsampling, size[1] * ours.config.downsampling)
    assert_close(images, theirs.decode(latents).sample)


def test_half_precision_enlarges_by_merged_weights(pair, device, assert_close):
    """As near to float32 as the convolution of the enlarged map; and again as it was in float32."""
    ours = pair[0]
    latents = torch.randn(1, 4, 6, 10, device=device)
    exact = copy.deepcopy(ours).to(device).decode(latents)
    plain = copy.deepcopy(ours).to(device, torch.bfloat16)
    fused = copy.deepcopy(plain)
    fused.fuse()
    merged = [name for name, _ in fused.named_buffers() if name.endswith("merged")]
    assert len(merged) == len(ours.config.block_out_channels) - 1
    near, nearest = (vae.decode(latents.bfloat16()).float() for vae in (fused, plain))
    assert not torch.equal(near, nearest)
    assert (near - exact).norm() < 1.3 * (nearest - exact).norm()
    wide = fused.float()
    wide.fuse()
    assert not dict(wide.named_buffers()).keys() & set(merged)
    assert_close(wide.decode(latents), plain.float().decode(latents))


def test_log_variance_is_clamped(randomise):
    vae = randomise(VAE(MINI))
    vae.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 1e3, -1e3])
    mean, log_variance = vae.encode(torch.rand(1, 3, 32, 32))
    assert torch.equal(log_variance, torch.tensor([20.0, -30.0, 20.0, -30.0])[None, :, None, None].expand(1, 4, 8, 8))
    assert mean.abs().max() < 20


@pytest.mark.slow
def test_equals_diffusers_at_full_width(randomise, assert_close):
    """Stable Diffusion's own shape with random weights, on a 256x256 image."""
    theirs = randomise(AutoencoderKL(**SD))
    with torch.device("meta"):
        ours = VAE(STABLE_DIFFUSION)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    images, latents = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        start = time.perf_counter()
        (mean, log_variance), decoded = ours.encode(images), ours.decode(latents)
        seconds = time.perf_counter() - start
        expected, expected_decoded = theirs.encode(images).latent_dist, theirs.decode(latents).sample
    outputs = (mean, expected.mean), (log_variance, expected.logvar), (decoded, expected_decoded)
    errors = ", ".join(f"{assert_close(*pair):.2e}" for pair in outputs)
    print(f"errors of mean, log-variance, image: {errors}; {seconds:.1f} s")


def test_checkpoint_layout():
    """Names and shapes of all weights of the published model."""
    with torch.device("meta"):
        ours, theirs = VAE(STABLE_DIFFUSION), AutoencoderKL(**SD)
    layout = {name: weight.shape for name, weight in ours.state_dict().items()}
    assert layout == {name: weight.shape for name, weight in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in layout.values()) == 83_653_863


@pytest.mark.parametrize(
    ("config", "settings"), [(STABLE_DIFFUSION, SD), (MINI, SHAPES["mini"])], ids=["stable-diffusion", "mini"]
)
def test_json_round_trip(config, settings):
    """Diffusers' settings give our constant; what we write goes through diffusers unchanged."""
    with torch.device("meta"):
        theirs = AutoencoderKL(**settings)
        assert VAEConfig.from_json(json.loads(json.dumps(dict(theirs.config)))) == config
        written = json.loads(json.dumps(config.to_json()))
        theirs = AutoencoderKL.from_config(written)
    assert VAEConfig.from_json(written) == VAEConfig.from_json(theirs.config) == config


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        ("up_block_types", ["AttnUpDecoderBlock2D"] * 4),
        ("act_fn", "relu"),
        ("use_quant_conv", False),  # SD 3
        ("mid_block_add_attention", False),
    ],
)
def test_from_json_names_the_setting_it_does_not_know(setting, value):
    with pytest.raises(ValueError, match=rf"\b{setting} is"):
        VAEConfig.from_json(STABLE_DIFFUSION.to_json() | {setting: value})
