"""The measures of image editing against hand-computed cases and independent, slower implementations."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

from p2pz import metrics
from p2pz.weights import MINI_FOLDER, mini_world

HEIGHT, WIDTH = 24, 30


@pytest.fixture
def pictures():
    """Two `[24, 30, 3]` uint8 pictures that are alike, with some structure."""
    rng = np.random.default_rng(0)
    first = np.kron(rng.integers(0, 256, (6, 6, 3)), np.ones((4, 5, 1))).astype(np.uint8)
    second = (first + rng.normal(0, 20, first.shape)).clip(0, 255).astype(np.uint8)
    return first, second


@pytest.fixture
def mask():
    """The lower right corner, `[24, 30]`."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[15:, 18:] = True
    return mask


def blackened(picture, mask):
    return picture * ~mask[..., None]


# Background ----------------------------------------------------------------------------------------------------------
def test_background_error_by_hand(mask):
    first, second = np.full((2, HEIGHT, WIDTH, 3), 100, np.uint8)
    second[..., 1] += 30  # one channel of three
    second[mask] = 255
    assert metrics.background_mse(first, second, mask) == pytest.approx((30 / 255) ** 2 / 3)
    assert metrics.background_psnr(first, second, mask) == pytest.approx(10 * math.log10(3 * 255**2 / 900))


def test_background_error_and_pie_benchs_differ_by_the_backgrounds_share(pictures, mask):
    blank = [blackened(picture, mask) / 255 for picture in pictures]
    theirs, share = np.square(blank[0] - blank[1]).mean(), (~mask).mean()
    assert metrics.background_mse(*pictures, mask) * share == pytest.approx(theirs)
    assert metrics.background_psnr(*pictures, mask) - 10 * math.log10(share) == pytest.approx(-10 * math.log10(theirs))


def slow_ssim(first, second, mask):
    """Wang et al. (2004), window by window, with centred sums."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for row in range(5, HEIGHT - 5):
        for column in range(5, WIDTH - 5):
            where = np.s_[row - 5 : row + 6, column - 5 : column + 6]
            if mask[where].any():
                continue
            for channel in range(3):
                x, y = (one[where][..., channel].astype(float) for one in (first, second))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                top = (2 * mx * my + c1) * (2 * cov + c2)
                values.append(top / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


@pytest.mark.parametrize("masked", [True, False])
def test_background_ssim_equals_a_slow_loop(pictures, mask, masked):
    mask &= masked
    expected = slow_ssim(*pictures, mask)
    assert 0.3 < expected < 0.95
    assert metrics.background_ssim(*pictures, mask) == pytest.approx(expected, abs=1e-10)
    assert metrics.background_ssim(*reversed(pictures), mask) == pytest.approx(expected, abs=1e-10)


def test_background_ssim_of_flat_pictures_by_hand(mask):
    first, second = np.full((HEIGHT, WIDTH, 3), 100, np.uint8), np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    c1 = 2.55**2
    expected = (2 * 100 * 200 + c1) / (100**2 + 200**2 + c1)
    assert metrics.background_ssim(first, second, mask) == pytest.approx(expected)


BACKGROUND = {
    "mse": (metrics.background_mse, 0.0),
    "psnr": (metrics.background_psnr, math.inf),
    "ssim": (metrics.background_ssim, 1.0),
}


@pytest.mark.parametrize("name", BACKGROUND)
def test_background_measures_see_nothing_under_the_mask(pictures, mask, name):
    measure, perfect = BACKGROUND[name]
    first, second = pictures
    inverted = np.where(mask[..., None], 255 - first, first)
    assert measure(first, inverted, mask) == perfect
    before = measure(first, second, mask)
    assert before != perfect
    assert measure(first, np.where(mask[..., None], 255 - second, second), mask) == before


def test_all_forms_of_a_picture_and_a_mask_agree(pictures, mask):
    forms = [pictures, [Image.fromarray(one) for one in pictures], [torch.from_numpy(one) for one in pictures]]
    for measure, _ in BACKGROUND.values():
        assert len({measure(*form, region) for form in forms for region in (mask, torch.from_numpy(mask))}) == 1


class MeanDifference(torch.nn.Module):
    """In place of LPIPS: keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, first, second):
        self.given = first, second
        return (self.weight * (first - second).abs()).mean().view(1, 1, 1, 1)


