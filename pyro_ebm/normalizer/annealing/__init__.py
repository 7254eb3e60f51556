"""Annealed importance sampling: paths, temperature schedules, and the estimate."""
