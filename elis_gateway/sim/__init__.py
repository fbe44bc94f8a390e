"""A modelled batching engine: in virtual time under the scheduler, or behind real HTTP (``sim-engine``)."""
