"""The kernel benchmark runs, measures, and reports what failed; its CUDA part is driven by stand-ins."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "kernels.py"


@pytest.fixture(scope="module")
def bench(load_script):
    return load_script("kernels")


@pytest.fixture
def main(bench, monkeypatch):
    """`main(*arguments)` runs the script in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        bench.main()

    return run


@pytest.fixture
def cpu(bench):
    return bench.Setup("cpu", torch.float32)


def test_smoke_run(bench, main, tmp_path, capsys):
    """Every kernel and pass, with times and small errors for all that can run here."""
    main("--smoke", "--out", tmp_path / "new")
    results = json.loads((tmp_path / "new" / "kernels.json").read_text())
    assert not results["left_out"] and {row["met"] for row in results["goals"]} == {None}
    assert {record["kernel"] for record in results["cases"]} == set(bench.KERNELS)
    for record in results["cases"]:
        assert record["floor_us"] > 0 and record["copy"]["median_us"] > 0
        for name, entry in record["contenders"].items():
            if "SDPA c" in name or "SDPA e" in name:  # cuDNN and the efficient one need a GPU
                assert "RuntimeError" in entry["failed"] and entry["error"] is None
                continue
            assert 0 < entry["p10_us"] <= entry["median_us"] <= entry["p90_us"]
            assert (entry["error"] is None) == (name in record["context"])
            assert entry["error"] is None or 0 <= entry["error"] < 2e-3
    page = (tmp_path / "new" / "kernels.md").read_text()
    assert all(f"## {kernel}: forward\n" in page for kernel in bench.KERNELS)
    printed = capsys.readouterr().out
    assert printed.count("floor") == len(results["cases"]) and "not measured: self-attention" in printed


