"""Existing pipelines: text and predictions as the stock pipeline has them, the export, and what cannot be trained."""

import json

import diffusers
import numpy as np
import pytest
import text_pipelines
import torch
from diffusers import DiffusionPipeline
from text_pipelines import SIZE, TEXTS, condition, images

from noisycond.denoisers.text_pipelines import open_text_pipeline, peek_text_pipeline
from noisycond.errors import InputError
from noisycond.noise_schedule import schedule_of_scheduler
from noisycond.objective import make_betas
from noisycond.perturbation import ConditionEmbeddingPerturbation


KINDS = list(text_pipelines.FAMILIES)


def opened(text_folders, kind: str, **options):
    return open_text_pipeline(str(text_folders / kind), resolution=SIZE, **options)


def stock_encoding(pipeline, kind: str) -> dict:
    if kind == "ldm":
        return {"sequence": torch.cat([pipeline.bert(pipeline.tokenizer(
            texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids)[0] for texts in (["", ""], TEXTS)])}  # fmt: skip
    if kind == "pixart":
        captions, mask, null, null_mask = pipeline.encode_prompt(TEXTS, negative_prompt="")
        return {"sequence": torch.cat([null, captions]), "mask": torch.cat([null_mask, mask])}
    if kind == "sd":
        captions, null = pipeline.encode_prompt(TEXTS, "cpu", 1, True)
        return {"sequence": torch.cat([null, captions])}
    captions, null, pooled, null_pooled = pipeline.encode_prompt(TEXTS)
    return {"sequence": torch.cat([null, captions]), "pooled": torch.cat([null_pooled, pooled])}


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_encoded_as_the_stock_pipeline_encodes_it(text_folders, kind):
    text = opened(text_folders, kind).text.eval()
    with torch.no_grad():
        embedding, expected = (
            text(condition(text)),
            stock_encoding(DiffusionPipeline.from_pretrained(text_folders / kind), kind),
        )
    for name in ("sequence", "mask", "pooled"):
        value = getattr(embedding, name)
        assert (value is not None) == (name in expected)
        if value is not None:
            assert value.shape == expected[name].shape and (value - expected[name]).abs().max() < 1e-5


def test_sdxl_gives_the_empty_prompt_s_embedding_where_its_pipeline_does(tmp_path):
    pipeline = text_pipelines.make("sdxl", force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(tmp_path / "sdxl")
    text = opened(tmp_path, "sdxl").text.eval()
    with torch.no_grad():
        embedding, expected = text(condition(text)), stock_encoding(pipeline, "sdxl")
    assert expected["sequence"][0].abs().max() > 0
    assert (embedding.sequence - expected["sequence"]).abs().max() < 1e-5
    assert (embedding.pooled - expected["pooled"]).abs().max() < 1e-5


def test_clip_gets_the_mask_where_its_configuration_asks_for_it(tmp_path):
    pipeline = text_pipelines.make("sd", text_options={"use_attention_mask": True})
    pipeline.save_pretrained(tmp_path / "sd")
    text = opened(tmp_path, "sd").text.eval()
    with torch.no_grad():
        embedding, expected = text(condition(text)), stock_encoding(pipeline, "sd")["sequence"]
        without = pipeline.text_encoder(text.encode(TEXTS)["input_ids"])[0]
    assert (embedding.sequence - expected).abs().max() < 1e-5
    assert (expected[2:] - without).abs().max() > 1e-3 and embedding.mask is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_prediction_is_that_of_the_model_as_the_stock_pipeline_calls_it(text_folders, kind):
    stock = DiffusionPipeline.from_pretrained(text_folders / kind)
    stock.set_progress_bar_config(disable=True)
    side = SIZE // (8 if kind == "ldm" else 2)  # LDM's own class takes every first stage to be of factor 8
    noisy = torch.randn(2, 4, side, side)
    seen = {}
    model = stock.transformer if kind == "pixart" else stock.unet
    model.register_forward_hook(
        lambda _, args, kwargs, output: seen.update(
            noisy=args[0], timestep=kwargs.get("timestep", args[1] if len(args) > 1 else None), output=output[0]
        ),
        with_kwargs=True,
    )
    images(stock, latents=noisy)
    ours = opened(text_folders, kind).denoiser(perturbation=ConditionEmbeddingPerturbation(1.0)).eval()
    timesteps = torch.as_tensor(seen["timestep"]).reshape(-1).expand(4)
    with torch.no_grad():
        prediction = ours(seen["noisy"], timesteps, condition(ours.encoder))
    assert seen["output"].abs().max() > 0.01
    assert prediction.shape == seen["output"].shape and (prediction - seen["output"]).abs().max() < 1e-5
    with torch.no_grad():
        assert (ours.train()(seen["noisy"], timesteps, condition(ours.encoder)) - prediction).abs().max() > 1e-4


def test_pixart_is_told_the_image_s_size_where_its_configuration_asks_for_it(tmp_path):
    text_pipelines.make("pixart", use_additional_conditions=True).save_pretrained(tmp_path / "pixart")
    ours = opened(tmp_path, "pixart").denoiser().eval()
    model, noisy, timesteps = ours.backbone.model, torch.randn(4, 4, 8, 8), torch.tensor([7, 100, 500, 999])
    with torch.no_grad():
        embedding = ours.encoder(condition(ours.encoder))
        expected = model(
            noisy, embedding.sequence, timesteps, encoder_attention_mask=embedding.mask,
            added_cond_kwargs={"resolution": torch.full((4, 2), float(SIZE)), "aspect_ratio": torch.ones(4, 1)},
        ).sample  # fmt: skip
        assert torch.equal(ours(noisy, timesteps, condition(ours.encoder)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_the_pipeline_it_came_from_with_the_trained_parts(text_folders, kind, tmp_path):
    taken = opened(text_folders, kind, train_text_encoder=True)
    denoiser = taken.denoiser()
    text_slots, slot = taken.family.encoders, taken.family.denoiser
    with torch.no_grad():
        for value in denoiser.parameters():
            value.mul_(1.25)
    assembled = taken.assemble(denoiser)
    assembled.save_pretrained(tmp_path / "trained", safe_serialization=True)
    first = DiffusionPipeline.from_pretrained(text_folders / kind)
    options = {} if kind != "ldm" else {"trust_remote_code": True}
    again = (taken.family.pipeline if kind == "ldm" else DiffusionPipeline).from_pretrained(
        tmp_path / "trained", **options
    )
    for part in (*text_slots, slot):
        old, new = getattr(first, part).state_dict(), getattr(again, part).state_dict()
        unused = {"to_logits.weight", "to_logits.bias"}
        assert all(
            (old[name] * 1.25 == new[name]).all() for name in old if name not in unused and "position_ids" not in name
        )
    assert dict(again.scheduler.config) == dict(first.scheduler.config) and type(again.scheduler) is type(
        first.scheduler
    )
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(images(again), images(assembled))
    old, new = (
        json.loads((folder / "model_index.json").read_text()) for folder in (text_folders / kind, tmp_path / "trained")
    )
    if kind != "ldm":
        assert {**new, "_name_or_path": None} == {**old, "_name_or_path": None}
    assert new["_name_or_path"] == kind  # and not a path on this machine
    with torch.no_grad():  # copies: training on does not change what was assembled
        before = images(assembled)
        next(denoiser.backbone.parameters()).zero_()
    assert np.array_equal(images(assembled), before)


def test_ldm_s_own_class_is_exported_where_it_is_right(tmp_path):
    blocks = {"block_out_channels": (4,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
              "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
    text_pipelines.make("ldm", vae_options=blocks).save_pretrained(tmp_path / "eight")
    text_pipelines.make("ldm").save_pretrained(tmp_path / "two")
    eight, two = (open_text_pipeline(str(tmp_path / name), resolution=64) for name in ("eight", "two"))
    assert type(eight.assemble(eight.denoiser())) is diffusers.LDMTextToImagePipeline
    assert type(two.assemble(two.denoiser())) is two.family.pipeline


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained(text_folders, kind):
    frozen, trained = (
        opened(text_folders, kind).denoiser(),
        opened(text_folders, kind, train_text_encoder=True).denoiser(),
    )
    assert not any(value.requires_grad for value in frozen.encoder.parameters())
    assert all(value.requires_grad for value in frozen.backbone.parameters())
    noisy, timesteps = torch.randn(4, 4, 8, 8), torch.tensor([7, 100, 500, 999])
    state = torch.get_rng_state()
    trained.train()(noisy, timesteps, condition(trained.encoder)).square().mean().backward()
    assert torch.equal(torch.get_rng_state(), state)  # no dropout
    assert all((value.grad is not None) == value.requires_grad for value in trained.parameters())
    assert sum(value.requires_grad for value in trained.encoder.parameters()) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_sees_the_same_parameters(text_folders, kind):
    options = {"resolution": SIZE, "train_text_encoder": kind != "sdxl"}
    real, peeked = (open_(str(text_folders / kind), **options) for open_ in (open_text_pipeline, peek_text_pipeline))
    sizes = [
        {name: (value.shape, value.requires_grad) for name, value in taken.denoiser().named_parameters()}
        for taken in (real, peeked)
    ]
    assert sizes[0] == sizes[1] and real.preset == peeked.preset
    assert {value.device.type for value in peeked.denoiser().parameters()} == {"meta"}


def test_noise_schedule_and_prediction_type_are_the_scheduler_s(text_folders, tmp_path):
    preset = opened(text_folders, "sd").preset
    assert (preset.beta_schedule, preset.beta_start, preset.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert (preset.prediction_type, preset.num_train_timesteps, preset.learned_variance) == ("epsilon", 1000, False)
    assert opened(text_folders, "pixart").preset.learned_variance
    betas = make_betas("linear", 0.001, 0.02, 50)
    scheduler = diffusers.DDIMScheduler(
        trained_betas=betas.tolist(), num_train_timesteps=50, prediction_type="v_prediction"
    )
    assert schedule_of_scheduler(scheduler.config) == {
        "beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02, "prediction_type": "v_prediction",
        "num_train_timesteps": 50,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1, 0.5, 0.2]}, "trained_betas"),
        ({"unet_options": {"time_cond_proj_dim": 8}}, "time_cond_proj_dim"),
        ({"unet_options": {"in_channels": 9}}, "9 channels"),
        ({"unet_options": {"addition_embed_type": "text", "encoder_hid_dim": 16}}, "addition_embed_type"),
    ],
)
def test_a_pipeline_that_cannot_be_continued(tmp_path, options, said):
    text_pipelines.make("sd", **options).save_pretrained(tmp_path / "sd")
    with pytest.raises(InputError, match=said) as error:
        opened(tmp_path, "sd")
    assert "--pretrained_model_name_or_path" in str(error.value) and "\n" not in str(error.value)


def test_a_pipeline_of_another_family(text_folders, tmp_path):
    with pytest.raises(InputError, match="no folder or Hub id of a pipeline"):
        open_text_pipeline(str(tmp_path), resolution=SIZE)
    index = json.loads((text_folders / "sd" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(InputError, match="a FluxPipeline cannot be trained here, only Stable Diffusion 1.x"):
        open_text_pipeline(str(tmp_path), resolution=SIZE)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for open_ in (open_text_pipeline, peek_text_pipeline):
        with pytest.raises(InputError, match="cannot be opened"):
            open_(str(tmp_path), resolution=SIZE)
    with pytest.raises(InputError, match="--resolution"):
        open_text_pipeline(str(text_folders / "sd"), resolution=17)
