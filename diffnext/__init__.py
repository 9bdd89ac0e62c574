"""NOVA: autoregressive text-to-image and text-to-video generation without vector quantization."""
