"""Features of a set of images, extracted once for all metrics: on any number of processes, resumable, kept on disk.

features.json    whose features these are; other images, weights or sizes have another folder
pooled.npy, …    float32 [N, D], filled chunk by chunk
NNNNNN.done      a chunk that is whole

Letters: N images, B images per batch, R the side of the images, D features.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from noisycond.data.sources import ImageSource
from noisycond.errors import InputError, writing
from noisycond.evaluation.features import Features
from noisycond.evaluation.images import Resize, read_image
from noisycond.processes import on_all, on_main
from noisycond.run_folder import write_atomically


CHUNK = 500  # images between two points from which an interrupted extraction goes on
ARRAYS = ("pooled", "logits", "spatial")
Extract = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]


class Pixels(Dataset):
    """Images as uint8 [3, R, R], or the sentence that says why one cannot be used."""

    def __init__(
        self, option: str, source: ImageSource, resize: Resize, size: tuple[int, int], numbers: Sequence[int]
    ):
        self.option, self.source, self.resize, self.size = option, source, resize, size
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> torch.Tensor | str:
        number = self.numbers[place]
        try:
            image = read_image(self.option, self.source, number, self.resize)
        except InputError as error:  # handed on as text: a data-loading process would bury it in a traceback
            return str(error)
        if image.size != self.size:
            return (
                f"{self.option}: images of several sizes: {self.source.name(number)} has {image.width}×{image.height} "
                f"pixels, others {self.size[0]}×{self.size[1]}; bring them to one size with --resolution."
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_batches(
    option: str,
    source: ImageSource,
    resize: Resize,
    size: tuple[int, int],
    batches: Sequence[Sequence[int]],
    workers: int = 0,
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """The numbers and the pixels, uint8 [B, 3, R, R], of each batch.

    Raises:
        InputError: an image cannot be read or has another size.
    """
    dataset = Pixels(option, source, resize, size, [number for batch in batches for number in batch])
    starts = np.cumsum([0, *map(len, batches)])
    places = [range(first, last) for first, last in zip(starts[:-1], starts[1:], strict=True)]
    # A generator of its own: the loader draws a number for its workers, and from the global one it would change what
    # a training that goes on beside it draws next.
    loader = DataLoader(
        dataset, batch_sampler=places, num_workers=workers, collate_fn=list, generator=torch.Generator()
    )
    for batch, images in zip(batches, loader, strict=True):
        sentence = next((entry for entry in images if isinstance(entry, str)), None)
        if sentence is not None:
            raise InputError(sentence)
        yield batch, torch.stack(images)


def size_of(option: str, source: ImageSource, resize: Resize) -> tuple[int, int]:
    """Width and height of the first image, which all must have."""
    return read_image(option, source, 0, resize).size


def extract_features(
    option: str,
    source: ImageSource,
    extract: Extract,
    settings: dict,
    resize: Resize,
    folder: Path,
    accelerator: Accelerator,
    *,
    wanted: Sequence[str] = ARRAYS,
    batch_size: int = 50,
    workers: int = 0,
) -> Features:
    """The features of all images of a set, memory-mapped; what was extracted before is not extracted again.

    Args:
        option: the flag that names the images, for messages.
        extract: uint8 [B, 3, R, R] to float32 (pooled [B, D], logits or None, spatial or None).
        settings: whatever else decides the features (extractor, weights), as JSON values.
        folder: where folders of features are kept; this one is named by what it depends on.
        wanted: which of the three are kept.

    Raises:
        InputError: an image cannot be read or has another size, a feature is not finite, or no space is left.
    """
    about = {
        "images": source.fingerprint,
        "version": source.version,
        "count": len(source),
        "resolution": resize.resolution,
        "interpolation": resize.interpolation,
        "batch_size": batch_size,  # changes the last bits
        "wanted": sorted(wanted),
        **settings,
    }
    text = json.dumps(about, indent=2, sort_keys=True, default=str)
    folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    size = size_of(option, source, resize)
    shapes = _shapes(extract, size, wanted)
    on_main(accelerator, lambda: _prepare(folder, text, shapes, len(source)))

    chunks = [range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK)]
    missing = on_main(accelerator, lambda: [i for i in range(len(chunks)) if not (folder / f"{i:06d}.done").exists()])
    mine = missing[accelerator.process_index :: accelerator.num_processes]

    def work() -> None:
        bar = tqdm(
            total=sum(len(chunks[i]) for i in mine),
            desc=f"features of {option}",
            unit="image",
            delay=1,
            disable=not accelerator.is_main_process or not mine,
        )
        with bar:
            for i in mine:
                batches = [chunks[i][first : first + batch_size] for first in range(0, len(chunks[i]), batch_size)]
                for numbers, pixels in read_batches(option, source, resize, size, batches, workers):
                    found = dict(zip(ARRAYS, extract(pixels), strict=True))
                    for name in shapes:
                        _check_finite(option, source, numbers, found[name])
                        _write_rows(folder / f"{name}.npy", numbers[0], found[name], shapes[name], len(source))
                    bar.update(len(numbers))
                with writing(f"--output_dir {folder}", "features"):
                    (folder / f"{i:06d}.done").touch()

    on_all(accelerator, work)
    arrays = {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in shapes}
    return Features(**{"pooled": None} | arrays, labels=_labels(source))


def extract_in_memory(
    option: str,
    source: ImageSource,
    extract: Extract,
    resize: Resize,
    wanted: Sequence[str] = ARRAYS,
    batch_size: int = 50,
    workers: int = 0,
) -> Features:
    """The features of all images of a small set; see [`extract_features`]."""
    numbers = range(len(source))
    batches = [numbers[first : first + batch_size] for first in range(0, len(source), batch_size)]
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in ARRAYS}
    size = size_of(option, source, resize)
    for batch, pixels in read_batches(option, source, resize, size, batches, workers):
        for name, rows in zip(ARRAYS, extract(pixels), strict=True):
            if name in wanted and rows is not None:
                _check_finite(option, source, batch, rows)
                parts[name].append(rows)
    arrays = {name: torch.cat(rows) if rows else None for name, rows in parts.items()}
    return Features(**arrays, labels=_labels(source))


def _labels(source: ImageSource) -> torch.Tensor | None:
    return None if source.labels is None else torch.from_numpy(np.asarray(source.labels, dtype=np.int64))


def _shapes(extract: Extract, size: tuple[int, int], wanted: Sequence[str]) -> dict[str, int]:
    found = dict(zip(ARRAYS, extract(torch.zeros(1, 3, size[1], size[0], dtype=torch.uint8)), strict=True))
    return {name: found[name].shape[1] for name in ARRAYS if name in wanted and found[name] is not None}


def _prepare(folder: Path, text: str, shapes: dict[str, int], count: int) -> None:
    with writing(f"--output_dir {folder}", "features"):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "features.json").exists():
            return
        for name, width in shapes.items():
            with (folder / f"{name}.npy").open("wb") as file:
                _write_header(file, (count, width))
                file.truncate(file.tell() + 4 * count * width)
        write_atomically(folder / "features.json", text + "\n")


def _write_header(file, shape: tuple[int, int]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_rows(path: Path, first: int, rows: torch.Tensor, width: int, count: int) -> None:
    # Through the file and not through a memory map: there a full disk would end the process with a bus error.
    data = np.ascontiguousarray(rows.numpy(), dtype=np.float32)
    with writing(f"--output_dir {path.parent}", path.name), path.open("r+b") as file:
        file.seek(path.stat().st_size - 4 * width * (count - first))
        file.write(data.tobytes())


def _check_finite(option: str, source: ImageSource, numbers: Sequence[int], rows: torch.Tensor) -> None:
    broken = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten()
    if len(broken):
        image = source.name(numbers[int(broken[0])])
        raise InputError(
            f"{option}: the features of {image} are not finite; look at it and at the extractor's weights."
        )
