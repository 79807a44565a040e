"""What the scripts that train on captions share: flags of the sample grids, the model from scratch or of an existing
pipeline, the condition of a batch, what a run leaves behind, and what a text-to-image teacher teaches.
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline, LatentConsistencyModelPipeline, StableDiffusionPipeline

from noisycond import dry_run, randomness, results, teachers
from noisycond.arguments import ValidationArguments, flag
from noisycond.captions import MASK_WORD, CaptionTally
from noisycond.cards import UNKNOWN_PLACE, loading_code, lora_loading_code, public_name, text_to_image_card
from noisycond.condition_kinds import CAPTIONS, require_kind
from noisycond.data.batches import Batches
from noisycond.data.corruption_map import save_caption_map
from noisycond.data.digit_captions import digit_prompts
from noisycond.data.opening import TrainingData, open_batches, open_training_data
from noisycond.data.rewriting import rewrite_captions, rewritings_file
from noisycond.data.streams import RawExample, StreamSource, require_ids
from noisycond.data.text_cache import CachedTexts, default_cache_dir, open_text_cache
from noisycond.denoisers import ConditionalDenoiser, build_text_denoiser, find_text_denoiser
from noisycond.denoisers.class_pipelines import check_latents
from noisycond.denoisers.presets import DenoiserSource, Preset
from noisycond.denoisers.text import TextEncoder, open_text_encoder, peek_text_encoder
from noisycond.denoisers.text_pipelines import TextPipeline, open_text_pipeline, peek_text_pipeline
from noisycond.denoisers.unet import UNetBackbone
from noisycond.errors import require
from noisycond.evaluation.in_training import TrainingEvaluation, evaluation_prompts
from noisycond.export import export_pipeline, sampling_scheduler
from noisycond.first_stage import FirstStage, open_first_stage, peek_first_stage, state_hash, tensors_hash
from noisycond.lora import add_lora, how_to_load, save_lora
from noisycond.noise_schedule import build_objective
from noisycond.objective import DiffusionObjective
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.pipelines import LDMTextToImagePipeline
from noisycond.randomness import Purpose
from noisycond.results import LORA, draw_grid, leave_results
from noisycond.run_folder import RunFolder
from noisycond.trainer import FitResult
from noisycond.training_state import frozen_names


SHOWN = 10  # prompts of a sample grid that nobody chose


@dataclass
class PromptGridArguments(ValidationArguments):
    validation_prompts: list[str] = flag(
        [],
        "Prompts of the sample grids, a row each; the default are ten, of digits in phrasings that no caption has, "
        "else the first captions.",
    )
    num_validation_images: int = flag(4, "Images per prompt in the sample grids.")

    def __post_init__(self):
        super().__post_init__()
        require(
            self.num_validation_images > 0,
            f"--num_validation_images is {self.num_validation_images}, but it must be positive.",
        )
        require(all(self.validation_prompts), "--validation_prompts: one of them is empty.")


def grid_prompts(args, data: TrainingData) -> list[str]:
    """The prompts of the sample grids: those that were asked for, or ten; see [`PromptGridArguments`]."""
    if args.validation_prompts:
        return list(args.validation_prompts)
    if args.dataset_name == "digits":
        unseen = digit_prompts("unseen")  # one phrasing after the other, each of the ten digits
        phrasings = len(unseen) // 10
        return [unseen[10 * (2 * digit % phrasings) + digit][0] for digit in range(10)]
    if isinstance(data.source, StreamSource):
        first = (item for shard in range(len(data.source.shards)) for item in data.source.peek(shard, SHOWN))
        captioned = (raw for raw in first if isinstance(raw, RawExample) and any(raw.captions))
        return [next(filter(None, raw.captions)) for raw in islice(captioned, SHOWN)]
    first = torch.arange(min(SHOWN, len(data.captions)))
    return data.captions.true_texts(first, torch.zeros_like(first))


@dataclass
class FromScratch:
    """A denoiser that attends to text, to be trained from its initial weights, with what it stands between; the twin
    of [`noisycond.denoisers.text_pipelines.TextPipeline`].

    Attributes:
        name: as `--denoiser` names it. source: architecture and noise schedule. text: the text encoder.
        latent_channels, factor: of the first stage. resolution: of the images.
        first_stage: the autoencoder; None of one that is not on this machine (dry run).
        scheduler: what the pipeline samples with; None where nothing is sampled (dry run).
    """

    name: str
    source: DenoiserSource
    text: TextEncoder
    latent_channels: int
    factor: int
    resolution: int
    first_stage: FirstStage | None
    scheduler: DDIMScheduler | None = None

    @property
    def preset(self) -> Preset:
        return self.source.preset

    def denoiser(self, **options) -> ConditionalDenoiser:
        """What is trained; the options are those of [`noisycond.denoisers.build_text_denoiser`].

        Raises:
            InputError: latents, text encoder and architecture do not fit together.
        """
        require(
            self.resolution % self.factor == 0,
            f"--resolution is {self.resolution}, but must be a multiple of the first stage's factor {self.factor}.",
        )
        size = self.resolution // self.factor
        return build_text_denoiser(
            self.source, self.text, latent_channels=self.latent_channels, latent_size=size, **options
        )

    def assemble(self, denoiser: ConditionalDenoiser) -> LDMTextToImagePipeline:
        """The pipeline with the weights that the denoiser has now, in copies, on the first stage's device."""
        bert = copy.deepcopy(denoiser.encoder.encoders[0]).float().eval().requires_grad_(False)
        unet, tokenizer = denoiser.backbone.export_model(), denoiser.encoder.encode.tokenizers[0]
        pipeline = LDMTextToImagePipeline(self.first_stage.model, bert, tokenizer, unet, self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.first_stage.model.device)


