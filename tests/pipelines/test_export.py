"""The exported folder in diffusers alone: loaded by a process that can import nothing of this project."""

import hashlib
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from forking import as_stranger
from tiny_models import UNET_CONFIG

from noisycond.denoisers import build_denoiser, find_denoiser
from noisycond.export import class_pipeline, export_pipeline, sampling_scheduler
from noisycond.first_stage import open_first_stage
from noisycond.objective import DiffusionObjective, make_betas


pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [str(digit) for digit in range(10)]
STRANGER = """
import hashlib, json, sys
sys.modules["noisycond"] = None  # importing it fails
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
def digest(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    options |= {"generator": torch.manual_seed(5), "num_inference_steps": 4, "output_type": "np"}
    return hashlib.sha256(pipeline([3, 9, 0], **options).images.tobytes()).hexdigest()
found = []
for folder in sys.argv[1:]:
    trust = {"trust_remote_code": True} if "-ldm" in folder else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **trust)
    assert type(pipeline).__module__.startswith("diffusers_modules." if trust else "diffusers.")
    images = [digest(pipeline, guidance_scale=4.0), digest(pipeline, guidance_scale=1.0)]
    pipeline.save_pretrained(folder + "-again")
    again = DiffusionPipeline.from_pretrained(folder + "-again", **trust)
    found.append([*images, digest(again, guidance_scale=4.0), pipeline.get_label_ids(["7"])])
print(json.dumps(found))
"""


CONFIGS = {
    "dit": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16},
    "ldm": UNET_CONFIG,
}


def make(kind: str, learned_variance: bool, tmp_path, prediction_type: str = "epsilon", family: str = "dit"):
    """A denoiser with weights far from the start, and its pipeline."""
    torch.manual_seed(0)
    first_stage = open_first_stage(kind)
    channels = first_stage.latent_channels
    config = CONFIGS[family] | {"in_channels": channels}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"out_channels": channels * (1 + learned_variance)}))
    denoiser = build_denoiser(find_denoiser(str(path)), class_names=NAMES, latent_channels=channels, latent_size=8)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.1)
    schedule = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    objective = DiffusionObjective(make_betas(*schedule.values(), 1000), prediction_type)
    scheduler = sampling_scheduler(objective, schedule)
    return denoiser.eval(), first_stage, scheduler, class_pipeline(denoiser, first_stage, scheduler)


def digest(pipeline, **options) -> str:
    generator = torch.manual_seed(5)
    options = {"guidance_scale": 4.0} | options
    images = pipeline([3, 9, 0], generator=generator, num_inference_steps=4, output_type="np", **options).images
    return hashlib.sha256(images.tobytes()).hexdigest()


def test_a_stranger_gets_the_same_images(tmp_path):
    kinds = [("digits-kl", False, "dit"), ("digits-vq", True, "dit"), ("digits-vq", False, "ldm")]
    folders, pipelines = [], []
    for number, (kind, learned_variance, family) in enumerate(kinds):
        *_, pipeline = make(kind, learned_variance, tmp_path, family=family)
        folders.append(tmp_path / f"{number}-{family}")
        export_pipeline(pipeline, folders[-1], NAMES)
        pipelines.append(pipeline)
    done = as_stranger(STRANGER, *folders, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(pipelines)
    for pipeline, (guided, unguided, again, label) in zip(pipelines, found, strict=True):
        assert guided == digest(pipeline) and unguided == digest(pipeline, guidance_scale=1.0)
        assert again == guided and guided != unguided
        assert label == [7]


@pytest.mark.parametrize("family, learned_variance", [("dit", False), ("dit", True), ("ldm", False)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_the_pipeline_samples_as_the_training_module_predicts(tmp_path, learned_variance, prediction_type, family):
    """A sampler written out with the training module gives the pipeline's images bit for bit, with guidance."""
    denoiser, first_stage, scheduler, pipeline = make("digits-kl", learned_variance, tmp_path, prediction_type, family)
    channels = first_stage.latent_channels
    labels = torch.tensor([3, 9, 0])
    latents = torch.randn((3, channels, 8, 8), generator=torch.manual_seed(5))
    scheduler.set_timesteps(4)
    null = torch.full_like(labels, denoiser.encoder.null_class)
    # The order in which each pipeline doubles its batch.
    both = [labels, null] if family == "dit" else [null, labels]
    for t in scheduler.timesteps:
        prediction = denoiser(torch.cat([latents] * 2), t.expand(6), {"class_labels": torch.cat(both)})[:, :channels]
        halves = prediction.chunk(2)
        conditional, unconditional = halves if family == "dit" else halves[::-1]
        guided = unconditional + 4.0 * (conditional - unconditional)
        latents = scheduler.step(guided, t, latents).prev_sample
    images = first_stage.model.decode(1 / first_stage.scaling_factor * latents).sample
    images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    generator, options = torch.manual_seed(5), {"num_inference_steps": 4, "guidance_scale": 4.0}
    drawn = pipeline(labels.tolist(), generator=generator, output_type="np", **options).images
    assert np.array_equal(images, drawn)


def test_export_replaces_and_keeps_other_files(tmp_path):
    *_, pipeline = make("digits-kl", False, tmp_path)
    folder = tmp_path / "out"
    export_pipeline(pipeline, folder, NAMES)
    (folder / "notes.txt").write_text("mine")
    export_pipeline(pipeline, folder, NAMES[::-1])
    assert (folder / "notes.txt").read_text() == "mine"
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(loaded, DiTPipeline) and loaded.get_label_ids(["0"]) == [9]
    assert loaded.scheduler.config.clip_sample is False
    assert not (folder / ".export.tmp").exists()
