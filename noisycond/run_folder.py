"""The output folder of a run: whose it is, with what settings, and its log.

run.json            arguments, facts of the data, package versions
log.jsonl           one line per logged step
evaluation.jsonl    one line per evaluation
looks.json          the last step whose samples and evaluation are done
checkpoint-<step>/  see checkpoints.py
samples/, loss.png  pictures
"""

import json
import logging
import platform
import shutil
from importlib import metadata
from pathlib import Path

from accelerate import Accelerator

from noisycond import checkpoints
from noisycond.data.shard_names import public_settings
from noisycond.errors import InputError, require, writing
from noisycond.processes import on_main


logger = logging.getLogger(__name__)
PACKAGES = ("noisycond", "torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors", "numpy")
PACKAGES += ("webdataset",)

# Settings in which a resumed run may differ from the one it continues. Whatever stands here changes where things are
# written, how often, or the order of floating-point operations, but not what is computed.
MAY_CHANGE = {
    "recipe",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "logging_dir",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "validation_steps",
    "validation_guidance_scale",
    "validation_inference_steps",
    "validation_images_per_class",
    "validation_prompts",
    "num_validation_images",
    "control_check_steps",
    "eval_steps",
    "eval_num_images",
    "eval_metrics",
    "eval_reference",
    "eval_reference_split",
    "eval_feature_extractor",
    "eval_extractor_weights",
    "eval_prompts",
    "eval_prompt_column",
    "eval_prompt_split",
    "eval_clip_model",
    "eval_controls",
    "eval_controls_split",
    "dataloader_num_workers",
    "cpu_threads_per_process",
    "cache_dir",
    "cache_latents",
    "latent_cache_dir",
    "text_cache_dir",
    "max_bad_images",
    "max_nonfinite_steps",
    "save_corruption_map",
    "gradient_checkpointing",
    "enable_xformers_memory_efficient_attention",
    "torch_compile",
    "allow_tf32",
    "dataset_name",  # what these five name is compared by content instead
    "train_data_dir",
    "train_shards",
    "class_names",
    "pretrained_vae_model_name_or_path",
    "pretrained_model_name_or_path",  # configuration and frozen weights are compared
    "rewritten_captions",  # the rewritings themselves are compared
    "caption_rewriter",
    "pretrained_teacher_model",  # its weights and configuration are compared
    "teacher_revision",
    "revision",
    "base_class_names",  # the labels that they give are compared
    "num_classes",  # the classes themselves are compared
    "dry_run",
    "class_groups",  # the groups themselves are compared
    "mixed_precision",  # what accelerate made of it is compared
    "train_batch_size",  # the global batch size is compared instead
    "gradient_accumulation_steps",
    "num_train_epochs",  # the number of steps is compared instead, where the learning rate depends on it
    "max_train_steps",
}
# Flags that name what a run starts from.
STARTED_FROM = (
    "denoiser",
    "pretrained_model_name_or_path",
    "pretrained_teacher_model",
    "pretrained_vae_model_name_or_path",
    "text_encoder",
    "rewritten_captions",
)
# What runs and their exports write, beside checkpoints and the trackers' folder.
OWNED = (
    "run.json",
    "log.jsonl",
    "evaluation.jsonl",
    "looks.json",
    "evaluation.png",
    "loss.png",
    "samples",
    "corruption.json",
    "corruption_map.csv",
    "reconstruction.json",
    "README.md",
    "model_index.json",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "transformer",
    "unet",
    "class_embedder",
    "vae",
    "vqvae",
    "scheduler",
    "ldm_class_to_image.py",
    "bert",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "ldm_text_to_image.py",
    "rewritten_captions.jsonl",
    "pytorch_lora_weights.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter.json",
    "adapter_local.json",
    "pipeline.py",
    ".export.tmp",
)


