"""Captioned images: captions, sources, order of samples, batches, and packing into shards."""
