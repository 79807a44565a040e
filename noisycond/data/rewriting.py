"""Rewritten captions: read from a file of JSON lines, or made with a language model into such a file."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from noisycond.data.folder_index import user_cache
from noisycond.data.sources import is_utf8
from noisycond.errors import InputError, in_one_line, require, writing
from noisycond.processes import on_main


logger = logging.getLogger(__name__)
# [inferred] What the papers asked their model cannot be read; this asks for the slight corruption they study.
PROMPT = (
    "Rewrite the caption of an image so that one detail is wrong and the rest stays as it is. Answer with the caption "
    "alone.\nCaption: {}\nRewritten caption:"
)
MAX_NEW_TOKENS = 64
BATCH_SIZE = 32


def read_rewritings(path: str, flag: str = "--rewritten_captions") -> dict[str, str]:
    """What captions are rewritten to, by their text, white space at both ends taken off; "" where that is no text in
    UTF-8.

    Args:
        path: JSON lines {"caption": …, "rewritten": …}; a line of `caption_rewriter` says who made them.

    Raises:
        InputError: the file cannot be read, or a line of it is something else; names this flag.
    """
    rewritten: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = _row(line)
                require(row is not None, f"{flag} {path}: line {number} is no JSON with `caption` and `rewritten`.")
                if "caption" in row and is_utf8(row["caption"]):
                    new = row["rewritten"].strip()
                    rewritten[row["caption"].strip()] = new if is_utf8(new) else ""
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {path}: not a text file in UTF-8 ({error}).") from error
    require(any(rewritten.values()), f"{flag} {path}: it holds no rewritten caption.")
    return rewritten


def _row(line: str) -> dict | None:
    """A line of the file; {} for an empty one, None where it is none."""
    if not line.strip():
        return {}
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    is_pair = isinstance(row.get("caption"), str) and isinstance(row.get("rewritten"), str)
    return row if is_pair or "caption_rewriter" in row else None


class CaptionRewriter:
    """A language model of transformers, causal or sequence to sequence, that rewrites captions. Greedy, so that the
    same captions give the same texts.

    Args:
        name: `--caption_rewriter`, a folder or Hub id. device: where it runs.

    Raises:
        InputError: transformers cannot open it, or it takes too few tokens.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(name)
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            self.model = kind.from_pretrained(name).to(device).eval()
            # The prompt ends where the answer begins, and what of it is too long is cut from its beginning.
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", truncation_side="left")
        except Exception as error:  # transformers raises many unrelated types for a name it cannot open
            raise InputError(
                f"--caption_rewriter {name}: transformers cannot open it as a causal or sequence-to-sequence language "
                f"model ({in_one_line(error)})."
            ) from error
        self.continues = not config.is_encoder_decoder
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        require(self.tokenizer.pad_token is not None, f"--caption_rewriter {name}: its tokenizer has no end token.")
        # A model that continues its prompt has both in one context; T5's positions are relative and have no end.
        context = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.prompt_tokens = min(context, 4096) - (MAX_NEW_TOKENS if self.continues else 0)
        require(
            self.prompt_tokens > 0,
            f"--caption_rewriter {name}: it takes {context} tokens, too few for {MAX_NEW_TOKENS} new ones.",
        )

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> list[str]:
        """The rewriting of each caption: one line; "" where the model says nothing."""
        prompts = [self._prompt(caption) for caption in captions]
        tokens = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=self.prompt_tokens,
            return_tensors="pt",
            add_special_tokens=self.tokenizer.chat_template is None,
            return_token_type_ids=False,
        ).to(self.model.device)
        made = self.model.generate(
            **tokens,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if self.continues:
            made = made[:, tokens["input_ids"].shape[1] :]
        return [_first_line(text) for text in self.tokenizer.batch_decode(made, skip_special_tokens=True)]

    def _prompt(self, caption: str) -> str:
        prompt = PROMPT.format(caption)
        if self.tokenizer.chat_template is None:
            return prompt
        chat = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def _first_line(text: str) -> str:
    return next((line.strip().strip("\"'") for line in text.splitlines() if line.strip()), "")


def rewrite(texts: Sequence[str], name: str, path: Path, accelerator: Accelerator) -> dict[str, str]:
    """Rewrites texts with a model into a file of JSON lines, and reads that. What the file has already is kept, so
    that a run that was cut goes on; the main process writes, all get the result.

    Args:
        texts: each once. name: `--caption_rewriter`. path: the file; see [`read_rewritings`].

    Raises:
        InputError: the model cannot be opened, the file was made by another, or no space is left.
    """
    work = _work(texts, name, path, accelerator.device)
    # Batch by batch: processes that wait longer for another one than ten minutes are ended.
    while on_main(accelerator, lambda: next(work, False)):
        pass
    return on_main(accelerator, lambda: _kept(name, path))


def _work(texts: Sequence[str], name: str, path: Path, device: torch.device) -> Iterator[bool]:
    """Rewrites what is missing in the file, a batch each time it is asked for the next."""
    kept = _kept(name, path)
    batches = [texts[first : first + BATCH_SIZE] for first in range(0, len(texts), BATCH_SIZE)]
    missing = [batch for batch in batches if any(text not in kept for text in batch)]
    if not missing and path.exists():
        return
    with writing(f"{path.parent}", path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew without a line that a killed run left half done.
        making = path.with_name(f"{path.name}.tmp")
        with making.open("w", encoding="utf-8") as file:
            file.write(_line(_maker(name)))
            file.writelines(_line({"caption": old, "rewritten": new}) for old, new in kept.items())
        making.replace(path)
    rewriter = CaptionRewriter(name, device) if missing else None
    for batch in tqdm(missing, desc="rewriting captions", unit="batch"):
        lines = [_line({"caption": old, "rewritten": new}) for old, new in zip(batch, rewriter(batch), strict=True)]
        with writing(f"{path.parent}", path.name), path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
        yield True


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _maker(name: str) -> dict:
    return {"caption_rewriter": name, "prompt": PROMPT, "max_new_tokens": MAX_NEW_TOKENS}


def _kept(name: str, path: Path) -> dict[str, str]:
    """What the file has; a line that is cut off counts as missing.

    Raises:
        InputError: another model or prompt made it.
    """
    if not path.exists():
        return {}
    rows = [_row(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    makers = [row for row in rows if row and "caption_rewriter" in row]
    require(
        not rows or makers == [_maker(name)],
        f"--caption_rewriter {name}: {path} was written by another model, or with another prompt; remove it, or give "
        "it by --rewritten_captions instead.",
    )
    return {row["caption"]: row["rewritten"] for row in rows if row and "caption" in row}


def rewritings_file(args, data) -> Path:
    """Where the rewritings of this dataset by this model are kept: in the user's cache, for every run that asks for
    them; arguments as of [`rewrite_captions`]."""
    told = f"{args.caption_rewriter}\0{data.facts['dataset']}\0{args.caption_column}"
    return user_cache("rewritten") / f"{hashlib.sha256(told.encode()).hexdigest()[:20]}.jsonl"


def rewrite_captions(args, data, path: Path, accelerator: Accelerator) -> None:
    """Rewrites the captions that `--caption_rewriter` is to corrupt, before training, and hands them to the data; does
    nothing without that flag. All processes take part.

    Args:
        data: a [`noisycond.data.opening.TrainingData`]; its facts are brought up to date. path: the file to keep them
            in; an interrupted run goes on with it.

    Raises:
        InputError: see [`rewrite`].
    """
    from noisycond.data.captions import caption_facts  # it needs this module

    if args.caption_rewriter is None:
        return
    texts = data.captions.texts_to_rewrite()
    rewritten = rewrite(texts, args.caption_rewriter, Path(path), accelerator)
    silent = sum(not rewritten.get(text) or rewritten[text] == text for text in texts)
    if silent:
        logger.warning(
            "%s left %d of %d captions as they were; they do not count as corrupted.",
            args.caption_rewriter,
            silent,
            len(texts),
        )
    data.captions.take_rewritings(rewritten)
    data.facts |= caption_facts(data.captions)
