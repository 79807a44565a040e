"""`python -m noisycond.launch`: training scripts in the manner of the Diffusers examples, run as they are."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from forking import Program
from launching import ROOT
from safetensors.torch import load_file, save_file

from noisycond import launch
from noisycond.attach import find_conditions
from noisycond.launch import LaunchArguments, find_denoisers, main, split_command


SCRIPT = """
import argparse
import copy
import os
import random
import sys

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextConfig, CLIPTextModel

from beside_the_script import CAPTION_LENGTH


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="sd-model-finetuned")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--max_train_steps", type=int, default=4)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint")
    parser.add_argument("--trained", default="unet")
    parser.add_argument("--teacher", action="store_true")
    parser.add_argument("--forget_train_mode", action="store_true")
    return parser.parse_args()


def tiny_unet():
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4,
    )


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        pixels = torch.rand(3, 8, 8, generator=generator) * 2 - 1
        input_ids = torch.randint(1, 30, (CAPTION_LENGTH,), generator=generator)
        return {"index": index, "pixel_values": pixels, "input_ids": input_ids}


def main():
    args = parse_args()
    torch.set_num_threads(1)
    config = ProjectConfiguration(project_dir=args.output_dir)
    accelerator = Accelerator(gradient_accumulation_steps=2, project_config=config, cpu=True)
    if args.seed is not None:
        set_seed(args.seed)
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)

    text_config = CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30,
        max_position_embeddings=CAPTION_LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )
    text_encoder = CLIPTextModel(text_config).requires_grad_(False)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    unet = tiny_unet().requires_grad_(args.trained == "unet")
    seen_by = {"student": [], "teacher": [], "ema": []}

    def look(name, model):
        # Behind every hook: what the first layer that attends is given.
        layer = model.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k
        layer.register_forward_pre_hook(lambda module, given: seen_by[name].append(given[0].detach().clone()))

    ema_unet = copy.deepcopy(unet)
    look("ema", ema_unet)
    ema = EMAModel(ema_unet.parameters(), model_cls=UNet2DConditionModel, model_config=ema_unet.config)
    teacher = copy.deepcopy(unet).requires_grad_(False)
    look("teacher", teacher)
    look("student", unet)

    trained = unet
    parameters = list(unet.parameters())
    if args.trained == "lora":
        from peft import LoraConfig

        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    elif args.trained in ("blocks", "projections"):
        # They are prepared, the denoiser itself is not.
        blocks = [*unet.down_blocks[1].attentions, *unet.mid_block.attentions]
        if args.trained == "projections":
            blocks = [block.transformer_blocks[0].attn2 for block in blocks]
        trained = torch.nn.ModuleList(blocks).requires_grad_(True)
        parameters = list(trained.parameters())
    elif args.trained == "text_encoder":
        trained = text_encoder.requires_grad_(True)
        parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    dataloader = torch.utils.data.DataLoader(Examples(), batch_size=2, shuffle=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def save_model_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            for model in models:
                accelerator.unwrap_model(model).save_pretrained(os.path.join(output_dir, "unet"))
                weights.pop()

    def load_model_hook(models, input_dir):
        while models:
            model = models.pop()
            model.load_state_dict(UNet2DConditionModel.from_pretrained(input_dir, subfolder="unet").state_dict())

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    trained, optimizer, dataloader, scheduler = accelerator.prepare(trained, optimizer, dataloader, scheduler)
    if args.teacher:
        teacher = accelerator.prepare(teacher)
        teacher.train()
        ema_unet.train()
    if not args.forget_train_mode:
        unet.train()
    else:
        unet.eval()

    step, drawn = 0, []
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        step = int(args.resume_from_checkpoint.rpartition("-")[2])
        dataloader = accelerator.skip_first_batches(dataloader, 2 * step)
    batches = iter(dataloader)
    while step < args.max_train_steps:
        with accelerator.accumulate(trained):
            batch = next(batches)
            clean = batch["pixel_values"]
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, 1000, (len(clean),))
            drawn.append((batch["index"].tolist(), noise.double().sum().item(), timesteps.tolist()))
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            states = text_encoder(batch["input_ids"])[0]
            prediction = unet(noisy, timesteps, states, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(prediction, noise)
            if args.teacher:
                target = teacher(noisy, timesteps, encoder_hidden_states=states).sample
                ema_unet(noisy, timesteps, encoder_hidden_states=states)
                loss = loss + torch.nn.functional.mse_loss(prediction, target)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(unet.parameters()) if args.trained == "unet" else None
            step += 1
            if step % args.checkpointing_steps == 0:
                accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{step}"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(unet).save_pretrained(os.path.join(args.output_dir, "unet"))
        after = [random.random(), float(np.random.rand()), torch.rand(1).item()]
        log = {"drawn": drawn, "after": after, "argv": sys.argv, "path": sys.path[0], "seen_by": seen_by}
        torch.save(log, os.path.join(args.output_dir, "log.pt"))


if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """The script, in a folder of its own with a module that it imports."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "train.py").write_text(SCRIPT)
    (folder / "beside_the_script.py").write_text("CAPTION_LENGTH = 6\n")
    yield folder / "train.py"
    sys.modules.pop("beside_the_script", None)


@pytest.fixture
def launched(train, tmp_path, one_thread):
    """Runs the script in process through the launcher; returns its weights and what it saw."""

    def run(*flags, name: str = "run", words=()):
        folder = tmp_path / name
        main([*map(str, flags), "--", str(train), "--seed", "3", "--output_dir", str(folder), *map(str, words)])
        return result(folder)

    return run


def result(folder) -> SimpleNamespace:
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    settings = json.loads((folder / "cep.json").read_text()) if (folder / "cep.json").exists() else None
    return SimpleNamespace(weights=weights, settings=settings, **torch.load(folder / "log.pt"))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def stopped(capsys, *argv) -> str:
    """Runs what must be refused; returns its sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in argv])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert leaving.value.code == 2 and len(errors) == 1, errors
    return errors[0].removeprefix("error: ")


