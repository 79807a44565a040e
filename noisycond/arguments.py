"""Command-line flags: one dataclass field is one flag and one recipe key. A script inherits the groups it needs.

Names and defaults follow the Diffusers example scripts. Checks of a value or between flags stand in `__post_init__`.
"""

import dataclasses
import math
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from noisycond.errors import InputError, flag_hint, require
from noisycond.recipes import read_recipe


ArgumentsT = TypeVar("ArgumentsT", bound="Arguments")


WAYS_TO_NAME_DATA = ("dataset_name", "train_data_dir", "train_shards")


def flag(default, help: str):
    """A dataclass field that is a flag with this default and help text."""
    help = help.replace("%", "%%")  # argparse formats help texts
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    recipe: str | None = flag(
        None, "A YAML file of flag values, or the name of one in recipes/; flags on the command line win."
    )
    # No flag: the recipe's values that are marked [inferred] and that the command line leaves as they are.
    inferred = MappingProxyType({})
    # No flag: the names of the flags that stand on the command line itself.
    given = frozenset()

    def __post_init__(self):
        pass

    def is_default(self, name: str) -> bool:
        """Whether a flag (one whose default is no list) has its default value."""
        return getattr(self, name) == type(self).__dataclass_fields__[name].default


@dataclass
class SourceArguments(Arguments):
    """Which images, of which classes."""

    dataset_name: str | None = flag(
        None,
        "`digits` (1,797 handwritten digits that ship with scikit-learn), a dataset on the Hub, or a local folder "
        "that `datasets` opens.",
    )
    dataset_config_name: str | None = flag(None, "The configuration of the Hub dataset.")
    dataset_split: str = flag("train", "The split to train on. `digits` has `train` (80 %) and `test` (20 %).")
    train_data_dir: str | None = flag(None, "A folder of images, one sub-folder per class.")
    cache_dir: str | None = flag(None, "Where downloaded datasets are kept; the default is that of `datasets`.")
    image_column: str = flag("image", "The dataset's column of images.")
    label_column: str = flag("label", "The dataset's column of class labels.")
    class_subset: str | None = flag(
        None,
        "Keep these classes only: a file with a class name per line (or its number, where no class is named by one), "
        "or a number of classes to pick at random.",
    )
    class_subset_seed: int = flag(0, "Seed of the random class subset.")
    num_classes: int | None = flag(
        None, "The number of classes of the dataset (before --class_subset), checked when it is opened."
    )
    max_train_samples: int | None = flag(None, "Use the first so many examples only, for debugging.")
    resolution: int = flag(256, "Images are resized so that their shorter side is this long, then cropped square.")
    image_interpolation_mode: Literal["nearest", "bilinear", "bicubic", "lanczos", "box"] = flag(
        "lanczos", "How images are resized."
    )
    max_bad_images: int = flag(10, "Unreadable images are named and skipped up to this number, then the run stops.")
    # No flags: whether training needs classes, and which of the flags about columns a folder of images heeds.
    needs_classes = True
    heeded_by_a_folder = ()

    def __post_init__(self):
        super().__post_init__()
        known = [name for name in WAYS_TO_NAME_DATA if hasattr(self, name)]
        given = [f"--{name}" for name in known if getattr(self, name) is not None]
        require(
            len(given) == 1,
            f"exactly one of {' and '.join(f'--{name}' for name in known)} is needed, but "
            + (f"{' and '.join(given)} were given." if given else "none was given."),
        )
        if self.train_data_dir is not None:
            require(
                Path(self.train_data_dir).is_dir(), f"--train_data_dir {self.train_data_dir}: there is no such folder."
            )
        for name in ("dataset_config_name", "dataset_split", "image_column", "label_column"):
            require(
                self.train_data_dir is None or self.is_default(name) or name in self.heeded_by_a_folder,
                f"--{name} has no effect with --train_data_dir: a folder of images has no such thing.",
            )
        by_number = self.class_subset is not None and self.class_subset.isdigit()
        require(
            self.class_subset_seed == 0 or by_number,
            "--class_subset_seed has no effect unless --class_subset is a number of classes.",
        )
        require(self.resolution > 0, f"--resolution is {self.resolution}, but it must be a positive number of pixels.")
        require(self.max_bad_images >= 0, f"--max_bad_images is {self.max_bad_images}, but it must not be negative.")
        for name in ("num_classes", "max_train_samples"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} is {value}, but it must be positive.")


