"""Record data sets, and what a training run reads from them."""
