"""Training and exporting the length predictor. Imports torch; the serving process never imports this."""
