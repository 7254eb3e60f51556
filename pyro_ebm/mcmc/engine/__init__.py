"""How transitions run: eagerly, or as one compiled graph that is guarded against change."""
