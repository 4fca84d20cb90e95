"""Students to numbers.

config.py        settings; imports no deep-learning library
labelled.py      labelled images to batches, for training and for evaluation
classifier.py    a student with a head, from random or distilled weights
run.py           the fine-tuning stage: every start with every seed
features.py      tokens of a store, pooled
linear_probe.py  a linear classifier on frozen features
evaluate.py      the evaluation stage: frozen features probed, student compared with teacher on unseen images
"""
