"""How the figures of a study are drawn: panels of lines or rows of points, in colours and markers that all readers
tell apart, as small PNG files of the same bytes every time.

matplotlib is imported where it is used, and without pyplot: nothing outside a figure is changed.
"""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from noisycond.pictures import plain_numbers
from noisycond.study.figure_data import Line, Point
from noisycond.study.methods import Method
from noisycond.study.montage import MOST_BYTES, png, write_picture


WIDTH = 8.4  # inches; at 120 dots per inch shown at 700 pixels, a letter of 10 points is 12 pixels high
NARROW = 5.6  # of a single panel
DPI = (120, 100, 80, 60)
# Okabe and Ito's palette for all kinds of colour vision, without its yellow, which white swallows; black is clean's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CLEAN = "#000000"
MARKERS = "osD^vP*X<>"
RAMPS = {  # from weak to strong: name of the colours, and the part of them that is told from white and from black
    "corruption": ("viridis_r", 0.15, 0.88),
    "uniform": ("Blues", 0.45, 1.0),
    "gaussian": ("Oranges", 0.42, 0.9),
}


@dataclass(frozen=True)
class Panel:
    """One metric over something.

    Attributes:
        heading: the vertical axis, with the unit. lines: with markers and bars.
        levels: single points that are drawn across the panel, by title: what does not vary along the axis.
    """

    heading: str
    lines: Sequence[Line]
    levels: Mapping[str, Point] = field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """The axes of all panels.

    Attributes:
        label, log: of the horizontal one. ticks: they stand at its points, where these are few.
        wide: the vertical one is logarithmic where values differ by more than a factor of ten.
        measured: the horizontal one is a metric, too: points stand where they are, and have bars along both; all
            panels have one scale of each, and the first line's points their guidance scale.
    """

    label: str
    log: bool = False
    ticks: bool = True
    wide: bool = False
    measured: bool = False


@dataclass(frozen=True)
class Dot:
    """A value with how far its bar reaches below and above, and values of single seeds beside it."""

    value: float
    below: float = 0.0
    above: float = 0.0
    seeds: Sequence[float] = ()
    filled: bool = True
    colour: object = None  # None: the series'


@dataclass(frozen=True)
class DotPanel:
    """One metric of several cells, a row each.

    Attributes:
        series: by name, of each row a dot or None. clean: drawn across all rows.
    """

    heading: str
    series: Mapping[str, Sequence[Dot | None]]
    clean: Point | None = None


Style = Mapping[str, object]


def cell_styles(cells: Mapping[str, Method]) -> dict[str, Style]:
    """Colour and marker of each cell by title, for all figures of a study: clean is black; corruptions and each type
    of CEP go from light to dark by their strength, on one scale each; what has neither takes the palette's next
    colour. What is not in the usual mode or type has a line of its own kind."""
    scales: dict[str, list[float]] = {}
    for method in cells.values():
        if method.strength > 0:
            scales.setdefault(method.kind, []).append(method.strength)
    palette, markers = itertools.cycle(COLOURS[2:]), itertools.cycle(MARKERS)
    styles: dict[str, Style] = {}
    for title, method in cells.items():
        ramp = RAMPS.get(method.type if method.kind == "cep" else method.kind)
        if method.kind == "clean":
            colour = CLEAN
        elif ramp is None or method.strength == 0:
            colour = next(palette)
        else:
            colour = _on_ramp(*ramp, _share(method.strength, scales[method.kind]))
        styles[title] = _style(method, colour, next(markers))
    return styles


def family_styles(lines: Sequence[Line]) -> dict[str, Style]:
    """Colour and marker of each line over strengths, by title: CEP-U blue, CEP-G orange, corruptions in the palette's
    order."""
    palette, markers = itertools.cycle(COLOURS), itertools.cycle(MARKERS)
    own = {"uniform": COLOURS[0], "gaussian": COLOURS[1]}
    return {
        line.title: _style(line.method, own.get(line.method.type) or next(palette), next(markers))
        for line in {line.title: line for line in lines}.values()  # of several panels
    }


def _style(method: Method, colour: object, marker: str) -> Style:
    unusual = method.mode == {"corruption": "random", "cep": "fixed"}.get(method.kind)
    kinds = {(False, False): "-", (True, False): ":", (False, True): "--", (True, True): "-."}
    return {
        "color": colour,
        "marker": marker,
        "linestyle": kinds[unusual, method.type in ("gaussian", "asymmetric")],
        "linewidth": 1.8 if method.kind == "clean" else 1.2,
        "markersize": 4.5,
    }


