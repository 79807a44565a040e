"""What a checkpoint holds of a model of which a part is trained, and learning rates by part."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from noisycond.arguments import LoopArguments
from noisycond.data.batches import Batches
from noisycond.training_state import TrainingState, make_optimizer, parameter_groups


class Points:
    def __len__(self):
        return 8

    def __getitem__(self, item):
        index, epoch, position = item
        return {"index": index, "position": position, "x": torch.tensor([float(index)])}


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    parts = nn.ModuleDict({"encoder": nn.Linear(1, 2), "head": nn.Linear(2, 1), "frozen": nn.Linear(1, 1)})
    parts["frozen"].requires_grad_(False)
    return parts


def state(folder, parts, accelerator, **rates) -> TrainingState:
    args = LoopArguments(output_dir=str(folder), max_train_steps=4, learning_rate=0.1, lr_warmup_steps=2)
    args.lr_scheduler = "constant_with_warmup"
    return TrainingState(parts, args, 4, accelerator, {}, Batches(Points(), 2), {f"{k}.": v for k, v in rates.items()})


def test_frozen_parameters_are_in_no_checkpoint_and_stay_as_they_are(tmp_path):
    accelerator = Accelerator(cpu=True)
    first = state(tmp_path, model(), accelerator)
    first.save()
    held = load_file(tmp_path / "checkpoint-0/model.safetensors")
    assert set(held) == {"encoder.weight", "encoder.bias", "head.weight", "head.bias"}
    first.close()
    other = model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7.0)
    second = state(tmp_path, other, accelerator)
    second.load(tmp_path / "checkpoint-0")
    assert torch.equal(other["head"].weight, model()["head"].weight)
    assert (other["frozen"].weight == 7.0).all()


def test_what_a_checkpoint_lacks_is_an_error(tmp_path):
    accelerator = Accelerator(cpu=True)
    first = state(tmp_path, model(), accelerator)
    first.save()
    first.close()
    other = model()
    other["more"] = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="more.weight"):
        state(tmp_path, other, accelerator).load(tmp_path / "checkpoint-0")


def test_a_part_has_its_own_learning_rate_under_the_same_schedule(tmp_path):
    trained = state(tmp_path, model(), Accelerator(cpu=True), encoder=0.01)
    assert [len(group["params"]) for group in trained.optimizer.param_groups] == [2, 2]
    assert [group["initial_lr"] for group in trained.optimizer.param_groups] == [0.1, 0.01]
    trained.optimizer.step()
    trained.lr_schedule.step()  # half of the warm-up
    assert trained.lr_schedule.get_last_lr() == [0.05, 0.005]


def test_scale_lr_multiplies_every_learning_rate():
    args = LoopArguments(scale_lr=True, train_batch_size=4, gradient_accumulation_steps=2, learning_rate=0.1)
    groups = parameter_groups(model(), 0.1, {"encoder.": 0.01})
    rates = [group["lr"] for group in make_optimizer(groups, args, 3).param_groups]
    assert rates == pytest.approx([2.4, 0.24])
