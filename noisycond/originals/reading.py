"""Files of original weights: read without running anything that is in them, and told apart by parameters' names."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from noisycond.errors import InputError, require


EXPECTED = (
    "expected the weights of a class-conditional LDM (model.diffusion_model.* and cond_stage_model.embedding.weight) "
    "or of a DiT (x_embedder.*, y_embedder.*, blocks.*)"
)
# What a checkpoint may keep its weights under; of several the averaged ones come first.
WRAPPERS = ("ema", "state_dict", "model")
StateDict = dict[str, torch.Tensor]


class _Inert:
    """Stands for any object of another library in a checkpoint (callbacks, settings): holds nothing, does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _InertDict:
    """Stands for a class that inherits from dict: `weights_only` fills no dict but those of the standard library."""

    def __new__(cls, *args):
        return OrderedDict()


class _InertList:
    """Stands for a class that is filled as a list is."""

    def __new__(cls, *args):
        return []


class _Noticing:
    """An object while a pickle is scouted: notes on its class how it is filled, and keeps nothing."""

    stand_in = _Inert

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        type(self).stand_in = _InertDict

    def append(self, item):
        type(self).stand_in = _InertList

    extend = append


class _Scout(pickle.Unpickler):
    """Goes through a pickle to learn which objects are filled as dicts or lists. It finds no class of any library,
    only classes that notice, so no code but the one above is run."""

    def __init__(self, file):
        super().__init__(file)
        self.classes: dict[str, type[_Noticing]] = {}

    def find_class(self, module: str, name: str) -> type[_Noticing]:
        return self.classes.setdefault(f"{module}.{name}", type(name, (_Noticing,), {}))

    def persistent_load(self, pid):  # a tensor's numbers
        return None


def _stand_ins(path: Path, names: list[str]) -> list[tuple[type, str]]:
    """For these classes of a checkpoint their stand-ins, as `safe_globals` takes them."""
    with zipfile.ZipFile(path) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(member) as file:
            scout = _Scout(file)
            scout.load()
    return [(scout.classes.get(name, _Noticing).stand_in, name) for name in names]


def read_weights(path: Path) -> tuple[StateDict, str]:
    """The tensors of a `.ckpt`, `.pt`, `.pth`, `.bin` or `.safetensors` file, on the CPU, by name.

    Pickles are read with `weights_only`. Objects of other libraries beside the weights, as Lightning keeps them, are
    replaced by inert stand-ins, so neither their code nor code of the file is run.

    Returns:
        The tensors, and the entry of the file that held them ("" where they stood at the top).

    Raises:
        InputError: no such file, not readable in this way (the message says how to strip it), or without weights.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content, entry = content[wrapper], wrapper
            break
    else:
        entry = ""
    tensors = content.items() if isinstance(content, dict) else ()
    state = {name: tensor for name, tensor in tensors if isinstance(name, str) and torch.is_tensor(tensor)}
    require(state, f"{path}: holds no weights; {EXPECTED}.")
    for prefix in ("module.", "_orig_mod."):  # of a wrapper for several processes, and of torch.compile
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state, entry


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({' '.join(str(error).split())}).") from error


def _unpickle(path: Path):
    try:
        options = {"map_location": "cpu", "weights_only": True}
        try:
            return torch.load(path, **options)
        except pickle.UnpicklingError:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals(_stand_ins(path, foreign)):
            return torch.load(path, **options)
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        # torch's message has the cause after this word and advice after that one.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("Please use")[0]
        reason = " ".join(reason.split())[:200].rstrip(". ")
        raise InputError(
            f"{path}: cannot be read as weights alone ({reason}); only if you trust its source, save its weights anew "
            f"with torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE) and convert that."
        ) from error


def recognize(state: StateDict, path: Path) -> Literal["ldm", "dit"]:
    """What the weights are, by their names.

    Raises:
        InputError: of another architecture; the message says what was found and what is expected.
    """
    if any(name.startswith("model.diffusion_model.") for name in state):
        condition = sorted({".".join(name.split(".")[:2]) for name in state if name.startswith("cond_stage_model.")})
        require(
            "cond_stage_model.embedding.weight" in state,
            f"{path}: a latent diffusion model "
            + (f"with another condition than classes ({condition[0]}.*)" if condition else "without a class embedding")
            + f"; {EXPECTED}.",
        )
        return "ldm"
    if {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"} <= state.keys():
        return "dit"
    raise InputError(
        f"{path}: weights of another architecture ({len(state)} tensors, such as {min(state)}); {EXPECTED}."
    )
