"""The figures of a study draw what its results hold, leave out what they do not, and say so."""

import math
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from PIL import Image
from synthetic_study import LARGE, TINY, add_samples, synthetic_study

from noisycond.study import figure_data as data
from noisycond.study import figure_words as words
from noisycond.study.figure_data import Difference, Line, Point
from noisycond.study.figure_drawing import Panel, line_styles
from noisycond.study.figures import draw_figures
from noisycond.study.methods import Method, method_of
from noisycond.study.montage import MOST_BYTES, montage, png


ETAS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2)
ALL = [
    "fid_is_over_eta",
    "metrics_over_guidance",
    "metrics_over_guidance_cep",
    "difficulty_and_entropy_over_guidance",
    "gamma_ablation",
    "regularizers",
    "fixed_against_random",
    "fid_over_steps",
    "samples",
]


def methods(cells) -> dict[str, Method]:
    return {label: method_of(settings) for label, settings in cells.items()}


def table(*lines) -> pandas.DataFrame:
    """Of (cell, seed, guidance scale, step, metric, value)."""
    names = ["cell", "seed", "guidance_scale", "step", "metric", "value"]
    return pandas.DataFrame(lines, columns=names).astype({"step": "Int64", "guidance_scale": "float64"})


def at_one_scale(results, scale=2.25):
    return data.at_scale(data.final(results.values), scale)


def value_of(results, cell, metric, seed, scale):
    values = results.values
    same = (values["cell"] == cell) & (values["metric"] == metric) & (values["seed"] == seed)
    return values[same & (values["guidance_scale"] == scale) & values["step"].isna()]["value"].item()


@pytest.fixture(scope="module")
def large():
    metrics = ("fid", "inception_score", "precision", "recall", "rmd_top", "entropy")
    return synthetic_study(seeds=range(3), scales=(1.0, 2.25), metrics=metrics)


class TestPoint:
    def test_mean_and_sample_standard_deviation_over_seeds(self):
        point = Point(0.0, (1.0, 2.0, 6.0))
        assert point.mean == 3.0
        assert point.spread == pytest.approx(math.sqrt(7.0))

    def test_one_seed_has_no_spread(self):
        assert Point(0.0, (4.0,)).spread == 0.0


class TestLinesOfTheTable:
    def test_at_a_scale_is_what_was_measured_there(self):
        values = table(
            ("a", 0, 1.0, None, "fid", 1.0), ("a", 0, 2.0, None, "fid", 2.0), ("a", 0, None, None, "x", 3.0)
        )
        assert data.at_scale(values, 2.0)["value"].tolist() == [2.0]
        assert data.at_scale(values, None)["value"].tolist() == [3.0]

    def test_the_scale_nearest_to_the_wanted_one_else_the_smallest(self):
        values = table(
            ("a", 0, 2.0, None, "fid", 1.0), ("a", 0, 1.5, None, "fid", 2.0), ("a", 0, None, None, "x", 3.0)
        )
        assert data.one_scale(values, 2.0) == 2.0
        assert data.one_scale(values, None) == 1.5
        assert data.one_scale(values, 7.0) == 2.0
        assert data.one_scale(values[values["metric"] == "x"], 2.0) is None

    def test_points_over_a_column_are_in_order_with_a_value_per_seed(self):
        values = table(
            ("a", 1, 4.0, None, "fid", 8.0),
            ("a", 1, 1.0, None, "fid", 6.0),
            ("a", 0, 1.0, None, "fid", 5.0),
            ("a", 0, 1.0, None, "recall", 0.5),
            ("b", 0, 1.0, None, "fid", 9.0),
        )
        assert data.points_over(values, "a", "fid", "guidance_scale") == (Point(1.0, (5.0, 6.0)), Point(4.0, (8.0,)))


