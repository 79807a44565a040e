"""A study's file, YAML, as a study: what it may say, and what is refused of it.

studies/README.md has every key.
"""

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from noisycond.errors import InputError, closest, flag_hint, require
from noisycond.recipes import load_yaml
from noisycond.study.definition import BEFORE, Stage, Study, StudyCell, StudyRun
from noisycond.study.methods import METHOD_FLAGS, Method, method_of
from noisycond.study.statistics import clean_cells


STUDIES = Path(__file__).resolve().parents[2] / "studies"
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
    "launch_arguments",
    "seeds",
    "grid",
    "cells",
    "evaluation",
    "report",
)
_STAGE_KEYS = ("script", "recipe", "settings")
_EVALUATION_KEYS = ("recipe", "settings")
_REPORT_KEYS = ("guidance_scale",)
_LAUNCHED_BY_STUDY = ("num_processes", "num_machines", "machine_rank", "gpu_ids", "mixed_precision", "multi_gpu")
_LAUNCHED_BY_STUDY += ("main_process_port", "main_process_ip")


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
    said = load_yaml(path, str(path))
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
        _launch(path, said.get("launch_arguments")),
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
    for flag, value in values.items():
        require(
            isinstance(flag, str) and re.fullmatch(r"(\w+\.)?\w+", flag),
            f"{path}: {flag!r} in {where} is no flag; write it with underscores and without dashes.",
        )
        require(
            flag.rpartition(".")[2] not in SET_BY_STUDY,
            f"{path}: `{flag}` in {where} is set by study.py; leave it off.",
        )
        require(
            value is not None and value != [],
            f"{path}: `{flag}` in {where} is empty; give it a value (an empty one does not take a recipe's away).",
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
    for stage in stages:
        require(stage.get("script"), f"{path}: `script` is missing in a stage.")
        script = str(stage["script"]).removesuffix(".py")
        require(
            script.startswith("train_") and (STUDIES.parent / f"{script}.py").is_file(),
            f"{path}: `script` is {script}, but it must name a training script of the root, such as "
            f"train_class_cond{closest(script, [file.stem for file in STUDIES.parent.glob('train_*.py')])}.",
        )
        _checked(path, stage.get("settings"), f"the settings of {script}")
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


def _suffixes(values: Mapping[str, object], chosen: Sequence[object]) -> list[str]:
    """What of the chosen values stands in a name: not of the one list that a `[[…]]` is."""
    choices = [value for value in values.values() if isinstance(value, list)]
    both = zip(chosen, choices, strict=True)
    return [_said(value) for value, there in both if len(there) > 1 or not isinstance(value, list)]


def _said(value: object) -> str:
    if isinstance(value, list):
        return "+".join(map(_said, value))
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
            both = [key for key in own if key in grid]
            require(
                not both, f"{path}: `{''.join(both[:1])}` of the cell {name} is in `grid` too; leave one of them off."
            )
            facts = _facts(path, name, facts)
            _check_pipeline(path, name, pipeline, bool(stages), own)
            for values, of_cell in _grid(own):
                settings = shared | values
                planned = _planned(path, name, stages, settings)
                cell = StudyCell(
                    ", ".join(_suffixes(grid, of_block)),
                    "-".join([str(name), *_suffixes(own, of_cell)]),
                    _method(path, name, planned, facts),
                    settings,
                    planned,
                    pipeline,
                )
                seen[(cell.block, cell.label)] += 1
                require(seen[(cell.block, cell.label)] == 1, f"{path}: two cells are called {cell}.")
                yield cell


def _facts(path: Path, name: str, facts: object) -> dict:
    """What `method` of a cell says."""
    facts = {} if facts is None else facts
    require(isinstance(facts, dict), f"{path}: `method` of the cell {name} must be `flag: value` lines.")
    for flag in facts:
        require(
            flag in METHOD_FLAGS,
            f"{path}: `{flag}` in the method of the cell {name} is none of its flags"
            f"{flag_hint(str(flag), METHOD_FLAGS)}.",
        )
    return facts


def _method(path: Path, name: str, stages: Sequence[Stage], facts: Mapping[str, object]) -> Method:
    """What a cell does: the one method of its trainings and of what they start from; `mixed` where there are more."""
    try:
        found = [method_of(facts), *(method_of(stage.with_recipe(), stage.script) for stage in stages)]
    except InputError as error:
        raise InputError(f"{path}, cell {name}: {error}") from None
    found = [method for method in found if method.kind != "clean"]
    return (found[0] if len(found) == 1 else Method("mixed")) if found else Method("clean")


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
    planned = tuple(
        Stage(stage["script"], stage["values"] | values) for stage, values in zip(stages, own, strict=True)
    )
    for number, stage in enumerate(planned):
        where = f"{path}: {stage.script} of the cell {name}"
        require(
            stage.values.get("recipe") is not None,
            f"{where} has no `recipe`; name one of recipes/, or `none` where all is said here.",
        )
        named = [flag for flag, value in stage.values.items() if BEFORE in str(value)]
        require(number > 0 or not named, f"{where} names {BEFORE}, but nothing comes before the first training.")
        require(
            number == 0 or any(value == BEFORE for value in stage.values.values()),
            f"{where} starts from nothing: give it a flag whose value is {BEFORE}, what the training before left.",
        )
        require(
            all(stage.values[flag] == BEFORE for flag in named),
            f"{where}: `{''.join(named[:1])}` must be {BEFORE} alone, the folder that the training before left.",
        )
    return planned


def _evaluation(path: Path, said: object) -> Stage:
    _check_keys(path, said, _EVALUATION_KEYS, " in `evaluation`")
    values = _checked(path, said.get("settings"), "`evaluation`")
    return Stage("evaluate_model", {"recipe": said.get("recipe")} | values)


def _launch(path: Path, said: object) -> tuple[str, ...]:
    """Words for `accelerate launch`; those that study.py gives, and precision, which is a flag of the scripts, are
    refused."""
    try:
        words = shlex.split("" if said is None else str(said))
    except ValueError as error:
        raise InputError(f"{path}: `launch_arguments` cannot be read as a command line ({error}).") from None
    for word in words:
        name = word.split("=")[0].replace("-", "_").removeprefix("__")
        instead = {"num_processes": "say `processes`", "mixed_precision": "say it in `settings`"}.get(
            name, "leave it off"
        )
        require(name not in _LAUNCHED_BY_STUDY, f"{path}: {word} in `launch_arguments` is set by study.py; {instead}.")
    return tuple(words)


def _report_guidance_scale(path: Path, said: dict) -> float | None:
    report = said.get("report") or {}
    _check_keys(path, report, _REPORT_KEYS, " in `report`")
    scale = report.get("guidance_scale")
    require(
        scale is None or (isinstance(scale, (int, float)) and scale >= 1),
        f"{path}: `guidance_scale` of `report` is {scale!r}, but it must be a number from 1 on.",
    )
    return None if scale is None else float(scale)
