"""The figures of the theory, and the CSV behind them."""

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from noisycond.run_folder import write_atomically
from noisycond.theory.curves import Average, BestPoint, Point
from noisycond.theory.guidance import GuidedPoint


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LABELS = {
    "w2": "W2 to the true class",
    "w2_to_samples": "W2 to the Gaussian of its samples",
    "entropy": "entropy [nats]",
}


Row = Point | BestPoint | Average | GuidedPoint


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per row, with nine significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([item.name for item in dataclasses.fields(rows[0])])
    for row in rows:
        values = dataclasses.astuple(row)
        writer.writerow([f"{value:.9g}" if isinstance(value, float) else value for value in values])
    write_atomically(path, text.getvalue())


def draw_over_strength(
    path: Path, points: Sequence[Point], name: str, label: str, true_entropy: float, checks: Sequence[Average] = ()
) -> None:
    """W2 to the truth, W2 to the samples and entropy over γ or η, a line per n, with the least W2 marked.

    Args:
        points: of one sweep. name: `gamma` or `eta`. label: of the horizontal axis. true_entropy: of a class, in nats.
        checks: averages of full matrices over training sets, drawn as crosses with bars of ± two standard errors;
            those of flips that are drawn once as triangles.
    """
    panels = _panels(len(LABELS))
    for axes, (metric, title) in zip(panels, LABELS.items(), strict=True):
        for colour, samples in zip(COLOURS, sorted({point.samples for point in points}), strict=False):
            own = [point for point in points if point.samples == samples]
            strengths, values = [getattr(point, name) for point in own], [getattr(point, metric) for point in own]
            axes.plot(strengths, values, color=colour, label=f"n = {samples}")
            if metric == "w2":
                _mark_least(axes, strengths, values, colour)
            _draw_checks(axes, [check for check in checks if check.samples == samples], metric, colour)
        if metric == "entropy":
            axes.axhline(true_entropy, color="grey", linestyle="--", linewidth=1, label="a true class")
        if name == "gamma":
            axes.set_xscale("symlog", linthresh=0.01, linscale=0.4)
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    marks = "●: the least" + (", +: full matrices" if checks else "") + ("\n▽: flipped once" if name == "eta" else "")
    panels[1].legend(title=marks, fontsize=8, title_fontsize=8, loc="lower right")
    panels[2].legend(handles=panels[2].get_lines()[-1:], fontsize=8)
    _save(panels, path)


def least_inside(values: Sequence[float]) -> int | None:
    """The place of the least value; None where it is the last: a curve that is cut there may go on to fall."""
    place = min(range(len(values)), key=values.__getitem__)
    return None if place == len(values) - 1 else place


def _mark_least(axes, strengths: Sequence[float], values: Sequence[float], colour: str) -> None:
    place = least_inside(values)
    if place is not None:
        axes.plot(strengths[place], values[place], "o", color=colour, clip_on=False)


def _draw_checks(axes, checks: Sequence[Average], metric: str, colour: str) -> None:
    for marker, once in (("+", False), ("v", True)):
        own = [check for check in checks if (check.how == "eta_fixed") == once]
        if metric == "w2":
            values = [math.sqrt(check.squared_w2) for check in own]
            errors = [check.squared_w2_error / value for check, value in zip(own, values, strict=True)]
        elif metric == "entropy":
            values, errors = [check.entropy for check in own], [2 * check.entropy_error for check in own]
        else:
            return
        style = {"color": colour, "markersize": 6, "markerfacecolor": "none", "alpha": 0.8}
        axes.errorbar([check.strength for check in own], values, errors, fmt=marker, **style)


