"""Agreement with the condition: does a classifier see the class that was asked for, and CLIP the prompt?

Letters: M generated images, K classes of the classifier, E dimensions of the embeddings that CLIP compares.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from noisycond.errors import InputError, in_one_line, require
from noisycond.evaluation.estimates import Estimate
from noisycond.first_stage import state_hash


# Hessel et al. scale by 2.5; most papers and torchmetrics give the cosine in percent.
CLIP_SCORE_WEIGHT = 100.0
DEFAULT_CLIP = "openai/clip-vit-base-patch16"
_OFFLINE = (
    "without network, put config.json, model.safetensors, preprocessor_config.json and the tokenizer's files of a "
    "CLIP into a folder and name that folder"
)


def class_agreement(*, logits: torch.Tensor, labels: torch.Tensor | None) -> Estimate:
    """The share of images whose top class, to a classifier that had no part in making them, is the class that was
    asked for.

    Args:
        logits [M, K]: float32. labels [M]: int64, what was asked for, in [0, K).

    Raises:
        InputError: no images, no labels, another number of them than of images, or a label that the classifier has
            no class for.
    """
    require(labels is not None, "class agreement needs the class that was asked for, but the images have no labels.")
    require(len(logits) > 0, "class agreement needs at least 1 generated image, but there are 0.")
    count, classes = logits.shape
    require(len(labels) == count, f"class agreement: there are {count} images, but {len(labels)} labels.")
    outside = labels[(labels < 0) | (labels >= classes)]
    require(
        len(outside) == 0,
        f"class agreement: the classifier knows the classes 0 to {classes - 1}, but class {outside[:1].sum().item()} "
        "was asked for; take a classifier of the model's classes.",
    )
    return Estimate.mean(logits.argmax(dim=1) == labels)


def prompts_for(class_names: Sequence[str], labels: torch.Tensor, template: str = "a photo of a {}") -> list[str]:
    """A prompt per label: the template, in which {} stands for the name of the class.

    Raises:
        InputError: the template has no {}, or a label has no name.
    """
    require("{}" in template, f"the prompt template {template!r} has no {{}} where the name of the class goes.")
    for label in labels.tolist():
        require(
            0 <= label < len(class_names), f"there are {len(class_names)} class names, but an image of class {label}."
        )
    return [template.replace("{}", class_names[label]) for label in labels.tolist()]


class ClipScore:
    """The agreement of images with prompts, w · max(cos, 0) of their CLIP embeddings (Hessel et al., "CLIPScore: A
    Reference-free Evaluation Metric for Image Captioning", EMNLP 2021, arXiv:2104.08718).

    Args:
        model: an id on the Hub or a folder that `CLIPModel` and `CLIPProcessor` open.
        weight: w; 100 as in torchmetrics and most papers, 2.5 in the original.
        device: where the model runs. batch_size: images, or prompts, at a time.

    Raises:
        InputError: the model cannot be opened.
    """

    def __init__(
        self,
        model: str = DEFAULT_CLIP,
        weight: float = CLIP_SCORE_WEIGHT,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
    ):
        from transformers import CLIPModel, CLIPProcessor

        try:
            clip, loading = CLIPModel.from_pretrained(model, output_loading_info=True)
            self.processor = CLIPProcessor.from_pretrained(model)
        except Exception as error:  # transformers raises a dozen types for files that are missing or of another model
            if Path(model).exists():
                problem = f"cannot be opened as a CLIP ({in_one_line(error).rstrip('.')})"
            else:
                problem = "is no folder, nor is it in the cache or to be had from the Hub"
            raise InputError(f"--clip_model {model} {problem}; {_OFFLINE}.") from error
        # transformers fills what the file lacks with random numbers and goes on.
        missing = sorted(loading["missing_keys"])
        require(not missing, f"--clip_model {model} has no weights for {len(missing)} tensors of a CLIP; {_OFFLINE}.")
        self.model, self.weights_hash = clip.to(device).eval(), state_hash(clip)  # asked for with every set of images
        self.name, self.weight, self.device, self.batch_size = model, weight, device, batch_size

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """One score per image and its prompt. A repeated prompt is encoded once; what is beyond the text encoder's
        length is cut off.

        Args:
            images: M images of any size. prompts: M texts.

        Returns:
            float32 [M] on the CPU, in [0, w].

        Raises:
            InputError: another number of prompts than of images.
        """
        require(
            len(images) == len(prompts), f"CLIP score: there are {len(images)} images, but {len(prompts)} prompts."
        )
        if not images:
            return torch.zeros(0)
        pictures = torch.cat([self._embed_images(images[rows]) for rows in self._batches(len(images))])
        return self.compare(pictures, self.embed_each(prompts))

    def settings(self) -> dict:
        """What decides the scores, as JSON values."""
        return {"model": self.name, "weights": self.weights_hash, "weight": self.weight}

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Unit embeddings of images, uint8 [B, 3, H, W] in [0, 255], float32 [B, E]; as a feature extractor gives
        them."""
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        return self._embed_images(pictures), None, None

    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit embeddings of prompts, float32 [B, E]."""
        batches = tqdm(self._batches(len(prompts)), desc="CLIP's prompts", unit="batch", leave=False, delay=2)
        return torch.cat([self._embed_texts(list(prompts[rows])) for rows in batches])

    def embed_each(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit embeddings of prompts, float32 [B, E]; what comes several times is encoded once."""
        different = list(dict.fromkeys(prompts))
        places = {prompt: place for place, prompt in enumerate(different)}
        return self.embed_texts(different)[torch.tensor([places[prompt] for prompt in prompts])]

    def compare(self, pictures: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Scores float32 [M], in [0, w], of unit embeddings of images and of their prompts, each float32 [M, E]."""
        return self.weight * (pictures * texts).sum(dim=1).clamp(min=0.0)

    def _batches(self, count: int) -> list[slice]:
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

    @torch.no_grad()
    def _embed_texts(self, prompts: list[str]) -> torch.Tensor:
        """Unit vectors, float32 [B, E]."""
        longest = self.model.config.text_config.max_position_embeddings
        inputs = self.processor.tokenizer(
            prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        return self._unit(self.model.get_text_features(**inputs.to(self.device)))

    @torch.no_grad()
    def _embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit vectors, float32 [B, E]."""
        inputs = self.processor.image_processor(list(images), return_tensors="pt")
        return self._unit(self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.device)))

    @staticmethod
    def _unit(features) -> torch.Tensor:
        # Some versions of transformers wrap the projected features, others return them.
        features = getattr(features, "pooler_output", features)
        return torch.nn.functional.normalize(features.float(), dim=1).cpu()
