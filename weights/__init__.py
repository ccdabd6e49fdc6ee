"""Reading checkpoints into modules, and the bundled mini checkpoint with the world it was trained on."""

from pathlib import Path

from p2pz.weights.folder import CheckpointError, find_tensors, load_tensors, read_json

MINI_FOLDER = Path(__file__).resolve().parent / "mini"
"""The bundled checkpoint, in the diffusers folder layout."""

__all__ = ["MINI_FOLDER", "CheckpointError", "find_tensors", "load_tensors", "read_json"]
