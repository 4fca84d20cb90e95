"""Images to whitened teacher tokens.

config.py      settings; imports no deep-learning library
spec.py        what is known about a teacher before its weights are loaded
teachers.py    the table of teachers: data only
resolve.py     the teacher that settings ask for
weights.py     where a teacher's weights come from, and their fingerprint
  checkpoints.py         the upstreams' file formats
  torchscript.py         OpenAI's TorchScript archives, read as data
  inert_pickle.py        the structure of torch's files, with nothing that could run
  hub.py                 files of the hub: from its cache, or downloaded, or one line that says why not
  download.py            a file behind a plain URL, whole or not at all
backends.py    a teacher's row of data to a module that gives tokens, by its library's builder:
  timm_teachers.py       timm's networks
  open_clip_teachers.py  open_clip's image towers
  file_teachers.py       a network from a Python file of the user's own
  beside.py              the modules beside such a file
  toy.py                 a tiny network for tests
  built.py               what a builder gives: a module, its tap, how files are fitted to it
  cost.py                parameters and operations of a network, counted without memory
teacher.py     a frozen teacher: pixels to tokens, in a precision
spread.py      a network over several GPUs
precision.py   how far its fast path is from float32
measure.py     what each precision changes, and how fast it is
batch_size.py  how many views go through it at a time
free_memory.py how much memory there still is
whiten.py      whitening of a batch: layer_norm, mean_std, pca, none
encode.py      int8 on the device
sample.py      a sample of views, to learn from
fit.py         what whitening learns from a sample of views
plan.py        a store's plan, before anything is extracted
extraction.py  what a worker elsewhere needs to know of an unfinished store
render.py      images to the views that teachers look at
shard.py       one shard of one or several stores: read, render, forward, whiten, encode, commit
worker.py      the teachers and stores of one process
timing.py      where a worker's time goes
jobs.py        the words between the driver and its workers
driver.py      hands out jobs, and decides about what fails
  worker_state.py        what it knows about a worker
  failures.py            what a worker's error means
  deaths.py              when there is no use in starting another worker
  deadlines.py           when a job is taken for hung
isolate.py     which image ends every worker that looks at it
pools.py       workers by the name of their executor:
  inline_pool.py         in this process
  process_pool.py        processes of this machine
  ray_pool.py            on Ray
  ray_session.py         a local Ray, or a seat on a cluster; these two alone import ray
  turns.py               the order in which a worker process begins its jobs
  held_back.py           keeps SIGTERM from processes that are to outlive it
watch.py       what is said of an extraction: progress line, events, summary
summary.py     what is said at its end
events.py      what happens to a store while it is filled, as a file beside it
fill.py        the jobs that are missing, carried out by workers, with what becomes of each
audit.py       random records of a store, made again and compared
final_audit.py the same by a store's own teacher: what every extraction ends with, and `make audit`
filling.py     one store while it is filled, and its metrics
sharing.py     which jobs are this driver's, where several fill the same stores
trial.py       how fast an extraction would go
preflight.py   is there a place for the stores, before a teacher is loaded
retry.py       forgets what was given up
online.py      a teacher in the training loop, without a store
join.py        helps a command that is filling a store
run.py         the stage: one store, or several in one pass over the images
"""
