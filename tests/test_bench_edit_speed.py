"""The benchmark of whole edits runs, keeps its results, and its contenders do the same work; graphs by stand-ins."""

import contextlib
import copy
import io
import json
import math
import subprocess
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from p2pz.attention import keep_queries_and_keys
from p2pz.editing import edit_latents, map_gradient
from p2pz.inversion import invert_latents
from p2pz.unet import UNetConfig
from p2pz.vae import VAEConfig

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "edit_speed.py"
TIMES = ("total_s", "invert_s", "edit_s", "guided_step_ms", "unet_ms", "regulariser_ms", "encode_s", "decode_s")


@pytest.fixture(scope="module")
def bench(load_script):
    return load_script("edit_speed")


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory):
    """A checkpoint for smoke runs."""
    setup = bench.Setup(str(tmp_path_factory.mktemp("weights")), "cpu", "float32")
    bench.write_checkpoint(bench.SHAPES["smoke"], setup)
    return Path(setup.folder)


@pytest.fixture(scope="module")
def main(bench, folder):
    """`main(*arguments)` runs the script in this process, on the CPU; gives what it printed."""

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sys, "argv", [str(SCRIPT), "--smoke", "--checkpoint-dir", str(folder), *map(str, arguments)])
            bench.main()
        return printed.getvalue()

    return run


@pytest.fixture(scope="module")
def smoke(bench, main, tmp_path_factory):
    """Results of all parts with all contenders; only p2pz really starts a process, where compiling fails."""
    started = subprocess.run

    def run(command, **options):
        if command[2:4] != ["--child", "p2pz"]:
            with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "compile", lambda function, **_: failing)
                bench.child(command[3], bench.Setup(**json.loads(command[4])))
            return types.SimpleNamespace(returncode=0, stdout=printed.getvalue())
        return started(command, **options)

    out = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        printed = main("--out", out)
    return types.SimpleNamespace(out=out, printed=printed, results=json.loads((out / "edit_speed.json").read_text()))


def failing(*_, **__):
    raise RuntimeError("no such\nluck")


@pytest.fixture
def setup(bench, folder):
    return bench.Setup(str(folder), "cpu", "float32", steps=3, smoke=True)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def test_all_rows_are_there(bench, smoke):
    results = smoke.results
    assert results["skipped"] == {} and results["versions"]["torch"] == torch.__version__
    assert results["sizes"] | {"steps": 3, "latents": 8, "picture": 64, "dtype": "float32"} == results["sizes"]
    for name in ("p2pz", "diffusers", "compiled"):
        rows = results[name]
        assert set(TIMES) | {"start_up_s", "peak_gib", "images_per_second", "fraction_of_limit"} <= set(rows)
        assert set(rows["unet_ms"]) == {"1", "2", "4"} and set(rows["images_per_second"]) == {"1", "4", "8"}
        for row in (*TIMES, "start_up_s", "load_s", "load_host_gib"):
            values, spreads = rows[row], rows["spread"][row]
            for key in values if isinstance(values, dict) else [None]:
                value, spread = (values, spreads) if key is None else (values[key], spreads[key])
                assert 0 < spread["q1"] <= value <= spread["q3"] and spread["repeats"] >= 1
    assert results["p2pz"]["sample_s"] > 0 and results["diffusers"]["sample_s"] > 0
    default = {"total_s", "guided_step_ms", "invert_s", "edit_s", "images_per_second", "start_up_s"}
    assert default <= set(results["p2pz_default"])
    assert 0.05 < results["p2pz"]["load_host_gib"] < results["p2pz"]["peak_gib"]["host"] < 20


def test_what_compiled_adds_for_the_regulariser_is_its_row_until_it_is_timed(smoke, bench):
    results = copy.deepcopy(smoke.results)
    rows, steps = results["compiled"], results["sizes"]["steps"]
    timed = rows["regulariser_ms"]
    bench.derive(results)
    assert rows["regulariser_ms"] == timed
    del rows["regulariser_ms"], rows["runs"]["regulariser"]
    bench.derive(results)
    assert rows["regulariser_ms"] == pytest.approx(1000 * rows["facts"]["regulariser_added_s"] / steps)


