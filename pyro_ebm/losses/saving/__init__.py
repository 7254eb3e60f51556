"""Training that is saved and resumed.

``training`` writes everything that a training consists of to one file and loads it back;
``states`` reads, compares and restores the state of each piece: networks, optimisers, losses.
"""
