"""Trains a video autoencoder, under torchrun, `accelerate launch` or python; `--help` lists all settings."""

from vae.train import main

if __name__ == "__main__":
    main()
