"""The report says what the rows say, no more: marks, notes and files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from noisycond.evaluation.report import metrics_table, plot_metrics, write_report
from noisycond.evaluation.uncertainty import summarize


def rows(label, values, scale=1.5, metric="fid", **other) -> list[dict]:
    """A row per seed of one run."""
    return [
        {
            "label": label,
            "pipeline": f"runs/{label}",
            "images": f"images/{label}-{seed}",
            "guidance_scale": scale,
            "seed": seed,
            "num_images": 1000,
            "metrics": {metric: {"value": value, "interval": None}},
        }
        | other
        for seed, value in enumerate(values)
    ]


def cells(text: str) -> dict[tuple[str, str], list[str]]:
    """The table's cells of metrics by label and guidance."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    split = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {(line[0], line[1]): line[4:] for line in split}


def table(given, *metrics) -> dict:
    return cells(metrics_table(summarize(given), metrics or ["fid"]))


class TestTable:
    def test_best_is_bold_and_what_is_near_it_is_marked(self):
        found = table(rows("a", [10.0, 10.2]) + rows("b", [10.1, 10.3]) + rows("c", [12.0, 12.2]))
        assert found["a", "1.5"] == ["**10.10** ± 0.14"]
        assert found["b", "1.5"] == ["10.20 ± 0.14 ≈"]
        assert found["c", "1.5"] == ["12.10 ± 0.14"]

    def test_the_legend_says_what_marks_mean(self):
        text = metrics_table(summarize(rows("a", [10.0, 10.2]) + rows("b", [10.1, 10.3])), ["fid"])
        assert "≈: the gap to the best is below the spread over seeds: inconclusive." in text
        far = metrics_table(summarize(rows("a", [10.0, 10.2]) + rows("b", [90.1, 90.3])), ["fid"])
        assert "≈" not in far and "±: the sample standard deviation over seeds." in far

    def test_the_better_way_is_the_metrics(self):
        given = [rows(label, values, metric="precision") for label, values in (("a", [0.5, 0.51]), ("b", [0.7, 0.71]))]
        text = metrics_table(summarize(sum(given, [])), ["precision"])
        assert cells(text)["b", "1.5"] == ["**0.705** ± 0.007"] and "precision ↑" in text

    def test_where_neither_way_is_better_nothing_is_marked(self):
        given = [rows(label, values, metric="entropy") for label, values in (("a", [5.0, 5.2]), ("b", [5.1, 5.3]))]
        text = metrics_table(summarize(sum(given, [])), ["entropy"])
        assert "**" not in text and "≈" not in text

    def test_each_guidance_scale_has_its_best(self):
        given = rows("a", [1, 1.1]) + rows("a", [9, 9.1], 3.0) + rows("b", [5, 5.1]) + rows("b", [6, 6.1], 3.0)
        found = table(given)
        assert [key for key, (cell,) in found.items() if "**" in cell] == [("a", "1.5"), ("b", "3")]
        assert list(found) == [("a", "1.5"), ("b", "1.5"), ("a", "3"), ("b", "3")]

    def test_equals_share_the_best_and_a_tie_of_all_says_nothing(self):
        given = rows("a", [1.0, 1.2]) + rows("b", [1.0, 1.2])
        assert "**" not in metrics_table(summarize(given), ["fid"])
        found = table(given + rows("c", [8.0, 8.1]))
        assert [cell.startswith("**") for (cell,) in found.values()] == [True, True, False]

    def test_without_a_spread_nothing_is_called_best(self):
        text = metrics_table(summarize(rows("a", [1.0]) + rows("b", [2.0])), ["fid"])
        assert "**" not in text and "±" not in text and "No spread is known:" in text

    def test_one_gap_that_cannot_be_judged_takes_the_bold(self):
        text = metrics_table(summarize(rows("a", [1.0, 1.1]) + rows("b", [2.0])), ["fid"])
        assert "**" not in text and "No spread is known for b:" in text

    def test_a_single_label_is_not_the_best_of_anything(self):
        assert "**" not in metrics_table(summarize(rows("a", [1.0, 1.1])), ["fid"])

    def test_intervals_are_shown(self):
        text = metrics_table(
            summarize(rows("a", [1], metrics={"fid": {"value": 12.3, "interval": [11.9, 12.8]}})), ["fid"]
        )
        assert cells(text)["a", "1.5"] == ["12.30 [11.90, 12.80]"] and "[low, high]: bootstrap" in text

    def test_missing_values_have_a_note_with_the_reason_once(self):
        few = {"metrics": {}, "skipped": {"kid": "KID needs 1,000 images."}}
        text = metrics_table(summarize(rows("a", [1], **few) + rows("b", [2], **few)), ["fid", "kid"])
        assert cells(text)["a", "1.5"] == cells(text)["b", "1.5"] == ["– [1]", "– [2]"]
        assert text.count("KID needs 1,000 images.") == 1 and "[1] FID: not computed." in text

    def test_a_value_over_some_of_the_rows_has_a_note(self):
        given = rows("a", [1, 3, 5])
        given[2] |= {"metrics": {}, "skipped": {"fid": "no weights."}}
        text = metrics_table(summarize(given), ["fid"])
        assert cells(text)["a", "1.5"] == ["2.00 ± 1.41 [1]"] and "[1] FID of some rows: no weights." in text

    def test_a_value_that_is_not_finite_is_missing(self):
        text = metrics_table(summarize(rows("a", [math.nan, 1.0])), ["fid"])
        assert cells(text)["a", "1.5"] == ["– [1]"] and "[1] FID: the value is not finite." in text

    def test_small_values_keep_digits(self):
        assert table(rows("a", [0.0000012], metric="kid"), "kid")["a", "1.5"] == ["1.2e-06"]

    def test_labels_cannot_break_the_table(self):
        text = metrics_table(summarize(rows("a|b\nc", [1.0])), ["fid"])
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) == 3 and r"a\|b c" in lines[2] and len({len(line) for line in lines}) == 1


