"""The training command, by each of its names: the documented script, `train-refiner`, `python -m gaussian_refiner`."""

from collections.abc import Sequence

from gaussian_refiner.config import PARSER


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line says; see `--help`."""
    config, warnings = PARSER.parse_or_exit(argv)
    # Imported this late, --help and mistakes are answered at once: PyTorch and diffusers take seconds.
    from common import training
    from gaussian_refiner.train import draw_samples, train

    training.command(config, warnings, train, draw_samples)


if __name__ == "__main__":
    main()
