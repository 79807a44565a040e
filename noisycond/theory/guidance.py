"""The same under classifier-free guidance (arXiv:2207.12598): ε̂ = ε̂_null + w (ε̂_class - ε̂_null), w its scale.

In the limit of ever more training samples, for a denoiser that treats each coordinate by itself; docs/theory.md has
the steps. Letters: as in `mixture`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from noisycond.errors import require
from noisycond.theory.expectation import diagonal, shrinkage, variance_of_means
from noisycond.theory.minima import Best, least
from noisycond.theory.mixture import Mixture


@dataclass(frozen=True)
class Guided:
    """How guidance changes one coordinate of N(μ, C) where the data of all classes is N(0, S).

    Attributes:
        push: the generated mean is push · μ. variance: the generated variance, Cʷ S¹⁻ʷ.
    """

    push: np.ndarray
    variance: np.ndarray


def guide(of_class: np.ndarray, of_all: np.ndarray, guidance: float) -> Guided:
    """What the deterministic sampler makes, in the limit of many steps from pure noise.

        push = w F((1 - w)/2, 1; 3/2; 1 - C/S)       F Gauss's hypergeometric function

    Args:
        of_class: C > 0, float64 [d]. of_all: S ≥ C, float64 [d]. guidance: w ≥ 0; 1 is none.
    """
    power = special.hyp2f1((1 - guidance) / 2, 1, 1.5, 1 - of_class / of_all)
    return Guided(guidance * power, of_class**guidance * of_all ** (1 - guidance))


def guided_squared_w2(
    mixture: Mixture, guidance: float, gamma: float = 0.0, noise: str = "gaussian", eta: float = 0.0
) -> float:
    """The squared W2 of what is generated to the true class, averaged over classes, with ever more samples.

    Raises:
        InputError: see [`shrinkage`]; or a covariance that is not diagonal, or w < 0.
    """
    require(0 <= guidance < np.inf, f"--guidance_scale is {guidance}, but it must be 0 or a positive number.")
    of_class, apart = diagonal(mixture), variance_of_means(mixture)
    how = shrinkage(mixture.classes, gamma, noise, eta)
    made = guide(of_class + how.moved * apart, of_class + apart, guidance)
    off = (1 - made.push * how.kept) ** 2 * apart
    return float((off + np.square(np.sqrt(made.variance) - np.sqrt(of_class))).sum())


def pooled_squared_w2(
    mixture: Mixture, guidance: float, gamma: float = 0.0, noise: str = "gaussian", eta: float = 0.0
) -> float:
    """The squared W2 of the Gaussians that have the mean and covariance of all classes together, generated and true:
    what FID measures in its features. See [`guided_squared_w2`]."""
    require(0 <= guidance < np.inf, f"--guidance_scale is {guidance}, but it must be 0 or a positive number.")
    of_class, apart = diagonal(mixture), variance_of_means(mixture)
    how = shrinkage(mixture.classes, gamma, noise, eta)
    made = guide(of_class + how.moved * apart, of_class + apart, guidance)
    pooled = made.variance + (made.push * how.kept) ** 2 * apart
    return float(np.square(np.sqrt(pooled) - np.sqrt(of_class + apart)).sum())


@dataclass(frozen=True)
class GuidedPoint:
    """One setting; the rows of the CSV.

    Attributes:
        how: `gaussian` or `uniform`, ξ of a γ, or `eta`. strength: γ or η. w2: the root of the mean square over
            classes. pooled_w2: of all classes as one Gaussian.
    """

    how: str
    classes: int
    dim: int
    separation: float
    guidance_scale: float
    strength: float
    w2: float
    pooled_w2: float


def over_guidance(
    mixture: Mixture, separation: float, how: str, scales: Sequence[float], strengths: Sequence[float]
) -> Iterator[GuidedPoint]:
    """A curve over γ or η for each guidance scale."""
    for guidance in scales:
        for strength in strengths:
            corruption = _corruption(how, strength)
            squares = [at(mixture, guidance, **corruption) for at in (guided_squared_w2, pooled_squared_w2)]
            place = (how, mixture.classes, mixture.dim, separation, float(guidance), float(strength))
            yield GuidedPoint(*place, *(float(np.sqrt(max(square, 0.0))) for square in squares))


def best_under_guidance(mixture: Mixture, guidance: float, how: str) -> Best:
    """The γ or η of least squared W2 at this guidance scale; 0 where none helps."""
    highest = 1 - 1 / mixture.classes if how == "eta" else 30.0
    return least(lambda strength: guided_squared_w2(mixture, guidance, **_corruption(how, strength)), 1e-5, highest)


def _corruption(how: str, strength: float) -> dict[str, float | str]:
    return {"eta": strength} if how == "eta" else {"gamma": strength, "noise": how}
