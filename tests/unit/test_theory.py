"""The closed form against what it claims to be: regressions, limits, averages over training sets, a simulation."""

import csv
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special

from noisycond.errors import InputError
from noisycond.theory import simulation
from noisycond.theory.__main__ import main
from noisycond.theory.closed_form import Generated, entropy, generate, regress, sampler_map, squared_w2
from noisycond.theory.curves import averages, best_eta, best_gamma
from noisycond.theory.drawing import least_inside
from noisycond.theory.expectation import Variances, expected, expected_squared_w2, shrinkage
from noisycond.theory.guidance import best_under_guidance, guide, guided_squared_w2, pooled_squared_w2
from noisycond.theory.mixture import Mixture, TrainingSet, draw_training_set


MIXTURE = Mixture.drawn(4, 3, 1.5, seed=1)
COUNTS = [3, 5, 4, 8]


def training_set(samples=6, seed=2, mixture=MIXTURE):
    return draw_training_set(mixture, samples, seed)


def pooled(data):
    """Covariance around the class means, over all points."""
    centred = data.points - data.class_means[data.labels]
    return centred.T @ centred / len(centred)


def between(data):
    centred = data.class_means - data.points.mean(0)
    return (centred * data.counts[:, None]).T @ centred / len(data.points)


# --- one training set ------------------------------------------------------------------------------------------------


def test_without_corruption_each_class_gets_its_samples_mean_and_the_pooled_covariance():
    for samples in (6, COUNTS):
        data = training_set(samples)
        found = generate(data)
        assert np.abs(found.means - data.class_means).max() < 1e-10
        assert np.abs(found.covariance - pooled(data)).max() < 1e-10


def test_much_noise_drops_the_condition():
    data = training_set(COUNTS)
    found = generate(data, gamma=1e7)
    total = np.cov(data.points.T, bias=True)
    assert np.abs(found.means - data.points.mean(0)).max() < 1e-6
    assert np.abs(found.covariance - total).max() < 1e-6


@pytest.mark.parametrize(("noise", "variance"), [("gaussian", 1.0), ("uniform", 1 / 3)])
def test_equal_classes_shrink_as_the_formula_says(noise, variance):
    data = training_set()
    gamma, eta = 0.4, 0.15
    kept = (1 - eta * 4 / 3) / (1 + 4 * gamma**2 * variance)
    moved = 1 - (1 - eta * 4 / 3) ** 2 / (1 + 4 * gamma**2 * variance)
    how = shrinkage(4, gamma, noise, eta)
    assert how.kept == pytest.approx(kept, rel=1e-12) and how.moved == pytest.approx(moved, rel=1e-12)
    found, centre = generate(data, gamma, noise, eta), data.points.mean(0)
    assert np.abs(found.means - (centre + kept * (data.class_means - centre))).max() < 1e-10
    assert np.abs(found.covariance - (pooled(data) + moved * between(data))).max() < 1e-10


def test_it_is_the_least_squares_fit_of_drawn_examples():
    """The regression of x_0 on (x_t, c̃), by numbers: NumPy's least squares on many corrupted and noised examples."""
    data, rng = training_set(COUNTS), np.random.default_rng(0)
    gamma, eta, signal = 0.3, 0.2, 0.7
    chosen = rng.integers(len(data.points), size=400_000)
    labels = data.labels[chosen]
    flipped = (labels + rng.integers(1, 4, size=len(labels))) % 4
    told = np.where(rng.random(len(labels)) < eta, flipped, labels)
    condition = np.eye(4)[told] + gamma * rng.uniform(-1, 1, (len(labels), 4))
    noisy = signal * data.points[chosen] + np.sqrt(1 - signal**2) * rng.standard_normal((len(labels), 3))
    inputs = np.concatenate([noisy, condition, np.ones((len(labels), 1))], axis=1)
    fitted, *_ = np.linalg.lstsq(inputs, data.points[chosen], rcond=None)

    found = regress(data, gamma, "uniform", eta)
    left = found.residual
    gain = signal * left @ np.linalg.inv(signal**2 * left + (1 - signal**2) * np.eye(3))
    of_condition = (np.eye(3) - signal * gain) @ found.slope
    assert np.abs(fitted[:3].T - gain).max() < 0.01
    assert np.abs(fitted[3:7].T - of_condition).max() < 0.02


