"""OCTAV proto"""
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor
from fewbit.format.fit import Range, Target
from fewbit.format.prior import Frame, Prior, best_clip, clip_blocks, expected_error, half_points

@dataclass(frozen=True, kw_only=True)
class OCTAV(Range):
    steps: int = 10
    polish: int = 3
    def __call__(self, x, fmt, importance):
        two, one = noise_constant(fmt.unit_points()), noise_constant(half_points(fmt))
        return clip_blocks(x, fmt, lambda f: self._clip(f, torch.where(f.one_sided, one, two).double()))
    def _clip(self, frame, c):
        y = frame.magnitudes()
        nonzero = y.count_nonzero(-1).double()
        s = y.sum(-1, dtype=torch.float64) / nonzero.clamp(min=1)
        self_iters = 0
        for _ in range(self.steps):
            excess, beyond = _tail(y, s)
            curvature = c * (nonzero - beyond) + beyond
            new = torch.where(beyond > 0, (excess + s * beyond) / curvature, 1.0)
            new = torch.where(nonzero > 0, new, 0.0)
            settled = ((new - s).abs() <= 1e-3 * s).all()
            s = new
            self_iters += 1
            if settled: break
        global ITERS; ITERS = self_iters
        return self._polish(frame, s, curvature)
    def _polish(self, frame, s, curvature):
        best, least = s, torch.full_like(s, torch.inf)
        centre, top = frame.centre.unsqueeze(-1), frame.top.unsqueeze(-1)
        for i in range(self.polish):
            q = frame.fmt.round_trip(frame.x, *frame.interval(s))
            q = q.sub_(centre).div_(top)
            error = q - frame.z
            slope = torch.linalg.vecdot(q, error).double() / s
            loss = torch.linalg.vecdot(error, error).double()
            best, least = torch.where(loss < least, s, best), torch.minimum(loss, least)
            if i:
                secant = (slope - last_slope) / (s - last)
                curvature = torch.where(secant > 0, secant, curvature)
            last, last_slope = s, slope
            step = (slope / curvature).nan_to_num(0)
            s = torch.minimum(torch.maximum(s - step, s * 7 / 8), s * 9 / 8).clamp(max=1)
        return best

def _tail(y, s):
    excess = torch.zeros_like(s); beyond = torch.zeros_like(s)
    level = s.to(y.dtype).unsqueeze(-1)
    for part in y.split(1 << 16, -1):
        t = (part - level).clamp_(min=0)
        excess += t.sum(-1)
        beyond += t.count_nonzero(-1)
    return excess, beyond

def noise_constant(points):
    gaps = points.diff()
    if gaps.max() - gaps.min() < 1e-6 * gaps.max():
        return gaps[0].item() ** 2 / 12
    a = best_clip(points, Prior.GAUSS, bool(points[0] >= 0))
    tail, inside = expected_error(torch.tensor([-a,a]), Prior.GAUSS), 0
    from statistics import NormalDist
    N = NormalDist()
    Q = 1 - N.cdf(a)
    return max((N.pdf(a) - a*Q) / (a * (.5 - Q)), 1e-12)
