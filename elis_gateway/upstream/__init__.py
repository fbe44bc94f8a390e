"""Calls to inference servers: the only place that opens client connections."""
