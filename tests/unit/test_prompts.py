"""Prompts by name: what is read from each kind, which prompt an image gets, and a sentence for what cannot be read."""

import json

import datasets
import pytest

from noisycond.errors import InputError
from noisycond.prompts import Prompts, open_prompts


COCO = {
    "annotations": [
        {"image_id": 9, "id": 5, "caption": "A cat on a mat.\n"},
        {"image_id": 2, "id": 8, "caption": "a later caption"},
        {"image_id": 9, "id": 3, "caption": " A dog. "},
        {"image_id": 2, "id": 7, "caption": "a boat"},
    ]
}


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def put(tmp_path):
    """Writes a file, text or JSON, and returns its path."""

    def write(name: str, content) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def test_digits_go_through_the_classes_and_have_labels():
    unseen, seen = open_prompts("--prompts", "digits:unseen"), open_prompts("--prompts", "digits:seen")
    assert open_prompts("--prompts", "digits").texts == unseen.texts
    assert unseen.labels[:12].tolist() == [*range(10), 0, 1] and unseen.class_names[7] == "7"
    assert "3" in unseen.texts[3] or "three" in unseen.texts[3]
    assert not set(unseen.texts) & set(seen.texts) and len(unseen) >= 100 <= len(seen)


def test_a_line_is_a_prompt(put):
    found = open_prompts("--prompts", put("p.txt", "a cat\r\n a\u2028dog \nein Würfel\n"))
    assert found.texts == ["a cat", "a\u2028dog", "ein Würfel"] and found.labels is found.class_names is None


@pytest.mark.parametrize("ending", ["jsonl", "csv", "json"])
def test_tables_have_columns_and_maybe_labels(put, ending):
    rows = [{"id": "x", "caption": "a, b", "label": 4}, {"id": "y", "caption": "c\nd", "label": 0}]
    text = {"jsonl": lines(rows), "json": rows, "csv": 'id,caption,label\nx,"a, b",4\ny,"c\nd",0\n'}[ending]
    name = put(f"p.{ending}", text)
    found = open_prompts("--prompts", name)
    assert found.texts == ["a, b", "c\nd"] and found.labels.tolist() == [4, 0] and found.class_names is None
    assert open_prompts("--prompts", name, column="id").texts == ["x", "y"]


def test_text_comes_before_caption_before_prompt_and_the_first_of_several_is_taken(put):
    assert open_prompts("--prompts", put("p.jsonl", lines([{"prompt": "p", "text": "t"}]))).texts == ["t"]
    assert open_prompts("--prompts", put("p.jsonl", lines([{"prompt": "p", "caption": ["a", "b"]}]))).texts == ["a"]


def test_coco_gives_the_first_caption_of_each_image_in_the_order_of_the_images(put):
    assert open_prompts("--prompts", put("captions.json", COCO)).texts == ["a boat", "A dog."]


def test_a_folder_of_images_gives_the_texts_of_its_list(put, tmp_path):
    put("x/metadata.jsonl", lines([{"file_name": "1.png", "text": "a cat", "label": 1}]))
    found = open_prompts("--prompts", str(tmp_path / "x"))
    assert found.texts == ["a cat"] and found.labels.tolist() == [1]


def test_datasets(tmp_path):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    one = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}, features)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "validation": one.select([1])}).save_to_disk(tmp_path / "splits")
    found = open_prompts("--prompts", str(tmp_path / "one"), column="sentence")
    assert found.texts == ["a", "b"] and found.labels.tolist() == [1, 0] and found.class_names == ["cat", "dog"]
    splits = str(tmp_path / "splits")
    assert open_prompts("--prompts", splits, column="sentence").texts == ["b"]
    assert open_prompts("--prompts", splits, "train", "sentence").texts == ["a", "b"]
    for options, words in (
        ({"split": "test", "column": "sentence"}, "--prompt_split test: .*splits train, validation"),
        ({"column": "sentences"}, r"--prompt_column sentences: .* columns sentence, label \(did you mean 'sentence'"),
        ({}, "no column text, caption or prompt, but sentence, label; name one with --prompt_column"),
    ):
        with pytest.raises(InputError, match=words):
            open_prompts("--prompts", splits, **options)
    with pytest.raises(InputError, match="--prompt_split train has no effect .* no splits"):
        open_prompts("--prompts", str(tmp_path / "one"), "train")


def test_the_fingerprint_follows_the_prompts_and_not_their_place(put):
    texts = [put(name, "a\nb\n") for name in ("1.txt", "2.txt")] + [put("3.txt", "b\na\n")]
    labelled = [put(f"{label}.jsonl", lines([{"text": "a", "label": label}, {"text": "b"} | other])) for label, other
                in ((0, {"label": 1}), (1, {"label": 1}), (2, {}))]  # fmt: skip
    found = [open_prompts("--prompts", name).fingerprint for name in (*texts, *labelled)]
    assert found[0] == found[1] == found[5] and len(set(found)) == 4


