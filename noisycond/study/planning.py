"""What a run has to do: its steps, each a script with flags in a folder of its own, known by the content of its
settings."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from noisycond.errors import InputError, require
from noisycond.study.definition import BEFORE, Stage, Study, StudyRun, as_word


# What a step's result does not depend on, beyond the order of floating-point operations.
NOT_IN_IDENTITY = {
    "recipe",  # its values are
    "output_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "logging_dir",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "dataloader_num_workers",
    "cpu_threads_per_process",
    "cache_dir",
    "cache_latents",
    "latent_cache_dir",
    "text_cache_dir",
    "gradient_checkpointing",
    "enable_xformers_memory_efficient_attention",
    "torch_compile",
    "validation_steps",
    "save_corruption_map",
    "figures",
    "update_card",
    "save_stats",
}
ID_LENGTH = 10
_SMALL_FILE = 2**24  # bytes; larger ones, folders and Hub ids are known by name


@dataclass(frozen=True)
class Step:
    """One launch of a script.

    Attributes:
        script: its name, without the ending. folder: its `--output_dir`. words: all flags. identity: a hash of the
            content of its settings and of those of the step before. processes: of its launch. launch: words for
            `accelerate launch` that the study asks for.
        steps: optimizer steps of a training, where its settings say so.
    """

    script: str
    folder: Path
    words: tuple[str, ...]
    identity: str
    processes: int = 1
    launch: tuple[str, ...] = ()
    steps: int | None = None

    @property
    def is_training(self) -> bool:
        return self.script.startswith("train_")

    @property
    def marker(self) -> Path:
        """The file that says that the step ended well; beside the folder."""
        return self.folder.with_name(self.folder.name + ".json")

    def command(self) -> str:
        """As a user types it."""
        several = ["--multi_gpu", "--num_processes", str(self.processes)] if self.processes > 1 else []
        return shlex.join(["accelerate", "launch", *several, *self.launch, f"{self.script}.py", *self.words])


@dataclass(frozen=True)
class Plan:
    """The steps of a run, its trainings first, the evaluation last; the identity of that is the run's."""

    run: StudyRun
    steps: tuple[Step, ...]

    @property
    def identity(self) -> str:
        return self.steps[-1].identity

    @property
    def file_name(self) -> str:
        """What the run's result is called, without the ending."""
        return f"{self.run.name}-{self.identity}"


def plan_runs(study: Study, runs: Sequence[StudyRun], folder: Path) -> list[Plan]:
    """The steps of each run below a folder. Trainings of equal settings are one step, named after the first run that
    has it.

    Raises:
        InputError: a recipe cannot be read.
    """
    owners: dict[str, str] = {}
    plans = {run.name: _plan(study, run, folder, owners) for run in study.runs()}
    first: dict[str, Plan] = {}
    for plan in plans.values():
        other = first.setdefault(plan.identity, plan)
        require(
            other is plan,
            f"{study.path}: {other.run} and {plan.run} are one and the same by their settings; leave one of them off.",
        )
    return [plans[run.name] for run in runs]


def refuse_unknown_flags(study: Study, parsers: dict[str, Callable[[list[str]], object]]) -> dict[str, str]:
    """Has each script parse the flags of each cell.

    Args:
        parsers: by a script's name, what parses its command line.

    Returns:
        By the label of a cell, block and all, whose values the script refuses: its sentence. Such a cell fails alone.

    Raises:
        InputError: a cell has a flag that the script does not know; the study's file has to be mended first.
    """
    refused: dict[str, str] = {}
    for plan in plan_runs(study, study.runs(seeds=study.seeds[:1]), Path("runs")):
        cell = plan.run.cell
        for step in plan.steps:
            words = [word for word in step.words if word != "--resume_from_checkpoint=latest"]
            try:
                parsers[step.script](words)
            except InputError as error:
                sentence = str(error)
                if sentence.startswith("unknown flag"):
                    raise InputError(f"{study.path}, cell {cell}, {step.script}.py: {sentence}") from None
                refused.setdefault(str(cell), f"{step.script}.py: {sentence}")
    return refused


def identity_of(stage: Stage, before: str | None, processes: int = 1, launch: Sequence[str] = ()) -> str:
    """A hash of what a script will do.

    Two spellings of one number are equal; the order of flags, and whether a value comes from a recipe or from the
    study, make no difference; a value that is the flag's default differs from none. A small file that a value names
    counts by what is in it, a folder, a larger file or a Hub id by its name.

    Args:
        before: the identity of the step before, of which there may be none. processes: of a training, which decide
            how many images a step has. launch: see [`Step`].
    """
    values = stage.with_recipe()
    content = {name: _plain(value) for name, value in values.items() if name not in NOT_IN_IDENTITY}
    several = [processes, *launch] if processes > 1 or launch else []
    text = json.dumps([stage.script, before, content, *several], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]


def _plain(value: object) -> object:
    """A value as one of equal effect would be: numbers as numbers, one value as a list of one, files by content."""
    if isinstance(value, list):
        return _plain(value[0]) if len(value) == 1 else [_plain(each) for each in value]
    text = as_word(value)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)  # YAML reads 1e-4 as text
    if os.path.isfile(text) and os.path.getsize(text) < _SMALL_FILE:  # Path raises of texts too long for a name
        return hashlib.sha256(Path(text).read_bytes()).hexdigest()
    return text


def _plan(study: Study, run: StudyRun, folder: Path, owners: dict[str, str]) -> Plan:
    """Args: owners: by the identity of a step that was planned before, the name of its folder; is added to."""
    steps: list[Step] = []
    before, identity = run.cell.pipeline, run.cell.pipeline
    launched = (study.processes, study.launch)
    for stage in run.cell.stages:
        values = {name: before if value == BEFORE else value for name, value in stage.values.items()}
        told = {name: None if value == BEFORE else value for name, value in stage.values.items()} | {"seed": run.seed}
        identity = identity_of(Stage(stage.script, told), identity, *launched)
        own = "" if stage is run.cell.stages[0] else f"-{stage.script.removeprefix('train_')}"
        name = owners.setdefault(identity, _name_of(folder / "trained", identity) or f"{run.name}{own}-{identity}")
        place = folder / "trained" / name
        ours = {"seed": run.seed, "output_dir": str(place)}
        words = (*Stage(stage.script, values | ours).arguments(), "--resume_from_checkpoint=latest")
        total = _whole(stage.with_recipe().get("max_train_steps"))
        steps.append(Step(stage.script, place, words, identity, *launched, total))
        before = str(place)
    stage = run.evaluation
    told = {"figures": False, "seeds": [run.seed]} | dict(stage.values)
    identity = identity_of(Stage(stage.script, told), identity)
    name = _name_of(folder / "evaluated", identity) or f"{run.name}-{identity}"
    ours = {"pipeline": f"{run.name}={before}", "output_dir": str(folder / "evaluated" / name)}
    words = tuple(Stage(stage.script, told | ours).arguments())
    steps.append(Step(stage.script, folder / "evaluated" / name, words, identity, *launched))
    return Plan(run, tuple(steps))


def _name_of(parent: Path, identity: str) -> str | None:
    """What an earlier call named the folder of this identity: cells may have been renamed since."""
    return next((path.name for path in sorted(parent.glob(f"*-{identity}")) if path.is_dir()), None)


def _whole(value: object) -> int | None:
    try:
        return int(float(str(value)))
    except (TypeError, ValueError):
        return None
