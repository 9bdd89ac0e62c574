"""The training command, by each of its names: the documented script, `train-ggi`, `python -m training_ggi`."""

from collections.abc import Sequence
from functools import partial

from training_ggi.config import PARSER


def main(argv: Sequence[str] | None = None, *, prepare_only: bool = False) -> None:
    """Trains, or only prepares clips, as the command line says; see `--help`."""
    config, warnings = PARSER.parse_or_exit(argv)
    # Imported this late, --help and mistakes are answered at once: PyTorch and diffusers take seconds.
    from common import training
    from training_ggi.train import draw_samples, train

    training.command(config, warnings, partial(train, prepare_only=prepare_only), draw_samples)


if __name__ == "__main__":
    main()
