"""Class labels or prompts to images through a pipeline, with a random stream of its own for every image.

Letters: N images, K classes.
"""

import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from contextlib import contextmanager

import diffusers
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, LCMScheduler
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from noisycond import randomness
from noisycond.errors import InputError, closest, in_one_line, require
from noisycond.first_stage import state_hash
from noisycond.pipelines import (
    LDMClassToImageControlPipeline,
    LDMClassToImagePipeline,
    LDMTextToImageControlPipeline,
    LDMTextToImagePipeline,
    OriginalDiTPipeline,
)
from noisycond.randomness import Purpose


logger = logging.getLogger(__name__)
OWN_PIPELINES = {
    kind.__name__: kind
    for kind in (
        LDMClassToImageControlPipeline,
        LDMClassToImagePipeline,
        LDMTextToImageControlPipeline,
        LDMTextToImagePipeline,
        OriginalDiTPipeline,
    )
}
# What pipelines read of their scheduler beside its timesteps, and what they give to its `step`.
USED_BY_PIPELINES = ("init_noise_sigma", "scale_model_input", "step")
STEP = ("model_output", "timestep", "sample")
# What a text-to-image pipeline is called with here.
TEXT_TO_IMAGE = ("prompt", "guidance_scale", "num_inference_steps", "generator")
# Arguments that show that a pipeline which takes a prompt draws from more than that, or draws no images.
MORE_THAN_A_PROMPT = ("image", "images", "mask_image", "control_image", "video", "num_frames", "audio_length_in_s")
# What makes pipelines obey control images; each has a scale of its own in their call.
CONTROLLING = ("controlnet", "adapter")


def balanced_labels(count: int, num_classes: int) -> torch.LongTensor:
    """N labels that go through the classes in turn: 0, 1, …, K - 1, 0, …; counts differ by one at most."""
    return torch.arange(count) % num_classes


def random_labels(count: int, num_classes: int, seed: int) -> torch.LongTensor:
    """N labels drawn uniformly, a function of the seed and each image's number."""
    return randomness.randint(seed, Purpose.SAMPLED_CLASS, torch.arange(count), num_classes)


