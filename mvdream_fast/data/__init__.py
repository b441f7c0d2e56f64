"""From 3D assets to training batches: loading meshes, captions, multi-view renders, shards."""
