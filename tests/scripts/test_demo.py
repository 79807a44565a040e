"""The embedded default, trained once per test run as a user launches it: legible digits, and guidance that works."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.svm import SVC

from noisycond import sampling
from noisycond.data.sources import Digits


def features(images) -> np.ndarray:
    small = [image.convert("L").resize((8, 8), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in small])


@pytest.fixture(scope="module")
def classifier() -> SVC:
    """An independent classifier: a support vector machine on 8×8 pixels, checked on held-out digits."""
    train, test = ((features([d.read(i, 32) for i in range(len(d))]), d.labels) for d in map(Digits, Digits.SPLITS))
    model = SVC(C=10, gamma="scale").fit(*train)
    assert model.score(*test) > 0.98
    return model


def agreement(classifier, folder, guidance_scale: float, count: int = 150) -> float:
    pipeline = sampling.open_pipeline(str(folder))
    labels = sampling.balanced_labels(count, 10).tolist()
    settings = {"seed": 7, "guidance_scale": guidance_scale, "num_inference_steps": 15}
    images = sampling.sample_all(pipeline, labels, **settings)
    return float((classifier.predict(features(images)) == np.array(labels)).mean())


def test_leaves_everything(trained):
    arguments = json.loads((trained / "run.json").read_text())["arguments"]
    assert arguments["cep_gamma"] == 1.0 and arguments["cep_type"] == "uniform" and arguments["cache_latents"]
    assert arguments["dataset_name"] == "digits" and arguments["denoiser"] == "dit-mini"
    assert Image.open(trained / "samples/final.png").size == (10 * 66 + 2, 10 * 66 + 2)
    for name in ("loss.png", "README.md", "model_index.json", "corruption.json", "logs"):
        assert (trained / name).exists()
    losses = [json.loads(line)["loss"] for line in (trained / "log.jsonl").read_text().splitlines()]
    assert len(losses) == arguments["max_train_steps"]
    assert np.mean(losses[-50:]) < 0.25 * np.mean(losses[:10])


def test_guidance_raises_agreement_with_the_asked_class(trained, classifier):
    unguided, guided = agreement(classifier, trained, 1.0), agreement(classifier, trained, 2.0)
    assert unguided > 0.75
    assert guided > max(0.95, unguided)


def test_the_null_class_is_unconditional(trained):
    """What guidance subtracts does not depend on a class: row 1000 differs from every class row."""
    table = sampling.open_pipeline(str(trained)).transformer.transformer_blocks[0].norm1.emb
    table = table.class_embedder.embedding_table.weight
    assert table.shape[0] == 1001
    assert (table[:10] - table[1000]).abs().max(dim=1).values.min() > 0.01
