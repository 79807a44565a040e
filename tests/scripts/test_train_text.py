"""train_text_to_image_corrupt.py from scratch: a small U-Net and the small BERT on captioned digits."""

import csv
import json
import time
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from forking import finished, started
from PIL import Image
from safetensors.torch import load_file
from shards import captioned, write_captioned_shards, write_one
from tiny_language_model import tiny_language_model
from transformers import T5Config, T5EncoderModel

from noisycond import pictures, sampling
from noisycond.data.sources import Digits
from noisycond.denoisers.text import open_text_encoder
from noisycond.pipelines import LDMTextToImagePipeline


SCRIPT = "train_text_to_image_corrupt"


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def run(script, flags, *argv):
    script(SCRIPT, *flags, "--learning_rate", "1e-2", "--lr_scheduler", "constant", *argv)


def counts(folder) -> dict:
    return json.loads((folder / "corruption.json").read_text())


def exported(folder, part: str) -> dict:
    names = {"bert": "model.safetensors", "unet": "diffusion_pytorch_model.safetensors"}
    return load_file(folder / part / names[part])


def test_leaves_a_folder_that_gives_the_images_of_training(script, tiny_text, tmp_path, capsys):
    prompts = ["a thick 3", "a photo of the number seven"]
    run(script, tiny_text, "--corruption_ratio", "0.5", "--validation_prompts", *prompts)
    folder = tmp_path / "run"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["ldm_text_to_image", "LDMTextToImagePipeline"]
    assert set(index) >= {"bert", "tokenizer", "unet", "vqvae", "scheduler"}
    assert 'prompt="a thick 3"' in capsys.readouterr().out
    assert "trust_remote_code=True" in (folder / "README.md").read_text()

    drawn = Image.open(folder / "samples/final.png")
    for pipeline in (
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True),
        LDMTextToImagePipeline.from_pretrained(folder),
    ):
        settings = {"seed": 0, "guidance_scale": 2.25, "num_inference_steps": 2}
        images = sampling.sample_all(pipeline, prompts, **settings)
        assert np.array_equal(np.array(pictures.image_grid(images, 1, scale=2)), np.array(drawn))


def test_bert_is_trained_along_at_its_own_learning_rate(script, tiny_text, tmp_path):
    run(script, tiny_text)
    average = load_file(tmp_path / "run/checkpoint-6/ema.safetensors")
    assert any(name.startswith("encoder.") for name in average)
    for part, prefix in (("bert", "encoder.models.0."), ("unet", "backbone.model.")):
        weights = exported(tmp_path / "run", part)
        known = [name for name in weights if prefix + name in average]
        assert known and all(torch.equal(weights[name], average[prefix + name]) for name in known)
    plain = losses(tmp_path / "run")
    run(script, tiny_text, "--text_encoder_learning_rate", "1e-4", "--overwrite_output_dir")
    slower = losses(tmp_path / "run")
    assert plain[0] == slower[0] and plain != slower


def test_a_frozen_encoder_stays_as_it_is_and_in_no_checkpoint(script, tiny_text, tmp_path):
    run(script, tiny_text, "--train_text_encoder", "no")
    held = load_file(tmp_path / "run/checkpoint-6/model.safetensors")
    assert held and not any(name.startswith("encoder.") for name in held)
    before = exported(tmp_path / "run", "bert")
    run(script, tiny_text, "--train_text_encoder", "no", "--learning_rate", "1e-1", "--overwrite_output_dir")
    after = exported(tmp_path / "run", "bert")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_cached_embeddings_give_the_losses_of_encoding_at_every_step(script, tiny_text, tmp_path):
    flags = [*tiny_text, "--train_text_encoder", "no", "--cep_gamma", "1", "--overwrite_output_dir"]
    flags += ["--corruption_ratio", "0.5", "--corruption_type", "token"]
    run(script, flags)
    encoded = losses(tmp_path / "run")
    run(script, flags, "--cache_text_embeddings", "--text_cache_dir", tmp_path / "texts")
    assert losses(tmp_path / "run") == pytest.approx(encoded, rel=1e-5)
    run(script, flags, "--cache_text_embeddings", "--text_cache_dir", tmp_path / "texts", "--cep_gamma", "0")
    assert losses(tmp_path / "run")[1:] != pytest.approx(encoded[1:], rel=1e-5)


