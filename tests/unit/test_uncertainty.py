"""Intervals and spreads against known answers, and what is said where nothing is known."""

import math
import statistics

import pytest
import torch

from noisycond import randomness
from noisycond.errors import InputError
from noisycond.evaluation.estimates import Estimate
from noisycond.evaluation.uncertainty import bootstrap_interval, conclusive, summarize


def draws(seed: int, count: int = 100) -> torch.Tensor:
    return randomness.normal(seed, "test", torch.arange(1), (count,))[0]


def row(value, run="a", seed=0, label="x", scale=1.5, **other) -> dict:
    metrics = {"fid": {"value": value, "interval": None}}
    return {
        "label": label,
        "pipeline": run,
        "images": f"images/{run}-{seed}",
        "guidance_scale": scale,
        "seed": seed,
        "num_images": 100,
        "metrics": metrics,
    } | other


def summary(*values, run="a"):
    """One summary of one run's seeds."""
    return summarize(row(value, run, seed) for seed, value in enumerate(values))[0]


class TestBootstrapInterval:
    def test_of_a_mean_is_the_textbooks(self):
        values = draws(0, 400)
        low, high = bootstrap_interval(Estimate.mean(values), 500, seed=0)
        half = 1.96 * values.double().std().item() / math.sqrt(400)
        assert abs((high - low) / 2 - half) < 0.1 * half
        assert abs((high + low) / 2 - values.double().mean().item()) < 0.2 * half

    def test_covers_the_truth_as_often_as_it_says(self):
        hits = 0
        for seed in range(200):
            low, high = bootstrap_interval(Estimate.mean(draws(seed, 50)), 80, seed=seed, level=0.9)
            hits += low <= 0 <= high
        # Of 200 at 0.9, three standard deviations are 13; a bootstrap of 50 falls a little short.
        assert 160 <= hits <= 194

    def test_is_centred_where_a_resample_is_biased(self):
        """Distinct values, as an extreme of diversity: a resample has 63 % of them, so no replicate reaches it."""
        count = Estimate(100.0, lambda chosen: float(len(set(chosen.tolist()))), 100)
        low, high = bootstrap_interval(count, 100, seed=0)
        assert low < 100 < high and high - low < 20

    def test_resamples_with_replacement_among_all(self):
        seen = []
        bootstrap_interval(Estimate(0.0, lambda chosen: seen.append(chosen) or 0.0, 50), 40, seed=3)
        assert len(seen) == 40 and all(len(chosen) == 50 for chosen in seen)
        assert set(torch.cat(seen).tolist()) == set(range(50))
        assert all(len(set(chosen.tolist())) < 50 for chosen in seen)
        assert not torch.equal(seen[0], seen[1])

    def test_depends_on_the_seed_alone(self):
        estimate, before = Estimate.mean(draws(0)), torch.random.get_rng_state()
        one = bootstrap_interval(estimate, 40, seed=1)
        assert bootstrap_interval(estimate, 40, seed=1) == one != bootstrap_interval(estimate, 40, seed=2)
        assert torch.equal(torch.random.get_rng_state(), before)

    @pytest.mark.parametrize(
        "estimate, replicates",
        [
            (Estimate.mean(draws(0)), 0),
            (Estimate(1.0), 50),
            (Estimate(math.inf, lambda chosen: 1.0, 9), 50),
            (Estimate(1.0, lambda chosen: math.nan if 0 in chosen else 1.0, 9), 50),
        ],
    )
    def test_none_where_there_is_none(self, estimate, replicates):
        assert bootstrap_interval(estimate, replicates, seed=0) is None

    @pytest.mark.parametrize(
        "replicates, level, words", [(39, 0.95, "at least 40"), (-1, 0.95, "40"), (50, 1.0, "1.0")]
    )
    def test_bad_input_is_named(self, replicates, level, words):
        with pytest.raises(InputError, match=words):
            bootstrap_interval(Estimate.mean(draws(0)), replicates, seed=0, level=level)

    def test_the_fewest_replicates_are_enough(self):
        assert bootstrap_interval(Estimate.mean(draws(0)), 40, seed=0) is not None


