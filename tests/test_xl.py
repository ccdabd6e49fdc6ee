"""Stable Diffusion XL: equal to diffusers from a folder and from a single file, and edited as the others are."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as peer
from safetensors.torch import load_file, save_file
from test_single_file import buffers, fill_vocabulary, ldm_clip, ldm_open_clip, ldm_unet, ldm_vae
from test_unet import output_and_gradient
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import p2pz
from p2pz.attention import keep_queries_and_keys
from p2pz.checks import first_layer_with_nan
from p2pz.editing import edit_latents, map_gradient
from p2pz.images import psnr
from p2pz.info import describe
from p2pz.inversion import invert_latents
from p2pz.memory import GIB, Plan, work_for
from p2pz.presets import settings_for
from p2pz.sampling import sample_latents
from p2pz.unet import STABLE_DIFFUSION_1, STABLE_DIFFUSION_XL, Conditioning, UNet, UNetConfig
from p2pz.weights import MINI_FOLDER, CheckpointError
from p2pz.weights.reading import rename
from p2pz.weights.single_file import OPEN_CLIP_2, UNET_LAYERS, XL_UNET_BLOCKS

TOKENIZER = MINI_FOLDER / "tokenizer"
SENTENCES = ["a photo of a cat on the beach", "", "a dog"]
XL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
FULL = XL | {
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
SMALL = XL | {  # as narrow as heads of 64 channels allow
    "block_out_channels": (64, 64, 128),
    "attention_head_dim": [1, 1, 2],
    "cross_attention_dim": 192,
    "projection_class_embeddings_input_dim": 128 + 6 * 256,
    "sample_size": 8,
}


def text_config(tokenizer, width, layers, activation, end):
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, hidden_act=activation, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def build(randomise, tokenizer=TOKENIZER, unet=SMALL, vae=(32, 32, 64, 64), texts=(64, 128)):
    """Diffusers' pipeline of random weights in the shape of Stable Diffusion XL, of some widths."""
    tokenizer_2 = CLIPTokenizer.from_pretrained(tokenizer, pad_token="!")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
    encoder = CLIPTextModel(text_config(tokenizer, texts[0], 12, "quick_gelu", tokenizer.eos_token_id))
    encoder_2 = CLIPTextModelWithProjection(text_config(tokenizer_2, texts[1], 32, "gelu", 2))
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=vae, layers_per_block=2, scaling_factor=0.13025, sample_size=128,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False,
        clip_sample=False,
    )  # fmt: skip
    unet = randomise(UNet2DConditionModel(**unet))
    for name, weight in unet.named_parameters():  # so that the pooled text matters
        if name.endswith(("time_emb_proj.weight", "add_embedding.linear_1.weight", "add_embedding.linear_2.weight")):
            weight *= 2.0
    pipe = StableDiffusionXLPipeline(
        randomise(vae), randomise(encoder), randomise(encoder_2), tokenizer, tokenizer_2, unet, scheduler,
        add_watermarker=False,
    )  # fmt: skip
    return quiet(pipe)


def quiet(pipe):
    """Without a bar, and channels-last as ours: convolutions of the two formats differ by up to 1e-5 on a CPU."""
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae):
        module.to(memory_format=torch.channels_last)
    return pipe


def ldm_tensors(pipe):
    """The whole checkpoint in the original layout; the other way is checked against diffusers'."""
    unet = pipe.unet.state_dict()
    labels = {name: unet.pop(name) for name in list(unet) if name.startswith("add_embedding.")}
    tensors = {  # here the coarsest level has transformers
        name.replace("output_blocks.2.1.conv.", "output_blocks.2.2.conv."): x for name, x in ldm_unet(unet).items()
    }
    for name, x in labels.items():
        i, kind = re.fullmatch(r"add_embedding\.linear_(\d)\.(\w+)", name).groups()
        tensors[f"model.diffusion_model.label_emb.0.{2 * int(i) - 2}.{kind}"] = x
    tensors |= ldm_vae(pipe.vae.state_dict())
    for name, x in ldm_clip(pipe.text_encoder.state_dict()).items():
        tensors[name.replace("cond_stage_model.", "conditioner.embedders.0.")] = x
    second = pipe.text_encoder_2.state_dict()
    projection = second.pop("text_projection.weight")
    for name, x in ldm_open_clip(second).items():
        if ".resblocks.32." not in name:
            tensors[name.replace("cond_stage_model.", "conditioner.embedders.1.")] = x
    tensors["conditioner.embedders.1.model.text_projection"] = projection.T
    return {name: x.contiguous() for name, x in (tensors | buffers()).items()}


