"""generate.py and evaluate_model.py on text-to-image pipelines: every image has its prompt, from start to score."""

import hashlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from forking import finished
from huggingface_hub import ModelCard
from PIL import Image
from released_layout import write_ldm
from tiny_models import save_tiny_clip, tiny_text_pipeline

from noisycond import sampling
from noisycond.data.digit_captions import digit_prompts
from noisycond.errors import InputError
from noisycond.evaluation import gallery
from noisycond.evaluation.agreement import ClipScore
from noisycond.evaluation.in_training import TextEvaluationArguments, TrainingEvaluation, evaluation_prompts


FAST = ["--num_inference_steps", 2, "--cpu_threads_per_process", 1]
TEXTS = ["a cat", "the dog", "zzz"]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """A text-to-image pipeline with random weights, images of 16×16; not to be written to."""
    return tiny_text_pipeline(tmp_path_factory.mktemp("text") / "sd")


@pytest.fixture(scope="session")
def class_pipeline(tmp_path_factory) -> Path:
    """A class-conditional pipeline with random weights, images of 16×16."""
    return write_ldm(tmp_path_factory.mktemp("class") / "ldm")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_tiny_clip(folder)
    return folder


@pytest.fixture
def three(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    return tmp_path / "prompts.txt"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.png"))}


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text())["rows"]


def values(row: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in row["metrics"].items()}