def test_which_prompt_an_image_gets():
    prompts = Prompts("x", ["a", "b", "c"])
    assert prompts.places(7) == [0, 1, 2, 0, 1, 2, 0]
    drawn = prompts.places(300, "random", seed=4)
    assert drawn[:50] == prompts.places(50, "random", seed=4) and drawn != prompts.places(300, "random", seed=5)
    assert all(70 < drawn.count(place) < 130 for place in range(3))


@pytest.mark.parametrize(
    "name, content, options, words",
    [
        ("none.txt", None, {}, "none.txt: there is no such file or folder"),
        ("a photo of a cat", None, {}, "prompts themselves go into a text file"),
        ("a dog and " * 30, None, {}, r"^--prompts a dog .{54}…: there is no such .* go into a text file"),
        ("p.txt", "a\n\nb\n", {}, "p.txt: line 2 is empty"),
        ("p.txt", " \n", {}, r"p.txt: p\.txt is empty"),
        ("p.txt", "a\n", {"column": "text"}, "--prompt_column text has no effect .* each line is a prompt"),
        ("p.txt", "a\n", {"split": "train"}, "--prompt_split train has no effect .* no splits"),
        ("p.jsonl", '{"text": "a"}\n{"text": ""}\n', {}, "entry 2 is empty"),
        ("p.jsonl", '{"text": "a"}\n{"id": 1}\n', {}, "entry 2 is empty"),
        ("p.jsonl", '{"text": 3}\n', {}, "entry 1 holds no text, but 3"),
        ("p.jsonl", '{"text": "a"}\n\n{"te', {}, r"p\.jsonl is damaged \(line 3: Unterminated string .*, column 2\)"),
        ("p.jsonl", '{"text": "a"}\n{"a": ' + "[" * 9999, {}, r"p\.jsonl is damaged \(line 2: .* nested too deeply"),
        ("p.json", "[" * 9999, {}, r"p\.json is damaged \(it is nested too deeply"),
        ("p.jsonl", '{"text": "a"}\n{"text": "b\\ud83d"}\n', {}, "entry 2 holds half of a surrogate pair"),
        ("p.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 1%s}' % ("0" * 30), {}, "entry 2 has a label"),
        ("p.csv", "text,label\na,%s\n" % ("9" * 5000), {}, "entry 1 has a label beyond 9223372036854775807"),
        (
            "p.jsonl",
            '{"txet": "a"}\n',
            {},
            "no column text, .*, but txet; name one with --prompt_column",
        ),
        (
            "p.jsonl",
            '{"text": "a"}\n',
            {"column": "txt"},
            r"--prompt_column txt: .* text \(did you mean 'text'",
        ),
        ("p.csv", "text\na,b\n", {}, r"p\.csv is damaged \(a row has more cells"),
        ("p.json", "[]", {}, r"p\.json is empty"),
        ("p.json", '{"a": 1}', {}, "expected a list of objects .* COCO"),
        ("p.json", '{"annotations": []}', {}, "no annotations"),
        ("p.json", '{"annotations": [{"id": 1}]}', {}, r"no image_id, id and caption \('image_id'\)"),
        ("p.json", COCO, {"column": "text"}, "--prompt_column text has no effect"),
        (
            "p.json",
            {"annotations": [{"id": 1, "image_id": 4, "caption": " "}]},
            {},
            "first caption of image 4 is empty",
        ),
        ("digits:sene", None, {}, r"digits:seen and digits:unseen \(did you mean 'digits:seen'"),
        ("digits", None, {"column": "text"}, "--prompt_column text has no effect on --prompts digits"),
        ("digits", None, {"split": "test"}, "--prompt_split test has no effect on --prompts digits"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(put, tmp_path, monkeypatch, name, content, options, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        put(name, content)
    with pytest.raises(InputError, match=words) as refusal:
        open_prompts("--prompts", name, **options)
    assert f"--prompt{'s' if '_' not in words.split()[0] else '_'}" in str(refusal.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(InputError, match="--prompts .*p.txt: .*cannot be read as text in UTF-8"):
        open_prompts("--prompts", str(tmp_path / "p.txt"))


def test_a_name_that_nothing_opens():
    with pytest.raises(InputError, match="--eval_prompts nobody/nothing: .*name a split with --eval_prompt_split"):
        open_prompts("--eval_prompts", "nobody/nothing")
