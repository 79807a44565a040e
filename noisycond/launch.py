"""Runs a training script as it is, with condition embedding perturbation on the denoiser that it trains.

accelerate launch -m noisycond.launch --cep_gamma 1.0 -- train_text_to_image.py --output_dir runs/cep ...

docs/cep_everywhere.md, "No line at all", says how the denoiser is found and when a script is refused.
"""

import functools
import gc
import json
import math
import os
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NoReturn
from weakref import WeakSet

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from noisycond import __version__
from noisycond.arguments import Arguments, flag, parse_arguments
from noisycond.attach import EMBEDDINGS, AttachedCEP, Schedule, attach_cep, find_conditions, unwrap
from noisycond.errors import InputError, is_main_process, require
from noisycond.perturbation import ConditionEmbeddingPerturbation


USAGE = "python -m noisycond.launch --cep_gamma 1 -- train.py --output_dir runs/cep"
SETTINGS_FILE = "cep.json"
STATE_FILE = "cep_state.json"


@dataclass
class LaunchArguments(Arguments):
    """The options of [`attach_cep`], as flags."""

    cep_gamma: float = flag(1.0, "γ of condition embedding perturbation (CEP); 0 runs the script as it is.")
    cep_type: Literal["uniform", "gaussian"] = flag("uniform", "CEP-U: δ ~ U(-γ/√d, γ/√d). CEP-G: δ ~ N(0, γ²/d).")
    cep_embeddings: Literal[EMBEDDINGS] = flag(
        "both", "Which are perturbed: `sequence`, one vector per token; `pooled`, one per example; or `both`."
    )
    cep_perturb_null: bool = flag(True, "Perturb the null (unconditional) embedding too.")
    cep_null_embedding: str | None = flag(
        None, "A safetensors file with the null embedding, named as the argument of the denoiser that it is."
    )
    cep_null_class: int | None = flag(None, "The label of `no class`.")
    cep_perturb_padding: bool = flag(True, "Perturb padding tokens too.")
    cep_shared: bool = flag(False, "One δ per example for all its tokens, instead of one per token.")
    cep_gamma_schedule: str = flag("constant", "Factor on γ over training: constant, linear, cosine, or linear:0:1.")
    cep_schedule_steps: int | None = flag(None, "Training forwards until --cep_gamma_schedule has ended.")
    cep_timestep_schedule: str = flag("constant", "Factor on γ over diffusion time, in the same words.")
    cep_max_timestep: float | None = flag(None, "The largest timestep the denoiser is given.")
    cep_seed: int = flag(0, "Seed of δ.")

    def __post_init__(self):
        super().__post_init__()
        require(
            0 <= self.cep_gamma < math.inf,
            f"--cep_gamma is {self.cep_gamma}, but it must be 0 (off) or a positive number.",
        )
        require(0 <= self.cep_seed < 2**32, f"--cep_seed is {self.cep_seed}, but it must lie in [0, 2^32).")
        for name, length in (("gamma_schedule", "schedule_steps"), ("timestep_schedule", "max_timestep")):
            text, value = getattr(self, f"cep_{name}"), getattr(self, f"cep_{length}")
            try:
                constant = Schedule.parse(text).kind == "constant"
            except InputError as error:
                raise InputError(f"--cep_{name}: {error}") from None
            require(constant or value is not None, f"--cep_{name} {text} needs --cep_{length}.")
            require(not constant or value is None, f"--cep_{length} has no effect without --cep_{name}.")
            require(value is None or 0 < value < math.inf, f"--cep_{length} is {value}, but it must be positive.")
        for name in ("null_embedding", "null_class"):
            require(
                getattr(self, f"cep_{name}") is None or not self.cep_perturb_null,
                f"--cep_{name} has an effect only with --no_cep_perturb_null.",
            )

    def flags(self) -> dict[str, Any]:
        """Their values, by name."""
        return {name: value for name, value in asdict(self).items() if name.startswith("cep_")}

    def options(self) -> dict[str, Any]:
        """The keyword arguments of [`attach_cep`].

        Raises:
            InputError: the file with the null embedding cannot be read.
        """
        options = {name.removeprefix("cep_"): value for name, value in self.flags().items()}
        if self.cep_null_embedding is not None:
            from safetensors.torch import load_file

            try:
                options["null_embedding"] = load_file(self.cep_null_embedding)
            except Exception as error:  # safetensors has errors of its own
                raise InputError(f"--cep_null_embedding {self.cep_null_embedding}: {error}.") from None
        return options