@dataclass
class DataArguments(SourceArguments):
    """Images as training examples."""

    center_crop: bool = flag(False, "Crop the centre instead of a random place.")
    random_flip: bool = flag(False, "Mirror images at random.")
    dataloader_num_workers: int = flag(0, "Processes that load data; 0 loads in the training process.")

    def __post_init__(self):
        super().__post_init__()
        workers = self.dataloader_num_workers
        require(workers >= 0, f"--dataloader_num_workers is {workers}, but it must not be negative.")


@dataclass
class StreamArguments(DataArguments):
    """Data that does not fit; for scripts that can train without knowing how many examples there are."""

    streaming: bool = flag(False, "Read the dataset of --dataset_name as a stream instead of downloading it first.")
    train_shards: str | None = flag(
        None,
        "WebDataset shards, read as a stream: paths or URLs with braces (`cc3m/{00000..00331}.tar`), or a glob.",
    )
    shuffle_buffer_size: int = flag(1000, "A stream is shuffled by shards and, within each process, in such blocks.")
    class_names: str | None = flag(
        None, "A file with a class name per line, in the order of the labels, for a stream that does not know them."
    )
    id_column: str | None = flag(
        None, "The stream's column of stable ids, which key label corruption; the default is the path of the image."
    )

    def __post_init__(self):
        self.streaming = self.streaming or self.train_shards is not None
        super().__post_init__()
        if not self.streaming:
            for name, default in (("shuffle_buffer_size", 1000), ("class_names", None), ("id_column", None)):
                require(
                    getattr(self, name) == default, f"--{name} has no effect without --streaming or --train_shards."
                )
            return
        require(
            self.train_data_dir is None,
            "--streaming has no effect with --train_data_dir: its images are read one by one anyway; leave it off.",
        )
        require(
            self.dataset_name != "digits", "--streaming has no effect with --dataset_name digits: they are in memory."
        )
        if self.train_shards is not None:
            for name, default in (("dataset_config_name", None), ("dataset_split", "train"), ("id_column", None)):
                require(
                    getattr(self, name) == default,
                    f"--{name} has no effect with --train_shards: shards have no such thing.",
                )
            require(
                self.class_names is not None or not self.needs_classes,
                "--class_names FILE is needed with --train_shards: shards do not say how many classes there are.",
            )
        require(
            self.shuffle_buffer_size > 0,
            f"--shuffle_buffer_size is {self.shuffle_buffer_size}, but it must be positive; 1 does not shuffle.",
        )
        needs_all = {  # what these flags need that a stream cannot give
            "class_subset": "know every label",
            "max_train_samples": "know the first examples",
            "cache_latents": "hold every example",
            "save_corruption_map": "walk the whole dataset",
        }
        for name, why in needs_all.items():
            require(
                getattr(self, name, None) in (None, False),
                f"--{name} does not go with --streaming or --train_shards: it would have to {why}; leave it off.",
            )
        require(
            getattr(self, "max_train_steps", None) is not None,
            "--max_train_steps is needed with --streaming and --train_shards: a stream does not say how long an epoch "
            "is.",
        )


@dataclass
class MemoryArguments(Arguments):
    """What spares a denoiser's memory."""

    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass to save memory.")
    enable_xformers_memory_efficient_attention: bool = flag(False, "Use the attention of xformers.")