@pytest.fixture(scope="module")
def saved(randomise, tmp_path_factory):
    """Diffusers' pipeline, its folder, and the same weights as a single file."""
    torch.manual_seed(0)
    pipe, place = build(randomise), tmp_path_factory.mktemp("xl")
    pipe.save_pretrained(place / "folder")
    save_file(ldm_tensors(pipe), place / "model.safetensors", {"format": "pt"})
    return pipe, place / "folder", place / "model.safetensors"


@pytest.fixture(scope="module")
def model(saved):
    return p2pz.load(saved[1], device="cpu")


@pytest.fixture(scope="module")
def from_file(saved):
    return p2pz.load(saved[2], device="cpu", tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def pictures():
    return [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(2)]


@pytest.fixture(scope="module")
def directions(model):
    """Two, long ones, because a random model hardly heeds its text."""
    return [
        10.0 * p2pz.direction("cat", animal, sentences=(["a cat"], [f"a {animal}"]), model=model)
        for animal in ("dog", "horse")
    ]


def told(pipe, states):
    """Diffusers' form of text states and image size, 128 x 128 pixels."""
    width = pipe.text_encoder_2.config.projection_dim
    sizes = torch.tensor([[128, 128, 0, 0, 128, 128]]).expand(len(states), -1)
    return states[:, :-1], {"text_embeds": states[:, -1, :width], "time_ids": sizes}


# --- the parts ---


def test_names_and_shapes_of_the_published_model():
    with torch.device("meta"):
        ours, theirs = UNet(STABLE_DIFFUSION_XL), UNet2DConditionModel(**FULL)
    layout = {name: weight.shape for name, weight in ours.state_dict().items()}
    assert layout == {name: weight.shape for name, weight in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in layout.values()) == 2_567_463_684
    assert len(ours.cross_attention_paths) == 70
    assert UNetConfig.from_json(json.loads(json.dumps(dict(theirs.config)))) == STABLE_DIFFUSION_XL
    written = json.loads(json.dumps(STABLE_DIFFUSION_XL.to_json()))
    assert UNetConfig.from_json(written) == STABLE_DIFFUSION_XL
    with torch.device("meta"):
        again = UNet2DConditionModel.from_config(written)
    assert layout == {name: weight.shape for name, weight in again.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"transformer_layers_per_block": [[1, 1], 2, 10]},
        {"transformer_layers_per_block": [0, 2, 10]},
        {"reverse_transformer_layers_per_block": [10, 2, 1]},
        {"addition_embed_type": "text_image"},
        {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 1536},
    ],
)
def test_settings_of_other_models_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=rf"\b{next(iter(changes))} is"):
        UNetConfig.from_json(STABLE_DIFFUSION_XL.to_json() | changes)


def compare_texts(model, pipe, assert_close):
    """The states of sentences, within a relative error of 1e-5; returns them."""
    states = model.encode_text(SENTENCES)
    tokens, _, pooled, _ = pipe.encode_prompt(SENTENCES, device="cpu", do_classifier_free_guidance=False)
    assert_close(states[:, :-1], tokens)
    assert_close(states[:, -1, : pooled.shape[1]], pooled)
    assert states[:, -1, pooled.shape[1] :].count_nonzero() == 0
    return states


def compare_vaes(model, pipe, assert_close):
    """Both ways, within a relative error of 1e-5."""
    latents = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        posterior = pipe.vae.encode(images := torch.rand(1, 3, 64, 64) * 2 - 1).latent_dist
        for ours, theirs in zip(model.vae.encode(images), (posterior.mean, posterior.logvar), strict=True):
            assert_close(ours, theirs)
        assert_close(model.decode_latents(latents), pipe.vae.decode(latents / 0.13025).sample.clamp(-1, 1))


