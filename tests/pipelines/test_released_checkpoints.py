"""Folders in the layouts of the released checkpoints: what opens them, what they give, and what is said of a piece
that is missing."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from released_layout import change_json, write_ldm
from safetensors.torch import load_file, save_file

from noisycond.denoisers import build_denoiser, find_denoiser
from noisycond.errors import InputError
from noisycond.pipelines import ClassEmbedder, LDMClassToImagePipeline


pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [str(label) for label in range(10)]


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.manual_seed(5)
    return pipeline([3, 9, 0], num_inference_steps=3, output_type="np", generator=generator).images


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_ldm(tmp_path_factory.mktemp("released") / "ldm")


@pytest.fixture
def folder(released, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(released, tmp_path / "ldm")


def test_stock_diffusers_does_not_open_a_released_ldm(released):
    """What docs/checkpoints.md quotes; should it open one day, our override has served."""
    for trust in (False, True):
        with pytest.raises(AttributeError, match="module diffusers has no attribute LDMClassToImagePipeline"):
            DiffusionPipeline.from_pretrained(released, trust_remote_code=trust)


def test_its_parts_are_where_they_belong(released):
    pipeline = LDMClassToImagePipeline.from_pretrained(released)
    table = load_file(released / "class_embedder/diffusion_pytorch_model.safetensors")["embedding.weight"]
    assert torch.equal(pipeline.class_embedder.embedding.weight, table) and pipeline.class_embedder.null_class == 10
    images = draw(pipeline)
    parts = LDMClassToImagePipeline(
        UNet2DConditionModel.from_pretrained(released / "unet"),
        ClassEmbedder.from_table(table),
        DDIMScheduler.from_pretrained(released / "scheduler"),
        pipeline.vqvae,
    )
    assert images.std() > 0.01 and np.array_equal(draw(parts), images)


@pytest.mark.parametrize("embedder", ["class_embedder", "cond_stage_model", "embedder", "bert"])
@pytest.mark.parametrize("first_stage", ["vqvae", "vae"])
def test_a_component_is_found_by_its_class(released, embedder, first_stage, tmp_path):
    other = write_ldm(tmp_path / "x", embedder, first_stage)
    pipeline = LDMClassToImagePipeline.from_pretrained(other)
    assert np.array_equal(draw(pipeline), draw(LDMClassToImagePipeline.from_pretrained(released)))
    pipeline.save_pretrained(tmp_path / "y")
    assert sorted(path.name for path in (tmp_path / "y").iterdir() if path.is_dir()) == [
        "class_embedder",
        "scheduler",
        "unet",
        "vqvae",
    ]


def test_old_parameter_names_and_pickles(released, tmp_path):
    old = write_ldm(tmp_path / "x", old=True)
    assert not list(old.rglob("*.safetensors")) and "query" in str(torch.load(next(old.glob("vqvae/*.bin"))).keys())
    assert np.array_equal(
        draw(LDMClassToImagePipeline.from_pretrained(old)), draw(LDMClassToImagePipeline.from_pretrained(released))
    )


def test_pickles_of_a_gpu_are_read_on_the_cpu(tmp_path, monkeypatch):
    """As a table saved on another machine's device: the place is asked for before the numbers are there."""
    places, load = [], torch.load

    def noticing(*args, **options):
        places.append(options.get("map_location"))
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", noticing)
    LDMClassToImagePipeline.from_pretrained(write_ldm(tmp_path, old=True))
    assert places and all(place is not None and torch.device(place).type in ("cpu", "meta") for place in places)


