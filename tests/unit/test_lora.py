"""LoRA: what is trained, and that a base pipeline with the saved weights draws what the trained one draws."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from text_pipelines import SIZE, condition, images

from noisycond.denoisers.text_pipelines import open_text_pipeline, peek_text_pipeline
from noisycond.errors import InputError
from noisycond.lora import WEIGHTS, add_lora, has_lora, how_to_load, save_lora


def adapted(text_folders, kind: str, **options):
    torch.manual_seed(0)
    taken = open_text_pipeline(str(text_folders / kind), resolution=SIZE)
    denoiser = taken.denoiser()
    add_lora(denoiser, **{"rank": 2} | options)
    return taken, denoiser


def predict(denoiser) -> torch.Tensor:
    noisy = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return denoiser(noisy, torch.tensor([7, 100, 500, 999]), condition(denoiser.encoder))


def train(denoiser) -> None:
    """A few steps that move every B."""
    weights = [value for value in denoiser.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=3.0)
    for _ in range(3):
        predict(denoiser.train()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    denoiser.eval()


def test_only_the_adapters_are_trained_and_they_change_nothing_at_first(text_folders):
    taken = open_text_pipeline(str(text_folders / "sd"), resolution=SIZE)
    denoiser = taken.denoiser().eval()
    before = predict(denoiser)
    add_lora(denoiser, rank=2)
    trained = {name: value for name, value in denoiser.named_parameters() if value.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    attentions = sum(name.endswith(("attn1", "attn2")) for name, _ in taken.backbone.model.named_modules())
    assert len(trained) == attentions * 4 * 2
    assert {min(value.shape) for value in trained.values()} == {2} and {v.dtype for v in trained.values()} == {
        torch.float32
    }
    assert has_lora(taken.backbone.model) and torch.equal(predict(denoiser), before)
    train(denoiser)
    assert (predict(denoiser) - before).abs().max() > 1e-3


def test_a_dry_run_adds_them_without_weights(text_folders):
    denoiser = peek_text_pipeline(str(text_folders / "sd"), resolution=SIZE).denoiser()
    with torch.device("meta"):
        add_lora(denoiser, rank=2)
    expected = {name for name, value in adapted(text_folders, "sd")[1].named_parameters() if value.requires_grad}
    trained = {name: value for name, value in denoiser.named_parameters() if value.requires_grad}
    assert set(trained) == expected and {value.device.type for value in trained.values()} == {"meta"}


def test_the_start_is_drawn_from_torch_s_generator(text_folders):
    first, second = (adapted(text_folders, "sd")[1].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("kind", "alpha"), [("sd", 5.0), ("sdxl", None), ("ldm", 5.0), ("pixart", 5.0)])
def test_a_base_pipeline_with_the_saved_weights_draws_the_same_images(text_folders, kind, alpha, tmp_path):
    taken, denoiser = adapted(text_folders, kind, alpha=alpha)
    plain = open_text_pipeline(str(text_folders / kind), resolution=SIZE).pipeline
    train(denoiser)
    assembled = taken.assemble(denoiser)
    save_lora(assembled, denoiser, tmp_path)
    code = how_to_load(assembled, tmp_path)
    weights = "adapter_model.safetensors" if kind == "pixart" else WEIGHTS
    assert {path.name for path in tmp_path.iterdir()} <= {weights, "adapter_config.json"}
    assert {value.dtype for value in load_file(tmp_path / weights).values()} == {torch.float32}
    for path in tmp_path.iterdir():
        assert str(text_folders).encode() not in path.read_bytes()
    assert ("load_lora_weights" in code) == (kind in ("sd", "sdxl"))
    plain.set_progress_bar_config(disable=True)
    base = images(plain)
    exec(code, {"pipeline": plain})
    assert np.abs(images(plain) - images(assembled)).max() < 1e-5
    assert np.abs(images(plain) - base).max() > 1e-3


def test_alpha_scales_the_update(text_folders):
    scales = {
        alpha: {layer.scaling["default"] for layer in adapted(text_folders, "sd", alpha=alpha)[1].modules()
                if hasattr(layer, "lora_A")}
        for alpha in (None, 5.0)
    }  # fmt: skip
    assert scales == {None: {1.0}, 5.0: {2.5}}


def test_other_layers_can_be_named(text_folders):
    _, denoiser = adapted(text_folders, "sd", target_modules=["conv1"])
    assert all(".conv1.lora_" in name for name, value in denoiser.named_parameters() if value.requires_grad)


def test_layers_that_are_not_there(text_folders, monkeypatch):
    with pytest.raises(InputError, match="--lora_target_modules: no layer of the UNet2DConditionModel.*to_x"):
        adapted(text_folders, "sd", target_modules=["to_k", "to_x"])
    with pytest.raises(InputError, match="--lora_target_modules: peft cannot adapt"):
        adapted(text_folders, "sd", target_modules=["attn1"])

    class WithoutAttention(torch.nn.Module):
        backbone = torch.nn.Module()

    WithoutAttention.backbone.model = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="has no attention that LoRA of rank 3"):
        add_lora(WithoutAttention(), rank=3)
    taken = open_text_pipeline(str(text_folders / "sd"), resolution=SIZE)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        add_lora(taken.denoiser(), rank=2)
