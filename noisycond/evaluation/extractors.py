"""Feature extractors by name, opened through torch-fidelity's registry; importing this module adds ours to it.

Letters: B images, H and W their sides, D pooled features, K classes of the extractor, S spatial features.
"""

import pickle
import textwrap
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA as CLIP_FILES
from torch_fidelity.feature_extractor_clip import MODEL_URLS as CLIP_URLS
from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA as DINOV2_MODELS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import (
    FEATURE_EXTRACTORS_REGISTRY,
    SAMPLE_SIMILARITY_REGISTRY,
    register_feature_extractor,
    register_sample_similarity,
)
from torch_fidelity.sample_similarity_base import SampleSimilarityBase
from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS
from torchvision.models import VGG16_Weights

from noisycond.errors import InputError, closest, in_one_line, require
from noisycond.evaluation.digits_classifier import RESOLUTION, open_classifier, prepare
from noisycond.first_stage import state_hash


ADM_SPATIAL_CHANNELS = 7  # `spatial[..., :7]` in the evaluator of arXiv:2105.05233
TENSORFLOW_RESIZE = "bilinear as in TensorFlow 1, not antialiased"
ANTIALIASED_RESIZE = "bilinear, antialiased"
URL_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
URL_VGG16 = VGG16_Weights.IMAGENET1K_V1.url


