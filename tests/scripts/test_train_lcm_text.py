"""train_lcm_distill.py: students of tiny text-to-image teachers, in process; test_train_lcm_distill.py has what all
teachers share."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler
from launching import load_script
from PIL import Image
from safetensors.torch import load_file, save_file
from text_pipelines import SIZE

from noisycond import pictures, sampling
from noisycond.arguments import parse_arguments
from noisycond.condition_kinds import arguments_class
from noisycond.evaluation.in_training import EvaluationArguments
from noisycond.training_state import AveragedWeights


SCRIPT = "train_lcm_distill"
PROMPTS = ["a 7", "thin"]


@pytest.fixture
def flags(text_folders, tmp_path):
    """Flags of a run of three steps from a small teacher of a family, on captioned digits, into tmp_path / "run"."""

    def of(kind: str, *more, **others) -> list[str]:
        values = {
            "pretrained_teacher_model": text_folders / kind,
            "recipe": "none",
            "dataset_name": "digits",
            "resolution": SIZE,
            "output_dir": tmp_path / "run",
            "train_batch_size": 4,
            "max_train_samples": 32,
            "max_train_steps": 3,
            "learning_rate": 1e-2,
            "corruption_ratio": 0.5,
            "report_to": "none",
            "num_validation_images": 1,
            "validation_inference_steps": 2,
            "cpu_threads_per_process": 1,
            **others,
        }
        words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
        return [*words, "--validation_prompts", *PROMPTS, *map(str, more)]

    return of


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(next((folder / part).glob("*.safetensors")))


def drawn(folder: Path) -> np.ndarray:
    return np.array(Image.open(folder / "samples/final.png"))


def grid(pipeline, guidance_scale: float) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"seed": 0, "guidance_scale": guidance_scale, "num_inference_steps": 2}
    images = sampling.sample_all(pipeline, PROMPTS, **settings)
    return np.array(pictures.image_grid(images, 1, scale=64 // images[0].width))


@pytest.mark.parametrize("kind", ["sd", "ldm"])
def test_leaves_a_pipeline_that_gives_the_images_of_training(kind, script, flags, text_folders, tmp_path, capsys):
    script(SCRIPT, *flags(kind, timestep_scaling_factor=5, resolution=2 * SIZE))  # another size than the teacher's
    folder, base = tmp_path / "run", text_folders / kind
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=kind == "ldm")
    assert isinstance(pipeline, LatentConsistencyModelPipeline) == (kind == "sd")
    assert type(pipeline).__name__ == {"sd": "LatentConsistencyModelPipeline"}.get(kind, "LDMTextToImagePipeline")
    assert np.array_equal(grid(pipeline, 11.0), drawn(folder))
    assert pipeline.unet.config.time_cond_proj_dim == 256 and pipeline.unet.config.sample_size == SIZE
    scheduler = pipeline.scheduler.config
    assert isinstance(pipeline.scheduler, LCMScheduler) and scheduler.timestep_scaling == 5
    assert scheduler.beta_end == 0.012 and not scheduler.clip_sample and scheduler.original_inference_steps == 50
    encoder = "bert" if kind == "ldm" else "text_encoder"
    assert all(torch.equal(value, weights(folder, encoder)[name]) for name, value in weights(base, encoder).items())
    before, after = weights(base, "unet"), weights(folder, "unet")
    assert set(after) - set(before) == {"time_embedding.cond_proj.weight"}
    assert not any(torch.equal(after[name], before[name]) for name in before if "to_k.weight" in name)
    kept = load_file(folder / "checkpoint-3/model.safetensors")
    assert kept and all(name.startswith("backbone.") for name in kept)
    said, card = capsys.readouterr().out, (folder / "README.md").read_text()
    for text in (said, card):
        assert 'pipeline(prompt="a 7", num_inference_steps=2, guidance_scale=11)' in text
        assert ("trust_remote_code=True" in text) == (kind == "ldm")
    assert f"base_model: {kind}" in card and "pipeline_tag: text-to-image" in card and "a 7; thin" in card
    assert 0 < json.loads((folder / "corruption.json").read_text())["examples_corrupted"] < 12


def test_lora_loads_as_the_run_says(script, flags, text_folders, tmp_path, capsys):
    script(SCRIPT, *flags("sd", "--use_lora", rank=2, learning_rate=0.3))
    folder = tmp_path / "run"
    assert not (folder / "model_index.json").exists() and not (folder / "unet").exists()
    told = capsys.readouterr().out.split("Load it where only diffusers")[1].split("installed:")[1]
    place = {}
    exec(re.sub(r"^    ", "", told, flags=re.MULTILINE).rsplit("image = ", 1)[0], place)
    assert isinstance(place["pipeline"].scheduler, LCMScheduler)
    assert np.array_equal(grid(place["pipeline"], 1.0), drawn(folder))
    plain = DiffusionPipeline.from_pretrained(text_folders / "sd")
    plain.scheduler = place["pipeline"].scheduler
    assert not np.array_equal(grid(plain, 1.0), drawn(folder))
    assert "lora" in (folder / "README.md").read_text()


def test_a_resumed_run_ends_the_same_and_cached_embeddings_give_the_same_losses(script, flags, tmp_path):
    words = flags("sd", cep_gamma=1, ema_decay=0.7, conditioning_dropout_prob=0.3)
    script(SCRIPT, *words)
    cached = [*words, "--cache_text_embeddings", "--text_cache_dir", tmp_path / "texts"]
    cut = [*cached, "--output_dir", tmp_path / "cut"]
    script(SCRIPT, *cached, "--output_dir", tmp_path / "cached")
    script(SCRIPT, *cut, "--max_train_steps", 2)
    script(SCRIPT, *cut, "--resume_from_checkpoint", "latest")
    assert losses(tmp_path / "cut") == losses(tmp_path / "cached")
    whole, cut = (weights(tmp_path / name, "unet") for name in ("cached", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "run"), rel=1e-4)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_another_teacher_is_another_run(part, script, refused, flags, text_folders, tmp_path):
    words = flags("sd")
    script(SCRIPT, *words, "--max_train_steps", 1)
    folder = tmp_path / "teacher"
    shutil.copytree(text_folders / "sd", folder)
    path = next((folder / part).glob("*.safetensors"))
    save_file({name: 2 * value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    other = ["--pretrained_teacher_model", folder, "--resume_from_checkpoint", "latest"]
    assert "has other settings" in refused(SCRIPT, *words, *other)


@pytest.fixture
def first_step(flags, one_thread):
    """The first step of a run by the script's own functions, without the loop: what the teacher was asked, and the
    loss."""

    def step(*more, **others) -> tuple[list, float]:
        script = load_script(SCRIPT)
        args = script.parse_by_kind(flags("sd", *more, train_batch_size=8, **others), script.STARTED)
        teaching = script.TextTeaching.open(args, None)
        alone = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0)
        batch = next(teaching.batches(alone).starting_at(0))
        student, asked = teaching.student().train(), []
        teaching.teacher.backbone.register_forward_pre_hook(lambda module, inputs: asked.append(inputs))
        compute_loss = script.make_compute_loss(args, teaching, student, AveragedWeights(), nullcontext)
        loss = compute_loss(student, batch, torch.arange(8)).mean().item()
        return [(*inputs[:2], inputs[2].sequence) for inputs in asked], loss

    return step


def same(one: tuple, other: tuple) -> list[bool]:
    return [torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True)]


def test_corruption_and_cep_leave_data_noise_steps_and_the_teacher_as_they_are(first_step):
    (told, null), loss = first_step(corruption_ratio=0)
    assert same(told, null) == [True, True, False] and (null[2][1:] == null[2][:1]).all()
    found = {"clean": loss}
    for name, words in {
        "corrupted": ("--corruption_ratio", 1),
        "words corrupted": ("--corruption_ratio", 1, "--corruption_type", "token"),
        "perturbed": ("--corruption_ratio", 0, "--cep_gamma", 5),
        "embedding dropout": ("--corruption_ratio", 0, "--embedding_dropout", 0.5),
        "input perturbed": ("--corruption_ratio", 0, "--input_perturbation", 0.5),
    }.items():
        asked, found[name] = first_step(*words)
        assert same(asked[0], told) == [True] * 3 and same(asked[1], null) == [True] * 3, name
    asked, found["told"] = first_step("--corruption_ratio", 1, "--teacher_condition", "corrupted")
    assert same(asked[0], told) == [True, True, False] and same(asked[1], null) == [True] * 3
    assert len(set(found.values())) == len(found), found


def test_dry_run(script, flags, tmp_path, capsys):
    script(SCRIPT, *flags("ldm"), "--dry_run")
    said = capsys.readouterr().out
    for words in ("teacher", "text encoder", "4 × 8 × 8", "first stage of", "optimizer steps"):
        assert words in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "kind, more, words",
    [
        ("sdxl", [], ["--pretrained_teacher_model", "a StableDiffusionXLPipeline cannot be distilled here"]),
        ("pixart", [], ["a PixArtAlphaPipeline cannot be distilled here", "StableDiffusionPipeline"]),
        ("sd", ["--pretrained_vae_model_name_or_path", "digits-vq"], ["latents of 4 channels", "first stage have 3"]),
        ("sd", ["--use_lora", "--pretrained_vae_model_name_or_path", "digits-kl"], ["does not go with --use_lora"]),
        ("sd", ["--class_groups", "x.json"], ["--class_groups has no effect", "takes captions"]),
        ("sd", ["--resolution", "15"], ["--resolution is 15", "factor 2"]),
        ("sd", ["--label_smoothing", "0.1"], ["--label_smoothing has no effect on captions"]),
        ("ldm", ["--use_lora", "--lora_target_modules", "nowhere"], ["--lora_target_modules"]),
        ("sd", ["--eval_prompts", "x"], ["--eval_prompts has no effect without --eval_steps"]),
    ],
)
def test_bad_input(refused, flags, tmp_path, kind, more, words):
    sentence = refused(SCRIPT, *flags(kind, *more))
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run/run.json").exists()


def test_a_folder_without_the_column_of_captions(refused, flags, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(folder / "0.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": "a"}\n')
    words = flags("sd")
    place = words.index("--dataset_name")
    words[place : place + 2] = ["--train_data_dir", str(folder)]
    assert "--caption_column" in refused(SCRIPT, *words)


def test_the_flags_are_those_of_what_the_teacher_takes(text_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = load_script(SCRIPT)

    def chosen(*argv) -> str:
        return arguments_class(list(map(str, argv)), script.STARTED).__name__

    assert chosen() == chosen("--help") == chosen("--pretrained_teacher_model", "nowhere") == "ClassLCMArguments"
    assert chosen("--pretrained_teacher_model", text_folders / "ldm") == "TextLCMArguments"
    assert chosen("--pretrained_teacher_model", "no/where", "--caption_column", "x") == "TextLCMArguments"
    (tmp_path / "mine.yaml").write_text(f"pretrained_teacher_model: {text_folders / 'sd'}\ncaption_column: x\n")
    assert chosen("--recipe", "mine.yaml") == "TextLCMArguments"
    with pytest.raises(SystemExit) as left:
        script.main(["--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and "--class_groups" in said and "--caption_column" not in said
    assert issubclass(script.ClassLCMArguments, EvaluationArguments)
    words = ["--pretrained_teacher_model", str(text_folders / "sd"), "--dataset_name", "digits", "--recipe", "none"]
    args = parse_arguments(script.TextLCMArguments, words)
    assert (args.validation_inference_steps, args.validation_guidance_scale) == (4, 11.0)
    assert args.conditioning_dropout_prob == 0 and args.ema_decay == 0.95
