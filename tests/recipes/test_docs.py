"""What the README says exists: flags with their defaults, commands that parse, files and names."""

import dataclasses
import re
import shlex

import pytest
from launching import ROOT, load_script
from script_flags import arguments_class

from noisycond.arguments import parse_arguments
from noisycond.convert import ConvertArguments, with_flags
from noisycond.evaluation.metrics import METRICS
from noisycond.evaluation.options import MetricArguments
from noisycond.launch import split_command
from noisycond.recipes import recipe_names
from noisycond.study.reading import read_study
from noisycond.theory.__main__ import TheoryArguments
from noisycond.theory.curves import best_eta, best_gamma
from noisycond.theory.embedding import EmbeddingArguments
from noisycond.theory.guidance import best_under_guidance, pooled_squared_w2
from noisycond.theory.mixture import Mixture


CEP_EVERYWHERE = (ROOT / "docs/cep_everywhere.md").read_text(encoding="utf-8")
CHECKPOINTS = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES_README = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
SCALING = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
METRICS_PAGE = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
TEXT_PAGE = (ROOT / "docs/text_to_image.md").read_text(encoding="utf-8")
DISTILLATION = (ROOT / "docs/distillation.md").read_text(encoding="utf-8")
PERSONALIZATION = (ROOT / "docs/personalization.md").read_text(encoding="utf-8")
THEORY = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
STUDIES_PAGE = (ROOT / "studies/README.md").read_text(encoding="utf-8")
DIGITS_STUDY = (ROOT / "docs/digits_study.md").read_text(encoding="utf-8")
DOCS = {
    "README.md": README,
    "docs/text_to_image.md": TEXT_PAGE,
    "recipes/README.md": RECIPES_README,
    "docs/scaling.md": SCALING,
    "docs/metrics.md": METRICS_PAGE,
    "docs/distillation.md": DISTILLATION,
    "docs/personalization.md": PERSONALIZATION,
    "studies/README.md": STUDIES_PAGE,
    "docs/digits_study.md": DIGITS_STUDY,
    "docs/theory.md": THEORY,
}
DEFAULT_RECIPES = {
    "train_class_cond": "digits_dit_mini",
    "train_text_to_image_corrupt": "digits_text",
    "train_autoencoder": "digits_kl",
    "train_lcm_distill": "digits_lcm",
    "prepare_dataset": "prepare_digits",
    "train_controlnet": "digits_controlnet",
    "train_t2i_adapter": "digits_t2i_adapter",
}


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.search(r"(?<![/\w])\w+\.py\b", line) and "noisycond.launch" not in line]


def test_there_are_commands():
    assert len(commands(README)) >= 8


@pytest.mark.parametrize("command", [command for text in DOCS.values() for command in commands(text)])
def test_command_parses(command, tmp_path, monkeypatch):
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "imagenet" / split).mkdir(parents=True)
    argv, name = words[words.index(script) + 1 :], script.removesuffix(".py")
    if name == "study":
        monkeypatch.chdir(ROOT)
        path, args = load_script(name).parse(argv)
        read_study(str(path)).runs(args.cells, args.seeds, args.blocks)
        return
    parse_arguments(arguments_class(name, argv), argv, DEFAULT_RECIPES.get(name))


@pytest.mark.parametrize("text", [README, CEP_EVERYWHERE], ids=["README", "cep_everywhere"])
def test_launch_of_another_script_parses(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^accelerate launch -m noisycond\.launch (.*)$", text, re.M)
    assert lines
    for line in lines:
        words = shlex.split(line)
        script = next(word for word in words if word.endswith(".py"))
        (tmp_path / script).touch()
        arguments, found, rest = split_command(words)
        assert arguments.cep_gamma == 1 and found.name == script and "--output_dir" in rest


def conversions() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README + CHECKPOINTS, re.S)
    return [line for block in blocks for line in block.splitlines() if "noisycond.convert" in line]