@pytest.mark.parametrize("classes", [10, 100, 300])
def test_many_classes_and_tiny_noise_lose_no_digits(classes):
    data = training_set(2, 0, Mixture.drawn(classes, 3, 1.0))
    embeddings = [None, np.random.default_rng(0).standard_normal((classes, 2 * classes))]
    for gamma, embedding in itertools.product((0.0, 1e-7, 1e-6), embeddings):
        found = generate(data, gamma, embedding=embedding)
        assert np.abs(found.means - data.class_means).max() < 1e-5
        assert np.abs(found.covariance - pooled(data)).max() < 1e-5


def test_flips_that_are_drawn_once_are_another_training_set():
    data = training_set(200)
    flipped = data.relabelled(0.3, seed=1)
    assert (flipped.points == data.points).all()
    changed = flipped.labels != data.labels
    assert changed.mean() == pytest.approx(0.3, abs=0.05)
    assert np.bincount((flipped.labels - data.labels)[changed] % 4, minlength=4)[1:].min() > 50  # each as likely
    assert (data.relabelled(0.3, seed=1).labels == flipped.labels).all()
    assert (data.relabelled(0.0).labels == data.labels).all()
    # With ever more samples it makes no difference whether they are drawn once or anew.
    once, anew = generate(training_set(20_000).relabelled(0.3)), generate(training_set(20_000), eta=0.3)
    assert np.abs(once.means - anew.means).max() < 0.05 and np.abs(once.covariance - anew.covariance).max() < 0.05
    with pytest.raises(InputError, match="leaves classes without examples"):
        draw_training_set(Mixture.drawn(100, 1, 1.0), 1).relabelled(0.5)


def test_another_embedding_of_the_same_classes_generates_the_same_without_noise():
    data, embedding = training_set(COUNTS), np.random.default_rng(0).standard_normal((4, 6))
    one_hot, other = generate(data, eta=0.1), generate(data, eta=0.1, embedding=embedding)
    assert np.abs(one_hot.means - other.means).max() < 1e-9
    assert np.abs(one_hot.covariance - other.covariance).max() < 1e-9
    scaled = generate(data, gamma=0.6, embedding=2 * np.eye(4))  # γ counts in units of the embedding
    assert np.abs(scaled.means - generate(data, gamma=0.3).means).max() < 1e-9


def test_many_steps_of_the_sampler_reach_the_limit():
    data, gaps = training_set(), []
    limit = generate(data, gamma=0.2)
    for steps in (20, 80, 320):
        times = np.linspace(0.998, 0.002, steps)
        found = generate(data, gamma=0.2, alphas_cumprod=np.cos(times * np.pi / 2) ** 2)
        gaps.append(np.abs(found.covariance - limit.covariance).max() + np.abs(found.means - limit.means).max())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] and gaps[2] < 0.05


def test_the_sampler_is_that_of_diffusers():
    """The exact denoiser as matrices in the simulation's sampler: moments agree to the error of drawing."""
    data = training_set(seed=5)
    found = regress(data, gamma=0.25)
    denoiser = simulation.LinearDenoiser(3, 4)
    for timestep, signal in enumerate(np.sqrt(simulation.alphas_cumprod()[::-1])):
        left, noise = found.residual, np.sqrt(1 - signal**2)
        gain = signal * left @ np.linalg.inv(signal**2 * left + noise**2 * np.eye(3))
        of_mean = np.eye(3) - signal * gain
        slope = of_mean @ found.slope
        offset = of_mean @ (found.mean - found.slope @ found.condition_mean)
        with torch.no_grad():  # ε̂ = (x_t - √ᾱ x̂_0) / √(1 - ᾱ)
            denoiser.of_data[timestep] = torch.from_numpy((np.eye(3) - signal * gain) / noise)
            denoiser.of_condition[timestep] = torch.from_numpy(-signal * slope / noise)
            denoiser.bias[timestep] = torch.from_numpy(-signal * offset / noise)
    means, covariance = simulation.draw(denoiser, 4, 3, 20_000, seed=0)
    exact = generate(data, gamma=0.25, alphas_cumprod=simulation.alphas_cumprod())
    assert np.abs(means - exact.means).max() < 5 * math.sqrt(covariance.max() / 20_000)
    assert np.abs(covariance - exact.covariance).max() < 5 * covariance.max() * math.sqrt(2 / 80_000)