def test_background_lpips_hands_over_blackened_pictures(pictures, mask):
    network = MeanDifference()
    found = metrics.background_lpips(*pictures, mask, network)
    expected = [blackened(one, mask).transpose(2, 0, 1)[None] / 127.5 - 1 for one in pictures]
    for given, wanted in zip(network.given, expected, strict=True):
        assert given.dtype == torch.float32
        np.testing.assert_allclose(given.numpy(), wanted, atol=1e-6)
    assert found == pytest.approx(np.abs(expected[0] - expected[1]).mean(), rel=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_background_lpips_with_the_package():
    lpips = pytest.importorskip("lpips")
    network = lpips.LPIPS(pretrained=False, pnet_rand=True, verbose=False)
    first, second = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[:40, :40] = True
    blank = [torch.from_numpy(blackened(one, mask) / 255).float().permute(2, 0, 1)[None] for one in (first, second)]
    expected = network(*blank, normalize=True).item()
    assert expected != 0
    assert metrics.background_lpips(first, second, mask, network) == pytest.approx(expected, rel=1e-4)
    assert metrics.background_lpips(first, first, mask, network) == 0


def test_load_lpips_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"pip install 'p2pz\[metrics\]'"):
        metrics.load_lpips()
    with pytest.raises(ValueError, match="not resnet"):
        metrics.load_lpips("resnet")


# Structure -----------------------------------------------------------------------------------------------------------
def random_weights(model):
    """Weights and biases that all matter, in place of the tiny ones of an untrained model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def tiny_vit(size=224):
    config = ViTConfig(
        image_size=size, patch_size=size // 4, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=20,
    )  # fmt: skip
    return random_weights(ViTModel(config, add_pooling_layer=False))


def numpy_key_similarity(picture, model):
    """The last layer's keys of the tiny transformer, from the weights alone; `picture` is 224 x 224."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(1, keepdims=True)
        return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-12) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    pixels = (picture / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    patches = pixels.reshape(4, 56, 4, 56, 3).transpose(0, 2, 4, 1, 3).reshape(16, -1)
    projection = "embeddings.patch_embeddings.projection"
    tokens = patches @ weights[f"{projection}.weight"].reshape(12, -1).T + weights[f"{projection}.bias"]
    tokens = np.concatenate([weights["embeddings.cls_token"][0], tokens]) + weights["embeddings.position_embeddings"][0]

    states = norm("layers.0.layernorm_before", tokens)
    query, key, value = (
        linear(f"layers.0.attention.{part}_proj", states).reshape(17, 3, 4).transpose(1, 0, 2) for part in "qkv"
    )
    scores = np.exp(query @ key.transpose(0, 2, 1) / 2)
    mixed = (scores / scores.sum(2, keepdims=True) @ value).transpose(1, 0, 2).reshape(17, 12)
    tokens = tokens + linear("layers.0.attention.o_proj", mixed)
    hidden = linear("layers.0.mlp.fc1", norm("layers.0.layernorm_after", tokens))
    tokens = tokens + linear("layers.0.mlp.fc2", hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2)

    keys = linear("layers.1.attention.k_proj", norm("layers.1.layernorm_before", tokens))
    return keys @ keys.T / np.outer(*[np.linalg.norm(keys, axis=1)] * 2)


@pytest.fixture
def large():
    """Two pictures of 224 x 224."""
    return np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)


def test_structure_distance_equals_plain_numpy(large):
    model = tiny_vit()
    expected = np.square(np.subtract(*(numpy_key_similarity(one, model) for one in large))).mean()
    assert expected > 1e-3
    assert metrics.structure_distance(*large, model) == pytest.approx(expected, rel=1e-4)
    assert metrics.structure_distance(large[0], large[0], model) == 0
    assert not any(part._forward_hooks for part in model.modules() if isinstance(part, torch.nn.Linear))


def test_structure_distance_resizes_to_224(large):
    model = tiny_vit()
    small = [Image.fromarray(one[:90, :120]) for one in large]
    resized = [one.resize((224, 224), Image.Resampling.BILINEAR) for one in small]
    assert metrics.structure_distance(*small, model) == metrics.structure_distance(*resized, model)


