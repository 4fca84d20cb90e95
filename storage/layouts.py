"""The layouts by the name that a store's plan gives them."""

from storage.shards import Layout
from storage.tar_format import TAR
from storage.zarr_format import ZARR

LAYOUTS: dict[str, Layout] = {"zarr": ZARR, "wds": TAR}
