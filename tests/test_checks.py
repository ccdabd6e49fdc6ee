"""What is found out about checkpoints and edits: facts, doubts, and the layer at fault."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import p2pz
from p2pz.checks import edit_warnings, first_layer_with_nan
from p2pz.info import describe
from p2pz.memory import plan_for
from p2pz.model import GIB
from p2pz.unet import UNet, UNetConfig
from p2pz.vae import VAE
from p2pz.weights import MINI_FOLDER


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs(model):
    return torch.randn(2, 4, 16, 24), torch.tensor(500), model.encode_text(["a cat", "a dog"])


def poison(model, name):
    """A context in which one number of a parameter is infinite."""
    parameter = dict(model.unet.named_parameters())[name]
    place = (0,) * parameter.ndim

    class Poisoned:
        def __enter__(self):
            self.before = parameter.data[place].clone()
            parameter.data[place] = torch.inf

        def __exit__(self, *_):
            parameter.data[place] = self.before

    return Poisoned()


def test_no_layer_is_at_fault_in_a_healthy_model(model, inputs):
    assert first_layer_with_nan(model, *inputs) is None
    assert all(len(module._forward_hooks) == len(module._forward_pre_hooks) == 0 for module in model.unet.modules())


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
PLACES = {
    "conv_in.weight": "conv_in",
    "time_embedding.linear_1.bias": "time_embedding.linear_1",
    "down_blocks.0.resnets.0.time_emb_proj.weight": "down_blocks.0.resnets.0.time_emb_proj",
    "down_blocks.1.resnets.0.conv2.weight": "down_blocks.1.resnets.0",
    "down_blocks.1.resnets.0.norm1.bias": "down_blocks.1.resnets.0",
    "down_blocks.1.attentions.0.proj_in.weight": "down_blocks.1.attentions.0",
    f"{BLOCK}.attn1.to_q.weight": f"{BLOCK}.attn1",
    f"{BLOCK}.attn2.to_k.weight": f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.attn2.to_out.0.bias": f"{BLOCK}.attn2.to_out.0",
    f"{BLOCK}.ff.net.2.weight": f"{BLOCK}.ff",
    "mid_block.resnets.0.conv1.weight": "mid_block.resnets.0",
    "mid_block.resnets.1.conv1.weight": "mid_block.resnets.1",
    "up_blocks.0.upsamplers.0.conv.bias": "up_blocks.0.upsamplers.0.conv",
    "conv_norm_out.bias": "conv_norm_out",
    "conv_out.weight": "conv_out",
}


@pytest.mark.parametrize(("parameter", "place"), PLACES.items(), ids=PLACES)
def test_the_layer_at_fault_is_named(parameter, place, model, inputs):
    with poison(model, parameter):
        assert first_layer_with_nan(model, *inputs) == place
        assert first_layer_with_nan(model, inputs[0], torch.tensor([500, 20]), inputs[2]) == place
    assert all(len(module._forward_hooks) == 0 for module in model.unet.modules())


def test_the_first_of_several_layers_is_named(model, inputs):
    with poison(model, "conv_out.weight"), poison(model, "mid_block.resnets.1.conv1.weight"):
        assert first_layer_with_nan(model, *inputs) == "mid_block.resnets.1"


def test_no_method_draws_pictures_of_nan(model):
    inversion = p2pz.Inversion(torch.randn(4, 32, 32), torch.randn(4, 32, 32), "a cat", 2, model.fingerprint)
    with poison(model, "mid_block.resnets.1.conv1.weight"):
        for method, *given in (
            (p2pz.sample, "a cat"),
            (p2pz.sdedit, inversion, "cat->dog"),
            (p2pz.ddim_edit, inversion, "cat->dog"),
            (p2pz.prompt_to_prompt, inversion, "cat->dog"),
        ):
            with pytest.raises(ValueError, match=r"became infinite or NaN, first in mid_block.resnets.1, at the first"):
                method(*given, model=model, progress=False, **({"steps": 1} if method is p2pz.sample else {}))


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_an_autoencoder_that_overflows_works_in_float32(way, model, monkeypatch):
    half = p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float16)
    inputs = torch.rand(2, 3, 32, 32) if way == "encode" else torch.randn(2, 4, 8, 8)
    runs = [{"encode": each.encode_image, "decode": each.decode_latents}[way] for each in (model, half)]
    expected, function = runs[0](inputs), getattr(VAE, way)

    def overflow(most):
        def run(vae, x):
            results = function(vae, x)
            results = results if way == "encode" else (results,)
            results = [result * torch.inf if x.dtype in most else result for result in results]
            return results if way == "encode" else results[0]

        monkeypatch.setattr(VAE, way, run)

    overflow([torch.float16])
    with pytest.warns(UserWarning, match="overflows in torch.float16, so it works in float32"):
        assert torch.equal(runs[1](inputs), expected)
    assert half.vae.quant_conv.weight.dtype == torch.float16
    overflow([torch.float16, torch.float32])
    for run in runs:
        with (
            warnings.catch_warnings(),
            pytest.raises(ValueError, match=f"{way}s to infinite or NaN numbers: its file is damaged"),
        ):
            warnings.simplefilter("ignore")
            run(inputs)


def test_inputs_that_are_not_finite(model, inputs):
    latents, timestep, context = inputs
    with pytest.raises(ValueError, match="the latents are not finite"):
        first_layer_with_nan(model, latents * torch.nan, timestep, context)
    with pytest.raises(ValueError, match="the text states are not finite"):
        first_layer_with_nan(model, latents, timestep, context * torch.inf)


def test_what_is_doubtful_of_an_edit():
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    rounded, small = picture.copy(), picture.copy()
    rounded[::2] += 1
    small[8:10, 8:10] = 255 - small[8:10, 8:10]
    same, other = Image.fromarray(picture), Image.fromarray(small)
    for almost in (same, Image.fromarray(rounded)):
        (text,) = edit_warnings(almost, same, 30.0)
        assert text.startswith("the direction changed nothing")
    assert edit_warnings(other, same, 30.0) == edit_warnings(other, same, None) == []
    (text,) = edit_warnings(other, same, 12.34)
    assert text.startswith("the inversion lost the image, whose reconstruction is at 12.3 dB only")
    assert len(edit_warnings(same, same, 5.0)) == 2
    (text,) = edit_warnings(other, same, 12.34, "path")
    assert text.startswith(
        "the autoencoder lost the image, whose reconstruction is at 12.3 dB only: give a larger size"
    )


def test_an_edit_without_strength_is_told_from_one_with(model):
    picture = np.asarray(Image.open(MINI_FOLDER / "examples" / "cat.png"))
    found = []
    for strength in (0.0, 2.0):
        result = p2pz.edit(picture, "cat->dog", model=model, steps=2, strength=strength, progress=False)
        found.append(result.warnings)
    assert [len(texts) for texts in found] == [1, 0]


def test_facts_of_the_bundled_model(model):
    facts = describe(model)
    assert facts["family"] == "the bundled model's" and facts["predicts"] == "the noise (epsilon)"
    assert facts["trained at"].startswith("128 x 128 pixels, latents 4 x 32 x 32")
    total = sum(float(facts[part].split()[0]) for part in ("unet", "vae", "text_encoder"))
    modules = model.unet, model.vae, model.text_encoder
    assert total == pytest.approx(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, abs=0.16)
    assert all("safetensors: F16, " in facts[part] for part in ("unet", "vae", "text_encoder"))
    assert "v_prediction" in describe(replace(model, prediction_type="v_prediction"))["predicts"]


@pytest.mark.parametrize(("width", "family"), [(768, "1.x"), (1024, "2.x"), (640, "width 640")])
def test_families_go_by_the_width_of_the_text_states(width, family, model, tmp_path):
    with torch.device("meta"):
        unet = UNet(
            UNetConfig(block_out_channels=(32, 32), heads=(2, 2), cross_attention=(True, False), context_channels=width)
        )
    assert family in describe(replace(model, unet=unet, folder=tmp_path))["family"]


def test_the_memory_that_is_told_is_what_a_budget_needs(tmp_path):
    """A budget of what is said to be needed for one or eight images is planned so, and a smaller one is not."""
    model = p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float16)
    model = replace(model, folder=tmp_path)  # not the bundled one any more, whose edits need less
    found = re.findall(r"about ([\d.]+) GiB .* at once ([\d.]+); .* ([\d.]+) at least", describe(model)["memory"])
    one, eight, least = map(float, found[0])
    assert least <= one < eight

    def plan(gib):
        return plan_for(replace(model, max_memory=int(gib * GIB)), (128, 128), 8, rows=3, guided_rows=1)

    rounding = 0.1  # up
    assert plan(eight).images == 8 and plan(eight - rounding) != plan(eight)
    assert plan(one).images >= 1 and not plan(one).checkpoint
    assert plan(least).images >= 1
    with pytest.raises(ValueError, match="takes about"):
        plan(least - rounding)
