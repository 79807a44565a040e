"""The report of a study: one HTML file with everything in it, which opens without a network, a server or scripts.

What it says is gathered here; how it looks stands in report.html.jinja.
"""

import base64
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from noisycond.errors import writing
from noisycond.evaluation.metrics import METRICS
from noisycond.evaluation.report import plain, said
from noisycond.markdown import MISSING
from noisycond.run_folder import write_atomically
from noisycond.study.definition import Stage, StudyCell
from noisycond.study.figures import Figure
from noisycond.study.results import Results
from noisycond.study.selection import seeds_decide
from noisycond.study.statistics import LEVEL
from noisycond.study.tables import LEGEND, MARKS, Table, ranges, run_table


VERDICTS = {
    "better": "better",
    "worse": "worse",
    "higher": "higher, where neither way is better",
    "lower": "lower, where neither way is better",
    "inconclusive": "inconclusive",
    "equal": "no difference with any seed",
}
LONG = 40  # characters of a text that may take several lines
OPEN_RUNS = 30  # a list of more runs is folded
SHOWN_VALUES = 6  # of a choice in which runs differ
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("noisycond", "study"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(results: Results, tables: Sequence[Table], figures: Sequence[Figure], path: str | Path) -> Path:
    """Writes the report, pictures included, to one file; an earlier one is replaced when the new one is whole.

    Args:
        results: the runs, their values and the study. tables: in the order to show; the one of runs that are not done
            stands with the runs. figures: in the order to show; PNG, JPEG or WebP files. path: the file to write.

    Raises:
        InputError: the file cannot be written, for instance for want of space.
    """
    path = Path(path)
    study, failed = results.study, run_table(results)
    tables = [table for table in tables if table.kind != "runs"]
    page = _TEMPLATES.get_template("report.html.jinja").render(
        title=study.title,
        facts=_facts(results),
        cells=_cells(study.cells),
        many_blocks=len(study.blocks) > 1,
        health=_health(results),
        figures=[_shown_figure(figure, anchor) for figure, anchor in _anchored(figures, "figure", "name")],
        tables=_sheets(tables),
        failed=None if failed is None else _shown_table(failed, "failed"),
        legend=LEGEND[0],
        marks=MARKS,
        verdicts={verdict: meaning for verdict, meaning in VERDICTS.items() if _occurs(verdict, tables)},
        level=LEVEL,
        runs=_runs(results.runs),
        choices=_merged([run["image_choices"] for run in results.runs if run.get("image_choices")]),
        while_training=_merged([run["curve_choices"] for run in results.runs if run.get("curve_choices")]),
        environment=_merged([run["environment"] for run in results.runs if run.get("environment")]),
        definition=_text_of(study.path),
        command=results.command(),
        seeds=len(study.seeds),
        decided=seeds_decide(study),
    )
    with writing(str(path), "the report"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    return path


def _facts(results: Results) -> list[dict]:
    """What the study is: headings with lines, of which some are commands."""
    study, values = results.study, results.values
    final = values[values["step"].isna()]
    blocks = f", in {len(study.blocks)} blocks: {'; '.join(study.blocks)}" if len(study.blocks) > 1 else ""
    scales = sorted(final["guidance_scale"].dropna().unique())
    steps = sorted(values["step"].dropna().unique())
    at_one = study.report_guidance_scale
    guidance = [", ".join(f"{scale:g}" for scale in scales)]
    if scales and at_one is not None:
        guidance.append(f"{at_one:g} in tables and figures at one guidance scale")
    found = set(values["metric"])
    metrics = ", ".join(_unbroken(metric.heading) for name, metric in METRICS.items() if name in found)
    facts = [
        ("Cells", [f"{len(study.cells)}{blocks}"], False),
        ("Seeds", [f"{ranges(study.seeds)}, of {seeds_decide(study)}"], False),
        ("Training", _trainings(study.cells), True),
        ("Evaluation", [_command(study.evaluation)], True),
        ("Guidance scales", guidance, False),
        ("Metrics", [metrics], False),
        (
            "Measured in training",
            [f"{len(steps)} times, from step {steps[0]:,} to {steps[-1]:,}"] if steps else [],
            False,
        ),
    ]
    return [
        {"heading": heading, "lines": [line for line in lines if line], "commands": commands}
        for heading, lines, commands in facts
        if any(lines)
    ]


def _trainings(cells: Sequence[StudyCell]) -> list[str]:
    """Each training as it is where a cell does not set otherwise, a command per script; empty where pipelines are only
    evaluated."""
    commands = []
    for stages in zip(*(cell.stages for cell in cells), strict=True):
        told: dict[str, list] = {}
        for cell, stage in zip(cells, stages, strict=True):
            own = {key.rpartition(".")[2] for key in cell.settings}
            for flag, value in stage.values.items():
                if flag not in own:
                    told.setdefault(flag, []).append(value)
        shared = {flag: values[0] for flag, values in told.items() if all(value == values[0] for value in values)}
        commands.append(_command(replace(stages[0], values=shared)))
    return commands


def _command(stage: Stage) -> str:
    return shlex.join([f"{stage.script}.py", *stage.arguments()])


def _unbroken(text: str) -> str:
    """With no-break spaces, so that "γ = 1" and "FID ↓" stand on one line."""
    return re.sub(r" (?=[=%↓↑])|(?<==) ", "\u00a0", text)


def _cells(cells: Sequence[StudyCell]) -> list[dict]:
    return [
        {
            "label": cell.label,
            "block": cell.block,
            "method": _unbroken(cell.method.title),
            "settings": _settings(cell),
        }
        for cell in cells
    ]


def _settings(cell: StudyCell) -> str:
    """What the study says of this cell alone."""
    told = [f"{flag} {said(value)}" for flag, value in cell.settings.items()]
    return ", ".join([cell.pipeline] if cell.pipeline is not None else told) or MISSING


def _health(results: Results) -> dict:
    """How many runs there are of each kind, and what they took. A run that was never tried is missing."""
    study, found = results.study, Counter(run["status"] for run in results.runs)
    asked = max(len(study.cells) * len(study.seeds), len(results.runs))
    seconds = sum({key: took for run in results.runs for key, took in _steps(run).items()}.values())
    return {
        "asked": asked,
        "done": found["done"],
        "failed": found["failed"],
        "missing": asked - found["done"] - found["failed"],
        "time": _duration(seconds) if seconds else "",
    }


def _seconds(run: Mapping) -> float:
    return sum((run.get("seconds") or {}).values())


def _steps(run: Mapping) -> dict[tuple | str, float]:
    """The seconds of each step by its command, which is the same of a training that several runs share."""
    commands = {
        found.group(): command
        for command in run.get("commands") or []
        if (found := re.search(r"\w+(?=\.py\b)", command)) is not None
    }
    own = (run["block"], run["cell"], run["seed"])
    return {commands.get(script, (*own, script)): seconds for script, seconds in (run.get("seconds") or {}).items()}


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
        slug = _slug(getattr(entry, name))
        seen[slug] += 1
        yield entry, f"{kind}-{slug}" + (f"--{seen[slug]}" if seen[slug] > 1 else "")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "untitled"


def _shown_figure(figure: Figure, anchor: str) -> dict:
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


def _shown_table(table: Table, anchor: str) -> dict:
    columns = [[line[n] for line in table.lines] for n in range(len(table.head))]
    return {
        "anchor": anchor,
        "title": table.title,
        "caption": table.caption,
        "head": table.head,
        "kinds": [_kind(column, n in table.left) for n, column in enumerate(columns)],
        "marked": [any(line[n] for line in table.marks) for n in range(len(table.head))],
        "sortable": table.kind != "modes",  # its lines belong together in threes
        "lines": [
            list(zip([_unbroken(line[0]), *line[1:]], marks, strict=True))
            for line, marks in zip(table.lines, table.marks, strict=True)
        ],
    }


def _sheets(tables: Sequence[Table]) -> list[dict]:
    """The tables as the page holds them: each by itself, or those of a guidance scale folded in one."""
    shown = [(table, _shown_table(table, anchor)) for table, anchor in _anchored(tables, "table", "title")]
    sheets: dict[str, dict] = {}
    for table, content in shown:
        fold = table.folded and table.folded + (f" ({table.block})" if table.block else "")
        anchor = "fold-" + _slug(fold) if fold else content["anchor"]
        sheet = sheets.setdefault(anchor, {"anchor": anchor, "title": fold or table.title, "fold": fold, "tables": []})
        sheet["tables"].append(content)
    return list(sheets.values())


def _kind(column: Sequence[str], is_text: bool) -> str:
    if not is_text:
        return "number"
    return "long" if any(len(text) > LONG for text in column) else "text"


def _occurs(verdict: str, tables: Sequence[Table]) -> bool:
    return any(verdict in marks for table in tables for marks in table.marks)


def _runs(runs: Sequence[Mapping]) -> dict:
    """The runs as the page lists them, a line each, and their commands."""
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
        }
        for run in runs
    ]
    return {
        "scripts": scripts,
        "lines": lines,
        "open": len(lines) <= OPEN_RUNS,
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
            texts = [said(value) if name in record else MISSING for value, record in zip(values, records, strict=True)]
            merged[name] = _counted(Counter(texts))
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


def _by_words(command: str) -> Markup:
    """A command that is broken between its words, and within them only where one is longer than a line."""
    pieces = (
        Markup("<span>{}</span>").format(word) if "-" in word or "/" in word else escape(word)
        for word in re.split(r"(\s)", command)
    )
    return Markup("").join(pieces)


_TEMPLATES.filters["by_words"] = _by_words
