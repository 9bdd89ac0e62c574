"""FVD against its definition, and what is said where it cannot be computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vae import fvd
from vae.fvd import FvdUnavailable, check_set, frechet_distance, load_features, preprocess
from vae.models.i3d import InceptionI3d

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


class TinyI3d(torch.nn.Module):
    """Called as the I3D of StyleGAN-V is: 400 numbers of a clip."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(400, 12, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert not rescale and not resize and return_features
        means = torch.cat(
            [x.mean(dim=(3, 4))[:, :, 0], x.std(dim=(3, 4)).amax(2), x.amax((2, 3, 4)), x.amin((2, 3, 4))], 1
        )
        return means @ self.weight.T


def torchscript(path: Path) -> Path:
    torch.jit.script(TinyI3d()).save(path)
    return path


def test_frechet_distance_is_its_definition():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(40, 5)) + 0.5
    c1, c2 = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root_trace = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(0)).sum()
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root_trace
    assert frechet_distance(torch.from_numpy(real), torch.from_numpy(fake)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_with_more_features_than_videos():
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, x + 2) == pytest.approx(30 * 4, rel=1e-10)
    assert frechet_distance(x, 3 * x - 2 * x.mean(0)) == pytest.approx(4 * x.var(0).sum().item(), rel=1e-10)
    assert frechet_distance(x[:1], x[1:2]) == pytest.approx((x[0] - x[1]).square().sum().item())


def test_frechet_distance_refuses_other_features():
    with pytest.raises(ValueError, match=r"must be \(N, D\) and \(M, D\), got \(2, 3\) and \(2, 4\)"):
        frechet_distance(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="the features of FVD are not finite"):
        frechet_distance(torch.full((2, 3), torch.nan), torch.zeros(2, 3))


def test_preprocessing_keeps_the_centre():
    video = torch.zeros(1, 3, 2, 8, 24)
    video[..., 8:16] = 0.999
    assert preprocess(video, "styleganv", 8).sub(0.998).abs().max() < 1e-5
    assert preprocess(video, "videogpt", 8).sub(254 / 255 * 2 - 1).abs().max() < 1e-6  # truncated to 8 bits


def test_sets_that_are_too_small():
    check_set(2, 9)
    with pytest.raises(FvdUnavailable, match="at least 9 frames, got --num_frames 8: raise it"):
        check_set(2, 8)
    with pytest.raises(FvdUnavailable, match="at least 2 videos, got 1: raise --subset_size"):
        check_set(1, 9)
    with pytest.raises(ValueError, match="I3D needs clips .* of at least 9 frames, got"):
        InceptionI3d()(torch.zeros(1, 3, 8, 224, 224))


def test_torchscript_features(tmp_path):
    features = load_features("styleganv", torchscript(tmp_path / "i3d.torchscript"))
    video = torch.rand(2, 3, 9, 16, 20, generator=torch.Generator().manual_seed(0))
    expected = TinyI3d()(preprocess(video, "styleganv"), False, False, True)
    torch.testing.assert_close(features(video), expected)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_state_dict_features(tmp_path, suffix):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = InceptionI3d().eval()
    path = tmp_path / f"i3d{suffix}"
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    video = torch.rand(1, 3, 9, 30, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(preprocess(video, "videogpt"))
    torch.testing.assert_close(load_features("videogpt", path)(video), expected, rtol=0, atol=0)


def test_weights_that_cannot_be_used(tmp_path):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    torchscript(tmp_path / "script.pt")
    for method, name, text in (
        ("styleganv", None, "needs weights, and none are downloaded: give the TorchScript I3D of StyleGAN-V as --i3d"),
        (
            "videogpt",
            None,
            "needs weights, and none are downloaded: give a state dict of VideoGPT's I3D as --i3d",
        ),
        ("videogpt", "absent.pt", "absent.pt are not a file: give a state dict"),
        ("styleganv", "empty.pt", r"empty.pt is empty \(0 bytes\), as a failed download leaves it: give"),
        ("styleganv", "other.pt", "other.pt is no TorchScript file .*--fvd_method videogpt for a state dict"),
        ("videogpt", "text.pt", "text.pt was refused: it is damaged, or holds more than tensors"),
        ("videogpt", "other.pt", "does not hold VideoGPT's I3D: logits.conv3d.weight is absent"),
        ("videogpt", "script.pt", "script.pt is a TorchScript file; use --fvd_method styleganv for it"),
    ):
        with pytest.raises(FvdUnavailable, match=text):
            load_features(method, name and tmp_path / name)
    assert fvd.NUM_FEATURES == 400
