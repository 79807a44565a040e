"""Draws and losses of consistency distillation."""

import math

import pytest
import torch

from noisycond import randomness
from noisycond.distillation import ConsistencyDistillation, boundary_scalings, consistency_loss, guided, solver_grid
from noisycond.objective import make_betas


ALPHAS = torch.cumprod(1 - make_betas("linear", 0.0001, 0.02, 1000), dim=0)


def draw(count=4000, latents=None, **options):
    keys = randomness.step_keys(7, torch.arange(count))
    latents = torch.zeros(count, 1, 2, 2) if latents is None else latents
    return ConsistencyDistillation(ALPHAS, **options).draw(latents, keys)


def test_steps_are_uniform_on_the_grid_and_end_one_below():
    step = draw()
    counts = torch.bincount(step.start, minlength=1000)
    assert set(counts.nonzero()[:, 0].tolist()) == set(range(19, 1000, 20)) == set(solver_grid(1000, 50).tolist())
    assert counts[19::20].min() > 40 and counts[19::20].max() < 130
    assert torch.equal(step.end, torch.where(step.start == 19, 0, step.start - 20))


def test_w_is_uniform_between_its_bounds():
    w = draw(w_min=2.0, w_max=5.0).w
    assert 2.0 <= w.min() < 2.01 and 4.99 < w.max() <= 5.0
    assert abs(w.mean() - 3.5) < 0.05
    assert set(draw(8, w_min=3.0, w_max=3.0).w.tolist()) == {3.0}


def test_draws_depend_on_their_key_alone():
    whole, part = (
        draw(64),
        ConsistencyDistillation(ALPHAS).draw(torch.zeros(8, 1, 2, 2), randomness.step_keys(7, torch.arange(8, 16))),
    )
    for name in ("noisy", "start", "end", "w"):
        assert torch.equal(getattr(whole, name)[8:16], getattr(part, name))
    other = draw(64, seed=1)
    assert not torch.equal(whole.start, other.start) and not torch.equal(whole.w, other.w)


def test_noise_is_that_of_the_schedule():
    step = draw(20000, torch.full((20000, 1, 1, 1), 2.0))
    last = step.start == 999
    assert abs(step.noisy[last].mean() - 2 * ALPHAS[999].sqrt()) < 0.15
    first = step.start == 19
    assert abs(step.noisy[first].mean() - 2 * ALPHAS[19].sqrt()) < 0.02
    assert abs(step.noisy[first].std() / (1 - ALPHAS[19]).sqrt() - 1) < 0.15


def test_input_perturbation_is_the_student_s_alone():
    plain, perturbed = draw(), draw(input_perturbation=0.1)
    assert plain.student_noisy is plain.noisy
    assert torch.equal(plain.noisy, perturbed.noisy)
    scale = (1 - ALPHAS[perturbed.start]).sqrt()[:, None, None, None]
    extra = (perturbed.student_noisy - perturbed.noisy) / scale
    assert abs(extra.std() - 0.1) < 0.005 and abs(extra.mean()) < 0.005


def test_guidance_of_0_is_the_conditional_prediction():
    one, other = torch.randn(2, 3, 1, 2, 2)
    assert torch.equal(guided(one, other, torch.zeros(3)), one)
    w = torch.tensor([0.0, 1.0, 2.5])
    scale = (w + 1)[:, None, None, None]
    assert (guided(one, other, w) - (other + scale * (one - other))).abs().max() < 1e-5


def test_losses():
    error = torch.tensor([[0.0, 3.0], [4.0, 0.0]])[:, None, None]
    zero = torch.zeros_like(error)
    assert consistency_loss(error, zero, "l2").tolist() == [4.5, 8.0]
    huber = consistency_loss(error, zero, "huber", 4.0)
    assert huber.tolist() == pytest.approx([0.5, (math.sqrt(32) - 4) / 2])
    # Small errors count as squares over 2c, large ones as they are.
    small = consistency_loss(error * 1e-3, zero, "huber", 1.0)
    assert small.tolist() == pytest.approx([4.5e-6 / 2, 8e-6 / 2], rel=0.05)
    assert consistency_loss(error, zero, "huber", 1e-3).tolist() == pytest.approx([1.5, 2.0], abs=2e-3)


def test_at_time_0_the_output_is_the_input():
    distillation = ConsistencyDistillation(ALPHAS)
    noisy, prediction = torch.randn(2, 4, 1, 2, 2)
    assert torch.equal(distillation.output(prediction, noisy, torch.zeros(4, dtype=torch.int64)), noisy)
    skip, out = boundary_scalings(torch.tensor([1]), 1e6)
    assert skip < 1e-10 and out == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_ddim_timesteps": 30}, "must divide the 1000 timesteps"),
        ({"num_ddim_timesteps": 0}, "must divide"),
        ({"w_min": 3.0, "w_max": 2.0}, "w runs from 3.0 to 2.0"),
        ({"w_min": -1.0}, "w runs from -1.0"),
        ({"prediction_type": "sample"}, "prediction type is 'sample'"),
        ({"loss_type": "l1"}, "loss type is 'l1'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ConsistencyDistillation(ALPHAS, **options)
