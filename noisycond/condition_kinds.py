"""The flags of scripts that start from an existing pipeline: those of what it takes as a condition, class labels or
captions."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from noisycond.arguments import Arguments, parse_arguments, peek
from noisycond.denoisers.class_pipelines import declared_class_name, pipeline_index
from noisycond.errors import InputError, require


LABELS, CAPTIONS = "class labels", "captions"
# Pipelines with a U-Net of one condition, by the class that their index names, and what that condition is.
KINDS = {
    "LDMClassToImagePipeline": LABELS,
    "StableDiffusionPipeline": CAPTIONS,
    "LDMTextToImagePipeline": CAPTIONS,
}


class Started(NamedTuple):
    """How a script's command line says what it starts from.

    Attributes:
        flag: that names the pipeline, a field of its arguments. revision: the field of its revision.
        classes: the arguments of a command line, by kind. recipes: those of the embedded default, by kind.
        miniatures: where the pipelines that recipes of miniatures start from come from: a folder, and the command that
            writes it. doing: what is done to the pipeline, for messages.
    """

    flag: str
    revision: str
    classes: Mapping[str, type[Arguments]]
    recipes: Mapping[str, str]
    miniatures: Mapping[str, tuple[str, str]]
    doing: str


def kind_of_pipeline(flag: str, name: str, revision: str | None, doing: str) -> str | None:
    """What a pipeline, a folder or Hub id, takes as a condition, by its index; None where there is no index.

    Raises:
        InputError: it is none of [`KINDS`].
    """
    try:
        index = pipeline_index(name, revision, flag)
    except InputError:
        return None
    kind = declared_class_name(index)
    require(
        kind in KINDS,
        f"{flag} {name}: a {kind} cannot be {doing} here, only a U-Net of one condition: {', '.join(KINDS)}.",
    )
    return KINDS[kind]


def require_kind(flag: str, name: str, class_name: str, kind: str, doing: str) -> None:
    """Raises InputError unless a pipeline of this class takes this kind of condition."""
    require(KINDS.get(class_name) == kind, f"{flag} {name}: a {class_name} cannot be {doing} here by its {kind}.")


def arguments_class(argv: list[str] | None, started: Started) -> type[Arguments]:
    """Which flags a command line has: those of what its pipeline takes as a condition. Of one that cannot be looked
    at, those that fit what is given, which parsing and opening then check.

    Raises:
        InputError: the pipeline can be looked at and is of no kind, or a flag is for another kind.
    """
    classes = started.classes
    said = peek(argv, list(classes.values()), started.recipes[LABELS])
    own = {kind: {item.name for item in fields(cls)} for kind, cls in classes.items()}
    other = {LABELS: own[CAPTIONS] - own[LABELS], CAPTIONS: own[LABELS] - own[CAPTIONS]}
    name = said.get(started.flag)
    kind = kind_of_pipeline(f"--{started.flag}", name, said.get(started.revision), started.doing) if name else None
    if kind is None:  # what is wrong with the name, parsing and opening tell
        return classes[CAPTIONS if said.keys() & other[LABELS] else LABELS]
    alien = sorted(said.keys() & other[kind])
    require(not alien, f"--{''.join(alien[:1])} has no effect: --{started.flag} {name} takes {kind}.")
    return classes[kind]


def parse_by_kind(argv: list[str] | None, started: Started):
    """The arguments of a command line, of the class that [`arguments_class`] finds; see
    [`noisycond.arguments.parse_arguments`].

    Raises:
        InputError: see both, or a recipe of a miniature starts from one that was not trained yet.
    """
    cls = arguments_class(argv, started)
    recipe = next(started.recipes[kind] for kind, its in started.classes.items() if its is cls)
    args = parse_arguments(cls, argv, default_recipe=recipe)
    folder, command = started.miniatures.get(args.recipe, (None, None))
    require(
        folder is None or started.flag in args.given or Path(folder).is_dir(),
        f"--{started.flag} {folder}: what the miniature starts from is not there; train it with accelerate launch "
        f"{command}, or name another.",
    )
    return args
