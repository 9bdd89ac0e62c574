"""The GGI inbetweening module: CogVideoX-5B-I2V with flow-warped noise, two end frames and an edge condition."""
