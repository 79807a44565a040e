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
from noisycond.study import figure_data as data
from noisycond.study import figure_words as words
from noisycond.study.figure_data import Cells, Difference, Line, Point
from noisycond.study.figure_drawing import (
    Axis,
    Dot,
    DotPanel,
    Panel,
    draw_dots,
    draw_lines,
    line_styles,
)
from noisycond.study.montage import montage, png, write_picture


if TYPE_CHECKING:
    from noisycond.study.results import Results


QUALITY = ("fid", "inception_score", "clip_score")
DIFFICULTY = ("rmd_top", "rmd_mean", "entropy")
OVER_GUIDANCE = tuple(name for name in METRICS if name not in DIFFICULTY)
GAMMA = ("fid", "recall", "entropy")
COMPARED = ("fid", "inception_score", "precision", "recall")


@dataclass(frozen=True)
class Figure:
    """A picture with its words.

    Attributes:
        name: of the file, without its ending. path: of the PNG, of at most 200 KB.
        caption: what is shown, over how many seeds, what bars are, at which guidance scale.
        alt: what is drawn, with the main numbers, in place of the picture.
    """

    name: str
    title: str
    caption: str
    path: Path
    alt: str


@dataclass(frozen=True)
class _Block:
    """What is drawn of one block, and where to.

    Attributes:
        cells: of different methods; left_out: the labels of the others.
        final, steps: values after and during training. runs: those with pictures.
        scale: the guidance scale of figures at one; at_scale: final values there.
    """

    name: str
    cells: Cells
    left_out: Sequence[str]
    final: DataFrame
    steps: DataFrame
    scale: float | None
    at_scale: DataFrame
    runs: Sequence[dict]
    folder: Path

    @property
    def clean(self) -> Cells:
        return data.clean_of(self.cells)

    def point(self, cell: str | None, metric: str) -> Point | None:
        return data.point(self.at_scale, cell, metric)

    def clean_level(self, metric: str) -> dict[str, Point]:
        found = {self.cells[cell].title: self.point(cell, metric) for cell in self.clean}
        return {title: level for title, level in found.items() if level}

    def figure(self, name: str, title: str, caption: Sequence[str], alt: str) -> Figure:
        """The words of a figure, of sentences; what is drawn goes to its path."""
        file = f"{name}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.name)}" if self.name else name
        if self.left_out:
            caption = [
                *caption,
                f"Cells of a method that another one shows are not drawn: {', '.join(self.left_out)}.",
            ]
        title = f"{title}: {self.name}" if self.name else title
        return Figure(file, title, " ".join(filter(None, caption)), self.folder / f"{file}.png", alt)


def draw_figures(results: "Results", folder: str | Path) -> list[Figure]:
    """Draws what a study has the data for, block by block, to PNG files; the rest is left out.

    Args:
        results: those of `noisycond.study.results`. folder: made where it is not there.

    Returns:
        The figures in the order of a report. The same results make files of the same bytes.
    """
    blocks = [_block(results, name, Path(folder)) for name in results.study.blocks]
    kinds = (
        _over_eta,
        _corruption_over_guidance,
        _cep_over_guidance,
        _difficulty_over_guidance,
        _gamma_ablation,
        _regularizers,
        _fixed_against_random,
        _over_steps,
        _samples,
    )
    return [figure for draw in kinds for block in blocks for figure in draw(block)]


def _block(results: "Results", name: str, folder: Path) -> _Block:
    values = results.values
    values = values[np.isfinite(values["value"].astype(float))]
    # The scale is that of all blocks, so that they can be compared.
    scale = data.one_scale(data.final(values), results.study.report_guidance_scale)
    values = values[values["block"] == name]
    final, steps = data.final(values), values[values["step"].notna()]
    named = [(cell.label, cell.method) for cell in results.study.cells if cell.block == name]
    runs = [run for run in results.runs if run["block"] == name and run.get("samples")]
    return _Block(name, *data.distinct(named), final, steps, scale, data.at_scale(final, scale), runs, folder)


def _over_eta(block: _Block) -> Iterator[Figure]:
    panels = _with_lines(
        QUALITY, lambda name: data.lines_over_eta(block.at_scale, block.cells, name), block.clean_level
    )
    if not panels:
        return
    lines = _lines(panels)
    counts, what = words.counts(lines), words.titles(panels)
    dashed = "Dashed: the clean model's mean" + (", its spread as a band." if max(counts) > 1 else ".")
    where = words.at_scale(block.scale)
    figure = block.figure(
        "fid_is_over_eta",
        f"{what} over the corruption ratio",
        [
            f"{what}{where} over the corruption ratio η, a line for each type and mode of corruption; η = 0 is clean.",
            words.bars(counts, small="small points: the single seeds"),
            dashed if any(panel.levels for panel in panels.values()) else "",
        ],
        words.all_numbers(panels, "η = {:g} %"),
    )
    axis, note = Axis("corruption ratio η [%]"), words.note(counts, block.scale)
    draw_lines([list(panels.values())], axis, line_styles(lines), note, figure.path, single_seeds=True)
    yield figure


