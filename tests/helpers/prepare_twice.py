"""prepare_dataset.py on two processes, killed when it has made some chunks, and again on two, to its end.

A program: `prepare_twice.py CHUNKS FOLDER WORD...`. The processes are forked from one that has imported everything,
which takes longer than all else.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

# Imported by the script as it goes.
import cv2  # noqa: F401
import datasets  # noqa: F401
import sklearn.datasets  # noqa: F401
from launching import load_script


def start(words: list[str]) -> list[int]:
    """Forks two processes that find each other as those of a launch do; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(2):
        started.append(os.fork())
        if not started[-1]:
            own = common | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in own.items()})
            code = 1
            try:
                main(words)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
    return started


def killed(started: list[int], making: Path, count: int) -> list[str]:
    """Kills the processes when there are so many chunks; returns those that they leave."""
    deadline = time.monotonic() + 120
    while len(list(making.glob("chunk-*.arrow"))) < count and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in started:
        os.kill(process, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    assert codes == [-signal.SIGKILL] * 2, codes
    return sorted(path.name for path in making.glob("chunk-*.arrow"))


if __name__ == "__main__":
    count, folder, *words = sys.argv[1:]
    words = [*words, "--output_dir", folder]
    main = load_script("prepare_dataset").main
    left = killed(start(words), Path(f"{folder}.preparing"), int(count))
    assert not Path(folder).exists()
    print("left", *left, flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in start(words)]
    sys.exit(max(map(abs, codes)))
