"""What it costs to record and to change attention, beside the same work without.

    python bench/attention_cost.py --out results           # SD 1.5's shapes, random weights, one GPU; 100 s at most
    python bench/attention_cost.py --out results --mini    # the bundled model, on the CPU
    python bench/attention_cost.py --out results --smoke   # the same, tiny and once, to test the script

Parts:

- recording: the edit between latents with the default preset, as `p2pz.edit` does it after its inversion (on a GPU as
  CUDA graphs), keeping maps of edit and reference. "All maps" are those of every layer, token and step, the mean of the
  heads, float16, in host memory.
- recording, reference denoised: the same with the preset `diffusers`, whose reference has passes of its own.
- guidance: the gradient of the map guidance for both halves, as a graph on a GPU: as p2pz takes it (on a GPU by the
  fused kernel), and by plain torch through full maps. Memory is what the pass takes at most beside weights and inputs,
  not as a graph, and what it needs of the reference.
- forward: a forward pass of three rows, the reference and both halves of an edit, as a graph on a GPU: the arithmetic
  of recording or of a change, without the launches.
- hooks: an edit with the default preset and a hook, which runs without graphs and has passes for the reference, beside
  the edit without graphs; fewer steps.

Times are medians (quartiles) of whole calls in turn, in milliseconds for a step or a pass; ratios are medians of those
to the first row in the same turn.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # transformers would take kernels.py for the package `kernels`, which it probes for
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import torch
from torch import Tensor

import p2pz
from p2pz import changes
from p2pz.attention import (
    Attend,
    Hooks,
    Part,
    Site,
    hooks_by_parts,
    hooks_of,
    keep_queries_and_keys,
    plain,
    record_cross_attention,
)
from p2pz.editing import edit_latents, map_gradient
from p2pz.engine import Graphs
from p2pz.files import atomic_path
from p2pz.inversion import invert_latents
from p2pz.kernels import attend_with_probabilities, attention_probabilities
from p2pz.memory import tables_for_queries
from p2pz.presets import PRESETS, Settings
from p2pz.recording import record
from p2pz.unet import STABLE_DIFFUSION_1, Conditioning, UNet
from p2pz.weights import MINI_FOLDER

ALL_MAPS = "all maps, mean of the heads"
GOAL = 10  # percent of an edit's time, for recording these
STEP, TIMESTEP = torch.zeros(1, dtype=torch.int64), 481  # of passes outside a loop

Calls = dict[str, Callable[[], Any]]


@dataclass
class Setup:
    """A model, what it works on, and how long to measure.

    Attributes:
        model: the model.
        side: height and width of the latents.
        steps, hook_steps: of an edit, and of one with a hook.
        repeats: of each call.
        until: time (monotonic) after which nothing more is begun.
        facts: what was found besides times, by name of a call.
    """

    model: p2pz.Model
    side: int
    steps: int
    hook_steps: int
    repeats: int
    until: float

    def __post_init__(self):
        generator, device = torch.Generator().manual_seed(0), self.model.device
        texts = torch.randn(2, 1, 77, self.model.unet.config.context_channels, generator=generator)
        self.caption, self.edited = texts.to(device, self.model.dtype)
        self.edited = self.caption + self.edited
        self.noise = torch.randn(1, 4, self.side, self.side, generator=generator).to(device)
        self.region = torch.linspace(0.5, 1, self.side, device=device).expand(self.side, self.side)
        self.factors = torch.linspace(0.5, 1, 77, device=device)
        self.facts: dict[str, dict[str, float | None]] = {}
        self.inversions: dict[Settings, dict[str, Any]] = {}

    def inverted(self, settings: Settings) -> dict[str, Any]:
        """What an inversion leaves to an edit that takes it as the reference."""
        if settings.reference == "path" and settings not in self.inversions:
            side = self.side * self.model.vae.config.downsampling
            queries = tables_for_queries(self.model, (side, side), 1, settings.steps)
            generator = torch.Generator().manual_seed(0)
            path = invert_latents(self.model, self.noise, self.caption, settings, generator, False, queries=queries)
            self.inversions[settings] = {"path": path, "queries": queries}
        return self.inversions.get(settings, {})

    def edit(self, steps: int, preset: str = "p2pz", graphs: bool = True, **options: Any) -> Callable[[], Any]:
        """An edit and what it needs of the reference, as a call."""
        model = self.model if graphs else replace(self.model, graphs=Graphs(record=False))
        settings = replace(PRESETS[preset], steps=steps)
        options = self.inverted(settings) | options
        if "attend" in options:
            del options["queries"]  # a hook wants to see the reference's passes
        noise = options["path"][-1] if "path" in options else self.noise

        def call() -> Any:
            if options.get("recorder"):
                options["recorder"].clear()
            return edit_latents(model, noise, self.caption, None, self.edited, settings, False, **options)

        return call

    def condition(self, *texts: Tensor) -> Conditioning:
        made = self.model.condition(torch.tensor([TIMESTEP]), torch.cat(texts))
        return made._replace(shifts=made.shifts[0])

    def graph(self, name: str, function: Callable[[Tensor], list[Tensor]], latents: Tensor) -> Callable[[], Any]:
        """A function of latents as a call, on a GPU the replay of a graph."""
        return partial(self.model.graphs.call, ("attention cost", name), function, [latents])


def random_model(device: str, dtype: torch.dtype) -> p2pz.Model:
    """The bundled model around a UNet of Stable Diffusion 1.5's shapes with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet(STABLE_DIFFUSION_1).requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if name.endswith("to_q.weight"):
            parameter *= 4  # or the maps would be almost uniform
    unet = unet.to(dtype).to(memory_format=torch.channels_last).eval()
    unet.fuse()
    return replace(p2pz.load(MINI_FOLDER, device=device, dtype=dtype), unet=unet, graphs=Graphs())


