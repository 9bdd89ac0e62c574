"""Networks, losses and pure maths of the video autoencoders."""