def compare_parts(model, pipe, assert_close):
    """Text, VAE, and UNet with its gradient, within a relative error of 1e-5."""
    compare_vaes(model, pipe, assert_close)
    states = compare_texts(model, pipe, assert_close)
    latents, timesteps = torch.randn(3, 4, 16, 16), torch.tensor([1, 481, 981])
    context, added = told(pipe, states)
    output, gradient = output_and_gradient(lambda x: model.unet(x, timesteps, states, image_size=(128, 128)), latents)
    expected, expected_gradient = output_and_gradient(
        lambda x: pipe.unet(x, timesteps, context, added_cond_kwargs=added).sample, latents
    )
    assert_close(output, expected)
    assert_close(gradient, expected_gradient)


def test_a_folder_equals_diffusers(model, saved, assert_close):
    assert (model.native_size, model.text_shape, model.prediction_type) == (64, (78, 192), "epsilon")
    compare_parts(model, saved[0], assert_close)


def test_a_single_file_equals_diffusers(from_file, saved, assert_close):
    _, folder, path = saved
    assert from_file.prediction_type == "epsilon" and from_file.native_size == 1024
    theirs = StableDiffusionXLPipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True, add_watermarker=False
    )
    compare_parts(from_file, quiet(theirs.to(torch.float32)), assert_close)


def test_the_file_of_these_tests_is_what_diffusers_reads(saved):
    """Diffusers' converters turn the file back into the tensors that it was written from, bit for bit."""
    pipe, _, path = saved
    tensors = load_file(path)
    first = peer.convert_ldm_clip_checkpoint(dict(tensors), "conditioner.embedders.0.transformer.")
    first.pop("text_model.embeddings.position_ids", None)
    converted = [
        (peer.convert_ldm_unet_checkpoint(dict(tensors), dict(pipe.unet.config)), pipe.unet),
        (peer.convert_ldm_vae_checkpoint(dict(tensors), dict(pipe.vae.config)), pipe.vae),
        (first, pipe.text_encoder),
        (
            peer.convert_open_clip_checkpoint(pipe.text_encoder_2, dict(tensors), "conditioner.embedders.1.model."),
            pipe.text_encoder_2,
        ),
    ]
    for found, module in converted:
        found = {name.removeprefix("text_model."): x for name, x in found.items()}
        original = {name.removeprefix("text_model."): x for name, x in module.state_dict().items()}
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], x) for name, x in original.items())


def check_same(first, second):
    """Two modules have the same weights, bit for bit."""
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())


def check_same_model(model, from_file):
    assert model.text_fingerprint == from_file.text_fingerprint
    assert replace(model.unet.config, sample_size=128) == from_file.unet.config
    assert model.vae.config.scaling_factor == from_file.vae.config.scaling_factor == 0.13025
    for part in ("unet", "vae", "text_encoder"):
        check_same(getattr(model, part), getattr(from_file, part))


def test_folder_and_file_are_one_model(model, from_file):
    check_same_model(model, from_file)
    assert torch.equal(model.encode_text(SENTENCES), from_file.encode_text(SENTENCES))


def test_every_row_of_the_tables_is_used(saved):
    tensors = load_file(saved[2])
    for prefix, tables in (
        ("model.diffusion_model.", (XL_UNET_BLOCKS, UNET_LAYERS)),
        ("conditioner.embedders.1.model.", (OPEN_CLIP_2,)),
    ):
        names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        for table in tables:
            unused = [row for row in table if not any(re.fullmatch(row[0], name) for name in names)]
            assert [row for row in unused if "attn_mask" not in row[0]] == []
            names = list(rename({name: torch.zeros(3) for name in names}, table, "file"))


