"""Adapter folders, which a personalization leaves: a ControlNet or a T2I-Adapter at the root, and in adapter.json what
it is for. Here they become pipelines again, around their base.

Letters: K classes of the base.
"""

import functools
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    ModelMixin,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from noisycond.condition_kinds import CAPTIONS, LABELS
from noisycond.denoisers.class_pipelines import declared_class_name
from noisycond.errors import InputError, in_one_line, require
from noisycond.first_stage import SHIPPED, open_first_stage, state_hash
from noisycond.pipelines import (
    LDMClassToImagePipeline,
    LDMTextToImagePipeline,
    ldm_class_to_image_control,
    ldm_text_to_image_control,
)


FACTS = "adapter.json"
LOCAL = "adapter_local.json"  # paths of this machine, which are never pushed
# The files of our control pipelines, each with an adapter of its own, by the condition of the base.
CODE = ldm_class_to_image_control.PIPELINE_FILE
MODULES = {LABELS: ldm_class_to_image_control, CAPTIONS: ldm_text_to_image_control}
KINDS = ("controlnet", "t2i_adapter")


@dataclass
class AdapterFacts:
    """What an adapter folder says of itself.

    Attributes:
        base: the pipeline that it was trained on, a folder or Hub id; revision: of it there.
        condition: `class labels` or `captions`. kind: `controlnet` or `t2i_adapter`.
        control_column: where the controls of its training data stood. annotator: what they are (`canny`, `mask`,
            `sam`), None where nobody said.
        class_names: what the K labels of the base mean, where that is known.
        resolution: side of the images that it was trained on, in pixels. first_stage: another than the base's, where
            it was trained with one. base_weights: SHA-256 of the base's U-Net. Each None where nobody said.

    base and first_stage are as others can read them; where they lie on this machine stands in [`LOCAL`].
    """

    base: str
    revision: str | None
    condition: str
    kind: str
    control_column: str
    annotator: str | None
    class_names: list[str] | None = None
    resolution: int | None = None
    first_stage: str | None = None
    base_weights: str | None = None


def is_adapter(name: str) -> bool:
    """Whether a folder or Hub id is an adapter folder."""
    return _facts_file(name) is not None


def adapter_facts(name: str) -> AdapterFacts:
    """What an adapter folder, or a Hub id of one, says of itself.

    Raises:
        InputError: it is none, or its adapter.json is damaged.
    """
    path = _facts_file(name)
    require(path is not None, f"--pipeline {name}: no adapter folder, for it has no {FACTS}.")
    try:
        facts = AdapterFacts(**json.loads(path.read_text(encoding="utf-8")))
        for key, known in (("condition", tuple(MODULES)), ("kind", KINDS)):
            if getattr(facts, key) not in known:
                raise ValueError(f"its {key} is {getattr(facts, key)!r}, none of {', '.join(known)}")
        if not isinstance(facts.base, str):
            raise ValueError("it names no base")
        return facts
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--pipeline {name}: its {FACTS} is damaged ({in_one_line(error)}).") from error


def _facts_file(name: str) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / FACTS
        return path if path.is_file() else None
    return _facts_file_on_the_hub(name)


@functools.cache  # each pipeline is asked several times, and each answer comes through the network
def _facts_file_on_the_hub(name: str) -> Path | None:
    try:
        return Path(hf_hub_download(name, FACTS))
    except (EntryNotFoundError, LocalEntryNotFoundError, HFValidationError):
        return None
    except HfHubHTTPError as error:
        raise InputError(f"--pipeline {name}: the Hub does not tell what it is ({in_one_line(error)}).") from error


def local_places(**names: str | None) -> dict[str, str]:
    """Where things lie that were named by a folder, by the same names; nothing of a Hub id."""
    shipped = {key: SHIPPED / str(name) for key, name in names.items() if name is not None}
    found = {key: path if path.is_dir() else Path(str(names[key])).expanduser() for key, path in shipped.items()}
    return {key: str(path.resolve()) for key, path in found.items() if path.is_dir()}


def _place(name: str, what: str, said: str | None) -> str | None:
    """Where `base` or `first_stage` of an adapter folder lies: here if it did and does, else what others read."""
    try:
        local = json.loads((Path(name) / LOCAL).read_text(encoding="utf-8"))[what]
        return local if Path(local).is_dir() else said
    except (OSError, ValueError, KeyError, TypeError):
        return said


