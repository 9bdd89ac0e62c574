"""PSNR, SSIM, LPIPS and flicker against their definitions and the libraries that define them."""

import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from common import metrics
from common.metrics import Lpips, LpipsUnavailable, find_backbone_weights, flicker, psnr, ssim

lpips = pytest.importorskip("lpips")


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A photograph with two degradations, and itself twice: (2, 3, 64, 80) each."""
    target = torch.from_numpy(data.astronaut()[40:104, 180:260].copy()).permute(2, 0, 1) / 255  # (3, 64, 80)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    pred = torch.stack([(target + 0.1 * noise).clamp(0, 1), torch.roll(target, 2, dims=2)])  # (2, 3, 64, 80)
    return pred, target.expand(2, -1, -1, -1)


def test_psnr_is_that_of_skimage(pair):
    expected = [peak_signal_noise_ratio(t.numpy(), p.numpy(), data_range=1) for p, t in zip(*pair, strict=True)]
    actual = psnr(*pair)
    assert actual.shape == (2,)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_psnr_of_known_errors_and_its_cap():
    zero = torch.zeros(3, 3, 4, 4)
    pred = torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 1.0, 0.0)])
    np.testing.assert_allclose(psnr(pred, zero), [20, 0, 100], atol=1e-5)


def test_ssim_is_that_of_skimage(pair):
    expected = [
        structural_similarity(
            t.double().numpy(),
            p.double().numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        for p, t in zip(*pair, strict=True)
    ]
    actual = ssim(*pair)
    assert actual.shape == (2,)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
    np.testing.assert_allclose(ssim(pair[1], pair[1]), [1, 1], rtol=1e-12)


def test_half_precision_inputs_are_computed_in_full(pair):
    pred, target = (x.bfloat16() for x in pair)
    np.testing.assert_array_equal(psnr(pred, target), psnr(pred.double(), target.double()))
    np.testing.assert_array_equal(ssim(pred, target), ssim(pred.double(), target.double()))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_shapes_are_checked(metric):
    with pytest.raises(ValueError, match=r"one shape \(B, C, H, W\), got \(1, 3, 16, 16\) and \(2, 3, 16, 16\)"):
        metric(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"got \(3, 16, 16\)"):
        metric(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16))


def test_ssim_needs_one_window():
    assert ssim(torch.zeros(1, 1, 11, 11), torch.zeros(1, 1, 11, 11)).tolist() == [1]
    with pytest.raises(ValueError, match=r"at least 11 px, got \(10, 20\)"):
        ssim(torch.zeros(1, 1, 10, 20), torch.zeros(1, 1, 10, 20))


def test_flicker_is_the_error_of_changes_in_time():
    x = torch.rand(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert flicker(x + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1, 1), x).abs().max() < 1e-12  # the same in every frame
    alternating = torch.tensor([0.0, 0.1, 0.0, 0.1, 0.0], dtype=torch.float64).view(5, 1, 1)
    np.testing.assert_allclose(flicker(x + alternating, x), [0.1, 0.1])
    once = torch.tensor([0.0, 0.0, 0.2, 0.2, 0.2], dtype=torch.float64).view(5, 1, 1)
    np.testing.assert_allclose(flicker(x + once, x), [0.05, 0.05])
    assert flicker(x[:, :, :1], x[:, :, :1] * 0).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"one shape \(B, C, T, H, W\), got \(3, 5, 4, 6\)"):
        flicker(x[0], x[0])


# LPIPS ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alexnet() -> dict[str, torch.Tensor]:
    """A random state dict as torchvision's, without the classifier: LPIPS has no use for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = torchvision.models.alexnet(weights=None).features
    return {f"features.{name}": value for name, value in features.state_dict().items()}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty torch.hub cache and a network that must not be touched."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("touched the network"))


