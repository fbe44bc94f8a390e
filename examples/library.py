"""The scheduler as a library: no asyncio, no HTTP, no clock. You bring the time and perform what it says.

    python examples/library.py

One slot, two requests. The long one starts because nobody else is there; after its first window the short one has
arrived and takes its place; the long one goes on where it stopped.
"""

from elis_gateway.core.actions import Action, AskEstimate, Finish, Preempt, Run
from elis_gateway.core.job import Estimate, JobSpec
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.core.policy import make_policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.core.slice import SliceEnd, SliceResult

LENGTHS = {"long": 400, "short": 20}


def main() -> list[str]:
    """Play the scene; returns what happened, a line each."""
    scheduler = Scheduler(SchedulerConfig(window=50, mode="elastic", seam_cost=2.0), make_policy("isrtf"))
    told: list[str] = []
    running: dict[str, int] = {}

    def perform(actions: list[Action], now: float) -> None:
        """What a driver does. A real one makes an upstream call for Run, and closes it for Preempt."""
        for action in actions:
            match action:
                case AskEstimate(job):
                    left = LENGTHS[job.id] - job.attained
                    perform(scheduler.estimated(job.id, Estimate(left), now), now)
                case Run(slice_):
                    running[slice_.job.id] = slice_.id
                    told.append(
                        f"{now:4.1f} s  run {slice_.job.id} on {slice_.upstream} from token {slice_.job.attained}"
                    )
                case Preempt(slice_id):
                    told.append(f"{now:4.1f} s  preempt")
                    result = SliceResult(SliceEnd.PREEMPTED, scheduler.jobs["long"].attained)
                    perform(scheduler.slice_ended(slice_id, result, now), now)
                case Finish(job):
                    told.append(
                        f"{now:4.1f} s  {job.id} is {job.outcome.value if job.outcome else '?'} after {job.jct:.1f} s"
                    )

    perform(scheduler.upstream_changed(UpstreamInfo("engine", frozenset({"m"}), slots=1), 0.0), 0.0)
    perform(scheduler.submit(JobSpec("long", "m"), 0.0), 0.0)
    perform(scheduler.slice_started(running["long"], 0.1), 0.1)
    perform(scheduler.window_passed(running["long"], 50, 1.0), 1.0)
    perform(scheduler.submit(JobSpec("short", "m"), 1.5), 1.5)
    perform(scheduler.slice_ended(running["short"], SliceResult(SliceEnd.FINISHED, 20), 2.0), 2.0)
    perform(scheduler.slice_ended(running["long"], SliceResult(SliceEnd.FINISHED, 400), 9.0), 9.0)
    return told


if __name__ == "__main__":
    print("\n".join(main()))
