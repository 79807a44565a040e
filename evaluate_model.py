#!/usr/bin/env python
"""Measures pipelines, or folders of images, against real images: fidelity, diversity, memorization, agreement with
class, prompt and control image.

accelerate launch evaluate_model.py --pipeline runs/demo --reference digits --num_images 1000 --guidance_scale 1 2 4
accelerate launch evaluate_model.py --pipeline runs/text --reference digits --prompts digits:unseen --num_images 360
accelerate launch evaluate_model.py --pipeline runs/control --reference digits --controls digits --num_images 360
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path


try:
    from noisycond import hardware, sampling
    from noisycond.arguments import SamplingArguments, flag, parse_arguments
    from noisycond.data.annotation import CANNY_CHOICES, SAM_CHOICES
    from noisycond.errors import one_sentence_errors, require, writing
    from noisycond.evaluation.drawing import ImageSet, Subject, draw_sets, open_sets, parse_subjects
    from noisycond.evaluation.extraction import size_of
    from noisycond.evaluation.gallery import draw_figures
    from noisycond.evaluation.images import Resize
    from noisycond.evaluation.instruments import Extraction, Instruments, check_size
    from noisycond.evaluation.metrics import METRICS
    from noisycond.evaluation.options import MetricArguments
    from noisycond.evaluation.references import RealImages, open_real
    from noisycond.evaluation.report import check_report_folder, plot_metrics, write_report
    from noisycond.evaluation.rows import check_cards, check_classes, choices, measure, update_cards, why_not
    from noisycond.evaluation.suite import families_of, needs_train, refuse
    from noisycond.evaluation.uncertainty import summarize
    from noisycond.generation import OpenPipeline, controls_of, named_conditions
    from noisycond.processes import on_main
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


# The family of each, and what must have made the controls.
CHOICES_OF_CONTROL = {
    **dict.fromkeys(("edge_tolerance", *CANNY_CHOICES), ("control_edges", "canny")),
    **dict.fromkeys(("sam_model", *SAM_CHOICES), ("control_masks", "sam")),
}


@dataclass
class EvaluateArguments(SamplingArguments, MetricArguments):
    pipeline: list[str] = flag(
        [],
        "Pipeline folders, adapter folders or Hub ids. LABEL=A,B names one setting trained several times; its spread "
        "is shown.",
    )
    images: list[str] = flag(
        [],
        "Instead: folders of images (with metadata.jsonl or a sub-folder per class) or .npz batches; also LABEL=A,B.",
    )
    reference: str | None = flag(
        None,
        "Real images to compare with: `digits`, a folder, a Hub dataset, a batch or statistics (.npz).",
    )
    reference_split: str | None = flag(
        None, "Of digits or a Hub dataset; the default is `test` of digits and `validation` else."
    )
    train_data: str | None = flag(
        None,
        "The training images, for memorization, named as --reference; the default with `digits` is their `train`.",
    )
    output_dir: str = flag("runs/evaluation", "Where images, features, metrics.json, the table and plots are written.")
    num_images: int = flag(50_000, "Images per pipeline, guidance scale and seed.")
    guidance_scale: list[float] = flag([2.25], "Classifier-free guidance scales; 1 is off.")
    seeds: list[int] = flag([0], "Seeds of noise and of random classes or prompts; several give a spread.")
    save_stats: str | None = flag(None, "Write the reference's statistics and features to this .npz, to be reused.")
    extraction_batch_size: int = flag(50, "Images per batch of the feature extractor.")
    dataloader_num_workers: int = flag(0, "Processes that read images; 0 reads in the main one.")
    figures: bool = flag(True, "Draw sample grids, nearest training neighbours and, of pipelines, circular walks.")
    walk_class: int = flag(0, "The class of the circular walk.")
    walk_prompt: str | None = flag(None, "The prompt of the circular walk; the default is the first of --prompts.")
    update_card: bool = flag(False, "Write the results into the model card of each pipeline that is a local folder.")

    def __post_init__(self):
        super().__post_init__()
        require(
            not (self.pipeline and self.images), "--pipeline and --images do not go together: measure them one by one."
        )
        require(
            self.pipeline or self.images or self.save_stats,
            "--pipeline or --images is needed: what is to be measured (or --save_stats, for the reference alone).",
        )
        require(self.reference is not None or not self.save_stats, "--save_stats needs --reference.")
        require(
            self.save_stats is None or self.save_stats.endswith(".npz"),
            f"--save_stats {self.save_stats}: the name of a statistics file must end in .npz.",
        )
        require(self.pipeline or not self.update_card, "--update_card needs --pipeline: images have no model card.")
        for value in self.guidance_scale:
            require(value >= 1, f"--guidance_scale is {value}, but it must be at least 1 (off).")
        for value in self.seeds:
            require(value >= 0, f"--seeds is {value}, but it must not be negative.")
        for name in ("guidance_scale", "seeds"):
            values = getattr(self, name)
            require(values and len(set(values)) == len(values), f"--{name} repeats a value or is empty: {values}.")
        require(
            self.extraction_batch_size > 0,
            f"--extraction_batch_size is {self.extraction_batch_size}, but it must be positive.",
        )
        for name in ("dataloader_num_workers", "walk_class"):
            require(getattr(self, name) >= 0, f"--{name} is {getattr(self, name)}, but it must not be negative.")
        require(self.walk_prompt is None or self.walk_prompt.strip(), "--walk_prompt is empty; leave it off.")
        if self.train_data is None and self.reference == "digits":
            self.train_data = "digits"


def refuse_flags_without_effect(args: EvaluateArguments, real: RealImages | None) -> None:
    """Raises InputError for a flag on the command line that can do nothing here. A recipe's values are left alone:
    they are meant for more than one use."""
    of_pipelines = {item.name for item in fields(SamplingArguments)} - {"recipe", "cpu_threads_per_process"}
    of_pipelines |= {"guidance_scale", "seeds", "walk_class", "walk_prompt"}
    idle = {name: "without --pipeline" for name in of_pipelines if not args.pipeline}
    if args.pipeline and args.prompts is None:
        idle["walk_prompt"] = "without --prompts"
    if args.pipeline and args.controls is not None:
        idle["walk_class"] = idle["walk_prompt"] = "with --controls: the walk is that of the first control"
    if args.pipeline and args.prompts is not None:
        idle["walk_class"] = "with --prompts: the walk is that of a prompt, the first or --walk_prompt"
        idle["clip_prompt"] = "with --prompts: the CLIP score is that of each image and its own prompt"
    if not args.figures:
        idle |= dict.fromkeys(("walk_class", "walk_prompt"), "with --no_figures: the walk is one of them")
    if real is None or real.split is None:
        idle["reference_split"] = "unless --reference is digits or a dataset with splits"
    families = families_of(args.metrics)
    for name, family in (("classifier", "class_agreement"), ("lpips_similarity", "lpips"), ("lpips_pairs", "lpips")):
        if family not in families:
            idle[name] = "with these --metrics"
    for name in ("clip_model", "clip_prompt"):
        if "clip_score" not in args.metrics:
            idle[name] = "without --metrics clip_score"
    _refuse_idle(args, idle)


def refuse_choices_of_no_control(args: EvaluateArguments, annotators: Collection[str | None]) -> None:
    """The same for choices of the metrics of control.

    Args:
        annotators: what made the controls that images are drawn after; none where there are no controls.
    """
    families, idle = families_of(args.metrics), {}
    for name, (family, annotator) in CHOICES_OF_CONTROL.items():
        if family not in families:
            idle[name] = "with these --metrics"
        elif annotator not in annotators:
            idle[name] = f"without controls by `{annotator}`"
    _refuse_idle(args, idle)


def _refuse_idle(args: EvaluateArguments, idle: dict[str, str]) -> None:
    found = sorted(args.given & idle.keys())
    require(not found, f"--{found[0] if found else ''} has no effect {idle[found[0]] if found else ''}; leave it off.")


def refuse_clip_prompt(args: EvaluateArguments, sets: list[ImageSet]) -> None:
    """Raises InputError for a --clip_prompt on the command line where all images have texts of their own."""
    require(
        "clip_prompt" not in args.given or any(image_set.source.texts is None for image_set in sets),
        "--clip_prompt has no effect on these images: their metadata.jsonl has the text of each; leave it off.",
    )


def choose_resize(args: EvaluateArguments, sets: list[ImageSet], real: RealImages | None) -> Resize:
    """The size that all images are compared at: --resolution, or that of the generated ones."""
    if args.resolution is None and not sets:
        require(real.name == "digits", "--save_stats without --pipeline or --images needs --resolution.")
        return Resize(32, args.image_interpolation_mode)
    if args.resolution is None:
        width = size_of(sets[0].option, sets[0].source, Resize())[0]
        for image_set in sets:
            check_size(image_set.option, image_set.source, width)
        return Resize(width, args.image_interpolation_mode)
    return Resize(args.resolution, args.image_interpolation_mode)


def report(args: EvaluateArguments, subjects: list[Subject], rows: list[dict], settings: dict) -> None:
    """Writes metrics.json, the table and the plot, prints the table, and puts results into cards where asked."""
    metrics, folder = [name for name in METRICS if any(name in row["metrics"] for row in rows)], Path(args.output_dir)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in why_not(rows).items())
    require(metrics, f"no metric can be computed ({reasons}).")
    with writing(f"--output_dir {folder}", "the report (what was computed is kept; run the same command again)"):
        print("\n" + write_report(folder, rows, settings, metrics))
        plot_metrics(folder, summarize(rows), metrics)
        if args.update_card:
            update_cards([name for subject in subjects for name in subject.members], rows, settings)
    for name, reason in why_not(rows).items():
        print(f"{name}: not computed, {reason}.")
    print(f"\nTable: {folder / 'metrics.md'}\nValues and every choice made: {folder / 'metrics.json'}")


def parse(argv: list[str] | None = None) -> EvaluateArguments:
    """The arguments of a command line; None takes that of the process."""
    return parse_arguments(EvaluateArguments, argv)


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    option = "--pipeline" if args.pipeline else "--images"
    subjects, folder = parse_subjects(option, args.pipeline or args.images), Path(args.output_dir)
    accelerator = hardware.make_sampling_accelerator(args)

    # What can be refused is refused before an image is drawn.
    check_report_folder(folder, subjects)
    check_cards(subjects if args.update_card else ())
    members = [member for subject in subjects for member in subject.members]
    prompts, controls = named_conditions(args, members) if args.pipeline else (None, None)
    real = open_real("--reference", args.reference, args.reference_split)
    train = open_real("--train_data", args.train_data, "train")
    refuse_flags_without_effect(args, real)
    sets = open_sets(option, subjects, None) if args.images else []
    controlled = [controls_of(member, controls, args.control_column) for member in members] if args.pipeline else []
    controlled = [given for given in (*controlled, *(each.source.controls for each in sets)) if given is not None]
    annotators = {given.annotator for given in controlled}
    refuse_choices_of_no_control(args, annotators)
    made_with = [given.made_with for given in controlled]
    args.annotate_as(made_with)
    instruments = Instruments.open(args, args.reference == "digits", accelerator.device, "sam" in annotators)
    instruments.check_segmenter(made_with)
    for given in (real, train):
        if given is not None:
            size = {} if args.resolution is None else {"resolution": args.resolution}
            given.check(instruments, interpolation=args.image_interpolation_mode, **size)
    labelled = prompts is None or prompts.labels is not None
    num_real = len(real.source) if real is not None and real.source is not None else None

    def check(opened: OpenPipeline) -> None:
        named = opened.class_names is not None
        refuse(args, instruments.foreseen(args, real, train, labelled, named, prompts is not None, opened.controls))
        check_classes(opened.name, opened.class_names, real)
        if args.figures:
            sampling.noise_shape(opened.pipeline)  # the walk's
        side = args.resolution or sampling.image_size(opened.pipeline)
        for given in (real, train):
            if given is not None:
                given.check(instruments, resolution=side, interpolation=args.image_interpolation_mode)
        require(
            opened.num_classes is None or args.walk_class < opened.num_classes,
            f"--walk_class is {args.walk_class}, but {opened.name} has {opened.num_classes} classes.",
        )

    if args.pipeline:
        for member in members:
            given = controls_of(member, controls, args.control_column)
            here = instruments.foreseen(args, real, train, labelled, labelled, prompts is not None, given)
            refuse(args, here, args.num_images, num_real)
        place = folder / "images"
        sets = draw_sets(subjects, args, args.guidance_scale, args.seeds, place, accelerator, check, prompts, controls)
    else:
        refuse_clip_prompt(args, sets)
        for image_set in sets:
            source = image_set.source
            has = (each is not None for each in (source.labels, source.class_names, source.texts))
            here = instruments.foreseen(args, real, train, *has, source.controls)
            refuse(args, here, len(source), num_real)

    extraction = Extraction(
        instruments,
        args,
        choose_resize(args, sets, real),
        accelerator.device,
        folder / "features",
        accelerator,
        args.extraction_batch_size,
        args.dataloader_num_workers,
    )
    reference = real.measure(extraction) if real is not None else None
    known = train.measure(extraction, wanted=["pooled"]) if train is not None and sets and needs_train(args) else None
    if args.save_stats:
        on_main(accelerator, lambda: real.save(Path(args.save_stats), reference, extraction))
    evidence = [extraction.evidence(image_set.option, image_set.source) for image_set in sets]
    accelerator.end_training()
    if not accelerator.is_main_process or not sets:
        return

    rows = []
    for image_set, seen in zip(sets, evidence, strict=True):
        seen.reference, seen.train = reference, known
        rows.append(measure(image_set, seen, args, extraction.settings(), folder / "computed"))
    looked_at = train if known is not None else None
    report(args, subjects, rows, choices(args, extraction, real, looked_at, sets, prompts))
    if args.figures:
        with writing(f"--output_dir {folder}", "the figures (the report is written; --no_figures leaves them off)"):
            draw_figures(args, sets, evidence, train, folder, extraction.resize, prompts)


if __name__ == "__main__":
    main()
