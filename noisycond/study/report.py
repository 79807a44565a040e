"""The report of a study: one HTML file with everything in it, which opens without a network, a server or scripts.

What it says is gathered here; how it looks stands in report.html.jinja.
"""

import base64
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from PIL import Image

from noisycond.errors import writing
from noisycond.evaluation.metrics import METRICS
from noisycond.evaluation.report import MISSING, plain, said
from noisycond.run_folder import write_atomically


if TYPE_CHECKING:
    from noisycond.study.figures import Figure
    from noisycond.study.results import Results
    from noisycond.study.tables import Table

# Verdict to its sign and what it means, said of a cell against the clean one.
VERDICTS = {
    "better": ("+", "better than clean"),
    "worse": ("−", "worse than clean"),
    "higher": ("↑", "higher than clean, where neither way is better"),
    "lower": ("↓", "lower than clean, where neither way is better"),
    "inconclusive": ("≈", "no difference from clean could be shown"),
}
OPEN_RUNS = 30  # a list of more runs is folded
SHOWN_VALUES = 6  # of a choice in which runs differ
_NUMBER = re.compile(r"[+−-]?\d")
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("noisycond", "study"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(results: "Results", tables: Sequence["Table"], figures: Sequence["Figure"], path: str | Path) -> Path:
    """Writes the report, pictures included, to one file; an earlier one is replaced when the new one is whole.

    Args:
        results: the runs, their values and the study. tables: in the order to show; a mark is a key of [`VERDICTS`] or
            empty. figures: in the order to show; PNG, JPEG or WebP files. path: the file to write.

    Raises:
        InputError: the file cannot be written, for instance for want of space.
    """
    path = Path(path)
    study = results.study
    page = _TEMPLATES.get_template("report.html.jinja").render(
        title=study.title,
        facts=_facts(results),
        cells=_cells(study.cells),
        many_blocks=len(study.blocks) > 1,
        health=_health(results),
        figures=[_shown_figure(figure, anchor) for figure, anchor in _anchored(figures, "figure", "name")],
        tables=[_shown_table(table, anchor) for table, anchor in _anchored(tables, "table", "title")],
        verdicts={verdict: VERDICTS[verdict] for verdict in VERDICTS if _occurs(verdict, tables)},
        runs=_runs(results.runs),
        choices=_merged([run["image_choices"] for run in results.runs if run.get("image_choices")]),
        environment=_merged([run["environment"] for run in results.runs if run.get("environment")]),
        definition=_text_of(study.path),
        path=_as_typed(study.path),
        seeds=len(study.seeds),
    )
    with writing(str(path), "the report"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    return path


def _facts(results: "Results") -> dict[str, list[str]]:
    """What the study is, heading to lines."""
    study, values = results.study, results.values
    blocks = f" in {len(study.blocks)} blocks ({'; '.join(study.blocks)})" if len(study.blocks) > 1 else ""
    scales = sorted(values["guidance_scale"].dropna().unique())
    steps = sorted(values["step"].dropna().unique())
    at_one = study.report_guidance_scale
    facts = {
        "Cells": [f"{len(study.cells)}{blocks}"],
        "Seeds of training": [", ".join(map(str, study.seeds))],
        "Training": list(_trainings(study.cells)) or ["none: the pipelines are measured as they are"],
        "Evaluation": [_stage(study.evaluation.script, study.evaluation.values)],
        "Guidance scales": [", ".join(f"{scale:g}" for scale in scales)] if scales else [],
        "Metrics": [", ".join(metric.heading for name, metric in METRICS.items() if name in set(values["metric"]))],
        "Measured during training": [f"after {', '.join(f'{step:,}' for step in steps)} steps"] if steps else [],
    }
    if scales and at_one is not None:
        facts["Guidance scales"].append(f"{at_one:g} where a table or figure shows one alone")
    return {heading: shown for heading, lines in facts.items() if (shown := [line for line in lines if line])}


def _trainings(cells: Sequence) -> Iterator[str]:
    """What all cells share of each training, a line per script."""
    for script in dict.fromkeys(stage.script for cell in cells for stage in cell.stages):
        values = [stage.values for cell in cells for stage in cell.stages if stage.script == script]
        yield _stage(script, {flag: value for flag, value in values[0].items() if _same(values, flag)})


def _same(values: Sequence[Mapping], flag: str) -> bool:
    return all(flag in each and each[flag] == values[0][flag] for each in values)


def _stage(script: str, values: Mapping[str, object]) -> str:
    values = {flag: value for flag, value in values.items() if value is not None}
    recipe = [f"recipe {values.pop('recipe')}"] if "recipe" in values else []
    return ", ".join([f"{script}.py", *recipe, *(f"{flag} {said(value)}" for flag, value in values.items())])


def _cells(cells: Sequence) -> list[dict]:
    return [
        {
            "label": cell.label,
            "block": cell.block,
            "method": cell.method.title,
            "settings": ", ".join(f"{flag} {said(value)}" for flag, value in cell.settings.items())
            or (cell.pipeline or MISSING),
        }
        for cell in cells
    ]


def _health(results: "Results") -> dict:
    """How many runs there are of each kind, and what they took. A run that was never tried is missing."""
    study, found = results.study, Counter(run["status"] for run in results.runs)
    asked = max(len(study.cells) * len(study.seeds), len(results.runs))
    seconds = sum(_seconds(run) for run in results.runs)
    return {
        "asked": asked,
        "done": found["done"],
        "failed": found["failed"],
        "missing": asked - found["done"] - found["failed"],
        "time": _duration(seconds) if seconds else "",
    }


def _seconds(run: Mapping) -> float:
    return sum((run.get("seconds") or {}).values())


def _duration(seconds: float) -> str:
    """Two units of time: "4 h 46 min", "3 min 20 s", "12 s"."""
    hours, minutes, rest = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _anchored(entries: Sequence, kind: str, name: str) -> Iterator[tuple]:
    """Each entry with an id of its own in the page, made of its name."""
    seen: Counter = Counter()
    for entry in entries:
        slug = re.sub(r"[^a-z0-9]+", "-", getattr(entry, name).lower()).strip("-") or "untitled"
        seen[slug] += 1
        yield entry, f"{kind}-{slug}" + (f"--{seen[slug]}" if seen[slug] > 1 else "")


def _shown_figure(figure: "Figure", anchor: str) -> dict:
    data = Path(figure.path).read_bytes()
    with Image.open(BytesIO(data)) as image:
        kind, (width, height) = Image.MIME[image.format], image.size
    return {
        "anchor": anchor,
        "title": figure.title,
        "caption": figure.caption,
        "alt": figure.alt or figure.title,
        "source": f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}",
        "width": width,
        "height": height,
    }


def _shown_table(table: "Table", anchor: str) -> dict:
    marks = table.marks or [[""] * len(line) for line in table.lines]
    columns = [[line[n] for line in table.lines] for n in range(len(table.head))]
    return {
        "anchor": anchor,
        "title": table.title,
        "caption": table.caption,
        "head": table.head,
        "kinds": ["number" if _is_of_numbers(column) else "text" for column in columns],
        "lines": [list(zip(line, marked, strict=True)) for line, marked in zip(table.lines, marks, strict=True)],
    }


def _is_of_numbers(column: Sequence[str]) -> bool:
    return all(_NUMBER.match(text) or text in ("", MISSING) for text in column)


def _occurs(verdict: str, tables: Sequence["Table"]) -> bool:
    return any(verdict in marks for table in tables for marks in table.marks)


def _runs(runs: Sequence[Mapping]) -> dict:
    """The runs as the page lists them: a line each, those that are not done again with their reason, and commands."""
    scripts = list(dict.fromkeys(script for run in runs for script in run.get("seconds") or {}))
    lines = [
        {
            "block": run["block"],
            "cell": run["cell"],
            "seed": run["seed"],
            "status": run["status"],
            "attempts": run.get("attempts") or 0,
            "seconds": [_rounded((run.get("seconds") or {}).get(script)) for script in scripts],
            "total": _rounded(_seconds(run) or None),
            "reason": run.get("reason") or "",
        }
        for run in runs
    ]
    return {
        "scripts": scripts,
        "lines": lines,
        "open": len(lines) <= OPEN_RUNS,
        "troubled": [line for line in lines if line["status"] != "done"],
        "commands": _commands(runs),
    }


def _rounded(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds:,.0f}"


def _commands(runs: Sequence[Mapping]) -> dict[tuple[str, str], list[tuple[int, str]]]:
    """Block and cell to the commands of each seed."""
    commands: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for run in runs:
        if run.get("commands"):
            commands.setdefault((run["block"], run["cell"]), []).append((run["seed"], "\n".join(run["commands"])))
    return commands


def _merged(records: Sequence[Mapping]) -> dict:
    """What the records say, as text, nested as they are; where they differ, each value with how many say so."""
    merged: dict[str, object] = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [plain(record[name]) if name in record else None for record in records]
        if all(isinstance(value, dict) and value for value in values):
            merged[name] = _merged(values)
        else:
            texts = Counter(said(value) if name in record else MISSING for record, value in zip(records, values, strict=True))
            merged[name] = _counted(texts)
    return merged


def _counted(texts: Counter) -> str:
    if len(texts) == 1:
        return next(iter(texts))
    shown = [f"{text} ({count} {'run' if count == 1 else 'runs'})" for text, count in texts.most_common(SHOWN_VALUES)]
    others = len(texts) - len(shown)
    return "; ".join(shown) + (f"; and {others} other values" if others else "")


def _text_of(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _as_typed(path: str | Path) -> str:
    """The study's file for a command line: relative where it lies below the current folder."""
    path = Path(path)
    below = path.is_absolute() and path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if below else path))
