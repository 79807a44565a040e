"""The original models at any size, written anew from their papers, under the parameter names of the papers' own code:
what conversions are compared with.

Letters: B examples, C channels, h × w their size, D a width, L tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def sinusoids(timesteps: torch.Tensor, dim: int, spacing: int | None = None) -> torch.Tensor:
    """[B] to [B, dim]: cosines, then sines, of frequencies from 1 down to about 1 / 10000."""
    half = dim // 2
    # As an exponential: at t = 999 a power's other rounding is seen.
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (spacing or half))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(q, k, v, heads: int) -> torch.Tensor:
    """Softmax attention [B, L, D] written out."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A normalized sequence, shifted and scaled per example."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class _Modulation(nn.Sequential):
    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))


class _DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = _Modulation(width, 6)

    def forward(self, x, condition):
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        attended = attend(*self.attn["qkv"](modulated(x, shift, scale)).chunk(3, dim=-1), self.heads)
        x = x + gate[:, None] * self.attn["proj"](attended)
        hidden = F.gelu(self.mlp["fc1"](modulated(x, shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * self.mlp["fc2"](hidden)


class OriginalDiT(nn.Module):
    """DiT with adaLN-Zero blocks (Section 3.2 of arXiv:2212.09748). `spacing` is that of the timestep frequencies."""

    def __init__(self, width=48, layers=2, heads=4, classes=10, channels=4, out_channels=8, size=8, patch=2):
        super().__init__()
        self.patch, self.out_channels, self.spacing = patch, out_channels, None
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        side = size // patch
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        along = [sinusoids(axis.flatten(), width // 2).roll(width // 4, dims=1) for axis in (x, y)]  # sines first
        self.pos_embed = nn.Parameter(torch.cat(along, dim=1)[None], requires_grad=False)
        self.blocks = nn.ModuleList([_DiTBlock(width, heads) for _ in range(layers)])
        self.final_layer = nn.ModuleDict(
            {"linear": nn.Linear(width, patch**2 * out_channels), "adaLN_modulation": _Modulation(width, 2)}
        )

    def forward(self, noisy, timesteps, labels):
        """[B, C, h, w], [B], [B] to [B, out_channels, h, w]."""
        x = self.x_embedder["proj"](noisy).flatten(2).transpose(1, 2) + self.pos_embed
        time = self.t_embedder["mlp"](sinusoids(timesteps, 256, self.spacing))
        condition = time + self.y_embedder["embedding_table"](labels)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition).chunk(2, dim=-1)
        x = self.final_layer["linear"](modulated(x, shift, scale))
        side = noisy.shape[-1] // self.patch
        x = x.unflatten(2, (self.patch, self.patch, self.out_channels)).unflatten(1, (side, side))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class _ResBlock(nn.Module):
    """A residual block of the U-Net; the timestep embedding is added in its middle."""

    def __init__(self, channels: int, out: int, embedding: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        last = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), last)
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x, time, context):
        hidden = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class _Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x, context):
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class _GatedGELU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = _Attention(width, width, heads), _Attention(width, context, heads)
        feed_forward = nn.Sequential(_GatedGELU(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))
        self.ff = nn.ModuleDict({"net": feed_forward})

    def forward(self, x, context):
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class _SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([_TransformerBlock(width, context, heads)])

    def forward(self, x, time, context):
        hidden = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        return x + self.proj_out(hidden.transpose(1, 2).unflatten(2, x.shape[2:]))


class _Conv(nn.Conv2d):
    def forward(self, x, time=None, context=None):
        return super().forward(x)


class _Down(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, time, context):
        return self.op(x)


class _Up(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, time=None, context=None):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class _Steps(nn.ModuleList):
    def forward(self, x, time, context):
        for module in self:
            x = module(x, time, context)
        return x


class OriginalUNet(nn.Module):
    """The U-Net of LDM, whose levels attend to a context (Section 3.3 of arXiv:2112.10752).

    Args:
        attends: of every level, whether it does.
    """

    def __init__(self, widths=(32, 64, 64), attends=(False, True, True), blocks=2, heads=1, context=24, channels=3):
        super().__init__()
        base = widths[0]
        time = 4 * base
        self.base = base
        self.time_embed = nn.Sequential(nn.Linear(base, time), nn.SiLU(), nn.Linear(time, time))
        self.input_blocks = nn.ModuleList([_Steps([_Conv(channels, base, 3, padding=1)])])
        width, skips = base, [base]
        for level, out in enumerate(widths):
            for _ in range(blocks):
                steps = [_ResBlock(width, out, time)]
                steps += [_SpatialTransformer(out, context, heads)] if attends[level] else []
                self.input_blocks.append(_Steps(steps))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(_Steps([_Down(width)]))
                skips.append(width)
        middle = [_ResBlock(width, width, time), _SpatialTransformer(width, context, heads)]
        self.middle_block = _Steps([*middle, _ResBlock(width, width, time)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for number in range(blocks + 1):
                steps = [_ResBlock(width + skips.pop(), widths[level], time)]
                width = widths[level]
                steps += [_SpatialTransformer(width, context, heads)] if attends[level] else []
                steps += [_Up(width)] if level and number == blocks else []
                self.output_blocks.append(_Steps(steps))
        last = nn.Conv2d(width, channels, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), last)

    def forward(self, noisy, timesteps, context):
        """[B, C, h, w], [B], [B, L, D] to [B, C, h, w]."""
        time = self.time_embed(sinusoids(timesteps, self.base))
        x, skips = noisy, []
        for block in self.input_blocks:
            x = block(x, time, context)
            skips.append(x)
        x = self.middle_block(x, time, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), time, context)
        return self.out(x)


class _ImageBlock(nn.Module):
    """A residual block of the autoencoder."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, channels, eps=1e-6), nn.GroupNorm(32, out, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x):
        hidden = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _ImageAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v, 1).transpose(1, 2).unflatten(2, x.shape[2:]))


class _Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block_1, self.block_2 = _ImageBlock(width, width), _ImageBlock(width, width)
        self.attn_1 = _ImageAttention(width)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class _DownImage(nn.Module):
    """Halves an image, padded on the right and below alone."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Encoder(nn.Module):
    def __init__(self, widths, blocks: int, latent: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down, width = nn.ModuleList(), widths[0]
        for level, out in enumerate(widths):
            stage = nn.Module()
            stage.block = nn.ModuleList([_ImageBlock(width if n == 0 else out, out) for n in range(blocks)])
            if level < len(widths) - 1:
                stage.downsample = _DownImage(out)
            self.down.append(stage)
            width = out
        self.mid = _Middle(width)
        self.norm_out, self.conv_out = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                x = block(x)
            x = stage.downsample(x) if hasattr(stage, "downsample") else x
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, widths, blocks: int, latent: int):
        super().__init__()
        width = widths[-1]
        self.conv_in, self.mid = nn.Conv2d(latent, width, 3, padding=1), _Middle(width)
        stages = []
        for level in reversed(range(len(widths))):
            stage, out = nn.Module(), widths[level]
            stage.block = nn.ModuleList([_ImageBlock(width if n == 0 else out, out) for n in range(blocks + 1)])
            if level:
                stage.upsample = _Up(out)
            stages.insert(0, stage)
            width = out
        self.up = nn.ModuleList(stages)
        self.norm_out, self.conv_out = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for stage in reversed(self.up):
            for block in stage.block:
                x = block(x)
            x = stage.upsample(x) if hasattr(stage, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class OriginalAutoencoder(nn.Module):
    """The first stage of LDM: with codes a VQ autoencoder, without a KL one whose encoder gives mean and log-variance.

    Args:
        dim: dimension of the latents. inner: channels of encoder and decoder beside them.
    """

    def __init__(self, widths=(32, 64), blocks=2, codes: int | None = 16, dim=3, inner=3):
        super().__init__()
        doubled = 1 if codes else 2
        self.encoder, self.decoder = _Encoder(widths, blocks, doubled * inner), _Decoder(widths, blocks, inner)
        self.quant_conv = nn.Conv2d(doubled * inner, doubled * dim, 1)
        self.post_quant_conv = nn.Conv2d(dim, inner, 1)
        if codes:
            self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codes, dim)})

    def encode(self, images):
        """Images [B, 3, H, W] to latents before quantization, or to mean and log-variance."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents):
        """Latents [B, dim, h, w] to images; of a VQ autoencoder by the nearest codes."""
        if hasattr(self, "quantize"):
            table = self.quantize["embedding"].weight
            nearest = torch.cdist(latents.permute(0, 2, 3, 1), table[None, None]).argmin(-1)
            latents = table[nearest].permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(latents))


@torch.no_grad()
def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with every weight moved away from where it starts, so that none goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def ldm_state(unet: OriginalUNet, first_stage: OriginalAutoencoder | None, table: torch.Tensor) -> dict:
    """What an LDM checkpoint holds under `state_dict`, without its moving average."""
    state = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    if first_stage is not None:
        state |= {f"first_stage_model.{name}": value for name, value in first_stage.state_dict().items()}
        state["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(2, 2)
    state["cond_stage_model.embedding.weight"] = table
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    state["betas"] = betas.float()
    state["alphas_cumprod"] = (1 - betas).cumprod(0).float()
    return {name: value.detach().clone() for name, value in state.items()}
