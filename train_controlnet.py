#!/usr/bin/env python
"""Trains a ControlNet, or one that is the base with LoRA, on a frozen pre-trained pipeline: class-conditional LDM, LDM
that draws from prompts, or Stable Diffusion; with the corruption and CEP of the other scripts.

accelerate launch train_controlnet.py                                   # on the class-conditional miniature (digits)
accelerate launch train_controlnet.py --recipe digits_text_controlnet   # on the text-to-image miniature
accelerate launch train_controlnet.py --pretrained_model_name_or_path runs/ldm-4-in1k \
    --dataset_name imagenet100-control
accelerate launch train_controlnet.py --recipe controlnet_in1k/canny_cep_u  # a setting of the paper's table
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


try:
    from noisycond.arguments import LoRAShapeArguments, flag
    from noisycond.bases import Base
    from noisycond.condition_kinds import CAPTIONS, LABELS, parse_by_kind
    from noisycond.denoisers.control import ControlNetBackbone, add_lora_to_controlnet, make_controlnet
    from noisycond.errors import one_sentence_errors
    from noisycond.personalization import (
        ClassPersonalizationArguments,
        TextPersonalizationArguments,
        personalize,
        started,
    )
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


@dataclass
class ControlNetArguments(LoRAShapeArguments):
    adapter: Literal["controlnet", "lora"] = flag(
        "controlnet",
        "`controlnet`: a copy of the base's encoder is trained whole. `lora`: that copy stays the base's but for "
        "LoRA, which needs peft; it is merged in at the end, so both leave a ControlNetModel.",
    )
    lora_switch = "--adapter lora"

    @property
    def wants_lora(self) -> bool:
        return self.adapter == "lora"


@dataclass
class ClassControlNetArguments(ControlNetArguments, ClassPersonalizationArguments):
    """On a class-conditional base."""


@dataclass
class TextControlNetArguments(ControlNetArguments, TextPersonalizationArguments):
    """On a base that draws from prompts."""


STARTED = started(
    {LABELS: "digits_controlnet", CAPTIONS: "digits_text_controlnet"},
    ClassControlNetArguments,
    TextControlNetArguments,
)


def parse(argv: list[str] | None = None) -> ControlNetArguments:
    """The arguments of a command line; None takes that of the process."""
    return parse_by_kind(argv, STARTED)


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)

    def make_backbone(base: Base) -> ControlNetBackbone:
        controlnet = make_controlnet(base.unet, base.factor)
        if args.wants_lora:
            add_lora_to_controlnet(controlnet, args.rank, args.lora_alpha, args.lora_target_modules)
        return ControlNetBackbone(base.unet, controlnet)

    personalize(args, make_backbone, Path(__file__).name)


if __name__ == "__main__":
    main()