class TestSummarize:
    def test_groups_in_order_of_first_appearance(self):
        rows = [row(1, label="b"), row(2, label="a"), row(3, label="b", scale=2.0), row(4, label="b", seed=1)]
        found = [(each.label, each.guidance_scale, each.metrics["fid"].mean) for each in summarize(rows)]
        assert found == [("b", 1.5, 2.5), ("a", 1.5, 2), ("b", 2.0, 3)]

    def test_one_run_has_the_spread_of_its_seeds(self):
        found = summary(1, 2, 6)
        fid = found.metrics["fid"]
        assert (fid.mean, fid.spread, fid.count, fid.of) == (3, statistics.stdev([1, 2, 6]), 3, "seeds")
        assert (found.runs, found.seeds, found.num_images) == (1, 3, 100)

    def test_several_runs_have_the_spread_of_runs_after_averaging_seeds(self):
        rows = [row(0, "a", 0), row(2, "a", 1), row(10, "b", 0), row(12, "b", 1), row(21, "c", 0)]
        found = summarize(rows)[0]
        fid = found.metrics["fid"]
        assert (fid.mean, fid.spread, fid.count, fid.of) == (11, 10, 3, "runs")
        assert (found.runs, found.seeds) == (3, 1)

    def test_a_single_row_has_none(self):
        only = row(5, metrics={"fid": {"value": 5, "interval": [4, 6]}})
        fid = summarize([only])[0].metrics["fid"]
        assert (fid.mean, fid.spread, fid.count, fid.of, fid.interval) == (5, None, 1, None, (4, 6))

    def test_of_image_folders_it_is_not_known_whether_they_are_of_one_run(self):
        rows = [row(value, None, None, scale=None, images=f"{value}") for value in (1, 3)]
        assert summarize(rows)[0].metrics["fid"].of == "folders"

    def test_a_missing_value_is_left_out_with_its_reason(self):
        rows = [row(1, seed=0), row(3, seed=1), row(0, seed=2, metrics={}, skipped={"fid": "too few images"})]
        found = summarize(rows)[0]
        assert found.metrics["fid"].mean == 2 and found.metrics["fid"].count == 2
        assert found.skipped == {"fid": "too few images"}
        assert "fid" not in summarize(rows[2:])[0].metrics

    @pytest.mark.parametrize("value", [math.nan, math.inf, None])
    def test_a_value_that_is_no_number_is_not_averaged_away(self, value):
        fid = summary(1, value, 3).metrics["fid"]
        assert not math.isfinite(fid.mean) and fid.spread is None

    def test_a_row_given_twice_is_refused(self):
        with pytest.raises(InputError, match="'x' names runs/a twice"):
            summarize([row(1, "runs/a"), row(1, "runs/a")])

    def test_differing_numbers_of_images_are_none(self):
        assert summarize([row(1), row(1, seed=1, num_images=7)])[0].num_images is None


class TestConclusive:
    def test_a_gap_above_the_larger_spread(self):
        narrow, wide = summary(1, 1.2), summary(4, 6)  # spreads 0.14 and 1.4, gap 3.9
        assert conclusive(narrow, wide, "fid") is True and conclusive(wide, narrow, "fid") is True

    def test_a_gap_between_the_two_spreads(self):
        narrow, wide = summary(1, 1.2), summary(1, 3)  # spreads 0.14 and 1.4, gap 0.9
        assert conclusive(narrow, wide, "fid") is False and conclusive(wide, narrow, "fid") is False

    def test_equal_means_say_nothing(self):
        assert conclusive(summary(1, 1), summary(1, 1), "fid") is False

    def test_without_spreads_it_is_not_known(self):
        assert conclusive(summary(1), summary(9), "fid") is None

    def test_one_spread_can_refute_and_not_confirm(self):
        assert conclusive(summary(1), summary(1, 3), "fid") is False
        assert conclusive(summary(100), summary(1, 3), "fid") is None

    def test_without_values_it_is_not_known(self):
        assert conclusive(summary(1, 2), summary(math.nan, 3), "fid") is None
        assert conclusive(summary(1, 2), summary(9, 9.1), "kid") is None
