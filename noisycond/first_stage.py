"""The first stage of a latent diffusion model: images to latents and back, for KL and VQ autoencoders of diffusers.

Letters: B examples, C latent channels, R the resolution, h = w = R / factor the latent size.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel

from noisycond import randomness
from noisycond.cards import public_name
from noisycond.errors import InputError
from noisycond.randomness import Purpose


logger = logging.getLogger(__name__)
SHIPPED = Path(__file__).parent / "data" / "first_stages"
CLASSES = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


class FirstStage:
    """A frozen autoencoder with the scaling that makes its latents have about unit variance.

    The moments are what a cache holds: for a KL autoencoder mean and log-variance [B, 2C, h, w], from which a latent
    is drawn at every step; for a VQ autoencoder the latent before quantization [B, C, h, w] (LDM trains on that and
    quantizes in the decoder, Section 3.1 of arXiv:2112.10752).

    Args:
        model: an `AutoencoderKL` or `VQModel`.
        seed: seed of the draws from the posterior.

    Raises:
        InputError: another class, or an autoencoder with a latent shift, which the pipelines would not undo.
    """

    def __init__(self, model: AutoencoderKL | VQModel, seed: int = 0):
        if not isinstance(model, tuple(CLASSES.values())):
            raise InputError(f"the first stage is a {type(model).__name__}, but must be one of {', '.join(CLASSES)}.")
        if getattr(model.config, "shift_factor", None):
            raise InputError("the first stage shifts its latents (shift_factor), which these pipelines do not undo.")
        self.model, self.seed = model.eval().requires_grad_(False), seed

    @property
    def is_variational(self) -> bool:
        """Whether a latent is drawn from a posterior (KL) instead of computed (VQ)."""
        return isinstance(self.model, AutoencoderKL)

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """C. A VQ model's latents have the dimension of its codes."""
        if self.is_variational:
            return self.model.config.latent_channels
        return self.model.config.vq_embed_dim or self.model.config.latent_channels

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by before diffusion; the config's own number."""
        return self.model.config.scaling_factor

    @property
    def fingerprint(self) -> str:
        """A hash of configuration and weights."""
        # Private entries tell where and with which version it was saved.
        config = {name: value for name, value in self.model.config.items() if not name.startswith("_")}
        config["class"] = type(self.model).__name__
        text = json.dumps(config, sort_keys=True, default=str) + state_hash(self.model)
        return hashlib.sha256(text.encode()).hexdigest()

    def to(self, device: torch.device) -> "FirstStage":
        """Moves the autoencoder, which stays in float32: a half-precision one overflows on some images."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images float32 [B, 3, R, R] in [-1, 1] to unscaled moments float32, see the class."""
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        # Autocast would make what is cached depend on the run's precision.
        with torch.autocast(self.model.device.type, enabled=False):
            if self.is_variational:
                return self.model.encode(pixel_values).latent_dist.parameters.float()
            return self.model.encode(pixel_values).latents.float()

    def latents_of(self, batch: dict, keys: torch.Tensor) -> torch.Tensor:
        """The latents of a batch, of its `moments` (a cache's) or else of its `pixel_values`; see [`latents`]."""
        moments = batch["moments"] if "moments" in batch else self.moments(batch["pixel_values"])
        return self.latents(moments, keys)

    def latents(self, moments: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Moments to scaled latents float32 [B, C, h, w]; for KL a draw from the posterior, a pure function of the
        keys int64 [B]."""
        if self.is_variational:
            mean, log_variance = moments.chunk(2, dim=1)
            noise = randomness.normal(self.seed, Purpose.LATENT_POSTERIOR, keys, mean.shape[1:])
            moments = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
        return moments * self.scaling_factor


def taken_from(model: AutoencoderKL | VQModel, config: dict, name: str, seed: int = 0) -> FirstStage:
    """The first stage of an autoencoder that was opened.

    Args:
        config: its configuration as it was written, without what diffusers fills in. name: as it was given.
    """
    if isinstance(model, VQModel) and "scaling_factor" not in config:
        # diffusers would fill in 0.18215, a KL autoencoder's number; LDM uses the latents unscaled.
        model.register_to_config(scaling_factor=1.0)
    # An export repeats this entry: the name that was given, not where this machine keeps it.
    model.register_to_config(_name_or_path=public_name(name))
    return FirstStage(model, seed)


def state_hash(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights: their names and bytes."""
    return tensors_hash(model.state_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors by name: their names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def open_first_stage(
    name_or_path: str, seed: int = 0, flag: str = "--pretrained_vae_model_name_or_path"
) -> FirstStage:
    """The first stage that a flag names.

    Args:
        name_or_path: one that ships here (`digits-kl`, `digits-vq`), a folder or a Hub id; of a whole pipeline its
            `vae` or `vqvae` is taken.

    Raises:
        InputError: nothing there can be opened as an AutoencoderKL or VQModel.
    """
    first_stage = _open(name_or_path, lambda cls, config, where, at: cls.from_pretrained(where, **at), seed, flag)
    logger.info("First stage %s: scaling factor %s.", name_or_path, first_stage.scaling_factor)
    return first_stage


def peek_first_stage(name_or_path: str) -> FirstStage:
    """The first stage on the meta device, from its configuration alone, where that lies on this machine.

    Raises:
        InputError: no such configuration is here; the network is not asked.
    """

    def build(cls, config, where, at):
        with torch.device("meta"):
            return cls.from_config(config)

    return _open(name_or_path, build, local_files_only=True)


def _open(
    name_or_path: str,
    make: Callable,
    seed: int = 0,
    flag: str = "--pretrained_vae_model_name_or_path",
    **options,
) -> FirstStage:
    location = SHIPPED / name_or_path if (SHIPPED / name_or_path).is_dir() else name_or_path
    reasons = []
    for subfolder in (None, "vae", "vqvae"):
        at = {} if subfolder is None else {"subfolder": subfolder}
        try:
            config = AutoencoderKL.load_config(location, **at, **options)
            if config.get("_class_name") not in CLASSES:
                reasons.append(f"it is a {config.get('_class_name')}")
                continue
            model = make(CLASSES[config["_class_name"]], config, location, at)
            return taken_from(model, config, str(name_or_path), seed)
        except (OSError, ValueError, KeyError) as error:
            reasons.append(" ".join(str(error).split()))
    shipped = ", ".join(sorted(path.name for path in SHIPPED.glob("*/")))
    raise InputError(
        f"{flag} {name_or_path}: neither one that ships with noisycond ({shipped}) nor a "
        f"folder or Hub id of an AutoencoderKL or VQModel ({reasons[0]})."
    )
