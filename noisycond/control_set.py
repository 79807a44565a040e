"""Control images to draw after, each with the class or caption of the same example: of digits, and of datasets with a
column of control images. The twin of prompts.py.

Letters: M examples, K classes, R the side of an image.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from noisycond import sampling
from noisycond.data.annotation import annotated_with
from noisycond.data.controlled import Controls
from noisycond.data.controls import CANNY_HIGH, CANNY_LOW, CONTROL_ANNOTATORS
from noisycond.data.images import UNREADABLE, Transform
from noisycond.data.preparation import settings_of
from noisycond.data.sources import Digits, HuggingFaceDataset, ImageSource
from noisycond.denoisers.class_pipelines import match_classes
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
        captions: M texts, of text-to-image pipelines; None of class-conditional ones. caption_column: where the user
            said that they stand; None where nobody did.
        made_with: what decides the control images, where the examples tell it: flags of prepare_dataset.py and their
            values, and a hash of its SAM model; see [`noisycond.data.annotation.annotated_with`].
    """

    option: str
    name: str
    split: str | None
    source: ImageSource
    column: str = CONTROL_COLUMN
    annotator: str | None = CONTROL_COLUMN
    scale: float = 1.0
    captions: tuple[str, ...] | None = None
    caption_column: str | None = None
    made_with: Mapping[str, object] = field(default_factory=dict)

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
        return replace(self, captions=tuple(texts), caption_column=column)

    @property
    def prompts(self) -> Prompts | None:
        """The captions as prompts, with the labels where the examples have classes; None without captions."""
        if self.captions is None:
            return None
        names = self.source.class_names
        return Prompts(self.name, list(self.captions), self.source.labels if names else None, names or None)

    def labels(
        self,
        class_names: list[str] | None,
        num_classes: int,
        pipeline: str,
        flag: str = "--pipeline",
        naming: str | None = None,
    ) -> np.ndarray:
        """The class of each example as a pipeline numbers it, int64 [M]: by name where both have the names.

        Args:
            class_names: the pipeline's, or None; num_classes: K. pipeline, flag: for messages; naming: see
                [`noisycond.denoisers.class_pipelines.match_classes`].

        Raises:
            InputError: the examples have no classes, or some that the pipeline does not know; or it names none, and
                they have another number.
        """
        names, said = self.source.class_names, f"{self.option} {self.name}"
        require(
            names,
            f"{said}: its examples have no classes (a column {LABEL_COLUMN!r}), but {flag} {pipeline} draws from "
            "class labels.",
        )
        known_as = match_classes(names, class_names, num_classes, flag, pipeline, said, naming)
        return np.array(known_as, dtype=np.int64)[self.source.labels]

    def places(self, count: int, how: str = "balanced", seed: int = 0) -> list[int]:
        """Which example each of N images is drawn after.

        Args:
            how: `balanced` takes all in turn, and fewer images than examples spread over them evenly, image i after
                example floor(i M / N): examples are often sorted by class. `random` draws them uniformly.
        """
        if how != "balanced":
            return sampling.random_labels(count, len(self), seed).tolist()
        if count < len(self):
            return [number * len(self) // count for number in range(count)]
        return sampling.balanced_labels(count, len(self)).tolist()

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
            "made_with": dict(self.made_with),
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
            made_with = {"canny_low": CANNY_LOW, "canny_high": CANNY_HIGH}
            return ControlSet(option, name, split, Digits(split), scale=scale, made_with=made_with)
        require(
            path.exists() or not name.startswith((".", "/", "~")),
            f"{option} {name}: there is no such folder; name `digits`, a folder that prepare_dataset.py wrote, or a "
            "dataset's Hub id.",
        )
        is_one = (path / "dataset_info.json").is_file()
        source = _dataset(name, split or ("train" if is_one else "validation"))
    except InputError as error:
        sentence = str(error).replace("--dataset_split", flag).replace("--dataset_name", option)
        column = re.match(r"--(image|label)_column (.*?): (.*)", sentence, re.DOTALL)
        if column is not None:
            sentence = f"{option} {name}: the column {column[2]!r} is needed; {column[3]}"
        hint = (
            ""
            if column or split is not None or flag in sentence or not sentence.startswith(f"{option} {name}")
            else flag
        )
        raise InputError(sentence.removesuffix(".") + (f"; name a split with {hint}." if hint else ".")) from error
    require(len(source), f"{option} {name}: it holds no example.")
    made_with = annotated_with(**settings_of(path))
    split = None if is_one else split or "validation"
    return ControlSet(option, name, split, source, scale=scale, made_with=made_with)


def _dataset(name: str, split: str) -> HuggingFaceDataset:
    import datasets

    columns: Sequence[str] = HuggingFaceDataset._open(datasets, name, None, split, None).column_names
    return HuggingFaceDataset(name, None, split, "image", LABEL_COLUMN if LABEL_COLUMN in columns else None, None)
