"""Which metrics can be computed from what there is, and their computation, a family at a time.

Letters: N generated images, D features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from noisycond.errors import InputError, require
from noisycond.evaluation.agreement import class_agreement
from noisycond.evaluation.control import Obedience, edge_f1, mask_iou
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
from noisycond.evaluation.topology import PROJECTED_DIM, topological_precision_recall


@dataclass
class Reference:
    """Real images to compare with.

    Attributes:
        name: as the user named it. features: of each image; None where only moments are stored.
        stored_moments, stored_spatial: where they come with the images, as in a file of statistics; else they are
            computed from the features when they are first asked for. class_names: K names where they are known.
        identity: a string that changes with the images.
    """

    name: str
    features: Features | None = None
    stored_moments: Moments | None = None
    stored_spatial: Moments | None = None
    class_names: list[str] | None = None
    identity: str = ""

    @cached_property
    def moments(self) -> Moments | None:
        """Of the pooled features; None where not known."""
        if self.stored_moments is not None or self.features is None:
            return self.stored_moments
        return Moments.of(self.features.pooled)

    @cached_property
    def spatial(self) -> Moments | None:
        """Of the spatial features; None where not known."""
        if self.stored_spatial is not None or self.features is None or self.features.spatial is None:
            return self.stored_spatial
        return Moments.of(self.features.spatial)

    @property
    def labels(self) -> torch.Tensor | None:
        """Of each image, int64 [N], or None."""
        return None if self.features is None else self.features.labels


@dataclass
class Evidence:
    """What the metrics of one set of generated images are computed from.

    Attributes:
        generated: features, with labels where the images have them. class_names: what the labels mean, or None.
        texts: N texts that the images were drawn from, or None.
        reference, train: real images; None where none were named.
        class_logits: [N, K] of the classifier of class agreement; class_targets: its classes, int64 [N].
        clip_scores: [N].
        pixels: numbers of images to uint8 [B, 3, H, W]. similarity: of torch-fidelity's registry.
        obedience: the controls that the images were drawn after, and the images; None where none are known.
        device: where distances are computed.
    """

    generated: Features
    class_names: list[str] | None = None
    texts: Sequence[str] | None = None
    reference: Reference | None = None
    train: Reference | None = None
    class_logits: torch.Tensor | None = None
    class_targets: torch.Tensor | None = None
    clip_scores: torch.Tensor | None = None
    pixels: Callable[[Sequence[int]], torch.Tensor] | None = None
    similarity: torch.nn.Module | None = None
    obedience: Obedience | None = None
    device: torch.device | None = None


@dataclass(frozen=True)
class Family:
    """Metrics that are computed together.

    Attributes:
        compute: evidence and options to a value per metric.
        needs: what must be there, by the names of `LACKING`.
        least: options to the number of generated images that are needed, and of real ones where `real` says so.
    """

    compute: Callable[[Evidence, MetricArguments], dict[str, Estimate]]
    needs: tuple[str, ...]
    least: Callable[[MetricArguments], int] = lambda options: 2
    real: bool = False


LACKING = {
    "reference": "no --reference was given",
    "reference moments": "the reference has no moments of this extractor's features",
    "reference features": "the reference holds moments only; name its images or statistics with features",
    "spatial": "the extractor gives no spatial features, or the reference has none",
    "logits": "the extractor is no classifier",
    "labels": "the images have no labels; list them in a metadata.jsonl with file_name and label, or take prompts "
    "that have labels",
    "fit": "the images that RMD is fitted to were not named (--reference, or --train_data with --rmd_fit train)",
    "fit labels": "the images that RMD is fitted to have no labels",
    "train": "no --train_data was given",
    "train features": "--train_data holds moments only; name the images or statistics with features",
    "classifier": "no --classifier was given",
    "clip": "--clip_model is a download and was not asked for",
    "texts": "the images have neither texts nor labels with class names; list them in a metadata.jsonl with file_name "
    "and text",
    "similarity": "--lpips_similarity was not given",
    "controls": "the images were drawn after no controls (--controls)",
    "edges": "the controls are no edges (their column is not `canny`)",
    "masks": "the controls are no masks (their column is neither `mask` nor `sam`)",
    "segmenter": "the controls are segmentations, and no --sam_model was given that segments the images",
}


def _fid(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return {"fid": fid(real=evidence.reference.moments, generated=evidence.generated.pooled)}


def _sfid(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return {"sfid": fid(real=evidence.reference.spatial, generated=evidence.generated.spatial)}


def _inception_score(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    logits, splits = evidence.generated.logits, options.inception_score_splits
    return {"inception_score": inception_score(logits=logits, splits=splits, seed=options.metric_seed)}


def subset_size_of(options: MetricArguments, *counts: int) -> int:
    """Images per subset of KID: as asked for, else 1000, or half of the smaller set where that is fewer."""
    return options.kid_subset_size or max(2, min(1000, min(counts) // 2))


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
        device=evidence.device or "cpu",
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
    features, estimator = evidence.generated.pooled, options.entropy_estimator
    return {"entropy": sample_entropy(features, estimator, device=evidence.device)}


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


def _edges(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return edge_f1(
        evidence.obedience,
        tolerance=options.edge_tolerance,
        low=options.canny_low,
        high=options.canny_high,
        progress=True,
    )


def _masks(evidence: Evidence, options: MetricArguments) -> dict[str, Estimate]:
    return mask_iou(evidence.obedience, progress=True)


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


def _least_for_topology(options: MetricArguments) -> int:
    # The bandwidth looks at the neighbour whose number is five times the projected dimension.
    return 5 * PROJECTED_DIM + 1


FAMILIES = {
    "fid": Family(_fid, ("reference", "reference moments")),
    "sfid": Family(_sfid, ("reference", "spatial")),
    "inception_score": Family(_inception_score, ("logits",), lambda options: options.inception_score_splits),
    "kid": Family(_kid, ("reference", "reference features"), lambda options: options.kid_subset_size or 4, real=True),
    "neighbours": Family(
        _neighbours,
        ("reference", "reference features"),
        lambda options: max(options.precision_k, options.coverage_k) + 1,
        real=True,
    ),
    "topology": Family(_topology, ("reference", "reference features"), _least_for_topology, real=True),
    "difficulty": Family(_difficulty, ("labels", "fit", "fit labels"), lambda options: 1),
    "entropy": Family(_entropy, (), lambda options: 6),
    "memorization": Family(_memorization, ("train", "train features"), lambda options: 1),
    "class_agreement": Family(_class_agreement, ("labels", "classifier"), lambda options: 1),
    "clip_score": Family(_clip_score, ("texts", "clip"), lambda options: 1),
    "lpips": Family(_lpips, ("similarity",)),
    "control_edges": Family(_edges, ("controls", "edges")),
    "control_masks": Family(_masks, ("controls", "masks", "segmenter")),
}


def what_is_here(evidence: Evidence, options: MetricArguments) -> set[str]:
    """What of the needs of all families this evidence has."""
    reference, train, generated = evidence.reference, evidence.train, evidence.generated
    fitted = reference if options.rmd_fit == "reference" else train
    here = {
        "reference": reference is not None,
        "reference moments": reference is not None and (reference.features or reference.stored_moments) is not None,
        "reference features": reference is not None and reference.features is not None,
        "spatial": generated.spatial is not None
        and reference is not None
        and (reference.stored_spatial is not None or getattr(reference.features, "spatial", None) is not None),
        "logits": generated.logits is not None,
        "labels": generated.labels is not None,
        "fit": fitted is not None,
        "fit labels": fitted is not None and fitted.labels is not None,
        "train": train is not None,
        "train features": train is not None and train.features is not None,
        "classifier": evidence.class_logits is not None,
        "clip": evidence.clip_scores is not None,
        "texts": evidence.texts is not None or (generated.labels is not None and evidence.class_names is not None),
        "similarity": evidence.similarity is not None,
    }
    seen = evidence.obedience
    known = set() if seen is None else of_controls(seen.controls.annotator, seen.annotate is not None)
    return {need for need, is_here in here.items() if is_here} | known


def of_controls(annotator: str | None, segments: bool) -> set[str]:
    """What of the needs images have that were drawn after controls.

    Args:
        annotator: what made the controls, or None where that is not known. segments: whether there is a segmenter.
    """
    here = {
        "controls": True,
        "edges": annotator == "canny",
        "masks": annotator in ("mask", "sam"),
        "segmenter": annotator != "sam" or segments,
    }
    return {need for need, is_here in here.items() if is_here}


def lacking(here: set[str], family: str) -> str | None:
    """Why a family cannot be computed from what is here, or None where it can."""
    return next((LACKING[need] for need in FAMILIES[family].needs if need not in here), None)


def needs_train(options: MetricArguments) -> bool:
    """Whether training images are looked at."""
    families = families_of(options.metrics)
    return "memorization" in families or ("difficulty" in families and options.rmd_fit == "train")


def families_of(metrics: Sequence[str]) -> list[str]:
    """The families that hold these metrics, in their order of computation; all where no metric is named."""
    wanted = {METRICS[name].family for name in metrics or METRICS}
    return [family for family in FAMILIES if family in wanted]


def refuse(
    options: MetricArguments, here: set[str], num_images: int | None = None, num_real: int | None = None
) -> None:
    """Raises InputError where a metric that was asked for by name cannot be computed: to be called before images are
    drawn, with what will be here and how many images there will be (None where that is not known)."""
    for family in families_of(options.metrics) if options.metrics else ():
        why = lacking(here, family)
        require(why is None, f"--metrics {_titles(family)}: {why}.")
        _require_enough(options, family, num_images, num_real)


def _require_enough(options: MetricArguments, family: str, num_images: int | None, num_real: int | None) -> None:
    least, counts = FAMILIES[family].least(options), {"generated": num_images}
    if FAMILIES[family].real:
        counts["real"] = num_real
    for kind, count in counts.items():
        require(
            count is None or count >= least,
            f"--metrics {_titles(family)}: at least {least} {kind} images are needed, but there are {count}.",
        )


def _titles(family: str) -> str:
    return ", ".join(metric for metric, about in METRICS.items() if about.family == family)


def compute(evidence: Evidence, options: MetricArguments, family: str) -> dict[str, Estimate]:
    """The metrics of a family.

    Raises:
        InputError: there are too few images for it (says how many it needs), or something that it needs is not there.
    """
    why = lacking(what_is_here(evidence, options), family)
    require(why is None, f"--metrics {_titles(family)}: {why}.")
    real = getattr(evidence.reference, "features", None)
    _require_enough(options, family, len(evidence.generated), None if real is None else len(real))
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
    if names is not None and len(labels):
        highest = int(labels.max())
        require(
            labels.min() >= 0 and highest < len(names),
            f"{what}: an image has the label {highest}, but there are {len(names)} class names.",
        )
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
