"""train_lcm_distill.py: a student of a tiny class-conditional teacher, in process."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from launching import load_script
from PIL import Image
from safetensors.torch import load_file, save_file

from noisycond import pictures, sampling, teachers
from noisycond.class_conditional import open_corruption
from noisycond.data.batches import collate
from noisycond.lora import WEIGHTS
from noisycond.training_state import AveragedWeights


FIRST_STAGE = ["--pretrained_vae_model_name_or_path", "digits-vq"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_unet) -> Path:
    """A teacher whose guidance acts, hardly trained; not to be written to."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    words = ["--denoiser", tiny_unet, *FIRST_STAGE, "--max_train_steps", "6", "--train_batch_size", "8"]
    words += ["--learning_rate", "1e-2", "--lr_scheduler", "constant", "--cep_gamma", "0", "--report_to", "none"]
    words += ["--validation_images_per_class", "1", "--validation_inference_steps", "2"]
    words += ["--cpu_threads_per_process", "1", "--max_train_samples", "96", "--ema_decay", "0"]
    load_script("train_class_cond").main([*words, "--output_dir", str(folder)])
    return folder


@pytest.fixture
def tiny(tmp_path, teacher) -> list[str]:
    """Flags of a run of four steps on digits, without trackers, into tmp_path / "run"."""
    flags = {
        "pretrained_teacher_model": teacher,
        "output_dir": tmp_path / "run",
        "train_batch_size": 4,
        "max_train_samples": 96,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "report_to": "none",
        "validation_images_per_class": 1,
        "validation_inference_steps": 2,
        "cpu_threads_per_process": 1,
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def test_leaves_a_folder_that_gives_the_images_of_training(script, tiny, teacher, tmp_path, capsys):
    script("train_lcm_distill", *tiny, "--corruption_ratio", "0.5", "--timestep_scaling_factor", "5")
    folder = tmp_path / "run"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["ldm_class_to_image", "LDMClassToImagePipeline"]
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert index["id2label"] == {str(digit): str(digit) for digit in range(10)}
    scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    theirs = json.loads((teacher / "scheduler/scheduler_config.json").read_text())
    for name in ("beta_schedule", "beta_start", "beta_end", "prediction_type", "num_train_timesteps"):
        assert scheduler.config[name] == theirs[name]
    assert scheduler.config.original_inference_steps == 50 and scheduler.config.timestep_scaling == 5
    assert not scheduler.config.clip_sample
    for said in (capsys.readouterr().out, (folder / "README.md").read_text()):
        assert "num_inference_steps=2, guidance_scale=2.25)" in said
    assert json.loads((folder / "corruption.json").read_text())["examples_corrupted"] > 3

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert pipeline.unet.config.time_cond_proj_dim == 256
    settings = {"seed": 0, "guidance_scale": 2.25, "num_inference_steps": 2}
    images = sampling.sample_all(pipeline, sampling.class_rows(10, 1), **settings)
    drawn = np.array(Image.open(folder / "samples/final.png"))
    assert np.array_equal(np.array(pictures.image_grid(images, 1, scale=2)), drawn)


def test_the_student_starts_as_its_teacher_and_its_class_embedding_stays(teacher, script, tiny, tmp_path):
    source = teachers.find_teacher(str(teacher))
    original, _ = teachers.open_teacher(source, [str(digit) for digit in range(10)])
    student = teachers.make_student(original, 8, 32)
    projection = student.backbone.model.time_embedding.cond_proj
    assert projection.bias is None and not projection.weight.any()
    noisy, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    condition = {"class_labels": torch.tensor([3, 10])}
    expected = original(noisy, timesteps, condition)
    found = student(noisy, timesteps, condition | {"guidance": torch.randn(2, 32)})
    assert expected.abs().max() > 0.1 and torch.equal(found, expected)
    assert not any(parameter.requires_grad for parameter in student.encoder.parameters())

    script("train_lcm_distill", *tiny)
    table = "class_embedder/diffusion_pytorch_model.safetensors"
    assert torch.equal(*(load_file(each / table)["embedding.weight"] for each in (tmp_path / "run", teacher)))
    trained, before = weights(tmp_path / "run"), weights(teacher)
    assert set(trained) - set(before) == {"time_embedding.cond_proj.weight"}
    assert trained["time_embedding.cond_proj.weight"].any()
    assert not any(torch.equal(trained[name], before[name]) for name in before if "conv1.weight" in name)


def test_a_resumed_run_ends_the_same(script, tiny, tmp_path):
    words = [*tiny, "--ema_decay", "0.7", "--cep_gamma", "1"]
    script("train_lcm_distill", *words)
    cut = [*words, "--output_dir", tmp_path / "cut"]
    script("train_lcm_distill", *cut, "--max_train_steps", "2")
    script("train_lcm_distill", *cut, "--resume_from_checkpoint", "latest")
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
    whole, cut = (weights(tmp_path / name) for name in ("run", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    average = load_file(tmp_path / "run/checkpoint-4/ema.safetensors")
    assert all(torch.equal(average[f"backbone.model.{name}"], value) for name, value in whole.items())


def test_the_target_is_the_moving_average(script, tiny, tmp_path):
    """A slow average differs from the student from the second step on; none is the student itself."""
    found = {}
    for name, flags in {
        "slow": ["--ema_decay", "0.9"],
        "none": ["--use_ema", "false"],
        "at once": ["--ema_decay", "0"],
    }.items():
        script("train_lcm_distill", *tiny, *flags, "--overwrite_output_dir")
        found[name] = losses(tmp_path / "run")
    assert found["none"] == found["at once"]
    assert found["slow"][0] == found["none"][0]
    assert all(one != other for one, other in zip(found["slow"][2:], found["none"][2:], strict=True))


def parse(teacher, *flags):
    words = ["--pretrained_teacher_model", str(teacher), "--recipe", "none", "--dataset_name", "digits", *flags]
    script = load_script("train_lcm_distill")
    return script.parse_by_kind([*words, "--resolution", "32", "--w_max", "6"], script.STARTED)


@pytest.fixture(scope="module")
def opened(teacher) -> tuple:
    """The teacher's folder, it taught with the first flags, and a batch of 32 examples."""
    teaching = load_script("train_lcm_distill").ClassTeaching.open(parse(teacher), None)
    return teacher, teaching, collate([teaching.data.images[index, 0, index] for index in range(32)])


def first_loss(opened, *flags) -> float:
    """The loss of the first batch, by the script's own functions, without the loop."""
    script = load_script("train_lcm_distill")
    teacher, teaching, batch = opened
    args = teaching.args = parse(teacher, *flags)
    teaching.tally, _ = open_corruption(args, teaching.data)
    student = teaching.student().train()
    compute_loss = script.make_compute_loss(args, teaching, student, AveragedWeights(), nullcontext)
    return compute_loss(student, batch, batch["index"]).mean().item()


def test_flags_reach_the_loss(opened, one_thread):
    flags = """
        --w_min 5.0
        --cep_gamma 5
        --cep_gamma 5 --cep_type gaussian
        --embedding_dropout 0.5
        --label_smoothing 0.5
        --input_perturbation 0.1
        --w_min 6
        --loss_type huber
        --loss_type huber --huber_c 0.1
        --num_ddim_timesteps 10
        --timestep_scaling_factor 0.001
        --corruption_ratio 1
        --corruption_ratio 1 --teacher_condition corrupted
        --conditioning_dropout_prob 1
        --seed 1
    """
    lines = flags.strip().splitlines()
    found = {line: first_loss(opened, *line.split()) for line in lines}
    assert len(set(found.values())) == len(lines), found


def test_gradient_checkpointing_changes_nothing(script, tiny, tmp_path):
    script("train_lcm_distill", *tiny, "--max_train_steps", "2")
    plain = losses(tmp_path / "run")
    words = ["--gradient_checkpointing", "--overwrite_output_dir", "--max_train_steps", "2"]
    script("train_lcm_distill", *tiny, *words)
    assert losses(tmp_path / "run") == plain


def test_the_guidance_that_was_distilled_is_what_the_pipeline_is_asked_for(teacher):
    """A student that predicts as the teacher guided by w gives, asked for w + 1, the teacher's guided images."""
    pipeline = DiffusionPipeline.from_pretrained(teacher, trust_remote_code=True)
    source = teachers.find_teacher(str(teacher))
    pipeline.scheduler = teachers.lcm_scheduler(source.scheduler, 50, 10.0)
    script = load_script("train_lcm_distill")
    latents, labels, w = torch.randn(2, 3, 8, 8), [3, 7], 1.5
    generator = torch.Generator().manual_seed(0)
    settings = {"latents": latents, "num_inference_steps": 1, "output_type": "latent", "generator": generator}
    expected = pipeline(labels, guidance_scale=w + 1, **settings).images
    original, _ = teachers.open_teacher(source, [str(digit) for digit in range(10)])
    distillation = script.ConsistencyDistillation(
        pipeline.scheduler.alphas_cumprod, source.prediction_type, w_min=w, w_max=w
    )
    timesteps = torch.full((2,), 999)
    both = (original(latents, timesteps, {"class_labels": torch.tensor(each)}) for each in (labels, [10, 10]))
    prediction = script.guided(*both, torch.full((2,), w))
    assert (distillation.output(prediction, latents, timesteps) - expected).abs().max() < 1e-3


def test_lora_leaves_adapters_for_the_teacher(script, tiny, teacher, tmp_path, capsys):
    script("train_lcm_distill", *tiny, "--use_lora", "--rank", "2")
    folder = tmp_path / "run"
    assert not (folder / "unet").exists() and not (folder / "model_index.json").exists()
    said, card = capsys.readouterr().out, (folder / "README.md").read_text()
    for text in (said, card):
        assert "load_lora_adapter" in text and "LCMScheduler" in text and "guidance_scale=1)" in text
    pipeline = DiffusionPipeline.from_pretrained(teacher, trust_remote_code=True)
    before = sampling.sample(pipeline, [3], [0], seed=0, guidance_scale=1.0, num_inference_steps=2)
    pipeline.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.unet.load_lora_adapter(folder, prefix=None, weight_name=WEIGHTS)
    settings = {"seed": 0, "guidance_scale": 1.0, "num_inference_steps": 2}
    images = sampling.sample_all(pipeline, sampling.class_rows(10, 1), **settings)
    drawn = np.array(Image.open(folder / "samples/final.png"))
    assert np.array_equal(np.array(pictures.image_grid(images, 1, scale=2)), drawn)
    assert not np.array_equal(np.array(images[3]), np.array(before[0]))
    average = load_file(folder / "checkpoint-4/ema.safetensors")
    assert average and all("lora" in name for name in average)


def test_dry_run(script, tiny, tmp_path, capsys):
    script("train_lcm_distill", *tiny, "--dry_run")
    said = capsys.readouterr().out
    for words in ("teacher", "frozen", "latents", "3 × 8 × 8", "optimizer steps", "moving average"):
        assert words in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--w_min", "3", "--w_max", "2"], ["--w_min is 3.0 and --w_max 2.0"]),
        (["--w_min", "-1"], ["--w_min is -1.0"]),
        (["--num_ddim_timesteps", "30"], ["--num_ddim_timesteps is 30", "1000"]),
        (["--loss_type", "l2", "--huber_c", "0.1"], ["--huber_c has no effect", "--loss_type huber"]),
        (["--unet_time_cond_proj_dim", "2"], ["--unet_time_cond_proj_dim is 2", "at least 4"]),
        (["--teacher_condition", "corrupted"], ["--teacher_condition corrupted", "--corruption_ratio"]),
        (["--validation_inference_steps", "51"], ["--validation_inference_steps is 51", "--num_ddim_timesteps, 50"]),
        (["--validation_guidance_scale", "0.5"], ["--validation_guidance_scale is 0.5"]),
        (["--pretrained_teacher_model", "nowhere"], ["--pretrained_teacher_model nowhere", "neither a folder nor"]),
        (["--use_lora", "--unet_time_cond_proj_dim", "32"], ["--unet_time_cond_proj_dim has no effect", "--use_lora"]),
        (["--rank", "2"], ["--rank has no effect without --use_lora"]),
        (["--use_lora", "--rank", "0"], ["--rank is 0"]),
        (["--class_subset", "5"], ["--pretrained_teacher_model", "other classes"]),
        (["--pretrained_vae_model_name_or_path", "digits-kl"], ["latents of 3 channels", "have 4"]),
        (["--resolution", "36"], ["--resolution", "9 pixels", "multiple of 2"]),
        (["--cache_latents", "--dataset_name", "x/y"], ["--cache_latents needs --center_crop"]),
    ],
)
def test_bad_input(refused, tiny, tmp_path, flags, words):
    sentence = refused("train_lcm_distill", *tiny, *flags)
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run").exists()


def changed(folder: Path, file: str, **entries) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_teacher_that_cannot_be_one_is_refused(refused, tiny, teacher, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("checkpoint-*"))

    def sentence() -> str:
        return refused("train_lcm_distill", *tiny, "--pretrained_teacher_model", folder)

    changed(folder, "unet/config.json", time_cond_proj_dim=32)
    assert "distilled itself" in sentence()
    changed(folder, "unet/config.json", time_cond_proj_dim=None)
    changed(folder, "scheduler/scheduler_config.json", prediction_type="sample")
    assert "predicts 'sample'" in sentence()
    changed(folder, "scheduler/scheduler_config.json", prediction_type="epsilon")
    changed(folder, "model_index.json", _class_name="DiTPipeline")
    assert "a DiTPipeline cannot be distilled here" in sentence()
    changed(folder, "model_index.json", _class_name=["ldm_class_to_image", "LDMClassToImagePipeline"], id2label=None)
    file = folder / "class_embedder/diffusion_pytorch_model.safetensors"
    table = load_file(file)["embedding.weight"]
    save_file({"embedding.weight": torch.cat([table, table[:1]])}, file)
    changed(folder, "class_embedder/config.json", num_classes=11)
    assert "knows 11 classes, but the dataset has 10" in sentence()


def test_another_teacher_is_another_run(refused, script, tiny, teacher, tmp_path):
    script("train_lcm_distill", *tiny, "--max_train_steps", "1")
    folder = tmp_path / "other"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    words = [*tiny, "--pretrained_teacher_model", folder, "--resume_from_checkpoint", "latest"]
    script("train_lcm_distill", *words, "--max_train_steps", "2")  # the same teacher at another place
    changed(folder, "scheduler/scheduler_config.json", beta_end=0.018)
    assert "has other settings" in refused("train_lcm_distill", *words)


@pytest.mark.parametrize("launcher", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_weights_are_refused(refused, tiny, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "true")
    assert "launch it without FSDP and DeepSpeed" in refused("train_lcm_distill", *tiny)


def test_the_miniature_says_where_its_teacher_comes_from(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "train_class_cond.py --recipe digits_ldm" in refused("train_lcm_distill")


def test_flags_of_captions_are_refused_for_a_teacher_of_labels(refused, tiny):
    sentence = refused("train_lcm_distill", *tiny, "--caption_column", "text")
    assert "--caption_column has no effect" in sentence and "takes class labels" in sentence
