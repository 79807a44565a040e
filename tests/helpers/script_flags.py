"""Which flags a script of the repo root has: the dataclass that its command line is parsed with."""

from collections.abc import Sequence

from launching import load_script

from noisycond import condition_kinds
from noisycond.arguments import Arguments


SCRIPTS = {
    "train_autoencoder": "AutoencoderArguments",
    "generate": "GenerateArguments",
    "evaluate_model": "EvaluateArguments",
    "prepare_dataset": "PrepareArguments",
    "train_class_cond": "ClassCondArguments",
    "train_text_to_image_corrupt": "TextToImageArguments",
    "train_lcm_distill": None,  # by what the teacher takes
    "train_controlnet": None,  # by what the base takes
    "train_t2i_adapter": None,
}


def arguments_class(script: str, argv: Sequence[str] = ()) -> type[Arguments]:
    """The arguments of a script, by its name without the ending, for this command line."""
    module = load_script(script)
    if SCRIPTS[script] is None:
        return condition_kinds.arguments_class(list(argv), module.STARTED)
    return getattr(module, SCRIPTS[script])
