"""The README's picture: two scenes of each task above their edits by the default settings.

python bench/four_edits.py --out bench/results
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import p2pz
from p2pz.weights import MINI_FOLDER, mini_world

SCENES = {"cat->dog": (3, 2), "horse->zebra": (0, 6), "cat->cat with glasses": (6, 4), "sketch->oil pastel": (0, 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for four_edits.png")
    args = parser.parse_args()
    model = p2pz.load(MINI_FOLDER)
    columns = []
    for task, indices in SCENES.items():
        sources = [mini_world.render(mini_world.task_pair(task, i)[0]) for i in indices]
        results = p2pz.edit(sources, task, model=model)
        columns += [
            np.concatenate([source, np.asarray(result.image)]) for source, result in zip(sources, results, strict=True)
        ]
    args.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(columns, axis=1)).save(args.out / "four_edits.png", optimize=True)


if __name__ == "__main__":
    main()
