"""Which parameters are trained, and which of them decay."""

from typing import Any, Literal

from torch import nn

# As the released models were trained. Image training never sees a previous frame, so it leaves alone what reads these.
FROZEN_MODULES = {
    "t2i": ("text_embed.norm", "label_embed.norm", "motion_embed", "video_pos_embed", "video_encoder.patch_embed"),
    "t2v": ("text_embed.norm", "label_embed.norm", "motion_embed"),
}


def frozen_parameters(model: nn.Module, pipeline: Literal["t2i", "t2v"]) -> list[str]:
    """Names of the parameters that text-to-image or text-to-video training leaves as they are."""
    prefixes = tuple(f"{name}." for name in FROZEN_MODULES[pipeline])
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def freeze(model: nn.Module, pipeline: Literal["t2i", "t2v"]) -> None:
    """Leaves the gradients to what `pipeline` trains."""
    for name in frozen_parameters(model, pipeline):
        model.get_parameter(name).requires_grad_(False)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters as an optimizer takes them: those of normalizations have no weight decay.

    Parameters with an attribute `lr_scale` or `no_weight_decay` are grouped by these too. Groups come in the order of
    their first parameter and carry `lr_scale` and `weight_decay` only where these differ from the optimizer's.
    """
    norms = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm)
    undecayed = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    groups: dict[tuple[Any, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        lr_scale = getattr(parameter, "lr_scale", None)
        decays = id(parameter) not in undecayed and not getattr(parameter, "no_weight_decay", False)
        options = {} if lr_scale is None else {"lr_scale": lr_scale}
        options |= {} if decays else {"weight_decay": 0.0}
        groups.setdefault((lr_scale, decays), {**options, "params": []})["params"].append(parameter)
    return list(groups.values())
