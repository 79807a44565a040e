"""What the logs of a study's launches say: why one failed, and how far a training is."""

import json
import re
import signal
import time
from pathlib import Path
from typing import IO


def begin_attempt(log: IO[bytes], command: str) -> int:
    """Heads what a launch is about to write at the end of a log; returns where that begins, in bytes."""
    log.seek(0, 2)
    log.write(f"### {time.strftime('%Y-%m-%d %H:%M:%S %z')} {command}\n".encode())
    log.flush()
    return log.tell()


def reason_of(log: Path, status: int, start: int = 0) -> tuple[str, bool]:
    """Why a launch failed, by its log.

    Args:
        start: where the launch's own part of the log begins, in bytes.

    Returns:
        One sentence, and whether it is a script's own about its settings, so that another try is in vain.
    """
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if said:
        return said[-1], "no space left" not in said[-1]
    # The launcher adds a traceback of its own, which says nothing.
    ours = [line for line in lines if line and "CalledProcessError" not in line]
    raised = [line for line in ours if re.match(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b.*", line)]
    last = (raised or ours or ["nothing was printed"])[-1]
    if status < 0:
        last = f"ended by {signal.Signals(-status).name}; last: {last}"
    return f"{last[:300]} (status {status}, log: {log})", False


def last_step(log: Path) -> int:
    """The last step in a training's log.jsonl; 0 where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut
            continue
    return 0
