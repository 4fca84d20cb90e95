"""What is on disk, and how it is read and written. Imports no deep-learning library.

errors.py       the exceptions a user can meet, with their exit codes
schema.py       frozen, checked records that are equal to their JSON
atomic.py       the only place that publishes files: write, fsync, rename
lock.py         one writer a folder
fingerprint.py  content hashes
stage.py        what every stage returns, and the progress contract
records.py      views, tokens, shards, the store's plan and manifest
views.py        which crop of an image (samplers) and its pixels (render_view)
images.py       where image bytes come from: class folders, tars
decode.py       image bytes to pixels
resize.py       the antialiased resize behind render_view
jpeg.py         rendered views as JPEG, for stores that keep them
image_index.py  the list of images with labels, digests and split
zarr_format.py  the bytes of a sharded Zarr v3 array
writer.py       shards to a store: private attempt, fsync, publish, receipt
reader.py       a store to records and batches
verify.py       is every byte what its receipt says?
"""
