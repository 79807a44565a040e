"""What the machine can do: accelerator, threads, precision and optional libraries, each checked with a sentence."""

import importlib.util
import logging
import os
import shutil
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed

from noisycond.arguments import LoopArguments, SamplingArguments
from noisycond.errors import InputError, require
from noisycond.sharding import Layout


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
    check_launch(on_gpu)
    _check_precision(args, on_gpu)
    _check_compiler(args, on_gpu)
    accelerator = Accelerator(
        cpu=no_accelerator(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # DeepSpeed's own half precision would keep the weights in it, and their average with them.
        mixed_precision="no" if Layout.of_this_launch().kind == "zero" else args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        kwargs_handlers=[patient()],
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        set_up_deepspeed(accelerator, args)
    if accelerator.device.type == "cpu":
        set_threads(args.cpu_threads_per_process)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    set_seed(args.seed)
    set_up_logging(accelerator)
    return accelerator


def make_sampling_accelerator(args: SamplingArguments) -> Accelerator:
    """The accelerator of a script that draws or measures images, with messages and, on CPU, threads set up."""
    accelerator = Accelerator(cpu=no_accelerator(), kwargs_handlers=[patient()])
    set_up_logging(accelerator)
    if accelerator.device.type == "cpu":
        set_threads(args.cpu_threads_per_process)
    return accelerator


def patient() -> InitProcessGroupKwargs:
    """How long a process waits for others: the main one measures, draws, or puts a dataset together meanwhile."""
    return InitProcessGroupKwargs(timeout=timedelta(hours=2))


def check_launch(on_gpu: bool) -> None:
    """Refuses a launch that asks for devices which are not here, before its processes look for each other.

    Raises:
        InputError: more processes than GPUs or, without a GPU, than CPU cores; named GPUs or sharding without one;
            FP8, or a way of sharding that is not supported.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asks, config = "The launch asks for", "Give accelerate launch another --config_file or --num_processes."
    if on_gpu:
        count = torch.cuda.device_count()
        require(here <= count, f"{asks} {here} processes on this machine, but it has {count} GPUs. {config}")
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
        require(
            visible in ("", "-1", "NoDevFiles") or torch.cuda.device_count() > 0,
            f"{asks} the GPUs {visible} (gpu_ids or CUDA_VISIBLE_DEVICES), but there is none here. {config}",
        )
        for variable, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
            require(
                os.environ.get(variable, "").lower() != "true",
                f"{asks} {what}, which needs GPUs, and none is used here. {config}",
            )
        require(
            here <= max(2, cores()),
            f"{asks} {here} processes on this machine, but it has no GPU and {cores()} CPU cores. {config}",
        )
    require(
        os.environ.get("ACCELERATE_MIXED_PRECISION") != "fp8",
        "The launch asks for mixed_precision fp8, which is not supported; use bf16, fp16 or no.",
    )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        _check_fsdp()


def set_up_deepspeed(accelerator: Accelerator, args: LoopArguments) -> None:
    """Gives DeepSpeed the run's own batch, clipping and precision, so that its configuration says nothing else.

    The weights stay in float32 and are cast by autocast: DeepSpeed casts them for good with its own `bf16` and `fp16`.

    Raises:
        InputError: another stage than 1 or 2, offloading, or a configuration file that casts the weights.
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    require(
        plugin.zero_stage in (1, 2),
        f"The launch asks for DeepSpeed's ZeRO stage {plugin.zero_stage}, but only 1 and 2 are supported; FSDP shards "
        "the weights too (recipes/accelerate/fsdp.yaml).",
    )
    offloads = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
    require(
        all(device in (None, "none") for device in offloads),
        "The launch asks DeepSpeed to offload, which is not supported; set both offload devices to none.",
    )
    half = any(config.get(name, {}).get("enabled") is True for name in ("fp16", "bf16"))
    require(not half, "DeepSpeed's configuration file sets fp16 or bf16; leave that to --mixed_precision bf16.")
    require(precision_of(args) in ("no", "bf16"), "With DeepSpeed --mixed_precision must be bf16 or no.")
    config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    config["gradient_clipping"] = args.max_grad_norm
    config["torch_autocast"] = {"enabled": precision_of(args) == "bf16", "dtype": "bfloat16"}


def precision_of(args: LoopArguments) -> str:
    """The precision of the computations: the flag's, or the launcher's."""
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _check_fsdp() -> None:
    require(
        os.environ.get("FSDP_VERSION", "1") == "2",
        "The launch asks for FSDP version 1, but only fsdp_version: 2 is supported (recipes/accelerate/fsdp.yaml).",
    )
    require(
        os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() != "true",
        "The launch asks for fsdp_offload_params, which is not supported; set it to false.",
    )
    require(
        os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT").upper() == "SHARDED_STATE_DICT",
        "The launch asks for another fsdp_state_dict_type than SHARDED_STATE_DICT, the one that is supported.",
    )


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    precision = precision_of(args)
    require(
        precision != "fp16" or on_gpu, "--mixed_precision fp16 needs a GPU, and none is used here; try bf16 or no."
    )
    require(
        precision != "fp16" or os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true",
        "--mixed_precision fp16 does not go with FSDP here; use bf16 or no.",
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
        wanted = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
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
