"""The refiner's settings: every flag of the original is understood, and means what it meant."""

import pytest

from common.config import ConfigError
from gaussian_refiner.config import IGNORED, PARSER, RefinerConfig

REQUIRED = ("--pretrained_model_name_or_path", "checkpoint")
# The original's flags that have an effect: value given, where it must arrive.
EFFECTIVE = {
    "output_dir": ("out", "run.output_dir"),
    "revision": ("main", "model.revision"),
    "non_ema_revision": ("ema", "model.non_ema_revision"),
    "variant": ("fp16", "model.variant"),
    "cache_dir": ("hub", "model.cache_dir"),
    "train_batch_size": (3, "data.batch_size"),
    "gradient_accumulation_steps": (7, "optim.gradient_accumulation_steps"),
    "num_train_epochs": (2, "run.num_train_epochs"),
    "max_train_steps": (11, "run.max_train_steps"),
    "max_train_samples": (5, "data.max_train_samples"),
    "learning_rate": (3e-5, "optim.learning_rate"),
    "scale_lr": (True, "optim.scale_lr"),
    "lr_scheduler": ("cosine", "optim.lr_scheduler"),
    "lr_warmup_steps": (9, "optim.lr_warmup_steps"),
    "adam_beta1": (0.8, "optim.adam_beta1"),
    "adam_beta2": (0.95, "optim.adam_beta2"),
    "adam_weight_decay": (0.1, "optim.adam_weight_decay"),
    "adam_epsilon": (1e-6, "optim.adam_epsilon"),
    "max_grad_norm": (0.5, "optim.max_grad_norm"),
    "use_8bit_adam": (True, "optim.use_8bit_adam"),
    "use_ema": (True, "optim.use_ema"),
    "offload_ema": (True, "optim.offload_ema"),
    "allow_tf32": (True, "run.allow_tf32"),
    "mixed_precision": ("bf16", "run.mixed_precision"),
    "seed": (99, "run.seed"),
    "dataloader_num_workers": (2, "data.num_workers"),
    "random_flip": (True, "data.random_flip"),
    "input_perturbation": (0.1, "loss.input_perturbation"),
    "noise_offset": (0.2, "loss.noise_offset"),
    "prediction_type": ("epsilon", "loss.prediction_type"),
    "snr_gamma": (5.0, "loss.snr_gamma"),
    "use_classifier_free_guidance": (False, "loss.use_classifier_free_guidance"),
    "condition_dropout_prob": (0.01, "loss.condition_dropout_prob"),
    "checkpointing_steps": (50, "checkpoint.checkpointing_steps"),
    "checkpoints_total_limit": (3, "checkpoint.checkpoints_total_limit"),
    "resume_from_checkpoint": ("latest", "checkpoint.resume_from_checkpoint"),
    "validation_epochs": (4, "validation.validation_epochs"),
    "report_to": ("wandb", "log.report_to"),
    "logging_dir": ("tb", "log.logging_dir"),
    "tracker_project_name": ("project", "log.tracker_project_name"),
    "gradient_checkpointing": (True, "model.gradient_checkpointing"),
}
WITHOUT_EFFECT = {
    "conditioning_dropout_prob": "0.05",
    "validation_prompts": "a b",
    "enable_xformers_memory_efficient_attention": "",
    "foreach_ema": "",
    "dream_training": "",
    "dream_detail_preservation": "1.0",
    "resolution": "768",
    "center_crop": "",
    "train_data_dir": "data",
    "dataset_config_name": "x",
    "image_column": "image",
    "caption_column": "text",
    "push_to_hub": "",
    "hub_token": "hf_secret",
    "hub_model_id": "me/model",
    "local_rank": "-1",
    "pretrained_ip_adpater_path": "x",
}
DEFAULTS = {  # the original's
    "run.output_dir": "sd21-unclip-model-finetuned-together",
    "run.seed": 12345,
    "run.num_train_epochs": 100,
    "data.batch_size": 4,
    "data.num_workers": 0,
    "optim.gradient_accumulation_steps": 20,
    "optim.learning_rate": 1e-4,
    "optim.lr_scheduler": "constant",
    "optim.lr_warmup_steps": 500,
    "optim.adam_weight_decay": 1e-2,
    "optim.max_grad_norm": 1.0,
    "loss.condition_dropout_prob": 0.05,
    "loss.snr_gamma": None,
    "checkpoint.checkpointing_steps": 500,
    "checkpoint.checkpoints_total_limit": None,
    "validation.validation_epochs": 1,
    "log.report_to": "tensorboard",
    "log.logging_dir": "logs",
    "log.tracker_project_name": "text2image-fine-tune",
}


def at(config: RefinerConfig, path: str) -> object:
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def test_the_original_has_59_flags() -> None:
    assert len(EFFECTIVE) + len(WITHOUT_EFFECT) + 1 == 59  # and the required one
    assert set(WITHOUT_EFFECT) == set(IGNORED)


@pytest.mark.parametrize("flag", EFFECTIVE)
def test_flags_arrive(flag: str) -> None:
    value, path = EFFECTIVE[flag]
    words = [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    config, _ = PARSER.parse([*REQUIRED, *words])
    assert at(config, path) == value
    assert at(PARSER.parse(REQUIRED)[0], path) != value


@pytest.mark.parametrize("flag", WITHOUT_EFFECT)
def test_flags_without_effect_say_why(flag: str) -> None:
    config, warnings = PARSER.parse([*REQUIRED, f"--{flag}", *WITHOUT_EFFECT[flag].split(), "--seed", "3"])
    assert config.run.seed == 3
    assert [w for w in warnings if w.startswith(f"--{flag} has no effect: ")] == warnings != []
    assert "hf_secret" not in "".join(warnings)


def test_defaults_are_the_originals() -> None:
    config, warnings = PARSER.parse(REQUIRED)
    assert warnings == []
    for path, value in DEFAULTS.items():
        assert at(config, path) == value, path


def test_settings_that_another_one_makes_pointless_are_named() -> None:
    _, warnings = PARSER.parse([*REQUIRED, "--snr_mode", "pairwise", "--ema_decay", "0.9", "--guidance_scale", "2"])
    assert warnings == [
        "--snr_mode has no effect: snr_gamma is null",
        "--ema_decay has no effect: use_ema is False",
    ]
    flags = ["--guidance_scale", "2", "--strength", "0.5"]
    _, warnings = PARSER.parse([*REQUIRED, "--parity", *flags])
    assert warnings == [f"{flag} has no effect: parity is True, not False" for flag in flags[::2]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--height_px 100", "height_px 100 must be a multiple of 8 and at least 64"),
        ("--cache_latents folder", "cache_latents needs windows_per_item"),
        ("--cache_latents f --windows_per_item 2 --random_flip", "exclude each other"),
        ("--prediction_type sample", "'sample' is none of epsilon, v_prediction"),
        ("--snr_gamma 0", "0.0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        PARSER.parse([*REQUIRED, *flags.split()])
