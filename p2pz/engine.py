"""Runs the steps of a method: one after the other, and on a GPU as replays of one CUDA graph.

A step is a function `step(index, state, constants) -> state` on tensors. What changes from step to step lies in tables
among the constants, whose row `index` a step reads, so that nothing has to come from the host during a run.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from p2pz.kernels import compile_ahead

Tensors = Sequence[Tensor]
Step = Callable[[Tensor, Tensors, Tensors], Tensors]

MOST_GRAPHS = 40
"""All make room for one more. An edit takes seven, and others for images of another size."""


def row(table: Tensor, index: Tensor) -> Tensor:
    """Row of a table at `index`, a tensor `[1]`, without asking the device which."""
    return table.index_select(0, index)[0]


def explain_out_of_memory(function: Callable) -> Callable:
    """Decorator: an out-of-memory error of the GPU says what to do, and lets go of the memory of what failed."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError:
            pass  # and not raised from here: a new error would hold the old one, and that the tensors in its frames
        raise torch.OutOfMemoryError(
            "the GPU is out of memory: load the model with a budget in GiB, p2pz.load(max_memory=4) or --max-memory 4, "
            "with a smaller one if it has one, or use fewer or smaller images at once"
        )

    return call


_unused_streams: dict[int, list[torch.cuda.Stream]] = defaultdict(list)


def stream_of(graphs: Graphs) -> torch.cuda.Stream:
    """A stream of the current GPU for as long as `graphs` lives; then the next may have it.

    Used again, because cuBLAS keeps work spaces for each stream that it ever saw. Never shared, because recordings of
    a stream read the same work space, and in PyTorch 2.12 the first that goes takes it along.
    """
    device = torch.cuda.current_device()
    stream = _unused_streams[device].pop() if _unused_streams[device] else torch.cuda.Stream(device)
    weakref.finalize(graphs, _unused_streams[device].append, stream)
    return stream


def fixed_places(arguments: Tensors) -> Tensors:
    """Copies of tensors that can be written to ever after, which those made in inference mode cannot from elsewhere."""
    with torch.inference_mode(False):
        return [torch.empty_like(tensor).copy_(tensor) for tensor in arguments]


class CudaGraph:
    """A function on tensors, recorded once; a call copies its arguments to fixed places and replays it.

    Args:
        function: must not synchronise with the host.
        arguments: an example of them.
        pool: memory that graphs share which never run at the same time.
        stream: on which to record.
    """

    def __init__(
        self, function: Callable[..., Tensors], arguments: Tensors, pool: tuple[int, int], stream: torch.cuda.Stream
    ):
        self.arguments = fixed_places(arguments)
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                compile_ahead(function, *self.arguments)
                self.load(arguments)  # the dry run spoilt those that the function changes
                function(*self.arguments)  # lets libraries allocate, which cannot be recorded
        finally:  # also after an error: what then is let go of must not be in use
            torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the trial run took would lie beside the graph's own memory
        self._function = function  # keeps the weights alive that the graph reads
        self._graph = torch.cuda.CUDAGraph()
        # The outer one is left also if the recording cannot be ended, after which the inner one would stay.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(self._graph, pool=pool, stream=stream):
            self.results = function(*self.arguments)

    def load(self, arguments: Tensors) -> None:
        """Copy arguments to where the graph reads them."""
        for place, tensor in zip(self.arguments, arguments, strict=True):
            place.copy_(tensor)

    def replay(self) -> Tensors:
        """The results, in memory that the next replay overwrites."""
        self._graph.replay()
        return self.results


class Courier:
    """Copies rows of large tables to the GPU, or from there, while recorded steps run.

    Args:
        rows: where a step reads or leaves a row of each table.
        others: a row of each where the tables lie: on the GPU, or in pinned host memory.
        stream: on which to copy from there and to there.
    """

    def __init__(self, rows: Tensors, others: Tensors, stream: torch.cuda.Stream):
        self.far = any(not tensor.is_cuda for tensor in others)
        self.rows, self.copies = rows, [torch.empty_like(tensor) for tensor in rows] if self.far else []
        self.stream = stream

    def fetch(self, rows: Tensors) -> None:
        """Begin to bring what `deliver` will put in place."""
        if self.far:
            self._copy(self.copies, rows)
        else:
            self.copies = rows

    def deliver(self) -> None:
        """Put in place what was fetched."""
        self.finish()
        if self.rows:
            torch._foreach_copy_(self.rows, self.copies)

    def store(self, rows: Tensors) -> None:
        """Begin to take away what a step has left."""
        self.finish()
        if self.rows:
            torch._foreach_copy_(self.copies if self.far else rows, self.rows)
        if self.far:
            self._copy(rows, self.copies)

    def _copy(self, places: Tensors, tensors: Tensors) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)

    def finish(self) -> None:
        """Have all later work wait until everything has arrived."""
        if self.far:
            torch.cuda.current_stream().wait_stream(self.stream)