def test_sharded_weights(released, folder):
    UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(folder / "sharded", max_shard_size="20KB")
    shutil.rmtree(folder / "unet")
    (folder / "sharded").rename(folder / "unet")
    assert len(list(folder.glob("unet/*.safetensors"))) > 1
    file = folder / "class_embedder/diffusion_pytorch_model.safetensors"
    name, table = next(iter(load_file(file).items()))
    save_file({name: table}, file.with_name("diffusion_pytorch_model-00002-of-00002.safetensors"))
    save_file({"other": torch.zeros(3)}, file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    file.unlink()
    assert np.array_equal(
        draw(LDMClassToImagePipeline.from_pretrained(folder)), draw(LDMClassToImagePipeline.from_pretrained(released))
    )


def test_a_variant_is_taken_where_it_is_asked_for(released, folder):
    for file in list(folder.rglob("*.safetensors")):
        weights = {name: value + 0.25 for name, value in load_file(file).items()}
        save_file(weights, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    plain = LDMClassToImagePipeline.from_pretrained(folder)
    variant = LDMClassToImagePipeline.from_pretrained(folder, variant="fp16")
    for name in ("class_embedder", "unet", "vqvae"):
        for a, b in zip(getattr(plain, name).parameters(), getattr(variant, name).parameters(), strict=True):
            assert torch.equal(a + 0.25, b), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, {"class_embedder": torch.bfloat16, "default": torch.bfloat16}])
@pytest.mark.parametrize("first_stage", ["vqvae", "vae"])
def test_precision(dtype, first_stage, tmp_path):
    pipeline = LDMClassToImagePipeline.from_pretrained(write_ldm(tmp_path, "x", first_stage), torch_dtype=dtype)
    assert {pipeline.unet.dtype, pipeline.class_embedder.dtype, pipeline.vqvae.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("first_stage", ["vqvae", "vae"])
@pytest.mark.parametrize(
    "stated, asked, used, words",
    [(None, None, 1.0, "1.0 (as none"), (0.5, None, 0.5, "0.5 (of its conf"), (0.5, 2.0, 2.0, "2.0 (as asked")],
)
def test_the_scaling_factor_is_said(first_stage, stated, asked, used, words, tmp_path, caplog):
    folder = write_ldm(tmp_path / "x", first_stage=first_stage)
    change_json(folder / first_stage / "config.json", scaling_factor=stated)
    pipeline = LDMClassToImagePipeline.from_pretrained(folder, scaling_factor=asked)
    assert pipeline.vqvae.config.scaling_factor == used
    assert f"scaling factor is {words}" in caplog.text


def test_a_kl_first_stage_is_found(folder):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    shutil.rmtree(folder / "vqvae")
    vae.save_pretrained(folder / "vae")
    change_json(folder / "model_index.json", vqvae=None, vae=["diffusers", "AutoencoderKL"])
    for stated, used in ((None, 0.18215), (0.5, 0.5)):
        change_json(folder / "vae/config.json", scaling_factor=stated)
        found = LDMClassToImagePipeline.from_pretrained(folder).vqvae
        assert type(found) is AutoencoderKL and found.config.scaling_factor == used


def remove(name: str):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def undeclare(**changes):
    return lambda folder: change_json(folder / "model_index.json", **changes)


WEIGHTS = "diffusion_pytorch_model.safetensors"
MISSING = [
    (remove("model_index.json"), "model_index.json is missing"),
    (lambda folder: (folder / "model_index.json").write_text("{"), "not valid JSON"),
    (undeclare(class_embedder=None), "declares no component of the class ClassEmbedder"),
    (remove("class_embedder"), "class embedder's weights are missing"),
    (remove(f"class_embedder/{WEIGHTS}"), "class embedder's weights are missing"),
    (lambda folder: (folder / f"class_embedder/{WEIGHTS}").write_bytes(b"x" * 9), "cannot be read"),
    (lambda folder: save_file({"x": torch.zeros(3)}, folder / f"class_embedder/{WEIGHTS}"), "one table.*found 0"),
    (lambda folder: save_file({"x": torch.zeros(11, 9)}, folder / f"class_embedder/{WEIGHTS}"), "12 numbers.*have 9"),
    (undeclare(unet=None), "declares no U-Net"),
    (undeclare(unet=[None, None]), "declares no U-Net"),
    (remove("unet"), "U-Net is missing.*unet/config.json"),
    (remove(f"unet/{WEIGHTS}"), "U-Net's weights are missing"),
    (undeclare(scheduler=None), "declares no scheduler"),
    (remove("scheduler"), "scheduler is missing.*scheduler/scheduler_config.json"),
    (undeclare(scheduler=["diffusers", "OtherScheduler"]), "diffusers cannot open it.*OtherScheduler"),
    (remove("vqvae"), "first stage is missing.*vqvae/config.json.*vqvae=None"),
    (remove(f"vqvae/{WEIGHTS}"), "first stage's weights are missing"),
]


@pytest.mark.parametrize("damage, words", MISSING, ids=[words for _, words in MISSING])
def test_a_missing_piece_is_named(folder, damage, words):
    damage(folder)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        LDMClassToImagePipeline.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_given_may_be_missing(released, folder):
    shutil.rmtree(folder / "vqvae")
    whole = LDMClassToImagePipeline.from_pretrained(released)
    assert LDMClassToImagePipeline.from_pretrained(folder, vqvae=None).vqvae is None
    for name in ("class_embedder", "scheduler"):
        shutil.rmtree(folder / name)
    pipeline = LDMClassToImagePipeline.from_pretrained(
        folder, vqvae=whole.vqvae, class_embedder=whole.class_embedder, scheduler=whole.scheduler
    )
    assert np.array_equal(draw(pipeline), draw(whole))


def test_without_a_first_stage_images_are_refused(folder):
    undeclare(vqvae=None)(folder)
    pipeline = LDMClassToImagePipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="no first stage"):
        draw(pipeline)


