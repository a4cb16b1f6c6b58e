"""The traffic of the rollout simulation: what every request would get from stable, and what from the canary.

Both answers of a request share everything that is not the release's doing (its session, the length of its prompt, the
hour, its luck), so every rule can be given the same traffic, and an answer of the canary is bad when it is worse than
stable's would have been. Times are seconds from the begin of the rollout, latencies milliseconds.

- Sessions arrive as an inhomogeneous Poisson process: the day's wave at a random hour, and rushes of some minutes. A
  session has a geometric number of requests with exponential pauses, and stays on the release that its hash gives it:
  a larger weight only adds sessions (as the gateway does it).
- First token and time per token are lognormal, with effects of the session, of the prompt's length and of the load.
- Errors have a base rate that differs between rollouts (0.3 to 1%) and between sessions. An incident hits both
  releases alike.
- A fifth of the answers is judged (0 to 1) some seconds later, and a twentieth gets a thumb some minutes later.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

STABLE, CANARY = 0, 1
HORIZON_S = 2 * 3600.0
REQUESTS_A_SECOND = 20.0
IN_A_SESSION = 4.0
PAUSE_S = 45.0
WARM_S = 600.0
"""Sessions that began so long before the rollout are already there."""
FIRST_TOKEN_MS, TOKEN_MS = 250.0, 20.0
GIVEN_UP_S = 300.0
"""The gateway ends a request that stays silent for so long, with a 504."""
JUDGED, THUMBED = 0.2, 0.05


@dataclass(frozen=True)
class Fault:
    """What is wrong. `errors`: that many more of the canary's answers fail; `first_token`: its time, as a factor;
    `broken`: share of its answers that are worth nothing; `outage`, `silent`: from some moment of the first half hour
    on it fails everything, or takes requests and never answers. `incident`: both releases suffer for some minutes."""

    errors: float = 0.0
    first_token: float = 1.0
    broken: float = 0.0
    outage: bool = False
    silent: bool = False
    incident: bool = False


@dataclass(frozen=True)
class Traffic:
    """Requests [n] in the order in which they start. Arrays [2, n] hold stable's answers and the canary's.

    `place` is the session's hash, 0 to 100: it is on the canary when its place is below the weight. `score` and `thumb`
    (1 is down) are NaN where there is none; `score_known` and `thumb_known` say when there is one. `bad`: the canary's
    answer is worse than stable's. `begun` is when the fault begins.
    """

    start: Floats
    session: Ints
    place: Floats
    end: Floats
    failed: Bools
    first_token: Floats
    per_token: Floats
    score: Floats
    score_known: Floats
    thumb: Floats
    thumb_known: Floats
    bad: Bools
    begun: float


def generate(fault: Fault, rng: np.random.Generator) -> Traffic:
    """Traffic for `HORIZON_S` seconds."""
    start, session = _arrivals(rng)
    n, sessions = len(start), int(session.max()) + 1
    load = _load(rng, start)
    base = rng.uniform(0.003, 0.01)
    nervous = rng.gamma(2.0, 0.5, sessions)[session]  # some sessions ask for what fails: mean 1
    luck = rng.random(n)
    risk = np.tile(np.minimum(base * nervous, 0.5), (2, 1))
    slow = np.zeros((2, n))
    begun = 0.0
    if fault.incident:
        at, lasts = rng.uniform(60, 3600), rng.uniform(180, 480)
        hit = (start >= at) & (start < at + lasts)
        risk[:, hit] += rng.uniform(0.1, 0.3)
        slow[:, hit] += np.log(rng.uniform(1.5, 3.0))
    risk[CANARY] += fault.errors
    if fault.outage or fault.silent:
        begun = float(rng.uniform(0, 1800))
        risk[CANARY, start >= begun] = 1.0
    failed: Bools = luck < risk
    prompt = rng.normal(0, 1, n)
    slow += rng.normal(0, 0.3, sessions)[session] + 0.25 * prompt + 0.3 * load + rng.normal(0, 0.35, n)
    slow[CANARY] += np.log(fault.first_token)
    first_token: Floats = np.where(failed, np.nan, FIRST_TOKEN_MS * np.exp(slow))
    pace = rng.normal(0, 0.1, sessions)[session] + 0.1 * load + rng.normal(0, 0.15, n)
    per_token: Floats = np.where(failed, np.nan, TOKEN_MS * np.exp(pace))
    tokens = np.exp(rng.normal(np.log(120), 0.7, n)).clip(4, 1000)
    end: Floats = start + np.where(failed, 0.05, np.nan_to_num(first_token + tokens * per_token) / 1000)
    if fault.silent:
        end[CANARY, start >= begun] = start[start >= begun] + GIVEN_UP_S
    worth = rng.beta(6.0, 1.5, n)
    broken = np.stack((np.zeros(n, dtype=bool), rng.random(n) < fault.broken))
    judged = ~failed & (rng.random(n) < JUDGED)
    score = np.where(judged, np.where(broken, 0.05 * worth, worth), np.nan)
    thumbed = ~failed & (rng.random(n) < THUMBED)
    down = rng.random(n) < np.where(broken, 0.8, 0.12)
    thumb = np.where(thumbed, down.astype(np.float64), np.nan)
    bad = failed[CANARY] & ~failed[STABLE] | broken[CANARY]
    if fault.first_token > 1:
        bad |= ~failed[CANARY]
    return Traffic(
        start, session, rng.random(sessions)[session] * 100, end, failed, first_token, per_token,
        score, end + 5 + rng.exponential(20, n), thumb, end + rng.lognormal(np.log(40), 1, n), bad, begun,
    )  # fmt: skip


def _arrivals(rng: np.random.Generator) -> tuple[Floats, Ints]:
    """Starts of the requests, sorted, and the session of each."""
    phase, wave = rng.uniform(0, 2 * np.pi), 0.5
    rushes = [(rng.uniform(0, HORIZON_S), rng.uniform(180, 900)) for _ in range(rng.poisson(3))]
    most = REQUESTS_A_SECOND / IN_A_SESSION * (1 + wave) * 2
    came = np.sort(rng.uniform(-WARM_S, HORIZON_S, rng.poisson(most * (HORIZON_S + WARM_S))))
    rate = 1 + wave * np.sin(2 * np.pi * came / 86400 + phase)
    for at, lasts in rushes:
        rate = np.where((came >= at) & (came < at + lasts), 2 * rate, rate)
    came = came[rng.random(len(came)) * (1 + wave) * 2 < rate]
    count = rng.geometric(1 / IN_A_SESSION, len(came))
    first = np.cumsum(count) - count
    pauses = rng.exponential(PAUSE_S, int(count.sum()))
    pauses[first] = 0
    passed = np.cumsum(pauses)
    start = np.repeat(came, count) + passed - np.repeat(passed[first], count)
    session = np.repeat(np.arange(len(came)), count)
    inside = (start >= 0) & (start < HORIZON_S)
    order = np.argsort(start[inside], kind="stable")
    return start[inside][order], session[inside][order]


def _load(rng: np.random.Generator, start: Floats) -> Floats:
    """How busy the servers are at each start, around 0: requests of that minute, and a slow wander."""
    minutes = int(HORIZON_S // 60) + 1
    minute = (start // 60).astype(np.int64)
    busy = np.bincount(minute, minlength=minutes) / (60 * REQUESTS_A_SECOND)
    wander = np.cumsum(rng.normal(0, 0.05, minutes))
    load: Floats = (busy - 1 + wander)[minute]
    return load
