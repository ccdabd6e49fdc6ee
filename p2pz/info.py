"""What a checkpoint is, and what an edit with it needs."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

from p2pz.editing import followed_rows
from p2pz.memory import Plan, bytes_of_queries, work_for
from p2pz.model import GIB, Model
from p2pz.presets import settings_for

FAMILIES = {
    128: "the bundled model's",
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
}
"""By the width of the text states."""


def describe(model: Model) -> dict[str, str]:
    """What a checkpoint is and what it needs, a line for each fact.

    Args:
        model: loaded, on any device.

    Returns:
        Name of the fact to text.
    """
    unet, vae = model.unet.config, model.vae.config
    encoders = model.text_encoders
    names = "text_encoder", "text_encoder_2"
    parts = {"unet": model.unet, "vae": model.vae} | dict(zip(names, encoders, strict=False))
    parameters = {name: sum(each.numel() for each in part.parameters()) for name, part in parts.items()}
    size, side = model.native_size, unet.sample_size
    facts = {
        "model": str(model.folder),
        "family": FAMILIES.get(unet.context_channels, f"unknown, text states of width {unet.context_channels}"),
        "predicts": {"epsilon": "the noise (epsilon)", "v_prediction": "v (v_prediction)"}[model.prediction_type],
        "trained at": f"{size} x {size} pixels, latents {vae.latent_channels} x {side} x {side}; other sizes work",
        "text states": " and ".join(
            f"{encoder.config.num_hidden_layers} layers, width {encoder.config.hidden_size}" for encoder in encoders
        )
        + f", fingerprint {model.text_fingerprint}",
    }
    for name, count in parameters.items():
        facts[name] = ", ".join([f"{count / 1e6:,.1f} M parameters", *_files(model.folder, name)])
    if model.folder.is_file():
        facts["file"] = _file_facts(model.folder)

    settings = settings_for(model, "p2pz")
    guided = followed_rows(settings)
    work = work_for(model, (size, size), rows=2 + (settings.guidance != 1), guided_rows=guided, dtype=torch.float16)
    plans = Plan(1), Plan(8), Plan(1, offload=True, checkpoint=True)
    one, eight, least = (math.ceil(10 * work.needed(plan) / GIB) / 10 for plan in plans)
    queries = bytes_of_queries(model, (size, size), settings.steps, torch.float16) / GIB
    facts["memory"] = (
        f"an edit on a GPU takes about {one:.1f} GiB in float16, eight at once {eight:.1f}; "
        f"{queries:.2f} of host memory besides, which many at once take of a GPU that is nine times as large; "
        f"with --max-memory {least:.1f} at least, more slowly"
    )
    return facts


def _files(folder: Path, part: str) -> list[str]:
    """What the files of a part hold."""
    return [f"{path.name}: {_file_facts(path)}" for path in sorted((folder / part).glob("*.safetensors"))]


def _file_facts(path: Path) -> str:
    """Dtypes, the most frequent one first, and size of a safetensors file, from its header."""
    with safe_open(path, "pt") as file:
        dtypes = Counter(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 - no mapping
    return f"{'/'.join(name for name, _ in dtypes.most_common())}, {path.stat().st_size / 2**20:,.0f} MiB"
