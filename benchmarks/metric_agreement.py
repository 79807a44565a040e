#!/usr/bin/env python
"""Every metric beside its reference implementation on the same features: the table of docs/metrics.md.

python benchmarks/metric_agreement.py

The features are those of the digits classifier (train against test split, and train against noisy train images), and
random ones of 2,048 dimensions. Needs the dev dependencies prdc and top-pr. Prints Markdown.
"""

import contextlib
import io

import numpy as np
import torch
from sklearn.covariance import EmpiricalCovariance
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from noisycond.data.sources import Digits
from noisycond.evaluation.difficulty import rmd
from noisycond.evaluation.entropy import sample_entropy
from noisycond.evaluation.extraction import extract_in_memory
from noisycond.evaluation.extractors import open_extractor
from noisycond.evaluation.features import Features
from noisycond.evaluation.images import Resize
from noisycond.evaluation.moments import fid
from noisycond.evaluation.neighbours import precision_recall_density_coverage
from noisycond.evaluation.scores import inception_score, kid
from noisycond.evaluation.topology import topological_precision_recall


def digits_features() -> tuple[Features, Features]:
    """Of the test split (real) and of the train split (in the place of generated images)."""
    extractor = open_extractor("digits")
    return tuple(extract_in_memory(split, Digits(split), extractor, Resize(32)) for split in ("test", "train"))


def random_features(count: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated Gaussian features of decaying variance, float32."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.5
    rows = torch.randn(count, dim, generator=generator, dtype=torch.float64) * spectrum
    return (rows + shift * spectrum).float()


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def rows() -> list[dict]:
    """A dict per comparison: metric, reference, features, ours, theirs, difference, bound (what the tests demand)."""
    real, generated = digits_features()
    wide = random_features(3000, 2048, 1), random_features(2500, 2048, 2, shift=0.1)
    named = {"digits, 64": (real.pooled, generated.pooled), "random, 2,048": wide}
    found = []

    def add(metric: str, reference: str, features: str, ours: float, theirs: float, kind: str, bound: float) -> None:
        difference = relative(ours, theirs) if kind == "relative" else abs(ours - theirs)
        found.append(
            {
                "metric": metric,
                "reference": reference,
                "features": features,
                "ours": ours,
                "theirs": theirs,
                "difference": difference,
                "kind": kind,
                "bound": bound,
            }
        )

    for name, (a, b) in named.items():
        theirs = fid_statistics_to_metric(
            fid_features_to_statistics(b.double()), fid_features_to_statistics(a.double()), False
        )["frechet_inception_distance"]
        add("FID", "torch-fidelity", name, fid(real=a, generated=b).value, theirs, "relative", 1e-6)

        size = min(len(a), len(b), 1000)
        theirs = kid_features_to_metric(
            b[:size].double(), a[:size].double(), kid_subsets=1, kid_subset_size=size, verbose=False
        )["kernel_inception_distance_mean"]
        ours = kid(real=a[:size], generated=b[:size], subsets=1, subset_size=size).value
        add("KID, one subset", "torch-fidelity", name, ours, theirs, "absolute", 1e-8)

        found_here = precision_recall_density_coverage(real=a, generated=b, precision_k=5, coverage_k=5)
        with contextlib.redirect_stdout(io.StringIO()):
            from prdc import compute_prdc

            theirs = compute_prdc(a.numpy(), b.numpy(), nearest_k=5)
        for metric in ("precision", "recall", "density", "coverage"):
            add(metric, "prdc", name, getattr(found_here, metric), float(theirs[metric]), "absolute", 1e-12)
        found_here = precision_recall_density_coverage(real=a, generated=b, precision_k=3)
        theirs = prc_features_to_metric(b, a, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, verbose=False)
        for metric in ("precision", "recall"):
            add(metric, "torch-fidelity", name, getattr(found_here, metric), theirs[metric], "absolute", 1e-6)

    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(generated.spatial.double()), fid_features_to_statistics(real.spatial.double()), False
    )["frechet_inception_distance"]
    ours = fid(real=real.spatial, generated=generated.spatial).value
    add("sFID, as FID of spatial features", "torch-fidelity", "digits, spatial", ours, theirs, "relative", 1e-6)

    theirs = isc_features_to_metric(generated.logits, splits=1, shuffle=False)["inception_score_mean"]
    ours = inception_score(logits=generated.logits, splits=1).value
    add("IS, one split", "torch-fidelity", "digits, logits", ours, theirs, "relative", 1e-9)

    found += [top_pr_row(name, index, real, generated) for index, name in enumerate(("TopP", "TopR", "TopPR F1"))]
    add("RMD", "scikit-learn, written out", "digits, 64", *rmd_pair(real, generated), "relative", 1e-3)
    add("entropy, Gaussian", "written out", "digits, 64", *entropy_pair(generated), "relative", 1e-9)
    return found
