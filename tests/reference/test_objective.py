"""The training objective against diffusers' schedulers and against the variational bound written out in NumPy."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from scipy.special import ndtr

from noisycond.objective import (
    BETA_SCHEDULES,
    DiffusionObjective,
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    make_betas,
)


T = 1000
RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}
KEYS = torch.arange(256)


def scheduler(schedule: str, prediction_type: str = "epsilon") -> DDPMScheduler:
    start, end = RANGES[schedule]
    return DDPMScheduler(T, start, end, schedule, prediction_type=prediction_type)


def objective(schedule: str = "linear", *args, **options) -> DiffusionObjective:
    return DiffusionObjective(make_betas(schedule, *RANGES[schedule], T), *args, **options)


def latents(size: int = 256, channels: int = 3) -> torch.Tensor:
    return torch.randn(size, channels, 4, 4, generator=torch.Generator().manual_seed(0))


# The schedule


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("steps", [10, 1000])
def test_betas_are_those_of_diffusers(schedule, steps):
    start, end = RANGES[schedule]
    betas = make_betas(schedule, start, end, steps)
    assert betas.dtype == torch.float64 and betas.shape == (steps,)
    theirs = DDPMScheduler(steps, start, end, schedule).betas.double()
    assert (betas / theirs - 1).abs().max() < 1e-3
    assert (betas - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_cumulative_products_are_those_of_diffusers(schedule):
    assert (objective(schedule).alphas_cumprod - scheduler(schedule).alphas_cumprod).abs().max() < 1e-5


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'cosine'.*linear, scaled_linear, squaredcos_cap_v2"):
        make_betas("cosine", 1e-4, 0.02, T)


@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 0.02), (-1e-4, 0.02), (0.02, 1e-4), (1e-4, 1.0), (float("nan"), 0.1)]
)
def test_betas_out_of_range_are_refused(start, end):
    with pytest.raises(ValueError, match="0 < start ≤ end < 1"):
        make_betas("linear", start, end, T)


# The forward process


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_noise_is_added_as_diffusers_does(schedule):
    examples = objective(schedule).noise(latents(), KEYS)
    noise = examples.target
    expected = scheduler(schedule).add_noise(latents(), noise, examples.timesteps)
    assert (examples.noisy - expected).abs().max() < 1e-4
    assert torch.equal(examples.clean, latents())
    assert examples.noisy.dtype == torch.float32 and examples.timesteps.dtype == torch.int64


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_velocity_is_that_of_diffusers(schedule):
    noise = objective(schedule).noise(latents(), KEYS).target
    examples = objective(schedule, "v_prediction").noise(latents(), KEYS)
    expected = scheduler(schedule, "v_prediction").get_velocity(latents(), noise, examples.timesteps)
    assert (examples.target - expected).abs().max() < 1e-4
    assert (examples.noisy - scheduler(schedule).add_noise(latents(), noise, examples.timesteps)).abs().max() < 1e-4
    assert (examples.target - noise).abs().max() > 0.1


def test_timesteps_are_uniform_and_noise_is_normal():
    keys = torch.arange(100_000)
    examples = objective().noise(torch.zeros(100_000, 1, 1, 2), keys)
    counts = torch.bincount(examples.timesteps, minlength=T)
    assert len(counts) == T and counts.min() > 0
    statistic = ((counts - 100.0) ** 2 / 100).sum()
    assert abs(statistic - 999) < 5 * (2 * 999) ** 0.5
    assert abs(examples.target.mean()) < 5 * 200_000**-0.5
    assert abs(examples.target.var() - 1) < 5 * (2 / 200_000) ** 0.5
    correlation = torch.corrcoef(torch.stack([examples.timesteps.double(), examples.target[:, 0, 0, 0].double()]))
    assert abs(correlation[0, 1]) < 5 * 100_000**-0.5


def test_a_draw_does_not_depend_on_the_batch():
    whole = objective(input_perturbation=0.1).noise(latents(), KEYS)
    for part in (slice(0, 5), slice(5, 6), slice(100, 256)):
        some = objective(input_perturbation=0.1).noise(latents()[part], KEYS[part])
        for name in ("noisy", "timesteps", "target"):
            assert torch.equal(getattr(some, name), getattr(whole, name)[part])
    other = objective(seed=1).noise(latents(), KEYS)
    assert not torch.equal(other.timesteps, whole.timesteps)
    assert (other.target - whole.target).abs().max() > 1


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    objective(input_perturbation=0.1).noise(latents(), KEYS)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_input_perturbation_changes_the_noisy_latents_alone(prediction_type):
    strength = 0.3
    plain = objective("linear", prediction_type).noise(latents(), KEYS)
    perturbed = objective("linear", prediction_type, input_perturbation=strength).noise(latents(), KEYS)
    assert torch.equal(perturbed.timesteps, plain.timesteps)
    assert torch.equal(perturbed.target, plain.target)
    assert torch.equal(perturbed.clean, plain.clean)
    # x_t = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) (ε + γ ξ)
    scale = (1 - scheduler("linear").alphas_cumprod[plain.timesteps]).sqrt()[:, None, None, None]
    extra = (perturbed.noisy - plain.noisy) / scale / strength
    assert abs(extra.mean()) < 5 * extra.numel() ** -0.5
    assert abs(extra.var() - 1) < 5 * (2 / extra.numel()) ** 0.5
    noise = objective().noise(latents(), KEYS).target
    correlation = torch.corrcoef(torch.stack([extra.flatten(), noise.flatten()]))[0, 1]
    assert abs(correlation) < 5 * extra.numel() ** -0.5
    twice = objective("linear", prediction_type, input_perturbation=2 * strength).noise(latents(), KEYS)
    assert ((twice.noisy - plain.noisy) - 2 * (perturbed.noisy - plain.noisy)).abs().max() < 1e-5


# The loss


def test_the_plain_loss_is_the_mean_squared_error_of_each_example():
    examples = objective().noise(latents(), KEYS)
    prediction = torch.randn(latents().shape, generator=torch.Generator().manual_seed(1))
    expected = np.mean((prediction.numpy() - examples.target.numpy()).astype(np.float64) ** 2, axis=(1, 2, 3))
    loss = objective().loss(prediction, examples)
    assert loss.shape == (256,) and loss.dtype == torch.float32
    assert np.abs(loss.numpy() - expected).max() < 1e-5
    assert objective().loss(examples.target.clone(), examples).abs().max() == 0
    half = objective().loss(prediction.bfloat16(), examples)
    assert half.dtype == torch.float32 and (half - loss).abs().max() < 0.02


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("cap", [0.5, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_weights_are_those_of_the_diffusers_examples(schedule, cap, prediction_type):
    timesteps = torch.arange(T)
    weights = objective(schedule, prediction_type, snr_gamma=cap).snr_weights(timesteps)
    snr = compute_snr(scheduler(schedule), timesteps)
    capped = torch.stack([snr, cap * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    expected = capped / (snr if prediction_type == "epsilon" else snr + 1)
    assert weights.dtype == torch.float32
    assert (weights - expected).abs().max() < 1e-3 * expected.max()
    assert (weights[10:-10] / expected[10:-10] - 1).abs().max() < 1e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_weighted(prediction_type):
    weighted = objective("linear", prediction_type, snr_gamma=5.0)
    examples = weighted.noise(latents(), KEYS)
    prediction = torch.randn(latents().shape, generator=torch.Generator().manual_seed(1))
    plain = objective("linear", prediction_type).loss(prediction, examples)
    expected = plain * weighted.snr_weights(examples.timesteps)
    assert (weighted.loss(prediction, examples) / expected - 1).abs().max() < 1e-5
    assert (expected / plain).min() < 0.2


# The variational bound


def reference_vlb(prediction, fraction_output, examples, betas, prediction_type) -> np.ndarray:
    """The bound's term in bits per dimension (Nichol & Dhariwal 2021), in float64, example by example."""
    betas = betas.numpy()
    alpha_bar = np.cumprod(1 - betas)
    clean, noisy = examples.clean.double().numpy(), examples.noisy.double().numpy()
    prediction, output = prediction.double().numpy(), fraction_output.double().numpy()

    def posterior_variance(t):
        return betas[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])

    def posterior_mean(x0, xt, t):
        if t == 0:
            return x0
        at_x0 = np.sqrt(alpha_bar[t - 1]) * betas[t] / (1 - alpha_bar[t])
        at_xt = np.sqrt(1 - betas[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        return at_x0 * x0 + at_xt * xt

    bits = []
    for i, t in enumerate(examples.timesteps.tolist()):
        if prediction_type == "epsilon":
            x0 = noisy[i] / np.sqrt(alpha_bar[t]) - np.sqrt(1 / alpha_bar[t] - 1) * prediction[i]
        else:
            x0 = np.sqrt(alpha_bar[t]) * noisy[i] - np.sqrt(1 - alpha_bar[t]) * prediction[i]
        weight = (output[i] + 1) / 2
        smallest = posterior_variance(max(t, 1))
        variance = np.exp(weight * np.log(betas[t]) + (1 - weight) * np.log(smallest))
        mean = posterior_mean(x0, noisy[i], t)
        if t > 0:
            true_mean, true_variance = posterior_mean(clean[i], noisy[i], t), posterior_variance(t)
            nats = (
                np.log(np.sqrt(variance / true_variance))
                + (true_variance + (true_mean - mean) ** 2) / (2 * variance)
                - 0.5
            )
        else:
            # The integral of the Gaussian over the bin of one of 256 values.
            high = np.where(clean[i] > 0.999, 1.0, ndtr((clean[i] + 1 / 255 - mean) / np.sqrt(variance)))
            low = np.where(clean[i] < -0.999, 0.0, ndtr((clean[i] - 1 / 255 - mean) / np.sqrt(variance)))
            nats = -np.log(np.maximum(high - low, 1e-12))
        bits.append(nats.mean() / np.log(2))
    return np.array(bits)


def hybrid_case(prediction_type: str, schedule: str, error: float):
    """Every tenth timestep and the first ones, a prediction this far from the target, variances of all kinds."""
    learned = objective(schedule, prediction_type, learned_variance=True)
    examples = learned.noise(latents().clamp(-1, 1), KEYS)
    timesteps = (torch.arange(256) * 10).clamp(max=T - 1)
    timesteps[:40], timesteps[40:60] = 0, torch.arange(20) + 1
    signal, noise = (
        scale[:, None, None, None]
        for scale in (learned.alphas_cumprod[timesteps], 1 - learned.alphas_cumprod[timesteps])
    )
    epsilon = objective(schedule).noise(latents(), KEYS).target
    examples.timesteps = timesteps
    examples.noisy = (signal.sqrt() * examples.clean + noise.sqrt() * epsilon).float()
    velocity = (signal.sqrt() * epsilon - noise.sqrt() * examples.clean).float()
    examples.target = epsilon if prediction_type == "epsilon" else velocity
    generator = torch.Generator().manual_seed(2)
    prediction = examples.target + error * torch.randn(examples.target.shape, generator=generator)
    output = torch.rand(examples.target.shape, generator=generator) * 2.4 - 1.2
    return learned, examples, prediction, output


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_hybrid_loss_is_the_bound_plus_the_squared_error(schedule, prediction_type):
    learned, examples, prediction, output = hybrid_case(prediction_type, schedule, error=0.5)
    expected = reference_vlb(prediction, output, examples, learned.betas, prediction_type)
    simple = objective(schedule, prediction_type).loss(prediction, examples)
    found = (learned.loss(torch.cat([prediction, output], 1), examples) - simple).double().numpy()
    assert found.shape == (256,)
    assert np.abs(found[40:] - expected[40:]).max() < 2e-3 * (1 + np.abs(expected[40:]).max())
    assert (np.abs(found - expected) <= 1e-3 + 5e-3 * np.abs(expected)).all()


def test_the_first_timestep_is_a_likelihood():
    learned, examples, prediction, output = hybrid_case("epsilon", "linear", error=0.5)
    first = examples.timesteps == 0
    loss = learned.loss(torch.cat([prediction, output], 1), examples)
    simple = objective().loss(prediction, examples)
    # Only the likelihood of x_0 depends on where x_0 stands; a divergence is the same for a shifted x_0 and x_t.
    shift = 2.0
    moved = type(examples)(
        examples.noisy + shift * learned.alphas_cumprod[examples.timesteps].sqrt().float()[:, None, None, None],
        examples.timesteps,
        examples.target,
        examples.clean + shift,
    )
    change = (learned.loss(torch.cat([prediction, output], 1), moved) - loss).abs()
    assert change[first].min() > 0.05
    assert change[examples.timesteps > 20].max() < 0.02
    assert ((loss - simple)[first] > 0).all()


def test_a_perfect_mean_leaves_the_distance_of_the_variances():
    learned, examples, _, _ = hybrid_case("epsilon", "linear", error=0.0)
    ends = {}
    for output in (-1.0, 1.0):
        variance = torch.full_like(examples.target, output)
        ends[output] = learned.loss(torch.cat([examples.target, variance], 1), examples).double()
    later = examples.timesteps > 0
    # At -1 it is the posterior's own variance, at 1 it is β_t.
    assert ends[-1.0][later].abs().max() < 1e-4
    betas, bars = learned.betas, learned.alphas_cumprod
    t = examples.timesteps[later]
    ratio = (1 - bars[t - 1]) / (1 - bars[t])  # posterior variance over β_t
    assert (ends[1.0][later] - 0.5 * (ratio - 1 - ratio.log()) / math.log(2)).abs().max() < 1e-4
    assert ends[1.0][later].max() > 0.01 and len(betas) == T


def test_the_bound_teaches_the_variance_alone():
    learned, examples, prediction, output = hybrid_case("epsilon", "linear", error=0.5)
    both = torch.cat([prediction, output], 1).requires_grad_()
    learned.loss(both, examples).sum().backward()
    plain = prediction.clone().requires_grad_()
    objective().loss(plain, examples).sum().backward()
    assert torch.equal(both.grad[:, :3], plain.grad)
    assert both.grad.isfinite().all()
    assert (both.grad[:, 3:].abs().amax((1, 2, 3)) > 0).all()


def test_the_bound_is_not_weighted():
    learned, examples, prediction, output = hybrid_case("epsilon", "linear", error=0.5)
    weighted = objective("linear", snr_gamma=5.0, learned_variance=True)
    both = torch.cat([prediction, output], 1)
    bound = learned.loss(both, examples) - objective().loss(prediction, examples)
    found = weighted.loss(both, examples) - objective("linear", snr_gamma=5.0).loss(prediction, examples)
    assert (found - bound).abs().max() < 1e-3


def test_the_divergence_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    mean1, log1, mean2, log2 = (torch.randn(4, 1000, generator=generator, dtype=torch.float64) * 2).unbind()
    first, second = (
        torch.distributions.Normal(mean, (0.5 * log).exp()) for mean, log in ((mean1, log1), (mean2, log2))
    )
    expected = torch.distributions.kl_divergence(first, second)
    found = gaussian_kl(mean1, log1, mean2, log2)
    assert (found / expected - 1).abs().max() < 1e-9
    assert found.min() >= 0
    assert gaussian_kl(mean1, log1, mean1, log1).abs().max() < 1e-12


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.3), (0.9, 0.05), (-1.3, 0.5), (0.2, 3.0)])
def test_the_likelihoods_of_all_256_values_sum_to_one(mean, scale):
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_scale = torch.full_like(values, math.log(scale))
    log_likelihood = discretized_gaussian_log_likelihood(values, torch.full_like(values, mean), log_scale)
    assert abs(log_likelihood.exp().sum() - 1) < 1e-6
    normal = torch.distributions.Normal(*torch.tensor([mean, scale], dtype=torch.float64))
    expected = normal.cdf(values + 1 / 255) - normal.cdf(values - 1 / 255)
    expected[0], expected[-1] = normal.cdf(values[0] + 1 / 255), 1 - normal.cdf(values[-1] - 1 / 255)
    assert (log_likelihood.exp() - expected).abs().max() < 1e-9


def test_an_impossible_value_has_a_finite_likelihood_and_gradient():
    log_scale = torch.full((3,), -8.0, requires_grad=True)
    found = discretized_gaussian_log_likelihood(
        torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, -1.0]), log_scale
    )
    found.sum().backward()
    assert found.isfinite().all() and log_scale.grad.isfinite().all()


# Errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prediction_type": "sample"}, "'sample'.*epsilon, v_prediction"),
        ({"snr_gamma": 0.0}, "SNR cap gamma is 0.0"),
        ({"snr_gamma": -5.0}, "SNR cap gamma is -5.0"),
        ({"snr_gamma": float("nan")}, "SNR cap gamma is nan"),
        ({"input_perturbation": -0.1}, "input perturbation is -0.1"),
        ({"input_perturbation": float("nan")}, "input perturbation is nan"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        objective("linear", **options)
