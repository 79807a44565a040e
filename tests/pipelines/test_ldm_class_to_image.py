"""The LDM pipeline keeps the conventions of diffusers' own: what a user of any pipeline there relies on."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from tiny_models import tiny_kl, tiny_unet, tiny_vq

from noisycond.pipelines import ClassEmbedder, LDMClassToImagePipeline


pytestmark = pytest.mark.usefixtures("one_thread")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}


def make(vqvae: bool = True, **options) -> LDMClassToImagePipeline:
    """A tiny pipeline with weights far from the start: latents 3×8×8, images 16×16, 10 classes."""
    torch.manual_seed(0)
    unet, first_stage = tiny_unet().eval(), tiny_vq(scaling_factor=1.5).eval()
    scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    embedder = ClassEmbedder(10, 12).eval()
    pipeline = LDMClassToImagePipeline(unet, embedder, scheduler, first_stage if vqvae else None, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, labels=(3, 9, 0), seed: int = 5, **options):
    options = {"num_inference_steps": 3, "output_type": "np", "generator": torch.manual_seed(seed)} | options
    return pipeline(list(labels), **options).images


@pytest.fixture(scope="module")
def pipeline():
    return make()


def test_the_call_of_the_authors_works(pipeline):
    images = pipeline([7, 3], num_inference_steps=2, eta=0.0, guidance_scale=2.25, latents=None).images
    assert [image.size for image in images] == [(16, 16)] * 2 and images[0].mode == "RGB"


def test_output_types_agree(pipeline):
    arrays = draw(pipeline)
    assert arrays.shape == (3, 16, 16, 3) and arrays.dtype == np.float32 and 0 <= arrays.min() < arrays.max() <= 1
    tensors = draw(pipeline, output_type="pt")
    assert np.array_equal(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    pictures = draw(pipeline, output_type="pil")
    assert np.array_equal(
        np.stack([np.array(picture) for picture in pictures]), (arrays * 255).round().astype("uint8")
    )
    latents = draw(pipeline, output_type="latent")
    assert latents.shape == (3, 3, 8, 8)
    # The first stage's own factor is undone before it decodes.
    decoded = pipeline.vqvae.decode(latents / 1.5).sample
    assert np.abs((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy() - arrays).max() < 1e-5


def test_a_tuple_is_returned_on_request(pipeline):
    images = draw(pipeline)
    (again,) = pipeline(
        [3, 9, 0], num_inference_steps=3, output_type="np", generator=torch.manual_seed(5), return_dict=False
    )
    assert np.array_equal(images, again)


def test_a_batch_equals_its_images_drawn_alone(pipeline):
    def generator(number):
        return torch.Generator().manual_seed(number)

    batch = draw(pipeline, generator=[generator(n) for n in range(3)], eta=0.5)
    alone = [draw(pipeline, [label], generator=[generator(n)], eta=0.5)[0] for n, label in enumerate((3, 9, 0))]
    assert np.abs(batch - np.stack(alone)).max() < 1e-4
    assert np.abs(batch[0] - batch[1]).max() > 1e-2


def test_several_images_per_label(pipeline):
    assert np.array_equal(draw(pipeline, [3, 9], num_images_per_prompt=2), draw(pipeline, [3, 3, 9, 9]))
    assert len(draw(pipeline, [3], num_images_per_prompt=3)) == 3


def test_labels_in_every_form(pipeline):
    wanted = draw(pipeline, [4])
    arrays = (np.int64(4), np.uint8(4), np.array([4], dtype=np.int32), np.array(4), [np.int64(4)])
    for label in (4, torch.tensor(4), torch.tensor([4]), torch.tensor([4], dtype=torch.uint8), *arrays):
        images = pipeline(label, num_inference_steps=3, output_type="np", generator=torch.manual_seed(5)).images
        assert np.array_equal(images, wanted)


def test_latents_are_where_sampling_starts(pipeline):
    latents = torch.randn((3, 3, 8, 8), generator=torch.manual_seed(5))
    given = draw(pipeline, latents=latents, generator=None)
    assert np.array_equal(given, draw(pipeline))
    assert np.array_equal(given, draw(pipeline, latents=latents, generator=None))  # they are not changed


def test_guidance_is_the_formula(pipeline):
    """One DDIM step by hand, with the formula of arXiv:2207.12598."""
    labels = torch.tensor([3, 9, 0])
    latents = torch.randn((3, 3, 8, 8), generator=torch.manual_seed(5))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    table = pipeline.class_embedder.embedding.weight
    with torch.no_grad():
        conditional = pipeline.unet(latents, t, table[labels][:, None]).sample
        unconditional = pipeline.unet(latents, t, table[-1].expand(3, 1, -1)).sample
    for scale in (1.0, 2.25, 0.0):
        prediction = unconditional + scale * (conditional - unconditional)
        wanted = scheduler.step(prediction, t, latents).prev_sample
        options = {"num_inference_steps": 1, "output_type": "latent", "guidance_scale": scale}
        assert (draw(pipeline, **options) - wanted).abs().max() < 1e-4, scale


def test_no_guidance_takes_one_forward_of_the_batch(pipeline):
    seen = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    draw(pipeline, guidance_scale=1.0)
    draw(pipeline, guidance_scale=2.0)
    hook.remove()
    assert seen == [3, 3, 3, 6, 6, 6]


def test_the_null_class_is_unconditional(pipeline):
    unguided = draw(pipeline, [10], guidance_scale=1.0)
    assert np.abs(unguided - draw(pipeline, [10], guidance_scale=7.0)).max() < 1e-4
    assert np.abs(unguided - draw(pipeline, [3], guidance_scale=1.0)).max() > 1e-2


def test_eta_draws_noise_on_the_way(pipeline):
    assert np.abs(draw(pipeline, eta=1.0) - draw(pipeline)).max() > 1e-2


def test_other_sizes(pipeline):
    assert draw(pipeline, height=32, width=24).shape == (3, 32, 24, 3)


def test_callbacks_see_and_change_the_latents(pipeline):
    seen = []

    def callback(owner, step, timestep, tensors):
        assert owner is pipeline and set(tensors) == {"latents", "class_embeds"}
        seen.append((step, int(timestep)))
        if step == 2:
            return {"latents": torch.zeros_like(tensors["latents"])}
        return tensors

    names = ["latents", "class_embeds"]
    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    latents = draw(pipeline, output_type="latent", **options)
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] > seen[2][1]
    assert latents.abs().max() == 0 and pipeline.num_timesteps == 3


def test_a_callback_can_interrupt(pipeline):
    steps = []

    def callback(owner, step, timestep, tensors):
        steps.append(step)
        owner._interrupt = True
        return tensors

    draw(pipeline, callback_on_step_end=callback)
    assert steps == [0]


class Cutoff(PipelineCallback):
    """No guidance from a step on, as diffusers' documentation on callbacks switches it off."""

    tensor_inputs = ["class_embeds"]

    def callback_fn(self, owner, step, timestep, tensors):
        if step == self.config.cutoff_step_index:
            owner._guidance_scale = 0.0
            tensors["class_embeds"] = tensors["class_embeds"].chunk(2)[-1]
        return tensors


