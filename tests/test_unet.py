import copy
import json
import time

import pytest
import torch
from diffusers import UNet2DConditionModel

from p2pz import layers
from p2pz.kernels import upsampled_conv3x3
from p2pz.unet import MINI, STABLE_DIFFUSION_1, STABLE_DIFFUSION_2, STABLE_DIFFUSION_2_768, UNet, UNetConfig

SD2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}


def output_and_gradient(predict, latents):
    """The prediction and the gradient of its product with a fixed random tensor with respect to the latents."""
    latents = latents.clone().requires_grad_()
    output = predict(latents)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return output.detach(), torch.autograd.grad((output * weights).sum(), latents)[0]


@pytest.mark.parametrize("size", [(16, 16), (18, 12), (13, 19)], ids=str)
@pytest.mark.parametrize("name", ["sd1", "sd2", "mini"])
def test_equals_diffusers(name, size, unet_pair, assert_close):
    """Prediction and gradient of a batch with different timesteps; odd sizes are not halved exactly."""
    ours, theirs = unet_pair(name)
    latents = torch.randn(3, 4, *size)
    timesteps = torch.tensor([1, 500, 981])
    context = torch.randn(3, 7, ours.config.context_channels)
    output, gradient = output_and_gradient(lambda x: ours(x, timesteps, context), latents)
    expected, expected_gradient = output_and_gradient(lambda x: theirs(x, timesteps, context).sample, latents)
    assert_close(output, expected)
    assert_close(gradient, expected_gradient)


def test_scalar_timestep_serves_the_whole_batch(unet_pair):
    ours, _ = unet_pair("mini")
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 128)
    outputs = [ours(latents, torch.tensor(t), context) for t in (21, [21, 21], [21, 22])]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(("size", "calls"), [((8, 12), 2), ((10, 12), 1), ((7, 5), 0)], ids=str)
def test_enlargements_are_part_of_convolutions(size, calls, unet_pair, monkeypatch):
    """In half precision, where a size is doubled: prediction and gradient are as near to float32 as without."""
    unet, _ = unet_pair("mini")
    latents, timestep, context = torch.randn(2, 4, *size), torch.tensor(481), torch.randn(2, 7, 128)
    exact = output_and_gradient(lambda x: unet(x, timestep, context), latents)
    called = []
    monkeypatch.setattr(layers, "upsampled_conv3x3", lambda *args: called.append(args) or upsampled_conv3x3(*args))
    errors = []
    for fused in (False, True):
        half = copy.deepcopy(unet).bfloat16()
        if fused:
            half.fuse()
        found = output_and_gradient(lambda x, half=half: half(x.bfloat16(), timestep, context.bfloat16()), latents)
        errors.append([((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)])
    assert len(called) == calls
    assert all(fused < 1.2 * plain for plain, fused in zip(*errors, strict=True))


def test_float32_needs_no_merged_weights(unet_pair):
    unet = copy.deepcopy(unet_pair("mini")[0])
    unet.fuse()
    assert all(module.merged is None for module in unet.modules() if isinstance(module, layers.Upsample))


def test_without_a_gradient(unet_pair, assert_close):
    """Sums are then written over their residuals: the prediction is the same, and so are latents and context."""
    unet, _ = unet_pair("mini")
    arguments = torch.randn(2, 4, 6, 10), torch.tensor(481), torch.randn(2, 7, 128)
    copies = [argument.clone() for argument in arguments]
    expected = unet(arguments[0].clone().requires_grad_(), *arguments[1:]).detach()
    with torch.no_grad():
        for latents in (arguments[0], arguments[0].contiguous(memory_format=torch.channels_last)):
            assert_close(unet(latents, *arguments[1:]), expected)
    assert all(torch.equal(argument, copied) for argument, copied in zip(arguments, copies, strict=True))


@pytest.mark.parametrize("name", ["sd1", "sd2", "mini"])
def test_state_dict_loads_into_diffusers(name, unet_pair):
    ours, theirs = unet_pair(name)
    UNet2DConditionModel.from_config(theirs.config).load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.slow
def test_equals_diffusers_at_full_width(randomise, assert_close):
    """Stable Diffusion 1.5's own shape: 860 million random weights, held once by both models."""
    theirs = randomise(UNet2DConditionModel(cross_attention_dim=768))
    with torch.device("meta"):
        ours = UNet(STABLE_DIFFUSION_1)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    ours.requires_grad_(False)
    latents, timesteps, context = torch.randn(1, 4, 32, 32), torch.tensor([481]), torch.randn(1, 77, 768)
    start = time.perf_counter()
    output, gradient = output_and_gradient(lambda x: ours(x, timesteps, context), latents)
    seconds = time.perf_counter() - start
    expected, expected_gradient = output_and_gradient(lambda x: theirs(x, timesteps, context).sample, latents)
    errors = assert_close(output, expected), assert_close(gradient, expected_gradient)
    print(f"errors of prediction and gradient: {errors[0]:.2e}, {errors[1]:.2e}; {seconds:.1f} s")


@pytest.mark.parametrize(
    ("config", "settings", "parameters"),
    [
        (STABLE_DIFFUSION_1, {"cross_attention_dim": 768}, 859_520_964),
        (STABLE_DIFFUSION_2, SD2, 865_910_724),
    ],
    ids=["sd1", "sd2"],
)
def test_checkpoint_layout(config, settings, parameters):
    """Names and shapes of all weights of the published models."""
    with torch.device("meta"):
        ours, theirs = UNet(config), UNet2DConditionModel(**settings)
    layout = {name: weight.shape for name, weight in ours.state_dict().items()}
    assert layout == {name: weight.shape for name, weight in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in layout.values()) == parameters


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"cross_attention_dim": 768, "sample_size": 64}, STABLE_DIFFUSION_1),
        (SD2 | {"sample_size": 64}, STABLE_DIFFUSION_2),
        (SD2 | {"sample_size": 96}, STABLE_DIFFUSION_2_768),
    ],
    ids=["sd1", "sd2", "sd2-768"],
)
def test_from_json_reads_published_settings(settings, expected):
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**settings)
    assert UNetConfig.from_json(json.loads(json.dumps(dict(theirs.config)))) == expected


@pytest.mark.parametrize("config", [STABLE_DIFFUSION_1, STABLE_DIFFUSION_2_768, MINI], ids=["sd1", "sd2-768", "mini"])
def test_to_json_is_what_diffusers_reads(config):
    """The written file gives diffusers the same model, and comes back through diffusers unchanged."""
    written = json.loads(json.dumps(config.to_json()))
    with torch.device("meta"):
        ours, theirs = UNet(config), UNet2DConditionModel.from_config(written)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert UNetConfig.from_json(written) == UNetConfig.from_json(theirs.config) == config


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("addition_embed_type", "text_time"),  # SDXL
        ("transformer_layers_per_block", [1, 2, 10]),
        ("class_embed_type", "projection"),  # unCLIP
        ("only_cross_attention", [True, True, True, False]),  # upscaler
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["AttnDownBlock2D"]),
        ("up_block_types", ["SimpleCrossAttnUpBlock2D"] * 4),
        ("down_block_types", ["CrossAttnDownBlock2D"] * 3),  # one too few
        ("act_fn", "gelu"),
        ("norm_eps", 1e-6),
        ("resnet_time_scale_shift", "scale_shift"),
        ("conv_in_kernel", 1),
    ],
)
def test_from_json_names_the_setting_it_does_not_know(setting, value):
    with pytest.raises(ValueError, match=rf"\b{setting} is"):
        UNetConfig.from_json(STABLE_DIFFUSION_1.to_json() | {setting: value})
