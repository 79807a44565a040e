"""A dataset encoded once: the first stage's moments in a memory-mapped file, keyed by everything they depend on.

Letters: N examples, M channels of the moments, h × w their size, V views (2 with random flips: as it is, mirrored).
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from noisycond.data.folder_index import user_cache
from noisycond.data.images import UNREADABLE, BadImages, LabelledImages
from noisycond.errors import NO_SPACE, InputError, in_one_line
from noisycond.first_stage import FirstStage
from noisycond.processes import on_all, on_main


logger = logging.getLogger(__name__)
FORMAT = 1
ENCODING_BATCH = 64
LEFT_AFTER = 7 * 24 * 3600  # seconds


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
    key = cache_key(images, first_stage)
    path = Path(folder) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    problem = on_main(accelerator, lambda: _problem_with(path, key))
    if problem is None:
        logger.info("Latents come from the cache %s.", path)
    else:
        if path.exists():
            logger.warning("The latent cache %s is not used and made anew: %s.", path, problem)
        _build(path, key, images, first_stage, accelerator)
    bad_images.add(json.loads((path / "bad_images.json").read_text()), quiet=not accelerator.is_main_process)
    return CachedLatents(images, np.load(path / "moments.npy", mmap_mode="r"), np.load(path / "readable.npy"))


def _problem_with(path: Path, key: dict) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["key"] != key:
            return "it belongs to other data or another first stage"
        for name, size in manifest["files"].items():
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _moments_shape(images: LabelledImages, first_stage: FirstStage) -> tuple[int, ...]:
    channels = first_stage.latent_channels * (2 if first_stage.is_variational else 1)
    side = images.transform.resolution // first_stage.factor
    return len(images), 1 + images.transform.random_flip, channels, side, side


def _allocate(making: Path, images: LabelledImages, first_stage: FirstStage) -> None:
    """Makes the file at its full size, so that a full disk is found before any image is encoded."""
    shape = _moments_shape(images, first_stage)
    for left in making.parent.glob("*.tmp"):  # by runs that were killed; younger ones may be at work
        if time.time() - left.stat().st_mtime > LEFT_AFTER:
            shutil.rmtree(left, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        needed, free = 4 * int(np.prod(shape)), shutil.disk_usage(making).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"it takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
        np.lib.format.open_memmap(making / "moments.npy", mode="w+", dtype=np.float32, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):
            with (making / "moments.npy").open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, (making / "moments.npy").stat().st_size)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        reason = "no space left" if error.errno in NO_SPACE else "cannot write there"
        raise InputError(
            f"--latent_cache_dir {making.parent}: {reason} ({error.strerror}); name another folder, or leave "
            "--cache_latents off."
        ) from error


def _build(path: Path, key: dict, images: LabelledImages, first_stage: FirstStage, accelerator) -> None:
    # A name of its own: two runs that start together each make one, and the first to finish is used.
    making = on_main(accelerator, lambda: path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp"))
    try:
        on_main(accelerator, lambda: _allocate(making, images, first_stage))
        on_all(accelerator, lambda: _encode_share(making, images, first_stage, accelerator))
        on_main(accelerator, lambda: _finish(making, path, key, len(images)))
    except BaseException:  # Ctrl-C too: nobody would take up what is half encoded
        if accelerator.is_main_process:
            shutil.rmtree(making, ignore_errors=True)
        raise


def _encode_share(making: Path, images: LabelledImages, first_stage: FirstStage, accelerator) -> None:
    memory = np.lib.format.open_memmap(making / "moments.npy", mode="r+")
    chunks = range(accelerator.process_index, -(-len(images) // ENCODING_BATCH), accelerator.num_processes)
    unreadable: dict[int, str] = {}
    for chunk in tqdm(chunks, desc="encoding images", unit="batch", disable=not accelerator.is_main_process):
        indices = range(chunk * ENCODING_BATCH, min((chunk + 1) * ENCODING_BATCH, len(images)))
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


def _finish(making: Path, path: Path, key: dict, size: int) -> None:
    unreadable: dict[str, str] = {}
    for part in making.glob("unreadable-*.json"):
        unreadable.update(json.loads(part.read_text()))
        part.unlink()
    readable = np.ones(size, dtype=bool)
    readable[[int(index) for index in unreadable]] = False
    if not readable.any():
        shutil.rmtree(making)
        raise InputError(f"none of the {size} images can be read, for example {next(iter(unreadable.values()))}.")
    np.save(making / "readable.npy", readable)
    (making / "bad_images.json").write_text(json.dumps([unreadable[i] for i in sorted(unreadable, key=int)]))
    files = {file.name: file.stat().st_size for file in making.iterdir()}
    # The manifest comes last: a cache without one was never finished.
    (making / "manifest.json").write_text(json.dumps({"key": key, "files": files}, indent=2))
    if _problem_with(path, key) is None:
        shutil.rmtree(making)
        return
    shutil.rmtree(path, ignore_errors=True)
    making.rename(path)
