"""A small evaluation while a model trains: some images, few metrics, on the main process, in memory.

Letters: N images, B images per batch.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult
from PIL import Image

from noisycond import sampling
from noisycond.arguments import Arguments, flag
from noisycond.cards import public_name
from noisycond.control_set import ControlSet, open_controls
from noisycond.data.sources import ImageSource, Subset
from noisycond.errors import InputError, require
from noisycond.evaluation.control import DrawnAfter
from noisycond.evaluation.images import Resize
from noisycond.evaluation.instruments import Extraction, Instruments
from noisycond.evaluation.metrics import METRICS, check_names
from noisycond.evaluation.model_index import TASK, TEXT_TASK, add_results_to_card, model_index_results
from noisycond.evaluation.options import MetricArguments
from noisycond.evaluation.references import open_real
from noisycond.evaluation.suite import LACKING, compute, families_of, needs_train, refuse
from noisycond.pictures import plot_over_steps
from noisycond.prompts import Prompts, open_prompts
from noisycond.run_folder import RunFolder


logger = logging.getLogger(__name__)


@dataclass
class EvaluationArguments(Arguments):
    """The flags of an evaluation during training."""

    eval_steps: int = flag(0, "Evaluate every so many steps, and at the end; 0 does not.")
    eval_num_images: int = flag(500, "Images that an evaluation during training draws.")
    eval_metrics: list[str] = flag(
        ["fid", "precision", "recall", "class_agreement"], "Metrics of an evaluation during training."
    )
    eval_reference: str | None = flag(
        None,
        "Real images to compare with, as --reference of evaluate_model.py; the default for digits is their split "
        "`test`.",
    )
    eval_reference_split: str | None = flag(None, "Of a Hub dataset; the default is `validation`.")
    eval_feature_extractor: str | None = flag(None, "As --feature_extractor of evaluate_model.py.")
    eval_extractor_weights: str | None = flag(None, "As --extractor_weights of evaluate_model.py.")

    def __post_init__(self):
        super().__post_init__()
        require(self.eval_steps >= 0, f"--eval_steps is {self.eval_steps}, but it must not be negative.")
        require(self.eval_num_images > 1, f"--eval_num_images is {self.eval_num_images}, but it must be at least 2.")
        check_names("--eval_metrics", self.eval_metrics)
        require(
            self.eval_steps == 0 or self.eval_metrics, "--eval_metrics is empty; name a metric or set --eval_steps 0."
        )
        for name in ("eval_reference", "eval_reference_split", "eval_feature_extractor", "eval_extractor_weights"):
            require(
                self.eval_steps > 0 or getattr(self, name) is None, f"--{name} has no effect without --eval_steps."
            )


@dataclass
class TextEvaluationArguments(EvaluationArguments):
    """The flags of an evaluation while a text-to-image model trains."""

    eval_prompts: str | None = flag(
        None, "As --prompts of evaluate_model.py; the default for digits is `digits:unseen`."
    )
    eval_prompt_column: str | None = flag(None, "As --prompt_column of evaluate_model.py.")
    eval_prompt_split: str | None = flag(None, "As --prompt_split of evaluate_model.py.")
    eval_clip_model: str | None = flag(None, "As --clip_model of evaluate_model.py.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("eval_prompts", "eval_prompt_column", "eval_prompt_split", "eval_clip_model"):
            require(
                self.eval_steps > 0 or getattr(self, name) is None, f"--{name} has no effect without --eval_steps."
            )
        for name in ("eval_prompt_column", "eval_prompt_split"):
            require(
                self.eval_prompts is not None or getattr(self, name) is None,
                f"--{name} has no effect without --eval_prompts.",
            )
        require(
            self.eval_clip_model is None or "clip_score" in self.eval_metrics,
            "--eval_clip_model has no effect without --eval_metrics clip_score.",
        )


@dataclass
class ControlEvaluationArguments(Arguments):
    """The flags of an evaluation while a ControlNet or adapter trains, beside those of [`EvaluationArguments`] or
    [`TextEvaluationArguments`]."""

    eval_controls: str | None = flag(
        None, "As --controls of evaluate_model.py; the default for digits is their split `test`."
    )
    eval_controls_split: str | None = flag(None, "As --controls_split of evaluate_model.py.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("eval_controls", "eval_controls_split"):
            require(
                self.eval_steps > 0 or getattr(self, name) is None, f"--{name} has no effect without --eval_steps."
            )
        is_named = self.eval_controls is not None or self.dataset_name == "digits"
        require(
            is_named or self.eval_controls_split is None,
            "--eval_controls_split has no effect without --eval_controls.",
        )


def evaluation_controls(args, annotator: str | None = None, of_captions: bool = False) -> ControlSet:
    """The controls of an evaluation during training, of the column --control_column.

    Args:
        args: the arguments of a training script, among them [`ControlEvaluationArguments`].
        annotator: what made the controls, where that is known; see [`ControlSet.of_column`].
        of_captions: whether the model draws from captions, then of the column --caption_column.

    Raises:
        InputError: there are none, or see [`noisycond.control_set.open_controls`].
    """
    name = args.eval_controls or ("digits" if args.dataset_name == "digits" else None)
    require(name is not None, "--eval_steps needs --eval_controls: what is to be drawn after.")
    controls = open_controls("--eval_controls", name, args.eval_controls_split)
    controls = controls.of_column(args.control_column, annotator)
    if not of_captions:
        return controls
    return controls.with_captions(getattr(args, "caption_column", None), "--caption_column")


def evaluation_prompts(args) -> Prompts:
    """The prompts of an evaluation during training.

    Args:
        args: the arguments of a training script, among them [`TextEvaluationArguments`].

    Raises:
        InputError: there are none, or see [`noisycond.prompts.open_prompts`].
    """
    name = args.eval_prompts or ("digits:unseen" if args.dataset_name == "digits" else None)
    require(name is not None, "--eval_steps needs --eval_prompts: what is to be drawn.")
    return open_prompts("--eval_prompts", name, args.eval_prompt_split, args.eval_prompt_column)


class DrawnImages(ImageSource):
    """Images in memory, as a pipeline returns them, with labels int64 [N], class names, texts and controls where
    known."""

    def __init__(
        self,
        images: Sequence[Image.Image],
        labels: Sequence[int] | None,
        class_names: list[str] | None,
        texts: list[str] | None = None,
        controls: DrawnAfter | None = None,
    ):
        self.images, self.class_names, self.texts, self.controls = images, class_names, texts, controls
        self.labels = None if labels is None else np.array(labels, dtype=np.int64)
        self.fingerprint = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, resolution: int | None = None) -> Image.Image:
        return self.images[index].convert("RGB")

    def name(self, index: int) -> str:
        return f"drawn image {index}"


class TrainingEvaluation:
    """Draws images and measures them against real ones, whose features are extracted once.

    Args:
        args: the arguments of a training script, among them [`EvaluationArguments`].
        class_names: K names, of a class-conditional model. prompts: of a text-to-image model, instead; with controls
            they are those of the controls.
        controls: what images are drawn after, with the classes or captions of the same examples; None of models that
            take no control images.
    """

    def __init__(
        self,
        args,
        class_names: list[str] | None = None,
        prompts: Prompts | None = None,
        controls: ControlSet | None = None,
    ):
        if prompts is None and controls is not None:
            prompts = controls.prompts
        if (class_names is None) == (prompts is None):
            raise ValueError("an evaluation is of class names or of prompts")
        self.args, self.prompts, self.controls = args, prompts, controls
        self.class_names = class_names if prompts is None else prompts.class_names
        chosen = getattr(args, "eval_clip_model", None)
        clip = {} if chosen is None else {"clip_model": chosen}
        self.options = MetricArguments(
            metrics=list(args.eval_metrics),
            feature_extractor=args.eval_feature_extractor,
            extractor_weights=args.eval_extractor_weights,
            metric_seed=args.seed,
            **clip,
        )
        if controls is not None:
            self.options.annotate_as([controls.made_with])

    def prepare(self, device: torch.device) -> None:
        """Opens what is looked through and extracts the features of the real images, of the model's classes (or the
        prompts') where both have names. On the main process only.

        Raises:
            InputError: weights or real images are missing, a metric cannot be computed, or the controls have classes
                that the model does not know.
        """
        args, on_digits = self.args, self.args.dataset_name == "digits"
        self._conditions()
        name = args.eval_reference or ("digits" if on_digits else None)
        require(name is not None, "--eval_steps needs --eval_reference: real images of the validation set.")
        with _flags_of_training():
            instruments = Instruments.open(self.options, name == "digits", device)
            self.extraction = Extraction(instruments, self.options, Resize(args.resolution), device)
            self.real = open_real("--eval_reference", name, args.eval_reference_split)
            self.real.check(instruments, args.resolution, self.extraction.resize.interpolation)
            train = open_real("--dataset_name", "digits", "train") if on_digits else None
            for given in (self.real, train):
                if given is not None and given.source is not None:
                    given.source = self._of_the_same_classes(given.source)
            count = None if self.real.source is None else len(self.real.source)
            labelled = self.prompts is None or self.prompts.labels is not None
            named, texts = self.class_names is not None, self.prompts is not None
            here = instruments.foreseen(self.options, self.real, train, labelled, named, texts, self.controls)
            refuse(self.options, here, args.eval_num_images, count)
            self.reference = self.real.measure(self.extraction)
            self.train = None
            if train is not None and needs_train(self.options):
                self.train = train.measure(self.extraction, wanted=["pooled"])

    def _of_the_same_classes(self, source: ImageSource) -> ImageSource:
        names = source.class_names
        if source.labels is None or names is None or not set(self.class_names or names) < set(names):
            return source
        kept = [label for label, name in enumerate(names) if name in set(self.class_names)]
        return Subset(source, np.flatnonzero(np.isin(source.labels, kept)), kept)

    def __call__(self, pipeline: DiffusionPipeline) -> dict:
        """The metrics of images that the pipeline draws now, by name, and the choices behind them; nothing where they
        cannot be computed, which is logged: a model may draw what has no metric without the training being in vain.
        """
        args = self.args
        labels, texts = self._conditions()
        drawn_after, options = self._controls(pipeline)
        images = sampling.sample_all(
            pipeline,
            labels if texts is None else texts,
            seed=args.seed,
            guidance_scale=args.validation_guidance_scale,
            num_inference_steps=args.validation_inference_steps,
            **options,
        )
        found = {}
        try:
            with _flags_of_training():
                source = DrawnImages(images, labels, self.class_names, texts, drawn_after)
                evidence = self.extraction.evidence("--eval_steps", source)
                evidence.reference, evidence.train = self.reference, self.train
                for family in families_of(self.options.metrics):
                    for name, estimate in compute(evidence, self.options, family).items():
                        found[name] = estimate.value
        except InputError as error:
            logger.warning("No evaluation at this step: %s", error)
            return {}
        return {name: found[name] for name in self.options.metrics} | {"settings": self.settings()}

    def _conditions(self) -> tuple[list[int] | None, list[str] | None]:
        """Labels and texts of the images that are drawn, in turn; None where there are none."""
        args, prompts, names = self.args, self.prompts, self.class_names
        count = args.eval_num_images
        if prompts is None and self.controls is not None:
            base = (args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", "--base_class_names")
            return self.controls.labels(names, len(names), *base)[self.controls.places(count)].tolist(), None
        if prompts is None:
            return sampling.balanced_labels(count, len(names)).tolist(), None
        places = (self.controls or prompts).places(count)
        labels = None if prompts.labels is None else prompts.labels[places].tolist()
        return labels, [prompts.texts[place] for place in places]

    def _controls(self, pipeline: DiffusionPipeline) -> tuple[DrawnAfter | None, dict]:
        """What the images are drawn after, and what of it the sampling takes."""
        if self.controls is None:
            return None, {}
        places, side = self.controls.places(self.args.eval_num_images), sampling.image_size(pipeline)
        images = {place: self.controls.control(place, side) for place in sorted(set(places))}
        known = DrawnAfter(places, images.__getitem__, self.controls.annotator, self.controls.made_with)
        return known, {"controls": [images[place] for place in places], "conditioning_scale": self.controls.scale}

    def settings(self) -> dict:
        """The choices behind the values, as JSON values."""
        args = self.args
        return {
            "reference": self.real.settings(),
            "num_images": args.eval_num_images,
            "guidance_scale": args.validation_guidance_scale,
            "num_inference_steps": args.validation_inference_steps,
            "feature_extractor": self.extraction.instruments.extractor.name,
        } | {
            name: given.settings()
            for name, given in (("prompts", self.prompts), ("controls", self.controls))
            if given is not None
        }

    def at_the_end(self, pipeline: DiffusionPipeline, run: RunFolder, step: int) -> None:
        """Measures the exported weights, unless that was done with the same choices, draws the metrics over steps and
        writes the last ones into the model card."""
        rows = run.read_evaluations()
        last = rows[-1] if rows else {}
        asked = {"step", "settings", *self.options.metrics}
        if last.get("step") != step or last.get("settings") != self.settings() or last.keys() != asked:
            row = self(pipeline)
            if row:
                run.log_evaluation({"step": step} | row)
                rows = run.read_evaluations()
        if not rows or rows[-1]["step"] != step:
            return
        values = {name: value for name, value in rows[-1].items() if name in METRICS}
        plot_over_steps([{name: row.get(name) for name in ("step", *values)} for row in rows], run.path)
        add_results_to_card(run.path, self._results(values))
        print("\n" + ", ".join(f"{METRICS[name].title} {value:.4g}" for name, value in values.items()))

    def _results(self, values: dict[str, float]) -> list[EvalResult]:
        args, real = self.args, self.real.settings()
        row = {
            "label": "run",
            "pipeline": args.output_dir,
            "images": None,
            "guidance_scale": args.validation_guidance_scale,
            "seed": args.seed,
            "num_images": args.eval_num_images,
            "metrics": {name: {"value": value} for name, value in values.items()},
        }
        told = {
            "num_inference_steps": args.validation_inference_steps,
            "feature_extractor": self.extraction.instruments.extractor.name,
        }
        if self.prompts is not None:
            told["prompts"] = public_name(self.prompts.name)
        if self.controls is not None:
            told |= {"controls": public_name(self.controls.name), "control_column": self.controls.column}
        return model_index_results(
            [row],
            public_name(real["name"]),
            dataset_split=real.get("split"),
            settings=told,
            task=TASK if self.prompts is None else TEXT_TASK,
        )


@contextmanager
def _flags_of_training():
    """A context in which messages name the flags of a training script."""
    try:
        yield
    except InputError as error:
        sentence = str(error)
        for flag_name in ("metrics", "reference", "feature_extractor", "extractor_weights", "clip_model", "controls"):
            sentence = re.sub(rf"--{flag_name}\b", f"--eval_{flag_name}", sentence)
        sentence = sentence.replace("no --train_data was given", "the training images are known for digits alone")
        sentence = sentence.replace(
            LACKING["segmenter"], "the controls are segmentations, which evaluate_model.py measures"
        )
        raise InputError(sentence) from error
