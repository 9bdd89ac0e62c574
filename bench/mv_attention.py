"""Multi-view attention by one reshape against keys and values replicated for every view: time and peak memory.

    python bench/mv_attention.py [--device cpu|cuda] [--views 6] [--side 32]

The replicated form is the original's: all views' keys and values are repeated V-fold, and each row has its own copy. It
comes in two kinds: `materialised` with all scores in memory (the original without xformers) and `fused` with the
same kernel as ours (as with xformers). Cross-attention to the one token of the condition is ordinary in both. All have
the same weights and, checked first, the same results. They take turns within one run; what counts is the ratio within a
turn. On a CPU one thread runs, its processor time is taken, and memory is the peak of a process that does nothing else.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import add_device, alone_mib, difference, memory_text, peak_mib, ratio_text, take_turns

from mvdiffusion.models.attention import MVAttention, MVTransformerBlock

CHANNELS, HEADS, CONDITION_WIDTH = 320, 8, 768  # of the released network's first level
PARTS = ("self-attention", "cross-attention", "block")
VARIANTS = ("materialised", "fused", "ours")
Network = Callable[[Tensor, Tensor], Tensor]


def plain_attention(attention: MVAttention, x: Tensor, context: Tensor, materialised: bool) -> Tensor:
    """Attention of rows x (N, T, C) on rows of the same number, context (N, S, K), keys repeated by the pattern."""
    views = attention.num_views
    q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)  # (N, T or S, C)
    if attention.pattern == "dense":
        k, v = (each.reshape(-1, views * each.shape[1], CHANNELS).repeat_interleave(views, 0) for each in (k, v))
    elif attention.pattern == "joint":
        k, v = (torch.cat(each.chunk(2), dim=1).repeat(2, 1, 1) for each in (k, v))  # (N, 2L, C)
    q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))  # (N, heads, T or S, d)
    if materialised:
        x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    else:
        x = F.scaled_dot_product_attention(q, k, v)
    return attention.to_out(x.transpose(1, 2).flatten(2))  # (N, T, C)


def plain_block(block: MVTransformerBlock, x: Tensor, token: Tensor, materialised: bool) -> Tensor:
    """`MVTransformerBlock.forward` with the above."""

    def attend(attention: MVAttention, x: Tensor, context: Tensor) -> Tensor:
        return plain_attention(attention, x, context, materialised)

    normed = block.norm1(x)
    x = x + attend(block.attn1, normed, normed)
    normed = block.norm_joint_mid(x)
    x = x + attend(block.attn_joint_mid, normed, normed)
    x = x + attend(block.attn2, block.norm2(x), token)
    return x + block.ff(block.norm3(x))


def build(part: str, variant: str, views: int, device: torch.device) -> tuple[torch.nn.Module, Network]:
    """The layers of a part, the same for all its variants, and how a variant runs them."""
    torch.manual_seed(0)
    block = MVTransformerBlock(
        CHANNELS, HEADS, CHANNELS // HEADS, CONDITION_WIDTH, num_views=views, cd_attention_mid=True
    )
    torch.nn.init.normal_(block.attn_joint_mid.to_out[0].weight, std=0.02)
    block = block.requires_grad_(True).to(device)
    eager = variant == "materialised"
    if part == "block":
        return block, block if variant == "ours" else lambda x, token: plain_block(block, x, token, eager)
    if part == "cross-attention":
        attention, norm = block.attn2, block.norm2
        if variant == "ours":
            return attention, lambda x, token: x + attention.constant(token)
        return attention, lambda x, token: x + plain_attention(attention, norm(x), token, eager)
    if variant == "ours":
        return block.attn1, lambda x, token: block.attn1(x)
    return block.attn1, lambda x, token: plain_attention(block.attn1, x, x, eager)


def make_call(part: str, variant: str, backward: bool, arguments: argparse.Namespace) -> Callable[[], Tensor]:
    """One forward pass, with or without a backward pass after it; returns the output."""
    device = torch.device(arguments.device)
    network, forward = build(part, variant, arguments.views, device)
    rows, tokens = 2 * arguments.views, arguments.side**2  # one object
    x = torch.randn(rows, tokens, CHANNELS, device=device, requires_grad=backward)  # (N, L, C)
    token = torch.randn(rows, 1, CONDITION_WIDTH, device=device)  # (N, 1, K)

    def call() -> Tensor:
        with torch.set_grad_enabled(backward), torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            output = forward(x, token)
        if backward:
            network.zero_grad()
            output.float().square().mean().backward()
        return output.detach()

    return call


def peak_alone_mib(part: str, variant: str, backward: bool, arguments: argparse.Namespace) -> float:
    """`peak_mib` in a process of its own."""
    sizes = ["--views", str(arguments.views), "--side", str(arguments.side), "--device", "cpu"]
    return alone_mib(__file__, *sizes, "--alone", part, variant, "backward" if backward else "forward")


def check(part: str, calls: dict[str, Callable[[], Tensor]], limit: float) -> None:
    """Raises ValueError where results differ from ours by more than `limit` of themselves; also a warm-up."""
    ours = calls["ours"]()
    for variant, call in calls.items():
        found = difference(call(), ours)
        if not found <= limit:
            raise ValueError(f"{part}: {variant} differs by {found:.2g} of itself, more than {limit:g}")


def compare(part: str, backward: bool, arguments: argparse.Namespace) -> None:
    """Prints ratios other / ours of time (median and range) and of peak memory."""
    device = torch.device(arguments.device)
    calls = {}
    for variant in VARIANTS:
        torch.manual_seed(0)
        calls[variant] = make_call(part, variant, backward, arguments)
    check(part, calls, limit=1e-4 if device.type == "cpu" else 2e-2)
    turns = take_turns(calls, arguments.repeats, device)
    if device.type == "cuda":
        peaks = {variant: peak_mib(call, device) for variant, call in calls.items()}
    else:
        peaks = {variant: peak_alone_mib(part, variant, backward, arguments) for variant in VARIANTS}
    for variant in VARIANTS[:-1]:
        print(
            f"{part}, {'forward and backward' if backward else 'forward'}, {variant} / ours: time"
            f" {ratio_text(turns, variant, 'ours')}; {memory_text(peaks[variant], peaks['ours'])}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--views", type=int, default=6, help="views of the one object, in both domains")
    parser.add_argument("--side", type=int, default=32, help="height and width of the tokens; 32 = level 0 at 256 px")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns per comparison")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.alone:
        part, variant, mode = arguments.alone
        print(peak_mib(make_call(part, variant, mode == "backward", arguments), torch.device("cpu")))
        return
    print(
        f"{arguments.views} views, {arguments.side}^2 tokens, {arguments.device}, torch {torch.__version__}", flush=True
    )
    for part in arguments.only:
        for backward in (False, True):
            compare(part, backward, arguments)


if __name__ == "__main__":
    main()
