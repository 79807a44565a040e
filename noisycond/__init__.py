"""noisycond: pre-train conditional diffusion models with slightly corrupted conditions (arXiv:2405.20494)."""

__version__ = "0.1.0"

from noisycond.corruption import LabelCorruption, corrupt_labels
from noisycond.perturbation import ConditionEmbeddingPerturbation


__all__ = ["ConditionEmbeddingPerturbation", "LabelCorruption", "attach_cep", "corrupt_labels"]


def __getattr__(name: str):
    if name == "attach_cep":  # imported when asked for: it takes torch's compiler along
        from noisycond.attach import attach_cep

        return attach_cep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
