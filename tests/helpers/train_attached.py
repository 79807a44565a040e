"""Trains a tiny U-Net with CEP attached, as a script of diffusers does with accelerate, and writes down what each
process saw: train_attached.py FOLDER."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from denoiser_zoo import sd15

from noisycond import attach_cep


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model, arguments = sd15()
    handle = attach_cep(model, 1.0, seed=7)
    seen = []
    # After CEP's own hook, so it is given what the U-Net is given.
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["encoder_hidden_states"].clone()), with_kwargs=True
    )
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for _ in range(3):
        model.train()
        loss = model(**arguments).sample.square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(**arguments)
    weights = accelerator.unwrap_model(model).state_dict()
    clean = arguments["encoder_hidden_states"]
    found = {"seen": seen, "clean": clean, "weights": weights, "step": handle.step, "size": accelerator.num_processes}
    torch.save(found, folder / f"{accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
