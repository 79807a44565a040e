"""Results in a model card: what the Hub's own reader finds, and that nothing else moves."""

import math

import pytest
from huggingface_hub import ModelCard

from noisycond.errors import InputError
from noisycond.evaluation.model_index import add_results_to_card, model_index_results


CARD = """---
license: apache-2.0  # kept
tags: [noisycond, 'quoted']
custom:
    deep: 1
---

# A title

---
not: front matter
"""


def rows(values, scale=1.5, run="runs/a", **other) -> list[dict]:
    return [
        {
            "label": "a",
            "pipeline": run,
            "images": f"images/{seed}",
            "guidance_scale": scale,
            "seed": seed,
            "num_images": 100,
            "metrics": {"fid": {"value": value, "interval": None}, "kid": {"value": math.nan, "interval": None}},
        }
        | other
        for seed, value in enumerate(values)
    ]


def results(values, scale=1.5, dataset="digits", **settings):
    return model_index_results(rows(values, scale), dataset, settings=settings)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    return tmp_path


def read(folder):
    return ModelCard.load(folder / "README.md").data.eval_results


def test_a_result_per_metric_and_scale_with_what_it_depends_on():
    found = model_index_results(
        rows([10.0]) + rows([12.0, 13.0], 3.0), "digits", dataset_split="test", settings={"extractor": "digits"}
    )
    assert [(each.metric_type, each.metric_name, each.metric_value) for each in found] == [
        ("fid", "FID", 10.0),
        ("fid", "FID", "12.50 ± 0.71"),
    ]
    assert found[0].metric_args == {"guidance_scale": 1.5, "num_images": 100, "extractor": "digits"}
    assert (found[0].dataset_type, found[0].dataset_name, found[0].dataset_split) == ("digits", "digits", "test")


def test_metrics_can_be_chosen():
    assert model_index_results(rows([1.0]), "digits", metrics=["kid", "recall"]) == []


def test_rows_of_several_runs_are_refused():
    with pytest.raises(InputError, match="one run, but these are of 2"):
        model_index_results(rows([1.0]) + rows([1.0], run="runs/b"), "digits")


def test_the_card_is_read_back_and_the_rest_stays_letter_for_letter(folder):
    given = results([10.0]) + results([12.0], 3.0)
    add_results_to_card(folder, given)
    assert read(folder) == given
    text = (folder / "README.md").read_text()
    front, body = CARD.split("---\n\n", 1)
    assert text.startswith(front) and text.endswith("---\n\n" + body)
    assert [path.name for path in folder.iterdir()] == ["README.md"]


def test_adding_again_changes_nothing(folder):
    add_results_to_card(folder, results([10.0]))
    once = (folder / "README.md").read_bytes()
    add_results_to_card(folder, results([10.0]))
    assert (folder / "README.md").read_bytes() == once


def test_the_same_metric_is_replaced_and_others_stay(folder):
    add_results_to_card(folder, results([10.0]) + results([12.0], 3.0) + results([9.0], dataset="other"))
    add_results_to_card(folder, results([11.0, 12.0]) + results([7.0], steps=250))
    found = [(each.dataset_type, each.metric_args, each.metric_value) for each in read(folder)]
    base = {"guidance_scale": 1.5, "num_images": 100}
    assert found == [
        ("digits", base, "11.50 ± 0.71"),
        ("digits", base | {"guidance_scale": 3.0}, 12.0),
        ("digits", base | {"steps": 250}, 7.0),
        ("other", base, 9.0),
    ]


def test_results_of_others_stay(folder):
    theirs = """model-index:
- name: theirs
  results:
  - task: {type: unconditional-image-generation}
    dataset: {name: digits, type: digits}
    source: {url: "https://example.org", name: them}
    metrics:
    - {type: fid, value: 3, args: {guidance_scale: 1.5, num_images: 100}, name: FID}

language: en
"""
    (folder / "README.md").write_text(CARD.replace("custom:", theirs + "custom:"))
    add_results_to_card(folder, results([10.0]))
    found = read(folder)
    assert [(each.metric_value, each.source_url) for each in found] == [(3, "https://example.org"), (10.0, None)]
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == "theirs" and card.data.language == "en" and card.data.custom == {"deep": 1}
    assert "\n\nlanguage: en\ncustom:\n" in (folder / "README.md").read_text()


def test_line_ends_stay(folder):
    (folder / "README.md").write_bytes(CARD.replace("\n", "\r\n").encode())
    add_results_to_card(folder, results([10.0]))
    written = (folder / "README.md").read_bytes()
    assert written.count(b"\n") == written.count(b"\r\n") and read(folder)[0].metric_value == 10.0


def test_a_card_without_front_matter_gets_one(folder):
    (folder / "README.md").write_text("# Only text\n")
    add_results_to_card(folder, results([10.0]))
    assert read(folder)[0].metric_value == 10.0
    assert (folder / "README.md").read_text().endswith("---\n# Only text\n")


@pytest.mark.parametrize("front", ["a: [", "- a", "model-index: 3"])
def test_a_damaged_card_is_refused_and_left(folder, front):
    (folder / "README.md").write_text(f"---\n{front}\n---\ntext\n")
    with pytest.raises(InputError, match="front matter cannot be read"):
        add_results_to_card(folder, results([10.0]))
    assert (folder / "README.md").read_text() == f"---\n{front}\n---\ntext\n"


def test_a_folder_without_a_card_is_refused(tmp_path):
    with pytest.raises(InputError, match="no README.md"):
        add_results_to_card(tmp_path, results([10.0]))
