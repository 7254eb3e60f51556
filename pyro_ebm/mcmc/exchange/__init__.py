"""The exchange algorithm, for posteriors in which a latent moves an unknown log Z."""
