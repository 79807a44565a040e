"""Label corruption: its rate, what a label becomes, groups, and that an example's fate is its own."""

import pickle

import pytest
import scipy.stats
import torch

from noisycond.corruption import LabelCorruption, check_ratio, corrupt_labels, group_tables


SIZE = 200_000
PAPER = [0.0, 0.025, 0.05, 0.075, 0.10, 0.15, 0.20]
GROUPS = [[0, 5], [9, 1, 3], [2, 4, 6, 7, 8]]


def labels(num_classes: int, size: int = SIZE) -> torch.Tensor:
    return torch.randint(num_classes, (size,), generator=torch.Generator().manual_seed(11))


# The rate


@pytest.mark.parametrize(("ratio", "groups"), [*((ratio, None) for ratio in PAPER), (0.1, GROUPS)])
def test_the_realized_ratio_is_the_one_asked_for(ratio, groups):
    true = labels(10)
    corrupted = corrupt_labels(true, torch.arange(SIZE), ratio=ratio, num_classes=10, groups=groups)
    assert corrupted.dtype == torch.int64 and corrupted.shape == true.shape
    assert corrupted.min() >= 0 and corrupted.max() < 10
    share = (corrupted != true).double().mean().item()
    assert abs(share - ratio) <= 4 * (ratio * (1 - ratio) / SIZE) ** 0.5


@pytest.mark.parametrize("num_classes", [2, 3, 1000])
def test_the_rate_does_not_depend_on_the_number_of_classes(num_classes):
    true = labels(num_classes)
    corrupted = corrupt_labels(true, torch.arange(SIZE), ratio=0.1, num_classes=num_classes)
    assert abs((corrupted != true).double().mean().item() - 0.1) <= 4 * (0.09 / SIZE) ** 0.5


def test_every_class_is_corrupted_at_the_same_rate():
    true = labels(10)
    corrupted = corrupt_labels(true, torch.arange(SIZE), ratio=0.2, num_classes=10)
    hits = torch.bincount(true[corrupted != true], minlength=10)
    misses = torch.bincount(true, minlength=10) - hits
    assert scipy.stats.chi2_contingency(torch.stack([hits, misses]).numpy()).pvalue > 1e-4


def test_a_ratio_of_one_corrupts_all():
    true = labels(10)
    for groups in (None, GROUPS):
        assert (corrupt_labels(true, torch.arange(SIZE), ratio=1.0, num_classes=10, groups=groups) != true).all()


def test_a_ratio_of_zero_changes_nothing():
    true = labels(10)
    result = corrupt_labels(true, torch.arange(SIZE), ratio=0.0, num_classes=10)
    assert torch.equal(result, true) and result is not true
    assert torch.equal(corrupt_labels(torch.zeros(5), torch.arange(5), ratio=0, num_classes=1), torch.zeros(5).long())


def test_a_larger_ratio_keeps_the_corrupted_ones_corrupted():
    true = labels(10, 20_000)
    results = [corrupt_labels(true, torch.arange(20_000), ratio=ratio, num_classes=10) for ratio in PAPER]
    for less, more in zip(results, results[1:], strict=False):
        assert torch.equal(more[less != true], less[less != true])


# What a label becomes


@pytest.mark.parametrize("true_class", [0, 4, 9])
def test_the_new_class_is_uniform_over_the_others(true_class):
    true = torch.full((SIZE,), true_class)
    corrupted = corrupt_labels(true, torch.arange(SIZE), ratio=1.0, num_classes=10)
    counts = torch.bincount(corrupted, minlength=10)
    assert counts[true_class] == 0
    others = torch.cat([counts[:true_class], counts[true_class + 1 :]])
    assert scipy.stats.chisquare(others.numpy()).pvalue > 1e-4


