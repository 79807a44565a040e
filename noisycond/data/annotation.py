"""Annotators: what is put beside an image: Canny edges, a threshold mask, the masks of a SAM model, a caption.

Letters: B images in a batch, H × W their size, M masks of one image.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from noisycond import randomness
from noisycond.arguments import Arguments, flag
from noisycond.cards import public_name
from noisycond.data.controls import CANNY_HIGH, CANNY_LOW, canny_edges, threshold_mask
from noisycond.data.sources import ImageSource
from noisycond.errors import InputError, closest, in_one_line, require
from noisycond.randomness import Purpose


ANNOTATION_COLUMNS = ("caption", "canny", "sam", "mask")  # in the order of the columns
# B images and their indices to B control images or captions, "" where there is none.
Annotate = Callable[[Sequence[Image.Image], Sequence[int]], list[Image.Image] | list[str]]
# Flags that decide the edges and the regions.
CANNY_CHOICES = ("canny_low", "canny_high")
SAM_CHOICES = ("sam_points_per_side", "sam_pred_iou_thresh", "sam_stability_score_thresh")
SAM_FACT = "SAM model"  # a hash of its weights and image processor
HOLE = "{}"  # where a template has the name of the class
TEMPLATE = f"a photo of a {HOLE}"
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass
class AnnotationArguments(Arguments):
    """What is put beside the images, and how; of a script that also inherits
    [`noisycond.arguments.SourceArguments`]."""

    annotations: list[str] = flag(
        ["canny", "mask", "caption"],
        "Columns to add: `canny` (edges), `sam` (the masks of a SAM model, coloured), `mask` (what is brighter than "
        "Otsu's threshold), `caption`.",
    )
    canny_low: int = flag(CANNY_LOW, "Canny: an edge goes on where the gradient is above this.")
    canny_high: int = flag(CANNY_HIGH, "Canny: an edge begins where the gradient is above this.")
    sam_model: str | None = flag(None, "A model of transformers for mask generation (SAM), a folder or Hub id.")
    sam_points_per_side: int = flag(32, "SAM is asked at a grid of so many points a side.")
    sam_points_per_batch: int = flag(64, "Points at once; more are faster and take more memory.")
    sam_pred_iou_thresh: float = flag(0.88, "Masks that SAM itself rates lower are left out; 0 keeps them.")
    sam_stability_score_thresh: float = flag(
        0.95, "Masks that change more with the cut-off are left out; 0 keeps them."
    )
    caption_model: str | None = flag(None, "A BLIP model for captions, a folder or Hub id.")
    caption_prompt: str | None = flag(None, "What every caption of --caption_model begins with, as `a photo of`.")
    caption_max_tokens: int = flag(30, "The most tokens that --caption_model adds.")
    caption_template: str | None = flag(
        None,
        f"Captions from class names, put in place of {HOLE}; the default without other flags for captions is "
        f"`{TEMPLATE}`, and for digits their own captions.",
    )
    caption_column: str | None = flag(None, "The dataset's own captions, of this column; of a list, one is drawn.")
    annotation_batch_size: int = flag(16, "Images per batch; the bits of a caption may depend on it.")
    torch_dtype: Literal["float32", "float16", "bfloat16"] = flag("float32", "Precision of the models' weights.")
    seed: int = flag(0, "Seed of the colours of masks, and of drawn captions.")

    def __post_init__(self):
        super().__post_init__()
        self._check_annotations()
        needed = {  # which flags have an effect where
            "canny_": ("canny" in self.annotations, "--annotations canny"),
            "sam_": ("sam" in self.annotations, "--annotations sam"),
            "caption_": ("caption" in self.annotations, "--annotations caption"),
            "caption_prompt": (self.caption_model is not None, "--caption_model"),
            "caption_max_tokens": (self.caption_model is not None, "--caption_model"),
            "torch_dtype": (self.sam_model or self.caption_model, "a model (--sam_model, --caption_model)"),
        }
        for name in AnnotationArguments.__annotations__:
            for prefix, (has_effect, of_what) in needed.items():
                require(
                    has_effect or not name.startswith(prefix) or self.is_default(name),
                    f"--{name} has no effect without {of_what}.",
                )
        require(
            0 <= self.canny_low <= self.canny_high,
            f"--canny_low is {self.canny_low} and --canny_high is {self.canny_high}, but the low threshold must not "
            "be above the high one, nor negative.",
        )
        require(
            "sam" not in self.annotations or self.sam_model is not None,
            "--annotations sam needs --sam_model: a folder or Hub id, such as facebook/sam-vit-base.",
        )
        for name in ("sam_points_per_side", "sam_points_per_batch", "caption_max_tokens", "annotation_batch_size"):
            require(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}, but it must be positive.")
        for name in ("sam_pred_iou_thresh", "sam_stability_score_thresh"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} is {value}, but it must lie in [0, 1).")
        ways = [name for name in ("caption_model", "caption_template", "caption_column") if getattr(self, name)]
        require(
            len(ways) < 2,
            f"{' and '.join(f'--{name}' for name in ways)} contradict each other: captions come one way.",
        )
        require(
            self.caption_column is None or self.dataset_name != "digits",
            "--caption_column has no effect with --dataset_name digits: they have captions of their own.",
        )
        template = self.caption_template
        require(
            template is None or HOLE in template,
            f"--caption_template is {template!r}, but must have {HOLE} where the name of the class stands.",
        )
        require(0 <= self.seed < 2**32, f"--seed is {self.seed}, but it must lie between 0 and 2^32 - 1.")

    @property
    def has_digits_captions(self) -> bool:
        """Whether captions are those that digits have of their own."""
        return self.dataset_name == "digits" and self.caption_model is None and self.caption_template is None

    def _check_annotations(self) -> None:
        known = ", ".join(sorted(ANNOTATION_COLUMNS))
        require(self.annotations, f"--annotations is empty; name some of {known}.")
        for name in self.annotations:
            require(
                name in ANNOTATION_COLUMNS,
                f"--annotations {name}: expected some of {known}{closest(name, ANNOTATION_COLUMNS)}.",
            )
            require(self.annotations.count(name) == 1, f"--annotations: {name} is named twice.")


def described(args: AnnotationArguments) -> dict[str, str]:
    """What each column of annotations holds, for a card."""
    if args.caption_model is not None:
        captions = f"by {public_name(args.caption_model)}"
        captions += "" if args.caption_prompt is None else f", each begun with “{args.caption_prompt}”"
    elif args.caption_column is not None:
        captions = f"from the dataset's column `{args.caption_column}`"
    else:
        captions = "the digits' own" if args.has_digits_captions else f"`{args.caption_template or TEMPLATE}`"
    told = {
        "caption": f"a caption, {captions}",
        "canny": f"Canny edges, thresholds {args.canny_low} and {args.canny_high}, white on black",
        "sam": f"masks of {public_name(args.sam_model or '')}, {args.sam_points_per_side} points a side, rated above "
        f"{args.sam_pred_iou_thresh:g}, stable above {args.sam_stability_score_thresh:g}, each in a random colour",
        "mask": "what is brighter than Otsu's threshold, white on black",
    }
    return {column: told[column] for column in ANNOTATION_COLUMNS if column in args.annotations}


def annotated_with(arguments: Mapping[str, object], facts: Mapping[str, object]) -> dict[str, object]:
    """Of the flags and facts of a preparation those that decide what is seen in its control images."""
    asked = arguments.get("annotations")
    of_column = {"canny": CANNY_CHOICES, "sam": (SAM_FACT, *SAM_CHOICES)}
    names = [name for column, own in of_column.items() if isinstance(asked, list) and column in asked for name in own]
    known = {**arguments, **facts}
    return {name: known[name] for name in names if name in known}


@dataclass
class Annotators:
    """What annotates.

    Attributes:
        by_column: an [`Annotate`] for each column, in the order of [`ANNOTATION_COLUMNS`].
        facts: hashes of what the result rests on beside flags and images, as JSON values.
    """

    by_column: dict[str, Annotate]
    facts: dict[str, object]


def open_annotators(args: AnnotationArguments, source: ImageSource, device: torch.device | str = "cpu") -> Annotators:
    """The annotators that the flags ask for.

    Raises:
        InputError: a model cannot be opened, or there is nothing to make captions of.
    """
    opened = Annotators({}, {})
    for column in ANNOTATION_COLUMNS:
        if column in args.annotations:
            opened.by_column[column] = _open(column, args, source, device, opened.facts)
    return opened


def _open(column: str, args: AnnotationArguments, source: ImageSource, device, facts: dict) -> Annotate:
    if column == "canny":
        return lambda images, indices: [canny_edges(image, args.canny_low, args.canny_high) for image in images]
    if column == "mask":
        return lambda images, indices: [threshold_mask(image) for image in images]
    if column == "sam":
        segmenter = Segmenter(args, device)
        facts[SAM_FACT] = segmenter.fingerprint
        return segmenter
    if args.caption_model is not None:
        captioner = Captioner(args, device)
        facts["caption model"] = captioner.fingerprint
        return captioner
    captions, hashed = _captions_without_a_model(args, source), hashlib.sha256()
    for caption in captions:
        hashed.update(f"{len(caption)} {caption}".encode("utf-8", "surrogatepass"))
    facts["captions"] = hashed.hexdigest()
    return lambda images, indices: [captions[index] for index in indices]


def _captions_without_a_model(args: AnnotationArguments, source: ImageSource) -> list[str]:
    """N captions, of the dataset itself or of the names of its classes."""
    if args.caption_column is not None or args.has_digits_captions:
        return _drawn(source.captions(args.caption_column or "text"), args.seed)
    require(
        source.class_names,
        "--annotations caption: the dataset has no classes to name; give --caption_model, or --caption_column of its "
        "own captions.",
    )
    cryptic = next((name for name in source.class_names if WORDNET_ID.fullmatch(name)), None)
    require(
        cryptic is None,
        f"--annotations caption: the classes are named by ids of WordNet ({cryptic}), which make no captions; give "
        "--caption_model, or leave caption out of --annotations.",
    )
    template = args.caption_template or TEMPLATE
    by_class = [template.replace(HOLE, _spoken(name)) for name in source.class_names]
    return [by_class[label] for label in source.labels.tolist()]


def _spoken(class_name: str) -> str:
    """The first of several synonyms, with spaces: as `great_white_shark`, or `tench, Tinca tinca`."""
    return class_name.split(",")[0].replace("_", " ").strip()


def _drawn(captions: Sequence[Sequence[str]], seed: int) -> list[str]:
    """One of each example's captions that are not empty; "" where there is none."""
    filled = [[text for text in own if text] for own in captions]
    counts = torch.tensor([len(own) for own in filled], dtype=torch.int64)
    places = randomness.randint(seed, Purpose.CAPTION_CHOICE, torch.arange(len(filled)), counts)
    return [own[place] if own else "" for own, place in zip(filled, places.tolist(), strict=True)]


