"""Condition embedding perturbation (CEP) on any conditional denoiser of diffusers, in one line.

Forward hooks hand every condition embedding that the denoiser is given, or looks up for its class labels, to
[`ConditionEmbeddingPerturbation`]; the denoiser itself is not changed. docs/cep_everywhere.md says what is perturbed
in which model. Letters: B examples, L tokens, D the embedding dimension, K classes.
"""

import inspect
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from noisycond.errors import InputError, require
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.randomness import Purpose, step_keys


EMBEDDINGS = ("both", "sequence", "pooled")

# Arguments of a denoiser's forward that are condition embeddings; more sequences start with encoder_hidden_states.
_SEQUENCES = ("audio_encoder_hidden_states", "text_encoder_layers", "cap_feats", "text_bth", "clip_text")
_POOLED = ("pooled_projections", "pooled_embeds", "pooled_text_emb", "proj_embedding", "clip_text_pooled", "clip_img",
           "image_embeds", "image_embeddings")  # fmt: skip
# Lists with one tensor [L, D] per example, without padding.
_LISTS_OF_EXAMPLES = ("cap_feats",)
# Tensors [layers, B, L, D].
_STACKS_OF_LAYERS = ("encoder_hidden_states_llama3",)
# Where the padding mask of a sequence is looked for.
_MASKS = {
    "encoder_hidden_states": ("encoder_attention_mask", "encoder_hidden_states_mask", "text_embedding_mask",
                              "encoder_mask", "attention_mask"),
    "encoder_hidden_states_t5": ("text_embedding_mask_t5",),
    "encoder_hidden_states_1": ("encoder_attention_mask_1",),
    "encoder_hidden_states_2": ("encoder_attention_mask_2",),
    "audio_encoder_hidden_states": ("audio_encoder_attention_mask",),
}  # fmt: skip
_TIMESTEPS = ("timestep", "timesteps", "timestep_ratio", "t")
# Its `image_embeds` and `prompt_embeds` are the noisy data themselves.
_UNCONDITIONAL = ("UniDiffuserModel",)
# Modules around a denoiser, and the attribute under which they hold it.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "FullyShardedDataParallel": "module",
             "DeepSpeedEngine": "module"}  # fmt: skip
# Keys of one step: the processes' examples lie 2^20 positions apart.
_RANK_SHIFT = 20


@dataclass(frozen=True)
class Schedule:
    r"""A factor on γ as a function of progress p in [0, 1], from `start` at p = 0 to `end` at p = 1:

        constant: f(p) = start
        linear:   f(p) = start + (end - start) p
        cosine:   f(p) = end + (start - end) (1 + cos πp) / 2

    Written as text: `linear`, or `linear:0:1` with start and end; without them a linear or cosine schedule goes from
    1 to 0.
    """

    kind: str = "constant"
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self):
        require(
            self.kind in ("constant", "linear", "cosine"),
            f"the schedule is {self.kind!r}, but it must be constant, linear or cosine.",
        )
        require(
            all(math.isfinite(value) and value >= 0 for value in (self.start, self.end)),
            f"the schedule goes from {self.start} to {self.end}, but both must be 0 or a positive number.",
        )

    @classmethod
    def parse(cls, text: "str | Schedule") -> "Schedule":
        """`kind` or `kind:start:end`. Raises InputError for anything else."""
        if isinstance(text, Schedule):
            return text
        kind, *ends = text.split(":")
        try:
            ends = [float(end) for end in ends]
        except ValueError:
            ends = [math.nan]
        require(
            len(ends) in (0, 2) and not any(math.isnan(end) for end in ends),
            f"the schedule is {text!r}, but it must read like linear or linear:0:1.",
        )
        return cls(kind, *ends)

    def __str__(self) -> str:
        return self.kind if self.kind == "constant" and self.start == 1 else f"{self.kind}:{self.start:g}:{self.end:g}"

    @property
    def is_one(self) -> bool:
        return self.kind == "constant" and self.start == 1

    def __call__(self, progress: torch.Tensor) -> torch.Tensor:
        """Progress in [0, 1], any shape, to factors of the same shape."""
        if self.kind == "constant":
            return torch.full_like(progress, self.start)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * progress
        return self.end + (self.start - self.end) * (1 + torch.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Condition:
    """A place at which a condition embedding enters a denoiser.

    Args:
        name: the argument of the forward (`encoder_hidden_states`, `added_cond_kwargs.text_embeds`), or the path of
            the module that embeds class labels.
        kind: `sequence` [B, L, D], `pooled` [B, D], or `class` (looked up inside the denoiser, [B, D]).
    """

    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})"


