"""Thresholds by calibration: the highest with which a model's attention stays within an error that the caller names.

- `calibrate`: the function. `recording`: the calls of a dense run, kept in host memory. `search`: the thresholds of one
  group of heads, by bisection over what it recorded.
- `thresholds`: what is found, and how a model gets it. `file`: the same as TOML.
"""
