"""Generation: order of tokens, guidance, schedules, and what a result does not depend on."""

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffnext.models.generation import (
    GenerationSettings,
    GeneratorDraws,
    SampleDraws,
    check_length,
    generate,
    num_tokens_per_set,
    sampler_steps,
    token_sets,
)
from diffnext.models.guidance import Guidance, to_uint8
from diffnext.models.text_encoders.phi import text_rows
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel

CONFIG = {
    "image_dim": 4,
    "image_size": [64, 96],
    "image_stride": 8,
    "text_token_dim": 8,
    "text_token_len": 4,
    "image_base_size": [4, 6],
    "video_base_size": [4, 2, 3],
    "video_mixer_rank": 3,
    "arch": [
        {"depth": 2, "embed_dim": 32, "num_heads": 1},
        {"depth": 2, "embed_dim": 32, "num_heads": 1},
        {"depth": 1, "embed_dim": 16},
    ],
}
FLOW_MATCHING = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
DDPM = diffusers.DDPMScheduler(clip_sample=False)


def make_model(**changes: object) -> NOVATransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NOVATransformer3DModel.from_config(CONFIG | changes).eval()
        for weight in model.parameters():
            if weight.ndim > 1:  # larger than usual, so that every input has a visible effect
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        return model


@pytest.fixture(scope="module")
def model() -> NOVATransformer3DModel:
    return make_model()


def rngs(*numbers: int) -> SampleDraws:
    return SampleDraws([np.random.default_rng(number) for number in numbers])


def run(
    model: NOVATransformer3DModel, numbers: tuple[int, ...] = (0,), scheduler=FLOW_MATCHING, given=(), **options
) -> Tensor:
    """Latents of the samples with these numbers, each with its own text."""
    guidance = Guidance(**options.pop("guidance", {"scale": 3.0}))
    settings = GenerationSettings(3, 2, options.pop("num_frames", 2), guidance, options.pop("flow_shift", None))
    texts = [torch.randn(2, 8, generator=torch.Generator().manual_seed(number)) for number in numbers]
    rows = (model.text_embed.pad(prompts) for prompts in (texts, [text[:0] for text in texts]))
    return generate(model, scheduler, *rows, rngs(*numbers), settings, given_frames=given, **options)


def test_few_tokens_come_first() -> None:
    assert num_tokens_per_set(48, 6) == [2, 4, 8, 10, 12, 12]
    assert num_tokens_per_set(4, 1) == [4]
    assert num_tokens_per_set(4, 64) == [1, 1, 1, 1]
    sets = token_sets(torch.tensor([[0.3, 0.1, 0.2]]), [1, 2])
    assert [(known.tolist(), ids.tolist()) for known, ids in sets] == [([[]], [[1]]), ([[1]], [[2, 0]])]


