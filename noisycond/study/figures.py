"""The figures of a study, those of arXiv:2405.20494 as far as its results go: each with a caption that says what is
drawn, and a text for those who do not see it."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pandas import DataFrame
from PIL import Image

from noisycond.evaluation.metrics import METRICS
from noisycond.markdown import listed
from noisycond.study import figure_data as data
from noisycond.study import figure_words as words
from noisycond.study import selection
from noisycond.study.figure_data import Difference, Line, Pair, Point
from noisycond.study.figure_drawing import (
    Axis,
    Dot,
    DotPanel,
    Panel,
    Style,
    cell_styles,
    draw_dots,
    draw_lines,
    family_styles,
)
from noisycond.study.methods import Method
from noisycond.study.montage import montage, png, write_picture
from noisycond.study.selection import Cells


if TYPE_CHECKING:
    from noisycond.study.results import Results


QUALITY = ("fid", "inception_score", "clip_score")
DIFFICULTY = ("rmd_top", "rmd_mean", "entropy")
OVER_GUIDANCE = tuple(name for name in METRICS if name not in DIFFICULTY)
TRADED = ("precision", "recall")
GAMMA = ("fid", "recall", "entropy")
COMPARED = ("fid", "inception_score", "precision", "recall")
CONCLUSIVE = ("better", "worse", "higher", "lower")
# Of files: what an earlier call may have left.
NAMES = (
    *("fid_is_over_eta", "metrics_over_guidance", "metrics_over_guidance_cep", "gamma_ablation", "regularizers"),
    *("difficulty_and_entropy_over_guidance", "precision_over_recall", "fixed_against_random", "fid_over_steps"),
    "samples",
)


@dataclass(frozen=True)
class Figure:
    """A picture with its words.

    Attributes:
        name: of the file, without its ending. path: of the PNG, of at most 200 KB.
        caption: what is shown, over how many seeds, what bars are, at which guidance scale.
        alt: what is drawn, with the main numbers, in place of the picture. block: of its cells.
    """

    name: str
    title: str
    caption: str
    path: Path
    alt: str
    block: str = ""


@dataclass(frozen=True)
class _Block:
    """What is drawn of one block, and where to.

    Attributes:
        cells: of different methods; left_out: the labels of the others.
        modes: labels of cells that differ in the mode alone, fixed and random.
        final, steps: values after and during training. compared: what `compare` says of the final ones.
        runs: all of them. scale: the guidance scale of figures at one; at_scale: final values there.
        decided: what a seed decides. styles: of the study's cells, by title.
    """

    name: str
    cells: Cells
    left_out: Sequence[str]
    modes: Sequence[tuple[str, str]]
    final: DataFrame
    steps: DataFrame
    compared: DataFrame
    scale: float | None
    at_scale: DataFrame
    runs: Sequence[dict]
    decided: str
    styles: Mapping[str, Style]
    folder: Path

    @property
    def clean(self) -> Cells:
        return selection.clean_of(self.cells)

    def point(self, cell: str | None, metric: str) -> Point | None:
        return data.point(self.at_scale, cell, metric)

    def clean_level(self, metric: str) -> dict[str, Point]:
        found = {self.cells[cell].title: self.point(cell, metric) for cell in self.clean}
        return {title: level for title, level in found.items() if level}

    def bars(self, counts: set[int], **more: str) -> str:
        return words.bars(counts, self.decided, **more)

    def figure(self, name: str, title: str, caption: Sequence[str], alt: str) -> Figure:
        """The words of a figure, of sentences; what is drawn goes to its path."""
        file = _file(name, self.name)
        if self.left_out:
            caption = [
                *caption,
                f"Cells of a method that another one shows are not drawn: {', '.join(self.left_out)}.",
            ]
        title = f"{title}: {self.name}" if self.name else title
        return Figure(file, title, " ".join(filter(None, caption)), self.folder / f"{file}.png", alt, self.name)


def draw_figures(results: "Results", summary: DataFrame, folder: str | Path) -> list[Figure]:
    """Draws what a study has the data for, block by block, to PNG files; the rest is left out, and removed where an
    earlier call drew it.

    Args:
        results: those of `noisycond.study.results`. summary: what `noisycond.study.statistics.compare` says of their
            values. folder: made where it is not there.

    Returns:
        The figures in the order of a report. The same results make files of the same bytes.
    """
    folder, styles = (
        Path(folder),
        cell_styles({_title(cell.label, cell.method): cell.method for cell in results.study.cells}),
    )
    blocks = [_block(results, summary, name, styles, folder) for name in results.study.blocks]
    kinds = (
        _over_eta,
        _corruption_over_guidance,
        _cep_over_guidance,
        _difficulty_over_guidance,
        _precision_over_recall,
        _gamma_ablation,
        _regularizers,
        _fixed_against_random,
        _over_steps,
        _samples,
    )
    figures = [figure for draw in kinds for block in blocks for figure in draw(block)]
    drawn = {figure.path for figure in figures}
    names = [*NAMES, *(f"{name}_{cell.method.type}" for name in NAMES for cell in results.study.cells)]
    for path in {folder / f"{_file(name, block)}.png" for name in names for block in results.study.blocks} - drawn:
        path.unlink(missing_ok=True)
    return figures


def _file(name: str, block: str) -> str:
    """What a figure's file is called, without its ending."""
    return f"{name}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', block)}" if block else name


