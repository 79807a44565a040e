"""Tables say what the numbers say, whom they compare with whom, and what is not there."""

import dataclasses
import io
import math
import re

import pandas as pd
import pytest
from study_results import METRICS as MEASURED
from study_results import change_study, frame, toy_cell, toy_results

from noisycond.errors import InputError
from noisycond.evaluation.metrics import METRICS
from noisycond.study.figures import Figure
from noisycond.study.reading import STUDIES
from noisycond.study.statistics import compare, compare_modes
from noisycond.study.tables import LEGEND, MARKS, Table, ranges, results_frame, run_table, write_page, write_tables


FEW = ("fid", "recall", "entropy")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results, tables and page of a study of which some runs failed."""
    failed, missing = [("cep-g-1", 3), ("cep-g-1", 4), ("dropout", 1)], [("smoothing", seed) for seed in range(5)]
    results = toy_results(failed=failed, missing=missing, steps=(500,))
    folder = tmp_path_factory.mktemp("tables")
    tables = written(results, folder)
    page = write_page(results, tables, [], folder).read_text()
    return results, {table.title: table for table in tables}, page, folder


def written(results, folder) -> list[Table]:
    return write_tables(results, compare(results.values), folder)


def tables_of(results, tmp_path) -> dict[str, Table]:
    return {table.title: table for table in written(results, tmp_path)}


def page_of(results, tmp_path, figures=()) -> str:
    return write_page(results, written(results, tmp_path), figures, tmp_path).read_text()


def texts(table: Table, column: str) -> dict[str, str]:
    """A column by the first."""
    return {line[0]: line[table.head.index(column)] for line in table.lines}


def with_values(results, label: str, change) -> None:
    """Changes the frame's values of a cell: `change` takes its lines."""
    of_cell = results.values["cell"] == label
    results.values.loc[of_cell, "value"] = change(results.values[of_cell])


class TestMain:
    def test_numbers_and_marks_are_those_of_the_comparison(self, whole):
        results, tables, _, _ = whole
        found = compare(results.values)
        for scale in (1.0, 2.25, 4.0):
            of_scale = found[(found["guidance_scale"] == scale) & found["step"].isna()].set_index(["title", "metric"])
            columns = {}
            for group in ("Fidelity", "Diversity", "Memorization and other metrics"):
                table = tables[f"{group}, guidance scale {scale:g}"]
                for number, heading in enumerate(table.head[2:], 2):
                    columns[heading] = {
                        line[0]: (line[number], marks[number])
                        for line, marks in zip(table.lines, table.marks, strict=True)
                    }
            assert set(columns) == {METRICS[name].heading for name in MEASURED}
            for (title, metric), line in of_scale.iterrows():
                name = "mixed (both)" if title == "mixed" else title
                places = METRICS[metric].decimals
                text = f"{line['mean']:.{places}f} ± {line['spread']:.{places}f}"
                assert columns[METRICS[metric].heading][name] == (text, line["verdict"])

    def test_is_cut_where_it_would_be_too_wide(self, whole, tmp_path):
        _, tables, _, _ = whole
        assert list(tables)[:3] == [
            "Fidelity, guidance scale 2.25",
            "Diversity, guidance scale 2.25",
            "Memorization and other metrics, guidance scale 2.25",
        ]
        few = tables_of(toy_results(cells=("clean", "eta-0.05"), metrics=FEW), tmp_path)
        assert few["All cells, guidance scale 2.25"].head == ["cell", "n", "FID ↓", "recall ↑", "entropy"]

    def test_holds_every_metric_there_may_be(self, tmp_path):
        lines = [
            {"cell": cell, "seed": seed, "metric": metric, "value": 0.5}
            for cell in ("clean", "eta-0.05")
            for seed in (0, 1)
            for metric in [*METRICS, "one more"]
        ]
        results = toy_results(cells=("clean", "eta-0.05"), seeds=(0, 1))
        results.values = frame(lines)
        tables = list(tables_of(results, tmp_path).values())
        shown = [heading for table in tables for heading in table.head[2:]]
        assert sorted(shown) == sorted([*(metric.heading for metric in METRICS.values()), "one more"])
        assert max(len(table.head) for table in tables) <= 2 + 10

    def test_clean_comes_first_and_others_in_families_by_strength(self, tmp_path):
        cells = ("ip", "eta-0.1", "cep-u-2", "clean", "eta-0.025", "cep-u-0.1", "cep-g-1", "eta-random-0.025")
        table = tables_of(toy_results(cells=cells, metrics=FEW), tmp_path)["All cells, guidance scale 2.25"]
        families = [["clean"], ["IP, γ = 0.1"], ["η = 2.5 %", "η = 10 %"], ["CEP-U, γ = 0.1", "CEP-U, γ = 2"]]
        families += [["CEP-G, γ = 1"], ["η = 2.5 %, random"]]
        assert [line[0] for line in table.lines] == [name for family in families for name in family]
        assert table.marks[0] == [""] * 5 and all(mark in MARKS for line in table.marks for mark in line)

    def test_cells_of_one_method_are_told_apart(self, tmp_path):
        results = toy_results(cells=("clean", "eta-0.05", "ip"), metrics=FEW)
        longer = toy_cell("", "longer", {"corruption_ratio": 0.05, "max_train_steps": 9})
        change_study(results, cells=(*results.study.cells, longer))
        table = tables_of(results, tmp_path)["All cells, guidance scale 2.25"]
        names = ["clean", "η = 5 % (eta-0.05)", "η = 5 % (longer)", "IP, γ = 0.1"]
        assert [line[0] for line in table.lines] == names

    def test_small_values_keep_a_digit(self, tmp_path):
        results = toy_results(cells=("clean",), metrics=("kid",))
        results.values["value"] *= 1e-3
        assert re.fullmatch(r"2\.\de-06 ± \d\.\de-07", next(iter(tables_of(results, tmp_path).values())).lines[0][2])


