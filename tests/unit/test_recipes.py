"""Recipes that build on one another, and the marks of their values."""

import pytest

from noisycond import recipes
from noisycond.arguments import DataArguments, parse_arguments
from noisycond.errors import InputError
from noisycond.recipes import read_recipe


KEYS = ["seed", "resolution", "dataset_name", "cep_gamma"]


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(path: str) -> str:
    with pytest.raises(InputError) as caught:
        read_recipe(path, KEYS)
    return str(caught.value)


@pytest.mark.parametrize("base", ["other", "other.yaml"])
def test_values_go_before_those_of_the_base(write, base):
    write("lowest.yaml", "dataset_name: digits  # [field]\nseed: 1  # [seen]\n")
    write("other.yaml", "base: lowest\nseed: 2  # [inferred] ours\nresolution: 8  # [inferred]\n")
    recipe = read_recipe(write("top.yaml", f"base: {base}\nresolution: 16  # [seen]\n"), KEYS)
    assert recipe.values == {"dataset_name": "digits", "seed": 2, "resolution": 16}
    assert recipe.marks == {"dataset_name": "field", "seed": "inferred", "resolution": "seen"}


def test_a_value_without_a_mark_loses_that_of_the_base(write):
    write("other.yaml", "seed: 2  # [inferred]\n")
    assert read_recipe(write("top.yaml", "base: other\nseed: 3\n"), KEYS).marks == {}


def test_a_base_is_found_by_its_name_in_the_folder_of_recipes(write, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "RECIPES", tmp_path)
    write("common.yaml", "seed: 5\n")
    write("model/top.yaml", "base: common\n")
    assert read_recipe("model/top", KEYS).values == {"seed": 5}
    assert recipes.recipe_names() == ["common", "model/top"]
    assert "did you mean 'common'?" in refusal(write("model/wrong.yaml", "base: comon\n"))


def test_an_empty_value_brings_back_the_default(write):
    write("other.yaml", "dataset_name: digits\nresolution: 8\n")
    path = write("top.yaml", "base: other\nresolution:\n")
    assert parse_arguments(DataArguments, ["--recipe", path]).resolution == 256


def test_an_empty_value_is_not_inferred(write):
    # No value to print, whatever its line says.
    path = write("top.yaml", "dataset_name: digits  # [field]\nresolution:   # [inferred]\n")
    assert not parse_arguments(DataArguments, ["--recipe", path]).inferred


@pytest.mark.parametrize("name", ["top", "other"])
def test_a_recipe_that_builds_on_itself(write, name):
    write("other.yaml", "base: top\n")
    sentence = refusal(write("top.yaml", f"base: {'top' if name == 'top' else 'other'}\n"))
    assert "builds on itself" in sentence and "top.yaml" in sentence and "\n" not in sentence


@pytest.mark.parametrize("base", ["nowhere", "[a, b]", "3"])
def test_a_base_that_is_not_there(write, base):
    path = write("top.yaml", f"base: {base}\n")
    sentence = refusal(path)
    assert f"--recipe {path}: its base" in sentence and "neither a file beside it" in sentence


def test_an_error_names_the_file_it_stands_in(write):
    path = write("other.yaml", "sed: 2\n")
    sentence = refusal(write("top.yaml", "base: other\n"))
    assert f"--recipe {path}: unknown key 'sed' (did you mean 'seed'?)" in sentence


def test_a_misspelt_base(write):
    assert "did you mean 'base'?" in refusal(write("top.yaml", "bas: other\n"))


# What a run prints


INFERRED = "dataset_name: digits  # [inferred]\nresolution: 8  # [inferred] by trial\ncenter_crop: true  # [field]\n"


@pytest.mark.parametrize(
    "argv, left",
    [
        ([], {"dataset_name": "digits", "resolution": 8}),
        (["--resolution", "16"], {"dataset_name": "digits"}),
        (["--resolution=8"], {"dataset_name": "digits"}),
        (["--dataset-name", "digits"], {"resolution": 8}),
    ],
)
def test_inferred_values_that_the_command_line_leaves(write, argv, left):
    args = parse_arguments(DataArguments, ["--recipe", write("some.yaml", INFERRED), *argv])
    assert args.inferred == left


def test_a_folder_of_images_takes_the_place_of_the_recipe_s_dataset(write, tmp_path):
    path = write("some.yaml", INFERRED + "num_classes: 10  # [inferred]\n")
    args = parse_arguments(DataArguments, ["--recipe", path, "--train_data_dir", str(tmp_path)])
    assert args.inferred == {"resolution": 8} and args.num_classes is None


def test_without_a_recipe_nothing_is_inferred():
    assert not parse_arguments(DataArguments, ["--dataset_name", "digits"]).inferred
