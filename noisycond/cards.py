"""Cards: what was trained, with which corruption and CEP, and how to load it; of datasets, their columns."""

import inspect
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import DatasetCard, ModelCard, ModelCardData

from noisycond.data.shard_names import redacted


# Stands in a card's example where nobody knows yet where the folder will be.
UNKNOWN_PLACE = "PATH_OR_ID_OF_THIS_FOLDER"


def loading_code(
    pipeline, location: str | Path, call: str = "num_inference_steps=50", condition: str | None = None
) -> str:
    """How to load a pipeline from a folder or Hub id with diffusers alone, and draw an image.

    Args:
        call: the arguments of the call beside the condition. condition: the argument that says of what; by default an
            example of what the pipeline takes.
    """
    in_diffusers = type(pipeline).__module__.startswith("diffusers.")
    trust = "" if in_diffusers else ", trust_remote_code=True"
    if condition is None:
        is_text = callable(pipeline) and "prompt" in inspect.signature(pipeline.__call__).parameters
        condition = 'prompt="a photo of a dog"' if is_text else "class_labels=[0]"
    return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{location}"{trust})
image = pipeline({condition}, {call}).images[0]
"""


def lora_loading_code(
    pipeline, base: str, load: str, condition: str | None, call: str = "num_inference_steps=50"
) -> str:
    """How to load LoRA weights onto the pipeline `base` that they were trained on, and draw an image; `load` is the
    code that loads them, see [`loading_code`]."""
    lines = loading_code(pipeline, base, call, condition).splitlines(keepends=True)
    return "".join([*lines[:-1], f"{load}\n", lines[-1]])


def model_card(
    title: str,
    settings: dict[str, object],
    class_names: Sequence[str],
    picture: str,
    *,
    pipeline,
    tags: Sequence[str] = (),
    repo_id: str | None = None,
    code: str | None = None,
) -> ModelCard:
    """A model card: what was trained, with which corruption and CEP, the sample grid, and how to load it.

    Args:
        settings: what the table lists, in order, a name and a value. picture: the grid's path inside the folder.
        pipeline: what the folder holds. tags: beside those that every card has. repo_id: where it is pushed to.
        code: how to load it; by default as [`loading_code`] says.
    """
    shown = ", ".join(class_names[:10]) + (", …" if len(class_names) > 10 else "")
    tags = ["class-conditional", *tags, f"diffusers:{type(pipeline).__name__}"]
    return _generator_card(
        _front_matter(tags, "unconditional-image-generation"),
        f"# {title}\n\nA class-conditional latent diffusion model",
        picture,
        code or loading_code(pipeline, repo_id or UNKNOWN_PLACE),
        f"{len(class_names)} classes: {shown}",
        settings,
    )


def text_to_image_card(pipeline, args, prompts: Sequence[str], result, code: str) -> ModelCard:
    """The card of a text-to-image run, or of the LoRA weights that it trained; see [`class_conditional_card`].

    Args:
        prompts: those of the sample grid, a row each. code: how to load it from where it is published.
    """
    base, lora = args.pretrained_model_name_or_path, args.use_lora
    settings = _settings(args, result, ("input_perturbation", "embedding_dropout", "snr_gamma"))
    settings |= {"text encoder": "trained along" if args.train_text_encoder else "frozen"}
    if lora:
        settings["LoRA"] = f"rank {args.rank}, alpha {args.lora_alpha or args.rank}"
    kind = "LoRA weights for a text-to-image model" if lora else "A text-to-image latent diffusion model"
    tags = ["text-to-image", *_features(args), f"diffusers:{type(pipeline).__name__}"] + ["lora"] * lora
    return _generator_card(
        _front_matter(tags, "text-to-image", None if base is None else public_name(base)),
        f"# {settings['denoiser']} on {settings['dataset']}\n\n{kind}",
        "samples/final.png",
        code,
        "The samples, row by row: " + "; ".join(prompts),
        settings,
    )


def first_stage_card(
    title: str, settings: dict[str, object], picture: str, *, model_class: str, repo_id: str | None = None
) -> ModelCard:
    """The card of an autoencoder; see [`model_card`]."""
    return ModelCard(
        f"""{_front_matter(["autoencoder", f"diffusers:{model_class}"])}
