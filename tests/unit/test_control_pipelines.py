"""From a base's index to its flags and labels, and from an adapter folder to a pipeline again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from controlled import class_base, moved, noise_image
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, T2IAdapter, VQModel
from text_pipelines import make, unet
from tiny_models import tiny_unet

from noisycond.condition_kinds import CAPTIONS, LABELS, kind_of_pipeline, require_kind
from noisycond.control_pipelines import (
    FACTS,
    LOCAL,
    MODULES,
    AdapterFacts,
    adapter_facts,
    assemble,
    control_class,
    is_adapter,
    loading_code,
    local_places,
    open_base,
    open_control_pipeline,
    save_adapter,
)
from noisycond.denoisers.class_pipelines import match_classes
from noisycond.denoisers.control import make_adapter, make_controlnet
from noisycond.errors import InputError
from noisycond.first_stage import state_hash
from noisycond.hub import published
from noisycond.sampling import image_size


pytestmark = pytest.mark.usefixtures("one_thread")
FLAG = "--pretrained_model_name_or_path"


# Classes


def matched(own: list[str], theirs: list[str] | None, known: int | None = None) -> list[int]:
    return match_classes(own, theirs, len(theirs) if known is None else known, FLAG, "runs/base")


def refusal(*args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        matched(*args, **kwargs)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_classes_are_known_by_their_names_and_aliases():
    theirs = ["tench, Tinca tinca", "goldfish", "crane", "jay"]
    assert matched(["jay", "goldfish"], theirs) == [3, 1]
    assert matched(["Tinca tinca", "crane"], theirs) == [0, 2]
    assert matched(["tench, Tinca tinca"], theirs) == [0] and matched(["tench"], theirs) == [0]
    assert matched(theirs, theirs) == [0, 1, 2, 3]


def test_a_whole_name_wins_over_an_alias():
    assert matched(["jaguar"], ["panther, jaguar", "jaguar"]) == [1]
    assert matched(["maillot", "maillot, tank suit"], ["maillot, tank suit", "maillot"]) == [1, 0]


def test_a_name_of_two_labels_is_refused_but_not_where_all_are_alike():
    assert "labels 0 and 2 are both called 'crane'" in refusal(["crane"], ["crane", "jay", "crane"])
    assert "labels 0 and 1 are both called 'tub'" in refusal(["tub"], ["bath, tub", "vat, tub"])
    assert matched(["crane", "jay", "crane"], ["crane", "jay", "crane"]) == [0, 1, 2]
    assert matched(["jay"], ["crane", "jay", "crane"]) == [1]


def test_an_unknown_class_is_named_with_the_nearest():
    said = refusal(["jay", "goldfisch", "snake"], ["tench, Tinca tinca", "goldfish", "jay"])
    assert "2 of the dataset's 3 classes" in said and "'goldfisch'" in said and "'goldfish'" in said
    assert FLAG in said and "--base_class_names FILE" in said


def test_without_names_the_numbers_must_agree():
    assert matched(["b", "a"], None, known=2) == [0, 1]
    said = refusal(["a"], None, known=2)
    assert "2 labels" in said and "1 classes" in said and "--base_class_names" in said
    assert "3 names" in refusal(["a"], ["a", "b", "c"], known=2)


# Kinds


def index_of(folder, kind) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return str(folder)


def test_the_index_says_what_a_base_takes(tmp_path):
    def kind(name: str) -> str | None:
        return kind_of_pipeline(FLAG, name, None, "controlled")

    assert kind(index_of(tmp_path / "a", ["ldm_class_to_image", "LDMClassToImagePipeline"])) == LABELS
    assert kind(index_of(tmp_path / "b", "StableDiffusionPipeline")) == CAPTIONS
    assert kind(index_of(tmp_path / "c", "LDMTextToImagePipeline")) == CAPTIONS
    assert kind(str(tmp_path / "nothing")) is None
    with pytest.raises(InputError, match="a DiTPipeline cannot be controlled here, only .*LDMClassToImagePipeline"):
        kind(index_of(tmp_path / "d", "DiTPipeline"))
    with pytest.raises(InputError, match="by its captions"):
        require_kind(FLAG, "runs/base", "LDMClassToImagePipeline", CAPTIONS, "controlled")


# Adapter folders


@pytest.fixture(scope="module")
def bases(tmp_path_factory, text_folders) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    class_base(root / "class")
    class_base(root / "wider", names=None, num_classes=3, cross_attention_dim=16)
    return {"class": str(root / "class"), "wider": str(root / "wider")} | {
        kind: str(text_folders / kind) for kind in ("sd", "ldm")
    }


def save(opened_as: str, folder, condition: str, kind: str = "controlnet", **facts):
    """An adapter folder of a base, with weights away from their start; and its pipeline."""
    torch.manual_seed(2)
    opened = open_base(opened_as)
    factor = opened.vae_scale_factor
    if kind == "controlnet":
        adapter = make_controlnet(opened.unet, factor)
    else:
        adapter = make_adapter(opened.unet, factor, MODULES[condition])
    pipeline = assemble(opened, moved(adapter).eval())
    facts = {"revision": None, "control_column": "canny", "annotator": "canny", "class_names": None} | facts
    folder.mkdir(exist_ok=True)
    known = AdapterFacts(**{"base": Path(opened_as).name} | facts, condition=condition, kind=kind)
    save_adapter(adapter, pipeline, known, local_places(base=facts.get("base", opened_as), first_stage=None), folder)
    return pipeline


def draw(pipeline, condition: str) -> torch.Tensor:
    what = {"class_labels": [3]} if condition == LABELS else {"prompt": ["a 7"]}
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return pipeline(**what, image=noise_image(1), output_type="pt", **options).images


@pytest.mark.parametrize(
    ("base", "kind"), [("class", "controlnet"), ("class", "t2i_adapter"), ("ldm", "t2i_adapter"), ("sd", "controlnet")]
)
def test_a_folder_becomes_its_pipeline_again(bases, tmp_path, base, kind):
    condition = LABELS if base == "class" else CAPTIONS
    pipeline = save(bases[base], tmp_path / "adapter", condition, kind)
    folder = str(tmp_path / "adapter")
    assert is_adapter(folder) and adapter_facts(folder).kind == kind
    again = open_control_pipeline(folder)
    assert type(again) is type(pipeline) and torch.equal(draw(again, condition), draw(pipeline, condition))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    own_code = {"pipeline.py"} if base != "sd" else set()
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", FACTS, LOCAL} | own_code
    # A path of this machine stands in the one file that no push takes along.
    (tmp_path / "adapter" / "README.md").write_text("card")
    pushed = {
        path.name for pattern in published(tmp_path / "adapter") for path in (tmp_path / "adapter").glob(pattern)
    }
    assert pushed == files - {LOCAL} | {"README.md"}
    assert (
        str(tmp_path) not in (tmp_path / "adapter" / FACTS).read_text()
        and bases[base] in (tmp_path / "adapter" / LOCAL).read_text()
    )


def test_what_the_base_was_is_kept(bases, tmp_path, monkeypatch):
    """The resolution, the first stage and the base's weights, wherever the reader stands."""
    kept = tmp_path / "base"
    shutil.copytree(bases["class"], kept)
    base = open_base(str(kept))
    other = VQModel(**{name: value for name, value in base.vqvae.config.items() if name[0] != "_"})
    other.save_pretrained(tmp_path / "vq")
    folder = tmp_path / "adapter"
    facts = {"base_weights": state_hash(base.unet), "resolution": 32, "first_stage": "vq"}
    save(str(kept), folder, LABELS, **facts)
    places = local_places(base=str(kept), first_stage=str(tmp_path / "vq"))
    (folder / LOCAL).write_text(json.dumps(places))
    monkeypatch.chdir(tmp_path / "vq")
    opened = open_control_pipeline(str(folder))
    assert image_size(opened) == 32 != image_size(base)
    weights = zip(opened.vqvae.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(one, another) for one, another in weights)
    class_base(kept, seed=9)
    with pytest.raises(InputError, match="has other weights than it was trained on.*--base_pipeline"):
        open_control_pipeline(str(folder))
    assert image_size(open_control_pipeline(str(folder), str(kept))) == 32


