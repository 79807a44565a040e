"""Control images to draw after, each with the class or caption of the same example: of digits, and of datasets with a
column of control images. The twin of prompts.py.

Letters: M examples, K classes, R the side of an image.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from noisycond import sampling
from noisycond.data.controlled import Controls
from noisycond.data.controls import CONTROL_ANNOTATORS
from noisycond.data.images import UNREADABLE, Transform
from noisycond.data.sources import Digits, HuggingFaceDataset, ImageSource
from noisycond.errors import InputError, in_one_line, require
from noisycond.prompts import LABEL_COLUMN, Prompts


CONTROL_COLUMN, CAPTION_COLUMN = "canny", "caption"
CONTROL_KEY = "control_file_name"  # of a metadata.jsonl beside drawn images; so `datasets` reads them as images too


@dataclass(frozen=True)
class ControlSet:
    """Examples whose control images are drawn after.

    Attributes:
        option, name, split: as the user named them; no split of what has none.
        source: the examples. column: of their control images.
        annotator: what made the control images, one of `CONTROL_ANNOTATORS`, or None where that is not known.
        scale: what the pipeline multiplies by what it reads from them.
        captions: M texts, of text-to-image pipelines; None of class-conditional ones.
    """

    option: str
    name: str
    split: str | None
    source: ImageSource
    column: str = CONTROL_COLUMN
    annotator: str | None = CONTROL_COLUMN
    scale: float = 1.0
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def of_column(self, column: str, annotator: str | None = None) -> "ControlSet":
        """The same examples with the control images of a column.

        Args:
            annotator: what made them, where that is known; a column that is called as an annotator tells it.

        Raises:
            InputError: there is no such column, or it holds no images.
        """
        known = annotator or (column if column in CONTROL_ANNOTATORS else None)
        chosen = replace(self, column=column, annotator=known)
        self.source.check_control(column)
        return chosen

    def with_captions(self, column: str | None = None, flag: str = "--controls_caption_column") -> "ControlSet":
        """The same examples with their captions, of those of one image the first; `flag` names the column in messages.

        Raises:
            InputError: there is no such column, or an example has no caption.
        """
        found = self.source.captions(column or CAPTION_COLUMN, flag)
        texts = [next((text for text in captions if text), "") for captions in found]
        empty = next((place for place, text in enumerate(texts) if not text), None)
        require(
            empty is None,
            f"{flag} {column or CAPTION_COLUMN}: {self.source.name(empty or 0)} has no caption, from which its image "
            "is to be drawn.",
        )
        return replace(self, captions=tuple(texts))

    @property
    def prompts(self) -> Prompts | None:
        """The captions as prompts, with the labels where the examples have classes; None without captions."""
        if self.captions is None:
            return None
        names = self.source.class_names
        return Prompts(self.name, list(self.captions), self.source.labels if names else None, names or None)

    def labels(self, class_names: list[str] | None, num_classes: int, pipeline: str) -> np.ndarray:
        """The class of each example as a pipeline numbers it, int64 [M]: by name where both have the names.

        Raises:
            InputError: the examples have no classes, or others than the pipeline.
        """
        names, labels, said = self.source.class_names, self.source.labels, f"{self.option} {self.name}"
        require(
            names,
            f"{said}: its examples have no classes (a column {LABEL_COLUMN!r}), but --pipeline {pipeline} draws from "
            "class labels.",
        )
        if class_names is None or names == class_names:
            highest = int(labels.max())
            require(
                highest < num_classes,
                f"{said}: an example has the label {highest}, but --pipeline {pipeline} has {num_classes} classes.",
            )
            return labels
        places = {name: place for place, name in enumerate(class_names)}
        unknown = next((name for name in names if name not in places), None)
        require(unknown is None, f"{said}: --pipeline {pipeline} has no class {unknown!r}, which its examples have.")
        return np.array([places[name] for name in names], dtype=np.int64)[labels]

    def places(self, count: int, how: str = "balanced", seed: int = 0) -> list[int]:
        """Which example each of so many images is drawn after: `balanced` takes them in turn, `random` draws them
        uniformly."""
        if how == "balanced":
            return sampling.balanced_labels(count, len(self)).tolist()
        return sampling.random_labels(count, len(self), seed).tolist()

    def check(self, side: int) -> None:
        """Raises InputError, where a control of the first examples cannot be drawn after at R pixels a side."""
        self._reader(side)

    def control(self, place: int, side: int) -> Image.Image:
        """The control image of an example, RGB, [R, R]: the shorter side to R, then the square in the centre, as its
        image.

        Raises:
            InputError: it cannot be read, is not of its image's size, or see [`Controls`]; names it.
        """
        reader = self._reader(side)
        try:
            return to_pil_image((reader.read(place, 0) * 255).round().byte())
        except UNREADABLE as error:
            raise self._unreadable(place, "control image", error) from error

    def target(self, place: int, side: int) -> Image.Image:
        """The image of an example, RGB, [R, R], cut as its control image.

        Raises:
            InputError: it cannot be read; names it.
        """
        try:
            pixels = Transform(side, center_crop=True).pixels(self.source.read(place, side), place, 0)
        except UNREADABLE as error:
            raise self._unreadable(place, "image", error) from error
        return to_pil_image(((pixels + 1) * 127.5).round().byte())

    def _unreadable(self, place: int, what: str, error: Exception) -> InputError:
        return InputError(
            f"{self.option} {self.name}: the {what} of {self.source.name(place)} cannot be read "
            f"({in_one_line(error)}); remove or replace it."
        )

    def _reader(self, side: int) -> Controls:
        if side not in self._readers:
            transform = Transform(side, center_crop=True)
            self._readers[side] = Controls(self.source, self.column, transform)
        return self._readers[side]

    @cached_property
    def _readers(self) -> dict[int, Controls]:
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the examples, their captions where they are drawn from, and the column."""
        about = [self.source.fingerprint, self.source.version, self.column, self.source.class_names, self.captions]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def settings(self) -> dict:
        """What a report says of them, as JSON values."""
        return {
            "name": self.name,
            **({} if self.split is None else {"split": self.split}),
            "examples": len(self),
            "column": self.column,
            "annotator": self.annotator,
            "conditioning_scale": self.scale,
            "fingerprint": self.fingerprint,
        }