def test_a_buffer_that_merges_add_to_the_second_text_encoder(saved, from_file, tmp_path):
    buffer = {f"{SECOND}.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    path = broken(saved, tmp_path, lambda tensors: tensors.update(buffer))
    assert p2pz.load(path, device="cpu", tokenizer=TOKENIZER).text_fingerprint == from_file.text_fingerprint
    path.unlink()


def test_the_fingerprint_is_that_of_both_text_encoders(saved, model, tmp_path):
    for part in ("text_encoder", "text_encoder_2"):
        folder = tmp_path / part
        shutil.copytree(saved[1], folder)
        tensors = load_file(folder / part / "model.safetensors")
        (name,) = (name for name in tensors if name.endswith("final_layer_norm.bias"))
        save_file(tensors | {name: tensors[name] + 1}, folder / part / "model.safetensors", {"format": "pt"})
        assert p2pz.load(folder, device="cpu").text_fingerprint != model.text_fingerprint


def test_the_vae_works_in_float32_beside_a_unet_in_float16(saved, model, assert_close, tmp_path):
    half = p2pz.load(saved[1], device="cpu", dtype=torch.float16)
    assert half.dtype == torch.float16 and half.vae.quant_conv.weight.dtype == torch.float32
    latents, images = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 64, 64)
    assert_close(half.decode_latents(latents), model.decode_latents(latents))
    assert_close(half.encode_image(images), model.encode_image(images))
    assert p2pz.load(saved[1], device="cpu", dtype=torch.bfloat16).vae.quant_conv.weight.dtype == torch.bfloat16
    shutil.copytree(saved[1], tmp_path / "model")
    path = tmp_path / "model/vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_upcast": False}))
    fixed = p2pz.load(tmp_path / "model", device="cpu", dtype=torch.float16)
    assert fixed.vae.quant_conv.weight.dtype == torch.float16


@pytest.mark.slow
def test_equals_diffusers_at_full_width(randomise, tmp_path, assert_close):
    """The published shapes, vocabulary included, in float16 files, computed in float32: 17 GB of memory, 14 of disk.

    Of the UNet, with 2.6 billion weights, diffusers' single file and ours are compared bit for bit in float16; then
    both compute with one set of weights in float32.
    """
    tokenizer, folder, path = fill_vocabulary(tmp_path / "tokenizer"), tmp_path / "folder", tmp_path / "xl.safetensors"
    torch.set_default_dtype(torch.float16)
    try:
        pipe = build(randomise, tokenizer, FULL, (128, 256, 512, 512), (768, 1280))
    finally:
        torch.set_default_dtype(torch.float32)
    save_file(ldm_tensors(pipe), path)
    pipe.save_pretrained(folder)
    del pipe
    model = p2pz.load(path, device="cpu", dtype=torch.half, tokenizer=tokenizer)
    assert model.unet.config == STABLE_DIFFUSION_XL
    check_same_model(p2pz.load(folder, device="cpu", dtype=torch.half), model)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()

    settings = {"config": str(folder), "local_files_only": True, "torch_dtype": torch.half}
    unet = UNet2DConditionModel.from_single_file(str(path), subfolder="unet", **settings)
    check_same(unet, model.unet)
    unet = unet.to("meta")
    theirs = quiet(StableDiffusionXLPipeline.from_single_file(str(path), unet=unet, add_watermarker=False, **settings))
    for module in (theirs.vae, theirs.text_encoder, theirs.text_encoder_2, model.text_encoder):
        module.float()
    compare_vaes(model, theirs, assert_close)
    states = compare_texts(model, theirs, assert_close)
    context, added = told(theirs, states)

    ours = model.unet
    del theirs, model  # their text encoders are large
    ours.float().fuse()
    unet.load_state_dict(ours.state_dict(), strict=True, assign=True)
    latents, timesteps = torch.randn(3, 4, 16, 16), torch.tensor([1, 481, 981])
    with torch.no_grad():
        expected = unet(latents, timesteps, context, added_cond_kwargs=added).sample
        error = assert_close(ours(latents, timesteps, states, image_size=(128, 128)), expected)
    print(f"relative error {error:.2e}")
    shutil.rmtree(tmp_path)


# --- the whole way ---