# What a script trains


def find_denoisers(module: nn.Module) -> list[nn.Module]:
    """The conditional denoisers in a module: the module itself, unwrapped, or the outermost models of diffusers in it.
    Models of transformers are none: a text encoder may take `encoder_hidden_states` too."""
    return list(_denoisers(module, outermost=True))


def _denoisers(module: nn.Module, outermost: bool) -> Iterator[nn.Module]:
    module = unwrap(module)
    of_diffusers = _is_a(module, "ModelMixin")
    if _is_a(module, "PreTrainedModel"):
        return
    if (outermost or of_diffusers) and _has_conditions(module):
        yield module
    elif not of_diffusers:
        for child in module.children():
            yield from _denoisers(child, outermost=False)


def _is_a(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _has_conditions(module: nn.Module) -> bool:
    try:
        return bool(find_conditions(module))
    except (TypeError, ValueError):  # a forward without a signature
        return False


def _trains(model: nn.Module, trained: set[int] | None) -> bool:
    """Whether parameters of the model are trained: in an optimizer, or, where none is known, not frozen."""
    if trained is None:
        return any(parameter.requires_grad for parameter in model.parameters())
    return any(parameter.requires_grad and id(parameter) in trained for parameter in model.parameters())


def _parameters(optimizers: Iterable[Any]) -> set[int] | None:
    """The ids of the parameters in optimizers; None where there is none, or one that does not say."""
    optimizers = list(optimizers)
    if not optimizers or not all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in optimizers):
        return None
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {id(parameter) for group in groups for parameter in group["params"]}


def _is_optimizer(entry: Any) -> bool:
    # accelerate's DummyOptim stands for an optimizer that DeepSpeed makes.
    return isinstance(entry, torch.optim.Optimizer) or type(entry).__name__ == "DummyOptim"


def _why_not(module: nn.Module, trained: set[int] | None) -> str:
    """Why CEP is not attached to a module, in a few words."""
    module = unwrap(module)
    if _is_a(module, "PreTrainedModel"):
        return "a model of transformers, not a denoiser"
    if not find_denoisers(module):
        return "no condition embedding"
    if trained is not None and _trains(module, None):
        return "no parameter of it is in the optimizer"
    return "nothing trainable"


def _living_denoisers() -> list[nn.Module]:
    """Every trainable conditional denoiser of diffusers in this process, those that lie in another left out."""
    gc.collect()
    modules = [entry for entry in gc.get_objects() if issubclass(type(entry), nn.Module)]
    modules = [module for module in modules if _is_a(module, "ModelMixin") and _trains(module, None)]
    modules = [module for module in modules if _has_conditions(module)]
    parts = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in parts]


