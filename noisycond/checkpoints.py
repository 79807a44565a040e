"""Checkpoints that are whole or not there: written beside their name, manifest last, then renamed; and verified when a
run resumes."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from noisycond.arguments import LoopArguments
from noisycond.errors import InputError, require, writing
from noisycond.processes import on_all, on_main


logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, -1 where it has none."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def all_in(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or not."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def check_space(args: LoopArguments, denoiser: nn.Module) -> None:
    """Raises InputError where the disk cannot hold one checkpoint (weights, average, optimizer) and one export."""
    folder = Path(args.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    copies = 1 + args.use_ema + (0.5 if args.use_8bit_adam else 2)
    parameters = list(denoiser.parameters())
    trained = sum(4 * parameter.numel() for parameter in parameters if parameter.requires_grad)
    needed = copies * trained + sum(4 * parameter.numel() for parameter in parameters)
    free = shutil.disk_usage(folder).free
    require(
        needed <= free,
        f"--output_dir {args.output_dir}: no space left: a checkpoint and the exported pipeline take about "
        f"{needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free.",
    )


def save(
    output_dir: Path, step: int, accelerator: Accelerator, write: Callable[[Path], None], limit: int | None = None
) -> Path:
    """Saves `checkpoint-<step>` and removes the oldest past the limit. All processes take part.

    Args:
        output_dir: the run's folder.
        write: writes this process's files into the folder it is given.
        limit: how many checkpoints are kept; None keeps all.

    Raises:
        InputError: no space left, or another failure to write; on all processes, nothing saved earlier is touched.
    """
    final, making = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        for stale in output_dir.glob(".checkpoint-*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
    accelerator.wait_for_everyone()

    def write_share() -> None:
        with writing(f"--output_dir {output_dir}", final.name):
            making.mkdir(parents=True, exist_ok=True)
            write(making)

    def finish() -> None:
        with writing(f"--output_dir {output_dir}", final.name):
            _finish(making, final)

    try:
        on_all(accelerator, write_share)
        on_main(accelerator, finish)
    except InputError as error:
        if accelerator.is_main_process:
            shutil.rmtree(making, ignore_errors=True)
        kept = newest_whole(output_dir)
        saved = f"{kept.name} is whole, continue with --resume_from_checkpoint latest." if kept else "None is saved."
        raise InputError(f"{error} {saved}") from error
    if accelerator.is_main_process and limit is not None:
        # Those of later steps come first: they were passed over or left behind when the run went back.
        others = sorted(
            (path for path in all_in(output_dir) if path != final), key=lambda p: (step_of(p) < step, step_of(p))
        )
        for path in others[: max(0, len(others) + 1 - limit)]:
            _remove(path)
    accelerator.wait_for_everyone()
    return final


def _finish(making: Path, final: Path) -> None:
    files = {}
    for path in sorted(making.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[str(path.relative_to(making))] = {"bytes": path.stat().st_size, "sha256": digest}
    with (making / MANIFEST).open("w") as file:
        json.dump({"files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    if not final.exists():
        making.rename(final)
        return
    old = final.with_name(f".{final.name}.old.tmp")
    final.rename(old)
    making.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    # Renamed first, so that a kill in the middle leaves no half checkpoint under a checkpoint's name.
    doomed = path.with_name(f".{path.name}.old.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def problem_with(path: Path) -> str | None:
    """Why a checkpoint cannot be used, in a few words, or None where every file is as its manifest says."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {expected['bytes']}"
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"the content of {name} has changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({' '.join(str(error).split())})"
    return None


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint without a problem, or None; damaged ones that are newer are named in the log."""
    for path in reversed(all_in(output_dir)):
        problem = problem_with(path)
        if problem is None:
            return path
        logger.warning("Passing over the damaged %s: %s.", path, problem)
    return None


def find(output_dir: Path, wanted: str, accelerator: Accelerator) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names, verified by the main process for all.

    Args:
        wanted: `latest` for the newest whole one (damaged ones are named and passed over), or a path.

    Returns:
        The folder, or None where `latest` finds no checkpoint at all.

    Raises:
        InputError: the named one does not exist or is damaged, or all are damaged.
    """
    return on_main(accelerator, lambda: _find(output_dir, wanted))


def _find(output_dir: Path, wanted: str) -> Path | None:
    if wanted == "latest":
        newest = newest_whole(output_dir)
        if newest is None and all_in(output_dir):
            raise InputError(f"--resume_from_checkpoint latest: every checkpoint in {output_dir} is damaged.")
        return newest
    # As in the Diffusers scripts, a bare name stands for a checkpoint in the output folder.
    path = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
    if not path.is_dir():
        names = ", ".join(path.name for path in all_in(output_dir)) or "none"
        raise InputError(f"--resume_from_checkpoint {wanted}: there is no such checkpoint; {output_dir} has: {names}.")
    problem = problem_with(path)
    if problem is not None:
        raise InputError(f"--resume_from_checkpoint {wanted}: the checkpoint is damaged: {problem}.")
    return path
