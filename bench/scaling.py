"""How `p2pz edit` of a folder scales over the GPUs of a machine: strong scaling, the same folder for every number.

    python bench/scaling.py --out results                   # 1, 2 and 4 GPUs, SD 1.5's shapes, random weights
    python bench/scaling.py --out results --model FOLDER    # a checkpoint in the diffusers layout
    python bench/scaling.py --out results --mini            # the bundled model, tiny, 2 processes, on the CPU

Every run is `torchrun --nproc-per-node N -m p2pz.cli edit ...`, for one GPU too, into a fresh folder. Before them a run
over two batches, not counted, compiles the kernels. A process edits every N-th picture, in batches, and has one thread.

Rows, medians of the repeats:

- wall_s: the whole command, with the start of all processes. speed_up: that of one GPU / that of N.
- images_per_second: of each process, the pictures after its first batch / the time from the end of that batch to its
  last picture, as the files' dates tell; summed over the processes.
- efficiency: images_per_second / (N x images_per_second of one GPU).
- start_up_s: from the command to the beginning of the first batch: Python, imports, loading, the direction.
  first_batch_s: that batch, with the recording of CUDA graphs. Both of the slowest process.
- lowest_psnr: of all pictures against the same ones of the first run; "equal" if no pixel differs.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

if __name__ == "__main__":  # transformers would take kernels.py for the package `kernels`, which it probes for
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch
from PIL import Image

from p2pz import jobs
from p2pz.files import atomic_path
from p2pz.images import psnr
from p2pz.weights import MINI_FOLDER, mini_world

LIMIT_S = 900  # of a run, after which it is ended


def sibling(name: str) -> ModuleType:
    """A script of this folder as a module, though the folder is not on the path."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


edit_speed = sibling("edit_speed")


# One run.