def test_corruption_and_cep_leave_data_noise_and_timesteps_as_they_are(script, tiny_text, tmp_path):
    """At the first step the U-Net does not see its condition: its layers start at zero."""
    found = {}
    for name, flags in {
        "clean": [],
        "swap": ["--corruption_ratio", "0.5"],
        "token": ["--corruption_ratio", "0.5", "--corruption_type", "token"],
        "shuffle": ["--corruption_ratio", "0.5", "--corruption_type", "shuffle"],
        "cep": ["--cep_gamma", "5"],
        "gaussian": ["--cep_gamma", "5", "--cep_type", "gaussian"],
        "dropout": ["--embedding_dropout", "0.5"],
    }.items():
        run(script, tiny_text, "--overwrite_output_dir", *flags)
        found[name] = losses(tmp_path / "run")
        corrupted = counts(tmp_path / "run")["examples_corrupted"]
        assert (corrupted > 0) == ("--corruption_ratio" in flags)
    assert len({values[0] for values in found.values()}) == 1
    assert len({tuple(values) for values in found.values()}) == len(found)


def test_swapped_captions_are_those_of_other_images(script, tiny_text, tmp_path):
    run(script, tiny_text, "--corruption_ratio", "0.25", "--save_corruption_map", "--max_train_steps", "24")
    with (tmp_path / "run/corruption_map.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 96
    # What is given away is what another example gets.
    assert Counter(row["true"] for row in rows) == Counter(row["corrupted"] for row in rows)
    told = counts(tmp_path / "run")
    assert told["examples_seen"] == 192 and told["examples_corrupted"] == 48  # two epochs of 24 swapped examples
    assert 0 < told["corrupted_but_still_true"] < 24 and told["realized_ratio"] == 0.25


def test_long_captions_are_counted_and_cut(script, tiny_text, tmp_path):
    images, lines = tmp_path / "images", []
    images.mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(images / f"{number}.png")
        text = "a thick three " * (20 if number % 2 else 1)
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    place = tiny_text.index("--max_train_samples")
    flags = [*tiny_text[:place], *tiny_text[place + 2 :], "--train_data_dir", images, "--resolution", "32"]
    run(script, flags, "--pretrained_vae_model_name_or_path", "digits-vq", "--max_train_steps", "2")
    assert counts(tmp_path / "run")["captions_truncated"] == 8


def test_two_processes_train_on_the_same_captions_as_one(script, tiny_text, tmp_path):
    flags = [*tiny_text, "--corruption_ratio", "0.3", "--cep_gamma", "1", "--learning_rate", "1e-2"]
    script(SCRIPT, *flags)
    words = [*flags, "--output_dir", tmp_path / "two", "--train_batch_size", "4"]
    done = finished(SCRIPT, *words, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert counts(tmp_path / "two") == counts(tmp_path / "run")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=1e-4)


def test_killed_and_resumed_ends_the_same(script, tiny_text, tmp_path, caplog):
    flags = [*tiny_text, "--max_train_steps", "16", "--checkpointing_steps", "4", "--corruption_ratio", "0.3"]
    flags += ["--corruption_mode", "random", "--cep_gamma", "1", "--lr_warmup_steps", "4"]

    script(SCRIPT, *flags, "--output_dir", tmp_path / "straight")
    cut = tmp_path / "cut"
    with started(SCRIPT, *flags, "--output_dir", cut) as program:
        deadline = time.monotonic() + 120
        while program.poll() is None and not ((cut / "log.jsonl").exists() and len(losses(cut)) >= 6):
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert not (cut / "model_index.json").exists() and (cut / "checkpoint-4").is_dir()
    script(SCRIPT, *flags, "--output_dir", cut, "--resume_from_checkpoint", "latest")
    assert "Resuming from" in caplog.text
    assert losses(cut) == losses(tmp_path / "straight") and len(losses(cut)) == 16
    for part in ("bert", "unet"):
        whole, resumed = exported(tmp_path / "straight", part), exported(cut, part)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert counts(cut) == counts(tmp_path / "straight")


def test_a_resumed_run_needs_the_frozen_weights_and_tokens_it_was_trained_with(script, refused, tiny_text, tmp_path):
    folder = bert_with_weights(tmp_path / "bert", seed=1)
    flags = [*tiny_text, "--train_text_encoder", "no", "--text_encoder", folder, "--lr_scheduler", "constant"]
    script(SCRIPT, *flags, "--max_train_steps", "3")
    bert_with_weights(folder, seed=2)
    assert "frozen was" in refused(SCRIPT, *flags, "--resume_from_checkpoint", "latest")
    bert_with_weights(folder, seed=1, max_length=5)
    assert "tokens was" in refused(SCRIPT, *flags, "--resume_from_checkpoint", "latest")


def bert_with_weights(folder, seed: int, max_length: int = 24):
    """`digits-bert` with weights, in this folder."""
    torch.manual_seed(seed)
    encoder = open_text_encoder("digits-bert", trained=False)
    encoder.models[0].save_pretrained(folder)
    tokenizer = encoder.encode.tokenizers[0]
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)
    return folder