@dataclass
class FirstStageArguments(Arguments):
    """Of a script that also inherits [`DataArguments`]."""

    pretrained_vae_model_name_or_path: str | None = flag(
        None,
        "The first stage: `digits-kl` or `digits-vq` (they ship with noisycond), a Hub id or a folder of an "
        "AutoencoderKL or VQModel. A folder of a whole pipeline gives its `vae` or `vqvae`.",
    )
    cache_latents: bool = flag(False, "Encode the dataset once into a memory-mapped file and train from that.")
    latent_cache_dir: str | None = flag(
        None, "Where latent caches are kept, one folder each; the default is ~/.cache/noisycond/latents."
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            self.cache_latents or self.latent_cache_dir is None,
            "--latent_cache_dir has no effect without --cache_latents.",
        )
        require(
            not self.cache_latents or self.center_crop or self.dataset_name == "digits",
            "--cache_latents needs --center_crop: a random crop is another image every epoch.",
        )


@dataclass
class CorruptionArguments(Arguments):
    corruption_ratio: float = flag(0.0, "η: the share of examples whose label is replaced by another class, 0 to 1.")
    corruption_type: Literal["symmetric", "asymmetric"] = flag(
        "symmetric", "`symmetric`: any other class. `asymmetric`: another class of the same group (--class_groups)."
    )
    corruption_mode: Literal["fixed", "random"] = flag(
        "fixed", "`fixed`: the same examples stay corrupted in the same way. `random`: drawn anew every epoch."
    )
    class_groups: str | None = flag(
        None, "For asymmetric corruption: a JSON file, a list of lists of class names or class ids."
    )
    save_corruption_map: bool = flag(False, "Write corruption_map.csv: index, true and corrupted label (fixed only).")

    def __post_init__(self):
        super().__post_init__()
        require(
            0.0 <= self.corruption_ratio <= 1.0,
            f"--corruption_ratio is {self.corruption_ratio}, but a share must lie between 0 and 1.",
        )
        asymmetric = self.corruption_type == "asymmetric"
        require(
            not asymmetric or self.class_groups is not None, "--corruption_type asymmetric needs --class_groups FILE."
        )
        require(
            asymmetric or self.class_groups is None,
            "--class_groups has no effect with --corruption_type symmetric; say --corruption_type asymmetric.",
        )
        require(
            not (self.save_corruption_map and self.corruption_mode == "random"),
            "--save_corruption_map needs --corruption_mode fixed: random corruption differs from epoch to epoch.",
        )


@dataclass
class PerturbationArguments(Arguments):
    cep_gamma: float = flag(0.0, "γ of condition embedding perturbation (CEP); 0 is off, the paper's default is 1.")
    cep_type: Literal["uniform", "gaussian"] = flag("uniform", "CEP-U: δ ~ U(-γ/√d, γ/√d). CEP-G: δ ~ N(0, γ²/d).")
    cep_mode: Literal["random", "fixed"] = flag(
        "random", "`random`: δ drawn anew every step. `fixed`: always the same δ for the same example."
    )
    cep_perturb_null: bool = flag(True, "Perturb the null (unconditional) embedding too.")
    input_perturbation: float = flag(0.0, "Baseline: γ of input perturbation (Ning et al. 2023); they use 0.1.")
    embedding_dropout: float = flag(0.0, "Baseline: dropout probability on the condition embedding.")
    label_smoothing: float = flag(0.0, "Baseline: mix the class embedding with the mean one by this share.")
    conditioning_dropout_prob: float = flag(
        0.1, "Share of examples trained without their condition, for classifier-free guidance."
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            self.cep_gamma >= 0 and math.isfinite(self.cep_gamma),
            f"--cep_gamma is {self.cep_gamma}, but it must be 0 (off) or a positive number.",
        )
        require(
            0 <= self.input_perturbation < math.inf,
            f"--input_perturbation is {self.input_perturbation}, but it must be 0 (off) or a positive number.",
        )
        require(
            0.0 <= self.embedding_dropout < 1.0,
            f"--embedding_dropout is {self.embedding_dropout}, but it must lie in [0, 1).",
        )
        for name in ("label_smoothing", "conditioning_dropout_prob"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"--{name} is {value}, but it must lie between 0 and 1.")
        for name in ("cep_gamma", "corruption_ratio"):
            require(
                getattr(self, name, 0) == 0 or self.conditioning_dropout_prob < 1.0,
                f"--{name} acts on the condition, but with --conditioning_dropout_prob 1 the model is unconditional; "
                "lower one of them.",
            )


