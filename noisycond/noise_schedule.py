"""The name of a noise schedule that is spelled out."""

from collections.abc import Sequence

import torch

from noisycond.objective import BETA_SCHEDULES, make_betas


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