@pytest.mark.parametrize("command", conversions())
def test_conversion_parses(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet.json", "cin256-v2.yaml"):
        (tmp_path / name).write_text("{}")
    words = shlex.split(command)
    parse_arguments(ConvertArguments, with_flags(words[words.index("noisycond.convert") + 1 :]))


def test_the_commands_of_the_theory_parse_and_name_its_defaults():
    lines = re.findall(r"^python -m noisycond\.(theory\S*) (.*)$", THEORY, re.M)
    classes = {"theory": TheoryArguments, "theory.embedding": EmbeddingArguments}
    assert {module for module, _ in lines} == classes.keys()
    for module, line in lines:
        found = parse_arguments(classes[module], shlex.split(line))
        if module == "theory":
            assert found == TheoryArguments()


def test_the_tables_of_the_theory_are_what_it_computes():
    mixture, number = Mixture.drawn(10, 8, 1.0), r"([\d.]+)"
    rows = re.findall(rf"^\| (\d+) \| {number} \| {number} % \| {number} % \| {number} % \|$", THEORY, re.M)
    assert len(rows) == 7
    for samples, *told in rows:
        gamma, eta = best_gamma(mixture, int(samples)), best_eta(mixture, int(samples))
        found = (gamma.strength, 100 * gamma.gain, 100 * eta.strength, 100 * eta.gain)
        _agree(told, found)
    row = rf"^\| {number} \| {number} \| {number} \| {number} \| {number}(?: %)? \| {number} \|$"
    rows = re.findall(row, THEORY, re.M)
    assert [scale for scale, *_ in rows] == ["1", "1.5", "2.25", "4"]
    for scale, *told in rows:
        noise, flips = (best_under_guidance(mixture, float(scale), how) for how in ("gaussian", "eta"))
        found = (noise.without, noise.strength, noise.squared_w2, 100 * flips.strength, flips.squared_w2)
        _agree(told, found)


def test_the_pooled_table_of_the_theory_is_what_it_computes():
    mixture = Mixture.drawn(10, 8, 1.0)
    columns = [{}, {"eta": 0.05}, {"eta": 0.1}, {"eta": 0.2}, {"gamma": 0.15}, {"gamma": 0.46}]
    table = THEORY.split("| guidance scale, pooled |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [scale for scale, *_ in rows] == ["1", "1.5", "2.25", "4"]
    for scale, *told in rows:
        _agree(told, [pooled_squared_w2(mixture, float(scale), **corruption) for corruption in columns])


def _agree(told, found):
    """Each is the number, rounded to the places that are told."""
    for text, value in zip(told, found, strict=True):
        places = len(text.partition(".")[2])
        assert abs(float(text) - value) <= 0.51 * 10**-places, (text, value)


def test_the_flags_of_conversion_are_told():
    told = set(re.findall(r"^\| `--(\w+)` \|", CHECKPOINTS, re.M))
    known = {item.name for item in dataclasses.fields(ConvertArguments)}
    assert len(conversions()) >= 5 and told == known - {"source", "output_dir", "recipe"}


@pytest.mark.parametrize(
    "script, page, least",
    [("train_class_cond", README, 30), ("train_text_to_image_corrupt", TEXT_PAGE, 24)],
    ids=["classes", "text"],
)
def test_flag_table_has_the_real_flags_and_defaults(script, page, least):
    fields = {item.name: item for item in dataclasses.fields(arguments_class(script))}
    rows = re.findall(r"^\| `--(\w+)` \| (\S*) ?\|", page, re.M)
    assert len(rows) > least
    for name, default in rows:
        if name.startswith("no_"):
            assert fields[name.removeprefix("no_")].default is True
        else:
            value = fields[name].default
            shown = "" if value in (None, dataclasses.MISSING) else str(value)  # lists are made anew: none by default
            assert default == shown, name


def test_the_flags_of_distillation_are_told():
    module = load_script("train_lcm_distill")
    fields = {item.name: item for cls in module.STARTED.classes.values() for item in dataclasses.fields(cls)}
    own = set(module.LCMArguments.__annotations__)
    rows = dict(re.findall(r"^\| `--(\w+)` \| (\S*) ?\|", DISTILLATION, re.M))
    assert own <= set(rows)
    for name, default in rows.items():
        assert default == ("" if fields[name].default is None else str(fields[name].default)), name


def test_the_flags_that_are_particular_to_text_are_all_told():
    of_classes, of_text = (
        {item.name: item.metadata["help"] for item in dataclasses.fields(arguments_class(script))}
        for script in ("train_class_cond", "train_text_to_image_corrupt")
    )
    told = set(re.findall(r"^\| `--(\w+)` \|", TEXT_PAGE, re.M))
    assert told >= of_text.keys() - of_classes.keys()


@pytest.mark.parametrize("script", ["train_class_cond", "train_text_to_image_corrupt", "train_lcm_distill"])
def test_every_flag_of_the_main_scripts_has_help(script):
    for item in dataclasses.fields(arguments_class(script)):
        assert len(item.metadata["help"]) > 10, item.name


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\(((?:docs|noisycond|tests|recipes)/[\w/.]+)\)", README):
        assert (ROOT / name).exists(), name
    tree = README.split("## Reading the code")[1].split("## Install")[0]
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert list(ROOT.glob(name)) or list((ROOT / "noisycond").rglob(name)), name


def test_python_blocks_import_what_exists():
    for block in re.findall(r"```py\n(.*?)```", README + CHECKPOINTS, re.S):
        for line in block.splitlines():
            if line.startswith("from noisycond"):
                exec(line, {})  # noqa: S102


def test_every_recipe_is_in_the_table_of_recipes():
    rows = re.findall(r"^\| .*$", RECIPES_README, re.M)
    names = re.findall(r"`([\w./]+)`", "\n".join(rows))
    assert set(recipe_names()) == {name for name in names if not name.endswith(".py")}


def test_every_metric_and_its_choices_are_told():
    told = set(re.findall(r"`(\w+)`", METRICS_PAGE))
    assert set(METRICS) <= told
    flags = {item.name for item in dataclasses.fields(arguments_class("evaluate_model"))}
    for script in ("train_class_cond", "train_controlnet"):
        flags |= {item.name for item in dataclasses.fields(arguments_class(script))}
    for name in re.findall(r"`--(\w+)", METRICS_PAGE):
        assert name in flags, name
    defaults = {item.name: item.default for item in dataclasses.fields(MetricArguments)}
    for name, value in re.findall(r"`--(\w+)` ([\d.]+)", METRICS_PAGE):
        assert str(defaults[name]) == value or (name, value) == ("kid_subset_size", "1000"), name


def test_files_named_in_the_docs_exist():
    for text in (RECIPES_README, SCALING, METRICS_PAGE, DISTILLATION, PERSONALIZATION):
        for name in re.findall(r"\b(?:recipes|docs|benchmarks)/[\w/]+\.\w+", text):
            assert (ROOT / name).exists(), name


def test_the_memory_table_is_what_a_dry_run_says(monkeypatch, script, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    for column, recipe in enumerate(("ldm_4_in1k", "dit_xl_2_in1k")):
        for row, variable in (("a whole copy", None), ("FSDP", "FSDP"), ("DeepSpeed ZeRO 2", "DEEPSPEED")):
            with monkeypatch.context() as context:
                if variable:
                    context.setenv(f"ACCELERATE_USE_{variable}", "true")
                script("train_class_cond", "--recipe", recipe, "--dry_run")
            total = re.search(r"total +([\d.]+) GB", capsys.readouterr().out)[1]
            figures = re.search(rf"^\| {row}.*?\| ([\d.]+) \| ([\d.]+) \|$", SCALING, re.M).groups()
            assert f"{float(total):.2f}" == figures[column], (recipe, row)