@dataclass
class SNRArguments(Arguments):
    snr_gamma: float | None = flag(None, "γ of min-SNR weighting (arXiv:2303.09556); they use 5.")

    def __post_init__(self):
        super().__post_init__()
        require(
            self.snr_gamma is None or 0 < self.snr_gamma < math.inf,
            f"--snr_gamma is {self.snr_gamma}, but it must be a positive number.",
        )


@dataclass
class ObjectiveArguments(SNRArguments):
    prediction_type: Literal["epsilon", "v_prediction"] = flag("epsilon", "What the denoiser predicts.")
    num_train_timesteps: int = flag(1000, "Number of noise levels.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = flag(
        None, "The noise schedule; the default is that of the denoiser preset."
    )
    beta_start: float | None = flag(None, "The first β; the default is that of the denoiser preset.")
    beta_end: float | None = flag(None, "The last β; the default is that of the denoiser preset.")

    def __post_init__(self):
        super().__post_init__()
        require(
            self.num_train_timesteps > 1,
            f"--num_train_timesteps is {self.num_train_timesteps}, but at least 2 are needed.",
        )
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            require(value is None or 0.0 < value < 1.0, f"--{name} is {value}, but it must lie between 0 and 1.")
        require(
            self.beta_schedule != "squaredcos_cap_v2" or self.beta_start is self.beta_end is None,
            "--beta_start and --beta_end have no effect with --beta_schedule squaredcos_cap_v2.",
        )
        require(
            None in (self.beta_start, self.beta_end) or self.beta_start <= self.beta_end,
            f"--beta_start is {self.beta_start}, but must not be above --beta_end, {self.beta_end}.",
        )


_FACTOR = r"\d+(?:\.\d*)?(?:e-?\d+)?"
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "piecewise_constant",
)


