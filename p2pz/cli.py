"""The command line: p2pz edit, sample, invert, direction, maps, info and bench."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import p2pz
from p2pz import jobs, maps
from p2pz.captions import captions_for, load_captioner
from p2pz.files import check_place
from p2pz.images import check_image_path, read_image, save_image
from p2pz.info import describe
from p2pz.inversion import prepare_pictures
from p2pz.model import PREDICTION_TYPES, Model, find_device
from p2pz.presets import PRESETS, Settings, settings_for
from p2pz.sentences import read_sentences, source_prompt
from p2pz.tokens import words_of
from p2pz.weights import MINI_FOLDER, NoTokenizerError

BENCHES = ("edit_speed", "scaling", "kernels", "quality", "pie_bench", "attention_cost", "cpu_edit")
DTYPES = ("float32", "float16", "bfloat16")
PLACES = {"image", "images", "out", "model", "tokenizer", "captioner", "direction", "language_model"} | {
    f"{side}_{what}" for side in ("source", "target") for what in ("sentences", "embeddings")
}
"""Arguments that are paths, of which an empty one would be the current folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0; 1 if some of several images failed; 2 for an error; 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        _print_warnings()
        try:
            for name in PLACES & vars(args).keys():
                if args.__dict__[name] == "" or "" in (args.images if name == "images" else ()):
                    raise ValueError(f"the path for {name} is empty")
            return args.run(args)
        except KeyboardInterrupt:
            print("p2pz: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if not jobs.is_expected(error):
                raise
            _complain("error", error)
            return 2


def edit_command(args: argparse.Namespace) -> int:
    """`p2pz edit`: one image to a file, or several, or folders of them, to a folder; alone or under torchrun."""
    concepts = (args.source, args.target)
    if concepts.count(None) != (2 if args.direction else 0):
        args.parser.error("give --from and --to, or --direction")
    _check_settings(args)
    change = p2pz.Direction.load(args.direction) if args.direction else None
    ending = _file_words(change.target if change else args.target) or "edited"
    given = [Path(image) for image in args.images]
    sources = {image.resolve(): image for image in jobs.find_images(given)}  # each once
    images = list(sources.values())
    folders = [path for path in given if path.is_dir()]
    many = len(images) > 1 or bool(folders)
    stems = Counter(image.stem for image in images)
    words = [image.stem if stems[image.stem] == 1 else image.name.replace(".", "_") for image in images]
    outputs, folder = _outputs([f"{word}_{ending}.png" for word in words], args.out, many)
    if folder and folder.resolve() in [path.resolve() for path in folders]:
        raise ValueError(f"the edits would be among the images in {folder}: give another -o")
    for image, output in zip(images, outputs, strict=True):
        replaced = sources.get(output.resolve())
        if replaced:
            which = "the image itself" if replaced == image else f"{replaced}, which is to be edited too"
            raise ValueError(f"the edit of {image} would replace {which}: give another -o")
        if args.original_size and image.suffix == ".safetensors":
            raise ValueError(f"{image} is an inversion, which does not know the size of its image: no --original-size")

    def prepare() -> jobs.Tools:
        model = _load(args)
        made = change or p2pz.direction(*concepts, model=model)
        made.check_fits(model)
        captioner = load_captioner(args.captioner, model.device) if args.captioner and args.prompt is None else None
        return jobs.Tools(model, made, captioner)

    ranks = jobs.ranks()
    first = ranks.rank == 0
    tasks = [jobs.Task(image, output) for image, output in zip(images, outputs, strict=True)]
    with jobs.joined(ranks):
        todo = tasks
        if folder and first:
            made = jobs.merge_records(folder)
            words = change.words if change else f"{args.source} -> {args.target}"
            asked = {"direction": words, "seed": args.seed, "preset": args.preset, "steps": args.steps}
            asked |= {name: getattr(args, name) for name in ("strength", "guidance", "xa_guidance", "negative_prompt")}
            todo = []
            for task in tasks:
                if not _skip(task.output, args):
                    todo.append(task)
                elif task.output.name in made:
                    _warn_of_other_settings(task.output, made[task.output.name], asked)
        todo = jobs.shared(todo, ranks)
        share = todo[ranks.rank :: ranks.count]
        results = jobs.edit_files(
            share,
            prepare,
            records=ranks.records(folder) if folder else None,
            batch_size=args.batch_size,
            size=args.edit_size,
            original_size=args.original_size,
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            preset=args.preset,
            steps=args.steps,
            strength=args.strength,
            guidance=args.guidance,
            xa_guidance=args.xa_guidance,
            seed=args.seed,
            progress=_progress(args) if first else False,
        )
        failed = 0
        hidden = (True if args.quiet else None) if first and len(share) > 1 else True
        for record in tqdm(results, "images", len(share), disable=hidden, leave=False):
            failed += bool(record.error)
            if record.error and not many:
                raise ValueError(record.error)
            if first:
                _report(args, asdict(record))
        jobs.wait(ranks)
        if not first:
            return 0  # the first process tells of everybody's failures; a status other than 0 would end it
        records = jobs.merge_records(folder) if folder else {}
        for task in todo if ranks.launched else ():
            if task not in share:
                failed += bool(records[task.output.name]["error"])
                _report(args, records[task.output.name])
    if failed:
        _complain("error", f"{failed} of {len(images)} images failed")
    return 1 if failed else 0


def _warn_of_other_settings(output: Path, record: dict[str, Any], asked: dict[str, Any]) -> None:
    """Say so if a picture of the folder, which stays, is not what is asked for; None asks for nothing."""
    made = record.get("settings")
    if record.get("error") or not isinstance(made, dict) or "direction" not in made:
        return
    made = made | {"seed": record.get("seed")}
    for name, wanted in asked.items():
        if wanted is not None and made.get(name) != wanted:
            name = name.replace("_", " ")
            _complain("warning", f"{output} was made with another {name}: give another -o, or --overwrite")
            return


def _report(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Lines about an edit that is done, or failed."""
    image, error, quality = record["input"], record["error"], record["reconstruction_psnr"]
    for text in record["warnings"]:
        _complain("warning", f"{image}: {text}")
    if error:
        _complain("error", error if image in error else f"{image}: {error}")
        return
    facts = f'"{_short(record["prompt"])}"', "" if quality is None else f"reconstruction {quality:.1f} dB"
    _say(args, f"wrote {record['output']}: {', '.join(filter(None, facts))}, {record['seconds']:.1f} s")


def sample_command(args: argparse.Namespace) -> int:
    """`p2pz sample`: one picture to a file, or several to a folder."""
    _check_settings(args)
    prompts = [prompt for prompt in args.prompts for _ in range(args.count)]
    if args.seed + len(prompts) > 2**32:
        raise ValueError(
            f"the last of {len(prompts)} pictures would have a seed above {2**32 - 1}: give a smaller --seed"
        )
    names = [f"{_file_words(prompt) or 'sample'}_{args.seed + i}.png" for i, prompt in enumerate(prompts)]
    outputs, folder = _outputs(names, args.out, len(names) > 1)
    model: Model | None = None
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if folder and _skip(output, args):
            continue
        model = model or _load(args)
        start = time.perf_counter()
        pictures = p2pz.sample(
            prompt,
            model=model,
            negative_prompt=args.negative_prompt,
            steps=args.steps,
            guidance=args.guidance,
            size=args.size,
            seed=args.seed + i,
            progress=_progress(args),
        )
        save_image(pictures[0], output)
        _say_written(args, output, f'"{_short(prompt)}"', f"seed {args.seed + i}", start=start)
    return 0


def invert_command(args: argparse.Namespace) -> int:
    """`p2pz invert`: an image to a file for `p2pz edit`."""
    _check_settings(args)
    output = _tensor_output(args.out)
    picture = read_image(args.image)
    model = _load(args)
    start = time.perf_counter()
    prompt = args.prompt
    if prompt is None and args.captioner:
        prompt = p2pz.caption(picture, args.captioner, model=model)
    inversion = p2pz.invert(
        picture,
        model=model,
        prompt=prompt,
        preset=args.preset,
        steps=args.steps,
        seed=args.seed,
        size=args.edit_size,
        progress=_progress(args),
    )
    inversion.save(output)
    _say_written(args, output, f'"{_short(inversion.prompt)}"', f"{inversion.steps} steps", start=start)
    return 0


def direction_command(args: argparse.Namespace) -> int:
    """`p2pz direction`: two concepts, or two files of sentences or of embeddings, to a file for `p2pz edit`."""
    concepts, files = (args.source, args.target), (args.source_sentences, args.target_sentences)
    embeddings = (args.source_embeddings, args.target_embeddings)
    if 1 in (files.count(None), embeddings.count(None)) or (None in concepts and None in files and None in embeddings):
        args.parser.error("give --from and --to, or --source-sentences and --target-sentences")
    output = _tensor_output(args.out)
    sentences = None
    if None not in files:
        sentences = tuple(read_sentences(file, side) for file, side in zip(files, ("source", "target"), strict=True))
    model = _load(args)
    start = time.perf_counter()
    made = p2pz.direction(
        args.source or "",
        args.target or "",
        sentences=sentences,
        language_model=args.language_model,
        embeddings=None if None in embeddings else embeddings,
        seed=args.seed,
        model=model,
    )
    made.save(output)
    _say_written(args, output, f"{made.sentences[0]} and {made.sentences[1]} sentences", start=start)
    _say(args, str(made.report))
    return 0


def maps_command(args: argparse.Namespace) -> int:
    """`p2pz maps`: pictures of where the words of an image's caption look, and of what an edit makes of that."""
    edits = args.source is not None
    if edits != (args.target is not None):
        args.parser.error("give both --from and --to, or neither")
    _check_settings(args)
    names = ["words", "steps", "resolutions", "self_attention", *(["edit", "comparison"] if edits else [])]
    original = read_image(args.image)
    (table, *outputs), _ = _outputs(["maps.safetensors", *(f"{name}.png" for name in names)], args.out, True)
    there = [output for output in (table, *outputs) if output.exists() and not args.overwrite]
    if there:
        raise ValueError(f"{there[0]} exists: give another -o, or --overwrite")
    if Path(args.image).resolve() in [output.resolve() for output in outputs]:
        raise ValueError(f"the maps would replace {args.image} itself: give another -o")
    model = _load(args)
    start = time.perf_counter()
    (picture,) = prepare_pictures([original], model)
    prompt = args.prompt
    if prompt is None and edits and not args.captioner:  # as the edit would
        (prompt,) = captions_for([original], None, source_prompt(args.source), model)
    elif prompt is None:
        prompt = p2pz.caption(original, args.captioner, model=model)
    words = words_of(model, prompt)
    if not words:
        raise ValueError("the caption has no words: give a --prompt that says what the image shows")
    last = settings_for(model, args.preset, steps=args.steps).steps - 1
    states: maps.States = {}
    recorder = p2pz.record(tokens=[place for _, places in words for place in places])
    looks = {"attend": maps.keep_states(states, "up_blocks", steps={0, last // 2, last}), "record": recorder}
    options = {"model": model, "preset": args.preset, "steps": args.steps, "progress": _progress(args)}
    inversion = p2pz.invert(original, prompt=prompt, seed=args.seed, **options, **({} if edits else looks))
    edited = None
    if edits:
        edited = p2pz.edit(inversion, p2pz.direction(args.source, args.target, model=model), **options, **looks).image
    (run,) = recorder.runs
    branch = "reference" if edits else "inversion"
    drawings = maps.word_sheet, maps.step_sheet, maps.resolution_sheet
    sheets = [draw(run, picture, words, branch) for draw in drawings]
    sheets.append(maps.state_sheet({site: kept for site, kept in states.items() if site.branch == branch}))
    if edited:
        sheets += [edited, maps.comparison_sheet(run, picture, edited, words)]
    for sheet, output in zip(sheets, outputs, strict=True):
        save_image(sheet, output)
    run.save(table)
    _say_written(args, table.parent, f'"{_short(prompt)}"', f"{len(sheets)} pictures and the maps", start=start)
    return 0


def info_command(args: argparse.Namespace) -> int:
    """`p2pz info`: what a checkpoint is and what it needs."""
    how = {"device": "cpu", "dtype": torch.float16, "prediction_type": args.prediction_type}
    try:
        facts = describe(p2pz.load(args.model, tokenizer=args.tokenizer, **how))
    except NoTokenizerError as error:  # what there is to tell depends on no words
        facts = describe(p2pz.load(args.model, tokenizer=MINI_FOLDER / "tokenizer", **how))
        facts["tokenizer"] = f"not at hand: {error}"
    for name, text in facts.items():
        print(_printable(f"{name.replace('_', ' '):{max(map(len, facts))}}  {text}"))
    return 0


def _check_settings(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers out of range, with the API's own words and before the model is loaded."""
    given = vars(args)
    numbers = {
        name: given[name] for name in ("steps", "strength", "guidance", "xa_guidance") if given.get(name) is not None
    }
    replace(PRESETS[args.preset] if "preset" in given else Settings(), **numbers)


def _outputs(names: Sequence[str], out: str | None, many: bool) -> tuple[list[Path], Path | None]:
    """Where each picture goes, checked before the work.

    Args:
        names: what to call the pictures in a folder.
        out: a file name or a folder; None is the current folder.
        many: `out` must be a folder.

    Returns:
        A path for each name, and the folder that they were put into; None if `out` is a file.

    Raises:
        ValueError: they cannot be written.
    """
    if not many and not (out and (out.endswith("/") or Path(out).is_dir())):
        output = Path(out or names[0])
        check_image_path(output)
        return [output], None
    folder = Path(out or ".")
    if not folder.is_dir() and folder.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"several pictures need a folder, and {folder} is a file name")
    outputs = [folder / name for name in names]
    repeated = [output for output, count in Counter(outputs).items() if count > 1]
    if repeated:
        raise ValueError(f"two of the images would be written to {repeated[0]}: rename one, or edit them one by one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot create the folder {folder}: {(error.strerror or str(error)).lower()}") from None
    for output in outputs:
        check_place(output)
    return outputs, folder


def _tensor_output(out: str) -> Path:
    """The path of a safetensors file to write, checked before the work. Raises ValueError."""
    output = Path(out)
    if output.suffix != ".safetensors":
        raise ValueError(f"cannot write {output}: give a name that ends in .safetensors")
    check_place(output)
    return output


def _skip(output: Path, args: argparse.Namespace) -> bool:
    """Whether a picture of a folder is there already and stays; says so."""
    if args.overwrite or not os.path.exists(output):  # False also for a name that is too long
        return False
    _say(args, f"skipped {output}: it exists (--overwrite makes it again)")
    return True


def bench_command(args: argparse.Namespace) -> int:
    """`p2pz bench`: a script of the benchmark suite, in a process of its own."""
    script = Path(__file__).resolve().parent.parent / "bench" / f"{args.suite}.py"
    if not script.is_file():
        raise ValueError("the benchmarks are not installed with p2pz: run it in a clone, installed by pip install -e .")
    return subprocess.run([sys.executable, str(script), *args.options]).returncode


def _load(args: argparse.Namespace) -> Model:
    """The model that the options name; each process of torchrun has a GPU of its own."""
    device, ranks = args.device, jobs.ranks()
    if ranks.launched and torch.cuda.is_available() and device in (None, "cuda"):
        device = f"cuda:{ranks.local}"
        torch.cuda.set_device(find_device(device))
    dtype = getattr(torch, args.dtype) if args.dtype else None
    file = {"prediction_type": args.prediction_type, "tokenizer": args.tokenizer}
    return p2pz.load(args.model, device=device, dtype=dtype, max_memory=args.max_memory, **file)


def _progress(args: argparse.Namespace) -> bool | None:
    return False if args.quiet else None


def _file_words(text: str) -> str:
    """Words joined with underscores, short enough for a file name; where that is not all of the text, its hash, too."""
    words = re.sub(r"\W+", "_", text).strip("_")
    if words == "_".join(text.split()) and len(words) <= 60:
        return words
    return f"{words[:60]}_{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:6]}".lstrip("_")


def _printable(line: str) -> str:
    """A line that stdout can show; names of files need not be text, and not every terminal has every letter."""
    encoding = sys.stdout.encoding or "utf-8"
    return line.encode(encoding, errors="backslashreplace").decode(encoding)


def _say(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        with tqdm.external_write_mode():
            print(_printable(line), flush=True)


def _say_written(args: argparse.Namespace, output: Path, *facts: str, start: float) -> None:
    _say(args, f"wrote {output}: {', '.join(facts)}, {time.perf_counter() - start:.1f} s")


def _complain(kind: str, message: object) -> None:
    """One line on stderr, whatever the message; of several processes all tell their errors, the first one warnings."""
    rank = jobs.ranks().rank
    if rank == 0 or kind == "error":
        process = f"process {rank}: " if rank else ""
        with tqdm.external_write_mode(sys.stderr):
            line = f"p2pz: {process}{kind}: {_one_line(message) or type(message).__name__}"
            print(line, file=sys.stderr, flush=True)


def _short(text: str) -> str:
    """The beginning of a caption that may be a page."""
    return textwrap.shorten(text, 500, placeholder=" ...")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _print_warnings() -> None:
    """Print each warning once, as a line of ours without a source location; `warnings.catch_warnings` undoes it."""
    seen = set()

    def show(message: object, *_, **__) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            _complain("warning", message)

    warnings.showwarning = show


def _whole(lowest: int, highest: int):
    """An argparse type: a whole number in a range."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if not lowest <= number <= highest:
            raise argparse.ArgumentTypeError(f"must be a whole number from {lowest} to {highest}, not {text!r}")
        return number

    return parse


def _size(text: str) -> tuple[int, int]:
    """An argparse type: "512x768" as width and height."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"must be width and height such as 512x768, not {text!r}")
    return int(match[1]), int(match[2])


_EPILOGS = {
    "edit": "example: p2pz edit cat.png --from cat --to dog -o dog.png\n"
    "         p2pz edit photos/ --from cat --to dog -o dogs/\n"
    "         torchrun --nproc-per-node 4 -m p2pz.cli edit photos/ --from cat --to dog -o dogs/",
    "sample": 'example: p2pz sample "a photo of a cat on the beach" --seed 3 -o cat.png',
    "invert": "example: p2pz invert cat.png -o cat.safetensors\n         p2pz edit cat.safetensors --from cat --to dog",
    "direction": "example: p2pz direction --from cat --to dog -o cat2dog.safetensors\n"
    "         p2pz edit cat.png --direction cat2dog.safetensors",
    "maps": "example: p2pz maps cat.png -o maps/\n         p2pz maps cat.png --from cat --to dog -o maps/",
    "info": "example: p2pz info path/to/stable-diffusion",
    "bench": "example: p2pz bench edit_speed --out results",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="p2pz",
        usage="p2pz COMMAND ... (p2pz COMMAND --help lists its options)",
        description="Change one thing in an image and keep the rest (pix2pix-zero).",
        epilog=_EPILOGS["edit"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"p2pz {p2pz.__version__}")
    commands = parser.add_subparsers(prog="p2pz", metavar="COMMAND", required=True)

    def command(name: str, run, text: str, usage: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            usage=f"p2pz {name} {usage} [options]",
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_EPILOGS[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    edit = command("edit", edit_command, "edit images", "IMG [IMG ...] --from WORDS --to WORDS [-o OUT]")
    edit.add_argument("images", nargs="+", metavar="IMG", help="image, folder of images, or inversion (p2pz invert)")
    _add_concepts(edit)
    edit.add_argument("--direction", metavar="FILE", help="saved direction, instead of --from and --to")
    edit.add_argument("-o", "--out", help="file; for several images a folder (default: <image>_<to>.png, here)")
    _add_size(edit)
    edit.add_argument("--original-size", action="store_true", help="results as large as the images, not as the model's")
    edit.add_argument("--batch-size", type=_whole(1, 1000), metavar="N", help="images at once (default: GPU 8, CPU 1)")
    edit.add_argument("--prompt", metavar="TEXT", help="what the image shows (default: recognised, or from --from)")
    edit.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from (default: the prompt)")
    edit.add_argument("--strength", type=float, metavar="X", help="larger: stronger edit (default: the preset's)")
    edit.add_argument("--guidance", type=float, metavar="X", help="larger: stronger edit (default: the preset's)")
    edit.add_argument(
        "--xa-guidance", type=float, metavar="X", help="larger: closer to the image (default: the preset's)"
    )
    _add_captioner(edit)
    _add_overwrite(edit)
    _add_run(edit, "default: the preset's, or the inversion's")
    _add_preset(edit)

    sample = command("sample", sample_command, "draw images from text", "PROMPT [PROMPT ...] -o OUT")
    sample.add_argument("prompts", nargs="+", metavar="PROMPT", help="text")
    sample.add_argument("-o", "--out", required=True, help="file; for several pictures a folder")
    sample.add_argument("--count", type=_whole(1, 10000), default=1, metavar="N", help="for each prompt (default: 1)")
    sample.add_argument("--size", type=_size, metavar="WxH", help="pixels (default: the model's own square)")
    sample.add_argument(
        "--guidance", type=float, metavar="X", help="larger: closer to the text (default: 7.5, bundled model: 2)"
    )
    sample.add_argument("--negative-prompt", metavar="TEXT", default="", help="what to keep away from (default: none)")
    _add_overwrite(sample)
    _add_run(sample, "default: 50", 50)

    invert = command("invert", invert_command, "save an image as noise, to edit it often", "IMG -o OUT.safetensors")
    invert.add_argument("image", metavar="IMG", help="image")
    invert.add_argument("-o", "--out", required=True, help="file, .safetensors")
    invert.add_argument("--prompt", metavar="TEXT", help='what the image shows (default: recognised, or "a photo")')
    _add_captioner(invert)
    _add_size(invert)
    _add_run(invert, "default: the preset's")
    _add_preset(invert)

    direction = command(
        "direction", direction_command, "save a direction", "--from WORDS --to WORDS -o OUT.safetensors"
    )
    _add_concepts(direction)
    for side in ("source", "target"):
        direction.add_argument(
            f"--{side}-sentences", metavar="FILE", help=f"{side} sentences, one a line (default: built in)"
        )
        direction.add_argument(f"--{side}-embeddings", metavar="FILE", help=f"{side} text states of PyTorch (.pt)")
    direction.add_argument("--language-model", metavar="FOLDER", help="that writes the sentences")
    _add_seed(direction, "of the language model's sentences")
    direction.add_argument("-o", "--out", required=True, help="file, .safetensors")

    maps = command("maps", maps_command, "draw where words look", "IMG [--from WORDS --to WORDS] -o FOLDER")
    maps.add_argument("image", metavar="IMG", help="image")
    maps.add_argument("--prompt", metavar="TEXT", help="what the image shows (default: recognised)")
    _add_captioner(maps)
    _add_concepts(maps)
    maps.add_argument("-o", "--out", required=True, help="folder")
    maps.add_argument("--overwrite", action="store_true", help="replace what the folder already has")
    _add_run(maps, "default: the preset's")
    _add_preset(maps)

    info = command("info", info_command, "tell what a checkpoint is and needs", "[MODEL]")
    info.add_argument("model", nargs="?", metavar="MODEL", help="Stable Diffusion (default: $P2PZ_MODEL, or bundled)")

    bench = command("bench", bench_command, "run a benchmark", "SUITE")
    bench.add_argument("suite", choices=BENCHES, metavar="SUITE", help=", ".join(BENCHES))
    bench.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="OPTIONS", help="of the benchmark; --help lists them"
    )

    for sub in (edit, sample, invert, direction, maps, info):
        sub.add_argument("--tokenizer", metavar="FOLDER", help="of a .safetensors file (default: from the hub's cache)")
        sub.add_argument(
            "--prediction-type", choices=PREDICTION_TYPES, help="if a file does not tell (default: probed)"
        )
    for sub in (edit, sample, invert, direction, maps):
        sub.add_argument(
            "--model", metavar="SOURCE", help="folder, .safetensors file or hub id (default: $P2PZ_MODEL, or bundled)"
        )
        sub.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
        sub.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on the CPU")
        sub.add_argument("--max-memory", type=float, metavar="GIB", help="of the GPU's memory (default: no limit)")
        sub.add_argument("--quiet", action="store_true", help="no progress bars, and nothing about what was written")
    return parser


def _add_size(parser: argparse.ArgumentParser) -> None:
    text = "work on about N x N pixels, 64 to 1536 (default: the size the model was trained at)"
    parser.add_argument("--size", dest="edit_size", type=_whole(64, 1536), metavar="N", help=text)


def _add_concepts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", metavar="WORDS", help='what is there, such as "cat"')
    parser.add_argument("--to", dest="target", metavar="WORDS", help='what to make of it, such as "cat with glasses"')


def _add_captioner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--captioner", metavar="FOLDER", help="BLIP model that says what an image shows")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="make those again that the folder already has")


def _add_run(parser: argparse.ArgumentParser, steps: str, default: int | None = None) -> None:
    parser.add_argument("--steps", type=_whole(1, 999), default=default, metavar="N", help=f"1 to 999 ({steps})")
    _add_seed(parser, "of all randomness")


def _add_seed(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, metavar="N", help=f"{what} (default: 0)")


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=[*PRESETS], default="p2pz", help="numbers of the method (default: p2pz)")


if __name__ == "__main__":
    sys.exit(main())
