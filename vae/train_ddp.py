"""Trains a video autoencoder, under torchrun, `accelerate launch` or python; `--help` lists all settings."""

from vae.__main__ import main

if __name__ == "__main__":
    main()
