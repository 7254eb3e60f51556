"""What the distributions stand on: supports, their parts, points of discrete spaces, masks."""