class Attachment:
    """Attaches CEP to the denoisers that a script trains, and stops a script that trains without it.

    Args:
        arguments: the flags.
        script: the script's name, for what is said of it.
        attached: called with all handles so far, whenever there is another.

    Attributes:
        handles: what is attached.
    """

    def __init__(self, arguments: LaunchArguments, script: str, attached: Callable[[list[AttachedCEP]], None]):
        self.options, self.script, self.attached = arguments.options(), script, attached
        self.handles: list[AttachedCEP] = []
        self._passed_over: dict[str, str] = {}
        self._quiet = False
        self._accelerators: WeakSet = WeakSet()
        self._checked: WeakSet = WeakSet()
        self._unproven: list[AttachedCEP] = []

    @contextmanager
    def watching(self):
        """A context in which every prepare of accelerate and every optimizer's step is seen."""
        originals = {name: getattr(Accelerator, name) for name in ("prepare", "prepare_model", "load_state")}

        @functools.wraps(originals["prepare"])
        def prepare(accelerator, *args, **options):
            return self._call(originals["prepare"], self._preparing, accelerator, *args, **options)

        @functools.wraps(originals["prepare_model"])
        def prepare_model(accelerator, model, *args, **options):
            evaluates = options.get("evaluation_mode", args[1] if len(args) > 1 else False)
            seen = _nothing if evaluates else self._preparing
            return self._call(originals["prepare_model"], seen, accelerator, model, *args, **options)

        @functools.wraps(originals["load_state"])
        def load_state(accelerator, *args, **options):
            # Opening a sharded optimizer's state takes a step that trains nothing.
            return self._call(originals["load_state"], _nothing, accelerator, *args, **options)

        watch = register_optimizer_step_pre_hook(self._stepping)
        try:
            for wrapper in (prepare, prepare_model, load_state):
                setattr(Accelerator, wrapper.__name__, wrapper)
            yield
        finally:
            watch.remove()
            for name, original in originals.items():
                setattr(Accelerator, name, original)
            for handle in self.handles:
                handle.remove()

    def _call(self, original: Callable, seen: Callable, accelerator: Accelerator, *args, **options):
        """Calls a method of accelerate, which may call others of them, after it was seen."""
        if self._quiet:
            return original(accelerator, *args, **options)
        seen(accelerator, args)
        self._quiet = True
        try:
            return original(accelerator, *args, **options)
        finally:
            self._quiet = False

    def _preparing(self, accelerator: Accelerator, objects: tuple) -> None:
        modules = [entry for entry in objects if isinstance(entry, nn.Module)]
        optimizers = [entry for entry in objects if _is_optimizer(entry)]
        trained = _parameters(optimizers)
        for part in (part for module in modules for part in module.modules()):
            if isinstance(part, ConditionEmbeddingPerturbation) and part.gamma > 0:
                _fail(f"{self.script} perturbs its condition embeddings by itself; use its own flags for that.")
        for module in modules:
            models = [model for model in find_denoisers(module) if _trains(model, trained)]
            if not models:
                self._passed_over[type(unwrap(module)).__name__] = _why_not(module, trained)
            for model in models:
                # Blocks of a denoiser may be prepared without it.
                around = [] if model is unwrap(module) else _living_denoisers()
                whole = next((other for other in around if any(part is model for part in other.modules())), model)
                self._attach(whole, accelerator)
        if not optimizers or self.handles:
            return
        # Layers alone may be prepared, as those of LoRA: then the denoiser is the model that holds them.
        denoisers = _living_denoisers()
        for model in denoisers:
            if trained is not None and _trains(model, trained):
                self._attach(model, accelerator)
        if not self.handles and not denoisers:
            self.stop("prepares an optimizer, but no conditional denoiser for it that CEP could be attached to")

    def _attach(self, model: nn.Module, accelerator: Accelerator) -> None:
        parts = {id(part) for part in model.modules()}
        inside = [handle for handle in self.handles if any(part is model for part in handle.model.modules())]
        if inside or any(id(handle.model) in parts for handle in self.handles):
            return  # perturbed already, by itself or with what it lies in or holds
        kinds = {place.kind for place in find_conditions(model, self.options["embeddings"])}
        require(
            self.options["perturb_null"] or self.options["null_embedding"] is not None or kinds <= {"class"},
            f"--no_cep_perturb_null: {type(model).__name__} does not show which examples have no condition; save the "
            "text encoder's output for the empty caption and name the file with --cep_null_embedding.",
        )
        handle = attach_cep(model, **self.options)
        self.handles.append(handle)
        self._unproven.append(handle)
        if is_main_process():
            print(f"noisycond: {handle!r}", flush=True)
        if accelerator not in self._accelerators:
            self._accelerators.add(accelerator)
            accelerator.register_save_state_pre_hook(functools.partial(self._save, accelerator))
            accelerator.register_load_state_pre_hook(self._load)
        self.attached(self.handles)

    def _stepping(self, optimizer: torch.optim.Optimizer, args: tuple, options: dict) -> None:
        """The first step of every optimizer is not taken without CEP."""
        if self._quiet or optimizer in self._checked or not (self._unproven or not self.handles):
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if all(parameter.grad is None for parameter in parameters):
            return  # it trains nothing
        self._checked.add(optimizer)
        if not self.handles:
            self.stop("takes its first optimizer step, but CEP is attached to nothing")
        trained = {id(parameter) for parameter in parameters}
        for handle in [handle for handle in self._unproven if _trains(handle.model, trained)]:
            if handle.step == 0:
                self.stop(
                    f"takes its first optimizer step, but {type(handle.model).__name__} was never called in train "
                    "mode (model.train()) and with gradients, where alone CEP acts"
                )
            self._unproven.remove(handle)

    # Checkpoints

    def _save(self, accelerator: Accelerator, models: list, weights: list, folder: str) -> None:
        on_each_node = accelerator.project_configuration.save_on_each_node
        if accelerator.is_local_main_process if on_each_node else accelerator.is_main_process:
            states = [handle.state_dict() for handle in self.handles]
            (Path(folder) / STATE_FILE).write_text(json.dumps(states), encoding="utf-8")

    def _load(self, models: list, folder: str) -> None:
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            _warn(f"{folder} was saved without CEP: the perturbation's stream starts from its beginning.")
            return
        states = json.loads(path.read_text(encoding="utf-8"))
        require(
            len(states) == len(self.handles),
            f"{path} has the state of {len(states)} perturbed models, but there are {len(self.handles)} now.",
        )
        for handle, state in zip(self.handles, states, strict=True):
            handle.load_state_dict(state)

    # Refusals

    def stop(self, what: str) -> NoReturn:
        """Ends the process with a sentence; not by an error that the script may catch and go on."""
        seen = ", ".join(f"{name} ({why})" for name, why in self._passed_over.items())
        prepared = f"what it prepared was {seen}" if seen else "it passed no model to Accelerator.prepare"
        _fail(f"{self.script} {what}." if self.handles else f"{self.script} {what}: {prepared}.")