class TestPlaces:
    def test_the_reports_stands_first(self, tmp_path):
        results = toy_results(cells=("clean",), metrics=FEW, guidance_scales=(4.0, 1.0, 2.25))
        titles = [title for title in tables_of(results, tmp_path) if title.startswith("All cells")]
        assert titles == [f"All cells, guidance scale {scale}" for scale in ("2.25", "1", "4")]

    def test_the_nearest_where_it_was_not_measured(self, tmp_path):
        results = toy_results(cells=("clean",), metrics=FEW, guidance_scales=(1.0, 4.0))
        page = page_of(results, tmp_path)
        assert "Guidance scale 2.25, which the study names for its tables, was not measured." in page
        assert page.index("guidance scale 1") < page.index("guidance scale 4")
        assert "was not measured" not in page_of(toy_results(cells=("clean",), metrics=FEW), tmp_path)

    def test_none(self, tmp_path):
        results = toy_results(cells=("clean", "ip"), metrics=FEW, guidance_scales=(math.nan,))
        tables = tables_of(results, tmp_path)
        assert "All cells, no guidance scale" in tables and "<details>" not in page_of(results, tmp_path)
        assert set(texts(tables["All cells, no guidance scale"], "n").values()) == {"5"}

    def test_none_beside_others_and_no_wish(self, tmp_path):
        results = toy_results(cells=("clean", "ip"), metrics=FEW, guidance_scales=(1.0, math.nan, 4.0))
        change_study(results, report_guidance_scale=None)
        titles = [title for title in tables_of(results, tmp_path) if title.startswith("All cells")]
        assert titles == [
            f"All cells, {place}" for place in ("no guidance scale", "guidance scale 1", "guidance scale 4")
        ]

    def test_evaluations_during_training_are_not_shown(self, tmp_path):
        results = toy_results(cells=("clean",), metrics=FEW, steps=(100,), guidance_scales=())
        assert written(results, tmp_path) == [] and "No run has values yet." in page_of(results, tmp_path)
        assert len(pd.read_csv(tmp_path / "summary.csv")) == len(FEW)
        final = toy_results(cells=("clean",), metrics=FEW, seeds=(1, 2))
        results.values = pd.concat([results.values, final.values])
        table = tables_of(results, tmp_path)["All cells, guidance scale 2.25"]
        assert texts(table, "n") == {"clean": "2"} and "(n" not in table.lines[0][2]