class TestCells:
    def test_of_cells_that_differ_in_no_method_the_first_is_drawn(self):
        corrupted, mixed = Method("corruption", "symmetric", "fixed", 0.1), Method("mixed")
        named = [("small", corrupted), ("large", corrupted), ("both", mixed), ("both-2", mixed)]
        kept, others = data.distinct(named)
        assert (list(kept), others) == (["small", "both", "both-2"], ["large"])

    def test_families_are_by_type_and_mode_sorted_by_strength_the_largest_first(self):
        families = data.families(
            methods({"r": {"corruption_ratio": 0.1, "corruption_mode": "random"}} | LARGE), "corruption"
        )
        assert [(how.type, how.mode) for how in families] == [("symmetric", "fixed"), ("symmetric", "random")]
        first, second = families.values()
        assert [method.strength for method in first.values()] == list(ETAS)
        assert list(second) == ["eta-random-0.025", "r", "eta-random-0.1"]

    def test_the_main_mode_of_a_type_has_the_most_strengths(self):
        cells = methods({"fixed": {"cep_gamma": 1, "cep_mode": "fixed"}} | LARGE)
        main = data.of_main_mode(cells, "cep")
        assert {(how.type, how.mode): len(family) for how, family in main.items()} == {
            ("uniform", "random"): 4,
            ("gaussian", "random"): 4,
        }

    def test_few_cells_are_one_group(self):
        assert data.groups(methods(TINY)) == [methods({cell: TINY[cell] for cell in ("eta-0.05", "cep-u-1")})]

    def test_groups_hold_every_cell_but_clean_once(self):
        groups = data.groups(methods(LARGE))
        assert [len(group) for group in groups] == [6, 8, 6]
        assert sorted(cell for group in groups for cell in group) == sorted(set(LARGE) - {"clean"})

    def test_regularizers_are_all_baselines_cep_nearest_to_1_and_the_slightest_and_the_best_eta(self):
        cells = {**LARGE, "label-smoothing-more": {"label_smoothing": 0.5}}
        values = table(*(("eta-" + f"{eta:g}", 0, 2.0, None, "fid", abs(eta - 0.075)) for eta in ETAS))
        chosen = data.regularizers(values, methods(cells))
        baselines = ["dropout", "label-smoothing", "label-smoothing-more", "ip"]
        assert list(chosen) == [*baselines, "cep-u-1", "cep-g-1", "eta-0.025", "eta-0.075"]
        assert chosen["eta-0.075"] == "η = 7.5 % (best FID)" and chosen["eta-0.025"] == "η = 2.5 % (slightest)"

    def test_the_slightest_eta_may_be_the_best_one(self):
        values = table(*(("eta-" + f"{eta:g}", 0, 2.0, None, "fid", eta) for eta in ETAS))
        chosen = data.regularizers(values, methods(LARGE))
        assert list(chosen)[5:] == ["eta-0.025"] and chosen["eta-0.025"] == "η = 2.5 % (slightest, best FID)"

    def test_corruption_alone_is_no_comparison_of_regularizers(self):
        cells = {"clean": {}, "eta": {"corruption_ratio": 0.1}, "cep": {"cep_gamma": 1, "cep_mode": "fixed"}}
        assert data.regularizers(table(("eta", 0, 2.0, None, "fid", 1.0)), methods(cells)) == {}


class TestSampleRuns:
    def run(self, cell, seed):
        return {"cell": cell, "seed": seed, "samples": f"{cell}-{seed}"}

    def test_clean_slight_severe_and_cep_of_the_first_seed_that_all_have(self):
        runs = [self.run(cell, seed) for seed in (3, 4) for cell in LARGE if (cell, seed) != ("eta-0.2", 3)]
        found = data.sample_runs(runs, methods(LARGE))
        assert [run["samples"] for run in found] == ["clean-4", "eta-0.025-4", "eta-0.2-4", "cep-u-1-4"]

    def test_a_cell_without_any_picture_is_replaced(self):
        runs = [self.run(cell, 0) for cell in LARGE if cell not in ("eta-0.2", "cep-u-1")]
        found = data.sample_runs(runs, methods(LARGE))
        assert [run["cell"] for run in found] == ["clean", "eta-0.025", "eta-0.15", "cep-u-0.5"]

    def test_none_without_clean_or_alone(self):
        assert data.sample_runs([self.run("clean", 0)], methods(LARGE)) == []
        assert data.sample_runs([self.run("eta-0.05", 0), self.run("eta-0.1", 0)], methods(LARGE)) == []
        assert data.sample_runs([self.run("clean", 0), self.run("eta-0.1", 1)], methods(LARGE)) == []


