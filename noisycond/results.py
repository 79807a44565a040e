"""What a run leaves behind: sample grids, the loss curve, what was counted, and the pipeline with its card, which may
then be pushed."""

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from diffusers import DiffusionPipeline

from noisycond import hub, pictures, sampling
from noisycond.errors import writing
from noisycond.run_folder import RunFolder
from noisycond.trainer import FitResult


class AtTheEnd(Protocol):
    """An evaluation that also measures what was exported, see [`noisycond.evaluation.in_training`]."""

    def at_the_end(self, pipeline: DiffusionPipeline, run: RunFolder, step: int) -> None: ...


def draw_grid(
    pipeline: DiffusionPipeline, conditions: Sequence[int] | Sequence[str], per_row: int, args, path: Path
) -> None:
    """Draws an image per condition, class labels or prompts, and saves them as a grid (PNG).

    Args:
        per_row: images in a row. args: a training script's, with `validation_guidance_scale` and
            `validation_inference_steps`.
    """
    images = sampling.sample_all(
        pipeline,
        conditions,
        seed=args.seed,
        guidance_scale=args.validation_guidance_scale,
        num_inference_steps=args.validation_inference_steps,
    )
    scale = max(1, 64 // images[0].width)
    with writing(f"--output_dir {args.output_dir}", path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.image_grid(images, per_row, scale=scale).save(path)


def looking(
    assemble: Callable[[], DiffusionPipeline],
    action: Callable[[DiffusionPipeline, int], dict | None],
    afterwards: Callable[[], None] = lambda: None,
) -> Callable[[int], dict | None]:
    """A look of [`noisycond.trainer.fit`] that is given the pipeline with the weights of the moment, and the step.

    Args:
        afterwards: done then in any case.
    """

    def look(step: int) -> dict | None:
        try:
            return action(assemble(), step)
        finally:
            afterwards()

    return look


LORA = {"left": "LoRA weights", "needs": "diffusers and peft are"}


def leave_results(
    pipeline: DiffusionPipeline,
    args,
    run: RunFolder,
    result: FitResult,
    *,
    write: Callable[[], None],
    how_to_load: str,
    evaluation: AtTheEnd | None = None,
    repo_id: str | None = None,
    left: str = "Pipeline",
    needs: str = "diffusers is",
) -> None:
    """Writes loss curve, what was counted and what was trained, measures it where that was asked for, says where all
    this lies, and pushes it.

    Args:
        args: a training script's, with `hub_private_repo`. write: writes what was trained, and its card, into the
            run's folder. how_to_load: code. repo_id: where it is pushed to; None pushes nothing. left: what is left,
            needs: what it takes to load it, in words.
    """
    with writing(f"--output_dir {run.path}", "the pipeline (its last checkpoint is whole)"):
        pictures.plot_loss(run.read_log(), run.path / "loss.png")
        (run.path / "corruption.json").write_text(json.dumps(result.totals["corruption"], indent=2) + "\n")
        write()
        if evaluation is not None:
            evaluation.at_the_end(pipeline, run, result.step)
    print(
        f"\nSamples: {run.samples / 'final.png'}\nLoss curve: {run.path / 'loss.png'}\n"
        f"{left}: {run.path}\n\n"
        f"Load it where only {needs} installed:\n\n"
        f"{textwrap.indent(how_to_load, '    ')}\n"
    )
    if repo_id is not None:
        hub.push(run.path, repo_id, args.hub_private_repo)
