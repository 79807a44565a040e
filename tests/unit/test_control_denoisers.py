"""A frozen U-Net with a ControlNet or an adapter: its start, what is trained, and what is exported."""

import copy
import inspect

import pytest
import torch
from controlled import moved
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from tiny_models import tiny_unet

from noisycond.condition_kinds import CAPTIONS, LABELS
from noisycond.control_pipelines import MODULES
from noisycond.denoisers import PRESETS
from noisycond.denoisers.conditional import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.control import (
    AdapterBackbone,
    ControlNetBackbone,
    add_lora_to_controlnet,
    hint_channels,
    make_adapter,
    make_controlnet,
)
from noisycond.denoisers.text import TextEmbedding
from noisycond.errors import InputError
from noisycond.perturbation import ConditionEmbeddingPerturbation


pytestmark = pytest.mark.usefixtures("one_thread")
FACTOR, SIDE, DIM, BATCH = 2, 8, 12, 3
LDM_4 = {
    "block_out_channels": (8, 16, 24, 40),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
}
STABLE_DIFFUSION = {
    "block_out_channels": (8, 16, 24, 24),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}


def unet(**options) -> UNet2DConditionModel:
    """A U-Net of 3 latent channels with weights that are 0 nowhere."""
    torch.manual_seed(0)
    common = {"sample_size": SIDE, "in_channels": 3, "out_channels": 3, "layers_per_block": 1}
    common |= {"attention_head_dim": 2, "norm_num_groups": 4, "cross_attention_dim": DIM}
    return moved(UNet2DConditionModel(**common | options) if options else tiny_unet())


def controlled(kind: str, away: bool = True):
    """A backbone, of which what is trained stands where it starts or has moved on."""
    torch.manual_seed(1)
    base = unet()
    if kind == "adapter":
        backbone = AdapterBackbone(base, make_adapter(base, FACTOR, MODULES[LABELS]))
    else:
        controlnet = make_controlnet(base, FACTOR)
        if kind == "lora":
            add_lora_to_controlnet(controlnet, rank=2, alpha=3.0)
        backbone = ControlNetBackbone(base, controlnet)
    if away:
        generator = torch.Generator().manual_seed(5)
        for value in backbone.model.parameters():
            if value.requires_grad:
                value.data += 0.1 * torch.randn(value.shape, generator=generator)
    return backbone.eval()


def inputs(side: int = SIDE, factor: int = FACTOR, channels: int = 3) -> tuple:
    """Noisy latents, timesteps, embeddings [B, D] and controls."""
    generator = torch.Generator().manual_seed(2)
    noisy = torch.randn(BATCH, channels, side, side, generator=generator)
    control = torch.rand(BATCH, 3, side * factor, side * factor, generator=generator)
    return noisy, torch.tensor([5, 300, 900]), torch.randn(BATCH, DIM, generator=generator), control


KINDS = ["controlnet", "lora", "adapter"]


# Sizes


@pytest.mark.parametrize(("factor", "channels"), [(1, 1), (2, 2), (4, 3), (8, 4), (16, 5), (32, 6)])
def test_the_control_encoder_brings_controls_to_the_latents(factor, channels):
    found = hint_channels(factor)
    assert len(found) == channels and found[:4] == (16, 32, 96, 256)[:channels]
    encoder = ControlNetConditioningEmbedding(8, block_out_channels=found)
    assert encoder(torch.zeros(1, 3, 4 * factor, 6 * factor)).shape == (1, 8, 4, 6)


def test_factor_8_is_the_papers():
    default = inspect.signature(ControlNetModel).parameters["conditioning_embedding_out_channels"].default
    assert hint_channels(8) == tuple(default)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_controlnet_fits_first_stages_of_every_factor(factor):
    base = unet()
    noisy, timesteps, embedding, control = inputs(factor=factor)
    found = ControlNetBackbone(base, make_controlnet(base, factor))(noisy, timesteps, embedding, control)
    assert found.shape == noisy.shape


