"""The bundle: a folder of engines and the ``manifest.json`` that says how to run them.

write       engine files + manifest -> a folder, all of it or nothing
read        a folder -> a manifest that is whole, and files that are what it says
structure   what makes a manifest consistent; both of the above ask it
"""

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.read import check_files, check_versions, manifest_digest, read_manifest
from torchtrt_md.bundle.write import check_destination, write_bundle

__all__ = [
    "Manifest",
    "check_destination",
    "check_files",
    "check_versions",
    "manifest_digest",
    "read_manifest",
    "write_bundle",
]
