"""Imports run one way: cli, then editing, then the model, then kernels and weights, which know nothing above them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {  # a module may import from its own package only modules of lower layers
    "files": 0, "attention": 0, "engine": 0, "schedule": 0, "layers": 0,
    "images": 1, "text": 1, "changes": 1, "unet": 1, "vae": 1,
    "model": 2, "sentences": 2,
    "recording": 3, "clip": 3, "memory": 3, "presets": 3, "tokens": 3, "directions": 3, "checks": 3,
    "captions": 4, "maps": 4, "metrics": 4,
    "inversion": 5, "sampling": 5,
    "editing": 6,
    "jobs": 7, "info": 7,
    "methods": 8,
    "__init__": 9,
    "cli": 10,
}  # fmt: skip


KERNEL_LAYERS = {
    "dispatch": 0, "tiles": 1, "norms": 1, "regulariser": 1, "residual": 1, "convolution": 2, "gating": 2,
    "cross_attention": 2, "upsampling": 3, "self_attention": 3, "map_guidance": 3, "map_editing": 4, "__init__": 5,
}  # fmt: skip


def imported(path):
    """Names of all modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "p2pz").glob("*.py")), ids=lambda path: path.stem)
def test_the_product_imports_downwards_and_never_diffusers(path):
    names = set(imported(path))
    assert not {name for name in names if name.split(".")[0] in ("diffusers", "bench", "tests")}
    inner = {name.split(".")[1] for name in names if name.startswith("p2pz.")} & LAYERS.keys()
    assert {name for name in inner if LAYERS[name] >= LAYERS[path.stem]} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_downwards(path):
    inner = {name.split(".")[2] for name in imported(path) if name.startswith("p2pz.kernels.")} & KERNEL_LAYERS.keys()
    assert {name for name in inner if KERNEL_LAYERS[name] >= KERNEL_LAYERS[path.stem]} == set()


@pytest.mark.parametrize("folder", ["kernels", "weights"])
def test_kernels_and_weights_know_only_themselves(folder):
    for path in (ROOT / folder).glob("*.py"):
        foreign = [name for name in imported(path) if name.startswith("p2pz") and f"p2pz.{folder}" not in name]
        assert foreign == [], path
