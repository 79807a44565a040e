"""Consistency distillation against diffusers' schedulers and pipeline, and on Gaussian data, where the path of the
teacher is known in closed form."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler

from noisycond import randomness
from noisycond.distillation import (
    ConsistencyDistillation,
    SolverStep,
    boundary_scalings,
    guidance_embedding,
    guided,
    solver_grid,
)


SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
SHAPE = (3, 4, 4)


def scheduler(kind=LCMScheduler, **options):
    return kind(**SCHEDULE, clip_sample=False, **options)


def distillation(**options) -> ConsistencyDistillation:
    return ConsistencyDistillation(scheduler().alphas_cumprod, **options)


def keys(count: int) -> torch.Tensor:
    return randomness.step_keys(3, torch.arange(count))


@pytest.mark.parametrize("scaling", [10.0, 3.0])
def test_boundary_scalings(scaling):
    theirs = scheduler(timestep_scaling=scaling)
    timesteps = torch.tensor([0, 1, 19, 499, 999])
    expected = [theirs.get_scalings_for_boundary_condition_discrete(int(t)) for t in timesteps]
    found = torch.stack(boundary_scalings(timesteps, scaling), dim=1)
    assert np.allclose(found.numpy(), expected, rtol=1e-6, atol=0)
    assert found[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dim", [256, 32, 7])
def test_guidance_embedding(dim):
    w = torch.tensor([0.0, 0.37, 1.25, 14.9])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, dim)
    # 1000 w is up to 15,000 radians, of which float32 keeps three places.
    assert (guidance_embedding(w, dim) - theirs).abs().max() < 2e-3
    assert guidance_embedding(w, dim).shape == (4, dim)


@pytest.mark.parametrize("num_steps", [50, 10, 1000])
@pytest.mark.parametrize("wanted", [1, 4, 8])
def test_the_sampler_visits_timesteps_of_the_grid(num_steps, wanted):
    theirs = scheduler(original_inference_steps=num_steps)
    theirs.set_timesteps(wanted)
    assert set(theirs.timesteps.tolist()) <= set(solver_grid(1000, num_steps).tolist())
    assert theirs.timesteps[0] == solver_grid(1000, num_steps)[-1] == 999


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [50, 200])
def test_a_step_of_the_solver_is_a_step_of_ddim(prediction_type, num_steps):
    ours = distillation(prediction_type=prediction_type, num_ddim_timesteps=num_steps)
    theirs = scheduler(
        DDIMScheduler, prediction_type=prediction_type, timestep_spacing="trailing", set_alpha_to_one=False
    )
    theirs.set_timesteps(num_steps)
    assert theirs.timesteps.tolist() == ours.grid.flip(0).tolist()
    noisy, prediction = randomness.normal(0, "x", keys(num_steps), (2, *SHAPE)).unbind(1)
    start = theirs.timesteps
    end = torch.cat([start[1:], torch.zeros(1, dtype=torch.int64)])
    reached = ours.solve(prediction, SolverStep(noisy, noisy, start, end, torch.zeros(num_steps)))
    expected = [
        theirs.step(prediction[place : place + 1], int(t), noisy[place : place + 1], eta=0.0).prev_sample
        for place, t in enumerate(start)
    ]
    expected = torch.cat(expected)
    assert ((reached - expected).abs() / expected.abs().clamp(min=1)).max() < 1e-4


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_output_is_what_the_sampler_calls_denoised(prediction_type):
    ours = distillation(prediction_type=prediction_type, timestep_scaling=2.0)
    theirs = scheduler(prediction_type=prediction_type, timestep_scaling=2.0)
    theirs.set_timesteps(4)
    noisy, prediction = randomness.normal(0, "x", keys(4), (2, *SHAPE)).unbind(1)
    found = ours.output(prediction, noisy, theirs.timesteps)
    for place, timestep in enumerate(theirs.timesteps):
        expected = theirs.step(prediction[place], timestep, noisy[place]).denoised
        assert ((found[place] - expected).abs() / expected.abs().clamp(min=1)).max() < 1e-4


class GaussianPath:
    """Data N(m, s²): the ideal prediction at every noise level, and where its path from any x_t ends."""

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str, mean, std: float = 0.3):
        self.alphas_cumprod, self.prediction_type = alphas_cumprod.double(), prediction_type
        self.mean, self.std = torch.as_tensor(mean, dtype=torch.float64).reshape(-1, 1, 1, 1), std

    def _scales(self, timesteps):
        alphas = self.alphas_cumprod[timesteps][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt(), (alphas * self.std**2 + 1 - alphas).sqrt()

    def predict(self, noisy, timesteps):
        """E[ε | x_t] or E[v | x_t]."""
        signal, noise, std = self._scales(timesteps)
        centered = noisy.double() - signal * self.mean
        epsilon, clean = noise / std**2 * centered, self.mean + signal * self.std**2 / std**2 * centered
        return (epsilon if self.prediction_type == "epsilon" else signal * epsilon - noise * clean).float()

    def end(self, noisy, timesteps):
        """Along the path (x_t - √ᾱ_t m) / std(x_t) stays as it is; here at t = 0."""
        signal, _, std = self._scales(timesteps)
        last_signal, _, last_std = self._scales(torch.zeros_like(timesteps))
        return (last_signal * self.mean + last_std / std * (noisy.double() - signal * self.mean)).float()


def loss_of_the_perfect_student(prediction_type, num_steps, student_w=None):
    """The loss [B] of a student that knows where the guided path ends; student_w: it takes w for this instead."""
    ours = distillation(prediction_type=prediction_type, num_ddim_timesteps=num_steps, w_min=1.0, w_max=3.0)
    latents = 0.5 + 0.3 * randomness.normal(0, "data", keys(256), SHAPE)
    step = ours.draw(latents, keys(256))
    conditional, unconditional = (GaussianPath(ours.alphas_cumprod, prediction_type, mean) for mean in (0.5, 0.1))
    prediction = guided(
        conditional.predict(step.noisy, step.start), unconditional.predict(step.noisy, step.start), step.w
    )
    # With equal variances the guided prediction is that of a Gaussian whose mean is guided.
    w = step.w if student_w is None else torch.full_like(step.w, student_w)
    student = GaussianPath(ours.alphas_cumprod, prediction_type, 0.5 + w.double() * (0.5 - 0.1))
    target = student.end(ours.solve(prediction, step), step.end)
    return ours.loss(student.end(step.noisy, step.start), target)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_student_that_knows_the_path_has_no_loss(prediction_type):
    fine, coarse = (loss_of_the_perfect_student(prediction_type, steps) for steps in (1000, 50))
    assert fine.max() < 2e-6
    assert fine.mean() < coarse.mean() / 30  # what is left is the error of the solver, which is of second order
    assert loss_of_the_perfect_student(prediction_type, 1000, student_w=0.0).mean() > 100 * fine.mean()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_prediction_gives_the_student_any_function(prediction_type):
    """The output of the network's own parametrization is the path's end where the network predicts just that."""
    ours = distillation(prediction_type=prediction_type)
    noisy = randomness.normal(0, "x", keys(50), SHAPE)
    path = GaussianPath(ours.alphas_cumprod, prediction_type, 0.5)
    # As the standard deviation of the data goes to 0, every path ends at the mean, which E[x_0 | x_t] is as well.
    path.std = 1e-9
    found = ours.output(path.predict(noisy, ours.grid), noisy, ours.grid)
    assert (found - 0.5).abs().max() < 1e-2
