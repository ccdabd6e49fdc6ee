"""Reading checkpoints into modules, and the bundled mini checkpoint with the world it was trained on."""

from pathlib import Path

from p2pz.weights.folder import find_tensors
from p2pz.weights.hub import NoTokenizerError, find_tokenizer
from p2pz.weights.reading import (
    Checkpoint,
    CheckpointError,
    Component,
    fill,
    printable,
    read_json,
    read_number,
    read_numbers,
    read_tensors,
    reason,
)
from p2pz.weights.source import open_checkpoint

MINI_FOLDER = Path(__file__).resolve().parent / "mini"
"""The bundled checkpoint, in the diffusers folder layout."""

__all__ = [
    "MINI_FOLDER",
    "Checkpoint",
    "CheckpointError",
    "Component",
    "NoTokenizerError",
    "fill",
    "find_tensors",
    "find_tokenizer",
    "open_checkpoint",
    "printable",
    "read_json",
    "read_number",
    "read_numbers",
    "read_tensors",
    "reason",
]
