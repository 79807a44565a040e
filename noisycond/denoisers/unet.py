"""The U-Net of LDM (arXiv:2112.10752), which attends to the condition embedding, in diffusers' classes.

Letters: B examples, C latent channels, h × w their size, L tokens of the condition, D their dimension, K classes.
"""

import copy

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from noisycond.denoisers.text import TextEmbedding
from noisycond.errors import require
from noisycond.pipelines import ClassEmbedder, LDMClassToImagePipeline


class UNetBackbone(nn.Module):
    """A `UNet2DConditionModel` that reads a condition embedding [B, D] or [B, L, D], or a [`TextEmbedding`].

    Args:
        config: the arguments of `UNet2DConditionModel`.
    """

    model_class = UNet2DConditionModel
    known_as = ("UNet2DConditionModel",)
    subfolder = "unet"
    fits_any_size = True
    can_learn_variance = False
    # Classes of modules that FSDP gathers one at a time.
    shard_units = ("BasicTransformerBlock", "ResnetBlock2D")
    # LDM's class embedder starts as `torch.nn.Embedding` does, at variance 1.
    embedding_std = 1.0

    def __init__(self, **config):
        super().__init__()
        self.model = UNet2DConditionModel(**config)
        self.initialize()

    @classmethod
    def around(cls, model: UNet2DConditionModel) -> "UNetBackbone":
        """A backbone that trains a U-Net as it is."""
        backbone = cls.__new__(cls)
        nn.Module.__init__(backbone)
        backbone.model = model
        return backbone

    @staticmethod
    def check(config: dict, latent_size: int, num_classes: int) -> None:
        """Raises InputError where the latents cannot be halved once per level but the last."""
        multiple = 2 ** (len(config.get("block_out_channels", (0, 0, 0, 0))) - 1)
        require(
            latent_size % multiple == 0,
            f"--resolution: the latents are {latent_size} pixels wide, but this U-Net needs a multiple of {multiple}.",
        )

    @property
    def dim(self) -> int:
        """D, the dimension of the condition embedding."""
        return self.model.config.cross_attention_dim

    @torch.no_grad()
    def initialize(self) -> None:
        """The last layer of every residual branch and of the model starts at 0, as in LDM's code (Section 3.1 of
        arXiv:2105.05233 has it so): every block starts as the identity and the prediction at 0."""
        zero = [self.model.conv_out]
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                zero.append(module.conv2)
            elif isinstance(module, Transformer2DModel):
                zero.append(module.proj_out)
        for module in zero:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        embedding: torch.Tensor | TextEmbedding,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noisy latents [B, C, h, w], timesteps int64 [B] and embeddings [B, D] or [B, L, D] to a prediction
        [B, C, h, w]. A distilled U-Net also reads an embedding of the guidance [B, `time_cond_proj_dim`]."""
        if isinstance(embedding, TextEmbedding):
            embedding = embedding.sequence  # LDM attends to padding too, and knows no pooled embedding
        context = embedding[:, None] if embedding.dim() == 2 else embedding
        return self.model(noisy, timesteps, context, timestep_cond=guidance, return_dict=False)[0]

    def export(self, class_table: torch.Tensor) -> tuple[UNet2DConditionModel, ClassEmbedder]:
        """The model and the class embedder of an [`LDMClassToImagePipeline`] that give the same predictions, in eval
        mode and float32, with weights of their own.

        Args:
            class_table [K + 1, D]: embeddings of the classes and, last, the null embedding.
        """
        return self.export_model(), ClassEmbedder.from_table(class_table.detach().float().cpu())

    def export_model(self) -> UNet2DConditionModel:
        """The U-Net alone, in eval mode and float32 on the CPU, with weights of its own, adapters (LoRA) included."""
        if hasattr(self.model, "peft_config"):
            return copy.deepcopy(self.model).float().cpu().eval()
        # Built on the meta device and filled by reference: initializing what is replaced at once takes long.
        with torch.device("meta"):
            model = UNet2DConditionModel(**self.model.config)
        state = {name: value.detach().float().cpu().clone() for name, value in self.model.state_dict().items()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def load_model(self, folder: str, subfolder: str | None) -> None:
        """Takes the weights of a pretrained U-Net alone, or in a pipeline, where `subfolder` is given."""
        at = {} if subfolder is None else {"subfolder": subfolder}
        self.model.load_state_dict(UNet2DConditionModel.from_pretrained(folder, **at).state_dict())

    def load(self, folder: str, subfolder: str | None, num_classes: int) -> torch.Tensor | None:
        """Takes the weights of a pretrained model.

        Args:
            folder: a pipeline (a folder or Hub id) where `subfolder` is given, or a U-Net alone.
            num_classes: K.

        Returns:
            The class table [K + 1, D], null embedding last; None where there is a U-Net alone.

        Raises:
            InputError: the embedder knows another number of classes.
        """
        if subfolder is None:
            self.load_model(folder, None)
            return None
        pipeline = LDMClassToImagePipeline.from_pretrained(folder, vqvae=None)
        known = pipeline.class_embedder.null_class
        require(known == num_classes, f"the pretrained model has {known} classes, but the dataset has {num_classes}.")
        self.model.load_state_dict(pipeline.unet.state_dict())
        return pipeline.class_embedder.embedding.weight.detach()
