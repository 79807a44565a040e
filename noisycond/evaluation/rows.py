"""The metrics of each set of images, a family at a time, kept on disk as soon as they are computed."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from noisycond.cards import public_name
from noisycond.errors import InputError, require, writing
from noisycond.evaluation.drawing import ImageSet, Subject
from noisycond.evaluation.instruments import Extraction
from noisycond.evaluation.metrics import METRICS
from noisycond.evaluation.model_index import TASK, TEXT_TASK, add_results_to_card, model_index_results
from noisycond.evaluation.options import MetricArguments
from noisycond.evaluation.references import RealImages
from noisycond.evaluation.suite import Evidence, compute, families_of, subset_size_of
from noisycond.evaluation.uncertainty import bootstrap_interval
from noisycond.prompts import Prompts
from noisycond.run_folder import write_atomically


logger = logging.getLogger(__name__)
# What the options decide; which of the metrics are asked for, and where weights lie, changes no value.
CHOICES = {item.name for item in fields(MetricArguments)} - {"recipe", "metrics", "extractor_weights"}


def measure(image_set: ImageSet, evidence: Evidence, options: MetricArguments, about: dict, folder: Path) -> dict:
    """A row of the report.

    Args:
        about: what decides the values beside the images, the real images and the options (extractor, sizes), as JSON
            values. folder: where finished families are kept, so that another call takes them up.

    Returns:
        label, member (as named), pipeline, weights, images, guidance_scale, seed, num_images; `metrics`, by name a
        `value` and an `interval` or None; and `skipped`, by name the reason why a metric was not computed.

    Raises:
        InputError: a metric that was asked for by name cannot be computed, or no space is left.
    """
    row = {
        "label": image_set.label,
        "member": image_set.member,
        "pipeline": image_set.member if image_set.option == "--pipeline" else None,
        "weights": image_set.weights,
        "images": str(image_set.source.root) if hasattr(image_set.source, "root") else image_set.member,
        "guidance_scale": image_set.guidance_scale,
        "seed": image_set.seed,
        "num_images": len(image_set.source),
        "metrics": {},
        "skipped": {},
    }
    about = about | {
        "images": [image_set.source.fingerprint, image_set.source.version],
        "real": [real and real.identity for real in (evidence.reference, evidence.train)],
        "options": {name: getattr(options, name) for name in sorted(CHOICES)},
    }
    families = families_of(options.metrics)
    for family in tqdm(families, desc=f"metrics of {image_set}", unit="family", leave=False, delay=2):
        key = json.dumps(about | {"family": family}, sort_keys=True, default=str)
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        if path.exists():
            found = json.loads(path.read_text())
        else:
            try:
                found = _computed(evidence, options, family)
            except InputError as error:
                if options.metrics:
                    raise
                reason = str(error).split(": ", 1)[1].rstrip(".")
                row["skipped"] |= {name: reason for name, metric in METRICS.items() if metric.family == family}
                continue
            with writing(f"--output_dir {folder}", "metrics"):
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(found) + "\n")
        row["metrics"] |= {name: entry for name, entry in found.items() if name in (options.metrics or METRICS)}
    return row


def _computed(evidence: Evidence, options: MetricArguments, family: str) -> dict[str, dict]:
    found = {}
    for name, estimate in compute(evidence, options, family).items():
        interval = bootstrap_interval(estimate, options.bootstrap, options.metric_seed)
        found[name] = {"value": estimate.value, "interval": None if interval is None else list(interval)}
    if family == "kid":
        size = subset_size_of(options, len(evidence.reference.features), len(evidence.generated))
        found["kid"]["subset_size"] = size
    return found


def choices(
    args,
    extraction: Extraction,
    real: RealImages | None,
    train: RealImages | None,
    sets: Sequence[ImageSet],
    prompts: Prompts | None = None,
) -> dict:
    """Every choice behind the values, as JSON values: what is printed with them.

    Args:
        args: the arguments of evaluate_model.py. sets: what was measured. prompts: what it was drawn from, or None.
    """
    generated = {"num_images": sorted({len(image_set.source) for image_set in sets})}
    if args.pipeline:
        names = ("class_sampling", "scheduler", "num_inference_steps", "batch_size", "image_format", "torch_dtype")
        generated |= {name: getattr(args, name) for name in names}
        generated |= {"guidance_scales": args.guidance_scale, "seeds": args.seeds}
        generated["scheduler"] = args.scheduler or "the pipeline's own"
        generated |= {} if prompts is None else {"prompts": prompts.settings()}
        generated |= _controls_of(sets)
    else:
        endings = {Path(image_set.source.name(0)).suffix[1:].lower() or "array" for image_set in sets}
        generated["image_format"] = sorted(endings)
    options = {name: getattr(args, name) for name in sorted(CHOICES)}
    return {
        "generated": generated,
        "reference": None if real is None else real.settings() | {"identity": real.identity},
        "train_data": None if train is None else train.settings() | {"identity": train.identity},
        "resolution": extraction.resize.resolution,
        "extraction_batch_size": extraction.batch_size,
        **extraction.instruments.settings(),
        "options": options,
        "versions": {name: metadata.version(name) for name in ("noisycond", "torch", "torchvision", "torch-fidelity")},
    }


def _controls_of(sets: Sequence[ImageSet]) -> dict:
    """What pipelines were drawn after: the same examples, of which each may take another column."""
    given = {image_set.member: image_set.controls.settings() for image_set in sets if image_set.controls is not None}
    if not given:
        return {}
    own = ("column", "annotator", "fingerprint")
    shared = {key: value for key, value in next(iter(given.values())).items() if key not in own}
    columns = {member: {key: settings[key] for key in own} for member, settings in given.items()}
    bases = {image_set.member: image_set.base for image_set in sets if image_set.base is not None}
    return {"controls": shared | {"columns": columns}} | ({"base_pipeline": bases} if bases else {})


def check_cards(subjects: Sequence[Subject]) -> None:
    """Raises InputError where a pipeline is no local folder with a model card."""
    for name in (member for subject in subjects for member in subject.members):
        require(
            (Path(name) / "README.md").is_file(),
            f"--update_card: {name} is no local folder with a model card (README.md).",
        )


def check_classes(name: str, class_names: list[str] | None, real: RealImages | None) -> None:
    """Logs where the real images have classes that a pipeline lacks: it cannot reach them."""
    others = None if real is None or real.source is None else real.source.class_names
    if class_names is not None and others is not None and set(class_names) < set(others):
        logger.warning(
            "%s has %d of the %d classes of --reference %s: recall, coverage and FID count the others as missing.",
            name,
            len(class_names),
            len(others),
            real.name,
        )


def update_cards(pipelines: Sequence[str], rows: Sequence[dict], settings: dict) -> None:
    """Writes each pipeline's results into the model card of its folder, as `model-index`.

    Args:
        settings: see [`choices`].
    """
    reference = settings["reference"] or {"name": "none"}
    told = {name: settings["generated"][name] for name in ("num_inference_steps", "scheduler", "class_sampling")}
    told["feature_extractor"] = settings["extractor"]["extractor"]
    prompts = settings["generated"].get("prompts")
    told |= {} if prompts is None else {"prompts": public_name(prompts["name"])}
    controls = settings["generated"].get("controls")
    bases = settings["generated"].get("base_pipeline", {})
    for name in pipelines:
        own = {} if name not in bases else {"base_pipeline": public_name(bases[name])}
        if controls is not None:
            own |= {"controls": public_name(controls["name"]), "control_column": controls["columns"][name]["column"]}
            own |= {"conditioning_scale": controls["conditioning_scale"]}
        results = model_index_results(
            [row for row in rows if row["pipeline"] == name],
            public_name(reference["name"]),
            dataset_split=reference.get("split"),
            settings=told | own,
            task=TASK if prompts is None else TEXT_TASK,
        )
        add_results_to_card(name, results)


def why_not(rows: Sequence[dict]) -> dict[str, str]:
    """The metrics that no row has, and why."""
    had = {name for row in rows for name in row["metrics"]}
    return {name: reason for row in rows for name, reason in row["skipped"].items() if name not in had}
