"""Whether what is trained heeds its control images, found out while it trains.

Letters: B examples.
"""

import logging
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn

from noisycond.bases import Base
from noisycond.objective import DiffusionObjective
from noisycond.randomness import step_keys


logger = logging.getLogger(__name__)


class ControlCheck:
    """Whether a denoiser heeds its control: how much lower the loss is with an image's own control than with that of
    another, all else equal.

    A ControlNet may begin to follow its control all at once, after thousands of steps (the sudden convergence of
    arXiv:2302.05543); before that both losses are alike, and where they stay so, control and image do not belong
    together, or the learning rate is too low.

    Args:
        batches: of training examples, as [`noisycond.data.batches.Batches`] gives them.
    """

    EXAMPLES = 8  # at least; of a single one there is no other's control
    LEAST = 0.005  # share of the loss that the own control must spare
    PATIENCE = 2  # checks that may find nothing before there is a warning

    def __init__(self, base: Base, objective: DiffusionObjective, batches: Iterator[dict], accelerator: Accelerator):
        self.base, self.objective, self.accelerator = base, objective, accelerator
        parts = [next(batches)]
        while sum(len(part["control"]) for part in parts) < self.EXAMPLES:
            parts.append(next(batches))
        tensors = [name for name, value in parts[0].items() if torch.is_tensor(value)]
        self.batch = {name: torch.cat([part[name] for part in parts]) for name in tensors}
        self.found_nothing, self.has_warned = 0, False

    @torch.no_grad()
    def gain(self, denoiser: nn.Module) -> float:
        """1 - L(own control) / L(another's), of the mean losses of B examples at the same noise and timesteps."""
        device = self.accelerator.device
        batch = {name: value.to(device) for name, value in self.batch.items()}
        keys = step_keys(0, torch.arange(len(batch["control"]), device=device))
        examples = self.objective.noise(self.base.first_stage.latents_of(batch, keys), keys)
        condition = self.base.true_conditions(batch)
        losses = []
        for control in (batch["control"], batch["control"].roll(1, 0)):
            with self.accelerator.autocast():
                prediction = denoiser(examples.noisy, examples.timesteps, condition | {"control": control})
            losses.append(self.objective.loss(prediction, examples).mean().item())
        return 1.0 - losses[0] / losses[1]

    def __call__(self, denoiser: nn.Module, step: int) -> dict:
        """The gain, for the log; warns where it stays below what a heeded control brings."""
        gain = self.gain(denoiser)
        self.found_nothing = 0 if gain >= self.LEAST else self.found_nothing + 1
        if self.found_nothing == 0 and self.has_warned:
            logger.info("At step %d the control is heeded: the loss is %.1f %% lower with it.", step, 100 * gain)
            self.has_warned = False
        if self.found_nothing >= self.PATIENCE and not self.has_warned:
            self.has_warned = True
            # Once: a ControlNet may take thousands of steps, and a warning at each check would not be read.
            logger.warning(
                "At step %d the control is ignored: with an image's own control the loss is %.2f %% lower than with "
                "another's, and a control that is heeded brings at least %.1f %%. If it stays so, look at the "
                "controls in the sample grids, train longer or raise --learning_rate.",
                step,
                100 * gain,
                100 * self.LEAST,
            )
        return {"control_gain": gain}