class TestSeeds:
    def test_a_cell_with_fewer_says_so(self, whole):
        _, tables, page, _ = whole
        table = tables["Fidelity, guidance scale 2.25"]
        n = texts(table, "n")
        assert (n["clean"], n["CEP-G, γ = 1"], n["dropout, p = 0.1"], n["label smoothing, 0.1"]) == (
            "5",
            "3",
            "4",
            "0",
        )
        assert texts(table, "FID ↓")["label smoothing, 0.1"] == "–" and "from 0 to 5 seeds" in table.caption
        assert re.search(r"\| label smoothing, 0.1 +\| +0 \| +– \|", page)

    def test_a_metric_with_fewer_says_so(self, tmp_path):
        results = toy_results(cells=("clean", "ip", "eta-0.05"), metrics=FEW)
        bad = lambda lines: lines["value"].mask((lines["metric"] == "fid") & (lines["seed"] < 2), math.nan)  # noqa: E731
        with_values(results, "ip", bad)
        with_values(results, "eta-0.05", lambda lines: lines["value"].mask(lines["metric"] == "fid", math.inf))
        table = tables_of(results, tmp_path)["All cells, guidance scale 2.25"]
        assert texts(table, "n")["IP, γ = 0.1"] == "5" and texts(table, "FID ↓")["IP, γ = 0.1"].endswith(" (n = 3)")
        assert "(n" not in texts(table, "recall ↑")["IP, γ = 0.1"] and texts(table, "FID ↓")["η = 5 %"] == "–"

    def test_a_seed_without_any_value_is_not_counted(self, tmp_path):
        results = toy_results(cells=("clean", "ip"), metrics=FEW)
        with_values(results, "ip", lambda lines: lines["value"].mask(lines["seed"] == 3, math.nan))
        table = tables_of(results, tmp_path)["All cells, guidance scale 2.25"]
        assert texts(table, "n") == {"clean": "5", "IP, γ = 0.1": "4"}
        assert "(n" not in texts(table, "FID ↓")["IP, γ = 0.1"]

    def test_seeds_that_clean_lacks_are_told(self, tmp_path):
        results = toy_results(cells=("clean", "ip"), metrics=FEW, failed=[("clean", 0), ("clean", 4)])
        table = tables_of(results, tmp_path)["All cells, guidance scale 2.25"]
        assert texts(table, "n") == {"clean": "3", "IP, γ = 0.1": "5, 3 paired"}

    def test_one_seed_has_no_spread_and_no_mark(self, tmp_path):
        results = toy_results(cells=("clean", "ip"), metrics=FEW, seeds=(0,))
        table = tables_of(results, tmp_path)["All cells, guidance scale 2.25"]
        assert "With one seed nothing is known of chance" in table.caption
        assert not any("±" in text for line in table.lines for text in line)
        assert {mark for line in table.marks for mark in line} == {""}


class TestWithoutClean:
    def test_in_the_study(self, tmp_path):
        results = toy_results(cells=("ip", "eta-0.05"), metrics=FEW)
        table = tables_of(results, tmp_path)["All cells, guidance scale 2.25"]
        assert "There is no clean cell to compare with." in table.caption
        assert texts(table, "n")["η = 5 %"] == "5" and {mark for line in table.marks for mark in line} == {""}

    def test_in_its_results(self, tmp_path):
        results = toy_results(cells=("clean", "ip"), metrics=FEW, failed=[("clean", seed) for seed in range(5)])
        table = tables_of(results, tmp_path)["All cells, guidance scale 2.25"]
        assert "The clean cell has no values yet" in table.caption
        assert texts(table, "n") == {"clean": "0", "IP, γ = 0.1": "5, 0 paired"}


