"""train_text_to_image_corrupt.py from existing pipelines, whole and by LoRA: Stable Diffusion, SDXL, LDM, PixArt-α."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from text_pipelines import FAMILIES, SIZE, make

from noisycond import pictures, sampling


SCRIPT = "train_text_to_image_corrupt"
PROMPTS = ["a 7", "thin"]
ENDS = (("down", "Encoder"), ("up", "Decoder"))


LEVELS = 4


@pytest.fixture(scope="module")
def bases(text_folders, tmp_path_factory):
    """The folders of small pipelines by family; that of LDM with a first stage of the factor 8 that diffusers takes it
    to have."""
    levels = {"block_out_channels": (8,) * LEVELS}
    levels |= {f"{way}_block_types": (f"{way.title()}{kind}Block2D",) * LEVELS for way, kind in ENDS}
    folder = tmp_path_factory.mktemp("ldm") / "ldm"
    make("ldm", vae_options=levels).save_pretrained(folder)
    return {kind: text_folders / kind for kind in FAMILIES} | {"ldm": folder}


def size_of(kind: str) -> int:
    return SIZE * 2 ** (LEVELS - 2) if kind == "ldm" else SIZE


@pytest.fixture
def flags(bases, tmp_path):
    """Flags of a run of four steps from the small pipeline of a family, on captioned digits."""

    def of(kind: str, **others) -> list[str]:
        values = {
            "pretrained_model_name_or_path": bases[kind],
            "recipe": "none",
            "dataset_name": "digits",
            "resolution": size_of(kind),
            "output_dir": tmp_path / "run",
            "train_batch_size": 4,
            "max_train_samples": 32,
            "max_train_steps": 4,
            "learning_rate": 1e-2,
            "lr_warmup_steps": 0,
            "cep_gamma": 1,
            "corruption_ratio": 0.5,
            "report_to": "none",
            "num_validation_images": 1,
            "validation_inference_steps": 2,
            "cpu_threads_per_process": 1,
            **others,
        }
        words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
        return [*words, "--validation_prompts", *PROMPTS]

    return of


def drawn(folder) -> np.ndarray:
    return np.array(Image.open(folder / "samples/final.png"))


def grid(pipeline) -> np.ndarray:
    settings = {"seed": 0, "guidance_scale": 4.0, "num_inference_steps": 2}
    pipeline.set_progress_bar_config(disable=True)
    images = sampling.sample_all(pipeline, PROMPTS, **settings)
    return np.array(pictures.image_grid(images, 1, scale=64 // images[0].width))


def slot_of(kind: str) -> str:
    return "transformer" if kind == "pixart" else "unet"


def weights(folder, part: str) -> dict:
    return load_file(next((folder / part).glob("*.safetensors")))


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_the_export_is_the_pipeline_it_started_from_and_gives_the_images_of_training(
    kind, script, flags, bases, tmp_path
):
    script(SCRIPT, *flags(kind))
    run, base = tmp_path / "run", bases[kind]
    mine, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (run, base))
    assert {name: value for name, value in mine.items() if name[0] != "_"} == {
        name: value for name, value in theirs.items() if name[0] != "_"
    }
    assert mine["_class_name"] == theirs["_class_name"]
    before, after = weights(base, slot_of(kind)), weights(run, slot_of(kind))
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)
    encoder = "bert" if kind == "ldm" else "text_encoder"
    assert all(torch.equal(value, weights(run, encoder)[name]) for name, value in weights(base, encoder).items())
    assert not any(name.startswith("encoder.") for name in load_file(run / "checkpoint-4/model.safetensors"))
    assert np.array_equal(grid(DiffusionPipeline.from_pretrained(run)), drawn(run))


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_lora_loads_as_the_run_says(kind, script, flags, bases, tmp_path, capsys):
    script(SCRIPT, *flags(kind, use_lora="yes", rank=2, learning_rate=0.3))
    run, base = tmp_path / "run", bases[kind]
    assert not (run / "model_index.json").exists() and not (run / slot_of(kind)).exists()
    told = capsys.readouterr().out.split("Load it where only diffusers and peft are installed:")[1]
    code = re.sub(r"^    ", "", told, flags=re.MULTILINE)
    place = {}
    exec(code.rsplit("image = ", 1)[0], place)
    assert np.array_equal(grid(place["pipeline"]), drawn(run))
    assert not np.array_equal(grid(DiffusionPipeline.from_pretrained(base)), drawn(run))
    trained = load_file(run / "checkpoint-4/model.safetensors")
    assert trained and all("lora_" in name or name.endswith("pos_embed") for name in trained)
    assert "lora" in (run / "README.md").read_text() and f"base_model: {kind}" in (run / "README.md").read_text()


@pytest.mark.parametrize("kind", ["sdxl", "pixart"])
def test_cached_embeddings_give_the_losses_of_encoding_at_every_step(kind, script, flags, tmp_path):
    def losses() -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]

    script(SCRIPT, *flags(kind))
    encoded = losses()
    script(
        SCRIPT, *flags(kind, text_cache_dir=tmp_path / "texts"), "--cache_text_embeddings", "--overwrite_output_dir"
    )
    assert losses() == pytest.approx(encoded, rel=1e-4)
    assert np.array_equal(grid(DiffusionPipeline.from_pretrained(tmp_path / "run")), drawn(tmp_path / "run"))


def test_its_text_encoder_can_be_trained_along(script, flags, bases, tmp_path):
    script(SCRIPT, *flags("sd", train_text_encoder="yes", text_encoder_learning_rate=1e-3))
    before, after = (weights(folder, "text_encoder") for folder in (bases["sd"], tmp_path / "run"))
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)
    assert np.array_equal(grid(DiffusionPipeline.from_pretrained(tmp_path / "run")), drawn(tmp_path / "run"))


@pytest.mark.parametrize(
    "others, words",
    [
        ({"beta_start": 0.01}, "--beta_start is 0.01, but"),
        ({"num_train_timesteps": 500}, "--num_train_timesteps is 500, but"),
        ({"denoiser": "ldm-mini-text"}, "--denoiser has no effect with --pretrained_model_name_or_path"),
        ({"use_lora": "yes", "rank": 0}, "--rank is 0"),
        ({"use_lora": "yes", "lora_target_modules": "nowhere"}, "--lora_target_modules"),
        ({"resolution": 15}, "--resolution is 15"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(others, words, refused, flags, tmp_path):
    assert words in refused(SCRIPT, *flags("sd", **others))
    assert not (tmp_path / "run/run.json").exists()
