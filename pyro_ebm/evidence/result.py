"""An estimate of the evidence of data under a model, with what a comparison must know of it."""

from dataclasses import dataclass

from pyro_ebm.normalizer.estimate_result import NormalizerEstimate


@dataclass(frozen=True, eq=False, repr=False)
class EvidenceEstimate(NormalizerEstimate):
    r"""An estimate of the log evidence :math:`\log p(y)` of data under a model.

    It is a :class:`~pyro_ebm.normalizer.NormalizerEstimate` of :math:`\log Z`, which is the log
    evidence; ``value``, ``std_error``, ``lower``, ``upper`` and the others mean the same.
    ``float(estimate)`` is a number.

    Args:
        shared_improper: the latents with an improper prior: the evidence is then known up to the
            factor of that prior, and a comparison is with models that share it.
        num_data: how many elements were observed, masked ones not counted; None where a
            ``pyro.factor`` may hold some.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> EvidenceEstimate(zero - 20.8093, zero + 0.0123, "bridge", ess=zero + 612)
        EvidenceEstimate(log evidence = -20.809 +- 0.012, method=bridge, ESS=612)
    """

    shared_improper: tuple[str, ...] = ()
    num_data: int | None = None

    quantity = "log evidence"