class TestRegularizers:
    def test_are_chosen_by_setting(self, whole):
        _, tables, _, _ = whole
        table = tables["Regularizers, guidance scale 2.25"]
        expected = ["clean", "dropout, p = 0.1", "IP, γ = 0.1", "CEP-U, γ = 1", "CEP-G, γ = 1", "η = 2.5 %"]
        assert [line[0] for line in table.lines] == expected
        assert table.caption.endswith("Without values in this study: label smoothing.")
        assert table.kind == "regularizers" and "chosen by their settings, not by their results" in table.caption
        main = tables["Fidelity, guidance scale 2.25"]
        assert {name: texts(main, "FID ↓")[name] for name in expected} == texts(table, "FID ↓")
        assert table.marks[3][2] == "better" and len(table.head) == 2 + 8

    def test_the_nearest_gamma_and_a_corruption_that_is_random(self, tmp_path):
        cells = ("clean", "cep-u-0.1", "cep-u-2", "fixed-cep", "eta-random-0.025", "eta-0.05")
        table = tables_of(toy_results(cells=cells, metrics=FEW), tmp_path)["Regularizers, guidance scale 2.25"]
        assert [line[0] for line in table.lines] == ["clean", "CEP-U, γ = 2", "η = 2.5 %, random"]
        assert "dropout, label smoothing, input perturbation and CEP-G." in table.caption

    def test_none(self, tmp_path):
        results = toy_results(cells=("clean", "eta-0.05", "fixed-cep"), metrics=FEW)
        assert not [title for title in tables_of(results, tmp_path) if title.startswith("Reg")]
        assert "There is no table of regularizers: no cell with" in page_of(results, tmp_path)
        with_it = page_of(toy_results(cells=("clean", "ip"), metrics=FEW), tmp_path)
        assert "There is no table of regularizers" not in with_it


class TestModes:
    def test_both_and_their_difference(self, whole):
        results, tables, page, _ = whole
        table, main = tables["Fixed against random, guidance scale 2.25"], tables["Fidelity, guidance scale 2.25"]
        found = compare_modes(results.values)
        line = found[(found["guidance_scale"] == 2.25) & (found["metric"] == "fid")].iloc[0]
        names = ["fixed", "random", "random − fixed"]
        assert [line[:3] for line in table.lines] == [
            [title, mode, "5"] for title in ("η = 2.5 %", "CEP-U, γ = 1") for mode in names
        ]
        fid = [line[3] for line in table.lines]
        assert fid[:2] == [texts(main, "FID ↓")[title] for title in ("η = 2.5 %", "η = 2.5 %, random")]
        form = "+.1e" if abs(line["difference"]) < 0.01 else "+.2f"
        assert fid[2] == f"{line['difference']:{form}}, p = {line['p_adjusted']:.3f}"
        assert table.marks[2][3] == line["verdict"] == "inconclusive" and f"{fid[2]} ≈" in page
        assert {mark for marks in (table.marks[0], table.marks[1]) for mark in marks} == {""}
        assert table.left == (0, 1) and table.kind == "modes"

    def test_mark_is_of_random_against_fixed(self, tmp_path):
        results = toy_results(cells=("eta-0.025", "eta-random-0.025"), metrics=("fid",))
        with_values(results, "eta-random-0.025", lambda lines: lines["value"] - 5 - 0.01 * lines["seed"])
        table = tables_of(results, tmp_path)["Fixed against random, guidance scale 2.25"]
        assert table.marks[2] == ["", "", "", "better"]
        assert re.fullmatch(r"-5\.\d\d, p < 0\.001", table.lines[2][3])

    def test_seeds_in_common(self, tmp_path):
        failed = [("eta-0.025", 0), ("eta-random-0.025", 1), ("eta-random-0.025", 2), ("eta-random-0.025", 3)]
        results = toy_results(cells=("eta-0.025", "eta-random-0.025"), metrics=("fid",), failed=failed)
        table = tables_of(results, tmp_path)["Fixed against random, guidance scale 2.25"]
        assert [line[2] for line in table.lines] == ["4", "2", "1"]
        assert "p" not in table.lines[2][3] and table.marks[2][3] == ""

    def test_none(self, tmp_path):
        tables_of(toy_results(cells=("eta-0.025", "eta-random-0.025"), metrics=FEW), tmp_path)
        assert (tmp_path / "fixed_against_random.csv").exists()
        page = page_of(toy_results(cells=("clean", "eta-0.05"), metrics=FEW), tmp_path)
        assert "There is no table of fixed against random: no two cells" in page
        assert "## Fixed against" not in page and not (tmp_path / "fixed_against_random.csv").exists()


