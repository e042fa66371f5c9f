"""Finding the fields of a preset for one model: thresholds of `paper`, or a profile over the layers of ours.

`reading` measures on calibration text, `thresholds` scales a pair to a number of bits, `study` searches pairs with
optuna, `profile` gives every layer its own bits. The result is a `mixkvq.calibration.Calibration`.
"""
