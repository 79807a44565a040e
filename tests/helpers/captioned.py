"""Arguments of captioned data, and captions as tensors that one can read again."""

from dataclasses import dataclass

import torch

from noisycond.arguments import FirstStageArguments, LoopArguments, parse_arguments
from noisycond.data.caption_options import CaptionCorruptionArguments, CaptionDataArguments


LENGTH = 80


@dataclass
class CaptionedArguments(CaptionDataArguments, FirstStageArguments, CaptionCorruptionArguments, LoopArguments):
    pass


def arguments(*words, **values) -> CaptionedArguments:
    """Flags by name; `--resolution 8` and batches of 4 unless said otherwise."""
    values = {"resolution": 8, "train_batch_size": 4} | values
    flags = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    return parse_arguments(CaptionedArguments, [*map(str, words), *flags])


def encode(texts: list[str]) -> dict[str, torch.Tensor]:
    """Texts as bytes, padded with 0: `input_ids` int64 [B, LENGTH], and which were longer."""
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        content = text.encode()[:LENGTH]
        row[: len(content)] = torch.tensor(list(content))
    return {"input_ids": ids, "is_truncated": torch.tensor([len(text.encode()) > LENGTH for text in texts])}


def decode(input_ids: torch.Tensor) -> list[str]:
    return [bytes(row[row > 0].tolist()).decode() for row in input_ids]
