"""What a step draws, and what validation asks the model for."""

from types import SimpleNamespace

import pytest

from diffnext.config import NovaValidation
from diffnext.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.models.noise import noise_schedule
from diffnext.task import draw, sampling


def test_timesteps_go_as_far_as_the_scheduler_of_the_checkpoint() -> None:
    noise = noise_schedule({"_class_name": "DDPMScheduler", "num_train_timesteps": 5})
    timesteps = draw(0, 0, [0, 1], (4, 8, 8), 2, 4, noise).timesteps
    assert timesteps.shape == (8, 16) and timesteps.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("vae", "lengths"),
    [(AutoencoderKLOpenSora, [1, 4, 5, 5, 5, 9, 9]), (AutoencoderKLCogVideoX, [1, 4, 5, 5, 5, 5, 5])],
)
def test_validation_makes_the_longest_clips_that_network_and_vae_take(vae: type, lengths: list[int]) -> None:
    found, given = [], []
    for base in (1, 4, 6, 7, 8, 9, 16):
        config = SimpleNamespace(video_base_size=(base, 2, 3))
        parts = SimpleNamespace(transformer=SimpleNamespace(config=config), vae=vae)
        found.append(sampling(NovaValidation(), parts).max_latent_length)
        given.append(sampling(NovaValidation(max_latent_length=3), parts).max_latent_length)
    assert found == lengths and given == [3] * 7
