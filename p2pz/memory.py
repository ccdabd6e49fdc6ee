"""A budget of GPU memory: what an edit takes by estimate, and how to work so that it takes no more than allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from p2pz.images import same_size_groups
from p2pz.layers import Upsample
from p2pz.model import GIB, Model, lies_on, vae_dtype
from p2pz.schedule import whole_number

# What the UNet takes for each row of its batch, in feature maps of its finest level (`[channels, h, w]` of a latent,
# 2.5 MiB for SD 1.5 at 64 x 64 in float16), so that one number serves all sizes and dtypes. Adding up all live tensors
# on the meta device gives 29 (forward), 153 (gradient) and 51 (checkpointed) maps; what was measured on an H200 with
# SD 1.5, 64 x 64, float16, is 1.5 times that, libraries' work space included. The checkpointed gradient is twice, by
# which an edit of 2 guided rows is estimated at 2.93 GiB.
FORWARD, GRADIENT, CHECKPOINTED = 48.0, 225.0, 104.0
# What an edit may keep of its inversion, see `place_of_queries`: bytes of host memory (those of one image of 512 x 512,
# SD 1.5, float16, are 1.1 GiB for 50 steps and 2.2 for 100), or so much of a GPU's.
MOST_ON_THE_HOST, SHARE_OF_A_GPU = round(2.25 * GIB), 1 / 9
# What an edit keeps between passes for each row: queries of the reference, its keys and values, where graphs read them.
KEPT = 20.0
# How many times as many maps Stable Diffusion XL takes for a gradient, and keeps, as 1.5: adding up what autograd saves
# on the meta device gives 508 maps instead of 277, checkpointed 101 instead of 52. On an H200, 1024 x 1024, float16,
# with budgets from 10 to 60 GiB, an edit took 9.9 GiB (the smallest possible budget), 12 and, with 2 guided rows, 19.
XL_DEPTH = 1.9
# What the VAE takes for one image, in its own finest feature maps (`[channels, H, W]` of the picture): 0.45 GiB for
# the decoder at 512 x 512, 0.40 for the encoder.
VAE = 7.2
# Fragmentation of the allocator: of all of the above.
MARGIN = 1.25
# Libraries' work spaces (32 MiB for each library and stream on a Hopper), small tensors, and what the trial run before
# a recording takes beside the memory of other graphs. What the recorded text encoder takes, where it stays on the GPU:
# an edit took 0.09 more when its batches were twice as large. With both the estimate for one image of 512 x 512,
# SD 1.5, float16, all parts on the GPU, is 3.49 GiB for 1 guided row and 4.17 for 2.
FIXED, RECORDED_TEXT = round(0.40 * GIB), round(0.10 * GIB)


@dataclass(frozen=True)
class Plan:
    """How to work on images of one size.

    Attributes:
        images: edits, or images, at once.
        offload: text encoder and VAE lie in host memory when they have nothing to do, and are not recorded.
        checkpoint: the gradient of the map guidance computes activations again instead of keeping them.
        room: bytes that the process may hold when it starts to record a graph; None: any.
    """

    images: int
    offload: bool = False
    checkpoint: bool = False
    room: int | None = None

    def apply(self, model: Model) -> Model:
        """The model, working by this plan; moves its VAE and text encoder. Without a budget the model as it is."""
        if model.max_memory is None:
            return model
        home = torch.device("cpu") if self.offload else model.device
        for module in (model.vae, model.text_encoder):
            if not lies_on(module, home):
                model.graphs.clear()  # they read the weights where these are
                module.to(home)
        model.graphs.room = self.room
        return replace(model, checkpoint=self.checkpoint)


@dataclass(frozen=True)
class Work:
    """What is to be done, in numbers.

    Attributes:
        unet, vae, text_encoder: bytes of the weights.
        height, width: of the latents.
        channels, vae_channels: of the finest level of the UNet and of the VAE.
        downsampling: pixels per latent position along each axis.
        element: bytes of an element of weights and activations.
        rows: of the largest forward pass, for each image (and direction).
        guided_rows: of them with a gradient; 0 without map guidance.
        vae_element: bytes of an element in the VAE; None: as elsewhere.
        depth: of the UNet's transformers, as a factor of what a gradient takes, see `XL_DEPTH`.
    """

    unet: int
    vae: int
    text_encoder: int
    height: int
    width: int
    channels: int
    vae_channels: int
    downsampling: int
    element: int
    rows: int
    guided_rows: int
    vae_element: int | None = None
    depth: float = 1.0

    def working(self, plan: Plan) -> tuple[int, int]:
        """Bytes beside the weights: those that the UNet takes, and those that the VAE takes."""
        gradient = self.guided_rows * self.depth * (CHECKPOINTED if plan.checkpoint else GRADIENT)
        maps = plan.images * (max(self.rows * FORWARD, gradient) + self.rows * self.depth * KEPT)
        latents = MARGIN * self.height * self.width
        vae = VAE * self.downsampling**2 * self.vae_channels * (self.vae_element or self.element)
        return round(maps * self.channels * self.element * latents), round(vae * latents)

    def needed(self, plan: Plan) -> int:
        """Bytes that a plan takes at most."""
        passes, drawing = self.working(plan)
        if plan.offload:  # UNet, VAE and text encoder take turns
            return FIXED + self.unet + max(passes, self.vae + drawing, self.text_encoder)
        return FIXED + RECORDED_TEXT + self.unet + self.vae + self.text_encoder + max(passes, drawing)

    def plan(self, most: int, budget: int) -> Plan:
        """The fastest plan that keeps to a budget.

        Args:
            most: images at once, if memory allows.
            budget: bytes.

        Raises:
            ValueError: not even the slowest does; the message says what is needed.
        """
        for checkpoint in (False, True)[: 1 + (self.guided_rows > 0)]:
            for offload in (False, True):
                for images in range(most, 0, -1):
                    plan = Plan(images, offload, checkpoint)
                    if self.needed(plan) <= budget:
                        return replace(plan, room=budget - max(self.working(plan)))
        size = f"{self.width * self.downsampling} x {self.height * self.downsampling}"
        raise ValueError(
            f"max_memory is {budget / GIB:.3g} GiB, but an image of {size} pixels takes about "
            f"{math.ceil(10 * self.needed(plan) / GIB) / 10:.1f} GiB at least: raise max_memory (--max-memory), "
            "or, for sample, choose a smaller size"
        )


def plan_for(model: Model, size: tuple[int, int], most: int, rows: int, guided_rows: int = 0) -> Plan:
    """How a model is to work, so that it keeps to its budget.

    Args:
        model: the model; one without a budget works on `most` images at once.
        size: height and width of the images in pixels.
        most: images at once, if memory allows.
        rows, guided_rows: see `Work`.

    Raises:
        ValueError: the budget is too small.
    """
    if model.max_memory is None:
        return Plan(most)
    return work_for(model, size, rows, guided_rows, model.dtype).plan(most, model.max_memory)


def batches_for(
    model: Model, sizes: Sequence[tuple[int, int]], most: int, rows: int, guided_rows: int = 0
) -> list[tuple[Plan, list[int]]]:
    """Which images to work on together, and how.

    Args:
        model, most, rows, guided_rows: see `plan_for`.
        sizes: height and width of every image in pixels; those of one size can share a batch.

    Returns:
        For each batch its plan, of which `apply` has to be called, and places among the images.

    Raises:
        ValueError: the budget is too small.
    """
    most = whole_number("batch_size", most, 1, 1000)
    batches = []
    for group in same_size_groups(sizes):
        plan = plan_for(model, sizes[group[0]], most, rows, guided_rows)
        batches += [(plan, group[start : start + plan.images]) for start in range(0, len(group), plan.images)]
    return batches


def place_of_queries(model: Model, size: tuple[int, int], images: int, steps: int) -> torch.device | None:
    """Where an edit keeps the queries of all steps of its inversion; None: nowhere, it computes them again.

    In host memory if there are not too many, for they come and go while steps run. More lie on a GPU that is large
    enough, unless it has a budget. It depends on nothing that changes while the machine is used, since computing them
    in another batch may differ by rounding.

    Args:
        model: the model.
        size: height and width of the images in pixels.
        images: in a batch.
        steps: of the inversion.
    """
    tables = [images * each for each in _bytes_by_layer(model, size, steps, model.dtype)]
    if sum(1 << (each - 1).bit_length() for each in tables) <= MOST_ON_THE_HOST:  # PyTorch pins powers of two
        return torch.device("cpu")
    if model.device.type != "cuda" or model.max_memory is not None:
        return None
    there = torch.cuda.get_device_properties(model.device).total_memory * SHARE_OF_A_GPU
    return model.device if sum(tables) <= there else None


def tables_for_queries(model: Model, size: tuple[int, int], images: int, steps: int) -> list[Tensor] | None:
    """Room for the queries of all steps of an inversion, `[steps, images, N, H, D]` for each layer, or None for none.

    In host memory it is pinned, so that copies wait for nothing but their turn. If the host has none to pin, the
    queries are computed again.

    Args:
        model, size, images, steps: see `place_of_queries`.
    """
    place = place_of_queries(model, size, images, steps)
    if place is None:
        return None
    shapes, pinned = [(steps, images, *shape) for shape in _query_shapes(model, size)], place != model.device
    kept, model.graphs.pinned = model.graphs.pinned, ()
    if pinned and [(table.shape, table.dtype) for table in kept] == [(shape, model.dtype) for shape in shapes]:
        return kept
    del kept  # before there are others
    try:
        return [torch.empty(shape, dtype=model.dtype, device=place, pin_memory=pinned) for shape in shapes]
    except RuntimeError:
        if pinned:
            return None
        raise


def keep_tables(model: Model, tables: list[Tensor] | None) -> None:
    """Keep what `tables_for_queries` gave, and nobody uses any more, for the model's next edit, if it is pinned.

    To pin a gigabyte takes 0.7 s, and what PyTorch keeps for that reason goes whenever anybody records a graph.
    """
    if tables and tables[0].is_pinned():
        model.graphs.pinned = tables


def bytes_of_queries(model: Model, size: tuple[int, int], steps: int, dtype: torch.dtype) -> int:
    """What the queries of an image's inversion take, see `place_of_queries`; `dtype` is that of the weights at work."""
    return sum(_bytes_by_layer(model, size, steps, dtype))


