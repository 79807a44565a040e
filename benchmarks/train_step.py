#!/usr/bin/env python
"""What the training loop costs: `noisycond.trainer.fit` as the scripts call it beside a bare PyTorch loop of the same
model, batch and optimizer, a step of one after a step of the other; steps per second as a share of the bare loop's.

    python benchmarks/train_step.py                                # train_class_cond.py: dit-mini, batch 64, CPU
    python benchmarks/train_step.py --denoiser ldm-mini-text       # train_text_to_image_corrupt.py
    python benchmarks/train_step.py --denoiser dit-xl-2 --device cuda --batch_size 128 --mixed_precision bf16 \
        --torch_compile
    python benchmarks/train_step.py --denoiser ldm-4-text --device cuda --batch_size 32 --mixed_precision bf16

The bare loop takes its latents from memory, and of captions the embeddings; it draws noise and timesteps from
torch's generator, and does nothing else: no corruption, perturbation, clipping, average, log or progress bar. `fit`
does all of that, logs every step to a file and to tensorboard, and reads latents and captions through the data loader.
On a GPU images per second are set against the card's measured bf16 matrix rate. Beside a DiT the stock
`DiTTransformer2DModel` takes part in a bare loop of its own.
"""

import argparse
import os
import statistics

import torch
from train_step_loops import WARM_UP, Bench, ClassBench, Pair, TextBench

from noisycond.denoisers import TEXT_PRESETS


def matrix_rate(bench: Bench, size: int = 8192) -> float:
    """Measured bf16 operations per second of a square matrix product."""
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / statistics.median(bench.timed(lambda: a @ b) for _ in range(20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", default="dit-mini", help="a preset; those of text measure the text script")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--resolution", type=int, help="default: 32 for the miniatures, else 256")
    parser.add_argument("--num_classes", type=int, help="default: 10 for the miniatures, else 1000; not for text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed_precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--steps", type=int, default=45, help=f"pairs of steps per round, {WARM_UP} not counted")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    on_text = options.denoiser in TEXT_PRESETS
    if on_text and options.num_classes is not None:
        parser.error(f"--num_classes has no effect on {options.denoiser}, which is conditioned on text.")
    options.synthetic = "-mini" not in options.denoiser
    options.resolution = options.resolution or (256 if options.synthetic else 32)
    options.num_classes = options.num_classes or (1000 if options.synthetic else 10)
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # also where there is a GPU

    bench = TextBench(options) if on_text else ClassBench(options)
    rows = bench.rows()
    pairs: dict[str, list[Pair]] = {name: [] for name in rows}
    for _ in range(options.rounds):
        for name, row in rows.items():
            pairs[name] += row.measure()
    report(bench, pairs)


def report(bench: Bench, pairs: dict[str, list[Pair]]) -> None:
    options = bench.options
    torch_threads = f", {torch.get_num_threads()} threads" if options.device == "cpu" else ""
    print(
        f"\n{bench.describe()}, batch {options.batch_size}, {options.device}{torch_threads}, precision "
        f"{options.mixed_precision}, compiled: {options.torch_compile}; {options.rounds} rounds of "
        f"{options.steps - WARM_UP} pairs of steps\n"
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
        rate = matrix_rate(bench)
        print(f"\nbf16 matrix rate: {rate / 1e12:.0f} TFLOP/s")
        for name, row in bench.rows().items():
            needed = row.operations()
            share = 100 * needed / seconds[name] / rate
            print(f"{name}: a step takes {needed / 1e12:.2f} TFLOP, {share:.1f} % of the matrix rate")


if __name__ == "__main__":
    main()
