"""The Gaussian refiner: repairs renders of 3D-Gaussian scenes with the help of a photo from another camera."""
