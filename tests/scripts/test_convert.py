"""python -m noisycond.convert: released folders and original weights become folders that load elsewhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline
from forking import as_stranger
from original_models import OriginalAutoencoder, OriginalDiT, OriginalUNet, ldm_state, shaken
from released_layout import change_json, write_dit, write_json, write_ldm, write_text_ldm

import noisycond.convert  # noqa: F401
from noisycond.denoisers import build_denoiser, find_denoiser
from noisycond.errors import InputError
from noisycond.pipelines import LDMClassToImagePipeline, LDMTextToImagePipeline, OriginalDiTPipeline


pytestmark = pytest.mark.usefixtures("one_thread")
CONVERT = "noisycond.convert"
STRANGER = """
import sys
sys.modules["noisycond"] = None  # importing it fails
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for name in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": torch.manual_seed(5), "num_inference_steps": 3, "output_type": "np"}
    numpy.save(name + ".npy", pipeline([3, 9, 0], **options).images)
    pipeline.save_pretrained(name + "-again")
    DiffusionPipeline.from_pretrained(name + "-again", trust_remote_code=True)
"""


def draw(pipeline, prompt=(3, 9, 0), **options) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": torch.manual_seed(5), "num_inference_steps": 3, "output_type": "np"} | options
    return pipeline(list(prompt), **options).images


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One of each kind."""
    folder = tmp_path_factory.mktemp("sources")
    write_ldm(folder / "ldm", embedder="cond_stage_model")
    write_text_ldm(folder / "text")
    write_dit(folder / "dit")
    write_dit(folder / "dit10", classes=10)
    unet, first_stage = shaken(OriginalUNet(blocks=1)), shaken(OriginalAutoencoder())
    state = ldm_state(unet, first_stage, torch.randn(11, 24, generator=torch.manual_seed(0)))
    torch.save({"state_dict": state, "epoch": 3}, folder / "ldm.ckpt")
    torch.save({"ema": shaken(OriginalDiT(heads=4)).state_dict()}, folder / "dit.pt")
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                  down_block_types=("DownEncoderBlock2D",) * 2,
                  up_block_types=("UpDecoderBlock2D",) * 2).save_pretrained(folder / "vae")  # fmt: skip
    write_json(folder / "names.json", {str(label): f"class {label}" for label in range(10)})
    return folder


