import math

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from p2pz.schedule import (
    alphas_cumprod,
    authors_inversion_schedule,
    ddim_step,
    denoising_schedule,
    inversion_schedule,
    to_epsilon,
)

STEPS = [1, 10, 20, 50, 999]
DIRECTIONS = {"denoising": (denoising_schedule, DDIMScheduler), "inversion": (inversion_schedule, DDIMInverseScheduler)}
both_directions = pytest.mark.parametrize(("schedule", "scheduler"), DIRECTIONS.values(), ids=DIRECTIONS)


def diffusers_scheduler(kind, steps, **settings):
    """Stable Diffusion's `scheduler_config.json`."""
    scheduler = kind(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        **settings,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def alpha_by_hand(step):
    """alpha-bar of a training step, multiplied up in plain Python."""
    start, end = math.sqrt(0.00085), math.sqrt(0.012)
    return math.prod(1 - (start + (end - start) * s / 999) ** 2 for s in range(step + 1))


def test_alphas_by_hand():
    table = alphas_cumprod()
    assert table.shape == (1000,) and table.dtype == torch.float64
    for step in (0, 1, 500, 999):
        assert table[step].item() == pytest.approx(alpha_by_hand(step), rel=1e-12)


@both_directions
@pytest.mark.parametrize("steps", STEPS)
def test_schedule_equals_diffusers(schedule, scheduler, steps):
    """All timesteps, the alphas the UNet's timesteps stand for, and what diffusers' `step` scales the latents by."""
    ours, theirs = schedule(steps), diffusers_scheduler(scheduler, steps)
    assert len(ours) == steps
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert ours.alphas_from.dtype == ours.alphas_to.dtype == torch.float64
    told = ours.alphas_from if schedule is denoising_schedule else ours.alphas_to
    torch.testing.assert_close(told, theirs.alphas_cumprod[theirs.timesteps].double(), rtol=1e-5, atol=0)
    one, zero = torch.ones(1), torch.zeros(1)
    scales = torch.cat([theirs.step(zero, int(t), one).prev_sample for t in theirs.timesteps])  # without noise
    torch.testing.assert_close((ours.alphas_to / ours.alphas_from).sqrt(), scales.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", STEPS)
def test_inversion_mirrors_denoising(steps):
    """Each inversion step undoes one denoising step with the same timestep; the steps form one chain."""
    down, up = denoising_schedule(steps), inversion_schedule(steps)
    assert torch.equal(up.timesteps, down.timesteps.flip(0))
    assert torch.equal(up.alphas_from, down.alphas_to.flip(0))
    assert torch.equal(up.alphas_to, down.alphas_from.flip(0))
    assert torch.equal(up.alphas_to[:-1], up.alphas_from[1:])
    assert up.alphas_from[0] == alphas_cumprod()[0]
    assert (up.alphas_to < up.alphas_from).all()


@both_directions
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 50])
def test_step_equals_diffusers(schedule, scheduler, prediction_type, steps, assert_close):
    """v stands for the noise at the latents' own alpha-bar, in both directions."""
    theirs = diffusers_scheduler(scheduler, steps, prediction_type=prediction_type)
    rows = schedule(steps)
    for i in {0, steps // 3, steps // 2, steps - 1}:
        latents, prediction = torch.randn(2, 2, 4, 8, 8)
        noise = to_epsilon(prediction, latents, rows.alphas_from[i], prediction_type)
        result = ddim_step(latents, noise, rows.alphas_from[i], rows.alphas_to[i])
        assert result.dtype == torch.float32
        assert_close(result, theirs.step(prediction, int(theirs.timesteps[i]), latents).prev_sample)


def test_there_and_back_is_the_identity(assert_close):
    latents, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)

    def run(latents, rows):
        for alpha_from, alpha_to in zip(rows.alphas_from, rows.alphas_to, strict=True):
            latents = ddim_step(latents, noise, alpha_from, alpha_to)
        return latents

    inverted = run(latents, inversion_schedule(10))
    assert (inverted - latents).norm() > 0.1 * latents.norm()
    assert_close(run(inverted, denoising_schedule(10)), latents, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype, assert_close):
    latents, noise = torch.randn(2, 1, 4, 8, 8).to(dtype)
    rows = inversion_schedule(50)
    for alphas in ((rows.alphas_from[9], rows.alphas_to[9]), (rows.alphas_from[9].item(), rows.alphas_to[9].item())):
        result = ddim_step(latents, noise, *alphas)
        assert result.dtype == torch.float32
        assert_close(result, ddim_step(latents.double(), noise.double(), *alphas), 1e-6)


def test_authors_schedule():
    """48 of 50 steps, told 21 to 961, while the alphas run from training step 20 to 980."""
    rows = authors_inversion_schedule(50)
    assert len(rows) == 48
    assert rows.timesteps.tolist() == list(range(21, 962, 20))
    assert rows.alphas_from.tolist() == pytest.approx([alpha_by_hand(s) for s in range(20, 961, 20)], rel=1e-12)
    assert rows.alphas_to.tolist() == pytest.approx([alpha_by_hand(s) for s in range(40, 981, 20)], rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(s, n) for s in (denoising_schedule, inversion_schedule, authors_inversion_schedule) for n in (-1, 0, 1000)]
    + [(authors_inversion_schedule, 2)],
)
def test_steps_out_of_range(schedule, steps):
    with pytest.raises(ValueError, match=rf"not {steps}$|not {steps} "):
        schedule(steps)


@pytest.mark.parametrize(("schedule", "steps"), [(denoising_schedule, 1), (authors_inversion_schedule, 3)])
def test_fewest_steps(schedule, steps):
    assert len(schedule(steps)) == 1
