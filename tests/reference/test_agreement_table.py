"""The table of docs/metrics.md: what it says agrees with the reference packages does."""

import importlib.util
import re

import pytest
from launching import ROOT


@pytest.fixture(scope="module")
def compared() -> list[dict]:
    spec = importlib.util.spec_from_file_location("metric_agreement", ROOT / "benchmarks/metric_agreement.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rows(wide=False)


def test_every_difference_is_below_its_bound(compared):
    assert {"FID", "precision", "coverage", "RMD", "IS, one split"} <= {row["metric"] for row in compared}
    for row in compared:
        assert row["difference"] <= row["bound"], row


def test_the_table_in_the_docs_is_of_these_comparisons(compared):
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*\|$", text, re.M)]
    told = {tuple(cells[:3]): cells for cells in lines if len(cells) == 7}
    for row in compared:
        cells = told[row["metric"], row["reference"], row["features"]]
        assert float(cells[3]) == pytest.approx(row["ours"], rel=1e-4) and cells[6] == f"{row['bound']:.0e}"
