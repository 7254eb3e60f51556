"""Contrastive divergence: the loss, its negatives, and the training of Boltzmann machines.

``contrastive_divergence`` holds the loss. ``negatives`` draws its negatives, by kernels that
``kept_kernels`` keeps where they run as graphs and ``code_identity`` finds the same energy again;
``monitor`` estimates log Z on the way, ``sampler_term`` differentiates the last transition.
``fit_rbm`` trains restricted Boltzmann machines, with the closed form of ``rbm_gradient``.
"""
