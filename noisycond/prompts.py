"""Prompts to draw images from: text files, tables, COCO captions, columns of datasets, and those of the digits.

Letters: N prompts.
"""

import csv
import errno
import hashlib
import io
import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from noisycond import sampling
from noisycond.data.digit_captions import digit_prompts
from noisycond.data.sources import HuggingFaceDataset
from noisycond.errors import InputError, closest, in_one_line, require


COLUMNS = ("text", "caption", "prompt")  # where no column is asked for, the first of these that there is
LABEL_COLUMN = "label"
TABLES = (".jsonl", ".csv", ".json")
LISTS_OF_A_FOLDER = ("metadata.jsonl", "metadata.csv")  # as `imagefolder` of datasets reads them
NOWHERE = "there is no such file or folder (prompts themselves go into a text file, one per line)."
DIGITS = {"digits": "unseen", "digits:seen": "seen", "digits:unseen": "unseen"}


@dataclass(frozen=True)
class Prompts:
    """Texts to draw images from.

    Attributes:
        name: as the user named them. texts: N, none of them empty.
        labels [N]: int64, the class that each text asks for; None where that is not known.
        class_names: what the labels mean, or None.
    """

    name: str
    texts: list[str]
    labels: np.ndarray | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of texts, labels and class names, in their order, wherever they lie."""
        labels = None if self.labels is None else self.labels.tolist()
        return hashlib.sha256(json.dumps([self.texts, labels, self.class_names]).encode()).hexdigest()

    def places(self, count: int, how: str = "balanced", seed: int = 0) -> list[int]:
        """Which prompt each of so many images gets: `balanced` takes them in turn, `random` draws them uniformly."""
        if how == "balanced":
            return sampling.balanced_labels(count, len(self)).tolist()
        return sampling.random_labels(count, len(self), seed).tolist()

    def settings(self) -> dict:
        """What a report says of them, as JSON values."""
        return {"name": self.name, "prompts": len(self), "fingerprint": self.fingerprint}


def open_prompts(option: str, name: str, split: str | None = None, column: str | None = None) -> Prompts:
    """Prompts by name. White space at either end of a text is dropped.

    Args:
        option: the flag, for messages; those of split and column are named after it (`--prompts`, `--prompt_split`).
        name: `digits:seen` or `digits:unseen` (which is what `digits` is); a text file with a prompt per line; a
            table (.jsonl, .csv, or .json with a list of objects); captions as COCO has them (.json with
            `annotations`), of which each image's first by annotation id is taken, in the order of the image ids; a
            folder with a `metadata.jsonl` (or `.csv`); or a dataset's Hub id or folder.
        split: of a dataset; the default is `validation`.
        column: of a table or dataset; the default is the first of `text`, `caption` and `prompt`. Of a column that
            holds several texts per example the first is taken.

    Returns:
        The prompts, with labels where a table or dataset has a column `label` of whole numbers or of class labels.

    Raises:
        InputError: there is no such thing, no such column or split, no prompt, or an empty one.
    """
    path, said, stem = Path(name), f"{option} {name}", option.removesuffix("s")
    file, is_saved_dataset = _look_for(option, name)
    has_splits = name not in DIGITS and file is None and not is_saved_dataset
    require(
        split is None or has_splits,
        f"{stem}_split {split} has no effect on {said}: it has no splits; leave it off.",
    )
    if name in DIGITS:
        require(column is None, f"{stem}_column {column} has no effect on {said}: they are no table; leave it off.")
        texts, labels = zip(*digit_prompts(DIGITS[name]), strict=True)
        return Prompts(name, list(texts), np.array(labels, dtype=np.int64), [str(digit) for digit in range(10)])
    if name.startswith("digits:"):
        raise InputError(f"{said}: the prompts of digits are {' and '.join(list(DIGITS)[1:])}{closest(name, DIGITS)}.")
    require(
        path.exists() or not (name.startswith((".", "/", "~")) or path.suffix in (".txt", *TABLES) or " " in name),
        f"{said}: {NOWHERE}",
    )
    if file is not None:
        return _of_file(option, name, file, column)
    return _of_dataset(option, name, split, column)


def _look_for(option: str, name: str) -> tuple[Path | None, bool]:
    """The file of prompts that a name stands for, if it is one, and whether it is a dataset saved to disk."""
    path = Path(name)
    candidates = [path, *(path / each for each in LISTS_OF_A_FOLDER)]
    try:
        file = next((each for each in candidates if each.is_file()), None)
        return file, (path / "dataset_info.json").is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # as a prompt may be
            raise InputError(f"{option} {name[:60]}…: {NOWHERE}") from error
        raise InputError(f"{option} {name}: it cannot be looked at ({in_one_line(error)}).") from error


def _of_file(option: str, name: str, path: Path, column: str | None) -> Prompts:
    said, suffix = f"{option} {name}", path.suffix.lower()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{said}: {path.name} cannot be read as text in UTF-8 ({in_one_line(error)}).") from error
    require(text.strip(), f"{said}: {path.name} is empty.")
    if suffix not in TABLES:
        no_table = f"{option.removesuffix('s')}_column {column} has no effect on {said}: each line is a prompt"
        require(column is None, f"{no_table}; leave it off, or name a table ({', '.join(TABLES)}).")
        return Prompts(name, _checked(said, "line", text.removesuffix("\n").split("\n")))
    rows = _rows(said, path.name, text, suffix)
    if isinstance(rows, dict):
        require(
            column in (None, "caption"),
            f"{option.removesuffix('s')}_column {column} has no effect on {said}: COCO's captions stand in `caption`.",
        )
        return Prompts(name, _coco_captions(said, rows))
    require(rows, f"{said}: {path.name} is empty.")
    chosen = _choose_column(option, name, column, list(dict.fromkeys(key for row in rows for key in row)))
    texts = _checked(said, "entry", [row.get(chosen) for row in rows])
    return Prompts(name, texts, _whole_numbers(said, "entry", [row.get(LABEL_COLUMN) for row in rows]))


def _rows(said: str, file: str, text: str, suffix: str) -> list[dict] | dict:
    """The rows of a table, or the whole of COCO's captions."""
    try:
        if suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
            if any(None in row for row in rows):  # where DictReader puts what has no heading
                raise ValueError("a row has more cells than there are columns")
        elif suffix == ".jsonl":
            rows = _lines_of_json(text)
        else:
            rows = json.loads(text)
    except RecursionError as error:
        raise InputError(f"{said}: {file} is damaged (it is nested too deeply).") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"{said}: {file} is damaged ({in_one_line(error)}).") from error
    if isinstance(rows, dict) and isinstance(rows.get("annotations"), list):
        return rows
    require(
        isinstance(rows, list) and all(isinstance(row, dict) for row in rows),
        f"{said}: expected a list of objects with a text each, or the captions of COCO (annotations with image_id, id "
        "and caption).",
    )
    return rows


