"""Sets of images to measure: generated folders, folders of real images, digits, batches in npz files, Hub datasets.

Letters: N images, R the side of the square images that an extractor gets.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from noisycond.control_set import CONTROL_KEY
from noisycond.data.images import UNREADABLE
from noisycond.data.sources import Digits, HuggingFaceDataset, ImageFolder, ImageSource
from noisycond.errors import InputError, in_one_line, require
from noisycond.evaluation.control import DrawnAfter
from noisycond.evaluation.npz import IMAGES, read_batch


HASHED = 1 << 24  # bytes of a batch at a time
DRAWN_AT = 32  # pixels, of images that have no size of their own (digits) where none is asked for


@dataclass(frozen=True)
class Resize:
    """How images come to one size: the shorter side to R, then the square in the centre.

    Attributes:
        resolution: R; None leaves images as they are. interpolation: of Pillow, as in the training scripts.
    """

    resolution: int | None = None
    interpolation: str = "lanczos"

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.resolution is None or image.size == (self.resolution, self.resolution):
            return image
        mode = InterpolationMode(self.interpolation)
        resized = F.resize(image, self.resolution, mode, antialias=True)
        return F.center_crop(resized, self.resolution)


class ListedImages(ImageSource):
    """Images of a folder without one sub-folder per class. Their texts and labels come from a `metadata.jsonl`, as
    generate.py writes it, and are absent without one.

    Attributes:
        labels [N]: int64, or None. class_names: of the pipeline or prompts that they were drawn by, or None.
        texts: N texts, or None. controls: that they were drawn after, or None.

    Raises:
        InputError: there is no image, a listed one is missing, or the list is damaged.
    """

    def __init__(self, option: str, root: Path):
        self.root, self.labels, self.class_names = root, None, None
        listing, controls = root / "metadata.jsonl", None
        if listing.exists():
            self.names, self.labels, self.texts, controls = _read_listing(option, listing)
        else:
            self.names = sorted(path.name for path in root.iterdir() if path.name.lower().endswith(IMG_EXTENSIONS))
        require(self.names, f"{option} {root}: there is no image; the extensions are {', '.join(IMG_EXTENSIONS)}.")
        made = root / "generation.json"
        if made.exists():
            self.class_names = _read_class_names(option, made)
        digest = hashlib.sha256()
        if controls is not None:
            told = _read_made(option, made, "controls") if made.exists() else None
            self.controls = _listed_controls(option, root, controls, told if isinstance(told, dict) else {})
            digest.update(json.dumps([controls, self.controls.annotator]).encode())
        for name in [*self.names, *sorted(set(controls or ()))]:
            try:
                status = (root / name).stat()
            except FileNotFoundError:
                raise InputError(
                    f"{option} {root}: metadata.jsonl lists {name}, but there is no such file; finish the generation "
                    "by running it again."
                ) from None
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        digest.update(b"" if self.texts is None else json.dumps(self.texts).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, resolution: int | None = None) -> Image.Image:
        with Image.open(self.root / self.names[index]) as image:
            return image.convert("RGB")

    def name(self, index: int) -> str:
        return str(self.root / self.names[index])


def _read_listing(
    option: str, listing: Path
) -> tuple[list[str], np.ndarray | None, list[str] | None, list[str] | None]:
    """File names, labels, texts and file names of controls, each of the latter None where an image has none."""
    try:
        rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
        names = [row["file_name"] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{option} {listing.parent}: {listing.name} is damaged ({in_one_line(error)}).") from error
    require(
        all(isinstance(name, str) for name in names),
        f"{option} {listing.parent}: {listing.name} is damaged (a file_name is no text).",
    )
    labels = [row.get("label") for row in rows]
    texts = [row.get("text") for row in rows]
    controls = [row.get(CONTROL_KEY) for row in rows]
    return (
        names,
        np.array(labels, dtype=np.int64) if all(isinstance(label, int) for label in labels) else None,
        texts if all(isinstance(text, str) for text in texts) else None,
        controls if all(isinstance(name, str) for name in controls) else None,
    )


def _listed_controls(option: str, root: Path, names: list[str], told: dict) -> DrawnAfter:
    """With what generation.json tells of them."""
    different = sorted(set(names))
    places = {name: place for place, name in enumerate(different)}

    def read(place: int) -> Image.Image:
        try:
            with Image.open(root / different[place]) as image:
                return image.convert("RGB")
        except UNREADABLE as error:
            raise InputError(
                f"{option}: {root / different[place]} cannot be read ({in_one_line(error)}); remove it, and draw the "
                "images again."
            ) from error

    made_with = told.get("made_with")
    return DrawnAfter(
        [places[name] for name in names],
        read,
        told.get("annotator"),
        made_with if isinstance(made_with, dict) else {},
    )


def _read_class_names(option: str, made: Path) -> list[str] | None:
    names = _read_made(option, made, "class_names")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    require(names is None or is_list, _damaged(option, made, "class_names is no list of names"))
    return names


def _read_made(option: str, made: Path, key: str) -> object:
    try:
        return json.loads(made.read_text(encoding="utf-8")).get(key)
    except (ValueError, AttributeError) as error:
        raise InputError(_damaged(option, made, in_one_line(error))) from error


def _damaged(option: str, made: Path, how: str) -> str:
    return (
        f"{option} {made.parent}: {made.name} is damaged ({how}); remove it to go without names of classes and "
        "what is known of controls, or draw the images again."
    )


class BatchImages(ImageSource):
    """Images in an array, as sample and reference batches of the ADM evaluator hold them; grey ones become RGB.

    Args:
        pixels [N, H, W, C]: uint8, may be memory-mapped. labels [N]: integers, or None; see
            [`noisycond.evaluation.npz.read_batch`].

    Attributes:
        labels [N]: int64, or None. class_names: None.
    """

    def __init__(self, option: str, path: Path, pixels: np.ndarray, labels: np.ndarray | None):
        self.path, self.pixels, self.class_names = path, pixels, None
        self.labels = None if labels is None else labels.astype(np.int64)
        digest = hashlib.sha256(str(pixels.shape).encode())
        at_once = max(1, HASHED // pixels[0].nbytes)
        for first in range(0, len(pixels), at_once):
            digest.update(np.ascontiguousarray(pixels[first : first + at_once]))
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int, resolution: int | None = None) -> Image.Image:
        pixels = self.pixels[index]
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")

    def name(self, index: int) -> str:
        return f"{self.path}, image {index}"


def choose_split(name: str, asked: str | None) -> str | None:
    """The split of a named set that is read: as asked for, else `test` of digits and `validation` of datasets that
    have splits; None of what has none."""
    if name == "digits":
        return asked or "test"
    path = Path(name)
    if name.endswith(".npz") or (path.is_dir() and not _is_dataset(path)):
        return None
    if path.is_dir() and not (path / "dataset_dict.json").is_file():
        return None
    return asked or "validation"


def open_images(option: str, name: str, split: str | None = None) -> ImageSource:
    """A set of images by name.

    Args:
        option: the flag, for messages. name: `digits`; a folder, with a sub-folder per class or with images (and a
            `metadata.jsonl`) in it; a batch (.npz with `arr_0`); or a dataset's Hub id or folder. split: of digits or
            of a dataset, as the user asked for it; None is the default, see [`choose_split`].

    Raises:
        InputError: there is no such thing, no image in it, or images both in it and in sub-folders.
    """
    said, path = _Said(option, name, split), Path(name)
    # To the room of the data, a dataset without splits is all `train`; what else was asked for it refuses.
    split = choose_split(name, split) or split or "train"
    if name == "digits":
        return said.of(lambda: Digits(split))
    if name.endswith(".npz"):
        return open_batch(option, path)
    if path.is_dir() and not _is_dataset(path):
        return ListedImages(option, path) if _is_flat(option, path) else said.of(lambda: ImageFolder(name))
    require(
        path.exists() or not name.startswith((".", "/", "~")),
        f"{option} {name}: there is no such folder or file.",
    )
    return said.of(lambda: HuggingFaceDataset(name, None, split, "image", "label", None))


def _is_dataset(path: Path) -> bool:
    """Whether `datasets` saved it with save_to_disk."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _is_flat(option: str, path: Path) -> bool:
    """Whether the images of a folder lie in it, and not in a sub-folder per class."""
    if (path / "metadata.jsonl").exists():
        return True
    here = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in here if entry.is_dir()]
    loose = [entry for entry in here if entry not in folders and entry.name.lower().endswith(IMG_EXTENSIONS)]
    classes = [entry for entry in folders if not loose or _holds_an_image(entry)]
    require(
        not (loose and classes),
        f"{option} {path}: there are images in it ({loose[0].name if loose else ''}) and in its sub-folders "
        f"({classes[0].name if classes else ''}); move one kind elsewhere, or list what counts in a metadata.jsonl.",
    )
    return not classes


