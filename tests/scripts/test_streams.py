"""Training on data that does not fit: cut and gone on with bit for bit, on two processes, and what is refused."""

import json
import shutil
import time
from pathlib import Path

import datasets
import pytest
import torch
from forking import finished, started
from safetensors.torch import load_file
from shards import json_label, png, write_class_names, write_one, write_shards

from noisycond.data.sources import Digits


BROKEN = ["00005.tar/0001", "00005.tar/0002", "00005.tar/0003", "00005.tar/0005", "the shard 00001.tar after"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Six shards of digits: the second is cut in the middle, the last holds examples of no use."""
    folder = tmp_path_factory.mktemp("shards")
    paths = write_shards(folder, [30, 30, 40, 20, 30])
    paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size // 2])
    good = {"png": png(0), "cls": b"3"}
    bad = [good | {"png": b"nonsense"}, good | {"cls": b"12"}, good | {"cls": b"x"}]
    write_one(folder / "00005.tar", [good, *bad, {"png": png(1), "json": json_label(3)}, {"png": png(2)}, good])
    write_class_names(folder / "names.txt")
    return folder


@pytest.fixture
def flags(shards, tiny_denoiser) -> list[str]:
    """Flags of a run of twelve steps on the shards."""
    values = {
        "train_shards": shards / "{00000..00005}.tar",
        "class_names": shards / "names.txt",
        "shuffle_buffer_size": 24,
        "pretrained_vae_model_name_or_path": "digits-kl",
        "denoiser": tiny_denoiser,
        "resolution": 32,
        "train_batch_size": 16,
        "corruption_ratio": 0.3,
        "max_train_steps": 12,
        "checkpointing_steps": 4,
        "report_to": "none",
        "validation_images_per_class": 1,
        "validation_inference_steps": 2,
        "cpu_threads_per_process": 1,
    }
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def ended() -> dict[str, Path]:
    return {}


@pytest.fixture
def straight(ended, script, flags, tmp_path_factory, caplog) -> Path:
    """The output folder of a run that nothing interrupts."""
    if not ended:
        ended["run"] = tmp_path_factory.mktemp("straight") / "run"
        script("train_class_cond", *flags, "--output_dir", ended["run"])
    return ended["run"]


def assert_same(one: Path, other: Path) -> None:
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    assert len((one / "log.jsonl").read_text().splitlines()) == 12
    for name in ("model.safetensors", "ema.safetensors"):
        mine, theirs = (load_file(folder / "checkpoint-12" / name) for folder in (one, other))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    for name in ("checkpoint-12/trainer_state.json", "corruption.json"):
        assert (one / name).read_text() == (other / name).read_text()


def test_what_cannot_be_read_is_named_once_and_the_run_goes_on(straight, script, flags, tmp_path, caplog):
    script("train_class_cond", *flags, "--output_dir", tmp_path / "run", "--max_train_steps", 20)
    said = [record.getMessage() for record in caplog.records if "Skipping" in record.getMessage()]
    assert len(said) == 5 and all(any(name in line for line in said) for name in BROKEN)
    assert "A stream of 6 shards in 10 classes." in caplog.text
    assert json.loads((straight / "corruption.json").read_text())["examples_seen"] == 12 * 16


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_where_its_stream_was(straight, script, flags, tmp_path, caplog, workers):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoint-12")
    more = ["--resume_from_checkpoint", "latest", "--dataloader_num_workers", workers]
    script("train_class_cond", *flags, "--output_dir", folder, *more)
    assert "Resuming the stream in epoch 0 at shard 0000" in caplog.text
    assert_same(straight, folder)


def test_a_killed_run_goes_on_as_if_it_had_not_been(straight, script, flags, tmp_path):
    folder = tmp_path / "run"
    words = [*flags, "--output_dir", folder, "--dataloader_num_workers", 2]
    with started("train_class_cond", *words) as program:
        deadline = time.monotonic() + 180
        while not (folder / "checkpoint-4").exists() and program.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert not (folder / "checkpoint-12").exists()
    script("train_class_cond", *flags, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert_same(straight, folder)


def test_two_processes_and_then_one(script, flags, tmp_path, caplog):
    folder = tmp_path / "run"
    half = ["--train_batch_size", 8, "--max_train_steps", 6, "--output_dir", folder]
    done = finished("train_class_cond", *flags, *half, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((folder / "checkpoint-6/trainer_state.json").read_text())
    assert len(state["batches"]) == 2 and state["batches"][0] != state["batches"][1]
    # The same examples are corrupted as on one process: what is counted agrees with the keys alone.
    assert json.loads((folder / "corruption.json").read_text())["examples_seen"] == 6 * 16
    script("train_class_cond", *flags, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert "The stream was read by 2 processes and is now by 1" in caplog.text
    assert len((folder / "log.jsonl").read_text().splitlines()) == 12


def test_too_much_that_cannot_be_read_ends_the_run(refused, flags, tmp_path):
    sentence = refused("train_class_cond", *flags, "--output_dir", tmp_path / "run", "--max_bad_images", 2)
    assert "--max_bad_images 2" in sentence and "00005.tar/000" in sentence


def replaced(flags: list[str], **values) -> list[str]:
    """The flags with some left out (None) or changed."""
    pairs = dict(zip(flags[::2], flags[1::2], strict=True)) | {f"--{name}": value for name, value in values.items()}
    return [str(word) for name, value in pairs.items() if value is not None for word in (name, value)]


def test_a_dataset_as_a_stream(script, flags, tmp_path, caplog):
    source = Digits("train")
    rows = [{"image": {"bytes": png(i), "path": None}, "label": int(source.labels[i]), "code": i} for i in range(40)]
    classes = datasets.ClassLabel(names=source.class_names)
    features = {"image": datasets.Image(), "label": classes, "code": datasets.Value("int64")}
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    (tmp_path / "data").mkdir()
    for number in range(2):
        table.shard(2, number).to_parquet(str(tmp_path / "data" / f"train-{number:05d}-of-00002.parquet"))
    words = replaced(flags, train_shards=None, class_names=None, dataset_name=tmp_path / "data", max_train_steps=3)
    words += ["--streaming", "--id_column", "code", "--output_dir", tmp_path / "run"]
    script("train_class_cond", *words)
    assert "A stream of 2 shards in 10 classes." in caplog.text
    assert (tmp_path / "run/model_index.json").is_file()


@pytest.mark.parametrize("mode", ["--corruption_mode", "--cep_mode"])
def test_a_stream_without_stable_ids(refused, script, flags, tmp_path, mode):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = [{"image": {"bytes": png(i), "path": None}, "label": i % 2} for i in range(20)]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "data/train.parquet"))
    corrupted = mode == "--corruption_mode"
    words = replaced(
        flags,
        train_shards=None,
        class_names=None,
        dataset_name=tmp_path / "data",
        corruption_ratio=0.3 if corrupted else 0,
        cep_gamma=0 if corrupted else 1,
        max_train_steps=2,
        output_dir=tmp_path / "run",
    )
    sentence = refused("train_class_cond", *words, "--streaming", mode, "fixed")
    assert f"{mode} fixed needs examples with stable ids" in sentence and "--id_column" in sentence
    assert not (tmp_path / "run").exists()
    script("train_class_cond", *words, "--streaming", mode, "random")


CASES = [
    ({"max_train_steps": None}, [], ["--max_train_steps is needed"]),
    ({"class_names": None}, [], ["--class_names FILE is needed with --train_shards"]),
    ({"class_names": "nowhere.txt"}, [], ["--class_names nowhere.txt", "cannot be read"]),
    ({"train_shards": "nowhere/{0..3}.tar"}, [], ["--train_shards nowhere/{0..3}.tar", "no file nowhere/0.tar"]),
    ({"dataset_name": "digits"}, [], ["exactly one of", "--dataset_name and --train_shards were given"]),
    ({"shuffle_buffer_size": 0}, [], ["--shuffle_buffer_size is 0"]),
    ({"class_subset": 3}, [], ["--class_subset does not go with"]),
    ({"max_train_samples": 3}, [], ["--max_train_samples does not go with"]),
    ({"dataset_split": "test"}, [], ["--dataset_split has no effect with --train_shards"]),
    ({"id_column": "id"}, [], ["--id_column has no effect with --train_shards"]),
    ({}, ["--save_corruption_map"], ["--save_corruption_map does not go with"]),
    ({}, ["--cache_latents", "--center_crop"], ["--cache_latents does not go with"]),
    (
        {"train_shards": None, "dataset_name": "digits", "class_names": None},
        ["--streaming"],
        ["--streaming has no effect with --dataset_name digits"],
    ),
    (
        {"train_shards": None, "dataset_name": "digits", "shuffle_buffer_size": None},
        [],
        ["--class_names has no effect without --streaming"],
    ),
    ({"train_shards": None, "train_data_dir": ".", "class_names": None}, ["--streaming"], ["--train_data_dir"]),
]


@pytest.mark.parametrize("changed, added, words", CASES, ids=[f"{changed} {added}" for changed, added, _ in CASES])
def test_refused(refused, flags, tmp_path, changed, added, words):
    sentence = refused("train_class_cond", *replaced(flags, **changed), "--output_dir", tmp_path / "run", *added)
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run").exists()


def test_other_shards_are_another_run_and_moved_ones_are_not(straight, script, refused, flags, tmp_path, shards):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    words = replaced(flags, train_shards=shards / "{00000..00004}.tar")
    sentence = refused("train_class_cond", *words, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert "dataset was" in sentence and "shards was 6 and is 5" in sentence
    (tmp_path / "moved").mkdir()
    for path in shards.iterdir():
        shutil.copy(path, tmp_path / "moved")
    moved = replaced(flags, train_shards=tmp_path / "moved" / "*.tar", class_names=tmp_path / "moved" / "names.txt")
    shutil.rmtree(folder / "checkpoint-12")
    script("train_class_cond", *moved, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert_same(straight, folder)


def test_a_script_that_needs_every_example_has_no_streams(refused, shards, tmp_path):
    sentence = refused("train_autoencoder", "--train_shards", shards / "*.tar", "--output_dir", tmp_path / "run")
    assert "unknown flag --train_shards" in sentence
