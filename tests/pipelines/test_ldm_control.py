"""The control pipelines draw what their base draws where no control acts, what diffusers' own control pipelines draw
where those fit, and open where nothing of ours is installed."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    MultiAdapter,
    MultiControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from forking import as_stranger
from PIL import Image
from tiny_models import tiny_kl, tiny_unet, tiny_vq
from tiny_text import tiny_bert, tiny_tokenizer

from noisycond.denoisers.presets import PRESETS
from noisycond.pipelines import (
    ClassEmbedder,
    LDMClassToImageControlPipeline,
    LDMClassToImagePipeline,
    LDMTextToImageControlPipeline,
    LDMTextToImagePipeline,
    ldm_class_to_image,
    ldm_class_to_image_control,
    ldm_text_to_image,
    ldm_text_to_image_control,
)


pytestmark = pytest.mark.usefixtures("one_thread")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
BASES = {"class": LDMClassToImagePipeline, "text": LDMTextToImagePipeline}
KINDS = {"class": LDMClassToImageControlPipeline, "text": LDMTextToImageControlPipeline}
FILES = {"class": ldm_class_to_image_control, "text": ldm_text_to_image_control}
BASE_FILES = {"class": ldm_class_to_image, "text": ldm_text_to_image}
CONDITIONS = {"class": [3, 9, 0], "text": ["a red cat", "the big dog on a house", "five small cat"]}
both = pytest.mark.parametrize("kind", KINDS)
# What stands in both files in the same words (see the last tests) is tried in one.
crossed = pytest.mark.parametrize("kind, name", [("class", "controlnet"), ("text", "adapter")])


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_base(kind: str, first_stage=None, **unet):
    """A tiny base pipeline: latents 3×8×8, images of 16×16 where the first stage is not another."""
    torch.manual_seed(0)
    parts = {
        "unet": tiny_unet(**unet).eval(),
        "vqvae": first_stage or tiny_vq(scaling_factor=1.5).eval(),
        "scheduler": DDIMScheduler(**BETAS, clip_sample=False),
    }
    if kind == "class":
        parts |= {"class_embedder": ClassEmbedder(10, 12).eval()}
    else:
        parts |= {"bert": tiny_bert(), "tokenizer": tiny_tokenizer()}
    return quiet(BASES[kind](**parts))


def random(model, seed: int = 1, std: float = 0.1):
    """The model with weights far from zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


def fresh_controlnet(unet) -> ControlNetModel:
    """As training starts with it: a control encoder of stride 2, and convolutions of zeros behind it."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4)).eval()


def make_controlnet(unet, seed: int = 1) -> ControlNetModel:
    net = random(fresh_controlnet(unet), seed)
    with torch.no_grad():  # else its control hardly reaches it
        for parameter in net.controlnet_cond_embedding.parameters():
            parameter *= 8
    return net


def make_adapter(unet, kind: str = "class", seed: int = 1):
    return random(FILES[kind].LDMAdapter.for_unet(unet, 2), seed, 0.2)


def controlled(base, kind: str, **control):
    return quiet(KINDS[kind](**base.components, **control))


def draw(pipeline, *image, seed: int = 5, **options):
    kind = "class" if hasattr(pipeline, "class_embedder") else "text"
    defaults = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 2.25}
    condition = options.pop("condition", CONDITIONS[kind])
    return pipeline(condition, *image, **{**defaults, "generator": torch.manual_seed(seed), **options}).images


def picture(seed: int = 0, size: int = 16) -> Image.Image:
    """A control image (RGB)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def differ(first, second) -> bool:
    return np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3