def test_sample_equals_diffusers(model, saved, assert_close):
    """From text to pixels, from one noise; an empty negative prompt is zeros, as in diffusers' pipeline."""
    pipe, steps, guidance = saved[0], 3, 4.0
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "height": 64, "width": 64}
    for negative in ("", "a dog"):
        their_negative = negative or None
        expected = pipe("a cat", negative_prompt=their_negative, latents=noise, output_type="latent", **settings).images
        states = model.encode_negative([negative]), model.encode_text(["a cat"])
        assert_close(sample_latents(model, noise, *states, steps, guidance, False), expected, 1e-3)
    settings |= {"latents": noise}
    theirs = np.asarray(pipe("a cat", **settings).images[0]).astype(int)
    (picture,) = p2pz.sample("a cat", model=model, steps=steps, guidance=guidance, seed=5, progress=False)
    assert theirs.std() > 10 and np.abs(np.asarray(picture) - theirs).max() <= 2


def test_an_empty_negative_prompt_is_what_the_folder_says(saved, model, tmp_path, assert_close):
    assert not model.encode_negative([""]).any()
    folder = tmp_path / "xl"
    shutil.copytree(saved[1], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    pipe, ours = quiet(StableDiffusionXLPipeline.from_pretrained(folder)), p2pz.load(folder, device="cpu")
    assert torch.equal(ours.encode_negative([""]), ours.encode_text([""]))
    noise, settings = torch.randn(1, 4, 8, 8), {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64}
    expected = pipe("a cat", latents=noise, output_type="latent", width=64, **settings).images
    states = ours.encode_negative([""]), ours.encode_text(["a cat"])
    assert_close(sample_latents(ours, noise, *states, 2, 4.0, False), expected, 1e-3)


def test_sample_of_another_shape_equals_diffusers(model, saved, assert_close):
    """The UNet is told the height before the width."""
    noise = torch.randn(1, 4, 8, 16)
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 128, "latents": noise}
    expected = saved[0]("a cat", output_type="latent", **settings).images
    assert_close(sample_latents(model, noise, None, model.encode_text(["a cat"]), 2, 1.0, False), expected, 1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative": "a horse"},
        {"negative": "", "gradient": "halves"},
        {"guidance": 1.0},
        {"xa_guidance": 0.0, "gradient": "both"},
        {"reference": "path"},
    ],
    ids=str,
)
def test_every_edit_in_a_batch_is_what_it_is_alone(changes, model, directions, assert_close):
    """Two images whose captions differ and two directions, so that every row has shifts of its own."""
    changes = {"guidance": 3.0, "xa_guidance": 1.0} | changes
    negative = changes.pop("negative", None)
    settings = settings_for(model, "p2pz", steps=2, **changes)
    captions = model.encode_text(["a photo of a cat", "a sketch of a black cat in the snow"])
    negatives = None if negative is None else model.encode_negative([negative]).expand_as(captions)
    image_latents = torch.randn(2, 4, 8, 8)

    def run(images, deltas):
        """Latents of the inversion, the edits and the reference of some images with some directions."""
        own = captions[images]
        path = invert_latents(model, image_latents[images], own, settings, torch.Generator().manual_seed(1), False)
        texts = torch.cat([own + directions[i].states for i in deltas])
        negative = None if negatives is None else negatives[images]
        return path[-1], *edit_latents(model, path[-1], own, negative, texts, settings, False, path)

    noise, edits, references = run([0, 1], [0, 1])
    assert edits.isfinite().all() and edits.shape == (4, 4, 8, 8)
    for image, direction in ((0, 1), (1, 0)):
        alone = run([image], [direction])
        for together, one in zip(
            (noise[[image]], edits[[2 * direction + image]], references[[image]]), alone, strict=True
        ):
            assert_close(together, one, 1e-4)
    assert (edits[0] - edits[2]).norm() > 1e-3 * edits[0].norm()  # the directions are not the same


SETTINGS = {"steps": 2, "prompt": "a photo of a cat", "guidance": 3.0, "progress": False}


def test_pictures_are_inverted_and_edited(model, pictures, directions):
    settings = SETTINGS | {"prompt": ["a photo of a cat", "a cat in the snow"], "model": model}
    results = p2pz.edit(pictures, directions, reference="path", blend=0.25, negative_prompt="", **settings)
    assert [len(row) for row in results] == [2, 2]
    for row in results:
        for result in row:
            assert result.image.size == (64, 64) and result.inversion.latents.shape == (4, 8, 8)
            assert result.inversion.latents.isfinite().all()
    again = p2pz.edit(
        results[1][0].inversion,
        directions[0],
        reference="path",
        blend=0.25,
        negative_prompt="",
        **(SETTINGS | {"prompt": None, "model": model}),
    )
    assert psnr(again.image, results[1][0].image) > 50
    assert p2pz.direction("cat", "dog", model=model).states.shape == (78, 192)


