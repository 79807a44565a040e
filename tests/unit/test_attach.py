"""CEP attached to denoisers of diffusers: δ of the right law on the right tensors, in training only, and no trace."""

import copy
import inspect
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from denoiser_zoo import CLASS_ZOO, ZOO, D, L, class_unet, dit, sana, sd3, sd15, sdxl
from launching import ROOT
from torch._dynamo.testing import CompileCounter

import noisycond
from noisycond.attach import Schedule, _arguments, attach_cep, find_conditions, unwrap
from noisycond.errors import InputError
from noisycond.perturbation import ConditionEmbeddingPerturbation


pytestmark = pytest.mark.usefixtures("one_thread")


def make(build):
    torch.manual_seed(0)
    model, arguments = build()
    return model.train(), arguments


def leaves(value) -> list:
    """The tensors in an argument."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for element in value for leaf in leaves(element)] if isinstance(value, (list, tuple)) else [value]


def at(arguments: dict, name: str):
    for part in name.split("."):
        arguments = arguments[part]
    return arguments


def received(model, arguments: dict) -> dict:
    """What the forward of a model is given, without running it."""
    kept = {}
    model.forward = lambda **given: kept.update(given)
    try:
        model(**arguments)
    finally:
        del model.forward
    return kept


def deltas(model, arguments: dict, name: str = "encoder_hidden_states", count: int = 1) -> torch.Tensor:
    """δ of several forwards: float32 [count, ...]."""
    clean = at(arguments, name)
    return torch.stack([at(received(model, arguments), name) - clean for _ in range(count)])


def output(model, arguments: dict) -> list:
    torch.manual_seed(1)  # DiT drops labels
    return [leaf.float() for leaf in leaves(model(**arguments, return_dict=False))]


def same(first: list, second: list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def zeros(build=sd15) -> tuple:
    """A model, and arguments whose sequence is 0, so that what is received is δ without rounding."""
    model, arguments = make(build)
    return model, arguments | {"encoder_hidden_states": torch.zeros_like(arguments["encoder_hidden_states"])}


# The right tensors


@pytest.mark.parametrize("name", ZOO)
def test_delta_is_on_the_conditions_and_nowhere_else(name):
    build, places = ZOO[name]
    model, arguments = make(build)
    before = copy.deepcopy(arguments)
    handle = attach_cep(model, 1.0)
    given = received(model, arguments)
    perturbed = []
    for place in places:
        for old, new in zip(leaves(at(arguments, place)), leaves(at(given, place)), strict=True):
            delta = new - old
            assert new.shape == old.shape and new.dtype == old.dtype
            assert delta.abs().max() < 1.0001 / old.shape[-1] ** 0.5 + 1e-6
            assert (delta != 0).float().mean() > 0.95 and delta.std() > 0.4 / old.shape[-1] ** 0.5
            perturbed.append(id(old))
    assert given.keys() == arguments.keys() and handle.step == 1
    for argument in arguments:
        for old, new in zip(leaves(arguments[argument]), leaves(given[argument]), strict=True):
            assert new is old or id(old) in perturbed, argument
        # The caller's own tensors, lists and dicts are left alone.
        pairs = zip(leaves(before[argument]), leaves(arguments[argument]), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", ZOO)
def test_the_forward_is_that_of_the_perturbed_embeddings(name):
    model, arguments = make(ZOO[name][0])
    clean, names, state = output(model, arguments), set(vars(model)), set(model.state_dict())
    hooks = len(model._forward_pre_hooks)
    handle = attach_cep(model, 1.0, seed=5)
    attached = output(model, arguments)
    assert max((a - b).abs().max() for a, b in zip(clean, attached, strict=True)) > 1e-7
    handle.step = 0
    given = received(model, arguments)
    assert set(model.state_dict()) == state
    handle.remove()
    assert same(output(model, given), attached)
    assert same(output(model, arguments), clean)
    assert set(vars(model)) == names and len(model._forward_pre_hooks) == hooks and not model._forward_hooks
    assert not model._forward_pre_hooks_with_kwargs and not model._forward_hooks_always_called


@pytest.mark.parametrize("name", [*ZOO, *CLASS_ZOO])
def test_eval_and_no_grad_are_untouched(name):
    model, arguments = make(ZOO[name][0] if name in ZOO else CLASS_ZOO[name])
    with torch.no_grad():
        clean, evaluated = output(model, arguments), output(model.eval(), arguments)
    handle = attach_cep(model, 4.0)
    assert same(output(model, arguments), evaluated)  # with gradients
    with torch.no_grad():
        assert same(output(model, arguments), evaluated)
        assert same(output(model.train(), arguments), clean)
        given = received(model, arguments)
        assert all(given[argument] is arguments[argument] for argument in arguments)
    assert handle.step == 0
    assert not same(output(model, arguments), clean) and handle.step == 1


def test_positional_arguments():
    model, arguments = zeros()
    attach_cep(model)
    kept = []
    model.forward = lambda *given, **others: kept.append((given, others))
    model(*arguments.values())
    model(arguments["sample"], arguments["timestep"], encoder_hidden_states=arguments["encoder_hidden_states"])
    (first, none), (second, named) = kept
    assert len(first) == 3 and not none and len(second) == 2
    assert first[0] is arguments["sample"] and first[1] is arguments["timestep"]
    assert first[2].abs().max() > 0 and named["encoder_hidden_states"].abs().max() > 0


@pytest.mark.parametrize(("embeddings", "expected"), [
    ("both", ["encoder_hidden_states", "added_cond_kwargs.text_embeds"]),
    ("sequence", ["encoder_hidden_states"]),
    ("pooled", ["added_cond_kwargs.text_embeds"]),
])  # fmt: skip
def test_which_embeddings(embeddings, expected):
    model, arguments = make(sdxl)
    handle = attach_cep(model, embeddings=embeddings)
    given = received(model, arguments)
    for name in ("encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"):
        assert torch.equal(at(given, name), at(arguments, name)) == (name not in expected)
    assert [place.name for place in handle.conditions] == expected
    assert str(handle) == f"CEP (uniform, gamma 1) on UNet2DConditionModel: {', '.join(map(str, handle.conditions))}"


# The law


@pytest.mark.parametrize("type", ["uniform", "gaussian"])
@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_law(type, gamma):
    model, arguments = zeros(sd3)
    arguments["pooled_projections"] = torch.zeros_like(arguments["pooled_projections"])
    attach_cep(model, gamma, type, seed=1)
    given = [received(model, arguments) for _ in range(300)]
    sequence = torch.stack([one["encoder_hidden_states"] for one in given])
    pooled = torch.stack([one["pooled_projections"] for one in given])
    for draws, dim in ((sequence, D), (pooled, 24)):
        bound = gamma / dim**0.5
        law = ("uniform", (-bound, 2 * bound)) if type == "uniform" else ("norm", (0, bound))
        assert scipy.stats.kstest(draws.flatten().numpy(), *law).pvalue > 1e-4
    # Forwards, examples, tokens and the two embeddings are independent.
    columns = [sequence[:, 0, 0], sequence[:, 1, 0], sequence[:, 0, 1], pooled[:, 0, :D]]
    columns = torch.stack([*(column.flatten() for column in columns), sequence.roll(1, 0)[:, 0, 0].flatten()])
    assert (torch.corrcoef(columns) - torch.eye(5)).abs().max() < 5 * columns.shape[1] ** -0.5


def test_it_is_the_projects_own_component():
    # The draw of ConditionEmbeddingPerturbation, under the name of the argument.
    model, arguments = zeros()
    handle = attach_cep(model, 2.0, "gaussian", seed=9)
    perturb = ConditionEmbeddingPerturbation(
        2.0, "gaussian", 9, purpose="condition perturbation: encoder_hidden_states"
    )
    for step in range(2):
        expected = perturb.draw(torch.Size((2, L, D)), torch.arange(2) + (step << 32))
        assert torch.equal(received(model, arguments)["encoder_hidden_states"], expected)
    assert handle.step == 2


def test_shared_noise():
    model, arguments = zeros(sd3)
    attach_cep(model, shared=True)
    delta = deltas(model, arguments)[0]
    assert torch.equal(delta, delta[:, :1].expand_as(delta))
    assert (delta[0] - delta[1]).abs().max() > 0.01 and delta[0, 0].unique().numel() == D


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype):
    model, arguments = zeros()
    handle = attach_cep(model)
    exact = received(model, arguments)["encoder_hidden_states"]
    handle.step = 0
    half = received(model, arguments | {"encoder_hidden_states": torch.zeros(2, L, D, dtype=dtype)})
    assert torch.equal(half["encoder_hidden_states"], exact.to(dtype))


def test_autocast():
    model, arguments = make(sd15)
    handle = attach_cep(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attached = model(**arguments).sample
        handle.step = 0
        given = received(model, arguments)
        handle.remove()
        assert given["encoder_hidden_states"].dtype == torch.float32
        assert torch.equal(model(**given).sample, attached) and attached.dtype == torch.bfloat16


def test_gradients_reach_the_text_encoder():
    model, arguments = make(sd15)
    attach_cep(model)
    arguments["encoder_hidden_states"].requires_grad_()
    model(**arguments).sample.square().sum().backward()
    assert arguments["encoder_hidden_states"].grad.abs().max() > 0


# Class labels


def class_deltas(model, arguments: dict, backward: bool = False) -> list[torch.Tensor]:
    """What was added to the class embedding, each time one was looked up."""
    seen, probes = [], []

    def probe(module, args, embedding):
        table = getattr(module, "embedding_table", module)
        seen.append((embedding - table.weight[args[0]]).detach())

    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding" or module is getattr(model, "class_embedding", None):
            module.dropout_prob = 0.0
            probes.append(module.register_forward_hook(probe))
    result = model(**arguments).sample
    if backward:
        result.square().sum().backward()
    for handle in probes:
        handle.remove()
    return seen


@pytest.mark.parametrize(("name", "lookups", "dim"), [("DiTTransformer2DModel", 3, 16), ("UNet2DModel", 1, 32)])
@pytest.mark.parametrize("type", ["uniform", "gaussian"])
def test_class_embeddings_get_one_delta_for_all_blocks(name, lookups, dim, type):
    model, arguments = make(CLASS_ZOO[name])
    attach_cep(model, 2.0, type)
    rounds = [class_deltas(model, arguments) for _ in range(60)]
    for seen in rounds:
        assert len(seen) == lookups and all((one - seen[0]).abs().max() < 1e-6 for one in seen)
    draws = torch.stack([seen[0] for seen in rounds])
    bound = 2.0 / dim**0.5
    law = ("uniform", (-bound, 2 * bound)) if type == "uniform" else ("norm", (0, bound))
    assert scipy.stats.kstest(draws.flatten().numpy(), *law).pvalue > 1e-4
    columns = torch.stack([draws[:, 0].flatten(), draws[:, 1].flatten(), draws.roll(1, 0)[:, 0].flatten()])
    assert (torch.corrcoef(columns) - torch.eye(3)).abs().max() < 5 * columns.shape[1] ** -0.5


@pytest.mark.parametrize("name", CLASS_ZOO)
def test_class_models_are_restored(name):
    model, arguments = make(CLASS_ZOO[name])
    clean, state, hooks = output(model, arguments), model.state_dict(), str(vars(model))
    handle = attach_cep(model)
    assert not same(output(model, arguments), clean)
    assert model.state_dict().keys() == state.keys()
    handle.remove()
    assert same(output(model, arguments), clean) and str(vars(model)) == hooks
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_class_blocks_read_the_delta_of_their_own_forward(reentrant):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model, arguments = make(dit)
        first, second = arguments, arguments | {"timestep": torch.tensor([500, 20])}  # with one tensor of labels
        if checkpointing:
            function = torch.utils.checkpoint.checkpoint
            model.enable_gradient_checkpointing(lambda block, *args: function(block, *args, use_reentrant=reentrant))
            model.pos_embed.requires_grad_()
        attach_cep(model, 8.0)
        torch.manual_seed(3)
        losses = [model(**one).sample.square().mean() for one in (first, second)]  # two forwards, then the backward
        sum(losses).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert all((a - b).abs().max() <= 1e-6 * a.abs().max() for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("build", [sd15, sd3])
def test_checkpointed_blocks_see_the_same_delta(build):
    def gradients(checkpointing: bool) -> tuple:
        model, arguments = make(build)
        if checkpointing:
            model.enable_gradient_checkpointing()
        handle = attach_cep(model, 8.0)
        model(**arguments).sample.square().mean().backward()
        return handle.step, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    (steps, plain), (again, checkpointed) = gradients(False), gradients(True)
    assert steps == again == 1
    assert all((a - b).abs().max() <= 1e-6 * a.abs().max() for a, b in zip(plain, checkpointed, strict=True))


def test_a_model_checkpointed_as_a_whole_is_refused():
    model, arguments = make(sd15)
    attach_cep(model)
    result = torch.utils.checkpoint.checkpoint(lambda: model(**arguments).sample, use_reentrant=False)
    with pytest.raises(InputError, match="run again in the backward pass"):
        result.sum().backward()


# Null and padding


def test_null_embedding_is_perturbed_by_default_and_recognized_if_not():
    null = torch.randn(L, D)
    for options, touched in ({}, [True, True]), ({"perturb_null": False, "null_embedding": null}, [True, False]):
        model, arguments = make(sdxl)
        attach_cep(model, **options)
        # As another batch size would give it: off in the last bits.
        arguments["encoder_hidden_states"][1] = null * (1 + 1e-6)
        given = received(model, arguments)
        for name in ("encoder_hidden_states", "added_cond_kwargs.text_embeds"):
            difference = (at(given, name) - at(arguments, name)).flatten(1).abs().amax(1)
            assert (difference > 0).tolist() == touched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_null_embedding_of_zeros(dtype):
    model, arguments = make(sd15)
    attach_cep(model, perturb_null=False, null_embedding=torch.zeros(1, L, D))
    embedding = torch.stack([torch.full((L, D), 1e-5), torch.zeros(L, D)]).to(dtype)
    given = received(model, arguments | {"encoder_hidden_states": embedding})["encoder_hidden_states"]
    assert (given[0] - embedding[0]).abs().max() > 0.01 and torch.equal(given[1], embedding[1])


def test_null_examples_that_the_trainer_marks():
    model, arguments = make(sd3)
    handle = attach_cep(model, perturb_null=False)
    with pytest.raises(InputError, match="needs to know which examples have no condition"):
        received(model, arguments)
    handle.mark(null=torch.tensor([True, False]))
    given = received(model, arguments)
    for name in ("encoder_hidden_states", "pooled_projections"):
        assert torch.equal(given[name][0], arguments[name][0]) and not torch.equal(given[name][1], arguments[name][1])
    with pytest.raises(InputError, match="mark"):  # a mark is for one forward
        received(model, arguments)


def test_null_class():
    # Label 10 is the null row of ten classes; LabelEmbedding drops labels by itself too.
    model, arguments = make(dit)
    attach_cep(model, perturb_null=False)
    embedder = model.transformer_blocks[0].norm1.emb.class_embedder
    seen = []
    embedder.register_forward_hook(lambda module, args, embedding: seen.append(embedding.detach()))
    embedder.dropout_prob = 0.5
    arguments["class_labels"] = torch.tensor([3, 10])
    for _ in range(12):
        model(**arguments)
    rows = torch.stack(seen)
    null = (rows == embedder.embedding_table.weight[10]).all(-1)
    assert null[:, 1].all()
    assert 0 < null[:, 0].float().mean() < 1
    assert not (rows[:, 0] == embedder.embedding_table.weight[3]).all(-1).any()


def test_class_embeddings_looked_up_outside_of_the_forward_are_clean():
    model, arguments = make(class_unet)
    attach_cep(model)
    model(**arguments)
    labels = arguments["class_labels"]
    assert torch.equal(model.class_embedding(labels), model.class_embedding.weight[labels])


def test_null_classes_that_the_trainer_marks():
    model, arguments = make(class_unet)
    handle = attach_cep(model, perturb_null=False, null_class=5)
    handle.mark(null=torch.tensor([True, False]))
    delta = class_deltas(model, arguments)[0]
    assert delta[0].abs().max() == 0 and delta[1].abs().max() > 0


def test_null_class_by_name():
    model, arguments = make(class_unet)
    with pytest.raises(InputError, match="name it with null_class"):
        attach_cep(model, perturb_null=False)
    attach_cep(model, perturb_null=False, null_class=10)
    delta = class_deltas(model, arguments)[0]
    assert delta[0].abs().max() > 0 and delta[1].abs().max() == 0


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "SanaTransformer2DModel", "HunyuanDiT2DModel",
                                  "Lumina2Transformer2DModel", "LTXVideoTransformer3DModel"])  # fmt: skip
def test_padding_by_the_models_own_mask(name):
    model, arguments = make(ZOO[name][0])
    attach_cep(model, perturb_padding=False)
    given = received(model, arguments)
    for place in ZOO[name][1]:
        touched = (given[place] != arguments[place]).any(-1)
        assert touched[0].all() and touched[1, :-2].all() and not touched[1, -2:].any()


def test_padding_mask_as_attention_bias():
    model, arguments = make(ZOO["PixArtTransformer2DModel"][0])
    attach_cep(model, perturb_padding=False)
    arguments["encoder_attention_mask"] = (1.0 - arguments["encoder_attention_mask"].float())[:, None] * -10000
    touched = (deltas(model, arguments)[0] != 0).any(-1)
    assert touched[0].all() and touched[1, :-2].all() and not touched[1, -2:].any()


def test_padding_that_the_trainer_marks():
    model, arguments = make(sd3)
    handle = attach_cep(model, perturb_padding=False)
    with pytest.raises(InputError, match="needs the padding mask of encoder_hidden_states"):
        received(model, arguments)
    mask = torch.ones(2, L)
    mask[0, 3:] = 0
    handle.mark(padding=mask)
    given = received(model, arguments)
    touched = (given["encoder_hidden_states"] != arguments["encoder_hidden_states"]).any(-1)
    assert torch.equal(touched, mask.bool())
    assert (given["pooled_projections"] != arguments["pooled_projections"]).any(-1).all()


# Schedules


def test_schedules():
    progress = torch.tensor([0.0, 0.25, 0.5, 1.0])
    expected = {
        "constant": [1, 1, 1, 1],
        "constant:0.5:0": [0.5] * 4,
        "linear": [1, 0.75, 0.5, 0],
        "linear:0:2": [0, 0.5, 1, 2],
        "cosine": [1, (1 + 0.5**0.5) / 2, 0.5, 0],
        "cosine:0:1": [0, (1 - 0.5**0.5) / 2, 0.5, 1],
    }
    for text, factors in expected.items():
        schedule = Schedule.parse(text)
        assert (schedule(progress) - torch.tensor(factors, dtype=torch.float32)).abs().max() < 1e-6
        assert Schedule.parse(str(schedule)) == schedule
    for wrong in ("quadratic", "linear:1", "linear:a:b", "linear:-1:0", "linear:0:1:2"):
        with pytest.raises(InputError, match="the schedule"):
            Schedule.parse(wrong)


def test_schedule_over_training():
    model, arguments = zeros()
    handle = attach_cep(model)
    plain = deltas(model, arguments, count=6)
    handle.remove()
    attach_cep(model, gamma_schedule="linear:0:1", schedule_steps=4)
    scheduled = deltas(model, arguments, count=6)
    for step, factor in enumerate([0, 0.25, 0.5, 0.75, 1, 1]):
        assert (scheduled[step] - factor * plain[step]).abs().max() < 1e-6


@pytest.mark.parametrize(("timesteps", "largest"), [
    (torch.tensor([250, 1000]), 1000), (torch.tensor([250.0, 1000.0]), 1000), (torch.tensor([0.25, 1.0]), 1),
])  # fmt: skip
def test_schedule_over_timesteps(timesteps, largest):
    model, arguments = zeros(sd3)
    arguments["timestep"] = timesteps
    handle = attach_cep(model)
    plain = deltas(model, arguments)[0]
    clean = received(model, arguments)["pooled_projections"] - arguments["pooled_projections"]
    handle.remove()
    attach_cep(model, timestep_schedule="linear", max_timestep=largest)
    scheduled = received(model, arguments)["encoder_hidden_states"]
    assert (scheduled[0] - 0.75 * plain[0]).abs().max() < 1e-6 and scheduled[1].abs().max() == 0
    pooled = received(model, arguments)["pooled_projections"] - arguments["pooled_projections"]
    assert (pooled[0] - 0.75 * clean[0]).abs().max() < 1e-6 and pooled[1].abs().max() == 0


def test_one_timestep_for_all():
    model, arguments = zeros()
    attach_cep(model, timestep_schedule="constant:0.5:0", gamma_schedule="constant:2:0")
    half = deltas(model, arguments | {"timestep": 500})[0]
    model, arguments = zeros()
    attach_cep(model)
    assert (half - deltas(model, arguments)[0]).abs().max() < 1e-6
    model, arguments = zeros()
    attach_cep(model, timestep_schedule="linear", max_timestep=1000)
    assert (2 * deltas(model, arguments | {"timestep": 500})[0] - half).abs().max() < 1e-6


def test_schedule_over_timesteps_of_class_embeddings():
    model, arguments = make(dit)
    attach_cep(model, timestep_schedule="linear:0:1", max_timestep=1000)
    arguments["timestep"] = torch.tensor([0, 1000])
    delta = class_deltas(model, arguments)[0]
    assert delta[0].abs().max() == 0 and delta[1].abs().max() > 0.1


def test_timesteps_of_another_range_are_refused():
    model, arguments = make(sd3)
    handle = attach_cep(model, timestep_schedule="linear", max_timestep=1)
    with pytest.raises(InputError, match="a timestep is 900, but max_timestep is 1"):
        received(model, arguments)
    handle.remove()
    attach_cep(model, timestep_schedule="linear", max_timestep=1000)
    with pytest.raises(InputError, match="needs max_timestep=1"):
        received(model, arguments | {"timestep": torch.tensor([0.2, 0.9])})


# The stream of draws


def test_global_generators_are_untouched():
    model, arguments = make(sdxl)
    attach_cep(model, seed=3)
    random.seed(0), np.random.seed(0)
    before = torch.random.get_rng_state(), str(np.random.get_state()), random.getstate()
    received(model, arguments)
    after = torch.random.get_rng_state(), str(np.random.get_state()), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_stream_is_seeded_counted_and_per_process():
    model, arguments = zeros()

    def draws(**options) -> torch.Tensor:
        handle = attach_cep(model, **options)
        result = deltas(model, arguments, count=3)
        handle.remove()
        return result

    first = draws(seed=1)
    assert torch.equal(draws(seed=1), first) and torch.equal(draws(seed=1, rank=0), first)
    for other in (draws(seed=2), draws(seed=1, rank=1)):
        assert not (other == first).any()
    assert not (first[0] == first[1]).any()  # every forward anew, so with accumulation every micro-batch


def test_resume():
    model, arguments = zeros()
    handle = attach_cep(model, seed=1)
    whole = deltas(model, arguments, count=4)
    handle.remove()
    handle = attach_cep(model, seed=1)
    deltas(model, arguments, count=2)
    state = pickle.loads(pickle.dumps(handle.state_dict()))
    handle.remove()
    handle = attach_cep(model, seed=1)
    handle.load_state_dict(state)
    assert handle.step == 2 and torch.equal(deltas(model, arguments, count=2), whole[2:])
    handle.remove()
    with pytest.raises(InputError, match="has the seed 1, but this one has 2"):
        attach_cep(model, seed=2).load_state_dict(state)


def test_gamma_zero_changes_nothing():
    model, arguments = make(sdxl)
    attach_cep(model, 0.0)
    given = received(model, arguments)
    assert all(given[name] is arguments[name] for name in arguments)


# Copies, wrappers, adapters


@pytest.mark.parametrize("build", [sd15, dit])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_perturbed(build, duplicate):
    model, arguments = make(build)
    clean = output(model, arguments)
    handle = attach_cep(model)
    copied = duplicate(model)
    assert same(output(copied, arguments), clean) and handle.step == 0
    assert not same(output(model, arguments), clean)
    assert copied.state_dict().keys() == model.state_dict().keys()
    # A copy may carry CEP of its own.
    attach_cep(copied)
    assert not same(output(copied, arguments), clean)


def test_saved_models_load_without_it(tmp_path):
    model, arguments = make(sd15)
    clean = output(model, arguments)
    attach_cep(model)
    model.save_pretrained(tmp_path)
    assert same(output(type(model).from_pretrained(tmp_path).train(), arguments), clean)


def without_dropped_labels(build):
    """A model of one block whose classes are never dropped: compiled and eager code draw in another order."""
    model, arguments = make(build)
    del model.transformer_blocks[1:]
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0
    return model, arguments


@pytest.mark.parametrize(("order", "build"), [
    ("attach, compile", sana), ("attach, compile", dit), ("compile, run, attach", dit), ("in place", dit),
    ("compile, attach", sana),
])  # fmt: skip
def test_compile(order, build):
    torch._dynamo.reset()
    model, arguments = without_dropped_labels(build)
    eager, _ = without_dropped_labels(build)
    clean = output(eager, arguments)[0]
    attach_cep(eager, 2.0)
    graphs = CompileCounter()
    handle = attach_cep(model, 2.0) if order == "attach, compile" else None
    compiled = model if order == "in place" else torch.compile(model, backend=graphs)
    if order == "in place":
        model.compile(backend=graphs)
    if order == "compile, run, attach":
        assert (output(compiled, arguments)[0] - clean).abs().max() < 1e-5
    handle, before = handle or attach_cep(compiled, 2.0), graphs.frame_count
    for _ in range(3):
        attached = output(compiled, arguments)[0]
        assert (attached - output(eager, arguments)[0]).abs().max() < 1e-5 < (attached - clean).abs().max()
    assert handle.step == 3
    assert graphs.frame_count - before == 1  # one graph, compiled once
    handle.remove()
    assert (output(compiled, arguments)[0] - clean).abs().max() < 1e-5


def test_compile_with_gradient_checkpointing():
    def gradients(compiled: bool) -> list[torch.Tensor]:
        model, arguments = without_dropped_labels(dit)
        model.enable_gradient_checkpointing()
        attach_cep(model, 8.0)
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        losses = [run(**arguments).sample.square().mean() for _ in range(2)]
        sum(losses).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain, compiled = gradients(False), gradients(True)
    assert all((a - b).abs().max() <= 1e-4 * a.abs().max() for a, b in zip(plain, compiled, strict=True))


@pytest.mark.parametrize("first", ["attach", "wrap"])
@pytest.mark.parametrize("build", [sd15, dit])
def test_distributed_data_parallel(build, first, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model, arguments = make(build)
        handle = attach_cep(model, seed=1) if first == "attach" else None
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        handle = handle or attach_cep(wrapped, seed=1)
        assert handle.model is model and unwrap(wrapped) is model
        attached = output(wrapped, arguments)
    finally:
        torch.distributed.destroy_process_group()
    alone, _ = make(build)
    attach_cep(alone, seed=1)
    assert same(output(alone, arguments), attached)


@pytest.mark.parametrize("first", ["attach", "prepare"])
def test_accelerate(first):
    from accelerate import Accelerator

    model, arguments = make(sd15)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    handle = attach_cep(model) if first == "attach" else None
    prepared = accelerator.prepare(model)
    handle = handle or attach_cep(prepared)
    accelerator.backward(prepared(**arguments).sample.square().mean())
    assert handle.step == 1 and handle.model is model
    handle.remove()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("how", ["add_adapter", "get_peft_model"])
@pytest.mark.parametrize("first", ["attach", "adapt"])
def test_lora(how, first):
    peft = pytest.importorskip("peft")
    model, arguments = make(sd15)
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian")
    handle = attach_cep(model) if first == "attach" else None
    wrapped = peft.get_peft_model(model, config) if how == "get_peft_model" else model
    if how == "add_adapter":
        model.requires_grad_(False)
        model.add_adapter(config)
    handle = handle or attach_cep(wrapped)
    wrapped.train()
    assert handle.model is model
    attached = output(wrapped, arguments)
    assert handle.step == 1
    handle.step = 0
    given = received(model, arguments)
    handle.remove()
    assert same(output(wrapped, given), attached) and not same(output(wrapped, arguments), attached)
    wrapped(**given).sample.square().mean().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all("lora" in name for name in trained)


# Refusals


@pytest.mark.parametrize(("options", "sentence"), [
    ({"gamma": -1.0}, "gamma is -1.0"),
    ({"type": "cauchy"}, "the CEP type is 'cauchy'"),
    ({"embeddings": "text"}, "the embeddings are 'text'"),
    ({"embeddings": "pooled"}, "has no pooled condition embedding that CEP could perturb: its only condition"),
    ({"null_class": 3}, "null_class has no effect"),
    ({"gamma_schedule": "linear"}, "needs schedule_steps"),
    ({"timestep_schedule": "cosine"}, "needs max_timestep"),
    ({"timestep_schedule": "step"}, "must be constant, linear or cosine"),
])  # fmt: skip
def test_refused_options(options, sentence):
    model, _ = make(sd15)
    with pytest.raises(ValueError, match=sentence) as raised:
        attach_cep(model, **options)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("option", [{"perturb_padding": False}, {"shared": True}])
def test_options_without_effect_on_class_models(option):
    with pytest.raises(InputError, match="which has no sequence embedding"):
        attach_cep(make(dit)[0], **option)


def test_nothing_to_attach_to():
    from diffusers import AutoencoderKL, UNet2DModel

    unconditional = UNet2DModel(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                                up_block_types=("UpBlock2D",), norm_num_groups=4)  # fmt: skip
    for model in (unconditional, AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), torch.nn.Linear(2, 2)):
        assert find_conditions(model) == ()
        with pytest.raises(InputError, match=f"^{type(model).__name__} has no condition embedding that CEP could"):
            attach_cep(model)


def test_a_forward_without_its_condition_is_refused():
    model, arguments = make(sd15)
    attach_cep(model)
    with pytest.raises(InputError, match="was given none of its condition embeddings: encoder_hidden_states"):
        received(model, arguments | {"encoder_hidden_states": None})


def test_attached_once():
    model, _ = make(sd15)
    handle = attach_cep(model)
    with pytest.raises(InputError, match="already carries CEP"):
        attach_cep(torch.compile(model))
    handle.remove()
    attach_cep(model)


# The package


def test_settings_are_plain_values():
    import json

    model, _ = make(sdxl)
    settings = attach_cep(model, 0.5, gamma_schedule="cosine:0:1", schedule_steps=10).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["gamma"] == 0.5 and settings["gamma_schedule"] == "cosine:0:1"
    assert settings["conditions"][1] == {"name": "added_cond_kwargs.text_embeds", "kind": "pooled"}
    assert set(inspect.signature(attach_cep).parameters) - {"rank"} == settings.keys() - {"conditions"}


def test_importing_the_package_does_not_import_it():
    code = "import noisycond, sys; assert 'noisycond.attach' not in sys.modules; noisycond.attach_cep; dir(noisycond)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert noisycond.attach_cep is attach_cep


def test_there_is_one_implementation_of_the_law(monkeypatch):
    # Where the component's draw is a constant, so is δ everywhere: attached, and in the project's own training.
    from noisycond.denoisers import build_denoiser, find_denoiser

    monkeypatch.setattr(ConditionEmbeddingPerturbation, "draw", lambda self, shape, keys: torch.full(shape, 0.25))
    model, arguments = zeros(sd3)
    attach_cep(model)
    assert (deltas(model, arguments) == 0.25).all() and (deltas(model, arguments, "pooled_projections") > 0.2).all()
    model, arguments = make(dit)
    attach_cep(model)
    assert all((delta - 0.25).abs().max() < 1e-6 for delta in class_deltas(model, arguments))
    own = build_denoiser(find_denoiser("dit-mini"), class_names=["a", "b"], latent_channels=4, latent_size=8,
                         perturbation=ConditionEmbeddingPerturbation(1.0))  # fmt: skip
    given = []
    own.backbone.forward = lambda noisy, timesteps, embedding: given.append(embedding)
    labels = torch.tensor([0, 1])
    own.train()(torch.zeros(2, 4, 8, 8), labels, {"class_labels": labels})
    assert (given[0] - own.encoder.table(labels) - 0.25).abs().max() < 1e-6


# docs/cep_everywhere.md

DOCS = (ROOT / "docs/cep_everywhere.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)`(, [^|]+)? \| [^|]+ \| ([^|]+) \| (yes|no) \|$", DOCS, re.M)


def test_the_table_names_what_is_tested():
    tested = {f"{name}{variant}": places for name, variant, places, tested in ROWS if tested == "yes"}
    assert tested.keys() == ZOO.keys() | CLASS_ZOO.keys()
    for name, (_, places) in ZOO.items():
        assert re.findall(r"`([\w.]+)`", tested[name]) == places


def test_the_table_names_what_diffusers_has():
    import diffusers

    rows = {name: places for name, _, places, tested in ROWS if tested == "no"}
    for name, places in rows.items():
        model = getattr(diffusers, name)
        found = _arguments(model.__new__(model))  # by its signature alone
        assert re.findall(r"`(\w+)`", places) == [place.name for place in found], name
    assert len(rows) > 50 and "UniDiffuserModel" not in rows


def test_the_options_are_told():
    options = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", DOCS.split("## With other tools")[0], re.M)
    told = {name for row in options for name in row if name}
    assert set(inspect.signature(attach_cep).parameters) - told == {"model", "schedule_steps", "max_timestep"}
    assert "`schedule_steps`" in DOCS and "`max_timestep`" in DOCS


def test_what_holds_a_perturbed_model_is_refused():
    """Twice attached, by the same seed, would be twice the noise."""

    class Around(torch.nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, encoder_hidden_states):
            return encoder_hidden_states

    model, _ = make(sd15)
    handle = attach_cep(model)
    with pytest.raises(InputError, match="Around already carries CEP, in its UNet2DConditionModel"):
        attach_cep(Around(model))
    handle.remove()
    attach_cep(Around(model)).remove()
    with pytest.raises(InputError, match="Around already carries CEP, in its ConditionEmbeddingPerturbation"):
        attach_cep(Around(ConditionEmbeddingPerturbation(1.0)))
    attach_cep(Around(ConditionEmbeddingPerturbation(0.0))).remove()


def test_data_parallel_is_refused():
    with pytest.raises(InputError, match="use DDP"):
        attach_cep(torch.nn.DataParallel(make(sd15)[0]))


def test_a_whole_timestep_of_one_is_no_fraction():
    model, arguments = make(sd15)
    handle = attach_cep(model, timestep_schedule="linear", max_timestep=1000)
    model(**arguments | {"timestep": torch.ones(len(arguments["sample"]))})
    assert handle.step == 1 and handle.refused is None
