"""Images to tensors: resize, crop, flip, and what happens to an image that cannot be read.

Letters: N examples in the dataset, R the resolution.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from noisycond import randomness
from noisycond.data.sources import ImageSource
from noisycond.errors import InputError, in_one_line
from noisycond.randomness import Purpose


logger = logging.getLogger(__name__)
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Transform:
    """Resizes the shorter side to R, crops a square and mirrors at random. A pure function of (seed, index, epoch)."""

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    seed: int = 0

    def __call__(self, image: Image.Image, index: int, epoch: int) -> torch.Tensor:
        """RGB image to float32 [3, R, R] in [-1, 1]."""
        pixels = self.pixels(image, index, epoch)
        return pixels.flip(-1) if self.is_flipped(index, epoch) else pixels

    def is_flipped(self, index: int, epoch: int) -> bool:
        return self.random_flip and bool(self.flipped(torch.tensor([index]), epoch))

    def flipped(self, index: torch.Tensor, epoch: torch.Tensor | int) -> torch.BoolTensor:
        """Which examples, int64 [B], are mirrored in this epoch."""
        if not self.random_flip:
            return torch.zeros(len(index), dtype=torch.bool)
        return randomness.bernoulli(self.seed, Purpose.FLIP, index, 0.5, epoch)

    def pixels(self, image: Image.Image, index: int, epoch: int) -> torch.Tensor:
        """The image without the mirror: float32 [3, R, R] in [-1, 1]."""
        square = self.cropped(image, index, epoch)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0

    def cropped(self, image: Image.Image, index: int, epoch: int) -> Image.Image:
        """The image without the mirror, R pixels square."""
        size = self.resolution
        if min(image.size) != size:
            image = F.resize(image, size, InterpolationMode(self.interpolation))
        left, top = image.width - size, image.height - size
        if self.center_crop:
            left, top = round(left / 2), round(top / 2)
        elif left or top:
            draws = randomness.uniform(self.seed, Purpose.CROP, torch.tensor([index]), (2,), epoch)[0]
            left, top = int(draws[0] * (left + 1)), int(draws[1] * (top + 1))
        return image.crop((left, top, left + size, top + size))


class BadImages:
    """Counts unreadable images and shards by name and stops the run past a limit."""

    def __init__(self, limit: int):
        self.limit, self.names = limit, set()

    def add(self, names: list[str], quiet: bool = False) -> None:
        """Raises InputError once more than `limit` different ones were bad."""
        for name in names:
            if name not in self.names and not quiet:
                logger.warning("Skipping what cannot be read: %s.", name)
        self.names.update(names)
        if len(self.names) > self.limit:
            shown = ", ".join(sorted(self.names)[:5])
            raise InputError(
                f"{len(self.names)} images or shards cannot be read, more than --max_bad_images {self.limit}: {shown}."
                " Mend or remove them, or allow more."
            )


class LabelledImages(Dataset):
    """A source as training examples; the sampler asks for (index, epoch, position in the global batch).

    An unreadable image gives way to the next readable one, which then stands under its own index: what takes its place
    is the same on every run.
    """

    def __init__(self, source: ImageSource, transform: Transform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def describe(self) -> str:
        """How many there are, for the log."""
        return f"{len(self)} examples"

    def __getitem__(self, item: tuple[int, int, int]) -> dict:
        index, epoch, position = item
        bad: list[str] = []
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            try:
                image = self.source.read(candidate, self.transform.resolution)
            except UNREADABLE as error:
                bad.append(f"{self.source.name(candidate)} ({in_one_line(error)})")
                continue
            return {
                "index": candidate,
                "epoch": epoch,
                "position": position,
                "pixel_values": self.transform(image, candidate, epoch),
                "class_labels": int(self.source.labels[candidate]),
                "bad_images": bad,
            }
        raise InputError(f"none of the {len(self)} images can be read, for example {bad[0]}.")
