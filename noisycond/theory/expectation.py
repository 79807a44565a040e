"""Entropy and W2 of what is generated, in expectation over training sets, exactly.

For classes of equal size, one-hot conditions and a denoiser that treats each coordinate by itself, the variance that
the condition does not tell is a sum of two independent chi-squares, whose Laplace transform is known. Expectations of
roots and logarithms are integrals of that transform; docs/theory.md has the steps. Letters: as in `mixture`; n samples
per class.
"""

from dataclasses import dataclass

import numpy as np
from scipy import special

from noisycond.errors import require
from noisycond.theory.mixture import NOISES, Mixture, check_corruption


# The integrals are over v = log s (or log √s) on the whole line, where the trapezoidal rule converges faster than any
# power of its step; the integrands fall at least as exp(-|v| / 2).
_STEP, _LOW, _HIGH = 0.1, -40.0, 90.0
_NODES = np.arange(_LOW, _HIGH, _STEP)


@dataclass(frozen=True)
class Shrinkage:
    """How a corrupted condition enters, for one-hot conditions of K equal classes: the means of what is generated are
    m̄ + kept (m_y - m̄), and its covariance is S_within + moved · S_between.

    Attributes:
        kept: (1 - η K/(K - 1)) / (1 + K γ² Var ξ). moved: 1 - (1 - η K/(K - 1))² / (1 + K γ² Var ξ), in [0, 1].
    """

    kept: float
    moved: float


def shrinkage(classes: int, gamma: float = 0.0, noise: str = "gaussian", eta: float = 0.0) -> Shrinkage:
    """See [`Shrinkage`].

    Raises:
        InputError: a negative γ, an η outside [0, 1], or an unknown noise.
    """
    check_corruption(gamma, noise, eta)
    told = 1 - eta * classes / (classes - 1)
    spread = 1 + classes * gamma**2 * NOISES[noise]
    return Shrinkage(told / spread, 1 - told**2 / spread)


@dataclass(frozen=True)
class Variances:
    """Independent random variances X = a (U + χ²_p + ρ χ'²_q(λ)), U ~ χ²_u the part of one class, the others
    independent of it, the last one noncentral; one of each coordinate.

    Attributes:
        scale: a > 0, float64 [d]. own: u. others: p. between: q. moved: ρ ≥ 0. noncentrality: λ ≥ 0, float64 [d].
    """

    scale: np.ndarray
    own: int
    others: int
    between: int
    moved: float
    noncentrality: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """E X: float64 [d]."""
        return self.scale * (self.own + self.others + self.moved * (self.between + self.noncentrality))

    def mean_root(self) -> np.ndarray:
        """E √X = 1/√π ∫ (1 - E exp(-z² X)) / z dv with z = e^v: float64 [d]."""
        if not self.mean.any():
            return np.zeros(len(self.scale))
        z, unit = np.exp(_NODES), np.sqrt(self.mean)[:, None]
        missing = -np.expm1(self._log_laplace(np.square(z / unit)))
        return (unit * missing / z).sum(-1) * _STEP / np.sqrt(np.pi)

    def mean_log(self) -> np.ndarray:
        """E log X = ∫ (exp(-s) - E exp(-s X)) dv with s = e^v (Frullani): float64 [d]; -∞ where X may be 0."""
        if self.own + self.others + (self.between if self.moved > 0 else 0) <= 0:
            return np.full(len(self.scale), -np.inf)
        s, unit = np.exp(_NODES), self.mean[:, None]
        gap = np.exp(-s) - np.exp(self._log_laplace(s / unit))
        return np.log(self.mean) + gap.sum(-1) * _STEP

    def mean_root_with_own(self) -> np.ndarray:
        """E √(U X) = 1/√π ∫ E[√U (1 - exp(-z² X))] / z dv: float64 [d]; E[√U e^(-bU)] = E √U (1 + 2b)^(-(u + 1)/2)."""
        if self.own <= 0:
            return np.zeros(len(self.scale))
        root = np.sqrt(2) * np.exp(special.gammaln((self.own + 1) / 2) - special.gammaln(self.own / 2))
        z, unit = np.exp(_NODES), np.sqrt(self.mean)[:, None]
        squared = np.square(z / unit)
        log = self._log_laplace(squared) - 0.5 * np.log1p(2 * self.scale[:, None] * squared)
        return root * (unit * -np.expm1(log) / z).sum(-1) * _STEP / np.sqrt(np.pi)

    def _log_laplace(self, s: np.ndarray) -> np.ndarray:
        """log E exp(-s X), for s ≥ 0 of shape [d, ...]."""
        scale, noncentrality = self.scale[:, None], self.noncentrality[:, None]
        second = 2 * scale * self.moved * s
        logs = (self.own + self.others) * np.log1p(2 * scale * s) + self.between * np.log1p(second)
        return -0.5 * (logs + noncentrality * second / (1 + second))


