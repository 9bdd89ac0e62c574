"""Training as users start it: the documented commands, resume, and what bad input is told."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import running
import torch
from running import ROOT, metrics
from safetensors.torch import load_file
from trainers import make_diffnext

from diffnext.data.records import RecordWriter
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.base import DecoderOutput
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel

CONFIGS = {"t2i": "nova_d48w1024_sdxl1024", "t2v": "nova_d48w1024_osp480"}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny NOVA pipelines and of latents of the sizes that these have."""
    root = tmp_path_factory.mktemp("nova")
    for kind in CONFIGS:
        make_diffnext(root / kind, kind)
    return {kind: root / kind for kind in CONFIGS}


@pytest.fixture(scope="session")
def pipelines(made: dict[str, Path]) -> dict[str, Path]:
    return {kind: folder / "model" for kind, folder in made.items()}


@pytest.fixture(scope="session")
def caches(made: dict[str, Path]) -> dict[str, Path]:
    return {kind: folder / "data" for kind, folder in made.items()}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch, clean_process: None) -> None:
    """Works in the repository root, as documented."""
    monkeypatch.chdir(ROOT)


def train(*words: object) -> None:
    running.train("diffnext", *words)


def launch(*words: str, config: str, processes: int = 1) -> str:
    """Runs `accelerate launch` with a launcher file of ours, and returns what it printed."""
    launcher = ["accelerate", "launch", "--config_file", f"accelerate_configs/{config}", "--num_processes", processes]
    more = ["--main_process_port", "0", "scripts/train.py", *words]
    return running.launch(*launcher, *more, environment={"DS_ACCELERATOR": "cpu"})


