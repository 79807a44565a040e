"""The flags of captioned data: where captions and their rewritings are found, and how captions are corrupted."""

from dataclasses import dataclass
from typing import Literal

from noisycond.arguments import Arguments, StreamArguments, flag
from noisycond.captions import CORRUPTION_TYPES, TOKEN_OPERATIONS
from noisycond.corruption import CORRUPTION_MODES
from noisycond.errors import require


WAYS_TO_REWRITE = ("rewritten_caption_column", "rewritten_captions", "caption_rewriter")


@dataclass
class CaptionDataArguments(StreamArguments):
    """Images with captions; classes are optional."""

    train_data_dir: str | None = flag(
        None,
        "A folder of images with a metadata.jsonl: a line per image, its `file_name` and the column of captions.",
    )
    caption_column: str = flag(
        "text",
        "The dataset's column of captions; of a list, one is drawn anew every epoch. In shards: an extension (`text` "
        "also stands for `txt`) or a field of `json`.",
    )
    label_column: str | None = flag(
        None, "A column of class labels, by which swapped captions that are still true are told; digits know theirs."
    )
    id_column: str | None = flag(
        None, "The stream's column of stable ids, for --cep_mode fixed; the default is the path of the image."
    )
    needs_classes = False
    heeded_by_a_folder = ("label_column",)

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name == "digits":
            for name in ("caption_column", "label_column"):
                require(
                    self.is_default(name),
                    f"--{name} has no effect with --dataset_name digits: they bring their captions and labels.",
                )
        elif self.label_column is None:
            for name in ("class_subset", "num_classes", "class_names"):
                require(
                    getattr(self, name) is None, f"--{name} has no effect without --label_column: there are no labels."
                )
        require(
            self.train_shards is None or self.label_column is None or self.class_names is not None,
            "--class_names FILE is needed with --train_shards and --label_column: shards do not say how many classes "
            "there are.",
        )
        require(
            getattr(self, "label_smoothing", 0.0) == 0,
            "--label_smoothing has no effect on captions: there is no mean class to mix in; leave it off.",
        )


@dataclass
class CaptionCorruptionArguments(Arguments):
    corruption_ratio: float = flag(0.0, "η: the share of examples whose caption is corrupted, 0 to 1.")
    corruption_type: Literal[CORRUPTION_TYPES] = flag(
        "swap",
        "`swap`: examples exchange captions in pairs. `token`: words are replaced, dropped or masked. `shuffle`: "
        "words change their order. `llm`: the caption is rewritten by a language model.",
    )
    corruption_mode: Literal[CORRUPTION_MODES] = flag(
        "fixed", "`fixed`: the same examples stay corrupted in the same way. `random`: drawn anew every epoch."
    )
    token_ratio: float = flag(0.3, "For `token`: the share of words of a corrupted caption; at least one word.")
    token_operation: Literal[TOKEN_OPERATIONS] = flag(
        "replace",
        "For `token`: `replace` by words of other captions, `drop`, or `mask`: the tokenizer's mask token, or the "
        "word [MASK] where it has none.",
    )
    rewritten_caption_column: str | None = flag(None, "For `llm`: the dataset's column of rewritten captions.")
    rewritten_captions: str | None = flag(
        None, 'For `llm`: a file of JSON lines, each {"caption": …, "rewritten": …}, looked up by the caption\'s text.'
    )
    caption_rewriter: str | None = flag(
        None,
        "For `llm`: a language model of transformers (a folder or Hub id) that rewrites captions before training.",
    )
    save_corruption_map: bool = flag(
        False, "Write corruption_map.csv: index, true and corrupted caption in the first epoch (fixed only)."
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            0.0 <= self.corruption_ratio <= 1.0,
            f"--corruption_ratio is {self.corruption_ratio}, but a share must lie between 0 and 1.",
        )
        require(
            0.0 < self.token_ratio <= 1.0,
            f"--token_ratio is {self.token_ratio}, but a share of words must lie above 0 and not above 1.",
        )
        for name in ("token_ratio", "token_operation"):
            require(
                self.corruption_type == "token" or self.is_default(name),
                f"--{name} has no effect with --corruption_type {self.corruption_type}, only with token.",
            )
        self._check_rewriting()
        require(
            not (self.save_corruption_map and self.corruption_mode == "random"),
            "--save_corruption_map needs --corruption_mode fixed: random corruption differs from epoch to epoch.",
        )

    def _check_rewriting(self) -> None:
        given = [f"--{name}" for name in WAYS_TO_REWRITE if getattr(self, name) is not None]
        if self.corruption_type != "llm":
            require(
                not given,
                f"{' and '.join(given)} has no effect with --corruption_type {self.corruption_type}, only with llm.",
            )
            return
        require(
            len(given) == 1,
            f"--corruption_type llm needs exactly one of {', '.join(f'--{name}' for name in WAYS_TO_REWRITE)}, but "
            + (f"{' and '.join(given)} were given." if given else "none was given."),
        )
        require(
            self.caption_rewriter is None or not getattr(self, "streaming", False),
            "--caption_rewriter does not go with --streaming or --train_shards: it would have to know every caption; "
            "give rewritten captions by --rewritten_caption_column or --rewritten_captions.",
        )
        require(
            self.rewritten_caption_column is None or getattr(self, "dataset_name", None) != "digits",
            "--rewritten_caption_column has no effect with --dataset_name digits: they have no columns; give "
            "--rewritten_captions FILE.",
        )