@pytest.fixture(scope="module")
def bases():
    return {kind: make_base(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pipelines(bases):
    """By condition and control: with random weights."""
    found = {}
    for kind, base in bases.items():
        found[kind, "controlnet"] = controlled(base, kind, controlnet=make_controlnet(base.unet))
        found[kind, "adapter"] = controlled(base, kind, adapter=make_adapter(base.unet, kind))
    return found


# Where no control acts


@both
@pytest.mark.parametrize("guidance", [2.25, 1.0])
def test_without_effect_the_images_are_the_bases(bases, pipelines, kind, guidance):
    base, unet = bases[kind], bases[kind].unet
    wanted = draw(base, guidance_scale=guidance)
    fresh = controlled(base, kind, controlnet=fresh_controlnet(unet))
    several = controlled(base, kind, controlnet=[make_controlnet(unet), make_controlnet(unet, 2)])
    for pipeline, images, options in (
        (fresh, picture(), {}),
        (fresh, picture(), {"guess_mode": True}),
        (pipelines[kind, "controlnet"], picture(), {"controlnet_conditioning_scale": 0}),
        (several, [picture(), picture(1)], {"controlnet_conditioning_scale": [0.0, 0.0]}),
        (pipelines[kind, "adapter"], picture(), {"adapter_conditioning_scale": 0.0}),
    ):
        assert np.array_equal(draw(pipeline, images, guidance_scale=guidance, **options), wanted), options
    for name in ("controlnet", "adapter"):
        assert differ(draw(pipelines[kind, name], picture(), guidance_scale=guidance), wanted)


@crossed
def test_control_acts_within_its_share_of_the_steps(bases, pipelines, kind, name):
    def latents(pipeline, *image, **options):
        seen = []

        def keep(owner, step, timestep, tensors):
            seen.append(tensors["latents"])

        options |= {"num_inference_steps": 4, "output_type": "latent", "callback_on_step_end": keep}
        draw(pipeline, *image, **options)
        return seen

    free, pipeline = latents(bases[kind]), pipelines[kind, name]
    late = latents(pipeline, picture(), control_guidance_start=0.5)
    assert [torch.equal(a, b) for a, b in zip(free, late, strict=True)] == [True, True, False, False]
    whole = latents(pipeline, picture())
    early = latents(pipeline, picture(), control_guidance_end=0.5)
    assert [torch.equal(a, b) for a, b in zip(whole, early, strict=True)] == [True, True, False, False]
    assert not torch.equal(free[0], whole[0])


# Against diffusers' own pipelines


def stable_diffusion(kind, base, **control):
    """diffusers' own pipeline of the base's parts; the embeddings are given to its calls."""
    parts = {"vae": base.vqvae, "text_encoder": base.bert, "tokenizer": base.tokenizer, "unet": base.unet}
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return quiet(kind(**parts, scheduler=base.scheduler, **options, **control))


def embeddings(base) -> dict:
    with torch.no_grad():
        embeds, none = base.encode_prompt(CONDITIONS["text"]), base.encode_prompt([""] * 3)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": none}


SHARES = {"control_guidance_start": 0.2, "control_guidance_end": 0.8}
OWN_SHARES = {"control_guidance_start": [0.0, 0.4], "control_guidance_end": [0.7, 1.0]}
CONTROLNET_OPTIONS = [
    (False, {"eta": 0.5}),
    (False, {"guidance_scale": 1.0}),
    (False, {"guess_mode": True}),
    (False, {"guess_mode": True, "guidance_scale": 1.0}),
    (False, {"controlnet_conditioning_scale": 0.5, **SHARES}),
    (True, {"guess_mode": True}),
    (True, {"controlnet_conditioning_scale": [0.5, 1.5], **OWN_SHARES}),
]


@pytest.mark.parametrize("several, options", CONTROLNET_OPTIONS, ids=str)
def test_controlnet_images_are_those_of_diffusers(several, options):
    base = make_base("text", tiny_kl(3).eval())
    nets, images = [make_controlnet(base.unet), make_controlnet(base.unet, 2)], [picture(), picture(1)]
    controlnet, image = (nets, images) if several else (nets[0], images[0])
    theirs = stable_diffusion(StableDiffusionControlNetPipeline, base, controlnet=controlnet)
    ours = controlled(base, "text", controlnet=controlnet)
    options = {**embeddings(base), "num_inference_steps": 5, "output_type": "latent", **options}
    if options.get("guidance_scale") == 1.0:
        options.pop("negative_prompt_embeds")
    found = draw(ours, image, condition=None, **options)
    wanted = draw(theirs, image, condition=None, height=16, width=16, **options)
    assert found.std() > 1e-2 and torch.equal(found, wanted)


@pytest.mark.parametrize("several, guidance", [(False, 1.0), (True, 2.25)])
def test_adapter_images_are_those_of_diffusers(several, guidance):
    """On a U-Net all of whose blocks but the last attend, as Stable Diffusion's."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    base = make_base("text", tiny_kl(3).eval())
    torch.manual_seed(0)
    config = {key: value for key, value in base.unet.config.items() if not key.startswith("_")}
    up = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    base.unet = UNet2DConditionModel(**{**config, **blocks, **up}).eval()
    adapters = [random(T2IAdapter(3, [8, 16], 1, 2), seed, 0.2) for seed in (1, 2)]
    adapter, image = (adapters, [picture(), picture(1)]) if several else (adapters[0], picture())
    scale = [0.5, 1.5] if several else 0.7
    theirs = stable_diffusion(StableDiffusionAdapterPipeline, base, adapter=adapter)
    options = {**embeddings(base), "output_type": "latent", "guidance_scale": guidance}
    if guidance == 1.0:
        options.pop("negative_prompt_embeds")
    batch = [[each] * 3 for each in image] if several else [image] * 3
    wanted = draw(theirs, batch, condition=None, height=16, width=16, adapter_conditioning_scale=scale, **options)
    given = MultiAdapter(adapters) if several else adapter
    for each in (adapter, given):
        ours = controlled(base, "text", adapter=each)
        found = draw(ours, image, condition=None, adapter_conditioning_scale=scale, **options)
        assert found.std() > 1e-2 and (found - wanted).abs().max() < 1e-5


# The control image


@pytest.mark.parametrize("name", ["controlnet", "adapter"])
def test_a_control_in_every_form(pipelines, name):
    pipeline, image = pipelines["class", name], picture()
    array = np.asarray(image, dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = draw(pipeline, image)
    for form in (array, tensor, array[None], tensor[None], [image] * 3, [array] * 3, torch.stack([tensor] * 3)):
        assert np.array_equal(draw(pipeline, form), wanted)
    assert np.array_equal(draw(pipeline, image.convert("L")), draw(pipeline, image.convert("L").convert("RGB")))
    assert differ(draw(pipeline, picture(1)), wanted)


def test_a_control_is_resized_as_in_diffusers(pipelines):
    """Of any proportions where it is a picture."""
    pipeline, image = pipelines["class", "controlnet"], picture(size=40).resize((40, 24))
    resized = image.resize((16, 16), resample=Image.Resampling.LANCZOS)
    assert np.array_equal(draw(pipeline, image), draw(pipeline, resized))
    tensor = torch.rand((1, 3, 32, 32), generator=torch.manual_seed(1))
    assert np.array_equal(draw(pipeline, tensor), draw(pipeline, tensor[..., ::2, ::2]))
    wide = draw(pipeline, image, height=24, width=40)
    assert wide.shape == (3, 24, 40, 3)
    assert np.array_equal(wide, draw(pipeline, np.asarray(image, dtype=np.float32) / 255, height=24, width=40))


@crossed
def test_a_control_per_condition_or_per_image(pipelines, kind, name):
    """Each image follows its own control, as when it is drawn alone."""
    pipeline, condition = pipelines[kind, name], CONDITIONS[kind][:2]
    images = [picture(number) for number in range(4)]

    def generators(*numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    def alone(number, image):
        options = {"condition": condition[number // 2 : number // 2 + 1], "generator": generators(number)}
        return draw(pipeline, image, **options)[0]

    options = {"condition": condition, "num_images_per_prompt": 2, "generator": generators(0, 1, 2, 3)}
    per_image = draw(pipeline, images, **options)
    options["generator"] = generators(0, 1, 2, 3)
    per_condition = draw(pipeline, images[:2], **options)
    for number in range(4):
        assert np.abs(per_image[number] - alone(number, images[number])).max() < 1e-4
        assert np.abs(per_condition[number] - alone(number, images[number // 2])).max() < 1e-4
    assert differ(per_image[1], per_condition[1])


def test_several_adapters_are_added_up(bases):
    base, kind = bases["class"], "class"
    adapters = [make_adapter(base.unet, kind, seed) for seed in (1, 2, 3)]
    pipeline = controlled(base, kind, adapter=adapters)
    images = [picture(number) for number in range(3)]
    first = controlled(base, kind, adapter=adapters[0])
    alone = draw(first, images[0], adapter_conditioning_scale=0.5)
    assert np.array_equal(draw(pipeline, images, adapter_conditioning_scale=[0.5, 0, 0]), alone)
    assert differ(draw(pipeline, images, adapter_conditioning_scale=[0.5, 0.5, 0.5]), alone)
    # Each acts at its own time.
    together = draw(pipeline, images, control_guidance_start=[0, 0.9, 0.9], adapter_conditioning_scale=0.5)
    assert np.array_equal(together, alone)


OF_CALLBACKS = [("class", "controlnet", {}), ("text", "controlnet", {"guess_mode": True}), ("text", "adapter", {})]


@pytest.mark.parametrize("kind, name, options", OF_CALLBACKS)
def test_a_callback_ends_guidance(pipelines, kind, name, options):
    """The steps that follow are those of a pipeline that is not guided."""
    pipeline, after_one, seen = pipelines[kind, name], [], []
    embeds_name = pipeline._callback_tensor_inputs[1]

    def end(owner, step, timestep, tensors):
        if step == 0:
            after_one.append(tensors["latents"])
            return {embeds_name: tensors[embeds_name].chunk(2)[1]}

    def go_on(owner, step, timestep, tensors):
        return {"latents": after_one[0]} if step == 0 else {}

    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    names = ["latents", embeds_name]
    options = options | {"output_type": "latent", "callback_on_step_end_tensor_inputs": names}
    found = draw(pipeline, picture(), callback_on_step_end=end, **options)
    hook.remove()
    assert seen == [6, 3]
    wanted = draw(pipeline, picture(), callback_on_step_end=go_on, guidance_scale=1.0, **options)
    assert torch.equal(found, wanted)


def test_a_latent_consistency_model_is_controlled():
    kind = "text"
    base = make_base(kind, time_cond_proj_dim=8)
    base.scheduler = LCMScheduler(**BETAS, clip_sample=False)
    net = ControlNetModel.from_unet(
        base.unet, conditioning_embedding_out_channels=(4, 4), load_weights_from_unet=False
    )
    for control, scale in (({"controlnet": random(net)}, "controlnet_conditioning_scale"), ({}, "")):
        control = control or {"adapter": make_adapter(base.unet, kind)}
        scale = scale or "adapter_conditioning_scale"
        pipeline = controlled(base, kind, **control)
        wanted = draw(base, guidance_scale=7.5)
        assert np.array_equal(draw(pipeline, picture(), guidance_scale=7.5, **{scale: 0.0}), wanted)
        assert differ(draw(pipeline, picture(), guidance_scale=7.5), wanted)


# Sizes of an adapter's features

LAYOUTS = ["DCC", "CCD", "CDC", "CC", "DD"]


def layout(letters: str) -> dict:
    """A U-Net's configuration with down blocks that attend (C) or do not (D)."""
    kinds = {"D": "DownBlock2D", "C": "CrossAttnDownBlock2D"}
    up = {"D": "UpBlock2D", "C": "CrossAttnUpBlock2D"}
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": tuple(4 * (number + 1) for number in range(len(letters))),
        "down_block_types": tuple(kinds[letter] for letter in letters),
        "up_block_types": tuple(up[letter] for letter in reversed(letters)),
        "layers_per_block": 1,
        "cross_attention_dim": 6,
        "attention_head_dim": 1,
        "norm_num_groups": 4,
    }


def runs_with(unet, features: list[torch.Tensor], size: int = 16) -> bool:
    """Whether the U-Net takes the features and adds every one of them."""
    left = list(features)
    device = features[0].device
    noisy, embeds = torch.zeros((1, 3, size, size), device=device), torch.zeros((1, 1, 6), device=device)
    dim = unet.config.cross_attention_dim
    try:
        with torch.no_grad():
            embeds = torch.zeros((1, 1, dim), device=device)
            unet(noisy, 1, embeds, down_intrablock_additional_residuals=left)
    except RuntimeError:
        return False
    return not left


@pytest.mark.parametrize("letters", LAYOUTS)
def test_features_have_the_sizes_that_the_unet_adds(letters):
    kind = "text"
    with torch.device("meta"):
        unet = UNet2DConditionModel(**layout(letters))
        adapter = FILES[kind].LDMAdapter.for_unet(unet, 4)
        features = adapter(torch.zeros(1, 3, 64, 64))
        stock = T2IAdapter(channels=list(unet.config.block_out_channels), downscale_factor=4)
        stock_features = stock(torch.zeros(1, 3, 64, 64))
    assert [tuple(feature.shape[1:]) for feature in features] == adapter.features_like(unet, 16, 16)
    assert adapter.fits(unet) and runs_with(unet, features)
    assert FILES[kind].stock_adapter_fits(unet) == runs_with(unet, stock_features)
    assert FILES[kind].stock_adapter_fits(unet) == (letters in ("CCD", "CC"))


@pytest.mark.parametrize("name, strides", [("ldm-4", (2, 2, 4, 8)), ("ldm-mini", (2, 2, 4))])
def test_adapters_of_our_presets(name, strides):
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=3, out_channels=3, sample_size=64, **PRESETS[name].config)
        adapter = ldm_class_to_image_control.LDMAdapter.for_unet(unet, PRESETS[name].factor)
        features = adapter(torch.zeros(1, 3, 256, 256))
    assert tuple(adapter.config.strides) == strides and runs_with(unet, features, 64)
    assert adapter.features_like(unet, 64, 64) == [tuple(feature.shape[1:]) for feature in features]
    assert not ldm_class_to_image_control.stock_adapter_fits(unet)