def test_rows_are_consistent(smoke):
    for name in ("p2pz", "diffusers", "compiled"):
        rows, limit = smoke.results[name], smoke.results["limit"]
        for row in ("total_s", "edit_s", "guided_step_ms", "start_up_s", "load_s"):
            assert 0 < rows[row] < math.inf
        assert rows["images_per_second"]["1"] == pytest.approx(1 / rows["total_s"])
        least = 2 * limit["forward_flop"] / limit["matrix_flop_per_s"]
        assert rows["fraction_of_limit"]["unet 2"] == pytest.approx(1e3 * least / rows["unet_ms"]["2"])
        assert rows["start_up_s"] > rows["load_s"]  # of the same process
    halves, one = (smoke.results[name] for name in ("p2pz", "p2pz_default"))
    work = [rows["fraction_of_limit"]["guided step"] * rows["guided_step_ms"] for rows in (one, halves)]
    both = limit["forward_flop"] + limit["forward_and_gradient_flop"]  # for each half
    assert work[0] / work[1] == pytest.approx(1 - limit["forward_and_gradient_flop"] / (2 * both))
    rows = smoke.results["compiled"]
    assert rows["invert_s"] > rows["facts"]["regulariser_added_s"] > 3 * 0.2 * rows["regulariser_ms"] / 1e3
    assert set(rows["facts"]["compile_s"]) == {"forward 1", "forward 2", "forward 4", "gradient 2"}
    assert "compile_failed" not in rows["facts"]


def test_loading_is_beside_the_size_of_the_weights(smoke, folder):
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**30
    assert 0.95 * size < smoke.results["weights_gib"] < size
    page = (smoke.out / "edit_speed.md").read_text()
    assert f"The weights take {smoke.results['weights_gib']:.4g} GiB on disk." in page


def test_p2pz_agrees_with_diffusers(smoke):
    found = smoke.results["agreement"]["float32"]
    for key in ("inversion", "edit_from_the_same_noise", "inversion_and_edit"):
        assert 0 < found[key] < 1e-3
        assert found[key] < found["for_scale_edit_from_unguided_edit"] / 50 < found["for_scale_edit_from_reference"]


def test_page_and_plot(bench, smoke):
    page = (smoke.out / "edit_speed.md").read_text()
    assert all(f"| {row}" in page for row in bench.ROWS) and "## Not measured" not in page
    ratio = smoke.results["diffusers"]["total_s"] / smoke.results["p2pz"]["total_s"]
    line = next(line for line in page.splitlines() if line.startswith("| total_s"))
    assert line.split(" | ")[5] == bench.number(ratio)  # without the star of another run
    assert all(f"{part}, " in smoke.printed for part in bench.PARTS)
    with Image.open(smoke.out / "edit_speed.png") as picture:
        assert picture.width == 1200 and len(picture.convert("RGB").getcolors(10_000)) > 4


def test_another_run_adds_its_results(smoke, main, tmp_path):
    path = tmp_path / "edit_speed.json"
    path.write_text(json.dumps(smoke.results | {"date": "2020-01-01", "skipped": {"decode compiled": "late"}}))
    main("--out", tmp_path, "--only", "compiled", "--parts", "decode")
    results = json.loads(path.read_text())
    changed = {"spread", "runs", "decode_s", "facts", "fraction_of_limit"}
    for name in ("p2pz", "diffusers", "compiled"):
        for row in smoke.results[name].keys() - changed:
            assert results[name][row] == smoke.results[name][row]
    assert results["skipped"] == {} and results["p2pz"]["runs"] == smoke.results["p2pz"]["runs"]
    assert results["compiled"]["facts"] == smoke.results["compiled"]["facts"]
    assert "--only compiled" in results["compiled"]["runs"]["decode"]["command"]
    assert results["compiled"]["runs"]["total"] == smoke.results["compiled"]["runs"]["total"]
    rows = {line.split(" | ")[0]: line for line in path.with_suffix(".md").read_text().splitlines()}
    assert rows["| decode_s"].endswith("\\* |") and "\\*" not in rows["| encode_s"]
    main("--out", tmp_path, "--only", "p2pz", "--parts", "batches")
    rows = {line.split(" | ")[0]: line for line in path.with_suffix(".md").read_text().splitlines()}
    assert rows["| images_per_second 4"].endswith("\\* |") and "\\*" not in rows["| images_per_second 1"]


