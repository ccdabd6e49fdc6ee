"""pix2pix-zero image editing on a from-scratch Stable Diffusion."""

from p2pz import changes, maps
from p2pz.captions import caption
from p2pz.directions import Direction, direction
from p2pz.editing import EditResult, edit
from p2pz.inversion import Inversion, invert
from p2pz.methods import ddim_edit, prompt_to_prompt, sdedit
from p2pz.model import Model, load
from p2pz.recording import record
from p2pz.sampling import sample
from p2pz.weights import CheckpointError

__all__ = [
    "CheckpointError",
    "Direction",
    "EditResult",
    "Inversion",
    "Model",
    "caption",
    "changes",
    "ddim_edit",
    "direction",
    "edit",
    "invert",
    "load",
    "maps",
    "prompt_to_prompt",
    "record",
    "sample",
    "sdedit",
]

__version__ = "0.1.0"
