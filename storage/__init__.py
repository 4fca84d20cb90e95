"""What is on disk, and how it is read and written. Imports no deep-learning library.

errors.py       the exceptions a user can meet, with their exit codes
schema.py       frozen, checked records that are equal to their JSON
atomic.py       the only place that publishes files: write, fsync, rename
lock.py         one writer a folder
claims.py       which shards are whose, where several processes fill a store
attempts.py     where a writer keeps a shard that is not published yet
quarantine.py   shards that were given up
process_lock.py a lock that a forked child finds open
fingerprint.py  content hashes
stage.py        what every stage returns, and the progress contract
pace.py         how fast work goes now
encodings.py    how whitened tokens become bytes: fp16, int8, bit_round, zstd
whitening.py    how teachers' tokens became the stored ones: layer_norm, mean_std, pca, none; and back
token_subset.py a random part of each view's tokens
records.py      views, tokens, shards, the store's plan and manifest
views.py        which crop of an image (samplers) and its pixels (render_view)
image_source.py what a source of images is
image_folder.py a folder of class folders as a source
image_tars.py   tars of images as a source
image_parquet.py Parquet files of images as a source
data_files.py   the files that hold a data set, read by parts
file_parts.py   parts of a file as a file, for libraries that seek in one
parquet_footer.py where each column of a Parquet file lies, and every number of that checked
parquet_columns.py which of the columns hold images, labels and names
parquet_table.py a Parquet file, unpacked as far as memory is allowed
thrift.py       the protocol of Parquet's footers and page headers
held_values.py  large values that threads share: each made once, the newest held
tar_members.py  where the images lie in tars, kept from one command to the next
remote_data.py  data sets behind a URL: their files, and class folders
images.py       a source by its path or URL
decode.py       image bytes to pixels
resize.py       the antialiased resize behind render_view
jpeg.py         rendered views as JPEG, for stores that keep them
columns.py      keys, digests and other columns of a million rows in one sealed file
image_list.py   images with labels and digests, in memory and on disk
skipped_images.py images that are left out of training, by name
image_digests.py digests of a data set's images, each taken once
image_index.py  all images of a data set and their split: list, digest, divide
files.py        where a store's files are, on a disk or behind a URL
remote.py       the files of a store behind a URL
connect.py      connections to what is behind a URL
answers.py      what a server's answer means
locations.py    a store's path or URL to its files
shards.py       a shard in memory, and what every layout must be able to do with one
zarr_metadata.py the Zarr v3 layout: which arrays there are
zarr_format.py  the Zarr v3 layout: the bytes of their chunks and shards
npy.py          `.npy` files, written and read without trust
tar_archive.py  a tar under construction
tar_format.py   the WebDataset layout: a tar and an offset index a shard
layouts.py      the layouts by name
receipts.py     which shards exist
folder.py       a store's folder: begun, swept, finished
writer.py       a shard to a store: private attempt, fsync, publish, receipt
store.py        what every store can be asked
reader.py       a store to records and batches
memory.py       a store in memory: the fake for tests, and the reference
ring.py         batches made ahead by threads, in buffers that are used again
verify.py       is every byte what its receipt says?
convert.py      a store to another layout or encoding
upload.py       a finished store to an object store
"""
