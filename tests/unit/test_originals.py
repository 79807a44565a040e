"""Original weights, converted: the same predictions as small originals written out in tests/helpers."""

import collections
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, VQModel
from original_models import OriginalAutoencoder, OriginalDiT, OriginalUNet, ldm_state, shaken

from noisycond.denoisers import PRESETS
from noisycond.errors import InputError
from noisycond.noise_schedule import named_schedule
from noisycond.objective import make_betas
from noisycond.originals.dit import convert_dit
from noisycond.originals.ldm import Settings, convert_first_stage, convert_ldm, convert_unet, read_settings
from noisycond.originals.reading import read_weights, recognize
from noisycond.pipelines import OriginalDiTPipeline


pytestmark = pytest.mark.usefixtures("one_thread")


def dit_batch(model: OriginalDiT, classes: int = 10):
    noisy = torch.randn((classes + 1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    return noisy, torch.linspace(0, 999, classes + 1).long(), torch.arange(classes + 1)


@pytest.mark.parametrize("out_channels", [4, 8])
@torch.no_grad()
def test_a_dit_predicts_what_the_original_does(out_channels, tmp_path):
    original = shaken(OriginalDiT(out_channels=out_channels))
    stock = convert_dit(original.state_dict(), tmp_path / "x.pt", attention_heads=4)
    OriginalDiTPipeline(stock, AutoencoderKL(), DDIMScheduler())
    noisy, timesteps, labels = dit_batch(original)
    stock_labels = torch.where(labels == 10, 1000, labels)
    found = stock(noisy, timestep=timesteps, class_labels=stock_labels).sample
    wanted = original(noisy, timesteps, labels)
    assert wanted.std() > 0.1 and (found - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_stock_frequencies_are_what_the_own_dit_pipeline_mends(tmp_path):
    """The one thing in which stock diffusers differs: should it be mended there, the pipeline has served."""
    original = shaken(OriginalDiT())
    stock = convert_dit(original.state_dict(), tmp_path / "x.pt", attention_heads=4)
    noisy, timesteps, labels = dit_batch(original)
    found = stock(noisy, timestep=timesteps, class_labels=torch.where(labels == 10, 1000, labels)).sample
    assert (found - original(noisy, timesteps, labels)).abs().max() > 0.1
    original.spacing = 127
    assert (found - original(noisy, timesteps, labels)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"widths": (32, 32, 64), "attends": (True, False, True), "blocks": 1, "heads": 4},
    ],
)
@torch.no_grad()
def test_a_unet_predicts_what_the_original_does(shape, tmp_path):
    original = shaken(OriginalUNet(**shape))
    unet = convert_unet(original.state_dict(), tmp_path / "x.ckpt", Settings(shape.get("heads", 1)), 16)
    noisy = torch.randn((3, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    timesteps, context = (
        torch.tensor([0, 500, 999]),
        torch.randn((3, 1, 24), generator=torch.Generator().manual_seed(2)),
    )
    wanted = original(noisy, timesteps, context)
    assert wanted.std() > 0.1 and (unet(noisy, timesteps, context).sample - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    "shape", [{}, {"codes": None, "dim": 4, "inner": 4}, {"widths": (32, 32, 64), "blocks": 1, "dim": 4}]
)
@torch.no_grad()
def test_a_first_stage_does_what_the_original_does(shape, tmp_path):
    original = shaken(OriginalAutoencoder(**shape))
    state = original.state_dict()
    found = convert_first_stage(state, tmp_path / "x.ckpt", 32)
    images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    wanted = original.encode(images)
    if shape.get("codes", 1) is None:
        assert type(found) is AutoencoderKL
        latents = wanted.chunk(2, dim=1)[0]
        assert (found.encode(images).latent_dist.parameters - wanted).abs().max() < 1e-5
    else:
        assert type(found) is VQModel
        latents = wanted
        assert (found.encode(images).latents - wanted).abs().max() < 1e-5
    wanted = original.decode(latents)
    assert wanted.std() > 0.1 and (found.decode(latents).sample - wanted).abs().max() < 3e-5


def test_the_models_of_the_papers_are_recognized_by_their_shapes(tmp_path):
    """At full size, without values."""
    with torch.device("meta"):
        original = OriginalUNet((192, 384, 576, 960), (False, True, True, True), context=512)
        unet = convert_unet(original.state_dict(), tmp_path / "x", Settings(), 64)
        first_stage = convert_first_stage(
            OriginalAutoencoder((128, 256, 512), codes=8192).state_dict(), tmp_path / "x", 256
        )
    config = PRESETS["ldm-4"].config
    found = {
        key: tuple(unet.config[key]) if isinstance(value, tuple) else unet.config[key] for key, value in config.items()
    }
    assert found == config
    assert abs(sum(value.numel() for value in unet.parameters()) / 400.9e6 - 1) < 0.001
    assert first_stage.config.num_vq_embeddings == 8192 and first_stage.config.layers_per_block == 2


def save(content, tmp_path, name: str = "x.ckpt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.fixture(scope="module")
def ldm():
    unet, first_stage = shaken(OriginalUNet(blocks=1)), shaken(OriginalAutoencoder())
    return ldm_state(unet, first_stage, torch.randn(11, 24))


def with_average(state: dict) -> dict:
    """The state with a moving average of other weights, named as LDM names it."""
    prefix = "model.diffusion_model"
    names = [name for name in state if name.startswith(prefix)]
    average = {"model_ema." + name.removeprefix("model.").replace(".", ""): state[name] + 1 for name in names}
    return state | average | {"model_ema.decay": torch.tensor(0.9999)}


def test_an_ldm_checkpoint_becomes_a_pipeline(ldm, tmp_path):
    pipeline = convert_ldm(ldm, tmp_path / "x", Settings(), resolution=32)
    assert pipeline.unet.config.sample_size == 16 and pipeline.class_embedder.null_class == 10
    assert torch.equal(pipeline.class_embedder.embedding.weight, ldm["cond_stage_model.embedding.weight"])
    scheduler = pipeline.scheduler.config
    named = {
        key: scheduler[key] for key in ("beta_schedule", "beta_start", "beta_end", "trained_betas", "clip_sample")
    }
    assert named == {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert pipeline.vqvae.config.scaling_factor == 1.0
    images = pipeline([3, 7], num_inference_steps=2, output_type="np", generator=torch.manual_seed(0)).images
    assert images.shape == (2, 32, 32, 3)


def test_what_the_weights_state_wins(ldm, tmp_path):
    betas = torch.linspace(0.001, 0.01, 1000) ** 1.5
    state = ldm | {"betas": betas, "scale_factor": torch.tensor(0.25)}
    pipeline = convert_ldm(state, tmp_path / "x", Settings(scaling_factor=3.0), resolution=32)
    assert torch.allclose(torch.tensor(pipeline.scheduler.config.trained_betas), betas)
    assert pipeline.vqvae.config.scaling_factor == 0.25
    again = convert_ldm(state, tmp_path / "x", Settings(), resolution=32, scaling_factor=0.5)
    assert again.vqvae.config.scaling_factor == 0.5


def test_the_moving_average_is_used_and_said(ldm, tmp_path, caplog):
    caplog.set_level("INFO", logger="noisycond")
    plain = convert_ldm(ldm, tmp_path / "x", Settings(), resolution=32)
    assert "moving average" not in caplog.text
    averaged = convert_ldm(with_average(ldm), tmp_path / "x", Settings(), resolution=32)
    assert "moving average" in caplog.text
    pairs = zip(plain.unet.parameters(), averaged.unet.parameters(), strict=True)
    assert all(torch.equal(a + 1, b) for a, b in pairs)
    damaged = {name: value for name, value in with_average(ldm).items() if name != "model_ema.diffusion_modelout2bias"}
    with pytest.raises(InputError, match="moving average.*lacks model_ema.diffusion_modelout2bias"):
        convert_ldm(damaged, tmp_path / "x", Settings(), resolution=32)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda state: state.pop("model.diffusion_model.out.0.weight"),
            "U-Net has another architecture.*conv_norm_out",
        ),
        (lambda state: state.update({"model.diffusion_model.label_emb.weight": torch.zeros(3, 3)}), "label_emb"),
        (lambda state: state.update({"model.diffusion_model.input_blocks.1.0.x": torch.zeros(3)}), "resnets.0.x"),
        (
            lambda state: state.update({"model.diffusion_model.other.weight": torch.zeros(3)}),
            "weights of the original",
        ),
        (lambda state: state.pop("model.diffusion_model.middle_block.1.proj_in.weight"), "attends to a class"),
        (lambda state: state.pop("first_stage_model.decoder.conv_in.bias"), "first stage has another architecture"),
        (lambda state: state.pop("first_stage_model.encoder.conv_in.weight"), "neither LDM's KL nor its VQ"),
        (
            lambda state: state.update({"first_stage_model.encoder.down.1.attn.0.q.weight": torch.zeros(1)}),
            "attends on",
        ),
        (lambda state: [state.pop(key) for key in list(state) if key.startswith("first_stage")], "--first_stage"),
        (lambda state: state.update({"cond_stage_model.embedding.weight": torch.zeros(11, 9)}), "24 numbers.*has 9"),
    ],
)
def test_an_ldm_of_another_architecture_is_named(ldm, tmp_path, change, words):
    state = dict(ldm)
    change(state)
    with pytest.raises(InputError, match=words):
        convert_ldm(state, tmp_path / "x", Settings(), resolution=32)


def config(**unet) -> dict:
    return {"model": {"params": {"linear_start": 0.0015, "linear_end": 0.0195, "unet_config": {"params": unet}}}}


def test_a_configuration_tells_what_shapes_do_not(tmp_path):
    settings = read_settings(config(num_heads=8, image_size=64), tmp_path / "x.yaml")
    assert settings == Settings(8, None, 64, "epsilon", (0.0015, 0.0195, 1000), 1.0)
    original = OriginalUNet(blocks=1)
    by_channels = read_settings(config(num_head_channels=32), tmp_path / "x.yaml")
    unet = convert_unet(original.state_dict(), tmp_path / "x", by_channels, 16)
    assert unet.config.attention_head_dim == [1, 2, 2]
    with pytest.raises(InputError, match="5 attention heads do not divide a width of 32"):
        convert_unet(original.state_dict(), tmp_path / "x", Settings(5), 16)


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, "expected a configuration of LDM"),
        ("text", "expected a configuration of LDM"),
        (
            {"model": {"params": {"beta_schedule": "cosine", "unet_config": {"params": {}}}}},
            "beta_schedule is 'cosine'",
        ),
        ({"model": {"params": {"parameterization": "y", "unet_config": {"params": {}}}}}, "parameterization is 'y'"),
    ],
)
def test_another_configuration_is_named(content, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read_settings(content, tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state.pop("blocks.1.mlp.fc1.weight"), "transformer_blocks.1.ff.net.0.proj.weight"),
        (lambda state: state.update({"blocks.1.norm.weight": torch.ones(48)}), "norm.weight"),
        (lambda state: state.pop("pos_embed"), "pos_embed"),
        (lambda state: state.update({"pos_embed": state["pos_embed"] + 0.1}), "sine-cosine"),
    ],
)
def test_a_dit_of_another_architecture_is_named(tmp_path, change, words):
    state = dict(OriginalDiT().state_dict())
    change(state)
    with pytest.raises(InputError, match=words):
        convert_dit(state, tmp_path / "x.pt", attention_heads=4)


