"""Pictures beside the metrics: the samples of several runs, nearest training images, a walk through the latent space.

Letters: P positions of the walk, C latent channels, h × w their size.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image, ImageDraw

from noisycond import randomness
from noisycond.errors import require
from noisycond.pictures import caption_font, image_grid
from noisycond.randomness import Purpose
from noisycond.sampling import is_consistency_sampler, noise_shape, sample_from_noise


CAPTION_SIZE = 15  # pixels
ANIMATIONS = (".webp", ".gif")


def first_of_classes(labels: np.ndarray, classes: int, per_class: int) -> list[list[int]]:
    """The places of the first images of some classes, spread over all, of each class as many.

    Args:
        labels: int64 [N]. classes, per_class: at most so many.
    """
    there = sorted(set(labels.tolist()))
    shown = min(classes, len(there))
    spread = [there[place * len(there) // shown] for place in range(shown)]
    of_class = [np.flatnonzero(labels == label)[:per_class].tolist() for label in spread]
    fewest = min(map(len, of_class), default=0)
    return [places[:fewest] for places in of_class]


def side_by_side(
    named_images: Mapping[str, Sequence[Image.Image]], columns: int, scale: int | None = None, gap: int = 16
) -> Image.Image:
    """Sample grids of several runs beside one another, each with its name above: the same place in two grids is the
    same seed and class, if the images were drawn so.

    Args:
        named_images: for each run as many images, each run's of one size. columns: of each grid.
        scale: how many times as large images are drawn; by default small ones are enlarged. gap: between grids.

    Raises:
        InputError: no images, or not as many for each.
    """
    counts = {name: len(images) for name, images in named_images.items()}
    require(
        counts and min(counts.values()) > 0 and len(set(counts.values())) == 1,
        f"grids side by side need as many images of each run, at least one, but there are {counts}.",
    )
    grids = []
    for name, images in named_images.items():
        grids.append(_captioned(image_grid(images, columns, scale=scale or enlarging(images[0], 48)), name))
    return _in_a_row(grids, gap)


def nearest_neighbours(
    generated: Sequence[Image.Image],
    train: Sequence[Sequence[Image.Image]],
    distances: Sequence[Sequence[float]],
    scale: int | None = None,
) -> Image.Image:
    """A row per sample: the sample, then its nearest training images with their distances below them.

    Args:
        generated: of one size; most memorized first, as the caller orders them.
        train: for each sample as many training images, nearest first; drawn in the size of the samples.
        distances: of each of them. scale: as in [`side_by_side`].

    Raises:
        InputError: no samples, or not as many neighbours and distances for each.
    """
    shapes = {len(row) for row in (*train, *distances)}
    require(
        len(generated) == len(train) == len(distances) > 0 and len(shapes) == 1 and shapes != {0},
        "a figure of nearest neighbours needs as many training images, each with its distance, for every sample.",
    )
    size, scale = generated[0].size, scale or enlarging(generated[0], 64)
    enlarged = (size[0] * scale, size[1] * scale)
    samples = [_captioned(_sized(image, enlarged), "", below=True) for image in generated]
    neighbours = [
        _captioned(_sized(image, enlarged), f"{distance:.4g}", below=True)
        for images, values in zip(train, distances, strict=True)
        for image, distance in zip(images, values, strict=True)
    ]
    left = _captioned(image_grid(_same_size(samples), 1), "sample")
    right = _captioned(image_grid(_same_size(neighbours), shapes.pop()), "nearest training images, distance")
    return _in_a_row([left, right], 16)


def circular_walk(
    pipeline: DiffusionPipeline,
    condition: int | str,
    *,
    positions: int = 20,
    seed: int = 0,
    guidance_scale: float,
    num_inference_steps: int = 25,
    batch_size: int = 20,
    control: Image.Image | None = None,
    conditioning_scale: float = 1.0,
) -> list[Image.Image]:
    """Images of one class or prompt along a circle of noise, after arXiv:2405.20494: position i of P starts from
    cos(2πi/P) a + sin(2πi/P) b, with a and b two noise images; see [`circle_of_noise`].

    DDIM without noise of its own (η = 0) samples, with the noise schedule of the pipeline's scheduler, so that an
    image depends on its starting noise alone. A scheduler that DDIM cannot stand in for (of a consistency model, of
    flow matching) is kept; noise in its steps is the same for all images. The same seed gives every pipeline of the
    same latent shape the same circle.

    Args:
        pipeline: a class-conditional or text-to-image pipeline; keeps its scheduler.
        condition: the class label or the prompt.
        control, conditioning_scale: of a pipeline that draws after control images: the same for all images.
        positions: P; the one after the last would be the first again. batch_size: images drawn at a time.

    Raises:
        InputError: fewer than one position.
    """
    require(positions > 0, f"a walk needs at least one position, but {positions} are asked for.")
    angles = torch.arange(positions, dtype=torch.float64) * (2 * math.pi / positions)
    noise = circle_of_noise(seed, noise_shape(pipeline), angles)
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    images: list[Image.Image] = []
    with _ddim(pipeline) as takes_ddim:
        step_seed = None if takes_ddim else seed
        for batch in noise.split(batch_size):
            conditions = [condition] * len(batch)
            if control is not None:
                settings |= {"controls": [control] * len(batch), "conditioning_scale": conditioning_scale}
            images += sample_from_noise(pipeline, conditions, batch, step_seed=step_seed, **settings)
    return images


def circle_of_noise(seed: int, shape: Sequence[int], angles: torch.Tensor) -> torch.Tensor:
    """Noise of variance 1 at angles on the circle through two independent noise images a (at 0) and b (at π/2).

    Args:
        shape: (C, h, w). angles [P]: float, radians.

    Returns:
        float32 [P, C, h, w].
    """
    first, second = randomness.normal(seed, Purpose.LATENT_WALK, torch.arange(2), shape).to(torch.float64)
    angles = angles.to(torch.float64).reshape(-1, *[1] * len(shape))
    return (angles.cos() * first + angles.sin() * second).to(torch.float32)


def save_walk(
    images: Sequence[Image.Image], strip_path: str | Path, animation_path: str | Path, milliseconds: int = 100
) -> None:
    """Saves a walk as one strip (PNG) and as an animation that loops for ever; small images are enlarged.

    Args:
        animation_path: ends in .webp (without loss) or .gif (256 colours). milliseconds: per image.

    Raises:
        InputError: another ending, or no images.
    """
    animation_path = Path(animation_path)
    kind = animation_path.suffix.lower()
    require(kind in ANIMATIONS, f"{animation_path}: an animation ends in {' or '.join(ANIMATIONS)}.")
    require(images, "a walk to save needs at least one image.")
    image_grid(images, len(images), scale=enlarging(images[0], 48)).save(strip_path, format="PNG")
    scale = enlarging(images[0], 128)
    frames = [_sized(image, (image.width * scale, image.height * scale)) for image in images]
    options = {"lossless": True} if kind == ".webp" else {"disposal": 2}
    frames[0].save(animation_path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **options)


@contextmanager
def _ddim(pipeline: DiffusionPipeline):
    """A context in which the pipeline samples by DDIM where that can stand in for its scheduler; says whether."""
    before = pipeline.scheduler
    if is_consistency_sampler(before) or DDIMScheduler not in {type(before), *before.compatibles}:
        yield False
        return
    # DDIM clips x_0 unless told otherwise, which is wrong for latents.
    clip = before.config.get("clip_sample", False)
    pipeline.scheduler = DDIMScheduler.from_config(before.config, clip_sample=clip)
    try:
        yield True
    finally:
        pipeline.scheduler = before


def enlarging(image: Image.Image, least: int) -> int:
    """By what whole number a small image is enlarged to have sides of at least so many pixels."""
    return max(1, -(-least // min(image.size)))


def _sized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    larger = size[0] > image.width
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _captioned(image: Image.Image, text: str, below: bool = False) -> Image.Image:
    """The image with a caption, on white, wide enough for both."""
    font = caption_font(CAPTION_SIZE)
    width = max(image.width, math.ceil(font.getlength(text)) + 4)
    height = CAPTION_SIZE + 8
    canvas = Image.new("RGB", (width, image.height + height), "white")
    canvas.paste(image, ((width - image.width) // 2, 0 if below else height))
    place = (width // 2, image.height + height // 2 if below else height // 2)
    ImageDraw.Draw(canvas).text(place, text, fill="black", font=font, anchor="mm")
    return canvas


def _same_size(images: Sequence[Image.Image]) -> list[Image.Image]:
    """On canvases of the widest: captions differ in width, a grid takes images of one size."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    return [_placed([image], (width, height), [(width - image.width) // 2]) for image in images]


def _in_a_row(images: Sequence[Image.Image], gap: int) -> Image.Image:
    lefts, right = [], 0
    for image in images:
        lefts.append(right)
        right += image.width + gap
    row = _placed(images, (right - gap, max(image.height for image in images)), lefts)
    for left in lefts[1:]:  # images may be as white as the gap
        x = left - gap // 2
        ImageDraw.Draw(row).line([(x, 0), (x, row.height)], fill="lightgray")
    return row


def _placed(images: Sequence[Image.Image], size: tuple[int, int], lefts: Sequence[int]) -> Image.Image:
    canvas = Image.new("RGB", size, "white")
    for image, left in zip(images, lefts, strict=True):
        canvas.paste(image, (left, 0))
    return canvas
