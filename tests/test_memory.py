"""A memory budget: what is planned for it, that results stay the same, and that less memory is taken."""

import dataclasses
import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

import p2pz
from p2pz import cli, editing
from p2pz.attention import keep_queries_and_keys
from p2pz.directions import Direction
from p2pz.editing import map_gradient
from p2pz.engine import Graphs
from p2pz.images import psnr
from p2pz.memory import GIB, Plan, Work, keep_tables, place_of_queries, plan_for, tables_for_queries
from p2pz.model import _budget
from p2pz.unet import UNet, UNetConfig
from p2pz.vae import VAE, VAEConfig
from p2pz.weights import MINI_FOLDER, mini_world

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STABLE_DIFFUSION = Work(
    unet=round(1.60 * GIB), vae=round(0.16 * GIB), text_encoder=round(0.23 * GIB), height=64, width=64, channels=320,
    vae_channels=128, downsampling=8, element=2, rows=3, guided_rows=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pictures():
    return [mini_world.render(mini_world.task_pair("cat->dog", i)[0]) for i in range(3)]


@pytest.fixture(scope="module")
def cat_to_dog(model):
    return p2pz.direction("cat", "dog", model=model)


def slowness(plan):
    """Plans are given up for slower ones in this order: fewer images, then off-loading, then checkpoints."""
    return plan.checkpoint, plan.offload, -plan.images


def smallest(model, *work):
    """The model with the smallest budget that will do."""
    low, high = 0, 8 * GIB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_for(replace(model, max_memory=middle), *work)
            high = middle
        except ValueError:
            low = middle
    return replace(model, max_memory=high)


@pytest.mark.parametrize("guided_rows", [0, 2])
def test_the_fastest_plan_that_fits_is_taken(guided_rows):
    work = replace(STABLE_DIFFUSION, guided_rows=guided_rows)
    flags = [
        (offload, checkpoint) for offload in (False, True) for checkpoint in (False, True)[: 1 + (guided_rows > 0)]
    ]
    all_plans = [Plan(images, *both) for images in range(1, 9) for both in flags]
    least, chosen = min(map(work.needed, all_plans)), []
    for budget in range(least, 24 * GIB, GIB // 20):
        plan = work.plan(8, budget)
        assert slowness(plan) == min(slowness(other) for other in all_plans if work.needed(other) <= budget)
        assert budget - plan.room == max(work.working(plan))
        chosen.append(slowness(plan))
    assert chosen == sorted(chosen, reverse=True)  # more memory never makes it slower
    assert {both[::-1] for both in flags} == {speed[:2] for speed in chosen} and chosen[-1] == (False, False, -8)
    with pytest.raises(ValueError):
        work.plan(8, least - 1)


def test_estimates_grow_with_rows_and_sizes():
    plan = Plan(1)
    needed = STABLE_DIFFUSION.needed(plan)
    for change in ({"height": 96}, {"element": 4}, {"guided_rows": 3}, {"channels": 640}, {"unet": 2 * GIB}):
        assert replace(STABLE_DIFFUSION, **change).needed(plan) > needed
    assert STABLE_DIFFUSION.needed(Plan(2)) > needed > STABLE_DIFFUSION.needed(Plan(1, True))
    assert STABLE_DIFFUSION.needed(Plan(1, True)) > STABLE_DIFFUSION.needed(Plan(1, True, True))


def test_too_small_a_budget_is_one_line_before_any_work(model, pictures, cat_to_dog, monkeypatch):
    monkeypatch.setattr(UNet, "predict", lambda *_: pytest.fail("work was started"))
    monkeypatch.setattr(VAE, "encode", lambda *_: pytest.fail("work was started"))
    tight = replace(model, max_memory=GIB // 10)
    for start in (
        lambda: p2pz.edit(pictures, cat_to_dog, model=tight),
        lambda: p2pz.invert(pictures, model=tight),
        lambda: p2pz.sample("a photo of a cat", model=tight),
    ):
        with pytest.raises(ValueError, match=r"max_memory is 0.1 GiB, but .* 128 x 128 .* 0.5 GiB") as caught:
            start()
        assert "\n" not in str(caught.value)
    inversion = p2pz.Inversion(torch.zeros(4, 48, 16), torch.zeros(4, 48, 16), "a", 2, model.fingerprint)
    with pytest.raises(ValueError, match="an image of 64 x 192"):
        p2pz.edit(inversion, cat_to_dog, model=tight, reference="denoised")


def test_the_budget_is_checked():
    with pytest.raises(ValueError, match=r"runs on the CPU: leave it out"):
        p2pz.load(device="cpu", max_memory=4)
    for number in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="GiB above zero, not"):
            _budget(number, torch.device("cuda"))
    assert _budget(2.5, torch.device("cuda", 0)) == 5 * GIB // 2


class PeakMemory(TorchDispatchMode):
    """Adds up the storages that live, but for those of given modules; `peak` is the most bytes so far."""

    def __init__(self, *modules):
        super().__init__()
        self.live = self.peak = 0
        self.known = {x.untyped_storage()._cdata for module in modules for x in module.state_dict().values()}
        self.known |= {x.untyped_storage()._cdata for module in modules for x in module.buffers()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return results

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size


def test_checkpointed_gradient_is_the_same_with_less_memory(model, assert_close):
    latents, other = torch.randn(2, 2, 4, 32, 32)
    texts = model.encode_text(["a photo of a cat", "a photo of a dog"])
    conditioning, kept = model.condition(torch.tensor([501, 501]), texts), {}
    with torch.no_grad():
        model.predict(other, model.condition(torch.tensor([501, 501]), texts.flip(0)), keep_queries_and_keys(kept))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.unet.parameters()}
    gradients, saved_bytes, peaks = [], [], []
    for checkpoint in (False, True):
        worker, saved = replace(model, checkpoint=checkpoint), {}

        def pack(tensor, saved=saved):
            if tensor.untyped_storage().data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradients.append(map_gradient(worker, latents, conditioning, kept))
        saved_bytes.append(sum(saved.values()))
        with PeakMemory(model.unet) as memory:
            assert torch.equal(map_gradient(worker, latents, conditioning, kept), gradients[-1])
        peaks.append(memory.peak)
    assert_close(gradients[1], gradients[0], 1e-6)
    assert gradients[0].abs().max() > 0
    assert saved_bytes[1] < 0.3 * saved_bytes[0] and peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("cross_attention", [(False, True), (True, False), (False, False)])
def test_checkpoints_wherever_the_last_map_is(cross_attention, model, assert_close):
    config = UNetConfig(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention=cross_attention, heads=(2, 2),
        context_channels=16,
    )  # fmt: skip
    small = replace(model, unet=UNet(config).eval().requires_grad_(False))
    conditioning, kept = small.condition(torch.tensor([5]), torch.randn(1, 77, 16)), {}
    latents, other = torch.randn(2, 1, 4, 8, 8)
    with torch.no_grad():
        small.predict(other, conditioning, keep_queries_and_keys(kept))
    gradients = [
        map_gradient(replace(small, checkpoint=checkpoint), latents, conditioning, kept) for checkpoint in (False, True)
    ]
    assert_close(gradients[1], gradients[0], 1e-6)


@pytest.fixture
def largest_batch(monkeypatch):
    rows = []
    predict = UNet.predict
    monkeypatch.setattr(UNet, "predict", lambda self, x, *rest: rows.append(len(x)) or predict(self, x, *rest))

    def take():
        most = max(rows)
        rows.clear()
        return most

    return take


def test_an_edit_is_the_same_with_a_small_budget(model, pictures, cat_to_dog, largest_batch):
    directions = [cat_to_dog, p2pz.direction("cat", "cat with glasses", model=model)]
    settings = {"steps": 2, "guidance": 2.0, "gradient": "halves", "prompt": "a photo of a cat", "progress": False}
    free = p2pz.edit(pictures[:2], directions, model=model, **settings)
    assert largest_batch() == 4 * 2  # the inversion is the reference
    tight = smallest(model, (128, 128), 8, 3, 2)
    assert plan_for(tight, (128, 128), 8, 3, 2).checkpoint
    limited = p2pz.edit(pictures[:2], directions, model=tight, **settings)
    assert largest_batch() == 2
    for some, others in zip(free, limited, strict=True):
        for one, other in zip(some, others, strict=True):
            assert psnr(one.image, other.image) > 60 and psnr(one.reconstruction, other.reconstruction) > 60
            torch.testing.assert_close(one.inversion.latents, other.inversion.latents, rtol=0, atol=1e-4)


def test_inversions_and_samples_are_the_same_with_a_small_budget(model, pictures, largest_batch):
    settings = {"steps": 2, "prompt": "a photo of a cat", "preset": "diffusers", "progress": False}
    free = p2pz.invert(pictures, model=model, **settings)
    assert largest_batch() == 3
    limited = p2pz.invert(pictures, model=smallest(model, (128, 128), 1, 1), **settings)
    assert largest_batch() == 1
    for one, other in zip(free, limited, strict=True):
        torch.testing.assert_close(one.latents, other.latents, rtol=0, atol=1e-3)
    prompts = ["a photo of a cat", "a sketch of a dog", "a photo of a horse"]
    free = p2pz.sample(prompts, model=model, steps=2, progress=False)
    assert largest_batch() == 6
    limited = p2pz.sample(prompts, model=smallest(model, (128, 128), 1, 2), steps=2, progress=False)
    assert largest_batch() == 2
    assert min(psnr(*pair) for pair in zip(free, limited, strict=True)) > 60


def test_offloaded_parts_come_for_their_work_only(model, monkeypatch):
    """The GPU is played by the meta device, where nothing is computed but tensors know where they are."""
    with torch.device("meta"):
        unet = UNet(model.unet.config)
    away = replace(model, unet=unet, graphs=Graphs())
    parts = [model.vae, model.text_encoder]
    homes = [[x.data_ptr() for x in (*part.parameters(), *part.buffers())] for part in parts]
    away.graphs.graphs["edit"] = "recorded"
    monkeypatch.setattr("p2pz.model._finite", lambda results: True)  # nobody can tell
    assert away.encode_image(torch.zeros(2, 3, 64, 64)).is_meta
    assert not away.graphs.graphs  # they have made room
    assert away.decode_latents(torch.zeros(2, 4, 8, 8, device="meta")).is_meta
    assert away.encode_text(["a photo of a cat"]).is_meta
    with pytest.raises(ZeroDivisionError), away.at_work(model.vae) as graphs:
        assert all(x.is_meta for x in (*model.vae.parameters(), *model.vae.buffers()))
        assert graphs is not away.graphs and not graphs.record
        raise ZeroDivisionError
    assert homes == [[x.data_ptr() for x in (*part.parameters(), *part.buffers())] for part in parts]
    assert not any(x.is_meta for part in parts for x in (*part.parameters(), *part.buffers()))
    with model.at_work(model.vae) as graphs:  # one that is there already
        assert graphs is model.graphs


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a capacity of ...")


def test_running_out_of_memory_says_what_to_do(model, pictures, cat_to_dog, monkeypatch):
    monkeypatch.setattr(UNet, "predict", out_of_memory)
    settings = {"model": model, "progress": False, "prompt": "a photo of a cat"}
    for start in (
        lambda: p2pz.edit(pictures[0], cat_to_dog, **settings),
        lambda: p2pz.invert(pictures[0], **settings),
        lambda: p2pz.sample(**settings),
    ):
        with pytest.raises(torch.OutOfMemoryError, match=r"^[^\n]*max_memory[^\n]*--max-memory[^\n]*$") as caught:
            start()
        assert caught.value.__context__ is None  # which would hold the tensors of what failed


def test_the_command_line_keeps_what_is_finished(tmp_path, monkeypatch, capsys, pictures):
    for name, picture in zip("abc", pictures, strict=True):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    predict, calls = UNet.predict, []

    def fail_in_the_second(*args):
        calls.append(None)
        return out_of_memory() if len(calls) == 14 else predict(*args)  # each edit has 11

    monkeypatch.setattr(UNet, "predict", fail_in_the_second)
    images = [str(tmp_path / f"{name}.png") for name in "abc"]
    settings = ["--from", "cat", "--to", "dog", "--steps", "2", "--device", "cpu", "-o", f"{tmp_path}/out/"]
    assert cli.main(["edit", *images, *settings]) == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["a_dog.png", "c_dog.png"]
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert "b.png" in first and "--max-memory" in first and "1 of 3" in second


@pytest.mark.parametrize(
    "command", [("edit", "a.png", "--from", "a", "--to", "b"), ("sample", "a"), ("invert", "a.png")]
)
def test_the_command_line_has_a_budget(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    out = ["-o", "out.safetensors" if command[0] == "invert" else "out.png"]
    assert cli.main([*command, *out, "--max-memory", "4", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("p2pz: error: max_memory (--max-memory) limits the memory of a GPU")
    asked = {}
    monkeypatch.setattr(p2pz, "load", lambda source, **settings: asked.update(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([*command, *out, "--max-memory", "2.5"])
    assert asked["max_memory"] == 2.5


@pytest.mark.parametrize(
    ("kind", "gib", "budget", "images", "steps", "place"),
    [
        ("cuda", 80, None, 1, 50, "cpu"),
        ("cuda", 80, 4 * GIB, 1, 50, "cpu"),
        ("cuda", 80, None, 1, 100, "cpu"),
        ("cuda", 80, None, 2, 50, "cpu"),
        ("cuda", 80, None, 3, 50, "cuda"),  # 3.2 GiB
        ("cuda", 80, None, 2, 52, "cuda"),  # 2.2 GiB, for which PyTorch would pin 4.3
        ("cuda", 80, 4 * GIB, 3, 50, None),
        ("cuda", 12, None, 3, 50, None),
        ("cpu", 0, None, 1, 50, "cpu"),
        ("cpu", 0, None, 3, 50, None),
    ],
)
def test_where_the_queries_of_an_inversion_are_kept(kind, gib, budget, images, steps, place, monkeypatch):
    model, gpu = bare(kind, budget), SimpleNamespace(total_memory=gib * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    found = place_of_queries(model, (512, 512), images, steps)
    assert (found and found.type) == place


def bare(kind, budget=None):
    """What says how large Stable Diffusion 1.5 is."""
    with torch.device("meta"):
        parts = {"unet": UNet(UNetConfig()), "vae": VAE(VAEConfig())}
    facts = {"device": torch.device(kind), "dtype": torch.float16, "max_memory": budget, "graphs": Graphs()}
    return SimpleNamespace(**parts, **facts)


def test_the_next_edit_has_the_same_pinned_memory(monkeypatch):
    """For to pin it anew takes longer than half an edit."""
    model, empty = bare("cuda"), torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, pin_memory, **options: empty(shape, **options))
    first = tables_for_queries(model, (64, 64), 1, 3)
    keep_tables(model, first)
    assert not model.graphs.pinned  # it is not pinned
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    second = tables_for_queries(model, (64, 64), 1, 3)
    assert second[0] is not first[0]  # somebody may still use that
    keep_tables(model, second)
    third = tables_for_queries(model, (64, 64), 1, 3)
    assert all(one is other for one, other in zip(second, third, strict=True)) and not model.graphs.pinned
    keep_tables(model, third)
    other = tables_for_queries(model, (128, 64), 1, 3)
    assert other[0].shape == (3, 1, 128, 8, 40) and not model.graphs.pinned
    keep_tables(model, None)
    assert not model.graphs.pinned


def test_an_edit_keeps_its_pinned_memory(model, monkeypatch):
    kept = []
    monkeypatch.setattr("p2pz.editing.keep_tables", lambda worker, tables: kept.append((worker.graphs, tables)))
    picture = mini_world.render(mini_world.task_pair("cat->dog", 0)[0])
    p2pz.edit(picture, "cat->dog", model=model, steps=1, prompt="a cat", progress=False)
    ((graphs, tables),) = kept
    assert graphs is model.graphs and len(tables) == len(model.unet.cross_attention_paths)


@dataclasses.dataclass
class Parts:
    vae: torch.nn.Module
    text_encoder: torch.nn.Module
    device: torch.device
    graphs: Graphs = dataclasses.field(default_factory=Graphs)
    max_memory: int = 1
    checkpoint: bool = False


def test_a_move_that_was_stopped_half_way_is_finished():
    two = [torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)) for _ in range(2)]
    parts = Parts(*two, torch.device("meta"))
    two[0][0].to("meta")  # memory ran out behind the first tensors
    Plan(1).apply(parts)
    assert all(parameter.device.type == "meta" for part in two for parameter in part.parameters())


def test_queries_are_computed_again_if_the_host_can_pin_no_memory(monkeypatch):
    asked, gpu, cpu = [], bare("cuda"), bare("cpu")

    def refuse(shape, pin_memory=False, **options):
        asked.append((shape, pin_memory))
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    assert tables_for_queries(gpu, (64, 64), 1, 3) is None
    assert asked == [((3, 1, 64, 8, 40), True)]
    with pytest.raises(RuntimeError):
        tables_for_queries(cpu, (64, 64), 1, 3)


@needs_gpu
def test_graphs_make_room_for_another(device):
    graphs = Graphs(room=0)
    for size in (1, 2, 1):
        assert graphs.call("double", lambda x: [2 * x], [torch.ones(size, device=device)])[0].sum() == 2 * size
        assert len(graphs.graphs) == 1


@pytest.fixture(scope="module")
def stable_diffusion():
    """Stable Diffusion 1.5 with random weights on the GPU, and the bytes that lay there before."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.manual_seed(0)
    text_config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            parts = [UNet(UNetConfig()), VAE(VAEConfig()), CLIPTextModel(text_config)]
    finally:
        torch.set_default_dtype(torch.float32)
    unet, vae, text_encoder = (
        part.half().eval().requires_grad_(False).to(memory_format=torch.channels_last) for part in parts
    )
    unet.fuse()
    mini = p2pz.load(MINI_FOLDER, device="cpu")  # its tokenizer serves
    folder = MINI_FOLDER.parent
    return replace(mini, folder=folder, unet=unet, vae=vae, text_encoder=text_encoder, graphs=Graphs()), before


@needs_gpu
@pytest.mark.parametrize(
    ("preset", "guided_rows", "plans"),
    [
        ("p2pz", 1, ((4.0, False, False), (3.1, True, False), (2.9, True, True))),
        ("diffusers", 2, ((4.2, False, False), (4.0, True, False), (3.0, True, True))),
    ],
)
def test_work_stays_within_the_budget(preset, guided_rows, plans, stable_diffusion, monkeypatch, assert_close):
    """Two images, inverted and edited at once without a budget, and one by one with ever smaller ones."""
    model, before = stable_diffusion
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each).resize((512, 512), Image.Resampling.BICUBIC) for each in noise]
    change = Direction(0.1 * torch.randn(77, 768), "cat", "dog", (1, 1), model.text_fingerprint)
    latents, edit_latents = [], editing.edit_latents
    monkeypatch.setattr(editing, "edit_latents", lambda *args: latents.append(edit_latents(*args)) or latents[-1])

    def run(budget):
        """Inversions, edits and reference of both images, `[2, 4, 64, 64]` each, and the peak in bytes."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        latents.clear()
        worker = replace(model, max_memory=budget, graphs=Graphs())
        options = {"preset": preset, "steps": 2, "prompt": "a photo of a cat", "progress": False}
        results = p2pz.edit(pictures, change, model=worker, **options)
        peak = torch.cuda.max_memory_reserved() - before
        worker.graphs.clear()
        inversions = torch.stack([result.inversion.latents for result in results])
        return [inversions, *(torch.cat(parts).cpu() for parts in zip(*latents, strict=True))], peak

    free, most = run(None)
    print(f"no budget: {most / GIB:.2f} GiB")
    for budget, offload, checkpoint in plans:
        plan = plan_for(replace(model, max_memory=int(budget * GIB)), (512, 512), 8, 3, guided_rows)
        assert (plan.images, plan.offload, plan.checkpoint) == (1, offload, checkpoint)
        limited, peak = run(int(budget * GIB))
        print(f"budget {budget:.1f} GiB: {peak / GIB:.2f} GiB")
        assert peak <= budget * GIB and peak < most
        for part, expected in zip(limited, free, strict=True):
            assert_close(part, expected, 0.02)
        homes = {part.device.type for part in (next(model.vae.parameters()), next(model.text_encoder.parameters()))}
        assert homes == {"cpu" if offload else "cuda"}
