"""How good a personalised model is: the paper's five metrics, and its whole protocol.

judges.py looks at pictures (CLIP, DINO and LPIPS, or the toybox's judge), metrics.py makes the
paper's numbers of what they saw, subjects.py reads the data set, drawing.py draws what is scored.
On these stand three commands: `python -m minibooth.evaluate` (one subject, single.py),
`… evaluate dataset` (protocol.py and tables.py) and `… evaluate snapshots` (snapshots.py).
May import everything but bench; nothing imports it.
"""
