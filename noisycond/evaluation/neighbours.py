"""Nearest neighbours among features: precision and recall, density and coverage, and who is nearest to whom.

Exact to float64 and chunked: see [`noisycond.evaluation.distances`]. Ties count as inside.

Letters: N real images or points, M generated images or queries, D features, K neighbours asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from noisycond.errors import require
from noisycond.evaluation.distances import exact_products, kth_squared, nearest_squared, pairs_within
from noisycond.evaluation.estimates import Estimate


@dataclass(frozen=True)
class Neighbourhoods:
    """Who lies in whose neighbourhood: the ball around an image that reaches to its k-th nearest other image of the
    same set, border included.

    Attributes:
        inside_real [M]: bool, the generated image lies in the neighbourhood of a real one (k = `precision_k`).
        inside_generated [N]: bool, the real image lies in the neighbourhood of a generated one (k = `precision_k`).
        hits [M]: int64, in how many real neighbourhoods (k = `coverage_k`) the generated image lies.
        covered [N]: bool, the neighbourhood of the real image (k = `coverage_k`) holds a generated one.
    """

    inside_real: torch.Tensor
    inside_generated: torch.Tensor
    hits: torch.Tensor
    covered: torch.Tensor
    precision_k: int
    coverage_k: int

    @property
    def precision(self) -> float:
        """The share of generated images that lie in a real neighbourhood, in [0, 1]."""
        return self.estimates()["precision"].value

    @property
    def recall(self) -> float:
        """The share of real images that lie in a generated neighbourhood, in [0, 1]."""
        return self.estimates()["recall"].value

    @property
    def density(self) -> float:
        """The mean of `hits` / `coverage_k`: at least 0, and above 1 where generated images crowd."""
        return self.estimates()["density"].value

    @property
    def coverage(self) -> float:
        """The share of real neighbourhoods that hold a generated image, in [0, 1]."""
        return self.estimates()["coverage"].value

    def estimates(self) -> dict[str, Estimate]:
        """The four by name; a resampled set keeps the neighbourhoods of the full one."""
        return {
            "precision": Estimate.mean(self.inside_real),
            "recall": Estimate.mean(self.inside_generated, of="real"),
            "density": Estimate.mean(self.hits.to(torch.float64) / self.coverage_k),
            "coverage": Estimate.mean(self.covered, of="real"),
        }


def precision_recall_density_coverage(
    *,
    real: torch.Tensor,
    generated: torch.Tensor,
    precision_k: int = 3,
    coverage_k: int = 5,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Neighbourhoods:
    """Improved precision and recall (Eqs. 1 and 2 of arXiv:1904.06991) and density and coverage (Eqs. 4 and 5 of
    arXiv:2002.09797), from one pass over each of the three distance matrices.

    Args:
        real [N, D], generated [M, D]: float32 or float64, finite; may be memory-mapped.
        precision_k: the neighbour that sets the radius for precision and recall; 3 in arXiv:1904.06991 and in the ADM
            evaluator. coverage_k: the same for density and coverage; 5 in arXiv:2002.09797.
        device: where the matrix products run; the CPU by default. progress: shows a bar per matrix.

    Raises:
        InputError: fewer than k + 1 images of a set, k below 1, or sets with different D.
    """
    real, generated = _as_points(real, "real"), _as_points(generated, "generated")
    require(
        real.shape[1] == generated.shape[1],
        f"real images have {real.shape[1]} features each, but generated ones {generated.shape[1]}; both need the same "
        "extractor.",
    )
    _require_neighbours(f"precision with k = {precision_k} needs", precision_k, "real images", len(real))
    _require_neighbours(f"recall with k = {precision_k} needs", precision_k, "generated images", len(generated))
    _require_neighbours(f"density and coverage with k = {coverage_k} need", coverage_k, "real images", len(real))
    with exact_products():
        radii = kth_squared(real, (precision_k, coverage_k), device, progress, "real neighbours")
        generated_radii = kth_squared(generated, (precision_k,), device, progress, "generated neighbours")
        hits = torch.zeros(len(generated), dtype=torch.int64)
        inside_real = torch.zeros(len(generated), dtype=torch.bool)
        inside_generated, covered = torch.zeros(2, len(real), dtype=torch.bool)
        for i, j, squared in pairs_within(
            real, generated, radii, generated_radii, device, progress, "generated among real"
        ):
            inside_real[j[squared <= radii[i, 0]]] = True
            inside_generated[i[squared <= generated_radii[j, 0]]] = True
            near = squared <= radii[i, 1]
            hits += j[near].bincount(minlength=len(hits))
            covered[i[near]] = True
    return Neighbourhoods(inside_real, inside_generated, hits, covered, precision_k, coverage_k)


def kth_neighbour_distances(
    points: torch.Tensor, ks: Sequence[int], device: str | torch.device | None = None, progress: bool = False
) -> torch.Tensor:
    """The distance of each point to its k-th nearest other point, for several k in one pass.

    Args:
        points [N, D]: float32 or float64, finite. ks: K numbers from 1 to N - 1.
        device, progress: as in [`precision_recall_density_coverage`].

    Returns:
        float64 [N, K], Euclidean.

    Raises:
        InputError: a k below 1 or above N - 1.
    """
    points = _as_points(points, "points")
    for k in ks:
        _require_neighbours(f"the distance to neighbour {k} needs", k, "points", len(points))
    with exact_products():
        return kth_squared(points, ks, device, progress, "neighbours").sqrt()


def nearest(
    *,
    queries: torch.Tensor,
    points: torch.Tensor,
    k: int = 2,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K points nearest to each query; a copy of the query is at distance 0.

    Args:
        queries [M, D], points [N, D]: float32 or float64, finite; may be memory-mapped.
        k: K. device, progress: as in [`precision_recall_density_coverage`].

    Returns:
        distances float64 [M, K], Euclidean, in ascending order, and the points' positions int64 [M, K] in [0, N).

    Raises:
        InputError: k below 1, fewer than K points, or different D.
    """
    queries, points = _as_points(queries, "queries"), _as_points(points, "points")
    require(
        queries.shape[1] == points.shape[1],
        f"queries have {queries.shape[1]} features each, but points {points.shape[1]}; both need the same.",
    )
    require(k >= 1, f"k = {k} nearest points were asked for; ask for 1 or more.")
    require(len(points) >= k, f"the {k} nearest points need at least {k} points, but there are {len(points)}.")
    with exact_products():
        squared, indices = nearest_squared(queries, points, k, device, progress, "nearest")
    return squared.sqrt(), indices


def _as_points(points: torch.Tensor, name: str) -> torch.Tensor:
    require(points.ndim == 2, f"{name} should be one row of features per image, not of shape {list(points.shape)}.")
    points = points.detach().cpu()
    return points if points.dtype in (torch.float32, torch.float64) else points.float()


def _require_neighbours(what: str, k: int, of: str, count: int) -> None:
    require(k >= 1, f"{what} a k of at least 1.")
    require(count > k, f"{what} at least {k + 1} {of}, but there are {count}.")
