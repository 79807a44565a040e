"""A folder of images drawn from a pipeline: on any number of processes, resumable, the same bits every time.

generation.json   the settings and a hash of the weights
NNNNNN.png        the images, by number
metadata.jsonl    file name and label of each, written when all are there
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from noisycond import sampling
from noisycond.arguments import SamplingArguments
from noisycond.errors import InputError, in_one_line, require, writing
from noisycond.processes import on_all, on_main
from noisycond.prompts import Prompts, open_prompts
from noisycond.run_folder import differences, write_atomically


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
    """

    name: str
    pipeline: DiffusionPipeline
    weights: str
    num_classes: int | None
    class_names: list[str] | None
    prompts: Prompts | None = None

    def conditions(self, settings: ImageSettings) -> tuple[list[int] | list[str], list[dict]]:
        """What each image is drawn from, a class label or a prompt, and what metadata.jsonl says of it."""
        if self.prompts is None:
            labels = settings.labels(self.num_classes).tolist()
            return labels, [{"label": label} for label in labels]
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


def check_kind(name: str, kind: type[DiffusionPipeline], prompts: Prompts | None) -> None:
    """Raises InputError where a class of pipelines draws from prompts and there are none, or the reverse."""
    takes_prompts = sampling.takes_prompts(kind)
    require(
        prompts is not None or not takes_prompts,
        f"--pipeline {name}: a {kind.__name__} draws from prompts; give --prompts.",
    )
    require(
        prompts is None or takes_prompts,
        f"--prompts has no effect on --pipeline {name}: a {kind.__name__} draws from class labels; leave it off.",
    )


def open_for_drawing(
    name: str, args: SamplingArguments, accelerator: Accelerator, prompts: Prompts | None = None
) -> OpenPipeline:
    """Opens a pipeline with the scheduler and the precision that were asked for, on this process's device.

    Raises:
        InputError: it takes prompts and there are none, or the reverse; it cannot sample as asked; or see
            [`noisycond.sampling.open_pipeline`].
    """
    pipeline = sampling.open_pipeline(name, args.trust_remote_code)
    check_kind(name, type(pipeline), prompts)
    if args.scheduler is not None:
        sampling.set_scheduler(pipeline, args.scheduler)
    sampling.check_steps(pipeline, args.num_inference_steps)
    pipeline.to(accelerator.device)
    if args.torch_dtype != "float32":
        pipeline.to(getattr(torch, args.torch_dtype))
    weights = sampling.fingerprint(pipeline)
    if prompts is not None:
        return OpenPipeline(name, pipeline, weights, None, prompts.class_names, prompts)
    num_classes, class_names = sampling.number_of_classes(pipeline, name), sampling.class_names(name)
    return OpenPipeline(name, pipeline, weights, num_classes, class_names)


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
            )
            for number, image in zip(chunks[i], images, strict=True):
                _save_image(image, folder / _file_name(settings, number), opened)

    def list_them() -> None:
        rows = (
            json.dumps({"file_name": _file_name(settings, number)} | row) + "\n" for number, row in enumerate(told)
        )
        with writing(_where(opened, folder), "metadata.jsonl (run the same command again to go on)"):
            write_atomically(folder / "metadata.jsonl", "".join(rows))

    on_all(accelerator, draw)
    on_main(accelerator, list_them)
    return sum(len(chunks[i]) for i in missing)


def _claim(folder: Path, settings: ImageSettings, opened: OpenPipeline) -> None:
    settings_file, where = folder / "generation.json", _where(opened, folder)
    about = {"pipeline": opened.name} | asdict(settings)
    about |= {"weights": opened.weights, "class_names": opened.class_names}
    if opened.prompts is not None:
        about |= {"prompts": opened.prompts.settings()}
    if settings_file.exists():
        earlier = _read_earlier(settings_file, where)
        different = differences(earlier, asdict(settings), {"num_images"})
        if earlier.get("weights") != opened.weights:
            different.append(f"the pipeline {opened.name} has other weights or another scheduler now")
        if _fingerprint_of_prompts(earlier) != _fingerprint_of_prompts(about):
            different.append("the prompts are others now")
        require(not different, f"{where}: it holds images made with other settings: {'; '.join(different)}.")
        count = earlier["num_images"]
        require(
            count <= settings.num_images,
            f"{where}: it holds {count} images, more than the {settings.num_images} asked for; say --num_images "
            f"{count}, or name another folder.",
        )
        if count == settings.num_images:
            return
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


def _fingerprint_of_prompts(about: dict) -> str | None:
    prompts = about.get("prompts")
    return prompts.get("fingerprint") if isinstance(prompts, dict) else None


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


def _save_image(image: Image.Image, path: Path, opened: OpenPipeline) -> None:
    # Beside the name and renamed, so that a file with the name is whole.
    beside = path.with_name(f".{path.name}.part")
    try:
        with writing(_where(opened, path.parent), f"{path.name} (run the same command again to go on)"):
            image.save(beside, format={"jpg": "JPEG"}.get(path.suffix[1:], path.suffix[1:].upper()))
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
