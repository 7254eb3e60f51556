"""Score matching: losses in the gradient of the log density, in which log Z does not appear.

One file for each loss, the score with its weight at the boundary that they share, and the check
that an energy is smooth enough.
"""
