"""A prepared dataset: images of one size beside their annotations, made on any number of processes, resumable.

FOLDER                             a dataset of `datasets` (`load_from_disk`), with preparation.json and README.md
FOLDER.preparing                   beside it until that is whole:
    preparation.json               what was asked for, of which data and models
    chunk-NNNNNN.arrow, .json      examples; a hash of them, and which images were left out
    dataset                        all chunks together, renamed to FOLDER at last
"""

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from noisycond.data.annotation import Annotate
from noisycond.data.captions import NO_CAPTION
from noisycond.data.images import UNREADABLE, BadImages, Transform
from noisycond.data.sources import ImageSource
from noisycond.errors import InputError, in_one_line, require, writing
from noisycond.processes import on_all, on_main
from noisycond.run_folder import differences, write_atomically


logger = logging.getLogger(__name__)
SETTINGS, CARD, LOCK = "preparation.json", "README.md", "lock"
CHUNK = 64  # images that a killed run makes again at most, on each process
SHARD_BYTES = 500_000_000  # as `datasets` divides what it saves
# Flags in which a run may differ from the one it continues.
MAY_CHANGE = {
    "recipe",
    "output_dir",
    "cache_dir",
    "dataset_name",  # what these two name is compared by content
    "train_data_dir",
    "num_classes",  # the classes themselves are compared
    "sam_model",  # their weights are compared
    "caption_model",
    "sam_points_per_batch",  # memory alone
    "max_bad_images",
    "cpu_threads_per_process",
}


