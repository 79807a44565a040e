"""Condition embedding perturbation: its scale, when it is the identity, and what it is a function of."""

import pytest
import scipy.stats
import torch
from torch.utils.checkpoint import checkpoint

from noisycond.perturbation import (
    CEP_TYPES,
    ConditionEmbeddingPerturbation,
    embedding_dropout,
    smooth_embedding,
)


KEYS = torch.arange(4000)


def delta(gamma: float, type: str, dim: int, size: int = 4000, tokens: tuple[int, ...] = ()) -> torch.Tensor:
    """What is added to an embedding of zeros, float64."""
    perturb = ConditionEmbeddingPerturbation(gamma, type)
    return perturb(torch.zeros(size, *tokens, dim), keys=torch.arange(size)).double()


# The scale


@pytest.mark.parametrize(("gamma", "dim"), [(0.25, 16), (1.0, 16), (4.0, 16), (4.0, 50)])
def test_uniform_lies_within_gamma_over_root_d(gamma, dim):
    draws, bound = delta(gamma, "uniform", dim), gamma / dim**0.5
    assert draws.abs().max() <= bound
    assert draws.max() > 0.999 * bound and draws.min() < -0.999 * bound
    assert scipy.stats.kstest(draws.flatten().numpy(), "uniform", (-bound, 2 * bound)).pvalue > 1e-4


@pytest.mark.parametrize(("gamma", "dim"), [(0.25, 16), (1.0, 16), (4.0, 16), (4.0, 50)])
@pytest.mark.parametrize(("type", "of_gamma_squared", "kurtosis"), [("uniform", 1 / 3, 1.8), ("gaussian", 1.0, 3.0)])
def test_mean_and_variance_per_coordinate(gamma, dim, type, of_gamma_squared, kurtosis):
    draws = delta(gamma, type, dim)
    # γ²/(3D) and γ²/D: a scale of √(γ/D) or γ/D would be off by more than half at every γ but 1.
    variance = gamma**2 * of_gamma_squared / dim
    size = draws.numel()
    assert abs(draws.mean()) < 4.5 * (variance / size) ** 0.5
    assert abs(draws.var() / variance - 1) < 4.5 * ((kurtosis - 1) / size) ** 0.5
    # And of each coordinate.
    assert (draws.mean(0) / variance**0.5).abs().max() < 5 * 4000**-0.5
    assert (draws.var(0) / variance - 1).abs().max() < 5 * ((kurtosis - 1) / 4000) ** 0.5


def test_gaussian_is_gaussian():
    draws = delta(2.0, "gaussian", 25)
    assert scipy.stats.kstest(draws.flatten().numpy(), "norm", (0, 2.0 / 5)).pvalue > 1e-4


def test_d_is_the_last_dimension():
    draws = delta(1.0, "gaussian", 64, size=200, tokens=(9,))
    assert abs(draws.var() * 64 - 1) < 4.5 * (2 / draws.numel()) ** 0.5


@pytest.mark.parametrize("type", CEP_TYPES)
def test_coordinates_tokens_and_examples_are_independent(type):
    draws = delta(1.0, type, 4, size=20_000, tokens=(3,)).flatten(1)
    matrix = torch.corrcoef(draws.T) - torch.eye(12)
    assert matrix.abs().max() < 5 * 20_000**-0.5
    assert abs(torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]) < 5 * 20_000**-0.5


@pytest.mark.parametrize("type", CEP_TYPES)
def test_it_is_added(type):
    embedding = torch.randn(50, 7, 8, generator=torch.Generator().manual_seed(0))
    perturb = ConditionEmbeddingPerturbation(0.5, type)
    expected = embedding + perturb.draw(embedding.shape, KEYS[:50])
    assert torch.equal(perturb(embedding, keys=KEYS[:50]), expected)
    assert (expected - embedding).abs().max() > 0.1


# The identity