def test_only_and_quick(bench, main, tmp_path):
    main("--smoke", "--quick", "--only", "layer", "geglu", "--out", tmp_path)
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert {record["kernel"] for record in results["cases"]} == {"layer norm", "GEGLU", "GEGLU with its projection"}
    with pytest.raises(SystemExit, match="--only nothing is in none of the names: self-attention"):
        main("--smoke", "--only", "nothing", "--out", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 1 and "needs a CUDA GPU" in outcome.stderr.strip().splitlines()[-1]
    assert "Traceback" not in outcome.stderr and not (tmp_path / "out").exists()


def test_time_is_up(main, tmp_path):
    main("--smoke", "--seconds", "0", "--out", tmp_path)
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert not results["cases"] and all("not begun within 0 s" in text for text in results["left_out"])
    assert "## Left out" in (tmp_path / "kernels.md").read_text()


def test_shapes_of_the_goals_are_measured(bench):
    """At the sizes for a GPU; nothing is run."""
    cases = bench.all_cases(bench.Setup("cuda", torch.float16))
    mains = {(case.kernel, case.shape): case for case in cases if case.main}
    assert {kernel for kernel, _ in mains} == set(bench.KERNELS)
    assert [case.main for case in cases] == sorted((case.main for case in cases), reverse=True)
    for goal in bench.GOALS:
        assert goal.passed in mains[goal.kernel, goal.shape].work
    assert len({(case.kernel, case.shape) for case in cases}) == len(cases)
    assert any("compiled" in case.contenders for case in cases) and "flex" in cases[0].contenders
    assert not any("compiled" in case.contenders for case in cases if not case.main)


def test_bytes_and_operations(bench):
    """Against the tensors themselves, or by hand."""
    cases = {case.kernel: case for case in bench.all_cases(bench.Setup("cpu", torch.float16))}
    q, k, v = cases["cross-attention with maps"].inputs()
    results = bench.eager_attention_with_maps(q, k, v)
    size, operations = cases["cross-attention with maps"].work["forward"]
    assert size == sum(tensor.nbytes for tensor in (q, k, v, *results))
    assert operations == 2 * 2 * (2 * 2 * 16 * 77 * 8)
    *tensors, _ = cases["guidance"].inputs()
    assert cases["guidance"].work["forward"][0] == sum(tensor.nbytes for tensor in (*tensors, tensors[0]))
    x = cases["GEGLU"].inputs()[0]
    assert cases["GEGLU"].work[bench.BOTH][0] == 3 * x.nbytes
    x = cases["group norm + SiLU"].inputs()[0]
    assert cases["group norm + SiLU"].work["forward"][0] == 2 * x.nbytes
    x, weight, _ = cases["GEGLU with its projection"].inputs()
    size, operations = cases["GEGLU with its projection"].work["forward"]
    assert size == x.nbytes + weight.nbytes + 4 * x.nbytes and operations == 2 * 6 * 16 * 128
    x, merged, *_ = cases["enlarging convolution"].inputs()
    size, operations = cases["enlarging convolution"].work["forward"]
    assert size == x.nbytes + merged.nbytes + 4 * x.nbytes and operations == 2 * (4 * 4) * 16 * (4 * 16)
    x, weight, _ = cases["few channels"].inputs()
    size, operations = cases["few channels"].work["backward"]
    assert size == x.nbytes + weight.nbytes + 4 * x.nbytes and operations == 2 * 16 * 16 * (9 * 4)
    noise = cases["regulariser"].inputs()[0]
    assert cases["regulariser"].work["forward"][0] == 2 * noise.nbytes


def test_one_failing_contender_or_case_stops_nothing(bench, cpu, tmp_path):
    good = next(case for case in bench.all_cases(cpu) if case.kernel == "layer norm")

    def broken(*_):
        raise RuntimeError("no such | luck\nsecond line")

    def wrong(*inputs):
        return good.contenders["eager"](*inputs) * math.nan

    good.contenders |= {"broken": broken, "wrong": wrong}
    bad = bench.Case("1x1", broken, {}, {"forward": (1, 0)}, kernel="layer norm")
    results = bench.run([bad, good], cpu, tmp_path, "python", 60)
    assert "RuntimeError: no such | luck" in results["left_out"][0] and len(results["cases"]) == 2
    entries = results["cases"][0]["contenders"]
    assert entries["broken"]["failed"] == "RuntimeError: no such | luck"
    assert entries["wrong"]["median_us"] > 0 and entries["wrong"]["no_error"] == "ValueError: the error is nan"
    page = (tmp_path / "kernels.md").read_text()
    assert "- broken: RuntimeError: no such | luck (6x16)" in page and "- wrong: ValueError: the error is nan" in page


def test_warnings_explain_a_failure(bench):
    import warnings

    def fails():
        warnings.warn("head size 500 is too large (Triggered internally at x.cpp:3.)", stacklevel=1)
        warnings.warn("Flash attention has been runtime disabled.", stacklevel=1)
        raise RuntimeError("No available kernel.")

    assert bench.attempt(fails) == (None, "RuntimeError: No available kernel.; head size 500 is too large")
    assert bench.attempt(lambda x: x + 1, 1) == (2, None)


def test_gradients_are_those_of_autograd(bench, cpu):
    """All passes of a function agree, whatever the layout of its output; unused inputs get nothing."""

    def function(x, y, unused):
        return (x @ y).transpose(0, 1), (x * x).sum()

    x, y, unused = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    upstream = [(torch.randn(4, 4), torch.randn(()))]
    sets, wanted = [(x, y, unused)], (0, 1, 2)
    outputs = function(*sets[0])
    expected = torch.autograd.grad(outputs, (x, y), upstream[0])
    make = [bench.one_pass(name, function, sets, upstream, wanted) for name in ("forward", "backward", bench.BOTH)]
    for _ in range(2):
        forward, backward, both = (call(0) for call in make)
        assert all(map(torch.equal, forward, outputs)) and not any(tensor.requires_grad for tensor in forward)
        torch.testing.assert_close(backward, expected)
        torch.testing.assert_close(both, (*outputs, *expected))


def test_goals(bench):
    ours, eager = ({"median_us": us, "error": 1e-4, "how": "graph"} for us in (15.0, 75.0))
    places = {goal[:3] for goal in bench.GOALS}

    def judged(ours, eager):
        """The goals of cross-attention with maps."""
        common = {"floor_us": 5.0, "context": ["SDPA without maps"], "copy": {"median_us": 10.0}}
        common["contenders"] = {"ours": ours, "eager": eager, "SDPA without maps": eager | {"error": None}}
        records = [{"kernel": kernel, "shape": shape, "pass": name} | common for kernel, shape, name in places]
        rows = bench.judge(records)
        assert [row["goal"].split(" 2x8")[0] for row in rows[:2]] == ["cross-attention with maps"] * 2
        return [row["met"] for row in rows]

    assert judged(ours, eager)[:3] == [True, True, None]
    assert judged(ours | {"median_us": 15.1}, eager)[:2] == [False, False]
    assert judged(ours, eager | {"median_us": 70.0})[:2] == [True, False]
    assert judged(ours | {"error": 0.1}, eager)[:2] == [None, None]
    assert judged(ours, eager | {"how": "eager"})[:2] == [True, None]
    assert bench.judge([])[0] | {"goal": ""} == {"goal": "", "measured": None, "met": None}


def test_share_of_the_best(bench):
    times = {"SDPA flash": 10.0, "SDPA efficient": 9.0, "ours": 9.5}
    assert bench.of(*bench.SDPA)(times) == pytest.approx(9.5 / 9)
    with pytest.raises(ValueError):
        bench.of("SDPA cuDNN")(times)


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.01234, "0.0123"), (12.345, "12.3"), (123456.0, "123456")])
def test_number(bench, value, text):
    assert bench.number(value) == text


