"""A folder of images drawn from a pipeline: on any number of processes, resumable, the same bits every time.

generation.json   the settings and a hash of the weights
NNNNNN.png        the images, by number
controls/         the control images that they are drawn after, where there are some, by their place among the controls
metadata.jsonl    file name, label, text and control of each, written when all are there
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from noisycond import sampling
from noisycond.arguments import SamplingArguments
from noisycond.control_pipelines import AdapterFacts, adapter_facts, base_of, is_adapter, open_control_pipeline
from noisycond.control_set import CONTROL_COLUMN, CONTROL_KEY, ControlSet, open_controls
from noisycond.errors import InputError, in_one_line, require, writing
from noisycond.processes import on_all, on_main
from noisycond.prompts import Prompts, open_prompts
from noisycond.run_folder import differences, write_atomically


CONTROLS = "controls"  # the folder of control images, beside the images


@dataclass(frozen=True)
class ImageSettings:
    """What decides every bit of a set of images beside the pipeline; see [`SamplingArguments`]."""

    num_images: int
    batch_size: int
    class_sampling: str
    guidance_scale: float
    num_inference_steps: int
    scheduler: str | None
    image_format: str
    seed: int
    torch_dtype: str

    @classmethod
    def of(cls, args: SamplingArguments, guidance_scale: float, seed: int) -> "ImageSettings":
        """The settings of one set of images among those that the arguments ask for."""
        shared = {name: getattr(args, name) for name in cls.__dataclass_fields__ if hasattr(args, name)}
        return cls(**shared | {"guidance_scale": guidance_scale, "seed": seed})

    def labels(self, num_classes: int) -> torch.LongTensor:
        """The class of each image, int64 [N]."""
        if self.class_sampling == "balanced":
            return sampling.balanced_labels(self.num_images, num_classes)
        return sampling.random_labels(self.num_images, num_classes, self.seed)

    def chunks(self) -> list[range]:
        """The numbers of the images, by batch. What shares a batch does not depend on the number of processes."""
        starts = range(0, self.num_images, self.batch_size)
        return [range(first, min(first + self.batch_size, self.num_images)) for first in starts]


@dataclass
class OpenPipeline:
    """A pipeline to draw from.

    Attributes:
        name: as the user named it. weights: a hash of weights and scheduler.
        num_classes: K; None of a text-to-image pipeline.
        class_names: K names where the folder has them; of a text-to-image pipeline those of the prompts.
        prompts: what a text-to-image pipeline draws; None of a class-conditional one.
        controls: what a pipeline with a ControlNet or adapter draws after; None of others. control_labels [M]: the
            class that goes with each, int64; None of a text-to-image pipeline.
        base: what an adapter folder stands on here; None of a whole pipeline.
    """

    name: str
    pipeline: DiffusionPipeline
    weights: str
    num_classes: int | None
    class_names: list[str] | None
    prompts: Prompts | None = None
    controls: ControlSet | None = None
    control_labels: np.ndarray | None = None
    base: str | None = None

    def control_places(self, settings: ImageSettings) -> list[int] | None:
        """Which control each image is drawn after; None without controls."""
        if self.controls is None:
            return None
        return self.controls.places(settings.num_images, settings.class_sampling, settings.seed)

    def conditions(self, settings: ImageSettings) -> tuple[list[int] | list[str], list[dict]]:
        """What each image is drawn from, a class label or a prompt, and what metadata.jsonl says of it."""
        conditions, rows = self._classes_or_prompts(settings)
        places = self.control_places(settings)
        if places is not None:
            rows = [row | {CONTROL_KEY: _control_file(place)} for row, place in zip(rows, places, strict=True)]
        return conditions, rows

    def _classes_or_prompts(self, settings: ImageSettings) -> tuple[list[int] | list[str], list[dict]]:
        if self.prompts is None:
            places = self.control_places(settings)
            labels = settings.labels(self.num_classes) if places is None else self.control_labels[places]
            return labels.tolist(), [{"label": label} for label in labels.tolist()]
        places = self.control_places(settings)
        if places is None:
            places = self.prompts.places(settings.num_images, settings.class_sampling, settings.seed)
        rows: list[dict] = [{"text": self.prompts.texts[place]} for place in places]
        if self.prompts.labels is not None:
            rows = [row | {"label": int(self.prompts.labels[place])} for row, place in zip(rows, places, strict=True)]
        return [row["text"] for row in rows], rows


def named_prompts(args: SamplingArguments) -> Prompts | None:
    """The prompts that --prompts names; None where it names none.

    Raises:
        InputError: see [`noisycond.prompts.open_prompts`].
    """
    if args.prompts is None:
        return None
    return open_prompts("--prompts", args.prompts, args.prompt_split, args.prompt_column)


def named_conditions(args: SamplingArguments, pipelines: Sequence[str]) -> tuple[Prompts | None, ControlSet | None]:
    """The prompts and the controls that the flags name, for these pipelines: with --controls the prompts are the
    captions of the same examples, where the pipelines draw from prompts.

    Raises:
        InputError: see [`noisycond.prompts.open_prompts`] and [`noisycond.control_set.open_controls`].
    """
    if args.controls is None:
        return named_prompts(args), None
    controls = open_controls("--controls", args.controls, args.controls_split, args.conditioning_scale)
    asked = args.controls_caption_column is not None
    if asked or any(kind is not None and kind.takes_prompts for kind in map(declared_kind, pipelines)):
        controls = controls.with_captions(args.controls_caption_column)
    return controls.prompts, controls


@dataclass(frozen=True)
class Kind:
    """What pipelines of one kind draw from. `name`: what a message calls them."""

    name: str
    takes_prompts: bool
    takes_controls: bool

    @classmethod
    def of(cls, pipeline: type[DiffusionPipeline]) -> "Kind":
        return cls(f"a {pipeline.__name__}", sampling.takes_prompts(pipeline), sampling.takes_controls(pipeline))


def declared_kind(name: str) -> Kind | None:
    """The kind of a pipeline or adapter folder, as declared; None where that is not known before its code is run.

    Raises:
        InputError: see [`noisycond.sampling.declared_class`] and [`noisycond.control_pipelines.adapter_facts`].
    """
    if is_adapter(name):
        facts = adapter_facts(name)
        return Kind(f"an adapter on {facts.condition}", facts.condition == "captions", True)
    declared = sampling.declared_class(name)
    return None if declared is None else Kind.of(declared)


def check_kind(name: str, kind: Kind, prompts: Prompts | None, controls: ControlSet | None = None) -> None:
    """Raises InputError where a kind of pipelines draws from prompts, or after controls, and there are none, or the
    reverse."""
    require(
        controls is not None or not kind.takes_controls,
        f"--pipeline {name}: {kind.name} draws after control images; give --controls.",
    )
    require(
        controls is None or kind.takes_controls,
        f"--controls has no effect on --pipeline {name}: {kind.name} draws after no control images; leave it off.",
    )
    require(
        prompts is not None or not kind.takes_prompts,
        f"--pipeline {name}: {kind.name} draws from prompts; give "
        f"{'--prompts' if controls is None else '--controls_caption_column'}.",
    )
    if prompts is None or kind.takes_prompts:
        return
    require(
        controls is None or controls.caption_column is not None,
        f"--pipeline {name}: {kind.name} draws from class labels, but another --pipeline from captions; name those of "
        "one kind at a time.",
    )
    raise InputError(
        f"{'--prompts has' if controls is None else 'captions of --controls have'} no effect on --pipeline {name}: "
        f"{kind.name} draws from class labels; leave {'it' if controls is None else '--controls_caption_column'} off."
    )


def check_base(name: str, base: str | None) -> None:
    """Raises InputError where another base was named for what is no adapter."""
    require(
        base is None or is_adapter(name),
        f"--base_pipeline has no effect on --pipeline {name}: it is a whole pipeline and no adapter; leave it off.",
    )


def controls_of(name: str, controls: ControlSet | None, column: str | None) -> ControlSet | None:
    """The controls as a pipeline takes them: of the column that was asked for, or that its adapter was trained on.

    Raises:
        InputError: there is no such column.
    """
    if controls is None:
        return None
    facts = adapter_facts(name) if is_adapter(name) else None
    known = CONTROL_COLUMN if facts is None else facts.control_column
    column = column or known
    return controls.of_column(column, facts.annotator if facts is not None and column == known else None)


def open_for_drawing(
    name: str,
    args: SamplingArguments,
    accelerator: Accelerator,
    prompts: Prompts | None = None,
    controls: ControlSet | None = None,
) -> OpenPipeline:
    """Opens a pipeline, or an adapter folder around its base, with the scheduler and precision that were asked for, on
    this process's device.

    Raises:
        InputError: it takes prompts or controls and there are none, or the reverse; it cannot sample as asked; or see
            [`noisycond.sampling.open_pipeline`] and [`noisycond.control_pipelines.open_control_pipeline`].
    """
    check_base(name, args.base_pipeline)
    facts = adapter_facts(name) if is_adapter(name) else None
    if facts is not None:
        kind = declared_kind(name)
        check_kind(name, kind, prompts, controls)
        pipeline = open_control_pipeline(name, args.base_pipeline)
        other = "class labels" if kind.takes_prompts else "prompts"
        require(
            sampling.takes_prompts(pipeline) == kind.takes_prompts,
            f"--base_pipeline {args.base_pipeline}: it draws from {other}, but --pipeline {name} is {kind.name}.",
        )
    else:
        pipeline = sampling.open_pipeline(name, args.trust_remote_code)
        check_kind(name, Kind.of(type(pipeline)), prompts, controls)
    count = sampling.number_of_controls(pipeline)
    require(count <= 1, f"--pipeline {name}: it takes {count} control images per image, but here each has one.")
    if args.scheduler is not None:
        sampling.set_scheduler(pipeline, args.scheduler)
    sampling.check_steps(pipeline, args.num_inference_steps)
    pipeline.to(accelerator.device)
    if args.torch_dtype != "float32":
        pipeline.to(getattr(torch, args.torch_dtype))
    opened = OpenPipeline(name, pipeline, sampling.fingerprint(pipeline), None, None, prompts)
    opened.controls = controls_of(name, controls, args.control_column)
    whole = name if facts is None else args.base_pipeline or base_of(name)
    opened.base = None if facts is None else whole
    if prompts is not None:
        opened.class_names = prompts.class_names
        return opened
    opened.num_classes = sampling.number_of_classes(pipeline, whole)
    opened.class_names = _class_names(opened, whole, facts, is_own_base=args.base_pipeline is None)
    if controls is not None:
        opened.control_labels = controls.labels(opened.class_names, opened.num_classes, name)
    return opened


def _class_names(opened: OpenPipeline, whole: str, facts: AdapterFacts | None, is_own_base: bool) -> list[str] | None:
    """What the K labels mean. Of an adapter's own base its adapter.json knows best, where a user may have said it;
    another base that names its classes does.

    Args:
        whole: the pipeline, or the base of an adapter folder.
    """
    named = sampling.class_names(whole)
    told = None if facts is None else facts.class_names
    if told is None or len(told) != opened.num_classes:
        return named
    return told if is_own_base else named or told


def draw_images(opened: OpenPipeline, settings: ImageSettings, folder: Path, accelerator: Accelerator) -> int:
    """Draws the images that the folder lacks, on all processes, and lists them in metadata.jsonl.

    A folder of fewer images, made with the same settings, is extended to what it were had all been drawn at once:
    the bits of an image depend on what else is in its batch, so those of a last batch that was not full are drawn
    anew. One of more images is refused.

    Returns:
        How many were drawn now.

    Raises:
        InputError: the folder holds images made otherwise or more of them, or cannot be written to.
    """
    (conditions, told), chunks = opened.conditions(settings), settings.chunks()
    on_main(accelerator, lambda: _claim(folder, settings, opened))
    if opened.controls is not None:
        _save_controls(opened, settings, folder, accelerator)

    def lacking() -> list[int]:
        here = {path.name for path in folder.glob(f"*.{settings.image_format}")}
        return [i for i, chunk in enumerate(chunks) if not all(_file_name(settings, n) in here for n in chunk)]

    missing = on_main(accelerator, lacking)
    mine = missing[accelerator.process_index :: accelerator.num_processes]

    def draw() -> None:
        for i in tqdm(mine, desc="generating", unit="batch", disable=not accelerator.is_main_process or not mine):
            images = sampling.sample(
                opened.pipeline,
                conditions[chunks[i].start : chunks[i].stop],
                chunks[i],
                seed=settings.seed,
                guidance_scale=settings.guidance_scale,
                num_inference_steps=settings.num_inference_steps,
                **_controlled(opened, folder, [told[number] for number in chunks[i]]),
            )
            for number, image in zip(chunks[i], images, strict=True):
                save_image(image, folder / _file_name(settings, number), _where(opened, folder))

    def list_them() -> None:
        rows = (
            json.dumps({"file_name": _file_name(settings, number)} | row) + "\n" for number, row in enumerate(told)
        )
        with writing(_where(opened, folder), "metadata.jsonl (run the same command again to go on)"):
            write_atomically(folder / "metadata.jsonl", "".join(rows))

    on_all(accelerator, draw)
    on_main(accelerator, list_them)
    return sum(len(chunks[i]) for i in missing)


def _save_controls(opened: OpenPipeline, settings: ImageSettings, folder: Path, accelerator: Accelerator) -> None:
    """Writes the control images that the folder lacks, of the size of the pipeline's images, on all processes."""
    side = sampling.image_size(opened.pipeline)

    def lacking() -> list[int]:
        with writing(_where(opened, folder), CONTROLS):
            (folder / CONTROLS).mkdir(exist_ok=True)
        here = {path.name for path in (folder / CONTROLS).glob("*.png")}
        places = sorted(set(opened.control_places(settings)))
        return [place for place in places if Path(_control_file(place)).name not in here]

    missing = on_main(accelerator, lacking)
    mine = missing[accelerator.process_index :: accelerator.num_processes]

    def save() -> None:
        silent = not accelerator.is_main_process or not mine
        for place in tqdm(mine, desc="control images", unit="image", delay=1, disable=silent):
            path = folder / _control_file(place)
            save_image(opened.controls.control(place, side), path, _where(opened, path.parent))

    on_all(accelerator, save)


