"""Which example was corrupted to what, as a table."""

import csv
from pathlib import Path

import torch

from noisycond.corruption import LabelCorruption
from noisycond.data.captions import Captions
from noisycond.data.sources import ImageSource
from noisycond.errors import writing


def save_corruption_map(corruption: LabelCorruption, source: ImageSource, path: Path) -> None:
    """Writes index, true and corrupted label of every example."""
    with writing(f"--output_dir {path.parent}", path.name), path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "true", "corrupted"])
        for first in range(0, len(source), 65536):
            index = torch.arange(first, min(first + 65536, len(source)))
            labels = torch.from_numpy(source.labels[first : first + 65536])
            writer.writerows(zip(index.tolist(), labels.tolist(), corruption(labels, index).tolist(), strict=True))


def save_caption_map(captions: Captions, path: Path) -> None:
    """Writes index, true and corrupted caption of every example; of several captions, those of the first epoch."""
    with writing(f"--output_dir {path.parent}", path.name), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "true", "corrupted"])
        for first in range(0, len(captions), 65536):
            index = torch.arange(first, min(first + 65536, len(captions)))
            used = captions.use_all(index, torch.zeros_like(index))
            true = captions.true_texts(index, torch.zeros_like(index))
            writer.writerows((i, text, new.text) for i, text, new in zip(index.tolist(), true, used, strict=True))


def save_caption_map(captions: Captions, path: Path) -> None:
    """Writes index, true and corrupted caption of every example, as they are in the first epoch."""
    with writing(f"--output_dir {path.parent}", path.name), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "true", "corrupted"])
        for first in range(0, len(captions), 65536):
            index = torch.arange(first, min(first + 65536, len(captions)))
            epoch = torch.zeros_like(index)
            used = [caption.text for caption in captions.use_all(index, epoch)]
            writer.writerows(zip(index.tolist(), captions.true_texts(index, epoch), used, strict=True))
