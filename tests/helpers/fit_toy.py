"""Trains a linear map with `fit` on one or several processes, where one example's loss is not finite; prints what came
out as JSON.

    fit_toy.py OUTPUT_DIR BATCH_SIZE BAD_STEPS [LAST]

BAD_STEPS are attempted steps, comma-separated, whose first example is bad; LAST is how many batches the last process
has data for.
"""

import itertools
import json
import sys

import torch

from noisycond import hardware, trainer
from noisycond.arguments import LoopArguments
from noisycond.data.batches import Batches
from noisycond.data.images import BadImages
from noisycond.errors import InputError, one_sentence_errors
from noisycond.run_folder import RunFolder, claim


class Points:
    """A hundred numbers."""

    def __len__(self):
        return 100

    def __getitem__(self, item):
        index, epoch, position = item
        return {"index": index, "position": position, "x": torch.tensor([index / 100])}


class Ending(Batches):
    """Batches that end with an error in the last process."""

    last = None

    def starting_at(self, step):
        mine = self.process_index == self.num_processes - 1 and self.last is not None
        yield from itertools.islice(super().starting_at(step), self.last if mine else None)
        raise InputError("there is no more data here.")


@one_sentence_errors
def main(argv=None):
    output_dir, batch_size, bad_steps, *last = argv or sys.argv[1:]
    bad_steps = {int(step) for step in bad_steps.split(",") if step}
    args = LoopArguments(output_dir=output_dir, train_batch_size=int(batch_size), max_train_steps=8, report_to="none")
    args.learning_rate, args.max_nonfinite_steps = 0.1, 3
    accelerator = hardware.make_accelerator(args)
    run = RunFolder(output_dir)
    batches = Ending(
        Points(), args.train_batch_size, 1, accelerator.num_processes, accelerator.process_index, args.seed
    )
    batches.last = int(last[0]) if last else None
    claim(run, args, trainer.facts(args, batches), "fit_toy.py", accelerator)
    seen = []

    def compute_loss(model, batch, keys):
        seen.append(keys[0].item() >> 32)
        loss = (model(batch["x"])[:, 0] - 2 * batch["x"][:, 0]).square()
        bad = (batch["position"] == 0) & (seen[-1] in bad_steps)  # in the first process alone
        return loss + torch.zeros_like(loss).masked_fill(bad, float("nan"))

    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    result = trainer.fit(model, batches, compute_loss, args, accelerator=accelerator, run=run, bad_images=BadImages(0))
    state = {"rank": accelerator.process_index, "steps": seen, "weight": model.weight.item(), "step": result.step}
    print(json.dumps(state))


if __name__ == "__main__":
    main()
