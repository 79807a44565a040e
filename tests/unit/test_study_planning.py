"""The steps of a run and what they are known by."""

from pathlib import Path

import pytest
import yaml

from noisycond.errors import InputError
from noisycond.run_folder import MAY_CHANGE
from noisycond.study.definition import Stage
from noisycond.study.planning import NOT_IN_IDENTITY, identity_of, plan_runs, refuse_unknown_flags
from noisycond.study.reading import read_study


SAID = {
    "script": "train_class_cond",
    "recipe": "digits_ldm",
    "settings": {"cep_gamma": 0, "max_train_steps": 5},
    "seeds": [0, 1],
    "cells": {"clean": {}, "eta": {"corruption_ratio": [0.025, 0.1]}},
    "evaluation": {"recipe": "digits_evaluation", "settings": {"guidance_scale": [1.0]}},
}
STAGES = [
    {"script": "train_class_cond", "recipe": "digits_ldm", "settings": {"cep_gamma": 0}},
    {
        "script": "train_controlnet",
        "recipe": "digits_controlnet",
        "settings": {"pretrained_model_name_or_path": "{before}"},
    },
]


def read(tmp_path, **changes):
    path = tmp_path / "mine.yaml"
    said = {name: value for name, value in (SAID | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return read_study(str(path))


def plans(study):
    return plan_runs(study, study.runs(), Path("out"))


def identity(before=None, script="train_class_cond", **values):
    return identity_of(Stage(script, values), before)


def test_a_run_trains_and_is_evaluated_with_its_seed(tmp_path):
    plan = plans(read(tmp_path))[4]
    training, evaluation = plan.steps
    assert (plan.run.cell.label, plan.run.seed) == ("eta-0.025", 1)
    assert training.words[:2] == ("--recipe", "digits_ldm")
    assert training.words[-5:-1] == ("--seed", "1", "--output_dir", str(training.folder))
    assert training.words[-1] == "--resume_from_checkpoint=latest"
    assert training.folder == Path("out/trained") / f"eta-0.025-seed-1-{training.identity}"
    assert training.steps == 5
    assert f"--pipeline eta-0.025-seed-1={training.folder}" in evaluation.command()
    assert "--seeds 1 " in evaluation.command()
    assert evaluation.folder == Path("out/evaluated") / f"eta-0.025-seed-1-{evaluation.identity}"
    assert plan.file_name == f"eta-0.025-seed-1-{evaluation.identity}"


def test_seeds_of_drawing_may_be_chosen(tmp_path):
    evaluation = {"recipe": "digits_evaluation", "settings": {"seeds": [7, 8]}}
    assert "--seeds 7 8" in plans(read(tmp_path, evaluation=evaluation))[0].steps[-1].command()


def test_the_identity_is_that_of_the_content(tmp_path):
    here = identity(recipe="digits_ldm", cep_gamma=0)
    assert identity(cep_gamma=0.0, recipe="digits_ldm") == here  # order and spelling
    assert identity(cep_gamma=0, recipe="digits_ldm", logging_steps=5, cpu_threads_per_process=1) == here
    assert identity(cep_gamma=0, recipe="digits_ldm", learning_rate="2e-3") == here  # as the recipe says
    assert identity(cep_gamma=0, recipe="digits_ldm", adam_beta1=None) == here
    assert identity(recipe="digits_ldm", cep_gamma=[0]) == here  # the command is the same
    assert identity(mixed_precision=False) == identity(mixed_precision="no")  # as YAML reads a bare no
    others = [
        identity(recipe="digits_ldm", cep_gamma=0, seed=1),
        identity(recipe="digits_ldm", cep_gamma=1e-9),
        identity(recipe="digits_dit_mini", cep_gamma=0),
        identity("abc", recipe="digits_ldm", cep_gamma=0),
        identity(script="train_controlnet", recipe="digits_ldm", cep_gamma=0),
        identity(recipe="digits_ldm", cep_gamma=0, eval_metrics=["fid"]),
        identity(recipe="digits_ldm", cep_gamma=0, allow_tf32=True),
        identity(recipe="digits_ldm", cep_gamma=0, eval_metrics=["fid", "kid"]),
    ]
    assert len({here, *others}) == 1 + len(others)


def test_an_identity_leaves_out_what_a_resumed_run_may_change_alone():
    """And what an evaluation only draws or hands on beside its numbers."""
    assert {"figures", "update_card", "save_stats"} == NOT_IN_IDENTITY - MAY_CHANGE


def test_a_small_file_counts_by_its_content(tmp_path):
    groups, other = tmp_path / "groups.json", tmp_path / "other.json"
    groups.write_text("[[0, 1]]")
    other.write_text("[[0, 1]]")
    before = identity(class_groups=str(groups))
    assert identity(class_groups=str(other)) == before
    groups.write_text("[[0, 2]]")
    assert identity(class_groups=str(groups)) != before
    assert identity(class_groups=str(tmp_path)) != identity(class_groups=str(tmp_path.parent))


def test_a_folder_of_a_cell_that_was_renamed_is_taken_up(tmp_path):
    plan = plan_runs(read(tmp_path), read(tmp_path).runs(labels=["clean"]), tmp_path)[0]
    plan.steps[0].folder.mkdir(parents=True)
    renamed = read(tmp_path, cells={"truth": {}})
    after = plan_runs(renamed, renamed.runs(), tmp_path)[0]
    assert after.steps[0].folder == plan.steps[0].folder
    assert after.steps[1].folder.name.startswith("truth-seed-0-")


def test_two_runs_that_are_one_are_refused(tmp_path):
    cells = {"one": {"pipeline": "someone/one"}}
    evaluation = {"recipe": "digits_evaluation", "settings": {"seeds": [7]}}
    study = read(tmp_path, script=None, recipe=None, settings=None, cells=cells, evaluation=evaluation)
    with pytest.raises(InputError, match="one, seed 0 and one, seed 1 are one and the same"):
        plans(study)


def test_the_launch_is_of_the_identity_and_of_the_command(tmp_path):
    plain, launched = plans(read(tmp_path))[0], plans(read(tmp_path, launch_arguments="--use_fsdp"))[0]
    assert plain.identity != launched.identity
    assert launched.steps[0].command().startswith("accelerate launch --use_fsdp train_class_cond.py ")


def test_a_renamed_cell_keeps_its_identity_and_another_evaluation_has_another(tmp_path):
    before = [plan.identity for plan in plans(read(tmp_path))]
    renamed = {"truth": {}, "noisy": {"corruption_ratio": [0.025, 0.1]}}
    assert [plan.identity for plan in plans(read(tmp_path, cells=renamed, title="other"))] == before
    evaluation = {"recipe": "digits_evaluation", "settings": {"guidance_scale": [1.0], "num_images": 10}}
    after = plans(read(tmp_path, evaluation=evaluation))
    assert not {plan.identity for plan in after} & set(before)
    assert [plan.steps[0].identity for plan in after] == [plan.steps[0].identity for plan in plans(read(tmp_path))]


def test_the_number_of_processes_is_that_of_the_batch_and_of_the_command(tmp_path):
    one, eight = plans(read(tmp_path))[0], plans(read(tmp_path, processes=8))[0]
    assert one.identity != eight.identity and one.steps[0].identity != eight.steps[0].identity
    assert plans(read(tmp_path, processes=1))[0].identity == one.identity
    assert eight.steps[0].command().startswith("accelerate launch --multi_gpu --num_processes 8 train_class_cond.py ")


def test_trainings_of_equal_settings_are_one(tmp_path):
    cells, grid = {"clean": {}, "cep": {"cep_gamma": 2}}, {"train_controlnet.control_column": ["canny", "mask"]}
    study = read(tmp_path, script=None, recipe=None, settings=None, stages=STAGES, cells=cells, seeds=[0], grid=grid)
    canny, cep, mask, _ = plans(study)
    assert mask.steps[0] == canny.steps[0]
    assert cep.steps[0].identity != canny.steps[0].identity
    assert len({plan.steps[1].identity for plan in (canny, mask, cep)}) == 3
    base = canny.steps[0].folder
    assert f"--pretrained_model_name_or_path {base} " in mask.steps[1].command()
    assert mask.steps[1].folder.name == f"mask-clean-seed-0-controlnet-{mask.steps[1].identity}"
    assert f"--pipeline mask-clean-seed-0={mask.steps[1].folder} " in mask.steps[2].command()
    # What is asked for of a study changes no names.
    assert plan_runs(study, study.runs(labels=["clean"], blocks=["mask"]), Path("out")) == [mask]


def test_a_given_pipeline_is_evaluated_alone(tmp_path):
    cells = {"one": {"pipeline": "someone/one"}, "two": {"pipeline": "someone/two", "method": {"cep_gamma": 1}}}
    one, two, *_ = plans(read(tmp_path, script=None, recipe=None, settings=None, cells=cells))
    assert [step.script for step in one.steps] == ["evaluate_model"]
    assert "--pipeline one-seed-0=someone/one " in one.steps[0].command()
    assert one.identity != two.identity


def test_unknown_flags_are_refused_and_refused_values_are_told_of_their_cell(tmp_path):
    def parse(words):
        if "--corruption_ration" in words:
            raise InputError("unknown flag --corruption_ration (did you mean '--corruption_ratio'?).")
        if "--corruption_ratio" in words and float(words[words.index("--corruption_ratio") + 1]) > 1:
            raise InputError("--corruption_ratio is 1.5, but …")
        assert not any("resume" in word for word in words)

    parsers = {"train_class_cond": parse, "evaluate_model": parse}
    assert refuse_unknown_flags(read(tmp_path), parsers) == {}
    study = read(tmp_path, cells={"clean": {}, "eta": {"corruption_ratio": [0.1, 1.5]}})
    assert refuse_unknown_flags(study, parsers) == {"eta-1.5": "train_class_cond.py: --corruption_ratio is 1.5, but …"}
    study = read(tmp_path, cells={"eta": {"corruption_ration": 0.1}})
    with pytest.raises(InputError, match="cell eta, train_class_cond.py: unknown flag --corruption_ration"):
        refuse_unknown_flags(study, parsers)


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="--recipe digit_ldm"):
        plans(read(tmp_path, recipe="digit_ldm"))


def test_a_value_longer_than_any_file_name_is_a_value():
    assert identity(validation_prompts="x" * 5000) == identity(validation_prompts="x" * 5000)
