"""A study's tables: every number as CSV, and what cells come to, compared with clean, as Markdown and for the report.

Words: a *place* is a guidance scale of final models, None where there is none."""

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from noisycond.errors import writing
from noisycond.evaluation.metrics import METRICS, metric_of
from noisycond.markdown import INCONCLUSIVE, MISSING, WIDE, escaped, listed, markdown_table
from noisycond.run_folder import write_atomically
from noisycond.study import selection
from noisycond.study.statistics import at_best_guidance, compare, compare_modes


if TYPE_CHECKING:
    from noisycond.study.figures import Figure


MARKS = {
    "better": "✓",
    "worse": "✗",
    "higher": "△",
    "lower": "▽",
    "inconclusive": INCONCLUSIVE,
    "equal": "=",
    "": "",
}
# What every table of means is read by.
LEGEND = (
    "n: the seeds that a mean is over, where a number does not name its own. ±: their sample standard "
    f"deviation. {MISSING}: no value. An arrow in a heading points to the better values.",
    "✓ better, ✗ worse than clean; △ higher, ▽ lower than clean, of metrics that neither way is better by itself; "
    "≈ inconclusive: at this number of seeds the difference may be chance, which is not to say that there is none; "
    "= every difference is 0. No mark: not compared (clean itself, or fewer than two seeds in common with it).",
    "A difference is paired by seed, and marked ✓ ✗ △ ▽ where p < 0.05: two-sided paired t test, p adjusted after "
    "Benjamini and Hochberg over all cells and guidance scales of one metric and block. Every metric is judged by "
    "itself.",
)
# Tables of more than WIDE metrics are cut in these; what is in none goes to the last.
GROUPS = {
    "Fidelity": (
        *("fid", "sfid", "kid", "inception_score"),
        *("precision", "density", "topp_fidelity", "topp_f1"),
    ),
    "Diversity": ("recall", "coverage", "topp_diversity", "lpips_diversity", "entropy", "rmd_top", "rmd_mean"),
    "Memorization and other metrics": (),
}
# Of tables that show some metrics only.
HEADLINE = (
    *("fid", "inception_score", "precision", "recall", "coverage"),
    *("entropy", "memorization_ratio", "class_agreement", "clip_score"),
)
NUMBERS = "%.8g"  # of CSV files: float32 has seven digits
JUDGED_BY = "fid"  # the metric that a cell's best guidance scale is chosen by
FAILED = "Runs that failed or are missing"
NO_VALUES = "No run has values yet."
NO_REGULARIZERS = (
    "There is no table of regularizers: no cell with embedding dropout, label smoothing, input perturbation or CEP "
    "drawn anew has values."
)
NO_MODES = "There is no table of fixed against random: no two cells with values differ in that alone."


@dataclass(frozen=True)
class Table:
    """A table as text, for Markdown and HTML; neither escaped for the one nor for the other.

    Attributes:
        title: what it shows, the block named where there are several. caption: one or more sentences.
        head: a text per column. lines: a text per column. marks: for each text of `lines`, the verdict on it as
            `compare` has it (see MARKS), or "". left: numbers of the columns that are no numbers.
        kind: `means`, `regularizers`, `modes` (lines in threes, which belong together) or `runs`. block: of its cells.
        folded: the guidance scale under which it is folded, as text; "" of those that stand open.
    """

    title: str
    caption: str
    head: list[str]
    lines: list[list[str]]
    marks: list[list[str]]
    left: tuple[int, ...] = (0,)
    kind: Literal["means", "regularizers", "modes", "runs"] = "means"
    block: str = ""
    folded: str = ""