@dataclass
class LoopArguments(Arguments):
    output_dir: str = flag("runs/run", "Where the trained pipeline, checkpoints, logs and samples are written.")
    overwrite_output_dir: bool = flag(False, "Remove an earlier run from the output folder first.")
    seed: int = flag(0, "Seed of everything that is drawn.")
    train_batch_size: int = flag(16, "Batch size per process.")
    gradient_accumulation_steps: int = flag(1, "Batches per optimizer step.")
    num_train_epochs: int = flag(100, "Epochs to train; --max_train_steps overrides it.")
    max_train_steps: int | None = flag(None, "Optimizer steps to train.")
    learning_rate: float = flag(1e-4, "Learning rate at its peak.")
    scale_lr: bool = flag(False, "Multiply the learning rate by batch size, accumulation steps and processes.")
    lr_scheduler: Literal[LR_SCHEDULERS] = flag("constant", "Learning-rate schedule, counted in optimizer steps.")
    lr_warmup_steps: int = flag(500, "Warm-up steps, for the schedules that have a warm-up.")
    lr_num_cycles: int = flag(1, "Restarts of cosine_with_restarts.")
    lr_power: float = flag(1.0, "Power of the polynomial schedule.")
    lr_step_rules: str | None = flag(None, "For piecewise_constant, e.g. '1:1000,0.1:2000,0.01'.")
    adam_beta1: float = flag(0.9, "β1 of AdamW.")
    adam_beta2: float = flag(0.999, "β2 of AdamW.")
    adam_weight_decay: float = flag(0.0, "Weight decay of AdamW; DiT uses none.")
    adam_epsilon: float = flag(1e-8, "ε of AdamW.")
    max_grad_norm: float = flag(1.0, "Gradients are clipped to this norm; 0 is no clipping.")
    use_8bit_adam: bool = flag(False, "Use AdamW8bit of bitsandbytes.")
    use_ema: bool = flag(True, "Keep an exponential moving average of the weights; it is what is exported.")
    ema_decay: float = flag(0.9999, "Decay of the moving average, reached from below as (1 + step)/(10 + step).")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "Mixed precision; the default is that of `accelerate config`."
    )
    allow_tf32: bool = flag(False, "Allow TF32 on Ampere GPUs and later.")
    torch_compile: bool = flag(False, "Compile the denoiser with torch.compile.")
    cpu_threads_per_process: int | None = flag(
        None, "Threads on CPU; by default the cores are shared among the processes unless OMP_NUM_THREADS is set."
    )
    checkpointing_steps: int = flag(500, "Save a checkpoint every so many steps; 0 saves at the end only.")
    checkpoints_total_limit: int | None = flag(None, "Keep the newest so many checkpoints.")
    resume_from_checkpoint: str | None = flag(None, "`latest`, or the path of a checkpoint folder.")
    max_nonfinite_steps: int = flag(10, "So many non-finite losses in a row end the run.")
    logging_steps: int = flag(1, "Log every so many steps.")
    logging_dir: str = flag("logs", "Sub-folder of the output folder for the trackers.")
    report_to: str = flag("tensorboard", "`tensorboard`, `wandb`, `comet_ml`, `all`, or `none`.")
    validation_steps: int = flag(0, "Draw a sample grid every so many steps; 0 draws one at the end only.")
    dry_run: bool = flag(False, "Print parameters, batch, steps and memory, and leave; needs neither data nor GPU.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "logging_steps"):
            require(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}, but it must be positive.")
        for name in ("learning_rate", "max_nonfinite_steps", "adam_epsilon", "lr_num_cycles", "lr_power"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"--{name} is {value}, but it must be a positive number.")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"--{name} is {value}, but it must lie in [0, 1).")
        for name in ("max_train_steps", "checkpoints_total_limit", "cpu_threads_per_process"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} is {value}, but it must be positive.")
        for name in (
            "checkpointing_steps",
            "validation_steps",
            "max_grad_norm",
            "adam_weight_decay",
            "lr_warmup_steps",
            "seed",
        ):
            require(getattr(self, name) >= 0, f"--{name} is {getattr(self, name)}, but it must not be negative.")
        require(self.seed < 2**32, f"--seed is {self.seed}, but it must be less than 2^32.")
        require(
            self.lr_step_rules is None or re.fullmatch(rf"({_FACTOR}:\d+,)*{_FACTOR}", self.lr_step_rules),
            f"--lr_step_rules is {self.lr_step_rules!r}, but must read like '1:1000,0.1:2000,0.01': a factor of the "
            "learning rate, until which step, and so on, and the factor after that.",
        )
        for name, schedule in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
            require(
                getattr(self, name) == 1 or self.lr_scheduler == schedule,
                f"--{name} has no effect with --lr_scheduler {self.lr_scheduler}, only with {schedule}.",
            )
        logs = Path(self.logging_dir)
        require(
            not logs.is_absolute() and ".." not in logs.parts and logs != Path("."),
            f"--logging_dir is {self.logging_dir}, but must name a sub-folder of the output folder.",
        )
        require(
            (self.lr_scheduler == "piecewise_constant") == (self.lr_step_rules is not None),
            "--lr_scheduler piecewise_constant and --lr_step_rules go together: one was given without the other.",
        )
        require(
            not (self.resume_from_checkpoint and self.overwrite_output_dir),
            "--resume_from_checkpoint and --overwrite_output_dir contradict each other: give one of them.",
        )


