"""The command line: p2pz edit, sample, invert, direction and bench."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from p2pz import __version__

if TYPE_CHECKING:  # --help and wrong arguments answer without the modules that import transformers
    from PIL import Image

    from p2pz.inversion import Inversion
    from p2pz.model import Model

PRESETS = ("p2pz", "authors", "diffusers")
BENCHES = ("edit_speed", "kernels", "quality", "cpu_edit")
DTYPES = ("float32", "float16", "bfloat16")


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
            return args.run(args)
        except KeyboardInterrupt:
            print("p2pz: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if not _is_expected(error):
                raise
            _complain("error", error)
            return 2


def edit_command(args: argparse.Namespace) -> int:
    """`p2pz edit`: one image to a file, or several to a folder."""
    from p2pz import Direction, direction, edit
    from p2pz.images import save_image

    concepts = (args.source, args.target)
    if concepts.count(None) != (2 if args.direction else 0):
        args.parser.error("give --from and --to, or --direction")
    _check_settings(args)
    change = Direction.load(args.direction) if args.direction else None
    ending = _file_words(change.target if change else args.target) or "edited"
    images = [Path(image) for image in args.images]
    outputs, in_folder = _outputs([f"{image.stem}_{ending}.png" for image in images], args.out)
    for image, output in zip(images, outputs, strict=True):
        if image.resolve() == output.resolve():
            raise ValueError(f"the edit of {image} would replace the image itself: give another -o")

    model: Model | None = None
    failed = 0
    for image, output in zip(images, outputs, strict=True):
        if in_folder and _skip(output, args):
            continue
        try:
            item = _read_item(image)
        except (ValueError, OSError) as error:
            failed += _complain_about(image, error, len(images))
            continue
        if model is None:  # after the first image: a wrong path is reported at once, and a finished folder needs none
            model = _load(args)
            change = change or direction(*concepts, model=model)
            change.check_fits(model)
        _print_warnings(f"{image}: ")
        start = time.perf_counter()
        try:
            result = edit(
                item,
                change,
                model=model,
                prompt=args.prompt,
                negative_prompt=args.negative_prompt,
                preset=args.preset,
                steps=args.steps,
                strength=args.strength,
                guidance=args.guidance,
                xa_guidance=args.xa_guidance,
                seed=args.seed,
                progress=_progress(args),
            )
            save_image(result.image, output)
        except Exception as error:
            if not _is_expected(error):
                raise
            failed += _complain_about(image, error, len(images))
            continue
        quality = result.reconstruction_psnr
        facts = [
            f'"{_one_line(result.prompt)}"',
            f"reconstruction {quality:.1f} dB" if quality is not None else "from inversion",
        ]
        _say_written(args, output, *facts, start=start)
    if failed:
        _complain("error", f"{failed} of {len(images)} images failed")
    return 1 if failed else 0


def sample_command(args: argparse.Namespace) -> int:
    """`p2pz sample`: one picture to a file, or several to a folder."""
    from p2pz import sample
    from p2pz.images import save_image

    _check_settings(args)
    prompts = [prompt for prompt in args.prompts for _ in range(args.count)]
    names = [f"{_file_words(prompt) or 'sample'}_{args.seed + i}.png" for i, prompt in enumerate(prompts)]
    outputs, in_folder = _outputs(names, args.out)
    model: Model | None = None
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if in_folder and _skip(output, args):
            continue
        model = model or _load(args)
        start = time.perf_counter()
        pictures = sample(
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
        _say_written(args, output, f'"{_one_line(prompt)}"', f"seed {args.seed + i}", start=start)
    return 0


def invert_command(args: argparse.Namespace) -> int:
    """`p2pz invert`: an image to a file for `p2pz edit`."""
    from p2pz import invert
    from p2pz.images import read_image

    _check_settings(args)
    output = _tensor_output(args.out)
    picture = read_image(args.image)
    model = _load(args)
    start = time.perf_counter()
    inversion = invert(
        picture,
        model=model,
        prompt=args.prompt,
        preset=args.preset,
        steps=args.steps,
        seed=args.seed,
        progress=_progress(args),
    )
    inversion.save(output)
    _say_written(args, output, f'"{_one_line(inversion.prompt)}"', f"{inversion.steps} steps", start=start)
    return 0


def direction_command(args: argparse.Namespace) -> int:
    """`p2pz direction`: two concepts, or two files of sentences, to a file for `p2pz edit`."""
    from p2pz import direction
    from p2pz.directions import read_sentences

    concepts, files = (args.source, args.target), (args.source_sentences, args.target_sentences)
    if files.count(None) == 1 or (None in concepts and None in files):
        args.parser.error("give --from and --to, or --source-sentences and --target-sentences")
    output = _tensor_output(args.out)
    sentences = None
    if None not in files:
        sentences = tuple(read_sentences(file, side) for file, side in zip(files, ("source", "target"), strict=True))
    model = _load(args)
    start = time.perf_counter()
    made = direction(args.source or "", args.target or "", sentences=sentences, model=model)
    made.save(output)
    _say_written(args, output, f"{made.sentences[0]} and {made.sentences[1]} sentences", start=start)
    return 0


def _check_settings(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers out of range, with the API's own words and before the model is loaded."""
    from dataclasses import replace

    from p2pz.presets import PRESETS, Settings

    given = vars(args)
    numbers = {
        name: given[name] for name in ("steps", "strength", "guidance", "xa_guidance") if given.get(name) is not None
    }
    replace(PRESETS[args.preset] if "preset" in given else Settings(), **numbers)


