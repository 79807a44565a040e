"""Existing class-conditional pipelines with a U-Net, taken apart; text_pipelines.py is the twin for prompts.

Letters: K classes, C latent channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from noisycond.denoisers.conditional import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.presets import Preset
from noisycond.denoisers.unet import UNetBackbone
from noisycond.errors import InputError, closest, in_one_line, require
from noisycond.first_stage import FirstStage
from noisycond.pipelines import LDMClassToImagePipeline


@dataclass
class ClassPipelineSource:
    """A class-conditional pipeline by its configuration alone.

    Attributes:
        name, revision: a folder or Hub id, and its revision there. flag: which named it, for messages.
        unet: the U-Net's configuration. scheduler: that of the pipeline's scheduler.
        class_names: of K classes; None where the pipeline does not name them.
    """

    name: str
    revision: str | None
    flag: str
    unet: dict
    scheduler: dict
    class_names: list[str] | None = None

    def latents_of(self, resolution: int) -> Preset:
        """Channels and factor of the latents by the U-Net's configuration, where the first stage is not at hand."""
        return Preset(
            latent_channels=self.unet["in_channels"], factor=max(1, resolution // (self.unet.get("sample_size") or 1))
        )

    @property
    def prediction_type(self) -> str:
        return self.scheduler.get("prediction_type", "epsilon")


def pipeline_index(name: str, revision: str | None, flag: str) -> dict:
    """The index of a pipeline, a folder or Hub id.

    Raises:
        InputError: there is none; names the flag.
    """
    at = {} if revision is None else {"revision": revision}
    try:
        return DiffusionPipeline.load_config(name, **at)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{flag} {name}: neither a folder nor a Hub id of a pipeline ({in_one_line(error)})."
        ) from error


def declared_class_name(index: Mapping) -> str:
    """The class that an index declares, without the module it may name beside it."""
    declared = index.get("_class_name")
    return declared[-1] if isinstance(declared, (list, tuple)) else declared


def find_class_pipeline(name: str, revision: str | None, flag: str) -> ClassPipelineSource:
    """The class-conditional pipeline of that name, a folder or Hub id, by its configurations.

    Raises:
        InputError: its U-Net or scheduler is missing, or it embeds the guidance scale.
    """
    at = {} if revision is None else {"revision": revision}
    index = pipeline_index(name, revision, flag)
    try:
        unet = UNet2DConditionModel.load_config(name, subfolder="unet", **at)
        scheduler = DDIMScheduler.load_config(name, subfolder="scheduler", **at)
    except OSError as error:
        raise InputError(f"{flag} {name}: its U-Net or scheduler is missing ({in_one_line(error)}).") from error
    require(
        unet.get("time_cond_proj_dim") is None,
        f"{flag} {name}: its U-Net was distilled itself (time_cond_proj_dim {unet.get('time_cond_proj_dim')}) and "
        "knows few noise levels; name the model it was distilled from.",
    )
    names = index.get("id2label")
    names = [str(names[label]) for label in sorted(names, key=int)] if isinstance(names, dict) else None
    return ClassPipelineSource(name, revision, flag, unet, scheduler, names)


def open_class_pipeline(source: ClassPipelineSource) -> LDMClassToImagePipeline:
    """The pipeline, in float32.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        pipeline = LDMClassToImagePipeline.from_pretrained(source.name, revision=source.revision)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{source.flag} {source.name}: diffusers cannot open it ({in_one_line(error)}).") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def frozen_denoiser(source: ClassPipelineSource, pipeline: LDMClassToImagePipeline) -> ConditionalDenoiser:
    """Class embedder and U-Net of a pipeline, frozen and in eval mode, with weights of their own."""
    denoiser = empty_denoiser(source, pipeline.class_embedder.null_class)
    denoiser.backbone.model.load_state_dict(pipeline.unet.state_dict())
    denoiser.encoder.table.load_state_dict(pipeline.class_embedder.embedding.state_dict())
    return denoiser.eval().requires_grad_(False)


def empty_denoiser(source: ClassPipelineSource, num_classes: int) -> ConditionalDenoiser:
    """The same with new weights."""
    known = {name: value for name, value in source.unet.items() if not name.startswith("_")}
    backbone = UNetBackbone(**known)
    return ConditionalDenoiser(ClassEncoder(num_classes, backbone.dim), backbone)


def lacks_a_first_stage(source_name: str) -> str:
    """What is said of a pipeline that brings no first stage, where none was named."""
    return f"--pretrained_vae_model_name_or_path is needed: {source_name} has no first stage."


def check_latents(flag: str, name: str, unet: Mapping, first_stage: FirstStage, resolution: int) -> None:
    """Raises InputError where the latents of this first stage at this resolution do not fit a pipeline's U-Net, of
    this configuration."""
    channels, factor = first_stage.latent_channels, first_stage.factor
    require(
        unet.get("in_channels") == channels,
        f"{flag} {name}: its U-Net takes latents of {unet.get('in_channels')} channels, but those of the first stage "
        f"have {channels}.",
    )
    require(
        resolution % factor == 0,
        f"--resolution is {resolution}, but must be a multiple of the first stage's factor {factor}.",
    )
    UNetBackbone.check(unet, resolution // factor, 0)


def match_classes(
    class_names: list[str],
    theirs: list[str] | None,
    known: int,
    flag: str,
    name: str,
    owner: str = "the dataset",
    naming: str | None = "--base_class_names",
) -> list[int]:
    """The labels that a pipeline has for the classes of a dataset, which may be some of its own.

    Args:
        class_names: the dataset's. theirs: the pipeline's K names, aliases separated by commas; None where nobody
            says. known: K. flag, name: of the pipeline, for messages; owner: what the dataset is called there.
        naming: the flag by which a user says what the pipeline's labels mean; None where the script has none.

    Raises:
        InputError: a class that the pipeline does not know or knows twice, or nobody says what its labels mean and
            the dataset has another number of classes.
    """
    if theirs is None:
        require(
            len(class_names) == known,
            f"{flag} {name}: it does not say what its {known} labels mean, and {owner} has {len(class_names)} classes"
            + (f"; give {naming} FILE, a class name per line in the order of its labels." if naming else "."),
        )
        return list(range(known))
    require(
        len(theirs) == known,
        f"{naming or 'what names them'} has {len(theirs)} names, but {flag} {name} knows {known} classes.",
    )
    if class_names == theirs:  # which may have a name twice
        return list(range(known))
    places = _labels_by_name(theirs)
    unknown = [own for own in class_names if own not in places]
    require(
        not unknown,
        f"{flag} {name}: it does not know {len(unknown)} of {owner}'s {len(class_names)} classes, for example "
        f"{''.join(unknown[:1])!r}{closest(''.join(unknown[:1]), list(places))}"
        + (f"; {naming} FILE says what its labels mean." if naming else "."),
    )
    several = [own for own in class_names if len(places[own]) > 1]
    require(
        not several,
        f"{flag} {name}: its labels {' and '.join(str(label) for own in several[:1] for label in places[own])} are "
        f"both called {''.join(several[:1])!r}" + (f"; tell them apart with {naming} FILE." if naming else "."),
    )
    return [places[own][0] for own in class_names]


def _labels_by_name(class_names: list[str]) -> dict[str, list[int]]:
    """The labels that each name stands for; as an alias it stands only for what no whole name says."""
    whole: dict[str, list[int]] = {}
    aliases: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        whole.setdefault(name.strip(), []).append(label)
        for alias in {part.strip() for part in name.split(",")}:
            aliases.setdefault(alias, []).append(label)
    return aliases | whole
