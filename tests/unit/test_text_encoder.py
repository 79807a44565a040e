"""Text encoders and text-conditional denoisers from scratch: tokens, what is trained, CEP, the shipped tokenizer."""

import string
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoTokenizer, BertModel, set_seed

from noisycond.arguments import FirstStageArguments, PerturbationArguments, parse_arguments
from noisycond.denoisers import (
    TEXT_PRESETS,
    TextEmbedding,
    build_text_denoiser,
    digits_tokenizer,
    find_text_denoiser,
    open_text_encoder,
    peek_text_encoder,
)
from noisycond.denoisers.text_options import TextModelArguments
from noisycond.errors import InputError
from noisycond.perturbation import ConditionEmbeddingPerturbation


TEXTS = ["a thick Seven", "", "the digit 3, slanted to the left"]


def encoder(trained: bool = True):
    set_seed(0)
    return open_text_encoder("digits-bert", trained)


def denoiser(trained: bool = True, **options):
    """The miniature; its last layers are moved away from 0, where it would predict 0 whatever it is given."""
    model = build_text_denoiser(
        find_text_denoiser("ldm-mini-text"), encoder(trained), latent_channels=3, latent_size=8, **options
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.backbone.parameters():
            if value.abs().max() == 0:
                value.normal_(std=0.1, generator=generator)
    return model


def batch(text) -> tuple:
    generator = torch.Generator().manual_seed(2)
    condition = text.encode(TEXTS) | {"is_null": torch.tensor([False, True, False]), "index": torch.tensor([7, 8, 9])}
    return torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([3, 500, 900]), condition, torch.arange(3) + 40


# The shipped tokenizer


def test_the_shipped_files_are_what_the_script_makes():
    shipped = {path.name: path.read_text() for path in digits_tokenizer.FOLDER.iterdir()}
    assert shipped == digits_tokenizer.files()


def test_no_text_is_unknown():
    tokenizer = AutoTokenizer.from_pretrained(digits_tokenizer.FOLDER)
    text = f"Zebra {string.printable} x9z handwriting-like"
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("seven 7s").input_ids) == ["[CLS]", "seven", "7", "##s", "[SEP]"]


# Tokens


def test_captions_are_padded_to_the_tokenizer_s_length_without_a_mask():
    text = encoder()
    encoded = text.encode(TEXTS)
    assert set(encoded) == {"input_ids", "is_truncated"} and encoded["input_ids"].shape == (3, text.max_length)
    expected = AutoTokenizer.from_pretrained(digits_tokenizer.FOLDER)(
        TEXTS, padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    )
    assert torch.equal(encoded["input_ids"], expected["input_ids"])


def test_only_a_caption_that_was_cut_counts_as_truncated():
    text = encoder()
    fits = " ".join(["seven"] * (text.max_length - 2))
    assert text.encode([fits, fits + " 1", "", fits + " a b"])["is_truncated"].tolist() == [False, True, False, True]


def test_the_null_condition_is_the_empty_prompt():
    text = encoder()
    null = text.null()
    assert set(null) == {"input_ids"} and torch.equal(null["input_ids"], text.encode([""])["input_ids"])
    assert text.is_null({"is_null": torch.tensor([True])}).tolist() == [True]


def test_a_tokenizer_that_takes_more_is_held_to_what_ldm_s_pipeline_pads_to(tmp_path):
    config = digits_tokenizer.files()["config.json"].replace(
        '"max_position_embeddings": 24', '"max_position_embeddings": 512'
    )
    for name, content in (digits_tokenizer.files() | {"config.json": config}).items():
        (tmp_path / name).write_text(content.replace('"model_max_length": 24', '"model_max_length": 512'))
    text = open_text_encoder(str(tmp_path), trained=False)
    assert text.encode(["1"])["input_ids"].shape == (1, 77)
    assert text.encode.tokenizers[0].model_max_length == 77


# What it gives


def test_it_gives_the_last_hidden_states_as_ldm_s_pipeline_computes_them():
    text = encoder().eval()
    tokens = text.encode(TEXTS)
    assert isinstance(text.models[0], BertModel)
    embedding = text(tokens)
    assert torch.equal(embedding.sequence, text.models[0](tokens["input_ids"])[0])
    assert embedding.mask is None and embedding.pooled is None


def test_embeddings_of_a_cache_are_taken_as_they_are():
    given = {"sequence": torch.randn(2, 5, 64), "mask": torch.ones(2, 5), "pooled": torch.randn(2, 8)}
    embedding = encoder()(given)
    assert all(getattr(embedding, name) is value for name, value in given.items())


