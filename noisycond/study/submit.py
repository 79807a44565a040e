"""A study as a SLURM job array instead of runs here: a script per run, and one file for sbatch.

Every script calls study.py for its run alone, which records the result, takes up what was cut and repeats nothing.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from noisycond.arguments import Arguments, flag
from noisycond.errors import InputError, require, writing
from noisycond.run_folder import write_atomically
from noisycond.study.definition import StudyRun


STUDY_SCRIPT = Path(__file__).resolve().parents[2] / "study.py"
ARRAY, LOGS = "array.sbatch", "logs"
# What was written into a folder: the study, and of each file the digests that it may have.
MARKER = "submission.json"
# Before the time limit a run is told to save a checkpoint and to leave.
SECONDS_TO_LEAVE = 300
_CPUS_PER_GPU = 8
_TIMES = (  # what sbatch takes, as days, hours, minutes and seconds
    r"(?P<minutes>\d+)(?::(?P<seconds>\d+))?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?",
)


@dataclass
class SubmitArguments(Arguments):
    """How the runs of a study are handed to SLURM; of study.py."""

    submit: str | None = flag(
        None, "Instead of running anything, write into this folder a script per run and a SLURM job array of them."
    )
    slurm_time: str = flag(
        "24:00:00", "Time limit of a job; a run that needs more saves a checkpoint and is queued again."
    )
    slurm_partition: str | None = flag(None, "Partition of the jobs; the default is the cluster's.")
    slurm_account: str | None = flag(None, "Account that the jobs are charged to; the default is the cluster's.")
    slurm_cpus_per_run: int | None = flag(None, "CPU cores of a run; the default is 8 for each GPU.")
    slurm_max_parallel: int | None = flag(None, "At most so many runs at a time; the default is no limit of ours.")
    slurm_setup: str | None = flag(
        None,
        "Shell commands before each run, such as 'module load cuda; source .venv/bin/activate'; without, jobs have "
        "the environment of the shell that calls sbatch.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.submit is None:
            for item in fields(SubmitArguments):
                if item.name.startswith("slurm_"):
                    require(self.is_default(item.name), f"--{item.name} has no effect without --submit FOLDER.")
            return
        require(self.submit.strip(), "--submit is empty; name the folder that the job scripts are written into.")
        seconds = _seconds(self.slurm_time)
        require(
            seconds is not None and seconds > SECONDS_TO_LEAVE,
            f"--slurm_time is {self.slurm_time!r}, but must be more than {SECONDS_TO_LEAVE // 60} minutes, which a "
            "run has to leave, and read as for sbatch: HOURS:MINUTES:SECONDS, DAYS-HOURS, or MINUTES.",
        )
        for name in ("slurm_partition", "slurm_account"):
            value = getattr(self, name)
            require(
                value is None or re.fullmatch(r"[\w.,+@/:=-]+", value),
                f"--{name} is {value!r}, but a name that SLURM knows has no spaces or quotes.",
            )
        for name in ("slurm_cpus_per_run", "slurm_max_parallel"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} is {value}, but it must be positive.")
        require(self.slurm_setup is None or self.slurm_setup.strip(), "--slurm_setup is empty; leave it off.")


def write_submission(
    study_path: str | Path,
    runs: Sequence[StudyRun],
    folder: str | Path,
    options: SubmitArguments,
    processes: int = 1,
) -> list[Path]:
    """Writes a script per run, and `array.sbatch`, which starts them as a SLURM job array.

    The scripts go to the folder that is the current one now, where the study's relative paths count from. What an
    earlier submission of this study left in the folder is replaced, or removed where its run is gone.

    Args:
        study_path: the study's file, as study.py takes it. runs: what is submitted, in the array's order.
        options: the arguments of study.py; what is not for choosing runs or for the job array is handed on.
        processes: of each run, each with a GPU.

    Returns:
        The scripts, in the order of `runs`, and array.sbatch.

    Raises:
        InputError: there are no runs, or the folder is a file, or holds another study's submission, files that no
            submission wrote, or one that was changed since; nothing is written then.
    """
    require(runs, "--submit: there is nothing to submit; --cells, --seeds or --blocks leave no run.")
    folder, study = Path(folder), Path(study_path)
    names = [f"{run.name}.sh" for run in runs]
    assert len(set(names)) == len(names), names
    texts = {name: _run_script(study, run, options) for name, run in zip(names, runs, strict=True)}
    texts[ARRAY] = _array_script(study, names, folder, options, processes)
    earlier = _earlier_files(folder, study)
    with writing(f"--submit {folder}", "the job scripts"):
        (folder / LOGS).mkdir(parents=True, exist_ok=True)  # sbatch makes no folder for its logs
        # Killed at any moment, this leaves a folder whose files are all known.
        digests = {name: [_digest(text.encode())] for name, text in texts.items()}
        both = {name: earlier.get(name, []) + digests.get(name, []) for name in earlier | digests}
        _write_marker(folder, study, both)
        for name in earlier.keys() - texts.keys():
            for path in (folder / name, folder / f"{name}.part"):
                path.unlink(missing_ok=True)
        for name, text in texts.items():
            write_atomically(folder / name, text)
            (folder / name).chmod(0o755)
        _write_marker(folder, study, digests)
    return [folder / name for name in texts]


def _seconds(time: str) -> int | None:
    """The length of a time as sbatch takes it; None where it is none."""
    match = next(filter(None, (re.fullmatch(form, time) for form in _TIMES)), None)
    if match is None:
        return None
    parts = {name: int(value or 0) for name, value in match.groupdict().items()}
    days, hours, minutes, seconds = (parts.get(name, 0) for name in ("days", "hours", "minutes", "seconds"))
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def _words(flag_name: str, *values: object) -> list[str]:
    """A flag with its values, of which a single one may begin as a flag does."""
    texts = [str(value) for value in values]
    return [f"{flag_name}={texts[0]}"] if texts[0].startswith("-") else [flag_name, *texts]


def _run_script(study: Path, run: StudyRun, options: SubmitArguments) -> str:
    words = ["python", str(STUDY_SCRIPT), str(study)]
    if run.cell.block:
        words += _words("--blocks", run.cell.block)
    words += _words("--cells", run.cell.label) + _words("--seeds", run.seed) + _handed_on(options)
    return f"""#!/bin/bash
