"""The bundle: a folder of engines, graphs and weights, and the ``manifest.json`` that says how to run them.

write       files + manifest -> a folder, all of it or nothing
read        a folder -> a manifest that is whole, and files that are what it says
files       opens plain files inside the folder, and nothing else
structure   what makes a manifest consistent; writing and reading ask it
rendezvous  whether the ranks meet at their collectives
schema      the JSON Schema of the manifest
limits      how large anything in a bundle may be
weights     a rank's weights <-> safetensors
given       a rank's part of weights that the bundle does not have, from the model's own checkpoint
"""

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.read import check_files, check_versions, manifest_digest, rank_files, read_manifest
from torchtrt_md.bundle.write import check_destination, write_bundle

__all__ = [
    "Manifest",
    "check_destination",
    "check_files",
    "check_versions",
    "manifest_digest",
    "rank_files",
    "read_manifest",
    "write_bundle",
]
