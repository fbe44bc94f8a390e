"""OpenAI's formats: bytes and dicts in, values out. No sockets, no clock, no scheduling."""