class TestRuns:
    def test_every_run_that_is_not_done_is_named(self, whole):
        results, tables, page, _ = whole
        table = tables["Runs that failed or are missing"]
        reason = "train_class_cond.py: --cep_gamma must be at least 0, but is -1."
        assert table.lines == [
            ["dropout, p = 0.1", "1", "failed", "2", reason],
            ["CEP-G, γ = 1", "3, 4", "failed", "2", reason],
            ["label smoothing, 0.1", "0–4", "missing", "0", "not run yet"],
        ]
        assert table.caption.startswith("8 runs of 80;")
        assert "80 runs: 72 done, 3 failed and 5 missing ([why](#runs-that-failed-or-are-missing))" in page
        assert "## Runs that failed or are missing\n" in page

    def test_cells_that_lack_the_same_seeds_are_one_line(self):
        cells = ("clean", "ip", "cep-u-1")
        missing = [(cell, seed) for cell in cells for seed in (1, 2, 3)] + [("clean", 4), ("ip", 4)]
        failed = [("cep-u-1", 4)]
        table = run_table(toy_results(cells=cells, blocks=("ldm", "dit"), missing=missing, failed=failed))
        assert [line[:4] for line in table.lines] == [
            ["ldm", "CEP-U, γ = 1", "4", "failed"],
            ["dit", "CEP-U, γ = 1", "4", "failed"],
            ["ldm", "clean; IP, γ = 0.1", "1–4", "missing"],
            ["ldm", "CEP-U, γ = 1", "1–3", "missing"],
            ["dit", "clean; IP, γ = 0.1", "1–4", "missing"],
            ["dit", "CEP-U, γ = 1", "1–3", "missing"],
        ]
        table = run_table(toy_results(cells=cells, missing=[(cell, seed) for cell in cells for seed in (1, 2, 3)]))
        assert [line[:2] for line in table.lines] == [["all cells", "1–3"]]

    @pytest.mark.parametrize(
        ("numbers", "text"), [([3], "3"), ([4, 3], "3, 4"), ([0, 2, 3, 4, 9, 10], "0, 2–4, 9, 10"), ([], "")]
    )
    def test_ranges(self, numbers, text):
        assert ranges(numbers) == text

    def test_reasons_are_not_merged(self):
        results = toy_results(cells=("clean", "ip"), failed=[("ip", 0), ("ip", 1)])
        next(run for run in results.runs if run["status"] == "failed")["reason"] = "no space\nleft"
        assert sorted((line[1], line[4][:8]) for line in run_table(results).lines) == [
            ("0", "no space"),
            ("1", "train_cl"),
        ]

    def test_all_done(self, tmp_path):
        results = toy_results(cells=("clean", "ip"), metrics=FEW)
        assert run_table(results) is None
        page = page_of(results, tmp_path)
        assert "2 cells, 5 seeds (0–4) of training and drawing; 10 runs, all done." in page and "## Runs" not in page

    def test_nothing_at_all(self, tmp_path):
        results = toy_results(
            cells=("clean", "ip"), missing=[(cell, seed) for cell in ("clean", "ip") for seed in range(5)]
        )
        tables = written(results, tmp_path)
        assert [table.title for table in tables] == ["Runs that failed or are missing"]
        assert "No run has values yet." in page_of(results, tmp_path)
        assert len(pd.read_csv(tmp_path / "results.csv")) == 10


