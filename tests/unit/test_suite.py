"""Which metrics can be computed from what there is, with a sentence for what is lacking; labels by name."""

import dataclasses

import pytest
import torch
from PIL import Image

from noisycond.data.controls import canny_edges
from noisycond.errors import InputError
from noisycond.evaluation.control import DrawnAfter, Obedience
from noisycond.evaluation.features import Features
from noisycond.evaluation.metrics import METRICS
from noisycond.evaluation.options import MetricArguments
from noisycond.evaluation.suite import (
    FAMILIES,
    Evidence,
    Reference,
    compute,
    families_of,
    lacking,
    match_labels,
    refuse,
    what_is_here,
)


def features(count: int, seed: int, labels: bool = True) -> Features:
    generator = torch.Generator().manual_seed(seed)
    pooled, spatial = torch.randn(count, 6, generator=generator), torch.randn(count, 3, generator=generator)
    logits = torch.randn(count, 4, generator=generator)
    return Features(pooled, logits, spatial, torch.arange(count) % 4 if labels else None)


def reference(count: int, seed: int) -> Reference:
    return Reference("real", features(count, seed), class_names=list("abcd"))


class Difference(torch.nn.Module):
    def forward(self, images, others):
        return (images.float() - others.float()).abs().mean(dim=(1, 2, 3))


@pytest.fixture
def evidence() -> Evidence:
    generated = features(200, 0)
    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 3, 2, 2)
    return Evidence(
        generated,
        list("abcd"),
        reference=reference(180, 1),
        train=reference(220, 2),
        class_logits=torch.nn.functional.one_hot(generated.labels, 4).float(),
        class_targets=generated.labels,
        clip_scores=torch.full((200,), 30.0),
        pixels=lambda numbers: images[numbers],
        similarity=Difference(),
        obedience=obedience("canny"),
    )


def obedience(annotator: str | None, annotate=None) -> Obedience:
    """Of images that are their own controls: white squares in two places."""
    images = [Image.new("RGB", (16, 16)) for _ in range(2)]
    for place, image in enumerate(images):
        image.paste("white", (2 + 6 * place, 4, 8 + 6 * place, 10))
    controls = [canny_edges(image) for image in images] if annotator == "canny" else images
    return Obedience(DrawnAfter([0, 1], controls.__getitem__, annotator), images.__getitem__, annotate)


def test_every_metric_belongs_to_a_family_that_gives_it(evidence):
    assert {metric.family for metric in METRICS.values()} == set(FAMILIES)
    found = {
        name: estimate
        for family in FAMILIES
        for name, estimate in compute(
            dataclasses.replace(evidence, obedience=obedience("mask")) if family == "control_masks" else evidence,
            MetricArguments(),
            family,
        ).items()
    }
    assert set(found) == set(METRICS)
    assert found["class_agreement"].value == 1 and found["clip_score"].value == 30
    assert all(isinstance(estimate.value, float) for estimate in found.values())


@pytest.mark.parametrize(
    "family, change, words",
    [
        ("fid", {"reference": None}, "no --reference"),
        ("fid", {"reference": Reference("x")}, "no moments"),
        ("neighbours", {"reference": Reference("x", None, reference(9, 1).moments)}, "moments only"),
        ("sfid", {"generated": dataclasses.replace(features(9, 0), spatial=None)}, "spatial"),
        ("inception_score", {"generated": dataclasses.replace(features(9, 0), logits=None)}, "no classifier"),
        ("difficulty", {"generated": features(9, 0, labels=False)}, "no labels"),
        ("memorization", {"train": None}, "--train_data"),
        ("class_agreement", {"class_logits": None}, "--classifier"),
        ("clip_score", {"clip_scores": None}, "--clip_model"),
        ("lpips", {"similarity": None}, "--lpips_similarity"),
        ("control_edges", {"obedience": None}, "no controls"),
        ("control_edges", {"obedience": obedience("mask")}, "no edges"),
        ("control_masks", {}, "no masks"),
        ("control_masks", {"obedience": obedience("sam")}, "--sam_model"),
    ],
)
def test_what_is_lacking_is_said(evidence, family, change, words):
    evidence = dataclasses.replace(evidence, **change)
    assert words in lacking(what_is_here(evidence, MetricArguments()), family)
    with pytest.raises(InputError, match=f"--metrics .*{words}"):
        compute(evidence, MetricArguments(), family)