@pytest.mark.parametrize("wrap", [lambda callback: callback, lambda callback: MultiPipelineCallbacks([callback])])
def test_a_callback_ends_guidance(pipeline, wrap):
    """After its first step the images go on as those of a pipeline that is not guided."""
    after_one, seen = [], []

    def keep(owner, step, timestep, tensors):
        after_one.append(tensors["latents"])
        owner._interrupt = True

    draw(pipeline, output_type="latent", callback_on_step_end=keep)
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = draw(pipeline, output_type="latent", callback_on_step_end=wrap(Cutoff(None, cutoff_step_index=0)))
    hook.remove()
    assert seen == [6, 3, 3] and not pipeline.do_classifier_free_guidance
    latents, embeds = after_one[0], pipeline.class_embedder(torch.tensor([3, 9, 0]))
    with torch.no_grad():
        for timestep in pipeline.scheduler.timesteps[1:]:
            prediction = pipeline.unet(latents, timestep, embeds).sample
            latents = pipeline.scheduler.step(prediction, timestep, latents).prev_sample
    assert torch.equal(found, latents)


def test_a_callback_changes_the_guidance(pipeline):
    """The steps that follow are those of a call with that scale, from the same latents on."""
    after_one = []

    def change(owner, step, timestep, tensors):
        after_one.append(tensors["latents"])
        owner._guidance_scale = 7.0

    def go_on(owner, step, timestep, tensors):
        return {"latents": after_one[0]} if step == 0 else {}

    changed = draw(pipeline, callback_on_step_end=change)
    assert np.array_equal(changed, draw(pipeline, guidance_scale=7.0, callback_on_step_end=go_on))
    assert np.abs(changed - draw(pipeline)).max() > 1e-3