@pytest.mark.parametrize("scheduler", [FLOW_MATCHING, DDPM])
@pytest.mark.parametrize("rotary", [False, True])
def test_a_sample_does_not_depend_on_its_batch(scheduler, rotary: bool) -> None:
    model = make_model(rotary_pos_embed=True, arch=ROTARY_ARCH) if rotary else make_model()
    both = run(model, (5, 7), scheduler)
    assert both.shape == (2, 4, 2, 8, 12) and both.dtype == torch.float32
    for row, number in enumerate((5, 7)):
        torch.testing.assert_close(run(model, (number,), scheduler), both[row : row + 1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both[0], both[1], atol=0.1)


ROTARY_ARCH = [{"depth": 2, "embed_dim": 32, "num_heads": 1}] * 2 + [{"depth": 1, "embed_dim": 16}]


def test_frames_follow_from_text_and_earlier_frames(model: NOVATransformer3DModel) -> None:
    """Cached keys and values give what one pass over all frames gives, as in training."""
    latents = run(model, (1,), guidance={"scale": 1.0}, num_frames=3)
    text = model.text_embed.pad([torch.randn(2, 8, generator=torch.Generator().manual_seed(1))])
    with torch.no_grad():
        conditions = model.conditions(latents, model.prefix(text, flow=torch.tensor([5.0])))  # (T, Nv, D)
        caches, first = model.new_caches(), None
        bos = model.bos_frames(1, 6)
        for t in range(3):
            tokens = model.embed_frames(latents[:, :, t - 1 : t].transpose(1, 2)) if t else bos
            prefix = None if t else model.prefix(text, flow=torch.tensor([5.0]))
            features = model.encode_frames(tokens, prefix, (2, 3), 3, t, caches)
            first = features if first is None else first
            mixed = model.mix(first, features) if t else features
            torch.testing.assert_close(mixed[0, 0], conditions[t], rtol=1e-4, atol=1e-5)


def test_given_frames_are_copied(model: NOVATransformer3DModel) -> None:
    first = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    latents = run(model, (1, 2), given=[first])
    assert torch.equal(latents[:, :, 0], first.expand(2, -1, -1, -1))
    other = run(model, (1, 2), given=[first + 1])
    assert not torch.allclose(latents[:, :, 1], other[:, :, 1], atol=1e-2)


def test_a_truncation_above_all_times_is_no_guidance(model: NOVATransformer3DModel) -> None:
    plain = run(model, guidance={"scale": 1.0}, num_frames=1)
    torch.testing.assert_close(run(model, guidance={"scale": 4.0, "trunc": 1001.0}, num_frames=1), plain)
    assert not torch.allclose(run(model, guidance={"scale": 4.0}, num_frames=1), plain, atol=1e-2)


def test_image_guidance_of_zero_is_off(model: NOVATransformer3DModel) -> None:
    assert Guidance(scale=3.0, image_scale=0.0).num_branches == 2
    assert torch.equal(run(model, guidance={"scale": 3.0, "image_scale": 0.0}), run(model, guidance={"scale": 3.0}))
    assert not torch.allclose(run(model, guidance={"scale": 3.0, "image_scale": 2.0}), run(model), atol=1e-2)


def test_motion_counts(model: NOVATransformer3DModel) -> None:
    assert not torch.allclose(run(model, motion_flow=1.0), run(model, motion_flow=9.0), atol=1e-3)
    assert torch.equal(run(model, motion_flow=5.0), run(model, motion_flow=[5.0]))


def test_steps_are_counted(model: NOVATransformer3DModel) -> None:
    ticks: list[int] = []
    run(model, on_step=lambda: ticks.append(1))
    assert len(ticks) == 2 * len(num_tokens_per_set(24, 3))


def test_the_scheduler_stays_as_it_is() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    before = scheduler.timesteps.clone()
    shifted = [step.timestep for step in sampler_steps(scheduler, 3, flow_shift=3.0)]
    assert torch.equal(scheduler.timesteps, before) and scheduler.shift == 1.0
    assert shifted[1] > sampler_steps(scheduler, 3)[1].timestep


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_steps_are_those_of_diffusers(
    prediction_type: str, variance_type: str, spacing: str, clip: bool
) -> None:
    scheduler = diffusers.DDPMScheduler(
        prediction_type=prediction_type, variance_type=variance_type, timestep_spacing=spacing, clip_sample=clip
    )
    scheduler.set_timesteps(5)
    x = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    steps = sampler_steps(scheduler, 5)
    assert [step.timestep for step in steps] == scheduler.timesteps.tolist()
    for step in steps:
        generator = torch.Generator().manual_seed(int(step.timestep))
        pred = torch.sin(3 * x)
        expected = scheduler.step(pred, int(step.timestep), x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(step.timestep)))
        x = step(x, pred, noise if step.draws_noise else None)
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "flow_shift", "message"),
    [
        (DDPM, 2.0, "flow_shift=2.0 has no meaning for DDPMScheduler: leave it out"),
        (diffusers.DDIMScheduler(), None, "the scheduler is DDIMScheduler; use FlowMatchEulerDiscreteScheduler or"),
        (diffusers.DDPMScheduler(thresholding=True), None, "thresholding is not supported for latents"),
        (diffusers.DDPMScheduler(variance_type="learned"), None, "variance_type 'learned' is not supported: use one"),
        (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), None, "stochastic_sampling is not"),
    ],
)
def test_what_no_scheduler_can(scheduler, flow_shift: float | None, message: str) -> None:
    with pytest.raises(ValueError) as error:
        sampler_steps(scheduler, 3, flow_shift)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatiotemporal_scale": 1.0}, "spatiotemporal_guidance_scale is 1.0, but must be 0: it compares with a"),
        ({"renorm": 1.5}, "guidance_renorm is 1.5, but must be 0 ... 1"),
        ({"image_scale": -1.0}, "image_guidance_scale is -1.0, but must be 0 (off) or more"),
        (
            {"scale": 1.0, "image_scale": 2.0},
            "image_guidance_scale 2.0 needs a guidance_scale above 1, but that is 1.0",
        ),
    ],
)
def test_guidance_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Guidance(**options)
    assert message in str(error.value)


