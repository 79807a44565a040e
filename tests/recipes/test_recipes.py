"""Every recipe parses with the script it is for, says where each value comes from, and its model can be built."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from launching import load_script

from noisycond.arguments import RECIPES, parse_arguments
from noisycond.denoisers import build_denoiser, find_denoiser
from noisycond.first_stage import FirstStage, open_first_stage


PATHS = sorted(RECIPES.glob("*.yaml"))
AUTOENCODERS = {"digits_kl", "digits_vq"}
# Channels and factor of first stages that are not on this machine.
REMOTE = {"stabilityai/sd-vae-ft-ema": (4, 8)}
CLASSES = {"dit_xl_2_in1k": 1000}
every_recipe = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def parse(path: Path):
    if path.stem in AUTOENCODERS:
        return parse_arguments(load_script("train_autoencoder").AutoencoderArguments, ["--recipe", path.stem])
    return parse_arguments(load_script("train_class_cond").ClassCondArguments, ["--recipe", path.stem])


def test_there_are_recipes():
    assert {"digits_kl", "digits_vq", "digits_dit_mini", "dit_xl_2_in1k"} <= {path.stem for path in PATHS}


@every_recipe
def test_a_recipe_parses_and_its_values_arrive(path):
    args = parse(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        given = getattr(args, key)
        assert type(given)(value) == given if isinstance(given, float) else value == given, key


@every_recipe
def test_every_value_says_where_it_comes_from(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert len(values) == len(yaml.safe_load("\n".join(lines)))  # a value per line, no key twice
    for line in values:
        _, _, comment = line.partition("#")
        marks = re.findall(r"\[(?:seen|field|inferred)\]", comment)
        assert len(marks) == 1, line


@every_recipe
def test_a_recipe_writes_into_a_folder_of_its_own(path):
    folders = [parse(other).output_dir for other in PATHS]
    assert folders.count(parse(path).output_dir) == 1


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem in AUTOENCODERS], ids=lambda path: path.stem)
def test_the_autoencoder_of_a_recipe_builds(path):
    args = parse(path)
    with torch.device("meta"):
        first_stage = FirstStage(load_script("train_autoencoder").build_autoencoder(args))
    assert first_stage.is_variational == (args.autoencoder == "kl")
    assert first_stage.latent_channels == args.latent_channels
    assert first_stage.factor == 2 ** (len(args.block_out_channels) - 1)


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem not in AUTOENCODERS], ids=lambda path: path.stem)
def test_the_denoiser_of_a_recipe_builds(path):
    args = parse(path)
    name = args.pretrained_vae_model_name_or_path
    if name in REMOTE:
        channels, factor = REMOTE[name]
    else:
        first_stage = open_first_stage(name)
        channels, factor = first_stage.latent_channels, first_stage.factor
    assert args.resolution % factor == 0
    size, count = args.resolution // factor, CLASSES.get(path.stem, 10)
    with torch.device("meta"):
        denoiser = build_denoiser(
            find_denoiser(args.denoiser),
            class_names=[str(number) for number in range(count)],
            latent_channels=channels,
            latent_size=size,
        )
    noisy = torch.empty(2, channels, size, size, device="meta")
    label = torch.zeros(2, dtype=torch.int64, device="meta")
    prediction = denoiser(noisy, label, {"class_labels": label})
    learned_variance = find_denoiser(args.denoiser).preset.learned_variance
    assert prediction.shape == (2, channels * (1 + learned_variance), size, size)


def test_the_model_of_the_paper_has_its_size():
    args = parse(RECIPES / "dit_xl_2_in1k.yaml")
    channels, factor = REMOTE[args.pretrained_vae_model_name_or_path]
    assert args.resolution // factor == 32
    with torch.device("meta"):
        denoiser = build_denoiser(
            find_denoiser(args.denoiser), class_names=["a"] * 1000, latent_channels=channels, latent_size=32
        )
    # Table 1 of arXiv:2212.09748 has 675 million.
    assert abs(sum(value.numel() for value in denoiser.parameters()) / 675e6 - 1) < 0.005
