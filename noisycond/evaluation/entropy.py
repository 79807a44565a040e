"""Sample entropy: the differential entropy of a set of features, in nats, as a measure of diversity without a
reference.

Letters: N images, D features.
"""

import math
import warnings
from typing import Literal, get_args

import torch

from noisycond.errors import InputError, require
from noisycond.evaluation.estimates import Estimate
from noisycond.evaluation.neighbours import kth_neighbour_distances


EntropyEstimator = Literal["knn", "gaussian"]


def sample_entropy(
    features: torch.Tensor,
    estimator: EntropyEstimator = "knn",
    k: int = 5,
    device: str | torch.device | None = None,
) -> Estimate:
    """The differential entropy of the distribution behind features, in nats; the higher, the more diverse.

    The estimator behind published sample entropies is often not said; the default is the one by nearest neighbours,
    because it is defined for fewer images than features and sees that a distribution has parts: the Gaussian one, a
    function of the covariance alone, calls a few tight clusters far apart as diverse as the cloud that fills the space
    between them. Both are biased where D is large for N, the one by neighbours upwards and the Gaussian one downwards
    (a standard normal of 2,906 nats, D = 2,048, comes out of 10,000 samples as 3,525 and 2,793): compare sets of one
    size in one feature space.

    Args:
        features [N, D]: float32; may be memory-mapped.
        estimator: `knn` ([`nearest_neighbour_entropy`]) or `gaussian` ([`gaussian_entropy`]).
        k: the neighbour of `knn`. device: where its distances are computed.

    Raises:
        InputError: as the two do.
    """
    require(
        estimator in get_args(EntropyEstimator),
        f"entropy has the estimators {' and '.join(get_args(EntropyEstimator))}, not {estimator!r}.",
    )
    return nearest_neighbour_entropy(features, k, device) if estimator == "knn" else gaussian_entropy(features)


def nearest_neighbour_entropy(
    features: torch.Tensor, k: int = 5, device: str | torch.device | None = None
) -> Estimate:
    """The estimator of Kozachenko and Leonenko (1987) by the k-th nearest neighbour, as in Kraskov et al., "Estimating
    Mutual Information", Physical Review E 69, 2004, Eq. 20 with Euclidean distances ε to the k-th neighbour as radii:
    ψ(N) − ψ(k) + log V_D + D · mean log ε, where V_D is the volume of the unit ball.

    An image with k or more exact copies has a distance of zero and would make the entropy −∞, as it is for a
    distribution with point masses. Distances below what float32 tells apart, 2⁻²³ times the root mean square distance
    from the mean, count as that, with a warning; so copies lower the entropy, the more of them the more, and it stays
    a number. Fewer than k copies of an image need no such help.

    Resampled, the set of distances is drawn anew, not the neighbours: among drawn copies every distance would shrink.

    Args:
        features [N, D]: float32, N > k; may be memory-mapped. k: at least 1.

    Raises:
        InputError: k + 1 images are not there, or all images are one.
    """
    size, dim = features.shape
    require(k >= 1, f"entropy by nearest neighbours needs a k of at least 1, not {k}.")
    require(
        size > k, f"entropy by nearest neighbours with k = {k} needs at least {k + 1} images, but there are {size}."
    )
    floor = torch.finfo(torch.float32).eps * _spread(features)
    require(floor > 0, f"entropy is not defined: all {size} images have the same features.")
    distances = kth_neighbour_distances(features, [k], device)[:, 0]
    copied = int((distances < floor).sum())
    if copied:
        warnings.warn(
            f"entropy: {copied} of {size} images have {k} or more copies; the distance between copies counts as the "
            "least that float32 tells apart.",
            stacklevel=2,
        )
    log_volume = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    constant = _digamma(size) - _digamma(k) + log_volume
    return Estimate.mean(constant + dim * distances.clamp(min=floor).log())


def gaussian_entropy(features: torch.Tensor) -> Estimate:
    """The entropy of the fitted Gaussian, (D log 2πe + log det Σ) / 2 with the unbiased covariance Σ: an upper bound
    for all distributions of that covariance.

    It is resampled only where N ≥ 2 D: a resampled set has about 0.63 N different images, which must be more than D.

    Args:
        features [N, D]: float32.

    Raises:
        InputError: N ≤ D, or features that depend linearly on one another, where the entropy is −∞.
    """
    size, dim = features.shape
    require(
        size > dim,
        f"entropy of the fitted Gaussian needs more images than the {dim} features, at least {dim + 1}, but there are "
        f"{size}; the knn estimator has no such bound.",
    )
    value = _entropy_of_fitted_gaussian(features)
    if value is None:
        raise InputError(
            f"entropy of the fitted Gaussian is not defined: the {dim} features depend linearly on one another; take "
            "the knn estimator."
        )

    def resample(chosen: torch.Tensor) -> float:
        again = _entropy_of_fitted_gaussian(features[chosen])
        return -math.inf if again is None else again

    return Estimate(value, resample if size >= 2 * dim else None, size)


def _entropy_of_fitted_gaussian(features: torch.Tensor) -> float | None:
    """None where the covariance is singular up to the rounding of float32 features."""
    dim = features.shape[1]
    covariance = features.to(torch.float64).T.cov().reshape(dim, dim)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    if eigenvalues[0] <= torch.finfo(torch.float32).eps ** 2 * eigenvalues[-1]:
        return None
    return (dim * math.log(2 * math.pi * math.e) + eigenvalues.log().sum().item()) / 2


def _spread(features: torch.Tensor) -> float:
    """The root mean square distance from the mean; exactly 0 where all features are the same."""
    return math.sqrt((features - features[0]).var(dim=0, correction=0).sum().item())


def _digamma(number: int) -> float:
    return torch.tensor(number, dtype=torch.float64).digamma().item()
