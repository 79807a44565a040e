"""A small classifier of handwritten digits, whose features serve metrics where nothing can be downloaded; it ships
trained, and this module trains it anew: python -m noisycond.evaluation.digits_classifier --output_dir FOLDER

Letters: B examples, K classes, S the side of a feature map, C its channels.
"""

import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from noisycond import randomness
from noisycond.arguments import Arguments, flag, parse_arguments
from noisycond.data.sources import Digits
from noisycond.errors import InputError, in_one_line, one_sentence_errors, require, writing
from noisycond.randomness import Purpose
from noisycond.run_folder import write_atomically


SHIPPED = Path(__file__).parent / "weights" / "digits"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
RESOLUTION = 32
CHANNELS = (16, 32, 48, 64, 64)
STRIDES = (1, 2, 2, 2, 1)
SPATIAL_CHANNELS = 7  # as many as the ADM evaluator keeps of Inception's


class DigitsFeatures(NamedTuple):
    """What the classifier makes of a batch.

    Attributes:
        maps: one feature map per block, float32 [B, C, S, S], not negative.
        pooled [B, 64]: float32, the last map averaged over space.
        spatial [B, 7 · S · S]: float32, the first seven channels of the last map, channels last, flattened.
        logits [B, K]: float32, before the softmax.
    """

    maps: list[torch.Tensor]
    pooled: torch.Tensor
    spatial: torch.Tensor
    logits: torch.Tensor


class DigitsClassifier(nn.Module):
    """Five blocks of convolution, batch normalization and ReLU on images of 32×32, then the mean over space and one
    linear layer.

    Args:
        channels: C of each block's feature map; the sides are 32, 16, 8, 4 and 4.
        num_classes: K.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS, num_classes: int = 10):
        super().__init__()
        widths = (3, *channels)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after, stride in zip(widths, channels, STRIDES, strict=False)
        )
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, pixels: torch.Tensor) -> DigitsFeatures:
        """Pixels as [`prepare`] makes them, float32 [B, 3, 32, 32] in [-1, 1], to features."""
        maps = []
        for block in self.blocks:
            pixels = block(pixels)
            maps.append(pixels)
        pooled = maps[-1].mean((2, 3))
        spatial = maps[-1][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return DigitsFeatures(maps, pooled, spatial, self.head(pooled))


def prepare(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 [B, 3, H, W] to float32 [B, 3, 32, 32] in [-1, 1]: bilinear, antialiased where it makes smaller;
    images of 32×32 keep their values."""
    pixels = images.to(torch.float32)
    if pixels.shape[2:] != (RESOLUTION, RESOLUTION):
        size = (RESOLUTION, RESOLUTION)
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
    return pixels / 127.5 - 1.0


def open_classifier(path: str | Path | None = None) -> DigitsClassifier:
    """A trained classifier in eval mode, on the CPU.

    Args:
        path: a folder that the training command wrote; None opens the one that ships with noisycond.

    Raises:
        InputError: there is none in the folder, or it is damaged or another model's.
    """
    folder = SHIPPED if path is None else Path(path)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        # The generator of the process stays as it was: whoever evaluates during training trains on unchanged.
        with torch.random.fork_rng(devices=[]):
            model = DigitsClassifier(tuple(config["channels"]), config["num_classes"])
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} is no folder of a digits classifier: it needs {CONFIG_NAME} and {WEIGHTS_NAME}, as "
            "`python -m noisycond.evaluation.digits_classifier --output_dir FOLDER` writes them."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        reason = textwrap.shorten(in_one_line(error), 160, placeholder=" …").rstrip(".")
        raise InputError(f"{folder} holds no digits classifier, or a damaged one ({reason}).") from error
    return model.eval().requires_grad_(False)


def read_digits(split: str, resolution: int = RESOLUTION) -> tuple[torch.Tensor, torch.Tensor]:
    """All digits of a split: images uint8 [B, 3, R, R], white on black, and labels int64 [B]."""
    source = Digits(split)
    images = np.stack([np.asarray(source.read(index, resolution)) for index in range(len(source))])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(source.labels)


