"""Annotators: colours of masks, SAM and BLIP through transformers, captions without a model, and their flags."""

import shutil
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_annotators import POSITIONS, tiny_blip, tiny_sam
from tiny_text import WORDS

from noisycond.arguments import SourceArguments, parse_arguments
from noisycond.data import digit_captions
from noisycond.data.annotation import AnnotationArguments, Captioner, Segmenter, described, open_annotators, painted
from noisycond.data.controls import canny_edges, threshold_mask
from noisycond.data.sources import Digits, open_source
from noisycond.errors import InputError


@dataclass
class Both(SourceArguments, AnnotationArguments):
    pass


def arguments(*words) -> Both:
    words = list(map(str, words))
    return parse_arguments(Both, words if {"--dataset_name"} & {*words} else ["--dataset_name", "digits", *words])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {"sam": tiny_sam(root / "sam"), "blip": tiny_blip(root / "blip")}


@pytest.fixture(scope="module")
def digits() -> list[Image.Image]:
    source = Digits("train")
    return [source.read(index, 32) for index in range(3)]


# Colours of masks


def square(left: int, top: int, side: int) -> np.ndarray:
    mask = np.zeros((12, 20), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_larger_masks_are_painted_first():
    small, large, apart = square(4, 4, 3), square(2, 2, 8), square(14, 1, 4)
    picture = np.array(painted([small, large, apart], (20, 12), seed=0, index=5))
    assert picture.shape == (12, 20, 3)
    colours = [picture[place] for place in ((5, 5), (2, 2), (2, 15))]
    assert len({tuple(colour) for colour in colours}) == 3
    assert (picture[small] == colours[0]).all() and (picture[large & ~small] == colours[1]).all()
    assert (picture[~(small | large | apart)] == 0).all() and (picture[small | large | apart].min() > 0)
    other_order = np.array(painted([apart, large, small], (20, 12), seed=0, index=5))
    assert (other_order == picture).all()


def test_a_colour_depends_on_seed_example_and_place_alone():
    large, small = square(2, 2, 8), square(4, 4, 3)
    first, alone = (np.array(painted(masks, (20, 12), 0, 5)) for masks in ([large, small], [large]))
    assert (first[2, 2] == alone[2, 2]).all()
    for seed, index in ((1, 5), (0, 6)):
        assert (np.array(painted([large], (20, 12), seed, index))[2, 2] != alone[2, 2]).any()


def test_an_image_without_masks_is_black():
    assert np.array(painted([], (20, 12), 0, 0)).max() == 0


# SAM


def sam(models, *words) -> AnnotationArguments:
    loose = ["--sam_pred_iou_thresh", 0, "--sam_stability_score_thresh", 0, "--sam_points_per_side", 2]
    return arguments("--annotations", "sam", "--sam_model", models["sam"], *(words or loose))


def test_sam_segments(models, digits):
    segmenter = Segmenter(sam(models))
    pictures = segmenter(digits, range(3))
    assert all(picture.size == (32, 32) and picture.mode == "RGB" for picture in pictures)
    found = segmenter.generate(digits, **segmenter.options)
    assert max(len(each["masks"]) for each in found) > 1
    for index, each in enumerate(found):
        covered = np.any(each["masks"], axis=0)
        assert ((np.array(pictures[index]).max(-1) > 0) == covered).all() and covered.any()
    first = np.array(pictures[0])
    assert len({tuple(colour) for colour in first[first.any(-1)]}) == 2  # of a large mask and a small one
    alone = segmenter(digits[2:3], [2])
    assert (np.array(alone[0]) == np.array(pictures[2])).all()  # whatever else is in the batch
    assert (np.array(segmenter(digits[:1], [7])[0])[first.any(-1)] != first[first.any(-1)]).any()  # by the example
    assert np.array(Segmenter(sam(models, "--sam_points_per_side", 1))(digits, range(3))).max() == 0  # rated too low


# BLIP


def blip(models, *words) -> AnnotationArguments:
    return arguments("--annotations", "caption", "--caption_model", models["blip"], *words)


def test_blip_captions(models, digits):
    captions = Captioner(blip(models, "--caption_max_tokens", 6))(digits, range(3))
    assert len(captions) == 3 and len(set(captions)) > 1
    words = {word.strip(".") for caption in captions for word in caption.split()}
    assert words and words <= set(WORDS.split()) | {""}
    longer = Captioner(blip(models, "--caption_max_tokens", 12))(digits, range(3))
    assert all(long.startswith(short) for long, short in zip(longer, captions, strict=True)) and longer != captions


def test_a_prompt_begins_every_caption(models, digits):
    captions = Captioner(blip(models, "--caption_prompt", "a big", "--caption_max_tokens", 6))(digits, range(3))
    assert all(caption.startswith("a big ") for caption in captions) and len(set(captions)) > 1


def test_sam_in_half_precision(models, digits):
    for dtype in ("float16", "bfloat16"):
        loose = ["--sam_pred_iou_thresh", 0, "--sam_stability_score_thresh", 0, "--sam_points_per_side", 2]
        segmenter = Segmenter(sam(models, *loose, "--torch_dtype", dtype))
        assert segmenter.generate.model.dtype == getattr(torch, dtype)
        assert any(np.array(picture).any() for picture in segmenter(digits, range(3)))


def test_half_precision(models, digits):
    captioner = Captioner(blip(models, "--torch_dtype", "bfloat16", "--caption_max_tokens", 3))
    assert captioner.model.dtype == torch.bfloat16 and len(captioner(digits, range(3))) == 3
    assert captioner.fingerprint != Captioner(blip(models, "--caption_max_tokens", 3)).fingerprint


def test_more_tokens_than_the_model_takes(models):
    with pytest.raises(
        InputError, match=f"--caption_max_tokens is {POSITIONS}, but --caption_model .* takes 24 tokens"
    ):
        Captioner(blip(models, "--caption_max_tokens", POSITIONS))


# Models that are none


@pytest.mark.parametrize("kind, other", [("sam", "blip"), ("blip", "sam")])
def test_a_model_of_another_kind_is_refused(models, kind, other):
    flag, args = {"sam": ("--sam_model", sam), "blip": ("--caption_model", blip)}[kind]
    with pytest.raises(InputError, match=f"{flag} {models[other]}: transformers cannot open it as a .*{kind.upper()}"):
        open_annotators(args(models | {kind: models[other]}), Digits())
    with pytest.raises(InputError, match=f"{flag} nowhere/at-all: .* no folder, nor is it in the cache"):
        open_annotators(args(models | {kind: "nowhere/at-all"}), Digits())


@pytest.mark.parametrize("kind, part", [("sam", "mask_decoder"), ("blip", "text_decoder")])
def test_a_model_without_some_weights_is_refused(models, tmp_path, kind, part):
    path = shutil.copytree(models[kind], tmp_path / kind) / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not name.startswith(part)}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(InputError, match=f"{path.parent} has no weights for"):
        open_annotators({"sam": sam, "blip": blip}[kind](models | {kind: str(path.parent)}), Digits())


