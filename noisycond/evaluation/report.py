"""An evaluation as it is handed on: figures and every choice behind them as JSON, a Markdown table, and plots."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from noisycond.errors import require
from noisycond.evaluation.drawing import Subject
from noisycond.evaluation.metrics import metric_of
from noisycond.evaluation.uncertainty import MetricSummary, Summary, conclusive, summarize
from noisycond.markdown import INCONCLUSIVE, MISSING, WIDE, escaped, markdown_table
from noisycond.run_folder import write_atomically


def write_report(folder: str | Path, rows: Sequence[dict], settings: dict, metrics: Sequence[str]) -> str:
    """Writes `metrics.json` (settings, rows, summaries; strict JSON, null for what is not finite) and `metrics.md`
    (the table, what its marks mean, each row where a line of the table covers several, and the settings).

    Args:
        rows: as [`summarize`] takes them. settings: every choice made, may be nested. metrics: the columns, in order.

    Returns:
        The table with its legend and notes, for printing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summaries = summarize(rows)
    record = {"settings": settings, "rows": rows, "summaries": summaries}
    table = metrics_table(summaries, metrics)
    parts = ["# Metrics", table]
    if any(summary.runs * summary.seeds > 1 for summary in summaries):
        parts += ["## Every run and seed", _rows_table(rows, metrics)]
    parts += ["## Choices made", _choices(settings)]
    text = json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "metrics.json", text + "\n")
    write_atomically(folder / "metrics.md", "\n\n".join(parts) + "\n")
    return table


def check_report_folder(folder: Path, subjects: Sequence[Subject]) -> None:
    """Raises InputError where a folder holds the report of something else, which would be replaced. A report of some
    of these subjects may be: it is made anew with the others.

    Args:
        subjects: what is to be measured, with `label` and `members`.
    """
    try:
        earlier = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that was cut
        return
    now = {(subject.label, member) for subject in subjects for member in subject.members}
    others = [str(row.get("label")) for row in earlier if (row.get("label"), row.get("member")) not in now]
    require(
        not others or not now,
        f"--output_dir {folder} holds the report of {', '.join(dict.fromkeys(others))}, which is not measured now; "
        "name another folder, or name them too.",
    )


