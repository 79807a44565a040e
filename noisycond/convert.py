"""Released checkpoints and original weights to folders that stock diffusers or a self-contained pipeline opens.

python -m noisycond.convert SOURCE OUTPUT_DIR
"""

import json
import logging
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline, DiTPipeline

from noisycond.arguments import Arguments, flag, parse_arguments, split_words
from noisycond.cards import loading_code, public_name
from noisycond.data.sources import read_class_names
from noisycond.errors import InputError, one_sentence_errors, require, writing
from noisycond.export import export_pipeline, sampling_scheduler
from noisycond.first_stage import open_first_stage
from noisycond.objective import DiffusionObjective, make_betas
from noisycond.originals.dit import convert_dit
from noisycond.originals.folders import open_dit_folder, open_ldm_folder, open_text_folder
from noisycond.originals.ldm import Settings, convert_ldm, read_settings
from noisycond.originals.reading import read_weights, recognize
from noisycond.pipelines import LDMClassToImagePipeline, LDMTextToImagePipeline, OriginalDiTPipeline
from noisycond.sampling import known_classes, pipeline_class_name


logger = logging.getLogger(__name__)
DIT_SCHEDULE = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
KINDS = {
    "ldm": "an original LDM checkpoint",
    "dit": "an original DiT checkpoint",
    "ldm folder": "a folder of an LDM pipeline",
    "dit folder": "a folder of a DiT pipeline",
    "text folder": "a folder of a text-to-image LDM",
}
OPENERS = {"ldm folder": open_ldm_folder, "dit folder": open_dit_folder, "text folder": open_text_folder}


@dataclass
class ConvertArguments(Arguments):
    source: str | None = flag(
        None,
        "A folder or Hub id in the layout of the released checkpoints, or a .ckpt, .pt or .safetensors file of "
        "original LDM or DiT weights. Also the first word that belongs to no flag.",
    )
    output_dir: str | None = flag(None, "A new folder for the pipeline. Also the second such word.")
    config: str | None = flag(None, "For an original LDM: its configuration, a YAML file as in LDM's repository.")
    first_stage: str | None = flag(
        None, "A folder or Hub id of an AutoencoderKL or VQModel; an original DiT needs it, others have their own."
    )
    scaling_factor: float | None = flag(None, "Of the first stage, instead of its own.")
    id2label: str | None = flag(
        None, "Class names: a JSON file, a list or an object with a name per label, or a text file with one per line."
    )
    attention_heads: int | None = flag(
        None, "For original weights, which do not tell it: an LDM has 1 by default, a DiT what its size has."
    )
    resolution: int | None = flag(None, "For an original LDM without --config: side of its images; 256 by default.")
    stock: bool = flag(
        False,
        "For an original DiT: a stock DiTPipeline without code of its own, whose timestep embedding is not the "
        "original's.",
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            self.source is not None and self.output_dir is not None,
            "SOURCE and OUTPUT_DIR are needed: python -m noisycond.convert SOURCE OUTPUT_DIR.",
        )
        for name in ("scaling_factor", "attention_heads", "resolution"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} is {value}, but it must be positive.")
        for name in ("config", "id2label"):
            value = getattr(self, name)
            require(value is None or Path(value).is_file(), f"--{name} {value}: there is no such file.")
        require(
            self.config is None or (self.attention_heads is None and self.resolution is None),
            "--config tells the attention heads and the size; leave --attention_heads and --resolution out.",
        )
        output = Path(self.output_dir)
        # What an interrupted conversion left is no reason to refuse.
        used = [path for path in output.iterdir() if path.name != ".export.tmp"] if output.is_dir() else []
        require(not used and not output.is_file(), f"OUTPUT_DIR {output} is not empty; name a new folder.")


