"""train_class_cond.py in process: what it leaves behind, and that each flag does what it says."""

import csv
import json

import numpy as np
import pytest
import torch
from launching import load_script
from PIL import Image

from noisycond import LabelCorruption
from noisycond.data.sources import Digits
from noisycond.objective import DiffusionObjective, make_betas
from noisycond.randomness import step_keys


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def run(script, tiny, *argv):
    script("train_class_cond", *tiny, *argv)


def test_leaves_a_pipeline_pictures_and_its_settings(script, tiny, tmp_path, capsys):
    run(script, tiny, "--corruption_ratio", "0.5", "--save_corruption_map")
    folder = tmp_path / "run"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert index["id2label"] == {str(digit): str(digit) for digit in range(10)}
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["clip_sample"] is False
    assert (folder / "transformer/diffusion_pytorch_model.safetensors").exists()
    assert not list(folder.rglob("*.bin")) or all("checkpoint-" in str(path) for path in folder.rglob("*.bin"))
    assert Image.open(folder / "samples/final.png").size == (64 + 4, 10 * 66 + 2)
    assert Image.open(folder / "loss.png").width > 500
    settings = json.loads((folder / "run.json").read_text())
    assert settings["arguments"]["cep_gamma"] == 1.0 and settings["versions"]["torch"]
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "ratio 0.5" in card and "γ = 1.0" in card
    assert f'from_pretrained("{folder}")' in capsys.readouterr().out

    with (folder / "corruption_map.csv").open() as file:
        rows = [tuple(map(int, row)) for row in list(csv.reader(file))[1:]]
    truth = Digits().labels[:96]
    assert [row[:2] for row in rows] == list(enumerate(truth.tolist()))
    changed = {index for index, true, corrupted in rows if true != corrupted}
    assert 30 < len(changed) < 66
    counts = json.loads((folder / "corruption.json").read_text())
    assert counts["examples_seen"] == 48 and sum(counts["seen_per_class"]) == 48
    seen = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["corruption_realized_ratio"]
    assert counts["realized_ratio"] == seen and 0.2 < seen < 0.8


def test_cached_latents_give_the_loss_of_encoding_as_it_goes(script, tiny, tmp_path):
    run(script, tiny, "--random_flip")
    cached = losses(tmp_path / "run")
    run(script, tiny, "--random_flip", "--cache_latents", "false", "--overwrite_output_dir")
    uncached = losses(tmp_path / "run")
    assert np.abs(np.subtract(cached, uncached)).max() < 1e-5
    run(script, tiny, "--overwrite_output_dir")
    assert np.abs(np.subtract(losses(tmp_path / "run"), uncached)).max() > 1e-4  # the flips are felt


