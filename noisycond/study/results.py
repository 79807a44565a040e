"""What came out of a study: a file per run, found by the content of its settings, and all of them as one table."""

import json
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import pandas
from PIL import Image

from noisycond.evaluation.figures import first_of_classes
from noisycond.evaluation.images import Resize, open_images, read_image
from noisycond.evaluation.metrics import METRICS
from noisycond.pictures import image_grid
from noisycond.run_folder import PACKAGES, write_atomically
from noisycond.study.definition import STUDIES, Study, StudyCell
from noisycond.study.planning import ID_LENGTH, NOT_IN_IDENTITY, Plan


SAMPLES_PER_CLASS = 4
CLASSES_SHOWN = 10
LOSSLESS_WIDTH = 700  # pixels of a picture of samples, above which it would be large
COLUMNS = ("block", "cell", "kind", "type", "mode", "strength", "title", "seed", "guidance_scale", "step", "metric")
COLUMNS += ("value",)


@dataclass
class RunRecord:
    """The result of a run, as its file says it.

    Attributes:
        cell, seed: of which run. identity: of the run's settings. status: `done` or `failed`. attempts: how often it
            was tried. reason: one sentence, of a failed one. rows: of metrics.json. curve: the evaluations while it
            trained. commands: as a user types them. seconds: by script. image_choices: every choice of the
            evaluation. environment: versions and hardware. samples: a picture of some of its images.
    """

    block: str
    cell: str
    seed: int
    identity: str
    status: Literal["done", "failed"]
    attempts: int = 1
    reason: str | None = None
    rows: list[dict] = field(default_factory=list)
    curve: list[dict] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    image_choices: dict = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    file_name: str = ""
    samples: Image.Image | None = None

    def save(self, folder: Path) -> Path:
        """Writes the record, and its samples before it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.file_name}.json"
        if self.samples is not None:
            beside = folder / f"{self.file_name}.webp.part"
            lossless = self.samples.width <= LOSSLESS_WIDTH
            self.samples.save(beside, format="webp", lossless=lossless, quality=90, method=6)
            beside.replace(folder / f"{self.file_name}.webp")
        content = {name: value for name, value in vars(self).items() if name not in ("samples", "file_name")}
        lines = [f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items()]
        write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")
        return path


def record_of(plan: Plan, attempts: int, reason: str | None = None, samples_at: float | None = None) -> RunRecord:
    """What the steps of a run left, or why it failed.

    Args:
        samples_at: the guidance scale of the picture of some of the images; None makes none.
    """
    cell = plan.run.cell
    record = RunRecord(
        cell.block,
        cell.label,
        plan.run.seed,
        plan.identity,
        "done" if reason is None else "failed",
        attempts,
        reason,
        commands=[step.command() for step in plan.steps],
        environment=environment(),
        file_name=plan.file_name,
    )
    for step in plan.steps:
        if step.marker.exists():
            record.seconds[step.script] = json.loads(step.marker.read_text())["seconds"]
    if reason is not None:
        return record
    report = json.loads((plan.steps[-1].folder / "metrics.json").read_text(encoding="utf-8"))
    kept = ("guidance_scale", "seed", "num_images", "metrics", "skipped")
    record.rows = [{name: row[name] for name in kept} for row in report["rows"]]
    for row in record.rows:  # no interval is said by leaving it out
        row["metrics"] = {
            name: {key: value for key, value in entry.items() if value is not None or key == "value"}
            for name, entry in row["metrics"].items()
        }
    record.image_choices = report["settings"]
    trainings = [step for step in plan.steps if step.is_training]
    if trainings:
        curve = trainings[-1].folder / "evaluation.jsonl"
        lines = curve.read_text().splitlines() if curve.exists() else []
        record.curve = [_without_settings(json.loads(line)) for line in lines]
    if samples_at is not None:
        record.samples = _samples(plan.steps[-1].folder, record.rows, samples_at)
    return record


def _without_settings(row: dict) -> dict:
    told = row.get("settings", {})
    return {name: value for name, value in row.items() if name != "settings"} | {
        "guidance_scale": told.get("guidance_scale")
    }


def environment() -> dict[str, str]:
    """Versions and hardware, as text."""
    found = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    found["torch-fidelity"] = _version("torch-fidelity") or ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found | {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(cores),
        "devices": _devices(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join(names) or "CPU"


def _samples(folder: Path, rows: Sequence[dict], scale: float) -> Image.Image | None:
    """Some images of some classes, a column per class, at the guidance scale nearest to this one; of a model without
    classes its first images."""
    nearest = min(rows, key=lambda row: (abs((row["guidance_scale"] or 1) - scale), row["seed"]))
    name = f"guidance-{nearest['guidance_scale']:g}-seed-{nearest['seed']}"
    drawn = next(folder.glob(f"images/*/{name}"), None)
    if drawn is None:
        return None
    source = open_images("--pipeline", str(drawn))
    numbers = list(range(min(len(source), SAMPLES_PER_CLASS * CLASSES_SHOWN)))
    columns = CLASSES_SHOWN
    if source.labels is not None:
        of_class = first_of_classes(source.labels, CLASSES_SHOWN, SAMPLES_PER_CLASS)
        numbers, columns = [number for row in zip(*of_class, strict=True) for number in row], len(of_class)
    return image_grid([read_image("--pipeline", source, number, Resize()) for number in numbers], columns)


@dataclass
class Results:
    """All that is known of a study.

    Attributes:
        runs: one per cell and seed, in the study's order; see studies/README.md for the keys. values: tidy, a line
            per number, with [`COLUMNS`]: `step` is <NA> of the final model, and the training step of an evaluation
            while it trained; several seeds of generation are averaged. folder: of the records.
    """

    study: Study
    runs: list[dict]
    values: pandas.DataFrame
    folder: Path

    @property
    def done(self) -> int:
        return sum(run["status"] == "done" for run in self.runs)

    def command(self) -> str:
        """What runs the study and writes this again, as a user types it in the folder of noisycond."""
        words = ["python", "study.py", _as_typed(self.study.path)]
        if os.path.abspath(self.folder) != os.path.abspath(usual_output_folder(self.study) / "results"):
            words += ["--results_dir", _as_typed(self.folder)]
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
        record = _read(path)
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
                "image_choices": record.get("image_choices", {}),
            }
        )
        if record.get("status") == "done":
            lines += _lines(cell, run.seed, record)
    return Results(study, runs, _frame(lines), folder)


def known_records(folder: Path) -> dict[str, Path]:
    """The records in a folder by the identity of their runs, which ends their names."""
    return {path.stem[-ID_LENGTH:]: path for path in sorted(folder.glob("*.json"))}


def is_done(path: Path | None) -> bool:
    """Whether a record is of a run that is done."""
    return _read(path).get("status") == "done"


def _read(path: Path | None) -> dict:
    """A record; empty where there is none, or one that cannot be read, whose run is then missing."""
    try:
        record = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


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
