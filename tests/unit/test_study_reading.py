"""A study's file: cells, seeds, blocks and stages, and what is refused of it."""

from pathlib import Path

import pytest
import yaml

from noisycond.data.caption_options import CaptionCorruptionArguments
from noisycond.errors import InputError
from noisycond.study.methods import Method, method_of
from noisycond.study.reading import read_study, study_names


EVALUATION = {"recipe": "digits_evaluation", "settings": {"guidance_scale": [1.0, 2.0]}}
SAID = {
    "script": "train_class_cond",
    "recipe": "digits_ldm",
    "settings": {"cep_gamma": 0, "max_train_steps": 5},
    "seeds": [0, 3],
    "cells": {"clean": {}, "eta": {"corruption_ratio": [0.025, 0.1]}},
    "evaluation": EVALUATION,
}


def write(tmp_path, **changes):
    said = {name: value for name, value in (SAID | changes).items() if value is not None}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return str(path)


def read(tmp_path, **changes):
    return read_study(write(tmp_path, **changes))


def words_of(cell, stage=0):
    return dict(cell.stages[stage].values)


def test_seeds_are_the_outer_loop(tmp_path):
    runs = read(tmp_path).runs()
    assert [(run.cell.label, run.seed) for run in runs] == [
        (label, seed) for seed in (0, 3) for label in ("clean", "eta-0.025", "eta-0.1")
    ]
    assert runs[1].name == "eta-0.025-seed-0"


def test_a_cell_has_the_settings_of_all_and_its_own_over_them(tmp_path):
    cells = read(tmp_path, cells={"clean": {}, "long": {"max_train_steps": 9, "cep_gamma": 1}}).cells
    assert words_of(cells[0]) == {"recipe": "digits_ldm", "cep_gamma": 0, "max_train_steps": 5}
    assert words_of(cells[1]) == {"recipe": "digits_ldm", "cep_gamma": 1, "max_train_steps": 9}
    assert cells[1].settings == {"max_train_steps": 9, "cep_gamma": 1}


def test_lists_are_crossed_and_a_list_in_a_list_is_one_value(tmp_path):
    own = {"corruption_ratio": [0.1, 0.2], "corruption_mode": ["fixed", "random"], "eval_metrics": [["fid", "kid"]]}
    cells = read(tmp_path, cells={"both": own}).cells
    assert [cell.label for cell in cells] == [
        f"both-{ratio}-{mode}" for ratio in (0.1, 0.2) for mode in ("fixed", "random")
    ]
    assert words_of(cells[0])["eval_metrics"] == ["fid", "kid"]
    assert cells[3].method == Method("corruption", "symmetric", "random", 0.2)
    assert cells[3].stages[0].arguments()[-3:] == ["--eval_metrics", "fid", "kid"]


def test_a_value_that_is_a_list_is_named_where_there_are_several(tmp_path):
    own = {"cep_gamma": 1, "eval_metrics": [["fid", "kid"], ["fid"]]}
    assert [cell.label for cell in read(tmp_path, cells={"a": own}).cells] == ["a-fid+kid", "a-fid"]


def test_a_grid_makes_blocks(tmp_path):
    study = read(tmp_path, grid={"recipe": ["digits_ldm", "dit_xl_2_in1k/eta_5"]}, recipe=None)
    assert study.blocks == ["digits_ldm", "eta_5"]
    assert [cell.label for cell in study.cells] == ["clean", "eta-0.025", "eta-0.1"] * 2
    assert words_of(study.cells[3])["recipe"] == "dit_xl_2_in1k/eta_5"
    assert study.runs(blocks=["eta_5"], seeds=[3], labels=["clean"])[0].name == "eta_5-clean-seed-3"


def test_settings_go_to_the_stage_that_they_name(tmp_path):
    stages = [
        {"script": "train_class_cond", "recipe": "digits_ldm", "settings": {"cep_gamma": 0}},
        {
            "script": "train_controlnet",
            "recipe": "digits_controlnet",
            "settings": {"pretrained_model_name_or_path": "{before}"},
        },
    ]
    own = {"cep_gamma": 1, "train_controlnet.control_column": "mask"}
    (cell,) = read(tmp_path, script=None, recipe=None, settings=None, stages=stages, cells={"cep": own}).cells
    assert words_of(cell) == {"recipe": "digits_ldm", "cep_gamma": 1}
    assert words_of(cell, 1) == {
        "recipe": "digits_controlnet",
        "pretrained_model_name_or_path": "{before}",
        "control_column": "mask",
    }
    assert cell.method == Method("cep", "uniform", "random", 1.0)


