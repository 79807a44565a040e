"""What the figures show: entropy and W2 over γ and η, where W2 is least, and how that moves with n and d; and the same
for full matrices, averaged over training sets."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from noisycond.errors import InputError
from noisycond.theory.closed_form import Generated, entropy, generate, is_singular, squared_w2
from noisycond.theory.expectation import expected, expected_squared_w2
from noisycond.theory.minima import Best, least
from noisycond.theory.mixture import NOISES, Mixture, draw_training_set


@dataclass(frozen=True)
class Point:
    """One setting and what is expected of it; the rows of the CSV.

    Attributes:
        sweep: which figure it is of. classes, dim, samples, separation: K, d, n and s. noise: of ξ. gamma, eta: γ, η.
        entropy: in nats. w2, w2_to_samples: the roots of the expected squares.
    """

    sweep: str
    classes: int
    dim: int
    samples: int
    separation: float
    noise: str
    gamma: float
    eta: float
    entropy: float
    w2: float
    w2_to_samples: float


def best_gamma(mixture: Mixture, samples: int, noise: str = "gaussian") -> Best:
    """The γ of least expected squared W2, by a bounded search in log γ (to about 1e-6 of it)."""
    return least(lambda gamma: expected_squared_w2(mixture, samples, gamma=gamma, noise=noise), 1e-5, 30.0)


def best_eta(mixture: Mixture, samples: int) -> Best:
    """The η of least expected squared W2, up to the (K - 1)/K that leaves nothing of the condition."""
    return least(lambda eta: expected_squared_w2(mixture, samples, eta=eta), 1e-7, 1 - 1 / mixture.classes)


def over_gamma(
    mixture: Mixture, samples: int, separation: float, gammas: Sequence[float], noise: str
) -> Iterator[Point]:
    """The points of a curve over γ."""
    for gamma in gammas:
        yield _point("gamma", mixture, samples, separation, noise, gamma, 0.0)


def over_eta(mixture: Mixture, samples: int, separation: float, etas: Sequence[float]) -> Iterator[Point]:
    """The points of a curve over η."""
    for eta in etas:
        yield _point("eta", mixture, samples, separation, "none", 0.0, eta)


def _point(sweep, mixture, samples, separation, noise, gamma, eta) -> Point:
    found = expected(mixture, samples, gamma, "gaussian" if noise == "none" else noise, eta)
    return Point(
        sweep,
        mixture.classes,
        mixture.dim,
        samples,
        separation,
        noise,
        float(gamma),
        float(eta),
        found.entropy,
        float(np.sqrt(max(found.squared_w2, 0.0))),
        float(np.sqrt(max(found.squared_w2_to_samples, 0.0))),
    )


@dataclass(frozen=True)
class BestPoint:
    """The best corruption of one setting; the rows of the second CSV.

    Attributes:
        sweep: which figure it is of. how: `gaussian` or `uniform`, ξ of a γ, or `eta`, drawn anew at every step. best:
            γ or η. gain: the share of the squared W2 taken away.
        squared_w2, entropy: at the best; without, entropy_without: without corruption. true_entropy: of a true class.
    """

    sweep: str
    how: str
    classes: int
    dim: int
    samples: int
    separation: float
    best: float
    squared_w2: float
    without: float
    gain: float
    entropy: float
    entropy_without: float
    true_entropy: float


def best_points(
    sweep: str,
    settings: Sequence[tuple[Mixture, int]],
    separation: float,
    done: Callable[[], object] = lambda: None,
    corruptions: Sequence[str] = (*NOISES, "eta"),
) -> list[BestPoint]:
    """The best γ, for each noise, and the best η of each mixture with n samples per class.

    Args:
        done: called after each. corruptions: of `gaussian`, `uniform` and `eta`.
    """
    points = []
    for mixture, samples in settings:
        for how in corruptions:
            best = best_eta(mixture, samples) if how == "eta" else best_gamma(mixture, samples, how)
            of_noise = {"eta": best.strength} if how == "eta" else {"gamma": best.strength, "noise": how}
            told = (best.strength, best.squared_w2, best.without, best.gain)
            entropies = (expected(mixture, samples, **of_noise).entropy, expected(mixture, samples).entropy)
            place = (sweep, how, mixture.classes, mixture.dim, samples, separation)
            points.append(BestPoint(*place, *told, *entropies, mixture.entropy))
            done()
    return points


@dataclass(frozen=True)
class Average:
    """The closed form of full matrices, averaged over training sets; the rows of the third CSV.

    Attributes:
        how: `gaussian` or `uniform`, ξ of a γ; `eta` or `eta_fixed`, labels flipped anew at every step or once.
        strength: γ or η. training_sets: R, how many were drawn. squared_w2, entropy: their means over the sets, with
            standard errors; the entropy is -∞ where a set leaves no variance in some direction. change: of the mean
            squared W2 against no corruption, as a share of that, with the standard error of paired sets.
    """

    how: str
    classes: int
    dim: int
    samples: int
    separation: float
    strength: float
    training_sets: int
    squared_w2: float
    squared_w2_error: float
    change: float
    change_error: float
    entropy: float
    entropy_error: float


def averages(
    mixture: Mixture,
    samples: int,
    separation: float,
    how: str,
    strengths: Sequence[float],
    training_sets: int,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> list[Average]:
    """Of the denoiser with full matrices, exact for each training set: the check of what [`expected`] says of the
    denoiser that treats each coordinate by itself, and the way to flips that are drawn once.

    Args:
        how, strengths: see [`Average`]; all see the same sets. done: called after each set.

    Returns:
        A row per strength; none where flips drawn once leave a class without examples again and again.
    """
    found = np.empty((training_sets, len(strengths), 2))
    without = np.empty(training_sets)
    for number in range(training_sets):
        own = [seed, number + 1]  # trailing zeros of a seed count for nothing: 0 were the class means' own
        data = draw_training_set(mixture, samples, seed=own)
        without[number], _ = _measured(mixture, generate(data))
        for place, strength in enumerate(strengths):
            if how == "eta_fixed":
                try:
                    made = generate(data.relabelled(strength, seed=[*own, 1]))
                except InputError:
                    found[number, place] = np.nan
                    continue
            elif how == "eta":
                made = generate(data, eta=strength)
            else:
                made = generate(data, strength, how)
            found[number, place] = _measured(mixture, made)
        done()
    rows = []
    for strength, (distances, entropies) in zip(strengths, found.transpose(1, 2, 0), strict=True):
        if np.isnan(distances).any():
            continue
        change, change_error = _mean_and_error((distances - without) / without.mean())
        place = (how, mixture.classes, mixture.dim, samples, separation, float(strength), training_sets)
        told = (*_mean_and_error(distances), change, change_error, *_mean_and_error(entropies))
        rows.append(Average(*place, *told))
    return rows


def _measured(mixture: Mixture, made: Generated) -> tuple[float, float]:
    """Squared W2 to the truth, averaged over classes, and the entropy."""
    distance = squared_w2(made.means, made.covariance, mixture.means, mixture.covariance).mean()
    return float(distance), -np.inf if is_singular(made.covariance) else entropy(made.covariance)


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    mean = float(values.mean())
    if not np.isfinite(mean):
        return mean, float("nan")
    return mean, float(values.std(ddof=1) / np.sqrt(len(values)))
