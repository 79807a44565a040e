"""A study's report is one whole page: nothing outside of it, nothing unescaped, and all that the runs say."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
from PIL import Image

from noisycond.errors import InputError
from noisycond.study.definition import Stage, Study, StudyCell
from noisycond.study.figures import Figure
from noisycond.study.methods import method_of
from noisycond.study.reading import STUDIES
from noisycond.study.report import write_report
from noisycond.study.results import COLUMNS, Results
from noisycond.study.statistics import compare
from noisycond.study.tables import FAILED, Table, write_tables


VOID = {"meta", "link", "img", "br", "hr", "input"}
SECTIONS = ["study", "progress", "figures", "tables", "runs", "choices", "environment", "reproduce", "statistics"]
BASE = {"recipe": "digits_ldm", "cep_gamma": 0}
EVALUATION = Stage("evaluate_model", {"recipe": "digits_evaluation", "guidance_scale": [1, 2.25]})


class Page(HTMLParser):
    """A page's elements, each with its attributes, the elements around it and its text; nesting is checked."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[SimpleNamespace] = []
        self.open: list[SimpleNamespace] = []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands twice"
        element = SimpleNamespace(tag=tag, text="", around=list(self.open), of=dict(attrs))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1].tag == tag, f"</{tag}> closes nothing, line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag: str, **attributes) -> list[SimpleNamespace]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}.items()
        return [each for each in self.elements if each.tag == tag and wanted <= each.of.items()]

    def section(self, name: str) -> SimpleNamespace:
        (found,) = self.all("section", **{"aria-labelledby": name})
        return found

    def rows(self, caption: str) -> list[list[str]]:
        """The cells of the body of the table whose caption begins so, their spaces as one."""
        table = next(each.around[-1] for each in self.all("caption") if each.text.strip().startswith(caption))
        lines = [each for each in self.all("tr") if table in each.around and each.around[-1].tag == "tbody"]
        cells = [each for each in self.elements if each.tag in ("td", "th")]
        return [[" ".join(cell.text.split()) for cell in cells if cell.around[-1] is line] for line in lines]


def cell(label: str, block: str = "", base=BASE, **settings) -> StudyCell:
    return StudyCell(block, label, method_of(settings), settings, (Stage("train_class_cond", {**base, **settings}),))


def study_of(*cells, seeds=(0, 1), path="lost.yaml", title="Digits", scale=2.25) -> Study:
    return Study(Path(path), title, tuple(seeds), cells, EVALUATION, scale)


CELLS = (cell("clean"), cell("eta-0.025", corruption_ratio=0.025), cell("cep-u-1", cep_gamma=1))


def run_of(label: str, seed: int, status="done", block="", **other) -> dict:
    done = status == "done"
    commands = [f"train_class_cond.py --seed {seed} --out_dir {label}", f"evaluate_model.py {block}{label} {seed}"]
    return {
        "block": block,
        "cell": label,
        "seed": seed,
        "status": status,
        "reason": None if done else "the loss was not finite.",
        "attempts": 1,
        "seconds": {"train_class_cond": 1500.4, "evaluate_model": 60.1} if done else {},
        "commands": [f"accelerate launch {each}" for each in commands],
        "settings": {},
        "environment": {"torch": "2.15.0", "devices": "CPU"} if done else {},
        "samples": None,
        "image_choices": {"generated": {"seeds": [0], "split": None}, "bootstrap": True} if done else {},
    } | other


def values_of(study: Study, runs, scales=(1.0, 2.25)) -> pandas.DataFrame:
    methods = {(each.block, each.label): each.method for each in study.cells}
    lines = []
    for run in runs:
        if run["status"] == "done":
            m = methods[run["block"], run["cell"]]
            head = (run["block"], run["cell"], m.kind, m.type, m.mode, m.strength, m.title, run["seed"])
            lines += [(*head, scale, None, name, 1.0) for scale in scales for name in ("fid", "entropy")]
    frame = pandas.DataFrame(lines, columns=list(COLUMNS))
    return frame.astype({"strength": float, "guidance_scale": float, "value": float, "step": "Int64"})