def _title(cell: str, method: Method) -> str:
    """What a cell is called in figures: mixed methods by their labels."""
    return cell if method.kind == "mixed" else method.title


def _block(results: "Results", summary: DataFrame, name: str, styles: Mapping[str, Style], folder: Path) -> _Block:
    values = results.values[results.values["block"] == name]
    values = values[np.isfinite(values["value"].astype(float))]
    runs = [run for run in results.runs if run["block"] == name]
    there = {*values["cell"], *(run["cell"] for run in runs if _has_picture(run))}
    named = [(cell.label, cell.method) for cell in results.study.cells if cell.block == name and cell.label in there]
    final, steps = data.final(values), values[values["step"].notna()]
    compared = summary[(summary["block"] == name) & summary["step"].isna()]
    scale = data.one_scale(final, results.study.report_guidance_scale)
    cells, left_out = data.distinct(named)
    return _Block(
        name,
        cells,
        left_out,
        [pair for pair in selection.pairs_of_modes(named) if cells.keys() >= set(pair)],
        final,
        steps,
        compared,
        scale,
        data.at_scale(final, scale),
        runs,
        selection.seeds_decide(results.study),
        styles,
        folder,
    )


def _has_picture(run: Mapping) -> bool:
    return bool(run["samples"]) and Path(run["samples"]).is_file()


def _over_eta(block: _Block) -> Iterator[Figure]:
    panels, constant = _with_lines(
        QUALITY, lambda name: data.lines_over_eta(block.at_scale, block.cells, name), block.clean_level
    )
    if not panels:
        return
    lines = _lines(panels)
    counts, what = words.counts(lines), words.titles(panels)
    dashed = "Dashed: the clean model's mean" + (", its spread as a band." if max(counts) > 1 else ".")
    from_clean = "; η = 0 is clean" if any(point.x == 0 for line in lines for point in line.points) else ""
    where = words.at_scale(block.scale)
    figure = block.figure(
        "fid_is_over_eta",
        f"{what} over the corruption ratio",
        [
            f"{what}{where} over the corruption ratio η, a line for each type and mode of corruption{from_clean}.",
            block.bars(counts, small="small points: the single seeds"),
            dashed if any(panel.levels for panel in panels.values()) else "",
            constant,
        ],
        words.all_numbers(panels, "η = {:g} %"),
    )
    axis, note = Axis("corruption ratio η [%]"), words.note(counts, block.scale)
    styles = family_styles(lines) | {title: block.styles[title] for title in _levels(panels)}
    draw_lines([list(panels.values())], axis, styles, note, figure.path, single_seeds=True)
    yield figure


