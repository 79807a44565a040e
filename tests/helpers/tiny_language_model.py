"""Language models of random weights, which babble."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from noisycond.data import rewriting
from noisycond.data.digit_captions import vocabulary


def tiny_language_model(path, kind: str = "gpt2") -> str:
    """A folder with a language model of random weights, `gpt2` or `t5`, and a tokenizer of whole words."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary(), *rewriting.PROMPT.replace("{}", "").split()]
    ids = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if kind == "t5" else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=len(ids), n_positions=160, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1
        )
        GPT2LMHeadModel(config).save_pretrained(path)
    else:
        config = T5Config(
            vocab_size=len(ids), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        T5ForConditionalGeneration(config).save_pretrained(path)
    return str(path)