def open_text_model(args) -> tuple[TextPipeline | FromScratch, DiffusionObjective, dict]:
    """The model that the flags name, with its text encoder and first stage; its objective; and its noise schedule by
    the names of diffusers' schedulers.

    Args:
        args: with [`noisycond.denoisers.text_options.TextModelArguments`].

    Raises:
        InputError: a part cannot be opened, or flags contradict what an existing pipeline was trained with.
    """
    existing = args.pretrained_model_name_or_path
    if existing is None:
        require(args.pretrained_vae_model_name_or_path is not None, "--pretrained_vae_model_name_or_path is needed.")
        source = find_text_denoiser(args.denoiser)
        text = open_text_encoder(text_encoder_name(args, source.preset), args.train_text_encoder)
        first_stage = open_first_stage(args.pretrained_vae_model_name_or_path, args.seed)
        objective, noise_schedule = build_objective(args, args.denoiser, source.preset)
        shape = (first_stage.latent_channels, first_stage.factor, args.resolution)
        scheduler = sampling_scheduler(objective, noise_schedule)
        model = FromScratch(args.denoiser, source, text, *shape, first_stage, scheduler)
        return model, objective, noise_schedule
    opened = open_text_pipeline(
        existing,
        resolution=args.resolution,
        train_text_encoder=args.train_text_encoder,
        revision=args.revision,
        variant=args.variant,
        seed=args.seed,
    )
    require_its_schedule(args, opened)
    return opened, *build_objective(args, existing, opened.preset)


def peek_text_model(args) -> tuple[TextPipeline | FromScratch, str, str]:
    """As [`open_text_model`], from configurations on this machine alone, on the meta device; and where the sizes of
    the text encoder and of the latents come from, in words.

    Raises:
        InputError: as there, or a part is not on this machine whose sizes are not known otherwise.
    """
    existing = args.pretrained_model_name_or_path
    if existing is None:
        source = find_text_denoiser(args.denoiser)
        text, of_text = peek_text_encoder(text_encoder_name(args, source.preset), args.train_text_encoder)
        first_stage, channels, factor, of_latents = dry_run.latents_of(args, source.preset)
        model = FromScratch(args.denoiser, source, text, channels, factor, args.resolution, first_stage)
        return model, of_text, of_latents
    opened = peek_text_pipeline(
        existing,
        resolution=args.resolution,
        train_text_encoder=args.train_text_encoder,
        revision=args.revision,
    )
    require_its_schedule(args, opened)
    return opened, "the pipeline's", f"first stage of {existing}"


def text_encoder_name(args, preset: Preset) -> str:
    """The text encoder to train with from scratch.

    Raises:
        InputError: neither flag nor preset names one.
    """
    name = args.text_encoder or preset.text_encoder
    require(name is not None, f"--text_encoder is needed: {args.denoiser} does not say which it attends to.")
    return name


def mask_word_of(text: TextEncoder) -> str:
    """What stands for a masked word: the tokenizer's own sign where it has one."""
    return text.encode.tokenizers[0].mask_token or MASK_WORD


