"""The report that people look at: plots, and one HTML page that works offline. Needs matplotlib."""
