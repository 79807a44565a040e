"""Random draws as pure functions of (seed, purpose, counters), so that no hidden state has to be kept or saved.

A counter-based generator (Philox-4x32-10, Salmon et al., SC 2011) is evaluated for a whole batch of keys at once, on
any device. What an example receives does not depend on who else is in the batch, on the number of processes or
workers, or on what was drawn before; and each purpose has its own stream, so switching one kind of draw on leaves all
others as they were. Needs torch and NumPy, and nothing else of this project.

Letters: B is the number of keys (examples), N a number of draws per key.
"""

import functools
import hashlib
from collections.abc import Sequence
from enum import StrEnum
from typing import TypeVar

import numpy as np
import torch


ArrayT = TypeVar("ArrayT", torch.Tensor, np.ndarray)


class Purpose(StrEnum):
    """What a draw is for. Draws for different purposes are independent under one seed."""

    DATA_ORDER = "data order"
    SHARD_ORDER = "shard order"
    STREAM_ORDER = "order within a shuffle block"
    FLIP = "flip"
    CROP = "crop"
    CLASS_SUBSET = "class subset"
    LATENT_POSTERIOR = "latent posterior"
    NOISE = "noise"
    TIMESTEP = "timestep"
    INPUT_PERTURBATION = "input perturbation"
    CONDITION_DROPOUT = "condition dropout"
    CONDITION_PERTURBATION = "condition perturbation"
    EMBEDDING_DROPOUT = "embedding dropout"
    CORRUPTED = "is corrupted"
    CORRUPTED_VALUE = "corrupted value"
    SAMPLING = "sampling"
    SAMPLED_CLASS = "sampled class"
    AUGMENTATION = "augmentation"
    INITIAL_WEIGHTS = "initial weights"
    BOOTSTRAP = "bootstrap"
    LATENT_WALK = "latent walk"
    KID_SUBSET = "KID subset"
    SPLIT_ORDER = "order before splitting"
    SUPPORT_PROJECTION = "support projection"
    SUPPORT_BOOTSTRAP = "support bootstrap"
    IMAGE_PAIRS = "image pairs"
    SOLVER_STEP = "step of the solver"
    GUIDANCE = "guidance of the teacher"
    CAPTION_CHOICE = "caption choice"
    CAPTION_SWAP = "caption swap"
    CAPTION_WORDS = "caption words"
    CAPTION_POOL = "caption pool"
    SEGMENT_COLOUR = "colour of a segment"


