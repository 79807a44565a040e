"""Results of a study as `noisycond.study.results` hands them on, with numbers made up after a rule: FID is lowest at a
slight corruption, precision rises and recall falls with guidance."""

import math
import random
from types import SimpleNamespace

import pandas
from PIL import Image

from noisycond.study.methods import method_of


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
METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "coverage", "topp_f1", "rmd_top", "rmd_mean")
METRICS += ("entropy", "memorization_ratio", "class_agreement")


def synthetic_study(
    cells=LARGE,
    seeds=range(5),
    scales=(1.0, 1.5, 2.25, 4.0),
    blocks=("",),
    metrics=METRICS,
    steps=(),
    report_scale=2.25,
):
    """Results with `values`, `runs` and `study`, as far as figures, tables and the report read them."""
    methods = {label: method_of(settings) for label, settings in cells.items()}
    lines, runs = [], []
    for block in blocks:
        for seed in seeds:
            for label, method in methods.items():
                runs.append({"block": block, "cell": label, "seed": seed, "status": "done", "samples": None})
                places = [(scale, None) for scale in scales] + [(2.25, step) for step in steps]
                for scale, step in places:
                    for metric in metrics:
                        draws = random.Random(f"{block}{seed}{label}{metric}{scale}{step}")
                        value = _value(metric, method, scale, step, draws)
                        lines.append(_line(block, label, method, seed, scale, step, metric, value))
    values = pandas.DataFrame(lines).astype({"step": "Int64", "guidance_scale": "float64"})
    order = [
        SimpleNamespace(block=block, label=label, method=methods[label], settings=cells[label])
        for block in blocks
        for label in cells
    ]
    study = SimpleNamespace(name="synthetic", title="Synthetic", seeds=list(seeds), blocks=list(blocks), cells=order)
    study.report_guidance_scale = report_scale
    return SimpleNamespace(values=values, runs=runs, study=study)


def add_samples(results, folder, size=(100, 60), cells=None):
    """A picture for each run (of some cells, if named): its red counts the cells, its green the seeds."""
    labels = list(dict.fromkeys(run["cell"] for run in results.runs))
    for run in results.runs:
        if cells is None or run["cell"] in cells:
            run["samples"] = folder / f"{run['cell']}-seed-{run['seed']}.png"
            Image.new("RGB", size, (10 * labels.index(run["cell"]), 20 * run["seed"], 90)).save(run["samples"])


def _line(block, label, method, seed, scale, step, metric, value):
    what = {"kind": method.kind, "type": method.type, "mode": method.mode, "strength": method.strength}
    where = {"title": method.title, "seed": seed, "guidance_scale": scale, "step": step}
    return {"block": block, "cell": label} | what | where | {"metric": metric, "value": value}


def _value(metric, method, scale, step, draws):
    """Strength 1 is the best one of its method; its gain is the same for all."""
    best = {"corruption": 0.05, "cep": 0.7, "clean": 1.0}.get(method.kind, 0.5)
    strength = 0.0 if method.kind == "clean" else method.strength / best
    gain = strength * math.exp(1 - strength) if method.kind in ("corruption", "cep") else 0.3
    noise = draws.gauss(0, 1)
    fid = 2.6 - 0.5 * gain + 0.25 * max(0, strength - 2) + 0.5 * (scale - 1.8) ** 2 + 0.08 * noise
    learned = 1.0 if step is None else 1 - math.exp(-step / 700)
    diverse = math.exp(-0.25 * (scale - 1)) + 0.04 * gain
    return {
        "fid": fid + 60 * (1 - learned),
        "sfid": 2 * fid + 3,
        "inception_score": 9 + 0.3 * gain * scale - 0.2 * strength + 0.05 * noise,
        "precision": min(1.0, 0.75 + 0.06 * scale - 0.01 * strength + 0.012 * noise),
        "recall": 0.8 * diverse + 0.02 * noise,
        "coverage": 0.9 * diverse + 0.01 * noise,
        "topp_f1": 0.8 + 0.02 * gain + 0.01 * noise,
        "rmd_top": 120 + 20 * scale - 10 * gain + 3 * noise,
        "rmd_mean": 20 + 4 * scale - 2 * gain + 0.4 * noise,
        "entropy": -20 - 8 * scale + 3 * gain + 0.6 * noise,
        "memorization_ratio": max(0.0, 0.02 * scale - 0.01 * gain + 0.004 * noise),
        "class_agreement": min(1.0, 0.93 + 0.03 * scale - 0.02 * strength + 0.004 * noise),
    }[metric]
