#!/usr/bin/env python
"""Draws images from any class-conditional or text-to-image pipeline folder or Hub id, on any number of processes,
resumable.

accelerate launch generate.py --pipeline runs/demo --num_images 1000 --output_dir runs/demo-images
accelerate launch generate.py --pipeline runs/text --prompts digits:unseen --output_dir runs/text-images
accelerate launch generate.py --pipeline runs/control --controls digits --output_dir runs/control-images
"""

import sys
from dataclasses import dataclass
from pathlib import Path


try:
    from noisycond import hardware
    from noisycond.arguments import SamplingArguments, flag, parse_arguments
    from noisycond.errors import one_sentence_errors, require
    from noisycond.generation import ImageSettings, draw_images, named_conditions, open_for_drawing
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


@dataclass
class GenerateArguments(SamplingArguments):
    pipeline: str | None = flag(None, "A pipeline folder, adapter folder or Hub id.")
    output_dir: str = flag("runs/images", "Where images and metadata.jsonl (texts and labels) are written.")
    guidance_scale: float = flag(4.0, "Classifier-free guidance scale; 1 is off.")
    seed: int = flag(0, "Seed of noise and of random classes or prompts.")

    def __post_init__(self):
        super().__post_init__()
        require(self.pipeline is not None, "--pipeline is needed: a pipeline folder or Hub id.")
        require(
            self.guidance_scale >= 1, f"--guidance_scale is {self.guidance_scale}, but it must be at least 1 (off)."
        )
        require(self.seed >= 0, f"--seed is {self.seed}, but it must not be negative.")


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(GenerateArguments, argv)
    accelerator = hardware.make_sampling_accelerator(args)
    prompts, controls = named_conditions(args, [args.pipeline])
    opened = open_for_drawing(args.pipeline, args, accelerator, prompts, controls)
    settings = ImageSettings.of(args, args.guidance_scale, args.seed)
    drawn = draw_images(opened, settings, Path(args.output_dir), accelerator)
    if accelerator.is_main_process:
        print(f"{args.num_images} images in {args.output_dir}, {drawn} of them drawn now.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
