"""Studies in virtual time: resumable, each with a stated budget, results under benchmarks/results."""
