"""Bases of a personalization: pre-trained pipelines that are frozen, and the data that something beside them learns to
control them from.

Letters: B examples, K classes, R the resolution.
"""

import functools
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn

from noisycond import dry_run
from noisycond.captions import CaptionTally
from noisycond.class_conditional import first_stage_of, label_conditions, open_corruption, peek_latents
from noisycond.condition_kinds import CAPTIONS, LABELS, require_kind
from noisycond.control_pipelines import draw_at, native_resolution
from noisycond.control_set import ControlSet, open_controls
from noisycond.corruption import LabelCorruption
from noisycond.data.batches import Batches
from noisycond.data.corruption_map import save_corruption_map
from noisycond.data.opening import TrainingData, find_controls, open_batches, open_training_data
from noisycond.data.rewriting import rewrite_captions, rewritings_file
from noisycond.data.sources import ImageSource, read_class_names
from noisycond.data.text_cache import reading
from noisycond.denoisers.class_pipelines import (
    check_latents,
    declared_class_name,
    find_class_pipeline,
    match_classes,
    open_class_pipeline,
    pipeline_index,
)
from noisycond.denoisers.conditional import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.control import ControlledUNet
from noisycond.denoisers.text_pipelines import TextPipeline, open_text_pipeline, peek_text_pipeline
from noisycond.errors import InputError, require
from noisycond.evaluation.in_training import TrainingEvaluation, evaluation_controls
from noisycond.first_stage import FirstStage, open_first_stage, peek_first_stage, state_hash
from noisycond.noise_schedule import make_betas, schedule_of_scheduler
from noisycond.objective import PREDICTION_TYPES, DiffusionObjective
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.run_folder import RunFolder
from noisycond.sampling import image_size
from noisycond.text_conditional import cache_texts, keep_captions, mask_word_of, text_conditions
from noisycond.training_state import Tally


logger = logging.getLogger(__name__)
FLAG = "--pretrained_model_name_or_path"
DOING = "controlled"
SHOWN = 10  # rows of a sample grid


@dataclass
class Shown:
    """The rows of sample grids.

    Attributes:
        controls, targets: RGB, R × R; the images that the controls were made from. conditions: a label of the base, or
            a caption, of each.
    """

    controls: list[Image.Image]
    targets: list[Image.Image]
    conditions: list[int] | list[str]


