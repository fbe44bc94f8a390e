"""Where jobs wait and who goes next: one shared queue per pool, one queue per upstream for the jobs it keeps warm.

Knows: upstreams, pools, queues, and what moving a job costs. Never: states of jobs, actions.

A free slot takes the better of its upstream's own head and the shared heads of the models it serves. Where all of them
are empty it takes a job that waits for its warm home elsewhere, unless prefilling that job again would cost more than
its wait.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from elis_gateway.core.job import Job
from elis_gateway.core.placement import Pool, Running, Upstream
from elis_gateway.core.policy import FCFS, Policy, remaining_tokens
from elis_gateway.core.ready import END, Head, ReadyQueue

__all__ = ["WaitingRoom"]

_CONVERSATIONS = 20_000
_SHUNNED = 256
"""An upstream that has just failed so many of those who are next may stay idle: to look further, at every event, costs
more than it would serve."""


class WaitingRoom:
    """All queues, and the choices between them."""

    def __init__(self, seconds_per_token: float, prefill_tokens_per_second: float, seam_tokens: float) -> None:
        self.upstreams: dict[str, Upstream] = {}
        self.pools: dict[str, Pool] = {}
        self.seam_tokens = seam_tokens
        """What ending one call and starting another costs, in decoded tokens."""
        self.policy: Policy = FCFS()
        """Set by the scheduler; asked again only where a waiting job would make a running one yield."""
        self._seconds_per_token = seconds_per_token
        self._prefill = prefill_tokens_per_second
        self._conversations: OrderedDict[str, str] = OrderedDict()

    def pool(self, model: str, now: float) -> Pool:
        """The pool of ``model``, made on first use."""
        pool = self.pools.get(model)
        if pool is None:
            pool = self.pools[model] = Pool(model, self._seconds_per_token, now)
        return pool

    def margin(self, job: Job) -> float:
        """The seam in seconds: by how much a waiting job's key must be better before ``job`` yields."""
        return self.seam_tokens * job.pool.seconds_per_token

    def seam_took(self, seconds: float, pool: Pool) -> None:
        """The first token of a continuation came so late: what preempting this job has cost."""
        seam = seconds / pool.seconds_per_token - 1.0
        if seam < 0.0:
            seam = 0.0
        elif seam > 200.0:
            seam = 200.0
        self.seam_tokens += 0.05 * (seam - self.seam_tokens)

    def queue_of(self, job: Job) -> ReadyQueue:
        """Where ``job`` waits, or would."""
        return self.upstreams[job.home].queue if job.home is not None else job.pool.queue

    def count(self) -> int:
        """Jobs in all queues."""
        return sum(p.queue.live for p in self.pools.values()) + sum(u.queue.live for u in self.upstreams.values())

    # ---- stickiness -------------------------------------------------------------------------------------------

    def home(self, job: Job) -> Upstream | None:
        """The upstream that keeps ``job`` warm, where it is there, up, and still serving the job's model."""
        upstream = self.upstreams.get(job.home) if job.home is not None else None
        return upstream if upstream is not None and upstream.serves(job.spec.model) else None

    def remember(self, job: Job) -> None:
        """The next turn of this conversation will find its prefix where ``job`` ran last."""
        key = job.spec.conversation
        if key is not None and job.home is not None:
            self._conversations[key] = job.home
            self._conversations.move_to_end(key)
            if len(self._conversations) > _CONVERSATIONS:
                self._conversations.popitem(last=False)

    def warm_home(self, job: Job) -> str | None:
        """The upstream that served this conversation last, where it can serve it again."""
        key = job.spec.conversation
        home = self._conversations.get(key) if key is not None else None
        upstream = self.upstreams.get(home) if home is not None else None
        return home if upstream is not None and upstream.serves(job.spec.model) else None

    def free_upstream(self, job: Job, pool: Pool, window: int | None) -> Upstream | None:
        """The slot a job that just became READY may take at once: its warm home, else the least loaded that pays."""
        best: Upstream | None = None
        for upstream in pool.upstreams:
            if not upstream.takes or (job.avoid is not None and self.shuns(job, upstream)):
                continue
            if upstream.info.id == job.home:
                return upstream
            if best is None or upstream.load < best.load:
                best = upstream
        if best is not None and job.home is not None and not self.move_pays(job, window):
            return None
        return best

    def shuns(self, job: Job, upstream: Upstream) -> bool:
        """Did ``upstream`` just fail ``job`` while another is up? A broken replica is always the least loaded."""
        if job.avoid != upstream.info.id:
            return False
        return any(other is not upstream and other.info.slots for other in job.pool.upstreams)

    def move_pays(self, job: Job, window: int | None) -> bool:
        """Is prefilling ``job`` on a cold replica cheaper than the wait for a slot at its warm home?

        ``window``: the most tokens any slice there runs before its slot is free, where windows are fixed.
        """
        home = self.upstreams[job.home]  # type: ignore[index]
        prefill = (job.spec.prompt_tokens + job.attained) / self._prefill
        left = min((self._left(r.job, window) for r in home.running.values()), default=0.0)
        return prefill < left * job.pool.seconds_per_token

    def _left(self, job: Job, window: int | None) -> float:
        left = remaining_tokens(job, job.pool)
        return left if window is None else min(left, float(window))

    # ---- who goes next ----------------------------------------------------------------------------------------

    def is_wanted(self, upstream: Upstream) -> bool:
        """Does anybody wait who could run there?"""
        if upstream.queue.live:
            return True
        for pool in upstream.pools:  # noqa: SIM110 (a generator costs more than all the rest)
            if pool.queue.live:
                return True
        return False

    def best_for(self, upstream: Upstream, now: float) -> Head | None:
        """The job that should have the next slot of ``upstream``; it stays in its queue."""
        queue = upstream.queue
        best = queue.head(now) if queue.live else None
        for pool in upstream.pools:
            queue = pool.queue
            if queue.live:
                head = queue.head(now)
                if head is not None and (best is None or head < best):
                    best = head
        return best

    def next_for(self, upstream: Upstream, now: float) -> Head | None:
        """The same, past those whom ``upstream`` has just failed: the others need not wait because of them."""
        head = self.best_for(upstream, now)
        if head is None or head[4].avoid is None or not self.shuns(head[4], upstream):
            return head
        return self.nth_for(upstream, 1, now)

    def nth_for(self, upstream: Upstream, n: int, now: float, bound: tuple[float, ...] = END) -> Head | None:
        """The job that should have the ``n``-th next slot of ``upstream``, if it comes before ``bound``."""
        count = n
        while True:
            heads = self._best(count, upstream, now, bound)
            able = [head for head in heads if head[4].avoid is None or not self.shuns(head[4], upstream)]
            if len(able) >= n:
                return able[n - 1]
            if len(heads) < count or count - n >= _SHUNNED:
                return None
            count = 4 * count + n

    @staticmethod
    def _best(count: int, upstream: Upstream, now: float, bound: tuple[float, ...]) -> list[Head]:
        heads = upstream.queue.best(count, now, bound)
        for pool in upstream.pools:
            heads += pool.queue.best(count, now, bound)
        heads.sort()
        return heads[:count]

    def stray_for(self, upstream: Upstream, window: int | None, now: float) -> Head | None:
        """Nothing waits here: a job that waits for its warm home elsewhere, where moving it pays."""
        best: Head | None = None
        for other in self.upstreams.values():
            if other is upstream or not other.queue.live:
                continue
            head = other.queue.head(now)
            if head is None or head[4].spec.model not in upstream.info.models or (best is not None and best < head):
                continue
            if self.move_pays(head[4], window):
                best = head
        return best

    def queued_elsewhere(self, upstream: Upstream) -> Running | None:
        """Nobody waits here for a slot of ``upstream``: a call that waits for one in another engine's queue, where it
        was sent for want of a better place."""
        for pool in upstream.pools:
            for other in pool.upstreams:
                if other is upstream or not other.info.overcommit:
                    continue
                for running in other.queued_calls():
                    if running.cold and running.job.spec.sliceable and not self.shuns(running.job, upstream):
                        return running
        return None

    # ---- who yields -------------------------------------------------------------------------------------------

    def yields_to(self, job: Job, pool: Pool, now: float) -> Sequence[Running]:
        """``job`` waits and nothing is free: who should end for it?"""
        if job.home is not None:
            return self.yields_on(self.upstreams[job.home], now)
        if len(pool.upstreams) == 1:
            return self.yields_on(pool.upstreams[0], now)
        worst: Upstream | None = None
        worst_key: tuple[int, float] | None = None
        for upstream in pool.upstreams:
            victim = upstream.victim(now)
            if victim is None or (job.avoid is not None and self.shuns(job, upstream)):
                continue
            key = (victim.job.spec.rank, victim.key)
            if worst_key is None or key > worst_key:
                worst, worst_key = upstream, key
        if worst is None and pool.upstreams:
            worst = max(pool.upstreams, key=lambda u: len(u.unstarted))
        return self.yields_on(worst, now) if worst is not None else ()

    def yields_on(self, upstream: Upstream, now: float) -> Sequence[Running]:
        """Compare who waits for ``upstream`` with who runs there: the slices that should end, at most one of a kind."""
        if upstream.info.overcommit:
            queued = upstream.queued_calls()
            if queued:
                return self._yields_queued(upstream, queued, now)
        if upstream.free > 0 or (head := self.next_for(upstream, now)) is None:
            return ()
        victim = upstream.victim(now)
        if victim is None or (head[1] and not self._is_ahead(head, victim)):
            # Whoever comes after the first is not ahead either; behind an overdue job somebody may be.
            return ()
        if upstream.ending:
            # Slots about to free are spoken for by the best who wait; the next one needs a victim of its own.
            nth = self.nth_for(upstream, upstream.ending + 1, now, (victim.job.spec.rank, 1, victim.key))
            if nth is None:
                return ()
            head = nth
        return (victim,) if self._deserves(head, victim) else ()

    def _yields_queued(self, upstream: Upstream, queued: list[Running], now: float) -> list[Running]:
        """The engine keeps a queue: first the right calls must be in it, then the best of them may need a slot."""
        found: list[Running] = []
        head = self.next_for(upstream, now)
        if head is not None and upstream.free <= 0:
            others = [r for r in queued if r.job.spec.sliceable and not self._is_overdue_beside(r.job, head, now)]
            worst = max(others, key=lambda r: (r.job.spec.rank, r.key), default=None)
            if worst is not None and (self._is_due_before(head, worst) or self._deserves(head, worst)):
                found.append(worst)
        victim, first = upstream.victim(now), queued[0]
        if victim is not None and first not in found:
            sent = (first.job.spec.rank, 1, first.key, first.id, first.job)
            if self._deserves(sent, victim):
                found.append(victim)
        return found

    @staticmethod
    def _is_overdue_beside(job: Job, head: Head, now: float) -> bool:
        """Would ``job``, taken back from the engine's queue, be next in line again, before ``head``?"""
        return job.due is not None and job.due <= now and job.spec.rank == head[0]

    @staticmethod
    def _is_due_before(head: Head, sent: Running) -> bool:
        """Is ``head`` overdue, and ``sent`` a call of no better class that has not begun? The next slot is the overdue
        job's; it evicts nobody who runs, but taking back a call that waits costs nothing."""
        rank, late, _, _, _ = head
        return late == 0 and rank <= sent.job.spec.rank

    def _is_ahead(self, head: Head, victim: Running) -> bool:
        """Is the waiting job's key better than ``victim``'s by more than the seam costs? A higher class always is."""
        rank, late, key, _, _ = head
        job = victim.job
        if rank != job.spec.rank:
            return rank < job.spec.rank
        # An overdue job is next for a slot, but evicts nobody: its key here is a due time.
        return late == 1 and key + self.seam_tokens * job.pool.seconds_per_token < victim.key

    def _deserves(self, head: Head, victim: Running) -> bool:
        """Is it ahead by today's pace and gamma, too? The victim's key was made at those, the waiting job's when it
        came: on an engine that has become slower since, the victim would look longer than it is."""
        if not self._is_ahead(head, victim):
            return False
        rank, _, _, _, job = head
        if rank != victim.job.spec.rank:
            return True
        return self.policy.key(job, job.pool, job.ready_since) + self.margin(victim.job) < victim.key