@pytest.mark.parametrize("type", CEP_TYPES)
@pytest.mark.parametrize("keys", [None, KEYS[:5]])
def test_eval_mode_and_gamma_zero_are_the_identity(type, keys):
    embedding = torch.randn(5, 3, 8)
    assert ConditionEmbeddingPerturbation(1.0, type).eval()(embedding, keys=keys) is embedding
    assert ConditionEmbeddingPerturbation(0.0, type)(embedding, keys=keys) is embedding
    perturb = ConditionEmbeddingPerturbation(1.0, type)
    assert not torch.equal(perturb(embedding, keys=keys), embedding)
    assert perturb.eval()(embedding, keys=keys, where=torch.ones(5, dtype=torch.bool)) is embedding
    assert not torch.equal(perturb.train()(embedding, keys=keys), embedding)


@pytest.mark.parametrize("keys", [None, KEYS[:6]])
def test_where_leaves_the_others_as_they_are(keys):
    embedding = torch.randn(6, 3, 8)
    where = torch.tensor([True, False, False, True, True, False])
    perturb = ConditionEmbeddingPerturbation(1.0)
    result = perturb(embedding, keys=keys, where=where)
    assert torch.equal(result[~where], embedding[~where])
    assert ((result - embedding)[where].abs().amax((1, 2)) > 0.1).all()
    if keys is not None:
        assert torch.equal(result[where], perturb(embedding, keys=keys)[where])


# What it is a function of


