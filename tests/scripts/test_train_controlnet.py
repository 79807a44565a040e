"""train_controlnet.py and train_t2i_adapter.py: adapters of tiny bases, in process."""

import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from controlled import NAMES, class_base, controlled_rows, noise_image, save_dataset
from forking import as_stranger
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_vq

from noisycond import personalization, pictures
from noisycond.control_check import ControlCheck
from noisycond.control_pipelines import adapter_facts, open_control_pipeline
from noisycond.data.sources import Digits
from noisycond.first_stage import FirstStage, state_hash
from noisycond.noise_schedule import make_betas
from noisycond.objective import DiffusionObjective
from noisycond.sampling import sample_all


pytestmark = pytest.mark.usefixtures("one_thread")
CONTROLNET, ADAPTER = "train_controlnet", "train_t2i_adapter"
SIZE = 16
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def without_a_curve(monkeypatch):
    """Drawing the loss curve takes a third of such a run."""
    monkeypatch.setattr(pictures, "plot_loss", lambda rows, path: None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, text_folders) -> dict[str, Path]:
    """Tiny pipelines by kind; not to be written to."""
    root = tmp_path_factory.mktemp("bases")
    return {"class": class_base(root / "class"), "sd": text_folders / "sd", "ldm": text_folders / "ldm"}


@pytest.fixture
def flags(bases, tmp_path):
    """Flags of a run of three steps beside a tiny base, on digits, into tmp_path / "run"."""

    def of(base: str | Path = "class", **others) -> list[str]:
        values = {
            "pretrained_model_name_or_path": bases.get(base, base),
            "recipe": "none",
            "dataset_name": "digits",
            "resolution": SIZE,
            "output_dir": tmp_path / "run",
            "train_batch_size": 4,
            "max_train_samples": 32,
            "max_train_steps": 3,
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "ema_decay": 0.5,
            "report_to": "none",
            "num_validation_images": 1,
            "validation_inference_steps": 2,
            "cpu_threads_per_process": 1,
            **others,
        }
        return [str(word) for name, value in values.items() for word in (f"--{name}", value) if value is not None]

    return of


def rows(folder: Path, name: str = "log") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def code_told(printed: str) -> str:
    told = printed.split("Load it where only diffusers is installed:")[1]
    return re.sub(r"^    ", "", told, flags=re.MULTILINE).strip()


# What a run leaves


@pytest.mark.parametrize(
    ("script_name", "base", "others", "kind"),
    [
        (CONTROLNET, "class", {}, "ControlNetModel"),
        (CONTROLNET, "class", {"adapter": "lora", "rank": 2}, "ControlNetModel"),
        (ADAPTER, "class", {"control_column": "mask"}, "LDMAdapter"),
        (CONTROLNET, "sd", {}, "ControlNetModel"),
        (ADAPTER, "sd", {}, "LDMAdapter"),
        (CONTROLNET, "ldm", {"adapter": "lora", "rank": 2}, "ControlNetModel"),
        (ADAPTER, "ldm", {}, "LDMAdapter"),
    ],
)
def test_leaves_the_adapter_alone_and_the_base_as_it_was(
    script, flags, bases, tmp_path, monkeypatch, script_name, base, others, kind
):
    opened, before, started = [], content(bases[base]), []

    def assemble(pipeline, adapter):
        if not opened:
            started.append({name: value.clone() for name, value in pipeline.unet.state_dict().items()})
        opened.append(pipeline)
        return original(pipeline, adapter)

    original = personalization.assemble
    monkeypatch.setattr(personalization, "assemble", assemble)
    script(script_name, *flags(base, **others))
    run = tmp_path / "run"

    assert content(bases[base]) == before
    held = opened[-1].unet.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in started[0].items())

    names = {path.name for path in run.iterdir()}
    assert {"config.json", WEIGHTS, "adapter.json", "README.md", "run.json", "corruption.json"} <= names
    needs_code = base != "sd" or kind == "LDMAdapter"
    assert ("pipeline.py" in names) == needs_code
    assert not names & {"unet", "vae", "vqvae", "model_index.json", "class_embedder", "bert", "text_encoder"}
    assert json.loads((run / "config.json").read_text())["_class_name"] == kind
    pictures = Image.open(run / "samples/final.png"), Image.open(run / "samples/other_conditions.png")
    assert pictures[0].size == pictures[1].size and min(pictures[0].size) > 64

    weights = load_file(run / WEIGHTS)
    saved = load_file(run / "checkpoint-3/model.safetensors")
    assert saved and all(name.startswith("backbone.model.") for name in saved)
    if "adapter" in others:
        assert any(".lora_" in name for name in saved) and not any("base_layer" in name for name in saved)
        assert not any(".lora_" in name for name in weights)
    else:
        assert {name.removeprefix("backbone.model.") for name in saved} == set(weights)
    assert not any(name.startswith(("up_blocks", "conv_out", "encoder")) for name in weights)
    average = load_file(run / "checkpoint-3/ema.safetensors")
    own = {name: value for name, value in average.items() if ".lora_" not in name}
    assert all(torch.equal(weights[name.removeprefix("backbone.model.")], value) for name, value in own.items())
    assert any(
        value.abs().max() > 0 for name, value in own.items() if "controlnet_down" in name or kind == "LDMAdapter"
    )

    column = others.get("control_column", "canny")
    facts = adapter_facts(str(run))
    assert (facts.base, facts.control_column, facts.annotator) == (bases[base].name, column, column)
    assert facts.resolution == SIZE and facts.base_weights == state_hash(opened[-1].unet)
    assert facts.kind == ("t2i_adapter" if kind == "LDMAdapter" else "controlnet")
    assert facts.condition == ("class labels" if base == "class" else "captions")
    assert facts.class_names == (NAMES if base == "class" else None)
    card = (run / "README.md").read_text()
    assert f"base_model: {bases[base].name}\n" in card and str(tmp_path) not in card
    assert f"| control | {column} |" in card and ("| LoRA | rank 2, merged |" in card) == ("adapter" in others)


