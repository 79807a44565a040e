"""Every recipe parses with the script it is for, says where each value comes from, and its model can be built."""

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
import yaml
from launching import load_script
from script_flags import arguments_class

from noisycond.arguments import parse_arguments
from noisycond.denoisers import build_denoiser, find_denoiser
from noisycond.first_stage import FirstStage, open_first_stage
from noisycond.recipes import RECIPES, recipe_names


PATHS = [RECIPES / f"{name}.yaml" for name in recipe_names()]
AUTOENCODERS = {"digits_kl", "digits_vq"}
# Channels and factor of first stages that are not on this machine.
REMOTE = {"stabilityai/sd-vae-ft-ema": (4, 8), "CompVis/ldm-celebahq-256": (3, 4)}
PERSONALIZATIONS = ("train_controlnet", "train_t2i_adapter")


def script_of(path: Path) -> str:
    if path.stem in AUTOENCODERS:
        return "train_autoencoder"
    if path.stem.endswith("_evaluation"):
        return "evaluate_model"
    if path.stem.startswith("prepare_"):
        return "prepare_dataset"
    model = str(path.relative_to(RECIPES))
    if model.startswith(("lcm_", "digits_lcm", "digits_text_lcm")):
        return "train_lcm_distill"
    for script in PERSONALIZATIONS:
        kind = script.removeprefix("train_")
        if model.startswith((kind, f"digits_{kind}", f"digits_text_{kind}")):
            return script
    return "train_text_to_image_corrupt" if model.startswith(("ldm_4_cc3m", "digits_text")) else "train_class_cond"


def each(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(RECIPES)))


every_recipe = each(PATHS)
TRAINING = [path for path in PATHS if script_of(path) not in ("evaluate_model", "prepare_dataset")]
# Those that build on another have its model.
MODELS = [path for path in TRAINING if path.parent == RECIPES]


@functools.cache  # a recipe is looked at by several tests
def parse(path: Path):
    name, script = str(path.relative_to(RECIPES)).removesuffix(".yaml"), script_of(path)
    argv = ["--recipe", name] + (["--pipeline", "runs/demo"] if script == "evaluate_model" else [])
    return parse_arguments(arguments_class(script, argv), argv)


def test_there_are_recipes():
    settings = [f"eta_{ratio}" for ratio in ("2.5", "5", "7.5", "10", "15", "20")]
    settings += ["eta_2.5_random", "cep_u", "cep_g", "cep_fixed"]
    settings += ["input_perturbation", "embedding_dropout", "label_smoothing"]
    models = ("ldm_4_in1k", "dit_xl_2_in1k", "ldm_4_cc3m")
    distilled = {"digits_text_lcm", "lcm_sd15_cc3m"}
    distilled |= {f"lcm_sd15_cc3m/{setting}" for setting in ("cep_u", "cep_g", "input_perturbation")}
    expected = distilled | {"digits_kl", "digits_vq", "digits_dit_mini", "digits_text", "digits_lcm", *models}
    expected |= {f"{model}/{setting}" for model in models for setting in settings}
    assert expected - {"ldm_4_cc3m/label_smoothing"} <= set(recipe_names())  # captions have no mean class


