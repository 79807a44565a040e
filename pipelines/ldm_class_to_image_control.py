# Copyright 2026 The noisycond authors. Licensed under the Apache License, Version 2.0.
"""Class label and control image to image by latent diffusion: a frozen class-conditional U-Net with a ControlNet
(arXiv:2302.05543) or a T2I-Adapter (arXiv:2302.08453).

This file stands alone: it needs torch and diffusers, and travels with every ControlNet, adapter and exported pipeline.
Letters: N images, K classes, C latent channels, h × w their size, H × W that of images, D the embedding dimension,
L tokens.
"""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, T2IAdapter, UNet2DConditionModel, VQModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.models import MultiControlNetModel
from diffusers.models.adapter import MultiAdapter
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors import SafetensorError


logger = logging.get_logger(__name__)
PIPELINE_FILE = "pipeline.py"  # the name of this file beside a ControlNet or an adapter
SOURCE = Path(__file__).read_text(encoding="utf-8")  # now, as diffusers may replace what it loaded
# How diffusers and transformers fail on pieces that are damaged, of another kind, or of another version.
FAILURES = (AttributeError, ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
Callback = Callable[[DiffusionPipeline, int, int, dict], dict]


def get_guidance_scale_embedding(
    w: torch.Tensor, embedding_dim: int = 512, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Guidance scales as a U-Net with `time_cond_proj_dim` takes them: the sinusoidal embedding of 1000 w (Section 4.2
    of arXiv:2310.04378).

    Args:
        w [N]: the guidance scale less 1, so that 0 is no guidance.
        embedding_dim: the U-Net's `time_cond_proj_dim`, 4 or more.

    Returns:
        [N, embedding_dim]: sines, then cosines, of 1000 w times frequencies that fall from 1 to 1/10000; of an odd
        dimension the last is 0.
    """
    half = embedding_dim // 2
    step = torch.tensor(10000.0, dtype=dtype, device=w.device).log() / (half - 1)
    phases = 1000.0 * w.to(dtype)[:, None] * torch.exp(-step * torch.arange(half, dtype=dtype, device=w.device))
    embedding = torch.cat([phases.sin(), phases.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, embedding_dim % 2))


class ClassEmbedder(ModelMixin, ConfigMixin):
    """A learned embedding per class, with the null class, which stands for "no condition", in the last row.

    Args:
        num_classes: K; the table has K + 1 rows.
        embed_dim: D, the `cross_attention_dim` of the U-Net.
    """

    @register_to_config
    def __init__(self, num_classes: int = 1000, embed_dim: int = 512):
        super().__init__()
        self.embedding = torch.nn.Embedding(num_classes + 1, embed_dim)

    @property
    def null_class(self) -> int:
        """The label of an image without a condition."""
        return self.config.num_classes

    def forward(self, class_labels: torch.LongTensor) -> torch.Tensor:
        """Labels int64 [N] in [0, K] to a sequence of one token each: [N, 1, D]."""
        return self.embedding(class_labels)[:, None]

    @classmethod
    def from_table(cls, table: torch.Tensor) -> "ClassEmbedder":
        """An embedder that holds this table [K + 1, D], null embedding last."""
        embedder = cls(len(table) - 1, table.shape[1])
        embedder.embedding = torch.nn.Embedding.from_pretrained(table.detach().clone(), freeze=False)
        return embedder.eval()


def write_pipeline_file(folder: str | Path) -> None:
    """Writes this file as `pipeline.py` into the folder of a ControlNet or an adapter, so that it can be opened where
    noisycond is not installed. [`LDMAdapter.save_pretrained`] does so by itself."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / PIPELINE_FILE).write_text(SOURCE, encoding="utf-8")


def stock_adapter_fits(unet: UNet2DConditionModel) -> bool:
    """Whether a `T2IAdapter` of diffusers (`full_adapter`), whose features halve from one to the next, fits a U-Net:
    it does where every block but the last attends (Stable Diffusion), not where the first one does not (LDM-4)."""
    blocks = len(unet.config.block_out_channels)
    return _feature_strides(unet) == tuple(2**block for block in range(blocks))


def _feature_strides(unet: UNet2DConditionModel) -> tuple[int, ...]:
    """How much smaller than the latents the features are that a U-Net adds, one per down block.

    Raises:
        ValueError: a block of a type whose place of addition is not known.
    """
    strides, last = [], len(unet.config.down_block_types) - 1
    for block, kind in enumerate(unet.config.down_block_types):
        if kind not in ("DownBlock2D", "CrossAttnDownBlock2D"):
            raise ValueError(
                "an adapter's features are added to blocks of the types DownBlock2D and CrossAttnDownBlock2D, but "
                f"this U-Net has a {kind}"
            )
        # `UNet2DConditionModel.forward` adds within a block that attends, and after one that does not; the last block
        # does not halve.
        is_halved = kind == "DownBlock2D" and block != last
        strides.append(2 ** (block + is_halved))
    return tuple(strides)


class _Residual(torch.nn.Module):
    """A residual block: two convolutions, ReLU between them."""

    def __init__(self, channels: int):
        super().__init__()
        self.wide = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.narrow = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.narrow(self.wide(hidden).relu())


class LDMAdapter(ModelMixin, ConfigMixin):
    """A T2I-Adapter (arXiv:2302.08453) for any U-Net of `DownBlock2D` and `CrossAttnDownBlock2D`.

    The control is brought to the latents' size by a pixel unshuffle; each scale has a convolution and residual blocks,
    and gives a feature that is added to the U-Net's encoder. diffusers' `T2IAdapter` halves its
    features from one to the next, which is not where a U-Net adds them whose first block does not attend (LDM-4).

    Args:
        in_channels: of the control.
        channels: of the features, one per down block of the U-Net, as its `block_out_channels`.
        strides: how much smaller than the latents each feature is; each a multiple of the one before.
        num_res_blocks: residual blocks per scale.
        downscale_factor: the first stage's factor.
    """

    _source = SOURCE

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        channels: tuple[int, ...] = (320, 640, 1280, 1280),
        strides: tuple[int, ...] = (1, 2, 4, 8),
        num_res_blocks: int = 2,
        downscale_factor: int = 8,
    ):
        super().__init__()
        self.unshuffle = torch.nn.PixelUnshuffle(downscale_factor)
        self.conv_in = torch.nn.Conv2d(in_channels * downscale_factor**2, channels[0], 3, padding=1)
        self.scales = torch.nn.ModuleList()
        before = (channels[0], *channels), (1, *strides)
        for width, out_width, stride, out_stride in zip(before[0], channels, before[1], strides, strict=False):
            ratio = out_stride // stride
            layers = [torch.nn.AvgPool2d(ratio, ceil_mode=True)] if ratio > 1 else []
            layers += [torch.nn.Conv2d(width, out_width, 1)] if width != out_width else []
            layers += [_Residual(out_width) for _ in range(num_res_blocks)]
            self.scales.append(torch.nn.Sequential(*layers))

    @classmethod
    def for_unet(cls, unet: UNet2DConditionModel, factor: int) -> "LDMAdapter":
        """A new adapter whose features have the sizes that the U-Net adds; of its configuration alone.

        Args:
            factor: of the first stage.
        """
        channels = tuple(unet.config.block_out_channels)
        return cls(channels=channels, strides=_feature_strides(unet), downscale_factor=factor)

    @staticmethod
    def features_like(unet: UNet2DConditionModel, height: int, width: int) -> list[tuple[int, int, int]]:
        """The shapes [channels, height, width] of the features that a U-Net adds to its down blocks.

        Args:
            height, width: of the latents.

        Raises:
            ValueError: a block of a type whose place of addition is not known.
        """
        channels = unet.config.block_out_channels
        return [
            (channel, math.ceil(height / stride), math.ceil(width / stride))
            for channel, stride in zip(channels, _feature_strides(unet), strict=True)
        ]

    def fits(self, unet: UNet2DConditionModel) -> bool:
        """Whether the features have the sizes that the U-Net adds."""
        wanted = tuple(unet.config.block_out_channels), _feature_strides(unet)
        return (tuple(self.config.channels), tuple(self.config.strides)) == wanted

    @property
    def downscale_factor(self) -> int:
        return self.config.downscale_factor

    @property
    def total_downscale_factor(self) -> int:
        """What the control's height and width must be multiples of for features of whole sizes."""
        return self.config.downscale_factor * max(self.config.strides)

    def forward(self, control: torch.Tensor) -> list[torch.Tensor]:
        """A control [N, 3, H, W] in [0, 1] to a feature per down block, [N, channels, H / (factor stride), …]."""
        hidden = self.conv_in(self.unshuffle(control))
        features = []
        for scale in self.scales:
            hidden = scale(hidden)
            features.append(hidden)
        return features

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `config.json` with the name of this class for diffusers' `AutoModel`, and this file beside it, so
        that the folder opens without noisycond. Called by `save_pretrained`, which writes the rest."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        _write_own_code(self, Path(save_directory))

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict:
        # `auto_map` is for `AutoModel`, which reads it by itself; here it would be an unexpected setting.
        settings = super()._dict_from_json_file(json_file)
        settings.pop("auto_map", None)
        return settings


class LDMMultiAdapter(ModelMixin, ConfigMixin):
    """Several adapters in one component, which is saved and loaded as one model.

    Args:
        settings: the configuration of each, with its class (`LDMAdapter` or `T2IAdapter`) as `_class_name`.
    """

    _source = SOURCE

    @register_to_config
    def __init__(self, settings: list[dict]):
        super().__init__()
        kinds = {"LDMAdapter": LDMAdapter, "T2IAdapter": T2IAdapter}
        self.adapters = torch.nn.ModuleList()
        for each in settings:
            options = {name: value for name, value in each.items() if name != "_class_name"}
            self.adapters.append(kinds[each["_class_name"]](**options))

    @classmethod
    def of(cls, adapters: list) -> "LDMMultiAdapter":
        """These adapters, not copies of them."""
        settings = []
        for adapter in adapters:
            settings.append({"_class_name": type(adapter).__name__, **_settings(adapter)})
        with torch.device("meta"):
            together = cls(settings)
        together.adapters = torch.nn.ModuleList(adapters)
        return together.train(adapters[0].training)

    def forward(self, controls: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """A control [N, 3, H, W] for each adapter to the features of each."""
        return [adapter(control) for adapter, control in zip(self.adapters, controls, strict=True)]

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """As [`LDMAdapter.save_config`]."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        _write_own_code(self, Path(save_directory))

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict:
        # As in `LDMAdapter`.
        settings = super()._dict_from_json_file(json_file)
        settings.pop("auto_map", None)
        return settings


def _settings(adapter: LDMAdapter | T2IAdapter) -> dict:
    """What another adapter of the same sizes is made with. `from_config` would forget what was given by position."""
    known = inspect.signature(type(adapter)).parameters
    return {name: value for name, value in adapter.config.items() if name in known}


def _write_own_code(model: LDMAdapter | LDMMultiAdapter, folder: Path) -> None:
    """The file that the model's class stands in, and where `AutoModel` finds it."""
    config_file = folder / model.config_name
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoModel": f"{PIPELINE_FILE.removesuffix('.py')}.{type(model).__name__}"}
    config_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / PIPELINE_FILE).write_text(model._source, encoding="utf-8")


@dataclass
class Control:
    """What the controls of one call are, how strongly each acts, and when.

    Attributes:
        images: [N, 3, H, W] in [0, 1] per control.
        scales: per control.
        starts, ends: shares of the steps in [0, 1] per control, in between which it acts.
        guess_mode: only the conditional half gets control, more in deeper blocks (ControlNet alone).
        features: of adapters, per control and down block.
    """

    images: list[torch.Tensor]
    scales: list[float]
    starts: list[float]
    ends: list[float]
    guess_mode: bool = False
    features: list[list[torch.Tensor]] | None = None

    def scales_at(self, step: int, steps: int) -> list[float]:
        """The scales in this step, 0 for a control that does not act in the whole of it."""
        acting = [
            step / steps >= start and (step + 1) / steps <= end
            for start, end in zip(self.starts, self.ends, strict=True)
        ]
        return [scale if acts else 0.0 for scale, acts in zip(self.scales, acting, strict=True)]


def _join_controls(controlnet, adapter) -> tuple:
    """ControlNet and adapter, one of them None, a list as one model."""
    if (controlnet is None) == (adapter is None):
        given = "neither is" if controlnet is None else "both are"
        raise ValueError(f"exactly one of `controlnet` and `adapter` must be given, but {given}")
    if isinstance(adapter, MultiAdapter):  # it saves three or more so that they are not found again
        adapter = list(adapter.adapters)
    if isinstance(controlnet, MultiControlNetModel) and len(controlnet.nets) == 1:
        controlnet = list(controlnet.nets)
    name, given = ("controlnet", controlnet) if controlnet is not None else ("adapter", adapter)
    models = list(given) if isinstance(given, (list, tuple)) else _control_models(controlnet, adapter)
    if not models:
        raise ValueError(f"`{name}` is an empty list")
    # By name, as a class may stand in another copy of this file.
    wanted = ("ControlNetModel",) if name == "controlnet" else ("LDMAdapter", "T2IAdapter")
    for model in models:
        if type(model).__name__ not in wanted:
            raise ValueError(f"`{name}` is a {type(model).__name__}, but must be a {' or '.join(wanted)}")
    if isinstance(given, (list, tuple)):
        join = MultiControlNetModel if name == "controlnet" else LDMMultiAdapter.of
        given = join(models) if len(models) > 1 else models[0]
    return (given, None) if name == "controlnet" else (None, given)


def _control_models(controlnet, adapter) -> list:
    """The ControlNets or adapters, one per control."""
    model = controlnet if controlnet is not None else adapter
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    several = getattr(model, "nets", None) or getattr(model, "adapters", None)
    return [model] if several is None else list(several)


def _control_factor(model) -> int:
    """How much smaller than the control image the latents are that a ControlNet or an adapter is for."""
    if isinstance(model, ControlNetModel):
        return 2 ** (len(model.config.conditioning_embedding_out_channels) - 1)
    # The larger one unshuffles to half the latents' size.
    return model.config.downscale_factor // (2 if model.config.get("adapter_type") == "full_adapter_xl" else 1)


def _check_controls(unet: UNet2DConditionModel, models: list, factor: int) -> None:
    """Raises ValueError for a ControlNet or an adapter that was made for another base; the message names what
    differs.

    Args:
        factor: of the first stage.
    """
    for model in models:
        what = "ControlNet" if isinstance(model, ControlNetModel) else "adapter"
        channels = model.config.conditioning_channels if what == "ControlNet" else model.config.in_channels
        if what == "ControlNet":
            _check_controlnet(model, unet)
        stride = _control_factor(model)
        if stride != factor:
            name = "conditioning_embedding_out_channels" if what == "ControlNet" else "downscale_factor"
            raise ValueError(
                f"the {what} is for another base: it takes control images of {stride} times the latents' size "
                f"({name}), but the first stage's factor is {factor}"
            )
        if channels != 3:
            raise ValueError(f"the {what} takes control images of {channels} channels, but they are RGB here")
        if what == "adapter":
            _check_adapter(model, unet, factor)


def _check_controlnet(controlnet: ControlNetModel, unet: UNet2DConditionModel) -> None:
    for name in ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim"):
        given, wanted = (getattr(model.config, name) for model in (controlnet, unet))
        blocks = len(unet.config.down_block_types)
        spelled = [
            tuple(value) if isinstance(value, (list, tuple)) else (value,) * blocks for value in (given, wanted)
        ]
        if spelled[0] != spelled[1]:
            raise ValueError(
                f"the ControlNet is for another base: its {name} is {given}, but that of this U-Net is {wanted}"
            )


def _check_adapter(adapter: LDMAdapter | T2IAdapter, unet: UNet2DConditionModel, factor: int) -> None:
    size = 2 ** len(unet.config.block_out_channels)
    wanted = LDMAdapter.features_like(unet, size, size)
    with torch.device("meta"):  # sizes without weights
        found = type(adapter)(**_settings(adapter))(torch.empty(1, 3, size * factor, size * factor))
    found = [tuple(feature.shape[1:]) for feature in found]
    # The U-Net adds one more to its middle block, where it is given.
    if found not in (wanted, [*wanted, wanted[-1]]):
        raise ValueError(
            f"the adapter is for another base: for latents of {size}×{size} its features have the sizes {found}, but "
            f"this U-Net adds {wanted}"
        )


class LDMClassToImageControlPipeline(DiffusionPipeline):
    r"""Pipeline for class-conditional image generation by latent diffusion that follows a control image.

    The pipeline of the base, `LDMClassToImagePipeline`, with a ControlNet or an adapter beside its U-Net; with a scale
    of 0 the images are those of the base, bit for bit. The superclass documents what all pipelines can do (saving,
    devices, offloading, attention of xformers).

    Args:
        unet ([`UNet2DConditionModel`]): denoises latents; attends to the class embedding.
        class_embedder ([`ClassEmbedder`]): labels to embeddings.
        scheduler ([`SchedulerMixin`]): any scheduler of diffusers for the U-Net's prediction type; of a latent
            consistency model an [`LCMScheduler`].
        vqvae ([`VQModel`] or [`AutoencoderKL`], *optional*): the first stage; without it only `output_type="latent"`
            works.
        controlnet ([`ControlNetModel`], [`MultiControlNetModel`] or a list, *optional*): what control acts through;
            several are added up.
        adapter ([`LDMAdapter`], [`T2IAdapter`] or a list, *optional*): the same, instead of a ControlNet.
        id2label (`dict[int, str]`, *optional*): class names.

    Raises:
        ValueError: not exactly one of ControlNet and adapter is given, or it is for another base.
    """

    # A ControlNet stays with the U-Net, as both run in every step.
    model_cpu_offload_seq = "class_embedder->adapter->unet->vqvae"
    # Layer by layer it fails: VQModel reads the codebook from outside its layer.
    _exclude_from_cpu_offload = ["vqvae"]
    _optional_components = ["vqvae", "controlnet", "adapter"]
    _callback_tensor_inputs = ["latents", "class_embeds"]
    _module = "ldm_class_to_image_control"  # the name of this file in an exported pipeline
    _source = SOURCE
    _own_classes = (ClassEmbedder, LDMAdapter, LDMMultiAdapter)
    _pieces = {
        "class_embedder": ("class embedder", "config.json"),
        "unet": ("U-Net", "config.json"),
        "scheduler": ("scheduler", "scheduler_config.json"),
        "vqvae": ("first stage", "config.json"),
    }

    def __init__(
        self,
        unet: UNet2DConditionModel,
        class_embedder: ModelMixin,  # its class may stand in another copy of this file
        scheduler: KarrasDiffusionSchedulers,
        vqvae: VQModel | AutoencoderKL | None = None,
        controlnet: ControlNetModel | MultiControlNetModel | list | tuple | None = None,
        adapter: ModelMixin | list | tuple | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        controlnet, adapter = _join_controls(controlnet, adapter)
        models = _control_models(controlnet, adapter)
        factor = _control_factor(models[0])
        if vqvae is not None:
            factor = 2 ** (len(vqvae.config.block_out_channels) - 1)
        _check_controls(unet, models, factor)
        self.register_modules(unet=unet, class_embedder=class_embedder, scheduler=scheduler, vqvae=vqvae)
        self.register_modules(controlnet=controlnet, adapter=adapter)
        if id2label is not None:
            self.register_to_config(id2label={str(label): name for label, name in id2label.items()})
        # Aliases of one class are separated by commas, as in the ImageNet names of `DiTPipeline`.
        self.labels = {}
        for label, name in (id2label or {}).items():
            for alias in str(name).split(","):
                self.labels.setdefault(alias.strip(), int(label))
        self.vae_scale_factor = factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)
        options = {"do_convert_rgb": True, "do_normalize": False}
        self.control_image_processor = VaeImageProcessor(vae_scale_factor=factor, **options)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class names to labels.

        Raises:
            ValueError: a name that is no class of this pipeline.
        """
        names = [label] if isinstance(label, str) else label
        for name in names:
            if name not in self.labels:
                raise ValueError(f"{name!r} is no class of this pipeline; its classes are {', '.join(self.labels)}.")
        return [self.labels[name] for name in names]

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._is_guided

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | np.ndarray | torch.LongTensor,
        image: PipelineImageInput | list[PipelineImageInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.25,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        adapter_conditioning_scale: float | list[float] = 1.0,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        guess_mode: bool = False,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""Draws images that follow the control.

        Args:
            class_labels: a class per image, in [0, K); K is the null class and gives images without a class.
            image: the control, RGB: a PIL image, a float array [H, W, 3] or [N, H, W, 3] in [0, 1], a float tensor
                [3, H, W] or [N, 3, H, W] in [0, 1], or a list of these; one for all images, one for each condition, or
                one for each image. With several controls a list with that for each. It is resized to `height` and
                `width`; arrays and tensors must have their proportions.
            height, width: of the images in pixels; the default is what the U-Net was trained on.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance (arXiv:2207.12598); 1 is off and halves the cost. The default is
                that of the base pipeline. A U-Net with `time_cond_proj_dim` (a latent consistency model,
                arXiv:2310.04378) gets the scale as an embedding, and every scale costs the same.
            num_images_per_prompt: images per label.
            eta: η of DDIM (arXiv:2010.02502) in [0, 1]; other schedulers ignore it.
            generator: one for the whole batch, or one per image: then an image does not depend on its batch.
            latents: noise of variance 1 [N, C, h, w] to start from, instead of what the generator gives.
            output_type: `pil`, `np` (float32 [N, H, W, 3] in [0, 1]), `pt` (float [N, 3, H, W] in [0, 1]) or `latent`
                (scaled latents [N, C, h, w]).
            return_dict: whether an [`ImagePipelineOutput`] is returned instead of a tuple.
            controlnet_conditioning_scale: what the ControlNet's residuals are multiplied by, or a list with one number
                per ControlNet; 0 gives the images of the base pipeline, bit for bit.
            adapter_conditioning_scale: likewise of adapters, whose features are added up.
            control_guidance_start, control_guidance_end: the share of the steps at which the control begins and ends
                to act, or a list with one number per control.
            guess_mode: of a ControlNet: the control acts on the conditional half of guidance alone, from 0.1 times its
                strength in the first block to its whole in the last (as `StableDiffusionControlNetPipeline`).
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after every step; what it
                returns replaces the tensors. It may set `pipeline._guidance_scale` for the steps that follow, and end
                guidance by keeping the second, conditional half of `class_embeds` [2N, 1, D].
            callback_on_step_end_tensor_inputs: which tensors it gets; of `latents` and `class_embeds`. A
                [`PipelineCallback`] says so itself.

        Returns:
            [`ImagePipelineOutput`], or a tuple whose first element are the images.

        Raises:
            ValueError: an argument out of range, or one that could have no effect; the message says which.

        Example:

        ```py
        >>> from diffusers import ControlNetModel
        >>> from diffusers.utils import get_class_from_dynamic_module
        >>> name = "LDMClassToImageControlPipeline"
        >>> kind = get_class_from_dynamic_module("PATH_OR_ID", "pipeline.py", class_name=name, trust_remote_code=True)
        >>> controlnet = ControlNetModel.from_pretrained("PATH_OR_ID")
        >>> pipeline = kind.from_pretrained("PATH_OR_ID_OF_THE_BASE", controlnet=controlnet)
        >>> images = pipeline([207, 360], image=edges, num_inference_steps=50, guidance_scale=2.25).images
        ```
        """
        conditions = self._check_labels(class_labels)
        labels = conditions.repeat_interleave(num_images_per_prompt)
        factor = self.vae_scale_factor
        height = height or self._sample_size[0] * factor
        width = width or self._sample_size[1] * factor
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_inputs(height, width, output_type, generator, len(labels), callback_on_step_end_tensor_inputs)
        control = self._read_control(
            image,
            height,
            width,
            (len(conditions), len(labels)),
            controlnet_conditioning_scale,
            adapter_conditioning_scale,
            control_guidance_start,
            control_guidance_end,
            guess_mode,
        )
        # A U-Net that was distilled to guided predictions gets the scale as an embedding and needs one pass.
        is_guided = guidance_scale != 1.0 and self.unet.config.time_cond_proj_dim is None
        self._guidance_scale, self._is_guided, self._interrupt = guidance_scale, is_guided, False

        device = self._execution_device
        class_embeds = self.class_embedder(labels.to(device))
        if self.do_classifier_free_guidance:
            null = torch.full_like(labels, self.class_embedder.null_class).to(device)
            class_embeds = torch.cat([self.class_embedder(null), class_embeds])
        class_embeds = class_embeds.to(self.unet.dtype)
        control = self._prepare_control(control, device)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        shape = (len(labels), self.unet.config.in_channels, height // factor, width // factor)
        latents = self._prepare_latents(latents, shape, generator, device, class_embeds.dtype)
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._denoise(latents, class_embeds, control, {"eta": eta, "generator": generator}, *callback)

        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(self, latents, embeds, control: Control, options: dict, callback, tensor_inputs) -> torch.Tensor:
        """The sampling loop.

        Args:
            latents [N, C, h, w]: noise. embeds [N or 2N, L, D]: what the U-Net attends to, unconditional ones first.
            control: of the call.
            options: what the scheduler's step gets of it is what it knows.
            callback, tensor_inputs: called after every step.
        """
        known = inspect.signature(self.scheduler.step).parameters
        options = {name: value for name, value in options.items() if name in known}
        embeds_name = self._callback_tensor_inputs[1]
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        for step, timestep in enumerate(self.progress_bar(timesteps)):
            if self._interrupt:
                continue
            doubled = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
            doubled = self.scheduler.scale_model_input(doubled, timestep).to(embeds.dtype)
            guidance = self._embed_guidance(doubled)
            added = self._residuals(control, step, doubled, timestep, embeds)
            prediction = self.unet(doubled, timestep, embeds, timestep_cond=guidance, return_dict=False, **added)[0]
            if self.do_classifier_free_guidance:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + self.guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
            if callback is not None:
                tensors = {"latents": latents, embeds_name: embeds}
                given = {name: tensors[name] for name in tensor_inputs}
                returned = callback(self, step, timestep, given) or {}
                latents = returned.get("latents", latents)
                embeds = returned.get(embeds_name, embeds)
                # The scale does not tell: 0 ends guidance in callbacks for diffusers, but is the null condition in a
                # call.
                self._is_guided = len(embeds) == 2 * len(latents)
        return latents

    def _residuals(self, control: Control, step: int, latents, timestep, embeds) -> dict:
        """What the U-Net adds in this step, by the names that its call has for it.

        Args:
            latents [N or 2N, C, h, w], embeds [N or 2N, L, D]: as the U-Net gets them.

        Returns:
            nothing where no control acts: the step is then that of the base pipeline, bit for bit.
        """
        scales = control.scales_at(step, self._num_timesteps)
        if not any(scales):
            return {}
        if control.features is not None:
            copies = 2 if self.do_classifier_free_guidance else 1
            acting = [pair for pair in zip(scales, control.features, strict=True) if pair[0]]
            sums = [sum(scale * features[block] for scale, features in acting) for block in range(len(acting[0][1]))]
            return {"down_intrablock_additional_residuals": [torch.cat([feature] * copies) for feature in sums]}
        is_half = control.guess_mode and self.do_classifier_free_guidance
        if is_half:
            latents, embeds = latents.chunk(2)[1], embeds.chunk(2)[1]
        images = [torch.cat([image] * (len(latents) // len(image))) for image in control.images]
        is_single = len(images) == 1
        down, mid = self.controlnet(
            latents.to(self.controlnet.dtype),
            timestep,
            encoder_hidden_states=embeds.to(self.controlnet.dtype),
            controlnet_cond=images[0] if is_single else images,
            conditioning_scale=scales[0] if is_single else scales,
            guess_mode=control.guess_mode,
            return_dict=False,
        )
        residuals = [residual.to(embeds.dtype) for residual in (*down, mid)]
        if is_half:
            residuals = [torch.cat([torch.zeros_like(residual), residual]) for residual in residuals]
        return {
            "down_block_additional_residuals": tuple(residuals[:-1]),
            "mid_block_additional_residual": residuals[-1],
        }

    def _prepare_control(self, control: Control, device) -> Control:
        """The control on its device, in its model's precision; of adapters the features, which no step changes."""
        model = self.controlnet if self.controlnet is not None else self.adapter
        control.images = [image.to(device, model.dtype) for image in control.images]
        if self.adapter is None:
            nets = _control_models(self.controlnet, None)
            control.guess_mode = control.guess_mode or nets[0].config.global_pool_conditions
            return control
        is_single = len(control.images) == 1
        features = [self.adapter(control.images[0])] if is_single else self.adapter(control.images)
        control.features = [[feature.to(self.unet.dtype) for feature in each] for each in features]
        return control

    def _read_control(
        self, image, height, width, counts, controlnet_scale, adapter_scale, start, end, guess_mode
    ) -> Control:
        """The control of a call, checked.

        Args:
            counts: the number of conditions, and that of images.
        """
        models = _control_models(self.controlnet, self.adapter)
        scale_name, scale = "controlnet_conditioning_scale", controlnet_scale
        if self.adapter is not None:
            if guess_mode:
                raise ValueError("`guess_mode` is for ControlNets, but this pipeline has an adapter.")
            scale_name, scale, other_name, other = "adapter_conditioning_scale", adapter_scale, scale_name, scale
        else:
            other_name, other = "adapter_conditioning_scale", adapter_scale
        if other != 1.0:
            kind = "a ControlNet" if self.adapter is None else "an adapter"
            raise ValueError(f"`{other_name}` has no effect, as this pipeline has {kind}: give `{scale_name}`.")
        scales = _per_control(scale_name, scale, len(models))
        starts = _per_control("control_guidance_start", start, len(models))
        ends = _per_control("control_guidance_end", end, len(models))
        for first, last in zip(starts, ends, strict=True):
            if not 0 <= first < last <= 1:
                raise ValueError(
                    f"`control_guidance_start` and `control_guidance_end` are {first} and {last}, but must be shares "
                    "of the steps, 0 ≤ start < end ≤ 1."
                )
        if image is None:
            raise ValueError("`image`, the control image, must be given.")
        images = [image]
        if len(models) > 1:
            if not isinstance(image, (list, tuple)) or len(image) != len(models):
                found = f"a list of {len(image)}" if isinstance(image, (list, tuple)) else f"a {type(image).__name__}"
                raise ValueError(
                    f"`image` is {found}, but must be a list with the image or images of each of the {len(models)} "
                    "controls."
                )
            images = list(image)
        images = [self._read_images(each, height, width, counts) for each in images]
        self._check_feature_sizes(models, height, width)
        return Control(images, scales, starts, ends, guess_mode)

    def _read_images(self, image, height: int, width: int, counts: tuple[int, int]) -> torch.Tensor:
        """Control images as [number of images, 3, H, W] in [0, 1], resized as
        `StableDiffusionControlNetPipeline` does.

        Args:
            counts: the number of conditions, and that of images.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        kinds = [kind for kind in (Image.Image, np.ndarray, torch.Tensor) if images and isinstance(images[0], kind)]
        if not kinds or not all(isinstance(each, kinds[0]) for each in images):
            raise ValueError("`image` must be a PIL image, an array or a tensor, or a list of one of these.")
        if kinds[0] is not Image.Image:
            for each in images:
                _check_array(each, height, width)
            shapes = {tuple(each.shape[-3:]) for each in images}
            if len(shapes) > 1:
                raise ValueError(f"`image` has images of the shapes {sorted(shapes)}, but they must be of one.")
            join = torch.cat if kinds[0] is torch.Tensor else np.concatenate
            images = join([each[None] if each.ndim == 3 else each for each in images])
        control = self.control_image_processor.preprocess(images, height=height, width=width).float()
        conditions, count = counts
        if len(control) not in (1, conditions, count):
            wanted = " or ".join(map(str, sorted({1, conditions, count})))
            raise ValueError(
                f"`image` has {len(control)} images, but {wanted} are expected (`num_images_per_prompt`)."
            )
        return control.repeat_interleave(count // len(control), dim=0)

    def _check_feature_sizes(self, models: list, height: int, width: int) -> None:
        """Raises ValueError where an adapter's features cannot have the sizes that the U-Net adds."""
        for model in models if self.adapter is not None else []:
            multiple = model.total_downscale_factor
            if height % multiple or width % multiple:
                raise ValueError(
                    f"`height` and `width` are {height} and {width}, but must be multiples of {multiple} for this "
                    "adapter."
                )

    def _embed_guidance(self, latents: torch.Tensor) -> torch.Tensor | None:
        """The embedding of the guidance scale, for a U-Net that takes one."""
        dim = self.unet.config.time_cond_proj_dim
        if dim is None:
            return None
        w = torch.full((len(latents),), self.guidance_scale - 1.0)
        return get_guidance_scale_embedding(w, dim).to(latents.device, latents.dtype)

    @property
    def _sample_size(self) -> tuple[int, int]:
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def _check_labels(self, class_labels) -> torch.LongTensor:
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        labels = np.asarray(class_labels).reshape(-1)
        highest = self.class_embedder.null_class
        if labels.dtype.kind not in "iu" or not len(labels):
            raise ValueError("`class_labels` must be one or more integers; for class names see `get_label_ids`.")
        if labels.min() < 0 or labels.max() > highest:
            raise ValueError(
                f"`class_labels` are {labels.tolist()}, but must lie in [0, {highest}] ({highest} is null)."
            )
        return torch.from_numpy(labels.astype(np.int64))

    def _check_inputs(self, height, width, output_type, generator, count, tensor_inputs) -> None:
        # Below the first stage the U-Net halves the latents once per level but the last.
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height % multiple or width % multiple:
            raise ValueError(f"`height` and `width` are {height} and {width}, but must be multiples of {multiple}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        if self.vqvae is None and output_type != "latent":
            raise ValueError("This pipeline has no first stage (`vqvae`): only `output_type='latent'` works.")
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {count} images are asked for.")
        for name in tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"`callback_on_step_end_tensor_inputs` has {name!r}, but knows {self._callback_tensor_inputs}."
                )

    def _prepare_latents(self, latents, shape, generator, device, dtype) -> torch.Tensor:
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has the shape {tuple(latents.shape)}, but {shape} is expected.")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def _decode(self, latents: torch.Tensor, output_type: str):
        latents = (1 / self.vqvae.config.scaling_factor * latents).to(self.vqvae.dtype)
        decoded = self.vqvae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(decoded, output_type=output_type)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` and, beside it, this file: so the folder loads without noisycond, and a pipeline
        that was loaded from such a folder can be saved again. Called by `save_pretrained`, which wrote the rest."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = [self._module, type(self).__name__]
        index["class_embedder"] = [self._module, type(self.class_embedder).__name__]
        if type(self.adapter).__name__ in (LDMAdapter.__name__, LDMMultiAdapter.__name__):
            index["adapter"] = [PIPELINE_FILE.removesuffix(".py"), type(self.adapter).__name__]
        index_file.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for target in (folder, folder / "class_embedder"):
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{self._module}.py").write_text(self._source, encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict:
        # The index without the name of its module: the class that is asked opens it, and diffusers runs no code of
        # the folder, nor of the Hub when it downloads.
        index = super()._dict_from_json_file(json_file)
        if "_class_name" in index:
            index["_class_name"] = cls.__name__
        return index

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, **kwargs):
        """The index without the models whose classes stand in this file, which diffusers would run the folder's code
        for."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in _own_models(index, cls._own_classes):
            index.pop(name)
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "LDMClassToImageControlPipeline":
        """Opens the folder of a base pipeline, with `controlnet` or `adapter` given, or one that this class saved. No
        code of the folder is run.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            controlnet ([`ControlNetModel`], [`MultiControlNetModel`] or a list, *optional*): instead of the folder's.
            adapter ([`LDMAdapter`], [`T2IAdapter`] or a list, *optional*): likewise.
            The others are those of [`DiffusionPipeline.from_pretrained`]; a component that is passed is not looked
            for, and `vqvae=None` opens what lacks it, for latents alone.

        Raises:
            ValueError, OSError: a piece is missing or does not fit; the message names the folder and the piece.
        """
        name = str(pretrained_model_name_or_path)
        if kwargs.get("controlnet") is not None or kwargs.get("adapter") is not None:
            controls = {"controlnet": None, "adapter": None} | kwargs
            kwargs["controlnet"], kwargs["adapter"] = _join_controls(controls["controlnet"], controls["adapter"])
        folder = Path(name)
        if not folder.is_dir():
            try:
                folder = Path(cls.download(name, **kwargs))
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise OSError(f"{name}: neither a folder nor a Hub id that can be downloaded ({reason}).") from error
        index = _read_json(folder / cls.config_name)
        _check_pieces(folder, index, cls._pieces, cls._optional_components, given=kwargs)
        try:
            for component, kind in _own_models(index, cls._own_classes).items():
                if component not in kwargs:
                    kwargs[component] = kind.from_pretrained(
                        folder / component, **_loading_options(component, folder, kwargs)
                    )
            pipeline = super().from_pretrained(folder, **kwargs)
        except FAILURES as error:
            raise ValueError(f"{name}: cannot be opened ({' '.join(str(error).split())}).") from error
        pipeline.register_to_config(_name_or_path=name)
        return pipeline


def _per_control(name: str, value, count: int) -> list[float]:
    """A number for all controls, or a list with one for each, as a list."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in values):
        raise ValueError(f"`{name}` is {value!r}, but must be a number or a list of numbers.")
    if len(values) != count:
        raise ValueError(f"`{name}` has {len(values)} numbers, but the number of controls is {count}.")
    return [float(each) for each in values]


def _check_array(image: np.ndarray | torch.Tensor, height: int, width: int) -> None:
    """Raises ValueError for an array or a tensor that is no control image, or would be distorted."""
    is_tensor = isinstance(image, torch.Tensor)
    layout = "[3, H, W] or [N, 3, H, W]" if is_tensor else "[H, W, 3] or [N, H, W, 3]"
    shape = tuple(image.shape)
    if len(shape) not in (3, 4) or shape[-3 if is_tensor else -1] != 3:
        raise ValueError(f"`image` has the shape {shape}, but {layout} is expected.")
    is_float = image.is_floating_point() if is_tensor else image.dtype.kind == "f"
    if not is_float or image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"`image` has {image.dtype} values from {image.min():g} to {image.max():g}, but floats in [0, 1] are "
            "expected."
        )
    rows, columns = shape[-2:] if is_tensor else shape[-3:-1]
    if rows * width != columns * height:
        raise ValueError(
            f"`image` is of {rows}×{columns} pixels (height × width), which has not the proportions of the images, "
            f"{height}×{width}: resize it, or give `height` and `width`."
        )


def _read_json(file: Path) -> dict:
    if not file.is_file():
        raise OSError(f"{file.parent}: {file.name} is missing.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object.")
    return content


def _check_pieces(folder: Path, index: dict, pieces: dict, optional_ones: list[str], given: dict) -> None:
    """Raises ValueError for what the index does not declare, and OSError for what it declares and the folder lacks."""
    where = DiffusionPipeline.config_name
    for name, (what, config) in pieces.items():
        optional = name in optional_ones
        entry = index.get(name)
        if name in given or (optional and entry == [None, None]):
            continue
        hint = f"; pass {name}=None to do without" if optional else ""
        if not isinstance(entry, (list, tuple)) or entry[1] is None:
            raise ValueError(f"{folder}: {where} declares no {what} (`{name}`{hint}).")
        files = {path.name for path in (folder / name).glob("*")}
        if not files or (config is not None and config not in files):
            raise OSError(f"{folder}: the {what} is missing ({name}/{config or ''}{hint}).")
        if config == "config.json" and not any(file.endswith((".safetensors", ".bin")) for file in files):
            raise OSError(f"{folder}: the {what}'s weights are missing (a .safetensors or .bin file in {name}/).")


def _own_models(index: dict, classes: tuple[type, ...]) -> dict[str, type]:
    """The components that the index declares to be of one of these classes, which diffusers does not have."""
    kinds = {kind.__name__: kind for kind in classes}
    declared = {name: value for name, value in index.items() if isinstance(value, (list, tuple)) and len(value) == 2}
    return {name: kinds[value[1]] for name, value in declared.items() if name != "_class_name" and value[1] in kinds}


def _loading_options(component: str, folder: Path, kwargs: dict) -> dict:
    """What `from_pretrained` of a component gets of the pipeline's."""
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if isinstance(dtype, dict):
        dtype = dtype.get(component, dtype.get("default"))
    options = {"torch_dtype": dtype} if isinstance(dtype, torch.dtype) else {}
    variant = kwargs.get("variant")
    if variant is not None and any(folder.glob(f"{component}/*.{variant}*.*")):
        options["variant"] = variant
    return options