def unwrap(model: nn.Module) -> nn.Module:
    """The denoiser inside torch.compile, DDP, FSDP, DeepSpeed and peft's `get_peft_model`."""
    while True:
        kinds = [kind.__name__ for kind in type(model).__mro__]
        held = next((_WRAPPERS[kind] for kind in kinds if kind in _WRAPPERS), None)
        if held is not None:
            model = getattr(model, held)
        elif "PeftModel" in kinds:
            model = model.get_base_model()
        else:
            return model


def find_conditions(model: nn.Module, embeddings: str = "both") -> tuple[Condition, ...]:
    """Where condition embeddings enter a denoiser, found by the signature of its forward and by its class embeddings;
    empty where there are none.

    Args:
        model: a denoiser, in whatever is unwrapped by [`unwrap`].
        embeddings: `sequence`, `pooled` (with class embeddings) or `both`.
    """
    require(
        embeddings in EMBEDDINGS, f"the embeddings are {embeddings!r}, but must be one of {', '.join(EMBEDDINGS)}."
    )
    model = unwrap(model)
    if type(model).__name__ in _UNCONDITIONAL:
        return ()
    found = [*_arguments(model), *(Condition(name, "class") for name, _ in _class_embeddings(model))]
    wanted = {"both": ("sequence", "pooled", "class"), "sequence": ("sequence",), "pooled": ("pooled", "class")}
    return tuple(place for place in found if place.kind in wanted[embeddings])


def _parameters(model: nn.Module) -> list[str]:
    """The names of the forward's arguments, in order, without self."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _arguments(model: nn.Module) -> Iterator[Condition]:
    config = getattr(model, "config", None)
    added = getattr(config, "addition_embed_type", None)
    projected = getattr(config, "encoder_hid_dim_type", None)
    for name in _parameters(model):
        if (name.startswith("encoder_hidden_states") and "mask" not in name) or name in _SEQUENCES:
            yield Condition(name, "sequence")
        elif name in _POOLED:
            yield Condition(name, "pooled")
        elif name == "class_labels":
            if getattr(config, "class_embed_type", None) in ("projection", "simple_projection", "identity"):
                yield Condition(name, "pooled")
        elif name == "added_cond_kwargs":
            if added in ("text_time", "text_image"):
                yield Condition(f"{name}.text_embeds", "pooled")
            if added in ("image", "image_hint", "text_image") or "image" in (projected or ""):
                yield Condition(f"{name}.image_embeds", "pooled")


def _class_embeddings(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that embed integer class labels: diffusers' LabelEmbedding (in every block of a DiT), and a plain table
    named `class_embedding` (UNet2DModel) unless the model attends to a condition: there it holds noise levels."""
    modules = dict(model.named_modules())
    attends = any(name.endswith(".attn2") for name in modules)
    for name, module in modules.items():
        plain = isinstance(module, nn.Embedding) and name.rpartition(".")[2] == "class_embedding"
        if type(module).__name__ == "LabelEmbedding" or (plain and not attends):
            yield name, module


def _table(module: nn.Module) -> nn.Embedding:
    return module if isinstance(module, nn.Embedding) else module.embedding_table