def write_tables(results, summary: pd.DataFrame, folder: str | Path) -> list[Table]:
    """Writes `results.csv` (every number, and a line for each run without), `summary.csv` (the comparison) and
    `fixed_against_random.csv` (what [`compare_modes`] gives, where a study has such pairs).

    Args:
        results: a study's `Results`. summary: what `compare` says of their values.

    Returns:
        The tables that can be built, block by block, those at the report's guidance scale first; then the runs that
        are not done.

    Raises:
        InputError: the folder cannot be written to.
    """
    modes = compare_modes(results.values)
    folder = Path(folder)
    with writing(str(folder), "the tables"):
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(folder / "results.csv", results_frame(results))
        _write_csv(folder / "summary.csv", summary)
        if len(modes):
            _write_csv(folder / "fixed_against_random.csv", modes)
        else:  # an earlier one would be of other cells
            (folder / "fixed_against_random.csv").unlink(missing_ok=True)
    numbers, runs = _Numbers(results, summary, modes), run_table(results)
    best = at_best_guidance(results.values, JUDGED_BY)
    at_best = _Numbers(replace(results, values=best), compare(best), modes.iloc[:0])
    scales = {(line.block, line.cell): line.best_scale for line in best.itertuples(index=False)}
    tables = [table for block in _blocks(results.study) for table in _tables(numbers, at_best, scales, block)]
    return tables if runs is None else [*tables, runs]


def write_page(results, tables: Sequence[Table], figures: Sequence["Figure"], folder: str | Path) -> Path:
    """Writes `results.md`: tables and figures block by block, and what is not done.

    Args:
        tables: of [`write_tables`]. figures: of `draw_figures`; they are linked to where they lie.

    Raises:
        InputError: the folder cannot be written to.
    """
    folder = Path(folder)
    with writing(str(folder), "the tables"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "results.md", _page(results, tables, figures, folder))
    return folder / "results.md"


def results_frame(results) -> pd.DataFrame:
    """Every number, in the order of runs: `block`, `cell`, `seed`, `guidance_scale`, `step` (NA of the final model,
    else of an evaluation while it trained), `metric`, `value`, and the run's `status`, `attempts` and `reason`. A run
    without values has one line, without a metric."""
    of_run, numbers = ["block", "cell", "seed"], ["guidance_scale", "step", "metric", "value"]
    state = ["status", "attempts", "reason"]
    runs = pd.DataFrame([{name: run[name] for name in of_run + state} for run in results.runs], columns=of_run + state)
    found = runs.merge(results.values[of_run + numbers], how="left", on=of_run)
    return found[[*of_run, *numbers, *state]]


