"""Rewritten captions: read from a file of JSON lines, or made with a language model into such a file."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
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
TURN = 30.0  # seconds that are waited at once for another run


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

    Attributes:
        facts: hashes of what its answers rest on, under any name: weights, tokenizer, settings of the generation.

    Raises:
        InputError: transformers cannot open it, or it takes too few tokens.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        from noisycond.data.text_cache import tokenizer_hash  # with all the denoisers
        from noisycond.first_stage import state_hash

        try:
            config = AutoConfig.from_pretrained(name)
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            self.model = kind.from_pretrained(name).eval()
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
        settings = self.model.generation_config.to_dict() | {"transformers_version": None}
        told = json.dumps([settings, self.tokenizer.chat_template], sort_keys=True, default=str)
        self.facts = {
            "weights": state_hash(self.model),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "settings": hashlib.sha256(told.encode()).hexdigest(),
        }
        self.model.to(device)

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
    that a run that was cut goes on, and of several runs at once one works and the others wait; the main process
    writes, all get the result.

    Args:
        texts: each once. name: `--caption_rewriter`. path: the file; see [`read_rewritings`].

    Raises:
        InputError: the model cannot be opened, the file was made by another, or no space is left.
    """
    work = _work(texts, name, path, accelerator.device)
    # Batch by batch: processes that wait longer for another one than ten minutes are ended.
    while on_main(accelerator, lambda: next(work, False)):
        pass
    return on_main(accelerator, lambda: _made(texts, name, path))


def _work(texts: Sequence[str], name: str, path: Path, device: torch.device) -> Iterator[bool]:
    """Rewrites what is missing in the file, a batch each time it is asked for the next; waits for its turn."""
    rewriter = CaptionRewriter(name, device)
    with writing(f"{path.parent}", path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    while not _locked(lock):
        yield True
    try:
        yield from _batch_by_batch(texts, rewriter, name, path)
    finally:
        lock.release()


def _locked(lock: FileLock) -> bool:
    """Whether the lock is ours by now, or the file system knows none."""
    try:
        lock.acquire(timeout=TURN, poll_interval=TURN / 100)
    except Timeout:
        logger.info("Another run is rewriting captions: waiting for %s.", lock.lock_file)
        return False
    except (OSError, NotImplementedError) as error:
        logger.debug("No lock %s: %s", lock.lock_file, error)
    return True


def _batch_by_batch(texts: Sequence[str], rewriter: CaptionRewriter, name: str, path: Path) -> Iterator[bool]:
    maker = {"caption_rewriter": name, "prompt": PROMPT, "max_new_tokens": MAX_NEW_TOKENS} | rewriter.facts
    kept = _kept(name, maker, path)
    missing = [text for text in texts if text not in kept]
    if not missing and path.exists():
        return
    making = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(f"{path.parent}", path.name):
        try:
            # Written anew without a line that a killed run left half done.
            with making.open("w", encoding="utf-8") as file:
                file.write(_line(maker))
                file.writelines(_line({"caption": old, "rewritten": new}) for old, new in kept.items())
            making.replace(path)
        finally:
            making.unlink(missing_ok=True)
    batches = [missing[first : first + BATCH_SIZE] for first in range(0, len(missing), BATCH_SIZE)]
    for batch in tqdm(batches, desc="rewriting captions", unit="batch"):
        lines = [_line({"caption": old, "rewritten": new}) for old, new in zip(batch, rewriter(batch), strict=True)]
        with writing(f"{path.parent}", path.name), path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
        yield True


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rows_of(path: Path) -> list[dict]:
    """The lines that are whole; one that is cut off counts as missing."""
    if not path.exists():
        return []
    # Not `splitlines`, which also divides at characters that JSON leaves within a caption.
    rows = (_row(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [row for row in rows if row]


def _pairs_of(rows: Sequence[dict]) -> dict[str, str]:
    """The first rewriting of each caption: a text that was trained on is not replaced."""
    pairs: dict[str, str] = {}
    for row in rows:
        if "caption" in row:
            pairs.setdefault(row["caption"], row["rewritten"])
    return pairs


def _kept(name: str, maker: dict, path: Path) -> dict[str, str]:
    """What the file has.

    Raises:
        InputError: another model or prompt made it; the same under another name will do.
    """
    rows = _rows_of(path)
    makers = [row | {"caption_rewriter": name} for row in rows if "caption_rewriter" in row]
    require(
        not rows or makers == [maker],
        f"--caption_rewriter {name}: {path} was written by another model, or other weights of it, or with another "
        "prompt; remove it, or give it by --rewritten_captions instead.",
    )
    return _pairs_of(rows)


def _made(texts: Sequence[str], name: str, path: Path) -> dict[str, str]:
    rewritten = _pairs_of(_rows_of(path))
    missing = sum(text not in rewritten for text in texts)
    require(
        not missing,
        f"--caption_rewriter {name}: {missing} of {len(texts)} captions are missing in {path}, which another run has "
        "changed in the meantime; start again.",
    )
    return rewritten


def rewritings_file(args, data) -> Path:
    """Where the rewritings of this dataset by this model are kept: in the user's cache, for every run that asks for
    them; arguments as of [`rewrite_captions`]."""
    name = args.caption_rewriter
    if name is not None and os.path.isdir(name):
        name = os.path.realpath(name)  # a relative name is another folder elsewhere
    told = f"{name}\0{data.facts['dataset']}\0{args.caption_column}"
    return user_cache("rewritten") / f"{hashlib.sha256(os.fsencode(told)).hexdigest()[:20]}.jsonl"


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
