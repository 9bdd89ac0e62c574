"""Trains the GGI module with configs/T073-000.yaml: `python exps/T073-000.py --help` lists all settings."""

from training_ggi.__main__ import main

if __name__ == "__main__":
    main()
