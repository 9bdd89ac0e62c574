"""Networks and pure maths of the refiner: attention, UNet loading, training objective, denoising."""
