"""What a run would take, told without data or GPU: `--dry_run` prints it and leaves, and writes nothing. Only the
configuration of a `--denoiser` that is a Hub id, and not yet in the Hub's cache, comes through the network.

The model is built on the meta device, so that no weight is allocated. Sizes are in bytes; a GB is 1e9 of them.
"""

import math
import os
from pathlib import Path

from torch import nn

from noisycond.arguments import DataArguments, LoopArguments
from noisycond.data.opening import TrainingData, open_training_data
from noisycond.data.sources import check_number_of_classes, read_class_names
from noisycond.denoisers.presets import Preset
from noisycond.errors import InputError, is_main_process, require
from noisycond.first_stage import FirstStage, peek_first_stage
from noisycond.sharding import Layout
from noisycond.trainer import steps_to_train


def memory(model: nn.Module, args: LoopArguments, layout: Layout) -> dict[str, int]:
    """Bytes on the first device, by what they are for, activations and the libraries' own memory left out.

    Args:
        model: on any device, in the precision of the weights.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    fsdp, zero = layout.kind == "fsdp", layout.kind == "zero"

    def elements(tensors: list, sharded: bool) -> int:
        return sum(layout.share(tensor) if sharded else tensor.numel() for tensor in tensors)

    sharded_state = fsdp or (zero and layout.stage >= 1)
    rows = {
        "weights": 4 * elements(parameters, fsdp),
        "gradients": 4 * elements(trained, fsdp or (zero and layout.stage >= 2)),
    }
    if args.use_8bit_adam:
        rows["optimizer state (8-bit AdamW)"] = sum(
            _eight_bit_state(layout.share(tensor) if sharded_state else tensor.numel()) for tensor in trained
        )
    else:
        rows["optimizer state (AdamW)"] = 2 * 4 * elements(trained, sharded_state)
    if zero:
        rows["ZeRO's own copy of the weights"] = 4 * elements(trained, True)
    if args.use_ema:
        rows["moving average"] = 4 * elements(trained, fsdp)
    if _half_precision(args) and not fsdp:
        # Autocast keeps what it has cast until the backward pass is through.
        rows["weights cast by mixed precision, at most"] = 2 * elements(parameters, False)
    if layout.kind == "ddp":
        rows["gradient buckets"] = 4 * elements(trained, False)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return rows | ({"buffers": buffers} if buffers else {})


def _eight_bit_state(elements: int) -> int:
    """bitsandbytes: small tensors keep float32, others two bytes and, per block of 256, two float32 maxima."""
    return 8 * elements if elements < 4096 else 2 * elements + 8 * math.ceil(elements / 256)


def _half_precision(args: LoopArguments) -> bool:
    return (args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) in ("fp16", "bf16")


def open_what_is_here(args: DataArguments) -> TrainingData | None:
    """The training data where opening it downloads and writes nothing: digits, a folder of images, or one that
    `datasets` wrote (`save_to_disk`), as prepare_dataset.py does."""
    is_written = args.dataset_name is not None and (Path(args.dataset_name) / "dataset_info.json").is_file()
    is_here = args.dataset_name == "digits" or args.train_data_dir is not None or is_written
    if is_here and not getattr(args, "streaming", False):
        return open_training_data(args, keep_index=False)
    return None


def class_names_of(args: DataArguments, data: TrainingData | None) -> list[str]:
    """The classes' names, or numbers in their place where the data is not here.

    Raises:
        InputError: nothing says how many there are.
    """
    if data is not None:
        return data.source.class_names
    count = args.num_classes
    if getattr(args, "class_names", None) is not None:
        names = read_class_names("--class_names", args.class_names)
        check_number_of_classes(args, names)
        return names
    if args.class_subset is not None:
        require(args.class_subset.isdigit(), "--dry_run: --class_subset FILE needs the data; give a number.")
        chosen = int(args.class_subset)
        require(
            count is None or 1 <= chosen <= count,
            f"--class_subset {chosen}: the dataset has {count} classes; ask for 1 to that.",
        )
        count = chosen
    require(count is not None, "--dry_run: the dataset is not opened, so give --num_classes.")
    return [str(number) for number in range(count)]


def latents_of(args, preset: Preset, name: str | None = None) -> tuple[FirstStage | None, int, int, str]:
    """The first stage without its weights where its configuration lies on this machine, channels and factor of its
    latents, and where these come from.

    Args:
        preset: what they are of a first stage that is not on this machine. name: of the first stage; by default what
            the flags name.
    """
    name = name or args.pretrained_vae_model_name_or_path
    require(name is not None, "--pretrained_vae_model_name_or_path is needed.")
    try:
        first_stage = peek_first_stage(name)
        return first_stage, first_stage.latent_channels, first_stage.factor, f"first stage {name}"
    except InputError:
        # A Hub id may be on this machine or not; what has no such form is a mistake.
        if name.count("/") != 1 or name.startswith((".", "/")):
            raise
        return None, preset.latent_channels, preset.factor, f"as the denoiser's preset: {name} is not on this machine"


def report(
    args, model: nn.Module, data: TrainingData | None, facts: dict[str, str], first_stage: FirstStage | None = None
) -> None:
    """Prints the plan on the main process.

    Args:
        args: a [`DataArguments`] and [`LoopArguments`]. model: what would be trained, on the meta device.
        facts: lines of the script's own, name to text.
        first_stage: frozen, on every device beside the model.
    """
    if not is_main_process():
        return
    layout = Layout.of_this_launch()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    table = (
        {"parameters": f"{total:,} ({total / 1e6:.2f} M), {trained:,} trainable"} | facts | _steps(args, data, layout)
    )
    for name, text in table.items():
        print(f"{name:<21} {text}")
    rows = memory(model, args, layout)
    if first_stage is not None:
        rows["first stage"] = sum(4 * tensor.numel() for tensor in first_stage.model.state_dict().values())
    rows["total"] = sum(rows.values())
    print(f"\nmemory per device, {_described(layout)}")
    for name, size in rows.items():
        print(f"  {name:<42} {size / 1e9:>8.3f} GB {size:>16,} bytes")
    missing = "activations, batches" + (", the first stage" if "latents" in facts and first_stage is None else "")
    print(f"  not counted: {missing}, other buffers of communication, what libraries keep")
    if args.inferred:
        values = ", ".join(f"{name} {value}" for name, value in args.inferred.items())
        print(f"\nOur reading, not the paper's [inferred]: {values}")


def _steps(args, data: TrainingData | None, layout: Layout) -> dict[str, str]:
    batch = args.train_batch_size * args.gradient_accumulation_steps * layout.processes
    size = args.max_train_samples if data is None else len(data.images)
    steps = args.max_train_steps if size is None else steps_to_train(args, size, batch)
    if size is not None:
        epochs = f"{steps * batch / size:,.1f} epochs of {size:,} examples"
    elif steps is None:
        epochs = f"{args.num_train_epochs} epochs of a dataset that is not on this machine"
    else:
        epochs = "epochs unknown: the dataset is not on this machine"
    return {
        "global batch": f"{batch:,} = {args.train_batch_size} per process × {args.gradient_accumulation_steps} "
        f"accumulated × {layout.processes} processes",
        "optimizer steps": f"{'unknown' if steps is None else f'{steps:,}'} ({epochs})",
        "examples seen": "unknown" if steps is None else f"{steps * batch:,}",
    }


def _described(layout: Layout) -> str:
    return {
        "single": "one process",
        "ddp": f"{layout.processes} processes, each with a whole copy",
        "fsdp": f"FSDP over {layout.processes} processes (one block at a time is gathered on top)",
        "zero": f"ZeRO stage {layout.stage} over {layout.processes} processes",
    }[layout.kind]
