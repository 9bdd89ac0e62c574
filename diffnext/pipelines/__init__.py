"""Folders of NOVA pipelines, and generation with them."""

from diffnext.pipelines.components import Components, load_components
from diffnext.pipelines.nova_pipeline import NonFiniteResult, NOVAPipeline, NOVAPipelineOutput

__all__ = ["Components", "NOVAPipeline", "NOVAPipelineOutput", "NonFiniteResult", "load_components"]
