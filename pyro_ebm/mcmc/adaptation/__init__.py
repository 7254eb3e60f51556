"""What warmup learns: step size, mass matrix, length of trajectories."""