@dataclass
class Graphs:
    """Recorded graphs of a model, for one thread at a time: they read their arguments from fixed places.

    Attributes:
        record: on a GPU. False runs everything step by step, with the same results but for rounding.
        graphs: by kind of work and shapes of the arguments.
        pool: memory that the graphs share.
        stream: on which they are recorded, and large tables are copied.
        pinned: large tables in host memory that nobody uses, for the next run.
        room: bytes; if the process holds more when a graph is to be recorded, unused memory goes, and if that is not
            enough all other graphs. None: none goes.
    """

    record: bool = True
    graphs: dict[Hashable, CudaGraph] = field(default_factory=dict)
    pool: tuple[int, int] | None = None
    stream: torch.cuda.Stream | None = None
    pinned: Tensors = ()
    room: int | None = None

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        self.graphs.clear()
        self.pool = None
        torch.cuda.empty_cache()

    def _make_room(self, device: torch.device) -> None:
        """Let go of what is unused, and if that is not enough of all graphs."""
        for let_go in (torch.cuda.empty_cache, self.clear):
            if self.room is not None and torch.cuda.memory_reserved(device) > self.room:
                let_go()

    def _records(self, arguments: Tensors) -> bool:
        return self.record and arguments[0].device.type == "cuda"

    def find(self, kind: Hashable, function: Callable[..., Tensors], arguments: Tensors) -> CudaGraph:
        """The graph of `function`, recorded now if there is none yet.

        Args:
            kind: names the function and all that is fixed in it, modules by their `id`.
            function: see `CudaGraph`.
            arguments: on one GPU.
        """
        key = kind, tuple((tensor.shape, tensor.dtype) for tensor in arguments)
        if key not in self.graphs:
            self._make_room(arguments[0].device)
            if len(self.graphs) >= MOST_GRAPHS:
                self.clear()
            try:
                self.graphs[key] = self._record(function, arguments)
            except BaseException:  # what was begun goes, and may take along what the others need, see `stream_of`
                self.clear()
                raise
        return self.graphs[key]

    def _record(self, function: Callable[..., Tensors], arguments: Tensors) -> CudaGraph:
        """A recording. If memory runs out, all others make room; those still wanted are recorded again."""
        self.stream = self.stream or stream_of(self)
        if self.graphs:
            with contextlib.suppress(torch.OutOfMemoryError):  # and out of it, for it holds the tensors of what failed
                return CudaGraph(function, arguments, self.pool, self.stream)
            self.clear()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return CudaGraph(function, arguments, self.pool, self.stream)

    def call(self, kind: Hashable, function: Callable[..., Tensors], arguments: Tensors) -> Tensors:
        """`function(*arguments)`, as a graph if the arguments are on a GPU."""
        if not self._records(arguments):
            return function(*arguments)
        with torch.cuda.device(arguments[0].device):
            graph = self.find(kind, function, arguments)
            graph.load(arguments)
            return [result.clone() for result in graph.replay()]

    def run(
        self,
        kind: Hashable,
        step: Step,
        state: Tensors,
        constants: Tensors,
        count: int,
        label: str,
        progress: bool | None,
        each: Callable[[int, Tensors], None] | None = None,
        first: int = 0,
        tables: Tensors = (),
        fill: Tensors = (),
    ) -> Tensors:
        """Repeat a step.

        Args:
            kind: names the step and all that is fixed in it, modules by their `id`.
            step: `step(index, state, constants) -> state`; the index, a tensor `[1]`, counts from `first`. It returns
                new tensors, never one of the state in another's place.
            state: what the first step begins with.
            constants: tensors, tables among them.
            count: number of steps.
            label: of the progress bar.
            progress: show a bar; None: on a terminal only.
            each: called after every step with its number and the state, whose tensors the next step may overwrite.
            first: number of the first step.
            tables: those that are too large to be copied for a recording, on the GPU or in pinned host memory; a step
                finds its row of each behind the constants.
            fill: such tables, too: after every step, each gets its row from the state, from its second tensor on.

        Returns:
            The state after the last step.
        """
        index = torch.full((1,), first, dtype=torch.int64, device=state[0].device)
        bar = tqdm(range(count), label, disable=None if progress is None else not progress, leave=False)
        if not self._records(state):
            for i in bar:
                rows = [table[first + i].to(index.device, non_blocking=True) for table in tables]
                state = step(index, state, [*constants, *rows])
                index = index + 1
                for table, made in zip(fill, state[1:], strict=False):
                    table[first + i].copy_(made, non_blocking=True)
                if each:
                    each(first + i, state)
            return state

        size = len(state)

        def advance(index: Tensor, *tensors: Tensor) -> Tensors:
            places = tensors[:size]
            torch._foreach_copy_(places, step(index, places, tensors[size:]))
            index += 1
            return places

        with torch.cuda.device(index.device):  # streams are the current device's
            arguments = [index, *state, *constants, *(table[first].to(index.device) for table in tables)]
            graph = self.find(kind, advance, arguments)
            graph.load(arguments)
            places, made = graph.arguments[len(arguments) - len(tables) :], graph.results[1 : 1 + len(fill)]
            incoming = Courier(places, [table[first] for table in tables], self.stream)
            outgoing = Courier(made, [table[first] for table in fill], self.stream)
            try:
                for i in bar:
                    if i > 0:  # the first are among the arguments
                        incoming.deliver()
                    if i + 1 < count:
                        incoming.fetch([table[first + i + 1] for table in tables])
                    graph.replay()
                    outgoing.store([table[first + i] for table in fill])
                    if each:
                        each(first + i, graph.results)
                    if not bar.disable:
                        torch.cuda.current_stream().synchronize()  # or the bar would run ahead of the work
            finally:  # also if somebody stops it: memory that is let go of must not be on its way
                incoming.finish()
                outgoing.finish()
            return [result.clone() for result in graph.results]
