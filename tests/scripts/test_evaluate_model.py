"""evaluate_model.py: the same figures however it is cut or launched, known answers, and sentences for bad input."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from forking import finished, started
from huggingface_hub import ModelCard
from PIL import Image

from noisycond.data.sources import Digits


FAST = ["--num_inference_steps", 2, "--batch_size", 10, "--cpu_threads_per_process", 1, "--no_figures"]
OF_CONTROLS = {"edge_f1", "edge_f1_shuffled", "mask_iou", "mask_iou_shuffled"}  # of images drawn after controls


def write_digits(folder: Path, split: str, numbers=None) -> Path:
    """Digits as PNG files with their labels listed, as generate.py leaves them."""
    source, rows = Digits(split), []
    folder.mkdir(parents=True)
    for number in range(len(source)) if numbers is None else numbers:
        source.read(number, 32).save(folder / f"{number:04d}.png")
        rows.append({"file_name": f"{number:04d}.png", "label": int(source.labels[number])})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def folders(once) -> dict[str, Path]:
    """The train and test digits as folders."""
    root = once("digits", lambda folder: [write_digits(folder / split, split) for split in Digits.SPLITS])
    return {split: root / split for split in Digits.SPLITS}


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text())["rows"]


def values(row: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in row["metrics"].items()}


def test_known_answers(folders, script, tmp_path, capsys):
    """A copied training set is memorized, held-out digits are not, and a set has everything of itself."""
    words = ["--reference", "digits", "--bootstrap", 40, "--output_dir", tmp_path / "x"]
    script("evaluate_model", "--images", f"copied={folders['train']}", f"held-out={folders['test']}", *words)
    copied, itself = map(values, results(tmp_path / "x"))
    assert copied["memorization_ratio"] == 1 and copied["nearest_train_distance"] < 1e-3
    assert itself["memorization_ratio"] < 0.02 and itself["nearest_train_distance"] > 0.1
    assert itself["fid"] < 1e-6 < copied["fid"] < 0.5
    for metric in ("precision", "recall", "coverage", "topp_fidelity", "topp_diversity"):
        assert itself[metric] == 1, metric
    assert copied["class_agreement"] > 0.99 and itself["class_agreement"] > 0.98
    assert results(tmp_path / "x")[0]["skipped"].keys() == {"clip_score", *OF_CONTROLS}
    low, high = results(tmp_path / "x")[0]["metrics"]["fid"]["interval"]
    assert low < copied["fid"] < high

    said = capsys.readouterr().out
    assert "| FID ↓ " in said and " copied |" in said and "clip_score: not computed" in said
    choices = json.loads((tmp_path / "x/metrics.json").read_text())["settings"]
    assert choices["reference"].items() >= {"name": "digits", "split": "test", "images": 360}.items()
    assert len(choices["reference"]["identity"]) == 64
    assert choices["extractor"]["extractor"] == "digits" and len(choices["extractor"]["weights"]) == 64
    assert choices["generated"]["image_format"] == ["png"] and choices["options"]["precision_k"] == 3
    for name in ("metrics.md", "metrics.png", "samples.png", "memorized-copied.png"):
        assert (tmp_path / "x" / name).stat().st_size > 100, name


def test_two_processes_give_the_figures_of_one_and_figures_are_drawn(untrained, script, tmp_path):
    words = ["--pipeline", untrained, "--reference", "digits", "--num_images", 40, "--guidance_scale", 1, 2]
    words += ["--num_inference_steps", 2, "--batch_size", 10, "--cpu_threads_per_process", 1]
    script("evaluate_model", *words, "--output_dir", tmp_path / "one")
    done = finished("evaluate_model", *words, "--output_dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert [values(row) for row in one] == [values(row) for row in two] and len(one) == 2
    assert values(one[0]) != values(one[1])
    assert {"fid", "recall", "rmd_top", "entropy", "class_agreement", "lpips_diversity"} <= set(values(one[0]))
    for name in ("metrics.png", "samples.png", "walk-run.png", "walk-run.webp", "memorized-run.png"):
        assert (tmp_path / "two" / name).stat().st_size > 100, name
    assert Image.open(tmp_path / "two/walk-run.webp").n_frames == 20


def test_a_killed_evaluation_goes_on_with_what_is_there(untrained, script, tmp_path):
    words = ["--pipeline", untrained, "--reference", "digits", "--num_images", 60, "--guidance_scale", 2, *FAST]
    words += ["--metrics", "fid", "precision", "--batch_size", 2]
    script("evaluate_model", *words, "--output_dir", tmp_path / "through")

    killed, deadline = tmp_path / "killed", time.monotonic() + 120
    with started("evaluate_model", *words, "--output_dir", killed):
        while len(list(killed.rglob("*.png"))) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*.png")}
    assert 6 <= len(before) < 60 and not (killed / "metrics.json").exists()

    script("evaluate_model", *words, "--output_dir", killed)
    assert [values(row) for row in results(killed)] == [values(row) for row in results(tmp_path / "through")]
    whole = [path for path in before if path.stat().st_mtime_ns == before[path]]
    assert len(whole) >= len(before) - 1  # an odd one's batch was not whole


def test_nothing_is_computed_twice(folders, script, tmp_path, monkeypatch):
    words = ["--images", folders["test"], "--reference", "digits", "--no_figures", "--output_dir", tmp_path]
    script("evaluate_model", *words, "--metrics", "fid", "recall")
    first = results(tmp_path)
    from noisycond.evaluation import suite

    def fails(*args, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(suite, "fid", fails)
    script("evaluate_model", *words, "--metrics", "fid", "recall", "entropy")
    assert values(results(tmp_path)[0])["fid"] == values(first[0])["fid"] and "entropy" in values(results(tmp_path)[0])
    with pytest.raises(AssertionError, match="computed again"):
        script("evaluate_model", *words, "--metrics", "fid", "--reference_split", "train")


def test_runs_of_one_setting_have_a_spread(untrained, script, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(untrained, other)
    words = ["--pipeline", f"both={untrained},{other}", f"one={untrained}", "--seeds", 0, 1, "--guidance_scale", 1]
    words += ["--num_images", 20, "--reference", "digits", "--metrics", "fid", *FAST]
    script("evaluate_model", *words, "--output_dir", tmp_path / "x")
    record = json.loads((tmp_path / "x/metrics.json").read_text())
    assert len(record["rows"]) == 6
    both, one = (summary["metrics"]["fid"] for summary in record["summaries"])
    assert both["of"] == "runs" and both["spread"] == 0  # the same weights twice
    assert one["of"] == "seeds" and one["spread"] > 0


def test_saved_statistics_stand_in_for_the_images(folders, script, refused, tmp_path):
    stats = tmp_path / "test.npz"
    script(
        "evaluate_model",
        "--reference",
        "digits",
        "--save_stats",
        stats,
        "--output_dir",
        tmp_path / "s",
        "--resolution",
        32,
    )
    words = ["--images", folders["train"], "--no_figures", "--feature_extractor", "digits", "--train_data", "digits"]
    script("evaluate_model", *words, "--reference", "digits", "--output_dir", tmp_path / "images")
    script("evaluate_model", *words, "--reference", stats, "--output_dir", tmp_path / "stats")
    images, stored = (values(results(tmp_path / name)[0]) for name in ("images", "stats"))
    assert images == stored and "sfid" in stored and "rmd_top" in stored

    sentence = refused(
        "evaluate_model", *words, "--reference", stats, "--resolution", 16, "--output_dir", tmp_path / "y"
    )
    assert str(stats) in sentence and "resolution 32" in sentence and "16" in sentence
    with np.load(stats) as arrays:
        settings = json.loads(str(arrays["settings"])) | {"weights": "0" * 64}
        np.savez(tmp_path / "other.npz", **{**arrays, "settings": json.dumps(settings)})
    sentence = refused("evaluate_model", *words, "--reference", tmp_path / "other.npz", "--output_dir", tmp_path / "z")
    assert "other.npz" in sentence and "weights" in sentence


def test_batches_of_the_adm_evaluator(folders, script, refused, tmp_path):
    digits = Digits("test")
    pixels = np.stack([np.asarray(digits.read(number, 32)) for number in range(100)])
    np.savez(tmp_path / "samples.npz", pixels, digits.labels[:100])
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "virtual.npz", arr_0=pixels, **moments)
    words = ["--images", tmp_path / "samples.npz", "--feature_extractor", "digits", "--no_figures"]
    script("evaluate_model", *words, "--reference", tmp_path / "virtual.npz", "--output_dir", tmp_path / "x")
    # The moments are of another extractor: the images in the batch are the reference.
    found = values(results(tmp_path / "x")[0])
    assert found["fid"] < 1e-6 and found["precision"] == 1 and found["class_agreement"] > 0.97

    np.savez(tmp_path / "moments.npz", **moments)
    sentence = refused(
        "evaluate_model", *words, "--reference", tmp_path / "moments.npz", "--output_dir", tmp_path / "y"
    )
    assert "moments.npz" in sentence and "inception-v3-compat" in sentence


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--metrics", "fid", "--feature_extractor", "digits"], ["no --reference"]),
        (["--metrics", "memorization_ratio", "--feature_extractor", "digits"], ["no --train_data"]),
        (["--metrics", "topp_f1", "--reference", "digits"], ["at least 161 generated images", "there are 50"]),
        (["--reference", "digits", "--walk_class", "99"], ["--walk_class is 99", "10 classes"]),
        (["--reference", "STATS"], ["resolution 16", "this run has 32"]),
    ],
)
def test_what_cannot_be_measured_is_refused_before_an_image_is_drawn(
    untrained, script, refused, tmp_path, flags, words
):
    if "STATS" in flags:
        script("evaluate_model", "--reference", "digits", "--save_stats", tmp_path / "s.npz", "--resolution", 16)
        flags = ["--reference", tmp_path / "s.npz", "--feature_extractor", "digits"]
    words_of_run = ["--pipeline", untrained, "--num_images", 50, "--guidance_scale", 2, "--num_inference_steps", 2]
    sentence = refused("evaluate_model", *words_of_run, *flags, "--output_dir", tmp_path / "x")
    assert all(word in sentence for word in words), sentence
    assert not list((tmp_path / "x").rglob("*.png"))


def test_changed_real_images_are_measured_anew(folders, script, tmp_path):
    real = tmp_path / "real"
    digits = Digits("test")
    for number in range(60):
        (real / str(digits.labels[number])).mkdir(parents=True, exist_ok=True)
        digits.read(number, 32).save(real / str(digits.labels[number]) / f"{number}.bmp")
    words = ["--images", folders["test"], "--reference", real, "--feature_extractor", "digits", "--metrics", "fid"]
    words += ["--no_figures", "--output_dir", tmp_path / "x"]
    script("evaluate_model", *words)
    before = values(results(tmp_path / "x")[0])["fid"]
    for path in real.rglob("*.bmp"):  # as large as before
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    script("evaluate_model", *words)
    assert values(results(tmp_path / "x")[0])["fid"] > 5 * before


def test_what_was_computed_is_kept_when_a_guidance_scale_is_added(untrained, script, refused, tmp_path):
    words = ["--pipeline", untrained, "--reference", "digits", "--num_images", 20, "--metrics", "fid", "recall", *FAST]
    words += ["--output_dir", tmp_path / "x"]
    script("evaluate_model", *words, "--guidance_scale", 1)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "x/computed").iterdir()}
    script("evaluate_model", *words, "--guidance_scale", 1, 2)
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "x/computed").iterdir()}
    assert first.items() <= now.items() and (len(first), len(now)) == (2, 4)

    sentence = refused("evaluate_model", "--images", tmp_path / "x/images", "--output_dir", tmp_path / "x")
    assert "there is no image" in sentence or "holds the report of" in sentence


def test_results_go_into_the_model_card(untrained, script, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(untrained, copy)
    before = ModelCard.load(copy / "README.md")
    words = ["--pipeline", copy, "--reference", "digits", "--num_images", 20, "--guidance_scale", 2, *FAST]
    script("evaluate_model", *words, "--metrics", "fid", "recall", "--update_card", "--output_dir", tmp_path / "x")
    card = ModelCard.load(copy / "README.md")
    found = {result.metric_type: result for result in card.data.eval_results}
    assert found["fid"].metric_value == pytest.approx(values(results(tmp_path / "x")[0])["fid"], rel=1e-5)
    assert set(found) == {"fid", "recall"} and found["fid"].dataset_type == "digits"
    assert card.text == before.text and card.data.license == before.data.license


def test_evaluations_during_training(tiny, script, tmp_path):
    words = ["--eval_steps", 3, "--eval_num_images", 20, "--eval_metrics", "fid", "class_agreement", "entropy"]
    script("train_class_cond", *tiny, *words, "--checkpointing_steps", 4)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6] and rows[0]["fid"] != rows[1]["fid"]
    assert all(row.keys() == {"step", "fid", "class_agreement", "entropy", "settings"} for row in rows)
    assert Image.open(run / "evaluation.png").width > 300
    found = {result.metric_type: result.metric_value for result in ModelCard.load(run / "README.md").data.eval_results}
    assert found["fid"] == pytest.approx(rows[1]["fid"], rel=1e-5)

    # Through evaluate_model.py to the same figure: a pixel or two is rounded otherwise, for loaded weights lie
    # elsewhere in memory.
    words = ["--pipeline", run, "--reference", "digits", "--num_images", 20, "--guidance_scale", 4, "--metrics", "fid"]
    script("evaluate_model", *words, *FAST, "--batch_size", 50, "--output_dir", tmp_path / "x")
    assert values(results(tmp_path / "x")[0])["fid"] == pytest.approx(rows[1]["fid"], rel=1e-3)


def test_a_resumed_run_is_measured_with_its_own_choices(tiny, script, tmp_path):
    run = tmp_path / "run"
    script("train_class_cond", *tiny, "--eval_steps", 3, "--eval_num_images", 20, "--eval_metrics", "fid", "recall")
    words = ["--resume_from_checkpoint", "latest", "--eval_steps", 3, "--eval_num_images", 30, "--eval_metrics", "fid"]
    script("train_class_cond", *tiny, *words)
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [(row["step"], row["settings"]["num_images"]) for row in rows] == [(3, 20), (6, 20), (6, 30)]
    entries = ModelCard.load(run / "README.md").data.eval_results
    assert {(entry.metric_type, entry.metric_args["num_images"]) for entry in entries} == {("fid", 30)}
    assert entries[0].metric_value == pytest.approx(rows[-1]["fid"], rel=1e-5)


def test_some_classes_are_measured_against_these_classes(tiny, script, tmp_path):
    words = ["--class_subset", 3, "--eval_steps", 6, "--eval_num_images", 30, "--eval_metrics", "coverage", "fid"]
    script("train_class_cond", *tiny, *words)
    row = json.loads((tmp_path / "run/evaluation.jsonl").read_text())
    assert 100 < row["settings"]["reference"]["images"] < 112


@pytest.mark.parametrize(
    "metric, words",
    [
        ("topp_f1", ["--eval_metrics topp", "at least 161 generated images"]),
        ("memorization_ratio", ["--eval_metrics memorization_ratio", "known for digits alone"]),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tiny, refused, tmp_path, metric, words):
    words_of_run = ["--eval_steps", 3, "--eval_num_images", 50, "--eval_metrics", metric]
    if metric == "memorization_ratio":  # digits as a folder are not known to be digits
        for number in range(20):
            (tmp_path / "data" / str(number % 10)).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "data" / str(number % 10) / f"{number}.png")
        words_of_run += ["--train_data_dir", tmp_path / "data", "--eval_reference", "digits", "--resolution", 32]
        words_of_run += ["--pretrained_vae_model_name_or_path", "digits-kl"]
        tiny = [word for word in tiny if word not in ("--max_train_samples", "96")]
    sentence = refused("train_class_cond", *tiny, *words_of_run)
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run/log.jsonl").exists()


def test_an_evaluation_does_not_change_training(tiny, script, tmp_path):
    script("train_class_cond", *tiny)
    losses = (tmp_path / "run/log.jsonl").read_text()
    script(
        "train_class_cond",
        *tiny,
        "--overwrite_output_dir",
        "--eval_steps",
        2,
        "--eval_num_images",
        10,
        "--eval_metrics",
        "fid",
    )
    kept = [
        [json.loads(line)["loss"] for line in text.splitlines()]
        for text in (losses, (tmp_path / "run/log.jsonl").read_text())
    ]
    assert kept[0] == kept[1]


ON_DIGITS = ["--images", "DIGITS", "--reference", "digits"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--pipeline or --images is needed"]),
        (["--images", "DIGITS", "--pipeline", "x"], ["do not go together"]),
        (["--images", "/nowhere", "--reference", "digits"], ["--images /nowhere", "no such folder"]),
        (["--images", "EMPTY", "--reference", "digits"], ["--images", "there is no image"]),
        (["--images", "DIGITS", "--reference", "/nowhere"], ["--reference /nowhere"]),
        (["--images", "DIGITS", "--reference", "/nowhere.npz"], ["--reference /nowhere.npz: there is no such file"]),
        (["--images", "SIZES", "--reference", "digits"], ["several sizes", "--resolution"]),
        (["--images", "BROKEN", "--reference", "digits"], ["0001.png cannot be read"]),
        (["--images", "UNLABELLED", "--reference", "digits", "--metrics", "rmd_top"], ["no labels", "metadata.jsonl"]),
        (["--images", "FEW", "--reference", "digits", "--metrics", "recall"], ["recall", "at least 6", "there are 3"]),
        (["--images", "DIGITS", "--metrics", "fid", "--feature_extractor", "digits"], ["no --reference"]),
        ([*ON_DIGITS, "--metrics", "fdi"], ["--metrics fdi", "'fid'"]),
        ([*ON_DIGITS, "--feature_extractor", "inception"], ["--feature_extractor", "inception-v3-compat"]),
        ([*ON_DIGITS, "--seeds", "-1"], ["--seeds is -1"]),
        ([*ON_DIGITS, "--clip_model", "/nowhere", "--metrics", "clip_score"], ["--clip_model /nowhere"]),
        ([*ON_DIGITS, "--classifier", "/nowhere"], ["--classifier /nowhere"]),
        (["--images", "a=DIGITS", "a=FEW", "--reference", "digits"], ["two of them have the label 'a'"]),
        (["--pipeline", "/nowhere", "--reference", "digits"], ["--pipeline /nowhere"]),
        (["--pipeline", "x", "--reference", "digits", "--guidance_scale", "0.5"], ["--guidance_scale is 0.5"]),
        (
            ["--pipeline", "x", "--reference", "digits", "--metrics", "kid", "--kid_subset_size", "900"]
            + ["--num_images", "100"],
            ["kid", "at least 900"],
        ),
        (["--pipeline", "x", "--reference", "digits", "--update_card"], ["--update_card", "model card"]),
        (["--save_stats", "x.npz"], ["--save_stats needs --reference"]),
        (["--save_stats", "x.txt", "--reference", "digits"], ["--save_stats x.txt", ".npz"]),
        ([*ON_DIGITS, "--update_card"], ["--update_card needs --pipeline"]),
        ([*ON_DIGITS, "--num_images", "9"], ["--num_images has no effect without --pipeline"]),
        ([*ON_DIGITS, "--scheduler", "DDIMScheduler"], ["--scheduler has no effect without --pipeline"]),
        ([*ON_DIGITS, "--clip_prompt", "{}"], ["--clip_prompt has no effect without --metrics clip_score"]),
        (
            ["--images", "DIGITS", "--reference", "DIGITS", "--reference_split", "val"],
            ["--reference_split has no effect"],
        ),
        (["--images", "ONE", "--feature_extractor", "digits"], ["no metric can be computed", "no --reference"]),
    ],
)
def test_bad_input(folders, refused, tmp_path, flags, words):
    places = {name: tmp_path / name.lower() for name in ("EMPTY", "SIZES", "BROKEN", "UNLABELLED", "FEW", "ONE")}
    for name, place in places.items():
        if any(name in flag for flag in flags):
            write_digits(place, "test", range({"EMPTY": 0, "ONE": 1}.get(name, 3)))
    if any("SIZES" in flag for flag in flags):
        Image.new("RGB", (32, 31)).save(places["SIZES"] / "0002.png")
    if any("BROKEN" in flag for flag in flags):
        (places["BROKEN"] / "0001.png").write_bytes(b"broken")
    for name in ("UNLABELLED", "ONE"):
        if any(name in flag for flag in flags):
            (places[name] / "metadata.jsonl").unlink()
    for name, place in (places | {"DIGITS": folders["test"]}).items():
        flags = [flag.replace(name, str(place)) for flag in flags]
    sentence = refused("evaluate_model", *flags, "--output_dir", tmp_path / "out", "--no_figures")
    assert all(word in sentence for word in words), sentence
