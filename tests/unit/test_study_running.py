"""The runner of a study: with a small program in the place of the scripts, which does as its flags say."""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from noisycond.errors import InputError
from noisycond.study import launching, locks, running, steps
from noisycond.study.launching import Launcher
from noisycond.study.logs import begin_attempt, reason_of
from noisycond.study.planning import plan_runs
from noisycond.study.progress import Progress
from noisycond.study.reading import read_study
from noisycond.study.records import RunRecord, is_done, known_records, record_of
from noisycond.study.results import read_results
from noisycond.study.running import Runner


# Writes down that it is there, and whether the one before still lives.
WORKER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
mine = folder / "worker"
before = pathlib.Path("/proc") / (mine.read_text() if mine.exists() else "none") / "stat"
if before.exists() and before.read_text().rpartition(")")[2].split()[0] != "Z":
    (folder / "two at a time").touch()
mine.write_text(str(os.getpid()))
def leave(*_):
    time.sleep(0.3)
    (folder / "left").touch()
    sys.exit()
signal.signal(signal.SIGTERM, signal.SIG_IGN if (folder.parent / "deaf").exists() else leave)
(folder / "began").touch()
time.sleep(60)
"""
PROGRAM = (
    f"WORKER = {WORKER!r}"
    + """
import json, os, pathlib, signal, subprocess, sys, time
words = sys.argv[2:]
def value(name, default=None):
    return words[words.index("--" + name) + 1] if "--" + name in words else default
folder = pathlib.Path(value("output_dir"))
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent / "launches.txt").open("a") as file:
    file.write(folder.name.rsplit("-", 1)[0] + " " + os.environ.get("CUDA_VISIBLE_DEVICES", "-") + "\\n")
ask = value("report_to", "nothing")
if sys.argv[1] == "evaluate_model":
    (folder / "images" / "x").mkdir(parents=True, exist_ok=True)
    rows = [{"label": "x", "guidance_scale": scale, "seed": 0, "num_images": 4, "skipped": {},
             "metrics": {"fid": {"value": scale / 4, "interval": None}, "recall": {"value": None, "interval": None}}}
            for scale in (1.0, 2.0)]
    (folder / "metrics.json").write_text(json.dumps({"rows": rows, "settings": {"reference": "digits"}}))
    sys.exit()
if ask == "refuse":
    sys.exit("error: --corruption_ratio is 7, but a share must lie between 0 and 1.")
if ask == "break" or (ask == "break-once" and not (folder / "once").exists()):
    (folder / "once").touch()
    raise RuntimeError("out of luck")
if ask == "linger":  # the launcher is killed, and what it had started lives on in a session of its own
    (folder / "began").unlink(missing_ok=True)
    worker = subprocess.Popen([sys.executable, "-S", "-E", "-c", WORKER, str(folder)], start_new_session=True)
    while not (folder / "began").exists():
        time.sleep(0.02)
    if not (folder / "once").exists():
        (folder / "once").touch()
        time.sleep(1.2)  # it is seen
        os.kill(os.getpid(), signal.SIGKILL)
    worker.kill()
    worker.wait()
if ask == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "began").touch()
    time.sleep(60)
if ask == "quit":
    sys.exit()
if ask == "hang":
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit()))
    (folder / "began").touch()
    if not (folder / "saved").exists():
        time.sleep(60)
(folder / "evaluation.jsonl").write_text(json.dumps(
    {"step": 5, "fid": 3.0, "settings": {"guidance_scale": 2.25, "num_images": 9}}) + "\\n")
