"""Prepares clips for training, once; takes the flags of the training command.

    python -m training_ggi.prepare --cuts_per_scene 4 --cache_latents cache
    accelerate launch -m training_ggi.prepare --cuts_per_scene 4 --noise_sets 8 --cache_latents cache

Stopped and started again, it goes on with what is missing. Training would prepare the rest by itself.
"""

from training_ggi.__main__ import main

if __name__ == "__main__":
    main(prepare_only=True)