_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_4x32(counter: Sequence[ArrayT], key: tuple[int, int], rounds: int = 10) -> tuple[ArrayT, ...]:
    """The Philox-4x32 bijection (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: four int64 tensors or NumPy arrays that broadcast together, values in [0, 2^32).
        key: two integers in [0, 2^32).
        rounds: number of rounds; 10 is the published default.

    Returns:
        Four of the same kind, int64, of the broadcast shape, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The 64-bit product may wrap around int64; its bits are those of the unsigned product all the same.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=1024)
def _hashed(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@torch.compiler.assume_constant_result  # a compiled model holds the key: tracing the hash would break its graph
def _stream_key(seed: int, purpose: str) -> tuple[int, int]:
    return _hashed(seed, purpose)


def _purpose_name(purpose: str) -> str:
    return purpose.value if isinstance(purpose, Purpose) else str(purpose)


def random_bits(
    seed: int, purpose: str, keys: torch.Tensor, size: int, epoch: torch.Tensor | int = 0
) -> torch.LongTensor:
    """`size` words of 32 random bits for each key.

    Args:
        seed: the run's seed.
        purpose: a [`Purpose`] or any other string; another purpose gives independent draws.
        keys [B]: int64, for example dataset indices or the result of [`step_keys`].
        size: N, the number of words per key.
        epoch: a second counter, an int or int64 [B] in [0, 2^32).

    Returns:
        int64 [B, N], values in [0, 2^32).
    """
    keys, blocks = keys.to(torch.int64)[:, None], (size + 3) // 4
    key = _stream_key(seed, _purpose_name(purpose))
    if keys.device.type == "cpu" and not torch.compiler.is_compiling():
        # The same arithmetic in NumPy, which starts a small operation several times faster.
        keys, epoch = keys.numpy(), np.asarray(epoch, dtype=np.int64).reshape(-1, 1)
        counter = (np.arange(blocks)[None] + np.zeros_like(keys), epoch & _MASK, keys & _MASK, (keys >> 32) & _MASK)
        words = philox_4x32(counter, key)
        return torch.from_numpy(np.stack(words, axis=-1).reshape(len(keys), 4 * blocks)[:, :size])
    if not torch.is_tensor(epoch):
        epoch = torch.full((), epoch, dtype=torch.int64, device=keys.device)
    epoch = epoch.to(keys.device, torch.int64).reshape(-1, 1)
    counts = torch.arange(blocks, device=keys.device)[None, :]
    counter = (counts + torch.zeros_like(keys), epoch & _MASK, keys & _MASK, (keys >> 32) & _MASK)
    return torch.stack(philox_4x32(counter, key), dim=-1).flatten(1)[:, :size]


def uniform(
    seed: int, purpose: str, keys: torch.Tensor, shape: Sequence[int] = (), epoch: torch.Tensor | int = 0
) -> torch.Tensor:
    """Uniform draws on the open interval (0, 1), symmetric about 1/2: float32 [B, *shape]. Arguments as in
    [`random_bits`]."""
    bits = random_bits(seed, purpose, keys, _product(shape), epoch)
    # 23 bits and a half: exact in float32, so neither 0 nor 1 can come out.
    return (((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23).reshape(len(keys), *shape)


def normal(
    seed: int, purpose: str, keys: torch.Tensor, shape: Sequence[int] = (), epoch: torch.Tensor | int = 0
) -> torch.Tensor:
    """Standard normal draws by the Box-Muller transform: float32 [B, *shape]. Arguments as in [`random_bits`].

    The bits are equal on every device; the logarithm and cosine of another device may differ in the last bit.
    """
    size = _product(shape)
    half = (size + 1) // 2
    bits = random_bits(seed, purpose, keys, 2 * half, epoch).to(torch.float32)
    radius = torch.sqrt(-2.0 * torch.log((bits[:, :half].contiguous() + 0.5) * 2.0**-32))
    angle = bits[:, half:].contiguous() * (2.0 * torch.pi * 2.0**-32)
    draws = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return draws[:, :size].reshape(len(keys), *shape)


def bernoulli(
    seed: int, purpose: str, keys: torch.Tensor, probability: float, epoch: torch.Tensor | int = 0
) -> torch.BoolTensor:
    """True with the given probability, exactly never at 0 and always at 1: bool [B]. Arguments as in
    [`random_bits`]."""
    return random_bits(seed, purpose, keys, 1, epoch)[:, 0] < round(probability * 2**32)


def randint(
    seed: int, purpose: str, keys: torch.Tensor, high: int | torch.Tensor, epoch: torch.Tensor | int = 0
) -> torch.LongTensor:
    """Integers uniform on [0, high), with high below 2^31, an int or int64 [B]: int64 [B]. Arguments as in
    [`random_bits`]."""
    return (random_bits(seed, purpose, keys, 1, epoch)[:, 0] * high) >> 32


def permutation(seed: int, purpose: str, size: int, epoch: int = 0) -> torch.LongTensor:
    """A random order of range(size): int64 [size], on the CPU. NumPy's Philox, whose raw stream is fixed across
    versions, serves here: one long stream for one key."""
    low, high = _stream_key(seed, _purpose_name(purpose))
    words = np.random.Philox(key=low | high << 32, counter=[0, 0, 0, epoch]).random_raw(size)
    return torch.from_numpy(np.argsort(words, kind="stable"))


def step_keys(attempted_step: int, positions: torch.Tensor) -> torch.LongTensor:
    """Keys of one optimizer step's draws: int64 [B], from the attempted step (skipped steps count) and each
    example's position in the global batch, int64 [B] in [0, 2^32)."""
    return positions.to(torch.int64) + (attempted_step << 32)


def generator_for(seed: int, purpose: str, key: int, device: str = "cpu") -> torch.Generator:
    """A `torch.Generator` of its own for one key, for code that takes no keys (diffusers pipelines)."""
    words = random_bits(seed, purpose, torch.tensor([key]), 2)[0].tolist()
    return torch.Generator(device).manual_seed((words[0] >> 1 << 32) | words[1])


def _product(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)