def find_kind(args: ConvertArguments) -> str:
    """What the source is, one of KINDS, for a folder by the class its index declares; original weights are told apart
    when they are read.

    Raises:
        InputError: nothing that can be converted.
    """
    if Path(args.source).is_file():
        return "file"
    try:
        declared = pipeline_class_name(args.source)
    except (OSError, ValueError) as error:
        what = "has no model_index.json" if Path(args.source).is_dir() else "neither a file nor a folder nor a Hub id"
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"SOURCE {args.source}: {what} that can be read ({reason}).") from error
    kinds = {
        LDMClassToImagePipeline.__name__: "ldm folder",
        LDMTextToImagePipeline.__name__: "text folder",
        DiTPipeline.__name__: "dit folder",
    }
    require(
        declared in kinds,
        f"SOURCE {args.source}: its index declares a {declared}, but only {', '.join(kinds)} can be converted.",
    )
    return kinds[declared]


def check_flags(args: ConvertArguments, kind: str) -> None:
    """Raises InputError for a flag that has no effect on this kind of source, or one that it lacks."""
    allowed = {
        "config": ["ldm"],
        "resolution": ["ldm"],
        "attention_heads": ["ldm", "dit"],
        "stock": ["dit"],
        "id2label": [each for each in KINDS if each != "text folder"],
    }
    for name, kinds in allowed.items():
        require(
            getattr(args, name) in (None, False) or kind in kinds,
            f"--{name} has no effect on {KINDS[kind]}, as SOURCE {args.source} is.",
        )
    require(
        kind != "dit" or args.first_stage is not None,
        f"SOURCE {args.source} is a DiT without a first stage: name one with --first_stage (that of the paper is "
        "stabilityai/sd-vae-ft-ema).",
    )


def convert(args: ConvertArguments) -> tuple[DiffusionPipeline, list[str] | None]:
    """The pipeline of the source, and its class names where they are known.

    Raises:
        InputError: it cannot be converted; the message says why.
    """
    kind = find_kind(args)
    # Before the weights, which may take minutes to read.
    settings = read_settings(read_yaml(args.config), Path(args.config)) if args.config else Settings()
    names = read_names(Path(args.id2label)) if args.id2label is not None else None
    if kind == "file":
        path = Path(args.source)
        state, entry = read_weights(path)
        kind = recognize(state, path)
        logger.info("%s: %s%s.", path, KINDS[kind], f", its entry {entry!r}" if entry else "")
    check_flags(args, kind)
    first_stage = None
    if args.first_stage is not None:
        first_stage = open_first_stage(args.first_stage, flag="--first_stage").model
        if args.scaling_factor is not None:
            first_stage.register_to_config(scaling_factor=args.scaling_factor)
    if kind == "ldm":
        settings.attention_heads = args.attention_heads or settings.attention_heads
        options = {"scaling_factor": args.scaling_factor, "first_stage": first_stage}
        pipeline = convert_ldm(state, path, settings, resolution=args.resolution or 256, **options)
    elif kind == "dit":
        pipeline = build_dit(args, convert_dit(state, path, args.attention_heads), first_stage)
    else:
        pipeline = OPENERS[kind](args.source, first_stage, args.scaling_factor)
    check_first_stage(args, pipeline)
    if names is None and kind.endswith("folder"):
        names = names_of_index(args.source)
    check_names(args, pipeline, names)
    return pipeline, names


def build_dit(args: ConvertArguments, transformer, first_stage) -> DiTPipeline:
    """The pipeline of an original DiT, with the noise schedule of its paper."""
    scheduler = sampling_scheduler(DiffusionObjective(make_betas(*DIT_SCHEDULE.values(), 1000)), DIT_SCHEDULE)
    if not args.stock:
        return OriginalDiTPipeline(transformer, first_stage, scheduler)
    logger.warning(
        "Stock diffusers embeds timesteps with other frequencies than the original DiT: predictions differ, the more "
        "so the later the timestep. Without --stock they are the same."
    )
    return DiTPipeline(transformer, first_stage, scheduler)


