"""Topological precision and recall (TopP&R): how much of each set lies in the other's statistically significant
support.

Letters: N real images, M generated images, P points of either set, Q places where a density is asked for, D features,
R bootstrap replicates.
"""

import math
from dataclasses import dataclass, field

import torch

from noisycond import randomness
from noisycond.errors import require
from noisycond.evaluation.estimates import Estimate
from noisycond.randomness import Purpose


# Elements of a block of distances in float64: 64 MB.
_BLOCK = 1 << 23
PROJECTED_DIM = 32  # as the authors' package


@dataclass(frozen=True)
class TopologicalPrecisionRecall:
    """TopP&R of two sets.

    Attributes:
        fidelity (TopP): the share of the significant generated images that lie in the real support, in [0, 1].
        diversity (TopR): the share of the significant real images that lie in the generated support, in [0, 1].
        f1: their harmonic mean, 0 where one of them is 0.
        real_bandwidth, generated_bandwidth: of the kernels, in the units of the projected features.
        real_in_real [N], real_in_generated [N], generated_in_generated [M], generated_in_real [M]: bool, which
            images lie in which support.
    """

    real_bandwidth: float
    generated_bandwidth: float
    real_in_real: torch.Tensor = field(repr=False)
    real_in_generated: torch.Tensor = field(repr=False)
    generated_in_generated: torch.Tensor = field(repr=False)
    generated_in_real: torch.Tensor = field(repr=False)

    @property
    def fidelity(self) -> float:
        return _share(self.generated_in_real, self.generated_in_generated)

    @property
    def diversity(self) -> float:
        return _share(self.real_in_generated, self.real_in_real)

    @property
    def f1(self) -> float:
        both = self.fidelity + self.diversity
        return 2 * self.fidelity * self.diversity / both if both else 0.0

    def estimates(self) -> dict[str, Estimate]:
        """`topp_fidelity`, `topp_diversity` and `topp_f1`.

        Fidelity is resampled over generated and diversity over real images while both supports stay as they are: the
        kernel density of a resampled set, full of copies, is that of no sample. Their intervals leave out how much
        the supports themselves would vary.
        """
        return {
            "topp_fidelity": _share_estimate(self.generated_in_real, self.generated_in_generated, "generated"),
            "topp_diversity": _share_estimate(self.real_in_generated, self.real_in_real, "real"),
            "topp_f1": Estimate(self.f1),
        }


