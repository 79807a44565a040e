"""Noise schedules by name: from flags, and of variances that are spelled out."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from noisycond.arguments import ObjectiveArguments
from noisycond.errors import InputError, require
from noisycond.objective import BETA_SCHEDULES, DiffusionObjective, make_betas


if TYPE_CHECKING:
    from noisycond.denoisers.presets import Preset


def named_schedule(betas: Sequence[float] | torch.Tensor) -> dict | None:
    """beta_schedule, beta_start and beta_end, by the names of diffusers' schedulers, of noise variances β_t [T].

    Returns:
        None where no known schedule gives them up to 0.01 %: float32 rounds in the seventh digit.
    """
    betas = torch.as_tensor(betas, dtype=torch.float64)
    start, end = (float(f"{beta:.6g}") for beta in (betas[0], betas[-1]))
    for schedule in BETA_SCHEDULES:
        # The cosine schedule takes no ends; those it is given must be valid.
        ends = (0.0001, 0.02) if schedule == "squaredcos_cap_v2" else (start, end)
        try:
            named = make_betas(schedule, *ends, len(betas))
        except ValueError:
            continue
        if torch.allclose(betas, named, rtol=1e-4, atol=0):
            return {"beta_schedule": schedule, "beta_start": ends[0], "beta_end": ends[1]}
    return None


def schedule_of_scheduler(config: Mapping) -> dict:
    """What to train with, of a scheduler of diffusers.

    Args:
        config: its configuration, with the defaults that the scheduler fills in.

    Returns:
        beta_schedule, beta_start, beta_end, prediction_type and num_train_timesteps.

    Raises:
        InputError: it has no such noise schedule, or one that cannot be trained with here.
    """
    require("beta_schedule" in config, "its scheduler has no noise schedule of betas, as flow matching has none.")
    require(
        not config.get("rescale_betas_zero_snr"),
        "its scheduler rescales the betas to a signal-to-noise ratio of 0 (rescale_betas_zero_snr), which cannot be "
        "trained with here.",
    )
    kept = {name: config[name] for name in ("beta_schedule", "beta_start", "beta_end", "prediction_type")}
    kept["num_train_timesteps"] = config["num_train_timesteps"]
    betas = config.get("trained_betas")
    if betas is not None:  # they win over the names beside them
        named = named_schedule(betas)
        require(
            named,
            f"its scheduler spells out {len(betas)} betas (trained_betas) of no schedule that can be trained with "
            "here.",
        )
        kept |= named | {"num_train_timesteps": len(betas)}
    require(
        kept["beta_schedule"] in BETA_SCHEDULES,
        f"its scheduler's beta_schedule is {kept['beta_schedule']}, but only {', '.join(BETA_SCHEDULES)} can be "
        "trained with here.",
    )
    return kept


def build_objective(args: ObjectiveArguments, denoiser: str, preset: "Preset") -> tuple[DiffusionObjective, dict]:
    """The objective that flags ask for, and its noise schedule by the names that diffusers' schedulers use.

    Args:
        args: also with `input_perturbation` and `seed`. denoiser: its name, for messages. preset: gives what the flags
            leave open.

    Raises:
        InputError: the noise schedule is none, or the denoiser was trained to predict something else.
    """
    noise_schedule = {
        name: getattr(preset, name) if getattr(args, name) is None else getattr(args, name)
        for name in ("beta_schedule", "beta_start", "beta_end")
    }
    require(
        preset.prediction_type in (None, args.prediction_type),
        f"--prediction_type is {args.prediction_type}, but {denoiser} was trained for {preset.prediction_type}.",
    )
    require(
        preset.num_train_timesteps in (None, args.num_train_timesteps),
        f"--num_train_timesteps is {args.num_train_timesteps}, but {denoiser} was trained with "
        f"{preset.num_train_timesteps}.",
    )
    try:
        betas = make_betas(*noise_schedule.values(), args.num_train_timesteps)
    except ValueError as error:
        raise InputError(f"--beta_schedule, --beta_start, --beta_end: {error}") from error
    objective = DiffusionObjective(
        betas, args.prediction_type, args.snr_gamma, args.input_perturbation, preset.learned_variance, args.seed
    )
    return objective, noise_schedule
