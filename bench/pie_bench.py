"""PIE-Bench: real images with captions of before and after an edit, and masks of what may change.

    python bench/pie_bench.py PIE-Bench --method edit --model sd-v1-5 --out results \
        --clip clip-vit-large-patch14 --dino dino-vitb8 --lpips

The folder holds `mapping_file.json` and `annotation_images`, as the benchmark's authors hand it out.

The caption is the benchmark's. `edit` follows the direction from that one sentence to the target sentence; the other
methods swap the whole caption for the target caption. Everything else is p2pz's default. Pictures are compared at the
size the model works at, 512 x 512 for Stable Diffusion 1.

Into `--out` go `images/`, `results.jsonl` with a line for each image, and the table as `pie_bench.md` and `.json`.
A second run does what is missing, which includes measures whose models were not given before.

Source: Ju et al., "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code" (ICLR 2024).
"""

import argparse
import contextlib
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # transformers would take kernels.py for the package `kernels`, which it probes for
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import p2pz
from p2pz import metrics
from p2pz.files import atomic_path
from p2pz.images import read_image, save_image
from p2pz.inversion import prepare_pictures
from p2pz.presets import settings_for

SIDE = 512
"""Width and height of the benchmark's images and masks."""

METHODS = {name: getattr(p2pz, name) for name in ("edit", "ddim_edit", "prompt_to_prompt", "sdedit")}
TYPES = ("random", "change object", "add object", "delete object", "change content", "change pose", "change colour",
         "change material", "change background", "change style")  # fmt: skip

# Measure: heading, factor in the table, and the option that it needs.
COLUMNS = {
    "structure": ("structure x10^3", 1e3, "dino"),
    "psnr": ("PSNR", 1, None),
    "lpips": ("LPIPS x10^3", 1e3, "lpips"),
    "mse": ("MSE x10^4", 1e4, None),
    "ssim": ("SSIM x10^2", 1e2, None),
    "clip_whole": ("CLIP whole", 1, "clip"),
    "clip_edited": ("CLIP edited", 1, "clip"),
    "background_psnr": ("PSNR, background alone", 1, None),
    "background_mse": ("MSE x10^4, background alone", 1e4, None),
    "background_ssim": ("SSIM x10^2, background alone", 1e2, None),
}

PUBLISHED_COLUMNS = ("structure", "psnr", "lpips", "clip_whole", "clip_edited")
PUBLISHED = {
    "pix2pix-zero, DDIM inversion": (61.68, 20.44, 172.22, 22.80, 20.54),
    "pix2pix-zero, direct inversion": (49.22, 21.53, 138.98, 23.31, 21.05),
    "prompt-to-prompt, direct inversion": (11.65, 27.22, 54.55, 25.02, 22.10),
}
NOTES = """\
PSNR, MSE, SSIM and LPIPS are PIE-Bench's: both pictures are black where the edit may change things, and all pixels
count, so that a larger mask looks better. "Background alone" counts no pixel under the mask. An image whose mask covers
everything has no background, and does not count in these columns. CLIP is 100 times the cosine similarity to the target
caption, of the picture and of its masked part.

For orientation, published figures: 700 images, Stable Diffusion 1.4, 50 steps, guidance scale 7.5, pix2pix-zero with
captions by BLIP; Ju et al., "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code", ICLR 2024. Their
structure distance is of pictures normalised for ImageNet without being scaled to 0 ... 1 first, and does not compare
with the one above; LPIPS compares, and CLIP if it is openai/clip-vit-large-patch14.
"""


class Entry(NamedTuple):
    image: Path
    kind: str  # editing type, "0" to "9"
    source: str  # caption of the image
    target: str  # caption of the edit
    mask: np.ndarray  # bool [512, 512], true where the edit may change things