def _corruption_over_guidance(block: _Block) -> Iterator[Figure]:
    yield from _corruptions_over_guidance(block, OVER_GUIDANCE, "metrics_over_guidance", "Metrics over guidance")


def _difficulty_over_guidance(block: _Block) -> Iterator[Figure]:
    name, title = "difficulty_and_entropy_over_guidance", "Difficulty and entropy over guidance"
    yield from _corruptions_over_guidance(block, DIFFICULTY, name, title)


def _corruptions_over_guidance(block: _Block, metrics: Sequence[str], name: str, title: str) -> Iterator[Figure]:
    """A figure for each type of corruption, in its main mode."""
    families = data.of_main_mode(block.cells, "corruption")
    for number, (how, family) in enumerate(families.items()):
        own = f"_{how.type}" if number else ""
        titled = f"{title}, {how.type} corruption" if len(families) > 1 else title
        yield from _over_guidance(block, family, metrics, name + own, titled, f"for each η of {words.of(how)}")


def _cep_over_guidance(block: _Block) -> Iterator[Figure]:
    families = data.of_main_mode(block.cells, "cep")
    cells = {cell: method for family in families.values() for cell, method in family.items()}
    title = "Metrics over guidance, condition embedding perturbation"
    what = f"for each γ of CEP{words.mode_of(families)}"
    yield from _over_guidance(block, cells, OVER_GUIDANCE, "metrics_over_guidance_cep", title, what)


def _over_guidance(
    block: _Block, family: Cells, metrics: Sequence[str], name: str, title: str, what: str
) -> Iterator[Figure]:
    """A panel for each metric, with a line for each cell of a family and for clean."""
    cells = block.clean | family
    panels, constant = _with_lines(
        metrics, lambda name: data.lines_of_cells(block.final, cells, name, "guidance_scale")
    )
    lines = _lines(panels)
    if not _beyond_clean(lines):
        return
    counts, first = words.counts(lines), next(iter(panels))
    figure = block.figure(
        name,
        title,
        [
            f"{words.titles(panels)} over the guidance scale: a line {what}{_and_clean(lines)}.",
            block.bars(counts),
            "Points stand a little beside their guidance scale, so that bars do not hide each other."
            if max(counts) > 1
            else "",
            constant,
        ],
        f"Panels of {words.titles(panels)}. {words.best_numbers(first, panels[first].lines, 'guidance')}",
    )
    rows = _in_rows(list(panels.values()), 3)
    draw_lines(rows, Axis("guidance scale"), block.styles, words.note(counts), figure.path)
    yield figure


def _precision_over_recall(block: _Block) -> Iterator[Figure]:
    """What guidance trades for what: a gain at one guidance scale may be what another scale would have given, too."""
    precision, recall = TRADED
    rows = []
    for group in data.groups(block.cells):
        lines = data.lines_of_two(block.final, block.clean | group, precision, recall)
        if _beyond_clean(lines):
            rows.append([Panel(words.heading(precision), lines)])
    if not rows:
        return
    lines = list({line.title: line for row in rows for line in row[0].lines}.values())
    counts, numbered = words.counts(lines), "of the clean model" if _and_clean(lines) else f"of {lines[0].title}"
    figure = block.figure(
        "precision_over_recall",
        "Precision over recall",
        [
            f"Precision over recall, a line for each cell{_and_clean(lines)}"
            + (" in every row" if len(rows) > 1 and _and_clean(lines) else "")
            + f", from guidance scale to guidance scale; the numbers are those {numbered}. Higher and further to the "
            "right is better; what acts as more or less guidance would, moves along a line.",
            block.bars(counts, word="bars along both axes"),
        ],
        words.trade_numbers(precision, recall, lines),
    )
    axis = Axis(words.heading(recall), ticks=False, measured=True)
    draw_lines(rows, axis, block.styles, words.note(counts), figure.path, legend_per_row=True)
    yield figure


