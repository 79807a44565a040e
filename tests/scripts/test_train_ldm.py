"""train_class_cond.py with the U-Net of LDM: all that it promises of a DiT holds here with the same code."""

import json

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from noisycond import pictures, sampling
from noisycond.pipelines import LDMClassToImagePipeline


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def run(script, flags, *argv):
    script("train_class_cond", *flags, "--learning_rate", "1e-2", "--lr_scheduler", "constant", *argv)


def test_leaves_a_folder_that_gives_the_images_of_training(script, tiny_ldm, tmp_path, capsys):
    run(script, tiny_ldm, "--corruption_ratio", "0.5")
    folder = tmp_path / "run"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["ldm_class_to_image", "LDMClassToImagePipeline"]
    assert index["vqvae"] == ["diffusers", "VQModel"]
    assert index["id2label"] == {str(digit): str(digit) for digit in range(10)}
    assert json.loads((folder / "vqvae/config.json").read_text())["scaling_factor"] != 0.18215
    assert "trust_remote_code=True" in capsys.readouterr().out
    assert "trust_remote_code=True" in (folder / "README.md").read_text()

    drawn = Image.open(folder / "samples/final.png")
    for pipeline in (
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True),
        LDMClassToImagePipeline.from_pretrained(folder),
    ):
        settings = {"seed": 0, "guidance_scale": 2.0, "num_inference_steps": 2}
        images = sampling.sample_all(pipeline, sampling.class_rows(10, 1), **settings)
        assert np.array_equal(np.array(pictures.image_grid(images, 1, scale=2)), np.array(drawn))


def test_exported_weights_are_the_average(script, tiny_ldm, tmp_path):
    run(script, tiny_ldm)
    average = load_file(tmp_path / "run/checkpoint-6/ema.safetensors")
    unet = load_file(tmp_path / "run/unet/diffusion_pytorch_model.safetensors")
    table = load_file(tmp_path / "run/class_embedder/diffusion_pytorch_model.safetensors")
    assert (average["encoder.table.weight"] == table["embedding.weight"]).all()
    assert {f"backbone.model.{name}" for name in unet} | {"encoder.table.weight"} == set(average)
    assert all((average[f"backbone.model.{name}"] == value).all() for name, value in unet.items())


def test_a_resumed_run_ends_the_same(script, tiny_ldm, tmp_path):
    run(script, tiny_ldm)
    run(script, tiny_ldm, "--output_dir", tmp_path / "cut", "--max_train_steps", "3")
    run(script, tiny_ldm, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest")
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
    whole, cut = (load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("run", "cut"))
    assert all((whole[name] == cut[name]).all() for name in whole)


def test_flags_reach_the_embedding(script, tiny_ldm, tmp_path):
    found = []
    for flags in (["--cep_gamma", "0"], ["--cep_gamma", "5"], ["--cep_gamma", "5", "--cep_type", "gaussian"]):
        # The class embedding acts only once the zero-initialized layers have moved.
        run(script, tiny_ldm, "--overwrite_output_dir", *flags)
        found.append(losses(tmp_path / "run"))
    assert found[0][0] == found[1][0] == found[2][0]
    assert len({tuple(values) for values in found}) == 3


def test_gradient_checkpointing_changes_nothing(script, tiny_ldm, tmp_path):
    run(script, tiny_ldm)
    plain = losses(tmp_path / "run")
    run(script, tiny_ldm, "--gradient_checkpointing", "--overwrite_output_dir")
    assert losses(tmp_path / "run") == plain


def test_continues_its_own_export(script, tiny_ldm, tmp_path):
    run(script, tiny_ldm, "--ema_decay", "0")
    first = losses(tmp_path / "run")
    words = ["--denoiser", tmp_path / "run", "--output_dir", tmp_path / "next", "--lr_warmup_steps", "0"]
    run(script, tiny_ldm, *words, "--learning_rate", "1e-9")
    assert losses(tmp_path / "next")[0] < first[0] - 0.01


def test_generates_without_remote_code(script, tiny_ldm, tmp_path):
    run(script, tiny_ldm)
    words = ["--num_images", 12, "--num_inference_steps", 2, "--cpu_threads_per_process", 1]
    script("generate", "--pipeline", tmp_path / "run", "--output_dir", tmp_path / "images", *words)
    rows = [json.loads(line) for line in (tmp_path / "images/metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [*range(10), 0, 1]


@pytest.mark.parametrize(
    "config, words",
    [
        ({"out_channels": 6}, "out_channels is 6, but must equal in_channels (3)."),
        ({"block_out_chanels": [8]}, "did you mean 'block_out_channels'"),
        ({"block_out_channels": [8, 8, 8, 8, 8]}, "8 pixels wide, but this U-Net needs a multiple of 16"),
        ({"norm_num_groups": 7}, "diffusers cannot build it"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(refused, tiny_ldm, tiny_unet, tmp_path, config, words):
    with open(tiny_unet) as file:
        original = json.load(file)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(original | {"in_channels": 3} | config))
    assert words in refused("train_class_cond", *tiny_ldm, "--denoiser", path)
    assert not (tmp_path / "run").exists()