class TestBlocks:
    def test_each_has_its_tables(self, tmp_path):
        results = toy_results(blocks=("ldm", "dit"), cells=("clean", "ip"), metrics=FEW, failed=[("ip", 2)])
        tables = tables_of(results, tmp_path)
        assert list(tables)[:6] == [
            "All cells, guidance scale 2.25 (ldm)",
            "FID over guidance scales (ldm)",
            "At the best guidance scale of each cell, by FID (ldm)",
            "Regularizers, guidance scale 2.25 (ldm)",
            "All cells, guidance scale 1 (ldm)",
            "All cells, guidance scale 4 (ldm)",
        ]
        runs = tables["Runs that failed or are missing"]
        assert [line[:3] for line in runs.lines] == [["ldm", "IP, γ = 0.1", "2"], ["dit", "IP, γ = 0.1", "2"]]
        page = page_of(results, tmp_path)
        assert page.index("\n## ldm\n") < page.index("\n### All cells") < page.index("\n## dit\n")
        one, other = (texts(tables[f"All cells, guidance scale 2.25 ({block})"], "FID ↓") for block in ("ldm", "dit"))
        assert set(one) == set(other) and one != other

    def test_pairs_are_the_blocks_own(self, tmp_path):
        results = toy_results(blocks=("ldm", "dit"), cells=("eta-0.025", "eta-random-0.025"), metrics=("entropy",))
        with_values(results, "eta-random-0.025", lambda lines: lines["value"] + 3 * (lines["block"] == "dit"))
        tables = tables_of(results, tmp_path)
        ldm, dit = (tables[f"Fixed against random, guidance scale 2.25 ({block})"] for block in ("ldm", "dit"))
        assert len(ldm.lines) == len(dit.lines) == 3
        assert abs(float(ldm.lines[2][3].split(",")[0])) < 1 < float(dit.lines[2][3].split(",")[0])


class TestPage:
    def test_every_table_is_whole(self, whole):
        _, tables, page, _ = whole
        for table in tables.values():
            assert {len(table.head)} == {len(line) for line in [*table.lines, *table.marks]}
            assert len(table.lines) == len(table.marks)
        blocks = [part for part in page.split("\n\n") if part.startswith("|")]
        assert len(blocks) == len(tables)
        for block in blocks:
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1

    def test_headings_follow_the_tables(self, whole):
        _, tables, page, _ = whole
        headings = [line.lstrip("# ") for line in page.splitlines() if re.match("##+ ", line)]
        assert headings == [*tables, "How to make this again"]

    def test_marks_and_what_they_mean(self, whole):
        _, tables, page, _ = whole
        table = tables["Fidelity, guidance scale 2.25"]
        line = next(line for line in table.lines if line[0] == "CEP-U, γ = 2")
        assert f"{line[2]} ✗" in page and all(sentence in page for sentence in LEGEND)
        assert all(f"{mark} " in LEGEND[1] for mark in filter(None, MARKS.values()))

    def test_other_guidance_scales_are_folded(self, whole):
        page = whole[2]
        folded = re.findall(r"<details>\n<summary>(.+?)</summary>\n\n(.+?)</details>\n\n", page, re.S)
        assert [title for title, _ in folded] == ["Guidance scale 1", "Guidance scale 4"]
        assert all(inside.count("\n| cell") == 3 for _, inside in folded)

    def test_ends_with_the_command(self, whole):
        assert whole[2].endswith("```bash\npython study.py studies/toy.yaml\n```\n")

    def test_figures_stand_after_the_tables_at_the_reports_scale(self, tmp_path):
        results = toy_results(blocks=("ldm", "dit"), cells=("clean", "ip"), metrics=FEW)
        path = tmp_path / "figures" / "fid-dit.png"
        page = page_of(results, tmp_path, [Figure("fid-dit", "FID: dit", "A line.", path, "0.5 [0.4, 0.6]", "dit")])
        shown = "### Figures\n\n#### FID: dit\n\n![0.5 \\[0.4, 0.6\\]](figures/fid-dit.png)\n\nA line.\n\n<details>"
        assert page.count("figures/") == 1
        assert page.index("### All cells, guidance scale 2.25 (dit)") < page.index(shown) < page.index("1 (dit)")

    def test_links_what_is_kept_beside_it_and_names_the_report(self, whole):
        assert re.findall(r"\[(\S+)\]\(([^\s)]+)\)", whole[2]) == [
            ("why", "#runs-that-failed-or-are-missing"),
            *((name, name) for name in ("results.csv", "summary.csv")),
        ]
        assert "`report.html`" in whole[2]

    def test_no_path_of_this_machine_is_in_it(self, tmp_path):
        results = toy_results(cells=("clean",), metrics=FEW)
        change_study(results, path=STUDIES / "toy.yaml")
        page = page_of(results, tmp_path)
        assert str(STUDIES.parent) not in page and page.endswith("python study.py studies/toy.yaml\n```\n")

    def test_nothing_of_a_reason_is_lost(self, tmp_path):
        results = toy_results(cells=("clean",), metrics=FEW, failed=[("clean", 0)])
        results.runs[0]["reason"] = "expected <int> | got <b>, 2 < 3"
        assert r"expected &lt;int> \| got &lt;b>, 2 < 3" in page_of(results, tmp_path)
        assert run_table(results).lines[0][-1] == results.runs[0]["reason"]