@dataclass
class Preparation:
    """What is to be made.

    Attributes:
        transform: makes the images square. annotators: an [`noisycond.data.annotation.Annotate`] for each column.
        batch_size: images that are annotated at once. settings: what decides the result, as JSON values: `arguments`,
            and `facts` of data and models. card: the text of README.md, from the number of examples and the ids of
            the images that cannot be read or have no caption.
    """

    source: ImageSource
    transform: Transform
    annotators: Mapping[str, Annotate]
    batch_size: int
    settings: dict
    card: Callable[[int, Sequence[str]], str]

    def chunks(self) -> list[range]:
        """The indices of the examples, by chunk: whole batches, so that what shares one does not depend on the number
        of processes."""
        size = self.batch_size * max(1, CHUNK // self.batch_size)
        return [range(first, min(first + size, len(self.source))) for first in range(0, len(self.source), size)]


def prepare(asked: Preparation, folder: Path, bad_images: BadImages, accelerator: Accelerator) -> int:
    """Makes the dataset, or what an earlier run left of it to make; a finished one is left as it is.

    The main process returns last: it puts the chunks together while the others have nothing left to do.

    Returns:
        How many images were annotated now, on all processes.

    Raises:
        InputError: the folder holds something else, or a dataset prepared with other settings; too many images cannot
            be read or have no caption; it cannot be written there; or another run is at work on it.
    """
    folder = Path(os.path.abspath(folder))
    making, chunks = folder.with_name(f"{folder.name}.preparing"), asked.chunks()
    with ExitStack() as held:
        if on_main(accelerator, lambda: _claim(folder, making, asked.settings, held)):
            return 0
        missing, left_out = on_main(accelerator, lambda: _look_around(making, len(chunks)))
        bad_images.add(left_out, quiet=not accelerator.is_main_process)
        left = sum(len(chunks[number]) for number in missing)
        with tqdm(
            total=len(asked.source),
            initial=len(asked.source) - left,
            desc="annotating",
            unit="image",
            disable=not accelerator.is_main_process,
        ) as bar:
            # In rounds of a chunk for each process: what stops one stops all, and none waits long for another.
            for first in range(0, len(missing), accelerator.num_processes):
                numbers = missing[first : first + accelerator.num_processes]
                _round(asked, making, numbers, bad_images, accelerator, bar)
                left -= sum(len(chunks[number]) for number in numbers)
                bar.update(len(asked.source) - left - bar.n)
        if accelerator.is_main_process:
            _finish(asked, folder, making)
    return sum(len(chunks[number]) for number in missing)


def _round(asked: Preparation, making: Path, numbers: Sequence[int], bad_images: BadImages, accelerator, bar) -> None:
    """Each process makes one of these chunks, as far as they go."""
    unreadable: list[str] = []

    def make() -> None:
        if accelerator.process_index < len(numbers):
            unreadable.extend(_make(asked, making, numbers[accelerator.process_index], bar))

    on_all(accelerator, make)
    bad_images.add(gather_object(unreadable), quiet=not accelerator.is_main_process)


def _where(folder: Path) -> str:
    return f"--output_dir {folder}"


def _claim(folder: Path, making: Path, settings: dict, held: ExitStack) -> bool:
    """Takes the folder for this run; whether it is finished already."""
    settings = json.loads(json.dumps(settings))  # as an earlier run's are read back
    where = _where(folder)
    # What a run may leave of its own before it has written its settings.
    for place, own in ((folder, set()), (making, {LOCK, f"{SETTINGS}.part"})):
        require(not place.exists() or place.is_dir(), f"{_where(place)} is a file, not a folder.")
        if (place / SETTINGS).exists():
            _compare(place, settings)
        else:
            require(
                not place.exists() or not set(os.listdir(place)) - own,
                f"{_where(place)} holds something else than a dataset prepared here; name another folder.",
            )
    if (folder / SETTINGS).exists():
        shutil.rmtree(making, ignore_errors=True)  # by a run that was killed at the very end
        return True
    with writing(where, SETTINGS):
        making.mkdir(parents=True, exist_ok=True)
        _lock(making, where, held)
        if not (making / SETTINGS).exists():
            write_atomically(making / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return False


def _lock(making: Path, where: str, held: ExitStack) -> None:
    lock = FileLock(making / LOCK)
    try:
        held.enter_context(lock.acquire(timeout=0))
    except Timeout:
        raise InputError(
            f"{where}: another run is preparing it at this moment; wait for it, or end its processes (a launcher that "
            "was killed leaves them behind)."
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.debug("No lock %s: %s", lock.lock_file, error)


def settings_of(folder: Path) -> dict:
    """`arguments` and `facts` that a dataset was prepared with; empty of a folder that was not prepared here."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return {name: dict(settings[name]) for name in ("arguments", "facts")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"arguments": {}, "facts": {}}


def _compare(place: Path, settings: dict) -> None:
    try:
        earlier = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
        arguments, facts = dict(earlier["arguments"]), dict(earlier["facts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--output_dir {place}: {SETTINGS} is damaged ({in_one_line(error)}); remove this folder, or name another."
        ) from error
    found = differences(arguments, settings["arguments"], MAY_CHANGE)
    # What a flag names in another way than before is not told twice.
    found = found or [f"the {name} changed" for name, value in settings["facts"].items() if facts.get(name) != value]
    require(
        not found,
        f"--output_dir {place} was begun with other settings: {'; '.join(found)}. Use the settings it was begun with, "
        "remove it, or name another folder.",
    )


def _chunk(making: Path, number: int) -> Path:
    return making / f"chunk-{number:06d}.arrow"


def _told(making: Path, number: int) -> dict:
    return json.loads(_chunk(making, number).with_suffix(".json").read_text(encoding="utf-8"))


def _look_around(making: Path, count: int) -> tuple[list[int], list[str]]:
    """Which chunks are still to be made, and the names of the images that the others left out."""
    missing, left_out = [], []
    for number in range(count):
        path = _chunk(making, number)
        if path.exists() and _is_sound(making, number):
            left_out += _told(making, number)["unreadable"].values()
            continue
        missing.append(number)
        if path.exists():
            logger.warning("%s is damaged; its images are annotated again.", path)
    return missing, left_out


def _is_sound(making: Path, number: int) -> bool:
    """Whether a chunk is as it was written."""
    try:
        told = _told(making, number)
        is_whole = isinstance(told["unreadable"], dict) and isinstance(told["examples"], int)
        with _chunk(making, number).open("rb") as file:
            return is_whole and told["sha256"] == hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(asked: Preparation, making: Path, number: int, bar) -> list[str]:
    """Makes a chunk; returns the names of the images that are left out."""
    columns: dict[str, list] = {column: [] for column in features_of(asked)}
    unreadable: dict[str, str] = {}
    indices = asked.chunks()[number]
    for first in range(0, len(indices), asked.batch_size):
        batch = indices[first : first + asked.batch_size]
        unreadable |= _annotate(asked, batch, columns)
        bar.update(len(batch))
    content = _as_arrow(columns, asked)
    path = _chunk(making, number)
    told = {"unreadable": unreadable, "examples": len(columns["id"]), "sha256": hashlib.sha256(content).hexdigest()}
    with writing(_where(making), f"{path.name} (make room and run the same command again to go on)"):
        # The examples last: a chunk whose examples are there is made.
        _write(path.with_suffix(".json"), json.dumps(told).encode())
        _write(path, content)
    return list(unreadable.values())


def _annotate(asked: Preparation, indices: Sequence[int], columns: dict[str, list]) -> dict[str, str]:
    """Adds examples to the columns; returns the ids and names of those that cannot be read or have no caption."""
    images, readable, left_out = [], [], {}
    for index in indices:
        try:
            image = asked.source.read(index, asked.transform.resolution)
            images.append(asked.transform.cropped(image, index, epoch=0))
            readable.append(index)
        except UNREADABLE as error:
            left_out[_id(asked.source, index)] = f"{asked.source.name(index)} ({in_one_line(error)})"
    if not images:
        return left_out
    made = {column: annotate(images, readable) for column, annotate in asked.annotators.items()}
    for place, index in enumerate(readable):
        row = {column: annotations[place] for column, annotations in made.items()}
        if row.get("caption") == "":
            left_out[_id(asked.source, index)] = f"{asked.source.name(index)} ({NO_CAPTION})"
            continue
        row |= {"image": images[place], "label": int(asked.source.labels[index]), "id": _id(asked.source, index)}
        for column, values in columns.items():
            values.append(_png(row[column]) if isinstance(row[column], Image.Image) else row[column])
    return left_out


def _id(source: ImageSource, index: int) -> str:
    return source.id(index).encode("utf-8", "backslashreplace").decode()  # a path may be no text


def _png(image: Image.Image) -> dict:
    content = io.BytesIO()
    image.save(content, format="PNG")
    return {"bytes": content.getvalue(), "path": None}


def features_of(asked: Preparation):
    """The columns and what they hold: a `datasets.Features`."""
    from datasets import ClassLabel, Features, Value
    from datasets import Image as ImageFeature

    columns: dict = {"image": ImageFeature()}
    if asked.source.class_names:
        columns["label"] = ClassLabel(names=list(asked.source.class_names))
    for column in asked.annotators:
        columns[column] = Value("string") if column == "caption" else ImageFeature()
    return Features(columns | {"id": Value("string")})


def _as_arrow(columns: dict[str, list], asked: Preparation) -> bytes:
    import pyarrow

    table = pyarrow.table(columns, schema=features_of(asked).arrow_schema)
    content = io.BytesIO()
    with pyarrow.ipc.new_stream(content, table.schema) as stream:
        stream.write_table(table)
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Beside the name and renamed, so that a file with the name is whole, after a power cut too."""
    beside = path.with_name(f"{path.name}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _finish(asked: Preparation, folder: Path, making: Path) -> None:
    """Puts the chunks together, under the final name at last."""
    told = [_told(making, number) for number in range(len(asked.chunks()))]
    count = sum(each["examples"] for each in told)
    unreadable = {key: name for each in told for key, name in each["unreadable"].items()}
    require(count, f"none of the {len(asked.source)} images can be used: {next(iter(unreadable.values()), '')}.")
    whole = making / "dataset"
    with writing(_where(folder), "the dataset (make room and run the same command again to go on)"):
        fingerprint = hashlib.sha256("".join(each["sha256"] for each in told).encode()).hexdigest()
        _save_without_examples(asked, whole, fingerprint)
        _put_together([_chunk(making, number) for number in range(len(told))], whole)
        (whole / CARD).write_text(asked.card(count, list(unreadable)), encoding="utf-8")
        shutil.copyfile(making / SETTINGS, whole / SETTINGS)
        if folder.exists():
            folder.rmdir()  # it is empty
        whole.rename(folder)
    shutil.rmtree(making, ignore_errors=True)


def _save_without_examples(asked: Preparation, whole: Path, fingerprint: str) -> None:
    """What `datasets` writes beside the examples; takes away examples that an earlier run left."""
    from datasets import Dataset, DatasetInfo, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    features, were_disabled = features_of(asked), are_progress_bars_disabled()
    empty = Dataset.from_dict({column: [] for column in features}, features=features)
    disable_progress_bars()
    Dataset(empty.data, DatasetInfo(features=features), fingerprint=fingerprint).save_to_disk(str(whole))
    if not were_disabled:
        enable_progress_bars()
    for path in whole.glob("*.arrow"):
        path.unlink()


def _put_together(chunks: Sequence[Path], whole: Path) -> None:
    """The examples of the chunks in shards. One file is open at a time: there may be more chunks than a process may
    open."""
    shards: list[list[Path]] = [[]]
    size = 0
    for path in chunks:
        if size and size + path.stat().st_size > SHARD_BYTES:
            shards, size = [*shards, []], 0
        shards[-1].append(path)
        size += path.stat().st_size
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    with tqdm(total=len(chunks), desc="putting together", unit="chunk") as bar:
        for name, members in zip(names, shards, strict=True):
            with (whole / name).open("wb") as file:
                _join(members, file, bar)
                file.flush()
                os.fsync(file.fileno())
    state = json.loads((whole / "state.json").read_text(encoding="utf-8"))
    state["_data_files"] = [{"filename": name} for name in names]
    (whole / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")


def _join(chunks: Sequence[Path], file, bar) -> None:
    import pyarrow

    with ExitStack() as open_streams:
        joined = None
        for path in chunks:
            with pyarrow.ipc.open_stream(path.read_bytes()) as chunk:
                if joined is None:
                    joined = open_streams.enter_context(pyarrow.ipc.new_stream(file, chunk.schema))
                for batch in chunk:
                    joined.write_batch(batch)
            bar.update()
