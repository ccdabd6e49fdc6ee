"""Where the time of one edit on the CPU goes: imports, loading, the edit itself; and a whole cold process.

python bench/cpu_edit.py --threads 2 --out results
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

INSIDE = """
import json, sys, time
start = time.perf_counter()
import torch
import p2pz
torch.set_num_threads(int(sys.argv[1]))
times = {"imports": time.perf_counter() - start}

def lap(name, function):
    begin = time.perf_counter()
    value = function()
    times[name] = time.perf_counter() - begin
    return value

model = lap("loading", lambda: p2pz.load(device="cpu"))
prompt = lap("caption", lambda: p2pz.caption(sys.argv[2], model=model))
direction = lap("direction", lambda: p2pz.direction("cat", "dog", model=model))
lap("inversion and edit", lambda: p2pz.edit(sys.argv[2], direction, model=model, prompt=prompt, progress=False))
times["whole process"] = time.perf_counter() - start
print(json.dumps(times))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5, help="cold processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for cpu_edit.json")
    args = parser.parse_args()
    from p2pz.weights import MINI_FOLDER

    image = str(MINI_FOLDER / "examples" / "cat.png")
    command = [sys.executable, "-c", INSIDE, str(args.threads), image]
    runs = []
    for _ in range(args.runs):
        start = time.perf_counter()
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(output) | {"cold process, by the clock": time.perf_counter() - start})
    import torch
    import transformers

    machine = (
        f"{platform.machine()} CPU, {args.threads} threads, float32, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}, 20 steps, 128 x 128, "
        + time.strftime("%Y-%m-%d")
    )
    figures = {
        name: {"median": median(run[name] for run in runs), "max": max(r[name] for r in runs)} for name in runs[0]
    }
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "runs": args.runs, "seconds": figures}
    (args.out / "cpu_edit.json").write_text(json.dumps(result, indent=1) + "\n")
    print(machine)
    for name, values in figures.items():
        print(f"{name:28} {values['median']:6.2f} s (max {values['max']:.2f})")


if __name__ == "__main__":
    main()