# Without a model


def test_edges_and_masks_are_those_of_controls(digits):
    opened = open_annotators(
        arguments("--annotations", "mask", "canny", "--canny_low", 30, "--canny_high", 60), Digits()
    )
    assert list(opened.by_column) == ["canny", "mask"] and opened.facts == {}
    edges, masks = (annotate(digits, range(3)) for annotate in opened.by_column.values())
    for image, edge, mask in zip(digits, edges, masks, strict=True):
        assert (np.array(edge) == np.array(canny_edges(image, 30, 60))).all()
        assert (np.array(mask) == np.array(threshold_mask(image))).all()
    assert any(
        (np.array(edge) != np.array(canny_edges(image))).any() for image, edge in zip(digits, edges, strict=True)
    )


def captions_of(source, *words) -> list[str]:
    args = arguments("--annotations", "caption", *words)
    return open_annotators(args, source).by_column["caption"]([], range(len(source)))


def test_digits_have_captions_of_their_own():
    source = Digits("test")
    captions = captions_of(source)
    assert all(mine in known for mine, known in zip(captions, digit_captions.captions_of(source), strict=True))
    assert (
        len(set(captions)) > 100 and captions != captions_of(source, "--seed", 1) and captions == captions_of(source)
    )
    assert captions_of(source, "--caption_template", "a {}!")[:2] == [f"a {label}!" for label in source.labels[:2]]


def folder_of(tmp_path, names, **columns):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    features |= {name: datasets.Value("string") for name in columns}
    rows = {"image": [Image.new("RGB", (8, 8))] * 3, "label": [1, 0, 1]} | columns
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(tmp_path / "set"))
    return ["--dataset_name", tmp_path / "set", "--annotations", "caption"]


