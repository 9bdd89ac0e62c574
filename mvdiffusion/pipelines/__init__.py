"""Generation of views with diffusers' kind of pipeline."""

import diffusers

from mvdiffusion.pipelines.mvdiffusion_image import (
    MVDiffusionImagePipeline,
    MVDiffusionOutput,
    ViewCondition,
    camera_table,
    ddim_schedule,
    denoise_views,
    fixed_cameras,
    generator_noise,
    load_pipeline,
    pipeline_index,
    sample_views,
)

# DiffusionPipeline.from_pretrained looks for a saved pipeline's class here and nowhere else.
diffusers.MVDiffusionImagePipeline = MVDiffusionImagePipeline

__all__ = [
    "MVDiffusionImagePipeline",
    "MVDiffusionOutput",
    "ViewCondition",
    "camera_table",
    "ddim_schedule",
    "denoise_views",
    "fixed_cameras",
    "generator_noise",
    "load_pipeline",
    "pipeline_index",
    "sample_views",
]
