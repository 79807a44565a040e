"""Models of diffusers far smaller than the miniatures, with random weights: latents of 8×8, images of 16×16."""

from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel


# A U-Net as a configuration file for --denoiser.
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
_FIRST_STAGE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def tiny_unet() -> UNet2DConditionModel:
    """A U-Net of 3 latent channels that attends to embeddings of 12 numbers."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def tiny_vq(**options) -> VQModel:
    """A VQ first stage of factor 2 with 16 codes of 3 numbers."""
    return VQModel(**_FIRST_STAGE, num_vq_embeddings=16, **options)


def tiny_kl(latent_channels: int) -> AutoencoderKL:
    """A KL first stage of factor 2."""
    return AutoencoderKL(**_FIRST_STAGE, latent_channels=latent_channels)