def schedulers() -> list[str]:
    """All schedulers of diffusers that its own pipelines treat as exchangeable with DDIM."""
    return sorted({kind.__name__ for kind in DDIMScheduler(**BETAS).compatibles})


@pytest.mark.parametrize("name", schedulers())
def test_any_compatible_scheduler_runs(pipeline, name):
    kind = getattr(diffusers, name)
    if "torchsde" in getattr(kind, "_backends", []):
        pytest.skip("needs torchsde")
    before = pipeline.scheduler
    try:
        pipeline.scheduler = kind.from_config(before.config)
        first, second = (draw(pipeline, num_inference_steps=6) for _ in range(2))
    finally:
        pipeline.scheduler = before
    assert np.isfinite(first).all() and first.std() > 1e-3
    assert np.array_equal(first, second)  # the generator decides everything, also the noise of stochastic ones


def test_schedulers_agree_where_they_solve_the_same_equation(pipeline):
    """DDIM, DPM-Solver, UniPC, Euler and Heun go to the same latents as steps grow: wrong scaling would not."""
    before, found = pipeline.scheduler, {}
    try:
        for name in ("DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "HeunDiscrete"):
            pipeline.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(before.config)
            latents = torch.randn((1, 3, 8, 8), generator=torch.manual_seed(5))
            found[name] = draw(pipeline, [3], num_inference_steps=150, latents=latents, guidance_scale=1.0)[0]
    finally:
        pipeline.scheduler = before
    spread = {name: np.abs(images - found["DDIM"]).mean() for name, images in found.items()}
    assert max(spread.values()) < 0.03, spread


def test_a_saved_pipeline_gives_the_same_images(pipeline, tmp_path):
    names = {label: f"class {label}" for label in range(10)}
    original = make(id2label=names)
    original.save_pretrained(tmp_path / "a")
    loaded = LDMClassToImagePipeline.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = LDMClassToImagePipeline.from_pretrained(tmp_path / "b")
    wanted = draw(original)
    assert np.array_equal(draw(loaded), wanted) and np.array_equal(draw(again), wanted)
    assert again.get_label_ids(["class 7"]) == [7]
    indexes = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in "ab"]
    for index in indexes:
        index.pop("_name_or_path", None)
    assert indexes[0] == indexes[1]
    assert list((tmp_path / "a").rglob("*.safetensors")) and not list((tmp_path / "a").rglob("*.bin"))


def test_without_a_first_stage(tmp_path):
    pipeline = make(vqvae=False)
    pipeline.save_pretrained(tmp_path)
    loaded = LDMClassToImagePipeline.from_pretrained(tmp_path)
    assert loaded.vqvae is None
    latents = draw(pipeline, output_type="latent")
    assert torch.equal(draw(loaded, output_type="latent"), latents)
    assert torch.equal(draw(make(), output_type="latent"), latents)
    with pytest.raises(ValueError, match="no first stage"):
        draw(loaded)


def test_a_kl_first_stage(pipeline):
    first_stage = tiny_kl(latent_channels=3).eval()
    other = LDMClassToImagePipeline(pipeline.unet, pipeline.class_embedder, pipeline.scheduler, first_stage)
    other.set_progress_bar_config(disable=True)
    assert draw(other).shape == (3, 16, 16, 3)