class TestLines:
    def test_over_eta_from_clean_on_a_line_per_mode(self, large):
        fixed, random = data.lines_over_eta(at_one_scale(large), methods(LARGE), "fid")
        assert (fixed.title, random.title) == ("symmetric, fixed", "symmetric, random")
        assert [point.x for point in fixed.points] == pytest.approx([0, 2.5, 5, 7.5, 10, 15, 20])
        assert [point.x for point in random.points] == pytest.approx([0, 2.5, 10])
        assert fixed.points[0] == random.points[0]
        assert fixed.points[0].values == tuple(value_of(large, "clean", "fid", seed, 2.25) for seed in range(3))
        assert random.points[2].values == tuple(
            value_of(large, "eta-random-0.1", "fid", seed, 2.25) for seed in range(3)
        )

    def test_over_eta_without_a_clean_cell_or_without_the_metric(self, large):
        cells = {cell: method for cell, method in methods(LARGE).items() if cell != "clean"}
        assert data.lines_over_eta(at_one_scale(large), cells, "fid")[0].points[0].x == 2.5
        assert data.lines_over_eta(at_one_scale(large), cells, "clip_score") == []

    def test_over_gamma_a_line_per_type_without_the_fixed_one(self, large):
        uniform, gaussian = data.lines_over_gamma(at_one_scale(large), methods(LARGE), "recall")
        assert (uniform.title, gaussian.title) == ("CEP-U", "CEP-G")
        assert [point.x for point in uniform.points] == [0.1, 0.5, 1, 2]
        assert uniform.points[2].values == tuple(value_of(large, "cep-u-1", "recall", seed, 2.25) for seed in range(3))
        assert gaussian.points[3].values == tuple(
            value_of(large, "cep-g-2", "recall", seed, 2.25) for seed in range(3)
        )

    def test_over_guidance_a_line_per_cell_that_has_two_scales(self):
        values = table(
            ("clean", 0, 1.0, None, "fid", 1.0),
            ("clean", 0, 2.0, None, "fid", 2.0),
            ("eta-0.05", 0, 2.0, None, "fid", 3.0),
        )
        (line,) = data.lines_of_cells(values, methods(TINY), "fid", "guidance_scale")
        assert (line.title, [point.mean for point in line.points]) == ("clean", [1.0, 2.0])

    def test_mixed_methods_are_told_by_their_labels(self):
        values = table(("both", 0, 1.0, 5, "fid", 1.0), ("both", 0, 1.0, 10, "fid", 2.0))
        (line,) = data.lines_of_cells(values, {"both": Method("mixed")}, "fid", "step")
        assert (line.title, [point.x for point in line.points]) == ("both", [5, 10])

    def test_pairs_of_modes(self, large):
        pairs = data.pairs_of_modes(at_one_scale(large), methods(LARGE), "fid")
        assert [pair.title for pair in pairs] == ["η = 2.5 %", "η = 10 %", "CEP-U, γ = 1"]
        assert pairs[1].random.values[1] == value_of(large, "eta-random-0.1", "fid", 1, 2.25)
        assert pairs[2].fixed.values[0] == value_of(large, "fixed-cep", "fid", 0, 2.25)

    def test_differences_are_those_of_the_statistics_in_the_order_asked_for(self, large):
        from noisycond.study.statistics import compare

        compared = compare(at_one_scale(large))
        found = data.differences(compared, ["ip", "absent", "cep-u-1"], "fid")
        assert [each.cell for each in found] == ["ip", "cep-u-1"]
        gaps = [value_of(large, "ip", "fid", s, 2.25) - value_of(large, "clean", "fid", s, 2.25) for s in range(3)]
        assert found[0].mean == pytest.approx(np.mean(gaps)) and found[0].pairs == 3
        half = 4.302653 * np.std(gaps, ddof=1) / math.sqrt(3)  # Student's t of 2 degrees of freedom, 97.5 %
        assert (found[0].low, found[0].high) == pytest.approx((np.mean(gaps) - half, np.mean(gaps) + half), rel=1e-5)
        assert data.differences(compared, ["clean"], "fid") == []


class TestWords:
    def test_seeds(self):
        assert [words.seeds(each) for each in ({1}, {5}, {3, 5})] == ["1 seed", "5 seeds", "3 to 5 seeds"]

    def test_bars_are_named_where_there_are_any(self):
        assert "5 seeds" in words.bars({5}) and "standard deviation" in words.bars({5})
        assert "standard deviation" not in words.bars({1}) and "One seed" in words.bars({1})

    def test_headings_have_arrow_and_unit(self):
        assert words.heading("fid") == "FID ↓"
        assert words.heading("entropy") == "entropy [nats]"

    def test_the_best_point_of_a_line_is_on_the_better_side(self):
        line = Line("clean", Method("clean"), (Point(1.0, (3.0,)), Point(2.0, (1.0, 2.0)), Point(3.0, (4.0,))))
        assert words.best_numbers("fid", [line], "guidance") == "Lowest FID: clean 1.50 at guidance 2."
        assert words.best_numbers("recall", [line], "guidance") == "Highest recall: clean 4.000 at guidance 3."

    def test_an_interval_is_said_where_there_is_one(self):
        sure, unsure = Difference("a", -0.5, -0.7, -0.3, 3), Difference("b", 0.25, math.nan, math.nan, 1)
        said = words.difference_numbers("fid", [sure, unsure], {"a": "A", "b": "B"})
        assert said == "FID minus clean's: A -0.50 [-0.70, -0.30]; B 0.25."

    def test_numbers_of_all_lines_and_levels(self):
        line = Line("CEP-U", Method("cep", "uniform", "random"), (Point(0.5, (2.0, 3.0)),))
        panels = {"fid": Panel("FID ↓", [line], {"clean": Point(0.0, (4.0,))})}
        assert words.all_numbers(panels, "γ = {:g}") == "FID of CEP-U: 2.50 at γ = 0.5."
        assert words.level_numbers(panels) == "FID across: clean 4.00."


