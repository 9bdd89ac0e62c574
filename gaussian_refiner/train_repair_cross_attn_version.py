"""Trains the Gaussian refiner: `accelerate launch train_repair_cross_attn_version.py --help` lists all settings."""

from gaussian_refiner.__main__ import main

if __name__ == "__main__":
    main()
