"""A small evaluation while a model trains: some images, few metrics, on the main process, in memory.

Letters: N images, B images per batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult
from PIL import Image

from noisycond import sampling
from noisycond.arguments import Arguments, flag
from noisycond.cards import public_name
from noisycond.data.sources import ImageSource
from noisycond.errors import InputError, closest, require
from noisycond.evaluation.images import Resize
from noisycond.evaluation.instruments import Extraction, Instruments
from noisycond.evaluation.metrics import METRICS
from noisycond.evaluation.model_index import model_index_results
from noisycond.evaluation.options import MetricArguments
from noisycond.evaluation.references import open_real
from noisycond.evaluation.suite import check_counts, compute, families_of, needs_train


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
        for name in self.eval_metrics:
            if name not in METRICS:
                known = ", ".join(METRICS)
                raise InputError(f"--eval_metrics {name}: no such metric{closest(name, METRICS)}; there are {known}.")
        require(
            self.eval_steps == 0 or self.eval_metrics, "--eval_metrics is empty; name a metric or set --eval_steps 0."
        )
        for name in ("eval_reference", "eval_reference_split", "eval_feature_extractor", "eval_extractor_weights"):
            require(
                self.eval_steps > 0 or getattr(self, name) is None, f"--{name} has no effect without --eval_steps."
            )


class DrawnImages(ImageSource):
    """Images in memory, as a pipeline returns them."""

    def __init__(self, images: Sequence[Image.Image], labels: Sequence[int], class_names: list[str]):
        self.images, self.labels, self.class_names = images, np.array(labels, dtype=np.int64), class_names
        self.fingerprint = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()

    def read(self, index: int, resolution: int | None = None) -> Image.Image:
        return self.images[index].convert("RGB")

    def name(self, index: int) -> str:
        return f"drawn image {index}"


class TrainingEvaluation:
    """Draws images and measures them against real ones, whose features are extracted once.

    Args:
        args: the arguments of a training script, among them [`EvaluationArguments`]. class_names: K names.
    """

    def __init__(self, args, class_names: list[str]):
        self.args, self.class_names = args, class_names
        self.options = MetricArguments(
            metrics=list(args.eval_metrics),
            feature_extractor=args.eval_feature_extractor,
            extractor_weights=args.eval_extractor_weights,
            metric_seed=args.seed,
        )

    def prepare(self, device: torch.device) -> None:
        """Opens what is looked through and extracts the features of the real images. On the main process only.

        Raises:
            InputError: weights or real images are missing, or there are too few images for a metric.
        """
        args, on_digits = self.args, self.args.dataset_name == "digits"
        name = args.eval_reference or ("digits" if on_digits else None)
        require(name is not None, "--eval_steps needs --eval_reference: real images of the validation set.")
        check_counts(self.options, args.eval_num_images)
        instruments = Instruments.open(self.options, name == "digits", device)
        self.extraction = Extraction(instruments, self.options, Resize(args.resolution), device)
        self.real = open_real("--eval_reference", name, args.eval_reference_split)
        self.real.check(instruments)
        self.reference, self.train = self.real.measure(self.extraction), None
        if on_digits and needs_train(self.options):
            self.train = open_real("--dataset_name", "digits", "train").measure(self.extraction)

    def __call__(self, pipeline: DiffusionPipeline) -> dict[str, float]:
        """The metrics of images that the pipeline draws now, by name."""
        args = self.args
        labels = sampling.balanced_labels(args.eval_num_images, len(self.class_names)).tolist()
        images = sampling.sample_all(
            pipeline,
            labels,
            seed=args.seed,
            guidance_scale=args.validation_guidance_scale,
            num_inference_steps=args.validation_inference_steps,
        )
        evidence = self.extraction.evidence("--eval_steps", DrawnImages(images, labels, self.class_names))
        evidence.reference, evidence.train = self.reference, self.train
        found = {}
        for family in families_of(self.options.metrics):
            found |= {name: estimate.value for name, estimate in compute(evidence, self.options, family).items()}
        return {name: found[name] for name in self.options.metrics}

    def results(self, row: dict) -> list[EvalResult]:
        """An evaluation as metadata of a model card.

        Args:
            row: step, and the metrics by name.
        """
        args, real = self.args, self.real.settings()
        measured = {name: {"value": value} for name, value in row.items() if name != "step"}
        return model_index_results(
            [
                {
                    "label": "run",
                    "pipeline": args.output_dir,
                    "images": None,
                    "guidance_scale": args.validation_guidance_scale,
                    "seed": args.seed,
                    "num_images": args.eval_num_images,
                    "metrics": measured,
                }
            ],
            public_name(real["name"]),
            dataset_split=real.get("split"),
            settings={
                "num_inference_steps": args.validation_inference_steps,
                "feature_extractor": self.extraction.instruments.extractor.name,
            },
        )
