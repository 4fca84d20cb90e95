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
initial_weights.py  how a student begins
token_layout.py  any network's tokens, as prefix and grid
token_grid.py  the grids of student and teacher
loss.py        the losses
optim.py       parameter groups, learning rate as a function of the step
device.py      where the student is trained, and in which precision
transfer.py    batches to the device while the one before is computed
parallel.py    one model on several devices
ema.py         a running mean of the weights
state.py       all that a training has learnt, as tensors by name
checkpoint.py  atomic, hashed checkpoints; the newest valid one wins
trackers.py    where curves go: a file, TensorBoard and others
gauges.py      loss, speed, waiting and memory while it runs
loop.py        the training loop, which fine-tuning runs too
job.py         one distillation as data
session.py     one process's work on it: stores, model, loss, training, results
relay.py       progress and stops between processes, by files
worker.py      one of several processes
parent.py      a process that ends with the one which started it
agent.py       torchrun that ends with the command that started it
launch.py      several processes for one distillation
launch_ray.py  the same by Ray Train; the only file here that knows Ray
run.py         the stage
saved_student.py  a student that a run or an import left in a folder, as a network
authors.py     the shape and tensors of the authors' checkpoints
importing.py   a student from the authors' checkpoints
export.py      a student as a folder that other programs read
export_folder.py  that folder in its place: whole or not at all
timm_folder.py  what timm and the hub find in it
model_card.py  its README
onnx.py        the student as an ONNX graph
"""
