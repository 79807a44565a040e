# Copyright 2026 The noisycond authors. Licensed under the Apache License, Version 2.0.
"""Class label to image by latent diffusion (LDM-4 of arXiv:2112.10752): a U-Net that attends to a class embedding.

This file stands alone: it needs torch and diffusers, and travels with every exported pipeline.
Letters: N images, K classes, C latent channels, h × w their size, D the embedding dimension.
"""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from safetensors.torch import load_file


logger = logging.get_logger(__name__)
MODULE = "ldm_class_to_image"  # the name of this file wherever it travels
FIRST_STAGES = ("VQModel", "AutoencoderKL")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
Callback = Callable[["LDMClassToImagePipeline", int, int, dict], dict]


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


class LDMClassToImagePipeline(DiffusionPipeline):
    r"""Pipeline for class-conditional image generation by latent diffusion.

    Loads its own exports, and the folders `ldm_in1k_*` that the authors of arXiv:2405.20494 released, see
    [`LDMClassToImagePipeline.from_pretrained`]. The superclass documents what all pipelines can do (saving, devices,
    offloading, attention of xformers).

    Args:
        unet ([`UNet2DConditionModel`]): denoises latents; attends to the class embedding.
        class_embedder ([`ClassEmbedder`]): labels to embeddings.
        scheduler ([`SchedulerMixin`]): any scheduler of diffusers for the U-Net's prediction type; of a latent
            consistency model an [`LCMScheduler`].
        vqvae ([`VQModel`] or [`AutoencoderKL`], *optional*): the first stage; without it only `output_type="latent"`
            works.
        id2label (`dict[int, str]`, *optional*): class names.
    """

    model_cpu_offload_seq = "class_embedder->unet->vqvae"
    # Layer by layer it fails: VQModel reads the codebook from outside its layer.
    _exclude_from_cpu_offload = ["vqvae"]
    _optional_components = ["vqvae"]
    _callback_tensor_inputs = ["latents", "class_embeds"]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        class_embedder: ClassEmbedder,
        scheduler: KarrasDiffusionSchedulers,
        vqvae: VQModel | AutoencoderKL | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, class_embedder=class_embedder, scheduler=scheduler, vqvae=vqvae)
        if id2label is not None:
            self.register_to_config(id2label={str(label): name for label, name in id2label.items()})
        # Aliases of one class are separated by commas, as in the ImageNet names of `DiTPipeline`.
        self.labels = {}
        for label, name in (id2label or {}).items():
            for alias in str(name).split(","):
                self.labels.setdefault(alias.strip(), int(label))
        factor = 2 ** (len(vqvae.config.block_out_channels) - 1) if vqvae is not None else 4
        self.vae_scale_factor = factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

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
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""Draws images.

        Args:
            class_labels: a class per image, in [0, K); K is the null class and gives unconditional images.
            height, width: of the images in pixels; the default is what the U-Net was trained on.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance (arXiv:2207.12598); 1 is off and halves the cost. The default is
                the one that the authors of arXiv:2405.20494 sample with. A U-Net with `time_cond_proj_dim` (a latent
                consistency model, arXiv:2310.04378) gets the scale as an embedding, and every scale costs the same.
            num_images_per_prompt: images per label.
            eta: η of DDIM (arXiv:2010.02502) in [0, 1]; other schedulers ignore it.
            generator: one for the whole batch, or one per image: then an image does not depend on its batch.
            latents: noise of variance 1 [N, C, h, w] to start from, instead of what the generator gives.
            output_type: `pil`, `np` (float32 [N, H, W, 3] in [0, 1]), `pt` (float [N, 3, H, W] in [0, 1]) or `latent`
                (scaled latents [N, C, h, w]).
            return_dict: whether an [`ImagePipelineOutput`] is returned instead of a tuple.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after every step; what it
                returns replaces the tensors. It may set `pipeline._guidance_scale` for the steps that follow, and end
                guidance by keeping the second, conditional half of `class_embeds` [2N, 1, D].
            callback_on_step_end_tensor_inputs: which tensors it gets; of `latents` and `class_embeds`. A
                [`PipelineCallback`] says so itself.

        Returns:
            [`ImagePipelineOutput`], or a tuple whose first element are the images.

        Raises:
            ValueError: an argument out of range; the message says which.

        Example:

        ```py
        >>> from diffusers import DiffusionPipeline
        >>> pipeline = DiffusionPipeline.from_pretrained("PATH_OR_ID", trust_remote_code=True)
        >>> images = pipeline([207, 360], num_inference_steps=50, guidance_scale=2.25).images
        ```
        """
        labels = self._check_labels(class_labels).repeat_interleave(num_images_per_prompt)
        factor = self.vae_scale_factor
        height = height or self._sample_size[0] * factor
        width = width or self._sample_size[1] * factor
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_inputs(height, width, output_type, generator, len(labels), callback_on_step_end_tensor_inputs)
        # A U-Net that was distilled to guided predictions gets the scale as an embedding and needs one pass.
        is_guided = guidance_scale != 1.0 and self.unet.config.time_cond_proj_dim is None
        self._guidance_scale, self._is_guided, self._interrupt = guidance_scale, is_guided, False

        device = self._execution_device
        class_embeds = self.class_embedder(labels.to(device))
        if self.do_classifier_free_guidance:
            null = torch.full_like(labels, self.class_embedder.null_class).to(device)
            class_embeds = torch.cat([self.class_embedder(null), class_embeds])
        class_embeds = class_embeds.to(self.unet.dtype)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        shape = (len(labels), self.unet.config.in_channels, height // factor, width // factor)
        latents = self._prepare_latents(latents, shape, generator, device, class_embeds.dtype)
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._denoise(latents, class_embeds, {"eta": eta, "generator": generator}, *callback)

        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(self, latents, embeds, options: dict, callback, tensor_inputs) -> torch.Tensor:
        """The sampling loop.

        Args:
            latents [N, C, h, w]: noise. embeds [N or 2N, L, D]: what the U-Net attends to, unconditional ones first.
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
            prediction = self.unet(doubled, timestep, embeds, timestep_cond=guidance, return_dict=False)[0]
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
        index["_class_name"] = [MODULE, type(self).__name__]
        index["class_embedder"] = [MODULE, type(self.class_embedder).__name__]
        index_file.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for target in (folder, folder / "class_embedder"):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(__file__, target / f"{MODULE}.py")

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, **kwargs):
        """The index without what diffusers cannot open by itself: names of modules it does not have, the embedder, and
        a first stage whose folder has another name than ours."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if "unet" in config:
            config.pop(_component(config, [ClassEmbedder.__name__]), None)
            first_stage = _component(config, FIRST_STAGES)
            if first_stage != "vqvae":
                config.pop(first_stage, None)
            config["_class_name"] = cls.__name__
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "LDMClassToImagePipeline":
        """Opens an export of noisycond, or a checkpoint in the layout of `DiffusionNoise/ldm_in1k_*`.

        The class embedder is found by the class that `model_index.json` declares for it (`ClassEmbedder`), whatever
        its folder and its parameter are called, and the number of classes by the table's shape; the first stage is
        found in the same way (`VQModel` or `AutoencoderKL`). A VQ first stage whose configuration states no scaling
        factor gets 1: LDM-4 uses its latents as they are, while diffusers would fill in 0.18215, a KL autoencoder's.
        What is used is logged. No code of the folder is run.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            scaling_factor (`float`, *optional*): of the first stage, instead of the configuration's.
            The others are those of [`DiffusionPipeline.from_pretrained`]; a component that is passed is not looked
            for, and `vqvae=None` opens what lacks a first stage, for latents alone.

        Raises:
            ValueError, OSError: a piece is missing or does not fit; the message names the folder and the piece.
        """
        name = str(pretrained_model_name_or_path)
        scaling_factor = kwargs.pop("scaling_factor", None)
        folder = _local_folder(name, kwargs)
        index = _read_json(folder / cls.config_name)
        embedder, first_stage = _component(index, [ClassEmbedder.__name__]), _component(index, FIRST_STAGES)
        _check_pieces(folder, index, embedder, first_stage, given=kwargs)
        if "class_embedder" not in kwargs:
            table = _read_table(folder / embedder, kwargs.get("variant"))
            kwargs["class_embedder"] = ClassEmbedder.from_table(table.to(_dtype_for("class_embedder", kwargs)))
        is_read = first_stage is not None and "vqvae" not in kwargs
        if is_read and first_stage != "vqvae":
            kind = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}[index[first_stage][1]]
            kwargs["vqvae"] = kind.from_pretrained(folder / first_stage, torch_dtype=_dtype_for("vqvae", kwargs))
        try:
            pipeline = super().from_pretrained(folder, **kwargs)
        except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: diffusers cannot open it ({' '.join(str(error).split())}).") from error
        wanted, dim = pipeline.unet.config.cross_attention_dim, pipeline.class_embedder.config.embed_dim
        if wanted != dim:
            raise ValueError(
                f"{name}: the U-Net attends to embeddings of {wanted} numbers, but the classes' have {dim}."
            )
        pipeline.register_to_config(_name_or_path=name)
        if is_read:
            is_own = index.get("_class_name") == [MODULE, cls.__name__]
            config_file = folder / first_stage / "config.json"
            _set_scaling_factor(pipeline.vqvae, config_file, scaling_factor, quiet=is_own)
        return pipeline


def _local_folder(name: str, kwargs: dict) -> Path:
    """The folder, downloaded where the name is a Hub id: of every component the settings and one set of weights."""
    if Path(name).is_dir():
        return Path(name)
    options = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
    try:
        index_file = hf_hub_download(name, DiffusionPipeline.config_name, **options)
        if kwargs.get("local_files_only"):
            return Path(index_file).parent
        try:
            info = HfApi(token=kwargs.get("token")).model_info(name, revision=kwargs.get("revision"))
        except Exception as error:  # the types of the network's errors differ between versions of the client
            logger.info(f"{name}: only what is cached is used, as the Hub cannot be asked ({error}).")
            return Path(index_file).parent
        patterns = [DiffusionPipeline.config_name]
        for component, value in _read_json(Path(index_file)).items():
            if isinstance(value, list) and component != "_class_name":
                paths = [Path(sibling.rfilename) for sibling in info.siblings or []]
                files = [path.name for path in paths if str(path.parent) == component]
                weights = _choose_weights(files, kwargs.get("variant"), kwargs.get("use_safetensors") is False)
                patterns += [f"{component}/{file}" for file in (*weights, "*.json")]
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{name}: neither a folder nor a Hub id that can be downloaded ({reason}).") from error


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


def _component(index: dict, classes: list[str] | tuple[str, ...]) -> str | None:
    """The component that the index declares to be of one of these classes; that is its folder too."""
    for name, value in index.items():
        if isinstance(value, (list, tuple)) and len(value) == 2 and name != "_class_name" and value[1] in classes:
            return name
    return None


def _check_pieces(folder: Path, index: dict, embedder: str | None, first_stage: str | None, given: dict) -> None:
    """Raises ValueError for what the index does not declare, and OSError for what it declares and the folder lacks."""
    where = DiffusionPipeline.config_name
    if embedder is None and "class_embedder" not in given:
        raise ValueError(
            f"{folder}: {where} declares no component of the class {ClassEmbedder.__name__}, so this is no "
            "class-conditional latent diffusion model."
        )
    pieces = (
        ("class embedder", "class_embedder", embedder, None),
        ("U-Net", "unet", "unet", "config.json"),
        ("scheduler", "scheduler", "scheduler", "scheduler_config.json"),
        ("first stage", "vqvae", first_stage, "config.json"),
    )
    for what, argument, name, config in pieces:
        if argument in given or name is None:
            continue
        if not isinstance(index.get(name), (list, tuple)) or index[name][1] is None:
            raise ValueError(f"{folder}: {where} declares no {what} (`{name}`).")
        if config is not None and not (folder / name / config).is_file():
            hint = "; pass vqvae=None to draw latents alone" if argument == "vqvae" else ""
            raise OSError(f"{folder}: the {what} is missing ({name}/{config}{hint}).")
        if argument != "scheduler" and not _weight_files(folder / name):
            raise OSError(f"{folder}: the {what}'s weights are missing (a .safetensors or .bin file in {name}/).")


def _weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of one set of weights in a component's folder."""
    return [folder / name for name in _choose_weights([path.name for path in folder.glob("*")], variant)]


