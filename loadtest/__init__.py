"""The load test: the same work under several schedulers, measured so that the difference means something."""
