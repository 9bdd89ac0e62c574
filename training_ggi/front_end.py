"""What the frozen networks make of clips: optical flow, edges, VAE moments, prompt embeddings; and the noise to warp.

All of it is the same in every visit of a cut, so that it can be prepared once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor
from torchvision.models.optical_flow import RAFT
from transformers import DPTForDepthEstimation, PreTrainedTokenizerBase, T5EncoderModel

from training_ggi.config import REPEATED_FRAMES, GGIData, GGILoss
from training_ggi.models.components import encode_prompts, video_moments
from training_ggi.models.edges import HED, edge_clip
from training_ggi.models.frames import normalise, normalise_edges, pad_last
from training_ggi.models.noise_warp import resize_list, warp_clip
from training_ggi.models.raft import clip_flow

# What `FrontEnd.encode` makes of a batch of clips.
ENCODED = ("ends", "flow", "video_moments", "cond_moments", "prompt_embeds")


@dataclass
class FrontEnd:
    """The frozen networks, on the device, and how they are used; edges need `hed`, of depth maps `midas` too."""

    vae: AutoencoderKLCogVideoX
    tokenizer: PreTrainedTokenizerBase
    text_encoder: T5EncoderModel | None
    raft: RAFT
    hed: HED | None
    midas: DPTForDepthEstimation | None
    data: GGIData

    @torch.no_grad()
    def encode(
        self, frames: Tensor, prompts: Sequence[str] | None = None, edges: Tensor | None = None
    ) -> dict[str, Tensor]:
        """All that training needs of clips, but for random numbers.

        Args:
            frames: uint8 (B, F, H, W, 3), as read.
            prompts: None leaves their embeddings out.
            edges: uint8 (B, F, H, W), where they are not found here.

        Returns:
            `ends` uint8 (B, 2, H, W, 3), the first and last frame; `flow` float16 (B, T, 2, H / 2, W / 2) between the
            frames of the padded clip; `video_moments`, `cond_moments` (B, 2C, F', h, w), `prompt_embeds` (B, tokens, D)
            in the networks' types.
        """
        device = self.vae.device
        clip = pad_last(normalise(frames), REPEATED_FRAMES)  # (B, F + 3, 3, H, W)
        encoded = {
            "ends": frames[:, [0, -1]],
            "flow": clip_flow(self.raft, clip).half(),
            "video_moments": video_moments(self.vae, clip.to(device)).to(self.vae.dtype),
            "cond_moments": video_moments(self.vae, self.condition(frames, edges).to(device)).to(self.vae.dtype),
        }
        return encoded if prompts is None else encoded | {"prompt_embeds": self.embed(prompts)}

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts, (B, tokens, D), in the text encoder's type; without captions, of the empty one."""
        if self.text_encoder is None:
            raise ValueError("the text encoder is needed no more and was released")
        return encode_prompts(self.tokenizer, self.text_encoder, prompts)

    def condition(self, frames: Tensor, edges: Tensor | None = None) -> Tensor:
        """Edges of clips, padded: uint8 (B, F, H, W, 3) -> float32 (B, F + 3, 3, H, W) in [-1, 1]."""
        if edges is not None:
            return pad_last(normalise_edges(edges), REPEATED_FRAMES)
        if self.hed is None:
            raise ValueError("edges are to be found, but HED was not loaded")
        depth_range = "clip" if self.data.clipwise_depth else "frame"
        settings = {"depth_range": depth_range, "detect_resolution": self.data.detect_resolution}
        edges = torch.stack(
            [edge_clip(self.data.cond, clip.cpu(), self.hed, self.midas, **settings) for clip in frames]
        )  # (B, F, H, W)
        return pad_last(normalise_edges(edges), REPEATED_FRAMES)


def warped_noise(flow: Tensor, seeds: Sequence[int], num_latent_frames: int, loss: GGILoss) -> Tensor:
    """White noise of clips' latent frames that follows the flow, each clip's from its own seed.

    Args:
        flow: (B, T, 2, H / 2, W / 2).
        seeds: (B,).

    Returns:
        float16 (B, F', 16, H / 8, W / 8).
    """
    generators = [torch.Generator(flow.device).manual_seed(seed) for seed in seeds]
    keep = resize_list(range(flow.shape[1] + 1), num_latent_frames)
    return warp_clip(flow.float(), generators, keep=keep, flow_scale=loss.flow_scale, oob=loss.oob).half()


def end_frames(ends: Tensor) -> Tensor:
    """uint8 (B, 2, H, W, 3) -> float32 (B, 2, 3, H, W) in [-1, 1]."""
    return normalise(ends)