def decode_mask(runs: Any) -> np.ndarray:
    """PIE-Bench's run-length code as bool `[512, 512]`: starts and lengths, in turn, of runs in the flattened mask.

    The outermost pixels become true, as in the benchmark's own evaluation: annotators left gaps there.
    """
    valid = isinstance(runs, list) and all(isinstance(number, int) and number >= 0 for number in runs)
    if not valid or len(runs) % 2:
        raise ValueError("the mask is not a list of starts and lengths")
    mask = np.zeros(SIDE * SIDE, bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        mask[start : start + length] = True
    mask = mask.reshape(SIDE, SIDE)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


def fit_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask for a picture of another width and height, true wherever some of it was."""
    cells = F.adaptive_max_pool2d(torch.from_numpy(mask).float()[None, None], size[::-1])
    return cells[0, 0].bool().numpy()


def read_mapping(folder: Path) -> dict[str, Any]:
    """What `mapping_file.json` says of every image, by id."""
    path = folder / "mapping_file.json"
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: give the folder of PIE-Bench ({error})") from None
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{path} lists no images: give the folder of PIE-Bench")
    return mapping


def read_entry(fields: Any, folder: Path) -> Entry:
    """Check what `mapping_file.json` says of an image."""
    needed = ("image_path", "original_prompt", "editing_prompt", "editing_type_id", "mask")
    missing = [name for name in needed if not isinstance(fields, dict) or name not in fields]
    if missing:
        raise ValueError(f"mapping_file.json does not give its {', '.join(missing)}")
    path, *captions, kind = (str(fields[name]) for name in needed[:-1])
    # brackets mark the words that differ
    source, target = (" ".join(caption.replace("[", "").replace("]", "").split()) for caption in captions)
    if not source or not target:
        raise ValueError("one of its captions is empty")
    if kind not in map(str, range(len(TYPES))):
        raise ValueError(f"its editing_type_id must be 0 to {len(TYPES) - 1}, not {kind}")
    return Entry(folder / "annotation_images" / path, kind, source, target, decode_mask(fields["mask"]))


def edit_picture(picture: Image.Image, entry: Entry, method: str, model: p2pz.Model, steps: int) -> Image.Image:
    """Edit an image from its caption to its target caption."""
    direction = p2pz.direction(sentences=([entry.source], [entry.target]), model=model)
    if method != "edit":  # the words to be swapped are the caption as a whole
        direction = replace(direction, source=entry.source, target=entry.target)
    return METHODS[method](picture, direction, model=model, prompt=entry.source, steps=steps, progress=False).image


def load_judges(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The models that measures need and that were given, by option."""
    judges: dict[str, Any] = {}
    if args.clip:
        judges["clip"] = metrics.load_clip(args.clip)
        judges["clip"].model.to(device)
    if args.dino:
        judges["dino"] = metrics.load_dino(args.dino).to(device)
    if args.lpips:
        judges["lpips"] = metrics.load_lpips("squeeze").to(device)
    return judges


def columns_for(judges: dict[str, Any]) -> list[str]:
    return [name for name, (_, _, option) in COLUMNS.items() if option is None or option in judges]


def measure(source: Image.Image, edited: Image.Image, mask: np.ndarray, target: str, judges: dict) -> dict:
    """All columns that the judges allow, without the table's factors; None where there is no background to measure."""
    values = dict.fromkeys(columns_for(judges))
    if not mask.all():
        blackened = [np.asarray(picture) * ~mask[..., None] for picture in (source, edited)]
        for name in ("psnr", "mse", "ssim"):
            function = getattr(metrics, f"background_{name}")
            values[name] = function(*blackened, np.zeros_like(mask))
            with contextlib.suppress(ValueError):  # no window of SSIM may fit into the background
                values[f"background_{name}"] = function(source, edited, mask)
        if "lpips" in judges:
            values["lpips"] = metrics.background_lpips(source, edited, mask, judges["lpips"])
    if "dino" in judges:
        values["structure"] = metrics.structure_distance(source, edited, judges["dino"])
    if "clip" in judges:
        scale = 100 / judges["clip"].model.logit_scale.exp()
        for name, masks in (("clip_whole", None), ("clip_edited", [mask])):
            logit = metrics.clip_similarity([edited], [target], judges["clip"], masks)
            values[name] = max(0.0, float(scale * logit))
    return values


def read_rows(path: Path, settings: dict) -> dict[str, dict]:
    """Results of an earlier run by id; those of other settings are refused."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = {row["id"]: row for row in map(json.loads, lines)}
        others = [row["settings"] for row in rows.values() if row["settings"] != settings]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no result of this benchmark: give another --out") from None
    if others:
        raise ValueError(f"{path} holds results of {others[0]}, not of {settings}: give another --out")
    return rows


def write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def run_images(args: argparse.Namespace, mapping: dict, settings: dict, model: p2pz.Model, judges: dict) -> list[dict]:
    """Edit and measure what `results.jsonl` lacks, writing it anew after every image. Gives its lines for the images.

    A line with an `error` has no measures; the next run tries again.
    """
    path, images = args.out / "results.jsonl", args.out / "images"
    rows = read_rows(path, settings)
    images.mkdir(parents=True, exist_ok=True)
    judged_by = {name: getattr(args, name) for name in judges}
    for name, fields in tqdm(mapping.items(), args.method):
        row = rows.get(name, {"error": "not done yet"})
        if row.get("judged_by") == judged_by:
            continue
        place = images / f"{name}.png"
        try:
            entry = read_entry(fields, args.folder)
            picture = read_image(entry.image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            if "error" in row or not place.exists():
                save_image(edit_picture(picture, entry, args.method, model, settings["steps"]), place)
            (source,), edited = prepare_pictures([picture], model), read_image(place)
            values = measure(source, edited, fit_mask(entry.mask, source.size), entry.target, judges)
            row = {"type": entry.kind, "judged_by": judged_by, **values}
        except (ValueError, OSError) as error:
            row = {"error": str(error)}
            tqdm.write(f"image {name} is left out: {error}", file=sys.stderr)
        rows[name] = {"id": name, "settings": settings, **row}
        write(path, "".join(json.dumps(row) + "\n" for row in rows.values()))
    return [rows[name] for name in mapping]


def summarise(rows: list[dict], columns: Sequence[str]) -> dict[str, dict]:
    """Of all images and of each editing type: their number, and every column's number, mean and 95 % half-width."""
    kinds = {f"{kind} {name}": [row for row in rows if row["type"] == str(kind)] for kind, name in enumerate(TYPES)}
    table = {group: {"n": len(members)} for group, members in {"all": rows, **kinds}.items() if members}
    for group, column in itertools.product(table, columns):
        values = [row[column] for row in (rows if group == "all" else kinds[group]) if row[column] is not None]
        values = [value * COLUMNS[column][1] for value in values]
        mean, half = metrics.mean_with_interval(values) if values else (math.nan, math.nan)
        mean, half = (figure if math.isfinite(figure) else None for figure in (mean, half))
        table[group][column] = {"n": len(values), "mean": mean, "ci95": half}
    return table


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (headings, ["---"] * len(headings), *rows))


