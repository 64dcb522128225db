"""Density of a NABLA mask, before there is one (§5.4): the share of block pairs that `thr` keeps.

Pooled logits that are normal with standard deviation σ give log-normal probabilities. Of these, the largest that hold
the mass thr are a share Φ(Φ⁻¹(thr) − σ) of the blocks: the Lorenz curve of the log-normal distribution. The NABLA
paper (arXiv 2507.13546) measured densities of 7.5% at thr 0.4 and 20% at thr 0.7 on Wan 2.1 14B at 720p; σ is the
mean of what each of the two says, 1.19 and 1.37. STA windows are not added: the released ones are small.
"""

from statistics import NormalDist, fmean

from k5kernels.planner.checks import share

_NORMAL = NormalDist()
MEASURED = {0.4: 0.075, 0.7: 0.20}  # thr: density
LOGIT_DEVIATION = fmean(_NORMAL.inv_cdf(thr) - _NORMAL.inv_cdf(density) for thr, density in MEASURED.items())


def nabla_density(thr: float | None) -> float:
    """Expected density of a NABLA mask; 1 where thr is None (full attention) or 1.

    Raises ValueError where thr is neither None nor above 0 and up to 1.
    """
    if thr is None or share("nabla_thr", thr) == 1:
        return 1.0
    return _NORMAL.cdf(_NORMAL.inv_cdf(thr) - LOGIT_DEVIATION)
