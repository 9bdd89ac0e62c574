"""Video autoencoders: WFVAE and CausalVAE, trained with a GAN loss, reconstructed, evaluated."""
