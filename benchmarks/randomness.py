#!/usr/bin/env python
"""What keyed draws cost: noise, timesteps and CEP by Philox in torch, next to torch's own generator and to a training
step of the same model, all in one run.

    python benchmarks/randomness.py --denoiser dit-s-2 --batch_size 8             # CPU
    python benchmarks/randomness.py --denoiser dit-xl-2 --batch_size 32 --device cuda
"""

import argparse
import statistics
import time

import torch

from noisycond.denoisers import build_denoiser, find_denoiser
from noisycond.objective import DiffusionObjective, make_betas
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.randomness import step_keys


def seconds(action, repeats: int, device: str) -> float:
    """The median time of an action, after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", default="dit-s-2")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--latent_size", type=int, default=32)
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    names = [str(label) for label in range(args.num_classes)]
    cep = ConditionEmbeddingPerturbation(1.0)
    source = find_denoiser(args.denoiser)
    shape = {"latent_channels": 4, "latent_size": args.latent_size}
    denoiser = build_denoiser(source, class_names=names, perturbation=cep, **shape).to(args.device).train()
    optimizer = torch.optim.AdamW(denoiser.parameters())
    betas = make_betas("linear", 1e-4, 0.02, 1000)
    objective = DiffusionObjective(betas, learned_variance=source.preset.learned_variance)
    latents = torch.randn(args.batch_size, 4, args.latent_size, args.latent_size, device=args.device)
    condition = {"class_labels": torch.arange(args.batch_size, device=args.device) % args.num_classes}
    keys = step_keys(0, torch.arange(args.batch_size, device=args.device))
    embedding = torch.empty(args.batch_size, denoiser.backbone.dim, device=args.device)

    def keyed():
        objective.noise(latents, keys)
        cep.draw(embedding.shape, keys)

    def stateful():
        timesteps = torch.randint(1000, (args.batch_size,), device=args.device)
        noise = torch.randn_like(latents)
        signal, scale = objective._scales(timesteps)
        _ = signal * latents + scale * noise
        torch.rand_like(embedding)

    def step():
        examples = objective.noise(latents, keys)
        prediction = denoiser(examples.noisy, examples.timesteps, condition, keys)
        objective.loss(prediction, examples).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    times = {name: seconds(action, args.repeats, args.device) for name, action in
             (("keyed draws", keyed), ("torch's generator", stateful), ("training step", step))}  # fmt: skip
    print(
        f"{args.denoiser}, batch {args.batch_size}, latent {args.latent_size}, {args.device}, median of {args.repeats}"
    )
    for name, value in times.items():
        print(f"{name:>20}: {1e3 * value:9.2f} ms   {100 * value / times['training step']:6.2f} % of a step")


if __name__ == "__main__":
    main()
