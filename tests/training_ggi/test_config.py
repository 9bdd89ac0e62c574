"""Settings: the shipped YAML file, the original's spellings, and what they mean here."""

from pathlib import Path

import pytest
import yaml

from common.config import ConfigError
from training_ggi.config import IGNORED, PARSER, resolved

SHIPPED = Path(__file__).parents[2] / "configs" / "T073-000.yaml"
# Every key of the original's file, with its value there.
ORIGINAL = """
pretrained_model_name_or_path: THUDM/CogVideoX-5B-I2V
revision: null
variant: null
cache_dir: null
height: 480
width: 720
max_num_frames: 49
video_reshape_mode: random
data_root: datasets
dataset_file: seeds.txt
prompt_file: prompts.json
frame_intervals: [1]
video_column: video
caption_column: text
id_token: null
load_tensors: false
random_flip: null
fps: 8
skip_frames_start: 0
skip_frames_end: 0
dataloader_num_workers: 0
pin_memory: true
seed: null
train_batch_size: 1
gradient_accumulation_steps: 4
num_train_epochs: 1
max_train_steps: 10000
learning_rate: 5.0e-5
scale_lr: false
lr_scheduler: cosine_with_restarts
lr_warmup_steps: 800
lr_num_cycles: 1
lr_power: 1.0
optimizer: adamw
beta1: 0.9
beta2: 0.95
beta3: null
weight_decay: 1.0e-4
epsilon: 1.0e-8
max_grad_norm: 1.0
use_8bit: false
use_4bit: false
use_torchao: false
use_cpu_offload_optimizer: false
offload_gradients: false
prodigy_decouple: false
prodigy_use_bias_correction: false
prodigy_safeguard_warmup: false
rank: 64
lora_alpha: 64
mixed_precision: bf16
gradient_checkpointing: true
enable_slicing: true
enable_tiling: true
noised_image_dropout: 0.05
ignore_learned_positional_embeddings: false
output_dir: tmp
logging_dir: logs
tracker_name: null
report_to: tensorboard
checkpointing_steps: 150
checkpoints_total_limit: 2
resume_from_checkpoint: latest
validation_prompt: null
validation_images: null
validation_prompt_separator: ':::'
validation_epochs: null
validation_steps: null
num_validation_videos: 1
guidance_scale: 6
use_dynamic_cfg: false
enable_model_cpu_offload: false
push_to_hub: false
hub_model_id: null
hub_token: null
allow_tf32: true
nccl_timeout: 1800
"""


def test_the_shipped_file_is_read_without_complaint() -> None:
    config, warnings = PARSER.parse(["--config", str(SHIPPED)])
    assert warnings == []
    assert config == PARSER.parse([])[0]  # it is what is read where none is named
    assert (config.data.num_frames, config.data.max_num_frames) == (46, 49)
    assert (config.data.height, config.data.width) == (480, 720)
    assert (config.model.train_mode, config.run.output_dir, config.data.data_root) == ("lora", "log", "datasets")


def test_the_original_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "T073-000.yaml"
    path.write_text(ORIGINAL)
    config, warnings = PARSER.parse(["--config", str(path)])
    # Of what has no effect, that is said which is not null or false.
    values = yaml.safe_load(ORIGINAL)
    expected = [key for key in values if key in IGNORED and values[key] is not None and values[key] is not False]
    assert [warning.split(" has no effect")[0] for warning in warnings] == [*expected, "num_train_epochs"]
    filled = resolved(config)
    assert filled == config  # the parser has done it
    assert (filled.run.seed, filled.log.tracker_project_name) == (42, "cogvideox-sft")
    assert filled.validation.validation_epochs == 1  # null in the file
    assert (filled.run.output_dir, filled.data.batch_size, filled.optim.gradient_accumulation_steps) == ("tmp", 1, 4)
    assert (filled.optim.adam_beta1, filled.optim.adam_beta2, filled.optim.adam_weight_decay) == (0.9, 0.95, 1e-4)
    assert (filled.optim.adam_epsilon, filled.run.process_group_timeout_s) == (1e-8, 1800)
    assert (filled.validation.max_validation_items, filled.validation.guidance_scale) == (1, 6.0)


def test_no_seed_is_the_default_one() -> None:
    config, warnings = PARSER.parse(["--seed", "null"])
    assert config.run.seed == 42 and warnings == []
    assert PARSER.parse(["--seed", "0"])[0].run.seed == 0


@pytest.mark.parametrize("name", ["batch_size", "train_batch_size", "data.batch_size"])
def test_names_of_the_batch_size(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"{name}: 3\n")
    for words in (["--config", str(tmp_path / "run.yaml")], [f"--{name}", "3"]):
        config, warnings = PARSER.parse(words)
        assert config.data.batch_size == 3 and warnings == []


@pytest.mark.parametrize("name", ["gradient_accumulation", "gradient_accumulation_steps"])
def test_names_of_the_accumulation(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"{name}: 7\n")
    for words in (["--config", str(tmp_path / "run.yaml")], [f"--{name}", "7"]):
        config, warnings = PARSER.parse(words)
        assert config.optim.gradient_accumulation_steps == 7 and warnings == []


def test_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        PARSER.parse(["--max_num_frames", "48", "--ranks", "8", "--learning_rate", "fast", "--cond", "canny"])
    text = str(error.value)
    assert "max_num_frames 48 must be 4k + 1, e.g. 49" in text and "did you mean rank" in text
    assert "fast" in text and "canny" in text


@pytest.mark.parametrize("name", ["use_4bit", "use_torchao", "use_cpu_offload_optimizer", "offload_gradients"])
def test_optimizers_that_are_not_offered_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: not offered; to save memory, use_8bit_adam keeps the optimizer in"):
        PARSER.parse([f"--{name}", "true"])
    assert PARSER.parse([f"--{name}", "false"])[1] == []


def test_adam_has_no_8_bits() -> None:
    assert PARSER.parse(["--optimizer", "adam"])[0].optim.optimizer == "adam"
    with pytest.raises(ConfigError, match="use_8bit_adam is AdamW: leave it out, or set optimizer to adamw"):
        PARSER.parse(["--optimizer", "adam", "--use_8bit", "true"])


@pytest.mark.parametrize("intervals", ["[]", "[0]"])
def test_intervals_are_steps(intervals: str) -> None:
    with pytest.raises(ConfigError, match="frame_intervals .* must be whole numbers from 1"):
        PARSER.parse(["--frame_intervals", intervals])