def base_of(name: str) -> str:
    """Where the base of an adapter folder lies: a folder here, or what others read.

    Raises:
        InputError: see [`adapter_facts`].
    """
    return _place(name, "base", adapter_facts(name).base)


def open_control_pipeline(name: str, base: str | None = None) -> DiffusionPipeline:
    """The control pipeline of an adapter folder or Hub id, in float32.

    Args:
        base: another base than the one it was trained on.

    Raises:
        InputError: adapter or base cannot be opened, or they do not fit together.
    """
    facts = adapter_facts(name)
    adapter = _open_adapter(name, facts.condition)
    known = base or base_of(name)
    flag = f"--base_pipeline {base}" if base else f"--pipeline {name}: its base {known}"
    try:
        pipeline = open_base(known, None if base else facts.revision)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        hint = "" if base else "; say where it is with --base_pipeline"
        raise InputError(f"{flag}: cannot be opened ({in_one_line(error)}){hint}.") from error
    if facts.first_stage is not None:
        place = _place(name, "first_stage", facts.first_stage)
        other = open_first_stage(place, flag=f"--pipeline {name}: its first stage")
        pipeline.register_modules(**{first_stage_slot(pipeline): other.model})
    require(
        base is not None or facts.base_weights in (None, state_hash(pipeline.unet)),
        f"{flag} has other weights than it was trained on; train it anew, or name the base with --base_pipeline, "
        "which is taken as it is.",
    )
    if facts.resolution is not None:
        draw_at(pipeline, facts.resolution)
    try:
        return assemble(pipeline, adapter)
    except ValueError as error:
        raise InputError(f"{flag}: {in_one_line(error)}") from error


def first_stage_slot(pipeline: DiffusionPipeline) -> str:
    """What a pipeline calls its first stage."""
    return "vqvae" if hasattr(pipeline, "vqvae") else "vae"


def _factor(pipeline: DiffusionPipeline) -> int:
    """That of the first stage that the pipeline has now: `vae_scale_factor` is that of the one it was made with."""
    return 2 ** (len(getattr(pipeline, first_stage_slot(pipeline)).config.block_out_channels) - 1)


def native_resolution(pipeline: DiffusionPipeline) -> int | None:
    """The side of the images that a pipeline draws by itself, in pixels; None where its U-Net does not say."""
    size = pipeline.unet.config.sample_size
    size = size[0] if isinstance(size, (list, tuple)) else size
    return None if size is None else size * _factor(pipeline)


