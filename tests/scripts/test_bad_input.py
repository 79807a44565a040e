"""Each bad input gets one sentence that names the flag or file, what was wrong and what would be right."""

import json
import shutil

import numpy as np
import pytest
from forking import Program
from launching import ROOT
from PIL import Image

from noisycond.data.sources import Digits


CASES = [
    (["--corruption_ratio", "1.5"], ["--corruption_ratio is 1.5", "between 0 and 1"]),
    (["--corruption_ratio", "-0.1"], ["--corruption_ratio is -0.1", "between 0 and 1"]),
    (["--cep_gamma", "-1"], ["--cep_gamma is -1.0", "positive"]),
    (["--conditioning_dropout_prob", "1"], ["--cep_gamma", "unconditional"]),
    (["--corruption_type", "asymmetric"], ["--class_groups FILE"]),
    (["--corruption_type", "asymetric"], ["--corruption_type", "asymetric", "symmetric"]),
    (["--class_groups", "groups.json"], ["--class_groups", "--corruption_type asymmetric"]),
    (["--denoiser", "dit-xl-3"], ["--denoiser dit-xl-3", "'dit-xl-2'"]),
    (["--recipe", "digits_dit_mni"], ["--recipe digits_dit_mni", "'digits_dit_mini'"]),
    (["--corruption_ration", "0.1"], ["unknown flag --corruption_ration", "--corruption_ratio"]),
    (["--cep", "1"], ["unknown flag --cep"]),
    (["--resolution", "30"], ["--resolution is 30", "factor 4"]),
    (["--resolution", "36"], ["--resolution", "9 pixels", "patch size 2"]),
    (["--pretrained_vae_model_name_or_path", "nowhere"], ["--pretrained_vae_model_name_or_path nowhere", "digits-kl"]),
    (["--resume_from_checkpoint", "checkpoint-7"], ["--resume_from_checkpoint checkpoint-7", "no such checkpoint"]),
    (["--resume_from_checkpoint", "latest", "--overwrite_output_dir"], ["contradict"]),
    (["--train_data_dir", "/nowhere"], ["--train_data_dir /nowhere", "no such folder"]),
    (["--dataset_split", "validation"], ["--dataset_split validation", "train and test"]),
    (["--class_subset", "11"], ["--class_subset 11", "10 classes"]),
    (["--class_subset", "1", "--corruption_ratio", "0.1"], ["--corruption_ratio", "at least two classes"]),
    (["--report_to", "tensorbord"], ["--report_to tensorbord", "tensorboard"]),
    (["--mixed_precision", "fp16"], ["--mixed_precision fp16 needs a GPU"]),
    (["--allow_tf32"], ["--allow_tf32 needs a GPU"]),
    (["--use_8bit_adam"], ["--use_8bit_adam needs"]),
    (["--enable_xformers_memory_efficient_attention"], ["--enable_xformers_memory_efficient_attention needs"]),
    (["--train_batch_size", "0"], ["--train_batch_size is 0"]),
    (["--train_batch_size", "many"], ["--train_batch_size", "invalid int value: 'many'"]),
    (["--save_corruption_map", "--corruption_mode", "random"], ["--save_corruption_map", "fixed"]),
    (["--lr_scheduler", "piecewise_constant"], ["--lr_step_rules"]),
    (["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "e:10,1"], ["--lr_step_rules is 'e:10,1'"]),
    (["--lr_power", "2"], ["--lr_power has no effect", "polynomial"]),
    (["--num_train_timesteps", "1"], ["--num_train_timesteps is 1"]),
    (["--validation_inference_steps", "2000"], ["--validation_inference_steps is 2000", "1000"]),
    (["--beta_start", "0.03"], ["--beta_start", "0.03", "0.02"]),
    (["--adam_weight_decay", "-1"], ["--adam_weight_decay is -1.0"]),
    (["--latent_cache_dir", "x", "--cache_latents", "false"], ["--latent_cache_dir", "--cache_latents"]),
    (["--class_subset_seed", "3"], ["--class_subset_seed", "--class_subset"]),
    (["--output_dir", "."], ["--output_dir", "current"]),
]


@pytest.mark.parametrize("flags, words", CASES, ids=[" ".join(flags) for flags, _ in CASES])
def test_flag(refused, tiny, tmp_path, flags, words):
    sentence = refused("train_class_cond", *tiny, *flags)
    for word in words:
        assert word in sentence
    assert not (tmp_path / "run").exists()  # nothing was begun


@pytest.mark.parametrize(
    "groups, words",
    [
        ([["0", "1"], ["2", "3"]], ["4, 5, 6, 7, 8, 9", "is in no group"]),
        ([["0"], [1, 2, 3, 4, 5, 6, 7, 8, 9]], ["group 0", "at least two"]),
        ([["0", "1", "zwei"]], ["no class 'zwei'"]),
        ([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]], ["class 9 is listed twice"]),
        (3, ["list of lists"]),
        ([[["0"]]], ["no class ['0']"]),
    ],
)
def test_class_groups(refused, tiny, tmp_path, groups, words):
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(groups))
    sentence = refused("train_class_cond", *tiny, "--corruption_type", "asymmetric", "--class_groups", path)
    assert f"--class_groups {path}" in sentence
    for word in words:
        assert word in sentence


