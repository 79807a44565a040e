"""Denoisers of diffusers at the smallest size, with random weights and the arguments of one training forward.

Each entry gives (model, arguments): two examples, embeddings of 6 tokens, the second with 2 tokens of padding where
the model takes a mask.
"""

import diffusers
import torch


B, L, D = 2, 6, 16


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def timesteps() -> torch.Tensor:
    return torch.tensor([10, 900])


def mask() -> torch.Tensor:
    return torch.tensor([[1] * L, [1] * (L - 2) + [0] * 2])


def unet(**options):
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": D,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **options,
        }
    )


def sd15():
    arguments = {"sample": noise(B, 4, 8, 8), "timestep": timesteps(), "encoder_hidden_states": noise(B, L, D)}
    return unet(), arguments


def ldm():
    model = unet(in_channels=3, out_channels=3, cross_attention_dim=12)
    return model, {"sample": noise(B, 3, 8, 8), "timestep": timesteps(), "encoder_hidden_states": noise(B, 1, 12)}


def sdxl():
    model = unet(addition_embed_type="text_time", addition_time_embed_dim=4,
                 projection_class_embeddings_input_dim=24 + D)  # fmt: skip
    _, arguments = sd15()
    added = {"text_embeds": noise(B, D), "time_ids": torch.arange(12).reshape(B, 6).float()}
    return model, arguments | {"added_cond_kwargs": added}


def kandinsky():
    model = unet(addition_embed_type="image", encoder_hid_dim_type="image_proj", encoder_hid_dim=D)
    _, arguments = sd15()
    return model, arguments | {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": noise(B, D)}}


def unclip():
    model = unet(class_embed_type="projection", projection_class_embeddings_input_dim=D)
    return model, sd15()[1] | {"class_labels": noise(B, D)}


def dit(**options):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=4, **options,
    )  # fmt: skip
    _some_weights(model)
    return model, {"hidden_states": noise(B, 4, 8, 8), "timestep": timesteps(), "class_labels": torch.tensor([3, 10])}


def class_unet():
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, norm_num_groups=4, num_class_embeds=11,
    )  # fmt: skip
    return model, {"sample": noise(B, 3, 8, 8), "timestep": timesteps(), "class_labels": torch.tensor([3, 10])}


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, num_layers=2, cross_attention_dim=24, sample_size=8,
        caption_channels=D, out_channels=4, use_additional_conditions=True,
    )  # fmt: skip
    added = {"resolution": torch.full((B, 2), 8.0), "aspect_ratio": torch.ones(B, 1)}
    return model, {"hidden_states": noise(B, 4, 8, 8), "timestep": timesteps(),
                   "encoder_hidden_states": noise(B, L, D),
                   "encoder_attention_mask": mask(), "added_cond_kwargs": added}  # fmt: skip


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=D, caption_projection_dim=16, pooled_projection_dim=24,
    )  # fmt: skip
    return model, {"hidden_states": noise(B, 4, 8, 8), "timestep": timesteps(),
                   "encoder_hidden_states": noise(B, L, D),
                   "pooled_projections": noise(B, 24)}  # fmt: skip


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=D, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return model, {"hidden_states": noise(B, 16, 4), "timestep": timesteps() / 1000, "img_ids": torch.zeros(16, 3),
                   "encoder_hidden_states": noise(B, L, D), "pooled_projections": noise(B, 24),
                   "txt_ids": torch.zeros(L, 3), "guidance": torch.ones(B)}  # fmt: skip


def sana():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=D,
        sample_size=8,
    )  # fmt: skip
    return model, {"hidden_states": noise(B, 4, 8, 8), "timestep": timesteps(),
                   "encoder_hidden_states": noise(B, L, D),
                   "encoder_attention_mask": mask()}  # fmt: skip


def hunyuan():
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=2, cross_attention_dim=D, cross_attention_dim_t5=24, pooled_projection_dim=16, text_len=L,
        text_len_t5=4, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    rotary = (torch.ones(16, 8), torch.zeros(16, 8))
    return model, {"hidden_states": noise(B, 4, 8, 8), "timestep": timesteps().float(),
                   "encoder_hidden_states": noise(B, L, D), "text_embedding_mask": mask(),
                   "encoder_hidden_states_t5": noise(B, 4, 24), "text_embedding_mask_t5": mask()[:, 2:],
                   "image_rotary_emb": rotary}  # fmt: skip


def lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(16, 16, 16), cap_feat_dim=D,
    )  # fmt: skip
    return model, {"hidden_states": noise(B, 4, 8, 8), "timestep": timesteps() / 1000,
                   "encoder_hidden_states": noise(B, L, D), "encoder_attention_mask": mask().bool()}  # fmt: skip


