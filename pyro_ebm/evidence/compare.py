r"""Models beside each other, by their evidence.

Bayes' theorem for models :math:`M_i` with prior probabilities :math:`\pi_i` says

.. math:: P(M_i \mid y) = \frac{\pi_i\, p(y \mid M_i)}{\sum_j \pi_j\, p(y \mid M_j)}, \qquad
          \mathrm{BF}_{ij} = \frac{p(y \mid M_i)}{p(y \mid M_j)} .

With independent errors :math:`s_i` of the log evidences, that of a log Bayes factor is
:math:`\sqrt{s_i^2 + s_j^2}`.

Reference:
    Jeffreys (1961), Theory of Probability. Kass and Raftery (1995), Bayes factors.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from pyro_ebm.evidence.result import EvidenceEstimate
from pyro_ebm.ops.arguments import check_mapping, check_number


def compare_evidence(
    results: Mapping[str, EvidenceEstimate],
    prior_probabilities: Mapping[str, float] | None = None,
) -> Any:
    r"""A table of models, that with the largest evidence first.

    Args:
        results: what :func:`~pyro_ebm.log_evidence` returned, by the name of each model. They must
            be of the same data.
        prior_probabilities: of each model, before the data; equal by default.

    Returns:
        A ``pandas.DataFrame`` with a row for each model: its ``rank``; ``log_evidence`` and the
        standard error ``se``; ``log_bf``, its log evidence less that of the best model, and the
        standard error ``dse`` of this log Bayes factor; the posterior ``probability``; and the
        ``method``.

    Raises:
        ValueError: for fewer than two models, results that do not share their improper priors, or
            are of different numbers of data, and prior probabilities that are none.

    Example:
        >>> a, b, error = torch.tensor(-17.961), torch.tensor(-20.809), torch.tensor(0.01)
        >>> null = EvidenceEstimate(b, error, "bridge")
        >>> effect = EvidenceEstimate(a, error, "bridge")
        >>> table = compare_evidence({"null": null, "effect": effect})
        >>> print(table)
                rank  log_evidence    se  log_bf       dse  probability  method
        effect     0       -17.961  0.01   0.000  0.000000     0.945215  bridge
        null       1       -20.809  0.01  -2.848  0.014142     0.054785  bridge
    """
    check_mapping("results", results, EvidenceEstimate, "what log_evidence returned")
    if len(results) < 2:
        raise ValueError(f"results must be those of two or more models, got {sorted(results)}")
    _check_comparable(results)
    values, errors = (
        torch.tensor([float(getattr(result, name)) for result in results.values()]).double()
        for name in ("value", "std_error")
    )
    log_prior = _log_prior(results, prior_probabilities)
    best = int(values.argmax())
    difference = torch.where(
        torch.arange(len(values)) == best, 0.0, (errors**2 + errors[best] ** 2).sqrt()
    )
    probability = (values + log_prior).softmax(0)
    columns = {
        "log_evidence": values,
        "se": errors,
        "log_bf": values - values[best],
        "dse": difference,
        "probability": probability,
    }
    import pandas as pd

    table = pd.DataFrame({k: v.numpy() for k, v in columns.items()}, index=list(results))
    table["method"] = [result.method for result in results.values()]
    table = table.sort_values("log_evidence", ascending=False, kind="stable")
    table.insert(0, "rank", range(len(table)))
    return table


def _check_comparable(results: Mapping[str, EvidenceEstimate]) -> None:
    for name, result in results.items():
        if result.value.numel() != 1 or not result.value.isfinite().all():
            raise ValueError(f"the log evidence of {name!r} must be a number, got {result.value}")
    shared = {name: sorted(result.shared_improper) for name, result in results.items()}
    if len({tuple(sites) for sites in shared.values()}) > 1:
        raise ValueError(
            f"the models do not share their improper priors, which are those of {shared}: each"
            " evidence has an unknown factor, which cancels only where all models have it. Give"
            " proper priors to what they do not share"
        )
    sizes = {name: r.num_data for name, r in results.items() if r.num_data is not None}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the models were given different numbers of data, {sizes}: evidences are compared of"
            " the same data"
        )


def _log_prior(
    results: Mapping[str, EvidenceEstimate], given: Mapping[str, float] | None
) -> torch.Tensor:
    if given is None:
        return torch.zeros(len(results)).double()
    check_mapping("prior_probabilities", given)
    if given.keys() != results.keys():
        raise ValueError(
            f"prior_probabilities are of {sorted(given)}, and the models are {sorted(results)}"
        )
    for name, value in given.items():
        check_number(f"prior_probabilities[{name!r}]", value)
    total = sum(given.values())
    if min(given.values()) < 0 or not math.isclose(total, 1.0, rel_tol=1e-6):
        raise ValueError(f"prior_probabilities must be at least 0 and sum to 1, got {dict(given)}")
    return torch.tensor([given[name] for name in results]).double().log()
