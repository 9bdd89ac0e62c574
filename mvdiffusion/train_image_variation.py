"""Trains one image to many views: `python train_image_variation.py --help` lists all settings."""

from mvdiffusion.__main__ import main

if __name__ == "__main__":
    main()
