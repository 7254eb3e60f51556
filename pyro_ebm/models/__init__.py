"""What a Pyro model says of itself: its latent sites, and whether it is one fixed density."""
