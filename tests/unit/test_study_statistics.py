"""Comparisons with clean against SciPy and against numbers worked by hand, and what is said where nothing is known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from study_results import COLUMNS, frame, toy_results

from noisycond.errors import InputError
from noisycond.study.statistics import at_best_guidance, clean_cells, compare, compare_modes


def cell(label: str, values, first_seed=0, **other) -> list[dict]:
    """A line per seed."""
    return [{"cell": label, "seed": first_seed + n, "value": value} | other for n, value in enumerate(values)]


def of(lines: list[dict], label: str = "eta-0.025") -> pd.Series:
    """The one line of a cell."""
    found = compare(frame(lines))
    (line,) = [line for _, line in found[found["cell"] == label].iterrows()]
    return line


class TestNumbers:
    def test_by_hand(self):
        """Differences 1, 2, 3: mean 2, deviation 1, standard error 1/√3, t = 2√3 of 2 degrees of freedom."""
        line = of(cell("clean", [10, 20, 30]) + cell("eta-0.025", [11, 22, 33]))
        assert (line["seeds"], line["mean"], line["spread"], line["pairs"]) == (3, 22, 11, 3)
        assert line["difference"] == pytest.approx(2)
        # Of 2 degrees of freedom, P(|T| > t) = 1 - t / √(t² + 2), and the 97.5 % point is 4.302653.
        assert line["p"] == pytest.approx(1 - math.sqrt(12 / 14))
        assert line["high"] == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
        assert line["low"] == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)

    def test_as_scipy(self):
        results = toy_results(cells=("clean", "eta-0.025", "eta-0.2", "cep-u-1", "ip"))
        found = compare(results.values).set_index(["cell", "guidance_scale", "metric"])
        values = results.values.pivot_table(index="seed", columns=["cell", "guidance_scale", "metric"], values="value")
        assert len(found) == 5 * 3 * 15
        for (label, scale, metric), line in found.iterrows():
            own = values[label, scale, metric]
            assert line["mean"] == pytest.approx(own.mean()) and line["spread"] == pytest.approx(own.std())
            if label == "clean":
                continue
            test = stats.ttest_rel(own, values["clean", scale, metric])
            interval = test.confidence_interval(0.95)
            assert line["p"] == pytest.approx(test.pvalue, rel=1e-6)
            assert (line["low"], line["high"]) == pytest.approx((interval.low, interval.high))
        for _, family in found[found["p"].notna()].groupby("metric"):
            assert family["p_adjusted"].to_numpy() == pytest.approx(stats.false_discovery_control(family["p"]))
            assert len(family) == 4 * 3  # the cells and guidance scales of one metric

    def test_pairing_removes_what_seeds_do_to_both(self):
        """Seeds move both cells by 10, the cell by 1: lost in a test that is not paired."""
        clean = [10.0, 20.0, 30.0, 40.0, 50.0]
        own = [9.02, 18.98, 29.01, 38.99, 49.0]
        assert stats.ttest_ind(own, clean).pvalue > 0.9
        line = of(cell("clean", clean) + cell("eta-0.025", own))
        assert line["verdict"] == "better" and line["p"] < 1e-6

    def test_seeds_are_paired_by_number_not_by_order(self):
        own = [{"cell": "eta-0.025", "seed": seed, "value": value} for seed, value in ((2, 4.3), (1, 2.2), (0, 1.1))]
        line = of(cell("clean", [1, 2, 4]) + own)
        assert line["difference"] == pytest.approx(0.2) and line["high"] - line["low"] < 1


class TestVerdict:
    CLEAN = [10.0, 11.0, 12.0, 13.0]

    @pytest.mark.parametrize(
        "metric, sign, verdict",
        [
            ("fid", -1, "better"),
            ("fid", 1, "worse"),
            ("recall", 1, "better"),
            ("recall", -1, "worse"),
            ("entropy", 1, "higher"),
            ("entropy", -1, "lower"),
            ("not one of ours", 1, "higher"),
        ],
    )
    def test_is_the_metrics(self, metric, sign, verdict):
        moved = [value + sign * (1 + 0.01 * n) for n, value in enumerate(self.CLEAN)]
        lines = cell("clean", self.CLEAN, metric=metric) + cell("eta-0.025", moved, metric=metric)
        assert of(lines)["verdict"] == verdict
        assert of(lines, "clean")["verdict"] == ""

    def test_small_differences_are_inconclusive(self):
        assert of(cell("clean", self.CLEAN) + cell("eta-0.025", [10.5, 10.4, 12.6, 12.9]))["verdict"] == "inconclusive"

    def test_follows_the_adjusted_p(self):
        """One p of 0.03 among twenty is no finding."""
        moved = [value + step for value, step in zip(self.CLEAN, [1.0, 0.4, 1.5, 1.1], strict=True)]
        assert 0.01 < stats.ttest_rel(moved, self.CLEAN).pvalue < 0.05
        alone = cell("clean", self.CLEAN) + cell("eta-0.025", moved)
        assert of(alone)["verdict"] == "worse"
        noise = np.random.default_rng(0).normal(size=(20, 4))
        others = [
            line
            for scale, row in enumerate(noise)
            for line in cell("clean", self.CLEAN, guidance_scale=scale + 10.0)
            + cell("eta-0.025", row + self.CLEAN, guidance_scale=scale + 10.0)
        ]
        found = compare(frame(alone + others))
        line = found[(found["cell"] == "eta-0.025") & (found["guidance_scale"] == 2.25)].iloc[0]
        assert line["p"] < 0.05 < line["p_adjusted"] and line["verdict"] == "inconclusive"

    def test_metrics_and_blocks_are_families_of_their_own(self):
        moved = [value + step for value, step in zip(self.CLEAN, [1.0, 0.4, 1.5, 1.1], strict=True)]
        lines = cell("clean", self.CLEAN) + cell("eta-0.025", moved)
        other = [line | {"value": line["value"] ** 2} for line in lines]  # of another p
        others = [line | {"metric": "recall"} for line in other] + [line | {"block": "b"} for line in other]
        found = compare(frame(lines + others))
        found = found[found["cell"] == "eta-0.025"]
        assert found["p"].nunique() == 2 and len(found) == 3 and (found["p"] == found["p_adjusted"]).all()


class TestFewSeeds:
    def test_one_seed_has_a_mean_alone(self):
        line = of(cell("clean", [1.0]) + cell("eta-0.025", [3.0]))
        assert (line["seeds"], line["mean"], line["pairs"], line["difference"], line["verdict"]) == (1, 3, 1, 2, "")
        assert line[["spread", "low", "high", "p", "p_adjusted"]].isna().all()

    def test_two_seeds_have_a_wide_interval(self):
        """Differences 1 and 2: 1.5 ± 12.7062 · 0.5; p of t = 3 with one degree of freedom is 1 - 2/π · atan 3."""
        line = of(cell("clean", [1.0, 5.0]) + cell("eta-0.025", [2.0, 7.0]))
        assert (line["low"], line["high"]) == pytest.approx((1.5 - 6.3531, 1.5 + 6.3531), abs=1e-4)
        assert line["p"] == pytest.approx(1 - 2 / math.pi * math.atan(3))
        assert line["verdict"] == "inconclusive"

    def test_seeds_that_one_cell_lacks_leave_the_difference_not_the_mean(self):
        line = of(cell("clean", [1, 2, 3]) + cell("eta-0.025", [2, 4, 100], first_seed=1))  # of seeds 1, 2 and 3
        assert (line["seeds"], line["pairs"]) == (3, 2)
        assert line["mean"] == pytest.approx(106 / 3) and line["difference"] == pytest.approx(0.5)

    def test_no_seed_in_common(self):
        line = of(cell("clean", [1, 2]) + cell("eta-0.025", [3, 4], first_seed=5))
        assert (line["seeds"], line["pairs"], line["verdict"]) == (2, 0, "") and math.isnan(line["difference"])


class TestSpecialValues:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite_leaves_with_its_seed(self, bad):
        whole = cell("clean", [1, 2, 4, 9]) + cell("eta-0.025", [3, 4, bad, 12])
        line, without = of(whole), of([line for line in whole if line["seed"] != 2])
        assert line["seeds"] == line["pairs"] == 3
        same = ["mean", "spread", "difference", "low", "high", "p"]
        assert line[same].tolist() == without[same].tolist() and not line[same].isna().any()
        # … and likewise where it is clean's.
        line = of(cell("clean", [1, 2, bad, 9]) + cell("eta-0.025", [3, 4, 8, 12]))
        assert (line["seeds"], line["pairs"], line["p"]) == (4, 3, without["p"])

    def test_never_finite_is_a_line_of_no_seeds(self):
        line = of(cell("clean", [1, 2]) + cell("eta-0.025", [math.nan, math.inf]))
        assert (line["seeds"], line["pairs"], line["verdict"]) == (0, 0, "")
        assert line[["mean", "spread", "difference", "p"]].isna().all()

    def test_a_metric_that_fails_takes_no_other_along(self):
        lines = cell("clean", [1, 2, 4]) + cell("eta-0.025", [3, math.nan, 7])
        lines += cell("clean", [1, 2, 4], metric="kid") + cell("eta-0.025", [3, 4, 7], metric="kid")
        found = compare(frame(lines)).set_index(["cell", "metric"])
        assert found.loc[("eta-0.025", "fid"), "pairs"] == 2 and found.loc[("eta-0.025", "kid"), "pairs"] == 3

    def test_no_difference_at_all(self):
        """Nothing memorized by anyone: p is 1, and counts among the tests."""
        line = of(cell("clean", [0, 0, 0]) + cell("eta-0.025", [0, 0, 0]))
        assert (line["difference"], line["p"], line["p_adjusted"], line["verdict"]) == (0, 1, 1, "equal")
        assert math.isnan(line["low"])
        assert of(cell("clean", [0]) + cell("eta-0.025", [0]))["verdict"] == ""

    def test_differences_that_cancel_are_not_equal(self):
        line = of(cell("clean", [1, 2, 3, 4]) + cell("eta-0.025", [2, 1, 4, 3]))
        assert (line["difference"], line["p"], line["verdict"]) == (0, 1, "inconclusive")

    @pytest.mark.parametrize("step", [0.5, 1e-3])
    def test_equal_differences_prove_nothing(self, step):
        """0.7 - 0.2 and 0.8 - 0.3 are not one number in binary; a p of 0 would claim certainty."""
        line = of(cell("clean", [0.1, 0.2, 0.3]) + cell("eta-0.025", [0.1 + step, 0.2 + step, 0.3 + step]))
        assert line["difference"] == pytest.approx(step) and line["verdict"] == "inconclusive"
        assert line[["low", "high", "p", "p_adjusted"]].isna().all()

    def test_equal_differences_do_not_enter_the_adjustment(self):
        lines = cell("clean", [1, 2, 3]) + cell("eta-0.025", [1.5, 2.4, 3.7]) + cell("cep-u-1", [2, 3, 4])
        found = compare(frame(lines)).set_index("cell")
        assert found.loc["eta-0.025", "p_adjusted"] == found.loc["eta-0.025", "p"]
        assert math.isnan(found.loc["cep-u-1", "p_adjusted"])


class TestBlocks:
    def test_are_compared_with_their_own_clean_cell(self):
        lines = cell("clean", [1, 2]) + cell("eta-0.025", [2, 4])
        lines += cell("clean", [11, 12], block="b") + cell("eta-0.025", [11, 13], block="b")
        found = compare(frame(lines)).set_index(["block", "cell"])["difference"]
        assert found["", "eta-0.025"] == 1.5 and found["b", "eta-0.025"] == 0.5

    def test_without_a_clean_cell_are_described_alone(self):
        lines = cell("clean", [1, 2]) + cell("eta-0.025", [2, 4], block="b")
        line = of(lines)
        assert (line["mean"], line["pairs"], line["verdict"]) == (3, 0, "")
        assert line[["difference", "low", "high", "p", "p_adjusted"]].isna().all()

    def test_of_two_clean_cells_are_refused(self):
        lines = cell("clean", [1, 2], block="b") + cell("eta-0.025", [2, 4], kind="clean", block="b")
        with pytest.raises(InputError, match="'clean' and 'eta-0.025' of block 'b' are both clean"):
            compare(frame(lines))

    def test_clean_cells_by_block(self):
        cells = [("a", "x", "clean"), ("a", "y", "cep"), ("b", "x", "clean"), ("c", "y", "cep"), ("a", "x", "clean")]
        assert clean_cells(cells) == {"a": "x", "b": "x"}


class TestPlaces:
    def test_guidance_scales_are_compared_each_and_none_is_one(self):
        lines = [
            line
            for scale, step in ((1.0, 1), (math.nan, 5))
            for line in cell("clean", [1, 2], guidance_scale=scale)
            + cell("eta-0.025", [1 + step, 3 + step], guidance_scale=scale)
        ]
        found = compare(frame(lines))
        found = found[found["cell"] == "eta-0.025"]
        assert found["difference"].tolist() == [1.5, 5.5] and found["pairs"].tolist() == [2, 2]
        assert found["guidance_scale"].isna().tolist() == [False, True]

    def test_steps_are_described_and_not_tested(self):
        results = toy_results(
            steps=(500, 1000), cells=("clean", "eta-0.025"), metrics=("fid",), guidance_scales=(2.25,)
        )
        found = compare(results.values)
        assert found["step"].dtype == "Int64" and found["step"].isna().sum() == 2
        steps = found[found["step"].notna() & (found["cell"] != "clean")]
        assert (steps["pairs"] == 5).all() and steps[["difference", "low", "high"]].notna().all(axis=None)
        assert steps[["p", "p_adjusted"]].isna().all(axis=None) and (steps["verdict"] == "").all()
        final = found[found["step"].isna() & (found["cell"] != "clean")].iloc[0]
        assert final["p_adjusted"] == final["p"]  # the steps are not of the family

    def test_columns_and_order_are_the_studys(self):
        results = toy_results(blocks=("b", "a"), cells=("eta-0.05", "clean"), metrics=("recall", "fid"))
        found = compare(results.values)
        assert found.columns.tolist() == [
            *[name for name in COLUMNS if name not in ("seed", "value")],
            *["seeds", "mean", "spread", "pairs", "difference", "low", "high", "p", "p_adjusted", "verdict"],
        ]
        assert found["block"].unique().tolist() == ["b", "a"] and found["cell"].iloc[0] == "eta-0.05"
        assert found["metric"].iloc[:2].tolist() == ["recall", "fid"] and found["title"].iloc[0] == "η = 5 %"

    def test_values_twice_are_refused(self):
        with pytest.raises(InputError, match="fid of cell 'clean', seed 0, twice"):
            compare(frame(cell("clean", [1]) + cell("clean", [2])))

    def test_nothing_gives_nothing(self):
        assert compare(frame([])).empty and compare_modes(frame([])).empty

    def test_values_are_left_as_they_were(self):
        values = frame(cell("clean", [1, math.inf]))
        compare(values)
        assert values["value"].tolist() == [1, math.inf]


class TestModes:
    def test_random_minus_fixed(self):
        lines = cell("eta-0.025", [1, 2, 3]) + cell("eta-random-0.025", [2, 4, 6])
        lines += cell("fixed-cep", [5, 5, 5]) + cell("cep-u-1", [4, 4.1, 4.2]) + cell("eta-0.05", [9, 9, 9])
        found = compare_modes(frame(lines))
        assert found["fixed"].tolist() == ["eta-0.025", "fixed-cep"]
        assert found["random"].tolist() == ["eta-random-0.025", "cep-u-1"]
        assert found["title"].tolist() == ["η = 2.5 %", "CEP-U, γ = 1"]
        assert found["difference"].tolist() == pytest.approx([2, -0.9])
        assert found["p"].tolist() == pytest.approx(
            [1 - math.sqrt(12 / 14), stats.ttest_1samp([1, 0.9, 0.8], 0).pvalue]
        )
        assert found["p_adjusted"].to_numpy() == pytest.approx(stats.false_discovery_control(found["p"]))
        assert found["verdict"].tolist() == ["inconclusive", "better"]

    def test_no_pair_gives_no_line(self):
        assert compare_modes(frame(cell("eta-0.05", [1, 2]) + cell("eta-random-0.025", [1, 2]))).empty

    def test_cells_of_other_blocks_are_no_pair(self):
        assert compare_modes(frame(cell("eta-0.025", [1, 2]) + cell("eta-random-0.025", [1, 2], block="b"))).empty

    def test_what_is_not_unique_is_left_out(self):
        same = {"kind": "corruption", "type": "symmetric", "mode": "fixed", "strength": 0.025, "title": "η = 2.5 %"}
        lines = cell("eta-0.025", [1, 2]) + cell("eta-random-0.025", [2, 4]) + cell("longer", [7, 8], **same)
        assert compare_modes(frame(lines)).empty

    def test_final_models_alone(self):
        results = toy_results(steps=(500,), cells=("eta-0.025", "eta-random-0.025"), metrics=("fid",))
        assert compare_modes(results.values)["guidance_scale"].tolist() == [1.0, 2.25, 4.0]


def test_chance_alone_is_called_a_difference_as_rarely_as_promised():
    """1,000 studies of clean and four cells that do nothing, five seeds: with every difference chance, the share of
    false findings is that of the studies with any (Benjamini and Hochberg, 1995)."""
    studies, cells, seeds = 1000, 5, 5
    draw = np.random.default_rng(0)
    drawn = draw.normal(size=(studies, cells, seeds)) + 10 * draw.normal(size=(studies, 1, seeds))
    place = np.indices(drawn.shape).reshape(3, -1)
    values = pd.DataFrame({"block": place[0].astype(str), "seed": place[2], "value": drawn.ravel(), "metric": "fid"})
    clean = place[1] == 0
    values = values.assign(cell=place[1].astype(str), kind=np.where(clean, "clean", "cep"), type="", mode="", title="")
    values = values.assign(strength=place[1].astype(float), guidance_scale=2.25, step=pd.NA)
    found = compare(values)
    tested = found[found["cell"] != "0"]
    # Three standard deviations: of the p (those of one study are correlated: as of its studies), and of studies.
    assert abs((tested["p"] < 0.05).mean() - 0.05) < 3 * math.sqrt(0.05 * 0.95 / studies)
    false = (tested["verdict"] != "inconclusive").groupby(tested["block"]).any().mean()
    assert 0.02 < false < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


def test_each_cell_at_the_guidance_scale_where_it_is_best():
    """Clean is best at 1, the other at 4: by the mean over seeds, not by a single one."""
    fid = {"clean": {1.0: (2.0, 3.0), 4.0: (1.0, 9.0)}, "eta": {1.0: (5.0, 5.0), 4.0: (4.0, 2.0)}}
    lines = [
        {"cell": cell, "kind": kind, "seed": seed, "guidance_scale": scale, "metric": metric, "value": value}
        for cell, kind in (("clean", "clean"), ("eta", "corruption"))
        for scale, values in fid[cell].items()
        for seed, value in enumerate(values)
        for metric, value in (("fid", value), ("recall", value / 10))
    ]
    same = {"block": "", "type": "", "mode": "", "strength": 0.0, "title": "x", "step": pd.NA}
    values = pd.DataFrame([same | line for line in lines])
    # Neither an evaluation while training nor what has no guidance scale is looked at, nor a cell of one scale.
    more = [same | lines[0] | {"step": 5, "value": 0.0}, same | lines[0] | {"guidance_scale": np.nan, "value": 0.0}]
    more += [same | lines[0] | {"cell": "alone", "kind": "cep"}]
    found = at_best_guidance(pd.concat([values, pd.DataFrame(more)], ignore_index=True), "fid")
    assert found["guidance_scale"].isna().all()
    of_fid = found[found["metric"] == "fid"]
    assert of_fid.groupby("cell")["value"].apply(list).to_dict() == {"clean": [2.0, 3.0], "eta": [4.0, 2.0]}
    assert found.groupby("cell")["best_scale"].unique().map(list).to_dict() == {"clean": [1.0], "eta": [4.0]}
    assert sorted(found[found["metric"] == "recall"]["value"]) == [0.2, 0.2, 0.3, 0.4]
    compared = compare(found).set_index(["cell", "metric"])
    assert compared.loc[("eta", "fid"), "difference"] == pytest.approx(0.5)