def _nothing(accelerator: Accelerator, objects: tuple) -> None:
    """What is seen of a call that trains nothing."""


# The settings, beside what the script writes


class Settings:
    """Writes what CEP was run with into the script's output folder, as `cep.json`.

    Args:
        arguments: the flags.
        words: the script's arguments, among which the folder is `--output_dir`.
    """

    def __init__(self, arguments: LaunchArguments, words: list[str]):
        self.contents: dict[str, Any] = {"noisycond": __version__, "flags": arguments.flags(), "attached": []}
        folder = _output_dir(words)
        self.path = None if folder is None else (Path(folder) / SETTINGS_FILE).absolute()
        self._written = False

    def attached(self, handles: list[AttachedCEP]) -> None:
        """Writes what is attached, if the script has made its folder already."""
        self.contents["attached"] = [handle.settings() for handle in handles]
        self._written = False
        if self.path is not None and self.path.parent.is_dir():
            self._write()

    def finish(self) -> None:
        """Writes the file if it is not there when the script has ended, or says why it cannot be."""
        if self._written and (self.path is None or self.path.is_file()):
            return
        if self.path is None:
            self._sorry("the script's arguments have no --output_dir")
        elif not self.path.parent.is_dir():
            self._sorry(f"the script made no folder {self.path.parent}")
        else:
            self._write()

    def _write(self) -> None:
        self._written = True
        if not is_main_process():
            return
        try:
            self.path.write_text(json.dumps(self.contents, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            self._sorry(f"{self.path} cannot be written ({error.strerror})")

    def _sorry(self, why: str) -> None:
        self._written = True
        _warn(f"the settings of CEP are not saved: {why}.")


def _output_dir(words: list[str]) -> str | None:
    """The value of the last `--output_dir`, as argparse reads it."""
    found = None
    for word, following in zip_longest(words, words[1:]):
        option, equals, value = word.partition("=")
        if option in ("--output_dir", "--output-dir"):
            found = value if equals else following
    return found


# The script


def split_command(argv: list[str]) -> tuple[LaunchArguments, Path, list[str]]:
    """The flags before `--`, the script behind it, and the script's arguments.

    Raises:
        InputError: no `--`, an unknown flag before it, no script behind it, or no such file.
    """
    where = argv.index("--") if "--" in argv else len(argv)
    flags, words = argv[:where], argv[where + 1 :]
    asks_for_help = {"-h", "--help"} & set(flags)
    require("--" in argv or asks_for_help, f"the script goes behind a -- of its own, as in: {USAGE}.")
    arguments = parse_arguments(LaunchArguments, flags)
    require(words, f"there is no script behind the --, as in: {USAGE}.")
    script = Path(words[0])
    require(script.is_file(), f"the script {script} is not there: no such file.")
    return arguments, script, words[1:]


def run_script(script: Path, words: list[str], restore: bool = True) -> None:
    """Runs a script as `python script words...` does: as `__main__`, with its `sys.argv` and its folder first in
    `sys.path`.

    Args:
        restore: put both back afterwards; where the process ends with the script, its exit handlers want them as they
            are.
    """
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *words]
    if not sys.flags.safe_path:
        sys.path[:1] = [str(script.resolve().parent)]  # in place of what `python -m` put there
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        if restore:
            sys.argv, sys.path[:] = argv, path


def _warn(sentence: str) -> None:
    if is_main_process():
        print(f"noisycond: {sentence}", file=sys.stderr, flush=True)


def _fail(sentence: object, of_this_process: bool = False) -> NoReturn:
    if is_main_process():
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    elif of_this_process:  # the others may be well
        print(f"error: process {os.environ['RANK']}: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def main(argv: list[str] | None = None) -> None:
    """Runs the script that the arguments name; its exceptions and its exit status pass through.

    Raises:
        SystemExit: with status 2 after a sentence on standard error: bad flags, a script that would train without CEP,
            or a training forward that CEP refuses.
    """
    running, restore = False, argv is not None
    try:
        arguments, script, words = split_command(list(sys.argv[1:] if argv is None else argv))
        settings = Settings(arguments, words)
        if arguments.cep_gamma == 0:
            if is_main_process():
                print(f"noisycond: CEP is off (gamma 0), {script} runs as it is", flush=True)
            try:
                run_script(script, words, restore)
            finally:
                settings.finish()
            return
        attachment, running = Attachment(arguments, str(script), settings.attached), True
        with attachment.watching():
            try:
                _run_to_its_end(script, words, attachment, restore)
            finally:
                if attachment.handles:
                    settings.finish()
    except InputError as error:
        _fail(error, of_this_process=running)


def _run_to_its_end(script: Path, words: list[str], attachment: Attachment, restore: bool) -> None:
    try:
        run_script(script, words, restore)
    except SystemExit as leaving:
        asked_for_help = {"-h", "--help"} & set(words)
        refused = any(handle.refused for handle in attachment.handles)
        if leaving.code not in (None, 0) or asked_for_help or (attachment.handles and not refused):
            raise
    for handle in attachment.handles:
        if handle.refused:  # the script caught it and went on
            raise handle.refused
    if not attachment.handles:
        attachment.stop("has ended, and CEP was attached to nothing (processes that it started itself are not seen)")


if __name__ == "__main__":
    main()