def attach_cep(
    model: nn.Module,
    gamma: float = 1.0,
    type: str = "uniform",
    *,
    embeddings: str = "both",
    perturb_null: bool = True,
    null_embedding: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    null_class: int | None = None,
    perturb_padding: bool = True,
    shared: bool = False,
    gamma_schedule: str | Schedule = "constant",
    schedule_steps: int | None = None,
    timestep_schedule: str | Schedule = "constant",
    max_timestep: float | None = None,
    seed: int = 0,
    rank: int | None = None,
) -> "AttachedCEP":
    r"""Adds δ to the condition embeddings of a denoiser while it trains (CEP, Section 4 of arXiv:2405.20494).

    ```py
    handle = attach_cep(unet, gamma=1.0)    # once, before or after accelerator.prepare
    ...                                     # any training loop
    handle.remove()
    ```

    δ has the law of [`ConditionEmbeddingPerturbation`]. It is added where the model is in train mode and gradients are
    enabled, and nowhere else: validation and sampling get what they would get without it, bit for bit. Every such
    forward draws anew (with gradient accumulation every micro-batch), once per example and embedding, whatever number
    of blocks reads it; the recomputed forward of gradient checkpointing sees the same δ. The draws are a pure function
    of seed, process and number of the forward; torch's generators are not touched. Nothing is added to the model's
    state dict, and a copy of the model (`copy.deepcopy`, for an average of the weights) has no perturbation.

    Args:
        model: a conditional denoiser, also one wrapped by DDP, accelerate, FSDP, torch.compile or peft.
        gamma: γ ≥ 0; 0 changes nothing, bit for bit.
        type: `uniform` (CEP-U) or `gaussian` (CEP-G).
        embeddings: which are perturbed: `sequence` (one vector per token), `pooled` (one vector per example, class
            embeddings among them), or `both`.
        perturb_null: whether the embedding of "no condition" is perturbed. If not, examples without a condition are
            recognized by `null_embedding`, by `null_class`, or by what [`AttachedCEP.mark`] was told.
        null_embedding: [L, D] or [1, L, D], the embedding of the empty caption; an example whose
            `encoder_hidden_states` equal it (up to 1e-4 or four times the resolution of the dtype, of the largest
            entry) has no condition, and none of its embeddings is perturbed. A mapping names another argument.
        null_class: the label of "no class". None: the last row of diffusers' LabelEmbedding.
        perturb_padding: whether padding tokens are perturbed. If not, the mask is the argument that the model takes
            for it (`encoder_attention_mask`, [B, L]; 1 or True is a token), or what `mark` was told.
        shared: one δ per example for all tokens, instead of one per token.
        gamma_schedule: factor on γ over training, a [`Schedule`] or its text, at progress forward / `schedule_steps`
            (at most 1; with gradient accumulation count every micro-batch).
        schedule_steps: forwards until a schedule over training has ended.
        timestep_schedule: factor on γ over diffusion time, per example, at progress timestep / `max_timestep`.
        max_timestep: the largest timestep the model is given: the scheduler's `num_train_timesteps` where it gets
            integers or σ · 1000, 1 where it gets [0, 1].
        seed: seed of δ.
        rank: which of the data-parallel processes this is; None: the rank in torch.distributed. Processes that share
            their examples (tensor parallelism) must be given the same.

    Returns:
        A handle that counts the forwards and removes the perturbation.

    Raises:
        InputError (a ValueError): the model has no condition embedding of that kind, already carries CEP, or an option
            cannot take effect. While training: a forward without any of its condition embeddings, or without the
            mask or null embedding that an option needs.
    """
    return AttachedCEP(
        model, gamma, type, embeddings=embeddings, perturb_null=perturb_null, null_embedding=null_embedding,
        null_class=null_class, perturb_padding=perturb_padding, shared=shared, gamma_schedule=gamma_schedule,
        schedule_steps=schedule_steps, timestep_schedule=timestep_schedule, max_timestep=max_timestep, seed=seed,
        rank=rank,
    )  # fmt: skip


