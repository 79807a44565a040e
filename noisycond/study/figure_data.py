"""What the figures of a study draw: points, lines and pairs, picked from the table of its results.

`values` are lines of that table (`Results.values`), of one block; `cells` are that block's labels with their methods.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pandas import DataFrame

from noisycond.study.methods import KINDS, Method


Cells = Mapping[str, Method]
# The strength that stands for a method where one is to: the papers' of CEP and IP, common ones of the others.
USUAL = {
    "embedding_dropout": 0.1,
    "label_smoothing": 0.1,
    "input_perturbation": 0.1,
    "cep": 1.0,
}


@dataclass(frozen=True)
class Point:
    """One setting at one place.

    Attributes:
        x: η in %, γ, guidance scale or optimizer step. values: one per seed of training, in the order of the seeds.
    """

    x: float
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """The sample standard deviation over seeds; 0 for one seed, of which no bar is drawn."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Line:
    """Points from left to right. `method` has strength 0 where the line runs over strengths."""

    title: str
    method: Method
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Pair:
    """A method in both modes."""

    title: str
    fixed: Point
    random: Point


@dataclass(frozen=True)
class Difference:
    """A cell minus clean, paired over seeds: the mean difference and its 95 % t interval (NaN of a single pair)."""

    cell: str
    mean: float
    low: float
    high: float
    pairs: int


# Lines of the table.


def final(values: DataFrame) -> DataFrame:
    """What was measured after training."""
    return values[values["step"].isna()]


def at_scale(values: DataFrame, scale: float | None) -> DataFrame:
    """What was measured at a guidance scale; None: what has none."""
    column = values["guidance_scale"]
    return values[column.isna() if scale is None else column == scale]


def one_scale(values: DataFrame, wanted: float | None) -> float | None:
    """The guidance scale of figures that show one: the wanted one where it was measured, else the smallest; None where
    there is none."""
    there = set(values["guidance_scale"].dropna())
    return float(wanted if wanted in there else min(there)) if there else None


def metrics_in(values: DataFrame, cells: Cells, names: Sequence[str]) -> list[str]:
    """Those of the names that some of these cells have, in their order."""
    there = set(values.loc[values["cell"].isin(list(cells)), "metric"])
    return [name for name in names if name in there]


def points_over(values: DataFrame, cell: str, metric: str, column: str) -> tuple[Point, ...]:
    """A cell's values of a metric: a point for each value of a column (`guidance_scale`, `step`)."""
    chosen = values[(values["cell"] == cell) & (values["metric"] == metric)].sort_values([column, "seed"])
    return tuple(Point(float(x), tuple(map(float, group["value"]))) for x, group in chosen.groupby(column))


def point(values: DataFrame, cell: str | None, metric: str, x: float = 0.0) -> Point | None:
    """A cell's values of a metric as one point at x; None where there are none."""
    chosen = values[(values["cell"] == cell) & (values["metric"] == metric)].sort_values("seed")
    return None if chosen.empty else Point(x, tuple(map(float, chosen["value"])))


# Cells.


def distinct(cells: Sequence[tuple[str, Method]]) -> tuple[dict[str, Method], list[str]]:
    """Cells may also differ in what is no method (a size, a learning rate): the first of each method stays, and of
    mixed methods, which are told by their labels, all.

    Returns:
        What stays, and the labels of the others.
    """
    kept: dict[str, Method] = {}
    others = []
    for label, method in cells:
        if method.kind != "mixed" and method in kept.values():
            others.append(label)
        else:
            kept[label] = method
    return kept, others


def clean_of(cells: Cells) -> dict[str, Method]:
    return {cell: method for cell, method in cells.items() if method.kind == "clean"}


def families(cells: Cells, kind: str) -> dict[Method, dict[str, Method]]:
    """The cells of a kind by type and mode (a method of strength 0), each by strength; the largest family first."""
    found: dict[Method, dict[str, Method]] = {}
    for cell, method in sorted(cells.items(), key=lambda item: item[1].strength):
        if method.kind == kind:
            found.setdefault(replace(method, strength=0.0), {})[cell] = method
    order = list(cells)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), min(map(order.index, item[1])))))


def of_main_mode(cells: Cells, kind: str) -> dict[Method, dict[str, Method]]:
    """The families of a kind, of each type the mode with the most strengths alone."""
    chosen: dict[str, Method] = {}
    for how in families(cells, kind):
        chosen.setdefault(how.type, how)
    return {how: family for how, family in families(cells, kind).items() if how in chosen.values()}


def groups(cells: Cells) -> list[dict[str, Method]]:
    """All cells but the clean ones in groups that a panel holds: each type of corruption in its main mode, CEP in its
    main modes, and the others."""
    corruptions = [dict(family) for family in of_main_mode(cells, "corruption").values()]
    perturbations = dict(item for family in of_main_mode(cells, "cep").values() for item in family.items())
    shown = {cell for group in [*corruptions, perturbations] for cell in group}
    others = {cell: method for cell, method in cells.items() if cell not in shown and method.kind != "clean"}
    return [group for group in (*corruptions, perturbations, others) if group]


