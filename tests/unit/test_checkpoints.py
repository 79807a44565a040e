"""Checkpoints are whole or not there: damage is named and passed over, and a full disk costs nothing saved earlier."""

import errno
import json
import logging

import pytest
import torch
from forking import Program

from noisycond import checkpoints
from noisycond.errors import InputError


def write(folder):
    torch.save({"weights": torch.arange(1000)}, folder / "model.pt")
    (folder / "parts").mkdir()
    (folder / "parts" / "state.json").write_text('{"step": 1}')


def save_all(output_dir, accelerator, *steps: int, limit: int | None = None):
    return [checkpoints.save(output_dir, step, accelerator, write, limit) for step in steps]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate(checkpoint):
    path = checkpoint / "model.pt"
    path.write_bytes(path.read_bytes()[:-10])


def flip(checkpoint):
    path = checkpoint / "model.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_a_part(checkpoint):
    (checkpoint / "parts" / "state.json").unlink()


def lose_the_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()


def cut_the_manifest(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text()[:-20])


DAMAGE = [
    (truncate, "bytes instead of"),
    (flip, "content of model.pt has changed"),
    (lose_a_part, "parts/state.json is missing"),
    (lose_the_manifest, "manifest.json is missing"),
    (cut_the_manifest, "manifest.json cannot be read"),
]


# Saving and finding


def test_a_saved_checkpoint_is_whole_and_found(tmp_path, accelerator):
    saved = checkpoints.save(tmp_path, 7, accelerator, write)
    assert saved == tmp_path / "checkpoint-7" and names(tmp_path) == ["checkpoint-7"]
    assert checkpoints.problem_with(saved) is None
    assert torch.load(saved / "model.pt")["weights"].tolist() == list(range(1000))
    listed = json.loads((saved / "manifest.json").read_text())["files"]
    assert set(listed) == {"model.pt", "parts/state.json"}
    for wanted in ("latest", str(saved), "checkpoint-7"):
        assert checkpoints.find(tmp_path, wanted, accelerator) == saved


def test_the_output_folder_is_made(tmp_path, accelerator):
    assert checkpoints.save(tmp_path / "a" / "b", 1, accelerator, write).is_dir()


def test_latest_is_the_highest_step(tmp_path, accelerator):
    save_all(tmp_path, accelerator, 9, 100, 20)
    assert checkpoints.find(tmp_path, "latest", accelerator).name == "checkpoint-100"
    assert [checkpoints.step_of(path) for path in checkpoints.all_in(tmp_path)] == [9, 20, 100]


def test_latest_without_any(tmp_path, accelerator):
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "my-checkpoint-3").mkdir()
    assert checkpoints.find(tmp_path, "latest", accelerator) is None
    assert checkpoints.find(tmp_path / "nowhere", "latest", accelerator) is None
    assert checkpoints.step_of(tmp_path / "checkpoint-final") == -1


