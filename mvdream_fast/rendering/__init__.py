"""3D files to multi-view renders in shards."""