def run_table(results) -> Table | None:
    """The runs that are not done and why, failed ones first: a line for all cells of which the same seeds failed, or
    are missing, for the same reason; None where all are done."""
    seeds: dict[tuple, list[int]] = {}
    for run in results.runs:
        if run["status"] != "done":
            reason = run["reason"] or ("not run yet" if run["status"] == "missing" else "no reason is known")
            key = run["block"], run["cell"], run["status"], run["attempts"], " ".join(str(reason).split())
            seeds.setdefault(key, []).append(run["seed"])
    if not seeds:
        return None
    cells: dict[tuple, list[str]] = {}
    for (block, cell, *why), of_cell in seeds.items():
        cells.setdefault((block, tuple(of_cell), *why), []).append(cell)
    names, size = _names(results.study.cells), Counter(cell.block for cell in results.study.cells)
    lines = [
        [
            block,
            "all cells" if len(of_block) == size[block] > 1 else "; ".join(names[block, cell] for cell in of_block),
            ranges(numbers),
            status,
            str(attempts),
            reason,
        ]
        for (block, numbers, status, attempts, reason), of_block in cells.items()
    ]
    lines.sort(key=lambda line: line[3] != "failed")
    head = ["block", "cell", "seeds", "status", "attempts", "reason"]
    if not any(line[0] for line in lines):
        head, lines = head[1:], [line[1:] for line in lines]
    count = sum(map(len, seeds.values()))
    caption = f"{_count(count, 'run')} of {len(results.runs)}; what stands in the other tables is without them."
    left = tuple(n for n, name in enumerate(head) if name != "attempts")
    return Table(FAILED, caption, head, lines, [[""] * len(head) for _ in lines], left, "runs")


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as text, three and more in a row as a range: "0, 2, 4–9"."""
    rows: list[list[int]] = []
    for number in sorted(numbers):
        if rows and number == rows[-1][-1] + 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    return ", ".join(f"{row[0]}–{row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows)


def _blocks(study) -> list[str]:
    return list(dict.fromkeys(cell.block for cell in study.cells))


def _tables(numbers: "_Numbers", at_best: "_Numbers", scales: dict[tuple, float], block: str) -> list[Table]:
    """Those of a block. Args: at_best, scales: of each cell at its best guidance scale, and that scale."""
    places = numbers.places(block)
    if not places:
        return []
    first, *others = places
    extra = (
        _guidance_table(numbers, block),
        _best_table(at_best, scales, block),
        _regularizer_table(numbers, block, first),
        _mode_table(numbers, block, first),
    )
    folded = [
        replace(table, folded=_place_title(place).capitalize())
        for place in others
        for table in _main_tables(numbers, block, place)
    ]
    return [*_main_tables(numbers, block, first), *(table for table in extra if table is not None), *folded]


class _Numbers:
    """What the tables are made of, looked up by block, cell and place."""

    def __init__(self, results, summary: pd.DataFrame, modes: pd.DataFrame):
        self.study = results.study
        self.decided = selection.seeds_decide(results.study)
        self.names = _names(results.study.cells)
        final = summary[summary["step"].isna()]
        self._lines = {(*_where(line), line.metric): line for line in final.itertuples(index=False)}
        self._modes = list(modes.itertuples(index=False))
        self._seeds: dict[tuple, set[int]] = {}
        values = results.values[results.values["step"].isna()]
        for line in values.itertuples(index=False):
            seeds = self._seeds.setdefault(_where(line), set())
            if math.isfinite(line.value):
                seeds.add(line.seed)

    def cells(self, block: str) -> selection.Cells:
        """The block's cells, clean first, in families by strength."""
        return selection.in_families({cell.label: cell.method for cell in self.study.cells if cell.block == block})

    def places(self, block: str) -> list[float | None]:
        """Those measured, the report's first."""
        found = {place for of_block, _, place in self._seeds if of_block == block}
        return selection.places(found, self.study.report_guidance_scale)

    def metrics(self, block: str, place: float | None) -> list[str]:
        """Those measured there, in the order of METRICS, others behind."""
        found = dict.fromkeys(key[3] for key in self._lines if key[0] == block and key[2] == place)
        return [name for name in METRICS if name in found] + [name for name in found if name not in METRICS]

    def clean(self, block: str) -> str | None:
        return next(iter(selection.clean_of(self.cells(block))), None)

    def seeds(self, block: str, cell: str, place: float | None) -> set[int]:
        """Those with at least one finite value."""
        return self._seeds.get((block, cell, place), set())

    def pairs(self, block: str, place: float | None) -> dict[tuple[str, str], dict[str, tuple]]:
        """By the labels of a fixed and a random cell, the comparison of each metric."""
        found: dict[tuple[str, str], dict[str, tuple]] = {}
        for line in self._modes:
            if line.block == block and _place(line.guidance_scale) == place:
                found.setdefault((line.fixed, line.random), {})[line.metric] = line
        return found

    def mean(self, block: str, cell: str, place: float | None, metric: str) -> tuple[str, str]:
        """The text of a mean with its spread, and the verdict on it."""
        line = self._lines.get((block, cell, place, metric))
        if line is None or not line.seeds:
            return MISSING, ""
        form = metric_of(metric).form(line.mean)
        spread = f" ± {line.spread:{form}}" if line.seeds > 1 else ""
        own = f" (n = {line.seeds})" if line.seeds != len(self.seeds(block, cell, place)) else ""
        return f"{line.mean:{form}}{spread}{own}", line.verdict

    def count(self, block: str, cell: str, place: float | None) -> str:
        """n, and how many of these seeds clean has too, where that is not all."""
        own, clean = self.seeds(block, cell, place), self.clean(block)
        shared = own & self.seeds(block, clean, place) if clean is not None else own
        return str(len(own)) if len(shared) == len(own) else f"{len(own)}, {len(shared)} paired"


def _main_tables(numbers: _Numbers, block: str, place: float | None) -> list[Table]:
    """All cells and metrics at one place; cut in groups where there are more metrics than a page is wide."""
    metrics = numbers.metrics(block, place)
    if not metrics:
        return []
    groups = _grouped(metrics) if len(metrics) > WIDE else {"All cells": metrics}
    caption = _caption(numbers, block, place)
    return [
        _table(numbers, _title(group, block, place), caption, block, place, numbers.cells(block), names)
        for group, names in groups.items()
    ]


