"""What one process does for all: an action of the main process whose result, or whose error, every process sees."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from noisycond.errors import InputError


ResultT = TypeVar("ResultT")


def on_main(accelerator: Accelerator, action: Callable[[], ResultT]) -> ResultT:
    """Runs the action on the main process alone and hands its result (which must pickle) to all.

    Raises:
        InputError: on every process, where the action raised one: no process is left waiting for another.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except InputError as error:
            outcome[1] = str(error)
    result, sentence = broadcast_object_list(outcome)
    if sentence is not None:
        raise InputError(sentence)
    return result


def on_all(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Runs the action on every process and waits for all of them.

    Raises:
        InputError: on every process, where the action raised one on any.
    """
    sentence = None
    try:
        action()
    except InputError as error:
        sentence = str(error)
    sentences = [entry for entry in gather_object([sentence]) if entry is not None]
    if sentences:
        raise InputError(sentences[0])
