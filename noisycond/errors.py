"""The error for what a person can mend: a script prints it as one sentence, without a traceback."""

import difflib
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable


# What the system says when a disk, a quota or a file-size limit is reached.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """Names the flag or file, what was wrong and what would be right."""


def closest(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name: " (did you mean 'x'?)", or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_main_process() -> bool:
    """Whether this is the first process of a launch; works before torch.distributed is up."""
    return int(os.environ.get("RANK", "0")) == 0


def one_sentence_errors(main: Callable) -> Callable:
    """Decorates a script's `main`: an [`InputError`] becomes its sentence on standard error, from the main process
    alone, and exit status 2; Ctrl-C before or after training becomes exit status 130."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None):
        try:
            return main(argv)
        except InputError as error:
            if is_main_process():
                print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            if is_main_process():
                print("\nInterrupted.", file=sys.stderr, flush=True)
            raise SystemExit(130) from None

    return wrapped
