#!/usr/bin/env python
"""Trains a T2I-Adapter on a frozen pre-trained pipeline: class-conditional LDM, LDM that draws from prompts, or Stable
Diffusion; with the corruption and CEP of the other scripts.

accelerate launch train_t2i_adapter.py                                   # on the class-conditional miniature (digits)
accelerate launch train_t2i_adapter.py --recipe digits_text_t2i_adapter  # on the text-to-image miniature
accelerate launch train_t2i_adapter.py --pretrained_model_name_or_path runs/ldm-4-in1k \
    --dataset_name imagenet100-control
accelerate launch train_t2i_adapter.py --recipe t2i_adapter_in1k/canny_cep_u  # a setting of the paper's table
"""

import sys
from pathlib import Path


try:
    from noisycond.bases import Base
    from noisycond.condition_kinds import CAPTIONS, LABELS, parse_by_kind
    from noisycond.control_pipelines import MODULES
    from noisycond.denoisers.control import AdapterBackbone, make_adapter
    from noisycond.errors import one_sentence_errors
    from noisycond.personalization import PersonalizationArguments, personalize, started
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


STARTED = started({LABELS: "digits_t2i_adapter", CAPTIONS: "digits_text_t2i_adapter"})


def parse(argv: list[str] | None = None) -> PersonalizationArguments:
    """The arguments of a command line; None takes that of the process."""
    return parse_by_kind(argv, STARTED)


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    def make_backbone(base: Base) -> AdapterBackbone:
        return AdapterBackbone(base.unet, make_adapter(base.unet, base.factor, MODULES[base.condition]))

    personalize(parse(argv), make_backbone, Path(__file__).name)


if __name__ == "__main__":
    main()