def test_an_adapter_of_another_unet_does_not_fit():
    with torch.device("meta"):
        unets = {letters: UNet2DConditionModel(**layout(letters)) for letters in ("DCCC", "CCCD")}
        adapter = ldm_class_to_image_control.LDMAdapter.for_unet(unets["DCCC"], 4)
    assert adapter.fits(unets["DCCC"]) and not adapter.fits(unets["CCCD"])
    adapter.register_to_config(channels=(4, 8, 12, 20))
    assert not adapter.fits(unets["DCCC"])
    odd = UNet2DConditionModel(**layout("DC"))
    odd.register_to_config(down_block_types=("DownBlock2D", "AttnDownBlock2D"))
    with pytest.raises(ValueError, match="this U-Net has a AttnDownBlock2D"):
        adapter.fits(odd)


def test_the_adapter_learns():
    """All of its weights take part, and a gradient reaches them through the U-Net."""
    unet = tiny_unet().requires_grad_(False)
    adapter = ldm_class_to_image_control.LDMAdapter.for_unet(unet, 2)
    features = adapter(torch.rand(2, 3, 16, 16))
    noisy, embeds = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 12)
    unet(noisy, 1, embeds, down_intrablock_additional_residuals=list(features)).sample.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


# Folders


def make_controls(unet, kind: str) -> dict:
    """Every sort of control, by name."""
    nets = [make_controlnet(unet, seed) for seed in (1, 2)]
    adapters = [make_adapter(unet, kind, seed) for seed in (1, 2, 3)]
    return {
        "controlnet": ({"controlnet": nets[0]}, picture()),
        "controlnets": ({"controlnet": nets}, [picture(), picture(1)]),
        "adapter": ({"adapter": adapters[0]}, picture()),
        "adapters": ({"adapter": adapters}, [picture(), picture(1), picture(2)]),
    }


