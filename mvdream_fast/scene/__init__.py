"""What is optimised: representations, and what is made of them."""