def _choose_weights(names: list[str], variant: str | None, pickles: bool = False) -> list[str]:
    """Of a folder's files those of one set of weights: safetensors before pickles (or the reverse), the asked variant
    before the plain one, all shards of a sharded one."""
    found = sorted(name for name in names if name.endswith((".safetensors", ".bin")))
    if not found:
        return []

    def rank(name: str) -> tuple:
        return name.endswith(".bin") != pickles, f".{variant}" not in name, name.count(".")

    best = min(found, key=rank)
    stem, is_shard, _ = best.partition("-0")
    shards = [name for name in found if name.startswith(f"{stem}-0") and rank(name) == rank(best)]
    return shards if is_shard else [best]


def _read_table(folder: Path, variant: str | None = None) -> torch.Tensor:
    """The table [K + 1, D] of an embedder's folder, whatever its parameter is called."""
    tables = []
    for file in _weight_files(folder, variant):
        try:
            is_pickle = file.suffix == ".bin"
            state = torch.load(file, map_location="cpu", weights_only=True) if is_pickle else load_file(file)
            tables += [tensor for tensor in state.values() if torch.is_tensor(tensor) and tensor.dim() == 2]
        except Exception as error:  # safetensors and pickle have errors of their own
            raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())}).") from error
    if len(tables) != 1:
        raise ValueError(f"{folder}: expected one table [classes + 1, dimension], but found {len(tables)}.")
    return tables[0]


def _dtype_for(component: str, kwargs: dict) -> torch.dtype:
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if isinstance(dtype, dict):
        dtype = dtype.get(component, dtype.get("default"))
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _set_scaling_factor(vqvae, config_file: Path, wanted: float | None, quiet: bool) -> None:
    stated = _read_json(config_file).get("scaling_factor")
    # diffusers fills in 0.18215, which is right for a KL autoencoder alone.
    unstated = 1.0 if isinstance(vqvae, VQModel) else vqvae.config.scaling_factor
    used = next(value for value in (wanted, stated, unstated) if value is not None)
    vqvae.register_to_config(scaling_factor=used)
    source = (
        "as asked" if wanted is not None else "of its configuration" if stated is not None else "as none is stated"
    )
    log = logger.info if quiet else logger.warning
    log(f"The first stage's scaling factor is {used} ({source}).")