@pytest.mark.parametrize("earlier", [{"device": {"name": "another"}}, {"sizes": {}}, None])
def test_results_of_another_device_are_not_mixed(smoke, main, tmp_path, earlier):
    path = tmp_path / "edit_speed.json"
    path.write_text("no JSON" if earlier is None else json.dumps(smoke.results | earlier))
    printed = main("--out", tmp_path, "--only", "p2pz", "--parts", "decode")
    assert "replaced" in printed
    results = json.loads(path.read_text())
    assert (
        "total_s" not in results["p2pz"] and results["p2pz"]["decode_s"] > 0 and "decode_s" not in results["diffusers"]
    )


def test_what_does_not_fit_the_time_is_recorded(bench, main, tmp_path):
    printed = main("--out", tmp_path, "--seconds", "0")
    results = json.loads((tmp_path / "edit_speed.json").read_text())
    for part in bench.PARTS:
        names = [name for name in bench.CONTENDERS if bench.takes(name, part)]
        for name in names:
            reasons = [why for key, why in results["skipped"].items() if key.startswith(f"{part} {name}")]
            assert reasons and all("not begun within --seconds" in reason for reason in reasons)
            assert bench.PARTS[part].row not in results[name] and part not in results[name]["runs"]
    assert "not measured: total p2pz: TimeoutError: not begun" in printed
    assert "## Not measured" in (tmp_path / "edit_speed.md").read_text()


