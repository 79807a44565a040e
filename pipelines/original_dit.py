# Copyright 2026 The noisycond authors. Licensed under the Apache License, Version 2.0.
"""The DiT pipeline of diffusers for original DiT weights (arXiv:2212.09748), with the original's timestep embedding.

This file stands alone: it needs torch and diffusers, and travels with every converted pipeline.
"""

import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.schedulers import KarrasDiffusionSchedulers


MODULE = "original_dit"  # the name of this file wherever it travels


class OriginalDiTPipeline(DiTPipeline):
    r"""[`DiTPipeline`] with the frequencies that DiT's own code embeds timesteps with: 10000^(-i/128) for i < 128.

    diffusers spaces them as 10000^(-i/127), so that the phases of the fast ones drift apart as t grows: weights
    trained with the one predict something else with the other. All components are stock.

    Args:
        transformer, vae, scheduler, id2label: those of [`DiTPipeline`]; the transformer's timestep embedding is
            changed in place.
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict | None = None,
    ):
        super().__init__(transformer, vae, scheduler, id2label)
        if id2label is not None:
            self.register_to_config(id2label={str(label): name for label, name in id2label.items()})
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` and, beside it, this file; called by `save_pretrained`, which wrote the rest."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = [MODULE, type(self).__name__]
        index_file.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.copyfile(__file__, folder / f"{MODULE}.py")

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, **kwargs):
        """The index without the name of this file, so that the class that is asked is the class that opens it."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if "transformer" in config:
            config["_class_name"] = cls.__name__
        return loaded
