"""Rewritten captions: files of JSON lines, and a tiny language model that writes one and goes on with it."""

import json
import logging

import pytest
import torch
from accelerate import Accelerator
from captioned import arguments
from tiny_language_model import tiny_language_model

from noisycond.data import rewriting
from noisycond.data.opening import open_training_data
from noisycond.data.rewriting import CaptionRewriter, read_rewritings, rewrite, rewrite_captions
from noisycond.errors import InputError


pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [f"the digit {digit}" for digit in range(10)]


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def model(request, tmp_path_factory) -> str:
    return tiny_language_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / "rewritten_captions.jsonl"


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The batches that models were asked for; each word of an answer is followed by an exclamation mark."""
    batches = []

    class Exclaiming:
        def __init__(self, name, device):
            pass

        def __call__(self, captions):
            batches.append(list(captions))
            return [caption.replace(" ", "! ") for caption in captions]

    monkeypatch.setattr(rewriting, "CaptionRewriter", Exclaiming)
    monkeypatch.setattr(rewriting, "BATCH_SIZE", 4)
    return batches


# Files


def test_a_file_of_rewritings_is_read_by_text(tmp_path):
    lines = ['{"caption": " a dog ", "rewritten": "a cat "}', "", '{"caption_rewriter": "some/model"}']
    (tmp_path / "new.jsonl").write_text("\n".join(lines) + "\n")
    assert read_rewritings(str(tmp_path / "new.jsonl")) == {"a dog": "a cat"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"caption": "a", "rewritten": "b"}\nnonsense\n', "line 2 is no JSON with `caption` and `rewritten`"),
        (b'{"caption": "a", "rewritten": 3}\n', "line 1 is no JSON with"),
        (b"[]\n", "line 1 is no JSON with"),
        (b"\xff\xff", "not a text file in UTF-8"),
        (b"", "it holds no rewritten caption"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, words):
    (tmp_path / "new.jsonl").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_rewritings(str(tmp_path / "new.jsonl"))
    assert words in str(caught.value) and str(caught.value).startswith("--rewritten_captions ")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="--rewritten_captions .*absent: cannot be read"):
        read_rewritings(str(tmp_path / "absent"))


# Models


def test_a_model_answers_in_its_words_whoever_is_in_the_batch(model):
    rewriter = CaptionRewriter(model)
    answers = rewriter(TEXTS[:3])
    assert answers == rewriter(TEXTS[:3]) and len(answers) == 3 and any(answers)
    assert rewriter(["the digit 7", "a handwritten seven, slanted to the left"])[0] == rewriter(["the digit 7"])[0]
    for answer in answers:
        assert "Rewrite" not in answer.split()[:1] and "\n" not in answer and "</s>" not in answer


def test_a_caption_beyond_the_context_is_cut_at_its_beginning(model):
    [answer] = CaptionRewriter(model)(["the digit 7 " * 400])
    assert isinstance(answer, str)


def test_an_answer_is_one_line_without_quotes():
    assert rewriting._first_line('\n  "a red kite" \nand more') == "a red kite"
    assert rewriting._first_line(" \n ") == ""


def test_a_model_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(InputError, match="--caption_rewriter .*: transformers cannot open it"):
        CaptionRewriter(str(tmp_path))


def test_a_model_writes_a_file_that_can_be_read_again(model, file):
    made = rewrite(TEXTS, model, file, Accelerator())
    assert made.keys() == set(TEXTS)
    assert read_rewritings(str(file)) == {old: new.strip() for old, new in made.items()}
    assert json.loads(file.read_text().splitlines()[0])["caption_rewriter"] == model


# Going on


def test_what_is_done_is_not_done_again(asked, file):
    accelerator = Accelerator()
    whole = rewrite(TEXTS, "some/model", file, accelerator)
    assert whole["the digit 7"] == "the! digit! 7" and [len(batch) for batch in asked] == [4, 4, 2]
    content = file.read_text()
    assert rewrite(TEXTS, "some/model", file, accelerator) == whole and len(asked) == 3
    # Killed while it wrote the second batch: the torn line and its batch are written again.
    file.write_text(content[: content.index("digit 5")])
    asked.clear()
    assert rewrite(TEXTS, "some/model", file, accelerator) == whole
    assert asked == [TEXTS[4:8], TEXTS[8:]]
    assert rewrite(TEXTS[:2] + ["new"], "some/model", file, accelerator)["new"] == "new"


def test_a_file_of_another_model_is_refused(asked, file):
    rewrite(TEXTS[:1], "some/model", file, Accelerator())
    with pytest.raises(InputError, match="--caption_rewriter other/model: .* was written by another model"):
        rewrite(TEXTS[:1], "other/model", file, Accelerator())


def test_only_chosen_captions_of_the_data_are_rewritten(asked, file, caplog):
    args = arguments(dataset_name="digits", max_train_samples=40, corruption_ratio=0.2, corruption_type="llm",
                     caption_rewriter="some/model")  # fmt: skip
    data = open_training_data(args)
    before = dict(data.facts)
    index = torch.arange(40)
    with pytest.raises(AssertionError, match="before they are used"):
        data.captions.use_all(index, index * 0)
    with caplog.at_level(logging.WARNING):
        rewrite_captions(args, data, file, Accelerator())
    chosen = data.captions.corruption.chosen(index)
    assert 0 < int(chosen.sum()) < 20
    own = data.source.captions("text")
    done = {text for batch in asked for text in batch}
    assert done == {text for number in index[chosen].tolist() for text in own[number]}
    for number, caption in enumerate(data.captions.use_all(index, index * 0)):
        if chosen[number]:
            text = caption.text.replace("!", "")
            assert text in own[number] and caption.is_corrupted == (text != caption.text)
        else:
            assert caption.text in own[number] and not caption.is_corrupted
    [warning] = [record.getMessage() for record in caplog.records]
    assert "captions as they were; they do not count as corrupted" in warning  # those of one word
    assert data.facts["captions"] != before["captions"]
    assert data.facts["dataset"] == before["dataset"]


def test_without_a_model_nothing_is_rewritten(asked, file):
    args = arguments(dataset_name="digits", max_train_samples=4)
    rewrite_captions(args, open_training_data(args), file, Accelerator())
    assert not asked and not file.exists()
