#!/usr/bin/env python
"""Prepares a dataset for personalization: keeps some classes, makes the images square, and puts control images (Canny
edges, masks) and captions beside them; on any number of processes, resumable.

accelerate launch prepare_dataset.py                            # handwritten digits, into runs/digits-controls
accelerate launch prepare_dataset.py --train_data_dir imagenet/train --class_subset 100 --output_dir imagenet100 \
    --annotations canny sam caption --sam_model facebook/sam-vit-base \
    --caption_model Salesforce/blip-image-captioning-base
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


try:
    from noisycond import hardware
    from noisycond.arguments import SourceArguments, flag, parse_arguments
    from noisycond.cards import dataset_card, public_name
    from noisycond.data.annotation import AnnotationArguments, described, open_annotators
    from noisycond.data.images import BadImages, Transform
    from noisycond.data.preparation import Preparation, prepare
    from noisycond.data.shard_names import public_settings
    from noisycond.data.sources import ImageSource, open_source
    from noisycond.errors import one_sentence_errors, require
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


@dataclass
class PrepareArguments(SourceArguments, AnnotationArguments):
    output_dir: str = flag("prepared-dataset", "The folder of the prepared dataset; half made, it lies beside it.")
    dataset_split: str = flag("train", "The split to prepare. `digits` has `train` (80 %) and `test` (20 %).")
    label_column: str | None = flag("label", "The dataset's column of class labels; `none` where it has no classes.")
    resolution: int = flag(
        256, "Images are resized so that their shorter side is this long, and their centre cropped square."
    )
    cpu_threads_per_process: int | None = flag(None, "Threads on CPU; by default the cores are shared.")

    def __post_init__(self):
        super().__post_init__()
        if self.label_column == "none":
            self.label_column = None
            require(self.class_subset is None, "--class_subset has no effect with --label_column none; leave it off.")
        require(
            self.dataset_name != "digits" or self.is_default("label_column"),
            "--label_column has no effect with --dataset_name digits: they bring their labels.",
        )
        threads = self.cpu_threads_per_process
        require(threads is None or threads > 0, f"--cpu_threads_per_process is {threads}, but it must be positive.")
        output = Path(self.output_dir).resolve()
        require(output != Path.cwd().resolve(), "--output_dir must name a folder other than the current one.")
        require(
            self.train_data_dir is None or not output.is_relative_to(Path(self.train_data_dir).resolve()),
            f"--output_dir {self.output_dir} lies in --train_data_dir {self.train_data_dir}, where it would be one "
            "more class; name another folder.",
        )


def describe(args: PrepareArguments, source: ImageSource, count: int, unreadable: Sequence[str]) -> str:
    """The text of the dataset's README.md; arguments as for [`Preparation`]'s `card`."""
    dataset = public_name(args.dataset_name or args.train_data_dir)
    columns = {"image": f"the image, {args.resolution} × {args.resolution} pixels"}
    if source.class_names:
        columns["label"] = f"its class, one of {len(source.class_names)}"
    columns |= described(args) | {"id": "the path of the image in the source, or its split and index"}
    settings = {
        "source": dataset if args.train_data_dir else f"{dataset}, split {args.dataset_split}",
        "classes": "all of them",
        "examples": count,
        "images left out": len(unreadable),
        "interpolation": args.image_interpolation_mode,
        "seed": args.seed,
    }
    if args.class_subset is not None:
        by_number = args.class_subset.isdigit()
        settings["classes"] = (
            f"{args.class_subset}, drawn with seed {args.class_subset_seed}"
            if by_number
            else (f"those of {public_name(args.class_subset)}")
        )
    why = "could not be read or have no caption" if "caption" in args.annotations else "could not be read"
    below = f"Left out, for they {why}: " + ", ".join(f"`{key}`" for key in unreadable)
    title = f"{dataset} with {', '.join(args.annotations)}"
    return str(dataset_card(title, columns, settings, below if unreadable else ""))


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(PrepareArguments, argv, default_recipe="prepare_digits")
    accelerator = hardware.make_sampling_accelerator(args)
    source = open_source(args)
    annotators = open_annotators(args, source, accelerator.device)
    facts = {"dataset": source.fingerprint, "examples": len(source), "classes": source.class_names}
    asked = Preparation(
        source,
        Transform(args.resolution, center_crop=True, interpolation=args.image_interpolation_mode),
        annotators.by_column,
        args.annotation_batch_size,
        {"arguments": public_settings(args), "facts": facts | annotators.facts},
        lambda count, unreadable: describe(args, source, count, unreadable),
    )
    annotated = prepare(asked, Path(args.output_dir), BadImages(args.max_bad_images), accelerator)
    if accelerator.is_main_process:
        added = ", ".join(annotators.by_column)
        print(f"{args.output_dir} has {added} beside its images; {annotated} images were annotated now.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
