"""Pushing to the Hub: the real client against a small Hub on the loopback."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hub_server import HubServer, Repository
from huggingface_hub import HfApi, close_session, constants, hf_api
from launching import launch, load_script
from released_layout import write_ldm, write_text_ldm
from safetensors.torch import load, save

from noisycond import hub as room
from noisycond.cards import class_conditional_card, model_card, public_name
from noisycond.export import export_pipeline
from noisycond.first_stage import SHIPPED, open_first_stage
from noisycond.pipelines import LDMClassToImagePipeline, LDMTextToImagePipeline


TOKEN = "hf_loopbackTestTokenThatNobodyMaySee"
FLAGS = ["--push_to_hub", "--hub_model_id", "someone/digits"]
FILES = {
    "README.md",
    "corruption.json",
    "loss.png",
    "model_index.json",
    "samples/final.png",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
STRANGER = """
import hashlib, sys
sys.modules["noisycond"] = None  # importing it fails
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for place in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(place, trust_remote_code="ldm" in place)
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": torch.manual_seed(5), "num_inference_steps": 2, "output_type": "np"}
    print(type(pipeline).__name__, hashlib.sha256(pipeline([3, 9, 0], **options).images.tobytes()).hexdigest())
"""


@pytest.fixture
def hub():
    with HubServer(TOKEN) as server:
        yield server


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """This process as one that talks to the loopback Hub with the token, which the client learns while imported."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    before = constants.ENDPOINT
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    download = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(before)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
    close_session()
    yield hub
    close_session()


