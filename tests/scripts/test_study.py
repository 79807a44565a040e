"""study.py as a user calls it: launches of the real scripts, on a slice of what they do."""

import csv
import json
import re

import pytest
import yaml
from launching import ROOT, call


SAID = {
    "script": "train_class_cond",
    "recipe": "digits_dit_mini",
    "settings": {
        "cep_gamma": 0,
        "max_train_steps": 2,
        "lr_warmup_steps": 1,
        "max_train_samples": 64,
        "validation_images_per_class": 1,
        "validation_inference_steps": 1,
        "eval_steps": 1,
        "eval_num_images": 20,
        "eval_metrics": ["fid"],
    },
    "seeds": [0],
    "cells": {
        "clean": {},
        "noisy": {"corruption_ratio": 0.2},
        "planted": {"corruption_ratio": 0.1, "pretrained_vae_model_name_or_path": "/nowhere"},
        "refused": {"corruption_ratio": 1.5},
    },
    "evaluation": {
        "recipe": "digits_evaluation",
        "settings": {"num_images": 20, "num_inference_steps": 1, "guidance_scale": [2], "metrics": ["fid", "recall"]},
    },
}


def write(folder, **changes):
    path = folder / "slice.yaml"
    path.write_text(yaml.safe_dump(SAID | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a study with two cells that fail, and the status of its process."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.raises(SystemExit) as left:
        call("study", write(folder), "--output_dir", folder / "out", "--jobs", 1)
    return folder, left.value.code


def test_failing_cells_are_in_the_table_and_stop_no_other(ran):
    folder, status = ran
    assert status == 1
    with (folder / "out" / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(line["cell"], line["status"]) for line in lines} == {
        ("clean", "done"),
        ("noisy", "done"),
        ("planted", "failed"),
        ("refused", "failed"),
    }
    of_clean = [line for line in lines if line["cell"] == "clean"]
    assert {line["step"] for line in of_clean} == {"", "1", "2"}
    values = {line["metric"]: float(line["value"]) for line in of_clean if not line["step"]}
    assert values.keys() == {"fid", "recall"} and values["fid"] > 0
    reasons = {line["cell"]: line["reason"] for line in lines}
    assert reasons["refused"].startswith("train_class_cond.py: --corruption_ratio is 1.5, but a share must lie")
    assert "/nowhere" in reasons["planted"] and "Traceback" not in reasons["planted"]
    table = (folder / "out" / "results.md").read_text()
    assert "/nowhere" in table and "1.5" in table
    pictures = [path.name for path in (folder / "out" / "figures").glob("*.png")]
    assert pictures and all(f"](figures/{name})" in table for name in pictures)


def test_the_report_holds_the_figures_and_the_commands(ran):
    folder, _ = ran
    report = (folder / "out" / "report.html").read_text()
    assert "data:image/" in report and "/nowhere" in report
    words = " ".join(re.sub(r"<[^>]+>", "", report).split())
    assert "accelerate launch evaluate_model.py " in words and "--pipeline clean-seed-0=" in words


def test_a_study_that_is_done_launches_nothing_and_a_report_can_be_written_elsewhere(ran, capsys):
    folder, _ = ran
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "logs").iterdir()}
    flags = ["--output_dir", folder / "out", "--report_dir", folder / "docs"]
    call("study", write(folder, cells={"truth": SAID["cells"]["clean"]}), *flags)
    assert "1 of 1 runs are done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (folder / "out" / "logs").iterdir()} == before
    assert "truth" in (folder / "docs" / "results.csv").read_text()


def test_a_result_says_how_it_was_made(ran):
    folder, _ = ran
    (path,) = (folder / "out" / "results").glob("clean-seed-0-*.json")
    record = json.loads(path.read_text())
    assert record["rows"][0]["num_images"] == 20
    assert [(row["step"], row["guidance_scale"]) for row in record["curve"]] == [(1, 2.0), (2, 2.0)]
    assert set(record["seconds"]) == {"train_class_cond", "evaluate_model"}
    assert record["curve_choices"]["num_images"] == 20 and record["curve_choices"]["reference"]["name"] == "digits"
    assert record["image_choices"]["generated"]["num_inference_steps"] == 1
    assert path.with_suffix(".webp").exists() and record["samples_scale"] == 2.0
    assert not list(folder.glob("out/evaluated/*/images"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the first word must be the study"),
        (["--seeds", 0], "the first word must be the study"),
        (["quik"], "did you mean 'quick'?"),
        (["quick", "--seed", 0], "unknown flag --seed (did you mean '--seeds'?)"),
        (["quick", "--cells", "eta-0.25"], "did you mean 'eta-0.025'?"),
        (["quick", "--jobs", 0], "--jobs is 0, but it must be positive"),
        (["quick", "--report_only", "--dry_run"], "do not go together"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        call("study", *words)
    assert left.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/studies/*/trained"))


def test_a_flag_that_no_script_knows_is_refused_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("study", write(tmp_path, settings={"max_train_step": 2}), "--output_dir", tmp_path / "out")
    assert "unknown flag --max_train_step (did you mean '--max_train_steps'?)" in capsys.readouterr().err
    assert not (tmp_path / "out" / "trained").exists()


def test_a_dry_run_prints_the_commands(tmp_path, capsys):
    call("study", write(tmp_path), "--dry_run", "--output_dir", "out")
    printed = capsys.readouterr().out
    assert printed.count("accelerate launch train_class_cond.py --recipe digits_dit_mini") == 4
    assert not (ROOT / "out").exists()
