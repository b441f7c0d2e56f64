"""From shards of multi-view renders to training batches, and the captions in them."""