def environment(hub, home: Path, **more) -> dict[str, str]:
    """A new process's: the loopback Hub, a home of its own, no bars for fewer lines."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return kept | ours | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def contents(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_push_cut_off_half_way_is_tried_again_and_loads(hub, here, tiny, tmp_path):
    hub.cut_upload = 2
    words = [*tiny, *FLAGS, "--hub_private_repo", "--train_batch_size", "4", "--corruption_ratio", "0.25"]
    user = environment(hub, tmp_path / "home", HF_TOKEN=TOKEN)
    done = launch("train_class_cond", *words, processes=2, env=user)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1, done.stderr[-3000:]
    assert "someone/digits" in errors[0] and "Error" in errors[0] and "is complete" in errors[0]
    assert "sesame" not in errors[0]  # the signature in the upload's address
    assert hub.count("POST /api/repos/create") == 1  # one of the two processes pushed
    assert hub.count("POST /api/models/someone/digits/commit") == 0 and len(hub.blobs) == 1
    assert hub.repositories["someone/digits"].private

    folder = tmp_path / "run"
    local = contents(folder)
    assert local.keys() > FILES and not list(folder.glob(".*"))

    hub.cut_upload, puts = None, hub.count("PUT")
    command = errors[0].split("with: ")[1]
    again = subprocess.run(shlex.split(command), capture_output=True, text=True, cwd=tmp_path, env=user)
    assert again.returncode == 0, again.stderr
    assert hub.count("PUT") == puts + 1  # what had arrived is not sent again
    remote = hub.repositories["someone/digits"]
    assert remote.private and remote.files.keys() == FILES and len(remote.large) == 2
    assert all(hashlib.sha256(data).hexdigest() == local[path] for path, data in remote.files.items())
    assert contents(folder) == local

    card = remote.files["README.md"].decode()
    assert 'from_pretrained("someone/digits")' in card and "![samples](samples/final.png)" in card
    for words in (
        "license: apache-2.0",
        "- diffusers:DiTPipeline",
        "| recipe | digits_dit_mini |",
        "γ = 1.0, uniform",
    ):
        assert words in card
    counts = json.loads((folder / "corruption.json").read_text())
    assert "| corruption | ratio 0.25, symmetric, fixed |" in card
    assert f"| realized corruption ratio | {counts['realized_ratio']:.4f} |" in card
    assert str(tmp_path) not in card

    stranger = environment(hub, tmp_path / "other_home", HF_TOKEN=TOKEN, PYTHONPATH="")
    ldm = push_ldm(tmp_path / "ldm")
    command = [sys.executable, "-c", STRANGER, "someone/digits", str(folder), "someone/ldm", str(ldm)]
    loaded = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=stranger)
    assert loaded.returncode == 0, loaded.stderr
    from_hub, from_folder, ldm_from_hub, ldm_from_folder = loaded.stdout.splitlines()
    assert from_hub == from_folder and from_hub.startswith("DiTPipeline ")
    assert ldm_from_hub == ldm_from_folder and ldm_from_hub.startswith("LDMClassToImagePipeline ")

    for text in (done.stdout, done.stderr, again.stdout, again.stderr, hub.received.decode("latin-1")):
        assert TOKEN not in text
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def push_ldm(folder: Path) -> Path:
    """A small LDM with weights of its own, exported and pushed as someone/ldm; returns the export."""
    pipeline = LDMClassToImagePipeline.from_pretrained(write_ldm(folder / "source"))
    export_pipeline(pipeline, folder / "export", [f"class {label}" for label in range(10)])
    room.push(folder / "export", "someone/ldm", private=False)
    return folder / "export"


@pytest.mark.usefixtures("one_thread")
def test_of_an_ldm_on_the_hub_one_set_of_weights_is_fetched(here, tmp_path, monkeypatch):
    folder = push_ldm(tmp_path)
    files = here.repositories["someone/ldm"].files
    assert {"ldm_class_to_image.py", "class_embedder/ldm_class_to_image.py"} <= files.keys()
    stem = "diffusion_pytorch_model"
    for name in ("unet", "vqvae", "class_embedder"):
        weights = files[f"{name}/{stem}.safetensors"]
        files[f"{name}/{stem}.fp16.safetensors"] = weights if name != "unet" else _halved(weights)
        files |= {f"{name}/{stem}.bin": b"no pickle", f"{name}/{stem}.fp16.bin": b"no pickle"}

    def draw(place, **options):
        pipeline = LDMClassToImagePipeline.from_pretrained(place, **options)
        pipeline.set_progress_bar_config(disable=True)
        options = {"generator": torch.manual_seed(5), "num_inference_steps": 2, "output_type": "np"}
        return pipeline([3, 9, 0], **options).images

    def fetched() -> set[str]:
        found = (re.fullmatch(r"GET .*/resolve/.*/(.*\.(safetensors|bin))", line) for line in here.requests)
        return {line[1] for line in found if line}

    cache = {"cache_dir": tmp_path / "cache"}
    wanted = draw(folder)
    assert np.array_equal(draw("someone/ldm", **cache), wanted)
    assert fetched() == {f"{stem}.safetensors"}
    requests = len(here.requests)
    assert np.array_equal(draw("someone/ldm", local_files_only=True, **cache), wanted)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert np.array_equal(draw("someone/ldm", **cache), wanted) and len(here.requests) == requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    here.requests.clear()
    assert not np.array_equal(draw("someone/ldm", variant="fp16", cache_dir=tmp_path / "another"), wanted)
    assert fetched() == {f"{stem}.fp16.safetensors"}


@pytest.mark.usefixtures("one_thread")
def test_a_text_ldm_is_opened_from_the_hub(here, tmp_path, monkeypatch):
    """By our class, which runs nothing of the repository, and by diffusers, which runs the file in it."""
    monkeypatch.setattr(hf_api.api, "endpoint", here.url)  # the client that diffusers asks, made on import
    LDMTextToImagePipeline.from_pretrained(write_text_ldm(tmp_path / "source")).save_pretrained(tmp_path / "export")
    room.push(tmp_path / "export", "someone/text-ldm", private=False)
    files = here.repositories["someone/text-ldm"].files
    files["bert/model.fp16.safetensors"] = b"no weights"
    options = {"cache_dir": tmp_path / "cache"}

    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"generator": torch.manual_seed(5), "num_inference_steps": 2, "output_type": "np"}
        return pipeline(["a red cat"], guidance_scale=2.25, **settings).images

    wanted = draw(LDMTextToImagePipeline.from_pretrained(tmp_path / "export"))
    assert wanted.shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained("someone/text-ldm", **options)
    loaded = DiffusionPipeline.from_pretrained("someone/text-ldm", trust_remote_code=True, **options)
    assert type(loaded).__module__.startswith("diffusers_modules.") and np.array_equal(draw(loaded), wanted)
    files["ldm_text_to_image.py"] = b"raise SystemExit('code of the repository was run')"
    options = {"cache_dir": tmp_path / "another"}
    ours = LDMTextToImagePipeline.from_pretrained("someone/text-ldm", **options)
    assert type(ours) is LDMTextToImagePipeline and np.array_equal(draw(ours), wanted)
    again = LDMTextToImagePipeline.from_pretrained("someone/text-ldm", local_files_only=True, **options)
    assert np.array_equal(draw(again), wanted)
    assert not any("fp16" in line for line in here.requests if line.startswith("GET"))


def _halved(weights: bytes) -> bytes:
    return save({name: tensor / 2 for name, tensor in load(weights).items()})


def test_a_finished_run_is_resumed_to_push_it(here, script, tiny, tmp_path, capsys):
    script("train_class_cond", *tiny, "--report_to", "tensorboard")
    assert not here.requests
    (tmp_path / "run/notes.txt").write_text("mine")
    script("train_class_cond", *tiny, "--resume_from_checkpoint", "latest", "--push_to_hub")
    remote = here.repositories["someone/run"]  # the user of the token, the name of the folder
    assert remote.files.keys() == FILES and not remote.private and len(remote.commits) == 1
    assert 'from_pretrained("someone/run")' in remote.files["README.md"].decode()
    said = capsys.readouterr()
    assert f"Pushed to {here.url}/someone/run" in said.out and TOKEN not in said.out + said.err
    assert json.loads((tmp_path / "run/run.json").read_text())["arguments"]["push_to_hub"] is True
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_an_autoencoder_is_pushed(here, script, tmp_path):
    words = ["--output_dir", tmp_path / "kl", "--max_train_steps", "2", "--max_train_samples", "16"]
    words += ["--report_to", "none", "--block_out_channels", "8", "8", "8", "--train_batch_size", "4"]
    script("train_autoencoder", *words, *FLAGS[:1], "--hub_model_id", "first-stage")
    remote = here.repositories["someone/first-stage"].files
    weights = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert remote.keys() == weights | {"README.md", "loss.png", "reconstruction.json", "samples/final.png"}
    card = remote["README.md"].decode()
    assert 'AutoencoderKL.from_pretrained("someone/first-stage")' in card and "| PSNR | " in card


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hub_model_id", "someone/digits"], ["--hub_model_id has no effect", "--push_to_hub"]),
        (["--hub_private_repo"], ["--hub_private_repo has no effect", "--push_to_hub"]),
        (
            ["--push_to_hub", "--hub_model_id", "https://huggingface.co/a/b"],
            ["--hub_model_id is 'https", "user/model"],
        ),
        (["--push_to_hub", "--hub_model_id", "a/b/c"], ["--hub_model_id is 'a/b/c'", "user/model"]),
        (["--push_to_hub", "--hub_model_id", "a model"], ["--hub_model_id is 'a model'", "user/model"]),
        (["--push_to_hub", "--output_dir", "a run"], ["--hub_model_id is needed", "'a run'"]),
        (["--push_to_hub", "--hub_token", TOKEN], ["--hub_token", "HF_TOKEN", "hf auth login"]),
        (["--push_to_hub", f"--hub-token={TOKEN}"], ["--hub-token", "HF_TOKEN", "hf auth login"]),
        ([*FLAGS, "--hub_private_repo"], ["--hub_private_repo", "someone/digits", "public"]),
        (["--push_to_hub", "--output_dir", "digits", "--hub_private_repo"], ["--hub_private_repo: someone/digits"]),
    ],
)
def test_refused_before_any_work(here, refused, tiny, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    here.repositories["someone/digits"] = Repository()
    before = contents(tmp_path)
    sentence = refused("train_class_cond", *tiny, *flags)
    assert all(word in sentence for word in words) and TOKEN not in sentence
    assert contents(tmp_path) == before and here.count("POST") == 0


@pytest.mark.parametrize("script_name", ["train_class_cond", "train_autoencoder"])
def test_no_token(here, refused, tmp_path, monkeypatch, script_name):
    monkeypatch.delenv("HF_TOKEN")
    sentence = refused(script_name, "--output_dir", tmp_path / "run", "--max_train_steps", "1", *FLAGS)
    assert "--push_to_hub needs a token" in sentence and "hf auth login" in sentence
    assert not (tmp_path / "run").exists() and not here.requests


def test_a_token_that_the_hub_rejects(here, refused, tiny, tmp_path, monkeypatch):
    wrong = "hf_anotherTokenThatNobodyMaySee"
    monkeypatch.setenv("HF_TOKEN", wrong)
    here.echo_token = True
    sentence = refused("train_class_cond", *tiny, *FLAGS)
    assert "--push_to_hub: the Hub rejects the token" in sentence and "HF_TOKEN" in sentence
    assert wrong not in sentence and not (tmp_path / "run").exists()


def test_a_token_that_can_only_read(here, refused, tiny, tmp_path):
    here.role = "read"
    assert "can read only" in refused("train_class_cond", *tiny, *FLAGS)
    assert not (tmp_path / "run").exists()


def test_offline_mode(here, refused, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("train_class_cond", *tiny, *FLAGS)
    assert not (tmp_path / "run").exists()


def test_a_token_of_somebody_else_is_warned_of(here, tmp_path, caplog):
    args = load_arguments(tmp_path, "--hub_model_id", "another/digits")
    assert room.check(args) == "another/digits"
    assert "the token is that of someone" in caplog.text
    caplog.clear()
    for name in ("someone/digits", "a-lab/digits"):
        assert room.check(load_arguments(tmp_path, "--hub_model_id", name)) == name
    assert not caplog.text


def test_a_hub_out_of_reach_is_a_warning_before_and_a_sentence_after(
    here, refused, tiny, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    sentence = refused("train_class_cond", *tiny, "--push_to_hub", "--hub_model_id", "digits")
    assert "write user/digits" in sentence and not (tmp_path / "run").exists()
    caplog.clear()
    sentence = refused("train_class_cond", *tiny, *FLAGS)
    assert "the Hub cannot be reached now" in caplog.text
    assert "push to someone/digits failed: ConnectError" in sentence
    assert f"hf upload someone/digits {tmp_path / 'run'} . --include=model_index.json" in sentence
    assert contents(tmp_path / "run").keys() > FILES


def test_an_error_that_names_the_token_is_printed_without_it(here, tmp_path, capsys):
    here.token, here.echo_token = "another", True  # withdrawn while the model was trained
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Bearer \\[token\\]") as failure:
        room.push(tmp_path, "someone/digits", private=False)
    assert TOKEN not in str(failure.value) and failure.value.__cause__ is None


def test_ctrl_c_says_how_to_go_on(here, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "upload_folder", interrupted)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="interrupted.*hf upload someone/digits .* --include=config.json"):
        room.push(tmp_path, "someone/digits", private=False)


def test_a_public_repository_does_not_get_a_private_model(here, tmp_path):
    here.repositories["someone/digits"] = Repository()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="public repository.* hf upload someone/digits .* --private"):
        room.push(tmp_path, "someone/digits", private=True)
    assert not here.repositories["someone/digits"].files


def test_what_is_pushed_of_a_pipeline_with_its_own_code(tmp_path):
    index = {"_class_name": ["pipeline", "ItsOwn"], "unet": ["diffusers", "UNet2DModel"], "id2label": {"0": "cat"}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name in (
        "pipeline.py",
        "secret.txt",
        "unet/model-00001-of-00002.safetensors",
        "checkpoint-2/model.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert room.published(tmp_path) == ["model_index.json", "pipeline.py", "unet/*"]
    command = room.upload_command(tmp_path / "a b", "someone/model", private=True)
    assert command == ["hf", "upload", "someone/model", str(tmp_path / "a b"), ".", "--private"]


def test_the_card_of_a_pipeline_with_its_own_code():
    class ItsOwn:
        pass

    card = str(model_card("title", {"seed": 0}, ["cat", "dog"], "x.png", pipeline=ItsOwn()))
    assert 'from_pretrained("PATH_OR_ID_OF_THIS_FOLDER", trust_remote_code=True)' in card
    assert "- diffusers:ItsOwn" in card and re.search(r"\| seed \| 0 \|", card)


def test_an_exported_first_stage_names_no_folder_of_this_machine(tmp_path):
    shutil.copytree(SHIPPED / "digits-kl", tmp_path / "mine")
    assert open_first_stage(str(tmp_path / "mine")).model.config["_name_or_path"] == "mine"
    assert open_first_stage("digits-kl").model.config["_name_or_path"] == "digits-kl"


def test_cards_name_no_folders_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "data/train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("/home/me/model.json") == "model.json" and public_name("data/train") == "train"
    assert (
        public_name("stabilityai/sd-vae-ft-mse") == "stabilityai/sd-vae-ft-mse" and public_name("digits") == "digits"
    )


def test_cards_hold_no_secret_of_a_shards_address(tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n")
    shards = ["--train_shards", "pipe:curl 'https://h/{0..1}.tar?sig=SECRET'"]
    shards += ["--pretrained_vae_model_name_or_path", "digits-kl"]
    args = load_arguments(tmp_path, *shards, "--class_names", str(tmp_path / "names.txt"), "--max_train_steps", "1")
    result = SimpleNamespace(step=1, totals={"corruption": {"realized_ratio": 0.0}})
    card = str(class_conditional_card(object(), args, ["a", "b"], result, None))
    assert "SECRET" not in card and "| dataset | pipe: {0..1}.tar |" in card


def load_arguments(tmp_path, *words):
    words = ["--output_dir", str(tmp_path / "run"), "--push_to_hub", *words]
    module = load_script("train_class_cond")
    return module.parse_arguments(module.ClassCondArguments, words, "digits_dit_mini")
