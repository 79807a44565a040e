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
from scipy.spatial import KDTree
from scipy.special import digamma, gammaln
from scipy.stats import multivariate_normal
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


def rows(wide: bool = True) -> list[dict]:
    """A dict per comparison: metric, reference, features, ours, theirs, difference, bound (what the tests demand).

    Args:
        wide: also compare on random features of 2,048 dimensions, 3,000 and 2,500 rows.
    """
    real, generated = digits_features()
    named = {"digits, 64": (real.pooled, generated.pooled)}
    if wide:
        named["random, 2,048"] = random_features(3000, 2048, 1), random_features(2500, 2048, 2, shift=0.1)
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
        theirs = prc_features_to_metric(
            b, a, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, verbose=False
        )
        for metric in ("precision", "recall"):
            add(metric, "torch-fidelity", name, getattr(found_here, metric), theirs[metric], "absolute", 1e-6)

    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(generated.spatial.double()),
        fid_features_to_statistics(real.spatial.double()),
        False,
    )["frechet_inception_distance"]
    ours = fid(real=real.spatial, generated=generated.spatial).value
    add("sFID, as FID of spatial features", "torch-fidelity", "digits, spatial", ours, theirs, "relative", 1e-6)

    theirs = isc_features_to_metric(generated.logits, splits=1, shuffle=False)["inception_score_mean"]
    ours = inception_score(logits=generated.logits, splits=1).value
    add("IS, one split", "torch-fidelity", "digits, logits", ours, theirs, "relative", 1e-9)

    ours = rmd(
        real=real.pooled,
        real_labels=real.labels,
        generated=generated.pooled,
        generated_labels=generated.labels,
        ridge=0.0,
    )["rmd_mean"].value
    add("RMD", "scikit-learn, written out", "digits, 64", ours, rmd_by_hand(real, generated), "relative", 1e-6)
    ours = sample_entropy(generated.pooled, "gaussian").value
    theirs = multivariate_normal(cov=np.cov(generated.pooled.double().numpy(), rowvar=False)).entropy()
    add("entropy, Gaussian", "SciPy", "digits, 64", ours, float(theirs), "relative", 1e-9)
    ours, theirs = sample_entropy(generated.pooled, "knn", k=5).value, entropy_by_hand(generated.pooled, 5)
    add("entropy, nearest neighbours", "SciPy's k-d tree, written out", "digits, 64", ours, theirs, "relative", 1e-6)
    return found


def rmd_by_hand(real: Features, generated: Features) -> float:
    """Mean over the generated images of d_class − d_background with scikit-learn's covariances."""
    features, labels = real.pooled.double().numpy(), real.labels.numpy()
    means = np.stack([features[labels == label].mean(axis=0) for label in range(10)])
    shared = EmpiricalCovariance(assume_centered=True).fit(features - means[labels])
    whole = EmpiricalCovariance().fit(features)
    rows, asked = generated.pooled.double().numpy(), generated.labels.numpy()
    return float((shared.mahalanobis(rows - means[asked]) - whole.mahalanobis(rows)).mean())


def entropy_by_hand(features: torch.Tensor, k: int) -> float:
    """ψ(N) − ψ(k) + log V_D + D · mean log ε, with the distances ε of SciPy's k-d tree."""
    rows = features.double().numpy()
    count, dim = rows.shape
    distances = KDTree(rows).query(rows, k=k + 1)[0][:, k]
    log_volume = dim / 2 * np.log(np.pi) - gammaln(dim / 2 + 1)
    return float(digamma(count) - digamma(k) + log_volume + dim * np.log(distances).mean())


def top_pr_rows(seeds: int = 20, dim: int = 16) -> list[dict]:
    """TopP&R of 600 random points per set over seeds of its bootstrap, ours and the package's; few dimensions, so that
    the package's projection is off."""
    from top_pr import compute_top_pr

    real, generated = random_features(600, dim, 3), random_features(600, dim, 4, shift=0.6)
    ours, theirs = [], []
    for seed in range(seeds):
        found = topological_precision_recall(real=real, generated=generated, seed=seed)
        ours.append((found.fidelity, found.diversity))
        np.random.seed(seed)  # the package draws from the global generator
        found = compute_top_pr(real_features=real, fake_features=generated)
        theirs.append((float(found["fidelity"]), float(found["diversity"])))
    ours, theirs = np.array(ours), np.array(theirs)
    return [
        {"metric": metric, "ours": ours[:, column], "theirs": theirs[:, column]}
        for column, metric in enumerate(("TopP", "TopR"))
    ]


def table() -> str:
    """The comparisons as Markdown."""
    lines = [
        "| metric | reference | features | ours | reference's | difference | bound |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows():
        difference = f"{row['difference']:.0e} {row['kind']}" if row["difference"] else "0"
        lines.append(
            f"| {row['metric']} | {row['reference']} | {row['features']} | {row['ours']:.6g} | {row['theirs']:.6g} | "
            f"{difference} | {row['bound']:.0e} |"
        )
    for row in top_pr_rows():
        ours, theirs = (f"{row[name].mean():.3f} ± {row[name].std(ddof=1):.3f}" for name in ("ours", "theirs"))
        error = np.hypot(row["ours"].std(ddof=1), row["theirs"].std(ddof=1)) / len(row["ours"]) ** 0.5
        difference = abs(row["ours"].mean() - row["theirs"].mean())
        lines.append(
            f"| {row['metric']}, {len(row['ours'])} seeds | top-pr | random, 16 | {ours} | {theirs} | "
            f"{difference:.3f} absolute | {3 * error:.3f}, three standard errors |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
