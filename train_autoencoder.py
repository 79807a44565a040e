#!/usr/bin/env python
"""Trains a small KL or VQ autoencoder: a first stage for latent diffusion where none can be downloaded.

accelerate launch train_autoencoder.py                          # the KL miniature for digits
accelerate launch train_autoencoder.py --recipe digits_vq       # the VQ one
"""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


try:
    import torch
    from diffusers import AutoencoderKL, VQModel
    from torch import nn

    from noisycond import checkpoints, dry_run, hardware, hub, pictures, randomness, trainer
    from noisycond.arguments import DataArguments, HubArguments, LoopArguments, flag, parse_arguments
    from noisycond.begin import begin
    from noisycond.cards import first_stage_card, public_name
    from noisycond.data.opening import open_batches, open_training_data
    from noisycond.data.sources import open_source
    from noisycond.errors import one_sentence_errors, require, writing
    from noisycond.first_stage import FirstStage
    from noisycond.processes import on_main
    from noisycond.randomness import Purpose
    from noisycond.reconstruction import latent_std, reconstruct, reconstruction_psnr
    from noisycond.run_folder import RunFolder, claim, write_atomically
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


@dataclass
class AutoencoderArguments(DataArguments, LoopArguments, HubArguments):
    autoencoder: Literal["kl", "vq"] = flag("kl", "`kl`: AutoencoderKL. `vq`: VQModel.")
    block_out_channels: list[int] = flag([128, 256, 512], "Channels per level; n levels give a factor of 2^(n-1).")
    layers_per_block: int = flag(2, "Residual blocks per level.")
    norm_num_groups: int = flag(32, "Groups of the group normalization; must divide every level's channels.")
    latent_channels: int = flag(4, "Channels of the latent.")
    num_vq_embeddings: int = flag(8192, "Codes of a VQ autoencoder.")
    kl_weight: float = flag(1e-6, "Weight of the KL divergence to a standard normal, for a KL autoencoder.")
    validation_split: str | None = flag(None, "Held-out split for the PSNR; the default is `test` for digits.")

    def __post_init__(self):
        super().__post_init__()
        factor = 2 ** (len(self.block_out_channels) - 1)
        require(
            self.resolution % factor == 0,
            f"--resolution is {self.resolution}, but must be a multiple of the factor {factor} of these "
            "--block_out_channels.",
        )
        require(
            all(channels % self.norm_num_groups == 0 for channels in self.block_out_channels),
            f"--norm_num_groups is {self.norm_num_groups}, but must divide each of --block_out_channels "
            f"{self.block_out_channels}.",
        )
        require(
            self.train_data_dir is None or self.validation_split is None,
            "--validation_split has no effect with --train_data_dir: a folder of images has no splits.",
        )
        require(self.kl_weight >= 0, f"--kl_weight is {self.kl_weight}, but it must not be negative.")
        if self.dataset_name == "digits" and self.validation_split is None:
            self.validation_split = "test"