def _outputs(names: Sequence[str], out: str | None) -> tuple[list[Path], bool]:
    """Where each picture goes, checked before the work.

    Args:
        names: what to call the pictures in a folder.
        out: a file name or a folder; None is the current folder.

    Returns:
        A path for each name, and whether they were put into a folder that `out` names.

    Raises:
        ValueError: they cannot be written.
    """
    from PIL import Image

    from p2pz.files import check_place
    from p2pz.images import check_image_path

    if len(names) == 1 and not (out and (out.endswith("/") or Path(out).is_dir())):
        output = Path(out or names[0])
        check_image_path(output)
        return [output], False
    folder = Path(out or ".")
    if not folder.is_dir() and folder.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"several pictures need a folder, and {folder} is a file name")
    outputs = [folder / name for name in names]
    repeated = next((output for i, output in enumerate(outputs) if output in outputs[:i]), None)
    if repeated:
        raise ValueError(f"two of the images would be written to {repeated}: rename one, or edit them one by one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot create the folder {folder}: {(error.strerror or str(error)).lower()}") from None
    for output in outputs:
        check_place(output)
    return outputs, True


def _tensor_output(out: str) -> Path:
    """The path of a safetensors file to write, checked before the work. Raises ValueError."""
    from p2pz.files import check_place

    output = Path(out)
    if output.suffix != ".safetensors":
        raise ValueError(f"cannot write {output}: give a name that ends in .safetensors")
    check_place(output)
    return output


def _skip(output: Path, args: argparse.Namespace) -> bool:
    """Whether a picture of a folder is there already and stays; says so."""
    if args.overwrite or not output.exists():
        return False
    _say(args, f"skipped {output}: it exists (--overwrite makes it again)")
    return True


def _read_item(path: Path) -> Image.Image | Inversion:
    """An image or a saved inversion. Raises ValueError."""
    from p2pz import Inversion
    from p2pz.images import read_image

    return Inversion.load(path) if path.suffix == ".safetensors" else read_image(path)


def bench_command(args: argparse.Namespace) -> int:
    """`p2pz bench`: a script of the benchmark suite, in a process of its own."""
    script = Path(__file__).resolve().parent.parent / "bench" / f"{args.suite}.py"
    if not script.is_file():
        raise ValueError("the benchmarks are not installed with p2pz: run it in a clone, installed by pip install -e .")
    return subprocess.run([sys.executable, str(script), *args.options]).returncode


def _load(args: argparse.Namespace) -> Model:
    """The model that the options name."""
    import torch

    from p2pz import load

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return load(args.model, device=args.device, dtype=dtype, max_memory=args.max_memory)


def _progress(args: argparse.Namespace) -> bool | None:
    return False if args.quiet else None


def _file_words(text: str) -> str:
    """Words joined with underscores, short enough for a file name."""
    return re.sub(r"\W+", "_", text).strip("_")[:60]


