"""Pipelines that draw from prompts: what is opened, what is refused and why, and what an image depends on."""

import json
import logging

import numpy as np
import pytest
import text_pipelines
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.utils import is_torchsde_available
from PIL import Image
from released_layout import write_text_ldm
from tiny_controls import tiny_adapter_pipeline, tiny_controlnet_pipeline
from tiny_models import tiny_text_pipeline
from transformers import CLIPConfig, CLIPImageProcessor

from noisycond import sampling
from noisycond.errors import InputError
from noisycond.evaluation.figures import circular_walk
from noisycond.pipelines import LDMTextToImagePipeline


SETTINGS = {"seed": 0, "guidance_scale": 2.0, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("pipelines")
    kinds = {"sd": StableDiffusionPipeline, "lcm": LatentConsistencyModelPipeline}
    return {name: tiny_text_pipeline(root / name, kind) for name, kind in kinds.items()}


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.mark.parametrize("name", ["sd", "lcm"])
def test_images_depend_on_prompt_number_and_guidance(folders, name):
    pipeline = sampling.open_pipeline(str(folders[name]))
    assert sampling.takes_prompts(pipeline)
    assert (sampling.noise_shape(pipeline), sampling.image_size(pipeline)) == ((3, 8, 8), 16)
    images = arrays(sampling.sample(pipeline, ["a cat", "a cat", "zzz"], [0, 1, 0], **SETTINGS))
    assert images.shape == (3, 16, 16, 3) and np.abs(images[0] - images[1]).mean() > 10
    assert np.abs(images[0] - images[2]).mean() > 1
    assert np.array_equal(arrays(sampling.sample(pipeline, ["a cat", "a cat", "zzz"], [0, 1, 0], **SETTINGS)), images)
    stronger = sampling.sample(pipeline, ["a cat", "a cat", "zzz"], [0, 1, 0], **SETTINGS | {"guidance_scale": 8.0})
    assert np.abs(arrays(stronger) - images).max() > 1


@pytest.mark.parametrize("name", ["sd", "lcm"])
def test_a_walk_of_a_prompt_depends_on_its_starting_noise_alone(folders, name):
    pipeline = sampling.open_pipeline(str(folders[name]))
    own, settings = pipeline.scheduler, {"positions": 4, "guidance_scale": 2.0, "num_inference_steps": 3}
    walk = arrays(circular_walk(pipeline, "a cat", batch_size=3, **settings))
    assert pipeline.scheduler is own
    assert np.abs(arrays(circular_walk(pipeline, "a cat", batch_size=4, **settings)) - walk).max() <= 1
    assert np.abs(walk[0] - walk[2]).mean() > 10
    assert np.abs(arrays(circular_walk(pipeline, "zzz", **settings)) - walk).mean() > 1


def test_the_fingerprint_follows_the_vocabulary(folders):
    pipeline = sampling.open_pipeline(str(folders["sd"]))
    before = sampling.fingerprint(pipeline)
    assert sampling.fingerprint(sampling.open_pipeline(str(folders["sd"]))) == before
    pipeline.tokenizer.add_tokens(["cat"])
    assert sampling.fingerprint(pipeline) != before


def test_the_fingerprint_of_another_scheduler_is_that_of_its_values(folders):
    """Diffusers lists what was left at its default in the order of a set, another one in every process."""
    pipeline = sampling.open_pipeline(str(folders["sd"]))
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler, listed = scheduler, list(scheduler.config["_use_default_values"])
    before = sampling.fingerprint(pipeline)
    assert len(listed) > 1
    scheduler.register_to_config(_use_default_values=listed[::-1])
    assert sampling.fingerprint(pipeline) == before
    scheduler.register_to_config(solver_order=3)
    assert sampling.fingerprint(pipeline) != before


def test_a_safety_checker_is_left_out_with_a_warning(folders, tmp_path, caplog):
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd"])
    layers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=layers, vision_config=layers | vision))
    checker.concept_embeds_weights.data.fill_(-1)  # whatever it sees is beyond the threshold
    pipeline.register_modules(
        safety_checker=checker, feature_extractor=CLIPImageProcessor(size=8, crop_size={"height": 8, "width": 8})
    )
    pipeline.save_pretrained(tmp_path / "checked")
    black = StableDiffusionPipeline.from_pretrained(tmp_path / "checked")(["a cat"], num_inference_steps=1).images
    assert arrays(black).max() == 0
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            opened = sampling.open_pipeline(str(tmp_path / "checked"))
    told = [record.getMessage() for record in caplog.records if "safety checker" in record.getMessage()]
    assert len(told) == 1 and f"{tmp_path / 'checked'} has a safety checker" in told[0]
    whole = sampling.open_pipeline(str(folders["sd"]))
    found, expected = (arrays(sampling.sample(each, ["a cat"], [0], **SETTINGS)) for each in (opened, whole))
    assert np.array_equal(found, expected)
    assert sampling.fingerprint(opened) == sampling.fingerprint(whole)


