"""Random draws: the published known answers, their distributions, and that they depend on nothing but their keys."""

import random

import numpy as np
import pytest
import scipy.stats
import torch

from noisycond import randomness
from noisycond.randomness import Purpose


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(np.corrcoef(a.flatten().double().numpy(), b.flatten().double().numpy())[0, 1])


# The generator


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    # kat_vectors of Random123, philox4x32 with 10 rounds.
    words = randomness.philox_4x32([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 13])
def test_bits_are_words_of_32_bits(size):
    bits = randomness.random_bits(0, "test", torch.arange(1000), size)
    assert bits.shape == (1000, size) and bits.dtype == torch.int64
    assert bits.min() >= 0 and bits.max() < 2**32
    # Each of the 32 bits is set in half of the words: 4.5 standard errors.
    share = ((bits.flatten()[:, None] >> torch.arange(32)) & 1).double().mean(0)
    assert (share - 0.5).abs().max() < 4.5 * 0.5 / bits.numel() ** 0.5


def test_the_words_of_one_key_differ():
    bits = randomness.random_bits(0, "test", torch.arange(500), 40)
    assert len(bits.unique()) > 0.999 * bits.numel()


def test_more_words_begin_with_the_same_words():
    keys = torch.arange(20)
    assert torch.equal(
        randomness.random_bits(3, "test", keys, 11), randomness.random_bits(3, "test", keys, 30)[:, :11]
    )


@pytest.mark.parametrize("bit", [0, 31, 32, 33, 40, 62, 63])
def test_all_64_bits_of_a_key_count(bit):
    key = torch.tensor([12345])
    other = key ^ torch.tensor([-(2**63) if bit == 63 else 2**bit])
    a, b = randomness.random_bits(0, "test", key, 8), randomness.random_bits(0, "test", other, 8)
    assert (a != b).all()


# Independence of the batch

DRAWS = {
    "bits": lambda keys, epoch: randomness.random_bits(7, "test", keys, 5, epoch),
    "uniform": lambda keys, epoch: randomness.uniform(7, "test", keys, (3, 5), epoch),
    "normal": lambda keys, epoch: randomness.normal(7, "test", keys, (3, 3, 5), epoch),
    "bernoulli": lambda keys, epoch: randomness.bernoulli(7, "test", keys, 0.3, epoch),
    "randint": lambda keys, epoch: randomness.randint(7, "test", keys, 1000, epoch),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_does_not_depend_on_the_batch(name):
    keys = torch.arange(101) * 7919 - 50
    draw = DRAWS[name]
    whole = draw(keys, 2)
    for size in (1, 2, 3, 7, 17, 64, 100):
        parts = [draw(keys[first : first + size], 2) for first in range(0, len(keys), size)]
        assert torch.equal(torch.cat(parts), whole), size
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(keys[order], 2), whole[order])
    assert torch.equal(draw(keys, 2), whole)


@pytest.mark.parametrize("name", DRAWS)
def test_an_epoch_per_example_is_the_epoch_of_each(name):
    keys, epochs = torch.arange(60), torch.arange(60) % 3
    draw = DRAWS[name]
    mixed = draw(keys, epochs)
    for epoch in range(3):
        assert torch.equal(mixed[epochs == epoch], draw(keys, epoch)[epochs == epoch])
    assert not torch.equal(draw(keys, 0), draw(keys, 1))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 8, 8)])
def test_shapes(shape):
    keys = torch.arange(6)
    for draw in (randomness.uniform, randomness.normal):
        draws = draw(0, "test", keys, shape)
        assert draws.shape == (6, *shape) and draws.dtype == torch.float32
    assert randomness.uniform(0, "test", keys[:0], shape).shape == (0, *shape)


# Distributions


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_uniform_draws_are_uniform(seed):
    draws = randomness.uniform(seed, "test", torch.arange(2000), (100,)).double().flatten()
    assert draws.min() > 0.0 and draws.max() < 1.0
    size = len(draws)
    assert abs(draws.mean() - 0.5) < 4.5 * (1 / 12 / size) ** 0.5
    assert abs(draws.var() - 1 / 12) < 4.5 * (1 / 180 / size) ** 0.5
    assert scipy.stats.kstest(draws.numpy(), "uniform").pvalue > 1e-4


# Keys, found by search, whose first word in the stream (0, "edges") is 0 and 2^32 - 1.
LOWEST, HIGHEST = torch.tensor([1451369671]), torch.tensor([5040749092])


