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
from noisycond.data.rewriting import CaptionRewriter, read_rewritings, rewrite, rewrite_captions, rewritings_file
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
def weights() -> dict[str, str]:
    """What tells the weights of models of these names, where it is not the name."""
    return {}


@pytest.fixture
def asked(monkeypatch, weights) -> list[list[str]]:
    """The batches that models were asked for; each word of an answer is followed by an exclamation mark."""
    batches = []

    class Exclaiming:
        def __init__(self, name, device):
            self.facts = {"weights": weights.get(name, name)}

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
    # Killed while it wrote the second batch: the torn line is written again, and what came after.
    file.write_text(content[: content.index("digit 5")])
    asked.clear()
    assert rewrite(TEXTS, "some/model", file, accelerator) == whole
    assert asked == [TEXTS[5:9], TEXTS[9:]]
    assert rewrite(TEXTS[:2] + ["new"], "some/model", file, accelerator)["new"] == "new"


def test_what_is_kept_is_not_asked_for_again_nor_replaced(asked, file):
    accelerator = Accelerator()
    rewrite(TEXTS[:3], "some/model", file, accelerator)
    line = json.dumps({"caption": TEXTS[1], "rewritten": "another answer"}) + "\n"
    file.write_text(file.read_text() + line)
    asked.clear()
    made = rewrite(TEXTS[:6], "some/model", file, accelerator)
    assert asked == [TEXTS[3:6]] and made[TEXTS[1]] == "the! digit! 1"


def test_a_caption_may_hold_what_divides_lines_elsewhere(asked, file):
    texts = ["one\u2028two", "three\x85four", "five\x1csix", "seven eight"]
    for _ in range(2):
        assert rewrite(texts, "some/model", file, Accelerator()).keys() == set(texts)
    assert len(asked) == 1


def test_a_run_waits_for_another_and_takes_what_it_made(asked, file, monkeypatch):
    monkeypatch.setattr(rewriting, "TURN", 0.01)
    other = rewriting._work(TEXTS[:6], "some/model", file, "cpu")
    assert next(other) and len(asked) == 1
    own = rewriting._work(TEXTS, "some/model", file, "cpu")
    assert next(own) and next(own) and len(asked) == 1
    assert list(other) == [True] and len(asked) == 2
    assert list(own) == [True] and asked[2:] == [TEXTS[6:]]
    assert rewrite(TEXTS, "some/model", file, Accelerator()).keys() == set(TEXTS) and len(asked) == 3
    assert not list(file.parent.glob("*.tmp"))


def test_a_file_that_was_changed_meanwhile_is_named(asked, file, monkeypatch):
    work = rewriting._work

    def robbed(*arguments):
        yield from work(*arguments)
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))

    monkeypatch.setattr(rewriting, "_work", robbed)
    with pytest.raises(InputError, match="2 of 10 captions are missing in .*; start again"):
        rewrite(TEXTS, "some/model", file, Accelerator())


def test_a_file_of_other_weights_is_refused_and_the_same_by_another_name_is_not(asked, file, weights):
    weights |= {"some/model": "a", "./model": "a"}
    rewrite(TEXTS[:1], "some/model", file, Accelerator())
    assert rewrite(TEXTS[:1], "./model", file, Accelerator())
    weights["some/model"] = "b"
    with pytest.raises(InputError, match="--caption_rewriter some/model: .* other weights of it"):
        rewrite(TEXTS[:1], "some/model", file, Accelerator())


def test_facts_tell_weights_and_tokenizers_apart(model, tmp_path):
    first = CaptionRewriter(model)
    assert first.facts == CaptionRewriter(model).facts and first.facts.keys() == {"weights", "tokenizer", "settings"}
    first.model.get_input_embeddings().weight.data[0] += 1
    first.tokenizer.add_tokens(["kite"])
    first.model.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    second = CaptionRewriter(str(tmp_path))
    assert second.facts["weights"] != first.facts["weights"] and second.facts["tokenizer"] != first.facts["tokenizer"]


def test_a_relative_folder_has_a_file_of_its_own(tmp_path, monkeypatch):
    args = arguments(dataset_name="digits", max_train_samples=4, corruption_type="llm", caption_rewriter="model")
    data, files = open_training_data(args), []
    for folder in ("a", "b"):
        (tmp_path / folder / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        files.append(rewritings_file(args, data))
    monkeypatch.chdir(tmp_path)
    assert len({*files, rewritings_file(args, data)}) == 3
    args.caption_rewriter = str(tmp_path / "a" / "model")
    assert rewritings_file(args, data) == files[0]


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
    data = open_training_data(args)
    assert rewritings_file(args, data).suffix == ".jsonl"  # the scripts ask before they know
    rewrite_captions(args, data, file, Accelerator())
    assert not asked and not file.exists()
