"""Captions encoded once by a frozen text encoder: clean embeddings in memory-mapped files, looked up by the text.

Letters: N different texts, L tokens, D and P the dimensions of a token's and a pooled embedding.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from noisycond.data.folder_index import user_cache
from noisycond.data.memory_cache import Kind, open_cache, own_chunks
from noisycond.denoisers.text import TextEmbedding, TextEncoder
from noisycond.errors import InputError
from noisycond.first_stage import state_hash


KIND = Kind(
    "Text embeddings", "text", "other texts or another text encoder", "--text_cache_dir", "--cache_text_embeddings"
)
FORMAT = 1
ENCODING_BATCH = 64
# What of an embedding is there, as it is named in a condition, and how it is kept.
_TYPES = {"sequence": np.float32, "mask": np.int8, "pooled": np.float32}


def default_cache_dir() -> Path:
    """~/.cache/noisycond/texts, or below $XDG_CACHE_HOME."""
    return user_cache("texts")


class CachedTexts:
    """The embeddings of texts, in place of the tokens that a text encoder gives. A pickle of it holds the path alone,
    so a data loader's workers hold no copy.

    Args:
        path: the folder of a cache.
    """

    def __init__(self, path: Path):
        self.path = path
        self.hashes = np.load(path / "hashes.npy")
        self.is_truncated = torch.from_numpy(np.load(path / "is_truncated.npy"))
        self.arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in _names(path)}

    def __reduce__(self):
        return CachedTexts, (self.path,)

    def __len__(self) -> int:
        return len(self.hashes)

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """B texts to `sequence` float32 [B, L, D], where the denoiser takes them `mask` int64 [B, L] and `pooled`
        float32 [B, P], and `is_truncated` bool [B]: the text was longer than the tokenizer allows.

        Raises:
            InputError: a text that was not encoded.
        """
        hashes = np.array([_hash(text) for text in texts], dtype=self.hashes.dtype)
        rows = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        for text, missing in zip(texts, self.hashes[rows] != hashes, strict=True):
            if missing:
                raise InputError(
                    f"--cache_text_embeddings: the caption {text!r} was not encoded beforehand; captions that are "
                    "made up while training cannot be cached, so leave it off."
                )
        return self._rows(rows) | {"is_truncated": self.is_truncated[torch.from_numpy(rows)]}

    def null(self) -> dict[str, torch.Tensor]:
        """The empty prompt, as `encode` gives it but without `is_truncated`: each [1, ...]. Where the pipeline has
        embeddings of 0 for it (SDXL), these."""
        return self._rows(np.array([len(self.hashes)]))

    def _rows(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        values = {name: torch.from_numpy(array[rows]) for name, array in self.arrays.items()}
        return {name: value.long() if name == "mask" else value for name, value in values.items()}


def open_text_cache(texts: Iterable[str], text: TextEncoder, folder: Path, accelerator: Accelerator) -> CachedTexts:
    """Opens the cache of these texts and this text encoder below `folder`, made first where none matches. The text
    encoder is moved to the accelerator's device.

    Args:
        texts: every caption that training will ask for, in any order, with repeats.
        text: frozen, with its tokenizer.

    Raises:
        InputError: no space left.
        ValueError: the text encoder is trained: what is cached would not be what it gives a step later.
    """
    if text.is_trained:
        raise ValueError("embeddings of a text encoder that is trained cannot be cached.")
    by_hash = {_hash(caption): caption for caption in texts}
    hashes = np.array(sorted(by_hash), dtype="S32")
    text.to(accelerator.device)
    shapes = _embed(text, text.null(), is_null=True)

    def fill(making: Path) -> None:
        _encode_share(making, [by_hash[row] for row in hashes.tolist()], text, accelerator)

    arrays = {name: ((len(hashes) + 1, *value.shape[1:]), _TYPES[name]) for name, value in shapes.items()}
    path = open_cache(
        KIND,
        folder,
        cache_key(hashes, text),
        arrays | {"is_truncated": ((len(hashes),), np.bool_)},
        fill,
        lambda making: np.save(making / "hashes.npy", hashes),
        accelerator,
    )
    return CachedTexts(path)


def cache_key(hashes: np.ndarray, text: TextEncoder) -> dict:
    """Everything the cached embeddings depend on."""
    return {
        "format": FORMAT,
        "texts": hashlib.sha256(hashes.tobytes()).hexdigest(),
        "count": len(hashes),
        "reading": reading(text),
        "encoders": [_model_hash(model) for model in text.encoders],
    }


def reading(text: TextEncoder) -> str:
    """A hash of how captions are read, beside the weights: the tokenizers, and what is taken of the encoders."""
    told = [type(text).__name__, getattr(text, "zero_null", None), _tokenizer_facts(text)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def tokenizer_hash(tokenizer) -> str:
    """A hash of a tokenizer's vocabulary, its rules and how it pads."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    # What the last call was padded and truncated to is no part of the tokenizer.
    rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    known = [sorted(tokenizer.get_vocab().items()), tokenizer.pad_token_id, tokenizer.padding_side, rules]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _tokenizer_facts(text: TextEncoder) -> dict:
    encode = text.encode
    facts = [tokenizer_hash(tokenizer) for tokenizer in encode.tokenizers]
    prepare = None if encode.prepare is None else encode.prepare.__qualname__
    return {"tokenizers": facts, "max_lengths": list(encode.max_lengths), "masked": encode.masked, "prepare": prepare}


def _model_hash(model) -> str:
    # These entries tell where, with which version and how precisely it was saved or opened.
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    config = {name: value for name, value in model.config.to_dict().items() if name not in left_out}
    text = type(model).__name__ + json.dumps(config, sort_keys=True, default=str) + state_hash(model)
    return hashlib.sha256(text.encode()).hexdigest()


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest().encode()


def _names(path: Path) -> list[str]:
    return [name for name in _TYPES if (path / f"{name}.npy").exists()]


@torch.no_grad()
def _embed(text: TextEncoder, tokens: dict, is_null: bool) -> dict[str, torch.Tensor]:
    count = len(tokens["input_ids"])
    # Autocast would make what is cached depend on the run's precision.
    with torch.autocast(text.device.type, enabled=False):
        embedding: TextEmbedding = text.embed(tokens | {"is_null": torch.full((count,), is_null)})
    return {name: value.cpu() for name, value in embedding._asdict().items() if value is not None}


def _encode_share(making: Path, texts: list[str], text: TextEncoder, accelerator: Accelerator) -> None:
    """Encodes this process's share of the texts; the main process the empty prompt too, into the last row."""
    memory = {name: np.lib.format.open_memmap(making / f"{name}.npy", mode="r+") for name in _names(making)}
    is_truncated = np.lib.format.open_memmap(making / "is_truncated.npy", mode="r+")
    for rows in own_chunks(len(texts), ENCODING_BATCH, accelerator, "encoding captions"):
        tokens = text.encode(texts[rows.start : rows.stop])
        is_truncated[rows.start : rows.stop] = tokens.pop("is_truncated").numpy()
        for name, value in _embed(text, tokens, is_null=False).items():
            memory[name][rows.start : rows.stop] = value.numpy()
    if accelerator.is_main_process:
        for name, value in _embed(text, text.null(), is_null=True).items():
            memory[name][len(texts)] = value[0].numpy()
    for array in (*memory.values(), is_truncated):
        array.flush()