def cell(figures: dict, n: int) -> str:
    """Mean and half-width, and the number of images if it is not that of the row."""
    if figures["mean"] is None:
        return "-"
    half = "" if figures["ci95"] is None else f" ± {figures['ci95']:.2f}"
    return f"{figures['mean']:.2f}{half}" + (f" (n = {figures['n']})" if figures["n"] != n else "")


def run(args: argparse.Namespace) -> None:
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be 1 or more, not {args.limit}")
    mapping = read_mapping(args.folder)
    model = p2pz.load(args.model)
    steps = settings_for(model, "p2pz", steps=args.steps).steps
    settings = {"method": args.method, "model": args.model, "steps": steps}
    judges = load_judges(args, model.device)
    rows = run_images(args, dict(list(mapping.items())[: args.limit]), settings, model, judges)

    columns, failed = columns_for(judges), {row["id"]: row["error"] for row in rows if "error" in row}
    table = summarise([row for row in rows if "error" not in row], columns)
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU"
    dtype = str(model.dtype).removeprefix("torch.")
    machine = f"{device}, {dtype}, torch {torch.__version__}, p2pz {p2pz.__version__}, {time.strftime('%Y-%m-%d')}"
    remarks = [f"{args.model}, {steps} steps; {machine}", f"{len(rows) - len(failed)} of {len(mapping)} images"]
    absent = [(heading, option) for name, (heading, _, option) in COLUMNS.items() if name not in columns]
    remarks += [f"left out: {heading} (needs --{option})" for heading, option in absent]
    remarks += [f"failed: {name}: {error}" for name, error in failed.items()]
    facts = {"settings": settings, "remarks": remarks, "headings": {name: COLUMNS[name][0] for name in columns}}
    facts |= {"table": table, "published": {"columns": PUBLISHED_COLUMNS, **PUBLISHED}, "notes": NOTES}
    write(args.out / "pie_bench.json", json.dumps(facts, indent=1, allow_nan=False) + "\n")

    headings = ["", "n", *(COLUMNS[name][0] for name in columns)]
    cells = [[group, row["n"], *(cell(row[name], row["n"]) for name in columns)] for group, row in table.items()]
    published = [[name, *(f"{figure:.2f}" for figure in figures)] for name, figures in PUBLISHED.items()]
    parts = [f"# PIE-Bench: {args.method}", "\n".join(f"- {remark}" for remark in remarks), "Means and 95 % intervals."]
    parts += [markdown_table(headings, cells), NOTES.strip()]
    parts.append(markdown_table(["published", *(COLUMNS[name][0] for name in PUBLISHED_COLUMNS)], published))
    text = "\n\n".join(parts) + "\n"
    write(args.out / "pie_bench.md", text)
    print(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of PIE-Bench")
    parser.add_argument("--method", choices=list(METHODS), required=True)
    parser.add_argument("--model", required=True, help="Stable Diffusion, as for p2pz.load")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--steps", type=int, metavar="N", help="default: p2pz's")
    parser.add_argument("--clip", metavar="FOLDER", help="for CLIP similarities (paper: openai/clip-vit-large-patch14)")
    parser.add_argument("--dino", metavar="FOLDER", help="for the structure distance (paper: facebook/dino-vitb8)")
    parser.add_argument("--lpips", action="store_true", help="LPIPS by the package lpips, with the trunk squeeze")
    try:
        run(parser.parse_args(argv))
    except (ValueError, ImportError) as error:
        sys.exit(f"pie_bench: {error}")


if __name__ == "__main__":
    main()
