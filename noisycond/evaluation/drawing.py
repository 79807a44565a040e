"""What is measured: pipelines at guidance scales and seeds, or folders of images, each a set of images on disk."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from noisycond.arguments import SamplingArguments
from noisycond.cards import public_name
from noisycond.control_set import ControlSet
from noisycond.data.sources import ImageSource
from noisycond.errors import require
from noisycond.evaluation.images import open_images
from noisycond.generation import (
    ImageSettings,
    OpenPipeline,
    check_base,
    check_kind,
    controls_of,
    declared_kind,
    draw_images,
    open_for_drawing,
)
from noisycond.prompts import Prompts


@dataclass(frozen=True)
class Subject:
    """A setting to measure: its label, and the trained runs (or folders of images) it stands for."""

    label: str
    members: tuple[str, ...]


@dataclass
class ImageSet:
    """One set of images.

    Attributes:
        member: the pipeline, or the folder of images, as the user named it. option: the flag that named it.
        guidance_scale, seed: of a pipeline's images; None of a folder of images. weights: a hash of the pipeline's.
        controls: that a pipeline's images were drawn after, or None. base: what an adapter stands on; None of others.
    """

    label: str
    member: str
    option: str
    source: ImageSource
    guidance_scale: float | None = None
    seed: int | None = None
    weights: str | None = None
    controls: ControlSet | None = None
    base: str | None = None

    def __str__(self) -> str:
        return self.label if self.guidance_scale is None else f"{self.label}, guidance scale {self.guidance_scale:g}"


def file_name(label: str) -> str:
    """A label as a part of a file's or folder's name."""
    return re.sub(r"[^\w.+-]", "_", label)


def parse_subjects(option: str, words: Sequence[str]) -> list[Subject]:
    """`FOLDER`, or `LABEL=FOLDER,FOLDER` for several runs of one setting. What exists as a path is one folder,
    whatever signs are in its name.

    Raises:
        InputError: a label is empty or comes twice, or a run comes twice under one label.
    """
    subjects = []
    for word in words:
        label, equals, members = word.partition("=")
        if not equals or os.path.exists(word):
            label, equals, members = public_name(word), "", word
        names = [members] if os.path.exists(members) else [name for name in members.split(",") if name]
        whole = word and label and names and (equals or names == [word])
        require(whole, f"{option} {word}: expected FOLDER, or LABEL=FOLDER,FOLDER.")
        _refuse_twice(f"{option} {word}", names)
        subjects.append(Subject(label, tuple(names)))
    twice = [label for label, count in Counter(subject.label for subject in subjects).items() if count > 1]
    require(
        not twice,
        f"{option}: two of them have the label {twice[0] if twice else ''!r}; name one LABEL=FOLDER, or both under "
        "one label as LABEL=A,B if they are runs of one setting.",
    )
    return subjects


def _refuse_twice(where: str, names: Sequence[str]) -> None:
    """Raises where two names are of one run: its images would count twice, and the spread would be too small."""
    first: dict[str, str] = {}
    for name in names:
        place = str(Path(name).resolve()) if os.path.exists(name) else name
        earlier = first.setdefault(place, name)
        same = "comes twice" if earlier == name else f"is {earlier} again"
        require(earlier is name, f"{where}: {name} {same}; name each run of a setting once.")


def open_sets(option: str, subjects: Sequence[Subject], split: str | None) -> list[ImageSet]:
    """Folders of images, as they are.

    Args:
        split: of digits or of datasets among them; see [`noisycond.evaluation.images.open_images`].
    """
    return [
        ImageSet(subject.label, member, option, open_images(option, member, split))
        for subject in subjects
        for member in subject.members
    ]


def draw_sets(
    subjects: Sequence[Subject],
    args: SamplingArguments,
    guidance_scales: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
    accelerator: Accelerator,
    check: Callable[[OpenPipeline], None] = lambda opened: None,
    prompts: Prompts | None = None,
    controls: ControlSet | None = None,
) -> list[ImageSet]:
    """Draws the images of each pipeline at each guidance scale and seed that the folder lacks.

    Args:
        check: called with each pipeline before anything is drawn from it; raises InputError to refuse it.
        prompts: what text-to-image pipelines draw; None where they are class-conditional.
        controls: what pipelines with a ControlNet or adapter draw after; None where they have none.

    Raises:
        InputError: a pipeline cannot be opened, or the folder holds images of something else. Whether each draws
            from prompts or labels, and after controls, as asked, is decided before the first is drawn from.
    """
    for member in (member for subject in subjects for member in subject.members):
        check_base(member, args.base_pipeline)
        kind = declared_kind(member)
        if kind is not None:
            check_kind(member, kind, prompts, controls)
            controls_of(member, controls, args.control_column)
    sets = []
    for subject in subjects:
        for number, member in enumerate(subject.members):
            place = file_name(subject.label) + (f"-{number}" if len(subject.members) > 1 else "")
            opened = open_for_drawing(member, args, accelerator, prompts, controls)
            check(opened)
            for scale in guidance_scales:
                for seed in seeds:
                    here = folder / place / f"guidance-{scale:g}-seed-{seed}"
                    draw_images(opened, ImageSettings.of(args, scale, seed), here, accelerator)
                    source = open_images("--pipeline", str(here))
                    told = (scale, seed, opened.weights, opened.controls, opened.base)
                    sets.append(ImageSet(subject.label, member, "--pipeline", source, *told))
    return sets
