"""Mean and covariance of features, gathered batch by batch, and the Fréchet distance between two such pairs: FID on
pooled features, sFID on spatial ones.

Letters: N images (M real ones), B images of one batch, D features, R the rank of a covariance.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import blas, lapack

from noisycond.errors import require
from noisycond.evaluation.estimates import Estimate


logger = logging.getLogger(__name__)


@dataclass
class Moments:
    """The first two moments of features; [`update`] and [`merge`] extend them.

    Attributes:
        count: N; None where it is not known (statistics made elsewhere), and then nothing can be added.
        mean [D]: float64, on CPU.
        covariance [D, D]: float64, on CPU, divided by N − 1 as in torch-fidelity and the ADM evaluator; zero for
            N < 2.
    """

    count: int | None
    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """The moments of no images, of `dim` features each."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: torch.Tensor, chunk: int = 4096, copies: torch.Tensor | None = None) -> "Moments":
        """The moments of a set, read `chunk` rows at a time; another chunk changes the result by rounding only.

        Args:
            features [N, D]: any floating type; may be memory-mapped.
            copies [N]: int64, how often each row counts, 0 for not at all; None counts each once.
        """
        moments = cls.empty(features.shape[1])
        for start in range(0, len(features), chunk):
            rows = slice(start, start + chunk)
            moments.update(features[rows], None if copies is None else copies[rows])
        return moments

    def update(self, batch: torch.Tensor, copies: torch.Tensor | None = None) -> "Moments":
        """Adds images, and returns itself. Every call passes over the D × D covariance: large batches are cheaper.

        Args:
            batch [B, D]: any floating type; B may be 0.
            copies [B]: int64, how often each row counts, 0 for not at all; None counts each once.
        """
        if copies is not None:
            present = copies.nonzero()[:, 0]
            batch, copies = batch[present], copies[present, None].to(torch.float64)
        if len(batch) == 0:
            return self
        rows = batch.detach().to("cpu", torch.float64)
        if copies is None:
            added, mean = len(rows), rows.mean(dim=0)
            rows = rows - mean
        else:
            added = int(copies.sum())
            mean = (rows * copies).sum(dim=0) / added
            rows = (rows - mean) * copies.sqrt()
        shift, divisor = self._make_room(added, mean)
        self.covariance = _plus_gram(self.covariance, torch.cat([rows, shift[None]]), 1 / divisor)
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Adds the images of other moments over as many features, and returns itself."""
        if other.count == 0:
            return self
        scatter = other.covariance * (other.count - 1)
        shift, divisor = self._make_room(other.count, other.mean)
        self.covariance = self.covariance + (scatter + shift.outer(shift)) / divisor
        return self

    def _make_room(self, added: int, mean: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing
        sample variances", 1979) but for the scatter of what is added: count and mean are the new ones, the covariance
        is the old images' share of the new one.

        Returns:
            The row whose square the distance of the means adds to the scatter, and what the scatter is divided by.
        """
        total, difference = self.count + added, mean - self.mean
        divisor, share = max(total - 1, 1), self.count * added / total
        self.covariance = self.covariance * (max(self.count - 1, 0) / divisor)
        self.mean = self.mean + difference * (added / total)
        self.count = total
        return difference * share**0.5, divisor


def frechet_distance(*, real: Moments, generated: Moments) -> float:
    """The squared Fréchet distance of two Gaussians with these moments (Eq. 6 of arXiv:1706.08500), at least 0:

    |μ_r − μ_g|² + tr Σ_r + tr Σ_g − 2 tr (Σ_r Σ_g)^½.

    With Σ = F Fᵀ the last trace is the sum of the singular values of F_rᵀ F_g, real whatever the rank; no square root
    of a matrix is taken. Where a set has no more images than features, a warning says what that means.

    Args:
        real, generated: over the same D features.

    Raises:
        InputError: a set of fewer than 2 images, sets of features of different sizes, or features that are not finite.
    """
    _check(real, generated)
    return _distance(real, _factor(real.covariance), generated)


def fid(*, real: Moments | torch.Tensor, generated: torch.Tensor) -> Estimate:
    """The Fréchet distance of two sets of features: FID (arXiv:1706.08500) for pooled ones, sFID (arXiv:2103.03841)
    for spatial ones.

    Args:
        real [M, D]: float32 features, or their moments.
        generated [N, D]: float32 features.

    Returns:
        The distance over all images; resampled over the generated ones.

    Raises:
        InputError: as in [`frechet_distance`].
    """
    real = real if isinstance(real, Moments) else Moments.of(real)
    moments = Moments.of(generated)
    _check(real, moments)
    real_factor = _factor(real.covariance)

    def resample(chosen: torch.Tensor) -> float:
        copies = chosen.bincount(minlength=len(generated))
        return _distance(real, real_factor, Moments.of(generated, copies=copies))

    return Estimate(_distance(real, real_factor, moments), resample, len(generated))


def _check(real: Moments, generated: Moments) -> None:
    dims = len(real.mean), len(generated.mean)
    require(
        dims[0] == dims[1],
        f"A Fréchet distance needs features of one extractor, but the real images have {dims[0]} features and the "
        f"generated ones {dims[1]}.",
    )
    for name, moments in (("real", real), ("generated", generated)):
        require(
            moments.mean.isfinite().all() and moments.covariance.isfinite().all(),
            f"A Fréchet distance needs finite features, but those of the {name} images have numbers that are not, or "
            "that overflow.",
        )
    counts = {"real": real.count, "generated": generated.count}
    for name, count in counts.items():
        require(
            count is None or count >= 2,
            f"A Fréchet distance needs at least 2 {name} images, but {count} {'was' if count == 1 else 'were'} given.",
        )
    few = [f"{count} {name}" for name, count in counts.items() if count is not None and count <= dims[0]]
    if few:
        logger.warning(
            "%s images are too few for %d features: their covariance has a rank below %d, so that the Fréchet "
            "distance is biased upwards and may be compared only at equal numbers of images.",
            " and ".join(few),
            dims[0],
            dims[0],
        )


def _distance(real: Moments, real_factor: torch.Tensor, generated: Moments) -> float:
    apart = (real.mean - generated.mean).square().sum()
    spread = real.covariance.trace() + generated.covariance.trace()
    common = _sum_of_singular_values(real_factor.T @ _factor(generated.covariance))
    return max(0.0, (apart + spread - 2 * common).item())


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """F [D, R] with F Fᵀ = covariance, by a Cholesky decomposition with complete pivoting: unlike a plain one it needs
    no full rank, and it stops where only rounding is left."""
    lower, order, rank, _ = lapack.dpstrf(covariance.numpy().T, lower=1)
    factor = np.empty((len(lower), rank))
    factor[order - 1] = np.tril(lower[:, :rank])
    return torch.from_numpy(factor)


def _sum_of_singular_values(product: torch.Tensor) -> torch.Tensor:
    # The eigenvalues of the smaller Gram matrix cost a quarter of the singular values, and that matrix is regular
    # where the larger one has zeros, whose rounding the square root would magnify.
    gram = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()


def _plus_gram(covariance: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """covariance + scale · rowsᵀ rows, computed for one triangle: half the cost of the whole product."""
    result = blas.dsyrk(scale, rows.numpy().T, beta=1.0, c=covariance.numpy().T, lower=1)
    lower = torch.from_numpy(result)
    return lower.tril() + lower.tril(-1).T
