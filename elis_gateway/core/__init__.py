"""The scheduler: pure Python, no I/O, no clock, no asyncio. Inputs carry ``now``; outputs are actions.

Five nouns. A *Job* is one client request. It is served as a sequence of *Slices*, each an upstream call that
continues where the last one stopped. An *Estimate* says how many tokens remain. A *Policy* turns a job into a key,
lowest first. The *Scheduler* takes events and returns *actions*, which a driver (the live gateway, the simulator or
a test) performs.
"""