def test_too_few_images_are_refused_before_and_after(evidence):
    few, here = dataclasses.replace(evidence, generated=features(5, 0)), what_is_here(evidence, MetricArguments())
    for action in (
        lambda: refuse(MetricArguments(metrics=["coverage"]), here, 5),
        lambda: compute(few, MetricArguments(), "neighbours"),
    ):
        with pytest.raises(InputError, match="precision, recall, density, coverage: at least 6 generated images .* 5"):
            action()
    refuse(MetricArguments(metrics=["fid"]), here, 5)
    with pytest.raises(InputError, match="--metrics kid: at least 500 generated images"):
        refuse(MetricArguments(metrics=["kid"], kid_subset_size=500), here, 200)
    with pytest.raises(InputError, match="at least 161 real images are needed, but there are 20"):
        refuse(MetricArguments(metrics=["topp_f1"]), here, 200, 20)
    with pytest.raises(InputError, match="--metrics fid: no --reference"):
        refuse(MetricArguments(metrics=["fid"]), here - {"reference"}, 200)


def test_families_of_named_metrics():
    assert families_of(["recall", "fid", "coverage"]) == ["fid", "neighbours"]
    assert families_of([]) == list(FAMILIES)


def test_options_change_values(evidence):
    def value(metric, **options):
        return compute(evidence, MetricArguments(**options), METRICS[metric].family)[metric].value

    assert value("precision", precision_k=1) < value("precision", precision_k=10)
    assert value("coverage", coverage_k=1) < value("coverage", coverage_k=10)
    assert value("rmd_top", rmd_top=0.01) > value("rmd_top", rmd_top=0.5)
    assert value("rmd_mean", rmd_fit="train") != value("rmd_mean")
    assert value("entropy", entropy_estimator="gaussian") != value("entropy")
    distance = value("nearest_train_distance")
    assert value("memorization_ratio", memorization_rule="distance", memorization_threshold=100 * distance) == 1
    assert value("memorization_ratio", memorization_threshold=1e-9) == 0
    assert len({value("kid", kid_subset_size=size) for size in (20, 90, 150, None)}) == 3  # 90: half of the smaller
    assert value("inception_score", inception_score_splits=1) != value("inception_score")
    assert value("topp_f1", topp_significance=0.9) != value("topp_f1")
    assert value("lpips_diversity", lpips_pairs=1) != value("lpips_diversity")


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"metrics": ["fdi"]}, "--metrics fdi: no such metric .*'fid'"),
        ({"precision_k": 0}, "--precision_k is 0"),
        ({"rmd_top": 0.0}, "--rmd_top is 0.0"),
        ({"bootstrap": 5}, "--bootstrap is 5, .* at least 40"),
        ({"clip_prompt": "a photo"}, "--clip_prompt"),
        ({"memorization_threshold": 0.0}, "--memorization_threshold"),
        ({"kid_subset_size": 1}, "--kid_subset_size is 1"),
    ],
)
def test_bad_options(flags, words):
    with pytest.raises(InputError, match=words):
        MetricArguments(**flags)


def test_labels_are_matched_by_name():
    labels = torch.tensor([0, 1, 1])
    assert match_labels(labels, ["b", "a"], ["a", "b", "c"], "x").tolist() == [1, 0, 0]
    assert match_labels(labels, None, ["a", "b"], "x").tolist() == [0, 1, 1]
    # WordNet ids and words for the same classes: in the same order.
    assert match_labels(labels, ["n01", "n02"], ["cat", "dog"], "x").tolist() == [0, 1, 1]
    with pytest.raises(InputError, match="x: an image has the label 1, but there are 1 class names"):
        match_labels(labels, ["a"], ["b", "a"], "x")
    with pytest.raises(InputError, match="x: it has no class 'z'"):
        match_labels(labels, ["a", "z"], ["a", "b", "c"], "x")