def _gamma_ablation(block: _Block) -> Iterator[Figure]:
    how, corrupted = next(iter(data.families(block.cells, "corruption").items()), (Method("corruption"), {}))

    def levels(metric: str) -> dict[str, Point]:
        # The spread of so many levels would hide all else: clean's alone is drawn.
        found = {method.title: block.point(cell, metric) for cell, method in corrupted.items()}
        means = {title: Point(level.x, (level.mean,)) for title, level in found.items() if level}
        return block.clean_level(metric) | means

    panels, constant = _with_lines(
        GAMMA, lambda name: data.lines_over_gamma(block.at_scale, block.cells, name), levels
    )
    lines = _lines(panels)
    gammas = {point.x for line in lines for point in line.points}
    if len(gammas) < 2:
        return
    counts, what = words.counts(lines), words.titles(panels)
    across = _levels(panels)
    against = ["clean"] * ("clean" in across) + [f"each η of {words.of(how)}"] * (len(across) > ("clean" in across))
    small = "of clean a band" * ("clean" in across) + ", of η the mean alone" * (len(across) > 1)
    types = {line.method.type for line in lines}
    modes, first = words.mode_of(line.method for line in lines), dict([next(iter(panels.items()))])
    figure = block.figure(
        "gamma_ablation",
        "Strength of condition embedding perturbation",
        [
            f"{what}{words.at_scale(block.scale)} over γ of CEP{modes}.",
            f"Across: {listed(against)}." if against else "",
            block.bars(counts, small=small),
            "At equal γ the standard deviation of CEP-G's perturbation is √3 times that of CEP-U's."
            if types >= {"uniform", "gaussian"}
            else "",
            constant,
        ],
        f"{words.all_numbers(first, 'γ = {:g}')} {words.level_numbers(first)}",
    )
    styles = family_styles(lines) | {title: block.styles[title] for title in across}
    axis = Axis("γ", log=max(gammas) >= 8 * min(gammas))
    note = words.note(counts, block.scale)
    draw_lines([list(panels.values())], axis, styles, note, figure.path)
    yield figure


def _regularizers(block: _Block) -> Iterator[Figure]:
    titles = data.regularizers(block.at_scale, block.cells)
    compared = data.at_scale(block.compared, block.scale)
    found = {name: data.differences(compared, list(titles), name) for name in COMPARED}
    equal = [name for name, each in found.items() if each and not any(one.mean or one.low == one.low for one in each)]
    found = {name: each for name, each in found.items() if each and name not in equal}
    shown = {each.cell for differences in found.values() for each in differences}
    cells = [cell for cell in titles if cell in shown]
    if len(cells) < 2:
        return
    pairs = {each.pairs for differences in found.values() for each in differences}
    first, where = next(iter(found)), words.at_scale(block.scale)
    figure = block.figure(
        "regularizers",
        "Regularizers against clean",
        [
            f"{words.titles(found)} of each method minus those of the clean model{where}: mean over "
            f"{words.seeds(pairs)}, of {block.decided}"
            + (
                ", bars: 95 % t intervals, paired by seed, each by itself."
                if max(pairs) > 1
                else ", without intervals."
            ),
            "Points are filled where the tables mark a difference, by p adjusted over all cells and guidance scales, "
            "and hollow where it is inconclusive."
            if max(pairs) > 1
            else "",
            "The arrow points to the better side; dashed: no difference.",
            f"Not drawn, for none differs from clean: {words.titles(equal)}." if equal else "",
        ],
        words.difference_numbers(first, found[first], titles),
    )
    panels = []
    for name, differences in found.items():
        dots = {
            each.cell: _dot_of_difference(each, block.styles[block.cells[each.cell].title]) for each in differences
        }
        rows = {"difference from clean": [dots.get(cell) for cell in cells]}
        panels.append(DotPanel(f"Δ {words.heading(name)}", rows, Point(0.0, (0.0,))))
    interval = "mean difference, 95 % t interval over " if max(pairs) > 1 else ""
    note = f"{interval}{words.seeds(pairs)}{where.replace(' at', ',')}"
    draw_dots(panels, [titles[cell] for cell in cells], note, figure.path)
    yield figure


