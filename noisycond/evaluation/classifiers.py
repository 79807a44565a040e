"""Classifiers that say of which class an image is, for class agreement: one that ships, and those of transformers.

Letters: B images, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from noisycond.errors import InputError, in_one_line
from noisycond.evaluation.extractors import open_extractor
from noisycond.first_stage import state_hash


@dataclass
class Classifier:
    """A classifier of images.

    Attributes:
        name: as the user named it. class_names: K names. weights: a hash.
        logits: uint8 [B, 3, R, R] to float32 [B, K], on CPU.
    """

    name: str
    class_names: list[str]
    weights: str
    logits: Callable[[torch.Tensor], torch.Tensor]

    def settings(self) -> dict:
        """What decides its answers, as JSON values."""
        return {"name": self.name, "weights": self.weights}

    def __call__(self, images: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        """As a feature extractor: no features, the logits."""
        return None, self.logits(images), None


def open_classifier(name: str, device: torch.device | None = None) -> Classifier:
    """The classifier that --classifier names: `digits`, or a folder or Hub id of an image classifier of transformers.

    Raises:
        InputError: it cannot be opened.
    """
    if name == "digits":
        extractor = open_extractor("digits", None, device)
        names = [str(digit) for digit in range(10)]
        return Classifier(name, names, extractor.weights_hash, lambda images: extractor(images)[1])
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        model = AutoModelForImageClassification.from_pretrained(name).to(device).eval()
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--classifier {name}: expected `digits` or a folder or Hub id of an image classifier of transformers "
            f"({in_one_line(error)})."
        ) from error

    @torch.no_grad()
    def logits(images: torch.Tensor) -> torch.Tensor:
        inputs = processor(images=list(images), return_tensors="pt").to(model.device)
        return model(**inputs).logits.float().cpu()

    names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    return Classifier(name, names, state_hash(model), logits)
