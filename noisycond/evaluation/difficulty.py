"""Sample difficulty: how far an image lies from its class, relative to how far it lies from images in general.

Letters: N real images, M generated images, D features, K classes.
"""

from dataclasses import dataclass

import torch

from noisycond.errors import InputError, require
from noisycond.evaluation.estimates import Estimate


# Rows that are taken to float64 at once.
_ROWS = 4096


@dataclass(frozen=True)
class ClassGaussians:
    """A Gaussian per class with one covariance for all, and one Gaussian behind them for all images.

    Attributes:
        classes [K]: int64, ascending, the labels there are.
        class_means [K, D], mean [D]: float64.
        class_factor, factor [D, D]: float64, the lower Cholesky factors of the shared covariance within classes and of
            the covariance of all images, both with the ridge.
    """

    classes: torch.Tensor
    class_means: torch.Tensor
    class_factor: torch.Tensor
    mean: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def fit(cls, features: torch.Tensor, labels: torch.Tensor | None, ridge: float = 1e-6) -> "ClassGaussians":
        """The maximum-likelihood means and covariances (divided by N), as in Ren et al., "A Simple Fix to Mahalanobis
        Distance for Improving Near-OOD Detection", arXiv:2106.09022.

        Where N is small or features depend on one another a covariance has no inverse. So ridge times the mean
        eigenvalue of the covariance of all images is added to the diagonals of both. It is the same amount for both,
        so that directions in which no real image varies cancel in the relative distance. At the default it changes
        well-conditioned distances by about a millionth; where N is not well above D + K, between-class directions hold
        almost no variance within classes and a larger ridge (1e-3) keeps them from deciding everything.

        Args:
            features [N, D]: float32, of real images; may be memory-mapped. labels [N]: int64, their classes.
            ridge: at least 0; 0 gives the covariances as they are.

        Raises:
            InputError: no labels, or another number of them than of images; not more images than classes; a covariance
                without an inverse although the ridge is added.
        """
        require(ridge >= 0, f"RMD: a ridge of {ridge} is below 0.")
        classes, members = _checked_labels(features, labels, "real").unique(return_inverse=True)
        size, dim = features.shape
        require(
            size > len(classes),
            f"RMD needs more real images than classes, but there are {size} images of {len(classes)} classes.",
        )
        counts = members.bincount().to(torch.float64)
        sums = torch.zeros(len(classes), dim, dtype=torch.float64)
        for start in range(0, size, _ROWS):
            rows = slice(start, start + _ROWS)
            sums.index_add_(0, members[rows], features[rows].to(torch.float64))
        class_means, mean = sums / counts[:, None], sums.sum(dim=0) / size
        within = torch.zeros(dim, dim, dtype=torch.float64)
        for start in range(0, size, _ROWS):
            rows = slice(start, start + _ROWS)
            centred = features[rows].to(torch.float64) - class_means[members[rows]]
            within.addmm_(centred.T, centred, alpha=1 / size)
        offsets = (class_means - mean) * (counts / size).sqrt()[:, None]
        total = within + offsets.T @ offsets  # the law of total variance
        added = torch.eye(dim, dtype=torch.float64) * (ridge * total.trace() / dim)
        return cls(classes, class_means, _cholesky(within + added, ridge), mean, _cholesky(total + added, ridge))

    def relative_mahalanobis(self, features: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The relative Mahalanobis distance, d_class − d_background: the squared Mahalanobis distance to the image's
        own class minus that to all images (Ren et al., arXiv:2106.09022, Section 2, with the class given instead of
        the nearest). The higher, the harder the image; most are negative.

        Args:
            features [M, D]: float32; may be memory-mapped. labels [M]: int64.

        Returns:
            float64 [M].

        Raises:
            InputError: no labels, another number of them than of images, or a class without real images.
        """
        labels = _checked_labels(features, labels, "generated")
        unknown = sorted(set(labels.tolist()) - set(self.classes.tolist()))
        if unknown:
            raise InputError(
                f"RMD needs real images of every class that is asked for, but there is none of class {unknown[0]}."
            )
        members = torch.searchsorted(self.classes, labels)
        distances = []
        for start in range(0, len(features), _ROWS):
            rows = slice(start, start + _ROWS)
            points = features[rows].to(torch.float64)
            to_class = _squared_norms(self.class_factor, points - self.class_means[members[rows]])
            distances.append(to_class - _squared_norms(self.factor, points - self.mean))
        return torch.cat(distances)


def rmd(
    *,
    real: torch.Tensor,
    real_labels: torch.Tensor | None,
    generated: torch.Tensor,
    generated_labels: torch.Tensor | None,
    top: float = 0.01,
    ridge: float = 1e-6,
) -> dict[str, Estimate]:
    """The mean relative Mahalanobis distance of the generated images to the real ones, and that of the hardest. As a
    measure of sample difficulty: Cui et al., "Learning Sample Difficulty from Pre-trained Models for Reliable
    Prediction", NeurIPS 2023, arXiv:2304.10127.

    Args:
        real [N, D], generated [M, D]: float32, features. real_labels [N], generated_labels [M]: int64.
        top: the share of the generated images, in (0, 1], with the highest distances that counts as the hardest; at
            least one image. ridge: see [`ClassGaussians.fit`].

    Returns:
        `rmd_mean` and `rmd_top`, in squared Mahalanobis distances.

    Raises:
        InputError: as [`ClassGaussians`] does, or no generated image.
    """
    require(0 < top <= 1, f"RMD: the share of the hardest is {top}, but it must lie above 0 and not above 1.")
    require(len(generated) > 0, "RMD needs at least 1 generated image, but there are 0.")
    distances = ClassGaussians.fit(real, real_labels, ridge).relative_mahalanobis(generated, generated_labels)
    count = max(1, round(top * len(distances)))

    def mean_of_hardest(chosen: torch.Tensor) -> float:
        return distances[chosen].topk(count).values.mean().item()

    return {
        "rmd_mean": Estimate.mean(distances),
        "rmd_top": Estimate(mean_of_hardest(torch.arange(len(distances))), mean_of_hardest, len(distances)),
    }


def _checked_labels(features: torch.Tensor, labels: torch.Tensor | None, kind: str) -> torch.Tensor:
    require(labels is not None, f"RMD needs classes, but the {kind} images have no labels.")
    require(len(labels) == len(features), f"RMD: there are {len(features)} {kind} images, but {len(labels)} labels.")
    return labels.to(torch.int64)


def _cholesky(covariance: torch.Tensor, ridge: float) -> torch.Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    require(
        not failed,
        f"RMD: the covariance of the {len(covariance)} features has no inverse with a ridge of {ridge}; take a larger "
        "ridge (1e-6 is the default) or more real images.",
    )
    return factor


def _squared_norms(factor: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    """xᵀ Σ⁻¹ x for the rows x of centred [M, D] and Σ = factor factorᵀ: float64 [M]."""
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).square().sum(dim=0)
