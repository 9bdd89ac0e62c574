"""Networks and maths: noise warp, optical flow, edges, the transformer and its LoRAs, the objective."""
