"""A tiny setting in which a training script takes a second or two."""

import json
from pathlib import Path

import pytest
from launching import call
from tiny_models import UNET_CONFIG


@pytest.fixture(scope="session")
def tiny_denoiser(tmp_path_factory) -> str:
    """A DiT configuration far smaller than the miniature."""
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="session")
def tiny_unet(tmp_path_factory) -> str:
    """A U-Net configuration far smaller than the miniature."""
    path = tmp_path_factory.mktemp("config") / "unet.json"
    path.write_text(json.dumps(UNET_CONFIG))
    return str(path)


@pytest.fixture
def tiny_ldm(tiny, tiny_unet) -> list[str]:
    """The flags of `tiny` with a U-Net and a VQ first stage."""
    return [*tiny, "--denoiser", tiny_unet, "--pretrained_vae_model_name_or_path", "digits-vq"]


@pytest.fixture(scope="session")
def tiny_text_unet(tmp_path_factory) -> str:
    """A U-Net configuration that attends to the embeddings of `digits-bert`."""
    path = tmp_path_factory.mktemp("config") / "text-unet.json"
    path.write_text(json.dumps(UNET_CONFIG | {"cross_attention_dim": 64}))
    return str(path)


@pytest.fixture
def tiny_text(tmp_path, tiny_text_unet) -> list[str]:
    """Flags of a text-to-image run of six steps on captioned digits, without trackers, into tmp_path / "run"."""
    flags = {
        "output_dir": tmp_path / "run",
        "denoiser": tiny_text_unet,
        "text_encoder": "digits-bert",
        "train_batch_size": 8,
        "max_train_samples": 96,
        "max_train_steps": 6,
        "report_to": "none",
        "num_validation_images": 1,
        "validation_inference_steps": 2,
        "cpu_threads_per_process": 1,
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.fixture
def tiny(tmp_path, tiny_denoiser) -> list[str]:
    """Flags of a run of six steps on digits, without trackers, into tmp_path / "run"."""
    flags = {
        "output_dir": tmp_path / "run",
        "denoiser": tiny_denoiser,
        "train_batch_size": 8,
        "max_train_samples": 96,
        "max_train_steps": 6,
        "report_to": "none",
        "validation_images_per_class": 1,
        "validation_inference_steps": 2,
        "cpu_threads_per_process": 1,
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="session")
def untrained(once) -> Path:
    """A pipeline folder of the miniature, hardly trained; not to be written to."""
    words = ["--max_train_steps", 3, "--train_batch_size", 8, "--learning_rate", 1e-2, "--report_to", "none"]
    words += ["--validation_images_per_class", 1, "--validation_inference_steps", 2, "--cpu_threads_per_process", 1]
    return once("untrained", lambda folder: call("train_class_cond", "--output_dir", folder / "run", *words)) / "run"
