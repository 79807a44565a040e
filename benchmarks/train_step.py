#!/usr/bin/env python
"""What the training loop costs: `noisycond.trainer.fit` beside a bare PyTorch loop of the same model, batch and
optimizer, a step of one after a step of the other; steps per second as a share of the bare loop's.

    python benchmarks/train_step.py                                               # dit-mini, batch 64, CPU
    python benchmarks/train_step.py --denoiser dit-xl-2 --device cuda --batch_size 128 --mixed_precision bf16 \
        --torch_compile

The bare loop takes its latents from memory, draws noise and timesteps from torch's generator, and does nothing else:
no perturbation, clipping, average, log or progress bar. `fit` does all of that, logs every step to a file and to
tensorboard, and reads its latents through the data loader. On a GPU the stock `DiTTransformer2DModel` takes part in a
bare loop of its own, and images per second are set against the card's measured bf16 matrix rate.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_class_cond as script
from noisycond import LabelCorruption, hardware, randomness, trainer
from noisycond.arguments import parse_arguments
from noisycond.data.opening import open_batches, open_training_data
from noisycond.denoisers import build_denoiser, find_denoiser
from noisycond.denoisers.dit import DiTBackbone
from noisycond.first_stage import open_first_stage
from noisycond.objective import DiffusionObjective, make_betas
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.randomness import Purpose
from noisycond.run_folder import RunFolder


Pair = tuple[float, float]  # seconds of a step of the bare loop, and of the step beside it
WARM_UP = 5  # pairs of steps that are not counted


class Bench:
    """The setting that all loops share: model, batch, optimizer, precision."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.source = find_denoiser(options.denoiser)
        preset = self.source.preset
        self.channels = preset.latent_channels
        self.size = options.resolution // preset.factor
        self.names = [str(label) for label in range(options.num_classes)]
        self.betas = make_betas(preset.beta_schedule, preset.beta_start, preset.beta_end, 1000)
        self.latents = torch.randn(256, self.channels, self.size, self.size, device=self.device)
        self.labels = torch.arange(256, device=self.device) % options.num_classes

    def denoiser(self, gamma: float = 0.0) -> torch.nn.Module:
        torch.manual_seed(0)
        cep = ConditionEmbeddingPerturbation(gamma)
        shape = {"latent_channels": self.channels, "latent_size": self.size, "class_names": self.names}
        return build_denoiser(self.source, perturbation=cep, **shape).to(self.device).train()

    def objective(self) -> DiffusionObjective:
        return DiffusionObjective(self.betas, learned_variance=self.source.preset.learned_variance)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def bare(self, model: torch.nn.Module, predict, keyed: bool = False) -> Iterator[None]:
        """A bare loop, a step for each `next`; `predict(noisy, timesteps, labels)`. `keyed` draws with Philox."""
        options, objective = self.options, self.objective()
        alphas = objective.alphas_cumprod.float().to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.mixed_precision)
        if options.torch_compile:
            model.compile()
        for step in count():
            chosen = torch.randint(len(self.latents), (options.batch_size,), device=self.device)
            latents, labels = self.latents[chosen], self.labels[chosen]
            if keyed:
                keys = randomness.step_keys(step, torch.arange(options.batch_size, device=self.device))
                examples = objective.noise(latents, keys)
                noisy, timesteps, noise = examples.noisy, examples.timesteps, examples.target
                randomness.bernoulli(0, Purpose.CONDITION_DROPOUT, keys, 0.1)
            else:
                timesteps = torch.randint(1000, (options.batch_size,), device=self.device)
                noise = torch.randn_like(latents)
                signal = alphas[timesteps].view(-1, 1, 1, 1)
                noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
            with torch.autocast(self.device.type, precision, enabled=precision is not None):
                prediction = predict(noisy, timesteps, labels)
            F.mse_loss(prediction[:, : self.channels].float(), noise).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    def bare_ours(self, keyed: bool = False) -> Iterator[None]:
        model = self.denoiser()
        return self.bare(model, lambda noisy, t, labels: model(noisy, t, {"class_labels": labels}), keyed)

    def bare_stock(self) -> Iterator[None]:
        config = {**self.denoiser().backbone.model.config, "num_embeds_ada_norm": self.options.num_classes}
        model = DiTTransformer2DModel(**config).to(self.device).train()
        return self.bare(model, lambda noisy, t, labels: model(noisy, t, labels, return_dict=False)[0])

    def timed(self, step) -> float:
        start = self.clock()
        step()
        return self.clock() - start

    def beside(self, loop: Iterator[None]) -> list[Pair]:
        """Steps of a bare loop, each after one of the plain bare loop."""
        bare = self.bare_ours()
        pairs = [(self.timed(lambda: next(bare)), self.timed(lambda: next(loop))) for _ in range(self.options.steps)]
        return pairs[WARM_UP:]

    def fit(self, gamma: float = 1.0, cached: bool = True, **flags) -> list[Pair]:
        """Steps of `fit`, from one call of its loss to the next, each after one of the plain bare loop."""
        options, bare = self.options, self.bare_ours()
        pairs, since = [], None
        with tempfile.TemporaryDirectory() as folder:
            args = parse_arguments(
                script.ClassCondArguments, self._flags(folder, gamma, cached, flags), "digits_dit_mini"
            )
            accelerator = hardware.make_accelerator(args)
            first_stage = open_first_stage(args.pretrained_vae_model_name_or_path).to(self.device)
            data = open_training_data(args)
            batches = open_batches(args, data, accelerator, first_stage)
            if options.synthetic:
                batches.dataset = SyntheticLatents(self.latents.cpu(), self.labels.cpu())
                first_stage = SyntheticFirstStage()
            denoiser = self.denoiser(gamma)
            corruption = LabelCorruption(0.025, options.num_classes)
            loss = script.make_compute_loss(args, first_stage, self.objective(), corruption, options.num_classes)

            def compute_loss(model, batch, keys):
                nonlocal since
                own = None if since is None else self.clock() - since
                paired = self.timed(lambda: next(bare))
                if own is not None:
                    pairs.append((paired, own))
                since = self.clock()
                return loss(model, batch, keys)

            run = RunFolder(folder)
            trainer.announce(args, accelerator, data.images, denoiser, batches)
            trainer.fit(
                denoiser,
                batches,
                compute_loss,
                args,
                accelerator=accelerator,
                run=run,
                bad_images=data.bad_images,
                tallies={"corruption": corruption},
            )
            accelerator.end_training()
        return pairs[WARM_UP:]

    def _flags(self, folder: str, gamma: float, cached: bool, others: dict) -> list[str]:
        options = self.options
        flags = {
            "output_dir": folder,
            "latent_cache_dir": folder,
            "denoiser": options.denoiser,
            "pretrained_vae_model_name_or_path": "digits-kl" if self.channels == 4 else "digits-vq",
            "train_batch_size": options.batch_size,
            "max_train_steps": options.steps + 1,
            "logging_steps": 1,
            "checkpointing_steps": 0,
            "cep_gamma": gamma,
            "mixed_precision": options.mixed_precision,
            "torch_compile": options.torch_compile,
        }
        if not cached:
            flags |= {"cache_latents": False}
            flags.pop("latent_cache_dir")
        flags |= others
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


