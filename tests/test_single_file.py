"""Single-file checkpoints: equal to what diffusers loads from the same file; other and hostile files are refused."""

import itertools
import json
import random
import re
import shutil
import struct
import subprocess
import sys
import types
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as peer
from safetensors.torch import load_file, save_file
from test_loading import MEASURE_LOADING, STATUS
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import p2pz
from p2pz import cli, schedule
from p2pz import model as model_module
from p2pz.weights import MINI_FOLDER, CheckpointError, NoTokenizerError, open_checkpoint
from p2pz.weights.reading import rename
from p2pz.weights.single_file import UNET_BLOCKS, UNET_LAYERS, VAE_BLOCKS, VAE_LAYERS

TOKENIZER = MINI_FOLDER / "tokenizer"
SENTENCES = ["a photo of a cat on the beach", "", "a dog " * 60]
FULL = {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "sd1": 768, "sd2": 1024}
SMALL = {"unet": (64, 64, 128, 128), "vae": (32, 32, 64, 64), "sd1": 128, "sd2": 128}


# --- writing the layout: the way from diffusers' names to the original ones, checked against diffusers' way back ---


def ldm_unet(state):
    """The UNet's tensors under their original names."""
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    inside |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    ends = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    ends |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}

    def name(key):
        if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key):
            way, level, kind, i, rest = match.groups()
            level, i = int(level), int(i)
            if kind == "downsamplers":
                return f"input_blocks.{3 * level + 3}.0.op.{rest.removeprefix('conv.')}"
            if kind == "upsamplers":
                return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
            block = f"input_blocks.{3 * level + i + 1}" if way == "down" else f"output_blocks.{3 * level + i}"
        elif match := re.fullmatch(r"mid_block\.(\w+)\.(\d)\.(.*)", key):
            kind, i, rest = match.groups()
            block = f"middle_block.{2 * int(i) if kind == 'resnets' else 1}"
            part, _, last = rest.rpartition(".") if kind == "resnets" else (None, None, None)
            return f"{block}.{inside[part]}.{last}" if part else f"{block}.{rest}"
        else:
            part, _, last = key.rpartition(".")
            return f"{ends[part]}.{last}"
        if kind == "attentions":
            return f"{block}.1.{rest}"
        part, _, last = rest.rpartition(".")
        return f"{block}.0.{inside[part]}.{last}"

    return {f"model.diffusion_model.{name(key)}": value for key, value in state.items()}


