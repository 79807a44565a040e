#!/usr/bin/env python
"""What attached CEP costs: a training step with it beside one without it, in turn, and the hook alone as a share of
the step.

    python benchmarks/attach.py                                  # SD 1.5's U-Net, 860 M parameters: 14 GB of memory
    python benchmarks/attach.py --small --pairs 20
    python benchmarks/attach.py --device cuda --batch_size 8 --dtype bfloat16 --pairs 50
"""

import argparse
import statistics
import time

import torch
from diffusers import UNet2DConditionModel

from noisycond import attach_cep


SMALL = {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="A U-Net of two levels, with SD 1.5's text embeddings.")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--latent_size", type=int, default=64)
    parser.add_argument("--type", default="uniform", choices=["uniform", "gaussian"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()

    dtype, size = getattr(torch, args.dtype), args.latent_size
    torch.manual_seed(0)
    # UNet2DConditionModel's own defaults are SD 1.5's but for the width of the text embeddings.
    model = UNet2DConditionModel(sample_size=size, cross_attention_dim=768, **(SMALL if args.small else {}))
    model = (model if dtype == torch.float32 else model.to(dtype)).to(args.device).train()
    latents = torch.randn(args.batch_size, 4, size, size, device=args.device, dtype=dtype)
    text = torch.randn(args.batch_size, 77, 768, device=args.device, dtype=dtype)
    timesteps = torch.randint(1000, (args.batch_size,), device=args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)  # AdamW's state would be another 7 GB

    def timed(action) -> float:
        if args.device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def step() -> None:
        model(latents, timesteps, encoder_hidden_states=text).sample.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def with_cep() -> float:
        handle = attach_cep(model, 1.0, args.type)
        seconds = timed(step)
        handle.remove()
        return seconds

    def hook_alone() -> float:
        handle = attach_cep(model, 1.0, args.type)
        (hook,) = model._forward_pre_hooks.values()
        given = {"encoder_hidden_states": text, "timestep": timesteps, "sample": latents}
        hook(model, (), given)
        seconds = statistics.median(timed(lambda: hook(model, (), given)) for _ in range(50))
        handle.remove()
        return seconds

    timed(step), with_cep()
    pairs = []
    for number in range(args.pairs):  # in turn, and each first in half of the pairs
        if number % 2:
            pairs.append((timed(step), with_cep()))
        else:
            pairs.append((with_cep(), timed(step))[::-1])
    plain = statistics.median(without for without, _ in pairs)
    ratios = [attached / without for without, attached in pairs]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    hook = hook_alone()
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{million:.1f} M parameters, batch {args.batch_size}, latents 4x{size}x{size}, text 77x768, {args.dtype}, "
          f"{args.device}, {args.pairs} pairs")  # fmt: skip
    print(f"step without CEP     {1e3 * plain:10.2f} ms")
    print(f"step with / without  {quartiles[1]:10.4f}    (quartiles {quartiles[0]:.4f} to {quartiles[2]:.4f})")
    print(f"the hook alone       {1e3 * hook:10.2f} ms = {100 * hook / plain:.3f} % of a step")


if __name__ == "__main__":
    main()