def open_controls(option: str, name: str, split: str | None = None, scale: float = 1.0) -> ControlSet:
    """Examples by name.

    Args:
        option: the flag, for messages; that of the split is named after it (`--controls_split`).
        name: `digits`; a folder that `datasets` wrote or opens, as prepare_dataset.py leaves it; or a Hub id.
        split: of digits (by default `test`) or of a dataset with splits (by default `validation`).

    Raises:
        InputError: there is no such thing, or it holds no example.
    """
    flag, path = f"{option}_split", Path(name)
    try:
        if name == "digits":
            split = split or "test"
            return ControlSet(option, name, split, Digits(split), scale=scale)
        require(
            path.exists() or not name.startswith((".", "/", "~")),
            f"{option} {name}: there is no such folder; name `digits`, a folder that prepare_dataset.py wrote, or a "
            "dataset's Hub id.",
        )
        is_one = (path / "dataset_info.json").is_file()
        source = _dataset(name, split or ("train" if is_one else "validation"))
    except InputError as error:
        sentence = str(error).replace("--dataset_split", flag).replace("--dataset_name", option)
        hint = "" if split is not None or flag in sentence or not sentence.startswith(f"{option} {name}") else flag
        raise InputError(sentence.removesuffix(".") + (f"; name a split with {hint}." if hint else ".")) from error
    require(len(source), f"{option} {name}: it holds no example.")
    return ControlSet(option, name, None if is_one else split or "validation", source, scale=scale)


def _dataset(name: str, split: str) -> HuggingFaceDataset:
    import datasets

    columns: Sequence[str] = HuggingFaceDataset._open(datasets, name, None, split, None).column_names
    return HuggingFaceDataset(name, None, split, "image", LABEL_COLUMN if LABEL_COLUMN in columns else None, None)
