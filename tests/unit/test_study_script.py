"""study.py: how it leaves, what it hands to a cluster, and who writes the report; nothing is trained."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from launching import load_script

from noisycond.study.launching import Launcher
from noisycond.study.locks import locked
from noisycond.study.planning import plan_runs
from noisycond.study.reading import read_study
from noisycond.study.records import RunRecord


CELLS = {"clean": {"corruption_ratio": 0}, "eta": {"corruption_ratio": [0.1, 1.5]}}
ROW = {"guidance_scale": 1.0, "seed": 0, "num_images": 4, "metrics": {"fid": {"value": 1.0}}, "skipped": {}}


class Sleeping(Launcher):
    def command(self, step):
        return [sys.executable, "-S", "-E", "-c", "import time; time.sleep(60)"]


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """The runs of a study in the current folder, mine.yaml."""
    monkeypatch.chdir(tmp_path)
    said = {
        "script": "train_class_cond",
        "recipe": "digits_ldm",
        "settings": {"cep_gamma": 0},
        "seeds": [0],
        "cells": CELLS,
        "evaluation": {"recipe": "digits_evaluation"},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    study = read_study("mine.yaml")
    monkeypatch.setattr(load_script("study"), "make_launcher", lambda *_: Sleeping())
    return plan_runs(study, study.runs(), Path("out"))


def record(plan, status="done") -> None:
    cell, rows = plan.run.cell, [ROW] if status == "done" else []
    RunRecord("", cell.label, 0, plan.identity, status, 1, None, rows, file_name=plan.file_name).save(
        Path("out/results")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_leaves_with_the_status_of_its_signal_and_writes_no_report(plans, script, capsys, number):
    before = signal.getsignal(number)

    def stop():
        while not list(Path("out").glob("logs/*.log")):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        script("study", "mine.yaml", "--output_dir", "out", "--cells", "clean")
    assert left.value.code == 128 + number
    assert capsys.readouterr().out.endswith("Stopped with 1 runs to go; the same command goes on.\n")
    assert not list(Path("out").rglob("report.html")) and not Path("out/results").exists()
    assert signal.getsignal(number) == before


def test_a_submission_is_of_what_is_not_done_and_says_what_is_refused(plans, script, capsys):
    record(plans[0])
    record(plans[1], "failed")
    script("study", "mine.yaml", "--output_dir", "out", "--submit", "jobs")
    refused, ready = capsys.readouterr().out.splitlines()
    assert refused.startswith(
        "eta-1.5 will be recorded as failed: train_class_cond.py: --corruption_ratio is 1.5, but"
    )
    assert ready == "2 runs are ready (1 of 3 done before): sbatch jobs/array.sbatch"
    assert sorted(path.name for path in Path("jobs").glob("*.sh")) == ["eta-0.1-seed-0.sh", "eta-1.5-seed-0.sh"]
    script("study", "mine.yaml", "--output_dir", "out", "--submit", "other", "--cells", "clean")
    assert capsys.readouterr().out == "There is nothing to submit: every run is done.\n"
    assert not Path("other").exists()


def test_one_process_writes_the_report_and_takes_in_what_came_meanwhile(plans, script, capsys, monkeypatch):
    seen = []

    def publish(results, folder):
        seen.append(results.done)
        if len(seen) == 1:
            record(plans[1])  # of a job that ends now
            script("study", "mine.yaml", "--output_dir", "out", "--report_only", "--report_dir", "docs")
            assert capsys.readouterr().out == "Another process writes the report.\n2 of 3 runs are done.\n"
        return folder / "report.html"

    monkeypatch.setattr(load_script("study"), "publish", publish)
    record(plans[0])
    script("study", "mine.yaml", "--output_dir", "out", "--report_only", "--report_dir", "docs")
    assert seen == [1, 2]  # the second process wrote none, and the first one wrote again
    assert "Report: docs/report.html\n2 of 3 runs are done.\n" in capsys.readouterr().out
    assert not Path("docs").exists()  # where a report is committed no lock is left


def test_a_report_alone_is_well_whatever_failed(plans, script, capsys):
    record(plans[0])
    record(plans[1], "failed")
    script("study", "mine.yaml", "--output_dir", "out", "--report_only")
    printed = capsys.readouterr()
    assert "1 of 3 runs are done" in printed.out and "tries them again" not in printed.err
    assert Path("out/report.html").exists()
    with locked(Path("out/.report.lock")) as is_ours:
        assert is_ours


@pytest.mark.parametrize(
    "words", [["--jobs", 2], ["--retries", 0], ["--keep_images"], ["--seeds", 0], ["--cells", "clean"]]
)
def test_what_a_report_alone_does_not_heed_is_refused(plans, refused, words):
    assert refused("study", "mine.yaml", "--report_only", *words).startswith(
        f"{words[0]} has no effect with --report_only"
    )
