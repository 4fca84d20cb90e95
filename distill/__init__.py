"""Stored tokens to a student. No teacher is ever loaded here.

config.py      settings; imports no deep-learning library
student_config.py  which network a student is; neither
order.py       which images and views a step sees: a pure function of (seed, step)
prefetch.py    batches made ahead by threads; decoded images kept in memory where they fit
pixels.py      what the student sees: stored views, or views rendered from the images
targets.py     stored tokens to training targets, on the device
objective.py   what one teacher's store asks of a student: a batch to a loss
live.py        the other way: a teacher that runs in every step, given from outside
stream.py      a store and its images to batches
student.py     the student and its projector
loss.py        the loss
optim.py       parameter groups, learning rate as a function of the step
checkpoint.py  atomic, hashed checkpoints; the newest valid one wins
loop.py        the training loop, which fine-tuning runs too
run.py         the stage
"""
