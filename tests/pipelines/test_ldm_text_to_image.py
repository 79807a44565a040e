"""The text-to-image LDM pipeline draws what diffusers' own class of that name draws, and full-size images where that
one does not; latent consistency models draw in one pass, as diffusers' own pipeline of them does."""

import inspect
import math
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler, VQModel
from diffusers import LDMTextToImagePipeline as StockPipeline
from forking import as_stranger
from released_layout import change_json, write_text_ldm
from safetensors.torch import load_file
from tiny_models import tiny_kl, tiny_unet, tiny_vq
from tiny_text import tiny_bert, tiny_ldm_bert, tiny_tokenizer

from noisycond.pipelines import (
    ClassEmbedder,
    LDMClassToImagePipeline,
    LDMTextToImagePipeline,
    get_guidance_scale_embedding,
    ldm_class_to_image,
    ldm_text_to_image,
)


pytestmark = pytest.mark.usefixtures("one_thread")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
PROMPTS = ["a red cat", "the big dog on a house", "five small cat"]


def make(kind=LDMTextToImagePipeline, bert=None, vqvae=None, **unet):
    """A tiny pipeline: latents 3×8×8, images of 16×16 where the first stage is not another."""
    torch.manual_seed(0)
    parts = {
        "unet": tiny_unet(**unet).eval(),
        "bert": bert or tiny_bert(),
        "tokenizer": tiny_tokenizer(),
        "vqvae": vqvae or tiny_vq(scaling_factor=1.5).eval(),
        "scheduler": DDIMScheduler(**BETAS, clip_sample=False),
    }
    with torch.no_grad():  # untrained, a U-Net hardly listens
        for name, parameter in parts["unet"].named_parameters():
            if "attn2" in name or "cond_proj" in name:
                parameter *= 4
    return quiet(kind(**parts))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt=PROMPTS, seed: int = 5, **options):
    defaults = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 2.25}
    return pipeline(prompt, **{**defaults, "generator": torch.manual_seed(seed), **options}).images


@pytest.fixture(scope="module")
def pipeline():
    return make()


# Against diffusers' own class


@pytest.mark.parametrize("encoder", [tiny_bert, tiny_ldm_bert])
@pytest.mark.parametrize("first_stage", ["vq", "kl"])
def test_of_factor_8_the_images_are_those_of_diffusers(encoder, first_stage):
    torch.manual_seed(1)
    vqvae = tiny_vq(levels=4) if first_stage == "vq" else tiny_kl(3, levels=4)
    ours = make(bert=encoder(), vqvae=vqvae.eval())
    stock = quiet(StockPipeline(**ours.components))
    latents = torch.randn((3, 3, 8, 8), generator=torch.manual_seed(5))
    for scale in (1.0, 4.0, 0.0):
        wanted = draw(stock, guidance_scale=scale, latents=latents)
        found = draw(ours, guidance_scale=scale, latents=latents)
        assert wanted.shape == (3, 64, 64, 3) and np.array_equal(found, wanted), scale
    assert np.abs(draw(ours) - draw(ours, guidance_scale=1.0)).max() > 1e-3
    # From a generator, of another size, as pictures and as tensors, in a tuple.
    sizes = {"height": 32, "width": 96}
    for options in ({}, sizes, {"output_type": "pt"}, {"output_type": "pil"}):
        found, wanted = draw(ours, **options), draw(stock, **options)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found, wanted, strict=True))
    (alone,) = ours("a cat", num_inference_steps=1, output_type="np", return_dict=False, latents=latents[:1])
    (stock_alone,) = stock("a cat", num_inference_steps=1, output_type="np", return_dict=False, latents=latents[:1])
    assert np.array_equal(alone, stock_alone)