def test_a_method_is_that_of_the_recipe_too_and_of_every_stage(tmp_path):
    (cell,) = read(tmp_path, settings=None, cells={"so-called clean": {}}).cells
    assert cell.method == Method("cep", "uniform", "random", 1.0)  # digits_ldm has it on
    before = {"recipe": "digits_controlnet", "settings": {"pretrained_model_name_or_path": "{before}"}}
    stages = [
        {"script": "train_class_cond", "recipe": "digits_ldm", "settings": {"cep_gamma": 0}},
        {"script": "train_controlnet", **before},
    ]
    cells = {"later": {"train_controlnet.cep_gamma": 2}, "both": {"cep_gamma": 1, "train_controlnet.cep_gamma": 2}}
    study = read(tmp_path, script=None, recipe=None, settings=None, stages=stages, cells=cells)
    assert [cell.method for cell in study.cells] == [Method("cep", "uniform", "random", 2.0), Method("mixed")]
    stages[1]["settings"] = {}
    with pytest.raises(InputError, match="train_controlnet of the cell later starts from nothing"):
        read(tmp_path, script=None, recipe=None, settings=None, stages=stages, cells=cells)


def test_a_key_that_stands_there_twice_is_refused(tmp_path):
    path = Path(write(tmp_path))
    path.write_text(path.read_text().replace("  clean: {}", "  clean: {}\n  clean: {cep_gamma: 1}"))
    with pytest.raises(InputError, match="'clean' stands there twice"):
        read_study(str(path))


def test_yes_and_no_are_what_any_flag_takes(tmp_path):
    stage = read(tmp_path, cells={"a": {"mixed_precision": False, "allow_tf32": True}}).cells[0].stages[0]
    assert stage.arguments()[-4:] == ["--mixed_precision", "no", "--allow_tf32", "yes"]


def test_what_a_given_base_stands_for_is_said_by_its_method(tmp_path):
    own = {"pretrained_model_name_or_path": "someone/base", "method": {"corruption_ratio": 0.025}}
    changes = {"script": "train_controlnet", "recipe": "digits_controlnet", "settings": None}
    (cell,) = read(tmp_path, cells={"slight": own}, **changes).cells
    assert cell.method == Method("corruption", "symmetric", "fixed", 0.025)
    assert "corruption_ratio" not in words_of(cell)


