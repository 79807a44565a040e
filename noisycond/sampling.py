"""Class labels to images through a pipeline, with a random stream of its own for every image.

Letters: N images, K classes.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from contextlib import contextmanager

import diffusers
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from PIL import Image
from tqdm import tqdm

from noisycond import randomness
from noisycond.errors import InputError, closest
from noisycond.first_stage import state_hash
from noisycond.pipelines import LDMClassToImagePipeline, LDMTextToImagePipeline, OriginalDiTPipeline
from noisycond.randomness import Purpose


OWN_PIPELINES = {
    kind.__name__: kind for kind in (LDMClassToImagePipeline, LDMTextToImagePipeline, OriginalDiTPipeline)
}


def balanced_labels(count: int, num_classes: int) -> torch.LongTensor:
    """N labels that go through the classes in turn: 0, 1, …, K - 1, 0, …; counts differ by one at most."""
    return torch.arange(count) % num_classes


def random_labels(count: int, num_classes: int, seed: int) -> torch.LongTensor:
    """N labels drawn uniformly, a function of the seed and each image's number."""
    return randomness.randint(seed, Purpose.SAMPLED_CLASS, torch.arange(count), num_classes)


def sample(
    pipeline: DiffusionPipeline,
    class_labels: Sequence[int],
    numbers: Sequence[int],
    *,
    seed: int,
    guidance_scale: float,
    num_inference_steps: int,
) -> list[Image.Image]:
    """One batch of images.

    Args:
        pipeline: a class-conditional pipeline (`DiTPipeline`, `LDMClassToImagePipeline`).
        class_labels: a label per image. numbers: each image's number, from which, with the seed, its noise is drawn.
    """
    generators = [randomness.generator_for(seed, Purpose.SAMPLING, int(number)) for number in numbers]
    return pipeline(
        [int(label) for label in class_labels],
        guidance_scale=guidance_scale,
        generator=generators,
        num_inference_steps=num_inference_steps,
    ).images


