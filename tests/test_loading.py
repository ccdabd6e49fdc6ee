"""Checkpoint folders: strict reading, Stable Diffusion 1 and 2 as diffusers saves them, and the bundled model."""

import json
import logging
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import p2pz
from p2pz.sampling import sample_latents
from p2pz.unet import UNet, UNetConfig
from p2pz.weights import MINI_FOLDER, CheckpointError, fill, find_tensors, read_json, read_tensors, reason
from p2pz.weights.folder import VAE_RENAMES, rename

SENTENCES = ["a photo of a cat on the beach", "", "A sketch, of a dog!", "a cat " * 60]
load = partial(p2pz.load, device="cpu")  # beside diffusers on the CPU, also where there is a GPU
UNET_FILE, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_default_model(monkeypatch):
    monkeypatch.delenv("P2PZ_MODEL", raising=False)


def tiny_pipeline(family, randomise):
    """A tiny random model with what sets the two families apart: heads, projections, pad token, activation, target."""
    sd2 = family == "sd2"
    tokenizer = CLIPTokenizer.from_pretrained(MINI_FOLDER / "tokenizer", **({"pad_token": "!"} if sd2 else {}))
    unet = UNet2DConditionModel(
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        attention_head_dim=[1, 2, 4, 4] if sd2 else 4,
        use_linear_projection=sd2,
        cross_attention_dim=24,
        sample_size=16,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        norm_num_groups=8,
        sample_size=128,
    )
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act="gelu" if sd2 else "quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type="v_prediction" if sd2 else "epsilon",
    )
    pipe = StableDiffusionPipeline(
        randomise(vae), randomise(encoder), tokenizer, randomise(unet), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(randomise, tmp_path_factory):
    """`saved(family)`: diffusers' pipeline and the folder that it wrote."""
    made = {}

    def build(family):
        if family not in made:
            torch.manual_seed(["sd1", "sd2"].index(family))
            pipe, folder = tiny_pipeline(family, randomise), tmp_path_factory.mktemp(family)
            pipe.save_pretrained(folder)
            made[family] = pipe, folder
        return made[family]

    return build


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the tiny Stable Diffusion 1 folder, to spoil."""
    return Path(shutil.copytree(saved("sd1")[1], tmp_path / "model"))


def change_json(path, **changes):
    """Set keys of a JSON file; a value of ... removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# --- folder.py ---


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(2, 2, bias=False)


@pytest.fixture
def part_file(tmp_path):
    path = tmp_path / "part.safetensors"
    save_file({name: torch.randn_like(value) for name, value in Part().state_dict().items()}, path)
    return path


def load_tensors(module, path):
    fill(module, read_tensors(path), path)


def test_tensors_fill_a_module_without_storage(part_file):
    change_tensors(part_file, lambda tensors: tensors.update({"b.weight": tensors["b.weight"].half()}))
    with torch.device("meta"):
        part = Part()
    load_tensors(part, part_file)
    for name, value in load_file(part_file).items():
        assert torch.equal(part.state_dict()[name], value) and part.state_dict()[name].dtype == value.dtype


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda t: t.pop("a.bias"), ["1 tensors missing (a.bias)"]),
        (lambda t: t.update(c=torch.zeros(1)), ["1 tensors unexpected (c)"]),
        (lambda t: t.update({"a.weight": torch.zeros(2, 4)}), ["of another shape (a.weight (2, 4) instead of (2, 3))"]),
        (lambda t: t.update({"a.weight": torch.zeros(6)}), ["of another shape (a.weight (6,) instead of (2, 3))"]),
        (lambda t: (t.pop("a.bias"), t.update(c=torch.zeros(1))), ["missing (a.bias)", "unexpected (c)"]),
        (lambda t: t.update({f"c{i}": torch.zeros(1) for i in range(8)}), ["8 tensors", "c4 and 3 more"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, messages, part_file):
    change_tensors(part_file, change)
    part = Part()
    before = part.a.weight.clone()
    with pytest.raises(CheckpointError) as error:
        load_tensors(part, part_file)
    assert all(message in str(error.value) for message in [*messages, str(part_file)])
    assert torch.equal(part.a.weight, before)


@pytest.mark.parametrize("size", [0, 4, 40, -1])
def test_truncated_tensors_are_refused(size, part_file):
    part_file.write_bytes(part_file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"part.safetensors cannot be read"):
        load_tensors(Part(), part_file)


def test_missing_tensor_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no.safetensors cannot be read"):
        load_tensors(Part(), tmp_path / "no.safetensors")


@pytest.mark.parametrize("content", [b"", b'{"a":', b"[1]", b"\xff\xfe", b"null", None])
def test_garbage_json_is_refused(content, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json (cannot be read as JSON|is missing)"):
        read_json(path)


def test_find_tensors_prefers_the_full_file(tmp_path):
    for name in ("model.fp16", "model", "diffusion_pytorch_model.fp16", "diffusion_pytorch_model"):
        (tmp_path / f"{name}.safetensors").touch()
        assert find_tensors(tmp_path).name == f"{name}.safetensors"


def test_pickles_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no diffusion_pytorch_model"):
        find_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="has no diffusion_pytorch_model"):
        find_tensors(tmp_path / "missing")
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"only diffusion_pytorch_model.bin, a pickle"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("variant", ["bf16", "non_ema"])
def test_variants_that_p2pz_does_not_choose_are_named(variant, tmp_path):
    (tmp_path / f"diffusion_pytorch_model.{variant}.safetensors").touch()
    (tmp_path / f"diffusion_pytorch_model.{variant}.bin").touch()
    with pytest.raises(CheckpointError, match=rf"but diffusion_pytorch_model.{variant}.safetensors: take the var"):
        find_tensors(tmp_path)


def test_rename():
    rows = ((r"old\.(.*)", r"new.\1"), (r"old\.a", "other"), ("junk", None))
    assert rename({"old.a": 1, "keep": 2, "junk": 3}, rows, "file") == {"new.a": 1, "keep": 2}
    for names in (["old.a", "new.a"], ["new.a", "old.a"]):
        with pytest.raises(CheckpointError, match=r"file holds new.a twice"):
            rename(dict.fromkeys(names), rows, "file")


# --- whole folders ---


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_text_states_equal_diffusers(family, saved, assert_close):
    pipe, folder = saved(family)
    model = load(folder)
    expected = pipe.encode_prompt(SENTENCES[:3], "cpu", 1, False)[0]
    assert_close(model.encode_text(SENTENCES[:3]), expected)
    with pytest.warns(UserWarning, match="only the first 75 tokens count"):
        long = model.encode_text(SENTENCES[3:])
    assert_close(long, pipe.encode_prompt(SENTENCES[3:], "cpu", 1, False)[0])


@pytest.mark.parametrize("family", ["sd1", "sd2", "bundled"])
def test_sample_equals_diffusers(family, saved, assert_close):
    """The whole way from text to pixels, from one noise: latents within 1e-3, pixels within 2 of 255."""
    if family == "bundled":
        pipe, folder = StableDiffusionPipeline.from_pretrained(MINI_FOLDER, local_files_only=True), MINI_FOLDER
        pipe.set_progress_bar_config(disable=True)
        steps, guidance, prompt = 10, 2.0, "a photo of a gray cat in a meadow"
    else:
        pipe, folder = saved(family)
        steps, guidance, prompt = 4, 3.0, "a cat"
    model = load(folder)
    assert model.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")

    size = 128 // model.vae.config.downsampling
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(5))
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "latents": noise}
    expected = pipe(prompt, output_type="latent", **settings).images
    states = model.encode_text([""]), model.encode_text([prompt])
    latents = sample_latents(model, noise, *states, steps, guidance, progress=False)
    assert_close(latents, expected, 1e-3)

    picture = np.asarray(p2pz.sample(prompt, model=model, steps=steps, guidance=guidance, seed=5)[0]).astype(int)
    theirs = np.asarray(pipe(prompt, **settings).images[0]).astype(int)
    assert picture.shape == theirs.shape == (128, 128, 3) and theirs.std() > 10
    assert np.abs(picture - theirs).max() <= 2