def test_recipe_key(refused, tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset_name: digits\ncep_gama: 1.0\n")
    assert "unknown key 'cep_gama' (did you mean 'cep_gamma'?)" in refused("train_class_cond", "--recipe", path)


def test_dataset_column(refused, tiny, tmp_path):
    import datasets

    images = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in range(4)]
    dataset = datasets.Dataset.from_dict({"picture": images, "label": [0, 1, 0, 1]})
    dataset.cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "set")
    words = ["--dataset_name", tmp_path / "set", "--recipe", "digits_dit_mini", "--center_crop"]
    assert "--image_column image" in refused("train_class_cond", *tiny, *words)
    sentence = refused("train_class_cond", *tiny, *words, "--image_column", "picture", "--label_column", "labels")
    assert "--label_column labels" in sentence and "'label'" in sentence


def test_output_folder_of_another_run(script, refused, tiny, tmp_path):
    script("train_class_cond", *tiny)
    sentence = refused("train_class_cond", *tiny)
    assert "holds another run" in sentence
    assert "--resume_from_checkpoint latest" in sentence and "--overwrite_output_dir" in sentence

    sentence = refused(
        "train_class_cond", *tiny, "--resume_from_checkpoint", "latest", "--cep_gamma", "2", "--seed", 3
    )
    assert "--cep_gamma was 1.0 and is 2.0" in sentence and "--seed was 0 and is 3" in sentence
    assert "train_batch_size" not in sentence

    sentence = refused(
        "train_class_cond", *tiny, "--resume_from_checkpoint", "latest", "--gradient_accumulation_steps", "2"
    )
    assert "global batch size was 8 and is 16" in sentence

    weights = tmp_path / "run/checkpoint-6/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    named = refused("train_class_cond", *tiny, "--resume_from_checkpoint", "checkpoint-6")
    assert "checkpoint is damaged" in named and "model.safetensors" in named
    assert "every checkpoint" in refused("train_class_cond", *tiny, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("cached", ["true", "false"])
def test_unreadable_images(script, refused, tiny, tmp_path, cached, caplog):
    digits = Digits()
    for number in range(24):
        folder = tmp_path / "images" / str(digits.labels[number])
        folder.mkdir(parents=True, exist_ok=True)
        digits.read(number, 32).save(folder / f"{number:02d}.png")
    broken = sorted((tmp_path / "images").rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:-60])
    words = ["--train_data_dir", tmp_path / "images", "--recipe", "digits_dit_mini", "--center_crop"]
    words += ["--cache_latents", cached]
    script("train_class_cond", *tiny, *words)
    assert sum(str(broken) in record.getMessage() for record in caplog.records) == 1
    sentence = refused("train_class_cond", *tiny, *words, "--max_bad_images", "0", "--overwrite_output_dir")
    assert "--max_bad_images 0" in sentence and str(broken) in sentence