def test_of_factor_4_the_images_are_of_full_size():
    """Where diffusers' class draws half the side, and refuses latents of the U-Net's size."""
    torch.manual_seed(1)
    ours = make(vqvae=tiny_vq(levels=3).eval())
    stock = quiet(StockPipeline(**ours.components))
    assert draw(ours).shape == (3, 32, 32, 3) and draw(stock).shape == (3, 16, 16, 3)
    latents = torch.randn((3, 3, 8, 8), generator=torch.manual_seed(5))
    assert np.array_equal(draw(ours, latents=latents, generator=None), draw(ours))
    with pytest.raises(ValueError, match="Unexpected latents shape"):
        draw(stock, latents=latents)
    assert draw(ours, height=16, width=64).shape == (3, 16, 64, 3)


def test_the_call_is_that_of_diffusers():
    ours = list(inspect.signature(LDMTextToImagePipeline.__call__).parameters.values())
    theirs = list(inspect.signature(StockPipeline.__call__).parameters.values())[:-1]  # without **kwargs
    assert [parameter.name for parameter in ours[: len(theirs)]] == [parameter.name for parameter in theirs]
    assert [parameter.default for parameter in ours[2 : len(theirs)]] == [each.default for each in theirs[2:]]
    known = inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters
    assert {parameter.name for parameter in ours} <= known.keys()
    parts = [list(inspect.signature(kind.__init__).parameters) for kind in (LDMTextToImagePipeline, StockPipeline)]
    assert parts[0] == parts[1]


# Prompts


def test_prompts_are_padded_and_read_without_a_mask(pipeline):
    tokens = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        found = pipeline.encode_prompt(PROMPTS)
        assert torch.equal(found, pipeline.bert(tokens.input_ids)[0]) and found.shape == (3, 77, 12)
        masked = pipeline.bert(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        assert (found - masked).abs().max() > 1e-2
        assert torch.equal(pipeline.encode_prompt("a cat"), pipeline.encode_prompt(["a cat"]))
        assert pipeline.encode_prompt("red " * 200).shape == (1, 77, 12)


def test_of_a_shorter_encoder_or_tokenizer_prompts_are_shorter(pipeline):
    short = make(bert=tiny_bert(positions=20))
    assert short.encode_prompt("").shape == (1, 20, 12) and draw(short).shape == (3, 16, 16, 3)
    parts = {**pipeline.components, "tokenizer": tiny_tokenizer(model_max_length=9)}
    assert LDMTextToImagePipeline(**parts).encode_prompt("red " * 20).shape == (1, 9, 12)


def test_embeddings_stand_for_prompts(pipeline):
    embeds, none = pipeline.encode_prompt(PROMPTS), pipeline.encode_prompt([""] * 3)
    wanted = draw(pipeline)
    assert np.array_equal(draw(pipeline, None, prompt_embeds=embeds), wanted)
    assert np.array_equal(draw(pipeline, None, prompt_embeds=embeds, negative_prompt_embeds=none), wanted)
    without = quiet(LDMTextToImagePipeline(**{**pipeline.components, "bert": None, "tokenizer": None}))
    assert np.array_equal(draw(without, None, prompt_embeds=embeds, negative_prompt_embeds=none), wanted)
    for options in ({"prompt": PROMPTS}, {"prompt": None, "prompt_embeds": embeds}):
        with pytest.raises(ValueError, match="no text encoder"):
            draw(without, **options)


def test_negative_prompts(pipeline):
    wanted = draw(pipeline)
    assert np.array_equal(draw(pipeline, negative_prompt=""), wanted)
    found = draw(pipeline, negative_prompt="a dog")
    assert np.abs(found - wanted).max() > 1e-3
    assert np.array_equal(draw(pipeline, negative_prompt=["a dog"] * 3), found)
    # Guided away from the prompt itself, nothing is left of guidance.
    unguided = draw(pipeline, guidance_scale=1.0)
    assert np.abs(draw(pipeline, negative_prompt=PROMPTS) - unguided).max() < 1e-4


def test_several_images_per_prompt(pipeline):
    twice = [prompt for prompt in PROMPTS for _ in range(2)]
    # Encoded in another batch, hence not to the last bit.
    assert np.abs(draw(pipeline, num_images_per_prompt=2) - draw(pipeline, twice)).max() < 1e-4
    assert draw(pipeline, "a cat", num_images_per_prompt=3, guidance_scale=1.0).shape == (3, 16, 16, 3)


def test_a_batch_equals_its_images_drawn_alone(pipeline):
    def generator(number):
        return torch.Generator().manual_seed(number)

    batch = draw(pipeline, generator=[generator(n) for n in range(3)], eta=0.5)
    alone = [draw(pipeline, [text], generator=[generator(n)], eta=0.5)[0] for n, text in enumerate(PROMPTS)]
    assert np.abs(batch - np.stack(alone)).max() < 1e-4 and np.abs(batch[0] - batch[1]).max() > 1e-2


def test_prompts_decide(pipeline):
    latents = torch.randn((1, 3, 8, 8), generator=torch.manual_seed(5))
    first, second, empty = (draw(pipeline, text, latents=latents) for text in ("a cat", "a dog", ""))
    assert min(np.abs(first - second).max(), np.abs(first - empty).max()) > 1e-3
    assert np.abs(empty - draw(pipeline, "", latents=latents, guidance_scale=9.0)).max() < 1e-4


def test_output_types(pipeline):
    latents = draw(pipeline, output_type="latent")
    assert latents.shape == (3, 3, 8, 8)
    decoded = pipeline.vqvae.decode(latents / 1.5).sample.detach()
    arrays = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(arrays - draw(pipeline)).max() < 1e-5


def test_callbacks(pipeline):
    seen = []

    def callback(owner, step, timestep, tensors):
        seen.append((step, tensors["prompt_embeds"].shape[0]))
        if step == 0:
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}  # ends guidance
        owner._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "prompt_embeds"]
    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    assert draw(pipeline, output_type="latent", **options).abs().max() == 0
    assert seen == [(0, 6), (1, 3)] and pipeline.num_timesteps == 3