def check_first_stage(args: ConvertArguments, pipeline: DiffusionPipeline) -> None:
    """Raises InputError where the first stage makes other latents than the denoiser works on."""
    is_dit = isinstance(pipeline, DiTPipeline)
    model, stage = (pipeline.transformer, pipeline.vae) if is_dit else (pipeline.unet, pipeline.vqvae)
    channels = getattr(stage.config, "vq_embed_dim", None) or stage.config.latent_channels
    where = f"--first_stage {args.first_stage}" if args.first_stage else f"SOURCE {args.source}"
    require(
        channels == model.config.in_channels,
        f"{where}: the first stage makes latents of {channels} channels, but the model works on "
        f"{model.config.in_channels}.",
    )
    logger.info("The first stage's scaling factor is %s.", stage.config.scaling_factor)


def check_names(args: ConvertArguments, pipeline: DiffusionPipeline, names: list[str] | None) -> None:
    """Raises InputError where there are more or fewer names than classes."""
    if names is None:
        return
    known = known_classes(pipeline)
    where = f"--id2label {args.id2label}" if args.id2label else f"SOURCE {args.source}: its id2label"
    require(
        len(names) == known,
        f"{where} has {len(names)} names, but the model knows {known} classes (the last row of its table is the null "
        "class).",
    )


def names_of_index(source: str) -> list[str] | None:
    """The class names of a folder's index."""
    names = DiffusionPipeline.load_config(source).get("id2label")
    return _in_order(names, f"SOURCE {source}: its id2label") if isinstance(names, dict) else None


def read_names(path: Path) -> list[str]:
    """Class names by label, from a JSON or text file."""
    if path.suffix != ".json":
        return read_class_names("--id2label", str(path))
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of what is no UTF-8
        raise InputError(f"--id2label {path}: cannot be read as JSON ({error}).") from error
    require(isinstance(names, (dict, list)), f"--id2label {path}: expected a list or an object with a name per label.")
    return _in_order(names, f"--id2label {path}") if isinstance(names, dict) else [str(name) for name in names]


def _in_order(names: dict, where: str) -> list[str]:
    labels = {str(label): str(name) for label, name in names.items()}
    require(
        labels.keys() == {str(label) for label in range(len(labels))},
        f"{where} must have the labels 0 to {len(labels) - 1}, one name each.",
    )
    return [labels[str(label)] for label in range(len(labels))]


def read_yaml(path: str) -> dict:
    """A YAML file of plain values."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not valid YAML ({' '.join(str(error).split())}).") from error


def with_flags(argv: list[str]) -> list[str]:
    """The command line with SOURCE and OUTPUT_DIR, which may stand anywhere in it, as flags."""
    words, flags = split_words(ConvertArguments, argv)
    given = {word.partition("=")[0].replace("-", "_") for word in flags}
    missing = [name for name in ("source", "output_dir") if f"__{name}" not in given]
    named = [f"--{name}={word}" for name, word in zip(missing, words, strict=False)]
    return [*flags, *named, *words[len(named) :]]


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(ConvertArguments, with_flags(list(sys.argv[1:] if argv is None else argv)))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("noisycond").setLevel(logging.INFO)
    pipeline, names = convert(args)
    # What is exported names its source as it was given, not where this machine keeps it.
    for name, part in {"": pipeline, **pipeline.components}.items():
        is_given = args.first_stage is not None and name in ("vae", "vqvae")
        if hasattr(part, "register_to_config"):  # text encoders and tokenizers write no such entry
            part.register_to_config(_name_or_path=public_name(args.first_stage if is_given else args.source))
    with writing(f"OUTPUT_DIR {args.output_dir}", "the pipeline"):
        export_pipeline(pipeline, Path(args.output_dir), names)
    code = textwrap.indent(loading_code(pipeline, args.output_dir), "    ")
    print(f"\nPipeline: {args.output_dir}\n\nLoad it with plain diffusers:\n\n{code}")


if __name__ == "__main__":
    main()
