"""A study's tables: every number as CSV, and what cells come to, compared with clean, as Markdown and for the report.

Words: a *place* is a guidance scale of final models, None where there is none."""

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from noisycond.errors import writing
from noisycond.evaluation.metrics import METRICS, metric_of
from noisycond.markdown import INCONCLUSIVE, MISSING, WIDE, escaped, markdown_table
from noisycond.run_folder import write_atomically
from noisycond.study.statistics import CELL, compare, compare_modes


MARKS = {
    "better": "▲",
    "worse": "▼",
    "higher": "△",
    "lower": "▽",
    "inconclusive": INCONCLUSIVE,
    "": "",
}
# What every table of means is read by.
LEGEND = (
    "n: the seeds of training that a mean is over, where a number does not name its own. ±: their sample standard "
    f"deviation. {MISSING}: no value. An arrow in a heading points to the better values.",
    "▲ better, ▼ worse than clean; △ higher, ▽ lower than clean, of metrics that neither way is better by itself; "
    "≈ inconclusive: at this number of seeds the difference may be chance, which is not to say that there is none. "
    "No mark: not compared (clean itself, or fewer than two seeds in common with it).",
    "A difference is paired by seed and marked where p < 0.05: two-sided paired t test, p adjusted after Benjamini "
    "and Hochberg over all settings and guidance scales of one metric. Every metric is judged by itself.",
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
PAPER_GAMMA = 1.0  # of CEP, the paper's default
FAILED = "Runs that failed or are missing"
NO_VALUES = "No run has values yet."
NO_REGULARIZERS = (
    "There is no table of regularizers: no setting with embedding dropout, label smoothing, input perturbation or CEP "
    "drawn anew has values."
)
NO_MODES = "There is no table of fixed against random: no two settings with values differ in that alone."


@dataclass(frozen=True)
class Table:
    """A table as text, for Markdown and HTML; neither escaped for the one nor for the other.

    Attributes:
        title: what it shows, the block named where there are several. caption: one or more sentences.
        head: a text per column. lines: a text per column. marks: for each text of `lines`, the verdict on it as
            [`compare`] has it (see MARKS), or "". left: numbers of the columns that are no numbers.
    """

    title: str
    caption: str
    head: list[str]
    lines: list[list[str]]
    marks: list[list[str]]
    left: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class _Section:
    """The tables of a block: those at the report's guidance scale, and by title, those at each other.

    Attributes:
        lacking: a sentence for each table that could not be built.
    """

    block: str
    first: list[Table]
    others: dict[str, list[Table]]
    lacking: list[str]


def write_tables(results, folder: str | Path) -> list[Table]:
    """Writes `results.csv` (every value of final models, and a line for each run without), `summary.csv` (what
    [`compare`] gives), `fixed_against_random.csv` (what [`compare_modes`] gives, where a study has such pairs) and
    `results.md`.

    Args:
        results: a study's `Results`, or what has its attributes.

    Returns:
        The tables of `results.md` that could be built, in its order.

    Raises:
        InputError: what [`compare`] raises, or the folder cannot be written to.
    """
    summary, modes = compare(results.values), compare_modes(results.values)
    sections = _sections(results, summary, modes)
    runs = run_table(results)
    folder = Path(folder)
    with writing(str(folder), "the tables"):
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(folder / "results.csv", results_frame(results))
        _write_csv(folder / "summary.csv", summary)
        if len(modes):
            _write_csv(folder / "fixed_against_random.csv", modes)
        else:  # an earlier one would be of other cells
            (folder / "fixed_against_random.csv").unlink(missing_ok=True)
        write_atomically(folder / "results.md", _page(results, sections, runs))
    tables = [table for part in sections for group in (part.first, *part.others.values()) for table in group]
    return tables if runs is None else [*tables, runs]


def results_frame(results) -> pd.DataFrame:
    """Every number of final models, in the order of runs: the cell's identity, `seed`, `guidance_scale`, `metric`,
    `value`, and the run's `status`, `attempts` and `reason`. A run without values has one line, without a metric."""
    columns = ["block", "cell", "seed", "status", "attempts", "reason"]
    runs = pd.DataFrame([{name: run[name] for name in columns} for run in results.runs], columns=columns)
    cells = pd.DataFrame([_identity(cell) for cell in results.study.cells], columns=CELL)
    final = results.values[results.values["step"].isna()]
    final = final[["block", "cell", "seed", "guidance_scale", "metric", "value"]]
    found = runs.merge(cells, how="left", on=["block", "cell"]).merge(final, how="left", on=["block", "cell", "seed"])
    return found[[*CELL, "seed", "guidance_scale", "metric", "value", "status", "attempts", "reason"]]


def run_table(results) -> Table | None:
    """The runs that are not done and why, a line per cell and reason; None where all are done."""
    groups: dict[tuple, list[int]] = {}
    for run in results.runs:
        if run["status"] != "done":
            reason = run["reason"] or ("not run yet" if run["status"] == "missing" else "no reason is known")
            key = run["block"], run["cell"], run["status"], run["attempts"], " ".join(str(reason).split())
            groups.setdefault(key, []).append(run["seed"])
    if not groups:
        return None
    names = _names(results.study.cells)
    lines = [
        [block, names.get((block, cell), cell), _listed(seeds), status, str(attempts), reason]
        for (block, cell, status, attempts, reason), seeds in groups.items()
    ]
    head = ["block", "setting", "seeds", "status", "attempts", "reason"]
    if not any(line[0] for line in lines):
        head, lines = head[1:], [line[1:] for line in lines]
    count = sum(map(len, groups.values()))
    caption = f"{_count(count, 'run')} of {len(results.runs)}; what stands in the other tables is without them."
    left = tuple(n for n, name in enumerate(head) if name != "attempts")
    return Table(FAILED, caption, head, lines, [[""] * len(head) for _ in lines], left)


def _sections(results, summary: pd.DataFrame, modes: pd.DataFrame) -> list[_Section]:
    numbers = _Numbers(results, summary, modes)
    sections = []
    for block in dict.fromkeys(cell.block for cell in results.study.cells):
        first, *others = numbers.places(block) or [None]
        pages = {place: _main_tables(numbers, block, place) for place in (first, *others)}
        extra = {
            NO_REGULARIZERS: _regularizer_table(numbers, block, first),
            NO_MODES: _mode_table(numbers, block, first),
        }
        lacking = [sentence for sentence, table in extra.items() if table is None] if pages[first] else [NO_VALUES]
        titles = {_place_title(place).capitalize(): pages[place] for place in others}
        built = [table for table in extra.values() if table is not None]
        sections.append(_Section(block, pages[first] + built, titles, lacking))
    return sections


class _Numbers:
    """What the tables are made of, looked up by block, cell and place."""

    def __init__(self, results, summary: pd.DataFrame, modes: pd.DataFrame):
        self.study = results.study
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

    def cells(self, block: str) -> list:
        """The block's cells in the study's order, clean first."""
        cells = [cell for cell in self.study.cells if cell.block == block]
        return sorted(cells, key=lambda cell: cell.method.kind != "clean")

    def places(self, block: str) -> list[float | None]:
        """Those measured, the report's (or the nearest to it) first, then in order."""
        found = {place for of_block, _, place in self._seeds if of_block == block}
        ordered = sorted(found - {None}) + [None] * (None in found)
        asked = self.study.report_guidance_scale
        if asked is None or not found - {None}:
            first = None if None in found else (ordered or [None])[0]
        else:
            first = min(found - {None}, key=lambda place: abs(place - asked))
        return [first, *(place for place in ordered if place != first)] if ordered else []

    def metrics(self, block: str, place: float | None) -> list[str]:
        """Those measured there, in the order of METRICS, others behind."""
        found = dict.fromkeys(key[3] for key in self._lines if key[0] == block and key[2] == place)
        return [name for name in METRICS if name in found] + [name for name in found if name not in METRICS]

    def clean(self, block: str) -> str | None:
        return next((cell.label for cell in self.cells(block) if cell.method.kind == "clean"), None)

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
    groups = _grouped(metrics) if len(metrics) > WIDE else {"Every setting": metrics}
    caption = _caption(numbers, block, place)
    return [
        _table(numbers, _title(group, block, place), caption, block, place, numbers.cells(block), names)
        for group, names in groups.items()
    ]


def _regularizer_table(numbers: _Numbers, block: str, place: float | None) -> Table | None:
    """Clean, each regularizer and the slightest corruption; None where the block has no regularizer with values."""
    cells = [cell for cell in numbers.cells(block) if numbers.seeds(block, cell.label, place)]
    kinds = {
        "dropout": _of_kind(cells, "embedding_dropout"),
        "label smoothing": _of_kind(cells, "label_smoothing"),
        "input perturbation": _of_kind(cells, "input_perturbation"),
        "CEP-U": _nearest(_of_kind(cells, "cep", "uniform", "random")),
        "CEP-G": _nearest(_of_kind(cells, "cep", "gaussian", "random")),
    }
    if not any(kinds.values()):
        return None
    kinds = {"clean": _of_kind(cells, "clean"), **kinds, "corruption": _slightest(_of_kind(cells, "corruption"))}
    lacking = [name for name, found in kinds.items() if not found]
    caption = (
        f"{_caption(numbers, block, place)} CEP is shown at γ = {PAPER_GAMMA:g}, the paper's default, or the nearest "
        "that was trained, drawn anew at every step; corruption at the least share: both are chosen by setting, not "
        "by result."
    )
    if lacking:
        caption += f" Without values in this study: {_listed(lacking)}."
    chosen = [cell for found in kinds.values() for cell in found]
    metrics = _headline(numbers.metrics(block, place))
    return _table(numbers, _title("Regularizers", block, place), caption, block, place, chosen, metrics)


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
        f"{_means(place)} Fixed: the same examples are corrupted in the same way, or perturbed alike, throughout "
        "training; random: drawn anew. Below each pair stand the mean difference, over the n seeds that both have, "
        "and its p, adjusted over all such pairs and guidance scales of one metric; marks there compare random with "
        "fixed, not with clean. Intervals stand in fixed_against_random.csv."
    )
    head = ["setting", "mode", "n", *(metric_of(name).heading for name in metrics)]
    return Table(_title("Fixed against random", block, place), caption, head, lines, marks, (0, 1))


