"""Flags and recipes: one parser fills both, the command line wins, and a wrong word is answered with the right one."""

from dataclasses import dataclass

import pytest

from noisycond.arguments import (
    CorruptionArguments,
    DataArguments,
    FirstStageArguments,
    LoopArguments,
    ObjectiveArguments,
    PerturbationArguments,
    flag,
    parse_arguments,
)
from noisycond.errors import InputError
from noisycond.recipes import find_recipe


@dataclass
class AllArguments(
    DataArguments,
    FirstStageArguments,
    CorruptionArguments,
    PerturbationArguments,
    ObjectiveArguments,
    LoopArguments,
):
    channels: list[int] = flag([1, 2], "A list.")


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns its path."""

    def write(text: str, name: str = "some.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parse(*argv, dataset: bool = True, **options) -> AllArguments:
    words = [str(word) for word in argv]
    return parse_arguments(AllArguments, [*(["--dataset_name", "digits"] if dataset else []), *words], **options)


def refusal(*argv, **options) -> str:
    with pytest.raises(InputError) as caught:
        parse(*argv, **options)
    return str(caught.value)


# Values


def test_a_recipe_fills_in_values(recipe):
    args = parse("--recipe", recipe("seed: 7\ncep_type: gaussian\noutput_dir: a b\n"))
    assert (args.seed, args.cep_type, args.output_dir) == (7, "gaussian", "a b")
    assert args.train_batch_size == 16  # the default stays where the recipe says nothing


@pytest.mark.parametrize("place", ["before", "after", "joined"])
def test_the_command_line_wins_over_the_recipe(recipe, place):
    path = recipe("seed: 7\ntrain_batch_size: 3\n")
    argv = {
        "before": ["--seed", 9, "--recipe", path],
        "after": ["--recipe", path, "--seed", 9],
        "joined": [f"--recipe={path}", "--seed=9"],
    }[place]
    args = parse(*argv)
    assert (args.seed, args.train_batch_size) == (9, 3)


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001"])
def test_floats_of_a_recipe_become_floats(recipe, written):
    learning_rate = parse("--recipe", recipe(f"learning_rate: {written}\n")).learning_rate
    assert type(learning_rate) is float and learning_rate == 1e-4


def test_an_integer_for_a_float_flag_becomes_a_float(recipe):
    gamma = parse("--recipe", recipe("cep_gamma: 1\n")).cep_gamma
    assert type(gamma) is float and gamma == 1.0


def test_booleans_of_a_recipe(recipe):
    args = parse("--recipe", recipe("use_ema: false\ncenter_crop: true\nscale_lr: no\nrandom_flip: yes\n"))
    assert (args.use_ema, args.center_crop, args.scale_lr, args.random_flip) == (False, True, False, True)


def test_a_true_of_the_recipe_is_switched_off_on_the_command_line(recipe):
    path = recipe("center_crop: true\n")
    assert parse("--recipe", path).center_crop is True
    assert parse("--recipe", path, "--center_crop", "false").center_crop is False


def test_lists_of_a_recipe_and_of_the_command_line(recipe):
    path = recipe("channels: [8, 16, 24]\nseed: 3\n")
    args = parse("--recipe", path)
    assert (args.channels, args.seed) == ([8, 16, 24], 3)
    assert parse("--recipe", path, "--channels", 4, 5).channels == [4, 5]
    assert parse().channels == [1, 2]


def test_list_defaults_are_not_shared():
    parse().channels.append(99)
    assert parse().channels == [1, 2]


def test_an_empty_value_leaves_the_default(recipe):
    assert parse("--recipe", recipe("max_train_steps:\nseed: 5\n")).max_train_steps is None


def test_the_choice_no_in_a_recipe(recipe):
    assert parse("--recipe", recipe("mixed_precision: no\n")).mixed_precision == "no"


@pytest.mark.parametrize("value", ["-0.00001", "-2.0e-07"])
def test_a_negative_number_in_a_recipe_reaches_the_range_check(recipe, value):
    message = refusal("--recipe", recipe(f"cep_gamma: {value}\n"))
    assert "--cep_gamma" in message and "must be 0 (off) or a positive number" in message


def test_the_help_text_can_be_printed(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--help")
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert "--corruption_ratio" in shown and "80 %" in " ".join(shown.split())


# Unknown words


def test_an_unknown_recipe_key_names_the_nearest(recipe):
    path = recipe("cep_gama: 1\n")
    message = refusal("--recipe", path)
    assert path in message and "unknown key 'cep_gama'" in message and "did you mean 'cep_gamma'" in message


def test_a_recipe_cannot_name_a_recipe(recipe):
    assert "unknown key 'recipe'" in refusal("--recipe", recipe("recipe: digits_kl\n"))


def test_a_key_that_is_no_word(recipe):
    assert "unknown key 12" in refusal("--recipe", recipe("12: 1\n"))


@pytest.mark.parametrize("word", ["--learning_rat", "--learning_rat=1", "--larning_rate"])
def test_an_unknown_flag_names_the_nearest(word):
    message = refusal(word, *([] if "=" in word else ["1"]))
    assert f"unknown flag {word.split('=')[0]}" in message and "did you mean '--learning_rate'" in message


@pytest.mark.parametrize("word", ["--learning", "--cep_g", "--see"])
def test_abbreviations_are_refused(word):
    assert f"unknown flag {word}" in refusal(word, "1")


def test_a_word_that_belongs_to_no_flag_is_refused():
    assert "unknown flag stray" in refusal("--seed", 1, "stray")


# Types and choices


@pytest.mark.parametrize(
    ("argv", "flag_name", "words"),
    [
        (["--seed", "x"], "--seed", "invalid int value: 'x'"),
        (["--seed", "1.5"], "--seed", "invalid int value: '1.5'"),
        (["--learning_rate", "fast"], "--learning_rate", "invalid float value: 'fast'"),
        (["--use_ema", "maybe"], "--use_ema", "maybe"),
        (["--channels", "8", "wide"], "--channels", "invalid int value: 'wide'"),
        (["--cep_type", "laplace"], "--cep_type", "'uniform', 'gaussian'"),
        (["--corruption_mode", "often"], "--corruption_mode", "'fixed', 'random'"),
        (["--lr_scheduler", "cos"], "--lr_scheduler", "'cosine'"),
        (["--image_interpolation_mode", "sinc"], "--image_interpolation_mode", "'bicubic'"),
        (["--seed"], "--seed", "expected one argument"),
        (["--recipe"], "--recipe", "expected one argument"),
    ],
)
def test_a_wrong_type_or_choice_names_the_flag(argv, flag_name, words):
    message = refusal(*argv)
    assert flag_name in message and words in message
    assert message.endswith(".") and "usage:" not in message


def test_a_wrong_type_in_a_recipe_names_the_flag(recipe):
    message = refusal("--recipe", recipe("max_train_steps: many\n"))
    assert "--max_train_steps" in message and "invalid int value: 'many'" in message


# Ranges

POSITIVE = [
    *("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "logging_steps", "max_nonfinite_steps"),
    *("max_train_steps", "checkpoints_total_limit", "cpu_threads_per_process", "resolution", "max_train_samples"),
]
NOT_NEGATIVE = ["checkpointing_steps", "validation_steps", "lr_warmup_steps", "seed", "max_bad_images"]
BETWEEN = "must lie between 0 and 1"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *((name, "0", "must be ") for name in POSITIVE),
        *((name, "-1", "positive") for name in POSITIVE),
        *((name, "-1", "must not be negative") for name in NOT_NEGATIVE),
        *(("corruption_ratio", value, BETWEEN) for value in ("-0.1", "1.1", "nan")),
        *(("conditioning_dropout_prob", value, BETWEEN) for value in ("-0.1", "1.5", "nan")),
        *(("label_smoothing", value, BETWEEN) for value in ("-0.1", "1.5", "nan")),
        *(("embedding_dropout", value, "must lie in [0, 1)") for value in ("-0.1", "1.0", "nan")),
        *(("ema_decay", value, "must lie in [0, 1)") for value in ("-0.1", "1.0", "nan")),
        *(("cep_gamma", value, "must be 0 (off) or a positive number") for value in ("-1", "nan", "inf")),
        *(("input_perturbation", value, "0 (off) or a positive number") for value in ("-0.1", "nan", "inf")),
        *(("snr_gamma", value, "a positive number") for value in ("0", "-5", "nan", "inf")),
        *(("learning_rate", value, "a positive number") for value in ("0", "-0.1", "nan", "inf")),
        *(("max_grad_norm", value, "must not be negative") for value in ("-0.5", "nan")),
        *(("num_train_timesteps", value, "at least 2 are needed") for value in ("1", "0")),
        *((name, value, BETWEEN) for name in ("beta_start", "beta_end") for value in ("0", "1", "nan")),
    ],
)
def test_a_value_out_of_range_is_refused(name, value, words):
    message = refusal(f"--{name}={value}")
    shown = message.removeprefix(f"--{name} is ").split(",")[0]
    assert shown in (value, str(float(value))) and words in message, message


@pytest.mark.parametrize(
    "argv",
    [
        *(["--corruption_ratio", value] for value in ("0", "1")),
        *(["--conditioning_dropout_prob", value] for value in ("0", "1")),
        ["--embedding_dropout", "0.99"],
        ["--cep_gamma", "0"],
        ["--max_grad_norm", "0"],
        ["--checkpointing_steps", "0"],
        ["--max_bad_images", "0"],
        ["--num_train_timesteps", "2"],
    ],
)
def test_the_edges_of_a_range_are_allowed(argv):
    assert getattr(parse(*argv), argv[0][2:]) == float(argv[1])


@pytest.mark.parametrize(
    ("argv", "flags", "words"),
    [
        (["--corruption_type", "asymmetric"], ["--corruption_type", "--class_groups"], "needs"),
        (["--class_groups", "g.json"], ["--class_groups", "--corruption_type"], "no effect"),
        (
            ["--save_corruption_map", "--corruption_mode", "random"],
            ["--save_corruption_map", "--corruption_mode"],
            "needs --corruption_mode fixed",
        ),
        (["--lr_scheduler", "piecewise_constant"], ["--lr_scheduler", "--lr_step_rules"], "go together"),
        (["--lr_step_rules", "1:10,0.1"], ["--lr_scheduler", "--lr_step_rules"], "go together"),
        (
            ["--resume_from_checkpoint", "latest", "--overwrite_output_dir"],
            ["--resume_from_checkpoint", "--overwrite_output_dir"],
            "contradict",
        ),
    ],
)
def test_flags_that_contradict_each_other(argv, flags, words):
    message = refusal(*argv)
    assert words in message and all(name in message for name in flags)


def test_flags_that_go_together_are_allowed():
    assert parse("--corruption_type", "asymmetric", "--class_groups", "g.json").class_groups == "g.json"
    assert parse("--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:10,0.1").lr_step_rules == "1:10,0.1"
    assert parse("--save_corruption_map").save_corruption_map is True


# The dataset


def test_one_way_of_naming_the_dataset(tmp_path):
    both = refusal("--train_data_dir", tmp_path)
    neither = refusal(dataset=False)
    for message in (both, neither):
        assert "exactly one of --dataset_name and --train_data_dir" in message
    assert "--dataset_name and --train_data_dir were given" in both and "none was given" in neither


def test_a_folder_that_is_not_there(tmp_path):
    message = refusal("--train_data_dir", tmp_path / "nowhere", dataset=False)
    assert f"--train_data_dir {tmp_path / 'nowhere'}" in message and "no such folder" in message


@pytest.mark.parametrize("argv", [[], ["--dataset_name", "digits"], ["--dataset_name=digits"], ["--seed", "4"]])
def test_the_default_recipe_is_applied_to_the_default_dataset(recipe, argv):
    path = recipe("dataset_name: digits\ntrain_batch_size: 5\n")
    args = parse(*argv, dataset=False, default_recipe=path)
    assert (args.dataset_name, args.train_batch_size, args.recipe) == ("digits", 5, path)


@pytest.mark.parametrize("argv", [["--dataset_name", "other"], ["--dataset_name=other"], ["--train_data_dir"]])
def test_the_default_recipe_is_not_applied_to_another_dataset(recipe, tmp_path, argv):
    path = recipe("dataset_name: digits\ntrain_batch_size: 5\n")
    argv = [*argv, tmp_path] if argv == ["--train_data_dir"] else argv
    args = parse(*argv, dataset=False, default_recipe=path)
    assert (args.train_batch_size, args.recipe) == (16, None)
    assert args.dataset_name == ("other" if "--train_data_dir" not in argv else None)


def test_a_named_recipe_takes_the_place_of_the_default_one(recipe):
    default = recipe("dataset_name: digits\ntrain_batch_size: 5\nseed: 9\n", "default.yaml")
    named = recipe("dataset_name: digits\ntrain_batch_size: 6\n", "named.yaml")
    args = parse("--recipe", named, dataset=False, default_recipe=default)
    assert (args.train_batch_size, args.seed) == (6, 0)


def test_a_folder_on_the_command_line_beats_the_dataset_of_a_recipe(recipe, tmp_path):
    path = recipe("dataset_name: digits\nseed: 3\n")
    args = parse("--recipe", path, "--train_data_dir", tmp_path, dataset=False)
    assert (args.dataset_name, args.train_data_dir, args.seed) == (None, str(tmp_path), 3)


def test_a_dataset_on_the_command_line_beats_the_folder_of_a_recipe(recipe, tmp_path):
    args = parse("--recipe", recipe(f"train_data_dir: {tmp_path}\n"), "--dataset_name", "digits", dataset=False)
    assert (args.dataset_name, args.train_data_dir) == ("digits", None)


def test_two_ways_on_the_command_line_stay_an_error_with_a_recipe(recipe, tmp_path):
    message = refusal("--recipe", recipe("dataset_name: digits\n"), "--train_data_dir", tmp_path)
    assert "exactly one of --dataset_name and --train_data_dir" in message and "were given" in message


# Recipe files


@pytest.mark.parametrize("text", ["seed: [1", "a: b: c", "\tseed: 1"])
def test_invalid_yaml(recipe, text):
    path = recipe(text)
    message = refusal("--recipe", path)
    assert f"--recipe {path}" in message and "not valid YAML" in message and "\n" not in message


@pytest.mark.parametrize("text", ["- seed\n- 1\n", "seed\n"])
def test_yaml_that_is_no_mapping(recipe, text):
    path = recipe(text)
    message = refusal("--recipe", path)
    assert f"--recipe {path}" in message and "`key: value`" in message


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00seed")
    message = refusal("--recipe", tmp_path / "r.yaml")
    assert f"--recipe {tmp_path / 'r.yaml'}" in message and "not valid YAML" in message


def test_an_empty_recipe_changes_nothing(recipe):
    path = recipe("# nothing\n")
    args = parse("--recipe", path)
    args.recipe = None
    assert args == parse()


def test_a_missing_recipe_names_those_there_are_and_the_nearest():
    message = refusal("--recipe", "digits_dit_mni")
    assert "--recipe digits_dit_mni" in message and "digits_kl" in message
    assert "did you mean 'digits_dit_mini'" in message


def test_a_recipe_is_found_by_name_and_by_path(recipe):
    assert find_recipe("digits_kl").name == "digits_kl.yaml"
    path = recipe("seed: 1\n")
    assert str(find_recipe(path)) == path
