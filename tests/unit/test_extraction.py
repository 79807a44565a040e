"""Features are extracted once, go on where they were cut, and are those of the images."""

import numpy as np
import pytest
import torch
from PIL import Image

from noisycond.data.sources import ImageSource
from noisycond.errors import InputError
from noisycond.evaluation import extraction
from noisycond.evaluation.extraction import extract_features, extract_in_memory
from noisycond.evaluation.images import Resize


class Colours(ImageSource):
    """Images of one colour each: their number."""

    def __init__(self, count: int, side: int = 4):
        self.labels, self.class_names = np.arange(count) % 3, ["a", "b", "c"]
        self.count, self.side, self.fingerprint, self.seen = count, side, f"{count}/{side}", []

    def __len__(self) -> int:
        return self.count

    def read(self, index, resolution=None):
        self.seen.append(index)
        return Image.new("RGB", (self.side, self.side), (index, 0, 0))

    def name(self, index):
        return f"colours/{index}"


def colour(images: torch.Tensor):
    """The colour as the feature, its square as the spatial one."""
    red = images[:, 0].float().mean(dim=(1, 2))[:, None]
    return red, None, torch.cat([red**2, -red], dim=1)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(extraction, "CHUNK", 10)


def extract(source, folder, accelerator, function=colour, **options):
    options = {"batch_size": 4, "resize": Resize(), "settings": {"weights": "0"}} | options
    settings, resize = options.pop("settings"), options.pop("resize")
    return extract_features("--images", source, function, settings, resize, folder, accelerator, **options)


def test_features_are_those_of_the_images(tmp_path, accelerator, small_chunks):
    for features in (
        extract(Colours(27), tmp_path, accelerator),
        extract_in_memory("--images", Colours(27), colour, Resize(), batch_size=4),
    ):
        assert features.pooled.flatten().tolist() == list(range(27)) and features.logits is None
        assert (features.spatial[:, 0] - features.pooled[:, 0] ** 2).abs().max() == 0
        assert features.labels.tolist() == [number % 3 for number in range(27)]


def test_only_what_is_wanted_is_kept(tmp_path, accelerator):
    assert extract(Colours(5), tmp_path, accelerator, wanted=["pooled"]).spatial is None
    assert not list(tmp_path.rglob("spatial.npy"))


def test_an_interrupted_extraction_goes_on(tmp_path, accelerator, small_chunks):
    def fails(images):
        if images[0, 0, 0, 0] == 14:
            raise KeyboardInterrupt
        return colour(images)

    with pytest.raises(KeyboardInterrupt):
        extract(Colours(27), tmp_path, accelerator, fails)
    source = Colours(27)
    features = extract(source, tmp_path, accelerator)
    assert features.pooled.flatten().tolist() == list(range(27))
    assert 10 in source.seen and 5 not in source.seen  # the second chunk anew, the first not

    again = Colours(27)
    assert (extract(again, tmp_path, accelerator).pooled - features.pooled).abs().max() == 0
    assert set(again.seen) == {0}  # for its size


@pytest.mark.parametrize("change", [{"settings": {"weights": "1"}}, {"resize": Resize(3)}, {"batch_size": 5}])
def test_other_weights_or_sizes_are_extracted_anew(tmp_path, accelerator, change):
    extract(Colours(6), tmp_path, accelerator)
    source = Colours(6)
    extract(source, tmp_path, accelerator, **change)
    assert set(source.seen) == set(range(6))


def test_several_sizes_are_refused_unless_resized(tmp_path, accelerator):
    class Mixed(Colours):
        def read(self, index, resolution=None):
            return Image.new("RGB", (4, 4 + index % 2))

    with pytest.raises(InputError, match=r"several sizes: colours/1 has 4×5 pixels, others 4×4; .*--resolution"):
        extract(Mixed(6), tmp_path, accelerator)
    assert len(extract(Mixed(6), tmp_path, accelerator, resize=Resize(4))) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_sentence_and_what_is_done_is_kept(tmp_path, accelerator, small_chunks, workers):
    class Broken(Colours):
        def read(self, index, resolution=None):
            if index == 12:
                raise OSError("truncated")
            return super().read(index)

    with pytest.raises(InputError, match="--images: colours/12 cannot be read"):
        extract(Broken(27), tmp_path, accelerator, workers=workers)
    assert [path.name for path in sorted(tmp_path.rglob("*.done"))] == ["000000.done"]


def test_features_that_are_not_finite_are_refused(tmp_path, accelerator):
    def infinite(images):
        pooled = images[:, 0].float().mean(dim=(1, 2))[:, None]
        return torch.where(pooled == 3, torch.inf, pooled), None, None

    with pytest.raises(InputError, match="features of colours/3 are not finite"):
        extract(Colours(6), tmp_path, accelerator, infinite)


def test_images_that_were_touched_are_extracted_anew(tmp_path, accelerator):
    for version in ("1", "2"):
        source = Colours(6)
        source.version = version  # names and sizes, of which the fingerprint of a folder of classes is made, stay
        extract(source, tmp_path, accelerator)
        assert set(source.seen) == set(range(6))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_is_drawn_from_the_global_generator(workers):
    before = torch.random.get_rng_state()
    extract_in_memory("--images", Colours(6), colour, Resize(), batch_size=4, workers=workers)
    assert torch.equal(torch.random.get_rng_state(), before)
