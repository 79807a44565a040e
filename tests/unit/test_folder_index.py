"""The kept list of a folder's images: what it says, when it is used, and when the folder is walked again."""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder as TorchvisionImageFolder

from noisycond.data.folder_index import FolderIndex, open_folder
from noisycond.data.sources import ImageFolder
from noisycond.errors import InputError


LONG_AGO = 1_700_000_000 * 10**9


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files in classes and sub-folders, some of which are no images."""
    root = tmp_path / "images"
    for number, name in enumerate(
        ["b/2.png", "b/1.JPEG", "b/deep/er/0.jpg", "b/deep/1.webp", "a/x.png", "a/notes.txt", "c d/ü.png", "a/-/y.bmp"]
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * number)
    for number in (3, 11, 2, 1, 7, 0, 9, 5):
        (root / "c d" / f"{number}.png").write_bytes(b"")
    (root / "stray.png").write_bytes(b"")
    age(root)
    return root


def age(root: Path) -> None:
    """Gives all folders an old modification time, as those have that nobody has touched for a while."""
    for path, _, _ in os.walk(root):
        os.utime(path, ns=(LONG_AGO, LONG_AGO))


@pytest.fixture
def stats(monkeypatch) -> list[str]:
    """The paths that are looked at with os.stat from here on."""
    seen, real = [], os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, *args, **options: seen.append(str(path)) or real(path, *args, **options)
    )
    return seen


def opened(folder: Path, **options) -> FolderIndex:
    return open_folder(str(folder), folder.parent / "cache", **{"kept_from": 0, "looked_at": 0} | options)


def kept(folder: Path) -> list[Path]:
    return list((folder.parent / "cache").glob("*.npz"))


def facts(index: FolderIndex) -> tuple:
    return index.class_names, list(index.names), index.labels.tolist(), index.fingerprint, index.version


def test_it_lists_what_torchvision_lists(folder):
    theirs = TorchvisionImageFolder(str(folder))
    index = opened(folder)
    assert [str(folder / name) for name in index.names] == [path for path, _ in theirs.samples]
    assert index.labels.tolist() == theirs.targets and index.labels.dtype == np.int64
    assert index.class_names == theirs.classes == ["a", "b", "c d"]


def test_the_fingerprint_is_that_of_names_and_sizes(folder):
    # Spelled out: latent caches and resumed runs of earlier versions rest on it.
    names, times = hashlib.sha256(), hashlib.sha256()
    for path, _ in TorchvisionImageFolder(str(folder)).samples:
        names.update(f"{Path(path).relative_to(folder)}\0{Path(path).stat().st_size}\n".encode())
        times.update(f"{Path(path).stat().st_mtime_ns}\n".encode())
    for index in (opened(folder), opened(folder)):
        assert (index.fingerprint, index.version) == (names.hexdigest(), times.hexdigest())


def test_the_second_time_no_file_is_looked_at(folder, stats):
    first = opened(folder)
    assert sum(path.endswith(".png") for path in stats) == 11
    stats.clear()
    second = opened(folder)
    assert facts(second) == facts(first) and second.labels.dtype == np.int64
    inside = [os.path.relpath(path, folder) for path in stats if path.startswith(str(folder))]
    assert sorted(inside) == sorted([".", "a", "a/-", "b", "b/deep", "b/deep/er", "c d"])


def add(folder):
    (folder / "b/deep/er/new.png").write_bytes(b"")


def remove(folder):
    (folder / "b/2.png").unlink()


def rename_a_class(folder):
    (folder / "a").rename(folder / "z")


def rename_a_file(folder):
    (folder / "b/deep/1.webp").rename(folder / "b/deep/2.webp")


def add_a_class(folder):
    (folder / "new").mkdir()
    (folder / "new/0.png").write_bytes(b"")


@pytest.mark.parametrize("change", [add, remove, rename_a_class, rename_a_file, add_a_class])
def test_a_change_is_seen(folder, change):
    first = opened(folder)
    assert kept(folder)
    change(folder)
    second = opened(folder)
    assert [str(folder / name) for name in second.names] == [
        path for path, _ in TorchvisionImageFolder(str(folder)).samples
    ]
    assert second.fingerprint != first.fingerprint


def test_files_written_over_in_place_are_seen_by_the_sample(folder):
    first = opened(folder)
    (folder / "b/deep/er/0.jpg").write_bytes(b"longer than before")
    assert opened(folder, looked_at=0).fingerprint == first.fingerprint  # the folder's own time is as it was
    assert opened(folder, looked_at=100).fingerprint != first.fingerprint


def test_a_list_of_a_folder_that_has_just_changed_is_not_kept(folder):
    (folder / "a/new.png").write_bytes(b"")
    opened(folder)
    assert not kept(folder)
    age(folder)
    opened(folder)
    assert len(kept(folder)) == 1


def test_a_small_folder_is_walked_every_time(folder):
    opened(folder, kept_from=100)
    assert not kept(folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_a_damaged_list_is_made_anew(folder, damage, caplog):
    first = opened(folder)
    path = kept(folder)[0]
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        place = content.index(b"deep/1.webp")
        content[place] ^= 1
    spoilt = {"empty": b"", "cut": content[: len(content) // 2], "flipped": content, "foreign": b"something else"}
    path.write_bytes(spoilt[damage])
    with caplog.at_level(logging.WARNING):
        assert facts(opened(folder)) == facts(first)
    assert "made anew" in caplog.text and str(path) in caplog.text
    caplog.clear()
    assert facts(opened(folder)) == facts(first) and not caplog.records


def test_a_folder_that_moved_is_walked_again(folder, stats):
    first = opened(folder)
    moved = folder.rename(folder.parent / "elsewhere")
    stats.clear()
    second = opened(moved)
    assert second.fingerprint == first.fingerprint and any(path.endswith("x.png") for path in stats)
    assert len(kept(moved)) == 2


def test_a_cache_that_cannot_be_written_is_done_without(folder):
    (folder.parent / "file").write_text("")
    index = open_folder(str(folder), folder.parent / "file" / "cache", kept_from=0)
    assert len(index.names) == 15


def test_a_link_to_nothing_is_listed_and_the_list_is_used(folder, stats):
    (folder / "b/3.png").symlink_to("nowhere.png")
    age(folder)
    first = opened(folder)
    place = list(first.names).index("b/3.png")
    assert (first.sizes[place], first.times[place]) == (-1, -1) and (first.sizes >= 0).sum() == 15
    stats.clear()
    second = opened(folder, looked_at=100)
    assert facts(second) == facts(first) and sum(path.endswith("b/3.png") for path in stats) == 1
    source = ImageFolder(str(folder))
    with pytest.raises(OSError):
        source.read(place, 8)


@pytest.mark.parametrize("where", [".", "b/deep"])
def test_a_folder_that_cannot_be_listed_is_named(folder, where, monkeypatch):
    real, closed = os.scandir, os.path.normpath(folder / where)

    def scandir(path="."):
        if os.path.normpath(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="--train_data_dir") as caught:
        ImageFolder(str(folder))
    assert "Permission denied" in str(caught.value) and closed in str(caught.value)


def test_a_list_can_be_made_without_writing(folder):
    index = opened(folder, keep=False)
    assert len(index.names) == 15 and not (folder.parent / "cache").exists()


def test_nothing_is_left_beside_the_list(folder):
    opened(folder)
    assert sorted(path.suffix for path in (folder.parent / "cache").iterdir()) in ([".lock", ".npz"], [".npz"])