def test_what_draws_from_more_than_a_prompt_is_refused(folders, tmp_path):
    StableDiffusionImg2ImgPipeline.from_pretrained(folders["sd"]).save_pretrained(tmp_path / "x")
    with pytest.raises(InputError, match="Img2ImgPipeline draws no images from prompts alone: .*`image`"):
        sampling.open_pipeline(str(tmp_path / "x"))
    with pytest.raises(InputError, match="Img2ImgPipeline draws no images from prompts alone: .*`image`"):
        sampling.declared_class(str(tmp_path / "x"))


def test_the_declared_class_is_that_of_the_index_where_it_is_known(folders, tmp_path):
    assert sampling.declared_class(str(folders["lcm"])) is LatentConsistencyModelPipeline
    for declared, known in (
        (["anything", "LDMTextToImagePipeline"], LDMTextToImagePipeline),
        (["pipeline", "StableDiffusionPipeline"], None),  # the folder's own, not that of diffusers
        ("NoPipeline", None),
        (None, None),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": declared}))
        assert sampling.declared_class(str(tmp_path)) is known


def test_a_truncated_text_encoder_is_one_sentence(tmp_path):
    weights = tiny_text_pipeline(tmp_path / "x") / "text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="--pipeline .*x: diffusers cannot open it .*incomplete metadata"):
        sampling.open_pipeline(str(tmp_path / "x"))


def test_schedulers_and_steps_that_a_consistency_model_does_not_take_are_refused(folders):
    pipeline = sampling.open_pipeline(str(folders["lcm"]))
    with pytest.raises(InputError, match="--scheduler DDIMScheduler: .* samples by LCMScheduler alone"):
        sampling.set_scheduler(pipeline, "DDIMScheduler")
    with pytest.raises(InputError, match="--num_inference_steps is 51, but LCMScheduler takes at most 50"):
        sampling.check_steps(pipeline, 51)
    sampling.check_steps(pipeline, 50)
    other = sampling.open_pipeline(str(folders["sd"]))
    sampling.check_steps(other, 999)
    sampling.sample(other, ["a cat"], [0], **SETTINGS)
    for steps in (1000, 2000):  # with an offset of 1 the last of 1000 steps would be beyond the noise schedule
        with pytest.raises(InputError, match=f"_steps is {steps}, but DDIMScheduler takes at most 999 .*_offset 1"):
            sampling.check_steps(other, steps)
    sampling.set_scheduler(other, "LCMScheduler")
    with pytest.raises(InputError, match="--num_inference_steps is 51"):
        sampling.check_steps(other, 51)
    sampling.set_scheduler(other, "DDIMScheduler")
    sampling.check_steps(other, 500)


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "FlowMatchEulerDiscreteScheduler",
            "cannot stand in for the pipeline's DDIMScheduler: it has no `init_noise_sigma`",
        ),
        ("ScoreSdeVeScheduler", "it has no `step`"),
        ("KarrasVeScheduler", "its steps need more than a pipeline gives .`sigma_hat`"),
        ("CogVideoXDPMScheduler", "its steps need more than a pipeline gives .`old_pred_original_sample`"),
        ("VQDiffusionScheduler", "it cannot be made from the pipeline's own .*num_vec_classes"),
        ("DPMSolverSDEScheduler", "it cannot be made .*requires the torchsde library"),  # needs torchsde
        ("EDMEulerScheduler", "cannot take the noise schedule of the pipeline's DDIMScheduler"),
        ("DDPMWuerstchenScheduler", "cannot take the noise schedule"),
    ],
)
def test_schedulers_that_cannot_stand_in_are_refused(folders, name, words):
    if name == "DPMSolverSDEScheduler" and is_torchsde_available():
        pytest.skip("torchsde is installed")
    pipeline = sampling.open_pipeline(str(folders["sd"]))
    own = pipeline.scheduler
    with pytest.raises(InputError, match=f"^--scheduler {name}: .*{words}"):
        sampling.set_scheduler(pipeline, name)
    assert pipeline.scheduler is own


@pytest.mark.parametrize(
    "name", ["LMSDiscreteScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler", "TCDScheduler"]
)
def test_schedulers_of_the_same_noise_schedule_stand_in(folders, name):
    pipeline = sampling.open_pipeline(str(folders["sd"]))
    sampling.set_scheduler(pipeline, name)
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"


def test_a_model_that_embeds_the_guidance_scale_samples_as_it_was_distilled(tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_text_pipeline(tmp_path / "x", LatentConsistencyModelPipeline)
    )
    with pytest.raises(InputError, match="--scheduler DDIMScheduler: .* samples by LCMScheduler alone"):
        sampling.set_scheduler(pipeline, "DDIMScheduler")
    sampling.set_scheduler(pipeline, "LCMScheduler")


def test_a_pipeline_that_does_not_tell_its_size_is_named(folders):
    pipeline = sampling.open_pipeline(str(folders["sd"]))
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(InputError, match="StableDiffusionPipeline does not tell the size of its images"):
        sampling.image_size(pipeline)


