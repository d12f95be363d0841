"""Calibration: what a model's neurons do on real text, and the predictors made from it."""