def test_the_samples_are_drawn_by_what_was_written(script, flags, tmp_path):
    """The last grid has the images that the folder gives, of held-out digits, a row per class."""
    script(ADAPTER, *flags())
    pipeline, source = open_control_pipeline(str(tmp_path / "run")), Digits("test")
    rows = [int(np.flatnonzero(source.labels == digit)[0]) for digit in range(10)]
    controls = [source.control("canny", row, SIZE) for row in rows]
    settings = {"seed": 0, "guidance_scale": 4.0, "num_inference_steps": 2}
    for name, turned in (("final", 0), ("other_conditions", 1)):
        labels = [(digit + turned) % 10 for digit in range(10)]
        images = sample_all(pipeline, labels, controls=controls, **settings)
        grid = pictures.control_grid(
            controls, [source.read(row, SIZE) for row in rows], [[each] for each in images], scale=4
        )
        assert np.array_equal(np.array(grid), np.array(Image.open(tmp_path / f"run/samples/{name}.png")))


STRANGER = """
import sys
import diffusers, numpy, torch
from PIL import Image
torch.set_num_threads(1)
for number, file in enumerate(sys.argv[1:]):
    place = {}
    exec(open(file).read().rsplit("image = ", 1)[0], place)
    image = place["pipeline"](class_labels=[3], image=Image.open("control.png"), num_inference_steps=2,
                              generator=torch.Generator().manual_seed(0), output_type="np").images
    numpy.save(f"{number}.npy", image)
assert "noisycond" not in sys.modules
"""


