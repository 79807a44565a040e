"""What a γ of CEP is to the class embedding of a trained model: python -m noisycond.theory.embedding --pipeline DIR

Letters: K classes, D dimensions of the embedding, e² the mean variance of the class embeddings along the directions in
which they differ. docs/theory.md has the steps.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.spatial.distance import cdist, pdist

from noisycond.arguments import Arguments, flag, parse_arguments
from noisycond.errors import one_sentence_errors, require
from noisycond.markdown import markdown_table
from noisycond.theory.mixture import NOISES


@dataclass(frozen=True)
class ClassEmbedding:
    """The class embeddings of a model, without the null embedding.

    Attributes:
        rows: float64 [K, D].

    Raises:
        InputError: fewer than two classes, or two equal rows: no γ is small beside their distance.
    """

    rows: np.ndarray

    def __post_init__(self):
        require(self.rows.ndim == 2 and len(self.rows) > 1, "an embedding needs the rows of at least two classes.")
        require(self.closest > 0, "two classes have the same embedding, so the model cannot tell them apart.")

    @property
    def closest(self) -> float:
        """The least distance of two classes."""
        return float(pdist(self.rows).min())

    @property
    def variances(self) -> np.ndarray:
        """Of the rows around their mean, along the min(K - 1, D) directions in which they can differ, rising:
        float64."""
        classes, dim = self.rows.shape
        centred = self.rows - self.rows.mean(0)
        values = np.linalg.svd(centred, compute_uv=False)[: min(classes - 1, dim)]
        return np.square(values[::-1]) / classes

    def theory_gamma(self, gamma: float) -> float:
        """γ' of one-hot conditions at which noise and class variance have the ratio that γ of CEP gives them here, on
        average over directions: K γ'² = γ² / (D e²)."""
        classes, dim = self.rows.shape
        return gamma / math.sqrt(classes * dim * self.variances.mean())

    def mistaken(
        self, gamma: float, noise: Literal["gaussian", "uniform"], draws: int = 20_000, seed: int = 0
    ) -> float:
        """The share of perturbed embeddings c(y) + δ that lie closer to another class than to y, in [0, 1].

        For a Gaussian δ the nearest class is the likeliest, so no denoiser can tell more classes apart than this
        leaves; for a uniform one it is the bound of a guess by distance. Its standard error is at most 1/(2 √draws).

        Args:
            gamma: γ of CEP; δ has the variance γ² Var ξ / D per coordinate. draws: shared out evenly over the classes.
        """
        classes, dim = self.rows.shape
        rng = np.random.default_rng(seed)
        each = math.ceil(draws / classes)
        wrong = 0
        for label, row in enumerate(self.rows):
            shape = (each, dim)
            drawn = rng.standard_normal(shape) if noise == "gaussian" else rng.uniform(-1, 1, shape)
            nearest = cdist(row + gamma / math.sqrt(dim) * drawn, self.rows).argmin(1)
            wrong += int((nearest != label).sum())
        return wrong / (each * classes)


@dataclass
class EmbeddingArguments(Arguments):
    pipeline: str = flag(None, "A class-conditional pipeline (LDM or DiT): a folder or Hub id.")
    gamma: list[float] = flag([0.3, 1.0, 3.0, 10.0, 30.0, 100.0], "--cep_gamma to describe.")
    trust_remote_code: bool = flag(False, "Allow code that the pipeline brings with it.")

    def __post_init__(self):
        super().__post_init__()
        require(self.pipeline, "--pipeline is needed: a folder or Hub id of a class-conditional pipeline.")
        for gamma in self.gamma:
            require(0 <= gamma < math.inf, f"--gamma has {gamma}, but it must be 0 or a positive number.")


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(EmbeddingArguments, argv)
    from noisycond import sampling

    rows = sampling.class_embeddings(sampling.open_pipeline(args.pipeline, args.trust_remote_code))
    require(rows is not None, f"--pipeline {args.pipeline} has no class embedding.")
    embedding = ClassEmbedding(rows.double().numpy())
    classes, dim = embedding.rows.shape
    variances = embedding.variances
    print(
        f"{classes} classes in {dim} dimensions; variances along the directions in which they differ "
        f"{variances[0]:.3g} to {variances[-1]:.3g}, mean {variances.mean():.3g}; the closest two are "
        f"{embedding.closest:.3g} apart.\n"
    )
    lines = [
        [
            f"{gamma:g}",
            f"{embedding.theory_gamma(gamma):.2g}",
            *(f"{embedding.mistaken(gamma, of):.2%}" for of in NOISES),
        ]
        for gamma in sorted(args.gamma)
    ]
    print(markdown_table(["--cep_gamma", "γ of the theory", "mistaken, CEP-G", "mistaken, CEP-U"], lines, left=()))


if __name__ == "__main__":
    sys.exit(main())
