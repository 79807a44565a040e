"""Where labelled images come from: the digits default, image folders, and everything that `datasets` opens.

A source knows its labels without opening an image, so that label corruption and class subsets cost nothing.
"""

import hashlib
import io
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from noisycond import randomness
from noisycond.data.caption_options import CaptionDataArguments
from noisycond.data.controls import canny_edges, threshold_mask
from noisycond.data.folder_index import Names, open_folder, size_and_time
from noisycond.errors import InputError, closest, in_one_line, require
from noisycond.randomness import Purpose


NO_UTF8 = "no text in UTF-8"
SHOWN = 60  # characters of a wrong value that a message shows
DIGIT_CONTROLS = {"canny": canny_edges, "mask": threshold_mask}


class ImageSource:
    """A list of labelled images.

    Attributes:
        labels [N]: int64 in [0, K).
        class_names: K names, in the order of the labels; none where nothing says the classes, and all labels are 0.
        fingerprint: a string that tells one dataset from another, wherever it lies; a resumed run must share it.
        version: a string that also changes when files were touched; with the fingerprint it keys the latent cache.
        texts: N texts that the images were drawn from, or None. controls: what generated images were drawn after, a
            [`noisycond.evaluation.control.Controls`], or None.
    """

    labels: np.ndarray
    class_names: list[str]
    fingerprint: str
    version: str = ""
    texts: list[str] | None = None
    controls = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, resolution: int) -> Image.Image:
        """The image, RGB. `resolution` is a hint for sources that draw their images. Raises OSError, ValueError or
        SyntaxError (as Pillow does) where it cannot be decoded."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What a message calls the image."""
        raise NotImplementedError

    def id(self, index: int) -> str:
        """What tells the image from the others, wherever the dataset lies: its path within, or split/index."""
        raise NotImplementedError

    def captions(self, column: str, option: str = "--caption_column") -> list[list[str]]:
        """The captions of each image as they are stored in this column, "" where one is missing; see [`is_utf8`].
        Raises InputError, which names this option, where there is no such column or it holds no text."""
        raise InputError(f"{option} {column}: this kind of data has no captions.")

    def check_control(self, column: str, option: str = "--control_column") -> None:
        """Raises InputError, which names this option, where no control images stand in this column."""
        raise InputError(
            f"{option} {column}: this kind of data has no control images; annotate it with prepare_dataset.py, and "
            "name the folder that it writes with --dataset_name."
        )

    def control(self, column: str, index: int, resolution: int) -> Image.Image:
        """The control image, RGB, of a column that was checked; `resolution` and what is raised as for [`read`]."""
        raise NotImplementedError

    def size(self, index: int, resolution: int) -> tuple[int, int]:
        """Width and height of the image; arguments and what is raised as for [`read`]."""
        return self.read(index, resolution).size


def stored_texts(value: object) -> list[str]:
    """A stored caption (text, bytes of it, or nothing) or a list of them, as a list; "" for nothing.

    Raises:
        ValueError: it is something else.
    """
    texts = []
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"its caption is {NO_UTF8}") from None
        if not isinstance(text, (str, type(None))):
            shown = str(text) if isinstance(text, (bool, int, float)) else f"of type {type(text).__name__}"
            raise ValueError(f"its caption is {shown}, not text")
        texts.append((text or "").strip())
    return texts


