"""A frozen U-Net with what makes it follow a control image: a ControlNet (arXiv:2302.05543) or a T2I-Adapter
(arXiv:2302.08453), which is what is trained.

Letters: B examples, C latent channels, h × w their size, R the resolution, L tokens, D their dimension.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from diffusers import ControlNetModel, ModelMixin, T2IAdapter, UNet2DConditionModel
from torch import nn

from noisycond.denoisers.text import TextEmbedding
from noisycond.errors import InputError, in_one_line
from noisycond.lora import inject_lora, merged_state


# Channels of the control encoder, of which every one after the first halves the side: as in the ControlNet paper's
# code for a first stage of factor 8, and fewer or more of them for others.
HINT_CHANNELS = (16, 32, 96, 256)


class ControlledUNet(nn.Module):
    """A `UNet2DConditionModel` that is frozen, and what is trained beside it.

    Args:
        unet: the base's, which is frozen here. adapter: what is trained, `model` to those who train it.
    """

    # Classes of modules that FSDP gathers one at a time.
    shard_units = ("BasicTransformerBlock", "ResnetBlock2D")

    def __init__(self, unet: UNet2DConditionModel, adapter: ModelMixin):
        super().__init__()
        self.unet, self.model = unet.eval().requires_grad_(False), adapter

    @property
    def dim(self) -> int:
        """D, the dimension of the condition embedding."""
        return self.unet.config.cross_attention_dim

    def train(self, mode: bool = True) -> "ControlledUNet":
        super().train(mode)
        self.unet.eval()
        return self

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        embedding: torch.Tensor | TextEmbedding,
        control: torch.Tensor,
    ) -> torch.Tensor:
        """One prediction.

        Args:
            noisy [B, C, h, w]: noisy latents. timesteps [B]: int64.
            embedding [B, D] or [B, L, D]: the condition, read by the base and, of a ControlNet, by that too.
            control [B, 3, R, R]: control images in [0, 1].
        """
        if isinstance(embedding, TextEmbedding):
            embedding = embedding.sequence
        context = embedding[:, None] if embedding.dim() == 2 else embedding
        residuals = self.residuals(noisy, timesteps, context, control)
        return self.unet(noisy, timesteps, context, return_dict=False, **residuals)[0]

    def residuals(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, control: torch.Tensor
    ) -> dict:
        """What is added within the U-Net, as arguments of its call."""
        raise NotImplementedError

    def enable_gradient_checkpointing(self) -> None:
        """Of the base, whose activations are kept too, and of what is trained where it can."""
        for model in (self.unet, self.model):
            if getattr(model, "_supports_gradient_checkpointing", False):
                model.enable_gradient_checkpointing()

    def export_model(self) -> ModelMixin:
        """What was trained, in eval mode and float32 on the CPU, with weights of its own."""
        with torch.device("meta"):
            model = type(self.model).from_config(self.model.config)
        state = {name: value.detach().float().cpu().clone() for name, value in self.trained_state().items()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval().requires_grad_(False)

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The weights of what was trained, by the names that its class has."""
        return self.model.state_dict()


class ControlNetBackbone(ControlledUNet):
    """With a `ControlNetModel`; of one with LoRA the weights that are exported have it merged in."""

    def residuals(self, noisy, timesteps, context, control) -> dict:
        down, middle = self.model(noisy, timesteps, context, controlnet_cond=control, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def trained_state(self) -> dict[str, torch.Tensor]:
        return merged_state(self.model)


class AdapterBackbone(ControlledUNet):
    """With a `T2IAdapter` of diffusers or the `LDMAdapter` of our control pipelines."""

    def residuals(self, noisy, timesteps, context, control) -> dict:
        features = self.model(control)
        return {"down_intrablock_additional_residuals": [feature.to(noisy.dtype) for feature in features]}


def hint_channels(factor: int) -> tuple[int, ...]:
    """Channels of a ControlNet's control encoder, whose stride is to be the first stage's factor, a power of 2."""
    halvings = factor.bit_length() - 1
    more = HINT_CHANNELS[-1:] * max(0, halvings + 1 - len(HINT_CHANNELS))
    return (*HINT_CHANNELS, *more)[: halvings + 1]


def make_controlnet(unet: UNet2DConditionModel, factor: int) -> ControlNetModel:
    """A ControlNet that starts as the U-Net's encoder, with zero convolutions behind it: at first nothing changes
    (arXiv:2302.05543).

    Args:
        factor: of the first stage, the stride of the control encoder.

    Raises:
        InputError: diffusers has no ControlNet of such a U-Net.
    """
    try:
        if unet.device.type == "meta":
            with torch.device("meta"):
                return ControlNetModel.from_unet(
                    unet, conditioning_embedding_out_channels=hint_channels(factor), load_weights_from_unet=False
                )
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=hint_channels(factor))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"--pretrained_model_name_or_path: diffusers has no ControlNet of its U-Net ({in_one_line(error)})."
        ) from error


def add_lora_to_controlnet(
    controlnet: ControlNetModel, rank: int, alpha: float | None = None, target_modules: Sequence[str] = ()
) -> None:
    """Freezes what a ControlNet has of the U-Net and adds LoRA to it; what it has beside that, the control encoder and
    the zero convolutions, is trained as it is, for the base has nothing of the kind.

    Args:
        rank, alpha, target_modules: as for [`noisycond.lora.add_lora`].

    Raises:
        InputError: see there.
    """
    inject_lora(controlnet, rank, alpha, target_modules, switch="--adapter lora")
    own = (controlnet.controlnet_cond_embedding, controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block)
    for module in own:
        module.requires_grad_(True)


def make_adapter(unet: UNet2DConditionModel, factor: int, module: ModuleType) -> ModelMixin:
    """A T2I-Adapter with new weights: that of diffusers where the features that it makes are of the sizes that the
    U-Net adds, else the `LDMAdapter` of our control pipeline.

    Args:
        factor: of the first stage. module: the control pipeline's.

    Raises:
        InputError: the U-Net has blocks of another kind.
    """
    try:
        with torch.device(unet.device):
            if module.stock_adapter_fits(unet):
                channels = list(unet.config.block_out_channels)
                return T2IAdapter(in_channels=3, channels=channels, downscale_factor=factor)
            return module.LDMAdapter.for_unet(unet, factor)
    except ValueError as error:
        raise InputError(
            f"--pretrained_model_name_or_path: no T2I-Adapter fits its U-Net ({in_one_line(error)})."
        ) from error