def test_templates_take_the_names_of_classes(tmp_path):
    words = folder_of(tmp_path, ["great_white_shark", "tench, Tinca tinca"])
    source = open_source(arguments(*words))
    tench, shark = "a photo of a tench", "a photo of a great white shark"
    assert captions_of(source, *words) == [tench, shark, tench]
    assert captions_of(source, *words, "--caption_template", "{} and {0}")[1] == "great white shark and {0}"


def test_captions_of_a_column(tmp_path):
    words = folder_of(tmp_path, ["a", "b"], text=["one", None, "three"])
    assert captions_of(open_source(arguments(*words)), *words, "--caption_column", "text") == ["one", "", "three"]
    with pytest.raises(InputError, match="--caption_column txt: .*did you mean 'text'"):
        captions_of(open_source(arguments(*words)), *words, "--caption_column", "txt")


def test_one_of_several_captions_is_drawn_among_those_that_are_not_empty():
    source = Digits("test")
    lists = [["", f"{index}", "", f"{index}!"] for index in range(len(source))]
    source.captions = lambda column: lists
    assert {caption[-1] == "!" for caption in captions_of(source)} == {False, True}
    assert all(caption.rstrip("!") == f"{index}" for index, caption in enumerate(captions_of(source)))


def test_ids_of_wordnet_make_no_captions(tmp_path):
    words = folder_of(tmp_path, ["n01440764", "n01443537"])
    with pytest.raises(InputError, match="ids of WordNet .n01440764.* give --caption_model"):
        captions_of(open_source(arguments(*words)), *words)


def test_no_classes_make_no_captions(tmp_path):
    words = folder_of(tmp_path, ["a", "b"])
    args = arguments(*words)
    args.label_column = None
    with pytest.raises(InputError, match="--annotations caption: the dataset has no classes"):
        captions_of(open_source(args), *words)


def test_the_facts_tell_captions_apart(tmp_path):
    source = Digits("test")
    facts = [open_annotators(arguments("--seed", seed), source).facts for seed in (0, 0, 1)]
    assert facts[0] == facts[1] != facts[2]


def test_a_card_tells_the_columns(models):
    told = described(sam(models, "--sam_points_per_side", 7))
    assert list(told) == ["sam"] and "masks of sam, 7 points a side" in told["sam"]
    assert "begun with “a big”" in described(blip(models, "--caption_prompt", "a big"))["caption"]
    told = described(arguments("--canny_low", 3))
    assert list(told) == ["caption", "canny", "mask"] and "thresholds 3 and 200" in told["canny"]
    assert "digits' own" in told["caption"]


# Flags


CASES = [
    (["--annotations", "cany"], ["--annotations cany", "canny, caption, mask, sam", "'canny'"]),
    (["--annotations", "canny", "canny"], ["canny is named twice"]),
    (["--annotations", "sam"], ["--annotations sam needs --sam_model"]),
    (["--sam_model", "x"], ["--sam_model has no effect without --annotations sam"]),
    (["--annotations", "mask", "--canny_low", "5"], ["--canny_low has no effect without --annotations canny"]),
    (["--canny_low", "300"], ["--canny_low is 300", "--canny_high is 200", "must not be above"]),
    (["--canny_low", "-1"], ["--canny_low is -1", "nor negative"]),
    (["--caption_prompt", "a"], ["--caption_prompt has no effect without --caption_model"]),
    (["--annotations", "mask", "--caption_template", "{}"], ["--caption_template has no effect"]),
    (["--caption_template", "a"], ["--caption_template is 'a'", "{}"]),
    (["--caption_template", "{}", "--caption_model", "x"], ["--caption_model and --caption_template contradict"]),
    (["--caption_column", "text"], ["--caption_column has no effect with --dataset_name digits"]),
    (["--torch_dtype", "float16"], ["--torch_dtype has no effect without a model"]),
    (["--annotation_batch_size", "0"], ["--annotation_batch_size is 0"]),
    (["--annotations", "sam", "--sam_model", "x", "--sam_pred_iou_thresh", "1.5"], ["--sam_pred_iou_thresh is 1.5"]),
    (["--seed", "-1"], ["--seed is -1"]),
]


@pytest.mark.parametrize("flags, words", CASES, ids=[" ".join(flags) for flags, _ in CASES])
def test_flag(flags, words):
    with pytest.raises(InputError) as caught:
        arguments(*flags)
    for word in words:
        assert word in str(caught.value)
