#!/usr/bin/env python
"""Runs a study: trains, draws from and measures every cell of a grid with every seed, and writes tables, the figures
of the paper and one HTML report.

python study.py studies/quick.yaml                  # some minutes on two CPU cores
python study.py studies/digits.yaml --seeds 0       # one seed of a larger one; the next call goes on
python study.py studies/in1k.yaml --submit jobs     # one script per run for a SLURM array
"""

import importlib
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path


try:
    from noisycond import hardware
    from noisycond.arguments import flag, parse_arguments
    from noisycond.errors import one_sentence_errors, require, writing
    from noisycond.study.definition import Study
    from noisycond.study.figures import draw_figures
    from noisycond.study.launching import Launcher, cpu_launcher, gpu_launcher
    from noisycond.study.locks import locked
    from noisycond.study.planning import Plan, plan_runs, refuse_unknown_flags
    from noisycond.study.progress import Progress
    from noisycond.study.reading import find_study, read_study
    from noisycond.study.records import is_done, known_records, stand_of
    from noisycond.study.report import write_report
    from noisycond.study.results import Results, read_results, usual_output_folder
    from noisycond.study.running import Runner
    from noisycond.study.statistics import compare
    from noisycond.study.submit import SubmitArguments, write_submission
    from noisycond.study.tables import write_page, write_tables
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


@dataclass
class StudyArguments(SubmitArguments):
    output_dir: str | None = flag(
        None, "Where models, logs, results and the report are written; the default is runs/studies/NAME."
    )
    results_dir: str | None = flag(
        None, "Where the result of each run is kept, to be committed or shared; the default is OUTPUT_DIR/results."
    )
    cells: list[str] = flag([], "Run these cells alone, by their names; all others are left as they are.")
    seeds: list[int] = flag([], "Run these seeds alone.")
    blocks: list[str] = flag([], "Run these blocks alone.")
    jobs: int | None = flag(None, "Runs side by side; the default is as many as there are GPUs, or cores, for.")
    retries: int = flag(1, "A run that fails is tried again so often, unless its settings are refused.")
    keep_images: bool = flag(False, "Keep drawn images and features when their metrics are recorded.")
    report_dir: str | None = flag(
        None, "Where tables, figures and report.html are written; the default is the output folder."
    )
    report_only: bool = flag(False, "Run nothing; write tables, figures and report of what there is.")
    dry_run: bool = flag(False, "Print what would be run, and leave.")

    def __post_init__(self):
        super().__post_init__()
        require(self.jobs is None or self.jobs > 0, f"--jobs is {self.jobs}, but it must be positive.")
        require(self.retries >= 0, f"--retries is {self.retries}, but it must not be negative.")
        require(not (self.report_only and self.dry_run), "--report_only and --dry_run do not go together.")
        for name in ("report_only", "dry_run"):
            require(self.submit is None or not getattr(self, name), f"--submit and --{name} do not go together.")
        lists = [name for name in ("cells", "seeds", "blocks") if getattr(self, name)]
        for name in lists + [name for name in ("jobs", "retries", "keep_images") if not self.is_default(name)]:
            require(
                not self.report_only,
                f"--{name} has no effect with --report_only, which runs nothing and reports all there is.",
            )
        require(
            self.submit is None or self.jobs is None,
            "--jobs has no effect with --submit, of which each job is one run; limit them by --slurm_max_parallel.",
        )