def topological_precision_recall(
    *,
    real: torch.Tensor,
    generated: torch.Tensor,
    significance: float = 0.1,
    replicates: int = 10,
    projected_dim: int | None = PROJECTED_DIM,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> TopologicalPrecisionRecall:
    """TopP&R (Kim et al., "TopP&R: Robust Support Estimation Approach for Evaluating Fidelity and Diversity in
    Generative Models", NeurIPS 2023, arXiv:2306.08013).

    Each set's support is where its kernel density estimate stands out of a bootstrap confidence band. From the paper:
    random projection to 32 dimensions, a compact kernel, the band as the (1 − α) quantile over replicates of
    sup |p̂ − p̃|, and the two ratios with strict inequalities. From the authors' package top-pr 0.2.1: the cosine
    kernel cos(π d / 2h), the supremum taken over the set's own points, 10 replicates, and one bandwidth h per set by
    [`balloon_bandwidth`] with k = 5 times the dimension.

    Where it differs from the package: the projection is Gaussian and follows `seed`; the kernel's factor (π / 4h)^D,
    which cancels in every comparison and overflows for small h, is left out; features of 1 to 3 dimensions take the
    same road as all others (the package fails on them). Both sets use the same bootstrap draws, so that a set against
    itself has fidelity and diversity 1.

    Args:
        real [N, D], generated [M, D]: float32, features.
        significance: α, in (0, 1).
        replicates: R, bootstrap replicates per set.
        projected_dim: dimensions of the random projection, which is left out where D is not greater; None: never.
        seed: of the projection and the bootstrap.
        device: where distances are computed.

    Raises:
        InputError: fewer than k + 1 images in a set; a bandwidth of zero; a set without one significant image.
    """
    require(0 < significance < 1, f"TopP&R: a significance of {significance} is not between 0 and 1.")
    require(replicates >= 1, f"TopP&R needs at least 1 bootstrap replicate, not {replicates}.")
    if projected_dim is not None and real.shape[1] > projected_dim:
        projection = _random_projection(real.shape[1], projected_dim, seed)
        real, generated = (points.to(torch.float32) @ projection for points in (real, generated))
    neighbour = 5 * real.shape[1]
    # One centre for both: distances stay as they are and lose fewer digits as differences of products.
    centre = real.to(torch.float64).mean(dim=0)
    sets = {
        "real": (real.to(torch.float64) - centre).to(device),
        "generated": (generated.to(torch.float64) - centre).to(device),
    }
    bandwidths, densities, bands = {}, {}, {}
    for name, points in sets.items():
        require(
            len(points) > neighbour,
            f"TopP&R in {real.shape[1]} dimensions needs at least {neighbour + 1} {name} images (5 times the "
            f"dimensions and one), but there are {len(points)}.",
        )
        bandwidths[name] = balloon_bandwidth(points, neighbour)
        require(
            bandwidths[name] > 0,
            f"TopP&R has no bandwidth: half of the {name} images have {neighbour} exact copies or more.",
        )
        counts = _bootstrap_counts(len(points), replicates, seed).to(points.device)
        densities[name], bands[name] = density_and_band(points, bandwidths[name], counts, significance)
        require(
            (densities[name] > bands[name]).any(),
            f"TopP&R has no support to compare with: none of the {len(points)} {name} images stands out of the "
            f"confidence band; take more images or a significance above {significance}.",
        )
    real_elsewhere = kernel_density(sets["generated"], sets["real"], bandwidths["generated"])
    generated_elsewhere = kernel_density(sets["real"], sets["generated"], bandwidths["real"])
    return TopologicalPrecisionRecall(
        real_bandwidth=bandwidths["real"],
        generated_bandwidth=bandwidths["generated"],
        real_in_real=(densities["real"] > bands["real"]).cpu(),
        real_in_generated=(real_elsewhere > bands["generated"]).cpu(),
        generated_in_generated=(densities["generated"] > bands["generated"]).cpu(),
        generated_in_real=(generated_elsewhere > bands["real"]).cpu(),
    )


def balloon_bandwidth(points: torch.Tensor, neighbour: int) -> float:
    """The bandwidth by the balloon estimator as top-pr 0.2.1 has it: the (lower) median of the distances from a point
    to the k-th nearest among the points *after* it, over the points that have k after them.

    Candidates among later points only are the package's choice; among all points the distances would be smaller. It
    makes the bandwidth depend on the order of the points.

    Args:
        points [P, D]: float64, P > k. neighbour: k.
    """
    size, distances = len(points), []
    places = torch.arange(size, device=points.device)
    for start, stop in _blocks(size - neighbour, size):
        block = _squared_distances(points[start:stop], points[start:])
        block.masked_fill_(places[start:] <= places[start:stop, None], torch.inf)
        distances.append(block.kthvalue(neighbour, dim=1).values)
    ascending = torch.cat(distances).sqrt_().sort().values
    return ascending[max(len(ascending) // 2 - 1, 0)].item()


def kernel_density(points: torch.Tensor, places: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """The mean over points of the compact cosine kernel, cos(π d / 2h) up to the distance d = h and 0 beyond: the
    kernel density estimate up to the factor (π / 4h)^D.

    Args:
        points [P, D], places [Q, D]: float64. bandwidth: h.

    Returns:
        float64 [Q], in [0, 1].
    """
    uniform = torch.full((len(points), 1), 1 / len(points), dtype=torch.float64, device=points.device)
    return _weighted_kernel_sums(points, places, bandwidth, uniform)[:, 0]


def density_and_band(
    points: torch.Tensor, bandwidth: float, counts: torch.Tensor, significance: float
) -> tuple[torch.Tensor, float]:
    """The density of a set at its own points, float64 [P], and the half-width of its confidence band: the (1 − α)
    quantile over replicates of the greatest difference between the density and that of the resampled set.

    Args:
        points [P, D]: float64. bandwidth: h. significance: α.
        counts [P, R]: float64, how often each replicate draws each point.
    """
    weights = torch.cat([torch.ones_like(counts[:, :1]), counts], dim=1) / len(points)
    densities = _weighted_kernel_sums(points, points, bandwidth, weights)
    suprema = (densities[:, 1:] - densities[:, :1]).abs().amax(dim=0)
    return densities[:, 0], suprema.quantile(1 - significance).item()


def _weighted_kernel_sums(points, places, bandwidth, weights) -> torch.Tensor:
    """Σ_p kernel(place, p) weight(p) for each column of weights [P, W], in one pass over blocks: float64 [Q, W]."""
    sums = []
    for start, stop in _blocks(len(places), len(points)):
        scaled = _squared_distances(places[start:stop], points).sqrt_().div_(bandwidth)
        outside = scaled > 1
        kernel = scaled.mul_(torch.pi / 2).cos_().masked_fill_(outside, 0.0)
        sums.append(kernel @ weights)
    return torch.cat(sums)


def _squared_distances(places: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances, float64 [Q, P]."""
    norms = points.square().sum(dim=1) + places.square().sum(dim=1)[:, None]
    return norms.addmm_(places, points.T, alpha=-2).clamp_(min=0.0)


def _blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows whose blocks of a matrix stay small."""
    step = max(1, _BLOCK // columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _random_projection(dim: int, projected_dim: int, seed: int) -> torch.Tensor:
    """A Gaussian random projection that keeps squared lengths in expectation: float32 [dim, projected_dim]."""
    rows = torch.arange(dim)
    return randomness.normal(seed, Purpose.SUPPORT_PROJECTION, rows, (projected_dim,)) / projected_dim**0.5


def _bootstrap_counts(size: int, replicates: int, seed: int) -> torch.Tensor:
    """How often each of `size` points is drawn in each replicate: float64 [size, R]."""
    keys = torch.arange(size)
    draws = [randomness.randint(seed, Purpose.SUPPORT_BOOTSTRAP, keys, size, epoch=r) for r in range(replicates)]
    return torch.stack([draw.bincount(minlength=size) for draw in draws], dim=1).to(torch.float64)


def _share(inside: torch.Tensor, significant: torch.Tensor) -> float:
    """The share of the significant that are inside as well, NaN where none is significant."""
    count = significant.sum().item()
    return (inside & significant).sum().item() / count if count else math.nan


def _share_estimate(inside: torch.Tensor, significant: torch.Tensor, of: str) -> Estimate:
    return Estimate(
        _share(inside, significant),
        lambda chosen: _share(inside[chosen], significant[chosen]),
        len(significant),
        of,
    )
