"""Edits of many image files: in batches of one size, with a record of each, shared among processes."""

from __future__ import annotations

import contextlib
import json
import math
import mimetypes
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
from PIL import Image

from p2pz.captions import Captioner
from p2pz.directions import Direction
from p2pz.editing import EditResult, edit
from p2pz.files import atomic_path, cause
from p2pz.images import read_image, to_original_size, working_size
from p2pz.inversion import Inversion
from p2pz.model import Model
from p2pz.weights import reason

RECORDS = "results.jsonl"
BATCH_SIZE = 8
"""Images at once on a GPU. On the CPU each goes alone: a batch saves little time there."""

IMAGE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2", ".tga",
)  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """An edit to be done: the file of an image, or of an inversion, and where the result goes."""

    image: Path
    output: Path


@dataclass(frozen=True)
class Record:
    """What became of a task; a line of `results.jsonl`.

    Attributes:
        input, output: paths. An output exists only where there is no error.
        prompt: the caption that was used; None if it was not got that far.
        seed: of all randomness.
        settings: the model's fingerprint, the size at which it worked, the direction in words, the preset's name, and
            the numbers of `p2pz.presets.Settings`.
        reconstruction_psnr: in dB; None for an inversion that has not kept the image.
        warnings: what was found to be doubtful.
        seconds: of the edit; of a batch, its share.
        error: why there is no output; None if there is one.
    """

    input: str
    output: str
    prompt: str | None
    seed: int
    settings: dict[str, Any]
    reconstruction_psnr: float | None
    warnings: tuple[str, ...]
    seconds: float
    error: str | None


