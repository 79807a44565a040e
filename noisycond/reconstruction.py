"""How well a first stage reconstructs, and how large its latents are.

Letters: B images, R the resolution.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from PIL import Image
from tqdm import tqdm

from noisycond.data.images import LabelledImages
from noisycond.first_stage import FirstStage


BATCH = 64
MOST_MEASURED = 10_000  # images are enough to know a standard deviation to a percent


def _pixels(images: LabelledImages, numbers: Iterable[int]) -> torch.Tensor:
    return torch.stack([images[number, 0, 0]["pixel_values"] for number in numbers])


def _batches(images: LabelledImages, description: str, most: int | None = None) -> Iterator[torch.Tensor]:
    """All images, or as many as `most`, spread evenly over them."""
    count = min(len(images), most or len(images))
    numbers = [position * len(images) // count for position in range(count)]
    for first in tqdm(range(0, count, BATCH), desc=description, unit="batch"):
        yield _pixels(images, numbers[first : first + BATCH])


@torch.no_grad()
def _decode_mean(first_stage: FirstStage, pixels: torch.Tensor) -> torch.Tensor:
    moments = first_stage.moments(pixels)
    mean = moments.chunk(2, dim=1)[0] if first_stage.is_variational else moments
    return first_stage.model.decode(mean).sample.float().clamp(-1.0, 1.0).cpu()


def reconstruction_psnr(first_stage: FirstStage, images: LabelledImages) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE) on [0, 1], the squared error averaged over all images; the
    latent is the posterior's mean."""
    error = count = 0.0
    for pixels in _batches(images, "reconstructing"):
        error += ((_decode_mean(first_stage, pixels) - pixels) / 2).square().double().sum().item()
        count += pixels.numel()
    return 10 * math.log10(count / error)


def latent_std(first_stage: FirstStage, images: LabelledImages) -> float:
    """Standard deviation of the unscaled latents over all components (Section 4.3.2 of arXiv:2112.10752); its inverse
    is the scaling factor. Of a KL autoencoder the posterior's variance counts too.
    At most 10,000 images are measured."""
    total = square = count = 0.0
    for pixels in _batches(images, "measuring latents", MOST_MEASURED):
        moments = first_stage.moments(pixels).double()
        if first_stage.is_variational:
            moments, log_variance = moments.chunk(2, dim=1)
            square += log_variance.clamp(-30.0, 20.0).exp().sum().item()
        total += moments.sum().item()
        square += moments.square().sum().item()
        count += moments.numel()
    return math.sqrt(square / count - (total / count) ** 2)


def reconstruct(
    first_stage: FirstStage, images: LabelledImages, numbers: Iterable[int]
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Some images and their reconstructions."""
    pixels = _pixels(images, numbers)
    return _to_pil(pixels), _to_pil(_decode_mean(first_stage, pixels))


def _to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    values = ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image) for image in values.numpy()]