def is_utf8(text: str) -> bool:
    """Whether a text can be written: not one with half of a surrogate pair, which JSON can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _texts_of_column(option: str, column: str, values: Iterable[object]) -> list[list[str]]:
    try:
        return [stored_texts(value) for value in values]
    except ValueError as error:
        raise InputError(f"{option} {column}: expected captions, each a text or a list of texts ({error}).") from error


class Digits(ImageSource):
    """The 1,797 handwritten digits of scikit-learn (Alpaydin & Kaynak, 1998): 8×8 pixels with 17 grey values, drawn
    white on black at the asked resolution by bicubic interpolation.

    Args:
        split: `train` (1,437) or `test` (360); a stratified split that no seed changes.
    """

    SPLITS = ("train", "test")

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in self.SPLITS:
            raise InputError(f"--dataset_split {split}: digits has the splits {' and '.join(self.SPLITS)}.")
        images, labels = load_digits(return_X_y=True)
        chosen = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        self.split = split
        self.positions = np.sort(chosen[self.SPLITS.index(split)])
        self.pixels = np.rint(images[self.positions].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.labels = labels[self.positions].astype(np.int64)
        self.class_names = [str(digit) for digit in range(10)]
        self.fingerprint = hashlib.sha256(self.pixels.tobytes() + self.labels.tobytes()).hexdigest()
        self._controls: dict[tuple[str, int, int], Image.Image] = {}

    def read(self, index: int, resolution: int) -> Image.Image:
        image = Image.fromarray(self.pixels[index]).resize((resolution, resolution), Image.Resampling.BICUBIC)
        return image.convert("RGB")

    def name(self, index: int) -> str:
        return f"digit {self.positions[index]}"

    def id(self, index: int) -> str:
        return f"{self.split}/{index}"

    def captions(self, column: str, option: str = "--caption_column") -> list[list[str]]:
        from noisycond.data.digit_captions import captions_of  # it needs this module

        return captions_of(self)

    def check_control(self, column: str, option: str = "--control_column") -> None:
        require(
            column in DIGIT_CONTROLS,
            f"{option} {column}: the digits have the control images {' and '.join(DIGIT_CONTROLS)}"
            f"{closest(column, list(DIGIT_CONTROLS))}.",
        )

    def control(self, column: str, index: int, resolution: int) -> Image.Image:
        # Kept: drawing 64 of them takes as long as half a step of the miniature.
        key = (column, int(index), resolution)
        if key not in self._controls:
            self._controls[key] = DIGIT_CONTROLS[column](self.read(index, resolution))
        return self._controls[key]

    def size(self, index: int, resolution: int) -> tuple[int, int]:
        return resolution, resolution


class ImageFolder(ImageSource):
    """Images in one sub-folder per class, as `torchvision.datasets.ImageFolder` reads them; `keep_index` says whether
    the list of a large one is kept in the user's cache.

    Raises:
        InputError: there is no class, a class has no image, or a folder cannot be listed.
    """

    def __init__(self, root: str, keep_index: bool = True):
        try:
            folder = open_folder(root, keep=keep_index)
        except FileNotFoundError as error:
            raise InputError(
                f"--train_data_dir {root}: {error} Expected one sub-folder of images per class."
            ) from None
        except OSError as error:
            raise InputError(f"--train_data_dir {root}: cannot be listed ({in_one_line(error)}).") from error
        self.root, self.names = Path(root), folder.names
        self.labels, self.class_names = folder.labels, folder.class_names
        self.fingerprint, self.version = folder.fingerprint, folder.version

    def read(self, index: int, resolution: int) -> Image.Image:
        with Image.open(self.name(index)) as image:
            return image.convert("RGB")

    def name(self, index: int) -> str:
        return str(self.root / self.names[index])

    def id(self, index: int) -> str:
        return self.names[index]


class MetadataFolder(ImageSource):
    """A folder of images with a `metadata.jsonl`, as the `imagefolder` of `datasets` reads it: a line per image, its
    `file_name` (relative to the folder) and more about it.

    Args:
        label_column: the key of class labels (integers or names); None for images without classes.

    Raises:
        InputError: there is no such file, or a line of it is no JSON object, names no file or has no label.
    """

    FILE = "metadata.jsonl"

    def __init__(self, root: str, label_column: str | None = None):
        self.root, self.path = Path(root), Path(root) / self.FILE
        # Packed as they come, and other columns when they are asked for: as Python objects millions of lines take
        # gigabytes.
        content, ends, labels, keys = bytearray(), array("q"), [], {}
        same: dict[object, object] = {}
        for number, row in self._rows():
            content += self._checked(row["file_name"], number)
            ends.append(len(content))
            keys |= dict.fromkeys(row)
            if label_column is not None:
                label = self._label(label_column, row.get(label_column), number)
                labels.append(same.setdefault(label, label))
        self.keys = list(keys)
        self.names = _Utf8Names(np.frombuffer(content, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))
        found = [size_and_time(self.name(index)) for index in range(len(self.names))]
        if label_column is None:
            self.labels, self.class_names = np.zeros(len(self.names), dtype=np.int64), []
        else:
            self._require_key("--label_column", label_column)
            self.labels, self.class_names = _numbered(label_column, labels, "what stands there")
        hashed = hashlib.sha256()
        for index, (size, _) in enumerate(found):
            hashed.update(f"{self.names[index]}\0{size}\0{labels[index] if labels else None}\n".encode())
        self.fingerprint = hashed.hexdigest()
        self.version = hashlib.sha256(repr([modified for _, modified in found]).encode()).hexdigest()

    def _rows(self) -> Iterator[tuple[int, dict]]:
        """The lines of the file that are not empty, with their numbers."""
        number = 0
        try:
            with self.path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    row = json.loads(line)
                    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                        raise ValueError(f"line {number} is no JSON object with a `file_name`")
                    yield number, row
        except InputError:
            raise
        except OSError as error:
            raise InputError(
                f"--train_data_dir {self.root}: its {self.FILE}, which holds the captions, cannot be read "
                f"({error.strerror})."
            ) from error
        except json.JSONDecodeError as error:
            raise InputError(f"--train_data_dir {self.path}: line {number} is no JSON ({error.msg}).") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"--train_data_dir {self.path}: {NO_UTF8} after line {number} ({error.reason})."
            ) from error
        except RecursionError as error:
            raise InputError(f"--train_data_dir {self.path}: line {number} is nested too deeply.") from error
        except ValueError as error:
            raise InputError(f"--train_data_dir {self.path}: {in_one_line(error)}.") from error

    def _checked(self, file_name: str, number: int) -> bytes:
        sentence = f"--train_data_dir {self.path}: the `file_name` in line {number}, {ascii(file_name)}, names no file"
        require("\0" not in file_name, f"{sentence}: it holds a NUL character.")
        require(is_utf8(file_name), f"{sentence}: it is {NO_UTF8} (half of a surrogate pair).")
        return file_name.encode("utf-8")

    def _label(self, column: str, label: object, number: int) -> int | str | None:
        is_label = label is None or (isinstance(label, (int, str)) and not isinstance(label, bool))
        require(
            is_label and (not isinstance(label, str) or is_utf8(label)),
            f"--label_column {column}: expected class labels (integers or names), but line {number} of {self.path} "
            f"has {_shortened(ascii(label))}.",
        )
        return label

    def _require_key(self, option: str, key: str) -> None:
        require(
            not len(self.names) or key in self.keys,
            f"{option} {key}: the lines of {self.path} have the keys {', '.join(self.keys)}{closest(key, self.keys)}.",
        )

    def read(self, index: int, resolution: int) -> Image.Image:
        with Image.open(self.name(index)) as image:
            return image.convert("RGB")

    def name(self, index: int) -> str:
        return str(self.root / self.names[index])

    def size(self, index: int, resolution: int) -> tuple[int, int]:
        with Image.open(self.name(index)) as image:
            return image.size

    def id(self, index: int) -> str:
        return self.names[index]

    def captions(self, column: str, option: str = "--caption_column") -> list[list[str]]:
        self._require_key(option, column)
        captions: list[list[str]] = []
        for number, row in self._rows():
            is_known = len(captions) < len(self.names) and row["file_name"] == self.names[len(captions)]
            require(is_known, f"--train_data_dir {self.path}: it changed while it was read.")
            try:
                captions.append(stored_texts(row.get(column)))
            except ValueError as error:
                raise InputError(
                    f"{option} {column}: expected captions, each a text or a list of texts (line {number} of "
                    f"{self.path}: {error})."
                ) from error
        require(len(captions) == len(self.names), f"--train_data_dir {self.path}: it changed while it was read.")
        return captions


class _Utf8Names(Names):
    """Names as they stand in a text file in UTF-8, whatever the encoding of the file system."""

    def decoded(self, name: bytes) -> str:
        return name.decode("utf-8")


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _numbered(column: str, values: Sequence[object], kind: object) -> tuple[np.ndarray, list[str]]:
    """Labels that are integers or names, as numbers [N] int64 of the sorted ones, and their names."""
    missing = next((place for place, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise InputError(f"--label_column {column}: example {missing} has no label; leave such examples out.")
    refused = f"--label_column {column}: expected class labels (integers or names), not {kind}."
    require(not any(isinstance(value, (list, tuple, dict, np.ndarray)) for value in values), refused)
    # An array of all values would hold each name as often, and as wide as the longest.
    places: dict[tuple[type, object], int] = {}
    numbers = (places.setdefault((type(value), value), len(places)) for value in values)
    order = np.fromiter(numbers, dtype=np.int64, count=len(values))
    distinct = np.asarray([value for _, value in places])
    require(not len(values) or (distinct.dtype.kind in "iuUS" and distinct.ndim == 1), refused)
    names, labels = np.unique(distinct, return_inverse=True)
    return labels.astype(np.int64)[order], [str(name) for name in names]


class HuggingFaceDataset(ImageSource):
    """A map-style dataset of `datasets`: a Hub id, a folder it can load, or one written by `save_to_disk`. Without
    `label_column` it has no classes."""

    def __init__(
        self, name: str, config: str | None, split: str, image_column: str, label_column: str | None, cache_dir
    ):
        import datasets

        dataset = self._open(datasets, name, config, split, cache_dir)
        self.title, self.split, self.image_column = name, split, image_column
        for option, column in (("--image_column", image_column), ("--label_column", label_column)):
            if column is not None:
                self._require_column(dataset, option, column)
        if not isinstance(dataset.features[image_column], datasets.Image):
            raise InputError(f"--image_column {image_column}: this column of {name} holds no images.")
        # Decoded here and not by `datasets`, so that a broken image can be named and skipped.
        self.dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self._views: dict = {}
        if label_column is None:
            self.labels, self.class_names = np.zeros(len(dataset), dtype=np.int64), []
        else:
            self.labels, self.class_names = self._labels(dataset, label_column)
        self.fingerprint = f"{dataset._fingerprint}/{image_column}/{label_column}"

    def _require_column(self, dataset, option: str, column: str) -> None:
        if column not in dataset.column_names:
            raise InputError(
                f"{option} {column}: the dataset {self.title} has the columns {', '.join(dataset.column_names)}"
                f"{closest(column, dataset.column_names)}."
            )

    @staticmethod
    def _open(datasets, name: str, config: str | None, split: str, cache_dir):
        try:
            if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
                dataset = datasets.load_from_disk(name)
                if isinstance(dataset, datasets.DatasetDict):
                    if split not in dataset:
                        raise InputError(f"--dataset_split {split}: {name} has the splits {', '.join(dataset)}.")
                    dataset = dataset[split]
                elif split != "train":
                    raise InputError(
                        f"--dataset_split {split}: {name} holds one dataset without splits; leave it off."
                    )
                return dataset
            return datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
        except InputError:
            raise
        except Exception as error:  # `datasets` raises a dozen unrelated types for a name it cannot open
            reason = " ".join(str(error).split())
            raise InputError(f"--dataset_name {name}: `datasets` cannot open it ({reason}).") from error

    @staticmethod
    def _labels(dataset, column: str) -> tuple[np.ndarray, list[str]]:
        feature = dataset.features[column]
        values = dataset.select_columns([column])[:][column]
        if any(isinstance(value, (list, dict)) for value in values[:1]):
            raise InputError(f"--label_column {column}: expected class labels (integers or names), not {feature}.")
        absent = {None, -1} if hasattr(feature, "names") else {None}  # -1 is how a test split without labels is stored
        missing = next((place for place, value in enumerate(values) if value in absent), None)
        if missing is not None:
            raise InputError(f"--label_column {column}: example {missing} has no label; leave such examples out.")
        if hasattr(feature, "names"):
            return np.asarray(values).astype(np.int64), list(feature.names)
        return _numbered(column, values, feature)

    def read(self, index: int, resolution: int) -> Image.Image:
        with self._opened(self.image_column, index) as image:
            return image.convert("RGB")

    def _opened(self, column: str, index: int) -> Image.Image:
        # Of the row's other columns nothing is needed, and images are long.
        entry = self._columns(column)[int(index)][column]
        if entry is None:
            raise ValueError(f"the dataset has no image here ({column})")
        return Image.open(io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"])

    def _columns(self, column: str):
        if column not in self._views:
            self._views[column] = self.dataset.select_columns([column])
        return self._views[column]

    def name(self, index: int) -> str:
        path = (self._columns(self.image_column)[int(index)][self.image_column] or {}).get("path")
        return f"{self.title}[{index}]" + (f" ({path})" if path else "")

    def size(self, index: int, resolution: int) -> tuple[int, int]:
        with self._opened(self.image_column, index) as image:
            return image.size

    def check_control(self, column: str, option: str = "--control_column") -> None:
        import datasets

        self._require_column(self.dataset, option, column)
        require(
            isinstance(self.dataset.features[column], datasets.Image),
            f"{option} {column}: this column of {self.title} holds no images.",
        )
        self.dataset = self.dataset.cast_column(column, datasets.Image(decode=False))

    def control(self, column: str, index: int, resolution: int) -> Image.Image:
        with self._opened(column, index) as image:
            return image.convert("RGB")

    def id(self, index: int) -> str:
        return f"{self.split}/{index}"

    def captions(self, column: str, option: str = "--caption_column") -> list[list[str]]:
        self._require_column(self.dataset, option, column)
        # A column of images would be read whole before its first value is refused.
        _texts_of_column(option, column, self.dataset.select_columns([column])[:1][column])
        return _texts_of_column(option, column, self.dataset.select_columns([column])[:][column])


class Subset(ImageSource):
    """Some examples of a source, with their classes numbered anew in the old order."""

    def __init__(self, source: ImageSource, kept: np.ndarray, classes: Sequence[int] | None = None):
        classes = range(len(source.class_names)) if classes is None else sorted(classes)
        renumber = np.full(len(source.class_names), -1, dtype=np.int64)
        renumber[list(classes)] = np.arange(len(classes))
        self.source, self.kept = source, kept
        self.labels = renumber[source.labels[kept]] if source.class_names else source.labels[kept]
        self.class_names = [source.class_names[label] for label in classes]
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + kept.tobytes()).hexdigest()
        self.version = source.version

    def read(self, index: int, resolution: int) -> Image.Image:
        return self.source.read(int(self.kept[index]), resolution)

    def name(self, index: int) -> str:
        return self.source.name(int(self.kept[index]))

    def size(self, index: int, resolution: int) -> tuple[int, int]:
        return self.source.size(int(self.kept[index]), resolution)

    def check_control(self, column: str, option: str = "--control_column") -> None:
        self.source.check_control(column, option)

    def control(self, column: str, index: int, resolution: int) -> Image.Image:
        return self.source.control(column, int(self.kept[index]), resolution)

    def id(self, index: int) -> str:
        return self.source.id(int(self.kept[index]))

    def captions(self, column: str, option: str = "--caption_column") -> list[list[str]]:
        captions = self.source.captions(column, option)
        return [captions[index] for index in self.kept]


def read_class_names(option: str, path: str) -> list[str]:
    """A file with a class name per line.

    Raises:
        InputError: no such file, not text, empty, or a repeated name; names this option.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {path}: not a text file in UTF-8 ({error}).") from error
    names = [line.strip() for line in lines if line.strip()]
    if len(set(names)) != len(names) or not names:
        raise InputError(f"{option} {path}: expected class names, each once; it is empty or repeats one.")
    return names