class DigitsExtractor(FeatureExtractorBase):
    """The digits classifier as torch-fidelity knows extractors, under the name `digits`.

    Args:
        name, features_list: as of the base class; the features are `64` (pooled), `spatial` and `logits`.
        feature_extractor_weights_path: a folder that noisycond.evaluation.digits_classifier wrote; None takes the
            classifier that ships with noisycond.
        feature_extractor_internal_dtype: `float32` or None.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        feature_extractor_internal_dtype: str | None = None,
        **unused,  # torch-fidelity hands every setting of its metrics to the extractor
    ):
        super().__init__(name, list(features_list))
        require(
            feature_extractor_internal_dtype in (None, "float32"),
            f"the extractor {name} computes in float32, not in {feature_extractor_internal_dtype}.",
        )
        self.classifier = open_classifier(feature_extractor_weights_path)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images uint8 [B, 3, H, W] to the features that were asked for, float32, in their order."""
        check_images(images)
        features = self.classifier(prepare(images))
        offered = {"64": features.pooled, "spatial": features.spatial, "logits": features.logits}
        return tuple(offered[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "64", "spatial", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "64", "kid": "64", "prc": "64"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class SpatialInception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with one feature more, `spatial` [B, 17 · 17 · 7]: what the ADM evaluator computes
    sFID from (arXiv:2105.05233, after Section 4 of arXiv:2103.03841).

    That is the node `mixed_6/conv:0` of the TensorFlow graph, cut to seven channels and flattened with channels last,
    so that statistics agree with those of ADM's reference batches entry by entry. The graph's `mixed_6` is `Mixed_6d`
    here (`mixed_3` is the reduction `Mixed_6a`), and its `conv` the 1×1 branch after the ReLU.
    """

    def __init__(self, name: str, features_list: list[str], **options):
        super().__init__(name, list(features_list), **options)
        self.branch: torch.Tensor | None = None
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output: torch.Tensor) -> None:
        self.branch = output

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images uint8 [B, 3, H, W] to the features that were asked for, float32, in their order; one pass."""
        check_images(images)
        asked = self.features_list
        # The parent stops after its last feature; `768` lies behind the branch.
        own = [layer for layer in asked if layer != "spatial"]
        self.features_list = own if "768" in own else [*own, "768"]
        try:
            features = self.convert_features_tuple_to_dict(super().forward(images))
            branch = self.branch[:, :ADM_SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        finally:
            self.features_list, self.branch = asked, None
        features["spatial"] = branch.flatten(1).to(torch.float32)
        return tuple(features[layer] for layer in asked)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return *FeatureExtractorInceptionV3.get_provided_features_list(), "spatial"

    @staticmethod
    def can_be_compiled() -> bool:
        return False  # a compiled graph would not call the hook


class DigitsSimilarity(SampleSimilarityBase):
    """LPIPS (Eq. 1 of arXiv:1801.03924) over the five feature maps of the digits classifier, under the name
    `lpips-digits`. No weights were learned from people's judgements: every channel has weight 1, which is the paper's
    formula before calibration. Distances lie in [0, 10].

    Args:
        name: as of the base class.
        sample_similarity_resize: a side in pixels that images are brought to before anything else.
        sample_similarity_dtype: `uint8` or None.
    """

    def __init__(
        self,
        name: str,
        sample_similarity_resize: int | None = None,
        sample_similarity_dtype: str | None = None,
        **unused,
    ):
        super().__init__(name)
        require(
            sample_similarity_dtype in (None, "uint8"),
            f"the similarity {name} takes images of uint8, not of {sample_similarity_dtype}.",
        )
        self.size = sample_similarity_resize
        self.classifier = open_classifier()

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, 3, H, W] to float32 [B, 29696], whose squared Euclidean distances are LPIPS: each map with
        unit length over the channels of every place, divided by the root of the number of places."""
        check_images(images)
        if self.size is not None:
            pixels = images.to(torch.float32)
            size = (self.size, self.size)
            images = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        maps = self.classifier(prepare(images)).maps
        return torch.cat(
            [F.normalize(each, dim=1, eps=1e-10).flatten(1) / each[0, 0].numel() ** 0.5 for each in maps], 1
        )

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, 3, H, W], twice, to their distances, float32 [B]."""
        return (self.embed(images) - self.embed(others)).square().sum(1)


def check_images(images: torch.Tensor) -> None:
    """Raises InputError for anything but images uint8 [B, 3, H, W]."""
    is_tensor = torch.is_tensor(images)
    what = f"{images.dtype} {list(images.shape)}".removeprefix("torch.") if is_tensor else type(images).__name__
    require(
        is_tensor and images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3,
        f"feature extractors take images as uint8 [B, 3, H, W], but got {what}.",
    )


def register() -> None:
    """Adds what is ours to torch-fidelity's registry, unless it is there."""
    for name, extractor in (("digits", DigitsExtractor), ("inception-v3-compat-spatial", SpatialInception)):
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(name, extractor)
    if "lpips-digits" not in SAMPLE_SIMILARITY_REGISTRY:
        register_sample_similarity("lpips-digits", DigitsSimilarity)


register()


@dataclass(frozen=True)
class Layers:
    """An extractor's names for what metrics use: pooled features, logits of a classifier, and spatial features."""

    pooled: str
    logits: str | None = None
    spatial: str | None = None


@dataclass(frozen=True)
class Weights:
    """Where an extractor's weights come from.

    Attributes:
        form: what a file of them must be; None where torch-fidelity takes no file.
        downloads: addresses, and where torch keeps what it downloaded, below `torch.hub.get_dir()`.
        check: raises InputError where a file is not of this form; run before torch-fidelity reads it.
    """

    form: str | None
    downloads: tuple[tuple[str, str], ...] = ()
    check: Callable[[str], None] = lambda path: None


@dataclass(frozen=True)
class ExtractorSpec:
    """An extractor: its name in torch-fidelity's registry, its layers, D, how and to what side it resizes, and its
    weights."""

    registered: str
    layers: Layers
    dimension: int
    size: int
    weights: Weights
    resize: str = TENSORFLOW_RESIZE


def check_state_dict(path: str) -> None:
    """Raises an error unless the file holds tensors by name and nothing else: torch-fidelity would run what code a
    pickle holds."""
    state = torch.load(path, map_location="meta", weights_only=True)
    if not (isinstance(state, dict) and all(torch.is_tensor(value) for value in state.values())):
        raise pickle.UnpicklingError("it holds something other than tensors by name")


def _checkpoint(url: str, name: str | None = None) -> tuple[str, str]:
    return url, f"checkpoints/{name or url.rpartition('/')[2]}"


def _clip(name: str, dimension: int, size: int = 224) -> ExtractorSpec:
    download = _checkpoint(CLIP_URLS[name], f"{name}-{CLIP_FILES[name]['hash']}.pt")
    return ExtractorSpec(
        name, Layers("clip"), dimension, size, Weights("a TorchScript archive as OpenAI released it", (download,))
    )


def _dinov2(name: str, dimension: int) -> ExtractorSpec:
    model = DINOV2_MODELS[name]
    repository = ("https://github.com/facebookresearch/dinov2", "facebookresearch_dinov2_main")
    download = _checkpoint(f"{URL_DINOV2}/{model}/{model}_pretrain.pth")
    return ExtractorSpec(name, Layers("dinov2"), dimension, 224, Weights(None, (repository, download)))


EXTRACTORS = {
    "digits": ExtractorSpec(
        "digits",
        Layers("64", "logits", "spatial"),
        64,
        RESOLUTION,
        Weights("a folder that `python -m noisycond.evaluation.digits_classifier` wrote"),
        ANTIALIASED_RESIZE,
    ),
    "inception-v3-compat": ExtractorSpec(
        "inception-v3-compat-spatial",
        Layers("2048", "logits_unbiased", "spatial"),
        2048,
        299,
        Weights("torch-fidelity's conversion of the weights", (_checkpoint(URL_INCEPTION_V3),), check_state_dict),
    ),
    "vgg16": ExtractorSpec(
        "vgg16",
        Layers("fc2"),
        4096,
        224,
        Weights("torchvision's weights", (_checkpoint(URL_VGG16),), check_state_dict),
    ),
    "clip-rn50": _clip("clip-rn50", 1024),
    "clip-rn101": _clip("clip-rn101", 512),
    "clip-rn50x4": _clip("clip-rn50x4", 640, 288),
    "clip-rn50x16": _clip("clip-rn50x16", 768, 384),
    "clip-rn50x64": _clip("clip-rn50x64", 1024, 448),
    "clip-vit-b-32": _clip("clip-vit-b-32", 512),
    "clip-vit-b-16": _clip("clip-vit-b-16", 512),
    "clip-vit-l-14": _clip("clip-vit-l-14", 768),
    "clip-vit-l-14-336px": _clip("clip-vit-l-14-336px", 768, 336),
    "dinov2-vit-s-14": _dinov2("dinov2-vit-s-14", 384),
    "dinov2-vit-b-14": _dinov2("dinov2-vit-b-14", 768),
    "dinov2-vit-l-14": _dinov2("dinov2-vit-l-14", 1024),
    "dinov2-vit-g-14": _dinov2("dinov2-vit-g-14", 1536),
}
# Names of sample similarities, and what they download.
SIMILARITIES = {
    "lpips-digits": (),
    "lpips-vgg16": (_checkpoint(URL_VGG16_LPIPS), _checkpoint(URL_VGG16)),
}


class Extractor:
    """A feature extractor, ready for images.

    Attributes:
        name: a key of EXTRACTORS. spec: its entry. layers: the spec's.
        weights_hash: SHA-256 of the weights: features of equal hash and settings are comparable.
    """

    def __init__(self, name: str, module: FeatureExtractorBase, device: torch.device | str | None = None):
        self.name, self.spec = name, EXTRACTORS[name]
        self.layers = self.spec.layers
        self.weights_hash = state_hash(module)
        self.device = torch.device("cpu" if device is None else device)
        self.module = module.to(self.device)

    def settings(self) -> dict[str, object]:
        """The choices that features depend on, to print and to compare."""
        return {
            "extractor": self.name,
            "weights": self.weights_hash,
            "input": "uint8 RGB",
            "resize": self.spec.resize,
            "resize_to": self.spec.size,
            **asdict(self.layers),
        }

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Features of a batch, from one pass.

        Args:
            images [B, 3, H, W]: uint8, RGB, of any size; the extractor resizes them (see `settings`).

        Returns:
            pooled [B, D], logits [B, K] or None, spatial [B, S] or None: float32, on the CPU.

        Raises:
            InputError: not such images.
        """
        check_images(images)
        with _exactly(), torch.autocast(self.device.type, enabled=False):
            found = self.module.convert_features_tuple_to_dict(self.module(images.to(self.device)))
        features = {layer: values.flatten(1).float().cpu() for layer, values in found.items()}
        return tuple(features.get(layer) for layer in asdict(self.layers).values())


@contextmanager
def _exactly():
    """Whatever a training run around the evaluation allows, features are computed in float32 and repeatably."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32
    try:
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32 = False, True, False, False
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32 = before


def open_extractor(
    name: str,
    weights_path: str | Path | None = None,
    device: torch.device | str | None = None,
    flag: str = "--extractor_weights",
) -> Extractor:
    """The extractor of that name, in eval mode; the process's random generator stays as it was.

    Args:
        name: a key of EXTRACTORS.
        weights_path: a file of its weights, for `digits` a folder; None downloads them once, or takes those that ship.
        device: where it runs; None is the CPU. flag: the flag that names `weights_path`, for messages.

    Raises:
        InputError: no such extractor, weights that cannot be downloaded (says which file to put where), or a file
            that is missing, damaged or another model's.
    """
    require(
        name in EXTRACTORS,
        f"--feature_extractor {name}: there is no such extractor{closest(name, EXTRACTORS)}; there are "
        f"{', '.join(EXTRACTORS)}.",
    )
    spec = EXTRACTORS[name]
    layers = [layer for layer in asdict(spec.layers).values() if layer is not None]
    if weights_path is not None:
        _check_path(name, spec, Path(weights_path), flag)
    path = None if weights_path is None else str(weights_path)
    try:
        with torch.random.fork_rng(devices=[]):
            if path is not None:
                spec.weights.check(path)
            build = FEATURE_EXTRACTORS_REGISTRY[spec.registered]
            module = build(spec.registered, layers, feature_extractor_weights_path=path)
        module.eval().requires_grad_(False)
        _check_model(name, spec, module)
    except Exception as error:  # a dozen types: pickles, archives, shapes, addresses, certificates
        if isinstance(error, InputError) and not spec.weights.downloads:  # says it all
            raise InputError(str(error) if path is None else f"{flag} {error}") from error
        reason = _shortly(error)
        if path is None:
            raise _cannot_be_had(name, spec.weights.downloads, reason, spec.weights.form and flag) from error
        raise InputError(
            f"{flag} {path}: not the weights of {name}, or a damaged file ({reason}); expected {spec.weights.form}."
        ) from error
    return Extractor(name, module, device)


def open_similarity(name: str, device: torch.device | str | None = None) -> SampleSimilarityBase:
    """A sample similarity of torch-fidelity's registry, in eval mode: called with images uint8 [B, 3, H, W] twice, it
    returns their distances, float32 [B].

    Raises:
        InputError: a name that is not in SIMILARITIES, or weights that cannot be downloaded.
    """
    require(
        name in SIMILARITIES,
        f"--lpips_similarity {name}: there is no such similarity{closest(name, SIMILARITIES)}; there are "
        f"{', '.join(SIMILARITIES)}.",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            module = SAMPLE_SIMILARITY_REGISTRY[name](name)
    except Exception as error:
        raise _cannot_be_had(name, SIMILARITIES[name], _shortly(error)) from error
    return module.eval().requires_grad_(False).to("cpu" if device is None else device)


def _shortly(error: Exception) -> str:
    return textwrap.shorten(in_one_line(error), 160, placeholder=" …").rstrip(".")


def _check_path(name: str, spec: ExtractorSpec, path: Path, flag: str) -> None:
    require(
        spec.weights.form is not None,
        f"{flag} has no effect on {name}: torch-fidelity opens it from torch hub's folder; leave it off.",
    )
    if name == "digits":
        require(path.is_dir(), f"{flag} {path}: there is no such folder.")
    else:
        require(path.is_file(), f"{flag} {path}: there is no such file.")


def _check_model(name: str, spec: ExtractorSpec, module: FeatureExtractorBase) -> None:
    """torch-fidelity builds whatever CLIP the file holds: this raises where it is another than was named."""
    if not name.startswith("clip-"):
        return
    visual = module.model.visual
    patch = visual.conv1.weight.shape[-1]
    kind = f"vit-…-{patch}" if hasattr(visual, "proj") else "rn"
    expected = f"vit-…-{name.removesuffix('-336px').rpartition('-')[2]}" if name.startswith("clip-vit") else "rn"
    require(
        (kind, module.resolution, visual.output_dim) == (expected, spec.size, spec.dimension),
        f"it holds a {kind} for images of {module.resolution} pixels with {visual.output_dim} features",
    )


def _cannot_be_had(
    name: str, downloads: tuple[tuple[str, str], ...], reason: str, flag: str | None = None
) -> InputError:
    """The error that says which files to put where."""
    folder = Path(torch.hub.get_dir())
    present = [str(folder / place) for _, place in downloads if (folder / place).is_file()]
    missing = [(url, folder / place) for url, place in downloads if not (folder / place).exists()]
    if not missing:
        return InputError(
            f"{name} cannot be opened ({reason}): {' or '.join(present)} is damaged or another model's; remove it to "
            "have it downloaded anew."
        )
    puts = " and ".join(f"{url} to {place}" for url, place in missing)
    otherwise = f", or name a copy of it with {flag} FILE" if flag else ""
    return InputError(f"the weights of {name} cannot be downloaded ({reason}): bring {puts}{otherwise}.")