class TestFiles:
    def test_results_hold_every_number(self, whole):
        results, _, _, folder = whole
        found = pd.read_csv(folder / "results.csv", keep_default_na=False, dtype={"seed": int})
        names = ["block", "cell", "seed", "guidance_scale", "step", "metric", "value", "status", "attempts", "reason"]
        assert found.columns.tolist() == names
        given, key = results.values, ["cell", "seed", "guidance_scale", "step", "metric"]
        with_metric = found[found["metric"] != ""].astype({"guidance_scale": float, "value": float})
        with_metric["step"] = with_metric["step"].map(lambda text: int(text) if text else pd.NA).astype("Int64")
        both = with_metric.merge(given, on=key, suffixes=("", "_given"))
        assert len(both) == len(given) == len(with_metric) and set(both["step"].dropna()) == {500}
        assert both["value"].tolist() == pytest.approx(both["value_given"].tolist(), rel=1e-7)

    def test_numbers_have_the_digits_of_float32(self, tmp_path):
        results = toy_results(cells=("clean",), metrics=("fid",), guidance_scales=(1.0,), seeds=(0,))
        results.values["value"] = 1 / 3
        written(results, tmp_path)
        assert (tmp_path / "results.csv").read_text().splitlines()[1] == ",clean,0,1,,fid,0.33333333,done,1,"

    def test_results_hold_every_run_without_numbers(self, whole):
        found = pd.read_csv(whole[3] / "results.csv", keep_default_na=False)
        without = found[found["metric"] == ""]
        assert len(without) == 8 and set(without["status"]) == {"failed", "missing"}
        failed = without[without["status"] == "failed"]
        assert sorted(zip(failed["cell"], failed["seed"], strict=True)) == [
            ("cep-g-1", 3),
            ("cep-g-1", 4),
            ("dropout", 1),
        ]
        assert failed["reason"].str.startswith("train_class_cond.py: --cep_gamma").all()

    def test_values_that_are_not_finite_are_not_zero(self):
        results = toy_results(cells=("clean",), metrics=("fid",), guidance_scales=(1.0,), seeds=(0, 1))
        results.values.loc[0, "value"] = math.nan
        text = results_frame(results).to_csv(index=False)
        found = pd.read_csv(io.StringIO(text))
        assert found["metric"].tolist() == ["fid", "fid"] and found["value"].isna().tolist() == [True, False]

    def test_summary_is_the_comparison(self, whole):
        results, _, _, folder = whole
        found, expected = pd.read_csv(folder / "summary.csv", keep_default_na=False), compare(results.values)
        assert found.columns.tolist() == expected.columns.tolist() and len(found) == len(expected)
        assert found["verdict"].tolist() == expected["verdict"].tolist()
        assert found["mean"].astype(float).tolist() == pytest.approx(expected["mean"].tolist(), rel=1e-7)

    def test_same_results_give_the_same_bytes(self, whole, tmp_path):
        results, _, _, folder = whole
        page_of(results, tmp_path)
        names = {"results.csv", "summary.csv", "fixed_against_random.csv", "results.md"}
        assert {path.name for path in tmp_path.iterdir()} == names
        assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names)

    def test_a_folder_that_cannot_be_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="while writing the tables"):
            written(toy_results(cells=("clean",), metrics=FEW), tmp_path / "file" / "tables")
        with pytest.raises(InputError, match="while writing the tables"):
            write_page(toy_results(cells=("clean",), metrics=FEW), [], [], tmp_path / "file" / "tables")