def results_of(study: Study, runs=None) -> Results:
    if runs is None:
        runs = [run_of(each.label, seed, block=each.block) for seed in study.seeds for each in study.cells]
    return Results(study, runs, values_of(study, runs), Path(f"runs/studies/{study.name}/results"))


def table_of(title="All cells", **other) -> Table:
    lines = [["clean", "10.00 ± 0.20", "5.00"], ["η = 2.5 %", "9.10 ± 0.30", "5.10"], ["CEP-U, γ = 1", "–", "5.20"]]
    marks = [["", "", ""], ["", "better", "higher"], ["", "", "inconclusive"]]
    given = {"title": title, "caption": "Mean ± spread.", "head": ["method", "FID ↓", "entropy"]}
    return Table(**(given | {"lines": lines, "marks": marks} | other))


@pytest.fixture
def figures(tmp_path) -> list[Figure]:
    made = []
    for number, ending in enumerate(("png", "webp")):
        path = tmp_path / f"figure-{number}.{ending}"
        Image.new("RGB", (40, 20 + number), "red").save(path)
        made.append(
            Figure(f"fid_over_eta_{number}", f"Figure {number}", "Bars are the spread.", path, "A falling line.")
        )
    return made


@pytest.fixture
def page(tmp_path, figures) -> Page:
    """Of a study in which all went well, but for a run."""
    runs = [run_of(each.label, seed) for seed in (0, 1) for each in CELLS]
    runs[-1] = run_of("cep-u-1", 1, "failed", attempts=3)
    tables = [table_of(), table_of()]
    return Page(write_report(results_of(study_of(*CELLS), runs), tables, figures, tmp_path / "out" / "report.html"))


def written(tmp_path, results, tables=(), figures=()) -> Page:
    return Page(write_report(results, tables, figures, tmp_path / "report.html"))


class TestPage:
    def test_it_has_a_language_landmarks_and_a_title(self, page):
        assert page.all("html", lang="en") and page.all("title")[0].text == "Digits"
        assert [len(page.all(tag)) for tag in ("header", "nav", "main", "h1")] == [1, 1, 1, 1]

    def test_the_sections_stand_in_order_and_in_the_contents(self, page):
        assert [each.of["id"] for each in page.all("h2") if each.of["id"] != "contents"] == SECTIONS
        (nav,) = page.all("nav")
        linked = [each.of["href"] for each in page.all("a") if nav in each.around]
        assert [each for each in linked if each[1:] in SECTIONS] == [f"#{name}" for name in SECTIONS]
        assert len(linked) == len(SECTIONS) + 2 + 2  # figures and tables

    def test_headings_leave_no_level_out(self, page):
        levels = [int(each.tag[1]) for each in page.elements if re.fullmatch(r"h[1-6]", each.tag)]
        assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))

    def test_ids_are_unique_and_all_that_is_named_is_there(self, page):
        ids = [each.of["id"] for each in page.elements if "id" in each.of]
        assert len(set(ids)) == len(ids)
        named = [each.of["href"][1:] for each in page.all("a")]
        named += [each.of["aria-labelledby"] for each in page.elements if "aria-labelledby" in each.of]
        assert len(named) > 20 and set(named) <= set(ids)

    def test_nothing_is_asked_of_a_network(self, page):
        for each in page.elements:
            for name in ("src", "href", "srcset", "data", "action", "poster", "background"):
                assert each.of.get(name, "#").startswith(("#", "data:")), each
        assert not page.all("iframe") and not page.all("base") and not page.all("object")
        assert [each.of for each in page.all("script")] == [{}]
        style = page.all("style")[0].text
        assert "url(" not in style and "@import" not in style
        (policy,) = [each.of["content"] for each in page.all("meta") if "http-equiv" in each.of]
        assert policy.startswith("default-src 'none'; img-src data:;")

    def test_tables_have_captions_scopes_and_scroll_alone(self, page):
        tables = page.all("table")
        assert len(tables) == 5
        for table in tables:
            inside = [each for each in page.elements if table in each.around]
            assert [each.tag for each in inside].count("caption") == 1 and inside[0].tag == "caption"
            assert all(each.of["scope"] in ("col", "row") for each in inside if each.tag == "th")
            around = table.around[-1].of
            assert (around["class"], around["tabindex"], around["role"]) == ("scroll", "0", "region")
            assert "aria-label" in around or "aria-labelledby" in around

    @pytest.mark.parametrize("dark", [False, True])
    def test_text_stands_out_as_wcag_aa_asks(self, page, dark):
        blocks = re.findall(r":root \{(.*?)\}", page.all("style")[0].text, re.S)
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", blocks[1 if dark else 0]))
        assert len(colours) == 9 and (luminance(colours["paper"]) < 0.1) == dark
        for text in ("ink", "quiet", "link", "better", "worse", "other"):
            assert contrast(colours[text], colours["paper"]) >= 4.5
        assert contrast(colours["ink"], colours["shade"]) >= 4.5


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