def _fixed_against_random(block: _Block) -> Iterator[Figure]:
    pairs = {name: data.points_of_modes(block.at_scale, block.cells, block.modes, name) for name in COMPARED}
    pairs = {name: found for name, found in pairs.items() if found}
    constant = {name: value for name, found in pairs.items() if (value := _only_value(found)) is not None}
    pairs = {name: found for name, found in pairs.items() if name not in constant}
    if not pairs:
        return
    titles = list(dict.fromkeys(pair.title for found in pairs.values() for pair in found))
    counts = {len(each.values) for found in pairs.values() for pair in found for each in (pair.fixed, pair.random)}
    first = next(iter(pairs))
    levels = {name: next(iter(block.clean_level(name).values()), None) for name in pairs}
    dashed = "Dashed: the clean model" + (", its spread as a band." if max(counts) > 1 else ".")
    figure = block.figure(
        "fixed_against_random",
        "Fixed against random",
        [
            f"{words.titles(pairs)}{words.at_scale(block.scale)} of what was run in both modes: an example is "
            "corrupted or perturbed in the same way in every epoch (fixed), or anew (random).",
            block.bars(counts, small="small points: the single seeds"),
            "Differences random − fixed, paired by seed, stand in the table." if max(counts) > 1 else "",
            dashed if any(levels.values()) else "",
            words.constants(constant),
        ],
        words.pair_numbers(first, pairs[first]),
    )
    panels = []
    for name, found in pairs.items():
        by_title = {pair.title: pair for pair in found}
        rows = [by_title.get(title) for title in titles]
        dots = {
            "fixed": [pair and _dot(pair.fixed) for pair in rows],
            "random": [pair and _dot(pair.random) for pair in rows],
        }
        panels.append(DotPanel(words.heading(name), dots, levels[name]))
    draw_dots(panels, titles, words.note(counts, block.scale), figure.path)
    yield figure


def _over_steps(block: _Block) -> Iterator[Figure]:
    scale = data.one_scale(block.steps, block.scale)
    values = data.at_scale(block.steps, scale)
    metrics = data.metrics_in(values, block.cells, list(dict.fromkeys([*QUALITY, *METRICS])))[:2]
    rows, constants = [], set()
    lined = {cell for metric in metrics for cell in block.cells if data.points_over(values, cell, metric, "step")[1:]}
    for group in data.groups({cell: method for cell, method in block.cells.items() if cell in lined}):
        panels, constant = _with_lines(
            metrics, lambda name, shown=block.clean | group: data.lines_of_cells(values, shown, name, "step")
        )
        constants.add(constant)
        if _beyond_clean(_lines(panels)):
            rows.append(panels)
    if not rows:
        return
    lines = [line for panels in rows for line in _lines(panels)]
    counts, what = words.counts(lines), words.titles(metrics)
    of_first = {line.title: line for panels in rows if metrics[0] in panels for line in panels[metrics[0]].lines}
    figure = block.figure(
        "fid_over_steps",
        f"{what} during training",
        [
            f"{what}{words.at_scale(scale)} over the optimizer steps, a line for each cell{_and_clean(lines)}"
            + (" in every row." if len(rows) > 1 and _and_clean(lines) else "."),
            block.bars(counts, word="bands"),
            words.curve_choices([run.get("curve_choices", {}) for run in block.runs]),
            *sorted(constants),
        ],
        words.last_numbers(metrics[0], list(of_first.values())),
    )
    panels = [list(row.values()) for row in rows]
    options = {"bands": True, "legend_per_row": True}
    note = words.note(counts, scale)
    draw_lines(panels, Axis("optimizer step", ticks=False, wide=True), block.styles, note, figure.path, **options)
    yield figure


