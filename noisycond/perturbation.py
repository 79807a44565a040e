"""Condition embedding perturbation (CEP): a small noise on the condition embedding, in training only.

Section 4 of arXiv:2405.20494. Needs torch and `randomness.py` only, so both files can be copied into another trainer.
Letters: B examples, D the embedding dimension.
"""

import math

import torch
from torch import nn

from noisycond import randomness
from noisycond.randomness import Purpose


CEP_TYPES = ("uniform", "gaussian")


class ConditionEmbeddingPerturbation(nn.Module):
    r"""Adds δ to a condition embedding in train mode; the identity in eval mode and at γ = 0, bit for bit.

    Section 4 of arXiv:2405.20494, with D the last dimension of the embedding, independent per coordinate and token:

        CEP-U: δ ~ U(-γ/√D, γ/√D)         per-coordinate variance γ²/(3D)
        CEP-G: δ ~ N(0, (γ/√D)²)          per-coordinate variance γ²/D

    ```py
    perturb = ConditionEmbeddingPerturbation(gamma=1.0)
    embedding = perturb(text_encoder(input_ids)[0])   # in the training loop, before the denoiser
    ```

    Called without keys it draws from a stream of its own, another one on every call; torch's global generators are
    left alone. Called with keys it is a pure function of them: the recomputed forward of gradient checkpointing, a
    second block that reads the embedding, or a resumed run sees the same δ. Without keys, give each process of a
    distributed run its own seed: with one seed they all draw the same.

    Args:
        gamma: γ ≥ 0; the paper's default is 1.
        type: `uniform` (CEP-U) or `gaussian` (CEP-G).
        seed: seed of the draws.
        shared: one δ [D] per example for all its tokens, instead of one per token.
        purpose: what the draws are for; two embeddings of one example need two names, or they get the same δ.

    Raises:
        ValueError: γ is negative or not finite, or the type is unknown.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        type: str = "uniform",
        seed: int = 0,
        shared: bool = False,
        purpose: str = Purpose.CONDITION_PERTURBATION,
    ):
        super().__init__()
        if not (gamma >= 0.0 and math.isfinite(gamma)):
            raise ValueError(f"the CEP scale gamma is {gamma}, but it must be 0 or a positive number.")
        if type not in CEP_TYPES:
            raise ValueError(f"the CEP type is {type!r}, but it must be one of {', '.join(CEP_TYPES)}.")
        self.gamma, self.type, self.seed = float(gamma), type, seed
        self.shared, self.purpose = shared, purpose
        self.calls = 0

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, type={self.type!r}, seed={self.seed}"

    def forward(
        self,
        embedding: torch.Tensor,
        keys: torch.Tensor | None = None,
        where: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Perturbs a batch of embeddings.

        Args:
            embedding [B, ..., D]: any floating dtype.
            keys [B]: int64; δ of an example is a function of (seed, key). None: the module's own stream.
            where [B] or [B, L]: bool; only these examples, or tokens, are perturbed. None: all.
            scale [] or [B]: float; a factor on γ, for all or per example. None: 1.

        Returns:
            The embedding's shape and dtype. δ is drawn in float32 and cast.
        """
        if not self.training or self.gamma == 0.0:
            return embedding
        delta = self.draw(embedding.shape, self._own_keys(embedding) if keys is None else keys)
        return self.add(embedding, delta, where, scale)

    def draw(self, shape: torch.Size, keys: torch.Tensor) -> torch.Tensor:
        """δ for an embedding of this shape [B, ..., D], on the device of keys [B]: float32 [B, ..., D], or
        [B, 1, ..., D] if shared."""
        bound = self.gamma / math.sqrt(shape[-1])
        sizes = [1] * (len(shape) - 2) + [shape[-1]] if self.shared else shape[1:]
        if self.type == "uniform":
            return (2.0 * randomness.uniform(self.seed, self.purpose, keys, sizes) - 1.0) * bound
        return randomness.normal(self.seed, self.purpose, keys, sizes) * bound

    @staticmethod
    def add(
        embedding: torch.Tensor,
        delta: torch.Tensor,
        where: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The embedding with a δ that was drawn before; arguments as in `forward`."""
        if scale is not None:
            delta = delta * scale.to(delta).reshape(-1, *[1] * (embedding.dim() - 1))
        if where is not None:
            delta = delta * where.reshape(*where.shape, *[1] * (embedding.dim() - where.dim()))
        return embedding + delta.to(embedding.dtype)

    def _own_keys(self, embedding: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        # Counted down from -1, so that the own stream never meets the keys of a training loop.
        return randomness.step_keys(-self.calls, torch.arange(len(embedding), device=embedding.device))


def embedding_dropout(
    embedding: torch.Tensor,
    probability: float,
    seed: int,
    keys: torch.Tensor,
    purpose: str = Purpose.EMBEDDING_DROPOUT,
) -> torch.Tensor:
    """Baseline of arXiv:2405.20494: zeroes coordinates of the embedding with this probability and scales the rest by
    1/(1 - p), as `torch.nn.Dropout` does, but as a pure function of the keys.

    Args:
        embedding [B, ..., D], probability in [0, 1), seed, keys [B] int64.
        purpose: two embeddings of one example need two names, or they lose the same coordinates.
    """
    draws = randomness.uniform(seed, purpose, keys, embedding.shape[1:])
    return embedding * ((draws >= probability).to(embedding.dtype) / (1.0 - probability))


def smooth_embedding(embedding: torch.Tensor, table: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Baseline of arXiv:2405.20494: label smoothing of a class embedding, (1 - s) e_y + s · mean over classes of e.

    Args:
        embedding [B, D]: the embeddings e_y; table [K, D]: those of all K classes, the null class not among them;
        smoothing: s in [0, 1].
    """
    return torch.lerp(embedding, table.mean(0, keepdim=True).to(embedding.dtype), smoothing)