def _share(strength: float, strengths: Sequence[float]) -> float:
    """Where a strength stands among those that there are, in equal steps from 0 to 1."""
    steps = sorted(set(strengths))
    return steps.index(strength) / (len(steps) - 1) if len(steps) > 1 else 0.5


def draw_lines(
    rows: Sequence[Sequence[Panel]],
    axis: Axis,
    styles: Mapping[str, Style],
    note: str,
    path: Path,
    *,
    single_seeds: bool = False,
    bands: bool = False,
    legend_per_row: bool = False,
) -> None:
    """Panels of lines in rows, to a PNG.

    Args:
        styles: of lines and levels, by title. note: what bars are, in small print below.
        single_seeds: small points for the seeds. bands: bands for bars. legend_per_row: beside each row; else one
            above all.
    """
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    size = (WIDTH if columns > 1 or legend_per_row else NARROW, len(rows) * (2.3 if columns > 2 else 2.9) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    shared = {"sharex": axis.measured, "sharey": axis.measured}
    grid = figure.subplots(len(rows), columns, squeeze=False, **shared)
    for panels, places in zip(rows, grid, strict=True):
        for axes in places[len(panels) :]:
            axes.remove()
        for panel, axes in zip(panels, places, strict=False):
            _draw_panel(axes, panel, axis, styles, single_seeds, bands)
        if legend_per_row:
            handles, titles = _handles(places[: len(panels)])
            place = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
            places[len(panels) - 1].legend(handles, titles, fontsize=9, frameon=False, **place)
    for column in range(columns):  # below the lowest panel of each column
        lowest = max(number for number, panels in enumerate(rows) if len(panels) > column)
        grid[lowest][column].set_xlabel(axis.label, fontsize=10)
    if not legend_per_row:
        shown = [axes for panels, places in zip(rows, grid, strict=True) for axes in places[: len(panels)]]
        _legend_above(figure, *_handles(shown))
    _finish(figure, note, path)


def draw_dots(panels: Sequence[DotPanel], titles: Sequence[str], note: str, path: Path) -> None:
    """Panels side by side with a row for each cell, to a PNG.

    Args:
        titles: of the rows, from above. note: as in [`draw_lines`].
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 1.3 + 0.36 * len(titles)), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, axes in zip(panels, grid, strict=True):
        if panel.clean:
            _draw_level(axes.axvline, axes.axvspan, panel.clean, "clean", CLEAN)
        for number, (name, dots) in enumerate(panel.series.items()):
            beside = 0.3 * (number - (len(panel.series) - 1) / 2)
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number]}
            _draw_dots(axes, dots, beside, name, style)
        axes.set_yticks(range(len(titles)), titles, fontsize=10)
        axes.set_ylim(len(titles) - 0.5, -0.5)
        axes.set_title(panel.heading, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        axes.margins(x=0.08)
        axes.tick_params(axis="x", labelsize=9)
        axes.grid(alpha=0.3)
    handles, names = _handles(grid)
    if len(names) > 1:
        _legend_above(figure, handles, names)
    _finish(figure, note, path)


def _draw_panel(axes, panel: Panel, axis: Axis, styles: Mapping[str, Style], single_seeds: bool, bands: bool) -> None:
    places = sorted({point.x for line in panel.lines for point in line.points})
    spread = any(point.spread for line in panel.lines for point in line.points)
    apart = spread and not bands and not axis.measured
    move = _beside(places, len(panel.lines), axis.log) if apart else lambda x, number: x
    for number, line in enumerate(panel.lines):
        style = dict(styles[line.title])
        xs = [move(point.x, number) for point in line.points]
        means, spreads = [point.mean for point in line.points], [point.spread for point in line.points]
        if bands:
            low, high = zip(*((mean - by, mean + by) for mean, by in zip(means, spreads, strict=True)), strict=True)
            axes.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)
            axes.plot(xs, means, label=line.title, **style)
        else:
            bars = [by or math.nan for by in spreads] if spread else None
            across = [point.x_spread or math.nan for point in line.points] if axis.measured and spread else None
            axes.errorbar(xs, means, bars, across, label=line.title, capsize=2, elinewidth=0.9, **style)
        if axis.measured and number == 0:
            for point in line.points:
                place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8, "color": "dimgray"}
                axes.annotate(f"{point.scale:g}", (point.x, point.mean), **place)
        if single_seeds:
            for x, point in zip(xs, line.points, strict=True):
                if len(point.values) > 1:
                    small = {"color": style["color"], "s": 7, "alpha": 0.45, "linewidths": 0, "zorder": 1.5}
                    axes.scatter([x] * len(point.values), point.values, **small)
    for title, level in panel.levels.items():
        _draw_level(axes.axhline, axes.axhspan, level, title, styles[title]["color"])
    _label(axes, panel, axis, places)


def _label(axes, panel: Panel, axis: Axis, places: Sequence[float]) -> None:
    if axis.measured:
        axes.set_ylabel(panel.heading, fontsize=10)
    else:
        axes.set_title(panel.heading, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    means = [point.mean for line in panel.lines for point in line.points]
    if axis.wide and min(means) > 0 and max(means) > 10 * min(means):
        axes.set_yscale("log")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks(plain_numbers())
        axes.grid(alpha=0.15, which="minor")
    else:
        axes.locator_params(axis="y", nbins=6)
    if axis.log:
        axes.set_xscale("log")
    if axis.ticks and _apart(places, axis.log):
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_xticks([], minor=True)


def _apart(places: Sequence[float], log: bool) -> bool:
    """Whether a label fits under each of the places."""
    positions = [math.log(place) if log else place for place in places]
    span = positions[-1] - positions[0]
    return all(after - before >= 0.085 * span for before, after in itertools.pairwise(positions))


def _beside(places: Sequence[float], count: int, log: bool) -> Callable[[float, int], float]:
    """Moves the lines' points a little beside one another, so that bars do not hide each other."""
    to, back = (math.log, math.exp) if log else (float, float)
    gaps = [to(after) - to(before) for before, after in itertools.pairwise(places)]
    step = min(0.06, 0.35 / max(1, count)) * min(gaps, default=0.0)
    return lambda x, number: back(to(x) + step * (number - (count - 1) / 2))


def _draw_level(line: Callable, span: Callable, level: Point, title: str, colour: object) -> None:
    """A line across the panel, dashed if it is clean's, and the band of the spread."""
    look = {"linestyle": "--", "linewidth": 1.2} if colour == CLEAN else {"linewidth": 0.9}
    line(level.mean, label=title, color=colour, zorder=1.2, **look)
    if level.spread:
        low, high = level.mean - level.spread, level.mean + level.spread
        span(low, high, color=colour, alpha=0.1, linewidth=0, zorder=1)


def _draw_dots(axes, dots: Sequence[Dot | None], beside: float, name: str, style: Style) -> None:
    label = name if all(dot is None or dot.colour is None for dot in dots) else "_nolegend_"
    for row, dot in enumerate(dots):
        if dot is None:
            continue
        bar = {"xerr": [[dot.below], [dot.above]], "capsize": 3, "elinewidth": 1} if dot.below or dot.above else {}
        colour = style["color"] if dot.colour is None else dot.colour
        inside = colour if dot.filled else "white"
        look = {"linestyle": "", "markersize": 5.5, "marker": style["marker"], "color": colour, "mfc": inside}
        axes.errorbar(dot.value, row + beside, label=label, **bar, **look)
        label = "_nolegend_"
        small = {"color": colour, "s": 7, "alpha": 0.5, "linewidths": 0, "zorder": 1.5}
        axes.scatter(dot.seeds, [row + beside] * len(dot.seeds), **small)


def _handles(panels: Sequence) -> tuple[list, list[str]]:
    """What stands in the legends of all panels, once; what runs across panels comes last."""
    found = {}
    for axes in panels:
        for handle, title in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(title, handle)
    across = [
        title for title, handle in found.items() if hasattr(handle, "get_marker") and handle.get_marker() == "None"
    ]
    titles = [*(title for title in found if title not in across), *across]
    return [found[title] for title in titles], titles


def _legend_above(figure, handles: Sequence, titles: Sequence[str]) -> None:
    fitting = int(figure.get_figwidth() // (0.085 * max(map(len, titles)) + 0.65))
    # As many in each line, not one left over in the last.
    lines = -(-len(titles) // max(1, fitting))
    columns = -(-len(titles) // lines)
    figure.legend(handles, titles, fontsize=10, frameon=False, loc="outside upper center", ncols=columns)


def _on_ramp(name: str, start: float, end: float, share: float) -> tuple[float, ...]:
    import matplotlib

    return matplotlib.colormaps[name](start + (end - start) * share)


def _finish(figure, note: str, path: Path) -> None:
    figure.supxlabel(note, fontsize=9, color="dimgray")
    for dpi in DPI:
        file = io.BytesIO()
        figure.savefig(file, dpi=dpi, format="png")
        # So many colours hold what has a few and the shades of their edges, in a third of the bytes.
        content = png(Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE))
        if len(content) <= MOST_BYTES:
            break
    write_picture(content, path)
