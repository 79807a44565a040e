"""generate.py: the same bits on any number of processes and after a resume."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from launching import launch
from PIL import Image
from safetensors.torch import load_file, save_file


FLAGS = ["--num_images", 20, "--batch_size", 6, "--num_inference_steps", 3, "--cpu_threads_per_process", 1]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A pipeline folder that was hardly trained."""
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    words = ["--max_train_steps", 3, "--train_batch_size", 8, "--validation_images_per_class", 1]
    done = launch("train_class_cond", "--output_dir", folder, "--learning_rate", 1e-2, "--report_to", "none", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.png"))}


def test_bits_do_not_depend_on_processes_or_resume(pipeline, script, tmp_path):
    script("generate", "--pipeline", pipeline, "--output_dir", tmp_path / "one", *FLAGS)
    one = digests(tmp_path / "one")
    assert list(one) == [f"{number:06d}.png" for number in range(20)] and len(set(one.values())) == 20

    done = launch("generate", "--pipeline", pipeline, "--output_dir", tmp_path / "two", *FLAGS, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert digests(tmp_path / "two") == one

    for number in (0, 7, 19):
        (tmp_path / "one" / f"{number:06d}.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one").glob("*.png")}
    script("generate", "--pipeline", pipeline, "--output_dir", tmp_path / "one", *FLAGS)
    assert digests(tmp_path / "one") == one
    untouched = (tmp_path / "one/000013.png").stat().st_mtime_ns
    assert untouched == before["000013.png"]  # its chunk was whole


def test_labels(pipeline, script, tmp_path):
    def labels(folder):
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert all((folder / row["file_name"]).exists() for row in rows)
        return [row["label"] for row in rows]

    words = ["--pipeline", pipeline, "--num_inference_steps", 1, "--guidance_scale", 1, "--num_images", 30]
    script("generate", *words, "--output_dir", tmp_path / "balanced")
    assert sorted(labels(tmp_path / "balanced")) == sorted(list(range(10)) * 3)
    script("generate", *words, "--output_dir", tmp_path / "random", "--class_sampling", "random", "--seed", 4)
    drawn = labels(tmp_path / "random")
    assert len(set(drawn)) > 4 and drawn != labels(tmp_path / "balanced") and max(drawn) < 10


def test_other_scheduler_and_format(pipeline, script, tmp_path):
    words = ["--pipeline", pipeline, "--num_images", 2, "--num_inference_steps", 2]
    script("generate", *words, "--output_dir", tmp_path / "ddim", "--image_format", "webp")
    assert Image.open(tmp_path / "ddim/000000.webp").size == (32, 32)
    script("generate", *words, "--output_dir", tmp_path / "a")
    script("generate", *words, "--output_dir", tmp_path / "b", "--scheduler", "DPMSolverMultistepScheduler")
    assert digests(tmp_path / "a") != digests(tmp_path / "b")


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--pipeline is needed"]),
        (["--pipeline", "/nowhere"], ["--pipeline /nowhere", "cannot open"]),
        (["--pipeline", "PIPELINE", "--scheduler", "DDIMSheduler"], ["--scheduler DDIMSheduler", "'DDIMScheduler'"]),
        (["--pipeline", "PIPELINE", "--num_images", "0"], ["--num_images is 0"]),
        (["--pipeline", "PIPELINE", "--guidance_scale", "0.5"], ["--guidance_scale is 0.5"]),
        (["--pipeline", "PIPELINE", "--n_images", "5"], ["unknown flag --n_images"]),
    ],
)
def test_bad_input(pipeline, refused, tmp_path, flags, words):
    flags = [str(pipeline) if flag == "PIPELINE" else flag for flag in flags]
    sentence = refused("generate", *flags, "--output_dir", tmp_path / "images")
    assert all(word in sentence for word in words), sentence


def test_another_generation_in_the_folder(pipeline, script, refused, tmp_path):
    words = ["--pipeline", pipeline, "--num_inference_steps", 1, "--num_images", 2, "--output_dir", tmp_path / "x"]
    script("generate", *words)
    assert "--seed was 0 and is 1" in refused("generate", *words, "--seed", 1)
    before = digests(tmp_path / "x")

    # The same name, retrained: images of the old weights must not pass for those of the new.
    copy = tmp_path / "copy"
    shutil.copytree(pipeline, copy)
    words = ["--pipeline", copy, *words[2:-1], tmp_path / "y"]
    script("generate", *words)
    weights = load_file(copy / "transformer/diffusion_pytorch_model.safetensors")
    weights["proj_out_2.bias"] += 1
    save_file(weights, copy / "transformer/diffusion_pytorch_model.safetensors")
    assert "other weights" in refused("generate", *words)
    assert digests(tmp_path / "x") == before


def test_a_mistyped_pipeline_claims_nothing(refused, tmp_path):
    refused("generate", "--pipeline", "/nowhere", "--output_dir", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_saved_again_has_as_many_classes(pipeline, script, tmp_path):
    """Stock diffusers drops id2label on saving; the rows between the classes and the null class are no classes."""
    DiffusionPipeline.from_pretrained(pipeline).save_pretrained(tmp_path / "again")
    assert "id2label" not in json.loads((tmp_path / "again/model_index.json").read_text())
    words = ["--num_inference_steps", 1, "--num_images", 20, "--output_dir", tmp_path / "x"]
    script("generate", "--pipeline", tmp_path / "again", *words)
    rows = [json.loads(line) for line in (tmp_path / "x/metadata.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == set(range(10))