def _controlled(opened: OpenPipeline, folder: Path, rows: Sequence[dict]) -> dict:
    """What [`noisycond.sampling.sample`] is given beside labels or prompts: the saved control images of these rows."""
    if opened.controls is None:
        return {}
    controls = []
    for row in rows:
        with Image.open(folder / row[CONTROL_KEY]) as image:
            controls.append(image.convert("RGB"))
    return {"controls": controls, "conditioning_scale": opened.controls.scale}


def _control_file(place: int) -> str:
    return f"{CONTROLS}/{place:06d}.png"


def _claim(folder: Path, settings: ImageSettings, opened: OpenPipeline) -> None:
    settings_file, where = folder / "generation.json", _where(opened, folder)
    about = {"pipeline": opened.name} | asdict(settings)
    about |= {"weights": opened.weights, "class_names": opened.class_names}
    if opened.prompts is not None:
        about |= {"prompts": opened.prompts.settings()}
    if opened.controls is not None:
        about |= {"controls": opened.controls.settings(), "base_pipeline": opened.base}
    if settings_file.exists():
        earlier = _read_earlier(settings_file, where)
        different = differences(earlier, asdict(settings), {"num_images"})
        if earlier.get("weights") != opened.weights:
            different.append(f"the pipeline {opened.name} has other weights or another scheduler now")
        for name in ("prompts", "controls"):
            if _said_of(earlier, name, "fingerprint") != _said_of(about, name, "fingerprint"):
                different.append(f"the {name} are others now")
        scales = [_said_of(each, "controls", "conditioning_scale") for each in (earlier, about)]
        if scales[0] != scales[1]:
            different.append(f"--conditioning_scale was {scales[0]} and is {scales[1]}")
        require(not different, f"{where}: it holds images made with other settings: {'; '.join(different)}.")
        count = earlier["num_images"]
        require(
            count <= settings.num_images,
            f"{where}: it holds {count} images, more than the {settings.num_images} asked for; say --num_images "
            f"{count}, or name another folder.",
        )
        if count == settings.num_images:
            return
        places = opened.control_places(replace(settings, num_images=count))
        require(
            places is None or places == opened.control_places(settings)[:count],
            f"{where}: its {count} images are spread over the {len(opened.controls or ())} controls, and "
            f"{settings.num_images} would be spread otherwise; name another folder.",
        )
        with writing(where, settings_file.name):
            # Before the settings, so that an interruption leaves images that the folder lacks, and none too many.
            (folder / "metadata.jsonl").unlink(missing_ok=True)
            for number in range(count - count % settings.batch_size, count):
                (folder / _file_name(settings, number)).unlink(missing_ok=True)
            _write_settings(settings_file, about)
        return
    require(
        not folder.exists() or not any(folder.glob(f"*.{settings.image_format}")),
        f"{where}: it holds images of something else; name another folder.",
    )
    with writing(where, settings_file.name):
        folder.mkdir(parents=True, exist_ok=True)
        _write_settings(settings_file, about)


