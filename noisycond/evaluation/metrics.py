"""The metrics by name: what each is called in tables, which way is better, and what it needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from noisycond.errors import InputError, closest


@dataclass(frozen=True)
class Metric:
    """A metric as tables and plots show it.

    Attributes:
        title: what a table's column says. better: which way is better, None where neither is by itself.
        family: metrics of one family are computed together. decimals: digits after the point in tables.
    """

    title: str
    better: Literal["lower", "higher"] | None
    family: str
    decimals: int = 3

    @property
    def heading(self) -> str:
        """The title with an arrow towards the better values."""
        return self.title + {"lower": " ↓", "higher": " ↑", None: ""}[self.better]

    def form(self, value: float) -> str:
        """The format of a value in tables: the metric's digits, unless they would show nothing of a small value."""
        return ".1e" if 0 < abs(value) < 10**-self.decimals else f".{self.decimals}f"


METRICS = {
    "fid": Metric("FID", "lower", "fid", 2),
    "sfid": Metric("sFID", "lower", "sfid", 2),
    "inception_score": Metric("IS", "higher", "inception_score", 2),
    "kid": Metric("KID", "lower", "kid", 5),
    "precision": Metric("precision", "higher", "neighbours"),
    "recall": Metric("recall", "higher", "neighbours"),
    "density": Metric("density", "higher", "neighbours"),
    "coverage": Metric("coverage", "higher", "neighbours"),
    "topp_fidelity": Metric("TopP", "higher", "topology"),
    "topp_diversity": Metric("TopR", "higher", "topology"),
    "topp_f1": Metric("TopPR F1", "higher", "topology"),
    "rmd_top": Metric("RMD of the hardest", None, "difficulty", 2),
    "rmd_mean": Metric("RMD", None, "difficulty", 2),
    "entropy": Metric("entropy", None, "entropy", 2),
    "memorization_ratio": Metric("memorized", "lower", "memorization"),
    "nearest_train_distance": Metric("distance to training", None, "memorization", 3),
    "clip_score": Metric("CLIP score", "higher", "clip_score", 2),
    "lpips_diversity": Metric("LPIPS diversity", "higher", "lpips"),
    "class_agreement": Metric("class agreement", "higher", "class_agreement"),
    "edge_f1": Metric("edge F1", "higher", "control_edges"),
    "edge_f1_shuffled": Metric("edge F1, shuffled", None, "control_edges"),
    "mask_iou": Metric("mask IoU", "higher", "control_masks"),
    "mask_iou_shuffled": Metric("mask IoU, shuffled", None, "control_masks"),
}


def metric_of(name: str) -> Metric:
    """The metric of this name; of a name that is none's, one under its own name, of which neither way is better."""
    return METRICS.get(name, Metric(name, None, name))


def check_names(option: str, names: Sequence[str]) -> None:
    """Raises InputError for a name that is no metric's; names the flag and the nearest metric."""
    for name in names:
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise InputError(f"{option} {name}: no such metric{closest(name, METRICS)}; there are {known}.")
