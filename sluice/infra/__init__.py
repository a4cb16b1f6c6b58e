"""Settings, object store, processes of the local profile, errors and progress. The lowest layer."""