def test_a_study_without_training_names_pipelines(tmp_path):
    released = {"clean": {"pipeline": "someone/clean"}, "slight": {"pipeline": "b", "method": {"cep_gamma": 1}}}
    cells = read(tmp_path, script=None, recipe=None, settings=None, cells=released).cells
    assert [(cell.pipeline, cell.stages, cell.method.kind) for cell in cells] == [
        ("someone/clean", (), "clean"),
        ("b", (), "cep"),
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": [1]}, "unknown key 'seed' (did you mean 'seeds'?)"),
        ({"seeds": []}, "`seeds` is missing or empty"),
        ({"seeds": [0, 0]}, "`seeds` names one twice"),
        ({"seeds": [0.5]}, "must be a list of whole numbers"),
        ({"cells": {}}, "`cells` is missing or empty"),
        ({"cells": ["clean"]}, "`cells` must be `name: settings` lines"),
        ({"cells": {"clean": [1]}}, "expected `flag: value` lines in the cell clean"),
        ({"cells": {"clean": {"seed": 1}}}, "`seed` in the cell clean is set by study.py"),
        ({"cells": {"a": {"pipeline": "b"}}}, "names a `pipeline`, but the study's `script` trains one"),
        ({"cells": {"a-1": {}, "a": {"cep_gamma": [1]}}}, "two cells are called a-1"),
        ({"cells": {"a b": {}, "a/b": {"cep_gamma": 1}}}, "the cells a b and a/b would have files of one name"),
        ({"cells": {"clean": {}, "long": {"max_train_steps": 9}}}, "cells 'clean' and 'long' are both clean"),
        ({"processes": 0}, "`processes` must be a whole number from 1 on"),
        ({"cells": {"a": {"train_controlnet.rank": 1}}}, "names no stage of the study; there are train_class_cond"),
        ({"script": "train_clas_cond"}, "did you mean 'train_class_cond'?"),
        ({"script": "generate"}, "must name a training script"),
        ({"script": None}, "`recipe` needs `script`"),
        ({"settings": {"output_dir": "x"}}, "`output_dir` in the settings of train_class_cond is set by study.py"),
        ({"settings": {"denoiser": "{before}"}}, "names {before}, but nothing comes before the first training"),
        ({"cells": {"a": {"denoiser": "{before}/x"}}}, "names {before}, but nothing comes before"),
        ({"settings": {"cep-gamma": 1}}, "'cep-gamma' in the settings of train_class_cond is no flag"),
        ({"settings": {"snr_gamma": None}}, "`snr_gamma` in the settings of train_class_cond is empty"),
        ({"cells": {"a": {"cep_gamma": []}}}, "`cep_gamma` in the cell a is empty"),
        (
            {"cells": {"a": {"corruption_ratio": "ten"}}},
            "cell a: `corruption_ratio` is 'ten', but it must be a number",
        ),
        ({"cells": {"a": {"method": 3}}}, "`method` of the cell a must be `flag: value` lines"),
        ({"cells": {"a": {"method": {"corruption_ration": 1}}}}, "(did you mean 'corruption_ratio'?)"),
        ({"recipe": None}, "train_class_cond of the cell clean has no `recipe`"),
        ({"grid": {"cep_gamma": [1, 2]}, "cells": {"a": {"cep_gamma": 1}}}, "`cep_gamma` of the cell a is in `grid`"),
        ({"launch_arguments": "--num_processes 2"}, "--num_processes in `launch_arguments` is set by study.py"),
        ({"launch_arguments": "'"}, "`launch_arguments` cannot be read as a command line"),
        ({"stages": []}, "`script` belongs into the first of `stages`"),
        ({"evaluation": {"guidance_scale": [1]}}, "unknown key 'guidance_scale' in `evaluation`"),
        ({"report": {"guidance_scale": 0.5}}, "must be a number from 1 on"),
        ({"report": {"guidance": 2}}, "unknown key 'guidance' in `report` (did you mean 'guidance_scale'?)"),
    ],
)
def test_a_file_that_says_it_wrong_is_refused_in_one_sentence(tmp_path, changes, sentence):
    path = write(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        read_study(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_not_there_is_named_with_the_nearest(tmp_path):
    study = read(tmp_path)
    for wanted, sentence in (
        ({"labels": ["eta-0.02"]}, "--cells eta-0.02"),
        ({"seeds": [1]}, "--seeds 1"),
        ({"blocks": ["x"]}, "--blocks x"),
    ):
        with pytest.raises(InputError, match=sentence):
            study.runs(**wanted)
    with pytest.raises(InputError, match="did you mean 'digits'"):
        read_study("digit")
    (tmp_path / "broken.yaml").write_text("cells: [")
    with pytest.raises(InputError, match="not valid YAML"):
        read_study(str(tmp_path / "broken.yaml"))


def test_the_shipped_studies_are_found_by_name():
    assert {"digits", "quick"} <= set(study_names())
    assert read_study("quick").name == "quick"


@pytest.mark.parametrize(
    ("settings", "method", "title"),
    [
        ({"cep_gamma": 0, "corruption_ratio": 0.0}, Method("clean"), "clean"),
        ({"corruption_ratio": 0.025}, Method("corruption", "symmetric", "fixed", 0.025), "η = 2.5 %"),
        (
            {"corruption_ratio": 0.1, "corruption_mode": "random", "corruption_type": "token"},
            Method("corruption", "token", "random", 0.1),
            "η = 10 %, token, random",
        ),
        ({"cep_gamma": "1e-1"}, Method("cep", "uniform", "random", 0.1), "CEP-U, γ = 0.1"),
        (
            {"cep_gamma": 1, "cep_type": "gaussian", "cep_mode": "fixed"},
            Method("cep", "gaussian", "fixed", 1.0),
            "CEP-G, γ = 1, fixed",
        ),
        ({"input_perturbation": 0.1}, Method("input_perturbation", strength=0.1), "IP, γ = 0.1"),
        ({"embedding_dropout": 0.1}, Method("embedding_dropout", strength=0.1), "dropout, p = 0.1"),
        ({"label_smoothing": 0.1}, Method("label_smoothing", strength=0.1), "label smoothing, 0.1"),
        ({"label_smoothing": 0.1, "cep_gamma": 1}, Method("mixed"), "mixed"),
    ],
)
def test_a_method_is_read_from_flags(settings, method, title):
    assert method_of(settings) == method
    assert method_of(settings).title == title


def test_captions_are_swapped_where_nothing_else_is_said(tmp_path):
    assert CaptionCorruptionArguments().corruption_type == "swap"
    cells = {"swapped": {"corruption_ratio": 0.1}, "cut": {"corruption_ratio": 0.1, "corruption_type": "token"}}
    captions = {"script": "train_text_to_image_corrupt", "recipe": "none", "settings": None, "grid": None}
    assert [cell.method.type for cell in read(tmp_path, cells=cells, **captions).cells] == ["swap", "token"]