@dataclass
class ValidationArguments(Arguments):
    """How the sample grids of a training script are drawn. To be inherited from before [`ObjectiveArguments`], so that
    the number of noise levels is checked first."""

    validation_guidance_scale: float = flag(4.0, "Guidance scale of the sample grids.")
    validation_inference_steps: int = flag(50, "Sampling steps of the sample grids.")

    def __post_init__(self):
        super().__post_init__()
        levels = getattr(self, "num_train_timesteps", None)
        require(
            0 < self.validation_inference_steps <= (levels or math.inf),
            f"--validation_inference_steps is {self.validation_inference_steps}, but must be positive"
            + (f" and at most --num_train_timesteps, {levels}." if levels else "."),
        )
        require(
            1 <= self.validation_guidance_scale < math.inf,
            f"--validation_guidance_scale is {self.validation_guidance_scale}, but must be at least 1 (no guidance).",
        )


@dataclass
class SamplingArguments(Arguments):
    """How images are drawn from a pipeline."""

    prompts: str | None = flag(
        None,
        "What a text-to-image pipeline draws: a text file with a prompt per line, a table (.jsonl, .csv, .json), COCO "
        "captions (.json), a dataset with captions, `digits:seen` or `digits:unseen`.",
    )
    prompt_column: str | None = flag(
        None, "The column of texts of a table or dataset; the default is `text`, `caption` or `prompt`."
    )
    prompt_split: str | None = flag(None, "The split of a dataset of prompts; the default is `validation`.")
    controls: str | None = flag(
        None,
        "What a pipeline with a ControlNet or adapter draws after: `digits`, a folder by prepare_dataset.py, or "
        "a dataset's Hub id; an image's class, or its prompt, is that of the same example.",
    )
    controls_split: str | None = flag(
        None, "The split of digits (`test` by default) or of a dataset of controls (`validation` by default)."
    )
    control_column: str | None = flag(
        None, "The column of control images; the default is the one that the adapter was trained on, or `canny`."
    )
    controls_caption_column: str | None = flag(
        None, "The column of captions that a text-to-image pipeline draws from; the default is `caption`."
    )
    conditioning_scale: float = flag(
        1.0, "What is multiplied by what a ControlNet or adapter reads from the control; at 0 it is not heeded."
    )
    base_pipeline: str | None = flag(
        None, "For a --pipeline that is an adapter folder: another base than the one it was trained on."
    )
    num_images: int = flag(1000, "Number of images.")
    batch_size: int = flag(50, "Images per chunk; the bits of an image depend on it, not on the number of processes.")
    class_sampling: Literal["balanced", "random"] = flag(
        "balanced", "`balanced`: the classes, the prompts or the controls in turn. `random`: drawn uniformly."
    )
    num_inference_steps: int = flag(50, "Sampling steps.")
    scheduler: str | None = flag(
        None, "Another scheduler of diffusers, by class name, e.g. DPMSolverMultistepScheduler."
    )
    image_format: Literal["png", "jpg", "webp"] = flag("png", "File format; metrics want png, which loses nothing.")
    torch_dtype: Literal["float32", "float16", "bfloat16"] = flag("float32", "Precision of the pipeline's weights.")
    trust_remote_code: bool = flag(
        False, "Allow a pipeline that brings code of others; our own classes are opened without it."
    )
    cpu_threads_per_process: int | None = flag(None, "Threads on CPU; by default the cores are shared.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_images", "batch_size", "num_inference_steps"):
            require(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}, but it must be positive.")
        threads = self.cpu_threads_per_process
        require(threads is None or threads > 0, f"--cpu_threads_per_process is {threads}, but it must be positive.")
        for name in ("prompt_column", "prompt_split"):
            require(
                self.prompts is not None or getattr(self, name) is None, f"--{name} has no effect without --prompts."
            )
        for name, default in (
            ("controls_split", None),
            ("control_column", None),
            ("controls_caption_column", None),
            ("conditioning_scale", 1.0),
        ):
            require(
                self.controls is not None or getattr(self, name) == default,
                f"--{name} has no effect without --controls.",
            )
        require(
            self.controls is None or self.prompts is None,
            "--prompts has no effect with --controls: images are drawn from the captions of the same examples; leave "
            "it off.",
        )
        require(
            0 <= self.conditioning_scale < math.inf,
            f"--conditioning_scale is {self.conditioning_scale}, but it must be a number from 0 on.",
        )


