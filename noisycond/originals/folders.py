"""Folders in the layouts of the released checkpoints, to pipelines that stock diffusers or a self-contained class
opens."""

import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, VQModel

from noisycond.denoisers.dit import STOCK_NULL_CLASS
from noisycond.errors import InputError, require
from noisycond.noise_schedule import named_schedule
from noisycond.pipelines import LDMClassToImagePipeline, LDMTextToImagePipeline
from noisycond.sampling import noise_shape


logger = logging.getLogger(__name__)
STOCK_FACTOR = 8  # of every first stage, as diffusers' `LDMTextToImagePipeline` takes it
ROWS = STOCK_NULL_CLASS + 1  # of the table that `DiTPipeline` expects


def open_ldm_folder(
    source: str, first_stage: AutoencoderKL | VQModel | None, scaling_factor: float | None
) -> LDMClassToImagePipeline:
    """A class-conditional LDM in any layout.

    Args:
        source: a folder or Hub id. first_stage: instead of its own. scaling_factor: instead of its first stage's.

    Raises:
        InputError: a piece is missing; the message says which.
    """
    pipeline = _open(LDMClassToImagePipeline, source, first_stage, scaling_factor)
    logger.info("Stock diffusers has no class for %s; the converted folder carries its own.", source)
    return pipeline


def open_text_folder(
    source: str, first_stage: AutoencoderKL | VQModel | None, scaling_factor: float | None
) -> LDMTextToImagePipeline:
    """A text-to-image LDM; arguments and what is raised as for [`open_ldm_folder`]. What stock diffusers does with the
    source as it is, is logged."""
    pipeline = _open(LDMTextToImagePipeline, source, first_stage, scaling_factor)
    factor = pipeline.vae_scale_factor
    if factor == STOCK_FACTOR:
        logger.info("Stock diffusers draws %s in full size as it is.", source)
    else:
        side = noise_shape(pipeline)[1]
        logger.warning(
            "Stock diffusers opens %s, but draws images of side %s instead of %s: it takes the first stage to be of "
            "factor %d, and it is of factor %d. The converted folder carries a class of its own.",
            source,
            side * factor // STOCK_FACTOR * factor,
            side * factor,
            STOCK_FACTOR,
            factor,
        )
    return pipeline


def _open(kind: type, source: str, first_stage: AutoencoderKL | VQModel | None, scaling_factor: float | None):
    given = {} if first_stage is None else {"vqvae": first_stage}
    try:
        pipeline = kind.from_pretrained(source, scaling_factor=scaling_factor, **given)
    except (OSError, ValueError) as error:
        raise InputError(f"SOURCE {source}: {' '.join(str(error).split())}") from error
    require(
        pipeline.vqvae is not None,
        f"SOURCE {source}: its model_index.json declares no first stage; name one with --first_stage.",
    )
    mend_scheduler(pipeline)
    return pipeline


def open_dit_folder(
    source: str, first_stage: AutoencoderKL | VQModel | None, scaling_factor: float | None
) -> DiTPipeline:
    """A `DiTPipeline` whose null embedding stands where it looks for it; arguments as for [`open_ldm_folder`]. What
    stock diffusers does with the source as it is, is logged."""
    given = {} if first_stage is None else {"vae": first_stage}
    for name, value in DiffusionPipeline.load_config(source).items():
        is_component = isinstance(value, list) and name != "_class_name" and value[1] is not None
        is_missing = Path(source).is_dir() and not (Path(source) / name).is_dir()
        require(not (is_component and is_missing and name not in given), f"SOURCE {source}: {name}/ is missing there.")
    try:
        pipeline = DiTPipeline.from_pretrained(source, **given)
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"SOURCE {source}: diffusers cannot open it ({reason}).") from error
    if first_stage is None and scaling_factor is not None:
        pipeline.vae.register_to_config(scaling_factor=scaling_factor)
    rows = place_null_class(pipeline, source)
    if rows == ROWS:
        logger.info("Stock diffusers opens and guides %s as it is.", source)
    else:
        logger.warning(
            "Stock diffusers opens %s, but fails when it guides: it looks for the null class in row %d of tables of "
            "%d rows. It is placed there.",
            source,
            STOCK_NULL_CLASS,
            rows,
        )
    mend_scheduler(pipeline)
    return pipeline


def place_null_class(pipeline: DiTPipeline, source: str) -> int:
    """Makes every block's table one of 1001 rows, the null embedding (its last row) in row 1000 and in all rows after
    the classes.

    Returns:
        The number of rows before.

    Raises:
        InputError: there are more.
    """
    embedders = [block.norm1.emb.class_embedder for block in pipeline.transformer.transformer_blocks]
    rows = len(embedders[0].embedding_table.weight)
    require(
        rows <= ROWS,
        f"SOURCE {source}: it has {rows - 1} classes, but DiTPipeline holds {STOCK_NULL_CLASS} at most.",
    )
    if rows < ROWS:
        for embedder in embedders:
            table = embedder.embedding_table.weight.data
            table = torch.cat([table, table[-1:].expand(ROWS - rows, -1)])
            embedder.embedding_table = torch.nn.Embedding.from_pretrained(table, freeze=False)
            embedder.num_classes = STOCK_NULL_CLASS
        pipeline.transformer.register_to_config(num_embeds_ada_norm=STOCK_NULL_CLASS)
    return rows


def mend_scheduler(pipeline: DiffusionPipeline) -> None:
    """Latents unclipped, and a schedule by its name where its betas are spelled out; in place."""
    config, changed = pipeline.scheduler.config, {}
    if config.get("clip_sample"):
        changed["clip_sample"] = False
        logger.warning("The scheduler clips x_0 to [-1, 1], which is wrong for latents; the converted one does not.")
    if config.get("trained_betas") is not None:
        named = named_schedule(config["trained_betas"])
        if named is not None:
            changed |= {"trained_betas": None, **named}
            logger.info("The scheduler's %d betas are the schedule %s.", len(config["trained_betas"]), named)
    pipeline.scheduler = type(pipeline.scheduler).from_config(config, **changed)