@pytest.mark.parametrize(
    "flags",
    [
        ["--cep_gamma", "0"],
        ["--cep_type", "gaussian"],
        ["--cep_mode", "fixed"],
        ["--no_cep_perturb_null", "--conditioning_dropout_prob", "0.9"],
        ["--corruption_ratio", "0.9"],
        ["--input_perturbation", "0.1"],
        ["--embedding_dropout", "0.5"],
        ["--label_smoothing", "0.9"],
        ["--conditioning_dropout_prob", "0.9"],
        ["--prediction_type", "epsilon"],
        ["--snr_gamma", "5"],
        ["--beta_schedule", "squaredcos_cap_v2"],
        ["--seed", "1"],
        ["--pretrained_vae_model_name_or_path", "digits-vq"],
        ["--gradient_accumulation_steps", "2"],
        ["--learning_rate", "3e-3"],
        ["--max_grad_norm", "1e-4"],
        ["--mixed_precision", "bf16"],
        ["--adam_weight_decay", "10"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_a_flag_changes_training(script, tiny, tmp_path, tmp_path_factory, flags):
    base = base_losses(script, tiny, tmp_path_factory)
    run(script, tiny, "--learning_rate", "1e-2", "--lr_scheduler", "constant", *flags)
    assert losses(tmp_path / "run") != base


_BASE: list[list[float]] = []


def base_losses(script, tiny, tmp_path_factory) -> list[float]:
    if not _BASE:
        folder = tmp_path_factory.mktemp("base") / "run"
        words = [*tiny, "--learning_rate", "1e-2", "--lr_scheduler", "constant", "--output_dir", folder]
        script("train_class_cond", *words)
        _BASE.append(losses(folder))
    return _BASE[0]


def test_gradient_checkpointing_changes_nothing(script, tiny, tmp_path):
    run(script, tiny)
    plain = losses(tmp_path / "run")
    run(script, tiny, "--gradient_checkpointing", "--overwrite_output_dir")
    assert losses(tmp_path / "run") == plain


def test_validation_grids_do_not_change_training(script, tiny, tmp_path):
    run(script, tiny)
    plain = losses(tmp_path / "run")
    run(script, tiny, "--validation_steps", "2", "--overwrite_output_dir")
    assert losses(tmp_path / "run") == plain
    assert {path.name for path in (tmp_path / "run/samples").iterdir()} == {
        "step-0000002.png",
        "step-0000004.png",
        "step-0000006.png",
        "final.png",
    }


def test_workers_change_nothing(script, tiny, tmp_path):
    words = ["--cache_latents", "false", "--random_flip", "--corruption_ratio", "0.5", "--corruption_mode", "random"]
    run(script, tiny, *words)
    plain = losses(tmp_path / "run")
    run(script, tiny, *words, "--dataloader_num_workers", "2", "--overwrite_output_dir")
    assert losses(tmp_path / "run") == plain


def test_accumulation_gives_the_loss_of_a_large_batch(script, tiny, tmp_path):
    run(script, tiny)
    plain = losses(tmp_path / "run")
    split = ["--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--overwrite_output_dir"]
    run(script, tiny, *split)
    assert np.abs(np.subtract(losses(tmp_path / "run"), plain)).max() < 1e-5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "constant_with_warmup"])
def test_learning_rate_counts_optimizer_steps(script, tiny, tmp_path, schedule):
    words = ["--lr_scheduler", schedule, "--lr_warmup_steps", "2", "--gradient_accumulation_steps", "2"]
    run(script, tiny, *words, "--learning_rate", "1e-3")
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    if schedule == "linear":
        assert rates[3:] == pytest.approx([7.5e-4, 5e-4, 2.5e-4])


def test_learning_rate_in_pieces(script, tiny, tmp_path):
    words = ["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:2,0.1:4,0.01", "--learning_rate", "1e-3"]
    run(script, tiny, *words)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


class Recorder:
    """Stands where the denoiser stands and keeps what it is given."""

    def __call__(self, noisy, timesteps, condition, keys):
        self.seen = (noisy, timesteps, condition["class_labels"], keys)
        return torch.zeros_like(noisy)


@pytest.mark.parametrize(
    "flags", [["--cep_gamma", "2"], ["--embedding_dropout", "0.5"], ["--corruption_ratio", "0.3"]]
)
def test_clean_and_corrupted_runs_see_the_same_noise(tiny, flags):
    """Switching one kind of draw on leaves all others as they were."""
    module = load_script("train_class_cond")
    batch = {
        "moments": torch.randn(64, 8, 8, 8),
        "class_labels": torch.arange(64) % 10,
        "index": torch.arange(64),
        "epoch": torch.zeros(64, dtype=torch.int64),
    }
    seen = []
    for words in ([], flags):
        args = module.parse_arguments(module.ClassCondArguments, [*tiny, *words], "digits_dit_mini")
        first_stage = module.open_first_stage("digits-kl", args.seed)
        objective = DiffusionObjective(make_betas("linear", 1e-4, 0.02, 1000), seed=args.seed)
        corruption = LabelCorruption(args.corruption_ratio, 10, seed=args.seed)
        denoiser = Recorder()
        compute_loss = module.make_compute_loss(args, first_stage, objective, corruption, null_class=10)
        compute_loss(denoiser, batch, step_keys(3, torch.arange(64)))
        seen.append(denoiser.seen)
    clean, other = seen
    assert torch.equal(clean[0], other[0]) and torch.equal(clean[1], other[1]) and torch.equal(clean[3], other[3])
    assert torch.equal(clean[2] == 10, other[2] == 10)  # the same conditions are dropped
    assert torch.equal(clean[2], other[2]) == ("--corruption_ratio" not in flags)


def test_image_folder_and_class_subset(script, tiny, tmp_path):
    digits = Digits()
    for number in range(60):
        folder = tmp_path / "images" / f"digit-{digits.labels[number]}"
        folder.mkdir(parents=True, exist_ok=True)
        digits.read(number, 40).save(folder / f"{number}.png")
    (tmp_path / "images/digit-3/broken.png").write_bytes(b"not an image")
    words = ["--train_data_dir", tmp_path / "images", "--recipe", "digits_dit_mini", "--center_crop"]
    run(script, tiny, *words, "--class_subset", "4", "--class_subset_seed", "1")
    names = json.loads((tmp_path / "run/model_index.json").read_text())["id2label"]
    assert len(names) == 4 and all(name.startswith("digit-") for name in names.values())


def test_continues_a_pretrained_folder(script, tiny, tmp_path):
    run(script, tiny, "--learning_rate", "1e-2", "--ema_decay", "0")
    first = losses(tmp_path / "run")
    words = ["--denoiser", tmp_path / "run", "--output_dir", tmp_path / "next", "--learning_rate", "1e-9"]
    run(script, tiny, *words, "--lr_warmup_steps", "0")
    assert losses(tmp_path / "next")[0] < first[0] - 0.01
