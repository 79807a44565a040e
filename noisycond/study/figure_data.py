"""What the figures of a study draw: points, lines and pairs, picked from the table of its results.

`values` are lines of that table (`Results.values`), of one block; `cells` are that block's labels with their methods.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pandas import DataFrame

from noisycond.study import selection
from noisycond.study.methods import KINDS, Method
from noisycond.study.selection import Cells, clean_of


MOST_IN_A_PANEL = 7  # lines beside clean's


@dataclass(frozen=True)
class Point:
    """One setting at one place.

    Attributes:
        x: η in %, γ, guidance scale or optimizer step; in a line of two metrics the mean of the other one.
        values: one per seed, in the order of the seeds. x_spread: the sample standard deviation of x over seeds.
        scale: in a line of two metrics, the guidance scale.
    """

    x: float
    values: tuple[float, ...]
    x_spread: float = 0.0
    scale: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """The sample standard deviation over seeds; 0 for one seed, of which no bar is drawn."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Line:
    """Points from left to right, of two metrics by guidance scale. `method` has strength 0 where the line runs over
    strengths."""

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
    """A cell minus clean, paired over seeds: the mean difference, its 95 % t interval (NaN of a single pair), and the
    verdict of `noisycond.study.statistics.compare` on it."""

    cell: str
    mean: float
    low: float
    high: float
    pairs: int
    verdict: str = ""


# Lines of the table.


def final(values: DataFrame) -> DataFrame:
    """What was measured after training."""
    return values[values["step"].isna()]


def at_scale(values: DataFrame, scale: float | None) -> DataFrame:
    """What was measured at a guidance scale; None: what has none."""
    column = values["guidance_scale"]
    return values[column.isna() if scale is None else column == scale]


def one_scale(values: DataFrame, wanted: float | None) -> float | None:
    """The guidance scale of figures that show one, as tables choose it; None for what has none."""
    there = [None if scale != scale else float(scale) for scale in values["guidance_scale"].unique()]
    return next(iter(selection.places(there, wanted)), None)


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
    """All cells but the clean ones in groups that a panel holds: one, if they are few; else each type of corruption in
    its main mode, CEP in its main modes, and the others."""
    everything = {cell: method for cell, method in cells.items() if method.kind != "clean"}
    if len(everything) <= MOST_IN_A_PANEL:
        return [everything] if everything else []
    corruptions = [dict(family) for family in of_main_mode(cells, "corruption").values()]
    perturbations = dict(item for family in of_main_mode(cells, "cep").values() for item in family.items())
    shown = {cell for group in [*corruptions, perturbations] for cell in group}
    others = {cell: method for cell, method in everything.items() if cell not in shown}
    return [group for group in (*corruptions, perturbations, others) if group]


def regularizers(values: DataFrame, cells: Cells) -> dict[str, str]:
    """The cells, clean apart, that the comparison of regularizers shows, with their titles; as in its table.

    Args:
        values: at one guidance scale.
    """
    there = set(values["cell"])
    found = selection.regularizers({cell: method for cell, method in cells.items() if cell in there})
    shown = {cell: method for name, family in found.items() if name != "clean" for cell, method in family.items()}
    several = len(selection.of_kind(cells, "corruption")) > 1
    return {
        cell: method.title + (" (slightest)" if several and method.kind == "corruption" else "")
        for cell, method in shown.items()
    }


def sample_cells(cells: Cells) -> list[str]:
    """The cells whose samples stand beside one another: clean, the smallest and the largest η of the corruption with
    the most strengths, and CEP-U at the γ nearest to 1."""
    corrupted = list(next(iter(families(cells, "corruption").values()), {}))
    uniform = [family for how, family in of_main_mode(cells, "cep").items() if how.type == "uniform"]
    chosen = [*list(clean_of(cells))[:1], *corrupted[:1], *corrupted[-1:]]
    return list(dict.fromkeys([*chosen, *(next(iter(selection.nearest_gamma(family))) for family in uniform)]))


def sample_runs(runs: Sequence[dict], cells: Cells) -> list[dict]:
    """The runs of [`sample_cells`] with the first seed that all of them have pictures of, at one guidance scale; none
    where fewer than two are left, or one of them is not clean.

    Args:
        runs: of one block, with pictures, in the study's order.
    """
    alike: dict[tuple, dict[str, dict]] = {}
    for run in runs:
        alike.setdefault((run["seed"], run.get("samples_scale")), {})[run["cell"]] = run
    pictured = {run["cell"] for run in runs}
    wanted = sample_cells({cell: method for cell, method in cells.items() if cell in pictured})
    if len(wanted) < 2 or cells[wanted[0]].kind != "clean":
        return []
    return next(([found[cell] for cell in wanted] for found in alike.values() if found.keys() >= set(wanted)), [])


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
    return _lines_of({cell: points_over(values, cell, metric, column) for cell in cells}, cells)


def lines_of_two(values: DataFrame, cells: Cells, metric: str, other: str) -> list[Line]:
    """A line for each cell: a metric over another one, from guidance scale to guidance scale, of the seeds that have
    both; those that were measured at two at least."""
    columns = ["cell", "guidance_scale", "seed"]
    both = values[values["metric"].isin([metric, other])].pivot(index=columns, columns="metric", values="value")
    both = both.reindex(columns=[metric, other]).dropna().reset_index()
    found = {}
    for cell in cells:
        points = []
        for scale, of_scale in both[both["cell"] == cell].groupby("guidance_scale"):
            across = Point(scale, tuple(map(float, of_scale[other])))
            points.append(Point(across.mean, tuple(map(float, of_scale[metric])), across.spread, float(scale)))
        found[cell] = tuple(points)
    return _lines_of(found, cells)


def _lines_of(points: Mapping[str, tuple[Point, ...]], cells: Cells) -> list[Line]:
    titles = {cell: cell if method.kind == "mixed" else method.title for cell, method in cells.items()}
    return [Line(titles[cell], cells[cell], found) for cell, found in points.items() if len(found) > 1]


def points_of_modes(values: DataFrame, cells: Cells, pairs: Sequence[tuple[str, str]], metric: str) -> list[Pair]:
    """What was run in both modes, corruption before CEP, by type and strength.

    Args:
        values: at one guidance scale. pairs: labels of a fixed and a random cell each.
    """
    found = []
    for labels in sorted(pairs, key=lambda pair: (*_place(cells[pair[0]]), cells[pair[0]].strength)):
        fixed, random = (point(values, cell, metric) for cell in labels)
        if fixed and random:
            found.append(Pair(replace(cells[labels[0]], mode="").title, fixed, random))
    return found


def differences(compared: DataFrame, cells: Sequence[str], metric: str) -> list[Difference]:
    """Cells minus clean, of one metric, where they have seeds in common.

    Args:
        compared: what `noisycond.study.statistics.compare` says of one block, of final models at one guidance scale.
    """
    found = compared[(compared["metric"] == metric) & (compared["pairs"] > 0)].set_index("cell")
    lines = {line.Index: line for line in found.itertuples()}
    return [
        Difference(cell, line.difference, line.low, line.high, int(line.pairs), line.verdict)
        for cell in cells
        if (line := lines.get(cell)) is not None
    ]


def _place(method: Method) -> tuple:
    """Where a method stands in order: CEP-U before CEP-G, as everywhere, else by name."""
    return KINDS.index(method.kind), method.type == "gaussian", method.type, method.mode


def _by_place(item: tuple[Method, Cells]) -> tuple:
    return _place(item[0])