# What is compared. The others are compared with the first of a part.


def hooks(setup: Setup) -> dict[str, Attend | Hooks]:
    def zeros(site: Site) -> Tensor:
        return torch.zeros(site.height * site.width, 77, device=setup.noise.device)

    same = changes.with_probabilities(lambda probabilities, site: probabilities)
    return {
        "the default, as a hook": lambda q, k, v, site: plain(q, k, v, site),
        "with_probabilities": same,
        "with_probabilities, cross-attention only": changes.only(changes.where(kind="cross"), same),
        "replace_maps": changes.replace_maps(),
        "refine_maps": changes.refine_maps(setup.factors),
        "reweight_maps": changes.reweight_maps(setup.factors),
        "confine_tokens": changes.confine_tokens(dict.fromkeys(range(1, 77), setup.region)),
        "share_keys_and_values": changes.share_keys_and_values(),
        "inject_queries_and_keys": changes.inject_queries_and_keys(),
        "guide_towards": changes.guide_towards(zeros),
        "inject_features": Hooks(features=changes.only("up_blocks.1.resnets.1", changes.inject_features())),
    }


def recording(setup: Setup) -> tuple[Calls, int]:
    recorders = {
        "nothing": None,
        ALL_MAPS: record(max_gib=16),
        "the same, left on the device": record(host=False, max_gib=16),
        "one token": record(tokens=[5]),
        "every fifth step": record(steps=range(0, setup.steps, 5), max_gib=16),
        "the middle layer": record("mid_block"),
        "all maps, every head": record(per_head=True, max_gib=16),
    }
    return {name: setup.edit(setup.steps, recorder=recorder) for name, recorder in recorders.items()}, setup.steps


def recording_denoised(setup: Setup) -> tuple[Calls, int]:
    recorders = {"nothing": None, ALL_MAPS: record(max_gib=16)}
    return {name: setup.edit(setup.steps, "diffusers", recorder=each) for name, each in recorders.items()}, setup.steps


def materialised_gradient(
    model: p2pz.Model, latents: Tensor, conditioning: Conditioning, reference: dict[str, Tensor]
) -> Tensor:
    """What `map_gradient` gives, by autograd through full maps."""
    losses: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.kind == "self":
            return plain(q, k, v, site)
        maps = attention_probabilities(q, k)
        losses.append((maps - reference[site.path]).square().sum((2, 3)).mean(1))
        return attend_with_probabilities(maps, v)

    with torch.enable_grad():
        latents = latents.detach().requires_grad_()
        model.predict(latents, conditioning, attend)
        return torch.autograd.grad(torch.stack(losses).sum(), latents)[0]