# {_in_a_comment(study)}: {_in_a_comment(run)}. Run again, it goes on where it stopped. Written by study.py --submit.
cd {shlex.quote(str(Path.cwd()))} || exit
# Told to stop, study.py has the training save a checkpoint: exec gives it this script's place.
exec {shlex.join(words)}
"""


def _handed_on(options: SubmitArguments) -> list[str]:
    """The flags that are not for choosing runs or for the job array, where they are not the default."""
    own = {"cells", "seeds", "blocks", *(item.name for item in fields(SubmitArguments))}
    words = []
    for item in fields(options):
        value, default = getattr(options, item.name), item.default
        if item.name not in own and value != (item.default_factory() if default is MISSING else default):
            words += _words(f"--{item.name}", *(value if isinstance(value, list) else [value]))
    return words


def _array_script(study: Path, names: Sequence[str], folder: Path, options: SubmitArguments, processes: int) -> str:
    most = options.slurm_max_parallel
    logs = str(folder.resolve() / LOGS).replace("%", "%%") + "/%x-%A_%a.log"
    resources = {
        "job-name": re.sub(r"[^\w.+-]+", "_", study.stem),
        "array": f"0-{len(names) - 1}" + (f"%{most}" if most is not None else ""),
        "nodes": 1,
        "ntasks": 1,
        "gpus-per-node": processes,
        "cpus-per-task": options.slurm_cpus_per_run or _CPUS_PER_GPU * processes,
        "time": options.slurm_time,
        "partition": options.slurm_partition,
        "account": options.slurm_account,
        "open-mode": "append",
        "output": shlex.quote(logs),
    }
    lines = "\n".join(f"#SBATCH --{name}={value}" for name, value in resources.items() if value is not None)
    scripts = "\n".join(f"    {shlex.quote(name)}" for name in names)
    setup = "" if options.slurm_setup is None else f"\n{{\n{options.slurm_setup}\n}} || exit\n"
    return f"""#!/bin/bash
# The runs of {_in_a_comment(study)}, each a job of one node: sbatch {_in_a_comment(folder / ARRAY)}
# Written by study.py --submit. When the jobs have ended, study.py makes tables and figures of their results.
{lines}
#SBATCH --requeue
# Some minutes before the time limit the signal goes to this shell alone ("B:"), which tells study.py: that has the
# training save a checkpoint, and accelerate launch, which would kill it after 30 seconds, need not know.
#SBATCH --signal=B:USR1@{SECONDS_TO_LEAVE}

scripts=(
{scripts}
)
script=${{scripts[${{SLURM_ARRAY_TASK_ID:?start this file with sbatch}}]}}
cd {shlex.quote(str(Path.cwd()))} || exit
{setup}
out_of_time=
trap 'out_of_time=yes; kill -TERM $(jobs -p)' USR1
trap 'kill -TERM $(jobs -p)' TERM  # the job is cancelled, or another takes its place
{shlex.quote(str(folder.resolve()))}/"$script" &
run=$!
wait "$run"
status=$?
while kill -0 "$run" 2> /dev/null; do  # a signal ends a wait, not the run
    wait "$run"
    status=$?
done

if [ "$out_of_time" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _in_a_comment(value: object) -> str:
    """On one line, whatever it is: what follows a line break in a comment would be a command."""
    return " ".join(str(value).split())


def _earlier_files(folder: Path, study: Path) -> dict[str, list[str]]:
    """What an earlier submission of the study left in the folder: file to the digests that it may have.

    Raises:
        InputError: something else is there.
    """
    if not folder.exists():
        return {}
    require(folder.is_dir(), f"--submit {folder} is a file, not a folder.")
    there = sorted(path.name for path in folder.iterdir() if path.name not in (MARKER, f"{MARKER}.part", LOGS))
    earlier, known = _read_marker(folder), {}
    if earlier is not None:
        require(
            earlier["study"] == str(study.resolve()),
            f"--submit {folder} holds the submission of {earlier['study']}; name another folder.",
        )
        known = earlier["files"]
    foreign = [name for name in there if name.removesuffix(".part") not in known]
    require(
        not foreign,
        f"--submit {folder} holds {', '.join(foreign[:3])}{' and more' if len(foreign) > 3 else ''}, which no "
        "submission wrote; name another folder, so that nothing of it is lost.",
    )
    changed = [name for name in known if not _is_as_written(folder / name, known[name])]
    require(
        not changed,
        f"--submit {folder}: {', '.join(changed[:3])} was changed since it was written; remove it, or name another "
        "folder, so that the change is not lost.",
    )
    return known


def _is_as_written(path: Path, digests: Sequence[str]) -> bool:
    return not path.exists() or (path.is_file() and _digest(path.read_bytes()) in digests)


def _read_marker(folder: Path) -> dict | None:
    path = folder / MARKER
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return {"study": str(said["study"]), "files": {name: list(said["files"][name]) for name in said["files"]}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--submit {folder}: {MARKER} is damaged; name another folder.") from error


def _write_marker(folder: Path, study: Path, files: dict[str, list[str]]) -> None:
    said = {"study": str(study.resolve()), "files": files}
    write_atomically(folder / MARKER, json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