def test_the_code_that_is_told_runs_where_only_diffusers_is_installed(script, flags, tmp_path, capsys):
    control, runs = noise_image(5), [tmp_path / "one", tmp_path / "two"]
    control.save(tmp_path / "control.png")
    for name, run in zip((CONTROLNET, ADAPTER), runs, strict=True):
        script(name, *flags(output_dir=run))
        (tmp_path / f"{run.name}.py").write_text(code_told(capsys.readouterr().out))
    done = as_stranger(STRANGER, "one.py", "two.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, run in enumerate(runs):
        pipeline = open_control_pipeline(str(run))
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
        expected = pipeline(class_labels=[3], image=control, **options).images
        assert np.array_equal(np.load(tmp_path / f"{number}.npy"), expected)


# The loop


@pytest.mark.parametrize(("base", "adapter"), [("class", "controlnet"), ("sd", "lora")])
def test_a_resumed_run_ends_the_same(script, flags, tmp_path, base, adapter):
    others = {"cep_gamma": 1, "corruption_ratio": 0.5, "adapter": adapter, "max_train_steps": 4}
    script(CONTROLNET, *flags(base, **others))
    cut = {**others, "output_dir": tmp_path / "cut"}
    script(CONTROLNET, *flags(base, **cut | {"max_train_steps": 2}))
    script(CONTROLNET, *flags(base, **cut), "--resume_from_checkpoint", "latest")
    whole, cut = tmp_path / "run", tmp_path / "cut"
    assert rows(whole) == rows(cut) and len(rows(whole)) == 4
    one, other = (load_file(folder / WEIGHTS) for folder in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "corruption.json").read_bytes() == (cut / "corruption.json").read_bytes()


def test_another_base_or_schedule_does_not_go_on(script, refused, flags, bases, tmp_path):
    script(CONTROLNET, *flags(max_train_steps=1))
    moved = tmp_path / "moved"
    shutil.copytree(bases["class"], moved)
    script(CONTROLNET, *flags(moved, max_train_steps=2), "--resume_from_checkpoint", "latest")
    scheduler = moved / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    said = refused(CONTROLNET, *flags(moved), "--resume_from_checkpoint", "latest")
    assert "schedule was" in said
    for name, options in {"base": {"seed": 9}, "adapter": {"cross_attention_dim": 16}}.items():
        other = class_base(tmp_path / name, **options)
        said = refused(CONTROLNET, *flags(other), "--resume_from_checkpoint", "latest")
        assert f"{name} was" in said and "\n" not in said


ALTERED = {
    "corrupted": {"corruption_ratio": 1.0},
    "perturbed": {"cep_gamma": 10},
    "dropped": {"conditioning_dropout_prob": 1.0},
}


@pytest.mark.parametrize(
    ("base", "ways"), [("class", ("corrupted", "perturbed", "dropped")), ("ldm", ("corrupted", "perturbed"))]
)
def test_corruption_and_perturbation_reach_the_loss(script, flags, tmp_path, base, ways):
    """At first a ControlNet changes nothing, so that the first losses are the base's: each of them is another where
    the condition is."""
    plain = {"conditioning_dropout_prob": 0, "max_train_steps": 1}
    found = []
    for way in ("clean", *ways):
        script(CONTROLNET, *flags(base, **plain | ALTERED.get(way, {})), "--overwrite_output_dir")
        found.append(losses(tmp_path / "run")[0])
        counts = json.loads((tmp_path / "run/corruption.json").read_text())
        assert counts["examples_seen"] == 4
        assert counts["examples_corrupted"] >= 3 if way == "corrupted" else counts["examples_corrupted"] == 0
        assert counts["realized_ratio"] == counts["examples_corrupted"] / 4
    assert len(set(found)) == len(found)


def test_cached_latents_and_texts_give_the_same_losses(script, flags, tmp_path):
    found = {}
    for name, words in {"each time": [], "cached": ["--cache_latents", "--cache_text_embeddings"]}.items():
        folders = [
            f"--{kind}_cache_dir={tmp_path / kind}" for kind in ("latent", "text") if name == "cached"
        ]  # fmt: skip
        script(
            CONTROLNET, *flags("ldm", validation_steps=2, control_check_steps=2), *words, *folders,
            "--overwrite_output_dir",
        )  # fmt: skip
        found[name] = losses(tmp_path / "run")
        evaluation = rows(tmp_path / "run", "evaluation")
        assert [row["step"] for row in evaluation] == [2] and np.isfinite(evaluation[0]["control_gain"])
        assert (tmp_path / "run/samples/step-0000002.png").is_file()
    assert found["cached"] == pytest.approx(found["each time"], rel=1e-4)


def test_another_first_stage_takes_the_place_of_the_bases(script, flags, bases, tmp_path):
    torch.manual_seed(7)
    tiny_vq().save_pretrained(tmp_path / "vq")
    script(CONTROLNET, *flags(max_train_steps=1))
    script(
        CONTROLNET,
        *flags(
            max_train_steps=1,
            output_dir=tmp_path / "other",
            pretrained_vae_model_name_or_path=tmp_path / "vq",
        ),
    )
    assert losses(tmp_path / "run") != losses(tmp_path / "other")
    bare = tmp_path / "bare"
    shutil.copytree(bases["class"], bare)
    shutil.rmtree(bare / "vqvae")
    index = json.loads((bare / "model_index.json").read_text())
    (bare / "model_index.json").write_text(json.dumps(index | {"vqvae": [None, None]}))
    script(
        CONTROLNET,
        *flags(
            bare,
            max_train_steps=1,
            output_dir=tmp_path / "bare-run",
            pretrained_vae_model_name_or_path=tmp_path / "vq",
        ),
    )
    assert losses(tmp_path / "bare-run") == losses(tmp_path / "other")


@pytest.mark.parametrize("script_name", [CONTROLNET, ADAPTER])
@pytest.mark.parametrize("base", ["class", "ldm"])
def test_a_dry_run_tells_and_writes_nothing(script, flags, bases, tmp_path, capsys, base, script_name):
    script(script_name, *flags(base), "--dry_run")
    said = capsys.readouterr().out
    frozen = sum(value.numel() for value in load_file(bases[base] / "unet" / WEIGHTS).values())
    assert f"{frozen:,} parameters, frozen" in said and "factor" not in said
    assert ("ControlNetModel" if script_name == CONTROLNET else "LDMAdapter") in said
    assert f"{3 if base == 'class' else 4} × 8 × 8" in said and "optimizer steps       3" in said
    assert not (tmp_path / "run").exists()


# Whether the control is heeded


class Stub(torch.nn.Module):
    """Predicts the noise the better, the nearer the control that it is given is to the example's own."""

    def __init__(self, check, heeds: float):
        super().__init__()
        self.check, self.heeds = check, heeds

    def forward(self, noisy, timesteps, condition, keys=None):
        own = self.check.batch["control"]
        distance = (condition["control"] - own).abs().mean((1, 2, 3), keepdim=True)
        return 1 + self.heeds * distance + torch.zeros_like(noisy)


@pytest.fixture
def check(accelerator):
    """A check of batches of a single example each, with constant noise."""

    def batches():
        for number in range(100):
            control = torch.full((1, 3, SIZE, SIZE), number / 10)
            yield {"control": control, "position": torch.zeros(1, dtype=torch.int64), "bad_images": []} | {
                name: torch.tensor([number]) for name in ("index", "class_labels")
            }

    def loss(prediction, examples):
        return prediction.square().mean((1, 2, 3))

    def noise(latents, keys):
        assert len(set(keys.tolist())) == len(keys)
        return SimpleNamespace(noisy=latents, timesteps=keys)

    base = SimpleNamespace(
        first_stage=SimpleNamespace(latents_of=lambda batch, keys: torch.zeros(len(keys), 3, 8, 8)),
        true_conditions=lambda batch: {"class_labels": batch["class_labels"]},
    )
    return ControlCheck(base, SimpleNamespace(noise=noise, loss=loss), batches(), accelerator)


def test_a_control_that_is_heeded_is_no_cause_to_warn(check, caplog):
    assert len(check.batch["control"]) == check.EXAMPLES  # however small a batch is
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            assert check(Stub(check, 5.0), step)["control_gain"] > 0.3
    assert not caplog.records


def test_a_control_that_is_ignored_is_named_after_some_patience(check, caplog):
    warned = []
    with caplog.at_level(logging.WARNING):
        for step, heeds in enumerate([0, 5.0, 0, 0, 0, 5.0, 0], 1):
            assert (check(Stub(check, heeds), step)["control_gain"] == 0) == (heeds == 0)
            warned.append(len(caplog.records))
    assert warned == [0, 0, 0, 1, 1, 1, 1]  # once: it may last thousands of steps
    assert "At step 4 the control is ignored" in caplog.records[0].getMessage()


def test_the_gain_is_that_of_the_losses(check):
    own, other = 1.0, torch.tensor([1.1] * 7 + [1.7]).square().mean().item()
    assert abs(check.gain(Stub(check, 1.0)) - (1 - own / other)) < 1e-6


def test_a_fresh_controlnet_gains_nothing_and_the_run_says_so(script, flags, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        script(CONTROLNET, *flags(control_check_steps=1, learning_rate=1e-12, train_batch_size=1, max_train_steps=4))
    found = rows(tmp_path / "run", "evaluation")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert max(abs(row["control_gain"]) for row in found) < 1e-6
    assert sum("the control is ignored" in record.getMessage() for record in caplog.records) == 1


def test_no_check_where_none_was_asked_for(script, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(ControlCheck, "__init__", None)  # not even made
    script(CONTROLNET, *flags(control_check_steps=0, max_train_steps=1))
    assert not (tmp_path / "run/evaluation.jsonl").exists()


# Other data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder as prepare_dataset.py writes it, of three of the base's ten classes in another order."""
    table = controlled_rows()
    table["canny"][3] = None
    return save_dataset(tmp_path_factory.mktemp("prepared") / "data", table)


def test_a_prepared_folder_with_some_of_the_bases_classes(script, flags, prepared, tmp_path, monkeypatch):
    seen = []
    original = personalization.make_compute_loss

    def watched(base, objective):
        def compute_loss(denoiser, batch, keys):
            seen.append((base.true_conditions(batch)["class_labels"], batch["class_labels"]))
            return loss(denoiser, batch, keys)

        loss = original(base, objective)
        return compute_loss

    monkeypatch.setattr(personalization, "make_compute_loss", watched)
    script(CONTROLNET, *flags(dataset_name=prepared, max_train_samples=None))
    known_as = torch.tensor([7, 3, 5])
    assert all(torch.equal(theirs, known_as[own]) for theirs, own in seen)
    assert set(torch.cat([theirs for theirs, _ in seen]).tolist()) == {7, 3, 5}
    assert "class_labels=[7]" in (tmp_path / "run/README.md").read_text()
    facts = json.loads((tmp_path / "run/run.json").read_text())["facts"]
    assert facts["known_as"] == [7, 3, 5] and adapter_facts(str(tmp_path / "run")).class_names == NAMES


def test_a_prepared_folder_with_captions(script, flags, prepared, tmp_path):
    """One of its controls is missing, the one that a sample grid begins with too."""
    table = controlled_rows(4)
    table["canny"][0] = None
    table["caption"][1] = 'a "7"\nat night'
    data = save_dataset(tmp_path / "data", table)
    script(
        ADAPTER, *flags("ldm", dataset_name=data, caption_column="caption", max_train_samples=None),
        "--max_bad_images", 1,
    )  # fmt: skip
    card = (tmp_path / "run/README.md").read_text()
    code = card.split("```py\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert 'prompt="a \\"7\\"\\nat night"' in code


# Bad input


def with_control(tmp_path, image: Image.Image) -> Path:
    table = controlled_rows(6)
    table["canny"][2] = image
    return save_dataset(tmp_path / "bad", table)


@pytest.mark.parametrize(
    ("base", "others", "words"),
    [
        ("class", {"control_column": "cany"}, ["--control_column cany", "canny and mask"]),
        ("class", {"rank": 8}, ["--rank has no effect without --adapter lora"]),
        ("class", {"adapter": "lora", "lora_target_modules": "nowhere"}, ["--lora_target_modules", "nowhere"]),
        ("class", {"revision": "main"}, ["--revision has no effect on a folder"]),
        ("nowhere", {"base_class_names": "NAMES"}, ["--pretrained_model_name_or_path nowhere"]),
        ("class", {"caption_column": "text"}, ["--caption_column has no effect", "takes class labels"]),
        ("ldm", {"label_smoothing": 0.1}, ["--label_smoothing"]),
        ("ldm", {"class_groups": "groups.txt"}, ["--class_groups has no effect", "takes captions"]),
        ("ldm", {"train_shards": "a.tar", "dataset_name": None, "max_train_samples": None}, ["prepare_dataset.py"]),
        ("class", {"num_validation_images": 0}, ["--num_validation_images is 0"]),
        ("class", {"control_check_steps": -1}, ["--control_check_steps is -1"]),
        ("class", {"snr_gamma": -1}, ["--snr_gamma is -1"]),
        ("class", {"resolution": 15}, ["--resolution is 15", "multiple of the first stage's factor 2"]),
        ("nowhere/at/all", {}, ["nowhere/at/all", "neither a folder nor a Hub id"]),
        ("class", {"class_subset": 3, "base_class_names": "NAMES"}, ["--base_class_names has 9 names", "10 classes"]),
        ("class", {"pretrained_vae_model_name_or_path": "digits-kl"}, ["3 channels", "have 4"]),
        ("class", {"dataset_name": "MISSING"}, ["--control_column sam", "columns image, label, canny, caption"])
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(refused, flags, prepared, tmp_path, base, others, words):
    if "base_class_names" in others:
        (tmp_path / "names.txt").write_text("\n".join(NAMES[:9]))
        others = others | {"base_class_names": tmp_path / "names.txt"}
    if others.get("dataset_name") == "MISSING":
        others = others | {"dataset_name": prepared, "control_column": "sam"}
    rehearsed = [[]] if "dataset_name" not in others or others["dataset_name"] is None else [[], ["--dry_run"]]
    for more in rehearsed:  # a folder that `datasets` wrote is looked at in a rehearsal too
        said = refused(CONTROLNET, *flags(base, **others), *more)
        assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_a_control_of_another_size_is_refused_before_anything_is_written(refused, flags, tmp_path):
    data = with_control(tmp_path, noise_image(0, 40, 16))
    said = refused(ADAPTER, *flags(dataset_name=data))
    assert "40 × 16 pixels" in said and "--control_column canny" in said and not (tmp_path / "run").exists()
    measured = {"eval_steps": 1, "eval_num_images": 2, "eval_metrics": "edge_f1", "eval_controls": data}
    said = refused(ADAPTER, *flags(**measured))
    assert "40 × 16 pixels" in said and not (tmp_path / "run").exists()


def test_images_without_controls_say_how_to_get_them(refused, flags, tmp_path):
    for name in NAMES:
        (tmp_path / "images" / name).mkdir(parents=True)
        noise_image(0).save(tmp_path / "images" / name / "0.png")
    for words in ([], ["--dry_run"]):
        said = refused(CONTROLNET, *flags(train_data_dir=tmp_path / "images", dataset_name=None), *words)
        assert "--control_column canny" in said and "prepare_dataset.py" in said


def test_a_base_of_another_kind_is_refused(refused, flags, untrained):
    said = refused(CONTROLNET, *flags(untrained))
    assert "a DiTPipeline cannot be controlled here" in said and "LDMClassToImagePipeline" in said


def test_the_miniature_needs_its_base(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "train_class_cond.py --recipe digits_ldm" in refused(CONTROLNET)
    said = refused(ADAPTER, "--recipe", "digits_text_t2i_adapter")
    assert "runs/digits-text" in said and "train_text_to_image_corrupt.py --recipe digits_text" in said


def test_an_unknown_class_is_named_with_what_would_help(refused, script, flags, tmp_path):
    data = save_dataset(tmp_path / "data", controlled_rows(6, ("7", "cat")), ("7", "cat"))
    said = refused(CONTROLNET, *flags(dataset_name=data))
    assert "'cat'" in said and "1 of the dataset's 2 classes" in said and "--base_class_names FILE" in said
    (tmp_path / "names.txt").write_text("\n".join([*NAMES[:9], "cat, Felis catus"]))
    script(CONTROLNET, *flags(dataset_name=data, base_class_names=tmp_path / "names.txt", max_train_steps=1))
    assert json.loads((tmp_path / "run/run.json").read_text())["facts"]["known_as"] == [7, 9]


def test_overwriting_does_not_remove_the_base(refused, flags, bases, tmp_path):
    shutil.copytree(bases["class"], tmp_path / "run")
    (tmp_path / "run/run.json").write_text("{}")
    said = refused(CONTROLNET, *flags(tmp_path / "run"), "--overwrite_output_dir")
    assert "would remove what --pretrained_model_name_or_path" in said
    assert (tmp_path / "run/unet" / WEIGHTS).is_file()


# The whole on real modules


def test_the_check_on_a_real_first_stage(accelerator):
    """At the same noise and timesteps: a denoiser that gives what is wanted for one control alone."""
    objective = DiffusionObjective(make_betas("linear", 1e-4, 0.02, 100), "epsilon", seed=0)
    batch = {
        "pixel_values": torch.rand(8, 3, SIZE, SIZE) * 2 - 1,
        "control": torch.rand(8, 3, SIZE, SIZE),
        "class_labels": torch.arange(8),
        "index": torch.arange(8),
        "position": torch.arange(8),
    }
    base = SimpleNamespace(first_stage=FirstStage(tiny_vq()), true_conditions=lambda batch: {})
    check = personalization.ControlCheck(base, objective, iter([batch]), accelerator)
    calls = []

    def denoiser(noisy, timesteps, condition):
        calls.append((noisy, timesteps, condition["control"]))
        return torch.zeros_like(noisy)

    assert check.gain(denoiser) == 0.0
    (noisy, timesteps, own), (same, same_timesteps, other) = calls
    assert torch.equal(noisy, same) and torch.equal(timesteps, same_timesteps)
    assert torch.equal(own, batch["control"]) and torch.equal(other[1:], own[:-1])
    assert not any(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert len(set(timesteps.tolist())) > 4
