"""Short loss curves of the miniatures against stored ones: exactly on the machine type that stored them, closely
elsewhere.

Remake them, after a change that is meant to change them, with:

    NOISYCOND_WRITE_GOLDEN=1 python -m pytest tests/golden
"""

import json
import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch


HERE = Path(__file__).parent
RUNS = {
    "digits_dit_mini": ["train_class_cond", "--corruption_ratio", "0.1"],
    "digits_ldm": ["train_class_cond", "--recipe", "digits_ldm", "--corruption_ratio", "0.1"],
    "digits_text": ["train_text_to_image_corrupt", "--corruption_ratio", "0.1"],
    "digits_kl": ["train_autoencoder", "--recipe", "digits_kl"],
    "digits_vq": ["train_autoencoder", "--recipe", "digits_vq"],
}


def machine() -> list[str]:
    """What decides the last bits of a result on CPU."""
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine()]


@pytest.mark.parametrize("name", RUNS)
def test_loss_curve(name, script, tmp_path):
    script_name, *words = RUNS[name]
    words += ["--output_dir", tmp_path / "run", "--max_train_steps", "8", "--report_to", "none"]
    if script_name != "train_autoencoder":
        of_classes = script_name == "train_class_cond"
        words += ["--validation_images_per_class" if of_classes else "--num_validation_images", "1"]
        words += ["--validation_inference_steps", "1"]
    script(script_name, *words, "--cpu_threads_per_process", "1")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    file = HERE / f"{name}.json"
    if os.environ.get("NOISYCOND_WRITE_GOLDEN"):
        file.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=2) + "\n")
    stored = json.loads(file.read_text())
    if stored["machine"] == machine():
        assert losses == stored["losses"]
    assert np.abs(np.array(losses) / stored["losses"] - 1).max() < 1e-3
