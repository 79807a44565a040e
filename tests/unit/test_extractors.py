"""Feature extractors: what is registered with torch-fidelity, their layers, and what is said where weights lack."""

import os
import pickle
from urllib.error import URLError

import pytest
import torch
import torch_fidelity
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_clip import CLIPVisual
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, create_sample_similarity

from noisycond.errors import InputError
from noisycond.evaluation import extractors
from noisycond.evaluation.digits_classifier import open_classifier, prepare, read_digits
from noisycond.evaluation.extractors import EXTRACTORS, SIMILARITIES, open_extractor, open_similarity


def random_images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def says(error: InputError, *words: str) -> None:
    """Checks that an error is one line that ends in a full stop and has these words."""
    text = str(error)
    assert "\n" not in text and text.endswith(".")
    for word in words:
        assert word in text


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No network, and nothing in torch hub's folder, which is returned."""

    def unreachable(*args, **options):
        raise URLError("[Errno -2] Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    return tmp_path / "torch" / "hub"


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of random weights for torch-fidelity's Inception, scaled so that activations neither vanish nor blow
    up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **options: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_weights):
    return open_extractor("inception-v3-compat", inception_weights)


class ListOfImages(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.images[place]


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """From the moments, in float64, by the eigenvalues of the product of the covariances."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(0), x.double().T.cov()) for x in (real, generated))
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


def test_digits_extractor_gives_the_classifier_s_features():
    extractor = open_extractor("digits")
    images = random_images(3, 32)
    pooled, logits, spatial = extractor(images)
    with torch.no_grad():
        expected = open_classifier()(prepare(images))
    assert torch.equal(pooled, expected.pooled)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(spatial, expected.spatial)
    assert {x.dtype for x in (pooled, logits, spatial)} == {torch.float32}
    assert not pooled.requires_grad


def test_torch_fidelity_computes_with_the_digits_extractor_what_our_features_give():
    (train, _), (test, labels) = read_digits("train"), read_digits("test")
    found = torch_fidelity.calculate_metrics(
        input1=ListOfImages(train[:400]),
        input2=ListOfImages(test),
        feature_extractor="digits",
        fid=True,
        isc=True,
        prc=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    extractor = open_extractor("digits")
    expected = frechet_distance(extractor(train[:400])[0], extractor(test)[0])
    assert found["frechet_inception_distance"] == pytest.approx(expected, rel=1e-4)
    assert 8 < found["inception_score_mean"] <= 10
    assert found["precision"] > 0.8
    assert (extractor(test)[1].argmax(1) == labels).float().mean() > 0.98


def test_registering_twice_changes_nothing():
    before = dict(FEATURE_EXTRACTORS_REGISTRY)
    extractors.register()
    assert before == FEATURE_EXTRACTORS_REGISTRY
    assert {spec.registered for spec in EXTRACTORS.values()} <= set(FEATURE_EXTRACTORS_REGISTRY)


@pytest.mark.parametrize("name", list(EXTRACTORS))
def test_every_layer_is_offered_by_its_extractor(name):
    spec = EXTRACTORS[name]
    offered = FEATURE_EXTRACTORS_REGISTRY[spec.registered].get_provided_features_list()
    layers = {spec.layers.pooled, spec.layers.logits, spec.layers.spatial} - {None}
    assert layers <= set(offered)


def test_settings_name_every_choice():
    settings = open_extractor("digits").settings()
    assert settings | {"weights": None} == {
        "extractor": "digits",
        "weights": None,
        "input": "uint8 RGB",
        "resize": "bilinear, antialiased",
        "resize_to": 32,
        "pooled": "64",
        "logits": "logits",
        "spatial": "spatial",
    }
    assert len(settings["weights"]) == 64
    assert settings == open_extractor("digits").settings()


def test_other_weights_have_another_hash(tmp_path):
    from noisycond.evaluation.digits_classifier import build_classifier, save_classifier

    save_classifier(build_classifier(1), tmp_path, {})
    assert open_extractor("digits", tmp_path).weights_hash != open_extractor("digits").weights_hash


def test_inception_gives_three_layers_of_one_pass(inception, inception_weights):
    images = random_images(2, 40)
    passes = []
    handle = inception.module.Conv2d_1a_3x3.register_forward_hook(lambda *args: passes.append(1))
    pooled, logits, spatial = inception(images)
    handle.remove()
    assert len(passes) == 1
    assert (pooled.shape, logits.shape, spatial.shape) == ((2, 2048), (2, 1008), (2, 2023))
    reference = create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(inception_weights),
    )
    expected_pooled, expected_logits = reference(images)
    assert torch.equal(pooled, expected_pooled)
    assert torch.equal(logits, expected_logits)


@torch.no_grad()
def test_spatial_inception_features_are_the_one_by_one_branch_behind_mixed_6c(inception):
    """TensorFlow's mixed_6 is the seventh block that joins branches: 5b 5c 5d (35×35), 6a, 6b, 6c, then 6d (17×17)."""
    images = random_images(2, 299)  # needs no resizing
    model = inception.module
    values = (images.float() - 128) / 128
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        values = model.get_submodule(name)(values)
    values = model.MaxPool_2(values)
    for name in ("5b", "5c", "5d", "6a", "6b", "6c"):
        values = model.get_submodule(f"Mixed_{name}")(values)
    assert values.shape == (2, 768, 17, 17)
    unit = model.Mixed_6d.branch1x1
    places = values.permute(0, 2, 3, 1)[..., :] @ unit.conv.weight[:7, :, 0, 0].T  # [2, 17, 17, 7]
    scale = unit.bn.weight[:7] / (unit.bn.running_var[:7] + unit.bn.eps).sqrt()
    expected = ((places - unit.bn.running_mean[:7]) * scale + unit.bn.bias[:7]).clamp(min=0).flatten(1)
    spatial = inception(images)[2]
    assert expected.std() > 0.01
    assert (spatial == 0).any() and (spatial > 0).any()
    assert (spatial - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("layers", [["spatial"], ["spatial", "64"], ["2048", "spatial", "768"]])
def test_spatial_features_come_with_any_other_layers(layers, inception, inception_weights):
    images = random_images(1, 299)
    model = create_feature_extractor(
        "inception-v3-compat-spatial",
        layers,
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(inception_weights),
    )
    found = model.convert_features_tuple_to_dict(model(images))
    assert list(found) == layers
    assert torch.equal(found["spatial"], inception(images)[2])


def test_opening_leaves_the_process_s_generator_alone(inception_weights):
    before = torch.random.get_rng_state()
    open_extractor("inception-v3-compat", inception_weights)
    open_extractor("digits")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_extracting_leaves_backend_settings_alone(monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    seen = []
    extractor = open_extractor("digits")
    extractor.module.register_forward_hook(lambda *args: seen.append(cudnn.allow_tf32))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = extractor(random_images(2, 32))
    assert seen == [False] and cudnn.allow_tf32
    assert torch.equal(under_autocast[0], extractor(random_images(2, 32))[0])


class Parameters(nn.Module):
    """Tensors by dotted names, as a module that can be scripted."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in state.items():
            if "." not in name:
                self.register_buffer(name, tensor)
        for child in sorted({name.partition(".")[0] for name in state if "." in name}):
            below = {name[len(child) + 1 :]: value for name, value in state.items() if name.startswith(f"{child}.")}
            self.add_module(child, Parameters(below))


def save_clip(path, dimension: int = 512, patch: int = 32) -> None:
    """A CLIP of one layer as a TorchScript archive."""
    torch.manual_seed(0)
    visual = CLIPVisual(dimension, 224, vision_layers=1, vision_width=64, vision_patch_size=patch)
    state = visual.state_dict() | {"text_projection": torch.zeros(8, dimension), "logit_scale": torch.zeros(())}
    torch.jit.save(torch.jit.script(Parameters(state)), str(path))


def test_clip_opens_from_a_file(tmp_path):
    save_clip(tmp_path / "clip.pt")
    extractor = open_extractor("clip-vit-b-32", tmp_path / "clip.pt")
    pooled, logits, spatial = extractor(random_images(2, 48))
    assert pooled.shape == (2, 512) and pooled.std() > 0
    assert logits is None and spatial is None


@pytest.mark.parametrize("dimension, patch", [(512, 16), (768, 32)])
def test_another_clip_than_was_named_is_refused(dimension, patch, tmp_path):
    save_clip(tmp_path / "clip.pt", dimension, patch)
    with pytest.raises(InputError) as caught:
        open_extractor("clip-vit-b-32", tmp_path / "clip.pt")
    says(caught.value, "--extractor_weights", "clip-vit-b-32", f"vit-…-{patch}", str(dimension))


def test_dinov2_opens_from_torch_hub_s_folder_without_network(no_network):
    repository = no_network / "facebookresearch_dinov2_main"
    repository.mkdir(parents=True)
    (repository / "hubconf.py").write_text(
        "from torch import nn\n"
        "def dinov2_vits14():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 384))\n"
    )
    pooled, logits, spatial = open_extractor("dinov2-vit-s-14")(random_images(2, 48))
    assert pooled.shape == (2, 384)
    assert logits is None and spatial is None


@pytest.mark.parametrize(
    "name, places",
    [
        ("inception-v3-compat", ["checkpoints/weights-inception-2015-12-05-6726825d.pth", "--extractor_weights FILE"]),
        ("vgg16", ["checkpoints/vgg16-397923af.pth", "--extractor_weights FILE"]),
        ("clip-vit-b-32", ["ViT-B-32.pt", "checkpoints/clip-vit-b-32-40d36571", "--extractor_weights FILE"]),
        ("dinov2-vit-s-14", ["facebookresearch_dinov2_main", "checkpoints/dinov2_vits14_pretrain.pth"]),
    ],
)
def test_weights_that_cannot_be_downloaded_are_named_with_their_place(name, places, no_network):
    with pytest.raises(InputError) as caught:
        open_extractor(name)
    says(caught.value, name, "https://", str(no_network), *places)
    assert ("--extractor_weights" in str(caught.value)) == (name != "dinov2-vit-s-14")


def test_a_damaged_download_is_named(no_network):
    place = no_network / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"half")
    with pytest.raises(InputError) as caught:
        open_extractor("inception-v3-compat")
    says(caught.value, str(place), "remove it")


def test_a_weights_file_put_in_the_named_place_is_found(no_network, inception_weights, inception):
    place = no_network / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    place.parent.mkdir(parents=True)
    os.link(inception_weights, place)
    assert open_extractor("inception-v3-compat").weights_hash == inception.weights_hash


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["inception-v3-compat", "vgg16", "clip-vit-b-32"])
def test_damaged_weights_are_one_sentence(name, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"nothing\n of this kind")
    with pytest.raises(InputError) as caught:
        open_extractor(name, path)
    says(caught.value, f"--extractor_weights {path}", f"not the weights of {name}", "expected")


def test_code_in_a_weights_file_is_not_run(tmp_path):
    trap = tmp_path / "sprung"
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"conv": Trap(trap)}))
    with pytest.raises(InputError):
        open_extractor("inception-v3-compat", tmp_path / "weights.pth")
    assert not trap.exists()


def test_weights_of_another_model_are_one_sentence(tmp_path):
    torch.save({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(InputError) as caught:
        open_extractor("inception-v3-compat", tmp_path / "other.pth")
    says(caught.value, "not the weights of inception-v3-compat", "Conv2d_1a_3x3")


@pytest.mark.parametrize(
    "name, path, words",
    [
        ("inception-v3-compat", "missing.pth", "there is no such file"),
        ("digits", "missing", "there is no such folder"),
        ("digits", ".", "needs config.json and model.safetensors"),
        ("dinov2-vit-s-14", "missing.pth", "has no effect on dinov2-vit-s-14"),
    ],
)
def test_wrong_weights_paths_are_one_sentence(name, path, words, tmp_path):
    with pytest.raises(InputError) as caught:
        open_extractor(name, tmp_path / path, flag="--weights")
    says(caught.value, "--weights", words)


def test_an_unknown_name_brings_the_nearest():
    with pytest.raises(InputError) as caught:
        open_extractor("inception-v3")
    says(caught.value, "--feature_extractor inception-v3", "did you mean 'inception-v3-compat'?", "dinov2-vit-g-14")
    with pytest.raises(InputError) as caught:
        open_similarity("lpips-digit")
    says(caught.value, "did you mean 'lpips-digits'?")


@pytest.mark.parametrize(
    "images, words",
    [
        (torch.zeros(2, 3, 32, 32), "float32 [2, 3, 32, 32]"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "uint8 [3, 32, 32]"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "uint8 [2, 1, 32, 32]"),
        ([1], "list"),
    ],
)
def test_anything_but_images_is_refused(images, words):
    with pytest.raises(InputError) as caught:
        open_extractor("digits")(images)
    says(caught.value, words)


def test_lpips_of_digits_is_the_formula():
    images, others = read_digits("test")[0][:3], read_digits("test")[0][3:6]
    similarity = open_similarity("lpips-digits")
    classifier = open_classifier()
    with torch.no_grad():
        expected = torch.zeros(3, dtype=torch.float64)
        for a, b in zip(classifier(prepare(images)).maps, classifier(prepare(others)).maps, strict=True):
            a, b = a.double(), b.double()
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
            expected += (a - b).square().sum(1).mean((1, 2))
    assert expected.min() > 0.1
    assert (similarity(images, others) - expected).abs().max() < 1e-5
    assert similarity(images, images).abs().max() == 0


def test_lpips_grows_with_the_difference():
    images, labels = read_digits("test")
    similarity = open_similarity("lpips-digits")
    order = labels.argsort(stable=True)
    same = similarity(images[order[:-1]], images[order[1:]]).mean()
    other = similarity(images[order], images[order.roll(180)]).mean()
    fainter = similarity(images, (images.float() * 0.9).to(torch.uint8)).mean()
    assert fainter < 0.5 * same < 0.5 * other


def test_torch_fidelity_opens_the_similarity_with_its_own_settings():
    images = read_digits("test", 64)[0]
    similarity = create_sample_similarity(
        "lpips-digits", cuda=False, verbose=False, sample_similarity_resize=32, sample_similarity_dtype="uint8"
    )
    assert similarity.get_name() == "lpips-digits"
    expected = open_similarity("lpips-digits")(images[:4], images[4:8])
    assert (similarity(images[:4], images[4:8]) - expected).abs().max() < 1e-4
    with pytest.raises(InputError, match="uint8"):
        create_sample_similarity("lpips-digits", cuda=False, verbose=False, sample_similarity_dtype="float32")


def test_missing_similarity_weights_are_named_with_their_place(no_network):
    assert set(SIMILARITIES) == {"lpips-digits", "lpips-vgg16"}
    with pytest.raises(InputError) as caught:
        open_similarity("lpips-vgg16")
    says(caught.value, "weights-vgg16-lpips.pth", "vgg16-397923af.pth", str(no_network / "checkpoints"))
