"""The denoiser: sizes, the start at zero, one embedding and one perturbation for all blocks, and the stock export."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel

from noisycond.denoisers import PRESETS, ClassEncoder, build_denoiser, find_denoiser
from noisycond.denoisers.presets import DenoiserSource, Preset
from noisycond.errors import InputError
from noisycond.perturbation import ConditionEmbeddingPerturbation, embedding_dropout


NAMES = [str(digit) for digit in range(10)]
NULL = len(NAMES)
TINY = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}


def build(channels: int = 4, learned_variance: bool = False, randomize: bool = True, **options):
    """A small denoiser; its weights are moved away from the start, where it would predict 0 whatever it is given."""
    torch.manual_seed(0)
    options = {"class_names": NAMES, "latent_channels": channels, "latent_size": 8} | options
    denoiser = build_denoiser(DenoiserSource(Preset(TINY, learned_variance=learned_variance)), **options)
    if randomize:
        move(denoiser)
    return denoiser


@torch.no_grad()
def move(model) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(std=0.1, generator=generator)


def batch(size: int = 6, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor, dict, torch.Tensor]:
    """Noisy latents, timesteps, the condition (every third without one) and keys."""
    generator = torch.Generator().manual_seed(2)
    class_labels = torch.arange(size) % NULL
    class_labels[2::3] = NULL
    condition = {"class_labels": class_labels, "index": torch.arange(size) * 31 + 5}
    noisy = torch.randn(size, channels, 8, 8, generator=generator)
    timesteps = torch.randint(1000, (size,), generator=generator)
    return noisy, timesteps, condition, torch.arange(size) + (7 << 32)


# Sizes


@pytest.mark.parametrize(
    ("name", "millions"), [("dit-s-2", 33), ("dit-b-2", 130), ("dit-l-2", 458), ("dit-xl-2", 675)]
)
def test_the_presets_have_the_paper_s_sizes(name, millions):
    # Table 1 of arXiv:2212.09748, rounded as there.
    with torch.device("meta"):
        denoiser = build_denoiser(
            find_denoiser(name), class_names=[str(k) for k in range(1000)], latent_channels=4, latent_size=32
        )
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert abs(count / 1e6 / millions - 1) < 0.01
    assert denoiser.backbone.model.config.out_channels == 8


def test_the_ldm_preset_has_the_paper_s_size():
    # 400.9 million in the U-Net: LDM's public configuration in diffusers' class.
    with torch.device("meta"):
        denoiser = build_denoiser(
            find_denoiser("ldm-4"), class_names=[str(k) for k in range(1000)], latent_channels=3, latent_size=64
        )
    counts = [sum(value.numel() for value in part.parameters()) for part in (denoiser.backbone, denoiser.encoder)]
    assert abs(counts[0] / 400.9e6 - 1) < 0.01 and counts[1] == 1001 * 512


def test_every_preset_builds():
    for name in PRESETS:
        with torch.device("meta"):
            build_denoiser(find_denoiser(name), class_names=NAMES, latent_channels=4, latent_size=8)


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_learned_variance_doubles_the_channels(learned_variance, channels):
    denoiser = build(channels, learned_variance)
    prediction = denoiser(*batch(channels=channels))
    assert prediction.shape == (6, channels * (1 + learned_variance), 8, 8)


# The start


@pytest.mark.parametrize("learned_variance", [False, True])
def test_the_prediction_starts_at_zero(learned_variance):
    denoiser = build(randomize=False, learned_variance=learned_variance)
    assert denoiser(*batch()).abs().max() == 0
    assert denoiser.eval()(*batch()).abs().max() == 0


def test_every_block_starts_as_the_identity():
    denoiser = build(randomize=False)
    changes = []
    for block in denoiser.backbone.model.transformer_blocks:
        block.register_forward_hook(lambda _, given, result: changes.append((result - given[0]).abs().max()))
    denoiser(*batch())
    assert len(changes) == TINY["num_layers"] and max(changes) == 0


def test_the_weights_that_may_not_start_at_zero_do_not():
    denoiser = build(randomize=False)
    zero = {name for name, value in denoiser.named_parameters() if name.endswith("weight") and value.abs().max() == 0}
    assert len(zero) == TINY["num_layers"] + 2
    assert all(".norm1.linear." in name or ".proj_out_" in name for name in zero)
    assert abs(denoiser.encoder.table.weight.std() - 0.02) < 0.003
    assert abs(denoiser.backbone.timestep_embedder.linear_2.weight.std() - 0.02) < 0.003


# One embedding, one perturbation


def watch(denoiser) -> dict[str, list]:
    """Records what the encoder and the perturbation give and what reaches each block."""
    seen: dict[str, list] = {"encoder": [], "perturbation": [], "blocks": []}
    denoiser.encoder.register_forward_hook(lambda _, given, result: seen["encoder"].append(result))
    if denoiser.perturbation is not None:
        denoiser.perturbation.register_forward_hook(lambda _, given, result: seen["perturbation"].append(result))
    for block in denoiser.backbone.model.transformer_blocks:
        block.norm1.emb.register_forward_hook(lambda _, given, result: seen["blocks"].append(result))
    return seen


def conditioning(denoiser, timesteps, embedding) -> torch.Tensor:
    """What every block should read, put together by hand."""
    backbone = denoiser.backbone
    return backbone.timestep_embedder(backbone.time_proj(timesteps)) + embedding


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("type", ["uniform", "gaussian"])
def test_all_blocks_read_one_perturbed_embedding(type, autocast, checkpointing):
    denoiser = build(perturbation=ConditionEmbeddingPerturbation(2.0, type)).train()
    noisy, timesteps, condition, keys = batch()
    if checkpointing:
        denoiser.backbone.model.enable_gradient_checkpointing()
    seen = watch(denoiser)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        denoiser(noisy, timesteps, condition, keys).square().mean().backward()
        table = denoiser.encoder.table(condition["class_labels"])
        perturbed = table + denoiser.perturbation.draw(table.shape, keys)
        expected = conditioning(denoiser, timesteps, perturbed)
    assert len(seen["encoder"]) == len(seen["perturbation"]) == 1
    assert torch.equal(seen["perturbation"][0], perturbed)
    assert (perturbed - table).abs().amax(1).min() > 0.1
    # Each block once, the first again for the output, and each again where the backward pass recomputes.
    layers = TINY["num_layers"]
    assert len(seen["blocks"]) == layers + 1 + layers * checkpointing
    for reached in seen["blocks"]:
        assert torch.equal(reached, expected.to(reached.dtype))
    if not autocast:
        assert seen["blocks"][0].dtype == torch.float32


@pytest.mark.parametrize("with_keys", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_gradient(with_keys, autocast):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        denoiser = build(perturbation=ConditionEmbeddingPerturbation(2.0)).train()
        if checkpointing:
            denoiser.backbone.model.enable_gradient_checkpointing()
        noisy, timesteps, condition, keys = batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction = denoiser(noisy, timesteps, condition, keys if with_keys else None)
        prediction.float().square().mean().backward()
        return {name: parameter.grad for name, parameter in denoiser.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient is not None and torch.equal(gradient, recomputed[name]), name
    assert plain["encoder.table.weight"].abs().max() > 0


def test_no_label_is_dropped_inside_the_model():
    # A stock DiT drops labels in train mode, in each block on its own.
    denoiser = build()
    inputs = batch(30)
    expected = denoiser.eval()(*inputs)
    for _ in range(3):
        assert torch.equal(denoiser.train()(*inputs), expected)


def test_the_label_and_the_timestep_reach_the_prediction():
    denoiser = build().eval()
    noisy, timesteps, condition, _ = batch()
    plain = denoiser(noisy, timesteps, condition)
    other = condition | {"class_labels": (condition["class_labels"] + 1) % (NULL + 1)}
    assert (denoiser(noisy, timesteps, other) - plain).abs().amax((1, 2, 3)).min() > 1e-3
    assert (denoiser(noisy, 999 - timesteps, condition) - plain).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("type", ["uniform", "gaussian"])
def test_keys_decide_and_eval_mode_ignores_them(type):
    denoiser = build(perturbation=ConditionEmbeddingPerturbation(1.0, type))
    noisy, timesteps, condition, keys = batch()
    plain = build().eval()(noisy, timesteps, condition)
    assert torch.equal(denoiser.eval()(noisy, timesteps, condition, keys), plain)
    trained = denoiser.train()(noisy, timesteps, condition, keys)
    assert torch.equal(denoiser(noisy, timesteps, condition, keys), trained)
    assert (trained - plain).abs().amax((1, 2, 3)).min() > 1e-4
    assert (denoiser(noisy, timesteps, condition, keys + 50) - trained).abs().amax((1, 2, 3)).min() > 1e-4
    own = denoiser(noisy, timesteps, condition)
    assert (denoiser(noisy, timesteps, condition) - own).abs().amax((1, 2, 3)).min() > 1e-4


def test_fixed_perturbation_belongs_to_the_example():
    denoiser = build(perturbation=ConditionEmbeddingPerturbation(1.0), fixed_perturbation=True).train()
    seen = watch(denoiser)
    noisy, timesteps, condition, keys = batch()
    first = denoiser(noisy, timesteps, condition, keys)
    assert torch.equal(denoiser(noisy, timesteps, condition, keys + 100), first)
    assert torch.equal(denoiser(noisy, timesteps, condition), first)
    expected = seen["encoder"][0] + denoiser.perturbation.draw(seen["encoder"][0].shape, condition["index"])
    assert torch.equal(seen["perturbation"][0], expected)
    moved = condition | {"index": condition["index"] + 1}
    assert (denoiser(noisy, timesteps, moved, keys) - first).abs().amax((1, 2, 3)).min() > 1e-4


def test_null_embeddings_are_perturbed_where_asked():
    noisy, timesteps, condition, keys = batch()
    null = condition["class_labels"] == NULL
    for perturb_null in (True, False):
        denoiser = build(perturbation=ConditionEmbeddingPerturbation(1.0), perturb_null=perturb_null).train()
        seen = watch(denoiser)
        denoiser(noisy, timesteps, condition, keys)
        delta = seen["perturbation"][0] - seen["encoder"][0]
        assert delta[~null].abs().amax(1).min() > 0.1
        if perturb_null:
            assert delta[null].abs().amax(1).min() > 0.1
        else:
            assert torch.equal(seen["perturbation"][0][null], denoiser.encoder.table.weight[NULL].expand(2, -1))


def test_an_example_without_a_condition_depends_on_its_latents_alone():
    denoiser = build(perturbation=ConditionEmbeddingPerturbation(1.0), perturb_null=False, label_smoothing=0.3).train()
    noisy, timesteps, condition, keys = batch()
    null = condition["class_labels"] == NULL
    expected = denoiser(noisy, timesteps, condition, keys)[null]
    assert torch.equal(denoiser.eval()(noisy, timesteps, condition, keys)[null], expected)
    denoiser.train()
    # Other keys, indices and neighbours, and other class embeddings.
    others = {"class_labels": torch.where(null, NULL, (condition["class_labels"] + 1) % NULL)}
    with torch.no_grad():
        denoiser.encoder.table.weight[:NULL] += 1.0
    changed = noisy + torch.where(null, 0.0, 1.0)[:, None, None, None]
    result = denoiser(changed, timesteps, others | {"index": condition["index"] + 9}, keys + 9)
    assert torch.equal(result[null], expected)
    with torch.no_grad():
        denoiser.encoder.table.weight[NULL] += 1.0
    assert (denoiser(changed, timesteps, others, keys)[null] - expected).abs().amax((1, 2, 3)).min() > 1e-3


# The class encoder


def test_the_encoder_knows_its_null_class():
    encoder = ClassEncoder(10, 8)
    assert encoder.null_class == 10 and encoder.table.weight.shape == (11, 8)
    labels = {"class_labels": torch.tensor([0, 10, 9])}
    assert encoder.is_null(labels).tolist() == [False, True, False]
    assert torch.equal(encoder(labels), encoder.table.weight[[0, 10, 9]])


def test_label_smoothing_in_train_mode_alone():
    encoder = ClassEncoder(10, 8, label_smoothing=0.2)
    labels, weight = {"class_labels": torch.tensor([0, 10, 9])}, encoder.table.weight
    expected = 0.8 * weight[[0, 9]] + 0.2 * weight[:10].mean(0)  # the null embedding is not in the mean
    result = encoder(labels)
    assert (result[[0, 2]] - expected).abs().max() < 1e-7
    assert torch.equal(result[1], weight[10])
    assert torch.equal(encoder.eval()(labels), weight[[0, 10, 9]])


def test_embedding_dropout_in_train_mode_alone():
    encoder = ClassEncoder(10, 64, embedding_dropout=0.5, seed=3)
    labels, keys = {"class_labels": torch.tensor([0, 10, 9])}, torch.tensor([4, 5, 6])
    plain = encoder.table.weight[[0, 10, 9]]
    result = encoder(labels, keys)
    assert torch.equal(result, embedding_dropout(plain, 0.5, 3, keys))
    assert 0.2 < (result == 0).float().mean() < 0.8
    with pytest.raises(ValueError, match="keys"):
        encoder(labels)
    assert torch.equal(encoder.eval()(labels), plain)


def test_the_baselines_reach_the_blocks():
    denoiser = build(embedding_dropout=0.3, label_smoothing=0.2, seed=9).train()
    seen = watch(denoiser)
    noisy, timesteps, condition, keys = batch()
    denoiser(noisy, timesteps, condition, keys)
    table = denoiser.encoder.table.weight
    smooth = torch.lerp(table, table[:NULL].mean(0), 0.2)
    smooth = torch.cat([smooth[:NULL], table[NULL:]])[condition["class_labels"]]
    expected = conditioning(denoiser, timesteps, embedding_dropout(smooth, 0.3, 9, keys))
    for reached in seen["blocks"]:
        assert (reached - expected).abs().max() < 1e-5


# Export


@pytest.mark.parametrize("learned_variance", [False, True])
def test_the_exported_model_predicts_the_same(learned_variance):
    denoiser = build(learned_variance=learned_variance, perturbation=ConditionEmbeddingPerturbation(1.0)).eval()
    stock = denoiser.backbone.export(denoiser.encoder.table.weight)
    assert type(stock) is DiTTransformer2DModel and not stock.training
    noisy, timesteps, condition, _ = batch(22)
    labels = condition["class_labels"] = torch.arange(22) % (NULL + 1)
    expected = denoiser(noisy, timesteps, condition)
    stock_labels = torch.where(labels == NULL, 1000, labels)
    found = stock(noisy, timestep=timesteps, class_labels=stock_labels).sample
    assert torch.equal(found, expected)
    assert expected.abs().max() > 0.01
    # The rows between the classes and the last one hold the null embedding too.
    between = stock(noisy, timestep=timesteps, class_labels=torch.where(labels == NULL, 10, labels)).sample
    assert torch.equal(between, expected)


def test_the_exported_model_shares_no_memory():
    denoiser = build().eval()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    stock = denoiser.backbone.export(denoiser.encoder.table.weight)
    with torch.no_grad():
        tables = [value for name, value in stock.named_parameters() if "embedding_table" in name]
        tables[0].add_(1.0)
        assert (tables[0] - tables[1]).abs().max() > 0.5
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())


def test_a_half_precision_denoiser_is_exported_in_float32():
    denoiser = build().bfloat16()
    stock = denoiser.backbone.export(denoiser.encoder.table.weight)
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.float32}


@pytest.mark.parametrize("learned_variance", [False, True])
def test_an_exported_folder_is_trained_on(learned_variance, tmp_path):
    denoiser = build(learned_variance=learned_variance)
    denoiser.backbone.export(denoiser.encoder.table.weight).save_pretrained(tmp_path)
    source = find_denoiser(str(tmp_path))
    assert source.preset.learned_variance == learned_variance and source.id2label is None
    again = build_denoiser(source, class_names=NAMES, latent_channels=4, latent_size=8)
    state, expected = again.state_dict(), denoiser.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert torch.equal(again.eval()(*batch()), denoiser.eval()(*batch()))


def save_pipeline(denoiser, folder, names: list[str]) -> str:
    """The parts of a pipeline folder that matter to a denoiser."""
    denoiser.backbone.export(denoiser.encoder.table.weight).save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    return str(folder)


def test_the_denoiser_of_a_pipeline_folder_is_found(tmp_path):
    denoiser = build()
    source = find_denoiser(save_pipeline(denoiser, tmp_path, NAMES))
    assert source.id2label == dict(enumerate(NAMES))
    again = build_denoiser(source, class_names=NAMES, latent_channels=4, latent_size=8)
    assert torch.equal(again.encoder.table.weight, denoiser.encoder.table.weight)


@pytest.mark.parametrize("names", [NAMES[::-1], NAMES[:9], ["a", *NAMES[1:]]])
def test_a_pipeline_of_other_classes_is_refused(names, tmp_path):
    source = find_denoiser(save_pipeline(build(), tmp_path, NAMES))
    with pytest.raises(InputError, match="other classes"):
        build_denoiser(source, class_names=names, latent_channels=4, latent_size=8)


@pytest.mark.parametrize("part", ["class_embedder.embedding_table.weight", "timestep_embedder.linear_1.bias"])
def test_embeddings_that_differ_between_blocks_are_refused(part, tmp_path):
    denoiser = build()
    stock = denoiser.backbone.export(denoiser.encoder.table.weight)
    with torch.no_grad():
        stock.get_parameter(f"transformer_blocks.2.norm1.emb.{part}").flatten()[5] += 1e-3
    stock.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="differ between blocks"):
        build_denoiser(find_denoiser(str(tmp_path)), class_names=NAMES, latent_channels=4, latent_size=8)


def test_a_pretrained_model_with_too_few_classes_is_refused(tmp_path):
    config = TINY | {"in_channels": 4, "out_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 3}
    stock = DiTTransformer2DModel(**config)
    first = stock.transformer_blocks[0].norm1.emb.state_dict()
    for block in stock.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    stock.save_pretrained(tmp_path)
    source = find_denoiser(str(tmp_path))
    with pytest.raises(InputError, match="3 classes.*has 4"):
        build_denoiser(source, class_names=NAMES[:4], latent_channels=4, latent_size=8)
    denoiser = build_denoiser(source, class_names=NAMES[:2], latent_channels=4, latent_size=8)
    table = first["class_embedder.embedding_table.weight"]
    assert torch.equal(denoiser.encoder.table.weight, table[[0, 1, 3]])


# Bad input


def test_more_classes_than_the_pipeline_holds_are_refused():
    names = [str(number) for number in range(1001)]
    with torch.device("meta"):
        build(class_names=names[:1000], randomize=False)
        with pytest.raises(InputError, match="1001 classes"):
            build(class_names=names, randomize=False)


def write(tmp_path, **config) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(("out_channels", "learned"), [(None, False), (4, False), (8, True)])
def test_a_configuration_file_is_an_architecture(out_channels, learned, tmp_path):
    source = find_denoiser(write(tmp_path, **TINY, in_channels=4, out_channels=out_channels))
    assert source.folder is None and source.preset.learned_variance == learned
    denoiser = build_denoiser(source, class_names=NAMES, latent_channels=4, latent_size=8)
    assert denoiser(*batch()).shape == (6, 8 if learned else 4, 8, 8)
    config = denoiser.backbone.model.config
    assert {key: config[key] for key in TINY} == TINY and denoiser.backbone.dim == 32


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    with pytest.raises(InputError, match="'num_layer'.*did you mean 'num_layers'"):
        find_denoiser(write(tmp_path, num_layer=2))


@pytest.mark.parametrize("out_channels", [3, 6, 12])
def test_out_channels_that_are_neither_once_nor_twice_are_refused(out_channels, tmp_path):
    with pytest.raises(InputError, match=f"out_channels is {out_channels}.*in_channels \\(4\\)"):
        find_denoiser(write(tmp_path, **TINY, in_channels=4, out_channels=out_channels))


def test_a_configuration_of_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="UNet2DModel"):
        find_denoiser(write(tmp_path, _class_name="UNet2DModel"))


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"dit"'])
def test_a_file_that_is_no_configuration_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="JSON"):
        find_denoiser(str(tmp_path / "config.json"))
    with pytest.raises(InputError, match="cannot be read"):
        find_denoiser(str(tmp_path / "missing.json"))


@pytest.mark.parametrize(("key", "value"), [("in_channels", 3), ("sample_size", 16)])
def test_a_configuration_for_other_latents_is_refused(key, value, tmp_path):
    source = find_denoiser(write(tmp_path, **TINY, **{key: value}))
    with pytest.raises(InputError, match=f"{key} {value}"):
        build_denoiser(source, class_names=NAMES, latent_channels=4, latent_size=8)


@pytest.mark.parametrize("name", ["dit-xl-3", "dit_xl_2", "dit-xl"])
def test_an_unknown_preset_is_refused_with_the_nearest_one(name):
    with pytest.raises(InputError, match=f"{name}: neither.*did you mean 'dit-xl-2'"):
        find_denoiser(name)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no configuration"):
        find_denoiser(str(tmp_path))


@pytest.mark.parametrize("latent_size", [7, 9])
def test_a_latent_size_that_patches_do_not_fill_is_refused(latent_size):
    with pytest.raises(InputError, match=f"{latent_size} pixels wide.*patch size 2"):
        build(latent_size=latent_size)


def test_the_global_generator_is_left_alone():
    denoiser = build(perturbation=ConditionEmbeddingPerturbation(1.0), embedding_dropout=0.2).train()
    before = torch.random.get_rng_state()
    denoiser(*batch())
    assert torch.equal(torch.random.get_rng_state(), before)