@pytest.mark.parametrize("type", CEP_TYPES)
def test_with_keys_it_is_a_pure_function(type):
    embedding = torch.zeros(33, 5, 7)
    perturb = ConditionEmbeddingPerturbation(1.0, type, seed=4)
    whole = perturb(embedding, keys=KEYS[:33])
    perturb(embedding)
    assert torch.equal(perturb(embedding, keys=KEYS[:33]), whole)
    again = ConditionEmbeddingPerturbation(1.0, type, seed=4)
    parts = [again(embedding[at], keys=KEYS[at]) for at in (slice(0, 10), slice(10, 11), slice(11, 33))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(again(embedding, keys=KEYS[:33].flip(0)), whole.flip(0))
    assert (again(embedding, keys=KEYS[100:133]) - whole).abs().amax((1, 2)).min() > 0.1
    other_seed = ConditionEmbeddingPerturbation(1.0, type, seed=5)
    assert (other_seed(embedding, keys=KEYS[:33]) - whole).abs().amax((1, 2)).min() > 0.1


def test_gamma_scales_the_same_draw():
    one, four = (ConditionEmbeddingPerturbation(gamma).draw((10, 9), KEYS[:10]) for gamma in (1.0, 4.0))
    assert (four - 4 * one).abs().max() < 1e-6


def test_the_own_stream_differs_on_every_call():
    embedding = torch.zeros(64, 16)
    perturb = ConditionEmbeddingPerturbation(1.0, "gaussian", seed=2)
    draws = torch.stack([perturb(embedding).flatten() for _ in range(4)])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 5 * 1024**-0.5
    again = ConditionEmbeddingPerturbation(1.0, "gaussian", seed=2)
    assert torch.equal(torch.stack([again(embedding).flatten() for _ in range(4)]), draws)
    rows = draws[0].reshape(64, 16)
    assert len(rows.unique(dim=0)) == 64


def test_the_own_stream_is_not_that_of_the_first_steps():
    embedding = torch.zeros(8, 16)
    perturb = ConditionEmbeddingPerturbation(1.0)
    own = [perturb(embedding) for _ in range(3)]
    for step in range(4):
        keyed = perturb(embedding, keys=torch.arange(8) + (step << 32))
        assert all((keyed - draws).abs().amax(1).min() > 0.05 for draws in own)


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    for type in CEP_TYPES:
        perturb = ConditionEmbeddingPerturbation(1.0, type)
        perturb(torch.zeros(4, 8))
        perturb(torch.zeros(4, 8), keys=KEYS[:4])
    embedding_dropout(torch.ones(4, 8), 0.5, 0, KEYS[:4])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    first = ConditionEmbeddingPerturbation(1.0)(torch.zeros(4, 8))
    torch.manual_seed(2)
    assert torch.equal(ConditionEmbeddingPerturbation(1.0)(torch.zeros(4, 8)), first)


# As a module


@pytest.mark.parametrize("type", CEP_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_stays_and_the_draw_is_float32(type, dtype):
    embedding = torch.randn(20, 6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    perturb = ConditionEmbeddingPerturbation(1.0, type)
    drawn = perturb.draw(embedding.shape, KEYS[:20])
    assert drawn.dtype == torch.float32 and len(drawn.unique()) > 0.95 * drawn.numel()
    result = perturb(embedding, keys=KEYS[:20])
    assert result.dtype == dtype and torch.equal(result, embedding + drawn.to(dtype))
    some = perturb(embedding, keys=KEYS[:20], where=KEYS[:20] < 5)
    assert some.dtype == dtype and torch.equal(some[:5], result[:5])


def test_it_has_no_state_and_survives_autocast():
    perturb = ConditionEmbeddingPerturbation(1.0)
    perturb(torch.zeros(2, 4))
    assert not perturb.state_dict() and not list(perturb.parameters()) and not list(perturb.buffers())
    with torch.autocast("cpu", torch.bfloat16):
        result = perturb(torch.zeros(2, 4), keys=KEYS[:2])
    assert torch.equal(result, perturb(torch.zeros(2, 4), keys=KEYS[:2]))


def test_the_gradient_passes_unchanged():
    embedding = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(3, 4)
    (ConditionEmbeddingPerturbation(1.0)(embedding) * weight).sum().backward()
    assert torch.equal(embedding.grad, weight)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("type", CEP_TYPES)
def test_a_recomputed_forward_sees_the_same_draw(reentrant, type):
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    perturb = ConditionEmbeddingPerturbation(1.0, type)
    seen = []

    def gradients(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        x = inputs.clone().requires_grad_()

        def forward(x):
            perturbed = perturb(layers[0](x), keys=KEYS[:5])
            seen.append(perturbed.detach())
            return layers[1](perturbed.sin()).square()

        out = checkpoint(forward, x, use_reentrant=reentrant) if recompute else forward(x)
        out.sum().backward()
        return [x.grad, *(parameter.grad for parameter in layers.parameters())]

    plain, recomputed = gradients(False), gradients(True)
    assert len(seen) == 3 and all(torch.equal(draws, seen[0]) for draws in seen)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert plain[1].abs().max() > 0


@pytest.mark.parametrize("gamma", [-0.1, float("nan"), float("inf"), -float("inf")])
def test_a_gamma_that_is_no_scale_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        ConditionEmbeddingPerturbation(gamma)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="'laplace'.*uniform, gaussian"):
        ConditionEmbeddingPerturbation(1.0, "laplace")


def test_the_defaults_are_the_paper_s():
    perturb = ConditionEmbeddingPerturbation()
    assert (perturb.gamma, perturb.type) == (1.0, "uniform")
    assert "gamma=1.0" in repr(perturb) and "uniform" in repr(perturb)


# The baselines


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_embedding_dropout_zeroes_this_share_and_scales_the_rest(probability):
    embedding = torch.full((1000, 40), 3.0)
    result = embedding_dropout(embedding, probability, 0, KEYS[:1000])
    kept = result != 0
    assert (
        abs(kept.double().mean().item() - (1 - probability)) < 4.5 * (probability * (1 - probability) / 40_000) ** 0.5
    )
    assert (result[kept] - 3.0 / (1 - probability)).abs().max() < 1e-5
    assert abs(result.mean() - 3.0) < 4.5 * 3 * (probability / (1 - probability) / 40_000) ** 0.5
    # Coordinates drop on their own: no example and no coordinate goes as a whole.
    assert kept.any(0).all() and not kept.all(0).any()
    assert (torch.corrcoef(kept[:, :5].double().T) - torch.eye(5)).abs().max() < 5 * 1000**-0.5


def test_embedding_dropout_is_a_pure_function():
    embedding = torch.randn(20, 3, 8)
    whole = embedding_dropout(embedding, 0.5, 1, KEYS[:20])
    parts = [embedding_dropout(embedding[at], 0.5, 1, KEYS[:20][at]) for at in (slice(0, 7), slice(7, 20))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(embedding_dropout(embedding, 0.5, 2, KEYS[:20]), whole)
    assert not torch.equal(embedding_dropout(embedding, 0.5, 1, KEYS[20:40]), whole)
    assert torch.equal(embedding_dropout(embedding, 0.0, 1, KEYS[:20]), embedding)
    assert embedding_dropout(embedding.bfloat16(), 0.5, 1, KEYS[:20]).dtype == torch.bfloat16


def test_dropout_and_perturbation_draw_on_their_own():
    dropped = embedding_dropout(torch.ones(4000, 4), 0.5, 0, KEYS).flatten()
    draws = ConditionEmbeddingPerturbation(1.0).draw((4000, 4), KEYS).flatten()
    assert abs(torch.corrcoef(torch.stack([dropped, draws]))[0, 1]) < 5 * 16_000**-0.5


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_smoothing_mixes_in_the_mean_of_all_classes(smoothing):
    table = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 5, 5, 2])
    expected = (1 - smoothing) * table[labels] + smoothing * sum(table) / 6
    assert (smooth_embedding(table[labels], table, smoothing) - expected).abs().max() < 1e-6


def test_smoothing_is_smoothing_of_the_labels():
    # (1 - s) one-hot + s/K times the table.
    table = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 5, 5, 2])
    soft = torch.nn.functional.one_hot(labels, 6) * 0.8 + 0.2 / 6
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((soft @ table * weight).sum(), table)[0]
    found = torch.autograd.grad((smooth_embedding(table[labels], table, 0.2) * weight).sum(), table)[0]
    assert (found - expected).abs().max() < 1e-6
    assert smooth_embedding(table[labels].bfloat16(), table, 0.2).dtype == torch.bfloat16


