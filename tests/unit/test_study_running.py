"""The runner of a study: with a small program in the place of the scripts, which does as its flags say."""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from noisycond.study.definition import read_study
from noisycond.study.launching import Launcher
from noisycond.study.logs import reason_of
from noisycond.study.planning import plan_runs
from noisycond.study.records import is_done, known_records
from noisycond.study.results import read_results
from noisycond.study.running import Runner


PROGRAM = """
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
    (folder / "images" / "x").mkdir(parents=True)
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
if ask == "quit":
    sys.exit()
if ask == "hang":
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit()))
    (folder / "began").touch()
    if not (folder / "saved").exists():
        time.sleep(60)
(folder / "evaluation.jsonl").write_text(json.dumps(
    {"step": 5, "fid": 3.0, "settings": {"guidance_scale": 2.25}}) + "\\n")
(folder / "model_index.json").write_text("{}")
"""


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
    (launched,) = (entry for entry in Path("/proc").glob("[0-9]*/cmdline") if str(tried.folder) in _text(entry))
    os.kill(int(launched.parent.name), signal.SIGTERM)
    assert list(tried.run()) == ["slow-0"]


def _text(path):
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


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
