"""The pipelines that configurations name in `pipeline.target`."""
