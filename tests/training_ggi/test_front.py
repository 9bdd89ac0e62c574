"""Frames, optical flow and edges on photographs, with small random networks. Recorded values are in tests/golden."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from torch import Tensor, nn
from torchvision.models.optical_flow import RAFT, raft_large
from transformers import BitConfig, DPTConfig, DPTForDepthEstimation

from training_ggi.models import edges, frames, raft
from training_ggi.models.edges import (
    HED,
    annotator_resize,
    annotator_size,
    area_weights,
    depth_maps,
    edge_clip,
    hed_edges,
    inverse_depth,
    lanczos4_weights,
    load_hed,
    load_midas,
    resize_bicubic,
    two_point_weights,
)

RESOLUTION = 64
Network = TypeVar("Network", bound=nn.Module)


def random_network(build: Callable[[], Network], seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval().requires_grad_(False)


def tiny_hed() -> HED:
    """Weights that spread the edges over all levels."""
    hed = random_network(lambda: HED(widths=(4, 4, 8, 8, 8)))
    for name, weight in hed.named_parameters():
        if weight.ndim == 4 and name != "norm":
            nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5, generator=torch.Generator().manual_seed(1))
    hed.norm.fill_(120)
    for block in (hed.block1, hed.block2, hed.block3, hed.block4, hed.block5):
        block.projection.weight.mul_(0.1)
    return hed


def midas_config(**changes: object) -> DPTConfig:
    stages = ["stage1", "stage2", "stage3"]
    backbone = BitConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32],
        depths=[1, 1, 1],
        num_groups=4,
        layer_type="bottleneck",
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=stages,
    )
    settings = {
        "is_hybrid": True,
        "backbone_config": backbone,
        "backbone_featmap_shape": [1, 32, 4, 4],
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "backbone_out_indices": [0, 1, 2, 3],
        "image_size": 64,
        "reassemble_factors": [1, 1, 1, 0.5],
        "neck_hidden_sizes": [8, 16, 16, 16],
        "fusion_hidden_size": 16,
    }
    return DPTConfig(**(settings | changes))


def tiny_midas() -> DPTForDepthEstimation:
    midas = random_network(lambda: DPTForDepthEstimation(midas_config()))
    generator = torch.Generator().manual_seed(1)
    midas.dpt.embeddings.position_embeddings.normal_(generator=generator)
    for module in midas.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
    midas.head.head[-2].bias.fill_(2.0)  # above zero, where the last activation would cut
    return midas


def photo_clip(num_frames: int = 3, height: int = 96, width: int = 128) -> np.ndarray:
    """A camera that pans: uint8 (F, H, W, 3)."""
    photo = data.astronaut()
    return np.stack([photo[i : i + height, 160 + 4 * i : 160 + 4 * i + width] for i in range(num_frames)])


# Frames


@pytest.mark.parametrize(
    ("source", "crop", "expected"),
    [((1080, 1920), (480, 720), (528, 938)), ((60, 60), (24, 40), (44, 44)), ((480, 720), (480, 720), (528, 792))],
)
def test_resized_size(source: frames.Size, crop: frames.Size, expected: frames.Size) -> None:
    assert frames.resized_size(source, crop) == expected


def test_cutting_to_8_bit_before_the_crop_is_the_same_as_after() -> None:
    photo, crop = data.coffee()[:150, :200], (48, 72)
    kept = frames.resize_frame(photo, crop)
    assert kept.dtype == np.uint8 and kept.shape == (*frames.resized_size((150, 200), crop), 3)
    values = torch.from_numpy(photo).movedim(-1, 0)[None].float() / 255
    values = nn.functional.interpolate(values, kept.shape[:2], mode="bilinear", antialias=True)[0, :, 3:51, 5:77]
    expected = (values * 255).floor() / 127.5 - 1
    assert torch.equal(frames.normalise(frames.crop_clip(kept[None], 3, 5, crop))[0], expected)


def test_frame_must_be_rgb() -> None:
    with pytest.raises(ValueError, match=r"uint8 of shape \(8, 8, 4\): expected uint8 \(height, width, 3\)"):
        frames.resize_frame(np.zeros((8, 8, 4), np.uint8), (4, 4))
    with pytest.raises(ValueError, match="float64 of shape"):
        frames.resize_frame(np.zeros((8, 8, 3)), (4, 4))


def test_crop() -> None:
    clip, crop = np.arange(2 * 6 * 8 * 3).reshape(2, 6, 8, 3), (4, 5)
    assert frames.crop_choices((6, 8), crop) == (3, 4)
    assert np.array_equal(frames.crop_clip(clip, 2, 3, crop), clip[:, 2:, 3:])
    assert torch.equal(frames.crop_clip(torch.from_numpy(clip), 0, 0, crop), torch.from_numpy(clip[:, :4, :5]))
    for offset in ((3, 0), (0, 4), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"leaves the frame: the limits are \(2, 3\)"):
            frames.crop_clip(clip, *offset, crop)
    with pytest.raises(ValueError, match=r"frames of 6x8 \(height x width\) hold no crop of 7x5: resize them"):
        frames.crop_choices((6, 8), (7, 5))


def test_normalise() -> None:
    clip = photo_clip()
    clip[0, 0, 0] = (0, 255, 51)
    actual = frames.normalise(clip)
    assert actual.shape == (3, 3, 96, 128) and actual.dtype == torch.float32
    assert actual[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6], abs=1e-7)
    assert torch.equal(frames.normalise(torch.from_numpy(clip)[None]), actual[None])
    edges = frames.normalise_edges(clip[..., 1])
    assert torch.equal(edges, actual[:, 1:2].expand(-1, 3, -1, -1))
    assert frames.normalise_edges(clip[None, ..., 1]).shape == (1, 3, 3, 96, 128)


def test_last_frame_is_repeated() -> None:
    clip = torch.randn(2, 46, 3, 4, 6)
    padded = frames.pad_last(clip)
    assert padded.shape == (2, 49, 3, 4, 6)
    assert torch.equal(padded[:, :46], clip)
    assert torch.equal(padded[:, 46:], clip[:, -1:].expand(-1, 3, -1, -1, -1))
    assert torch.equal(frames.pad_last(clip[0], 0), clip[0])


# Optical flow


@pytest.fixture(scope="module")
def flow_network() -> RAFT:
    return random_network(lambda: raft_large(weights=None))


@pytest.fixture(scope="module")
def moving() -> Tensor:
    """A moving frame, then a repeated one: (1, 3, 3, 256, 272) in [-1, 1]."""
    return frames.pad_last(frames.normalise(photo_clip(2, 256, 272)), 1)[None]


def test_flow_is_that_of_one_pair_at_a_time(flow_network: RAFT, moving: Tensor) -> None:
    clips = torch.cat([moving, moving.flip(-1)])
    actual = raft.clip_flow(flow_network, clips, batch_size=3)
    assert actual.shape == (2, 2, 2, 128, 136) and actual.dtype == torch.float32 and not actual.requires_grad
    halves = torch.stack([frames.resize_antialiased(clip, (128, 136)) for clip in clips])
    for clip in range(2):
        for pair in range(2):
            expected = flow_network(halves[clip, pair][None], halves[clip, pair + 1][None])[-1][0]
            torch.testing.assert_close(actual[clip, pair], expected, atol=1e-3, rtol=1e-3)


def test_flow_between_repeated_frames_is_the_same(flow_network: RAFT, moving: Tensor) -> None:
    still = moving[:, -1:].expand(-1, 3, -1, -1, -1)
    flow = raft.clip_flow(flow_network, still)
    torch.testing.assert_close(flow[:, 0], flow[:, 1])


@pytest.mark.parametrize(
    ("height", "width", "complaint"),
    [
        (
            256,
            264,
            r"128x132 \(half of 256x264.*half the width must be a multiple of 8 and at least 128; choose a width",
        ),
        (240, 272, "half the height must be a multiple of 8 and at least 128.*multiple of 16 and at least 256"),
    ],
)
def test_sides_raft_cannot_take(flow_network: RAFT, height: int, width: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        raft.clip_flow(flow_network, torch.zeros(1, 2, 3, height, width))


def test_one_frame_has_no_flow(flow_network: RAFT) -> None:
    with pytest.raises(ValueError, match="a clip of 1 frame has no flow: give 2 frames or more"):
        raft.clip_flow(flow_network, torch.zeros(1, 1, 3, 256, 256))


def test_load_raft(flow_network: RAFT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "raft_large_C_T_SKHT_V2-ff5fadd5.pth"
    asked = []

    def fail(*arguments: object, progress: bool) -> None:
        asked.append(arguments)
        raise OSError("no route\nto host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    told = rf"{cached}, do not exist and cannot be downloaded \(%s\): download https://\S+{cached.name} to there, or"
    for is_offline, reason in ((True, "HF_HUB_OFFLINE forbids it"), (False, "no route")):
        monkeypatch.setattr(raft.constants, "HF_HUB_OFFLINE", is_offline)
        with pytest.raises(FileNotFoundError, match=told % reason):
            raft.fetch_raft()
    assert asked == [(raft.RAFT_URL, str(cached), "ff5fadd5")]
    weights = flow_network.state_dict()
    torch.save(weights, cached)
    assert raft.fetch_raft() == cached
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "raft.safetensors")
    for path in (str(cached), tmp_path / "raft.safetensors"):
        loaded = raft.load_raft(path)
        assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
        assert all(torch.equal(tensor, weights[key]) for key, tensor in loaded.state_dict().items())


def test_hed_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "hf_hub_download", lambda *names, cache_dir: str(Path(cache_dir, *names)))
    assert edges.fetch_hed(str(tmp_path)) == tmp_path / "lllyasviel" / "Annotators" / "ControlNetHED.pth"

    def fail(*names: str, cache_dir: None) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(edges, "hf_hub_download", fail)
    told = r"edge network cannot be downloaded \(no route\): put ControlNetHED.pth of lllyasviel/Annotators into .* by "
    with pytest.raises(FileNotFoundError, match=told):
        edges.fetch_hed()


def test_wrong_weights(tmp_path: Path) -> None:
    torch.save({"netG.weight": torch.zeros(1)}, tmp_path / "hed.pth")
    with pytest.raises(
        ValueError, match=r"not hold the weights of HED \(ControlNetHED\); 37 missing: .*; 1 unexpected: n"
    ):
        load_hed(tmp_path / "hed.pth")
    save_file(tiny_hed().state_dict(), tmp_path / "hed.safetensors")
    with pytest.raises(ValueError, match="31 of another shape: block1.convs.0.weight"):
        load_hed(tmp_path / "hed.safetensors")
    (tmp_path / "raft.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="raft.pth was refused: it is damaged, .* Copy it again"):
        raft.load_raft(tmp_path / "raft.pth")


# Resizing of the annotators


def test_annotator_size() -> None:
    assert annotator_size((480, 720), 512) == (512, 768)
    assert annotator_size((480, 720), 480) == (512, 704)  # 7.5 * 64 and 11.25 * 64, half to even
    assert annotator_size((100, 150), 64) == (64, 128)  # 1.5 * 64
    assert annotator_size((100, 250), 64) == (64, 128)  # 2.5 * 64
    with pytest.raises(ValueError, match="at a resolution of 30 pixels: take 64 or more"):
        annotator_size((480, 720), 30)


@pytest.mark.parametrize(
    ("size", "row", "corner", "total", "largest_error"),
    [
        ((40, 80), [198, 196, 195, 195, 195, 196, 196, 195], [170, 166, 134, 107], 4189360, 0),  # Lanczos4
        ((150, 240), [108, 113, 112, 107, 95, 75, 82, 85], [230, 224, 214, 194], 4042912, 0),  # area
        (
            (70, 106),
            [81, 92, 104, 113, 122, 132, 141, 148],
            [76, 63, 50, 55],
            3593119,
            1,
        ),  # height shrinks, width grows
    ],
)
def test_resize_as_opencv(size: frames.Size, row: list[int], corner: list[int], total: int, largest_error: int) -> None:
    """Recorded with OpenCV 4.14 at the annotators' rule: parts of two rows, and the sum of all values."""
    image = torch.from_numpy(data.astronaut()[: size[0], 160 : 160 + size[1]].copy())
    actual = annotator_resize(image[None], RESOLUTION)[0]
    assert actual.shape == (3, 64, 128) and actual.dtype == torch.float32
    assert (actual[0, 30, 60:68] - torch.tensor(row)).abs().max() <= largest_error
    assert (actual[1, -1, -4:] - torch.tensor(corner)).abs().max() <= largest_error
    assert abs(actual.sum().item() - total) <= largest_error * actual.numel()