def reference(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """lpips.LPIPS whose convolutions are those of `weights`, copied in their order."""
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    layers = [layer for layer in model.net.modules() if isinstance(layer, torch.nn.Conv2d)]
    for layer, number in zip(layers, (0, 3, 6, 8, 10), strict=True):
        layer.load_state_dict({name: weights[f"features.{number}.{name}"] for name in ("weight", "bias")})
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*deprecated since 0.13")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_lpips_is_that_of_the_package(pair, alexnet, offline, tmp_path, suffix):
    path = tmp_path / f"alexnet{suffix}"
    save_file(alexnet, path) if suffix == ".safetensors" else torch.save(alexnet, path)
    metric = Lpips.load("alex", path)
    with torch.no_grad():
        expected = reference(alexnet)(pair[0], pair[1], normalize=True).flatten()
    actual = metric(*pair)
    assert actual.shape == (2,) and actual.dtype == torch.float32 and not actual.requires_grad
    assert expected.min() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert metric(pair[1], pair[1]).tolist() == [0, 0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(metric(*pair), expected, rtol=1e-6, atol=0)


def test_lpips_takes_the_cached_weights(pair, alexnet, offline, tmp_path):
    name = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(alexnet, tmp_path / "hub" / "checkpoints" / name)
    torch.save(alexnet, tmp_path / "given.pth")
    torch.testing.assert_close(Lpips.load()(*pair), Lpips.load("alex", tmp_path / "given.pth")(*pair), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*deprecated since 0.13")
def test_spatial_lpips_is_that_of_the_package(pair, alexnet, offline, tmp_path):
    torch.save(alexnet, tmp_path / "alexnet.pth")
    metric = Lpips.load("alex", tmp_path / "alexnet.pth", spatial=True)
    model = reference(alexnet)
    model.spatial = True
    with torch.no_grad():
        expected = model(pair[0], pair[1], normalize=True)  # (2, 1, 64, 80)
    assert expected.shape == (2, 1, 64, 80)
    torch.testing.assert_close(metric(*pair), expected.mean(dim=(1, 2, 3)), rtol=1e-6, atol=0)
    assert not torch.allclose(metric(*pair), Lpips.load("alex", tmp_path / "alexnet.pth")(*pair), rtol=1e-5)


def test_the_setting_of_a_message_can_be_another(offline):
    with pytest.raises(LpipsUnavailable, match="or set vgg_weights to where it is"):
        find_backbone_weights("vgg", None, setting="vgg_weights")


def test_lpips_leaves_the_random_state_alone(alexnet, offline, tmp_path):
    torch.save(alexnet, tmp_path / "alexnet.pth")
    before = torch.get_rng_state()
    Lpips.load("alex", tmp_path / "alexnet.pth")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("net", "file"), [("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth")])
def test_offline_message_names_file_place_and_key(offline, tmp_path, net, file):
    with pytest.raises(LpipsUnavailable) as raised:
        Lpips.load(net)
    text = str(raised.value)
    assert "HF_HUB_OFFLINE forbids a download" in text and f"/{file} and put it to" in text
    assert str(tmp_path / "hub" / "checkpoints" / file) in text and "set lpips_weights to" in text


def test_failing_download_is_quick_and_leaves_nothing(offline, monkeypatch, tmp_path):
    timeouts = []

    def refuse(url, timeout):
        timeouts.append(timeout)
        raise urllib.error.URLError("no route to host")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(LpipsUnavailable, match="download failed .*no route to host.*lpips_weights"):
        Lpips.load("alex")
    assert timeouts == [metrics.DOWNLOAD_TIMEOUT_SECONDS]
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


def test_download_with_another_hash_is_refused(offline, monkeypatch, tmp_path):
    (tmp_path / "page.html").write_bytes(b"please log in to the wireless network")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: open(tmp_path / "page.html", "rb"))
    with pytest.raises(LpipsUnavailable, match="has SHA-256 .* which its name contradicts"):
        Lpips.load("alex")
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


def test_wrong_weights_are_named(alexnet, offline, tmp_path):
    with pytest.raises(LpipsUnavailable, match="nowhere.pth are not a file: download"):
        Lpips.load("alex", tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(LpipsUnavailable, match="text.pth was refused: it is damaged, or holds more than tensors"):
        Lpips.load("alex", tmp_path / "text.pth")
    torch.save(alexnet, tmp_path / "alexnet.pth")
    with pytest.raises(LpipsUnavailable, match=r"not those of torchvision's VGG16: features.0.weight has shape"):
        Lpips.load("vgg", tmp_path / "alexnet.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(LpipsUnavailable, match=r"torchvision's AlexNet: features.0.weight is absent"):
        Lpips.load("alex", tmp_path / "other.pth")
    with pytest.raises(ValueError, match="net is 'squeeze'"):
        Lpips.load("squeeze")
