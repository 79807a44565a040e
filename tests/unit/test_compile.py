"""torch.compile takes the denoiser whole: no graph break, and the same numbers."""

import torch

from noisycond.denoisers import build_denoiser, find_denoiser
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.randomness import step_keys


def test_the_denoiser_is_one_graph():
    torch.manual_seed(0)
    names = [str(label) for label in range(10)]
    perturbation = ConditionEmbeddingPerturbation(1.0, "gaussian")
    shape = {"latent_channels": 4, "latent_size": 8}
    denoiser = build_denoiser(find_denoiser("dit-mini"), class_names=names, perturbation=perturbation, **shape).train()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.05)
    inputs = (torch.randn(4, 4, 8, 8), torch.arange(4) * 100, {"class_labels": torch.arange(4)})
    keys = step_keys(3, torch.arange(4))
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)  # raises where the graph breaks
    with torch.no_grad():
        plain, traced = denoiser(*inputs, keys), compiled(*inputs, keys)
    assert (plain - traced).abs().max() < 1e-5
    assert (plain - denoiser.eval()(*inputs)).abs().max() > 1e-3  # the perturbation was in the graph
