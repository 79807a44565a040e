"""Noise schedules by name: from flags, and of variances that are spelled out."""

from collections.abc import Sequence
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
    try:
        betas = make_betas(*noise_schedule.values(), args.num_train_timesteps)
    except ValueError as error:
        raise InputError(f"--beta_schedule, --beta_start, --beta_end: {error}") from error
    objective = DiffusionObjective(
        betas, args.prediction_type, args.snr_gamma, args.input_perturbation, preset.learned_variance, args.seed
    )
    return objective, noise_schedule