def _said_of(about: dict, name: str, key: str) -> object:
    """What generation.json says of the prompts or controls; None where it says nothing."""
    settings = about.get(name)
    return settings.get(key) if isinstance(settings, dict) else None


def _read_earlier(settings_file: Path, where: str) -> dict:
    try:
        earlier = json.loads(settings_file.read_text(encoding="utf-8"))
        if not isinstance(earlier["num_images"], int):
            raise ValueError("num_images is no number")
        return earlier
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{where}: {settings_file.name} is damaged ({in_one_line(error)}); remove this folder, or name another."
        ) from error


def _write_settings(settings_file: Path, about: dict) -> None:
    write_atomically(settings_file, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _where(opened: OpenPipeline, folder: Path) -> str:
    # The folder may lie below the one that the user named.
    return f"--pipeline {opened.name}, folder {folder}"


def _file_name(settings: ImageSettings, number: int) -> str:
    return f"{number:06d}.{settings.image_format}"


def save_image(image: Image.Image, path: Path, where: str) -> None:
    """Writes an image beside its name and renames it, so that a file with the name is whole.

    Args:
        where: what a message about a full disk begins with.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with writing(where, f"{path.name} (run the same command again to go on)"):
            image.save(beside, format={"jpg": "JPEG"}.get(path.suffix[1:], path.suffix[1:].upper()))
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
