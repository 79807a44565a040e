"""Euclidean distances between many points, a tile of the matrix at a time: exact, fast and in little memory.

Matrix products in float32 give a lower and an upper bound of every squared distance. What the bounds leave open (a few
pairs of points) is computed anew in float64 from the difference of the two points. So the results are those of
float64, a point is at distance 0 from its copy, and ties are ties.

Letters: N and M points of two sets, D features, K neighbours asked for, C candidates for them, P pairs of points, R
and S rows and columns of a tile. Points are float32 or float64 [N, D] on CPU, finite, perhaps memory-mapped.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm


TILE = 2048  # rows and columns of a tile
SPARE = 3  # candidates beyond the K smallest lower bounds
DENSE = 16  # a tile of which more than one in so many distances count is treated as a whole
OPEN = 64  # a tile of which more than one in so many distances are left open is computed anew in float64


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32 or bfloat16, whatever is set outside: the bounds of distances are those of float32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _Cloud:
    """Points [N, D] as matrix products take them, a block of rows at a time: around a common centre (which leaves the
    distances and makes the norms small) and in one precision.

    Attributes:
        squares [N]: float64 on CPU, squared norms around the centre. low [N]: the same less the slack, on the device.
        slack: a squared distance from a product is off by at most the slack times the sum of the two squared norms.
    """

    def __init__(self, points: torch.Tensor, centre: torch.Tensor, device, dtype: torch.dtype):
        self.points, self.centre, self.dtype = points, centre, dtype
        self.device = torch.device(device or "cpu")
        dim = points.shape[1]
        # A sum of D products is off by D units at worst and by about sqrt(D) in practice: eight times that is beyond
        # all chance (Higham & Mary, SIAM J. Sci. Comput. 41, 2019). Centring, norms and sums add less than 32 units.
        self.slack = (min(dim, 8 * math.sqrt(dim)) + 32) * torch.finfo(dtype).eps / 2
        squares = [self.block(span).square_().sum(dim=1).to("cpu", torch.float64) for span in self.spans()]
        self.squares = torch.cat(squares) if squares else torch.zeros(0, dtype=torch.float64)
        self.low = (self.squares * (1 - self.slack)).to(self.device, dtype)

    def __len__(self) -> int:
        return len(self.points)

    def spans(self) -> list[slice]:
        return [slice(start, min(start + TILE, len(self))) for start in range(0, len(self), TILE)]

    def block(self, span: slice) -> torch.Tensor:
        """Rows of the centred points, [R, D] on the device."""
        dtype = torch.promote_types(self.points.dtype, self.dtype)
        return (self.points[span].to(self.device, dtype) - self.centre.to(self.device, dtype)).to(self.dtype)

    def finer(self) -> "_Cloud":
        """The same points in float64."""
        return _Cloud(self.points, self.centre, self.device, torch.float64)


class _Tiles:
    """Lower bounds of squared distances between two clouds, [R, S] tiles in one buffer."""

    def __init__(self, one: _Cloud, other: _Cloud):
        self.one, self.other = one, other
        size = min(TILE, len(one)) * min(TILE, len(other))
        self.buffer = torch.empty(size, device=one.device, dtype=one.dtype)

    def low(self, rows: slice, columns: slice, block: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """The tile of these rows and columns, given the block of its rows and perhaps that of its columns; the next
        call overwrites it."""
        other = self.other.block(columns) if other is None else other
        tile = self.buffer[: len(block) * len(other)].view(len(block), len(other))
        torch.addmm(self.other.low[columns], block, other.T, alpha=-2, out=tile)
        return tile.add_(self.one.low[rows, None])


def _high(one: _Cloud, other: _Cloud, low: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Upper bounds for lower ones of pairs of points; positions and bounds broadcast, float64 on CPU."""
    return low + 2 * one.slack * (one.squares[rows] + other.squares[columns])