def test_a_frozen_encoder_stays_frozen_and_in_eval_mode():
    text = encoder(trained=False).train()
    assert text.training and not any(module.training for module in text.models.modules())
    assert not any(value.requires_grad for value in text.parameters())
    assert not text(text.encode(TEXTS)).sequence.requires_grad


def test_a_trained_encoder_draws_nothing_and_every_trained_parameter_gets_a_gradient():
    text = encoder().train()
    assert all(module.p == 0 for module in text.modules() if isinstance(module, torch.nn.Dropout))
    state = torch.get_rng_state()
    text(text.encode(TEXTS)).sequence.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    frozen = {name for name, value in text.named_parameters() if not value.requires_grad}
    assert frozen == {"models.0.pooler.dense.weight", "models.0.pooler.dense.bias"}
    assert all((value.grad is not None) == value.requires_grad for value in text.parameters())


def test_dropout_of_the_configuration_is_switched_off_where_it_is_trained(tmp_path):
    config = digits_tokenizer.files()["config.json"].replace('_prob": 0.0', '_prob": 0.5')
    for name, content in (digits_tokenizer.files() | {"config.json": config}).items():
        (tmp_path / name).write_text(content)
    text = open_text_encoder(str(tmp_path), trained=True).train()
    assert torch.equal(text(text.encode(TEXTS)).sequence, text(text.encode(TEXTS)).sequence)
    assert open_text_encoder(str(tmp_path), trained=False).models[0].config.hidden_dropout_prob == 0.5


def test_weights_are_read_where_there_are_some_and_drawn_from_torch_s_generator_where_not(tmp_path):
    first, second = encoder(), encoder()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    first.models[0].save_pretrained(tmp_path)
    first.encode.tokenizers[0].save_pretrained(tmp_path)
    set_seed(5)
    read = open_text_encoder(str(tmp_path), trained=True)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), read.parameters(), strict=True))


# The denoiser


def test_cep_perturbs_tokens_and_pooled_embedding_each_with_its_own_draw_once_per_forward():
    text = encoder().train()
    seen = []

    class Backbone(torch.nn.Module):
        shard_units = ()

        def forward(self, noisy, timesteps, embedding):
            seen.append(embedding)
            return noisy

    model = denoiser(perturbation=ConditionEmbeddingPerturbation(1.0, seed=3))
    model.backbone, model.encoder = Backbone(), text
    clean = {"sequence": torch.zeros(3, 5, 16), "mask": torch.ones(3, 5), "pooled": torch.zeros(3, 16)}
    noisy, timesteps, condition, keys = batch(text)
    model.train()(noisy, timesteps, clean | condition, keys)
    model(noisy, timesteps, clean | condition, keys)
    first, again = seen
    assert isinstance(first, TextEmbedding) and torch.equal(first.sequence, again.sequence)
    assert torch.equal(first.pooled, again.pooled) and first.mask is clean["mask"]
    assert 0.2 < first.sequence.abs().max() <= 0.25 and 0.2 < first.pooled.abs().max() <= 0.25
    tokens = torch.cat([first.sequence, first.pooled[:, None]], dim=1).flatten(0, 1)
    assert len(torch.unique(tokens, dim=0)) == len(tokens)  # no two tokens, nor the pooled embedding, share δ
    model(noisy, timesteps, clean | condition, keys + 1)
    assert (seen[-1].sequence != first.sequence).any() and (seen[-1].pooled != first.pooled).any()
    model.eval()(noisy, timesteps, clean | condition, keys)
    assert seen[-1].sequence.abs().max() == 0 and seen[-1].pooled.abs().max() == 0


@pytest.mark.parametrize("cached", [False, True])
def test_cep_respects_null_and_fixed(cached):
    model = denoiser(trained=False, perturbation=ConditionEmbeddingPerturbation(2.0), perturb_null=False).train()
    noisy, timesteps, condition, keys = batch(model.encoder)
    if cached:
        condition["sequence"] = model.encoder(condition).sequence
    perturbed = model(noisy, timesteps, condition, keys)
    clean = model.eval()(noisy, timesteps, condition, keys)
    assert ((perturbed != clean).flatten(1).any(1)).tolist() == [True, False, True]
    model.train().fixed = True
    assert torch.equal(model(noisy, timesteps, condition, keys), model(noisy, timesteps, condition, keys + 9))


