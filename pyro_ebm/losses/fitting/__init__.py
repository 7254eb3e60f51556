"""A training loop over ordinary parts of Pyro and torch.

``fit`` puts it together: ``batches`` hands out minibatches, ``rates`` makes the optimiser and its
schedule, ``average`` averages weights, ``best`` keeps the best ones, and ``loop`` goes from step to
step and keeps the history. What has a state is saved by ``save_training``.
"""