OF_FOLDERS = [("class", "controlnets"), ("class", "adapter"), ("text", "controlnet"), ("text", "adapters")]


@pytest.mark.parametrize("kind, name", OF_FOLDERS)
def test_a_saved_pipeline_gives_the_same_images(bases, tmp_path, kind, name):
    control, image = make_controls(bases[kind].unet, kind)[name]
    original = controlled(bases[kind], kind, **control)
    original.save_pretrained(tmp_path / "a")
    loaded = quiet(KINDS[kind].from_pretrained(tmp_path / "a"))
    loaded.save_pretrained(tmp_path / "b")
    again = quiet(KINDS[kind].from_pretrained(tmp_path / "b"))
    wanted = draw(original, image)
    assert np.array_equal(draw(loaded, image), wanted) and np.array_equal(draw(again, image), wanted)
    indexes = [json.loads((tmp_path / folder / "model_index.json").read_text()) for folder in "ab"]
    assert indexes[0] == {key: value for key, value in indexes[1].items() if key != "_name_or_path"}
    assert list((tmp_path / "a").rglob("*.safetensors")) and not list((tmp_path / "a").rglob("*.bin"))


@crossed
def test_a_base_is_opened_with_a_control(bases, pipelines, tmp_path, kind, name):
    """The folder names the base's class and file; what runs is the class that is asked."""
    bases[kind].save_pretrained(tmp_path / "base")
    for code in tmp_path.rglob("*.py"):
        code.write_text("raise SystemExit('code of the folder was run')")
    control = {name: getattr(pipelines[kind, name], name)}
    loaded = quiet(KINDS[kind].from_pretrained(tmp_path / "base", **control))
    wanted = draw(pipelines[kind, name], picture())
    assert np.array_equal(draw(loaded, picture()), wanted)
    half = quiet(KINDS[kind].from_pretrained(tmp_path / "base", torch_dtype=torch.bfloat16, **control))
    assert half.unet.dtype == half.vqvae.dtype == torch.bfloat16 != getattr(half, name).dtype
    assert np.abs(draw(half, picture()) - wanted).mean() < 0.1  # of another precision than the control
    with pytest.raises(ValueError, match="base.*exactly one of `controlnet` and `adapter`.*neither is"):
        KINDS[kind].from_pretrained(tmp_path / "base")