@dataclass(frozen=True)
class Tools:
    """What edits are made with; the captioner is None if the prompts come from elsewhere."""

    model: Model
    direction: Direction
    captioner: Captioner | None = None


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files that paths stand for: themselves, or the images in a folder, in the order of their names.

    Raises:
        ValueError: a folder has no images.
    """
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        shown = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
        inside = [file for file in shown if file.suffix.lower() in IMAGE_ENDINGS and file.is_file()]
        if not inside:
            raise ValueError(f"folder {path} has no images: their names end in {', '.join(IMAGE_ENDINGS)}")
        others = [file.name for file in sorted({*shown} - {*inside}) if not file.is_dir()]
        others = [name for name in others if (mimetypes.guess_type(name)[0] or "").startswith("image/")]
        if others:
            named = ", ".join(others[:3]) + " ..." * (len(others) > 3)
            warnings.warn(
                f"left out of {path}: {named} ({len(others)} in all); images' names end in {', '.join(IMAGE_ENDINGS)}",
                stacklevel=2,
            )
        files += inside
    return files


def edit_files(
    tasks: Sequence[Task],
    prepare: Callable[[], Tools],
    *,
    records: Path | None = None,
    batch_size: int | None = None,
    original_size: bool = False,
    prompt: str | None = None,
    preset: str = "p2pz",
    seed: int = 0,
    **options: Any,
) -> Iterator[Record]:
    """Edit image files one batch after the other. An image that cannot be edited does not keep others from it.

    Args:
        tasks: what to do.
        prepare: loads the model and the rest; called once, when the first image was read.
        records: a file to which each task's record is appended, in one line, just before its output appears.
        batch_size: images of one size at once; None: `BATCH_SIZE` on a GPU, 1 on the CPU.
        original_size: give each result the size of its image, instead of the size the model works at.
        prompt, preset, seed, options: as in `edit`; without a prompt the captioner is asked, if there is one.

    Yields:
        The record of each task, batch by batch.

    Raises:
        ValueError: `prepare` does.
    """
    tools: Tools | None = None
    options |= {"preset": preset, "seed": seed}

    def failed(task: Task, error: Exception) -> Record:
        record = Record(str(task.image), str(task.output), None, seed, {}, None, (), 0.0, reason(error))
        if records:
            append_record(records, record)
        return record

    def finish(batch: list[tuple[Task, Image.Image | Inversion]]) -> Iterator[Record]:
        items = [item for _, item in batch]
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as caught:
                results = edit(items, tools.direction, model=tools.model, prompt=prompts(items), **options)
        except Exception as error:
            if not is_expected(error):
                raise
            if len(batch) == 1:
                yield failed(batch[0][0], error)
                return
            results = None
        if results is None:  # one by one, outside of the handler: what it holds would keep memory from being freed
            for one in batch:
                yield from finish([one])
            return
        seconds = (time.perf_counter() - start) / len(batch)
        said = list(dict.fromkeys(str(warning.message) for warning in caught))
        if len(batch) > 1:
            said = [f"of an image, or more, of {len(batch)} edited at once: {text}" for text in said]
        for (task, _), result in zip(batch, results, strict=True):
            record = _record(task, result, tools, said, seconds, options)
            try:
                _save(task, result, record, records, original_size)
            except (ValueError, OSError) as error:
                record = failed(task, error)
            yield record

    def prompts(items: Sequence[Image.Image | Inversion]) -> str | list[str] | None:
        if prompt is not None or tools.captioner is None or isinstance(items[0], Inversion):
            return prompt
        return tools.captioner.describe(items)

    waiting: dict[tuple, list[tuple[Task, Image.Image | Inversion]]] = {}
    for task in tasks:
        try:
            item = read_item(task.image)
        except (ValueError, OSError) as error:
            yield failed(task, error)
            continue
        if tools is None:
            tools = prepare()
            most = batch_size or (BATCH_SIZE if tools.model.device.type == "cuda" else 1)
            options["batch_size"] = most
        waiting.setdefault(_kind(item, tools.model, options.get("size")), []).append((task, item))
        fullest = max(waiting, key=lambda kind: len(waiting[kind]))
        if len(waiting[fullest]) == most or sum(map(len, waiting.values())) > 4 * most:  # or memory would fill
            yield from finish(waiting.pop(fullest))
    for group in waiting.values():
        yield from finish(group)


def read_item(path: Path) -> Image.Image | Inversion:
    """An image or a saved inversion. Raises ValueError."""
    return Inversion.load(path) if path.suffix == ".safetensors" else read_image(path)


def _kind(item: Image.Image | Inversion, model: Model, size: int | None) -> tuple:
    """Items of one kind can share a batch: pictures of one size at work, inversions of one size and number of steps."""
    if isinstance(item, Inversion):
        return "inversion", *item.latents.shape, item.steps
    return "picture", *working_size(item.size, size or model.native_size, model.vae.config.downsampling)


def _record(
    task: Task, result: EditResult, tools: Tools, said: list[str], seconds: float, options: dict[str, Any]
) -> Record:
    quality = result.reconstruction_psnr
    words = {"model": tools.model.fingerprint, "size": list(result.image.size)}
    words |= {"direction": tools.direction.words, "preset": options["preset"]}
    if options.get("negative_prompt") is not None:
        words["negative_prompt"] = options["negative_prompt"]
    return Record(
        str(task.image),
        str(task.output),
        result.prompt,
        options["seed"],
        words | asdict(result.settings),
        round(quality, 2) if quality is not None and math.isfinite(quality) else None,
        (*said, *result.warnings),
        round(seconds, 3),
        None,
    )


def _save(task: Task, result: EditResult, record: Record, records: Path | None, original_size: bool) -> None:
    """Write the picture and its record: the record first, so that no picture is without one."""
    picture = to_original_size(result.image, task.image) if original_size else result.image
    with atomic_path(task.output) as temporary:
        picture.save(temporary)
        if records:
            append_record(records, record)


def is_expected(error: Exception) -> bool:
    """Whether an error is about what the user gave, or the machine, rather than a mistake in p2pz."""
    if isinstance(error, RuntimeError):  # PyTorch's, on a GPU and on the CPU
        return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, (ValueError, OSError))


# Records ------------------------------------------------------------------------------------------------------------
def append_record(path: Path, record: Record) -> None:
    """Add a line to a file of records, in a single write."""
    line = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with open(path, "ab", buffering=0) as file:
            file.write(line.encode(errors="surrogateescape"))  # names of files need not be text
    except OSError as error:
        raise ValueError(f"cannot write {path}: {cause(error)}") from None


def merge_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Make one `results.jsonl` of it and of what other processes, or a run that was killed, left.

    The last record of an output replaces earlier ones. A last line that was cut off is dropped.

    Args:
        folder: where the outputs are.

    Returns:
        Name of the output to record.
    """
    path = folder / RECORDS
    shares = sorted(folder.glob(f"{path.stem}.rank*{path.suffix}"))
    old = path.read_bytes() if path.exists() else b""
    lines: dict[str, str] = {}
    records: dict[str, dict[str, Any]] = {}
    for content in (old, *(share.read_bytes() for share in shares)):
        *whole, last = content.decode(errors="surrogateescape").split("\n")
        for line in filter(None, (*whole, last if _parse(last) else "")):
            record = _parse(line)
            output = Path(record["output"]).name if record else line  # lines that are not ours stay too
            lines[output] = line
            if record:
                records[output] = record
    new = "".join(f"{line}\n" for line in lines.values()).encode(errors="surrogateescape")
    if new != old:
        with atomic_path(path) as temporary:
            temporary.write_bytes(new)
    for share in shares:
        share.unlink()
    return records


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("output"), str) else None


# Several processes --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ranks:
    """Which of how many processes of torchrun this is; `local` counts those on this machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def launched(self) -> bool:
        """Whether torchrun started several."""
        return self.count > 1

    def records(self, folder: Path) -> Path:
        """The file for this process's records; `merge_records` makes one of all."""
        path = folder / RECORDS
        return path.with_suffix(f".rank{self.rank}{path.suffix}") if self.launched else path


def ranks() -> Ranks:
    """What torchrun says in the environment; without it, one process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in (*names, "MASTER_ADDR", "MASTER_PORT")):
        return Ranks()
    return Ranks(*(int(os.environ[name]) for name in names))


@contextlib.contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """Within, the processes can talk to each other. If one fails, torchrun ends the others."""
    if not ranks.launched:
        yield
        return
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # shares take as long as they take
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def shared(value: T, ranks: Ranks) -> T:
    """The first process's value, in all of them."""
    values = [value]
    if ranks.launched:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def wait(ranks: Ranks) -> None:
    """Until all processes have come this far. Raises OSError if one never will."""
    if ranks.launched:
        try:
            torch.distributed.barrier()
        except RuntimeError:
            raise OSError("another process of this run failed") from None