def draw_pictures(folder: Path, count: int, side: int) -> None:
    """Cartoon cats as PNG files, square."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        cat = Image.fromarray(mini_world.render(mini_world.random_scene(random, animal="cat", style="photo")))
        cat.resize((side, side), Image.Resampling.LANCZOS).save(folder / f"{i:04}.png")


def output_of(photo: Path, out: Path) -> Path:
    """Where `p2pz edit --to dog -o out` puts its result."""
    return out / f"{photo.stem}_dog.png"


def run(photos: Path, out: Path, count: int, batch: int, options: list[str]) -> dict[str, Any]:
    """Edit a folder with `count` processes.

    Args:
        photos: pictures of one size.
        out: a folder that does not exist yet.
        count: of processes.
        batch: pictures that a process edits at once.
        options: of `p2pz edit`.

    Returns:
        The seconds of the command and of each process, or why it failed.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launcher, "-m", "p2pz.cli", "edit", str(photos), "--from", "cat", "--to", "dog", "-o", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # torchrun's choice, but only if there are several processes
    result = {"gpus": count}
    began = time.time()
    # Not in the repository's folder: `-m` would find the sources there instead of what is installed.
    with subprocess.Popen(
        [*command, *options, "--quiet"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, cwd=out.parent,
    ) as process:  # fmt: skip
        try:
            _, errors = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes then
            process.communicate()
            return result | {"error": f"not finished within {LIMIT_S} s"}
    result["wall_s"] = time.time() - began
    outputs = [output_of(photo, out) for photo in jobs.find_images([photos])]
    done = [output for output in outputs if output.exists()]
    result["pictures"] = len(done)
    if process.returncode:
        return result | {"error": last_error(errors)}
    if len(done) < len(outputs):
        return result | {"error": f"only {len(done)} of {len(outputs)} pictures are there"}
    records = jobs.merge_records(out)
    shares = [outputs[rank::count] for rank in range(count)]  # as the command line deals them out
    result["processes"] = [
        process_times(
            [output.stat().st_mtime - began for output in share],
            [records[output.name]["seconds"] for output in share],
            batch,
        )
        for share in shares
    ]
    return result | {"images_per_second": sum(times["images_per_second"] for times in result["processes"])}


def last_error(text: str) -> str:
    """The last line that tells of an error; with none, the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror: |(Error|Exception): \S", line)]
    telling = [line for line in telling if "another process of this run failed" not in line] or telling
    return (telling or lines or ["no message"])[-1][:300]


def process_times(finished: list[float], seconds: list[float], batch: int) -> dict[str, Any]:
    """Times of a process.

    Args:
        finished: when each of its pictures was there, in seconds after the command began, in order.
        seconds: that each took, of a batch its share.
        batch: pictures at once, fewer than all.

    Returns:
        The rate after the first batch, and the seconds before and of the first batch.
    """
    first, end = sum(seconds[:batch]), max(finished[:batch])
    return {
        "pictures": len(finished),
        "start_up_s": min(finished[:batch]) - first,
        "first_batch_s": first,
        "images_per_second": (len(finished) - batch) / (max(finished) - end),
    }


def compare(outputs: list[Path], references: list[Path]) -> dict[str, Any]:
    """How many pictures differ, and the lowest PSNR; None if none differs."""
    levels = []
    for output, reference in zip(outputs, references, strict=True):
        with Image.open(output) as ours, Image.open(reference) as theirs:
            levels.append(psnr(ours, theirs))
    different = [level for level in levels if np.isfinite(level)]
    return {"lowest_psnr": min(different, default=None), "different_pictures": len(different)}


# All runs.


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By number of GPUs, medians of the runs that did not fail."""
    rows: dict[str, dict[str, Any]] = {}
    for count in dict.fromkeys(run["gpus"] for run in runs):
        good = [run for run in runs if run["gpus"] == count and "error" not in run]
        if not good:
            continue
        row = {key: median(run[key] for run in good) for key in ("wall_s", "images_per_second")}
        for key in ("start_up_s", "first_batch_s"):
            row[key] = median(max(process[key] for process in run["processes"]) for run in good)
        compared = [run for run in good if "different_pictures" in run]
        if compared:
            row["different_pictures"] = max(run["different_pictures"] for run in compared)
            levels = [run["lowest_psnr"] for run in compared if run["different_pictures"]]
            row["lowest_psnr"] = min(levels, default=None)
        rows[str(count)] = row | {"repeats": len(good)}
    one = rows.get("1")
    for count, row in rows.items():
        row["speed_up"] = one["wall_s"] / row["wall_s"] if one else None
        row["efficiency"] = row["images_per_second"] / (int(count) * one["images_per_second"]) if one else None
    return rows


def quality(row: dict[str, Any]) -> str:
    """The comparison of pictures as a cell of the table."""
    if "different_pictures" not in row:
        return "-"
    return f"{row['lowest_psnr']:.1f}" if row["different_pictures"] else "equal"


FACTS = ("device", "versions", "sizes", "date", "command")
COLUMNS = ("wall_s", "speed_up", "images_per_second", "efficiency", "start_up_s", "first_batch_s")


def markdown(results: dict[str, Any]) -> str:
    """All results as a page."""
    lines = ["# A folder over several GPUs", "", *(f"{key}: {json.dumps(results[key])}  " for key in FACTS), ""]
    lines += ["| GPUs | " + " | ".join((*COLUMNS, "lowest_psnr")) + " |", "|" + " --- |" * (len(COLUMNS) + 2)]
    for count, row in results["summary"].items():
        cells = [count, *(edit_speed.number(row[key]) for key in COLUMNS), quality(row)]
        lines.append("| " + " | ".join(cells) + " |")
    missing = [f"- N = {count}: {why}" for count, why in results["skipped"].items()]
    missing += [f"- warm-up: {results['warm_up']['error']}"] if "error" in (results["warm_up"] or {}) else []
    missing += [f"- N = {run['gpus']}: {run['error']}" for run in results["runs"] if "error" in run]
    lines += ["", "## Skipped or failed", "", *missing] if missing else []
    return "\n".join([*lines, "", "## How to read the table", "", __doc__.split("\n\n", 2)[2]]).rstrip() + "\n"


def write(results: dict[str, Any], path: Path) -> None:
    """The JSON file, and beside it the page; each whole or not at all."""
    results["summary"] = summarise(results["runs"])
    for target, text in ((path, json.dumps(results, indent=1) + "\n"), (path.with_suffix(".md"), markdown(results))):
        with atomic_path(target) as temporary:
            temporary.write_text(text, encoding="utf-8")


def tell(done: dict[str, Any], label: str) -> None:
    """A run in a line."""
    text = done.get("error") or f"{edit_speed.number(done['images_per_second'])} images/s, lowest PSNR {quality(done)}"
    print(f"{label}: {edit_speed.number(done.get('wall_s'))} s, {text}", flush=True)


def natural(text: str) -> int:
    """An argparse type: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)


def main() -> int:
    """Returns the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for scaling.json and .md")
    parser.add_argument("--gpus", type=natural, nargs="+", metavar="N", help="default: 1 2 4, of those that are here")
    parser.add_argument("--pictures", type=natural, metavar="N", help="in the folder (default: 64)")
    parser.add_argument("--steps", type=natural, metavar="N", help="of inversion and edit (default: 50)")
    parser.add_argument("--repeats", type=natural, default=1, metavar="N", help="of every run (default: %(default)s)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint instead of random weights")
    text = "the bundled model, 64 pixels, on the CPU: scaling_cpu.*; 1 and 2 processes, 4 pictures, 2 steps if not told"
    weights.add_argument("--mini", action="store_true", help=text)
    args = parser.parse_args()
    pictures, steps = (args.pictures or 4, args.steps or 2) if args.mini else (args.pictures or 64, args.steps or 50)
    counts = sorted(set(args.gpus or ([1, 2] if args.mini else [1, 2, 4])))
    here = counts[-1] if args.mini else torch.cuda.device_count()
    ours = [count for count in counts if count <= here]
    if not ours:
        sys.exit(
            f"bench/scaling.py: --gpus {counts[0]} needs as many CUDA GPUs, and here are {here}; --mini runs on a CPU"
        )
    if args.model and not (args.model / "unet" / "config.json").is_file():
        sys.exit(f"bench/scaling.py: --model {args.model} is no folder in the diffusers layout")
    batch = 1 if args.mini else jobs.BATCH_SIZE
    unit = batch * math.lcm(*ours)
    if pictures % unit or pictures < 2 * batch * ours[-1]:  # a batch of another size is recorded anew
        text = f"{' '.join(map(str, ours))} processes need full batches of {batch}, 2 or more each"
        sys.exit(f"bench/scaling.py: --pictures {pictures}: {text}; give a multiple of {unit}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"scaling{'_cpu' * args.mini}.json"
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary).resolve()
        folder = MINI_FOLDER if args.mini else args.model.resolve() if args.model else scratch / "model"
        setup = edit_speed.Setup(str(folder), *(("cpu", "float32") if args.mini else ("cuda", "float16")), steps)
        if folder == scratch / "model":
            edit_speed.write_checkpoint(edit_speed.SHAPES["sd15"], setup)
            torch.cuda.empty_cache()
        options = ["--model", str(folder), "--steps", str(steps)]
        options += ["--device", "cpu", "--size", "64"] if args.mini else []
        facts = edit_speed.new_results(setup, "mini" if args.mini else args.model.name if args.model else "sd15")
        results = {key: facts[key] for key in FACTS}
        results["device"] |= {"name": f"{platform.machine()} CPU"} if args.mini else {"gpus": here}
        results["sizes"] = {key: results["sizes"][key] for key in ("shapes", "picture", "steps", "dtype")}
        results["sizes"] |= {"pictures": pictures, "batch": batch} | ({"picture": 64} if args.mini else {})
        results["skipped"] = {str(count): f"{here} GPUs here" for count in counts if count > here}
        results |= {"warm_up": None, "runs": []}

        photos, first = scratch / "photos", None
        draw_pictures(photos, pictures, setup.sides[1])
        if not args.mini:
            draw_pictures(scratch / "few", 2 * batch, setup.sides[1])
            results["warm_up"] = run(scratch / "few", scratch / "warm_up", 1, batch, options)
            tell(results["warm_up"], "warm-up")
        for repeat in range(args.repeats):
            for count in ours:
                out = scratch / f"{count}_{repeat}"
                done = run(photos, out, count, batch, options)
                outputs = [output_of(photo, out) for photo in jobs.find_images([photos])]
                if "error" not in done:
                    done |= compare(outputs, first) if first else {}
                    first = first or outputs
                results["runs"].append(done)
                write(results, path)
                tell(done, f"{count} of {ours[-1]} {'processes' if args.mini else 'GPUs'}")
    return int(any("error" in done for done in results["runs"]))


if __name__ == "__main__":
    sys.exit(main())
