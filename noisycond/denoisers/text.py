"""Text encoders: captions to tokens to the embeddings that a denoiser attends to.

Letters: B examples, L tokens, D the dimension of a token's embedding, P that of a pooled one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    CLIPTextModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from noisycond import perturbation
from noisycond.errors import InputError, closest, in_one_line, require
from noisycond.randomness import Purpose


SHIPPED = Path(__file__).parent.parent / "data" / "text_encoders"
# Stock `LDMTextToImagePipeline` pads to this number, whatever the tokenizer says.
LDM_MAX_LENGTH = 77
# What a dry run takes bert-base-uncased for where it is not on this machine; `BertConfig` defaults to its numbers.
KNOWN_CONFIGS = {"bert-base-uncased": BertConfig, "google-bert/bert-base-uncased": BertConfig}
_CLASSES = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}


class TextEmbedding(NamedTuple):
    """What a denoiser is given for a caption.

    Attributes:
        sequence [B, L, D]: an embedding per token.
        mask [B, L]: 1 for a token and 0 for padding, for denoisers that leave padding out; None: it is attended to.
        pooled [B, P]: an embedding of the whole caption; None where the denoiser takes none.
    """

    sequence: torch.Tensor
    mask: torch.Tensor | None = None
    pooled: torch.Tensor | None = None


class Tokenizing:
    """Captions to tokens; holds no weights, so a data loader's workers can have it.

    Args:
        tokenizers: one per text encoder, each padding to its own `max_lengths`.
        masked: whether the tokens come with an attention mask.
        prepare: what is done to a caption first, a function that pickles.
    """

    def __init__(
        self,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        max_lengths: Sequence[int],
        masked: bool = False,
        prepare: Callable[[str], str] | None = None,
    ):
        self.tokenizers, self.max_lengths = tuple(tokenizers), tuple(max_lengths)
        self.masked, self.prepare = masked, prepare

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """B captions to `input_ids` int64 [B, L], `attention_mask` int64 [B, L] where it is used, the same with `_2`
        of a second encoder, and `is_truncated` bool [B]: the caption was longer than a tokenizer allows and was cut.
        """
        texts = list(texts) if self.prepare is None else [self.prepare(text) for text in texts]
        encoded, is_truncated = {}, torch.zeros(len(texts), dtype=torch.bool)
        for number, (tokenizer, length) in enumerate(zip(self.tokenizers, self.max_lengths, strict=True)):
            # As lists: the tokenizer's own way to tensors takes as long as the tokenizing.
            rows = tokenizer(
                texts, padding="max_length", max_length=length, truncation=True, return_token_type_ids=False
            )
            attention_mask = torch.tensor(rows["attention_mask"])
            suffix = f"_{number + 1}" if number else ""
            encoded[f"input_ids{suffix}"] = torch.tensor(rows["input_ids"])
            if self.masked:
                encoded[f"attention_mask{suffix}"] = attention_mask
            # Only a row without padding can have been cut.
            for place in attention_mask.all(dim=1).nonzero().flatten().tolist():
                whole = tokenizer(texts[place], verbose=False)["input_ids"]
                is_truncated[place] |= len(whole) > length
        return encoded | {"is_truncated": is_truncated}


class TextEncoder(nn.Module):
    """Text encoder(s) of transformers with their tokenizer(s). This one gives the last hidden states of one encoder
    that is not told about padding, as LDM's pipeline encodes prompts; others inherit from it.

    A frozen encoder stays in eval mode whatever `train()` says. A trained one has its dropout switched off, in its
    configuration too: torch's dropout draws from the global generator, so a resumed run, or one on more processes,
    would see other draws.

    Args:
        models: the text encoders.
        encode: [`Tokenizing`] of their tokenizers: captions to tokens on the CPU. None: of an encoder that is only
            looked at (dry run).
        name: for messages.
        trained: whether the encoders are trained along; parameters on which no embedding depends (BERT's pooler) stay
            frozen.

    Attributes:
        embedding_dropout, seed: the embedding-dropout baseline of arXiv:2405.20494, on tokens and pooled embeddings.
    """

    def __init__(self, models: Sequence[PreTrainedModel], encode: Tokenizing | None, name: str, trained: bool = False):
        super().__init__()
        self.models = nn.ModuleList(models)
        self._parked: tuple[PreTrainedModel, ...] = ()
        self.encode, self.name, self.is_trained = encode, name, trained
        self.embedding_dropout, self.seed = 0.0, 0
        self.requires_grad_(trained)
        if trained:
            for model in self.models:
                switch_off_dropout(model)
            self._freeze_unused()
        self.train(self.training)

    @property
    def encoders(self) -> tuple[PreTrainedModel, ...]:
        """The text encoders, put aside or not."""
        return self._parked or tuple(self.models)

    @property
    def dim(self) -> int:
        """D."""
        return self.encoders[0].config.hidden_size

    @property
    def pooled_dim(self) -> int | None:
        """P; None where there is no pooled embedding."""
        return None

    @property
    def max_length(self) -> int | None:
        """L; None without a tokenizer."""
        return None if self.encode is None else self.encode.max_lengths[0]

    @property
    def device(self) -> torch.device:
        return next(self.models.parameters()).device

    @property
    def shard_units(self) -> tuple[str, ...]:
        """Classes of modules that FSDP gathers one at a time."""
        return tuple(sorted({unit for model in self.models for unit in model._no_split_modules or ()}))

    def train(self, mode: bool = True) -> "TextEncoder":
        super().train(mode)
        if not self.is_trained:
            self.models.eval()
        return self

    @property
    def is_parked(self) -> bool:
        """Whether the encoders are put aside, see [`park`]."""
        return bool(self._parked)

    def park(self) -> None:
        """Puts frozen encoders aside, on the CPU, once all that is read are cached embeddings: they are then no part
        of this module, and neither moved to a device nor saved with it."""
        if self.is_trained:
            raise ValueError("a text encoder that is trained cannot be put aside.")
        kept = tuple(model if model.device.type == "meta" else model.cpu() for model in self.encoders)
        self._parked, self.models = kept, nn.ModuleList()

    def park_again(self) -> None:
        """After something took encoders that were put aside to a device."""
        if self.is_parked:
            self.park()

    def null(self) -> dict[str, torch.Tensor]:
        """The empty prompt, as `encode` gives it but without `is_truncated`: each [1, ...]."""
        encoded = self.encode([""])
        del encoded["is_truncated"]
        return encoded

    def is_null(self, condition: dict) -> torch.BoolTensor:
        """Which examples of a batch have no condition: bool [B]. A captioned image may have an empty caption of its
        own, so this is told, not read from the tokens."""
        return condition["is_null"]

    def embed(self, condition: dict) -> TextEmbedding:
        """Tokens, as `encode` gives them, to embeddings."""
        return self._read(condition)

    def _read(self, condition: dict) -> TextEmbedding:
        return TextEmbedding(self._run(self.models[0], condition)[0])

    def _run(self, model: PreTrainedModel, condition: dict, suffix: str = "", **options):
        mask = condition.get(f"attention_mask{suffix}")
        tokens = condition[f"input_ids{suffix}"].to(self.device)
        return model(tokens, attention_mask=None if mask is None else mask.to(self.device), **options)

    def forward(self, condition: dict, keys: torch.Tensor | None = None) -> TextEmbedding:
        """Tokens, or embeddings that were encoded before (`sequence`, `mask` and `pooled`, of a cache), to what the
        denoiser is given. In train mode embedding dropout applies, drawn from the keys int64 [B]."""
        if "sequence" in condition:
            embedding = TextEmbedding(condition["sequence"], condition.get("mask"), condition.get("pooled"))
        else:
            with torch.set_grad_enabled(self.is_trained and torch.is_grad_enabled()):
                embedding = self.embed(condition)
        if not self.training or self.embedding_dropout == 0:
            return embedding
        if keys is None:
            raise ValueError("embedding dropout draws from keys: pass keys= in train mode.")
        return embedding._replace(
            sequence=self._dropped(embedding.sequence, keys, Purpose.EMBEDDING_DROPOUT.value),
            pooled=self._dropped(embedding.pooled, keys, f"{Purpose.EMBEDDING_DROPOUT.value}: pooled"),
        )

    def _dropped(self, embedding: torch.Tensor | None, keys: torch.Tensor, purpose: str) -> torch.Tensor | None:
        if embedding is None:
            return None
        return perturbation.embedding_dropout(embedding, self.embedding_dropout, self.seed, keys, purpose)

    def _probe(self) -> dict[str, torch.Tensor]:
        """One example of few tokens, on the meta device."""
        tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        return {f"input_ids{f'_{number + 1}' if number else ''}": tokens for number in range(len(self.models))}

    def _freeze_unused(self) -> None:
        """Takes the gradients of parameters that no embedding depends on: DDP refuses a parameter without one, and
        weight decay would wear it off."""
        parameters = {
            name: torch.empty_like(value, device="meta").requires_grad_() for name, value in self.named_parameters()
        }
        buffers = {name: value.to("meta") for name, value in self.named_buffers()}
        embedding = torch.func.functional_call(_Reading(self), {
            f"encoder.{name}": value for name, value in (parameters | buffers).items()
        }, (self._probe(),))  # fmt: skip
        total = sum(part.sum() for part in (embedding.sequence, embedding.pooled) if part is not None)
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for value, gradient in zip(self.parameters(), gradients, strict=True):
            value.requires_grad_(gradient is not None)


class MaskedTextEncoder(TextEncoder):
    """Gives the last hidden states of one encoder that leaves padding out, and the mask, by which the denoiser leaves
    it out too, as PixArt-α's pipeline encodes prompts."""

    def embed(self, condition: dict) -> TextEmbedding:
        return super().embed(condition)._replace(mask=condition["attention_mask"].to(self.device))


class PairedTextEncoder(TextEncoder):
    """Gives the last but one hidden states of two encoders side by side, and the pooled embedding of the second, as
    SDXL's pipeline encodes prompts.

    Args:
        zero_null: whether an example without a condition gets embeddings of 0, as SDXL's pipeline does where its
            `force_zeros_for_empty_prompt` is on, instead of those of the empty prompt.
    """

    def __init__(self, *args, zero_null: bool = True, **options):
        super().__init__(*args, **options)
        self.zero_null = zero_null

    @property
    def dim(self) -> int:
        return sum(model.config.hidden_size for model in self.encoders)

    @property
    def pooled_dim(self) -> int:
        return self.encoders[-1].config.projection_dim

    def embed(self, condition: dict) -> TextEmbedding:
        embedding = super().embed(condition)
        if not self.zero_null:
            return embedding
        kept = ~self.is_null(condition).to(self.device)
        return TextEmbedding(embedding.sequence * kept[:, None, None], pooled=embedding.pooled * kept[:, None])

    def _read(self, condition: dict) -> TextEmbedding:
        outputs = [
            self._run(model, condition, suffix, output_hidden_states=True)
            for model, suffix in zip(self.models, ("", "_2"), strict=True)
        ]
        sequence = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return TextEmbedding(sequence, pooled=outputs[-1][0])


class _Reading(nn.Module):
    """Calls an encoder's models."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, condition: dict) -> TextEmbedding:
        return self.encoder._read(condition)


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Sets every probability of dropout to 0, in the model's configuration, which is exported, and in its modules."""
    for part in (model.config, *model.modules()):
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def open_text_encoder(name: str, trained: bool) -> TextEncoder:
    """The text encoder that `--text_encoder` names, for a denoiser that is trained from scratch: its last hidden
    states, of captions padded to what its tokenizer allows, at most 77 tokens, which is what LDM's pipeline does.

    Args:
        name: one that ships here (`digits-bert`), a folder or a Hub id of a text encoder of transformers. Where a
            folder holds no weights, they start at random, from torch's generator.
        trained: whether it is trained along.

    Raises:
        InputError: no such encoder or no tokenizer there, or one that is no text encoder.
    """
    location = _location(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
        config = _text_config(AutoConfig.from_pretrained(location))
    except Exception as error:  # transformers raises whatever its parts raise
        raise InputError(_unusable(name, error)) from error
    kind = _class_of(name, config)
    require(tokenizer.pad_token_id is not None, f"--text_encoder {name}: its tokenizer has no padding token.")
    try:
        if _has_weights(location):
            model = kind.from_pretrained(location, config=config, dtype=torch.float32)
        else:
            model = kind.from_config(config) if kind is AutoModel else kind(config)
    except Exception as error:
        raise InputError(_unusable(name, error)) from error
    positions = getattr(model.config, "max_position_embeddings", None) or LDM_MAX_LENGTH
    # Written into the export, so that a pipeline which asks the tokenizer pads alike.
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions, LDM_MAX_LENGTH)
    require(
        len(tokenizer) <= model.config.vocab_size,
        f"--text_encoder {name}: its tokenizer has {len(tokenizer)} tokens, but its model only knows "
        f"{model.config.vocab_size}.",
    )
    encode = Tokenizing([tokenizer], [tokenizer.model_max_length])
    return TextEncoder([model], encode, name, trained)


def peek_text_encoder(name: str, trained: bool) -> tuple[TextEncoder, str]:
    """The text encoder on the meta device and without its tokenizer, from what lies on this machine, and where its
    sizes come from, in words. bert-base-uncased is known where it does not lie here.

    Raises:
        InputError: it is not here; the network is not asked.
    """
    try:
        config = _text_config(AutoConfig.from_pretrained(_location(name), local_files_only=True))
        why = f"configuration of {name}"
    except Exception as error:
        if name not in KNOWN_CONFIGS:
            raise InputError(_unusable(name, error)) from error
        config = KNOWN_CONFIGS[name]()
        why = (
            f"{name} is not on this machine; its published sizes: {config.num_hidden_layers} layers of width "
            f"{config.hidden_size}, {config.vocab_size} tokens"
        )
    kind = _class_of(name, config)
    with torch.device("meta"):
        model = kind.from_config(config) if kind is AutoModel else kind(config)
    return TextEncoder([model], None, name, trained), why


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Of a CLIP that has images too, the part that reads text."""
    return getattr(config, "text_config", config)


def _location(name: str) -> str | Path:
    return SHIPPED / name if (SHIPPED / name).is_dir() else name


def _has_weights(location: str | Path) -> bool:
    """False of a folder without weights; a Hub id is taken to have some."""
    folder = Path(location)
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _class_of(name: str, config: PretrainedConfig) -> type:
    if config.model_type in _CLASSES:
        return _CLASSES[config.model_type]
    require(
        not config.is_encoder_decoder and getattr(config, "hidden_size", None) is not None,
        f"--text_encoder {name}: a model of the type {config.model_type!r} is no text encoder; name one as BERT, CLIP "
        "or T5.",
    )
    return AutoModel


def _unusable(name: str, error: Exception) -> str:
    shipped = sorted(path.name for path in SHIPPED.glob("*/"))
    return (
        f"--text_encoder {name}: neither one that ships with noisycond ({', '.join(shipped)}) nor a folder or Hub id "
        f"of a text encoder and its tokenizer{closest(name, shipped)} ({in_one_line(error)})."
    )