def metrics_table(summaries: Sequence[Summary], metrics: Sequence[str]) -> str:
    """A Markdown table, a line per guidance scale and label (or, of many metrics, a line per metric), and below it
    what its marks mean.

    The best of each metric and guidance scale is bold, and a value whose gap to it is below the spread is marked. The
    best is not bold where a gap to it cannot be judged for want of a spread, and where all are equal.
    """
    notes: list[str] = []
    groups: dict[float | None, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(summary.guidance_scale, []).append(summary)
    lines = []
    for scale, group in groups.items():
        columns = [_column(group, name, notes) for name in metrics]
        for number, summary in enumerate(group):
            images = MISSING if summary.num_images is None else f"{summary.num_images:,}"
            first = [escaped(summary.label), _scale(scale), images, _repeats(summary)]
            lines.append(first + [column[number] for column in columns])
    head = ["label", "guidance", "images", "over"] + [metric_of(name).heading for name in metrics]
    if len(metrics) > max(WIDE, len(lines)):  # turned: a line per metric
        table = markdown_table(*_transposed(head, lines), left=(0,))
    else:
        table = markdown_table(head, lines, left=(0, 3))
    return "\n\n".join([table, *_legend(summaries, metrics, table), *notes])


def _transposed(head: Sequence[str], lines: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The table with a line per metric and a column per label and guidance scale."""
    names = [label if scale == MISSING else f"{label}, {scale}" for label, scale, *_ in lines]
    body = [list(column) for column in zip(head, *lines, strict=True)]
    return ["label, guidance" if any(scale != MISSING for _, scale, *_ in lines) else "label", *names], body[2:]


def plot_metrics(folder: str | Path, summaries: Sequence[Summary], metrics: Sequence[str]) -> Path:
    """A panel per metric, to `metrics.png`: over guidance scales a line per label, and a dashed one for image folders,
    which have none; or, at a single scale, a point per label. Bars are the spread, or the bootstrap interval where
    there is no spread; the picture says which.

    Returns:
        The picture's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(summary.label for summary in summaries))
    over_guidance = len({summary.guidance_scale for summary in summaries} - {None}) > 1
    columns = min(len(metrics), 4 if len(metrics) > 6 else 3)
    lines = -(-len(metrics) // columns)
    width, height = 3.1 * columns, 2.6 if over_guidance else 0.9 + 0.32 * len(labels)
    if not over_guidance:  # the labels stand to the left of the panels
        width += 0.08 * max(len(_short(label)) for label in labels)
    size = {"figsize": (width, height * lines + 0.5), "layout": "constrained"}
    figure, grid = plt.subplots(lines, columns, squeeze=False, sharey=not over_guidance, **size)
    for axes in grid.flat[len(metrics) :]:
        axes.remove()
    panels = grid.flat[: len(metrics)]
    for name, axes in zip(metrics, panels, strict=True):
        draw = _draw_over_guidance if over_guidance else _draw_points
        draw(axes, summaries, name, labels)
        axes.set_title(metric_of(name).heading, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if not any(_finite(summary, name) for summary in summaries):
            axes.set_xticks([])
            if over_guidance:  # else the labels stand there
                axes.set_yticks([])
            axes.text(0.5, 0.5, "not computed", transform=axes.transAxes, ha="center", color="dimgray", fontsize=9)
    if over_guidance:
        _add_legend(figure, panels, labels)
        for axes in panels[-columns:]:
            axes.set_xlabel("guidance scale", fontsize=9)
    figure.supxlabel(_meaning_of_bars(summaries, metrics), fontsize=8, color="dimgray")
    path = Path(folder) / "metrics.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, dpi=120, format="png")
    plt.close(figure)
    beside.replace(path)
    return path


def _scale(scale: float | None) -> str:
    return MISSING if scale is None else f"{scale:g}"


def _interval(interval: Sequence[float] | None, form: str) -> str:
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"


def _finite(summary: Summary, name: str) -> MetricSummary | None:
    found = summary.metrics.get(name)
    return found if found is not None and math.isfinite(found.mean) else None


def _repeats(summary: Summary) -> str:
    """What one line of the table covers: "3 seeds", "2 runs × 3 seeds"."""
    runs = f"{summary.runs} runs" if summary.runs > 1 else ""
    seeds = f"{summary.seeds} seeds" if summary.seeds > 1 else ""
    return " × ".join(filter(None, (runs, seeds))) or "1 row"


def _column(group: Sequence[Summary], name: str, notes: list[str]) -> list[str]:
    """One metric of all labels at one guidance scale."""
    best = _best(group, name)
    verdicts = [None if best is None else conclusive(best, summary, name) for summary in group]
    equal = [best is not None and _is_equal(best, summary, name) for summary in group]
    compared = [n for n, summary in enumerate(group) if _finite(summary, name) and not equal[n]]
    # With a gap unjudged, bold would claim what is not known; with nothing behind it, it would claim nothing.
    bold = bool(compared) and all(verdicts[n] is not None for n in compared)
    cells = []
    for n, summary in enumerate(group):
        found = _finite(summary, name)
        if found is None:
            cells.append(f"{MISSING} [{_noted(notes, name, summary)}]")
            continue
        form = metric_of(name).form(found.mean)
        number = f"**{found.mean:{form}}**" if bold and equal[n] else f"{found.mean:{form}}"
        spread = "" if found.spread is None else f" ± {found.spread:{form}}"
        mark = f" {INCONCLUSIVE}" if verdicts[n] is False and not equal[n] else ""
        partial = f" [{_noted(notes, name, summary)}]" if name in summary.skipped else ""
        cells.append(number + spread + _interval(found.interval, form) + mark + partial)
    return cells


def _best(group: Sequence[Summary], name: str) -> Summary | None:
    """The first of the best; None where neither way is better."""
    with_it = [summary for summary in group if _finite(summary, name)]
    better = metric_of(name).better
    if not with_it or better is None:
        return None
    choose = min if better == "lower" else max
    return choose(with_it, key=lambda summary: summary.metrics[name].mean)


def _is_equal(best: Summary, summary: Summary, name: str) -> bool:
    found = _finite(summary, name)
    return found is not None and found.mean == best.metrics[name].mean


def _noted(notes: list[str], name: str, summary: Summary) -> int:
    """The number of the note that says why a value is missing or covers less than the others; added if new."""
    if name in summary.skipped:
        reason = summary.skipped[name]
    else:
        reason = "the value is not finite." if name in summary.metrics else "not computed."
    text = f"{metric_of(name).title}{' of some rows' if _finite(summary, name) else ''}: {escaped(reason)}"
    known = [note.split("] ", 1)[1] for note in notes]
    if text not in known:
        notes.append(f"[{len(notes) + 1}] {text}")
        known.append(text)
    return known.index(text) + 1


def _legend(summaries: Sequence[Summary], metrics: Sequence[str], table: str) -> list[str]:
    shown = [(summary, _finite(summary, name)) for summary in summaries for name in metrics if _finite(summary, name)]
    over = " or ".join(sorted({found.of for _, found in shown if found.of}))
    legend = []
    if over:
        averaged = ", after averaging the seeds of each" if over == "runs" else ""
        legend.append(f"±: the sample standard deviation over {over}{averaged}. Bold: the best at its guidance scale.")
    if f" {INCONCLUSIVE}" in table:
        legend.append(f"{INCONCLUSIVE}: the gap to the best is below the spread over {over}: inconclusive.")
    alone = list(dict.fromkeys(summary.label for summary, found in shown if found.spread is None))
    if alone:
        whose = "" if len(alone) == len({summary.label for summary in summaries}) else " for " + ", ".join(alone)
        legend.append(
            f"No spread is known{whose}: one run and one seed cannot tell a gap from chance, so none is called best."
        )
    if any(found.interval for _, found in shown):
        legend.append(
            "[low, high]: bootstrap over the images of one row; covers neither training anew nor the reference images."
        )
    return legend


def _rows_table(rows: Sequence[dict], metrics: Sequence[str]) -> str:
    lines = []
    for row in rows:
        seed = MISSING if row["seed"] is None else str(row["seed"])
        source = row["pipeline"] if row["pipeline"] is not None else row["images"]
        line = [escaped(row["label"]), escaped(source), _scale(row["guidance_scale"]), seed]
        for name in metrics:
            found = row["metrics"].get(name, {})
            value = found.get("value")
            if value is None or not math.isfinite(value):
                line.append(MISSING)
            else:
                form = metric_of(name).form(value)
                line.append(f"{value:{form}}" + _interval(found.get("interval"), form))
        lines.append(line)
    head = ["label", "run", "guidance", "seed"] + [metric_of(name).heading for name in metrics]
    return markdown_table(head, lines, left=(0, 1))


def _choices(settings: Mapping, depth: int = 0) -> str:
    """Settings as a Markdown list, nested as they are."""
    lines = []
    for name, value in plain(settings).items():
        indent = "  " * depth
        if isinstance(value, dict) and value:
            lines += [f"{indent}- {name}:", _choices(value, depth + 1)]
        else:
            lines.append(f"{indent}- {name}: {said(value)}")
    return "\n".join(lines)


def said(value: object) -> str:
    """A setting as reports say it: yes, no and none for Python's words, lists with commas."""
    if isinstance(value, list):
        return ", ".join(map(said, value)) or "none"
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def plain(value: object) -> object:
    """What strict JSON can say: numbers of NumPy and torch as Python's, paths as text, null for what is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _short(label: str) -> str:
    return label if len(label) <= 32 else "…" + label[-31:]


def _style(labels: Sequence[str], label: str) -> dict:
    import matplotlib

    number = labels.index(label)
    colours = matplotlib.colormaps["tab10" if len(labels) <= 10 else "tab20"].colors
    return {"color": colours[number % len(colours)], "marker": "osD^vP*X"[number % 8], "markersize": 4}


def _bars(found: MetricSummary) -> tuple[float, float]:
    """How far the bars reach below and above the mean."""
    if found.spread is not None:
        return found.spread, found.spread
    if found.interval is not None:
        return found.mean - found.interval[0], found.interval[1] - found.mean
    return 0.0, 0.0


def _meaning_of_bars(summaries: Sequence[Summary], metrics: Sequence[str]) -> str:
    shown = [found for summary in summaries for name in metrics if (found := _finite(summary, name))]
    over = sorted({found.of for found in shown if found.of})
    meanings = [f"± standard deviation over {' or '.join(over)}"] if over else []
    if any(found.spread is None and found.interval for found in shown):
        meanings.append("bootstrap interval" + (" where there is one row" if over else ""))
    return f"bars: {'; '.join(meanings)}" if meanings else ""


def _add_legend(figure, panels: Sequence, labels: Sequence[str]) -> None:
    """Once for all panels, above them, in as many columns as fit."""
    handles = {}
    for axes in panels:
        handles |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [text for text in map(_short, labels) if text in handles]
    if shown:
        fitting = figure.get_figwidth() // (0.085 * max(map(len, shown)) + 0.7)
        columns = int(min(len(shown), max(1, fitting)))
        place = {"loc": "outside upper center", "ncols": columns}
        figure.legend([handles[text] for text in shown], shown, fontsize=9, frameon=False, **place)


def _draw_over_guidance(axes, summaries: Sequence[Summary], name: str, labels: Sequence[str]) -> None:
    lowest = []
    for label in labels:
        found = {each.guidance_scale: _finite(each, name) for each in summaries if each.label == label}
        style = _style(labels, label)
        lowest += [each.mean - _bars(each)[0] for each in found.values() if each]
        folder = found.pop(None, None)
        if folder:
            low, high = folder.mean - _bars(folder)[0], folder.mean + _bars(folder)[1]
            axes.axhline(folder.mean, color=style["color"], linestyle="--", linewidth=1.2, label=_short(label))
            axes.axhspan(low, high, color=style["color"], alpha=0.15, linewidth=0)
        if any(found.values()):
            _draw_line(axes, found, _beside(summaries, labels, label), {"label": _short(label)} | style)
    if lowest and min(lowest) >= 0 and axes.get_ylim()[0] < 0:
        # A metric that is 0 throughout: no room for what cannot be.
        axes.set_ylim(bottom=-0.05 * axes.get_ylim()[1])


def _beside(summaries: Sequence[Summary], labels: Sequence[str], label: str) -> float:
    """How far a label's points stand beside their guidance scale, so that bars do not hide each other."""
    scales = sorted({each.guidance_scale for each in summaries} - {None})
    gap = min(after - before for before, after in itertools.pairwise(scales))
    return min(0.05, 0.25 / len(labels)) * gap * (labels.index(label) - (len(labels) - 1) / 2)


def _draw_line(axes, found: Mapping[float, MetricSummary | None], beside: float, style: dict) -> None:
    """One label's line, broken where a value is missing."""
    ordered = sorted(found.items())
    means = [each.mean if each else math.nan for _, each in ordered]
    bars = list(zip(*(_bars(each) if each else (0.0, 0.0) for _, each in ordered), strict=True))
    options = {"linewidth": 1.2, "capsize": 2, "elinewidth": 0.8}
    axes.errorbar([scale + beside for scale, _ in ordered], means, bars, **options, **style)


def _draw_points(axes, summaries: Sequence[Summary], name: str, labels: Sequence[str]) -> None:
    for summary in summaries:
        found = _finite(summary, name)
        if found is None:
            continue
        style = _style(labels, summary.label)
        if summary.guidance_scale is None:  # hollow, for a folder may share its label with a pipeline
            style["markerfacecolor"] = "white"
        low, high = _bars(found)
        bars = {"xerr": [[low], [high]], "capsize": 3} if low or high else {}
        axes.errorbar(found.mean, labels.index(summary.label), linestyle="", **bars, **style)
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
