"""The loops that `train_step.py` sets beside each other: `noisycond.trainer.fit` as a script calls it, and bare
PyTorch loops of the same model, batch and optimizer.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_class_cond
import train_text_to_image_corrupt as train_text
from noisycond import LabelCorruption, hardware, randomness, trainer
from noisycond.arguments import LoopArguments, parse_arguments
from noisycond.captions import CaptionTally
from noisycond.data.batches import Batches
from noisycond.data.digit_captions import digit_prompts
from noisycond.data.latent_cache import CachedLatents
from noisycond.data.opening import TrainingData, open_batches, open_training_data
from noisycond.denoisers import ConditionalDenoiser, find_denoiser, find_text_denoiser, open_text_encoder
from noisycond.denoisers.dit import DiTBackbone
from noisycond.denoisers.presets import Preset
from noisycond.denoisers.text import KNOWN_CONFIGS, LDM_MAX_LENGTH
from noisycond.first_stage import FirstStage, open_first_stage
from noisycond.noise_schedule import build_objective
from noisycond.objective import DiffusionObjective
from noisycond.randomness import Purpose
from noisycond.run_folder import RunFolder
from noisycond.text_conditional import cache_texts, mask_word_of, open_text_model
from noisycond.training_state import ComputeLoss, Tally


Pair = tuple[float, float]  # seconds of a step of the plain bare loop, and of the step beside it
WARM_UP = 5  # pairs of steps that are not counted
STORED = 256  # examples that lie in memory
CORRUPTION = 0.025  # η of the fits


class Row(NamedTuple):
    """A row of the table: what measures its steps, and what counts the floating-point operations of one."""

    measure: Callable[[], list[Pair]]
    operations: Callable[[], int]


class Training(NamedTuple):
    """What a script gives to `fit`."""

    denoiser: ConditionalDenoiser
    data: TrainingData
    batches: Batches
    compute_loss: ComputeLoss
    tally: Tally


class Subject(NamedTuple):
    """A model without perturbation, and what it is trained on in memory.

    Attributes:
        denoiser: in train mode. objective: its noise schedule. conditions: each [STORED, ...].
    """

    denoiser: ConditionalDenoiser
    objective: DiffusionObjective
    conditions: dict[str, torch.Tensor]


class Bench:
    """The setting that all loops share: model, batch, optimizer, precision. A subclass knows a script.

    Presets that are no miniatures have latents from memory in the cache's place, on the images of the digits.
    """

    arguments: type[LoopArguments]
    recipe: str

    def __init__(self, options: argparse.Namespace, preset: Preset):
        self.options, self.preset, self.device = options, preset, torch.device(options.device)
        self.size = options.resolution // preset.factor
        shape = (STORED, preset.latent_channels, self.size, self.size)
        self.latents = torch.randn(shape, device=self.device)
        self.scratch = tempfile.TemporaryDirectory()

    def describe(self) -> str:
        """The model and what it reads, in words."""
        return f"{self.options.denoiser}, latents {self.preset.latent_channels}×{self.size}×{self.size}"

    def rows(self) -> dict[str, Row]:
        """What is measured, by name; the plain bare loop comes first."""
        raise NotImplementedError

    def subject(self, *what: str) -> Subject:
        """The model of a bare loop, with the same weights every time."""
        raise NotImplementedError

    def open(self, args: LoopArguments, accelerator: Accelerator) -> Training:
        """As the script does it."""
        raise NotImplementedError

    def flags(self, **others) -> dict[str, object]:
        """The script's flags: those of the options, and others."""
        options = self.options
        flags = {
            "output_dir": self.scratch.name,
            "denoiser": options.denoiser,
            "pretrained_vae_model_name_or_path": "digits-kl" if self.preset.latent_channels == 4 else "digits-vq",
            "resolution": options.resolution,
            "train_batch_size": options.batch_size,
            "max_train_steps": options.steps + 1,
            "logging_steps": 1,
            "checkpointing_steps": 0,
            "cep_gamma": 1.0,
            "mixed_precision": options.mixed_precision,
            "torch_compile": options.torch_compile,
        }
        if options.synthetic:
            flags |= {"cache_latents": False, "max_train_samples": STORED}
        flags |= others
        # The recipes cache latents.
        return flags | ({"latent_cache_dir": self.scratch.name} if flags.get("cache_latents", True) else {})

    def args(self, **others) -> LoopArguments:
        """The script's arguments of these flags."""
        words = [word for name, value in self.flags(**others).items() for word in (f"--{name}", str(value))]
        return parse_arguments(self.arguments, words, self.recipe)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, step: Callable[[], object]) -> float:
        start = self.clock()
        step()
        return self.clock() - start

    def bare(self, *what: str, keyed: bool = False) -> Iterator[None]:
        """A bare loop of a [`subject`]; `keyed` draws with Philox."""
        denoiser, objective, conditions = self.subject(*what)

        def predict(noisy: torch.Tensor, timesteps: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            return denoiser(noisy, timesteps, {name: value[chosen] for name, value in conditions.items()})

        return self.loop(denoiser, objective, predict, keyed)

    def loop(self, model: torch.nn.Module, objective: DiffusionObjective, predict, keyed: bool = False):
        """A bare loop, a step for each `next`; `predict(noisy, timesteps, chosen)`, of chosen examples, int64 [B]."""
        options, channels = self.options, self.preset.latent_channels
        alphas = objective.alphas_cumprod.float().to(self.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.mixed_precision)
        if options.torch_compile:
            model.compile()
        for step in count():
            chosen = torch.randint(STORED, (options.batch_size,), device=self.device)
            latents = self.latents[chosen]
            if keyed:
                keys = randomness.step_keys(step, torch.arange(options.batch_size, device=self.device))
                examples = objective.noise(latents, keys)
                noisy, timesteps, target = examples.noisy, examples.timesteps, examples.target
                randomness.bernoulli(0, Purpose.CONDITION_DROPOUT, keys, 0.1)
            else:
                timesteps = torch.randint(len(alphas), (options.batch_size,), device=self.device)
                target = torch.randn_like(latents)
                signal = alphas[timesteps].view(-1, 1, 1, 1)
                noisy = signal.sqrt() * latents + (1 - signal).sqrt() * target
            with torch.autocast(self.device.type, precision, enabled=precision is not None):
                prediction = predict(noisy, timesteps, chosen)
            F.mse_loss(prediction[:, :channels].float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    def beside(self, make_loop: Callable[[], Iterator[None]]) -> list[Pair]:
        """Steps of a bare loop, each after one of the plain bare loop."""
        plain, loop = self.bare(), make_loop()
        steps = range(self.options.steps)
        return [(self.timed(lambda: next(plain)), self.timed(lambda: next(loop))) for _ in steps][WARM_UP:]

    def fit(self, **flags) -> list[Pair]:
        """Steps of `fit`, from one call of its loss to the next, each after one of the plain bare loop."""
        plain = self.bare()
        pairs, since = [], None
        with tempfile.TemporaryDirectory() as folder:
            args = self.args(output_dir=folder, **flags)
            accelerator = hardware.make_accelerator(args)
            training = self.open(args, accelerator)

            def compute_loss(denoiser, batch, keys):
                nonlocal since
                own = None if since is None else self.clock() - since
                paired = self.timed(lambda: next(plain))
                if own is not None:
                    pairs.append((paired, own))
                since = self.clock()
                return training.compute_loss(denoiser, batch, keys)

            trainer.announce(args, accelerator, training.data.images, training.denoiser, training.batches)
            trainer.fit(
                training.denoiser,
                training.batches,
                compute_loss,
                args,
                accelerator=accelerator,
                run=RunFolder(folder),
                bad_images=training.data.bad_images,
                tallies={"corruption": training.tally},
            )
            accelerator.end_training()
        return pairs[WARM_UP:]

    def batches(self, args, data: TrainingData, accelerator: Accelerator, first_stage: FirstStage, encode=None):
        """The script's batches; where the first stage is not the preset's, with moments from memory in a cache's
        place."""
        if self.options.synthetic:
            channels = self.preset.latent_channels * (2 if first_stage.is_variational else 1)
            shape = (len(data.images), 1, channels, self.size, self.size)
            moments = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            data = replace(data, images=CachedLatents(data.images, moments, np.ones(len(moments), dtype=bool)))
        return open_batches(args, data, accelerator, first_stage, encode)

    def operations(self, *what: str) -> int:
        """Floating-point operations of one step of a [`subject`], forward and backward, as torch counts them (matrix
        products and attention; a multiply-add is 2)."""
        denoiser, _, conditions = self.subject(*what)
        batch = self.options.batch_size
        with torch.device("meta"):
            noisy = torch.empty(batch, *self.latents.shape[1:])
            places = torch.zeros(batch, dtype=torch.int64)
            condition = {name: value.to("meta")[places] for name, value in conditions.items()}
            with FlopCounterMode(display=False) as counter:
                denoiser.to("meta")(noisy, places, condition).sum().backward()
        return counter.get_total_flops()


class ClassBench(Bench):
    """`train_class_cond.py`."""

    arguments = train_class_cond.ClassCondArguments
    recipe = "digits_dit_mini"

    def __init__(self, options: argparse.Namespace):
        self.source = find_denoiser(options.denoiser)
        super().__init__(options, self.source.preset)
        self.names = [str(label) for label in range(options.num_classes)]

    def rows(self) -> dict[str, Row]:
        measures = {
            "bare loop": lambda: self.beside(self.bare),
            "bare loop, keyed draws": lambda: self.beside(partial(self.bare, keyed=True)),
            "fit, CEP-U": self.fit,
            "fit, no CEP": lambda: self.fit(cep_gamma=0.0),
            "fit, no CEP, average, clipping, log": lambda: self.fit(
                cep_gamma=0.0, use_ema=False, max_grad_norm=0, logging_steps=999
            ),
        }
        if not self.options.synthetic:
            measures["fit, CEP-U, latents not cached"] = lambda: self.fit(cache_latents=False)
        if issubclass(self.preset.backbone, DiTBackbone):
            measures["bare loop, stock diffusers model"] = lambda: self.beside(self.bare_stock)
        return {name: Row(measure, self.operations) for name, measure in measures.items()}

    def subject(self) -> Subject:
        args = self.args(cep_gamma=0.0)
        labels = torch.arange(STORED, device=self.device) % len(self.names)
        objective, _ = build_objective(args, args.denoiser, self.preset)
        return Subject(self.denoiser(args), objective, {"class_labels": labels})

    def denoiser(self, args: train_class_cond.ClassCondArguments) -> ConditionalDenoiser:
        torch.manual_seed(0)
        shape = (self.preset.latent_channels, self.preset.factor)
        return train_class_cond.build(args, self.source, self.names, *shape).to(self.device).train()

    def bare_stock(self) -> Iterator[None]:
        """A bare loop of diffusers' own model, class embedding and all."""
        denoiser, objective, conditions = self.subject()
        config = {**denoiser.backbone.model.config, "num_embeds_ada_norm": len(self.names)}
        model, labels = DiTTransformer2DModel(**config).to(self.device).train(), conditions["class_labels"]

        def predict(noisy: torch.Tensor, timesteps: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            return model(noisy, timesteps, labels[chosen], return_dict=False)[0]

        return self.loop(model, objective, predict)

    def open(self, args: train_class_cond.ClassCondArguments, accelerator: Accelerator) -> Training:
        first_stage = open_first_stage(args.pretrained_vae_model_name_or_path).to(self.device)
        objective, _ = build_objective(args, args.denoiser, self.preset)
        data = open_training_data(args)
        batches = self.batches(args, data, accelerator, first_stage)
        corruption, null_class = LabelCorruption(CORRUPTION, len(self.names)), len(self.names)
        loss = train_class_cond.make_compute_loss(args, first_stage, objective, corruption, null_class)
        return Training(self.denoiser(args), data, batches, loss, corruption)


class TextBench(Bench):
    """`train_text_to_image_corrupt.py`, from scratch, on the captions of the digits. Of a text encoder whose published
    sizes are known (bert-base-uncased) the sizes are taken, with weights at random and the miniature's tokenizer."""

    arguments = train_text.TextToImageArguments
    recipe = "digits_text"
    # How the text encoder takes part, and the script's flags for it.
    TEXTS = {
        "cached": {"cache_text_embeddings": True},
        "frozen": {"train_text_encoder": False},
        "trained": {"train_text_encoder": True},
    }

    def __init__(self, options: argparse.Namespace):
        super().__init__(options, find_text_denoiser(options.denoiser).preset)
        self.text_encoder = self.preset.text_encoder
        if self.text_encoder in KNOWN_CONFIGS:
            self.text_encoder = self._of_published_sizes(self.text_encoder)
        self.text = open_text_encoder(self.text_encoder, trained=False)

    def describe(self) -> str:
        return f"{super().describe()}, texts {self.text.max_length}×{self.text.dim}"

    def rows(self) -> dict[str, Row]:
        cached, frozen, trained = (partial(self.operations, texts) for texts in self.TEXTS)
        return {
            "bare loop, texts cached": Row(lambda: self.beside(self.bare), cached),
            "fit, CEP-U, texts cached": Row(partial(self.fit, "cached"), cached),
            "fit, no CEP, texts cached": Row(partial(self.fit, "cached", cep_gamma=0.0), cached),
            "fit, CEP-U, texts encoded at every step": Row(partial(self.fit, "frozen"), frozen),
            "bare loop, text encoder trained along": Row(lambda: self.beside(partial(self.bare, "trained")), trained),
            "fit, CEP-U, text encoder trained along": Row(partial(self.fit, "trained"), trained),
        }

    def fit(self, texts: str, **flags) -> list[Pair]:
        return super().fit(**self.TEXTS[texts], **flags)

    def flags(self, **others) -> dict[str, object]:
        own = {"text_encoder": self.text_encoder, "corruption_ratio": CORRUPTION}
        if others.get("cache_text_embeddings"):
            own["text_cache_dir"] = self.scratch.name
        return super().flags(**own, **others)

    def subject(self, texts: str = "cached") -> Subject:
        args = self.args(**self.TEXTS[texts], cep_gamma=0.0)
        model, objective, denoiser = self._model(args)
        if texts == "cached":
            denoiser.encoder.park()
            conditions = {"sequence": torch.randn(STORED, self.text.max_length, self.text.dim)}
        else:
            conditions = model.text.encode([prompt for prompt, _ in islice(cycle(digit_prompts("seen")), STORED)])
            del conditions["is_truncated"]
        return Subject(denoiser, objective, {name: value.to(self.device) for name, value in conditions.items()})

    def open(self, args: train_text.TextToImageArguments, accelerator: Accelerator) -> Training:
        model, objective, denoiser = self._model(args)
        data = open_training_data(args, mask_word=mask_word_of(model.text))
        first_stage = model.first_stage.to(self.device)
        texts = cache_texts(args, data, denoiser.encoder, accelerator) if args.cache_text_embeddings else model.text
        batches, tally = self.batches(args, data, accelerator, first_stage, texts.encode), CaptionTally()
        loss = train_text.make_compute_loss(args, first_stage, objective, tally, texts.null())
        return Training(denoiser, data, batches, loss, tally)

    def _model(self, args: train_text.TextToImageArguments):
        torch.manual_seed(0)
        model, objective, _ = open_text_model(args)
        return model, objective, train_text.build(args, model).to(self.device).train()

    def _of_published_sizes(self, name: str) -> str:
        """A folder that is opened as a text encoder of these sizes."""
        folder = str(Path(self.scratch.name) / "text_encoder")
        tokenizer = open_text_encoder(
            find_text_denoiser("ldm-mini-text").preset.text_encoder, False
        ).encode.tokenizers[0]
        tokenizer.model_max_length = LDM_MAX_LENGTH
        tokenizer.save_pretrained(folder)
        KNOWN_CONFIGS[name]().save_pretrained(folder)
        return folder
