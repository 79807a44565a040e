"""The figures of a study draw what its results hold, leave out what they do not, and say so."""

import math
from dataclasses import replace

import numpy as np
import pandas
import pytest
from PIL import Image
from study_results import LARGE, TINY, add_samples, change_study, toy_results

from noisycond.study import figure_data as data
from noisycond.study import figure_drawing, figures, selection
from noisycond.study import figure_words as words
from noisycond.study.figure_data import Difference, Line, Point
from noisycond.study.figure_drawing import (
    Axis,
    Dot,
    DotPanel,
    Panel,
    cell_styles,
    draw_dots,
    draw_lines,
    family_styles,
)
from noisycond.study.methods import Method, method_of
from noisycond.study.montage import MOST_BYTES, montage, png
from noisycond.study.statistics import compare


ETAS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2)
ALL = [
    "fid_is_over_eta",
    "metrics_over_guidance",
    "metrics_over_guidance_cep",
    "difficulty_and_entropy_over_guidance",
    "precision_over_recall",
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
    return toy_results(range(3), guidance_scales=(1.0, 2.25), cells=LARGE, metrics=metrics)


def draw_figures(results, folder):
    return figures.draw_figures(results, compare(results.values), folder)


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

    def test_one_scale_is_the_one_of_the_tables(self):
        values = table(
            ("a", 0, 2.0, None, "fid", 1.0), ("a", 0, 1.5, None, "fid", 2.0), ("a", 0, None, None, "x", 3.0)
        )
        assert data.one_scale(values, 7.0) == 2.0
        assert data.one_scale(values, None) is None
        assert data.one_scale(values[values["metric"] == "fid"], None) == 1.5

    def test_points_over_a_column_are_in_order_with_a_value_per_seed(self):
        values = table(
            ("a", 1, 4.0, None, "fid", 8.0),
            ("a", 1, 1.0, None, "fid", 6.0),
            ("a", 0, 1.0, None, "fid", 5.0),
            ("a", 0, 1.0, None, "recall", 0.5),
            ("b", 0, 1.0, None, "fid", 9.0),
        )
        assert data.points_over(values, "a", "fid", "guidance_scale") == (Point(1.0, (5.0, 6.0)), Point(4.0, (8.0,)))

    def test_a_metric_over_another_one_goes_from_guidance_scale_to_guidance_scale(self):
        values = table(
            *(("clean", 0, 1.0, None, "recall", 0.9), ("clean", 1, 1.0, None, "recall", 0.7)),
            *(("clean", 0, 1.0, None, "precision", 0.6), ("clean", 1, 1.0, None, "precision", 0.2)),
            *(("clean", 0, 2.0, None, "recall", 0.5), ("clean", 0, 2.0, None, "precision", 0.8)),
            *(("clean", 1, 2.0, None, "recall", 0.1), ("clean", 0, 4.0, None, "precision", 0.9)),  # one of both alone
            *(("once", 0, 1.0, None, "recall", 0.9), ("once", 0, 1.0, None, "precision", 0.6)),
        )
        cells = {name: Method("clean") for name in ("clean", "once")}
        (line,) = data.lines_of_two(values, cells, "precision", "recall")
        first, second = line.points
        assert (first.x, first.values, first.x_spread) == (pytest.approx(0.8), (0.6, 0.2), pytest.approx(0.02**0.5))
        assert second == Point(0.5, (0.8,), 0.0, scale=2.0)
        assert words.trade_numbers("precision", "recall", [line]) == (
            "precision and recall: CLEAN 0.400 and 0.800 at guidance 1, 0.800 and 0.500 at guidance 2."
        ).replace("CLEAN", line.title)


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

    def test_regularizers_are_titled_and_have_values(self):
        values = table(*((cell, 0, 2.0, None, "fid", 1.0) for cell in LARGE if cell != "eta-0.025"))
        titles = data.regularizers(values, methods(LARGE))
        assert list(titles) == ["dropout", "label-smoothing", "ip", "cep-u-1", "cep-g-1", "eta-random-0.025"]
        assert titles["eta-random-0.025"] == "η = 2.5 %, random (slightest)"


class TestSelection:
    """What tables and figures choose alike."""

    @pytest.mark.parametrize(
        ("scales", "wanted", "found"),
        [
            ([4.0, 1.0, 2.25], 2.25, [2.25, 1.0, 4.0]),
            ([4.0, 1.0], 2.5, [1.0, 4.0]),
            ([4.0, 1.0, None], None, [None, 1.0, 4.0]),
            ([4.0, 1.0, None], 9.0, [4.0, 1.0, None]),
            ([4.0, 1.0], None, [1.0, 4.0]),
            ([None], 2.0, [None]),
            ([], 2.0, []),
        ],
    )
    def test_places(self, scales, wanted, found):
        assert selection.places(scales, wanted) == found

    def test_regularizers_are_chosen_by_their_settings(self):
        cells = {**LARGE, "label-smoothing-more": {"label_smoothing": 0.5}}
        found = selection.regularizers(methods(cells))
        assert {name: list(each) for name, each in found.items()} == {
            "clean": ["clean"],
            "dropout": ["dropout"],
            "label smoothing": ["label-smoothing", "label-smoothing-more"],
            "input perturbation": ["ip"],
            "CEP-U": ["cep-u-1"],
            "CEP-G": ["cep-g-1"],
            "corruption": ["eta-0.025"],
        }

    @pytest.mark.parametrize(("gammas", "nearest"), [((2, 0.5), 0.5), ((10, 0.1), 0.1), ((0.4, 2), 2), ((3, 1), 1)])
    def test_of_two_gammas_equally_near_the_smaller(self, gammas, nearest):
        cells = {f"cep-{gamma}": Method("cep", "uniform", "random", gamma) for gamma in gammas}
        assert list(selection.nearest_gamma(cells)) == [f"cep-{nearest}"]

    def test_corruption_alone_is_no_comparison_of_regularizers(self):
        cells = {"clean": {}, "eta": {"corruption_ratio": 0.1}, "cep": {"cep_gamma": 1, "cep_mode": "fixed"}}
        assert selection.regularizers(methods(cells)) == {}

    def test_pairs_of_modes_are_those_that_differ_in_nothing_else(self):
        cells = list(methods(LARGE).items())
        expected = [("eta-0.025", "eta-random-0.025"), ("eta-0.1", "eta-random-0.1"), ("fixed-cep", "cep-u-1")]
        assert sorted(selection.pairs_of_modes(cells)) == expected
        again = [*cells, ("longer", Method("corruption", "symmetric", "fixed", 0.1))]
        assert sorted(selection.pairs_of_modes(again)) == [expected[0], expected[2]]

    @pytest.mark.parametrize(
        ("trains", "names_seeds", "said"),
        [(True, False, "training and drawing"), (True, True, "training"), (False, False, "drawing")],
    )
    def test_what_a_seed_decides(self, tiny, trains, names_seeds, said):
        study = tiny.study
        values = {"seeds": [0, 1]} if names_seeds else {}
        cells = study.cells if trains else tuple(replace(cell, stages=(), pipeline="a") for cell in study.cells)
        changed = replace(study, cells=cells, evaluation=replace(study.evaluation, values=values))
        assert selection.seeds_decide(changed) == said


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
        modes = selection.pairs_of_modes(methods(LARGE).items())
        pairs = data.points_of_modes(at_one_scale(large), methods(LARGE), modes, "fid")
        assert [pair.title for pair in pairs] == ["η = 2.5 %", "η = 10 %", "CEP-U, γ = 1"]
        assert pairs[1].random.values[1] == value_of(large, "eta-random-0.1", "fid", 1, 2.25)
        assert pairs[2].fixed.values[0] == value_of(large, "fixed-cep", "fid", 0, 2.25)

    def test_differences_are_those_of_the_statistics_in_the_order_asked_for(self, large):
        compared = compare(at_one_scale(large))
        found = data.differences(compared, ["ip", "absent", "cep-u-1"], "fid")
        assert [each.cell for each in found] == ["ip", "cep-u-1"]
        gaps = [value_of(large, "ip", "fid", s, 2.25) - value_of(large, "clean", "fid", s, 2.25) for s in range(3)]
        assert found[0].mean == pytest.approx(np.mean(gaps)) and found[0].pairs == 3
        half = 4.302653 * np.std(gaps, ddof=1) / math.sqrt(3)  # Student's t of 2 degrees of freedom, 97.5 %
        assert (found[0].low, found[0].high) == pytest.approx((np.mean(gaps) - half, np.mean(gaps) + half), rel=1e-5)
        assert found[0].verdict == compared.set_index(["cell", "metric"]).loc[("ip", "fid"), "verdict"] != ""
        assert data.differences(compared, ["clean"], "fid") == []


class TestWords:
    def test_seeds(self):
        assert [words.seeds(each) for each in ({1}, {5}, {3, 5})] == ["1 seed", "5 seeds", "3 to 5 seeds"]

    def test_bars_are_named_where_there_are_any(self):
        several, one = (words.bars({count}, "training and drawing") for count in (5, 1))
        assert "5 seeds, of training and drawing; bars: ± the sample standard deviation" in several
        assert "standard deviation" not in one and "One seed" in one

    def test_how_curves_were_measured(self):
        choices = {"num_images": 1000, "num_inference_steps": 12, "guidance_scale": 2.5, "reference": "x"}
        said = words.curve_choices([choices, {}, choices])
        assert said.startswith("Measured with 1,000 images, 12 steps, guidance scale 2.5: compare among these")
        assert words.curve_choices([{}, {}]) == ""
        assert "num_images that differ" in words.curve_choices([{"num_images": 5}, {"num_images": 6}])

    def test_headings_have_arrow_and_unit(self):
        assert words.heading("fid") == "FID ↓"
        assert words.heading("entropy") == "entropy [nats]"

    def test_the_best_point_of_a_line_is_on_the_better_side(self):
        line = Line("clean", Method("clean"), (Point(1.0, (3.0,)), Point(2.0, (1.0, 2.0)), Point(3.0, (4.0,))))
        assert words.best_numbers("fid", [line], "guidance") == "Lowest FID: clean 1.50 at guidance 2."
        assert words.best_numbers("recall", [line], "guidance") == "Highest recall: clean 4.000 at guidance 3."

    def test_an_interval_is_said_where_there_is_one(self):
        sure, unsure = Difference("a", -0.5, -0.7, -0.3, 3, "better"), Difference("b", 0.25, math.nan, math.nan, 1)
        said = words.difference_numbers("fid", [sure, unsure], {"a": "A", "b": "B"})
        assert said == "FID minus clean's: A -0.50 [-0.70, -0.30], better; B 0.25."

    def test_numbers_of_all_lines_and_levels(self):
        line = Line("CEP-U", Method("cep", "uniform", "random"), (Point(0.5, (2.0, 3.0)),))
        panels = {"fid": Panel("FID ↓", [line], {"clean": Point(0.0, (4.0,))})}
        assert words.all_numbers(panels, "γ = {:g}") == "FID of CEP-U: 2.50 at γ = 0.5."
        assert words.level_numbers(panels) == "FID across: clean 4.00."


def styles_of(cells) -> dict:
    return cell_styles({method.title: method for method in methods(cells).values()})


class TestStyles:
    def test_clean_is_black_and_no_two_lines_look_alike(self):
        styles = styles_of(LARGE)
        assert styles["clean"]["color"] == "#000000"
        looks = {(str(style["color"]), style["marker"], style["linestyle"]) for style in styles.values()}
        assert len(looks) == len(LARGE)

    def test_the_stronger_the_darker(self):
        styles = styles_of(LARGE)
        for titles in ([f"η = {100 * eta:g} %" for eta in ETAS], [f"CEP-G, γ = {g:g}" for g in (0.1, 0.5, 1, 2)]):
            brightness = [np.dot(styles[title]["color"][:3], (0.299, 0.587, 0.114)) for title in titles]
            assert brightness == sorted(brightness, reverse=True) and brightness[0] < 0.8

    def test_lines_over_strengths_keep_their_look_in_all_panels(self):
        lines = [Line(name, Method("cep", type, "random"), ()) for name, type in (("U", "uniform"), ("G", "gaussian"))]
        lines.append(Line("symmetric", Method("corruption", "symmetric", "fixed"), ()))
        assert family_styles(3 * lines) == family_styles(lines)

    def test_one_strength_has_one_colour(self):
        styles = styles_of(LARGE)
        assert styles["η = 10 %"]["color"] == styles["η = 10 %, random"]["color"] != styles["η = 5 %"]["color"]
        assert styles["CEP-U, γ = 1"]["color"] == styles["CEP-U, γ = 1, fixed"]["color"]
        assert styles["η = 10 %"]["linestyle"] != styles["η = 10 %, random"]["linestyle"]


@pytest.fixture
def axes_of(monkeypatch, tmp_path):
    """Calls a function that draws; returns the axes of its figure."""

    def drawn(draw, *arguments, **options):
        kept = []
        monkeypatch.setattr(figure_drawing, "_finish", lambda figure, note, path: kept.append(figure))
        draw(*arguments, "note", tmp_path / "a.png", **options)
        return kept[0].axes

    return drawn


def bars_of(axes) -> list[float]:
    """The coordinates of the ends of all bars, in the order of drawing."""
    lines = [lines for container in axes.containers for lines in container.lines[2]]
    return [float(x) for each in lines for segment in each.get_segments() for x in segment.ravel()]


class TestDrawing:
    """What stands on the axes."""

    def test_bars_reach_a_standard_deviation_either_way(self, axes_of):
        line = Line("clean", Method("clean"), (Point(1.0, (1.0, 3.0)), Point(2.0, (4.0, 4.0, 7.0))))
        (axes,) = axes_of(draw_lines, [[Panel("FID", [line])]], Axis("x"), styles_of({"clean": {}}), single_seeds=True)
        assert axes.lines[0].get_xydata().tolist() == [[1, 2], [2, 5]]
        ends = [1, 2 - math.sqrt(2), 1, 2 + math.sqrt(2), 2, 5 - math.sqrt(3), 2, 5 + math.sqrt(3)]
        assert bars_of(axes) == pytest.approx(ends)
        places = [dots.get_offsets().tolist() for dots in axes.collections if len(dots.get_offsets()) > 1]
        assert places == [[[1, 1], [1, 3]], [[2, 4], [2, 4], [2, 7]]]

    def test_over_a_metric_points_stand_where_they_are_with_bars_along_both_axes(self, axes_of):
        points = (Point(0.9, (1.0, 3.0), 0.05, scale=1.0), Point(0.5, (4.0, 6.0), 0.1, scale=2.5))
        lines = [Line(title, Method("clean"), points) for title in ("clean", "other")]
        style = styles_of({"clean": {}})["clean"]
        axis, styles = Axis("recall", ticks=False, measured=True), {"clean": style, "other": style}
        (axes,) = axes_of(draw_lines, [[Panel("precision", lines)]], axis, styles)
        across = [0.85, 2, 0.95, 2, 0.4, 5, 0.6, 5]
        along = [0.9, 2 - math.sqrt(2), 0.9, 2 + math.sqrt(2), 0.5, 5 - math.sqrt(2), 0.5, 5 + math.sqrt(2)]
        assert bars_of(axes) == pytest.approx((across + along) * 2)
        assert [(text.get_text(), text.xy) for text in axes.texts] == [("1", (0.9, 2)), ("2.5", (0.5, 5))]
        assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("recall", "precision", "")

    def test_over_a_metric_rows_have_one_scale(self, axes_of):
        style = styles_of({"clean": {}})["clean"]
        ends = ((0.9, 0.5), (0.4, 0.1))
        lines = [
            Line("clean", Method("clean"), tuple(Point(x, (x,), scale=scale) for scale, x in enumerate(each)))
            for each in ends
        ]
        rows = [[Panel("precision", [line])] for line in lines]
        above, below = axes_of(draw_lines, rows, Axis("recall", ticks=False, measured=True), {"clean": style})
        assert above.get_xlim() == below.get_xlim() and above.get_ylim() == below.get_ylim()
        assert below.get_xlim()[0] < 0.1 and below.get_xlim()[1] > 0.9

    def test_dots_stand_in_their_rows_with_their_bars_full_or_hollow(self, axes_of):
        dots = [Dot(1.0, 0.25, 0.5, colour="#123456"), None, Dot(3.0, 1.0, 1.0, filled=False)]
        (axes,) = axes_of(draw_dots, [DotPanel("FID", {"difference": dots}, Point(0.0, (0.0,)))], ["a", "b", "c"])
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
        assert axes.get_ylim() == (2.5, -0.5)  # the first row above
        marks = [line for line in axes.lines if line.get_marker() == "o"]
        assert [line.get_xydata().tolist() for line in marks] == [[[1, 0]], [[3, 2]]]
        assert [line.get_markerfacecolor() for line in marks] == ["#123456", "white"]
        assert bars_of(axes) == [0.75, 0, 1.5, 0, 2, 2, 4, 2]


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
    curves = {"guidance_scales": (), "metrics": ("fid", "inception_score"), "steps": (100, 500, 2000)}
    steps = toy_results(range(3), cells=LARGE, **curves)
    values = pandas.concat([large.values, steps.values], ignore_index=True)
    choices = {"num_images": 90, "num_inference_steps": 6, "guidance_scale": 2.25}
    results = replace(large, values=values, runs=[run | {"curve_choices": choices} for run in large.runs])
    add_samples(results, folder)
    return draw_figures(results, folder / "figures")


@pytest.fixture
def tiny():
    return toy_results([7], guidance_scales=(1.5,), cells=TINY, metrics=("fid", "recall"), report_scale=None)


@pytest.fixture
def handed(monkeypatch):
    """What is handed to the drawing, by the name of the file: panels (in rows, of lines), and titles of rows of
    dots."""
    found = {}
    monkeypatch.setattr(figures, "draw_dots", lambda *given: found.update({given[3].stem: given[:2]}))
    monkeypatch.setattr(figures, "draw_lines", lambda *given, **options: found.update({given[4].stem: given[0]}))
    return found


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
            assert "training and drawing" in by_name[name], name
        assert "seed 0" in by_name["samples"]
        assert "Measured with 90 images, 6 steps, guidance scale 2.25:" in by_name["fid_over_steps"]
        assert "√3 times" in by_name["gamma_ablation"] and "stand in the table" in by_name["fixed_against_random"]

    def test_alt_texts_have_the_numbers(self, drawn, large):
        fid = np.mean([value_of(large, "eta-0.05", "fid", seed, 2.25) for seed in range(3)])
        assert f"{fid:.2f} at η = 5 %" in drawn[0].alt

    def test_samples_are_captioned_by_the_scale_they_were_drawn_at(self, tiny, tmp_path):
        def samples(scales) -> list:
            for run in tiny.runs:
                run["samples_scale"] = scales[run["cell"]]
            return [figure for figure in draw_figures(tiny, tmp_path / "drawn") if figure.name == "samples"]

        add_samples(tiny, tmp_path)
        assert "at guidance scale 3, all" in samples(dict.fromkeys(TINY, 3.0))[0].caption  # the report's is 1.5
        assert "guidance" not in samples(dict.fromkeys(TINY))[0].caption
        assert samples({cell: float(number) for number, cell in enumerate(TINY)}) == []  # not to be compared

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
        draw_figures(tiny, tmp_path)
        empty = replace(tiny, values=tiny.values.iloc[:0])
        assert draw_figures(empty, tmp_path) == []
        for value in (math.nan, math.inf):
            assert draw_figures(replace(tiny, values=tiny.values.assign(value=value)), tmp_path) == []
        assert list(tmp_path.iterdir()) == []  # and the earlier ones are gone

    def test_other_files_are_left_alone(self, tiny, tmp_path):
        for name in ("mine.png", "samples.png", "metrics_over_guidance_symmetric.png", "samples-mine.png"):
            (tmp_path / name).write_text("")
        draw_figures(tiny, tmp_path)
        left = ["fid_is_over_eta.png", "mine.png", "regularizers.png", "samples-mine.png"]
        assert sorted(path.name for path in tmp_path.iterdir()) == left

    def test_a_missing_run_makes_fewer_seeds(self, tmp_path):
        results = toy_results(range(3), guidance_scales=(1.5,), cells=TINY, metrics=("fid",))
        results.values = results.values[(results.values["cell"] != "eta-0.05") | (results.values["seed"] != 2)]
        assert "2 to 3 seeds" in draw_figures(results, tmp_path)[0].caption

    def test_blocks_have_figures_of_their_own(self, tmp_path):
        cells = {"clean": {}, "eta-0.05": {"corruption_ratio": 0.05}}
        results = toy_results([0], ("ldm", "dit b/2"), (1.5,), cells=cells, metrics=("fid",))
        ours, theirs = draw_figures(results, tmp_path)
        assert (ours.name, theirs.name) == ("fid_is_over_eta-ldm", "fid_is_over_eta-dit-b-2")
        assert theirs.path == tmp_path / "fid_is_over_eta-dit-b-2.png" and theirs.title.endswith(": dit b/2")
        for figure, block in ((ours, "ldm"), (theirs, "dit b/2")):
            mine = results.values[results.values["block"] == block].set_index("cell")["value"]
            assert f"{mine['clean']:.2f} at η = 0 %, {mine['eta-0.05']:.2f} at η = 5 %" in figure.alt
            assert "not drawn" not in figure.caption

    def test_cells_of_a_method_already_drawn_are_named(self, tmp_path):
        cells = {"clean": {}, "eta-0.05": {"corruption_ratio": 0.05}, "wide": {"corruption_ratio": 0.05, "width": 64}}
        results = toy_results([0], guidance_scales=(1.5,), cells=cells, metrics=("fid",))
        (figure,) = draw_figures(results, tmp_path)
        assert figure.caption.endswith("not drawn: wide.")

    def test_types_of_corruption_have_figures_over_guidance_of_their_own(self, tmp_path):
        asymmetric = {"corruption_ratio": 0.05, "corruption_type": "asymmetric"}
        cells = {"clean": {}, "eta": {"corruption_ratio": 0.05}, "asymmetric": asymmetric}
        results = toy_results([0], guidance_scales=(1.5, 2.0), cells=cells, metrics=("recall",))
        one, other, *_ = draw_figures(results, tmp_path)
        assert (one.name, other.name) == ("metrics_over_guidance", "metrics_over_guidance_asymmetric")
        assert one.title.endswith(", symmetric corruption") and other.title.endswith(", asymmetric corruption")


class TestWhatIsDrawn:
    """The data that is handed to the drawing."""

    def test_regularizers_are_the_differences_of_the_comparison_full_where_tables_mark_them(self, handed, tmp_path):
        results = toy_results(range(3), cells=LARGE, metrics=("fid", "inception_score"))
        summary = compare(results.values)
        (figure,) = (each for each in figures.draw_figures(results, summary, tmp_path) if each.name == "regularizers")
        panels, titles = handed["regularizers"]
        cells = ["dropout", "label-smoothing", "ip", "cep-u-1", "cep-g-1", "eta-0.025"]
        assert titles == [method_of(LARGE[cell]).title for cell in cells[:-1]] + ["η = 2.5 % (slightest)"]
        assert [panel.heading for panel in panels] == ["Δ FID ↓", "Δ IS ↑"]
        found = summary[summary["guidance_scale"] == 2.25].set_index(["metric", "cell"])
        for metric, panel in zip(("fid", "inception_score"), panels, strict=True):
            for cell, dot in zip(cells, panel.series["difference from clean"], strict=True):
                line = found.loc[(metric, cell)]
                ends = (dot.value, dot.value - dot.below, dot.value + dot.above)
                assert ends == pytest.approx((line["difference"], line["low"], line["high"]))
                assert dot.filled == (line["verdict"] in ("better", "worse"))
        assert {dot.filled for panel in panels for dot in panel.series["difference from clean"]} == {True, False}
        assert "filled where the tables mark a difference" in figure.caption

    def test_a_point_whose_interval_leaves_out_0_is_hollow_where_p_adjusted_is_not_small(self, handed, tmp_path):
        results = toy_results(range(4), guidance_scales=(1.0,), cells=LARGE, metrics=("fid",))
        values = results.values
        clean = values[values["cell"] == "clean"].set_index("seed")["value"]
        noise = np.random.default_rng(0).normal(size=len(values)) * (values["cell"] != "clean")
        moved = values["seed"].map({0: 1.0, 1: 0.4, 2: 1.5, 3: 1.1})  # p = 0.02 alone
        values["value"] = values["seed"].map(clean) + noise.where(values["cell"] != "ip", moved)
        draw_figures(results, tmp_path)
        dot = handed["regularizers"][0][0].series["difference from clean"][2]
        assert dot.value - dot.below > 0 and not dot.filled

    def test_modes_are_their_cells_with_all_seeds(self, handed, large, tmp_path):
        draw_figures(large, tmp_path)
        panels, titles = handed["fixed_against_random"]
        assert titles == ["η = 2.5 %", "η = 10 %", "CEP-U, γ = 1"]
        fixed, random = ("eta-0.025", "eta-0.1", "fixed-cep"), ("eta-random-0.025", "eta-random-0.1", "cep-u-1")
        for name, cells in (("fixed", fixed), ("random", random)):
            for dot, cell in zip(panels[0].series[name], cells, strict=True):
                seeds = [value_of(large, cell, "fid", seed, 2.25) for seed in range(3)]
                assert list(dot.seeds) == seeds and dot.value == pytest.approx(np.mean(seeds))
                assert dot.below == dot.above == pytest.approx(np.std(seeds, ddof=1))

    def test_lines_over_guidance_are_those_of_the_cells(self, handed, large, tmp_path):
        draw_figures(large, tmp_path)
        panel = handed["metrics_over_guidance"][0][0]
        assert panel.heading == "FID ↓"
        assert [line.title for line in panel.lines] == ["clean", *(f"η = {100 * eta:g} %" for eta in ETAS)]
        for line, cell in zip(panel.lines, ["clean", *(f"eta-{eta:g}" for eta in ETAS)], strict=True):
            for point, scale in zip(line.points, (1.0, 2.25), strict=True):
                assert point.x == scale
                assert point.values == tuple(value_of(large, cell, "fid", seed, scale) for seed in range(3))

    def test_a_metric_that_is_the_same_throughout_has_no_panel(self, handed, tmp_path):
        results = toy_results((0, 1), cells=LARGE, metrics=("fid", "recall", "memorization_ratio"))
        results.values.loc[results.values["metric"] != "fid", "value"] = 0.0
        found = {figure.name: figure.caption for figure in draw_figures(results, tmp_path)}
        for name in ("metrics_over_guidance", "metrics_over_guidance_cep"):
            assert [panel.heading for row in handed[name] for panel in row] == ["FID ↓"]
            said = "Not drawn, for it is the same throughout: recall is 0.000 and memorized is 0.000."
            assert found[name].endswith(said)
        for name in ("regularizers", "fixed_against_random"):
            assert len(handed[name][0]) == 1 and "Not drawn, for" in found[name]

    def test_what_is_not_drawn_is_not_named(self, handed, tmp_path):
        cells = {cell: settings for cell, settings in LARGE.items() if cell != "clean"}
        results = toy_results((0, 1), cells=cells, metrics=("fid",), steps=(5, 10))
        drawn = draw_figures(results, tmp_path)
        assert len(drawn) == 6 and not [figure.name for figure in drawn if "clean" in figure.caption.lower()]

    def test_the_guidance_scale_is_that_of_the_tables(self, handed, tmp_path):
        results = toy_results((0, 1), guidance_scales=(1.0, math.nan), cells=TINY, metrics=("fid",))
        change_study(results, report_guidance_scale=None)
        draw_figures(results, tmp_path)
        values = results.values[results.values["guidance_scale"].isna() & (results.values["cell"] == "eta-0.05")]
        assert handed["fid_is_over_eta"][0][0].lines[0].points[1].values == tuple(values["value"])
