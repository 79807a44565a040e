"""Results of an evaluation in a model card, as the `model-index` metadata that the Hub reads."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK, eval_results_to_model_index

from noisycond.errors import InputError, require
from noisycond.evaluation.metrics import METRICS
from noisycond.evaluation.report import plain
from noisycond.evaluation.uncertainty import Summary, summarize
from noisycond.run_folder import write_atomically


TASK = "unconditional-image-generation"  # the pipeline tag of the card; the Hub has no class-conditional task
TEXT_TASK = "text-to-image"


def model_index_results(
    rows: Sequence[dict],
    dataset: str,
    *,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    metrics: Sequence[str] | None = None,
    settings: Mapping | None = None,
    task: str = TASK,
) -> list[EvalResult]:
    """The metrics of one trained run, a result per metric and guidance scale: the value, or "mean ± spread" over the
    seeds of generation. What could not be computed is left out.

    Args:
        rows: of one run, as [`summarize`] takes them.
        dataset: the reference, a Hub id or a name such as `digits`; no path, for a card is read elsewhere.
        dataset_name: as people say it, `dataset` by default. dataset_config, dataset_split: of the reference.
        metrics: which; all by default. settings: what else a value depends on (extractor, steps, …); it becomes each
            metric's `args`, beside guidance scale and number of images. task: of the Hub; [`TEXT_TASK`] for prompts.

    Raises:
        InputError: rows of several runs: a card tells of one.
    """
    runs = {row["pipeline"] or row["images"] for row in rows}
    require(len(runs) == 1, f"a model card holds the results of one run, but these are of {len(runs)}.")
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset_name or dataset,
            dataset_config=dataset_config,
            dataset_split=dataset_split,
            metric_type=name,
            metric_name=METRICS[name].title if name in METRICS else name,
            metric_value=_value(summary, name),
            metric_args=_arguments(summary, settings or {}),
        )
        for summary in summarize(rows)
        for name in (summary.metrics if metrics is None else metrics)
        if name in summary.metrics and math.isfinite(summary.metrics[name].mean)
    ]


def add_results_to_card(folder: str | Path, results: Sequence[EvalResult]) -> None:
    """Puts results into the front matter of a folder's README.md, in place of earlier ones of the same task, dataset,
    metric and arguments; all else in the file stays as it is, letter for letter.

    Raises:
        InputError: there is no README.md, or its front matter is not what the Hub reads.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if not path.is_file():
        raise InputError(f"{folder} has no README.md that results could be added to.")
    text = path.read_bytes().decode("utf-8")
    found = REGEX_YAML_BLOCK.search(text)
    front = found.group(2) if found else ""
    lines = front.splitlines()
    try:
        index = (yaml.safe_load(front) or {}).get("model-index") or []
        index = index or [{"name": folder.resolve().name, "results": []}]
        for entry in eval_results_to_model_index(index[0].get("name", ""), list(results))[0]["results"]:
            _merge(index[0].setdefault("results", []), entry)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: its front matter cannot be read as the metadata of a model ({reason}).") from error
    dumped = yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True, width=119).splitlines()
    start, end = _block(lines, "model-index")
    newline = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
    front = newline.join([*lines[:start], *dumped, *lines[end:]])
    before, after = (found.group(1), found.group(3)) if found else (f"---{newline}", f"{newline}---{newline}")
    text = before + front + after + text[found.end() if found else 0 :]
    write_atomically(path, text)


def _value(summary: Summary, name: str) -> float | str:
    found = summary.metrics[name]
    if found.spread is None:
        return float(f"{found.mean:.6g}")
    decimals = METRICS[name].decimals if name in METRICS else 3
    return f"{found.mean:.{decimals}f} ± {found.spread:.{decimals}f}"


def _arguments(summary: Summary, settings: Mapping) -> dict:
    own = {"guidance_scale": summary.guidance_scale, "num_images": summary.num_images}
    return {name: value for name, value in plain({**own, **settings}).items() if value is not None}


def _merge(entries: list[dict], new: dict) -> None:
    """Puts one task and dataset with its metrics among those that are there."""
    for entry in entries:
        # One with a source is someone else's finding.
        if entry.get("task") == new["task"] and entry.get("dataset") == new["dataset"] and "source" not in entry:
            break
    else:
        entries.append(new)
        return
    for metric in new["metrics"]:
        same = [number for number, each in enumerate(entry["metrics"]) if _identity(each) == _identity(metric)]
        if same:
            entry["metrics"][same[0]] = metric
        else:
            entry["metrics"].append(metric)


def _identity(metric: Mapping) -> tuple:
    return metric["type"], metric.get("config"), metric.get("args")


def _block(lines: Sequence[str], key: str) -> tuple[int, int]:
    """Where a top-level key of a YAML block stands: its first line and the one after its last; the end if nowhere."""
    spellings = (f"{key}:", f'"{key}":', f"'{key}':")
    start = next((n for n, line in enumerate(lines) if line.startswith(spellings)), None)
    if start is None:
        return len(lines), len(lines)
    end = start + 1
    # Items of a list may stand at the key's own depth.
    while end < len(lines) and (not lines[end].strip() or lines[end][0] in " \t-"):
        end += 1
    while not lines[end - 1].strip():
        end -= 1
    return start, end