def guidance(setup: Setup) -> tuple[Calls, int]:
    model, latents = setup.model, setup.noise.repeat(2, 1, 1, 1)
    caption, texts = setup.condition(setup.caption, setup.caption), setup.condition(setup.caption, setup.edited)
    kept, maps = {}, {}
    model.predict(latents, caption, keep_queries_and_keys(kept))
    model.predict(latents, caption, record_cross_attention(maps))
    parts = [Part(1, "edit", "negative"), Part(1, "edit", "conditional")]
    guide = hooks_by_parts(hooks_of(hooks(setup)["guide_towards"]), parts, STEP, [TIMESTEP], guiding=True)
    runs = {
        "as p2pz takes it": lambda x: [map_gradient(model, x, texts, kept)],
        "full maps in plain torch": lambda x: [materialised_gradient(model, x, texts, maps)],
        "as p2pz takes it, with guide_towards": lambda x: [map_gradient(model, x, texts, kept, guide)],
    }
    setup.facts |= {name: {"peak_mib": peak_mib(lambda run=run: run(latents))} for name, run in runs.items()}
    ours, theirs, _ = (run(latents)[0] for run in runs.values())
    setup.facts["full maps in plain torch"] |= {
        "kept_mib": sum(x.nbytes for x in maps.values()) / 2**20,
        "gradient_differs_by": ((ours - theirs).norm() / theirs.norm()).item(),
    }
    setup.facts["as p2pz takes it"]["kept_mib"] = sum(x.nbytes for pair in kept.values() for x in pair) / 2**20
    return {name: setup.graph(name, run, latents) for name, run in runs.items()}, 1


