"""The training objective: clean latents to noisy latents and a target, a prediction to a loss per example.

Needs torch and `randomness.py` only. Letters: B examples, C latent channels, h × w their size, T training timesteps.
ᾱ_t is the cumulative product of 1 - β_t, the signal-to-noise ratio ᾱ_t / (1 - ᾱ_t).
"""

import math
from dataclasses import dataclass

import torch

from noisycond import randomness
from noisycond.randomness import Purpose


PREDICTION_TYPES = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def make_betas(schedule: str, start: float, end: float, num_timesteps: int) -> torch.Tensor:
    """Noise variances β_t under the names diffusers' schedulers use: float64 [T].

    `linear` (Ho et al. 2020), `scaled_linear` (linear in √β, Rombach et al. 2022), `squaredcos_cap_v2` (Eq. 17 of
    Nichol & Dhariwal 2021; start and end are not used).

    Raises:
        ValueError: unknown schedule, or start and end not in 0 < start ≤ end < 1.
    """
    if schedule not in BETA_SCHEDULES:
        raise ValueError(f"the beta schedule is {schedule!r}, but it must be one of {', '.join(BETA_SCHEDULES)}.")
    if not 0.0 < start <= end < 1.0:
        raise ValueError(f"betas run from {start} to {end}, but they must satisfy 0 < start ≤ end < 1.")
    if schedule == "linear":
        return torch.linspace(start, end, num_timesteps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64) ** 2
    times = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def predicted_clean(
    prediction: torch.Tensor,
    noisy: torch.Tensor,
    signal_scale: torch.Tensor,
    noise_scale: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """x̂_0 by what is predicted at x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε: its shape.

    Args:
        prediction, noisy [B, C, h, w]: ε̂ or v̂, and x_t. signal_scale, noise_scale [B, 1, 1, 1]: √ᾱ_t and √(1 - ᾱ_t).
    """
    if prediction_type == "epsilon":
        return (noisy - noise_scale * prediction) / signal_scale
    return signal_scale * noisy - noise_scale * prediction


def predicted_noise(
    prediction: torch.Tensor,
    noisy: torch.Tensor,
    signal_scale: torch.Tensor,
    noise_scale: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """ε̂ by what is predicted at x_t; arguments as for [`predicted_clean`]."""
    return prediction if prediction_type == "epsilon" else signal_scale * prediction + noise_scale * noisy


@dataclass
class NoisyExamples:
    """What the denoiser sees and what it should say.

    Attributes:
        noisy [B, C, h, w]: x_t. timesteps [B]: int64 in [0, T). target [B, C, h, w]: ε or v.
        clean [B, C, h, w]: x_0.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    clean: torch.Tensor


class DiffusionObjective:
    """Draws timesteps and noise, and weighs the error of a prediction.

    Args:
        betas: float64 [T]; see [`make_betas`].
        prediction_type: `epsilon` (Ho et al. 2020) or `v_prediction` (Salimans & Ho 2022, appendix D).
        snr_gamma: min-SNR-γ weighting (Hang et al. 2023, arXiv:2303.09556); None weighs all timesteps alike.
        input_perturbation: γ_ip of Ning et al. 2023 (arXiv:2301.11706): x_t is made from ε + γ_ip ξ, the target stays
            that of ε. 0 is off.
        learned_variance: the prediction has 2C channels and the hybrid loss L_simple + L_vlb of Nichol & Dhariwal
            2021 (arXiv:2102.09672) is taken, unscaled as in DiT (arXiv:2212.09748).
        seed: seed of all draws.

    Raises:
        ValueError: unknown prediction type, snr_gamma ≤ 0 or input_perturbation < 0.
    """

    def __init__(
        self,
        betas: torch.Tensor,
        prediction_type: str = "epsilon",
        snr_gamma: float | None = None,
        input_perturbation: float = 0.0,
        learned_variance: bool = False,
        seed: int = 0,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"the prediction type is {prediction_type!r}, but it must be one of {', '.join(PREDICTION_TYPES)}."
            )
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"the SNR cap gamma is {snr_gamma}, but it must be positive.")
        if not input_perturbation >= 0:
            raise ValueError(f"the input perturbation is {input_perturbation}, but it must not be negative.")
        self.betas = betas.to(torch.float64)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self.prediction_type, self.snr_gamma = prediction_type, snr_gamma
        self.input_perturbation, self.learned_variance, self.seed = input_perturbation, learned_variance, seed

    def noise(self, latents: torch.Tensor, keys: torch.Tensor) -> NoisyExamples:
        """The forward process q(x_t | x_0) at a random t, per example.

        Args:
            latents [B, C, h, w]: x_0, float32, of about unit variance. keys [B]: int64, this step's keys.
        """
        self._move(latents.device)
        timesteps = randomness.randint(self.seed, Purpose.TIMESTEP, keys, len(self.betas))
        noise = randomness.normal(self.seed, Purpose.NOISE, keys, latents.shape[1:])
        signal_scale, noise_scale = self._scales(timesteps)
        target = noise if self.prediction_type == "epsilon" else signal_scale * noise - noise_scale * latents
        if self.input_perturbation > 0:
            extra = randomness.normal(self.seed, Purpose.INPUT_PERTURBATION, keys, latents.shape[1:])
            noise = noise + self.input_perturbation * extra
        return NoisyExamples(signal_scale * latents + noise_scale * noise, timesteps, target, latents)

    def loss(self, prediction: torch.Tensor, examples: NoisyExamples) -> torch.Tensor:
        """Mean squared error per example, weighted by timestep, plus L_vlb for a learned variance: float32 [B].

        Args:
            prediction [B, C, h, w], or [B, 2C, h, w] where the variance is learned.
        """
        prediction = prediction.float()
        variance = None
        if self.learned_variance:
            prediction, variance = prediction.chunk(2, dim=1)
        loss = (prediction - examples.target).square().flatten(1).mean(1)
        if self.snr_gamma is not None:
            loss = loss * self.snr_weights(examples.timesteps)
        if variance is not None:
            loss = loss + self._vlb(prediction.detach(), variance, examples)
        return loss

    def snr_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v (Sections 3.4 and 4 of arXiv:2303.09556): float32 [B]."""
        alphas_cumprod = self._at(self.alphas_cumprod, timesteps)
        snr = alphas_cumprod / (1.0 - alphas_cumprod)
        divisor = snr if self.prediction_type == "epsilon" else snr + 1.0
        return (snr.clamp(max=self.snr_gamma) / divisor).float()

    def _at(self, values: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return values[timesteps]

    def _move(self, device: torch.device) -> None:
        # The schedule follows the latents, once: a copy in every step would wait for the device.
        if self.betas.device != device:
            self.betas, self.alphas_cumprod = self.betas.to(device), self.alphas_cumprod.to(device)

    def _scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas_cumprod = self._at(self.alphas_cumprod, timesteps)[:, None, None, None]
        return alphas_cumprod.sqrt().float(), (1.0 - alphas_cumprod).sqrt().float()

    def _clean_from(self, prediction: torch.Tensor, examples: NoisyExamples) -> torch.Tensor:
        return predicted_clean(prediction, examples.noisy, *self._scales(examples.timesteps), self.prediction_type)

    def _vlb(self, prediction: torch.Tensor, variance: torch.Tensor, examples: NoisyExamples) -> torch.Tensor:
        """The term of the variational bound at t in bits per dimension: float32 [B].

        Eqs. 4 to 7 and 15 of arXiv:2102.09672: KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)), and at t = 0 the negative
        log-likelihood of x_0 discretized to 256 values on [-1, 1].
        """
        betas, alphas_cumprod = self.betas, self.alphas_cumprod
        previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
        posterior_variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
        # The posterior variance is 0 at t = 0, so its logarithm is cut off at that of t = 1.
        log_posterior = torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log()
        clean_scale = betas * previous.sqrt() / (1.0 - alphas_cumprod)

        def at(values):
            return self._at(values, examples.timesteps)[:, None, None, None].float()

        fraction = (variance + 1.0) / 2.0
        log_variance = fraction * at(betas.log()) + (1.0 - fraction) * at(log_posterior)
        # Both means hold the same multiple of x_t, which is left out: it cancels in the divergence and is 0 at t = 0.
        true_mean = at(clean_scale) * examples.clean
        mean = at(clean_scale) * self._clean_from(prediction, examples)

        divergence = gaussian_kl(true_mean, at(log_posterior), mean, log_variance)
        reconstruction = -discretized_gaussian_log_likelihood(examples.clean, mean, 0.5 * log_variance)
        nats = torch.where(examples.timesteps[:, None, None, None] == 0, reconstruction, divergence)
        return nats.flatten(1).mean(1) / math.log(2.0)


def gaussian_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL divergence in nats between univariate Gaussians, elementwise."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1.0
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats of the 1/255-wide bin around x under a Gaussian, elementwise; the bins at -1 and 1 reach
    to infinity (Section 3.3 of Ho et al. 2020). log_scale is the logarithm of the standard deviation."""
    centered, inverse = x - mean, torch.exp(-log_scale)
    upper = torch.special.ndtr(inverse * (centered + 1.0 / 255.0))
    lower = torch.special.ndtr(inverse * (centered - 1.0 / 255.0))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
