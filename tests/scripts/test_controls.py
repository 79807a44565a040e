"""Drawing after control images and measuring how they are obeyed: adapter folders and whole pipelines, class labels
and captions, folders measured again, during training; and sentences for bad input."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_controls import tiny_adapter_folder, tiny_adapter_pipeline
from tiny_models import tiny_text_pipeline

from noisycond import sampling
from noisycond.arguments import SamplingArguments
from noisycond.control_pipelines import open_control_pipeline
from noisycond.control_set import open_controls
from noisycond.data.digit_captions import captions_of
from noisycond.data.sources import Digits
from noisycond.errors import InputError
from noisycond.evaluation.control import DrawnAfter, Obedience, edge_f1
from noisycond.evaluation.in_training import (
    ControlEvaluationArguments,
    EvaluationArguments,
    TrainingEvaluation,
    evaluation_controls,
)
from noisycond.generation import open_for_drawing


FAST = ["--num_inference_steps", 2, "--batch_size", 5, "--cpu_threads_per_process", 1]
EDGES = ["edge_f1", "edge_f1_shuffled"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    kinds = {"classes": "class labels", "texts": "captions"}
    return {name: tiny_adapter_folder(root / name, condition) for name, condition in kinds.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny_adapter_pipeline(tmp_path_factory.mktemp("whole") / "sd")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny_text_pipeline(tmp_path_factory.mktemp("plain") / "sd")


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text())["rows"]


def values(row: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in row["metrics"].items()}


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_each_image_is_drawn_after_an_example_and_can_be_measured_again(adapters, kind, script, tmp_path):
    adapter, digits = adapters[kind], Digits("test")
    words = ["--pipeline", adapter, "--controls", "digits", "--num_images", 12, "--guidance_scale", 2, *FAST]
    words += ["--conditioning_scale", 0.5, "--reference", "digits", "--metrics", "class_agreement", *EDGES]
    (adapter / "README.md").write_text("# An adapter\n")
    words += ["--update_card"]
    script("evaluate_model", *words, "--output_dir", tmp_path / "x")
    folder = next((tmp_path / "x/images").glob("*/guidance-2-seed-0"))
    told = listed(folder)
    places = range(0, 360, 30)  # of 360 examples, for 12 images
    assert [row["label"] for row in told] == digits.labels[places].tolist()
    assert told[3]["control_file_name"] == "controls/000090.png"
    drawn = pixels(Image.open(folder / row["file_name"]) for row in told)
    saved = [Image.open(folder / row["control_file_name"]) for row in told]
    assert np.array_equal(pixels(saved), pixels(digits.control("canny", number, 16) for number in places))

    conditions = digits.labels[places].tolist()
    if kind == "texts":
        conditions = [captions_of(digits)[place][0] for place in places]
        assert [row["text"] for row in told] == conditions
    options = {"seed": 0, "guidance_scale": 2.0, "num_inference_steps": 2, "batch_size": 5}
    by_hand = sampling.sample_all(
        open_control_pipeline(str(adapter)), conditions, controls=saved, conditioning_scale=0.5, **options
    )
    assert np.array_equal(drawn, pixels(by_hand))

    (row,) = rows(tmp_path / "x")
    given = Obedience(DrawnAfter(range(12), saved.__getitem__, "canny"), by_hand.__getitem__)
    expected = edge_f1(given, tolerance=1, low=100, high=200)
    assert values(row).keys() == {"class_agreement", *EDGES}
    assert {name: values(row)[name] for name in EDGES} == {name: expected[name].value for name in EDGES}
    settings = json.loads((tmp_path / "x/metrics.json").read_text())["settings"]
    shared = {"name": "digits", "split": "test", "examples": 360, "conditioning_scale": 0.5}
    assert settings["generated"]["controls"].items() >= shared.items()
    assert settings["generated"]["controls"]["columns"][str(adapter)]["column"] == "canny"
    base = f"{adapter}-base"
    assert settings["generated"]["base_pipeline"] == {str(adapter): base}
    made = json.loads((folder / "generation.json").read_text())
    assert made["base_pipeline"] == base and made["controls"]["conditioning_scale"] == 0.5
    assert settings["options"].items() >= {"edge_tolerance": 1, "canny_low": 100, "canny_high": 200}.items()
    for name in (f"controls-{kind}.png", f"walk-{kind}.png", "samples.png"):
        assert (tmp_path / "x" / name).stat().st_size > 100, name

    again = ["--images", folder, "--feature_extractor", "digits", "--metrics", *EDGES, "--output_dir", tmp_path / "y"]
    script("evaluate_model", *again, "--bootstrap", 40)
    assert values(rows(tmp_path / "y")[0]) == {name: expected[name].value for name in EDGES}
    low, high = rows(tmp_path / "y")[0]["metrics"]["edge_f1"]["interval"]
    assert low < expected["edge_f1"].value < high
    assert len(list((tmp_path / "y").glob("controls-*.png"))) == 1
    made["controls"]["made_with"] = {"canny_low": 90, "canny_high": 210}
    (folder / "generation.json").write_text(json.dumps(made))
    script("evaluate_model", *again, "--edge_tolerance", 3, "--no_figures", "--canny_high", 200)
    assert values(rows(tmp_path / "y")[0])["edge_f1"] > expected["edge_f1"].value
    options = json.loads((tmp_path / "y/metrics.json").read_text())["settings"]["options"]
    assert options["canny_low"] == 90 and options["canny_high"] == 200
    card = (adapter / "README.md").read_text()
    assert "conditioning_scale: 0.5" in card and f"base_pipeline: {Path(base).name}" in card


def test_a_folder_of_controlled_images_goes_on_and_is_not_mixed(adapters, script, refused, tmp_path):
    words = ["--pipeline", adapters["classes"], "--controls", "digits", *FAST]
    spread = tmp_path / "spread"
    script("generate", *words, "--num_images", 2, "--output_dir", spread)
    said = refused("generate", *words, "--num_images", 3, "--output_dir", spread)
    assert "its 2 images are spread over the 360 controls, and 3 would be spread otherwise" in said
    words += ["--class_sampling", "random"]
    script("generate", *words, "--num_images", 10, "--output_dir", tmp_path / "once")
    script("generate", *words, "--num_images", 7, "--output_dir", tmp_path / "parts")
    control = next((tmp_path / "parts/controls").iterdir())
    before = control.stat().st_mtime_ns
    (tmp_path / "parts/000001.png").unlink()
    script("generate", *words, "--num_images", 10, "--output_dir", tmp_path / "parts")
    assert control.stat().st_mtime_ns == before
    once, parts = tmp_path / "once", tmp_path / "parts"
    files = sorted(path.relative_to(once) for path in once.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(parts) for path in parts.rglob("*") if path.is_file())
    assert all((once / name).read_bytes() == (parts / name).read_bytes() for name in files)
    digits, places = Digits("test"), open_controls("--controls", "digits").places(10, "random", 0)
    assert [row["label"] for row in listed(once)] == digits.labels[places].tolist()

    other = [*words, "--num_images", 10, "--output_dir", parts]
    assert "--conditioning_scale was 1.0 and is 0.0" in refused("generate", *other, "--conditioning_scale", 0)
    assert "the controls are others now" in refused("generate", *other, "--controls_split", "train")
    assert "the controls are others now" in refused("generate", *other, "--control_column", "mask")


def test_bad_input_is_one_sentence(adapters, whole, plain, refused, tmp_path):
    def sentence(pipeline, *words, script="generate"):
        return refused(script, "--pipeline", pipeline, *words, *FAST, "--output_dir", tmp_path / "x")

    classes, controls = adapters["classes"], ["--controls", "digits"]
    for drawer in (classes, whole):
        assert "draws after control images; give --controls" in sentence(drawer)
    assert "--controls has no effect on --pipeline" in sentence(plain, *controls)
    assert "--base_pipeline has no effect on --pipeline" in sentence(whole, *controls, "--base_pipeline", plain)
    said = sentence(classes, *controls, "--base_pipeline", plain)
    assert f"--base_pipeline {plain}: it draws from prompts, but --pipeline {classes} is an adapter on class" in said
    assert "--control_column cany: " in sentence(classes, *controls, "--control_column", "cany")
    assert "--controls_split dev: digits has the splits" in sentence(classes, *controls, "--controls_split", "dev")
    assert "--controls ./none: there is no such folder" in sentence(classes, "--controls", "./none")
    assert "--controls_caption_column off" in sentence(classes, *controls, "--controls_caption_column", "text")
    assert "--prompts has no effect with --controls" in sentence(whole, *controls, "--prompts", "digits:seen")
    assert "--control_column has no effect without --controls" in sentence(plain, "--control_column", "mask")
    assert "--conditioning_scale is -1.0" in sentence(classes, *controls, "--conditioning_scale", -1)
    measured = [*controls, "--feature_extractor", "digits", "--no_figures", "--metrics"]
    said = sentence(classes, *measured, "mask_iou", script="evaluate_model")
    assert "--metrics mask_iou, mask_iou_shuffled: the controls are no masks" in said
    said = sentence(classes, *measured, "fid", "--edge_tolerance", 2, script="evaluate_model")
    assert "--edge_tolerance has no effect" in said
    said = sentence(classes, *measured, "edge_f1", "--sam_model", "x", script="evaluate_model")
    assert "--sam_model has no effect with these --metrics" in said
    said = sentence(classes, *measured, "edge_f1", "mask_iou", "--sam_model", "x", script="evaluate_model")
    assert "--sam_model has no effect without controls by `sam`" in said
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    for metrics in ([], ["--metrics", "edge_f1"]):
        said = refused("evaluate_model", "--images", tmp_path, *metrics, "--canny_low", 90, "--output_dir", tmp_path)
        assert "--canny_low has no effect without controls by `canny`" in said
    both = [f"{classes},{adapters['texts']}", *measured, "edge_f1"]
    said = sentence("a=" + both[0], *both[1:], script="evaluate_model")
    assert f"--pipeline {classes}: an adapter on class labels draws from class labels, but another --pipeline" in said
    said = sentence(f"a={adapters['texts']},{whole}", *both[1:], "--base_pipeline", plain, script="evaluate_model")
    assert "--base_pipeline has no effect on --pipeline" in said
    assert not (tmp_path / "x").exists()


def test_classes_are_those_that_adapter_or_base_names(adapters, accelerator, tmp_path):
    base, folder = Path(f"{adapters['classes']}-base"), tmp_path / "x"
    shutil.copytree(adapters["classes"], folder)
    facts = json.loads((folder / "adapter.json").read_text()) | {"class_names": list("9876543210")}
    (folder / "adapter.json").write_text(json.dumps(facts))
    shutil.copytree(base, tmp_path / "nameless")
    index = json.loads((base / "model_index.json").read_text())
    del index["id2label"]
    (tmp_path / "nameless/model_index.json").write_text(json.dumps(index))
    controls = open_controls("--controls", "digits")
    labels, others = controls.source.labels.tolist(), (9 - controls.source.labels).tolist()
    for other, expected in ((None, others), (str(tmp_path / "nameless"), others), (str(base), labels)):
        args = SamplingArguments(controls="digits", base_pipeline=other, num_inference_steps=2)
        opened = open_for_drawing(str(folder), args, accelerator, None, controls)
        assert opened.control_labels.tolist() == expected and opened.base == (other or str(base))


def dataset(folder: Path, **columns) -> Path:
    """As prepare_dataset.py writes it: six images of 16×20, with controls beside them."""
    images = [Image.new("RGB", (16, 20), (40 * number,) * 3) for number in range(6)]
    controls = [Image.new("RGB", (16, 20), (0, 30 * number, 0)) for number in range(6)]
    content = {"image": images, "canny": controls} | columns
    features = {name: datasets.Image() for name in ("image", "canny")}
    if "label" in columns:
        features["label"] = datasets.ClassLabel(names=["7", "3"])
    features |= {name: datasets.Value("string") for name in content if name not in features}
    datasets.Dataset.from_dict(content, datasets.Features(features)).save_to_disk(folder)
    return folder


def test_examples_of_a_dataset_give_their_classes_by_name_and_their_captions(tmp_path):
    folder = dataset(tmp_path / "x", label=[0, 1, 1, 0, 0, 1], caption=list("abcdef"))
    made_with = {"canny_low": 50, "canny_high": 90}
    arguments = made_with | {"annotations": ["canny"], "sam_points_per_side": 32, "seed": 0}
    prepared = {"arguments": arguments, "facts": {"SAM model": "ab"}}
    (folder / "preparation.json").write_text(json.dumps(prepared))
    controls = open_controls("--controls", str(folder)).of_column("canny")
    assert controls.made_with == controls.settings()["made_with"] == made_with
    assert len(controls) == 6 and controls.split is None and controls.prompts is None
    names = [str(digit) for digit in range(10)]
    assert controls.labels(names, 10, "x").tolist() == [7, 3, 3, 7, 7, 3]
    assert controls.labels(None, 2, "x").tolist() == [0, 1, 1, 0, 0, 1]
    assert controls.labels(["3, three", "seven, 7"], 2, "x").tolist() == [1, 0, 0, 1, 1, 0]
    with pytest.raises(
        InputError, match=r"^--pipeline x: it does not know 2 of --controls .*x's 2 cl.*, for .*'7'\.$"
    ):
        controls.labels(["a", "b"], 2, "x")
    for number in (1, 3):
        with pytest.raises(InputError, match=rf"not say what its {number} labels mean, and .*x has 2 classes\.$"):
            controls.labels(None, number, "x")
    assert controls.places(4) == [0, 1, 3, 4] and controls.places(8) == [0, 1, 2, 3, 4, 5, 0, 1]
    assert controls.with_captions().prompts.texts == list("abcdef")
    assert controls.control(3, 16).size == (16, 16) and np.asarray(controls.control(3, 16)).max() == 90
    assert np.asarray(controls.target(3, 16)).max() == 120
    for draw in (lambda: controls.control(3, 8), lambda: controls.check(8)):
        with pytest.raises(InputError, match=r"^--control_column canny: .* 16 × 20 .* 8 a side .* --resolution 8\.$"):
            draw()
    assert controls.fingerprint != controls.with_captions().fingerprint

    nameless = open_controls("--controls", str(dataset(tmp_path / "y", caption=["a", "", *"cdef"]))).of_column("canny")
    with pytest.raises(InputError, match="its examples have no classes .*'label'.* draws from class labels"):
        nameless.labels(names, 10, "x")
    with pytest.raises(InputError, match=r"--controls_caption_column caption: .*y\[1\] has no caption"):
        nameless.with_captions()
    with pytest.raises(InputError, match="--control_column sam: the dataset .* has the columns"):
        nameless.of_column("sam")
    datasets.Dataset.from_dict({"picture": [1]}).save_to_disk(tmp_path / "z")
    with pytest.raises(
        InputError, match=r"^--controls .*z: the column 'image' is needed; the dataset .*z has the col"
    ):
        open_controls("--controls", str(tmp_path / "z"))


@dataclass
class Flags(EvaluationArguments, ControlEvaluationArguments):
    """As a training script has them."""

    dataset_name: str | None = "digits"


class TestDuringTraining:
    """An evaluation as a training script calls it."""

    def arguments(self, **flags) -> SimpleNamespace:
        chosen = vars(EvaluationArguments(eval_steps=2, eval_num_images=12, **flags))
        of_training = {"dataset_name": "digits", "resolution": 16, "seed": 0, "output_dir": "runs/x"}
        of_training |= {"pretrained_model_name_or_path": "runs/base"}
        of_training |= {"validation_guidance_scale": 2.0, "validation_inference_steps": 2, "control_column": "canny"}
        return SimpleNamespace(**chosen, **of_training, eval_controls=None, eval_controls_split=None)

    @pytest.mark.parametrize("kind", ["classes", "texts"])
    def test_digits_are_the_default(self, adapters, kind):
        args = self.arguments(eval_metrics=["class_agreement", *EDGES])
        controls = evaluation_controls(args, of_captions=kind == "texts")
        assert controls.settings().items() >= {"name": "digits", "split": "test", "column": "canny"}.items()
        names = {} if kind == "texts" else {"class_names": [str(digit) for digit in range(10)]}
        evaluation = TrainingEvaluation(args, controls=controls, **names)
        evaluation.prepare(torch.device("cpu"))
        pipeline = open_control_pipeline(str(adapters[kind]))
        row = evaluation(pipeline)
        assert row.keys() == {"class_agreement", *EDGES, "settings"}
        assert row["settings"]["controls"] == controls.settings()

        places = range(0, 360, 30)
        conditions = controls.captions[::30] if kind == "texts" else Digits("test").labels[places].tolist()
        given = [controls.control(place, 16) for place in places]
        options = {"seed": 0, "guidance_scale": 2.0, "num_inference_steps": 2}
        images = sampling.sample_all(pipeline, conditions, controls=given, **options)
        obedience = Obedience(DrawnAfter(range(12), given.__getitem__, "canny"), images.__getitem__)
        expected = edge_f1(obedience, tolerance=1, low=100, high=200)
        assert [row[name] for name in EDGES] == [expected[name].value for name in EDGES]

    def test_bad_input(self):
        args = self.arguments(eval_metrics=["mask_iou"])
        with pytest.raises(InputError, match="--eval_metrics mask_iou, mask_iou_shuffled: the controls are no masks"):
            names = [str(digit) for digit in range(10)]
            TrainingEvaluation(args, names, controls=evaluation_controls(args)).prepare(torch.device("cpu"))
        with pytest.raises(InputError, match="segmentations, which evaluate_model.py measures"):
            controls = replace(evaluation_controls(args), annotator="sam")
            TrainingEvaluation(args, names, controls=controls).prepare(torch.device("cpu"))
        with pytest.raises(
            InputError, match="--pretrained_model_name_or_path runs/base: it does not know 1 of --eval_c"
        ):
            TrainingEvaluation(args, names[:9], controls=controls).prepare(torch.device("cpu"))
        args.eval_controls = "./none"
        with pytest.raises(InputError, match="--eval_controls ./none: there is no such folder"):
            evaluation_controls(args)
        args.eval_controls, args.dataset_name = None, "x"
        with pytest.raises(InputError, match="--eval_steps needs --eval_controls"):
            evaluation_controls(args)

        with pytest.raises(InputError, match="--eval_controls has no effect without --eval_steps"):
            Flags(eval_controls="digits")
        with pytest.raises(InputError, match="--eval_controls_split has no effect without --eval_controls"):
            Flags(dataset_name="x", eval_steps=2, eval_controls_split="train")
        assert Flags(eval_steps=2, eval_controls_split="train").eval_controls_split == "train"
