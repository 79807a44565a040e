"""What is done every so many steps while a model trains, where the run ends between a checkpoint and that."""

import pytest
import torch
from accelerate import Accelerator
from launching import forget_accelerate

from noisycond import trainer
from noisycond.arguments import LoopArguments
from noisycond.data.batches import Batches
from noisycond.data.images import BadImages
from noisycond.run_folder import RunFolder, claim


class Points:
    def __len__(self):
        return 8

    def __getitem__(self, item):
        index, epoch, position = item
        return {"index": index, "position": position, "x": torch.tensor([index / 8])}


class Killed(Exception):
    pass


def train(folder, looks, **more) -> None:
    args = LoopArguments(output_dir=str(folder), train_batch_size=2, max_train_steps=6, report_to="none", **more)
    args.checkpointing_steps = 2
    forget_accelerate()
    accelerator = Accelerator(cpu=True)
    run, batches = RunFolder(str(folder)), Batches(Points(), 2)
    resume_from = claim(run, args, trainer.facts(args, batches), "toy.py", accelerator)
    torch.manual_seed(0)
    trainer.fit(
        torch.nn.Linear(1, 1),
        batches,
        lambda model, batch, keys: model(batch["x"])[:, 0].square(),
        args,
        accelerator=accelerator,
        run=run,
        bad_images=BadImages(0),
        resume_from=resume_from,
        looks=looks,
    )


@pytest.mark.parametrize("killed_at", [2, 4, 6])
def test_a_run_that_was_killed_after_its_checkpoint_looks_when_it_goes_on(tmp_path, killed_at):
    drawn, rows = [], lambda: RunFolder(str(tmp_path)).read_evaluations()

    def kill(step):
        if step == killed_at and drawn.count(step) == 1:
            raise Killed

    looks = [(lambda step: {"fid": step}, 2), (drawn.append, 2), (kill, 2), (drawn.append, 5)]
    with pytest.raises(Killed):
        train(tmp_path, looks)
    train(tmp_path, looks, resume_from_checkpoint="latest")
    assert rows() == [{"step": step, "fid": step} for step in (2, 4, 6)]
    assert drawn == sorted([2, 4, 5, 6, killed_at])
    train(tmp_path, looks, resume_from_checkpoint="latest")  # all is done
    assert len(drawn) == 5 and len(rows()) == 3


def test_a_run_that_was_asked_to_stop_looks_when_it_goes_on(tmp_path, monkeypatch):
    looked = []
    step_of = trainer.TrainingState.train_step

    def stop_at_4(state, *rest):
        row = step_of(state, *rest)
        state.stopped_by = "SIGTERM" if state.progress.step == 4 else None
        return row

    with monkeypatch.context() as context:
        context.setattr(trainer.TrainingState, "train_step", stop_at_4)
        train(tmp_path, [(looked.append, 2)])
    assert looked == [2]
    train(tmp_path, [(looked.append, 2)], resume_from_checkpoint="latest")
    assert looked == [2, 4, 6]


def test_what_is_begun_anew_looks_at_no_step_0(tmp_path):
    looked = []
    train(tmp_path, [(looked.append, 2)], resume_from_checkpoint="latest")
    assert looked == [2, 4, 6]
