"""CEP attached to a model that two processes train."""

import torch
from denoiser_zoo import sd15
from forking import Program
from launching import ROOT

from noisycond import attach_cep


def test_each_process_draws_its_own_delta(tmp_path):
    with Program(ROOT / "tests/helpers/train_attached.py", tmp_path, processes=2) as program:
        done = program.finish()
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