def test_nonfinite_losses_end_the_run_and_keep_the_checkpoint(refused, tiny, tmp_path):
    words = ["--learning_rate", "1e38", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "3"]
    words += ["--checkpointing_steps", "1", "--max_nonfinite_steps", "3", "--max_grad_norm", "0"]
    sentence = refused("train_class_cond", *tiny, *words)
    assert "3 losses in a row were not finite" in sentence and "--learning_rate" in sentence
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept and kept[-1] in sentence


def test_no_space_left_before_work(refused, tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    sentence = refused("train_class_cond", *tiny)
    assert "no space left" in sentence and ("--output_dir" in sentence or "--latent_cache_dir" in sentence)


def test_more_classes_than_the_stock_pipeline_holds(refused, tiny, tmp_path):
    rng = np.random.default_rng(0)
    for label in range(1001):
        folder = tmp_path / "images" / f"{label:04d}"
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (4, 4), dtype=np.uint8)).save(folder / "x.png")
    words = ["--train_data_dir", tmp_path / "images", "--recipe", "digits_dit_mini", "--center_crop"]
    assert "1001 classes" in refused("train_class_cond", *tiny, *words)


def test_another_folder_is_left_alone(script, refused, tiny, tmp_path):
    """A pretrained model, or anything else that no run wrote, is neither overwritten nor replaced by an export."""
    script("train_class_cond", *tiny)
    (tmp_path / "run/run.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    before = sorted(tmp_path.glob("run/**/*"))
    for words in ([], ["--overwrite_output_dir"]):
        sentence = refused("train_class_cond", *tiny, "--denoiser", tmp_path / "run", *words)
        assert "model_index.json" in sentence and "name another folder" in sentence
    assert sorted(tmp_path.glob("run/**/*")) == before


def test_a_refused_input_leaves_the_earlier_run(script, refused, tiny, tmp_path):
    script("train_class_cond", *tiny)
    before = sorted(tmp_path.glob("run/**/*"))
    assert "--beta_start" in refused("train_class_cond", *tiny, "--overwrite_output_dir", "--beta_start", "0.03")
    assert sorted(tmp_path.glob("run/**/*")) == before


def test_a_run_of_its_own_is_not_mixed_with_another(script, refused, tiny, tmp_path):
    script("train_class_cond", *tiny)
    words = ["--output_dir", tmp_path / "other"]
    script("train_class_cond", *tiny, *words)
    sentence = refused("train_class_cond", *tiny, *words, "--resume_from_checkpoint", tmp_path / "run/checkpoint-6")
    assert "holds a run of its own" in sentence


def test_pretrained_weights_of_another_prediction_type(script, refused, tiny, tmp_path):
    script("train_class_cond", *tiny)
    words = ["--denoiser", tmp_path / "run", "--output_dir", tmp_path / "next"]
    sentence = refused("train_class_cond", *tiny, *words, "--prediction_type", "epsilon")
    assert "--prediction_type is epsilon" in sentence and "v_prediction" in sentence


def test_a_full_disk_ends_with_a_sentence_and_keeps_the_checkpoint(tiny, tmp_path):
    """A file-size limit stands for a full disk: the second checkpoint, with its optimizer state, does not fit."""
    limited = (
        "import resource, sys; sys.path[:0] = [sys.argv[1]]; import train_class_cond, noisycond.checkpoints as c;"
        "save, resource_limit = c.save, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1));"
        "c.save = lambda o, step, *rest: (step == 4 and resource_limit(), save(o, step, *rest))[1];"
        "train_class_cond.main(sys.argv[2:])"
    )
    (tmp_path / "limited.py").write_text(limited)
    with Program(tmp_path / "limited.py", ROOT, *tiny, "--checkpointing_steps", "2", folder=tmp_path) as program:
        done = program.finish()
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "error: --output_dir" in last and "no space left while writing checkpoint-4" in last
    assert "checkpoint-2 is whole" in last
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-2"]
