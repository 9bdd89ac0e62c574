"""Folders of NOVA pipelines, and generation with them."""

from diffnext.pipelines.components import Components, load_components
from diffnext.pipelines.nova_pipeline import NOVAPipeline, NOVAPipelineOutput

__all__ = ["Components", "NOVAPipeline", "NOVAPipelineOutput", "load_components"]
