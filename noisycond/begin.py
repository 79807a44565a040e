"""How every training script begins: an accelerator, and what can be refused before any work."""

from accelerate import Accelerator

from noisycond import hardware, hub
from noisycond.processes import on_main
from noisycond.run_folder import RunFolder


def begin(args) -> tuple[RunFolder, Accelerator, str | None]:
    """The output folder, not yet claimed; the accelerator; and the repository that will be pushed to, None where none
    is.

    Args:
        args: with [`noisycond.arguments.LoopArguments`] and [`noisycond.arguments.HubArguments`].

    Raises:
        InputError: the output folder cannot be used, this machine cannot do what is asked, or nothing can be pushed.
    """
    run = RunFolder(args.output_dir)
    accelerator = hardware.make_accelerator(args)
    on_main(accelerator, lambda: run.check(args))
    return run, accelerator, on_main(accelerator, lambda: hub.check(args))