def _guidance_table(numbers: _Numbers, block: str) -> Table | None:
    """One metric over guidance scales; None where it was not measured at several."""
    places = sorted(
        place for place in numbers.places(block) if place is not None and JUDGED_BY in numbers.metrics(block, place)
    )
    if len(places) < 2:
        return None
    metric, lines, marks = metric_of(JUDGED_BY), [], []
    for cell in numbers.cells(block):
        found = [numbers.mean(block, cell, place, JUDGED_BY) for place in places]
        counts = dict.fromkeys(numbers.count(block, cell, place) for place in places)
        lines.append([numbers.names[block, cell], "; ".join(counts), *(text for text, _ in found)])
        marks.append(["", "", *(verdict for _, verdict in found)])
    compared = _comparison(numbers, block, places[0], "Compared with clean at the same scale.")
    spread = f"Mean ± standard deviation over seeds, of {numbers.decided}."
    caption = f"{metric.title} at each guidance scale. {spread} {compared}"
    head = ["cell", "n", *(f"{metric.heading} at {place:g}" for place in places)]
    title = f"{metric.title} over guidance scales" + (f" ({block})" if block else "")
    return Table(title, caption, head, lines, marks, block=block)


def _best_table(numbers: _Numbers, scales: dict[tuple, float], block: str) -> Table | None:
    """Each cell at its own best guidance scale; None where no cell was measured at several."""
    cells = [cell for cell in numbers.cells(block) if numbers.seeds(block, cell, None)]
    metrics = _headline(numbers.metrics(block, None))
    if not cells or JUDGED_BY not in metrics:
        return None
    title = metric_of(JUDGED_BY).title
    caption = (
        f"Each cell at the guidance scale where its mean {title} is best. Mean ± standard deviation over seeds, of "
        f"{numbers.decided}. {_comparison(numbers, block, None, 'Compared with clean at its own best scale.')} The "
        "scales are chosen by these same runs, so all means are a little too good."
    )
    table = _table(numbers, "", caption, block, None, cells, metrics)
    lines = [[name, f"{scales[block, cell]:g}", *rest] for cell, (name, *rest) in zip(cells, table.lines, strict=True)]
    marks = [[first, "", *rest] for first, *rest in table.marks]
    head = [table.head[0], "guidance scale", *table.head[1:]]
    name = f"At the best guidance scale of each cell, by {title}" + (f" ({block})" if block else "")
    return replace(table, title=name, head=head, lines=lines, marks=marks)


def _regularizer_table(numbers: _Numbers, block: str, place: float | None) -> Table | None:
    """Clean, each regularizer and the slightest corruption; None where the block has no regularizer with values."""
    cells = {cell: method for cell, method in numbers.cells(block).items() if numbers.seeds(block, cell, place)}
    found = selection.regularizers(cells)
    if not found:
        return None
    caption = (
        f"{_caption(numbers, block, place)} CEP is shown at γ = {selection.PAPER_GAMMA:g}, the paper's default, or "
        "the nearest that was trained, drawn anew at every step; corruption at the least share: both are chosen by "
        "their settings, not by their results."
    )
    lacking = [name for name, of_name in found.items() if not of_name]
    if lacking:
        caption += f" Without values in this study: {listed(lacking)}."
    chosen = {cell: method for of_name in found.values() for cell, method in of_name.items()}
    metrics = _headline(numbers.metrics(block, place))
    table = _table(numbers, _title("Regularizers", block, place), caption, block, place, chosen, metrics)
    return replace(table, kind="regularizers")


