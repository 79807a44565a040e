"""How sure a figure is: bootstrap intervals of one set of images, and the spread over seeds and trained runs.

Letters: N things that are resampled (images), R replicates.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from tqdm import tqdm

from noisycond import randomness
from noisycond.errors import InputError, require
from noisycond.evaluation.estimates import Estimate
from noisycond.randomness import Purpose


@dataclass(frozen=True)
class MetricSummary:
    """One metric over the rows of one label and guidance scale.

    Attributes:
        mean: over runs of the mean over each run's seeds.
        spread: the sample standard deviation; None where a single row has the metric.
        count: how many runs, seeds or folders the spread is over; 1 where there is none.
        of: what the spread is over: trained `runs`, `seeds` of generation of one run, image `folders` of which nothing
            more is known; None where there is no spread.
        interval: the bootstrap interval, where a single row has the metric.
    """

    mean: float
    spread: float | None = None
    count: int = 1
    of: Literal["runs", "seeds", "folders"] | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Summary:
    """All rows of one label and guidance scale.

    Attributes:
        label: what tables and plots call them. guidance_scale: None for image folders.
        runs, seeds: how many trained runs (or image folders), and seeds of generation of each (the fewest).
        num_images: images per row, None where rows differ.
        metrics: by name, those that at least one row has.
        skipped: by a metric's name, why rows do not have it.
    """

    label: str
    guidance_scale: float | None
    runs: int
    seeds: int
    num_images: int | None
    metrics: dict[str, MetricSummary]
    skipped: dict[str, str] = field(default_factory=dict)


def bootstrap_interval(
    estimate: Estimate, replicates: int, seed: int, level: float = 0.95
) -> tuple[float, float] | None:
    """An interval for a metric by resampling its images with replacement, centred on the metric's value.

    A resample repeats images, so it is less diverse than the set it is drawn from: FID and KID of resamples lie above
    the value, recall and coverage below, and the plain percentile interval (Efron, Annals of Statistics 7, 1979)
    may not even hold the value. Only how far replicates scatter is taken from them: the interval is the value plus
    the quantiles of (replicates - their mean). It can reach a little beyond a metric's range where the value is at its
    edge. All metrics of one seed and N see the same resamples.

    It covers the chance of which images were generated (or of whichever set `estimate.of` names), given everything
    else. It does **not** cover training the model anew, which moves FID more; nor the choice of the reference images;
    nor the bias of a metric at finite N.

    Args:
        replicates: R; 0 is off. seed: of the resamples. level: the share that the interval is to cover, in (0, 1).

    Returns:
        (low, high); None where R is 0, where the estimate cannot be resampled, or where it or a replicate is not
        finite.

    Raises:
        InputError: level outside (0, 1), or too few replicates for its quantiles.
    """
    require(0 < level < 1, f"a bootstrap interval's level must lie between 0 and 1, but is {level}.")
    tail = (1 - level) / 2
    # With fewer, the ends would lie beyond the outermost replicates.
    needed = math.ceil(1 / tail - 1e-6)
    require(
        replicates == 0 or replicates >= needed,
        f"a {level:.0%} bootstrap interval needs at least {needed} replicates (or 0 for none), but {replicates} are "
        "asked for.",
    )
    if not replicates or estimate.resample is None or not math.isfinite(estimate.value):
        return None
    values = torch.tensor(
        [
            estimate.resample(_resampled(seed, replicate, estimate.size))
            for replicate in tqdm(range(replicates), desc="bootstrap", unit="replicate", leave=False, delay=2)
        ],
        dtype=torch.float64,
    )
    if not values.isfinite().all():
        return None
    ends = torch.quantile(values - values.mean(), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    low, high = (estimate.value + ends).tolist()
    return low, high


def summarize(rows: Iterable[dict]) -> list[Summary]:
    """One summary per label and guidance scale, in order of first appearance.

    Several trained runs: the seeds of each run are averaged first, and the spread is over runs, because retraining
    moves a metric more than drawing other images does. One run: the spread is over its seeds. A single row has no
    spread. Rows without the metric are left out; a value that is not finite makes the mean not finite.

    Args:
        rows: one per label, trained run, guidance scale and seed of generation, with `label`, `pipeline` (None for an
            image folder), `images`, `guidance_scale`, `seed`, `num_images`, `metrics` (by name, a dict of `value` and
            `interval`) and maybe `skipped` (by name, the reason).

    Raises:
        InputError: two rows of the same label, run, guidance scale and seed, which would make a spread too small.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["label"], row["guidance_scale"]), []).append(row)
    return [_summary(label, scale, group) for (label, scale), group in groups.items()]


