"""What came out of a study: a file per run, found by the content of its settings, and all of them as one table."""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas

from noisycond.evaluation.metrics import METRICS
from noisycond.study.definition import Study, StudyCell
from noisycond.study.planning import NOT_IN_IDENTITY, Plan
from noisycond.study.reading import STUDIES
from noisycond.study.records import known_records, read_record


COLUMNS = ("block", "cell", "kind", "type", "mode", "strength", "title", "seed", "guidance_scale", "step", "metric")
COLUMNS += ("value",)


@dataclass
class Results:
    """All that is known of a study.

    Attributes:
        runs: one per cell and seed, in the study's order: block, cell, seed; status (`done`, `failed`, `missing`) and
            reason; attempts, seconds, commands, environment, image_choices, curve_choices and samples_scale as in
            [`noisycond.study.records.RunRecord`]; settings, the flags in which cells differ; samples, a path or None.
        values: tidy, a line per number, with [`COLUMNS`]: `step` is <NA> of the final model, and the training step of
            an evaluation while it trained; several seeds of generation are averaged. folder: of the records.
        output_folder, report_folder: of models, and of tables and figures; None: the usual ones.
    """

    study: Study
    runs: list[dict]
    values: pandas.DataFrame
    folder: Path
    output_folder: Path | None = None
    report_folder: Path | None = None

    @property
    def done(self) -> int:
        return sum(run["status"] == "done" for run in self.runs)

    def command(self) -> str:
        """What runs the study and writes this again, as a user types it in the folder of noisycond."""
        usual = usual_output_folder(self.study)
        output = self.output_folder or usual
        places = {
            "--output_dir": (output, usual),
            "--results_dir": (self.folder, output / "results"),
            "--report_dir": (self.report_folder or output, output),
        }
        words = ["python", "study.py", _as_typed(self.study.path)]
        for flag, (folder, where) in places.items():
            if os.path.abspath(folder) != os.path.abspath(where):
                words += [flag, _as_typed(folder)]
        return shlex.join(words)


def usual_output_folder(study: Study) -> Path:
    """Where study.py writes a study's results where it is not told otherwise."""
    return Path("runs") / "studies" / study.name


def _as_typed(path: Path) -> str:
    """Relative to the current folder where it lies below; a study or result of the checkout relative to that; else as
    it was given."""
    whole = Path(os.path.abspath(path))
    for below, root in ((Path.cwd(), Path.cwd()), (STUDIES, STUDIES.parent)):
        if whole.is_relative_to(below):
            return str(whole.relative_to(root))
    return str(path)


def read_results(study: Study, plans: Sequence[Plan], folder: Path) -> Results:
    """Reads the records of these runs, wherever their files got their names from.

    Args:
        plans: of the runs to read; see [`noisycond.study.planning.plan_runs`]. folder: of the records.
    """
    known = known_records(folder)
    differing = _differing(study.cells)
    runs, lines = [], []
    for plan in plans:
        run, cell = plan.run, plan.run.cell
        path = known.get(plan.identity)
        record = read_record(path)
        samples = None if path is None else path.with_suffix(".webp")
        runs.append(
            {
                "block": cell.block,
                "cell": cell.label,
                "seed": run.seed,
                "status": record.get("status", "missing"),
                "reason": record.get("reason"),
                "attempts": record.get("attempts", 0),
                "seconds": record.get("seconds", {}),
                "commands": record.get("commands", [step.command() for step in plan.steps]),
                "settings": {name: value for name, value in cell.settings.items() if name in differing},
                "environment": record.get("environment", {}),
                "samples": samples if samples is not None and samples.exists() else None,
                "samples_scale": record.get("samples_scale"),
                "image_choices": record.get("image_choices", {}),
                "curve_choices": record.get("curve_choices", {}),
            }
        )
        if record.get("status") == "done":
            lines += _lines(cell, run.seed, record)
    return Results(study, runs, _frame(lines), folder)


def _differing(cells: Sequence[StudyCell]) -> set[str]:
    names = {name for cell in cells for name in cell.settings} - NOT_IN_IDENTITY
    return {name for name in names if len({str(cell.settings.get(name)) for cell in cells}) > 1}


def _lines(cell: StudyCell, seed: int, record: Mapping) -> list[tuple]:
    method = cell.method
    head = (cell.block, cell.label, method.kind, method.type, method.mode, method.strength, method.title, seed)
    found: dict[tuple, list[float]] = {}
    for row in record["rows"]:
        for name, entry in row["metrics"].items():
            value = entry["value"]
            found.setdefault((row["guidance_scale"], None, name), []).append(math.nan if value is None else value)
    for row in record["curve"]:
        for name, value in row.items():
            if name in METRICS:
                found[(row["guidance_scale"], row["step"], name)] = [math.nan if value is None else value]
    return [(*head, *key, sum(values) / len(values)) for key, values in found.items()]


def _frame(lines: Sequence[tuple]) -> pandas.DataFrame:
    frame = pandas.DataFrame(lines, columns=list(COLUMNS))
    return frame.astype({"strength": float, "guidance_scale": float, "value": float, "step": "Int64"})