def test_embedding_dropout_applies_to_tokens_and_pooled_embedding():
    text = encoder(trained=False).train()
    text.embedding_dropout = 0.5
    given = {"sequence": torch.ones(4, 10, 32), "pooled": torch.ones(4, 320)}
    embedding = text(given, torch.arange(4))
    for part in (embedding.sequence, embedding.pooled):
        assert set(part.unique().tolist()) == {0.0, 2.0} and 0.4 < (part == 0).float().mean() < 0.6
    assert (embedding.sequence.flatten(1) != embedding.pooled).any()
    assert torch.equal(text.eval()(given).sequence, given["sequence"])


def test_the_encoder_is_trained_through_the_denoiser():
    model = denoiser(perturbation=ConditionEmbeddingPerturbation(1.0)).train()
    model(*batch(model.encoder)).square().mean().backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    assert model.encoder.models[0].embeddings.word_embeddings.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", TEXT_PRESETS)
def test_every_text_preset_is_built_on_the_meta_device(name):
    source = find_text_denoiser(name)
    text, why = peek_text_encoder(source.preset.text_encoder, trained=True)
    with torch.device("meta"):
        model = build_text_denoiser(source, text, latent_channels=3, latent_size=64)
    assert {value.device.type for value in model.parameters()} == {"meta"}
    if name == "ldm-4-text":
        count = sum(value.numel() for value in model.encoder.parameters())
        assert count == 109_482_240  # bert-base-uncased
        assert "30522" in why or "configuration" in why


# Bad input


@pytest.mark.parametrize(
    ("name", "said"),
    [("digits-brt", "did you mean 'digits-bert'"), ("nobody/nothing", "--text_encoder nobody/nothing")],
)
def test_an_encoder_that_is_not_there(name, said):
    with pytest.raises(InputError, match=said) as error:
        open_text_encoder(name, trained=True)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="--text_encoder"):
        peek_text_encoder(name, trained=True)


def test_an_encoder_that_does_not_fit_the_denoiser():
    with torch.device("meta"), pytest.raises(InputError, match="gives embeddings of 64 numbers.*768"):
        build_text_denoiser(
            find_text_denoiser("ldm-4-text"),
            peek_text_encoder("digits-bert", True)[0],
            latent_channels=3,
            latent_size=8,
        )


def test_denoisers_that_cannot_attend_to_text(tmp_path):
    with pytest.raises(InputError, match="ldm-mini-text"):
        find_text_denoiser("dit-mini")
    config = tmp_path / "dit.json"
    config.write_text('{"num_layers": 1}')
    with pytest.raises(InputError, match="cannot attend to text"):
        find_text_denoiser(str(config))


# Flags


@dataclass
class Flags(TextModelArguments, FirstStageArguments, PerturbationArguments):
    pass


def flags(*argv: str) -> Flags:
    return parse_arguments(Flags, list(argv))


def test_the_defaults_follow_where_the_model_comes_from():
    scratch, existing = flags(), flags("--pretrained_model_name_or_path", "a/b")
    assert (scratch.denoiser, scratch.train_text_encoder) == ("ldm-mini-text", True)
    assert (existing.denoiser, existing.train_text_encoder) == (None, False)
    assert not flags("--cache_text_embeddings").train_text_encoder
    assert not flags("--train_text_encoder", "no").train_text_encoder


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--use_lora", "--pretrained_model_name_or_path"),
        ("--rank 8", "--use_lora"),
        ("--lora_target_modules to_k", "--use_lora"),
        ("--pretrained_model_name_or_path a/b --use_lora --rank 0", "--rank is 0"),
        ("--pretrained_model_name_or_path a/b --use_lora --train_text_encoder yes", "--train_text_encoder away"),
        ("--pretrained_model_name_or_path a/b --denoiser ldm-4-text", "--denoiser has no effect"),
        ("--pretrained_model_name_or_path a/b --text_encoder c/d", "--text_encoder has no effect"),
        ("--pretrained_model_name_or_path a/b --pretrained_vae_model_name_or_path c/d", "own first stage"),
        ("--variant fp16", "--variant has no effect"),
        ("--cache_text_embeddings --train_text_encoder yes", "frozen text encoder"),
        ("--text_cache_dir x", "--cache_text_embeddings"),
        ("--train_text_encoder no --text_encoder_learning_rate 1e-5", "frozen text encoder"),
        ("--text_encoder_learning_rate 0", "positive"),
    ],
)
def test_flags_that_cannot_take_effect(argv, said):
    with pytest.raises(InputError, match=said):
        flags(*argv.split())