def conclusive(a: Summary, b: Summary, metric: str) -> bool | None:
    """Whether the gap between two means of a metric exceeds the larger of their spreads.

    Returns:
        None where that is not known: one has no finite mean, or a spread is missing. A gap below the one spread that
        is known does not exceed the larger, whatever the other is: False.
    """
    if metric not in a.metrics or metric not in b.metrics:
        return None
    one, other = a.metrics[metric], b.metrics[metric]
    gap = abs(one.mean - other.mean)
    spreads = [each.spread for each in (one, other) if each.spread is not None]
    if not spreads or not math.isfinite(gap):
        return None
    if gap <= max(spreads):
        return False
    return True if len(spreads) == 2 else None


def _resampled(seed: int, replicate: int, size: int) -> torch.LongTensor:
    """Positions drawn with replacement: int64 [N] in [0, N)."""
    bits = randomness.random_bits(seed, Purpose.BOOTSTRAP, torch.tensor([replicate]), size)[0]
    return (bits * size) >> 32


def _run(row: dict) -> str:
    return str(row["pipeline"] if row["pipeline"] is not None else row["images"])


def _summary(label: str, guidance_scale: float | None, rows: list[dict]) -> Summary:
    runs: dict[str, list[dict]] = {}
    for row in rows:
        runs.setdefault(_run(row), []).append(row)
    for run, of_run in runs.items():
        seeds = [row["seed"] for row in of_run]
        if len(set(seeds)) < len(seeds):
            raise InputError(f"label {label!r} names {run} twice at one guidance scale and seed; name it once.")
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    counts = {row["num_images"] for row in rows}
    return Summary(
        label=label,
        guidance_scale=guidance_scale,
        runs=len(runs),
        seeds=min(len(of_run) for of_run in runs.values()),
        num_images=counts.pop() if len(counts) == 1 else None,
        metrics={name: _over_runs(name, list(runs.values())) for name in names},
        skipped={name: reason for row in rows for name, reason in row.get("skipped", {}).items()},
    )


def _over_runs(name: str, runs: Sequence[Sequence[dict]]) -> MetricSummary:
    with_it = [[row for row in of_run if name in row["metrics"]] for of_run in runs]
    with_it = [of_run for of_run in with_it if of_run]
    values = [[_value(row, name) for row in of_run] for of_run in with_it]
    if len(with_it) > 1:
        of = "runs" if all(row["pipeline"] is not None for of_run in with_it for row in of_run) else "folders"
        independent = [statistics.fmean(of_run) for of_run in values]
    else:
        of, independent = "seeds", values[0]
    mean = statistics.fmean(independent)
    if len(independent) == 1:
        interval = with_it[0][0]["metrics"][name].get("interval")
        return MetricSummary(mean, interval=None if interval is None else (interval[0], interval[1]))
    spread = statistics.stdev(independent) if math.isfinite(mean) else None
    return MetricSummary(mean, spread, len(independent), of)


def _value(row: dict, name: str) -> float:
    """A metric's value; None, as a saved report has for what is not finite, is not a number."""
    value = row["metrics"][name]["value"]
    return math.nan if value is None else float(value)
