"""Cached text embeddings: the same as on the way, whatever the order and the number of processes; CEP stays fresh."""

import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from text_pipelines import SIZE

from noisycond.data import text_cache
from noisycond.data.text_cache import open_text_cache
from noisycond.denoisers import open_text_encoder
from noisycond.denoisers.text_pipelines import open_text_pipeline
from noisycond.errors import InputError
from noisycond.perturbation import ConditionEmbeddingPerturbation


TEXTS = ["a red 7", "x", "", "A red 7", "a b c d e f g h i j k", "x"]
ASKED = ["x", "a b c d e f g h i j k", "A red 7", "", "a red 7"]


def opened(text, folder, texts=TEXTS):
    return open_text_cache(texts, text, folder, Accelerator(cpu=True))


def encoder(seed: int = 0):
    torch.manual_seed(seed)
    return open_text_encoder("digits-bert", trained=False)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ldm", "pixart"])
def test_what_is_looked_up_is_what_the_encoder_gives(text_folders, kind, tmp_path):
    taken = open_text_pipeline(str(text_folders / kind), resolution=SIZE)
    text = taken.text
    tokens = text.encode(ASKED)
    expected = text.embed(tokens | {"is_null": torch.zeros(5, dtype=torch.bool)})
    null = text.embed(text.null() | {"is_null": torch.ones(1, dtype=torch.bool)})
    cached = opened(text, tmp_path)
    found, empty = cached.encode(ASKED), cached.null()
    names = {name for name, value in expected._asdict().items() if value is not None}
    assert set(found) == names | {"is_truncated"} and set(empty) == names and len(cached) == 5
    for name in names:
        assert found[name].dtype == getattr(expected, name).dtype
        assert (found[name] - getattr(expected, name)).abs().max() < 1e-5
        assert (empty[name] - getattr(null, name)).abs().max() < 1e-5
    assert torch.equal(found["is_truncated"], tokens["is_truncated"])
    assert tokens["is_truncated"].any() == (kind in ("sd", "sdxl"))


def test_a_step_from_the_cache_is_the_step_without_it_and_cep_is_fresh(text_folders, tmp_path):
    taken = open_text_pipeline(str(text_folders / "sdxl"), resolution=SIZE)
    denoiser = taken.denoiser(perturbation=ConditionEmbeddingPerturbation(1.0), embedding_dropout=0.1).train()
    noisy, timesteps = torch.randn(5, 4, 8, 8), torch.tensor([1, 200, 400, 600, 999])
    told = {"is_null": torch.tensor([False, True, False, False, False]), "index": torch.arange(5)}

    def predictions(encode, null, steps) -> list[torch.Tensor]:
        condition = encode(ASKED)
        for name, value in null.items():
            condition[name][1] = value[0]
        with torch.no_grad():
            return [denoiser(noisy, timesteps, condition | told, torch.arange(5) + 100 * step) for step in steps]

    on_the_way = predictions(taken.text.encode, taken.text.null(), (1, 2))
    cached = opened(taken.text, tmp_path)
    taken.text.park()
    looked_up = predictions(cached.encode, cached.null(), (1, 2))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(on_the_way, looked_up, strict=True))
    assert (looked_up[0] - looked_up[1]).abs().max() > 1e-4


def test_encoders_that_are_put_aside_are_no_part_of_the_denoiser(tmp_path):
    text = encoder()
    size, models = text.dim, text.encoders
    assert any(name.startswith("models.") for name in text.state_dict())
    text.park()
    assert not text.state_dict() and not list(text.parameters())
    assert text.dim == size and text.encoders == models
    with pytest.raises(ValueError, match="trained"):
        open_text_encoder("digits-bert", trained=True).park()


def test_the_second_opening_encodes_nothing(tmp_path, monkeypatch):
    first = opened(encoder(), tmp_path)
    monkeypatch.setattr(text_cache, "_encode_share", None)
    again = opened(encoder(), tmp_path, [*reversed(TEXTS), "x"])
    assert again.path == first.path and list(tmp_path.iterdir()) == [first.path]


@pytest.mark.parametrize("change", ["texts", "weights", "length", "vocabulary"])
def test_what_the_embeddings_depend_on_makes_another_cache(tmp_path, change):
    first, text, texts = opened(encoder(), tmp_path), encoder(change == "weights"), TEXTS
    if change == "texts":
        texts = [*TEXTS, "one more"]
    elif change == "length":
        text.encode.max_lengths = (20,)
    elif change == "vocabulary":
        text.encode.tokenizers[0].add_tokens(["red"])
        text.encoders[0].resize_token_embeddings(len(text.encode.tokenizers[0]))
    assert opened(text, tmp_path, texts).path != first.path


def test_a_broken_cache_is_made_anew(tmp_path, caplog):
    path = opened(encoder(), tmp_path).path
    (path / "sequence.npy").write_bytes(b"")
    cached = opened(encoder(), tmp_path)
    assert cached.path == path and cached.encode(["x"])["sequence"].abs().max() > 0
    assert "is not used and made anew: sequence.npy has 0 bytes" in caplog.text


def test_the_content_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache, "ENCODING_BATCH", 2)
    text = encoder()
    cached = opened(text, tmp_path)
    by_hash = {text_cache._hash(caption): caption for caption in TEXTS}
    texts, other = [by_hash[row] for row in cached.hashes.tolist()], tmp_path / "other"
    shutil.copytree(cached.path, other)
    for name in ("sequence", "is_truncated"):
        memory = np.lib.format.open_memmap(other / f"{name}.npy", mode="r+")
        memory[:] = 0
        memory.flush()
    for rank in (1, 0):
        process = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
        text_cache._encode_share(other, texts, text, process)
    assert (other / "sequence.npy").read_bytes() == (cached.path / "sequence.npy").read_bytes()
    assert (other / "is_truncated.npy").read_bytes() == (cached.path / "is_truncated.npy").read_bytes()


def test_a_pickle_holds_no_embeddings(tmp_path):
    cached = opened(encoder(), tmp_path)
    data = pickle.dumps(cached.encode)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data)(ASKED)["sequence"], cached.encode(ASKED)["sequence"])


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="the caption 'unheard of' was not encoded"):
        opened(encoder(), tmp_path / "a").encode(["x", "unheard of"])
    with pytest.raises(ValueError, match="trained cannot be cached"):
        opened(open_text_encoder("digits-bert", trained=True), tmp_path)
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match="--text_cache_dir .*no space left .*leave --cache_text_embeddings off"):
        opened(encoder(), tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())