class _Smallest:
    """The C smallest lower bounds of each of N points, and whose they are, over the tiles offered so far."""

    def __init__(self, size: int, count: int, device: torch.device, dtype: torch.dtype):
        self.values = torch.full((size, count), torch.inf, device=device, dtype=dtype)
        self.indices = torch.zeros(size, count, device=device, dtype=torch.int64)

    def offer(self, tile: torch.Tensor, points: slice, others: slice, axis: int = 0) -> None:
        """Takes in a tile [R, S] whose axis 0 (or 1) are these points and whose other axis are those others."""
        bound = self.values[points, -1]
        # Comparing is cheap, sorting is not: after the first tiles only a few distances per point are news.
        news = tile < (bound[:, None] if axis == 0 else bound)
        places = _places(news)
        if len(places) * DENSE > news.numel():
            tile = tile if axis == 0 else tile.T.contiguous()
            values, indices = tile.topk(min(self.values.shape[1], tile.shape[1]), largest=False)
        else:
            rows, columns = places // tile.shape[1], places % tile.shape[1]
            own, indices = (rows, columns) if axis == 0 else (columns, rows)
            values, indices = _padded(own, indices, tile.view(-1)[places], len(bound))
        values = torch.cat([self.values[points], values], dim=1)
        indices = torch.cat([self.indices[points], indices + others.start], dim=1)
        self.values[points], kept = values.topk(self.values.shape[1], largest=False)
        self.indices[points] = indices.gather(1, kept)


def _padded(own: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, size: int) -> tuple:
    """Values and indices of P hits as rows of a matrix, row `own` [P], filled up with infinity."""
    order = own.argsort(stable=True)
    own, indices, values = own[order], indices[order], values[order]
    counts = own.bincount(minlength=size)
    places = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[own]
    width = int(counts.max()) if len(own) else 0
    matrix = values.new_full((size, width), torch.inf)
    matrix[own, places] = values
    positions = indices.new_zeros(size, width)
    positions[own, places] = indices
    return matrix, positions


def _places(mask: torch.Tensor) -> torch.Tensor:
    """Where the flattened matrix is true, int64 [P] in ascending order."""
    if mask.device.type == "cpu":  # NumPy finds a few true entries several times faster
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