def test_a_saved_control_is_replaced(bases, pipelines, tmp_path):
    kind = "text"
    pipelines[kind, "controlnet"].save_pretrained(tmp_path / "saved")
    adapter = pipelines[kind, "adapter"].adapter
    loaded = quiet(KINDS[kind].from_pretrained(tmp_path / "saved", adapter=adapter))
    assert loaded.controlnet is None
    assert np.array_equal(draw(loaded, picture()), draw(pipelines[kind, "adapter"], picture()))
    several = [make_controlnet(bases[kind].unet, 2), pipelines[kind, "controlnet"].controlnet]
    loaded = quiet(KINDS[kind].from_pretrained(tmp_path / "saved", controlnet=several))
    images = [picture(), picture(1)]
    assert type(loaded.controlnet) is MultiControlNetModel
    assert np.array_equal(draw(loaded, images), draw(controlled(bases[kind], kind, controlnet=several), images))


def test_class_names_travel_along(bases, pipelines, tmp_path):
    names = {label: f"class {label}, alias {label}" for label in range(10)}
    base = quiet(LDMClassToImagePipeline(**bases["class"].components, id2label=names))
    base.save_pretrained(tmp_path / "base")
    controlnet = pipelines["class", "controlnet"].controlnet
    loaded = LDMClassToImageControlPipeline.from_pretrained(tmp_path / "base", controlnet=controlnet)
    loaded.save_pretrained(tmp_path / "saved")
    loaded = LDMClassToImageControlPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.get_label_ids(["class 7", "alias 3"]) == [7, 3]


@crossed
def test_without_a_first_stage(bases, pipelines, tmp_path, kind, name):
    """The latents' size against the control's is then what the control was made for."""
    bases[kind].save_pretrained(tmp_path)
    whole = pipelines[kind, name]
    part = quiet(KINDS[kind].from_pretrained(tmp_path, **{name: getattr(whole, name)}, vqvae=None))
    wanted = draw(whole, picture(), output_type="latent")
    assert torch.equal(draw(part, picture(), output_type="latent"), wanted)
    with pytest.raises(ValueError, match="no first stage"):
        draw(part, picture())


STRANGER = """
import sys
sys.modules["noisycond"] = None  # importing it fails
import numpy, torch
from diffusers import AutoModel, ControlNetModel, DiffusionPipeline
from diffusers.utils import get_class_from_dynamic_module
torch.set_num_threads(1)
root = sys.argv[1]
names = {"class": "LDMClassToImageControlPipeline", "text": "LDMTextToImageControlPipeline"}
conditions = {"class": [3, 9, 0], "text": ["a red cat", "the dog"]}
control = numpy.load(root + "/control.npy")
def draw(kind, pipeline):
    assert type(pipeline).__module__.startswith("diffusers_modules."), type(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": torch.manual_seed(5), "num_inference_steps": 2, "output_type": "np"}
    return pipeline(conditions[kind], control, guidance_scale=2.25, **options).images
opened = {}
for kind, name in names.items():
    for which in ("controlnet", "adapter"):
        is_whole = (kind, which) in (("class", "controlnet"), ("text", "adapter"))
        folder, base = f"{root}/{kind}-{which}", f"{root}/{kind}"
        if which == "controlnet":
            given = {"controlnet": ControlNetModel.from_pretrained(folder)}
        else:
            given = {"adapter": AutoModel.from_pretrained(folder, trust_remote_code=True)}
        source = {"class_name": name, "trust_remote_code": True}
        pipeline = get_class_from_dynamic_module(folder, "pipeline.py", **source).from_pretrained(base, **given)
        opened[kind, which] = [pipeline]
        for suffix in ("-saved", "-again") if is_whole else ():
            opened[kind, which][-1].save_pretrained(folder + suffix)
            opened[kind, which].append(DiffusionPipeline.from_pretrained(folder + suffix, trust_remote_code=True))
    if kind == "class":  # the line of diffusers alone, which takes the path of a file without its ending
        options = {"custom_pipeline": f"{root}/{kind}-controlnet/pipeline", "trust_remote_code": True}
        given = {"controlnet": opened[kind, "controlnet"][0].controlnet}
        opened[kind, "line"] = [DiffusionPipeline.from_pretrained(base, **options, **given)]
# After all were opened: diffusers keeps local files of one name as one module.
for (kind, which), pipelines in opened.items():
    for number, pipeline in enumerate(pipelines):
        numpy.save(f"{root}/{kind}-{which}-{number}.npy", draw(kind, pipeline))
opened["class", "adapter"][0].save_pretrained(root + "/late")
"""


