"""Thresholds by calibration: the highest with which a model's attention stays within an error that the caller names.

- `calibrate`: the function. `search`: the bisection. `trial`: thresholds on trial in one layer. `watch`: the calls of a
  model's layers. `progress`: the bar.
- `thresholds`: what is found, and how a model gets it. `file`: the same as TOML.
"""