def draw_at(pipeline: DiffusionPipeline, resolution: int) -> None:
    """Makes a pipeline draw images of this side by itself; of its U-Net the configuration alone is changed."""
    if native_resolution(pipeline) != resolution:
        pipeline.unet.register_to_config(sample_size=resolution // _factor(pipeline))


def open_base(name: str, revision: str | None = None) -> DiffusionPipeline:
    """A pipeline that can be controlled, in float32 and without a safety checker."""
    kind = declared_class_name(DiffusionPipeline.load_config(name, revision=revision))
    own = {cls.__name__: cls for cls in (LDMClassToImagePipeline, LDMTextToImagePipeline)}
    if kind == StableDiffusionPipeline.__name__:
        return StableDiffusionPipeline.from_pretrained(
            name, revision=revision, safety_checker=None, requires_safety_checker=False
        )
    require(kind in own, f"a {kind} cannot be controlled here.")
    return own[kind].from_pretrained(name, revision=revision)


def _open_adapter(name: str, condition: str) -> ModelMixin:
    classes = {kind.__name__: kind for kind in (ControlNetModel, T2IAdapter, MODULES[condition].LDMAdapter)}
    try:
        kind = ControlNetModel.load_config(name).get("_class_name")
        require(kind in classes, f"--pipeline {name}: it holds a {kind}, none of {', '.join(classes)}.")
        return classes[kind].from_pretrained(name)
    except InputError:
        raise
    except Exception as error:  # diffusers raises whatever a damaged configuration leads to
        raise InputError(f"--pipeline {name}: its adapter cannot be opened ({in_one_line(error)}).") from error


def assemble(base: DiffusionPipeline, adapter: ModelMixin) -> DiffusionPipeline:
    """The control pipeline of a base, whose parts it shares, on the base's device: stock for Stable Diffusion, ours
    for LDM.

    Raises:
        ValueError: they do not fit together.
    """
    slot = "controlnet" if isinstance(adapter, ControlNetModel) else "adapter"
    if isinstance(base, StableDiffusionPipeline):
        # The stock pipelines find out when they are called; ours when they are made.
        ldm_text_to_image_control._check_controls(base.unet, [adapter], base.vae_scale_factor)
        kind = StableDiffusionControlNetPipeline if slot == "controlnet" else StableDiffusionAdapterPipeline
        parts = dict(base.components)
        if kind is StableDiffusionAdapterPipeline:
            parts.pop("image_encoder")
        pipeline = kind(**parts | {"safety_checker": None}, **{slot: adapter}, requires_safety_checker=False)
    else:
        names = base.config.get("id2label")  # of classes; no component
        options = {slot: adapter} | ({} if names is None else {"id2label": names})
        pipeline = control_class(base)(**base.components, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(base.unet.device)


def controlling(pipeline: DiffusionPipeline) -> ModelMixin:
    """What controls a control pipeline: its ControlNet or adapter."""
    controlnet = getattr(pipeline, "controlnet", None)
    return pipeline.adapter if controlnet is None else controlnet


def control_class(base: DiffusionPipeline) -> type[DiffusionPipeline]:
    """Our control pipeline for an LDM."""
    if isinstance(base, LDMClassToImagePipeline):
        return ldm_class_to_image_control.LDMClassToImageControlPipeline
    return ldm_text_to_image_control.LDMTextToImageControlPipeline


def save_adapter(
    adapter: ModelMixin, pipeline: DiffusionPipeline, facts: AdapterFacts, local: dict[str, str], folder: Path
) -> None:
    """Writes an adapter folder: every file aside first and then moved into place, adapter.json last.

    Args:
        local: see [`local_places`].
        pipeline: the control pipeline that it is for, whose code travels along where it is none of diffusers.
        folder: may hold other files, which stay.
    """
    making = folder / ".export.tmp"
    shutil.rmtree(making, ignore_errors=True)
    adapter.save_pretrained(making, safe_serialization=True)
    if not type(pipeline).__module__.startswith("diffusers."):
        MODULES[facts.condition].write_pipeline_file(making)
    (making / LOCAL).write_text(json.dumps(local, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (making / FACTS).write_text(json.dumps(asdict(facts), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / FACTS).unlink(missing_ok=True)
    for path in sorted(making.iterdir(), key=lambda path: path.name == FACTS):
        path.replace(folder / path.name)
    making.rmdir()


def loading_code(
    pipeline: DiffusionPipeline,
    base: str,
    location: str | Path,
    call: str,
    revision: str | None = None,
    first_stage: str | None = None,
) -> str:
    """How to load an adapter folder with diffusers alone, and draw an image.

    Args:
        base, location: where a reader has the base and the adapter folder. call: the arguments of the call beside the
            control image. revision: of the base on the Hub. first_stage: where another than the base's is.
    """
    kind, in_diffusers = type(pipeline).__name__, type(pipeline).__module__.startswith("diffusers.")
    slot = "controlnet" if isinstance(controlling(pipeline), ControlNetModel) else "adapter"
    adapter = type(controlling(pipeline)).__name__
    at = "" if revision is None else f', revision="{revision}"'
    names, utils, load, find = [adapter], ["load_image"], f'{adapter}.from_pretrained("{location}")', ""
    if not hasattr(diffusers, adapter):
        names, load = ["AutoModel"], f'AutoModel.from_pretrained("{location}", trust_remote_code=True)'
    beside = f", {slot}={slot}{at}"
    if first_stage is not None:
        own = first_stage_slot(pipeline)
        autoencoder = type(getattr(pipeline, own)).__name__
        names.append(autoencoder)
        at = next((f', subfolder="{each}"' for each in ("vae", "vqvae") if (Path(first_stage) / each).is_dir()), "")
        find, beside = f'{own} = {autoencoder}.from_pretrained("{first_stage}"{at})\n', f"{beside}, {own}={own}"
    if in_diffusers:
        names.append(kind)
    else:
        # `DiffusionPipeline` would prefer the code of the base's folder to that of a local `custom_pipeline`.
        utils.append("get_class_from_dynamic_module")
        find += f"""{kind} = get_class_from_dynamic_module(
    "{location}", "{CODE}", class_name="{kind}", trust_remote_code=True
)
"""
    return f"""from diffusers import {", ".join(sorted(names))}
from diffusers.utils import {", ".join(sorted(utils))}

{find}{slot} = {load}
pipeline = {kind}.from_pretrained("{base}"{beside})
image = pipeline({call}, image=load_image("control.png")).images[0]
"""