class TestStyles:
    def test_clean_is_black_and_no_two_lines_look_alike(self):
        lines = [Line(method.title, method, ()) for method in methods(LARGE).values()]
        styles = line_styles(lines)
        assert styles["clean"]["color"] == "#000000"
        looks = {(str(style["color"]), style["marker"], style["linestyle"]) for style in styles.values()}
        assert len(looks) == len(LARGE)

    def test_the_stronger_the_darker(self):
        lines = [Line(method.title, method, ()) for method in methods(LARGE).values()]
        styles = line_styles(lines)
        for titles in ([f"η = {100 * eta:g} %" for eta in ETAS], [f"CEP-G, γ = {g:g}" for g in (0.1, 0.5, 1, 2)]):
            brightness = [np.dot(styles[title]["color"][:3], (0.299, 0.587, 0.114)) for title in titles]
            assert brightness == sorted(brightness, reverse=True) and brightness[0] < 0.8


class TestMontage:
    def test_tiny_pictures_are_enlarged_pixel_by_pixel(self):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
        whole, scale = montage([("a", picture), ("b", picture)])
        assert scale == 87
        shown = np.array(whole.convert("RGB"))[-8 * 87 :, : 8 * 87]
        assert (shown == np.array(picture).repeat(87, 0).repeat(87, 1)).all()

    def test_wide_pictures_stand_below_one_another(self):
        whole, scale = montage([("a", Image.new("RGB", (342, 138), "red"))] * 4)
        assert scale == 2 and whole.width == 684 and whole.height > 4 * 276

    def test_pictures_of_usual_size_keep_their_pixels(self):
        picture = Image.new("RGB", (500, 450), "white")
        picture.paste((10, 200, 30), (100, 100, 300, 200))
        whole, scale = montage([("a", picture)] * 4)
        assert scale == -1 and whole.width == 1012 and whole.height > 900
        assert (np.array(whole.convert("RGB"))[-450:, -500:] == np.array(picture)).all()

    def test_what_is_too_large_is_reduced(self):
        noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
        whole, scale = montage([("a", Image.fromarray(noise))] * 4)
        assert len(png(whole)) <= MOST_BYTES and scale < -1 and whole.width < 600