def test_each_image_has_its_prompt_on_any_number_of_processes_and_after_a_resume(pipeline, three, script, tmp_path):
    words = ["--pipeline", pipeline, "--prompts", three, "--num_images", 11, "--batch_size", 4, *FAST]
    script("generate", *words, "--output_dir", tmp_path / "one")
    one = digests(tmp_path / "one")
    rows = listed(tmp_path / "one")
    assert [row["text"] for row in rows] == [TEXTS[number % 3] for number in range(11)]
    assert all(row.keys() == {"file_name", "text"} for row in rows) and len(set(one.values())) == 11
    done = finished("generate", *words, "--output_dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert digests(tmp_path / "two") == one and listed(tmp_path / "two") == rows
    (tmp_path / "one/000005.png").unlink()
    script("generate", *words, "--output_dir", tmp_path / "one")
    assert digests(tmp_path / "one") == one

    # As `datasets` opens a folder of images; and drawn by hand with the text that is listed.
    again = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "one"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert again["text"][:] == [row["text"] for row in rows]
    opened = sampling.open_pipeline(str(pipeline))
    options = {"seed": 0, "guidance_scale": 4.0, "num_inference_steps": 2}
    by_hand = sampling.sample(opened, [row["text"] for row in rows[4:8]], range(4, 8), **options)
    assert [image.tobytes() for image in by_hand] == [
        Image.open(tmp_path / "one" / row["file_name"]).tobytes() for row in rows[4:8]
    ]


def test_other_prompts_are_refused_in_a_folder(pipeline, three, script, refused, tmp_path):
    words = ["--pipeline", pipeline, "--num_images", 3, *FAST, "--output_dir", tmp_path / "x", "--prompts"]
    script("generate", *words, three)
    before = digests(tmp_path / "x")
    (tmp_path / "other.txt").write_text("a cat\nthe dog\nzz\n")
    assert "the prompts are others now" in refused("generate", *words, tmp_path / "other.txt")
    (tmp_path / "same.txt").write_text("".join(text + "\n" for text in TEXTS))
    script("generate", *words, tmp_path / "same.txt")
    assert digests(tmp_path / "x") == before


def test_random_prompts_and_labels(pipeline, script, tmp_path):
    words = ["--pipeline", pipeline, "--num_images", 40, "--prompts", "digits:seen", "--class_sampling", "random"]
    script("generate", *words, *FAST, "--num_inference_steps", 1, "--output_dir", tmp_path / "x", "--seed", 3)
    rows, known = listed(tmp_path / "x"), dict(digit_prompts("seen"))
    assert all(known[row["text"]] == row["label"] for row in rows)
    drawn = [list(known).index(row["text"]) for row in rows]
    assert drawn == sampling.random_labels(40, len(known), 3).tolist() and len(set(drawn)) > 10


@pytest.mark.parametrize(
    "script_name, flags, words",
    [
        (
            "generate",
            ["--pipeline", "TEXT"],
            ["StableDiffusionPipeline draws from prompts", "give --prompts"],
        ),
        ("generate", ["--pipeline", "CLASS", "--prompts", "digits"], ["--prompts has no effect", "class labels"]),
        ("generate", ["--pipeline", "TEXT", "--prompts", "/nowhere.txt"], ["--prompts /nowhere.txt", "no such file"]),
        ("generate", ["--pipeline", "TEXT", "--prompt_column", "a"], ["--prompt_column has no effect without"]),
        ("generate", ["--pipeline", "TEXT", "--prompt_split", "a"], ["--prompt_split has no effect without"]),
        ("evaluate_model", ["--pipeline", "TEXT"], ["draws from prompts"]),
        ("evaluate_model", ["--pipeline", "CLASS", "--prompts", "digits"], ["--prompts has no effect"]),
        (
            "evaluate_model",  # before the first is drawn from
            ["--pipeline", "TEXT", "CLASS", "--prompts", "digits", "--num_images", "30", "--metrics", "fid", *FAST],
            ["--prompts has no effect on --pipeline", "LDMClassToImagePipeline draws from class labels"],
        ),
        (
            "evaluate_model",
            ["--pipeline", "CLASS", "TEXT", "--num_images", "30", "--metrics", "fid", *FAST],
            ["StableDiffusionPipeline draws from prompts"],
        ),
        (
            "evaluate_model",
            ["--pipeline", "CLASS", "/nowhere", "--num_images", "30", "--metrics", "fid", *FAST],
            ["--pipeline /nowhere: diffusers cannot open it"],
        ),
        (
            "evaluate_model",
            ["--images", "TEXT", "--prompts", "digits"],
            ["--prompts has no effect without --pipeline"],
        ),
        (
            "evaluate_model",
            ["--pipeline", "TEXT", "--prompts", "digits", "--walk_class", "0"],
            ["--walk_class has no effect with --prompts: the walk is that of a prompt", "; leave it off."],
        ),
        (
            "evaluate_model",
            [
                "--pipeline",
                "TEXT",
                "--prompts",
                "digits",
                "--no_figures",
                "--walk_prompt",
                "a",
                "--num_images",
                "30",
                *FAST,
            ],
            ["--walk_prompt has no effect with --no_figures"],
        ),
        (
            "evaluate_model",
            ["--pipeline", "CLASS", "--walk_prompt", "a"],
            ["--walk_prompt has no effect without --prompts"],
        ),
        (
            "evaluate_model",
            ["--pipeline", "TEXT", "--prompts", "digits", "--clip_prompt", "{}", "--metrics", "clip_score"],
            ["--clip_prompt has no effect with --prompts"],
        ),
        (
            "evaluate_model",
            ["--pipeline", "TEXT", "--prompts", "THREE", "--metrics", "class_agreement"],
            ["class_agreement", "no labels", "prompts that have labels"],
        ),
    ],
)
def test_bad_input(pipeline, class_pipeline, three, refused, tmp_path, script_name, flags, words):
    places = {"TEXT": pipeline, "CLASS": class_pipeline, "THREE": three}
    flags = [str(places.get(flag, flag)) for flag in flags]
    if script_name == "evaluate_model":
        flags += ["--reference", "digits"]
    sentence = refused(script_name, *flags, "--output_dir", tmp_path / "x")
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").rglob("*.png"))


def test_an_evaluation_on_prompts_of_the_digits(pipeline, clip_folder, script, tmp_path):
    card = "---\nlibrary_name: diffusers\n---\n"
    copy = tiny_text_pipeline(tmp_path / "text")
    (copy / "README.md").write_text(card)
    words = ["--pipeline", f"a={copy}", "--reference", "digits", "--prompts", "digits", "--num_images", 30, *FAST]
    words += ["--guidance_scale", 3, "--update_card", "--output_dir", tmp_path / "x", "--clip_model", clip_folder]
    metrics = ["fid", "recall", "rmd_top", "class_agreement", "clip_score", "lpips_diversity", "memorization_ratio"]
    script("evaluate_model", *words, "--metrics", *metrics)
    rows = results(tmp_path / "x")
    assert values(rows[0]).keys() == set(metrics)
    told = json.loads((tmp_path / "x/metrics.json").read_text())["settings"]["generated"]["prompts"]
    assert told["name"] == "digits" and told["prompts"] == len(digit_prompts("unseen"))
    for name in ("samples.png", "walk-a.png", "walk-a.webp", "memorized-a.png"):
        assert (tmp_path / "x" / name).stat().st_size > 100, name
    found = ModelCard.load(copy / "README.md").data.eval_results
    assert {result.task_type for result in found} == {"text-to-image"}
    assert found[0].metric_args["prompts"] == "digits"

    # By the texts, not by the template, and the same through --images, where the folder has texts.
    drawn = tmp_path / "x/images/a/guidance-3-seed-0"
    pictures = [Image.open(drawn / row["file_name"]).convert("RGB") for row in listed(drawn)]
    expected = ClipScore(str(clip_folder)).score(pictures, [row["text"] for row in listed(drawn)]).mean().item()
    assert values(rows[0])["clip_score"] == pytest.approx(expected, abs=1e-3)
    words = ["--images", drawn, "--reference", "digits", "--metrics", *metrics, "--clip_model", clip_folder]
    script("evaluate_model", *words, "--no_figures", "--output_dir", tmp_path / "y")
    assert values(results(tmp_path / "y")[0]) == pytest.approx(values(rows[0]))


def test_the_walk_goes_by_the_prompt_that_was_named(pipeline, three, script, tmp_path, monkeypatch):
    walked = []

    def walk(opened, condition, **options):
        walked.append(condition)
        return [Image.new("RGB", (16, 16))]

    monkeypatch.setattr(gallery, "circular_walk", walk)
    words = ["--pipeline", f"a={pipeline}", "--prompts", three, "--num_images", 6, "--guidance_scale", 2, *FAST]
    words += ["--metrics", "entropy", "--feature_extractor", "digits", "--output_dir", tmp_path / "x"]
    script("evaluate_model", *words)
    script("evaluate_model", *words, "--walk_prompt", "a sea")
    assert walked == [TEXTS[0], "a sea"]


def test_a_template_where_all_images_have_texts_is_refused(pipeline, three, clip_folder, script, refused, tmp_path):
    flags = ["--pipeline", pipeline, "--prompts", three, "--num_images", 3, *FAST, "--output_dir", tmp_path / "x"]
    script("generate", *flags)
    words = ["--images", tmp_path / "x", "--feature_extractor", "digits", "--metrics", "clip_score"]
    words += ["--clip_model", clip_folder, "--no_figures", "--output_dir", tmp_path / "y"]
    assert "--clip_prompt has no effect on these images" in refused("evaluate_model", *words, "--clip_prompt", "a {}")
    script("evaluate_model", *words)
    assert values(results(tmp_path / "y")[0]).keys() == {"clip_score"}
    (tmp_path / "x/metadata.jsonl").write_text("".join(f'{{"file_name": "00000{n}.png"}}\n' for n in range(3)))
    assert "neither texts nor labels" in refused("evaluate_model", *words[:-1], tmp_path / "z")


class TestDuringTraining:
    """An evaluation as a training script of a text-to-image model calls it."""

    def arguments(self, **flags) -> SimpleNamespace:
        chosen = TextEvaluationArguments(eval_steps=2, eval_num_images=20, **flags)
        of_training = {"dataset_name": "digits", "resolution": 16, "seed": 0, "output_dir": "runs/x"}
        of_training |= {"validation_guidance_scale": 2.0, "validation_inference_steps": 2}
        return SimpleNamespace(**{**vars(chosen), **of_training})

    def test_digits_are_the_default(self, pipeline, clip_folder):
        metrics = ["fid", "class_agreement", "clip_score"]
        args = self.arguments(eval_metrics=metrics, eval_clip_model=str(clip_folder))
        prompts = evaluation_prompts(args)
        assert prompts.name == "digits:unseen"
        evaluation = TrainingEvaluation(args, prompts=prompts)
        evaluation.prepare(torch.device("cpu"))
        row = evaluation(sampling.open_pipeline(str(pipeline)))
        assert row.keys() == {*metrics, "settings"} and row["settings"]["prompts"] == prompts.settings()
        assert evaluation._results({"fid": 1.0})[0].task_type == "text-to-image"

        args.eval_num_images = 7
        images = sampling.sample_all(
            sampling.open_pipeline(str(pipeline)), prompts.texts[:7], seed=0, guidance_scale=2.0, num_inference_steps=2
        )
        expected = ClipScore(str(clip_folder)).score(images, prompts.texts[:7]).mean().item()
        assert evaluation(sampling.open_pipeline(str(pipeline)))["clip_score"] == pytest.approx(expected, abs=1e-3)

    def test_texts_without_labels(self, pipeline, three, caplog):
        args = self.arguments(eval_prompts=str(three), eval_metrics=["fid", "class_agreement"])
        with pytest.raises(InputError, match="--eval_metrics class_agreement: the images have no labels"):
            TrainingEvaluation(args, prompts=evaluation_prompts(args)).prepare(torch.device("cpu"))
        args.eval_metrics = ["fid", "recall"]
        evaluation = TrainingEvaluation(args, prompts=evaluation_prompts(args))
        evaluation.prepare(torch.device("cpu"))
        with caplog.at_level(logging.WARNING):
            assert evaluation(sampling.open_pipeline(str(pipeline))).keys() == {"fid", "recall", "settings"}

    @pytest.mark.parametrize(
        "flags, words",
        [
            ({"eval_steps": 0, "eval_prompts": "digits"}, "--eval_prompts has no effect without --eval_steps"),
            (
                {"eval_steps": 1, "eval_prompt_split": "a"},
                "--eval_prompt_split has no effect without --eval_prompts",
            ),
            ({"eval_steps": 1, "eval_clip_model": "a"}, "--eval_clip_model has no effect without --eval_metrics clip"),
        ],
    )
    def test_flags_without_effect(self, flags, words):
        with pytest.raises(InputError, match=words):
            TextEvaluationArguments(**flags)

    def test_prompts_are_needed(self):
        args = self.arguments()
        args.dataset_name = "somebody/captions"
        with pytest.raises(InputError, match="--eval_steps needs --eval_prompts"):
            evaluation_prompts(args)
