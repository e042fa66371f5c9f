"""The accuracy harness: what a quantized cache does to a model's predictions, with the bits it took.

`schemes` names what can be compared, `texts` what is read, `forced` how; `kl`, `generate`, `recall`, `layers` and
`operator` are the measurements, `results` keeps them, `stats` gives their intervals.
"""
