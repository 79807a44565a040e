#!/usr/bin/env python
"""What neighbour metrics cost: precision, recall, density and coverage beside the three float32 matrix products that
the distances need, the `prdc` package and torch-fidelity, all in one run and as multiples of the bare products.

    python benchmarks/metrics.py --size 10000 --dim 2048
    python benchmarks/metrics.py --memory --size 50000          # ours alone, in a process of its own: time and peak
"""

import argparse
import contextlib
import io
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from noisycond.evaluation.neighbours import precision_recall_density_coverage


K = 5  # one k for all, since `prdc` takes one


def make_features(size: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and generated features, [size, dim] float32: positive, skewed and of low rank, as Inception's are."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, dim, generator=generator) / 8

    def draw(spread: float) -> torch.Tensor:
        features = torch.randn(size, 64, generator=generator).mul_(spread) @ mixing
        return features.add_(torch.randn(size, dim, generator=generator), alpha=0.3).exp_().mul_(0.3)

    return draw(1.0), draw(0.95)


def bare_products(real: torch.Tensor, generated: torch.Tensor) -> None:
    for one, other in ((real, real), (generated, generated), (real, generated)):
        torch.mm(one, other.T)


def ours(real: torch.Tensor, generated: torch.Tensor, progress: bool = False) -> dict[str, float]:
    found = precision_recall_density_coverage(
        real=real, generated=generated, precision_k=K, coverage_k=K, progress=progress
    )
    return {name: estimate.value for name, estimate in found.estimates().items()}


def by_prdc(real: torch.Tensor, generated: torch.Tensor) -> dict[str, float]:
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):
        return compute_prdc(real.numpy(), generated.numpy(), K)


def by_torch_fidelity(real: torch.Tensor, generated: torch.Tensor) -> dict[str, float]:
    from torch_fidelity.metric_prc import prc_features_to_metric

    options = {"prc_neighborhood": K, "prc_batch_size": 10000, "save_cpu_ram": False, "verbose": False}
    return prc_features_to_metric(generated, real, **options)


def seconds(action, *args) -> tuple[float, object]:
    start = time.perf_counter()
    result = action(*args)
    return time.perf_counter() - start, result


def compare(options: argparse.Namespace) -> None:
    real, generated = make_features(options.size, options.dim)
    ways = {"bare products": bare_products, "noisycond": ours}
    if not options.alone:
        ways |= {"prdc": by_prdc, "torch-fidelity, precision and recall": by_torch_fidelity}
    warm_up = real[:1000], generated[:1000]
    for way in ways.values():
        way(*warm_up)
    times: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            passed, results[name] = seconds(way, real, generated)
            times[name].append(passed)
    print(
        f"{options.size} real and {options.size} generated images, {options.dim} features, k = {K}, "
        f"{torch.get_num_threads()} threads, {options.rounds} rounds; the bare products took "
        f"{statistics.median(times['bare products']):.1f} s (median)\n"
    )
    print("| what | times the bare products (median) | rounds | precision | recall | density | coverage |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, found in times.items():
        ratios = [own / bare for own, bare in zip(found, times["bare products"], strict=True)]
        values = [
            f"{results[name][metric]:.4f}" if results[name] and metric in results[name] else "–"
            for metric in ("precision", "recall", "density", "coverage")
        ]
        spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {statistics.median(ratios):.2f} | {spread} | {' | '.join(values)} |")


def write_features(folder: Path, options: argparse.Namespace) -> None:
    for name, features in zip(("real", "generated"), make_features(options.size, options.dim), strict=True):
        np.save(folder / f"{name}.npy", features.numpy())


def measure_memory(options: argparse.Namespace) -> None:
    """Time and peak memory of one run in a fresh process; the features lie in files and are memory-mapped there."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shape = ["--folder", folder, "--size", str(options.size), "--dim", str(options.dim)]
        for step in ("--write", "--measure"):
            subprocess.run([sys.executable, __file__, step, *shape], check=True)


def run_measured(options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    mapped = [torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in ("real", "generated")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    passed, values = seconds(ours, *mapped, sys.stderr.isatty())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{options.size} real and {options.size} generated images, {options.dim} features, "
        f"{torch.get_num_threads()} threads: {passed:.0f} s, peak {peak:.0f} MiB, {before:.0f} MiB of it after the "
        f"imports, features {2 * options.size * options.dim * 4 / 2**20:.0f} MiB"
    )
    print(", ".join(f"{name} {value:.4f}" for name, value in values.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000, help="real images, and as many generated ones")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without prdc and torch-fidelity")
    parser.add_argument("--memory", action="store_true", help="time and peak memory in a process of its own")
    parser.add_argument("--folder", help="where --memory puts its features; a temporary folder by default")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_features(Path(options.folder), options)
    elif options.measure:
        run_measured(options)
    elif options.memory:
        measure_memory(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
