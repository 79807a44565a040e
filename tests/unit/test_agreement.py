"""Agreement with the condition: shares counted by hand, and a tiny CLIP against its own embeddings."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_clip

from noisycond.errors import InputError
from noisycond.evaluation.agreement import ClipScore, class_agreement, prompts_for


# Class agreement


def test_share_of_images_of_the_class_asked_for():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 4.0, 3.0], [-1.0, -2.0, -3.0]])
    estimate = class_agreement(logits=logits, labels=torch.tensor([0, 2, 2, 0]))
    assert estimate.value == 0.75
    assert (estimate.of, estimate.size) == ("generated", 4)
    assert estimate.resample(torch.tensor([2, 2, 2, 0])) == 0.25


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (None, "the images have no labels"),
        (torch.tensor([0, 12]), "knows the classes 0 to 9, but class 12 was asked for"),
        (torch.tensor([-1, 1]), "but class -1 was asked for"),
        (torch.tensor([0]), "2 images, but 1 labels"),
    ],
)
def test_refused(labels, sentence):
    with pytest.raises(InputError, match=sentence):
        class_agreement(logits=torch.zeros(2, 10), labels=labels)


def test_no_images():
    with pytest.raises(InputError, match="at least 1 generated image"):
        class_agreement(logits=torch.zeros(0, 10), labels=torch.zeros(0, dtype=torch.int64))


# Prompts


def test_prompts():
    assert prompts_for(["tench", "{odd}"], torch.tensor([1, 0])) == ["a photo of a {odd}", "a photo of a tench"]
    assert prompts_for(["tench"], torch.tensor([0]), "the {}, or {}") == ["the tench, or tench"]
    with pytest.raises(InputError, match="no {} where"):
        prompts_for(["tench"], torch.tensor([0]), "a photo")
    with pytest.raises(InputError, match="2 class names, but an image of class 2"):
        prompts_for(["tench", "shark"], torch.tensor([0, 2]))


# CLIP score


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_tiny_clip(folder)
    return folder


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Six images of several sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 8), (8, 12), (20, 9), (8, 8), (16, 16), (30, 30)]
    return [
        Image.fromarray(torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())
        for size in sizes
    ]


PROMPTS = ["a photo of a cat", "dog", "a photo of a cat", "q", "z y x", "dog"]


def cosines(folder: Path, pictures, prompts) -> torch.Tensor:
    """Of the embeddings that the model itself returns for one image and one prompt at a time."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    values = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        with torch.no_grad():
            answer = model(**processor(text=[prompt], images=picture, return_tensors="pt", truncation=True))
        values.append((answer.image_embeds * answer.text_embeds).sum())
    return torch.stack(values)


@pytest.mark.parametrize("batch_size", [64, 2])
def test_clip_score(clip_folder, pictures, batch_size):
    expected = cosines(clip_folder, pictures, PROMPTS)
    assert expected.min() > 0 and expected.max() - expected.min() > 0.1  # pairs are told apart
    score = ClipScore(str(clip_folder), batch_size=batch_size)
    scores = score.score(pictures, PROMPTS)
    assert (scores - 100 * expected).abs().max() < 1e-3
    assert scores.dtype == torch.float32 and not scores.requires_grad
    with torch.no_grad():
        score.model.visual_projection.weight.neg_()  # all cosines are negative now
    assert (score.score(pictures, PROMPTS) == 0).all()


def test_the_weight_of_the_paper(clip_folder, pictures):
    scores = ClipScore(str(clip_folder)).score(pictures, PROMPTS)
    assert (ClipScore(str(clip_folder), weight=2.5).score(pictures, PROMPTS) - scores / 40).abs().max() < 1e-6


def test_grey_images_and_long_prompts(clip_folder, pictures):
    score = ClipScore(str(clip_folder))
    grey = pictures[0].convert("L")
    assert (score.score([grey], ["q"]) == score.score([grey.convert("RGB")], ["q"])).all()
    long = "a photo of a cat that looks at a dog"
    assert (score.score(pictures[:1], [long]) - 100 * cosines(clip_folder, pictures[:1], [long])).abs() < 1e-3
    assert score.score([], []).shape == (0,)
    with pytest.raises(InputError, match="1 images, but 2 prompts"):
        score.score([grey], ["q", "r"])


def test_missing_weights(tmp_path):
    with pytest.raises(
        InputError, match="--clip_model nobody/clip-nothing is no folder, nor .*; without network, put"
    ):
        ClipScore("nobody/clip-nothing")
    with pytest.raises(InputError, match="cannot be opened as a CLIP .*; without network, put config.json"):
        ClipScore(str(tmp_path))


def test_weights_of_another_model(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    save_tiny_clip(tmp_path)
    half = CLIPTextModel(
        CLIPTextConfig(vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    config = (tmp_path / "config.json").read_text()
    half.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="has no weights for .* tensors"):
        ClipScore(str(tmp_path))