def test_whether_and_what_are_independent():
    true = torch.zeros(SIZE, dtype=torch.int64)
    corrupted = corrupt_labels(true, torch.arange(SIZE), ratio=0.1, num_classes=10)
    counts = torch.bincount(corrupted, minlength=10)[1:]
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("true_class", range(10))
def test_asymmetric_corruption_stays_in_the_group(true_class):
    group = next(group for group in GROUPS if true_class in group)
    true = torch.full((SIZE // 10,), true_class)
    corrupted = corrupt_labels(true, torch.arange(len(true)), ratio=1.0, num_classes=10, groups=GROUPS)
    counts = torch.bincount(corrupted, minlength=10)
    others = [counts[label].item() for label in group if label != true_class]
    assert sum(others) == len(true)
    assert min(others) > 0 and (len(others) == 1 or scipy.stats.chisquare(others).pvalue > 1e-4)


# Whose fate it is


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_the_batch_and_its_order_do_not_matter(groups):
    true, index = labels(10, 203), torch.arange(203) * 13 + 5
    corruption = LabelCorruption(0.4, 10, seed=3, groups=groups)
    whole = corruption(true, index, epoch=2)
    for size in (1, 7, 64, 100):
        parts = [corruption(t, i, epoch=2) for t, i in zip(true.split(size), index.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole), size
    order = torch.randperm(203, generator=torch.Generator().manual_seed(0))
    assert torch.equal(corruption(true[order], index[order], epoch=2), whole[order])
    for ranks in (2, 4):
        for rank in range(ranks):
            assert torch.equal(corruption(true[rank::ranks], index[rank::ranks], epoch=2), whole[rank::ranks])


def test_the_index_decides_and_not_the_place():
    true, index = labels(10, 2000), torch.arange(2000)
    first = corrupt_labels(true, index, ratio=0.5, num_classes=10)
    assert not torch.equal(corrupt_labels(true, index + 2000, ratio=0.5, num_classes=10), first)
    same = corrupt_labels(torch.zeros(50).long(), torch.full((50,), 4), ratio=0.5, num_classes=10)
    assert len(same.unique()) == 1


def test_fixed_ignores_the_epoch_and_random_uses_it():
    true, index = labels(10, 5000), torch.arange(5000)
    fixed, drawn = LabelCorruption(0.3, 10, mode="fixed"), LabelCorruption(0.3, 10, mode="random")
    assert torch.equal(fixed(true, index, epoch=0), fixed(true, index, epoch=7))
    assert torch.equal(fixed(true, index, epoch=torch.arange(5000)), fixed(true, index))
    hit = [drawn(true, index, epoch=epoch) != true for epoch in (0, 1)]
    # Independent epochs: 9 % are hit in both.
    assert abs((hit[0] & hit[1]).double().mean().item() - 0.09) < 4 * (0.09 * 0.91 / 5000) ** 0.5
    epochs = torch.arange(5000) % 2
    mixed = drawn(true, index, epoch=epochs)
    assert torch.equal(mixed[epochs == 1], drawn(true, index, epoch=1)[epochs == 1])


def test_the_new_class_is_drawn_anew_too():
    true, index = torch.zeros(5000, dtype=torch.int64), torch.arange(5000)
    corruption = LabelCorruption(1.0, 10, mode="random")
    agree = (corruption(true, index, epoch=0) == corruption(true, index, epoch=1)).double().mean().item()
    assert abs(agree - 1 / 9) < 4 * (1 / 9 * 8 / 9 / 5000) ** 0.5


def test_seeds_corrupt_other_examples():
    true, index = labels(10, 20_000), torch.arange(20_000)
    hit = [corrupt_labels(true, index, ratio=0.5, num_classes=10, seed=seed) != true for seed in (0, 1)]
    assert abs((hit[0] & hit[1]).double().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5


def test_the_function_and_the_class_agree():
    true, index = labels(10, 3000), torch.arange(3000)
    for epoch in (0, 5):
        plain = corrupt_labels(true, index, ratio=0.3, num_classes=10, seed=8, groups=GROUPS, epoch=epoch)
        assert torch.equal(LabelCorruption(0.3, 10, seed=8, groups=GROUPS, mode="random")(true, index, epoch), plain)


def test_the_labels_given_are_not_written_to():
    true = labels(10, 100)
    before = true.clone()
    corrupt_labels(true, torch.arange(100), ratio=1.0, num_classes=10)
    assert torch.equal(true, before)


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    corrupt_labels(labels(10, 100), torch.arange(100), ratio=0.5, num_classes=10)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nothing_grows_with_the_dataset():
    corruption = LabelCorruption(0.1, 1000, mode="fixed", groups=[list(range(500)), list(range(500, 1000))])
    for index in (0, 14_197_121):
        corruption(torch.arange(8), torch.arange(8) + index)
    assert len(pickle.dumps(corruption)) < 60_000
    tensors = [corruption.counts, *corruption.tables]
    assert [tuple(tensor.shape) for tensor in tensors] == [(1000, 2), (2, 500), (1000,), (1000,), (2,)]


def test_an_empty_batch():
    empty = torch.zeros(0, dtype=torch.int64)
    assert LabelCorruption(0.5, 10)(empty, empty).shape == (0,)


# Errors


@pytest.mark.parametrize("ratio", [-0.01, 1.01, 10, float("nan"), float("inf")])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match="between 0 and 1"):
        corrupt_labels(torch.zeros(3).long(), torch.arange(3), ratio=ratio, num_classes=10)
    with pytest.raises(ValueError, match="--some_ratio"):
        check_ratio("--some_ratio", ratio)


def test_ratios_at_the_ends_are_taken():
    check_ratio("x", 0.0)
    check_ratio("x", 1.0)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'sometimes'.*fixed, random"):
        LabelCorruption(0.1, 10, mode="sometimes")


def test_one_class_cannot_be_corrupted():
    with pytest.raises(ValueError, match="two classes"):
        LabelCorruption(0.1, 1)


@pytest.mark.parametrize("label", [-1, 10, 1000])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_label_outside_the_classes_is_refused(label, ratio):
    with pytest.raises(ValueError, match=r"\[0, 9\]"):
        corrupt_labels(torch.tensor([3, label]), torch.arange(2), ratio=ratio, num_classes=10)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([[0, 1], [2, 3]], "class 4 is in no group"),
        ([[0, 1], [2, 3], [4]], r"group 2 is \[4\].*at least two"),
        ([[0, 1, 2, 3, 4], []], r"group 1 is \[\].*at least two"),
        ([[0, 1, 1], [2, 3, 4]], "class 1 is listed twice"),
        ([[0, 1, 2], [2, 3, 4]], "class 2 is listed twice"),
        ([[0, 1, 2], [3, 4, 5]], "no class 5"),
        ([[0, 1, 2], [3, 4, -1]], "no class -1"),
        ([], "class 0, 1, 2, 3, 4 is in no group"),
    ],
)
def test_groups_that_do_not_partition_the_classes_are_refused(groups, says):
    with pytest.raises(ValueError, match=says):
        group_tables(groups, 5)
    with pytest.raises(ValueError, match=says):
        LabelCorruption(0.1, 5, groups=groups)


def test_many_missing_classes_are_not_all_listed():
    with pytest.raises(ValueError, match="class 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … is in no group"):
        group_tables([[0, 1]], 100)


def test_group_tables():
    members, group_of, place_of = group_tables(GROUPS, 10)
    for label in range(10):
        assert members[group_of[label], place_of[label]] == label
        assert label in GROUPS[group_of[label]]


# Counts


def test_counts_and_summary():
    corruption = LabelCorruption(0.25, 3)
    assert corruption.summary()["realized_ratio"] == 0.0
    corruption.count(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 1]))
    corruption.count(torch.tensor([0]), torch.tensor([2]))
    assert corruption.counts.tolist() == [[3, 2], [1, 0], [2, 2]]
    assert corruption.summary() == {
        "examples_seen": 6,
        "examples_corrupted": 4,
        "realized_ratio": 4 / 6,
        "seen_per_class": [3, 1, 2],
        "corrupted_per_class": [2, 0, 2],
    }
    assert corruption.summary(torch.tensor([[10, 1], [0, 0], [0, 0]]))["realized_ratio"] == 0.1


def test_corrupting_alone_counts_nothing():
    corruption = LabelCorruption(0.5, 10)
    corruption(labels(10, 100), torch.arange(100))
    assert corruption.counts.abs().max() == 0
