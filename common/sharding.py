"""FSDP2: a network's parameters, gradients and optimizer state, spread over the processes.

`torch.distributed.fsdp.fully_shard` changes the network in place, by the settings of `accelerate launch`. What is saved
is whole and just as without sharding, so a run may go on with another number of processes, or without FSDP.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

logger = logging.getLogger(__name__)

WRAP_POLICIES = ("NO_WRAP", "TRANSFORMER_BASED_WRAP")


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharding:
    """What `accelerate launch` was told of FSDP.

    Attributes:
        wraps: whether blocks are gathered one at a time, and not the whole network at once.
        block_classes: names of their classes; none means those that the network names in `_no_split_modules`.
        reshard_after_forward: whether a block is gathered anew for the backward pass, which saves memory.
    """

    wraps: bool
    block_classes: tuple[str, ...]
    reshard_after_forward: bool


def sharding_of_launcher() -> Sharding | None:
    """The launcher's settings, in the environment; None without FSDP.

    Raises:
        ValueError: they ask for what does not work here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    asked = {name[5:].lower(): value for name, value in os.environ.items() if name.startswith("FSDP_")}
    policy = asked.get("auto_wrap_policy", "NO_WRAP").upper()
    problems = []
    if asked.get("version", "1") != "2":
        problems.append("fsdp_version must be 2: FSDP1 flattens parameters, which checkpoints here keep by name")
    if policy not in WRAP_POLICIES:
        problems.append(f"fsdp_auto_wrap_policy {policy} must be one of {', '.join(WRAP_POLICIES)}")
    if asked.get("offload_params") == "true":
        problems.append("fsdp_offload_params must be false: gradients on the CPU have no norm over processes with NCCL")
    if asked.get("activation_checkpointing") == "true":
        problems.append("fsdp_activation_checkpointing must be false: the trainers' gradient_checkpointing does it")
    if problems:
        raise ValueError(f"launcher settings: {'; '.join(problems)}. See accelerate_configs/fsdp2.yaml")
    return Sharding(
        wraps=policy == "TRANSFORMER_BASED_WRAP",
        block_classes=tuple(filter(None, asked.get("transformer_cls_to_wrap", "").split(","))),
        reshard_after_forward=asked.get("reshard_after_forward") != "false",
    )


# Sharding -------------------------------------------------------------------------------------------------------------


def shard(
    model: nn.Module, optimizer: torch.optim.Optimizer, sharding: Sharding, device: torch.device, precision: str
) -> None:
    """Shards a network in place and gives its optimizer, which was built of the whole parameters, the shards.

    Weights and gradients' sums stay in float32. In half precision matrices are gathered in it, which is what autocast
    would round them to; vectors (norms, biases) are not.

    Raises:
        ValueError: an optimizer that cannot be sharded.
    """
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise ValueError(
            "use_8bit_adam does not work with FSDP: its states are quantized in blocks, which shards would cut; leave "
            "one of the two out"
        )
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    policy = MixedPrecisionPolicy(
        param_dtype=half,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,  # autocast does what needs it; times and positions stay exact
        param_dtype_override_fn=(lambda parameter: parameter.dtype if parameter.ndim == 1 else None) if half else None,
    )
    settings: dict[str, Any] = {"mesh": init_device_mesh(device.type, (get_world_size(),)), "mp_policy": policy}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = _blocks(model, sharding)
    for block in blocks:
        fully_shard(block, **settings, reshard_after_forward=sharding.reshard_after_forward)
    if sharding.wraps and not blocks and get_rank() == 0:
        logger.warning("FSDP finds no blocks to wrap in %s: it gathers the whole at once", type(model).__name__)
    fully_shard(model, **settings)
    shards = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[names[id(parameter)]] for parameter in group["params"]]
    optimizer.register_state_dict_post_hook(_whole_state)
    optimizer.register_load_state_dict_pre_hook(_sharded_state)


def _blocks(model: nn.Module, sharding: Sharding) -> list[nn.Module]:
    """The modules that are gathered one at a time, inner ones first."""
    if not sharding.wraps:
        return []
    names = sharding.block_classes or getattr(model, "_no_split_modules", None) or ()
    return [module for module in reversed(list(model.modules())[1:]) if type(module).__name__ in names]


def is_sharded(module: nn.Module) -> bool:
    """Whether the module is a network that was sharded."""
    return isinstance(module, FSDPModule)


# Parts and the whole --------------------------------------------------------------------------------------------------


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory; a tensor that is not sharded is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_of(tensor: Tensor) -> Tensor:
    """The whole of a tensor, of which every process may hold a part; called on all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole that all of them hold, sharded as `like` is; itself where that is not sharded."""
    if not isinstance(like, DTensor):
        return whole
    placed = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    part = placed.to_local().clone()  # not to keep the memory of the whole
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole weights, into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({k: sharded_like(value, own[k]) if k in own else value for k, value in weights.items()})


@contextmanager
def whole(module: nn.Module, device: torch.device | None = None, is_needed: bool = True) -> Iterator[None]:
    """Inside the block a sharded network is as it was before: whole parameters on every process, and no communication.

    So the processes may do different things with it, though not train it. Entered on all processes. Nothing changes for
    a module that is not sharded.

    Args:
        device: where the whole is held; None is where the parts are.
        is_needed: without it this process only helps the others, and may not touch the module.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.reshard()
    owners = [(part, name, p) for part in module.modules() for name, p in part._parameters.items()]
    gathered: dict[int, nn.Parameter] = {}  # by the part, of which two modules may share one
    for parameter in module.parameters():
        value = whole_of(parameter.detach())
        if is_needed:
            gathered[id(parameter)] = nn.Parameter(value.to(device or value.device), parameter.requires_grad)
    if not is_needed:
        yield
        return
    sharded = [(unit, type(unit), unit._forward_pre_hooks, unit._forward_hooks) for unit in units]
    try:
        for part, name, parameter in owners:
            part._parameters[name] = None if parameter is None else gathered[id(parameter)]
        for unit, kind, before, after in sharded:
            unit.__class__ = kind.__bases__[1]  # diffusers writes the name of the class; FSDP put its own before it
            unit._forward_pre_hooks, unit._forward_hooks = _without_fsdp(before), _without_fsdp(after)
        yield
    finally:
        for unit, kind, before, after in sharded:
            unit.__class__, unit._forward_pre_hooks, unit._forward_hooks = kind, before, after
        for part, name, parameter in owners:
            part._parameters[name] = parameter


def _without_fsdp(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """The hooks that do not gather or free parameters."""
    ours = ((key, hook) for key, hook in hooks.items() if not hook.__module__.startswith("torch.distributed.fsdp"))
    return OrderedDict(ours)


def _whole_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with whole tensors, in the memory of the host of the main process, which saves it."""

    def collect(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        gathered = value.full_tensor()
        return gathered.cpu() if get_rank() == 0 else value

    state = {number: {key: collect(v) for key, v in values.items()} for number, values in state_dict["state"].items()}
    return {**state_dict, "state": state}


def _sharded_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A whole state, as this process's part of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    owners = dict(zip(numbers, parameters, strict=False))  # torch says what is wrong where they differ

    def split(number: int, value: Any) -> Any:
        like = owners.get(number)
        if like is None or not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != like.shape:
            return value
        return sharded_like(value, like)

    state = {n: {key: split(n, value) for key, value in values.items()} for n, values in state_dict["state"].items()}
    return {**state_dict, "state": state}
