"""The setting: a mixture of Gaussians, training sets drawn from it, and what a denoiser is told of a class.

Letters: K classes, d dimensions of the data, m of the condition embedding, n_k training samples of class k, N = Σ n_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from noisycond.errors import InputError, require


NOISES = {"gaussian": 1.0, "uniform": 1 / 3}  # Var ξ per coordinate: ξ ~ N(0, 1) or U(-1, 1)


def check_corruption(gamma: float, noise: str, eta: float) -> None:
    """Raises InputError for a negative γ, an η outside [0, 1], or an unknown noise."""
    require(0 <= gamma < np.inf, f"--gamma is {gamma}, but it must be 0 or a positive number.")
    require(0 <= eta <= 1, f"--eta is {eta}, but a share must lie between 0 and 1.")
    require(noise in NOISES, f"--noise is {noise}, but it must be one of {', '.join(NOISES)}.")


@dataclass(frozen=True)
class Mixture:
    """The truth: class k is N(μ_k, Σ), all classes with one covariance.

    Attributes:
        means: float64 [K, d]. covariance: float64 [d, d], symmetric and positive definite.

    Raises:
        InputError: fewer than two classes, or a covariance that is not symmetric, or singular.
    """

    means: np.ndarray
    covariance: np.ndarray

    def __post_init__(self):
        require(self.means.ndim == 2 and len(self.means) > 1, "a mixture needs the means of at least two classes.")
        size = self.means.shape[1]
        require(
            self.covariance.shape == (size, size) and np.allclose(self.covariance, self.covariance.T),
            f"the covariance must be a symmetric matrix of {size} × {size}, as the means have {size} dimensions.",
        )
        lowest, highest = np.linalg.eigvalsh(self.covariance)[[0, -1]]
        require(
            lowest > 1e-12 * max(highest, 0.0) and highest > 0,
            f"the covariance is singular (eigenvalues from {lowest:.3g} to {highest:.3g}): a class would have no "
            "density; give every direction a positive variance.",
        )

    @property
    def classes(self) -> int:
        return len(self.means)

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @classmethod
    def drawn(
        cls, classes: int, dim: int, separation: float, seed: int = 0, variances: Sequence[float] = (1.0,)
    ) -> "Mixture":
        """Means drawn from a Gaussian, and a diagonal covariance Σ.

        Args:
            separation: s ≥ 0. The means are scaled so that their variance (of K - 1 degrees of freedom), in units of
                Σ, is s² on average over coordinates, whatever the draw.
            variances: of a class, per coordinate; one number is that of every coordinate.

        Raises:
            InputError: K < 2, d < 1, s < 0, variances that are not positive (the covariance would be singular), or
                neither one of them nor d.
        """
        require(classes > 1, f"--classes is {classes}, but a mixture needs at least two.")
        require(dim > 0, f"--dim is {dim}, but it must be positive.")
        require(0 <= separation < np.inf, f"--separation is {separation}, but it must be 0 or a positive number.")
        require(
            len(variances) in (1, dim),
            f"--variances has {len(variances)} numbers, but it takes one for all coordinates, or --dim {dim}.",
        )
        require(
            all(0 < variance < np.inf for variance in variances),
            f"--variances is {' '.join(f'{variance:g}' for variance in variances)}, but each must be a positive "
            "number: with a 0 the covariance would be singular.",
        )
        of_class = np.broadcast_to(np.asarray(variances, dtype=np.float64), (dim,))
        drawn = np.random.default_rng(seed).standard_normal((classes, dim))
        scale = separation / np.sqrt(drawn.var(0, ddof=1).mean())
        return cls(scale * drawn * np.sqrt(of_class), np.diag(of_class))

    @property
    def entropy(self) -> float:
        """Differential entropy of a class, in nats: ½ log det(2πe Σ)."""
        return float(np.linalg.slogdet(2 * np.pi * np.e * self.covariance)[1] / 2)


@dataclass(frozen=True)
class TrainingSet:
    """N examples, int64 labels [N] in [0, K) and float64 points [N, d]; every class has one at least."""

    points: np.ndarray
    labels: np.ndarray
    classes: int

    def __post_init__(self):
        require(self.classes > 1, "a training set needs at least two classes.")
        require(
            self.labels.min() >= 0 and self.labels.max() < self.classes,
            f"labels run from {self.labels.min()} to {self.labels.max()}, but must lie in [0, {self.classes}).",
        )
        counts = self.counts
        require(
            len(self.points) >= self.classes and counts.min() > 0,
            f"{len(self.points)} samples are fewer than the {self.classes} classes need: each needs at least one.",
        )

    @property
    def counts(self) -> np.ndarray:
        """n_k: int64 [K]."""
        return np.bincount(self.labels, minlength=self.classes)

    def relabelled(self, eta: float, seed: int | Sequence[int] = 0) -> "TrainingSet":
        """Labels replaced by another class with probability η, once and for all, each of the K - 1 as likely
        (`--corruption_mode fixed`). Where a class would be left without examples all of them are drawn again, which
        the training scripts do not; with few samples per class that makes such flips a little more even.

        Raises:
            InputError: a class was left without examples a thousand times over.
        """
        check_corruption(0.0, "gaussian", eta)
        rng = np.random.default_rng(seed)
        for _ in range(1000):
            others = (self.labels + rng.integers(1, self.classes, len(self.labels))) % self.classes
            labels = np.where(rng.random(len(self.labels)) < eta, others, self.labels)
            if np.bincount(labels, minlength=self.classes).min() > 0:
                return TrainingSet(self.points, labels, self.classes)
        raise InputError(f"--eta {eta} leaves classes without examples: give more samples, or a smaller share.")

    @property
    def class_means(self) -> np.ndarray:
        """float64 [K, d]."""
        sums = np.zeros((self.classes, self.points.shape[1]))
        np.add.at(sums, self.labels, self.points)
        return sums / self.counts[:, None]

    def class_covariance(self, label: int) -> np.ndarray:
        """Of one class around its mean, divided by n_k: float64 [d, d]."""
        centred = self.points[self.labels == label] - self.class_means[label]
        return centred.T @ centred / len(centred)


def draw_training_set(mixture: Mixture, samples: int | Sequence[int], seed: int | Sequence[int] = 0) -> TrainingSet:
    """Independent samples.

    Args:
        samples: n_k of every class, or one number for all.

    Raises:
        InputError: a class without samples.
    """
    counts = np.broadcast_to(np.asarray(samples), (mixture.classes,))
    require(counts.min() > 0, f"--samples is {samples}, but each class needs at least one.")
    labels = np.repeat(np.arange(mixture.classes), counts)
    draws = np.random.default_rng(seed).standard_normal((len(labels), mixture.dim))
    factor = np.linalg.cholesky(mixture.covariance)
    return TrainingSet(mixture.means[labels] + draws @ factor.T, labels, mixture.classes)