def test_resize_to_the_same_size_changes_nothing() -> None:
    images = torch.from_numpy(photo_clip(2, 64, 128))
    assert torch.equal(annotator_resize(images, RESOLUTION), images.movedim(-1, 1).float())


def test_interpolation_weights() -> None:
    assert area_weights(4, 2).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    torch.testing.assert_close(area_weights(3, 2) * 3, torch.tensor([[2, 1, 0], [0, 1, 2]]).double())
    assert two_point_weights(2, 4).tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert torch.equal(lanczos4_weights(9, 9), torch.eye(9, dtype=torch.float64))
    halves = lanczos4_weights(16, 32)
    torch.testing.assert_close(halves.sum(1), torch.ones(32).double(), atol=4 / 2048, rtol=0)
    assert torch.equal(halves, halves.flip(0, 1))


# Edges


def by_hand(midas: DPTForDepthEstimation | None, hed: HED, image: np.ndarray) -> np.ndarray:
    """One frame, as the original's annotators and PIL do it one after the other."""
    size = (image.shape[1], image.shape[0])
    if midas is not None:
        depth = inverse_depth(midas, annotator_resize(torch.from_numpy(image)[None], RESOLUTION) / 127.5 - 1)[0]
        depth = depth - depth.min()
        depth = ((depth / depth.max()).numpy() * 255).astype(np.uint8)
        image = np.asarray(Image.fromarray(depth).convert("RGB").resize(size, Image.Resampling.BICUBIC))
    values = annotator_resize(torch.from_numpy(image.copy())[None], RESOLUTION)
    maps = [nn.functional.interpolate(each, values.shape[2:], mode="bilinear") for each in hed(values)]
    edge = 1 / (1 + np.exp(-np.mean([each[0, 0].numpy() for each in maps], axis=0).astype(np.float64)))
    return np.asarray(Image.fromarray((edge * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("cond", ["depth_hed", "hed"])
def test_edge_clip(cond: str) -> None:
    midas = tiny_midas() if cond == "depth_hed" else None
    hed, clip = tiny_hed(), photo_clip()
    actual = edge_clip(cond, clip, hed, midas, detect_resolution=RESOLUTION, batch_size=2)
    assert actual.shape == (3, 96, 128) and actual.dtype == torch.uint8
    assert actual.float().std() > 5
    expected = torch.from_numpy(np.stack([by_hand(midas, hed, frame) for frame in clip]))
    assert (actual.int() - expected.int()).abs().max() <= 2  # sums in another order, cut to levels twice


def test_batches_make_no_difference() -> None:
    hed, images = tiny_hed(), torch.from_numpy(photo_clip())
    one, all_ = (hed_edges(hed, images, RESOLUTION, batch_size) for batch_size in (1, 3))
    assert one.shape == (3, 64, 64) and (one.int() - all_.int()).abs().max() <= 1


def test_depth_range() -> None:
    midas, images = tiny_midas(), torch.from_numpy(photo_clip())
    images[1] //= 2
    each = depth_maps(midas, images, "frame", RESOLUTION, batch_size=2)
    assert each.shape == (3, 64, 64)
    assert each.amin((1, 2)).tolist() == [0, 0, 0] and each.amax((1, 2)).tolist() == [255, 255, 255]
    whole = depth_maps(midas, images, "clip", RESOLUTION, batch_size=2)
    assert whole.min() == 0 and whole.max() == 255
    assert sorted(whole.amax((1, 2)).tolist())[0] < 255
    depth = inverse_depth(midas, annotator_resize(images, RESOLUTION) / 127.5 - 1)
    expected = (depth - depth.min()) / (depth.max() - depth.min()) * 255
    assert (whole - expected).abs().max() <= 1.01


def test_constant_depth_is_black() -> None:
    midas = tiny_midas()
    midas.head.head[-2].weight.zero_()
    assert not depth_maps(midas, torch.from_numpy(photo_clip()), "frame", RESOLUTION).any()


def test_depth_is_that_of_transformers() -> None:
    midas = tiny_midas()
    images = frames.normalise(photo_clip(2, 64, 64))
    depth = inverse_depth(midas, images)
    assert depth.std() > 0.01
    torch.testing.assert_close(depth, midas(images).predicted_depth)
    wide = inverse_depth(midas, frames.normalise(photo_clip(2, 64, 128)))
    assert wide.shape == (2, 64, 128) and wide.isfinite().all()


def test_bicubic_is_that_of_colour_images() -> None:
    grey = torch.from_numpy(photo_clip()[..., 0])
    colour = Image.fromarray(grey[1].numpy()).convert("RGB").resize((100, 60), Image.Resampling.BICUBIC)
    actual = resize_bicubic(grey, (60, 100))
    assert actual.shape == (3, 60, 100)
    assert np.array_equal(actual[1].numpy(), np.asarray(colour)[..., 2])


def test_edge_clip_errors() -> None:
    hed, clip = tiny_hed(), photo_clip()
    with pytest.raises(ValueError, match="unknown cond 'canny': choose one of depth_hed, hed"):
        edge_clip("canny", clip, hed)
    with pytest.raises(ValueError, match="unknown depth_range 'scene': choose one of frame, clip"):
        edge_clip("hed", clip, hed, depth_range="scene")
    with pytest.raises(ValueError, match='cond "depth_hed" needs the depth network: load it, or choose cond "hed"'):
        edge_clip("depth_hed", clip, hed)
    with pytest.raises(ValueError, match=r"torch.float32 of shape \(3, 96, 128, 3\): expected uint8 \(F, H, W, 3\)"):
        edge_clip("hed", torch.from_numpy(clip).float(), hed)


def test_load_midas(tmp_path: Path) -> None:
    midas = tiny_midas()
    weights = midas.state_dict()
    used = {key: tensor for key, tensor in weights.items() if "fusion_stage.layers.0.residual_layer1" not in key}
    midas.save_pretrained(tmp_path / "released", state_dict=dict(used))  # it empties the dict
    loaded = load_midas(tmp_path / "released")
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in used.items())

    headless = {key: tensor for key, tensor in used.items() if not key.startswith("head.")}
    midas.save_pretrained(tmp_path / "headless", state_dict=headless)
    with pytest.raises(
        ValueError, match="headless does not hold the weights of DPT-hybrid; 6 missing: head.head.0.bias"
    ):
        load_midas(tmp_path / "headless")
    other = DPTForDepthEstimation(midas_config(is_hybrid=False, backbone_config=None))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other is not DPT-hybrid but another DPT: take Intel/dpt-hybrid-midas"):
        load_midas(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="absent, are neither here nor .* copy of Intel/dpt-hybrid-midas"):
        load_midas(tmp_path / "absent")
