"""The classifier of digits: the one that ships, and the command that trains one."""

import json

import pytest
import torch

from noisycond.errors import InputError
from noisycond.evaluation import digits_classifier
from noisycond.evaluation.digits_classifier import SHIPPED, accuracy, augment, open_classifier, prepare, read_digits


@pytest.fixture
def few_digits(monkeypatch):
    """The training split cut to 128 digits."""
    monkeypatch.setattr(
        digits_classifier,
        "read_digits",
        lambda split: tuple(part[:128] if split == "train" else part for part in read_digits(split)),
    )


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_shipped_classifier_knows_held_out_digits(resolution):
    images, labels = read_digits("test", resolution)
    assert len(labels) == 360
    assert accuracy(open_classifier(), images, labels) >= 0.985


def test_shipped_classifier_is_small_and_says_what_it_is():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 500_000
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["held_out_accuracy"] == round(accuracy(open_classifier(), *read_digits("test")), 4)


def test_features_have_the_shapes_that_are_told():
    features = open_classifier()(prepare(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)))
    assert [list(each.shape) for each in features.maps] == [
        [2, 16, 32, 32],
        [2, 32, 16, 16],
        [2, 48, 8, 8],
        [2, 64, 4, 4],
        [2, 64, 4, 4],
    ]
    assert [list(each.shape) for each in features[1:]] == [[2, 64], [2, 112], [2, 10]]
    # Channels last: the first seven entries are the first place's seven channels.
    assert torch.equal(features.spatial[0, :7], features.maps[-1][0, :7, 0, 0])
    assert torch.equal(features.spatial[0, 7:14], features.maps[-1][0, :7, 0, 1])


def test_every_feature_varies_over_digits():
    with torch.no_grad():
        features = open_classifier()(prepare(read_digits("test")[0]))
    assert features.pooled.std(0).min() > 0.01
    assert features.spatial.std(0).min() > 0.01


def test_images_of_the_network_s_size_keep_their_values():
    images = torch.arange(256, dtype=torch.uint8).repeat(12).reshape(1, 3, 32, 32)
    assert ((prepare(images) + 1) * 127.5 - images).abs().max() < 1e-4


def test_larger_images_are_antialiased():
    stripes = (torch.arange(128) % 4 == 0).to(torch.uint8) * 255
    pixels = prepare(stripes.expand(1, 3, 128, 128))
    assert pixels.shape == (1, 3, 32, 32)
    # A quarter is white; without antialiasing all of it falls between the places that are looked at.
    assert (pixels[..., 1:-1] + 0.5).abs().max() < 0.01


def test_augmented_digits_stay_digits():
    images, labels = read_digits("test")
    changed = augment(images, torch.Generator().manual_seed(0))
    assert changed.dtype == torch.uint8 and changed.shape == images.shape
    assert (changed.float() - images.float()).abs().mean() > 5
    assert accuracy(open_classifier(), changed, labels) > 0.95


def test_training_command_beats_chance(tmp_path, capsys, one_thread):
    digits_classifier.main(["--output_dir", str(tmp_path), "--num_train_epochs", "2"])
    share = accuracy(open_classifier(tmp_path), *read_digits("test"))
    assert share > 0.4
    assert f"Accuracy {share:.2%} on 360 held-out digits" in capsys.readouterr().out


def test_training_is_a_function_of_the_seed(tmp_path, few_digits, one_thread):
    state = torch.random.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        digits_classifier.main(["--output_dir", str(tmp_path / name), "--num_train_epochs", "1", "--seed", str(seed)])
        torch.rand(7)  # what others draw in between has no effect
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    torch.random.set_rng_state(state)


def test_opening_and_building_leave_the_process_s_generator_alone():
    before = torch.random.get_rng_state()
    open_classifier()
    digits_classifier.build_classifier(0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--num_train_epochs", "0"], "--num_train_epochs is 0"),
        (["--learning_rate", "-1"], "--learning_rate is -1"),
        (["--output_dir", str(SHIPPED)], "--overwrite_output_dir"),
        (["--epochs", "3"], "unknown flag --epochs"),
    ],
)
def test_bad_flags_are_one_sentence(argv, words, capsys):
    with pytest.raises(SystemExit):
        digits_classifier.main(argv)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_damaged_or_missing_classifier_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"no folder of a digits classifier.*python -m") as caught:
        open_classifier(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_bytes((SHIPPED / "config.json").read_bytes())
    weights = (SHIPPED / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(InputError, match="damaged"):
        open_classifier(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    open_classifier(tmp_path)
    (tmp_path / "config.json").write_text('{"channels": [8, 8, 8, 8, 8], "num_classes": 10}')
    with pytest.raises(InputError, match="holds no digits classifier") as caught:
        open_classifier(tmp_path)
    assert "\n" not in str(caught.value)
