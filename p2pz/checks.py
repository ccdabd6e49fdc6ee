"""Looking a result over: whether an edit did what it should, and where numbers went wrong."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from p2pz.images import psnr
from p2pz.model import Model

LOWEST_RECONSTRUCTION = 18.0
"""In dB. Below it, the edit starts from another picture. The bundled model's scenes come back at 24 to 34 dB, whatever
the number of steps; noise, which no inversion holds, at 11."""

SAME = 50.0
"""In dB. Two pictures that agree to it differ by half a grey level: by rounding."""


def edit_warnings(
    image: Image.Image, unchanged: Image.Image | None, reconstruction_psnr: float | None, reference: str = "denoised"
) -> list[str]:
    """What is wrong with an edit that ended without an error.

    Args:
        image: the edited picture.
        unchanged: what a direction that does nothing leaves: the reconstruction, or with blending the image itself. The
            reference on the path without blending leaves nothing of the kind. None: the direction is nothing.
        reconstruction_psnr: of an `EditResult`.
        reference: of its settings; it says what made the reconstruction.

    Returns:
        A line for each thing; empty if all is well.
    """
    found = []
    if unchanged is None or psnr(image, unchanged) >= SAME:
        found.append(
            "the direction changed nothing: give a larger strength or guidance, a smaller xa_guidance, or a prompt "
            "that names what is to change"
        )
    if reconstruction_psnr is not None and reconstruction_psnr < LOWEST_RECONSTRUCTION:
        remedies = {
            "denoised": ("inversion", "a prompt that fits the image, or more steps"),
            "path": ("autoencoder", "a larger size, or an image of the kind that the model was trained on"),
        }
        what, remedy = remedies[reference]
        found.append(
            f"the {what} lost the image, whose reconstruction is at {reconstruction_psnr:.1f} dB only: give {remedy}"
        )
    return found


@torch.no_grad()
def first_layer_with_nan(model: Model, latents: Tensor, timestep: Tensor, context: Tensor) -> str | None:
    """Name of the first part of the UNet, in running order, whose result is not finite.

    It runs the UNet once more with hooks on its modules: for an error message, not for every step.

    Args:
        model: the model.
        latents: `[B, 4, h, w]`.
        timestep: `[B]` or a scalar, training steps (0 to 999).
        context: text states, `[B, 77, d]`.

    Returns:
        Such as "down_blocks.0.attentions.1.transformer_blocks.0.attn2"; None if all results are finite.

    Raises:
        ValueError: the latents or the text states themselves are not finite.
    """
    for name, tensor in (("latents", latents), ("text states", context)):
        if not tensor.isfinite().all():
            raise ValueError(f"the {name} are not finite before they enter the UNet")
    found: list[str] = []
    modules = dict(model.unet.named_modules())
    names = {module: name for name, module in modules.items()}
    lists = {name for name, module in modules.items() if isinstance(module, nn.ModuleList)}

    def enters(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not found and not _finite(inputs):  # made between modules: by their parent, or by the block before
            name = names[module]
            before = name.replace(".attentions.", ".resnets.").replace("conv_out", "conv_norm_out")
            parents = [path for path in modules if name.startswith(f"{path}.") and path not in lists]
            found.append(before if before in modules and before != name else [name, *parents][-1])

    def leaves(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not found and not _finite(output):
            found.append(names[module])

    hooks = [module.register_forward_pre_hook(enters) for module in names]
    hooks += [module.register_forward_hook(leaves) for module in names]
    try:
        conditioning = model.condition(timestep.expand(len(latents)), context, latents.shape[2:])
        model.predict(latents.to(model.device), conditioning.one_each())
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def check_finite(results: Tensor, model: Model, latents: Tensor, timestep: Tensor, context: Tensor) -> None:
    """Raise ValueError if the latents that a run ended with are not finite.

    Args:
        results: what it ended with.
        model, latents, timestep, context: how it began, see `first_layer_with_nan`.
    """
    if results.isfinite().all():
        return
    layer = first_layer_with_nan(model, latents, timestep, context)
    where = f"first in {layer}, at the first step" if layer else "after the first step"
    remedy = "a strength or a guidance is too large"
    if model.dtype == torch.float16:
        remedy = f"float16 may overflow, load with dtype=torch.bfloat16 or torch.float32 (--dtype); or {remedy}"
    raise ValueError(f"the latents became infinite or NaN, {where}: {remedy}")


def _finite(values: Any) -> bool:
    if isinstance(values, Tensor):
        return bool(values.isfinite().all())
    return all(_finite(value) for value in values) if isinstance(values, (tuple, list)) else True
