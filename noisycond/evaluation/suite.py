"""Which metrics can be computed from what there is, and their computation, a family at a time.

Letters: N generated images, D features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from noisycond.errors import InputError, require
from noisycond.evaluation.agreement import class_agreement
from noisycond.evaluation.difficulty import rmd
from noisycond.evaluation.entropy import sample_entropy
from noisycond.evaluation.estimates import Estimate
from noisycond.evaluation.features import Features
from noisycond.evaluation.memorization import memorization
from noisycond.evaluation.metrics import METRICS
from noisycond.evaluation.moments import Moments, fid
from noisycond.evaluation.neighbours import precision_recall_density_coverage
from noisycond.evaluation.options import MetricArguments
from noisycond.evaluation.perceptual import lpips_diversity
from noisycond.evaluation.scores import inception_score, kid
from noisycond.evaluation.topology import topological_precision_recall


@dataclass
class Reference:
    """Real images to compare with.

    Attributes:
        features: of each image; None where only moments are stored.
        moments, spatial: of the pooled and of the spatial features; None where not known.
        name: as the user named it. class_names: K names where they are known.
    """

    name: str
    features: Features | None = None
    moments: Moments | None = None
    spatial: Moments | None = None
    class_names: list[str] | None = None

    @classmethod
    def of(cls, name: str, features: Features, class_names: list[str] | None) -> "Reference":
        """A reference of images, with the moments of their features."""
        spatial = None if features.spatial is None else Moments.of(features.spatial)
        return cls(name, features, Moments.of(features.pooled), spatial, class_names)

    @property
    def labels(self) -> torch.Tensor | None:
        """Of each image, int64 [N], or None."""
        return None if self.features is None else self.features.labels


@dataclass
class Evidence:
    """What the metrics of one set of generated images are computed from.

    Attributes:
        generated: features, with labels where the images have them. class_names: what the labels mean, or None.
        reference, train: real images; None where none were named.
        class_logits: [N, K] of the classifier of class agreement; class_targets: its classes, int64 [N].
        clip_scores: [N].
        pixels: numbers of images to uint8 [B, 3, H, W]. similarity: of torch-fidelity's registry.
        device: where distances are computed.
    """

    generated: Features
    class_names: list[str] | None = None
    reference: Reference | None = None
    train: Reference | None = None
    class_logits: torch.Tensor | None = None
    class_targets: torch.Tensor | None = None
    clip_scores: torch.Tensor | None = None
    pixels: Callable[[Sequence[int]], torch.Tensor] | None = None
    similarity: torch.nn.Module | None = None
    device: torch.device | None = None


@dataclass(frozen=True)
class Family:
    """Metrics that are computed together.

    Attributes:
        compute: evidence and options to a value per metric.
        needs: what must be there, by the names of `LACKING`.
        least: options to the number of generated, and of real, images that are needed.
    """

    compute: Callable[[Evidence, MetricArguments], dict[str, Estimate]]
    needs: tuple[str, ...]
    least: Callable[[MetricArguments], int] = lambda options: 2


LACKING = {
    "reference": "no --reference was given",
    "reference moments": "the reference has no moments of this extractor's features",
    "reference features": "the reference holds moments only; name its images or statistics with features",
    "spatial": "the extractor gives no spatial features, or the reference has none",
    "logits": "the extractor is no classifier",
    "labels": "the images have no labels; list them in a metadata.jsonl with file_name and label",
    "fit labels": "the images that RMD is fitted to have no labels",
    "train": "no --train_data was given",
    "train features": "--train_data holds moments only; name the images or statistics with features",
    "classifier": "no --classifier was given",
    "clip": "--clip_model is a download and was not asked for",
    "class names": "the classes have no names",
    "similarity": "--lpips_similarity was not given",
}


def _fid(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return {"fid": fid(real=evidence.reference.moments, generated=evidence.generated.pooled)}


def _sfid(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return {"sfid": fid(real=evidence.reference.spatial, generated=evidence.generated.spatial)}


def _inception_score(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    logits, splits = evidence.generated.logits, options.inception_score_splits
    return {"inception_score": inception_score(logits=logits, splits=splits, seed=options.metric_seed)}


def subset_size_of(options: MetricArguments, *counts: int) -> int:
    """Images per subset of KID: as asked for, else 1000 or as many as there are, where fewer."""
    return options.kid_subset_size or min(1000, *counts)


def _kid(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    real, generated = evidence.reference.features.pooled, evidence.generated.pooled
    size = subset_size_of(options, len(real), len(generated))
    subsets, seed = options.kid_subsets, options.metric_seed
    return {"kid": kid(real=real, generated=generated, subsets=subsets, subset_size=size, seed=seed)}


def _neighbours(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return precision_recall_density_coverage(
        real=evidence.reference.features.pooled,
        generated=evidence.generated.pooled,
        precision_k=options.precision_k,
        coverage_k=options.coverage_k,
        device=evidence.device,
        progress=True,
    ).estimates()


def _topology(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return topological_precision_recall(
        real=evidence.reference.features.pooled,
        generated=evidence.generated.pooled,
        significance=options.topp_significance,
        replicates=options.topp_replicates,
        seed=options.metric_seed,
    ).estimates()


def _difficulty(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    fitted = evidence.reference if options.rmd_fit == "reference" else evidence.train
    labels = match_labels(evidence.generated.labels, evidence.class_names, fitted.class_names, f"RMD, {fitted.name}")
    return rmd(
        real=fitted.features.pooled,
        real_labels=fitted.labels,
        generated=evidence.generated.pooled,
        generated_labels=labels,
        top=options.rmd_top,
    )


def _entropy(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return {"entropy": sample_entropy(evidence.generated.pooled, options.entropy_estimator)}


def _memorization(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return memorization(
        train=evidence.train.features.pooled,
        generated=evidence.generated.pooled,
        rule=options.memorization_rule,
        threshold=options.memorization_threshold,
        device=evidence.device,
        progress=True,
    ).estimates()


def _class_agreement(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return {"class_agreement": class_agreement(logits=evidence.class_logits, labels=evidence.class_targets)}


def _clip_score(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return {"clip_score": Estimate.mean(evidence.clip_scores)}


def _lpips(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return {
        "lpips_diversity": lpips_diversity(
            evidence.pixels,
            evidence.generated.labels,
            evidence.similarity,
            count=len(evidence.generated),
            pairs=options.lpips_pairs,
            seed=options.metric_seed,
            device=evidence.device or "cpu",
            progress=True,
        )
    }


FAMILIES = {
    "fid": Family(_fid, ("reference", "reference moments")),
    "sfid": Family(_sfid, ("reference", "spatial")),
    "inception_score": Family(_inception_score, ("logits",), lambda options: options.inception_score_splits),
    "kid": Family(_kid, ("reference", "reference features"), lambda options: options.kid_subset_size or 2),
    "neighbours": Family(
        _neighbours,
        ("reference", "reference features"),
        lambda options: max(options.precision_k, options.coverage_k) + 1,
    ),
    "topology": Family(_topology, ("reference", "reference features")),
    "difficulty": Family(_difficulty, ("labels", "fit labels")),
    "entropy": Family(_entropy, ()),
    "memorization": Family(_memorization, ("train", "train features")),
    "class_agreement": Family(_class_agreement, ("labels", "classifier")),
    "clip_score": Family(_clip_score, ("labels", "class names", "clip")),
    "lpips": Family(_lpips, ("similarity",)),
}


def lacking(evidence: Evidence, options: MetricArguments, family: str) -> str | None:
    """Why a family cannot be computed from this evidence, or None where it can."""
    reference, train = evidence.reference, evidence.train
    fitted = reference if options.rmd_fit == "reference" else train
    here = {
        "reference": reference is not None,
        "reference moments": reference is not None and reference.moments is not None,
        "reference features": reference is not None and reference.features is not None,
        "spatial": evidence.generated.spatial is not None and reference is not None and reference.spatial is not None,
        "logits": evidence.generated.logits is not None,
        "labels": evidence.generated.labels is not None,
        "fit labels": fitted is not None and fitted.labels is not None,
        "train": train is not None,
        "train features": train is not None and train.features is not None,
        "classifier": evidence.class_logits is not None,
        "clip": evidence.clip_scores is not None,
        "class names": evidence.class_names is not None,
        "similarity": evidence.similarity is not None,
    }
    return next((LACKING[need] for need in FAMILIES[family].needs if not here[need]), None)


def needs_train(options: MetricArguments) -> bool:
    """Whether training images are looked at."""
    families = families_of(options.metrics)
    return "memorization" in families or ("difficulty" in families and options.rmd_fit == "train")


def families_of(metrics: Sequence[str]) -> list[str]:
    """The families that hold these metrics, in their order of computation; all where no metric is named."""
    wanted = {METRICS[name].family for name in metrics or METRICS}
    return [family for family in FAMILIES if family in wanted]


def check_counts(options: MetricArguments, num_images: int) -> None:
    """Raises InputError where a metric that was asked for by name needs more generated images; to be called before
    they are drawn."""
    for family in families_of(options.metrics) if options.metrics else ():
        _require_enough(options, family, num_images)


def _require_enough(options: MetricArguments, family: str, count: int) -> None:
    least = FAMILIES[family].least(options)
    require(count >= least, f"--metrics {_titles(family)}: at least {least} images are needed, but there are {count}.")


def _titles(family: str) -> str:
    return ", ".join(metric for metric, about in METRICS.items() if about.family == family)


def compute(evidence: Evidence, options: MetricArguments, family: str) -> dict[str, Estimate]:
    """The metrics of a family.

    Raises:
        InputError: there are too few images for it (says how many it needs), or something that it needs is not there.
    """
    why = lacking(evidence, options, family)
    require(why is None, f"--metrics {_titles(family)}: {why}.")
    _require_enough(options, family, len(evidence.generated))
    try:
        return FAMILIES[family].compute(evidence, options)
    except InputError as error:
        raise InputError(f"--metrics {_titles(family)}: {error}") from error


def match_labels(
    labels: torch.Tensor, names: list[str] | None, other_names: list[str] | None, what: str
) -> torch.Tensor:
    """Labels [N] of one list of class names as labels of another: by name where both have the names, as they are where
    one has none or the number of classes is the same.

    Raises:
        InputError: the classes differ.
    """
    if names is None or other_names is None or names == other_names:
        return labels
    places = {name: place for place, name in enumerate(other_names)}
    if all(name in places for name in names):
        return torch.tensor([places[name] for name in names])[labels]
    unknown = [name for name in names if name not in places]
    require(
        len(names) == len(other_names) and len(unknown) == len(names),
        f"{what}: it has no class {unknown[0]!r}, which the generated images have.",
    )
    return labels