# What attach.py asks of it


def test_scale_and_tokens():
    perturb, keys = ConditionEmbeddingPerturbation(1.0), KEYS[:3]
    plain = perturb(torch.zeros(3, 4, 8), keys)
    scaled = perturb(torch.zeros(3, 4, 8), keys, scale=torch.tensor([0.0, 1.0, 0.5]))
    assert (scaled - plain * torch.tensor([0.0, 1.0, 0.5])[:, None, None]).abs().max() < 1e-6
    assert (perturb(torch.zeros(3, 4, 8), keys, scale=torch.tensor(0.5)) - 0.5 * plain).abs().max() < 1e-6
    tokens = torch.arange(12).reshape(3, 4) % 3 == 0
    assert torch.equal(perturb(torch.zeros(3, 4, 8), keys, where=tokens), plain * tokens[..., None])


@pytest.mark.parametrize("type", CEP_TYPES)
def test_shared_over_tokens(type):
    perturb = ConditionEmbeddingPerturbation(1.0, type, shared=True)
    result = perturb(torch.zeros(2, 5, 8), KEYS[:2])
    assert torch.equal(result, result[:, :1].expand(2, 5, 8)) and result[0, 0].unique().numel() == 8
    flat = torch.zeros(2, 8)
    assert torch.equal(perturb(flat, KEYS[:2]), ConditionEmbeddingPerturbation(1.0, type)(flat, KEYS[:2]))


def test_purposes_are_independent():
    first, second = (ConditionEmbeddingPerturbation(1.0, purpose=name).draw((4000, 4), KEYS) for name in ("a", "b"))
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 5 * 16_000**-0.5
