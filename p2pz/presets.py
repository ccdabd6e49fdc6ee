"""Every number of the method as one table: what p2pz, the authors' code and diffusers do."""

from dataclasses import dataclass, replace
from typing import Any

from p2pz.model import Model


@dataclass(frozen=True)
class Settings:
    """The numbers of one edit.

    Attributes:
        steps: steps of the inversion and of the edit, 1 to 999.
        strength: multiple of the direction that is added to the caption's text states; 1 in the paper.
        guidance: classifier-free guidance scale of the edit; 1 leaves the negative half out.
        xa_guidance: step length along the gradient of the cross-attention map loss; 0 leaves the gradient out.
        gradient: which half of the classifier-free pair the latents follow. `"conditional"`: the gradient of the
            conditional half moves the latents (the paper's text). `"both"`: the mean of both halves' gradients does.
            `"halves"`: each half is moved by its own gradient, divided by two, and the DDIM step continues from the
            negative half (the authors' code and diffusers).
        inversion: `"mirror"` visits the timesteps of the edit backwards; `"authors"` leaves out the first and the last.
        autocorrelation_strength, kl_strength: step lengths of the noise regulariser; 0 leaves a part out.
        rounds, rolls: rounds of the regulariser, and auto-correlation steps in each.
        form: form of the auto-correlation loss, see `p2pz.kernels.autocorrelation_loss`.
        lowest_offset: random offsets are drawn from this to half the height, exclusive. An offset of 0 penalises the
            signal's energy instead of its correlation.
        sample_posterior: encode the image as a random sample of the VAE's posterior instead of its mean.
    """

    steps: int = 50
    strength: float = 1.0
    guidance: float = 5.0
    xa_guidance: float = 0.1
    gradient: str = "halves"
    inversion: str = "mirror"
    autocorrelation_strength: float = 20.0
    kl_strength: float = 20.0
    rounds: int = 5
    rolls: int = 5
    form: str = "random"
    lowest_offset: int = 1
    sample_posterior: bool = False

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        lowest = 3 if self.inversion == "authors" else 1
        if not isinstance(self.steps, int) or not lowest <= self.steps <= 999:
            raise ValueError(f"steps must be a whole number from {lowest} to 999, not {self.steps}")
        for name in ("strength", "guidance", "xa_guidance", "autocorrelation_strength", "kl_strength"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be zero or more, not {getattr(self, name)}")


_CHOICES = {
    "gradient": ("conditional", "both", "halves"),
    "inversion": ("mirror", "authors"),
    "form": ("random", "every", "paper"),
}

PRESETS = {
    "p2pz": Settings(),
    "authors": Settings(inversion="authors", sample_posterior=True),
    "diffusers": Settings(guidance=7.5, lowest_offset=0, sample_posterior=True),
}

MINI_SETTINGS = Settings(
    steps=20,
    strength=2.0,
    guidance=1.0,
    xa_guidance=1.0,
    gradient="conditional",
    autocorrelation_strength=0.0,
    kl_strength=0.0,
)
"""What the preset "p2pz" stands for on the bundled model.

A longer direction under firm map guidance edits more surely than classifier-free guidance, leaves more of the
background and needs no negative half. Chosen with `bench/quality.py --split tuning`.
"""

MINI_STYLE_SETTINGS = replace(MINI_SETTINGS, strength=1.0, xa_guidance=0.2)
"""The same for a change of style, which has to move every pixel: the maps are held loosely."""


def settings_for(model: Model, preset: str, *, style: bool = False, **changes: Any) -> Settings:
    """The numbers of a preset for a model, with the caller's changes.

    Args:
        model: the bundled model has its own row of the preset "p2pz".
        preset: `"p2pz"`, `"authors"` or `"diffusers"`.
        style: the edit changes the style, not the subject.
        changes: fields of `Settings`; None keeps the preset's.

    Raises:
        ValueError: unknown preset, or a value out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    settings = PRESETS[preset]
    if preset == "p2pz" and model.is_mini:
        settings = MINI_STYLE_SETTINGS if style else MINI_SETTINGS
    return replace(settings, **{name: value for name, value in changes.items() if value is not None})
