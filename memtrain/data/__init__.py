"""What a run reads. `memtrain.data.pipeline.build_pipeline` is the door; see docs/data.md.

Nothing here imports JAX but the first batch: Grain, which reads ahead, brings it along.
"""