@pytest.fixture(scope="module")
def drawn(large, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    steps = synthetic_study(seeds=range(3), scales=(), metrics=("fid", "inception_score"), steps=(100, 500, 2000))
    values = pandas.concat([large.values, steps.values], ignore_index=True)
    results = SimpleNamespace(values=values, runs=[dict(run) for run in large.runs], study=large.study)
    add_samples(results, folder)
    return draw_figures(results, folder / "figures")


@pytest.fixture
def tiny():
    return synthetic_study(TINY, seeds=[7], scales=(1.5,), metrics=("fid", "recall"), report_scale=None)


class TestDrawFigures:
    def test_a_large_study_has_all_of_them(self, drawn):
        assert [figure.name for figure in drawn] == ALL
        for figure in drawn:
            assert figure.path.name == f"{figure.name}.png" and figure.path.stat().st_size <= 200_000
            assert Image.open(figure.path).width >= 500
            assert figure.caption.endswith(".") and "  " not in figure.caption and figure.title and figure.alt
        assert sorted(path.name for path in drawn[0].path.parent.iterdir()) == sorted(f"{name}.png" for name in ALL)

    def test_captions_say_seeds_bars_and_guidance(self, drawn):
        by_name = {figure.name: figure.caption for figure in drawn}
        for name in ALL[:-1]:
            assert "3 seeds" in by_name[name] and ("standard deviation" in by_name[name] or "95 %" in by_name[name]), (
                name
            )
        for name in ("fid_is_over_eta", "gamma_ablation", "regularizers", "fixed_against_random", "fid_over_steps"):
            assert "at guidance scale 2.25" in by_name[name], name
        assert "seed 0" in by_name["samples"]

    def test_alt_texts_have_the_numbers(self, drawn, large):
        fid = np.mean([value_of(large, "eta-0.05", "fid", seed, 2.25) for seed in range(3)])
        assert f"{fid:.2f} at η = 5 %" in drawn[0].alt

    def test_samples_are_the_runs_pictures(self, drawn):
        shown = {colour for _, colour in Image.open(drawn[-1].path).convert("RGB").getcolors(100_000)}
        wanted = {(10 * list(LARGE).index(cell), 0, 90) for cell in ("clean", "eta-0.025", "eta-0.2", "cep-u-1")}
        assert wanted <= shown

    def test_what_there_is_no_data_for_is_left_out(self, tiny, tmp_path):
        figures = draw_figures(tiny, tmp_path)
        assert [figure.name for figure in figures] == ["fid_is_over_eta", "regularizers"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["fid_is_over_eta.png", "regularizers.png"]
        assert "IS" not in figures[0].title and "guidance scale 1.5" in figures[0].caption
        for figure in figures:
            assert "standard deviation" not in figure.caption and "interval" not in figure.caption.split("without")[0]

    def test_the_same_results_make_the_same_bytes(self, tiny, tmp_path):
        first, second = draw_figures(tiny, tmp_path / "a"), draw_figures(tiny, tmp_path / "b")
        assert [one.path.read_bytes() for one in first] == [other.path.read_bytes() for other in second]

    def test_nothing_measured_or_nothing_finite_draws_nothing(self, tiny, tmp_path):
        empty = SimpleNamespace(values=tiny.values.iloc[:0], runs=tiny.runs, study=tiny.study)
        assert draw_figures(empty, tmp_path) == []
        for value in (math.nan, math.inf):
            broken = SimpleNamespace(values=tiny.values.assign(value=value), runs=tiny.runs, study=tiny.study)
            assert draw_figures(broken, tmp_path) == []

    def test_a_missing_run_makes_fewer_seeds(self, tmp_path):
        results = synthetic_study(TINY, seeds=range(3), scales=(1.5,), metrics=("fid",), report_scale=1.5)
        results.values = results.values[(results.values["cell"] != "eta-0.05") | (results.values["seed"] != 2)]
        assert "2 to 3 seeds" in draw_figures(results, tmp_path)[0].caption

    def test_blocks_have_figures_of_their_own(self, tmp_path):
        cells = {"clean": {}, "eta-0.05": {"corruption_ratio": 0.05}}
        names = {"scales": (1.5,), "metrics": ("fid",), "report_scale": 1.5}
        results = synthetic_study(cells, seeds=[0], blocks=("ldm", "dit b/2"), **names)
        ours, theirs = draw_figures(results, tmp_path)
        assert (ours.name, theirs.name) == ("fid_is_over_eta-ldm", "fid_is_over_eta-dit-b-2")
        assert theirs.path == tmp_path / "fid_is_over_eta-dit-b-2.png" and theirs.title.endswith(": dit b/2")
        for figure, block in ((ours, "ldm"), (theirs, "dit b/2")):
            mine = results.values[results.values["block"] == block].set_index("cell")["value"]
            assert f"{mine['clean']:.2f} at η = 0 %, {mine['eta-0.05']:.2f} at η = 5 %" in figure.alt
            assert "not drawn" not in figure.caption

    def test_cells_of_a_method_already_drawn_are_named(self, tmp_path):
        cells = {"clean": {}, "eta-0.05": {"corruption_ratio": 0.05}, "wide": {"corruption_ratio": 0.05, "width": 64}}
        results = synthetic_study(cells, seeds=[0], scales=(1.5,), metrics=("fid",), report_scale=1.5)
        (figure,) = draw_figures(results, tmp_path)
        assert figure.caption.endswith("not drawn: wide.")

    def test_types_of_corruption_have_figures_over_guidance_of_their_own(self, tmp_path):
        asymmetric = {"corruption_ratio": 0.05, "corruption_type": "asymmetric"}
        cells = {"clean": {}, "eta": {"corruption_ratio": 0.05}, "asymmetric": asymmetric}
        results = synthetic_study(cells, seeds=[0], scales=(1.5, 2.0), metrics=("recall",))
        names = [figure.name for figure in draw_figures(results, tmp_path)]
        assert names[:2] == ["metrics_over_guidance", "metrics_over_guidance_asymmetric"]
