"""Nearest neighbours: exact where float32 is not, whatever the tiles, and what the four metrics say of known sets."""

import numpy as np
import pytest
import torch

from noisycond.errors import InputError
from noisycond.evaluation import distances
from noisycond.evaluation.neighbours import kth_neighbour_distances, nearest, precision_recall_density_coverage


def normal(size: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))


def brute_force(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """All distances in float64, from differences."""
    return (one.double()[:, None] - other.double()[None]).square().sum(-1).sqrt()


def others(points: torch.Tensor) -> torch.Tensor:
    return brute_force(points, points).fill_diagonal_(torch.inf)


def clusters(size: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Two narrow clusters so far apart that float32 products cannot tell distances within one."""
    points = normal(size, dim, seed) * 0.05
    points[::2] += 500
    return points


@pytest.fixture(params=[24, 2048])
def tile(request, monkeypatch):
    monkeypatch.setattr(distances, "TILE", request.param)


POINTS = {
    "normal": lambda: normal(130, 20),
    "far from the origin": lambda: normal(130, 20) + 1000,
    "far from the origin, float64": lambda: normal(130, 20).double() + 1e6,
    "two clusters": lambda: clusters(130, 20),
    "whole numbers with ties": lambda: (normal(130, 6) * 1.5).round(),
    "each point three times": lambda: normal(44, 20).repeat(3, 1),
    "all alike": lambda: torch.full((130, 20), 0.1),
    "nearer and nearer": lambda: normal(130, 20) * torch.logspace(3, -3, 130)[:, None],
}


@pytest.mark.parametrize("kind", POINTS)
def test_kth_neighbours_are_those_of_float64(tile, kind):
    points = POINTS[kind]()
    expected = others(points).sort(dim=1).values[:, [0, 2, 4]]
    found = kth_neighbour_distances(points, (1, 3, 5))
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() <= 1e-12 * expected.max()


@pytest.mark.parametrize("kind", POINTS)
def test_nearest_are_those_of_float64(tile, kind):
    points = POINTS[kind]()
    queries = torch.cat([points[::3], points[:50] + points[:50].std() * 0.1])
    matrix = brute_force(queries, points)
    found, indices = nearest(queries=queries, points=points, k=4)
    assert (found - matrix.sort(dim=1).values[:, :4]).abs().max() <= 1e-12 * matrix.max()
    assert (matrix.gather(1, indices) - found).abs().max() <= 1e-12 * matrix.max()
    assert all(len(set(row)) == 4 for row in indices.tolist())
    assert (found[: len(points[::3]), 0] == 0).all()


@pytest.mark.parametrize("kind", POINTS)
def test_metrics_are_those_of_float64(tile, kind):
    real, points = POINTS[kind](), POINTS[kind]()
    spread = (points - points.mean(0)) * 0.9
    generated = torch.cat([spread[:60].flip(0) + points.mean(0), points[60:90]])
    found = precision_recall_density_coverage(real=real, generated=generated)
    # Squares from differences, summed in the same way, so that ties are ties here too.
    squares = [distances_between(*pair) for pair in ((real, real), (generated, generated), (real, generated))]
    radii, generated_radii = (np.sort(square, axis=1) for square in squares[:2])
    assert torch.equal(found.inside_real, torch.from_numpy((squares[2] <= radii[:, 3:4]).any(0)))
    assert torch.equal(found.inside_generated, torch.from_numpy((squares[2] <= generated_radii[:, 3]).any(1)))
    assert torch.equal(found.hits, torch.from_numpy((squares[2] <= radii[:, 5:6]).sum(0)))
    assert torch.equal(found.covered, torch.from_numpy((squares[2] <= radii[:, 5:6]).any(1)))


def distances_between(one: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    difference = one.double().numpy()[:, None] - other.double().numpy()[None]
    flat = difference.reshape(-1, difference.shape[-1])
    return np.einsum("pd,pd->p", flat, flat).reshape(difference.shape[:2])


@pytest.mark.parametrize(("make", "per_point"), [(normal, 4), (clusters, 30)])
def test_what_products_leave_open_is_few(make, per_point, monkeypatch):
    """Speed rests on it: of 90,000 distances per matrix nearly all are decided by their bounds."""
    computed, exact = [], distances._squared_distances

    def counting(one, other, rows, columns):
        computed.append(len(rows))
        return exact(one, other, rows, columns)

    monkeypatch.setattr(distances, "_squared_distances", counting)
    precision_recall_density_coverage(real=make(300, 200), generated=make(300, 200, seed=1))
    assert sum(computed) < 300 * per_point


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_hold_and_are_narrow(dtype):
    one, other = normal(200, 500) + 3000, (normal(300, 500, seed=1) * 2 + 3000).to(dtype)
    centre = distances._centre(one, other)
    clouds = [distances._Cloud(points, centre, None, torch.float32) for points in (one, other)]
    low = distances._Tiles(*clouds).low(slice(0, 200), slice(0, 300), clouds[0].block(slice(0, 200))).double()
    high = distances._high(*clouds, low, torch.arange(200)[:, None], torch.arange(300)[None])
    exact = brute_force(one, other).square()
    assert (low < exact).all()
    assert (exact < high).all()
    assert ((high - low) / exact).max() < 1e-4


@pytest.mark.parametrize("dim", [3, 2048, 100_000])
def test_squared_distances_have_the_same_bits_in_any_company(dim):
    points = normal(9, dim)
    rows, columns = torch.triu_indices(9, 9)
    together = distances._squared_distances(points, points, rows, columns)
    assert torch.equal(together, distances._squared_distances(points, points, columns, rows))
    for place in range(len(rows)):
        alone = distances._squared_distances(points, points, rows[place, None], columns[place, None])
        assert torch.equal(alone, together[place, None])


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_set_against_itself(tile, offset):
    real = normal(150, 30) + offset
    for generated in (real.clone(), real.flip(0)):
        found = precision_recall_density_coverage(real=real, generated=generated)
        assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
        assert found.density == pytest.approx(6 / 5)  # its copy and its five neighbours: 6 N hits


def test_a_collapsed_set_is_precise_and_recalls_little():
    real = normal(400, 4)
    collapsed = real[:1] + 0.01 * normal(300, 4, seed=1)
    found = precision_recall_density_coverage(real=real, generated=collapsed)
    assert found.precision == 1
    assert found.recall < 0.01
    assert found.coverage < 0.05
    swapped = precision_recall_density_coverage(real=collapsed, generated=real)
    assert swapped.precision < 0.01
    assert swapped.recall == 1


def test_a_hand_computed_case():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # radii for k = 1: 1, 1, 2, 4
    generated = torch.tensor([[2.0], [11.0], [20.0]])  # radii for k = 1: 9, 9, 9
    found = precision_recall_density_coverage(real=real, generated=generated, precision_k=1, coverage_k=1)
    assert found.inside_real.tolist() == [True, True, False]  # 11 lies on the border of 7's neighbourhood
    assert found.hits.tolist() == [2, 1, 0]
    assert found.inside_generated.tolist() == [True, True, True, True]
    assert found.covered.tolist() == [False, True, True, True]
    assert (found.precision, found.recall, found.density, found.coverage) == (2 / 3, 1, 1, 3 / 4)


def test_estimates_resample_what_they_count():
    found = precision_recall_density_coverage(real=normal(50, 3), generated=normal(40, 3, seed=1) * 1.5)
    estimates = found.estimates()
    assert list(estimates) == ["precision", "recall", "density", "coverage"]
    assert {name: (e.of, e.size) for name, e in estimates.items()} == {
        "precision": ("generated", 40),
        "recall": ("real", 50),
        "density": ("generated", 40),
        "coverage": ("real", 50),
    }
    for name, estimate in estimates.items():
        assert estimate.resample(torch.arange(estimate.size)) == estimate.value == getattr(found, name)
    chosen = found.hits.argmax()
    assert estimates["density"].resample(chosen[None]) == found.hits[chosen].item() / 5


def test_settings_of_matrix_products_do_not_matter(monkeypatch):
    seen, product = [], torch.addmm

    def watched(*args, **options):
        seen.append(torch.get_float32_matmul_precision())
        return product(*args, **options)

    monkeypatch.setattr(torch, "addmm", watched)
    before, points = torch.get_float32_matmul_precision(), normal(200, 64) + 10
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = kth_neighbour_distances(points, (3,))
            nearest(queries=points, points=points)
            precision_recall_density_coverage(real=points, generated=points)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}
    assert (found[:, 0] - others(points).sort(dim=1).values[:, 2]).abs().max() < 1e-10


def test_memory_mapped_features(tmp_path):
    points = normal(100, 8)
    np.save(tmp_path / "points.npy", points.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "points.npy", mmap_mode="c"))
    assert torch.equal(kth_neighbour_distances(mapped, (3,)), kth_neighbour_distances(points, (3,)))


@pytest.mark.parametrize(
    ("real", "generated", "ks", "sentence"),
    [
        ((3, 2), (9, 2), (5, 1), "precision with k = 5 needs at least 6 real images, but there are 3."),
        ((9, 2), (3, 2), (3, 5), "recall with k = 3 needs at least 4 generated images, but there are 3."),
        ((5, 2), (9, 2), (3, 5), "density and coverage with k = 5 need at least 6 real images, but there are 5."),
        ((9, 2), (0, 2), (3, 5), "recall with k = 3 needs at least 4 generated images, but there are 0."),
        ((9, 2), (9, 2), (0, 5), "precision with k = 0 needs a k of at least 1."),
        ((9, 2), (9, 4), (3, 5), "real images have 2 features each, but generated ones 4; both need the same extract"),
        ((9, 2, 2), (9, 4), (3, 5), "real should be one row of features per image, not of shape [9, 2, 2]."),
    ],
)
def test_bad_input(real, generated, ks, sentence):
    with pytest.raises(InputError) as caught:
        precision_recall_density_coverage(
            real=torch.zeros(real), generated=torch.zeros(generated), precision_k=ks[0], coverage_k=ks[1]
        )
    assert sentence in str(caught.value)


def test_bad_input_of_nearest():
    points = torch.zeros(2, 3)
    with pytest.raises(InputError, match="the 3 nearest points need at least 3 points, but there are 2."):
        nearest(queries=points, points=points, k=3)
    with pytest.raises(InputError, match="k = 0 nearest points"):
        nearest(queries=points, points=points, k=0)
    with pytest.raises(InputError, match="queries have 3 features each, but points 4"):
        nearest(queries=points, points=torch.zeros(2, 4))
    with pytest.raises(InputError, match="the distance to neighbour 2 needs at least 3 points, but there are 2."):
        kth_neighbour_distances(points, (1, 2))


def test_as_few_points_as_can_be():
    points = torch.tensor([[0.0], [1.0], [3.0]])
    assert kth_neighbour_distances(points, (1, 2)).tolist() == [[1, 3], [1, 2], [2, 3]]
    found, indices = nearest(queries=torch.tensor([[0.9]]), points=points[:1], k=1)
    assert indices.tolist() == [[0]]
    assert (found - torch.tensor(0.9)).abs().max() < 1e-7
    assert nearest(queries=points[:0], points=points)[0].shape == (0, 2)