def test_the_parts_of_the_base_are_shared(bases):
    base = open_base(bases["class"])
    pipeline = assemble(base, make_controlnet(base.unet, 2))
    assert pipeline.unet is base.unet and pipeline.vqvae is base.vqvae
    assert type(pipeline) is control_class(base)
    assert pipeline.get_label_ids(["7", "3"]) == base.get_label_ids(["7", "3"]) == [7, 3]


def test_saving_again_leaves_other_files_and_replaces_its_own(bases, tmp_path):
    folder = tmp_path / "adapter"
    save(bases["class"], folder, LABELS)
    (folder / "notes.txt").write_text("mine")
    save(bases["class"], folder, LABELS, "t2i_adapter", control_column="mask", annotator="mask")
    assert (folder / "notes.txt").read_text() == "mine" and not list(folder.glob(".export*"))
    assert adapter_facts(str(folder)).control_column == "mask"
    assert type(open_control_pipeline(str(folder)).adapter).__name__ == "LDMAdapter"


def test_what_is_no_adapter_is_told(bases, tmp_path):
    assert not is_adapter(bases["class"]) and not is_adapter(str(tmp_path)) and not is_adapter("nobody/nothing")
    assert not is_adapter("no such/folder/at all")
    with pytest.raises(InputError, match="no adapter folder.*adapter.json"):
        adapter_facts(bases["class"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda facts: "{",
        lambda facts: json.dumps([1, 2]),
        lambda facts: json.dumps(facts | {"colour": "red"}),
        lambda facts: json.dumps({name: value for name, value in facts.items() if name != "base"}),
        lambda facts: json.dumps(facts | {"condition": "sounds"}),
        lambda facts: json.dumps(facts | {"kind": "controlnets"}),
        lambda facts: json.dumps(facts | {"base": None}),
        lambda facts: b"\xff\xfe",
    ],
)
def test_damaged_facts_are_said_in_a_sentence(bases, tmp_path, damage):
    save(bases["class"], tmp_path / "adapter", LABELS)
    file = tmp_path / "adapter" / FACTS
    content = damage(json.loads(file.read_text()))
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="adapter.json is damaged") as caught:
        open_control_pipeline(str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_said_in_a_sentence(bases, tmp_path):
    folder = tmp_path / "adapter"
    save(bases["class"], folder, LABELS)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(InputError, match="its adapter cannot be opened"):
        open_control_pipeline(str(folder))
    config = json.loads((folder / "config.json").read_text())
    for damaged in ([], config | {"norm_num_groups": 0}):  # diffusers answers by an AttributeError, a division by zero
        (folder / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="its adapter cannot be opened"):
            open_control_pipeline(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(InputError, match="it holds a UNet2DConditionModel, none of ControlNetModel"):
        open_control_pipeline(str(folder))


def test_another_base_takes_the_place_of_its_own(bases, tmp_path):
    save(bases["class"], tmp_path / "adapter", LABELS)
    other = class_base(tmp_path / "other", seed=9)
    own, theirs = (draw(open_control_pipeline(str(tmp_path / "adapter"), base), LABELS) for base in (None, str(other)))
    assert not torch.equal(own, theirs)


def sentence(*args) -> str:
    with pytest.raises(InputError) as caught:
        open_control_pipeline(*map(str, args))
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_a_base_that_is_not_there_or_does_not_fit_is_said_in_a_sentence(bases, tmp_path):
    save(bases["class"], tmp_path / "adapter", LABELS, base=str(tmp_path / "gone"))
    said = sentence(tmp_path / "adapter")
    assert "gone: cannot be opened" in said and "say where it is with --base_pipeline" in said
    said = sentence(tmp_path / "adapter", bases["wider"])
    assert f"--base_pipeline {bases['wider']}" in said and "cross_attention_dim" in said
    for base in (bases["sd"], bases["ldm"]):  # of another condition, and of other channels
        assert "for another base" in sentence(tmp_path / "adapter", base)
    said = sentence(tmp_path / "adapter", index_of(tmp_path / "dit", "DiTPipeline"))
    assert f"--base_pipeline {tmp_path / 'dit'}" in said and "a DiTPipeline cannot be controlled" in said


@pytest.mark.parametrize(
    ("make_other", "words"),
    [
        (lambda: ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(4, 8)), "in_channels"),
        (lambda: ControlNetModel.from_unet(unet(20), conditioning_embedding_out_channels=(4, 8)), "cross_attention"),
        (lambda: ControlNetModel.from_unet(unet(16)), "first stage's factor is 2"),
        (lambda: T2IAdapter(3, [8, 16], 1, 2, "full_adapter"), "features have the sizes"),
    ],
)
def test_stable_diffusion_too_says_at_once_what_does_not_fit(make_other, words):
    with pytest.raises(ValueError, match=words):
        assemble(make("sd"), make_other())


# The code that a reader runs


def test_the_code_names_classes_base_and_revision():
    base = make("sd")
    pipeline = assemble(base, make_controlnet(base.unet, 2))
    assert isinstance(pipeline, StableDiffusionControlNetPipeline)
    code = loading_code(pipeline, "someone/sd", "someone/adapter", 'prompt="a 7"', "v2")
    compile(code, "card", "exec")
    assert "from diffusers import ControlNetModel, StableDiffusionControlNetPipeline" in code
    assert 'from_pretrained("someone/sd", controlnet=controlnet, revision="v2")' in code
    assert "trust_remote_code" not in code and "revision" not in loading_code(pipeline, "a", "b", "")