def _mode_table(numbers: _Numbers, block: str, place: float | None) -> Table | None:
    """Corruption or perturbation fixed once against drawn anew; None where no two cells differ in that alone."""
    pairs = numbers.pairs(block, place)
    if not pairs:
        return None
    metrics = _headline(numbers.metrics(block, place))
    lines, marks = [], []
    for (fixed, random), compared in pairs.items():
        title = next(iter(compared.values())).title
        for mode, cell in (("fixed", fixed), ("random", random)):
            means = [numbers.mean(block, cell, place, metric)[0] for metric in metrics]
            lines.append([title, mode, str(len(numbers.seeds(block, cell, place))), *means])
            marks.append([""] * (3 + len(metrics)))
        shared = numbers.seeds(block, fixed, place) & numbers.seeds(block, random, place)
        lines.append(
            [title, "random − fixed", str(len(shared)), *(_difference(compared.get(name)) for name in metrics)]
        )
        marks.append([""] * 3 + [compared[name].verdict if name in compared else "" for name in metrics])
    caption = (
        f"{_means(numbers, place)} Fixed: the same examples are corrupted in the same way, or perturbed alike, "
        "throughout training; random: drawn anew. Below each pair stand the mean difference, over the n seeds that "
        "both have, and its p, adjusted over all such pairs and guidance scales of one metric; marks there compare "
        "random with fixed, not with clean. Intervals stand in fixed_against_random.csv."
    )
    head = ["cell", "mode", "n", *(metric_of(name).heading for name in metrics)]
    return Table(_title("Fixed against random", block, place), caption, head, lines, marks, (0, 1), "modes", block)


def _table(numbers: _Numbers, title, caption, block, place, cells: Iterable[str], metrics: Sequence[str]) -> Table:
    """A line of means per cell."""
    lines, marks = [], []
    for cell in cells:
        found = [numbers.mean(block, cell, place, metric) for metric in metrics]
        name, count = numbers.names[block, cell], numbers.count(block, cell, place)
        lines.append([name, count, *(text for text, _ in found)])
        marks.append(["", "", *(verdict for _, verdict in found)])
    head = ["cell", "n", *(metric_of(name).heading for name in metrics)]
    return Table(title, caption, head, lines, marks, block=block)


def _caption(numbers: _Numbers, block: str, place: float | None) -> str:
    return " ".join(filter(None, (_means(numbers, place), _comparison(numbers, block, place))))


def _comparison(numbers: _Numbers, block: str, place: float | None, how: str = "") -> str:
    """What means are compared with, or why they are not. Args: how: the sentence where they are."""
    clean = numbers.clean(block)
    counts = [len(numbers.seeds(block, cell, place)) for cell in numbers.cells(block)]
    if clean is None:
        return "There is no clean cell to compare with."
    if not numbers.seeds(block, clean, place):
        return "The clean cell has no values yet, so nothing is compared with it."
    if max(counts) < 2:
        return "With one seed nothing is known of chance, and nothing is compared."
    differ = f"Cells have from {min(counts)} to {max(counts)} seeds." if max(counts) > min(counts) else ""
    return " ".join(filter(None, (how, differ)))


def _means(numbers: _Numbers, place: float | None) -> str:
    return f"Mean ± standard deviation over seeds, of {numbers.decided}; {_place_title(place)}."


def _difference(line: tuple | None) -> str:
    """The mean difference and its adjusted p, where there is one."""
    if line is None or not line.pairs:
        return MISSING
    text = f"{line.difference:+{metric_of(line.metric).form(line.difference)}}"
    if math.isnan(line.p_adjusted):
        return text
    return f"{text}, p < 0.001" if line.p_adjusted < 0.001 else f"{text}, p = {line.p_adjusted:.3f}"


def _grouped(metrics: Sequence[str]) -> dict[str, list[str]]:
    home = {metric: group for group, members in GROUPS.items() for metric in members}
    groups = {group: [name for name in metrics if home.get(name, list(GROUPS)[-1]) == group] for group in GROUPS}
    return {group: names for group, names in groups.items() if names}


def _headline(metrics: list[str]) -> list[str]:
    """All, or those of HEADLINE where all would be too wide and there are any."""
    return metrics if len(metrics) <= WIDE else [name for name in HEADLINE if name in metrics] or metrics


def _names(cells: Iterable) -> dict[tuple[str, str], str]:
    """By block and label, what a line is called: the method, and the label where it does not say which cell it is."""
    cells = list(cells)
    titles = [(cell.block, cell.method.title) for cell in cells]
    return {
        (cell.block, cell.label): cell.method.title
        if titles.count((cell.block, cell.method.title)) == 1 and cell.method.kind != "mixed"
        else f"{cell.method.title} ({cell.label})"
        for cell in cells
    }


def _place(scale: float) -> float | None:
    return None if math.isnan(scale) else scale


def _where(line: tuple) -> tuple[str, str, float | None]:
    return line.block, line.cell, _place(line.guidance_scale)


