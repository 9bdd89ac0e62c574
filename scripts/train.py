"""Trains NOVA: `accelerate launch scripts/train.py --help` lists all settings."""

from diffnext.__main__ import main

if __name__ == "__main__":
    main()
