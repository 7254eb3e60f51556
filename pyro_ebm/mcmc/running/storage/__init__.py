"""Where a run is kept: draws in memory or in a Zarr store, its state in checkpoints."""
