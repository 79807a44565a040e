"""Results of a study that never ran, with the attributes of noisycond's own, for tests of tables, figures, reports."""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from noisycond.study.methods import Method, method_of


# Value of the clean model, what the strongest corruption adds to it, and how far seeds move it.
METRICS = {
    "fid": (0.6, 0.8, 0.05),
    "sfid": (0.9, 0.5, 0.05),
    "inception_score": (8.4, -1.0, 0.1),
    "kid": (0.002, 0.004, 0.0004),
    "precision": (0.84, -0.2, 0.01),
    "recall": (0.80, 0.1, 0.01),
    "density": (0.95, -0.2, 0.02),
    "coverage": (0.92, -0.05, 0.01),
    "topp_f1": (0.80, -0.05, 0.02),
    "rmd_top": (120.0, 20.0, 4.0),
    "rmd_mean": (15.0, 3.0, 0.5),
    "entropy": (-5.0, 6.0, 0.5),
    "memorization_ratio": (0.02, -0.02, 0.004),
    "nearest_train_distance": (4.1, 0.4, 0.05),
    "class_agreement": (0.90, -0.2, 0.004),
}
CELLS = {
    "clean": {},
    "eta-0.025": {"corruption_ratio": 0.025},
    "eta-0.05": {"corruption_ratio": 0.05},
    "eta-0.1": {"corruption_ratio": 0.1},
    "eta-0.2": {"corruption_ratio": 0.2},
    "eta-random-0.025": {"corruption_ratio": 0.025, "corruption_mode": "random"},
    "asymmetric": {"corruption_ratio": 0.1, "corruption_type": "asymmetric"},
    "cep-u-0.1": {"cep_gamma": 0.1},
    "cep-u-1": {"cep_gamma": 1.0},
    "cep-u-2": {"cep_gamma": 2.0},
    "cep-g-1": {"cep_gamma": 1.0, "cep_type": "gaussian"},
    "fixed-cep": {"cep_gamma": 1.0, "cep_mode": "fixed"},
    "ip": {"input_perturbation": 0.1},
    "dropout": {"embedding_dropout": 0.1},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"corruption_ratio": 0.025, "cep_gamma": 1.0},
}


@dataclass
class Cell:
    block: str
    label: str
    method: Method
    settings: dict


@dataclass
class Study:
    name: str = "toy"
    title: str = "A toy study"
    path: Path = Path("studies/toy.yaml")
    seeds: list[int] = field(default_factory=list)
    report_guidance_scale: float | None = 2.25
    blocks: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)


@dataclass
class Results:
    study: Study
    runs: list[dict]
    values: pd.DataFrame


COLUMNS = [
    *["block", "cell", "kind", "type", "mode", "strength", "title"],
    *["seed", "guidance_scale", "step", "metric", "value"],
]


def frame(lines: list[dict]) -> pd.DataFrame:
    """The tidy values; lines name `cell`, `seed`, `value` and whatever differs from the defaults below."""
    usual = {"block": "", "guidance_scale": 2.25, "step": pd.NA, "metric": "fid"}
    of_cells = {label: _identity(label, method_of(settings)) for label, settings in CELLS.items()}
    filled = [usual | of_cells.get(line["cell"], {}) | line for line in lines]
    types = {"step": "Int64", "guidance_scale": "float64", "strength": "float64", "value": "float64"}
    return pd.DataFrame(filled, columns=COLUMNS).astype(types)


def _identity(label: str, method: Method) -> dict:
    names = {name: getattr(method, name) for name in ("kind", "type", "mode", "strength", "title")}
    return {"cell": label} | names


def toy_results(
    seeds=(0, 1, 2, 3, 4),
    blocks=("",),
    guidance_scales=(1.0, 2.25, 4.0),
    steps=(),
    cells=tuple(CELLS),
    metrics=tuple(METRICS),
    failed=(),
    missing=(),
    samples=None,
) -> Results:
    """Results of every cell, seed and guidance scale: seeds move all cells alike, and each a little on its own.

    Args:
        cells: labels of CELLS. metrics: of METRICS. steps: of evaluations during training, at the report's scale.
        failed, missing: pairs of cell and seed, in all blocks. samples: a picture that every finished run made.
    """
    study = Study(seeds=list(seeds), blocks=list(blocks))
    study.cells = [Cell(block, label, method_of(CELLS[label]), CELLS[label]) for block in blocks for label in cells]
    places = [(scale, pd.NA) for scale in guidance_scales]
    places += [(study.report_guidance_scale, step) for step in steps]
    runs, lines = [], []
    for seed, cell in itertools.product(seeds, study.cells):
        run = cell.label, seed
        status = "failed" if run in failed else "missing" if run in missing else "done"
        runs.append(_run(cell.block, *run, status, samples))
        if status != "done":
            continue
        for (scale, step), metric in itertools.product(places, metrics):
            value = _value(cell, seed, scale, step, metric)
            where = {"block": cell.block, "seed": seed, "guidance_scale": scale, "step": step}
            lines.append(_identity(cell.label, cell.method) | where | {"metric": metric, "value": value})
    return Results(study, runs, frame(lines))


def _value(cell, seed, scale, step, metric) -> float:
    """Slight corruption helps, more hurts; guidance and short training hurt all alike."""
    clean, effect, spread = METRICS[metric]
    method = cell.method
    strength = {"clean": 0.0, "corruption": 5 * method.strength, "cep": 0.3 * method.strength}.get(method.kind, 0.1)
    shape = strength if effect * clean <= 0 else strength - 2 * math.sqrt(strength) * (strength < 0.5)
    late = 0.0 if step is pd.NA else 1000 / step
    guided = 0.0 if math.isnan(scale) else abs(scale - 1.5)
    common = np.random.default_rng(_bytes(seed, metric)).normal()
    own = np.random.default_rng(_bytes(seed, metric, cell.block, cell.label, scale, step)).normal()
    return clean + 0.5 * effect * shape + 0.03 * abs(clean) * (late + guided) + spread * (common + 0.3 * own)


def _bytes(*things) -> list[int]:
    return list(repr(things).encode())


def _run(block, label, seed, status, samples) -> dict:
    place = f"runs/toy/{label}-seed-{seed}"
    return {
        "block": block,
        "cell": label,
        "seed": seed,
        "status": status,
        "reason": "train_class_cond.py: --cep_gamma must be at least 0, but is -1." if status == "failed" else "",
        "attempts": {"done": 1, "failed": 2, "missing": 0}[status],
        "seconds": {"train_class_cond": 130.2, "evaluate_model": 60.1} if status == "done" else {},
        "commands": [
            f"accelerate launch train_class_cond.py --recipe digits_ldm --seed {seed} --output_dir {place}",
            f"accelerate launch evaluate_model.py --recipe digits_evaluation --pipelines {place}",
        ],
        "settings": dict(CELLS[label]),
        "environment": {"torch": "2.15.0", "device": "cpu"},
        "samples": samples if status == "done" else None,
        "image_choices": {"guidance_scale": [1.0, 2.25, 4.0], "num_images": 360},
    }
