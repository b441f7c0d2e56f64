"""Modules that own weights: multi-view UNet, VAE, text tower; foreign checkpoint keys are renamed in checkpoints/."""