def auraflow():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=D, caption_projection_dim=16, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    return model, {"hidden_states": noise(B, 4, 8, 8), "timestep": timesteps() / 1000,
                   "encoder_hidden_states": noise(B, L, D)}  # fmt: skip


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=D, num_layers=1, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=L,
    )  # fmt: skip
    return model, {"hidden_states": noise(B, 2, 4, 8, 8), "encoder_hidden_states": noise(B, L, D),
                   "timestep": timesteps()}  # fmt: skip


def wan():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=D, freq_dim=16,
        ffn_dim=32, num_layers=1, image_dim=20, added_kv_proj_dim=24, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {"hidden_states": noise(B, 4, 1, 8, 8), "timestep": timesteps(),
                   "encoder_hidden_states": noise(B, 512, D),
                   "encoder_hidden_states_image": noise(B, 3, 20)}  # fmt: skip


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=D,
    )  # fmt: skip
    return model, {"hidden_states": noise(B, 8, 4), "encoder_hidden_states": noise(B, L, D), "timestep": timesteps(),
                   "encoder_attention_mask": mask(), "num_frames": 2, "height": 2, "width": 2}  # fmt: skip


def hidream():
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[24, D], text_emb_dim=20, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 1],
        force_inference_output=True,
    )  # fmt: skip
    return model, {"hidden_states": noise(B, 4, 8, 8), "timesteps": timesteps(),
                   "encoder_hidden_states_t5": noise(B, 4, 24), "encoder_hidden_states_llama3": noise(2, B, L, D),
                   "pooled_embeds": noise(B, 20)}  # fmt: skip


def z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=D,
        axes_dims=[8, 4, 4], axes_lens=[64, 16, 16],
    )  # fmt: skip
    return model, {"x": [noise(4, 1, 8, 8), noise(4, 1, 8, 8)], "t": timesteps() / 1000,
                   "cap_feats": [noise(L, D), noise(L - 2, D)]}  # fmt: skip


def prior():
    model = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=D,
                                       num_embeddings=L, additional_embeddings=4)  # fmt: skip
    return model, {"hidden_states": noise(B, D), "timestep": timesteps(), "proj_embedding": noise(B, D),
                   "encoder_hidden_states": noise(B, L, D)}  # fmt: skip


def controlnet():
    model = diffusers.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=D, attention_head_dim=2, norm_num_groups=4, conditioning_embedding_out_channels=(4, 8),
    )  # fmt: skip
    _some_weights(model)
    return model, sd15()[1] | {"controlnet_cond": noise(B, 3, 16, 16)}


def _some_weights(model: torch.nn.Module) -> None:
    """Weights other than 0, at which the condition would have no effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)


# The names of docs/cep_everywhere.md, the builder, and the arguments that are perturbed.
ZOO = {
    "UNet2DConditionModel, SD 1.x and 2.x": (sd15, ["encoder_hidden_states"]),
    "UNet2DConditionModel, LDM": (ldm, ["encoder_hidden_states"]),
    "UNet2DConditionModel, SDXL": (sdxl, ["encoder_hidden_states", "added_cond_kwargs.text_embeds"]),
    "UNet2DConditionModel, Kandinsky 2.2": (kandinsky, ["added_cond_kwargs.image_embeds"]),
    "UNet2DConditionModel, unCLIP": (unclip, ["encoder_hidden_states", "class_labels"]),
    "PixArtTransformer2DModel": (pixart, ["encoder_hidden_states"]),
    "SD3Transformer2DModel": (sd3, ["encoder_hidden_states", "pooled_projections"]),
    "FluxTransformer2DModel": (flux, ["encoder_hidden_states", "pooled_projections"]),
    "SanaTransformer2DModel": (sana, ["encoder_hidden_states"]),
    "HunyuanDiT2DModel": (hunyuan, ["encoder_hidden_states", "encoder_hidden_states_t5"]),
    "Lumina2Transformer2DModel": (lumina2, ["encoder_hidden_states"]),
    "AuraFlowTransformer2DModel": (auraflow, ["encoder_hidden_states"]),
    "HiDreamImageTransformer2DModel": (
        hidream, ["encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds"]),
    "ZImageTransformer2DModel": (z_image, ["cap_feats"]),
    "PriorTransformer": (prior, ["encoder_hidden_states", "proj_embedding"]),
    "CogVideoXTransformer3DModel": (cogvideox, ["encoder_hidden_states"]),
    "WanTransformer3DModel": (wan, ["encoder_hidden_states", "encoder_hidden_states_image"]),
    "LTXVideoTransformer3DModel": (ltx, ["encoder_hidden_states"]),
    "ControlNetModel": (controlnet, ["encoder_hidden_states"]),
}  # fmt: skip
# Models that look up the embedding of class labels themselves.
CLASS_ZOO = {"DiTTransformer2DModel": dit, "UNet2DModel": class_unet}
