"""What is wrong with tempered particles, in words, with the next thing to try."""

from pyro_ebm.diagnostics.convergence import Finding
from pyro_ebm.evidence.smc.moves import MAX_MOVES
from pyro_ebm.evidence.smc.particles import effective_sample_size
from pyro_ebm.evidence.smc.run import TemperedRun

FEW_ANCESTORS = 30.0
"""From so few effective ancestors no error can be estimated."""
LITTLE_ACCEPTED = 0.1
REMEMBERED = 0.8

MORE = "more particles (num_particles=)"
NEARER = "a start that is nearer (guide=)"
MOVES = "more transitions at each temperature (num_moves=)"
KERNEL = "another kernel (kernel=)"


def findings_of(run: TemperedRun) -> list[Finding]:
    """The findings of a run that has come to its end."""
    found = []
    ess = float(effective_sample_size(run.log_weights))
    if ess < FEW_ANCESTORS:
        text = (
            f"the particles descend from {ess:.3g} draws of the start, in effect, of"
            f" {run.num_particles}: the error of the evidence cannot be estimated, and modes may be"
            " missing"
        )
        found.append(Finding("ancestors", text, [MORE, "smaller steps (ess_drop=)", NEARER]))
    if not run.path.dim:
        return found
    low = [t for t in run.temperatures if t.acceptance < LITTLE_ACCEPTED]
    if low:
        worst = min(low, key=lambda t: t.acceptance)
        text = (
            f"at {len(low)} of {len(run.temperatures)} temperatures hardly any move is accepted"
            f" ({100 * worst.acceptance:.2g}% at beta = {worst.beta:.3g}): copies stay copies"
        )
        found.append(Finding("acceptance", text, [KERNEL, "a smaller first step_size", MOVES]))
    slow = [t for t in run.temperatures if t.correlation > REMEMBERED]
    if slow and not low:
        worst = max(slow, key=lambda t: t.correlation)
        text = (
            f"at {len(slow)} of {len(run.temperatures)} temperatures the particles hardly moved:"
            f" the log density after {worst.moves} transitions has a correlation of"
            f" {worst.correlation:.2f} with that before"
        )
        more = MOVES if worst.moves < MAX_MOVES else KERNEL
        found.append(Finding("stuck", text, [more, KERNEL] if more != KERNEL else [KERNEL]))
    return found


__all__ = ["findings_of"]