# What stays as it was


def test_gamma_0_is_the_script_alone_and_gamma_1_changes_the_condition_alone(train, launched, tmp_path, capsys):
    alone = tmp_path / "alone"
    with Program(train, "--seed", 3, "--output_dir", alone, environment=environment()) as program:
        done = program.finish()
    assert done.returncode == 0, done.stderr[-3000:]
    plain = result(alone)
    capsys.readouterr()
    off = launched("--cep_gamma", 0, name="off")
    assert "CEP is off" in capsys.readouterr().out
    on = launched("--cep_gamma", 1, name="on")
    printed = capsys.readouterr().out
    assert printed.count("noisycond: CEP (uniform, gamma 1) on UNet2DConditionModel: encoder_hidden_states") == 1

    assert same(off.weights, plain.weights) and not same(on.weights, plain.weights)
    assert len(plain.drawn) == 8 and len({tuple(indices) for indices, *_ in plain.drawn}) == 8
    assert plain.drawn == off.drawn == on.drawn and plain.after == off.after == on.after
    for run in (off, on):
        assert run.path == plain.path and run.argv[:3] == plain.argv[:3]
    # δ is what differs, of CEP-U's size.
    deltas = [a - b for a, b in zip(on.seen_by["student"], plain.seen_by["student"], strict=True)]
    assert all(0.8 * 12**-0.5 < delta.abs().max() <= 12**-0.5 + 1e-6 for delta in deltas)

    assert plain.settings is None
    assert off.settings["flags"]["cep_gamma"] == 0 and off.settings["attached"] == []
    (attached,) = on.settings["attached"]
    assert attached["model"] == "UNet2DConditionModel" and attached["gamma"] == 1
    assert "encoder_hidden_states" in [place["name"] for place in attached["conditions"]]


