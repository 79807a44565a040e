"""Tensors computed once for all of a dataset: memory-mapped files in a folder, keyed by everything they depend on.

All processes take part in the computing, in chunks of the whole dataset, so that the content does not depend on their
number. A cache is built beside its place and renamed, its manifest last: a folder with that name is whole.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from noisycond.errors import NO_SPACE, InputError
from noisycond.processes import on_all, on_main


logger = logging.getLogger(__name__)
LEFT_AFTER = 7 * 24 * 3600  # seconds


@dataclass(frozen=True)
class Kind:
    """What a cache holds, for messages.

    Attributes:
        content: `Latents`. name: `latent`. others: what else a cache of the same name could belong to.
        flag: which names the folder. switch: which asks for the cache.
    """

    content: str
    name: str
    others: str
    flag: str
    switch: str


def open_cache(
    kind: Kind,
    folder: Path,
    key: dict,
    arrays: Mapping[str, tuple[tuple[int, ...], type]],
    fill: Callable[[Path], None],
    finish: Callable[[Path], None],
    accelerator: Accelerator,
) -> Path:
    """The folder of the cache with this key below `folder`, made first where none matches.

    Args:
        key: JSON values; everything that the content depends on.
        arrays: shape and type of each `<name>.npy`.
        fill: called on every process with the folder, whose arrays it fills, each process its share.
        finish: called then on the main process, for other files.

    Raises:
        InputError: no space left, or it cannot be written there.
    """
    path = Path(folder) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    problem = on_main(accelerator, lambda: _problem_with(path, key, kind))
    if problem is None:
        logger.info("%s come from the cache %s.", kind.content, path)
        return path
    if path.exists():
        logger.warning("The %s cache %s is not used and made anew: %s.", kind.name, path, problem)
    # A name of its own: two runs that start together each make one, and the first to finish is used.
    making = on_main(accelerator, lambda: path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp"))
    try:
        on_main(accelerator, lambda: _allocate(making, arrays, kind))
        on_all(accelerator, lambda: fill(making))
        on_main(accelerator, lambda: _finish(making, path, key, kind, finish))
    except BaseException:  # Ctrl-C too: nobody would take up what is half made
        if accelerator.is_main_process:
            shutil.rmtree(making, ignore_errors=True)
        raise
    return path


def own_chunks(size: int, chunk: int, accelerator: Accelerator, desc: str) -> Iterator[range]:
    """This process's share of range(size), in chunks that are the same on any number of processes."""
    mine = range(accelerator.process_index, -(-size // chunk), accelerator.num_processes)
    for number in tqdm(mine, desc=desc, unit="batch", disable=not accelerator.is_main_process):
        yield range(number * chunk, min((number + 1) * chunk, size))


def _problem_with(path: Path, key: dict, kind: Kind) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["key"] != key:
            return f"it belongs to {kind.others}"
        for name, size in manifest["files"].items():
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _allocate(making: Path, arrays: Mapping[str, tuple[tuple[int, ...], type]], kind: Kind) -> None:
    """Makes the files at their full size, so that a full disk is found before anything is computed."""
    for left in making.parent.glob("*.tmp"):  # by runs that were killed; younger ones may be at work
        if time.time() - left.stat().st_mtime > LEFT_AFTER:
            shutil.rmtree(left, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        needed = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())
        free = shutil.disk_usage(making).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"it takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
        for name, (shape, dtype) in arrays.items():
            _allocate_array(making / f"{name}.npy", shape, dtype)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        reason = "no space left" if error.errno in NO_SPACE else "cannot write there"
        raise InputError(
            f"{kind.flag} {making.parent}: {reason} ({error.strerror}); name another folder, or leave "
            f"{kind.switch} off."
        ) from error


def _allocate_array(file: Path, shape: tuple[int, ...], dtype: type) -> None:
    np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape).flush()
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def _finish(making: Path, path: Path, key: dict, kind: Kind, finish: Callable[[Path], None]) -> None:
    finish(making)
    files = {file.name: file.stat().st_size for file in making.iterdir()}
    # The manifest comes last: a cache without one was never finished.
    (making / "manifest.json").write_text(json.dumps({"key": key, "files": files}, indent=2))
    if _problem_with(path, key, kind) is None:
        shutil.rmtree(making)
        return
    shutil.rmtree(path, ignore_errors=True)
    making.rename(path)
