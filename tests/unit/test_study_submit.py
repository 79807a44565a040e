"""A study as job scripts: what they call, how a job array starts and stops them, and what a folder keeps."""

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from noisycond.arguments import parse_arguments
from noisycond.errors import InputError
from noisycond.study import submit
from noisycond.study.definition import Stage, StudyCell, StudyRun
from noisycond.study.methods import Method
from noisycond.study.submit import SubmitArguments, write_submission


ODD = """η = "2.5 %" of it's $(touch broken) `x`\n; touch broken"""


@dataclass
class Options(SubmitArguments):
    """As those of study.py."""

    output_dir: str | None = None
    results_dir: str | None = None
    retries: int = 1
    report_dir: str | None = None
    keep_images: bool = False
    cells: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


def options(*argv) -> Options:
    return parse_arguments(Options, ["--submit", "jobs", *map(str, argv)])


def run_of(label: str, seed: int = 0, block: str = "") -> StudyRun:
    return StudyRun(StudyCell(block, label, Method("clean"), {}, ()), seed, Stage("evaluate_model", {}))


def write_stub(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a study, and with a `python` and a `scontrol` that write down how they are called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").touch()
    write_stub(tmp_path / "bin/python", f'printf \'%s\\0\' "$PWD" "$@" > {tmp_path}/called; exit ${{STATUS:-0}}')
    write_stub(tmp_path / "bin/scontrol", f'echo "$@" > {tmp_path}/requeued')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def called(place: Path) -> list[str]:
    return (place / "called").read_text().split("\0")[:-1]


def start(path: Path, cwd: str = "/", **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [str(path.resolve())], cwd=cwd, env=os.environ | environment, stderr=subprocess.PIPE, text=True
    )


def test_a_script_calls_study_py_for_its_run_alone(place):
    runs = [run_of("clean"), run_of(ODD, 3, "ldm 4, a=b"), run_of("-eta", 3)]
    first, odd, dashed, array = write_submission("grid.yaml", runs, "jobs", options("--cells", "clean", "--seeds", 3))
    assert (first.name, array.name) == ("clean-seed-0.sh", "array.sbatch")
    for script, own in (
        (first, ["--cells", "clean", "--seeds", "0"]),
        (odd, ["--blocks", "ldm 4, a=b", "--cells", ODD, "--seeds", "3"]),
        (dashed, ["--cells=-eta", "--seeds", "3"]),
    ):
        assert start(script).wait() == 0
        assert called(place) == [str(place), str(submit.STUDY_SCRIPT), "grid.yaml", *own]
    assert not (place / "broken").exists()


def test_what_does_not_choose_runs_is_handed_on(place):
    more = ["--output_dir", "runs/my study", "--report_dir=-my 'report'", "--keep_images"]
    (place / "mine.yaml").write_text("results_dir: kept\nextra: [a, b]\nsubmit: elsewhere\n")
    chosen = options(*more, "--retries", 4, "--slurm_account", "me", "--recipe", "mine.yaml")
    script, _ = write_submission("grid.yaml", [run_of("clean")], "jobs", chosen)
    assert start(script).wait() == 0
    expected = ["--output_dir", "runs/my study", "--results_dir", "kept", "--retries", "4", more[2]]
    assert called(place)[7:] == [*expected, "--keep_images", "True", "--extra", "a", "b"]


def test_a_script_that_can_be_started_from_anywhere_passes_on_the_status_of_its_run(place):
    script, _ = write_submission("grid.yaml", [run_of("clean")], "jobs", options())
    assert start(script, STATUS="3").wait() == 3 and called(place)[0] == str(place)


def test_every_script_is_a_shell_s(place):
    runs = [run_of("clean"), run_of(ODD, block=ODD)]
    paths = write_submission("grid.yaml", runs, "my 'odd' jobs", options("--slurm_setup", "module load cuda"))
    for path in paths:
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0 and os.access(path, os.X_OK)


def sbatch_lines(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", path.read_text(), re.M))


def test_what_the_cluster_is_told(place):
    runs = [run_of("clean", seed) for seed in range(12)]
    lines = sbatch_lines(write_submission("grid.yaml", runs, "jobs", options())[-1])
    assert lines["array"] == "0-11" and lines["job-name"] == "grid" and lines["time"] == "24:00:00"
    assert lines["nodes"] == lines["ntasks"] == "1"
    assert (lines["gpus-per-node"], lines["cpus-per-task"]) == ("1", "8")
    assert lines["requeue"] == "" and lines["open-mode"] == "append" and lines["signal"] == "B:USR1@300"
    assert lines["output"] == f"{place}/jobs/logs/%x-%A_%a.log" and (place / "jobs/logs").is_dir()
    assert not {"partition", "account"} & lines.keys()
    chosen = ["--slurm_time", "2-12", "--slurm_partition", "gpu,long", "--slurm_account", "me", "--slurm_max_parallel"]
    chosen += [4]
    lines = sbatch_lines(write_submission("grid.yaml", runs, "other", options(*chosen), processes=4)[-1])
    assert lines["array"] == "0-11%4" and lines["time"] == "2-12" and lines["cpus-per-task"] == "32"
    assert (lines["partition"], lines["account"], lines["gpus-per-node"]) == ("gpu,long", "me", "4")
    fewer = options("--slurm_cpus_per_run", 20)
    assert sbatch_lines(write_submission("grid.yaml", runs, "fewer", fewer, processes=4)[-1])["cpus-per-task"] == "20"


def test_the_array_starts_the_script_of_its_task(place):
    runs = [run_of(label) for label in ("clean", "eta-0.025", "cep u")]
    *_, array = write_submission("grid.yaml", runs, "jobs", options("--slurm_setup", "export STATUS=$((3 + 4))"))
    for task, label in enumerate(("clean", "eta-0.025", "cep u")):
        assert start(array, SLURM_ARRAY_TASK_ID=str(task)).wait() == 7  # the run's status; the setup set it
        assert called(place)[3:5] == ["--cells", label]
    assert not (place / "requeued").exists()  # a run that fails is not tried for ever
    job = start(array)
    assert "sbatch" in job.communicate()[1] and job.returncode != 0


def test_a_setup_that_fails_starts_nothing(place):
    *_, array = write_submission("grid.yaml", [run_of("clean")], "jobs", options("--slurm_setup", "false"))
    assert start(array, SLURM_ARRAY_TASK_ID="0").wait() != 0 and not (place / "called").exists()


@pytest.mark.parametrize("sent, again", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_job_that_has_to_leave_lets_its_run_stop_and_queues_it_again(place, sent, again):
    """By USR1 shortly before the time limit, by TERM for good: both reach study.py, and study.py alone, as SIGTERM."""
    leaving = f"trap 'sleep 0.2; touch {place}/stopped; exit 143' TERM; touch {place}/started"
    write_stub(place / "bin/python", f"{leaving}\nwhile :; do sleep 0.02; done")
    *_, array = write_submission("grid.yaml", [run_of("clean")], "jobs", options())
    job = start(array, SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="77")
    for _ in range(500):
        if (place / "started").exists():
            break
        time.sleep(0.02)
    job.send_signal(sent)
    assert job.wait(timeout=20) == 143  # as study.py leaves
    assert (place / "stopped").exists()  # waited for
    assert (place / "requeued").exists() == again
    assert not again or (place / "requeued").read_text() == "requeue 77\n"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_follows_its_study(place):
    write_submission("grid.yaml", [run_of("clean"), run_of("eta-0.1")], "jobs", options())
    (place / "jobs/logs/grid-1_0.log").touch()
    write_submission("grid.yaml", [run_of("clean"), run_of("cep-u")], "jobs", options("--retries", 4))
    jobs = place / "jobs"
    assert names_in(jobs) == {"submission.json", "logs", "array.sbatch", "clean-seed-0.sh", "cep-u-seed-0.sh"}
    assert "--retries 4" in (jobs / "clean-seed-0.sh").read_text()
    assert (jobs / "logs/grid-1_0.log").exists()


def test_what_a_submission_did_not_write_is_left_alone(place):
    (place / "jobs").mkdir()
    (place / "jobs/notes.txt").touch()
    with pytest.raises(InputError, match=r"^--submit jobs holds notes.txt, which no submission wrote; name another"):
        write_submission("grid.yaml", [run_of("clean")], "jobs", options())
    assert names_in(place / "jobs") == {"notes.txt"}
    with pytest.raises(InputError, match="--submit grid.yaml is a file"):
        write_submission("grid.yaml", [run_of("clean")], "grid.yaml", options())
    write_submission("grid.yaml", [run_of("clean")], "own", options())
    (place / "own/array.sbatch").write_text("mine")
    with pytest.raises(InputError, match="array.sbatch was changed since it was written"):
        write_submission("grid.yaml", [run_of("clean")], "own", options())
    assert (place / "own/array.sbatch").read_text() == "mine"
    (place / "own/array.sbatch").unlink()
    (place / "own/mine.sh").touch()
    with pytest.raises(InputError, match="own holds mine.sh"):
        write_submission("grid.yaml", [run_of("clean")], "own", options())


def test_a_folder_is_of_one_study(place):
    write_submission("grid.yaml", [run_of("clean")], "jobs", options())
    with pytest.raises(InputError, match=re.escape(f"jobs holds the submission of {place}/grid.yaml")):
        write_submission("other.yaml", [run_of("clean")], "jobs", options())
    (place / "jobs/submission.json").write_text("[]")
    with pytest.raises(InputError, match="submission.json is damaged"):
        write_submission("grid.yaml", [run_of("clean")], "jobs", options())


@pytest.mark.parametrize("written", range(5))
def test_a_submission_that_was_cut_is_written_again(place, monkeypatch, written):
    """Cut before each of its files, of which one is half written, while it replaces another one."""
    write_submission("grid.yaml", [run_of("clean"), run_of("eta-0.1")], "jobs", options())
    left = [written]

    def write(path: Path, text: str) -> None:
        if not left[0]:
            path.with_name(path.name + ".part").write_text(text[:20])
            raise OSError("cut")
        left[0] -= 1
        real(path, text)

    real = submit.write_atomically
    runs = [run_of("clean"), run_of("cep-u")]
    with monkeypatch.context() as context:
        context.setattr(submit, "write_atomically", write)
        with pytest.raises(InputError, match="while writing the job scripts"):
            write_submission("grid.yaml", runs, "jobs", options("--retries", 4))
    write_submission("grid.yaml", [run_of("ip")], "jobs", options())
    assert names_in(place / "jobs") == {"submission.json", "logs", "array.sbatch", "ip-seed-0.sh"}


def test_nothing_to_submit_is_refused(place):
    with pytest.raises(InputError, match="nothing to submit"):
        write_submission("grid.yaml", [], "jobs", options())
    assert not (place / "jobs").exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("slurm_time", "12:00:00"),
        ("slurm_partition", "gpu"),
        ("slurm_account", "me"),
        ("slurm_cpus_per_run", "4"),
        ("slurm_max_parallel", "2"),
        ("slurm_setup", "true"),
    ],
)
def test_a_cluster_s_flag_is_refused_where_nothing_is_submitted(name, value):
    with pytest.raises(InputError, match=f"^--{name} has no effect without --submit FOLDER.$"):
        parse_arguments(Options, [f"--{name}", value])
    assert str(getattr(options(f"--{name}", value), name)) == value


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--slurm_time", "tomorrow"], "--slurm_time is 'tomorrow'"),
        (["--slurm_time", "5"], "more than 5 minutes"),
        (["--slurm_time", "0:300:00x"], "HOURS:MINUTES:SECONDS"),
        (["--slurm_partition", "a b"], "--slurm_partition is 'a b'"),
        (["--slurm_account", "x\n#SBATCH"], "no spaces or quotes"),
        (["--slurm_cpus_per_run", "0"], "--slurm_cpus_per_run is 0"),
        (["--slurm_max_parallel", "0"], "--slurm_max_parallel is 0"),
        (["--slurm_setup", " "], "--slurm_setup is empty"),
        (["--submit", " "], "--submit is empty"),
    ],
)
def test_what_no_cluster_takes_is_refused(argv, said):
    with pytest.raises(InputError, match=said):
        options(*argv)


