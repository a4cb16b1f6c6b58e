"""One file per pipeline step: typed inputs in, one library call, artifacts out."""