def of_preset(name: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return moved(UNet2DConditionModel(**PRESETS[name].config, in_channels=3, out_channels=3, sample_size=SIDE))


@pytest.mark.parametrize("layout", ["ldm-mini", "LDM-4", "Stable Diffusion"])
def test_the_adapters_features_are_what_the_unet_adds(layout):
    base = {"ldm-mini": lambda: of_preset("ldm-mini"), "LDM-4": lambda: unet(**LDM_4)}.get(
        layout, lambda: unet(**STABLE_DIFFUSION)
    )()
    adapter = make_adapter(base, 4, MODULES[CAPTIONS if layout == "Stable Diffusion" else LABELS])
    assert isinstance(adapter, T2IAdapter) == (layout == "Stable Diffusion")
    noisy, timesteps, _, control = inputs(16, 4)
    embedding = torch.randn(BATCH, base.config.cross_attention_dim)
    backbone = AdapterBackbone(base, moved(adapter))
    assert len(adapter(control)) == len(base.config.block_out_channels)
    found = backbone(noisy, timesteps, embedding, control)
    assert found.shape == noisy.shape
    # Every feature arrives: without one of them the prediction is another.
    features = adapter(control)
    for left_out in range(len(features)):
        kept = [feature * (place != left_out) for place, feature in enumerate(features)]
        other = base(
            noisy, timesteps, embedding[:, None], down_intrablock_additional_residuals=kept, return_dict=False
        )
        assert (other[0] - found).abs().max() > 1e-5


def test_a_unet_of_other_blocks_is_refused():
    base = unet(
        block_out_channels=(8, 8),
        down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "AttnUpBlock2D"),
    )
    with pytest.raises(InputError, match="--pretrained_model_name_or_path: no T2I-Adapter fits .*AttnDownBlock2D"):
        make_adapter(base, FACTOR, MODULES[LABELS])


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_both_are_made_without_weights_for_a_dry_run(kind):
    whole = controlled(kind, away=False).model
    with torch.device("meta"):
        base = tiny_unet()
    made = make_controlnet(base, FACTOR) if kind == "controlnet" else make_adapter(base, FACTOR, MODULES[LABELS])
    assert {value.device.type for value in made.parameters()} == {"meta"}
    assert {name: value.shape for name, value in made.named_parameters()} == {
        name: value.shape for name, value in whole.named_parameters()
    }


# The start, and what is frozen