class TestFiles:
    settings = {"extractor": "digits", "sampler": {"steps": 50, "eta": 0.0}, "seeds": (0, 1), "stats": None}

    def test_json_is_strict_and_whole(self, tmp_path):
        given = rows("a", [np.float32(1.5), math.inf]) + rows("b", [torch.tensor(2.0)], images=Path("images/b"))
        write_report(tmp_path / "new", given, self.settings, ["fid"])

        def refuse(word):
            raise AssertionError(word)

        found = json.loads((tmp_path / "new/metrics.json").read_text(), parse_constant=refuse)
        assert found["settings"] == self.settings | {"seeds": [0, 1]}
        assert [each["metrics"]["fid"]["value"] for each in found["rows"]] == [1.5, None, 2.0]
        assert found["rows"][2]["images"] == "images/b"
        assert found["summaries"][0]["metrics"]["fid"]["mean"] is None
        assert [summary.label for summary in summarize(found["rows"])] == ["a", "b"]

    def test_markdown_has_the_table_every_row_and_every_choice(self, tmp_path):
        given = rows("a", [1.25, 1.75]) + rows("b", [3.0])
        printed = write_report(tmp_path, given, self.settings, ["fid"])
        text = (tmp_path / "metrics.md").read_text()
        assert printed in text and "Choices" not in printed
        assert {"1.25", "1.75", "3.00"} <= set(text.split("Every run and seed")[1].split())
        for line in ("- extractor: digits", "- sampler:", "  - steps: 50", "- seeds: 0, 1", "- stats: none"):
            assert line in text.splitlines()

    def test_rows_are_listed_where_the_table_covers_several(self, tmp_path):
        write_report(tmp_path, rows("a", [1.0]), {}, ["fid"])
        assert "Every run" not in (tmp_path / "metrics.md").read_text()

    def test_nothing_half_written_is_left(self, tmp_path, monkeypatch):
        write_report(tmp_path, rows("a", [1.0]), {}, ["fid"])
        before = {path.name: path.read_text() for path in tmp_path.iterdir()}
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError):
            write_report(tmp_path, rows("a", [2.0]), {}, ["fid"])
        assert {name: (tmp_path / name).read_text() for name in before} == before


