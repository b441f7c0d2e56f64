"""Modules that own weights: multi-view UNet, VAE, text tower; and the one place where foreign checkpoint keys are renamed."""
