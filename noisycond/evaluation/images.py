"""Sets of images to measure: generated folders, folders of real images, digits, batches in npz files, Hub datasets.

Letters: N images, R the side of the square images that an extractor gets.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from noisycond.data.images import UNREADABLE
from noisycond.data.sources import Digits, HuggingFaceDataset, ImageFolder, ImageSource
from noisycond.errors import InputError, in_one_line, require


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
    """Images of a folder without one sub-folder per class. Their labels come from a `metadata.jsonl`, as generate.py
    writes it, and are absent without one.

    Attributes:
        labels [N]: int64, or None. class_names: of the pipeline that drew them, or None.

    Raises:
        InputError: there is no image, a listed one is missing, or the list is damaged.
    """

    def __init__(self, option: str, root: Path):
        self.root, self.labels, self.class_names = root, None, None
        listing = root / "metadata.jsonl"
        if listing.exists():
            self.names, self.labels = _read_listing(option, listing)
        else:
            self.names = sorted(path.name for path in root.iterdir() if path.name.lower().endswith(IMG_EXTENSIONS))
        require(self.names, f"{option} {root}: there is no image; the extensions are {', '.join(IMG_EXTENSIONS)}.")
        made = root / "generation.json"
        if made.exists():
            self.class_names = json.loads(made.read_text()).get("class_names")
        digest = hashlib.sha256()
        for name in self.names:
            try:
                status = (root / name).stat()
            except FileNotFoundError:
                raise InputError(
                    f"{option} {root}: metadata.jsonl lists {name}, but there is no such file; finish the generation "
                    "by running it again."
                ) from None
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, resolution: int | None = None) -> Image.Image:
        with Image.open(self.root / self.names[index]) as image:
            return image.convert("RGB")

    def name(self, index: int) -> str:
        return str(self.root / self.names[index])


def _read_listing(option: str, listing: Path) -> tuple[list[str], np.ndarray | None]:
    try:
        rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
        names = [row["file_name"] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{option} {listing.parent}: {listing.name} is damaged ({in_one_line(error)}).") from error
    labels = [row.get("label") for row in rows]
    if any(not isinstance(label, int) for label in labels):
        return names, None
    return names, np.array(labels, dtype=np.int64)


class BatchImages(ImageSource):
    """Images in an array, uint8 [N, H, W, 3], as sample and reference batches of the ADM evaluator hold them.

    Attributes:
        labels [N]: int64, or None. class_names: None.
    """

    def __init__(self, option: str, path: Path, pixels: np.ndarray, labels: np.ndarray | None):
        require(
            pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[-1] == 3 and len(pixels) > 0,
            f"{option} {path}: arr_0 is {pixels.dtype} of shape {pixels.shape}, but must be uint8 [N, H, W, 3].",
        )
        require(
            labels is None or labels.shape == (len(pixels),),
            f"{option} {path}: arr_1 must hold a label for each of the {len(pixels)} images.",
        )
        self.path, self.pixels, self.class_names = path, pixels, None
        self.labels = None if labels is None else labels.astype(np.int64)
        digest = hashlib.sha256(np.ascontiguousarray(pixels))
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int, resolution: int | None = None) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"{self.path}, image {index}"


def open_images(option: str, name: str, split: str = "test") -> ImageSource:
    """A set of images by name.

    Args:
        option: the flag, for messages. name: `digits`; a folder, with a sub-folder per class or with images (and a
            `metadata.jsonl`) in it; a batch (.npz with `arr_0`); or a dataset's Hub id. split: of digits or of a
            dataset.

    Raises:
        InputError: there is no such thing, or no image in it.
    """
    if name == "digits":
        return Digits(split)
    path = Path(name)
    if name.endswith(".npz"):
        return open_batch(option, path)
    if path.is_dir() and not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
        here = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        flat = (path / "metadata.jsonl").exists() or any(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in here)
        if flat or not any(entry.is_dir() for entry in here):
            return ListedImages(option, path)
        return _named(option, name, "--train_data_dir", lambda: ImageFolder(name))
    require(
        path.exists() or not name.startswith((".", "/", "~")),
        f"{option} {name}: there is no such folder or file.",
    )
    return _named(
        option, name, "--dataset_name", lambda: HuggingFaceDataset(name, None, split, "image", "label", None)
    )


def _named(option: str, name: str, said: str, opening: Callable[[], ImageSource]) -> ImageSource:
    # Sources name the flags of the training scripts.
    try:
        return opening()
    except InputError as error:
        raise InputError(str(error).replace(f"{said} {name}", f"{option} {name}")) from error


def open_batch(option: str, path: Path) -> BatchImages:
    """The images of an npz file.

    Raises:
        InputError: it is no such file, or holds no images.
    """
    try:
        with np.load(path, allow_pickle=False) as batch:
            require("arr_0" in batch, f"{option} {path}: it holds no images (arr_0), but {', '.join(batch.files)}.")
            return BatchImages(option, path, batch["arr_0"], batch.get("arr_1"))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{option} {path}: not a readable npz file ({in_one_line(error)}).") from error


def read_image(option: str, source: ImageSource, index: int, resize: Resize) -> Image.Image:
    """One image of a set, RGB.

    Raises:
        InputError: it cannot be read; names it.
    """
    try:
        return resize(source.read(index, resize.resolution))
    except UNREADABLE as error:
        raise InputError(
            f"{option}: {source.name(index)} cannot be read ({in_one_line(error)}); remove or replace it."
        ) from error