def test_the_edges_of_the_range():
    assert randomness.random_bits(0, "edges", LOWEST, 1).item() == 0
    assert randomness.random_bits(0, "edges", HIGHEST, 1).item() == 2**32 - 1
    low, high = (randomness.uniform(0, "edges", key) for key in (LOWEST, HIGHEST))
    assert 0.0 < low < 2.0**-23 and 1.0 - 2.0**-23 < high < 1.0
    assert low == 1.0 - high
    for key in (LOWEST, HIGHEST):
        assert randomness.normal(0, "edges", key, (2,)).isfinite().all()
        assert not randomness.bernoulli(0, "edges", key, 0.0).any()
        assert randomness.bernoulli(0, "edges", key, 1.0).all()
    for high in (1, 2, 10, 1000, 2**31 - 1):
        assert randomness.randint(0, "edges", LOWEST, high) == 0
        assert randomness.randint(0, "edges", HIGHEST, high) == high - 1


@pytest.mark.parametrize("shape", [(100,), (99,), (1,)])
def test_normal_draws_are_normal(shape):
    draws = randomness.normal(5, "test", torch.arange(200_000 // shape[0]), shape).double()
    size = draws.numel()
    assert draws.isfinite().all()
    assert abs(draws.mean()) < 4.5 * size**-0.5
    assert abs(draws.var() - 1) < 4.5 * (2 / size) ** 0.5
    assert abs((draws**3).mean()) < 4.5 * (15 / size) ** 0.5
    assert abs((draws**4).mean() - 3) < 4.5 * (96 / size) ** 0.5
    assert scipy.stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-4
    assert draws.abs().max() > 3.9


def test_normal_draws_of_one_key_are_independent():
    draws = randomness.normal(5, "test", torch.arange(50_000), (6,)).double()
    for power in (1, 2):  # the two halves of a Box-Muller pair share a radius
        matrix = torch.corrcoef((draws**power).T) - torch.eye(6)
        assert matrix.abs().max() < 5 * 50_000**-0.5


def test_neighbouring_keys_are_independent():
    draws = randomness.normal(5, "test", torch.arange(100_000))
    for lag in (1, 2, 3, 64):
        assert abs(correlation(draws[:-lag], draws[lag:])) < 5 * 100_000**-0.5


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_bernoulli_has_its_rate(probability):
    share = randomness.bernoulli(1, "test", torch.arange(200_000), probability).double().mean()
    assert abs(share - probability) < 4.5 * (probability * (1 - probability) / 200_000) ** 0.5


def test_bernoulli_is_never_and_always():
    keys = torch.arange(200_000)
    never, always = randomness.bernoulli(1, "test", keys, 0.0), randomness.bernoulli(1, "test", keys, 1.0)
    assert never.dtype == torch.bool and not never.any() and always.all()


@pytest.mark.parametrize("high", [1, 2, 3, 10, 1000])
def test_randint_is_uniform(high):
    draws = randomness.randint(2, "test", torch.arange(200_000), high)
    assert draws.dtype == torch.int64 and draws.min() >= 0
    counts = torch.bincount(draws, minlength=high)
    assert len(counts) == high
    if high > 1:
        assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_randint_takes_a_bound_per_example():
    keys = torch.arange(3000)
    highs = 1 + keys % 5
    draws = randomness.randint(2, "test", keys, highs)
    for high in range(1, 6):
        assert torch.equal(draws[highs == high], randomness.randint(2, "test", keys, high)[highs == high])
        assert draws[highs == high].max() == high - 1


def test_randint_reaches_a_large_range():
    draws = randomness.randint(2, "test", torch.arange(20_000), 2**31 - 1).double() / (2**31 - 1)
    assert draws.min() >= 0 and draws.max() < 1
    assert scipy.stats.kstest(draws.numpy(), "uniform").pvalue > 1e-4


# Streams


def test_purposes_are_independent_under_one_seed():
    keys = torch.arange(4000)
    draws = torch.stack([randomness.uniform(0, purpose, keys) for purpose in Purpose])
    matrix = torch.corrcoef(draws.double()) - torch.eye(len(draws))
    assert matrix.abs().max() < 5 * 4000**-0.5


def test_seeds_are_independent():
    keys = torch.arange(4000)
    seeds = [0, 1, 2, 3, 42, 2**31, 2**32, 2**32 + 1, 2**63]
    draws = torch.stack([randomness.normal(seed, Purpose.NOISE, keys) for seed in seeds])
    matrix = torch.corrcoef(draws.double()) - torch.eye(len(draws))
    assert matrix.abs().max() < 5 * 4000**-0.5


def test_epochs_are_independent():
    keys = torch.arange(4000)
    draws = torch.stack([randomness.uniform(0, "test", keys, (), epoch) for epoch in (0, 1, 2, 10, 1000)])
    assert (torch.corrcoef(draws.double()) - torch.eye(len(draws))).abs().max() < 5 * 4000**-0.5


def test_a_purpose_is_its_name():
    keys = torch.arange(10)
    assert torch.equal(
        randomness.normal(0, Purpose.NOISE, keys, (4,)), randomness.normal(0, Purpose.NOISE.value, keys, (4,))
    )


def test_step_keys_are_unique():
    positions = torch.arange(300)
    keys = torch.cat([randomness.step_keys(step, positions) for step in (-2, -1, 0, 1, 2, 3, 4_000_000, 2**30)])
    assert keys.dtype == torch.int64 and len(keys.unique()) == len(keys)
    # Positions do not reach the next step's keys either.
    last = randomness.step_keys(5, torch.tensor([2**32 - 1]))
    assert last < randomness.step_keys(6, torch.tensor([0]))


def test_step_keys_are_a_function_of_the_position():
    whole = randomness.step_keys(9, torch.arange(64))
    for processes in (2, 4):
        parts = [randomness.step_keys(9, torch.arange(64)[rank::processes]) for rank in range(processes)]
        assert torch.equal(torch.cat(parts).sort().values, whole)


# Permutations


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100, 50_000])
def test_a_permutation_holds_every_index_once(size):
    order = randomness.permutation(0, Purpose.DATA_ORDER, size)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(size))


