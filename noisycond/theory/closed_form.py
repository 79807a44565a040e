"""The optimal linear denoiser of a training set, and what it generates, in closed form.

The denoiser sees x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε and c̃ = c(ỹ) + γ ξ, where ỹ is the label or, with probability η,
another class. Trained to its optimum it is the linear regression of x_0 on (x_t, c̃), whose moments are known;
docs/theory.md has the steps. Letters: as in `mixture`; S denotes covariances of the training distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from noisycond.errors import require
from noisycond.theory.mixture import NOISES, TrainingSet, check_corruption


_ROUNDING = 1e-12


@dataclass(frozen=True)
class Generated:
    """What is generated: N(mean_y, covariance) for class y.

    Attributes:
        means: float64 [K, d]. covariance: float64 [d, d], of all classes.
    """

    means: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class Regression:
    """The regression of x_0 on the noisy condition alone: x_0 ≈ mean + slope (c̃ - condition_mean), with what is left.

    Attributes:
        mean: float64 [d]. slope: float64 [d, m]. condition_mean: float64 [m].
        residual: float64 [d, d], the covariance of what the condition does not tell.
    """

    mean: np.ndarray
    slope: np.ndarray
    condition_mean: np.ndarray
    residual: np.ndarray

    def predict(self, condition: np.ndarray) -> np.ndarray:
        """float64 [..., d] at conditions float64 [..., m]."""
        return self.mean + (condition - self.condition_mean) @ self.slope.T


def regress(
    data: TrainingSet,
    gamma: float = 0.0,
    noise: str = "gaussian",
    eta: float = 0.0,
    embedding: np.ndarray | None = None,
) -> Regression:
    """The regression of the training distribution.

    Args:
        gamma: γ ≥ 0. noise: of [`NOISES`]. eta: η in [0, 1]: the share of labels replaced by another class, each of
            the K - 1 as likely, anew at every step (`--corruption_mode random`); for labels that are replaced once see
            [`TrainingSet.relabelled`]. embedding: c(y), float64 [K, m]; by default one-hot.

    Raises:
        InputError: a negative γ, an η outside [0, 1], or an unknown noise.
    """
    check_corruption(gamma, noise, eta)
    classes = data.classes
    embedding = np.eye(classes) if embedding is None else embedding
    told = (1 - eta) * np.eye(classes) + eta / (classes - 1) * (1 - np.eye(classes))  # [y, ỹ]: P(ỹ | y)
    weights = data.counts / len(data.points)
    mean, condition_mean = data.points.mean(0), weights @ told @ embedding
    centred = data.points - mean
    class_shift = data.class_means - mean
    expected = told @ embedding - condition_mean  # E[c(ỹ) | y] around its mean
    cross = (class_shift * weights[:, None]).T @ expected
    around = embedding - condition_mean
    # The condition varies, and tells of the data, only where the classes differ; the noise elsewhere is ignored. Its
    # covariance is inverted there, not as a whole: that would be singular, or nearly so, for γ near 0.
    _, lengths, directions = np.linalg.svd(np.sqrt(weights @ told)[:, None] * around, full_matrices=False)
    kept = lengths > 1e-10 * lengths[0]
    directions = directions[kept]
    spread = np.square(lengths[kept]) + gamma**2 * NOISES[noise]
    slope = cross @ (directions.T / spread) @ directions
    total = centred.T @ centred / len(centred)
    residual = total - slope @ cross.T
    values, vectors = np.linalg.eigh((residual + residual.T) / 2)
    values[values < _ROUNDING * np.trace(total)] = 0  # no variance, but what rounding leaves of it
    return Regression(mean, slope, condition_mean, (vectors * values) @ vectors.T)


def generate(
    data: TrainingSet,
    gamma: float = 0.0,
    noise: str = "gaussian",
    eta: float = 0.0,
    embedding: np.ndarray | None = None,
    alphas_cumprod: Sequence[float] | None = None,
) -> Generated:
    """What the deterministic sampler makes of the optimal denoiser, with clean conditions.

    Args:
        alphas_cumprod: ᾱ at the sampler's timesteps, falling; None is the limit of many steps from pure noise.
    """
    found = regress(data, gamma, noise, eta, embedding)
    embedding = np.eye(data.classes) if embedding is None else embedding
    means = found.predict(embedding)
    if alphas_cumprod is None:
        return Generated(means, found.residual)
    values, vectors = np.linalg.eigh(found.residual)
    values = values.clip(min=0)  # rounding
    scale, kept = sampler_map(values, np.asarray(alphas_cumprod, dtype=np.float64))
    # x_0 = scale x_T + kept μ̂_y, in each eigendirection.
    means = (means @ vectors * kept) @ vectors.T
    return Generated(means, (vectors * scale**2) @ vectors.T)


def sampler_map(variances: np.ndarray, alphas_cumprod: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DDIM (η = 0; Eq. 12 of arXiv:2010.02502) with the optimal denoiser, along the eigenvectors of the residual
    covariance: x_0 = scale · x_T + kept · μ̂_y, x_T ~ N(0, 1).

    The denoiser there is x̂_0 = μ̂ + λ √ᾱ / (λ ᾱ + 1 - ᾱ) · (x_t - √ᾱ μ̂), λ the variance left.

    Args:
        variances: λ ≥ 0, float64 [d]. alphas_cumprod: ᾱ at the sampler's timesteps, from the noisiest on; the last
            step goes to ᾱ = 1.

    Returns:
        scale and kept, float64 [d]; both tend to √λ and 1 with many steps from ᾱ → 0.
    """
    scale, kept = np.ones_like(variances), np.zeros_like(variances)
    ends = [*alphas_cumprod[1:], 1.0]
    for now, then in zip(alphas_cumprod, ends, strict=True):
        gain = variances * np.sqrt(now) / (variances * now + 1 - now)
        # x̂_0 = gain x_t + (1 - gain √ᾱ) μ̂, ε̂ = (x_t - √ᾱ x̂_0) / √(1 - ᾱ)
        turned = np.sqrt((1 - then) / (1 - now))
        of_x0 = np.sqrt(then) - turned * np.sqrt(now)
        step, offset = turned + of_x0 * gain, of_x0 * (1 - gain * np.sqrt(now))
        scale, kept = step * scale, step * kept + offset
    return scale, kept


def entropy(covariance: np.ndarray) -> float:
    """Differential entropy of a Gaussian, in nats: ½ log det(2πe C).

    Raises:
        InputError: the covariance is singular: the entropy is -∞.
    """
    require(
        not is_singular(covariance),
        "the covariance of what is generated is singular, so its entropy is -∞: give more samples than classes and "
        "dimensions together, or a larger γ.",
    )
    return float(np.linalg.slogdet(2 * np.pi * np.e * covariance)[1] / 2)


def is_singular(covariance: np.ndarray) -> bool:
    """Whether a direction has no variance, to rounding."""
    values = np.linalg.eigvalsh(covariance)
    return bool(values[0] <= _ROUNDING * values[-1])


def squared_w2(means: np.ndarray, covariance: np.ndarray, other_means: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Squared 2-Wasserstein distance of N(mean, C) and N(mean', C') (Gelbrich 1990), float64 [...] for means
    float64 [..., d]:

        |m - m'|² + tr(C + C' - 2 (C'^½ C C'^½)^½)
    """
    values, vectors = np.linalg.eigh(other)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ covariance @ root).clip(min=0)
    shape = np.trace(covariance) + np.trace(other) - 2 * np.sqrt(inner).sum()
    return np.square(means - other_means).sum(-1) + max(shape, 0.0)