def choose_classes(class_names: list[str], class_subset: str, seed: int) -> list[int]:
    """The classes of `--class_subset`: a number to pick at random with this seed, or a file with a name per line, or
    with a class's number where no class is named by a number.

    Raises:
        InputError: no such file, an unknown or repeated class, or more classes than there are.
    """
    if class_subset.isdigit():
        count = int(class_subset)
        if not 1 <= count <= len(class_names):
            raise InputError(f"--class_subset {count}: the dataset has {len(class_names)} classes; ask for 1 to that.")
        return sorted(randomness.permutation(seed, Purpose.CLASS_SUBSET, len(class_names))[:count].tolist())
    path = Path(class_subset)
    if not path.is_file():
        raise InputError(f"--class_subset {class_subset}: expected a number of classes or a file of class names.")
    places = {name: place for place, name in enumerate(class_names)}
    if not any(name.isdecimal() for name in class_names):
        places |= {str(place): place for place in range(len(class_names))}
    chosen: dict[int, str] = {}
    for name in read_class_names("--class_subset", class_subset):
        if name not in places:
            raise InputError(f"--class_subset {path}: the dataset has no class {name!r}{closest(name, class_names)}.")
        twin = chosen.setdefault(places[name], name)
        require(twin == name, f"--class_subset {path}: {twin!r} and {name!r} are one class; list it once.")
    return sorted(chosen)