def test_one_step_of_the_sampler():
    scale, kept = sampler_map(np.array([2.0]), np.array([0.36]))
    gain = 2 * 0.6 / (2 * 0.36 + 0.64)  # one step to ᾱ = 1 returns x̂_0
    assert scale[0] == pytest.approx(gain) and kept[0] == pytest.approx(1 - 0.6 * gain)


# --- distances and entropies -----------------------------------------------------------------------------------------


def test_entropy_and_w2_of_known_gaussians():
    assert entropy(np.diag([1.0, 4.0])) == pytest.approx(math.log(2 * math.pi * math.e) + math.log(2))
    apart = squared_w2(np.array([3.0, 0.0]), np.diag([1.0, 4.0]), np.zeros(2), np.diag([9.0, 1.0]))
    assert apart == pytest.approx(9 + 4 + 1)
    rotation = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = [rotation @ np.diag(values) @ rotation.T for values in ([1.0, 4.0], [9.0, 1.0])]
    assert squared_w2(np.zeros(2), turned[0], np.zeros(2), turned[1]) == pytest.approx(4 + 1)
    # Of covariances that do not commute, W2² = min over couplings: Gelbrich's bound is symmetric and a metric.
    one, other = turned[0], np.diag([9.0, 1.0])
    assert squared_w2(np.zeros(2), one, np.zeros(2), other) == pytest.approx(
        float(squared_w2(np.zeros(2), other, np.zeros(2), one))
    )


def test_roots_and_logarithms_of_chi_squares():
    scale, p, q = np.array([0.5, 2.0]), 7, 3
    plain = Variances(scale, 2, p - 2, q, 0.0, np.array([4.0, 9.0]))
    root = math.sqrt(2) * math.exp(special.gammaln((p + 1) / 2) - special.gammaln(p / 2))
    assert plain.mean_root() == pytest.approx(np.sqrt(scale) * root, rel=1e-10)
    assert plain.mean_log() == pytest.approx(np.log(scale) + special.digamma(p / 2) + math.log(2), rel=1e-10)
    whole = Variances(scale, 2, p - 2, q, 1.0, np.zeros(2))  # χ²_p + χ²_q
    root = math.sqrt(2) * math.exp(special.gammaln((p + q + 1) / 2) - special.gammaln((p + q) / 2))
    assert whole.mean_root() == pytest.approx(np.sqrt(scale) * root, rel=1e-10)
    alone = Variances(scale, 5, 0, 0, 0.0, np.zeros(2))  # E √(U a U) = √a E U
    assert alone.mean_root_with_own() == pytest.approx(np.sqrt(scale) * 5, rel=1e-10)
    assert Variances(scale, 0, 0, q, 0.0, np.zeros(2)).mean_log()[0] == -math.inf
    rng = np.random.default_rng(0)
    mixed = Variances(scale, 2, 1, q, 0.3, np.array([4.0, 9.0]))
    drawn = rng.chisquare(3, (400_000, 2)) + 0.3 * rng.noncentral_chisquare(q, [4.0, 9.0], (400_000, 2))
    assert mixed.mean_root() == pytest.approx(np.sqrt(scale * drawn).mean(0), rel=2e-3)
    assert mixed.mean_log() == pytest.approx(np.log(scale * drawn).mean(0), abs=4e-3)


# --- over training sets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "gamma", "noise", "eta"),
    [(3, 0.0, "gaussian", 0.0), (3, 0.25, "uniform", 0.0), (4, 0.1, "gaussian", 0.15), (12, 0.0, "gaussian", 0.1)],
)
def test_expectations_are_the_averages_over_training_sets(samples, gamma, noise, eta):
    """Each average is within four of its standard errors."""
    exact, found = expected(MIXTURE, samples, gamma, noise, eta), []
    for seed in range(400):
        data = training_set(samples, seed)
        made = generate(data, gamma, noise, eta)
        covariance = np.diag(np.diag(made.covariance))  # of the denoiser that treats each coordinate by itself
        to_truth = squared_w2(made.means, covariance, MIXTURE.means, MIXTURE.covariance).mean()
        own = [np.diag(np.diag(data.class_covariance(label))) for label in range(4)]
        to_samples = [squared_w2(made.means[y], covariance, data.class_means[y], own[y]) for y in range(4)]
        found.append([entropy(covariance), to_truth, np.mean(to_samples)])
    mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / math.sqrt(len(found))
    wanted = np.array([exact.entropy, exact.squared_w2, exact.squared_w2_to_samples])
    assert (np.abs(mean - wanted) < 4 * error).all(), (mean, wanted, error)