def painted(masks: Sequence[np.ndarray], size: tuple[int, int], seed: int, index: int) -> Image.Image:
    """Masks in random colours on black, the larger ones painted first, as SAM's own demonstration shows them (Kirillov
    et al., arXiv:2304.02643): RGB, of this size.

    Args:
        masks: M of bool [H, W]. size: W, H. index: the example's; a colour depends on seed, index and the place of the
            mask by size, equal ones as they come.
    """
    canvas = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    by_size = sorted((np.asarray(mask) for mask in masks), key=lambda mask: -int(mask.sum()))
    bits = randomness.random_bits(seed, Purpose.SEGMENT_COLOUR, torch.tensor([index]), 3 * len(by_size))
    colours = 1 + ((bits.reshape(-1, 3) * 255) >> 32)  # 1 to 255: black is what no mask covers
    for mask, colour in zip(by_size, colours.numpy().astype(np.uint8), strict=True):
        canvas[mask] = colour
    return Image.fromarray(canvas)


class Segmenter:
    """The masks of a SAM model at a grid of points (`mask-generation` of transformers), coloured.

    Attributes:
        fingerprint: a hash of weights and image processor.

    Raises:
        InputError: transformers cannot open it for mask generation.
    """

    def __init__(self, args: AnnotationArguments, device: torch.device | str = "cpu"):
        from transformers import AutoImageProcessor, AutoModelForMaskGeneration, pipeline

        name = args.sam_model
        model, processor = _pretrained(
            "--sam_model",
            name,
            "a model for mask generation (SAM)",
            lambda: AutoModelForMaskGeneration.from_pretrained(name, output_loading_info=True, dtype=_dtype(args)),
            lambda: AutoImageProcessor.from_pretrained(name),
        )
        self.fingerprint = _fingerprint(model, processor)
        # What follows the model compares its scores with boxes of float32, and refuses other scores.
        model.register_forward_hook(lambda module, inputs, outputs: _in_float32(outputs))
        self.generate = pipeline("mask-generation", model=model.eval(), image_processor=processor, device=device)
        self.seed = args.seed
        self.options = {
            "points_per_crop": args.sam_points_per_side,
            "points_per_batch": args.sam_points_per_batch,
            "pred_iou_thresh": args.sam_pred_iou_thresh,
            "stability_score_thresh": args.sam_stability_score_thresh,
        }

    def __call__(self, images: Sequence[Image.Image], indices: Sequence[int]) -> list[Image.Image]:
        found = self.generate(list(images), **self.options)
        return [
            painted([np.asarray(mask) for mask in each["masks"]], image.size, self.seed, index)
            for each, image, index in zip(found, images, indices, strict=True)
        ]