def test_old_attention_names_of_the_vae(folder, assert_close):
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    expected = load(folder).encode_image(images)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def write_old_names(tensors):
        for name in [name for name in tensors if ".attentions.0.to_" in name]:
            kind = next(kind for kind in old_names if f".{kind}." in name)
            tensors[name.replace(kind, old_names[kind])] = tensors.pop(name)
        assert sum("proj_attn" in name for name in tensors) == 4

    change_tensors(folder / VAE_FILE, write_old_names)
    assert_close(load(folder).encode_image(images), expected, 0)

    change_tensors(folder / VAE_FILE, lambda t: t.update({"encoder.mid_block.attentions.0.to_q.bias": torch.zeros(16)}))
    with pytest.raises(CheckpointError, match=r"holds encoder.mid_block.attentions.0.to_q.bias twice"):
        load(folder)


def test_old_names_are_renamed_in_attention_only():
    names = ["encoder.mid_block.attentions.0.query.weight", "decoder.mid_block.attentions.0.proj_attn.bias", "query.x"]
    renamed = rename(dict.fromkeys(names), VAE_RENAMES, "file")
    assert list(renamed) == [
        "encoder.mid_block.attentions.0.to_q.weight",
        "decoder.mid_block.attentions.0.to_out.0.bias",
        "query.x",
    ]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_float16_files(variant, folder, assert_close):
    """A float16 folder, under either file name, gives the same model and the same text fingerprint."""
    full = load(folder)
    for path in folder.glob("*/*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        path.unlink()
        save_file(tensors, path.with_suffix(f".{variant}.safetensors") if variant else path, {"format": "pt"})
    half = load(folder)
    assert half.text_fingerprint == full.text_fingerprint
    assert half.dtype == half.text_encoder.dtype == torch.float32  # on the CPU, whatever the file has
    assert_close(half.encode_text(SENTENCES[:2]), full.encode_text(SENTENCES[:2]), 5e-3)
    assert_close(half.unet.conv_in.weight, full.unet.conv_in.weight, 1e-3)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_files(variant, saved, folder):
    """As diffusers and transformers write large models: an index and files of a part of the tensors each."""
    pipe, expected = saved("sd1")[0], load(folder)
    for part, size in (("unet", "100KB"), ("vae", "50KB"), ("text_encoder", "20KB")):
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        getattr(pipe, part).save_pretrained(folder / part, max_shard_size=size, variant=variant)
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
        assert find_tensors(folder / part).name.endswith(f".safetensors.index.{'fp16.' if variant else ''}json")
    model = load(folder)
    assert model.text_fingerprint == expected.text_fingerprint
    for part in ("unet", "vae", "text_encoder"):
        wanted = getattr(expected, part).state_dict()
        assert all(torch.equal(x, wanted[name]) for name, x in getattr(model, part).state_dict().items())


INDEX = "diffusion_pytorch_model.safetensors.index.json"
WRONG_INDICES = {
    "no map": ({}, "has no weight_map"),
    "a list": ({"weight_map": ["a.safetensors"]}, "has no weight_map"),
    "a number": ({"weight_map": {"conv_in.bias": 3}}, "has no weight_map"),
    "outside": ({"weight_map": {"conv_in.bias": "../vae/diffusion_pytorch_model.safetensors"}}, "outside its folder"),
    "missing": ({"weight_map": {"conv_in.bias": "b.safetensors"}}, "unet/b.safetensors cannot be read"),
    "twice": ({"weight_map": {"a": "a.safetensors", "b": "copy.safetensors"}}, "copy.safetensors holds conv_in.bias, "),
    "incomplete": ({"weight_map": {"a": "half.safetensors"}}, "index.json does not fit .*config.json: .* missing"),
}


@pytest.mark.parametrize("name", WRONG_INDICES)
def test_wrong_indices_are_refused_by_name(name, folder):
    content, message = WRONG_INDICES[name]
    (folder / UNET_FILE).rename(folder / "unet/a.safetensors")
    shutil.copy(folder / "unet/a.safetensors", folder / "unet/copy.safetensors")
    tensors = load_file(folder / "unet/a.safetensors")
    save_file(dict(list(tensors.items())[:9]), folder / "unet/half.safetensors")
    (folder / "unet" / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_text_encoder_is_read_in_the_dtype_of_its_file(folder):
    """Whatever its config.json says; float16 there must not cost a float32 file its precision."""
    expected = load(folder)
    change_json(folder / "text_encoder/config.json", dtype="float16")
    model = load(folder)
    assert torch.equal(model.encode_text(SENTENCES[:2]), expected.encode_text(SENTENCES[:2]))
    fingerprints = {loaded.text_fingerprint for loaded in (expected, model, load(folder, dtype=torch.bfloat16))}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(("part", "name"), [
    ("text_encoder/model", "q_proj.weight"), ("text_encoder/model", "fc2.weight"),
    ("unet/diffusion_pytorch_model", "to_k.weight"), ("unet/diffusion_pytorch_model", "ff.net.2.weight"),
    ("vae/diffusion_pytorch_model", "conv_out.weight"),
])  # fmt: skip
def test_a_merged_lora_or_another_vae_make_another_model(part, name, folder):
    """Directions are of a text encoder, inversions of the whole model."""
    before = load(folder)
    path = folder / f"{part}.safetensors"
    tensors = load_file(path)
    change = {key: x + 0.01 * torch.randn_like(x) for key, x in tensors.items() if key.endswith(name)}
    assert change
    save_file(tensors | change, path, {"format": "pt"})
    after = load(folder)
    assert after.fingerprint != before.fingerprint
    assert (after.text_fingerprint != before.text_fingerprint) == part.startswith("text_encoder")
    assert load(folder, prediction_type="v_prediction").fingerprint not in (before.fingerprint, after.fingerprint)


def test_fingerprint_tells_text_encoders_apart(saved):
    assert len({load(saved(family)[1]).text_fingerprint for family in ("sd1", "sd2")} | {load().text_fingerprint}) == 3


def test_dtype_and_frozen_parameters(folder):
    model = load(folder, dtype=torch.bfloat16)
    for module in (model.unet, model.vae, model.text_encoder):
        assert not module.training
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in module.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gpu_and_cpu_get_the_same_weights(dtype, folder):
    here, there = (p2pz.load(folder, device=device, dtype=dtype) for device in ("cpu", "cuda"))
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(here, part).state_dict()
        for name, weight in getattr(there, part).state_dict().items():
            assert weight.is_cuda and weight.stride() == expected[name].stride(), name
            assert torch.equal(weight.cpu(), expected[name]), name


STATUS = Path("/proc/self/status")
MEASURE_LOADING = """
import json, sys, threading
import torch
import p2pz


def resident():  # bytes of memory that no file backs, and that files back
    with open("/proc/self/status") as status:
        found = dict(line.split(":") for line in status)
    return [1024 * int(found[kind].split()[0]) for kind in ("RssAnon", "RssFile")]


def watch(done, samples):
    while not done.wait(0.001):
        samples.append(resident())


tokenizer = sys.argv[2] if len(sys.argv) > 2 else None
models, grown = [p2pz.load()], {}  # what imports and first calls allocate is not counted
for dtype in ("float16", "float32"):
    done, samples, before = threading.Event(), [], resident()
    watcher = threading.Thread(target=watch, args=(done, samples))
    watcher.start()
    models.append(p2pz.load(sys.argv[1], device="cpu", dtype=getattr(torch, dtype), tokenizer=tokenizer))
    done.set()
    watcher.join()
    samples.append(resident())
    grown[dtype] = [max(column) - start for column, start in zip(zip(*samples), before)]
print(json.dumps(grown))
"""


@pytest.fixture
def large_folder(folder):
    """The tiny folder in float16, with a wide UNet and a wide text encoder: 300 MB, gone after the test."""
    config = UNetConfig(block_out_channels=(704,), layers_per_block=1, cross_attention=(True,), heads=(8,))
    (folder / "unet/config.json").write_text(json.dumps(config.to_json()))
    text_config = CLIPTextConfig(hidden_size=768, num_hidden_layers=1, num_attention_heads=8)
    text_config.dtype = "float32"  # so says the config.json beside many a float16 file
    text_config.save_pretrained(folder / "text_encoder")
    with torch.device("meta"):
        modules = {UNET_FILE: UNet(config), TEXT: CLIPTextModel(text_config)}
    for name, module in modules.items():
        save_file({k: torch.zeros(v.shape, dtype=torch.half) for k, v in module.state_dict().items()}, folder / name)
    change_tensors(folder / VAE_FILE, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(
    not STATUS.exists() or "RssAnon" not in STATUS.read_text(), reason="needs Linux's account of a process's memory"
)
def test_loading_makes_no_second_copy(large_folder):
    """Memory that no file backs grows by the reordered convolutions in the files' dtype, by all weights in another.

    In float32, which leaves nothing in the files, a file's pages are let go of before the next one is read.
    """
    files = [list(load_file(path).values()) for path in large_folder.glob("*/*.safetensors")]
    sizes = sorted(sum(weight.nbytes for weight in weights) for weights in files)
    convolutions = sum(weight.nbytes for weights in files for weight in weights if weight.ndim == 4)
    copied = {"float16": convolutions, "float32": 2 * sum(sizes)}
    command = [sys.executable, "-c", MEASURE_LOADING, str(large_folder)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    results = json.loads(output)
    for dtype, (grown, mapped) in results.items():
        print(f"{dtype}: {grown / 1e6:.0f} MB for {copied[dtype] / 1e6:.0f} MB, {mapped / 1e6:.0f} MB of files {sizes}")
        assert abs(grown - copied[dtype]) < 48e6  # if it sees too little, it measures nothing
    assert sizes[-1] - 8e6 < results["float32"][1] < sizes[-1] + 24e6 < sum(sizes) - 24e6


def test_environment_names_the_default_model(saved, tmp_path, monkeypatch):
    assert load().folder == MINI_FOLDER
    monkeypatch.setenv("P2PZ_MODEL", str(saved("sd2")[1]))
    model = load()
    assert model.folder == saved("sd2")[1].resolve() and model.prediction_type == "v_prediction" and not model.is_mini
    assert load(MINI_FOLDER).is_mini
    monkeypatch.setenv("P2PZ_MODEL", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load()
    monkeypatch.setenv("P2PZ_MODEL", "a" * 5000)  # the name of a file cannot be as long
    with pytest.raises(CheckpointError, match="aaa does not exist"):
        load()
    monkeypatch.setenv("P2PZ_MODEL", "")
    assert load().is_mini


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, "float16"], ids=str)
def test_dtypes_that_nothing_computes_in(dtype):
    with pytest.raises(ValueError, match=r"dtype must be torch\.float16, bfloat16, float32 or float64, not "):
        load(MINI_FOLDER, dtype=dtype)


def remove(*names):
    return lambda folder: [
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink() for name in names
    ]


def set_json(name, **changes):
    return lambda folder: change_json(folder / name, **changes)


def set_bytes(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def drop_tensor(name, tensor):
    return lambda folder: change_tensors(folder / name, lambda tensors: tensors.pop(tensor))


def of_class(pipeline, **parts):
    """The folder of another pipeline, with some parts under other names."""

    def spoil(folder):
        change_json(folder / "model_index.json", _class_name=pipeline)
        for here, there in parts.items():
            (folder / here).rename(folder / there)

    return spoil


def both(*spoils):
    return lambda folder: [spoil(folder) for spoil in spoils]


def to_pickle(name):
    return lambda folder: (folder / name).rename((folder / name).with_suffix(".bin"))


def number_a_word(number):
    """One word of the tokenizer gets another number."""

    def spoil(folder):
        (folder / "tokenizer/tokenizer.json").unlink()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(MINI_FOLDER / "tokenizer" / name, folder / "tokenizer")
        change_json(folder / "tokenizer/vocab.json", **{"cat</w>": number})

    return spoil


SCHEDULER, TEXT = "scheduler/scheduler_config.json", "text_encoder/model.safetensors"
WRONG = {
    "no unet": (remove("unet"), "unet/config.json is missing"),
    "no vae config": (remove("vae/config.json"), "vae/config.json is missing"),
    "no scheduler": (remove("scheduler"), "scheduler_config.json is missing"),
    "no tokenizer": (remove("tokenizer"), "tokenizer is missing"),
    "empty tokenizer": (lambda f: [path.unlink() for path in (f / "tokenizer").glob("[!c]*[!g].json")], "tokenizer"),
    "garbage tokenizer": (set_bytes("tokenizer/tokenizer.json", b"{"), "tokenizer|text encoder"),
    "no text encoder": (remove("text_encoder"), "text_encoder/config.json is missing"),
    "word numbers": (number_a_word(1000), "tokenizer numbers words up to 1000, but the text encoder has 632"),
    "no padding": (set_json("tokenizer/tokenizer_config.json", pad_token=None), "tokenizer has no pad_token"),
    "two text encoders": (lambda f: (f / "text_encoder_2").mkdir(), "text_encoder_2/config.json is missing"),
    "no text encoder of two": (lambda f: (f / "text_encoder").rename(f / "text_encoder_2"), "text_encoder/config.json"),
    "no second text encoder": (set_json("unet/config.json", addition_embed_type="text_time"), "text_encoder_2/config"),
    "refiner of XL": (
        set_json("unet/config.json", addition_embed_type="text_time", cross_attention_dim=1280),
        "looks like the refiner of"
    ),
    "transformer": (lambda f: (f / "unet").rename(f / "transformer"), "looks like Stable Diffusion 3, Flux or another"),
    "inpainting": (set_json("unet/config.json", in_channels=9), "looks like an inpainting model, .* reads 9 channels"),
    "InstructPix2Pix": (
        both(of_class("StableDiffusionInstructPix2PixPipeline"), set_json("unet/config.json", in_channels=8)),
        "looks like an InstructPix2Pix model, .* reads 8 channels",
    ),
    "video": (
        set_json("unet/config.json", in_channels=8, _class_name="UNetSpatioTemporalConditionModel"),
        "looks like Stable Video Diffusion .its class is UNetSpatio",
    ),
    "upscaler of latents": (
        both(of_class("StableDiffusionLatentUpscalePipeline"), set_json("unet/config.json", in_channels=8)),
        "looks like an upscaler of latents",
    ),
    "sound": (
        both(of_class("AudioLDMPipeline"), set_json("unet/config.json", in_channels=8)), "models of sound"
    ),
    "Kandinsky": (of_class("KandinskyV22Pipeline", vae="movq"), "looks like Kandinsky"),
    "cascade": (of_class("StableCascadeDecoderPipeline", unet="decoder", vae="vqgan"), "looks like Stable Cascade"),
    "a class that is a list": (
        both(set_json("model_index.json", _class_name=["pipeline", "Mine"]), remove("vae")),
        "vae/config.json is missing",
    ),
    "other text encoder": (set_json("text_encoder/config.json", model_type="bert"), "no CLIP text .* of type bert"),
    "text heads": (set_json("text_encoder/config.json", num_attention_heads=5), "describes no text encoder"),
    "integers": (lambda f: change_tensors(f / VAE_FILE, lambda t: t.update({"quant_conv.bias": torch.zeros(8).int()})),
                 r"not of floating point \(quant_conv.bias int32\)"),
    "unet pickle": (to_pickle(UNET_FILE), "only diffusion_pytorch_model.bin, a pickle.*: python -c"),
    "text pickle": (to_pickle(TEXT), "only model.bin, a pickle"),
    "garbage unet config": (set_bytes("unet/config.json", b"{"), "unet/config.json cannot be read as JSON"),
    "garbage text config": (set_bytes("text_encoder/config.json", b"{"), "text_encoder/config.json cannot be read"),
    "text config list": (set_bytes("text_encoder/config.json", b"[]"), "text_encoder/config.json cannot be read"),
    "truncated text": (set_bytes(TEXT, b"abc"), "text_encoder/model.safetensors cannot be read"),
    "truncated unet": (set_bytes(UNET_FILE, b"abc"), "cannot be read as safetensors"),
    "unet tensor missing": (drop_tensor(UNET_FILE, "conv_in.bias"), r"1 tensors missing \(conv_in.bias\)"),
    "vae tensor missing": (drop_tensor(VAE_FILE, "quant_conv.bias"), r"1 tensors missing \(quant_conv.bias\)"),
    "text tensor missing": (drop_tensor(TEXT, "final_layer_norm.bias"), r"1 tensors missing \(final_layer_norm.bias\)"),
    "text too narrow": (set_json("text_encoder/config.json", intermediate_size=40), r"mlp.fc1.weight"),
    "text layers left over": (set_json("text_encoder/config.json", num_hidden_layers=1), r"layers.1.layer_norm1.bias"),
    "unet shape": (set_json("unet/config.json", cross_attention_dim=32), r"attn2.to_k.weight \(16, 24\) instead of"),
    "unet layers": (set_json("unet/config.json", layers_per_block=1), "tensors unexpected"),
    "unet endless": (set_json("unet/config.json", layers_per_block=10**9), "layers_per_block is 1000000000, but"),
    "unet deep": (set_json("unet/config.json", transformer_layers_per_block=[1, 10**9, 1, 1]), "tensors only"),
    "vae endless": (set_json("vae/config.json", layers_per_block=10**9), "vae/config.json: layers_per_block is 10000"),
    "unet levels": (set_json("unet/config.json", block_out_channels=[8] * 3000), "channels has the length 3000"),
    "vae levels": (set_json("vae/config.json", down_block_types=["a"] * 3000), "down_block_types has the length 3000"),
    "unet many times many": (
        set_json("unet/config.json", layers_per_block=90, transformer_layers_per_block=[90] * 4), "per_block is 90, but"
    ),
    "text endless": (set_json("text_encoder/config.json", num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "unet lacks": (set_json("unet/config.json", block_out_channels=...), "unet/config.json lacks 'block_out_channels'"),
    "unet null": (set_json("unet/config.json", block_out_channels=None), "unet"),
    "unet heads": (set_json("unet/config.json", attention_head_dim=5), "unet"),
    "unet groups": (set_json("unet/config.json", norm_num_groups=7), "unet"),
    "unet of images": (set_json("unet/config.json", addition_embed_type="image"), "addition_embed_type is image"),
    "vae groups": (set_json("vae/config.json", norm_num_groups=0), "vae"),
    "vae blocks": (set_json("vae/config.json", down_block_types=["Foo"] * 4), "its down_block_types is"),
    "betas": (set_json(SCHEDULER, beta_schedule="linear"), "beta_schedule is linear, but .* scaled_linear"),
    "beta end": (set_json(SCHEDULER, beta_end=0.02), "beta_end is 0.02"),
    "training steps": (set_json(SCHEDULER, num_train_timesteps=500), "num_train_timesteps is 500"),
    "trained betas": (set_json(SCHEDULER, trained_betas=[0.1] * 1000), "trained_betas"),
    "zero terminal": (set_json(SCHEDULER, rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    "EDM": (set_json(SCHEDULER, _class_name="EDMEulerScheduler"), "EDMEulerScheduler is for models of another noise"),
    "EDM solver": (set_bytes(SCHEDULER, b'{"_class_name": "EDMDPMSolverMultistepScheduler"}'), "EDMDPM.* is for"),
    "flow": (set_bytes(SCHEDULER, b'{"_class_name": "FlowMatchEulerDiscreteScheduler"}'), "FlowMatchEuler.* is for"),
    "flow sigmas": (set_json(SCHEDULER, use_flow_sigmas=True), "use_flow_sigmas is True"),
    "no betas": (set_bytes(SCHEDULER, b'{"_class_name": "DDIMScheduler"}'),
                 'lacks beta_schedule: if .*, add "beta_schedule": "scaled_linear"'),
    "no beta start": (set_json(SCHEDULER, beta_start=...), 'lacks beta_start: .*, add "beta_start": 0.00085'),
    "no beta end": (set_json(SCHEDULER, beta_end=...), 'lacks beta_end: .*, add "beta_end": 0.012'),
    "prediction": (set_json(SCHEDULER, prediction_type="sample"), "prediction_type sample is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_folders_are_refused_by_name(name, folder):
    spoil, message = WRONG[name]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


SETTINGS = [  # part, setting, values that it cannot have
    ("unet", "sample_size", ["32", [32, 32], None, 10**9, 257, 7, 0, -5, 32.5, True]),
    ("unet", "attention_head_dim", [-4, 0, 4.0, "4", [4], [4, 4, 4, -4], [[4]] * 4]),
    ("unet", "norm_num_groups", [8.0, 0, -8, None]),
    ("unet", "layers_per_block", [True, -1, [2, 2, 2, 2]]),
    ("unet", "in_channels", ["4", None, 4.0]),
    ("unet", "out_channels", [4.0]),
    ("unet", "cross_attention_dim", [[24] * 4, None]),
    ("unet", "block_out_channels", [[], 5, "abcd", {"a": 1}, [16, 16, 32, 10**30], [16, 16, 32, 32.0]]),
    ("unet", "transformer_layers_per_block", [0, [1, 1], "1"]),
    ("unet", "down_block_types", [["a", {}, None, []], "abcd", 5, None]),
    ("unet", "up_block_types", [["a", {}, None, []], 5]),
    ("vae", "scaling_factor", [None, 0, -1, "0.18", [1], float("nan"), float("inf"), 1e-9]),
    ("vae", "block_out_channels", [[], None, [8, 16, 16, "16"]]),
    ("vae", "norm_num_groups", [8.0, -8]),
    ("vae", "latent_channels", [0, 10**30]),
    ("vae", "layers_per_block", [-3, 2.0]),
    ("text_encoder", "num_attention_heads", [-4, 0, 4.0]),
    ("text_encoder", "num_hidden_layers", [-1]),
    ("text_encoder", "eos_token_id", [[1, 2], "x", None, -1]),
    ("text_encoder", "layer_norm_eps", ["x", None, float("nan"), -1.0]),
    ("text_encoder", "max_position_embeddings", [-1]),
]


@pytest.mark.parametrize(("part", "setting", "values"), SETTINGS, ids=[f"{row[0]}-{row[1]}" for row in SETTINGS])
def test_settings_of_another_kind_are_refused_by_name(part, setting, values, folder):
    path = folder / part / "config.json"
    for value in values:
        change_json(path, **{setting: value})
        with pytest.raises(CheckpointError, match=rf"{part}/config\.json .*\bits {setting} is ") as error:
            load(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_settings_that_would_change_transformers_answers_are_left_aside(folder):
    expected = load(folder).encode_text(SENTENCES[:2])
    change_json(folder / "text_encoder/config.json", return_dict=False, output_attentions=True, attention_dropout=0.9)
    assert torch.equal(load(folder).encode_text(SENTENCES[:2]), expected)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\n  lines\t."), "two lines ."),
        (KeyError(), "KeyError"),
        (OSError("\x1b[31mred"), "?[31mred"),
        (ValueError("a" * 2000), "a" * 1000 + "..."),
    ],
    ids=["lines", "nothing", "control", "long"],
)
def test_reasons_are_one_line(error, text):
    assert reason(error) == text


def test_widths_of_text_encoder_and_unet_must_agree(folder, saved, randomise):
    encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=632, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    encoder.save_pretrained(folder / "text_encoder")
    with pytest.raises(CheckpointError, match="states of width 32, but its UNet reads 24"):
        load(folder)


def test_context_length_is_the_encoders(folder):
    """A tokenizer without a length of its own pads to the 77 positions that the text encoder has."""
    change_json(folder / "tokenizer/tokenizer_config.json", model_max_length=...)
    assert load(folder).encode_text(["a cat"]).shape == (1, 77, 24)


def test_a_file_is_no_model(folder):
    with pytest.raises(CheckpointError, match="is a file"):
        load(folder / "model_index.json")


def test_the_folder_of_a_single_file_is_no_model(tmp_path):
    save_file({"model.diffusion_model.out.0.bias": torch.zeros(1)}, tmp_path / "v1-5.safetensors")
    with pytest.raises(CheckpointError, match=r"has no unet folder; to load a single file, give .*/v1-5.safetensors"):
        load(tmp_path)


def test_the_folder_of_a_lora_is_told_so(tmp_path):
    save_file({"unet.mid_block.to_q.lora_A.weight": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(CheckpointError, match=r"pytorch_lora_weights.safetensors looks like a LoRA .*: merge it"):
        load(tmp_path)


def test_loading_prints_nothing(folder, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        load(folder)
        p2pz.caption(np.full((128, 128, 3), 128, np.uint8), model=load())
    assert capfd.readouterr() == ("", "") and not caplog.records


# --- the bundled model ---


def test_bundled_model():
    files = [path for path in MINI_FOLDER.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{size / 2**20:.1f} MiB in {len(files)} files")
    assert size <= 30 * 2**20
    model = load()
    assert model.is_mini and model.prediction_type == "epsilon" and model.dtype == torch.float32
    assert (model.vae.config.sample_size, model.vae.config.downsampling) == (128, 4)
    assert model.encode_text(SENTENCES[:2]).shape == (2, 77, 128)