def words_of(kind: str, pipelines: dict[str, Path], caches: dict[str, Path], output_dir: Path) -> list[str]:
    """The documented command's words for a tiny folder."""
    return [
        f"config=./configs/{CONFIGS[kind]}.yaml",
        f"pipeline.paths.pretrained_path={pipelines[kind]}",
        f"experiment.output_dir={output_dir}",
        f"train_dataloader.params.dataset={caches[kind]}",
        "model.gradient_checkpointing=3",
        "training.batch_size=1",
        # Beside the guide's: the tiny network's own sizes, an end, and no tracker.
        "pipeline.paths.module_config.transformer="
        + json.dumps(json.loads((pipelines[kind] / "transformer" / "config.json").read_text())),
        "training.max_train_steps=4",
        "train_dataloader.params.num_workers=0",
        "experiment.log_every=1",
        "log.report_to=none",
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def test_the_documented_command_without_deepspeed_with_one_and_two_processes(
    pipelines: dict[str, Path], caches: dict[str, Path], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["training.mixed_precision=fp32", "ema.params.update_every=2"]
    accumulated = "training.gradient_accumulation_steps=2"
    launch(*words_of("t2v", pipelines, caches, one), *more, accumulated, config="ddp.yaml")
    launch(*words_of("t2v", pipelines, caches, two), *more, config="ddp.yaml", processes=2)
    losses = {"loss", "loss_t2i", "loss_i2i"}
    for ours, reference in zip(metrics(two), metrics(one), strict=True):
        assert losses <= set(reference)
        for name in losses | {"grad_norm", "lr"}:
            assert ours[name] == pytest.approx(reference[name], rel=1e-4), name
    assert {path.name for path in (one / "checkpoint-4").iterdir()} >= {"transformer", "transformer_ema"}
    exported, average = weights(one / "export" / "transformer"), weights(one / "checkpoint-4" / "transformer_ema")
    assert all(torch.equal(exported[key], average[key]) for key in average)
    NOVATransformer3DModel.from_pretrained(one / "export" / "transformer")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_command_again_continues_bit_for_bit(
    precision: str, pipelines: dict[str, Path], caches: dict[str, Path], tmp_path: Path
) -> None:
    words = words_of("t2v", pipelines, caches, tmp_path / "whole")
    words += [f"training.mixed_precision={precision}", "experiment.save_every=2", "ema.params.update_every=1"]
    words += ["lr_scheduler.target=diffnext.engine.lr_scheduler.CosineLR", "training.batch_size=2"]
    train(*words)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for name in ("checkpoint-4", "export"):
        shutil.rmtree(cut / name)
    train(*words, f"experiment.output_dir={cut}")
    assert metrics(cut) == metrics(tmp_path / "whole")
    for name in ("transformer", "transformer_ema"):
        ours, theirs = (weights(folder / "checkpoint-4" / name) for folder in (cut, tmp_path / "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    ours, theirs = (
        torch.load(d / "checkpoint-4" / "optimizer.bin", weights_only=True)["state"] for d in (cut, tmp_path / "whole")
    )
    assert all(torch.equal(ours[i][k], theirs[i][k]) for i in theirs for k in ("exp_avg", "exp_avg_sq"))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs the extra deepspeed")
@pytest.mark.parametrize(
    ("kind", "file", "processes"), [("t2i", "1_gpus_zero2.yaml", 1), ("t2v", "8_gpus_zero2.yaml", 2)]
)
def test_the_documented_commands_with_deepspeed(
    kind: str, file: str, processes: int, pipelines: dict[str, Path], caches: dict[str, Path], tmp_path: Path
) -> None:
    words = [*words_of(kind, pipelines, caches, tmp_path / "zero"), "experiment.save_every=2"]
    launch(*words, config=file, processes=processes)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "zero", cut)
    for name in ("checkpoint-4", "export"):
        shutil.rmtree(cut / name)
    launch(*words, f"experiment.output_dir={cut}", config=file, processes=processes)
    assert metrics(cut) == metrics(tmp_path / "zero")
    ours, theirs = (weights(folder / "checkpoint-4" / "transformer") for folder in (cut, tmp_path / "zero"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_documented_commands_with_fsdp2(
    kind: str, pipelines: dict[str, Path], caches: dict[str, Path], tmp_path: Path
) -> None:
    plain, sharded, cut = (tmp_path / name for name in ("plain", "sharded", "cut"))
    more = ["training.mixed_precision=fp32", "experiment.save_every=2", "ema.params.update_every=1"]
    if kind == "t2i":  # one prompt each, and a third one that the first process has alone
        more += ["validation.prompts=[a thing, thing 3, thing 4]", "validation.num_inference_steps=2"]
        more += ["validation.num_diffusion_steps=2"]
    launch(*words_of(kind, pipelines, caches, plain), *more, config="ddp.yaml", processes=2)
    launch(*words_of(kind, pipelines, caches, sharded), *more, config="fsdp2.yaml", processes=2)
    for ours, reference in zip(metrics(sharded), metrics(plain), strict=True):
        for name in reference.keys() - {"kind"}:
            assert ours[name] == pytest.approx(reference[name], rel=1e-4), name
    for name in ("checkpoint-4/transformer", "checkpoint-4/transformer_ema", "export/transformer"):
        ours, theirs = weights(sharded / name), weights(plain / name)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)
        assert (sharded / name / "config.json").read_text() == (plain / name / "config.json").read_text()
    shutil.copytree(sharded, cut)
    for name in ("checkpoint-4", "export"):
        shutil.rmtree(cut / name)
    launch(*words_of(kind, pipelines, caches, cut), *more, config="fsdp2.yaml", processes=2)
    assert metrics(cut) == metrics(sharded)
    ours, theirs = (weights(folder / "checkpoint-4" / "transformer") for folder in (cut, sharded))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_cached_texts_give_the_loss_of_encoded_ones(
    pipelines: dict[str, Path], caches: dict[str, Path], tmp_path: Path
) -> None:
    from diffnext.data.dataset import Records
    from diffnext.models.text_encoders.phi import text_rows
    from diffnext.pipelines import load_components

    parts = load_components(pipelines["t2i"], vae=False)
    embed, config = parts.transformer.text_embed, parts.transformer.config
    plain = Records([caches["t2i"]], latent_channels=4)
    folder = tmp_path / "embedded"
    folder.mkdir()
    text = {"data": "bytes", "shape": ["int64"]}
    with RecordWriter(str(folder), {"moments": "bytes", "caption": text, "text": text, "shape": ["int64"]}) as writer:
        for record in plain.sets[0]:
            encoded = {}
            for name in ("caption", "text"):
                rows = text_rows([record[name]], embed, parts.text_encoder, parts.tokenizer)[0]
                used = int((rows != embed.weight[: config.text_token_len]).any(1).sum())
                values = rows[:used].numpy().astype(np.float16)
                encoded[name] = {"data": values.tobytes(), "shape": list(values.shape)}
            writer.write({"shape": record["shape"], "moments": record["moments"], **encoded})
    words = words_of("t2i", pipelines, caches, tmp_path / "plain")
    train(*words, "training.mixed_precision=fp32")
    train(*words, "training.mixed_precision=fp32", f"experiment.output_dir={tmp_path / 'cached'}",
          f"train_dataloader.params.dataset={folder}")  # fmt: skip
    for ours, reference in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=2e-3)  # embeddings were rounded to float16


def test_validation_draws_the_prompts(pipelines: dict[str, Path], caches: dict[str, Path], tmp_path: Path) -> None:
    words = [*words_of("t2i", pipelines, caches, tmp_path / "run"), "training.max_train_steps=1"]
    words += ["validation.prompts=[a thing, thing 3]", "validation.num_inference_steps=2"]
    train(*words, "validation.num_diffusion_steps=2")
    pictures = sorted(path.name for path in (tmp_path / "run" / "validation" / "step-000001").iterdir())
    assert pictures == ["000-frames.png", "000.png", "001-frames.png", "001.png", "sheet.png"]


@pytest.mark.parametrize(("dtype", "of_vae"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_validation_computes_in_the_precision_of_the_run_and_goes_on_after_a_bad_result(
    dtype: torch.dtype, of_vae: torch.dtype, pipelines: dict[str, Path], caches: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    decode, features, seen = AutoencoderKL.decode, NOVATransformer3DModel.image_features, []

    def decode_badly_first(vae: AutoencoderKL, z: torch.Tensor) -> DecoderOutput:
        seen.append(("decode", torch.is_autocast_enabled("cpu"), z.dtype))
        output = decode(vae, z).sample
        return DecoderOutput(output * torch.nan if len(seen) == 2 else output)

    def recorded(model: NOVATransformer3DModel, *arguments: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and (not seen or seen[-1][0] == "decode"):
            seen.append(("features", torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return features(model, *arguments)

    monkeypatch.setattr(AutoencoderKL, "decode", decode_badly_first)
    monkeypatch.setattr(NOVATransformer3DModel, "image_features", recorded)
    monkeypatch.setattr("common.runtime.weight_dtype", lambda accelerator: dtype)
    words = [*words_of("t2i", pipelines, caches, tmp_path / "run"), "training.max_train_steps=1"]
    words += ["validation.prompts=[a thing, thing 3]", "validation.num_inference_steps=2"]
    train(*words, "validation.num_diffusion_steps=2", "training.mixed_precision=fp32")
    assert seen == 2 * [("features", True, dtype), ("decode", False, of_vae)]
    pictures = sorted(path.name for path in (tmp_path / "run" / "validation" / "step-000001").iterdir())
    assert pictures == ["001-frames.png", "001.png", "sheet.png"] and (tmp_path / "run" / "export").is_dir()
    assert "validation at step 1 leaves out 'a thing': the result is not finite: use bf16" in capsys.readouterr().err


def test_checkpoints_of_the_original_are_weights_to_begin_with(
    pipelines: dict[str, Path], caches: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of("t2i", pipelines, caches, tmp_path), "training.max_train_steps=1"]
    for step in (5, 10):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        shutil.copytree(pipelines["t2i"] / "transformer", folder / "transformer")
    chosen = f"pipeline.paths.module_dict.transformer={folder / 'transformer'}"
    for wanted in ("latest", str(folder), "checkpoints/checkpoint-10"):
        with pytest.raises(SystemExit):
            train(*words, f"experiment.resume_from_checkpoint={wanted}")
        assert (
            f"error: {folder} is of the original trainer: weights without optimizer and position. To begin with them, "
            f"at step 0, give {chosen} and experiment.resume_from_checkpoint=latest;" in capsys.readouterr().err
        )
    train(*words, chosen)
    assert "fresh start at step 0" in capsys.readouterr().err
    train(*words)  # there is a checkpoint of ours now
    assert "at step 1, the last one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("train_dataloader.params.dataset=/nowhere", "/nowhere"),
        ("pipeline.paths.pretrained_path=/nowhere", "/nowhere"),
        ("training.batch_size=17", "the batch is larger than the data"),
        ("model.gradient_checkpointing=4", "greatest value 3"),
        ("pipeline.target=diffnext.NoPipeline", "it must be t2i, t2v"),
        ("lr_scheduler.target=StepLR", "choose among ConstantLR"),
        ("training.max_train_stesp=3", "did you mean"),
        ("pipeline.paths.module_dict.vae=", "leaves out the vae, which says how latents are scaled: name its folder"),
        ("pipeline.paths.module_dict.tokenizer=", "leaves out the tokenizer, which encodes the texts of the data set"),
        (
            "validation.prompts=[a] pipeline.paths.module_dict.text_encoder=",
            "text_encoder, which encodes validation.pr",
        ),
        ("validation.prompts=[a] validation.max_latent_length=99", "99, but this model makes single images"),
    ],
)
def test_bad_input_is_refused_at_start(
    word: str, text: str, pipelines: dict[str, Path], caches: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        train(*words_of("t2i", pipelines, caches, tmp_path / "run"), *word.split())
    assert ended.value.code in (1, 2)
    assert text in capsys.readouterr().err
    assert not list(tmp_path.glob("run/checkpoint-*"))