def _bytes_by_layer(model: Model, size: tuple[int, int], steps: int, dtype: torch.dtype) -> list[int]:
    return [steps * math.prod(shape) * dtype.itemsize for shape in _query_shapes(model, size)]


def _query_shapes(model: Model, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Those of `UNet.query_shapes` for images of a size in pixels."""
    return model.unet.query_shapes(*(side // model.vae.config.downsampling for side in size))


def work_for(model: Model, size: tuple[int, int], rows: int, guided_rows: int, dtype: torch.dtype) -> Work:
    """What is to be done with a model, in numbers.

    Args:
        model, size, rows, guided_rows: see `plan_for`.
        dtype: of the weights when it works, whatever it is now.
    """
    unet, downsampling = model.unet.config, model.vae.config.downsampling
    element, vae_element = dtype.itemsize, vae_dtype(unet, model.vae.config, dtype).itemsize
    return Work(
        _elements(model.unet) * element,
        _elements(model.vae) * vae_element,
        _elements(model.text_encoder) * element,
        *(side // downsampling for side in size),
        channels=unet.block_out_channels[0],
        vae_channels=model.vae.config.block_out_channels[0],
        downsampling=downsampling,
        element=element,
        rows=rows,
        guided_rows=guided_rows,
        vae_element=vae_element,
        depth=XL_DEPTH if unet.pooled_channels else 1.0,
    )


def _elements(module: nn.Module) -> int:
    laid_out = [part.merged for part in module.modules() if isinstance(part, Upsample) and part.merged is not None]
    return sum(tensor.numel() for tensor in [*module.parameters(), *laid_out])
