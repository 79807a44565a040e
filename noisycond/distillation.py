"""Latent consistency distillation: a student learns to jump to the end of its teacher's guided sampling path.

Needs torch, `objective.py` and `randomness.py` only. After Luo et al. 2023 (LCM, arXiv:2310.04378; LCM-LoRA,
arXiv:2311.05556), which builds on Song et al. 2023 (consistency models, arXiv:2303.01469).

Letters: B examples, C latent channels, h × w their size, T training timesteps, N steps of the solver's grid and
k = T / N timesteps between two of them, c the condition, ∅ the null one, w the strength of guidance. The teacher's
guided prediction is p(x_t, c) + w (p(x_t, c) - p(x_t, ∅)) (Section 4.2 of arXiv:2310.04378): w = 0 is no guidance, and
the guidance scale that samplers of diffusers take is w + 1.
"""

import math
from dataclasses import dataclass

import torch

from noisycond import randomness
from noisycond.objective import PREDICTION_TYPES, predicted_clean, predicted_noise
from noisycond.randomness import Purpose


LOSS_TYPES = ("l2", "huber")
SIGMA_DATA = 0.5  # of the boundary scalings; diffusers' LCMScheduler holds the same number and takes no other


def solver_grid(num_train_timesteps: int, num_ddim_timesteps: int) -> torch.LongTensor:
    """The timesteps k - 1, 2k - 1, …, T - 1 that the solver goes through: int64 [N]. diffusers' `LCMScheduler` with
    `original_inference_steps` N samples at some of these.

    Raises:
        ValueError: N does not divide T.
    """
    if num_ddim_timesteps < 1 or num_train_timesteps % num_ddim_timesteps:
        raise ValueError(
            f"the solver has {num_ddim_timesteps} steps, but their number must divide the {num_train_timesteps} "
            "timesteps of the noise schedule."
        )
    return torch.arange(1, num_ddim_timesteps + 1) * (num_train_timesteps // num_ddim_timesteps) - 1


def boundary_scalings(timesteps: torch.Tensor, timestep_scaling: float = 10.0) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out of f(x, t) = c_skip(t) x + c_out(t) x̂_0, with f(x, 0) = x (Appendix C of arXiv:2303.01469, with
    s t for the noise level, s the scaling): float32 [B] each."""
    scaled = timestep_scaling * timesteps.to(torch.float32)
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    return skip, scaled / (scaled**2 + SIGMA_DATA**2).sqrt()


def guidance_embedding(w: torch.Tensor, dim: int) -> torch.Tensor:
    """Sines and cosines of 1000 w, as diffusers' pipelines embed `guidance_scale` - 1 for `timestep_cond`: float32
    [B, dim].

    Args:
        w [B]: float. dim: at least 4.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10000.0) / (half - 1)))
    angles = (1000.0 * w.to(torch.float32))[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim - 2 * half))


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The guided prediction (Section 4.2 of arXiv:2310.04378). x̂_0 and ε̂ are affine in the prediction, so those of the
    guided prediction are the guided x̂_0 and ε̂.

    Args:
        conditional, unconditional [B, C, h, w]: predictions at the same x_t, of any precision. w [B]: float32.

    Returns:
        float32 [B, C, h, w].
    """
    conditional, unconditional = conditional.float(), unconditional.float()
    return conditional + w[:, None, None, None] * (conditional - unconditional)


def consistency_loss(
    prediction: torch.Tensor, target: torch.Tensor, loss_type: str = "l2", huber_c: float = 0.001
) -> torch.Tensor:
    """The distance d of two outputs [B, C, h, w], averaged over their elements: float32 [B].

    `l2` is the squared error, `huber` √(error² + c²) - c for each element, as in diffusers' script.
    """
    error = prediction.float() - target.float()
    distance = error.square() if loss_type == "l2" else (error.square() + huber_c**2).sqrt() - huber_c
    return distance.flatten(1).mean(1)


@dataclass
class SolverStep:
    """One step on the teacher's path, from t_{n+k} to t_n.

    Attributes:
        noisy [B, C, h, w]: x at t_{n+k}, where the solver starts. student_noisy: what the student sees of it.
        start, end [B]: int64, t_{n+k} and t_n. w [B]: float32, the strength of guidance.
    """

    noisy: torch.Tensor
    student_noisy: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    w: torch.Tensor


class ConsistencyDistillation:
    """Draws steps on the teacher's path, takes them with the teacher's predictions, and turns a student's prediction
    into a consistency function (Algorithm 1 of arXiv:2310.04378).

    Args:
        alphas_cumprod [T]: ᾱ of the teacher's noise schedule. prediction_type: what teacher and student predict.
        num_ddim_timesteps: N; see [`solver_grid`].
        w_min, w_max: w is drawn uniformly between them.
        loss_type, huber_c: see [`consistency_loss`]. timestep_scaling: see [`boundary_scalings`].
        input_perturbation: γ_ip of Ning et al. 2023 (arXiv:2301.11706): the student's x is made from ε + γ_ip ξ, while
            the solver starts from ε alone, as the target of that paper stays that of ε. 0 is off.
        seed: seed of all draws.

    Raises:
        ValueError: unknown prediction or loss type, N does not divide T, or w_min > w_max.
    """

    def __init__(
        self,
        alphas_cumprod: torch.Tensor,
        prediction_type: str = "epsilon",
        num_ddim_timesteps: int = 50,
        w_min: float = 5.0,
        w_max: float = 15.0,
        loss_type: str = "l2",
        huber_c: float = 0.001,
        timestep_scaling: float = 10.0,
        input_perturbation: float = 0.0,
        seed: int = 0,
    ):
        for name, value, known in (
            ("prediction", prediction_type, PREDICTION_TYPES),
            ("loss", loss_type, LOSS_TYPES),
        ):
            if value not in known:
                raise ValueError(f"the {name} type is {value!r}, but it must be one of {', '.join(known)}.")
        if not 0.0 <= w_min <= w_max < math.inf:
            raise ValueError(f"w runs from {w_min} to {w_max}, but must run upwards from 0 or more.")
        self.alphas_cumprod = alphas_cumprod.to(torch.float64)
        self.grid = solver_grid(len(alphas_cumprod), num_ddim_timesteps)
        self.prediction_type, self.w_min, self.w_max = prediction_type, w_min, w_max
        self.loss_type, self.huber_c, self.timestep_scaling = loss_type, huber_c, timestep_scaling
        self.input_perturbation, self.seed = input_perturbation, seed

    def draw(self, latents: torch.Tensor, keys: torch.Tensor) -> SolverStep:
        """A step at a random place of the grid, noise and guidance, per example; the last step ends at t = 0.

        Args:
            latents [B, C, h, w]: x_0, float32, of about unit variance. keys [B]: int64, this step's keys.
        """
        self._move(latents.device)
        place = randomness.randint(self.seed, Purpose.SOLVER_STEP, keys, len(self.grid))
        start, end = self.grid[place], torch.where(place > 0, self.grid[place - 1], 0)
        w = self.w_min + (self.w_max - self.w_min) * randomness.uniform(self.seed, Purpose.GUIDANCE, keys)
        noise = randomness.normal(self.seed, Purpose.NOISE, keys, latents.shape[1:])
        signal_scale, noise_scale = self._scales(start)
        noisy = student_noisy = signal_scale * latents + noise_scale * noise
        if self.input_perturbation > 0:
            extra = randomness.normal(self.seed, Purpose.INPUT_PERTURBATION, keys, latents.shape[1:])
            student_noisy = noisy + noise_scale * self.input_perturbation * extra
        return SolverStep(noisy, student_noisy, start, end, w)

    def solve(self, prediction: torch.Tensor, step: SolverStep) -> torch.Tensor:
        """Ψ: one step of DDIM (Eq. 12 of arXiv:2010.02502 at σ = 0) from t_{n+k} to t_n, with x̂_0 and ε̂ of the
        teacher's guided prediction [B, C, h, w] at t_{n+k}: float32, the same shape."""
        scales = self._scales(step.start)
        clean, noise = (
            predicted(prediction.float(), step.noisy, *scales, self.prediction_type)
            for predicted in (predicted_clean, predicted_noise)
        )
        signal_scale, noise_scale = self._scales(step.end)
        return signal_scale * clean + noise_scale * noise

    def output(self, prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """f(x_t, t) = c_skip(t) x_t + c_out(t) x̂_0 with x̂_0 of the student's prediction (Section 4.1 of
        arXiv:2310.04378): float32 [B, C, h, w].

        Args:
            prediction, noisy [B, C, h, w]. timesteps [B]: int64.
        """
        clean = predicted_clean(prediction.float(), noisy, *self._scales(timesteps), self.prediction_type)
        skip, out = boundary_scalings(timesteps, self.timestep_scaling)
        return skip[:, None, None, None] * noisy + out[:, None, None, None] * clean

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The distance of two outputs [B, C, h, w]: float32 [B]; see [`consistency_loss`]."""
        return consistency_loss(output, target, self.loss_type, self.huber_c)

    def _move(self, device: torch.device) -> None:
        # The schedule follows the latents, once: a copy in every step would wait for the device.
        if self.grid.device != device:
            self.grid, self.alphas_cumprod = self.grid.to(device), self.alphas_cumprod.to(device)

    def _scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas_cumprod = self.alphas_cumprod[timesteps][:, None, None, None]
        return alphas_cumprod.sqrt().float(), (1.0 - alphas_cumprod).sqrt().float()