class Base(ABC):
    """A frozen pipeline, taken apart, and its training data; `args` with
    [`noisycond.personalization.PersonalizationArguments`].

    Attributes:
        data: with controls; None where it is not on this machine (dry run).
        pipeline: as it was opened, in float32; None of one that is only looked at (dry run).
        unet: its own; on the meta device in a dry run. first_stage: the autoencoder; None of one that is not on this
            machine (dry run). factor: of that.
        schedule: noise schedule and prediction type that it was trained with, as JSON values.
        tally: counts what happened to the conditions.
        class_names: what the K labels of a class-conditional base mean, where that is known.
        draws_at: the side of the images that the base draws by itself; it is made to draw at --resolution.
    """

    condition: str
    args: object
    data: TrainingData | None
    pipeline: DiffusionPipeline | None
    unet: UNet2DConditionModel
    first_stage: FirstStage | None
    factor: int
    schedule: dict
    tally: Tally
    class_names: list[str] | None = None
    draws_at: int | None = None

    def denoiser(self, backbone: ControlledUNet) -> ConditionalDenoiser:
        """What is trained: around the frozen U-Net and what is beside it, the base's own encoder, frozen, and CEP."""
        args = self.args
        denoiser = ConditionalDenoiser(
            self.encoder(),
            backbone,
            perturbation=ConditionEmbeddingPerturbation(args.cep_gamma, args.cep_type, args.seed),
            fixed=args.cep_mode == "fixed",
            perturb_null=args.cep_perturb_null,
        )
        if args.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        return denoiser

    def objective(self) -> DiffusionObjective:
        """That which the base was trained for."""
        args, known = self.args, self.schedule
        names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
        betas = make_betas(*(known[name] for name in names))
        return DiffusionObjective(
            betas, known["prediction_type"], args.snr_gamma, args.input_perturbation, seed=args.seed
        )

    @functools.cached_property
    def unet_hash(self) -> str:
        """SHA-256 of the U-Net's weights, which no training changes."""
        return state_hash(self.unet)

    def _take_schedule(self) -> None:
        name = self.args.pretrained_model_name_or_path
        try:
            schedule = schedule_of_scheduler(self.pipeline.scheduler.config)
        except InputError as error:
            raise InputError(f"{FLAG} {name}: {error}") from error
        require(
            schedule["prediction_type"] in PREDICTION_TYPES,
            f"{FLAG} {name}: it predicts {schedule['prediction_type']!r}, but must predict one of "
            f"{', '.join(PREDICTION_TYPES)}.",
        )
        self.schedule = schedule

    def _check_latents(self) -> None:
        check_latents(
            FLAG, self.args.pretrained_model_name_or_path, self.unet.config, self.first_stage, self.args.resolution
        )
        self.draws_at = native_resolution(self.pipeline)
        if self.draws_at not in (None, self.args.resolution):
            logger.warning(
                "--resolution is %d, but %s draws images of %d pixels by itself; the control is learned, and images "
                "are drawn, at %d.",
                self.args.resolution,
                self.args.pretrained_model_name_or_path,
                self.draws_at,
                self.args.resolution,
            )
        draw_at(self.pipeline, self.args.resolution)

    def _evaluation_controls(self, of_captions: bool = False) -> ControlSet:
        controls = evaluation_controls(self.args, of_captions=of_captions)
        controls.check(image_size(self.pipeline))
        return controls

    def shown(self) -> Shown:
        """What sample grids show: of digits held-out ones, a row per class, else training examples, spread evenly."""
        args, own = self.args, self.data.source
        if args.dataset_name == "digits":
            held_out = open_controls("--dataset_name", "digits")
            source = held_out.source
            rows = [
                int((source.labels == source.class_names.index(name)).argmax()) for name in own.class_names[:SHOWN]
            ]
        else:
            held_out, source = ControlSet("--dataset_name", args.dataset_name or args.train_data_dir, None, own), own
            count = min(SHOWN, len(source))
            rows = [row * len(source) // count for row in range(count)]
        controls = held_out.of_column(args.control_column)
        pictures = [_next_pair(controls, row, args.resolution) for row in rows]
        rows, drawn, targets = map(list, zip(*pictures, strict=True))
        return Shown(drawn, targets, self.conditions_of(source, rows))

    @property
    @abstractmethod
    def facts(self) -> dict:
        """What a resumed run must share beside its flags and its data, as JSON values."""

    @abstractmethod
    def sizes(self) -> dict[str, str]:
        """Lines of a dry run, name to text."""

    @abstractmethod
    def encoder(self) -> nn.Module:
        """The frozen condition encoder, with the baselines that the flags ask for."""

    @abstractmethod
    def evaluation(self) -> TrainingEvaluation:
        """Of the images that are drawn after controls."""

    @abstractmethod
    def batches(self, accelerator: Accelerator) -> Batches:
        """The training batches; all that is frozen goes to the accelerator's device."""

    @abstractmethod
    def conditions(self, batch: dict, keys: torch.Tensor) -> dict:
        """What [`ConditionalDenoiser`] takes of a batch of B examples, `control` aside; counts the batch.

        Args:
            keys [B]: int64, this step's keys.
        """

    @abstractmethod
    def true_conditions(self, batch: dict) -> dict:
        """The same with nothing dropped or counted, and labels that are not corrupted; captions come as the dataset
        gives them, corrupted ones among them."""

    @abstractmethod
    def conditions_of(self, source: ImageSource, rows: list[int]) -> list[int] | list[str]:
        """What the pipeline is called with for these examples."""

    @abstractmethod
    def keep(self, run: RunFolder) -> None:
        """Writes into the run's folder what it keeps of its data."""

    @abstractmethod
    def set_aside(self) -> None:
        """Puts aside again, after a look, what a pipeline took to its device and training does not need there."""


def _next_pair(controls: ControlSet, row: int, side: int) -> tuple[int, Image.Image, Image.Image]:
    """This example, or the next one that can be read, for one that cannot does not stop a run: which it is, its
    control and its image."""
    size = len(controls.source)
    for candidate in range(row, row + size):
        candidate %= size
        try:
            return candidate, controls.control(candidate, side), controls.target(candidate, side)
        except InputError as error:  # it is named when its turn comes
            problem = error
    raise problem


def _data_that_is_here(args) -> TrainingData | None:
    data = dry_run.open_what_is_here(args)
    if data is not None:
        find_controls(data, args.control_column)
    return data


class ClassBase(Base):
    """A class-conditional base; `args` with `CorruptionArguments`.

    Attributes:
        known_as [K']: int64, the base's labels of the dataset's K' classes. groups: the class groups that corruption
            keeps to; None where there are none.
    """

    condition = LABELS
    tally: LabelCorruption

    @classmethod
    def open(cls, args, accelerator: Accelerator) -> "ClassBase":
        """With the data, the base's weights and the first stage.

        Raises:
            InputError: one of them cannot be opened, or they do not fit together.
        """
        self, source = cls._found(args)
        self.data = open_training_data(args)
        find_controls(self.data, args.control_column)
        self.tally, self.groups = open_corruption(args, self.data)
        self.pipeline = open_class_pipeline(source)
        self.unet, self.embedder = self.pipeline.unet, self.pipeline.class_embedder
        self._match(source.class_names, self.data.source.class_names, self.embedder.null_class)
        self.first_stage = first_stage_of(args, source, self.pipeline.vqvae)
        self.pipeline.register_modules(vqvae=self.first_stage.model)
        self.factor = self.first_stage.factor
        self._check_latents()
        self._take_schedule()
        return self

    @classmethod
    def peek(cls, args) -> "ClassBase":
        """Without weights, data that is not here, or a first stage that is not here; see [`noisycond.dry_run`]."""
        self, source = cls._found(args)
        self.data = _data_that_is_here(args)
        self.first_stage, _, self.factor, self.why_latents = peek_latents(args, source)
        with torch.device("meta"):
            known = {name: value for name, value in source.unet.items() if not name.startswith("_")}
            self.unet = UNet2DConditionModel(**known)
        self.embedder, self.pipeline = None, None
        names = source.class_names or dry_run.class_names_of(args, self.data)
        if self.data is not None and source.class_names is not None:
            self._match(source.class_names, self.data.source.class_names, len(names))
        self._num_classes = len(names)
        return self

    @classmethod
    def _found(cls, args):
        self, name = cls(), args.pretrained_model_name_or_path
        require_kind(FLAG, name, declared_class_name(pipeline_index(name, args.revision, FLAG)), LABELS, DOING)
        self.args = args
        return self, find_class_pipeline(name, args.revision, FLAG)

    def _match(self, theirs: list[str] | None, own: list[str], known: int) -> None:
        args = self.args
        if args.base_class_names is not None:
            theirs = read_class_names("--base_class_names", args.base_class_names)
        labels = match_classes(own, theirs, known, FLAG, args.pretrained_model_name_or_path)
        self.class_names, self.known_as, self._num_classes = theirs, torch.tensor(labels), known

    @property
    def facts(self) -> dict:
        return {
            "class_groups": self.groups,
            "base": [self.unet_hash, state_hash(self.embedder)],
            "known_as": self.known_as.tolist(),
        }

    def sizes(self) -> dict[str, str]:
        return {}

    def encoder(self) -> ClassEncoder:
        args, dim = self.args, self.unet.config.cross_attention_dim
        encoder = ClassEncoder(self._num_classes, dim, args.embedding_dropout, args.label_smoothing, args.seed)
        if self.embedder is not None:
            encoder.table.load_state_dict(self.embedder.embedding.state_dict())
        return encoder.requires_grad_(False)

    def evaluation(self) -> TrainingEvaluation:
        controls = self._evaluation_controls()
        return TrainingEvaluation(self.args, self.class_names or self.data.source.class_names, controls=controls)

    def batches(self, accelerator: Accelerator) -> Batches:
        self.first_stage.to(accelerator.device)
        return open_batches(self.args, self.data, accelerator, self.first_stage)

    def conditions(self, batch: dict, keys: torch.Tensor) -> dict:
        null_class = self.embedder.null_class
        return label_conditions(self.args, self.tally, null_class, batch, keys, self.known_as)[0]

    def true_conditions(self, batch: dict) -> dict:
        labels = batch["class_labels"]
        return {"class_labels": self.known_as.to(labels.device)[labels], "index": batch["index"]}

    def conditions_of(self, source: ImageSource, rows: list[int]) -> list[int]:
        own = self.data.source.class_names
        return [int(self.known_as[own.index(source.class_names[source.labels[row]])]) for row in rows]

    def keep(self, run: RunFolder) -> None:
        if self.args.save_corruption_map:
            save_corruption_map(self.tally, self.data.source, run.path / "corruption_map.csv")

    def set_aside(self) -> None:
        pass


class TextBase(Base):
    """A base that draws from captions; `args` with `CaptionCorruptionArguments` and `TextCacheArguments`.

    Attributes:
        model: the base's pipeline, taken apart.
    """

    condition = CAPTIONS

    @classmethod
    def open(cls, args, accelerator: Accelerator) -> "TextBase":
        """With the data, the base's weights and the first stage.

        Raises:
            InputError: one of them cannot be opened, or they do not fit together.
        """
        self = cls()
        self._take(args, open_text_pipeline(**cls._named(args), seed=args.seed), open_first_stage)
        self.data = open_training_data(args, mask_word=mask_word_of(self.model.text))
        find_controls(self.data, args.control_column)
        self._check_latents()
        self._take_schedule()
        rewrite_captions(args, self.data, rewritings_file(args, self.data), accelerator)
        return self

    @classmethod
    def peek(cls, args) -> "TextBase":
        """Without weights, or data that is not here; see [`noisycond.dry_run`]."""
        self = cls()
        self._take(args, peek_text_pipeline(**cls._named(args)), lambda name, seed: peek_first_stage(name))
        self.data = _data_that_is_here(args)
        return self

    @staticmethod
    def _named(args) -> dict:
        return {
            "name": args.pretrained_model_name_or_path,
            "resolution": args.resolution,
            "revision": args.revision,
            "flag": FLAG,
        }

    def _take(self, args, model: TextPipeline, open_other) -> None:
        require_kind(FLAG, model.name, model.family.pipeline.__name__, CAPTIONS, DOING)
        self.args, self.model, self.pipeline = args, model, model.pipeline
        self.unet, self.first_stage = model.backbone.model, model.first_stage
        if args.pretrained_vae_model_name_or_path is not None:
            self.first_stage = open_other(args.pretrained_vae_model_name_or_path, args.seed)
            if self.pipeline is not None:
                self.pipeline.register_modules(**{model.family.first_stage: self.first_stage.model})
        self.factor = self.first_stage.factor
        self.why_latents = f"first stage of {args.pretrained_vae_model_name_or_path or model.name}"
        self.tally, self.texts, self.null = CaptionTally(), None, None

    @property
    def facts(self) -> dict:
        text = self.model.text
        return {
            "base": [self.unet_hash, *(state_hash(each) for each in text.encoders)],
            "tokens": reading(text),
        }

    def sizes(self) -> dict[str, str]:
        weights = sum(value.numel() for encoder in self.model.text.encoders for value in encoder.parameters())
        return {"text encoder": f"{weights:,} parameters, frozen"}

    def encoder(self) -> nn.Module:
        text = self.model.text
        text.embedding_dropout, text.seed = self.args.embedding_dropout, self.args.seed
        return text

    def evaluation(self) -> TrainingEvaluation:
        controls = self._evaluation_controls(of_captions=True)
        return TrainingEvaluation(self.args, prompts=controls.prompts, controls=controls)

    def batches(self, accelerator: Accelerator) -> Batches:
        text = self.model.text
        self.first_stage.to(accelerator.device)
        if self.args.cache_text_embeddings:
            self.texts = cache_texts(self.args, self.data, text, accelerator)
        reader = self.texts or text
        self.null = reader.null()
        return open_batches(self.args, self.data, accelerator, self.first_stage, reader.encode)

    def conditions(self, batch: dict, keys: torch.Tensor) -> dict:
        return text_conditions(self.args, self.tally, self.null, batch, keys)

    def true_conditions(self, batch: dict) -> dict:
        condition = {"is_null": torch.zeros_like(batch["index"], dtype=torch.bool), "index": batch["index"]}
        return condition | {name: batch[name] for name in self.null}

    def conditions_of(self, source: ImageSource, rows: list[int]) -> list[str]:
        captions = source.captions(self.args.caption_column)
        return [next(filter(None, captions[row]), "") for row in rows]

    def keep(self, run: RunFolder) -> None:
        keep_captions(self.args, self.data, run)

    def set_aside(self) -> None:
        self.model.text.park_again()


BASES: dict[str, type[Base]] = {LABELS: ClassBase, CAPTIONS: TextBase}
