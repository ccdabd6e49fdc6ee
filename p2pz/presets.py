"""Every number of the method as one table: what p2pz, the authors' code and diffusers do."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from p2pz.model import Model
from p2pz.schedule import whole_number


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
        guided_steps: the share of the steps at which map guidance begins, and at which it ends.
        resolution_weights: factors of the map loss at each resolution, from the finest on; the last one serves those
            that are left. Empty: 1.
        reference: latents of the reference pass. `"denoised"`: the inverted noise is denoised with the caption (the
            paper). `"path"`: the latents that the inversion passed through, so that the reference leads back to the
            image itself (direct inversion, Ju et al. 2024); at each timestep those that the inversion's own pass was
            given. An edit that inverts the image itself takes that pass as the reference and needs no other.
        blend: pixels where the direction changes the predicted noise by less than this share of its largest change are
            the image's own; 0 leaves all to the edit. It needs the reference `"path"`.
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
    guided_steps: tuple[float, float] = (0.0, 1.0)
    resolution_weights: tuple[float, ...] = ()
    reference: str = "denoised"
    blend: float = 0.0
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
            given = getattr(self, name)
            if given not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {given!r}")
            object.__setattr__(self, name, choices[choices.index(given)])  # JSON has no place for numpy's values
        lowest = 3 if self.inversion == "authors" else 1
        whole_number("steps", self.steps, lowest, 999)
        for field in fields(self):
            if field.type not in _KINDS:
                continue
            value, (kind, words) = getattr(self, field.name), _KINDS[field.type]
            if not _is_number(value, kind):
                raise ValueError(f"{field.name} must be {words}, not {value!r}")
            if not 0 <= value < float("inf"):
                raise ValueError(f"{field.name} must be zero or more, not {value}")
            object.__setattr__(self, field.name, field.type(value))
        for name in ("guided_steps", "resolution_weights"):
            given = getattr(self, name)
            values = tuple(given) if isinstance(given, Iterable) else (None,)
            if not all(_is_number(value) for value in values):
                raise ValueError(f"{name} must be a tuple of numbers, not {given!r}")
            object.__setattr__(self, name, tuple(map(float, values)))
        if len(self.guided_steps) != 2 or not 0 <= self.guided_steps[0] <= self.guided_steps[1] <= 1:
            raise ValueError(f"guided_steps must be two shares from 0 to 1, the smaller first, not {self.guided_steps}")
        if not all(0 <= weight < float("inf") for weight in self.resolution_weights):
            raise ValueError(f"resolution_weights must be zero or more, not {self.resolution_weights}")
        if self.lowest_offset > 3:
            raise ValueError(f"lowest_offset must be from 0 to 3, not {self.lowest_offset}: the coarsest map is 8 high")
        if self.blend >= 1:
            raise ValueError(f"blend must be from 0 to below 1, not {self.blend}")
        if self.blend and self.reference != "path":
            raise ValueError('blend needs reference="path", whose latents say where the edit acts: give blend=0 too')
        if self.reference == "path" and self.inversion != "mirror":
            raise ValueError('reference="path" needs inversion="mirror": the other visits other timesteps')


_CHOICES = {
    "gradient": ("conditional", "both", "halves"),
    "reference": ("denoised", "path"),
    "inversion": ("mirror", "authors"),
    "form": ("random", "every", "paper"),
    "sample_posterior": (False, True),
}

_KINDS = {int: (Integral, "a whole number"), float: (Real, "a number")}


def _is_number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


PRESETS = {
    "p2pz": Settings(gradient="conditional", reference="path"),
    "authors": Settings(inversion="authors", sample_posterior=True),
    "diffusers": Settings(guidance=7.5, lowest_offset=0, sample_posterior=True),
}

MINI_SETTINGS = Settings(
    steps=20,
    strength=2.25,
    guidance=1.0,
    xa_guidance=1.0,
    gradient="conditional",
    reference="path",
    blend=0.45,
    autocorrelation_strength=0.0,
    kl_strength=0.0,
)
"""What the preset "p2pz" stands for on the bundled model.

A longer direction under firm map guidance edits more surely than classifier-free guidance, leaves more of the
background and needs no negative half. The reference on the inversion's path has the image's own maps, and pixels that
the direction does not concern need no autoencoder. Chosen on tuning scenes, see `bench/quality.py`.
"""

MINI_STYLE_SETTINGS = replace(MINI_SETTINGS, strength=1.0, xa_guidance=0.2, blend=0.0)
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
        TypeError: there is no such field.
    """
    if preset not in list(PRESETS):  # which may be of a kind that a dictionary cannot look up
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    settings = PRESETS[preset]
    if preset == "p2pz" and model.is_mini:
        settings = MINI_STYLE_SETTINGS if style else MINI_SETTINGS
    known = [field.name for field in fields(Settings)]
    for name in changes:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(known)}"
            raise TypeError(f"there is no argument or setting {name}: {hint}")
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes.get("inversion", "mirror") != "mirror":  # what depends on each other changes together
        changes = {"reference": "denoised"} | changes
    if changes.get("reference", "path") != "path":
        changes = {"blend": 0.0} | changes
    return replace(settings, **changes)