class RunFolder:
    """The output folder of a training run.

    Args:
        path: `--output_dir`.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.settings_file = self.path / "run.json"
        self.log_file = self.path / "log.jsonl"
        self.evaluation_file = self.path / "evaluation.jsonl"
        self.looks_file = self.path / "looks.json"
        self.samples = self.path / "samples"

    def holds_a_run(self) -> bool:
        """Whether an earlier run left its settings or checkpoints here."""
        return self.settings_file.exists() or bool(checkpoints.all_in(self.path))

    def check(self, args) -> None:
        """Refuses a folder that cannot be used as it is. To be called before any work.

        Raises:
            InputError: it is a file, or it holds another run and neither --resume_from_checkpoint nor
                --overwrite_output_dir was given, or the latter would remove what this run starts from.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--output_dir {self.path} is a file, not a folder.")
        require(
            self.path.resolve() != Path.cwd().resolve(), "--output_dir must name a folder other than the current one."
        )
        foreign = [] if self.holds_a_run() else [name for name in OWNED if (self.path / name).exists()]
        require(
            not foreign,
            f"--output_dir {self.path} holds {', '.join(foreign)}, which no run of noisycond wrote here; name another "
            "folder, so that nothing of it is replaced.",
        )
        if args.overwrite_output_dir:
            self._refuse_to_remove_what_is_read(args)
        if self.holds_a_run() and not (args.resume_from_checkpoint or args.overwrite_output_dir):
            raise InputError(
                f"--output_dir {self.path} holds another run: continue it with --resume_from_checkpoint latest, "
                "replace it with --overwrite_output_dir, or name another folder."
            )

    def _refuse_to_remove_what_is_read(self, args) -> None:
        for name in STARTED_FROM:
            value = getattr(args, name, None)
            path = None if value is None else Path(value).expanduser().resolve()
            if path is not None and path.exists() and path.is_relative_to(self.path.resolve()):
                raise InputError(
                    f"--overwrite_output_dir would remove what --{name} {value} names; name another --output_dir."
                )

    def open(self, args, facts: dict, script: str, resume_from: Path | None = None) -> None:
        """Claims the folder for this run: removes an earlier one where that was asked, or compares settings with it.

        Main process only.

        Args:
            args: the resolved arguments. facts: what else must not change, as plain JSON values (dataset and
                first-stage fingerprints, global batch size, class names). resume_from: the checkpoint to take up,
                whose run's settings are compared; None compares with those of this folder.

        Raises:
            InputError: a resumed run was made with other settings; the message says which.
        """
        settings = {
            "script": script,
            "arguments": public_settings(args),
            "facts": json.loads(json.dumps(facts)),  # as an earlier run's are read back
            "versions": {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()},
        }
        earlier = (resume_from.parent if resume_from else self.path) / self.settings_file.name
        if args.overwrite_output_dir:
            self._remove_earlier_run()
        elif earlier.exists():
            self._compare(_read_settings(earlier), settings)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.settings_file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def _remove_earlier_run(self) -> None:
        # Only what a run writes: the folder may hold more. Where it logged, its settings tell.
        try:
            logging_dir = _read_settings(self.settings_file)["arguments"]["logging_dir"]
        except (InputError, KeyError):
            logging_dir = "logs"
        for path in [self.path / name for name in (*OWNED, logging_dir)] + checkpoints.all_in(self.path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _compare(self, earlier: dict, now: dict) -> None:
        found = differences(earlier["arguments"], now["arguments"], MAY_CHANGE) + [
            f"{name.replace('_', ' ')} was {_short(earlier['facts'].get(name))} and is {_short(value)}"
            for name, value in now["facts"].items()
            if earlier["facts"].get(name) != value
        ]
        if earlier["script"] != now["script"]:
            found.insert(0, f"the script was {earlier['script']} and is {now['script']}")
        if found:
            raise InputError(
                f"--resume_from_checkpoint: the run in {self.path} has other settings: {'; '.join(found)}. Use "
                "the settings it was started with, or another --output_dir."
            )

    def cut_log(self, step: int) -> bool:
        """Drops the logs' lines after this step: what a killed run logged past its last checkpoint comes again.

        Returns:
            Whether the samples and the evaluation of this step are done, where they were due.
        """
        for file in (self.log_file, self.evaluation_file):
            if not file.exists():
                continue
            kept = []
            for line in file.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):  # the line the kill cut in two
                    continue
            write_atomically(file, "".join(kept))
        try:
            looked = int(json.loads(self.looks_file.read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or one that a kill cut
            return False
        self.note_looks(min(step, looked))
        return looked >= step

    def note_looks(self, step: int) -> None:
        """Notes that the samples and the evaluation of this step are done."""
        with writing(f"--output_dir {self.path}", self.looks_file.name):
            write_atomically(self.looks_file, json.dumps({"step": step}) + "\n")

    def log(self, row: dict) -> None:
        """Appends one line to the log."""
        self._append(self.log_file, row)

    def log_evaluation(self, row: dict) -> None:
        """Appends one line to the log of evaluations, in the place of one of the same step and choices."""
        rows = self.read_evaluations()
        others = [earlier for earlier in rows if _choices(earlier) != _choices(row)]
        if len(others) < len(rows):  # the run was cut before the step's other looks were done
            write_atomically(self.evaluation_file, "".join(json.dumps(other) + "\n" for other in others))
        self._append(self.evaluation_file, row)

    def _append(self, file: Path, row: dict) -> None:
        with writing(f"--output_dir {self.path}", file.name), file.open("a") as opened:
            opened.write(json.dumps(row) + "\n")

    def read_log(self) -> list[dict]:
        """The logged rows, in order of steps."""
        return _read_lines(self.log_file)

    def read_evaluations(self) -> list[dict]:
        """The rows of the evaluations, in order of steps."""
        return _read_lines(self.evaluation_file)


def claim(run: RunFolder, args, facts: dict, script: str, accelerator: Accelerator) -> Path | None:
    """Opens the folder for this run, on the main process for all; see [`RunFolder.open`].

    Returns:
        The verified checkpoint to resume from, or None to start at step 0.

    Raises:
        InputError: the checkpoint asked for is missing or damaged, or belongs to a run with other settings.
    """
    wanted = args.resume_from_checkpoint
    resume_from = checkpoints.find(run.path, wanted, accelerator) if wanted else None
    elsewhere = resume_from is not None and resume_from.parent.resolve() != run.path.resolve()
    require(
        not (elsewhere and run.holds_a_run()),
        f"--output_dir {run.path} holds a run of its own; continue {resume_from} in its own folder or a new one.",
    )
    on_main(accelerator, lambda: run.open(args, facts, script, resume_from))
    if resume_from is not None:
        logger.info("Resuming from %s.", resume_from)
    elif wanted:
        logger.info("There is no checkpoint in %s yet: starting at step 0.", run.path)
    return resume_from


def differences(old: dict, new: dict, ignored: set[str]) -> list[str]:
    """How two sets of resolved arguments differ, a clause each: "--seed was 0 and is 1"."""
    return [
        f"--{name} was {old.get(name)!r} and is {value!r}"
        for name, value in new.items()
        if name not in ignored and old.get(name) != value
    ]


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file beside its final name and renames it, so that it is whole or as it was."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {name: settings[name] for name in ("script", "arguments", "facts")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged, so the run's settings cannot be compared ({error}); remove it to resume without the "
            "comparison, or start anew with --overwrite_output_dir."
        ) from error


def _choices(row: dict) -> tuple:
    """Step, metrics and settings of an evaluation."""
    return row["step"], row.keys(), row.get("settings")


def _read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
