"""WebDataset shards of handwritten digits, whole and damaged."""

import functools
import io
import json
from pathlib import Path

from webdataset import TarWriter

from noisycond.data.sources import Digits


@functools.cache
def png(index: int) -> bytes:
    """A training digit as a PNG of 8×8 pixels."""
    file = io.BytesIO()
    Digits("train").read(index, 8).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, sizes: list[int], first: int = 0) -> list[Path]:
    """Shards 00000.tar, 00001.tar, … with so many digits each, from this one on; keys start anew in each."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Digits("train")
    paths = []
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number:05d}.tar")
        with TarWriter(str(paths[-1])) as tar:
            for place in range(size):
                index = first
                first += 1
                label = {"cls": str(source.labels[index]).encode()}
                tar.write({"__key__": f"{place:04d}", "png": png(index), **label})
    return paths


def write_one(path: Path, samples: list[dict]) -> None:
    """A shard of these samples (extension → bytes), keys 0000, 0001, …"""
    with TarWriter(str(path)) as tar:
        for place, sample in enumerate(samples):
            tar.write({"__key__": f"{place:04d}", **sample})


def write_captioned_shards(folder: Path, sizes: list[int], first: int = 0) -> list[Path]:
    """Shards as img2dataset writes CC3M: an image, its caption in a `txt`, and in the field `caption` of a `json`,
    which has the digit too. Captions are `digit 7, number 23`: the label and which training digit it is."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Digits("train")
    paths = []
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number:05d}.tar")
        write_one(paths[-1], [captioned(source, first + place) for place in range(size)])
        first += size
    return paths


def captioned(source: Digits, index: int) -> dict:
    label = int(source.labels[index])
    text = f"digit {label}, number {index}"
    fields = {"caption": text, "label": label, "new": f"rewritten {index}"}
    return {"png": png(index), "txt": text.encode(), "json": json.dumps(fields).encode()}


def write_class_names(path: Path) -> Path:
    path.write_text("\n".join(map(str, range(10))))
    return path


def json_label(label: object) -> bytes:
    return json.dumps({"label": label}).encode()