def ldm_vae(state):
    """The VAE's tensors under their original names, with its attention as 1x1 convolutions."""
    words = [("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("resnets", "block")]
    words += [("mid_block.block.0", "mid.block_1"), ("mid_block.block.1", "mid.block_2"), ("down_blocks", "down")]
    words += [("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"), ("mid_block.attentions.0", "mid.attn_1")]
    words += [("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")]
    tensors = {}
    for key, value in state.items():
        for word, original in words:
            key = key.replace(word, original)
        key = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{3 - int(match[1])}", key)
        is_linear = ".attn_1." in key and key.endswith("weight") and ".norm." not in key
        tensors[f"first_stage_model.{key}"] = value[:, :, None, None] if is_linear else value
    return tensors


def ldm_clip(state):
    """A CLIP text encoder's tensors as Stable Diffusion 1 has them, with the buffer of old transformers."""
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {f"cond_stage_model.transformer.{key}": value for key, value in tensors.items()}


def ldm_open_clip(state):
    """An OpenCLIP text encoder's tensors as Stable Diffusion 2 has them: fused, and with a last layer nobody uses."""
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    width = state["final_layer_norm.bias"].numel()
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layers."))
    for key in [key for key in state if key.startswith(f"encoder.layers.{layers - 1}.")]:
        state[key.replace(f".{layers - 1}.", f".{layers}.", 1)] = torch.randn_like(state[key])
    tensors = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": torch.randn(width, width),
        "logit_scale": torch.tensor(4.6),
    }
    for i, kind in itertools.product(range(layers + 1), ("weight", "bias")):
        here, there = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        fused = [state[f"{here}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
        tensors[f"{there}.attn.in_proj_{kind}"] = torch.cat(fused)
        tensors[f"{there}.attn.out_proj.{kind}"] = state[f"{here}.self_attn.out_proj.{kind}"]
        tensors[f"{there}.ln_1.{kind}"] = state[f"{here}.layer_norm1.{kind}"]
        tensors[f"{there}.ln_2.{kind}"] = state[f"{here}.layer_norm2.{kind}"]
        tensors[f"{there}.mlp.c_fc.{kind}"] = state[f"{here}.mlp.fc1.{kind}"]
        tensors[f"{there}.mlp.c_proj.{kind}"] = state[f"{here}.mlp.fc2.{kind}"]
    return {f"cond_stage_model.model.{key}": value for key, value in tensors.items()}


def buffers():
    """The noise schedule and other numbers that the original training code leaves in its files."""
    names = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"]
    names += ["log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"]
    names += ["posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"]
    return {name: torch.rand(1000) for name in names} | {"model_ema.decay": torch.tensor(0.9999)}


def ema(tensors):
    """Averaged copies of the UNet, of other values, under the names that the original code gives them."""
    names = [name for name in tensors if name.startswith("model.diffusion_model.")]
    return {f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensors[name] + 1 for name in names}


def build(family, randomise, tokenizer=TOKENIZER, widths=SMALL):
    """Diffusers' pipeline of random weights in a family's shape."""
    sd2, text_width = family == "sd2", widths[family]
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer, **({"pad_token": "!"} if sd2 else {}))
    unet = UNet2DConditionModel(
        block_out_channels=widths["unet"],
        attention_head_dim=[width // 64 for width in widths["unet"]] if sd2 else 8,
        use_linear_projection=sd2,
        cross_attention_dim=text_width,
        sample_size=96 if sd2 else 64,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=widths["vae"],
        layers_per_block=2,
    )
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            num_hidden_layers=23 if sd2 else 12,
            num_attention_heads=text_width // 64,
            hidden_act="gelu" if sd2 else "quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        prediction_type="v_prediction" if sd2 else "epsilon",
    )  # fmt: skip
    return StableDiffusionPipeline(
        randomise(vae), randomise(encoder), tokenizer, randomise(unet), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def ldm_tensors(pipe, family):
    """The whole checkpoint in the original layout."""
    text = ldm_open_clip if family == "sd2" else ldm_clip
    parts = ldm_unet(pipe.unet.state_dict()), ldm_vae(pipe.vae.state_dict()), text(pipe.text_encoder.state_dict())
    return {name: tensor.contiguous() for part in (*parts, buffers()) for name, tensor in part.items()}


@pytest.fixture(scope="module")
def saved(randomise, tmp_path_factory):
    """`saved(family)`: diffusers' pipeline, its folder, and the same weights as a single file."""
    made = {}

    def make(family):
        if family not in made:
            torch.manual_seed(["sd1", "sd2"].index(family))
            pipe, folder = build(family, randomise), tmp_path_factory.mktemp(family)
            pipe.save_pretrained(folder / "folder")
            save_file(ldm_tensors(pipe, family), folder / "model.safetensors", {"format": "pt"})
            made[family] = pipe, folder / "folder", folder / "model.safetensors"
        return made[family]

    return make


def load(path, **settings):
    return p2pz.load(path, device="cpu", tokenizer=TOKENIZER, **settings)


@pytest.fixture(scope="module")
def halves(saved):
    return {name: tensor.half() for name, tensor in load_file(saved("sd1")[2]).items()}


@pytest.fixture
def tensors(halves):
    """All tensors of the narrow Stable Diffusion 1 file, in float16, to spoil."""
    return dict(halves)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_files_of_these_tests_are_what_diffusers_reads(family, saved):
    """Diffusers' converters turn the file back into the tensors that it was written from, bit for bit."""
    pipe, _, path = saved(family)
    tensors = load_file(path)
    unet = peer.convert_ldm_unet_checkpoint(dict(tensors), dict(pipe.unet.config))
    vae = peer.convert_ldm_vae_checkpoint(dict(tensors), dict(pipe.vae.config))
    if family == "sd2":
        text = peer.convert_open_clip_checkpoint(pipe.text_encoder, dict(tensors))
        assert not any(".23." in name for name in text) and "text_model.encoder.layers.22.mlp.fc2.bias" in text
    else:
        text = peer.convert_ldm_clip_checkpoint(dict(tensors))
        del text["text_model.embeddings.position_ids"]
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    for converted, module in ((unet, pipe.unet), (vae, pipe.vae), (text, pipe.text_encoder)):
        original = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}
        assert converted.keys() == original.keys()
        assert all(torch.equal(converted[name], tensor) for name, tensor in original.items())


# --- what comes out ---


def compare(model, pipe, assert_close, size=16, pixels=64):
    """All parts of our model against diffusers' pipeline, within a relative error of 1e-5."""
    latents, images = torch.randn(2, 4, size, size), torch.rand(1, 3, pixels, pixels) * 2 - 1
    timesteps = torch.tensor([1, 981])
    with torch.no_grad(), pytest.warns(UserWarning, match="only the first 75 tokens count"):
        states = model.encode_text(SENTENCES)
        expected_states = pipe.encode_prompt(SENTENCES, "cpu", 1, False)[0]
    with torch.no_grad():
        mean, log_variance = model.vae.encode(images)
        posterior = pipe.vae.encode(images).latent_dist
        pairs = {
            "text": (states, expected_states),
            "unet": (
                model.unet(latents, timesteps, expected_states[:2]),
                pipe.unet(latents, timesteps, expected_states[:2]).sample,
            ),
            "mean": (mean, posterior.mean),
            "log-variance": (log_variance, posterior.logvar),
            "decoded": (model.vae.decode(latents[:1]), pipe.vae.decode(latents[:1]).sample),
        }
    errors = {name: assert_close(*pair, 1.0) for name, pair in pairs.items()}
    print(", ".join(f"{name} {error:.2e}" for name, error in errors.items()))
    assert max(errors.values()) <= 1e-5


def as_diffusers_loads(path, folder):
    """Its pipeline in float32, channels-last as ours: convolutions of the two formats differ by up to 1e-5 on a CPU."""
    pipe = StableDiffusionPipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.float32)
    for module in (pipe.unet, pipe.vae):
        module.to(memory_format=torch.channels_last)
    return pipe


@pytest.mark.parametrize("contents", ["float32", "float16", "with averages", "mixed"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_equals_diffusers(family, contents, saved, tmp_path, assert_close):
    """Both load the same file, of one dtype or several, with or without averaged copies."""
    _, folder, path = saved(family)
    if contents != "float32":
        tensors = load_file(path)
        if contents == "with averages":
            tensors |= ema(tensors)
        else:
            mixed = [torch.float16, torch.bfloat16, torch.float32] if contents == "mixed" else [torch.float16]
            pairs = zip(tensors.items(), itertools.cycle(mixed), strict=False)
            tensors = {name: tensor.to(dtype) for (name, tensor), dtype in pairs}
        path = tmp_path / "model.safetensors"
        save_file(tensors, path)
    model = load(path, prediction_type="v_prediction" if family == "sd2" else None)
    assert model.folder == path and model.dtype == model.text_encoder.dtype == torch.float32 and not model.is_mini
    assert model.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    assert model.native_size == (768 if family == "sd2" else 512)
    compare(model, as_diffusers_loads(path, folder), assert_close)


def check_same(*models):
    assert models[0].text_fingerprint == models[1].text_fingerprint
    assert models[0].unet.config == models[1].unet.config
    assert models[0].vae.config.scaling_factor == models[1].vae.config.scaling_factor == 0.18215
    for part in ("unet", "vae", "text_encoder"):
        first, second = (getattr(model, part).state_dict() for model in models)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def fill_vocabulary(folder):
    """A tokenizer with as many words as CLIP's; returns its folder."""
    shutil.copytree(TOKENIZER, folder)
    words = json.loads((TOKENIZER / "vocab.json").read_text())
    words = [word for word in words if not word.startswith("<|")]
    words += [f"filler{i}" for i in range(49406 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_equals_diffusers_at_full_width(family, randomise, tmp_path, assert_close):
    """The published shapes, vocabulary included, in a float16 file, computed in float32: 17 GB of memory, 6 of disk."""
    tokenizer = fill_vocabulary(tmp_path / "tokenizer")
    pipe = build(family, randomise, tokenizer, FULL).to(torch.float16)
    folder, path = tmp_path / "folder", tmp_path / "model.safetensors"
    save_file(ldm_tensors(pipe, family), path)
    pipe.save_pretrained(folder)
    del pipe
    settings = {"device": "cpu", "tokenizer": tokenizer}
    if family == "sd2":
        settings["prediction_type"] = "v_prediction"
    check_same(p2pz.load(folder, device="cpu", dtype=torch.half), p2pz.load(path, dtype=torch.half, **settings))
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    model = p2pz.load(path, **settings)
    assert sum(weight.numel() for weight in model.unet.parameters()) == {"sd1": 859_520_964, "sd2": 865_910_724}[family]
    compare(model, as_diffusers_loads(path, folder), assert_close, 32, 128)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_folder_and_file_are_one_model(family, saved):
    _, folder, path = saved(family)
    models = p2pz.load(folder, device="cpu"), load(path, prediction_type=None if family == "sd1" else "v_prediction")
    check_same(*models)
    assert torch.equal(*(model.encode_text(SENTENCES[:2]) for model in models))


def test_every_row_of_the_tables_is_used(tensors):
    """By the names of a real file; a row that none has is wrong or superfluous."""
    unet = [name.removeprefix("model.diffusion_model.") for name in tensors if name.startswith("model.diff")]
    vae = [name.removeprefix("first_stage_model.") for name in tensors if name.startswith("first_stage_model.")]
    for names, tables in ((unet, (UNET_BLOCKS, UNET_LAYERS)), (vae, (VAE_BLOCKS, VAE_LAYERS))):
        for table in tables:
            assert [row for row in table if not any(re.fullmatch(row[0], name) for name in names)] == []
            names = list(rename(dict.fromkeys(names), table, "file"))


def test_float8_files_load(tensors, tmp_path):
    expected = tensors["model.diffusion_model.out.2.weight"].to(torch.float8_e4m3fn).float()
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    assert torch.equal(load(tmp_path / "x.safetensors").unet.conv_out.weight, expected)


def test_names_of_the_vaes_attention_as_diffusers_has_them(tensors, saved, tmp_path):
    """Linear layers, as some programs write them in an otherwise original file."""
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    pattern = r"(first_stage_model\.\w+\.mid\.attn_1)\.(q|k|v|proj_out)\.(weight|bias)"
    matches = [match for match in (re.fullmatch(pattern, name) for name in tensors) if match]
    assert len(matches) == 16
    for match in matches:
        tensor = tensors.pop(match[0])
        tensors[f"{match[1]}.{names[match[2]]}.{match[3]}"] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    save_file(tensors, tmp_path / "x.safetensors")
    expected = load(saved("sd1")[2]).vae.state_dict()
    weights = load(tmp_path / "x.safetensors").vae.state_dict()
    assert all(torch.equal(x, expected[name].half().float()) for name, x in weights.items())


def test_a_buffer_that_merges_add_to_open_clip(saved, tmp_path):
    buffer = {"cond_stage_model.model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    path = rewrite(saved("sd2")[2], tmp_path / "x.safetensors", lambda tensors: tensors.update(buffer))
    models = [load(each, prediction_type="epsilon") for each in (path, saved("sd2")[2])]
    assert models[0].text_fingerprint == models[1].text_fingerprint


def test_names_of_text_encoders_that_merges_lose(tensors, saved, tmp_path):
    """Without `text_model`, as programs that merge checkpoints once wrote them."""
    renamed = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "x.safetensors")
    assert load(tmp_path / "x.safetensors").text_fingerprint == load(saved("sd1")[2]).text_fingerprint


@pytest.mark.skipif(
    not STATUS.exists() or "RssAnon" not in STATUS.read_text(), reason="needs Linux's account of a process's memory"
)
def test_loading_makes_no_second_copy(tensors, tmp_path):
    """As for folders: reordered convolutions in the file's dtype, all weights in another; averages never."""
    for i in range(12):
        layer = f"cond_stage_model.transformer.text_model.encoder.layers.{i}.mlp"
        for name, shape in {"fc1.weight": (16_384, 128), "fc1.bias": (16_384,), "fc2.weight": (128, 16_384)}.items():
            tensors[f"{layer}.{name}"] = torch.zeros(shape, dtype=torch.half)
    averages = {f"model_ema.{i}": torch.zeros(25_000_000, dtype=torch.half) for i in range(1)}
    save_file(tensors | averages, tmp_path / "x.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    copied = {"float16": sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim == 4), "float32": 2 * total}
    command = [sys.executable, "-c", MEASURE_LOADING, str(tmp_path / "x.safetensors"), str(TOKENIZER)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for dtype, (grown, _) in json.loads(output).items():
        print(f"{dtype}: {grown / 1e6:.0f} MB for {copied[dtype] / 1e6:.0f} MB; used tensors {total / 1e6:.0f} MB")
        assert abs(grown - copied[dtype]) < 48e6
    (tmp_path / "x.safetensors").unlink()


# --- what a UNet predicts ---


def rewrite(source, path, change=lambda tensors: None, metadata=None):
    """A changed copy of a file."""
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, path, metadata)
    return path


def test_prediction_type_is_what_the_caller_or_the_file_says(saved, tmp_path):
    _, _, sd1 = saved("sd1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(sd1).prediction_type == "epsilon"
        assert load(sd1, prediction_type="v_prediction").prediction_type == "v_prediction"
        assert load(sd1, prediction_type="v_prediction").native_size == 512
        _, folder, sd2 = saved("sd2")
        for kind, size in (("v_prediction", 768), ("epsilon", 512)):
            told = load(sd2, prediction_type=kind)
            assert (told.prediction_type, told.native_size) == (kind, size)
        path = rewrite(sd1, tmp_path / "mark.safetensors", lambda tensors: tensors.update(v_pred=torch.zeros(0)))
        assert load(path).prediction_type == "v_prediction"
        assert p2pz.load(folder, device="cpu", prediction_type="epsilon").prediction_type == "epsilon"
    with pytest.raises(ValueError, match="prediction_type must be epsilon or v_prediction, not 'v'"):
        load(sd1, prediction_type="v")


METADATA = [  # what programs write, and what it says
    ({"modelspec.prediction_type": "v"}, "v_prediction"),
    ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ({"modelspec.predict_key": "v"}, "v_prediction"),
    ({"modelspec.predict_key": "epsilon"}, "epsilon"),
    ({"ss_v_parameterization": "True"}, "v_prediction"),
    ({"ss_v_parameterization": "False"}, "epsilon"),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
    ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
    ({"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-v2-768-v"}, "epsilon"),
    ({"modelspec.prediction_type": "none", "modelspec.predict_key": "v"}, "v_prediction"),
    ({"modelspec.prediction_type": "none", "format": "pt"}, None),
]


@pytest.mark.parametrize(("metadata", "kind"), METADATA, ids=[str(row[0]) for row in METADATA])
def test_prediction_type_in_the_metadata(metadata, kind, saved, tmp_path):
    path = rewrite(saved("sd2")[2], tmp_path / "x.safetensors", metadata=metadata)
    assert open_checkpoint(path).prediction_type == kind
    path.unlink()


class Answers:
    """A UNet whose predictions go through a function of them and the latents."""

    def __init__(self, unet, change):
        self.unet, self.change = unet, change

    def __getattr__(self, name):
        return getattr(self.unet, name)

    def predict(self, latents, *args):
        return self.change(self.unet.predict(latents, *args), latents)


def to_v(epsilon, latents):
    """v of the same prediction."""
    alpha = schedule.alphas_cumprod()[-1].float()
    return (epsilon - (1 - alpha).sqrt() * latents) / alpha.sqrt()


def test_the_probe_tells_a_trained_model_from_its_v_form():
    """The bundled model predicts epsilon; written as v, its predictions are those of a v model."""
    model = p2pz.load(MINI_FOLDER, device="cpu")
    with pytest.warns(UserWarning, match='does not say what .* finds epsilon. Tell it with prediction_type="epsilon"'):
        assert model_module._probe_prediction_type(model) == "epsilon"
    with pytest.warns(UserWarning, match="finds v_prediction"):
        assert model_module._probe_prediction_type(replace(model, unet=Answers(model.unet, to_v))) == "v_prediction"
    broken = replace(model, unet=Answers(model.unet, lambda prediction, latents: prediction * float("nan")))
    with pytest.raises(CheckpointError, match="answers with nan, so the file is damaged"):
        model_module._probe_prediction_type(broken)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_files_of_stable_diffusion_2_are_probed(kind, saved, monkeypatch):
    answers = {"epsilon": lambda *args: args[1], "v_prediction": lambda *args: torch.zeros_like(args[1])}
    monkeypatch.setattr(model_module.Model, "predict", answers[kind])
    with pytest.warns(UserWarning, match=f"model.safetensors does not say .* finds {kind}"):
        model = load(saved("sd2")[2])
    assert (model.prediction_type, model.native_size) == (kind, 512 if kind == "epsilon" else 768)


def test_the_probe_runs_with_the_loaded_model(saved):
    with pytest.warns(UserWarning, match="does not say what its UNet predicts"):
        assert load(saved("sd2")[2]).prediction_type in ("epsilon", "v_prediction")


# --- what else people have ---


FOREIGN = {
    "lacks the VAE (first_stage_model.*): give the whole": [
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.ln_final.bias", "model.diffusion_model.label_emb.0.0.bias"],
    "the refiner of Stable Diffusion XL": ["conditioner.embedders.0.model.ln_final.bias", "first_stage_model.x"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.context_block.attn.proj.bias", "first_stage_model.x"],
    "Flux": ["double_blocks.0.img_attn.norm.key_norm.scale", "img_in.bias"],
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "a LoRA (": ["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"],
    "a LoRA (it": ["unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight", "x.lora.down.weight"],
    "a LoRA (it holds": ["lycoris_unet_x.lokr_w1"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight", "model.diffusion_model.out.0.bias"],
    "a ControlNet (": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.norm1.bias"],
    "a ControlNet (it": ["input_hint_block.0.weight", "input_blocks.0.0.weight"],
    "an IP-Adapter": ["image_proj.norm.bias", "ip_adapter.1.to_k_ip.weight"],
    "a motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"],
    "a textual inversion": ["emb_params"],
    "a textual inversion (": ["<cat-toy>"],
    "a textual inversion (it": ["clip_g", "clip_l"],
    "Stable Diffusion unCLIP": ["embedder.model.visual.proj", "noise_augmentor.data_mean", "first_stage_model.x"],
    "EDM's noise schedule, such as Playground 2.5": ["edm_mean", "edm_std", "model.diffusion_model.out.0.bias"],
    "or CosXL (it holds edm_vpred": ["edm_vpred.sigma_max", "edm_vpred.sigma_min", "first_stage_model.x"],
    "Stable Video Diffusion (": ["model.diffusion_model.input_blocks.1.0.time_mixer.mix_factor", "first_stage_model.x"],
    "Stable Cascade (it holds model": ["model.diffusion_model.clip_txt_mapper.weight", "first_stage_model.x"],
    "Stable Cascade (": ["clip_mapper.weight", "down_blocks.0.0.depthwise.weight"],
    "a latent consistency model": ["time_embedding.cond_proj.weight", "down_blocks.0.resnets.0.norm1.bias"],
    "a latent consistency model (": ["model.diffusion_model.time_embedding.cond_proj.weight", "first_stage_model.x"],
    "Flux or a transformer like it": ["single_transformer_blocks.0.norm.linear.bias", "x_embedder.bias"],
    "zero terminal SNR": ["ztsnr", "v_pred", "model.diffusion_model.out.0.bias"],
    "a UNet alone": ["conv_in.weight", "time_embedding.linear_1.bias", "down_blocks.0.resnets.0.norm1.bias"],
    "a UNet alone (": ["input_blocks.0.0.weight", "out.0.bias"],
    "a VAE alone": ["encoder.conv_in.weight", "decoder.mid.attn_1.k.bias"],
    "a VAE alone (": ["decoder.mid_block.attentions.0.to_q.bias", "quant_conv.bias"],
    "a direction (": ["states"],
    "an inversion (": ["latents", "image_latents", "path", "picture"],
    "a text encoder alone": ["text_model.final_layer_norm.bias"],
    "lacks the UNet (model.diffusion_model.*) and the text encoder": ["first_stage_model.quant_conv.bias"],
    "lacks the VAE (first_stage_model.*) and the text": ["model.diffusion_model.out.0.bias"],
    "lacks the text encoder (cond_stage_model.*): give the whole": ["model.diffusion_model.x", "first_stage_model.x"],
    "looks like nothing that p2pz knows (it holds a.b, c": ["c", "a.b"],
}  # fmt: skip


@pytest.mark.parametrize("message", FOREIGN)
def test_other_files_are_refused_by_name(message, tmp_path):
    path = tmp_path / "stable-diffusion-1.5.safetensors"  # whose name does not matter
    save_file({name: torch.zeros(1) for name in FOREIGN[message]}, path)
    with pytest.raises(CheckpointError) as error:
        p2pz.load(path, device="cpu")
    assert message in str(error.value) and str(path) in str(error.value)
    assert re.search(r": (give|merge|p2pz works with plain)", str(error.value))


def test_facts_of_a_file_whose_tokenizer_is_not_at_hand(tensors, tmp_path, monkeypatch, capsys):
    def find():
        raise NoTokenizerError("a single file has no tokenizer: give a folder")

    monkeypatch.setattr("p2pz.model.find_tokenizer", find)
    save_file(tensors, tmp_path / "sd.safetensors")
    assert cli.main(["info", str(tmp_path / "sd.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "M parameters" in out and "tokenizer" in out and "not at hand: a single file has no tokenizer" in out
    assert (
        cli.main(["sample", "a cat", "--model", str(tmp_path / "sd.safetensors"), "-o", str(tmp_path / "a.png")]) == 2
    )
    assert "a single file has no tokenizer" in capsys.readouterr().err


UNET = "model.diffusion_model"
CONV_IN, CONV_1 = f"{UNET}.input_blocks.0.0.weight", f"{UNET}.input_blocks.1.0.out_layers.3.weight"
CONTEXT = f"{UNET}.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
VAE_IN = "first_stage_model.encoder.conv_in.weight"
TEXT_BIAS = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
WRONG = {
    "inpainting": (lambda t: t.update({CONV_IN: torch.zeros(64, 9, 3, 3)}), "an inpainting model.* reads 9 channels"),
    "pix2pix": (lambda t: t.update({CONV_IN: torch.zeros(64, 8, 3, 3)}), "an InstructPix2Pix model"),
    "depth": (lambda t: t.update({CONV_IN: torch.zeros(64, 5, 3, 3)}), "a depth-to-image model"),
    "upscaler": (lambda t: t.update({CONV_IN: torch.zeros(64, 7, 3, 3)}), "an upscaler"),
    "wide context": (lambda t: t.update({CONTEXT: torch.zeros(128, 2048)}), "looks like Stable Diffusion XL"),
    "missing": (lambda t: t.pop(TEXT_BIAS), r"does not fit the layout of Stable Diffusion 1.x: 1 tensors missing "
                r"\(final_layer_norm.bias\)"),
    "many missing": (lambda t: [t.pop(x) for x in list(t) if ".middle_block.2." in x], "10 tensors missing .* 5 more"),
    "unexpected": (lambda t: t.update({"model.diffusion_model.label_emb.0.0.bias": torch.zeros(1)}),
                   r"1 tensors unexpected \(label_emb.0.0.bias\)"),
    "shape": (lambda t: t.update({TEXT_BIAS: torch.zeros(127)}), r"final_layer_norm.bias \(127,\) instead of \(128,\)"),
    "integers": (lambda t: t.update({TEXT_BIAS: torch.zeros(128, dtype=torch.int64)}),
                 r"1 tensors not of floating point \(final_layer_norm.bias int64\)"),
    "boolean": (lambda t: t.update({TEXT_BIAS: torch.zeros(128, dtype=torch.bool)}), "final_layer_norm.bias bool"),
    "flat convolution": (lambda t: t.update({VAE_IN: torch.zeros(32, 27)}), r"conv_in.weight \(32, 27\) instead of"),
    "scalar": (lambda t: t.update({CONV_IN: torch.tensor(1.0)}), r"conv_in.weight \(\) instead of"),
    "odd width": (lambda t: t.update({CONV_1: torch.zeros(65, 1)}), "describes no Stable Diffusion"),
    "twice": (lambda t: t.update({TEXT_BIAS.replace("text_model.", ""): torch.zeros(1)}),
              "holds final_layer_norm.bias twice"),
    "enormous width": (lambda t: t.update({CONV_1: torch.zeros(2**27, 0)}), "tensors of another shape"),
    "overflowing width": (lambda t: t.update({CONV_1: torch.zeros(2**61, 0)}), "describes no Stable Diffusion"),
    "another text encoder": (lambda t: t.update({CONTEXT: torch.zeros(128, 96)}), "instead of"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_by_name(name, tensors, tmp_path):
    change, message = WRONG[name]
    change(tensors)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_other_tensors_in_a_whole_checkpoint_are_left_out_with_a_warning(saved, tensors, tmp_path):
    save_file(tensors | {"notes.a": torch.zeros(1), "notes.b": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.warns(
        UserWarning, match=r"x.safetensors holds 2 tensors that are no part .* left out: notes.a, notes.b"
    ):
        load(tmp_path / "x.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(saved("sd1")[2])


# --- pickles ---


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".safetensors"])
def test_pickles_are_refused_by_content_and_by_name(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    for content in ({"state_dict": {"a": torch.zeros(1)}}, None):
        if content is None:
            path.write_bytes(b"\x80\x04K\x01.")  # an old pickle of a number
        else:
            torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"is a pickle, which could run any code when opened.*: python -c '"):
            p2pz.load(path)


def convert(source):
    """Run the command in the refusal of a pickle."""
    with pytest.raises(CheckpointError) as error:
        load(source)
    command = re.search(r"convert it (?:once|to safetensors first): (python -c '.*)", str(error.value))[1]
    assert command.isprintable() and "weights_only=True" in command
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)


def test_the_command_that_converts_a_pickle_works(saved, tensors, tmp_path):
    path = tmp_path / "it's a [model].ckpt"
    shared = tensors | {"a copy": tensors[CONV_IN]}
    torch.save({"state_dict": shared, "global_step": 470000, "epoch": 6}, path)
    convert(path)
    with pytest.warns(UserWarning, match="left out: a copy"):
        model = load(path.with_suffix(".safetensors"))
    expected = load(saved("sd1")[2]).unet.state_dict()
    assert all(torch.equal(x, expected[name].half().float()) for name, x in model.unet.state_dict().items())


def test_the_command_converts_what_lightning_saved(tensors, tmp_path, monkeypatch):
    """The first Stable Diffusion files mention a class of the program that trained them."""
    package, name = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"
    mentioned = type(name, (), {"__module__": package})
    for module in ("pytorch_lightning", "pytorch_lightning.callbacks", package):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setattr(sys.modules[package], name, mentioned, raising=False)
    path = tmp_path / "sd-v1-4.ckpt"
    torch.save({"state_dict": tensors, "callbacks": {mentioned: {"monitor": "val/loss"}}}, path)
    convert(path)
    assert load_file(path.with_suffix(".safetensors")).keys() == tensors.keys()


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_the_command_converts_the_parts_of_a_folder(variant, saved, tmp_path):
    """Under the names that p2pz looks for; a UNet in shards becomes one file."""
    folder = shutil.copytree(saved("sd1")[1], tmp_path / "model")
    unet, text = folder / "unet/diffusion_pytorch_model.safetensors", folder / "text_encoder/model.safetensors"
    tensors = list(load_file(unet).items())
    for i, part in enumerate((tensors[:100], tensors[100:]), 1):
        torch.save(dict(part), unet.with_name(f"diffusion_pytorch_model{variant}-0000{i}-of-00002.bin"))
    torch.save(load_file(text), text.with_name(f"pytorch_model{variant}.bin"))
    for path in (unet, text):
        path.unlink()
        convert(folder)
        assert path.with_suffix(f"{variant}.safetensors").is_file()
    check_same(p2pz.load(folder, device="cpu"), p2pz.load(saved("sd1")[1], device="cpu"))
    shutil.rmtree(folder)


# --- hostile files ---


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


UNIT = "model.diffusion_model.out.2.bias"
HOSTILE = {
    "empty": b"",
    "short": b"\1\0\0",
    "endless header": struct.pack("<Q", 2**63) + b"{}",
    "header beyond the file": struct.pack("<Q", 99_000_000) + b"{}",
    "no JSON": struct.pack("<Q", 8) + b"[[[[[[[[",
    "nested": struct.pack("<Q", 10**5 + 5) + b'{"a":' + b"[" * 10**5,
    "truncated body": ({UNIT: entry()}, b"\0" * 4),
    "overlap": ({UNIT: entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
    "reversed": ({UNIT: entry(offsets=(8, 0))}, b"\0" * 8),
    "offsets beyond": ({UNIT: entry(offsets=(0, 2**60), shape=(2**58,))}, b"\0" * 8),
    "unknown dtype": ({UNIT: entry("F12")}, b"\0" * 8),
    "unsupported dtype": ({UNIT: entry("F6_E2M3", (8,), (0, 6))}, b"\0" * 6),
    "NaN shape": ({UNIT: entry(shape=(float("nan"),))}, b"\0" * 8),
    "negative shape": ({UNIT: entry(shape=(-2,))}, b"\0" * 8),
    "fractional shape": ({UNIT: entry(shape=(2.5,))}, b"\0" * 8),
    "overflowing shape": ({UNIT: entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}, b""),
    "enormous shape": ({UNIT: entry(shape=(2**62, 0), offsets=(0, 0))}, b""),
    "too many axes": ({UNIT: entry(shape=(1,) * 5000, offsets=(0, 4))}, b"\0" * 4),
    "same key twice": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                      b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}' + b"\0" * 16,
    "metadata of numbers": ({UNIT: entry(), "__metadata__": {"format": 5}}, b"\0" * 8),
    "control characters": ({"a\n\x1b[31mb": entry()}, b"\0" * 8),
    "endless name": ({"a" * 10**6: entry()}, b"\0" * 8),
    "no name": ({"": entry()}, b"\0" * 8),
    "no tensors": ({}, b""),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_clear_line(name, tmp_path):
    content = HOSTILE[name]
    if isinstance(content, tuple):
        header = json.dumps(content[0]).encode()
        content = struct.pack("<Q", len(header)) + header + content[1]
    elif content.startswith(b"{"):
        header = content[: content.rindex(b"}") + 1]
        content = struct.pack("<Q", len(header)) + content
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 600 and str(path) in str(error.value)


def test_damaged_files_give_one_clear_line(saved, tmp_path):
    """A file with all the right names, damaged at random: a CheckpointError, or nothing but another value."""
    header, body, names = {}, b"", load_file(saved("sd1")[2])
    for i, (name, tensor) in enumerate(names.items()):
        shape = [min(size, 2) for size in tensor.shape]
        size = 2 * int(torch.tensor(shape).prod()) if shape else 2
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [len(body), len(body) + size]}
        body += bytes(size)
    header = json.dumps(header).encode()
    whole = struct.pack("<Q", len(header)) + header + body
    path, generator, refused = tmp_path / "model.safetensors", random.Random(0), 0
    for i in range(300):
        content = bytearray(whole)
        if i % 3 == 0:
            del content[generator.randrange(len(content)) :]
        else:
            for _ in range(generator.choice((1, 3, 30))):
                place = generator.randrange(8 + len(header)) if i % 3 == 1 else generator.randrange(8)
                content[place] = generator.randrange(256)
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a tensor that is left out
                open_checkpoint(path)
        except CheckpointError as error:
            assert str(error).isprintable() and len(str(error)) < 600
            refused += 1
        if i % 15 == 1:
            with pytest.raises(CheckpointError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(path)
    assert refused > 200


# --- the tokenizer ---


def test_tokenizer_of_a_single_file(saved, tmp_path):
    """Only vocab.json and merges.txt are needed; Stable Diffusion 2 pads with another token."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TOKENIZER / name, tmp_path)
    for family, pad in (("sd1", "<|endoftext|>"), ("sd2", "!")):
        pipe, _, path = saved(family)
        model = p2pz.load(path, device="cpu", tokenizer=str(tmp_path), prediction_type="epsilon")
        ids = [
            tokenizer("a cat", padding="max_length", max_length=77).input_ids
            for tokenizer in (model.tokenizer, pipe.tokenizer)
        ]
        assert model.tokenizer.pad_token == pad and ids[0] == ids[1]
    with pytest.raises(CheckpointError, match=r"nowhere is missing or lacks vocab.json"):
        p2pz.load(path, device="cpu", tokenizer=tmp_path / "nowhere")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for word, i in vocabulary.items() if i != 600}))
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* has 631 words, but the text encoder 632"):
        p2pz.load(path, device="cpu", tokenizer=tmp_path)


def test_tokenizer_for_a_folder(saved, tmp_path):
    _, folder, _ = saved("sd2")
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer"))
    with pytest.raises(CheckpointError, match="tokenizer is missing"):
        p2pz.load(tmp_path / "model", device="cpu")
    model = p2pz.load(tmp_path / "model", device="cpu", tokenizer=folder / "tokenizer")
    assert torch.equal(model.encode_text(SENTENCES[:2]), p2pz.load(folder, device="cpu").encode_text(SENTENCES[:2]))
