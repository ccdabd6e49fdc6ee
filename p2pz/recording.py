"""Cross-attention maps kept while a method runs: those that are wanted, as small as they are wanted."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from p2pz.attention import BRANCHES, HALVES, Attend, Features, Hooks, Part, Site, hooks_by_parts, plain
from p2pz.files import check_tensor, load_tensors, making_sense, save_tensors
from p2pz.kernels import attention_probabilities, attention_with_maps
from p2pz.model import Model
from p2pz.unet import UNet

BRANCHES_OF = {"edit": ("edit", "reference"), "sample": ("sample",), "invert": ("inversion",)}
"""What each method makes of images."""


@dataclass(frozen=True)
class Recorded:
    """Cross-attention maps of one image's run.

    Attributes:
        maps: `(branch, half) -> path -> [S, N, T]`, or `[S, H, N, T]` of single heads: S recorded steps, N positions
            row by row, T tokens.
        sites: size and heads of each recorded layer, by its path.
        steps: numbers of the recorded steps, from 0.
        timesteps: what the UNet was told in these.
        tokens: places of the recorded tokens in the padded caption.
        prompt: the caption.
    """

    maps: dict[tuple[str, str], dict[str, Tensor]]
    sites: dict[str, Site]
    steps: tuple[int, ...]
    timesteps: tuple[int, ...]
    tokens: tuple[int, ...]
    prompt: str

    def of(self, branch: str, half: str = "conditional") -> dict[str, Tensor]:
        """Maps of a branch by path. Raises ValueError if they were not recorded."""
        if (branch, half) not in self.maps:
            known = ", ".join(" ".join(key) for key in self.maps)
            raise ValueError(f"there are no maps of {branch} {half}; recorded: {known}")
        return self.maps[branch, half]

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all.

        The maps are called "branch half layer", for instance "edit conditional mid_block.attentions.0...".

        Args:
            path: for instance `maps.safetensors`.

        Raises:
            ValueError: the place cannot be written to.
        """
        tensors = {f"{' '.join(key)} {layer}": maps for key, own in self.maps.items() for layer, maps in own.items()}
        card = {name: json.dumps(getattr(self, name)) for name in ("steps", "timesteps", "tokens", "prompt")}
        card["sites"] = json.dumps([asdict(site) for site in self.sites.values()])
        save_tensors(path, "maps", tensors, card)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recorded:
        """Read a file that `save` wrote.

        Args:
            path: the file.

        Raises:
            ValueError: it is missing, holds no maps or is damaged.
        """
        facts = ("steps", "timesteps", "tokens", "prompt", "sites")
        tensors, card = load_tensors(path, "maps", (), facts)
        maps: dict[tuple[str, str], dict[str, Tensor]] = {}
        with making_sense(path, "file of maps", "record them again"):
            *numbers, prompt, sites = (json.loads(card[name]) for name in facts)
            steps, timesteps, tokens = (tuple(map(int, each)) for each in numbers)
            sites = {site["path"]: Site(**site) for site in sites}
            for name, tensor in tensors.items():
                branch, half, layer = name.split(" ")
                site = sites[layer]
                heads = [site.heads] if tensor.ndim == 4 else []
                check_tensor(name, tensor, (len(steps), *heads, site.height * site.width, len(tokens)))
                maps.setdefault((branch, half), {})[layer] = tensor
            # In the order of the layers.
            maps = {key: {layer: own[layer] for layer in sites} for key, own in maps.items()}
        return cls(maps, sites, steps, timesteps, tokens, str(prompt))