def test_a_name_that_is_nowhere():
    with pytest.raises(OSError, match="nobody/nothing: neither a folder nor a Hub id"):
        LDMClassToImagePipeline.from_pretrained("nobody/nothing")


def test_no_code_of_the_folder_is_run(folder):
    for place in (folder, folder / "class_embedder"):
        for name in ("latent_diffusion", "ldm_class_to_image"):
            (place / f"{name}.py").write_text("raise SystemExit('code of the folder was run')")
    undeclare(_class_name=["ldm_class_to_image", "LDMClassToImagePipeline"])(folder)
    draw(LDMClassToImagePipeline.from_pretrained(folder))


# Training on


def test_a_released_folder_is_trained_on(released):
    source = find_denoiser(str(released))
    schedule = (source.preset.beta_schedule, source.preset.beta_start, source.preset.beta_end)
    assert schedule == ("scaled_linear", 0.0015, 0.0195)
    denoiser = build_denoiser(source, class_names=NAMES, latent_channels=3, latent_size=8).eval()
    pipeline = LDMClassToImagePipeline.from_pretrained(released)
    noisy, timesteps = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    labels = torch.tensor([0, 9, 10])
    with torch.no_grad():
        wanted = pipeline.unet(noisy, timesteps, pipeline.class_embedder(labels)).sample
        assert torch.equal(denoiser(noisy, timesteps, {"class_labels": labels}), wanted)


def test_keys_of_another_version_are_passed_over(tmp_path):
    source = find_denoiser(str(write_ldm(tmp_path, old=True)))
    build_denoiser(source, class_names=NAMES, latent_channels=3, latent_size=8)


def test_betas_of_no_schedule_are_refused(folder):
    change_json(folder / "scheduler/scheduler_config.json", trained_betas=[0.1, 0.3, 0.2])
    with pytest.raises(InputError, match="3 betas .trained_betas. of no schedule"):
        find_denoiser(str(folder))


@pytest.mark.parametrize("piece", [f"class_embedder/{WEIGHTS}", f"unet/{WEIGHTS}", "scheduler"])
def test_a_missing_piece_is_an_input_error_of_the_denoiser(folder, piece):
    remove(piece)(folder)
    with pytest.raises(InputError, match=f"--denoiser {folder}.* missing"):
        build_denoiser(find_denoiser(str(folder)), class_names=NAMES, latent_channels=3, latent_size=8)