@torch.no_grad()
def accuracy(model: DigitsClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images uint8 [B, 3, H, W] whose largest logit is that of the label int64 [B]."""
    model.eval()
    right = [
        (model(prepare(batch)).logits.argmax(1) == truth).sum().item()
        for batch, truth in zip(images.split(256), labels.split(256), strict=True)
    ]
    return sum(right) / len(labels)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images as a generative model might draw them: turned, scaled, shifted, sheared, blurred, brighter or darker, and
    with noise, each a little.

    Args:
        images [B, 3, S, S]: uint8, white on black.

    Returns:
        uint8 [B, 3, S, S].
    """

    def between(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(len(images), *shape, generator=generator) * (high - low) + low

    pixels = images.to(torch.float32) / 255
    angle, shear = between(-0.25, 0.25), between(-0.15, 0.15)
    scale_x, scale_y = between(0.85, 1.15), between(0.85, 1.15)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    rows = [
        torch.stack([cosine * scale_x, shear - sine * scale_y, between(-0.15, 0.15)], 1),
        torch.stack([sine * scale_x, cosine * scale_y, between(-0.15, 0.15)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="zeros", align_corners=False)  # beyond the edge it is black
    blurred = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    pixels = torch.lerp(pixels, blurred, between(0.0, 1.0, 1, 1, 1))
    pixels = pixels * between(0.7, 1.2, 1, 1, 1) + between(0.0, 0.1, 1, 1, 1)
    noise = torch.randn(pixels.shape, generator=generator)
    pixels = pixels + noise * between(0.0, 0.12, 1, 1, 1)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass
class ClassifierArguments(Arguments):
    output_dir: str = flag("runs/digits_classifier", "Where the classifier is written.")
    overwrite_output_dir: bool = flag(False, "Replace a classifier that is there.")
    num_train_epochs: int = flag(40, "Passes over the 1,437 training digits.")
    train_batch_size: int = flag(64, "Images per step.")
    learning_rate: float = flag(3e-3, "The highest; it rises for a tenth of the steps and falls as a cosine to 0.")
    weight_decay: float = flag(0.02, "Of AdamW.")
    seed: int = flag(0, "Seed of weights, order and augmentation.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_train_epochs", "train_batch_size", "learning_rate"):
            require(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}, but it must be positive.")
        require(self.weight_decay >= 0, f"--weight_decay is {self.weight_decay}, but it must not be negative.")
        require(
            self.overwrite_output_dir or not (Path(self.output_dir) / WEIGHTS_NAME).exists(),
            f"--output_dir {self.output_dir} holds a model already; name another folder, or add "
            "--overwrite_output_dir.",
        )


def build_classifier(seed: int) -> DigitsClassifier:
    """An untrained classifier, its weights a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        model = DigitsClassifier()
    generator = randomness.generator_for(seed, Purpose.INITIAL_WEIGHTS, 0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(model.head.bias)
    return model


def learning_rate_factor(step: int, steps: int) -> float:
    """A warm-up over a tenth of the steps, then a cosine that ends at 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(args: ClassifierArguments) -> DigitsClassifier:
    """The classifier trained on the `train` split; a function of the arguments (and of the number of threads, in the
    last bits)."""
    images, labels = read_digits("train")
    model = build_classifier(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay)
    per_epoch = max(1, len(images) // args.train_batch_size)  # a rest too small for its own statistics waits
    steps = per_epoch * args.num_train_epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    model.train()
    with tqdm(total=steps, desc="training", unit="step") as progress:
        for epoch in range(args.num_train_epochs):
            order = randomness.permutation(args.seed, Purpose.DATA_ORDER, len(images), epoch)
            generator = randomness.generator_for(args.seed, Purpose.AUGMENTATION, epoch)
            for chosen in order.split(args.train_batch_size)[:per_epoch]:
                pixels = prepare(augment(images[chosen], generator))
                loss = F.cross_entropy(model(pixels).logits, labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def save_classifier(model: DigitsClassifier, folder: Path, facts: dict) -> None:
    """Writes weights and configuration, to which `facts` of the training are added."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{WEIGHTS_NAME}.part"
    beside.write_bytes(save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    beside.replace(folder / WEIGHTS_NAME)
    shape = {"channels": [block[0].out_channels for block in model.blocks], "num_classes": model.head.out_features}
    write_atomically(folder / CONFIG_NAME, json.dumps(shape | facts, indent=2) + "\n")


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(ClassifierArguments, argv)
    model = train(args)
    images, labels = read_digits("test")
    share = accuracy(model, images, labels)
    facts = {name: getattr(args, name) for name in ("seed", "num_train_epochs", "train_batch_size", "learning_rate")}
    facts |= {"weight_decay": args.weight_decay, "held_out_accuracy": round(share, 4)}
    with writing(f"--output_dir {args.output_dir}", "the classifier"):
        save_classifier(model, Path(args.output_dir), facts)
    print(f"\nAccuracy {share:.2%} on {len(labels)} held-out digits.\nThe classifier: {args.output_dir}")


if __name__ == "__main__":
    main()
