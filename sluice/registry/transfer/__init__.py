"""Transfer between sites: signed snapshots of releases, as one file to carry or mirrored from store to store."""
