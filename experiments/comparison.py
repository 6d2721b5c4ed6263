"""Arms against each other, paired by seed, and what may be said about it.

One family: every test that is made, of a difference and of equivalence, of the arms against the baseline and of the
hybrid against its controls, shares one Holm adjustment. A claim needs ten seeds and an adjusted p value below alpha; of
a difference, an interval without zero besides.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from experiments import statistics

if TYPE_CHECKING:
    from collections.abc import Mapping

MIN_SEEDS = 10
_CONTROLS = ("twin", "frozen", "identity")


@dataclass(frozen=True)
class Comparison:
    """One arm against another.

    Attributes:
        arm: the arm in question.
        against: the arm it is held against.
        metric: what is compared; lower is better.
        difference: mean of arm - against over the seeds [nat/token].
        interval: Student's t interval of it; None with a single seed.
        p_permutation: exact sign-flip test of no difference.
        p_holm: the same, adjusted for all tests of both kinds.
        p_tost: two one-sided tests of a difference of at least the margin; None without margin or with one seed.
        p_tost_holm: the same, adjusted for all tests of both kinds.
        n: number of seeds.
        verdict: `better`, `worse`, `equivalent`, `no evidence` or `too few seeds`, in a sentence.
    """

    arm: str
    against: str
    metric: str
    difference: float
    interval: tuple[float, float] | None
    p_permutation: float
    p_holm: float
    p_tost: float | None
    p_tost_holm: float | None
    n: int
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def compare(
    losses: Mapping[str, Mapping[int, float]], *, metric: str, margin: float | None, alpha: float
) -> list[Comparison]:
    """All comparisons that the arms allow.

    Args:
        losses: arm -> seed -> loss [nat/token]; all arms have the same seeds.
        metric: name of the loss.
        margin: a difference below this counts as none [nat/token]; None: equivalence isn't tested.
        alpha: probability of a false claim over all comparisons.
    """
    pairs = [(arm, "baseline") for arm in losses if arm != "baseline" and "baseline" in losses]
    pairs += [("hybrid", control) for control in _CONTROLS if control in losses and "hybrid" in losses]
    differences = [[losses[arm][seed] - losses[other][seed] for seed in losses[arm]] for arm, other in pairs]
    flips = [statistics.sign_flip_test(values) for values in differences]
    tosts = [None if margin is None else statistics.equivalence_test(values, margin) for values in differences]
    adjusted = statistics.holm([*flips, *(p for p in tosts if p is not None)])
    adjusted_tosts = iter(adjusted[len(flips) :])
    out = []
    for i, (arm, other) in enumerate(pairs):
        mean = math.fsum(differences[i]) / len(differences[i])
        interval = statistics.mean_interval(differences[i], confidence=1 - alpha)
        p_tost_holm = None if tosts[i] is None else next(adjusted_tosts)
        verdict = _verdict(mean, interval, adjusted[i], p_tost_holm, len(differences[i]), margin=margin, alpha=alpha)
        out.append(
            Comparison(
                arm=arm,
                against=other,
                metric=metric,
                difference=mean,
                interval=interval,
                p_permutation=flips[i],
                p_holm=adjusted[i],
                p_tost=tosts[i],
                p_tost_holm=p_tost_holm,
                n=len(differences[i]),
                verdict=verdict,
            )
        )
    return out


def _verdict(
    mean: float,
    interval: tuple[float, float] | None,
    p: float,
    p_tost: float | None,
    n: int,
    *,
    margin: float | None,
    alpha: float,
) -> str:
    if n < MIN_SEEDS:
        return f"too few seeds for a claim (n = {n} < {MIN_SEEDS})"
    differs = p <= alpha and interval is not None and not interval[0] <= 0 <= interval[1]
    same = p_tost is not None and p_tost <= alpha
    if differs:
        word = "better" if mean < 0 else "worse"
        return f"{word}, but by less than the margin of {margin:g}" if same else word
    return f"equivalent within {margin:g}" if same else "no evidence of a difference"


def overall_verdict(
    comparisons: list[Comparison], means: Mapping[str, float], floors: Mapping[str, float], *, unit: str = "nat/token"
) -> str:
    """The run in two sentences: what the main comparison says, and how far from the n-gram floor that is.

    Args:
        comparisons: of the run; the first one of the hybrid is the main one.
        means: arm -> mean loss.
        floors: `unigram`, `bigram`: losses of counting models on the same split.
        unit: of all losses.
    """
    bigram = floors["bigram"]
    gaps = [f"{arm} {means[arm]:.3f} ({means[arm] - bigram:+.3f})" for arm in ("baseline", "hybrid") if arm in means]
    gaps = gaps or [f"{arm} {mean:.3f} ({mean - bigram:+.3f})" for arm, mean in means.items()]
    floor = f"Against the bigram floor of {bigram:.3f} {unit}: {', '.join(gaps)}."
    main = next((c for c in comparisons if c.arm == "hybrid"), comparisons[0] if comparisons else None)
    if main is None:
        return f"One arm, so nothing is compared. {floor}"
    span = "" if main.interval is None else f", interval {main.interval[0]:+.4f} to {main.interval[1]:+.4f}"
    return f"{main.arm} against {main.against}: {main.verdict}; {main.difference:+.4f} {unit}{span}. {floor}"