def test_heads_of_a_dit_are_those_of_its_size_or_asked_for(tmp_path):
    state = OriginalDiT().state_dict()
    with pytest.raises(InputError, match="2 blocks of width 48.*--attention_heads"):
        convert_dit(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match="--attention_heads is 5, but must divide.*48"):
        convert_dit(state, tmp_path / "x.pt", attention_heads=5)
    small = OriginalDiT(width=384, layers=12, heads=6)
    assert convert_dit(small.state_dict(), tmp_path / "x.pt").config.num_attention_heads == 6


# Files


def test_weights_are_found_under_their_wrappers(tmp_path):
    state = {"a.b": torch.ones(2)}
    for content, entry in (
        (state, ""),
        ({"state_dict": state, "epoch": 3}, "state_dict"),
        ({"model": {"a.b": torch.zeros(2)}, "ema": state}, "ema"),
        ({"module.a.b": torch.ones(2)}, ""),
    ):
        found, where = read_weights(save(content, tmp_path))
        assert list(found) == ["a.b"] and torch.equal(found["a.b"], torch.ones(2)) and where == entry


def explode():
    raise AssertionError("code of the checkpoint was run")


class Callback:
    """Stands for an object that Lightning leaves in a checkpoint."""

    def __reduce__(self):
        return (explode, ())


