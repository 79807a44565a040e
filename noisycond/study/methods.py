"""What a cell of a study does to its conditions, read from flag values; what tables and figures sort cells by."""

from collections.abc import Mapping
from dataclasses import dataclass

from noisycond.errors import InputError


KINDS = (
    "clean",
    "corruption",
    "cep",
    "input_perturbation",
    "embedding_dropout",
    "label_smoothing",
    "mixed",
)
_STRENGTHS = {  # the flag that switches a kind on
    "corruption": "corruption_ratio",
    "cep": "cep_gamma",
    "input_perturbation": "input_perturbation",
    "embedding_dropout": "embedding_dropout",
    "label_smoothing": "label_smoothing",
}
# Of scripts that corrupt captions; the others corrupt labels.
_USUAL_CORRUPTION = {"train_text_to_image_corrupt": "swap"}
_CEP = {"uniform": "CEP-U", "gaussian": "CEP-G"}
# The flags that a method is made of.
METHOD_FLAGS = (*_STRENGTHS.values(), "corruption_type", "corruption_mode", "class_groups", "cep_type", "cep_mode")


@dataclass(frozen=True)
class Method:
    """A corruption, a perturbation or a baseline.

    Attributes:
        kind: of [`KINDS`]; `mixed` where several are on at once.
        type: of corruption (`symmetric`, `asymmetric`; for captions `swap`, `token`, …) and CEP (`uniform`,
            `gaussian`); else empty.
        mode: of corruption and CEP, `fixed` or `random`; else empty.
        strength: η as a share in [0, 1], γ ≥ 0 of CEP and input perturbation, the probability of dropout, or the share
            of label smoothing; 0 of `clean` and `mixed`.
    """

    kind: str
    type: str = ""
    mode: str = ""
    strength: float = 0.0

    @property
    def title(self) -> str:
        """As tables and legends say it: "η = 2.5 %", "CEP-U, γ = 1, fixed"."""
        value = f"{self.strength:g}"
        if self.kind == "corruption":
            kind = "" if self.type in ("", "symmetric", "swap") else f", {self.type}"
            return f"η = {100 * self.strength:g} %{kind}" + (", random" if self.mode == "random" else "")
        if self.kind == "cep":
            return f"{_CEP.get(self.type, 'CEP')}, γ = {value}" + (", fixed" if self.mode == "fixed" else "")
        names = {
            "input_perturbation": f"IP, γ = {value}",
            "embedding_dropout": f"dropout, p = {value}",
            "label_smoothing": f"label smoothing, {value}",
        }
        return names.get(self.kind, self.kind)


def method_of(settings: Mapping[str, object], script: str = "") -> Method:
    """The method that these flag values make.

    Args:
        settings: flag to value, of a training script; what is not there is off, or at the scripts' default (corruption
            fixed, and symmetric or, of captions, by swaps; CEP uniform and random).
        script: its name, without the ending.

    Raises:
        InputError: a strength is not a number.
    """
    on = {kind: _number(flag, settings.get(flag)) for kind, flag in _STRENGTHS.items()}
    on = {kind: strength for kind, strength in on.items() if strength != 0}
    if not on:
        return Method("clean")
    if len(on) > 1:
        return Method("mixed")
    (kind, strength), *_ = on.items()
    if kind == "corruption":
        how = (
            settings.get("corruption_type") or _USUAL_CORRUPTION.get(script, "symmetric"),
            settings.get("corruption_mode") or "fixed",
        )
        return Method(kind, *map(str, how), strength)
    if kind == "cep":
        how = settings.get("cep_type") or "uniform", settings.get("cep_mode") or "random"
        return Method(kind, *map(str, how), strength)
    return Method(kind, strength=strength)


def _number(flag: str, value: object) -> float:
    try:
        return float(value or 0)
    except (TypeError, ValueError):
        raise InputError(f"`{flag}` is {value!r}, but it must be a number.") from None
