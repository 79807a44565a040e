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


def _first_stage(levels: int) -> dict:
    return {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 4,
    }


def tiny_unet(**options) -> UNet2DConditionModel:
    """A U-Net of 3 latent channels that attends to embeddings of 12 numbers."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **{"cross_attention_dim": 12, **options},
    )


def tiny_vq(levels: int = 2, **options) -> VQModel:
    """A VQ first stage of factor 2^(levels - 1) with 16 codes of 3 numbers."""
    return VQModel(**_first_stage(levels), num_vq_embeddings=16, **options)


def tiny_kl(latent_channels: int, levels: int = 2) -> AutoencoderKL:
    """A KL first stage of factor 2^(levels - 1)."""
    return AutoencoderKL(**_first_stage(levels), latent_channels=latent_channels)