def _lines_of_json(text: str) -> list:
    """What the lines hold; ValueError names the line that is not JSON."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:  # it counts the lines of its own text, which is one
            raise ValueError(f"line {number}: {error.msg}, column {error.colno}") from error
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        except RecursionError as error:
            raise ValueError(f"line {number}: it is nested too deeply") from error
    return rows


def _coco_captions(said: str, content: dict) -> list[str]:
    first: dict[int, tuple[int, str]] = {}
    try:
        for entry in content["annotations"]:
            image, number = entry["image_id"], entry["id"]
            if image not in first or number < first[image][0]:
                first[image] = number, entry["caption"]
        images = sorted(first)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{said}: expected the captions of COCO, but an annotation has no image_id, id and caption "
            f"({in_one_line(error)})."
        ) from error
    require(images, f"{said}: it has no annotations.")
    return _checked(said, "the first caption of image", [first[image][1] for image in images], images)


def _of_dataset(option: str, name: str, split: str | None, column: str | None) -> Prompts:
    import datasets

    is_one = (Path(name) / "dataset_info.json").is_file()
    split_flag = f"{option.removesuffix('s')}_split"
    asked = split or ("train" if is_one else "validation")
    try:
        dataset = HuggingFaceDataset._open(datasets, name, None, asked, None)
    except InputError as error:
        sentence = str(error).replace("--dataset_split", split_flag).replace("--dataset_name", option)
        hint = "" if split is not None or split_flag in sentence else f"; name a split with {split_flag}"
        raise InputError(sentence.removesuffix(".") + hint + ".") from error
    chosen = _choose_column(option, name, column, dataset.column_names)
    texts = _checked(f"{option} {name}", "example", list(dataset.select_columns([chosen])[:][chosen]))
    labels, class_names = None, None
    if LABEL_COLUMN in dataset.column_names:
        values = list(dataset.select_columns([LABEL_COLUMN])[:][LABEL_COLUMN])
        labels = _whole_numbers(f"{option} {name}", "example", values)
        names = getattr(dataset.features[LABEL_COLUMN], "names", None)
        class_names = None if labels is None or names is None else list(names)
    return Prompts(name, texts, labels, class_names)


def _choose_column(option: str, name: str, column: str | None, names: Sequence[str]) -> str:
    flag, there = f"{option.removesuffix('s')}_column", ", ".join(map(str, names))
    if column is not None:
        require(column in names, f"{flag} {column}: {name} has the columns {there}{closest(column, names)}.")
        return column
    found = next((each for each in COLUMNS if each in names), None)
    require(
        found is not None,
        f"{option} {name}: there is no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}, but {there}; name one with "
        f"{flag}.",
    )
    return found


def _checked(said: str, unit: str, values: Sequence, numbers: Sequence | None = None) -> list[str]:
    """The texts without white space at their ends; messages number them from 1, or by these numbers."""
    texts = []
    for place, value in enumerate(values):
        where = f"{said}: {unit} {place + 1 if numbers is None else numbers[place]}"
        if isinstance(value, (list, tuple)):
            value = value[0] if value else ""
        require(value is None or isinstance(value, str), f"{where} holds no text, but {reprlib.repr(value)}.")
        text = (value or "").strip()
        require(text, f"{where} is empty; every image needs a prompt.")
        require(
            not any("\ud800" <= letter <= "\udfff" for letter in text),
            f"{where} holds half of a surrogate pair, which is no letter; write the letter itself, in UTF-8.",
        )
        texts.append(text)
    require(texts, f"{said}: there is no prompt.")
    return texts


def _whole_numbers(said: str, unit: str, values: Sequence) -> np.ndarray | None:
    """Labels int64 [N] where each value is one, as a number or, in a CSV file, as its digits; else None. Messages
    number them from 1."""
    most = np.iinfo(np.int64).max

    def number(digits: str) -> int:
        # Python refuses to read thousands of digits; int64 has 19.
        return int(digits) if len(digits.strip().lstrip("0")) < 20 else most + 1

    read = [number(value) if isinstance(value, str) and value.strip().isdecimal() else value for value in values]
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in read):
        return None
    for place, value in enumerate(read, start=1):
        require(value <= most, f"{said}: {unit} {place} has a label beyond {most}; labels are numbers of classes.")
    return np.array(read, dtype=np.int64)
