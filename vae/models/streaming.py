"""The causal cache: a video goes through a model chunk by chunk, and the result is that of the whole video.

Every operation that mixes frames takes an optional `Stream`. In it lies what the operation has to remember between
chunks; modules themselves remember nothing, so a new video is a new `Stream`. An operation that looks ahead (linear
interpolation in time) emits later what it cannot know yet; branches that run beside it wait (`Stream.align`).
Method: WF-VAE (arXiv 2411.17459), "Causal Cache"; there the look-ahead frames are computed twice instead.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Stream:
    """What is remembered of one video between its chunks.

    Attributes:
        first: the chunk holds frame 0. It is never empty.
        last: nothing follows the chunk, so whatever still waits is emitted.
        states: frames by the module that needs them.
    """

    first: bool = True
    last: bool = False
    states: dict[nn.Module, Tensor] = field(default_factory=dict)

    def past(self, module: nn.Module, x: Tensor, num_frames: int) -> Tensor | None:
        """The `num_frames` frames before chunk x (B, C, T, H, W); None before frame 0. The next chunk's are kept."""
        past = None if self.first else self.states[module]
        before = x[:, :, :1].expand(-1, -1, num_frames, -1, -1) if past is None else past
        # A copy: a view would hold the whole chunk in memory.
        self.states[module] = torch.cat([before, x[:, :, -num_frames:]], dim=2)[:, :, -num_frames:].clone()
        return past

    def rejoin(self, module: nn.Module, x: Tensor) -> Tensor:
        """x behind the frames that an earlier chunk left over for `module`."""
        left = self.states.pop(module, None)
        return x if left is None else torch.cat([left, x], dim=2)

    def leave(self, module: nn.Module, x: Tensor) -> None:
        """Keep frames x for the next chunk's `rejoin`."""
        self.states[module] = x.clone()

    def align(self, module: nn.Module, x: Tensor, num_frames: int) -> Tensor:
        """The oldest `num_frames` of the frames that wait for a delayed branch, after x has joined them."""
        waiting = self.rejoin(module, x)
        if waiting.shape[2] > num_frames:
            self.leave(module, waiting[:, :, num_frames:])
        return waiting[:, :, :num_frames]


def align(stream: Stream | None, module: nn.Module, x: Tensor, like: Tensor) -> Tensor:
    """Frames of x that belong to those of `like`, a branch which may be delayed in a stream."""
    return x if stream is None else stream.align(module, x, like.shape[2])


def with_stream(chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Stream]]:
    """Each chunk of a video with the video's stream, whose flags fit the chunk. Looks one chunk ahead."""
    stream = Stream()
    chunks = iter(chunks)
    chunk = next(chunks, None)
    while chunk is not None:
        following = next(chunks, None)
        stream.last = following is None
        yield chunk, stream
        stream.first = False
        chunk = following


def in_chunks(x: Tensor, num_frames: int) -> Iterator[Tensor]:
    """x (B, C, T, H, W) cut in time: 1 + `num_frames` frames, then `num_frames` each, then the rest."""
    yield x[:, :, : 1 + num_frames]
    yield from x[:, :, 1 + num_frames :].split(num_frames, dim=2) if x.shape[2] > 1 + num_frames else ()


def in_groups(chunks: Iterable[Tensor], group: int) -> Iterator[Tensor]:
    """The same frames in chunks of 1 + n * `group` frames at first, n * `group` afterwards; a remainder comes last."""
    waiting: Tensor | None = None
    taken = 0
    for chunk in chunks:
        waiting = chunk if waiting is None else torch.cat([waiting, chunk], dim=2)
        num_frames = waiting.shape[2]
        ready = num_frames - (taken + num_frames - 1) % group  # frame 0 is a group of its own
        if ready > 0 and num_frames:
            yield waiting[:, :, :ready]
            taken += ready
            waiting = waiting[:, :, ready:].clone() if ready < num_frames else None
    if waiting is not None:
        yield waiting