def test_embeddings_without_a_pooled_row_leave_it_as_it_is(model, saved, tmp_path):
    """As the pipeline gives them, and other programs save them."""
    for name, sentences in (("cat", ["a cat", "one cat"]), ("dog", ["a dog"])):
        states = torch.cat([saved[0].encode_prompt(text, do_classifier_free_guidance=False)[0] for text in sentences])
        torch.save(states, tmp_path / f"{name}.pt")
    made = p2pz.direction(embeddings=(tmp_path / "cat.pt", tmp_path / "dog.pt"), model=model)
    own = model.encode_text(["a cat", "one cat", "a dog"])
    assert made.states.shape == own.shape[1:] and not made.states[-1].any()
    assert torch.allclose(made.states[:-1], (own[2] - own[:2].mean(0))[:-1], atol=1e-5)
    torch.save(torch.zeros(1, 76, 192), tmp_path / "cat.pt")
    with pytest.raises(ValueError, match="hold 76 tokens of width 192, but this model's text encoder gives 77 of"):
        p2pz.direction(embeddings=(tmp_path / "cat.pt", tmp_path / "dog.pt"), model=model)


def test_other_methods_and_recording(model, pictures, directions):
    settings = {"model": model, **SETTINGS}
    swapped = p2pz.ddim_edit(pictures[0], "cat->dog", **settings)
    plain = p2pz.prompt_to_prompt(pictures[0], "cat->dog", cross_steps=0.0, self_steps=0.0, **settings)
    assert psnr(swapped.image, plain.image) > 50
    assert p2pz.sdedit(pictures[0], "cat->dog", **settings).image.size == (64, 64)
    recorder = p2pz.record()
    p2pz.edit(pictures[0], directions[0], record=recorder, **settings)
    maps = recorder.runs[0].of("edit")
    assert len(maps) == 70 and {x.shape[-1] for x in maps.values()} == {77}


def test_map_guidance_covers_all_layers(model, assert_close):
    """The gradient of the latents from the maps of all layers, checkpointed or not, is finite and the same."""
    latents, start = torch.randn(2, 1, 4, 16, 16).unbind(0)
    states, kept = model.encode_text(["a photo of a cat", "a photo of a dog"]), {}
    shifts, keys_values = model.condition(torch.tensor([401]), states, (16, 16))
    both = Conditioning(shifts[0], keys_values)
    alone = model.condition(torch.tensor([401]), states[1:], (16, 16))
    assert_close(both.of(slice(1, 2)).shifts, alone.shifts[0], 1e-6)
    assert_close(both.of(slice(1, 2)).keys_values, alone.keys_values, 1e-6)
    model.predict(start, both.of(slice(1)), keep_queries_and_keys(kept))
    assert list(kept) == model.unet.cross_attention_paths and len(kept) == 70
    gradients = [
        map_gradient(replace(model, checkpoint=checkpoint), latents, both.of(slice(1, 2)), kept)
        for checkpoint in (False, True)
    ]
    assert gradients[0].isfinite().all() and gradients[0].norm() > 0
    assert torch.equal(*gradients)


def test_shifts_are_of_timestep_and_text(model):
    states = model.encode_text(["a cat", "a dog"])
    timesteps = torch.tensor([1, 500, 981])
    shifts, keys_values = model.condition(timesteps, states, (16, 16))
    assert shifts.shape[:2] == (3, 2) and keys_values.shape[:2] == (2, 77)
    assert len({shift.sum().item() for shift in shifts.flatten(0, 1)}) == 6
    assert not torch.equal(shifts, model.condition(timesteps, states, (16, 24)).shifts)
    with pytest.raises(ValueError, match="told the image's size"):
        model.condition(timesteps, states)