def _squared_distances(one: torch.Tensor, other: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor):
    """Squared distances of P pairs in float64 from the differences, [P]: the same bits whichever pairs are computed
    together and in whichever order a pair is given."""
    one, other, rows, columns = one.numpy(), other.numpy(), rows.numpy(), columns.numpy()
    together = max(1, 2**17 // one.shape[1])  # differences that stay in the processor's cache
    squared = np.empty(len(rows))
    for start in range(0, len(rows), together):
        chosen = slice(start, start + together)
        difference = np.subtract(one[rows[chosen]], other[columns[chosen]], dtype=np.float64)
        np.einsum("pd,pd->p", difference, difference, out=squared[chosen])
    return torch.from_numpy(squared)


def _centre(*sets: torch.Tensor) -> torch.Tensor:
    """About the mean over all points of several sets, float64 [D]: any centre would do that float32 can hold."""
    total = sum(part.sum(dim=0).to(torch.float64) for points in sets for part in points.split(TILE))
    return (total / sum(len(points) for points in sets)).to(torch.float32).to(torch.float64)


def kth_squared(points: torch.Tensor, ks: Sequence[int], device, progress: bool, description: str) -> torch.Tensor:
    """Squared distances of each point [N, D] to its k-th nearest other point, for each of K numbers from 1 to N - 1:
    float64 [N, K]."""
    cloud = _Cloud(points, _centre(points), device, torch.float32)
    count = min(max(ks) + SPARE, len(points) - 1)
    found = _candidates_among(cloud, count, progress, description)
    squared, certain = _kth_of_candidates(cloud, cloud, *found, ks)
    if not certain.all():
        rows = (~certain).nonzero()[:, 0]
        finer, asking = cloud.finer(), _Cloud(points[rows], cloud.centre, device, torch.float64)
        found = _candidates(asking, finer, count, progress, f"{description}, close ones", skip=rows)
        squared[rows], _ = _kth_of_candidates(asking, finer, *found, ks)
    return squared


def nearest_squared(
    queries: torch.Tensor, points: torch.Tensor, k: int, device, progress: bool, description: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances of each query [M, D] to the K points [N, D] nearest to it, in ascending order, and their
    positions: float64 and int64 [M, K]."""
    cloud = _Cloud(points, _centre(points), device, torch.float32)
    asking = _Cloud(queries, cloud.centre, device, torch.float32)
    count = min(k + SPARE, len(points))
    found = _candidates(asking, cloud, count, progress, description)
    squared, indices, certain = _nearest_of_candidates(asking, cloud, *found, k)
    if not certain.all():
        rows = (~certain).nonzero()[:, 0]
        finer, asking = cloud.finer(), _Cloud(queries[rows], cloud.centre, device, torch.float64)
        found = _candidates(asking, finer, count, progress, f"{description}, close ones")
        squared[rows], indices[rows], _ = _nearest_of_candidates(asking, finer, *found, k)
    return squared, indices


def pairs_within(
    one: torch.Tensor,
    other: torch.Tensor,
    radii: torch.Tensor,
    other_radii: torch.Tensor,
    device,
    progress: bool,
    description: str,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """All pairs of points of two sets, [N, D] and [M, D], that lie within a radius of either, a tile at a time.

    Args:
        radii: squared radii around the points of the one set, float64 [N, A]. other_radii: of the other, [M, B].

    Yields:
        positions in the one set and in the other, int64 [P], and squared distances, float64 [P]: exact wherever a
        comparison with one of the pair's radii depends on it, else an upper bound.
    """
    centre = _centre(one, other)
    clouds = tuple(_Cloud(points, centre, device, torch.float32) for points in (one, other))
    finer: tuple[_Cloud, ...] = ()
    reach = [each.amax(dim=1).to(clouds[0].device, torch.float32) for each in (radii, other_radii)]
    tiles, bar = (
        _Tiles(*clouds),
        tqdm(clouds[0].spans(), desc=description, unit="block", delay=2, disable=not progress),
    )
    for rows in bar:
        block = clouds[0].block(rows)
        for columns in clouds[1].spans():
            tile = tiles.low(rows, columns, block)
            places = _places((tile <= reach[0][rows, None]).logical_or_(tile <= reach[1][columns]))
            low, places = tile.view(-1)[places].to("cpu", torch.float64), places.cpu()
            i, j = places // tile.shape[1] + rows.start, places % tile.shape[1] + columns.start
            borders = torch.cat([radii[i], other_radii[j]], dim=1)
            squared = _high(*clouds, low, i, j)
            left = _left_open(low, squared, borders)
            if len(left) * OPEN > tile.numel():
                finer = finer or tuple(cloud.finer() for cloud in clouds)
                tile = _Tiles(*finer).low(rows, columns, finer[0].block(rows)).cpu()
                low[left] = tile.view(-1)[places[left]]
                squared[left] = _high(*finer, low[left], i[left], j[left])
                left = left[_left_open(low[left], squared[left], borders[left])]
            squared[left] = _squared_distances(one, other, i[left], j[left])
            yield i, j, squared


def _left_open(low: torch.Tensor, high: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
    """Positions of the pairs whose bounds, float64 [P], enclose one of their borders, float64 [P, A]."""
    return ((low[:, None] <= borders) & (borders < high[:, None])).any(dim=1).nonzero()[:, 0]


def _candidates_among(cloud: _Cloud, count: int, progress: bool, description: str) -> tuple:
    """The C smallest lower bounds of each point to other points, float64 [N, C] in ascending order, and whose they
    are, int64 [N, C]. The matrix is symmetric: each tile above the diagonal serves its rows and its columns."""
    smallest = _Smallest(len(cloud), count, cloud.device, cloud.dtype)
    tiles, spans = _Tiles(cloud, cloud), cloud.spans()
    # The diagonal first: it gives every point a bound that few of the other distances pass.
    pairs = [(rows, rows) for rows in spans]
    pairs += [(rows, columns) for place, rows in enumerate(spans) for columns in spans[place + 1 :]]
    last = None
    for rows, columns in tqdm(pairs, desc=description, unit="tile", delay=2, disable=not progress):
        if last != rows:
            block, last = cloud.block(rows), rows
        if rows == columns:
            smallest.offer(tiles.low(rows, rows, block, block).fill_diagonal_(torch.inf), rows, rows)
        else:
            tile = tiles.low(rows, columns, block)
            smallest.offer(tile, rows, columns)
            smallest.offer(tile, columns, rows, axis=1)
    return _sorted(smallest)


def _candidates(
    asking: _Cloud, cloud: _Cloud, count: int, progress: bool, description: str, skip: torch.Tensor | None = None
) -> tuple:
    """As [`_candidates_among`], for each asking point among the points of another cloud; `skip` [M] is the one that
    each leaves out."""
    smallest = _Smallest(len(asking), count, cloud.device, cloud.dtype)
    tiles = _Tiles(asking, cloud)
    for rows in tqdm(asking.spans(), desc=description, unit="block", delay=2, disable=not progress):
        block = asking.block(rows)
        for columns in cloud.spans():
            tile = tiles.low(rows, columns, block)
            if skip is not None:
                here = (skip[rows] >= columns.start) & (skip[rows] < columns.stop)
                left_out = skip[rows][here] - columns.start
                tile[here.nonzero()[:, 0].to(tile.device), left_out.to(tile.device)] = torch.inf
            smallest.offer(tile, rows, columns)
    return _sorted(smallest)


def _sorted(smallest: _Smallest) -> tuple[torch.Tensor, torch.Tensor]:
    values, order = smallest.values.sort(dim=1)
    return values.to("cpu", torch.float64), smallest.indices.gather(1, order).cpu()


def _kth_of_candidates(
    asking: _Cloud, cloud: _Cloud, low: torch.Tensor, indices: torch.Tensor, ks: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k-th smallest squared distances of the candidates, float64 [M, K], and whether these are certain, bool [M].
    Only the candidates that may be the k-th are computed."""
    high = _high(asking, cloud, low, torch.arange(len(low))[:, None], indices)
    squared = torch.empty(len(low), len(ks), dtype=torch.float64)
    for place, k in enumerate(ks):
        nearer = high < low[:, k - 1, None]
        farther = low > high.kthvalue(k, dim=1).values[:, None]
        values = torch.full_like(low, torch.inf).masked_fill_(nearer, -torch.inf)
        rows, candidates = (~nearer & ~farther).nonzero(as_tuple=True)
        values[rows, candidates] = _squared_distances(asking.points, cloud.points, rows, indices[rows, candidates])
        squared[:, place] = values.kthvalue(k, dim=1).values
    return squared, _certain(squared.amax(dim=1), low, len(cloud) - 1)


def _nearest_of_candidates(asking: _Cloud, cloud: _Cloud, low: torch.Tensor, indices: torch.Tensor, k: int) -> tuple:
    """The K smallest squared distances of the candidates, whose they are, and whether these are certain: float64
    [M, K], int64 [M, K], bool [M]."""
    high = _high(asking, cloud, low, torch.arange(len(low))[:, None], indices)
    rows, candidates = (low <= high.kthvalue(k, dim=1).values[:, None]).nonzero(as_tuple=True)
    values = torch.full_like(low, torch.inf)
    values[rows, candidates] = _squared_distances(asking.points, cloud.points, rows, indices[rows, candidates])
    values, order = values.sort(dim=1, stable=True)
    return values[:, :k], indices.gather(1, order)[:, :k], _certain(values[:, k - 1], low, len(cloud))


def _certain(squared: torch.Tensor, low: torch.Tensor, others: int) -> torch.Tensor:
    """Whether none of the other points can be nearer than this unless it is a candidate, bool [M]: no others are left,
    or they are beyond the largest lower bound of the candidates, [M, C]."""
    if low.shape[1] == others:
        return torch.ones(len(low), dtype=torch.bool)
    return squared <= low[:, -1].clamp(min=0)
