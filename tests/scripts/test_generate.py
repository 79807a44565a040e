"""generate.py: the same bits on any number of processes and after a resume."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from launching import launch
from PIL import Image
from released_layout import change_json, write_ldm
from safetensors.torch import load_file, save_file

import noisycond.convert  # noqa: F401


FLAGS = ["--num_images", 20, "--batch_size", 6, "--num_inference_steps", 3, "--cpu_threads_per_process", 1]


@pytest.fixture
def pipeline(untrained) -> Path:
    """A pipeline folder that was hardly trained; not to be written to."""
    return untrained


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


def write_tiny_ldm(folder: Path, script, *words) -> Path:
    """An LDM of the digits, hardly trained, as train_class_cond.py exports it."""
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    (folder.parent / "unet.json").write_text(json.dumps(config))
    flags = ["--denoiser", folder.parent / "unet.json", "--output_dir", folder, "--max_train_steps", 2]
    flags += ["--train_batch_size", 8, "--max_train_samples", 96, "--report_to", "none", "--learning_rate", 1e-2]
    flags += ["--validation_images_per_class", 1, "--validation_inference_steps", 2, "--cpu_threads_per_process", 1]
    script("train_class_cond", *flags, *words)
    return folder


def test_an_ldm_is_drawn_from_without_trust_and_without_its_code(script, refused, tmp_path):
    folder = write_tiny_ldm(tmp_path / "ldm", script)
    weights_file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(weights_file)  # at the start a U-Net predicts 0 for every class
    save_file({name: value + 0.1 * torch.randn_like(value) for name, value in weights.items()}, weights_file)
    for file in folder.rglob("*.py"):
        file.write_text("raise SystemExit('code of the folder was run')")
    words = ["--pipeline", folder, "--num_images", 20, "--num_inference_steps", 2, "--guidance_scale", 2]
    script("generate", *words, "--output_dir", tmp_path / "x")
    assert Image.open(tmp_path / "x/000000.png").size == (32, 32) and len(digests(tmp_path / "x")) == 20
    script("generate", *words[:-1], 1, "--output_dir", tmp_path / "y")
    assert digests(tmp_path / "x") != digests(tmp_path / "y")

    # Without names, the embedder's table tells the number of classes.
    index = json.loads((folder / "model_index.json").read_text())
    assert len(index.pop("id2label")) == 10
    (folder / "model_index.json").write_text(json.dumps(index))
    script("generate", *words, "--output_dir", tmp_path / "z")
    rows = [json.loads(line) for line in (tmp_path / "z/metadata.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == set(range(10)) and digests(tmp_path / "z") == digests(tmp_path / "x")

    shutil.rmtree(folder / "class_embedder")
    sentence = refused("generate", *words, "--output_dir", tmp_path / "w")
    assert f"--pipeline {folder}" in sentence and "class embedder's weights are missing" in sentence


def test_a_released_ldm_and_its_conversion_give_the_same_and_train_on(script, refused, tmp_path):
    released = write_ldm(tmp_path / "released", embedder="cond_stage_model")
    change_json(released / "scheduler/scheduler_config.json", clip_sample=False)
    script("noisycond.convert", released, tmp_path / "converted")
    words = ["--num_images", 12, "--num_inference_steps", 3, "--guidance_scale", 2]
    for name in ("released", "converted"):
        script("generate", "--pipeline", tmp_path / name, *words, "--output_dir", tmp_path / f"images-{name}")
    found = digests(tmp_path / "images-released")
    assert len(found) == 12 and digests(tmp_path / "images-converted") == found

    # Its latents have three channels, as those of digits-vq; they are 8 pixels wide there and here.
    flags = ["--pretrained_vae_model_name_or_path", "digits-vq", "--learning_rate", "1e-12", "--beta_end", "0.0195"]
    flags += ["--prediction_type", "epsilon", "--no_use_ema", "--denoiser", tmp_path / "converted"]
    folder = tmp_path / "next"
    write_tiny_ldm(folder, script, *flags)
    for name in ("unet", "class_embedder"):
        files = [where / name / "diffusion_pytorch_model.safetensors" for where in (tmp_path / "converted", folder)]
        before, after = map(load_file, files)
        assert before.keys() == after.keys()
        assert all((before[key] - after[key]).abs().max() < 1e-6 for key in before), name
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["beta_schedule"] == "scaled_linear"

    shutil.rmtree(tmp_path / "converted/class_embedder")
    sentence = refused("train_class_cond", "--output_dir", tmp_path / "w", *flags)
    assert f"--denoiser {tmp_path / 'converted'}" in sentence and "class embedder's weights are missing" in sentence


def test_a_folder_without_class_labels_is_named(refused, tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    assert f"--pipeline {tmp_path}" in refused("generate", "--pipeline", tmp_path, "--output_dir", tmp_path / "x")
