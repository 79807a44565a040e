"""The same without formulas: a linear denoiser trained by gradients on the project's own objective, corruption and
perturbation, and sampled by diffusers' DDIM. It shows that `closed_form` describes what the code does.

Letters: as in `mixture`; B examples of a batch, T timesteps, R trainings.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import nn
from tqdm import tqdm

from noisycond.corruption import LabelCorruption
from noisycond.objective import DiffusionObjective, make_betas
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.theory.closed_form import Generated
from noisycond.theory.mixture import TrainingSet


TIMESTEPS, BETAS = 25, ("linear", 0.01, 0.5)


class LinearDenoiser(nn.Module):
    """ε̂ = A_t x_t + B_t c + b_t, of each timestep its own.

    Args:
        dim: d. condition_dim: m.
    """

    def __init__(self, dim: int, condition_dim: int):
        super().__init__()
        self.of_data = nn.Parameter(torch.zeros(TIMESTEPS, dim, dim))
        self.of_condition = nn.Parameter(torch.zeros(TIMESTEPS, dim, condition_dim))
        self.bias = nn.Parameter(torch.zeros(TIMESTEPS, dim))

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """ε̂ [B, d, 1, 1] of noisy [B, d, 1, 1], timesteps int64 [B] and condition [B, m]."""
        of_data = torch.einsum("bij,bj->bi", self.of_data[timesteps], noisy.flatten(1))
        of_condition = torch.einsum("bij,bj->bi", self.of_condition[timesteps], condition)
        return (of_data + of_condition + self.bias[timesteps])[:, :, None, None]


@dataclass(frozen=True)
class Simulated:
    """What R trainings generated, each with images of its own.

    Attributes:
        means: float64 [R, K, d]. covariances: float64 [R, d, d], around the means of the classes.
    """

    means: np.ndarray
    covariances: np.ndarray

    def mean(self) -> Generated:
        """Over the trainings."""
        return Generated(self.means.mean(0), self.covariances.mean(0))

    def error(self) -> Generated:
        """The standard errors of these means, of training and drawing together."""
        root = np.sqrt(len(self.means))
        return Generated(self.means.std(0, ddof=1) / root, self.covariances.std(0, ddof=1) / root)


def alphas_cumprod() -> np.ndarray:
    """ᾱ at the sampler's timesteps, the noisiest first: float64 [T]."""
    return torch.cumprod(1 - make_betas(*BETAS, TIMESTEPS), 0).flip(0).numpy()


def simulate(
    data: TrainingSet,
    gamma: float = 0.0,
    noise: str = "gaussian",
    eta: float = 0.0,
    corruption_mode: str = "random",
    trainings: int = 4,
    steps: int = 2000,
    batch_size: int = 1024,
    samples: int = 20_000,
    seed: int = 0,
) -> Simulated:
    """Trains R denoisers on one training set and draws from each.

    Args:
        gamma: γ of conditions c + γ ξ, which CEP has as γ √m in its γ/√m. noise: `gaussian` or `uniform`.
        eta: η. corruption_mode: `random`, anew at every step, or `fixed`, once (see [`relabel`]); the flips of all
            trainings have the given seed. samples: drawn of every class.
    """
    corrupt = LabelCorruption(eta, data.classes, mode=corruption_mode, seed=seed)
    found = [
        _train_and_sample(data, gamma, noise, corrupt, steps, batch_size, samples, seed + number)
        for number in tqdm(range(trainings), desc="simulation", unit="training", leave=False)
    ]
    means, covariances = zip(*found, strict=True)
    return Simulated(np.stack(means), np.stack(covariances))


def relabel(data: TrainingSet, eta: float, seed: int = 0) -> TrainingSet:
    """The training set as `--corruption_mode fixed` shows it: [`LabelCorruption`] of every example by its index."""
    corrupt = LabelCorruption(eta, data.classes, mode="fixed", seed=seed)
    told = corrupt(torch.from_numpy(data.labels), torch.arange(len(data.labels)))
    return TrainingSet(data.points, told.numpy(), data.classes)


def _train_and_sample(data, gamma, noise, corrupt, steps, batch_size, samples, seed):
    classes, dim = data.classes, data.points.shape[1]
    objective = DiffusionObjective(make_betas(*BETAS, TIMESTEPS), seed=seed)
    perturb = ConditionEmbeddingPerturbation(gamma * math.sqrt(classes), noise, seed)
    denoiser = LinearDenoiser(dim, classes)
    averaged = torch.optim.swa_utils.AveragedModel(denoiser)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    points, labels = torch.from_numpy(data.points).float(), torch.from_numpy(data.labels)
    for step in range(steps):
        keys = torch.arange(batch_size) + step * batch_size
        chosen = keys % len(points)
        told = corrupt(labels[chosen], chosen, keys)
        examples = objective.noise(points[chosen][:, :, None, None], keys)
        condition = perturb(nn.functional.one_hot(told, classes).float(), keys=keys)
        loss = objective.loss(denoiser(examples.noisy, examples.timesteps, condition), examples).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step >= steps // 2:
            averaged.update_parameters(denoiser)
    return draw(averaged.module, classes, dim, samples, seed)


@torch.no_grad()
def draw(denoiser: LinearDenoiser, classes: int, dim: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws by diffusers' DDIM from pure noise, with clean conditions.

    Returns:
        The means of the classes, float64 [K, d], and the covariance around them, float64 [d, d].
    """
    schedule, start, end = BETAS
    scheduler = DDIMScheduler(
        TIMESTEPS, beta_schedule=schedule, beta_start=start, beta_end=end, clip_sample=False, thresholding=False
    )
    scheduler.set_timesteps(TIMESTEPS)
    labels = torch.arange(classes).repeat_interleave(samples)
    condition = nn.functional.one_hot(labels, classes).float()
    latents = torch.randn((len(labels), dim, 1, 1), generator=torch.Generator().manual_seed(seed))
    for timestep in scheduler.timesteps:
        # One at a time, so that a batch shares its timestep's matrices.
        A, B, bias = denoiser.of_data[timestep], denoiser.of_condition[timestep], denoiser.bias[timestep]
        prediction = latents.flatten(1) @ A.T + condition @ B.T + bias
        latents = scheduler.step(prediction[:, :, None, None], timestep, latents).prev_sample
    drawn = latents.flatten(1).double().numpy().reshape(classes, samples, dim)
    means = drawn.mean(1)
    centred = (drawn - means[:, None]).reshape(-1, dim)
    return means, centred.T @ centred / len(centred)
