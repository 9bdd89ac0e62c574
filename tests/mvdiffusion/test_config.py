"""Settings: presets, the shipped YAML files, the original's and its parent's spellings."""

from pathlib import Path

import pytest

from common.config import ConfigError
from mvdiffusion.config import PARSER, PROFILES, resolved

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "training_config").iterdir())
NEEDED = ["--pretrained_model_name_or_path", "somewhere", "--train_data_dir", "elsewhere"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_read_without_complaint(path: Path) -> None:
    config, warnings = PARSER.parse(["--config_path", str(path), *NEEDED])
    assert warnings == []
    assert resolved(config).loss.timestep_sharing == ("row" if path.stem == "gnn3d" else "domain_object")


def test_the_default_file_is_the_documented_one() -> None:
    assert {path.name for path in SHIPPED} == {"train_config.yml", "stage1.yaml", "stage2.yaml", "gnn3d.yaml"}
    by_default, by_name = PARSER.parse(NEEDED)[0], PARSER.parse([*NEEDED, "--config", "configs/train_config.yml"])[0]
    assert by_default == by_name and by_default.data.num_views == 6


def test_stages() -> None:
    stage1, stage2 = (PARSER.parse(["--config", f"configs/training_config/stage{n}.yaml", *NEEDED])[0] for n in (1, 2))
    assert (stage1.loss.pred_type, stage2.loss.pred_type) == ("mix", "joint")
    assert (stage1.model.trainable_modules, stage2.model.trainable_modules) == (None, ("joint_mid",))
    assert (stage1.optim.learning_rate, stage2.optim.learning_rate) == (1e-4, 5e-5)
    assert stage1.validation.eta == 1.0 and stage1.optim.camera_embedding_lr_mult == 10


@pytest.mark.parametrize("preset", PROFILES)
def test_a_preset_fills_in_what_is_not_given(preset: str) -> None:
    config, _ = PARSER.parse([*NEEDED, "--preset", preset, "--timestep_sharing", "object", "--cfg_order", "domain"])
    filled = resolved(config)
    assert filled.loss.timestep_sharing == "object" and filled.validation.cfg_order == "domain"
    for path, value in PROFILES[preset].items():
        section, name = path.split(".")
        if name not in ("timestep_sharing", "cfg_order"):
            assert getattr(getattr(filled, section), name) == value


def test_what_has_no_effect_is_said() -> None:
    flags = "--enable_xformers_memory_efficient_attention --center_crop yes --push_to_hub no --hub_token null"
    _, warnings = PARSER.parse([*NEEDED, *flags.split()])
    assert [warning.split(" has no effect")[0] for warning in warnings] == [
        "--enable_xformers_memory_efficient_attention",
        "--center_crop",
        "--push_to_hub",
        "--hub_token",
    ]


def test_the_parents_nested_keys(tmp_path: Path) -> None:
    path = tmp_path / "parent.yaml"
    path.write_text(
        "train_dataset: {root_dir: data, object_list: a.json, invalid_list: b.json, num_views: 4, groups_num: 1,\n"
        "  bg_color: white, img_wh: [256, 256], validation: false, num_validation_samples: 3, read_normal: true,\n"
        "  read_color: true, mix_color_normal: true, read_mask: false}\n"
        "trainable_modules: null\n"
        "validation_dataset: {root_dir: data, bg_color: white}\n"
        "pretrained_model_name_or_path: lambdalabs/sd-image-variations-diffusers\nlast_global_step: 5000\n"
        "unet_from_pretrained_kwargs: {cd_attention_mid: true, num_views: 4, sample_size: 32, in_channels: 8}\n"
        "pipe_kwargs: {camera_embedding_type: e_de_da_sincos, num_views: 4}\n"
    )
    config, warnings = PARSER.parse(["--config", str(path)])
    assert (config.data.train_data_dir, config.data.num_views, config.data.bg_color) == ("data", 4, "white")
    assert (config.data.num_validation_samples, config.model.cd_attention_mid) == (3, True)
    assert config.data.read_mask is False
    assert config.model.trainable_modules is None
    assert "train_dataset.img_wh has no effect: `resolution` sets the size" in warnings


def test_dropping_too_much_is_refused_wherever_there_are_three_ways() -> None:
    PARSER.parse([*NEEDED, "--preset", "gnn3d", "--p_uncond", "0.5"])
    with pytest.raises(ConfigError, match="condition_drop_rate 0.5 is above 1/3"):
        PARSER.parse([*NEEDED, "--preset", "gnn3d", "--p_uncond", "0.5", "--drop_type", "drop_joint"])


def test_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        PARSER.parse(["--resolution", "100", "--num_view", "6", "--learning_rate", "fast"])
    text = str(error.value)
    assert "resolution 100 must be a multiple of 8" in text and "did you mean num_views" in text and "fast" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--bg_color pink", "the background is 'pink', but must be one of 'white', 'black', 'gray', 'three_choices',"),
        ("--bg_color 1.5", "the background is 1.5, but must be one of .* or a grey level in [0, 1]"),
        ("--bg_color random --cache_latents cache", "a continuum of colours, so its variants cannot be listed"),
        ("--num_views 7", "num_views is 7, which has no list of its own (only 1, 2, 3, 4, 5, 6, 8 have): set views"),
        ("--num_views 2 --views front,behind", "'behind' in views has no upright pose"),
        ("--num_views 2 --views left,right", "the condition view 'front' is not among the views left, right"),
    ],
)
def test_views_and_backgrounds_that_cannot_be_are_told_before_anything_is_loaded(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PARSER.parse([*NEEDED, *flags.split()])
    (problem,) = error.value.problems
    assert all(part in problem for part in message.split(" .* "))
    PARSER.parse([*NEEDED, *"--bg_color 0.3 --num_views 2 --views left,front --cache_latents cache".split()])