def test_more_samples_reach_the_limit():
    for gamma, eta in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.2)):
        limit = expected_squared_w2(MIXTURE, math.inf, gamma, eta=eta)
        assert expected_squared_w2(MIXTURE, 10**6, gamma, eta=eta) == pytest.approx(limit, abs=1e-4)
        found = generate(training_set(20_000), gamma, eta=eta)
        assert squared_w2(found.means, found.covariance, MIXTURE.means, MIXTURE.covariance).mean() == pytest.approx(
            limit, abs=0.05
        )
    assert expected_squared_w2(MIXTURE, math.inf) == 0


def test_slight_corruption_helps_and_much_hurts_and_less_the_more_samples_there_are():
    mixture = Mixture.drawn(10, 8, 1.0)
    best = {samples: best_gamma(mixture, samples) for samples in (2, 5, 50, 500)}
    strengths = [best[samples].strength for samples in best]
    gains = [best[samples].gain for samples in best]
    assert all(strength > 0 for strength in strengths)
    assert sorted(strengths, reverse=True) == strengths and sorted(gains, reverse=True) == gains
    assert strengths[1] / strengths[3] == pytest.approx(10, rel=0.05)  # as 1/√n
    assert gains[2] / gains[3] == pytest.approx(10, rel=0.05)  # as 1/n
    assert gains[1] > 0.15 and gains[2] < 0.03
    for samples in best:
        assert expected_squared_w2(mixture, samples, 3.0) > expected_squared_w2(mixture, samples)
        uniform = best_gamma(mixture, samples, "uniform")
        assert uniform.strength == pytest.approx(math.sqrt(3) * best[samples].strength, rel=1e-3)
        assert uniform.gain == pytest.approx(best[samples].gain, rel=1e-6)
        flips = best_eta(mixture, samples)
        assert 0 < flips.gain < best[samples].gain  # CEP takes more away than flips do


