"""A study as one YAML file: a base recipe, cells, seeds and an evaluation; and the runs that it asks for.

A *cell* is one setting, a line of the tables. A *run* is a cell with a seed. A *block* is what cells share that are
compared with one another.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from noisycond.errors import InputError, closest, flag_hint, require
from noisycond.study.methods import Method, method_of
from noisycond.study.statistics import clean_cells


STUDIES = Path(__file__).resolve().parents[2] / "studies"
BEFORE = "{before}"  # in a stage's settings: the folder that the stage before left
# What study.py sets itself, of every training and evaluation.
SET_BY_STUDY = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "seed",
    "pipeline",
    "images",
    "dry_run",
)
_KEYS = (
    "title",
    "script",
    "recipe",
    "settings",
    "stages",
    "processes",
    "seeds",
    "grid",
    "cells",
    "evaluation",
    "report",
)
_STAGE_KEYS = ("script", "recipe", "settings")
_EVALUATION_KEYS = ("recipe", "settings")
_REPORT_KEYS = ("guidance_scale",)


@dataclass(frozen=True)
class Stage:
    """A training of a cell, or its evaluation.

    Attributes:
        script: the name of a script at the root, without its ending. values: flag to value, `recipe` among them.
    """

    script: str
    values: Mapping[str, object]

    def arguments(self) -> list[str]:
        """The flags of the stage, as words of a command line."""
        words = []
        for name, value in self.values.items():
            if value is None:
                continue
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}", str(value)]
        return words


@dataclass(frozen=True)
class StudyCell:
    """A setting.

    Attributes:
        block: what it shares with those it is compared with; "" where a study has one block. label: the cell's name.
        method: what it does to conditions. settings: the flag values that the study gives it beyond what all have.
        stages: its trainings, one after the other; none where `pipeline` names what is only evaluated.
        pipeline: a pipeline folder or Hub id that is only evaluated, or None.
    """

    block: str
    label: str
    method: Method
    settings: Mapping[str, object]
    stages: tuple[Stage, ...]
    pipeline: str | None = None

    def __str__(self) -> str:
        return f"{self.block}, {self.label}" if self.block else self.label


@dataclass(frozen=True)
class StudyRun:
    """A cell with a seed, and how it is evaluated."""

    cell: StudyCell
    seed: int
    evaluation: Stage

    @property
    def name(self) -> str:
        """What its files are called."""
        parts = [part for part in (self.cell.block, self.cell.label, f"seed-{self.seed}") if part]
        return re.sub(r"[^\w.+-]+", "_", "-".join(parts))

    def __str__(self) -> str:
        return f"{self.cell}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study as its file says it.

    Attributes:
        path: the file. evaluation: of every cell, by evaluate_model.py. report_guidance_scale: of the tables and
            figures at one guidance scale. processes: of every launch, each with a GPU where there are any; a step's
            images are those of one process times their number.
    """

    path: Path
    title: str
    seeds: tuple[int, ...]
    cells: tuple[StudyCell, ...]
    evaluation: Stage
    report_guidance_scale: float | None = None
    processes: int = 1

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def blocks(self) -> list[str]:
        return list(dict.fromkeys(cell.block for cell in self.cells))

    def runs(
        self, labels: Sequence[str] = (), seeds: Sequence[int] = (), blocks: Sequence[str] = ()
    ) -> list[StudyRun]:
        """The runs, seed by seed, so that each seed that is done is a whole table.

        Args:
            labels, seeds, blocks: those alone; all where empty.

        Raises:
            InputError: there is no such cell, seed or block; names the flag and the nearest.
        """
        for option, wanted, known in (
            ("cells", labels, [cell.label for cell in self.cells]),
            ("seeds", seeds, self.seeds),
            ("blocks", blocks, self.blocks),
        ):
            for value in wanted:
                there = ", ".join(dict.fromkeys(map(str, known)))
                require(
                    value in known,
                    f"--{option} {value}: {self.path} has no such one{closest(str(value), map(str, known))}; it has "
                    f"{there}.",
                )
        return [
            StudyRun(cell, seed, self.evaluation)
            for seed in self.seeds
            for cell in self.cells
            if (not seeds or seed in seeds)
            and (not labels or cell.label in labels)
            and (not blocks or cell.block in blocks)
        ]