def test_tied_weights_are_saved_once_and_come_back(script, tiny_text, tmp_path):
    """T5 reads its embeddings under two names."""
    torch.manual_seed(0)
    tokenizer = open_text_encoder("digits-bert", trained=False).encode.tokenizers[0]
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    flags = [*tiny_text, "--text_encoder", tmp_path / "t5", "--checkpointing_steps", "3"]
    run(script, flags)
    run(script, flags, "--output_dir", tmp_path / "cut", "--max_train_steps", "3")
    run(script, flags, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest")
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
    whole, cut = exported(tmp_path / "run", "bert"), exported(tmp_path / "cut", "bert")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_what_a_run_starts_from_is_not_overwritten(script, refused, tiny_text, tmp_path):
    script(SCRIPT, *tiny_text, "--max_train_steps", "2")
    unet = tmp_path / "run/unet"
    said = refused(SCRIPT, *tiny_text, "--denoiser", unet, "--overwrite_output_dir")
    assert f"--overwrite_output_dir would remove what --denoiser {unet} names" in said
    assert (unet / "config.json").exists()


def test_counts_are_logged(script, tiny_text, tmp_path):
    run(script, tiny_text, "--corruption_ratio", "1.0")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    told = counts(tmp_path / "run")
    assert told["corrupted_but_still_true"] > 0
    assert {f"corruption_{name}": value for name, value in told.items()}.items() <= rows[-1].items()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--text_encoder nowhere/bert", "--text_encoder nowhere/bert"),
        ("--denoiser dit-mini", "--denoiser dit-mini"),
        ("--label_smoothing 0.1", "--label_smoothing has no effect on captions"),
        ("--cache_text_embeddings --train_text_encoder yes", "--cache_text_embeddings needs a frozen text encoder"),
        ("--use_lora", "--use_lora adapts a model that is trained already"),
        ("--rank 8", "--rank has no effect without --use_lora"),
        ("--corruption_type llm --corruption_ratio 0.1", "--corruption_type llm needs exactly one of"),
        ("--token_ratio 0.5", "--token_ratio has no effect with --corruption_type swap"),
        ("--num_validation_images 0", "--num_validation_images is 0"),
        ("--pretrained_model_name_or_path nowhere", "--pretrained_model_name_or_path nowhere"),
        ("--resolution 30", "--resolution"),
        ("--train_text_encoder no --cache_text_embeddings --corruption_ratio 0.1 --corruption_type token "
         "--corruption_mode random", "cannot be cached"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(flags, words, refused, tiny_text, tmp_path):
    if "--pretrained_model" in flags:
        for name in ("--denoiser", "--text_encoder"):
            place = tiny_text.index(name)
            tiny_text = tiny_text[:place] + tiny_text[place + 2 :]
        tiny_text += ["--recipe", "none", "--dataset_name", "digits", "--resolution", "32"]
    assert words in refused(SCRIPT, *tiny_text, *flags.split())
    assert not (tmp_path / "run/run.json").exists()


@pytest.fixture
def shards(tmp_path, tiny_text) -> list[str]:
    """Flags of a run on four shards of captioned digits: one is cut in the middle, the last has some of no use."""
    folder = tmp_path / "shards"
    paths = write_captioned_shards(folder, [24, 24, 24])
    paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size // 2])
    source = Digits("train")
    good = captioned(source, 0)
    bad = [good | {"png": b"nonsense"}, {"png": good["png"]}, good | {"txt": b"  "}]
    write_one(folder / "00003.tar", [good, *bad, *(captioned(source, index) for index in range(1, 9))])
    others = {"train_shards": folder / "{00000..00003}.tar", "shuffle_buffer_size": 16, "max_train_steps": 12}
    others |= {"resolution": 32, "pretrained_vae_model_name_or_path": "digits-vq", "checkpointing_steps": 4}
    place = tiny_text.index("--max_train_samples")
    flags = [*tiny_text[:place], *tiny_text[place + 2 :]]
    return [*flags, *(str(word) for name, value in others.items() for word in (f"--{name}", value))]


def test_shards_with_broken_parts_train_on_and_all_is_reported(script, shards, tmp_path, caplog):
    flags = [*shards, "--corruption_ratio", "0.5", "--learning_rate", "1e-2"]
    script(SCRIPT, *flags)
    said = caplog.text
    for name in ("the shard 00001.tar after", "00003.tar/0001", "00003.tar/0002", "00003.tar/0003"):
        assert f"Skipping what cannot be read: {name}" in said
    told = counts(tmp_path / "run")
    assert told["examples_seen"] == 96 and 0.3 < told["realized_ratio"] < 0.7
    assert (tmp_path / "run/model_index.json").exists()

    # Cut after step 4 and gone on with: the same examples with the same captions.
    script(SCRIPT, *flags, "--output_dir", tmp_path / "cut", "--max_train_steps", "4")
    script(SCRIPT, *flags, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest")
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
    assert counts(tmp_path / "cut") == told


def test_too_much_that_is_broken_ends_the_run(refused, shards):
    said = refused(SCRIPT, *shards, "--max_bad_images", "2")
    assert "--max_bad_images 2" in said and "cannot be read" in said


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--caption_column caption2", "--caption_column caption2: none of the first"),
        ("--cache_text_embeddings --train_text_encoder no", "--cache_text_embeddings does not go with --streaming"),
        ("--caption_rewriter x --corruption_type llm --corruption_ratio 0.1", "--caption_rewriter does not go with"),
        ("--save_corruption_map", "--save_corruption_map does not go with"),
    ],
)
def test_what_a_stream_cannot_do_is_said_in_a_sentence(flags, words, refused, shards):
    assert words in refused(SCRIPT, *shards, *flags.split())


def test_a_language_model_rewrites_captions(script, tiny_text, tmp_path):
    """The model, of random weights, babbles; what it says is what is trained on."""
    folder = tiny_language_model(tmp_path / "model")
    flags = [*tiny_text, "--corruption_ratio", "0.1", "--corruption_type", "llm", "--max_train_steps", "2"]
    script(SCRIPT, *flags, "--caption_rewriter", folder, "--save_corruption_map", "--max_train_samples", "16")
    kept = tmp_path / "run/rewritten_captions.jsonl"
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    rewritten = {row["caption"]: row["rewritten"] for row in rows if "caption" in row}
    with (tmp_path / "run/corruption_map.csv").open(newline="", encoding="utf-8") as file:
        changed = [row for row in csv.DictReader(file) if row["true"] != row["corrupted"]]
    assert changed and all(rewritten[row["true"]] == row["corrupted"] for row in changed)
    told = losses(tmp_path / "run")
    script(
        SCRIPT, *flags, "--rewritten_captions", kept, "--max_train_samples", "16", "--output_dir", tmp_path / "again"
    )
    assert losses(tmp_path / "again") == told