def require_its_schedule(args, opened: TextPipeline) -> None:
    """Raises InputError where the flags ask for another noise schedule than the pipeline's, whose scheduler is what is
    exported."""
    preset = opened.preset
    for name in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps"):
        asked, own = getattr(args, name), getattr(preset, name)
        given = asked is not None and asked != own
        require(
            not given,
            f"--{name} is {asked}, but {opened.name} was trained with {own}, which its scheduler keeps; leave it off"
            + (f" or say --{name} {own}." if name == "num_train_timesteps" else "."),
        )


def build(args, model: TextPipeline | FromScratch) -> ConditionalDenoiser:
    """What is trained, as the flags ask for it.

    Raises:
        InputError: the parts do not fit together, or there is nothing that LoRA could adapt.
    """
    denoiser = model.denoiser(
        perturbation=ConditionEmbeddingPerturbation(args.cep_gamma, args.cep_type, args.seed),
        fixed_perturbation=args.cep_mode == "fixed",
        perturb_null=args.cep_perturb_null,
        embedding_dropout=args.embedding_dropout,
        seed=args.seed,
    )
    if args.use_lora:
        add_lora(denoiser, args.rank, args.lora_alpha, args.lora_target_modules)
    if args.gradient_checkpointing:
        denoiser.backbone.model.enable_gradient_checkpointing()
    return denoiser


def frozen_fingerprint(denoiser: ConditionalDenoiser) -> str:
    """A hash of the weights that are not trained, which no checkpoint holds: a resumed run must have the same."""
    state = denoiser.state_dict()
    return tensors_hash({name: state[name] for name in frozen_names(denoiser)})


def text_conditions(
    args, tally: CaptionTally, null: Mapping[str, torch.Tensor], batch: dict, keys: torch.Tensor
) -> dict:
    """The conditions of a batch of B captioned examples, of which some lose theirs (--conditioning_dropout_prob).

    Args:
        tally: counts the batch. null: the empty prompt as the captions are encoded, each [1, ...].
        keys [B]: int64, this step's keys.

    Returns:
        What [`noisycond.denoisers.ConditionalDenoiser`] takes: tokens or embeddings, `is_null` bool [B], and `index`
        int64 [B].
    """
    tally.count(batch)
    return _conditions_of(args, null, batch, keys)


def _conditions_of(args, null: Mapping[str, torch.Tensor], batch: dict, keys: torch.Tensor, prefix: str = "") -> dict:
    """The same of what the batch has by names after this prefix; the same examples lose their condition."""
    dropped = randomness.bernoulli(args.seed, Purpose.CONDITION_DROPOUT, keys, args.conditioning_dropout_prob)
    condition = {"is_null": dropped, "index": batch["index"]}
    for name, empty in null.items():
        own = batch[prefix + name]
        condition[name] = torch.where(dropped.view(-1, *[1] * (own.dim() - 1)), empty.to(own), own)
    return condition


def cache_texts(
    args, data: TrainingData, text: TextEncoder, accelerator: Accelerator, with_true: bool = False
) -> CachedTexts:
    """Encodes every caption that can come up, once, and puts the text encoder aside; see
    [`noisycond.data.text_cache.open_text_cache`].

    Args:
        with_true: see [`noisycond.data.captions.Captions.all_texts`].

    Raises:
        InputError: there is no end of captions, or no space for them.
    """
    require(
        not args.streaming,
        "--cache_text_embeddings does not go with --streaming or --train_shards: it would have to know every caption; "
        "leave it off.",
    )
    folder = Path(args.text_cache_dir) if args.text_cache_dir else default_cache_dir()
    cached = open_text_cache(data.captions.all_texts(with_true), text, folder, accelerator)
    text.park()
    return cached


def keep_captions(args, data: TrainingData, run: RunFolder) -> None:
    """Writes into the run's folder what it keeps of its captions: rewritings that a model made, and the corruption
    map where that was asked for."""
    if args.caption_rewriter is not None:
        shutil.copyfile(rewritings_file(args, data), run.path / "rewritten_captions.jsonl")
    if args.save_corruption_map:
        save_caption_map(data.captions, run.path / "corruption_map.csv")


def looking(
    model: TextPipeline | FromScratch,
    denoiser: ConditionalDenoiser,
    action: Callable[[DiffusionPipeline, int], dict | None],
) -> Callable[[int], dict | None]:
    """As [`noisycond.results.looking`]. Text encoders that were put aside, which the pipeline takes to its device, are
    put aside again."""
    return results.looking(lambda: model.assemble(denoiser), action, denoiser.encoder.park_again)


