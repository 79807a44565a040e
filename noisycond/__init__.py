"""noisycond: pre-train conditional diffusion models with slightly corrupted conditions (arXiv:2405.20494)."""

__version__ = "0.1.0"

from noisycond.corruption import LabelCorruption, corrupt_labels
from noisycond.perturbation import ConditionEmbeddingPerturbation


__all__ = ["ConditionEmbeddingPerturbation", "LabelCorruption", "corrupt_labels"]
