# Copyright 2026 The noisycond authors. Licensed under the Apache License, Version 2.0.
"""Text to image by latent diffusion (LDM-4 of arXiv:2112.10752): a U-Net that attends to the tokens of a text encoder.

This file stands alone: it needs torch, diffusers and transformers, and travels with every exported pipeline.
Letters: N images, L tokens, D the embedding dimension, C latent channels, h × w their size.
"""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.get_logger(__name__)
MODULE = "ldm_text_to_image"  # the name of this file wherever it travels
MAX_TOKENS = 77  # that diffusers' own pipeline pads prompts to, whatever the encoder
PIECES = {
    "bert": ("text encoder", "config.json"),
    "tokenizer": ("tokenizer", None),
    "unet": ("U-Net", "config.json"),
    "scheduler": ("scheduler", "scheduler_config.json"),
    "vqvae": ("first stage", "config.json"),
}
# How diffusers and transformers fail on pieces that are damaged, of another kind, or of another version.
FAILURES = (AttributeError, ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
Callback = Callable[["LDMTextToImagePipeline", int, int, dict], dict]


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


class LDMTextToImagePipeline(DiffusionPipeline):
    r"""Pipeline for text-to-image generation by latent diffusion.

    The class of this name in diffusers, for first stages of any factor: that one takes every first stage to be of
    factor 8, so that of factor 4, as in LDM-4, it draws images of half the side. Components, call and images are
    the same otherwise. Loads its own exports, diffusers' folders, and the folders `ldm_cc3m_*` that the authors of
    arXiv:2405.20494 released, see [`LDMTextToImagePipeline.from_pretrained`]. The superclass documents what all
    pipelines can do (saving, devices, offloading, attention of xformers).

    A VQ first stage that was loaded from a configuration without a scaling factor is given 1: LDM-4 uses its latents
    as they are, while diffusers fills in 0.18215, a KL autoencoder's. The factor is logged.

    Args:
        vqvae ([`VQModel`] or [`AutoencoderKL`], *optional*): the first stage; without it only `output_type="latent"`
            works.
        bert ([`PreTrainedModel`], *optional*): the text encoder; any whose first output is [N, L, D], as `BertModel`
            or diffusers' `LDMBertModel`. Without it prompts are given as embeddings.
        tokenizer ([`PreTrainedTokenizerBase`], *optional*): the text encoder's.
        unet ([`UNet2DConditionModel`]): denoises latents; attends to the text embeddings.
        scheduler ([`SchedulerMixin`]): any scheduler of diffusers for the U-Net's prediction type; of a latent
            consistency model an [`LCMScheduler`].

    Raises:
        ValueError: the U-Net attends to embeddings of another size than the text encoder's.
    """

    model_cpu_offload_seq = "bert->unet->vqvae"
    # Layer by layer it fails: VQModel reads the codebook from outside its layer.
    _exclude_from_cpu_offload = ["vqvae"]
    _optional_components = ["vqvae", "bert", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(
        self,
        vqvae: VQModel | AutoencoderKL,
        bert: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
    ):
        super().__init__()
        _check_fit(unet, bert)
        if vqvae is not None:
            _fill_scaling_factor(vqvae)
        self.register_modules(vqvae=vqvae, bert=bert, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        factor = 2 ** (len(vqvae.config.block_out_channels) - 1) if vqvae is not None else 4
        self.vae_scale_factor = factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    @property
    def max_tokens(self) -> int:
        """L, the tokens that a prompt is padded or truncated to: 77, or fewer where the tokenizer or the text encoder
        knows no more."""
        known = getattr(self.bert.config, "max_position_embeddings", None) or MAX_TOKENS
        return min(MAX_TOKENS, self.tokenizer.model_max_length, known)

    def encode_prompt(self, prompt: str | list[str]) -> torch.Tensor:
        """Prompts to what the U-Net attends to, as diffusers' own pipeline encodes them.

        Every prompt, the empty one too, is padded or truncated to [`max_tokens`], and the text encoder gets no
        attention mask: it reads the padding along, and so it must in training.

        Returns:
            [N, L, D], in the text encoder's precision, on the device where the pipeline runs.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        options = {"padding": "max_length", "truncation": True, "max_length": self.max_tokens}
        tokens = self.tokenizer(prompts, return_tensors="pt", **options)
        return self.bert(tokens.input_ids.to(self._execution_device))[0]

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
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""Draws images.

        Args:
            prompt: one, or several for a batch; the empty prompt gives unconditional images.
            height, width: of the images in pixels; the default is what the U-Net was trained on.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance (arXiv:2207.12598); 1, the default, is off and halves the cost. A
                U-Net with `time_cond_proj_dim` (a latent consistency model, arXiv:2310.04378) gets the scale as an
                embedding, and every scale costs the same.
            eta: η of DDIM (arXiv:2010.02502) in [0, 1]; other schedulers ignore it.
            generator: one for the whole batch, or one per image: then an image does not depend on its batch.
            latents: noise of variance 1 [N, C, h, w] to start from, instead of what the generator gives.
            output_type: `pil`, `np` (float32 [N, H, W, 3] in [0, 1]), `pt` (float [N, 3, H, W] in [0, 1]) or `latent`
                (scaled latents [N, C, h, w]).
            return_dict: whether an [`ImagePipelineOutput`] is returned instead of a tuple.
            negative_prompt: what guidance leads away from, one for all prompts or one for each; the default is the
                empty prompt.
            num_images_per_prompt: images per prompt.
            prompt_embeds: [number of prompts, L, D], instead of `prompt`, as [`encode_prompt`] gives them.
            negative_prompt_embeds: likewise, instead of `negative_prompt`.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after every step; what it
                returns replaces the tensors. It may set `pipeline._guidance_scale` for the steps that follow, and end
                guidance by keeping the second, conditional half of `prompt_embeds` [2N, L, D].
            callback_on_step_end_tensor_inputs: which tensors it gets; of `latents` and `prompt_embeds`. A
                [`PipelineCallback`] says so itself.

        Returns:
            [`ImagePipelineOutput`], or a tuple whose first element are the images.

        Raises:
            ValueError: an argument out of range, or one that could have no effect; the message says which.

        Example:

        ```py
        >>> from diffusers import DiffusionPipeline
        >>> pipeline = DiffusionPipeline.from_pretrained("PATH_OR_ID", trust_remote_code=True)
        >>> images = pipeline(["a dog on a beach"], num_inference_steps=50, guidance_scale=2.25).images
        ```
        """
        # A U-Net that was distilled to guided predictions gets the scale as an embedding and needs one pass.
        is_guided = guidance_scale != 1.0 and self.unet.config.time_cond_proj_dim is None
        self._guidance_scale, self._is_guided, self._interrupt = guidance_scale, is_guided, False
        factor = self.vae_scale_factor
        height = height or self._sample_size[0] * factor
        width = width or self._sample_size[1] * factor
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        self._check_inputs(height, width, output_type, callback_on_step_end_tensor_inputs)

        device = self._execution_device
        embeds = self.encode_prompt(prompt) if prompt_embeds is None else prompt_embeds
        if self.do_classifier_free_guidance:
            unconditional = negative_prompt_embeds
            if unconditional is None:
                negative = negative_prompt or ""
                unconditional = self.encode_prompt([negative] * len(embeds) if isinstance(negative, str) else negative)
            if unconditional.shape != embeds.shape:
                raise ValueError(
                    f"The negative prompts' embeddings have the shape {tuple(unconditional.shape)}, but the prompts' "
                    f"have {tuple(embeds.shape)}."
                )
            embeds = torch.cat([unconditional.to(device), embeds.to(device)])
        embeds = embeds.repeat_interleave(num_images_per_prompt, dim=0).to(device, self.unet.dtype)
        count = len(embeds) // (1 + is_guided)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {count} images are asked for.")

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        shape = (count, self.unet.config.in_channels, height // factor, width // factor)
        latents = self._prepare_latents(latents, shape, generator, device, embeds.dtype)
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._denoise(latents, embeds, {"eta": eta, "generator": generator}, *callback)

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

    def _check_prompts(self, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds) -> None:
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Exactly one of `prompt` and `prompt_embeds` must be given.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Only one of `negative_prompt` and `negative_prompt_embeds` may be given.")
        for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            texts = [texts] if isinstance(texts, str) else texts
            is_text = isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)
            if texts is not None and not is_text:
                raise ValueError(f"`{name}` is {texts!r}, but must be a string or a list of strings.")
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is not None and embeds.dim() != 3:
                raise ValueError(f"`{name}` has the shape {tuple(embeds.shape)}, but [prompts, L, D] is expected.")
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        if has_negative and not self.do_classifier_free_guidance:
            why = "this U-Net is guided by an embedding" if self.guidance_scale != 1.0 else "`guidance_scale` is 1"
            raise ValueError(f"A negative prompt has no effect, as {why}.")
        must_encode = prompt is not None or (self.do_classifier_free_guidance and negative_prompt_embeds is None)
        if must_encode and (self.bert is None or self.tokenizer is None):
            raise ValueError(
                "This pipeline has no text encoder (`bert` and `tokenizer`): give `prompt_embeds`, and with guidance "
                "`negative_prompt_embeds`."
            )

    def _check_inputs(self, height, width, output_type, tensor_inputs) -> None:
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ValueError(
                f"`height` and `width` are {height} and {width}, but must be multiples of {self.vae_scale_factor}."
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        if self.vqvae is None and output_type != "latent":
            raise ValueError("This pipeline has no first stage (`vqvae`): only `output_type='latent'` works.")
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
        index_file.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.copyfile(__file__, folder / f"{MODULE}.py")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict:
        # The index without the name of its module: the class that is asked opens it, and diffusers runs no code of
        # the folder, nor of the Hub when it downloads.
        index = super()._dict_from_json_file(json_file)
        if "_class_name" in index:
            index["_class_name"] = cls.__name__
        return index

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "LDMTextToImagePipeline":
        """Opens an export of noisycond, a folder of diffusers' class of this name, or a checkpoint in the layout of
        `DiffusionNoise/ldm_cc3m_*`. No code of the folder is run.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            scaling_factor (`float`, *optional*): of the first stage, instead of the configuration's.
            The others are those of [`DiffusionPipeline.from_pretrained`]; a component that is passed is not looked
            for, and `vqvae=None` or `bert=None` opens what lacks it, for latents or embeddings alone.

        Raises:
            ValueError, OSError: a piece is missing or does not fit; the message names the folder and the piece.
        """
        name = str(pretrained_model_name_or_path)
        scaling_factor = kwargs.pop("scaling_factor", None)
        folder = Path(name)
        if not folder.is_dir():
            try:
                folder = Path(cls.download(name, **kwargs))
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise OSError(f"{name}: neither a folder nor a Hub id that can be downloaded ({reason}).") from error
        _check_pieces(folder, _read_json(folder / cls.config_name), given=kwargs)
        try:
            pipeline = super().from_pretrained(folder, **kwargs)
        except FAILURES as error:
            raise ValueError(f"{name}: diffusers cannot open it ({' '.join(str(error).split())}).") from error
        pipeline.register_to_config(_name_or_path=name)
        if scaling_factor is not None and pipeline.vqvae is not None:
            _set_scaling_factor(pipeline.vqvae, scaling_factor, "as asked")
        return pipeline


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


def _check_pieces(folder: Path, index: dict, given: dict) -> None:
    """Raises ValueError for what the index does not declare, and OSError for what it declares and the folder lacks."""
    where = DiffusionPipeline.config_name
    for name, (what, config) in PIECES.items():
        optional = name in LDMTextToImagePipeline._optional_components
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


def _check_fit(unet: UNet2DConditionModel, bert: PreTrainedModel | None) -> None:
    """Raises ValueError where the U-Net attends to embeddings of another size than the text encoder's."""
    given = None if bert is None else getattr(bert.config, "hidden_size", None)
    wanted = getattr(unet.config, "encoder_hid_dim", None) or unet.config.cross_attention_dim
    wanted = {wanted} if isinstance(wanted, int) else set(wanted)
    if given is not None and wanted != {given}:
        raise ValueError(
            f"the U-Net attends to embeddings of {' and '.join(map(str, sorted(wanted)))} numbers, but those of the "
            f"text encoder (`bert`) have {given}"
        )


def _fill_scaling_factor(vqvae: VQModel | AutoencoderKL) -> None:
    """The scaling factor that the configuration of a loaded VQ first stage does not state; in place."""
    filled = inspect.signature(VQModel.__init__).parameters["scaling_factor"].default
    config = vqvae.config
    is_unstated = config.get("_name_or_path") and "scaling_factor" in config.get("_use_default_values", ())
    if isinstance(vqvae, VQModel) and is_unstated and config.scaling_factor == filled:
        _set_scaling_factor(vqvae, 1.0, "as none is stated")
    else:
        logger.info(f"The first stage's scaling factor is {config.scaling_factor} (of its configuration).")


def _set_scaling_factor(vqvae: VQModel | AutoencoderKL, factor: float, source: str) -> None:
    filled = [name for name in vqvae.config.get("_use_default_values", ()) if name != "scaling_factor"]
    vqvae.register_to_config(scaling_factor=factor, _use_default_values=filled)
    logger.warning(f"The first stage's scaling factor is {factor} ({source}).")