class Reconstruction(nn.Module):
    """An autoencoder as one module for the training loop: images in, reconstruction and regularizer out."""

    def __init__(self, model: AutoencoderKL | VQModel, kl_weight: float, seed: int):
        super().__init__()
        self.model, self.kl_weight, self.seed = model, kl_weight, seed

    def forward(self, pixel_values: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 3, R, R] in [-1, 1] to their reconstruction and a regularizer, float32 [] or [B]: the KL
        divergence per pixel value times its weight (arXiv:1312.6114), or the codebook and commitment loss
        (arXiv:1711.00937)."""
        if isinstance(self.model, VQModel):
            output = self.model.decode(self.model.encode(pixel_values).latents)
            return output.sample, output.commit_loss
        posterior = self.model.encode(pixel_values).latent_dist
        noise = randomness.normal(self.seed, Purpose.LATENT_POSTERIOR, keys, posterior.mean.shape[1:])
        sample = self.model.decode(posterior.mean + posterior.std * noise).sample
        return sample, self.kl_weight * posterior.kl() / pixel_values[0].numel()


def build_autoencoder(args: AutoencoderArguments) -> AutoencoderKL | VQModel:
    """An untrained autoencoder; its scaling factor is 1 until it is measured."""
    levels = len(args.block_out_channels)
    shape = {
        "block_out_channels": tuple(args.block_out_channels),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": args.layers_per_block,
        "norm_num_groups": args.norm_num_groups,
        "latent_channels": args.latent_channels,
        "sample_size": args.resolution,
        "scaling_factor": 1.0,
    }
    if args.autoencoder == "kl":
        return AutoencoderKL(**shape)
    return VQModel(**shape, num_vq_embeddings=args.num_vq_embeddings)


def compute_loss(model: nn.Module, batch: dict, keys: torch.Tensor) -> torch.Tensor:
    """Squared error per pixel value plus the regularizer: float32 [B]."""
    sample, regularizer = model(batch["pixel_values"], keys)
    return (sample.float() - batch["pixel_values"]).square().flatten(1).mean(1) + regularizer


def draw_reconstructions(first_stage: FirstStage, images, path: Path) -> None:
    """Saves pairs of rows: images above, their reconstructions below."""
    originals, copies = reconstruct(first_stage, images, range(min(32, len(images))))
    rows = [row for first in range(0, len(originals), 16) for row in (originals[first:][:16], copies[first:][:16])]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.image_grid([image for row in rows for image in row], 16, scale=2).save(path)


def make_card(model: AutoencoderKL | VQModel, args: AutoencoderArguments, figures: dict, repo_id: str | None):
    """The model card: what was trained on what, and how well it reconstructs."""
    dataset = public_name(args.dataset_name or args.train_data_dir)
    settings = {
        "recipe": public_name(args.recipe or "none"),
        "dataset": dataset,
        "resolution": args.resolution,
        "PSNR": f"{figures['psnr_db']} dB on {figures['images']} images ({figures['split']})",
        "scaling factor": figures["scaling_factor"],
        "seed": args.seed,
    }
    title = f"{type(model).__name__} of factor {2 ** (len(args.block_out_channels) - 1)} on {dataset}"
    return first_stage_card(title, settings, "samples/final.png", model_class=type(model).__name__, repo_id=repo_id)


def export(
    model: AutoencoderKL | VQModel, args: AutoencoderArguments, run: RunFolder, images, held_out, repo_id
) -> None:
    """Writes what a run leaves behind: the autoencoder with its scaling factor, card, PSNR, reconstructions, loss
    curve; then pushes it."""
    first_stage = FirstStage(model, args.seed)
    model.register_to_config(scaling_factor=round(1.0 / latent_std(first_stage, images), 5))
    with writing(f"--output_dir {run.path}", "the autoencoder (its last checkpoint is whole)"):
        model.save_pretrained(run.path)  # before the measuring, which may take long
        psnr = reconstruction_psnr(first_stage, held_out)
        draw_reconstructions(first_stage, held_out, run.samples / "final.png")
        pictures.plot_loss(run.read_log(), run.path / "loss.png")
        figures = {"psnr_db": round(psnr, 2), "images": len(held_out), "split": args.validation_split or "train"}
        figures["scaling_factor"] = first_stage.scaling_factor
        write_atomically(run.path / "reconstruction.json", json.dumps(figures, indent=2) + "\n")
        make_card(model, args, figures, repo_id).save(run.path / "README.md")
    print(
        f"\nPSNR {psnr:.2f} dB on {len(held_out)} {'held-out' if args.validation_split else 'training'} images, "
        f"scaling factor {first_stage.scaling_factor}.\nUse it with --pretrained_vae_model_name_or_path {run.path}"
    )
    if repo_id is not None:
        hub.push(run.path, repo_id, args.hub_private_repo)


def parse(argv: list[str] | None = None) -> AutoencoderArguments:
    """The arguments of a command line; None takes that of the process."""
    return parse_arguments(AutoencoderArguments, argv, default_recipe="digits_kl")


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.dry_run:
        with torch.device("meta"):
            model = Reconstruction(build_autoencoder(args), args.kl_weight, args.seed)
        return dry_run.report(args, model, dry_run.open_what_is_here(args), {})
    run, accelerator, repo_id = begin(args)
    data = open_training_data(args)
    held_out = data.images
    if args.validation_split is not None:
        held_out = type(data.images)(open_source(args, args.validation_split), data.images.transform)
    model = Reconstruction(build_autoencoder(args), args.kl_weight, args.seed)
    batches = open_batches(args, data, accelerator)
    facts = data.facts | trainer.facts(args, batches) | {"mixed_precision": hardware.precision_of(args)}
    on_main(accelerator, lambda: checkpoints.check_space(args, model))
    resume_from = claim(run, args, facts, Path(__file__).name, accelerator)
    trainer.announce(args, accelerator, data.images, model, batches)

    def validate(step: int) -> None:
        frozen = FirstStage(copy.deepcopy(model.model), args.seed)
        draw_reconstructions(frozen, held_out, run.samples / f"step-{step:07d}.png")

    result = trainer.fit(
        model,
        batches,
        compute_loss,
        args,
        accelerator=accelerator,
        run=run,
        bad_images=data.bad_images,
        resume_from=resume_from,
        looks=[(validate, args.validation_steps)],
    )
    if result.stopped_by is None:
        on_main(accelerator, lambda: export(model.model, args, run, data.images, held_out, repo_id))
    trainer.finish(accelerator, result, run)


if __name__ == "__main__":
    main()
