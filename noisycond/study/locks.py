"""Locks on files: one process at a time does a step or writes a report, whoever else works on the folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from noisycond.errors import InputError, writing


def take(file: IO) -> bool:
    """Whether this process has the lock of an open file now; closing the file gives it back, unless a process that
    inherited it has it open too.

    Raises:
        InputError: the file system knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        folder = Path(file.name).parent
        raise InputError(
            f"{folder}: its file system has no locks ({error.strerror}), so that two processes would write into each "
            "other's files; name a folder on another one."
        ) from error
    return True


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """A context that one process at a time is in; False where another one is. The file stays: where it were removed,
    a process that opened it before would hold another lock than one that comes after.

    Raises:
        InputError: the file cannot be made, or its file system knows no locks.
    """
    with writing(str(path.parent), f"its lock {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        yield take(file)