def _corruption_over_guidance(block: _Block) -> Iterator[Figure]:
    yield from _corruptions_over_guidance(block, OVER_GUIDANCE, "metrics_over_guidance", "Metrics over guidance")


def _difficulty_over_guidance(block: _Block) -> Iterator[Figure]:
    name, title = "difficulty_and_entropy_over_guidance", "Difficulty and entropy over guidance"
    yield from _corruptions_over_guidance(block, DIFFICULTY, name, title)


def _corruptions_over_guidance(block: _Block, metrics: Sequence[str], name: str, title: str) -> Iterator[Figure]:
    """A figure for each type of corruption, in its main mode."""
    for number, (how, family) in enumerate(data.of_main_mode(block.cells, "corruption").items()):
        own = f"_{how.type}" if number else ""
        yield from _over_guidance(block, family, metrics, name + own, title, f"for each η of {words.of(how)}")


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
    panels = _with_lines(metrics, lambda name: data.lines_of_cells(block.final, cells, name, "guidance_scale"))
    lines = _lines(panels)
    if not _beyond_clean(lines):
        return
    counts, first = words.counts(lines), next(iter(panels))
    figure = block.figure(
        name,
        title,
        [
            f"{words.titles(panels)} over the guidance scale: a line {what}, and the clean model in black.",
            words.bars(counts),
            "Points stand a little beside their guidance scale, so that bars do not hide each other."
            if max(counts) > 1
            else "",
        ],
        f"Panels of {words.titles(panels)}. {words.best_numbers(first, panels[first].lines, 'guidance')}",
    )
    rows = _in_rows(list(panels.values()), 3)
    draw_lines(rows, Axis("guidance scale"), line_styles(lines), words.note(counts), figure.path)
    yield figure


def _gamma_ablation(block: _Block) -> Iterator[Figure]:
    how, corrupted = next(iter(data.families(block.cells, "corruption").items()), (None, {}))
    across = block.clean | corrupted

    def levels(metric: str) -> dict[str, Point]:
        # The spread of so many levels would hide all else: clean's alone is drawn.
        found = {method.title: block.point(cell, metric) for cell, method in corrupted.items()}
        means = {title: Point(level.x, (level.mean,)) for title, level in found.items() if level}
        return block.clean_level(metric) | means

    panels = _with_lines(GAMMA, lambda name: data.lines_over_gamma(block.at_scale, block.cells, name), levels)
    lines = _lines(panels)
    gammas = {point.x for line in lines for point in line.points}
    if len(gammas) < 2:
        return
    counts, what = words.counts(lines), words.titles(panels)
    against = words.listed(["clean"] * bool(block.clean) + ([f"each η of {words.of(how)}"] if how else []))
    modes, first = words.mode_of(line.method for line in lines), dict([next(iter(panels.items()))])
    figure = block.figure(
        "gamma_ablation",
        "Strength of condition embedding perturbation",
        [
            f"{what}{words.at_scale(block.scale)} over γ of CEP{modes}.",
            f"Across: {against}." if across else "",
            words.bars(counts, small="of clean a band, of η the mean alone" if corrupted else "of clean a band"),
        ],
        f"{words.all_numbers(first, 'γ = {:g}')} {words.level_numbers(first)}",
    )
    styles = line_styles([*lines, *(Line(method.title, method, ()) for method in across.values())])
    axis = Axis("γ", log=max(gammas) >= 8 * min(gammas))
    note = words.note(counts, block.scale)
    draw_lines([list(panels.values())], axis, styles, note, figure.path)
    yield figure