@pytest.mark.parametrize("text, minutes", [("6", 6), ("5:01", 5 + 1 / 60), ("1:00:00", 60), ("1-2", 26 * 60)])
def test_times_read_as_for_sbatch(text, minutes):
    assert options("--slurm_time", text).slurm_time == text
    assert submit._seconds(text) == round(minutes * 60)
    assert submit._seconds("1-00:30") == 24.5 * 3600 and submit._seconds("2-03:04:05") == ((51 * 60) + 4) * 60 + 5


def test_study_py_submits(place, script, refused, capsys):
    script("study", "quick", "--submit", "jobs", "--seeds", 1, "--keep_images")
    assert capsys.readouterr().out == "5 runs are ready: sbatch jobs/array.sbatch\n"
    assert len(names_in(place / "jobs")) == 5 + 3 and not (place / "runs").exists()
    assert start(place / "jobs/clean-seed-1.sh").wait() == 0
    assert called(place)[3:] == ["--cells", "clean", "--seeds", "1", "--keep_images", "True"]
    for argv, said in (
        (["--submit", "jobs", "--report_only"], "--submit and --report_only do not go together"),
        (["--submit", "jobs", "--dry_run"], "--submit and --dry_run do not go together"),
        (["--submit", "jobs", "--jobs", 2], "--jobs has no effect with --submit"),
        (["--slurm_time", "1:00:00"], "--slurm_time has no effect without --submit"),
        (["--submit", "bin"], "--submit bin holds python, scontrol, which no submission wrote"),
    ):
        assert refused("study", "quick", *argv).startswith(said)