def _table(numbers: _Numbers, title, caption, block, place, cells: Iterable, metrics: Sequence[str]) -> Table:
    """A line of means per cell."""
    lines, marks = [], []
    for cell in cells:
        found = [numbers.mean(block, cell.label, place, metric) for metric in metrics]
        name, count = numbers.names[block, cell.label], numbers.count(block, cell.label, place)
        lines.append([name, count, *(text for text, _ in found)])
        marks.append(["", "", *(verdict for _, verdict in found)])
    head = ["setting", "n", *(metric_of(name).heading for name in metrics)]
    return Table(title, caption, head, lines, marks)


def _caption(numbers: _Numbers, block: str, place: float | None) -> str:
    clean = numbers.clean(block)
    counts = [len(numbers.seeds(block, cell.label, place)) for cell in numbers.cells(block)]
    sentences = [_means(place)]
    if clean is None:
        sentences.append("There is no clean cell to compare with.")
    elif not numbers.seeds(block, clean, place):
        sentences.append("The clean cell has no values yet, so nothing is compared with it.")
    elif max(counts) < 2:
        sentences.append("With one seed nothing is known of chance, and nothing is compared.")
    elif max(counts) > min(counts):
        sentences.append(f"Settings have from {min(counts)} to {max(counts)} seeds.")
    return " ".join(sentences)