DEFAULT_RANK = 4


@dataclass
class LoRAShapeArguments(Arguments):
    """What LoRA looks like, of a script that says in `wants_lora` whether there is one, and in `lora_switch` how it is
    asked for."""

    rank: int = flag(DEFAULT_RANK, "Rank of the LoRA matrices.")
    lora_alpha: float | None = flag(None, "α of LoRA, whose updates are scaled by α/rank; the default is the rank.")
    lora_target_modules: list[str] = flag(
        [], "Modules that get LoRA, by the ends of their names; the default is to_k, to_q, to_v and to_out.0."
    )
    lora_switch = "--use_lora"

    @property
    def wants_lora(self) -> bool:
        raise NotImplementedError

    def __post_init__(self):
        super().__post_init__()
        if not self.wants_lora:
            for name, default in (("rank", DEFAULT_RANK), ("lora_alpha", None), ("lora_target_modules", [])):
                require(getattr(self, name) == default, f"--{name} has no effect without {self.lora_switch}; add it.")
            return
        require(self.rank > 0, f"--rank is {self.rank}, but it must be positive.")
        require(
            self.lora_alpha is None or 0 < self.lora_alpha < math.inf,
            f"--lora_alpha is {self.lora_alpha}, but it must be a positive number.",
        )


@dataclass
class LoRAArguments(LoRAShapeArguments):
    use_lora: bool = flag(False, "Train low-rank adapters of the denoiser (LoRA) instead of its weights; needs peft.")

    @property
    def wants_lora(self) -> bool:
        return self.use_lora


