"""What a study's numbers say: means and spreads over seeds, and which cells differ from clean, paired by seed.

Letters: n seeds that both cells of a comparison have.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats

from noisycond.errors import InputError, require
from noisycond.evaluation.metrics import metric_of
from noisycond.study.methods import Method
from noisycond.study.selection import pairs_of_modes


CELL = ["block", "cell", "kind", "type", "mode", "strength", "title"]
WHERE = ["guidance_scale", "step", "metric"]
LEVEL = 0.05  # of adjusted p, and one minus the intervals' level
# Values whose gap is below this share of them are equal: some metrics are computed in float32.
EQUAL = 1e-6


def clean_cells(cells: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """The label of each block's clean cell, which its others are compared with; a block may have none.

    Args:
        cells: block, label and kind of each cell; may repeat.

    Raises:
        InputError: a block with two clean cells.
    """
    found: dict[str, str] = {}
    for block, cell, kind in dict.fromkeys(cells):
        if kind != "clean":
            continue
        other = found.setdefault(block, cell)
        where = f"of block {block!r} " if block else ""
        require(
            other == cell,
            f"cells {other!r} and {cell!r} {where}are both clean, so it is not said which one the others are compared "
            "with; leave one out, or give each a block of its own by `grid:`.",
        )
    return found


def compare(values: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread of each cell, and its difference from its block's clean cell, paired by seed.

    Cells of one seed see the same images in the same order with the same noise, so their difference is free of what
    these do to both: it is tested as such, by Student's two-sided paired t test (Biometrika 6, 1908) of n - 1 degrees
    of freedom. The test takes the differences as independent over seeds and near normal; with few seeds neither can
    be checked, and intervals are wide (of two seeds, 12.7 standard errors either way): an inconclusive difference is
    not an absent one.

    p is adjusted after Benjamini and Hochberg (J. R. Stat. Soc. B 57, 1995) over all cells and guidance scales of one
    block and metric: of the differences that are called one, about 5 % at most are expected to be chance. That is
    exact for independent tests and for some that depend on each other positively; these here share their clean runs,
    and images of one model at several guidance scales, so it is approximate. Each metric is a family of its own.

    What is special:
        - A value that is not finite (a metric that could not be computed) is left out with its seed, of that metric
          and guidance scale alone; where none is left, `seeds` is 0 and `mean` NaN.
        - One seed: no spread, no test. A seed that one of the two cells lacks counts for the cell's mean, not for the
          difference. Fewer than two pairs, or no clean cell in the block: no interval, no p, verdict "".
        - All differences equal, which a coarse metric may be: the t statistic is not defined, and there is no
          interval. If they are 0 (but for rounding, see EQUAL), p is 1 and the verdict "equal"; else p is NaN, does
          not enter the adjustment, and the verdict is "inconclusive".
        - Evaluations during training (`step` is not NA) have differences and intervals, but no p and no verdict.

    Args:
        values: a line per number, with columns `block`, `cell`, `kind`, `type`, `mode`, `strength`, `title`, `seed`,
            `guidance_scale` (NaN: none), `step` (NA: the final model), `metric`, `value`.

    Returns:
        A line per cell, guidance scale, step and metric, in order of first appearance: those columns, and
        `seeds` (finite values), `mean`, `spread` (sample standard deviation, NaN of one seed), and against clean
        `pairs` (n), `difference` (mean of cell - clean), `low`, `high` (95 % interval of the mean difference),
        `p`, `p_adjusted`, `verdict`: "better" or "worse" where p_adjusted < 0.05, "higher" or "lower" likewise of
        metrics that neither way is better, "inconclusive", "equal" where every difference is 0, or "" where nothing is
        tested.

    Raises:
        InputError: a block with two clean cells, or two values of one cell, seed, guidance scale, step and metric.
    """
    values = _checked(values)
    clean = clean_cells(values[["block", "cell", "kind"]].itertuples(index=False, name=None))
    cells = values[["block", "cell"]].drop_duplicates().itertuples(index=False, name=None)
    pairs = [(block, cell, clean[block]) for block, cell in cells if clean.get(block, cell) != cell]
    pairs = pd.DataFrame(pairs, columns=["block", "cell", "reference"], dtype=object)
    differences = _differences(values, pairs).drop(columns="reference")
    found = _summary(values).merge(differences, how="left", on=["block", "cell", *WHERE])
    found["pairs"] = found["pairs"].fillna(0).astype(int)
    found.loc[found["step"].notna(), "p"] = np.nan
    return _judged(found)


