"""A SAM and a BLIP of random weights, which segment and babble."""

import torch
from tiny_text import WORDS, tiny_tokenizer
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    SamConfig,
    SamImageProcessor,
    SamModel,
)


POSITIONS = 24  # tokens that the BLIP takes


def tiny_sam(path) -> str:
    """A folder with a SAM for images of 32 x 32. It rates its masks at random."""
    size = {"hidden_size": 16, "image_size": 32, "patch_size": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    vision = {"output_channels": 16, "window_size": 2, "num_pos_feats": 8, "global_attn_indexes": [0]}
    torch.manual_seed(12)  # one whose masks do not all have the same box
    config = SamConfig(
        vision_config=size | layers | vision | {"initializer_range": 0.5},
        prompt_encoder_config=size | {"mask_input_channels": 4},
        mask_decoder_config=layers | {"hidden_size": 16, "iou_head_depth": 2, "iou_head_hidden_dim": 16},
        initializer_range=0.5,
    )
    SamModel(config).save_pretrained(path)
    SamImageProcessor(
        size={"longest_edge": 32},
        pad_size={"height": 32, "width": 32},
        mask_size={"longest_edge": 8},
        mask_pad_size={"height": 8, "width": 8},
    ).save_pretrained(path)
    return str(path)


def tiny_blip(path) -> str:
    """A folder with a BLIP that writes the words of `tiny_text`."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"projection_dim": 16, "initializer_range": 0.5}
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": len(WORDS.split()), "encoder_hidden_size": 16, "max_position_embeddings": POSITIONS}
    torch.manual_seed(0)
    config = BlipConfig(
        text_config=size | text | tokens,
        vision_config=size | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    BlipForConditionalGeneration(config).save_pretrained(path)
    processor = BlipImageProcessor(size={"height": 16, "width": 16})
    BlipProcessor(processor, tiny_tokenizer()).save_pretrained(path)
    return str(path)