def forward(setup: Setup) -> tuple[Calls, int]:
    parts = [Part(1, "reference", "conditional"), Part(1, "edit", "negative"), Part(1, "edit", "conditional")]
    latents = setup.noise.repeat(3, 1, 1, 1)
    conditioning = setup.condition(setup.caption, setup.caption, setup.edited)

    def predict(attend: Attend | Hooks, latents: Tensor) -> list[Tensor]:
        return [setup.model.predict(latents, conditioning, attend)]

    def watch(choice: dict[str, Any], latents: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        return [*predict(record(**choice).watch(plain, parts, seen), latents), *seen]

    runs = {"no hook": partial(predict, plain)}
    choices = {ALL_MAPS: {}, "one token": {"tokens": [5]}, "all maps, every head": {"per_head": True}}
    runs |= {name: partial(watch, choice) for name, choice in choices.items()}
    for name, hook in hooks(setup).items():
        if name != "guide_towards":  # has nothing to do without a gradient
            runs[name] = partial(predict, hooks_by_parts(hooks_of(hook), parts, STEP, [TIMESTEP]))
    return {name: setup.graph(name, run, latents) for name, run in runs.items()}, 1


def hooked(setup: Setup) -> tuple[Calls, int]:
    options = {"no hook, no graphs": {}} | {name: {"attend": hook} for name, hook in hooks(setup).items()}
    steps = setup.hook_steps
    return {name: setup.edit(steps, graphs=False, **given) for name, given in options.items()}, steps


PARTS = {  # by importance
    "recording": recording,
    "guidance": guidance,
    "forward": forward,
    "hooks": hooked,
    "recording, reference denoised": recording_denoised,
}


# Measuring.


def peak_mib(call: Callable[[], Any]) -> float | None:
    """What a call takes at most beside what is there, on a GPU."""
    if not torch.cuda.is_available():
        return None
    call()  # libraries' work spaces come once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def seconds_of(call: Callable[[], Any], device: torch.device, count: int = 1) -> float:
    """Time of one of several calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def measure(setup: Setup, calls: Calls, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by call, once all are warm; what is late is left out."""
    device, times, counts = setup.model.device, {}, {}
    for name, call in calls.items():
        if time.monotonic() < setup.until:
            call()
            times[name], counts[name] = [], max(1, min(20, round(0.02 / seconds_of(call, device))))
    for i in range(setup.repeats):
        for name in times:
            if i == 0 or time.monotonic() < setup.until:
                times[name].append(1000 * seconds_of(calls[name], device, counts[name]) / steps)
    rows, first = {}, next(iter(times.values()), None)
    for name, own in times.items():
        quarters = statistics.quantiles(own, n=4, method="inclusive") if len(own) > 1 else own * 3
        rows[name] = {"ms": statistics.median(own), "q1": quarters[0], "q3": quarters[2], "repeats": len(own)}
        rows[name]["ratio"] = statistics.median(x / y for x, y in zip(own, first, strict=False))
    return rows


@torch.no_grad()
def run(setup: Setup, parts: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    results = {}
    for part in parts:
        if time.monotonic() < setup.until:
            rows = measure(setup, *PARTS[part](setup))
            results[part] = {name: row | setup.facts.pop(name, {}) for name, row in rows.items()}
            for name, row in rows.items():
                print(f"{part}: {name}: {row['ms']:.3g} ms, x {row['ratio']:.3f}", flush=True)
    return results


# Output.


def markdown(found: dict[str, Any]) -> str:
    """All results as a page."""
    lines = ["# What recording and changing attention costs", ""]
    lines += [f"{key}: {found[key]}  " for key in ("machine", "versions", "sizes", "date", "command")] + [""]
    parts = found["parts"]
    if ALL_MAPS in parts.get("recording", {}):
        extra = 100 * (parts["recording"][ALL_MAPS]["ratio"] - 1)
        verdict = "met" if extra <= GOAL else "**missed**"
        lines += [f"Recording {ALL_MAPS}, at every step: {extra:+.1f} % (goal: at most {GOAL} %, {verdict})."]
    for row in parts.get("guidance", {}).values():
        if "gradient_differs_by" in row:
            lines += [f"The two gradients of the guidance differ by {row['gradient_differs_by']:.2g} (relative)."]
    for part, rows in parts.items():
        heads = ["", "ms a pass" if part in ("guidance", "forward") else "ms a step", "ratio"]
        extras = [key for key in ("peak_mib", "kept_mib") if any(row.get(key) for row in rows.values())]
        heads += [{"peak_mib": "MiB at most", "kept_mib": "MiB of the reference"}[key] for key in extras]
        lines += ["", f"## {part.capitalize()}", "", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        for name, row in rows.items():
            cells = [name, f"{row['ms']:.3g} ({row['q1']:.3g}-{row['q3']:.3g})", f"{row['ratio']:.3f}"]
            cells += [f"{row[key]:.0f}" if row.get(key) else "" for key in extras]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "## How to read the tables", "", __doc__.split("\n\n", 2)[2]]).rstrip() + "\n"


def facts(setup: Setup) -> dict[str, str]:
    """Machine, software and sizes of a run."""
    device, dtype = setup.model.device, str(setup.model.dtype).removeprefix("torch.")
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton", "transformers")]
    sizes = [
        "bundled model" if device.type == "cpu" else "SD 1.5, random weights",
        f"{dtype}, latents {setup.side} x {setup.side}, one image",
        f"{setup.steps} steps ({setup.hook_steps} with hooks), guidance {PRESETS['p2pz'].guidance:g}",
    ]
    return {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
        "versions": ", ".join([f"p2pz {p2pz.__version__}", *versions, f"Python {platform.python_version()}"]),
        "sizes": ", ".join(sizes),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for attention_cost.json and .md")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--seconds", type=float, help="begin nothing later (default: 80 on a GPU)")
    parser.add_argument("--mini", action="store_true", help="the bundled model on the CPU: attention_cost_cpu.*")
    parser.add_argument("--smoke", action="store_true", help="the same, tiny and once, to test the script")
    args = parser.parse_args()
    cpu = args.mini or args.smoke
    if not cpu and not torch.cuda.is_available():
        sys.exit("bench/attention_cost.py needs a CUDA GPU; --mini and --smoke run on a CPU")
    until = began + (args.seconds or (3600 if cpu else 80))
    if cpu:
        model = p2pz.load(MINI_FOLDER, device="cpu", dtype=torch.float32)
        setup = Setup(model, *((8, 2, 1, 1) if args.smoke else (32, 10, 3, 5)), until)
    else:
        setup = Setup(random_model("cuda", torch.float16), 64, 20, 3, 5, until)
    found = facts(setup) | {"parts": run(setup, args.parts)}
    args.out.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".json", json.dumps(found, indent=1) + "\n"), (".md", markdown(found))):
        with atomic_path(args.out / f"attention_cost{'_cpu' * cpu}{ending}") as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