class Captioner:
    """The captions of a BLIP model, greedy, so that the same images give the same texts.

    Attributes:
        fingerprint: a hash of weights, image processor and tokenizer.

    Raises:
        InputError: transformers cannot open it as a BLIP that captions, or it takes too few tokens.
    """

    def __init__(self, args: AnnotationArguments, device: torch.device | str = "cpu"):
        from transformers import BlipForConditionalGeneration, BlipProcessor

        from noisycond.data.text_cache import tokenizer_hash  # with all the denoisers

        name = args.caption_model
        model, self.processor = _pretrained(
            "--caption_model",
            name,
            "a BLIP that captions",
            lambda: BlipForConditionalGeneration.from_pretrained(name, output_loading_info=True, dtype=_dtype(args)),
            lambda: BlipProcessor.from_pretrained(name),
        )
        tokenizer, self.prompt, self.max_tokens = (
            self.processor.tokenizer,
            args.caption_prompt,
            args.caption_max_tokens,
        )
        begun, context = (
            len(tokenizer(self.prompt or "")["input_ids"]) - 1,
            model.config.text_config.max_position_embeddings,
        )
        require(
            begun + self.max_tokens <= context,
            f"--caption_max_tokens is {self.max_tokens}, but --caption_model {name} takes {context} tokens, {begun} "
            "of them for where a caption begins.",
        )
        self.fingerprint = _fingerprint(model, self.processor.image_processor, tokenizer_hash(tokenizer))
        self.model = model.eval().to(device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], indices: Sequence[int]) -> list[str]:
        prompts = None if self.prompt is None else [self.prompt] * len(images)
        inputs = self.processor(images=list(images), text=prompts, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]


