"""Every cell of every shipped study parses with its scripts and says where its values come from; the paper's studies
have the values of its recipes, and their README says what they are."""

import dataclasses
import functools
import re
from pathlib import Path

import pandas
import pytest
from launching import ROOT
from script_flags import arguments_class

from noisycond.arguments import Arguments, parse_arguments
from noisycond.recipes import RECIPES
from noisycond.study.planning import plan_runs
from noisycond.study.reading import STUDIES, read_study, study_names
from noisycond.study.results import read_results
from noisycond.study.statistics import compare
from noisycond.study.tables import write_tables


README = (STUDIES / "README.md").read_text(encoding="utf-8")
PATHS = [STUDIES / f"{name}.yaml" for name in study_names()]
every_study = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
MARK = re.compile(r"\[(?:seen|field|inferred)\]")
# What a study's training has beside its recipe's values, which is no part of a setting.
BESIDE = {"recipe", "seed", "output_dir", "resume_from_checkpoint", "validation_guidance_scale"}


@functools.cache  # building a parser takes long, and a command line is looked at by several tests
def parse(script: str, words: tuple[str, ...]) -> Arguments:
    return parse_arguments(arguments_class(script, words), list(words))


def trainings(path: Path) -> dict[tuple[str, str], Arguments]:
    """The arguments of the last training of each cell, with the study's first seed."""
    study = read_study(str(path))
    plans = plan_runs(study, study.runs(seeds=study.seeds[:1]), Path("runs"))
    return {
        (plan.run.cell.block, plan.run.cell.label): parse(plan.steps[-2].script, plan.steps[-2].words)
        for plan in plans
    }


def check(path: Path) -> None:
    """Parses every training of a study, and its evaluation, which differs from run to run in folders alone."""
    study = read_study(str(path))
    plans = plan_runs(study, study.runs(seeds=study.seeds[:1]), Path("runs"))
    for step in [step for plan in plans for step in plan.steps[:-1]] + [plans[0].steps[-1]]:
        args = parse(step.script, step.words)
        assert args.output_dir == str(step.folder)
    assert study.report_guidance_scale in args.guidance_scale  # of the evaluation, the last one
    for block in study.blocks:
        kinds = [cell.method.kind for cell in study.cells if cell.block == block]
        assert kinds.count("clean") == 1 and "mixed" not in kinds  # one to compare with
        methods = [cell.method for cell in study.cells if cell.block == block]
        assert len(set(methods)) == len(methods)


def test_there_are_studies():
    models = {f"in100_{kind}_{base}" for kind in ("controlnet", "t2i_adapter") for base in ("in1k", "cc3m")}
    released = {f"released_{model}" for model in ("ldm_in1k", "dit_xl_2_in1k", "ldm_cc3m")}
    assert {"in1k", "cc3m", "cc3m_lcm", "digits", *models, *released} <= set(study_names())


@every_study
def test_every_cell_of_a_study_parses(path):
    check(path)


def uncommented(text: str) -> str:
    """With the settings that a study has as comments."""
    return re.sub(r"^  # ?((?:  )*[\w-]+:.*)$", r"  \1", text, flags=re.M)


@pytest.mark.parametrize(
    "path", [path for path in PATHS if uncommented(path.read_text()) != path.read_text()], ids=lambda path: path.stem
)
def test_what_a_study_has_as_a_comment_can_be_uncommented(path, tmp_path):
    whole = tmp_path / path.name
    whole.write_text(uncommented(path.read_text(encoding="utf-8")), encoding="utf-8")
    before, after = read_study(str(path)), read_study(str(whole))
    assert len(after.cells) > len(before.cells) or after.evaluation != before.evaluation
    check(whole)


def test_the_studies_with_settings_in_comments():
    found = {path.stem for path in PATHS if uncommented(path.read_text()) != path.read_text()}
    assert {"in1k", "in100_controlnet_in1k", "in100_t2i_adapter_cc3m"} <= found


@every_study
def test_every_value_says_where_it_comes_from(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if re.match(r"\s*(seeds|[\w.-]+): *[^#\s]", line) and not line.startswith("#")]
    structure = re.compile(r"(title|script|recipe|    script|  recipe|  [\w.-]+: \{\}|  - )\b")
    unmarked = [line for line in values if not MARK.search(line) and not structure.match(line)]
    left = [line for line in unmarked if not re.match(r"  [\w.-]+: \{\}$", line)]
    assert len(values) > 8 and not left, left


MODELS = [("in1k", "ldm_4_in1k"), ("in1k", "dit_xl_2_in1k"), ("cc3m", "ldm_4_cc3m"), ("cc3m_lcm", "lcm_sd15_cc3m")]


@pytest.mark.parametrize("study, model", MODELS, ids=[model for _, model in MODELS])
def test_the_recipes_of_the_paper_are_cells_of_its_studies(study, model):
    cells = {key[1]: values for key, values in trainings(STUDIES / f"{study}.yaml").items() if key[0] in ("", model)}
    script = {"in1k": "train_class_cond", "cc3m": "train_text_to_image_corrupt"}.get(study, "train_lcm_distill")
    settings = [model, *(f"{model}/{path.stem}" for path in (RECIPES / model).glob("*.yaml"))]
    assert len(settings) > 3
    found = {setting: _of(cells, parse(script, ("--recipe", setting))) for setting in settings}
    assert None not in found.values() and len(set(found.values())) == len(settings), found
    assert found[model] == "clean"
    more = cells.keys() - found.values()
    assert all(re.fullmatch(r"cep-[ug]-(0\.1|0\.5|2)", label) for label in more), more  # the ablation of γ


