"""The UNet, its attention, the objective and the frozen parts."""