def test_precision_moves(tmp_path):
    pipeline = make().to(torch.bfloat16)
    assert {component.dtype for component in (pipeline.unet, pipeline.vqvae, pipeline.class_embedder)} == {
        torch.bfloat16
    }
    images = draw(pipeline)
    assert images.dtype == np.float32 and np.abs(images - draw(make())).mean() < 0.1
    make().save_pretrained(tmp_path)
    loaded = LDMClassToImagePipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.unet.dtype == loaded.class_embedder.dtype == loaded.vqvae.dtype == torch.bfloat16
    assert np.array_equal(draw(loaded), images)


def test_all_modules_take_part_in_offloading(pipeline):
    modules = {name for name, component in pipeline.components.items() if isinstance(component, torch.nn.Module)}
    assert set(pipeline.model_cpu_offload_seq.split("->")) == modules


def test_layers_are_offloaded_one_by_one(pipeline):
    """With hooks as `enable_sequential_cpu_offload` sets them, though the device is the CPU."""
    other = make()
    for name, part in other.components.items():
        if isinstance(part, torch.nn.Module) and name not in other._exclude_from_cpu_offload:
            cpu_offload(part, torch.device("cpu"))
    assert other.unet.device.type == other.class_embedder.device.type == "meta"
    assert np.array_equal(draw(other), draw(pipeline))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("place", ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_on_a_gpu(pipeline, place):
    """However the parts get there, the latents are those of the CPU, with generators of either device."""
    other = make()
    getattr(other, place)(device="cuda")

    def generators(device):
        return [torch.Generator(device).manual_seed(number) for number in range(3)]

    # Of latents, as the codebook makes jumps of rounding.
    options = {"eta": 0.5, "output_type": "latent"}
    on_cpu, on_gpu = (draw(each, generator=generators("cpu"), **options).cpu() for each in (pipeline, other))
    assert (on_cpu - on_gpu).abs().max() < 0.02 * on_cpu.abs().max()
    first, again = (draw(other, generator=generators("cuda")) for _ in range(2))
    assert first.shape == (3, 16, 16, 3) and first.std() > 1e-2 and np.abs(first - again).mean() < 1e-2
    if place != "to":
        assert all(parameter.device.type != "cuda" for parameter in other.unet.parameters())
    on_device = torch.tensor([3, 9, 0], device="cuda")
    assert other(on_device, num_inference_steps=2, output_type="pt").images.shape == (3, 3, 16, 16)


def test_parts_make_another_pipeline(pipeline):
    other = LDMClassToImagePipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(other), draw(pipeline))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"labels": [11]}, r"class_labels.*\[11\].*\[0, 10\]"),
        ({"labels": [-1]}, "class_labels"),
        ({"labels": []}, "class_labels"),
        ({"labels": [1.5]}, "get_label_ids"),
        ({"labels": ["cat"]}, "get_label_ids"),
        ({"labels": np.array([True])}, "get_label_ids"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"height": 17}, "height.*multiples of 4"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents.*\(3, 3, 8, 8\)"),
        ({"generator": [torch.Generator()]}, "list of 1, but 3"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "prompt"),
    ],
)
def test_bad_arguments_are_named(pipeline, options, words):
    with pytest.raises(ValueError, match=words):
        draw(pipeline, **options)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="'x' is no class"):
        make(id2label={0: "a, b", 1: "c"}).get_label_ids(["x"])
    assert make(id2label={0: "a, b", 1: "c"}).get_label_ids(["b", "c"]) == [0, 1]


def test_the_call_has_the_names_of_diffusers_pipelines():
    ours = inspect.signature(LDMClassToImagePipeline.__call__).parameters
    theirs = inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters
    other = {"self", "class_labels"}
    assert {name for name in ours if name not in theirs} <= other
    for name in ("num_inference_steps", "num_images_per_prompt", "eta", "output_type", "return_dict"):
        assert ours[name].default == theirs[name].default
