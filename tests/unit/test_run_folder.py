"""The output folder: whose it is, what may change when a run is taken up, and a log without double lines."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from noisycond import checkpoints, trainer
from noisycond.arguments import CorruptionArguments, LoopArguments, PerturbationArguments
from noisycond.data.batches import Batches
from noisycond.data.stream_batches import StreamedImages
from noisycond.errors import InputError
from noisycond.run_folder import RunFolder, claim


# What a run and its export write.
OURS = ["run.json", "log.jsonl", "loss.png", "samples", "corruption.json", "corruption_map.csv", "README.md"] + [
    *("model_index.json", "config.json", "diffusion_pytorch_model.safetensors", "transformer", "vae", "scheduler"),
    ".export.tmp",
]
FACTS = {"dataset": "abc", "examples": 10, "global_batch_size": 32, "class_names": ["a", "b"]}


@dataclass
class SomeArguments(CorruptionArguments, PerturbationArguments, LoopArguments):
    pass


@pytest.fixture
def run(tmp_path):
    return RunFolder(str(tmp_path / "run"))


def begin(run: RunFolder, facts: dict = FACTS, script: str = "train.py", **options) -> None:
    run.open(SomeArguments(output_dir=str(run.path), **options), facts, script)


def take_up(run: RunFolder, facts: dict = FACTS, script: str = "train.py", **options) -> None:
    begin(run, facts, script, resume_from_checkpoint="latest", **options)


def refusal(run: RunFolder, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        take_up(run, *arguments, **options)
    return str(caught.value)


# What may be told


@dataclass
class ShardArguments(SomeArguments):
    train_shards: str | None = None


def test_what_is_written_down_holds_no_secret(run, accelerator):
    args = ShardArguments(output_dir=str(run.path), train_shards="pipe:curl 'https://h/{0..1}.tar?sig=SECRET'")
    run.open(args, FACTS, "train.py")
    assert json.loads(run.settings_file.read_text())["arguments"]["train_shards"] == "pipe: {0..1}.tar"

    told = []
    accelerator.init_trackers = lambda project, config: told.append(config)
    images = StreamedImages(SimpleNamespace(shards=[], class_names=[]), None)
    args.report_to, args.max_train_steps = "tensorboard", 1
    trainer.announce(args, accelerator, images, torch.nn.Linear(1, 1), Batches([], 1))
    assert told[0]["train_shards"] == "pipe: {0..1}.tar" and "SECRET" not in str(told)


# Whose folder it is


def test_a_folder_holds_a_run_once_it_was_opened(run):
    assert not run.holds_a_run()
    run.path.mkdir()
    (run.path / "notes.txt").write_text("mine")
    assert not run.holds_a_run()
    begin(run)
    assert run.holds_a_run()


def test_a_checkpoint_alone_is_a_run(run):
    (run.path / "checkpoint-3").mkdir(parents=True)
    assert run.holds_a_run()


def test_settings_are_written_with_versions(run):
    begin(run, cep_gamma=0.5)
    settings = json.loads(run.settings_file.read_text())
    assert settings["arguments"]["cep_gamma"] == 0.5 and settings["facts"] == FACTS
    assert settings["script"] == "train.py"
    assert {"torch", "diffusers", "python"} <= set(settings["versions"]) and settings["versions"]["torch"]
    assert sorted(path.name for path in run.path.iterdir()) == ["run.json"]


def test_an_empty_or_foreign_folder_can_be_used(run):
    run.check(SomeArguments())
    run.path.mkdir()
    (run.path / "notes.txt").write_text("mine")
    run.check(SomeArguments())
    begin(run)
    assert (run.path / "notes.txt").read_text() == "mine"


def test_an_output_folder_that_is_a_file(run):
    run.path.write_text("a file")
    for options in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(InputError) as caught:
            run.check(SomeArguments(**options))
        assert f"--output_dir {run.path}" in str(caught.value) and "is a file" in str(caught.value)


def test_another_run_is_not_written_over(run):
    begin(run)
    with pytest.raises(InputError) as caught:
        run.check(SomeArguments())
    message = str(caught.value)
    assert f"--output_dir {run.path}" in message and "holds another run" in message
    assert "--resume_from_checkpoint latest" in message and "--overwrite_output_dir" in message
    run.check(SomeArguments(resume_from_checkpoint="latest"))
    run.check(SomeArguments(overwrite_output_dir=True))


# Replacing a run


def fill(run: RunFolder) -> None:
    begin(run)
    for name in OURS:
        if "." in name and not name.endswith(".tmp"):
            (run.path / name).write_text("ours")
        else:
            (run.path / name).mkdir()
            (run.path / name / "file").write_text("ours")
    for name in ("checkpoint-10", "logs"):
        (run.path / name).mkdir()
        (run.path / name / "file").write_text("ours")


def test_overwriting_removes_what_a_run_owns_and_nothing_else(run):
    fill(run)
    run.settings_file.write_text("{}")
    for name in ("notes.txt", "photos/me.png", "checkpoints.md"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("mine")
    begin(run, overwrite_output_dir=True, seed=8)
    left = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())
    assert left == ["checkpoints.md", "notes.txt", "photos/me.png", "run.json"]
    assert json.loads(run.settings_file.read_text())["arguments"]["seed"] == 8


def test_overwriting_removes_a_link_and_not_what_it_leads_to(run, tmp_path):
    begin(run)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "weights").write_text("mine")
    (run.path / "samples").symlink_to(tmp_path / "shared")
    (run.path / "checkpoint-5").symlink_to(tmp_path / "shared")
    begin(run, overwrite_output_dir=True)
    assert (tmp_path / "shared" / "weights").read_text() == "mine"
    assert not (run.path / "samples").is_symlink() and not (run.path / "checkpoint-5").is_symlink()


def test_overwriting_an_empty_place_is_fine(run):
    begin(run, overwrite_output_dir=True)
    assert run.holds_a_run()


@pytest.mark.parametrize("logging_dir", [".", "..", "sub/../..", "absolute"])
def test_overwriting_never_leaves_the_output_folder(tmp_path, logging_dir):
    run = RunFolder(str(tmp_path / "home" / "run"))
    begin(run)
    for path in (tmp_path / "home" / "letter.txt", run.path / "notes.txt"):
        path.write_text("mine")
    (run.path / "sub").mkdir()
    logging_dir = str(tmp_path / "home") if logging_dir == "absolute" else logging_dir
    try:
        begin(run, overwrite_output_dir=True, logging_dir=logging_dir)
    except InputError as error:
        assert "--logging_dir" in str(error)
    assert (tmp_path / "home" / "letter.txt").exists() and (run.path / "notes.txt").exists()


def test_overwriting_leaves_a_strangers_file_with_a_similar_name(run):
    begin(run)
    (run.path / "checkpoint-notes.md").write_text("mine")
    begin(run, overwrite_output_dir=True)
    assert (run.path / "checkpoint-notes.md").exists()


def test_overwriting_removes_the_figures_of_an_autoencoder(run):
    begin(run)
    (run.path / "reconstruction.json").write_text("{}")
    begin(run, overwrite_output_dir=True)
    assert not (run.path / "reconstruction.json").exists()


# Taking a run up


def test_the_same_settings_pass(run):
    begin(run, cep_gamma=0.5, max_train_steps=10)
    take_up(run, cep_gamma=0.5, max_train_steps=10)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("cep_gamma", 0.0, 1.0),
        ("learning_rate", 1e-4, 2e-4),
        ("seed", 0, 1),
        ("corruption_ratio", 0.0, 0.1),
        ("lr_scheduler", "constant", "linear"),
        ("use_ema", True, False),
        ("ema_decay", 0.9999, 0.99),
    ],
)
def test_a_setting_that_differs_is_named(run, name, old, new):
    begin(run, **{name: old})
    before = run.settings_file.read_text()
    message = refusal(run, **{name: new})
    assert "--resume_from_checkpoint" in message and f"--{name} was {old!r} and is {new!r}" in message
    assert "; " not in message  # and nothing else is
    assert run.settings_file.read_text() == before


def test_all_that_differs_is_named_at_once(run):
    begin(run)
    message = refusal(run, FACTS | {"examples": 9, "class_names": ["x" * 200]}, "other.py", seed=3, cep_gamma=2.0)
    for words in ("--seed was 0 and is 3", "--cep_gamma was 0.0 and is 2.0", "examples was 10 and is 9"):
        assert words in message
    assert "the script was train.py and is other.py" in message
    assert "class names was ['a', 'b'] and is" in message and "x" * 100 not in message


@pytest.mark.parametrize("name", list(FACTS))
def test_a_fact_that_differs_is_named(run, name):
    begin(run)
    message = refusal(run, FACTS | {name: "other"})
    assert f"{name.replace('_', ' ')} was {FACTS[name]!r} and is 'other'" in message


@pytest.mark.parametrize(
    "harmless",
    [
        {"checkpointing_steps": 7, "checkpoints_total_limit": 2},
        {"logging_steps": 9, "report_to": "none", "logging_dir": "other"},
        {"validation_steps": 3},
        {"train_batch_size": 8, "gradient_accumulation_steps": 2},  # the global batch size is a fact
        {"num_train_epochs": 3},
        {"torch_compile": True, "cpu_threads_per_process": 1},
        {"max_nonfinite_steps": 2, "save_corruption_map": True, "recipe": "some"},
    ],
    ids=lambda harmless: next(iter(harmless)),
)
def test_a_harmless_setting_may_differ(run, harmless):
    begin(run)
    take_up(run, **harmless)
    settings = json.loads(run.settings_file.read_text())["arguments"]
    assert all(settings[name] == value for name, value in harmless.items())


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "polynomial", "cosine_with_restarts"])
def test_the_number_of_steps_is_a_fact_where_the_learning_rate_depends_on_it(run, schedule):
    batches = Batches(range(100), batch_size=10)

    def facts(**options):
        return FACTS | trainer.facts(SomeArguments(lr_scheduler=schedule, **options), batches)

    begin(run, facts(max_train_steps=10), lr_scheduler=schedule, max_train_steps=10)
    same = facts(num_train_epochs=1)  # the same ten steps
    take_up(run, same, lr_scheduler=schedule, num_train_epochs=1)
    if schedule == "constant":
        take_up(run, facts(max_train_steps=20), lr_scheduler=schedule, max_train_steps=20)
    else:
        with pytest.raises(InputError, match="optimizer steps was 10 and is 20"):
            take_up(run, facts(max_train_steps=20), lr_scheduler=schedule, max_train_steps=20)


def test_settings_are_compared_with_the_run_of_the_checkpoint(run, tmp_path):
    other = RunFolder(str(tmp_path / "other"))
    begin(run, cep_gamma=0.5)
    with pytest.raises(InputError, match="--cep_gamma was 0.5 and is 0.0"):
        other.open(SomeArguments(), FACTS, "train.py", resume_from=run.path / "checkpoint-3")
    other.open(SomeArguments(cep_gamma=0.5), FACTS, "train.py", resume_from=run.path / "checkpoint-3")
    assert other.holds_a_run()


def test_claim_finds_the_checkpoint_before_the_folder_is_touched(run, accelerator):
    begin(run)
    args = SomeArguments(output_dir=str(run.path), resume_from_checkpoint="latest", logging_steps=5)
    assert claim(run, args, FACTS, "train.py", accelerator) is None
    saved = checkpoints.save(run.path, 4, accelerator, lambda folder: (folder / "x").write_text("x"))
    assert claim(run, args, FACTS, "train.py", accelerator) == saved
    before = run.settings_file.read_text()
    (saved / "x").write_text("y")
    with pytest.raises(InputError, match="--resume_from_checkpoint latest: every checkpoint"):
        claim(run, SomeArguments(resume_from_checkpoint="latest", logging_steps=9), FACTS, "train.py", accelerator)
    assert run.settings_file.read_text() == before


def test_claim_without_resuming_starts_at_zero(run, accelerator):
    assert claim(run, SomeArguments(), FACTS, "train.py", accelerator) is None
    assert run.holds_a_run()


def test_damaged_settings_are_an_error_with_a_sentence(run):
    begin(run)
    run.settings_file.write_text('{"arguments": {')
    assert "run.json" in refusal(run)


# The log


def test_the_log_is_read_as_it_was_written(run):
    begin(run)
    assert run.read_log() == []
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    for row in rows:
        run.log(row)
    assert run.read_log() == rows


def test_later_rows_are_cut(run):
    begin(run)
    for step in range(1, 8):
        run.log({"step": step, "loss": 0.1})
    run.cut_log(4)
    assert [row["step"] for row in run.read_log()] == [1, 2, 3, 4]
    run.log({"step": 5, "loss": 0.2})
    assert [row["step"] for row in run.read_log()] == [1, 2, 3, 4, 5]
    run.cut_log(0)
    assert run.read_log() == []


@pytest.mark.parametrize("cut", ['{"step": 3, "lo', '{"st', "{", '{"loss": 0.1}'])
def test_a_line_that_a_kill_cut_in_two_is_dropped(run, cut):
    begin(run)
    for step in (1, 2):
        run.log({"step": step, "loss": 0.1})
    with run.log_file.open("a") as file:
        file.write(cut)
    run.cut_log(5)
    run.log({"step": 3, "loss": 0.3})
    assert [row["step"] for row in run.read_log()] == [1, 2, 3]


def test_there_may_be_no_log_to_cut(run):
    begin(run)
    run.cut_log(3)
    assert not run.log_file.exists()


def test_what_was_looked_at_is_known_as_far_as_the_log_goes(run):
    begin(run)
    assert run.cut_log(0) is False
    run.note_looks(6)
    assert run.cut_log(6) and not run.cut_log(7)
    assert run.cut_log(4)  # further back, where it was looked before
    assert not run.cut_log(6)  # and the steps after that come again
    run.looks_file.write_text('{"st')
    assert not run.cut_log(4)


def test_an_evaluation_takes_the_place_of_an_equal_one_alone(run):
    begin(run)
    rows = [
        {"step": 3, "fid": 1.0, "settings": {"num_images": 20}},
        {"step": 6, "fid": 2.0, "settings": {"num_images": 20}},
        {"step": 6, "fid": 3.0, "settings": {"num_images": 30}},
        {"step": 6, "fid": 4.0, "recall": 1.0, "settings": {"num_images": 20}},
    ]
    for row in rows:
        run.log_evaluation(row)
    assert run.read_evaluations() == rows
    run.log_evaluation(rows[1] | {"fid": 5.0})
    assert run.read_evaluations() == [rows[0], *rows[2:], rows[1] | {"fid": 5.0}]