def test_schedulers_agree_where_they_solve_the_same_equation(pipeline):
    latents = torch.randn((1, 3, 8, 8), generator=torch.manual_seed(5))
    found = {}
    for name in ("DDIM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete"):
        kind = getattr(diffusers, f"{name}Scheduler")
        other = LDMTextToImagePipeline(
            **{**pipeline.components, "scheduler": kind.from_config(pipeline.scheduler.config)}
        )
        found[name] = draw(quiet(other), "a cat", num_inference_steps=60, latents=latents, guidance_scale=1.0)
    spread = {name: np.abs(images - found["DDIM"]).mean() for name, images in found.items()}
    assert max(spread.values()) < 0.05 and max(spread.values()) > 0, spread


BAD = [
    ({"prompt": None}, "Exactly one of `prompt` and `prompt_embeds`"),
    ({"prompt_embeds": torch.zeros(1, 77, 12)}, "Exactly one of"),
    ({"prompt": []}, r"`prompt` is \[\]"),
    ({"prompt": [3]}, r"`prompt` is \[3\].*string"),
    ({"prompt": 7}, "`prompt` is 7"),
    ({"prompt": None, "prompt_embeds": torch.zeros(77, 12)}, r"`prompt_embeds` has the shape \(77, 12\)"),
    ({"negative_prompt": ["a"]}, r"negative prompts.*\(1, 77, 12\).*\(3, 77, 12\)"),
    ({"negative_prompt": "a", "guidance_scale": 1.0}, "no effect, as `guidance_scale` is 1"),
    ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(3, 77, 12)}, "Only one of"),
    ({"output_type": "jpeg"}, "output_type"),
    ({"height": 17}, "height.*multiples of 2"),
    ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents.*\(3, 3, 8, 8\)"),
    ({"generator": [torch.Generator()]}, "list of 1, but 3"),
    ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "prompt"),
]


@pytest.mark.parametrize("options, words", BAD, ids=[words for _, words in BAD])
def test_bad_arguments_are_named(pipeline, options, words):
    with pytest.raises(ValueError, match=words):
        draw(pipeline, **options)


# Places and precisions


def test_offloading(pipeline):
    modules = {name for name, component in pipeline.components.items() if isinstance(component, torch.nn.Module)}
    assert set(pipeline.model_cpu_offload_seq.split("->")) == modules
    other = make()
    for name in modules - set(other._exclude_from_cpu_offload):
        cpu_offload(getattr(other, name), torch.device("cpu"))
    assert other.unet.device.type == other.bert.device.type == "meta"
    assert np.array_equal(draw(other), draw(pipeline))