def _regularizers(block: _Block) -> Iterator[Figure]:
    from noisycond.study.statistics import compare

    titles = data.regularizers(block.at_scale, block.cells)
    values = block.at_scale[block.at_scale["cell"].isin([*titles, *block.clean])]
    if not block.clean or len(titles) < 2 or values.empty:
        return
    compared = compare(values)
    found = {name: data.differences(compared, list(titles), name) for name in COMPARED}
    found = {name: each for name, each in found.items() if each}
    shown = {each.cell for differences in found.values() for each in differences}
    cells = [cell for cell in titles if cell in shown]
    if len(cells) < 2:
        return
    pairs = {each.pairs for differences in found.values() for each in differences}
    bars = "bars: 95 % t intervals, paired over seeds; filled points where they leave out 0, hollow ones where not"
    chosen = (
        "The η of the best FID was chosen by these same runs." if any("best" in titles[cell] for cell in cells) else ""
    )
    first, where = next(iter(found)), words.at_scale(block.scale)
    figure = block.figure(
        "regularizers",
        "Regularizers against clean",
        [
            f"{words.titles(found)} of each method minus those of the clean model{where}: mean over "
            f"{words.seeds(pairs)} of training" + (f", {bars}." if max(pairs) > 1 else ", without intervals."),
            "The arrow points to the better side.",
            chosen,
        ],
        words.difference_numbers(first, found[first], titles),
    )
    panels = []
    for name, differences in found.items():
        dots = {each.cell: _dot_of_difference(each) for each in differences}
        rows = {"difference to clean": [dots.get(cell) for cell in cells]}
        panels.append(DotPanel(f"Δ {words.heading(name)}", rows, Point(0.0, (0.0,))))
    interval = "mean difference, 95 % t interval over " if max(pairs) > 1 else ""
    note = f"{interval}{words.seeds(pairs)}{words.at_scale(block.scale).replace(' at', ',')}"
    draw_dots(panels, [titles[cell] for cell in cells], note, figure.path)
    yield figure


def _fixed_against_random(block: _Block) -> Iterator[Figure]:
    pairs = {name: data.pairs_of_modes(block.at_scale, block.cells, name) for name in COMPARED}
    pairs = {name: found for name, found in pairs.items() if found}
    if not pairs:
        return
    titles = list(dict.fromkeys(pair.title for found in pairs.values() for pair in found))
    counts = {len(each.values) for found in pairs.values() for pair in found for each in (pair.fixed, pair.random)}
    first = next(iter(pairs))
    dashed = "Dashed: the clean model" + (", its spread as a band." if max(counts) > 1 else ".")
    figure = block.figure(
        "fixed_against_random",
        "Fixed against random",
        [
            f"{words.titles(pairs)}{words.at_scale(block.scale)} of what was run in both modes: an example is "
            "corrupted or perturbed in the same way in every epoch (fixed), or anew (random).",
            words.bars(counts, small="small points: the single seeds"),
            dashed if block.clean_level(first) else "",
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
        panels.append(DotPanel(words.heading(name), dots, next(iter(block.clean_level(name).values()), None)))
    draw_dots(panels, titles, words.note(counts, block.scale), figure.path)
    yield figure


def _over_steps(block: _Block) -> Iterator[Figure]:
    scale = data.one_scale(block.steps, block.scale)
    values = data.at_scale(block.steps, scale)
    metrics = data.metrics_in(values, block.cells, list(dict.fromkeys([*QUALITY, *METRICS])))[:2]
    rows = []
    for group in data.groups(block.cells):
        panels = _with_lines(
            metrics, lambda name, shown=block.clean | group: data.lines_of_cells(values, shown, name, "step")
        )
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
            f"{what}{words.at_scale(scale)} over the optimizer steps, a line for each cell; the clean model in black"
            + (" in every row." if len(rows) > 1 else "."),
            words.bars(counts, word="bands"),
        ],
        words.last_numbers(metrics[0], list(of_first.values())),
    )
    panels = [list(row.values()) for row in rows]
    options = {"bands": True, "legend_per_row": True}
    note = words.note(counts, scale)
    draw_lines(
        panels, Axis("optimizer step", ticks=False, wide=True), line_styles(lines), note, figure.path, **options
    )
    yield figure


def _samples(block: _Block) -> Iterator[Figure]:
    runs = data.sample_runs([run for run in block.runs if Path(run["samples"]).is_file()], block.cells)
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
        [f"Samples of {words.listed(titles)}, trained with seed {runs[0]['seed']}.", size],
        f"Samples of {words.listed(titles)}, side by side.",
    )
    write_picture(png(whole), figure.path)
    yield figure


def _with_lines(metrics: Sequence[str], lines_of, levels_of=lambda metric: {}) -> dict[str, Panel]:
    """A panel for each metric that has a line."""
    found = {metric: lines_of(metric) for metric in metrics}
    return {metric: Panel(words.heading(metric), lines, levels_of(metric)) for metric, lines in found.items() if lines}


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


def _dot_of_difference(each: Difference) -> Dot:
    if math.isnan(each.low):
        return Dot(each.mean, filled=False)
    return Dot(each.mean, each.mean - each.low, each.high - each.mean, filled=each.low > 0 or each.high < 0)