def draw_samples(pipeline: DiffusionPipeline, args, prompts: list[str], path: Path) -> None:
    """Draws a sample grid, a row per prompt, and saves it as a PNG."""
    per_prompt = args.num_validation_images
    draw_grid(pipeline, [prompt for prompt in prompts for _ in range(per_prompt)], per_prompt, args, path)


def export(
    pipeline: DiffusionPipeline,
    denoiser: ConditionalDenoiser,
    args,
    run: RunFolder,
    prompts: list[str],
    result: FitResult,
    repo_id: str | None,
    evaluation: TrainingEvaluation | None,
) -> None:
    """Writes the last sample grid and what else a run leaves behind, a pipeline or LoRA weights for one; see
    [`noisycond.results.leave_results`]."""
    draw_samples(pipeline, args, prompts, run.samples / "final.png")
    card = text_to_image_card(pipeline, args, prompts, result, _code(pipeline, args, prompts, repo_id))

    def write() -> None:
        if args.use_lora:
            save_lora(pipeline, denoiser, run.path)
            card.save(run.path / "README.md")
        else:
            export_pipeline(pipeline, run.path, None, card)

    leave_results(
        pipeline,
        args,
        run,
        result,
        write=write,
        how_to_load=_code(pipeline, args, prompts, run.path),
        evaluation=evaluation,
        repo_id=repo_id,
        **LORA if args.use_lora else {},
    )


def _code(pipeline: DiffusionPipeline, args, prompts: list[str], location: str | Path | None) -> str:
    """How to load what was trained, with diffusers alone."""
    place, condition = location or UNKNOWN_PLACE, f'prompt="{prompts[0]}"'
    if not args.use_lora:
        return loading_code(pipeline, place, condition=condition)
    base = args.pretrained_model_name_or_path
    base = base if isinstance(location, Path) else public_name(base)  # a card is read elsewhere
    return lora_loading_code(pipeline, base, how_to_load(pipeline, place), condition)