def test_half_precision():
    other = make().to(torch.bfloat16)
    images = draw(other)
    assert images.dtype == np.float32 and np.abs(images - draw(make())).mean() < 0.1


# Folders


@pytest.fixture(scope="module", params=["BertModel", "LDMBertModel"])
def released(request, tmp_path_factory):
    return write_text_ldm(tmp_path_factory.mktemp("released") / request.param, request.param)


@pytest.fixture
def folder(tmp_path):
    """One that a test may damage."""
    return write_text_ldm(tmp_path / "source")


def test_a_released_folder_gives_full_size(released, caplog):
    ours = quiet(LDMTextToImagePipeline.from_pretrained(released))
    stock = quiet(DiffusionPipeline.from_pretrained(released))
    assert type(stock) is StockPipeline and type(ours.bert).__name__ == released.name
    assert draw(ours).shape == (3, 32, 32, 3) and draw(stock).shape == (3, 16, 16, 3)
    assert "scaling factor is 1.0 (as none is stated)" in caplog.text
    assert ours.vqvae.config.scaling_factor == 1.0 and stock.vqvae.config.scaling_factor == 0.18215
    assert len(ours.scheduler.config.trained_betas) == 1000
    latents = draw(ours, output_type="latent")
    decoded = ours.vqvae.decode(latents).sample.detach()
    assert np.abs((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() - draw(ours)).max() < 1e-5


def test_pickled_weights(folder):
    wanted = draw(quiet(LDMTextToImagePipeline.from_pretrained(folder)))
    for file in list(folder.rglob("*.safetensors")):
        name = "pytorch_model.bin" if file.parent.name == "bert" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    assert np.array_equal(draw(quiet(LDMTextToImagePipeline.from_pretrained(folder))), wanted)


# The last is what diffusers fills in: asked for, it is used.
STATED = [(0.5, None, 0.5), (None, 2.0, 2.0), (0.5, 2.0, 2.0), (None, 0.18215, 0.18215)]


@pytest.mark.parametrize("stated, asked, used", STATED)
def test_a_stated_or_asked_scaling_factor_is_used(folder, tmp_path, stated, asked, used):
    change_json(folder / "vqvae/config.json", scaling_factor=stated)
    found = LDMTextToImagePipeline.from_pretrained(folder, scaling_factor=asked)
    assert found.vqvae.config.scaling_factor == used
    found = LDMTextToImagePipeline(**found.components)
    assert found.vqvae.config.scaling_factor == used
    found.save_pretrained(tmp_path / "saved")
    assert LDMTextToImagePipeline.from_pretrained(tmp_path / "saved").vqvae.config.scaling_factor == used


def test_a_model_made_or_changed_here_keeps_its_scaling_factor(folder):
    assert make(vqvae=tiny_vq()).vqvae.config.scaling_factor == 0.18215
    loaded = VQModel.from_pretrained(folder / "vqvae")
    loaded.register_to_config(scaling_factor=0.7)
    assert make(vqvae=loaded).vqvae.config.scaling_factor == 0.7


STRANGER = """
import sys
sys.modules["noisycond"] = None  # importing it fails
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": torch.manual_seed(5), "num_inference_steps": 3, "output_type": "np"}
    return pipeline(["a red cat", "the dog"], guidance_scale=2.25, **options).images
export, released, file, place, out = sys.argv[1:]
pipelines = [DiffusionPipeline.from_pretrained(export, trust_remote_code=True)]
pipelines[0].save_pretrained(out + "/again")
pipelines += [
    DiffusionPipeline.from_pretrained(out + "/again", trust_remote_code=True),
    DiffusionPipeline.from_pretrained(released, custom_pipeline=file, trust_remote_code=True),
    DiffusionPipeline.from_pretrained(released, custom_pipeline=place, trust_remote_code=True),
]
pipelines[3].save_pretrained(out + "/converted")
pipelines += [DiffusionPipeline.from_pretrained(out + "/converted", trust_remote_code=True)]
for number, pipeline in enumerate(pipelines):
    assert type(pipeline).__module__.startswith("diffusers_modules."), type(pipeline)
    numpy.save(f"{out}/{number}.npy", draw(pipeline))
"""


def test_a_stranger_gets_the_same_images(tmp_path):
    """In a process that can import nothing of ours: exports, saved and opened again; a released folder through this
    file, or through a folder that holds it as `pipeline.py`, as on the Hub."""
    original, released = make(), write_text_ldm(tmp_path / "released", "LDMBertModel")
    original.save_pretrained(tmp_path / "export")
    index = (tmp_path / "export/model_index.json").read_text()
    assert '"_class_name": [\n    "ldm_text_to_image",\n    "LDMTextToImagePipeline"\n  ]' in index
    assert list((tmp_path / "export").rglob("*.safetensors")) and not list((tmp_path / "export").rglob("*.bin"))
    file = Path(ldm_text_to_image.__file__)
    (tmp_path / "place").mkdir()
    shutil.copyfile(file, tmp_path / "place/pipeline.py")
    places = [tmp_path / "export", released, file, tmp_path / "place", tmp_path]
    done = as_stranger(STRANGER, *places, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = quiet(LDMTextToImagePipeline.from_pretrained(released))
    wanted = [draw(original, ["a red cat", "the dog"])] * 2 + [draw(ours, ["a red cat", "the dog"])] * 3
    for number, images in enumerate(wanted):
        assert np.array_equal(np.load(tmp_path / f"{number}.npy"), images), number
    for name, source in (("export", original), ("converted", ours)):
        loaded = quiet(LDMTextToImagePipeline.from_pretrained(tmp_path / name))
        assert type(loaded) is LDMTextToImagePipeline and np.array_equal(draw(loaded), draw(source))


def test_one_pipeline_stands_in_the_file():
    kinds = inspect.getmembers(ldm_text_to_image, inspect.isclass)
    own = [kind for _, kind in kinds if issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline]
    assert own == [LDMTextToImagePipeline]


def test_without_a_first_stage_or_an_encoder(folder, tmp_path):
    whole = quiet(LDMTextToImagePipeline.from_pretrained(folder))
    for name in ("vqvae", "bert", "tokenizer"):
        shutil.rmtree(folder / name)
    parts = {"vqvae": None, "bert": None, "tokenizer": None}
    part = quiet(LDMTextToImagePipeline.from_pretrained(folder, **parts))
    options = {"prompt_embeds": whole.encode_prompt("a cat"), "guidance_scale": 1.0, "output_type": "latent"}
    wanted = draw(whole, None, **options)
    assert torch.equal(draw(part, None, **options), wanted)
    with pytest.raises(ValueError, match="no first stage"):
        draw(part, None, **{**options, "output_type": "np"})
    part.save_pretrained(tmp_path / "saved")
    assert torch.equal(draw(LDMTextToImagePipeline.from_pretrained(tmp_path / "saved"), None, **options), wanted)
    given = LDMTextToImagePipeline.from_pretrained(
        tmp_path / "saved", vqvae=whole.vqvae, bert=whole.bert, tokenizer=whole.tokenizer
    )
    assert np.array_equal(draw(given), draw(whole))


def remove(name: str):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def declare(**changes):
    return lambda folder: change_json(folder / "model_index.json", **changes)


MISSING = [
    (remove("model_index.json"), "model_index.json is missing"),
    (lambda folder: (folder / "model_index.json").write_text("{"), "not valid JSON"),
    (declare(bert=None), "declares no text encoder .`bert`; pass bert=None"),
    (declare(unet=[None, None]), "declares no U-Net"),
    (remove("bert"), "text encoder is missing .bert/config.json; pass bert=None"),
    (remove("bert/model.safetensors"), "text encoder's weights are missing"),
    (remove("tokenizer"), "tokenizer is missing"),
    (remove("unet/config.json"), "U-Net is missing .unet/config.json"),
    (remove("scheduler"), "scheduler is missing .scheduler/scheduler_config.json"),
    (remove("vqvae/diffusion_pytorch_model.safetensors"), "first stage's weights are missing"),
    (lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 9), "cannot open it"),
    (lambda folder: truncate(folder / "bert/model.safetensors"), "cannot open it .*incomplete metadata"),
    (
        lambda folder: tiny_bert(hidden_size=16).save_pretrained(folder / "bert"),
        r"attends to embeddings of 12 numbers.*text encoder \(`bert`\) have 16",
    ),
]


@pytest.mark.parametrize("damage, words", MISSING, ids=[words for _, words in MISSING])
def test_a_missing_piece_is_named(folder, damage, words):
    damage(folder)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        LDMTextToImagePipeline.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="embeddings of 20 numbers.*have 12"):
        make(cross_attention_dim=20)
    with pytest.raises(ValueError, match="embeddings of 12 and 20 numbers.*have 12"):
        make(cross_attention_dim=(12, 20))