@pytest.mark.parametrize("kind", ["controlnet", "lora"])
def test_at_the_start_a_controlnet_changes_no_bit(kind):
    backbone = controlled(kind, away=False)
    noisy, timesteps, embedding, control = inputs()
    plain = unet()(noisy, timesteps, embedding[:, None], return_dict=False)[0]
    assert torch.equal(backbone(noisy, timesteps, embedding, control), plain)
    away = controlled(kind)(noisy, timesteps, embedding, control)
    assert (away - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_stays_frozen_and_in_eval_mode(kind):
    backbone = controlled(kind)
    before = copy.deepcopy(backbone.unet.state_dict())
    denoiser = ConditionalDenoiser(ClassEncoder(4, DIM).requires_grad_(False), backbone).train()
    assert not any(module.training for module in backbone.unet.modules()) and backbone.model.training
    trained = {name for name, value in denoiser.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith("backbone.model.") for name in trained)
    noisy, timesteps, _, control = inputs()
    optimizer = torch.optim.SGD([value for value in denoiser.parameters() if value.requires_grad], lr=1.0)
    condition = {"class_labels": torch.tensor([0, 1, 4]), "control": control}
    denoiser(noisy, timesteps, condition).square().mean().backward()
    optimizer.step()
    assert all(value.grad is None for value in backbone.unet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.unet.state_dict().items())
    denoiser.eval()
    assert not backbone.model.training


def test_what_lora_trains():
    backbone = controlled("lora", away=False)
    own = ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")
    trained = {name for name, value in backbone.model.named_parameters() if value.requires_grad}
    lora = {name for name in trained if ".lora_" in name}
    attentions = sum(name.endswith(("attn1", "attn2")) for name, _ in backbone.model.named_modules())
    assert len(lora) == attentions * 4 * 2
    every = {name for name, _ in backbone.model.named_parameters()}
    assert trained - lora == {name for name in every if name.startswith(own)} and trained != every


@pytest.mark.parametrize(("targets", "words"), [([], "--adapter lora"), (["nowhere"], "--lora_target_modules")])
def test_lora_says_where_there_is_nothing_to_adapt(targets, words):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    blocks |= {"block_out_channels": (8, 8), "mid_block_type": "UNetMidBlock2D"}
    with pytest.raises(InputError, match=words):
        add_lora_to_controlnet(make_controlnet(unet(**blocks), FACTOR), 2, None, targets)


# The control, the condition and its perturbation


@pytest.mark.parametrize("kind", KINDS)
def test_each_example_heeds_its_own_control(kind):
    backbone = controlled(kind)
    noisy, timesteps, embedding, control = inputs()
    found = backbone(noisy, timesteps, embedding, control)
    changed = control.clone()
    changed[1] = 1 - changed[1]
    difference = (backbone(noisy, timesteps, embedding, changed) - found).abs().amax((1, 2, 3))
    assert difference[1] > 1e-4 and difference[[0, 2]].max() < 1e-6


def test_embeddings_of_captions_are_read_whole():
    backbone = controlled("controlnet")
    noisy, timesteps, _, control = inputs()
    sequence = torch.randn(BATCH, 5, DIM, generator=torch.Generator().manual_seed(4))
    found = backbone(noisy, timesteps, TextEmbedding(sequence), control)
    assert torch.equal(found, backbone(noisy, timesteps, sequence, control))
    assert not torch.equal(found, backbone(noisy, timesteps, sequence[:, :1], control))


def test_the_perturbation_reaches_base_and_controlnet_once_and_only_in_train_mode():
    backbone, seen = controlled("controlnet"), {}
    for name, model in (("base", backbone.unet), ("controlnet", backbone.model)):

        def note(module, args, kwargs, name=name):
            seen.setdefault(name, []).append(args[2])

        model.register_forward_pre_hook(note, with_kwargs=True)
    encoder = ClassEncoder(4, DIM)
    denoiser = ConditionalDenoiser(encoder, backbone, ConditionEmbeddingPerturbation(1.0, "uniform", 0))
    noisy, timesteps, _, control = inputs()
    condition = {"class_labels": torch.tensor([0, 1, 4]), "control": control}
    clean, keys = encoder.table(condition["class_labels"])[:, None], torch.arange(BATCH)

    denoiser.train()(noisy, timesteps, condition, keys)
    assert [len(seen[name]) for name in ("base", "controlnet")] == [1, 1]
    assert torch.equal(seen["base"][0], seen["controlnet"][0])
    delta = seen["base"][0] - clean
    assert delta.abs().amax((1, 2)).min() > 0 and delta.abs().max() <= DIM**-0.5 + 1e-6

    denoiser.eval()(noisy, timesteps, condition, keys)
    assert torch.equal(seen["base"][1], clean) and torch.equal(seen["controlnet"][1], clean)


def test_a_denoiser_takes_its_control_from_the_condition():
    backbone = controlled("adapter")
    encoder = ClassEncoder(4, DIM).eval()
    noisy, timesteps, _, control = inputs()
    labels = torch.tensor([0, 1, 4])
    found = ConditionalDenoiser(encoder, backbone).eval()(
        noisy, timesteps, {"class_labels": labels, "control": control}
    )
    assert torch.equal(found, backbone(noisy, timesteps, encoder.table(labels), control))


# Memory


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        backbone = controlled(kind).train()
        if checkpointed:
            backbone.enable_gradient_checkpointing()
            assert backbone.unet.is_gradient_checkpointing
            assert kind == "adapter" or backbone.model.is_gradient_checkpointing
        backbone(*inputs()).square().mean().backward()
        return {name: value.grad for name, value in backbone.model.named_parameters() if value.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and max(value.abs().max() for value in plain.values()) > 1e-4
    assert all((plain[name] - checkpointed[name]).abs().max() < 1e-6 for name in plain)


# The export


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_predicts_the_same_with_weights_of_its_own(kind, tmp_path):
    backbone = controlled(kind)
    expected = backbone(*inputs())
    exported = backbone.export_model()
    assert type(exported) is (MODULES[LABELS].LDMAdapter if kind == "adapter" else ControlNetModel)
    assert not exported.training and {value.dtype for value in exported.parameters()} == {torch.float32}
    assert not any(".lora_" in name or "base_layer" in name for name in exported.state_dict())
    exported.save_pretrained(tmp_path)
    again = type(exported).from_pretrained(tmp_path)
    held = {value.data_ptr() for value in backbone.parameters()}
    assert not any(value.data_ptr() in held for value in exported.parameters())
    with torch.no_grad():
        for value in backbone.model.parameters():
            value.zero_()
    for model in (exported, again):
        found = type(backbone)(backbone.unet, model)(*inputs())
        assert (found - expected).abs().max() < 1e-6
        assert kind == "lora" or torch.equal(found, expected)


def test_an_export_of_lora_has_the_base_weights_beside_what_was_trained():
    base, exported = unet().state_dict(), controlled("lora").export_model().state_dict()
    shared = {name: torch.equal(value, base[name]) for name, value in exported.items() if name in base}
    assert set(shared.values()) == {True, False}
    ends = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    assert {name for name, same in shared.items() if not same} == {name for name in shared if name.endswith(ends)}
