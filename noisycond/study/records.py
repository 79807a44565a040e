"""The result of a run as a file: what its steps left, by which versions and hardware, and a picture of samples."""

import json
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from noisycond import hardware
from noisycond.errors import in_one_line
from noisycond.evaluation.figures import first_of_classes
from noisycond.evaluation.images import Resize, open_images, read_image
from noisycond.pictures import image_grid
from noisycond.run_folder import PACKAGES, version_of, write_atomically
from noisycond.study.planning import ID_LENGTH, Plan
from noisycond.study.steps import seconds_of


SAMPLES_PER_CLASS = 4
CLASSES_SHOWN = 10
LOSSLESS_WIDTH = 700  # pixels of a picture of samples, above which it would be large


@dataclass
class RunRecord:
    """The result of a run, as its file says it.

    Attributes:
        cell, seed: of which run. identity: of the run's settings. status: `done` or `failed`. attempts: how often it
            was tried. reason: one sentence, of a failed one. rows: of metrics.json. curve: the evaluations while it
            trained. commands: as a user types them. seconds: by script, over all its launches, or those so far.
            image_choices: every choice of the evaluation. curve_choices: those of the evaluations while it trained.
            environment: versions and hardware. samples: a picture of some of its images; samples_scale: the guidance
            scale that they were drawn at, None where there is none.
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
    curve_choices: dict = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    samples_scale: float | None = None
    file_name: str = ""
    samples: Image.Image | None = None

    def save(self, folder: Path) -> Path:
        """Writes the record, and its samples before it, in the place of others of the same run: it may have had
        another name. One that is done gives way to no failure, of another machine, say."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.file_name}.json"
        if self.status == "failed" and is_done(path):
            return path
        if self.samples is not None:
            beside = folder / f"{self.file_name}.webp.part"
            lossless = self.samples.width <= LOSSLESS_WIDTH
            self.samples.save(beside, format="webp", lossless=lossless, quality=90, method=6)
            beside.replace(folder / f"{self.file_name}.webp")
        content = {name: value for name, value in vars(self).items() if name not in ("samples", "file_name")}
        lines = [f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items()]
        write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")
        for other in folder.glob(f"*{self.identity}.json"):
            if other != path and (self.status == "done" or not is_done(other)):
                other.unlink(missing_ok=True)
                other.with_suffix(".webp").unlink(missing_ok=True)
        return path


def record_of(
    plan: Plan,
    attempts: int,
    reason: str | None = None,
    samples_at: float | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> RunRecord:
    """What the steps of a run left, or why it failed.

    Args:
        samples_at: the guidance scale of the picture of some of the images; None makes none. warn: told why there is
            no picture, where it cannot be made.
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
    known = {step.script: seconds_of(step) for step in plan.steps}
    record.seconds = {script: seconds for script, seconds in known.items() if seconds is not None}
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
        rows = _evaluations(trainings[-1].folder / "evaluation.jsonl")
        record.curve_choices = rows[-1]["settings"] if rows else {}
        for row in rows:
            guidance_scale = row.pop("settings").get("guidance_scale")
            record.curve.append(row | {"guidance_scale": guidance_scale})
    if samples_at is not None:
        try:
            # Of the scales that were measured the nearest.
            row = min(record.rows, key=lambda row: (abs((row["guidance_scale"] or 1) - samples_at), row["seed"]))
            record.samples = _samples(plan.steps[-1].folder, row)
            record.samples_scale = row["guidance_scale"] if record.samples is not None else None
        except Exception as error:  # an image that is cut, say: a result is worth more than its picture
            warn(f"{plan.run}: there is no picture of its samples ({type(error).__name__}: {in_one_line(error)}).")
    return record


def _evaluations(log: Path) -> list[dict]:
    """The evaluations of a training, each with its `settings`, without lines that a kill has cut."""
    rows = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"]), "settings": dict(row.get("settings") or {})})
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def environment() -> dict[str, str]:
    """Versions and hardware, as text."""
    found = {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    found["torch-fidelity"] = version_of("torch-fidelity") or ""
    return found | {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(hardware.cores()),
        "devices": _devices(),
    }


def _devices() -> str:
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join(names) or "CPU"


def _samples(folder: Path, row: Mapping) -> Image.Image | None:
    """Some of the images that a row of metrics is of, a column per class; of a model without classes the first."""
    name = f"guidance-{row['guidance_scale']:g}-seed-{row['seed']}"
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


def known_records(folder: Path) -> dict[str, Path]:
    """The records in a folder by the identity of their runs, which ends their names; of several of one run one that
    is done."""
    known: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        identity = path.stem[-ID_LENGTH:]
        if identity not in known or (is_done(path) and not is_done(known[identity])):
            known[identity] = path
    return known


def stand_of(folder: Path) -> dict[str, int]:
    """What differs where a record has been written since."""
    stand = {}
    for path in folder.glob("*.json"):
        with suppress(OSError):  # gone by now
            stand[path.name] = path.stat().st_mtime_ns
    return stand


def is_done(path: Path | None) -> bool:
    """Whether a record is of a run that is done."""
    return read_record(path).get("status") == "done"


def read_record(path: Path | None) -> dict:
    """A record; empty where there is none, or none that is whole, whose run is then missing."""
    try:
        record = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
        return record if path is not None and _is_whole(record, path) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_whole(record: dict, path: Path) -> bool:
    """Raises one of Python's errors, or says no, where something is not as [`RunRecord.save`] writes it."""
    if record["identity"] != path.stem[-ID_LENGTH:] or record["status"] not in ("done", "failed"):
        return False
    for row in record["rows"]:
        row["guidance_scale"], [entry["value"] for entry in row["metrics"].values()]
    for row in record["curve"]:
        row["step"], row["guidance_scale"]
    return record["status"] == "failed" or bool(record["rows"])