class SyntheticLatents(torch.utils.data.Dataset):
    """Latents from memory, asked for as [`noisycond.data.batches`] asks."""

    def __init__(self, latents: torch.Tensor, labels: torch.Tensor):
        self.latents, self.labels = latents, labels.tolist()

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, item):
        index, epoch, position = item
        label = self.labels[index]
        numbers = {"index": index, "epoch": epoch, "position": position, "class_labels": label}
        return numbers | {"moments": self.latents[index]}


class SyntheticFirstStage:
    """Hands the latents on."""

    def latents(self, moments: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return moments


def floating_point_operations(bench: Bench) -> int:
    """Of one step, forward and backward, as torch counts them (matrix products and attention; a multiply-add is 2)."""
    with torch.device("meta"):
        model = build_denoiser(
            bench.source, latent_channels=bench.channels, latent_size=bench.size, class_names=bench.names
        )
        batch = bench.options.batch_size
        noisy = torch.empty(batch, bench.channels, bench.size, bench.size)
        zeros = torch.zeros(batch, dtype=torch.int64)
        counter = FlopCounterMode(display=False)
        with counter:
            model(noisy, zeros, {"class_labels": zeros}).sum().backward()
    return counter.get_total_flops()


def matrix_rate(bench: Bench, size: int = 8192) -> float:
    """Measured bf16 operations per second of a square matrix product."""
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        start = bench.clock()
        a @ b
        times.append(bench.clock() - start)
    return 2 * size**3 / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", default="dit-mini")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--resolution", type=int, help="default: 32 for the miniatures, else 256")
    parser.add_argument("--num_classes", type=int, help="default: 10 for the miniatures, else 1000")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed_precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--steps", type=int, default=45, help="pairs of steps per round, 5 not counted")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.synthetic = not options.denoiser.endswith("-mini")
    options.resolution = options.resolution or (256 if options.synthetic else 32)
    options.num_classes = options.num_classes or (1000 if options.synthetic else 10)

    bench = Bench(options)
    loops = {
        "bare loop": lambda: bench.beside(bench.bare_ours()),
        "bare loop, keyed draws": lambda: bench.beside(bench.bare_ours(keyed=True)),
        "fit, CEP-U": bench.fit,
        "fit, no CEP": lambda: bench.fit(gamma=0.0),
        "fit, no CEP, average, clipping, log": lambda: bench.fit(
            0.0, use_ema=False, max_grad_norm=0, logging_steps=999
        ),
    }
    if not options.synthetic:
        loops["fit, CEP-U, latents not cached"] = lambda: bench.fit(cached=False)
    if issubclass(bench.source.preset.backbone, DiTBackbone):
        loops["bare loop, stock diffusers model"] = lambda: bench.beside(bench.bare_stock())
    pairs: dict[str, list[Pair]] = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, loop in loops.items():
            pairs[name] += loop()
    report(bench, pairs)