def _carries_cep(module: nn.Module) -> bool:
    """Whether a module perturbs condition embeddings: by a hook, or by itself."""
    if isinstance(module, ConditionEmbeddingPerturbation):
        return module.gamma > 0
    return any(isinstance(hook, _Hook) for hook in module._forward_pre_hooks.values())


class AttachedCEP:
    """The handle [`attach_cep`] returns; the arguments are explained there.

    Attributes:
        model: the unwrapped denoiser.
        conditions: where its condition embeddings are perturbed.
        step: forwards perturbed so far; set it, or load a state dict, to resume.
        refused: the last error of a training forward that was refused, which the trainer may have caught; or None.
    """

    def __init__(self, model: nn.Module, gamma: float, type: str, *, embeddings: str, **options: Any):
        self.model = unwrap(model)
        self.gamma, self.type, self.embeddings = float(gamma), type, embeddings
        self.perturb_null, self.perturb_padding = options["perturb_null"], options["perturb_padding"]
        self.null_embedding, self.null_class = options["null_embedding"], options["null_class"]
        self.shared, self.seed, self.rank = options["shared"], options["seed"], options["rank"]
        self.gamma_schedule = Schedule.parse(options["gamma_schedule"])
        self.timestep_schedule = Schedule.parse(options["timestep_schedule"])
        self.schedule_steps, self.max_timestep = options["schedule_steps"], options["max_timestep"]
        if isinstance(self.null_embedding, torch.Tensor):
            self.null_embedding = {"encoder_hidden_states": self.null_embedding}
        self.step, self.refused = 0, None
        self.conditions = find_conditions(self.model, embeddings)
        self._names = _parameters(self.model)
        self._perturbations: dict[str, ConditionEmbeddingPerturbation] = {}
        self._marked: dict[str, Any] = {}
        self._delta: torch.Tensor | None = None
        self._of_labels: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}
        self._checked_timesteps = False
        self._perturbation("check")  # an unknown type or a negative γ
        self._check()
        self._register()

    def _check(self) -> None:
        name, kinds = type(self.model).__name__, {place.kind for place in self.conditions}
        require(
            not isinstance(self.model, nn.DataParallel),
            "torch's DataParallel runs the model in several threads, which would share a count of forwards; use DDP.",
        )
        if not self.conditions:
            others = find_conditions(self.model)
            why = (
                f"its only condition embeddings are {', '.join(map(str, others[:4]))}"
                if others
                else f"its forward takes {', '.join(self._names) or 'nothing'}, and no class embedding is inside"
            )
            kind = "" if self.embeddings == "both" else f"{self.embeddings} "
            raise InputError(f"{name} has no {kind}condition embedding that CEP could perturb: {why}.")
        carrying = [module for module in self.model.modules() if _carries_cep(module)]
        where = "" if not carrying or carrying[0] is self.model else f", in its {type(carrying[0]).__name__}"
        require(not carrying, f"{name} already carries CEP{where}; remove the first one before attaching another.")
        for value, needs, option in (
            (self.perturb_padding, "sequence", "perturb_padding=False"),
            (not self.shared, "sequence", "shared=True"),
            (self.null_class is None, "class", "null_class"),
        ):
            require(value or needs in kinds, f"{option} has no effect on {name}, which has no {needs} embedding.")
        require(
            self.gamma_schedule.kind == "constant" or (self.schedule_steps or 0) > 0,
            f"gamma_schedule={self.gamma_schedule} needs schedule_steps, the number of forwards it takes.",
        )
        require(
            self.timestep_schedule.kind == "constant" or (self.max_timestep or 0) > 0,
            f"timestep_schedule={self.timestep_schedule} needs max_timestep: the scheduler's num_train_timesteps "
            "where the model is given integers or sigma * 1000, 1 where it is given [0, 1].",
        )
        paths = [place.name for place in self.conditions if place.kind == "class"]
        tables = {path: self.model.get_submodule(path) for path in paths}
        sizes = {_table(module).embedding_dim for module in tables.values()}
        require(len(sizes) < 2, f"the class embeddings of {name} have several sizes: {sorted(sizes)}.")
        for path, module in tables.items():
            require(
                self.perturb_null or self._null_row(module) is not None,
                f"perturb_null=False: {path} has no row for examples without a class; name it with null_class.",
            )

    def _null_row(self, module: nn.Module) -> int | None:
        if self.null_class is not None or isinstance(module, nn.Embedding):
            return self.null_class
        return module.num_classes if module.dropout_prob > 0 else None

    def _register(self) -> None:
        # The model's own hooks run outside of a compiled graph; those of its class embeddings are traced into it.
        before, after = torch.compiler.disable(self._before_or_refuse), torch.compiler.disable(self._after)
        self._hooks = [self.model.register_forward_pre_hook(_Hook(before), with_kwargs=True)]
        tables = [place.name for place in self.conditions if place.kind == "class"]
        for name in tables:
            module = self.model.get_submodule(name)
            self._hooks.append(module.register_forward_hook(_Hook(self._add_to_class_embedding)))
        if tables:
            self._hooks.append(self.model.register_forward_hook(_Hook(after), always_call=True))
        _forget_compiled()

    def remove(self) -> None:
        """Takes the perturbation off the model, which is then as it was before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._delta = [], None
        self._of_labels.clear()
        _forget_compiled()

    def mark(
        self,
        null: torch.Tensor | None = None,
        padding: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Says of the next training forward what its arguments do not show.

        Args:
            null [B]: bool; the examples without a condition, for perturb_null=False.
            padding [B, L]: mask of `encoder_hidden_states`, 1 or True is a token, for perturb_padding=False; a mapping
                names the masks of several arguments.
        """
        require(null is None or not self.perturb_null, "mark(null=...) has an effect only with perturb_null=False.")
        require(padding is None or not self.perturb_padding, "mark(padding=...) needs perturb_padding=False.")
        if isinstance(padding, torch.Tensor):
            padding = {"encoder_hidden_states": padding}
        self._marked = {"null": null, "padding": padding or {}}

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs: the count of forwards, and the seed to check it against."""
        return {"step": self.step, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Raises InputError where the state was made with another seed."""
        require(
            state["seed"] == self.seed,
            f"the saved CEP state has the seed {state['seed']}, but this one has {self.seed}.",
        )
        self.step = int(state["step"])

    def settings(self) -> dict[str, Any]:
        """Everything that was chosen, as plain values for a JSON file."""
        return {
            "model": type(self.model).__name__,
            "conditions": [{"name": place.name, "kind": place.kind} for place in self.conditions],
            "gamma": self.gamma,
            "type": self.type,
            "embeddings": self.embeddings,
            "perturb_null": self.perturb_null,
            "null_embedding": sorted(self.null_embedding or ()),
            "null_class": self.null_class,
            "perturb_padding": self.perturb_padding,
            "shared": self.shared,
            "gamma_schedule": str(self.gamma_schedule),
            "schedule_steps": self.schedule_steps,
            "timestep_schedule": str(self.timestep_schedule),
            "max_timestep": self.max_timestep,
            "seed": self.seed,
        }

    def __repr__(self) -> str:
        """What is perturbed, in one line; the blocks of a DiT are counted, not listed."""
        places = [str(place) for place in self.conditions if place.kind != "class"]
        tables = [place for place in self.conditions if place.kind == "class"]
        if tables:
            count = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
            places.append(f"{tables[0].name}{count} (class, one draw for all)" if count else str(tables[0]))
        return f"CEP ({self.type}, gamma {self.gamma:g}) on {type(self.model).__name__}: {', '.join(places)}"

    # One forward

    def _before_or_refuse(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        try:
            return self._before(module, args, kwargs)
        except InputError as error:
            self.refused = error
            raise

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._delta = None
        if not (module.training and torch.is_grad_enabled()):
            return None
        require(
            torch._C._current_graph_task_id() == -1,
            "the forward that CEP is attached to is run again in the backward pass; checkpoint the blocks inside of "
            "the model (enable_gradient_checkpointing) instead of the model as a whole.",
        )
        marked, self._marked = self._marked, {}
        step, self.step = self.step, self.step + 1
        if self.gamma == 0.0:
            return None
        given = dict(zip(self._names, args, strict=False)) | kwargs
        forward = _Forward(self, step, given, marked)
        changed = forward.perturbed()
        require(
            changed,
            f"CEP is attached to {type(self.model).__name__}, but this training forward was given none of its "
            f"condition embeddings: {', '.join(place.name for place in self.conditions[:4])}.",
        )
        named = zip(self._names, args, strict=False)
        args = (*(changed.get(name, value) for name, value in named), *args[len(self._names) :])
        return args, {name: changed.get(name, value) for name, value in kwargs.items()}

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._delta = None

    def _keep(self, labels: torch.Tensor, delta: torch.Tensor) -> None:
        """Remembers the δ that belongs to labels, as long as someone holds them: a checkpointed block reads it again
        in the backward pass, perhaps after another forward."""
        self._of_labels = {key: held for key, held in self._of_labels.items() if not held[0].expired()}
        storage = labels.untyped_storage()
        self._of_labels[storage._cdata] = (StorageWeakRef(storage), delta)
        self._delta = delta

    def _add_to_class_embedding(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        delta = self._delta
        if not torch.compiler.is_compiling():  # a compiled graph holds on to its δ by itself
            held = self._of_labels.get(args[0].untyped_storage()._cdata)
            delta = delta if held is None else held[1]
        if delta is None:
            return None
        where = None
        if not self.perturb_null:
            where = (output != _table(module).weight[self._null_row(module)].to(output.dtype)).any(-1)
        return ConditionEmbeddingPerturbation.add(output, delta, where)

    def _perturbation(self, name: str) -> ConditionEmbeddingPerturbation:
        if name not in self._perturbations:
            purpose = f"{Purpose.CONDITION_PERTURBATION.value}: {name}"
            self._perturbations[name] = ConditionEmbeddingPerturbation(
                self.gamma, self.type, self.seed, self.shared, purpose
            )
        return self._perturbations[name]

    def _process(self) -> int:
        if self.rank is not None:
            return self.rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank()
        return int(os.environ.get("RANK", "0"))


class _Forward:
    """One training forward: its arguments, its factor on γ, and the examples without a condition."""

    def __init__(self, cep: AttachedCEP, step: int, given: dict[str, Any], marked: dict[str, Any]):
        self.cep, self.step, self.given, self.marked = cep, step, given, marked
        self.first = cep._process() << _RANK_SHIFT
        self.scale = self._scale()
        self.null = None if cep.perturb_null else self._null()

    def perturbed(self) -> dict[str, Any]:
        """The arguments to be replaced, by name."""
        changed: dict[str, Any] = {}
        for place in self.cep.conditions:
            name, _, inner = place.name.partition(".")
            value = self.given.get("class_labels" if place.kind == "class" else name)
            if place.kind == "class":
                if value is not None and "class_labels" not in changed:
                    changed["class_labels"] = self._labels(value)
            elif not inner:
                self._put(changed, name, self._tensors(place, place.name, value))
            elif value is not None:
                new = self._tensors(place, place.name, value.get(inner))
                if new is not None:
                    changed[name] = {**changed.get(name, value), inner: new}
        return changed

    @staticmethod
    def _put(changed: dict[str, Any], name: str, value: Any) -> None:
        if value is not None:
            changed[name] = value

    def _tensors(self, place: Condition, name: str, value: Any) -> Any:
        """The perturbed value of an argument: a tensor, or a list or tuple of them; None where there is no tensor."""
        if isinstance(value, torch.Tensor) and name in _STACKS_OF_LAYERS and value.dim() == 4:
            return torch.stack(self._tensors(place, name, list(value)))
        if isinstance(value, (list, tuple)) and value:
            new = [
                self._example(name, element, number)
                if place.name in _LISTS_OF_EXAMPLES
                else self._tensors(place, f"{name}[{number}]", element)
                for number, element in enumerate(value)
            ]
            if all(element is None for element in new):
                return None
            return type(value)(old if element is None else element for old, element in zip(value, new, strict=True))
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            return None
        return self._tensor(name, value, self._where(place, value), self.scale)

    def _tensor(
        self,
        name: str,
        value: torch.Tensor,
        where: torch.Tensor | None,
        scale: torch.Tensor | None,
        first: int = 0,
    ) -> torch.Tensor:
        scale = scale if scale is None or len(scale) == 1 else _of_batch("the timesteps", scale, value, name)
        return self.cep._perturbation(name)(value, self._keys(value, first), where, scale)

    def _example(self, name: str, value: torch.Tensor, number: int) -> torch.Tensor:
        """One element [L, D] of a list with an element per example."""
        where = None if self.null is None else ~self.null[number : number + 1]
        scale = self.scale if self.scale is None or len(self.scale) == 1 else self.scale[number : number + 1]
        return self._tensor(name, value[None], where, scale, number)[0]

    def _labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Draws δ for class labels [B], which come back as a tensor of their own by which δ is found again."""
        labels = labels.clone()
        path = next(place.name for place in self.cep.conditions if place.kind == "class")
        size = _table(self.cep.model.get_submodule(path)).embedding_dim
        delta = self.cep._perturbation("class").draw(torch.Size((*labels.shape, size)), self._keys(labels))
        where = None if self.marked.get("null") is None else ~_of_batch("the null mask", self.null, labels, "labels")
        zero = torch.zeros_like(delta)
        self.cep._keep(labels, ConditionEmbeddingPerturbation.add(zero, delta, where, self.scale))
        return labels

    def _keys(self, value: torch.Tensor, first: int = 0) -> torch.Tensor:
        return step_keys(self.step, self.first + first + torch.arange(len(value), device=value.device))

    def _scale(self) -> torch.Tensor | None:
        """The factor on γ: float32 [1], or [B] where timesteps differ; None for 1."""
        cep, scale = self.cep, None
        if not cep.gamma_schedule.is_one:
            progress = min(self.step / cep.schedule_steps, 1.0) if cep.schedule_steps else 0.0
            scale = cep.gamma_schedule(torch.tensor([progress]))
        if not cep.timestep_schedule.is_one:
            of_time = cep.timestep_schedule(self._progress())
            scale = of_time if scale is None else of_time * scale.to(of_time.device)
        return scale

    def _progress(self) -> torch.Tensor:
        """Diffusion time of each example in [0, 1], float32 [B] or [1]."""
        cep = self.cep
        if cep.timestep_schedule.kind == "constant":
            return torch.zeros(1)
        value = next((self.given[name] for name in _TIMESTEPS if self.given.get(name) is not None), None)
        require(value is not None, "timestep_schedule needs timesteps, but this forward was given none.")
        timesteps = torch.as_tensor(value)
        require(
            timesteps.dim() < 2,
            f"timestep_schedule needs one timestep per example, but the timesteps are {list(timesteps.shape)}.",
        )
        if not cep._checked_timesteps:
            largest, cep._checked_timesteps = float(timesteps.max()), True
            require(
                largest <= cep.max_timestep,
                f"a timestep is {largest:g}, but max_timestep is {cep.max_timestep:g}.",
            )
            fractions = timesteps.is_floating_point() and bool((timesteps != timesteps.round()).any())
            require(
                largest > 1 or cep.max_timestep <= 1 or not fractions,
                f"the timesteps are fractions up to {largest:g}, but max_timestep is {cep.max_timestep:g}: a model "
                "that is given [0, 1] needs max_timestep=1.",
            )
        return (timesteps.float().reshape(-1) / cep.max_timestep).clamp(0.0, 1.0)

    def _null(self) -> torch.Tensor | None:
        """Which examples have no condition: bool [B]; None where only class embeddings can tell, which do so
        themselves."""
        null = self.marked.get("null")
        if null is not None:
            return null.bool()
        for name, expected in (self.cep.null_embedding or {}).items():
            outer, _, inner = name.partition(".")
            value = self.given.get(outer)
            value = value.get(inner) if inner and value is not None else value
            require(
                isinstance(value, torch.Tensor),
                f"the null embedding is one of {name}, but this forward was given no such tensor.",
            )
            expected = expected.to(value.device, torch.float32)
            expected = expected[None] if expected.dim() < value.dim() else expected
            require(
                expected.shape[1:] == value.shape[1:],
                f"the null embedding of {name} is {list(expected.shape[1:])}, but this forward was given "
                f"{list(value.shape[1:])} per example.",
            )
            tolerance = max(1e-4, 4 * torch.finfo(value.dtype).eps) * expected.abs().max()
            same = (value.detach().float() - expected).abs().flatten(1).amax(1) <= tolerance
            null = same if null is None else null & same
        if null is not None or all(place.kind == "class" for place in self.cep.conditions):
            return null
        raise InputError(
            "perturb_null=False needs to know which examples have no condition: pass null_embedding to attach_cep, or "
            "call mark(null=...) before every training forward."
        )

    def _where(self, place: Condition, value: torch.Tensor) -> torch.Tensor | None:
        """Which examples [B] or tokens [B, L] are perturbed; None for all."""
        where = None if self.null is None else ~_of_batch("the null mask", self.null, value, place.name)
        if self.cep.perturb_padding or place.kind != "sequence" or "image" in place.name:
            return where
        mask = self._mask(place.name, value)
        return mask if where is None else mask & where[:, None]

    def _mask(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The tokens that are no padding: bool [B, L]."""
        mask = self.marked.get("padding", {}).get(name)
        for argument in _MASKS.get(name, ()):
            found = self.given.get(argument)
            if mask is None and isinstance(found, torch.Tensor):
                # diffusers passes a mask of one more dimension as it is added to attention scores: 0 is a token.
                found = found > -1 if found.dim() == 3 and found.is_floating_point() else found.bool()
                found = found[:, 0] if found.dim() == 3 and found.shape[1] == 1 else found
                mask = found if found.shape == value.shape[:2] else None
        require(
            mask is not None and mask.shape == value.shape[:2],
            f"perturb_padding=False needs the padding mask of {name}, {list(value.shape[:2])}, but this forward was "
            "given none: pass it to the model, or to mark(padding=...) before the forward.",
        )
        return mask.bool()


def _of_batch(what: str, tensor: torch.Tensor, value: torch.Tensor, name: str) -> torch.Tensor:
    require(len(tensor) == len(value), f"{what} are of {len(tensor)} examples, but {name} of {len(value)}.")
    return tensor


class _Hook:
    """A hook that stays with its model: in a copy or a pickle of the model it does nothing."""

    def __init__(self, call):
        self.call = call

    def __call__(self, *args):
        return self.call(*args)

    def __deepcopy__(self, memo: dict):
        return _do_nothing

    def __reduce__(self):
        return _inert, ()


def _inert():
    return _do_nothing


def _do_nothing(*args) -> None:
    """What a copied model has in place of a hook."""


def _forget_compiled() -> None:
    """Drops compiled code: it does not check whether hooks came or went."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