def regularizers(values: DataFrame, cells: Cells) -> dict[str, str]:
    """The cells that the comparison of regularizers shows, with their titles: of dropout, label smoothing, IP and each
    type of CEP the strength nearest to the usual one, and of the corruption with the most strengths the slightest
    and the one of the lowest mean FID.

    Args:
        values: at one guidance scale.
    """
    groups = [of_main_mode(cells, kind) for kind in USUAL]
    found = [
        _nearest(family, USUAL[how.kind]) for group in groups for how, family in sorted(group.items(), key=_by_place)
    ]
    titles = {cell: cells[cell].title for cell in found}
    corrupted = next(iter(families(cells, "corruption").values()), {})
    if corrupted:
        slightest = next(iter(corrupted))
        fids = {cell: found.mean for cell in corrupted if (found := point(values, cell, "fid"))}
        best = min(fids, key=fids.get, default=slightest)
        for cell in dict.fromkeys([slightest, best]):
            which = [name for name, each in (("slightest", slightest), ("best FID", best)) if each == cell and fids]
            titles[cell] = cells[cell].title + (f" ({', '.join(which)})" if which and len(corrupted) > 1 else "")
    return titles


def sample_cells(cells: Cells) -> list[str]:
    """The cells whose samples stand beside one another: clean, the smallest and the largest η of the corruption with
    the most strengths, and CEP-U at the γ nearest to 1."""
    corrupted = list(next(iter(families(cells, "corruption").values()), {}))
    uniform = [family for how, family in of_main_mode(cells, "cep").items() if how.type == "uniform"]
    chosen = [*list(clean_of(cells))[:1], *corrupted[:1], *corrupted[-1:]]
    return list(dict.fromkeys([*chosen, *(_nearest(family, USUAL["cep"]) for family in uniform)]))


def sample_runs(runs: Sequence[dict], cells: Cells) -> list[dict]:
    """The runs of [`sample_cells`] with the first seed that all of them have pictures of; none where fewer than two
    are left, or one of them is not clean.

    Args:
        runs: of one block, with pictures, in the study's order.
    """
    by_seed: dict[int, dict[str, dict]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], {})[run["cell"]] = run
    pictured = {run["cell"] for run in runs}
    wanted = sample_cells({cell: method for cell, method in cells.items() if cell in pictured})
    if len(wanted) < 2 or cells[wanted[0]].kind != "clean":
        return []
    return next(([found[cell] for cell in wanted] for found in by_seed.values() if found.keys() >= set(wanted)), [])


# What is drawn.


def lines_over_eta(values: DataFrame, cells: Cells, metric: str) -> list[Line]:
    """A line for each corruption type and mode over η in %, from the clean runs at 0 on.

    Args:
        values: at one guidance scale.
    """
    start = [point(values, cell, metric, 0.0) for cell in clean_of(cells)]
    lines = []
    for how, family in families(cells, "corruption").items():
        found = [point(values, cell, metric, 100 * method.strength) for cell, method in family.items()]
        if any(found):
            lines.append(Line(f"{how.type}, {how.mode}", how, tuple(each for each in start + found if each)))
    return lines


def lines_over_gamma(values: DataFrame, cells: Cells, metric: str) -> list[Line]:
    """A line for each type of CEP over γ, in its main mode.

    Args:
        values: at one guidance scale.
    """
    lines = []
    for how, family in sorted(of_main_mode(cells, "cep").items(), key=_by_place):
        found = [point(values, cell, metric, method.strength) for cell, method in family.items()]
        if any(found):
            title = replace(how, mode="", strength=1.0).title.split(",")[0]
            lines.append(Line(title, how, tuple(each for each in found if each)))
    return lines


def lines_of_cells(values: DataFrame, cells: Cells, metric: str, column: str) -> list[Line]:
    """A line for each cell over a column (`guidance_scale`, `step`); those that have two places at least."""
    found = [(cell, method, points_over(values, cell, metric, column)) for cell, method in cells.items()]
    return [
        Line(cell if method.kind == "mixed" else method.title, method, points)
        for cell, method, points in found
        if len(points) > 1
    ]


def pairs_of_modes(values: DataFrame, cells: Cells, metric: str) -> list[Pair]:
    """What was run in both modes, corruption before CEP, by type and strength.

    Args:
        values: at one guidance scale.
    """
    by_method = {method: cell for cell, method in cells.items()}
    pairs = []
    for method in sorted(by_method, key=lambda method: (*_place(method), method.strength)):
        other = replace(method, mode="random")
        if method.mode == "fixed" and other in by_method:
            fixed, random = (point(values, by_method[each], metric) for each in (method, other))
            if fixed and random:
                pairs.append(Pair(replace(method, mode="").title, fixed, random))
    return pairs


def differences(compared: DataFrame, cells: Sequence[str], metric: str) -> list[Difference]:
    """Cells minus clean, of one metric, where they have seeds in common.

    Args:
        compared: what `noisycond.study.statistics.compare` says of one block, of final models at one guidance scale.
    """
    found = compared[(compared["metric"] == metric) & (compared["pairs"] > 0)].set_index("cell")
    columns = found[["difference", "low", "high", "pairs"]]
    return [
        Difference(cell, *map(float, columns.loc[cell].iloc[:3]), int(columns.loc[cell, "pairs"]))
        for cell in cells
        if cell in columns.index
    ]


def _nearest(family: Cells, strength: float) -> str:
    """The cell of the nearest strength, by ratio: γ = 0.5 is as far from 1 as γ = 2 is."""
    return min(family, key=lambda cell: abs(math.log(family[cell].strength / strength)))


def _place(method: Method) -> tuple:
    """Where a method stands in order: CEP-U before CEP-G, as everywhere, else by name."""
    return KINDS.index(method.kind), method.type == "gaussian", method.type, method.mode


def _by_place(item: tuple[Method, Cells]) -> tuple:
    return _place(item[0])
