"""What learns to follow control images at the smallest size: bases with random weights, and data with controls."""

import json
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny_models import tiny_unet, tiny_vq

from noisycond.pipelines import LDMClassToImagePipeline
from noisycond.pipelines.ldm_class_to_image import ClassEmbedder


NAMES = [str(digit) for digit in range(10)]


@torch.no_grad()
def moved(model: torch.nn.Module, std: float = 0.1, seed: int = 1) -> torch.nn.Module:
    """Away from the start, where much is 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(std=std, generator=generator)
    return model


def class_base(folder: Path, names: list[str] | None = NAMES, num_classes: int = 10, seed: int = 1, **options) -> Path:
    """A class-conditional LDM with weights that are not 0 anywhere, images of 16×16, saved in the folder."""
    torch.manual_seed(0)
    unet = moved(tiny_unet(**options), seed=seed)
    pipeline = LDMClassToImagePipeline(
        unet=unet,
        class_embedder=moved(ClassEmbedder(num_classes, unet.config.cross_attention_dim), 1.0),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        vqvae=tiny_vq(),
    )
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    if names is not None:
        index["id2label"] = dict(enumerate(names))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def noise_image(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def controlled_rows(count: int = 12, classes: tuple[str, ...] = ("7", "3", "5")) -> dict[str, list]:
    """Columns of a prepared dataset: images of noise, some wider or higher than 16×16, whose control `canny` is the
    image itself."""
    images = [noise_image(number, 16 + number % 3, 16 + 2 * (number % 3 == 0)) for number in range(count)]
    return {
        "image": images,
        "label": [number % len(classes) for number in range(count)],
        "canny": [image.copy() for image in images],
        "caption": [f"a {classes[number % len(classes)]}" for number in range(count)],
    }


def save_dataset(folder: Path, rows: dict[str, list], classes: tuple[str, ...] = ("7", "3", "5")) -> Path:
    """Writes rows as prepare_dataset.py writes its folder."""
    kinds = {"label": datasets.ClassLabel(names=list(classes)), "caption": datasets.Value("string")}
    features = {name: kinds.get(name, datasets.Image()) for name in rows}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(folder))
    return folder