def test_one_failing_contender_or_part_stops_nothing(bench, main, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.Diffusers, "__init__", failing)
    monkeypatch.setattr(bench.P2pz, "encode", lambda self: failing)
    main("--out", tmp_path, "--only", "p2pz", "diffusers", "--parts", "decode", "encode")
    results = json.loads((tmp_path / "edit_speed.json").read_text())
    assert results["p2pz"]["decode_s"] > 0 and "encode_s" not in results["p2pz"]
    assert set(results["skipped"]) == {"decode diffusers", "encode diffusers", "encode p2pz"}
    assert set(results["skipped"].values()) == {"RuntimeError: no such"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "unet", "speed"], "--parts speed is not one of total, guided, unet"),
        (["--only", "p2p"], "--only p2p is not one of p2pz, diffusers, compiled"),
        (["--model", "nowhere"], "--model nowhere is no folder in the diffusers layout"),
    ],
)
def test_mistakes_are_told_in_a_line(main, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as caught:
        main("--out", tmp_path / "out", *arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="needs a CUDA GPU; --mini and --smoke run on a CPU"):
        bench.main()
    assert not (tmp_path / "out").exists()


def test_the_bundled_model(main, tmp_path):
    main("--mini", "--out", tmp_path, "--parts", "invert")
    results = json.loads((tmp_path / "edit_speed_cpu.json").read_text())
    assert results["p2pz"]["invert_s"] > 0 and results["diffusers"]["invert_s"] > 0
    assert (
        results["sizes"]["shapes"] == "mini" and results["sizes"]["latents"] == 32 and not results["compiled"]["runs"]
    )
    assert results["skipped"] == {} and {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}


def test_operations_of_stable_diffusion(bench, tmp_path):
    """0.803 TFLOP for an image of 512 x 512."""
    for name, config in (
        ("unet", bench.SHAPES["sd15"].unet.to_json()),
        ("vae", bench.SHAPES["sd15"].vae.to_json()),
        ("scheduler", {}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    limits = bench.limits(bench.Setup(str(tmp_path), "cpu", "float32", smoke=True))
    assert limits["forward_flop"] == pytest.approx(0.803e12, rel=1e-3)
    assert 1.8 < limits["forward_and_gradient_flop"] / limits["forward_flop"] < 2.5


def test_contenders_do_the_same_work(bench, setup):
    """UNet, guided step, regulariser, decoding and encoding of one input."""
    ours, theirs, graphs = bench.P2pz(setup), bench.Diffusers(setup), bench.Compiled(setup)
    graphs.net = graphs.plain
    for part in ("guided", "regulariser", "encode", "decode"):
        assert error(getattr(ours, part)()(), getattr(theirs, part)()()) < 1e-4
    assert error(ours.unet(2)(), theirs.unet(2)()) < 1e-4 and error(graphs.unet(2)(), theirs.unet(2)()) < 1e-5
    assert error(ours.contexts, theirs.contexts) < 1e-6
    call = theirs.guided()
    assert torch.equal(call(), call())  # the maps that a step takes away are put back
    unguided = bench.P2pz(setup).unet(2)()
    assert error(ours.guided()(), unguided) > 1e-3


def test_the_default_follows_the_conditional_half(bench, setup):
    """Both halves are moved by its gradient, as in an edit."""
    ours = bench.P2pz(setup, "p2pz")
    assert ours.settings.gradient == "conditional"
    noise, reference = setup.noise(dtype=torch.float32), {}
    caption, edited = (ours.conditioning(states) for states in ours.contexts.split(1))
    ours.model.predict(noise, caption, keep_queries_and_keys(reference))
    moved = noise - setup.strength * map_gradient(ours.model, noise, edited, reference)
    expected = ours.model.predict(torch.cat([moved, moved]), ours.conditioning(ours.contexts))
    assert error(ours.guided()(), expected) < 1e-5 < 1e-3 < error(ours.guided()(), ours.unet(2)())


def test_stable_diffusion_xl(bench, main, tmp_path, monkeypatch):
    """Written, measured and counted; only by p2pz."""
    unet = UNetConfig(4, 4, 8, (64, 64, 128), 2, (False, True, True), (1, 1, 2), 160, True, 32, (1, 1, 2), 128, 16)
    vae = VAEConfig((16, 32, 32, 32), 1, norm_groups=16, sample_size=64, scaling_factor=0.13025)
    small = bench.Shapes(unet, vae, (32, 2, 2, "quick_gelu"), text_2=(128, 3, 2, "gelu"))
    monkeypatch.setitem(bench.SHAPES, "smoke", small)
    main("--shapes", "sdxl", "--checkpoint-dir", tmp_path / "weights", "--out", tmp_path, "--parts", "total", "unet")
    results = json.loads((tmp_path / "edit_speed.json").read_text())
    assert results["skipped"] == {} and results["p2pz_default"]["total_s"] > 0 and results["p2pz"]["unet_ms"]["4"] > 0
    assert "total_s" not in results["diffusers"] and results["limit"]["forward_flop"] > 0
    size = sum(path.stat().st_size for path in (tmp_path / "weights").rglob("*.safetensors")) / 2**30
    assert 0.95 * size < results["weights_gib"] < size


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_compiled_walks_the_steps_of_an_edit(bench, tmp_path, monkeypatch, prediction):
    """Where p2pz leaves out what compiled leaves out, the regulariser and the guidance, their latents are the same."""
    setup = bench.Setup(str(tmp_path), "cpu", "float32", steps=3, smoke=True)
    bench.write_checkpoint(bench.SHAPES["smoke"]._replace(prediction=prediction), setup)
    assert setup.prediction == prediction and setup.strength == (0.1 if prediction == "epsilon" else 0.01)
    monkeypatch.setattr(bench.Setup, "strength", 0.0)
    ours, graphs = bench.P2pz(setup), bench.Compiled(setup)
    graphs.net = graphs.plain
    settings = replace(ours.settings, autocorrelation_strength=0.0, kl_strength=0.0, xa_guidance=0.0)
    start, (caption, edited) = ours.encode()(), ours.contexts.split(1)
    noise = invert_latents(ours.model, start, caption, settings, bench.seeded(), False)[-1]
    assert error(graphs.invert()(start), noise) < 1e-4 < 0.1 < error(start, noise)
    edit, reference = edit_latents(ours.model, noise, caption, None, edited, settings, False)
    assert error(graphs.edit()(noise), edit) < 1e-4 < 1e-2 < error(reference, edit)
    assert graphs.total()().size == (64, 64)


def test_where_compiling_fails_graphs_alone_are_timed(bench, setup, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: failing)
    graphs = bench.Compiled(setup)
    assert error(graphs.unet(1)(), bench.Diffusers(setup).unet(1)()) < 1e-5
    assert graphs.facts["compile_failed"] == "forward 1: RuntimeError: no such; graph alone"


def test_a_checkpoint_is_kept_unless_other_shapes_are_wanted(bench, folder, setup, tmp_path):
    made, file = bench.SHAPES["smoke"], "unet/diffusion_pytorch_model.safetensors"
    before = (folder / file).stat().st_mtime_ns
    bench.write_checkpoint(made, setup)
    assert (folder / file).stat().st_mtime_ns == before
    other = replace(setup, folder=str(tmp_path))
    bench.write_checkpoint(made, other)
    assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    bench.write_checkpoint(made._replace(unet=replace(made.unet, linear_projection=True)), other)
    assert (tmp_path / file).read_bytes() != (folder / file).read_bytes()


def test_overflowing_weights_are_refused(bench, setup, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.Setup, "noise", lambda self: torch.full((1, 4, 8, 8), torch.inf))
    with pytest.raises(ValueError, match="the random weights overflow"):
        bench.write_checkpoint(bench.SHAPES["smoke"], replace(setup, folder=str(tmp_path)))
    assert not (tmp_path / "made_for.json").exists()


def test_times_are_of_one_call_in_turn(bench, setup, monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        order.append(name)
        clock[0] += seconds

    calls = {"a": lambda: call("a", 0.01), "b": lambda: call("b", 1.0), "c": failing}
    plain = replace(setup, smoke=False)
    times, failures = bench.time_in_turn(calls, False, plain, float("inf"))
    assert times["a"] == pytest.approx([0.01] * 20) and times["b"] == pytest.approx([1.0] * 20)
    assert failures == {"c": "RuntimeError: no such"} and set(times) == {"a", "b"}
    assert order[-6:] == ["a"] * 5 + ["b"]
    order.clear()
    times, _ = bench.time_in_turn(calls, True, plain, float("inf"))
    assert order == ["a", "b"] * 3 and len(times["a"]) == 3
    times, _ = bench.time_in_turn(calls, True, plain, 0.0)  # late: what has begun gets one repeat
    assert [len(found) for found in times.values()] == [1, 1]


def test_graphs_are_captured_warm_and_replayed(bench, monkeypatch):
    log = []

    class Graph:
        def replay(self):
            log.append("replay")

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    @contextlib.contextmanager
    def context(*arguments, **options):
        log.append(options or "side stream")
        yield

    fakes = {"CUDAGraph": Graph, "Stream": Stream, "stream": context, "graph": context}
    fakes |= {"synchronize": lambda: log.append("synchronise"), "current_stream": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    class Input:
        pass

    def capture_with(held):
        """A replay for a call that alone holds an input."""
        return bench.captured(lambda: (log.append("call"), held) and "output", "cuda")

    held = Input()
    alive, call = weakref.ref(held), capture_with(held)
    del held
    assert call() == call() == "output" and alive() is not None
    (capture,) = (entry for entry in log if isinstance(entry, dict))
    assert capture["capture_error_mode"] == "thread_local" and isinstance(capture["stream"], Stream)
    before, after = log[: log.index(capture)], log[log.index(capture) + 1 :]
    assert before.count("call") > 0 and after == ["call", "replay", "replay"]