def test_accelerate_launch(train, launched, tmp_path):
    """As a user launches it, on two processes."""
    folder = tmp_path / "two"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    words = ["-m", "noisycond.launch", "--cep_gamma", "1.0", "--cep_seed", "5", "--", str(train), "--seed", "3"]
    done = subprocess.run(
        [*launcher, *words, "--output_dir", str(folder)],
        capture_output=True, text=True, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("on UNet2DConditionModel") == 1
    both = result(folder)
    assert both.settings["attached"][0]["seed"] == 5
    # Every example's embedding as it is without CEP: DDP's model was perturbed in every forward.
    off = launched("--cep_gamma", 0, name="off", words=["--max_train_steps", 8])
    clean = {}
    for (indices, *_), states in zip(off.drawn, off.seen_by["student"], strict=True):
        clean |= dict(zip(indices, states, strict=True))
    assert len(both.drawn) == 8 and len(clean) == 32
    for (indices, *_), states in zip(both.drawn, both.seen_by["student"], strict=True):
        delta = states - torch.stack([clean[index] for index in indices])
        assert 0.8 * 12**-0.5 < delta.abs().max() <= 12**-0.5 + 1e-5


# What it is attached to


def test_a_frozen_teacher_and_the_moving_average_are_left_alone(launched, capsys):
    on = launched("--cep_gamma", 1, name="on", words=["--teacher"])
    assert capsys.readouterr().out.count("noisycond: CEP") == 1 and len(on.settings["attached"]) == 1
    off = launched("--cep_gamma", 0, name="off", words=["--teacher"])
    assert len(on.seen_by["teacher"]) == 8
    for name, unchanged in (("teacher", True), ("ema", True), ("student", False)):
        pairs = zip(on.seen_by[name], off.seen_by[name], strict=True)
        assert all(torch.equal(a, b) == unchanged for a, b in pairs), name


@pytest.mark.parametrize("trained", ["blocks", "projections", "lora"])
def test_adapters_and_layers(launched, trained):
    """The denoiser is perturbed whose adapters or layers are trained, even if only these were prepared."""
    if trained == "lora":
        pytest.importorskip("peft")
    on = launched("--cep_gamma", 1, name="on", words=["--trained", trained])
    assert [attached["model"] for attached in on.settings["attached"]] == ["UNet2DConditionModel"]
    off = launched("--cep_gamma", 0, name="off", words=["--trained", trained])
    assert not same(on.weights, off.weights)
    moved = {name for name in on.weights if not torch.equal(on.weights[name], off.weights[name])}
    assert all("attn" in name or "attentions" in name for name in moved)
    assert all(not torch.equal(a, b) for a, b in zip(on.seen_by["student"], off.seen_by["student"], strict=True))


TWO_MODELS = """
import sys
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, UNet2DConditionModel

small = dict(block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, attention_head_dim=2,
             norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"))
unet = UNet2DConditionModel(**small, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
controlnet = ControlNetModel(**small, conditioning_embedding_out_channels=(4, 8))
critic = torch.nn.Linear(4, 1)


class Both(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(self, **inputs):
        return unet(**inputs)


accelerator = Accelerator(cpu=True)
which = sys.argv[sys.argv.index("--trained") + 1]
if which == "critic first":
    accelerator.prepare(critic, torch.optim.SGD(critic.parameters()))
    accelerator.prepare(unet, torch.optim.SGD(unet.parameters()))
elif which == "controlnet":
    unet.requires_grad_(False)
    accelerator.prepare(controlnet, torch.optim.SGD(controlnet.parameters()), unet)
elif which == "optimizer's":
    accelerator.prepare(controlnet, torch.optim.SGD(unet.parameters()), unet)
elif which == "no optimizer":
    accelerator.prepare_model(controlnet, evaluation_mode=True)
    accelerator.prepare_model(unet)
else:
    accelerator.prepare(Both(), torch.optim.SGD([*unet.parameters(), *controlnet.parameters()]))
"""


@pytest.mark.parametrize(
    "which, models",
    [
        ("critic first", ["UNet2DConditionModel"]),
        ("controlnet", ["ControlNetModel"]),
        ("optimizer's", ["UNet2DConditionModel"]),
        ("no optimizer", ["UNet2DConditionModel"]),
        ("both", ["UNet2DConditionModel", "ControlNetModel"]),
    ],
)
def test_the_models_that_are_trained(tmp_path, which, models):
    script = tmp_path / "train.py"
    script.write_text(TWO_MODELS)
    main(["--", str(script), "--trained", which, "--output_dir", str(tmp_path)])
    attached = json.loads((tmp_path / "cep.json").read_text())["attached"]
    assert [settings["model"] for settings in attached] == models


def test_a_text_encoder_is_no_denoiser():
    """Though BERT's forward takes encoder_hidden_states."""
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    assert find_conditions(bert) and find_denoisers(bert) == []


def test_every_option_arrives(tmp_path):
    """No flag is forgotten on its way to attach_cep, and nothing stays patched."""
    from accelerate import Accelerator

    before = {name: vars(Accelerator)[name] for name in ("prepare", "prepare_model", "load_state")}
    script, null = tmp_path / "train.py", tmp_path / "null.safetensors"
    script.write_text(TWO_MODELS)
    save_file({"encoder_hidden_states": torch.zeros(6, 12)}, null)
    flags = {
        "gamma": 0.5, "type": "gaussian", "embeddings": "sequence", "null_embedding": null,
        "gamma_schedule": "linear:0:1", "schedule_steps": 9, "timestep_schedule": "cosine", "max_timestep": 1000.0,
        "seed": 4,
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--cep_{name}", value)]
    words += ["--no_cep_perturb_null", "--no_cep_perturb_padding", "--cep_shared"]
    main([*words, "--", str(script), "--trained", "controlnet", "--output_dir", str(tmp_path)])
    (attached,) = json.loads((tmp_path / "cep.json").read_text())["attached"]
    expected = flags | {
        "null_embedding": ["encoder_hidden_states"], "timestep_schedule": "cosine:1:0", "perturb_null": False,
        "perturb_padding": False, "shared": True,
    }  # fmt: skip
    assert {name: attached[name] for name in expected} == expected
    assert {name: vars(Accelerator)[name] for name in before} == before


# Resuming


def close(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all((a - b).abs().max() < 1e-5 for a, b in zip(some, others, strict=True))


def test_resume(launched, tmp_path, capsys):
    """δ goes on where it was, in a script with hooks of its own; a checkpoint without CEP is resumed with a word."""

    def deltas(*words):
        on, off = (launched("--cep_gamma", gamma, name=f"gamma{gamma}", words=words) for gamma in (1, 0))
        assert on.drawn == off.drawn
        return [a - b for a, b in zip(on.seen_by["student"], off.seen_by["student"], strict=True)]

    whole = deltas("--checkpointing_steps", 2)
    resume = ["--resume_from_checkpoint", tmp_path / "gamma1/checkpoint-2"]
    capsys.readouterr()
    assert close(deltas(*resume), whole[4:]) and "without CEP" not in capsys.readouterr().err
    (tmp_path / "gamma1/checkpoint-2/cep_state.json").unlink()
    assert close(deltas(*resume), whole[:4]) and "was saved without CEP" in capsys.readouterr().err
    assert not close(whole[:4], whole[4:])


OPENING = """
class Sharded:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        for parameter in unet.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


optimizer = torch.optim.SGD(unet.parameters())
accelerator.prepare(unet, optimizer)
accelerator.register_for_checkpointing(Sharded())
accelerator.save_state(sys.argv[2])
accelerator.load_state(sys.argv[2])
"""


def test_a_step_that_opens_an_optimizer_s_state_is_none_of_training(tmp_path):
    """torch.distributed.checkpoint takes one, on gradients of zero, before the first forward."""
    script = tmp_path / "train.py"
    script.write_text(TWO_MODELS.partition("which =")[0] + OPENING)
    main(["--", str(script), "--output_dir", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/cep_state.json").read_text()) == [{"step": 0, "seed": 0}]


def test_gamma_0_saves_no_state(launched, tmp_path):
    launched("--cep_gamma", 0, words=["--checkpointing_steps", 2])
    assert (tmp_path / "run/checkpoint-2").is_dir() and not list(tmp_path.rglob("cep_state.json"))


def test_another_seed_is_not_resumed(launched, train, tmp_path, capsys):
    launched("--cep_gamma", 1, words=["--checkpointing_steps", 2, "--max_train_steps", 2])
    words = ["--output_dir", tmp_path / "run", "--resume_from_checkpoint", tmp_path / "run/checkpoint-2"]
    sentence = stopped(capsys, "--cep_seed", 1, "--", train, *words)
    assert "seed 0" in sentence and "1" in sentence


# Refusals


@pytest.fixture
def alone(monkeypatch):
    """No denoiser of another test lives in this process, which a script of this one might yet train."""
    others = launch._living_denoisers()
    here = launch._living_denoisers
    monkeypatch.setattr(launch, "_living_denoisers", lambda: [m for m in here() if all(m is not o for o in others)])


def test_a_script_that_trains_something_else_is_stopped(train, tmp_path, capsys, alone):
    sentence = stopped(capsys, "--", train, "--output_dir", tmp_path / "run", "--trained", "text_encoder")
    assert "prepares an optimizer" in sentence and "CLIPTextModel (a model of transformers" in sentence
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == []


def test_a_denoiser_that_stays_in_eval_mode_is_not_trained_without_cep(train, tmp_path, capsys):
    words = ["--output_dir", tmp_path / "run", "--forget_train_mode"]
    sentence = stopped(capsys, "--", train, *words)
    assert "UNet2DConditionModel was never called in train mode" in sentence


START = "import sys, torch\nfrom accelerate import Accelerator\nmodel = torch.nn.Linear(2, 1)\n"
STEP = "model(torch.ones(2)).backward()\ntorch.optim.SGD(model.parameters()).step()\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "has ended"),
        ("import sys\nsys.exit()", "has ended"),
        (START + STEP, "takes its first optimizer step"),
        (START + f"try:\n    {STEP.splitlines()[0]}\n    {STEP.splitlines()[1]}\nexcept Exception:\n    pass", "step"),
        (START + "Accelerator(cpu=True).prepare(model)", "Linear (no condition embedding)"),
        (START + "Accelerator(cpu=True).prepare(model, torch.optim.SGD(model.parameters()))", "prepares an optimizer"),
    ],
)
def test_nothing_to_attach_to(tmp_path, capsys, text, words, alone):
    script = tmp_path / "train.py"
    script.write_text(text)
    sentence = stopped(capsys, "--", script)
    assert words in sentence and sentence.startswith(str(script)) and sentence.count(". ") == 0, sentence
    main(["--cep_gamma", "0", "--", str(script)]) if "exit" not in text else None


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "behind a --"),
        (["--cep_gamma", "1", "train.py"], "behind a --"),
        (["--cep_gamma", "1", "--"], "no script behind the --"),
        (["--", "absent.py"], "absent.py is not there"),
        (["--", "."], "no such file"),
        (["--cep_gama", "1", "--", "train.py"], "--cep_gama (did you mean '--cep_gamma'?)"),
        (["--output_dir", "x", "--", "train.py"], "unknown flag --output_dir"),
        (["--cep_gamma", "-1", "--", "train.py"], "--cep_gamma is -1.0"),
        (["--cep_gamma", "nan", "--", "train.py"], "--cep_gamma is nan"),
        (["--cep_type", "laplace", "--", "train.py"], "laplace"),
        (["--cep_seed", "-1", "--", "train.py"], "--cep_seed is -1"),
        (["--cep_gamma_schedule", "lin", "--", "train.py"], "--cep_gamma_schedule"),
        (["--cep_gamma_schedule", "linear", "--", "train.py"], "needs --cep_schedule_steps"),
        (["--cep_max_timestep", "1", "--", "train.py"], "no effect without --cep_timestep_schedule"),
        (["--cep_schedule_steps", "0", "--cep_gamma_schedule", "linear", "--", "train.py"], "must be positive"),
        (["--cep_null_class", "3", "--", "train.py"], "only with --no_cep_perturb_null"),
        (["--no_cep_perturb_null", "--cep_null_embedding", "none.st", "--", "train.py"], "none.st"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("raise AssertionError('the script ran')")
    sentence = stopped(capsys, *argv)
    assert words in sentence and sentence.endswith(".")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--no_cep_perturb_null"], "--cep_null_embedding"),
        (["--cep_embeddings", "pooled"], "no pooled condition embedding"),
        (["--no_cep_perturb_padding"], "padding mask"),
    ],
)
def test_options_that_the_denoiser_cannot_follow(train, tmp_path, capsys, flags, words):
    assert words in stopped(capsys, *flags, "--", train, "--output_dir", tmp_path / "run")


# What passes through


@pytest.mark.parametrize("gamma", ["0", "1"])
def test_exceptions_and_exit_codes_pass_through(tmp_path, gamma):
    script = tmp_path / "train.py"
    for text, error in (("1 / 0", ZeroDivisionError), ("raise KeyboardInterrupt", KeyboardInterrupt)):
        script.write_text(text)
        with pytest.raises(error):
            main(["--cep_gamma", gamma, "--", str(script)])
    for code in ("3", "'a sentence'"):
        script.write_text(f"import sys; sys.exit({code})")
        with pytest.raises(SystemExit) as leaving:
            main(["--cep_gamma", gamma, "--", str(script)])
        assert repr(leaving.value.code) == code


def test_the_script_s_own_help(train, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--", str(train), "--help"])
    assert leaving.value.code == 0 and "--max_train_steps" in capsys.readouterr().out


def test_the_launcher_s_help(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0 and "--cep_gamma" in capsys.readouterr().out


def test_a_second_double_dash_is_the_script_s(tmp_path):
    (tmp_path / "train.py").write_text("")
    arguments, script, words = split_command(["--cep_gamma=2", "--", str(tmp_path / "train.py"), "--", "-x"])
    assert arguments.cep_gamma == 2 and script.name == "train.py" and words == ["--", "-x"]


# The settings


@pytest.mark.parametrize("words, said", [([], "no --output_dir"), (["--output_dir", "made/by/nobody"], "no folder")])
def test_settings_that_cannot_be_saved_do_not_stop_the_script(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(TWO_MODELS)
    main(["--", "train.py", "--trained", "controlnet", *words])
    printed = capsys.readouterr()
    assert printed.err.count("settings of CEP are not saved") == 1 and said in printed.err
    assert not list(tmp_path.rglob("cep.json"))


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "train.py").write_text(TWO_MODELS)
    (tmp_path / "cep.json").mkdir()
    main(["--", str(tmp_path / "train.py"), "--trained", "controlnet", f"--output_dir={tmp_path}"])
    assert "cannot be written" in capsys.readouterr().err


def test_the_flags_are_the_options_of_attach_cep():
    import inspect

    from noisycond import attach_cep

    options = set(inspect.signature(attach_cep).parameters) - {"model", "rank"}
    assert set(LaunchArguments().options()) == options
    assert {name.removeprefix("cep_") for name in LaunchArguments().flags()} == options
    defaults = {name: value.default for name, value in inspect.signature(attach_cep).parameters.items()}
    assert LaunchArguments().options() == {name: defaults[name] for name in options}


def test_the_project_s_own_perturbation_is_not_doubled(tmp_path, capsys):
    words = [
        "--cep_gamma",
        "1",
        "--max_train_steps",
        "1",
        "--output_dir",
        str(tmp_path / "run"),
        "--report_to",
        "none",
    ]
    sentence = stopped(capsys, "--cep_gamma", "1", "--", ROOT / "train_class_cond.py", *words)
    assert "train_class_cond.py perturbs its condition embeddings by itself" in sentence


def test_a_refusal_that_the_script_catches_ends_it(tmp_path, capsys):
    script = tmp_path / "catches.py"
    script.write_text(
        "import torch\nfrom accelerate import Accelerator\nfrom diffusers import UNet2DConditionModel\n"
        "unet = UNet2DConditionModel(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,\n"
        "    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), cross_attention_dim=8, attention_head_dim=4,\n"
        "    up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D')).train()\n"
        "optimizer = torch.optim.SGD(unet.parameters())\n"
        "unet, optimizer = Accelerator(cpu=True).prepare(unet, optimizer)\n"
        "try:\n"
        "    unet(torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 3, 8))\n"
        "except ValueError:\n"
        "    print('skipped a batch')\n"
    )
    sentence = stopped(capsys, "--no_cep_perturb_padding", "--", str(script))
    assert "perturb_padding" in sentence


def test_the_process_that_fails_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        launch._fail("it is odd", of_this_process=True)
    assert capsys.readouterr().err == "error: process 3: it is odd\n"