def draw_best(path: Path, points: Sequence[BestPoint], over: str, label: str) -> None:
    """The best γ and η, the share of the squared W2 that they take away, and W2 and entropy with and without them,
    over n or d.

    Args:
        points: of one sweep. over: `samples` or `dim`. label: of the horizontal axis.
    """
    panels = _panels(4)
    names = {"gaussian": "γ, Gaussian ξ", "uniform": "γ, uniform ξ", "eta": "η, label flips"}
    # The first is wide, for the second often lies on it.
    for colour, width, (how, title) in zip(COLOURS, (4.5, 2, 2), names.items(), strict=False):
        own = [point for point in points if point.how == how]
        places = [getattr(point, over) for point in own]
        lines = (
            [point.best for point in own],
            [100 * point.gain for point in own],
            [math.sqrt(point.squared_w2) for point in own],
            [point.entropy - point.true_entropy for point in own],
        )
        for axes, values in zip(panels, lines, strict=True):
            axes.plot(places, values, "o-", color=colour, label=title, linewidth=width, markersize=4)
    without = {"color": "black", "linestyle": "--", "label": "without corruption"}
    panels[2].plot(places, [math.sqrt(point.without) for point in own], **without)
    panels[3].plot(places, [point.entropy_without - point.true_entropy for point in own], **without)
    titles = ("best strength", "squared W2 taken away [%]", LABELS["w2"], "entropy less a true class's [nats]")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xscale("log")
        if over == "samples" and "entropy" not in title:
            axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=8)
    panels[2].legend(fontsize=8)
    _save(panels, path)


def draw_guidance(path: Path, points: Sequence[GuidedPoint], noise: str) -> None:
    """W2 to the truth over γ, of that noise, and over η, of each class and of all classes pooled, a line per guidance
    scale, with the least marked."""
    panels = _panels(4)
    labels = {noise: f"γ, {noise} ξ", "eta": "η, share of flipped labels"}
    of_whom = {"w2": LABELS["w2"], "pooled_w2": "W2, all classes pooled"}
    for axes, (metric, how) in zip(panels, itertools.product(of_whom, labels), strict=True):
        for colour, scale in zip(COLOURS, sorted({point.guidance_scale for point in points}), strict=False):
            own = [point for point in points if (point.how, point.guidance_scale) == (how, scale)]
            strengths, values = [point.strength for point in own], [getattr(point, metric) for point in own]
            axes.plot(strengths, values, color=colour, label=f"{scale:g}")
            _mark_least(axes, strengths, values, colour)
        if how == noise:
            axes.set_xscale("symlog", linthresh=0.01, linscale=0.4)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(labels[how])
        axes.set_ylabel(of_whom[metric])
        axes.grid(alpha=0.3)
    panels[1].legend(title="guidance scale", fontsize=8, title_fontsize=8)
    _save(panels, path)


def draw_map(path: Path, points: Sequence[BestPoint]) -> None:
    """The share of the squared W2 that the best γ takes away, over n and the separation of the classes."""
    panels = _panels(1, width=5.0)
    samples = sorted({point.samples for point in points})
    separations = sorted({point.separation for point in points})
    gains = {(point.separation, point.samples): 100 * point.gain for point in points}
    values = [[gains[separation, count] for count in samples] for separation in separations]
    levels = [0.03, 0.1, 0.3, 1, 3, 10, 30, 60]
    shades = panels[0].contourf(samples, separations, values, levels, norm="log", cmap="viridis", extend="both")
    lines = panels[0].contour(samples, separations, values, levels, colors="white", linewidths=0.8)
    panels[0].clabel(lines, fmt="%g %%", fontsize=8)
    panels[0].figure.colorbar(shades, ax=panels[0], label="squared W2 taken away [%]", format="%g")
    panels[0].set_xscale("log")
    panels[0].set_yscale("log")
    for axis, places in ((panels[0].xaxis, samples), (panels[0].yaxis, separations)):
        axis.set_ticks(places, [f"{place:g}" for place in places], fontsize=8)
        axis.set_ticks([], minor=True)
    panels[0].set_xlabel("n, samples of each class")
    panels[0].set_ylabel("separation of the classes")
    _save(panels, path)


def _panels(columns: int, width: float = 3.6) -> list:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    return list(figure.subplots(1, columns, squeeze=False).flat)


def _save(panels: Sequence, path: Path) -> None:
    beside = path.with_name(path.name + ".part")
    panels[0].figure.savefig(beside, dpi=120, format="png", metadata={"Software": None})
    beside.replace(path)