class FakeCuda:
    """Stands in for `torch.cuda`: events that read a clock which launches advance, graphs that call what was recorded.

    Attributes:
        now: seconds that have passed.
    """

    def __init__(self, monkeypatch):
        self.log, self.recording, self.strict, self.now = [], None, False, 0.0
        fake = {"Event": self.event, "CUDAGraph": self.new_graph, "graph": self.graph, "synchronize": lambda: None}
        fake |= {"graph_pool_handle": lambda: (0, 1), "current_stream": lambda: "side", "empty_cache": lambda: None}
        fake |= {"reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 100, "current_device": lambda: 0}
        fake |= {"max_memory_allocated": lambda: 350, "set_sync_debug_mode": self.set_sync_debug_mode}
        for name, function in fake.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def event(self, enable_timing):
        assert enable_timing and self.recording is None
        return FakeEvent(self)

    def new_graph(self):
        return FakeGraph()

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert pool == (0, 1) and stream == "side" and capture_error_mode == "thread_local" and not self.strict
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None

    def set_sync_debug_mode(self, mode):
        self.strict = mode == "error"

    def launch(self, name):
        """What a kernel launch would do."""
        if self.recording is not None:
            self.recording.launches.append(lambda: self.launch(name))
        else:
            self.log.append(name)
            self.now += 1e-4


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.time = self.cuda.now

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


class FakeGraph:
    def __init__(self):
        self.launches = []

    def replay(self):
        for launch in self.launches:
            launch()


def test_graphs_are_timed_in_turn(bench, monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def synchronising(i):
        if cuda.strict:
            raise RuntimeError("called a synchronizing CUDA operation")
        cuda.launch("sync")

    def uncapturable(i):
        if cuda.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        cuda.launch("uncapturable")

    def slowly(i):
        cuda.launch("slow")
        cuda.now += 0.03

    def failing(i):
        raise RuntimeError("no kernel")

    calls = {"first": lambda i: cuda.launch(f"first {i}"), "second": lambda i: cuda.launch(f"second {i}")}
    calls |= {"sync": synchronising, "uncapturable": uncapturable, "slow": slowly, "failing": failing}
    monkeypatch.setattr(bench, "TOTAL_US", 150_000)
    results = bench.time_side_by_side(calls, 3, "cuda")
    assert list(results) == list(calls) and results["failing"] == {"failed": "RuntimeError: no kernel"}
    for name in ("first", "second"):
        facts = results[name]
        assert (facts["how"], facts["calls"], facts["rounds"], facts["peak_bytes"]) == ("graph", 20, 20, 250)
        assert [facts[key] for key in ("p10_us", "median_us", "p90_us")] == pytest.approx([100] * 3)
        warm, replays = 3 + 20, (1 + 20) * 20
        assert sum(entry.startswith(name) for entry in cuda.log) == warm + replays
    ending = [entry for entry in cuda.log if entry[-1].isdigit()][-40:]  # the last round: all sets, one after another
    assert ending == [f"{name} {i % 3}" for name in ("first", "second") for i in range(20)]
    slow = results["slow"]
    assert results["sync"]["how"] == results["uncapturable"]["how"] == slow["how"] == "eager"
    assert "synchronizing" in results["sync"]["not_captured"] and "capturing" in results["uncapturable"]["not_captured"]
    assert (slow["calls"], slow["rounds"]) == (1, 4) and "not_captured" not in slow
    assert not cuda.strict