def parse(argv: list[str] | None = None) -> tuple[Path, StudyArguments]:
    """The study's file and the flags of a command line; None takes that of the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    require(
        words and not words[0].startswith("-") or "--help" in words,
        "the first word must be the study: a YAML file, or the name of one in studies/.",
    )
    args = parse_arguments(StudyArguments, words if "--help" in words else words[1:])
    return find_study(words[0]), args


def check_settings(study: Study) -> dict[str, str]:
    """By the name of a cell whose settings a script refuses, its sentence; see [`refuse_unknown_flags`]."""
    scripts = {stage.script for cell in study.cells for stage in (*cell.stages, study.evaluation)}
    return refuse_unknown_flags(study, {name: importlib.import_module(name).parse for name in scripts})


def make_launcher(args: StudyArguments, study: Study) -> Launcher:
    """Side by side what the devices allow."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return cpu_launcher(hardware.cores(), study.processes, args.jobs)
    require(
        study.processes <= count,
        f"{study.path}: `processes` is {study.processes}, but there are {count} GPUs here; with fewer, write "
        "gradient_accumulation_steps into `settings`, so that a step has as many images.",
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return gpu_launcher(visible.split(","), study.processes, args.jobs)


def not_done(plans: list[Plan], records: Path) -> list[Plan]:
    """The runs that have no result yet."""
    known = known_records(records)
    return [plan for plan in plans if not is_done(known.get(plan.identity))]


def run(args: StudyArguments, study: Study, plans: list[Plan], folder: Path, records: Path) -> int | None:
    """Runs what is not done yet; Ctrl-C and SIGTERM stop it, and the next call goes on.

    Returns:
        The number of the signal that stopped it, or None.
    """
    left = not_done(plans, records)
    if not left:
        return None
    refused, launcher = check_settings(study), make_launcher(args, study)
    scale = study.report_guidance_scale or 1.0

    def samples_at(plan: Plan) -> float | None:
        return scale if plan.run.seed == study.seeds[0] else None

    runner = Runner(folder, records, launcher, refused, args.retries, args.keep_images, samples_at)
    progress = Progress(len(plans), len(plans) - len(left), len(launcher.slots))
    print(f"{len(left)} of {len(plans)} runs to do, {len(launcher.slots)} side by side.", flush=True)
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        runner.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        runner.run(left, progress)
    finally:
        progress.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if not received:
        return None
    print(f"Stopped with {progress.left} runs to go; the same command goes on.")
    return received[0]


def submit(args: StudyArguments, study: Study, path: Path, plans: list[Plan], records: Path) -> None:
    """Writes job scripts of the runs that are not done yet."""
    left, refused = not_done(plans, records), check_settings(study)
    if plans and not left:
        print("There is nothing to submit: every run is done.")
        return
    for cell in dict.fromkeys(str(plan.run.cell) for plan in left):
        if cell in refused:
            print(f"{cell} will be recorded as failed: {refused[cell]}")
    array = write_submission(path, [plan.run for plan in left], args.submit, args, study.processes)[-1]
    others = f" ({len(plans) - len(left)} of {len(plans)} done before)" if len(left) < len(plans) else ""
    print(f"{len(left)} runs are ready{others}: sbatch {array}")


def publish(results: Results, folder: Path) -> Path:
    """Writes tables, figures and the report of what there is; returns the report."""
    with writing(f"--report_dir {folder}", "the report (the results are kept; --report_only writes it again)"):
        folder.mkdir(parents=True, exist_ok=True)
        summary = compare(results.values)
        tables = write_tables(results, summary, folder)
        figures = draw_figures(results, summary, folder / "figures")
        write_page(results, tables, figures, folder)
        return write_report(results, tables, figures, folder / "report.html")


def report_on(study: Study, folder: Path, records: Path, report_dir: Path) -> Results:
    """Writes the report of what there is. Where another process of a job array does so, it is left to that one, which
    looks for what is new when it has ended."""
    plans = plan_runs(study, study.runs(), folder)
    while True:
        with locked(folder / ".report.lock") as is_ours:
            stand = stand_of(records)
            results = replace(read_results(study, plans, records), output_folder=folder, report_folder=report_dir)
            if not is_ours:
                print("Another process writes the report.")
                return results
            report = publish(results, report_dir)
        if stand_of(records) == stand:
            print(f"Tables: {report.with_name('results.md')}\nReport: {report}")
            return results


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    path, args = parse(argv)
    study = read_study(str(path))
    folder = Path(args.output_dir or usual_output_folder(study))
    records = Path(args.results_dir or folder / "results")
    plans = plan_runs(study, study.runs(args.cells, args.seeds, args.blocks), folder)
    if args.dry_run:
        for plan in plans:
            print(f"# {plan.run}", *(step.command() for step in plan.steps), sep="\n")
        return
    if args.submit is not None:
        submit(args, study, path, plans, records)
        return
    if not args.report_only:
        with writing(f"--output_dir {folder}", "a folder"):
            folder.mkdir(parents=True, exist_ok=True)
        stopped_by = run(args, study, plans, folder, records)
        if stopped_by is not None:
            sys.exit(128 + stopped_by)  # as a shell says it
    results = report_on(study, folder, records, Path(args.report_dir or folder))
    print(f"{results.done} of {len(results.runs)} runs are done.")
    asked = {(plan.run.cell.block, plan.run.cell.label, plan.run.seed) for plan in plans}
    failed = sum(
        line["status"] == "failed" and (line["block"], line["cell"], line["seed"]) in asked for line in results.runs
    )
    if failed and not args.report_only:
        runs = "1 run" if failed == 1 else f"{failed} runs"
        print(f"{runs} failed; the report says why, and the same command tries them again.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
