"""Noise schedule of Stable Diffusion and the deterministic DDIM update."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

TRAINING_STEPS = 1000
STEPS_OFFSET = 1  # Stable Diffusion visits 1, 21, ..., 981 with 50 steps


def alphas_cumprod(beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """alpha-bar of every training step for the scaled-linear schedule.

    Returns:
        `[1000]` float64, decreasing: the share of the image's variance that is left at each step.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), section 2; betas as in Rombach et al. (2022).
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, TRAINING_STEPS, dtype=torch.float64).square()
    return (1.0 - betas).cumprod(0)


@dataclass(frozen=True)
class Schedule:
    """A table with one row per step of a run, in the order of the run.

    Attributes:
        timesteps: `[n]` int64, what the UNet is told.
        alphas_from: `[n]` float64, alpha-bar of the latents before the step.
        alphas_to: `[n]` float64, alpha-bar of the latents after it.
    """

    timesteps: Tensor
    alphas_from: Tensor
    alphas_to: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def alphas(self) -> Tensor:
        """`[n, 2]` float64: alpha-bar before and after each step."""
        return torch.stack([self.alphas_from, self.alphas_to], dim=1)


def whole_number(name: str, value: Any, lowest: int, highest: int) -> int:
    """A number of Python or numpy as an int. Raises ValueError unless it is whole and in the range."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not lowest <= value <= highest:
        raise ValueError(f"{name} must be a whole number from {lowest} to {highest}, not {value!r}")
    return int(value)


def random_numbers(seed: int) -> torch.Generator:
    """A generator on the CPU, whose numbers are the same on every machine.

    Args:
        seed: 0 to 2^32 - 1, of which no two begin alike.

    Raises:
        ValueError: it is out of range.
    """
    return torch.Generator().manual_seed(whole_number("seed", seed, 0, 2**32 - 1))


def denoising_schedule(steps: int) -> Schedule:
    """DDIM from noise to image, "leading" spacing: 981, 961, ..., 1 for 50 steps.

    The last step ends at the alpha-bar of training step 0, not at 1 (`set_alpha_to_one=False`).

    Args:
        steps: 1 to 999.

    Raises:
        ValueError: steps out of range.
    """
    forward = inversion_schedule(steps)
    return Schedule(forward.timesteps.flip(0), forward.alphas_to.flip(0), forward.alphas_from.flip(0))


def inversion_schedule(steps: int) -> Schedule:
    """DDIM from image to noise, the exact mirror of `denoising_schedule`.

    Each step predicts the noise at the timestep it goes *to* (1, 21, ..., 981 for 50 steps), as diffusers'
    DDIMInverseScheduler does: the prediction that the mirrored denoising step will use.

    Args:
        steps: 1 to 999.

    Raises:
        ValueError: steps out of range.
    """
    steps = whole_number("steps", steps, 1, TRAINING_STEPS - 1)
    ratio = TRAINING_STEPS // steps
    timesteps = torch.arange(steps) * ratio + STEPS_OFFSET
    table = alphas_cumprod()
    return Schedule(timesteps, table[(timesteps - ratio).clamp(min=0)], table[timesteps])


def authors_inversion_schedule(steps: int) -> Schedule:
    """Inversion as in the authors' published code: 21, 41, ..., 961 for 50 steps.

    It leaves out the first and the last timestep and predicts the noise at the timestep it comes *from*; its alpha-bar
    table is read one training step earlier than the UNet is told, so it runs from alpha-bar 20 to alpha-bar 980.

    Args:
        steps: 3 to 999.

    Raises:
        ValueError: steps out of range.

    Source: pix2pixzero/pix2pix-zero, `ddim_inv.py` (the loop) and `scheduler.py` (the `reverse` step).
    """
    steps = whole_number("steps", steps, 3, TRAINING_STEPS - 1)
    ratio = TRAINING_STEPS // steps
    timesteps = torch.arange(1, steps - 1) * ratio + STEPS_OFFSET
    table = alphas_cumprod()
    return Schedule(timesteps, table[timesteps - 1], table[timesteps - 1 + ratio])


def ddim_step(latents: Tensor, noise: Tensor, alpha_from: Tensor | float, alpha_to: Tensor | float) -> Tensor:
    """Move latents from one noise level to another along the deterministic DDIM path, in either direction.

    Args:
        latents: `[B, C, h, w]` at alpha-bar `alpha_from`.
        noise: predicted noise (epsilon), same shape.
        alpha_from, alpha_to: alpha-bar before and after, scalars in (0, 1].

    Returns:
        Latents at `alpha_to`, float32 or better whatever the inputs' dtype.

    Source: Song et al., "Denoising Diffusion Implicit Models" (2021), equation 12 with sigma = 0.
    """
    precise = torch.promote_types(latents.dtype, torch.float32)
    latents, noise = latents.to(precise), noise.to(precise)
    image = (latents - (1 - alpha_from) ** 0.5 * noise) / alpha_from**0.5
    return alpha_to**0.5 * image + (1 - alpha_to) ** 0.5 * noise


def guided(noise: Tensor, guidance: Tensor | float, pairs: bool) -> Tensor:
    """Classifier-free guidance.

    Args:
        noise: predictions `[2 * B, 4, h, w]` of the negative and of the conditional half; without pairs `[B, 4, h, w]`.
        guidance: scale of the difference between the halves.
        pairs: whether there is a negative half.

    Returns:
        `[B, 4, h, w]`.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), equation 6, with w + 1 = guidance.
    """
    if not pairs:
        return noise
    negative, conditional = noise.chunk(2)
    return negative + guidance * (conditional - negative)


def to_epsilon(prediction: Tensor, latents: Tensor, alpha: Tensor | float, prediction_type: str) -> Tensor:
    """The noise that a UNet output stands for.

    Args:
        prediction: UNet output, `[B, C, h, w]`.
        latents: the UNet's input, same shape.
        alpha: alpha-bar of the latents.
        prediction_type: `"epsilon"` or `"v_prediction"`.

    Returns:
        epsilon, same shape.

    Source: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), appendix D:
    v = sqrt(alpha) epsilon - sqrt(1 - alpha) x_0, so epsilon = sqrt(alpha) v + sqrt(1 - alpha) x_t.
    """
    if prediction_type == "v_prediction":
        return alpha**0.5 * prediction + (1 - alpha) ** 0.5 * latents
    return prediction
