"""DiT as its paper has it (arXiv:2212.09748): one timestep-and-label embedding for all blocks, in diffusers' classes.

diffusers' `DiTTransformer2DModel` holds an embedding in every block, and in train mode each drops labels on its own,
so no example would ever be unconditional as a whole. Here the blocks read one embedding, computed once per forward;
the exported folder holds the copy per block that the stock layout wants. Letters: B examples, C latent channels,
h × w their size, D the width, K classes.
"""

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from noisycond.errors import InputError, require


# `DiTPipeline` asks for this row when it guides, whatever the number of classes.
STOCK_NULL_CLASS = 1000


class _Conditioning(nn.Module):
    """Stands in a block where the stock embedding was: hands on the embedding that was computed once."""

    def forward(self, timestep: torch.Tensor, class_labels: None, hidden_dtype: torch.dtype | None = None):
        return timestep.to(hidden_dtype) if hidden_dtype is not None else timestep


class DiTBackbone(nn.Module):
    """A `DiTTransformer2DModel` that reads a condition embedding [B, D].

    Args:
        config: the arguments of `DiTTransformer2DModel`; `num_embeds_ada_norm` is not used.
    """

    model_class = DiTTransformer2DModel
    # `facebook/DiT-XL-2-256` still goes by the class's first name.
    known_as = ("DiTTransformer2DModel", "Transformer2DModel")
    subfolder = "transformer"
    fits_any_size = False
    can_learn_variance = True
    # Classes of modules that FSDP gathers one at a time.
    shard_units = ("BasicTransformerBlock",)
    embedding_std = 0.02

    def __init__(self, **config):
        super().__init__()
        # One class is enough: the blocks' own embeddings are thrown away.
        self.model = DiTTransformer2DModel(**{**config, "num_embeds_ada_norm": 1})
        stock = self.model.transformer_blocks[0].norm1.emb
        self.time_proj: Timesteps = stock.time_proj
        self.timestep_embedder: TimestepEmbedding = stock.timestep_embedder
        for block in self.model.transformer_blocks:
            block.norm1.emb = _Conditioning()
        self.initialize()

    @staticmethod
    def check(config: dict, latent_size: int, num_classes: int) -> None:
        """Raises InputError where patches do not fit the latents, or the stock pipeline cannot hold the classes."""
        check_exportable(num_classes)
        patch_size = config.get("patch_size", 2)
        require(
            latent_size % patch_size == 0,
            f"--resolution: the latents are {latent_size} pixels wide, which is no multiple of the denoiser's patch "
            f"size {patch_size}.",
        )

    @property
    def dim(self) -> int:
        """D, the dimension of the condition embedding."""
        return self.model.inner_dim

    @torch.no_grad()
    def initialize(self) -> None:
        """adaLN-Zero (Section 3.2 of arXiv:2212.09748, and its code): every block starts as the identity and the
        prediction at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.model.pos_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embedder.linear_2.weight, std=0.02)
        modulations = [block.norm1.linear for block in self.model.transformer_blocks]
        for module in (*modulations, self.model.proj_out_1, self.model.proj_out_2):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Noisy latents [B, C, h, w], timesteps int64 [B] and embeddings [B, D] to a prediction [B, C or 2C, h, w]."""
        projected = self.time_proj(timesteps).to(embedding.dtype)
        conditioning = self.timestep_embedder(projected) + embedding
        return self.model(noisy, timestep=conditioning, class_labels=None, return_dict=False)[0]

    def export(self, class_table: torch.Tensor) -> DiTTransformer2DModel:
        """The stock model that gives the same predictions, in eval mode and float32.

        Args:
            class_table [K + 1, D]: embeddings of the classes and, last, the null embedding.

        Returns:
            A model with a table of 1001 rows per block: classes 0 to K - 1, and the null embedding in row 1000, where
            `DiTPipeline` looks for it, and in the rows between.

        Raises:
            InputError: more than 1000 classes.
        """
        num_classes = len(class_table) - 1
        check_exportable(num_classes)
        # Built on the meta device and filled by reference: initializing 1001 rows per block takes long.
        with torch.device("meta"):
            model = DiTTransformer2DModel(**{**self.model.config, "num_embeds_ada_norm": STOCK_NULL_CLASS})
        state = {name: value.detach().float().cpu() for name, value in self.model.state_dict().items()}
        table = class_table[-1:].detach().float().cpu().repeat(STOCK_NULL_CLASS + 1, 1)
        table[:num_classes] = class_table[:-1]
        for number in range(len(self.model.transformer_blocks)):
            prefix = f"transformer_blocks.{number}.norm1.emb"
            state[f"{prefix}.class_embedder.embedding_table.weight"] = table.clone()
            for name, value in self.timestep_embedder.state_dict().items():
                state[f"{prefix}.timestep_embedder.{name}"] = value.detach().float().cpu().clone()
        model.load_state_dict(state, strict=True, assign=True)
        model.pos_embed.pos_embed = self.model.pos_embed.pos_embed.detach().float().cpu().clone()
        return model.eval()

    def load(self, folder: str, subfolder: str | None, num_classes: int) -> torch.Tensor:
        """Takes the weights of a pretrained stock model (a folder or Hub id); see [`DiTBackbone.load_stock`]."""
        options = {} if subfolder is None else {"subfolder": subfolder}
        return self.load_stock(DiTTransformer2DModel.from_pretrained(folder, **options), num_classes)

    def load_stock(self, model: DiTTransformer2DModel, num_classes: int) -> torch.Tensor:
        """Takes the weights of a stock model whose blocks all hold the same embedding.

        Args:
            model: a `DiTTransformer2DModel` with the shapes of this one.
            num_classes: K; rows 0 to K - 1 of the stock table are the classes, its last row is the null embedding.

        Returns:
            The class table [K + 1, D], null embedding last.

        Raises:
            InputError: the blocks' embeddings differ, so that one cannot stand for all; or fewer than K classes.
        """
        state = model.state_dict()
        first = {}
        for name in list(state):
            block, found, rest = name.partition(".norm1.emb.")
            if found:
                value = state.pop(name)
                if not torch.equal(first.setdefault(rest, value), value):
                    raise InputError(
                        f"the pretrained DiT has embeddings that differ between blocks ({name}), as stock diffusers "
                        "training leaves them; this trainer needs one embedding for all blocks, as in the paper."
                    )
        table = first.pop("class_embedder.embedding_table.weight")
        if len(table) - 1 < num_classes:
            raise InputError(f"the pretrained DiT knows {len(table) - 1} classes, but the dataset has {num_classes}.")
        self.model.load_state_dict(state)
        self.timestep_embedder.load_state_dict(
            {name.removeprefix("timestep_embedder."): value for name, value in first.items()}
        )
        return torch.cat([table[:num_classes], table[-1:]])


def check_exportable(num_classes: int) -> None:
    """Raises InputError where the stock pipeline cannot hold so many classes."""
    if num_classes > STOCK_NULL_CLASS:
        raise InputError(
            f"the dataset has {num_classes} classes, but DiTPipeline takes its null class from row {STOCK_NULL_CLASS} "
            f"and so holds {STOCK_NULL_CLASS} at most; choose some with --class_subset."
        )
