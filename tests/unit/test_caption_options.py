"""Flags of captioned data: what goes together, and what would have no effect."""

import pytest
from captioned import arguments

from noisycond.errors import InputError


def refusal(**values) -> str:
    with pytest.raises(InputError) as caught:
        arguments(**({"dataset_name": "digits"} | values))
    return str(caught.value)


def test_the_defaults_are_those_of_the_field():
    args = arguments(dataset_name="digits")
    assert (args.caption_column, args.label_column, args.corruption_type) == ("text", None, "swap")
    assert args.corruption_ratio == 0.0 and args.corruption_mode == "fixed"


def test_a_folder_of_images_may_have_captions_and_labels(tmp_path):
    args = arguments(train_data_dir=tmp_path, caption_column="caption", label_column="kind")
    assert (args.caption_column, args.label_column) == ("caption", "kind")


def test_shards_need_no_class_names_unless_there_are_labels():
    values = {"train_shards": "a.tar", "max_train_steps": 3}
    assert arguments(**values).class_names is None
    with pytest.raises(InputError, match="--class_names FILE is needed"):
        arguments(**values, label_column="label")
    with pytest.raises(InputError, match="--class_names has no effect without --label_column"):
        arguments(**values, class_names="names.txt")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"corruption_ratio": 1.5}, "--corruption_ratio is 1.5"),
        ({"corruption_type": "swop"}, "swop"),
        ({"token_ratio": 0.5}, "--token_ratio has no effect with --corruption_type swap"),
        ({"token_operation": "drop"}, "--token_operation has no effect"),
        ({"corruption_type": "token", "token_ratio": 0}, "--token_ratio is 0.0"),
        ({"rewritten_captions": "a"}, "--rewritten_captions has no effect with --corruption_type swap"),
        ({"corruption_type": "llm"}, "none was given"),
        ({"corruption_type": "llm", "rewritten_captions": "a", "caption_rewriter": "b"}, "were given"),
        ({"corruption_type": "llm", "rewritten_caption_column": "a"}, "with --dataset_name digits"),
        ({"save_corruption_map": "yes", "corruption_mode": "random"}, "--save_corruption_map needs"),
        ({"caption_column": "caption"}, "--caption_column has no effect with --dataset_name digits"),
        ({"label_column": "label"}, "--label_column has no effect with --dataset_name digits"),
        ({"dataset_name": "a/b", "class_subset": 3}, "--class_subset has no effect without --label_column"),
        ({"dataset_name": "a/b", "num_classes": 3}, "--num_classes has no effect without --label_column"),
    ],
)
def test_what_does_not_go_together_is_refused(values, words):
    assert words in refusal(**values)


def test_a_stream_takes_rewritings_but_no_rewriter():
    stream = {"dataset_name": "a/b", "streaming": "yes", "max_train_steps": 3, "corruption_type": "llm"}
    assert arguments(**stream, rewritten_caption_column="other").rewritten_caption_column == "other"
    assert "--caption_rewriter does not go with --streaming" in refusal(**stream, caption_rewriter="gpt2")


def test_a_digits_class_subset_needs_no_label_column():
    assert arguments(dataset_name="digits", class_subset=3).class_subset == "3"
