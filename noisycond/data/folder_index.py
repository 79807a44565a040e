"""A list of the images in a folder of classes, kept in the user's cache, so that a folder of millions is walked once.

Letters: N images, K classes.
"""

import hashlib
import json
import logging
import os
import time
import uuid
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from filelock import FileLock
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from noisycond.errors import in_one_line


logger = logging.getLogger(__name__)
FORMAT = 1
KEPT_FROM = 10_000  # images; a smaller folder is walked in a moment
LOOKED_AT = 1_000  # images whose size and time are compared when an index is used
SETTLED = 2.0  # seconds; a change within the tick of a file system's clock leaves no other time behind


def user_cache(kind: str) -> Path:
    """~/.cache/noisycond/<kind>, or below $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "noisycond" / kind


class Names(Sequence):
    """N strings in one array of bytes: a tenth of the memory of a list, and none of it copied to forked workers."""

    def __init__(self, content: np.ndarray, ends: np.ndarray):
        self.content, self.ends = content, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        first = self.ends[index - 1] if index else 0
        return self.decoded(self.content[first : self.ends[index]].tobytes())

    def decoded(self, name: bytes) -> str:
        return os.fsdecode(name)


class FolderIndex:
    """The images of a folder with one sub-folder per class, in the order of `torchvision.datasets.ImageFolder`.

    Attributes:
        class_names: K names, sorted.
        names: N paths, relative to the folder. labels [N]: int64 in [0, K).
        sizes [N]: int64, bytes. times [N]: int64, modification times in ns. Both -1 of what cannot be looked at.
        folders: modification times in ns of the folder and all below it, by their relative path.
        fingerprint: a hash of names and sizes. version: a hash of the times.
    """

    ARRAYS = ("content", "ends", "labels", "sizes", "times")

    def __init__(self, class_names, names, labels, sizes, times, folders, fingerprint, version):
        self.class_names, self.names, self.labels = class_names, names, labels
        self.sizes, self.times, self.folders = sizes, times, folders
        self.fingerprint, self.version = fingerprint, version

    @classmethod
    def walk(cls, root: str) -> "FolderIndex":
        """Looks at every file. Raises FileNotFoundError where there is no class, or one without images; OSError where
        a folder cannot be listed."""
        folders = {".": os.stat(root).st_mtime_ns}
        class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not class_names:
            raise FileNotFoundError(f"there is no sub-folder in {root}.")
        # Packed as they come: as Python objects a million of them takes a gigabyte.
        content, (ends, sizes, times) = bytearray(), (array("q") for _ in range(3))
        counts = []
        by_content, by_time = hashlib.sha256(), hashlib.sha256()
        for class_name in tqdm(class_names, desc="listing images", unit="class", delay=2):
            before = len(ends)
            for folder, _, files in sorted(_walk(os.path.join(root, class_name))):
                below = os.path.relpath(folder, root)
                folders[below] = os.stat(folder).st_mtime_ns
                for file in sorted(files):
                    if not file.lower().endswith(IMG_EXTENSIONS):
                        continue
                    size, modified = size_and_time(os.path.join(folder, file))
                    name = os.fsencode(f"{below}{os.sep}{file}")
                    content += name
                    ends.append(len(content))
                    sizes.append(size)
                    times.append(modified)
                    by_content.update(name + f"\0{size}\n".encode())
                    by_time.update(f"{modified}\n".encode())
            counts.append(len(ends) - before)
            if counts[-1] == 0:
                raise FileNotFoundError(
                    f"the class {class_name} has no image; the extensions are {', '.join(IMG_EXTENSIONS)}."
                )
        ends, sizes, times = (np.frombuffer(values, dtype=np.int64) for values in (ends, sizes, times))
        names = Names(np.frombuffer(content, dtype=np.uint8), ends)
        labels = np.repeat(np.arange(len(class_names)), counts)
        return cls(class_names, names, labels, sizes, times, folders, by_content.hexdigest(), by_time.hexdigest())

    def save(self, path: Path, root: str) -> None:
        """Writes the index beside its name and renames it."""
        about = {
            "format": FORMAT,
            "root": root,
            "class_names": self.class_names,
            "folders": self.folders,
            "fingerprint": self.fingerprint,
            "version": self.version,
        }
        arrays = (self.names.content, self.names.ends, self.labels, self.sizes, self.times)
        making = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.tmp.npz")
        try:
            np.savez(making, about=np.array(json.dumps(about)), **dict(zip(self.ARRAYS, arrays, strict=True)))
            making.replace(path)
        finally:
            making.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, root: str) -> "FolderIndex":
        """Reads an index. Raises OSError, ValueError, KeyError or BadZipFile where it is missing or damaged."""
        with np.load(path) as file:
            about = json.loads(str(file["about"]))
            content, ends, labels, sizes, times = (file[name] for name in cls.ARRAYS)
        if about["format"] != FORMAT or about["root"] != root:
            raise ValueError("it belongs to another folder or version")
        facts = (about[name] for name in ("folders", "fingerprint", "version"))
        return cls(about["class_names"], Names(content, ends), labels, sizes, times, *facts)

    def holds(self, root: str, looked_at: int) -> bool:
        """Whether the folder is as it was when it was walked: no folder in it has another modification time, and none
        of a sample of files another size or time."""
        try:
            if any(os.stat(os.path.join(root, name)).st_mtime_ns != time for name, time in self.folders.items()):
                return False
            for index in np.unique(np.linspace(0, len(self.names) - 1, min(looked_at, len(self.names))).astype(int)):
                found = size_and_time(os.path.join(root, self.names[index]))
                if found != (self.sizes[index], self.times[index]):
                    return False
        except OSError:
            return False
        return True


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    def refuse(error: OSError) -> None:  # os.walk passes over a folder that it may not list
        raise error

    return os.walk(folder, onerror=refuse, followlinks=True)


def size_and_time(path: str) -> tuple[int, int]:
    """Bytes and modification time in ns; -1 and -1 of what cannot be looked at, as a dangling link: it is listed, and
    found to be a bad image when it is read."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def open_folder(
    root: str,
    cache: Path | None = None,
    kept_from: int = KEPT_FROM,
    looked_at: int = LOOKED_AT,
    keep: bool = True,
) -> FolderIndex:
    """The images of a folder, from the cache where it has not changed since it was walked.

    Added, removed and renamed files change a folder's modification time. A file that is written over in place does
    not: a sample of files is looked at, which finds it where many were written over, and may miss a few.

    Args:
        root: the folder. cache: where indexes are kept; the default is `user_cache("folders")`.
        kept_from: the least number of images for which an index is kept. looked_at: files in the sample.
        keep: whether anything may be written.

    Raises:
        OSError: see [`FolderIndex.walk`].
    """
    root = os.path.abspath(root)
    cache = cache or user_cache("folders")
    path = cache / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:20]}.npz"
    with ExitStack() as stack:
        try:
            if keep:
                cache.mkdir(parents=True, exist_ok=True)
                # The first of several processes walks, the others read what it wrote.
                stack.enter_context(FileLock(path.with_suffix(".lock")))
        except (OSError, NotImplementedError) as error:
            logger.debug("No lock in %s: %s", cache, error)
        index = _load(path, root)
        if index is not None and index.holds(root, looked_at):
            return index
        began = time.time()
        index = FolderIndex.walk(root)
        settled = max(index.folders.values()) < (began - SETTLED) * 1e9
        if keep and len(index.names) >= kept_from and settled:
            try:
                index.save(path, root)
            except OSError as error:
                logger.warning("The list of images in %s is not kept: %s.", root, in_one_line(error))
        return index


def _load(path: Path, root: str) -> FolderIndex | None:
    try:
        return FolderIndex.load(path, root)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("The list of images %s is not used and made anew: %s.", path, in_one_line(error))
        return None
