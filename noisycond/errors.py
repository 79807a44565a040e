"""The error for what a person can mend: a script prints it as one sentence, without a traceback."""

import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager


# What the system says when a disk, a quota or a file-size limit is reached.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# Flags that other training scripts have and these do not have, and what to do instead.
LEFT_OUT = {
    "hub_token": ": a token on a command line ends up in logs and process lists; set HF_TOKEN, or run `hf auth login`"
}


class InputError(ValueError):
    """Names the flag or file, what was wrong and what would be right."""


def require(condition: object, sentence: str) -> None:
    """Raises InputError with the sentence unless the condition holds."""
    if not condition:
        raise InputError(sentence)


def in_one_line(error: Exception) -> str:
    """What an error says, in one line, and the same every time: without the address of an object in memory."""
    text = re.sub(r" *<[^<>]* at 0x[0-9a-f]+>", "", str(error))
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def writing(where: str, what: str):
    """A context for writing files: a failure becomes an InputError that names flag and folder, what was being written,
    and the cause; "no space left" where that is what the system, torch or safetensors mean."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # torch and safetensors wrap a full disk in types of their own
        text = " ".join(str(error).split())
        full = isinstance(error, OSError) and error.errno in NO_SPACE
        # PyTorch's zip writer reports a short write without its cause.
        full = full or any(os.strerror(number).lower() in text.lower() for number in NO_SPACE)
        cause = "no space left" if full or "unexpected pos" in text else f"{type(error).__name__} ({text})"
        raise InputError(f"{where}: {cause} while writing {what}.") from error


def closest(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name: " (did you mean 'x'?)", or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def flag_hint(name: str, known: Iterable[str]) -> str:
    """What to use instead of a flag, or recipe key, that there is not: what stands in LEFT_OUT, else the nearest."""
    return LEFT_OUT.get(name.lstrip("-").replace("-", "_")) or closest(name, known)


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