def test_structure_distance_with_an_encoder_of_another_size(large):
    assert 0 < metrics.structure_distance(*large, tiny_vit(112)) < 4


def test_structure_distance_needs_keys(large):
    with pytest.raises(ValueError, match="no key projections"):
        metrics.structure_distance(*large, MeanDifference())


def test_load_dino_from_a_folder(large, tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    loaded = metrics.load_dino(tmp_path)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert metrics.structure_distance(*large, loaded) == metrics.structure_distance(*large, model)

    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name or "layer.1" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be loaded as a ViTModel: its weights lack \S*layer"):
        metrics.load_dino(tmp_path)


@pytest.mark.parametrize("load", [metrics.load_dino, metrics.load_clip])
def test_loading_from_an_empty_folder_is_a_one_line_error(load, tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded as a") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_pickles_are_not_opened(name, clip, tmp_path):
    load, model = (metrics.load_dino, tiny_vit()) if name == "vit" else (metrics.load_clip, clip.model)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        load(tmp_path)


# Text ----------------------------------------------------------------------------------------------------------------
SENTENCES = ["a photo of a grey cat", "a sketch of a horse near a tree", "a photo of a dog " + "in the snow " * 99]


@pytest.fixture
def clip(tmp_path):
    """A tiny random CLIP, saved as a folder and loaded by us."""
    tokenizer = CLIPTokenizer.from_pretrained(MINI_FOLDER / "tokenizer")
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | {"image_size": 32, "patch_size": 8})
    images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}
    random_weights(CLIPModel(config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    return metrics.load_clip(tmp_path)


def test_pretrained_clip_equals_a_direct_computation(clip):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    model, tokenizer = clip.model, CLIPTokenizer.from_pretrained(MINI_FOLDER / "tokenizer")
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.from_numpy((pictures / 255 - mean) / std).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        seen = F.normalize(model.vision_model(pixels).pooler_output @ model.visual_projection.weight.T, dim=1)
        read = []
        for sentence in SENTENCES:  # one by one: no padding
            ids = tokenizer(sentence).input_ids
            ids = ids[:76] + ids[-1:] if len(ids) > 77 else ids
            last = model.text_model(torch.tensor([ids])).last_hidden_state[0, -1]
            read.append(F.normalize(model.text_projection(last), dim=0))
        expected = model.logit_scale.exp() * seen @ torch.stack(read).T
    found = clip.similarity([Image.fromarray(one) for one in pictures], SENTENCES)
    assert found.shape == (2, 3) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_clip_similarity_pairs_pictures_and_sentences(clip, pictures, mask):
    pictures, sentences = [Image.fromarray(one) for one in pictures], SENTENCES[:2]
    found = metrics.clip_similarity(pictures, sentences, clip)
    expected = [clip.similarity([one], [text]).item() for one, text in zip(pictures, sentences, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    blank = [Image.fromarray(blackened(np.asarray(one), ~mask)) for one in pictures]
    edited = metrics.clip_similarity(pictures, sentences, clip, masks=[mask, mask])
    torch.testing.assert_close(edited, metrics.clip_similarity(blank, sentences, clip))
    assert not torch.equal(edited, found)


class Reddish:
    """In place of a CLIP: a picture's mean of red fits a sentence of that number."""

    def similarity(self, pictures, sentences):
        reds = torch.tensor([np.asarray(picture)[..., 0].mean() for picture in pictures])
        return -(reds[:, None] - torch.tensor([float(sentence) for sentence in sentences])).abs()


def test_clip_accuracy_by_hand():
    pictures = [np.full((16, 16, 3), red, np.uint8) for red in (10, 20, 30, 40)]
    targets = ["11", "0", "31", "30"]  # nearer, farther, nearer, as near as the source
    assert metrics.clip_accuracy(pictures, ["0", "19", "50", "50"], targets, Reddish()) == 0.5


def test_clip_measures_refuse_wrong_lists(pictures, mask):
    for bad in [([], []), (pictures, ["1"]), (pictures, "12")]:
        with pytest.raises(ValueError, match="give"):
            metrics.clip_similarity(*bad, Reddish())
    with pytest.raises(ValueError, match="source captions for each of the 2 pictures"):
        metrics.clip_accuracy(pictures, ["1"], ["1", "2"], Reddish())
    with pytest.raises(ValueError, match="masks for each"):
        metrics.clip_similarity(pictures, ["1", "2"], Reddish(), masks=[mask])
    with pytest.raises(ValueError, match="a mask is empty"):
        metrics.clip_similarity(pictures, ["1", "2"], Reddish(), masks=[mask, np.zeros_like(mask)])


# Truth and summary ---------------------------------------------------------------------------------------------------
def test_error_to_truth_by_hand(mask):
    truth = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    edited = np.where(mask[..., None], truth + 51, truth + 5).astype(np.uint8)
    inside, outside = metrics.error_to_truth(edited, truth, mask)
    assert inside == pytest.approx(20 * math.log10(255 / 51))
    assert outside == pytest.approx(20 * math.log10(255 / 5))
    assert metrics.error_to_truth(truth, truth, mask) == (math.inf, math.inf)
    with pytest.raises(ValueError, match="the mask is empty"):
        metrics.error_to_truth(edited, truth, np.zeros_like(mask))


def test_an_unedited_scene_of_the_mini_world_is_wrong_inside_only():
    source, target = mini_world.task_pair("cat->dog", 0, "held_out")
    inside, outside = metrics.error_to_truth(
        mini_world.render(source), mini_world.render(target), mini_world.edit_mask(source, target)
    )
    assert 3 < inside < 30 and outside > 50


def test_mean_with_interval_by_hand():
    mean, half = metrics.mean_with_interval([1, 2, 3, 4])
    assert mean == 2.5
    assert half == pytest.approx(1.96 * math.sqrt(5 / 3) / 2)
    assert metrics.mean_with_interval([5.0, 5.0]) == (5.0, 0.0)


def test_an_interval_that_does_not_exist_is_nan():
    assert metrics.mean_with_interval([7.0]) == (7.0, pytest.approx(math.nan, nan_ok=True))
    assert metrics.mean_with_interval([7.0, math.inf]) == (math.inf, pytest.approx(math.nan, nan_ok=True))
    with pytest.raises(ValueError, match="no values"):
        metrics.mean_with_interval([])


# What is refused -----------------------------------------------------------------------------------------------------
MASKED = {
    "mse": metrics.background_mse,
    "psnr": metrics.background_psnr,
    "ssim": metrics.background_ssim,
    "lpips": lambda first, second, mask: metrics.background_lpips(first, second, mask, MeanDifference()),
    "truth": metrics.error_to_truth,
}
WRONG = {
    "one size, not 30 x 24 and 30 x 23 pixels": lambda first, mask: (first, first[1:], mask),
    "RGB, uint8": lambda first, mask: (first, first / 255, mask),
    r"not uint8 \[24, 30\]": lambda first, mask: (first[..., 0], first, mask),
    r"must be bool \[24, 30\], not bool \[24, 29\]": lambda first, mask: (first, first, mask[:, 1:]),
    r"must be bool \[24, 30\], not uint8": lambda first, mask: (first, first, mask.astype(np.uint8)),
    "leaves no background": lambda first, mask: (first, first, np.ones_like(mask)),
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("name", MASKED)
def test_wrong_pictures_and_masks_are_one_line_errors(pictures, mask, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        MASKED[name](*WRONG[message](pictures[0], mask))
    assert "\n" not in str(caught.value)


def test_ssim_needs_a_whole_window_of_background(pictures, mask):
    mask[:, ::10] = True
    with pytest.raises(ValueError, match="no 11 x 11 window"):
        metrics.background_ssim(*pictures, mask)
    with pytest.raises(ValueError, match="no 11 x 11 window"):
        metrics.background_ssim(pictures[0][:10], pictures[1][:10], np.zeros((10, WIDTH), bool))


def test_structure_distance_refuses_different_sizes(large):
    with pytest.raises(ValueError, match="one size"):
        metrics.structure_distance(large[0], large[1][1:], tiny_vit())