def test_numbers_of_steps_are_checked() -> None:
    with pytest.raises(ValueError, match="num_diffusion_steps is 0, but must be at least 1"):
        GenerationSettings(num_diffusion_steps=0)


def test_more_frames_than_the_model_has_can_be_made_and_are_refused_by_the_check(model: NOVATransformer3DModel) -> None:
    assert run(model, num_frames=5).shape[2] == 5
    with pytest.raises(ValueError, match="max_latent_length is 5, but this model makes videos of at most 4 latent"):
        check_length(model, 5)
    with pytest.raises(ValueError, match="but this model makes single images"):
        check_length(make_model(video_base_size=[1, 2, 3], video_mixer_rank=None), 2)


def test_pixels_are_cut_off_not_rounded() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_draws_of_a_generator_follow_from_its_seed() -> None:
    first, second = (GeneratorDraws(2, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first.normal((3,)), second.normal((3,)))
    assert first.uniform((5, 1)).shape == (2, 5, 1)


class Encoder(torch.nn.Module):
    """Repeats the ids; counts the texts that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[int] = []

    def forward(self, ids: Tensor):
        self.seen.append(len(ids))
        return type("Output", (), {"last_hidden_state": ids[..., None].float().expand(-1, -1, 8)})


def tokenize(texts: list[str], max_length: int, truncation: bool):
    return type("Output", (), {"input_ids": [[ord(letter) for letter in text][:max_length] for text in texts]})


def test_equal_prompts_are_encoded_once_and_empty_ones_not_at_all(model: NOVATransformer3DModel) -> None:
    encoder = Encoder()
    prompts = ["ab", "", "ab", "abcdef", torch.full((1, 8), 7.0), "c"]
    rows = text_rows(prompts, model.text_embed, encoder, tokenize, [False] * 5 + [True])
    assert encoder.seen == [2]
    null = model.text_embed.weight[:4]
    assert rows.shape == (6, 4, 8)
    assert rows[0, :, 0].tolist() == [97, 98, *null[2:, 0].tolist()] and torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], null) and torch.equal(rows[5], null)
    assert rows[3, :, 0].tolist() == [97, 98, 99, 100]
    assert rows[4, 0].tolist() == [7.0] * 8 and torch.equal(rows[4, 1:], null[1:])
    text_rows(["", ""], model.text_embed)


def test_text_needs_an_encoder(model: NOVATransformer3DModel) -> None:
    with pytest.raises(ValueError, match="the prompt 'fox' needs a text encoder and a tokenizer, which are not loaded"):
        text_rows(["fox"], model.text_embed)
    with pytest.raises(ValueError, match=r"embedding of shape \(5, 8\); this model takes at most \(4, 8\)"):
        text_rows([torch.zeros(5, 8)], model.text_embed)
