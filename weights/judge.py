"""A small classifier that judges generated pictures of the mini world.

It is trained apart from everything that conditions the diffusion model (own seed, own shape, labels instead of
captions), so that recognising what was drawn is an independent measurement.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

FILE = "judge.safetensors"
WIDTHS = ((24, 2), (32, 1), (64, 2), (64, 1), (80, 2), (96, 1), (96, 2))  # channels and stride of each convolution


class Judge(nn.Module):
    """A plain convolutional network with one linear head per field of a scene.

    Args:
        fields: field name -> class names, in the order of the head's outputs.
    """

    def __init__(self, fields: dict[str, tuple[str, ...]]):
        super().__init__()
        self.fields = {name: tuple(classes) for name, classes in fields.items()}
        self.convs, self.norms, before = nn.ModuleList(), nn.ModuleList(), 3
        for width, stride in WIDTHS:
            self.convs.append(nn.Conv2d(before, width, 3, stride, padding=1, bias=False))
            self.norms.append(nn.GroupNorm(8, width))
            before = width
        self.heads = nn.ModuleDict({name: nn.Linear(2 * before, len(c)) for name, c in self.fields.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of every field.

        Args:
            images: `[B, 3, 128, 128]` in [-1, 1].

        Returns:
            Field name -> `[B, classes]`.
        """
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.inference_mode()
    def classify(self, images: Tensor) -> dict[str, list[str]]:
        """Most likely class names.

        Args:
            images: `[B, 3, 128, 128]` in [-1, 1].

        Returns:
            Field name -> one class name per image, e.g. `{"animal": ["cat", "dog"], ...}`.
        """
        winners = {name: logits.argmax(1).tolist() for name, logits in self(images).items()}
        return {name: [self.fields[name][i] for i in indices] for name, indices in winners.items()}


def load_judge(folder: str | Path) -> Judge:
    """Load a judge, in float32 on the CPU.

    Args:
        folder: holds `judge.safetensors`, whose metadata names the classes.

    Returns:
        The judge in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no judge at {path}")
    with safe_open(path, "pt") as file:
        judge = Judge({name: tuple(classes) for name, classes in json.loads(file.metadata()["fields"]).items()})
        judge.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return judge.eval().requires_grad_(False)
