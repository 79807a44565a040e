"""Small folders in the layouts of the released checkpoints, written piece by piece, as nothing of ours writes them."""

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_kl, tiny_unet, tiny_vq
from tiny_text import tiny_bert, tiny_ldm_bert, tiny_tokenizer


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def change_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    write_json(path, {name: value for name, value in content.items() if value is not None})


def to_bin(folder: Path, rename=lambda name: name) -> None:
    """A component's weights as a pickle, under other names."""
    file = folder / "diffusion_pytorch_model.safetensors"
    torch.save({rename(name): value for name, value in load_file(file).items()}, file.with_suffix(".bin"))
    file.unlink()


def old_attention_name(name: str) -> str:
    """The name that an attention layer of an autoencoder had in older diffusers."""
    if ".attentions." in name:
        for new, old in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name


def write_ldm(folder: Path, embedder: str = "class_embedder", first_stage: str = "vqvae", old: bool = False) -> Path:
    """A class-conditional LDM of 10 classes: latents 3×8×8, images 16×16.

    Args:
        embedder, first_stage: the components' names, which are their folders'.
        old: pickled weights, attention under its old names, a configuration with keys of another version.
    """
    torch.manual_seed(0)
    unet, vqvae = tiny_unet(), tiny_vq()
    unet.save_pretrained(folder / "unet")
    vqvae.save_pretrained(folder / first_stage)
    change_json(folder / first_stage / "config.json", scaling_factor=None)
    _write_scheduler(folder)
    table = {"embedding.weight": torch.randn(11, 12)}
    write_json(folder / embedder / "config.json", {"_class_name": "ClassEmbedder", "embed_dim": 12, "n_classes": 11})
    save_file(table, folder / embedder / "diffusion_pytorch_model.safetensors")
    index = {
        "_class_name": "LDMClassToImagePipeline",
        "_diffusers_version": "0.21.0.dev0",
        embedder: ["latent_diffusion", "ClassEmbedder"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        first_stage: ["diffusers", "VQModel"],
    }
    write_json(folder / "model_index.json", index)
    if old:
        to_bin(folder / "unet")
        to_bin(folder / embedder, lambda name: "class_embedding.weight")
        to_bin(folder / first_stage, old_attention_name)
        change_json(folder / "unet/config.json", a_key_of_another_version=3, dual_cross_attention=False)
    return folder


def _write_scheduler(folder: Path) -> None:
    betas = (torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2).tolist()
    DDIMScheduler(trained_betas=betas).save_pretrained(folder / "scheduler")


def write_text_ldm(folder: Path, encoder: str = "BertModel") -> Path:
    """A text-to-image LDM whose first stage is of factor 4: latents 3×8×8, images 32×32.

    Args:
        encoder: `BertModel` or `LDMBertModel`.
    """
    torch.manual_seed(0)
    bert = tiny_bert() if encoder == "BertModel" else tiny_ldm_bert()
    parts = {"unet": tiny_unet(), "vqvae": tiny_vq(levels=3), "bert": bert, "tokenizer": tiny_tokenizer()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    change_json(folder / "vqvae/config.json", scaling_factor=None)
    _write_scheduler(folder)
    index = {
        "_class_name": "LDMTextToImagePipeline",
        "_diffusers_version": "0.21.0.dev0",
        "bert": ["transformers" if encoder == "BertModel" else "latent_diffusion", encoder],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vqvae": ["diffusers", "VQModel"],
    }
    write_json(folder / "model_index.json", index)
    return folder


def write_dit(folder: Path, classes: int = 1000, clip_sample: bool = True, first_stage: bool = True) -> Path:
    """A DiT pipeline, null class in the last row of tables of `classes` + 1 rows; every block has its own."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=classes,
    )
    transformer.save_pretrained(folder / "transformer")
    change_json(folder / "transformer/config.json", _class_name="Transformer2DModel")  # its name when DiT came
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.21.0.dev0",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    vae = tiny_kl(latent_channels=4)
    if first_stage:
        vae.save_pretrained(folder / "vae")
    DDIMScheduler(clip_sample=clip_sample).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", index)
    return folder