# {title}

An autoencoder trained with noisycond: the first stage of a latent diffusion model. The picture has images above their
reconstructions.

![reconstructions]({picture})

```py
from diffusers import {model_class}

first_stage = {model_class}.from_pretrained("{repo_id or UNKNOWN_PLACE}")
```

{_table(settings)}
"""
    )


def dataset_card(title: str, columns: dict[str, str], settings: dict[str, object], below: str = "") -> DatasetCard:
    """The card of a prepared dataset.

    Args:
        columns: what each column holds. settings: see [`model_card`]. below: what is said under the tables.
    """
    listed = "| column | what |\n| --- | --- |\n" + "".join(
        f"| `{name}` | {what} |\n" for name, what in columns.items()
    )
    return DatasetCard(
        f"""---
tags:
- noisycond
- controlnet
---
# {title}

Prepared with noisycond.

```py
from datasets import load_from_disk

dataset = load_from_disk("{UNKNOWN_PLACE}")
```

{listed}
{_table(settings)}

{below}
"""
    )


def class_conditional_card(pipeline, args, class_names: Sequence[str], result, repo_id: str | None) -> ModelCard:
    """The card of a run: recipe, data, model, corruption and CEP.

    Args:
        pipeline: what was exported. args: the resolved arguments. result: how training ended, with the counts of the
            corruption. repo_id: see [`model_card`].
    """
    baselines = ("input_perturbation", "embedding_dropout", "label_smoothing", "snr_gamma")
    settings = _settings(args, result, baselines)
    return model_card(
        f"{settings['denoiser']} on {settings['dataset']}",
        settings,
        class_names,
        "samples/final.png",
        pipeline=pipeline,
        tags=_features(args),
        repo_id=repo_id,
    )


def _settings(args, result, baselines: Sequence[str]) -> dict[str, object]:
    return {
        "recipe": public_name(args.recipe or "none"),
        "dataset": _dataset(args),
        "resolution": args.resolution,
        "denoiser": public_name(getattr(args, "pretrained_model_name_or_path", None) or args.denoiser),
        "first stage": public_name(args.pretrained_vae_model_name_or_path or "the pipeline's own"),
        "optimizer steps": result.step,
        **_corruption_and_perturbation(args, result),
        **{name.replace("_", " "): getattr(args, name) for name in baselines if getattr(args, name)},
        "prediction type": args.prediction_type,
        "condition dropout": args.conditioning_dropout_prob,
        "seed": args.seed,
    }


def distillation_card(
    pipeline, args, class_names: Sequence[str] | None, prompts: Sequence[str] | None, result, code: str
) -> ModelCard:
    """The card of a latent consistency model, or of LoRA weights that make its teacher one; arguments as for
    [`class_conditional_card`] or [`text_to_image_card`], of which one has names and the other prompts."""
    dataset, teacher = _dataset(args), public_name(args.pretrained_teacher_model)
    baselines = ("input_perturbation", "embedding_dropout", "label_smoothing", "conditioning_dropout_prob")
    settings = {
        "recipe": public_name(args.recipe or "none"),
        "teacher": teacher,
        "dataset": dataset,
        "resolution": args.resolution,
        "optimizer steps": result.step,
        **({"LoRA rank": args.rank} if args.use_lora else {}),
        "guidance scales of the teacher (w + 1)": f"{args.w_min + 1:g} to {args.w_max + 1:g}",
        "steps of the solver": args.num_ddim_timesteps,
        "loss": args.loss_type + (f", c = {args.huber_c}" if args.loss_type == "huber" else ""),
        **_corruption_and_perturbation(args, result),
        "condition that the teacher sees": args.teacher_condition,
        **{name.replace("_", " "): getattr(args, name) for name in baselines if getattr(args, name)},
        "seed": args.seed,
    }
    title, tags = f"{teacher}, distilled on {dataset}", ["latent-consistency-model", *_features(args)]
    tags += ["lora"] * args.use_lora
    if prompts is None:
        return model_card(title, settings, class_names, "samples/final.png", pipeline=pipeline, tags=tags, code=code)
    kind = (
        "LoRA weights that make a text-to-image model one of few steps" if args.use_lora else "A text-to-image model"
    )
    return _generator_card(
        _front_matter(["text-to-image", *tags, f"diffusers:{type(pipeline).__name__}"], "text-to-image", teacher),
        f"# {title}\n\n{kind} (latent consistency),",
        "samples/final.png",
        code,
        "The samples, row by row: " + "; ".join(prompts),
        settings,
    )


def personalization_card(pipeline, adapter, args, result, code: str) -> ModelCard:
    """The card of what controls a base, which is not in the folder: the card names it.

    Args:
        pipeline: the control pipeline. adapter: what was trained. code: how to load it from where it is published.
    """
    base, dataset = public_name(args.pretrained_model_name_or_path), _dataset(args)
    baselines = ("input_perturbation", "embedding_dropout", "label_smoothing", "snr_gamma")
    settings = {
        "recipe": public_name(args.recipe or "none"),
        "base": base,
        "dataset": dataset,
        "control": args.control_column,
        "resolution": args.resolution,
        "optimizer steps": result.step,
        **({"LoRA": f"rank {args.rank}, merged"} if getattr(args, "wants_lora", False) else {}),
        **_corruption_and_perturbation(args, result),
        **{name.replace("_", " "): getattr(args, name) for name in baselines if getattr(args, name)},
        "condition dropout": args.conditioning_dropout_prob,
        "seed": args.seed,
    }
    kind = type(adapter).__name__
    tags = ["controlnet" if "ControlNet" in kind else "t2i-adapter", "image-to-image", *_features(args)]
    tags += ["class-conditional" if "class_labels" in code else "text-to-image"]
    return _generator_card(
        _front_matter([*tags, f"diffusers:{type(pipeline).__name__}"], "image-to-image", base),
        f"# {kind} for {base}: {args.control_column} on {dataset}\n\n{kind} weights ({args.control_column} images)",
        "samples/final.png",
        code,
        "Each row: the control, the image that it was made from, and images drawn after it.",
        settings,
    )


def distilled_call(args) -> str:
    """The arguments, beside the condition, of a call of a distilled pipeline."""
    steps, scale = args.validation_inference_steps, args.validation_guidance_scale
    return f"num_inference_steps={steps}, guidance_scale={scale:g}"


def _dataset(args) -> str:
    return public_name(args.dataset_name or args.train_data_dir or redacted(args.train_shards))


def _corruption_and_perturbation(args, result) -> dict[str, str]:
    corruption, perturbation = "none", "off"
    if args.corruption_ratio:
        corruption = f"ratio {args.corruption_ratio}, {args.corruption_type}, {args.corruption_mode}"
    if args.cep_gamma:
        null = "" if args.cep_perturb_null else ", not on the null embedding"
        perturbation = f"γ = {args.cep_gamma}, {args.cep_type}, {args.cep_mode}{null}"
    return {
        "corruption": corruption,
        "realized corruption ratio": f"{result.totals['corruption']['realized_ratio']:.4f}",
        "CEP": perturbation,
    }


def _features(args) -> list[str]:
    features = {"condition-corruption": args.corruption_ratio, "condition-embedding-perturbation": args.cep_gamma}
    return [tag for tag, strength in features.items() if strength]


def public_name(name_or_path: str) -> str:
    """A name or Hub id as it is; of a path on this machine the last part, for a card is read elsewhere."""
    path = Path(name_or_path)
    is_path = path.is_absolute() or name_or_path.startswith((".", "~")) or path.exists()
    return path.resolve().name if is_path else name_or_path


def _generator_card(front_matter: str, kind: str, picture: str, code: str, below: str, settings: dict) -> ModelCard:
    return ModelCard(
        f"""{front_matter}
{kind} trained with noisycond, after *Slight Corruption in Pre-training Data Makes
Better Diffusion Models* ([arXiv:2405.20494](https://arxiv.org/abs/2405.20494)).

![samples]({picture})

```py
{code}```

{below}

{_table(settings)}
"""
    )


def _front_matter(tags: list[str], pipeline_tag: str | None = None, base_model: str | None = None) -> str:
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag=pipeline_tag,
        base_model=base_model,
        tags=["noisycond", *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _table(settings: dict[str, object]) -> str:
    return "| setting | value |\n| --- | --- |\n" + "\n".join(
        f"| {name} | {value} |" for name, value in settings.items()
    )
