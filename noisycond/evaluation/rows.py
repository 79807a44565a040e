"""The metrics of each set of images, a family at a time, kept on disk as soon as they are computed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from noisycond.cards import public_name
from noisycond.errors import InputError, writing
from noisycond.evaluation.drawing import ImageSet
from noisycond.evaluation.instruments import Extraction
from noisycond.evaluation.metrics import METRICS
from noisycond.evaluation.model_index import add_results_to_card, model_index_results
from noisycond.evaluation.options import MetricArguments
from noisycond.evaluation.references import RealImages
from noisycond.evaluation.suite import Evidence, compute, families_of, lacking
from noisycond.evaluation.uncertainty import bootstrap_interval
from noisycond.run_folder import write_atomically


# What the options decide; which of the metrics are asked for, and where weights lie, changes no value.
CHOICES = {item.name for item in fields(MetricArguments)} - {"recipe", "metrics", "extractor_weights"}


def measure(image_set: ImageSet, evidence: Evidence, options: MetricArguments, settings: dict, folder: Path) -> dict:
    """A row of the report.

    Args:
        settings: what decides the values beside the images and the options (extractor, resize, references), as JSON
            values. folder: where finished families are kept, so that another call takes them up.

    Returns:
        label, pipeline, images, guidance_scale, seed, num_images; `metrics`, by name a `value` and an `interval` or
        None; and `skipped`, by name the reason why a metric was not computed.

    Raises:
        InputError: a metric that was asked for by name cannot be computed.
    """
    row = {
        "label": image_set.label,
        "pipeline": image_set.member if image_set.option == "--pipeline" else None,
        "images": str(image_set.source.root) if hasattr(image_set.source, "root") else image_set.member,
        "guidance_scale": image_set.guidance_scale,
        "seed": image_set.seed,
        "num_images": len(image_set.source),
        "metrics": {},
        "skipped": {},
    }
    families = families_of(options.metrics)
    for family in tqdm(families, desc=f"metrics of {image_set}", unit="family", leave=False):
        names = [name for name, about in METRICS.items() if about.family == family]
        try:
            found = _compute_or_read(image_set, evidence, options, settings, folder, family)
        except InputError as error:
            if options.metrics:
                raise
            reason = lacking(evidence, options, family) or str(error).split(": ", 1)[1]
            row["skipped"] |= dict.fromkeys(names, reason)
            continue
        row["metrics"] |= {name: entry for name, entry in found.items() if name in (options.metrics or METRICS)}
    return row


def _compute_or_read(
    image_set: ImageSet, evidence: Evidence, options: MetricArguments, settings: dict, folder: Path, family: str
) -> dict[str, dict]:
    about = {
        "family": family,
        "images": image_set.source.fingerprint,
        "settings": settings,
        "options": {name: getattr(options, name) for name in CHOICES},
    }
    text = json.dumps(about, sort_keys=True, default=str)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = {}
    for name, estimate in compute(evidence, options, family).items():
        interval = None
        if options.bootstrap and estimate.resample is not None:
            interval = list(bootstrap_interval(estimate, options.bootstrap, options.metric_seed))
        found[name] = {"value": estimate.value, "interval": interval}
    with writing(f"--output_dir {folder}", "metrics"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found) + "\n")
    return found


def choices(args, extraction: Extraction, real: RealImages | None, train: RealImages | None, sets) -> dict:
    """Every choice behind the values, as JSON values: what is printed with them.

    Args:
        args: the arguments of evaluate_model.py. sets: what was measured.
    """
    generated = {"num_images": sorted({len(image_set.source) for image_set in sets})}
    if args.pipeline:
        names = ("class_sampling", "scheduler", "num_inference_steps", "batch_size", "image_format", "torch_dtype")
        generated |= {name: getattr(args, name) for name in names}
        generated |= {"guidance_scales": args.guidance_scale, "seeds": args.seeds}
        generated["scheduler"] = args.scheduler or "the pipeline's own"
    else:
        endings = {Path(image_set.source.name(0)).suffix[1:].lower() or "array" for image_set in sets}
        generated["image_format"] = sorted(endings)
    options = {name: getattr(args, name) for name in sorted(CHOICES)}
    return {
        "generated": generated,
        "reference": None if real is None else real.settings(),
        "train_data": None if train is None else train.settings(),
        "resolution": extraction.resize.resolution,
        "extraction_batch_size": extraction.batch_size,
        **extraction.instruments.settings(),
        "options": options,
        "versions": {name: metadata.version(name) for name in ("noisycond", "torch", "torchvision", "torch-fidelity")},
    }


def update_cards(pipelines: Sequence[str], rows: Sequence[dict], settings: dict) -> None:
    """Writes each pipeline's results into the model card of its folder, as `model-index`.

    Args:
        settings: see [`choices`].
    """
    reference = settings["reference"] or {"name": "none"}
    told = {name: settings["generated"][name] for name in ("num_inference_steps", "scheduler", "class_sampling")}
    told["feature_extractor"] = settings["extractor"]["extractor"]
    for name in pipelines:
        results = model_index_results(
            [row for row in rows if row["pipeline"] == name],
            public_name(reference["name"]),
            dataset_split=reference.get("split"),
            settings=told,
        )
        add_results_to_card(name, results)


def why_not(rows: Sequence[dict]) -> dict[str, str]:
    """The metrics that no row has, and why."""
    had = {name for row in rows for name in row["metrics"]}
    return {name: reason for row in rows for name, reason in row["skipped"].items() if name not in had}