def test_the_limit_keeps_the_newest(tmp_path, accelerator):
    save_all(tmp_path, accelerator, 8, 9, 10, 11, limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    assert all(checkpoints.problem_with(path) is None for path in checkpoints.all_in(tmp_path))


def test_no_limit_keeps_all(tmp_path, accelerator):
    save_all(tmp_path, accelerator, 1, 2, 3)
    assert len(checkpoints.all_in(tmp_path)) == 3


def test_a_damaged_checkpoint_can_be_saved_again(tmp_path, accelerator):
    save_all(tmp_path, accelerator, 1, 2)
    truncate(tmp_path / "checkpoint-2")
    assert checkpoints.find(tmp_path, "latest", accelerator).name == "checkpoint-1"
    again = checkpoints.save(tmp_path, 2, accelerator, write)  # the run taken up at 1 comes to step 2 again
    assert checkpoints.problem_with(again) is None and names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_rotation_keeps_what_was_just_saved(tmp_path, accelerator):
    save_all(tmp_path, accelerator, 10, 20, 30)
    saved = checkpoints.save(tmp_path, 15, accelerator, write, limit=2)  # taken up at checkpoint-10
    assert saved.is_dir()


def test_stale_temporary_folders_are_cleaned(tmp_path, accelerator):
    for name in (".checkpoint-3.tmp", ".checkpoint-4.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"x" * 100)
    (tmp_path / ".other.tmp").mkdir()
    saved = checkpoints.save(tmp_path, 4, accelerator, write)
    assert names(tmp_path) == [".other.tmp", "checkpoint-4"]
    assert not (saved / "half").exists()


# Damage


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_latest_names_a_damaged_checkpoint_and_passes_over_it(tmp_path, accelerator, caplog, damage, words):
    save_all(tmp_path, accelerator, 1, 2)
    damage(tmp_path / "checkpoint-2")
    with caplog.at_level(logging.WARNING, logger="noisycond"):
        assert checkpoints.find(tmp_path, "latest", accelerator) == tmp_path / "checkpoint-1"
    (record,) = caplog.records
    assert str(tmp_path / "checkpoint-2") in record.getMessage() and words in record.getMessage()


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
@pytest.mark.parametrize("by_path", [True, False])
def test_a_damaged_checkpoint_named_explicitly_is_an_error(tmp_path, accelerator, damage, words, by_path):
    save_all(tmp_path, accelerator, 1, 2)
    damage(tmp_path / "checkpoint-2")
    wanted = str(tmp_path / "checkpoint-2") if by_path else "checkpoint-2"
    with pytest.raises(InputError) as caught:
        checkpoints.find(tmp_path, wanted, accelerator)
    message = str(caught.value)
    assert f"--resume_from_checkpoint {wanted}" in message and "damaged" in message and words in message


def test_only_damaged_ones(tmp_path, accelerator):
    for path in save_all(tmp_path, accelerator, 1, 2):
        flip(path)
    with pytest.raises(InputError) as caught:
        checkpoints.find(tmp_path, "latest", accelerator)
    message = str(caught.value)
    assert "--resume_from_checkpoint latest" in message and "every checkpoint" in message and str(tmp_path) in message


def test_an_unknown_checkpoint_lists_what_there_is(tmp_path, accelerator):
    with pytest.raises(InputError) as caught:
        checkpoints.find(tmp_path, "checkpoint-5", accelerator)
    assert "--resume_from_checkpoint checkpoint-5" in str(caught.value) and "has: none" in str(caught.value)
    save_all(tmp_path, accelerator, 1, 2)
    with pytest.raises(InputError) as caught:
        checkpoints.find(tmp_path, "checkpoint-5", accelerator)
    assert "no such checkpoint" in str(caught.value) and "has: checkpoint-1, checkpoint-2" in str(caught.value)


# Failing writes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_what_was_saved(tmp_path, accelerator, number):
    def fill(folder):
        write(folder)
        raise OSError(number, "as the system says it")

    save_all(tmp_path, accelerator, 1, 2)
    flip(tmp_path / "checkpoint-2")
    with pytest.raises(InputError) as caught:
        checkpoints.save(tmp_path, 3, accelerator, fill, limit=1)
    message = str(caught.value)
    assert f"--output_dir {tmp_path}" in message and "no space left" in message and "checkpoint-3" in message
    assert "checkpoint-1 is whole" in message and "--resume_from_checkpoint latest" in message
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert checkpoints.problem_with(tmp_path / "checkpoint-1") is None


def test_a_full_disk_at_the_first_checkpoint(tmp_path, accelerator):
    def fill(folder):
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(InputError) as caught:
        checkpoints.save(tmp_path, 3, accelerator, fill)
    assert "no space left" in str(caught.value) and "None is saved" in str(caught.value)
    assert names(tmp_path) == []


def test_another_failure_names_its_cause(tmp_path, accelerator):
    def fail(folder):
        raise RuntimeError("the state\ncannot be pickled")

    save_all(tmp_path, accelerator, 1)
    with pytest.raises(InputError) as caught:
        checkpoints.save(tmp_path, 2, accelerator, fail)
    message = str(caught.value)
    assert "RuntimeError (the state cannot be pickled)" in message and "no space left" not in message
    assert "checkpoint-1 is whole" in message and names(tmp_path) == ["checkpoint-1"]


def test_a_folder_that_is_a_file(tmp_path, accelerator):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError) as caught:
        checkpoints.save(tmp_path / "run", 2, accelerator, write)
    assert f"--output_dir {tmp_path / 'run'}" in str(caught.value) and "checkpoint-2" in str(caught.value)


REALLY_FULL = """
import json, resource, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from noisycond import checkpoints
from noisycond.errors import InputError

output_dir, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
weights = {"weight": torch.zeros(100_000)}
checkpoints.save(output_dir, 1, accelerator, lambda folder: torch.save({"step": 1}, folder / "model.pt"))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
messages = {}
for step, write in enumerate(
    [
        lambda folder: torch.save(weights, folder / "model.pt"),
        lambda folder: save_file(weights, folder / "model.safetensors"),
        lambda folder: (folder / "model.json").write_text("x" * 400_000),
    ],
    start=2,
):
    try:
        checkpoints.save(output_dir, step, accelerator, write)
    except InputError as error:
        messages[step] = str(error)
print(json.dumps({"messages": messages, "left": sorted(path.name for path in output_dir.iterdir())}))
"""


def test_files_that_really_cannot_be_written(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "full.py").write_text(REALLY_FULL)
    with Program(tmp_path / "full.py", tmp_path / "run") as program:
        done = program.finish()
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["left"] == ["checkpoint-1"]
    for step in ("2", "3", "4"):
        message = report["messages"][step]
        assert f"no space left while writing checkpoint-{step}" in message, message
        assert "checkpoint-1 is whole, continue with --resume_from_checkpoint latest" in message