def check_number_of_classes(args, class_names: list[str]) -> None:
    """Raises InputError where `--num_classes` says another number than the dataset has."""
    count = len(class_names)
    require(
        args.num_classes in (None, count),
        f"--num_classes is {args.num_classes}, but the dataset has {count} classes; say --num_classes {count}.",
    )


def open_source(args, split: str | None = None, keep_index: bool = True) -> ImageSource:
    """The images that [`SourceArguments`] name, with the class subset and sample limit applied.

    Args:
        args: a [`noisycond.arguments.SourceArguments`]; split: another split than `args.dataset_split`.
        keep_index: see [`ImageFolder`].
    """
    source: ImageSource
    if args.train_data_dir is not None and isinstance(args, CaptionDataArguments):
        source = MetadataFolder(args.train_data_dir, args.label_column)
    elif args.train_data_dir is not None:
        source = ImageFolder(args.train_data_dir, keep_index)
    elif args.dataset_name == "digits":
        source = Digits(split or args.dataset_split)
    else:
        source = HuggingFaceDataset(
            args.dataset_name,
            args.dataset_config_name,
            split or args.dataset_split,
            args.image_column,
            args.label_column,
            args.cache_dir,
        )
    check_number_of_classes(args, source.class_names)
    if args.class_subset is not None:
        classes = choose_classes(source.class_names, args.class_subset, args.class_subset_seed)
        source = Subset(source, np.flatnonzero(np.isin(source.labels, classes)), classes)
    if args.max_train_samples is not None and args.max_train_samples < len(source):
        source = Subset(source, np.arange(args.max_train_samples))
    if len(source) == 0:
        raise InputError("the dataset is empty: no image is left.")
    return source