def _place_title(place: float | None) -> str:
    return "no guidance scale" if place is None else f"guidance scale {place:g}"


def _title(what: str, block: str, place: float | None) -> str:
    return f"{what}, {_place_title(place)}" + (f" ({block})" if block else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_atomically(path, frame.to_csv(index=False, lineterminator="\n", float_format=NUMBERS))


def _page(results, tables: Sequence[Table], figures: Sequence["Figure"], folder: Path) -> str:
    """`results.md`."""
    study = results.study
    runs = next((table for table in tables if table.kind == "runs"), None)
    parts = [f"# {_inline(study.title)}", _opening(results, runs)]
    asked = study.report_guidance_scale
    measured = set(results.values.loc[results.values["step"].isna(), "guidance_scale"].dropna())
    if asked is not None and measured and asked not in measured:
        parts.append(f"Guidance scale {asked:g}, which the study names for its tables, was not measured.")
    parts.append("\n".join(f"- {sentence}" for sentence in LEGEND))
    for block in _blocks(study):
        level = "###" if block else "##"
        own = [table for table in tables if table.block == block and table is not runs]
        parts += [f"## {_inline(block)}"] * bool(block)
        parts += [part for table in own if not table.folded for part in _markdown(table, level)]
        parts += _lacking({table.kind for table in own})
        drawn = [figure for figure in figures if figure.block == block]
        parts += [f"{level} Figures"] * bool(drawn)
        parts += [part for figure in drawn for part in _shown(figure, folder, level + "#")]
        for title in dict.fromkeys(table.folded for table in own if table.folded):
            inside = [part for table in own if table.folded == title for part in _markdown(table, level + "#")]
            parts += [f"<details>\n<summary>{title}</summary>", *inside, "</details>"]
    if runs is not None:
        parts += _markdown(runs, "##")
    parts += [
        "## How to make this again",
        "Runs that are done are kept; the others are run, and this is written anew:",
        f"```bash\n{results.command()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _opening(results, runs: Table | None) -> str:
    study, total = results.study, len(results.runs)
    states = [run["status"] for run in results.runs]
    done = f"{_count(total, 'run')}, all done"
    if runs is not None:
        others = [f"{states.count(name)} {name}" for name in ("failed", "missing") if name in states]
        anchor = re.sub(r"[^\w -]", "", FAILED.lower()).replace(" ", "-")
        done = f"{_count(total, 'run')}: {states.count('done')} done, {' and '.join(others)} ([why](#{anchor}))"
    seeds = f"{_count(len(study.seeds), 'seed')} ({ranges(study.seeds)}) of {selection.seeds_decide(study)}"
    return (
        f"`{study.path.name}`: {_count(len(study.cells), 'cell')}, {seeds}; {done}. Every number is in "
        "[results.csv](results.csv), every mean, difference from clean, interval and p in [summary.csv](summary.csv); "
        "`report.html`, written beside this file, has all of this on one page, with every choice that was made."
    )


def _lacking(kinds: Collection[str]) -> list[str]:
    """A sentence for each kind of table that a block has not."""
    if "means" not in kinds:
        return [NO_VALUES]
    return [
        sentence for kind, sentence in (("regularizers", NO_REGULARIZERS), ("modes", NO_MODES)) if kind not in kinds
    ]


def _shown(figure: "Figure", folder: Path, level: str) -> list[str]:
    """Heading, picture and caption."""
    alt = re.sub(r"([\[\]])", r"\\\1", _inline(figure.alt))
    path = Path(os.path.relpath(figure.path, folder)).as_posix()
    return [f"{level} {_inline(figure.title)}", f"![{alt}]({path})", _inline(figure.caption)]


def _markdown(table: Table, level: str) -> list[str]:
    """Heading, caption and table, verdicts as marks behind what they are on."""
    lines = [
        [_inline(f"{text} {MARKS[mark]}".rstrip()) for text, mark in zip(line, marks, strict=True)]
        for line, marks in zip(table.lines, table.marks, strict=True)
    ]
    body = markdown_table([_inline(text) for text in table.head], lines, table.left)
    return [f"{level} {_inline(table.title)}", _inline(table.caption), body]


def _inline(text: str) -> str:
    """Escaped for tables, and so that a word in angle brackets is no HTML."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", escaped(text))