class TestPictures:
    def test_each_is_embedded_once_as_it_is_with_its_words(self, page, figures):
        images = page.all("img")
        assert len(images) == 2
        for image, figure, kind in zip(images, figures, ("png", "webp"), strict=True):
            head, data = image.of["src"].split(",")
            assert head == f"data:image/{kind};base64" and base64.b64decode(data) == figure.path.read_bytes()
            assert page.source.count(data) == 1
            assert image.of["alt"] == "A falling line."
        assert [(each.of["width"], each.of["height"]) for each in images] == [("40", "20"), ("40", "21")]
        assert [each.text for each in page.all("figcaption")] == ["Bars are the spread."] * 2

    def test_one_without_a_text_is_called_by_its_title(self, tmp_path, figures):
        figures = [replace(figures[0], alt="")]
        assert written(tmp_path, results_of(study_of(*CELLS)), [], figures).all("img")[0].of["alt"] == "Figure 0"


class TestStudy:
    def test_it_says_what_is_shared_and_what_each_cell_sets(self, page):
        text = " ".join(page.section("study").text.split())
        assert "Cells 3 " in text and "Seeds 0, 1, of training and drawing " in text
        assert "train_class_cond.py --recipe digits_ldm --cep_gamma 0 " in text
        assert "evaluate_model.py --recipe digits_evaluation --guidance_scale 1 2.25 " in text
        assert "Guidance scales 1, 2.25 2.25 in tables" in text
        assert "Metrics FID ↓, entropy" in text
        assert page.rows("The cells") == [
            ["clean", "clean", "–"],
            ["eta-0.025", "η = 2.5 %", "corruption_ratio 0.025"],
            ["cep-u-1", "CEP-U, γ = 1", "cep_gamma 1"],
        ]

    def test_blocks_are_named_where_there_are_several(self, tmp_path):
        cells = [cell("clean", block, recipe=block) for block in ("ldm", "dit")]
        page = written(tmp_path, results_of(study_of(*cells)), [table_of()])
        text = " ".join(page.section("study").text.split())
        assert "2, in 2 blocks: ldm; dit" in text and "train_class_cond.py --cep_gamma 0 " in text
        assert [line[1] for line in page.rows("The cells")] == ["ldm", "dit"]
        for table in page.all("table"):
            rows = [each for each in page.all("tr") if table in each.around]
            assert len({sum(each.around[-1] is row for each in page.elements if each.around) for row in rows}) == 1
        assert [line[1] for line in page.rows("Wall-clock")] == ["ldm", "dit", "ldm", "dit"]
        assert [each.text for each in page.all("summary")][-2:] == ["clean, ldm", "clean, dit"]

    def test_what_not_all_share_is_not_said_of_all(self, tmp_path):
        for steps, is_said in (("100", True), ("200", False)):
            cells = [cell("clean", base={"max_train_steps": "100"}), cell("ip", base={"max_train_steps": steps})]
            text = written(tmp_path, results_of(study_of(*cells))).section("study").text
            assert ("--max_train_steps 100" in text) == is_said and "--max_train_steps 200" not in text

    def test_pipelines_that_are_only_measured(self, tmp_path):
        cells = [StudyCell("", "clean", method_of({}), {}, (), "DiffusionNoise/ldm_in1k_clean")]
        page = written(tmp_path, results_of(study_of(*cells)))
        assert "Training" not in [each.text for each in page.all("dt")]
        assert page.rows("The cells") == [["clean", "clean", "DiffusionNoise/ldm_in1k_clean"]]

    def test_the_file_is_shown_and_the_command_is_relative(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "my studies" / "a.yaml"
        path.parent.mkdir()
        path.write_text("title: A & B\n")
        page = written(tmp_path, results_of(study_of(*CELLS, path=str(path))))
        codes = [each.text for each in page.all("code")]
        assert "title: A & B" in codes and "python study.py 'my studies/a.yaml'" in codes
        assert str(tmp_path) not in page.source

    def test_guidance_scales_are_those_of_final_models(self, tmp_path):
        results = results_of(study_of(*CELLS))
        curve = results.values.assign(step=100, guidance_scale=7.5).astype({"step": "Int64"})
        results.values = pandas.concat([results.values, curve])
        text = " ".join(written(tmp_path, results).section("study").text.split())
        assert "Guidance scales 1, 2.25 2.25 in tables" in text and "7.5" not in text


class TestCommand:
    @pytest.mark.parametrize(
        ("path", "folder", "words"),
        [
            ("a.yaml", "runs/studies/a/results", "a.yaml"),
            ("{here}/my a.yaml", "{here}/runs/studies/my a/results", "'my a.yaml'"),
            ("{here}/sub/a.yaml", "{here}/kept/a", "sub/a.yaml --results_dir kept/a"),
            (f"{STUDIES}/digits.yaml", "runs/studies/digits/results", "studies/digits.yaml"),
            (f"{STUDIES}/digits.yaml", f"{STUDIES}/results/d", "studies/digits.yaml --results_dir studies/results/d"),
            ("../a.yaml", "/elsewhere/a", "../a.yaml --results_dir /elsewhere/a"),
        ],
    )
    def test_it_is_what_a_user_types(self, tmp_path, monkeypatch, path, folder, words):
        monkeypatch.chdir(tmp_path)
        results = results_of(study_of(*CELLS, path=path.format(here=tmp_path)))
        results.folder = Path(folder.format(here=tmp_path))
        assert results.command() == f"python study.py {words}"

    @pytest.mark.parametrize(
        ("places", "words"),
        [
            ({"output_folder": "o", "folder": "o/results", "report_folder": "o"}, "--output_dir o"),
            (
                {"output_folder": "o", "folder": "r", "report_folder": "docs/a"},
                "--output_dir o --results_dir r --report_dir docs/a",
            ),
            (
                {"output_folder": "runs/studies/a", "folder": "runs/studies/a/results", "report_folder": "docs/a"},
                "--report_dir docs/a",
            ),
        ],
    )
    def test_it_names_the_folders_that_are_not_the_usual_ones(self, tmp_path, monkeypatch, places, words):
        monkeypatch.chdir(tmp_path)
        results = results_of(study_of(*CELLS, path="a.yaml"))
        for name, folder in places.items():
            setattr(results, name, Path(folder))
        assert results.command() == f"python study.py a.yaml {words}"


class TestTables:
    def test_verdicts_show_by_sign_word_and_colour(self, page):
        assert page.rows("Mean ± spread.") == [
            ["clean", "10.00 ± 0.20", "5.00"],
            ["η = 2.5 %", "9.10 ± 0.30 ✓, better", "5.10 △, higher"],
            ["CEP-U, γ = 1", "–", "5.20 ≈, inconclusive"],
        ]
        assert len(page.all("span", class_="mark better")) == len(page.all("span", class_="mark higher")) == 2
        style = page.all("style")[0].text
        assert ".better, .done { color: var(--better)" in style and ".higher, .lower { color: var(--other)" in style

    def test_the_legend_has_the_signs_that_occur(self, page):
        (legend,) = page.all("ul", class_="legend")
        words = [each.text for each in page.all("li") if legend in each.around]
        assert words == ["✓ better", "△ higher, where neither way is better", "≈ inconclusive"]

    def test_numbers_stand_to_the_right_and_words_to_the_left(self, page):
        long = "A reason of more words than stand well on one line."
        lines = [["clean", "1", "done", long]] * 2
        page = written(
            page.path.parent,
            results_of(study_of(*CELLS)),
            [table_of(head=["a", "b", "c", "d"], lines=lines, marks=[[""] * 4] * 2, left=(0, 2, 3))],
        )
        heads = {each.text: each.of.get("class") for each in page.all("th") if each.text in "abcd"}
        assert heads == {"a": None, "b": "number", "c": None, "d": None}
        kinds = {
            each.text: each.of["class"]
            for each in page.all("td")
            if each.text in ("1", "done", long) and "class" in each.of
        }
        assert kinds == {"1": "number", "done": "text", long: "long"}

    def test_other_guidance_scales_are_folded_each_with_all_its_tables(self, tmp_path):
        blocks = ("ldm", "dit")
        tables = [table_of(f"{name}, {block}", block=block) for block in blocks for name in ("Fidelity", "Diversity")]
        tables[1:1] = [replace(tables[0], folded=f"Guidance scale {scale}") for scale in (1, 1, 4)]
        tables += [replace(tables[-1], folded="Guidance scale 1")]
        page = written(tmp_path, results_of(study_of(*CELLS)), tables)
        folds = page.all("details", class_="fold")
        inside = [sum(fold in each.around for each in page.all("table")) for fold in folds]
        assert inside == [2, 1, 1] and not any("open" in fold.of for fold in folds)
        names = ["Guidance scale 1 (ldm)", "Guidance scale 4 (ldm)", "Guidance scale 1 (dit)"]
        assert [each.text for each in page.all("summary") if each.around[-1] in folds] == names
        for around in (page.all("nav")[0], page.all("ul", class_="jump")[0]):
            linked = {each.text: each.of["href"][1:] for each in page.all("a") if around in each.around}
            assert [linked[name] for name in names] == [fold.of["id"] for fold in folds]

    def test_lines_that_belong_together_are_not_sorted(self, tmp_path):
        page = written(tmp_path, results_of(study_of(*CELLS)), [table_of(), table_of(kind="modes")])
        assert [each.of for each in page.all("table")][1:3] == [{"class": "sortable"}, {}]

    def test_one_without_marks(self, tmp_path):
        page = written(tmp_path, results_of(study_of(*CELLS)), [table_of(marks=[[""] * 3] * 3)])
        assert len(page.rows("Mean ± spread.")) == 3 and not page.all("ul", class_="legend")


class TestRuns:
    def test_progress_counts_what_was_never_tried_as_missing(self, tmp_path):
        runs = [run_of("clean", 0), run_of("eta-0.025", 0, "failed"), run_of("cep-u-1", 0, "missing", reason=None)]
        page = written(tmp_path, results_of(study_of(*CELLS), runs))
        (said,) = page.all("p", class_="health")
        assert " ".join(said.text.split()) == (
            "1 of 6 runs done, 1 failed, 4 missing. At least 26 min 0 s of computing recorded."
        )

    def test_a_training_that_runs_share_counts_once(self, tmp_path):
        runs = [run_of("clean", 0), run_of("eta-0.025", 0), run_of("cep-u-1", 0)]
        runs[1]["commands"][0] = runs[0]["commands"][0]
        page = written(tmp_path, results_of(study_of(*CELLS, seeds=[0]), runs))
        assert "At least 53 min 1 s of" in page.section("progress").text  # 2 · 1500.4 + 3 · 60.1 seconds

    def test_all_went_well(self, tmp_path):
        page = written(tmp_path, results_of(study_of(*CELLS)))
        assert "6 of 6 runs done, none failed, none missing." in " ".join(page.section("progress").text.split())
        assert FAILED not in page.section("runs").text

    def test_status_seconds_and_reason(self, page):
        assert page.rows("1 run of 6;") == [["CEP-U, γ = 1", "1", "failed", "3", "the loss was not finite."]]
        lines = page.rows("Wall-clock")
        assert len(lines) == 6 and lines[0] == ["clean", "0", "✓ done", "1", "1,500", "60", "1,560"]

    def test_those_not_done_stand_with_the_runs_alone(self, tmp_path):
        runs = [run_of(each.label, seed, "failed" if seed else "done") for seed in (0, 1) for each in CELLS]
        results = results_of(study_of(*CELLS), runs)
        page = written(tmp_path, results, write_tables(results, compare(results.values), tmp_path / "tables"))
        titles = [each.text for each in page.all("h3")]
        assert titles.count(FAILED) == 1 and "All cells, guidance scale 2.25" in titles
        assert page.section("runs").text.count(FAILED) == 1

    def test_commands_are_folded_by_cell(self, page):
        folded = [each for each in page.all("pre") if any(around.tag == "details" for around in each.around)]
        assert [each.text for each in folded][:2] == [
            f"accelerate launch train_class_cond.py --seed {seed} --out_dir clean\n"
            f"accelerate launch evaluate_model.py clean {seed}"
            for seed in (0, 1)
        ]
        inside = [each.text for each in page.all("span") if folded[0] in each.around]
        assert inside == ["--seed", "--out_dir"]  # what might break in the middle
        assert [each.text for each in page.all("summary")][1:] == ["clean", "eta-0.025", "cep-u-1"]

    @pytest.mark.parametrize("seeds, is_open", [(10, True), (11, False)])
    def test_a_long_list_is_folded(self, tmp_path, seeds, is_open):
        page = written(tmp_path, results_of(study_of(*CELLS, seeds=range(seeds))))
        assert ("open" in page.all("details")[0].of) == is_open


class TestChoices:
    def test_they_are_nested_and_told_apart_where_runs_differ(self, tmp_path):
        runs = [run_of(each.label, 0) for each in CELLS]
        runs[1]["image_choices"] = {"generated": {"seeds": [0, 1], "split": "test"}, "bootstrap": True, "extra": 0.5}
        runs[2]["environment"] = {"torch": "2.16.0", "devices": "CPU"}
        page = written(tmp_path, results_of(study_of(*CELLS, seeds=[0]), runs))
        told = {each.text: page.elements[n + 1] for n, each in enumerate(page.elements) if each.tag == "dt"}
        assert told["bootstrap"].text == "yes"
        assert told["seeds"].text == "0 (2 runs); 0, 1 (1 run)" and told["split"].text == "none (2 runs); test (1 run)"
        assert told["extra"].text == "– (2 runs); 0.5 (1 run)"
        assert told["torch"].text == "2.15.0 (2 runs); 2.16.0 (1 run)" and told["devices"].text == "CPU"
        assert told["seeds"].around[-4].of["class"] == "nested"

    def test_evaluations_while_training_have_their_own(self, tmp_path):
        runs = [run_of(each.label, 0, curve_choices={"num_images": 90}) for each in CELLS]
        text = " ".join(
            written(tmp_path, results_of(study_of(*CELLS, seeds=[0]), runs)).section("choices").text.split()
        )
        assert "While training" in text and "num_images90" in text
        assert "While training" not in written(tmp_path, results_of(study_of(*CELLS))).section("choices").text

    def test_many_values_are_counted(self, tmp_path):
        runs = [run_of("clean", seed, image_choices={"label": f"seed-{seed}"}) for seed in range(9)]
        page = written(tmp_path, results_of(study_of(CELLS[0], seeds=range(9)), runs))
        assert "seed-5 (1 run); and 3 other values" in page.section("choices").text


class TestText:
    def test_nothing_that_was_given_becomes_markup(self, tmp_path, figures):
        evil = "<script>alert(1)</script>\"'&"
        cells = [cell("clean"), cell(evil, corruption_type=evil, corruption_ratio=0.1)]
        runs = [run_of("clean", 0), run_of(evil, 0, "failed", reason=f"It said {evil}.", commands=[evil])]
        runs[0]["image_choices"] = {evil: {evil: evil}}
        runs[0]["environment"] = {evil: evil}
        table = table_of(evil, caption=evil, head=[evil] * 3, lines=[[evil] * 3] * 3)
        figures = [Figure(evil, evil, evil, figures[0].path, evil)]
        path = tmp_path / "study.yaml"
        path.write_text(f"title: {evil}\n")
        results = results_of(study_of(*cells, seeds=[0], title=evil, path=str(path)), runs)
        page = written(tmp_path, results, [table], figures)
        assert len(page.all("script")) == 1 and "alert" not in page.all("script")[0].text
        assert "<script>alert" not in page.source and "&lt;script&gt;alert" in page.source
        assert page.rows("1 run of 2;")[0][-1] == f"It said {evil}."
        assert page.all("h1")[0].text == evil and page.all("img")[0].of["alt"] == evil

    @pytest.mark.parametrize("seeds", [(0,), (0, 1)])
    @pytest.mark.parametrize("status", ["done", "failed", "missing", None])
    def test_whatever_is_lacking_the_page_is_whole(self, tmp_path, status, seeds):
        runs = [run_of(each.label, seed, status) for seed in seeds for each in CELLS] if status else []
        page = written(tmp_path, results_of(study_of(*CELLS, seeds=seeds), runs))
        ids = {each.of["id"] for each in page.elements if "id" in each.of}
        assert {each.of["href"][1:] for each in page.all("a")} <= ids and set(SECTIONS) <= ids
        assert "There is none" in page.section("figures").text and "There is none" in page.section("tables").text
        assert ("no run was measured" in page.section("choices").text) == (status != "done")
        assert ("has one seed" in page.section("statistics").text) == (len(seeds) == 1)

    def test_measured_in_training_is_said(self, tmp_path):
        results = results_of(study_of(*CELLS))
        results.values["step"] = pandas.array([500, 1000] * (len(results.values) // 2), dtype="Int64")
        assert "2 times, from step 500 to 1,000" in written(tmp_path, results).section("study").text


class TestFile:
    def test_it_replaces_the_earlier_one_whole(self, tmp_path):
        path = tmp_path / "report.html"
        path.write_text("earlier")
        assert write_report(results_of(study_of(*CELLS)), [], [], str(path)) == path
        assert path.read_text().startswith("<!DOCTYPE html>") and list(tmp_path.iterdir()) == [path]

    def test_it_is_the_same_of_the_same(self, tmp_path):
        one, other = (written(tmp_path, results_of(study_of(*CELLS)), [table_of()]).source for _ in range(2))
        assert one == other

    def test_what_cannot_be_written_is_one_sentence(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="while writing the report"):
            write_report(results_of(study_of(*CELLS)), [], [], tmp_path / "file" / "report.html")