def test_a_stranger_opens_what_was_converted(sources, script, tmp_path):
    """In a process that can import nothing of ours: the images of the source, and it can be saved and opened again."""
    script(CONVERT, sources / "ldm", tmp_path / "ldm", "--id2label", sources / "names.json")
    script(CONVERT, sources / "ldm.ckpt", tmp_path / "ckpt", "--resolution", 32)
    script(CONVERT, sources / "dit.pt", tmp_path / "pt", "--attention_heads", 4, "--first_stage", sources / "vae")
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.tmp"))
    names = [str(tmp_path / name) for name in ("ldm", "ckpt", "pt")]
    done = as_stranger(STRANGER, *names, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    source = LDMClassToImagePipeline.from_pretrained(sources / "ldm")
    source.scheduler.register_to_config(clip_sample=False)
    assert np.abs(np.load(f"{names[0]}.npy") - draw(source)).max() < 1e-5
    for name, kind in ((names[1], LDMClassToImagePipeline), (names[2], OriginalDiTPipeline)):
        assert np.array_equal(np.load(f"{name}.npy"), draw(kind.from_pretrained(name)))
    written = "".join(path.read_text() for name in names for path in Path(name).rglob("*.json"))
    assert str(sources) not in written and str(tmp_path) not in written
    index = json.loads((tmp_path / "ldm/model_index.json").read_text())
    assert index["id2label"]["7"] == "class 7" and index["class_embedder"][1] == "ClassEmbedder"
    scheduler = json.loads((tmp_path / "ldm/scheduler/scheduler_config.json").read_text())
    assert scheduler["beta_schedule"] == "scaled_linear" and not scheduler.get("trained_betas")
    assert scheduler["clip_sample"] is False
    assert json.loads((tmp_path / "ldm/vqvae/config.json").read_text())["scaling_factor"] == 1.0


@torch.no_grad()
def test_an_original_dit_predicts_the_same_through_its_folder(sources, script, tmp_path):
    words = ["--attention_heads", 4, "--first_stage", sources / "vae", "--scaling_factor", 0.3]
    script(CONVERT, sources / "dit.pt", tmp_path / "x", *words)
    pipeline = OriginalDiTPipeline.from_pretrained(tmp_path / "x")
    original = OriginalDiT()
    original.load_state_dict(torch.load(sources / "dit.pt")["ema"])
    noisy, timesteps, labels = torch.randn(2, 4, 8, 8), torch.tensor([999, 430]), torch.tensor([9, 10])
    found = pipeline.transformer(noisy, timestep=timesteps, class_labels=torch.tensor([9, 1000])).sample
    assert (found - original(noisy, timesteps, labels)).abs().max() < 1e-5
    assert pipeline.vae.config.scaling_factor == 0.3
    script(CONVERT, sources / "dit.pt", tmp_path / "stock", *words, "--stock")
    with pytest.raises(InputError, match="--denoiser .*convert the weights anew with --stock"):
        find_denoiser(str(tmp_path / "x"))
    names = [str(label) for label in range(10)]
    build_denoiser(find_denoiser(str(tmp_path / "stock")), class_names=names, latent_channels=4, latent_size=8)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    assert type(stock) is DiTPipeline and not list((tmp_path / "stock").rglob("*.py"))
    assert np.abs(draw(stock) - draw(pipeline)).max() > 1e-3


def test_a_dit_of_few_classes_guides_afterwards(sources, script, tmp_path, caplog):
    before = DiTPipeline.from_pretrained(sources / "dit10")
    with pytest.raises(IndexError):
        draw(before)
    script(CONVERT, sources / "dit10", tmp_path / "x", "--id2label", sources / "names.json")
    assert "fails when it guides" in caplog.text and "tables of 11 rows" in caplog.text
    after = DiTPipeline.from_pretrained(tmp_path / "x")
    before.scheduler.register_to_config(clip_sample=False)
    assert np.array_equal(draw(after, guidance_scale=1.0), draw(before, guidance_scale=1.0))
    for old, new in zip(before.transformer.transformer_blocks, after.transformer.transformer_blocks, strict=True):
        old, new = (block.norm1.emb.class_embedder.embedding_table.weight for block in (old, new))
        assert torch.equal(new[:11], old) and (new[10:] == old[10]).all() and len(new) == 1001
    assert draw(after).std() > 0.01 and after.get_label_ids(["class 3"]) == [3]


def test_a_dit_in_the_stock_layout_passes_through(sources, script, tmp_path, caplog):
    script(CONVERT, sources / "dit", tmp_path / "x")
    assert "opens and guides" in caplog.text and "clips x_0" in caplog.text
    before, after = DiTPipeline.from_pretrained(sources / "dit"), DiTPipeline.from_pretrained(tmp_path / "x")
    before.scheduler.register_to_config(clip_sample=False)
    assert np.array_equal(draw(after), draw(before))


def test_a_text_folder_draws_in_full_size_afterwards(sources, script, tmp_path, caplog, capsys):
    script(CONVERT, sources / "text", tmp_path / "x", "--scaling_factor", 0.8)
    assert "images of side 16 instead of 32" in caplog.text
    printed = capsys.readouterr().out
    assert 'prompt="' in printed and "trust_remote_code=True" in printed
    source = LDMTextToImagePipeline.from_pretrained(sources / "text", scaling_factor=0.8)
    source.scheduler.register_to_config(clip_sample=False)
    converted = DiffusionPipeline.from_pretrained(tmp_path / "x", trust_remote_code=True)
    prompts = ["a red cat", "the dog"]
    images = [draw(each, prompt=prompts, guidance_scale=3.0) for each in (source, converted)]
    assert np.abs(images[0] - images[1]).max() < 1e-5 and images[1].shape == (2, 32, 32, 3)
    written = "".join(path.read_text() for path in (tmp_path / "x").rglob("*.json"))
    assert str(sources) not in written and str(tmp_path) not in written
    scheduler = json.loads((tmp_path / "x/scheduler/scheduler_config.json").read_text())
    assert scheduler["beta_schedule"] == "scaled_linear" and not scheduler.get("trained_betas")


def test_a_checkpoint_says_which_weights_it_gives(sources, script, tmp_path, caplog, capsys):
    caplog.set_level("INFO", logger="noisycond")
    script(CONVERT, sources / "dit.pt", tmp_path / "x", "--attention_heads", 4, "--first_stage", sources / "vae")
    assert "an original DiT checkpoint, its entry 'ema'" in caplog.text
    assert "trust_remote_code=True" in capsys.readouterr().out


def test_source_and_output_stand_anywhere(sources, script, tmp_path):
    """Before the flags, after them (also after a switch), between them, or as flags."""
    dit, flags = sources / "dit.pt", ["--attention_heads", 4, "--first_stage", sources / "vae"]
    lines = {
        "first": (dit, "OUT", *flags, "--stock"),
        "last": (*flags, "--stock", dit, "OUT"),
        "value": ("--stock", "true", dit, *flags, "OUT"),
        "flags": (*flags, "--stock", "--source", dit, "--output_dir", "OUT"),
        "mixed": ("--output-dir=OUT", f"--first_stage={sources / 'vae'}", dit, *flags[:2], "--stock"),
    }
    for name, words in lines.items():
        script(CONVERT, *(str(word).replace("OUT", str(tmp_path / name)) for word in words))
        assert type(DiffusionPipeline.from_pretrained(tmp_path / name)) is DiTPipeline
    files = [{path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")} for name in lines]
    assert all(found == files[0] for found in files)


def test_class_names_of_another_editor(sources, script, tmp_path):
    """Lines that end in CR LF, and an empty one."""
    names = [f"class {label}" for label in range(10)]
    (tmp_path / "names.txt").write_bytes("\r\n".join([*names[:5], "", *names[5:], ""]).encode())
    script(CONVERT, sources / "ldm", tmp_path / "x", "--id2label", tmp_path / "names.txt")
    index = json.loads((tmp_path / "x/model_index.json").read_text())
    assert index["id2label"] == {str(label): name for label, name in enumerate(names)}


@pytest.mark.parametrize("flag, words", [("--config", "not valid YAML"), ("--id2label", "cannot be read as JSON")])
def test_small_files_are_read_before_the_weights(refused, tmp_path, flag, words):
    (tmp_path / "huge.ckpt").write_bytes(b"would fail when it is read")
    (tmp_path / "x.json").write_text("{: [")
    assert words in refused(CONVERT, tmp_path / "huge.ckpt", tmp_path / "OUT", flag, tmp_path / "x.json")


def test_a_configuration_is_used(sources, script, tmp_path):
    unet = "{num_heads: 4, image_size: 12}"
    (tmp_path / "x.yaml").write_text(f"model: {{params: {{scale_factor: 0.5, unet_config: {{params: {unet}}}}}}}")
    script(CONVERT, sources / "ldm.ckpt", tmp_path / "x", "--config", tmp_path / "x.yaml")
    pipeline = LDMClassToImagePipeline.from_pretrained(tmp_path / "x")
    assert pipeline.unet.config.attention_head_dim == 4 and pipeline.unet.config.sample_size == 12
    assert pipeline.vqvae.config.scaling_factor == 0.5


def test_another_first_stage(sources, script, refused, tmp_path):
    script(CONVERT, sources / "ldm", tmp_path / "x", "--first_stage", "digits-vq", "--scaling_factor", 0.7)
    config = json.loads((tmp_path / "x/vqvae/config.json").read_text())
    assert config["scaling_factor"] == 0.7 and config["_name_or_path"] == "digits-vq"
    assert json.loads((tmp_path / "x/unet/config.json").read_text())["_name_or_path"] == "ldm"
    sentence = refused(CONVERT, sources / "ldm", tmp_path / "y", "--first_stage", sources / "vae")
    assert f"--first_stage {sources / 'vae'}" in sentence and "4 channels" in sentence and "3." in sentence
    assert "--first_stage nowhere: neither" in refused(
        CONVERT, sources / "ldm", tmp_path / "y", "--first_stage", "nowhere"
    )


CASES = [
    ([], ["SOURCE and OUTPUT_DIR are needed"]),
    (["nowhere", "OUT"], ["SOURCE nowhere", "neither a file nor a folder nor a Hub id"]),
    (["EMPTY", "OUT"], ["has no model_index.json"]),
    (["OTHER", "OUT"], ["a StableDiffusionPipeline", "LDMClassToImagePipeline, LDMTextToImagePipeline, DiTPipeline"]),
    (["ldm", "FULL"], ["OUTPUT_DIR", "is not empty"]),
    (["ldm", "OUT", "--config", "x.yaml"], ["--config x.yaml: there is no such file"]),
    (["ldm", "OUT", "--resolution", "32"], ["--resolution has no effect on a folder of an LDM"]),
    (["dit", "OUT", "--attention_heads", "2"], ["--attention_heads has no effect on a folder of a DiT"]),
    (["ldm.ckpt", "OUT", "--stock"], ["--stock has no effect on an original LDM"]),
    (["dit.pt", "OUT", "--attention_heads", "4"], ["without a first stage", "--first_stage"]),
    (["dit.pt", "OUT", "--first_stage", "vae"], ["2 blocks of width 48", "--attention_heads"]),
    (["text", "OUT", "--id2label", "nine.txt"], ["--id2label has no effect on a folder of a text-to-image LDM"]),
    (["text", "OUT", "--resolution", "32"], ["--resolution has no effect on a folder of a text-to-image LDM"]),
    (["ldm", "OUT", "--scaling_factor", "0"], ["--scaling_factor is 0.0"]),
    (["ldm", "OUT", "--id2label", "vae/config.json"], ["--id2label", "labels 0 to"]),
    (["ldm", "OUT", "--id2label", "nine.txt"], ["nine.txt has 9 names", "10 classes"]),
    (["dit10", "OUT", "--id2label", "nine.txt"], ["nine.txt has 9 names", "10 classes"]),
    (["ldm", "OUT", "--id_to_label", "x"], ["unknown flag --id_to_label", "--id2label"]),
    (["ldm", "OUT", "--id2label", "adapter.pt"], ["adapter.pt: not a text file in UTF-8"]),
    (["ldm", "OUT", "third"], ["unknown flag third"]),
    (["broken.safetensors", "OUT"], ["broken.safetensors: cannot be read as safetensors"]),
    (["adapter.pt", "OUT"], ["adapter.pt", "another architecture", "body.0.weight", "expected"]),
    (["sd.ckpt", "OUT"], ["another condition than classes (cond_stage_model.transformer.*)"]),
]


@pytest.mark.parametrize("words, found", CASES, ids=[" ".join(words) for words, _ in CASES])
def test_bad_input(sources, refused, tmp_path, words, found):
    (tmp_path / "EMPTY").mkdir()
    write_json(tmp_path / "OTHER/model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write_json(tmp_path / "FULL/x.json", {})
    (tmp_path / "nine.txt").write_text("".join(f"class {label}\n" for label in range(9)))
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 20)
    torch.save({"body.0.weight": torch.zeros(1)}, tmp_path / "adapter.pt")
    names = ("model.diffusion_model.out.2.bias", "cond_stage_model.transformer.text_model.x")
    torch.save({"state_dict": {name: torch.zeros(1) for name in names}}, tmp_path / "sd.ckpt")
    places = [tmp_path, sources]
    words = [next((str(place / word) for place in places if (place / word).exists()), word) for word in words]
    words = [str(tmp_path / word) if word == "OUT" else word for word in words]
    sentence = refused(CONVERT, *words)
    assert all(word in sentence for word in found), sentence
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    "kind, piece, found",
    [
        ("ldm", "cond_stage_model", "class embedder's weights are missing"),
        ("ldm", "unet/config.json", "the U-Net is missing"),
        ("ldm", "vqvae", "the first stage is missing"),
        ("text", "bert", "the text encoder is missing"),
        ("dit", "vae", "vae/ is missing"),
        ("dit", "transformer/diffusion_pytorch_model.safetensors", "diffusers cannot open it"),
    ],
)
def test_a_missing_piece_is_named(sources, refused, tmp_path, kind, piece, found):
    folder = shutil.copytree(sources / kind, tmp_path / kind)
    shutil.rmtree(folder / piece) if (folder / piece).is_dir() else (folder / piece).unlink()
    sentence = refused(CONVERT, folder, tmp_path / "out")
    assert f"SOURCE {folder}" in sentence and found in sentence and not (tmp_path / "out").exists()


def test_a_first_stage_may_come_from_elsewhere(sources, script, refused, tmp_path):
    folder = shutil.copytree(sources / "ldm", tmp_path / "ldm")
    change_json(folder / "model_index.json", vqvae=None)
    assert "declares no first stage" in refused(CONVERT, folder, tmp_path / "out")
    script(CONVERT, folder, tmp_path / "out", "--first_stage", "digits-vq")
    assert draw(LDMClassToImagePipeline.from_pretrained(tmp_path / "out")).std() > 0
