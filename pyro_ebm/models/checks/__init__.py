"""What a model must fulfil to be sampled: one fixed density, fixed supports, no hidden log Z."""
