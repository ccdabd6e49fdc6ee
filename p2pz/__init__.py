"""pix2pix-zero image editing on a from-scratch Stable Diffusion."""

from p2pz.captions import caption
from p2pz.directions import Direction, direction
from p2pz.editing import EditResult, edit
from p2pz.inversion import Inversion, invert
from p2pz.model import Model, load
from p2pz.sampling import sample
from p2pz.weights import CheckpointError

__all__ = [
    "CheckpointError",
    "Direction",
    "EditResult",
    "Inversion",
    "Model",
    "caption",
    "direction",
    "edit",
    "invert",
    "load",
    "sample",
]

__version__ = "0.1.0"
