"""The denoiser as the training loop sees it: condition in, prediction out, whatever the architecture.

Letters: B examples, C latent channels, h × w their size, D the embedding dimension, K classes.
"""

import torch
from torch import nn

from noisycond import perturbation
from noisycond.denoisers.text import TextEmbedding
from noisycond.perturbation import ConditionEmbeddingPerturbation


# What of a condition a backbone reads beside the embedding.
BESIDE_EMBEDDING = ("guidance", "control")


class ClassEncoder(nn.Module):
    """A learned embedding per class, with the null class in the last row, and the embedding baselines of
    arXiv:2405.20494.

    Args:
        num_classes: K; the table has K + 1 rows and row K is the null embedding.
        dim: D.
        embedding_dropout: probability of the embedding-dropout baseline.
        label_smoothing: share of the mean class embedding in every class embedding (not in the null embedding).
        seed: seed of the dropout.
        std: standard deviation of the initial embeddings; DiT starts at 0.02, LDM at 1.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        embedding_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        seed: int = 0,
        std: float = 0.02,
    ):
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.table.weight, std=std)
        self.num_classes = num_classes
        self.embedding_dropout, self.label_smoothing, self.seed = embedding_dropout, label_smoothing, seed

    @property
    def null_class(self) -> int:
        """The label of an example without a condition."""
        return self.num_classes

    def is_null(self, condition: dict) -> torch.BoolTensor:
        """Which examples of a batch have no condition: bool [B]."""
        return condition["class_labels"] == self.null_class

    def forward(self, condition: dict, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Class labels int64 [B] in [0, K] to embeddings [B, D]. In train mode the baselines apply; the keys int64 [B]
        are what dropout is drawn from."""
        embedding = self.table(condition["class_labels"])
        if not self.training:
            return embedding
        if self.label_smoothing > 0:
            smooth = perturbation.smooth_embedding(embedding, self.table.weight[:-1], self.label_smoothing)
            embedding = torch.where(self.is_null(condition)[:, None], embedding, smooth)
        if self.embedding_dropout > 0:
            if keys is None:
                raise ValueError("embedding dropout draws from keys: pass keys= in train mode.")
            embedding = perturbation.embedding_dropout(embedding, self.embedding_dropout, self.seed, keys)
        return embedding


class ConditionalDenoiser(nn.Module):
    """Encodes the condition, perturbs the embedding (CEP) and denoises.

    Args:
        encoder: `encoder(condition, keys) → embedding [B, ..., D]` or [`TextEmbedding`], with
            `is_null(condition) → bool [B]`.
        backbone: `backbone(noisy, timesteps, embedding) → prediction`, with `export() → diffusers model` and
            `shard_units`.
        perturbation: CEP, or None. Of a [`TextEmbedding`] the sequence gets a δ per token, and the pooled embedding
            one of its own.
        fixed: draw δ from the example's `index` instead of the step's keys, so an example always gets the same one.
        perturb_null: whether the null embedding is perturbed too.
    """

    def __init__(
        self,
        encoder: nn.Module,
        backbone: nn.Module,
        perturbation: ConditionEmbeddingPerturbation | None = None,
        fixed: bool = False,
        perturb_null: bool = True,
    ):
        super().__init__()
        self.encoder, self.backbone, self.perturbation = encoder, backbone, perturbation
        self.fixed, self.perturb_null = fixed, perturb_null
        self.pooled_perturbation = None
        if perturbation is not None:
            self.pooled_perturbation = ConditionEmbeddingPerturbation(
                perturbation.gamma, perturbation.type, perturbation.seed, purpose=f"{perturbation.purpose}: pooled"
            )

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of the modules that FSDP gathers one at a time, under the name by which accelerate asks."""
        here = {type(module).__name__ for module in self.modules()}
        units = (*self.backbone.shard_units, *getattr(self.encoder, "shard_units", ()))
        return [name for name in units if name in here]

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: dict, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One prediction.

        Args:
            noisy [B, C, h, w]: noisy latents. timesteps [B]: int64.
            condition: what the encoder reads (`class_labels` int64 [B]; tokens, or embeddings of them), for fixed CEP
                `index` int64 [B]; for a distilled U-Net `guidance` float32 [B, E], see
                [`noisycond.distillation.guidance_embedding`], and for a controlled one `control` float32
                [B, 3, R, R], see [`noisycond.denoisers.control.ControlledUNet`].
            keys [B]: int64; the perturbation is a pure function of them. None: it draws from its own stream.

        Returns:
            [B, C, h, w], or [B, 2C, h, w] where the variance is learned.
        """
        embedding = self.encoder(condition, keys)
        if self.perturbation is not None:
            keys = condition["index"] if self.fixed and self.training else keys
            where = None if self.perturb_null else ~self.encoder.is_null(condition)
            embedding = self._perturbed(embedding, keys, where)
        beside = {name: condition[name] for name in BESIDE_EMBEDDING if name in condition}
        return self.backbone(noisy, timesteps, embedding, **beside)

    def _perturbed(self, embedding, keys: torch.Tensor | None, where: torch.Tensor | None):
        if not isinstance(embedding, TextEmbedding):
            return self.perturbation(embedding, keys, where)
        pooled = embedding.pooled
        return embedding._replace(
            sequence=self.perturbation(embedding.sequence, keys, where),
            pooled=None if pooled is None else self.pooled_perturbation(pooled, keys, where),
        )
