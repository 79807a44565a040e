#!/usr/bin/env python
"""Draws images from any class-conditional pipeline folder or Hub id, on any number of processes, resumable.

accelerate launch generate.py --pipeline runs/demo --num_images 1000 --output_dir runs/demo-images
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


try:
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    from noisycond import hardware, sampling
    from noisycond.arguments import Arguments, flag, parse_arguments
    from noisycond.errors import InputError, one_sentence_errors, require, writing
    from noisycond.processes import on_all, on_main
    from noisycond.run_folder import differences, write_atomically
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


# Settings that may differ when a generation is taken up again: they do not change an image.
MAY_CHANGE = {"recipe", "output_dir", "cpu_threads_per_process"}


@dataclass
class GenerateArguments(Arguments):
    pipeline: str | None = flag(None, "A pipeline folder or Hub id.")
    output_dir: str = flag("runs/images", "Where images and metadata.jsonl (the labels) are written.")
    num_images: int = flag(1000, "Number of images.")
    batch_size: int = flag(50, "Images per chunk; the bits of an image depend on it, not on the number of processes.")
    class_sampling: Literal["balanced", "random"] = flag(
        "balanced", "`balanced`: the classes in turn. `random`: drawn uniformly."
    )
    guidance_scale: float = flag(4.0, "Classifier-free guidance scale; 1 is off.")
    num_inference_steps: int = flag(50, "Sampling steps.")
    scheduler: str | None = flag(
        None, "Another scheduler of diffusers, by class name, e.g. DPMSolverMultistepScheduler."
    )
    image_format: Literal["png", "jpg", "webp"] = flag("png", "File format; metrics want png, which loses nothing.")
    seed: int = flag(0, "Seed of noise and random classes.")
    torch_dtype: Literal["float32", "float16", "bfloat16"] = flag("float32", "Precision of the pipeline's weights.")
    trust_remote_code: bool = flag(
        False, "Allow a pipeline that brings code of others; our own classes are opened without it."
    )
    cpu_threads_per_process: int | None = flag(None, "Threads on CPU; by default the cores are shared.")

    def __post_init__(self):
        super().__post_init__()
        require(self.pipeline is not None, "--pipeline is needed: a pipeline folder or Hub id.")
        for name in ("num_images", "batch_size", "num_inference_steps"):
            require(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}, but it must be positive.")
        require(
            self.guidance_scale >= 1, f"--guidance_scale is {self.guidance_scale}, but it must be at least 1 (off)."
        )
        require(self.seed >= 0, f"--seed is {self.seed}, but it must not be negative.")


def open_folder(args: GenerateArguments, weights: str) -> None:
    """Claims the output folder, or takes up an earlier generation with the same settings and weights (a hash)."""
    folder, settings = Path(args.output_dir), asdict(args)
    settings_file = folder / "generation.json"
    if settings_file.exists():
        try:
            earlier = json.loads(settings_file.read_text())
        except ValueError as error:
            raise InputError(f"{settings_file} is damaged ({error}); name another --output_dir.") from error
        different = differences(earlier, settings, MAY_CHANGE)
        if earlier.get("weights") != weights:
            different.append(f"the pipeline {args.pipeline} has other weights or another scheduler now")
        require(not different, f"--output_dir {folder} holds images made with other settings: {'; '.join(different)}.")
    else:
        require(
            not folder.exists() or not any(folder.glob(f"*.{args.image_format}")),
            f"--output_dir {folder} holds images of something else; name another folder.",
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(settings_file, json.dumps(settings | {"weights": weights}, indent=2) + "\n")


def image_path(args: GenerateArguments, number: int) -> Path:
    return Path(args.output_dir) / f"{number:06d}.{args.image_format}"


def make_labels(args: GenerateArguments, num_classes: int) -> torch.LongTensor:
    if args.class_sampling == "balanced":
        return sampling.balanced_labels(args.num_images, num_classes)
    return sampling.random_labels(args.num_images, num_classes, args.seed)


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(GenerateArguments, argv)
    accelerator = Accelerator(cpu=hardware.no_accelerator())
    hardware.set_up_logging(accelerator)
    if accelerator.device.type == "cpu":
        hardware.set_threads(args.cpu_threads_per_process)
    pipeline = sampling.open_pipeline(args.pipeline, args.trust_remote_code)
    if args.scheduler is not None:
        sampling.set_scheduler(pipeline, args.scheduler)
    pipeline.to(accelerator.device, getattr(torch, args.torch_dtype))
    labels = make_labels(args, sampling.number_of_classes(pipeline, args.pipeline))

    on_main(accelerator, lambda: open_folder(args, sampling.fingerprint(pipeline)))

    # Whole chunks of the global list go to processes: what shares a batch does not depend on their number.
    chunks = [
        range(first, min(first + args.batch_size, args.num_images))
        for first in range(0, args.num_images, args.batch_size)
    ]
    missing = on_main(
        accelerator,
        lambda: [i for i, chunk in enumerate(chunks) if not all(image_path(args, n).exists() for n in chunk)],
    )
    mine = missing[accelerator.process_index :: accelerator.num_processes]

    def draw() -> None:
        for i in tqdm(mine, desc="generating", unit="batch", disable=not accelerator.is_main_process):
            images = sampling.sample(
                pipeline,
                labels[chunks[i].start : chunks[i].stop].tolist(),
                chunks[i],
                seed=args.seed,
                guidance_scale=args.guidance_scale,
                num_inference_steps=args.num_inference_steps,
            )
            for number, image in zip(chunks[i], images, strict=True):
                save_image(image, image_path(args, number))

    on_all(accelerator, draw)
    if accelerator.is_main_process:
        rows = [
            json.dumps({"file_name": image_path(args, number).name, "label": int(label)}) + "\n"
            for number, label in enumerate(labels)
        ]
        write_atomically(Path(args.output_dir) / "metadata.jsonl", "".join(rows))
        drawn = sum(len(chunks[i]) for i in missing)
        print(f"{args.num_images} images in {args.output_dir}, {drawn} of them drawn now.")
    accelerator.end_training()


def save_image(image, path: Path) -> None:
    """Writes beside the name and renames, so that a file with the name is whole."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with writing(f"--output_dir {path.parent}", f"{path.name} (run the same command again to go on)"):
            image.save(beside, format={"jpg": "JPEG"}.get(path.suffix[1:], path.suffix[1:].upper()))
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
