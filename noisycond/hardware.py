"""What the machine can do: accelerator, threads, precision and optional libraries, each checked with a sentence."""

import importlib.util
import logging
import os
import shutil
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed

from noisycond.arguments import LoopArguments
from noisycond.errors import InputError, require


TRACKERS = ("tensorboard", "wandb", "comet_ml", "all", "none")


def make_accelerator(args: LoopArguments) -> Accelerator:
    """The accelerator of a training script, after every setting that the machine cannot honour was refused. Seeds
    Python, NumPy and torch, and sets TF32 and, on CPU, the thread count.

    Raises:
        InputError: a flag needs a GPU or a library that is not there.
    """
    require(args.report_to in TRACKERS, f"--report_to {args.report_to}: expected one of {', '.join(TRACKERS)}.")
    if args.report_to not in ("all", "none"):
        require_library(args.report_to, f"--report_to {args.report_to}")
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
    _check_precision(args, on_gpu)
    _check_compiler(args, on_gpu)
    accelerator = Accelerator(
        cpu=no_accelerator(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        # The main process measures and draws while the others wait at a barrier.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
    )
    if accelerator.device.type == "cpu":
        set_threads(args.cpu_threads_per_process)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    set_seed(args.seed)
    set_up_logging(accelerator)
    return accelerator


def no_accelerator() -> bool:
    """Whether everything runs on CPU. Told to accelerate, so that several launched processes find each other there too
    (by gloo); left alone it would run each as if it were the only one. Apple's GPUs have no float64 and are not used.
    """
    return not (torch.cuda.is_available() or torch.xpu.is_available())


def set_up_logging(accelerator: Accelerator) -> None:
    """Messages of this project on the main process, of libraries from warnings up."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("noisycond").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)


def require_library(name: str, flag: str) -> None:
    """Raises InputError where a library that a flag needs is not installed."""
    require(importlib.util.find_spec(name) is not None, f"{flag} needs the library {name}: pip install {name}.")


def _check_precision(args: LoopArguments, on_gpu: bool) -> None:
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    require(
        precision != "fp16" or on_gpu, "--mixed_precision fp16 needs a GPU, and none is used here; try bf16 or no."
    )
    require(not args.allow_tf32 or on_gpu, "--allow_tf32 needs a GPU (Ampere or later), and none is used here.")
    if args.use_8bit_adam:
        require_library("bitsandbytes", "--use_8bit_adam")
        require(on_gpu, "--use_8bit_adam needs a GPU, and none is used here.")


def _check_compiler(args: LoopArguments, on_gpu: bool) -> None:
    if args.torch_compile and not on_gpu:
        require(
            any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")),
            "--torch_compile on CPU needs a C++ compiler (g++ or clang++), and none was found.",
        )


def enable_xformers(model) -> None:
    """Turns on xformers' attention in a diffusers model.

    Raises:
        InputError: xformers or a GPU is missing.
    """
    flag = "--enable_xformers_memory_efficient_attention"
    require_library("xformers", flag)
    require(torch.cuda.is_available(), f"{flag} needs a GPU, and none is used here.")
    try:
        model.enable_xformers_memory_efficient_attention()
    except (ValueError, ImportError, NotImplementedError) as error:
        raise InputError(f"{flag} does not work here: {' '.join(str(error).split())}.") from error


def set_threads(wanted: int | None = None) -> None:
    """Sets torch's thread count on CPU.

    `accelerate launch` sets OMP_NUM_THREADS=1 for a CPU process, so that most of the machine would idle. What the user
    set stays: the flag, or OMP_NUM_THREADS in the environment, or the launcher's --num_cpu_threads_per_process.
    Otherwise the cores are shared among the processes of this machine.
    """
    if wanted is None and not _user_set_threads():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if wanted is not None:
        torch.set_num_threads(wanted)


def _user_set_threads() -> bool:
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return True
    # Under the launcher the variable is always set; whether the user set it is seen from the launcher itself.
    try:
        launcher = psutil.Process().parent()
        given = any(word.startswith("--num_cpu_threads_per_process") for word in launcher.cmdline())
        return given or "OMP_NUM_THREADS" in launcher.environ()
    except (psutil.Error, AttributeError):
        return os.environ["OMP_NUM_THREADS"] != "1"