def _means(place: float | None) -> str:
    return f"Mean ± standard deviation over seeds of training, {_place_title(place)}."


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


def _of_kind(cells: Iterable, kind: str, type: str | None = None, mode: str | None = None) -> list:
    return [
        cell
        for cell in cells
        if cell.method.kind == kind and type in (None, cell.method.type) and mode in (None, cell.method.mode)
    ]


def _nearest(cells: list) -> list:
    """Those of the γ nearest to the paper's, by ratio."""
    far = [abs(math.log(cell.method.strength / PAPER_GAMMA)) for cell in cells]
    return [cell for cell, distance in zip(cells, far, strict=True) if distance == min(far)]


def _slightest(cells: list) -> list:
    """Those of the least share, fixed ones where there are any."""
    least = min((cell.method.strength for cell in cells), default=0)
    cells = [cell for cell in cells if cell.method.strength == least]
    return [cell for cell in cells if cell.method.mode != "random"] or cells


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


def _identity(cell) -> dict:
    method = {name: getattr(cell.method, name) for name in ("kind", "type", "mode", "strength", "title")}
    return {"block": cell.block, "cell": cell.label} | method


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


def _listed(things: Iterable) -> str:
    return ", ".join(map(str, things))


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_atomically(path, frame.to_csv(index=False, lineterminator="\n"))


def _page(results, sections: Sequence[_Section], runs: Table | None) -> str:
    """`results.md`."""
    study = results.study
    parts = [f"# {_inline(study.title)}", _opening(results, runs)]
    asked = study.report_guidance_scale
    measured = set(results.values.loc[results.values["step"].isna(), "guidance_scale"].dropna())
    if asked is not None and measured and asked not in measured:
        parts.append(f"Guidance scale {asked:g}, which the study names for its tables, was not measured.")
    parts.append("\n".join(f"- {sentence}" for sentence in LEGEND))
    for section in sections:
        if section.block:
            parts.append(f"## {_inline(section.block)}")
        level = "###" if section.block else "##"
        parts += [part for table in section.first for part in _markdown(table, level)]
        parts += section.lacking
        for title, tables in section.others.items():
            inside = [part for table in tables for part in _markdown(table, level + "#")]
            parts += [f"<details>\n<summary>{title}</summary>", *inside, "</details>"]
    if runs is not None:
        parts += _markdown(runs, "##")
    again = f"python study.py {shlex.quote(str(study.path))}"
    parts += [
        "## How to make this again",
        "Runs that are done are kept; the others are run, and this is written anew:",
    ]
    parts += [f"```bash\n{again}\n```"]
    return "\n\n".join(parts) + "\n"


def _opening(results, runs: Table | None) -> str:
    study, total = results.study, len(results.runs)
    states = [run["status"] for run in results.runs]
    done = f"{_count(total, 'run')}, all done"
    if runs is not None:
        others = [f"{states.count(name)} {name}" for name in ("failed", "missing") if name in states]
        anchor = re.sub(r"[^\w -]", "", FAILED.lower()).replace(" ", "-")
        done = f"{_count(total, 'run')}: {states.count('done')} done, {' and '.join(others)} ([why](#{anchor}))"
    seeds = f"{_count(len(study.seeds), 'seed')} of training ({_listed(study.seeds)})"
    return (
        f"`{study.path}`: {_count(len(study.cells), 'setting')}, {seeds}; {done}. Every number is in "
        "[results.csv](results.csv), every mean, difference from clean, interval and p in [summary.csv](summary.csv)."
    )


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