def at_best_guidance(values: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Final models, each cell at the guidance scale where the mean of a metric over its seeds is best: a cell that is
    better than clean at one scale may only want another.

    The scale is chosen by the same runs that are then compared, of clean as of every other cell: means are a little
    too good, and alike so.

    Args:
        values: as [`compare`] takes them. metric: one that has a better way.

    Returns:
        The values there, `guidance_scale` NaN, with a column `best_scale`; of cells that were measured at two scales
        at least.
    """
    values = _checked(values)
    values = values[values["step"].isna() & values["guidance_scale"].notna()]
    means = values[values["metric"] == metric].groupby(["block", "cell", "guidance_scale"], sort=False)["value"].mean()
    means = means.dropna().reset_index(name="mean")
    sign = 1 if metric_of(metric).better == "lower" else -1
    best = means.assign(mean=sign * means["mean"]).sort_values(["mean", "guidance_scale"], kind="stable")
    several = means.groupby(["block", "cell"])["guidance_scale"].transform("size") > 1
    best = best[several.reindex(best.index)].drop_duplicates(["block", "cell"])
    found = values.merge(best[["block", "cell", "guidance_scale"]], on=["block", "cell", "guidance_scale"])
    return found.assign(best_scale=found["guidance_scale"], guidance_scale=np.nan)


def compare_modes(values: pd.DataFrame) -> pd.DataFrame:
    """Differences random - fixed, of final models, between cells that are alike in all but the mode.

    Tested as [`compare`] does; p is adjusted over all pairs of cells and guidance scales of one block and metric.

    Args:
        values: as [`compare`] takes them.

    Returns:
        A line per pair of cells, guidance scale and metric: `block`, `fixed` and `random` (the cells), `kind`, `type`,
        `strength`, `title` (of both, without the mode), `guidance_scale`, `metric`, and [`compare`]'s columns from
        `pairs` on. A pair is two cells of equal block, kind, type and strength, one `fixed` and one `random`; where a
        block has several of either, what else they differ in is not known here, and they are left out.
    """
    values = _checked(values)
    values = values[values["step"].isna()]
    blocks: dict[str, list[tuple[str, Method]]] = {}
    for block, cell, *method, _ in values[CELL].drop_duplicates().itertuples(index=False, name=None):
        blocks.setdefault(block, []).append((cell, Method(*method)))
    pairs = []
    for block, cells in blocks.items():
        methods = dict(cells)
        for fixed, random in pairs_of_modes(cells):
            how = replace(methods[random], mode="")
            pairs.append((block, random, fixed, how.kind, how.type, how.strength, how.title))
    names = ["block", "cell", "reference", "kind", "type", "strength", "title"]
    pairs = pd.DataFrame(pairs, columns=names).astype({"strength": "float64"})
    found = _differences(values, pairs[["block", "cell", "reference"]])
    found = pairs.merge(found, on=["block", "cell", "reference"]).drop(columns="step")
    found = _judged(found).rename(columns={"cell": "random", "reference": "fixed"})
    first = ["block", "fixed", "random", "kind", "type", "strength", "title", "guidance_scale", "metric"]
    return found[[*first, *found.columns.difference(first, sort=False)]]


def _checked(values: pd.DataFrame) -> pd.DataFrame:
    """The values, NaN for what is not finite."""
    values = values.astype({"value": "float64", "step": "Int64", "guidance_scale": "float64"})
    twice = values.duplicated(["block", "cell", "seed", *WHERE])
    if twice.any():
        line = values[twice].iloc[0]
        raise InputError(
            f"the study's results hold {line['metric']} of cell {line['cell']!r}, seed {line['seed']}, twice at one "
            "guidance scale and step, which would make the spread too small; keep one of the two result files."
        )
    values["value"] = values["value"].where(np.isfinite(values["value"]))
    return values.reset_index(drop=True)


def _summary(values: pd.DataFrame) -> pd.DataFrame:
    groups = values.groupby([*CELL, *WHERE], sort=False, dropna=False)["value"]
    return groups.agg(seeds="count", mean="mean", spread="std").reset_index()


def _differences(values: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Differences cell - reference.

    Args:
        pairs: `block`, `cell` and `reference`, the label of the cell that it is compared with.

    Returns:
        A line per pair of cells, guidance scale, step and metric that both have: `block`, `cell`, `reference`, WHERE,
        `pairs`, `difference`, `low`, `high`, `p`, `equal` (all differences are 0, but for rounding).
    """
    ours = values[["block", "cell", "seed", *WHERE, "value"]]
    theirs = ours.rename(columns={"cell": "reference", "value": "against"})
    both = pairs.merge(ours, on=["block", "cell"]).merge(theirs, on=["block", "reference", "seed", *WHERE])
    both["difference"] = both["value"] - both["against"]
    both = both[both["difference"].notna()]
    both["size"] = both[["value", "against"]].abs().max(axis=1)
    groups = both.groupby(["block", "cell", "reference", *WHERE], sort=False, dropna=False)
    found = groups.agg(
        pairs=("difference", "size"),
        difference=("difference", "mean"),
        spread=("difference", "std"),
        size=("size", "max"),
    ).reset_index()
    n, difference, spread = (found[name].to_numpy(float) for name in ("pairs", "difference", "spread"))
    rounding = EQUAL * found["size"].to_numpy(float)
    equal = spread <= rounding
    tested = (n > 1) & ~equal
    error = np.where(tested, spread, np.nan) / np.sqrt(n)
    half = stats.t.ppf(1 - LEVEL / 2, n - 1) * error
    p = 2 * stats.t.sf(np.abs(difference) / error, n - 1)
    zero = equal & (np.abs(difference) <= rounding)
    found = found.drop(columns=["spread", "size"])
    return found.assign(low=difference - half, high=difference + half, p=np.where(zero, 1.0, p), equal=zero)


def _judged(found: pd.DataFrame) -> pd.DataFrame:
    """With `p_adjusted`, over the finite p of a block and metric, and `verdict` in place of `equal`."""
    found["p_adjusted"] = np.nan
    for _, p in found[found["p"].notna()].groupby(["block", "metric"], sort=False)["p"]:
        found.loc[p.index, "p_adjusted"] = stats.false_discovery_control(p.to_numpy())
    final = found["step"].isna() if "step" in found else pd.Series(True, found.index)
    equal = found.pop("equal").eq(True)  # NaN where there is no pair
    columns = zip(found["metric"], found["difference"], found["p_adjusted"], equal, strict=True)
    verdicts = [_verdict(*line) for line in columns]
    found["verdict"] = pd.Series(verdicts, found.index, dtype=object).where((found["pairs"] > 1) & final, "")
    return found


def _verdict(metric: str, difference: float, p_adjusted: float, equal: bool) -> str:
    if equal:
        return "equal"
    if not p_adjusted < LEVEL:
        return "inconclusive"
    way, better = ("higher" if difference > 0 else "lower"), metric_of(metric).better
    return way if better is None else ("better" if way == better else "worse")