def test_full_matrices_are_a_little_worse_and_have_their_best_gamma_at_about_the_same_place():
    mixture, gammas = Mixture.drawn(10, 8, 1.0), (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
    full = averages(mixture, 5, 1.0, "gaussian", gammas, training_sets=60)
    alone = [expected_squared_w2(mixture, 5, gamma) for gamma in gammas]
    distances = [row.squared_w2 for row in full]
    assert all(0 < distance - other < 0.5 for distance, other in zip(distances, alone, strict=True))
    assert gammas[int(np.argmin(distances))] == gammas[int(np.argmin(alone))] == 0.15
    assert full[0].change == 0 and full[3].change == pytest.approx(-best_gamma(mixture, 5).gain, abs=0.05)
    assert full[3].change_error == pytest.approx(0.009, rel=0.5)  # of 60 sets, paired
    assert full[0].squared_w2_error == pytest.approx(0.135 * distances[0] / math.sqrt(60), rel=0.3)
    assert [row.entropy for row in full] == sorted(row.entropy for row in full)
    # One number a class and direction leaves nothing to vary: the entropy is that of a point.
    few = averages(Mixture.drawn(3, 8, 1.0), 2, 1.0, "uniform", (0.0, 0.3), training_sets=2)
    assert few[0].entropy == -math.inf and math.isnan(few[0].entropy_error) and few[0].squared_w2 > 0


def test_flips_drawn_anew_help_and_flips_drawn_once_do_not():
    mixture, etas = Mixture.drawn(10, 8, 1.0), (0.05, 0.1)
    for samples in (5, 50):
        anew, once = (averages(mixture, samples, 1.0, how, etas, training_sets=80) for how in ("eta", "eta_fixed"))
        assert all(row.change > 5 * row.change_error for row in once)
        assert all(one.squared_w2 < other.squared_w2 for one, other in zip(anew, once, strict=True))
    assert averages(mixture, 5, 1.0, "eta", [0.1], training_sets=40)[0].change < -0.1
    # What leaves classes without examples is left out.
    found = averages(Mixture.drawn(200, 1, 1.0), 1, 1.0, "eta_fixed", [0.0, 0.5], training_sets=2)
    assert [row.strength for row in found] == [0.0]


def test_one_sample_of_each_class():
    """No variance within classes is left, so all of it comes from corruption."""
    mixture = Mixture.drawn(10, 8, 1.0)
    clean = expected(mixture, 1)
    assert clean.squared_w2 == pytest.approx(8 + 8) and clean.entropy == -math.inf  # Σ/n of the means, and Σ
    best = best_gamma(mixture, 1)
    assert best.gain > 0.5 and expected(mixture, 1, best.strength).entropy > 0
    found = averages(mixture, 1, 1.0, "gaussian", [0.0, best.strength], training_sets=20)
    assert found[0].squared_w2 == pytest.approx(16, rel=0.1) and found[0].entropy == -math.inf
    assert found[1].change < -0.3


def test_coordinates_of_other_variances_are_scaled():
    """Units do not matter: a coordinate of variance 4 is one of variance 1, twice as large."""
    plain, scaled = Mixture.drawn(4, 2, 1.0, 3), Mixture.drawn(4, 2, 1.0, 3, variances=[4.0, 4.0])
    one, two = expected(plain, 3, gamma=0.2), expected(scaled, 3, gamma=0.2)
    assert two.squared_w2 == pytest.approx(4 * one.squared_w2) and two.entropy - one.entropy == pytest.approx(
        2 * math.log(2)
    )
    assert scaled.entropy == pytest.approx(entropy(np.diag([4.0, 4.0])))
    assert best_gamma(scaled, 3).strength == pytest.approx(best_gamma(plain, 3).strength, rel=1e-4)


def test_where_there_is_no_gain():
    mixture = Mixture.drawn(10, 8, 1.0)
    gammas = (0.0, 0.001, 0.01, 0.1, 1.0)
    of_all = [expected_squared_w2(mixture, math.inf, gamma) for gamma in gammas]
    to_samples = [expected(mixture, 5, gamma).squared_w2_to_samples for gamma in gammas]
    entropies = [expected(mixture, 5, gamma).entropy for gamma in gammas]
    assert sorted(of_all) == of_all and of_all[0] < of_all[1]
    assert sorted(to_samples) == to_samples  # away from the samples, always
    assert sorted(entropies) == entropies


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 2.25, 4.0])
def test_guidance_is_what_ddim_makes_of_two_denoisers(guidance):
    """ε̂ = ε̂_null + w (ε̂_class - ε̂_null) in 8000 steps, a class N(1.3, 0.7) in data N(0, 2.1)."""
    of_class, of_all, mean = 0.7, 2.1, 1.3

    def noise(of, centre, x, signal):
        x0 = centre + of * math.sqrt(signal) / (of * signal + 1 - signal) * (x - math.sqrt(signal) * centre)
        return (x - math.sqrt(signal) * x0) / math.sqrt(1 - signal)

    signals = 1 / (1 + np.exp(-np.linspace(-16, 16, 8000)))
    drawn = np.array([0.0, 1.0])  # x_T: the sampler is affine in it
    for now, then in zip(signals, [*signals[1:], 1.0], strict=True):
        null = noise(of_all, 0.0, drawn, now)
        guided = null + guidance * (noise(of_class, mean, drawn, now) - null)
        drawn = math.sqrt(then / now) * (drawn - math.sqrt(1 - now) * guided) + math.sqrt(1 - then) * guided
    found = guide(np.array([of_class]), np.array([of_all]), guidance)
    assert found.push[0] * mean == pytest.approx(drawn[0], rel=2e-3, abs=1e-6)
    assert found.variance[0] == pytest.approx((drawn[1] - drawn[0]) ** 2, rel=1e-2)


def test_the_classes_pooled():
    """As one Gaussian: label flips only shuffle the classes, without guidance; noise makes the whole narrower."""
    mixture = Mixture.drawn(10, 8, 1.0)
    assert pooled_squared_w2(mixture, 1.0, eta=0.3) == pytest.approx(0, abs=1e-12)
    drawn = generate(training_set(50_000, mixture=MIXTURE), 0.3)
    total = np.diag(np.cov(training_set(50_000).points.T))
    pooled = np.diag(drawn.covariance) + drawn.means.var(0)
    assert pooled_squared_w2(MIXTURE, 1.0, 0.3) == pytest.approx(np.square(pooled**0.5 - total**0.5).sum(), rel=0.02)
    found = [pooled_squared_w2(mixture, 2.25, eta=eta) for eta in (0.0, 0.1, 0.2)]
    assert found[0] > found[1] > found[2]
    # Under much guidance slight flips do not help all classes together, though each of them.
    assert pooled_squared_w2(mixture, 4.0, eta=0.1) > pooled_squared_w2(mixture, 4.0)
    assert guided_squared_w2(mixture, 4.0, eta=0.1) < guided_squared_w2(mixture, 4.0)