(folder / "model_index.json").write_text("{}")
"""
)


class Program(Launcher):
    def command(self, step):
        return [sys.executable, "-S", "-E", "-c", PROGRAM, step.script, *step.words]


def study_of(tmp_path, cells, seeds=(0,)):
    path = tmp_path / "mine.yaml"
    said = {
        "script": "train_class_cond",
        "recipe": "digits_ldm",
        "seeds": list(seeds),
        "cells": cells,
        "evaluation": {"recipe": "digits_evaluation"},
        "report": {"guidance_scale": 2},
    }
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return read_study(str(path))


class Tried:
    """A study and the folder that it runs in."""

    def __init__(self, tmp_path, cells, seeds=(0,)):
        self.folder, self.records = tmp_path / "out", tmp_path / "results"
        self.study = study_of(tmp_path, cells, seeds)
        self.plans = plan_runs(self.study, self.study.runs(), self.folder)

    def runner(self, slots=({},), **options):
        return Runner(self.folder, self.records, Program(slots=slots), **options)

    def run(self, slots=({},), **options):
        """What was seen, by the runs' names."""
        known, seen = known_records(self.records), []
        left = [plan for plan in self.plans if not is_done(known.get(plan.identity))]
        self.runner(slots, **options).run(left, lambda runner, record: record and seen.append(record))
        return {f"{record.cell}-{record.seed}": record for record in seen}

    def start(self):
        """A runner in a thread of its own."""
        runner = self.runner()
        thread = threading.Thread(target=runner.run, args=(self.plans, lambda *_: None))
        thread.start()
        return runner, thread

    def launches(self, what="trained"):
        path = self.folder / what / "launches.txt"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def results(self):
        return read_results(self.study, self.plans, self.records)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_in(folder):
    """Of the processes that live those whose command names the folder."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid


def test_each_run_is_done_once_and_found_again(tmp_path):
    tried = Tried(tmp_path, {"clean": {}, "eta": {"corruption_ratio": [0.1]}}, seeds=(0, 1))
    seen = tried.run()
    assert list(seen) == ["clean-0", "eta-0.1-0", "clean-1", "eta-0.1-1"]
    assert {record.status for record in seen.values()} == {"done"}
    assert len(tried.launches()) == len(tried.launches("evaluated")) == 4
    assert tried.run() == {}
    assert len(tried.launches()) == 4

    results = tried.results()
    assert [run["status"] for run in results.runs] == ["done"] * 4
    assert results.runs[1]["settings"] == {"corruption_ratio": 0.1}
    assert results.runs[1]["commands"][0].startswith("accelerate launch train_class_cond.py --recipe digits_ldm")
    assert set(results.runs[0]["seconds"]) == {"train_class_cond", "evaluate_model"}
    values = results.values
    final = values[values.step.isna() & (values.metric == "fid")]
    assert final[final.cell == "eta-0.1"].value.tolist() == [0.25, 0.5] * 2
    assert values[values.metric == "recall"].value.isna().all()  # what was not finite is not a number
    curve = values[values.step.notna()]
    assert curve[["cell", "seed", "guidance_scale", "step", "value"]].values.tolist() == [
        [cell, seed, 2.25, 5, 3.0] for seed in (0, 1) for cell in ("clean", "eta-0.1")
    ]


def test_a_result_is_found_whatever_the_cell_is_called_and_not_where_the_settings_changed(tmp_path):
    Tried(tmp_path, {"clean": {}, "eta": {"corruption_ratio": 0.1}}).run()
    renamed = Tried(tmp_path, {"truth": {}, "noise": {"corruption_ratio": 0.2}})
    assert [run["status"] for run in renamed.results().runs] == ["done", "missing"]
    assert list(renamed.run()) == ["noise-0"]


def test_a_failing_run_is_recorded_and_stops_no_other(tmp_path):
    cells = {"refused": {"report_to": "refuse", "cep_gamma": 2}, "broken": {"report_to": "break", "cep_gamma": 1}}
    cells["clean"] = {"cep_gamma": 0}
    tried = Tried(tmp_path, cells)
    seen = tried.run()
    assert seen["clean-0"].status == "done"
    assert (seen["refused-0"].status, seen["refused-0"].attempts) == ("failed", 1)
    assert seen["refused-0"].reason == "--corruption_ratio is 7, but a share must lie between 0 and 1."
    assert (seen["broken-0"].status, seen["broken-0"].attempts) == ("failed", 2)  # once more, for luck
    assert seen["broken-0"].reason.startswith("RuntimeError: out of luck (status 1, log: ")
    runs = {run["cell"]: run for run in tried.results().runs}
    assert runs["broken"]["status"] == "failed" and "out of luck" in runs["broken"]["reason"]
    assert list(tried.run()) == ["refused-0", "broken-0"]  # the next call tries again, what failed alone


def test_a_run_that_succeeds_when_tried_again_is_done(tmp_path):
    record = Tried(tmp_path, {"lucky": {"report_to": "break-once"}}).run()["lucky-0"]
    assert (record.status, record.attempts) == ("done", 2)


@pytest.mark.parametrize("deaf", [False, True])
def test_what_a_killed_launcher_leaves_is_ended_before_another_try(tmp_path, monkeypatch, deaf):
    monkeypatch.setattr(launching, "GRACE", 0.4)
    tried = Tried(tmp_path, {"orphan": {"report_to": "linger"}})
    (tried.folder / "trained").mkdir(parents=True)
    if deaf:
        (tried.folder / "trained/deaf").touch()
    (record,) = tried.run().values()
    (folder,) = tried.folder.glob("trained/orphan*/")
    assert (record.status, record.attempts) == ("done", 2)
    assert not (folder / "two at a time").exists()
    assert (folder / "left").exists() is not deaf  # what can save what it has is let
    assert not list(processes_in(folder))


@pytest.mark.parametrize("what", ["linger", "deaf"])
def test_a_second_call_of_stop_ends_at_once_what_is_deaf(tmp_path, what):
    """What a dead launcher has left, and a launcher itself."""
    tried = Tried(tmp_path, {"slow": {"report_to": what}})
    (tried.folder / "trained").mkdir(parents=True)
    (tried.folder / "trained/deaf").touch()
    runner, thread = tried.start()
    until(lambda: list(tried.folder.glob("trained/slow*/began")))
    runner.stop()
    until(lambda: len(list(processes_in(tried.folder))) == 1)
    runner.stop()
    thread.join(10)
    assert not thread.is_alive() and not list(processes_in(tried.folder))
    assert not tried.records.exists()


def test_one_damaged_run_ends_no_other(tmp_path):
    cells = {"cut": {"cep_gamma": 1}, "clean": {"cep_gamma": 0}}
    tried = Tried(tmp_path, cells)
    last = tried.plans[0].steps[-1]
    last.folder.mkdir(parents=True)
    (last.folder / "metrics.json").write_text('{"rows": [{')  # of a launch that was said to have ended well
    steps.mark_done(last, 3.0)
    seen = tried.run()
    assert seen["clean-0"].status == "done"
    assert (seen["cut-0"].status, seen["cut-0"].attempts) == ("failed", 1)
    assert seen["cut-0"].reason.startswith("JSONDecodeError: Expecting property name")


@pytest.mark.parametrize("damage", ["empty", "list", "gone", "none"])
def test_a_step_is_done_where_its_marker_is_whole_and_its_end_is_there(tmp_path, damage):
    tried = Tried(tmp_path, {"clean": {}})
    tried.run()
    (result,) = tried.records.glob("*.json")
    result.unlink()
    evaluation = tried.plans[0].steps[-1]
    if damage == "gone":
        shutil.rmtree(evaluation.folder)
    elif damage != "none":
        evaluation.marker.write_text("" if damage == "empty" else "[1]")
    assert tried.run()["clean-0"].status == "done"
    assert len(tried.launches("evaluated")) == (1 if damage == "none" else 2)
    assert len(tried.launches()) == 1


def test_lines_of_an_evaluation_that_a_kill_cut_are_left_out(tmp_path):
    tried = Tried(tmp_path, {"clean": {}})
    tried.run()
    (result,) = tried.records.glob("*.json")
    result.unlink()
    with (tried.plans[0].steps[0].folder / "evaluation.jsonl").open("a") as file:
        file.write('[]\n{"fid": 1.0}\n{"step": 10, "fi')
    assert [row["step"] for row in tried.run()["clean-0"].curve] == [5]


def test_a_study_that_cannot_write_says_so_in_a_sentence(tmp_path):
    tried = Tried(tmp_path, {"clean": {}})
    tried.folder.mkdir()
    (tried.folder / "logs").touch()
    with pytest.raises(InputError, match=rf"^--output_dir {tried.folder}: FileExistsError .* while writing clean-"):
        tried.run()


def test_a_file_system_without_locks_is_told_from_a_lock_that_is_taken(tmp_path, monkeypatch):
    tried = Tried(tmp_path, {"clean": {}})

    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(InputError, match=rf"^{tried.folder}/trained: its file system has no locks \(No locks avail"):
        tried.run()


def test_a_lock_is_one_process_s_at_a_time(tmp_path):
    with locks.locked(tmp_path / "new/lock") as first, locks.locked(tmp_path / "new/lock") as second:
        assert (first, second) == (True, False)
    with locks.locked(tmp_path / "new/lock") as third:
        assert third
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="while writing its lock"), locks.locked(tmp_path / "file/lock"):
        pass


def test_of_two_records_of_a_run_the_one_that_is_done_counts(tmp_path):
    tried = Tried(tmp_path, {"clean": {}})
    tried.run()
    (result,) = tried.records.glob("*.json")
    identity = tried.plans[0].identity
    for name in ("aaa", "zzz"):
        said = json.loads(result.read_text()) | {"status": "failed", "rows": []}
        (tried.records / f"{name}-{identity}.json").write_text(json.dumps(said))
    assert known_records(tried.records) == {identity: result} and tried.run() == {}


def test_a_record_takes_the_place_of_those_of_the_same_run(tmp_path):
    Tried(tmp_path, {"old": {"report_to": "break"}, "other": {"cep_gamma": 3}}).run(retries=0)
    (tmp_path / "results").joinpath("x.webp").touch()
    (old,) = (tmp_path / "results").glob("old*.json")
    old.with_suffix(".webp").touch()
    Tried(tmp_path, {"new": {"report_to": "break-once"}, "other": {"cep_gamma": 3}}).run()
    left = sorted(path.name.split("-seed")[0] for path in (tmp_path / "results").iterdir())
    assert left == ["new", "other", "x.webp"]
    failed = RunRecord("", "again", 0, old.stem[-10:], "failed", file_name=f"again-{old.stem[-10:]}")
    failed.save(tmp_path / "results")
    assert len(list((tmp_path / "results").glob("new*.json"))) == 1  # a failure does away with no result
    (done,) = (tmp_path / "results").glob("new*.json")
    RunRecord("", "new", 0, old.stem[-10:], "failed", file_name=done.stem).save(tmp_path / "results")
    assert is_done(done)  # whatever it is called


@pytest.mark.parametrize(
    "change",
    [{"rows": []}, {"rows": [{}]}, {"identity": "0123456789"}, {"curve": [1]}, {"status": "well"}, {"rows": None}],
)
def test_a_record_that_is_not_whole_is_none(tmp_path, change):
    tried = Tried(tmp_path, {"clean": {}})
    tried.run()
    (result,) = tried.records.glob("*.json")
    said = json.loads(result.read_text())
    result.write_text(json.dumps(said | change))
    assert not is_done(result) and tried.results().runs[0]["status"] == "missing"
    result.write_text("[]")
    assert not is_done(result)
    result.write_text(json.dumps(said))
    assert is_done(result)


def test_seconds_add_up_over_launches_that_were_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_NOTED", 0.0)
    tried = Tried(tmp_path, {"slow": {"report_to": "hang"}})
    step = tried.plans[0].steps[0]
    notes = step.folder.with_name(step.folder.name + ".seconds")
    runner, thread = tried.start()
    until(notes.exists)  # while it runs, so that a kill loses little
    runner.stop()
    thread.join(20)
    assert 0 < steps.seconds_of(step) < 20
    notes.write_text("100.0")
    assert tried.run()["slow-0"].seconds["train_class_cond"] > 100
    assert steps.seconds_of(step) > 100 and not notes.exists()
    step.marker.write_text("")
    assert steps.seconds_of(step) is None


def test_a_log_keeps_every_attempt_and_the_reason_is_the_last_one_s(tmp_path):
    tried = Tried(tmp_path, {"broken": {"report_to": "break"}})
    tried.run()
    (log,) = tried.folder.glob("logs/*.log")
    heads = [line for line in log.read_text().splitlines() if line.startswith("### ")]
    assert len(heads) == 2 and all("accelerate launch train_class_cond.py" in line for line in heads)
    log.write_text("error: --seed is x.\n")
    with log.open("ab") as file:
        start = begin_attempt(file, "accelerate launch")
        file.write(b"RuntimeError: of its own\n")
    assert reason_of(log, 1, start)[0].startswith("RuntimeError: of its own")


def test_choices_of_evaluations_while_it_trained_are_kept_once(tmp_path):
    tried = Tried(tmp_path, {"clean": {}})
    assert tried.run()["clean-0"].curve_choices == {"guidance_scale": 2.25, "num_images": 9}
    assert tried.results().runs[0]["curve_choices"] == {"guidance_scale": 2.25, "num_images": 9}
    assert tried.results().values.guidance_scale.dropna().unique().tolist() == [1.0, 2.0, 2.25]


def test_images_that_cannot_be_read_cost_the_picture_alone(tmp_path):
    tried = Tried(tmp_path, {"clean": {}})
    plan, seen = tried.plans[0], []
    tried.run(keep_images=True)
    drawn = plan.steps[-1].folder / "images/x/guidance-2-seed-0"
    drawn.mkdir()
    (drawn / "0.png").write_bytes(b"cut")
    record = record_of(plan, 1, samples_at=2.0, warn=seen.append)
    assert record.status == "done" and record.samples is None
    assert len(seen) == 1 and seen[0].startswith("clean, seed 0: there is no picture of its samples (")


def test_a_result_is_written_and_images_go_while_the_evaluation_is_locked(tmp_path, monkeypatch):
    tried = Tried(tmp_path, {"clean": {}})
    last = tried.plans[0].steps[-1]
    seen = []

    def look(what):
        with last.folder.with_name(last.folder.name + ".lock").open() as file:
            seen.append((what, locks.take(file)))

    monkeypatch.setattr(RunRecord, "save", lambda *_: look("saved"))
    monkeypatch.setattr(running, "_remove_images", lambda *_: look("removed"))
    tried.run()
    assert seen == [("saved", False), ("removed", False)]


def test_a_run_that_is_tried_again_is_told_of_in_a_sentence(tmp_path, capsys):
    tried = Tried(tmp_path, {"lucky": {"report_to": "break-once"}})
    progress = Progress(2, 1, 1)
    tried.runner().run(tried.plans, progress)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("lucky, seed 0 failed and is tried again: RuntimeError: out of luck")
    assert second.startswith("lucky, seed 0: done in ") and second.endswith("; 0 to go")


def test_a_step_that_runs_share_is_in_the_time_to_come_once(capsys):
    runner, record = Runner(Path(), Path(), Launcher()), RunRecord("", "clean", 0, "", "done")
    record.seconds = {"train_class_cond": 6000.0, "evaluate_model": 60.0}
    progress = Progress(11, 0, 1)
    runner.took = [6060.0, 60.0]
    progress(runner, record)
    assert "10 to go, about 8.5 h" in capsys.readouterr().out


def test_retries_may_be_off(tmp_path):
    assert Tried(tmp_path, {"lucky": {"report_to": "break-once"}}).run(retries=0)["lucky-0"].status == "failed"


def test_a_training_that_leaves_nothing_is_not_done(tmp_path):
    record = Tried(tmp_path, {"cut": {"report_to": "quit"}}).run(retries=0)["cut-0"]
    assert record.status == "failed" and "stopped before its end" in record.reason


def test_refused_settings_are_not_launched(tmp_path):
    tried = Tried(tmp_path, {"clean": {}, "eta": {"corruption_ratio": 7}})
    seen = tried.run(refused={"eta": "train_class_cond.py: --corruption_ratio is 7, but …"})
    assert seen["eta-0"].reason == "train_class_cond.py: --corruption_ratio is 7, but …"
    assert tried.launches() == ["clean-seed-0 -"]


def test_a_stop_lets_trainings_save_and_the_next_call_goes_on(tmp_path):
    tried = Tried(tmp_path, {"slow": {"report_to": "hang"}, "later": {"cep_gamma": 3}})
    runner, seen = tried.runner(), []
    thread = threading.Thread(target=runner.run, args=(tried.plans, lambda _, record: record and seen.append(record)))
    thread.start()
    until(lambda: list(tried.folder.glob("trained/slow*/began")))
    assert runner.running["slow-seed-0"].state().startswith("slow, seed 0: train_class_cond, step 0")
    runner.stop()
    thread.join(20)
    assert not thread.is_alive() and not seen and not tried.records.exists()
    assert list(tried.folder.glob("trained/slow*/saved"))
    assert tried.launches() == ["slow-seed-0 -"]
    assert list(tried.run()) == ["slow-0", "later-0"]


def test_a_launch_that_outlived_its_study_is_waited_for(tmp_path):
    tried = Tried(tmp_path, {"clean": {}})
    step = tried.plans[0].steps[0]
    step.folder.parent.mkdir(parents=True)
    lock = step.folder.with_name(step.folder.name + ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    seen = []
    runner = tried.runner()
    thread = threading.Thread(target=runner.run, args=(tried.plans, lambda _, record: record and seen.append(record)))
    thread.start()
    until(lambda: runner.running and next(iter(runner.running.values())).waiting)
    assert "in another process" in runner.running["clean-seed-0"].state()
    assert tried.launches() == []
    step.marker.write_text(json.dumps({"command": "", "seconds": 7.0}))  # the other one has done it
    step.folder.mkdir()
    (step.folder / "model_index.json").touch()
    lock.close()
    thread.join(20)
    assert tried.launches() == [] and seen[0].seconds["train_class_cond"] == 7.0


def test_the_lock_is_held_by_what_is_launched(tmp_path):
    tried = Tried(tmp_path, {"slow": {"report_to": "hang"}})
    pid = os.fork()
    if pid == 0:  # a study that is killed
        tried.runner().run(tried.plans, lambda *_: None)
        os._exit(0)
    until(lambda: list(tried.folder.glob("trained/slow*/began")))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    (path,) = tried.folder.glob("trained/slow*.lock")
    with path.open() as lock, pytest.raises(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (launched,) = processes_in(tried.folder)
    os.kill(launched, signal.SIGTERM)
    assert list(tried.run()) == ["slow-0"]


def test_runs_side_by_side_have_devices_of_their_own(tmp_path):
    tried = Tried(tmp_path, {"clean": {}, "eta": {"corruption_ratio": [0.1, 0.2, 0.3]}})
    tried.run(slots=({"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}))
    assert {line.split()[1] for line in tried.launches()} == {"4,5", "6,7"}


def test_images_are_removed_when_their_metrics_are_recorded(tmp_path):
    tried = Tried(tmp_path, {"clean": {}})
    tried.run()
    assert not list(tried.folder.glob("evaluated/*/images")) and list(tried.folder.glob("evaluated/*/metrics.json"))
    (tmp_path / "kept").mkdir()
    kept = Tried(tmp_path / "kept", {"clean": {}})
    kept.run(keep_images=True)
    assert list(kept.folder.glob("evaluated/*/images"))


@pytest.mark.parametrize(
    ("text", "status", "reason", "final"),
    [
        ("loading\nerror: --seed is x.\nTraceback\nsubprocess.CalledProcessError: …", 1, "--seed is x.", True),
        ("error: --output_dir: no space left while writing a checkpoint.\n", 1, "no space left", False),
        (
            "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\n"
            "Traceback (most recent call last):\nsubprocess.CalledProcessError: returned non-zero",
            1,
            "torch.OutOfMemoryError: CUDA out of memory (status 1",
            False,
        ),
        ("step 3\n", -9, "ended by SIGKILL; last: step 3 (status -9", False),
        ("", 1, "nothing was printed (status 1", False),
    ],
)
def test_the_reason_is_the_sentence_that_was_printed(tmp_path, text, status, reason, final):
    log = tmp_path / "x.log"
    log.write_text(text)
    found = reason_of(log, status)
    assert reason in found[0] and found[1] is final
