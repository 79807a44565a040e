"""SIGTERM and Ctrl-C as a wish to stop after the current step, not as an interruption."""

import logging
import signal
import threading


logger = logging.getLogger(__name__)


class StopSignals:
    """A context in which SIGTERM and SIGINT are noted in `received` instead of ending the process; a repeated one does
    nothing more, so a checkpoint that is being written is finished."""

    def __init__(self):
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def _note(self, number: int, frame) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def ignore_in_worker(worker: int = 0) -> None:
    """For data-loading workers: a signal to the process group is the training process's to answer."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
