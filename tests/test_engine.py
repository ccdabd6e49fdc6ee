"""Steps give the same whether they run one by one or as a recorded graph."""

import contextlib
import gc
import types
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import p2pz
from p2pz import editing, engine, memory
from p2pz.engine import MOST_GRAPHS, Courier, CudaGraph, Graphs, fixed_places, row
from p2pz.images import psnr
from p2pz.sampling import sample_latents
from p2pz.weights import MINI_FOLDER, mini_world

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def step(index, state, constants):
    """Reads a row of a table, and swaps and changes its state."""
    (a, b), (table, scale) = state, constants
    return b.clone(), a * scale + row(table, index)


def expected(a, b, table, scale, count):
    for i in range(count):
        a, b = b, a * scale + table[i]
    return a, b


@pytest.mark.parametrize("record", [False, pytest.param(True, marks=needs_gpu)])
def test_run(device, record):
    graphs = Graphs(record=record)
    for seed in range(2):  # the second run reuses the graph of the first, with other numbers
        torch.manual_seed(seed)
        a, b, table, scale = (torch.randn(shape, device=device) for shape in ((3, 2), (3, 2), (7, 3, 2), ()))
        for count in (1, 5):
            done = graphs.run("test", step, [a, b], [table, scale], count, "testing", False)
            for result, wanted in zip(done, expected(a, b, table, scale, count), strict=True):
                assert torch.equal(result, wanted)
        assert torch.equal(graphs.call("sum", lambda a, b: [a + b], [a, b])[0], a + b)
    assert len(graphs.graphs) == (2 if record else 0)


@pytest.mark.parametrize("record", [False, pytest.param(True, marks=needs_gpu)])
def test_run_reads_large_tables_row_by_row(device, record):
    def add(index, state, constants):
        scale, small, large = constants
        return [state[0] * scale + small + 2 * large]

    graphs, tables = Graphs(record=record), [torch.randn(6, 3, device=device), torch.randn(6, 3, device=device)]
    for scale in (0.5, 2.0):
        for first, count in ((0, 6), (2, 3)):
            state, scales = torch.ones(3, device=device), torch.tensor(scale, device=device)
            done = graphs.run("add", add, [state], [scales], count, "testing", False, first=first, tables=tables)[0]
            for i in range(first, first + count):
                state = state * scale + tables[0][i] + 2 * tables[1][i]
            assert torch.allclose(done, state)
    assert len(graphs.graphs) == record


class Keeping(Graphs):
    """Holds the functions that it is given, as recorded graphs do."""

    def run(self, kind, step, *arguments, **options):
        self.graphs.setdefault(kind, step)
        return super().run(kind, step, *arguments, **options)

    def call(self, kind, function, arguments):
        self.graphs.setdefault(kind, function)
        return super().call(kind, function, arguments)


def test_graphs_hold_neither_queries_nor_maps_of_an_edit(monkeypatch):
    """They live as long as the model, and would add up: a gigabyte for each size of image."""
    model = replace(p2pz.load(MINI_FOLDER, device="cpu"), graphs=Keeping())
    picture, tables = mini_world.render(mini_world.task_pair("cat->dog", 0)[0]), []
    invert = editing.invert_pictures

    def note(*arguments, queries, **options):
        made = invert(*arguments, queries=queries, **options)
        tables.extend(weakref.ref(table) for table in queries)
        return made

    monkeypatch.setattr(editing, "invert_pictures", note)
    for recorder in (None, p2pz.record()):
        p2pz.edit(picture, "cat->dog", model=model, steps=2, prompt="a cat", record=recorder, progress=False)
    p2pz.sample("a cat", model=model, steps=1, record=recorder, progress=False)
    maps = [weakref.ref(kept) for kept in recorder.runs[0].of("sample").values()]
    recorder = weakref.ref(recorder)
    gc.collect()
    assert len(model.graphs.graphs) >= 4 and len(tables) == 2 * len(model.unet.cross_attention_paths)
    assert recorder() is None and not any(ref() is not None for ref in [*tables, *maps])