def report(bench: Bench, pairs: dict[str, list[Pair]]) -> None:
    options = bench.options
    torch_threads = f", {torch.get_num_threads()} threads" if options.device == "cpu" else ""
    print(
        f"\n{options.denoiser}, batch {options.batch_size}, latents {bench.channels}×{bench.size}×{bench.size}, "
        f"{options.device}{torch_threads}, precision {options.mixed_precision}, compiled: {options.torch_compile}; "
        f"{options.rounds} rounds of {options.steps - WARM_UP} pairs of steps\n"
    )
    print("| loop | ms per step | images/s | speed relative to the bare loop (quartiles over pairs) |")
    print("| --- | --- | --- | --- |")
    seconds = {name: statistics.median(own for _, own in found) for name, found in pairs.items()}
    for name, found in pairs.items():
        # The speeds of medians, not the median of ratios: a pause of the machine hits one step of a pair.
        low, _, high = (100 * value for value in statistics.quantiles([bare / own for bare, own in found], n=4))
        relative = 100 * statistics.median(bare for bare, _ in found) / seconds[name]
        print(
            f"| {name} | {1e3 * seconds[name]:.1f} | {options.batch_size / seconds[name]:.1f} | "
            f"{relative:.1f} % ({low:.1f} to {high:.1f}) |"
        )
    if options.device == "cuda":
        rate, needed = matrix_rate(bench), floating_point_operations(bench)
        print(f"\nbf16 matrix rate: {rate / 1e12:.0f} TFLOP/s; a step takes {needed / 1e12:.2f} TFLOP.")
        for name in pairs:
            print(f"{name}: {100 * needed / seconds[name] / rate:.1f} % of the matrix rate")


if __name__ == "__main__":
    main()