@every_recipe
def test_a_recipe_parses_and_its_values_arrive(path):
    args = parse(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values.pop("base", None)
    for key, value in values.items():
        given = getattr(args, key)
        assert type(given)(value) == given if isinstance(given, float) else value == given, key


@every_recipe
def test_every_value_says_where_it_comes_from(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if line.strip() and not line.lstrip().startswith(("#", "base:"))]
    assert len(values) == len(yaml.safe_load("\n".join(lines)).keys() - {"base"})  # a value per line, no key twice
    for line in values:
        _, _, comment = line.partition("#")
        marks = re.findall(r"\[(?:seen|field|inferred)\]", comment)
        assert len(marks) == 1, line


def test_a_recipe_writes_into_a_folder_of_its_own():
    folders = [parse(path).output_dir for path in TRAINING]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("model", ["ldm_4_in1k", "dit_xl_2_in1k", "ldm_4_cc3m", "lcm_sd15_cc3m"])
def test_the_settings_of_a_model_differ_in_what_they_are_named_after_alone(model):
    clean = dataclasses.asdict(parse(RECIPES / f"{model}.yaml"))
    assert clean["corruption_ratio"] == clean["cep_gamma"] == clean["input_perturbation"] == 0
    assert clean["embedding_dropout"] == clean["label_smoothing"] == 0
    for path in (RECIPES / model).glob("*.yaml"):
        args = dataclasses.asdict(parse(path))
        changed = {name for name in args if args[name] != clean[name]} - {"recipe", "output_dir"}
        expected = {"eta": "corruption_", "cep": "cep_"}.get(path.stem.split("_")[0], path.stem)
        assert changed and all(name.startswith(expected) for name in changed), path
        if path.stem.startswith("eta"):
            assert args["corruption_ratio"] == float(path.stem.split("_")[1]) / 100


def test_global_batches_of_the_papers():
    """On eight GPUs: 1200 for LDM-4 (arXiv:2112.10752), 256 for DiT (arXiv:2212.09748)."""
    for model, batch, steps in (("ldm_4_in1k", 1200, 178_000), ("dit_xl_2_in1k", 256, 400_000)):
        args = parse(RECIPES / f"{model}.yaml")
        assert args.train_batch_size * args.gradient_accumulation_steps * 8 == batch
        assert (args.max_train_steps, args.num_classes) == (steps, 1000)


TABLE = ("controlnet_in1k", "controlnet_cc3m", "t2i_adapter_in1k", "t2i_adapter_cc3m")
BASES = {"clean": "clean", "eta_2.5": "random_noise_2.5", "ip": "input-perturbation"}
BASES |= {"cep_u": "clean_condnoise_uniform", "cep_g": "clean_condnoise_gaussian"}


@pytest.mark.parametrize("model", TABLE)
def test_the_personalizations_of_the_paper(model):
    """Two controls on five bases; all but base and control is the same, and 8 GPUs see 256 images a step."""
    first = parse(RECIPES / f"{model}.yaml")
    assert type(first).__name__.startswith("Class" if model.endswith("in1k") else "Text")
    assert first.train_batch_size * first.gradient_accumulation_steps * 8 == 256
    assert f"{first.max_train_steps:,} optimizer steps are {first.max_train_steps * 256:,} images" in (
        RECIPES / f"{model}.yaml"
    ).read_text(encoding="utf-8")
    runs = {"canny_clean": first} | {path.stem: parse(path) for path in (RECIPES / model).glob("*.yaml")}
    assert runs.keys() == {f"{control}_{base}" for control in ("canny", "sam") for base in BASES}
    named = ("recipe", "output_dir", "pretrained_model_name_or_path", "control_column")
    shared = [
        {name: value for name, value in dataclasses.asdict(args).items() if name not in named}
        for args in runs.values()
    ]
    assert all(values == shared[0] for values in shared)
    for name, args in runs.items():
        control, _, base = name.partition("_")
        assert args.control_column == control and args.pretrained_model_name_or_path.endswith(BASES[base]), name
        assert model.rpartition("_")[2] in args.pretrained_model_name_or_path
        assert args.corruption_ratio == args.cep_gamma == args.input_perturbation == 0  # of the base alone


def test_the_classes_of_imagenet_100():
    names = (RECIPES / "imagenet100.txt").read_text(encoding="utf-8").split()
    assert len(names) == len(set(names)) == 100 and all(re.fullmatch(r"n\d{8}", name) for name in names)


# Of the settings that build on a model, which differ in corruption and CEP alone, one each. A distillation needs its
# teacher and a personalization its base: they are rehearsed where there is one.
REHEARSED = [path for path in MODELS if script_of(path) not in ("train_lcm_distill", *PERSONALIZATIONS)]
REHEARSED += [folder / "cep_u.yaml" for folder in sorted(RECIPES.iterdir()) if (folder / "eta_5.yaml").exists()]


@each(REHEARSED)
def test_dry_run(path, script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a recipe's output folder is relative
    name = str(path.relative_to(RECIPES)).removesuffix(".yaml")
    script(script_of(path), "--recipe", name, "--dry_run")
    said = capsys.readouterr().out
    for words in ("parameters", "trainable", "global batch", "optimizer steps", "memory per device", "weights"):
        assert words in said
    for words in ("gradients", "optimizer state (AdamW)", "moving average", "total", "activations"):
        assert words in said
    assert "[inferred]" in said and f"output_dir {parse(path).output_dir}" in said
    assert ("ImageNet" in path.read_text()) == ("1001 rows" in said)
    assert not list(tmp_path.iterdir())  # nothing was written


def test_a_recipe_of_a_distillation_has_the_flags_of_its_teacher(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = {path.stem: type(parse(path)).__name__ for path in PATHS if script_of(path) == "train_lcm_distill"}
    assert kinds.pop("digits_lcm") == "ClassLCMArguments" and set(kinds.values()) == {"TextLCMArguments"}
    said = refused("train_lcm_distill", "--recipe", "lcm_sd15_cc3m/cep_u", "--dry_run")
    assert said.startswith("--pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5:")
    assert "digits_text" in refused("train_lcm_distill", "--recipe", "digits_text_lcm")


@pytest.mark.parametrize("path", [path for path in MODELS if path.stem in AUTOENCODERS], ids=lambda path: path.stem)
def test_the_autoencoder_of_a_recipe_builds(path):
    args = parse(path)
    with torch.device("meta"):
        first_stage = FirstStage(load_script("train_autoencoder").build_autoencoder(args))
    assert first_stage.is_variational == (args.autoencoder == "kl")
    assert first_stage.latent_channels == args.latent_channels
    assert first_stage.factor == 2 ** (len(args.block_out_channels) - 1)


@pytest.mark.parametrize(
    "path", [path for path in MODELS if script_of(path) == "train_class_cond"], ids=lambda path: path.stem
)
def test_the_denoiser_of_a_recipe_builds(path):
    args = parse(path)
    name = args.pretrained_vae_model_name_or_path
    if name in REMOTE:
        channels, factor = REMOTE[name]
    else:
        first_stage = open_first_stage(name)
        channels, factor = first_stage.latent_channels, first_stage.factor
    assert args.resolution % factor == 0
    size, count = args.resolution // factor, args.num_classes or 10
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