class AttributeDict(dict):
    """Stands for the dict of Lightning's hyperparameters."""

    __getattr__ = dict.__getitem__


class Names(list):
    pass


def with_attribute(thing):
    thing.__dict__["note"] = torch.ones(1)
    return thing


def test_objects_of_other_libraries_are_not_run(tmp_path):
    """Callbacks as keys, settings as objects: as Lightning and argparse leave them."""
    content = {
        "state_dict": {"a": torch.ones(2)},
        "callbacks": {Callback: {"best": torch.ones(1)}},
        "args": SimpleNamespace(lr=1e-4),
        "hyper_parameters": AttributeDict(
            x=Callback(), best=np.float64(0.5), deeper=AttributeDict(names=Names([1, 2]))
        ),
        "others": [with_attribute(AttributeDict()), Names(), Names([3]), collections.defaultdict(Callback, a=1)],
        "queue": collections.deque([1], maxlen=3),
        "parts": {Callback, AttributeDict},
    }
    path = save(content, tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    found, _ = read_weights(path)
    assert torch.equal(found["a"], torch.ones(2))


class Evil:
    def __reduce__(self):
        import os

        return (os.system, ("touch /tmp/noisycond-was-here",))


@pytest.mark.parametrize(
    "content", [b"no checkpoint", pickle.dumps({"a": 1}), Evil(), {"deep": with_attribute(Names([1]))}]
)
def test_what_cannot_be_read_safely_is_refused(content, tmp_path):
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"state_dict": {"a": torch.ones(1)}, "x": content}, path)
    with pytest.raises(
        InputError,
        match=f"{path}: (cannot be read as weights alone.*only if you trust.*weights_only=False|holds no weights)",
    ):
        read_weights(path)