def _holds_an_image(folder: Path) -> bool:
    walk = os.walk(folder, followlinks=True)
    return any(name.lower().endswith(IMG_EXTENSIONS) for _, _, files in walk for name in files)


# The flags that name a split in an evaluation; --train_data has none.
SPLIT_FLAGS = {
    "--reference": "--reference_split",
    "--images": "--reference_split",
    "--eval_reference": "--eval_reference_split",
}


@dataclass(frozen=True)
class _Said:
    """What the user said, put into messages of the data's room in place of the flags of the training scripts."""

    option: str
    name: str
    split: str | None

    def of(self, opening: Callable[[], ImageSource]) -> ImageSource:
        try:
            return opening()
        except InputError as error:
            raise InputError(self._translated(str(error))) from error

    def _translated(self, sentence: str) -> str:
        here = f"{self.option} {self.name}"
        match = re.match(r"--(\w+) (.*?): (.*)", sentence, re.DOTALL)
        if match is None:
            return f"{here}: {sentence}"
        flag, value, rest = match.groups()
        if flag in ("image_column", "label_column"):
            return f"{here}: the column {value!r} is needed; {rest}"
        split_flag = SPLIT_FLAGS.get(self.option)
        if flag == "dataset_split" and self.split is not None and split_flag is not None:
            return f"{split_flag} {value}: {rest}"
        if flag == "dataset_split":
            hint = "" if split_flag is None else f"; name one with {split_flag}"
            return f"{here}: there is no split {value!r}; {rest.removesuffix('.')}{hint}."
        return sentence.replace(f"--{flag} {self.name}", here)


def open_batch(option: str, path: Path) -> BatchImages:
    """The images of an npz file, mapped into memory where they are not compressed.

    Raises:
        InputError: it is no such file, or holds no images.
    """
    try:
        with np.load(path, allow_pickle=False) as batch:
            require(IMAGES in batch, f"{option} {path}: it holds no images (arr_0), but {', '.join(batch.files)}.")
            return BatchImages(option, path, *read_batch(f"{option} {path}", path, batch))
    except InputError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib raise many types over a damaged file
        raise InputError(f"{option} {path}: not a readable npz file ({in_one_line(error)}).") from error


def read_image(option: str, source: ImageSource, index: int, resize: Resize) -> Image.Image:
    """One image of a set, RGB.

    Raises:
        InputError: it cannot be read; names it.
    """
    try:
        return resize(source.read(index, resize.resolution or DRAWN_AT))
    except UNREADABLE as error:
        raise InputError(
            f"{option}: {source.name(index)} cannot be read ({in_one_line(error)}); remove or replace it."
        ) from error