def class_rows(num_classes: int, per_class: int, limit: int = 10) -> list[int]:
    """Labels for a sample grid: `per_class` of each of at most `limit` classes, spread evenly over all."""
    shown = min(num_classes, limit)
    return [row * num_classes // shown for row in range(shown) for _ in range(per_class)]


def sample_all(
    pipeline: DiffusionPipeline, class_labels: Sequence[int], *, batch_size: int = 50, **settings
) -> list[Image.Image]:
    """Images 0 to N - 1 with these labels, in batches, with a progress bar; the settings are those of [`sample`]."""
    images: list[Image.Image] = []
    for first in tqdm(range(0, len(class_labels), batch_size), desc="sampling", unit="batch"):
        labels = class_labels[first : first + batch_size]
        images += sample(pipeline, labels, range(first, first + len(labels)), **settings)
    return images


def sample_from_noise(
    pipeline: DiffusionPipeline,
    class_labels: Sequence[int],
    noise: torch.Tensor,
    *,
    guidance_scale: float,
    num_inference_steps: int,
    output_type: str = "pil",
):
    """Images that start from given noise, with the pipeline's own sampling loop.

    Args:
        noise [N, C, h, w]: float32, of variance 1. output_type: one of the pipeline's.

    Returns:
        What the pipeline returns as images, a list for `pil`.

    Raises:
        RuntimeError: the pipeline takes no `latents`, and its first noise is not drawn as in diffusers' `DiTPipeline`.
    """
    options = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    labels = [int(label) for label in class_labels]
    if "latents" in inspect.signature(pipeline.__call__).parameters:
        return pipeline(labels, latents=noise, output_type=output_type, **options).images
    with _first_draw(pipeline, noise):
        return pipeline(labels, output_type=output_type, **options).images


def noise_shape(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """C, h and w of the noise that a pipeline's images start from."""
    model = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    size = model.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return model.config.in_channels, height, width


def image_size(pipeline: DiffusionPipeline) -> int:
    """The side of a pipeline's images in pixels."""
    first_stage = getattr(pipeline, "vae", None) or pipeline.vqvae
    return noise_shape(pipeline)[1] * 2 ** (len(first_stage.config.block_out_channels) - 1)


@contextmanager
def _first_draw(pipeline: DiffusionPipeline, noise: torch.Tensor):
    """A context in which the pipeline's module draws this noise. `DiTPipeline` takes no latents: it calls its module's
    `randn_tensor` once and nothing else there does, so the loop stays the pipeline's own."""
    module = inspect.getmodule(inspect.unwrap(type(pipeline).__call__))
    original = getattr(module, "randn_tensor", None)
    if original is None:
        raise RuntimeError(f"{type(pipeline).__name__} takes no latents, and its module has no randn_tensor.")
    drawn = []

    def given(shape, generator=None, device=None, dtype=None, layout=None):
        drawn.append(tuple(shape))
        if drawn != [tuple(noise.shape)]:
            raise RuntimeError(f"{type(pipeline).__name__} drew noise of {drawn}, not once of {tuple(noise.shape)}.")
        return noise.to(device, dtype)

    module.randn_tensor = given
    try:
        yield
    finally:
        module.randn_tensor = original
    if not drawn:
        raise RuntimeError(f"{type(pipeline).__name__} drew no noise by its module's randn_tensor.")


def open_pipeline(name_or_path: str, trust_remote_code: bool = False) -> DiffusionPipeline:
    """The pipeline in a folder or on the Hub, in float32 and without progress bars. One of our own classes, exported
    here or in the layout of the released checkpoints, is opened by the installed class: no code of the folder is run.

    Raises:
        InputError: there is none, or it does not take class labels.
    """
    try:
        kind = OWN_PIPELINES.get(pipeline_class_name(name_or_path), DiffusionPipeline)
        with _without_the_note_on_id2label():
            pipeline = kind.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--pipeline {name_or_path}: diffusers cannot open it ({reason}).") from error
    if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        raise InputError(f"--pipeline {name_or_path}: a {type(pipeline).__name__} does not take class labels.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _without_the_note_on_id2label():
    """A context in which diffusers does not remark that JSON keeps labels as text; its own pipeline reads them so."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def is_another(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Expected types for id2label")

    logger.addFilter(is_another)
    try:
        yield
    finally:
        logger.removeFilter(is_another)


def pipeline_class_name(name_or_path: str) -> str | None:
    """The class that a folder's or Hub id's index declares, without the module it may name beside it.

    Raises:
        OSError: there is no index.
    """
    declared = DiffusionPipeline.load_config(name_or_path).get("_class_name")
    return declared[-1] if isinstance(declared, (list, tuple)) else declared


def set_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Swaps in another scheduler of diffusers by its class name, with the noise schedule of the present one.

    Raises:
        InputError: diffusers has no such scheduler.
    """
    known = [entry for entry in dir(diffusers) if entry.endswith("Scheduler")]
    if name not in known:
        raise InputError(f"--scheduler {name}: diffusers has no such scheduler{closest(name, known)}.")
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)


def number_of_classes(pipeline: DiffusionPipeline, name_or_path: str) -> int:
    """K: the length of `id2label` where the folder has one, else the number of class embeddings.

    Raises:
        InputError: a pipeline that is neither built on a DiT nor on a class embedder tells neither.
    """
    names = class_names(name_or_path)
    if names is not None:
        return len(names)
    known = known_classes(pipeline)
    if known is None:
        raise InputError(f"--pipeline {name_or_path}: it has no id2label, so its number of classes is not known.")
    return known


def class_names(name_or_path: str) -> list[str] | None:
    """The names in a folder's or Hub id's `id2label`, in the order of the labels; None where it has none."""
    names = DiffusionPipeline.load_config(name_or_path).get("id2label")
    if not isinstance(names, dict):
        return None
    return [str(names[label]) for label in sorted(names, key=int)]


def known_classes(pipeline: DiffusionPipeline) -> int | None:
    """The number of class embeddings; None for a pipeline that is neither built on a DiT nor on a class embedder.

    The stock pipeline drops `id2label` when it saves; the rows of a smaller model's table that are filled with the
    null embedding (the last row) are no classes then either.
    """
    if isinstance(pipeline, LDMClassToImagePipeline):
        return pipeline.class_embedder.null_class
    if not isinstance(getattr(pipeline, "transformer", None), DiTTransformer2DModel):
        return None
    table = pipeline.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    return int((table != table[-1]).any(dim=1).nonzero().max()) + 1


def fingerprint(pipeline: DiffusionPipeline) -> str:
    """A hash of all weights and of the scheduler's configuration: what images depend on beside the arguments."""
    digest = hashlib.sha256(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            digest.update(name.encode() + state_hash(component).encode())
    return digest.hexdigest()