def _samples(block: _Block) -> Iterator[Figure]:
    runs = data.sample_runs([run for run in block.runs if _has_picture(run)], block.cells)
    if not runs:
        return
    titles = [block.cells[run["cell"]].title for run in runs]
    pictures = []
    for title, run in zip(titles, runs, strict=True):
        with Image.open(run["samples"]) as picture:
            pictures.append((title, picture.convert("RGB")))
    whole, scale = montage(pictures)
    size = "" if abs(scale) == 1 else f"Pixels are {'enlarged' if scale > 0 else 'reduced'} by {abs(scale)}."
    figure = block.figure(
        "samples",
        "Samples",
        [
            f"Samples of {listed(titles)}{words.at_scale(runs[0].get('samples_scale'))}, all of seed "
            f"{runs[0]['seed']}; the same place in each is the same condition and the same starting noise.",
            size,
        ],
        f"Samples of {listed(titles)}, beside one another.",
    )
    write_picture(png(whole), figure.path)
    yield figure


def _with_lines(metrics: Sequence[str], lines_of, levels_of=lambda metric: {}) -> tuple[dict[str, Panel], str]:
    """A panel for each metric that has a line and varies, and a sentence on those that do not vary."""
    found = {metric: lines_of(metric) for metric in metrics}
    panels = {
        metric: Panel(words.heading(metric), lines, levels_of(metric)) for metric, lines in found.items() if lines
    }
    constant = {metric: value for metric, panel in panels.items() if (value := _constant(panel)) is not None}
    return {name: panel for name, panel in panels.items() if name not in constant}, words.constants(constant)


def _constant(panel: Panel) -> float | None:
    """The value of a panel that has no other at two points or more."""
    points = [point for line in panel.lines for point in line.points]
    return _only([*points, *panel.levels.values()]) if len(points) > 1 else None


def _only_value(pairs: Sequence[Pair]) -> float | None:
    return _only([point for pair in pairs for point in (pair.fixed, pair.random)])


def _only(points: Sequence[Point]) -> float | None:
    """The one value of all seeds of all points, where there is only one."""
    values = {value for point in points for value in point.values}
    return values.pop() if len(values) == 1 else None


def _levels(panels: Mapping[str, Panel]) -> list[str]:
    """The titles of what is drawn across."""
    return list(dict.fromkeys(title for panel in panels.values() for title in panel.levels))


def _and_clean(lines: Sequence[Line]) -> str:
    """Words on the clean line, where there is one."""
    return ", and the clean model in black" if any(line.method.kind == "clean" for line in lines) else ""


def _lines(panels: Mapping[str, Panel]) -> list[Line]:
    return [line for panel in panels.values() for line in panel.lines]


def _beyond_clean(lines: Sequence[Line]) -> bool:
    return any(line.method.kind != "clean" for line in lines)


def _in_rows(panels: Sequence[Panel], most: int) -> list[Sequence[Panel]]:
    """In as few rows as hold them, of as equal lengths as they allow."""
    columns = -(-len(panels) // -(-len(panels) // most))
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def _dot(point: Point) -> Dot:
    seeds = point.values if len(point.values) > 1 else ()
    return Dot(point.mean, point.spread, point.spread, seeds)


def _dot_of_difference(each: Difference, style: Style) -> Dot:
    """Filled where the tables mark it."""
    look = {"filled": each.verdict in CONCLUSIVE, "colour": style["color"]}
    if math.isnan(each.low):
        return Dot(each.mean, **look)
    return Dot(each.mean, each.mean - each.low, each.high - each.mean, **look)