def test_fid_is_shown_at_all_guidance_scales_side_by_side(tmp_path):
    tables = tables_of(toy_results(metrics=FEW), tmp_path)
    table = tables["FID over guidance scales"]
    assert table.head == ["cell", "n", "FID ↓ at 1", "FID ↓ at 2.25", "FID ↓ at 4"]
    for number, scale in enumerate(("1", "2.25", "4"), start=2):
        there = tables[f"All cells, guidance scale {scale}"]
        column = there.head.index("FID ↓")
        assert [line[number] for line in table.lines] == [line[column] for line in there.lines]
        assert [marks[number] for marks in table.marks] == [marks[column] for marks in there.marks]
    assert {marks[2] for marks in table.marks} > {""} and [line[1] for line in table.lines] == ["5"] * len(table.lines)
    assert table.caption.endswith("Compared with clean at the same scale.")
    for lacking in ({"guidance_scales": (2.25,), "metrics": FEW}, {"metrics": ("recall",)}):
        assert "FID over guidance scales" not in tables_of(toy_results(**lacking), tmp_path)


@pytest.mark.parametrize(
    ("results", "why"),
    [({"seeds": (0,)}, "nothing is compared."), ({"cells": ("eta-0.1", "ip")}, "There is no clean cell")],
)
def test_no_table_speaks_of_a_comparison_that_was_not_made(results, why, tmp_path):
    tables = tables_of(toy_results(metrics=FEW, **results), tmp_path)
    for title in ("FID over guidance scales", "At the best guidance scale of each cell, by FID"):
        assert why in tables[title].caption and "Compared with" not in tables[title].caption
        assert not any(any(marks) for marks in tables[title].marks)


def test_each_cell_is_also_shown_at_its_own_best_guidance_scale(tmp_path):
    results = toy_results(metrics=FEW)
    best = {"clean": 4.0, "eta-0.025": 1.0}
    values = results.values.copy()
    for cell, scale in best.items():  # so that each is best there, by far
        there = (values["cell"] == cell) & (values["guidance_scale"] == scale) & (values["metric"] == "fid")
        values.loc[there, "value"] -= 0.9 * values.loc[there, "value"].min()
    tables = tables_of(dataclasses.replace(results, values=values), tmp_path)
    table = tables["At the best guidance scale of each cell, by FID"]
    lines = {line[0]: line for line in table.lines}
    assert table.head[:4] == ["cell", "guidance scale", "n", "FID ↓"]
    assert (lines["clean"][1], lines["η = 2.5 %"][1]) == ("4", "1")
    of_clean = values[(values["cell"] == "clean") & (values["metric"] == "fid")]
    found = of_clean.loc[of_clean["guidance_scale"] == 4, "value"]
    assert lines["clean"][3] == f"{found.mean():.2f} ± {found.std():.2f}"
    assert all(len(marks) == len(line) for marks, line in zip(table.marks, table.lines, strict=True))
    assert table.marks[table.lines.index(lines["clean"])] == [""] * len(table.head)
    assert "the best" not in " ".join(tables_of(toy_results(metrics=FEW, guidance_scales=(2.25,)), tmp_path))