def test_a_name_that_is_nowhere():
    with pytest.raises(OSError, match="nobody/nothing: neither a folder nor a Hub id"):
        LDMTextToImagePipeline.from_pretrained("nobody/nothing")


def test_no_code_of_the_folder_is_run(folder):
    for name in ("latent_diffusion", "ldm_text_to_image", "pipeline"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of the folder was run')")
    declare(_class_name=["ldm_text_to_image", "LDMTextToImagePipeline"])(folder)
    draw(quiet(LDMTextToImagePipeline.from_pretrained(folder)))


# Latent consistency models


@pytest.mark.parametrize("dim", [6, 9, 256])
def test_the_guidance_embedding_is_that_of_diffusers(dim):
    w = torch.tensor([0.0, 0.5, 1.25, 7.5, 14.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dim)
    assert torch.equal(get_guidance_scale_embedding(w, dim), theirs) and theirs.shape == (5, dim)
    # In the numbers of the formula, in double precision.
    half = dim // 2
    i, k = 2, 1
    frequency = 10000 ** (-k / (half - 1))
    assert abs(theirs[i, k] - math.sin(1000 * 1.25 * frequency)) < 1e-3
    assert abs(theirs[i, half + k] - math.cos(1000 * 1.25 * frequency)) < 1e-3


def lcm(kind, **options):
    """A pipeline of random weights whose U-Net gets the guidance scale, with the latent consistency scheduler."""
    pipeline = make(vqvae=tiny_kl(3).eval(), time_cond_proj_dim=32)
    scheduler = LCMScheduler(**BETAS, clip_sample=False)
    if kind is LDMClassToImagePipeline:
        embedder = ClassEmbedder(10, 12).eval()
        return quiet(kind(pipeline.unet, embedder, scheduler, pipeline.vqvae))
    return quiet(kind(**{**pipeline.components, "scheduler": scheduler}))


def test_images_are_those_of_diffusers_lcm_pipeline():
    """Given the same embeddings; its own scaling of the guidance scale and noise of every step included."""
    ours = lcm(LDMTextToImagePipeline)
    parts = {"vae": ours.vqvae, "text_encoder": ours.bert, "tokenizer": ours.tokenizer, "unet": ours.unet}
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs = quiet(LatentConsistencyModelPipeline(**parts, scheduler=ours.scheduler, **options))
    embeds = ours.encode_prompt(PROMPTS).detach()
    for scale in (8.5, 1.0):
        generators = ([torch.Generator().manual_seed(number) for number in range(3)] for _ in range(2))
        options = {"prompt_embeds": embeds, "num_inference_steps": 4, "guidance_scale": scale}
        options |= {"output_type": "latent"}
        found, wanted = (draw(each, None, generator=next(generators), **options) for each in (ours, theirs))
        assert found.std() > 1e-2 and torch.equal(found, wanted), scale
    # Decoded the same but for the order of a product.
    options |= {"output_type": "np", "generator": None, "latents": found, "num_inference_steps": 1}
    assert np.abs(draw(ours, None, **options) - draw(theirs, None, **options)).max() < 1e-5


@pytest.mark.parametrize("kind, condition", [(LDMTextToImagePipeline, PROMPTS), (LDMClassToImagePipeline, [3, 9, 0])])
def test_a_guidance_embedding_takes_one_pass(kind, condition):
    pipeline, seen = lcm(kind), []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, inputs, options: seen.append((len(inputs[0]), options["timestep_cond"])), with_kwargs=True
    )
    plain = draw(pipeline, condition, guidance_scale=1.0)
    guided = draw(pipeline, condition, guidance_scale=7.5)
    hook.remove()
    assert [count for count, _ in seen] == [3] * 6 and not pipeline.do_classifier_free_guidance
    for number, scale in ((0, 1.0), (3, 7.5)):
        wanted = get_guidance_scale_embedding(torch.full((3,), scale - 1.0), 32)
        assert torch.equal(seen[number][1], wanted)
    assert np.abs(plain - guided).max() > 1e-3

    def change(owner, step, timestep, tensors):
        owner._guidance_scale = 7.5

    # All steps but the first are guided by the new scale.
    changed = draw(pipeline, condition, guidance_scale=1.0, callback_on_step_end=change)
    assert min(np.abs(changed - plain).max(), np.abs(changed - guided).max()) > 1e-3
    generators = [torch.Generator().manual_seed(number) for number in range(3)]
    alone = draw(pipeline, condition[:1], generator=generators[0])
    generators[0].manual_seed(0)
    assert np.abs(draw(pipeline, condition, generator=generators)[0] - alone[0]).max() < 1e-4


@pytest.mark.parametrize("kind, condition", [(LDMTextToImagePipeline, PROMPTS), (LDMClassToImagePipeline, [3, 9, 0])])
def test_a_latent_consistency_model_is_saved_and_loaded(kind, condition, tmp_path):
    pipeline = lcm(kind)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(kind.from_pretrained(tmp_path))
    assert type(loaded.scheduler) is LCMScheduler and loaded.unet.config.time_cond_proj_dim == 32
    assert np.array_equal(draw(loaded, condition), draw(pipeline, condition))


@pytest.mark.parametrize("kind, condition", [(LDMTextToImagePipeline, PROMPTS), (LDMClassToImagePipeline, [3, 9, 0])])
def test_more_steps_than_the_distillation_had_are_refused(kind, condition):
    with pytest.raises(ValueError, match="num_inference_steps"):
        draw(lcm(kind), condition, num_inference_steps=51)


def test_the_lcm_scheduler_without_a_guidance_embedding(pipeline):
    """As with consistency weights in a LoRA: guidance takes two passes, as ever."""
    scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    other = quiet(LDMTextToImagePipeline(**{**pipeline.components, "scheduler": scheduler}))
    first, again, unguided = draw(other), draw(other), draw(other, guidance_scale=1.0)
    assert np.array_equal(first, again) and np.abs(first - unguided).max() > 1e-3


def test_a_negative_prompt_has_no_effect_on_a_guidance_embedding():
    with pytest.raises(ValueError, match="no effect, as this U-Net is guided by an embedding"):
        draw(lcm(LDMTextToImagePipeline), negative_prompt="a dog")


# What both files must hold to stand alone


@pytest.mark.parametrize("name", ["get_guidance_scale_embedding", "_read_json"])
def test_twin_functions_are_the_same(name):
    sources = {inspect.getsource(getattr(module, name)) for module in (ldm_class_to_image, ldm_text_to_image)}
    assert len(sources) == 1


TWINS = ("guidance_scale", "do_classifier_free_guidance", "num_timesteps", "interrupt", "_sample_size")
TWINS += ("_denoise", "_embed_guidance", "_prepare_latents", "_decode")


@pytest.mark.parametrize("name", TWINS)
def test_twin_methods_are_the_same(name):
    members = [inspect.getattr_static(kind, name) for kind in (LDMClassToImagePipeline, LDMTextToImagePipeline)]
    sources = {inspect.getsource(member.fget if isinstance(member, property) else member) for member in members}
    assert len(sources) == 1