@pytest.mark.parametrize("model", ["controlnet_in1k", "controlnet_cc3m", "t2i_adapter_in1k", "t2i_adapter_cc3m"])
def test_the_personalizations_of_the_paper_are_cells_of_its_studies(model, tmp_path):
    whole = tmp_path / "whole.yaml"
    whole.write_text(uncommented((STUDIES / f"in100_{model}.yaml").read_text(encoding="utf-8")), encoding="utf-8")
    cells = trainings(whole)
    script = f"train_{model.rpartition('_')[0]}"
    settings = [model, *(f"{model}/{path.stem}" for path in (RECIPES / model).glob("*.yaml"))]
    found = {setting: _of(cells, parse(script, ("--recipe", setting))) for setting in settings}
    assert set(found.values()) == cells.keys() and len(settings) == len(cells) == 10
    for cell in read_study(str(whole)).cells:  # what the base was trained with is what its name says
        base = cell.stages[0].values["pretrained_model_name_or_path"]
        assert {"clean": "clean", "corruption": "random_noise_2.5", "input_perturbation": "input-perturbation"}.get(
            cell.method.kind, f"condnoise_{cell.method.type}"
        ) == base.removeprefix("DiffusionNoise/").split("_", 2)[-1].removeprefix("clean_").removeprefix(
            f"runs/ldm-4-{model.rpartition('_')[2]}-"
        )


def _of(cells: dict, recipe: Arguments):
    """The cell that trains as a recipe does; None where there is none."""

    def setting(args: Arguments) -> dict:
        return {
            name: value
            for name, value in dataclasses.asdict(args).items()
            if name not in BESIDE and not name.startswith("eval_")
        }

    same = [cell for cell, args in cells.items() if setting(args) == setting(recipe)]
    assert len(same) < 2, same
    return same[0] if same else None


def test_the_released_checkpoints_are_what_their_names_say():
    names = []
    for path in STUDIES.glob("released_*.yaml"):
        for cell in read_study(str(path)).cells:
            names.append(cell.pipeline)
            kind = cell.pipeline.split("_", 2)[2]
            if kind.startswith("random_noise_"):
                assert cell.method.strength == float(kind.removeprefix("random_noise_")) / 100
                assert cell.method.type == ("swap" if "cc3m" in path.stem else "symmetric")
                assert cell.label == f"eta-{cell.method.strength:g}"
            else:
                assert kind == {"clean": "clean", "cep": f"clean_condnoise_{cell.method.type}"}[cell.method.kind]
    assert len(names) == len(set(names)) == 9 + 6 + 9
    assert all(name.startswith("DiffusionNoise/") for name in names)


def test_the_readme_tells_of_every_study_and_its_size():
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \|.*\| ([\d, ×]+) \| .* \|$", README, re.M)}
    assert rows.keys() == set(study_names())
    for name, (size,) in rows.items():
        study = read_study(name)
        blocks, cells = len(study.blocks), len(study.cells)
        said = f"{blocks} × {cells // blocks}" if blocks > 1 else f"{cells}"
        assert size == f"{said} × {len(study.seeds)}", name
        assert cells * len(study.seeds) == len(study.runs())


def test_the_example_of_the_readme_is_a_study(tmp_path):
    examples = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert len(examples) == 2
    for number, example in enumerate(examples):
        path = tmp_path / f"example{number}.yaml"
        path.write_text(example, encoding="utf-8")
        check(path)
        assert len(read_study(str(path)).blocks) == 2
    two_stages = read_study(str(path))
    plans = plan_runs(two_stages, two_stages.runs(seeds=[0]), Path("runs"))
    assert len({plan.steps[0].folder for plan in plans}) == len(plans) / 2  # a base for both controls
    for plan in plans:
        base, adapter = plan.steps[0], parse(plan.steps[1].script, plan.steps[1].words)
        assert adapter.pretrained_model_name_or_path == str(base.folder)
        assert adapter.control_column == plan.run.cell.block
        assert adapter.corruption_ratio == adapter.cep_gamma == 0


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\b(?:recipes|docs|studies|noisycond)/[\w/]+\.\w+", README):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", sorted(path.name for path in (STUDIES / "results").iterdir()))
def test_the_tables_in_the_docs_are_those_of_the_recorded_runs(name, tmp_path):
    study = read_study(str(STUDIES / f"{name}.yaml"))
    results = read_results(study, plan_runs(study, study.runs(), Path("runs")), STUDIES / "results" / name)
    assert results.done == len(results.runs)
    write_tables(results, compare(results.values), tmp_path)
    for found in tmp_path.iterdir():
        kept = pandas.read_csv(ROOT / "docs/studies" / name / found.name)
        pandas.testing.assert_frame_equal(kept, pandas.read_csv(found), rtol=1e-6)  # of t tests: not to the last digit


def test_the_fid_tables_of_the_page_on_digits_are_those_of_the_studies():
    page, *tables = (
        re.sub(r" +", " ", (ROOT / "docs" / name).read_text(encoding="utf-8"))
        for name in ("digits_study.md", "studies/digits/results.md", "studies/digits_guidance/results.md")
    )
    shown = [table.splitlines()[2:] for table in re.findall(r"^\| FID ↓ \|.*?\n(?=\n)", page, re.M | re.S)]
    assert [len(rows) for rows in shown] == [15, 2]
    for rows, table in zip(shown, tables, strict=True):
        part = table.split("## FID over guidance scales")[1].split("\n#")[0]
        known = {re.sub(r"^(\|[^|]*)\| \d+ ", r"\1", line) for line in part.splitlines()}
        assert set(rows) <= known
