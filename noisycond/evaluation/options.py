"""The flags of an evaluation: what is measured, by which extractor, and every choice that a metric leaves open."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from noisycond.arguments import Arguments, flag
from noisycond.data.annotation import CANNY_CHOICES, SAM_CHOICES, AnnotationArguments
from noisycond.data.controls import CANNY_HIGH, CANNY_LOW
from noisycond.errors import require
from noisycond.evaluation.metrics import check_names


logger = logging.getLogger(__name__)


@dataclass
class MetricArguments(Arguments):
    """Choices of the metrics; all of them are printed with the results. Where the papers do not tell theirs, the
    default is said to be ours in docs/metrics.md."""

    feature_extractor: str | None = flag(
        None,
        "`digits`, or one of torch-fidelity's: inception-v3-compat, vgg16, dinov2-vit-{s,b,l,g}-14, clip-…; the "
        "default is `digits` for the reference `digits`, else inception-v3-compat.",
    )
    extractor_weights: str | None = flag(None, "A file with the extractor's weights; the default downloads them.")
    metrics: list[str] = flag([], "Metrics by name; the default is all that the data allow and no download needs.")
    resolution: int | None = flag(
        None,
        "Images are resized so that their shorter side is this long, then cropped square at the centre. The default "
        "brings reference and training images to the size of the generated ones, which must be of one size.",
    )
    image_interpolation_mode: Literal["nearest", "bilinear", "bicubic", "lanczos", "box"] = flag(
        "lanczos", "How images are resized."
    )
    precision_k: int = flag(3, "Neighbours of precision and recall; 3 as Kynkäänniemi et al. and the ADM evaluator.")
    coverage_k: int = flag(5, "Neighbours of density and coverage; 5 as Naeem et al.")
    kid_subsets: int = flag(100, "Subsets of KID.")
    kid_subset_size: int | None = flag(
        None, "Images per subset of KID; the default is 1000, or half of the smaller set where that is fewer."
    )
    inception_score_splits: int = flag(10, "Splits of the inception score.")
    topp_significance: float = flag(0.1, "α of TopP&R's confidence band.")
    topp_replicates: int = flag(10, "Bootstrap replicates of TopP&R's confidence band.")
    rmd_top: float = flag(0.01, "The share of images, those with the largest RMD, that `rmd_top` averages over.")
    rmd_fit: Literal["reference", "train"] = flag("reference", "Which images the Gaussians of RMD are fitted to.")
    entropy_estimator: Literal["knn", "gaussian"] = flag(
        "knn", "`knn`: Kozachenko and Leonenko's. `gaussian`: the entropy of the fitted Gaussian; needs N > D."
    )
    memorization_rule: Literal["ratio", "distance"] = flag(
        "ratio",
        "An image counts as memorized where its distance to the nearest training image is below the threshold times "
        "that to the second nearest (`ratio`), or below the threshold (`distance`).",
    )
    memorization_threshold: float = flag(1 / 3, "See --memorization_rule; 1/3 as Yoon et al.")
    clip_model: str = flag("openai/clip-vit-base-patch16", "A CLIP model of transformers for the CLIP score.")
    clip_prompt: str = flag("a photo of a {}", "The prompt of a class; {} is its name.")
    lpips_similarity: str | None = flag(
        None, "`lpips-vgg16`, or `lpips-digits`, which ships; the default is the latter with the extractor `digits`."
    )
    lpips_pairs: int = flag(100, "Pairs of images, of each class, that LPIPS diversity averages over.")
    classifier: str | None = flag(
        None,
        "The classifier of class agreement: `digits`, or an image classifier of transformers; the default is `digits` "
        "with that extractor.",
    )
    edge_tolerance: int = flag(
        1, "Pixels between an edge of the control and one of the image that count as the same, for edge F1."
    )
    canny_low: int = flag(
        CANNY_LOW,
        "Edges of drawn images: an edge goes on where the gradient is above this. The default is what the controls "
        "were made with, where prepare_dataset.py wrote it down.",
    )
    canny_high: int = flag(
        CANNY_HIGH, "Edges of drawn images: an edge begins where the gradient is above this; else as --canny_low."
    )
    sam_model: str | None = flag(
        None, "A model of transformers that segments drawn images (SAM), for mask IoU with controls by `sam`."
    )
    sam_points_per_side: int = flag(
        AnnotationArguments.sam_points_per_side,
        "As of prepare_dataset.py; the default is what the controls were made with, where that is known.",
    )
    sam_pred_iou_thresh: float = flag(AnnotationArguments.sam_pred_iou_thresh, "See --sam_points_per_side.")
    sam_stability_score_thresh: float = flag(
        AnnotationArguments.sam_stability_score_thresh, "See --sam_points_per_side."
    )
    bootstrap: int = flag(0, "Bootstrap replicates for 95 % intervals; 0 computes none.")
    metric_seed: int = flag(0, "Seed of subsets, projections and bootstrap replicates.")

    def __post_init__(self):
        super().__post_init__()
        check_names("--metrics", self.metrics)
        for name in ("precision_k", "coverage_k", "kid_subsets", "topp_replicates", "lpips_pairs"):
            require(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}, but it must be positive.")
        for name in ("resolution", "kid_subset_size"):
            value = getattr(self, name)
            require(value is None or value > 1, f"--{name} is {value}, but it must be at least 2.")
        require(
            self.inception_score_splits > 0,
            f"--inception_score_splits is {self.inception_score_splits}, but it must be positive.",
        )
        require(0.0 < self.rmd_top <= 1.0, f"--rmd_top is {self.rmd_top}, but it must lie in (0, 1].")
        require(
            0.0 < self.topp_significance < 1.0,
            f"--topp_significance is {self.topp_significance}, but it must lie in (0, 1).",
        )
        require(
            self.memorization_threshold > 0,
            f"--memorization_threshold is {self.memorization_threshold}, but it must be positive.",
        )
        require(
            self.memorization_rule == "distance" or self.memorization_threshold <= 1,
            f"--memorization_threshold is {self.memorization_threshold}, but by --memorization_rule ratio it must be "
            "at most 1: the second nearest is no nearer than the nearest.",
        )
        for name in ("bootstrap", "metric_seed", "edge_tolerance"):
            require(getattr(self, name) >= 0, f"--{name} is {getattr(self, name)}, but it must not be negative.")
        require(
            self.bootstrap == 0 or self.bootstrap >= 40,
            f"--bootstrap is {self.bootstrap}, but a 95 % interval needs at least 40 replicates.",
        )
        self._check_thresholds()
        for name in SAM_CHOICES:
            require(
                self.sam_model is not None or self.is_default(name), f"--{name} has no effect without --sam_model."
            )
        if self.sam_model is not None:
            self.annotation  # noqa: B018 (checks the values)
        require("{}" in self.clip_prompt, f"--clip_prompt is {self.clip_prompt!r}, but must hold {{}} for the class.")

    def annotate_as(self, made_with: Sequence[Mapping[str, object]]) -> None:
        """Takes for edges and regions of drawn images what the controls were made with, where nobody chose it; warns
        where somebody chose something else.

        Args:
            made_with: of each set of controls, the values by flag, as far as known.

        Raises:
            InputError: two sets were made with different values, and nobody chose one.
        """
        for name in (*CANNY_CHOICES, *(SAM_CHOICES if self.sam_model is not None else ())):
            values = sorted({made[name] for made in made_with if isinstance(made.get(name), (int, float))})
            if name in self.given or not self.is_default(name):
                others = [value for value in values if value != getattr(self, name)]
                if others:
                    logger.warning(
                        "--%s is %g, but the controls were made with %g: what obeys them wholly will not score 1.",
                        name,
                        getattr(self, name),
                        others[0],
                    )
                continue
            require(
                len(values) < 2,
                f"--{name}: the controls were made with different values ({', '.join(f'{v:g}' for v in values)}); say "
                "which is to be taken, or measure them one by one.",
            )
            for value in values:
                setattr(self, name, value)
        self._check_thresholds()

    def _check_thresholds(self) -> None:
        require(
            0 <= self.canny_low <= self.canny_high,
            f"--canny_low is {self.canny_low} and --canny_high {self.canny_high}, but 0 ≤ low ≤ high must hold.",
        )

    @property
    def annotation(self) -> AnnotationArguments:
        """How drawn images are segmented. Raises InputError where a choice of --sam_model is out of range."""
        chosen = {name: getattr(self, name) for name in ("sam_model", *SAM_CHOICES)}
        return AnnotationArguments(annotations=["sam"], **chosen)