def study_names() -> list[str]:
    """The studies in studies/."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def find_study(name: str) -> Path:
    """The file of a study given by path, or by name in studies/."""
    for path in (Path(name), STUDIES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = study_names()
    raise InputError(f"{name}: neither a study's file nor one of {', '.join(known)}{closest(name, known)}.")


def read_study(name: str) -> Study:
    """Reads a study's file; see studies/README.md for what it may say.

    Raises:
        InputError: no such file, invalid YAML, an unknown key, a missing or empty part, a flag that study.py sets
            itself, two cells of one name, or a seed twice. Values of flags are checked by the scripts.
    """
    path = find_study(name)
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    _check_keys(path, said, _KEYS, "")
    for key in ("seeds", "cells", "evaluation"):
        require(said.get(key), f"{path}: `{key}` is missing or empty.")
    seeds = said["seeds"]
    require(
        isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds),
        f"{path}: `seeds` must be a list of whole numbers from 0 on, but is {seeds!r}.",
    )
    require(len(set(seeds)) == len(seeds), f"{path}: `seeds` names one twice: {seeds}.")
    processes = said.get("processes", 1)
    require(
        type(processes) is int and processes > 0,
        f"{path}: `processes` must be a whole number from 1 on, but is {processes!r}.",
    )
    study = Study(
        path,
        str(said.get("title") or path.stem),
        tuple(seeds),
        tuple(_cells(path, said)),
        _evaluation(path, said["evaluation"]),
        _report_guidance_scale(path, said),
        processes,
    )
    _refuse_equal_names(study)
    try:
        clean_cells((cell.block, cell.label, cell.method.kind) for cell in study.cells)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return study


def _refuse_equal_names(study: Study) -> None:
    """Raises InputError where two runs would have files of one name."""
    first: dict[str, StudyRun] = {}
    for run in study.runs(seeds=study.seeds[:1]):
        other = first.setdefault(run.name, run)
        require(
            other is run,
            f"{study.path}: the cells {other.cell} and {run.cell} would have files of one name; rename one of them.",
        )


def _check_keys(path: Path, values: object, known: Sequence[str], where: str) -> None:
    require(isinstance(values, dict), f"{path}: expected `key: value` lines{where}.")
    for key in values:
        require(key in known, f"{path}: unknown key {key!r}{where}{flag_hint(str(key), known)}.")


def _checked(path: Path, values: object, where: str) -> dict:
    """Flags of a part of the file; none of them may be one that study.py sets."""
    values = {} if values is None else values
    require(isinstance(values, dict), f"{path}: expected `flag: value` lines in {where}.")
    for flag in values:
        require(isinstance(flag, str), f"{path}: {flag!r} in {where} is no flag.")
        require(
            flag.rpartition(".")[2] not in SET_BY_STUDY,
            f"{path}: `{flag}` in {where} is set by study.py; leave it off.",
        )
    return values


def _stages(path: Path, said: dict) -> list[dict]:
    """The trainings of every cell, each with script, recipe and settings; none in a study without training."""
    if "stages" in said:
        extra = [key for key in ("script", "recipe", "settings") if key in said]
        require(not extra, f"{path}: `{''.join(extra[:1])}` belongs into the first of `stages` there.")
        require(isinstance(said["stages"], list) and said["stages"], f"{path}: `stages` must be a list of trainings.")
        for stage in said["stages"]:
            _check_keys(path, stage, _STAGE_KEYS, " in a stage")
    elif said.get("script") is None:
        extra = [key for key in ("recipe", "settings", "grid") if key in said]
        require(not extra, f"{path}: `{''.join(extra[:1])}` needs `script`, the training script it is for.")
        return []
    stages = said.get("stages") or [{key: said[key] for key in _STAGE_KEYS if key in said}]
    for number, stage in enumerate(stages):
        require(stage.get("script"), f"{path}: `script` is missing in a stage.")
        script = str(stage["script"]).removesuffix(".py")
        require(
            script.startswith("train_") and (STUDIES.parent / f"{script}.py").is_file(),
            f"{path}: `script` is {script}, but it must name a training script of the root, such as "
            f"train_class_cond{closest(script, [file.stem for file in STUDIES.parent.glob('train_*.py')])}.",
        )
        values = _checked(path, stage.get("settings"), f"the settings of {script}")
        require(
            number > 0 or BEFORE not in map(str, values.values()), f"{path}: nothing comes before the first stage."
        )
    names = [str(stage["script"]).removesuffix(".py") for stage in stages]
    require(len(set(names)) == len(names), f"{path}: two of `stages` are of one script.")
    return [
        {"script": name, "values": {"recipe": stage.get("recipe")} | (stage.get("settings") or {})}
        for name, stage in zip(names, stages, strict=True)
    ]


def _grid(values: Mapping[str, object]) -> Iterator[tuple[dict, list]]:
    """The combinations of what is a list, each with the values that were chosen; `[[…]]` is one value."""
    varied = {key: value for key, value in values.items() if isinstance(value, list)}
    for chosen in itertools.product(*varied.values()):
        yield {**values, **dict(zip(varied, chosen, strict=True))}, list(chosen)


def _said(value: object) -> str:
    text = f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
    return text.rstrip("/").rpartition("/")[2] or text


def _cells(path: Path, said: dict) -> Iterator[StudyCell]:
    stages = _stages(path, said)
    require(isinstance(said["cells"], dict), f"{path}: `cells` must be `name: settings` lines.")
    grid = _checked(path, said.get("grid"), "`grid`")
    seen = Counter()
    for shared, of_block in _grid(grid):
        for name, own in said["cells"].items():
            own = dict(own) if isinstance(own, dict) else own
            facts, pipeline = (own.pop(key, None) if isinstance(own, dict) else None for key in ("method", "pipeline"))
            own = _checked(path, own, f"the cell {name}")
            _check_pipeline(path, name, pipeline, bool(stages), own)
            for values, of_cell in _grid(own):
                settings = shared | values
                planned = _planned(path, name, stages, settings)
                told = dict(planned[0].values) if planned else {}
                cell = StudyCell(
                    ", ".join(map(_said, of_block)),
                    "-".join([str(name), *map(_said, of_cell)]),
                    method_of(told | (facts or {})),
                    settings,
                    planned,
                    pipeline,
                )
                seen[(cell.block, cell.label)] += 1
                require(seen[(cell.block, cell.label)] == 1, f"{path}: two cells are called {cell}.")
                yield cell


def _check_pipeline(path: Path, name: str, pipeline: object, trains: bool, own: dict) -> None:
    require(
        trains or pipeline is not None,
        f"{path}: the cell {name} names no `pipeline`, and the study has no `script` that trains one.",
    )
    require(
        not trains or pipeline is None,
        f"{path}: the cell {name} names a `pipeline`, but the study's `script` trains one.",
    )
    require(
        trains or not own,
        f"{path}: `{''.join(list(own)[:1])}` of the cell {name} is for a training, but there is none.",
    )


def _planned(path: Path, name: str, stages: Sequence[dict], settings: Mapping[str, object]) -> tuple[Stage, ...]:
    """The stages of a cell: its settings go to the first, or to the one that they name."""
    own: list[dict] = [{} for _ in stages]
    scripts = [stage["script"] for stage in stages]
    for key, value in settings.items():
        script, dot, flag = key.rpartition(".")
        require(
            not dot or script in scripts,
            f"{path}: `{key}` of the cell {name} names no stage of the study; there are {', '.join(scripts)}.",
        )
        own[scripts.index(script) if dot else 0][flag] = value
    return tuple(Stage(stage["script"], stage["values"] | values) for stage, values in zip(stages, own, strict=True))


def _evaluation(path: Path, said: object) -> Stage:
    _check_keys(path, said, _EVALUATION_KEYS, " in `evaluation`")
    values = _checked(path, said.get("settings"), "`evaluation`")
    return Stage("evaluate_model", {"recipe": said.get("recipe")} | values)


def _report_guidance_scale(path: Path, said: dict) -> float | None:
    report = said.get("report") or {}
    _check_keys(path, report, _REPORT_KEYS, " in `report`")
    scale = report.get("guidance_scale")
    require(
        scale is None or (isinstance(scale, (int, float)) and scale >= 1),
        f"{path}: `guidance_scale` of `report` is {scale!r}, but it must be a number from 1 on.",
    )
    return None if scale is None else float(scale)