def variances_of(mixture: Mixture, samples: int, moved: float) -> Variances:
    """What is generated: X_i = Σ_i/(Kn) (χ²_{K(n-1)} + ρ χ'²_{K-1}(λ_i)), λ_i = n Σ_k (μ_ki - μ̄_i)² / Σ_i."""
    of_class, classes = np.diag(mixture.covariance), mixture.classes
    apart = np.square(mixture.means - mixture.means.mean(0)).sum(0)
    own, others = samples - 1, (classes - 1) * (samples - 1)
    return Variances(of_class / (classes * samples), own, others, classes - 1, moved, samples * apart / of_class)


@dataclass(frozen=True)
class Expected:
    """In expectation over training sets, averaged over classes.

    Attributes:
        entropy: of what is generated for a class, in nats. squared_w2: to the true class.
        squared_w2_to_samples: to the Gaussian of the class's own samples (their mean, their variances), which is never
            more than that to the samples themselves (Gelbrich 1990).
    """

    entropy: float
    squared_w2: float
    squared_w2_to_samples: float


def expected(
    mixture: Mixture, samples: int, gamma: float = 0.0, noise: str = "gaussian", eta: float = 0.0
) -> Expected:
    """Exactly, for n samples of each class and one-hot conditions, of the denoiser that treats each coordinate by
    itself, in the limit of many sampler steps.

    Raises:
        InputError: see [`shrinkage`]; or a covariance that is not diagonal, or n < 1.
    """
    of_class, apart = diagonal(mixture), variance_of_means(mixture)
    to_truth = expected_squared_w2(mixture, samples, gamma, noise, eta)
    how = shrinkage(mixture.classes, gamma, noise, eta)
    found = variances_of(mixture, samples, how.moved)
    moved_away = (1 - how.kept) ** 2 * (apart + of_class / samples * (1 - 1 / mixture.classes))
    of_samples = of_class * (samples - 1) / samples
    both = np.sqrt(of_class / samples) * found.mean_root_with_own()
    to_samples = moved_away + of_samples + found.mean - 2 * both
    entropy = (mixture.dim * np.log(2 * np.pi * np.e) + found.mean_log().sum()) / 2
    return Expected(float(entropy), to_truth, float(to_samples.sum()))


def expected_squared_w2(
    mixture: Mixture, samples: int, gamma: float = 0.0, noise: str = "gaussian", eta: float = 0.0
) -> float:
    """The squared W2 to the true class alone; see [`expected`]. An infinite n is the limit of ever more samples."""
    require(samples > 0, f"--samples is {samples}, but each class needs at least one.")
    of_class, apart, classes = diagonal(mixture), variance_of_means(mixture), mixture.classes
    how = shrinkage(classes, gamma, noise, eta)
    lost = 1 - how.kept
    if samples == np.inf:
        left = np.sqrt(of_class + how.moved * apart)
        return float((lost**2 * apart + np.square(left - np.sqrt(of_class))).sum())
    found = variances_of(mixture, samples, how.moved)
    own, others = how.kept + lost / classes, lost / classes
    chance = of_class / samples * (own**2 + (classes - 1) * others**2)
    each = lost**2 * apart + chance + of_class + found.mean - 2 * np.sqrt(of_class) * found.mean_root()
    return float(each.sum())


def diagonal(mixture: Mixture) -> np.ndarray:
    """Σ's diagonal: float64 [d].

    Raises:
        InputError: the covariance is not diagonal.
    """
    of_class = np.diag(mixture.covariance)
    require(
        np.allclose(mixture.covariance, np.diag(of_class)),
        "the exact expectations are for a diagonal covariance: rotate the data so that it is.",
    )
    return of_class


def variance_of_means(mixture: Mixture) -> np.ndarray:
    """The variance of the class means in each coordinate: float64 [d]."""
    return np.square(mixture.means - mixture.means.mean(0)).mean(0)