def _in_float32(outputs):
    """The output of a model of transformers with its tensors in float32."""
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            outputs[name] = value.float()
    return outputs


def _dtype(args: AnnotationArguments) -> torch.dtype:
    return getattr(torch, args.torch_dtype)


def _pretrained(option: str, name: str, what: str, open_model: Callable, open_processor: Callable):
    """A model, and what prepares its input.

    Raises:
        InputError: they cannot be opened, or the file lacks some of the weights.
    """
    try:
        model, loading = open_model()
        processor = open_processor()
    except Exception as error:  # transformers raises a dozen types for files that are missing or of another model
        where = "" if Path(name).exists() else ": it is no folder, nor is it in the cache or to be had from the Hub"
        raise InputError(
            f"{option} {name}: transformers cannot open it as {what}{where} ({in_one_line(error).rstrip('.')})."
        ) from error
    # transformers fills what the file lacks with random numbers and goes on.
    missing = sorted(loading["missing_keys"])
    require(not missing, f"{option} {name} has no weights for {len(missing)} tensors of {what}, as {missing[:1]}.")
    return model, processor


def _fingerprint(model: torch.nn.Module, image_processor, more: str = "") -> str:
    from noisycond.first_stage import state_hash

    told = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"{state_hash(model)} {told} {more}".encode()).hexdigest()
