"""Text encoder, guidance and generation of NOVA against the recorded vectors."""

import re
from types import SimpleNamespace

import diffusers
import torch
import vectors as golden
from torch import Tensor
from vectors import Vectors

from diffnext.models.embeddings import TextEmbed
from diffnext.models.generation import (
    GenerationSettings,
    generate,
    num_tokens_per_set,
    sampler_steps,
    token_sets,
)
from diffnext.models.guidance import Guidance, to_uint8
from diffnext.models.masking import MaskEmbed
from diffnext.models.text_encoders.phi import PhiEncoderModel, text_rows
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel

TRAINER = "diffnext"


# Text -----------------------------------------------------------------------------------------------------------------


def toy_tokenizer(vocab_size: int):
    def tokenize(texts: list[str], max_length: int, truncation: bool) -> SimpleNamespace:
        assert truncation
        return SimpleNamespace(input_ids=[[1 + ord(c) % (vocab_size - 2) for c in t][:max_length] for t in texts])

    return tokenize


@golden.by_file(TRAINER, "phi_text_encoder*.safetensors")
@torch.no_grad()
def test_phi(vectors: Vectors) -> None:
    config, sizes = vectors.config["phi"], vectors.config["text_embed"]
    phi = PhiEncoderModel(PhiEncoderModel.config_class(**config))
    golden.filled(phi, vectors.header)
    vectors.check("last_hidden_state", phi(vectors["input_ids"]).last_hidden_state)

    embed = TextEmbed(sizes["token_dim"], sizes["embed_dim"], sizes["num_tokens"])
    golden.filled(embed, sizes)
    tokenizer = toy_tokenizer(config["vocab_size"])
    prompts = vectors.config["prompts"]
    rows = text_rows(prompts, embed, phi, tokenizer)
    vectors.check("encode_prompts", rows)
    vectors.check("text_embed", embed(rows))
    draws = vectors["encode_prompts_train_draws"]
    repeated = prompts * (len(draws) // len(prompts))
    dropped = (draws < float(re.search(r"draw < ([\d.]+)", vectors.config["train_prompts"])[1])).tolist()
    vectors.check("encode_prompts_train", text_rows(repeated, embed, phi, tokenizer, dropped))


# Guidance -------------------------------------------------------------------------------------------------------------


@golden.by_case(TRAINER, "guidance*.safetensors", r"(\d+)\.scaled")
def test_guidance(vectors: Vectors, case: str) -> None:
    recorded = vectors.config[int(case)]
    options = {name.replace("guidance_", ""): value for name, value in recorded["kwargs"].items()}
    perturbed_scale = options.pop("spatiotemporal_scale", 0)
    guidance = Guidance(**options)
    pred, text = vectors[f"{case}.pred"], vectors[f"{case}.text"]
    cond, *others = pred.chunk(recorded["passes"])
    if perturbed_scale:
        # Refused, because the network has nothing to perturb: the third branch, here other numbers, would be the first.
        perturbed = others.pop()
        vectors.check(
            f"{case}.scaled",
            guidance.combine(torch.cat([cond, *others]), 0.0) + perturbed_scale * (cond - perturbed),
        )
        return
    assert guidance.num_branches == recorded["passes"]
    vectors.check(f"{case}.scaled", guidance.combine(pred, 0.0))
    vectors.check(f"{case}.expand", guidance.expand(vectors[f"{case}.x"]))
    vectors.check(f"{case}.expand_padded", guidance.expand_frames(vectors[f"{case}.x"], vectors[f"{case}.padding"]))
    text, negative_text = text.chunk(2) if recorded["passes"] > 1 else (text, text)
    vectors.check(f"{case}.expand_text", guidance.expand_text(text, negative_text))
    # Without a minimum, which only the class-conditional pipeline had, the scale stays what it is.
    assert set(recorded["decayed_scales"]) == {guidance.scale}


@golden.by_file(TRAINER, "guidance*.safetensors")
def test_pixels(vectors: Vectors) -> None:
    for name in ("img", "vid"):
        assert torch.equal(to_uint8(vectors[name]), vectors[f"{name}_u8"])


# Order and schedules --------------------------------------------------------------------------------------------------


@golden.by_file(TRAINER, "masking*.safetensors")
@torch.no_grad()
def test_token_sets(vectors: Vectors) -> None:
    config = vectors.config["gen"]
    counts = num_tokens_per_set(config["num_patches"], config["steps"])
    assert counts == [count for count in config["num_preds"] if count]
    embed = load_mask_embed(vectors)
    x, uniform = vectors["gen.x"], vectors["gen.u"][..., 0]
    assert torch.equal(uniform.argsort(dim=1), vectors["gen.order"][..., 0])
    for number, (known, predicted) in enumerate(token_sets(uniform, counts)):
        assert torch.equal(predicted, vectors[f"gen.{number}.pred_ids"][..., 0])
        mask = torch.zeros(x.shape[:2]).scatter(1, predicted, 1.0)[..., None]
        assert torch.equal(mask, vectors[f"gen.{number}.pred_mask"])
        vectors.check(f"gen.{number}.embed", embed(x, torch.cat([known, predicted], dim=1)))
    for name, recorded in vectors.config["num_preds_schedules"].items():
        assert num_tokens_per_set(*map(int, name.split("/"))) == [count for count in recorded if count], name


def load_mask_embed(vectors: Vectors) -> MaskEmbed:
    config = vectors.config["train"]
    return golden.filled(MaskEmbed(vectors["gen.x"].shape[-1]), config)


@golden.by_case(TRAINER, "schedulers*.safetensors", r"([^.]+(?:\.\d+)?)\.step\.x0")
def test_sampler_steps(vectors: Vectors, case: str) -> None:
    is_flow = case.startswith("fm")
    cls = diffusers.FlowMatchEulerDiscreteScheduler if is_flow else diffusers.DDPMScheduler
    scheduler = cls(**vectors.config[case], **({} if is_flow else {"clip_sample": False}))
    num_steps = sum(name.endswith(".out") for name in vectors.under(f"{case}.step."))
    x = vectors[f"{case}.step.x0"]
    for number, step in enumerate(sampler_steps(scheduler, num_steps)):
        noise = vectors[f"{case}.step.{number}.noise"] if step.draws_noise else None
        x = step(x, vectors[f"{case}.step.{number}.model_output"], noise)
        vectors.check(f"{case}.step.{number}.out", x)


# Generation -----------------------------------------------------------------------------------------------------------


class Recorded:
    """The draws of a file in their order, without those of some frames; all must be used."""

    def __init__(self, vectors: Vectors, num_frames: int, skip_frames: int) -> None:
        order, *rest = [(kind, vectors[f"draw.{number}"]) for number, kind, _ in vectors.header["draws_order"]]
        self.left = [order, *rest[len(rest) // num_frames * skip_frames :]]

    def _next(self, shape: tuple[int, ...], kinds: tuple[str, ...]) -> Tensor:
        kind, draw = self.left.pop(0)
        assert any(each in kind for each in kinds) and draw.shape[1:] == torch.Size(shape), kind
        return draw

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return self._next(shape, ("uniform",))

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return self._next(shape, ("normal", "randn"))


def nova_of(vectors: Vectors) -> NOVATransformer3DModel:
    config = dict(vectors.config["transformer"])
    config["arch"] = [vectors.config["arch_defs"].get(name, name) for name in config["arch"]]
    model = NOVATransformer3DModel.from_config(config)
    return golden.filled(model, vectors.header)


@golden.by_file(TRAINER, "gen_*.safetensors")
def test_generation(vectors: Vectors) -> None:
    """Each frame from the recorded ones before it: a frame's last bits are magnified a hundredfold in the next one."""
    model, call = nova_of(vectors), dict(vectors.config["call"])
    scheduler_options = {k: v for k, v in vectors.config["scheduler"].items() if not k.startswith("_")}
    scheduler = getattr(diffusers, vectors.config["scheduler_class"])(**scheduler_options)
    call.pop("spatiotemporal_guidance_scale", None)  # without effect on the numbers
    guidance = {name.replace("guidance_", ""): call.pop(name) for name in list(call) if "guidance" in name}
    motion_flow = call.pop("motion_flow", 5)
    settings = GenerationSettings(**call, guidance=Guidance(**guidance))
    prompts = [value for _, value in sorted(vectors.under("in.prompt_embeds.").items(), key=lambda item: int(item[0]))]
    text = model.text_embed.pad(prompts)
    null = model.text_embed.pad([prompt[:0] for prompt in prompts])
    num_given = vectors.config["num_latents_given"]
    given = [vectors[f"in.latents.{number}"] for number in range(num_given)]
    recorded = vectors["out.latents"]
    for frame in range(num_given, settings.max_latent_length):
        draws = Recorded(vectors, num_frames=settings.max_latent_length - num_given, skip_frames=frame - num_given)
        before = given + list(recorded.unbind(2))[num_given:frame]
        latents = generate(model, scheduler, text, null, draws, settings, motion_flow, before)
        assert latents.shape == recorded.shape and not draws.left
        for name in vectors.under("out."):
            vectors.check(f"out.{name}", latents[:, :, frame], expected=vectors[f"out.{name}"][:, :, frame])
    for frame in range(num_given):
        vectors.check("out.latents", latents[:, :, frame], expected=vectors["out.latents"][:, :, frame])
