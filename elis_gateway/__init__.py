"""A reverse proxy for OpenAI-compatible LLM servers that runs the shortest remaining request first."""

__version__ = "0.1.0"