@dataclass
class Recorder:
    """What to keep, and what was kept; see `record`."""

    layers: tuple[str, ...]
    tokens: tuple[int, ...] | None
    steps: tuple[int, ...] | None
    branches: tuple[str, ...]
    halves: tuple[str, ...]
    per_head: bool
    dtype: torch.dtype
    host: bool
    max_gib: float
    _places: dict[int, Recorded] = field(default_factory=dict, repr=False)
    _tables: dict[tuple[str, str, str], Tensor] = field(default_factory=dict, repr=False)
    _sites: dict[str, Site] = field(default_factory=dict, repr=False)
    _timesteps: dict[int, int] = field(default_factory=dict, repr=False)
    _bytes: int = field(default=0, repr=False)
    _device: torch.device | None = field(default=None, repr=False)

    @property
    def runs(self) -> list[Recorded]:
        """What was kept, in the order of the results."""
        return [self._places[place] for place in sorted(self._places)]

    @property
    def key(self) -> Hashable:
        """All that a recorded graph depends on."""
        return self.layers, self.tokens, self.branches, self.halves, self.per_head, self.dtype

    def clear(self) -> None:
        """Forget what was kept: a new call begins."""
        self._places.clear()
        self._bytes = 0

    def _parts(self, parts: Sequence[Part]) -> list[tuple[slice, Part]]:
        """The parts of a batch that are wanted, and their rows."""
        chosen, start = [], 0
        for part in parts:
            if part.branch in self.branches and part.half in self.halves:
                chosen.append((slice(start, start + part.rows), part))
            start += part.rows
        return chosen

    def _wants(self, path: str) -> bool:
        return any(fnmatchcase(path, f"*{layer}*") for layer in self.layers)

    def sizes(self, unet: UNet, height: int, width: int, count: int) -> dict[str, tuple[Site, tuple[int, ...]]]:
        """Of every wanted layer the site, and the shape of an image's maps of one step: `[N, T]` or `[H, N, T]`.

        Args:
            unet: whose layers.
            height, width: of the latents.
            count: tokens of a caption.

        Raises:
            ValueError: no layer is wanted.
        """
        sites = [site for site in unet.sites(height, width) if site.kind == "cross" and self._wants(site.path)]
        if not sites:
            paths = ", ".join(site.path for site in unet.sites(height, width) if site.kind == "cross")
            raise ValueError(f"no cross-attention layer's path contains {' or '.join(self.layers)}; there are {paths}")
        tokens = len(self.tokens or range(count))
        heads = [(site.heads,) if self.per_head else () for site in sites]
        return {s.path: (s, (*h, s.height * s.width, tokens)) for s, h in zip(sites, heads, strict=True)}

    def bytes_for(
        self,
        model: Model,
        method: str = "edit",
        *,
        steps: int = 50,
        images: int = 1,
        size: tuple[int, int] | None = None,
    ) -> int:
        """Bytes that the maps of a call will take at most; without a negative half, or with results that share a
        reference, it is less.

        Args:
            model: whose maps.
            method: `"edit"`, `"sample"` or `"invert"`.
            steps: of the run.
            images: results: images times directions.
            size: width and height of the images in pixels; None: the model's own square.

        Raises:
            ValueError: unknown method, or no layer is wanted.
        """
        if method not in BRANCHES_OF:
            raise ValueError(f"method must be one of {', '.join(BRANCHES_OF)}, not {method!r}")
        width, height = (side // model.vae.config.downsampling for side in size or (model.native_size,) * 2)
        sizes = self.sizes(model.unet, height, width, model.tokenizer.model_max_length)
        kinds = len(set(BRANCHES_OF[method]) & set(self.branches)) * len(self.halves)
        if self.steps is not None:
            steps = sum(step < steps for step in self.steps)
        elements = sum(torch.Size(shape).numel() for _, shape in sizes.values())
        return elements * kinds * steps * images * self.dtype.itemsize

    def begin(
        self, unet: UNet, parts: Sequence[Part], latents: Tensor, timesteps: Sequence[int], count: int
    ) -> list[Tensor]:
        """Get ready for a run.

        Args:
            unet: whose maps to keep.
            parts: of the batch of a step.
            latents: `[B, 4, h, w]`, of the run's size and device.
            timesteps: of its steps.
            count: tokens of a caption.

        Returns:
            Empty maps, for the state of the run.

        Raises:
            ValueError: nothing, tokens or steps that there are not, no such layer, or more bytes than `max_gib`.
        """
        if not self._parts(parts):
            there = ", ".join(dict.fromkeys(f"{part.branch} {part.half}" for part in parts))
            raise ValueError(
                f"nothing to record: this run is {there}, but of branches {', '.join(self.branches)} the halves "
                f"{', '.join(self.halves)} are wanted"
            )
        wrong = [step for step in self.steps or () if step >= len(timesteps)]
        if wrong:
            raise ValueError(f"steps to record must be from 0 to {len(timesteps) - 1}, not {wrong[0]}")
        wrong = [token for token in self.tokens or () if token >= count]
        if wrong:
            raise ValueError(f"tokens to record must be from 0 to {count - 1}, not {wrong[0]}")
        sizes = self.sizes(unet, *latents.shape[2:], count)
        steps = self.steps or range(len(timesteps))
        self._sites = {path: site for path, (site, _) in sizes.items()}
        self._timesteps = {step: int(timesteps[step]) for step in steps}
        shapes = {
            (path, part.branch, part.half): (part.rows, *shape)
            for path, (_, shape) in sizes.items()
            for _, part in self._parts(parts)
        }
        elements = sum(torch.Size(shape).numel() for shape in shapes.values())
        self._bytes += elements * len(steps) * self.dtype.itemsize
        if self._bytes > self.max_gib * 2**30:
            raise ValueError(
                f"these maps take {self._bytes / 2**30:.2f} GiB, more than max_gib={self.max_gib:g}: record fewer "
                "layers, tokens or steps, or allow more"
            )
        self._device = latents.device
        self._tables = {name: self._table(len(steps), *shape) for name, shape in shapes.items()}
        return [latents.new_zeros(shape, dtype=self.dtype) for shape in shapes.values()]

    def _table(self, *shape: int) -> Tensor:
        """Memory for maps; on the host pinned, so that copies do not wait, if the host has so much of it."""
        pinned = self.host and self._device.type == "cuda"
        with contextlib.suppress(RuntimeError) if pinned else contextlib.nullcontext():
            return torch.empty(shape, dtype=self.dtype, device="cpu" if self.host else self._device, pin_memory=pinned)
        return torch.empty(shape, dtype=self.dtype)

    def watch(self, attend: Attend, parts: Sequence[Part], maps: list[Tensor], index: Tensor | None = None) -> Attend:
        """An `attend` that also leaves the maps of the wanted layers and parts.

        They are those of the layer's own queries and keys, also if `attend` makes something else of these. On the CPU
        the output is that of `attend` to the last bit; on a GPU the kernel that writes the maps gives the default's.

        Args:
            attend: gives the output.
            parts: of the batch.
            maps: receives `[rows, N, T]` or `[rows, H, N, T]`, layer by layer and in each part by part.
            index: number of the step, `[1]`, if known: on the CPU maps of a step that nobody wants are then left empty.
        """
        chosen = self._parts(parts)
        step = None if index is None or index.is_cuda else int(index)

        def unwanted(part: Part) -> bool:
            return step is not None and step + part.ahead not in self._timesteps

        def attend_and_watch(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
            if site.kind == "self" or not chosen or not self._wants(site.path):
                return attend(q, k, v, site)
            if q.is_cuda:
                options = {"dtype": self.dtype, "head_mean": not self.per_head, "tokens": self.tokens}
                out, seen = attention_with_maps(q, k, v, **options)
                maps.extend(seen[rows] for rows, _ in chosen)
                return out if attend is plain else attend(q, k, v, site)
            for rows, part in chosen:
                maps.append(q.new_empty(0) if unwanted(part) else self._maps(q[rows], k[rows]))
            return attend(q, k, v, site)

        return attend_and_watch

    def _maps(self, q: Tensor, k: Tensor) -> Tensor:
        """`[B, N, T]` or `[B, H, N, T]`, in plain torch."""
        maps = attention_probabilities(q, k)
        if self.tokens is not None:
            maps = maps[..., list(self.tokens)]
        return (maps if self.per_head else maps.mean(1)).to(self.dtype)

    def maps_of(
        self, queries: Sequence[Tensor], keys: dict[str, Tensor], parts: Sequence[Part], index: Tensor
    ) -> list[Tensor]:
        """What `watch` leaves of a pass of which only queries and keys are known.

        Args:
            queries: `[rows, N, H, D]` of each cross-attention layer, in the order of `keys`.
            keys: `path -> [rows, M, H, D]`.
            parts: of the batch.
            index: number of the step, `[1]`.
        """
        maps: list[Tensor] = []
        watch = self.watch(lambda q, *_: q, parts, maps, index)  # nobody wants an output
        for q, (path, k) in zip(queries, keys.items(), strict=True):
            if path in self._sites:
                watch(q, k, k, self._sites[path])
        return maps

    def weave(self, *passes: Sequence[Tensor]) -> list[Tensor]:
        """What `watch` left in several passes of a step, as one pass with all their parts would have left it."""
        layers = len(self._sites)
        counts = [len(maps) // layers for maps in passes]
        return [
            seen
            for i in range(layers)
            for maps, count in zip(passes, counts, strict=True)
            for seen in maps[i * count : (i + 1) * count]
        ]

    def watcher(self) -> Recorder:
        """This recorder without what it keeps, for a recorded graph, which lives longer."""
        return replace(self, _places={}, _tables={})

    def take(self, step: int, parts: Sequence[Part], maps: Sequence[Tensor]) -> None:
        """Keep the maps of a step, if it is wanted.

        Args:
            step: its number, from 0.
            parts: of the batch.
            maps: as `watch` leaves them.
        """
        places = {number: i for i, number in enumerate(self._timesteps)}
        names = [(path, part) for path in self._sites for _, part in self._parts(parts)]
        for (path, part), seen in zip(names, maps, strict=True):
            place = places.get(step + part.ahead)
            if place is not None:
                self._tables[path, part.branch, part.half][place].copy_(seen, non_blocking=True)

    def finish(self, places: Sequence[int], prompts: Sequence[str], rows: Sequence[dict[str, int]]) -> None:
        """Hand the maps of a run out to its results.

        Args:
            places: of the results in the whole call.
            prompts: their captions.
            rows: which row of each branch is a result's.
        """
        if self.host and self._device.type == "cuda":  # copies to the host may be on their way
            torch.cuda.synchronize(self._device)
        for place, prompt, own in zip(places, prompts, rows, strict=True):
            maps: dict[tuple[str, str], dict[str, Tensor]] = {}
            for (path, branch, half), table in self._tables.items():
                maps.setdefault((branch, half), {})[path] = table[:, own[branch]]
            tokens = self.tokens or tuple(range(next(iter(self._tables.values())).shape[-1]))
            times = tuple(self._timesteps), tuple(self._timesteps.values())
            self._places[place] = Recorded(maps, self._sites, *times, tokens, prompt)
        self._tables = {}


def given_hooks(attend: Attend, features: Features | None, record: Recorder | None) -> Hooks:
    """Somebody's functions as `Hooks`, their recorder emptied.

    Raises:
        ValueError: they are something else.
    """
    for name, function in (("attend", attend), ("features", features or plain)):
        if not callable(function):
            raise ValueError(f"{name} must be a function (see p2pz.attention), not {function!r:.100}")
    if not isinstance(record, Recorder | None):
        raise ValueError(f"record must be a recorder, as p2pz.record() gives, not {record!r:.100}")
    if record:
        record.clear()
    return Hooks(attend, features)


def hooks_in_step(
    hooks: Hooks,
    recorder: Recorder | None,
    parts: Sequence[Part],
    index: Tensor,
    timesteps: Sequence[int],
    maps: list[Tensor],
) -> Hooks:
    """The hooks of a step's pass: somebody's functions, told what they see, and a recorder that watches.

    Args:
        hooks, parts, index, timesteps: see `hooks_by_parts`.
        recorder: None: nobody watches.
        maps: receives what `Recorder.watch` leaves.
    """
    told = hooks_by_parts(hooks, parts, index, timesteps)
    if not recorder:
        return told
    return told._replace(attend=recorder.watch(told.attend, parts, maps, index))


def record(
    layers: str | Sequence[str] = "",
    *,
    tokens: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    branches: Sequence[str] = BRANCHES,
    halves: Sequence[str] = ("conditional",),
    per_head: bool = False,
    dtype: torch.dtype = torch.float16,
    host: bool = True,
    max_gib: float = 4.0,
) -> Recorder:
    """Choose the cross-attention maps to keep: `p2pz.edit(..., record=recorder)`, and so with `sample` and `invert`.

    The attention kernel writes what is kept and nothing else. Afterwards `recorder.runs` has a `Recorded` for each
    result, in order; with several directions, all those of the first image come first. The next call begins anew.

    Args:
        layers: parts of the paths of layers, with `*` for anything: `"mid_block"`, `"up_blocks.*.attentions.1"`.
            Empty: all cross-attention layers.
        tokens: places in the padded caption, 0 the start token. None: all.
        steps: numbers of steps, from 0. None: all.
        branches: of `"edit"`, `"reference"`, `"sample"` and `"inversion"`.
        halves: of classifier-free guidance, `"conditional"` and `"negative"`.
        per_head: keep the maps of each head instead of their mean.
        dtype: of the maps, float16, bfloat16 or float32.
        host: keep them in host memory instead of the GPU's.
        max_gib: most GiB to take, see `Recorder.bytes_for`; a batch that would take more does not begin.

    Returns:
        The recorder.

    Raises:
        ValueError: an argument is out of range.
    """
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    for name, given, known in (("branches", branches, BRANCHES), ("halves", halves, HALVES)):
        if not given or not set(given) <= set(known) or isinstance(given, str):
            raise ValueError(f"{name} must be a list of {', '.join(known)}, not {given!r}")
    for name, numbers in (("tokens", tokens), ("steps", steps)):
        if numbers is None:
            continue
        whole = all(isinstance(number, int) and number >= 0 for number in numbers)
        if not len(numbers) or not whole or len(set(numbers)) < len(numbers):
            raise ValueError(f"{name} must be distinct whole numbers from 0 on, at least one, not {list(numbers)}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be float16, bfloat16 or float32, not {dtype}")
    return Recorder(
        layers or ("",),
        None if tokens is None else tuple(tokens),
        None if steps is None else tuple(sorted(steps)),
        tuple(branches),
        tuple(halves),
        per_head,
        dtype,
        host,
        max_gib,
    )
