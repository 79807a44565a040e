"""CEP attached to a model that two processes train."""

import os
import subprocess
import sys

import torch
from denoiser_zoo import sd15
from launching import ROOT

from noisycond import attach_cep


def test_each_process_draws_its_own_delta(tmp_path):
    helper = ROOT / "tests/helpers/train_attached.py"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", str(helper)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank, found in enumerate(ranks):
        assert found["size"] == 2 and found["step"] == 3 and len(found["seen"]) == 6
        # The same draws as one process that is told to be this one; validation is clean.
        model, arguments = sd15()
        attach_cep(model.train(), 1.0, seed=7, rank=rank)
        alone = []
        model.forward = lambda alone=alone, **given: alone.append(given["encoder_hidden_states"])
        for number, seen in enumerate(found["seen"]):
            if number % 2:
                assert torch.equal(seen, found["clean"])
            else:
                model(**arguments | {"encoder_hidden_states": found["clean"]})
                assert torch.equal(seen, alone[-1]) and (seen - found["clean"]).abs().max() > 0.1
    first, second = ranks
    assert torch.equal(first["clean"], second["clean"])
    assert all(not (a == b).any() for a, b in zip(first["seen"][::2], second["seen"][::2], strict=True))
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