def test_a_model_goes_with_its_last_name():
    """What it has recorded does not hold it: its memory is free at once, not when Python looks for circles."""
    model = replace(p2pz.load(MINI_FOLDER, device="cpu"), graphs=Keeping())
    picture, settings = mini_world.render(mini_world.task_pair("cat->dog", 0)[0]), {"steps": 2, "progress": False}
    p2pz.edit(picture, "cat->dog", model=model, prompt="a cat", blend=0.5, **settings)
    p2pz.edit(picture, "cat->dog", model=model, prompt="a cat", reference="denoised", **settings)
    p2pz.prompt_to_prompt(picture, "cat->dog", model=model, prompt="a cat", **settings)
    p2pz.sample("a cat", model=model, **settings)
    kinds, parts = len(model.graphs.graphs), [weakref.ref(part) for part in (model.unet, model.vae, model.text_encoder)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert kinds >= 8 and not any(part() is not None for part in parts)
    finally:
        gc.enable()


def test_recorded_work_is_of_one_kind_of_prediction():
    """Models made by `replace` share it."""
    model = replace(p2pz.load(MINI_FOLDER, device="cpu"), graphs=Keeping())
    picture, settings = mini_world.render(mini_world.task_pair("cat->dog", 0)[0]), {"steps": 1, "progress": False}
    kinds = []
    for prediction_type in ("epsilon", "v_prediction"):
        worker = replace(model, prediction_type=prediction_type)
        p2pz.edit(picture, "cat->dog", model=worker, prompt="a cat", **settings)
        p2pz.sample("a cat", model=worker, **settings)
        p2pz.prompt_to_prompt(picture, "cat->dog", model=worker, prompt="a cat", **settings)
        kinds.append({kind for kind in model.graphs.graphs if kind[0] not in ("mask", "encode", "decode", "text")})
    assert len(kinds[1]) == 2 * len(kinds[0]) >= 8


def test_texts_are_recorded_by_the_full_batch_and_one_by_one(device, assert_close):
    """And give what they give unrecorded."""
    noted = []

    class Noting(Graphs):
        def call(self, kind, function, arguments):
            noted.append((kind[0], len(arguments[0])))
            return super().call(kind, function, arguments)

    model = replace(p2pz.load(MINI_FOLDER, device=device, dtype=torch.float32), graphs=Noting())
    plain = replace(model, graphs=Graphs(record=False))
    sentences = 22 * [f"a photo of a {thing}" for thing in ("cat", "dog", "zebra")]
    for count, recorded in ((1, [1]), (2, []), (32, [32]), (65, [32, 32, 1]), (66, [32, 32])):
        noted.clear()
        assert_close(model.encode_text(sentences[:count]), plain.encode_text(sentences[:count]))
        assert noted == [("text", size) for size in recorded]


@needs_gpu
def test_results_survive_the_next_run(device):
    graphs = Graphs()
    first = graphs.call("double", lambda x: [2 * x], [torch.ones(3, device=device)])[0]
    second = graphs.call("double", lambda x: [2 * x], [torch.full((3,), 5.0, device=device)])[0]
    assert first.tolist() == [2.0] * 3 and second.tolist() == [10.0] * 3


@needs_gpu
def test_old_graphs_make_room(device):
    graphs = Graphs()
    for size in range(1, MOST_GRAPHS + 3):
        assert graphs.call("double", lambda x: [2 * x], [torch.ones(size, device=device)])[0].sum() == 2 * size
    assert len(graphs.graphs) == 2


@needs_gpu
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_edit_is_the_same_with_and_without_graphs(guidance):
    model = p2pz.load(MINI_FOLDER, device="cuda", dtype=torch.float32)
    picture = mini_world.render(mini_world.task_pair("cat->dog", 0)[0])
    settings = {"steps": 4, "guidance": guidance, "autocorrelation_strength": 20.0, "progress": False}
    models = [model, replace(model, graphs=Graphs(record=False))]
    recorded, plain = (p2pz.edit(picture, "cat->dog", model=each, **settings) for each in models)
    assert psnr(recorded.image, plain.image) > 60  # cuDNN's float32 gradients differ from run to run by rounding
    assert model.graphs.graphs and not models[1].graphs.graphs


def without_streams(monkeypatch):
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in (
        ("Stream", lambda: stream),
        ("current_stream", lambda: stream),
        ("stream", lambda _: contextlib.nullcontext()),
        ("device", lambda _: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)


class Rehearsal:
    """Stands in for `CudaGraph` on the CPU: a replay calls the function on the fixed places of its arguments."""

    def __init__(self, function, arguments, pool, stream):
        self.function, self.arguments = function, fixed_places(arguments)
        self.results = fixed_places(function(*self.arguments))

    load = CudaGraph.load

    def replay(self):
        for place, tensor in zip(self.results, self.function(*self.arguments), strict=True):
            place.copy_(tensor)
        return self.results


@pytest.fixture
def rehearsal(monkeypatch):
    """Graphs record on the CPU."""
    without_streams(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(engine, "stream_of", lambda graphs: torch.cuda.Stream())
    monkeypatch.setattr(engine, "CudaGraph", Rehearsal)
    monkeypatch.setattr(Graphs, "_records", lambda self, arguments: self.record)


@pytest.mark.parametrize("preset", ["p2pz", "diffusers"])
def test_recorded_work_rehearsed(preset, rehearsal):
    """All but the GPU's part in it: results are those of the steps one by one, also the second time."""
    model = p2pz.load(MINI_FOLDER, device="cpu")
    pictures, outcomes = [mini_world.render(mini_world.task_pair("cat->dog", i)[0]) for i in range(2)], []
    options = {"prompt": "a cat", "steps": 2, "preset": preset, "progress": False}
    for graphs in (Graphs(record=False), Graphs()):
        worker = replace(model, graphs=graphs)
        for picture in pictures:
            result = p2pz.edit(picture, "cat->dog", model=worker, **options)
            outcomes.append([np.array(result.image), np.array(result.reconstruction), result.inversion.latents])
    assert len(worker.graphs.graphs) >= 4
    for one_by_one, rehearsed in zip(outcomes[:2], outcomes[2:], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(one_by_one, rehearsed, strict=True))


def test_old_recordings_make_room_when_memory_runs_out(rehearsal, monkeypatch):
    graphs, tried = Graphs(), []

    class Tight(Rehearsal):
        def __init__(self, function, arguments, pool, stream):
            tried.append(len(graphs.graphs))
            if tried[-1] == 2 or arguments[0].numel() > 9:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(function, arguments, pool, stream)

    monkeypatch.setattr(engine, "CudaGraph", Tight)
    for size in (1, 2, 3):
        assert graphs.call("double", lambda x: [2 * x], [torch.ones(size)])[0].sum() == 2 * size
    assert tried == [0, 1, 2, 0] and len(graphs.graphs) == 1
    with pytest.raises(torch.OutOfMemoryError):  # there is nothing left to let go of
        graphs.call("double", lambda x: [2 * x], [torch.ones(10)])
    assert tried[4:] == [1, 0] and not graphs.graphs


def test_a_recording_that_fails_takes_all_others_along(rehearsal):
    """For in some versions of PyTorch it takes their work space."""
    graphs = Graphs()
    graphs.call("double", lambda x: [2 * x], [torch.ones(3)])
    with pytest.raises(ZeroDivisionError):
        graphs.call("divide", lambda x: [x / (1 // 0)], [torch.ones(3)])
    assert not graphs.graphs and graphs.pool is None


def test_recordings_of_two_models_share_no_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    first, second, third, fourth = (Graphs() for _ in range(4))
    streams = [engine.stream_of(first), engine.stream_of(second)]
    assert streams[0] is not streams[1]
    del first
    gc.collect()
    assert engine.stream_of(third) is streams[0] and engine.stream_of(fourth) not in streams


def test_what_inference_mode_recorded_serves_outside_as_well(rehearsal):
    picture, settings = mini_world.render(mini_world.task_pair("cat->dog", 0)[0]), {"prompt": "a cat", "steps": 1}
    with torch.inference_mode():
        model = replace(p2pz.load(MINI_FOLDER, device="cpu"), graphs=Graphs())
        p2pz.invert(picture, model=model, progress=False, **settings)
    count = len(model.graphs.graphs)
    result = p2pz.edit(picture, "cat->dog", model=model, progress=False, **settings)
    fresh = p2pz.load(MINI_FOLDER, device="cpu")
    other = p2pz.edit(
        picture, "cat->dog", model=replace(fresh, graphs=Graphs(record=False)), progress=False, **settings
    )
    assert count and np.array_equal(result.image, other.image)


@pytest.mark.parametrize("near", [True, False])
def test_rows_arrive_and_are_taken_away(near, monkeypatch):
    """The order of the copies, without streams; what streams do to it is for a GPU to tell."""
    without_streams(monkeypatch)
    places, lie = [torch.zeros(2), torch.zeros(3)], types.SimpleNamespace(is_cuda=near)
    stream = torch.cuda.Stream()
    incoming, outgoing = Courier(places, [lie, lie], stream), Courier(places, [lie, lie], stream)
    tables, kept = [[torch.randn(4, n) for n in (2, 3)] for _ in range(2)]
    before = [place.clone() for place in places]
    for i in range(4):
        incoming.fetch([table[i] for table in tables])
        assert all(torch.equal(place, old) for place, old in zip(places, before, strict=True))
        incoming.deliver()
        before = [place.clone() for place in places]
        outgoing.store([table[i] for table in kept])
    outgoing.finish()
    assert all(torch.equal(table, copy) for table, copy in zip(tables, kept, strict=True))
    nothing = Courier([], [], stream)
    nothing.fetch([])
    nothing.deliver()
    nothing.store([])


@needs_gpu
@pytest.mark.parametrize("record", [True, False])
def test_queries_in_host_memory_serve_as_well(record, monkeypatch):
    """Two images, so that a step's are parts of both."""
    model = p2pz.load(MINI_FOLDER, device="cuda", dtype=torch.float16)
    pictures, outcomes = [mini_world.render(mini_world.task_pair("cat->dog", i)[0]) for i in range(2)], []
    for place, most in (("cpu", memory.MOST_ON_THE_HOST), ("cuda", 0)):
        monkeypatch.setattr(memory, "MOST_ON_THE_HOST", most)
        tables = memory.tables_for_queries(model, (128, 128), 2, 4)
        assert all(table.device.type == place and table.is_pinned() == (place == "cpu") for table in tables)
        worker, recorder = replace(model, graphs=Graphs(record=record)), p2pz.record()
        options = {"steps": 4, "prompt": "a cat", "xa_guidance": 1.0, "progress": False, "record": recorder}
        results = p2pz.edit(pictures, "cat->dog", model=worker, **options)
        outcomes.append(([np.array(result.image) for result in results], [run.maps for run in recorder.runs]))
    (images, maps), (others, other_maps) = outcomes
    for image, other in zip(images, others, strict=True):
        assert np.array_equal(image, other)
    for run, other_run in zip(maps, other_maps, strict=True):
        for branch, layers in run.items():
            assert all(torch.equal(kept, other_run[branch][path]) for path, kept in layers.items())


@needs_gpu
def test_a_model_with_another_unet_does_not_replay_the_old_one(device):
    """Models made by `replace` share the recorded work."""
    model = p2pz.load(MINI_FOLDER, device=device)
    noise, states = torch.randn(1, 4, 32, 32, device=device), model.encode_text(["a photo of a cat"])
    other = replace(model, unet=p2pz.load(MINI_FOLDER, device=device).unet)
    torch.nn.init.zeros_(other.unet.conv_out.weight)
    first, second = (sample_latents(each, noise, None, states, 2, 1.0, False) for each in (model, other))
    assert not torch.allclose(first, second)