def takes_prompts(pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
    """Whether a pipeline, or those of a class, draws from prompts, and not from class labels."""
    return "prompt" in _parameters(pipeline)


def takes_controls(pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
    """Whether a pipeline, or those of a class, draws each image after a control image too."""
    takes = _parameters(pipeline)
    return "image" in takes and any(f"{name}_conditioning_scale" in takes for name in CONTROLLING)


def number_of_controls(pipeline: DiffusionPipeline) -> int:
    """How many control images an image is drawn after: as many as the pipeline has ControlNets or adapters."""
    model = next((model for _, model in _controlling(pipeline)), None)
    several = getattr(model, "nets", None) or getattr(model, "adapters", None) or model
    return len(several) if isinstance(several, (list, tuple, torch.nn.ModuleList)) else int(model is not None)


def _controlling(pipeline: DiffusionPipeline) -> list[tuple[str, object]]:
    """The components of a pipeline that read control images, by name."""
    takes = _parameters(pipeline)
    found = [(name, getattr(pipeline, name, None)) for name in CONTROLLING if f"{name}_conditioning_scale" in takes]
    return [(name, model) for name, model in found if model is not None]


def _parameters(pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> set[str]:
    return set(inspect.signature(pipeline.__call__).parameters)


def _call(
    pipeline: DiffusionPipeline,
    conditions: Sequence[int | str],
    *,
    controls: Sequence[Image.Image] | None = None,
    conditioning_scale: float = 1.0,
    **options,
) -> list:
    """What a pipeline returns as images."""
    if controls is not None:
        options |= _control_options(pipeline, controls, conditioning_scale)
    if not takes_prompts(pipeline):
        return pipeline([int(label) for label in conditions], **options).images
    if "use_resolution_binning" in _parameters(pipeline):
        # It maps sizes to those that large models were trained with, and fails for others; images of the model's own
        # size need no mapping.
        options["use_resolution_binning"] = False
    return pipeline(prompt=[str(prompt) for prompt in conditions], **options).images


def _control_options(pipeline: DiffusionPipeline, controls: Sequence[Image.Image], conditioning_scale: float) -> dict:
    """What a pipeline's call takes for one control image per image."""
    (name, model), side = _controlling(pipeline)[0], image_size(pipeline)
    # Some T2I-Adapters for edges read grey images; what else there is reads RGB.
    mode = "L" if name == "adapter" and model.config.get("in_channels") == 1 else "RGB"
    options = {"image": [control.convert(mode) for control in controls]}
    options[f"{name}_conditioning_scale"] = float(conditioning_scale)  # ControlNet's refuses whole numbers
    # Else stock pipelines make images of the first control's size.
    return options | ({"height": side, "width": side} if "height" in _parameters(pipeline) else {})


def sample(
    pipeline: DiffusionPipeline,
    conditions: Sequence[int] | Sequence[str],
    numbers: Sequence[int],
    *,
    seed: int,
    guidance_scale: float,
    num_inference_steps: int,
    controls: Sequence[Image.Image] | None = None,
    conditioning_scale: float = 1.0,
) -> list[Image.Image]:
    """One batch of images.

    Args:
        pipeline: a class-conditional pipeline (`DiTPipeline`, `LDMClassToImagePipeline`) or a text-to-image one.
        conditions: a class label or a prompt per image, as the pipeline takes them.
        numbers: each image's number, from which, with the seed, its noise is drawn.
        controls: of a pipeline that [`takes_controls`], a control image per image, RGB, of any size.
        conditioning_scale: what the residuals of the ControlNet, or the features of the adapter, are multiplied by.
    """
    if controls is not None and len(controls) != len(conditions):
        raise ValueError(f"there are {len(controls)} controls for {len(conditions)} images")
    generators = [randomness.generator_for(seed, Purpose.SAMPLING, int(number)) for number in numbers]
    return _call(
        pipeline,
        conditions,
        guidance_scale=guidance_scale,
        generator=generators,
        num_inference_steps=num_inference_steps,
        controls=controls,
        conditioning_scale=conditioning_scale,
    )


def class_rows(num_classes: int, per_class: int, limit: int = 10) -> list[int]:
    """Labels for a sample grid: `per_class` of each of at most `limit` classes, spread evenly over all."""
    shown = min(num_classes, limit)
    return [row * num_classes // shown for row in range(shown) for _ in range(per_class)]


def sample_all(
    pipeline: DiffusionPipeline,
    conditions: Sequence[int] | Sequence[str],
    *,
    batch_size: int = 50,
    controls: Sequence[Image.Image] | None = None,
    **settings,
) -> list[Image.Image]:
    """Images 0 to N - 1 with these class labels or prompts, and control images where there are some, in batches, with
    a progress bar; the settings are those of [`sample`]."""
    images: list[Image.Image] = []
    for first in tqdm(range(0, len(conditions), batch_size), desc="sampling", unit="batch"):
        batch = conditions[first : first + batch_size]
        of_batch = None if controls is None else controls[first : first + batch_size]
        images += sample(pipeline, batch, range(first, first + len(batch)), controls=of_batch, **settings)
    return images


def sample_from_noise(
    pipeline: DiffusionPipeline,
    conditions: Sequence[int] | Sequence[str],
    noise: torch.Tensor,
    *,
    guidance_scale: float,
    num_inference_steps: int,
    output_type: str = "pil",
    step_seed: int | None = None,
    controls: Sequence[Image.Image] | None = None,
    conditioning_scale: float = 1.0,
):
    """Images that start from given noise, with the pipeline's own sampling loop.

    Args:
        conditions: a class label or a prompt per image. noise [N, C, h, w]: float32, of variance 1.
        output_type: one of the pipeline's.
        step_seed: for a scheduler that adds noise in its steps: it is drawn from this seed, the same for each image.
        controls, conditioning_scale: as of [`sample`].

    Returns:
        What the pipeline returns as images, a list for `pil`.

    Raises:
        RuntimeError: the pipeline takes no `latents`, and its first noise is not drawn as in diffusers' `DiTPipeline`.
    """
    options = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    options |= {"output_type": output_type, "controls": controls, "conditioning_scale": conditioning_scale}
    if step_seed is not None:
        options["generator"] = [randomness.generator_for(step_seed, Purpose.LATENT_WALK, 0) for _ in conditions]
    if "latents" in _parameters(pipeline):
        if takes_prompts(pipeline):  # unlike ours, they do not bring it to their own precision
            noise = noise.to(pipeline.device, pipeline.dtype)
        return _call(pipeline, conditions, latents=noise, **options)
    with _first_draw(pipeline, noise):
        return _call(pipeline, conditions, **options)


def noise_shape(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """C, h and w of the noise that a pipeline's images start from.

    Raises:
        InputError: neither a U-Net nor a transformer of the pipeline tells.
    """
    model = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    size = None if model is None else model.config.get("sample_size")
    if size is None:
        raise InputError(
            f"--pipeline: the configuration of a {type(pipeline).__name__} does not tell the size of its images "
            "(sample_size of `unet` or `transformer`), so they can be drawn by generate.py but not measured from here."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return model.config.in_channels, height, width


def image_size(pipeline: DiffusionPipeline) -> int:
    """The side of a pipeline's images in pixels.

    Raises:
        InputError: see [`noise_shape`].
    """
    side = noise_shape(pipeline)[1]
    first_stage = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if first_stage is None:  # it draws pixels
        return side
    if hasattr(pipeline, "vae_scale_factor"):
        return side * pipeline.vae_scale_factor
    return side * 2 ** (len(first_stage.config.block_out_channels) - 1)


@contextmanager
def _first_draw(pipeline: DiffusionPipeline, noise: torch.Tensor):
    """A context in which the pipeline's module draws this noise. `DiTPipeline` takes no latents: it calls its module's
    `randn_tensor` once and nothing else there does, so the loop stays the pipeline's own."""
    module = inspect.getmodule(inspect.unwrap(type(pipeline).__call__))
    original = getattr(module, "randn_tensor", None)
    if original is None:
        raise RuntimeError(f"{type(pipeline).__name__} takes no latents, and its module has no randn_tensor.")
    drawn = []

    def given(shape, generator=None, device=None, dtype=None, layout=None):
        drawn.append(tuple(shape))
        if drawn != [tuple(noise.shape)]:
            raise RuntimeError(f"{type(pipeline).__name__} drew noise of {drawn}, not once of {tuple(noise.shape)}.")
        return noise.to(device, dtype)

    module.randn_tensor = given
    try:
        yield
    finally:
        module.randn_tensor = original
    if not drawn:
        raise RuntimeError(f"{type(pipeline).__name__} drew no noise by its module's randn_tensor.")


def open_pipeline(name_or_path: str, trust_remote_code: bool = False) -> DiffusionPipeline:
    """The pipeline in a folder or on the Hub, in float32 and without progress bars. One of our own classes, exported
    here or in the layout of the released checkpoints, is opened by the installed class: no code of the folder is run.

    A safety checker is left out, with a warning: it puts black images in the place of some, which metrics would count.

    Raises:
        InputError: there is none, or it takes neither class labels nor prompts, or takes more than these and control
            images.
    """
    with _opening(name_or_path):
        kind = OWN_PIPELINES.get(pipeline_class_name(name_or_path), DiffusionPipeline)
        left_out = _safety_checker_left_out(name_or_path)
        with _without_the_note_on_id2label():
            pipeline = kind.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **left_out)
    _refuse_other_conditions(type(pipeline), name_or_path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def declared_class(name_or_path: str) -> type | None:
    """The class that a folder's or Hub id's index declares; None where that is not known before its code is run.

    Raises:
        InputError: there is no index, it is damaged, or the class cannot be drawn from; see [`open_pipeline`].
    """
    with _opening(name_or_path):
        name = pipeline_class_name(name_or_path)
        is_of_diffusers = isinstance(DiffusionPipeline.load_config(name_or_path).get("_class_name"), str)
    kind = OWN_PIPELINES.get(name) or (getattr(diffusers, name, None) if is_of_diffusers else None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        return None
    _refuse_other_conditions(kind, name_or_path)
    return kind


@contextmanager
def _opening(name_or_path: str):
    """A context in which what diffusers cannot open becomes an InputError."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"--pipeline {name_or_path}: diffusers cannot open it ({in_one_line(error)}).") from error


def _safety_checker_left_out(name_or_path: str) -> dict:
    """The options of `from_pretrained` that leave out a safety checker; none where the folder has none."""
    if (DiffusionPipeline.load_config(name_or_path).get("safety_checker") or [None])[0] is None:
        return {}
    _say_that_it_is_left_out(name_or_path)
    return {"safety_checker": None, "requires_safety_checker": False}


@functools.cache  # a pipeline is opened again for its figures
def _say_that_it_is_left_out(name_or_path: str) -> None:
    logger.warning(
        "%s has a safety checker, which would put black images in the place of some: the pipeline is opened without "
        "it, so that metrics see what the model draws.",
        name_or_path,
    )


def _refuse_other_conditions(kind: type[DiffusionPipeline], name_or_path: str) -> None:
    said, takes = f"--pipeline {name_or_path}: a {kind.__name__}", _parameters(kind)
    if "class_labels" in takes:
        return
    require("prompt" in takes, f"{said} does not take class labels, nor prompts.")
    more = [name for name in MORE_THAN_A_PROMPT if name in takes and not (name == "image" and takes_controls(kind))]
    require(not more, f"{said} draws no images from prompts alone: it takes `{more[0] if more else ''}` too.")
    lacking = [name for name in TEXT_TO_IMAGE if name not in takes]
    require(not lacking, f"{said} cannot be drawn from: it does not take `{lacking[0] if lacking else ''}`.")


@contextmanager
def _without_the_note_on_id2label():
    """A context in which diffusers does not remark that JSON keeps labels as text; its own pipeline reads them so."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def is_another(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Expected types for id2label")

    logger.addFilter(is_another)
    try:
        yield
    finally:
        logger.removeFilter(is_another)


def pipeline_class_name(name_or_path: str) -> str | None:
    """The class that a folder's or Hub id's index declares, without the module it may name beside it.

    Raises:
        OSError: there is no index.
    """
    declared = DiffusionPipeline.load_config(name_or_path).get("_class_name")
    return declared[-1] if isinstance(declared, (list, tuple)) else declared


def set_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Swaps in another scheduler of diffusers by its class name, with the noise schedule of the present one.

    Raises:
        InputError: diffusers has no such scheduler, it cannot stand in for the present one, or the pipeline takes no
            other than its own.
    """
    said, known = f"--scheduler {name}", [entry for entry in dir(diffusers) if entry.endswith("Scheduler")]
    if name not in known:
        raise InputError(f"{said}: diffusers has no such scheduler{closest(name, known)}.")
    require(
        name == LCMScheduler.__name__ or not _is_consistency_model(pipeline),
        f"{said}: a {type(pipeline).__name__} of a latent consistency model samples by {LCMScheduler.__name__} alone; "
        "leave it off.",
    )
    try:
        scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{said}: it cannot be made from the pipeline's own ({in_one_line(error)}).") from error
    _refuse_other_use(scheduler, pipeline.scheduler, said)
    pipeline.scheduler = scheduler


def _is_consistency_model(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline's model was distilled for a few steps: its own call, or its U-Net, which reads an embedding
    of the guidance scale (Section 4.2 of arXiv:2310.04378), tells."""
    unet = getattr(pipeline, "unet", None)
    embeds_guidance = unet is not None and unet.config.get("time_cond_proj_dim") is not None
    return embeds_guidance or "original_inference_steps" in _parameters(pipeline)


def _refuse_other_use(scheduler, present, said: str) -> None:
    """Raises InputError for a scheduler that pipelines cannot call as they call the present one, or that would not
    keep its noise schedule."""
    lacking = [name for name in USED_BY_PIPELINES if hasattr(present, name) and not hasattr(scheduler, name)]
    require(
        not lacking,
        f"{said}: it cannot stand in for the pipeline's {type(present).__name__}: it has no "
        f"`{lacking[0] if lacking else ''}`.",
    )
    needed = [
        parameter.name
        for parameter in inspect.signature(scheduler.step).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    more = [name for name in needed if name not in STEP]
    require(not more, f"{said}: its steps need more than a pipeline gives (`{more[0] if more else ''}`).")
    keeps_schedule = "beta_schedule" in inspect.signature(type(scheduler).__init__).parameters
    require(
        keeps_schedule or "beta_schedule" not in present.config,
        f"{said}: it cannot take the noise schedule of the pipeline's {type(present).__name__}.",
    )


def is_consistency_sampler(scheduler) -> bool:
    """Whether a scheduler is that of a consistency model: its steps are a part of those it was distilled from, and
    noise is drawn in each."""
    return "original_inference_steps" in inspect.signature(scheduler.set_timesteps).parameters


def check_steps(pipeline: DiffusionPipeline, num_inference_steps: int) -> None:
    """Raises InputError where a consistency model is asked for more steps than it was distilled from, or any other
    for more than it has timesteps."""
    scheduler = pipeline.scheduler
    said, config = f"--num_inference_steps is {num_inference_steps}, but {type(scheduler).__name__}", scheduler.config
    most = config.get("original_inference_steps") if is_consistency_sampler(scheduler) else None
    require(
        most is None or num_inference_steps <= most,
        f"{said} takes at most {most} here (its original_inference_steps).",
    )
    timesteps = config.get("num_train_timesteps")
    if timesteps is None:
        return
    # Spaced from the first on, they begin at the offset.
    most = timesteps - (config.get("steps_offset", 0) if config.get("timestep_spacing") == "leading" else 0)
    require(
        num_inference_steps <= most,
        f"{said} takes at most {most} here (num_train_timesteps {timesteps}, steps_offset {timesteps - most}).",
    )


def number_of_classes(pipeline: DiffusionPipeline, name_or_path: str) -> int:
    """K: the length of `id2label` where the folder has one, else the number of class embeddings.

    Raises:
        InputError: a pipeline that is neither built on a DiT nor on a class embedder tells neither.
    """
    names = class_names(name_or_path)
    if names is not None:
        return len(names)
    known = known_classes(pipeline)
    if known is None:
        raise InputError(f"--pipeline {name_or_path}: it has no id2label, so its number of classes is not known.")
    return known


def class_names(name_or_path: str) -> list[str] | None:
    """The names in a folder's or Hub id's `id2label`, in the order of the labels; None where it has none."""
    names = DiffusionPipeline.load_config(name_or_path).get("id2label")
    if not isinstance(names, dict):
        return None
    return [str(names[label]) for label in sorted(names, key=int)]


def known_classes(pipeline: DiffusionPipeline) -> int | None:
    """The number of class embeddings; None for a pipeline that is neither built on a DiT nor on a class embedder.

    The stock pipeline drops `id2label` when it saves; the rows of a smaller model's table that are filled with the
    null embedding (the last row) are no classes then either.
    """
    if getattr(pipeline, "class_embedder", None) is not None:
        return pipeline.class_embedder.null_class
    table = _dit_table(pipeline)
    return None if table is None else int((table != table[-1]).any(dim=1).nonzero().max()) + 1


def class_embeddings(pipeline: DiffusionPipeline) -> torch.Tensor | None:
    """The embeddings of the classes, without the null embedding: [K, D] on the CPU; None like [`known_classes`]."""
    classes = known_classes(pipeline)
    if classes is None:
        return None
    table = _dit_table(pipeline)
    table = pipeline.class_embedder.embedding.weight if table is None else table
    return table[:classes].detach().cpu()


def _dit_table(pipeline: DiffusionPipeline) -> torch.Tensor | None:
    """The class table of a pipeline built on a DiT (that of its first block), null embeddings included."""
    if not isinstance(getattr(pipeline, "transformer", None), DiTTransformer2DModel):
        return None
    return pipeline.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight


def fingerprint(pipeline: DiffusionPipeline) -> str:
    """A hash of all weights, vocabularies and the scheduler's configuration: what images depend on beside the
    arguments."""
    # Which values a scheduler was not given is listed in another order in every process, and changes no image.
    config = {name: value for name, value in pipeline.scheduler.config.items() if name != "_use_default_values"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            digest.update(name.encode() + state_hash(component).encode())
        elif hasattr(component, "get_vocab"):
            digest.update(name.encode() + json.dumps(component.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()