class TextTeaching(teachers.Teaching):
    """What a text-to-image teacher teaches; `args` with [`PromptGridArguments`], `CaptionCorruptionArguments` and
    `TextCacheArguments`.

    Its text encoder is frozen, and encodes a batch once for student, target and teacher.

    Attributes:
        model: the teacher's pipeline, taken apart.
        with_true: whether batches bring the examples' own captions beside the corrupted ones, for the teacher.
    """

    @classmethod
    def open(cls, args, accelerator: Accelerator) -> "TextTeaching":
        """With the data, the teacher's weights and the first stage.

        Raises:
            InputError: one of them cannot be opened, or they do not fit together.
        """
        self = cls()
        self._take(args, open_text_pipeline(**cls._named(args), seed=args.seed), open_first_stage)
        self.data = open_training_data(args, mask_word=mask_word_of(self.model.text))
        if args.streaming and args.cep_gamma > 0 and args.cep_mode == "fixed":
            require_ids(self.data.source, "--cep_mode fixed")
        self.prompts = grid_prompts(args, self.data)
        rewrite_captions(args, self.data, rewritings_file(args, self.data), accelerator)
        return self

    @classmethod
    def peek(cls, args) -> "TextTeaching":
        """Without weights, or data that is not here; see [`noisycond.dry_run`]."""
        self = cls()
        self._take(args, peek_text_pipeline(**cls._named(args)), lambda name, seed: peek_first_stage(name))
        self.data = dry_run.open_what_is_here(args)
        return self

    @staticmethod
    def _named(args) -> dict:
        return {
            "name": args.pretrained_teacher_model,
            "resolution": args.resolution,
            "revision": args.teacher_revision,
            "flag": teachers.FLAG,
        }

    def _take(self, args, model: TextPipeline, open_other: Callable[[str, int], FirstStage]) -> None:
        require_kind(teachers.FLAG, model.name, model.family.pipeline.__name__, CAPTIONS, teachers.DOING)
        self.args, self.model, self.first_stage = args, model, model.first_stage
        self.with_true = args.corruption_ratio > 0 and args.teacher_condition == "clean"
        if args.pretrained_vae_model_name_or_path is not None:
            self.first_stage = open_other(args.pretrained_vae_model_name_or_path, args.seed)
            check_latents(teachers.FLAG, model.name, model.backbone.model.config, self.first_stage, args.resolution)
        why = f"first stage of {args.pretrained_vae_model_name_or_path or model.name}"
        self.latents = teachers.Latents(self.first_stage.latent_channels, self.first_stage.factor, why)
        self.prediction_type = model.preset.prediction_type
        teachers.require_prediction_type(model.name, self.prediction_type)
        self.scheduler = teachers.lcm_scheduler(
            model.scheduler_config, args.num_ddim_timesteps, args.timestep_scaling_factor
        )
        self.teacher = ConditionalDenoiser(self._reader(), model.backbone).eval().requires_grad_(False)
        self.tally, self.texts = CaptionTally(), None

    def _reader(self) -> TextEncoder:
        """What stands in a denoiser for the text encoder: it hands on embeddings."""
        return TextEncoder([], None, self.model.name)

    @property
    def facts(self) -> dict:
        return {"teacher": state_hash(self.teacher), "text_encoder": [state_hash(each) for each in self.encoders]}

    @property
    def encoders(self) -> tuple:
        return self.model.text.encoders

    def sizes(self) -> dict[str, str]:
        weights = sum(parameter.numel() for encoder in self.encoders for parameter in encoder.parameters())
        return {"text encoder": f"{weights:,} parameters, frozen, {4 * weights / 1e9:.3f} GB beside the memory below"}

    def copied(self, time_cond_proj_dim: int | None, **options) -> ConditionalDenoiser:
        unet = teachers.copied_unet(self.teacher.backbone.model, self.latent_size, time_cond_proj_dim)
        reader = self._reader()
        reader.embedding_dropout, reader.seed = self.args.embedding_dropout, self.args.seed
        return ConditionalDenoiser(reader, UNetBackbone.around(unet), **options)

    def evaluation(self) -> TrainingEvaluation:
        return TrainingEvaluation(self.args, prompts=evaluation_prompts(self.args))

    def batches(self, accelerator: Accelerator) -> Batches:
        text, device = self.model.text, accelerator.device
        self.first_stage.to(device)
        self.teacher.to(device)
        if self.args.cache_text_embeddings:
            self.texts = cache_texts(self.args, self.data, text, accelerator, self.with_true)
            self.null = self.texts.null()
        else:
            text.to(device)
            self.null = self._embedded(text.null())
        encode = (self.texts or text).encode
        return open_batches(self.args, self.data, accelerator, self.first_stage, encode, self.with_true)

    def keep(self, run: RunFolder) -> None:
        keep_captions(self.args, self.data, run)

    @torch.no_grad()
    def _embedded(self, tokens: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
        """Embeddings of tokens that stand by names after this prefix, by such names, in float32 as a cache has them;
        nothing where they are embeddings already."""
        if self.texts is not None:
            return {}
        text = self.model.text
        with torch.autocast(text.device.type, enabled=False):
            named = {name.removeprefix(prefix): each for name, each in tokens.items() if name.startswith(prefix)}
            embedding = text.embed(named)
        return {f"{prefix}sequence": embedding.sequence}

    def conditions(self, batch: dict, keys: torch.Tensor) -> tuple[dict, dict, dict]:
        batch = batch | self._embedded(batch)
        student = teacher = text_conditions(self.args, self.tally, self.null, batch, keys)
        if self.with_true:
            batch = batch | self._embedded(batch, "true_")
            teacher = _conditions_of(self.args, self.null, batch, keys, "true_")
        nothing = {"is_null": torch.ones_like(student["is_null"])}
        null = {name: value.to(student[name]).expand_as(student[name]) for name, value in self.null.items()}
        return student, teacher, student | nothing | null

    def pipeline(self, student: ConditionalDenoiser) -> DiffusionPipeline:
        pipeline = self._with_adapters(student) if self.args.use_lora else self._distilled(student)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.first_stage.model.device)

    def _with_adapters(self, student: ConditionalDenoiser) -> DiffusionPipeline:
        pipeline = self.model.assemble(student)
        pipeline.register_modules(scheduler=self.scheduler)
        return pipeline

    def _distilled(self, student: ConditionalDenoiser) -> LatentConsistencyModelPipeline | LDMTextToImagePipeline:
        theirs, unet = self.model.pipeline, student.backbone.export_model()
        if not isinstance(theirs, StableDiffusionPipeline):
            return LDMTextToImagePipeline(self.first_stage.model, theirs.bert, theirs.tokenizer, unet, self.scheduler)
        parts = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
        return LatentConsistencyModelPipeline(
            vae=self.first_stage.model,
            unet=unet,
            scheduler=self.scheduler,
            requires_safety_checker=theirs.config.requires_safety_checker,
            **{name: getattr(theirs, name) for name in parts},
        )

    def draw(self, pipeline: DiffusionPipeline, path: Path) -> None:
        draw_samples(pipeline, self.args, self.prompts, path)
