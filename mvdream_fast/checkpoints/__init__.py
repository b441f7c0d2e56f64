"""Foreign weights in, our model folder out; keys are renamed here, once."""