@dataclass
class HubArguments(Arguments):
    push_to_hub: bool = flag(False, "Push what was trained to the Hugging Face Hub when it is complete here.")
    hub_model_id: str | None = flag(
        None, "The repository to push to, user/model; the default is the name of the output folder, under your name."
    )
    hub_private_repo: bool = flag(False, "Make the repository a private one.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("hub_model_id", "hub_private_repo"):
            require(
                self.push_to_hub or not getattr(self, name), f"--{name} has no effect without --push_to_hub; add it."
            )
        if self.hub_model_id is not None:
            require_repo_id(self.hub_model_id, "--hub_model_id")


def require_repo_id(name: str, what: str) -> None:
    """Raises InputError unless the name can be a repository's on the Hub, with its user or without."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InputError(
            f"{what} is {name!r}, but a repository's id reads user/model: letters, digits, '-', '_' and '.', at most "
            "96 of them; neither a path nor a URL."
        ) from None


class _Parser(HfArgumentParser):
    """Raises a sentence instead of printing the usage and leaving."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # argparse takes -1 for a value and -1e-3 for a flag.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str):
        raise InputError(message[0].lower() + message[1:] + ("" if message.endswith(".") else "."))


def parse_arguments(cls: type[ArgumentsT], argv: list[str] | None = None, default_recipe: str | None = None):
    """Parses flags and recipe into `cls`.

    Recipe values become arguments that stand before the user's, so one parser checks both and the command line wins.

    Args:
        cls: a dataclass that inherits from [`Arguments`].
        argv: the arguments; None takes those of the process.
        default_recipe: the recipe where the user names neither a recipe nor a dataset other than `digits`.

    Raises:
        InputError: an unknown flag or recipe key (names the nearest), a value of the wrong type or range, or flags
            that contradict each other.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(cls, allow_abbrev=False)
    recipe = _value_of(argv, "recipe")
    if recipe is None and default_recipe is not None and _is_embedded_default(argv, cls):
        recipe = default_recipe
        argv = [*argv, "--recipe", recipe]
    recipe_argv, inferred = ([], {}) if recipe in (None, "none") else _recipe_arguments(recipe, cls, argv)
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            recipe_argv + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    if unknown:
        known = [option for option in parser._option_string_actions if "-" not in option[2:]]
        name = unknown[0].split("=")[0]
        raise InputError(f"unknown flag {name}{flag_hint(name, known)}.")
    arguments.inferred, arguments.given = inferred, frozenset(_given(argv))
    return arguments


def peek(argv: list[str] | None, classes: Sequence[type[Arguments]], default_recipe: str) -> dict[str, object]:
    """What a command line and its recipe say, not checked: of a script whose flags depend on one of them. Of the
    command line only the last word of a flag counts; a switch is None.

    Args:
        argv: as for [`parse_arguments`]. classes: one of which will be parsed. default_recipe: as there.

    Raises:
        InputError: there is no such recipe, it cannot be read, or it has a key that none of the classes has.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe = _value_of(argv, "recipe")
    if recipe is None and all(_is_embedded_default(argv, cls) for cls in classes):
        recipe = default_recipe
    known = {item.name: None for cls in classes for item in dataclasses.fields(cls) if item.name != "recipe"}
    values = {} if recipe in (None, "none") else read_recipe(recipe, known).values
    said = {name: value for name, value in values.items() if value is not None}
    return said | {name: _value_of(argv, name) for name in sorted(_given(argv))}


def split_words(cls: type[Arguments], argv: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that belong to no flag of `cls`, and the flags with their values.

    A switch takes the next word only where that says yes or no, so `--switch WORD` leaves the word. A flag that is not
    known is taken to have a value.
    """
    options = _Parser(cls, allow_abbrev=False)._option_string_actions
    words, flags, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        flags.append(word)
        action = options.get(word)
        is_switch = action is not None and action.nargs in (0, "?")
        if "=" in word or not rest or rest[0].startswith("--") or (is_switch and not _is_yes_or_no(rest[0])):
            continue
        flags.append(rest.pop(0))
    return words, flags


def _is_yes_or_no(word: str) -> bool:
    try:
        string_to_bool(word)
    except ArgumentTypeError:
        return False
    return True


def _value_of(argv: list[str], name: str) -> str | None:
    found = None
    for position, word in enumerate(argv):
        option, _, value = word.partition("=")
        if option in (f"--{name}", f"--{name.replace('_', '-')}"):
            found = value or next(iter(argv[position + 1 :]), None)
    return found  # the last one counts, as for argparse


def _is_embedded_default(argv: list[str], cls: type) -> bool:
    named = [_value_of(argv, name) for name in WAYS_TO_NAME_DATA if hasattr(cls, name)]
    return all(value in (None, "digits") for value in named)


def _given(argv: list[str]) -> set[str]:
    """The flags on the command line."""
    options = {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    return options | {option.removeprefix("no_") for option in options}


def _replaced_by_dataset(argv: list[str], cls: type) -> set[str]:
    """What of a recipe falls away where the command line names a dataset: the other ways of naming one, and what the
    recipe says of its own."""
    ways = {name for name in WAYS_TO_NAME_DATA if hasattr(cls, name)}
    given = _given(argv) & ways
    return ways - given | {"num_classes"} if given else set()


def _recipe_arguments(name: str, cls: type, argv: list[str]) -> tuple[list[str], dict[str, object]]:
    """A recipe as arguments, and those of its values that are marked [inferred] and that `argv` does not replace."""
    types = {item.name: item.type for item in dataclasses.fields(cls) if item.name != "recipe"}
    recipe = read_recipe(name, types)
    left_out = _replaced_by_dataset(argv, cls)
    arguments: list[str] = []
    for key, value in recipe.values.items():
        if value is None or key in left_out:
            continue
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
            continue
        if isinstance(value, bool) and types[key] is not bool:
            value = "yes" if value else "no"  # YAML reads a bare `no` as False
        arguments.append(f"--{key}={value}")
    replaced = left_out | _given(argv)
    inferred = {
        key: value
        for key, value in recipe.values.items()
        if recipe.marks.get(key) == "inferred" and value is not None and key not in replaced
    }
    return arguments, inferred
