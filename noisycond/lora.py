"""Low-rank adapters (LoRA, arXiv:2106.09685) of a denoiser: added, and saved as diffusers reads them.

Needs peft, which nothing else here does.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import save_file

from noisycond.denoisers.conditional import ConditionalDenoiser
from noisycond.errors import InputError, in_one_line, require


# The projections of every attention, as in Diffusers' example scripts.
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


def add_lora(
    denoiser: ConditionalDenoiser, rank: int, alpha: float | None = None, target_modules: Sequence[str] = ()
) -> None:
    """Freezes the denoiser and adds LoRA to its projections, see [`inject_lora`]; its text encoder is left as it is.

    Args:
        denoiser: around a model of diffusers.
    """
    denoiser.backbone.requires_grad_(False)
    inject_lora(denoiser.backbone.model, rank, alpha, target_modules)


def inject_lora(
    model: ModelMixin,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] = (),
    switch: str = "--use_lora",
) -> None:
    """Freezes a model and adds W + (α/r) B A to the weights W of its projections: A [r, in] is drawn from torch's
    generator with standard deviation 1/r and B [out, r] starts at 0, so that nothing changes at first. A and B are
    float32.

    Args:
        model: of diffusers.
        rank: r. alpha: α; None: r.
        target_modules: the ends of the names of the layers to adapt; none: those of [`ATTENTION`].
        switch: what asked for it, for messages.

    Raises:
        InputError: the model has no such layers, one of them cannot be adapted, or peft is not installed.
    """
    names = [name for name, _ in model.named_modules()]
    missing = [end for end in target_modules or ATTENTION if not any(_ends(name, end) for name in names)]
    kind = type(model).__name__
    require(
        not target_modules or not missing,
        f"--lora_target_modules: no layer of the {kind} has a name that ends in {' or '.join(missing)}.",
    )
    require(
        len(missing) < len(ATTENTION),
        f"{switch}: the {kind} has no attention that LoRA of rank {rank} could adapt (layers named "
        f"{', '.join(ATTENTION)}); name other layers with --lora_target_modules.",
    )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise InputError(
            f"{switch} needs peft, which is not installed; run: pip install peft (or .[lora] in the checkout)"
        ) from error
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        init_lora_weights="gaussian",
        target_modules=list(target_modules or ATTENTION),
    )
    model.requires_grad_(False)
    try:
        if hasattr(model, "add_adapter"):
            model.add_adapter(config, ADAPTER)
        else:  # not every model of diffusers has it
            inject_adapter_in_model(config, model, ADAPTER)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"--lora_target_modules: peft cannot adapt them ({in_one_line(error)}).") from error
    for value in model.parameters():
        if value.requires_grad:
            value.data = value.data.float()


def merged_state(model: ModelMixin) -> dict[str, torch.Tensor]:
    """A model's weights with its LoRA, if it has one, merged in: W + (α/r) B A under the name of W."""
    state = model.state_dict()
    if not any(".lora_" in name for name in state):
        return state
    from peft.tuners.lora import LoraLayer

    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + module.get_delta_weight(ADAPTER)
    return merged


def has_lora(model: ModelMixin) -> bool:
    """Whether a model of diffusers has the adapters of [`add_lora`]."""
    return ADAPTER in getattr(model, "peft_config", {})


def save_lora(pipeline: DiffusionPipeline, denoiser: ConditionalDenoiser, folder: Path | str) -> None:
    """Writes the adapters' weights, float32, as the pipeline's or the model's own method reads them:

    - `pytorch_lora_weights.safetensors` for `load_lora_weights` of the pipeline (Stable Diffusion);
    - the same file for `load_lora_adapter` of the model, where only that has such a method (LDM);
    - `adapter_model.safetensors` and `adapter_config.json` of peft, where neither has (PixArt-α in diffusers).

    Args:
        pipeline: of the class that they are for. folder: may hold other files.
    """
    from peft.utils import get_peft_model_state_dict

    model = denoiser.backbone.model
    layers = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    layers = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in layers.items()}
    if hasattr(pipeline, "load_lora_weights"):
        slot = _slot(pipeline)
        metadata = {f"{slot}_lora_adapter_metadata": model.peft_config[ADAPTER].to_dict()}
        pipeline.save_lora_weights(str(folder), weight_name=WEIGHTS, **{f"{slot}_lora_layers": layers}, **metadata)
    elif hasattr(model, "load_lora_adapter"):
        model.save_lora_adapter(str(folder), ADAPTER, weight_name=WEIGHTS)
    else:
        model.peft_config[ADAPTER].save_pretrained(str(folder))
        layers = {f"base_model.model.{name}": value for name, value in layers.items()}  # as peft names a wrapped one's
        save_file(layers, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def how_to_load(pipeline: DiffusionPipeline, location: Path | str) -> str:
    """Code that loads what [`save_lora`] wrote, from a folder or Hub id, into such a `pipeline`."""
    slot = _slot(pipeline)
    if hasattr(pipeline, "load_lora_weights"):
        return f'pipeline.load_lora_weights("{location}")'
    if hasattr(getattr(pipeline, slot), "load_lora_adapter"):
        return f'pipeline.{slot}.load_lora_adapter("{location}", prefix=None, weight_name="{WEIGHTS}")'
    return (
        "from peft import PeftModel\n"
        f'pipeline.{slot} = PeftModel.from_pretrained(pipeline.{slot}, "{location}").merge_and_unload()'
    )


def _slot(pipeline: DiffusionPipeline) -> str:
    return next(name for name in ("unet", "transformer") if hasattr(pipeline, name))


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
