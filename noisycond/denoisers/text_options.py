"""The flags of a text-conditional model: from scratch or an existing pipeline, text encoder, LoRA, cached texts."""

from dataclasses import dataclass
from pathlib import Path

from noisycond.arguments import Arguments, LoRAArguments, flag
from noisycond.errors import require


DEFAULT_DENOISER = "ldm-mini-text"


@dataclass
class TextCacheArguments(Arguments):
    cache_text_embeddings: bool = flag(
        False, "Encode every caption once into a memory-mapped file and train from that; for frozen text encoders."
    )
    text_cache_dir: str | None = flag(
        None, "Where caches of text embeddings are kept, one folder each; the default is ~/.cache/noisycond/texts."
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            self.cache_text_embeddings or self.text_cache_dir is None,
            "--text_cache_dir has no effect without --cache_text_embeddings.",
        )


@dataclass
class TextModelArguments(TextCacheArguments, LoRAArguments):
    """Of a script that also inherits `FirstStageArguments` and `PerturbationArguments`."""

    denoiser: str | None = flag(
        None,
        "Train from scratch: a preset (ldm-4-text, ldm-mini-text), a config JSON, or a pretrained U-Net to continue "
        f"from; the default is {DEFAULT_DENOISER}.",
    )
    pretrained_model_name_or_path: str | None = flag(
        None,
        "Continue from an existing text-to-image pipeline instead: a folder or Hub id of Stable Diffusion 1.x, 2.x or "
        "XL, of LDM or of PixArt-α.",
    )
    revision: str | None = flag(None, "The revision of the pipeline on the Hub.")
    variant: str | None = flag(None, "The variant of the pipeline's weight files, e.g. fp16.")
    text_encoder: str | None = flag(
        None,
        "`digits-bert` (ships with noisycond), or a folder or Hub id of a text encoder; the default is that of the "
        "preset.",
    )
    train_text_encoder: bool | None = flag(
        None, "Train the text encoder along; the default is to from scratch, and not to with an existing pipeline."
    )
    text_encoder_learning_rate: float | None = flag(
        None, "The text encoder's learning rate at its peak; the default is --learning_rate."
    )

    def __post_init__(self):
        super().__post_init__()
        self._resolve_origin()
        rate = self.text_encoder_learning_rate
        require(
            rate is None or 0 < rate < float("inf"),
            f"--text_encoder_learning_rate is {rate}, but it must be a positive number.",
        )
        require(
            rate is None or self.train_text_encoder,
            "--text_encoder_learning_rate has no effect on a frozen text encoder; add --train_text_encoder yes.",
        )
        self._check_lora()
        require(
            not (self.cache_text_embeddings and self.train_text_encoder),
            "--cache_text_embeddings needs a frozen text encoder: a trained one encodes anew at every step; add "
            "--train_text_encoder no, or leave it off.",
        )

    def _resolve_origin(self) -> None:
        existing = self.pretrained_model_name_or_path is not None
        if existing:
            require(
                self.revision is None or not Path(self.pretrained_model_name_or_path).is_dir(),
                f"--revision has no effect on a folder, {self.pretrained_model_name_or_path}; leave it off.",
            )
            for name, instead in (
                ("denoiser", "the pipeline's own is trained"),
                ("text_encoder", "the pipeline brings its own"),
                ("pretrained_vae_model_name_or_path", "the pipeline brings its own first stage"),
            ):
                require(
                    getattr(self, name, None) is None,
                    f"--{name} has no effect with --pretrained_model_name_or_path: {instead}; leave it off.",
                )
        else:
            for name in ("revision", "variant"):
                require(
                    getattr(self, name) is None,
                    f"--{name} has no effect without --pretrained_model_name_or_path.",
                )
            self.denoiser = self.denoiser or DEFAULT_DENOISER
        if self.train_text_encoder is None:
            self.train_text_encoder = not (existing or self.cache_text_embeddings)

    def _check_lora(self) -> None:
        if not self.use_lora:
            return
        require(
            self.pretrained_model_name_or_path is not None,
            "--use_lora adapts a model that is trained already; name one with --pretrained_model_name_or_path.",
        )
        require(
            not self.train_text_encoder,
            "--use_lora adapts the denoiser alone; leave --train_text_encoder away.",
        )
