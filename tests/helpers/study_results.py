"""Results of studies that never ran, for tests of their tables, figures and reports: numbers made up after a rule."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from noisycond.study.definition import Stage, Study, StudyCell
from noisycond.study.methods import Method, method_of
from noisycond.study.results import COLUMNS as RESULT_COLUMNS
from noisycond.study.results import Results


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


# As large as the study on digits.
LARGE = {
    "clean": {},
    **{f"eta-{eta:g}": {"corruption_ratio": eta} for eta in (0.025, 0.05, 0.075, 0.1, 0.15, 0.2)},
    **{f"eta-random-{eta:g}": {"corruption_ratio": eta, "corruption_mode": "random"} for eta in (0.025, 0.1)},
    **{f"cep-u-{gamma:g}": {"cep_gamma": gamma} for gamma in (0.1, 0.5, 1, 2)},
    **{f"cep-g-{gamma:g}": {"cep_gamma": gamma, "cep_type": "gaussian"} for gamma in (0.1, 0.5, 1, 2)},
    "ip": {"input_perturbation": 0.1},
    "dropout": {"embedding_dropout": 0.1},
    "label-smoothing": {"label_smoothing": 0.1},
    "fixed-cep": {"cep_gamma": 1, "cep_mode": "fixed"},
}
TINY = {"clean": {}, "eta-0.05": {"corruption_ratio": 0.05}, "cep-u-1": {"cep_gamma": 1}}
COLUMNS = list(RESULT_COLUMNS)


def toy_cell(block: str, label: str, settings: Mapping) -> StudyCell:
    stages = (Stage("train_class_cond", {"recipe": "digits_ldm", **settings}),)
    return StudyCell(block, label, method_of(settings), settings, stages)


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
    report_scale=2.25,
) -> Results:
    """Results of every cell, seed and guidance scale: seeds move all cells alike, and each a little on its own.

    Args:
        cells: labels of CELLS, or settings by label. metrics: of METRICS. steps: of evaluations during training, at
            the report's scale.
        failed, missing: pairs of cell and seed, in all blocks. samples: a picture that every finished run made.
    """
    named = cells if isinstance(cells, Mapping) else {label: CELLS[label] for label in cells}
    made = tuple(toy_cell(block, label, settings) for block in blocks for label, settings in named.items())
    evaluation = Stage("evaluate_model", {"recipe": "digits_evaluation"})
    study = Study(Path("studies/toy.yaml"), "A toy study", tuple(seeds), made, evaluation, report_scale)
    places = [(scale, pd.NA) for scale in guidance_scales]
    places += [(report_scale, step) for step in steps]
    runs, lines = [], []
    for seed, cell in itertools.product(seeds, study.cells):
        run = cell.label, seed
        status = "failed" if run in failed else "missing" if run in missing else "done"
        runs.append(_run(cell, seed, status, samples))
        if status != "done":
            continue
        for (scale, step), metric in itertools.product(places, metrics):
            value = _value(cell, seed, scale, step, metric)
            where = {"block": cell.block, "seed": seed, "guidance_scale": scale, "step": step}
            lines.append(_identity(cell.label, cell.method) | where | {"metric": metric, "value": value})
    return Results(study, runs, frame(lines), Path("runs/studies/toy/results"))


def change_study(results: Results, **changes) -> None:
    results.study = replace(results.study, **changes)


def add_samples(results: Results, folder: Path, size=(100, 60)) -> None:
    """A picture for each run: its red counts the cells, its green the seeds."""
    labels = list(dict.fromkeys(run["cell"] for run in results.runs))
    for run in results.runs:
        run["samples"] = folder / f"{run['cell']}-seed-{run['seed']}.png"
        Image.new("RGB", size, (10 * labels.index(run["cell"]), 20 * run["seed"], 90)).save(run["samples"])


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


def _run(cell: StudyCell, seed, status, samples) -> dict:
    place = f"runs/toy/{cell.label}-seed-{seed}"
    return {
        "block": cell.block,
        "cell": cell.label,
        "seed": seed,
        "status": status,
        "reason": "train_class_cond.py: --cep_gamma must be at least 0, but is -1." if status == "failed" else "",
        "attempts": {"done": 1, "failed": 2, "missing": 0}[status],
        "seconds": {"train_class_cond": 130.2, "evaluate_model": 60.1} if status == "done" else {},
        "commands": [
            f"accelerate launch train_class_cond.py --recipe digits_ldm --seed {seed} --output_dir {place}",
            f"accelerate launch evaluate_model.py --recipe digits_evaluation --pipelines {place}",
        ],
        "settings": dict(cell.settings),
        "environment": {"torch": "2.15.0", "device": "cpu"},
        "samples": samples if status == "done" else None,
        "image_choices": {"guidance_scale": [1.0, 2.25, 4.0], "num_images": 360},
        "curve_choices": {},
    }
