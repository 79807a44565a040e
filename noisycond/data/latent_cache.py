"""A dataset encoded once: the first stage's moments in a memory-mapped file, keyed by everything they depend on.

Letters: N examples, M channels of the moments, h × w their size, V views (2 with random flips: as it is, mirrored).
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from noisycond.data.folder_index import user_cache
from noisycond.data.images import UNREADABLE, BadImages, LabelledImages
from noisycond.data.memory_cache import Kind, open_cache, own_chunks
from noisycond.errors import InputError, in_one_line
from noisycond.first_stage import FirstStage


KIND = Kind("Latents", "latent", "other data or another first stage", "--latent_cache_dir", "--cache_latents")
FORMAT = 1
ENCODING_BATCH = 64


def default_cache_dir() -> Path:
    """~/.cache/noisycond/latents, or below $XDG_CACHE_HOME."""
    return user_cache("latents")


class CachedLatents(Dataset):
    """Training examples whose moments [M, h, w] come from a cache: same order, keys, flips and stand-ins for
    unreadable images as the [`LabelledImages`] it was made from."""

    def __init__(self, images: LabelledImages, moments: np.ndarray, readable: np.ndarray):
        self.images, self.memory, self.readable = images, moments, readable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int, int]) -> dict:
        return {name: value[0] for name, value in self.__getitems__([item]).items()}

    def __getitems__(self, items: list[tuple[int, int, int]]) -> dict:
        """A whole batch at once, as torch's data loader asks for it; one example at a time costs twice as much."""
        index, epoch, position = torch.tensor(items).unbind(1)
        if not self.readable[index].all():
            following = np.flatnonzero(self.readable)
            stand_in = following[np.searchsorted(following, index) % len(following)]
            index = torch.where(torch.from_numpy(self.readable)[index], index, torch.from_numpy(stand_in))
        view = self.images.transform.flipped(index, epoch).long()
        return {
            "index": index,
            "epoch": epoch,
            "position": position,
            "moments": torch.from_numpy(self.memory[index.numpy(), view.numpy()]),
            "class_labels": torch.from_numpy(self.images.source.labels)[index],
        }


def cache_key(images: LabelledImages, first_stage: FirstStage) -> dict:
    """Everything the cached moments depend on."""
    transform = images.transform
    return {
        "format": FORMAT,
        "dataset": images.source.fingerprint,
        "version": images.source.version,
        "examples": len(images),
        "first_stage": first_stage.fingerprint,
        "resolution": transform.resolution,
        "center_crop": transform.center_crop,
        "interpolation": transform.interpolation,
        "views": 1 + transform.random_flip,
    }


def open_latent_cache(
    images: LabelledImages, first_stage: FirstStage, folder: Path, accelerator, bad_images: BadImages
) -> CachedLatents:
    """Opens the cache of this dataset and first stage below `folder`, made first where none matches.

    All processes take part in the encoding, in chunks of the whole dataset, so that the content does not depend on
    their number.

    Raises:
        InputError: too many unreadable images, or no space left.
    """

    def fill(making: Path) -> None:
        _encode_share(making, images, first_stage, accelerator)

    path = open_cache(
        KIND,
        folder,
        cache_key(images, first_stage),
        {"moments": (_moments_shape(images, first_stage), np.float32)},
        fill,
        lambda making: _name_unreadable(making, len(images)),
        accelerator,
    )
    bad_images.add(json.loads((path / "bad_images.json").read_text()), quiet=not accelerator.is_main_process)
    return CachedLatents(images, np.load(path / "moments.npy", mmap_mode="r"), np.load(path / "readable.npy"))


def _moments_shape(images: LabelledImages, first_stage: FirstStage) -> tuple[int, ...]:
    channels = first_stage.latent_channels * (2 if first_stage.is_variational else 1)
    side = images.transform.resolution // first_stage.factor
    return len(images), 1 + images.transform.random_flip, channels, side, side


def _encode_share(making: Path, images: LabelledImages, first_stage: FirstStage, accelerator) -> None:
    memory = np.lib.format.open_memmap(making / "moments.npy", mode="r+")
    unreadable: dict[int, str] = {}
    for indices in own_chunks(len(images), ENCODING_BATCH, accelerator, "encoding images"):
        unreadable.update(_encode(indices, memory, images, first_stage))
    memory.flush()
    (making / f"unreadable-{accelerator.process_index}.json").write_text(json.dumps(unreadable))


def _encode(indices: range, memory: np.ndarray, images: LabelledImages, first_stage: FirstStage) -> dict[int, str]:
    """Encodes these examples into `memory` [N, V, M, h, w]; returns the names of those that could not be read."""
    views: list[list[torch.Tensor]] = [[] for _ in range(memory.shape[1])]
    done, unreadable = [], {}
    for index in indices:
        try:
            image = images.source.read(index, images.transform.resolution)
        except UNREADABLE as error:
            unreadable[index] = f"{images.source.name(index)} ({in_one_line(error)})"
            continue
        pixels = images.transform.pixels(image, index, epoch=0)
        done.append(index)
        for view, store in enumerate(views):
            store.append(pixels.flip(-1) if view else pixels)
    if done:
        for view, store in enumerate(views):
            memory[done, view] = first_stage.moments(torch.stack(store)).cpu().numpy()
    return unreadable


def _name_unreadable(making: Path, size: int) -> None:
    unreadable: dict[str, str] = {}
    for part in making.glob("unreadable-*.json"):
        unreadable.update(json.loads(part.read_text()))
        part.unlink()
    readable = np.ones(size, dtype=bool)
    readable[[int(index) for index in unreadable]] = False
    if not readable.any():
        raise InputError(f"none of the {size} images can be read, for example {next(iter(unreadable.values()))}.")
    np.save(making / "readable.npy", readable)
    (making / "bad_images.json").write_text(json.dumps([unreadable[i] for i in sorted(unreadable, key=int)]))
