"""The training command, by each of its names: the documented script, `train-vae`, `python -m vae`."""

from collections.abc import Sequence

from vae.config import PARSER


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line says; see `--help`."""
    config, warnings = PARSER.parse_or_exit(argv)
    # Imported this late, --help and mistakes are answered at once: PyTorch and diffusers take seconds.
    from common import training
    from vae.train import draw_samples, train, with_both_turns

    training.command(config, warnings, train, draw_samples, as_tried=with_both_turns)


if __name__ == "__main__":
    main()