class TestPlots:
    def draw(self, tmp_path, given, *metrics):
        """The panels that were drawn, before they are closed."""
        import matplotlib.pyplot as plt

        kept = []
        close = plt.close
        plt.close = kept.append
        try:
            path = plot_metrics(tmp_path, summarize(given), metrics)
        finally:
            plt.close = close
        with Image.open(path) as image:
            image.verify()
        assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.png"]
        (figure,) = kept
        close(figure)
        return figure

    def test_a_panel_per_metric_a_line_per_label_one_legend(self, tmp_path):
        given = [rows(label, [1, 2], scale) for label in "ab" for scale in (3.0, 1.0, 2.0)]
        figure = self.draw(tmp_path, sum(given, []), "fid", "kid")
        assert [axes.get_title() for axes in figure.axes] == ["FID ↓", "KID ↓"]
        assert [text.get_text() for (legend,) in [figure.legends] for text in legend.get_texts()] == ["a", "b"]
        assert not any(axes.get_legend() for axes in figure.axes)
        lines = [bars.lines[0] for bars in figure.axes[0].containers]
        assert len(lines) == 2 and all((np.diff(line.get_xdata()) > 0).all() for line in lines)
        assert "over seeds" in figure.get_supxlabel()
        assert "not computed" in [text.get_text() for text in figure.axes[1].texts]

    def test_bars_are_the_spread(self, tmp_path):
        figure = self.draw(tmp_path, rows("a", [1, 3], 1.0) + rows("a", [5, 5], 2.0), "fid")
        (container,) = figure.axes[0].containers
        (bars,) = container.lines[2]
        lengths = [segment[:, 1].max() - segment[:, 1].min() for segment in bars.get_segments()]
        assert np.abs(np.array(lengths) - [2 * math.sqrt(2), 0]).max() < 1e-6

    def test_a_line_is_broken_where_a_value_is_missing(self, tmp_path):
        given = [rows("a", [value], scale) for value, scale in ((1, 1.0), (math.nan, 2.0), (3, 3.0))]
        line = self.draw(tmp_path, sum(given, []), "fid").axes[0].containers[0].lines[0]
        assert np.isnan(np.array(line.get_ydata(), dtype=float)).tolist() == [False, True, False]

    def test_a_folder_is_a_level_line_beside_guidance(self, tmp_path):
        given = rows("a", [1], 1.0) + rows("a", [2], 2.0) + rows("set", [1.5], None, pipeline=None)
        axes = self.draw(tmp_path, given, "fid").axes[0]
        assert [1.5, 1.5] in [list(line.get_ydata()) for line in axes.lines]

    def test_one_scale_gives_points_beside_their_labels(self, tmp_path):
        given = rows("a", [1, 2]) + rows("b", [3], metrics={"fid": {"value": 3, "interval": [2, 5]}})
        figure = self.draw(tmp_path, given, "fid", "kid")
        axes = figure.axes[0]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
        points = [bars.lines[0] for bars in axes.containers]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(1.5, 0), (3, 1)]
        assert np.abs(axes.containers[1].lines[2][0].get_segments()[0][:, 0] - [2, 5]).max() < 1e-6
        assert not figure.legends and "bootstrap" in figure.get_supxlabel()


def test_a_table_of_many_metrics_is_turned():
    names = ["fid", "sfid", "kid", "precision", "recall", "density", "coverage", "rmd_top", "entropy"]
    metrics = {name: {"value": number / 10, "interval": None} for number, name in enumerate(names)}
    rows = [
        {"label": "a", "pipeline": "a", "images": "x", "guidance_scale": scale, "seed": 0, "num_images": 9}
        | {"metrics": metrics, "skipped": {}}
        for scale in (1.0, 2.5)
    ]
    lines = metrics_table(summarize(rows), names).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["label, guidance", "a, 1", "a, 2.5"]
    assert len(lines[2:]) >= 2 + len(names) and "| recall ↑" in lines[8] and lines[8].count("0.400") == 2
    assert metrics_table(summarize(rows), names[:8]).splitlines()[0].count("↓") == 3