def test_a_stranger_gets_the_same_images(bases, pipelines, tmp_path):
    """In a process that can import nothing of ours: a ControlNet's or an adapter's folder on an exported base, the
    assembled pipeline saved and opened by diffusers, and again."""
    control = np.asarray(picture(), dtype=np.float32) / 255
    np.save(tmp_path / "control.npy", control)
    for kind, base in bases.items():
        base.save_pretrained(tmp_path / kind)
        pipelines[kind, "controlnet"].controlnet.save_pretrained(tmp_path / f"{kind}-controlnet")
        FILES[kind].write_pipeline_file(tmp_path / f"{kind}-controlnet")
        pipelines[kind, "adapter"].adapter.save_pretrained(tmp_path / f"{kind}-adapter")
    done = as_stranger(STRANGER, tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    # A word of the wrong type or of an unknown setting would be diffusers' complaint about our files.
    assert "Expected types" not in done.stderr and "not expected" not in done.stderr
    for kind in KINDS:
        condition = CONDITIONS[kind] if kind == "class" else ["a red cat", "the dog"]
        for which in ("controlnet", "adapter"):
            wanted = draw(pipelines[kind, which], control, condition=condition)
            files = list(tmp_path.glob(f"{kind}-{which}-?.npy"))
            assert len(files) == (3 if (kind, which) in (("class", "controlnet"), ("text", "adapter")) else 1)
            files += tmp_path.glob(f"{kind}-line-?.npy") if which == "controlnet" else []
            assert all(np.array_equal(np.load(file), wanted) for file in files), (kind, which)
    assert (tmp_path / "class-line-0.npy").exists()
    code = inspect.getsource(ldm_class_to_image_control)
    for file in (
        "ldm_class_to_image_control.py",
        "adapter/pipeline.py",
        "class_embedder/ldm_class_to_image_control.py",
    ):
        assert (tmp_path / "late" / file).read_text() == code


# Bad input

BAD = [
    ({"image": None}, "`image`, the control image, must be given"),
    ({"image": "edges.png"}, "`image` must be a PIL image"),
    ({"image": []}, "`image` must be a PIL image"),
    ({"image": [picture(), np.zeros((16, 16, 3))]}, "`image` must be a PIL image"),
    ({"image": [picture()] * 2}, "`image` has 2 images, but 1 or 3 are expected"),
    ({"image": [picture()] * 2, "num_images_per_prompt": 2}, "`image` has 2 images, but 1 or 3 or 6 are expected"),
    ({"image": torch.zeros(2, 3, 16, 16)}, "`image` has 2 images"),
    ({"image": torch.zeros(3, 16, 24)}, r"16×24 pixels .*not the proportions of the images, 16×16"),
    ({"image": np.zeros((16, 16, 3)), "width": 32}, r"16×16 pixels .*not the proportions of the images, 16×32"),
    ({"image": torch.zeros(1, 16, 16)}, r"shape \(1, 16, 16\), but \[3, H, W\]"),
    ({"image": np.zeros((16, 16))}, r"shape \(16, 16\), but \[H, W, 3\]"),
    ({"image": np.zeros((3, 16, 16))}, r"shape \(3, 16, 16\), but \[H, W, 3\]"),
    ({"image": np.zeros((16, 16, 3), np.uint8)}, "uint8 values from 0 to 0, but floats in"),
    ({"image": torch.full((3, 16, 16), 2.0)}, "values from 2 to 2, but floats in"),
    ({"image": [np.zeros((16, 16, 3)), np.zeros((32, 32, 3)), np.zeros((16, 16, 3))]}, "must be of one"),
    ({"control_guidance_start": 0.7, "control_guidance_end": 0.5}, "are 0.7 and 0.5, but must be shares"),
    ({"control_guidance_start": -0.1}, "are -0.1 and 1.0, but must be shares"),
    ({"control_guidance_end": 1.1}, "are 0.0 and 1.1, but must be shares"),
    ({"control_guidance_start": [0, 0.5]}, "`control_guidance_start` has 2 numbers, but the number of controls is 1"),
    ({"height": 17}, "`height` and `width` are 17 and 16"),
    ({"output_type": "jpeg"}, "output_type"),
    ({"generator": [torch.Generator()]}, "list of 1, but"),
]
OF_CONTROLNETS = [
    ({"controlnet_conditioning_scale": [1.0, 0.5]}, "`controlnet_conditioning_scale` has 2 numbers, but .* is 1"),
    ({"controlnet_conditioning_scale": "strong"}, "`controlnet_conditioning_scale` is 'strong', but must be a number"),
    ({"controlnet_conditioning_scale": float("nan")}, "is nan, but must be a number"),
    ({"adapter_conditioning_scale": 0.5}, "`adapter_conditioning_scale` has no effect.*`controlnet_cond"),
]
OF_ADAPTERS = [
    ({"adapter_conditioning_scale": [1.0, 0.5]}, "`adapter_conditioning_scale` has 2 numbers, but .* is 1"),
    ({"controlnet_conditioning_scale": [0.5]}, "`controlnet_conditioning_scale` has no effect.*`adapter_cond"),
    ({"guess_mode": True}, "`guess_mode` is for ControlNets, but this pipeline has an adapter"),
    ({"height": 18, "width": 18}, "multiples of 4"),
]


@crossed
def test_bad_arguments_are_named(pipelines, kind, name):
    for options, words in BAD + (OF_CONTROLNETS if name == "controlnet" else OF_ADAPTERS):
        with pytest.raises(ValueError, match=words) as caught:
            draw(pipelines[kind, name], **{"image": picture(), **options})
        assert "\n" not in str(caught.value)


def test_several_controls_need_as_many_images_and_numbers(bases):
    kind, unet = "text", bases["text"].unet
    nets = controlled(bases[kind], kind, controlnet=[make_controlnet(unet), make_controlnet(unet, 2)])
    adapters = controlled(bases[kind], kind, adapter=[make_adapter(unet, kind), make_adapter(unet, kind, 2)])
    for pipeline, scale in ((nets, "controlnet_conditioning_scale"), (adapters, "adapter_conditioning_scale")):
        images = [picture(), picture(1)]
        for image, options, words in (
            (picture(), {}, "`image` is a Image, but must be a list.* 2 controls"),
            ([picture()], {}, "`image` is a list of 1, but must be a list.* 2 controls"),
            (images, {scale: [1.0]}, f"`{scale}` has 1 numbers, but the number of controls is 2"),
            (images, {"control_guidance_end": [1.0, 0.5, 0.2]}, "`control_guidance_end` has 3 numbers"),
            ([picture(), [picture()] * 2], {}, "`image` has 2 images, but 1 or 3"),
        ):
            with pytest.raises(ValueError, match=words):
                draw(pipeline, image, **options)


def other_controlnet(**options) -> ControlNetModel:
    """One for the tiny U-Net but for some of its configuration."""
    config = {
        "in_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": 12,
        "conditioning_embedding_out_channels": (4, 4),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return ControlNetModel(**{**config, **options})


OTHER = [
    (lambda: {"controlnet": other_controlnet(in_channels=4)}, "its in_channels is 4, but that of this U-Net is 3"),
    (lambda: {"controlnet": other_controlnet(block_out_channels=(8, 8))}, r"block_out_channels is \(8, 8\), but"),
    (lambda: {"controlnet": other_controlnet(cross_attention_dim=20)}, "cross_attention_dim is 20, but .* is 12"),
    (lambda: {"controlnet": other_controlnet(layers_per_block=2)}, "layers_per_block is 2, but .* is 1"),
    (lambda: {"controlnet": other_controlnet(down_block_types=("DownBlock2D",) * 2)}, "down_block_types is"),
    (
        lambda: {"controlnet": other_controlnet(conditioning_embedding_out_channels=(4, 4, 4))},
        "of 4 times the latents' size .conditioning_embedding_out_channels., but the first stage's factor is 2",
    ),
    (
        lambda: {"controlnet": other_controlnet(conditioning_channels=1)},
        "ControlNet takes control images of 1 channels",
    ),
    (lambda: {"controlnet": [other_controlnet(), other_controlnet(in_channels=4)]}, "its in_channels is 4"),
    (lambda: {"controlnet": []}, "`controlnet` is an empty list"),
    (
        lambda: {"controlnet": T2IAdapter(3, [8, 16], 1, 2)},
        "`controlnet` is a T2IAdapter, but must be a ControlNetModel",
    ),
    (
        lambda: {"adapter": other_controlnet()},
        "`adapter` is a ControlNetModel, but must be a LDMAdapter or T2IAdapter",
    ),
    (lambda: {"adapter": T2IAdapter(3, [8, 16], 1, 2)}, r"features have the sizes \[\(8, 4, 4\), \(16, 2, 2\)\], but"),
    (lambda: {"adapter": T2IAdapter(3, [8, 16], 1, 4)}, "of 4 times the latents' size .downscale_factor., but"),
    (lambda: {"adapter": T2IAdapter(1, [8, 16], 1, 2)}, "adapter takes control images of 1 channels"),
    (dict, "exactly one of `controlnet` and `adapter` must be given, but neither is"),
    (
        lambda: {"controlnet": other_controlnet(), "adapter": T2IAdapter(3, [8, 16], 1, 2)},
        "exactly one .* but both are",
    ),
]


@pytest.mark.parametrize("make, words", OTHER, ids=[words for _, words in OTHER])
def test_a_control_for_another_base_is_refused(bases, make, words):
    control, kind = make(), "class"
    with pytest.raises(ValueError, match=words) as caught:
        KINDS[kind](**bases[kind].components, **control)
    assert "\n" not in str(caught.value)


@both
def test_an_adapter_of_the_same_channels_and_other_strides_is_refused(bases, kind):
    adapter = FILES[kind].LDMAdapter(channels=(8, 16), strides=(1, 2), downscale_factor=2)
    with pytest.raises(ValueError, match="adapter is for another base: for latents of 4×4"):
        KINDS[kind](**bases[kind].components, adapter=adapter)


def test_a_larger_adapter_of_diffusers_is_taken(bases):
    """Of the sizes of SDXL's U-Net, three blocks the first of which does not attend: one feature more than blocks."""
    options = layout("DCC") | {"block_out_channels": (4, 8, 8), "cross_attention_dim": 12}
    base = make_base("class")
    base.unet = UNet2DConditionModel(**options, sample_size=8).eval()
    adapter = random(T2IAdapter(3, [4, 8, 8, 8], 1, 4, "full_adapter_xl"), 1, 0.2)
    pipeline = controlled(base, "class", adapter=adapter)
    without = draw(base)
    assert differ(draw(pipeline, picture()), without)
    assert np.array_equal(draw(pipeline, picture(), adapter_conditioning_scale=0.0), without)


MISSING = [
    ("model_index.json", "model_index.json is missing"),
    ("unet/config.json", "U-Net is missing .unet/config.json"),
    ("vqvae/diffusion_pytorch_model.safetensors", "first stage's weights are missing"),
    ("scheduler/scheduler_config.json", "scheduler is missing"),
]


@both
def test_a_missing_piece_is_named(bases, pipelines, tmp_path, kind):
    own = {
        "class": ("class_embedder/config.json", "class embedder is missing"),
        "text": ("bert/config.json", "text enc"),
    }
    controlnet, folder = pipelines[kind, "controlnet"].controlnet, tmp_path / "base"
    bases[kind].save_pretrained(folder)
    for file, words in (*MISSING, own[kind]):
        (folder / file).rename(tmp_path / "aside")
        with pytest.raises((ValueError, OSError), match=words) as caught:
            KINDS[kind].from_pretrained(folder, controlnet=controlnet)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        (tmp_path / "aside").rename(folder / file)
    with pytest.raises(OSError, match="nobody/nothing: neither a folder nor a Hub id"):
        KINDS[kind].from_pretrained("nobody/nothing", controlnet=controlnet)


# Places and precisions


@crossed
def test_offloading(bases, pipelines, kind, name):
    pipeline = pipelines[kind, name]
    modules = {part for part, component in pipeline.components.items() if isinstance(component, torch.nn.Module)}
    assert set(pipeline.model_cpu_offload_seq.split("->")) | {"controlnet"} == modules | {"adapter", "controlnet"}
    make = make_controlnet if name == "controlnet" else lambda unet: make_adapter(unet, kind)
    base = make_base(kind)
    other = controlled(base, kind, **{name: make(base.unet)})
    wanted = draw(other, picture())
    for part in modules - set(other._exclude_from_cpu_offload):
        cpu_offload(getattr(other, part), torch.device("cpu"))
    assert other.unet.device.type == getattr(other, name).device.type == "meta"
    assert np.array_equal(draw(other, picture()), wanted)


# What the files must hold to stand alone


@both
def test_one_pipeline_stands_in_a_file(kind):
    kinds = inspect.getmembers(FILES[kind], inspect.isclass)
    own = [each for _, each in kinds if issubclass(each, DiffusionPipeline) and each is not DiffusionPipeline]
    assert own == [KINDS[kind]]


@both
def test_the_call_is_the_bases_with_a_control(kind):
    base, ours = (list(inspect.signature(each[kind].__call__).parameters.values()) for each in (BASES, KINDS))
    names = ["image", "controlnet_conditioning_scale", "adapter_conditioning_scale", "control_guidance_start"]
    names += ["control_guidance_end", "guess_mode"]
    rest = [each for each in ours if each.name not in names]
    assert [(each.name, each.default) for each in rest] == [(each.name, each.default) for each in base]
    assert [each.name for each in ours][2] == "image"
    stock = inspect.signature(StableDiffusionControlNetPipeline.__call__).parameters
    adapter = inspect.signature(StableDiffusionAdapterPipeline.__call__).parameters
    for each in ours:
        if each.name in names:
            assert each.default == (adapter if each.name.startswith("adapter") else stock)[each.name].default


def own_names(module) -> set[str]:
    """The functions and classes that a file defines."""
    return {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}


def source(owner, name: str) -> str:
    member = inspect.getattr_static(owner, name)
    member = member.fget if isinstance(member, property) else member
    return inspect.getsource(getattr(member, "__func__", member))


def test_twins_of_the_two_files_are_the_same():
    """All that both define by one name: where diffusers loads both as `pipeline.py`, they share one module."""
    class_names, text_names = (own_names(module) for module in FILES.values())
    shared = class_names & text_names
    assert {"LDMAdapter", "LDMMultiAdapter", "Control", "_check_controls", "_check_pieces"} <= shared
    for name in shared:
        assert inspect.getsource(vars(FILES["class"])[name]) == inspect.getsource(vars(FILES["text"])[name]), name
    assert class_names - shared == {"ClassEmbedder", "LDMClassToImageControlPipeline"}
    same = {name for name, value in vars(FILES["class"]).items() if isinstance(value, (str, tuple)) and name.isupper()}
    assert same == {"PIPELINE_FILE", "SOURCE", "FAILURES"}
    assert all(vars(FILES["class"])[name] == vars(FILES["text"])[name] for name in same - {"SOURCE"})


TWINS = "_denoise _residuals _prepare_control _read_control _read_images _check_feature_sizes _embed_guidance _decode "
TWINS += "_prepare_latents _sample_size guidance_scale do_classifier_free_guidance num_timesteps interrupt "
TWINS += "_dict_from_json_file load_config"


@pytest.mark.parametrize("name", TWINS.split())
def test_twin_methods_are_the_same(name):
    assert source(KINDS["class"], name) == source(KINDS["text"], name)


OF_BASES = {
    "class": "get_label_ids _check_labels _check_inputs",
    "text": "max_tokens encode_prompt _check_prompts _check_inputs",
}
OF_BOTH = " guidance_scale do_classifier_free_guidance num_timesteps interrupt _sample_size _embed_guidance _decode"
OF_BOTH += " _prepare_latents"


@both
def test_what_repeats_the_base_is_the_same(kind):
    for name in (OF_BASES[kind] + OF_BOTH).split():
        assert source(KINDS[kind], name) == source(BASES[kind], name), name
    repeated = own_names(FILES[kind]) & own_names(BASE_FILES[kind]) - {"_check_pieces"}
    assert {"get_guidance_scale_embedding", "_read_json"} <= repeated
    for name in repeated:
        assert source(FILES[kind], name) == source(BASE_FILES[kind], name), name


def test_diffusers_has_what_the_files_say_of_it(tmp_path):
    """Why the folder's code is opened by its class: diffusers prefers the base's own file to the one that is asked."""
    base = make_base("class")
    base.save_pretrained(tmp_path / "base")
    make_controlnet(base.unet).save_pretrained(tmp_path / "control")
    ldm_class_to_image_control.write_pipeline_file(tmp_path / "control")
    loaded = diffusers.pipelines.pipeline_loading_utils._resolve_custom_pipeline_and_cls(
        str(tmp_path / "base"), DiffusionPipeline.load_config(tmp_path / "base"), str(tmp_path / "control")
    )
    assert loaded == (str(tmp_path / "base/ldm_class_to_image.py"), "LDMClassToImagePipeline")
