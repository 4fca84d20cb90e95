"""What is on disk, and how it is read and written. Imports no deep-learning library.

errors.py       the exceptions a user can meet, with their exit codes
schema.py       frozen, checked records that are equal to their JSON
atomic.py       the only place that publishes files: write, fsync, rename
lock.py         one writer a folder
fingerprint.py  content hashes
stage.py        what every stage returns, and the progress contract
records.py      views, tokens, shards, the store's plan and manifest
views.py        which crop of an image (samplers) and its pixels (render_view)
image_source.py what a source of images is
image_folder.py a folder of class folders as a source
image_tars.py   tars of images as a source
images.py       a source by its path
decode.py       image bytes to pixels
resize.py       the antialiased resize behind render_view
jpeg.py         rendered views as JPEG, for stores that keep them
columns.py      keys, digests and other columns of a million rows in one sealed file
image_list.py   images with labels and digests, in memory and on disk
image_digests.py  digests of a data set's images, each taken once
image_index.py  all images of a data set and their split: list, digest, divide
zarr_format.py  the bytes of a sharded Zarr v3 array
writer.py       shards to a store: private attempt, fsync, publish, receipt
reader.py       a store to records and batches
verify.py       is every byte what its receipt says?
"""