@pytest.mark.parametrize(
    "names, words",
    [
        (["model.diffusion_model.x", "cond_stage_model.transformer.y"], r"\(cond_stage_model.transformer\.\*\)"),
        (["model.diffusion_model.out.2.bias"], "without a class embedding"),
        (["adapter.body.0.weight", "adapter.conv_in.weight"], "another architecture.*adapter.body.0.weight"),
        (["x_embedder.proj.weight", "blocks.0.attn.qkv.weight"], "another architecture"),
    ],
)
def test_another_architecture_is_named(names, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        recognize({name: torch.zeros(1) for name in names}, tmp_path / "x.ckpt")
    assert "expected the weights of a class-conditional LDM" in str(caught.value)


@pytest.mark.parametrize(
    "schedule", [("linear", 0.0001, 0.02), ("scaled_linear", 0.0015, 0.0195), ("squaredcos_cap_v2", 0.0001, 0.02)]
)
def test_spelled_out_betas_are_named(schedule):
    betas = make_betas(*schedule, 1000)
    wanted = dict(zip(("beta_schedule", "beta_start", "beta_end"), schedule, strict=True))
    assert named_schedule(betas) == named_schedule(betas.float().tolist()) == wanted
    assert named_schedule(betas * torch.linspace(1, 1.01, 1000)) != wanted
    assert named_schedule(betas.flip(0)) is None
