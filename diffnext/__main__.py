"""The training command, by each of its names: the documented script, `train-diffnext`, `python -m diffnext`."""

from collections.abc import Sequence

from diffnext.config import PARSER


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line says; see `--help`."""
    config, warnings = PARSER.parse_or_exit(argv)
    # Imported this late, --help and mistakes are answered at once: PyTorch and diffusers take seconds.
    from common import training
    from diffnext.train import draw_samples, train

    training.command(config, warnings, train, draw_samples)


if __name__ == "__main__":
    main()