def test_a_layer_with_nan_is_found(model):
    latents, states = torch.randn(2, 4, 16, 16), model.encode_text(["a cat", "a dog"])
    assert first_layer_with_nan(model, latents, torch.tensor(500), states) is None


def test_facts_and_memory(model):
    facts = describe(model)
    assert facts["family"].startswith("unknown") and "text_encoder_2" in facts
    assert facts["text states"].startswith("12 layers, width 64 and 32 layers, width 128, fingerprint ")
    with torch.device("meta"):
        full = UNet(STABLE_DIFFUSION_XL)
    published = replace(model, unet=full)
    assert describe(published)["family"] == "Stable Diffusion XL"
    work = work_for(published, (1024, 1024), 3, 2, torch.float16)
    assert work.vae == 4 * sum(x.numel() for x in model.vae.parameters()) and work.vae_element == 4
    needed = work.needed(Plan(1)) / GIB
    print(f"one edit at 1024 x 1024: {needed:.1f} GiB")
    assert 10 < needed < 40


# --- what is refused ---


def broken(saved, tmp_path, change):
    tensors = {name: x.half() for name, x in load_file(saved[2]).items()}
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
SECOND = "conditioner.embedders.1.model"
WRONG = {
    "inpainting": (lambda t: t.update({CONV_IN: torch.zeros(32, 9, 3, 3)}), "an inpainting model"),
    "refiner": (lambda t: t.update({"conditioner.embedders.0.model.ln_final.bias": torch.zeros(1)}),
                "looks like the refiner of Stable Diffusion XL"),
    "fewer layers": (lambda t: [t.pop(x) for x in list(t) if re.search(r"\.transformer_blocks\.[4-9]\.", x)],
                     "looks like a Stable Diffusion XL of fewer layers, such as SSD-1B"),
    "one text encoder": (lambda t: [t.pop(x) for x in list(t) if x.startswith(SECOND)],
                         "lacks the second text encoder"),
    "no first": (lambda t: [t.pop(x) for x in list(t) if x.startswith("conditioner.embedders.0")],
                 r"lacks the text encoder \(conditioner"),
    "projection": (lambda t: t.pop(f"{SECOND}.text_projection"), r"1 tensors missing \(text_projection.weight\)"),
    "flat projection": (lambda t: t.update({f"{SECOND}.text_projection": torch.zeros(128)}), "of another shape"),
    "odd projection": (lambda t: t.update({f"{SECOND}.text_projection": torch.zeros(128, 64)}),
                       "pooled states of width 64, but its UNet reads 128"),
    "no labels": (lambda t: [t.pop(x) for x in list(t) if "label_emb" in x], "4 tensors missing .add_embedding"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_by_name(name, saved, tmp_path):
    change, message = WRONG[name]
    path = broken(saved, tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        p2pz.load(path, device="cpu", tokenizer=TOKENIZER)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    path.unlink()


def test_wrong_folders_are_refused_by_name(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved[1], folder)
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(CheckpointError, match=r"text_encoder_2/config.json is missing"):
        p2pz.load(folder, device="cpu")
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 1280}))
    with pytest.raises(CheckpointError, match="looks like the refiner of Stable Diffusion XL"):
        p2pz.load(folder, device="cpu")


def test_a_tokenizer_of_the_callers_serves_both_text_encoders(saved, model):
    given = p2pz.load(saved[1], device="cpu", tokenizer=TOKENIZER)
    assert given.tokenizer_2.pad_token == "!" and given.tokenizer.pad_token == model.tokenizer.pad_token
    assert torch.equal(given.encode_text(SENTENCES), model.encode_text(SENTENCES))


def test_other_families_are_told_no_size(assert_close):
    """Shifts of Stable Diffusion 1 are of timesteps alone, and a size changes nothing."""
    config = replace(STABLE_DIFFUSION_1, block_out_channels=(32, 32, 32, 32), context_channels=16, norm_groups=8)
    unet, states = UNet(config), torch.randn(2, 77, 16)
    shifts, _ = unet.condition(torch.tensor([1, 2, 3]), states)
    assert shifts.ndim == 2 and torch.equal(shifts, unet.condition(torch.tensor([1, 2, 3]), states, (64, 64)).shifts)