def _say(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(line, flush=True)


def _say_written(args: argparse.Namespace, output: Path, *facts: str, start: float) -> None:
    _say(args, f"wrote {output}: {', '.join(facts)}, {time.perf_counter() - start:.1f} s")


def _complain(kind: str, message: object) -> None:
    """One line on stderr, whatever the message."""
    print(f"p2pz: {kind}: {_one_line(message) or type(message).__name__}", file=sys.stderr, flush=True)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _print_warnings(prefix: str = "") -> None:
    """Print each warning once, as a line of ours without a source location; `warnings.catch_warnings` undoes it."""
    seen = set()

    def show(message: object, *_, **__) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            _complain("warning", f"{prefix}{message}")

    warnings.showwarning = show


def _complain_about(image: Path, error: Exception, count: int) -> int:
    """Report that an image of several failed, and return 1; an only image's error is raised."""
    if count == 1:
        raise error
    _complain("error", error if str(image) in str(error) else f"{image}: {error}")
    return 1


def _is_expected(error: Exception) -> bool:
    """Whether an error is about what the user gave, or the machine, rather than a mistake in p2pz."""
    if isinstance(error, RuntimeError):  # PyTorch's, on a GPU and on the CPU
        return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, (ValueError, OSError))


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
    "edit": "example: p2pz edit cat.png --from cat --to dog -o dog.png",
    "sample": 'example: p2pz sample "a photo of a cat on the beach" --seed 3 -o cat.png',
    "invert": "example: p2pz invert cat.png -o cat.safetensors\n         p2pz edit cat.safetensors --from cat --to dog",
    "direction": "example: p2pz direction --from cat --to dog -o cat2dog.safetensors\n"
    "         p2pz edit cat.png --direction cat2dog.safetensors",
    "bench": "example: p2pz bench edit_speed --out results",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="p2pz",
        usage="p2pz COMMAND ... (p2pz COMMAND --help lists its options)",
        description="Change one thing in an image and keep the rest (pix2pix-zero).",
        epilog=_EPILOGS["edit"],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"p2pz {__version__}")
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
    edit.add_argument("images", nargs="+", metavar="IMG", help="image, or inversion saved by p2pz invert")
    _add_concepts(edit)
    edit.add_argument("--direction", metavar="FILE", help="saved direction, instead of --from and --to")
    edit.add_argument("-o", "--out", help="file; for several images a folder (default: <image>_<to>.png, here)")
    edit.add_argument("--prompt", metavar="TEXT", help="what the image shows (default: recognised, or from --from)")
    edit.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from (default: the prompt)")
    edit.add_argument("--strength", type=float, metavar="X", help="larger: stronger edit (default: the preset's)")
    edit.add_argument("--guidance", type=float, metavar="X", help="larger: stronger edit (default: the preset's)")
    edit.add_argument(
        "--xa-guidance", type=float, metavar="X", help="larger: closer to the image (default: the preset's)"
    )
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
    direction.add_argument("-o", "--out", required=True, help="file, .safetensors")

    bench = command("bench", bench_command, "run a benchmark", "SUITE")
    bench.add_argument("suite", choices=BENCHES, metavar="SUITE", help=", ".join(BENCHES))
    bench.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="OPTIONS", help="of the benchmark; --help lists them"
    )

    for sub in (edit, sample, invert, direction):
        sub.add_argument("--model", metavar="FOLDER", help="Stable Diffusion (default: $P2PZ_MODEL, or bundled)")
        sub.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
        sub.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on the CPU")
        sub.add_argument("--max-memory", type=float, metavar="GIB", help="of the GPU's memory (default: no limit)")
        sub.add_argument("--quiet", action="store_true", help="no progress bars, and nothing about what was written")
    return parser


def _add_concepts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", metavar="WORDS", help='what is there, such as "cat"')
    parser.add_argument("--to", dest="target", metavar="WORDS", help='what to make of it, such as "cat with glasses"')


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="make those again that the folder already has")


def _add_run(parser: argparse.ArgumentParser, steps: str, default: int | None = None) -> None:
    parser.add_argument("--steps", type=_whole(1, 999), default=default, metavar="N", help=f"1 to 999 ({steps})")
    seeds = _whole(0, 2**63 - 1)
    parser.add_argument("--seed", type=seeds, default=0, metavar="N", help="of all randomness (default: 0)")


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="p2pz", help="numbers of the method (default: p2pz)")


if __name__ == "__main__":
    sys.exit(main())
