"""What a dry run says against what training holds."""

import itertools

import pytest
import torch
from PIL import Image

from noisycond.arguments import LoopArguments
from noisycond.data.batches import Batches
from noisycond.data.images import BadImages
from noisycond.denoisers import build_denoiser, find_denoiser
from noisycond.dry_run import memory
from noisycond.sharding import Layout
from noisycond.signals import StopSignals
from noisycond.training_state import TrainingState


def small_denoiser():
    return build_denoiser(
        find_denoiser("ldm-mini"),
        class_names=["a", "b", "c"],
        latent_channels=3,
        latent_size=8,
        fixed_perturbation=True,
    )


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("frozen", [False, True])
def test_bytes_are_those_of_a_training(accelerator, one_thread, frozen):
    args = LoopArguments(report_to="none", train_batch_size=2)
    denoiser = small_denoiser()
    denoiser.encoder.requires_grad_(not frozen)
    with torch.device("meta"):
        unbuilt = small_denoiser()
    unbuilt.encoder.requires_grad_(not frozen)
    said = memory(unbuilt, args, Layout())
    state = TrainingState(denoiser, args, 10, accelerator, {}, Batches([], 2))
    batch = {"latents": torch.randn(2, 3, 8, 8), "position": torch.arange(2), "class_labels": torch.tensor([0, 1])}

    def compute_loss(model, batch, keys):
        return model(batch["latents"], keys % 1000, batch, keys).square().flatten(1).mean(1)

    state.train_step(itertools.repeat(batch), compute_loss, StopSignals(), BadImages(0))
    assert said["weights"] == size(denoiser.parameters())
    assert said["moving average"] == size(state.ema.shadow_params)
    moments = [entry[name] for entry in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert said["optimizer state (AdamW)"] == size(moments)
    compute_loss(state.prepared, batch, torch.arange(2)).mean().backward()
    gradients = [parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None]
    assert said["gradients"] == size(gradients)
    assert (said["gradients"] < said["weights"]) == frozen
    assert sum(said.values()) == size(denoiser.parameters()) + size(state.ema.shadow_params) + size(moments) + size(
        gradients
    )
    state.close()


def test_what_settings_do_to_the_bytes():
    model = torch.nn.Linear(100, 64)  # 6,464 elements
    args = LoopArguments(report_to="none", use_ema=False, mixed_precision="bf16")
    rows = memory(model, args, Layout(2, "ddp"))
    assert "moving average" not in rows
    assert rows["weights cast by mixed precision, at most"] == 2 * 6464
    assert rows["gradient buckets"] == rows["gradients"] == rows["weights"] == 4 * 6464
    args.use_8bit_adam = True
    # 6,400 weights: two bytes each and 25 blocks' maxima; 64 biases stay in float32.
    assert memory(model, args, Layout())["optimizer state (8-bit AdamW)"] == 2 * 6400 + 25 * 8 + 64 * 8


def test_sharded_over_three():
    model = torch.nn.Linear(4, 7)  # 28 weights in 7 rows, 7 biases: the first of three holds 3 rows and 3 biases
    args = LoopArguments(report_to="none")
    fsdp = memory(model, args, Layout(3, "fsdp"))
    assert fsdp["weights"] == 4 * sum(torch.chunk(tensor, 3)[0].numel() for tensor in model.parameters())
    assert fsdp["weights"] == fsdp["gradients"] == fsdp["moving average"] == 4 * 15
    assert fsdp["optimizer state (AdamW)"] == 8 * 15
    one, two = (memory(model, args, Layout(3, "zero", stage)) for stage in (1, 2))
    assert one["weights"] == two["weights"] == one["gradients"] == one["moving average"] == 4 * 35
    assert two["gradients"] == 4 * 13 and one["optimizer state (AdamW)"] == 8 * 13
    assert one["ZeRO's own copy of the weights"] == 4 * 13


@pytest.mark.parametrize(
    "environment, layout",
    [
        ({}, Layout()),
        ({"WORLD_SIZE": "8"}, Layout(8, "ddp")),
        ({"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}, Layout(4, "fsdp")),
        (
            {"WORLD_SIZE": "4", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
            Layout(4, "zero", 1),
        ),
    ],
)
def test_layout_of_a_launch(monkeypatch, environment, layout):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Layout.of_this_launch() == layout


# Through the script


def dry(script, capsys, *argv) -> str:
    script("train_class_cond", *argv, "--dry_run")
    return capsys.readouterr().out


def test_batch_steps_and_epochs(script, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = dry(script, capsys, "--train_batch_size", 10, "--gradient_accumulation_steps", 2, "--max_train_steps", 100)
    assert "60 = 10 per process × 2 accumulated × 3 processes" in said
    assert "100 (4.2 epochs of 1,437 examples)" in said and "examples seen         6,000" in said
    monkeypatch.setenv("RANK", "1")
    assert dry(script, capsys) == ""  # the main process prints


def test_steps_without_the_data(script, capsys):
    words = ["--recipe", "dit_xl_2_in1k", "--denoiser", "dit-mini"]
    assert "400,000 (epochs unknown" in dry(script, capsys, *words)
    assert "250 (10.0 epochs of 800 examples)" in dry(
        script, capsys, *words, "--max_train_samples", 800, "--max_train_steps", 250
    )


def test_a_folder_of_images(script, capsys, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for label in "abc":
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / label / "0.png")
    words = ["--recipe", "dit_xl_2_in1k", "--denoiser", "dit-mini", "--train_data_dir", tmp_path / "images"]
    said = dry(script, capsys, *words)
    assert "epochs of 3 examples" in said and "(4 rows of 128" in said
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert "--num_classes is 4" in refused("train_class_cond", *words, "--num_classes", 4, "--dry_run")


def test_class_subset_without_the_data(script, capsys, refused):
    words = ["--recipe", "dit_xl_2_in1k", "--denoiser", "dit-mini"]
    assert "(101 rows" in dry(script, capsys, *words, "--class_subset", 100)
    assert "has 1000 classes" in refused("train_class_cond", *words, "--class_subset", 1001, "--dry_run")
    words += ["--dataset_name", "someone/else"]
    assert "give --num_classes" in refused("train_class_cond", *words, "--dry_run")


def test_latents_come_from_the_first_stage_where_it_is_here(script, capsys, refused):
    assert "3 × 8 × 8 (first stage digits-vq)" in dry(
        script, capsys, "--pretrained_vae_model_name_or_path", "digits-vq"
    )
    words = ["--recipe", "ldm_4_in1k", "--denoiser", "ldm-mini", "--resolution", 128]
    said = dry(script, capsys, *words)
    assert "3 × 32 × 32 (as the denoiser's preset: CompVis/ldm-celebahq-256 is not on this machine)" in said
    assert "the first stage" in said.split("not counted")[1]
    wrong = ["--pretrained_vae_model_name_or_path", "digits-vqq", "--dry_run"]
    assert "--pretrained_vae_model_name_or_path digits-vqq" in refused("train_class_cond", *wrong)


def test_refuses_what_a_run_would_refuse(refused):
    assert "factor 4" in refused("train_class_cond", "--resolution", 30, "--dry_run")
    assert "--beta_start" in refused("train_class_cond", "--beta_start", "0.03", "--dry_run")


def test_a_run_prints_the_inferred_values(script, caplog, tmp_path):
    recipe = tmp_path / "some.yaml"
    recipe.write_text("base: digits_dit_mini\nema_decay: 0.9  # [inferred] ours\nseed: 3  # [field]\n")
    words = ["--recipe", recipe, "--output_dir", tmp_path / "run", "--denoiser", "dit-mini", "--max_train_steps", 1]
    script("train_class_cond", *words, "--report_to", "none", "--validation_inference_steps", 1)
    said = next(record.getMessage() for record in caplog.records if "[inferred]" in record.getMessage())
    assert "ema_decay 0.9" in said and "lr_warmup_steps 50" in said
    assert "output_dir" not in said and "seed" not in said and "max_train_steps" not in said
