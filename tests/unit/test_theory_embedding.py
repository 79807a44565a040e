"""What a γ of CEP is to a class embedding: against geometry that is known, and the command on saved pipelines."""

import math

import numpy as np
import pytest
import torch
from controlled import class_base
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from noisycond import sampling
from noisycond.errors import InputError
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.theory.closed_form import generate
from noisycond.theory.embedding import ClassEmbedding, main
from noisycond.theory.mixture import Mixture, draw_training_set


def test_one_hot_conditions_have_gamma_of_the_theory_times_the_root_of_their_number():
    embedding = ClassEmbedding(np.eye(5))
    assert embedding.variances == pytest.approx([0.2] * 4)
    assert embedding.closest == pytest.approx(math.sqrt(2))
    assert embedding.theory_gamma(0.7 * math.sqrt(5)) == pytest.approx(0.7)


def test_equal_gammas_of_the_theory_generate_the_same():
    """Scaled and rotated one-hot conditions in more dimensions: CEP of γ there, the theory's γ on one-hot ones."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((7, 7)))
    rows = 3 * np.eye(4, 7) @ rotation
    gamma = 5.0
    data = draw_training_set(Mixture.drawn(4, 3, 1.5, seed=1), 6, seed=2)
    there = generate(data, gamma / math.sqrt(7), embedding=rows)  # the standard deviation of CEP-G per coordinate
    here = generate(data, ClassEmbedding(rows).theory_gamma(gamma))
    assert there.means == pytest.approx(here.means, abs=1e-9)
    assert there.covariance == pytest.approx(here.covariance, abs=1e-9)


def test_two_classes_are_mistaken_as_often_as_half_their_distance_is_passed():
    embedding = ClassEmbedding(np.array([[0.0, 0, 0, 0], [2.0, 0, 0, 0]]))
    share = embedding.mistaken(4.0, "gaussian", draws=100_000)  # standard deviation 4/√4 = 2, half the distance 1
    assert share == pytest.approx(0.5 * math.erfc(0.5 / math.sqrt(2)), abs=0.008)
    assert embedding.mistaken(4.0, "uniform", draws=100_000) == pytest.approx(0.25, abs=0.008)  # U(-2, 2) > 1
    assert embedding.mistaken(1.9, "uniform") == 0 and embedding.mistaken(0.0, "gaussian") == 0


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_the_noise_is_that_of_cep(noise):
    embedding = ClassEmbedding(np.random.default_rng(0).standard_normal((6, 16)))
    rows = torch.from_numpy(embedding.rows).repeat_interleave(3000, dim=0)
    told = ConditionEmbeddingPerturbation(8.0, noise)(rows)
    nearest = torch.cdist(told, torch.from_numpy(embedding.rows)).argmin(1)
    share = (nearest != torch.arange(6).repeat_interleave(3000)).double().mean()
    assert share > 0.05 and embedding.mistaken(8.0, noise) == pytest.approx(float(share), abs=0.02)


def test_equal_rows_are_refused():
    with pytest.raises(InputError, match="two classes have the same embedding"):
        ClassEmbedding(np.ones((2, 3)))


def dit_folder(folder):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4}
    transformer = DiTTransformer2DModel(**sizes, in_channels=4, norm_num_groups=4, num_embeds_ada_norm=7)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
    return folder


def test_the_command_describes_an_ldm_and_a_dit(tmp_path, capsys):
    for folder, classes in ((class_base(tmp_path / "ldm"), 10), (dit_folder(tmp_path / "dit"), 7)):
        pipeline = sampling.open_pipeline(str(folder), trust_remote_code=True)
        rows = sampling.class_embeddings(pipeline)
        capsys.readouterr()
        main(["--pipeline", str(folder), "--trust_remote_code", "--gamma", "2", "1000"])
        said = capsys.readouterr().out
        embedding = ClassEmbedding(rows.double().numpy())
        assert f"{classes} classes in {rows.shape[1]} dimensions" in said
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line[:1] == "|"]
        assert [line[0] for line in lines[2:]] == ["2", "1000"]
        assert float(lines[2][1]) == pytest.approx(embedding.theory_gamma(2.0), rel=0.06)
        assert lines[3][2] == f"{embedding.mistaken(1000.0, 'gaussian'):.2%}"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--pipeline"),
        (["--pipeline", "nowhere"], "nowhere"),
        (["--pipeline", "nowhere", "--gamma", "-1"], "--gamma has -1.0, but it must be 0 or a positive number"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2 and sentence in capsys.readouterr().err
