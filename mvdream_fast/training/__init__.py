"""The trainers of UNet, autoencoder and evaluator, and the loop around them."""
