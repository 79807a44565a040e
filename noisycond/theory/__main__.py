"""Draws entropy and W2 over γ, η, n, d and guidance: python -m noisycond.theory --classes 10 --dim 8 --samples 5 50"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from noisycond.arguments import Arguments, flag, parse_arguments
from noisycond.errors import one_sentence_errors, require, writing
from noisycond.theory import drawing
from noisycond.theory.curves import averages, best_points, over_eta, over_gamma
from noisycond.theory.guidance import best_under_guidance, over_guidance
from noisycond.theory.mixture import Mixture


SAMPLES_SWEPT = (2, 3, 5, 8, 12, 20, 35, 60, 100, 200, 500)
DIMS_SWEPT = (1, 2, 4, 8, 16, 32)
MOST_SAMPLES = 1_000_000  # beyond, what corruption takes away is lost in rounding
FEWEST_FLIPPED = 3  # samples of a class
MOST_EXAMPLES = 20_000  # of a training set that is drawn
SEPARATIONS_SWEPT = (0.1, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0, 5.0)


@dataclass
class TheoryArguments(Arguments):
    classes: int = flag(10, "K, the classes of the mixture.")
    dim: int = flag(8, "d, the dimensions of the data.")
    samples: list[int] = flag([3, 5, 10, 50], "n, the training samples of each class; a line for each.")
    separation: float = flag(1.0, "s, the standard deviation of the class means per coordinate, in that of a class.")
    variances: list[float] = flag([1.0], "Of a class, per coordinate; one number is that of every coordinate.")
    noise: Literal["gaussian", "uniform"] = flag("gaussian", "ξ of the curves over γ: N(0, 1) or U(-1, 1).")
    gamma: list[float] = flag([], "γ of the curves; the default is 0 and 60 values from 0.01 to 3.")
    eta: list[float] = flag([], "η of the curves; the default is 0 to 0.5 in steps of 0.01.")
    guidance_scale: list[float] = flag([1.0, 1.5, 2.25, 4.0], "Guidance scales of the curves with n = ∞; 1 is none.")
    training_sets: int = flag(100, "Drawn to average the closed form of full matrices over; 0: none.")
    seed: int = flag(0, "Seed of the class means and of the training sets.")
    output_dir: str = flag("runs/theory", "Where figures and CSV files are written.")

    def __post_init__(self):
        super().__post_init__()
        self.gamma = self.gamma or [0.0, *np.geomspace(0.01, 3, 60).tolist()]
        self.eta = self.eta or np.linspace(0, 0.5, 51).tolist()
        require(self.classes > 1, f"--classes is {self.classes}, but a mixture needs at least two.")
        require(self.dim > 0, f"--dim is {self.dim}, but it must be positive.")
        require(self.seed >= 0, f"--seed is {self.seed}, but it must not be negative.")
        require(
            min(self.samples) > 0 and max(self.samples) <= MOST_SAMPLES,
            f"--samples is {' '.join(map(str, self.samples))}: each class needs at least one, or there are fewer "
            f"samples than classes, and at most {MOST_SAMPLES:,}.",
        )
        for name, highest in (("gamma", np.inf), ("eta", 1.0), ("guidance_scale", np.inf)):
            for value in getattr(self, name):
                said = "must lie between 0 and 1" if name == "eta" else "must be 0 or a positive number"
                require(0 <= value <= highest and np.isfinite(value), f"--{name} has {value}, but it {said}.")
        for name in ("samples", "guidance_scale"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"--{name} names a number twice: {' '.join(map(str, values))}.")
            require(
                len(values) <= len(drawing.COLOURS),
                f"--{name} has {len(values)} values, but a figure has {len(drawing.COLOURS)} lines at most.",
            )
        require(
            0 < self.separation < np.inf,
            f"--separation is {self.separation}, but it must be a positive number: of equal classes a condition tells "
            "nothing.",
        )
        require(
            self.training_sets == 0 or self.training_sets > 1,
            f"--training_sets is {self.training_sets}, but a standard error needs two at least; 0 draws none.",
        )


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(TheoryArguments, argv)
    folder = Path(args.output_dir)
    mixture = _mixture(args, args.dim)
    with writing(f"--output_dir {folder}", "figures and tables"):
        folder.mkdir(parents=True, exist_ok=True)
    counts, dims = sorted({*SAMPLES_SWEPT, *args.samples}), [args.dim] if len(args.variances) > 1 else DIMS_SWEPT
    gammas, etas, scales = sorted(args.gamma), sorted(args.eta), sorted(args.guidance_scale)
    checked = [samples for samples in sorted(args.samples) if samples * args.classes <= MOST_EXAMPLES]
    bar = tqdm(
        total=2 * len(args.samples)
        + args.training_sets * sum(3 if samples >= FEWEST_FLIPPED else 2 for samples in checked)
        + 3 * (len(counts) + len(dims))
        + len(SEPARATIONS_SWEPT) * len(SAMPLES_SWEPT),
        desc="theory",
        unit="setting",
    )
    gamma, eta, checks = [], [], []
    for samples in sorted(args.samples):
        gamma += over_gamma(mixture, samples, args.separation, gammas, args.noise)
        bar.update()
        eta += over_eta(mixture, samples, args.separation, etas)
        bar.update()
    for samples in checked if args.training_sets else []:
        # Of a class with one or two samples a flip leaves nothing, so flips drawn once are left out there.
        kinds = [(args.noise, gammas), ("eta", etas), *([("eta_fixed", etas)] if samples >= FEWEST_FLIPPED else [])]
        for how, strengths in kinds:
            place, drawn = (samples, args.separation, how), (args.training_sets, args.seed, bar.update)
            checks += averages(mixture, *place, strengths[:: len(strengths) // 10 or 1], *drawn)
    settings = [(mixture, samples) for samples in counts]
    over_samples = best_points("samples", settings, args.separation, bar.update)
    settings = [(_mixture(args, dim), min(args.samples)) for dim in dims]
    over_dims = best_points("dim", settings, args.separation, bar.update)
    mapped = []
    for separation in SEPARATIONS_SWEPT:
        settings = [(_mixture(args, args.dim, separation), samples) for samples in SAMPLES_SWEPT]
        mapped += best_points("map", settings, separation, bar.update, corruptions=[args.noise])
    bar.close()
    guided = list(over_guidance(mixture, args.separation, args.noise, scales, gammas))
    guided += over_guidance(mixture, args.separation, "eta", scales, etas)

    of_gamma, of_eta = ([check for check in checks if ("eta" in check.how) == flips] for flips in (False, True))
    with writing(f"--output_dir {folder}", "figures and tables"):
        drawing.write_csv(folder / "curves.csv", gamma + eta)
        drawing.write_csv(folder / "best.csv", over_samples + over_dims + mapped)
        drawing.write_csv(folder / "guidance.csv", guided)
        if checks:
            drawing.write_csv(folder / "full_matrices.csv", checks)
        entropy = mixture.entropy
        drawing.draw_over_strength(folder / "gamma.png", gamma, "gamma", f"γ, {args.noise} ξ", entropy, of_gamma)
        drawing.draw_over_strength(folder / "eta.png", eta, "eta", "η, share of flipped labels", entropy, of_eta)
        drawing.draw_best(folder / "samples.png", over_samples, "samples", "n, samples of each class")
        drawing.draw_best(folder / "dim.png", over_dims, "dim", f"d, dimensions (n = {min(args.samples)})")
        drawing.draw_map(folder / "map.png", mapped)
        drawing.draw_guidance(folder / "guidance.png", guided, args.noise)
    for point in over_samples:
        if point.how == args.noise and point.samples in args.samples:
            print(f"n = {point.samples}: best γ {point.best:.3g} takes {point.gain:.2%} of the squared W2 away.")
    for scale in scales:
        of_noise, of_flips = (best_under_guidance(mixture, scale, how) for how in (args.noise, "eta"))
        print(
            f"n = ∞, guidance {scale:g}: squared W2 {of_noise.without:.4g}; best γ {of_noise.strength:.3g} leaves "
            f"{of_noise.squared_w2:.2g}, best η {of_flips.strength:.1%} leaves {of_flips.squared_w2:.2g}."
        )
    left_out = sorted({*args.samples} - {*checked})
    if args.training_sets and left_out:
        print(f"Full matrices were not averaged for n = {', '.join(map(str, left_out))}: too many samples.")
    print(f"Figures and tables: {folder}")


def _mixture(args: TheoryArguments, dim: int, separation: float | None = None) -> Mixture:
    separation = args.separation if separation is None else separation
    return Mixture.drawn(args.classes, dim, separation, args.seed, args.variances)


if __name__ == "__main__":
    sys.exit(main())