def test_permutations_of_epochs_seeds_and_purposes_are_independent():
    size = 20_000
    orders = [randomness.permutation(0, Purpose.DATA_ORDER, size, epoch) for epoch in range(4)]
    orders += [randomness.permutation(1, Purpose.DATA_ORDER, size), randomness.permutation(0, "another", size)]
    matrix = torch.corrcoef(torch.stack(orders).double()) - torch.eye(len(orders))
    assert matrix.abs().max() < 5 * size**-0.5
    assert abs(correlation(orders[0], torch.arange(size))) < 5 * size**-0.5
    assert torch.equal(randomness.permutation(0, Purpose.DATA_ORDER, size, 2), orders[2])


def test_a_permutation_is_uniform_over_all_orders():
    orders = [tuple(randomness.permutation(0, "test", 3, epoch).tolist()) for epoch in range(3000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and scipy.stats.chisquare(counts).pvalue > 1e-4


# Generators


def test_a_generator_belongs_to_its_key():
    def draw(seed, purpose, key):
        return torch.randn(8, generator=randomness.generator_for(seed, purpose, key))

    expected = draw(0, Purpose.SAMPLING, 3)
    assert torch.equal(draw(0, Purpose.SAMPLING, 3), expected)
    for other in ((0, Purpose.SAMPLING, 4), (1, Purpose.SAMPLING, 3), (0, Purpose.NOISE, 3)):
        assert (draw(*other) - expected).abs().max() > 0.01
    seeds = {randomness.generator_for(0, "test", key).initial_seed() for key in range(500)}
    assert len(seeds) == 500


def test_the_global_generators_are_left_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    keys = torch.arange(9)
    for draw in DRAWS.values():
        draw(keys, 1)
    # A seed and purpose that no other test has, so that nothing of the stream is remembered from there.
    randomness.normal(99, "global", keys, (3,), 1)
    randomness.permutation(98, "global", 10)
    randomness.generator_for(97, "global", 4)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    state = np.random.get_state()
    assert state[0] == before[1][0] and np.array_equal(state[1], before[1][1]) and state[2:] == before[1][2:]
    assert random.getstate() == before[2]


@pytest.mark.parametrize("name", DRAWS)
def test_draws_ignore_the_global_seed(name):
    keys = torch.arange(9)
    torch.manual_seed(1)
    first = DRAWS[name](keys, 0)
    torch.manual_seed(2)
    assert torch.equal(DRAWS[name](keys, 0), first)


def test_numpy_and_torch_evaluate_the_same_bijection():
    counter = [torch.randint(0, 2**32, (5, 7), generator=torch.manual_seed(part)) for part in range(4)]
    counter[1] = counter[1][:1, :1]  # as the epoch is: it broadcasts
    in_torch = randomness.philox_4x32(counter, (0xDEADBEEF, 0xFFFFFFFF))
    in_numpy = randomness.philox_4x32([part.numpy() for part in counter], (0xDEADBEEF, 0xFFFFFFFF))
    for one, other in zip(in_torch, in_numpy, strict=True):
        assert one.tolist() == other.tolist()