def test_corruption_takes_guidance_back():
    mixture = Mixture.drawn(10, 8, 1.0)
    assert best_under_guidance(mixture, 1.0, "gaussian").strength == 0  # nothing to gain with ever more samples
    assert guided_squared_w2(mixture, 1.0, 0.3) == pytest.approx(expected_squared_w2(mixture, math.inf, 0.3))
    for how, left in (("gaussian", 0.01), ("uniform", 0.01), ("eta", 0.12)):
        best = [best_under_guidance(mixture, guidance, how) for guidance in (1.25, 1.5, 2.25, 4.0)]
        strengths = [found.strength for found in best]
        assert strengths[0] > 0 and sorted(strengths) == strengths  # more guidance wants more corruption
        assert all(1 - found.gain < left for found in best)
    # What is left after η = 0.1 at guidance 1.5 is what a smaller guidance scale leaves of a clean model.
    assert guided_squared_w2(mixture, 1.5, eta=0.1) < 0.5 * guided_squared_w2(mixture, 1.5)


# --- the simulation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "gamma", "noise", "eta", "mode"),
    [
        (4, 0.0, "gaussian", 0.0, "random"),
        (4, 0.4, "gaussian", 0.0, "random"),
        (4, 0.6, "uniform", 0.0, "random"),
        ([2, 4, 8], 0.3, "gaussian", 0.2, "random"),
        (6, 0.0, "gaussian", 0.2, "fixed"),
    ],
    ids=["clean", "gaussian", "uniform", "unequal classes, flips and noise", "flips drawn once"],
)
def test_what_the_code_trains_and_draws_is_what_the_closed_form_says(samples, gamma, noise, eta, mode):
    mixture = Mixture.drawn(3, 2, 1.5, seed=1)
    data = training_set(samples, 2, mixture)
    told = simulation.relabel(data, eta, seed=0) if mode == "fixed" else data
    how = (gamma, noise, 0.0 if mode == "fixed" else eta)
    exact = generate(told, *how, alphas_cumprod=simulation.alphas_cumprod())
    sizes = {"trainings": 3, "steps": 500, "batch_size": 512, "samples": 5000}
    found = simulation.simulate(data, gamma, noise, eta, mode, **sizes)
    error, mean = found.error(), found.mean()
    off = [np.abs(mean.means - exact.means).max(), np.abs(mean.covariance - exact.covariance).max()]
    errors = [error.means.max(), error.covariance.max()]
    print(f"off by {off[0]:.3f} and {off[1]:.3f}, standard errors up to {errors[0]:.3f} and {errors[1]:.3f}")
    assert max(errors) < 0.025 and max(off) < 0.035
    if gamma or eta:  # and not what it says without corruption
        clean = generate(data, alphas_cumprod=simulation.alphas_cumprod())
        assert np.abs(mean.means - clean.means).max() > 0.25


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_figures_data(tmp_path, monkeypatch):
    monkeypatch.setattr("noisycond.theory.__main__.SAMPLES_SWEPT", (5, 50))
    monkeypatch.setattr("noisycond.theory.__main__.DIMS_SWEPT", (1, 8))
    monkeypatch.setattr("noisycond.theory.__main__.SEPARATIONS_SWEPT", (0.2, 1.0))
    words = ["--samples", "5", "50", "--gamma", "0", "0.15", "1", "--eta", "0", "0.1", "--training_sets", "20"]
    main([*words, "--output_dir", str(tmp_path)])
    with (tmp_path / "curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    found = [(row["sweep"], row["samples"], row["gamma"], row["eta"]) for row in curves]
    assert found[:3] == [("gamma", "5", gamma, "0") for gamma in ("0", "0.15", "1")]
    assert len(found) == 2 * 3 + 2 * 2
    mixture = Mixture.drawn(10, 8, 1.0)
    for row in curves[6:]:
        exact = expected(mixture, int(row["samples"]), eta=float(row["eta"]))
        assert float(row["w2"]) ** 2 == pytest.approx(exact.squared_w2, rel=1e-6)
        assert float(row["entropy"]) == pytest.approx(exact.entropy, rel=1e-6)
    stored = {  # entropy, W2 to the truth, W2 to the samples
        ("5", "0"): (10.3581009, 1.33353646, 0.832320745),
        ("5", "0.15"): (11.2724514, 1.19766444, 1.07863144),
        ("50", "0"): (11.2625286, 0.410958946, 0.268010125),
        ("50", "1"): (13.7094751, 2.63919716, 2.68702613),
    }
    rows = {(row["samples"], row["gamma"]): row for row in curves[:6]}
    for place, values in stored.items():
        found = [float(rows[place][name]) for name in ("entropy", "w2", "w2_to_samples")]
        assert found == pytest.approx(values, rel=1e-7)
    with (tmp_path / "best.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = {(row["how"], row["dim"], row["samples"]): row for row in rows if row["sweep"] == "samples"}
    over_dims = {(row["how"], row["dim"]): float(row["gain"]) for row in rows if row["sweep"] == "dim"}
    assert over_dims["gaussian", "1"] == pytest.approx(0.195622370, rel=1e-6)
    assert float(best["gaussian", "8", "5"]["gain"]) == pytest.approx(over_dims["gaussian", "8"], rel=1e-6)
    gains = {(row["separation"], row["samples"]): float(row["gain"]) for row in rows if row["sweep"] == "map"}
    assert float(best["gaussian", "8", "5"]["best"]) == pytest.approx(0.144225114, rel=1e-4)
    assert float(best["gaussian", "8", "5"]["gain"]) == pytest.approx(0.194231329, rel=1e-6)
    assert float(best["eta", "8", "50"]["gain"]) < float(best["gaussian", "8", "50"]["gain"]) < 0.03
    assert float(best["gaussian", "8", "5"]["entropy_without"]) == pytest.approx(10.3581009, rel=1e-7)
    assert float(best["gaussian", "8", "5"]["true_entropy"]) == pytest.approx(11.351508, rel=1e-7)
    with (tmp_path / "full_matrices.csv").open() as file:
        full = {(row["how"], row["samples"], row["strength"]): row for row in csv.DictReader(file)}
    assert len(full) == 2 * (3 + 2 + 2)
    assert float(full["gaussian", "5", "0.15"]["squared_w2"]) == pytest.approx(1.70, abs=0.15)
    assert float(full["eta", "5", "0.1"]["change"]) < 0 < float(full["eta_fixed", "5", "0.1"]["change"])
    assert gains["1", "5"] == pytest.approx(0.194231329, rel=1e-6)
    assert gains["0.2", "5"] > 2 * gains["1", "5"] and gains["0.2", "50"] < gains["0.2", "5"]
    with (tmp_path / "guidance.csv").open() as file:
        points = list(csv.DictReader(file))
    guided = {(row["how"], row["guidance_scale"], row["strength"]): float(row["w2"]) for row in points}
    assert len(guided) == 4 * (3 + 2) and guided["eta", "1", "0"] == 0
    assert guided["gaussian", "2.25", "0"] == guided["eta", "2.25", "0"] == pytest.approx(2.24462306, rel=1e-6)
    assert guided["eta", "2.25", "0.1"] == pytest.approx(1.85594600, rel=1e-6)
    assert float(points[-1]["pooled_w2"]) ** 2 == pytest.approx(pooled_squared_w2(mixture, 4.0, eta=0.1), rel=1e-6)
    for name in ("gamma", "eta", "samples", "dim", "guidance", "map"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_the_command_with_uniform_noise_one_sample_and_few_dimensions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("noisycond.theory.__main__.SAMPLES_SWEPT", (3, 5))
    monkeypatch.setattr("noisycond.theory.__main__.SEPARATIONS_SWEPT", (0.5, 1.0))
    words = ["--noise", "uniform", "--samples", "1", "--classes", "2", "--dim", "2", "--variances", "1", "4"]
    main(
        [*words, "--training_sets", "2", "--guidance_scale", "0", "2", "--gamma", "0.3", "--output_dir", str(tmp_path)]
    )
    mixture = Mixture.drawn(2, 2, 1.0, variances=[1.0, 4.0])
    best = best_gamma(mixture, 1, "uniform")
    assert f"n = 1: best γ {best.strength:.3g} takes {best.gain:.2%}" in capsys.readouterr().out
    rows = {name: list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("curves", "guidance", "best")}
    assert float(rows["curves"][0]["w2"]) ** 2 == pytest.approx(expected_squared_w2(mixture, 1, 0.3, "uniform"))
    assert {row["how"] for row in rows["guidance"]} == {"uniform", "eta"}
    found = {row["guidance_scale"]: float(row["w2"]) ** 2 for row in rows["guidance"] if row["how"] == "uniform"}
    assert found["2"] == pytest.approx(guided_squared_w2(mixture, 2.0, 0.3, "uniform"), rel=1e-6)
    assert {row["how"] for row in rows["best"] if row["sweep"] == "map"} == {"uniform"}
    assert {row["dim"] for row in rows["best"]} == {"2"}  # variances per coordinate fix d


def test_the_least_value_of_a_curve_is_marked_unless_the_curve_ends_there():
    assert least_inside([3.0, 1.0, 2.0]) == 1 and least_inside([0.0, 1.0]) == 0
    assert least_inside([3.0, 2.0, 1.0]) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--classes", "1"], "--classes is 1, but a mixture needs at least two"),
        (["--samples", "0"], "fewer samples than classes"),
        (["--samples", "5", "5"], "--samples names a number twice"),
        (["--samples", "2000000"], "at most 1,000,000"),
        (["--samples", *map(str, range(1, 10))], "--samples has 9 values, but a figure has 7 lines"),
        (["--gamma", "-0.1"], "--gamma has -0.1, but it must be 0 or a positive number"),
        (["--gamma", "nan"], "--gamma has nan, but it must be"),
        (["--gamma", "inf"], "--gamma has inf, but it must be"),
        (["--eta", "1.5"], "--eta has 1.5, but it must lie between 0 and 1"),
        (["--separation", "0"], "--separation is 0.0, but it must be a positive number"),
        (["--dim", "3", "--variances", "1", "1", "0"], "--variances is 1 1 0, but each must be a positive number"),
        (["--dim", "3", "--variances", "1", "2"], "--variances has 2 numbers, but it takes one"),
        (["--training_sets", "1"], "--training_sets is 1"),
        (["--guidance_scale", "-1"], "--guidance_scale has -1.0, but it must be"),
        (["--seed", "-1"], "--seed is -1"),
        (["--output_dir", __file__], "--output_dir"),
        (["--nois", "uniform"], "did you mean '--noise'"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2 and sentence in capsys.readouterr().err


def test_what_is_not_a_mixture_is_refused():
    with pytest.raises(InputError, match="the covariance is singular"):
        Mixture(np.eye(2), np.ones((2, 2)))
    with pytest.raises(InputError, match="symmetric"):
        Mixture(np.eye(2), np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(InputError, match="fewer than the 3 classes"):
        TrainingSet(np.zeros((2, 2)), np.array([0, 1]), 3)
    with pytest.raises(InputError, match="--gamma is -1, but it must be 0 or a positive number"):
        regress(training_set(), gamma=-1)
    with pytest.raises(InputError, match="unknown|must be one of"):
        regress(training_set(), noise="laplace")
    with pytest.raises(InputError, match="singular"):
        entropy(generate(training_set(1)).covariance)
    with pytest.raises(InputError, match="diagonal"):
        expected(Mixture(np.eye(2), np.array([[1.0, 0.5], [0.5, 1.0]])), 3)
    assert isinstance(generate(training_set()), Generated)


def test_no_training_set_has_the_noise_that_made_the_class_means(monkeypatch):
    mixture, seen = Mixture.drawn(10, 8, 1.0, seed=0), []

    def noted(*given, **named):
        seen.append(draw_training_set(*given, **named))
        return seen[-1]

    monkeypatch.setattr("noisycond.theory.curves.draw_training_set", noted)
    averages(mixture, 5, 1.0, "gaussian", [0.0], training_sets=4)
    assert len(seen) == 4
    for data in seen:
        noise = (data.points - mixture.means[data.labels])[: len(mixture.means)]
        assert abs(np.corrcoef(noise.ravel(), mixture.means.ravel())[0, 1]) < 0.5