def test_half_precision_noise(folders):
    pipeline = sampling.open_pipeline(str(folders["sd"])).to(torch.bfloat16)
    noise = torch.zeros(1, 3, 8, 8)
    images = sampling.sample_from_noise(pipeline, ["a"], noise, guidance_scale=2.0, num_inference_steps=1)
    assert images[0].size == (16, 16)


def test_a_released_text_to_image_folder_is_opened_by_our_class_and_gives_full_size(tmp_path):
    folder = write_text_ldm(tmp_path / "released")
    pipeline = sampling.open_pipeline(str(folder))
    assert type(pipeline) is LDMTextToImagePipeline and sampling.takes_prompts(pipeline)
    side = sampling.image_size(pipeline)
    assert side == pipeline.unet.config.sample_size * 2 ** (len(pipeline.vqvae.config.block_out_channels) - 1)
    assert sampling.sample(pipeline, ["a dog"], [0], **SETTINGS)[0].size == (side, side)
    walk = arrays(circular_walk(pipeline, "a dog", positions=2, guidance_scale=2.0, num_inference_steps=2))
    assert np.abs(walk[0] - walk[1]).mean() > 1


@pytest.mark.parametrize("kind", text_pipelines.FAMILIES)
def test_every_family_is_drawn_from_at_its_own_size_with_any_scheduler(kind, tmp_path):
    text_pipelines.make(kind).save_pretrained(tmp_path / kind)
    pipeline = sampling.open_pipeline(str(tmp_path / kind))
    assert sampling.image_size(pipeline) == 16
    images = arrays(sampling.sample(pipeline, ["a dog", "a cat"], [0, 1], **SETTINGS))
    assert images.shape == (2, 16, 16, 3) and np.abs(images[0] - images[1]).mean() > 1
    walk = arrays(circular_walk(pipeline, "a dog", positions=2, guidance_scale=2.0, num_inference_steps=2))
    assert walk.shape == images.shape and np.abs(walk[0] - walk[1]).mean() > 1
    sampling.set_scheduler(pipeline, "DPMSolverMultistepScheduler" if kind != "pixart" else "DDIMScheduler")
    other = arrays(sampling.sample(pipeline, ["a dog", "a cat"], [0, 1], **SETTINGS | {"num_inference_steps": 3}))
    assert other.shape == images.shape


def controls(*places: int) -> list[Image.Image]:
    """White squares on black, 16×16, at these places from the left."""
    made = [Image.new("RGB", (16, 16)) for _ in places]
    for image, place in zip(made, places, strict=True):
        image.paste("white", (place, 4, place + 6, 10))
    return made


@pytest.mark.parametrize(
    "make, scale",
    [
        (tiny_controlnet_pipeline, "controlnet_conditioning_scale"),
        (tiny_adapter_pipeline, "adapter_conditioning_scale"),
        (lambda folder: tiny_adapter_pipeline(folder, in_channels=1), "adapter_conditioning_scale"),
    ],
    ids=["controlnet", "adapter", "adapter of grey controls"],
)
def test_images_depend_on_the_control_of_their_own(tmp_path, make, scale):
    pipeline = sampling.open_pipeline(str(make(tmp_path / "x")))
    assert sampling.takes_controls(pipeline) and sampling.number_of_controls(pipeline) == 1
    prompts, given = ["a cat", "a cat", "a dog"], controls(1, 9, 5)

    def drawn(given, **settings):
        return arrays(sampling.sample_all(pipeline, prompts, controls=given, **SETTINGS | settings))

    images = drawn(given)
    assert images.shape == (3, 16, 16, 3)
    other = drawn([given[0], given[0], given[2]])
    assert np.abs(other[1] - images[1]).mean() > 1
    assert np.abs(other[[0, 2]] - images[[0, 2]]).max() <= 1
    assert np.abs(drawn(given, batch_size=2) - images).max() <= 1
    larger = [control.resize((32, 32), Image.Resampling.NEAREST) for control in given]
    assert drawn(larger).shape == images.shape

    # The scale reaches the call by the name it has there: at 0 the control is nothing to the image.
    assert np.abs(drawn(given, conditioning_scale=0) - drawn(given[::-1], conditioning_scale=0)).max() == 0
    assert np.abs(drawn(given, conditioning_scale=0) - images).mean() > 1
    generator = [sampling.randomness.generator_for(0, sampling.Purpose.SAMPLING, 0)]
    options = {"generator": generator, "guidance_scale": 2.0, "num_inference_steps": 2, scale: 0.5}
    is_grey = "adapter" in pipeline.components and pipeline.adapter.config.in_channels == 1
    image = [given[0].convert("L" if is_grey else "RGB")]
    by_hand = arrays(pipeline(prompt=prompts[:1], image=image, height=16, width=16, **options).images)
    one = arrays(sampling.sample(pipeline, prompts[:1], [0], controls=given[:1], conditioning_scale=0.5, **SETTINGS))
    assert np.array_equal(one, by_hand)


def test_a_pipeline_without_controls_takes_none(folders):
    assert not sampling.takes_controls(sampling.open_pipeline(str(folders["sd"])))
    assert not sampling.takes_controls(StableDiffusionImg2ImgPipeline)
