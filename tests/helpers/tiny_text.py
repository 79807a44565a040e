"""Text encoders far smaller than the miniatures, with random weights: 12 numbers per token, 20 words."""

from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import BertConfig, BertModel, BertTokenizer


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the on red big small cat dog house three four five not very ."


def tiny_tokenizer(**options) -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS.split())}, **options)


def tiny_bert(hidden_size: int = 12, positions: int = 80) -> BertModel:
    """A BERT whose embeddings tell prompts apart as those of a trained one do."""
    config = BertConfig(
        vocab_size=len(WORDS.split()),
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=positions,
        initializer_range=0.5,
    )
    return BertModel(config).eval()


def tiny_ldm_bert() -> LDMBertModel:
    """The text encoder of the original text-to-image LDM, in diffusers."""
    config = LDMBertConfig(
        vocab_size=len(WORDS.split()),
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        head_dim=6,
        d_model=12,
        init_std=0.5,
    )
    return LDMBertModel(config).eval()
